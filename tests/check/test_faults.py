"""Faults of real models: each is named, in words that say what is wrong and where, also where outputs have no positions."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from attnscope.check.masks import wrong_axes
from tests.check.models import FLOATS, TOKENS, Attention, D, H, K, V, built, checked, model_of

PADDED = torch.ones_like(TOKENS)
PADDED[:, 9:] = 0
PADDED[0, 7:] = 0
with warnings.catch_warnings():  # of PyTorch, which imports its compiler
    warnings.simplefilter("ignore")
    COMPILED = torch.compile(flex_attention)
LATER = torch.ones(12, 12, dtype=torch.bool).triu(1)


class By(nn.Module):
    """Attention whose core is given: core(self, q, k, v, padding) -> (B, H, T, K)."""

    def __init__(self, core):
        super().__init__()
        self.n_head, self.core = H, core
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)

    def forward(self, x, padding=None):
        q, k, v = (y.unflatten(-1, (H, K)).transpose(1, 2) for y in self.qkv(x).chunk(3, dim=-1))
        return self.out(self.core(self, q, k, v, padding).transpose(1, 2).flatten(2))


class Pooled(nn.Module):
    """The first position of another model, as a classifier returns it."""

    def __init__(self, model, pool=lambda y, _: y[:, 0]):
        super().__init__()
        self.model, self.pool = model, pool

    def forward(self, tokens, attention_mask=None):
        return self.pool(self.model(tokens, attention_mask), attention_mask)


def by_hand(q, k, v, hidden, fill=-torch.inf):
    return (q @ k.mT * K**-0.5).masked_fill(hidden, fill).softmax(dim=-1) @ v


def failed(found):
    return [name for name, each in found.items() if each.status == "failed"]


def only(name, found):
    assert failed(found) == [name], {each: found[each].finding for each in failed(found)}
    return found[name].finding


# -- outputs without positions --


def test_a_classifier_is_checked_in_all_that_needs_no_positions():
    model = Pooled(model_of(Attention(hidden=None), Attention(hidden=None)))
    found = checked(model, (TOKENS, PADDED))
    assert {name: each.status for name, each in found.items() if each.status != "passed"} == {
        "future leak": "not looked"
    }
    assert found["future leak"].finding == (
        "The output has no position axis (3 rows, one a sequence)."
    )
    assert (
        "none of 3 outputs of sequences in evaluation and training" in found["padding leak"].finding
    )


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


class Encoder(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x, attention_mask=None):
        hidden = None if attention_mask is None else attention_mask == 0
        return self.encoder(x, src_key_padding_mask=hidden)


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
        By(
            lambda _, q, k, v, __: COMPILED(
                q, k, v, block_mask=block_mask(lambda b, h, i, j: j <= i)
            )
        ),
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
    assert (
        "for the mask of layers.0, layers.1 hides nothing: logits of later keys are " + words
        in said
    )
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
        k, v = (
            x[:, :2].transpose(1, 2).repeat_interleave(2, dim=1).transpose(1, 2) for x in (k, v)
        )
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    said = only("head shapes", checked(model_of(By(core))))
    assert (
        "layers.0 has 24 keys for 12 queries: each key stands 2 times on the axis of positions"
        in said
    )


@pytest.mark.parametrize("kept", [1, 12])
def test_is_causal_with_more_keys_than_queries(kept):
    def core(self, q, k, v, _):
        past = torch.randn(len(q), H, 5, K, generator=torch.Generator().manual_seed(0))
        k, v = (torch.cat([past, x], dim=2) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    found = checked(model_of(By(core)), FLOATS[:, :kept])
    queries = "1 query" if kept == 1 else "12 queries"
    assert (
        f"layers.0 says is_causal for {queries} and {kept + 5} keys" in found["head shapes"].finding
    )
    assert found["head shapes"].status == "failed"


def test_room_in_a_cache_is_nothing_to_see():
    def core(self, q, k, v, _):
        k, v = (F.pad(x, (0, 0, 0, 4)) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    assert not failed(checked(model_of(By(core))))


# -- training and evaluation --


def in_modes(training, evaluation):
    return By(lambda self, *given: (training if self.training else evaluation)(self, *given))


def sdpa(scale=None, is_causal=True, dropout=0.1):
    def core(self, q, k, v, _):
        p = dropout if self.training else 0.0
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=is_causal, scale=scale, dropout_p=p
        )

    return core


@pytest.mark.parametrize(
    ("evaluation", "words"),
    [
        (sdpa(scale=1.0), "scale of layers.0 is 1 in evaluation and 0.354 in training"),
        (lambda _, q, k, v, __: (q @ k.mT).masked_fill(LATER, -torch.inf).softmax(-1) @ v, "scale of layers.0 is 1 in"),
        (sdpa(is_causal=False), "visible pairs of layers.0 is 1,728 in evaluation and 936 in training"),
        (lambda _, q, k, v, __: by_hand(q, k, v, LATER.mT), "mask of layers.0 is in the logits, 936 pairs in evaluation"),
    ],
    ids=["scale", "eager without scale", "is_causal", "other way round"],
)  # fmt: skip
def test_a_path_of_evaluation_that_computes_something_else(evaluation, words):
    model = model_of(in_modes(sdpa(), evaluation), By(sdpa()))
    found = checked(model)
    assert "training and evaluation" in failed(found)
    assert words in found["training and evaluation"].finding
    assert "layers.1" not in found["training and evaluation"].finding


def test_layers_that_evaluation_leaves_out():
    class Skipped(Attention):
        def forward(self, x, padding=None):
            return super().forward(x, padding) if self.training else x

    said = only("training and evaluation", checked(model_of(Attention(), Skipped())))
    assert said == "1 attention call in evaluation and 2 in training, without anything random."


def test_dropout_and_backends_may_differ():
    eager = By(lambda self, q, k, v, _: F.dropout((q @ k.mT * K**-0.5).masked_fill(LATER, -torch.inf).softmax(-1), 0.2, self.training) @ v)  # fmt: skip
    model = model_of(eager, in_modes(eager.core, sdpa()), Attention(fused=True))
    found = checked(model)
    assert not failed(found)
    assert found["training and evaluation"].status == "passed"
    layer = nn.TransformerEncoderLayer(D, H, 64, batch_first=True, dropout=0.3)
    assert checked(built(Encoder, layer), FLOATS)["training and evaluation"].status == "passed"


def test_layers_that_are_dropped_at_random_are_no_fault():
    class Dropped(Attention):
        def forward(self, x, padding=None):
            y = super().forward(x, padding)
            return torch.zeros_like(y) if self.training and torch.rand(()) < 0.5 else y

    found = checked(model_of(Dropped(), Dropped(), Dropped()))
    assert not failed(found) and found["training and evaluation"].status == "stated"


def test_what_else_differs_in_training_is_stated_with_its_place():
    class Halved(nn.Module):
        def forward(self, x):
            return x / 2 if self.training else x

    found = checked(model_of(between=Halved()))["training and evaluation"]
    assert found.status == "stated" and "first in norm (2 attention calls" in found.finding


# -- dtypes, layers that nobody knows --


def test_a_layer_of_another_dtype_than_its_twins():
    class Cast(nn.Module):
        def __init__(self, dtype):
            super().__init__()
            self.inner = Attention().to(dtype)

        def forward(self, x, padding=None):
            return self.inner(x.to(self.inner.out.weight.dtype), padding).to(x.dtype)

    model = model_of(*map(Cast, (torch.float32, torch.bfloat16, torch.float32)))
    said = only("dtypes", checked(model))
    assert said.startswith("4 parameters have another dtype than the same part of other layers: layers.1.inner.qkv.weight is bfloat16")  # fmt: skip

    class Alone(Attention):
        def forward(self, x, padding=None):
            with torch.autocast("cpu", torch.bfloat16):
                return super().forward(x, padding).to(x.dtype)

    said = only("dtypes", checked(model_of(Attention(), Alone(), Attention())))
    assert said.startswith("1 attention call has another dtype than the same part of other layers: layers.1 is bfloat16, float32")  # fmt: skip


def test_norms_of_another_dtype_are_stated():
    model = model_of(Attention(), Attention()).bfloat16()
    model.embedding.float(), model.positions.float()
    model.norm.float().register_forward_hook(lambda _, __, out: out.bfloat16())
    model.head.float().register_forward_pre_hook(lambda _, args: args[0].float())
    found = checked(model)["dtypes"]
    assert found.status == "stated" and "8 bfloat16" in found.finding and "float32" in found.finding


def test_layers_in_a_list_are_not_registered():
    model = model_of()
    layers = [Attention(), Attention()]
    del model.layers
    model.layers = layers
    said = only("registered layers", checked(model))
    assert said.startswith(
        "The parameters of 2 of 2 attention calls are not among those of the model"
    )


# -- padding masks the wrong way round --


def inverted(kind):
    def fused(_, q, k, v, padding):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=padding[:, None, None])

    def eager(_, q, k, v, padding):
        return by_hand(q, k, v, ~padding[:, None, None])

    def flex(_, q, k, v, padding):
        return flex_attention(
            q, k, v, score_mod=lambda z, b, h, i, j: torch.where(padding[b, j], z, -math.inf)
        )

    return By({"fused": fused, "eager": eager, "flex": flex}[kind])


@pytest.mark.parametrize("kind", ["fused", "eager", "flex"])
@pytest.mark.parametrize("wrap", [lambda m: m, Pooled], ids=["positions", "pooled"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_an_inverted_padding_mask_is_named(kind, wrap, side):
    mask = PADDED if side == "right" else PADDED.flip(1)
    found = checked(wrap(model_of(inverted(kind), inverted(kind))), (TOKENS, mask))
    said = only("padding leak", found)
    assert said.startswith(
        "The padding mask is inverted: real keys are hidden and padded keys are seen in "
    )
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


# -- softmax over the wrong axis --


def test_lines_of_a_softmax_over_the_queries():
    lines = [
        "layers.0.attn (eager, [[3, 4, 12, 12]]): softmax over the queries' axis: each key's weights sum to 1",
        "layers.1.attn (sdpa, [[3, 4, 12, 8]]): nested tensors",
        "softmax over the queries' axis",
    ]
    assert wrong_axes(lines) == [
        ("layers.0.attn", "softmax over the queries' axis: each key's weights sum to 1")
    ]
    assert wrong_axes([]) == []


def test_a_softmax_over_the_queries_is_a_failed_check_that_says_where():
    from attnscope.check.attention import Looked
    from attnscope.check.case import open_case
    from attnscope.check.masks import softmax_axis

    line = "layers.0.attn (eager, [[3, 4, 12, 12]]): softmax over the queries' axis"
    found = softmax_axis(
        open_case(model_of(), TOKENS), Looked(calls=(), why=line, unseen=(line,), reacts={})
    )
    assert found.status == "failed"
    assert found.finding == (
        "1 of 1 attention call takes the softmax over the axis of the queries instead of the keys: layers.0.attn."
    )
    assert "softmax(dim=-1)" in found.remedy and V
