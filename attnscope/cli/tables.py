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

    from attnscope.comparison.cells import Comparison
    from attnscope.comparison.member import MemberRow
    from attnscope.report.blocks import Table as TableBlock
    from attnscope.report.contents import Contents
    from attnscope.runs.reader import Run

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
    from attnscope.comparison.member import row_as_json
    from attnscope.report import write_report
    from attnscope.report.contents import contents_of
    from attnscope.runs.reader import open_run

    run = open_run(path)
    contents = contents_of(run)
    report = write_report(run, contents)
    if as_json:
        said = {
            "run": str(path),
            "status": run.status,
            "members": [row_as_json(member) for member in contents.members],
            "verdict": list(contents.verdict),
            "cells": cells_as_json(contents.comparison) if contents.comparison else None,
            "reference": run.data.get("reference"),
            "report": str(report),
        }
        typer.echo(to_json(said, indent=1))
        return
    console = Console(highlight=False)
    if contents.comparison is not None:
        print_comparison(console, contents.comparison, contents.members)
    else:
        _print_members(console, contents.members)
    for sentence in contents.verdict:
        console.print(Text(sentence))
    for lost in run.lost:
        typer.echo(f"warning: {lost}", err=True)
    if run.writer:
        typer.echo(f"note: {run.writer}; whether it still runs cannot be told from here.", err=True)
    console.print()
    console.print(Text(f"Report: {report}"), soft_wrap=True)
    console.print(Text(f"Next:   {_next_command(run, contents)}"), soft_wrap=True)


def print_comparison(console: Console, comparison: "Comparison", members: "Sequence[MemberRow]") -> None:
    """Print what single settings do, learning rates, and the cells, as far as a terminal holds them."""
    from attnscope.report.comparison import comparison_tables

    left_out = False
    for table in comparison_tables(comparison, members):
        if _width_of(table) > console.width:
            table = table.without("diverged at")
        if len(table.rows) <= MOST_CELLS and _width_of(table) <= TOO_WIDE * console.width:
            print_block(console, table)
            console.print()
        else:
            left_out = True
    if left_out:
        console.print(Text(f"All {len(comparison.cells)} cells are in the report."))
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
    for at, title in enumerate(block.titles):
        if at < block.words:
            longest = max((len(row[at]) for row in block.rows), default=0)
            table.add_column(Text(title), overflow="fold", min_width=min(longest, UNBROKEN))
        else:
            longest = max((len(row[at]) for row in block.rows), default=0)
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


def cells_as_json(comparison: "Comparison") -> list[dict[str, object]]:
    """Cells as JSON has them."""
    effects = {change.cell.name: change.effect for change in comparison.changes}
    differences = {difference.cell: difference for difference in comparison.differences}
    return [
        {
            "cell": cell.name,
            "settings": dict(cell.settings),
            "outcomes": dict(cell.outcomes),
            "final_losses": list(cell.final_losses),
            "diverged_at": list(cell.diverged_at),
            "is_baseline": cell is comparison.baseline,
            "effect_of_single_change": effects.get(cell.name),
            "difference": asdict(differences[cell.name]) if cell.name in differences else None,
        }
        for cell in comparison.cells
    ]


def _next_command(run: "Run", contents: "Contents") -> str:
    """What diverged without the scale is tried again with clipping; anything else is asked for its causes."""
    words = [word for word in run.command if word != "--json"]
    if "--name" in words:  # the name is taken
        at = words.index("--name")
        del words[at : at + 2]
    diverged = any(member.status == "diverged" for member in contents.members)
    if diverged and words[:2] == ["attnscope", "train"] and {"--no-scale", "--clip"} & {*words} == {"--no-scale"}:
        return f"{shlex.join(words)} --clip 1.0"
    return f"attnscope diagnose {shlex.quote(str(run.path))}"


def print_runs(folder: Path, *, as_json: bool) -> None:
    """Print one line per run in a folder."""
    from attnscope.errors import RunError
    from attnscope.runs.listing import list_runs

    if not folder.is_dir():
        raise RunError(f"{folder}: no such folder. Make a run first: attnscope train --no-scale")
    runs = list_runs(folder)
    if as_json:
        rows = [{**asdict(run), "path": str(run.path)} for run in runs]
        typer.echo(to_json(rows, indent=1))
        return
    if not runs:
        typer.echo(f"No runs in {folder}. Make one: attnscope train --no-scale", err=True)
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("run", "status", "created", "last step", "members"):
        table.add_column(title, overflow="fold")
    for run in runs:
        members = ", ".join(run.members[:4]) + (" ..." if len(run.members) > 4 else "")
        table.add_row(
            Text(run.name),
            Text(f"{run.status}: {run.writer}" if run.writer else run.status, style=STYLES.get(run.status, "")),
            Text(run.created),
            "-" if run.last_step is None else str(run.last_step),
            Text(run.problem or "; ".join(filter(None, (members, run.error)))),
        )
    console = Console(highlight=False)
    console.print(table)
    console.print()
    console.print(Text(f"Next: attnscope report {shlex.quote(str(runs[-1].path))}"))


def _from_to(start: float | None, end: float | None) -> str:
    return f"{number(start)}→{number(end)}"
