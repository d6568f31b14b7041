"""How far an update moves W_q W_kᵀ, against cases done by hand and the slow twin."""

import math

import pytest
import torch

from attnscope.metrics.form import form_update_ratio
from tests import reference


def drawn(*shape, seed, scale=1.0):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_a_case_done_by_hand():
    # W_q W_kᵀ is [[0, 2], [0, 0]], of norm 2; ΔW_q W_kᵀ + W_q ΔW_kᵀ is [[0.1, 0], [0, 0.2]], of norm √0.05.
    q, k = torch.tensor([[[1.0], [0.0]]]), torch.tensor([[[0.0], [2.0]]])
    q_update, k_update = torch.tensor([[[0.0], [0.1]]]), torch.tensor([[[0.1], [0.0]]])
    found = form_update_ratio(q=q, k=k, q_update=q_update, k_update=k_update)
    assert found.item() == pytest.approx(math.sqrt(0.05) / 2)


@pytest.mark.parametrize("n_keys", [4, 2, 1])
@pytest.mark.parametrize("width_of_keys", [6, 9])
@pytest.mark.parametrize("is_view", [False, True])
def test_it_is_what_the_slow_twin_says(n_keys, width_of_keys, is_view):
    q, k = drawn(4, 6, 3, seed=0), drawn(n_keys, width_of_keys, 3, seed=1)
    q_update, k_update = drawn(4, 6, 3, seed=2, scale=1e-3), drawn(n_keys, width_of_keys, 3, seed=3, scale=1e-3)
    expected = reference.form_update_ratio(q, k, q_update, k_update)
    given = (q, k, q_update, k_update)
    if is_view:
        given = tuple(x.mT.contiguous().mT for x in given)
    q, k, q_update, k_update = given
    found = form_update_ratio(q=q, k=k, q_update=q_update, k_update=k_update)
    assert found.tolist() == pytest.approx(expected, rel=1e-5)


def test_leading_axes_are_each_on_its_own():
    q, k, q_update, k_update = (drawn(2, 3, 4, 6, 5, seed=seed) for seed in range(4))
    found_MLH = form_update_ratio(q=q, k=k, q_update=q_update, k_update=k_update)
    for m in range(2):
        for layer in range(3):
            expected = reference.form_update_ratio(*(x[m, layer] for x in (q, k, q_update, k_update)))
            assert found_MLH[m, layer].tolist() == pytest.approx(expected, rel=1e-5)


def test_what_grows_q_and_k_by_a_factor_moves_the_form_by_twice_as_much():
    q, k = drawn(2, 8, 4, seed=0), drawn(2, 8, 4, seed=1)
    found = form_update_ratio(q=q, k=k, q_update=0.01 * q, k_update=0.01 * k)
    assert found.tolist() == pytest.approx([0.02, 0.02], rel=1e-5)


def test_what_turns_q_and_k_alike_does_not_move_the_form():
    """(W_q R)(W_k R)ᵀ is W_q W_kᵀ: to first order, ΔW = W A with Aᵀ = -A changes nothing."""
    q, k, a = drawn(2, 8, 4, seed=0), drawn(2, 8, 4, seed=1), drawn(4, 4, seed=2)
    found = form_update_ratio(q=q, k=k, q_update=q @ (a - a.mT), k_update=k @ (a - a.mT))
    assert found.max() < 1e-2  # of updates as large as the weights: the rounding of sums that cancel


@pytest.mark.parametrize("size", [1e-15, 1e15])
def test_very_small_and_very_large_weights_are_measured(size):
    q, k, q_update, k_update = (drawn(2, 8, 4, seed=seed) for seed in range(4))
    plain = form_update_ratio(q=q, k=k, q_update=q_update, k_update=k_update)
    found = form_update_ratio(q=size * q, k=size * k, q_update=size * q_update, k_update=size * k_update)
    assert found.tolist() == pytest.approx(plain.tolist(), rel=1e-4)


def test_nan_and_a_form_of_zero_are_not_a_number_and_spoil_no_other_head():
    q, k, q_update, k_update = (drawn(3, 8, 4, seed=seed) for seed in range(4))
    q[0], k[1, 0, 0] = 0.0, math.inf
    found = form_update_ratio(q=q, k=k, q_update=q_update, k_update=k_update)
    assert found.isnan().tolist() == [True, True, False]
    assert form_update_ratio(q=q, k=k, q_update=0 * q_update, k_update=0 * k_update)[2] == 0


def test_half_precision_is_measured_in_float32():
    q, k, q_update, k_update = (drawn(2, 8, 4, seed=seed).bfloat16() for seed in range(4))
    found = form_update_ratio(q=q, k=k, q_update=q_update, k_update=k_update)
    assert found.tolist() == pytest.approx(reference.form_update_ratio(q, k, q_update, k_update), rel=1e-4)
