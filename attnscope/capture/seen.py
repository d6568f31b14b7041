"""One attention call in foreign code, brought into the form that the metrics take, and measured.

Shape key: B batch, H head, T query position, S key position, R sampled query position, K d_head, C column.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from math import inf, nan
from typing import Any, TypeGuard

import torch
from torch import Tensor

from attnscope.metrics.attention import totals_of, totals_of_all, totals_of_logits
from attnscope.metrics.rows import Call, Rows, largest_norm, rows_of, sample_rows, wide
from attnscope.metrics.totals import HEAD_COLUMNS, TOTALS, finish

# A float mask hides a key by -inf, by the smallest number of its dtype, or by something like -1e4 or -1e9.
HIDDEN_BELOW = -9e3
# Or by a smaller number (-100 in Swin transformers), if float32 has no exponential of it and none stands between it and those
# of other keys: a bias that grows with distance (ALiBi) hides nothing.
VANISHES_BELOW = math.log(torch.finfo(torch.float32).tiny)
BETWEEN = (0.75, 0.25)  # of the lowest number
NEAR_TOP = 50.0  # logits so far below the largest one of their row tell the scale
FIT_WITHIN = 0.02  # of the logits' size: a scale explains them

# How a scalar stands in the autograd graph, and what may stand between it and the product.
_VIEWS = (
    "View", "UnsafeView", "ReshapeAlias", "Transpose", "Permute", "T", "Expand", "Unsqueeze", "Squeeze", "Clone", "ToCopy",
    "Contiguous", "Alias",
)  # fmt: skip
_DEPTH = 24

# From scale q kᵀ of some rows, (B, H, R, S), and the sequences, heads and query positions they are of, to their logits and
# to which keys they see, broadcastable to the same; None = everything.
Modify = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]]


class NotMeasuredError(Exception):
    """A call that cannot be measured; says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaled:
    """Logits that a call computes itself: scale q kᵀ + bias, where keys are visible.

    Attributes:
        q: (B, H, T, K).
        k: (B, H, S, K).
        scale: what the call multiplies q kᵀ by.
        visible: boolean, broadcastable to (B, H, T, S); None = everything.
        bias: added to the scaled logits, broadcastable to the same; None = nothing.
    """

    q: Tensor
    k: Tensor
    scale: float
    visible: Tensor | None = None
    bias: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Modified:
    """Logits that a function of positions makes of scale q kᵀ.

    Attributes:
        q: (B, H, T, K).
        k: (B, H, S, K).
        scale: what the call multiplies q kᵀ by.
        modify: the function, which decides on masks, too.
        most: no logit after it is larger than this, nor than scale ‖q‖ ‖k‖; NaN = that is not known.
    """

    q: Tensor
    k: Tensor
    scale: float
    modify: Modify
    most: float = inf


