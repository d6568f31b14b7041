"""Watches the training that goes on in this process, into a run directory.

One watcher at a time: what it replaces in PyTorch belongs to the whole process.
"""

import os
import platform
import sys
import time
import weakref
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from attnscope.errors import RunError
from attnscope.runs.layout import RUN_FILE, MemberEntry
from attnscope.runs.writer import RunWriter, next_run_path
from attnscope.watch.attention import Seen, measure, scalar_factor
from attnscope.watch.capture import Capture, in_backward
from attnscope.watch.names import Modules, parameter_names, places
from attnscope.watch.parameters import Before, gradient_sizes, total_norm
from attnscope.watch.patches import Original, Patches
from attnscope.watch.recording import PARAMETER_COLUMNS, Layer, Recorder, Step
from attnscope.watch.training import Training

if TYPE_CHECKING:
    from attnscope.watch.compiled import Probes

FLUSH_SECONDS = 0.75  # a killed process loses at most this and the step it was in
EVERY = 10  # steps between those at which attention and parameters are measured
ROWS = 32  # query rows measured per head and call
SAMPLES = 64  # different row samples, used in turn
RANK_SECONDS = 60  # that other ranks wait for the run directory
MOST_TEXT = 500  # characters of an exception
MOST_UNMEASURED = 50  # different calls that are described

_watching: "Watcher | None" = None


class Watcher:
    """What has been seen of the step that goes on, and where it is recorded.

    Invariants: nothing is replaced in PyTorch before `start` or after `stop`. A child process records nothing.
    """

    path: Path

    def __init__(self, path: Path, recorder: Recorder, *, every: int, rows: int | str) -> None:
        """Use `watch_model` or `watch_script`."""
        self.path = path
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
        os.register_at_fork(after_in_child=self._forked)

    def add_model(self, model: nn.Module) -> None:
        """Take the names of modules and parameters from this model."""
        self._modules.add(model)

    def stop(self, status: str = "finished", **fields: object) -> None:
        """Put PyTorch back as it was, and write what is left. Said twice, the first one counts.

        Raises:
            RunWriteError: the disk did not take it.
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
            self._end_step()
        self._recorder.finish(
            status,
            updates=self._updates,
            attention_layers=len(self._layers),
            attention_calls=self._calls,
            **fields,
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
        self._recorder.event(
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

    def loss(self, loss: Tensor) -> None:
        """See `OnTraining`."""
        if self._stepped:
            self._end_step()
        self._now.losses.append((loss.detach().clone(), scalar_factor(loss)))

    def before_clipping(self, parameters: list[Tensor]) -> None:
        """See `OnTraining`."""
        if self._now.measured:
            self._measure_gradients(parameters)

    def clipped(self, factor: Tensor | None, total_norm_before: Tensor | None) -> None:
        """See `OnTraining`."""
        now = self._now
        if now.grad_norm is None:
            now.grad_norm = total_norm_before
        if now.clip_factor is None:
            now.clip_factor = factor

    def scaled(self, loss_scale: Tensor | None, *, skipped: bool) -> None:
        """See `OnTraining`."""
        if skipped:
            self._recorder.event(
                "skipped_update",
                step=self._now.number,
                why="GradScaler found NaN or Inf in the gradient",
            )
        elif loss_scale is not None:
            self._now.loss_scale = loss_scale

    def before_update(self, optimizer: torch.optim.Optimizer) -> None:
        """See `OnTraining`."""
        if not self._is_on:
            return
        parameters = _parameters(optimizer)
        now = self._now
        if optimizer not in self._optimizers:
            self._optimizers.add(optimizer)
            kind, n_parameters = type(optimizer).__name__, sum(p.numel() for p in parameters)
            self._recorder.event("optimizer", step=now.number, name=kind, parameters=n_parameters)
        if now.grad_norm is None:
            now.grad_norm = total_norm(parameters)
        now.lr = max(
            (float(group["lr"]) for group in optimizer.param_groups if "lr" in group),
            default=now.lr,
        )
        if now.measured and parameters:
            self._measure_gradients(parameters)
            self._before[id(optimizer)] = parameters, Before(parameters)

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
        """The step is over, as the next one begins: its record is whole."""
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
        self._now = Step(number=number, measured=number % self._every == 0)
        if self._recorder.due(FLUSH_SECONDS):
            with self._seeing.undisturbed():
                self._recorder.flush()

    def _forked(self) -> None:
        """A child has our patches, but the run directory is its parent's."""
        self._is_on = False


