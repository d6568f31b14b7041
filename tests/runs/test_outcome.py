"""How a member ended, case by case."""

import math

import pytest

from attnscope.runs.outcome import outcome

NAN, INF = math.nan, math.inf


def judged(losses, *, end="finished", planned=None, unigram=3.0):
    steps = range(len(losses))
    planned = len(losses) if planned is None else planned
    return outcome(steps, losses, end_status=end, planned_steps=planned, unigram=unigram)


@pytest.mark.parametrize(
    ("losses", "end", "planned", "unigram", "status"),
    [
        ([4, 2], "finished", 2, 3.0, "trained"),
        ([4, 3.5], "finished", 2, 3.0, "stalled"),
        ([4, 3.5], "finished", 2, None, "trained"),
        ([4, 2], "interrupted", 9, 3.0, "interrupted"),
        ([4, 2], "failed", 9, 3.0, "failed"),
        ([4, 2], "failed", 2, 3.0, "trained"),
        ([4, NAN], "failed", 9, 3.0, "diverged"),
        ([], "failed", 9, 3.0, "failed"),
        ([4, 2], "running", 9, 3.0, "running"),
        ([4, 2], None, 9, 3.0, "killed"),
        ([4, 2], None, 2, 3.0, "trained"),
        ([4, NAN], None, 9, 3.0, "diverged"),
        ([4, NAN], "running", 9, 3.0, "running"),
        ([4, NAN, 2], "finished", 3, 3.0, "trained"),
        ([4, 80, 80, 80, 900, 900], "interrupted", 9, 3.0, "interrupted"),
        ([4, 4, 80, 800, 8000, 9000], "interrupted", 9, 3.0, "diverged"),
        ([], None, 9, 3.0, "killed"),
        ([], "interrupted", 9, 3.0, "interrupted"),
    ],
)
def test_status(losses, end, planned, unigram, status):
    assert judged(losses, end=end, planned=planned, unigram=unigram).status == status


def test_the_final_loss_is_the_mean_of_the_last_twenty():
    losses = [10.0] * 5 + [2.0] * 10 + [1.0] * 10
    end = judged(losses)
    assert (end.first_loss, end.best_loss, end.final_loss, end.last_step) == (10, 1, 1.5, 24)


def test_a_diverged_member_says_when_it_stopped_being_finite_and_its_best_before():
    end = judged([4, 2, 90, 900, 9000, NAN, NAN])
    assert (end.status, end.diverged_at, end.nonfinite_at, end.best_loss) == ("diverged", 2, 5, 2)
    assert math.isnan(end.final_loss)


def test_a_loss_that_was_not_finite_once_counts_for_nothing_but_itself():
    end = judged([4, 3, NAN, 2, 1], unigram=None)
    assert (end.status, end.diverged_at, end.nonfinite_at) == ("trained", None, 2)
    assert end.final_loss == 2.5
    end = judged([4, 3, NAN, *[4] * 60, 90, 900, 900, NAN])
    assert (end.status, end.diverged_at, end.nonfinite_at) == ("diverged", 63, 66)


def test_the_error_is_told_where_a_part_failed_and_nowhere_else():
    for end_status, error in (("failed", "ValueError: x"), ("finished", None), (None, None)):
        end = outcome(
            [0, 1],
            [4, 2],
            end_status=end_status,
            error="ValueError: x",
            planned_steps=9,
            unigram=3.0,
        )
        assert end.error == error


def test_without_steps_there_are_no_losses():
    end = judged([], end=None)
    assert (end.first_loss, end.best_loss, end.final_loss, end.last_step) == (None,) * 4


@pytest.mark.parametrize(
    ("losses", "falls"),
    [
        ([17.9, 15, 13, 12, 11, 10, 9, 8.5, 8, 7.9], True),
        ([4.0, 4.1, 3.9, 4.05, 4.0, 3.95, 4.1, 4.0], False),
        ([3.0, 3.2, 3.1, 3.6, 3.7, 3.9, 4.0, 4.2], False),
        ([9, 8, 7, 6, *[4.0, 4.1, 3.9] * 20], False),  # it fell, long ago
        ([4.0, 3.0, 2.0], None),
        ([17.9, 15, 13, NAN, 11, 10, 9, 8.5, 8, 7.9], True),
    ],
)
def test_whether_a_loss_still_falls(losses, falls):
    assert judged(losses).is_falling is falls
