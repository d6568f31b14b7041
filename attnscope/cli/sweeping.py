"""`attnscope sweep`: the plan before it runs, and one line per part while it does. All of it on stderr."""

import contextlib
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from attnscope.cli.live import asked_to_stop, findings_in, print_line

if TYPE_CHECKING:
    from attnscope.config import Config
    from attnscope.sweep.plan import Plan
    from attnscope.sweep.run import SweepEnd
    from attnscope.sweep.standing import Standing
    from attnscope.sweep.workers import Workers

PLAIN_SECONDS = 15.0  # between plain lines
LIVE_PARTS = 12  # shown one by one; more would scroll the terminal away
STYLES = {"finished": "green", "training": "cyan", "interrupted": "yellow", "failed": "red"}


@contextlib.contextmanager
def workers_for(
    jobs: int, config: "Config | None", *, ray: bool, address: str | None, stop_on: Sequence[str] = ()
) -> "Iterator[Workers]":
    """Who trains the parts; ended with the block.

    Raises:
        AttnscopeError: a condition to stop on cannot be understood, Ray is not installed or does not answer.
    """
    from attnscope.diagnose.live import live
    from attnscope.sweep.on_ray import RayWorkers
    from attnscope.sweep.plan import threads_for
    from attnscope.sweep.workers import LocalWorkers

    live(stop_on)  # what is wrong with it is said here, once
    workers: Workers
    if ray or address is not None:
        device = config.train.device if config is not None else "auto"
        workers = RayWorkers(address, cpus=threads_for(jobs), use_gpus=device in ("auto", "cuda"), stop_on=stop_on)
    else:
        workers = LocalWorkers(jobs, stop_on=stop_on)
    try:
        yield workers
    finally:
        workers.close()


def plan_of(config: "Config", workers: "Workers", *, jobs: int, memory_bytes: int | None) -> "Plan":
    """Measure a few steps and divide the members into parts; says so, because it takes seconds.

    Raises:
        AttnscopeError: nothing of it can be trained here.
    """
    from attnscope.config import members_of
    from attnscope.sweep.plan import plan_sweep

    console = Console(stderr=True, highlight=False)
    members = members_of(config, where="sweep")
    said = Text(f"Measuring how many of {len(members)} members to train at once ...")
    shown: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
    if console.is_terminal:
        shown = console.status(said)
    else:
        console.print(said, soft_wrap=True)
    with shown:
        plan = plan_sweep(members, jobs=jobs, machines=workers.machines, memory_bytes=memory_bytes)
    workers.reserve(max(part.peak_bytes for part in plan.parts))
    return plan


def watch_sweep(
    config: "Config | None",
    plan: "Plan | None",
    path: Path,
    *,
    workers: "Workers",
    command: Sequence[str],
) -> "SweepEnd":
    """Train a plan into `path`, or the rest of what is in `path` where plan is None, and show how it goes."""
    from attnscope.sweep.run import resume_sweep, run_sweep

    console = Console(stderr=True, highlight=False)
    view = SweepView(path, plan)
    shown: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
    if console.is_terminal:
        shown = Live(view, console=console, auto_refresh=False)
    with asked_to_stop(console, "Stopping every part after its step") as should_stop, shown:

        def on_look(standings: "Mapping[int, Standing]") -> None:
            for line in view.update(standings):
                console.print(line, soft_wrap=True)
            for line in view.found():
                print_line(console, line)
            if isinstance(shown, Live):
                shown.refresh()
            elif standing := view.plain_line():
                console.print(standing, soft_wrap=True)

        if config is None or plan is None:
            end = resume_sweep(path, workers=workers, on_look=on_look, should_stop=should_stop)
        else:
            end = run_sweep(
                config,
                plan,
                path,
                workers=workers,
                command=command,
                on_look=on_look,
                should_stop=should_stop,
            )
    for text in end.divided:
        console.print(Text(text, "yellow"), soft_wrap=True)
    return end


