"""Sound models of many kinds: no check fails, whatever their masks, scales, outputs and arguments are."""

import warnings
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from tests.check.models import FLOATS, TOKENS, D, H, K, V, built, checked, sound

MASK = torch.ones_like(TOKENS)
MASK[0, 8:] = 0
PICTURES = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
with warnings.catch_warnings():  # of PyTorch, which imports its compiler
    warnings.simplefilter("ignore")
    COMPILED = torch.compile(flex_attention)


# -- torch's own --


def encoder(**more):
    layer = nn.TransformerEncoderLayer(D, H, 64, **more)
    return built(nn.TransformerEncoder, layer, 2, enable_nested_tensor=more.get("batch_first", False))


@pytest.mark.parametrize("first", [True, False], ids=["batch first", "positions first"])
def test_an_encoder_with_padding_behind_all_sequences(first):
    padding = MASK == 0
    padding[:, 10:] = True  # where the fast path returns fewer positions
    src = FLOATS if first else FLOATS.transpose(0, 1)
    batch = {"src": src, "src_key_padding_mask": padding}
    sound(
        encoder(batch_first=first),
        batch,
        future_leak="stated",
        padding_leak="passed",
        batch_leak="passed",
    )


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_positions_on_the_first_axis_are_known_by_a_causal_mask():
    later = nn.Transformer.generate_square_subsequent_mask(12)
    batch = {"src": FLOATS.transpose(0, 1), "mask": later}
    found = sound(encoder(), batch, future_leak="passed", batch_leak="passed")
    assert found["future leak"].finding.startswith("Looks causal: none of 51 pairs")

    class Tutorial(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.positions = nn.Embedding(V, D), nn.Parameter(torch.randn(64, 1, D))
            self.encoder, self.head = encoder(), nn.Linear(D, V)

        def forward(self, src):
            x = self.embedding(src) + self.positions[: len(src)]
            later = nn.Transformer.generate_square_subsequent_mask(len(src))
            return self.head(self.encoder(x, later)).log_softmax(dim=-1)

    found = sound(built(Tutorial), TOKENS.T.contiguous(), future_leak="passed", batch_leak="passed")
    assert "gradients of 4" in found["future leak"].finding
    model = built(nn.Transformer, D, H, 1, 1, 64)
    batch = {
        "src": FLOATS.transpose(0, 1),
        "tgt": FLOATS.flip(0).transpose(0, 1),
        "tgt_mask": later,
    }
    sound(model, batch, future_leak="passed", batch_leak="passed")


class PositionsFirst(nn.Module):
    """(T, B) in, (T, B, V) or what `pool` makes of it out."""

    def __init__(self, pool=lambda y: y):
        super().__init__()
        self.embedding, self.positions = nn.Embedding(V, D), nn.Embedding(64, D)
        self.encoder, self.head, self.pool = encoder(), nn.Linear(D, V), pool

    def forward(self, x):
        at = torch.arange(len(x))[:, None]
        return self.head(self.pool(self.encoder(self.embedding(x) + self.positions(at))))


@pytest.mark.parametrize("tokens", [TOKENS.T, TOKENS[:1].T], ids=["three", "one"])
def test_positions_on_the_first_axis_are_known_by_their_embeddings(tokens):
    expected = {
        "future_leak": "stated",
        "batch_leak": "passed" if tokens.shape[1] > 1 else "not_looked",
    }
    sound(built(PositionsFirst), tokens.contiguous(), **expected)


@pytest.mark.parametrize("pool", [lambda y: y.mean(dim=0), lambda y: y[0]], ids=["mean", "first"])
def test_positions_on_the_first_axis_are_known_by_pooled_outputs(pool):
    sound(
        built(PositionsFirst, pool),
        TOKENS.T.contiguous(),
        future_leak="not_looked",
        batch_leak="passed",
    )


def test_an_encoder_decoder_with_every_mask():
    later = nn.Transformer.generate_square_subsequent_mask(12)
    added = torch.zeros(3, 12).masked_fill(MASK == 0, -torch.inf)
    batch = {
        "src": FLOATS, "tgt": FLOATS.flip(0), "tgt_mask": later, "src_key_padding_mask": MASK == 0,
        "memory_key_padding_mask": MASK == 0, "tgt_key_padding_mask": added, "tgt_is_causal": True,
    }  # fmt: skip
    model = built(nn.Transformer, D, H, 1, 1, 64, batch_first=True)
    sound(model, batch, future_leak="passed", padding_leak="passed")


# -- by hand --


class Attention(nn.Module):
    def __init__(self, core, n_kv_heads):
        super().__init__()
        self.core, self.shared = core, H // n_kv_heads
        self.q, self.kv, self.out = (
            nn.Linear(D, D),
            nn.Linear(D, 2 * n_kv_heads * K),
            nn.Linear(D, D),
        )

    def forward(self, x):
        q = self.q(x).unflatten(-1, (H, K)).transpose(1, 2)
        k, v = (y.unflatten(-1, (-1, K)).transpose(1, 2) for y in self.kv(x).chunk(2, dim=-1))
        k, v = (y.repeat_interleave(self.shared, dim=1) for y in (k, v))
        return self.out(self.core(self, q, k, v).transpose(1, 2).flatten(2))


class Decoder(nn.Module):
    def __init__(self, core, n_kv_heads=2, form=lambda y: y):
        super().__init__()
        self.embedding, self.positions = nn.Embedding(V, D), nn.Embedding(64, D)
        self.layers = nn.ModuleList(Attention(core, n_kv_heads) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(D) for _ in range(2))
        self.head, self.drop, self.form = nn.Linear(D, V), nn.Dropout(0.1), form

    def forward(self, idx):
        x = self.drop(self.embedding(idx) + self.positions(torch.arange(idx.shape[1])))
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + self.drop(layer(norm(x)))
        return self.form(self.head(x))


I_T1, J_S = torch.arange(12)[:, None], torch.arange(12)
SLOPES_H11 = 0.5 ** torch.arange(1.0, H + 1)[:, None, None]
HIDDEN = {
    "causal": J_S > I_T1,
    "window": (J_S > I_T1) | (I_T1 - J_S > 3),
    "prefix": (J_S > I_T1) & ~((I_T1 < 5) & (J_S < 5)),
    "blocks": J_S // 4 > I_T1 // 4,
    "nothing": torch.zeros(12, 12, dtype=torch.bool),
}
SAYS = {"prefix": "stated", "blocks": "stated", "nothing": "stated"}


@pytest.mark.parametrize("kind", HIDDEN)
@pytest.mark.parametrize("alibi", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_masks_and_biases(kind, alibi, fused):
    bias = -SLOPES_H11 * (I_T1 - J_S).abs() * alibi
    added = bias.masked_fill(HIDDEN[kind], -torch.inf)

    def core(self, q, k, v):
        if fused and alibi:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=added[None])
        if fused:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=~HIDDEN[kind])
        return (q @ k.mT / K**0.5 + added).softmax(dim=-1) @ v

    found = sound(built(Decoder, core), TOKENS, future_leak=SAYS.get(kind, "passed"))
    if kind in ("prefix", "blocks"):
        assert "within blocks of positions" in found["future leak"].finding


