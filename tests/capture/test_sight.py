"""Which keys attention looks at, and how targets stand to tokens, by hand."""

import pytest
import torch

from attnscope.capture.fused import seen_fused
from attnscope.capture.seen import Computed, Seen
from attnscope.capture.sight import FACTS, Tokens, empty_rows, sight_of
from attnscope.capture.targets import OFFSETS, compared

B, H, T, K = 3, 2, 6, 4
UNIFORM = torch.zeros(B, H, T, K)  # every visible key gets the same attention


def facts(tokens=(), rows="all", **mask):
    seen = seen_fused(UNIFORM, UNIFORM, UNIFORM, **mask)
    return dict(zip(FACTS, sight_of(seen, tokens, rows=rows, seed=0).tolist(), strict=True))


def test_without_a_mask_a_query_gives_later_keys_their_share():
    found = facts()
    assert found["later_rows"] == found["later_seen"] == B * H * (T - 1), "the last query has nothing after it"
    assert found["later"] == pytest.approx(B * H * sum((T - 1 - i) / T for i in range(T - 1)))


def test_under_a_causal_mask_none_sees_a_later_key():
    found = facts(is_causal=True)
    assert (found["later"], found["later_seen"], found["later_rows"]) == (0, 0, B * H * (T - 1))


def test_a_mask_that_is_off_by_one_shows_in_every_row():
    found = facts(attn_mask=torch.ones(T, T, dtype=torch.bool).tril(1))
    assert found["later_seen"] == found["later_rows"]
    assert found["later"] == pytest.approx(B * H * sum(1 / (i + 2) for i in range(T - 1)))


def test_cross_attention_has_no_later_keys():
    seen = seen_fused(UNIFORM[:, :, :4], UNIFORM, UNIFORM)
    assert dict(zip(FACTS, sight_of(seen, (), rows="all", seed=0).tolist(), strict=True))["later_rows"] == 0


@pytest.mark.parametrize("padding", [[False] * 4 + [True] * 2, [True] * 2 + [False] * 4])
def test_padding_at_either_end_gets_its_share_of_real_queries_alone(padding):
    ids = torch.arange(1, T + 1).expand(B, T).masked_fill(torch.tensor(padding), 0)
    found = facts([Tokens(ids=ids, padding=0)])
    assert found["padded_rows"] == B * H * 4 and found["padded"] == pytest.approx(B * H * 4 * 2 / T)
    assert facts([Tokens(ids=ids, padding=0)], attn_mask=(ids != 0)[:, None, None])["padded"] == 0
    assert facts([Tokens(ids=ids.T, padding=0)])["padded_rows"] == B * H * 4, "time first"
    assert facts([Tokens(ids=ids, padding=None)])["padded_rows"] == 0


def test_the_id_of_padding_between_real_tokens_is_one_of_them():
    ids = torch.tensor([1, 0, 2, 3, 0, 4]).expand(B, T)
    assert facts([Tokens(ids=ids, padding=0)])["padded_rows"] == 0


def test_of_two_lookups_with_padding_nobody_knows_which_the_keys_stand_for():
    ids = torch.tensor([1, 2, 3, 4, 0, 0]).expand(B, T)
    assert facts([Tokens(ids=ids, padding=0), Tokens(ids=ids + 0, padding=0)])["padded_rows"] == 0


def test_a_mask_the_wrong_way_round_leaves_one_token_to_be_seen():
    ids = torch.tensor([1, 2, 3, 4, 0, 0]).expand(B, T)
    right, wrong = (facts([Tokens(ids=ids, padding=None)], attn_mask=m[:, None, None]) for m in (ids != 0, ids == 0))
    assert (right["inverted_rows"], wrong["inverted_rows"]) == (0, B * T), "of the first head"
    assert right["masked_rows"] == wrong["masked_rows"] == B * T


def test_sampled_rows_say_the_same_in_smaller_numbers():
    torch.manual_seed(0)
    q, k = torch.randn(8, 2, 32, 4), torch.randn(8, 2, 32, 4)
    seen = seen_fused(q, k, k)
    every, some = (dict(zip(FACTS, sight_of(seen, (), rows=n, seed=0).tolist(), strict=True)) for n in ("all", 32))
    assert 0 < some["later_rows"] < every["later_rows"] / 4
    assert some["later"] / some["later_rows"] == pytest.approx(every["later"] / every["later_rows"], abs=0.1)


