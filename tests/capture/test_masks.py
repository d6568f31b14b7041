"""Which keys a mask hides, told from numbers alone."""

import math

import pytest
import torch
import torch.nn.functional as F

from attnscope.capture.fused import seen_fused
from attnscope.capture.seen import measure, visible_logits, visible_under

T = 64


def causal(value):
    return torch.zeros(T, T).masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), value)


def alibi(slope):
    at = torch.arange(T)
    return (at - at[:, None]).float() * slope


@pytest.mark.parametrize("value", [-math.inf, torch.finfo(torch.float32).min, -1e9, -1e4, -5e3, -1e3, -100.0])  # fmt: skip
def test_a_number_that_no_exponential_is_left_of_hides_a_key(value):
    lower = torch.ones(T, T, dtype=torch.bool).tril()
    assert torch.equal(visible_under(causal(value)), lower)
    q, k = torch.randn(2, 1, 2, T, 8, generator=torch.Generator().manual_seed(0)).unbind()
    raw = q @ k.mT
    assert torch.equal(visible_logits(raw * 0.35 + causal(value), raw), lower.expand(1, 2, T, T))


@pytest.mark.parametrize("slope", [0.5, 8.0])
def test_a_bias_that_grows_with_distance_hides_nothing(slope):
    assert visible_under(alibi(slope).tril()).all()


def test_large_logits_hide_nothing():
    """Unscaled attention that has exploded: differences of thousands, all of them made by q and k."""
    q, k = (30 * torch.randn(2, 2, 2, T, 8, generator=torch.Generator().manual_seed(0))).unbind()
    raw = q @ k.mT
    assert raw.min() < -1e4
    assert visible_logits(raw, raw).all()
    assert torch.equal(visible_logits(raw + causal(-math.inf), raw), causal(-1.0).expand_as(raw) == 0)  # fmt: skip


def test_each_head_may_have_a_scale_of_its_own():
    q, k = torch.randn(2, 2, 2, T, 8, generator=torch.Generator().manual_seed(0)).unbind()
    raw = q @ k.mT
    z = raw * torch.tensor([0.1, 3.0])[:, None, None] + causal(-100.0)
    assert torch.equal(visible_logits(z, raw), (causal(-1.0) == 0).expand_as(raw))


def test_a_float_mask_of_minus_100_gives_the_numbers_of_the_boolean_one():
    q, k = torch.randn(2, 2, 3, T, 8, generator=torch.Generator().manual_seed(0)).unbind()
    found = [
        measure(seen_fused(q, k, k, attn_mask=mask), rows="all", seed=0).columns_CH
        for mask in (causal(-100.0), causal(-1.0) == 0)
    ]
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("shape", [(T, T), (1, T, T), (3, T, T), (2, 1, 1, T), (2, 3, T, T), (1, 1, T, T), (2, 1, T, T)])  # fmt: skip
def test_a_mask_is_broadcast_as_pytorch_does(shape):
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 2, 3, T, 8, generator=generator).unbind()
    mask = torch.rand(shape, generator=generator) > 0.5
    mask[..., 0] = True
    seen = seen_fused(q, k, k, attn_mask=mask)
    z = (seen.q @ seen.k.mT * seen.scale).masked_fill(~seen.logits.visible, -math.inf)
    torch.testing.assert_close(z.softmax(-1) @ k, F.scaled_dot_product_attention(q, k, k, attn_mask=mask))
