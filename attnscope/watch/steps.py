"""What is seen of the step that goes on: losses, gradients, updates, attention, and where one step ends and the next begins.

A step is an update that had gradients, with all that led to it. It is over when something is computed after it, so that
several optimizers which step one after the other are one step. Gradients of several backward calls add up, and so do their
losses: the loss of a step is the function whose gradient the optimizers were given. A loss whose gradients were zeroed, or
skipped by GradScaler, before the next one came is not in it.
"""

import functools
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Concatenate, ParamSpec, cast

import torch
from torch import Tensor, nn

from attnscope.capture.names import Modules, any_alive
from attnscope.capture.seen import Seen
from attnscope.runs.events import LossNotSeen, OptimizerSeen, SkippedUpdate, StepWithoutGradient
from attnscope.signals.alarms import first_places
from attnscope.watch.finite import Outputs
from attnscope.watch.forms import Forms
from attnscope.watch.guard import Guard
from attnscope.watch.layers import Layers
from attnscope.watch.numbers import UnreadableError, copy_of_scalar, device_name, why_without_numbers
from attnscope.watch.output import see_cross_entropy
from attnscope.watch.parameters import Parameters, parameters_of
from attnscope.watch.probes import FirstLooks
from attnscope.watch.recording import WatchRecorder, broken_gradients
from attnscope.watch.residual import Residual
from attnscope.watch.step import FIRST, Step
from attnscope.watch.turns import Turns

MOST_LOSSES = 1000  # of one step
ANOTHER_THREAD = "another thread trains at the same time: only the steps of the first one are recorded"

_P = ParamSpec("_P")


def _guarded(
    what: str,
) -> Callable[[Callable[Concatenate["Steps", _P], None]], Callable[Concatenate["Steps", _P], None]]:
    """One thread at a time, only while somebody watches; what goes wrong costs no more than this."""

    def guarding(method: Callable[Concatenate["Steps", _P], None]) -> Callable[Concatenate["Steps", _P], None]:
        @functools.wraps(method)
        def guarded(self: "Steps", *args: _P.args, **kwargs: _P.kwargs) -> None:
            if self.is_on:
                measuring = self._guard.measuring(what, self.now.number)
                with self.lock, measuring:
                    method(self, *args, **kwargs)

        return cast("Callable[Concatenate[Steps, _P], None]", guarded)

    return guarding