def test_a_prefix_is_no_leak_unless_the_model_is_meant_to_be_causal():
    def core(_, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=~HIDDEN["prefix"])

    for causal, status in ((True, "failed"), (False, "passed"), (None, "stated")):
        assert checked(built(Decoder, core), TOKENS, causal=causal)["future leak"].status == status


def test_a_prefix_that_no_attention_shows():
    class Mean(nn.Module):
        def forward(self, x):
            p = (~HIDDEN["prefix"]).float()
            return p / p.sum(dim=-1, keepdim=True) @ x

    model = nn.Sequential(nn.Linear(D, D), Mean(), nn.Linear(D, D))
    sound(model, FLOATS, future_leak="stated", softmax_axis="not_looked")


def test_flex_attention_in_all_its_forms():
    mask = create_block_mask(lambda b, h, i, j: (j <= i) & (i - j < 4), None, None, 12, 12, device="cpu")
    slopes = SLOPES_H11.flatten()

    def alibi(z, b, h, i, j):
        return z - slopes[h] * (i - j).abs()

    plain = built(Decoder, lambda _, q, k, v: flex_attention(q, k, v, score_mod=alibi, block_mask=mask))
    compiled = built(Decoder, lambda _, q, k, v: COMPILED(q, k, v, block_mask=mask))
    for model in (plain, compiled):
        sound(model, TOKENS, future_leak="passed", attention_scale="passed", masked_rows="passed")


def causal(self, q, k, v):
    p = 0.1 if self.training else 0.0
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=p)


@pytest.mark.parametrize("power", [-1.0, None], ids=["muP", "its own"])
def test_scales_that_are_meant_are_stated(power):
    scale = K**power if power else 11**-0.5

    def core(_, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)

    found = sound(built(Decoder, core), TOKENS, attention_scale="stated")
    assert ("1/d_head as in muP" in found["attention scale"].finding) == (power is not None)


