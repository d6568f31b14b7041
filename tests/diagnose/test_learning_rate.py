"""Learning rates that are too high and too low: the rules at their thresholds, and on real runs beside healthy ones."""

import numpy as np
import pytest

import attnscope
from attnscope.diagnose import examine
from attnscope.diagnose.harm import CLOSED_RATIO, LARGE_LOGIT
from attnscope.diagnose.movement import NO_PARAMS, movement_of
from attnscope.diagnose.rules.learning_rate import (
    FEWEST_STEPS,
    LITTLE_PATH,
    LITTLE_REACH,
    MARGIN,
    MOVING,
    OVERSHOOT,
    learning_rate_too_high,
    learning_rate_too_low,
)
from tests.diagnose.synthetic import heads_table, params_table, run_of, steps_table

SMALL = {
    "model": {"d_model": 32, "n_layers": 2, "seq_len": 16, "norm": "pre"},
    "optimizer": {"name": "adamw"},
    "data": {"batch_size": 4},
    "train": {"steps": 60, "checkpoint_every": 0},
}
TWO = {"arm": [{"name": "a"}, {"name": "b", "train": {"seed": 1}}]}
EXPLODES = np.r_[np.full(20, 4.0), np.full(10, 400.0)]  # from step 20 on


def trained(path, lr, **changes):
    config = SMALL | {name: SMALL.get(name, {}) | table for name, table in changes.items()}
    return attnscope.train_model(config | {"optimizer": config["optimizer"] | {"lr": lr}}, path=path)


def overshooting(path, times, *, losses=EXPLODES, **other):
    """A run whose four groups would together undo so many times a loss of 4 at every step."""
    n = len(losses)
    params = params_table(1, range(n), grad_norm=times, update_norm=1.0, weight_norm=1000.0)
    return run_of(path, steps=steps_table(losses), heads=heads_table(1, [0]), params=params, **other)


@pytest.fixture(scope="module")
def healthy(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("runs") / "r", 3e-3)


def test_a_healthy_learning_rate_is_neither_too_high_nor_too_low(healthy):
    assert learning_rate_too_high(healthy) is None
    assert learning_rate_too_low(healthy).why == f"fewer than {FEWEST_STEPS} steps"
    assert not [f for f in examine(healthy).findings if f.kind == "cause"]


@pytest.mark.parametrize("lr", [1.0, 1e9])
def test_updates_larger_than_the_weights_are_named_before_what_they_led_to(tmp_path, lr):
    run = trained(tmp_path / "r", lr)
    said = examine(run)
    assert said.findings[0].rule == "learning_rate_too_high" and said.findings[0].severity == "error"
    assert said.findings[0].step == 0 and said.chains[0][0].rule == "learning_rate_too_high"
    (ratio,) = [piece for piece in said.findings[0].evidence if piece.quantity == "update_ratio"]
    assert ratio.step == 0 and ratio.value > 1


def test_attention_that_closes_up_is_a_warning(tmp_path):
    run = trained(tmp_path / "r", 0.1, train={"steps": 120})
    finding = learning_rate_too_high(run)
    assert finding.severity == "warning" and finding.step == 0
    assert [piece.quantity for piece in finding.evidence] == ["update_ratio", "entropy_ratio", "max_logit"]
    assert finding.evidence[1].value < CLOSED_RATIO and finding.evidence[2].value > LARGE_LOGIT
    assert finding.summary.startswith("With a learning rate of 0.1 the attention logits of scaled grew to ")


def test_sgd_without_norm_explodes_where_a_tenth_of_its_learning_rate_trains(tmp_path):
    changes = {"optimizer": {"name": "sgd"}, "model": {"norm": "none"}, "train": {"steps": 40}}
    assert learning_rate_too_high(trained(tmp_path / "a", 0.3, **changes)).severity == "error"
    assert learning_rate_too_high(trained(tmp_path / "b", 0.03, **changes)) is None


def test_updates_that_reach_too_far_count_only_where_training_came_to_harm(tmp_path):
    finding = learning_rate_too_high(overshooting(tmp_path / "a", 1.01 * OVERSHOOT))
    assert finding.severity == "error" and finding.step == 0
    assert finding.evidence[0].value == pytest.approx(1.01) and finding.evidence[0].threshold == OVERSHOOT
    assert learning_rate_too_high(overshooting(tmp_path / "b", 0.99 * OVERSHOOT)) is None
    assert learning_rate_too_high(overshooting(tmp_path / "c", 50.0, losses=np.full(30, 4.0))) is None
    ends_above = np.r_[np.full(5, 4.0), np.full(25, 6.5)]
    assert learning_rate_too_high(overshooting(tmp_path / "d", 2.0, losses=ends_above)).severity == "error"


