"""What a watched run says of its probes: what was looked at once, in the first steps; anybody's, so everything is checked."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from attnscope.runs.foreign import printable
from attnscope.runs.manifest import is_whole
from attnscope.runs.reader import Run

OFFSETS = (-1, 0, 1, 2)  # between a position and the token that it has to predict
MOST_COUNT = 2**53
MOST_NAMES = 10
MOST_SAID = 10_000  # events of a kind

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sight:
    """Which keys the queries of an attention layer see.

    Attributes:
        member: who saw it.
        step: of the first look.
        layer: its number in the tables.
        queries: T.
        keys: S.
        later: mean share of attention on keys after the query; None where T is not S.
        later_rows: share of query rows that see such a key.
        padded: mean share of attention of real queries on padding; None where none is known.
        inverted_rows: share of rows with a mask that see one token alone, while others are hidden from them.
    """

    member: str
    step: int
    layer: int
    queries: int
    keys: int
    later: float | None
    later_rows: float | None
    padded: float | None
    inverted_rows: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class EmptyRows:
    """Query rows that see no key, where a layer had them first."""

    member: str
    step: int
    layer: int
    rows: int
    of: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """How the targets of a cross-entropy stand to the tokens that the model was given.

    Attributes:
        member: who saw it.
        step: of it.
        positions: of a sequence; 0 = the targets fit none.
        compared: targets that count.
        equal: by OFFSETS, the share of targets that are the token so far on.
        sequences: of tokens that the model was given; 0 = none was seen.
    """

    member: str
    step: int
    positions: int
    compared: int
    equal: Mapping[int, float]
    sequences: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Some:
    """How many parameters, and the names of the first."""

    count: int
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Upkeep:
    """What an optimizer did besides its updates.

    Attributes:
        member: who saw it.
        step: up to which.
        number: of the optimizer.
        optimizer: its class.
        updates: of it.
        steps_without_gradient: its steps after a loss, at which no parameter of it had a gradient.
        zeroed: whether its gradients had been thrown away before one of those.
        compared: updates before whose backward passes gradients were looked at.
        gradients_kept: those at which none of these passes began with gradients of zero.
        parameters: that it has.
        detached: its parameters that modules compute with, and that never had a gradient.
        unused: the others that never had one.
        lr_zero: its parameters that had gradients, and a learning rate of 0 at every update.
    """

    member: str
    step: int
    number: int
    optimizer: str
    updates: int
    steps_without_gradient: int
    zeroed: bool
    compared: int
    gradients_kept: int
    parameters: int
    detached: Some
    unused: Some
    lr_zero: Some


@dataclass(frozen=True, slots=True, kw_only=True)
class WithoutOptimizer:
    """Parameters that had gradients, and that no optimizer has.

    Attributes:
        member: who saw it.
        step: up to which.
        some: of them.
        left_out: how many are registered in a model that an optimizer has other parameters of.
        share: of the numbers of that model's parameters.
        hidden: attribute of such a model, a Python container of modules, to how many stand there.
    """

    member: str
    step: int
    some: Some
    left_out: int
    share: float
    hidden: Mapping[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Mode:
    """A model in a mode that does not fit what is done with it.

    Attributes:
        member: who saw it.
        step: at which.
        model: its class.
        dropouts: modules of it that drop something.
        batch_norms: modules of it that take statistics of the batch in training; 0 where nobody looked.
        has_trained: whether it was in training before.
        dropout: largest share that is dropped; NaN where nobody looked.
    """

    member: str
    step: int
    model: str
    dropouts: int
    batch_norms: int
    has_trained: bool
    dropout: float


def sights(run: Run) -> tuple[Sight, ...]:
    """Of each attention layer that was looked at."""
    return _read(
        run,
        "sight",
        lambda member, step, fields: Sight(
            member=member,
            step=step,
            layer=_count(fields, "layer"),
            queries=_count(fields, "queries"),
            keys=_count(fields, "keys"),
            later=_share(fields.get("later")),
            later_rows=_share(fields.get("later_rows")),
            padded=_share(fields.get("padded")),
            inverted_rows=_share(fields.get("inverted_rows")),
        ),
    )


def empty_rows(run: Run) -> tuple[EmptyRows, ...]:
    """Of each attention layer that had query rows without a key."""
    return _read(
        run,
        "rows_without_keys",
        lambda member, step, fields: EmptyRows(
            member=member,
            step=step,
            layer=_count(fields, "layer"),
            rows=_count(fields, "rows"),
            of=_count(fields, "of"),
        ),
    )


def targets_of(run: Run) -> tuple[Targets, ...]:
    """Of each cross-entropy that was looked at."""
    return _read(
        run,
        "targets",
        lambda member, step, fields: Targets(
            member=member,
            step=step,
            positions=_count(fields, "positions"),
            compared=_count(fields, "compared"),
            equal={at: _share(_mapping(fields.get("equal")).get(str(at))) or 0.0 for at in OFFSETS},
            sequences=_count(fields, "sequences"),
        ),
    )


def upkeep_of(run: Run) -> tuple[Upkeep, ...]:
    """Of each optimizer, what was said of it last."""
    said = _read(
        run,
        "upkeep",
        lambda member, step, fields: Upkeep(
            member=member,
            step=step,
            optimizer=printable(fields.get("optimizer"), 60),
            zeroed=fields.get("zeroed") is True,
            detached=_some(fields.get("detached")),
            unused=_some(fields.get("unused")),
            lr_zero=_some(fields.get("lr_zero")),
            number=_count(fields, "number"),
            updates=_count(fields, "updates"),
            steps_without_gradient=_count(fields, "steps_without_gradient"),
            compared=_count(fields, "compared"),
            gradients_kept=_count(fields, "gradients_kept"),
            parameters=_count(fields, "parameters"),
        ),
    )
    return tuple({(each.member, each.number): each for each in said}.values())


def without_optimizer_of(run: Run) -> tuple[WithoutOptimizer, ...]:
    """Of each member, what was said last."""
    said = _read(
        run,
        "without_optimizer",
        lambda member, step, fields: WithoutOptimizer(
            member=member,
            step=step,
            some=_some({"count": fields.get("parameters"), "names": fields.get("names")}),
            left_out=_count(fields, "left_out"),
            share=_count(fields, "left_out_numbers") / max(_count(fields, "model_numbers"), 1),
            hidden={
                printable(name, 120): n
                for name, n in _mapping(fields.get("hidden")).items()
                if is_whole(n, 1, MOST_COUNT)
            },
        ),
    )
    return tuple({each.member: each for each in said}.values())


def modes(run: Run, kind: str) -> tuple[Mode, ...]:
    """Of each model: `kind` is dropout_in_evaluation or evaluation_in_training."""
    return _read(
        run,
        kind,
        lambda member, step, fields: Mode(
            member=member,
            step=step,
            model=printable(fields.get("model"), 60),
            dropouts=_count(fields, "dropouts"),
            batch_norms=_count(fields, "batch_norms") if "batch_norms" in fields else 0,
            has_trained=fields.get("has_trained") is True,
            dropout=math.nan if (share := _share(fields.get("dropout"))) is None else share,
        ),
    )


def _read(run: Run, kind: str, read: Callable[[str, int, Mapping[str, object]], _T]) -> tuple[_T, ...]:
    """What events of a kind say, those left out that do not say it as they should."""
    events = run.events[run.events["kind"] == kind][:MOST_SAID]
    names = {entry.name for entry in run.entries}
    told = []
    for member, step, fields in zip(events["member"].astype(object), events["step"], events["fields"], strict=True):
        try:
            if member in names:
                told.append(read(str(member), int(step), fields))
        except ValueError:
            continue
    return tuple(told)


def _count(fields: Mapping[str, object], name: str) -> int:
    value = fields.get(name)
    if not is_whole(value, 0, MOST_COUNT):
        raise ValueError(f"{name} is no count")
    return value


def _share(value: object) -> float | None:
    """A number from 0 to 1, rounding aside; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not -1e-3 <= value <= 1 + 1e-3:
        return None
    return min(max(float(value), 0.0), 1.0)


def _mapping(value: object) -> Mapping[str, object]:
    return value if isinstance(value, dict) else {}


def _some(value: object) -> Some:
    fields = _mapping(value)
    names = fields.get("names")
    listed = names if isinstance(names, list) else []
    return Some(count=_count(fields, "count"), names=tuple(printable(name, 120) for name in listed[:MOST_NAMES]))
