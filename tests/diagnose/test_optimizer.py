"""Weight decay and Adam's epsilon: at their thresholds, and on real runs beside healthy ones."""

import numpy as np
import pytest

import attnscope
from attnscope.diagnose import examine
from attnscope.diagnose.blindness import NO_OPTIMIZER
from attnscope.diagnose.movement import NO_PARAMS
from attnscope.diagnose.rules.optimizer import (
    ADAM_SHARE,
    FEWEST_MEASURED,
    LEFT_OVER,
    MARGIN,
    SLOW_RATIO,
    TOWARDS_ZERO,
    adam_epsilon_too_large,
    weight_decay_too_strong,
)
from attnscope.runs.layout import MemberEntry
from attnscope.runs.reader import open_run
from attnscope.runs.writer import RunWriter
from tests.diagnose.synthetic import params_table, run_of, steps_table
from tests.runs.made_up import event

SMALL = {
    "model": {"d_model": 32, "n_layers": 2, "seq_len": 16, "norm": "pre"},
    "optimizer": {"name": "adamw", "lr": 3e-3},
    "data": {"batch_size": 4},
    "train": {"steps": 60, "checkpoint_every": 0},
}
ADAM = {"optimizer": {"name": "adamw"}}


def trained(path, **optimizer):
    return attnscope.train_model(SMALL | {"optimizer": SMALL["optimizer"] | optimizer}, path=path)


def watched(path, *, steps, params=None, optimizer="AdamW"):
    """A watched run of one member."""
    member = MemberEntry(name="rank 0", part=0, index=0, settings={})
    writer = RunWriter.create(
        path, command=["attnscope", "watch", "train.py"], config=None, members=[member], environment={}, data={}
    )
    part = writer.part(0)
    part.append("steps", steps)
    if params is not None:
        part.append("params", params)
    if optimizer:
        part.event(event("optimizer", step=0, member=0, name=optimizer))
    part.finish("finished")
    return open_run(path)


@pytest.fixture(scope="module")
def healthy(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("runs") / "r", weight_decay=0.1)


def test_healthy_training_has_none_of_these(healthy):
    assert weight_decay_too_strong(healthy) is None
    assert adam_epsilon_too_large(healthy) is None


def shrinking(path, *, left=LEFT_OVER / 2, towards=0.9, n=60, **other):
    """A run whose weights of 10 shrink to a share of that, which is so much of the way that they go."""
    weight_norm = np.linspace(10.0, 10.0 * left, n).reshape(n, 1, 1, 1)
    update_norm = 10.0 * (1 - left) / (n - 1) / towards
    params = params_table(1, range(n), weight_norm=weight_norm, update_norm=update_norm, **other)
    return run_of(path, steps=steps_table(np.full(n, 4.0)), params=params)


@pytest.mark.parametrize(
    ("left", "towards", "is_named"),
    [
        (0.98 * LEFT_OVER, 1.02 * TOWARDS_ZERO, True),
        (1.02 * LEFT_OVER, 1.02 * TOWARDS_ZERO, False),
        (0.98 * LEFT_OVER, 0.98 * TOWARDS_ZERO, False),
    ],
)
def test_each_threshold_of_weights_that_shrink(tmp_path, left, towards, is_named):
    assert (weight_decay_too_strong(shrinking(tmp_path / "r", left=left, towards=towards)) is not None) is is_named


def test_weights_that_shrink_away_are_told_in_numbers(tmp_path):
    finding = weight_decay_too_strong(shrinking(tmp_path / "r", left=0.1))
    assert finding.summary == (
        "The weights of scaled shrink to 0.1 of their size by step 59 (median over 4 groups), and 90% of the way that they went led "
        "towards zero."
    )
    assert finding.severity == "warning" and finding.step == 0
    assert finding.evidence[0].value == pytest.approx(1.0) and finding.evidence[0].threshold == pytest.approx(
        LEFT_OVER * 10
    )


def test_steps_between_those_that_were_measured_are_part_of_the_way(tmp_path):
    measured = np.array([*range(20), *range(20, 400, 20)])
    weight_norm = np.interp(measured, [0, 380], [10.0, 1.0]).reshape(-1, 1, 1, 1)
    steps = steps_table(np.full(400, 4.0))
    for name, update_norm, is_named in (("a", 9 / 380 / 0.6, True), ("b", 9 / 380 / 0.4, False)):
        params = params_table(1, measured, weight_norm=weight_norm, update_norm=update_norm)
        assert (weight_decay_too_strong(run_of(tmp_path / name, steps=steps, params=params)) is not None) is is_named


def test_embeddings_that_are_not_decayed_do_not_hide_layers_that_are(tmp_path):
    weight_norm = np.full((60, 1, 3, 4), 10.0)
    weight_norm[:, :, 2, :3] = np.linspace(10.0, 1.0, 60).reshape(60, 1, 1)
    run = shrinking(tmp_path / "a", left=0.1)
    assert weight_decay_too_strong(run) is not None
    params = params_table(
        1, range(60), layers=(-1, -1, 0), groups=tuple("abcd"), weight_norm=weight_norm, update_norm=9 / 59
    )
    params["group"] = np.array([f"{group}{i // 4 % 3}" for i, group in enumerate(params["group"])], dtype=object)
    run = run_of(tmp_path / "b", steps=steps_table(np.full(60, 4.0)), params=params)
    assert weight_decay_too_strong(run).evidence[0].layer == 0


