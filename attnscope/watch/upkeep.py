"""How a script keeps its optimizers: whose gradients stay from step to step, who never gets one, who never moves.

Looked at in the first updates; from then on it costs a look at a few Python objects for each update.
"""

import math
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from attnscope.capture.names import Modules
from attnscope.runs.probe_events import Upkeep
from attnscope.watch.guard import OnEvent
from attnscope.watch.numbers import why_without_numbers
from attnscope.watch.orphans import Orphans
from attnscope.watch.parameters import parameters_of
from attnscope.watch.step import Step

FIRST_UPDATES = 5  # of an optimizer that are looked at; then it is said what was found, and at the end once more
MOST_NAMES = 10  # of parameters that an event names
MOST_LATE = 20  # calls of clipping after an update that are looked at
SMALL = 1 << 16  # numbers of such a parameter


@dataclass(slots=True, kw_only=True)
class _Kept:
    """Of one optimizer, which may be gone when it is told.

    Attributes:
        optimizer: its class.
        parameters: of it.
        updates: of it.
        samples: some of its parameters.
        sizes: of their gradients before each backward pass since its last update.
        smallest: the smallest of `sizes` for each update but the first.
        missing: its parameters that never had a gradient, by id.
        used: ids of those of them that modules surely compute with; None until the first updates are over.
        groups: ids of the parameters of its groups, by the id of the group's list.
        moved: groups that had a learning rate once.
        names: of what may be told, by id.
        steps_without: steps of it after a loss was differentiated, at which nothing had a gradient.
        zeroed: of those, how many its gradients had been thrown away before.
        is_due: a loss was differentiated since its last update.
        clipped: how often its gradients were clipped while it was due.
        late: by what they were multiplied by clipping after its updates, the first times.
    """

    optimizer: str
    parameters: int
    updates: int = 0
    samples: list[weakref.ref[Tensor]] = field(default_factory=list)
    sizes: list[Tensor] = field(default_factory=list)
    smallest: list[Tensor] = field(default_factory=list)
    missing: dict[int, weakref.ref[Tensor]] = field(default_factory=dict)
    used: set[int] | None = None
    groups: dict[int, list[int]] = field(default_factory=dict)
    moved: set[int] = field(default_factory=set)
    names: dict[int, str] = field(default_factory=dict)
    steps_without: int = 0
    zeroed: int = 0
    is_due: bool = True
    clipped: int = 0
    late: list[Tensor] = field(default_factory=list)