def test_what_happens_from_divergence_on_does_not_count(tmp_path):
    times = np.where(np.arange(30) < 20, 0.5, 1e6).reshape(30, 1, 1, 1)
    assert learning_rate_too_high(overshooting(tmp_path / "r", times)) is None


def test_attention_that_is_saturated_from_the_start_is_left_to_its_own_rule(tmp_path):
    params = params_table(1, range(30), grad_norm=50.0, update_norm=1.0, weight_norm=1000.0)
    heads = heads_table(1, [0], entropy_ratio=0.1)
    run = run_of(tmp_path / "r", steps=steps_table(EXPLODES), heads=heads, params=params)
    assert learning_rate_too_high(run) is None


@pytest.mark.parametrize(
    ("ratio", "entropy", "logit", "is_named"),
    [
        (1.01 * MOVING, 0.99 * CLOSED_RATIO, 1.01 * LARGE_LOGIT, True),
        (0.99 * MOVING, 0.99 * CLOSED_RATIO, 1.01 * LARGE_LOGIT, False),
        (1.01 * MOVING, 1.01 * CLOSED_RATIO, 1.01 * LARGE_LOGIT, False),
        (1.01 * MOVING, 0.99 * CLOSED_RATIO, 0.99 * LARGE_LOGIT, False),
    ],
)
def test_each_threshold_of_attention_that_closes_up(tmp_path, ratio, entropy, logit, is_named):
    late = (np.arange(30) >= 10).reshape(30, 1, 1, 1)
    heads = heads_table(1, range(30), entropy_ratio=np.where(late, entropy, 0.8), max_logit=np.where(late, logit, 5.0))
    params = params_table(1, range(30), update_norm=10 * ratio)
    run = run_of(tmp_path / "r", steps=steps_table(np.full(30, 4.0)), heads=heads, params=params)
    assert (learning_rate_too_high(run) is not None) is is_named


@pytest.mark.parametrize(("gap", "is_named"), [(1.1 * MARGIN, True), (0.9 * MARGIN, False)])
def test_a_member_with_a_lower_learning_rate_that_ends_better_shows_harm(tmp_path, gap, is_named):
    arms = [
        {"name": f"{lr} {seed}", "optimizer": {"lr": lr}, "train": {"seed": seed}}
        for lr in (0.1, 0.2)
        for seed in (0, 1)
    ]
    losses = np.linspace(5.0, 3.0, 60) + np.array([0.0, 0.05, 0.05 + gap, 0.3 + gap])[:, None]
    steps = steps_table(losses)
    run = run_of(
        tmp_path / "r", {"arm": arms}, steps=steps, heads=heads_table(4, [0]), params=params_table(4, range(60))
    )
    finding = learning_rate_too_high(run)
    assert (finding is not None) is is_named
    if finding is not None:
        assert finding.members == ("0.2 0", "0.2 1") and finding.severity == "warning" and finding.step is None
        assert finding.evidence[1].value == 0.2 and finding.evidence[1].threshold == 0.1


def test_one_update_as_large_as_the_weights_is_a_note(tmp_path):
    update_norm = np.where(np.arange(30) == 3, 10.1, 0.01).reshape(30, 1, 1, 1)
    steps, heads = steps_table(np.full(30, 4.0)), heads_table(1, [0])
    run = run_of(tmp_path / "r", steps=steps, heads=heads, params=params_table(1, range(30), update_norm=update_norm))
    finding = learning_rate_too_high(run)
    assert finding.severity == "note" and finding.step == 3
    assert finding.summary == (
        "With a learning rate of 1 the update of step 3 is 1.01 times as large as the weights of scaled that it moves: of what they "
        "were nothing is left. No harm of it was measured."
    )


def test_groups_that_begin_at_zero_are_not_typical(tmp_path):
    weight_norm = np.full((30, 1, 2, 4), 10.0)
    weight_norm[:, :, :, 1:] = np.linspace(0.0, 0.29, 30).reshape(30, 1, 1, 1)  # LoRA's B, biases
    params = params_table(1, range(30), groups=("q", "b", "c", "d"), weight_norm=weight_norm)
    run = run_of(tmp_path / "r", steps=steps_table(np.full(30, 4.0)), heads=heads_table(1, [0]), params=params)
    assert movement_of(run).ratio_K == pytest.approx(0.001)
    assert learning_rate_too_high(run) is None


