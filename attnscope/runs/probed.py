"""What a watched run says of its probes: what was looked at once, in the first steps; anybody's, so everything is checked."""

from dataclasses import dataclass, fields, replace
from typing import Generic, TypeVar

from attnscope.runs.foreign import printable
from attnscope.runs.manifest import is_whole
from attnscope.runs.probe_events import (
    AttentionInOtherMode,
    DropoutInEvaluation,
    EvaluationInTraining,
    InputCarried,
    InputsSeen,
    KeysRepeated,
    KeysSeen,
    NormsOverOne,
    PassesSeen,
    RowsWithoutKeys,
    TargetsSeen,
    Upkeep,
    WithoutOptimizer,
)
from attnscope.runs.reader import Run

MOST_NAMES = 10
MOST_TOLD = 10_000  # of a kind
MOST_COUNT = 2**53
ROUNDING = 1e-3  # of a share

_What = TypeVar(
    "_What",
    KeysSeen,
    RowsWithoutKeys,
    TargetsSeen,
    Upkeep,
    WithoutOptimizer,
    DropoutInEvaluation,
    EvaluationInTraining,
    NormsOverOne,
    KeysRepeated,
    InputCarried,
    AttentionInOtherMode,
    PassesSeen,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Told(Generic[_What]):
    """What a member says happened, and at which step."""

    member: str
    step: int
    what: _What


def told(run: Run, kind: type[_What]) -> tuple[Told[_What], ...]:
    """All of one kind that make sense, in their order: counts are counts, shares from 0 to 1 or None, texts fit to show."""
    found = [
        Told(member=member, step=step, what=_shown(what))
        for step, member, what in run.happened(kind)[:MOST_TOLD]
        if member is not None and _is_sound(what)
    ]
    return tuple(found)


def upkeep_of(run: Run) -> tuple[Told[Upkeep], ...]:
    """Of each optimizer what was said last."""
    return tuple({(each.member, each.what.number): each for each in told(run, Upkeep)}.values())


def without_optimizer_of(run: Run) -> tuple[Told[WithoutOptimizer], ...]:
    """Of each member what was said last."""
    return tuple({each.member: each for each in told(run, WithoutOptimizer)}.values())


def inputs_of(run: Run) -> dict[str, InputsSeen]:
    """Member to the axes of what its model was given, those that make sense."""
    found: dict[str, InputsSeen] = {}
    for _, member, what in run.happened(InputsSeen):
        if member is not None and _is_sound(what):
            found.setdefault(member, replace(what, given=_pairs(what.given), inside=_pairs(what.inside)))
    return found


def _pairs(said: tuple[tuple[object, ...], ...]) -> tuple[tuple[object, ...], ...]:
    return tuple(pair for pair in said if len(pair) == 2 and all(is_whole(size, 0, MOST_COUNT) for size in pair))


def _is_sound(what: object) -> bool:
    counts = [getattr(what, field.name) for field in fields(what) if field.type in (int, int | None)]  # type: ignore[arg-type]
    return all(count is None or 0 <= count <= MOST_COUNT for count in counts)


def _shown(what: _What) -> _What:
    changed: dict[str, object] = {}
    for field in fields(what):
        value = getattr(what, field.name)
        if isinstance(value, str):
            changed[field.name] = printable(value, 60)
        elif isinstance(value, tuple):
            changed[field.name] = tuple(printable(name, 120) for name in value[:MOST_NAMES])
        elif isinstance(value, float):
            is_share = -ROUNDING <= value <= 1 + ROUNDING
            changed[field.name] = min(max(value, 0.0), 1.0) if is_share else None
    return replace(what, **changed)  # type: ignore[arg-type]
