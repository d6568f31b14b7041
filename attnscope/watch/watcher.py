"""The watcher: what has been seen of the step that goes on, and where it is recorded.

One watcher at a time: what it replaces in PyTorch belongs to the whole process.
"""

import atexit
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from attnscope.capture.dispatch import Original
from attnscope.capture.eager import Capture, in_backward
from attnscope.capture.names import Modules, called_by_torch
from attnscope.capture.patches import Patches
from attnscope.capture.seen import Seen
from attnscope.errors import RunError, RunWriteError
from attnscope.runs.events import SnapshotFailed, SnapshotTaken, Stopped
from attnscope.signals.journal import FLUSH_SECONDS, interrupts_wait
from attnscope.watch.finite import Finite, Outputs
from attnscope.watch.guard import MOST_TEXT, Guard, one_line
from attnscope.watch.layers import Layers
from attnscope.watch.probes import FirstLooks
from attnscope.watch.recording import Tables, WatchRecorder
from attnscope.watch.residual import Residual
from attnscope.watch.settings import Settings
from attnscope.watch.snapshots import Snapshots
from attnscope.watch.steps import Steps
from attnscope.watch.stopping import stop
from attnscope.watch.training import Training

if TYPE_CHECKING:
    from attnscope.capture.compiled import Probes

_watching: "Watcher | None" = None


