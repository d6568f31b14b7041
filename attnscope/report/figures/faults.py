"""How often a diagnosis is right, per kind of fault; and how long before the loss each signal knew."""

from collections.abc import Sequence
from dataclasses import dataclass

from attnscope.report.blocks import Figure
from attnscope.report.figures.canvas import COLOURS, GREY, STYLE, canvas_with, save

ATTENTION, LOSS = COLOURS[1], COLOURS[4]
DETECTED, NAMED = COLOURS[5], COLOURS[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class KindBars:
    """Of one kind of fault.

    Attributes:
        name: a few words.
        programs: that were harmed.
        detected: share of them.
        named: share whose cause was told first.
    """

    name: str
    programs: int
    detected: float
    named: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LeadMark:
    """Of one signal.

    Attributes:
        name: its column.
        is_attention: it looks into attention.
        every: median of its lead over all runs that diverged, and the ends of its interval, steps.
        gradual: over those that did so gradually; None = there is none.
        false_alarms: share of healthy programs.
    """

    name: str
    is_attention: bool
    every: tuple[float, float, float]
    gradual: tuple[float, float, float] | None
    false_alarms: float


def draw_kinds(bars: Sequence[KindBars]) -> Figure:
    """Two bars for each kind of fault: detected, and right first."""
    from matplotlib import rc_context

    with rc_context(STYLE):
        canvas, ((axes,),) = canvas_with(0.9 + 0.2 * len(bars))
        rows = range(len(bars))
        axes.barh(rows, [bar.detected for bar in bars], height=0.8, color=DETECTED, alpha=0.45, label="detected")
        axes.barh(rows, [bar.named for bar in bars], height=0.4, color=NAMED, label="right cause first")
        axes.set_yticks(rows, [f"{bar.name} ({bar.programs})" for bar in bars])
        axes.set(ylim=(len(bars) - 0.4, -0.6), xlim=(0, 1), xlabel="share of the programs that were harmed")
        axes.grid(visible=False, axis="y")
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
        return save(
            canvas,
            name="kinds",
            title="Detected, and right cause first",
            alt="For each kind of fault, the share of harmed programs in which it was detected and in which its cause was told first",
            caption="In brackets the programs of the reported half that were harmed.",
        )


def draw_leads(marks: Sequence[LeadMark], *, share: float) -> Figure:
    """Leads of each signal, and its false alarms.

    Args:
        marks: signals, from top to bottom.
        share: of false alarms, that thresholds were set to.
    """
    from matplotlib import rc_context

    with rc_context(STYLE):
        canvas, ((left, right),) = canvas_with(1.1 + 0.27 * len(marks), columns=2, sharey=True, width_ratios=(3, 1))
        for row, mark in enumerate(marks):
            colour = ATTENTION if mark.is_attention else LOSS
            for lead, shift, filled in ((mark.every, -0.16, False), (mark.gradual, 0.16, True)):
                if lead is not None:
                    median, low, high = lead
                    left.plot((low, high), (row + shift,) * 2, color=colour, linewidth=1.4, alpha=0.7)
                    left.plot(median, row + shift, "o", color=colour, markersize=5, mfc=colour if filled else "white")
            right.plot((0, mark.false_alarms), (row, row), color=colour, linewidth=3, solid_capstyle="butt")
            right.plot(mark.false_alarms, row, "o", color=colour, markersize=4)
        left.set_yticks(range(len(marks)), [mark.name for mark in marks])
        left.set(ylim=(len(marks) - 0.4, -0.6), xlabel="steps before the loss diverges", xlim=(-0.5, None))
        right.axvline(share, color=GREY, linestyle=":", linewidth=0.8)
        right.set(xlabel="false alarms (share)", xlim=(0, None))
        right.set_xlim(0, max(right.get_xlim()[1], 2 * share))
        for label, colour, filled in (
            ("attention, gradual", ATTENTION, True),
            ("attention, all", ATTENTION, False),
            ("loss and gradients, gradual", LOSS, True),
            ("loss and gradients, all", LOSS, False),
        ):
            left.plot([], [], "o", color=colour, mfc=colour if filled else "white", markersize=5, label=label)
        left.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
        return save(
            canvas,
            name="leads",
            title="How long before the loss, at which price",
            alt="For each signal, the median steps from its first firing to divergence with an interval, and its share of false alarms",
            caption="Left: median over runs that diverged, with its 95 % bootstrap interval; open circles all of them, filled ones "
            "where it came gradually. Right: share of healthy programs of the reported half in which the signal fires at "
            "the same threshold; dotted what the threshold was set to on the other half.",
        )
