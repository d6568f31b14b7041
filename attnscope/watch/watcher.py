"""The watcher: what has been seen of the step that goes on, and where it is recorded.

One watcher at a time: what it replaces in PyTorch belongs to the whole process.
"""

import functools
import os
import sys
import time
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from attnscope.capture.dispatch import Original, unobserved
from attnscope.capture.eager import Capture, in_backward
from attnscope.capture.names import Modules, any_alive, called_by_torch
from attnscope.capture.patches import Patches
from attnscope.capture.seen import Seen, scalar_factor
from attnscope.errors import RunError, RunWriteError
from attnscope.watch.finite import Finite
from attnscope.watch.layers import Layers
from attnscope.watch.parameters import Parameters, parameters_of
from attnscope.watch.recording import MOST_PLACES, Recorder, Step, broken_gradients
from attnscope.watch.settings import Settings
from attnscope.watch.snapshots import Snapshots
from attnscope.watch.stopping import Stopper, stop
from attnscope.watch.training import Training

if TYPE_CHECKING:
    from attnscope.capture.compiled import Probes

FLUSH_SECONDS = 0.75  # a killed process loses at most this and the step it was in
FIRST = 20  # steps that are all measured, whatever the cadence: what explodes, explodes early
MOST_LOSSES = 1000  # of one step
MOST_TEXT = 500  # characters of an exception

_T = TypeVar("_T")
_P = ParamSpec("_P")
_watching: "Watcher | None" = None


def _guarded(method: Callable[_P, None]) -> Callable[_P, None]:
    """What goes wrong in watching must not go wrong in the script."""

    @functools.wraps(method)
    def guarded(*args: _P.args, **kwargs: _P.kwargs) -> None:
        try:
            with unobserved():
                method(*args, **kwargs)
        except Exception as error:
            watcher = args[0]
            assert isinstance(watcher, Watcher)
            watcher.fail(error)

    return guarded