class Watcher:
    """What has been seen of the step that goes on, and where it is recorded.

    Invariants: nothing is replaced in PyTorch before `start` or after `stop`. A child process records nothing.
    """

    path: Path

    def __init__(self, path: Path, recorder: WatchRecorder, modules: Modules, settings: Settings) -> None:
        """Use `watch_model` or `watch_script`."""
        self.path = path
        self._recorder = recorder
        self._conditions = settings.checked().stop_on
        self._process = os.getpid()
        self._modules = modules
        self._guard = Guard(recorder, on_failure=self.mute)
        self._layers = Layers(
            self._modules,
            rows=settings.rows,
            patterns=settings.layers,
            on_layer=recorder.add_layer,
            on_unmeasured=lambda what, step: self._guard.event(what, step=step),
        )
        self._residual = Residual(modules, on_event=self._guard.event)
        self._first_looks = FirstLooks(modules, self._guard, rows=settings.rows)
        self._steps = Steps(
            recorder=recorder,
            modules=modules,
            layers=self._layers,
            residual=self._residual,
            probes=self._first_looks,
            guard=self._guard,
            every=settings.every,
            take_outputs=self._take_outputs,
            on_forward_over=self._forward_over,
            on_end=self._step_over,
        )
        self._snapshots = Snapshots(settings.snapshot, self._step_of_forward) if settings.snapshot else None
        self._written: tuple[Path, ...] = ()
        self._probes: Probes | None = None
        steps = self._steps
        self._seeing = Patches(lambda: steps.is_on and (steps.now.measured or steps.stepped), self._failed("attention"))
        self._hearing = Patches(lambda: steps.is_on, self._failed("training"))
        self._checking = Patches(lambda: steps.is_on, self._failed("outputs of modules"))
        self._following = Patches(
            lambda: steps.is_on and (steps.now.measured or steps.stepped), self._failed("residual stream")
        )
        self._reading = Patches(lambda: steps.is_on, self._failed("token ids"))

    # -- from here on, what the user calls --

    def __enter__(self) -> "Watcher":
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: TracebackType | None) -> None:
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
        self._steps.is_on = True
        self._capture = Capture(self._seeing, on_attention=self._on_attention, on_unmeasured=self._on_unmeasured)
        self._finite = Finite(
            self._checking,
            on_call=self._on_forward,
            on_call_without_gradients=self._first_looks.computed_without_gradients,
            on_norm=lambda *norm: self._first_looks.normalized(self._steps.now, *norm),
        )
        self._reading.listen("embedding", self._on_embedding)
        self._training = Training(self._hearing, self._steps)
        self._residual.listen(self._following, self._on_passing)
        self._hearing.replace([torch], "compile", self._compile)
        if "torch._dynamo" in sys.modules:  # something may be compiled already, and be traced later
            self._install_probes()

    def stop_with_process(self) -> None:
        """Stop at the end of this process, if nobody does before."""
        self._reported = id(getattr(sys, "last_value", None))
        atexit.register(self._at_exit)

    def _at_exit(self) -> None:
        error = getattr(sys, "last_value", None)  # of what ended the script, if anything did
        self.stop_after(None if id(error) == self._reported else error)

    def mute(self) -> None:
        """Record nothing more."""
        self._steps.is_on = False

    def forked(self) -> None:
        """This is a child process: the run directory is its parent's."""
        self._steps.forked()

    def add_model(self, model: nn.Module) -> None:
        """Take the names of modules and parameters from this model."""
        self._modules.add(model)

    def uses_optimizer(self) -> None:
        """The script updates with an optimizer: nobody need look for one."""
        self._steps.updates_itself = False

    def stop(self, status: str = "finished", **fields: object) -> None:
        """Put PyTorch back as it was, and write what is left. Said twice, the first one counts.

        Where the disk does not take it, there is a warning, and `failure` says why.
        """
        global _watching
        if _watching is not self:
            return
        _watching = None
        atexit.unregister(self._at_exit)
        with self._steps.lock:  # other threads may train
            self._steps.is_on = False
            self._training.remove()
            if self._probes is not None:
                self._probes.remove()
            for patches in (self._following, self._reading, self._checking, self._hearing, self._seeing):
                patches.restore()
            self._capture.forget()
            if os.getpid() == self._process:
                self._finish(status, **fields)
            if self._snapshots is not None:
                self._snapshots.remove()

    def _finish(self, status: str, **fields: object) -> None:
        steps, guard = self._steps, self._guard
        now = steps.now.number
        with guard.measuring("last step", now):
            steps.end()
        self._first_looks.finish(steps.now)
        if self._snapshots is not None:
            guard.write("records", now, lambda: self._recorder.flush(guard.measuring))
            self._snapshot(str(fields.get("error", "")) or self._recorder.broken)
        said = {
            "updates": steps.updates,
            "attention_layers": len(self._layers.names),
            "attention_calls": self._layers.calls,
            **fields,
        }
        more = {
            "steps_without_gradient": steps.without_gradient,
            "losses_not_seen": self._recorder.losses_not_seen,
            "measurements_failed": guard.counts,
        }
        said |= {name: value for name, value in more.items() if value}
        with guard.measuring("end", now):
            self._recorder.finish(status, guard.measuring, step=now, why_empty=self._residual.why_empty, **said)

    def stop_after(self, error: BaseException | None) -> None:
        """Stop, and say that training ended with this exception, or with none."""
        if error is None or isinstance(error, SystemExit):
            self.stop("finished")
        elif isinstance(error, KeyboardInterrupt):
            self.stop("interrupted")
        else:
            said = traceback.format_exception_only(error)[-1].strip()
            self.stop("failed", error=said[:MOST_TEXT])

    @property
    def failure(self) -> RunWriteError | None:
        """Why nothing more could be written; None = everything was."""
        return self._guard.failure

    @property
    def updates(self) -> int:
        """Optimizer updates seen: steps of optimizers that had gradients."""
        return self._steps.updates

    @property
    def took_losses_for_steps(self) -> bool:
        """Whether no optimizer was there, so that each loss that was differentiated counts as a step."""
        return bool(self._steps.updates_itself)

    @property
    def steps_without_gradient(self) -> int:
        """How often an optimizer stepped where none of its parameters had a gradient."""
        return self._steps.without_gradient

    @property
    def losses_not_seen(self) -> int:
        """Steps whose gradients were there without a scalar that was given to backward()."""
        return self._recorder.losses_not_seen

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

    @property
    def reasons(self) -> dict[str, tuple[str, ...]]:
        """Why calls could not be measured, to the names of the layers that made them."""
        return self._layers.reasons

    @property
    def failed(self) -> tuple[str, ...]:
        """What else could not be measured, and why, a line each."""
        return self._guard.said

    # -- from here on, what the script does --

    def _on_forward(self, module: nn.Module | None) -> None:
        """Something is computed: the step before is over, if there was one."""
        if self._steps.stepped:
            self._steps.computed()
        self._first_looks.computed(self._steps.now, module)
        if self._snapshots is not None:
            with self._steps.trying("snapshot"):
                self._snapshots.attach()

    def _on_embedding(self, args: tuple[Any, ...], _kwargs: dict[str, Any], _out: Any) -> None:
        self._steps.computed()
        self._first_looks.embedded(self._steps.now, args)

    def _step_of_forward(self) -> int:
        self._steps.computed()
        return self._steps.now.number

    def _on_attention(self, module: nn.Module | None, seen: Seen) -> None:
        self._on_forward(module)
        with self._following.undisturbed():
            self._steps.attention(module, seen)

    def _on_passing(self, look: Callable[[int], None]) -> None:
        with self._seeing.undisturbed():
            self._steps.passing(look)

    def _forward_over(self) -> None:
        self._capture.forget()
        self._residual.over()

    def _on_unmeasured(self, module: nn.Module | None, backend: str, shapes: list[list[int]], reason: str) -> None:
        self._on_forward(module)
        self._steps.unmeasured(module, backend, shapes, reason)

    def _take_outputs(self) -> Outputs | None:
        return self._finite.end_step()

    def _failed(self, what: str) -> Callable[[Exception], None]:
        def failed(error: Exception) -> None:
            self._guard.not_measured(what, self._steps.now.number, one_line(error))

        return failed

    def _on_compiled(
        self,
        module: nn.Module | None,
        backend: str,
        tensors: list[Tensor],
        see: Callable[[], Seen],
    ) -> None:
        steps = self._steps
        wanted = steps.now.measured or steps.stepped or self._snapshots is not None
        is_seen = self._seeing.is_looking()  # a function that is replaced may be compiled itself
        if steps.is_on and wanted and not is_seen and not in_backward():
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

            self._probes = Probes(self._on_compiled, lambda reason: self._on_unmeasured(None, "compiled", [], reason))

    def _step_over(self) -> None:
        """A step is over, as the next one begins; here the script may be stopped."""
        step = self._steps.now.number
        if not self._conditions and self._snapshots is None:
            if self._recorder.due(FLUSH_SECONDS):
                self._flush(step)
            return
        tables = self._flush(step)
        met = None
        if tables is not None and self._conditions:
            with self._guard.measuring("stop-on", step):
                met = self._recorder.met(self._conditions, tables)
        self._snapshot(self._recorder.broken if met is None else met[1])
        if met is not None:
            condition, found = met
            self._guard.event(Stopped(on=condition.text, found=found), step=step)
            self._conditions = ()
            stop(condition, found)

    def _flush(self, step: int) -> Tables | None:
        with interrupts_wait(), self._seeing.undisturbed():
            self._first_looks.flush(self._steps.now)
            return self._guard.write("records", step, lambda: self._recorder.flush(self._guard.measuring))

    def _snapshot(self, why: str | None) -> None:
        """Training broke, or nothing happened: then `why` is None. Only the first time is kept."""
        if self._snapshots is None or not why or self.failure is not None:
            return
        snapshots, self._snapshots = self._snapshots, None
        step = self._steps.now.number
        try:
            paths = snapshots.write(self._recorder.folder)
        except Exception as error:
            self._guard.event(SnapshotFailed(reason=str(error)[:MOST_TEXT]), step=step)
        else:
            self._written = tuple(paths)
            if paths:
                names = tuple(path.name for path in paths)
                self._guard.event(SnapshotTaken(why=why, files=names), step=step)
        finally:
            snapshots.remove()


def watching() -> Watcher | None:
    """The watcher of this process."""
    return _watching


def _forked() -> None:
    """A child has our patches, but the run directory is its parent's."""
    if _watching is not None:
        _watching.forked()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