class Steps:
    """One step after the other.

    Invariants: nothing of what it does raises, but for what `on_end` raises to stop the script. Steps are those of one
    training (`Turns`), whichever threads call.
    """

    def __init__(
        self,
        *,
        recorder: WatchRecorder,
        modules: Modules,
        layers: Layers,
        residual: Residual,
        probes: FirstLooks,
        guard: Guard,
        every: int,
        take_outputs: Callable[[], Outputs | None],
        on_forward_over: Callable[[], None],
        on_end: Callable[[], None],
    ) -> None:
        """What it asks and tells.

        Args:
            recorder: takes the steps.
            modules: know the names of parameters.
            layers: measure attention.
            residual: follows the residual stream.
            probes: look at what no table shows.
            guard: says what goes wrong.
            every: steps between those that are measured, after the first ones.
            take_outputs: gives what was seen of outputs since it was last called.
            on_forward_over: is told that a forward pass is over, as its loss is differentiated or applied.
            on_end: is told that a step is over.
        """
        self._recorder = recorder
        self._layers = layers
        self._residual = residual
        self._probes = probes
        self._guard = guard
        self._every = every
        self._take_outputs = take_outputs
        self._on_forward_over = on_forward_over
        self._on_end = on_end
        self._parameters = Parameters(modules, self._on_left_out)
        self._forms = Forms()
        self._turns = Turns(self._forget_forward)
        self._optimizers: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
        self._open: set[int] = set()  # optimizers between before_update and after_update, by id
        self._moved: set[int] = set()  # optimizers that have stepped in this step, by id
        self._begun = time.perf_counter()
        self.lock = threading.RLock()
        self.is_on = False
        self.now = Step(number=0, measured=True)
        self.stepped = False
        self.updates = 0
        self.without_gradient = 0
        self._moved_nothing = ""  # the class of an optimizer that has stepped without gradients
        self._lacks_gradient = False
        self.updates_itself: bool | None = None  # a script without optimizers: each loss is a step
        self.repeats = False

    def trying(self, what: str) -> AbstractContextManager[None]:
        """See `OnTraining`."""
        return self._guard.measuring(what, self.now.number)

    # -- what is computed --

    def computed(self) -> None:
        """Something is computed: the step before is over, if there was one."""
        if self.stepped:
            self._end_step()

    @_guarded("step")
    def _end_step(self) -> None:
        if self._turns.is_mine(trains=False):
            self._begin()

    @_guarded("attention")
    def attention(self, module: nn.Module | None, seen: Seen) -> None:
        """An attention call."""
        if self.repeats or not self._is_mine(module):
            return
        self._begin()
        if self.now.measured:
            layer = self._layers.see(self.now, module, seen)
            with self._guard.measuring("residual stream", self.now.number):
                self._residual.attend(self.now.number, module, seen)
            if layer is not None:
                self._probes.attention(self.now, layer, module, seen)
                with self._guard.measuring("attention form", self.now.number):
                    self._forms.attention(layer, module, seen)

    @_guarded("residual stream")
    def passing(self, look: Callable[[int], None]) -> None:
        """Something is computed in training; `look` is given the number of the step if that is measured."""
        if not self.repeats and self._turns.is_mine(trains=False):
            self._begin()
            if self.now.measured:
                look(self.now.number)

    @_guarded("attention")
    def unmeasured(self, module: nn.Module | None, backend: str, shapes: list[list[int]], reason: str) -> None:
        """An attention call that cannot be measured."""
        self._begin()
        self._layers.unmeasured(self.now, module, backend, shapes, reason)

    @_guarded("cross-entropy")
    def cross_entropy(self, logits: Tensor, targets: Tensor, ignore_index: int, *, loss: Tensor, is_mean: bool) -> None:
        """See `OnTraining`."""
        if not self.repeats and self._turns.is_mine(trains=False):
            self._begin()
            now = self.now
            self._probes.cross_entropy(now, targets, ignore_index)
            is_first = now.number < FIRST
            if is_first:
                now.passes.cross_entropy(loss, logits, is_mean=is_mean)
            see_cross_entropy(now.output, logits, targets, ignore_index, measured=now.measured, is_first=is_first)

    @_guarded("evaluation")
    def evaluated(self) -> None:
        """See `OnTraining`."""
        self._probes.evaluated(self.now)

    # -- what is done with it --

    @_guarded("loss")
    def loss(self, loss: Tensor, weight: Tensor | None) -> None:
        """See `OnTraining`."""
        if self.repeats:
            return
        number = copy_of_scalar(loss)
        if weight is not None:
            number *= copy_of_scalar(weight)
        if not self._is_mine(None, trains=True):
            return
        self._begin()
        if self.updates_itself is None:
            self.updates_itself = not any_alive(torch.optim.Optimizer)
        elif len(self.now.losses) >= MOST_LOSSES:  # its optimizers step where we cannot see it
            self.updates_itself = True
        self._on_forward_over()
        self._probes.differentiated(self.now)
        self.stepped = self.updates_itself
        self.now.losses.append(number)
        if self.now.number < FIRST:
            self.now.passes.differentiated(number)

    @_guarded("gradients")
    def zeroed(self, owner: torch.optim.Optimizer | nn.Module) -> None:
        """See `OnTraining`."""
        if self.updates_itself is None and isinstance(owner, torch.optim.Optimizer):
            self.updates_itself = False
        if self.now.losses and not self.stepped and not self._open:
            of = owner.parameters() if isinstance(owner, nn.Module) else parameters_of(owner)
            self.now.drop(of)

    @_guarded("gradients")
    def before_clipping(self, parameters: list[Tensor]) -> None:
        """See `OnTraining`."""
        if self._turns.is_mine(trains=True):
            self._parameters.see_gradients(self.now, parameters)

    @_guarded("clipping")
    def clipped(
        self,
        factor: Tensor | None,
        total_norm_before: Tensor | None,
        parameters: list[Tensor],
        threshold: float | Tensor | None,
    ) -> None:
        """See `OnTraining`."""
        now = self.now
        if not self._turns.is_mine(trains=True):
            return
        if self._probes.clipped(now, parameters, factor, threshold):  # of gradients that have been used
            return
        if now.grad_norm is None:
            now.grad_norm = total_norm_before
        if now.clip_factor is None:
            now.clip_factor = factor

    @_guarded("loss scale")
    def scaled(self, loss_scale: Tensor) -> None:
        """See `OnTraining`."""
        self.now.loss_scale = loss_scale

    @_guarded("loss scale")
    def unscaling(self, optimizer: torch.optim.Optimizer, loss_scale: Tensor) -> None:
        """See `OnTraining`."""
        self._probes.unscaling(self.now, optimizer, loss_scale)

    @_guarded("skipped update")
    def skipped(self, optimizer: torch.optim.Optimizer) -> None:
        """See `OnTraining`."""
        now = self.now
        parameters = parameters_of(optimizer)
        if not self._turns.is_mine(optimizer, trains=True):
            return
        self._parameters.see_gradients(now, parameters)
        where = first_places(broken_gradients(now))
        what = SkippedUpdate(why="GradScaler found NaN or Inf in the gradient", where=where)
        self._guard.event(what, step=now.number)
        self._parameters.skip(now)
        self._probes.skipped(optimizer)
        now.drop(parameters)
        now.grad_norm = now.clip_factor = None

    @_guarded("update")
    def before_update(self, optimizer: torch.optim.Optimizer) -> None:
        """See `OnTraining`."""
        if not self._is_mine(optimizer, trains=True):
            return
        self.updates_itself = False
        parameters = parameters_of(optimizer)
        if not parameters:
            self._steps_without_gradient(optimizer)
            return
        why = why_without_numbers(parameters[0])
        if why is not None and all(why_without_numbers(p) for p in parameters):
            raise UnreadableError(why)
        if id(optimizer) in self._moved:  # the same gradients again, or some that nobody computed here
            self._begin()
        self._open.add(id(optimizer))
        now = self.now
        now.count_losses_of(parameters)
        if optimizer not in self._optimizers:
            self._optimizers.add(optimizer)
            what = OptimizerSeen(
                name=type(optimizer).__name__,
                parameters=sum(p.numel() for p in parameters),
                devices=tuple(sorted({device_name(p.device) for p in parameters})),
                dtypes=tuple(sorted({str(p.dtype).removeprefix("torch.") for p in parameters})),
            )
            self._guard.event(what, step=now.number)
        self._see_lrs(optimizer)
        self._probes.before_update(now, optimizer)
        with self._guard.measuring("gradients and weights", now.number):
            self._parameters.before_update(now, optimizer)
        with self._guard.measuring("attention form", now.number):
            self._forms.before_update(now, optimizer)

    @_guarded("update")
    def after_update(self, optimizer: torch.optim.Optimizer) -> None:
        """See `OnTraining`."""
        if id(optimizer) not in self._open:
            return
        self._open.discard(id(optimizer))
        self._moved.add(id(optimizer))
        self._on_forward_over()  # where no loss was seen
        self.updates += 1
        self.stepped = self.now.updated = True
        with self._guard.measuring("attention form", self.now.number):
            self._forms.after_update(self.now, optimizer)
        self._parameters.after_update(self.now, optimizer)

    # -- from step to step --

    def end(self) -> None:
        """Nothing more comes: what was seen of the last step counts if there was anything to it."""
        if self.stepped or self.now.losses or (self.now.heads and not self.updates):
            self._add()

    def forked(self) -> None:
        """This is a child process: whoever held the lock is not here."""
        self.is_on = False
        self.lock = threading.RLock()

    def _begin(self) -> None:
        if self.stepped:
            self._add()
            self._on_end()

    def _add(self) -> None:
        now = self.now
        time_now = time.perf_counter()
        now.step_ms = 1000 * (time_now - self._begun)
        self._begun = time_now
        with self._guard.measuring("gradients", now.number):
            self._parameters.end_step(now)
        self._forms.end_step()
        with self._guard.measuring("outputs of modules", now.number):
            now.outputs = self._take_outputs()
        with self._guard.measuring("residual stream", now.number):
            now.passed = self._residual.take(now.number)
        if now.updated and not now.losses:
            self._lacks_loss(now)
        if self._moved_nothing and not now.updated and not self._lacks_gradient:
            self._lacks_gradient = True
            self._guard.event(StepWithoutGradient(optimizer=self._moved_nothing), step=now.number)
        self._moved_nothing = ""
        self._probes.end_step(now)
        self._recorder.add(now)
        self.stepped = False
        self._open.clear()
        self._moved.clear()
        number = now.number + 1
        self.now = Step(number=number, measured=number < FIRST or number % self._every == 0)

    def _lacks_loss(self, now: Step) -> None:
        self._recorder.losses_not_seen += 1
        if self._recorder.losses_not_seen == 1:
            why = "its gradients were there without a scalar that was given to backward()"
            self._guard.event(LossNotSeen(why=why), step=now.number)

    def _steps_without_gradient(self, optimizer: torch.optim.Optimizer) -> None:
        """No update, and no step where nothing was differentiated: a schedule is drawn with a dummy, perhaps."""
        now = self.now
        self.without_gradient += 1
        if not now.losses or self.stepped:
            return
        zeroed = any(id(p) in now.dropped for p in parameters_of(optimizer, with_gradient=False))
        self._probes.without_gradient(now, optimizer, zeroed=zeroed)
        self._see_lrs(optimizer)
        self.stepped = True
        self._moved_nothing = type(optimizer).__name__

    def _see_lrs(self, optimizer: torch.optim.Optimizer) -> None:
        for group in optimizer.param_groups:
            lr = group.get("lr")
            if lr is not None:
                self.now.lrs.append(lr.detach().clone() if isinstance(lr, Tensor) else float(lr))

    def _is_mine(self, part: object | None, *, trains: bool = False) -> bool:
        """Whether it is the training that is recorded; copies that DataParallel runs in threads are, too."""
        if getattr(part, "_is_replica", False) or (not trains and not torch.is_grad_enabled()):
            return True
        mine = self._turns.is_mine(part, trains=trains)
        if not mine:
            self._guard.not_measured("training", self.now.number, ANOTHER_THREAD)
        return mine

    def _forget_forward(self) -> None:
        """Attention and streams were those of another training."""
        self.now.heads.clear()
        self.now.purposes.clear()
        self._residual.forget()

    def _on_left_out(self, name: str, reason: str) -> None:
        self._guard.not_measured(name, self.now.number, reason)
