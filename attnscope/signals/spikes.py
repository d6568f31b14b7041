"""Loss spikes: the loss jumps out of what it was, and comes back.

Shape key: N rows, S steps, W steps of a window.
"""

from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from attnscope.runs.by_member import diverged_at, sorted_by_member
from attnscope.runs.reader import Run

# The MAD of so few losses is itself noisy: on normal noise alone (2 % of the loss and more) this finds about 20 spikes in
# 100,000 steps, on heavier tails (t with 5 degrees of freedom) 190; with a window of 50 it would be 1 and 100. Measured on
# members that trained: none in 21,100 steps.
WINDOW = 20  # steps
SIGMAS = 6.0  # robust ones: 1.4826 * MAD is the standard deviation of normal noise
LEAST_EXCESS = 0.05  # of the median: smaller peaks are not worth a look however quiet the loss is
BACK_WITHIN = 20  # steps
BLOCK = 1 << 16  # windows looked at together, for memory


def spikes_of(run: Run) -> tuple[NDArray[Any], ...]:
    """Member, step, loss, median before and limit of every spike that came back, (K,) each."""
    codes_N, step_N, loss_N = sorted_by_member(run.steps, ("step", "loss"))
    loss_N = loss_N.astype(np.float64)
    n = len(loss_N)
    median_N, limit_N = np.full(n, np.nan), np.full(n, np.nan)
    with np.errstate(all="ignore"):
        for start in range(WINDOW, n, BLOCK):
            end = min(start + BLOCK, n)
            window_NW = sliding_window_view(loss_N[start - WINDOW : end - 1], WINDOW)
            middle_N = np.median(window_NW, axis=1)
            mad_N = np.median(np.abs(window_NW - middle_N[:, None]), axis=1)
            median_N[start:end] = middle_N
            limit_N[start:end] = middle_N + np.maximum(SIGMAS * 1.4826 * mad_N, LEAST_EXCESS * np.abs(middle_N))
    whole_N = np.zeros(n, dtype=bool)  # the window holds losses of this member only
    whole_N[WINDOW:] = codes_N[WINDOW:] == codes_N[: max(0, n - WINDOW)]
    sound_N = step_N < diverged_at(run)[codes_N]
    onset_K = np.flatnonzero(whole_N & sound_N & (loss_N > limit_N))
    over_K = onset_K + BACK_WITHIN + 1  # the first loss below the limit; if there is none, beyond
    for start in range(0, len(onset_K), BLOCK):
        at_K = onset_K[start : start + BLOCK]
        next_KW = at_K[:, None] + np.arange(1, BACK_WITHIN + 1)
        inside_KW = next_KW < n
        next_KW = np.minimum(next_KW, n - 1)
        back_KW = inside_KW & sound_N[next_KW] & (codes_N[next_KW] == codes_N[at_K][:, None])
        back_KW &= loss_N[next_KW] <= limit_N[at_K][:, None]
        back_K = back_KW.any(axis=1)
        over_K[start : start + BLOCK][back_K] = (at_K + 1 + back_KW.argmax(axis=1))[back_K]
    # What is still high, or high again, before an earlier peak is over belongs to that one.
    new_K = np.ones(len(onset_K), dtype=bool)
    new_K[1:] = onset_K[1:] >= np.maximum.accumulate(over_K)[:-1]
    at_K = onset_K[new_K & (over_K - onset_K <= BACK_WITHIN)]
    return codes_N[at_K], step_N[at_K], loss_N[at_K], median_N[at_K], limit_N[at_K]
