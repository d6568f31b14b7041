"""Probes: what no table shows is looked at once, in the first steps, and said in an event.

Sights and targets, inputs and keys, norms, clips, upkeep and orphans, modes and what evaluation does otherwise; each costs a few
small tensors or a look at Python objects, and where one fails the others go on.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from attnscope.capture.dispatch import outside, why_unseen
from attnscope.capture.eager import in_backward
from attnscope.capture.names import Modules, module_of_call
from attnscope.capture.seen import Seen
from attnscope.watch.clips import Clips
from attnscope.watch.guard import Guard
from attnscope.watch.inputs import Inputs
from attnscope.watch.modes import Modes
from attnscope.watch.norms import Norms
from attnscope.watch.orphans import Orphans
from attnscope.watch.other_mode import OtherMode
from attnscope.watch.same_keys import SameKeys
from attnscope.watch.sights import Sights
from attnscope.watch.step import Step
from attnscope.watch.upkeep import Optimizers


class FirstLooks:
    """Told of what happens in training, in the order in which it does.

    Invariant: nothing of it raises, and no tensor of the script is kept longer than its step.
    """

    def __init__(self, modules: Modules, guard: Guard, *, rows: int | str) -> None:
        self._guard = guard
        self._sights = Sights(rows=rows, on_event=guard.event)
        self._orphans = Orphans(modules, guard.event)
        self._upkeep = Optimizers(modules, self._orphans, guard.event)
        self._modes = Modes(modules, guard.event)
        self._clips = Clips(guard.event)
        self._norms = Norms(modules, guard.event)
        self._inputs = Inputs(guard.event)
        self._same_keys = SameKeys(guard.event)
        self._other_mode = OtherMode(rows=rows, on_event=guard.event)

    def computed(self, step: Step, module: nn.Module | None) -> None:
        """Something is computed in training."""
        if module is not None:
            self._modes.computed(module)
            self._orphans.computed(step, module)

    def computed_without_gradients(self, out: Any) -> None:
        """Something is computed without gradients."""
        if self._modes.looks_at_evaluation() and why_unseen(out) is None and not in_backward():
            self._modes.computed_without_gradients(module_of_call())

    def embedded(self, step: Step, args: tuple[Any, ...]) -> None:
        """An embedding is looked up: the operator's arguments."""
        if self._sights.looks_at(step) and torch.is_grad_enabled() and not in_backward():
            with self._guard.measuring("token ids", step.number):
                self._sights.embedded(args)
                if why_unseen(args[1]) is None:
                    self._inputs.embedded(step, outside(args[1]).detach())

    def attention(self, step: Step, layer: int, module: nn.Module | None, seen: Seen) -> None:
        """An attention call that was measured."""
        with self._guard.measuring("attention in evaluation", step.number):
            look = self._other_mode.trained if torch.is_grad_enabled() else self._other_mode.evaluated
            look(layer, module, seen)
        if torch.is_grad_enabled():
            with self._guard.measuring("keys that attention sees", step.number):
                self._sights.attention(step, layer, seen)
            with self._guard.measuring("keys and inputs of attention", step.number):
                self._inputs.attention(step)
                self._same_keys.attention(step, layer, seen)

    def normalized(self, step: Step, module: nn.Module | None, operator: str, args: tuple[Any, ...]) -> None:
        """A norm is called in training: the operator's arguments."""
        with self._guard.measuring("sizes of norms", step.number):
            self._norms.normalized(step, module, operator, args)

    def cross_entropy(self, step: Step, targets: Tensor, ignore_index: int) -> None:
        """Cross-entropy is computed in training."""
        with self._guard.measuring("targets", step.number):
            self._sights.cross_entropy(step, targets, ignore_index)
            self._inputs.cross_entropy(step, targets)

    def evaluated(self, step: Step) -> None:
        """Cross-entropy is computed without gradients."""
        if self._upkeep.optimizers:
            with self._guard.measuring("mode of the model", step.number):
                self._modes.evaluated(step)

    def differentiated(self, step: Step) -> None:
        """A loss is about to be differentiated."""
        with self._guard.measuring("gradients that stay", step.number):
            self._upkeep.differentiated()
        with self._guard.measuring("mode of the model", step.number):
            self._modes.differentiated(step, self._upkeep.optimizers)

    def before_update(self, step: Step, optimizer: torch.optim.Optimizer) -> None:
        """An optimizer that has gradients is about to step."""
        with self._guard.measuring("upkeep of parameters", step.number):
            self._upkeep.before_update(step, optimizer)

    def without_gradient(self, step: Step, optimizer: torch.optim.Optimizer, *, zeroed: bool) -> None:
        """An optimizer stepped after a loss was differentiated, and none of its parameters had a gradient."""
        with self._guard.measuring("upkeep of parameters", step.number):
            self._upkeep.without_gradient(step, optimizer, zeroed=zeroed)

    def skipped(self, optimizer: torch.optim.Optimizer) -> None:
        """GradScaler kept an optimizer from stepping."""
        self._upkeep.skipped(optimizer)

    def clipped(
        self, step: Step, parameters: Sequence[Tensor], factor: Tensor | None, threshold: float | Tensor | None
    ) -> bool:
        """Gradients have been clipped; whether their optimizers had used them already."""
        if factor is None or threshold is None:
            return False
        is_late = False
        with self._guard.measuring("clipping", step.number):
            self._clips.clipped(parameters, factor, threshold)
            is_late = self._upkeep.clipped(parameters, factor, threshold)
        return is_late

    def unscaling(self, step: Step, optimizer: torch.optim.Optimizer, loss_scale: Tensor) -> None:
        """GradScaler is about to divide the gradients of an optimizer by its scale."""
        with self._guard.measuring("clipping", step.number):
            self._clips.unscaling(step, optimizer, loss_scale)

    def end_step(self, step: Step) -> None:
        """Let go of the script's tensors."""
        self._sights.end_step()
        self._inputs.end_step(step)
        self._clips.end_step()
        self._other_mode.end_step(step)

    def flush(self, step: Step, *, is_end: bool = False) -> None:
        """Say what was found; waits for the device."""
        with self._guard.measuring("keys that attention sees", step.number):
            self._sights.flush(step)
        with self._guard.measuring("keys and inputs of attention", step.number):
            self._inputs.flush()
            self._same_keys.flush(step, is_end=is_end)
        with self._guard.measuring("sizes of norms", step.number):
            self._norms.flush(step, is_end=is_end)
        with self._guard.measuring("clipping", step.number):
            self._clips.flush()
        with self._guard.measuring("attention in evaluation", step.number):
            self._other_mode.flush()
        with self._guard.measuring("upkeep of parameters", step.number):
            self._upkeep.flush()

    def finish(self, step: Step) -> None:
        """Nothing more comes."""
        self.flush(step, is_end=True)
        with self._guard.measuring("keys that attention sees", step.number):
            self._sights.finish()
        with self._guard.measuring("upkeep of parameters", step.number):
            self._upkeep.finish(step)
