"""The residual stream: how large it is, and whether the states of all tokens become one; over steps and by layer."""

from typing import TYPE_CHECKING

import numpy as np

from attnscope.comparison.member import MemberRow
from attnscope.report.blocks import Figure
from attnscope.report.contents import Contents
from attnscope.report.figures.canvas import (
    MOST_LINES,
    MOST_NAMED,
    canvas_with,
    colour_of,
    draw_members,
    legend,
    of_many,
    outcome_style,
    over_steps,
    plain_ticks,
    points_of_curves,
    save,
)
from attnscope.report.series import Floats, curve_of, finite_steps, thinned, where_measured
from attnscope.runs.by_member import rows_of_member
from attnscope.runs.tables import RunTables

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw_activations(tables: RunTables, contents: Contents) -> Figure | None:
    """Above, activation_rms_max and the last layer's token_cosine over steps; below, both by layer."""
    points = points_of_curves(contents)

    def curve(column: str, member: MemberRow) -> tuple[Floats, Floats]:
        steps, values = curve_of(tables, member.name, column)
        if has_layers:
            rows_N = rows_of_member(tables.layers, member.name)
            steps, values = where_measured(steps, values, tables.layers["step"].to_numpy()[rows_N])
        return thinned(steps, values, points=points)

    has_layers = bool(len(tables.layers))  # runs of early versions have none
    canvas, grid = canvas_with(5.4 if has_layers else 3.0, rows=1 + has_layers, columns=2)
    left, right = grid[0]

    def rms(member: MemberRow) -> tuple[Floats, Floats]:
        steps, values = curve("activation_rms_max", member)
        return steps, np.where(values > 0, values, np.nan)

    drawn = draw_members(left, contents.members, rms)
    drawn |= draw_members(right, contents.members, lambda member: curve("token_cosine", member))
    if not drawn:
        return None
    left.set(yscale="log", ylabel="activation_rms_max")
    right.set(ylabel="token_cosine (1 = rank collapse)", ylim=(None, 1.02))
    for axes in (left, right):
        over_steps(axes)
    plain_ticks(left)
    legend(left)
    below = ""
    if has_layers:
        for axes, column in zip(grid[1], ("activation_rms", "token_cosine"), strict=True):
            _draw_by_layer(axes, tables, contents, column)
            over_steps(axes)  # layers are whole numbers too
            axes.set(xlabel="layer", ylabel=column)
        grid[1][0].set_yscale("log")
        plain_ticks(grid[1][0])
        below = " Below: both after each layer, pale and dashed at the first step, solid at the last one that is finite in every layer."
    return save(
        canvas,
        name="activations",
        title="Residual stream",
        alt="RMS of the residual stream and mean cosine of token states, of every member over steps and by layer",
        caption="Left: RMS of the residual stream, the largest over layers. Right: mean cosine similarity between the states "
        "of different tokens, in the last layer; at 1 all tokens look the same (Dong et al. 2021)."
        + below
        + of_many(contents, MOST_LINES),
    )


def _draw_by_layer(axes: "Axes", tables: RunTables, contents: Contents, column: str) -> None:
    is_many = len(contents.members) > MOST_NAMED
    for index, member in enumerate(contents.members[:MOST_LINES]):
        rows_N = rows_of_member(tables.layers, member.name)
        steps_N, layers_N, rms_N, values_N = (
            tables.layers[name].to_numpy()[rows_N] for name in ("step", "layer", "activation_rms", column)
        )
        whole = finite_steps(steps_N, rms_N)
        if not len(whole):
            continue
        colour = outcome_style(member.status)[0] if is_many else colour_of(index)
        for step in dict.fromkeys((whole[0], whole[-1])):
            here_N = steps_N == step
            is_last = step == whole[-1]
            axes.plot(
                layers_N[here_N],
                values_N[here_N],
                color=colour,
                alpha=(0.3 if is_many else 1.0) if is_last else (0.1 if is_many else 0.4),
                linestyle="-" if is_last else "--",
                linewidth=0.8 if is_many else 1.2,
                marker="o" if is_last else "",
                markersize=2 if is_many else 4,
            )
