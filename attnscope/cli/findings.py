"""`attnscope diagnose` on stdout: findings as text for people, as JSON for machines."""

import shlex
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from attnscope.diagnose import Diagnosis, Evidence, Finding
    from attnscope.runs.reader import Run

STYLES = {"error": "bold red", "warning": "bold yellow", "note": "bold cyan"}
INDENT = 2


def print_findings(path: Path, *, as_json: bool) -> "tuple[Finding, ...]":
    """Diagnose a run, print what was found, or what was looked at, and where to look next; returns the findings."""
    from attnscope.diagnose import RULES, examine, findings_json
    from attnscope.findings import in_words
    from attnscope.runs.reader import open_run

    run = open_run(path)
    said = examine(run)
    findings = said.findings
    if as_json:
        typer.echo(findings_json(run, said))
        return findings
    console = Console(highlight=False)
    blind = {each.rule for each in said.not_looked if not each.members}
    looked = sum(rule.__name__ not in blind for rule in RULES)
    print_diagnosis(console, said)
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
    return findings


def print_diagnosis(console: Console, said: "Diagnosis") -> None:
    """Chains from causes to what came of them, then each finding."""
    from attnscope.findings import chain_in_words

    for chain in said.chains:
        _print_paragraph(console, chain_in_words(chain))
    if said.chains:
        console.print()
    for finding in said.findings:
        _print_finding(console, finding)


def fails(fail_on: str | None) -> "Callable[[Finding], bool]":
    """Whether a finding is one that --fail-on asks for.

    Raises:
        BadParameter: it is no severity and no rule.
    """
    from attnscope.diagnose import RULES
    from attnscope.findings import SEVERITIES

    if fail_on is None:
        return lambda _finding: False
    asked = {"error": SEVERITIES[:1], "warning": SEVERITIES[:2]}.get(fail_on)
    if asked is not None:
        return lambda finding: finding.severity in asked
    names = [rule.__name__ for rule in RULES]
    if fail_on not in names:
        raise typer.BadParameter(
            f"{fail_on!r} is none of error, warning and the rules: {', '.join(names)}.", param_hint="--fail-on"
        )
    return lambda finding: finding.rule == fail_on


def _print_finding(console: Console, finding: "Finding") -> None:
    from attnscope.findings import confidence_in_words, label

    console.print(Text.assemble((f"{label(finding)}: ", STYLES[finding.severity]), (finding.title, "bold")))
    _print_paragraph(console, finding.summary, indent=INDENT)
    if finding.evidence:
        console.print(Padding(_table(finding.evidence), (0, 0, 0, INDENT), expand=False))
    if finding.evidence_left_out:
        _print_paragraph(console, f"and {finding.evidence_left_out} more", indent=INDENT)
    _print_paragraph(console, f"Try: {finding.remedy}", indent=INDENT)
    _print_paragraph(console, f"Source: {finding.source}", indent=INDENT, style="dim")
    _print_paragraph(console, confidence_in_words(finding.confidence), indent=INDENT, style="dim")
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


def _looked_at(run: "Run", rules: int, of: int, found: int) -> str:
    members = _many(len(run.entries), "member")
    rows = f"{_many(len(run.steps), 'record')} of steps, {len(run.heads)} of heads"
    count = _many(of, "rule") if rules == of else f"{rules} of {of} rules"
    looked = f"Looked at {members} ({rows}) with {count}."
    return looked if found else f"No findings. {looked}"


def _many(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
