"""Heat maps: what the softmax of every layer and head did over the steps."""

import numpy as np

from attnscope.comparison.member import MemberRow
from attnscope.report.blocks import Figure
from attnscope.report.contents import Contents
from attnscope.report.figures.canvas import MISSING, canvas_with, over_steps, save, shown_text
from attnscope.report.series import heat
from attnscope.runs.by_member import rows_of_member
from attnscope.runs.tables import RunTables

# Dark is a saturated softmax in all three.
COLUMNS = (("entropy_ratio", "viridis"), ("max_prob", "viridis_r"), ("softmax_gain", "viridis"))
MOST_MAPS = 4  # members


def draw_attention(tables: RunTables, contents: Contents) -> Figure | None:
    """entropy_ratio, max_prob and softmax_gain per layer, head and step."""
    shown = chosen_members([member for member in contents.members if member.start.max_prob is not None])
    if not shown:
        return None
    maps = [
        [heat(tables.heads, rows_of_member(tables.heads, member.name), name) for name, _ in COLUMNS] for member in shown
    ]
    tallest = max(len(heat_map.labels) for row in maps for heat_map in row if heat_map)
    height = len(shown) * (1.1 + min(tallest, 32) * 0.09) + 0.7
    canvas, axes_RC = canvas_with(height, rows=len(shown), columns=len(COLUMNS))
    for r, (member, row) in enumerate(zip(shown, maps, strict=True)):
        for c, ((name, colours), heat_map) in enumerate(zip(COLUMNS, row, strict=True)):
            assert heat_map is not None
            axes = axes_RC[r][c]
            axes.set_facecolor(MISSING)
            mesh = axes.pcolormesh(
                heat_map.edges - 0.5,
                np.arange(len(heat_map.labels) + 1) - 0.5,
                np.ma.masked_invalid(heat_map.values),
                cmap=colours,
                vmin=0,
                vmax=1,
                rasterized=True,
            )
            every = -(-len(heat_map.labels) // 8)
            axes.set_yticks(range(0, len(heat_map.labels), every), heat_map.labels[::every])
            axes.grid(visible=False)
            over_steps(axes, label=r == len(shown) - 1)
            axes.xaxis.get_major_locator().set_params(nbins=4)
            if c == 0:
                axes.set_title(shown_text(member.name, 100), loc="left")
            if r == len(shown) - 1:
                canvas.colorbar(
                    mesh,
                    ax=[row_axes[c] for row_axes in axes_RC],
                    location="bottom",
                    shrink=0.8,
                    aspect=25,
                    label=name,
                )
            if c == 0:
                axes.set_ylabel("layer.head")
    return save(
        canvas,
        name="attention",
        title="Attention",
        alt=f"Heat maps of entropy_ratio, max_prob and softmax_gain per layer, head and step of {len(shown)} members",
        caption="entropy_ratio: 0 = all weight on one key, 1 = spread evenly. max_prob: mean of the largest weight. "
        "softmax_gain: mean of 1 - sum p^2; at 0 no gradient reaches q and k. Dark is a "
        "saturated softmax in all three; grey is not finite. Each member has its own range of steps."
        + (
            f" {len(shown)} of {len(contents.members)} members are shown: the first of each outcome."
            if len(contents.members) > len(shown)
            else ""
        ),
    )


def chosen_members(members: list[MemberRow]) -> list[MemberRow]:
    """At most MOST_MAPS members: the first of each outcome, then the first ones."""
    if len(members) <= MOST_MAPS:
        return members
    firsts = {member.status: index for index, member in reversed(list(enumerate(members)))}
    indices = sorted(firsts.values())
    indices += [index for index in range(len(members)) if index not in indices]
    return [members[index] for index in sorted(indices[:MOST_MAPS])]
