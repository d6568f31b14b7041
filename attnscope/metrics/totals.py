"""What is kept of attention rows until nothing is added any more: sums, largest values, counts.

Totals of any pieces of a call, or of several calls, add up to the totals of the whole, and only those are divided: a mean of
means would be another number. A piece without a measurable row adds nothing.

Shape key: ... any leading axes (member, layer), H head.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

# In the order of the table on disk.
STATISTICS = (
    "entropy",
    "entropy_ratio",
    "max_prob",
    "saturated",
    "logit_std",
    "max_logit",
    "max_logit_bound",
    "logits_over_5",
    "softmax_gain",
    "sink",
)
# Of the heads table, besides its keys.
HEAD_COLUMNS = (*STATISTICS, "rows", "rows_left_out")

MAXIMA = ("max_logit", "max_logit_bound")
# Of `logit_std` the sum of squares; of `logits_over_5` a count, of as many as `visible` says.
TOTALS = (*HEAD_COLUMNS, "visible")

NOTHING = -torch.inf  # the largest of no values


def add(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Totals of both, TOTALS to (..., H); a NaN among the largest values stays one."""
    return {name: torch.maximum(a[name], b[name]) if name in MAXIMA else a[name] + b[name] for name in TOTALS}


def of_no_key(shape_H: torch.Size, n_rows: int, like: Tensor) -> dict[str, Tensor]:
    """TOTALS to (..., H) of so many query rows that see nothing, of which there may be none."""
    nothing = {name: like.new_zeros(shape_H) for name in TOTALS}
    nothing |= {name: like.new_full(shape_H, NOTHING) for name in MAXIMA}
    nothing["rows_left_out"] += n_rows
    return nothing


def with_bound(totals: Mapping[str, Tensor], bound: Tensor) -> dict[str, Tensor]:
    """Totals that also know `max_logit_bound`, (..., H); where it is unknown and there is no row, it is of nothing."""
    n_rows = totals["rows"]
    bound = bound.to(n_rows.dtype).expand(n_rows.shape)
    return {**totals, "max_logit_bound": bound.masked_fill(bound.isnan() & (n_rows == 0), NOTHING)}


def finish(totals: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """HEAD_COLUMNS to (..., H); a head without a measurable row has NaN."""
    n_rows = totals["rows"]
    stats = {name: totals[name] / n_rows for name in STATISTICS if name not in MAXIMA}
    stats["logit_std"] = stats["logit_std"].sqrt()
    stats["logits_over_5"] = totals["logits_over_5"] / totals["visible"]
    stats["max_logit"] = totals["max_logit"].where(n_rows > 0, torch.nan)
    bound = totals["max_logit_bound"]
    stats["max_logit_bound"] = bound.masked_fill(bound == NOTHING, torch.nan)
    ordered = {name: stats[name] for name in STATISTICS}
    return ordered | {"rows": n_rows, "rows_left_out": totals["rows_left_out"]}
