"""Attention in one call: F.scaled_dot_product_attention, and the fast paths of nn.MultiheadAttention in evaluation.

Shape key: B batch, H head, T query position, S key position, K d_head.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnscope.capture.names import batch_and_heads
from attnscope.capture.seen import NotMeasuredError, Scaled, Seen, factor_of_both, split_mask


def seen_fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    module: nn.Module | None = None,
    factor: float | None = None,
) -> Seen:
    """A call of F.scaled_dot_product_attention.

    Args:
        query: (..., T, K), any number of leading axes; the other tensors as PyTorch takes them.
        key: (..., S, K).
        value: (..., S, any).
        attn_mask: boolean or float, broadcast to (..., T, S).
        dropout_p: does not change the weights before it.
        is_causal: hide what comes after the query.
        scale: None = 1 / √K.
        enable_gqa: keys have fewer heads.
        module: whose call it is; says how many heads there are where they are folded into the batch.
        factor: what q and k were multiplied by before, where that is known.
    """
    if query.dim() < 2:
        raise NotMeasuredError(f"q with {query.dim()} axes")
    if query.dim() == 2:
        query, key = query[None], key[None]
    lead = query.shape[:-2]
    if enable_gqa and key.shape[-3] != query.shape[-3]:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], dim=-3)
    grid = batch_and_heads(lead, module, query.shape[-1])
    q, k = (x.expand(*lead, *x.shape[-2:]).reshape(*grid, *x.shape[-2:]) for x in (query, key))
    visible, bias, mask = None, None, "none"
    if attn_mask is not None:
        visible, bias, mask = split_mask(_in_grid(attn_mask, lead, grid))
    elif is_causal:
        visible = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
        mask = "causal"
    applied = query.shape[-1] ** -0.5 if scale is None else float(scale)
    return Seen(
        logits=Scaled(q=q, k=k, scale=applied, visible=visible, bias=bias),
        factor=factor_of_both(query, key) if factor is None else factor,
        mask=mask,
        backend="sdpa",
    )


def _in_grid(mask: Tensor, lead: torch.Size, grid: tuple[int, int]) -> Tensor:
    """A mask that broadcasts to (*lead, T, S), broadcast to (B, H, T, S) and no larger than it must be."""
    sizes = mask.shape[:-2]
    if sizes.numel() == 1 or lead == torch.Size(grid):
        return mask.reshape(mask.shape[-2:]) if sizes.numel() == 1 else mask
    return mask.expand(*lead, *mask.shape[-2:]).reshape(*grid, *mask.shape[-2:])


def seen_native(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim: int,
    num_heads: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    mask: Tensor | None = None,
    need_weights: bool = True,
    average_attn_weights: bool = True,
    mask_type: int | None = None,
) -> Seen:
    """What torch._native_multi_head_attention computes inside: the projections are done again to see q and k."""
    if query.is_nested:
        raise NotMeasuredError("nested tensors")
    (w_q, w_k, _), (b_q, b_k, _) = qkv_weight.chunk(3), qkv_bias.chunk(3)
    q, k = (
        F.linear(x.detach(), w.detach(), b.detach()).unflatten(-1, (num_heads, -1)).transpose(1, 2)
        for x, w, b in ((query, w_q, b_q), (key, w_k, b_k))
    )
    hidden = mask
    if hidden is not None and mask_type == 1:  # padding, (B, S)
        hidden = hidden[:, None, None, :]
    visible, bias, kind = (None, None, "none") if hidden is None else split_mask(~hidden.bool())
    return Seen(
        logits=Scaled(q=q, k=k, scale=q.shape[-1] ** -0.5, visible=visible, bias=bias),
        factor=1.0,
        mask=kind,
        backend="fast path",
    )


def seen_native_layer(src: Tensor, embed_dim: int, num_heads: int, *rest: Any, **kwargs: Any) -> Seen:
    """What torch._transformer_encoder_layer_fwd computes inside."""
    qkv_weight, qkv_bias, proj_weight, proj_bias, _use_gelu, norm_first, eps, *more = rest
    if src.is_nested:
        raise NotMeasuredError("nested tensors")
    if norm_first:
        norm_weight, norm_bias = more[:2]
        src = F.layer_norm(src.detach(), (embed_dim,), norm_weight.detach(), norm_bias.detach(), eps)
    mask = more[8] if len(more) > 8 else kwargs.get("mask")
    mask_type = more[9] if len(more) > 9 else kwargs.get("mask_type")
    return seen_native(
        src, src, src, embed_dim, num_heads, qkv_weight, qkv_bias, proj_weight, proj_bias, mask, mask_type=mask_type
    )  # fmt: skip