def watch_model(
    model: nn.Module | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    path: str | Path | None = None,
    *,
    every: int = EVERY,
    rows: int | str = ROWS,
) -> Watcher:
    """Watch the training that goes on in this process until the watcher is stopped.

    Use it as a context, or call `stop` at the end:

        with attnscope.watch_model(model, optimizer, "runs/mine"):
            train(model, optimizer)

    Args:
        model: whose modules and parameters give the names; None = they are looked for.
        optimizer: its parameters must be the model's; None = whichever steps.
        path: of the run directory, which must not exist; None makes the next free one below `runs/`.
        every: attention and parameters are measured at every so many steps; losses and gradient norms at all.
        rows: query rows per head and call, or "all".

    Raises:
        RunError: the run exists, or this process is being watched already.
        RunWriteError: the place cannot be written.
    """
    if every < 1 or (rows != "all" and (isinstance(rows, str) or rows < 1)):
        raise RunError(
            f'every is {every!r} and rows {rows!r}, but they must be at least 1 (rows may be "all").'
        )
    if optimizer is not None and model is not None:
        mine = {id(p) for p in model.parameters()}
        strange = sum(id(p) not in mine for p in _parameters(optimizer, with_gradient=False))
        if strange:
            raise RunError(
                f"{strange} parameters of the optimizer are not the model's. Give the model that is trained."
            )
    where = Path(path) if path is not None else next_run_path(Path("runs"), "watch")
    watcher = open_watcher(where, command=("attnscope.watch_model",), every=every, rows=rows)
    if model is not None:
        watcher.add_model(model)
    return watcher


def open_watcher(path: Path, *, command: Sequence[str], every: int, rows: int | str) -> Watcher:
    """Make the run directory of a watched process, or join the one that rank 0 makes, and begin to look.

    Raises:
        RunError: the run exists, or this process is being watched already.
        RunWriteError: the place cannot be written.
    """
    if _watching is not None:
        raise RunError(
            f"{path}: this process is being watched already, into {_watching.path}. Stop that one first."
        )
    rank, n_ranks = _rank()
    if rank == 0:
        names = ["watched"] if n_ranks == 1 else [f"rank {r}" for r in range(n_ranks)]
        RunWriter.create(
            path,
            command=command,
            config=None,
            members=[
                MemberEntry(name=name, part=part, index=0, settings={})
                for part, name in enumerate(names)
            ],
            environment=_environment(),
            data={"watched": {"every": every, "rows": rows}},
        )
    else:
        _wait_for(path)
    watcher = Watcher(path, Recorder(RunWriter(path).part(rank)), every=every, rows=rows)
    watcher.start()
    return watcher


def _rank() -> tuple[int, int]:
    """Of this process under torchrun, and how many there are."""
    try:
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    except (KeyError, ValueError):
        return 0, 1
    return (rank, size) if 0 <= rank < size else (0, 1)


def _wait_for(path: Path) -> None:
    deadline = time.monotonic() + RANK_SECONDS
    while not (path / RUN_FILE).exists():
        if time.monotonic() > deadline:
            raise RunError(
                f"{path}: rank 0 has not made the run directory within {RANK_SECONDS} s. Let all ranks see the same folder."
            )
        time.sleep(0.05)


def _environment() -> dict[str, object]:
    return {
        "attnscope": version("attnscope"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
    }


def _parameters(optimizer: torch.optim.Optimizer, *, with_gradient: bool = True) -> list[Tensor]:
    return [
        p
        for group in optimizer.param_groups
        for p in group["params"]
        if not with_gradient or p.grad is not None
    ]
