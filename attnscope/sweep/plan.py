"""Members into parts: as large as is fastest here and fits into memory, both measured.

Members with the same graph are trained together along the axis M. How many at once is found by training a few: a process
of its own takes a few steps with 1, 4, 16, ... members and says how long they took and how large it became.
"""

import itertools
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from attnscope.config import Config, Member, members_of
from attnscope.errors import AttnscopeError, ConfigError
from attnscope.runs.writer import RunWriter
from attnscope.sweep.orphans import end_with_parent

if TYPE_CHECKING:
    import torch

SIZES = (1, 4, 16, 64, 256, 1024)  # members at once that are tried
STEPS = 3  # timed per size, after one that is not
LONGEST_STEP_S = 0.5  # a size whose step would take longer is not tried
AS_FAST = 1.1  # times the least time per member: fewer parts are worth that much
MEMORY_SHARE = 0.8  # of what is free, for the parts


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """A few steps with some members at once.

    Attributes:
        n_members: at once.
        step_s: seconds per step.
        peak_bytes: of the whole process at its largest; on a GPU, of its memory there.
        free_bytes: what processes like it can have, together.
    """

    n_members: int
    step_s: float
    peak_bytes: int
    free_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PartPlan:
    """One part before it is trained: what it is expected to take."""

    part: int
    n_members: int
    seconds: float
    peak_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Who is trained with whom.

    Attributes:
        members: in the order of the config, with their part and their position in it.
        parts: in the order of their numbers.
        memory_bytes: what one part may take.
        jobs: how many are trained at the same time.
    """

    members: tuple[Member, ...]
    parts: tuple[PartPlan, ...]
    memory_bytes: int
    jobs: int

    @property
    def seconds(self) -> float:
        """Expected for the whole sweep: parts go to whoever is free, in order."""
        free_at = [0.0] * self.jobs
        for part in self.parts:
            at = free_at.index(min(free_at))
            free_at[at] += part.seconds
        return max(free_at)


def plan_sweep(members: Sequence[Member], *, jobs: int, machines: int = 1, memory_bytes: int | None = None) -> Plan:
    """Divide members into parts.

    Args:
        members: from `attnscope.config.members_of`, whose parts are the largest that there can be.
        jobs: parts that a machine trains at the same time; each gets its share of cores and memory.
        machines: like this one, which is the one that is measured.
        memory_bytes: of a machine, for all its jobs together; None = most of what is free.

    Raises:
        ConfigError: one member alone does not fit, or a config cannot be trained here.
    """
    groups: dict[int, list[Member]] = {}
    for member in members:
        groups.setdefault(member.part, []).append(member)
    placed: dict[str, Member] = {}
    parts: list[PartPlan] = []
    limit = 0
    for group in groups.values():
        trials = measure([member.config for member in group], threads=threads_for(jobs))
        free = int(trials[0].free_bytes * MEMORY_SHARE) if memory_bytes is None else memory_bytes
        limit = free // jobs
        most = members_at_once(trials, len(group), limit)
        if most < 1:
            raise ConfigError(
                f"{group[0].name}: one member needs {gib(trials[0].peak_bytes)} of memory, but a part may take "
                f"{gib(limit)}. Use fewer jobs, a smaller model or a smaller batch."
            )
        most = min(most, -(-len(group) // (jobs * machines)))  # nobody waits while another trains all
        n_parts = -(-len(group) // most)
        for number in range(n_parts):
            # Parts of nearly equal size.
            low, high = (len(group) * at // n_parts for at in (number, number + 1))
            index = len(parts)
            for at, member in enumerate(group[low:high]):
                placed[member.name] = replace(member, part=index, index=at)
            parts.append(
                PartPlan(
                    part=index,
                    n_members=high - low,
                    seconds=step_seconds(trials, high - low) * group[0].config.train.steps,
                    peak_bytes=peak_bytes(trials, high - low),
                )
            )
    return Plan(
        members=tuple(placed[member.name] for member in members),
        parts=tuple(parts),
        memory_bytes=limit,
        jobs=jobs * machines,
    )


def members_at_once(trials: Sequence[Trial], n_members: int, limit_bytes: int) -> int:
    """The largest size that is about as fast per member as the fastest, and fits; 0 if not even one member does."""
    fastest_s = min(trial.step_s / trial.n_members for trial in trials)
    sizes = [trial.n_members for trial in trials if trial.step_s / trial.n_members <= AS_FAST * fastest_s]
    fitting = min(max(sizes), n_members)
    while fitting and peak_bytes(trials, fitting) > limit_bytes:
        fitting = min(fitting - 1, int(fitting * 0.9))
    return fitting


def peak_bytes(trials: Sequence[Trial], n_members: int) -> int:
    """Bytes of a process that trains so many members: on the line through the first and the last trial, never below."""
    first, last = trials[0], trials[-1]
    if last.n_members == first.n_members:
        # Unknown how much of it is the member's: take all of it.
        return first.peak_bytes * n_members
    bytes_per_member = (last.peak_bytes - first.peak_bytes) / (last.n_members - first.n_members)
    return int(first.peak_bytes + max(bytes_per_member, 0.0) * (n_members - first.n_members))


def step_seconds(trials: Sequence[Trial], n_members: int) -> float:
    """Seconds per step with so many members, between the sizes that were tried."""
    for low, high in itertools.pairwise(trials):
        if low.n_members <= n_members <= high.n_members:
            part = (n_members - low.n_members) / (high.n_members - low.n_members)
            return low.step_s + part * (high.step_s - low.step_s)
    return trials[-1].step_s * n_members / trials[-1].n_members


def measure(configs: Sequence[Config], *, threads: int) -> list[Trial]:
    """Train a few steps with 1, 4, 16, ... of these members in a process of its own.

    Raises:
        ConfigError: even one member alone is more than the machine can take.
        AttnscopeError: the config cannot be trained here.
    """
    trials: list[Trial] = []
    sizes = [size for size in SIZES if size < len(configs)] + [min(len(configs), SIZES[-1])]
    with ProcessPoolExecutor(max_workers=1, mp_context=fresh_processes(), initializer=end_with_parent) as pool:
        for size in sizes:
            if trials and trials[-1].step_s * size / trials[-1].n_members > LONGEST_STEP_S:
                break
            try:
                trials.append(pool.submit(_try, list(configs[:size]), threads).result())
            except AttnscopeError:
                raise
            except (BrokenProcessPool, MemoryError, RuntimeError) as error:
                if trials:
                    break  # so many are too many
                raise ConfigError(
                    f"one member cannot be trained here: {str(error).splitlines()[0]}. Use a smaller model or batch."
                ) from None
            if trials[-1].step_s / size > AS_FAST * min(trial.step_s / trial.n_members for trial in trials):
                break  # larger ones are no faster
    return trials


def fresh_processes() -> "multiprocessing.context.BaseContext":
    """Processes that begin with our code imported and nothing else, where the system can do that."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["attnscope.train.run"])
    return context


