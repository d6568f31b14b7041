"""What one attention call does: its shapes, its scale, and which keys its queries see.

Shape key: B batch, H head, T query position, S key position, K d_head.
"""

import math
import zlib
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from attnscope.capture.calls import applied_scale, modified_logits, visible_keys
from attnscope.capture.names import n_heads_of
from attnscope.capture.seen import Computed, Modified, Seen, fit_scale, scale_of
from attnscope.check.batch import CallBatch
from attnscope.check.case import Case
from attnscope.check.sight import Direction, direction_of, sight_of
from attnscope.check.soft import Soft, soft_mask

UNIT_WITHIN = 1e-2  # of length 1: q and k were normalized
MOST_LOGITS = 1 << 27  # of a call; of a larger one, so many heads are looked at


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """An attention call.

    Attributes:
        layer: name of the module that made it.
        backend: as `Seen` has it.
        mask: in words, as `Seen` has it.
        dtype: of q.
        n_batch: B.
        n_heads: of q.
        n_kv_heads: of k.
        d_head: of q; 0 where q was not seen.
        said_heads: how many heads the module says it has.
        d_model: width of the module's input.
        n_queries: T.
        n_keys: S.
        scale: what multiplies q kᵀ altogether; None = it could not be seen.
        before: the part of it that q and k were multiplied by before the call; None = it could not be seen.
        is_cosine: q and k have length 1, so that 1/√K is not what scales them.
        rms: of the numbers in q, and in k.
        is_top_left: is_causal was said of a call whose T is not S, so that the first query stands at the first key.
        repeated: how often each key stands on the key axis, one after the other or all after all.
        direction: of self-attention over the positions of the batch; None of any other.
        over_batch: the same, where the axis that is attended over has the sequences of the batch.
        farthest: positions that a query sees ahead.
        soft: a mask that hides nothing; None = there is none.
        is_inverted: of the keys of padded sequences, only those at padding are seen; None = no padding is known of its keys.
        pairs: of a query and a key that it sees.
        pattern: the same for the same pairs.
        keys_sum: a weighted sum of the keys, relative to their length: the same for the same keys, but for rounding.
        rows: queries of all heads and sequences.
        empty_rows: those that see no key.
        empty_real_rows: of them, those at positions that are not padded.
        is_registered: whether the module's parameters that are trained are among those of the model; True where it has none.
    """

    layer: str
    backend: str
    mask: str
    dtype: str
    n_batch: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    said_heads: int | None
    d_model: int | None
    n_queries: int
    n_keys: int
    scale: float | None
    before: float | None
    is_cosine: bool
    rms: tuple[float, float]
    is_top_left: bool
    repeated: int
    direction: Direction | None
    over_batch: Direction | None
    farthest: int
    soft: Soft | None
    is_inverted: bool | None
    pairs: int
    pattern: int
    keys_sum: float
    rows: int
    empty_rows: int
    empty_real_rows: int
    is_registered: bool


def attention_of(case: Case, name: str, module: nn.Module | None, whole: Seen, registered: set[int]) -> Attention:
    """The facts of a call.

    Args:
        case: what is checked.
        name: of the module.
        module: that made the call; None outside of modules.
        whole: the call.
        registered: ids of the model's parameters.
    """
    seen, n_heads = _of_some_heads(whole)
    n_batch, _, n_queries, n_keys = seen.shape
    q, k = seen.q, seen.k
    visible_BHTS = visible_keys(seen)
    empty_BHT = ~visible_BHTS.any(dim=-1)
    batch = case.batch
    real_BT = batch.real_BT
    n_sequences, n_positions = case.grid
    is_over_positions = (n_batch, n_queries) == case.grid
    empty_real = empty_BHT & real_BT[:, None] if is_over_positions else empty_BHT
    direction: Direction | None = None
    over_batch: Direction | None = None
    soft: Soft | None = None
    farthest = 0
    if is_over_positions and n_keys == n_queries:
        pairs_BTS = real_BT[:, :, None] & real_BT[:, None, :]
        direction, farthest = _direction(visible_BHTS, pairs_BTS)
        if direction not in ("causal", "alone") or not real_BT.all():
            soft = soft_mask(seen, visible_BHTS, real_BT)
    elif (n_batch, n_queries, n_keys) == (n_positions, n_sequences, n_sequences):
        everything_BTS = torch.ones_like(visible_BHTS[:, 0])
        over_batch = _direction(visible_BHTS, everything_BTS)[0]
    scale = _scale(seen) if torch.is_grad_enabled() else None
    # What shall not be trained (a teacher) may be held where no optimizer finds it.
    own = [] if module is None else [p for p in module.parameters() if p.requires_grad]
    return Attention(
        layer=name,
        backend=seen.backend,
        mask=seen.mask,
        dtype=str(seen.dtype).removeprefix("torch."),
        n_batch=n_batch,
        n_heads=n_heads,
        n_kv_heads=n_heads if k is None or k.shape[1] == seen.shape[1] else k.shape[1],
        d_head=seen.d_head or 0,
        said_heads=n_heads_of(module),
        d_model=None,
        n_queries=n_queries,
        n_keys=n_keys,
        scale=scale,
        before=None if scale is None else seen.factor,
        is_cosine=q is not None and k is not None and _is_cosine(q, k, seen.factor),
        rms=(math.nan, math.nan) if q is None or k is None else (_rms(q), _rms(k)),
        is_top_left=_is_top_left(seen, n_queries, n_keys),
        repeated=_repeated(k, n_queries) if k is not None and n_keys > n_queries > 1 else 1,
        direction=direction,
        over_batch=over_batch,
        farthest=farthest,
        soft=soft,
        is_inverted=_is_inverted(visible_BHTS, batch),
        pairs=int(visible_BHTS.sum()),
        pattern=zlib.crc32(visible_BHTS.cpu().numpy().tobytes()),
        keys_sum=0.0 if k is None else _sum(k),
        rows=empty_BHT.numel(),
        empty_rows=int(empty_BHT.sum()),
        empty_real_rows=int(empty_real.sum()),
        is_registered=not own or any(id(p) in registered for p in own),
    )