@dataclass(slots=True)
class Output:
    loss: object
    nested: object


FORMS = {
    "last position": lambda y: (y[:, [-1]], None),
    "dataclass": lambda y: Output(loss=None, nested={"all": [y]}),
    "classes first": lambda y: y.transpose(1, 2),
    "all heads at once": lambda y: {"heads": (y.unflatten(-1, (2, -1)),)},
    "loss": lambda y: y.square().mean(),
}
POSITIONS = {"last position": "not_looked", "loss": "not_looked"}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_outputs(form):
    model = built(Decoder, causal, form=FORMS[form])
    sound(model, TOKENS, future_leak=POSITIONS.get(form, "passed"), attention_scale="passed")


def test_one_sequence_compiled_parts_low_precision():
    sound(built(Decoder, causal), TOKENS[:1], batch_leak="not_looked", future_leak="passed")
    sound(built(Decoder, causal).bfloat16(), TOKENS, dtypes="passed")
    model = built(Decoder, causal)
    model.layers[0] = torch.compile(model.layers[0], backend="eager")
    sound(model, TOKENS, attention_scale="passed")

    class Autocast(Decoder):
        def forward(self, idx):
            with torch.autocast("cpu", torch.bfloat16):
                return super().forward(idx)

    sound(built(Autocast, causal), TOKENS, training_and_evaluation="passed", dtypes="passed")


def test_state_that_a_model_carries_from_pass_to_pass():
    class Stateful(nn.Module):
        def __init__(self):
            super().__init__()
            self.past, self.decoder = None, Decoder(causal)

        def forward(self, idx):
            self.past = idx if self.past is None else torch.cat([self.past, idx], dim=1)
            return self.decoder(self.past)[:, -idx.shape[1] :]

    model = built(Stateful)
    sound(model, TOKENS, repeatable_training="passed")
    assert model.past is None


def test_models_without_attention_or_positions():
    network = nn.Sequential(nn.Linear(20, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 5))
    found = sound(network, torch.randn(8, 20), batch_leak="stated", future_leak="not_looked")
    assert "It is a BatchNorm1d." in found["batch leak"].finding
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 14 * 14, 5))
    sound(network, {"input": PICTURES}, batch_leak="stated")
    sound(network, (PICTURES * 20).to(torch.uint8).float(), dtypes="passed")


def test_latents_that_attend_to_positions():
    class Latents(nn.Module):
        def __init__(self):
            super().__init__()
            self.latents = nn.Parameter(torch.randn(5, D))
            self.read, self.write = (nn.MultiheadAttention(D, H, batch_first=True) for _ in range(2))

        def forward(self, x):
            latents = self.latents.expand(len(x), -1, -1)
            latents = latents + self.read(latents, x, x, need_weights=False)[0]
            return x + self.write(x, latents, latents, need_weights=False)[0]

    sound(built(Latents), FLOATS, future_leak="stated", head_shapes="passed")


# -- how padding is said --


class Padded(nn.Module):
    """A classifier: padding(x, given) -> True where a position is padded."""

    def __init__(self, padding):
        super().__init__()
        self.embedding, self.padding = nn.Embedding(V, D), padding
        self.encoder, self.head = encoder(batch_first=True), nn.Linear(D, 3)

    def classify(self, x, hidden):
        y = self.encoder(self.embedding(x), src_key_padding_mask=hidden).masked_fill(hidden[..., None], 0)
        return self.head(y.sum(dim=1) / (~hidden).sum(dim=1, keepdim=True))


class WithLengths(Padded):
    def forward(self, x, lengths):
        return self.classify(x, torch.arange(x.shape[1]) >= lengths[:, None])


class WithMask(Padded):
    def forward(self, x, mask):
        return self.classify(x, self.padding(mask))


FILLED = TOKENS.masked_fill(MASK == 0, 0)


def test_padding_that_lengths_tell():
    sound(built(WithLengths, None), (TOKENS, torch.tensor([8, 12, 10])), padding_leak="passed")


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("is_padding", [True, False])
def test_a_mask_whose_name_does_not_say_what_true_means(is_padding, side):
    real, tokens = (MASK == 1, FILLED) if side == "right" else ((MASK == 1).flip(1), FILLED.flip(1))
    model = built(WithMask, (lambda mask: mask) if is_padding else (lambda mask: ~mask))
    sound(model, (tokens, ~real if is_padding else real), padding_leak="passed")
