"""Results on stdout: as tables for people, as JSON for machines."""

import shlex
import textwrap
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from attnscope.report.numbers import number
from attnscope.runs.layout import to_json

if TYPE_CHECKING:
    from collections.abc import Sequence

    from attnscope.bench.overhead import Overhead
    from attnscope.bench.reports import ReportCost
    from attnscope.bench.sweeps import SweepGain
    from attnscope.bench.watching import WatchOverhead
    from attnscope.report.blocks import Table as TableBlock
    from attnscope.report.compare import Comparison
    from attnscope.report.contents import Contents
    from attnscope.report.verdict import MemberRow
    from attnscope.runs.reader import Run

WORTH_IT = 1.2  # times as fast
MOST_MEMBERS = 40  # rows of a table on a terminal
MOST_CELLS = 24
TOO_WIDE = 1.6  # times the terminal: words would be broken beyond reading
LONG_TITLE = 20  # characters, from which on a column of numbers may be broken too
UNBROKEN = 18  # characters of a word that a narrow terminal does not break

STYLES = {
    "trained": "green",
    "finished": "green",
    "diverged": "red",
    "failed": "red",
    "unreadable": "red",
    "stalled": "yellow",
    "interrupted": "yellow",
    "killed": "yellow",
    "running": "cyan",
}


def print_result(path: Path, *, as_json: bool) -> None:
    """Write the report of a run and print its members, what happened, and where to look next."""
    from attnscope.report import write_report
    from attnscope.report.contents import contents
    from attnscope.runs.reader import open_run

    run = open_run(path)
    found = contents(run)
    report = write_report(run, found)
    if as_json:
        said = {
            "run": str(path),
            "status": run.status,
            "members": [asdict(member) for member in found.members],
            "verdict": list(found.verdict),
            "cells": cells_as_json(found.comparison) if found.comparison else None,
            "reference": run.data.get("reference"),
            "report": str(report),
        }
        typer.echo(to_json(said, indent=1))
        return
    console = Console(highlight=False)
    if found.comparison is not None:
        print_comparison(console, found.comparison, found.members)
    else:
        _print_members(console, found.members)
    for sentence in found.verdict:
        console.print(Text(sentence))
    for lost in run.lost:
        typer.echo(f"warning: {lost}", err=True)
    if run.writer:
        typer.echo(f"note: {run.writer}; whether it still runs cannot be told from here.", err=True)
    console.print()
    console.print(Text(f"Report: {report}"), soft_wrap=True)
    console.print(Text(f"Next:   {_next_command(run, found)}"), soft_wrap=True)


def print_comparison(console: Console, found: "Comparison", members: "Sequence[MemberRow]") -> None:
    """Print what single settings do, learning rates, and the cells, as far as a terminal holds them."""
    from attnscope.report.sweeps import comparison_tables

    left_out = False
    for table in comparison_tables(found, members):
        if _width_of(table) > console.width:
            table = table.without("diverged at")
        if len(table.rows) <= MOST_CELLS and _width_of(table) <= TOO_WIDE * console.width:
            print_block(console, table)
            console.print()
        else:
            left_out = True
    if left_out:
        console.print(Text(f"All {len(found.cells)} cells are in the report."))
        console.print()


def _width_of(table: "TableBlock") -> int:
    """Characters it takes on a narrow terminal, none of its words broken."""
    widths = [max(map(len, column)) for column in zip(table.titles, *table.rows, strict=True)]
    return sum(widths) + len(widths)