def test_few_measured_steps_or_none_are_said(tmp_path):
    why = f"{NO_PARAMS} {FEWEST_MEASURED} times"
    assert weight_decay_too_strong(shrinking(tmp_path / "a", n=FEWEST_MEASURED - 1)).why == why
    assert weight_decay_too_strong(shrinking(tmp_path / "b", n=FEWEST_MEASURED)) is not None
    run = run_of(tmp_path / "c", ADAM, steps=steps_table(np.full(60, 4.0)))
    assert weight_decay_too_strong(run).why == why and adam_epsilon_too_large(run).why == NO_PARAMS


def test_a_decay_that_is_too_strong_is_named_in_a_real_run(tmp_path):
    finding = weight_decay_too_strong(trained(tmp_path / "r", weight_decay=30.0))
    assert finding.summary.startswith("With weight_decay 30 the weights of scaled shrink to ")


def stepping(share, *, ratio=0.001, n=60, n_members=1):
    """Groups whose update is so many times the smallest that Adam makes, at a learning rate of 1e-3; weights that fit `ratio`."""
    grad_norm, grad_max = 1.0, 0.2
    update_norm = np.asarray(share) * 1e-3 * grad_norm / grad_max
    return params_table(
        n_members,
        range(n),
        grad_norm=grad_norm,
        grad_max=grad_max,
        update_norm=update_norm,
        weight_norm=np.median(update_norm) / ratio,
    )


def adam_steps(n=60, n_members=1):
    return steps_table(np.full((n_members, n), 4.0), lr=np.full(n * n_members, 1e-3))


@pytest.mark.parametrize(
    ("share", "ratio", "severity"),
    [
        (0.98 * ADAM_SHARE, 1.1 * SLOW_RATIO, "note"),
        (0.98 * ADAM_SHARE, 0.9 * SLOW_RATIO, "warning"),
        (1.02 * ADAM_SHARE, 0.9 * SLOW_RATIO, None),
    ],
)
def test_each_threshold_of_an_epsilon_above_the_gradients(tmp_path, share, ratio, severity):
    run = run_of(tmp_path / "a", ADAM, steps=adam_steps(), params=stepping(share, ratio=ratio))
    finding = adam_epsilon_too_large(run)
    assert (None if finding is None else finding.severity) == severity
    script = watched(tmp_path / "b", steps=adam_steps(), params=stepping(share, ratio=ratio))
    finding = adam_epsilon_too_large(script)
    assert (None if finding is None else finding.severity) == severity


def test_an_epsilon_that_only_some_groups_feel_may_be_their_own_learning_rate(tmp_path):
    share = np.array([[0.1, 0.1], [0.1, 20.0]]).reshape(1, 1, 2, 2)
    assert adam_epsilon_too_large(watched(tmp_path / "a", steps=adam_steps(), params=stepping(share))) is None
    assert adam_epsilon_too_large(run_of(tmp_path / "b", ADAM, steps=adam_steps(), params=stepping(share))) is not None


def test_other_optimizers_and_unseen_ones_are_not_judged_by_it(tmp_path):
    params = stepping(0.01)
    assert adam_epsilon_too_large(run_of(tmp_path / "a", steps=adam_steps(), params=params)) is None  # SGD
    assert adam_epsilon_too_large(watched(tmp_path / "b", steps=adam_steps(), params=params, optimizer="RAdam")) is None
    answer = adam_epsilon_too_large(watched(tmp_path / "c", steps=adam_steps(), params=params, optimizer=None))
    assert answer.why == NO_OPTIMIZER
    nan = steps_table(np.full(60, 4.0), lr=np.full(60, np.nan))
    assert adam_epsilon_too_large(run_of(tmp_path / "d", ADAM, steps=nan, params=params)).why == "lr was not recorded"


def test_a_member_with_a_smaller_epsilon_that_ended_better_is_harm(tmp_path):
    arms = {"arm": [{"name": f"{eps:g}", "optimizer": {"eps": eps}} for eps in (1e-8, 0.1)]}
    losses = np.linspace(5.0, 3.0, 60) + np.array([[0.0], [1.1 * MARGIN]])
    steps = steps_table(losses, lr=np.full(120, 1e-3))
    share = np.array([20.0, 0.5]).reshape(1, 2, 1, 1)
    finding = adam_epsilon_too_large(
        run_of(tmp_path / "r", ADAM | arms, steps=steps, params=stepping(share, n_members=2), planned=60)
    )
    assert finding.members == ("0.1",) and finding.severity == "warning"
    assert "as with eps 0.1. It ended at a loss of 3.43, 1e-08 with 1e-08 at 3.32." in finding.summary


def test_an_epsilon_that_is_too_large_leads_the_real_run_that_it_stopped(tmp_path):
    said = examine(trained(tmp_path / "r", eps=1.0))
    assert said.findings[0].rule == "adam_epsilon_too_large" and said.findings[0].severity == "warning"
    assert said.chains[0][0].rule == "adam_epsilon_too_large"
