"""What a watched run says of the attention layers and optimizers that were seen; anybody's, so everything is checked."""

import math
from dataclasses import dataclass

from attnscope.runs.events import AttentionSeen, OptimizerSeen, Unmeasured
from attnscope.runs.foreign import printable
from attnscope.runs.manifest import is_whole
from attnscope.runs.reader import Run

MOST_LAYERS = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionLayer:
    """An attention layer of a watched model.

    Attributes:
        member: name of the member (the rank) that saw it.
        layer: its number in the tables.
        name: path of its module.
        n_heads: query heads.
        d_head: size of a query.
        scale: what multiplied q.k; None where no single number does, or it could not be seen.
        mask: in words.
        dtype: of the queries.
        backend: sdpa, eager, ...
    """

    member: str
    layer: int
    name: str
    n_heads: int
    d_head: int
    scale: float | None
    mask: str
    dtype: str
    backend: str


@dataclass(frozen=True, slots=True, kw_only=True)
class NotMeasured:
    """A kind of attention call that could not be measured, and why."""

    name: str
    backend: str
    reason: str


def attention_layers(run: Run) -> tuple[AttentionLayer, ...]:
    """The attention layers that were seen, in the order in which they were."""
    return tuple(
        AttentionLayer(
            member=member or "",
            layer=seen.layer,
            name=printable(seen.name, 120),
            n_heads=seen.n_heads,
            d_head=seen.d_head,
            scale=seen.scale if seen.scale is not None and math.isfinite(seen.scale) else None,
            mask=printable(seen.mask, 40),
            dtype=printable(seen.dtype, 40),
            backend=printable(seen.backend, 40),
        )
        for _, member, seen in run.happened(AttentionSeen)
        if is_whole(seen.layer, 0, 2**15) and is_whole(seen.n_heads, 1, 2**20) and is_whole(seen.d_head, 1, 2**20)
    )[:MOST_LAYERS]


def not_measured(run: Run) -> tuple[NotMeasured, ...]:
    """Calls that were seen and could not be measured."""
    return tuple(
        NotMeasured(
            name=printable(unmeasured.name, 120),
            backend=printable(unmeasured.backend, 40),
            reason=printable(unmeasured.reason, 200),
        )
        for _, _, unmeasured in run.happened(Unmeasured)
    )


def optimizers_of(run: Run) -> dict[str, set[str]]:
    """Member to the names of its optimizers' classes."""
    names_of: dict[str, set[str]] = {}
    for _, member, optimizer in run.happened(OptimizerSeen):
        names_of.setdefault(member or "", set()).add(printable(optimizer.name, 60))
    return names_of
