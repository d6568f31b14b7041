"""What a rule has against single members, and the one finding that it makes of that."""

from collections.abc import Sequence
from dataclasses import dataclass

from attnscope.findings import SEVERITIES, Evidence, Finding, Kind, Severity, of_several, worst_first
from attnscope.runs.reader import Run


@dataclass(frozen=True, slots=True, kw_only=True)
class Concern:
    """What a rule has against one member.

    Attributes:
        member: its name.
        step: at which it shows first; None = it is no matter of steps.
        badness: the largest is worst.
        said: a sentence about this member, with its name, the numbers and a full stop.
        evidence: the worst first.
        severity: of this member; the finding has the worst.
    """

    member: str
    step: int | None = None
    badness: float
    said: str
    evidence: tuple[Evidence, ...]
    severity: Severity


def finding_of(
    run: Run,
    concerns: Sequence[Concern],
    *,
    rule: str,
    title: str,
    kind: Kind,
    several: str,
    remedy: str,
    source: str,
    explains: Sequence[str] = (),
) -> Finding | None:
    """One finding for all members concerned; None where there are none.

    Args:
        run: whose members.
        concerns: one for each member, in any order.
        rule: its name.
        title: a few words.
        kind: see `Finding`.
        several: what is said of several members before the worst one: "have attention that collapses".
        remedy: what to try.
        source: of the thresholds.
        explains: see `Finding`.
    """
    if not concerns:
        return None
    order = {entry.name: at for at, entry in enumerate(run.entries)}
    ranked = sorted(concerns, key=lambda concern: (_rank(concern), -concern.badness, order[concern.member]))
    worst = ranked[0]
    members = tuple(sorted((concern.member for concern in concerns), key=order.__getitem__))
    pieces = [piece for concern in ranked for piece in concern.evidence]
    evidence, left_out = worst_first(pieces, lambda piece: piece)
    return Finding(
        rule=rule,
        title=title,
        kind=kind,
        severity=worst.severity,
        summary=f"{of_several(members, several)}{worst.said}",
        members=members,
        evidence=evidence,
        evidence_left_out=left_out,
        remedy=remedy,
        source=source,
        step=worst.step,
        explains=tuple(explains),
    )


def _rank(concern: Concern) -> int:
    return SEVERITIES.index(concern.severity)
