"""Why numbers of a member stopped being finite, where the tables show it; silent where they do not.

Shape key: N rows.
"""

import numpy as np

from attnscope.diagnose.products import FLOAT16_MAX, products_of
from attnscope.runs.by_member import members_of_rows, rows_of_member
from attnscope.runs.reader import Run

NEAR = 0.125  # of FLOAT16_MAX: the largest product may be so many times that of the rows and steps that were measured
LOOK_BACK = 20  # steps

OVERFLOW_REMEDY = "Use bfloat16, a fused kernel, or multiply q by the scale before the product."
NO_LABEL_REMEDY = "Leave batches without any label out, or divide by at least 1."


def why_nonfinite(run: Run, m: int, step: int, tensor: str) -> tuple[str, str]:
    """In a sentence, and what to do about it; two empty texts where nothing tells.

    Args:
        run: whose tables.
        m: position of the member in run.json.
        step: the first whose numbers are not finite.
        tensor: the first of them, as `signals.nonfinite.TENSORS` has it.
    """
    if tensor == "gradient":
        return "", ""
    return _overflow(run, m, step) or _no_label(run, m, step) or ("", "")


def _overflow(run: Run, m: int, step: int) -> tuple[str, str] | None:
    """q.k in float16, before it is scaled."""
    product_N, _ = products_of(run)
    if np.isnan(product_N).all():
        return None
    step_N = run.heads["step"].to_numpy()
    mine_N = (members_of_rows(run.heads) == m) & (step_N <= step) & (step_N >= step - LOOK_BACK)
    at_K = np.flatnonzero(mine_N & np.isfinite(product_N))
    if not len(at_K):
        return None
    most = int(at_K[product_N[at_K].argmax()])
    if product_N[most] < NEAR * FLOAT16_MAX:
        return None
    said = (
        f"Before it is scaled, q.k of layer {run.heads['layer'].iloc[most]}, head {run.heads['head'].iloc[most]} was "
        f"{product_N[most]:,.0f} at step {step_N[most]}, in float16, which ends at {FLOAT16_MAX:,.0f}: it overflowed."
    )
    return said, OVERFLOW_REMEDY


def _no_label(run: Run, m: int, step: int) -> tuple[str, str] | None:
    """A mean over no target, 0 / 0: cross-entropy was seen, and none of its targets counted."""
    rows_N = rows_of_member(run.steps, run.entries[m].name)
    step_N, tokens_N = run.steps["step"].to_numpy()[rows_N], run.steps["tokens"].to_numpy()[rows_N]
    if run.kind != "watch" or not len(rows_N) or not tokens_N[-1] > 0:
        return None
    at = int(np.searchsorted(step_N, step))
    before = tokens_N[at - 1] if at else 0
    if at >= len(step_N) or step_N[at] != step or tokens_N[at] != before:
        return None
    return f"No target of step {step} counts: its loss is a mean over nothing, 0 / 0.", NO_LABEL_REMEDY
