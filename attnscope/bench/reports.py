"""How long it takes and how much memory, to open, analyse and report large runs. Their records are synthetic.

Each measurement is a process of its own: what it reports as its largest size is its own.
"""

import multiprocessing
import os
import re
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from attnscope.config import members_of, parse_table
from attnscope.runs.layout import COLUMNS
from attnscope.runs.writer import RunWriter

GROUPS = ("embedding", "q", "k", "v", "o", "mlp_in", "mlp_out", "head")
ROWS_AT_ONCE = 500_000


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSize:
    """Of a synthetic run."""

    n_members: int
    n_steps: int
    n_layers: int
    n_heads: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Seconds, imports included, and the largest size of a process that did this alone, bytes."""

    seconds: float
    peak_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportCost:
    """Of one shape.

    Attributes:
        shape: of the run.
        mb: of its tables on disk.
        opened: all tables read.
        analysed: opened, members judged, findings, cells compared.
        reported: analysed, figures drawn, everything written.
    """

    shape: RunSize
    mb: float
    opened: Cost
    analysed: Cost
    reported: Cost


SHAPES = (
    RunSize(n_members=1000, n_steps=200, n_layers=2, n_heads=2),
    RunSize(n_members=1, n_steps=100_000, n_layers=8, n_heads=8),
)


def measure_reports(shapes: tuple[RunSize, ...] = SHAPES) -> list[ReportCost]:
    """Measure; takes about two minutes."""
    costs = []
    for shape in shapes:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "run"
            write_synthetic(path, shape)
            if hasattr(os, "sync"):  # the disk is still writing, and that is not what is measured
                os.sync()
            costs.append(
                ReportCost(
                    shape=shape,
                    mb=sum(f.stat().st_size for f in path.rglob("*") if f.is_file()) / 1e6,
                    opened=_alone(_open, path),
                    analysed=_alone(_analyse, path),
                    reported=_alone(_report, path),
                )
            )
    return costs


def write_synthetic(path: Path, shape: RunSize) -> None:
    """A run of this shape with plausible numbers: a grid of two scales and seeds, losses that fall."""
    axes = {"attention": {"scale": ["inverse_sqrt", "none"]}} if shape.n_members > 1 else {}
    config = parse_table(
        {
            "model": {"n_layers": shape.n_layers, "n_heads": shape.n_heads},
            "train": {"steps": shape.n_steps},
            **({"sweep": {"vary": axes, "seeds": shape.n_members // 2}} if axes else {}),
        }
    )
    reference = {"uniform": 5.5, "unigram": 3.1, "bigram": 2.4}
    writer = RunWriter.create(
        path,
        command=("attnscope", "bench", "reports"),
        config=config,
        members=members_of(config),
        environment={},
        data={"source": "synthetic", "reference": reference},
    )
    part = writer.part(0)
    generator = np.random.default_rng(0)
    for table in COLUMNS:
        rows_per_step = _rows_per_step(table, shape)
        at_once = max(1, ROWS_AT_ONCE // rows_per_step)
        for first in range(0, shape.n_steps, at_once):
            steps = np.arange(first, min(first + at_once, shape.n_steps))
            part.append(table, _columns(table, steps, shape, generator))
    part.finish("finished")


def _rows_per_step(table: str, shape: RunSize) -> int:
    of_member = {
        "steps": 1,
        "heads": shape.n_layers * shape.n_heads,
        "layers": shape.n_layers,
        "params": len(GROUPS) * shape.n_layers,
    }
    return shape.n_members * of_member[table]


def _columns(
    table: str, steps: NDArray[np.int64], shape: RunSize, generator: np.random.Generator
) -> dict[str, NDArray[np.generic]]:
    """The rows of these steps: members slowest, then layers, then heads or groups."""
    rows_per_step = _rows_per_step(table, shape)
    n = len(steps) * rows_per_step
    inside = np.arange(n) % (rows_per_step // shape.n_members)
    fast = {"steps": 1, "heads": shape.n_heads, "layers": 1, "params": len(GROUPS)}[table]
    noise = generator.normal(size=n).astype(np.float32)
    step_N = np.repeat(steps, rows_per_step)
    falling = 3 + 3 * np.exp(-step_N / (1 + shape.n_steps / 5))
    columns: dict[str, NDArray[np.generic]] = {}
    for name, column in COLUMNS[table].items():
        if column.kind == "string":
            columns[name] = np.array(GROUPS, dtype=object)[inside % fast]
        elif column.kind.startswith("int"):
            columns[name] = np.full(n, 32)
        else:
            columns[name] = np.abs(falling * (1 + 0.05 * noise) * (0.1 if column.unit == "0 to 1" else 1))
    columns["step"] = step_N
    columns["member"] = np.tile(np.repeat(np.arange(shape.n_members), rows_per_step // shape.n_members), len(steps))
    if table != "steps":
        columns["layer"] = inside // fast
    if table == "heads":
        columns["head"] = inside % fast
    return columns


def _alone(work: Callable[[Path], None], path: Path) -> Cost:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        return pool.submit(_measured, work, path).result()


def _measured(work: Callable[[Path], None], path: Path) -> Cost:
    began = time.perf_counter()
    work(path)
    return Cost(seconds=time.perf_counter() - began, peak_bytes=_peak_bytes())


def _peak_bytes() -> int:
    """The largest size of this process. Linux counts in ru_maxrss what the process was forked from, in VmHWM it does not."""
    status = Path("/proc/self/status")
    if status.exists():
        peak = re.search(r"^VmHWM:\s+(\d+) kB$", status.read_text(), re.MULTILINE)
        if peak:
            return int(peak[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _open(path: Path) -> None:
    from attnscope.runs.reader import open_run

    run = open_run(path)
    for table in COLUMNS:
        getattr(run, table)


def _analyse(path: Path) -> None:
    from attnscope.report.contents import contents_of
    from attnscope.runs.reader import open_run

    contents_of(open_run(path))


def _report(path: Path) -> None:
    from attnscope.report import write_report
    from attnscope.runs.reader import open_run

    write_report(open_run(path))
