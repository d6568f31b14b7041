"""The figures of a report, drawn in memory: one visual language, readable in print and by the colour-blind.

Reading order: canvas (what all share), then one module per family: loss, attention, logits, gradients, activations, sweeps.
"""

import warnings

from attnscope.report.blocks import Figure
from attnscope.report.contents import Contents
from attnscope.report.figures.activations import draw_activations
from attnscope.report.figures.attention import draw_attention
from attnscope.report.figures.canvas import STYLE
from attnscope.report.figures.gradients import draw_gradients, draw_group_gradients, draw_update_ratios
from attnscope.report.figures.logits import draw_logit_std, draw_max_logit
from attnscope.report.figures.loss import draw_loss
from attnscope.report.figures.sweeps import draw_loss_by_lr, draw_matrix, draw_phase
from attnscope.runs.tables import RunTables

__all__ = ["draw_figures"]


def draw_figures(tables: RunTables, contents: Contents) -> list[Figure]:
    """Draw every figure for which something was recorded."""
    from matplotlib import rc_context

    with rc_context(STYLE), warnings.catch_warnings():
        # A member may be called anything: letters that the font lacks become boxes.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        drawn = [draw(contents) for draw in (draw_phase, draw_matrix, draw_loss_by_lr)]
        drawn += [
            draw(tables, contents)
            for draw in (
                draw_loss,
                draw_attention,
                draw_max_logit,
                draw_logit_std,
                draw_gradients,
                draw_group_gradients,
                draw_update_ratios,
                draw_activations,
            )
        ]
    return [figure for figure in drawn if figure is not None]
