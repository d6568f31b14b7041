"""Leads: traces of signals, thresholds at a share of false alarms, first firings, intervals."""

import math

import numpy as np
import pytest

from attnscope.bench.faults.kinds import FAULTS
from attnscope.bench.faults.lead import FALSE_ALARMS, GRADUAL_FROM, SUDDEN, auroc, first_firing, lead_table
from attnscope.bench.faults.population import HEALTHY, TUNED
from attnscope.bench.faults.traces import (
    SIGNALS,
    WINDOW,
    Trace,
    cusum,
    scores,
    spike_scores,
    traces_of,
    worst_so_far,
    z_scores,
)
from attnscope.runs.reader import open_run
from attnscope.signals.spikes import SIGMAS
from tests.bench.answers import answered, done

FAULT = "learning rate too high"


def table(tuned, reported):
    return lead_table(tuned=tuned, reported=reported, is_healthy=lambda each: each.done.fault == HEALTHY)


def healthy(number, half="reported", **values):
    return answered(done(HEALTHY, seed=number, half=half), **values)


def test_a_trace_has_the_steps_at_which_a_signal_was_worse_than_ever():
    steps, values = np.array([0, 1, 2, 5, 6]), np.array([1.0, 0.5, 1.2345678, 1.2349, 3.0])
    assert worst_so_far(steps, values, is_low_bad=False) == Trace(steps=(0, 2, 6), values=(1.0, 1.23, 3.0))
    assert worst_so_far(steps, values, is_low_bad=True) == Trace(steps=(0, 1), values=(1.0, 0.5))


def test_a_score_is_the_value_or_how_many_times_the_first_it_is_and_larger_is_worse():
    trace = Trace(steps=(0, 5), values=(2.0, 1.0))
    assert scores(trace, SIGNALS["entropy"], "as is") == (-2.0, -1.0)
    assert scores(trace, SIGNALS["entropy"], "of its first") == (-1.0, -0.5)
    assert scores(trace, SIGNALS["max_logit"], "of its first") == (1.0, 0.5)
    for first in (0.0, -1.0, math.inf):
        trace = Trace(steps=(0, 5), values=(first, 4.0))
        assert np.isnan(scores(trace, SIGNALS["max_logit"], "of its first")).all()


def test_what_trackers_offer_against_their_slow_twins():
    losses = np.random.default_rng(0).normal(3.0, 0.1, 80)
    losses[60:] += np.linspace(0, 3, 20)
    z = z_scores(losses)
    at = 70
    before = losses[at - WINDOW : at]
    assert z[at] == pytest.approx((losses[at] - before.mean()) / before.std(ddof=1))
    assert np.isnan(z[:5]).all() and np.isfinite(z[5:]).all()
    total = 0.0
    for score, summed in zip(z[5:], cusum(losses)[5:], strict=True):
        total = max(0.0, total + score - 0.5)
        assert summed == pytest.approx(total)
    spikes = spike_scores(losses)
    before = losses[at - 20 : at]
    unit = max(1.4826 * np.median(abs(before - np.median(before))), 0.05 / SIGMAS * np.median(before))
    assert spikes[at] == pytest.approx((losses[at] - np.median(before)) / unit)
    assert np.isnan(spikes[:20]).all()
    losses[50] = math.nan
    assert z_scores(losses)[50] == spike_scores(losses)[50] == math.inf
    assert np.isnan(spike_scores(losses[:10])).all()


