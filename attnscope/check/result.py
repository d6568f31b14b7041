"""What a check says: one sentence with numbers, what stands behind it, and what to do."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Literal

# passed: it could have failed, and did not. stated: a fact about the model, neither right nor wrong. not looked: it could
# not be made, and the finding says why.
Status = Literal["passed", "failed", "stated", "not looked"]

MOST_ROWS = 12  # of evidence: a fault is told layer by layer, where a finding about a run shows its few worst numbers

Row = Mapping[str, object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """What one check found.

    Attributes:
        name: of the check.
        status: what the finding amounts to.
        finding: one sentence with the measured numbers.
        evidence: rows of plain data behind it, at most MOST_ROWS, the worst first.
        remedy: what to do; empty where there is nothing to do.
    """

    name: str
    status: Status
    finding: str
    evidence: tuple[Row, ...]
    remedy: str


def to_table(checked: Checked) -> dict[str, object]:
    """A result as JSON has it; numbers that are not finite are left to `attnscope.runs.layout.to_json`."""
    return asdict(checked)


def passed(name: str, finding: str, evidence: Iterable[Row] = ()) -> Checked:
    """A check that could have failed."""
    return _result(name, "passed", finding, evidence, "")


def failed(name: str, finding: str, evidence: Iterable[Row], remedy: str) -> Checked:
    """A fault."""
    return _result(name, "failed", finding, evidence, remedy)


def stated(name: str, finding: str, evidence: Iterable[Row] = ()) -> Checked:
    """What the model is, where nothing says what it is meant to be."""
    return _result(name, "stated", finding, evidence, "")


def not_looked(name: str, why: str, remedy: str, evidence: Iterable[Row] = ()) -> Checked:
    """A check that could not be made, and what would make it possible."""
    return _result(name, "not looked", why, evidence, remedy)


def many(count: int, noun: str) -> str:
    """A count for a sentence: 1 layer, 2 layers."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def short(value: float) -> str:
    """A number for a sentence."""
    return f"{value:.3g}"


def listed(names: Iterable[str], most: int = 3) -> str:
    """The first few names, each once."""
    different = list(dict.fromkeys(names))
    return ", ".join(different[:most]) + (", ..." if len(different) > most else "")


def _result(name: str, status: Status, finding: str, evidence: Iterable[Row], remedy: str) -> Checked:
    rows = tuple(evidence)[:MOST_ROWS]
    return Checked(name=name, status=status, finding=finding, evidence=rows, remedy=remedy)
