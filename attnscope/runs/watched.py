"""What a watched run says of the attention layers and optimizers that were seen; anybody's, so everything is checked."""

import math
from dataclasses import dataclass, replace

from attnscope.runs.foreign import printable
from attnscope.runs.manifest import is_whole
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
        steps: whose targets were looked at; 0 = the run ended before.
        same: how many of them have the targets of the first.
        irregular: whether targets like these are no two batches' by their layout.
        counted: share of the targets that count.
        entropy: of the frequencies of the targets, nats; None where there were too few to tell.
    """

    step: int
    classes: int
    loss: float
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
    found = []
    for member, fields in _events(run, "attention"):
        layer, n_heads, d_head = (fields.get(key) for key in ("layer", "n_heads", "d_head"))
        if not (is_whole(layer, 0, 2**15) and is_whole(n_heads, 1, 2**20) and is_whole(d_head, 1, 2**20)):  # fmt: skip
            continue
        found.append(
            AttentionLayer(
                member=member,
                layer=layer,
                name=printable(fields.get("name"), 120),
                n_heads=n_heads,
                d_head=d_head,
                scale=_finite(fields.get("scale")),
                scale_after=_finite(fields.get("scale_after")),
                mask=printable(fields.get("mask"), 40),
                dtype=printable(fields.get("dtype"), 40),
                backend=printable(fields.get("backend"), 40),
            )
        )
    return tuple(found[:MOST_LAYERS])


def not_measured(run: Run) -> tuple[NotMeasured, ...]:
    """Calls that were seen and could not be measured."""
    return tuple(
        NotMeasured(
            name=printable(fields.get("name"), 120),
            backend=printable(fields.get("backend"), 40),
            reason=printable(fields.get("reason"), 200),
        )
        for _, fields in _events(run, "not_measured")
    )


def optimizers_of(run: Run) -> dict[str, set[str]]:
    """Member to the names of its optimizers' classes."""
    found: dict[str, set[str]] = {}
    for member, fields in _events(run, "optimizer"):
        found.setdefault(member, set()).add(printable(fields.get("name"), 60))
    return found


def dtypes_of(run: Run) -> dict[str, set[str]]:
    """Member to the dtypes of the weights that its optimizers move; members of older runs, which do not say it, are missing."""
    found: dict[str, set[str]] = {}
    for member, fields in _events(run, "optimizer"):
        dtypes = fields.get("dtypes")
        if isinstance(dtypes, list):
            found.setdefault(member, set()).update(printable(dtype, 40) for dtype in dtypes[:MOST_DTYPES])
    return found


def cross_entropies(run: Run) -> dict[str, CrossEntropy]:
    """Member to what its cross-entropy was given first; those are missing of which none with class indices was seen."""
    found: dict[str, CrossEntropy] = {}
    for member, step, fields in _dated_events(run, "cross_entropy"):
        classes, loss = fields.get("classes"), _number(fields.get("loss"))
        if is_whole(classes, 1, 2**31) and loss is not None:
            found.setdefault(member, CrossEntropy(step=step, classes=classes, loss=loss))
    for member, _, fields in _dated_events(run, "targets"):
        steps, same = fields.get("steps"), fields.get("same")
        if member in found and is_whole(steps, 1, 2**31) and is_whole(same, 0, steps):
            found[member] = replace(
                found[member],
                steps=steps,
                same=same,
                irregular=fields.get("irregular") is True,
                counted=_finite(fields.get("counted")) or 0.0,
                entropy=_finite(fields.get("entropy")),
            )
    return found


def _finite(value: object) -> float | None:
    """A finite number; None for anything else."""
    good = isinstance(value, int | float) and not isinstance(value, bool)
    try:
        number = float(value) if good else math.nan  # type: ignore[arg-type]
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _number(value: object) -> float | None:
    """A float, NaN and infinite ones included; None for anything else."""
    return value if isinstance(value, float) else None


def _events(run: Run, kind: str) -> list[tuple[str, dict[str, object]]]:
    return [(member, fields) for member, _, fields in _dated_events(run, kind)]


def _dated_events(run: Run, kind: str) -> list[tuple[str, int, dict[str, object]]]:
    events = run.events[run.events["kind"] == kind]
    return [
        ("" if member != member else str(member), int(step), fields)
        for member, step, fields in zip(events["member"].astype(object), events["step"], events["fields"], strict=True)
    ]