class Watcher:
    """What has been seen of the step that goes on, and where it is recorded.

    Invariants: nothing is replaced in PyTorch before `start` or after `stop`. A child process records nothing.
    """

    path: Path
    failure: Exception | None

    def __init__(
        self, path: Path, recorder: Recorder, modules: Modules, settings: Settings
    ) -> None:
        """Use `watch_model` or `watch_script`."""
        self.path = path
        self.failure = None
        self._recorder = recorder
        self._every = settings.every
        conditions = settings.checked()
        self._stopper = Stopper(conditions) if conditions else None
        self._process = os.getpid()
        self._modules = modules
        self._layers = Layers(
            self._modules,
            rows=settings.rows,
            patterns=settings.layers,
            on_layer=recorder.add_layer,
            on_event=self._event,
        )
        self._parameters = Parameters()
        self._snapshots = (
            Snapshots(settings.snapshot, self._step_of_forward) if settings.snapshot else None
        )
        self._written: tuple[Path, ...] = ()
        self._optimizers: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
        self._stepped = False
        self._updates_itself: bool | None = None  # a script without optimizers: each loss is a step
        self._updates = 0
        self._begun = time.perf_counter()
        self._now = Step(number=0, measured=True)
        self._is_on = False
        self._probes: Probes | None = None
        self._seeing = Patches(lambda: self._is_on and (self._now.measured or self._stepped))
        self._hearing = Patches(lambda: self._is_on)
        self._checking = Patches(lambda: self._is_on)

    # -- from here on, what the user calls --

    def __enter__(self) -> "Watcher":
        return self

    def __exit__(
        self, _kind: object, error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.stop_after(error)

    def start(self) -> None:
        """Begin to look.

        Raises:
            RunError: somebody watches already.
        """
        global _watching
        if _watching is not None:
            raise RunError(
                f"{self.path}: this process is being watched already, into {_watching.path}. Stop that one first."
            )
        _watching = self
        self._is_on = True
        self._capture = Capture(
            self._seeing, on_attention=self._on_attention, on_unmeasured=self._on_unmeasured
        )
        self._finite = Finite(self._checking, on_call=self._on_forward, on_failure=self.fail)
        self._training = Training(self._hearing, self)
        self._hearing.replace([torch], "compile", self._compile)
        if "torch._dynamo" in sys.modules:  # something may be compiled already, and be traced later
            self._install_probes()

    def mute(self) -> None:
        """Record nothing more."""
        self._is_on = False

    def add_model(self, model: nn.Module) -> None:
        """Take the names of modules and parameters from this model."""
        self._modules.add(model)

    def stop(self, status: str = "finished", **fields: object) -> None:
        """Put PyTorch back as it was, and write what is left. Said twice, the first one counts.

        Where the disk does not take it, there is a warning, and `failure` says why.
        """
        global _watching
        if _watching is not self:
            return
        _watching = None
        self._is_on = False
        self._training.remove()
        if self._probes is not None:
            self._probes.remove()
        for patches in (self._checking, self._hearing, self._seeing):
            patches.restore()
        self._capture.forget()
        if os.getpid() == self._process:
            self._finish(status, **fields)
        if self._snapshots is not None:
            self._snapshots.remove()

    def _finish(self, status: str, **fields: object) -> None:
        if self._stepped or self._now.losses or (self._now.heads and not self._updates):
            self._add_step()
        if self._snapshots is not None:
            self._write(self._recorder.flush)
            self._snapshot(str(fields.get("error", "")) or self._recorder.broken)
        self._write(
            lambda: self._recorder.finish(
                status,
                updates=self._updates,
                attention_layers=len(self._layers.names),
                attention_calls=self._layers.calls,
                **fields,
            )
        )

    def stop_after(self, error: BaseException | None) -> None:
        """Stop, and say that training ended with this exception, or with none."""
        if error is None or isinstance(error, SystemExit):
            self.stop("finished")
        elif isinstance(error, KeyboardInterrupt):
            self.stop("interrupted")
        else:
            self.stop("failed", error=f"{type(error).__name__}: {error}"[:MOST_TEXT])

    @property
    def updates(self) -> int:
        """Optimizer updates seen."""
        return self._updates

    @property
    def took_losses_for_steps(self) -> bool:
        """Whether no optimizer was there, so that each loss that was differentiated counts as a step."""
        return bool(self._updates_itself)

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the attention layers measured, in the order of their first calls."""
        return self._layers.names

    @property
    def left_out(self) -> tuple[str, ...]:
        """Names of the attention layers seen that were not asked for."""
        return self._layers.left_out

    @property
    def snapshots(self) -> tuple[Path, ...]:
        """Files with what led to the break, if there was one."""
        return self._written

    @property
    def unmeasured(self) -> int:
        """How many different calls could not be measured."""
        return self._layers.n_unmeasured

    # -- from here on, what the script does --

    def _on_forward(self, _module: nn.Module | None) -> None:
        """Something is computed: the step before is over, if there was one."""
        if self._stepped:
            self._end_step()
        if self._snapshots is not None:
            self._snapshots.attach()

    def _step_of_forward(self) -> int:
        if self._stepped:
            self._end_step()
        return self._now.number

    def _on_attention(self, module: nn.Module | None, seen: Seen) -> None:
        self._on_forward(module)
        if self._now.measured:
            self._layers.see(self._now, module, seen)

    def _on_unmeasured(
        self, module: nn.Module | None, backend: str, shapes: list[list[int]], reason: str
    ) -> None:
        self._on_forward(module)
        self._layers.unmeasured(self._now, module, backend, shapes, reason)

    def _on_compiled(
        self,
        module: nn.Module | None,
        backend: str,
        tensors: list[Tensor],
        see: Callable[[], Seen],
    ) -> None:
        wanted = self._now.measured or self._stepped or self._snapshots is not None
        is_seen = self._seeing.is_looking()  # a function that is replaced may be compiled itself
        if self._is_on and wanted and not is_seen and not in_backward():
            with self._seeing.undisturbed(), torch.no_grad():
                self._capture.hand_on(module, backend, tensors, see)

    def _compile(self, original: Original, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        backend = kwargs.get("backend", "inductor")
        if backend == "inductor":
            self._install_probes()
        elif not called_by_torch():  # eager FlexAttention compiles itself, for another backend
            self._on_unmeasured(
                None,
                "compiled",
                [],
                f"torch.compile with backend {backend!r}: only inductor's graphs can be watched",
            )
        return original(*args, **kwargs)

    def _install_probes(self) -> None:
        if self._probes is None:
            from attnscope.capture.compiled import Probes

            self._probes = Probes(
                self._on_compiled, lambda reason: self._on_unmeasured(None, "compiled", [], reason)
            )

    @_guarded
    def loss(self, loss: Tensor, *, adds_up: bool) -> None:
        """See `OnTraining`."""
        if self._stepped:
            self._end_step()
        if self._updates_itself is None:
            self._updates_itself = not any_alive(torch.optim.Optimizer)
        elif len(self._now.losses) >= MOST_LOSSES:  # its optimizers step where we cannot see it
            self._updates_itself = True
        self._stepped = self._updates_itself
        seen = loss.detach().clone()
        if adds_up and self._now.losses:
            seen += self._now.losses.pop()[0]
        self._now.losses.append((seen, scalar_factor(loss)))
        self._capture.forget()  # the forward pass is over

    @_guarded
    def before_clipping(self, parameters: list[Tensor]) -> None:
        """See `OnTraining`."""
        self._parameters.see_gradients(self._now, parameters)

    @_guarded
    def clipped(self, factor: Tensor | None, total_norm_before: Tensor | None) -> None:
        """See `OnTraining`."""
        now = self._now
        if now.grad_norm is None:
            now.grad_norm = total_norm_before
        if now.clip_factor is None:
            now.clip_factor = factor

    @_guarded
    def scaled(self, loss_scale: Tensor) -> None:
        """See `OnTraining`."""
        self._now.loss_scale = loss_scale

    @_guarded
    def skipped(self, optimizer: torch.optim.Optimizer) -> None:
        """See `OnTraining`."""
        now = self._now
        self._parameters.see_gradients(now, parameters_of(optimizer))
        self._event(
            "skipped_update",
            step=now.number,
            why="GradScaler found NaN or Inf in the gradient",
            where=broken_gradients(now)[:MOST_PLACES],
        )
        self._parameters.skip(now)
        now.grad_norm = now.clip_factor = None

    @_guarded
    def before_update(self, optimizer: torch.optim.Optimizer) -> None:
        """See `OnTraining`."""
        if not self._is_on:
            return
        self._updates_itself = False
        parameters = parameters_of(optimizer)
        now = self._now
        if optimizer not in self._optimizers:
            self._optimizers.add(optimizer)
            kind, n_parameters = type(optimizer).__name__, sum(p.numel() for p in parameters)
            self._event("optimizer", step=now.number, name=kind, parameters=n_parameters)
        for group in optimizer.param_groups:
            if "lr" in group:
                lr = group["lr"]
                now.lrs.append(lr.detach().clone() if isinstance(lr, Tensor) else float(lr))
        self._parameters.before_update(now, optimizer)

    @_guarded
    def after_update(self, optimizer: torch.optim.Optimizer) -> None:
        """See `OnTraining`."""
        if self._is_on:
            self._capture.forget()
            self._updates += 1
            self._stepped = True
            self._parameters.after_update(self._now, optimizer)

    def _end_step(self) -> None:
        """The step is over, as the next one begins; here the script may be stopped."""
        self._add_step()
        if self._stopper is None and self._snapshots is None:
            if self._recorder.due(FLUSH_SECONDS):
                self._write(self._recorder.flush)
            return
        tables = self._write(self._recorder.flush)
        met = None if tables is None or self._stopper is None else self._stopper.met(tables)
        self._snapshot(self._recorder.broken if met is None else met[1])
        if met is not None:
            condition, found = met
            self._event("stopped", step=self._now.number, on=condition.text, found=found)
            self._stopper = None
            stop(condition, found)

    def _snapshot(self, why: str | None) -> None:
        """Training broke, or nothing happened: then `why` is None. Only the first time is kept."""
        if self._snapshots is None or not why or self.failure is not None:
            return
        snapshots, self._snapshots = self._snapshots, None
        step = self._now.number
        try:
            paths = snapshots.write(self._recorder.folder)
        except Exception as error:
            self._event("snapshot_failed", step=step, reason=str(error)[:MOST_TEXT])
        else:
            self._written = tuple(paths)
            if paths:
                self._event("snapshot", step=step, why=why, files=[path.name for path in paths])
        finally:
            snapshots.remove()

    def _add_step(self) -> None:
        now = self._now
        time_now = time.perf_counter()
        now.step_ms = 1000 * (time_now - self._begun)
        self._begun = time_now
        self._parameters.end_step(now)
        now.outputs = self._finite.end_step()
        self._recorder.add(now)
        self._stepped = False
        number = now.number + 1
        self._now = Step(number=number, measured=number < FIRST or number % self._every == 0)

    def _event(self, kind: str, *, step: int, **fields: object) -> None:
        self._write(lambda: self._recorder.event(kind, step=step, **fields))

    def _write(self, write: Callable[[], _T]) -> _T | None:
        """Write to the run directory, unless that failed before."""
        if self.failure is not None:
            return None
        try:
            with self._seeing.undisturbed():
                return write()
        except Exception as error:
            self.fail(error)
            return None

    def fail(self, error: Exception) -> None:
        """Training goes on unwatched, and it is said once."""
        if self.failure is None:
            self.failure = error
            self.mute()
            said = str(error) if isinstance(error, RunWriteError) else repr(error)
            warnings.warn(f"attnscope no longer watches: {said}", RuntimeWarning, stacklevel=2)


def watching() -> Watcher | None:
    """The watcher of this process."""
    return _watching


def _forked() -> None:
    """A child has our patches, but the run directory is its parent's."""
    if _watching is not None:
        _watching.mute()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
