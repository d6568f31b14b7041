"""What a check says: one sentence with numbers, what stands behind it, and what to do."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Literal

Status = Literal["passed", "failed", "skipped"]

MOST_EVIDENCE = 12  # rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """What one check found.

    Attributes:
        name: of the check.
        status: skipped = it could not be made, and the finding says why.
        finding: one sentence with the measured numbers.
        evidence: rows of plain data behind it, at most MOST_EVIDENCE, the worst first.
        remedy: what to do; empty where it passed.
    """

    name: str
    status: Status
    finding: str
    evidence: tuple[Mapping[str, object], ...]
    remedy: str


def to_table(checked: Checked) -> dict[str, object]:
    """A result as JSON has it; numbers that are not finite are left to `attnscope.runs.layout.to_json`."""
    return asdict(checked)


def skipped(name: str, why: str, remedy: str) -> Checked:
    """A check that could not be made."""
    return Checked(name=name, status="skipped", finding=why, evidence=(), remedy=remedy)


def many(count: int, noun: str) -> str:
    """A count for a sentence: 1 layer, 2 layers."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def short(value: float) -> str:
    """A number for a sentence."""
    return f"{value:.3g}"
