"""What goes wrong in watching costs one measurement and is said: never the script, and never the rest of the record."""

import sys
import warnings
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, TypeVar

from attnscope.capture.dispatch import Unobserved
from attnscope.errors import RunWriteError
from attnscope.runs.events import INTERNAL, Unmeasured, What, kind_of
from attnscope.watch.numbers import UnreadableError

if TYPE_CHECKING:
    from attnscope.watch.recording import WatchRecorder

MOST_TEXT = 500  # characters of an exception
MOST_KINDS = 100  # of failures that are described

_T = TypeVar("_T")


class OnEvent(Protocol):
    """Told what happened once, and at which step."""

    def __call__(self, what: What, *, step: int) -> None:
        """It happened."""


class Guard:
    """Writes to the record, and keeps what fails from going any further.

    Invariants: an `Exception` inside `measuring` or `write` does not leave it, and is not kept: it would keep the frames of
    the script. After the disk refused something, nothing more is written.
    """

    failure: RunWriteError | None

    def __init__(self, recorder: "WatchRecorder", *, on_failure: Callable[[], None]) -> None:
        """`on_failure` is called when nothing can be written any more."""
        self._recorder = recorder
        self._on_failure = on_failure
        self._counts: dict[tuple[str, str], int] = {}
        self.failure = None

    @property
    def said(self) -> tuple[str, ...]:
        """What could not be measured, and why, a line each."""
        return tuple(f"{what}: {reason}" for what, reason in self._counts)

    @property
    def counts(self) -> dict[str, int]:
        """What failed to how often."""
        found: dict[str, int] = {}
        for (what, _), count in self._counts.items():
            found[what] = found.get(what, 0) + count
        return found

    def measuring(self, what: str, step: int) -> "_Measuring":
        """A context for one measurement; where it fails, that is said."""
        return _Measuring(self, what, step)

    def event(self, what: What, *, step: int) -> None:
        """Record what happened once, unless nothing can be written any more."""
        if self.failure is None:
            with self.measuring(f"event {kind_of(what)}", step):
                self._recorder.event(what, step=step)

    def write(self, what: str, step: int, write: Callable[[], _T]) -> _T | None:
        """Write to the run directory, unless that failed before."""
        if self.failure is None:
            with self.measuring(what, step):
                return write()
        return None

    def not_measured(self, what: str, step: int, reason: str) -> None:
        """Say once that this cannot be measured, and why."""
        if (what, reason) not in self._counts and len(self._counts) >= MOST_KINDS:
            return
        count = self._counts[what, reason] = self._counts.get((what, reason), 0) + 1
        if count == 1 and self.failure is None:
            try:
                self._recorder.event(Unmeasured(name=what, backend=INTERNAL, reason=reason), step=step)
            except RunWriteError as error:
                self.fail(error)

    def fail(self, error: RunWriteError) -> None:
        """Nothing can be written any more: training goes on unwatched, and that is said once."""
        without_frames(error)
        if self.failure is not None:
            return
        self.failure = RunWriteError(str(error))
        self._on_failure()
        said = f"attnscope no longer watches: {error}"
        try:
            warnings.warn(said, RuntimeWarning, stacklevel=2)
        except RuntimeWarning:  # the script has warnings raised
            print(said, file=sys.stderr, flush=True)


class _Measuring:
    """Nothing of the script sees what is computed inside, and nothing that goes wrong leaves it."""

    def __init__(self, guard: Guard, what: str, step: int) -> None:
        self._guard = guard
        self._what = what
        self._step = step

    def __enter__(self) -> None:
        self._aside = Unobserved()
        self._aside.__enter__()

    def __exit__(self, _kind: object, error: BaseException | None, _trace: TracebackType | None) -> bool:
        self._aside.__exit__(None, None, None)
        if isinstance(error, RunWriteError):
            self._guard.fail(error)
        elif isinstance(error, Exception):
            self._guard.not_measured(self._what, self._step, one_line(error))
        return error is None or isinstance(error, Exception)


def one_line(error: BaseException) -> str:
    """The exception in a line: its class and the first line of what it says."""
    try:
        said = str(error).strip()
    except Exception:
        said = ""
    first = said.splitlines()[0] if said else ""
    if isinstance(error, UnreadableError):
        return first
    return f"{type(error).__name__}: {first}"[:MOST_TEXT]


def without_frames(error: BaseException | None) -> None:
    """Let go of the frames, and with them the variables, that an exception and those behind it came through."""
    while error is not None:
        behind = error.__cause__ or error.__context__
        error.__traceback__ = error.__cause__ = error.__context__ = None
        error = behind
