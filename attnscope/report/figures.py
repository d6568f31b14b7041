"""The figures of a report, as PNG in memory: one visual language, readable in print and by the colour-blind.

Colours are Okabe and Ito's; where they run out, dashes tell members apart. Dark cells of a heat map are a saturated softmax in
both columns. A line has gaps where its values are not finite; a cross stands before the first.
"""

import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from attnscope.report.contents import Contents, rows_of_member
from attnscope.report.series import Array, heat, largest_per_step, thinned
from attnscope.report.verdict import MemberRow
from attnscope.runs.reader import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", (0, (5, 1.5)))
GREY = "#666666"
MOST_LINES = len(COLOURS) * len(DASHES)  # members that a line plot shows
MOST_MAPS = 4  # members of which heat maps are drawn
DPI = 130

# What the field has seen of the largest attention logit.
LOGIT_THRESHOLDS = (
    (100.0, "100: QK-Clip acts (Kimi K2)"),
    (1e3, "1e3: hurts when transplanted (Wortsman et al.)"),
    (1e4, "1e4: every run above diverged (Wortsman et al.)"),
    (65_504.0, "65 504: largest float16"),
)

STYLE: Any = {
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
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A picture with the words that belong to it; all of them are ours or escaped."""

    name: str
    title: str
    alt: str
    caption: str
    png: bytes


def draw_figures(run: Run, found: Contents) -> list[Figure]:
    """Draw every figure for which something was recorded."""
    from matplotlib import rc_context

    with rc_context(STYLE), warnings.catch_warnings():
        # A member may be called anything: letters that the font lacks become boxes.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        drawn = [
            _loss(run, found),
            _attention(run, found),
            _max_logit(run, found),
            _gradients(run, found),
        ]
    return [figure for figure in drawn if figure is not None]


def _loss(run: Run, found: Contents) -> Figure | None:
    curves = [(member, *_curve(run, member, "loss")) for member in found.members[:MOST_LINES]]
    curves = [curve for curve in curves if np.isfinite(curve[2]).any()]
    if not curves:
        return None
    last = max(float(steps[-1]) for _, steps, _ in curves)
    breaks = [
        m.step if m.nonfinite_at is None else m.nonfinite_at
        for m, *_ in curves
        if m.status == "diverged"
    ]
    zoom = max((float(step) for step in breaks if step is not None), default=0.0) * 1.5 + 5
    zoomed = bool(breaks) and zoom < last / 2
    canvas, panels = _canvas(7.6, 3.3, 2 if zoomed else 1)
    for axes in panels:
        for place, (member, steps, values) in enumerate(curves):
            _line(axes, place, member, steps, values)
        axes.set(yscale="log", xlabel="step")
    panels[0].set_ylabel("loss (nats per token)")
    kept = [values for member, _, values in curves if member.status != "diverged"]
    if zoomed:
        panels[0].set(xlim=(-0.5, zoom), title="until it broke")
        panels[1].set(title="the whole run")
    if kept:
        shown = np.concatenate([*kept, list(found.reference.values())])
        shown = shown[np.isfinite(shown) & (shown > 0)]
        if len(shown):
            panels[-1].set_ylim(shown.min() / 1.3, shown.max() * 2)
    _references(panels[-1], found)
    for axes in panels:
        _ticks(axes)
    panels[-1].legend(loc="upper right")
    return _figure(
        canvas,
        name="loss",
        title="Loss",
        alt="Training loss of every member over steps, logarithmic",
        caption="Training loss; a cross marks the last loss of a member before one that is not finite, dotted lines are "
        "what a model without context reaches." + _of_many(found, MOST_LINES),
    )


def _attention(run: Run, found: Contents) -> Figure | None:
    shown = [member for member in found.members if member.start.max_prob is not None][:MOST_MAPS]
    if not shown:
        return None
    columns = (("entropy_ratio", "viridis"), ("max_prob", "viridis_r"))
    maps = [
        [heat(run.heads, rows_of_member(run.heads, member.name), name) for name, _ in columns]
        for member in shown
    ]
    tallest = max(len(each.labels) for row in maps for each in row if each)
    canvas, axes_RC = _grid(7.6, len(shown) * (1.1 + min(tallest, 32) * 0.09) + 0.5, len(shown), 2)
    for r, (member, row) in enumerate(zip(shown, maps, strict=True)):
        for c, ((name, colours), each) in enumerate(zip(columns, row, strict=True)):
            assert each is not None
            axes: Axes = axes_RC[r][c]
            axes.set_facecolor("#D9D9D9")
            mesh = axes.pcolormesh(
                each.edges - 0.5,
                np.arange(len(each.labels) + 1) - 0.5,
                np.ma.masked_invalid(each.values),
                cmap=colours,
                vmin=0,
                vmax=1,
                rasterized=True,
            )
            every = -(-len(each.labels) // 8)
            axes.set_yticks(range(0, len(each.labels), every), each.labels[::every])
            axes.set(title=f"{name} of {_text(member.name)}")
            axes.grid(visible=False)
            if r == len(shown) - 1:
                axes.set_xlabel("step")
                canvas.colorbar(
                    mesh,
                    ax=[row_axes[c] for row_axes in axes_RC],
                    location="right",
                    shrink=0.8,
                    aspect=30,
                )
            if c == 0:
                axes.set_ylabel("layer.head")
    return _figure(
        canvas,
        name="attention",
        title="Attention",
        alt="Heat maps of entropy_ratio and max_prob per layer, head and step",
        caption="entropy_ratio: 0 = all weight on one key, 1 = spread evenly. max_prob: mean of the largest weight. Dark is "
        "a saturated softmax in both; grey is not finite. Each member has its own range of steps."
        + _of_many(found, MOST_MAPS),
    )


def _max_logit(run: Run, found: Contents) -> Figure | None:
    canvas, (axes,) = _canvas(7.6, 3.3, 1)
    top, drawn = 0.0, 0
    for place, member in enumerate(found.members[:MOST_LINES]):
        rows_N = rows_of_member(run.heads, member.name)
        steps_N = run.heads["step"].to_numpy()[rows_N].astype(np.float64)
        for column, bound in (("max_logit_bound", True), ("max_logit", False)):
            values_N = run.heads[column].to_numpy()[rows_N].astype(np.float64)
            steps, values = thinned(*largest_per_step(steps_N, values_N))
            values = np.where(values > 0, values, np.nan)  # a logarithm has no place for the others
            if not np.isfinite(values).any():
                continue
            drawn += 1
            top = max(top, float(values[np.isfinite(values)].max()))
            if bound:
                axes.plot(
                    steps,
                    values,
                    color=COLOURS[place % len(COLOURS)],
                    alpha=0.35,
                    linewidth=1,
                    label="_bound",
                )
            else:
                _line(axes, place, member, steps, values)
    if not drawn:
        return None
    axes.set(yscale="log", xlabel="step", ylabel="largest attn_logit (nats)")
    for value, words in LOGIT_THRESHOLDS:
        if value <= 10 * top:
            axes.axhline(value, color=GREY, linewidth=0.8, linestyle=":")
            axes.annotate(
                words,
                (1, value),
                xycoords=("axes fraction", "data"),
                xytext=(-2, 1),
                textcoords="offset points",
                ha="right",
                va="bottom",
                fontsize=7,
                color=GREY,
            )
    axes.legend(loc="best")
    return _figure(
        canvas,
        name="max_logit",
        title="Attention logits",
        alt="Largest attention logit of every member over steps, logarithmic, with its upper bound",
        caption="max_logit: the largest over layers, heads and the rows measured; pale: max_logit_bound, which no row "
        "exceeds. Dotted: thresholds from the literature." + _of_many(found, MOST_LINES),
    )


def _gradients(run: Run, found: Contents) -> Figure | None:
    norms = [(member, *_curve(run, member, "grad_norm")) for member in found.members[:MOST_LINES]]
    if not any((np.isfinite(values) & (values > 0)).any() for _, _, values in norms):
        return None
    factors = [
        (member, *_curve(run, member, "clip_factor")) for member in found.members[:MOST_LINES]
    ]
    clipped = any((values < 1).any() for _, _, values in factors)
    canvas, panels = _canvas(7.6, 3.0, 2 if clipped else 1)
    for place, (member, steps, values) in enumerate(norms):
        _line(panels[0], place, member, steps, np.where(values == 0, np.nan, values))
    panels[0].set(yscale="log", xlabel="step", ylabel="grad_norm, before clipping")
    _ticks(panels[0])
    panels[0].legend(loc="best")
    if clipped:
        for place, (member, steps, values) in enumerate(factors):
            _line(panels[1], place, member, steps, np.where(values == 0, np.nan, values))
        panels[1].set(yscale="log", xlabel="step", ylabel="clip_factor (1 = did nothing)")
        _ticks(panels[1])
    return _figure(
        canvas,
        name="gradients",
        title="Gradients",
        alt="Norm of the whole gradient of every member over steps, logarithmic",
        caption="L2 norm of the whole gradient before clipping"
        + (", and what clipping multiplied it by." if clipped else "; nothing was clipped.")
        + _of_many(found, MOST_LINES),
    )


def _curve(run: Run, member: MemberRow, column: str) -> tuple[Array, Array]:
    rows_N = rows_of_member(run.steps, member.name)
    steps = run.steps["step"].to_numpy()[rows_N].astype(np.float64)
    return thinned(steps, run.steps[column].to_numpy()[rows_N].astype(np.float64))


def _line(axes: "Axes", place: int, member: MemberRow, steps: Array, values: Array) -> None:
    """A curve with gaps where it is not finite, and a cross before the first of them."""
    colour = COLOURS[place % len(COLOURS)]
    finite = np.isfinite(values)
    axes.plot(
        steps,
        np.where(finite, values, np.nan),
        color=colour,
        linestyle=DASHES[place // len(COLOURS) % len(DASHES)],
        marker="." if finite.sum() < 3 else "",
        label=_text(member.name),
    )
    # Whether it broke is decided by the loss that was recorded, not by the logarithm: values that are 0 are no break.
    before = finite & (steps < (0 if member.nonfinite_at is None else member.nonfinite_at))
    if before.any():
        at = int(np.flatnonzero(before)[-1])
        axes.plot(
            steps[at],
            values[at],
            color=colour,
            marker="X",
            markersize=7,
            linestyle="",
            label="_cross",
        )
        axes.annotate(
            f"non-finite at step {member.nonfinite_at}",
            (steps[at], values[at]),
            xytext=(7, -3),
            textcoords="offset points",
            fontsize=7,
            color=colour,
            annotation_clip=True,
        )


def _ticks(axes: "Axes") -> None:
    """Plain numbers along a logarithmic axis of less than two decades."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    low, high = axes.get_ylim()
    if high < 100 * low:
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_locator(NullLocator())


def _references(axes: "Axes", found: Contents) -> None:
    for name, value in found.reference.items():
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


def _canvas(width: float, height: float, columns: int) -> tuple["Canvas", Sequence["Axes"]]:
    canvas, grid = _grid(width, height, 1, columns)
    return canvas, grid[0]


def _grid(width: float, height: float, rows: int, columns: int) -> tuple["Canvas", Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas
    from matplotlib.ticker import MaxNLocator

    canvas = Canvas(figsize=(width, height), dpi=DPI)
    FigureCanvasAgg(canvas)
    axes_RC = canvas.subplots(rows, columns, squeeze=False)
    for axes in axes_RC.flat:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
    return canvas, axes_RC


def _figure(canvas: "Canvas", *, name: str, title: str, alt: str, caption: str) -> Figure:
    stream = io.BytesIO()
    canvas.savefig(stream, format="png", metadata={"Software": None})  # no version: same bytes
    return Figure(name=name, title=title, alt=alt, caption=caption, png=stream.getvalue())


def _of_many(found: Contents, most: int) -> str:
    total = len(found.members)
    return f" The first {most} of {total} members are shown." if total > most else ""


def _text(name: str) -> str:
    """A member's name as matplotlib shows it: no formula, and not hidden by a leading underscore."""
    shown = name if len(name) <= 40 else f"{name[:39]}…"
    return (f" {shown}" if shown.startswith("_") else shown).replace("$", r"\$")
