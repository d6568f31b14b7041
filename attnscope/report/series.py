"""From a hundred thousand steps to what fits a figure, without losing a peak.

Shape key: N records, S steps, P points of a figure, G lines of one member (layer x head), V value.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from attnscope.runs.by_member import rows_of_member
from attnscope.runs.tables import RunTables

if TYPE_CHECKING:
    import pandas as pd

POINTS = 1000
ROWS_AT_ONCE = 1 << 20  # of a table, so that what is computed from them stays small beside it
MOST_KEYS = 1 << 24  # between the smallest and the largest, for a table to look them up
CELLS = 300  # of a heat map, along the steps

Floats = NDArray[np.float64]
Keys = NDArray[np.int32] | NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Heat:
    """One value per layer and head (down) and bin of steps (across); NaN where nothing finite was recorded.

    Attributes:
        labels: layer and head of each row.
        edges: steps between which the bins lie, one more than bins.
        values: (G, bins).
    """

    labels: tuple[str, ...]
    edges: Floats
    values: Floats


def curve_of(tables: RunTables, name: str, column: str) -> tuple[Floats, Floats]:
    """Steps of a member and one of its columns of the steps table, (N,) each."""
    rows_N = rows_of_member(tables.steps, name)
    steps = tables.steps["step"].to_numpy()[rows_N].astype(np.float64)
    return steps, tables.steps[column].to_numpy()[rows_N].astype(np.float64)


def where_measured(steps: Floats, values: Floats, measured: NDArray[np.int32]) -> tuple[Floats, Floats]:
    """The curve at these steps alone if it has values at no others: a gap says that it broke, not that nobody looked."""
    is_measured_N = np.isin(steps, measured)
    if np.isfinite(values[~is_measured_N]).any():
        return steps, values
    return steps[is_measured_N], values[is_measured_N]


def thinned(steps: Floats, values: Floats, *, points: int = POINTS) -> tuple[Floats, Floats]:
    """A curve of at most about 2 x `points` points: the smallest and the largest finite value of each bin, in order.

    A curve that is short enough comes back as it is, NaN included.
    """
    if len(steps) <= 2 * points:
        return steps, values
    bounds = np.linspace(0, len(steps), points + 1).astype(np.int64)
    keep = []
    for low, high in itertools.pairwise(bounds.tolist()):
        inside = values[low:high]
        finite = np.flatnonzero(np.isfinite(inside))
        if len(finite):
            values_left = inside[finite]
            keep += sorted({low + finite[values_left.argmin()], low + finite[values_left.argmax()]})
        if len(finite) < len(inside):
            keep.append(low + int(np.flatnonzero(~np.isfinite(inside))[0]))
    index = np.unique(np.array(keep, dtype=np.int64))
    return steps[index], values[index]


def largest_per_step(steps_N: Floats, values_N: Floats) -> tuple[Floats, Floats]:
    """The largest value among the records of each step, which stand together; NaN and Inf win."""
    if not len(steps_N):
        return steps_N, values_N
    starts_S = np.flatnonzero(np.r_[True, steps_N[1:] != steps_N[:-1]])
    return steps_N[starts_S], np.maximum.reduceat(values_N, starts_S)


def finite_steps(steps_N: NDArray[np.int32], values_N: Floats) -> NDArray[np.int32]:
    """The steps, ascending, of which every record is finite: of one that broke half-way, the upper layers tell nothing."""
    return np.setdiff1d(steps_N, steps_N[~np.isfinite(values_N)])


def heat(heads: "pd.DataFrame", rows_N: NDArray[np.int64], column: str) -> Heat | None:
    """The mean of a column per layer, head and bin of steps; None where nothing was recorded."""
    binned = heat_of(heads, rows_N, column, head_keys(heads)[rows_N])
    if binned is None:
        return None
    keys_G, edges, values = binned
    return Heat(labels=tuple(map(head_label, keys_G)), edges=edges, values=values)


def head_keys(heads: "pd.DataFrame") -> Keys:
    """One number for each layer and head, in their order, (N,)."""
    return (heads["layer"].to_numpy().astype(np.int32) << 16) + heads["head"].to_numpy()


def head_label(key: int) -> str:
    """layer.head of such a number."""
    return f"{key >> 16}.{key & 0xFFFF}"


def distinct(key_N: Keys) -> list[int]:
    """The keys that occur, ascending."""
    return _numbering(key_N)[0] if len(key_N) else []


def heat_of(
    table: "pd.DataFrame",
    rows_N: NDArray[np.int64],
    column: str,
    key_N: Keys,
    *,
    cells: int = CELLS,
) -> tuple[list[int], Floats, Floats] | None:
    """The mean of a column per key and bin of steps; None where nothing was recorded.

    Args:
        table: any with steps.
        rows_N: of it.
        column: whose finite values count.
        key_N: what makes a line of the heat map, of each of the rows.
        cells: bins at most.

    Returns:
        The keys, ascending; the steps between which the bins lie, (bins + 1,); the means, (G, bins).
    """
    if not len(rows_N):
        return None
    steps_N, values_N = table["step"].to_numpy(), table[column].to_numpy()
    keys_G, line_of = _numbering(key_N)
    first, last = int(steps_N[rows_N].min()), int(steps_N[rows_N].max())
    n_bins = min(cells, last - first + 1)
    size = len(keys_G) * n_bins
    counts, sums = np.zeros(size), np.zeros(size)
    recorded = np.zeros(n_bins, dtype=bool)
    for low in range(0, len(rows_N), ROWS_AT_ONCE):
        some_N = rows_N[low : low + ROWS_AT_ONCE]
        bin_N = (steps_N[some_N].astype(np.int64) - first) * n_bins // (last - first + 1)
        recorded[bin_N] = True
        cell_N = line_of(key_N[low : low + ROWS_AT_ONCE]) * n_bins + bin_N
        value_N = values_N[some_N]
        finite_N = np.isfinite(value_N)
        cell_N, value_N = cell_N[finite_N], value_N[finite_N]
        counts += np.bincount(cell_N, minlength=size)
        sums += np.bincount(cell_N, weights=value_N, minlength=size)
    with np.errstate(invalid="ignore"):
        values = (sums / counts).reshape(len(keys_G), n_bins)
    for gap in np.flatnonzero(~recorded):  # record.every > 1: show the last measurement until the next
        values[:, gap] = values[:, gap - 1]
    return keys_G, np.linspace(first, last + 1, n_bins + 1), values


def _numbering(key_N: Keys) -> tuple[list[int], Callable[[Keys], NDArray[np.int64]]]:
    """The keys that occur, ascending, and what finds the index of keys among them."""
    low, high = int(key_N.min()), int(key_N.max())
    if high - low > MOST_KEYS:  # of a run that somebody made up
        keys_G = np.unique(key_N)
        return keys_G.tolist(), lambda keys: np.searchsorted(keys_G, keys)
    # A table to look up in: sorting millions of rows takes longer than all the rest.
    occurs = np.zeros(high - low + 1, dtype=bool)
    occurs[key_N - low] = True
    index_of_key = np.cumsum(occurs) - 1
    return (np.flatnonzero(occurs) + low).tolist(), lambda keys: index_of_key[keys - low]
