"""Every attention backend against softmax(scale q kᵀ + bias) v written out, and what half precision and dropout do."""

import itertools

import pytest
import torch

from attnscope.model import BACKENDS, AttentionInputs
from attnscope.model.attention import Dropout
from attnscope.model.masks import visible_keys, with_padding
from attnscope.model.position import alibi_bias
from tests import reference

CPU = torch.device("cpu")
M, B, H, T, K = 2, 2, 3, 5, 4
REAL_BS = torch.arange(T) < torch.tensor([[3], [T]])


def attention_case(*, mask="none", window=0, biased=False, softcap=0.0, dtype=torch.float64, size=2.0, seed=0):
    """Inputs as `forward` puts them together, with another scale for each member; and v."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (
        (torch.randn(M, B, H, T, K, generator=generator, dtype=torch.float64) * size).to(dtype) for _ in range(3)
    )
    visible_TS = visible_keys(mask=mask, window=window, n_queries=T, n_keys=T, device=CPU)
    alone = visible_TS is not None and mask != "padding" and not biased
    inputs = AttentionInputs(
        q_MBHTK=q,
        k_MBHSK=k,
        attn_scale=torch.tensor([0.5, 1.0], dtype=dtype).view(M, 1, 1, 1, 1),
        visible=with_padding(visible_TS, REAL_BS if mask == "padding" else None),
        bias_HTS=alibi_bias(H, T, T, device=CPU) if biased else None,
        softcap=softcap,
        mask_TS=torch.zeros(T, T).masked_fill(~visible_TS, float("-inf")) if alone else None,
        is_causal=mask == "causal" and not window and not biased,
    )
    return inputs, v


def without_mask_ts(inputs):
    fields = {name: getattr(inputs, name) for name in inputs.__slots__}
    return AttentionInputs(**fields | {"mask_TS": None, "is_causal": False})


CASES = [
    (backend, mask, window, biased, softcap)
    for backend, mask, window, biased, softcap in itertools.product(
        BACKENDS, ("none", "causal", "padding"), (0, 2), (False, True), (0.0, 3.0)
    )
    if not (softcap and backend == "sdpa")
]


@pytest.mark.parametrize(("backend", "mask", "window", "biased", "softcap"), CASES)
def test_a_backend_equals_the_formula(backend, mask, window, biased, softcap):
    inputs, v = attention_case(mask=mask, window=window, biased=biased, softcap=softcap)
    out = BACKENDS[backend](inputs, v, None)
    visible = None if inputs.visible is None else inputs.visible.expand(B, H, T, T)
    bias = None if inputs.bias_HTS is None else inputs.bias_HTS.expand(B, H, T, T)
    for m in range(M):
        expected = reference.attention(
            inputs.q_MBHTK[m],
            inputs.k_MBHSK[m],
            v[m],
            scale=float(inputs.attn_scale[m]),
            visible=visible,
            bias=bias,
            softcap=softcap,
        )
        torch.testing.assert_close(out[m], expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("mask", "window"), [("causal", 0), ("causal", 2), ("none", 2)])
def test_shortcuts_for_plain_masks_change_nothing(backend, mask, window):
    inputs, v = attention_case(mask=mask, window=window)
    assert inputs.mask_TS is not None
    quick = BACKENDS[backend](inputs, v, None)
    general = BACKENDS[backend](without_mask_ts(inputs), v, None)
    torch.testing.assert_close(quick, general, rtol=0, atol=1e-12)


@pytest.mark.parametrize("mask", ["none", "causal", "padding"])
@pytest.mark.parametrize("biased", [False, True])
def test_eager_and_sdpa_have_the_same_gradients(mask, biased):
    found = []
    for backend in BACKENDS.values():
        inputs, v = attention_case(mask=mask, biased=biased)
        leaves = [inputs.q_MBHTK, inputs.k_MBHSK, inputs.attn_scale, v]
        for leaf in leaves:
            leaf.requires_grad_()
        loss = (backend(inputs, v, None) * torch.arange(K)).sum()
        found.append(torch.autograd.grad(loss, leaves))
    for eager, sdpa in zip(*found, strict=True):
        assert eager.abs().max() > 0
        torch.testing.assert_close(eager, sdpa, rtol=0, atol=1e-10)


def overflowing(dtype):
    """q.k = 100 000 beyond float16's 65 504, attention logits of 10 000 within it."""
    inputs, v = attention_case(mask="causal", dtype=dtype)
    fields = {name: getattr(inputs, name) for name in inputs.__slots__}
    large = torch.full((M, B, H, T, K), 25_000**0.5, dtype=dtype)
    scale = torch.full((M, 1, 1, 1, 1), 0.1, dtype=dtype)
    changed = {"q_MBHTK": large, "k_MBHSK": large, "attn_scale": scale}
    return AttentionInputs(**fields | changed), v


