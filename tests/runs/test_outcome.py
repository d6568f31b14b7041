"""How a member ended: the definition, case by case, and that blocks do not matter."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnscope.runs.outcome import LossWatch, outcome

NAN, INF = math.nan, math.inf


def judged(losses, *, end="finished", planned=None, unigram=3.0):
    steps = range(len(losses))
    planned = len(losses) if planned is None else planned
    return outcome(steps, losses, end_status=end, planned_steps=planned, unigram=unigram)


@pytest.mark.parametrize(
    ("losses", "at", "why"),
    [
        ([4, 3, 2, 1], None, None),
        ([4, 3, NAN, 2], 2, "not finite"),
        ([4, INF, 2, 2], 1, "not finite"),
        ([NAN, 1, 1], 0, "not finite"),
        ([4, 7.9, 7.9, 7.9, 7.9], None, None),
        ([4, 5, 8, 8, 8], 2, "above twice the first loss"),
        ([4, 8, 8, 5, 8, 8], None, None),
        ([4, 8, 9, 5, 8, 8, 20], 4, "above twice the first loss"),
        ([4, 8, 8, NAN], 3, "not finite"),
        ([4, 8, 8, INF], 1, "above twice the first loss"),
        ([4, 8, INF, INF], 2, "not finite"),
        ([4, 1, NAN, 9, 9, 9], 2, "not finite"),
        ([0, 0, 0, 0, 0], None, None),
        ([], None, None),
    ],
)
def test_divergence_is_seen_at_its_first_step(losses, at, why):
    whole, one_by_one = LossWatch(), LossWatch()
    whole.feed(range(len(losses)), losses)
    for step, loss in enumerate(losses):
        one_by_one.feed([step], [loss])
    for watch in (whole, one_by_one):
        assert (watch.diverged_at, watch.why) == (at, why)


@given(
    st.lists(st.sampled_from([1.0, 4.0, 8.0, 9.0, NAN, INF]), max_size=12),
    st.lists(st.integers(0, 12), max_size=5),
)
def test_the_answer_does_not_depend_on_the_blocks(losses, cuts):
    steps = np.arange(len(losses)) + 7
    whole, pieces = LossWatch(), LossWatch()
    whole.feed(steps, losses)
    edges = [0, *sorted(min(cut, len(losses)) for cut in cuts), len(losses)]
    for low, high in itertools.pairwise(edges):
        pieces.feed(steps[low:high], losses[low:high])
    assert (whole.diverged_at, whole.why) == (pieces.diverged_at, pieces.why)


def test_after_divergence_nothing_changes():
    watch = LossWatch()
    watch.feed([0, 1], [1.0, NAN])
    watch.feed([2, 3, 4], [NAN, 9.0, 9.0])
    assert watch.diverged_at == 1


@pytest.mark.parametrize(
    ("losses", "end", "planned", "unigram", "status"),
    [
        ([4, 2], "finished", 2, 3.0, "trained"),
        ([4, 3.5], "finished", 2, 3.0, "stalled"),
        ([4, 3.5], "finished", 2, None, "trained"),
        ([4, 2], "interrupted", 9, 3.0, "interrupted"),
        ([4, 2], "failed", 9, 3.0, "interrupted"),
        ([4, 2], "running", 9, 3.0, "running"),
        ([4, 2], None, 9, 3.0, "killed"),
        ([4, 2], None, 2, 3.0, "trained"),
        ([4, NAN], None, 9, 3.0, "diverged"),
        ([4, 8, 8, 8], "interrupted", 9, 3.0, "diverged"),
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
    end = judged([4, 2, 9, 9, 9, NAN, NAN])
    assert (end.status, end.diverged_at, end.nonfinite_at, end.best_loss) == ("diverged", 2, 5, 2)
    assert math.isnan(end.final_loss)


def test_without_steps_there_are_no_losses():
    end = judged([], end=None)
    assert (end.first_loss, end.best_loss, end.final_loss, end.last_step) == (None,) * 4