def print_block(console: Console, block: "TableBlock") -> None:
    """A table of a report on a terminal."""
    gap = 1 if console.width < 100 else 2
    table = Table(box=None, pad_edge=False, padding=(0, gap, 0, 0), header_style="bold")
    is_narrow = _width_of(block) > console.width
    for place, title in enumerate(block.titles):
        if place < block.words:
            longest = max((len(row[place]) for row in block.rows), default=0)
            table.add_column(Text(title), overflow="fold", min_width=min(longest, UNBROKEN))
        else:
            longest = max((len(row[place]) for row in block.rows), default=0)
            shown = _broken(title, longest) if is_narrow else title
            table.add_column(Text(shown), justify="right", no_wrap=len(title) < LONG_TITLE)
    for row in block.rows:
        cells = [Text(cell) for cell in row]
        for cell in cells[: block.words]:
            cell.highlight_regex(r"\btrained\b|\brescues\b", "green")
            cell.highlight_regex(r"\bdiverged\b|\bbreaks\b", "red")
            cell.highlight_regex(r"\bstalled\b|\bhides\b|\bstalls\b", "yellow")
        table.add_row(*cells)
    console.print(table)


def _broken(title: str, width: int) -> str:
    """A title in several lines, so that its column is no wider than what stands in it; RUN:MEMBER in two."""
    return "\n".join(
        line
        for part in title.replace(":", ":\n").splitlines()
        for line in textwrap.wrap(part, max(width, *map(len, part.split())), break_on_hyphens=False)
    )


def _print_members(console: Console, members: "Sequence[MemberRow]") -> None:
    gap = 1 if console.width < 100 else 2
    table = Table(box=None, pad_edge=False, padding=(0, gap, 0, 0), header_style="bold")
    table.add_column("member", overflow="fold")
    table.add_column("status", no_wrap=True)
    for title in ("step", "first", "best", "last", "val"):
        table.add_column(title, justify="right", no_wrap=True)
    for title in ("entropy", "max_prob", "max_logit"):
        table.add_column(title, justify="right", no_wrap=True)
    for member in members[:MOST_MEMBERS]:
        table.add_row(
            Text(member.name),
            Text(member.status, style=STYLES.get(member.status, "")),
            "-" if member.step is None else str(member.step),
            number(member.first_loss),
            number(member.best_loss),
            number(member.final_loss),
            number(member.val_loss),
            _from_to(member.start.entropy, member.end.entropy),
            _from_to(member.start.max_prob, member.end.max_prob),
            _from_to(member.start.max_logit, member.end.max_logit),
        )
    console.print(table)
    if len(members) > MOST_MEMBERS:
        console.print(Text(f"and {len(members) - MOST_MEMBERS} more in the report"))
    console.print()


def cells_as_json(found: "Comparison") -> list[dict[str, object]]:
    """Cells as JSON has them."""
    effects = {change.cell.name: change.effect for change in found.changes}
    differences = {each.cell: each for each in found.differences}
    return [
        {
            "cell": cell.name,
            "settings": dict(cell.settings),
            "outcomes": dict(cell.outcomes),
            "final_losses": list(cell.final_losses),
            "diverged_at": list(cell.diverged_at),
            "is_baseline": cell is found.baseline,
            "effect_of_single_change": effects.get(cell.name),
            "difference": asdict(differences[cell.name]) if cell.name in differences else None,
        }
        for cell in found.cells
    ]


def _next_command(run: "Run", found: "Contents") -> str:
    """What diverged without the scale is tried again with clipping; anything else is asked for its causes."""
    words = [word for word in run.command if word != "--json"]
    if "--name" in words:  # the name is taken
        at = words.index("--name")
        del words[at : at + 2]
    diverged = any(member.status == "diverged" for member in found.members)
    if (
        diverged
        and words[:2] == ["attnscope", "train"]
        and {"--no-scale", "--clip"} & {*words} == {"--no-scale"}
    ):
        return f"{shlex.join(words)} --clip 1.0"
    return f"attnscope diagnose {shlex.quote(str(run.path))}"


