"""How a part is doing, read from the run directory: the same wherever it is trained."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from attnscope.runs.events import Event, Stopped
from attnscope.runs.found_live import FoundLive
from attnscope.runs.reader import open_run


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """One part at one moment.

    Attributes:
        part: its number.
        n_members: trained in it.
        steps_done: by its members that are furthest.
        steps: planned.
        outcomes: status to number of members (`attnscope.runs.outcome` says what the words mean).
        state: waiting, training, finished, interrupted or failed.
        found: by rules while it was trained, and what it was stopped on, as they were recorded.
    """

    part: int
    n_members: int
    steps_done: int
    steps: int
    outcomes: Mapping[str, int]
    state: str
    found: tuple[Event, ...] = ()

    @property
    def diverged(self) -> int:
        """Members that diverged so far."""
        return self.outcomes.get("diverged", 0)

    @property
    def stalled(self) -> int:
        """Members that ended without having learned; known at their end only."""
        return self.outcomes.get("stalled", 0)

    @property
    def alive(self) -> int:
        """Members that neither diverged nor stalled so far."""
        return self.n_members - self.diverged - self.stalled


def standing_of(path: Path, part: int, *, steps: int, training: bool) -> Standing:
    """Look at one part.

    Args:
        path: of the run.
        part: its number.
        steps: planned.
        training: somebody trains it now; what it may say of an earlier end is out of date.

    Raises:
        RunError: the run cannot be opened.
    """
    run = open_run(path, part=part)
    last = [member.last_step for member in run.members if member.last_step is not None]
    end = run.ends.get(part)
    return Standing(
        part=part,
        n_members=len(run.members),
        steps_done=1 + max(last, default=-1),
        steps=steps,
        outcomes=Counter(member.status for member in run.members),
        state="training" if training else str(end["status"]) if end else "waiting",
        found=tuple(event for _, event in run.happenings if isinstance(event.what, FoundLive | Stopped)),
    )
