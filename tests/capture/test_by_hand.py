"""Attention written by hand in many ways: each is seen with its logits, queries and keys, whatever its axes are called."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from attnscope.capture.calls import applied_scale, attention_calls

B, H, T, S, K = 2, 3, 5, 7, 4


def seen_in(forward, heads=None):
    """Calls seen while `forward` runs as the method of a module, and what was said of the others."""

    class Module(nn.Module):
        def forward(self):
            return forward()

    module, seen = Module(), []
    if heads is not None:
        module.num_heads = heads
    with attention_calls(module, lambda _name, _module, each: seen.append(each)) as unseen:
        module()
    return seen, unseen


def tensors(*shapes):
    torch.manual_seed(0)
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


def by_matmul(q, k, v):
    return torch.softmax(q @ k.mT * 0.5, dim=-1) @ v


def by_einsum(q, k, v):
    w = torch.einsum("bhid,bhjd->bhij", q, k).mul(0.5).softmax(-1)
    return torch.einsum("bhij,bhjd->bhid", w, v)


def by_einsum_with_ellipsis(q, k, v):
    w = torch.einsum("... i d, ... j d -> ... i j", q, k).mul(0.5).softmax(-1)
    return torch.einsum("...ij,...jd->...id", w, v)


def heads_last(q, k, v):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    w = torch.einsum("bihd,bjhd->bijh", q, k).mul(0.5).softmax(dim=2)
    return torch.einsum("bijh,bjhd->bihd", w, v)


def keys_first(q, k, v):
    w = (k @ q.mT * 0.5).softmax(dim=-2)
    return w.mT @ v


def values_first(q, k, v):
    w = (q @ k.mT * 0.5).softmax(dim=-1)
    return (v.mT @ w.mT).mT


def by_baddbmm(q, k, v):
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    nothing = torch.zeros(1, 1, 1)
    z = nothing.baddbmm(batch1=q, batch2=k.mT, alpha=0.5)
    return torch.bmm(z.unflatten(0, (B, H)).softmax(-1).flatten(0, 1), v)


def with_dropout_and_a_cast(q, k, v):
    w = F.dropout(F.softmax(q @ k.mT * 0.5, dim=-1, dtype=torch.float32), 0.1)
    return w.to(v.dtype) @ v


def scaled_before(q, k, v):
    return torch.softmax((q * 0.5) @ k.mT, dim=-1) @ v


WAYS = [
    by_matmul, by_einsum, by_einsum_with_ellipsis, heads_last, keys_first, values_first, by_baddbmm, with_dropout_and_a_cast,
    scaled_before,
]  # fmt: skip


@pytest.mark.parametrize("square", [False, True], ids=["T != S", "T = S"])
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_logits_queries_and_keys_are_found_however_it_is_written(way, square):
    n_keys = T if square else S
    q, k, v = tensors((B, H, T, K), (B, H, n_keys, K), (B, H, n_keys, K))
    seen, unseen = seen_in(lambda: way(q, k, v))
    assert unseen == []
    assert [tuple(each.logits.z.shape) for each in seen] == [(B, H, T, n_keys)]
    torch.testing.assert_close(seen[0].logits.z, (q @ k.mT * 0.5).detach())
    raw = seen[0].q @ seen[0].k.mT * (0.5 if way is not scaled_before else 1.0)
    torch.testing.assert_close(seen[0].logits.z, raw)
    assert applied_scale(seen[0]) == pytest.approx(0.5)


def test_groups_of_heads_by_einsum():
    q, k, v = tensors((B, 2, 3, T, K), (B, 2, S, K), (B, 2, S, K))

    def forward():
        w = torch.einsum("bhgid,bhjd->bhgij", q, k).softmax(-1)
        return torch.einsum("bhgij,bhjd->bhgid", w, v)

    seen, unseen = seen_in(forward, heads=6)
    assert unseen == [] and [tuple(each.logits.z.shape) for each in seen] == [(B, 6, T, S)]
    torch.testing.assert_close(seen[0].q @ seen[0].k.mT, seen[0].logits.z)


@pytest.mark.parametrize(
    ("lead", "heads", "grid"),
    [
        ((B * H,), H, (B, H)),  # heads folded into the batch
        ((B * H,), None, (B * H, 1)),  # nobody says how many
        ((B, 4, H), H, (B * 4, H)),  # windows
        ((B, H), 9, (B, H)),
    ],
)
@pytest.mark.parametrize("fused", [False, True])
def test_which_axes_are_of_heads(lead, heads, grid, fused):
    q, k, v = tensors((*lead, T, K), (*lead, S, K), (*lead, S, K))
    call = F.scaled_dot_product_attention if fused else by_matmul
    seen, _ = seen_in(lambda: call(q, k, v), heads=heads)
    assert [tuple(each.q.shape[:2]) for each in seen] == [grid]


def test_a_number_of_heads_that_no_parameter_has_the_width_of_is_not_believed():
    class Module(nn.Module):
        def __init__(self):
            super().__init__()
            self.h = 5  # the height of an image, perhaps
            self.qkv = nn.Linear(K, 3 * K)

        def forward(self, x):
            q, k, v = self.qkv(x).chunk(3, -1)
            return by_matmul(q, k, v)

    module, seen = Module(), []
    with attention_calls(module, lambda *each: seen.append(each[2])):
        module(torch.randn(10, T, K))
    assert [tuple(each.q.shape) for each in seen] == [(10, 1, T, K)]


def test_a_softmax_that_no_product_sums_over_is_no_attention():
    tokens, classes = tensors((B, T, K), (B, S, K))
    seen, unseen = seen_in(lambda: torch.softmax(tokens @ classes.mT, -1).log())
    assert seen == [] and unseen == []


def test_a_softmax_over_the_queries_is_said():
    q, k, v = tensors((B, H, T, K), (B, H, S, K), (B, H, S, K))
    seen, unseen = seen_in(lambda: torch.softmax(q @ k.mT, dim=2) @ v)
    assert seen == []
    assert len(unseen) == 1 and "softmax over the queries' axis" in unseen[0]


def test_a_softmax_over_the_queries_is_said_where_there_are_as_many_keys():
    q, k, v = tensors((B, H, T, K), (B, H, T, K), (B, H, T, K))
    w = "bhij,bhjd->bhid"
    for forward in (
        lambda: torch.softmax(q @ k.mT, dim=-2) @ v,
        lambda: torch.einsum(w, torch.einsum("bhid,bhjd->bhij", q, k).softmax(dim=2), v),
        lambda: F.dropout(torch.softmax(q @ k.mT, dim=-2), 0.1) @ v,
    ):
        seen, unseen = seen_in(forward)
        assert seen == [] and "softmax over the queries' axis" in unseen[0]


def test_a_softmax_over_the_heads_is_said():
    q, k, v = tensors((B, H, T, K), (B, H, S, K), (B, H, S, K))
    seen, unseen = seen_in(lambda: torch.softmax(q @ k.mT, dim=1) @ v)
    assert seen == [] and "softmax over axis 1 of 4" in unseen[0]


def test_weights_that_are_normalized_again_over_the_keys_are_no_mistake():
    """Slot attention: slots compete for inputs, then each takes a mean of them."""
    q, k, v = tensors((B, T, K), (B, S, K), (B, S, K))

    def forward():
        w = torch.softmax(q @ k.mT, dim=1)
        return (w / w.sum(dim=-1, keepdim=True)) @ v

    seen, unseen = seen_in(forward)
    assert seen == [] and len(unseen) == 1
    assert "normalized over the keys after it" in unseen[0]


def test_sinks_beside_the_keys_are_part_of_the_logits():
    q, k, v, sinks = tensors((B, H, T, K), (B, H, S, K), (B, H, S, K), (H,))

    def forward():
        z = torch.cat([q @ k.mT, sinks.view(1, H, 1, 1).expand(B, H, T, 1)], -1)
        return z.softmax(-1)[..., :-1] @ v

    seen, unseen = seen_in(forward)
    assert unseen == [] and [tuple(each.logits.z.shape) for each in seen] == [(B, H, T, S + 1)]
    assert seen[0].k is None and applied_scale(seen[0]) is None


def test_two_softmaxes_whose_difference_weighs_values_are_two_calls():
    """Differential attention."""
    q1, k1, q2, k2, v = tensors(*[(B, H, T, K)] * 5)

    def forward():
        one, two = (torch.softmax(q @ k.mT, -1) for q, k in ((q1, k1), (q2, k2)))
        return (one - 0.5 * two) @ v

    seen, unseen = seen_in(forward)
    assert unseen == [] and len(seen) == 2
    torch.testing.assert_close(seen[1].logits.z, (q2 @ k2.mT).detach())


def test_a_learned_temperature_leaves_the_scale_unknown():
    q, k, v, temperature = tensors((B, H, T, K), (B, H, S, K), (B, H, S, K), (H, 1, 1))
    for call in (lambda: F.scaled_dot_product_attention(q * temperature, k, v), lambda: by_matmul(q * temperature, k, v)):  # fmt: skip
        seen, _ = seen_in(call)
        assert [applied_scale(each) for each in seen] == [None]


def test_the_norm_of_queries_is_no_temperature():
    q, k, v = tensors((B, H, T, K), (B, H, S, K), (B, H, S, K))
    unit = [F.normalize(x, dim=-1) for x in (q, k)]
    seen, _ = seen_in(lambda: F.scaled_dot_product_attention(*unit, v, scale=10.0))
    assert applied_scale(seen[0]) == 10.0
