"""Watches the training that goes on in this process, into a run directory."""

import os
import shutil
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from attnscope.capture.names import Modules
from attnscope.errors import RunError
from attnscope.runs.environment import environment
from attnscope.runs.events import Event
from attnscope.runs.found_live import FoundLive, line_of
from attnscope.runs.layout import RUN_FILE, MemberEntry
from attnscope.runs.writer import RunWriter, next_run_path
from attnscope.watch.parameters import parameters_of
from attnscope.watch.recording import WatchRecorder
from attnscope.watch.settings import EVERY, ROWS, Settings
from attnscope.watch.trackers import TrackerLog
from attnscope.watch.watcher import Watcher, watching

SAYS = "attnscope:"  # before what is said on stderr

RANK_SECONDS = 60  # that other ranks wait for the run directory


def watch_model(
    model: nn.Module | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    path: str | Path | None = None,
    *,
    every: int = EVERY,
    rows: int | str = ROWS,
    layers: Sequence[str] = (),
    stop_on: Sequence[str] = (),
    snapshot: int = 0,
    log_to: str | None = None,
) -> Watcher:
    """Watch the training that goes on in this process until the watcher is stopped.

    Use it as a context, or call `stop` at the end:

        with attnscope.watch_model(model, optimizer, "runs/mine"):
            train(model, optimizer)

    Args:
        model: whose modules and parameters give the names; None = they are looked for.
        optimizer: its parameters must be the model's; None = whichever steps.
        path: of the run directory, which must not exist; None makes the next free one below `runs/`.
        every: attention and parameters are measured at the first 20 steps and at every so many; losses and gradient
            norms at all.
        rows: query rows per head and call, or "all".
        layers: names of the attention layers to measure, with * and ? as in a shell; none = all.
        stop_on: conditions at which training is stopped by SystemExit: nonfinite, explosion, the name of a rule, max_logit>1e4, ...
        snapshot: keep so many of the last steps, weights and batches, and write them when training breaks, as
            `load_snapshot` reads them. Each is a copy of the weights; numbers are looked at after every step.
        log_to: tensorboard, wandb or mlflow: a few columns go to the script's active run there, too (watch.trackers).

    Raises:
        ConfigError: a number is too small, a condition cannot be understood, the tracker is unknown or not installed.
        RunError: the run exists, or this process is being watched already.
        RunWriteError: the place cannot be written.
    """
    settings = Settings(every=every, rows=rows, layers=layers, stop_on=stop_on, snapshot=snapshot, log_to=log_to)
    if optimizer is not None and model is not None:
        mine = {id(p) for p in model.parameters()}
        strange = sum(id(p) not in mine for p in parameters_of(optimizer, with_gradient=False))
        if strange:
            raise RunError(
                f"{strange} parameters of the optimizer are not the model's. Give the model that is trained."
            )
    where = Path(path) if path is not None else next_path()
    watcher = open_watcher(where, settings, command=("attnscope.watch_model",))
    if model is not None:
        watcher.add_model(model)
    if optimizer is not None:
        watcher.uses_optimizer()
    watcher.stop_with_process()
    return watcher


def open_watcher(path: Path, settings: Settings, *, command: Sequence[str]) -> Watcher:
    """Make the run directory of a watched process, or join the one that rank 0 makes, and begin to look.

    Raises:
        ConfigError: the settings cannot be followed.
        RunError: the run exists, or this process is being watched already.
        RunWriteError: the place cannot be written.
    """
    already = watching()
    if already is not None:
        raise RunError(f"{path}: this process is being watched already, into {already.path}. Stop that one first.")
    live = settings.checked()
    rank, n_ranks = _rank()
    if rank == 0:
        names = ["watched"] if n_ranks == 1 else [f"rank {r}" for r in range(n_ranks)]
        RunWriter.create(
            path,
            command=command,
            config=None,
            members=[MemberEntry(name=name, part=part, index=0, settings={}) for part, name in enumerate(names)],
            environment=environment(),
            data={"watched": {"every": settings.every, "rows": settings.rows, "layers": list(settings.layers)}},
        )
    else:
        _wait_for(path)
    log = TrackerLog(settings.log_to, path) if settings.log_to is not None and rank == 0 else None
    modules = Modules()
    part = RunWriter(path.absolute()).part(rank)  # the script may change its folder
    recorder = WatchRecorder(
        part,
        modules,
        live=live if rank == 0 or live.rules else None,  # one for all ranks, unless each has to stop
        on_block=log,
        on_found=partial(_say, log) if rank == 0 else lambda _event: None,
    )
    watcher = Watcher(path, recorder, modules, settings)
    watcher.start()
    return watcher


def _say(log: TrackerLog | None, event: Event) -> str | None:
    """What a rule found, in a line on stderr, as stdout is the script's, and to the tracker; what went wrong there."""
    assert isinstance(event.what, FoundLive)
    is_terminal = sys.stderr.isatty()
    width = shutil.get_terminal_size().columns - len(SAYS) - 1 if is_terminal else None
    print(f"{SAYS} {line_of(event.step, event.what, width)}", file=sys.stderr, flush=True)
    return None if log is None else log.alert(event.step, event.what)


def next_path() -> Path:
    """The next free run directory below `runs/`, the same for all ranks.

    Raises:
        RunError: there are several ranks, and they cannot agree yet.
    """
    where = next_run_path(Path("runs"), "watch")
    if dist.is_available() and dist.is_initialized():
        said: list[Any] = [where]
        dist.broadcast_object_list(said)
        where = said[0]
    elif _rank()[1] > 1:
        raise RunError(
            "Each of several processes would choose a run directory of its own. Give watch_model a path, or call it after "
            "torch.distributed.init_process_group."
        )
    return where


def _rank() -> tuple[int, int]:
    """Of this process, and how many there are: as torch.distributed has it once it is set up, else as torchrun says."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
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
