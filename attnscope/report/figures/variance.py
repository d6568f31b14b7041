"""The variance law of q·k in one figure: its spread, what lies beyond ±5, what is left of the gradient, where attention freezes."""

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from attnscope.report.blocks import Figure
from attnscope.report.figures.canvas import COLOURS, GREY, STYLE, canvas_with, plain_ticks, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = Mapping[str, float]

UNSCALED, SCALED = COLOURS[0], COLOURS[1]
SHOWN_KEYS = 512  # of the panels over d_head
FLAT_BEYOND = 5.0


def draw_variance_law(cells: Sequence[Row], freezing: Sequence[Row]) -> Figure:
    """Four panels.

    Args:
        cells: rows with d_head, n_keys, scaled, predicted_std, logit_std, logits_over_5, softmax_gain.
        freezing: rows with n_keys, critical, logit_std, measured.
    """
    from matplotlib import rc_context

    with rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        canvas, axes = canvas_with(6.4, rows=2, columns=2)
        _draw_spread(axes[0][0], cells)
        _draw_beyond(axes[0][1], cells)
        _draw_gradient(axes[1][0], cells)
        _draw_freezing(axes[1][1], freezing)
        return save(
            canvas,
            name="variance",
            title="Why 1/√d_head",
            alt="Standard deviation of q·k over d_head, share of logits beyond ±5, gradient behind the softmax, and Σp² over the spread",
            caption="q and k with independent entries of mean 0 and variance 1. Lines: theory; marks: measured.",
        )


def _draw_spread(axes: "Axes", cells: Sequence[Row]) -> None:
    for scaled, colour, words in ((False, UNSCALED, "without the scale"), (True, SCALED, "with 1/√d_head")):
        mine = [row for row in cells if row["scaled"] == scaled and row["n_keys"] == SHOWN_KEYS]
        d_heads = [row["d_head"] for row in mine]
        axes.plot(d_heads, [row["predicted_std"] for row in mine], color=colour, linewidth=1)
        axes.plot(d_heads, [row["logit_std"] for row in mine], color=colour, marker="o", linestyle="", label=words)
    axes.annotate(
        "theory: √d_head",
        (64, 8),
        xytext=(-8, 10),
        textcoords="offset points",
        ha="right",
        fontsize=8,
        color=UNSCALED,
    )
    axes.annotate("theory: 1", (64, 1), xytext=(0, 6), textcoords="offset points", fontsize=8, color=SCALED)
    axes.set(title="q·k grows with d_head", ylabel="standard deviation of the logits (nats)", yscale="log")
    axes.set_ylim(0.6, 40)
    plain_ticks(axes)
    _over_d_head(axes)
    axes.legend(loc="upper left")


def _draw_beyond(axes: "Axes", cells: Sequence[Row]) -> None:
    d_head = np.geomspace(8, 512, 60)
    axes.plot(
        d_head,
        [100 * math.erfc(FLAT_BEYOND / math.sqrt(2 * x)) for x in d_head],
        color=UNSCALED,
        linewidth=1,
    )
    for scaled, colour, words in ((False, UNSCALED, "without the scale"), (True, SCALED, "with 1/√d_head")):
        mine = [row for row in cells if row["scaled"] == scaled and row["n_keys"] == SHOWN_KEYS]
        axes.plot(
            [row["d_head"] for row in mine],
            [100 * row["logits_over_5"] for row in mine],
            color=colour,
            marker="o",
            linestyle="",
            label=words,
        )
    axes.set(
        title="Without the scale, logits leave ±5", ylabel="logits further than 5 from their mean (%)", ylim=(-4, 104)
    )
    _over_d_head(axes)
    axes.legend(loc="upper left")


def _draw_gradient(axes: "Axes", cells: Sequence[Row]) -> None:
    d_heads = sorted({row["d_head"] for row in cells})
    fewest, most = min(row["n_keys"] for row in cells), max(row["n_keys"] for row in cells)
    for scaled, colour, words in ((False, UNSCALED, "without the scale"), (True, SCALED, "with 1/√d_head")):
        by_keys = {
            n_keys: [
                100 * next(r["softmax_gain"] for r in cells if (r["scaled"], r["n_keys"], r["d_head"]) == key)
                for key in ((scaled, n_keys, d_head) for d_head in d_heads)
            ]
            for n_keys in (fewest, SHOWN_KEYS, most)
        }
        axes.fill_between(d_heads, by_keys[fewest], by_keys[most], color=colour, alpha=0.15, linewidth=0)
        axes.plot(d_heads, by_keys[SHOWN_KEYS], color=colour, marker="o", label=words)
    axes.set(title="What is left of the gradient behind the softmax", ylabel="1 − Σp² (%)", ylim=(-4, 104))
    axes.annotate(
        f"band: {fewest:,.0f} to {most:,.0f} keys",
        (1, 0.83),
        xycoords="axes fraction",
        ha="right",
        fontsize=8,
        color=GREY,
    )
    _over_d_head(axes)
    axes.legend(loc="lower left")


def _draw_freezing(axes: "Axes", freezing: Sequence[Row]) -> None:
    from matplotlib import colormaps

    n_keys = sorted({row["n_keys"] for row in freezing})
    shades = colormaps["viridis"](np.linspace(0.05, 0.85, len(n_keys)))
    named = {n_keys[0], n_keys[len(n_keys) // 2], n_keys[-1]}
    for index, keys in enumerate(n_keys):
        mine = [row for row in freezing if row["n_keys"] == keys]
        axes.plot(
            [row["logit_std"] / row["critical"] for row in mine],
            [row["measured"] for row in mine],
            color=shades[index],
            marker="o" if keys in named else "",
            markersize=3,
            linewidth=0.8,
            label=f"{keys:,.0f} keys" if keys in named else "_between",
        )
    ratio = np.geomspace(0.25, 8, 200)
    axes.plot(ratio, np.maximum(0, 1 - 1 / ratio), color="black", linewidth=1.4, label="1 − √(2 ln T)/σ")
    axes.axvline(1, color=GREY, linestyle=":", linewidth=0.8)
    axes.set(
        title="Above √(2 ln T) a few keys take all",
        xlabel="σ of the logits / √(2 ln T)",
        ylabel="Σp²",
        xscale="log",
        ylim=(-0.04, 1.04),
    )
    axes.set_xticks([0.25, 0.5, 1, 2, 4, 8], ["1/4", "1/2", "1", "2", "4", "8"])
    axes.minorticks_off()
    axes.legend(loc="upper left")


def _over_d_head(axes: "Axes") -> None:
    axes.set(xscale="log", xlabel="d_head")
    ticks = [8, 16, 32, 64, 128, 256, 512]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
