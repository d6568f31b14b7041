"""What happens inside the softmax: statistics of attention logits per head, over query rows.

`z` are the attention logits of one query after scale, soft-cap, bias and mask, `p = softmax(z)`, `n` its visible keys.
Rows with fewer than two visible keys and padded queries are left out and counted. Everything is computed in float32
(float64 stays float64), whatever the dtype of the model, and without gradients.

Shape key: ... any leading axes (member, layer), B batch, H head, T query position, S key position, R sampled query
position, K d_head.
"""

import torch
from torch import Tensor

from attnscope.errors import ShapeError
from attnscope.metrics.rows import AttentionRows, Call, largest_norm, rows_of, sample_rows, wide
from attnscope.metrics.totals import NOTHING, STATISTICS, add, finish, of_no_key, with_bound

__all__ = [
    "STATISTICS",
    "attention_stats",
    "max_attn_logit",
    "statistics_of",
    "statistics_of_all",
    "statistics_of_logits",
    "totals_of",
    "totals_of_all",
    "totals_of_logits",
]

SATURATED_ABOVE = 0.99  # of max_prob
FLAT_BEYOND = 5.0  # logits this far from their row's mean leave the softmax without a gradient

BLOCK_ELEMENTS = 1 << 21  # attention logits held at once


def attention_stats(
    q: Tensor,
    k: Tensor,
    scale: float | Tensor | None = None,
    mask: Tensor | None = None,
    *,
    rows: int | str = "all",
    bias: Tensor | None = None,
    softcap: float = 0.0,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Statistics of softmax(scale q kᵀ) per head, without ever holding all of it.

    Args:
        q: queries, (..., B, H, T, K), any floating dtype.
        k: keys, (..., B, H, S, K); with fewer heads than q (grouped queries) each is shared by neighbours.
        scale: what multiplies q.k; None = 1/√K. A tensor must broadcast to (..., B, H, T, S).
        mask: boolean, True = visible, broadcastable to (..., B, H, T, S); None = everything visible.
        rows: query rows per head to sample, or "all" (exact, O(T) memory).
        bias: added to the logits after scale and soft-cap, broadcastable to (..., B, H, T, S).
        softcap: c of c tanh(z / c); 0 = off.
        seed: of the row sample.

    Returns:
        Column (DESIGN: entropy in nats, entropy_ratio, max_prob, saturated, logit_std, max_logit, max_logit_bound,
        logits_over_5, softmax_gain, sink; rows, rows_left_out) to a tensor of shape (..., H). A head without a
        measurable row has NaN.

    Raises:
        ShapeError: q and k do not fit together, or the mask is not boolean.
    """
    if q.dim() < 4 or k.dim() != q.dim() or q.shape[-1] != k.shape[-1]:
        raise ShapeError(
            f"q is {tuple(q.shape)} and k is {tuple(k.shape)}, but they must be (..., batch, heads, "
            "positions, d_head) with the same d_head."
        )
    if k.shape[:-3] != q.shape[:-3] or q.shape[-3] % k.shape[-3]:
        raise ShapeError(
            f"q is {tuple(q.shape)} and k is {tuple(k.shape)}, but batches must be equal and the heads "
            "of k must divide those of q."
        )
    if mask is not None and mask.dtype != torch.bool:
        raise ShapeError(f"mask is {mask.dtype}, but must be boolean, True = visible. Use bias= for a float mask.")
    if (isinstance(rows, str) and rows != "all") or (not isinstance(rows, str) and rows < 1):
        raise ShapeError(f'rows is {rows!r}, but must be a whole number, at least 1, or "all".')
    if k.shape[-3] != q.shape[-3]:
        k = k.repeat_interleave(q.shape[-3] // k.shape[-3], dim=-3)
    attn_scale = q.shape[-1] ** -0.5 if scale is None else scale
    grid = q.shape[:-1] + k.shape[-2:-1]
    try:
        mask = None if mask is None else mask.expand(grid)
        bias = None if bias is None else bias.expand(grid)
        attn_scale = attn_scale.expand(grid) if isinstance(attn_scale, Tensor) else attn_scale
    except RuntimeError:
        raise ShapeError(f"mask, bias or scale does not broadcast to {tuple(grid)}, the shape of q kᵀ.") from None
    call = Call(
        q=q.detach(),
        k=k.detach(),
        attn_scale=torch.as_tensor(attn_scale, device=q.device).detach(),
        visible=mask,
        bias=None if bias is None else bias.detach(),
        softcap=softcap,
    )
    sample = (
        None
        if isinstance(rows, str)
        else sample_rows(n_batch=q.shape[-4], n_queries=q.shape[-2], rows=rows, seed=seed, device=q.device)
    )
    return statistics_of_all(call) if sample is None else statistics_of(rows_of(call, sample))


def statistics_of(rows: AttentionRows) -> dict[str, Tensor]:
    """Measure rows: column to (..., H)."""
    return finish(totals_of(rows))


def statistics_of_all(call: Call) -> dict[str, Tensor]:
    """Measure every row: column to (..., H). In blocks of rows, so that memory does not grow with T x S."""
    return finish(totals_of_all(call))


def statistics_of_logits(z: Tensor, visible: Tensor, bound: Tensor) -> dict[str, Tensor]:
    """Measure logits that other code computed: column to (H,). The arguments are those of `totals_of_logits`."""
    return finish(totals_of_logits(z, visible, bound))


def totals_of(rows: AttentionRows) -> dict[str, Tensor]:
    """TOTALS of rows to (..., H)."""
    if _is_empty(rows.call):
        return _of_empty(rows.call)
    totals = _totals(_logits(rows.call), rows.call.visible)
    return with_bound(totals, _bound(rows.call, rows.q_norm, rows.k_norm))


def totals_of_all(call: Call) -> dict[str, Tensor]:
    """TOTALS of every row to (..., H), block by block."""
    if _is_empty(call):
        return _of_empty(call)
    n_queries, n_keys = call.q.shape[-2], call.k.shape[-2]
    block = max(1, BLOCK_ELEMENTS // (call.q[..., 0, 0].numel() * n_keys))
    bound = _bound(call, largest_norm(call.q), largest_norm(call.k))
    totals: dict[str, Tensor] = {}
    for start in range(0, n_queries, block):
        positions = slice(start, start + block)

        def cut(x: Tensor, positions: slice = positions) -> Tensor:
            return x[..., positions, :] if x.dim() >= 2 and x.shape[-2] > 1 else x

        part = Call(
            q=cut(call.q),
            k=call.k,
            attn_scale=cut(call.attn_scale),
            visible=None if call.visible is None else cut(call.visible),
            bias=None if call.bias is None else cut(call.bias),
            softcap=call.softcap,
        )
        of_part = with_bound(_totals(_logits(part), part.visible), bound)
        totals = add(totals, of_part) if totals else of_part
    return totals


def totals_of_logits(z: Tensor, visible: Tensor, bound: Tensor) -> dict[str, Tensor]:
    """TOTALS of logits that other code computed to (H,).

    Args:
        z: softmax input, masked, (B, H, R, S).
        visible: True where a query sees a key, like z.
        bound: to record as max_logit_bound, (H,).
    """
    if not z.numel():
        n_batch, n_heads, n_queries, _ = z.shape
        return of_no_key(torch.Size([n_heads]), n_batch * n_queries, z.new_empty(0, dtype=wide(z.dtype)))
    numbers = z.to(wide(z.dtype)).where(visible, 0.0)  # what is hidden adds 0 times a number
    return with_bound(_totals(numbers, visible), bound)


def max_attn_logit(call: Call) -> Tensor:
    """Largest visible attention logit per head over all rows, exactly, (..., H): what QK-Clip acts on (Kimi K2)."""
    z = _logits(call)
    if call.visible is not None:
        z = z.masked_fill(~call.visible, float("-inf"))
    return z.amax(dim=(-4, -2, -1))


def _is_empty(call: Call) -> bool:
    return 0 in (*call.q.shape[-4:-1], call.k.shape[-2])


def _of_empty(call: Call) -> dict[str, Tensor]:
    *shape, n_batch, n_heads, n_queries, _ = call.q.shape
    like = call.q.new_empty(0, dtype=wide(call.q.dtype))
    return of_no_key(torch.Size([*shape, n_heads]), n_batch * n_queries, like)


def _logits(call: Call) -> Tensor:
    """Softmax input, not yet masked, (..., B, H, T, S)."""
    dtype = wide(call.q.dtype)
    z = call.q.to(dtype) @ call.k.to(dtype).mT * call.attn_scale
    if call.softcap:
        z = call.softcap * torch.tanh(z / call.softcap)
    return z if call.bias is None else z + call.bias


def _bound(call: Call, q_norm: Tensor, k_norm: Tensor) -> Tensor:
    """Upper bound scale max‖q‖ max‖k‖, soft-capped and with the largest bias on top (Cauchy-Schwarz), (..., H)."""
    scale = call.attn_scale.abs()
    bound = (scale.amax(dim=(-4, -2, -1)) if scale.dim() else scale) * q_norm * k_norm
    if call.softcap:
        bound = bound.clamp(max=call.softcap)
    if call.bias is not None:
        bound = bound + call.bias.amax(dim=(-2, -1) if call.bias.dim() == 3 else (-4, -2, -1))
    return bound


def _totals(z: Tensor, visible: Tensor | None) -> dict[str, Tensor]:
    """Sums over the rows of a block, (..., H), from logits z (..., B, H, R, S)."""
    if visible is None:
        seen, n = z, torch.full((), z.shape[-1], dtype=z.dtype, device=z.device)
    else:
        # As numbers, 1 and 0, masks multiply and add; masked_fill with a broadcast mask is several times slower.
        weight = visible.expand(*visible.shape[:-1], z.shape[-1]).to(z.dtype)
        seen = z + weight.log()
        n = weight.sum(dim=-1)
    p = seen.softmax(dim=-1)
    max_prob = p.amax(dim=-1)
    max_logit = seen.amax(dim=-1)
    # entropy = lse - Σ p z, where lse = max z - ln max p; from the largest logit on, as large ones would cancel to noise.
    below = z - max_logit[..., None]
    entropy = -max_prob.log() - torch.linalg.vecdot(p, below)
    if visible is None:
        deviation = below.sub_((below.sum(dim=-1) / n)[..., None])
        sink = p[..., 0]
    else:
        deviation = below.sub_((torch.linalg.vecdot(below, weight) / n)[..., None]).mul_(weight)
        first = weight.argmax(dim=-1, keepdim=True)
        sink = p.gather(-1, first.expand(*p.shape[:-1], 1)).squeeze(-1)
    square = deviation.square_()
    per_row = {
        "entropy": entropy,
        "entropy_ratio": entropy / n.log(),
        "max_prob": max_prob,
        "saturated": max_prob > SATURATED_ABOVE,
        "logit_std": square.sum(dim=-1) / n,
        "logits_over_5": square.gt_(FLAT_BEYOND**2).sum(dim=-1),  # the sum of booleans is slow
        "softmax_gain": 1 - torch.linalg.vector_norm(p, dim=-1).square(),
        "sink": sink,
        "visible": n,
        "rows": n >= 2,
    }
    counted = (n >= 2).expand(max_prob.shape)
    columns = torch.stack([value.to(z.dtype).expand(max_prob.shape) for value in per_row.values()])
    sums = columns.where(counted, 0).sum(dim=(-3, -1))
    totals = dict(zip(per_row, sums, strict=True))
    totals["max_logit"] = max_logit.where(counted, NOTHING).amax(dim=(-3, -1))
    totals["rows_left_out"] = counted.shape[-3] * counted.shape[-1] - totals["rows"]
    return totals