def test_a_threshold_lies_where_the_healthy_of_the_other_half_pass_and_a_lead_is_told_with_its_interval():
    tuned = [healthy(2 * n, TUNED, max_logit=(1.0, 1.0 + n / 300)) for n in range(300)]
    reported = [healthy(1, max_logit=(1.0, 2.5)), healthy(3, max_logit=(1.0, 1.2))]
    for seed, at in ((11, 40), (13, 100), (15, 15)):
        run = answered(done(FAULT, seed=seed), diverged_at=at, norm="none", max_logit=(1.0, 1.5, 3.0, 4.0))
        reported.append(run)
    found = table(tuned, reported)
    (row,) = found.signals
    assert row.threshold == pytest.approx(1.0 + 296 / 300)  # 3 of 300 are beyond it
    assert FALSE_ALARMS == 0.01 and found.expected == pytest.approx(4 / 301)
    assert (row.false_alarms, row.healthy) == (1, 2)
    assert row.every.median == 20 and row.every.fired == pytest.approx(2 / 3)  # one diverged before it fired
    assert (row.every.low, row.every.high) == (0, 80)
    assert (row.gradual.runs, row.gradual.median, row.gradual.fired) == (2, 50, 1.0)
    assert (found.diverged, found.gradual, found.no_norm) == (3, 2, 1.0)
    assert GRADUAL_FROM == 20 and set(SUDDEN) <= {fault.name for fault in FAULTS}
    assert row.auroc == 1.0


def test_the_form_that_leads_longer_on_the_other_half_is_told_and_so_is_the_best_signal():
    tuned = [
        healthy(0, TUNED, entropy=(4.0, 2.0), max_prob=(0.2, 0.5)),
        healthy(2, TUNED, entropy=(1.0, 0.9), max_prob=(0.2, 0.5)),
        answered(
            done(FAULT, seed=4, half=TUNED), diverged_at=50, entropy=(4.0, 3.0, 1.5), max_prob=(0.2, 0.5, 0.5, 0.6)
        ),
    ]
    reported = [
        healthy(1, entropy=(1.0, 0.8), max_prob=(0.2, 0.4)),
        answered(done(FAULT, seed=3), diverged_at=60, entropy=(4.0, 3.0, 1.5), max_prob=(0.2, 0.4, 0.6)),
    ]
    found = table(tuned, reported)
    entropy, max_prob = found.of("entropy"), found.of("max_prob")
    assert (entropy.form, entropy.threshold, entropy.every.median) == ("of its first", 0.5, 40)
    assert (max_prob.form, max_prob.threshold, max_prob.every.median) == ("as is", 0.5, 40)
    assert found.best == "entropy" and found.of("grad_norm") is None and found.of(None) is None


def test_without_healthy_programs_or_divergence_there_is_no_table():
    calm, run = healthy(1, max_logit=(1.0,)), answered(done(FAULT), diverged_at=9, max_logit=(1.0,))
    assert table([], [calm, run]) is table([calm], [run]) is table([calm], [calm]) is None


def test_a_signal_that_was_not_measured_never_fires():
    assert first_firing(answered(done(FAULT)), "max_logit", "as is", 1.0) is None
    assert auroc([], [1.0]) != auroc([1.0], [])
    assert auroc([1.0, 2.0], [1.0, 0.0]) == 0.875


def test_traces_of_a_run_end_where_it_diverged(tmp_path):
    import attnscope

    config = {"model": {"d_model": 32, "n_layers": 2}, "attention": {"scale": "none"}, "optimizer": {"lr": 0.1}}
    config |= {"data": {"batch_size": 4}, "train": {"steps": 30}}
    attnscope.train_model(config, path=tmp_path / "r")
    run = open_run(tmp_path / "r")
    at = run.members[0].diverged_at
    traces = traces_of(run)
    assert at is not None and {"grad_norm", "update_ratio", "entropy", "max_logit", "softmax_gain"} <= set(traces)
    for name, trace in traces.items():
        assert trace.steps[-1] <= at and list(trace.steps) == sorted(set(trace.steps)), name
    first = run.heads[run.heads["step"] == 0]
    assert traces["max_logit"].values[0] == pytest.approx(first["max_logit"].max(), rel=0.01)
    assert traces["entropy"].values[0] == pytest.approx(first["entropy"].min(), rel=0.01)
    assert traces["attn_form_update_ratio"].values[0] == pytest.approx(first["attn_form_update_ratio"].max(), rel=0.01)
