"""softmax(scale q k^T + bias) v, by one function per backend; BACKENDS lists them.

Every backend takes the same arguments and agrees with the slow reference in float64.

Shape key: M member, B batch, H head, P = M x B x H, T query position, S key position, K d_head.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionInputs:
    """All that decides one layer's attention weights; what the metrics read.

    Attributes:
        q_MBHTK: queries, after position encoding and qk_norm.
        k_MBHSK: keys, likewise.
        attn_scale: what multiplies q.k, broadcastable to (M, B, H, T, S).
        visible: True where a query sees a key, broadcastable to (B, H, T, S); None = everywhere.
        bias_HTS: what is added after scale and soft-cap (ALiBi); None = nothing.
        softcap: c of c tanh(z / c); 0 = off.
        mask_TS: `visible` as 0 and -inf, where it is all there is to add; else None.
        is_causal: `visible` is the plain lower triangle and there is no bias, so a kernel may use its own causal path.
    """

    q_MBHTK: Tensor
    k_MBHSK: Tensor
    attn_scale: Tensor
    visible: Tensor | None
    bias_HTS: Tensor | None
    softcap: float
    mask_TS: Tensor | None
    is_causal: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Dropout:
    """Dropout of attention weights, with one seed per member so that members stay independent."""

    p: float
    seeds: Sequence[int]


def eager(inputs: AttentionInputs, v_MBHSK: Tensor, dropout: Dropout | None) -> Tensor:
    """The formula as people write it by hand; every intermediate in the compute dtype, the softmax too."""
    q_MBHTK, k_MBHSK = inputs.q_MBHTK, inputs.k_MBHSK
    mask_TS = None if inputs.softcap else inputs.mask_TS
    if mask_TS is not None and q_MBHTK.dtype in (torch.float32, torch.float64):
        # Scale, product and mask in one pass. In half precision this would hide that q kᵀ overflows before it is scaled.
        z_PTS = torch.baddbmm(
            mask_TS.to(q_MBHTK.dtype).expand(q_MBHTK.shape[:3].numel(), -1, -1),
            (q_MBHTK * inputs.attn_scale).flatten(0, 2),
            k_MBHSK.flatten(0, 2).mT,
        )
    else:
        z_MBHTS = q_MBHTK @ k_MBHSK.mT * inputs.attn_scale
        if inputs.softcap:
            z_MBHTS = inputs.softcap * torch.tanh(z_MBHTS / inputs.softcap)
        if inputs.bias_HTS is not None:
            z_MBHTS = z_MBHTS + inputs.bias_HTS.to(z_MBHTS.dtype)
        if inputs.visible is not None:
            z_MBHTS = z_MBHTS.masked_fill(~inputs.visible, float("-inf"))
        z_PTS = z_MBHTS.flatten(0, 2)
    p_PTS = z_PTS.softmax(dim=-1)
    if dropout is not None:
        p_PTS = p_PTS * _keep(dropout, p_PTS)
    out_PTK = torch.bmm(p_PTS, v_MBHSK.flatten(0, 2))
    return out_PTK.view(*q_MBHTK.shape[:-1], -1)


def sdpa(inputs: AttentionInputs, v_MBHSK: Tensor, dropout: Dropout | None) -> Tensor:
    """`F.scaled_dot_product_attention`: whichever fused kernel PyTorch has for this device, dtype and mask."""
    # The scale may differ per member, so it goes into q; SDPA itself is told to scale by 1.
    q_MBHTK, k_MBHSK = inputs.q_MBHTK * inputs.attn_scale, inputs.k_MBHSK
    mask = None if inputs.is_causal else _sdpa_mask(inputs, q_MBHTK.dtype)
    if dropout is None:
        if mask is not None and mask.dim() == 4:
            mask = mask.expand(q_MBHTK.shape[:1] + mask.shape).flatten(0, 1)
        out = F.scaled_dot_product_attention(  # the fused kernels want four axes
            q_MBHTK.flatten(0, 1),
            k_MBHSK.flatten(0, 1),
            v_MBHSK.flatten(0, 1),
            attn_mask=mask,
            is_causal=inputs.is_causal,
            scale=1.0,
        )
        return out.unflatten(0, q_MBHTK.shape[:2])
    outs = []
    for q, k, v, seed in zip(q_MBHTK, k_MBHSK, v_MBHSK, dropout.seeds, strict=True):
        # SDPA draws its dropout from the global generator: lend it a seeded one, member by member.
        with torch.random.fork_rng(devices=[q.device] if q.is_cuda else []):
            torch.manual_seed(seed)
            outs.append(
                F.scaled_dot_product_attention(
                    q,
                    k,
                    v,
                    attn_mask=mask,
                    is_causal=inputs.is_causal,
                    dropout_p=dropout.p,
                    scale=1.0,
                )
            )
    return torch.stack(outs)


BACKENDS: dict[str, Callable[[AttentionInputs, Tensor, Dropout | None], Tensor]] = {"eager": eager, "sdpa": sdpa}


def _keep(dropout: Dropout, p_PTS: Tensor) -> Tensor:
    """0 for a dropped weight, 1 / (1 - p) for a kept one; drawn per member."""
    shape = (len(p_PTS) // len(dropout.seeds), *p_PTS.shape[1:])
    draws = []
    for seed in dropout.seeds:
        generator = torch.Generator(device=p_PTS.device).manual_seed(seed)
        draws.append(torch.rand(shape, generator=generator, device=p_PTS.device))
    return (torch.cat(draws) >= dropout.p).to(p_PTS.dtype) / (1 - dropout.p)


def _sdpa_mask(inputs: AttentionInputs, dtype: torch.dtype) -> Tensor | None:
    if inputs.bias_HTS is None:
        return inputs.visible
    bias = inputs.bias_HTS.to(dtype)
    if inputs.visible is None:
        return bias
    return bias.masked_fill(~inputs.visible, float("-inf"))
