"""What became of attention in the course of training, before a member diverged.

Shape key: N rows, K measured steps, one member after the other, M member in the order of run.json.
"""

from dataclasses import dataclass

import numpy as np

from attnscope.diagnose.applied_scale import odd_scales
from attnscope.diagnose.rules.saturation import SATURATED_RATIO
from attnscope.runs.by_member import diverged_at, first_measured, members_of_rows
from attnscope.runs.reader import Run

# Kimi K2 2025 clips queries and keys where a logit is above 100; Wortsman et al. 2023: transplanted logits hurt from 1e3 on. Of members
# whose updates were large, all that were measured below CLOSED_RATIO with such logits ended 0.15 nats or more above the best of their likes.
LARGE_LOGIT = 100.0
HUGE_LOGIT = 1e3
CLOSED_RATIO = 0.2
SHUT_RATIO = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Closed:
    """Attention that was open and closed up, at the first step at which it had.

    Attributes:
        step: of that.
        ratio: mean entropy_ratio.
        first_ratio: when it was first measured.
        logit: the largest.
        limit_ratio: what ratio was compared with.
        limit_logit: what logit was compared with.
        is_shut: whether it was below SHUT_RATIO at some step.
    """

    step: int
    ratio: float
    first_ratio: float
    logit: float
    limit_ratio: float
    limit_logit: float
    is_shut: bool


def closed_attention(run: Run) -> dict[str, Closed]:
    """Each member whose attention was open at first and closed up before it diverged."""
    heads, end_M = run.heads, diverged_at(run)
    codes_N, step_N = members_of_rows(heads), heads["step"].to_numpy()
    may_close_N = heads["max_logit"].to_numpy() > LARGE_LOGIT
    if not may_close_N.any():
        return {}
    may_close_M = np.bincount(codes_N[may_close_N], minlength=len(run.entries)) > 0
    before_N = may_close_M[codes_N] & (step_N < end_M[codes_N])
    rows = heads.loc[before_N, ["entropy_ratio", "max_logit"]]
    by_step = rows.groupby([codes_N[before_N], step_N[before_N]]).agg({"entropy_ratio": "mean", "max_logit": "max"})
    code_K, step_K = (by_step.index.get_level_values(level).to_numpy() for level in (0, 1))
    ratio_K, logit_K = by_step["entropy_ratio"].to_numpy(), by_step["max_logit"].to_numpy()
    start_M = np.searchsorted(code_K, np.arange(len(run.entries) + 1))
    suspect_K = ((ratio_K < CLOSED_RATIO) & (logit_K > LARGE_LOGIT)) | (logit_K > HUGE_LOGIT)
    found = {}
    for m in np.unique(code_K[suspect_K]).tolist():
        k = slice(start_M[m], start_M[m + 1])
        first_ratio = float(ratio_K[k.start])
        limit = min(CLOSED_RATIO, first_ratio / 2)
        closes_K = (ratio_K[k] < limit) & (logit_K[k] > LARGE_LOGIT)
        is_huge_K = logit_K[k] > HUGE_LOGIT
        if not first_ratio >= SATURATED_RATIO or not (closes_K | is_huge_K).any():
            continue
        is_shut_K = closes_K & (ratio_K[k] < SHUT_RATIO)
        at = int(np.argmax(is_shut_K if is_shut_K.any() else closes_K | is_huge_K))
        found[run.entries[m].name] = Closed(
            step=int(step_K[k][at]),
            ratio=float(ratio_K[k][at]),
            first_ratio=first_ratio,
            logit=float(logit_K[k][at]),
            limit_ratio=limit,
            limit_logit=LARGE_LOGIT if closes_K[at] else HUGE_LOGIT,
            is_shut=bool(is_shut_K.any()),
        )
    return found


def with_large_logits(run: Run) -> set[str]:
    """Members whose attention logits are too large before anything is learned: by their scale, or by their weights."""
    large = {each.member for each in odd_scales(run) if each.times > 1 and not each.is_normed}
    heads = first_measured(run.heads, len(run.entries))
    means = heads["entropy_ratio"].groupby(members_of_rows(heads)).mean()
    return large | {
        run.entries[m].name
        for m, ratio in zip(means.index.to_numpy(), means.to_numpy(), strict=True)
        if ratio < SATURATED_RATIO
    }