class SweepView:
    """What is known about all parts.

    Invariant: a part whose state has changed is said once, in a line of its own, where there is no panel.
    """

    def __init__(self, path: Path, plan: "Plan | None") -> None:
        self._path = path
        # What was planned holds until a part has shown how fast it is.
        self._planned = {part.part: part.seconds for part in plan.parts} if plan else {}
        self._jobs = plan.jobs if plan else 1
        self._standings: Mapping[int, Standing] = {}
        self._began: dict[int, tuple[float, int]] = {}
        self._plain_at = time.monotonic()
        self._is_new = True
        self._said: dict[int, int] = {}  # part to how many of its findings were said

    def found(self) -> list[Text]:
        """What was found since this was last asked, in a line each."""
        lines = []
        for part, standing in self._standings.items():
            new = standing.found[self._said.get(part, 0) :]
            self._said[part] = len(standing.found)
            lines += [Text.assemble(f"part {part} ", line) for line in findings_in(new)]
        return lines

    def update(self, standings: "Mapping[int, Standing]") -> list[Text]:
        """Take in how all parts are doing; returns the lines to print at once."""
        lines = []
        if self._is_new:
            members = sum(standing.n_members for standing in standings.values())
            lines.append(Text(f"Run {self._path}: {members} members in {_many(len(standings), 'part')}"))
            self._is_new = False
        now = time.monotonic()
        for part, standing in standings.items():
            before = self._standings.get(part)
            if standing.state == "training" and part not in self._began:
                self._began[part] = (now, standing.steps_done)
            if before and before.state != standing.state and standing.state != "training":
                counts = _counts(standing.outcomes)
                lines.append(Text(f"part {part} {standing.state}: {counts}", STYLES.get(standing.state, "")))
        self._standings = standings
        return lines

    def plain_line(self) -> Text | None:
        """Now and then, where we stand."""
        now = time.monotonic()
        if now - self._plain_at < PLAIN_SECONDS:
            return None
        self._plain_at = now
        return self._summary()

    def __rich__(self) -> RenderableType:
        grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
        grid.add_column("part", justify="right")
        grid.add_column("", width=20)
        for title in ("step", "alive", "diverged", "stalled", "eta"):
            grid.add_column(title, justify="right", no_wrap=True)
        shown = self._shown()
        for part in shown:
            standing = self._standings[part]
            bar = ProgressBar(total=standing.steps, completed=standing.steps_done, width=20)
            grid.add_row(
                str(part),
                bar if standing.state == "training" else Text(standing.state, STYLES.get(standing.state, "dim")),
                f"{standing.steps_done}/{standing.steps}",
                str(standing.alive),
                Text(str(standing.diverged), "red" if standing.diverged else "dim"),
                Text(str(standing.stalled), "yellow" if standing.stalled else "dim"),
                _duration(self._eta(standing)),
            )
        outer = Table.grid()
        outer.add_row(grid)
        outer.add_row(self._summary())
        return outer

    def _shown(self) -> list[int]:
        """The parts that are trained, then those just before and after them."""
        training = [p for p, standing in self._standings.items() if standing.state == "training"]
        middle = training[0] if training else 0
        nearest = sorted(self._standings, key=lambda part: (part not in training, abs(part - middle)))
        return sorted(nearest[:LIVE_PARTS])

    def _summary(self) -> Text:
        states = Counter(standing.state for standing in self._standings.values())
        alive = sum(standing.alive for standing in self._standings.values())
        diverged = sum(standing.diverged for standing in self._standings.values())
        stalled = sum(standing.stalled for standing in self._standings.values())
        parts = ", ".join(f"{count} {state}" for state, count in states.items())
        text = f"parts: {parts}; members: {alive} alive, {diverged} diverged, {stalled} stalled"
        left = self._left_s()
        return Text(f"{text}; eta {_duration(left)}" if left else text)

    def _left_s(self) -> float | None:
        """Seconds until all is done, if parts take turns evenly."""
        left = []
        for standing in self._standings.values():
            if standing.state in ("training", "waiting", "interrupted"):
                eta = self._eta(standing)
                if eta is None:
                    return None
                left.append(eta)
        return max(sum(left) / self._jobs, max(left)) if left else None

    def _eta(self, standing: "Standing") -> float | None:
        if standing.state in ("finished", "failed"):
            return None
        began = self._began.get(standing.part)
        if began and standing.steps_done > began[1]:
            rate = (standing.steps_done - began[1]) / (time.monotonic() - began[0])
            return (standing.steps - standing.steps_done) / rate
        planned = self._planned.get(standing.part)
        if planned is None:
            # A part that was divided, or a sweep that goes on: as long as its like took so far.
            known = [
                (time.monotonic() - self._began[p][0]) / (other.steps_done - self._began[p][1])
                for p, other in self._standings.items()
                if p in self._began and other.state == "training" and other.steps_done > self._began[p][1]
            ]
            return sum(known) / len(known) * (standing.steps - standing.steps_done) if known else None
        return planned


