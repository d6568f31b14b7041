"""Padding masks the wrong way round, in all layers or in some, of decoders, classifiers and encoder-decoders."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import flex_attention

from tests.check.models import (
    FLOATS,
    PADDED,
    TOKENS,
    Attention,
    By,
    D,
    H,
    Pooled,
    built,
    by_hand,
    checked,
    failed,
    model_of,
    only,
)

# -- padding masks the wrong way round --


def inverted(kind):
    def fused(_, q, k, v, padding):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=padding[:, None, None])

    def eager(_, q, k, v, padding):
        return by_hand(q, k, v, ~padding[:, None, None])

    def flex(_, q, k, v, padding):
        return flex_attention(q, k, v, score_mod=lambda z, b, h, i, j: torch.where(padding[b, j], z, -math.inf))

    return By({"fused": fused, "eager": eager, "flex": flex}[kind])


@pytest.mark.parametrize("kind", ["fused", "eager", "flex"])
@pytest.mark.parametrize("wrap", [lambda m: m, Pooled], ids=["positions", "pooled"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_an_inverted_padding_mask_is_named(kind, wrap, side):
    mask = PADDED if side == "right" else PADDED.flip(1)
    found = checked(wrap(model_of(inverted(kind), inverted(kind))), (TOKENS, mask))
    said = only("padding leak", found)
    assert said.startswith("The padding mask is inverted: real keys are hidden and padded keys are seen in ")
    assert "layers.0" in said and "layers.1" in said
    assert "~mask" in found["padding leak"].remedy


def test_a_mask_that_is_inverted_in_some_layers():
    model = model_of(Attention(hidden=None), inverted("fused"), Attention(hidden=None))
    said = only("padding leak", checked(model, (TOKENS, PADDED)))
    assert said == (
        "The padding mask is inverted in 1 of 3 attention calls: real keys are hidden and padded keys are seen in layers.1."
    )


@pytest.mark.parametrize("pool", [None, lambda y, _: y[:, 0]], ids=["positions", "pooled"])
def test_an_inverted_mask_is_named_where_no_attention_is_seen(pool):
    class Mean(nn.Module):
        """Means over what is not hidden, of a mask that is the wrong way round."""

        def forward(self, x, padding):
            p = padding.float()[:, None].expand(-1, x.shape[1], -1)
            return p / p.sum(dim=-1, keepdim=True) @ x

    model = model_of(Mean(), Mean())
    found = checked(model if pool is None else Pooled(model, pool), (TOKENS, PADDED))
    assert found["softmax axis"].status == "not looked"
    assert only("padding leak", found).startswith("The padding mask is inverted: real tokens are hidden and padding is seen.")  # fmt: skip


def test_rows_that_are_all_masked_are_said():
    found = checked(model_of(inverted("eager")), (TOKENS, torch.ones_like(TOKENS)))["masked rows"]
    assert found.status == "failed"
    assert found.finding.startswith("Every query row is fully masked: 144 of 144 query rows in 1 attention call see no key, and outputs are NaN")  # fmt: skip
    assert "the wrong way round" in found.remedy


def test_the_mask_of_an_encoder_that_its_decoder_hears():
    mask, later = PADDED == 0, nn.Transformer.generate_square_subsequent_mask(10)
    model = built(nn.Transformer, D, H, 1, 1, 64, batch_first=True)
    batch = {
        "src": FLOATS,
        "tgt": FLOATS[:, :10] * 2,
        "tgt_mask": later,
        "src_key_padding_mask": mask,
    }
    found = checked(model, {**batch, "memory_key_padding_mask": mask})
    assert not failed(found) and found["padding leak"].status == "passed"
    assert "change 30 of 30 outputs" in only("padding leak", checked(model, batch))
    found = checked(model, {**batch, "memory_key_padding_mask": ~mask})
    assert "inverted in 1 of 2 attention calls: real keys are hidden and padded keys are seen in decoder.layers.0.multihead_attn" in only("padding leak", found)  # fmt: skip
