"""Between who records and the disk: the one place where what is recorded is looked at while training goes on."""

import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import FrameType

from attnscope.runs.events import Event
from attnscope.runs.part_writer import PartWriter
from attnscope.signals.alarms import Alarms
from attnscope.signals.conditions import Condition, first_met
from attnscope.signals.moments import Live, Moments
from attnscope.signals.nonfinite import Looked, Tables

FLUSH_SECONDS = 0.75  # between blocks: a killed process loses at most this and the step it was in

# A context for one thing that may go wrong, by what it is.
Trying = Callable[[str], AbstractContextManager[object]]


@contextmanager
def interrupts_wait() -> Iterator[None]:
    """Ctrl-C inside of it is heard behind it: a block that has left memory gets to the disk, and rules are not asked by halves."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    came: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGINT, lambda number, frame: came.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if came:
            before(*came[0])


class Journal:
    """Appends tables, asks the alarms what happened in them, and now and then the rules what they find; writes that down.

    Invariants: tables arrive in the order of their steps, and the events do not depend on where they are cut into blocks.
    """

    def __init__(self, writer: PartWriter | None, alarms: Alarms, live: Live | None = None) -> None:
        """`writer` is None where nothing is recorded: alarms look all the same, rules do not; nor where `live` is None."""
        self._writer = writer
        self._alarms = alarms
        self._moments = Moments(live, writer.path) if writer is not None and live is not None else None
        self._found: list[Event] = []

    def add(
        self,
        tables: Tables,
        *,
        looked_at: Tables | None = None,
        more: Sequence[Looked] = (),
        trying: Trying = lambda _what: nullcontext(),
    ) -> list[Event]:
        """Append a block.

        Args:
            tables: by their names, as `PartWriter.append` takes them; an empty one is none.
            looked_at: what alarms look at in their place; None = the tables.
            more: see `Alarms.look`.
            trying: a context for each table, and for the alarms.

        Returns:
            What happened in it, in the order of steps, and then what was found up to it; all of it is written.

        Raises:
            RunWriteError: the disk did not take it.
        """
        for name, columns in tables.items():
            if columns and self._writer is not None:
                with trying(f"table {name}"):
                    self._writer.append(name, columns)
        events: list[Event] = []
        with trying("alarms"):
            events = self._alarms.look(tables if looked_at is None else looked_at, more)
        self.note(events)
        self._found = []
        if self._moments is not None:
            with trying("rules"):
                self._keep(self._moments.passed(tables, events, self._alarms.take_shown()))
        return [*events, *self._found]

    def _keep(self, answers: Iterable[Sequence[Event]]) -> None:
        """Write each before the next one is asked for: a rule tells nothing twice."""
        for answer in answers:
            self.note(answer)
            self._found += answer

    def last_found(self, *, trying: Trying = lambda _what: nullcontext()) -> list[Event]:
        """What was found in what rules have not been asked about yet, where nothing more is recorded; it is written."""
        self._found = []
        if self._moments is not None:
            with trying("rules"):
                self._keep(self._moments.end())
        return self._found

    def met(self, conditions: Sequence[Condition], tables: Tables) -> tuple[Condition, str] | None:
        """The first condition that the block last added meets, and what met it; see `conditions.first_met`."""
        return first_met(conditions, tables, self._alarms.diverged, self._found)

    def end(self, members: Sequence[int]) -> list[Event]:
        """These members record nothing more; what that decides is written and returned."""
        events = self._alarms.end(members)
        self.note(events)
        return events

    def note(self, events: Sequence[Event]) -> None:
        """Write events that others have seen."""
        if self._writer is not None:
            for event in events:
                self._writer.event(event)
