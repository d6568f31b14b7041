"""The training loss of all members, and what a model without context reaches."""

import numpy as np

from attnscope.report.blocks import Figure
from attnscope.report.contents import Contents
from attnscope.report.figures.canvas import (
    MOST_LINES,
    MOST_NAMED,
    canvas_with,
    draw_members,
    legend,
    of_many,
    over_steps,
    plain_ticks,
    points_of_curves,
    reference_lines,
    save,
)
from attnscope.report.series import curve_of, thinned
from attnscope.runs.tables import RunTables


def draw_loss(tables: RunTables, contents: Contents) -> Figure | None:
    """Loss over steps, logarithmic; a second panel for the first steps where something broke early."""
    points = points_of_curves(contents)
    many = len(contents.members) > MOST_NAMED
    members = [m for m in contents.members[:MOST_LINES] if m.first_loss is not None]
    curves = {member.name: thinned(*curve_of(tables, member.name, "loss"), points=points) for member in members}
    if not any(np.isfinite(values).any() for _, values in curves.values()):
        return None
    last = max(float(steps[-1]) for steps, _ in curves.values())
    breaks = [m.step if m.nonfinite_at is None else m.nonfinite_at for m in members if m.status == "diverged"]
    zoom = max((float(step) for step in breaks if step is not None), default=0.0) * 1.5 + 5
    zoomed = bool(breaks) and zoom < last / 2
    canvas, ((*panels,),) = canvas_with(3.3, columns=2 if zoomed else 1)
    for axes in panels:
        draw_members(axes, contents.members, lambda member: curves.get(member.name, _NOTHING))
        axes.set_yscale("log")
        over_steps(axes)
    panels[0].set_ylabel("loss (nats per token)")
    kept = [curves[m.name][1] for m in members if m.status != "diverged"]
    if zoomed:
        panels[0].set(xlim=(-0.5, zoom), title="until it broke")
        panels[1].set(title="the whole run")
    if kept:
        shown = np.concatenate([*kept, list(contents.reference.values())])
        shown = shown[np.isfinite(shown) & (shown > 0)]
        if len(shown):
            panels[-1].set_ylim(shown.min() / 1.3, shown.max() * 2)
    reference_lines(panels[-1], contents)
    for axes in panels:
        plain_ticks(axes)
    legend(panels[-1], "upper right")
    marked = "" if many else "a cross marks the last loss of a member before one that is not finite, "
    return save(
        canvas,
        name="loss",
        title="Loss",
        alt=f"Training loss of {len(members)} members over steps, logarithmic",
        caption=f"Training loss; {marked}dotted lines are what a model without context reaches."
        + of_many(contents, MOST_LINES),
    )


_NOTHING = (np.empty(0), np.empty(0))
