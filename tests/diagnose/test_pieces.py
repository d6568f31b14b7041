"""Long tables in pieces and in blocks: the same as sorting the whole."""

from types import SimpleNamespace

import numpy as np
import pytest

from attnscope.diagnose import courses, pieces


@pytest.mark.parametrize("counts", [[3] * 8, [3, 1, 4, 4, 2, 5, 1, 3], [20, 1, 1], []])
def test_pieces_hold_whole_steps_and_each_row_once(monkeypatch, counts):
    monkeypatch.setattr(pieces, "PIECE", 7)
    step_N = np.repeat(np.arange(len(counts)) * 2, counts).astype(np.int32)
    found = list(pieces.pieces_of(SimpleNamespace(entries=(1,)), step_N))
    assert np.concatenate([np.arange(len(step_N))[each] for each in found]).tolist() == list(range(len(step_N)))
    for each in found[:-1]:
        assert step_N[each.stop - 1] < step_N[each.stop]


def test_steps_of_several_members_or_out_of_order_are_one_piece(monkeypatch):
    monkeypatch.setattr(pieces, "PIECE", 2)
    one, two = SimpleNamespace(entries=(1,)), SimpleNamespace(entries=(1, 2))
    assert list(pieces.pieces_of(two, np.arange(9))) == [slice(0, 9)]
    assert list(pieces.pieces_of(one, np.arange(9)[::-1])) == [slice(0, 9)]


@pytest.mark.parametrize("is_grid", [True, False])
@pytest.mark.parametrize("members", [1, 2])
def test_the_order_by_step_is_that_of_a_sort(is_grid, members):
    rng = np.random.default_rng(0)
    step_N = np.repeat(np.arange(50), 6)[: 300 if is_grid else 290]
    codes_N = np.arange(len(step_N)) % members
    within_N = rng.integers(0, 4, len(step_N))
    expected = np.lexsort((within_N, step_N, codes_N))
    assert pieces.order_by_step(codes_N, step_N, within_N).tolist() == expected.tolist()


@pytest.mark.parametrize("shuffles", [True, False])
def test_the_order_of_rows_is_that_of_a_sort(shuffles):
    rng = np.random.default_rng(0)
    step_N, layer_N, head_N = (x.ravel() for x in np.indices((30, 3, 4)))
    mixed = rng.permutation(len(step_N)) if shuffles else np.arange(len(step_N))
    step_N, layer_N, head_N = step_N[mixed], layer_N[mixed] - 1, head_N[mixed]
    expected = np.lexsort((step_N, head_N, layer_N))
    assert courses.order_of_rows(step_N, layer_N, head_N).tolist() == expected.tolist()


@pytest.mark.parametrize("size", [1, 4])
def test_where_each_step_has_the_same_heads_is_seen(size):
    rows = np.arange(10 * 3 * 4).reshape(10, 3, 4).transpose(1, 0, 2)  # layer, step, head
    if size == 1:
        rows = rows.transpose(0, 2, 1).reshape(12, 10, 1)
    row_R = rows.astype(np.int32).ravel()
    found = courses._places_in(row_R, len(rows))
    assert found.tolist() == rows[:, 0].tolist()
    row_R[[5, 6]] = row_R[[6, 5]]
    assert courses._places_in(row_R, len(rows)) is None
