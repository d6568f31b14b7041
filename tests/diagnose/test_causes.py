"""Rules for causes, on real runs that have them and on runs that have not."""

import json
import math

import numpy as np
import pytest

import attnscope
from attnscope.diagnose import Finding, NotLooked, diagnose
from attnscope.diagnose.blindness import NO_RATIO
from attnscope.diagnose.rules.clipping import COSTLY_FACTOR, FEWEST_STEPS, HARMLESS_FACTOR, clipping_always_on
from attnscope.diagnose.rules.heads import FEWEST_STEPS_TO_LEARN, UNIFORM_STD
from attnscope.diagnose.rules.saturation import SATURATED_RATIO, saturated_at_start
from attnscope.diagnose.rules.scale import FLATTENS, applied_scale, unusual_scale
from attnscope.findings import MOST_EVIDENCE
from tests.diagnose.synthetic import heads_table, run_of, steps_table

SMALL = {
    "model": {"d_model": 64, "n_layers": 2, "seq_len": 16},
    "data": {"batch_size": 4},
    "train": {"steps": 1, "checkpoint_every": 0},
}


@pytest.fixture(scope="module")
def scales(tmp_path_factory):
    """One real member for every rule of attention.scale, at its first step."""
    rules = ("inverse_sqrt", "none", "inverse", "depth", 0.5)
    arms = [{"name": str(rule), "attention": {"scale": rule}} for rule in rules]
    return attnscope.train_model(SMALL | {"arm": arms}, path=tmp_path_factory.mktemp("runs") / "r")


def test_a_scale_that_makes_attention_sharp_is_a_warning_and_any_other_a_note(scales):
    sharp, other = applied_scale(scales), unusual_scale(scales)
    assert (sharp.severity, other.severity) == ("warning", "note")
    assert (sharp.members, other.members) == (("none", "0.5"), ("inverse", "depth"))
    applied = {e.member: e for e in sharp.evidence if e.quantity == "attention.scale"}
    assert applied["none"].value == 1 and applied["none"].threshold == pytest.approx(32**-0.5)
    assert sharp.evidence[0].member == "none" and other.evidence[0].member == "inverse"
    assert len(sharp.evidence) == MOST_EVIDENCE
    assert len(sharp.evidence) + sharp.evidence_left_out == 3 * len(sharp.members)
    assert len(other.evidence) + other.evidence_left_out == 2 * len(other.members)
    ratio = scales.heads[scales.heads["member"] == "none"]["entropy_ratio"].mean()
    assert f"sharp from the start: a mean entropy_ratio of {ratio:.2g}" in sharp.summary
    assert "Nothing that was measured shows harm" in other.summary


@pytest.mark.parametrize(
    ("changes", "severity"),
    [
        ({"attention": {"scale": "none"}}, "warning"),
        ({"attention": {"scale": "none"}, "init": {"qk_gain": 0.4}}, "note"),  # T5
        ({"attention": {"scale": "inverse"}}, "note"),  # muP
        ({"attention": {"scale": 1.2, "qk_norm": True}, "model": {"d_head": 4}}, "note"),
        ({"attention": {"scale": "none"}, "model": {"n_heads": 16}}, "note"),  # d_head 4
        ({}, None),
    ],
)
def test_an_odd_scale_is_more_than_a_note_only_where_it_did_harm(tmp_path, changes, severity):
    config = SMALL | {"train": {"steps": 30, "checkpoint_every": 0}}
    config |= {name: config.get(name, {}) | table for name, table in changes.items()}
    config["model"] = config["model"] | {"norm": "pre"}
    run = attnscope.train_model(config, path=tmp_path / "r")
    found = {f.rule: f.severity for f in diagnose(run) if f.rule in ("applied_scale", "unusual_scale")}
    rules = {"warning": "applied_scale", "note": "unusual_scale"}
    assert found == ({} if severity is None else {rules[severity]: severity})


