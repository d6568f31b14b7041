"""Members of a run that differ in one setting and their seed, so that what became of them tells what it did."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from attnscope.errors import RunError
from attnscope.runs.members import MemberRecord
from attnscope.runs.reader import Run

ENDED = ("trained", "stalled", "diverged")


@dataclass(frozen=True, slots=True, kw_only=True)
class Twin:
    """What a member has to be compared with.

    Attributes:
        value: the member's setting.
        loss: its final loss, infinite if it diverged.
        better: name of a member that ended better.
        better_value: its setting.
        better_loss: its final loss.
    """

    value: float
    loss: float
    better: str
    better_value: float
    better_loss: float


def better_twins(run: Run, key: str, *, lower: bool, margin: float) -> dict[str, Twin]:
    """Each member beside the value of a setting with which all seeds ended better than its own value's seeds did.

    Args:
        run: of this lab; a watched one has no twins.
        key: the setting: a number.
        lower: whether only lower values are compared with, or only higher ones.
        margin: nats between the worst end with the other value and the best with its own.
    """
    groups: dict[str, dict[float, list[MemberRecord]]] = {}
    base = _default(run, key)
    for record in run.members:
        value = _number(record.settings.get(key, base))
        if value is None or record.status not in ENDED:
            continue
        same = repr(sorted((k, v) for k, v in record.settings.items() if k not in (key, "train.seed")))
        groups.setdefault(same, {}).setdefault(value, []).append(record)
    found = {}
    for values in groups.values():
        worst = {value: max(map(_end, records)) for value, records in values.items()}
        for value, records in values.items():
            best = min(map(_end, records))
            others = [x for x in values if (x < value) is lower and x != value and worst[x] + margin <= best]
            others = [x for x in others if all(map(_learned, values[x]))]
            if not others:
                continue
            other = min(others, key=worst.__getitem__)
            twin = max(values[other], key=_end)
            for record in records:
                found[record.name] = Twin(
                    value=value,
                    loss=_end(record),
                    better=twin.name,
                    better_value=other,
                    better_loss=_end(twin),
                )
    return found


def number_of(run: Run, settings: Mapping[str, object], key: str) -> float | None:
    """A member's setting, if it is known and a number: settings are anybody's."""
    return _number(setting_of(run, settings, key))


def setting_of(run: Run, settings: Mapping[str, object], key: str) -> object:
    """A member's setting; None where it is not known."""
    return settings.get(key, _default(run, key))


def _default(run: Run, key: str) -> object:
    """What the config of the run says; None of a watched one, or where it cannot be understood."""
    section, _, name = key.partition(".")
    try:
        return getattr(getattr(run.config, section), name)
    except RunError:
        return None


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _learned(record: MemberRecord) -> bool:
    """Whether it ended better than it began: what is better than a twin that broke may be broken, too."""
    return record.first_loss is not None and _end(record) < record.first_loss


def _end(record: MemberRecord) -> float:
    if record.status == "diverged" or record.final_loss is None or math.isnan(record.final_loss):
        return math.inf
    return record.final_loss