class Optimizers:
    """What optimizers do besides their updates.

    Invariant: keeps no parameter, module or optimizer alive.
    """

    def __init__(self, modules: Modules, orphans: Orphans, on_event: OnEvent) -> None:
        """`orphans` know the modules that compute."""
        self._modules = modules
        self._orphans = orphans
        self._on_event = on_event
        self._optimizers: weakref.WeakKeyDictionary[torch.optim.Optimizer, _Kept] = weakref.WeakKeyDictionary()
        self._all: list[_Kept] = []
        # the step at which the first updates were over; None = it was told, or they are not
        self._waits_since: int | None = None
        self._is_over = False

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Those that have stepped."""
        return list(self._optimizers)

    def differentiated(self) -> None:
        """A loss is about to be differentiated: what gradients there are come from before."""
        for kept in self._all:
            kept.is_due = True
            if kept.updates and len(kept.smallest) < FIRST_UPDATES - 1:
                kept.sizes.append(_size([p for ref in kept.samples if (p := ref()) is not None]))

    def before_update(self, step: Step, optimizer: torch.optim.Optimizer) -> None:
        """An optimizer that has gradients is about to step."""
        kept = self._kept(optimizer)
        kept.updates += 1
        kept.is_due = False
        kept.moved |= {id(group["params"]) for group in optimizer.param_groups if _moves(group.get("lr"))}
        if kept.updates == 1:
            alone = [p for p in parameters_of(optimizer, with_gradient=False) if p.requires_grad and p.grad is None]
            kept.missing = {id(p): weakref.ref(p) for p in alone}
            kept.samples = [weakref.ref(p) for p in _some(parameters_of(optimizer))]
        elif kept.missing:
            for key in [key for key, ref in kept.missing.items() if (p := ref()) is not None and p.grad is not None]:
                del kept.missing[key]
        if kept.sizes and len(kept.smallest) < FIRST_UPDATES - 1:
            kept.smallest.append(torch.stack([size.to(kept.sizes[0].device) for size in kept.sizes]).amin())
        kept.sizes.clear()
        if kept.updates <= FIRST_UPDATES:
            self._first_updates(step, kept.updates)

    def skipped(self, optimizer: torch.optim.Optimizer) -> None:
        """It was kept from stepping: what gradients it had are used up."""
        kept = self._optimizers.get(optimizer)
        if kept is not None:
            kept.is_due = False

    def clipped(self, parameters: Iterable[Tensor], factor: Tensor, threshold: float | Tensor) -> bool:
        """Gradients have been clipped; whether all optimizers that are known to have them had stepped with them before."""
        ids = {id(p) for p in parameters}
        mine = [kept for kept in self._all if any((p := ref()) is not None and id(p) in ids for ref in kept.samples)]
        for kept in mine:
            # Who clips at infinity wants to know the norm.
            if isinstance(threshold, float) and threshold == math.inf:
                continue
            if kept.is_due:
                kept.clipped += 1
            elif len(kept.late) < MOST_LATE:
                kept.late.append(factor)
        return bool(mine) and not any(kept.is_due for kept in mine)

    def without_gradient(self, step: Step, optimizer: torch.optim.Optimizer, *, zeroed: bool) -> None:
        """An optimizer stepped after a loss was differentiated, and none of its parameters had a gradient."""
        kept = self._kept(optimizer)
        kept.steps_without += 1
        kept.zeroed += zeroed
        if kept.steps_without <= FIRST_UPDATES and not kept.updates:
            self._first_updates(step, kept.steps_without)

    def flush(self) -> None:
        """Say what was found in the first updates, once they are over; waits for the device."""
        since, self._waits_since = self._waits_since, None
        if since is not None:
            self._tell(since)

    def finish(self, step: Step) -> None:
        """Say what was found in all of them; waits for the device."""
        self._describe()
        self._tell(step.number)

    def _kept(self, optimizer: torch.optim.Optimizer) -> _Kept:
        kept = self._optimizers.get(optimizer)
        if kept is None:
            n = len(parameters_of(optimizer, with_gradient=False))
            kept = self._optimizers[optimizer] = _Kept(optimizer=type(optimizer).__name__, parameters=n)
            self._all.append(kept)
        return kept

    def _first_updates(self, step: Step, n_updates: int) -> None:
        if self._is_over:
            return
        self._orphans.look(self._optimizers)
        if n_updates == FIRST_UPDATES:
            self._is_over, self._waits_since = True, step.number
            self._describe()

    def _describe(self) -> None:
        """Keep what is known of optimizers and parameters while they are there."""
        used = self._orphans.surely_used()
        for optimizer, kept in list(self._optimizers.items()):
            kept.parameters = len(parameters_of(optimizer, with_gradient=False))
            kept.used = used & kept.missing.keys()
            kept.groups = {id(group["params"]): _trainable(group["params"]) for group in optimizer.param_groups}
            never = [p for p in (ref() for ref in kept.missing.values()) if p is not None]
            still = [
                p
                for group in optimizer.param_groups
                if id(group["params"]) not in kept.moved
                for p in group["params"]
                if p.requires_grad
            ]
            self._name(kept, [*[p for p in never if id(p) in used], *never, *still])
        self._orphans.describe(self._optimizers)

    def _name(self, kept: _Kept, parameters: Sequence[Tensor]) -> None:
        """Of some of each kind: names of all of a large model are not wanted."""
        new = {id(p): p for p in parameters[: 3 * MOST_NAMES] if id(p) not in kept.names}
        if new:
            names = self._modules.names_of_parameters(list(new.values()))
            kept.names |= dict(zip(new, names, strict=True))

    def _tell(self, step: int) -> None:
        for number, kept in enumerate(self._all):
            if kept.used is not None:
                self._on_event(_told(number, kept), step=step)
        self._orphans.tell(step)


def _told(number: int, kept: _Kept) -> Upkeep:
    still = [key for group, keys in kept.groups.items() if group not in kept.moved for key in keys]
    used = kept.used or set()
    detached = [key for key in kept.missing if key in used]
    unused = [key for key in kept.missing if key not in used]
    lr_zero = [key for key in still if key not in kept.missing] if kept.updates else []
    sizes = [float(size) for size in kept.smallest]
    return Upkeep(
        number=number,
        optimizer=kept.optimizer,
        updates=kept.updates,
        steps_without_gradient=kept.steps_without,
        steps_zeroed=kept.zeroed,
        compared=len(sizes),
        gradients_kept=sum(size > 0 for size in sizes),
        parameters=kept.parameters,
        detached=len(detached),
        detached_names=_names(kept, detached),
        unused=len(unused),
        unused_names=_names(kept, unused),
        lr_zero=len(lr_zero),
        lr_zero_names=_names(kept, lr_zero),
        clipped=kept.clipped,
        clipped_after=sum(float(factor) < 1 for factor in kept.late),
    )


def _names(kept: _Kept, keys: Iterable[int]) -> tuple[str, ...]:
    return tuple(kept.names[key] for key in keys if key in kept.names)[:MOST_NAMES]


def _trainable(parameters: Iterable[Tensor]) -> list[int]:
    return [id(p) for p in parameters if p.requires_grad]


def _moves(lr: object) -> bool:
    """Whether a learning rate is not 0; one on a device is not waited for."""
    return isinstance(lr, Tensor) or lr is None or lr != 0


def _some(parameters: Sequence[Tensor]) -> list[Tensor]:
    """A few small ones, from the first to the last."""
    with_gradients = [(p, p.grad) for p in parameters if p.grad is not None]
    plain = [p for p, g in with_gradients if g.layout == torch.strided and why_without_numbers(g) is None]
    small = [p for p in plain if p.numel() <= SMALL] or sorted(plain, key=lambda p: p.numel())[:1]
    return [small[at] for at in sorted({0, len(small) // 2, len(small) - 1})] if small else []


@torch.no_grad()
def _size(parameters: Sequence[Tensor]) -> Tensor:
    """Sum of the absolute entries of their gradients, (); 0 where there are none."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return torch.zeros((), device=parameters[0].device if parameters else None)
    return torch.stack([g.abs().sum().float().to(gradients[0].device) for g in gradients]).sum()