@pytest.mark.parametrize("low", [float("-inf"), -1e9])
def test_rows_without_a_key_are_counted_by_hand_and_fused(low):
    visible = torch.ones(B, 1, T, T, dtype=torch.bool).tril()
    visible[1, :, 4:] = False
    assert empty_rows(seen_fused(UNIFORM, UNIFORM, UNIFORM, attn_mask=visible)).tolist() == [2, B * T]
    z = UNIFORM @ UNIFORM.mT
    seen = Seen(logits=Computed(z=z.masked_fill(~visible, low)), factor=1.0, mask="in the logits", backend="eager")
    assert empty_rows(seen).tolist() == [2 * H, B * H * T]


def test_logits_that_are_not_numbers_hide_nothing():
    z = torch.full((B, H, T, T), float("nan"))
    seen = Seen(logits=Computed(z=z), factor=1.0, mask="in the logits", backend="eager")
    assert empty_rows(seen).tolist() == [0, B * H * T]


# -- targets --

IDS = torch.randint(100, (4, 9), generator=torch.Generator().manual_seed(0))


def shares(ids, targets, **how):
    return [
        {
            at: equal / counted if counted else None
            for at, (equal, counted) in zip(OFFSETS, one.counts.tolist(), strict=True)
        }
        for one in compared(ids, targets, how.get("ignore_index", -100))
    ]


@pytest.mark.parametrize("distance", OFFSETS)
def test_the_distance_of_targets_is_found_whatever_their_axes(distance):
    ids, targets = IDS[:, 2:-2], IDS[:, 2 + distance : 7 + distance]
    for one, other in ((ids, targets.reshape(-1)), (ids, targets), (ids.T.contiguous(), targets.T.reshape(-1))):
        found = max(shares(one, other), key=lambda each: each[distance] or 0)
        assert found[distance] == 1.0 and all((found[at] or 0) < 0.3 for at in OFFSETS if at != distance)


def test_the_last_position_may_be_cut_off():
    (found,) = shares(IDS, IDS[:, 1:].reshape(-1))
    assert found[1] == 1.0 and found[0] < 0.3


def test_targets_that_do_not_count_are_not_compared():
    targets = IDS[:, 1:].clone()
    targets[:, :5] = -100
    one, *_ = compared(IDS[:, :-1], targets, -100)
    assert one.counts[OFFSETS.index(1)].tolist() == [4 * 2, 4 * 2] and one.n_positions == 8


def test_targets_of_other_sizes_are_compared_with_nothing():
    assert compared(IDS, torch.zeros(4, dtype=torch.long), -100) == []
    assert compared(IDS.float(), IDS, -100) == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_logits_that_overflow_or_explode_are_hidden_by_no_mask(dtype):
    """Sequence 0 has logits far below zero in every row, sequence 1 a mask that hides everything from its first query."""
    q = torch.randn(2, 1, 4, 8, generator=torch.Generator().manual_seed(0))
    k = torch.randn(2, 1, 4, 8, generator=torch.Generator().manual_seed(1))
    q[0], k[0] = 300.0, -300.0  # -720 000: beyond float16, and as far below zero as masks are
    z = (q @ k.mT).to(dtype)
    z[1, 0, 0] = float("-inf")
    for hidden in (float("-inf"), -2e4):
        z[1, 0, 0] = hidden
        seen = Seen(logits=Computed(z=z, q=q.to(dtype), k=k.to(dtype)), factor=1.0, mask="", backend="eager")
        assert empty_rows(seen).tolist() == [1, 8]
    z[0, 0, 0, 1:] = float("-inf")  # a mask hides the others, and what it leaves has overflowed
    seen = Seen(logits=Computed(z=z, q=q.to(dtype), k=k.to(dtype)), factor=1.0, mask="", backend="eager")
    assert empty_rows(seen).tolist() == [1, 8]
