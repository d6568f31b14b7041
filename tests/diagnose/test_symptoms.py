"""Rules for symptoms, on real runs that have them and on losses made to order."""

import math

import numpy as np
import pytest

import attnscope
from attnscope.diagnose import diagnose
from attnscope.diagnose.rules.loss import loss_explosion, loss_spike, stalled
from attnscope.diagnose.rules.nonfinite import nonfinite
from attnscope.signals.spikes import BACK_WITHIN, WINDOW
from tests.diagnose.synthetic import heads_table, run_of, steps_table, watched_run_of

TWINS = {
    "model": {"d_model": 64},
    "data": {"batch_size": 4},
    "train": {"steps": 40, "checkpoint_every": 0},
    "arm": [{"name": "unscaled", "attention": {"scale": "none"}}, {"name": "scaled"}],
}


@pytest.fixture(scope="module")
def twins(tmp_path_factory):
    return attnscope.train_model(TWINS, path=tmp_path_factory.mktemp("runs") / "twins")


def quiet(n=100, level=4.0, seed=0):
    """A loss with the noise of small batches."""
    return level + 0.1 * np.random.default_rng(seed).normal(size=n)


def two_arms():
    return {"arm": [{"name": n, "init": {"gain": g}} for n, g in (("a", 1.0), ("b", 1.1))]}


def test_the_first_nonfinite_tensor_of_a_real_explosion_is_named(twins):
    finding = nonfinite(twins)
    assert finding.members == ("unscaled",) and finding.kind == "symptom"
    events = twins.events[twins.events["kind"] == "nonfinite"]
    (evidence,) = finding.evidence
    assert evidence.step == events["step"].min()
    # Which breaks first is a matter of the processor's last bit: a gradient, and the loss a step later, or logits, and the loss with them.
    if evidence.quantity == "nonfinite":
        assert twins.members[0].nonfinite_at == evidence.step + 1
        assert f"in the backward pass: gradient ({evidence.group})" in finding.summary
    else:
        assert (evidence.quantity, twins.members[0].nonfinite_at) == ("max_logit_bound", evidence.step)
        assert f"attention logits in layer {evidence.layer}" in finding.summary


def test_without_events_the_loss_tells_where_numbers_stopped(twins, tmp_path):
    losses = [[4.0, 4.0, np.nan, np.nan], [4.0, 4.0, 4.0, 4.0]]
    finding = nonfinite(run_of(tmp_path / "r", two_arms(), steps=steps_table(losses)))
    (evidence,) = finding.evidence
    assert (evidence.member, evidence.step, evidence.quantity) == ("a", 2, "loss")


def test_within_a_step_logits_come_before_the_loss_and_an_earlier_step_before_both(tmp_path):
    events = [
        ("nonfinite", 7, 0, {"tensor": "loss"}),
        ("nonfinite", 7, 0, {"tensor": "attention logits", "where": ["layer 2", "layer 3"]}),
        ("nonfinite", 9, 1, {"tensor": "loss"}),
        ("nonfinite", 8, 1, {"tensor": "gradient", "where": ["layer 1 mlp_in"]}),
    ]
    finding = nonfinite(run_of(tmp_path / "r", two_arms(), events=events))
    first, second = finding.evidence
    assert (first.member, first.step, first.layer, first.quantity) == ("a", 7, 2, "max_logit_bound")
    assert (second.member, second.step, second.layer, second.group) == ("b", 8, 1, "mlp_in")


def test_the_place_is_what_the_event_says_and_not_what_its_words_look_like(tmp_path):
    attention = {
        "tensor": "attention logits",
        "where": ["layer 9 of mine"],
        "places": [{"layer": 2, "path": "layer 9 of mine"}],
    }
    run = run_of(tmp_path / "r", steps=steps_table([4.0, np.nan]), events=[("nonfinite", 1, 0, attention)])
    (evidence,) = nonfinite(run).evidence
    assert (evidence.layer, evidence.group) == (2, "layer 9 of mine")


def test_a_real_explosion_is_told_with_the_attention_before(twins):
    finding = loss_explosion(twins)
    member = twins.members[0]
    losses = twins.steps[twins.steps["member"] == "unscaled"].set_index("step")["loss"]
    assert finding.members == ("unscaled",)
    assert f"unscaled diverged at step {member.diverged_at}" in finding.summary
    peak = losses[np.isfinite(losses)].max()
    assert f"{peak:.3g} ({peak / losses[0]:.3g} times as much)" in finding.summary
    loss, *signals = finding.evidence
    assert loss.value == pytest.approx(losses[member.diverged_at])
    assert loss.threshold == member.limit
    assert losses[: member.diverged_at - 1].min() <= loss.threshold / 2 <= losses[0]
    heads = twins.heads[twins.heads["member"] == "unscaled"].groupby("step")
    for each in signals:
        assert each.step < member.diverged_at
        if each.quantity == "entropy_ratio":
            assert each.value == pytest.approx(heads["entropy_ratio"].mean()[each.step], rel=1e-5)
        else:
            assert each.value == heads["max_logit"].max()[each.step] > each.threshold
    assert [each.quantity for each in signals] == ["entropy_ratio", "max_logit"]


