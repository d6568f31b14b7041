"""The watcher: what has been seen of the step that goes on, and where it is recorded.

One watcher at a time: what it replaces in PyTorch belongs to the whole process.
"""

import functools
import os
import sys
import time
import warnings
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from attnscope.errors import RunError, RunWriteError
from attnscope.watch.attention import Seen, measure, scalar_factor
from attnscope.watch.capture import Capture, in_backward
from attnscope.watch.names import Modules, parameter_names, places
from attnscope.watch.parameters import Before, gradient_sizes, parameters_of, total_norm
from attnscope.watch.patches import Original, Patches
from attnscope.watch.recording import PARAMETER_COLUMNS, Layer, Recorder, Step
from attnscope.watch.stopping import Stopper, stop
from attnscope.watch.training import Training

if TYPE_CHECKING:
    from attnscope.watch.compiled import Probes

FLUSH_SECONDS = 0.75  # a killed process loses at most this and the step it was in
FIRST = 20  # steps that are all measured, whatever the cadence: what explodes, explodes early
SAMPLES = 64  # different row samples, used in turn
MOST_TEXT = 500  # characters of an exception
MOST_UNMEASURED = 50  # different calls that are described

_T = TypeVar("_T")
_P = ParamSpec("_P")
_watching: "Watcher | None" = None


