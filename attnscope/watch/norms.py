"""Which norms normalize over a single number, in the first steps: what they put out does not depend on what they are given."""

import math
from typing import Any

from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from attnscope.capture.names import Modules
from attnscope.runs.probe_events import NormsOverOne
from attnscope.watch.guard import OnEvent
from attnscope.watch.step import Step

FIRST_LOOKS = 2  # steps in which norms are looked at
MOST_NORMS = 2000  # a script may make modules at every step
MOST_NAMES = 10


class Norms:
    """The norms of the first steps.

    Invariant: keeps no module alive.
    """

    def __init__(self, modules: Modules, on_event: OnEvent) -> None:
        self._modules = modules
        self._on_event = on_event
        self._seen = WeakIdKeyDictionary()  # module that normalizes to whether that is over one number
        self._names: dict[str, bool] = {}  # of those that do, to whether the sign is left
        self._is_told = False

    def normalized(self, step: Step, module: nn.Module | None, operator: str, args: tuple[Any, ...]) -> None:
        """A norm is called in training: the operator's arguments."""
        if step.number >= FIRST_LOOKS or module is None or len(self._seen) >= MOST_NORMS:
            return
        shape = args[0].shape
        size = math.prod(shape[1:]) // max(int(args[1]), 1) if operator == "group_norm" else math.prod(args[1])
        if module not in self._seen or size == 1:
            self._seen[module] = size == 1
        if size == 1 and shape.numel() > 1:
            self._names[self._modules.name_of(module)] = operator == "rms_norm"

    def flush(self, step: Step, *, is_end: bool) -> None:
        """Say what was found, once the first steps are over."""
        if self._is_told or not (is_end or step.number >= FIRST_LOOKS):
            return
        self._is_told = True
        if self._names:
            what = NormsOverOne(
                norms=max(len(self._seen), len(self._names)),
                over_one=len(self._names),
                sign_left=sum(self._names.values()),
                names=tuple(self._names)[:MOST_NAMES],
            )
            self._on_event(what, step=0)
