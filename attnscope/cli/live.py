"""Progress while a run trains: a live panel on a terminal, plain lines anywhere else. All of it on stderr."""

import contextlib
import math
import signal
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from attnscope.report.numbers import number
from attnscope.runs.events import Diverged, Event, Nonfinite, Stopped
from attnscope.runs.found_live import FoundLive, line_of

if TYPE_CHECKING:
    from attnscope.config import Config, Member
    from attnscope.train.block import Block
    from attnscope.train.loop import Progress

BARS = "▁▂▃▄▅▆▇█"
SPARKLINE_WIDTH = 32
PLAIN_SECONDS = 5.0  # between plain lines
FOUND_STYLES = {"error": "bold red", "warning": "yellow"}
LIVE_MEMBERS = 6  # shown one by one; more would scroll the terminal away


def watch_training(
    config: "Config | None", path: Path, *, stop_on: Sequence[str] = (), command: Sequence[str]
) -> tuple[Path, str]:
    """Train `config` into `path`, or go on with `path` where config is None, and show how it goes.

    Returns:
        The run directory and "finished", "interrupted", or "stopped" on a condition.
    """
    from attnscope.config import members_of
    from attnscope.diagnose.live import live
    from attnscope.runs.reader import open_run
    from attnscope.train.run import resume_run, train_run

    looked_for = live(stop_on)
    console = Console(stderr=True, highlight=False)
    members = members_of(config if config is not None else open_run(path).config)
    view = PartView(members)
    shown: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
    if console.is_terminal:
        # No refresh thread: it would take its share of the cores from training.
        shown = Live(view, console=console, auto_refresh=False)
    with asked_to_stop(console) as should_stop, shown:

        def on_progress(part: int, progress: "Progress") -> None:
            if view.is_new:  # not before: a run that cannot begin says nothing but why
                console.print(Text(f"Run {path}: {', '.join(m.name for m in members[:8])}"))
            for line in view.update(part, progress):
                console.print(line)
            for line in findings_in(progress.events):
                print_line(console, line)
            if isinstance(shown, Live):
                shown.refresh()
            elif standing := view.plain_line():
                console.print(standing)

        if config is None:
            status = resume_run(path, live=looked_for, on_progress=on_progress, should_stop=should_stop)
        else:
            status = train_run(
                config, path, command=command, live=looked_for, on_progress=on_progress, should_stop=should_stop
            )
    return path, status


def findings_in(events: Iterable[Event]) -> Iterator[Text]:
    """A line for each finding, and for what training was stopped on."""
    for event in events:
        if isinstance(event.what, FoundLive):
            yield Text(line_of(event.step, event.what), FOUND_STYLES.get(event.what.severity, ""))
        elif isinstance(event.what, Stopped):
            yield Text(f"step {event.step}: stopped on {event.what.on}: {event.what.found}", "bold red")


def print_line(console: Console, line: Text) -> None:
    """One line, whatever its length: on a terminal, what there is room for."""
    if console.is_terminal:
        line.truncate(console.width, overflow="ellipsis")
    console.print(line, soft_wrap=True)


