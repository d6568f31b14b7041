"""How a script keeps its optimizers: whose gradients stay from step to step, who never gets one, who never moves.

Looked at in the first updates and at the end; from then on it costs a look at a few Python objects for each update.
"""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from attnscope.capture.names import Modules
from attnscope.watch.orphans import Orphans
from attnscope.watch.parameters import parameters_of
from attnscope.watch.step import Step

FIRST_UPDATES = 5  # of an optimizer that are looked at; then it is said what was found, and at the end once more
MOST_NAMES = 10  # of parameters that an event names
SAMPLED = 3  # parameters of an optimizer whose gradients are looked at before they are added to
SMALL = 1 << 16  # numbers of such a parameter


@dataclass(slots=True, kw_only=True)
class _Kept:
    """Of one optimizer.

    Attributes:
        updates: of it.
        samples: some of its parameters.
        sizes: of their gradients before each backward pass since its last update.
        smallest: the smallest of `sizes` for each update but the first.
        missing: its parameters that never had a gradient; None before its first update.
        moved: its groups that had a learning rate once.
        steps_without: steps of it after a loss was differentiated, at which nothing had a gradient.
        zeroed: whether at one of those its gradients had been thrown away since.
    """

    updates: int = 0
    samples: list[weakref.ref[Tensor]] = field(default_factory=list)
    sizes: list[Tensor] = field(default_factory=list)
    smallest: list[Tensor] = field(default_factory=list)
    missing: WeakTensorKeyDictionary | None = None
    moved: set[int] = field(default_factory=set)
    steps_without: int = 0
    zeroed: bool = False


class Upkeep:
    """What optimizers do besides their updates.

    Invariant: keeps no parameter, module or optimizer alive.
    """

    def __init__(self, modules: Modules, orphans: Orphans, on_event: Callable[..., None]) -> None:
        """`orphans` know the modules that compute."""
        self._modules = modules
        self._orphans = orphans
        self._on_event = on_event
        self._optimizers: weakref.WeakKeyDictionary[torch.optim.Optimizer, _Kept] = weakref.WeakKeyDictionary()
        self._is_said = False

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Those that have stepped."""
        return list(self._optimizers)

    def differentiated(self) -> None:
        """A loss is about to be differentiated: what gradients there are come from before."""
        for kept in self._optimizers.values():
            if kept.updates and len(kept.smallest) < FIRST_UPDATES - 1:
                kept.sizes.append(_size([p for ref in kept.samples if (p := ref()) is not None]))

    def before_update(self, optimizer: torch.optim.Optimizer) -> None:
        """An optimizer that has gradients is about to step."""
        kept = self._optimizers.setdefault(optimizer, _Kept())
        kept.updates += 1
        kept.moved |= {id(group["params"]) for group in optimizer.param_groups if _moves(group.get("lr"))}
        if kept.missing is None:
            kept.missing = WeakTensorKeyDictionary()
            for p in parameters_of(optimizer, with_gradient=False):
                if p.requires_grad and p.grad is None:
                    kept.missing[p] = True
            kept.samples = [weakref.ref(p) for p in _some(parameters_of(optimizer))]
        for p in [p for p in kept.missing if p.grad is not None] if len(kept.missing) else ():
            del kept.missing[p]
        if kept.sizes and len(kept.smallest) < FIRST_UPDATES - 1:
            kept.smallest.append(torch.stack([size.to(kept.sizes[0].device) for size in kept.sizes]).amin())
        kept.sizes.clear()
        if kept.updates <= FIRST_UPDATES:
            self._orphans.look(self._optimizers)

    def without_gradient(self, optimizer: torch.optim.Optimizer, *, zeroed: bool) -> None:
        """An optimizer stepped after a loss was differentiated, and none of its parameters had a gradient."""
        kept = self._optimizers.setdefault(optimizer, _Kept())
        kept.steps_without += 1
        kept.zeroed |= zeroed
        if kept.steps_without <= FIRST_UPDATES:
            self._orphans.look(self._optimizers)

    def flush(self, step: Step) -> None:
        """Say what was found, if there were enough updates and nobody has said it; waits for the device."""
        if not self._is_said and any(
            kept.updates + kept.steps_without >= FIRST_UPDATES for kept in self._optimizers.values()
        ):
            self._is_said = True
            self.tell(step)

    def tell(self, step: Step) -> None:
        """Say what was found so far; waits for the device."""
        for number, (optimizer, kept) in enumerate(list(self._optimizers.items())):
            self._on_event("upkeep", step=step.number, number=number, **self._described(optimizer, kept))
        self._orphans.tell(step, self._optimizers)

    def _described(self, optimizer: torch.optim.Optimizer, kept: _Kept) -> dict[str, object]:
        missing = [] if kept.missing is None else list(kept.missing)
        never = {id(p) for p in missing}
        still = [
            p
            for group in optimizer.param_groups
            if kept.updates and id(group["params"]) not in kept.moved
            for p in group["params"]
            if p.requires_grad and id(p) not in never
        ]
        used = self._orphans.used_parameters()
        parts = {
            "detached": [p for p in missing if id(p) in used],
            "unused": [p for p in missing if id(p) not in used],
            "lr_zero": still,
        }
        sizes = [float(size) for size in kept.smallest]
        return {
            "optimizer": type(optimizer).__name__,
            "updates": kept.updates,
            "steps_without_gradient": kept.steps_without,
            "zeroed": kept.zeroed,
            "compared": len(sizes),
            "gradients_kept": sum(size > 0 for size in sizes),
            "parameters": len(parameters_of(optimizer, with_gradient=False)),
            "used": len(used),
        } | {name: self._named(parameters) for name, parameters in parts.items()}

    def _named(self, parameters: Sequence[Tensor]) -> dict[str, object]:
        names = self._modules.names_of_parameters(parameters[:MOST_NAMES]) if parameters else []
        return {"count": len(parameters), "names": names}


def _moves(lr: object) -> bool:
    """Whether a learning rate is not 0; one on a device is not waited for."""
    return isinstance(lr, Tensor) or lr is None or lr != 0


def _some(parameters: Sequence[Tensor]) -> list[Tensor]:
    """A few small ones, from the first to the last."""
    plain = [p for p in parameters if p.grad is not None and p.grad.layout == torch.strided]
    small = [p for p in plain if p.numel() <= SMALL] or sorted(plain, key=lambda p: p.numel())[:1]
    return [small[at] for at in sorted({0, len(small) // 2, len(small) - 1})] if small else []


@torch.no_grad()
def _size(parameters: Sequence[Tensor]) -> Tensor:
    """Sum of the absolute entries of their gradients, (); 0 where there are none."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return torch.zeros(())
    return torch.stack([g.abs().sum().float().to(gradients[0].device) for g in gradients]).sum()
