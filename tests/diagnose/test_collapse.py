"""Rules of collapse during training: of attention onto single keys, of tokens onto one direction."""

import numpy as np
import pytest

import attnscope
from attnscope.diagnose.rules.collapse import (
    ALIKE,
    COLLAPSED,
    FEWEST_SCORED,
    PARTLY_SCORED,
    UNKNOWN_SCORED,
    entropy_collapse,
    rank_collapse,
)
from attnscope.diagnose.rules.logits import LARGE_STD
from tests.diagnose.probed import SIGHT
from tests.diagnose.synthetic import heads_table, run_of, steps_table, watched_run_of

STEPS = 60
AT = list(range(0, STEPS, 3))


def collapsing(path, ratios, *, first=0.8, std=40.0, n_layers=1, layer=0, since=30, losses=4.0):
    """Heads of a layer that go from `first` to `ratios`, one each, from a step on."""
    ratio = np.full((len(AT), 1, n_layers, len(ratios)), first)
    spread = np.ones_like(ratio)
    late = np.asarray(AT) >= since
    ratio[late, :, layer], spread[late, :, layer] = ratios, std
    columns = {"entropy_ratio": ratio, "entropy": 3 * ratio, "logit_std": spread, "max_prob": 1 - ratio}
    heads = heads_table(1, AT, n_layers=n_layers, n_heads=len(ratios), **columns)
    return run_of(path, steps=steps_table(np.full(STEPS, losses)), heads=heads)


@pytest.mark.parametrize(("ratio", "found"), [(COLLAPSED + 0.01, False), (COLLAPSED, False), (COLLAPSED - 0.01, True)])
def test_attention_collapses_below_the_threshold(tmp_path, ratio, found):
    assert (entropy_collapse(collapsing(tmp_path / "r", [0.01, ratio])) is not None) is found


def test_one_sharp_head_among_others_is_no_collapse(tmp_path):
    assert entropy_collapse(collapsing(tmp_path / "r", [0.0, 0.0, 0.0, 0.5])) is None


def test_sharp_attention_with_small_logits_is_what_was_learned(tmp_path):
    assert entropy_collapse(collapsing(tmp_path / "a", [0.05, 0.05], std=LARGE_STD - 1)) is None
    assert entropy_collapse(collapsing(tmp_path / "b", [0.05, 0.05], std=LARGE_STD)) is not None


def test_what_begins_sharp_does_not_collapse(tmp_path):
    assert entropy_collapse(collapsing(tmp_path / "a", [0.01, 0.01], first=0.29)) is None
    assert entropy_collapse(collapsing(tmp_path / "b", [0.01, 0.01], first=0.31)) is not None


def test_the_layer_the_steps_and_from_what_to_what_are_told(tmp_path):
    run = collapsing(tmp_path / "r", [0.02, 0.04], n_layers=2, layer=1)
    finding = entropy_collapse(run)
    name = run.entries[0].name
    assert finding.summary == (
        f"Attention of {name} collapses in layer 1: the mean entropy of its 2 heads is 2.4 nats at first (0.8 of its maximum), below "
        "half of that from step 30 on, and 0.09 nats at the end (step 57), where the largest weight of a query is 0.97 on average. 1 "
        "of 2 layers end so."
    )
    assert finding.step == 30
    assert [(each.layer, each.head, each.value) for each in finding.evidence] == [
        (1, 0, pytest.approx(0.02)),
        (1, 1, pytest.approx(0.04)),
    ]


def test_collapse_of_a_training_that_diverges_is_an_error_and_after_it_none(tmp_path):
    losses = np.r_[np.full(30, 4.0), np.full(30, 500.0)]
    assert entropy_collapse(collapsing(tmp_path / "a", [0.01, 0.01], since=9, losses=losses)).severity == "error"
    assert entropy_collapse(collapsing(tmp_path / "b", [0.01, 0.01], since=33, losses=losses)) is None


