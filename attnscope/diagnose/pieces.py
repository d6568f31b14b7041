"""Tables of long runs in pieces: what is looked at step by step needs no more memory than a piece, and no sort of the whole.

Shape key: N rows of a table, S steps, P rows of one step.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from attnscope.runs.reader import Run

PIECE = 1 << 19  # rows


def pieces_of(run: Run, step_N: NDArray[np.int32]) -> Iterator[slice]:
    """Rows of whole steps, one piece after the other; all at once where several members or steps stand in another order."""
    n = len(step_N)
    if len(run.entries) > 1 or n <= PIECE or (step_N[1:] < step_N[:-1]).any():
        yield slice(0, n)
        return
    start = 0
    while start < n:
        end = start + PIECE
        end = n if end >= n else int(np.searchsorted(step_N, step_N[end]))
        if end <= start:  # one step alone has more
            end = int(np.searchsorted(step_N, step_N[start], side="right"))
        yield slice(start, end)
        start = end


def order_by_step(
    codes_N: NDArray[np.int64], step_N: NDArray[np.int64], within_N: NDArray[np.int64] | NDArray[np.float64]
) -> NDArray[np.int64]:
    """The order by member, step and what is within a step, (N,). Steps of one member stand one after the other as a rule."""
    n_rows = int(np.searchsorted(step_N, step_N[0], side="right")) if len(step_N) else 0
    if n_rows and len(step_N) % n_rows == 0 and codes_N[0] == codes_N[-1] and not np.ptp(codes_N):
        step_SP, within_SP = step_N.reshape(-1, n_rows), within_N.reshape(-1, n_rows)
        if (step_SP == step_SP[:, :1]).all() and (step_SP[1:, 0] > step_SP[:-1, 0]).all():
            first_S1 = np.arange(len(step_SP))[:, None] * n_rows
            in_blocks: NDArray[np.int64] = (np.argsort(within_SP, axis=1, kind="stable") + first_S1).ravel()
            return in_blocks
    order: NDArray[np.int64] = np.lexsort((within_N, step_N, codes_N))
    return order