def test_float16_overflows_before_the_scale_as_it_does_by_hand():
    inputs, v = overflowing(torch.float16)
    assert BACKENDS["eager"](inputs, v, None).isnan().all()
    scaled_first = (inputs.q_MBHTK * inputs.attn_scale) @ inputs.k_MBHSK.mT
    assert scaled_first.isfinite().all()  # so it is the order that breaks


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_range_of_bfloat16_and_float32_holds_the_same_product(dtype):
    inputs, v = overflowing(dtype)
    assert BACKENDS["eager"](inputs, v, None).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_eager_in_half_precision_is_the_literal_formula(dtype):
    inputs, v = attention_case(mask="causal", dtype=dtype)
    z = inputs.q_MBHTK @ inputs.k_MBHSK.mT * inputs.attn_scale
    p = z.masked_fill(~inputs.visible, float("-inf")).softmax(dim=-1)
    out = BACKENDS["eager"](inputs, v, None)
    assert out.dtype == dtype
    assert torch.equal(out, p @ v)


def dropped_weights(backend, p, seeds, *, n_keys=400, n_queries=50):
    """The attention weights after dropout, (M, T, S): uniform attention over v = identity shows them."""
    n_members = len(seeds)
    inputs = AttentionInputs(
        q_MBHTK=torch.zeros(n_members, 1, 1, n_queries, 4),
        k_MBHSK=torch.zeros(n_members, 1, 1, n_keys, 4),
        attn_scale=torch.ones(n_members, 1, 1, 1, 1),
        visible=None,
        bias_HTS=None,
        softcap=0.0,
        mask_TS=None,
        is_causal=False,
    )
    v = torch.eye(n_keys).expand(n_members, 1, 1, n_keys, n_keys)
    return BACKENDS[backend](inputs, v, Dropout(p=p, seeds=seeds))[:, 0, 0] * n_keys


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_drops_its_share_and_keeps_the_mean(backend):
    weights = dropped_weights(backend, 0.3, [1, 2])
    # 40 000 draws: one standard error of the rate is 0.0023
    assert (weights == 0).float().mean().item() == pytest.approx(0.3, abs=0.01)
    torch.testing.assert_close(weights[weights > 0], torch.full((), 1 / 0.7).expand((weights > 0).sum()))
    assert weights.mean().item() == pytest.approx(1, abs=0.015)


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_follows_the_seed_of_each_member(backend):
    first, again = dropped_weights(backend, 0.5, [7, 8]), dropped_weights(backend, 0.5, [7, 8])
    assert torch.equal(first, again)
    other = dropped_weights(backend, 0.5, [7, 9])
    assert torch.equal(first[0], other[0])
    assert (first[1] != other[1]).float().mean() > 0.4
    assert (first[0] != first[1]).float().mean() > 0.4
    assert torch.equal(dropped_weights(backend, 0.5, [8])[0], first[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_leaves_the_global_generator_alone(backend):
    before = torch.get_rng_state()
    dropped_weights(backend, 0.5, [7, 8])
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(("mask", "biased"), [("causal", True), ("padding", False), ("padding", True)])
def test_sdpa_masks_the_same_with_dropout(mask, biased):
    inputs, v = attention_case(mask=mask, window=2, biased=biased)
    none_dropped = BACKENDS["sdpa"](inputs, v, Dropout(p=1e-12, seeds=[1, 2]))
    torch.testing.assert_close(none_dropped, BACKENDS["sdpa"](inputs, v, None))
