"""Totals of pieces add up to those of the whole, whatever the pieces are: by rows, by sequences, by calls, empty ones too."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnscope.metrics import attention
from attnscope.metrics.attention import statistics_of_all, totals_of_all, totals_of_logits
from attnscope.metrics.rows import Call
from attnscope.metrics.totals import HEAD_COLUMNS, TOTALS, add, finish

B, H, T, S, K = 5, 3, 7, 6, 4


def whole(seed=0, size=3.0):
    """Rows with no, one and many visible keys."""
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(B, H, n, K, generator=generator) * size for n in (T, S))
    visible = torch.rand(B, 1, T, S, generator=generator) < 0.5
    visible[:, :, 0] = False
    visible[:, :, 1] = torch.arange(S) == 2
    return Call(
        q=q,
        k=k,
        attn_scale=torch.tensor(0.7),
        visible=visible,
        bias=torch.randn(B, H, T, S, generator=generator),
        softcap=0.0,
    )


def cut(call, sequences=slice(None), positions=slice(None)):
    return Call(
        q=call.q[sequences][:, :, positions],
        k=call.k[sequences],
        attn_scale=call.attn_scale,
        visible=call.visible[sequences][:, :, positions],
        bias=call.bias[sequences][:, :, positions],
        softcap=call.softcap,
    )


def pieces(n, places):
    bounds = [0, *sorted(places), n]
    return [slice(a, b) for a, b in pairwise(bounds)]  # empty ones among them


def check_together(parts, expected, *, bound=True):
    found = parts[0]
    for part in parts[1:]:
        found = add(found, part)
    assert set(found) == set(TOTALS)
    found = finish(found)
    assert list(found) == list(HEAD_COLUMNS)
    for name in HEAD_COLUMNS:
        if name != "max_logit_bound" or bound:
            torch.testing.assert_close(found[name], expected[name], rtol=2e-6, atol=2e-6, equal_nan=True, msg=name)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, B)), st.integers(0, 3))
def test_calls_with_parts_of_the_sequences_add_up(places, seed):
    call = whole(seed)
    parts = [totals_of_all(cut(call, each)) for each in pieces(B, places)]
    check_together(parts, statistics_of_all(call), bound=False)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, T)), st.integers(0, 3))
def test_calls_with_parts_of_the_rows_add_up(places, seed):
    call = whole(seed)
    parts = [totals_of_all(cut(call, positions=each)) for each in pieces(T, places)]
    check_together(parts, statistics_of_all(call), bound=False)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, B)), st.permutations(range(4)))
def test_the_order_does_not_matter(places, order):
    call = whole()
    parts = [totals_of_all(cut(call, each)) for each in pieces(B, (1, 2, 4))]
    check_together([parts[n] for n in order], finish(add(add(add(*parts[:2]), parts[2]), parts[3])))


@pytest.mark.parametrize("block", [1, 100, 1 << 20])
def test_blocks_of_any_size_give_the_same(monkeypatch, block):
    expected = statistics_of_all(whole())
    monkeypatch.setattr(attention, "BLOCK_ELEMENTS", block)
    check_together([totals_of_all(whole())], expected)


def test_logits_given_by_other_code_add_up_by_sequences():
    call = whole()
    z = call.q @ call.k.mT
    visible, bound = call.visible.expand(z.shape), torch.arange(3.0)
    expected = finish(totals_of_logits(z, visible, bound))
    parts = [totals_of_logits(z[at], visible[at], bound) for at in pieces(B, (0, 2, 2, 5))]
    check_together(parts, expected)


def test_a_call_without_a_measurable_row_changes_nothing_but_the_rows_left_out():
    call = whole()
    alone = statistics_of_all(call)
    blind = Call(
        q=call.q, k=call.k, attn_scale=call.attn_scale, visible=torch.zeros_like(call.visible), bias=call.bias, softcap=0.0,
    )  # fmt: skip
    assert finish(totals_of_all(blind))["entropy"].isnan().all()
    both = finish(add(totals_of_all(call), totals_of_all(blind)))
    for name in HEAD_COLUMNS:
        if name == "rows_left_out":
            assert (both[name] == alone[name] + B * T).all()
        else:
            torch.testing.assert_close(both[name], alone[name], msg=name)


def test_an_unknown_bound_stays_unknown_unless_it_is_of_no_row():
    z, unknown = torch.randn(1, 1, 3, 3), torch.tensor([torch.nan])
    seen, hidden = torch.ones(1, 1, 3, 3, dtype=torch.bool), torch.zeros(1, 1, 3, 3, dtype=torch.bool)  # fmt: skip
    known = totals_of_logits(z, seen, torch.tensor([5.0]))
    assert finish(add(known, totals_of_logits(z, seen, unknown)))["max_logit_bound"].isnan()
    assert finish(add(known, totals_of_logits(z, hidden, unknown)))["max_logit_bound"] == 5
    assert finish(totals_of_logits(z, hidden, unknown))["max_logit_bound"].isnan()


def test_logits_that_are_not_finite_are_seen_through_any_sum():
    call = whole()
    call.q[0, 0, 3] = torch.nan
    parts = [totals_of_all(cut(call, each)) for each in pieces(B, (1, 3))]
    together = finish(add(add(*parts[:2]), parts[2]))
    assert together["entropy"].isnan().tolist() == [True, False, False]
    assert together["max_logit"].isnan().tolist() == [True, False, False]


def test_a_share_of_logits_is_weighted_by_logits_and_not_by_rows():
    """One row with 2 visible logits, none flat; one with 6, two of them far off: 2 of 8, where a mean of means has 1/6."""
    z = torch.tensor([[0.0, 1, 0, 0, 0, 0], [50.0, -50, 0, 0, 0, 0]]).reshape(2, 1, 1, 6)
    visible = torch.ones(2, 1, 1, 6, dtype=torch.bool)
    visible[0, ..., 2:] = False
    bound = torch.zeros(1)
    parts = [totals_of_logits(z[n : n + 1], visible[n : n + 1], bound) for n in range(2)]
    assert finish(add(*parts))["logits_over_5"].item() == pytest.approx(2 / 8)
