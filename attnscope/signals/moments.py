"""When rules are asked while training goes on, and what that may cost.

They are asked what they find in what was recorded up to a *moment*, a step that the record alone decides: FIRST, then SECOND, then
GROWTH times as many steps each time, and the steps at which an alarm is sure of something. So a finding has the same step
whatever blocks the record is cut into. What depends on time is only when it is said: a moment waits until all the asking
will have taken no more than SHARE of the time, and the last ones are asked when training ends. With a rule to stop on, none waits.
"""

import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import numpy as np

from attnscope.errors import error_in_a_line
from attnscope.runs.divergence import IN_A_ROW
from attnscope.runs.events import INTERNAL, Event, Nonfinite, Unmeasured
from attnscope.runs.layout import PART
from attnscope.signals.conditions import Condition
from attnscope.signals.nonfinite import Tables

# Steps done at a moment: rules of what was there at first look at two steps, others at ten and more.
FIRST, SECOND = 2, 10
GROWTH = 1.5
SHARE = 0.01  # of the time since training began
EXPECTED_S = 0.05  # what asking takes, before that is known
MOST_OF_A_KIND = 10  # moments of an alarm: what breaks again and again is known
MOST_ROWS = 3_000_000  # of all tables, which rules hold in memory at once: about 0.5 GB

# Asked for a part of a run directory: what is found at a step that was not told before, the step of the moment before (None =
# there is none), and the rules that are asked for by name.
Ask = Callable[[Path, int, int, int | None, Collection[str]], Sequence[Event]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Live:
    """What is looked for while training goes on.

    Attributes:
        ask: the rules.
        stop_on: conditions at which training stops.
    """

    ask: Ask
    stop_on: tuple[Condition, ...] = ()

    @property
    def rules(self) -> tuple[str, ...]:
        """Those that training stops on."""
        return tuple(condition.rule for condition in self.stop_on if condition.rule is not None)


def moments() -> Iterator[int]:
    """The steps of all moments that are not an alarm's."""
    done = FIRST
    while True:
        yield done - 1
        done = max(SECOND, math.ceil(GROWTH * done))


class Moments:
    """The moments of one part that is being recorded.

    Invariants: moments are asked in the order of their steps, each once. What a rule fails at never stops training: nothing
    more is asked, and that is said.
    """

    def __init__(self, live: Live, folder: Path) -> None:
        """`folder` is that of the part."""
        match = PART.fullmatch(folder.name)
        assert match is not None, folder
        self._live = live
        self._run, self._part = folder.parent, int(match["part"])
        self._upcoming = moments()
        self._next = next(self._upcoming)
        self._first = 0  # step that was recorded
        self._last = -1
        self._rows = 0
        self._alarmed: dict[str, set[int]] = {"nonfinite": set(), "diverged": set()}
        self._ahead: set[int] = set()
        self._waiting: list[int] = []
        self._begun = time.perf_counter()
        self._spent_s, self._expected_s = 0.0, EXPECTED_S
        self._is_first = True
        self._is_over = False

    def passed(self, tables: Tables, events: Iterable[Event], shown: Iterable[int]) -> Iterator[Sequence[Event]]:
        """What is found at the moments that have come, of each as it is asked: to be written before the next one is.

        Args:
            tables: of a block that is on disk.
            events: of alarms in it.
            shown: steps of it at which it was plain that a member diverges.
        """
        filled = [columns["step"] for columns in tables.values() if columns and len(columns["step"])]
        if self._is_over or not filled:
            return
        if self._last < 0:
            self._skip_to(min(int(steps_N.min()) for steps_N in filled))
        self._last = max(self._last, *(int(steps_N.max()) for steps_N in filled))
        # An alarm of numbers that are not finite is believed where they still are not a few steps later.
        broken = sorted({event.step + IN_A_ROW - 1 for event in events if isinstance(event.what, Nonfinite)})
        for kind, steps in (("nonfinite", broken), ("diverged", sorted(set(shown)))):
            known = self._alarmed[kind]
            for step in steps:  # alarms of a part that goes on have heard of what was before, too
                if len(known) < MOST_OF_A_KIND and step >= self._first:
                    known.add(step)
                    self._ahead.add(step)
        while self._next <= self._last:
            self._ahead.add(self._next)
            self._next = next(self._upcoming)
        come = sorted(step for step in self._ahead if step <= self._last)
        self._ahead -= set(come)
        rows = {step: self._rows + sum(int((steps_N <= step).sum()) for steps_N in filled) for step in come}
        self._waiting = sorted({*self._waiting, *(step for step in come if rows[step] <= MOST_ROWS)})
        self._rows += sum(map(len, filled))
        yield from self._asked(at_once=bool(self._live.rules))

    def end(self) -> Iterator[Sequence[Event]]:
        """Nothing more is recorded: what is found at the moments that still wait."""
        yield from self._asked(at_once=True)

    def _skip_to(self, step: int) -> None:
        """A part that goes on has had its moments up to here."""
        self._first = step
        while self._next < step:
            self._next = next(self._upcoming)

    def _asked(self, *, at_once: bool) -> Iterator[Sequence[Event]]:
        while self._waiting and not self._is_over and (at_once or self._has_time()):
            step = self._waiting.pop(0)
            began = time.perf_counter()
            found: Sequence[Event] = ()
            try:
                before = max(takewhile(lambda at, limit=step: at < limit, moments()), default=None)  # type: ignore[misc]
                with np.errstate(all="ignore"):  # whatever a watched script has set
                    found = self._live.ask(self._run, self._part, step, before, self._live.rules)
            except Exception as error:
                self._is_over = True
                said = Unmeasured(name="findings", backend=INTERNAL, reason=error_in_a_line(error))
                found = [Event(step=step, what=said)]
            if not self._is_first:  # which imports what rules need, once in a process
                self._expected_s = time.perf_counter() - began
                self._spent_s += self._expected_s
            self._is_first = False
            yield found

    def _has_time(self) -> bool:
        return self._spent_s + self._expected_s <= SHARE * (time.perf_counter() - self._begun)
