"""`attnscope diagnose` on stdout: findings as text for people, as JSON for machines."""

import shlex
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from attnscope.diagnose import Evidence, Finding
    from attnscope.runs.reader import Run

STYLES = {"cause": "bold red", "risk": "bold cyan", "symptom": "bold yellow"}
INDENT = 2


def print_findings(path: Path, *, as_json: bool) -> frozenset[str]:
    """Diagnose a run, print what was found, or what was looked at, and where to look next.

    Returns:
        The kinds of the findings.
    """
    from attnscope.diagnose import RULES, examine, findings_json
    from attnscope.findings import in_words
    from attnscope.runs.reader import open_run

    run = open_run(path)
    said = examine(run)
    findings = said.findings
    kinds = frozenset(str(finding.kind) for finding in findings)
    if as_json:
        typer.echo(findings_json(run, said))
        return kinds
    console = Console(highlight=False)
    blind = {each.rule for each in said.not_looked if not each.members}
    looked = [rule.__name__ for rule in RULES if rule.__name__ not in blind]
    for finding in findings:
        _print_finding(console, finding)
    _print_paragraph(console, _looked_at(run, looked, len(RULES), len(findings)))
    if said.not_looked:
        console.print()
        console.print(Text("Could not look:"))
        for line in in_words(said.not_looked):
            _print_paragraph(console, line, indent=INDENT)
    for lost in run.lost:
        typer.echo(f"warning: {lost}", err=True)
    if run.writer:
        typer.echo(f"note: {run.writer}; whether it still runs cannot be told from here.", err=True)
    console.print()
    console.print(Text(f"Next: attnscope report {shlex.quote(str(path))}"), soft_wrap=True)
    return kinds


def _print_finding(console: Console, finding: "Finding") -> None:
    console.print(Text.assemble((f"{finding.kind}: ", STYLES.get(finding.kind, "")), (finding.title, "bold")))
    _print_paragraph(console, finding.summary, indent=INDENT)
    if finding.evidence:
        console.print(Padding(_table(finding.evidence), (0, 0, 0, INDENT), expand=False))
    if finding.evidence_left_out:
        _print_paragraph(console, f"and {finding.evidence_left_out} more", indent=INDENT)
    _print_paragraph(console, f"Try: {finding.remedy}", indent=INDENT)
    _print_paragraph(console, f"Source: {finding.source}", indent=INDENT, style="dim")
    console.print()


def _print_paragraph(console: Console, text: str, *, indent: int = 0, style: str = "") -> None:
    """Wrapped without the trailing blanks that rich fills lines with: they would be in the way of a pipe."""
    margin = " " * indent
    for line in textwrap.wrap(
        text, console.width, initial_indent=margin, subsequent_indent=margin, break_on_hyphens=False
    ):
        console.print(Text(line, style=style), soft_wrap=True)


def _table(evidence: "tuple[Evidence, ...]") -> Table:
    from attnscope.findings import evidence_columns

    columns = evidence_columns(evidence)
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="dim")
    for title in columns:
        is_number = title in ("value", "compared with")
        table.add_column(
            title,
            justify="left" if title in ("member", "group", "quantity") else "right",
            no_wrap=is_number,
            overflow="ellipsis" if is_number else "fold",
        )
    for row in zip(*columns.values(), strict=True):
        table.add_row(*map(Text, row))
    return table


def _looked_at(run: "Run", rules: list[str], of: int, found: int) -> str:
    members = _many(len(run.entries), "member")
    rows = f"{_many(len(run.steps), 'record')} of steps, {len(run.heads)} of heads"
    count = _many(of, "rule") if len(rules) == of else f"{len(rules)} of {of} rules"
    names = f": {', '.join(rules)}" if rules else ""
    looked = f"Looked at {members} ({rows}) with {count}{names}."
    return looked if found else f"No findings. {looked}"


def _many(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