@pytest.mark.parametrize(
    ("uniform", "times", "last", "severity"),
    [
        (2, 0.03, 120, "warning"),
        (1, 0.03, 120, "note"),  # of 4 heads
        (2, FLATTENS, 120, "warning"),
        (2, FLATTENS + 0.02, 120, "note"),
        (4, 0.03, FEWEST_STEPS_TO_LEARN - 2, "note"),
    ],
)
def test_a_scale_under_which_half_of_the_heads_stay_uniform_is_a_cause(tmp_path, uniform, times, last, severity):
    std = np.full((13, 1, 1, 4), 1.1 * UNIFORM_STD)
    std[..., :uniform] = 0.9 * UNIFORM_STD
    steps = np.linspace(0, last, 13).astype(int)
    heads = heads_table(1, steps, n_heads=4, logit_std=std)
    run = run_of(
        tmp_path / "r",
        {"model": {"d_model": 64, "n_heads": 4, "n_layers": 1}, "attention": {"scale": times / 4}},
        steps=steps_table(np.full(last + 1, 4.0)),
        heads=heads,
    )
    (found,) = (f for f in diagnose(run) if f.rule in ("applied_scale", "unusual_scale"))
    assert found.severity == severity
    said = f"{uniform} of 4 heads look at all keys alike from the first step to step {last}."
    assert found.summary.endswith(said) is (severity == "warning")


def twins_run(path, losses, *, scale="none", heads=None, **other):
    arms = [
        {"name": "odd", "attention": {"scale": scale}},
        {"name": "usual"} | other,
    ]
    heads = heads_table(2, [0]) if heads is None else heads  # not sharp
    return run_of(path, {"arm": arms}, steps=steps_table(losses), heads=heads)


def test_an_end_worse_than_that_of_the_twin_makes_it_a_cause(tmp_path):
    flat = np.full(60, 4.0)
    run = twins_run(tmp_path / "a", [flat + 0.07, flat])
    assert "It ends 0.07 nats above usual, which differs in the scale alone" in (applied_scale(run).summary)
    assert unusual_scale(run) is None
    same = twins_run(tmp_path / "b", [flat + 0.05, flat])
    assert applied_scale(same) is None and unusual_scale(same).members == ("odd",)
    better = twins_run(tmp_path / "c", [flat - 0.5, flat])
    assert applied_scale(better) is None
    short = twins_run(tmp_path / "d", [flat[:15] + 1, flat[:15]])
    assert applied_scale(short).why.startswith("fewer than 20 steps"), "nothing is learned yet"
    no_twin = twins_run(tmp_path / "e", [flat + 1, flat], init={"gain": 0.5})
    assert applied_scale(no_twin) is None, "they differ in more than the scale"
    small = twins_run(tmp_path / "f", [flat + 1, flat], scale="inverse")
    assert applied_scale(small).members == ("odd",), "a smaller scale can do harm as well"


def test_divergence_makes_it_a_cause_where_attention_was_saturated_before(tmp_path):
    losses = np.full((1, 60), 4.0)
    losses[0, 40:] = 500.0
    at = np.arange(0, 60, 5)
    calm = heads_table(1, at)
    sharp = heads_table(1, at, max_logit=np.where(at < 30, 10, 5000)[:, None, None, None])
    unscaled = {"attention": {"scale": "none"}}
    run = run_of(tmp_path / "a", unscaled, steps=steps_table(losses), heads=sharp)
    said = applied_scale(run)
    assert "Before it diverged at step 40" in said.summary and "max_logit 5e+03 at step 30" in (said.summary)
    run = run_of(tmp_path / "b", unscaled, steps=steps_table(losses), heads=calm)
    assert applied_scale(run) is None and unusual_scale(run) is not None
    flat = {"attention": {"scale": "inverse"}}
    run = run_of(tmp_path / "c", flat, steps=steps_table(losses), heads=sharp)
    assert applied_scale(run) is None, "a smaller scale does not sharpen"


def test_the_measured_spread_of_logits_stands_beside_the_scale(tmp_path):
    arms = [{"name": "unscaled", "attention": {"scale": "none"}}, {"name": "scaled"}]
    run = attnscope.train_model(SMALL | {"arm": arms}, path=tmp_path / "r")
    setting, spread, _ = applied_scale(run).evidence
    assert (setting.member, setting.quantity) == ("unscaled", "attention.scale")
    assert (spread.quantity, spread.step, spread.layer) == ("logit_std", 0, 0)
    heads = run.heads[(run.heads["member"] == "unscaled") & (run.heads["layer"] == 0)]
    assert spread.value == pytest.approx(math.sqrt((heads["logit_std"] ** 2).mean()))
    assert spread.threshold == pytest.approx(math.sqrt(32))
    assert f"standard deviation of {spread.value:.3g}" in applied_scale(run).summary


def test_a_trained_scale_and_the_right_number_are_no_finding(tmp_path):
    for scale in ("inverse_sqrt", "learned", 0.125, 0.1255):
        config = {"model": {"d_head": 64}, "attention": {"scale": scale}}
        run = run_of(tmp_path / str(scale), config)
        assert applied_scale(run) is None and unusual_scale(run) is None
    config["attention"]["scale"] = 0.13
    assert unusual_scale(run_of(tmp_path / "r", config)) is not None


