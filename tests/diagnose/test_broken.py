"""Numbers that are not finite: for good, or for a moment."""

import numpy as np
import pytest

from attnscope.diagnose import diagnose
from attnscope.diagnose.rules.nonfinite import (
    MOST_HALVINGS,
    nonfinite,
    nonfinite_loss_passed,
    updates_skipped,
)
from tests.diagnose.synthetic import run_of, steps_table

NAN, INF = np.nan, np.inf


def run_with(path, losses, *, grad_norms=None, scales=1.0, events=()):
    norms = np.where(np.isfinite(losses), 1.0, NAN) if grad_norms is None else grad_norms
    scale = np.broadcast_to(scales, len(losses))
    steps = steps_table([losses], grad_norm=norms, loss_scale=scale)
    return run_of(path, steps=steps, events=events, unigram=None)


def rules_of(run):
    return {finding.rule for finding in diagnose(run)}


def test_a_batch_of_nothing_is_said_in_its_own_words(tmp_path):
    losses = np.full(30, 4.0)
    losses[14] = NAN
    events = [("nonfinite", 14, 0, {"tensor": "loss"})]
    run = run_with(tmp_path / "r", losses, grad_norms=np.ones(30), events=events)
    finding = nonfinite_loss_passed(run)
    assert (finding.kind, finding.members) == ("symptom", tuple(e.name for e in run.entries))
    assert finding.summary == (
        f"The loss of step 14 of {run.entries[0].name} is NaN; its gradients and the weights stayed finite, and training "
        "went on."
    )
    assert [(e.step, e.quantity) for e in finding.evidence] == [(14, "loss")]
    assert rules_of(run) == {"nonfinite_loss_passed"}


def test_several_are_counted_and_a_broken_gradient_is_said(tmp_path):
    losses = np.full(30, 4.0)
    losses[[5, 6, 20]] = INF
    said = nonfinite_loss_passed(run_with(tmp_path / "r", losses, scales=1024.0)).summary
    assert "The loss of step 5 of" in said and "is infinite (as are 2 after it)" in said
    assert "its gradients were not finite either, but the weights stayed so" in said


def test_what_is_not_finite_for_good_is_dated_after_what_passed(tmp_path):
    losses = np.array([4.0, 4.0, NAN, 4.0, 4.0, NAN, NAN, NAN])
    events = [
        ("nonfinite", 2, 0, {"tensor": "loss"}),
        ("nonfinite", 5, 0, {"tensor": "attention logits", "where": ["layer 1"]}),
    ]
    run = run_with(tmp_path / "r", losses, events=events)
    (evidence,) = nonfinite(run).evidence
    assert (evidence.step, evidence.layer, evidence.quantity) == (5, 1, "max_logit_bound")
    assert [e.step for e in nonfinite_loss_passed(run).evidence] == [2]
    without = run_with(tmp_path / "s", losses, events=events[:1])
    (evidence,) = nonfinite(without).evidence
    assert (evidence.step, evidence.quantity) == (5, "loss")


@pytest.mark.parametrize(
    ("norms", "scales", "found"),
    [
        ([1, INF, 1, 1, 1], 65536.0, False),  # how loss scaling finds its scale
        ([INF, INF, 1, 1, 1], 65536.0, False),
        ([1, 1, 1, 1, INF], 65536.0, False),  # the last step is skipped like any other
        ([1, INF, INF, INF, INF], [2.0, 2.0, 1.0, 0.5, 0.25], True),  # it never finds one
        ([1, 1, 1, 1, NAN], 1.0, True),  # nothing skipped it
    ],
)
def test_gradients_that_overflow_under_loss_scaling_are_no_finding(tmp_path, norms, scales, found):
    bad = np.flatnonzero(~np.isfinite(norms))[0]
    events = [("nonfinite", int(bad), 0, {"tensor": "gradient", "where": ["layer 0 q"]})]
    run = run_with(tmp_path / "r", np.full(5, 4.0), grad_norms=norms, scales=scales, events=events)
    assert rules_of(run) - {"loss_scale_collapse"} == ({"nonfinite"} if found else set())


def test_a_member_that_failed_is_told_with_its_error(tmp_path):
    steps = steps_table([[4.0, 4.0]])
    run = run_of(tmp_path / "r", steps=steps, end="failed", error="ValueError: no\x1b data", planned=9)
    (finding,) = [f for f in diagnose(run) if f.rule == "failed"]
    name = run.entries[0].name
    assert finding.summary == f"{name} failed after step 1: ValueError: no� data"
    assert run.members[0].status == "failed"
    whole = run_of(tmp_path / "s", steps=steps, end="failed", error="x", planned=2)
    assert "failed" not in rules_of(whole), "what failed came after training"
    nothing = run_of(tmp_path / "t", end="failed", planned=2)
    assert [f.summary for f in diagnose(nothing)] == [
        f"{name} failed before its first step: an error that it did not name"
    ]


def test_a_loss_scale_that_halves_without_end_is_named_with_its_parameters(tmp_path):
    where = {"why": "GradScaler found NaN or Inf in the gradient", "where": ["layer 0 qkv", "out"]}

    def run(name, times):
        events = [("skipped_update", 3, 0, where)] * times + [("skipped_update", 4, 0, where)]
        return run_with(tmp_path / name, np.full(5, 4.0), events=events)

    assert updates_skipped(run("a", MOST_HALVINGS)) is None, "as many as GradScaler may need"
    finding = updates_skipped(run("b", MOST_HALVINGS + 1))
    assert f"After 3 updates of {finding.members[0]}, 17 in a row were skipped" in finding.summary
    (evidence,) = finding.evidence
    assert (evidence.step, evidence.layer, evidence.group) == (3, 0, "qkv")
