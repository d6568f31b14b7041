"""What happened once, found while it is recorded: where numbers stop being finite, and where a loss leaves for good.

Shape key: N rows of a table, S steps.
"""

import copy
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from attnscope.runs.divergence import FED, Guessing, LossWatch
from attnscope.runs.events import Diverged, Event, Nonfinite, Place
from attnscope.signals.nonfinite import TENSORS, Array, Looked, Tables, looked_at

MOST_TIMES = 20  # that a tensor of a member is told to break
MOST_PLACES = 20  # that an event names


def place_of(layer: int, group: str | None) -> Place:
    """The place of a row of a table, in which what belongs to no layer has a negative one."""
    return Place(layer=None if layer < 0 else layer, group=group)


def first_places(places: Iterable[Place]) -> tuple[Place, ...]:
    """As many as an event names, of those that read alike the first."""
    by_words: dict[str, Place] = {}
    for place in places:
        by_words.setdefault(place.words, place)
    return tuple(by_words.values())[:MOST_PLACES]


def _first_to_show(before: LossWatch, *columns: Array) -> int:
    """The position of the loss from which on a watch that has seen others before knows; the last one, if it is the end that tells."""

    def knows(n: int) -> bool:
        watch = copy.copy(before)
        watch.feed(*(x[:n] for x in columns))
        return watch.diverged_at is not None

    low, high = 1, len(columns[0])  # once it knows, it goes on knowing
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if knows(middle) else (middle + 1, high)
    return low - 1


class Alarms:
    """Looks through each block of tables: says when a tensor of a member breaks, and again when it breaks after it was sound.

    Invariants: blocks arrive in the order of their steps; the events do not depend on where steps are cut into blocks.

    Attributes:
        guessing: what the losses are compared with at the end, where they are cross-entropies.
    """

    def __init__(
        self, place: Callable[[int, str | None], Place] = place_of, *, guessing: Guessing | None = None
    ) -> None:
        """`place` says where the layer and group of a row are."""
        self.guessing = guessing
        self._place = place
        self._watches: dict[int, LossWatch] = {}
        self._diverged: dict[int, Event] = {}
        self._is_broken: dict[tuple[int, str], bool] = {}
        self._times: dict[tuple[int, str], int] = {}
        self._shown: list[int] = []

    @property
    def diverged(self) -> Event | None:
        """The first divergence of those that have been seen so far."""
        return min(self._diverged.values(), key=lambda event: event.step, default=None)

    def take_shown(self) -> list[int]:
        """The steps whose losses were the first to show that a member diverged, since this was last asked."""
        shown, self._shown = self._shown, []
        return shown

    def look(self, tables: Tables, more: Sequence[Looked] = ()) -> list[Event]:
        """The events of a block, in the order of their steps, and of one step in the order in which it computes the tensors.

        Args:
            tables: of the block.
            more: tensors that no table tells of, or tells of less well: they stand for what tables say of them.
        """
        better = {looked.tensor for looked in more}
        every = [*more, *(looked for looked in looked_at(tables) if looked.tensor not in better)]
        every.sort(key=lambda looked: list(TENSORS).index(looked.tensor))
        found = [event for looked in every for event in self._breaks(looked)]
        steps = tables.get("steps") or {}
        if steps:
            for member in np.unique(steps["member"]).tolist():
                mine = steps["member"] == member
                found += self.feed(member, *(steps[name][mine] for name in FED))
        return sorted(found, key=lambda event: event.step)

    def feed(self, member: int, steps: Array, losses: Array, grad_norms: Array, loss_scales: Array) -> list[Event]:
        """Watch a member's loss alone: columns FED. A resumed run feeds what was recorded before it went on."""
        watch = self._watches.setdefault(member, LossWatch())
        before = copy.copy(watch)  # what it holds is replaced, never changed
        watch.feed(steps, losses, grad_norms, loss_scales)
        events = self._new_verdict(member, watch)
        if events:
            self._shown.append(int(steps[_first_to_show(before, steps, losses, grad_norms, loss_scales)]))
        return events

    def end(self, members: Sequence[int]) -> list[Event]:
        """These members record nothing more: what that decides."""
        found = []
        for member in members:
            watch = self._watches.setdefault(member, LossWatch())
            watch.end(self.guessing)
            found += self._new_verdict(member, watch)
        return found

    def _new_verdict(self, member: int, watch: LossWatch) -> list[Event]:
        if watch.diverged_at is None or member in self._diverged:
            return []
        event = Event(step=watch.diverged_at, member=member, what=Diverged(why=watch.why or ""))
        self._diverged[member] = event
        return [event]

    def _breaks(self, looked: Looked) -> list[Event]:
        """The steps at which a tensor of a member is broken that was sound before."""
        events = []
        for member in np.unique(looked.member_N).tolist():
            key = member, looked.tensor
            mine_N = looked.member_N == member
            broken_steps = np.unique(looked.step_N[mine_N & looked.broken_N])
            was_broken = self._is_broken.get(key, False)
            if not len(broken_steps) and not was_broken:
                continue
            steps_S = np.unique(looked.step_N[mine_N])
            broken_S = np.isin(steps_S, broken_steps)
            begins_S = broken_S & ~np.r_[was_broken, broken_S[:-1]]
            self._is_broken[key] = bool(broken_S[-1])
            for step in steps_S[begins_S].tolist():
                self._times[key] = self._times.get(key, 0) + 1
                if self._times[key] <= MOST_TIMES:
                    rows = mine_N & looked.broken_N & (looked.step_N == step)
                    events.append(self._event(looked, rows, step=step, member=member))
        return events

    def _event(self, looked: Looked, rows: Array, *, step: int, member: int) -> Event:
        where = None
        if looked.where_N is not None:
            where = first_places(looked.where_N[rows])
        elif looked.layer_N is not None:
            layers = looked.layer_N[rows].tolist()
            groups = [None] * len(layers) if looked.group_N is None else looked.group_N[rows]
            where = first_places(self._place(layer, group) for layer, group in zip(layers, groups, strict=True))
        direction = "backward" if looked.tensor == "gradient" else "forward"
        what = Nonfinite(tensor=looked.tensor, direction=direction, where=where)
        return Event(step=step, member=member, what=what)
