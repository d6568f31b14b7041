"""`attnscope compare`: from runs and members on a command line to one table, one page, and where they stand."""

import shlex
from collections.abc import Sequence
from pathlib import Path

import typer
from rich.console import Console
from rich.text import Text

from attnscope.cli.tables import cells_as_json, print_comparison
from attnscope.comparison.member import row_as_json
from attnscope.config import parse_assignment, value_text
from attnscope.report import write_comparison
from attnscope.report.side_by_side import Chosen, side_by_side
from attnscope.runs.foreign import printable
from attnscope.runs.layout import to_json
from attnscope.runs.reader import open_run

LONGEST_NAME = 60  # of a folder made of names of runs


def compare_runs(words: Sequence[str], *, baseline: Sequence[str], out: Path | None, as_json: bool) -> None:
    """Compare what was named, print it, and write its report.

    Args:
        words: RUN or RUN:MEMBER.
        baseline: section.setting=value of what the others are compared with.
        out: folder of the report; None makes one below comparisons/.
        as_json: the result as JSON on stdout.

    Raises:
        AttnscopeError: a run or member does not exist, or the report cannot be written.
    """
    chosen = [_chosen(word) for word in words]
    wanted = {key: value_text(value) for key, value in map(parse_assignment, baseline)}
    tables, contents = side_by_side(chosen, baseline=wanted)
    report = write_comparison(tables, contents, out or _folder(chosen))
    comparison = contents.comparison
    assert comparison is not None
    if as_json:
        said = {
            "members": [row_as_json(member) for member in contents.members],
            "differing": {key: list(values) for key, values in comparison.axes.items()},
            "cells": cells_as_json(comparison),
            "verdict": list(contents.verdict),
            "report": str(report),
        }
        typer.echo(to_json(said, indent=1))
        return
    console = Console(highlight=False)
    print_comparison(console, comparison, contents.members)
    for sentence in contents.verdict:
        console.print(Text(sentence))
    for lost in contents.lost:
        typer.echo(f"warning: {lost}", err=True)
    console.print()
    console.print(Text(f"Report: {report}"), soft_wrap=True)
    first = shlex.quote(str(chosen[0].run.path))
    console.print(Text(f"Next:   attnscope diagnose {first}"), soft_wrap=True)


def _chosen(word: str) -> Chosen:
    """A run, or a run and a member; a path may have a colon in it, and so may a name."""
    path = Path(word)
    pieces = word.split(":")
    if not path.exists():
        for count in range(len(pieces) - 1, 0, -1):
            before = Path(":".join(pieces[:count]))
            if before.is_dir():
                return Chosen(run=open_run(before), members=(":".join(pieces[count:]),))
        if len(pieces) > 1:  # says of the run, not of the run with a member's name, that it is not there
            path = Path(pieces[0])
    return Chosen(run=open_run(path))


def _folder(chosen: Sequence[Chosen]) -> Path:
    """The same for the same runs and members, so that a comparison made again replaces itself."""
    names = []
    for choice in chosen:
        names.append(choice.run.name)
        names += choice.members or ()
    name = "-".join(dict.fromkeys(printable(name, 30) for name in names))
    safe = "".join(letter if letter.isalnum() or letter in "-_.=" else "_" for letter in name)
    return Path("comparisons") / (safe[:LONGEST_NAME].strip(".") or "comparison")
