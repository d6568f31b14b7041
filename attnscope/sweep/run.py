"""Carries a sweep out: hands parts to workers, watches them, and deals with those that die.

A part whose process dies or runs out of memory is divided and tried once more; what dies twice is reported, and all
other parts are kept. Only this process writes run.json and decides; workers write their parts.
"""

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from pathlib import Path

from attnscope.config import Config
from attnscope.errors import AttnscopeError, RunError, RunWriteError, error_in_a_line
from attnscope.runs.holder import declare_dead, holding
from attnscope.runs.layout import part_folder
from attnscope.runs.reader import open_run
from attnscope.runs.writer import RunWriter
from attnscope.sweep.plan import Plan
from attnscope.sweep.standing import Standing, standing_of
from attnscope.sweep.workers import Workers
from attnscope.train.run import create_run, members_in, parts_left

LOOK_S = 0.5  # between looks at the parts that are being trained
LOOK_SHARE = 0.02  # of the time, at most, is spent looking

# What a death looks like from outside, by the name of the exception: concurrent.futures, torch and ray have their own.
DEATHS = (
    "BrokenProcessPool",
    "MemoryError",
    "OutOfMemoryError",
    "WorkerCrashedError",
    "NodeDiedError",
    "LocalRayletDiedError",
)
OUT_OF_MEMORY = ("out of memory", "can't allocate memory")

