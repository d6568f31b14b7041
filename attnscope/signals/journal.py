"""Between who records and the disk: the one place where what is recorded is looked at while training goes on."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

from attnscope.runs.events import Event
from attnscope.runs.part_writer import PartWriter
from attnscope.signals.alarms import Alarms
from attnscope.signals.conditions import Condition, first_met
from attnscope.signals.nonfinite import Looked, Tables

FLUSH_SECONDS = 0.75  # between blocks: a killed process loses at most this and the step it was in

# A context for one thing that may go wrong, by what it is.
Trying = Callable[[str], AbstractContextManager[object]]


class Journal:
    """Appends tables, asks the alarms what happened in them, and writes that down.

    Invariants: tables arrive in the order of their steps, and the events do not depend on where they are cut into blocks.
    """

    def __init__(self, writer: PartWriter | None, alarms: Alarms) -> None:
        """`writer` is None where nothing is recorded; alarms look all the same."""
        self._writer = writer
        self._alarms = alarms

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
            What happened in it, in the order of steps; it is written.

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
        return events

    def met(self, conditions: Sequence[Condition], tables: Tables) -> tuple[Condition, str] | None:
        """The first condition that the block last added meets, and what met it; see `conditions.first_met`."""
        return first_met(conditions, tables, self._alarms.diverged)

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
