"""Gradients that vanish or explode on the way to the first layers."""

import numpy as np
import pytest

import attnscope
from attnscope.diagnose.rules.depth import (
    A_LAYER,
    EXPLODING,
    NO_LAYERS,
    VANISHING,
    gradients_explode_with_depth,
    gradients_vanish_with_depth,
    vanished_later,
)
from tests.diagnose.synthetic import params_table, run_of, steps_table

RULES = (gradients_vanish_with_depth, gradients_explode_with_depth)


def layered(path, first, *, n=60, losses=None, layers=(0, 1, 2, 3), **other):
    """A run in which the first of some layers gets a gradient of norm `first`, one number or one a step, the others of 1."""
    grad_norm = np.ones((n, 1, len(layers), 2)) / 2**0.5
    grad_norm[:, :, 0] *= np.broadcast_to(np.asarray(first, dtype=float), n).reshape(n, 1, 1)
    losses = np.full(n, 4.0) if losses is None else losses
    return run_of(
        path, steps=steps_table(losses), params=params_table(1, range(n), layers=layers, grad_norm=grad_norm), **other
    )


@pytest.mark.parametrize(
    ("first", "found"),
    [
        (0.99 * VANISHING, (True, False)),
        (1.01 * VANISHING, (False, False)),
        (0.99 * EXPLODING, (False, False)),
        (1.01 * EXPLODING, (False, True)),
    ],
)
def test_each_threshold(tmp_path, first, found):
    run = layered(tmp_path / "r", first)
    assert tuple(rule(run) is not None for rule in RULES) == found


@pytest.mark.parametrize(("times", "is_named"), [(0.99, True), (1.01, False)])
@pytest.mark.parametrize("n_layers", [2, 3])
def test_with_few_layers_a_tenth_from_one_to_the_next_is_little(tmp_path, n_layers, times, is_named):
    run = layered(tmp_path / "r", times * A_LAYER ** (n_layers - 1), layers=tuple(range(n_layers)))
    assert (gradients_vanish_with_depth(run) is not None) is is_named


def test_the_sentence_tells_both_layers_and_the_step(tmp_path):
    finding = gradients_vanish_with_depth(layered(tmp_path / "r", 1e-5))
    assert finding.summary == (
        "At step 1 the gradient of layer 0 of scaled has norm 1e-05 and that of layer 3 1: over 20 measured steps the median of their "
        "ratio is 1e-05 (below 0.001)."
    )
    assert [piece.layer for piece in finding.evidence] == [0, 3] and finding.severity == "warning"
    assert finding.evidence[0].threshold == pytest.approx(VANISHING)


def test_an_explosion_is_as_bad_as_what_became_of_training(tmp_path):
    falls = np.linspace(4.0, 2.0, 60)
    explodes = np.r_[np.full(40, 4.0), np.full(20, 4e4)]
    for losses, severity in ((falls, "note"), (np.full(60, 4.0), "warning"), (explodes, "error")):
        run = layered(tmp_path / severity, 100.0, losses=losses)
        assert gradients_explode_with_depth(run).severity == severity


def test_gradients_that_vanish_late_are_dated_there_and_a_dip_is_none(tmp_path):
    late = np.where(np.arange(60) < 30, 1.0, 1e-5)
    assert gradients_vanish_with_depth(layered(tmp_path / "a", late)).step == 40  # the first of the last window
    assert vanished_later(layered(tmp_path / "b", late)) == {"scaled": (30, pytest.approx(1e-5))}
    dip = np.where(np.arange(60) % 3 == 0, 1e-5, 1.0)
    assert gradients_vanish_with_depth(layered(tmp_path / "c", dip)) is None
    assert vanished_later(layered(tmp_path / "d", 1e-5)) == {}


def test_layers_without_gradients_do_not_count_nor_does_the_first_step(tmp_path):
    frozen = np.where(np.arange(60) >= 0, 0.0, 1.0)
    run = layered(tmp_path / "a", frozen)  # the others are left
    assert all(rule(run) is None for rule in RULES)
    begins_at_zero = np.where(np.arange(60) == 0, 1e-9, 1.0)
    assert gradients_vanish_with_depth(layered(tmp_path / "b", begins_at_zero)) is None


@pytest.mark.parametrize("layers", [(0,), (-1,)])
def test_one_layer_has_no_depth(tmp_path, layers):
    run = layered(tmp_path / "r", 1e-9, layers=layers)
    assert {rule(run).why for rule in RULES} == {NO_LAYERS}


def test_tables_full_of_nan_are_no_layers_and_half_full_ones_are_read(tmp_path):
    assert gradients_vanish_with_depth(layered(tmp_path / "a", np.nan, layers=(0, 1))).why == NO_LAYERS
    half = np.where(np.arange(60) % 2, np.nan, 1e-5)
    finding = gradients_vanish_with_depth(layered(tmp_path / "b", half, layers=(0, 1)))
    assert finding is not None and finding.step == 2


def test_what_happens_after_divergence_does_not_count(tmp_path):
    losses = np.r_[np.full(40, 4.0), np.full(20, 4e4)]
    first = np.where(np.arange(60) < 40, 1.0, 1e9)
    assert gradients_explode_with_depth(layered(tmp_path / "r", first, losses=losses)) is None


def test_deep_models_without_norm_explode_and_their_twin_with_norm_does_not(tmp_path):
    config = {
        "model": {"d_model": 32, "n_layers": 8, "seq_len": 16, "norm": "none"},
        "init": {"gain": 1.4},
        "data": {"batch_size": 4},
        "train": {"steps": 3, "checkpoint_every": 0},
    }
    finding = gradients_explode_with_depth(attnscope.train_model(config, path=tmp_path / "a"))
    assert finding.evidence[0].layer == 0 and finding.evidence[1].layer == 7
    healthy = config | {"model": config["model"] | {"norm": "pre"}}
    run = attnscope.train_model(healthy, path=tmp_path / "b")
    assert all(rule(run) is None for rule in RULES)
