"""Which query rows of attention are looked at, and where they wait until they are measured.

Shape key: ... any leading axes (member, layer), B batch, H head, T query position, S key position, R sampled query
position, K d_head, M member, N calls of one shape.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

# Attention logits measured together: as many as the cache holds, twice as fast as a whole block of steps.
LOGITS_AT_ONCE = 1 << 18
SAMPLES = 64  # different row samples, used in turn
PIECE_BYTES = 32 << 20  # of queries, keys and norms that wait together, where few rows of large batches are looked at


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Which query rows to look at: every combination of these sequences and positions.

    At equal distances they are slices, which costs less than int64 indices.
    """

    sequences: slice | Tensor
    positions: slice | Tensor


@lru_cache(maxsize=256)
def sample_rows(*, n_batch: int, n_queries: int, rows: int, seed: int, device: torch.device) -> Rows | None:
    """Draw about `rows` query rows per head from at most 4 sequences; None where that would be all of them.

    Sequences are equally likely, and so are positions (where they cannot stand at equal distances, all but the first,
    which under a causal mask sees one key and has no softmax to speak of). The generator is the draw's own: training
    numbers do not change.
    """
    if rows >= n_batch * (n_queries - 1) or n_queries < 2:
        return None
    generator = random.Random(seed)

    def draw(size: int, wanted: int, first: int) -> slice | Tensor:
        distance, rest = divmod(size, wanted)
        if rest == 0:
            return slice(generator.randrange(distance), None, distance)
        return torch.tensor(generator.sample(range(first, size), wanted)).to(device, non_blocking=True)

    n_sequences = min(n_batch, 4, rows)
    n_positions = min(-(-rows // n_sequences), n_queries - 1)
    return Rows(sequences=draw(n_batch, n_sequences, 0), positions=draw(n_queries, n_positions, 1))


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One attention call: what decides its weights. All but q and k broadcast to (..., B, H, T, S).

    Attributes:
        q: (..., B, H, T, K).
        k: (..., B, H, S, K).
        attn_scale: what multiplies q.k.
        visible: True = visible; None = everything.
        bias: added after scale and soft-cap; None = nothing.
        softcap: c of c tanh(z / c); 0 = off.
    """

    q: Tensor
    k: Tensor
    attn_scale: Tensor
    visible: Tensor | None
    bias: Tensor | None
    softcap: float


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionRows:
    """Some query rows of an attention call, and what is known of all its rows.

    Attributes:
        call: with the chosen rows only: q (..., B, H, R, K).
        q_norm: max‖q‖ over all rows, (..., H).
        k_norm: max‖k‖ over all keys, (..., H).
    """

    call: Call
    q_norm: Tensor
    k_norm: Tensor


def rows_of(call: Call, sample: Rows) -> AttentionRows:
    """Cut the sampled rows out of a call, to be measured later."""
    # Views would keep all of q and k.
    q = _pick(call.q, sample).contiguous()
    k = _pick(call.k, sample, positions=False).contiguous()
    return AttentionRows(call=_cut(call, sample, q=q, k=k), q_norm=largest_norm(call.q), k_norm=largest_norm(call.k))


class Shelf:
    """Rows of many calls of one shape, in the order in which they came, until a block of steps is measured.

    They are copied side by side, in pieces of LOGITS_AT_ONCE, so that nothing has to be gathered; the memory is used
    again after `clear`.
    """

    def __init__(self) -> None:
        self._pieces: list[_ShelfRows] = []
        self._slots: list[_ShelfRows] = []  # one per call that the pieces have room for
        self._calls: list[Call] = []
        self._shapes: tuple[torch.Size, ...] = ()

    @property
    def nbytes(self) -> int:
        """Of the queries, keys and norms that wait."""
        return len(self._calls) * sum(x.nbytes for x in self._slots[0]) if self._calls else 0

    def put(self, call: Call, sample: Rows) -> None:
        """Copy the sampled rows of one more call.

        Args:
            call: with q (M, B, H, T, K), attn_scale (M, 1, 1 or H, 1, 1) and visible (T, S), (B or 1, 1, T, S) or None;
                the same soft-cap and bias, (H, T, S) or None, as the calls before.
            sample: as many rows as of the calls before.
        """
        q, k = _pick(call.q, sample), _pick(call.k, sample, positions=False)
        shapes = (call.q.shape, call.k.shape, q.shape)
        if not self._calls and shapes != self._shapes:
            self._pieces.clear()
            self._slots.clear()
            self._shapes = shapes
        if len(self._calls) == len(self._slots):
            self._make_room(call, q, k)
        at = self._slots[len(self._calls)]
        for x, norm in ((call.q, at.q_norm), (call.k, at.k_norm)):
            torch.linalg.vector_norm(x, dim=-1, dtype=norm.dtype, out=norm)
        self._calls.append(_cut(call, sample, q=at.q.copy_(q), k=at.k.copy_(k)))

    def _make_room(self, call: Call, q: Tensor, k: Tensor) -> None:
        """One more piece, for calls like this one, of which q and k are kept."""
        norms = (x.new_empty(x.shape[:-1], dtype=wide(x.dtype)) for x in (call.q, call.k))
        one = _ShelfRows(q, k, *norms)
        n_logits, n_bytes = q[..., 0].numel() * k.shape[-2], sum(x.nbytes for x in one)
        self._at_once = max(1, min(LOGITS_AT_ONCE // n_logits, PIECE_BYTES // n_bytes))
        piece = _ShelfRows(*(x.new_empty(self._at_once, *x.shape) for x in one))
        self._pieces.append(piece)
        self._slots += map(_ShelfRows._make, zip(*(x.unbind() for x in piece), strict=True))

    def pieces(self, n_calls: int) -> Iterator[AttentionRows]:
        """Rows of the first `n_calls` calls, a piece at a time, calls along a new first axis N."""
        for number, piece in enumerate(self._pieces):
            calls = self._calls[number * self._at_once : n_calls][: self._at_once]
            if calls:
                q, k, *norms = (x[: len(calls)] for x in piece)
                q_norm, k_norm = (norm.amax(dim=(-3, -1)) for norm in norms)
                yield AttentionRows(call=_stack(calls, q=q, k=k), q_norm=q_norm, k_norm=k_norm)

    def clear(self) -> None:
        """Forget the rows, not their memory."""
        self._calls.clear()


class _ShelfRows(NamedTuple):
    """Sampled queries and keys, norms of all queries and keys: of one call, or of many along a first axis N."""

    q: Tensor
    k: Tensor
    q_norm: Tensor
    k_norm: Tensor


def _cut(call: Call, sample: Rows, *, q: Tensor, k: Tensor) -> Call:
    """The sampled rows of a call whose q and k are already cut."""
    return Call(
        q=q,
        k=k,
        attn_scale=_pick(call.attn_scale, sample),
        visible=None if call.visible is None else _pick(call.visible, sample),
        bias=None if call.bias is None else _pick(call.bias, sample),
        softcap=call.softcap,
    )


def _stack(calls: Sequence[Call], *, q: Tensor, k: Tensor) -> Call:
    """One call out of many whose q and k already stand side by side."""
    masks = [call.visible for call in calls if call.visible is not None]
    visible = None
    if masks:
        shape = torch.broadcast_shapes((1, 1, 1, 1, 1), *{mask.shape for mask in masks})
        everything = torch.ones((), dtype=torch.bool, device=masks[0].device)
        visible = torch.stack([(everything if call.visible is None else call.visible).expand(shape) for call in calls])
    biases = [call.bias[None, None] for call in calls if call.bias is not None]
    return Call(
        q=q,
        k=k,
        attn_scale=torch.stack([call.attn_scale for call in calls]),
        visible=visible,
        bias=torch.stack(biases) if biases else None,
        softcap=calls[0].softcap,
    )


def largest_norm(x: Tensor) -> Tensor:
    """max‖x‖ over batch and positions, (..., H)."""
    return torch.linalg.vector_norm(x, dim=-1, dtype=wide(x.dtype)).amax(dim=(-3, -1))


def _pick(x: Tensor, sample: Rows, *, positions: bool = True) -> Tensor:
    """Sampled sequences (axis -4) and positions (axis -2); an axis that is absent or broadcast is left alone."""
    if x.dim() >= 4 and x.shape[-4] > 1:
        x = x[..., sample.sequences, :, :, :]
    if positions and x.dim() >= 2 and x.shape[-2] > 1:
        at = sample.positions
        x = x[..., at, :] if isinstance(at, slice) else x.index_select(-2, at)
    return x


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which logits are computed: float32, or float64 where the model has it."""
    return dtype if dtype == torch.float64 else torch.float32
