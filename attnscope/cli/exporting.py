"""`attnscope export`: what was written, where it is, and what shows it."""

from pathlib import Path

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from attnscope.cli.tables import MOST_MEMBERS
from attnscope.export import export_run
from attnscope.runs.layout import to_json
from attnscope.runs.reader import open_run


def export_and_print(path: Path, target: str, *, out: Path | None, as_json: bool) -> None:
    """Export a run and print what was written.

    Raises:
        AttnscopeError: the run cannot be opened, or not exported.
    """
    run = open_run(path)
    with Console(stderr=True).status(Text(f"Exporting {path} to {target}")):
        exported = export_run(run, target, out=out)
    for lost in exported.lost:
        typer.echo(f"warning: {lost}", err=True)
    if as_json:
        said = {
            "run": str(path),
            "target": target,
            "place": exported.place,
            "counts": exported.counts,
            "unit": exported.unit,
            "lost": exported.lost,
            "next": exported.next_command,
        }
        typer.echo(to_json(said, indent=1))
        return
    console = Console(highlight=False)
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(overflow="fold")
    table.add_column(justify="right", no_wrap=True)
    for name, count in list(exported.counts.items())[:MOST_MEMBERS]:
        table.add_row(Text(name), f"{count:,} {exported.unit}")
    console.print(table)
    if len(exported.counts) > MOST_MEMBERS:
        console.print(Text(f"and {len(exported.counts) - MOST_MEMBERS} more"))
    console.print()
    console.print(Text(f"Written: {exported.place}"), soft_wrap=True)
    console.print(Text(f"Next:    {exported.next_command}"), soft_wrap=True)
