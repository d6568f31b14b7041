"""Members to compare, with all their settings, and cells of those that differ in nothing but their seed."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from attnscope.comparison.member import MemberRow
from attnscope.comparison.statistics import capped_loss
from attnscope.config import SEED, SETTINGS, get_setting, value_text
from attnscope.errors import RunError
from attnscope.runs.foreign import printable
from attnscope.runs.layout import to_json
from attnscope.runs.reader import Run

BATCHES = ("data.seed", "data.batch_size", "data.objective", "model.seq_len")  # what batches hang on
ENDED = ("trained", "stalled", "diverged")


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A member to compare.

    Attributes:
        run: name of its run.
        row: what the report says of it.
        settings: setting to value, as texts fit to show, for every setting.
        numbers: setting to value where that is a number, to sort and to draw by.
        seed: train.seed as text.
        data: fingerprint of what it was trained on and in which order; equal for equal batches.
    """

    run: str
    row: MemberRow
    settings: Mapping[str, str]
    numbers: Mapping[str, float]
    seed: str
    data: str

    @property
    def loss(self) -> float | None:
        """Final loss, or the first where that is lower or there is no other; nats per token."""
        return capped_loss(self.row.first_loss, self.row.final_loss)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """Members that differ in nothing but their seed.

    Attributes:
        name: the values that tell it from others.
        settings: the differing settings and their values.
        subjects: at least one.
    """

    name: str
    settings: Mapping[str, str]
    subjects: tuple[Subject, ...]

    @property
    def outcomes(self) -> Counter[str]:
        """Status to number of members."""
        return Counter(subject.row.status for subject in self.subjects)

    @property
    def outcome(self) -> str:
        """trained, stalled, diverged or another status where all agree, else mixed."""
        return next(iter(self.outcomes)) if len(self.outcomes) == 1 else "mixed"

    @property
    def final_losses(self) -> tuple[float, ...]:
        """Of the members that did not diverge."""
        losses = [s.row.final_loss for s in self.subjects if s.row.status != "diverged"]
        return tuple(loss for loss in losses if loss is not None and math.isfinite(loss))

    @property
    def diverged_at(self) -> tuple[int, ...]:
        """Steps at which members diverged, ascending."""
        steps = [s.row.step for s in self.subjects if s.row.status == "diverged"]
        return tuple(sorted(step for step in steps if step is not None))


def subjects_of(run: Run, rows: Sequence[MemberRow]) -> tuple[Subject, ...]:
    """The members of a run, with all their settings."""
    try:
        base = {key: get_setting(run.config, key) for key in SETTINGS}
    except RunError:
        base = {}  # of a later version: only what run.json says of each member
    subjects = []
    for member, row in zip(run.members, rows, strict=True):
        settings = {**base, **{key: member.settings[key] for key in member.settings}}
        subjects.append(
            Subject(
                run=run.name,
                row=row,
                settings={printable(key, 60): shown(value) for key, value in settings.items()},
                numbers={
                    key: float(value)
                    for key, value in settings.items()
                    if isinstance(value, int | float) and not isinstance(value, bool)
                },
                seed=shown(settings.get(SEED)),
                data=to_json(
                    [run.data_of(member.part).get("fingerprint"), *(shown(settings.get(key)) for key in BATCHES)]
                ),
            )
        )
    return tuple(subjects)


def outcome_text(cell: Cell) -> str:
    """3 trained, or 2 trained, 1 diverged."""
    known = [status for status in ENDED if status in cell.outcomes]
    others = sorted(set(cell.outcomes) - set(ENDED))
    return ", ".join(f"{cell.outcomes[status]} {status}" for status in [*known, *others])


def shown(value: object) -> str:
    """A setting as text fit to show."""
    return "-" if value is None else printable(value_text(value), 60)
