"""Masks written out by hand, and position encodings against their papers."""

import math

import pytest
import torch

from attnscope.config import parse_table
from attnscope.model import geometry_of, initial_parameters
from attnscope.model.masks import visible_keys, with_padding
from attnscope.model.position import alibi_bias, alibi_slopes, rope_angles, rotate, sinusoids

CPU = torch.device("cpu")


def rows(matrix):
    """Visibility as text: 1 = visible."""
    return ["".join(str(int(x)) for x in row) for row in matrix]


@pytest.mark.parametrize(
    ("mask", "window", "expected"),
    [
        ("causal", 0, ["1000", "1100", "1110", "1111"]),
        ("causal", 1, ["1000", "0100", "0010", "0001"]),
        ("causal", 2, ["1000", "1100", "0110", "0011"]),
        ("causal", 9, ["1000", "1100", "1110", "1111"]),
        ("none", 1, ["1000", "0100", "0010", "0001"]),
        ("none", 2, ["1100", "1110", "0111", "0011"]),
        ("padding", 3, ["1110", "1111", "1111", "0111"]),
    ],
)
def test_visible_keys_by_hand(mask, window, expected):
    visible = visible_keys(mask=mask, window=window, n_queries=4, n_keys=4, device=CPU)
    assert visible.dtype == torch.bool
    assert rows(visible) == expected


@pytest.mark.parametrize("mask", ["none", "padding"])
def test_nothing_hidden_is_no_mask(mask):
    assert visible_keys(mask=mask, window=0, n_queries=4, n_keys=4, device=CPU) is None


def test_fewer_queries_than_keys_are_the_last_positions():
    visible = visible_keys(mask="causal", window=3, n_queries=2, n_keys=4, device=CPU)
    assert rows(visible) == ["1110", "0111"]


def test_padded_keys_are_hidden_from_every_query():
    real = torch.tensor([[True, True, False], [True, True, True]])
    alone = with_padding(None, real)
    assert alone.shape == (2, 1, 1, 3)
    assert rows(alone[:, 0, 0]) == ["110", "111"]
    causal = visible_keys(mask="causal", window=0, n_queries=3, n_keys=3, device=CPU)
    assert with_padding(causal, real).shape == (2, 1, 3, 3)
    assert rows(with_padding(causal, real)[0, 0]) == ["100", "110", "111"]
    assert rows(with_padding(causal, real)[1, 0]) == ["100", "110", "111"]
    assert with_padding(causal, None) is causal
    assert with_padding(None, None) is None


def test_a_padded_query_without_a_real_key_in_its_window_sees_itself():
    real = torch.tensor([[True, False, False, False]])
    window = visible_keys(mask="padding", window=2, n_queries=4, n_keys=4, device=CPU)
    assert rows(with_padding(window, real)[0, 0]) == ["1000", "1100", "0010", "0001"]


def test_geometry_has_one_mask_per_layer():
    config = parse_table({"model": {"n_layers": 3}, "attention": {"window": [0, 2, 0]}})
    geometry = geometry_of(config, seq_len=4, device=CPU)
    assert [rows(visible)[3] for visible in geometry.visible_TS] == ["1111", "0011", "1111"]
    for visible, added in zip(geometry.visible_TS, geometry.mask_TS, strict=True):
        assert torch.equal(added == 0, visible)
        assert (added[~visible] == -math.inf).all()


def test_rope_makes_attention_depend_on_distance_only():
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 8, generator=generator, dtype=torch.float64).unbind(0)
    cos, sin = (x.double() for x in rope_angles(40, 8, device=CPU))
    turned_q = rotate(q.expand(1, 1, 40, 8), cos, sin)[0, 0]
    turned_k = rotate(k.expand(1, 1, 40, 8), cos, sin)[0, 0]
    products = turned_q @ turned_k.T
    for distance in (0, 1, 7, -5):
        values = products.diagonal(distance)
        torch.testing.assert_close(values, values[:1].expand_as(values), rtol=0, atol=1e-5)
    assert products[0].std() > 0.1  # and on distance it does depend
    torch.testing.assert_close(products[3, 3], (q * k).sum(), rtol=0, atol=1e-6)


def test_rope_turns_the_first_pair_by_one_radian_per_position():
    x = torch.tensor([1.0, 0.0, 0.0, 0.0]).expand(1, 1, 3, 4)
    turned = rotate(x, *rope_angles(3, 4, device=CPU))[0, 0]
    expected = torch.tensor([[math.cos(t), 0, math.sin(t), 0] for t in range(3)])
    torch.testing.assert_close(turned, expected)
    x = torch.tensor([0.0, 1.0, 0.0, 0.0]).expand(1, 1, 3, 4)
    turned = rotate(x, *rope_angles(3, 4, device=CPU))[0, 0]
    expected = torch.tensor([[0, math.cos(t / 100), 0, math.sin(t / 100)] for t in range(3)])
    torch.testing.assert_close(turned, expected)


def test_alibi_slopes_of_8_heads_are_those_of_the_paper():
    expected = [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256]
    assert alibi_slopes(8, device=CPU).tolist() == expected


def test_alibi_slopes_of_12_heads_fill_up_from_those_of_16():
    eight = [2.0**-i for i in range(1, 9)]
    every_other = [2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5]
    torch.testing.assert_close(alibi_slopes(12, device=CPU), torch.tensor(eight + every_other))


def test_alibi_bias_is_minus_slope_times_distance():
    bias = alibi_bias(8, 3, 3, device=CPU)
    assert bias.shape == (8, 3, 3)
    assert bias[0].tolist() == [[0, -0.5, -1], [-0.5, 0, -0.5], [-1, -0.5, 0]]
    assert bias[1, 2].tolist() == [-0.5, -0.25, 0]


def test_sinusoids_follow_the_formula():
    table = sinusoids(7, 6, device=CPU)
    for t in range(7):
        for i in range(3):
            angle = t / 10_000 ** (2 * i / 6)
            assert table[t, 2 * i].item() == pytest.approx(math.sin(angle), abs=1e-6)
            assert table[t, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-6)


@pytest.mark.parametrize("position", ["learned", "sinusoidal", "rope", "alibi", "none"])
def test_a_model_has_its_own_position_encoding_and_no_other(position):
    config = parse_table({"model": {"d_model": 8, "n_layers": 1, "position": position}})
    geometry = geometry_of(config, seq_len=4, device=CPU)
    parameters = initial_parameters([config], vocab_size=5)
    assert ("position_embedding" in parameters) == (position == "learned")
    assert (geometry.positions_TD is not None) == (position == "sinusoidal")
    assert (geometry.rope_TK is not None) == (position == "rope")
    assert (geometry.bias_HTS is not None) == (position == "alibi")
