"""What a watched run says of the attention layers and optimizers that were seen; anybody's, so everything is checked."""

import math
from dataclasses import dataclass, replace

from attnscope.runs.events import AttentionSeen, OptimizerSeen, Unmeasured
from attnscope.runs.foreign import printable
from attnscope.runs.manifest import is_whole
from attnscope.runs.probe_events import CrossEntropySeen, FirstTargets
from attnscope.runs.reader import Run

MOST_LAYERS = 10_000
MOST_DTYPES = 20


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
        scale_after: what of it multiplied the product, and not q or k before; None as for scale, and in older runs.
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
    scale_after: float | None
    mask: str
    dtype: str
    backend: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CrossEntropy:
    """What a watched script's cross-entropy was given at its first steps.

    Attributes:
        step: of the first call.
        classes: the axis that the softmax runs over.
        loss: mean cross-entropy of the first call, nats per target, whatever the script makes of it; NaN = not a number.
        targets: of that call that count; None in older runs.
        steps: whose targets were looked at; 0 = the run ended before.
        same: how many of them have the targets of the first.
        irregular: whether targets like these are no two batches' by their layout.
        counted: share of the targets that count.
        entropy: of the frequencies of the targets, nats; None where there were too few to tell.
    """

    step: int
    classes: int
    loss: float
    targets: int | None = None
    steps: int = 0
    same: int = 0
    irregular: bool = False
    counted: float = 0.0
    entropy: float | None = None


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
            scale_after=seen.scale_after if seen.scale_after is not None and math.isfinite(seen.scale_after) else None,
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


def dtypes_of(run: Run) -> dict[str, set[str]]:
    """Member to the dtypes of the weights that its optimizers move; members of older runs, which do not say it, are missing."""
    dtypes: dict[str, set[str]] = {}
    for _, member, optimizer in run.happened(OptimizerSeen):
        if optimizer.dtypes:
            dtypes.setdefault(member or "", set()).update(
                printable(dtype, 40) for dtype in optimizer.dtypes[:MOST_DTYPES]
            )
    return dtypes


def cross_entropies(run: Run) -> dict[str, CrossEntropy]:
    """Member to what its cross-entropy was given first; those are missing of which none with class indices was seen."""
    seen: dict[str, CrossEntropy] = {}
    for step, member, first in run.happened(CrossEntropySeen):
        if is_whole(first.classes, 1, 2**31):
            counted = first.targets if is_whole(first.targets, 0, 2**53) else None
            call = CrossEntropy(step=step, classes=first.classes, loss=first.loss, targets=counted)
            seen.setdefault(member or "", call)
    for _, member, targets in run.happened(FirstTargets):
        name = member or ""
        if name in seen and is_whole(targets.steps, 1, 2**31) and is_whole(targets.same, 0, targets.steps):
            entropy = targets.entropy
            seen[name] = replace(
                seen[name],
                steps=targets.steps,
                same=targets.same,
                irregular=targets.irregular,
                counted=targets.counted if math.isfinite(targets.counted) else 0.0,
                entropy=entropy if entropy is not None and math.isfinite(entropy) else None,
            )
    return seen
