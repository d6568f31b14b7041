"""What `attnscope bench faults` tells, as sections of a report: for the terminal, and for the pages that are made of them."""

import math
from collections.abc import Sequence

from attnscope.bench.faults.goals import goals
from attnscope.bench.faults.lead import COVERAGE, FALSE_ALARMS, GRADUAL_FROM, Lead, LeadTable, SignalLead
from attnscope.bench.faults.score import KindScore, Score
from attnscope.report.blocks import Figure, Notes, Paragraph, Section, SectionBlock, Table
from attnscope.report.figures.faults import KindBars, LeadMark, draw_kinds, draw_leads
from attnscope.report.numbers import number

MOST_INSTEAD = 2  # rules that a row names
HOW = (
    "Programs in plain PyTorch under watch and runs of the lab, with a known fault in them and without, are asked every rule. A "
    "fault counts where it did harm: the program died or diverged, its held-out loss is worse than that of its twin without the fault "
    "by more than seeds differ, or the fault is structural (a leak, a parameter that does not train). Detected: an error or a warning "
    "was found, or, where nothing measured is the worse for a structural fault, a note that names it. Right first: what is told first is a rule that names this fault. What could be tuned was tuned on one half of "
    "the base programs and seeds; the numbers are those of the other half."
)


def sections_of(score: Score, *, figures: Sequence[Figure] = ()) -> list[Section]:
    """Goals, kinds of faults, false alarms, leads, and how far each rule can be relied on."""
    pictures = {figure.name: figure for figure in figures}
    return [
        Section(key="goals", title="Goals", blocks=[goals_table(score)]),
        Section(key="kinds", title="Faults", blocks=_shown(kinds_table(score), pictures.get("kinds"))),
        Section(key="alarms", title="False alarms", blocks=_false_alarms(score)),
        Section(
            key="leads",
            title="How long before the loss",
            blocks=[Paragraph(text="No run diverged, or none was healthy: there are no leads to tell.")]
            if score.leads is None
            else _shown(leads_table(score.leads), pictures.get("leads")),
        ),
        Section(key="confidence", title="Confidence of each rule", blocks=[confidence_table(score)]),
        *([Section(key="problems", title="Not asked", blocks=[Notes(items=score.problems)])] if score.problems else []),
    ]


def figures_of(score: Score) -> list[Figure]:
    """Bars of the kinds of faults; leads and false alarms of the signals, where there are any."""
    bars = [
        KindBars(name=kind.fault, programs=kind.programs, detected=kind.detected, named=kind.named)
        for kind in score.kinds
        if kind.programs
    ]
    drawn = [draw_kinds(bars)] if bars else []
    if score.leads is not None:
        drawn.append(draw_leads([_mark(row) for row in score.leads.signals], share=FALSE_ALARMS))
    return drawn


def goals_table(score: Score) -> Table:
    """What was wanted, and what is reached."""
    return Table(
        titles=("goal", "wanted", "reached", "verdict"),
        rows=tuple((goal.what, goal.wanted, goal.reached, goal.verdict) for goal in goals(score)),
        words=4,
    )


def kinds_table(score: Score) -> Table:
    """One row per kind of fault."""
    return Table(
        titles=("fault", "told instead", "programs", "harmless", "detected", "right first", "right layer", "from step"),
        rows=tuple(_kind(kind) for kind in score.kinds if kind.programs or kind.harmless),
        words=2,
    )


def leads_table(leads: LeadTable) -> Table:
    """One row per signal."""
    return Table(
        titles=(
            "signal",
            "fires at",
            f"lead, all {leads.diverged} runs ({COVERAGE} %)",
            "fired",
            f"lead, {leads.gradual} gradual ({COVERAGE} %)",
            "fired",
            "false alarms",
            "AUROC",
        ),
        rows=tuple(map(_lead_row, leads.signals)),
        words=2,
        caption=f"Lead: median steps from the first firing to the loss's divergence, bootstrap over runs; a miss counts as 0. Thresholds "
        f"were set on {leads.tuned_healthy} healthy programs of the other half, for {FALSE_ALARMS:.0%} false alarms; after so "
        f"few, up to {leads.expected:.1%} of new ones are to be expected. Worst over layers, heads or groups at each measured step, as it "
        f"is or against the run's first value (x), whichever led longer on the other half. Gradual: diverged at step "
        f"{GRADUAL_FROM} or later, by a fault that was there from the start. AUROC: its worst value, diverged against healthy "
        f"runs; knowing alone whether the model has norms gives {_share(leads.no_norm)}.",
    )


def confidence_table(score: Score) -> Table:
    """One row per rule that said something."""
    return Table(
        titles=("rule", "right", "said", "share"),
        rows=tuple(
            (rule, str(each.right), str(each.said), f"{each.share:.2f}") for rule, each in score.confidence.items()
        ),
        words=1,
        caption="Errors and warnings on programs that were harmed and on healthy ones. Right: it names the fault, follows from a finding "
        "that does, or is a symptom of the harm.",
    )


def _false_alarms(score: Score) -> list[SectionBlock]:
    said = tuple(f"{rule}: {count}" for rule, count in score.said_of_healthy.items())
    text = (
        f"{score.healthy} healthy programs: {score.errors_per_healthy:.3f} errors, {score.warnings_per_healthy:.3f} warnings "
        f"and {score.notes_per_healthy:.3f} notes each."
    )
    return [Paragraph(text=text), *([Notes(items=said)] if said else [])]


def _kind(kind: KindScore) -> tuple[str, ...]:
    return (
        kind.fault,
        ", ".join(kind.instead[:MOST_INSTEAD]),
        str(kind.programs),
        str(kind.harmless),
        _share(kind.detected),
        _share(kind.named),
        "-" if kind.layer is None else _share(kind.layer),
        "-" if kind.step is None else f"{kind.step:.0f}",
    )


def _lead_row(row: SignalLead) -> tuple[str, ...]:
    times = " x" if row.form == "of its first" else ""
    return (
        row.signal,
        f"{'<' if row.is_low_bad else '>'} {number(row.threshold)}{times}",
        _steps(row.every),
        _share(row.every.fired),
        _steps(row.gradual),
        _share(row.gradual.fired),
        f"{row.false_alarms} of {row.healthy}",
        _share(row.auroc),
    )


def _steps(lead: Lead) -> str:
    return f"{lead.median:g} ({lead.low:g} to {lead.high:g})" if lead.runs else "-"


def _share(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2f}"


def _mark(row: SignalLead) -> LeadMark:
    return LeadMark(
        name=row.signal,
        is_attention=row.family == "attention",
        every=(row.every.median, row.every.low, row.every.high),
        gradual=(row.gradual.median, row.gradual.low, row.gradual.high) if row.gradual.runs else None,
        false_alarms=row.false_alarms / row.healthy if row.healthy else math.nan,
    )


def _shown(table: Table, figure: Figure | None) -> list[SectionBlock]:
    return [table] if figure is None else [table, figure]