def print_plan(config: "Config", plan: "Plan", *, as_json: bool) -> None:
    """Say on stdout what a sweep would train, for how long and in how much memory."""
    import typer

    from attnscope.config import value_text
    from attnscope.runs.layout import to_json
    from attnscope.sweep.plan import gib

    sweep = config.sweep
    assert sweep is not None
    steps = {member.part: member.config.train.steps for member in plan.members}
    largest = max(plan.parts, key=lambda part: part.peak_bytes)
    if as_json:
        typer.echo(
            to_json(
                {
                    "vary": {axis.key: list(axis.values) for axis in sweep.vary},
                    "seeds": list(sweep.seeds),
                    "baseline": dict(sweep.baseline),
                    "members": [{"name": member.name, "part": member.part} for member in plan.members],
                    "parts": [
                        {
                            "part": part.part,
                            "members": part.n_members,
                            "steps": steps[part.part],
                            "seconds": part.seconds,
                            "bytes": part.peak_bytes,
                        }
                        for part in plan.parts
                    ],
                    "seconds": plan.seconds,
                    "bytes_at_once": largest.peak_bytes * min(plan.jobs, len(plan.parts)),
                },
                indent=1,
            )
        )
        return
    console = Console(highlight=False)
    grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for title in ("varies", "values", "baseline"):
        grid.add_column(title, overflow="fold")
    for axis in sweep.vary:
        values = ", ".join(value_text(value) for value in axis.values)
        grid.add_row(axis.key, Text(values), Text(value_text(sweep.baseline[axis.key])))
    grid.add_row("train.seed", ", ".join(map(str, sweep.seeds)), "")
    console.print(grid)
    console.print()
    parts = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for title in ("part", "members", "steps", "time", "memory"):
        parts.add_column(title, justify="right")
    for part in plan.parts[: 2 * LIVE_PARTS]:
        parts.add_row(
            str(part.part),
            str(part.n_members),
            str(steps[part.part]),
            _duration(part.seconds),
            gib(part.peak_bytes),
        )
    console.print(parts)
    if len(plan.parts) > 2 * LIVE_PARTS:
        console.print(Text(f"and {len(plan.parts) - 2 * LIVE_PARTS} more parts"))
    console.print()
    at_once = min(plan.jobs, len(plan.parts))
    console.print(
        Text(
            f"{len(plan.members)} members in {_many(len(plan.parts), 'part')}, {at_once} at a time: about "
            f"{_duration(plan.seconds)}, {gib(largest.peak_bytes * at_once)} of memory."
        ),
        soft_wrap=True,
    )


def _counts(outcomes: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {status}" for status, count in sorted(outcomes.items()))


def _duration(seconds: float | None) -> str:
    """12 s, 3 min 20 s, or 2 h 5 min."""
    if seconds is None:
        return ""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _many(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