def _of_some_heads(seen: Seen) -> tuple[Seen, int]:
    """The call without most of its heads if it is very large, and how many it has."""
    n_batch, n_heads, n_queries, n_keys = seen.shape
    most = max(MOST_LOGITS // (n_batch * n_queries * n_keys), 1)
    if most >= n_heads:
        return seen, n_heads

    def cut(x: Any) -> Any:
        is_of_heads = isinstance(x, Tensor) and x.dim() == 4 and x.shape[1] == n_heads
        return x[:, :most] if is_of_heads else x

    parts = {field.name: cut(getattr(seen.logits, field.name)) for field in fields(seen.logits)}
    return replace(seen, logits=replace(seen.logits, **parts)), n_heads


def _direction(visible_BHTS: Tensor, pairs_BTS: Tensor) -> tuple[Direction, int]:
    """Of all sequences and heads; "partly" where they differ."""
    sees = (visible_BHTS & pairs_BTS[:, None]).transpose(0, 1)  # heads of one kind share a pattern
    kinds_NBTS = torch.unique(sees, dim=0) if sees.shape[0] > 1 else sees
    sights = [
        sight_of(sees_TS, known_TS)
        for kind_BTS in kinds_NBTS
        for sees_TS, known_TS in zip(kind_BTS, pairs_BTS, strict=True)
    ]
    directions = {direction_of(sight) for sight in sights} - {"alone"} or {"alone"}
    if directions <= {"causal", "blocks"}:  # a prefix of one position is none
        directions = directions if len(directions) == 1 else {"blocks"}
    farthest = max((sight.farthest for sight in sights), default=0)
    return (directions.pop() if len(directions) == 1 else "partly"), farthest


@torch.no_grad()
def _scale(seen: Seen) -> float | None:
    """As `applied_scale`, where a function of the logits has its say, too."""
    if seen.factor is None:
        return None
    logits = seen.logits
    if isinstance(logits, Modified):
        raw, z, visible = modified_logits(logits)
    elif isinstance(logits, Computed) and (product := logits.raw()) is not None:
        applied = applied_scale(seen)
        if applied is not None or seen.shape[-2] != seen.shape[-1]:
            return applied
        # A mask that hides nothing spoils the fit: of the keys before each query it is none.
        raw, z = product, logits.z.float()
        visible = visible_keys(seen).tril()
    else:
        return applied_scale(seen)
    fit = scale_of(tuple(fit_scale(raw, z, visible).tolist()))
    return None if fit is None else fit * seen.factor


def _is_top_left(seen: Seen, n_queries: int, n_keys: int) -> bool:
    """Keys that are all zero are room in a cache, which nobody shall see."""
    if seen.mask != "causal" or seen.backend == "flash-attn" or n_queries == n_keys or seen.k is None:
        return False
    return n_keys < n_queries or bool(seen.k[..., n_queries:, :].any())


def _repeated(keys: Tensor, n_queries: int) -> int:
    """How often each key was repeated along the axis of keys."""
    times, rest = divmod(keys.shape[-2], n_queries)
    if rest or times < 2 or keys.shape[-2] == 0:
        return 1
    neighbours = keys.unflatten(-2, (n_queries, times)).transpose(-3, -2)
    tiled = keys.unflatten(-2, (times, n_queries))
    for x in (neighbours, tiled):  # (B, H, times, T, K)
        if torch.equal(x, x[..., :1, :, :].expand_as(x)) and not torch.equal(x, x[..., :1, :].expand_as(x)):
            return times
    return 1


def _is_inverted(visible_BHTS: Tensor, batch: CallBatch) -> bool | None:
    """Whether padded keys are seen and real ones are not, in all sequences that have both."""
    n_batch, n_keys = visible_BHTS.shape[0], visible_BHTS.shape[-1]
    seen_BS = visible_BHTS.any(dim=2).any(dim=1)
    answers = []
    for given in (batch, batch.source):
        if given is None or given.mask_name is None or given.real_BT.shape != (n_batch, n_keys):
            continue
        real_BS = given.real_BT
        both_B = real_BS.any(dim=1) & ~real_BS.all(dim=1)
        if both_B.any():
            padding_B, real_B = (seen_BS & ~real_BS).any(dim=1), (seen_BS & real_BS).any(dim=1)
            answers.append(bool((padding_B & ~real_B)[both_B].all()))
    return any(answers) if answers else None


def _is_cosine(q: Tensor, k: Tensor, factor: float | None) -> bool:
    """Whether all q and k have length 1 before they are multiplied by `factor`."""
    sizes = [torch.linalg.vector_norm(x.detach().float(), dim=-1) for x in (q, k)]
    if any(x.max() - x.min() > UNIT_WITHIN * x.mean() for x in sizes):
        return False
    product = float(sizes[0].mean() * sizes[1].mean())
    return abs(product / (abs(factor or 1.0) or 1.0) - 1) < UNIT_WITHIN


def _sum(x: Tensor) -> float:
    x = x.detach().double().flatten()
    weights = torch.arange(len(x), dtype=x.dtype, device=x.device).cos()
    return float((x * weights).sum() / torch.linalg.vector_norm(x).clamp(min=1e-30))


def _rms(x: Tensor) -> float:
    return float(x.detach().float().square().mean().sqrt())
