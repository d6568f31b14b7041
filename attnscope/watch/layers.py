"""The attention layers that were seen, and the calls that could not be measured.

A layer is a module object with a number of heads: two models may have the same paths, and a module may be called with other
numbers of heads at other times.

Shape key: C total, H head.
"""

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from attnscope.capture.names import Modules
from attnscope.capture.seen import Seen, measure
from attnscope.metrics.rows import SAMPLES
from attnscope.metrics.totals import TOTALS
from attnscope.runs.events import Unmeasured
from attnscope.watch.guard import one_line
from attnscope.watch.recording import Layer
from attnscope.watch.step import Step

MOST_UNMEASURED = 50  # different calls that are described
MOST_EVALUATED = 8  # calls of a layer in evaluation that are measured in one step
MOST_LAYERS = 2000  # a script may make modules at every step
EVALUATES, MAY_TRAIN, TRAINS = range(3)  # what a call may be for
OUTSIDE = "attention"  # the name of what no module's method called
TOO_MANY = f"{MOST_LAYERS} attention modules were seen before it, and no more are measured"


class Layers:
    """Measures attention calls and keeps the layers' numbers.

    Invariants: a number belongs to one module object, which is not kept alive, and no two layers have the same name.
    """

    def __init__(
        self,
        modules: Modules,
        *,
        rows: int | str,
        patterns: Sequence[str],
        on_layer: Callable[[int, Layer], None],
        on_unmeasured: Callable[[Unmeasured, int], None],
    ) -> None:
        """Look only at layers whose name matches one of `patterns`, as in a shell; at all of them where there is none."""
        self._modules = modules
        self._rows = rows
        self._patterns = tuple(patterns)
        self._on_layer = on_layer
        self._on_unmeasured = on_unmeasured
        # Module to number of heads to name, once that is given; None where nobody asked for it. By identity: modules may call
        # themselves equal.
        self._names_of = WeakIdKeyDictionary()
        self._names_outside: dict[int, str | None] = {}
        self._numbers: dict[str, int] = {}
        self._models: dict[str, str] = {}  # name to the class of the model it is in
        self._left_out: dict[str, None] = {}
        self._unmeasured: dict[tuple[str, str, str], None] = {}  # name, backend and reason
        self.calls = 0

    @property
    def names(self) -> tuple[str, ...]:
        """Of the layers measured, in the order of their first calls."""
        return tuple(self._numbers)

    @property
    def left_out(self) -> tuple[str, ...]:
        """Names of the layers that no pattern matches."""
        return tuple(self._left_out)

    @property
    def reasons(self) -> dict[str, tuple[str, ...]]:
        """Why calls could not be measured, to the names of the layers that made them."""
        found: dict[str, list[str]] = {}
        for name, _, reason in self._unmeasured:
            found.setdefault(reason, []).append(name)
        return {reason: tuple(dict.fromkeys(names)) for reason, names in found.items()}

    @property
    def n_unmeasured(self) -> int:
        """How many different calls could not be measured."""
        return len(self._unmeasured)

    def see(self, step: Step, module: nn.Module | None, seen: Seen) -> int | None:
        """Measure a call and add it to the step; the layer's number, None where it is not measured."""
        name = self._name_of(module, seen.shape[1])
        if name is None:
            return None
        if name not in self._numbers and len(self._numbers) >= MOST_LAYERS:
            self.unmeasured(step, module, seen.backend, [], TOO_MANY)
            return None
        purpose = _purpose(module)
        known = step.heads.get(self._numbers.get(name, -1), ())
        if purpose == EVALUATES and len(known) >= MOST_EVALUATED:  # a text that is generated token by token
            return None
        self.calls += 1
        try:
            measured = measure(seen, rows=self._rows, seed=step.number % SAMPLES)
        except Exception as error:
            shapes = [list(x.shape) for x in (seen.q, seen.k) if x is not None]
            self.unmeasured(step, module, seen.backend, shapes, one_line(error))
            return None
        layer = self._numbers.get(name)
        if layer is None:
            layer = self._numbers[name] = len(self._numbers)
            self._names_by_heads(module)[seen.shape[1]] = name
            self._models[name] = "" if module is None else self._modules.model_of(module)
            self._on_layer(
                step.number,
                Layer(
                    number=layer,
                    name=name,
                    n_heads=seen.shape[1],
                    d_head=seen.d_head,
                    mask=seen.mask,
                    dtype=str(seen.dtype).removeprefix("torch."),
                    backend=seen.backend,
                    scale=seen.scale,
                    factor=seen.factor,
                    fit=measured.fit,
                ),
            )
        before = step.purposes.get(layer, EVALUATES)
        if purpose > before:  # what serves less counts only where nothing else is
            step.heads[layer] = []
        if purpose >= before:
            step.purposes[layer] = purpose
            totals_CH = torch.stack([measured.totals[each].float() for each in TOTALS])
            step.heads.setdefault(layer, []).append(totals_CH)
        return layer

    def unmeasured(
        self,
        step: Step,
        module: nn.Module | None,
        backend: str,
        shapes: list[list[int]],
        reason: str,
    ) -> None:
        """Describe a call that cannot be measured, the first time."""
        name = self._path_of(module)
        key = (name, backend, reason)
        if key in self._unmeasured or len(self._unmeasured) >= MOST_UNMEASURED:
            return
        if module is not None and not self._wants(name):
            return
        self._unmeasured[key] = None
        sizes = tuple(map(tuple, shapes))
        self._on_unmeasured(Unmeasured(name=name, backend=backend, shapes=sizes, reason=reason), step.number)

    def _path_of(self, module: nn.Module | None) -> str:
        return OUTSIDE if module is None else self._modules.name_of(module)

    def _name_of(self, module: nn.Module | None, n_heads: int) -> str | None:
        """The layer's name, the same at every call; None where nobody asked for it."""
        mine = self._names_by_heads(module)
        if n_heads in mine:
            return mine[n_heads]
        path = self._path_of(module)
        name = self._new_name(module, path, n_heads, has_others=any(mine.values()))
        asked_by = [path, name]
        if module is not None and self._patterns:
            asked_by.append(f"{self._modules.model_of(module)}.{path}")
        if self._wants(*asked_by):
            return name
        mine[n_heads] = None
        return None

    def _names_by_heads(self, module: nn.Module | None) -> dict[int, str | None]:
        if module is None:
            return self._names_outside
        found: dict[int, str | None] = self._names_of.setdefault(module, {})
        return found

    def _new_name(self, module: nn.Module | None, path: str, n_heads: int, *, has_others: bool) -> str:
        """The path of the module; where that is taken, with its number of heads, the class of its model, or a count."""
        if getattr(module, "_is_replica", False):  # DataParallel copies modules at every call
            return path
        name = path
        if has_others:
            name = f"{path} ({n_heads} heads)"
        elif path in self._numbers and module is not None:
            model = self._modules.model_of(module)
            if model not in (path, self._models[path]):
                name = f"{model}.{path}"
        plain, number = name, 2
        while name in self._numbers:
            name, number = f"{plain} ({number})", number + 1
        return name

    def _wants(self, *names: str) -> bool:
        """Whether one of the names of a layer was asked for; the first is the module's path."""
        wanted = not self._patterns or any(fnmatchcase(name, each) for name in names for each in self._patterns)
        if not wanted:
            self._left_out[names[0]] = None
        return wanted


def _purpose(module: nn.Module | None) -> int:
    """What a call is for: reentrant checkpointing trains without gradients, too, but so may somebody evaluate."""
    has_gradients = torch.is_grad_enabled()
    if module is None:
        return TRAINS if has_gradients else EVALUATES
    if not module.training:
        return EVALUATES
    return TRAINS if has_gradients else MAY_TRAIN