def test_depth_scale_is_told_by_the_deepest_layer_and_one_layer_is_no_finding(tmp_path):
    config = {"model": {"n_layers": 5}, "attention": {"scale": "depth"}}
    (evidence,) = unusual_scale(run_of(tmp_path / "deep", config)).evidence
    assert evidence.layer == 4 and evidence.value == pytest.approx(evidence.threshold / 5)
    config["model"]["n_layers"] = 1
    assert unusual_scale(run_of(tmp_path / "flat", config)) is None


def test_a_smaller_scale_is_not_advised_against_as_a_larger_one_is(tmp_path):
    run = run_of(tmp_path / "r", {"attention": {"scale": "inverse"}})
    finding = unusual_scale(run)
    assert "1/8 of 1/sqrt(64) = 0.125" in finding.summary
    assert finding.remedy.startswith("If it is not on purpose")


def test_normalized_q_and_k_are_said_to_bound_the_logits(tmp_path):
    plain = unusual_scale(run_of(tmp_path / "a", {"attention": {"scale": "none"}}))
    normed = {"attention": {"scale": "none", "qk_norm": True}}
    assert "qk_norm" not in plain.summary
    assert "no logit is above 64" in unusual_scale(run_of(tmp_path / "b", normed)).summary


def test_the_bound_under_qk_norm_holds_in_a_real_run(tmp_path):
    config = SMALL | {"attention": {"scale": "none", "qk_norm": True}}
    run = attnscope.train_model(config, path=tmp_path / "r")
    np.testing.assert_allclose(run.heads["max_logit_bound"], 32, rtol=1e-3)
    assert "no logit is above 32" in applied_scale(run).summary


def test_unscaled_attention_begins_saturated_and_its_scaled_twin_does_not(tmp_path):
    arms = [{"name": "unscaled", "attention": {"scale": "none"}}, {"name": "scaled"}]
    run = attnscope.train_model(SMALL | {"arm": arms}, path=tmp_path / "r")
    finding = saturated_at_start(run)
    assert finding.members == ("unscaled",)
    heads = run.heads[run.heads["member"] == "unscaled"]
    assert f"is {heads['entropy_ratio'].mean():.2g} of its maximum" in finding.summary
    lowest = heads.loc[heads["entropy_ratio"].idxmin()]
    worst = finding.evidence[0]
    assert (worst.layer, worst.head) == (lowest["layer"], lowest["head"])
    assert worst.value == pytest.approx(lowest["entropy_ratio"])
    values = [each.value for each in finding.evidence]
    assert values == sorted(values) and max(values) < SATURATED_RATIO


def test_only_the_first_step_decides_what_begins_saturated(tmp_path):
    ratio = np.full((3, 2, 1, 1), 0.5)
    ratio[1:, 0], ratio[0, 1] = 0.01, 0.1  # one becomes saturated, one begins so
    arms = [{"name": "later", "init": {"gain": 1.1}}, {"name": "first", "init": {"gain": 1.2}}]
    run = run_of(
        tmp_path / "r",
        {"arm": arms},
        steps=steps_table(np.full((2, 3), 4.0)),
        heads=heads_table(2, [0, 5, 10], entropy_ratio=ratio),
    )
    assert saturated_at_start(run).members == ("first",)


@pytest.mark.parametrize(("ratio", "found"), [(0.19, True), (0.21, False), (0.29, False)])
def test_the_mean_over_heads_decides_and_not_one_head(tmp_path, ratio, found):
    heads = heads_table(1, [0], n_heads=2, entropy_ratio=[[[[ratio - 0.1, ratio + 0.1]]]])
    assert (saturated_at_start(run_of(tmp_path / "r", heads=heads)) is not None) is found


def test_heads_that_could_not_be_measured_do_not_count(tmp_path):
    run = run_of(
        tmp_path / "r",
        steps=steps_table([4.0]),
        heads=heads_table(1, [0], n_heads=4, entropy_ratio=[[[[np.nan, np.nan, 0.05, 0.29]]]]),
    )
    finding = saturated_at_start(run)
    assert "is 0.17 of its maximum" in finding.summary
    assert [(each.head, each.value) for each in finding.evidence] == [(2, pytest.approx(0.05))]
    nothing = heads_table(1, [0], entropy_ratio=np.nan)
    assert saturated_at_start(run_of(tmp_path / "s", heads=nothing)).why == NO_RATIO