def test_signals_count_only_before_the_explosion(tmp_path):
    losses = [4.0] * 10 + [9.0] * 10
    at = np.arange(20)
    normal = heads_table(1, at, entropy_ratio=np.where(at < 10, 0.5, 0.0)[:, None, None, None])
    said = loss_explosion(run_of(tmp_path / "a", steps=steps_table(losses), heads=normal))
    assert "stayed in their normal range" in said.summary and len(said.evidence) == 1
    early = heads_table(1, at, max_logit=np.where(at < 4, 10, 2000)[:, None, None, None])
    said = loss_explosion(run_of(tmp_path / "b", steps=steps_table(losses), heads=early))
    assert "max_logit was 2e+03 at step 4 (above 1000), 6 steps earlier" in said.summary
    said = loss_explosion(run_of(tmp_path / "c", steps=steps_table(losses)))
    assert "No attention was measured before." in said.summary


def test_a_loss_that_is_high_twice_or_falls_does_not_explode(tmp_path):
    losses = [4.0] * 10 + [9.0, 9.0] + [3.0] * 10
    assert loss_explosion(run_of(tmp_path / "r", steps=steps_table(losses))) is None


def test_spikes_that_come_back_are_counted_and_the_largest_is_named(tmp_path):
    losses = quiet(200)
    losses[50:53] = 7.0, 6.5, 6.0  # one spike, three steps long
    losses[120] = 12.0
    run = run_of(tmp_path / "r", steps=steps_table(losses), unigram=None)
    finding = loss_spike(run)
    assert finding.summary.startswith("2 spikes of the loss")
    assert [(each.step, each.value) for each in finding.evidence] == [(120, 12.0), (50, 7.0)]
    before = np.float32(losses)[100:120].astype(float)
    middle = np.median(before)
    spread = np.median(np.abs(before - middle))
    expected = middle + max(6 * 1.4826 * spread, 0.05 * middle)
    assert finding.evidence[0].threshold == pytest.approx(expected)


def test_runs_shorter_than_a_window_are_looked_at(tmp_path):
    for n in range(1, 25):
        run = run_of(tmp_path / f"{n}", steps=steps_table(quiet(n)))
        assert all(finding.rule != "loss_spike" for finding in diagnose(run))


@pytest.mark.parametrize("seed", range(20))
def test_a_falling_loss_is_no_spike(tmp_path, seed):
    noise = 0.3 * (quiet(400, seed=seed) - 4.0)  # too little to reach a twentieth of the loss
    falling = 4.0 + noise + 15 * np.exp(-np.arange(400) / 40)
    assert loss_spike(run_of(tmp_path / "r", steps=steps_table(falling))) is None


def test_noise_alone_is_taken_for_a_spike_as_rarely_as_the_finding_says(tmp_path):
    finding = loss_spike(run_of(tmp_path / "r", steps=steps_table(quiet(200_000))))
    assert "about once in 5,000 steps" in finding.source
    count = len(finding.evidence) + finding.evidence_left_out
    assert 20 <= count <= 60  # 40 expected; Poisson's three standard deviations


def test_a_level_that_stays_high_is_no_spike(tmp_path):
    losses = quiet(200)
    losses[100:] += 3.0
    assert loss_spike(run_of(tmp_path / "r", steps=steps_table(losses))) is None
    losses = quiet(200)
    losses[100 : 101 + BACK_WITHIN] += 3.0  # back, but one step too late
    assert loss_spike(run_of(tmp_path / "s", steps=steps_table(losses))) is None
    losses[100 + BACK_WITHIN] -= 3.0
    assert loss_spike(run_of(tmp_path / "t", steps=steps_table(losses))) is not None


def test_a_quiet_loss_needs_more_than_a_twentieth(tmp_path):
    losses = np.full(100, 4.0)
    losses[50] = 4.19
    assert loss_spike(run_of(tmp_path / "r", steps=steps_table(losses))) is None
    losses[50] = 4.21
    assert loss_spike(run_of(tmp_path / "s", steps=steps_table(losses))) is not None


