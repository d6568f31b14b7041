"""Which axes what a model is given has, and what tells of two which one is that of the batch: positions, and labels.

What is found stays on the device until a block of steps is written.

Shape key: B batch, T position, D d_model.
"""

import torch
from torch import Tensor

from attnscope.capture.names import module_calls
from attnscope.runs.probe_events import InputsSeen
from attnscope.watch.guard import OnEvent
from attnscope.watch.step import Step

FIRST_LOOKS = 2  # steps, of which the first with attention is looked at
MOST_LOOKUPS = 16
MOST_CALLS = 64  # of attention
MOST_PAIRS = 20


class Inputs:
    """The axes of what came in, in the first step with attention.

    Invariant: keeps no tensor of the script.
    """

    def __init__(self, on_event: OnEvent) -> None:
        self._on_event = on_event
        self._given: dict[tuple[int, int], None] = {}
        self._inside: dict[tuple[int, int], None] = {}
        self._positions: list[tuple[int, Tensor]] = []  # how many, and whether they are counted through
        self._labels: list[int] = []
        self._lookups = 0
        self._calls = 0
        self._step = -1  # that is described
        self._is_told = False

    def _looks_at(self, step: Step) -> bool:
        return step.number < FIRST_LOOKS and self._step < 0

    @torch.no_grad()
    def embedded(self, step: Step, ids: Tensor) -> None:
        """Token ids, or positions, were looked up."""
        self._lookups += 1
        if not self._looks_at(step) or self._lookups > MOST_LOOKUPS or ids.dim() not in (1, 2):
            return
        if ids.dim() == 2 and min(ids.shape) > 1:
            self._given[ids.shape[0], ids.shape[1]] = None
        for n, are_counted in _counted_through(ids):
            self._positions.append((n, are_counted))

    def attention(self, step: Step) -> None:
        """An attention call of the step; what was called is on the stack."""
        self._calls += 1
        if not self._looks_at(step) or self._calls > MOST_CALLS:
            return
        calls = module_calls()
        for at, call in enumerate(calls):
            into = self._given if at == len(calls) - 1 else self._inside
            for x in call.tensors:
                if x.dim() == 3 and x.is_floating_point() and min(x.shape[:2]) > 1 and len(into) < MOST_PAIRS:
                    into[x.shape[0], x.shape[1]] = None

    def cross_entropy(self, step: Step, targets: Tensor) -> None:
        """A cross-entropy of class indices in training."""
        if self._looks_at(step) and targets.dim() == 1:
            self._labels.append(targets.numel())

    def end_step(self, step: Step) -> None:
        """The step is over: it is the one that is described if there was attention in it."""
        if not self._looks_at(step):
            return
        if self._calls:
            self._step = step.number
        else:
            self._given.clear()
            self._positions.clear()
            self._labels.clear()
            self._lookups = 0

    def flush(self) -> None:
        """Say what was found; waits for the device."""
        if self._is_told or self._step < 0:
            return
        self._is_told = True
        counted = {n for n, are_counted in self._positions if bool(are_counted)}
        self._positions.clear()
        labels = set(self._labels)
        what = InputsSeen(
            given=tuple(self._given)[:MOST_PAIRS],
            inside=tuple(self._inside),
            positions=counted.pop() if len(counted) == 1 else 0,
            labels=labels.pop() if len(labels) == 1 else 0,
        )
        self._on_event(what, step=self._step)


def _counted_through(ids: Tensor) -> list[tuple[int, Tensor]]:
    """Along each axis that has more than one id: how many, and whether they go up by one, the same for all of the other axis."""
    found = []
    for axis, n in enumerate(ids.shape):
        if n > 1:
            ids_BT = ids.movedim(axis, -1).reshape(-1, n)
            row_T = torch.arange(n, device=ids.device) + ids_BT[:1, :1]
            found.append((n, (ids_BT == row_T).all()))
    return found
