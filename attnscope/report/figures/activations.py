"""The residual stream: how large it is, and whether the states of all tokens become one."""

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
    save,
)
from attnscope.report.series import Array, Tables, curve_of, thinned
from attnscope.report.verdict import MemberRow

COARSE = 150  # bins of a curve that is one of many


def draw_activations(tables: Tables, found: Contents) -> Figure | None:
    """activation_rms_max and token_cosine over steps."""
    points = COARSE if len(found.members) > MOST_NAMED else 1000

    def curve(column: str, member: MemberRow) -> tuple[Array, Array]:
        return thinned(*curve_of(tables, member.name, column), points=points)

    canvas, ((left, right),) = canvas_with(3.0, columns=2)

    def rms(member: MemberRow) -> tuple[Array, Array]:
        steps, values = curve("activation_rms_max", member)
        return steps, np.where(values > 0, values, np.nan)

    drawn = draw_members(left, found.members, rms)
    drawn |= draw_members(right, found.members, lambda member: curve("token_cosine", member))
    if not drawn:
        return None
    left.set(yscale="log", ylabel="activation_rms_max")
    right.set(ylabel="token_cosine (1 = rank collapse)", ylim=(None, 1.02))
    for axes in (left, right):
        over_steps(axes)
    plain_ticks(left)
    legend(left)
    return save(
        canvas,
        name="activations",
        title="Residual stream",
        alt="Largest RMS of the residual stream and mean cosine of token states, of every member over steps",
        caption="Left: the largest RMS of the residual stream over layers. Right: mean cosine similarity between the states "
        "of different tokens in the last layer; at 1 all tokens look the same (Dong et al. 2021)."
        + of_many(found, MOST_LINES),
    )
