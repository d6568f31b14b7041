"""Attention in PyTorch's own modules, and written by hand in the ways people write it."""

import math
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from attnscope.runs.reader import open_run
from attnscope.watch.attach import watch_model
from tests.watch.foreign import entropy_by_head, entropy_of_weights, layers_of, train_watched

B, T, D, H = 3, 12, 32, 4
X = torch.randn(B, T, D, generator=torch.Generator().manual_seed(0)) * 2
CAUSAL = torch.ones(T, T, dtype=torch.bool).triu(1)  # True = hidden, as nn.MultiheadAttention has it


def squared(out):
    return (out[0] if isinstance(out, tuple) else out).square().mean()


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("mask", [None, CAUSAL, torch.zeros(T, T).masked_fill(CAUSAL, -torch.inf)],
                         ids=["none", "bool", "float"])  # fmt: skip
def test_multihead_attention(tmp_path, need_weights, mask):
    torch.manual_seed(0)
    model = nn.MultiheadAttention(D, H, batch_first=True)
    _, weights = model(X, X, X, attn_mask=mask, average_attn_weights=False)
    run = train_watched(
        tmp_path / "run",
        model,
        lambda m: squared(m(X, X, X, attn_mask=mask, need_weights=need_weights)),
    )
    (layer,) = layers_of(run)
    assert (layer["name"], layer["n_heads"], layer["d_head"]) == ("MultiheadAttention", H, D // H)
    assert layer["scale"] == pytest.approx((D // H) ** -0.5, rel=1e-4)
    assert torch.allclose(entropy_by_head(run, 0), entropy_of_weights(weights), atol=1e-5)


def encoder(norm_first=False):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(D, H, 64, dropout=0.0, batch_first=True, norm_first=norm_first)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def test_transformer_encoder_in_training(tmp_path):
    run = train_watched(tmp_path / "run", encoder(), lambda m: squared(m(X, mask=CAUSAL)))
    layers = layers_of(run)
    assert [layer["name"] for layer in layers] == ["layers.0.self_attn", "layers.1.self_attn"]
    assert {layer["backend"] for layer in layers} == {"sdpa"}


@pytest.mark.parametrize(("padded", "norm_first"), [(False, False), (True, False), (False, True)])
def test_transformer_encoder_in_evaluation_takes_its_fast_path_and_is_seen(tmp_path, padded, norm_first):
    model = encoder(norm_first=norm_first).eval()
    padding = torch.zeros(B, T, dtype=torch.bool)
    padding[0, 8:] = padded
    given = {"src_key_padding_mask": padding} if padded else {}
    with torch.no_grad():
        plain = model(X, **given)
        with watch_model(model, path=tmp_path / "run", rows="all"):
            watched = model(X, **given)
    assert torch.equal(plain, watched)
    run = open_run(tmp_path / "run")
    layers = layers_of(run)
    assert [layer["backend"] for layer in layers] == ["fast path"] * 2
    assert [layer["name"] for layer in layers] == ["layers.0.self_attn", "layers.1.self_attn"]
    first = model.layers[0].self_attn
    x = model.layers[0].norm1(X) if norm_first else X
    _, weights = first(x, x, x, average_attn_weights=False, key_padding_mask=padding if padded else None)  # fmt: skip
    assert torch.allclose(entropy_by_head(run, 0), entropy_of_weights(weights), atol=1e-5)


def test_encoder_and_decoder_layers_are_told_apart(tmp_path):
    torch.manual_seed(0)
    model = nn.Transformer(D, H, 1, 1, 64, dropout=0.0, batch_first=True)
    run = train_watched(tmp_path / "run", model, lambda m: squared(m(X, X, tgt_is_causal=True, tgt_mask=CAUSAL)))  # fmt: skip
    assert [layer["name"] for layer in layers_of(run)] == [
        "encoder.layers.0.self_attn", "decoder.layers.0.self_attn", "decoder.layers.0.multihead_attn",
    ]  # fmt: skip
    groups = set(run.params["group"].astype(str))
    assert {
        "encoder.layers self_attn.in_proj_weight",
        "decoder.layers multihead_attn.out_proj",
    } <= groups


class ByHand(nn.Module):
    """q, k and v from one projection; `way` says how they are put together. Leaves the weights behind."""

    def __init__(self, way, scale=0.5):
        super().__init__()
        torch.manual_seed(0)
        self.n_heads, self.way, self.scale = H, way, scale
        self.qkv = nn.Linear(D, 3 * D)

    def forward(self, x):
        q, k, v = (y.view(B, T, H, -1).transpose(1, 2) for y in self.qkv(x).chunk(3, dim=-1))
        p = WAYS[self.way](q, k, self.scale)
        self.weights = p.detach().view(B, H, T, T)
        return (p.view(B, H, T, T) @ v).transpose(1, 2)


def _in_place(q, k, scale):
    att = q @ k.transpose(-2, -1)
    att /= 1 / scale
    att.masked_fill_(CAUSAL, float("-inf"))
    return F.softmax(att, dim=-1)


def _fused_heads(q, k, scale):
    att = torch.bmm(q.reshape(B * H, T, -1), k.reshape(B * H, T, -1).mT)
    return torch.softmax(att * scale, -1)


def _scaled_before(q, k, scale):
    att = torch.einsum("bhid,bhjd->bhij", q * math.sqrt(scale), k * math.sqrt(scale))
    return att.where(~CAUSAL, -1e9).softmax(dim=-1)


def _with_bias(q, k, scale):
    bias = -torch.arange(T).float().abs() * torch.tensor([1.0, 0.5, 0.25, 0.1]).view(H, 1, 1)
    return nn.Softmax(dim=-1)((q @ k.mT) * scale + bias)


def _baddbmm(q, k, scale):
    mask = torch.zeros(B * H, T, T).masked_fill(CAUSAL, torch.finfo(torch.float32).min)
    return torch.baddbmm(mask, q.reshape(B * H, T, -1), k.reshape(B * H, T, -1).mT, alpha=scale).softmax(-1)  # fmt: skip


WAYS = {
    "in place": _in_place,
    "heads and batch in one axis": _fused_heads,
    "scaled before the product": _scaled_before,
    "with a bias": _with_bias,
    "added by baddbmm": _baddbmm,
}


@pytest.mark.parametrize("way", WAYS)
def test_written_by_hand(tmp_path, way):
    model = ByHand(way)
    run = train_watched(tmp_path / "run", model, lambda m: squared(m(X)))
    (layer,) = layers_of(run)
    assert (layer["name"], layer["n_heads"], layer["d_head"]) == ("ByHand", H, D // H)
    assert layer["scale"] == pytest.approx(0.5, rel=1e-3)
    assert torch.allclose(entropy_by_head(run, 0), entropy_of_weights(model.weights), atol=1e-5)
    assert len(run.heads) == H, "once per call"


def test_a_soft_cap_leaves_no_single_scale(tmp_path, monkeypatch):
    monkeypatch.setitem(WAYS, "soft-cap", lambda q, k, _: (2 * torch.tanh(q @ k.mT * 2)).softmax(-1))
    run = train_watched(tmp_path / "run", ByHand("soft-cap"), lambda m: squared(m(X)))
    assert layers_of(run)[0]["scale"] is None


def test_a_softmax_that_is_no_attention_is_no_attention(tmp_path):
    class Router(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(D, 5))

        def forward(self, x):
            return (x @ self.w).softmax(dim=-1)

    run = train_watched(tmp_path / "run", Router(), lambda m: squared(m(X)))
    assert layers_of(run) == [] and len(run.heads) == 0 and len(run.steps) == 1


def test_names_bound_before_watching_are_seen(tmp_path, monkeypatch):
    early = types.ModuleType("early")
    early.attend = F.scaled_dot_product_attention  # as `from torch.nn.functional import` would
    monkeypatch.setitem(sys.modules, "early", early)

    class Early(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Linear(D, D)

        def forward(self, x):
            y = self.w(x)[:, None]
            return early.attend(y, y, y)

    run = train_watched(tmp_path / "run", Early(), lambda m: squared(m(X)))
    assert len(layers_of(run)) == 1
    assert early.attend is F.scaled_dot_product_attention, "put back"


def test_grouped_queries(tmp_path):
    class Grouped(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.q, self.kv = nn.Linear(D, D), nn.Linear(D, D // 2)

        def forward(self, x):
            q = self.q(x).view(B, T, H, -1).transpose(1, 2)
            kv = self.kv(x).view(B, T, H // 2, -1).transpose(1, 2)
            self.heads = q.detach(), kv.detach().repeat_interleave(2, dim=1)
            return F.scaled_dot_product_attention(q, kv, kv, scale=0.3, enable_gqa=True)

    model = Grouped()
    run = train_watched(tmp_path / "run", model, lambda m: squared(m(X)))
    (layer,) = layers_of(run)
    assert (layer["n_heads"], layer["scale"]) == (H, pytest.approx(0.3))
    q, k = model.heads
    weights = (q @ k.mT * 0.3).softmax(dim=-1)
    assert torch.allclose(entropy_by_head(run, 0), entropy_of_weights(weights), atol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_call_recomputed_by_checkpointing_counts_once(tmp_path, reentrant):
    from torch.utils.checkpoint import checkpoint

    model = encoder()
    x = X.clone().requires_grad_()
    calls = train_watched(tmp_path / "run", model, lambda m: squared(checkpoint(m, x, use_reentrant=reentrant)))
    plain = train_watched(tmp_path / "plain", encoder(), lambda m: squared(m(x)))
    columns = ["layer", "head", "rows", "entropy", "max_prob"]
    assert calls.heads[columns].equals(plain.heads[columns])
    for run in (calls, plain):
        assert [layer["scale"] for layer in layers_of(run)] == pytest.approx([8**-0.5] * 2)


def test_a_call_that_cannot_be_measured_is_said_once_with_shapes_and_reason(tmp_path):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(D, D))

        def forward(self, x):
            return (x @ self.w).view(B, T, H, -1).softmax(dim=-1)

    run = train_watched(tmp_path / "run", Odd(), lambda m: squared(m(X)), steps=3)
    found = run.events[run.events["kind"] == "not_measured"]
    assert len(found) == 1
    fields = found["fields"].iloc[0]
    assert fields["shapes"] == [[B, T, H, D // H]]
    assert "that no product of activations followed" in fields["reason"]


def test_x_transformers(tmp_path):
    x_transformers = pytest.importorskip("x_transformers", reason="x-transformers models")
    torch.manual_seed(0)
    model = x_transformers.TransformerWrapper(
        num_tokens=60,
        max_seq_len=T,
        attn_layers=x_transformers.Decoder(dim=D, depth=2, heads=H, attn_dim_head=8),
    )
    tokens = torch.randint(0, 60, (B, T))
    with torch.no_grad():
        _, weights = model(tokens, return_attn=True)
    run = train_watched(tmp_path / "run", model, lambda m: m(tokens).square().mean())
    layers = layers_of(run)
    assert [layer["n_heads"] for layer in layers] == [H, H]
    assert [layer["scale"] for layer in layers] == pytest.approx([8**-0.5] * 2, rel=1e-3)
    assert [layer["name"] for layer in layers] == [
        "attn_layers.layers.0.1.attend", "attn_layers.layers.2.1.attend",
    ]  # fmt: skip
    for layer, p_BHTS in enumerate(weights):
        assert torch.allclose(entropy_by_head(run, layer), entropy_of_weights(p_BHTS), atol=1e-5)
