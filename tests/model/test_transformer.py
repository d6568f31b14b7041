"""The forward pass against its slow twin, who may influence whom, and the attention logits at step 0."""

import math
from dataclasses import replace

import pytest
import torch

from attnscope.config import apply_changes, parse_table
from attnscope.data import open_data
from attnscope.metrics.attention import attention_stats
from attnscope.model import attn_scales, forward, geometry_of, initial_parameters
from tests import reference

CPU = torch.device("cpu")
VOCAB, B, T = 7, 2, 5
TOKENS_BT = torch.tensor([[0, 3, 6, 1, 1], [5, 2, 2, 4, 0]])
REAL_BS = torch.tensor([[True] * 3 + [False] * 2, [True] * T])


def small(**changes):
    config = parse_table(
        {
            "model": {"d_model": 8, "n_heads": 2, "n_layers": 2, "d_ff": 12, "seq_len": T},
            "init": {"embedding_std": 0.7},
        }
    )
    return apply_changes(config, {key.replace("__", "."): v for key, v in changes.items()}, where="")


def weights(config, *, n_members=2):
    """Float64 parameters; gains and learned scales away from their start so that they count."""
    seeds = [apply_changes(config, {"train.seed": seed}, where="") for seed in range(n_members)]
    drawn = initial_parameters(seeds, vocab_size=VOCAB)
    generator = torch.Generator().manual_seed(9)
    return {
        name: value.double()
        * (1 + torch.rand(value.shape, generator=generator) if name.startswith(("norm", "scale")) else 1)
        for name, value in drawn.items()
    }


def place_in_double(config):
    """The geometry with its sines and cosines in float64, so that float32 rounding does not hide mistakes."""
    geometry = geometry_of(config, seq_len=T, device=CPU)
    if geometry.rope_TK is not None:
        angles = reference.positions_angles(T, config.d_head)
        torch.testing.assert_close(geometry.rope_TK, (angles.cos().float(), angles.sin().float()))
        return replace(geometry, rope_TK=(angles.cos(), angles.sin()))
    if geometry.positions_TD is not None:
        angles = reference.positions_angles(T, config.model.d_model)
        table = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2)
        torch.testing.assert_close(geometry.positions_TD, table.float())
        return replace(geometry, positions_TD=table)
    return geometry


SCALE_ML = torch.tensor([[0.5, 0.25], [1.0, 0.75]], dtype=torch.float64)


def run(config, parameters, *, tokens=TOKENS_BT, **rest):
    return forward(
        parameters, config, place_in_double(config), tokens,
        attn_scale_ML=SCALE_ML[: len(parameters["qkv"])], **rest,
    )  # fmt: skip


def assert_equals_twin(config, *, real_BS=None):
    parameters = weights(config)
    out = run(config, parameters, real_BS=real_BS)
    assert out.shape == (2, B * T, VOCAB)
    for m in range(2):
        own = {name: value[m] for name, value in parameters.items()}
        expected = reference.transformer(own, config, TOKENS_BT, scale_L=SCALE_ML[m], real_BS=real_BS)
        torch.testing.assert_close(out[m], expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("position", ["learned", "sinusoidal", "rope", "alibi", "none"])
@pytest.mark.parametrize(
    ("norm", "kind"),
    [("pre", "layernorm"), ("pre", "rmsnorm"), ("post", "layernorm"), ("post", "rmsnorm"), ("none", "layernorm")],
)  # fmt: skip
def test_forward_equals_the_slow_twin(norm, kind, position):
    for activation, qk_norm, tie in [
        ("gelu", False, False),
        ("relu", True, False),
        ("silu", False, True),
        ("gelu", True, True),
    ]:
        assert_equals_twin(
            small(
                model__norm=norm,
                model__norm_kind=kind,
                model__position=position,
                model__activation=activation,
                model__tie_embeddings=tie,
                attention__qk_norm=qk_norm,
            )
        )


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("mask", ["causal", "none", "padding"])
@pytest.mark.parametrize("window", [0, 2, (0, 2)])
@pytest.mark.parametrize("position", ["learned", "alibi"])
def test_masks_windows_and_backends_equal_the_slow_twin(backend, mask, window, position):
    config = small(
        attention__backend=backend,
        attention__mask=mask,
        attention__window=window,
        model__position=position,
    )
    assert_equals_twin(config, real_BS=REAL_BS if mask == "padding" else None)


@pytest.mark.parametrize(
    "changes",
    [
        {"attention__scale": "learned"},
        {"attention__scale": "learned", "attention__backend": "sdpa"},
        {"attention__logit_softcap": 1.5},
        {"model__d_head": 6},
    ],
)
def test_other_settings_equal_the_slow_twin(changes):
    assert_equals_twin(small(**changes))


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["token_embedding", "qkv", "mlp_out", "norm_final", "head"])
def test_a_broken_member_leaves_its_neighbours_bit_equal(name, backend):
    config = small(model__norm="pre", attention__backend=backend)
    parameters = {key: value.float() for key, value in weights(config).items()}
    before = run(config, parameters)
    parameters[name] = parameters[name].clone()
    parameters[name][1] = math.nan
    after = run(config, parameters)
    assert torch.equal(before[0], after[0])
    if (name, backend) != (
        "qkv",
        "sdpa",
    ):  # PyTorch's fused CPU kernel turns NaN queries into zeros
        assert after[1].isnan().all()


