"""The attention layers that were seen, and the calls that could not be measured.

Shape key: C column, H head.
"""

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase

import torch
from torch import nn

from attnscope.capture.names import Modules
from attnscope.capture.seen import Seen, measure
from attnscope.watch.recording import Layer, Step

SAMPLES = 64  # different row samples, used in turn
MOST_UNMEASURED = 50  # different calls that are described
MOST_EVALUATED = 8  # calls of a layer in evaluation that are measured in one step
OUTSIDE = "attention"  # the name of what no module's method called


class Layers:
    """Measures attention calls and keeps the layers' numbers."""

    def __init__(
        self,
        modules: Modules,
        *,
        rows: int | str,
        patterns: Sequence[str],
        on_layer: Callable[[int, Layer], None],
        on_event: Callable[..., None],
    ) -> None:
        """Look only at layers whose name matches one of `patterns`, as in a shell; at all of them where there is none."""
        self._modules = modules
        self._rows = rows
        self._patterns = tuple(patterns)
        self._on_layer = on_layer
        self._on_event = on_event
        self._numbers: dict[str, int] = {}
        self._left_out: dict[str, None] = {}
        self._unmeasured: set[tuple[object, ...]] = set()
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
    def n_unmeasured(self) -> int:
        """How many different calls could not be measured."""
        return len(self._unmeasured)

    def see(self, step: Step, module: nn.Module | None, seen: Seen) -> None:
        """Measure a call and add it to the step."""
        name = self._name_of(module)
        if not self._wants(name):
            return
        trains = torch.is_grad_enabled() if module is None else module.training
        known = step.heads.get(self._numbers.get(name, -1), ())
        if not trains and len(known) >= MOST_EVALUATED:  # a text that is generated token by token
            return
        self.calls += 1
        measured = measure(seen, rows=self._rows, seed=step.number % SAMPLES)
        layer = self._numbers.get(name)
        if layer is None:
            layer = self._numbers[name] = len(self._numbers)
            self._on_layer(
                step.number,
                Layer(
                    number=layer,
                    name=name,
                    n_heads=seen.q.shape[1],
                    d_head=seen.q.shape[3],
                    mask=seen.mask,
                    dtype=str(seen.q.dtype).removeprefix("torch."),
                    backend=seen.backend,
                    scale=seen.scale,
                    factor=seen.factor,
                    fit=measured.fit,
                ),
            )
        if trains and layer not in step.training:  # evaluation counts only where nothing else is
            step.training.add(layer)
            step.heads[layer] = []
        if trains or layer not in step.training:
            step.heads.setdefault(layer, []).append(measured.columns_CH)

    def unmeasured(
        self,
        step: Step,
        module: nn.Module | None,
        backend: str,
        shapes: list[list[int]],
        reason: str,
    ) -> None:
        """Describe a call that cannot be measured, the first time."""
        name = self._name_of(module)
        key = (name, backend, reason)
        if key in self._unmeasured or len(self._unmeasured) >= MOST_UNMEASURED:
            return
        if module is not None and not self._wants(name):
            return
        self._unmeasured.add(key)
        self._on_event(
            "not_measured",
            step=step.number,
            name=name,
            backend=backend,
            shapes=shapes,
            reason=reason,
        )

    def _name_of(self, module: nn.Module | None) -> str:
        return OUTSIDE if module is None else self._modules.name_of(module)

    def _wants(self, name: str) -> bool:
        wanted = not self._patterns or any(fnmatchcase(name, each) for each in self._patterns)
        if not wanted:
            self._left_out[name] = None
        return wanted
