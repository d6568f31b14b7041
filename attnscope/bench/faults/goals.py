"""What the rules and signals are meant to reach, and whether they do."""

from dataclasses import dataclass

from attnscope.bench.faults.lead import COVERAGE, LeadTable
from attnscope.bench.faults.score import Score

DETECTED = 0.95
NAMED = 0.90
ERRORS = 0.01  # per healthy program
WARNINGS = 0.05
LEAD = 10  # steps
TIMES_GRAD_NORM = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """One goal.

    Attributes:
        what: is measured.
        wanted: in words.
        reached: in words.
        is_met: None = could not be measured.
    """

    what: str
    wanted: str
    reached: str
    is_met: bool | None

    @property
    def verdict(self) -> str:
        """In a word."""
        return {True: "met", False: "missed", None: "not measured"}[self.is_met]


def goals(score: Score) -> tuple[Goal, ...]:
    """All of them."""
    harmful, healthy = f"of {score.harmful}", f"on {score.healthy}"
    return (
        Goal(
            what="harmful faults detected",
            wanted=f"≥ {DETECTED:.2f}",
            reached=f"{score.detected:.3f} {harmful}",
            is_met=score.detected >= DETECTED if score.harmful else None,
        ),
        Goal(
            what="right cause told first",
            wanted=f"≥ {NAMED:.2f}",
            reached=f"{score.named:.3f} {harmful}",
            is_met=score.named >= NAMED if score.harmful else None,
        ),
        Goal(
            what="errors per healthy program",
            wanted=f"≤ {ERRORS:.2f}",
            reached=f"{score.errors_per_healthy:.3f} {healthy}",
            is_met=score.errors_per_healthy <= ERRORS if score.healthy else None,
        ),
        Goal(
            what="warnings per healthy program",
            wanted=f"≤ {WARNINGS:.2f}",
            reached=f"{score.warnings_per_healthy:.3f} {healthy}",
            is_met=score.warnings_per_healthy <= WARNINGS if score.healthy else None,
        ),
        *_of_leads(score.leads),
    )


def _of_leads(leads: LeadTable | None) -> tuple[Goal, Goal]:
    """Of the attention signal that was best on the other half, where the loss diverges gradually."""
    steps = "lead of the best attention signal, gradual divergence"
    times = "the same against the gradient norm's"
    wanted = (f"≥ {LEAD} steps", f"≥ {TIMES_GRAD_NORM} x")
    best, norm = (None, None) if leads is None else (leads.of(leads.best), leads.of("grad_norm"))
    if best is None or norm is None or not best.gradual.runs:
        return (
            Goal(what=steps, wanted=wanted[0], reached="no run diverged gradually", is_met=None),
            Goal(what=times, wanted=wanted[1], reached="-", is_met=None),
        )
    lead, other = best.gradual, norm.gradual
    return (
        Goal(
            what=steps,
            wanted=wanted[0],
            reached=f"{lead.median:g} ({COVERAGE} %: {lead.low:g} to {lead.high:g}) over {lead.runs} runs, {best.signal}; "
            f"{best.false_alarms} false alarms on {best.healthy}",
            is_met=lead.median >= LEAD,
        ),
        Goal(
            what=times,
            wanted=wanted[1],
            reached=f"{lead.median:g} against {other.median:g} ({other.low:g} to {other.high:g})",
            is_met=lead.median > 0 and lead.median >= TIMES_GRAD_NORM * other.median,
        ),
    )