def changed_at(position):
    tokens = TOKENS_BT.clone()
    tokens[:, position] = (tokens[:, position] + 1) % VOCAB
    return tokens


def influenced(config, position, *, real_BS=None):
    """Which positions of which sequence answer differently when the token at `position` changes, (B, T)."""
    parameters = weights(config)
    before = run(config, parameters, real_BS=real_BS)
    after = run(config, parameters, tokens=changed_at(position), real_BS=real_BS)
    return ((before - after).abs().amax(dim=(0, 2)) > 1e-9).view(B, T)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("position", ["learned", "rope", "alibi"])
@pytest.mark.parametrize("window", [0, 3, (0, 2)])
def test_the_future_has_no_influence_under_a_causal_mask(backend, position, window):
    config = small(attention__backend=backend, attention__window=window, model__position=position)
    for changed in range(T):
        seen = influenced(config, changed)
        assert not seen[:, :changed].any()
        assert seen[:, changed:].all()


def test_the_future_has_influence_without_a_mask():
    assert influenced(small(attention__mask="none"), T - 1).all()


def test_a_window_is_as_wide_as_it_says():
    one_layer = {"model__n_layers": 1, "attention__window": 2}
    for mask, expected in [("causal", "00110"), ("none", "01110")]:
        seen = influenced(small(attention__mask=mask, **one_layer), 2)
        assert ["".join(str(int(x)) for x in row) for row in seen] == [expected] * 2


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("window", [0, 2])
def test_padding_has_no_influence_where_it_is_masked(backend, window):
    config = small(attention__mask="padding", attention__window=window, attention__backend=backend)
    seen = influenced(config, T - 1, real_BS=REAL_BS)
    assert not seen[0][REAL_BS[0]].any()
    assert seen[1, T - 2 :].all()  # there the same position is a real token
    unmasked = small(attention__mask="none", attention__backend=backend)
    assert influenced(unmasked, T - 1, real_BS=REAL_BS)[0].all()


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_long_padding_beyond_a_window_stays_finite(backend):
    config = small(attention__mask="padding", attention__window=1, attention__backend=backend)
    real_BS = torch.arange(T) < torch.tensor([[1], [T]])
    assert run(config, weights(config), real_BS=real_BS).isfinite().all()


class Everything:
    """An observer that writes down what it sees."""

    def __init__(self):
        self.calls = []

    def attention(self, layer, inputs):
        self.calls.append(("attention", layer, inputs))

    def residual(self, layer, x_MND):
        self.calls.append(("residual", layer, x_MND))


def test_an_observer_sees_every_layer_once_and_changes_nothing():
    config = small(model__norm="pre", model__n_layers=3)
    parameters = weights(config)
    geometry = geometry_of(config, seq_len=T, device=CPU)
    scale_ML = torch.full((2, 3), 0.5)
    observer = Everything()
    seen = forward(parameters, config, geometry, TOKENS_BT, attn_scale_ML=scale_ML, observer=observer)
    alone = forward(parameters, config, geometry, TOKENS_BT, attn_scale_ML=scale_ML)
    assert torch.equal(seen, alone)
    assert [call[:2] for call in observer.calls] == [
        (what, layer) for layer in range(3) for what in ("attention", "residual")
    ]
    assert observer.calls[0][2].q_MBHTK.shape == (2, B, 2, T, 4)
    # The last residual is what the final norm and the head turn into the output.
    x_MND = torch.nn.functional.layer_norm(observer.calls[-1][2], (8,))
    out = x_MND * parameters["norm_final"][:, None] @ parameters["head"]
    torch.testing.assert_close(out, seen)


