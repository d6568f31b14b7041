"""Gradients: the norm of the whole before clipping and what clipping did, then group by group, then what updates made of it."""

import numpy as np

from attnscope.comparison.member import MemberRow
from attnscope.report.blocks import Figure
from attnscope.report.contents import Contents
from attnscope.report.figures.attention import chosen_members
from attnscope.report.figures.canvas import (
    MISSING,
    MOST_LINES,
    canvas_with,
    draw_members,
    legend,
    of_many,
    over_steps,
    plain_ticks,
    points_of_curves,
    save,
    shortened,
    shown_text,
)
from attnscope.report.series import Floats, curve_of, heat_of, thinned
from attnscope.runs.by_member import rows_of_member
from attnscope.runs.tables import RunTables

GROUPS = ("embedding", "q", "k", "v", "o", "mlp_in", "mlp_out", "norm", "head")  # as data flows


def draw_gradients(tables: RunTables, contents: Contents) -> Figure | None:
    """grad_norm over steps, and clip_factor where anything was clipped."""
    points = points_of_curves(contents)

    def curve(column: str, member: MemberRow) -> tuple[Floats, Floats]:
        steps, values = thinned(*curve_of(tables, member.name, column), points=points)
        return steps, np.where(values > 0, values, np.nan)

    members = contents.members[:MOST_LINES]
    norms = {member.name: curve("grad_norm", member) for member in members}
    if not any(np.isfinite(values).any() for _, values in norms.values()):
        return None
    factors = {member.name: curve("clip_factor", member) for member in members}
    clipped = any((values < 1).any() for _, values in factors.values())
    canvas, ((*panels,),) = canvas_with(3.0, columns=2 if clipped else 1)
    draw_members(panels[0], contents.members, lambda member: norms[member.name])
    panels[0].set(yscale="log", ylabel="grad_norm, before clipping")
    legend(panels[0])
    if clipped:
        draw_members(panels[1], contents.members, lambda member: factors[member.name])
        panels[1].set(yscale="log", ylabel="clip_factor (1 = did nothing)")
    for axes in panels:
        over_steps(axes)
        plain_ticks(axes)
    return save(
        canvas,
        name="gradients",
        title="Gradients",
        alt="Norm of the whole gradient of every member over steps, logarithmic"
        + (", and the factor that clipping multiplied it by" if clipped else ""),
        caption="L2 norm of the whole gradient before clipping"
        + (", and what clipping multiplied it by." if clipped else "; nothing was clipped.")
        + of_many(contents, MOST_LINES),
    )


def draw_group_gradients(tables: RunTables, contents: Contents) -> Figure | None:
    """grad_norm per parameter group and layer over steps, before clipping."""
    return _groups(
        tables,
        contents,
        column="grad_norm",
        name="group_gradients",
        title="Gradients per parameter group",
        words="L2 norm of each group's gradient before clipping, base-10 logarithm; groups from the embedding (top) to the "
        "head (bottom), layer by layer. Where one row darkens before the others, trouble began there.",
    )


def draw_update_ratios(tables: RunTables, contents: Contents) -> Figure | None:
    """update_ratio per parameter group and layer over steps."""
    return _groups(
        tables,
        contents,
        column="update_ratio",
        name="update_ratio",
        title="Update ratio per parameter group",
        words="Norm of the update over the norm of the weights, base-10 logarithm; -3 is common for healthy training, "
        "0 is an update as large as the weights.",
    )


def _groups(tables: RunTables, contents: Contents, *, column: str, name: str, title: str, words: str) -> Figure | None:
    recorded = set(tables.params["member"].unique())
    shown = chosen_members([member for member in contents.members if member.name in recorded])
    maps = []
    for member in shown:
        heat = _heat_of_groups(tables, member, column)
        if heat is not None:
            maps.append((member, *heat))
    if not maps:
        return None
    finite = np.concatenate([values[np.isfinite(values)] for *_, values in maps])
    if not len(finite):
        return None
    low, high = np.quantile(finite, [0.01, 0.99])
    rows = max(len(labels) for _, labels, *_ in maps)
    columns = min(2, len(maps))
    n_rows = -(-len(maps) // columns)
    height = n_rows * (0.6 + min(rows, 40) * 0.14) + 0.6
    canvas, axes_RC = canvas_with(height, rows=n_rows, columns=columns)
    mesh = None
    for axes in axes_RC.flat[len(maps) :]:
        axes.set_visible(False)
    for axes, (member, labels, edges, values) in zip(axes_RC.flat, maps, strict=False):
        axes.set_facecolor(MISSING)
        mesh = axes.pcolormesh(
            edges - 0.5,
            np.arange(len(labels) + 1) - 0.5,
            np.ma.masked_invalid(values),
            cmap="cividis_r",
            vmin=low,
            vmax=max(high, low + 1e-6),
            rasterized=True,
        )
        every = -(-len(labels) // 40)
        axes.set_yticks(range(0, len(labels), every), labels[::every], fontsize=7)
        axes.invert_yaxis()
        axes.grid(visible=False)
        axes.set_title(shown_text(member.name, 44))
        over_steps(axes)
        axes.xaxis.get_major_locator().set_params(nbins=5)
    assert mesh is not None
    canvas.colorbar(mesh, ax=axes_RC, shrink=0.8, aspect=30, label=f"log10 {column}")
    more = len(contents.members) - len(maps)
    return save(
        canvas,
        name=name,
        title=title,
        alt=f"Heat maps of {column} per parameter group, layer and step of {len(maps)} members",
        caption=f"{words} Grey is not finite or 0."
        + (f" {len(maps)} of {len(contents.members)} members are shown." if more > 0 else ""),
    )


def _heat_of_groups(tables: RunTables, member: MemberRow, column: str) -> tuple[list[str], Floats, Floats] | None:
    """Labels, edges of the steps, and log10 of the column, (G, bins)."""
    rows_N = rows_of_member(tables.params, member.name)
    if not len(rows_N):
        return None
    group_N = tables.params["group"].astype("category").cat
    codes_N = group_N.codes.to_numpy()[rows_N].astype(np.int32)
    names = [str(group) for group in group_N.categories]
    layer_N = tables.params["layer"].to_numpy()[rows_N].astype(np.int32)
    heat = heat_of(tables.params, rows_N, column, (layer_N + 1) * len(names) + codes_N)
    if heat is None:
        return None
    keys, edges, values = heat

    def place(key: int) -> tuple[int, float]:
        layer, group = key // len(names) - 1, names[key % len(names)]
        rank = GROUPS.index(group) if group in GROUPS else len(GROUPS) - 1.5
        # What belongs to no layer stands before the first layer, or after the last.
        level = layer if layer >= 0 else -1 if group == "embedding" else 1 << 20
        return level, rank

    order = sorted(range(len(keys)), key=lambda g: place(keys[g]))
    labels = []
    for g in order:
        layer, group = keys[g] // len(names) - 1, shortened(names[keys[g] % len(names)], 30)
        labels.append(f"{layer}.{group}" if layer >= 0 else group)
    with np.errstate(all="ignore"):
        logs = np.log10(values[order])
    return labels, edges, np.where(np.isfinite(logs), logs, np.nan)