def test_sgd_that_is_always_clipped_is_a_finding_with_the_measured_median(tmp_path):
    config = SMALL | {"clip": {"threshold": 0.5}, "train": {"steps": 30}}
    run = attnscope.train_model(config, path=tmp_path / "r")
    finding = clipping_always_on(run)
    (evidence,) = finding.evidence
    assert evidence.value == pytest.approx(run.steps["clip_factor"].median())
    assert evidence.value < HARMLESS_FACTOR
    assert "on 30 of 30 steps" in finding.summary
    assert clipping_always_on(attnscope.train_model(
        SMALL | {"clip": {"threshold": 1e6}, "train": {"steps": 30}}, path=tmp_path / "s"
    )) is None  # fmt: skip


@pytest.mark.parametrize(
    ("factors", "optimizer", "found"),
    [
        ([0.1] * 36 + [1.0] * 4, {}, Finding),
        ([0.1] * 35 + [1.0] * 5, {}, None),  # 87.5 % of the steps
        ([0.9] * 40, {}, None),  # harmless
        ([0.1] * 40, {"name": "adamw"}, None),  # divided out again
        ([0.1] * 40, {"name": "muon"}, None),
        ([0.1] * 30 + [1.0] * 10, {"warmup_steps": 30}, NotLooked),  # 10 steps after the warm-up
        ([0.1] * 30 + [1.0] * 20, {"warmup_steps": 30}, None),  # in the warm-up only
        ([1.0] * 10 + [0.1] * 30, {"warmup_steps": 10}, Finding),
        ([0.1] * (FEWEST_STEPS - 1), {}, NotLooked),
        ([1.0] * (FEWEST_STEPS - 1), {}, None),  # nothing is clipped
        ([np.nan] * 40, {}, NotLooked),
        ([np.nan] * 40, {"name": "adamw"}, None),
    ],
)
def test_clipping_counts_as_always_on(tmp_path, factors, optimizer, found):
    table = steps_table(np.full((1, len(factors)), 4.0), clip_factor=factors)
    run = run_of(tmp_path / "r", {"optimizer": optimizer}, steps=table)
    assert type(clipping_always_on(run)) is (found or type(None))


@pytest.mark.parametrize(
    ("factor", "severity"),
    [(COSTLY_FACTOR - 0.01, "warning"), (COSTLY_FACTOR + 0.01, "note"), (HARMLESS_FACTOR - 0.01, "note")],
)
def test_clipping_that_costs_little_is_a_note(tmp_path, factor, severity):
    run = run_of(tmp_path / "r", steps=steps_table(np.full((1, 40), 4.0), clip_factor=np.full(40, factor)))
    assert clipping_always_on(run).severity == severity


def test_clipping_is_judged_before_divergence_and_per_member(tmp_path):
    losses = np.full((3, 300), 4.0)
    losses[0, 25:] = 100.0  # diverges: that clipping is always on from then on plays no part
    factors = np.ones((300, 3))
    factors[25:, 0], factors[:25, 1], factors[:, 2] = 0.1, 0.1, 0.2
    gains = {"a": 1.0, "b": 1.1, "c": 1.2}
    arms = [{"name": name, "init": {"gain": gain}} for name, gain in gains.items()]
    run = run_of(tmp_path / "r", {"arm": arms}, steps=steps_table(losses, clip_factor=factors))
    finding = clipping_always_on(run)
    assert finding.members == ("c",)
    assert finding.evidence[0].value == pytest.approx(0.2)


@pytest.mark.parametrize(
    "settings",
    [
        {"attention.scale": ["x"]},
        {"attention.scale": -1},
        {"attention.scale": 10**400},
        {"model.d_model": "wide", "attention.scale": "none"},
        {"model.d_model": 1, "model.n_heads": 2, "attention.scale": "none"},
        {"optimizer.warmup_steps": 10**400},
    ],
)
def test_settings_of_strangers_that_make_no_sense_are_passed_over(tmp_path, settings):
    run_of(tmp_path / "r", steps=steps_table(np.full((1, 40), 4.0)), heads=heads_table(1, [0]))
    place = tmp_path / "r" / "run.json"
    raw = json.loads(place.read_text())
    raw["members"][0]["settings"] = settings
    place.write_text(json.dumps(raw))
    assert [f.rule for f in diagnose(attnscope.open_run(tmp_path / "r"))] == []
