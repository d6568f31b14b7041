"""Faults of real models: each is named, in words that say what is wrong and where, also where outputs have no positions."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from attnscope.check.masks import wrong_axes
from tests.check.models import (
    FLOATS,
    LATER,
    PADDED,
    TOKENS,
    Attention,
    By,
    D,
    Encoder,
    H,
    K,
    Pooled,
    V,
    built,
    by_hand,
    checked,
    failed,
    model_of,
    only,
)

with warnings.catch_warnings():  # of PyTorch, which imports its compiler
    warnings.simplefilter("ignore")
    COMPILED = torch.compile(flex_attention)


# -- outputs without positions --


def test_a_classifier_is_checked_in_all_that_needs_no_positions():
    model = Pooled(model_of(Attention(hidden=None), Attention(hidden=None)))
    found = checked(model, (TOKENS, PADDED))
    assert {name: each.status for name, each in found.items() if each.status != "passed"} == {
        "future leak": "not looked"
    }
    assert found["future leak"].finding == ("The output has no position axis (3 rows, one a sequence).")
    assert "none of 3 outputs of sequences in evaluation and training" in found["padding leak"].finding


def test_a_classifier_that_ignores_padding_or_takes_its_mean():
    bidirectional = (Attention(hidden=None), Attention(hidden=None))
    found = checked(Pooled(model_of(*bidirectional, ignores_mask=True)), (TOKENS, PADDED))
    assert "change 3 of 3 outputs of sequences" in only("padding leak", found)
    mean = Pooled(model_of(*bidirectional), pool=lambda y, _: y.mean(dim=1))
    assert "change 3 of 3" in only("padding leak", checked(mean, (TOKENS, PADDED)))

    def masked_mean(y, mask):
        return (y * mask[..., None]).sum(dim=1) / mask.sum(dim=1)[:, None]

    assert not failed(checked(Pooled(model_of(*bidirectional), pool=masked_mean), (TOKENS, PADDED)))


def test_a_loss_alone_has_no_rows_to_compare():
    found = checked(Pooled(model_of(), pool=lambda y, _: y.square().mean()), (TOKENS, PADDED))
    assert not failed(found)
    for name in ("future leak", "padding leak", "batch leak"):
        assert found[name].status == "not looked"
    assert found["attention scale"].status == found["masked rows"].status == "passed"


@pytest.mark.parametrize("pool", [lambda y, _: y, lambda y, _: y[:, 0]], ids=["all", "pooled"])
def test_attention_over_the_batch_is_named(pool):
    layer = nn.TransformerEncoderLayer(D, H, 64)
    model = built(Pooled, built(Encoder, layer), pool)
    said = only("batch leak", checked(model, FLOATS))
    assert said.startswith(
        "Attention runs over the batch axis in model.encoder.layers.0.self_attn, model.encoder.layers.1.self_attn: it takes the "
        "3 sequences for positions, q is (batch 12, heads 4, positions 3, 8) for 3 x 12 positions"
    )
    said = only("batch leak", checked(model, FLOATS[:1]))
    assert "it takes the 1 sequence for positions" in said
    square = torch.randn(6, 6, D, generator=torch.Generator().manual_seed(1))
    found = checked(model, square)["batch leak"]  # where no shape tells
    assert found.status == "failed" and "batch_first=True" in found.remedy


# -- masks that are functions --


def flexible(**more):
    return By(lambda _, q, k, v, __: flex_attention(q, k, v, **more))


def block_mask(sees):
    return create_block_mask(sees, None, None, 12, 12, device="cpu")


@pytest.mark.parametrize(
    "layer",
    [
        flexible(block_mask=block_mask(lambda b, h, i, j: j <= i)),
        flexible(score_mod=lambda z, b, h, i, j: torch.where(j <= i, z, -math.inf)),
        By(lambda _, q, k, v, __: COMPILED(q, k, v, block_mask=block_mask(lambda b, h, i, j: j <= i))),
    ],
    ids=["mask_mod", "score_mod", "compiled"],
)
def test_masks_that_are_functions_are_evaluated(layer):
    found = checked(model_of(layer, Attention()))
    assert not failed(found)
    rows = [row for row in found["future leak"].evidence if "sees" in row]
    assert [(row["layer"], row["sees"]) for row in rows] == [
        ("layers.0", "causal"),
        ("layers.1", "causal"),
    ]
    assert "2 attention calls multiply q.k by 1/sqrt(d_head)" in found["attention scale"].finding


def test_functions_that_hide_too_little_or_too_much():
    found = checked(model_of(flexible(block_mask=block_mask(lambda b, h, i, j: j <= i + 1))))
    assert "in part: layers.0 sees up to 1 position ahead" in only("future leak", found)
    found = checked(model_of(flexible(block_mask=block_mask(lambda b, h, i, j: j < i))))
    assert "12 of 144 query rows in 1 attention call see no key" in only("masked rows", found)


def test_a_function_that_changes_the_scale():
    found = checked(model_of(flexible(score_mod=lambda z, b, h, i, j: z * K**0.5)))
    assert "(no scale at all)" in only("attention scale", found)


# -- masks that hide nothing --


@pytest.mark.parametrize(
    ("core", "words"),
    [
        (lambda _, q, k, v, __: by_hand(q, k, v, LATER, fill=-1e-12), "filled with -1e-12"),
        (lambda _, q, k, v, __: by_hand(q, k, v, LATER, fill=1e-9), "filled with 1e-09"),
        (lambda _, q, k, v, __: (q @ k.mT * K**-0.5 - LATER * 2.0).softmax(-1) @ v, "shifted by -2"),
        (lambda _, q, k, v, __: F.scaled_dot_product_attention(q, k, v, attn_mask=(~LATER).float()), "shifted by -1"),
        (flexible(score_mod=lambda z, b, h, i, j: torch.where(j <= i, z, -1e-9)).core, "filled with -1e-09"),
    ],
    ids=["tiny", "positive", "added", "zeros and ones", "score_mod"],
)  # fmt: skip
def test_a_causal_mask_that_hides_nothing(core, words):
    said = only("future leak", checked(model_of(By(core), By(core))))
    assert "for the mask of layers.0, layers.1 hides nothing: logits of later keys are " + words in said
    assert "of the weight" in said


@pytest.mark.parametrize("fill", [-50.0, -1e4, torch.finfo(torch.float32).min])
def test_numbers_that_hide(fill):
    found = checked(model_of(By(lambda _, q, k, v, __: by_hand(q, k, v, LATER, fill))))
    assert not failed(found) and found["future leak"].status == "passed"


def test_a_padding_mask_of_zeros_and_ones_that_is_added_hides_nothing():
    def core(_, q, k, v, padding):
        seen = (~padding)[:, None, None].float()
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen.expand(-1, H, 12, 12))

    said = only("padding leak", checked(model_of(By(core)), (TOKENS, PADDED)))
    assert "in layers.0, logits of padded keys are shifted by -1, which leaves them" in said


# -- keys that are not where queries take them to be --


def test_keys_repeated_along_the_sequence():
    def core(_, q, k, v, __):
        k, v = (x[:, :2].transpose(1, 2).repeat_interleave(2, dim=1).transpose(1, 2) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    said = only("head shapes", checked(model_of(By(core))))
    assert "layers.0 has 24 keys for 12 queries: each key stands 2 times on the axis of positions" in said


@pytest.mark.parametrize("kept", [1, 12])
def test_is_causal_with_more_keys_than_queries(kept):
    def core(self, q, k, v, _):
        past = torch.randn(len(q), H, 5, K, generator=torch.Generator().manual_seed(0))
        k, v = (torch.cat([past, x], dim=2) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    found = checked(model_of(By(core)), FLOATS[:, :kept])
    queries = "1 query" if kept == 1 else "12 queries"
    assert f"layers.0 says is_causal for {queries} and {kept + 5} keys" in found["head shapes"].finding
    assert found["head shapes"].status == "failed"


def test_room_in_a_cache_is_nothing_to_see():
    def core(self, q, k, v, _):
        k, v = (F.pad(x, (0, 0, 0, 4)) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    assert not failed(checked(model_of(By(core))))


# -- softmax over the wrong axis --


def test_lines_of_a_softmax_over_the_queries():
    lines = [
        "layers.0.attn (eager, [[3, 4, 12, 12]]): softmax over the queries' axis: each key's weights sum to 1",
        "layers.1.attn (sdpa, [[3, 4, 12, 8]]): nested tensors",
        "softmax over the queries' axis",
    ]
    assert wrong_axes(lines) == [("layers.0.attn", "softmax over the queries' axis: each key's weights sum to 1")]
    assert wrong_axes([]) == []


def test_a_softmax_over_the_queries_is_a_failed_check_that_says_where():
    from attnscope.check.attention import Observed
    from attnscope.check.case import open_case
    from attnscope.check.masks import softmax_axis

    line = "layers.0.attn (eager, [[3, 4, 12, 12]]): softmax over the queries' axis"
    found = softmax_axis(open_case(model_of(), TOKENS), Observed(calls=(), why=line, unseen=(line,), reacts={}))
    assert found.status == "failed"
    assert found.finding == (
        "1 of 1 attention call takes the softmax over the axis of the queries instead of the keys: layers.0.attn."
    )
    assert "softmax(dim=-1)" in found.remedy and V