OnLook = Callable[[Mapping[int, Standing]], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A part that could not be trained, its members, and why."""

    part: int
    members: tuple[str, ...]
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepEnd:
    """How a sweep ended: finished, interrupted, stopped or failed; `failures` says which parts are missing.

    Attributes:
        status: finished even if all members diverged; stopped on a condition; failed if a part could not be trained.
        failures: parts that could not.
        divided: one line for each part that died and was divided.
    """

    status: str
    failures: tuple[Failure, ...]
    divided: tuple[str, ...]


def run_sweep(
    config: Config,
    plan: Plan,
    path: Path,
    *,
    workers: Workers,
    command: Sequence[str] = (),
    on_look: OnLook = lambda _standings: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> SweepEnd:
    """Train all members of a plan into a new run directory.

    Args:
        config: with the sweep in it.
        plan: of its members, from `plan_sweep`.
        path: of the run directory; must not exist.
        workers: who trains; closed by the caller.
        command: the command line, for run.json.
        on_look: called about twice a second with how each part is doing, by number.
        should_stop: asked as often; True ends the sweep, every part with a checkpoint.

    Raises:
        AttnscopeError: the data or the directory cannot be used, or the disk is full.
    """
    create_run(config, plan.members, path, command=command)
    with holding(path):
        return _Supervisor(path, workers, on_look, should_stop).carry_out()


def resume_sweep(
    path: Path,
    *,
    workers: Workers,
    on_look: OnLook = lambda _standings: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> SweepEnd:
    """Train the parts of a run that are not finished; arguments as in `run_sweep`.

    Raises:
        RunError: another process still writes it, or there is nothing left to do.
    """
    if not parts_left(open_run(path)):
        raise RunError(f"{path} is finished: there is nothing to resume. Read it: attnscope report {path}")
    with holding(path):
        return _Supervisor(path, workers, on_look, should_stop).carry_out()


class _Supervisor:
    """What is known while parts are trained.

    Invariant: every part that is left is in exactly one of `_waiting`, `_running` and `_failures`.
    """

    def __init__(self, path: Path, workers: Workers, on_look: OnLook, should_stop: Callable[[], bool]) -> None:
        run = open_run(path)
        self._path = path
        self._workers = workers
        self._on_look = on_look
        self._should_stop = should_stop
        self._steps = {m.part: m.config.train.steps for m in members_in(run)}
        self._waiting = deque(parts_left(run))
        self._running: dict[Future[str], int] = {}
        self._tried_again: set[int] = set()
        self._failures: list[Failure] = []
        self._divided: list[str] = []
        self._stopping = False
        self._interrupted = False
        self._stopped = False
        self._standings = {part: self._look_at(part) for part in self._steps}
        self._look_at_s = 0.0  # when to look again

    def carry_out(self) -> SweepEnd:
        """Work until nothing is left or somebody asked to stop."""
        is_first = True
        while self._running or (self._waiting and not self._stopping):
            if not self._stopping and self._should_stop():
                self._stopping = True
                self._workers.stop()
            while self._waiting and not self._stopping:
                future = self._workers.submit(self._path, self._waiting[0])
                if future is None:
                    break
                self._running[future] = self._waiting.popleft()
            if is_first:  # what ends at once was seen to begin
                self._look(always=True)
                is_first = False
            done, _ = wait(self._running, timeout=LOOK_S, return_when=FIRST_COMPLETED)
            for future in done:
                self._take(self._running.pop(future), future)
            self._look(always=bool(done))
        status = "interrupted" if self._interrupted or self._waiting else "finished"
        if self._stopped:
            status = "stopped"
        if self._failures:
            status = "failed"
        return SweepEnd(status=status, failures=tuple(self._failures), divided=tuple(self._divided))

    def _take(self, part: int, future: Future[str]) -> None:
        """What became of a part."""
        error = future.exception()
        if error is not None and _is_death(error):
            declare_dead(self._path / part_folder(part))  # on whatever machine it was
        if error is None:
            self._interrupted |= future.result() == "interrupted"
            if future.result() == "stopped" and not self._stopped:
                self._stopped = self._stopping = True
                self._workers.stop()
        elif isinstance(error, RunWriteError):
            raise error  # the next part would find the same disk
        elif self._stopping:
            self._interrupted = True  # some workers can only be ended from outside
        elif not _is_death(error):
            self._give_up(part, _in_words(error))
        elif part in self._tried_again:
            self._give_up(part, f"{_in_words(error)}, again")
        else:
            self._try_smaller(part, _in_words(error))
        if part in self._steps:  # it was not divided
            self._standings[part] = self._look_at(part)

    def _try_smaller(self, part: int, reason: str) -> None:
        names = [m.name for m in open_run(self._path, part=part).members]
        if len(names) > 1:
            again = RunWriter.resume(self._path).divide_part(part)
            self._divided.append(
                f"part {part} ({len(names)} members) {reason}; trained again as parts {again[0]} and {again[1]}"
            )
        else:
            again = (part, part)
            self._divided.append(f"part {part} ({names[0]}) {reason}; trained again")
        steps = self._steps.pop(part)
        del self._standings[part]
        for new in dict.fromkeys(again):
            self._steps[new] = steps
            self._standings[new] = self._look_at(new)
            self._tried_again.add(new)
            self._waiting.append(new)

    def _give_up(self, part: int, reason: str) -> None:
        run = open_run(self._path, part=part)
        names = tuple(member.name for member in run.members)
        self._failures.append(Failure(part=part, members=names, reason=reason))
        if part not in run.ends:
            RunWriter.resume(self._path).part(part).finish("failed", error=reason)

    def _look(self, *, always: bool) -> None:
        now = time.monotonic()
        if now < self._look_at_s and not always:
            return
        for part in self._running.values():
            self._standings[part] = self._look_at(part)
        self._on_look(dict(sorted(self._standings.items())))
        took = time.monotonic() - now
        self._look_at_s = now + max(LOOK_S, took / LOOK_SHARE)

    def _look_at(self, part: int) -> Standing:
        training = part in self._running.values()
        return standing_of(self._path, part, steps=self._steps[part], training=training)


def _is_death(error: BaseException) -> bool:
    if isinstance(error, AttnscopeError):
        return False
    names = [kind.__name__ for kind in type(error).__mro__]
    return any(name in DEATHS for name in names) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY)
    )


def _in_words(error: BaseException) -> str:
    if isinstance(error, AttnscopeError):
        return str(error)
    if type(error).__name__ == "BrokenProcessPool":
        return "its process was killed"
    if _is_death(error) and "emory" in f"{type(error).__name__} {error}":
        return "ran out of memory"
    return error_in_a_line(error)
