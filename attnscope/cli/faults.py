"""`attnscope bench faults` on stdout: its sections as text for people, the score as JSON for machines."""

import textwrap
from dataclasses import asdict
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

if TYPE_CHECKING:
    from attnscope.bench.faults.score import Score
    from attnscope.report.blocks import Table


def print_faults(score: "Score", *, as_json: bool) -> None:
    """Print how often the rules were right, and how long before the loss each signal knew."""
    from attnscope.bench.faults.goals import goals
    from attnscope.bench.faults.sections import sections_of
    from attnscope.report.blocks import Notes, Paragraph, Table
    from attnscope.runs.layout import to_json

    if as_json:
        said = asdict(score) | {"goals": [asdict(goal) for goal in goals(score)]}
        typer.echo(to_json(said, indent=1))
        return
    console = Console(highlight=False)
    for number, section in enumerate(sections_of(score)):
        if number:
            console.print()
        console.print(Text(section.title, style="bold"))
        for block in section.blocks:
            match block:
                case Paragraph():
                    _print_wrapped(console, block.text)
                case Notes():
                    for item in block.items:
                        _print_wrapped(console, item, indent="  ")
                case Table():
                    _print_table(console, block)


def _print_table(console: Console, table: "Table") -> None:
    shown = RichTable(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for at, title in enumerate(table.titles):
        shown.add_column(title, justify="left" if at < table.words else "right", overflow="fold")
    for row in table.rows:
        shown.add_row(*map(Text, row))
    console.print(shown)
    if table.caption:
        _print_wrapped(console, table.caption)


def _print_wrapped(console: Console, text: str, *, indent: str = "") -> None:
    for line in textwrap.wrap(text, console.width, initial_indent=indent, subsequent_indent=indent):
        console.print(Text(line), soft_wrap=True)