def print_runs(folder: Path, *, as_json: bool) -> None:
    """Print one line per run in a folder."""
    from attnscope.errors import RunError
    from attnscope.runs.reader import list_runs

    if not folder.is_dir():
        raise RunError(f"{folder}: no such folder. Make a run first: attnscope train --no-scale")
    found = list_runs(folder)
    if as_json:
        rows = [{**asdict(run), "path": str(run.path)} for run in found]
        typer.echo(to_json(rows, indent=1))
        return
    if not found:
        typer.echo(f"No runs in {folder}. Make one: attnscope train --no-scale", err=True)
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("run", "status", "created", "last step", "members"):
        table.add_column(title, overflow="fold")
    for run in found:
        members = ", ".join(run.members[:4]) + (" ..." if len(run.members) > 4 else "")
        table.add_row(
            Text(run.name),
            Text(
                f"{run.status}: {run.writer}" if run.writer else run.status,
                style=STYLES.get(run.status, ""),
            ),
            Text(run.created),
            "-" if run.last_step is None else str(run.last_step),
            Text(run.problem or "; ".join(filter(None, (members, run.error)))),
        )
    console = Console(highlight=False)
    console.print(table)
    console.print()
    console.print(Text(f"Next: attnscope report {shlex.quote(str(found[-1].path))}"))


def print_overhead(found: "Overhead", *, as_json: bool) -> None:
    """Print what `attnscope bench overhead` measured."""
    if as_json:
        typer.echo(to_json(asdict(found), indent=1))
        return
    for line in (
        "Ratios of step times: median (middle half); d_model 128, 4 layers, seq_len 64, batch 16.",
        f"recording on / off                    {found.recording}",
        f"tokens/s, recording on / plain loop   {found.plain}",
        f"plain loop / itself                   {found.plain_twice}",
        f"16 tiny members at once / one by one  {found.ensemble}",
        f"tables on disk                        {found.mb_per_1000_steps:.2f} MB per 1,000 steps",
        f"tokens/s                              {found.recorded_tokens_s:,.0f} recorded, "
        f"{found.plain_tokens_s:,.0f} plain",
    ):
        typer.echo(line)


def print_watch_overhead(found: "WatchOverhead", *, as_json: bool) -> None:
    """Print what `attnscope bench overhead --watch` measured."""
    if as_json:
        typer.echo(to_json(asdict(found), indent=1))
        return
    for line in (
        "Ratios of step times: median (middle half); d_model 256, 4 layers, seq_len 256, batch 8, fused attention, AdamW.",
        f"watched, every step / not watched        {found.every_step}",
        f"watched, every {found.every} steps / not watched    {found.default}",
        f"not watched / itself                     {found.unwatched}",
        f"step without attnscope                   {found.step_ms:.0f} ms",
    ):
        typer.echo(line)


def print_sweep_gain(found: "SweepGain", *, as_json: bool) -> None:
    """Print what `attnscope bench sweep` measured."""
    if as_json:
        typer.echo(to_json(asdict(found), indent=1))
        return
    gains = found.large.median > WORTH_IT
    for line in (
        "Ratios of member-steps per second: median (middle half); d_model 32, 2 layers, seq_len 16.",
        f"64 members at once / one by one            {found.loop}",
        f"64 members at once / one by one, two jobs  {found.jobs}",
        f"default model at once / one by one, {found.large_on:<6} {found.large}",
        f"member-steps/s, 64 tiny members            {found.member_steps_s:,.0f}",
        "The default model gains from being trained together."
        if gains
        else "The default model gains nothing from being trained together here: one member keeps the cores busy.",
    ):
        typer.echo(line)


def print_report_costs(found: "Sequence[ReportCost]", *, as_json: bool) -> None:
    """Print what `attnscope bench report` measured."""
    if as_json:
        typer.echo(to_json([asdict(each) for each in found], indent=1))
        return
    console = Console(highlight=False)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for title in ("run", "MB", "opened", "analysed", "reported"):
        table.add_column(title, justify="left" if title == "run" else "right")
    for each in found:
        shape = each.shape
        table.add_row(
            f"{shape.n_members:,} x {shape.n_steps:,} steps x {shape.n_layers} x {shape.n_heads} heads",
            f"{each.mb:.0f}",
            *(
                f"{cost.seconds:.1f} s, {cost.peak_bytes / 2**30:.2f} GiB"
                for cost in (each.opened, each.analysed, each.reported)
            ),
        )
    console.print(table)


def _from_to(start: float | None, end: float | None) -> str:
    return f"{number(start)}→{number(end)}"