def test_windows_do_not_reach_into_another_member(tmp_path):
    losses = np.stack([quiet(60, level=1.0), quiet(60, level=5.0, seed=1)])
    losses[1, WINDOW - 1] = 9.0  # too early to be judged
    assert loss_spike(run_of(tmp_path / "r", two_arms(), steps=steps_table(losses))) is None
    losses[1, WINDOW] = 9.0
    finding = loss_spike(run_of(tmp_path / "s", two_arms(), steps=steps_table(losses)))
    assert finding.members == ("b",)


def test_what_happens_while_a_member_diverges_is_no_spike(tmp_path):
    losses = quiet(100)
    losses[60:] += 20.0  # diverged at 60
    losses[80] = 90.0
    run = run_of(tmp_path / "r", steps=steps_table(losses))
    assert run.members[0].diverged_at == 60
    assert loss_spike(run) is None
    losses[40] = 7.0
    assert [e.step for e in loss_spike(run_of(tmp_path / "s", steps=steps_table(losses))).evidence] == [40]


def test_a_finite_loss_above_the_unigram_loss_is_stalled(tmp_path, twins):
    finding = stalled(twins)
    assert finding.members == ("scaled",)  # 40 steps are not enough, which is true
    (evidence,) = finding.evidence
    assert evidence.threshold == twins.unigram_of(0)
    assert evidence.value == pytest.approx(twins.members[1].final_loss)
    run = run_of(tmp_path / "r", steps=steps_table(np.full((1, 30), 4.0)), unigram=4.1)
    assert stalled(run) is None
    run = run_of(tmp_path / "s", steps=steps_table(np.full((1, 30), 4.0)), unigram=None)
    assert stalled(run).why == "the unigram loss of the data is unknown"


def test_the_furthest_above_the_unigram_loss_comes_first(tmp_path):
    losses = np.stack([np.full(30, 4.0), np.full(30, 7.0)])
    run = run_of(tmp_path / "r", two_arms(), steps=steps_table(losses), unigram=3.0)
    finding = stalled(run)
    assert [each.member for each in finding.evidence] == ["b", "a"]
    assert finding.members == ("a", "b")
    assert finding.summary.startswith("a and b stalled. The loss of b is finite, but 7 at the end")


def test_infinite_first_losses_and_negative_ones_do_not_break_the_sentences(tmp_path):
    for name, losses in {
        "inf": [np.inf, np.nan, np.nan],
        "minus": [-1.0, -2.0, np.nan],
        "zero": [0.0, 0.0, np.inf],
    }.items():
        finding = loss_explosion(run_of(tmp_path / name, steps=steps_table(losses)))
        assert finding.evidence[0].step is not None
        assert not math.isfinite(finding.evidence[0].value)


def test_a_loss_that_still_falls_has_not_stalled(tmp_path):
    losses = np.stack([np.linspace(18, 8, 20), np.linspace(17, 7, 20)])
    finding = stalled(run_of(tmp_path / "a", two_arms(), steps=steps_table(losses), unigram=3.0))
    assert finding.title == "Training ended above the unigram loss, still falling"
    assert finding.summary.startswith("a and b ended above the unigram loss. The loss of a is")
    assert finding.summary.endswith("It still falls.") and "Train longer" in finding.remedy
    losses[1] = 7.0
    finding = stalled(run_of(tmp_path / "b", two_arms(), steps=steps_table(losses), unigram=3.0))
    assert finding.title == "Training stalled above the unigram loss"
    assert finding.summary.endswith("1 of 2 still fall.")


def test_a_cross_entropy_that_climbs_to_the_end_diverged_in_the_lab_and_in_a_watched_script(tmp_path):
    losses = 4.0 * (5000 / 4) ** np.linspace(0, 1, 400)
    lab = run_of(tmp_path / "lab", steps=steps_table(losses), planned=400, reference={"uniform": np.log(50)})
    seen = [("cross_entropy", 0, {"classes": 50, "loss": 4.0})]
    watched = watched_run_of(tmp_path / "watched", steps=steps_table(losses), events=seen)
    for run in (lab, watched):
        (record,) = run.members
        assert record.status == "diverged" and record.limit == 8.0
        assert loss_explosion(run).step == record.diverged_at
    for path, reference in (("low", np.log(50)), ("unknown", None)):
        least = losses if reference is None else losses / 200 + 4
        known = {} if reference is None else {"uniform": reference}
        run = run_of(tmp_path / path, steps=steps_table(least), planned=400, reference=known)
        assert run.members[0].diverged_at is None