@dataclass(frozen=True, slots=True, kw_only=True)
class Computed:
    """Logits that the code computed before its softmax, masked and scaled, or not.

    Attributes:
        z: (B, H, T, S).
        q: (B, H, T, K); None where the product q kᵀ was not seen.
        k: (B, H, S, K); None with q.
    """

    z: Tensor
    q: Tensor | None = None
    k: Tensor | None = None

    def raw(self) -> Tensor | None:
        """Q kᵀ in float32, (B, H, T, S)."""
        return None if self.q is None or self.k is None else self.q.float() @ self.k.float().mT


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """An attention call.

    Attributes:
        logits: what its softmax was given, or is.
        factor: what q and k were multiplied by before, q (scale) kᵀ; None where it cannot be seen.
        mask: in a word or a few.
        backend: sdpa, eager, fast path, flex, flash-attn, xformers, compiled sdpa, compiled eager, compiled flex.
    """

    logits: Scaled | Modified | Computed
    factor: float | None
    mask: str
    backend: str

    @property
    def q(self) -> Tensor | None:
        """(B, H, T, K); None where it was not seen."""
        return self.logits.q

    @property
    def k(self) -> Tensor | None:
        """(B, H, S, K); None where it was not seen."""
        return self.logits.k

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """B, H, T, S."""
        if isinstance(self.logits, Computed):
            n_batch, n_heads, n_queries, n_keys = self.logits.z.shape
        else:
            n_batch, n_heads, n_queries, _ = self.logits.q.shape
            n_keys = self.logits.k.shape[-2]
        return n_batch, n_heads, n_queries, n_keys

    @property
    def d_head(self) -> int | None:
        """K; None where q was not seen."""
        return None if self.logits.q is None else self.logits.q.shape[-1]

    @property
    def dtype(self) -> torch.dtype:
        """Of the queries, or of the logits where those were not seen."""
        return (self.logits.z if isinstance(self.logits, Computed) and self.logits.q is None else self.logits.q).dtype  # type: ignore[union-attr]

    @property
    def scale(self) -> float | None:
        """What the call multiplies q kᵀ by; None where the logits must tell."""
        return None if isinstance(self.logits, Computed) else self.logits.scale


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What the record keeps of a call.

    Attributes:
        totals: TOTALS to (H,), which other calls of the layer may be added to.
        fit: of a call that computed logits: the scale that explains them best and what it leaves unexplained, twice
            (`fit_scale`); else None.
    """

    totals: dict[str, Tensor]
    fit: Tensor | None

    @property
    def columns_CH(self) -> Tensor:
        """HEAD_COLUMNS of the heads table, for this call alone."""
        found = finish(self.totals)
        return torch.stack([found[name].float() for name in HEAD_COLUMNS])


@torch.no_grad()
def measure(seen: Seen, *, rows: int | str, seed: int) -> Measured:
    """Statistics of a call over sampled rows or all of them, in float32 whatever autocast says."""
    n_batch, _, n_queries, _ = seen.shape
    logits = seen.logits
    device = logits.z.device if isinstance(logits, Computed) else logits.q.device
    sample = None
    if not isinstance(rows, str):
        sample = sample_rows(n_batch=n_batch, n_queries=n_queries, rows=rows, seed=seed, device=device)
    with torch.autocast(device.type, enabled=False):
        match logits:
            case Scaled():
                return Measured(totals=_totals_scaled(logits, sample), fit=None)
            case Modified():
                return Measured(totals=_totals_modified(logits, sample), fit=None)
            case Computed():
                return _measure_computed(logits, sample)


def _totals_scaled(logits: Scaled, sample: Rows | None) -> dict[str, Tensor]:
    call = Call(
        q=logits.q.detach(),
        k=logits.k.detach(),
        attn_scale=torch.tensor(logits.scale, device=logits.q.device),
        visible=logits.visible,
        bias=None if logits.bias is None else logits.bias.detach(),
        softcap=0.0,
    )
    return totals_of_all(call) if sample is None else totals_of(rows_of(call, sample))


def _totals_modified(logits: Modified, sample: Rows | None) -> dict[str, Tensor]:
    """Only the logits of sampled rows exist at once; where all rows are asked for, those of one head."""
    q, k = logits.q.detach(), logits.k.detach()
    n_batch, n_heads, n_queries, _ = q.shape
    b, h, i = (torch.arange(n, device=q.device) for n in (n_batch, n_heads, n_queries))
    bound = abs(logits.scale) * largest_norm(q) * largest_norm(k)
    bound = torch.minimum(bound, torch.full_like(bound, logits.most))
    parts = [slice(n, n + 1) for n in range(n_heads)]
    if sample is not None:
        scale = torch.ones((), device=q.device)
        call = Call(q=q, k=k, attn_scale=scale, visible=None, bias=None, softcap=0.0)
        cut = rows_of(call, sample).call
        q, k, b, i = cut.q, cut.k, b[sample.sequences], i[sample.positions]
        parts = [slice(None)]
    dtype = wide(q.dtype)
    found = []
    for part in parts:
        raw = q[:, part].to(dtype) @ k[:, part].to(dtype).mT * logits.scale
        z, visible = logits.modify(raw, b, h[part], i)
        if visible is None:
            visible = torch.ones(1, dtype=torch.bool, device=z.device)
        found.append(totals_of_logits(z, visible.expand(z.shape), bound[part]))
    return {name: torch.cat([each[name] for each in found]) for name in TOTALS}


def _measure_computed(logits: Computed, sample: Rows | None) -> Measured:
    whole = logits.z.detach()
    nothing = whole.new_zeros(*whole.shape[:-1], 1)
    q = nothing if logits.q is None else logits.q.detach()
    k = nothing if logits.k is None else logits.k.detach()
    one = torch.ones((), device=whole.device)
    # Logits are cut like a bias.
    call = Call(q=q, k=k, attn_scale=one, visible=None, bias=whole, softcap=0.0)
    q_norm, k_norm = largest_norm(q), largest_norm(k)
    if sample is not None:
        call = rows_of(call, sample).call
    assert call.bias is not None
    z, fit = call.bias.float(), None
    bound = torch.full_like(q_norm, nan)
    raw = None if logits.q is None else call.q.float() @ call.k.float().mT
    visible = visible_logits(z, raw)
    if raw is not None:
        fit = fit_scale(raw, z, visible)
        bound = (fit[0].abs() * q_norm * k_norm).where(fit[1] < FIT_WITHIN, bound)
    return Measured(totals=totals_of_logits(z, visible, bound), fit=fit)


def visible_logits(z: Tensor, raw: Tensor | None) -> Tensor:
    """Which logits are not masked, like z (..., H, T, S): hidden is what q kᵀ does not explain and is far below zero.

    Large logits may be below any fixed number: where `raw`, q kᵀ, is not known, only HIDDEN_BELOW can tell.
    """
    finite = z > float("-inf")
    if raw is None:
        return z > HIDDEN_BELOW
    # A factor of its own for each head, from what is surely visible.
    top = finite & (z > z.amax(dim=-1, keepdim=True) - NEAR_TOP)
    over = (-4, -2, -1) if z.dim() >= 4 else (-2, -1)
    raw_top, z_top = raw.where(top, 0.0), z.where(top, 0.0)
    factor = (raw_top * z_top).sum(over, keepdim=True) / raw_top.square().sum(over, keepdim=True)
    return finite & visible_under(z - factor.nan_to_num(0.0, 0.0, 0.0) * raw)


def visible_under(added: Tensor) -> Tensor:
    """Which keys are visible under what was added to their logits, a mask and perhaps a bias."""
    visible = added > HIDDEN_BELOW
    lowest = added.where(visible, 0.0).amin()
    near, far = (share * lowest for share in BETWEEN)
    is_mask = (lowest < VANISHES_BELOW) & ~(visible & (added > near) & (added < far)).any()
    return visible & ~(is_mask & (added <= near))


def fit_scale(raw: Tensor, z: Tensor, visible: Tensor) -> Tensor:
    """The factor between q kᵀ and the logits by least squares, and the share of z that it leaves unexplained, twice: (4,).

    The second time from differences between sequences, in which a bias that all share (ALiBi, T5) cancels; NaN where there
    is only one sequence.
    """
    found = [*_least_squares(raw, z, visible)]
    if len(raw) > 1:
        both = visible[1:] & visible[:-1]
        found += _least_squares(raw[1:] - raw[:-1], z[1:] - z[:-1], both)
    else:
        found += [torch.full_like(found[0], float("nan"))] * 2
    return torch.stack(found)


def scale_of(fit: tuple[float, ...]) -> float | None:
    """The scale that a fit names; None where none explains the logits (a soft-cap, a bias of its own for each sequence)."""
    plain, unexplained, across, unexplained_across = fit
    if unexplained < FIT_WITHIN:
        return plain
    return across if unexplained_across < FIT_WITHIN else None


def split_mask(mask: Tensor) -> tuple[Tensor | None, Tensor | None, str]:
    """Which keys are visible, what is added to their logits, and the mask in words."""
    if mask.dtype == torch.bool:
        return mask, None, "boolean"
    wide_mask = mask.detach().float()
    if mask.dim() == 2:  # the bound wants to know which axis is of heads
        wide_mask = wide_mask[None, None]
    visible = visible_under(wide_mask)
    return visible, wide_mask.where(visible, 0.0), "float"


def factor_of_both(q: Tensor, k: Tensor) -> float | None:
    """What q and k were multiplied by before the call; None where it cannot be seen."""
    before = scalar_factor(q), scalar_factor(k)
    return None if before[0] is None or before[1] is None else before[0] * before[1]


def scalar_factor(x: Tensor) -> float | None:
    """The number that `x` was last multiplied by, through views; 1 where there is none, None where it cannot be seen.

    Read from the autograd graph, without unpacking anything that checkpointing would have to compute again.
    """
    is_packed = torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
    node, factor = x.grad_fn, 1.0
    for _ in range(_DEPTH):
        if node is None:
            break
        kind = node.name().removesuffix("0").removesuffix("Backward")
        if kind in ("Mul", "Div"):
            if is_packed:
                return None
            step = _factor_of(node, kind)
            if step is None:
                break
            if math.isnan(step[1]):
                return None
            node, factor = step[0], factor * step[1]
        elif kind in _VIEWS:
            node = node.next_functions[0][0]
        else:
            break
    return factor


def _factor_of(node: Any, kind: str) -> tuple[Any, float] | None:
    """Where a product or quotient with a number came from, and the number; NaN = one that is learned or on a device.

    None where both sides are tensors of more numbers: weights of a norm, a rotation, a gate.
    """
    inputs = [each for each, _ in node.next_functions]
    if len(inputs) != 2:
        return None
    sides = ("_saved_other", "_saved_self") if kind == "Mul" else ("_saved_other",)
    for at, name in enumerate(sides):
        try:
            other = getattr(node, name, None)
        except RuntimeError:  # changed in place since
            return None
        if _is_number(other):
            number = float(other)
            return inputs[at], number if kind == "Mul" else 1 / number
        if isinstance(other, Tensor) and _is_temperature(other, node):
            return inputs[at], math.nan
    return None


def _is_temperature(x: Tensor, node: Any) -> bool:
    """Whether many queries or keys have all their numbers multiplied by the same one; a norm has one for each of them."""
    whole = node._input_metadata[0].shape
    n_rows = math.prod(whole[:-1])
    return (x.dim() == 0 or x.shape[-1] == 1) and (x.numel() < n_rows or n_rows == 1)


def _is_number(x: object) -> TypeGuard[float | Tensor]:
    """A Python number as autograd keeps it: without axes, on the host."""
    return isinstance(x, int | float) or (isinstance(x, Tensor) and x.dim() == 0 and x.device.type == "cpu")


def _least_squares(raw: Tensor, z: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    raw, z = raw.where(visible, 0.0), z.where(visible, 0.0)
    factor = (raw * z).sum() / raw.square().sum()
    rest = torch.linalg.vector_norm(z - factor * raw) / torch.linalg.vector_norm(z)
    return factor, rest