def alike(path, end, config=None, *, losses=4.0, first=0.3):
    cosine = np.r_[np.full(30, first), np.full(30, end)]
    return run_of(path, config, steps=steps_table(np.full(STEPS, losses), token_cosine=cosine), planned=STEPS)


@pytest.mark.parametrize(("end", "found"), [(ALIKE - 0.001, False), (ALIKE + 0.001, True), (np.nan, False)])
def test_tokens_are_alike_above_the_threshold(tmp_path, end, found):
    assert (rank_collapse(alike(tmp_path / "r", end)) is not None) is found


def test_alike_tokens_are_told_and_are_a_note_while_the_loss_falls(tmp_path):
    run = alike(tmp_path / "a", 0.999)
    finding = rank_collapse(run)
    assert finding.summary == (
        f"The tokens of {run.entries[0].name} become alike: the mean cosine of two of them after the last layer is 0.3 at first, "
        "above 0.98 from step 30 on, and 0.999 at the end."
    )
    assert (finding.severity, finding.step) == ("warning", 30)
    falling = rank_collapse(alike(tmp_path / "b", 0.999, losses=np.linspace(4.0, 3.0, STEPS)))
    assert falling.severity == "note"


def test_tokens_that_nobody_scores_may_be_alike(tmp_path):
    for source in ("recall", "modular"):
        assert rank_collapse(alike(tmp_path / source, 0.999, {"data": {"source": source}})).why == PARTLY_SCORED
    masked = {"model": {"kind": "encoder"}, "attention": {"mask": "none"}, "data": {"objective": "masked"}}
    assert rank_collapse(alike(tmp_path / "masked", 0.999, masked)).why == PARTLY_SCORED


def test_a_cosine_that_was_not_recorded_is_said(tmp_path):
    run = run_of(tmp_path / "r", steps=steps_table(np.full(STEPS, 4.0), token_cosine=np.full(STEPS, np.nan)))
    assert rank_collapse(run).why == "token_cosine was not recorded"


def test_post_norm_at_a_learning_rate_that_is_too_high_makes_all_tokens_alike_and_its_twin_does_not(tmp_path):
    config = {
        "model": {"d_model": 64, "n_layers": 4, "norm": "post"},
        "init": {"embedding_std": 0.02},
        "optimizer": {"name": "adamw"},
        "train": {"steps": 120, "checkpoint_every": 0},
        "record": {"every": 4},
        "arm": [{"name": f"lr {lr}", "optimizer": {"lr": lr}} for lr in (0.02, 0.001)],
    }
    run = attnscope.train_model(config, path=tmp_path / "r")
    finding = rank_collapse(run)
    assert finding.members == ("lr 0.02",)
    steps = run.steps[(run.steps["member"] == "lr 0.02") & (run.steps["step"] >= 96)]
    assert finding.evidence[0].value == pytest.approx(steps["token_cosine"].median())


@pytest.mark.parametrize(
    ("targets", "batch", "why"),
    [
        (8 * FEWEST_SCORED, 8, None),
        (8 * FEWEST_SCORED - 1, 8, PARTLY_SCORED),
        (8, 8, PARTLY_SCORED),  # a class for each sequence
        (None, 8, UNKNOWN_SCORED),
        (800, None, UNKNOWN_SCORED),
    ],
)
def test_tokens_of_watched_scripts_may_be_alike_where_few_are_scored(tmp_path, targets, batch, why):
    steps = steps_table(np.full(STEPS, 4.0), token_cosine=np.r_[np.full(30, 0.3), np.full(30, 0.999)])
    events = [
        ("cross_entropy", 0, {"classes": 9, "loss": 2.0} | ({} if targets is None else {"targets": targets})),
        ("keys_seen", 0, SIGHT | {"layer": 0} | ({} if batch is None else {"batch": batch})),
    ]
    found = rank_collapse(watched_run_of(tmp_path / "r", steps=steps, events=events))
    assert getattr(found, "why", None) == why and (why is not None or found.rule == "rank_collapse")