def test_members_may_read_different_tokens():
    config = small()
    parameters = weights(config)
    other_BT = TOKENS_BT.flip(1)
    out = run(config, parameters, tokens=torch.stack([TOKENS_BT, other_BT]))
    assert torch.equal(out[0], run(config, parameters)[0])
    assert torch.equal(out[1], run(config, parameters, tokens=other_BT)[1])


def test_shorter_sequences_than_configured_are_the_beginning_of_longer_ones():
    config = small()
    parameters = weights(config)
    geometry = geometry_of(config, seq_len=3, device=CPU)
    short = forward(parameters, config, geometry, TOKENS_BT[:, :3], attn_scale_ML=SCALE_ML)
    whole = run(config, parameters).view(2, B, T, VOCAB)[:, :, :3]
    torch.testing.assert_close(short.view(2, B, 3, VOCAB), whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm_kind", ["layernorm", "rmsnorm"])
def test_half_precision_follows_the_compute_dtype_and_stays_close(dtype, norm_kind):
    config = small(
        model__norm="pre",
        model__norm_kind=norm_kind,
        model__position="rope",
        attention__qk_norm=True,
    )
    parameters = weights(config)
    geometry = geometry_of(config, seq_len=T, device=CPU)
    half = forward(
        {name: value.to(dtype) for name, value in parameters.items()},
        config, geometry, TOKENS_BT, attn_scale_ML=SCALE_ML,
    )  # fmt: skip
    assert half.dtype == dtype
    exact = run(config, parameters)
    assert (half - exact).abs().max() < 0.05 * exact.abs().max()


class LogitStd:
    """Collects the standard deviation of every layer's attention logits, (M, H) each."""

    def __init__(self):
        self.found = []

    def attention(self, layer, inputs):
        stats = attention_stats(inputs.q_MBHTK, inputs.k_MBHSK, inputs.attn_scale, inputs.visible)
        self.found.append(stats["logit_std"])

    def residual(self, layer, x_MND):
        pass


def logit_std_at_step_0(norm, d_head):
    """Mean over heads of an unscaled and a scaled member with the same weights on real bytes, two times (L,)."""
    scaled = parse_table({"model": {"n_heads": 128 // d_head, "norm": norm}, "data": {"batch_size": 4}})
    members = [apply_changes(scaled, {"attention.scale": "none"}, where=""), scaled]
    data = open_data(scaled.data, seq_len=scaled.model.seq_len)
    observer = LogitStd()
    forward(
        initial_parameters(members, vocab_size=data.vocab_size),
        scaled,
        geometry_of(scaled, seq_len=scaled.model.seq_len, device=CPU),
        data.train_batch(0).tokens_BT,
        attn_scale_ML=attn_scales(members),
        observer=observer,
    )
    return torch.stack(observer.found, dim=1).mean(dim=-1).unbind(0)


@pytest.mark.parametrize("d_head", [16, 32, 64, 128])
def test_normalized_unscaled_attention_logits_are_wider_by_the_root_of_d_head(d_head):
    """Vaswani et al. 2017, footnote 4: unit-variance q and k give q.k a standard deviation of √d_head."""
    unscaled_L, scaled_L = logit_std_at_step_0("pre", d_head)
    for wide, narrow in zip(unscaled_L.tolist(), scaled_L.tolist(), strict=True):
        assert wide == pytest.approx(math.sqrt(d_head) * narrow, rel=0.15)
    assert scaled_L[0].item() == pytest.approx(1, rel=0.15)


@pytest.mark.parametrize("d_head", [16, 32, 64, 128])
def test_without_a_norm_it_starts_at_the_root_of_d_head_and_compounds_over_the_layers(d_head):
    """In the default model, whatever saturated attention adds to the stream makes the next layer's logits wider still."""
    unscaled_L, scaled_L = logit_std_at_step_0("none", d_head)
    excess_L = unscaled_L / scaled_L / math.sqrt(d_head)
    assert excess_L[0].item() == pytest.approx(1, rel=0.15)
    assert (excess_L.diff() > 0).all()
