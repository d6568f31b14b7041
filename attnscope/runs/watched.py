"""What a watched run says of the attention layers and optimizers that were seen; anybody's, so everything is checked."""

import math
from dataclasses import dataclass

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
    layers = []
    for member, fields in _events(run, "attention"):
        layer, n_heads, d_head = (fields.get(key) for key in ("layer", "n_heads", "d_head"))
        scale = fields.get("scale")
        if not (is_whole(layer, 0, 2**15) and is_whole(n_heads, 1, 2**20) and is_whole(d_head, 1, 2**20)):  # fmt: skip
            continue
        good = isinstance(scale, int | float) and not isinstance(scale, bool)
        layers.append(
            AttentionLayer(
                member=member,
                layer=layer,
                name=printable(fields.get("name"), 120),
                n_heads=n_heads,
                d_head=d_head,
                scale=float(scale) if good and math.isfinite(scale) else None,  # type: ignore[arg-type]
                mask=printable(fields.get("mask"), 40),
                dtype=printable(fields.get("dtype"), 40),
                backend=printable(fields.get("backend"), 40),
            )
        )
    return tuple(layers[:MOST_LAYERS])


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
    names_of: dict[str, set[str]] = {}
    for member, fields in _events(run, "optimizer"):
        names_of.setdefault(member, set()).add(printable(fields.get("name"), 60))
    return names_of


def _events(run: Run, kind: str) -> list[tuple[str, dict[str, object]]]:
    events = run.events[run.events["kind"] == kind]
    return [
        ("" if member != member else str(member), fields)
        for member, fields in zip(events["member"].astype(object), events["fields"], strict=True)
    ]
