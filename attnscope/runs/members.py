"""One member of a run and how it ended, from what its part recorded and what ended that.

Shape key: S steps of the member, N rows of a table, M member in the order of run.json.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from attnscope.runs.divergence import Guessing
from attnscope.runs.foreign import number_in
from attnscope.runs.layout import MemberEntry
from attnscope.runs.manifest import is_whole
from attnscope.runs.outcome import Outcome, outcome
from attnscope.runs.parts import NEVER, PartFiles
from attnscope.runs.probe_events import CrossEntropySeen

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberRecord:
    """One member of a run and how it ended; what both say is here by its own name, too.

    Attributes:
        entry: the member as run.json names it.
        outcome: how it ended.
    """

    entry: MemberEntry
    outcome: Outcome

    @property
    def name(self) -> str:
        return self.entry.name

    @property
    def part(self) -> int:
        return self.entry.part

    @property
    def index(self) -> int:
        return self.entry.index

    @property
    def settings(self) -> dict[str, object]:
        return self.entry.settings

    @property
    def status(self) -> str:
        return self.outcome.status

    @property
    def error(self) -> str | None:
        return self.outcome.error

    @property
    def diverged_at(self) -> int | None:
        return self.outcome.diverged_at

    @property
    def limit(self) -> float | None:
        return self.outcome.limit

    @property
    def nonfinite_at(self) -> int | None:
        return self.outcome.nonfinite_at

    @property
    def first_loss(self) -> float | None:
        return self.outcome.first_loss

    @property
    def best_loss(self) -> float | None:
        return self.outcome.best_loss

    @property
    def final_loss(self) -> float | None:
        return self.outcome.final_loss

    @property
    def last_step(self) -> int | None:
        return self.outcome.last_step

    @property
    def is_falling(self) -> bool | None:
        return self.outcome.is_falling


def member_record(
    entry: MemberEntry,
    steps: Mapping[str, NDArray[Any]],
    *,
    end_status: str | None,
    error: str | None,
    config: Mapping[str, object],
    unigram: float | None,
    seen: NDArray[np.bool_] | None,
    guessing: Guessing | None = None,
) -> MemberRecord:
    """How a member ended.

    Args:
        entry: of run.json.
        steps: `divergence.FED` of the member to columns, (S,).
        end_status: of its part, from `end_status_of`.
        error: what its part died of.
        config: of run.json, as a table.
        unigram: loss of what it was trained on, nats per token; None = unknown.
        seen: whether each loss was seen, (S,); None = all were.
        guessing: what its loss is compared with; None = unknown.
    """
    ended = outcome(
        steps["step"],
        steps["loss"],
        grad_norms=steps["grad_norm"],
        loss_scales=steps["loss_scale"],
        end_status=end_status,
        error=error,
        planned_steps=_planned_steps(config, entry.settings),
        unigram=unigram,
        seen=seen,
        guessing=guessing,
    )
    return MemberRecord(entry=entry, outcome=ended)


def guessing_of(reference: object, seen: CrossEntropySeen | None) -> Guessing | None:
    """What a loss is compared with: `reference` of the data, or the first cross-entropy of a watched script; None = nothing."""
    if seen is not None:
        return guessing_among(seen)
    level = number_in(reference.get("uniform")) if isinstance(reference, dict) else None
    return Guessing(level=level) if level is not None and math.isfinite(level) else None


def guessing_among(seen: CrossEntropySeen) -> Guessing | None:
    """The same of what was seen; None where there is nothing to guess."""
    is_sound = is_whole(seen.classes, 2, 2**31) and math.isfinite(seen.loss)
    return Guessing(level=math.log(seen.classes), first=seen.loss) if is_sound else None


def losses_seen(steps: "pd.DataFrame", broken: Iterable[tuple[int, int]], n_members: int) -> NDArray[np.bool_]:
    """Whether each loss of watched code was seen, (N,): one that is NaN was where an event had said so, at its step or before.

    Args:
        steps: the steps table, N rows.
        broken: place in run.json of the member, and step, of each event of a loss that is not finite.
        n_members: of the run.
    """
    first_M = np.full(n_members, NEVER)
    for m, step in broken:
        first_M[m] = min(first_M[m], step)
    codes_N, step_N = steps["member"].cat.codes.to_numpy(), steps["step"].to_numpy()
    seen_N: NDArray[np.bool_] = ~np.isnan(steps["loss"].to_numpy()) | (step_N >= first_M[codes_N])
    return seen_N


def end_status_of(part: PartFiles, *, run_status: str, is_held: bool) -> str | None:
    """What ended a part, for its members: of one that never began, what ended the run.

    Args:
        part: as it was found.
        run_status: what became of the run.
        is_held: whether somebody writes the run.
    """
    if part.end:
        return str(part.end["status"])
    if part.writer is not None or is_held:
        return "running"
    if part.segments:
        return None
    return {"killed": None, "running": None, "failed": "interrupted"}.get(run_status, run_status)


def _planned_steps(config: Mapping[str, object], settings: Mapping[str, object]) -> int:
    train = config.get("train")
    planned = train.get("steps") if isinstance(train, dict) else None
    planned = settings.get("train.steps", planned)
    return planned if isinstance(planned, int) else NEVER