def test_of_several_members_the_worst_is_told_and_the_blind_one_said(tmp_path):
    times = np.array([2.0, 3.0]).reshape(1, 2, 1, 1)
    params = params_table(2, range(30), grad_norm=times, update_norm=1.0, weight_norm=1000.0)
    steps = steps_table(np.stack([EXPLODES, EXPLODES]))
    finding = learning_rate_too_high(run_of(tmp_path / "a", TWO, steps=steps, heads=heads_table(2, [0]), params=params))
    assert finding.members == ("a", "b") and finding.evidence[0].member == "b"
    assert finding.summary.startswith(
        "a and b are trained with updates that are too large. With a learning rate of 1 the updates of b"
    )
    only_a = {name: np.asarray(x)[np.asarray(params["member"]) == 0] for name, x in params.items()}
    finding = learning_rate_too_high(run_of(tmp_path / "b", TWO, steps=steps, heads=heads_table(2, [0]), params=only_a))
    assert finding.members == ("a",) and finding.also[0].why == NO_PARAMS and finding.also[0].members == ("b",)


def test_tables_full_of_nan_say_nothing(tmp_path):
    steps = steps_table(np.full((1, 120), np.nan))
    columns = dict.fromkeys(("grad_norm", "update_norm", "weight_norm", "grad_max"), np.nan)
    run = run_of(tmp_path / "a", steps=steps, heads=heads_table(1, [0]), params=params_table(1, range(120), **columns))
    assert learning_rate_too_high(run).why == NO_PARAMS
    half = np.where(np.arange(120) % 2, np.nan, 0.01).reshape(120, 1, 1, 1)
    losses = np.where(np.arange(120) % 2, np.nan, 4.0)
    params = params_table(1, range(120), update_norm=half)
    run = run_of(tmp_path / "b", steps=steps_table(losses), heads=heads_table(1, [0]), params=params)
    assert learning_rate_too_high(run) is None and learning_rate_too_low(run) is None


def test_a_learning_rate_at_which_nothing_moves_is_named_beside_one_that_trains(tmp_path):
    finding = learning_rate_too_low(trained(tmp_path / "a", 1e-7, train={"steps": 100}))
    assert finding.severity == "warning" and finding.step == 0
    assert finding.summary.startswith("In 100 steps the weights of scaled moved by at most ")
    assert learning_rate_too_low(trained(tmp_path / "b", 3e-4, train={"steps": 100})) is None


@pytest.mark.parametrize(
    ("path", "reach", "n", "said"),
    [
        (0.99, 0.99, FEWEST_STEPS, "warning"),
        (1.01, 0.99, FEWEST_STEPS, None),
        (0.99, 1.01, FEWEST_STEPS, None),
        (0.99, 0.99, FEWEST_STEPS - 1, f"fewer than {FEWEST_STEPS} steps"),
    ],
)
def test_each_threshold_of_moving_nothing(tmp_path, path, reach, n, said):
    update_norm = path * LITTLE_PATH / n * 10.0  # of weights of 10
    grad_norm = reach * LITTLE_REACH * 4.0 / n / update_norm / 4  # four groups, a loss of 4
    params = params_table(1, range(n), update_norm=update_norm, grad_norm=grad_norm)
    run = run_of(tmp_path / "r", steps=steps_table(np.full(n, 4.0)), heads=heads_table(1, [0]), params=params)
    answer = learning_rate_too_low(run)
    assert said == (None if answer is None else getattr(answer, "severity", None) or answer.why)


def test_a_warm_up_that_is_not_over_is_not_too_low(tmp_path):
    params = params_table(1, range(150), update_norm=1e-4, grad_norm=1e-3)
    losses = np.full(150, 4.0)
    rising = steps_table(losses, lr=np.linspace(0, 1e-3, 150))
    constant = run_of(tmp_path / "a", steps=steps_table(losses), heads=heads_table(1, [0]), params=params)
    assert learning_rate_too_low(constant) is not None
    run = run_of(tmp_path / "b", steps=rising, heads=heads_table(1, [0]), params=params)
    assert learning_rate_too_low(run) is None


def test_steps_between_those_that_were_measured_count(tmp_path):
    measured = [*range(20), *range(20, 400, 20)]  # 39 of 400, as a watched script has them
    params = params_table(1, measured, update_norm=1.2 * LITTLE_PATH / 400 * 10.0, grad_norm=1e-3)
    run = run_of(tmp_path / "r", steps=steps_table(np.full(400, 4.0)), heads=heads_table(1, [0]), params=params)
    assert learning_rate_too_low(run) is None
