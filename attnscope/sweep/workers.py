"""Where parts are trained: processes of this machine, one part each at a time.

A worker is anything that takes the path of a run and the number of a part and gives a Future of how it ended; on_ray has
the other kind. What a worker does is the same everywhere: `train_here`.
"""

import signal
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Protocol

from attnscope.sweep.orphans import end_with_parent
from attnscope.sweep.plan import fresh_processes, threads_for

_stop: Event | None = None  # of this process, if it is a worker


class Workers(Protocol):
    """Trains parts, some at the same time."""

    @property
    def machines(self) -> int:
        """How many there are, each taken to be like this one."""

    def reserve(self, memory_bytes: int) -> None:
        """Say what each part will need."""

    def submit(self, path: Path, part: int) -> "Future[str] | None":
        """Begin with a part; None while all are busy."""

    def stop(self) -> None:
        """Ask all to end after the step they are in, with a checkpoint."""

    def close(self) -> None:
        """End at once whatever still works."""


class LocalWorkers:
    """`jobs` processes of this machine.

    Invariant: each is a pool of its own, so that one that dies takes no other with it.
    """

    def __init__(self, jobs: int, *, stop_on: Sequence[str] = ()) -> None:
        """`stop_on`: conditions at which a part is stopped."""
        self._stop_on = tuple(stop_on)
        self._threads = threads_for(jobs)
        self._context = fresh_processes()
        self._asked_to_stop = self._context.Event()
        self._pools = [self._pool() for _ in range(jobs)]
        self._work: list[Future[str] | None] = [None] * jobs

    @property
    def machines(self) -> int:
        """This one."""
        return 1

    def reserve(self, memory_bytes: int) -> None:
        """Nothing to do: the plan has divided the memory of this machine among the jobs."""

    def submit(self, path: Path, part: int) -> "Future[str] | None":
        """Begin with a part in the first process that is free."""
        for index, work in enumerate(self._work):
            if work is not None and not work.done():
                continue
            if work is not None and work.exception() is not None:
                # It may be dead, and what is left of a failure in memory is not wanted either.
                self._pools[index].shutdown(wait=False, cancel_futures=True)
                self._pools[index] = self._pool()
            future = self._pools[index].submit(train_here, path, part, threads=self._threads, stop_on=self._stop_on)
            self._work[index] = future
            return future
        return None

    def stop(self) -> None:
        """Ask all to end after the step they are in."""
        self._asked_to_stop.set()

    def close(self) -> None:
        """End at once whatever still works."""
        for pool in self._pools:
            for process in list((pool._processes or {}).values()):
                process.terminate()
            pool.shutdown(wait=False, cancel_futures=True)

    def _pool(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(
            max_workers=1,
            mp_context=self._context,
            initializer=_begin,
            initargs=(self._asked_to_stop,),
        )


def train_here(path: Path, part: int, *, threads: int | None = None, stop_on: Sequence[str] = ()) -> str:
    """Train one part of a run in this process, with so many threads unless the run began with another number.

    Returns:
        "finished", "interrupted", or "stopped" on one of the conditions.

    Raises:
        AttnscopeError: it cannot be trained, or the disk is full.
    """
    import torch

    from attnscope.diagnose.live import live
    from attnscope.runs.checkpoint import remove_checkpoints
    from attnscope.runs.layout import part_folder
    from attnscope.runs.reader import open_run
    from attnscope.train.run import members_in, train_part_of

    if threads is not None:
        torch.set_num_threads(threads)
    run = open_run(path)
    members = [member for member in members_in(run) if member.part == part]
    should_stop = _stop.is_set if _stop else lambda: False
    status = train_part_of(run, part, members, live=live(stop_on), should_stop=should_stop)
    if status == "finished":  # checkpoints of a thousand members are gigabytes
        remove_checkpoints(path / part_folder(part))
    return status


def _begin(asked_to_stop: Event) -> None:
    """In a new worker."""
    global _stop
    _stop = asked_to_stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    end_with_parent()
