"""Sweeps: which cells train, stall or diverge over two settings at a time, and the loss against the learning rate.

A cell is divided among its members' outcomes; each share has the outcome's colour, its mark, and how many there are.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from attnscope.comparison.cells import Comparison
from attnscope.comparison.learning_rates import LR
from attnscope.comparison.subjects import ENDED, Cell, Subject
from attnscope.report.blocks import Figure
from attnscope.report.contents import Contents
from attnscope.report.figures.canvas import (
    COLOURS,
    DASHES,
    GREY,
    canvas_with,
    colour_of,
    legend,
    outcome_style,
    plain_ticks,
    save,
    shown_text,
)
from attnscope.report.numbers import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_PANELS = 6
MOST_IN_LABEL = 3  # settings along one side
MOST_TICKS = 24  # values of a setting along one side
TICK_ROOM = 90  # characters below a panel as wide as the figure
MOST_ARMS = len(COLOURS) * len(DASHES)
MOST_TITLE_LINES = 3  # of a panel, each a setting
ROOM_FOR_LOSS = 60  # cells of a panel, up to which each also has its loss in figures

Side = tuple[str, ...]  # settings that share a side of a grid
Values = tuple[str, ...]  # of such


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layout:
    """Which settings go across, down and into panels; the others stay as in the baseline."""

    across: Side
    down: Side
    panels: Side
    fixed: Mapping[str, str]


def draw_phase(contents: Contents) -> Figure | None:
    """Outcome over the two sides of the grid with the most values, a panel for each value of the others."""
    comparison = contents.comparison
    if comparison is None or not comparison.axes:
        return None

    def rank(keys: Side) -> tuple[bool, bool, int]:
        is_numeric = all(_is_numeric(comparison, key) for key in keys)
        return LR not in keys, not is_numeric, -len(_combinations(comparison, keys))

    across, *others = sorted(_sides(comparison, list(comparison.axes)), key=rank)
    down = others.pop(0) if others else ()
    return _draw_grid(
        comparison,
        _laid_out(comparison, across, down, others),
        name="phase",
        title="Where training breaks",
    )


def draw_matrix(contents: Contents) -> Figure | None:
    """Initialization against clipping, where more than one setting of either varies."""
    comparison = contents.comparison
    if comparison is None:
        return None
    init = tuple(key for key in comparison.axes if key.startswith("init."))
    clip = tuple(key for key in comparison.axes if key.startswith("clip."))
    if not init or not clip or len(init) + len(clip) < 3:
        return None
    others = [key for key in comparison.axes if key not in (*init, *clip)]
    return _draw_grid(
        comparison,
        _laid_out(comparison, clip, init, _sides(comparison, others)),
        name="matrix",
        title="Initialization against clipping",
    )


def draw_loss_by_lr(contents: Contents) -> Figure | None:
    """Final loss of every arm against its learning rates, with its LR sensitivity."""
    comparison = contents.comparison
    if comparison is None or not any(len(arm.cells) > 1 for arm in comparison.lr_arms):
        return None
    arms = [arm for arm in comparison.lr_arms if any(_drawable(cell) for _, cell in arm.cells)]
    if not arms:
        return None
    left_out = len(comparison.lr_arms) - len(arms[:MOST_ARMS])
    arms = arms[:MOST_ARMS]
    canvas, ((axes,),) = canvas_with(3.6)
    for index, arm in enumerate(arms):
        colour = colour_of(index)
        x, y = [], []
        for lr, cell in arm.cells:
            losses = _drawable(cell)
            for subject, loss in losses:
                axes.plot(
                    lr,
                    loss,
                    color=colour,
                    marker=outcome_style(subject.row.status)[1],
                    markersize=5,
                    markerfacecolor="none",
                    linestyle="",
                    label="_member",
                )
            if losses:
                x.append(lr)
                y.append(sum(loss for _, loss in losses) / len(losses))
        said = "" if arm.sensitivity is None else f": sensitivity {number(arm.sensitivity)}"
        axes.plot(
            x,
            y,
            color=colour,
            linestyle=DASHES[index // len(COLOURS) % len(DASHES)],
            label=shown_text(arm.name) + said,
        )
    for status in ENDED:
        axes.plot(
            [],
            [],
            color=GREY,
            marker=outcome_style(status)[1],
            markerfacecolor="none",
            linestyle="",
            label=status,
        )
    axes.set(xscale="log", yscale="log", xlabel="optimizer.lr", ylabel="loss (nats per token)")
    plain_ticks(axes)
    legend(axes)
    return save(
        canvas,
        name="loss_by_lr",
        title="Loss against learning rate",
        alt=f"Final loss of {len(arms)} arms against the learning rate, both logarithmic",
        caption="min(final loss, first loss) of each member, with the mark of its outcome; lines are means over seeds. "
        "Sensitivity: their mean over learning rates minus the best, nats per token (Wortsman et al. 2023)."
        + (f" {len(arms)} of {len(comparison.lr_arms)} arms are shown." if left_out else ""),
    )


def _drawable(cell: Cell) -> list[tuple[Subject, float]]:
    """The members of a cell with a loss that has a place on a logarithmic axis."""
    return [
        (subject, subject.loss) for subject in cell.subjects if subject.loss is not None and 0 < subject.loss < math.inf
    ]


def _is_numeric(comparison: Comparison, key: str) -> bool:
    return all(key in subject.numbers for cell in comparison.cells for subject in cell.subjects)


def _sides(comparison: Comparison, keys: Sequence[str]) -> list[Side]:
    """Settings of which not all combinations occur (those of an arm, clip.mode and clip.threshold) belong together."""
    sides: list[Side] = []
    for key in keys:
        tied = [
            side
            for side in sides
            if any(
                len(_combinations(comparison, (key, other))) < len(comparison.axes[key]) * len(comparison.axes[other])
                for other in side
            )
        ]
        joined = tuple(other for side in tied for other in side)
        sides = [side for side in sides if side not in tied] + [(*joined, key)]
    return sides


def _laid_out(comparison: Comparison, across: Side, down: Side, others: Sequence[Side]) -> _Layout:
    """As many of the others as fit become panels."""
    panels: Side = ()
    for side in others:
        if len(_combinations(comparison, (*panels, *side))) > MOST_PANELS:
            break
        panels += side
    base = comparison.baseline or comparison.cells[0]
    rest = [key for side in others for key in side if key not in panels]
    return _Layout(across=across, down=down, panels=panels, fixed={key: base.settings[key] for key in rest})


def _draw_grid(comparison: Comparison, layout: _Layout, *, name: str, title: str) -> Figure | None:
    cells = {tuple(cell.settings[key] for key in comparison.axes): cell for cell in comparison.cells}
    across = _combinations(comparison, layout.across)[:MOST_TICKS]
    down = _combinations(comparison, layout.down)[:MOST_TICKS]
    panels = _combinations(comparison, layout.panels)
    columns = 1 if len(across) > 8 or len(panels) == 1 else 2
    rows = -(-len(panels) // columns)
    height = rows * (0.7 + 0.34 * len(down)) + 0.7
    canvas, axes_RC = canvas_with(height, rows=rows, columns=columns, sharex=True, sharey=True)
    for axes in axes_RC.flat[len(panels) :]:
        axes.set_visible(False)
    small = len(across) * len(down) > ROOM_FOR_LOSS or len(across) * columns > 10
    for index, (axes, panel) in enumerate(zip(axes_RC.flat, panels, strict=False)):
        for (c, x), (r, y) in itertools.product(enumerate(across), enumerate(down)):
            settings = {**layout.fixed, **dict(zip(layout.panels, panel, strict=True))}
            settings |= dict(zip(layout.across, x, strict=True))
            settings |= dict(zip(layout.down, y, strict=True))
            cell = cells.get(tuple(settings[key] for key in comparison.axes))
            if cell is not None:
                _draw_cell(axes, c, r, cell, is_baseline=cell is comparison.baseline, small=small)
        axes.set(
            xlim=(-0.5, len(across) - 0.5),
            ylim=(-0.5, len(down) - 0.5),
            xticks=range(len(across)),
            yticks=range(len(down)),
        )
        ticks = [_tick(x) for x in across]
        is_tight = sum(map(len, ticks)) + 3 * len(ticks) > TICK_ROOM / columns
        slant: Any = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if is_tight else {}
        axes.set_xticklabels(ticks, **slant)
        axes.set_yticklabels([_tick(y) for y in down])
        axes.grid(visible=False)
        axes.spines[["left", "bottom"]].set_visible(False)
        axes.tick_params(length=0)
        if panel:
            words = zip(layout.panels, panel, strict=True)
            said = [shown_text(f"{key} = {value}", 44) for key, value in words]
            if len(said) > MOST_TITLE_LINES:
                said[MOST_TITLE_LINES - 1 :] = [f"and {len(said) - MOST_TITLE_LINES + 1} more"]
            axes.set_title("\n".join(said) if len(", ".join(said)) > 40 else ", ".join(said))
        if index % columns == 0 and layout.down:
            axes.set_ylabel(_label(layout.down))
        if index >= len(panels) - columns:
            axes.set_xlabel(_label(layout.across))
    _explain(canvas, comparison)
    fixed = ", ".join(f"{key} = {value}" for key, value in layout.fixed.items())
    return save(
        canvas,
        name=name,
        title=title,
        alt=f"Outcome of every cell by {_label(layout.across)} (across) and {_label(layout.down) or 'nothing else'} (down), "
        "by colour and mark, with the number of seeds",
        caption="Each cell is divided among the outcomes of its seeds; the figure is how many."
        + ("" if small else " Below it the mean final loss of those that did not diverge.")
        + " Framed: the baseline."
        + (f" Fixed here: {fixed}." if fixed else ""),
    )


def _draw_cell(axes: "Axes", column: int, row: int, cell: Cell, *, is_baseline: bool, small: bool) -> None:
    from matplotlib.patches import Rectangle

    width, tall = 0.94, 0.9
    left, bottom = column - width / 2, row - tall / 2
    total = cell.outcomes.total()
    statuses = sorted(cell.outcomes, key=lambda status: [*ENDED, status].index(status))
    at = left
    for status in statuses:
        colour, mark = outcome_style(status)
        share = width * cell.outcomes[status] / total
        axes.add_patch(Rectangle((at, bottom), share, tall, facecolor=colour, alpha=0.55, edgecolor="none"))
        middle = at + share / 2
        lift = 0.14 if small or cell.final_losses else 0.0
        axes.plot(middle - 0.09 * (not small), row + lift, marker=mark, markersize=4.5, color="black", linestyle="")
        axes.text(
            middle if small else middle + 0.03,
            row - 0.2 if small else row + lift,
            str(cell.outcomes[status]),
            ha="center" if small else "left",
            va="center",
            fontsize=6 if small else 7,
        )
        at += share
    if not small and cell.final_losses:
        mean = sum(cell.final_losses) / len(cell.final_losses)
        axes.text(column, row - 0.22, number(mean), ha="center", va="center", fontsize=7)
    if is_baseline:
        axes.add_patch(Rectangle((left, bottom), width, tall, fill=False, edgecolor="black", linewidth=1.4))


def _explain(canvas: object, comparison: Comparison) -> None:
    """One legend for all panels."""
    from matplotlib.figure import Figure as Canvas
    from matplotlib.lines import Line2D

    assert isinstance(canvas, Canvas)
    seen = {status for cell in comparison.cells for status in cell.outcomes}
    handles = []
    for status in [status for status in ENDED if status in seen] + sorted(seen - set(ENDED)):
        colour, mark = outcome_style(status)
        handles.append(
            Line2D(
                [],
                [],
                marker=mark,
                color="black",
                markersize=4.5,
                linestyle="",
                label=status,
                markeredgecolor="black",
                markerfacecolor=colour,
            )
        )
    canvas.legend(handles=handles, loc="outside upper right", ncols=len(handles))


def _combinations(comparison: Comparison, keys: Side) -> list[Values]:
    """Those that occur, the first setting slowest."""
    ranks = [{value: at for at, value in enumerate(comparison.axes[key])} for key in keys]
    combinations = {tuple(cell.settings[key] for key in keys) for cell in comparison.cells}
    return sorted(combinations, key=lambda values: [at[v] for at, v in zip(ranks, values, strict=True)])


def _tick(values: Values) -> str:
    return shown_text(" ".join(values), 24)


def _label(keys: Sequence[str]) -> str:
    more = f" and {len(keys) - MOST_IN_LABEL} more" if len(keys) > MOST_IN_LABEL else ""
    return shown_text(", ".join(keys[:MOST_IN_LABEL]), 60) + more
