"""What all figures share: colours, marks, type sizes, curves of members, and saving with the same bytes each time.

Colours are Okabe and Ito's, which the colour-blind can tell apart; where they run out, dashes tell members apart. An outcome has a
colour and a mark. A line has gaps where its values are not finite; a cross stands before the first of them.
"""

import io
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from attnscope.comparison.member import MemberRow
from attnscope.report.blocks import Figure
from attnscope.report.contents import Contents
from attnscope.report.series import POINTS, Floats

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", (0, (5, 1.5)))
GREY = "#666666"
MISSING = "#D9D9D9"  # cells without a finite value
OUTCOMES: Mapping[str, tuple[str, str]] = {  # colour and mark
    "trained": ("#009E73", "o"),
    "stalled": ("#E69F00", "s"),
    "diverged": ("#D55E00", "X"),
}
OTHER_OUTCOME = (GREY, "d")
MOST_NAMED = len(COLOURS) * len(DASHES)  # members that have a line of their own colour
MOST_LINES = 300  # members that are drawn at all
COARSE = 150  # bins of a curve that is one of many
WIDTH = 7.6  # inches, of every figure
DPI = 130

MATH_LABEL = re.compile(r"\$\\mathdefault\{(?P<inner>.*)\}\$")
POWER = re.compile(r"10\^\{(?P<power>[^}]*)\}")
RAISED = str.maketrans("0123456789-−", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁻")

STYLE: Any = {
    "text.parse_math": False,  # every text is data: names may have $, \\, _ and ^ in them
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.2,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "figure.constrained_layout.use": True,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "attnscope",  # the same bytes each time
}


def canvas_with(height: float, *, rows: int = 1, columns: int = 1, **options: Any) -> tuple["Canvas", Any]:
    """A figure `height` inches high and its axes, (rows, columns)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(WIDTH, height), dpi=DPI)
    FigureCanvasAgg(canvas)
    return canvas, canvas.subplots(rows, columns, squeeze=False, **options)


def over_steps(axes: "Axes", *, label: bool = True) -> None:
    """Whole numbers of steps along the bottom."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
    if label:
        axes.set_xlabel("step")


def save(canvas: "Canvas", *, name: str, title: str, alt: str, caption: str) -> Figure:
    """The finished figure; without date and version, so that the same run gives the same bytes."""
    _plain_decades(canvas)
    png, svg = io.BytesIO(), io.BytesIO()
    canvas.savefig(png, format="png", metadata={"Software": None})
    canvas.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
    return Figure(name=name, title=title, alt=alt, caption=caption, png=png.getvalue(), svg=svg.getvalue())


def _plain_decades(canvas: "Canvas") -> None:
    """Powers of ten along logarithmic axes as text: the formulas that matplotlib writes there are not read as such."""
    from matplotlib.ticker import LogFormatter, LogFormatterSciNotation

    class Plain(LogFormatterSciNotation):
        def __call__(self, x: float, pos: int | None = None) -> str:
            return without_math(super().__call__(x, pos))

    for axes in canvas.axes:
        for axis in (axes.xaxis, axes.yaxis):
            if isinstance(axis.get_major_formatter(), LogFormatter):
                axis.set_major_formatter(Plain())
            if isinstance(axis.get_minor_formatter(), LogFormatter):
                axis.set_minor_formatter(Plain())


def without_math(label: str) -> str:
    r"""A label of matplotlib's logarithmic axes, such as $\mathdefault{2\times10^{-3}}$, as plain text."""
    math = MATH_LABEL.fullmatch(label)
    if math is None:
        return label
    inner = math["inner"].replace(r"\times", "×")
    return POWER.sub(lambda power: f"10{power['power'].translate(RAISED)}", inner)


def draw_members(
    axes: "Axes",
    members: Sequence[MemberRow],
    curve_of: Callable[[MemberRow], tuple[Floats, Floats]],
    *,
    pale: bool = False,
) -> bool:
    """One curve per member: by name where they are few, by outcome where they are many.

    Args:
        axes: to draw on.
        members: at most MOST_LINES of them are drawn.
        curve_of: steps and values of a member, (P,) each.
        pale: behind others, without a name.

    Returns:
        Whether there was anything finite to draw.
    """
    curves = [(member, *curve_of(member)) for member in members[:MOST_LINES]]
    curves = [curve for curve in curves if np.isfinite(curve[2]).any()]
    if len(members) > MOST_NAMED:
        _draw_outcomes(axes, curves, pale=pale)
    else:
        index_of = {member.name: index for index, member in enumerate(members)}
        for member, steps, values in curves:
            index = index_of[member.name]
            if pale:
                axes.plot(steps, values, color=colour_of(index), alpha=0.35, linewidth=1, label="_behind")
            else:
                _draw_named(axes, index, member, steps, values)
    return bool(curves)


def points_of_curves(contents: Contents) -> int:
    """Bins of the curve of each member."""
    return COARSE if len(contents.members) > MOST_NAMED else POINTS


def colour_of(index: int) -> str:
    """Of the member with this index."""
    return COLOURS[index % len(COLOURS)]


def legend(axes: "Axes", corner: Any = "best") -> None:
    """Who is who; as many columns as it takes not to hide the curves."""
    handles, _ = axes.get_legend_handles_labels()
    if handles:
        axes.legend(loc=corner, ncols=1 + (len(handles) > 7))


def plain_ticks(axes: "Axes") -> None:
    """Plain numbers along a logarithmic axis of less than two decades."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    low, high = axes.get_ylim()
    if high < 100 * low:
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_locator(NullLocator())


def reference_lines(axes: "Axes", contents: Contents) -> None:
    """What models without context reach; dotted, with the name at the line."""
    for name, value in contents.reference.items():
        if value > 0:
            axes.axhline(value, color=GREY, linewidth=0.8, linestyle=":", zorder=1)
            axes.annotate(
                name,
                (0, value),
                xycoords=("axes fraction", "data"),
                xytext=(2, 1),
                textcoords="offset points",
                fontsize=7,
                color=GREY,
                annotation_clip=True,
            )


def of_many(contents: Contents, most: int) -> str:
    """A sentence for the caption where not all members are shown."""
    total = len(contents.members)
    return f" The first {most} of {total} members are shown." if total > most else ""


def outcome_style(status: str) -> tuple[str, str]:
    """Colour and mark of an outcome."""
    return OUTCOMES.get(status, OTHER_OUTCOME)


def shown_text(name: str, most: int = 40) -> str:
    """A name as it fits, not hidden from legends by a leading underscore."""
    shown = shortened(name, most)
    return f" {shown}" if shown.startswith("_") else shown


def shortened(name: str, most: int) -> str:
    """At most so many letters of a name."""
    return name if len(name) <= most else f"{name[: most - 1]}…"


def _draw_outcomes(axes: "Axes", curves: Sequence[tuple[MemberRow, Floats, Floats]], *, pale: bool) -> None:
    counts = Counter(member.status for member, *_ in curves)
    alpha = max(0.12, min(0.6, 12 / len(curves) ** 0.75)) if curves else 1.0
    named: set[str] = set()
    for member, steps, values in curves:
        colour, _ = outcome_style(member.status)
        axes.plot(
            steps,
            np.where(np.isfinite(values), values, np.nan),
            color=colour,
            alpha=alpha * (0.4 if pale else 1.0),
            linewidth=0.8,
            label="_member",
        )
    for status, count in counts.items():
        if not pale and status not in named:
            named.add(status)
            axes.plot([], [], color=outcome_style(status)[0], label=f"{count} {status}")


def _draw_named(axes: "Axes", index: int, member: MemberRow, steps: Floats, values: Floats) -> None:
    """A curve with gaps where it is not finite, and a cross before the first of them."""
    colour = colour_of(index)
    finite = np.isfinite(values)
    axes.plot(
        steps,
        np.where(finite, values, np.nan),
        color=colour,
        linestyle=DASHES[index // len(COLOURS) % len(DASHES)],
        marker="." if finite.sum() < 3 else "",
        label=shown_text(member.name),
    )
    # Whether it broke is decided by the loss that was recorded, not by the logarithm: values that are 0 are no break.
    before = finite & (steps < (0 if member.nonfinite_at is None else member.nonfinite_at))
    if before.any():
        at = int(np.flatnonzero(before)[-1])
        axes.plot(steps[at], values[at], color=colour, marker="X", markersize=7, linestyle="", label="_cross")
        axes.annotate(
            f"non-finite at step {member.nonfinite_at}",
            (steps[at], values[at]),
            xytext=(7, -3),
            textcoords="offset points",
            fontsize=7,
            color=colour,
            annotation_clip=True,
        )
