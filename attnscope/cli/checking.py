"""`attnscope check` on stdout: a table of checks, and for those that failed what stands behind it and what to do."""

import contextlib
import shlex
import sys
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.text import Text

if TYPE_CHECKING:
    from attnscope.check.result import Checked

STYLES = {"passed": "green", "failed": "bold red", "stated": "cyan", "not looked": "yellow"}
STATUS, NAME, INDENT = 12, 25, 2  # widths
FIRST = "first module"  # of the evidence, which the finding names


def check_and_print(target: str, *, causal: bool | None, as_json: bool) -> frozenset[str]:
    """Check the model that `target` makes, and print what was found.

    Returns:
        The statuses of the checks.

    Raises:
        AttnscopeError: `target` cannot be used, or its model not be called.
    """
    from attnscope.check.factory import made_by
    from attnscope.check.model import check_model
    from attnscope.check.result import to_table
    from attnscope.runs.layout import to_json

    with contextlib.redirect_stdout(sys.stderr):  # what the user's code prints is no result
        model, batch = made_by(target)
        with Console(stderr=True).status(Text(f"Checking {target}")):
            results = check_model(model, batch, causal=causal)
    statuses = frozenset(str(result.status) for result in results)
    if as_json:
        said = {
            "target": target,
            "model": type(model).__name__,
            "counts": Counter(result.status for result in results),
            "checks": [to_table(result) for result in results],
        }
        typer.echo(to_json(said, indent=1))
        return statuses
    console = Console(highlight=False)
    print_checks(console, results)
    console.print()
    again = f"attnscope check {shlex.quote(target)}"
    after = f"repair it, then again: {again}" if "failed" in statuses else "attnscope watch train.py"
    console.print(Text(f"Next: {after}"), soft_wrap=True)
    return statuses


def print_checks(console: Console, results: "Sequence[Checked]") -> None:
    """A line for each check, and what stands behind those that failed."""
    said_by: dict[str, str] = {}
    for result in results:
        _print_line(console, result, said_by.setdefault(_said(result), result.name))
    for result in results:
        if result.status == "failed":
            _print_failed(console, result)


def _said(checked: "Checked") -> str:
    return f"{checked.finding} {checked.remedy}" if checked.status == "not looked" else checked.finding


def _print_line(console: Console, checked: "Checked", said_by: str) -> None:
    """Status, name and finding in three columns; what another check has said already is not said again."""
    said = _said(checked) if said_by == checked.name else f"As {said_by}."
    first, *rest = textwrap.wrap(said, max(console.width - STATUS - NAME, 30), break_on_hyphens=False)
    console.print(
        Text.assemble((checked.status.ljust(STATUS), STYLES[checked.status]), checked.name.ljust(NAME), first),
        soft_wrap=True,
    )
    for line in rest:
        console.print(Text(" " * (STATUS + NAME) + line), soft_wrap=True)


def _print_failed(console: Console, checked: "Checked") -> None:
    console.print()
    console.print(Text.assemble(("failed: ", STYLES["failed"]), (checked.name, "bold")))
    # Rows of one kind share a table: pairs of positions, layers.
    kinds: dict[tuple[str, ...], list[Mapping[str, object]]] = {}
    for row in checked.evidence:
        kinds.setdefault(tuple(name for name in row if name != FIRST), []).append(row)
    margin = " " * INDENT
    for rows in kinds.values():
        head, *lines = _table(rows)
        console.print(Text(margin + head, style="dim"), soft_wrap=True)
        for line in lines:
            console.print(Text(margin + line), soft_wrap=True)
    for line in textwrap.wrap(
        f"Try: {checked.remedy}",
        console.width,
        initial_indent=margin,
        subsequent_indent=margin,
        break_on_hyphens=False,
    ):
        console.print(Text(line), soft_wrap=True)


def _table(rows: Sequence[Mapping[str, object]]) -> list[str]:
    """A head and lines, without trailing blanks; numbers stand on the right."""
    names = [name for name in rows[0] if name != FIRST]
    columns = []
    for name in names:
        cells = [name, *(_shown(row.get(name)) for row in rows)]
        width = max(map(len, cells))
        is_number = isinstance(rows[0].get(name), int | float)
        columns.append([cell.rjust(width) if is_number else cell.ljust(width) for cell in cells])
    return ["  ".join(cells).rstrip() for cells in zip(*columns, strict=True)]


def _shown(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