def threads_for(jobs: int) -> int:
    """Cores for each of `jobs` processes."""
    here = hasattr(os, "sched_getaffinity")  # not on every system
    return max(1, (len(os.sched_getaffinity(0)) if here else os.cpu_count() or 1) // jobs)


def free_memory() -> int:
    """Bytes that new processes can have: what the system says is available, and what a container leaves."""
    available = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
        available = [int(lines["MemAvailable"].split()[0]) * 1024]
    limit, used = (Path(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))
    if limit.exists() and limit.read_text().strip().isdigit():
        available.append(int(limit.read_text()) - int(used.read_text()))
    return min(available)


def gib(size: float) -> str:
    """Bytes for people."""
    return f"{size / 2**30:.2g} GiB" if size < 10 * 2**30 else f"{size / 2**30:.0f} GiB"


def _try(configs: Sequence[Config], threads: int) -> Trial:
    """In the process that is measured: train `configs` for a few steps, recorded as in a run."""
    import torch

    from attnscope.data import data_of
    from attnscope.signals.alarms import Alarms
    from attnscope.train.loop import train_part
    from attnscope.train.part import Part
    from attnscope.train.run import create_run

    torch.set_num_threads(threads)
    first = configs[0]
    ticks: list[float] = []

    def tick() -> bool:
        ticks.append(time.perf_counter())
        return len(ticks) > 1 + STEPS

    with tempfile.TemporaryDirectory() as folder:
        create_run(first, members_of(first), Path(folder) / "run", command=())
        data = data_of(first)
        part = Part(configs, vocab_size=data.vocab_size)
        train_part(
            part,
            data,
            writer=RunWriter.resume(Path(folder) / "run").part(0),
            alarms=Alarms(),
            on_progress=lambda _progress: None,
            should_stop=tick,
        )
    steps_s = [after - before for before, after in itertools.pairwise(ticks[1:])] or [0.0]
    peak, free = _memory_here(part.device)
    return Trial(n_members=len(configs), step_s=statistics.median(steps_s), peak_bytes=peak, free_bytes=free)


def _memory_here(device: "torch.device") -> tuple[int, int]:
    """The largest this process became, and what processes like it can have."""
    import torch

    if device.type == "cuda":
        peak = torch.cuda.max_memory_reserved(device)
        return peak, torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, free_memory()
