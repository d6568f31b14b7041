"""Attention logits: how large they are against what the field has seen, and how wide at step 0 against theory."""

import numpy as np

from attnscope.comparison.member import MemberRow
from attnscope.report.blocks import Figure
from attnscope.report.contents import Contents
from attnscope.report.figures.canvas import (
    GREY,
    MOST_LINES,
    MOST_NAMED,
    canvas_with,
    colour_of,
    draw_members,
    legend,
    of_many,
    outcome_style,
    over_steps,
    points_of_curves,
    save,
    shown_text,
)
from attnscope.report.series import Floats, largest_per_step, thinned
from attnscope.runs.by_member import rows_of_member
from attnscope.runs.tables import RunTables

# What the field has seen of the largest attention logit.
THRESHOLDS = (
    (100.0, "100: QK-Clip acts (Kimi K2)"),
    (1e3, "1e3: hurts when transplanted (Wortsman et al.)"),
    (1e4, "1e4: every run above diverged (Wortsman et al.)"),
    (65_504.0, "65 504: largest float16"),
)
MOST_STARTS = 500  # members in the figure of step 0


def draw_max_logit(tables: RunTables, contents: Contents) -> Figure | None:
    """The largest attention logit over steps, with the bound that no row exceeds."""
    canvas, ((axes,),) = canvas_with(3.3)
    points = points_of_curves(contents)
    top = 0.0

    def curve_of(column: str, member: MemberRow) -> tuple[Floats, Floats]:
        nonlocal top
        rows_N = rows_of_member(tables.heads, member.name)
        steps_N = tables.heads["step"].to_numpy()[rows_N].astype(np.float64)
        values_N = tables.heads[column].to_numpy()[rows_N].astype(np.float64)
        steps, values = thinned(*largest_per_step(steps_N, values_N), points=points)
        values = np.where(values > 0, values, np.nan)  # a logarithm has no place for the others
        top = max(top, float(values[np.isfinite(values)].max(initial=0.0)))
        return steps, values

    few = len(contents.members) <= MOST_NAMED
    drawn = few and draw_members(axes, contents.members, lambda member: curve_of("max_logit_bound", member), pale=True)
    drawn |= draw_members(axes, contents.members, lambda member: curve_of("max_logit", member))
    if not drawn:
        return None
    axes.set(yscale="log", ylabel="max_logit (nats)")
    over_steps(axes)
    for index, (value, words) in enumerate(THRESHOLDS):
        if value <= 10 * top:
            axes.axhline(value, color=GREY, linewidth=0.8, linestyle=":")
            axes.annotate(
                words,
                (1 - 0.4 * (index % 2), value),  # side by side: on a tall axis they are close
                xycoords=("axes fraction", "data"),
                xytext=(-2, 1),
                textcoords="offset points",
                ha="right",
                va="bottom",
                fontsize=7,
                color=GREY,
            )
    legend(axes)
    bound = " Pale: max_logit_bound, which no row exceeds." if few else ""
    return save(
        canvas,
        name="max_logit",
        title="Attention logits",
        alt="Largest attention logit of every member over steps, logarithmic, with the literature's thresholds",
        caption=f"max_logit: the largest over layers, heads and the rows measured.{bound} Dotted: thresholds from the "
        "literature." + of_many(contents, MOST_LINES),
    )


def draw_logit_std(tables: RunTables, contents: Contents) -> Figure | None:
    """logit_std at step 0, per layer, against scale x sqrt(d_head): what q and k of unit variance give."""
    points = [
        (index, member, spread)
        for index, member in enumerate(contents.members[:MOST_STARTS])
        if member.theory_std is not None and (spread := _spread_at_start(tables, member)) is not None
    ]
    if not points:
        return None
    named = len(contents.members) <= MOST_NAMED
    canvas, ((axes,),) = canvas_with(3.3)
    for index, member, spread in points:
        colour, mark = (colour_of(index), "o") if named else outcome_style(member.status)
        x = np.full(len(spread), member.theory_std)
        axes.plot(
            # Members at the same theory stand side by side; the first layer is the one that theory is about.
            x * 1.04 ** ((index % 5 - 2) if len(points) > 1 else 0),
            spread,
            color=colour,
            marker=mark,
            markersize=4,
            markerfacecolor="none",
            linestyle="",
            alpha=1.0 if named else 0.4,
            label="_layers",
        )
        axes.plot(
            x[:1] * 1.04 ** ((index % 5 - 2) if len(points) > 1 else 0),
            spread[:1],
            color=colour,
            marker=mark,
            markersize=6,
            linestyle="",
            alpha=1.0 if named else 0.4,
            label=shown_text(member.name) if named else "_first",
        )
    finite = np.concatenate([spread for *_, spread in points])
    theories = np.array([member.theory_std for _, member, _ in points], dtype=np.float64)
    low = min(float(finite.min()), float(theories.min())) / 1.6
    high = max(float(finite.max()), float(theories.max())) * 1.6
    axes.plot([low, high], [low, high], color=GREY, linestyle=":", label="theory")
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="scale · √d_head (nats)",
        ylabel="logit_std at step 0 (nats)",
        xlim=(float(theories.min()) / 2, float(theories.max()) * 2),
        ylim=(low, high),
    )
    legend(axes, "upper left")
    return save(
        canvas,
        name="logit_std",
        title="Logits at step 0",
        alt="Standard deviation of the attention logits at step 0 against scale times the square root of d_head",
        caption="logit_std before any training, mean over heads; filled: layer 0, open: deeper layers. Dotted: what q and k "
        "with entries of mean 0 and variance 1 give, scale · √d_head (Vaswani et al. 2017); below 1 the softmax is flat, "
        "far above it one key takes all." + of_many(contents, MOST_STARTS),
    )


def _spread_at_start(tables: RunTables, member: MemberRow) -> Floats | None:
    """Mean logit_std over heads of each layer at the first step measured, layer 0 first; None if nothing was finite."""
    rows_N = rows_of_member(tables.heads, member.name)
    if not len(rows_N):
        return None
    step_N = tables.heads["step"].to_numpy()[rows_N]
    first_N = rows_N[step_N == step_N[0]]
    layer_N = tables.heads["layer"].to_numpy()[first_N]
    value_N = tables.heads["logit_std"].to_numpy()[first_N].astype(np.float64)
    means = [value_N[layer_N == layer].mean() for layer in np.unique(layer_N)]
    means_L = np.array(means)
    return means_L if np.isfinite(means_L).all() and (means_L > 0).all() else None