def _guarded(method: Callable[_P, None]) -> Callable[_P, None]:
    """What goes wrong in watching must not go wrong in the script."""

    @functools.wraps(method)
    def guarded(*args: _P.args, **kwargs: _P.kwargs) -> None:
        try:
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
    losses_add_up: bool  # those of a step's micro-batches, to its mean; else they are looked at

    def __init__(
        self,
        path: Path,
        recorder: Recorder,
        *,
        every: int,
        rows: int | str,
        stopper: Stopper | None,
    ) -> None:
        """Use `watch_model` or `watch_script`."""
        self.path = path
        self.failure = None
        self._stopper = stopper
        self._recorder = recorder
        self._every = every
        self._rows = rows
        self._process = os.getpid()
        self._modules = Modules()
        self._layers: dict[str, int] = {}
        self._places: dict[int, tuple[int, str]] = {}
        self._names: dict[int, str] = {}
        self._before: dict[int, tuple[list[Tensor], Before]] = {}
        self._gradients: list[tuple[list[int], dict[str, Tensor]]] = []
        self._optimizers: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
        self._unmeasured: set[tuple[object, ...]] = set()
        self._stepped = False
        self._updates = 0
        self._calls = 0
        self._begun = time.perf_counter()
        self._now = Step(number=0, measured=True)
        self.losses_add_up = False
        self._is_on = False
        self._probes: Probes | None = None
        self._seeing = Patches(lambda: self._is_on and (self._now.measured or self._stepped))
        self._hearing = Patches(lambda: self._is_on)

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
        self._hearing.restore()
        self._seeing.restore()
        self._capture.forget()
        if os.getpid() != self._process:
            return
        if self._stepped or self._now.losses or (self._now.heads and not self._updates):
            self._add_step()
        self._write(
            lambda: self._recorder.finish(
                status,
                updates=self._updates,
                attention_layers=len(self._layers),
                attention_calls=self._calls,
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
    def layers(self) -> tuple[str, ...]:
        """Names of the attention layers seen, in the order of their first calls."""
        return tuple(self._layers)

    @property
    def unmeasured(self) -> int:
        """How many different calls could not be measured."""
        return len(self._unmeasured)

    # -- from here on, what the script does --

    def _on_attention(self, module: nn.Module | None, seen: Seen) -> None:
        if self._stepped:
            self._end_step()
        if not self._now.measured:
            return
        self._calls += 1
        name = "attention" if module is None else self._modules.name_of(module)
        measured = measure(seen, rows=self._rows, seed=self._now.number % SAMPLES)
        layer = self._layers.get(name)
        if layer is None:
            layer = self._layers[name] = len(self._layers)
            self._recorder.add_layer(
                self._now.number,
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
        trains = torch.is_grad_enabled() if module is None else module.training
        now = self._now
        if trains and layer not in now.training:  # evaluation counts only where nothing else is
            now.training.add(layer)
            now.heads[layer] = []
        if trains or layer not in now.training:
            now.heads.setdefault(layer, []).append(measured.columns_CH)

    def _on_unmeasured(
        self, module: nn.Module | None, backend: str, shapes: list[list[int]], reason: str
    ) -> None:
        if self._stepped:
            self._end_step()
        name = "attention" if module is None else self._modules.name_of(module)
        key = (name, backend, reason)
        if key in self._unmeasured or len(self._unmeasured) >= MOST_UNMEASURED:
            return
        self._unmeasured.add(key)
        self._event(
            "not_measured",
            step=self._now.number,
            name=name,
            backend=backend,
            shapes=shapes,
            reason=reason,
        )

    def _on_compiled(
        self,
        module: nn.Module | None,
        backend: str,
        tensors: list[Tensor],
        see: Callable[[], Seen],
    ) -> None:
        if self._is_on and (self._now.measured or self._stepped) and not in_backward():
            with self._seeing.undisturbed(), torch.no_grad():
                self._capture.hand_on(module, backend, tensors, see)

    def _compile(self, original: Original, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        backend = kwargs.get("backend", "inductor")
        if backend == "inductor":
            self._install_probes()
        else:
            self._on_unmeasured(
                None,
                "compiled",
                [],
                f"torch.compile with backend {backend!r}: only inductor's graphs can be watched",
            )
        return original(*args, **kwargs)

    def _install_probes(self) -> None:
        if self._probes is None:
            from attnscope.watch.compiled import Probes

            self._probes = Probes(
                self._on_compiled, lambda reason: self._on_unmeasured(None, "compiled", [], reason)
            )

    @_guarded
    def loss(self, loss: Tensor) -> None:
        """See `OnTraining`."""
        if self._stepped:
            self._end_step()
        seen = loss.detach().clone()
        if self.losses_add_up and self._now.losses:
            seen += self._now.losses.pop()[0]
        self._now.losses.append((seen, scalar_factor(loss)))

    @_guarded
    def before_clipping(self, parameters: list[Tensor]) -> None:
        """See `OnTraining`."""
        if self._now.measured:
            self._measure_gradients(parameters)

    @_guarded
    def clipped(self, factor: Tensor | None, total_norm_before: Tensor | None) -> None:
        """See `OnTraining`."""
        now = self._now
        if now.grad_norm is None:
            now.grad_norm = total_norm_before
        if now.clip_factor is None:
            now.clip_factor = factor

    @_guarded
    def scaled(self, loss_scale: Tensor | None, *, skipped: bool) -> None:
        """See `OnTraining`."""
        if skipped:
            self._event(
                "skipped_update",
                step=self._now.number,
                why="GradScaler found NaN or Inf in the gradient",
            )
        elif loss_scale is not None:
            self._now.loss_scale = loss_scale

    @_guarded
    def before_update(self, optimizer: torch.optim.Optimizer) -> None:
        """See `OnTraining`."""
        if not self._is_on:
            return
        parameters = parameters_of(optimizer)
        now = self._now
        if optimizer not in self._optimizers:
            self._optimizers.add(optimizer)
            kind, n_parameters = type(optimizer).__name__, sum(p.numel() for p in parameters)
            self._event("optimizer", step=now.number, name=kind, parameters=n_parameters)
        if now.grad_norm is None:
            now.grad_norm = total_norm(parameters)
        now.lr = max(
            (float(group["lr"]) for group in optimizer.param_groups if "lr" in group),
            default=now.lr,
        )
        if now.measured and parameters:
            self._measure_gradients(parameters)
            self._before[id(optimizer)] = parameters, Before(parameters)

    @_guarded
    def after_update(self, optimizer: torch.optim.Optimizer) -> None:
        """See `OnTraining`."""
        if not self._is_on:
            return
        self._updates += 1
        self._stepped = True
        if id(optimizer) not in self._before:
            return
        parameters, before = self._before.pop(id(optimizer))
        ids = [key for keys, _ in self._gradients for key in keys]
        at = {key: place for place, key in enumerate(ids)}
        index_P = torch.tensor([at[id(p)] for p in parameters], device=before.weight_norm_P.device)
        sizes = {
            name: torch.cat([sizes[name] for _, sizes in self._gradients]).index_select(0, index_P)
            for name in ("grad_norm", "grad_max", "nonfinite")
        }
        sizes |= {"weight_norm": before.weight_norm_P, "update_norm": before.update_norm_P()}
        now = self._now
        now.parameters += self._places_of(parameters)
        for name in PARAMETER_COLUMNS:
            now.sizes.setdefault(name, []).append(sizes[name])

    def _measure_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Once per step and parameter: the first time is before clipping."""
        known = {key for keys, _ in self._gradients for key in keys}
        new = [p for p in parameters if p.grad is not None and id(p) not in known]
        if new:
            self._gradients.append(([id(p) for p in new], gradient_sizes(new)))

    def _places_of(self, parameters: Sequence[Tensor]) -> list[tuple[int, str]]:
        if any(id(p) not in self._names for p in parameters):
            self._names |= parameter_names(list(parameters))
            self._places = places(self._names)
        return [self._places[id(p)] for p in parameters]

    def _end_step(self) -> None:
        """The step is over, as the next one begins; here the script may be stopped."""
        self._add_step()
        if self._stopper is None:
            if self._recorder.due(FLUSH_SECONDS):
                self._write(self._recorder.flush)
            return
        tables = self._write(self._recorder.flush)
        met = None if tables is None else self._stopper.met(tables)
        if met is not None:
            condition, found = met
            step = self._now.number
            self._event("stopped", step=step, on=condition.text, found=found)
            self._stopper = None
            stop(condition, found)

    def _add_step(self) -> None:
        now = self._now
        time_now = time.perf_counter()
        now.step_ms = 1000 * (time_now - self._begun)
        self._begun = time_now
        self._recorder.add(now)
        self._gradients.clear()
        self._before.clear()
        self._capture.forget()
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