@contextmanager
def asked_to_stop(console: Console, saying: str = "Stopping after this step") -> Iterator[Callable[[], bool]]:
    """Ctrl-C asks the loop to stop after the step, with a checkpoint; a second one stops at once."""
    asked = False

    def ask(_signal: int, _frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        console.print(Text(f"{saying}; press Ctrl-C again to stop at once."))

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class PartView:
    """What is known about the part that trains now.

    Invariant: memory does not grow with the number of steps.
    """

    def __init__(self, members: "Sequence[Member]") -> None:
        self._all = members
        self._seen_at = time.monotonic()
        self._n_parts = 1 + max(member.part for member in members)
        self._begin(0)
        self._plain_at = time.monotonic()
        self.is_new = True

    def _begin(self, part: int) -> None:
        self._part = part
        self._members = [member for member in self._all if member.part == part]
        self._steps = self._members[0].config.train.steps
        self._done = 0
        self._said_done = False
        self._losses = [Curve() for _ in self._members]
        self._notes = ["" for _ in self._members]
        self._block: Block | None = None
        self._speeds: deque[tuple[float, int]] = deque(maxlen=8)
        self._speeds.append((self._seen_at, 0))  # a part begins when the one before it ends

    def update(self, part: int, progress: "Progress") -> list[Text]:
        """Take in a block; returns the lines to print at once, for what broke."""
        self.is_new = False
        if part != self._part:
            self._begin(part)
        block = progress.block
        self._done = progress.steps_done
        self._seen_at = time.monotonic()
        if block is not None:
            self._speeds.append((self._seen_at, self._done))
            for m, member in enumerate(block.members):
                self._losses[member].add(block.columns["loss"][:, m])
            if len(block.head_steps):
                self._block = block
        return [line for event in progress.events if (line := self._line_of(event))]

    def plain_line(self) -> Text | None:
        """Now and then, where we stand."""
        now = time.monotonic()
        done = self._done == self._steps
        if self._said_done or (now - self._plain_at < PLAIN_SECONDS and not done):
            return None
        self._plain_at, self._said_done = now, done
        losses = ", ".join(
            f"{member.name} {number(curve.last)}" for member, curve in zip(self._members, self._losses, strict=True)
        )
        return Text(f"{self._where()}  loss: {losses}")

    def __rich__(self) -> RenderableType:
        """The panel: progress, one line per member, one line per layer."""
        grid = Table.grid(padding=(0, 2))
        grid.add_column(no_wrap=True)
        grid.add_column(no_wrap=True, overflow="ellipsis")
        grid.add_row(ProgressBar(total=self._steps, completed=self._done, width=24), Text(self._where()))
        for m, member in enumerate(self._members[:LIVE_MEMBERS]):
            curve = self._losses[m]
            note = f"  {self._notes[m]}" if self._notes[m] else ""
            grid.add_row(
                Text(f"loss {member.name}"),
                Text.assemble(curve.sparkline(), f"  {number(curve.last)}", (note, "bold red")),
            )
        for row in self._layer_rows():
            grid.add_row(*row)
        return grid

    def _layer_rows(self) -> Iterator[tuple[Text, Text]]:
        block = self._block
        if block is None:
            return
        shown = list(enumerate(block.members))[:2]
        names = "   ".join(self._members[member].name for _, member in shown)
        title = "entropy_ratio, max_prob, max_logit of "
        yield Text(""), Text(f"{title}{names}", "dim")
        for layer in range(block.heads["entropy"].shape[2]):
            cells = []
            for m, _ in shown:
                entropy_ratio, max_prob = (
                    float(block.heads[name][-1, m, layer].mean()) for name in ("entropy_ratio", "max_prob")
                )
                max_logit = float(block.heads["max_logit"][-1, m, layer].max())
                cells.append(f"{entropy_ratio:5.2f} {max_prob:5.2f} {number(max_logit):>6}")
            yield Text(f"layer {layer}"), Text("   ".join(cells))

    def _where(self) -> str:
        part = f"part {self._part + 1}/{self._n_parts}  " if self._n_parts > 1 else ""
        (then, before), (now, done) = self._speeds[0], self._speeds[-1]
        text = f"{part}step {self._done}/{self._steps}"
        if done > before and now > then:
            config = self._members[0].config
            rate = (done - before) / (now - then)
            alive = len(self._block.members) if self._block else len(self._members)
            tokens = rate * config.data.batch_size * config.model.seq_len * alive
            text += f"  {tokens:,.0f} tokens/s  eta {(self._steps - done) / rate:.0f} s"
        return text

    def _line_of(self, event: Event) -> Text | None:
        what = event.what
        if event.member is None or not isinstance(what, Nonfinite | Diverged):
            return None
        name = self._members[event.member].name
        if isinstance(what, Nonfinite):
            where = ""
            if what.where is not None:
                words = [place.words for place in what.where]
                where = f" ({', '.join([*words[:3], *['...'] * (len(words) > 3)])})"
            verb = "are" if what.tensor == "attention logits" else "is"
            return Text(f"step {event.step}: {what.tensor} of {name} {verb} not finite{where}", "red")
        self._notes[event.member] = f"✗ diverged at step {event.step}"
        return Text(f"step {event.step}: {name} diverged: loss {what.why}", "red")


class Curve:
    """A loss curve of bounded size: when it is full, every second point goes."""

    def __init__(self) -> None:
        self._points: list[float] = []
        self._stride = 1
        self._seen = 0
        self.last: float | None = None

    def add(self, losses: "np.ndarray") -> None:
        """Go on with these losses."""
        for loss in losses.tolist():
            if self._seen % self._stride == 0:
                self._points.append(loss)
            self._seen += 1
            self.last = loss
            if len(self._points) >= 4 * SPARKLINE_WIDTH:
                self._points = self._points[::2]
                self._stride *= 2

    def sparkline(self) -> str:
        """The curve in eighths of a line on a log scale; ✗ where it is not finite."""
        if not self._points:
            return ""
        chosen = np.linspace(0, len(self._points) - 1, min(SPARKLINE_WIDTH, len(self._points)))
        values = [self._points[int(i)] for i in chosen]
        logs = [math.log(v) if math.isfinite(v) and v > 0 else None for v in values]
        known = [x for x in logs if x is not None]
        low, high = (min(known), max(known)) if known else (0.0, 1.0)
        span = (high - low) or 1.0
        return "".join("✗" if x is None else BARS[min(7, int(8 * (x - low) / span))] for x in logs)
