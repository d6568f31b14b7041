"""Parameters that compute and have gradients, and that no optimizer has: what was left out, or stands in a Python list."""

import gc
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary, WeakTensorKeyDictionary

from attnscope.capture.names import Modules
from attnscope.runs.probe_events import WithoutOptimizer
from attnscope.watch.guard import OnEvent
from attnscope.watch.parameters import parameters_of
from attnscope.watch.step import Step

FIRST_LOOKS = 2  # steps in which the modules that compute are noted
MOST_SUMMED = 16  # parameters of which it is looked at whether something else moves them
MOST_NAMES = 10  # of parameters that an event names


class Orphans:
    """The modules that compute in training in the first steps, and those of their parameters that no optimizer has.

    Invariant: keeps no parameter or module alive.
    """

    def __init__(self, modules: Modules, on_event: OnEvent) -> None:
        self._modules = modules
        self._on_event = on_event
        self._used = WeakIdKeyDictionary()
        self._found = WeakTensorKeyDictionary()  # to the sum of their numbers when they were found; None of most
        self._sums: list[tuple[Tensor, Tensor]] = []  # then and now
        self._described: WithoutOptimizer | None = None
        self._told: WithoutOptimizer | None = None

    def computed(self, step: Step, module: nn.Module) -> None:
        """A module computes in training."""
        if step.number < FIRST_LOOKS and module not in self._used:
            self._used[module] = True

    def used_parameters(self) -> dict[int, Tensor]:
        """By id, those of the modules that compute."""
        return {id(p): p for module in list(self._used) for p in module.parameters()}

    def surely_used(self) -> set[int]:
        """Ids of parameters that their modules surely compute with: weights and biases of layers that have nothing else."""
        found: set[int] = set()
        for module in list(self._used):
            own = dict(module.named_parameters(recurse=isinstance(module, nn.MultiheadAttention)))
            if isinstance(module, nn.MultiheadAttention) or own.keys() <= {"weight", "bias"}:
                found |= {id(p) for p in own.values()}
        return found

    def look(self, optimizers: Iterable[torch.optim.Optimizer]) -> None:
        """One of these optimizers is about to step: gradients are there."""
        owned = _owned(optimizers)
        for key, p in self.used_parameters().items():
            if p.requires_grad and p.is_leaf and p.grad is not None and key not in owned and p not in self._found:
                self._found[p] = _sum(p) if len(self._found) < MOST_SUMMED else None

    def describe(self, stepped: Iterable[torch.optim.Optimizer]) -> None:
        """Keep what is known of those that no optimizer has, none of those included that have not stepped."""
        stepped = list(stepped)
        if not len(self._found) or not stepped:
            return
        alive = [each for each in gc.get_objects() if issubclass(type(each), torch.optim.Optimizer)]
        owned, mine = _owned(alive), _owned(stepped)
        for p in [p for p in self._found if id(p) in owned]:
            del self._found[p]
        before = dict(self._found.items())
        self._sums = [(total, _sum(p)) for p, total in before.items() if total is not None]
        orphans = {id(p): p for p in before}
        models = {id(model): model for each in list(self._used) for model in [self._modules.root_of(each)]}
        trained = [model for model in models.values() if any(id(p) in mine for p in model.parameters())]
        registered = {id(p): p for model in trained for p in model.parameters() if p.requires_grad}
        left_out = [p for key, p in orphans.items() if key in registered]
        hidden = dict(_hidden(trained, orphans))
        self._described = WithoutOptimizer(
            parameters=len(orphans),
            names=tuple(self._modules.names_of_parameters(list(orphans.values())[:MOST_NAMES])) if orphans else (),
            left_out=len(left_out),
            share_left_out=_numbers(left_out) / max(_numbers(registered.values()), 1),
            hidden=sum(hidden.values()),
            containers=tuple(hidden)[:MOST_NAMES],
        )

    def tell(self, step: int) -> None:
        """Say which no optimizer has, if something has changed; waits for the device."""
        described, self._described = self._described, None
        moved = any(float(now) != float(before) for before, now in self._sums)
        if described is None or moved:  # what is no torch.optim.Optimizer moves them
            return
        if described != self._told and (described.parameters or self._told):
            self._told = described
            self._on_event(described, step=step)


def _hidden(models: Iterable[nn.Module], orphans: Mapping[int, Tensor]) -> Iterator[tuple[str, int]]:
    """Attributes of trained models that are Python containers of modules, and how many orphans stand in them."""
    for model in models:
        for name, module in model.named_modules():
            for attribute, value in vars(module).items():
                if attribute.startswith("_"):
                    continue
                inside = {id(p) for each in _modules_in(value) for p in each.parameters()}
                if n := len(inside & orphans.keys()):
                    yield f"{name}.{attribute}" if name else attribute, n


def _modules_in(value: object, deep: int = 2) -> Iterator[nn.Module]:
    """Modules in plain lists, tuples and dictionaries."""
    items = value.values() if type(value) is dict else value if type(value) in (list, tuple) else ()
    for each in items:  # type: ignore[attr-defined]
        if isinstance(each, nn.Module):
            yield each
        elif deep:
            yield from _modules_in(each, deep - 1)


def _owned(optimizers: Iterable[torch.optim.Optimizer]) -> set[int]:
    return {id(p) for each in list(optimizers) for p in parameters_of(each, with_gradient=False)}


def _numbers(parameters: Iterable[Tensor]) -> int:
    return sum(p.numel() for p in parameters)


@torch.no_grad()
def _sum(p: Tensor) -> Tensor:
    local = p.detach()
    return local.double().sum() if local.device.type == "cpu" else local.float().sum()
