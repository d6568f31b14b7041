"""What a sweep saves by training its members together: against single runs, one after another and two at a time.

Everything is done as a user would have it done: run directories are made, every table is recorded.
"""

import itertools
import shutil
import tempfile
from collections.abc import Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path

import torch

from attnscope.bench.overhead import THREADS, TINY
from attnscope.bench.timing import Ratio, interleave, ratio
from attnscope.config import Config, Member, apply_changes, make_sweep, members_of
from attnscope.sweep.workers import LocalWorkers, train_here
from attnscope.train.run import create_run

MEMBERS = 64
STEPS = 50
LARGE_MEMBERS = 8
LARGE_STEPS = 60
JOBS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepGain:
    """Ratios of member-steps per second, measured in one run, interleaved.

    Attributes:
        loop: 64 tiny members as one part, over 64 single runs in one process.
        jobs: the same over single runs in two processes.
        large: 8 members of the default model as one part, over 8 single runs in one process.
        large_on: the device of `large`; 64 members there if it is no CPU.
        member_steps_s: of the 64 tiny members as one part.
    """

    loop: Ratio
    jobs: Ratio
    large: Ratio
    large_on: str
    member_steps_s: float


def measure_sweeps(*, rounds: int = 5) -> SweepGain:
    """Measure; takes about two minutes for 5 rounds. Sets the number of threads of this process to two."""
    torch.set_num_threads(THREADS)
    tiny = apply_changes(Config(), {**TINY, "train.steps": STEPS}, where="bench")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    large_members = MEMBERS if device == "cuda" else LARGE_MEMBERS
    large = apply_changes(Config(), {"train.steps": LARGE_STEPS, "train.device": device}, where="bench")
    workers = LocalWorkers(JOBS)
    with tempfile.TemporaryDirectory() as folder:
        runs = _Runs(Path(folder))
        try:
            seconds = interleave(
                {
                    "part": lambda: runs.together(tiny, MEMBERS),
                    "loop": lambda: runs.one_by_one(tiny, MEMBERS),
                    "jobs": lambda: runs.one_by_one(tiny, MEMBERS, workers=workers),
                    "large part": lambda: runs.together(large, large_members),
                    "large loop": lambda: runs.one_by_one(large, large_members),
                },
                rounds=rounds,
                warmup=1,
            )
        finally:
            workers.close()
    part = seconds["part"]
    return SweepGain(
        loop=ratio(seconds["loop"], part, together=1),
        jobs=ratio(seconds["jobs"], part, together=1),
        large=ratio(seconds["large loop"], seconds["large part"], together=1),
        large_on=torch.cuda.get_device_name() if device == "cuda" else "CPU",
        member_steps_s=MEMBERS * STEPS / sorted(part)[len(part) // 2],
    )


class _Runs:
    """Run directories that are thrown away when they are done.

    Invariant: nothing of an earlier run is there when the next one is timed.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._numbers = itertools.count()

    def together(self, config: Config, n_members: int) -> None:
        """All seeds as one batched part."""
        config = make_sweep(config, [], seeds=n_members, baseline={}, where="bench")
        path = self._made(config, members_of(config))
        train_here(path, 0)
        shutil.rmtree(path)

    def one_by_one(self, config: Config, n_members: int, *, workers: LocalWorkers | None = None) -> None:
        """A run for each seed."""
        paths = [
            self._made(one, members_of(one))
            for seed in range(n_members)
            for one in [apply_changes(config, {"train.seed": seed}, where="bench")]
        ]
        left = list(paths)
        running: set[Future[str]] = set()
        while left or running:
            if workers is None:
                train_here(left.pop(), 0)
                continue
            while left and (future := workers.submit(left[-1], 0)) is not None:
                left.pop()
                running.add(future)
            _, running = wait(running, return_when="FIRST_COMPLETED")
        for path in paths:
            shutil.rmtree(path)

    def _made(self, config: Config, members: Sequence[Member]) -> Path:
        path = self._folder / str(next(self._numbers))
        create_run(config, members, path, command=())
        return path
