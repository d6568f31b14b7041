"""From a hundred thousand steps to what fits a figure, without losing a peak.

Shape key: N records, S steps, P points of a figure, G lines of one member (layer x head), V value.
"""

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import pandas as pd

POINTS = 1000
CELLS = 300  # of a heat map, along the steps

Array = NDArray[np.float64]


class Tables(Protocol):
    """What was recorded: of one run, or of several that are compared."""

    @property
    def steps(self) -> "pd.DataFrame": ...

    @property
    def heads(self) -> "pd.DataFrame": ...

    @property
    def params(self) -> "pd.DataFrame": ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Heat:
    """One value per layer and head (down) and bin of steps (across); NaN where nothing finite was recorded.

    Attributes:
        labels: layer and head of each row.
        edges: steps between which the bins lie, one more than bins.
        values: (G, bins).
    """

    labels: tuple[str, ...]
    edges: Array
    values: Array


def rows_of_member(table: "pd.DataFrame", name: str) -> NDArray[np.int64]:
    """Where the rows of a member stand in a table, (N,)."""
    code = table["member"].cat.categories.get_loc(name)
    return np.flatnonzero(table["member"].cat.codes.to_numpy() == code)


def curve_of(tables: Tables, name: str, column: str) -> tuple[Array, Array]:
    """Steps of a member and one of its columns of the steps table, (N,) each."""
    rows_N = rows_of_member(tables.steps, name)
    steps = tables.steps["step"].to_numpy()[rows_N].astype(np.float64)
    return steps, tables.steps[column].to_numpy()[rows_N].astype(np.float64)


def thinned(steps: Array, values: Array, *, points: int = POINTS) -> tuple[Array, Array]:
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
            found = inside[finite]
            keep += sorted({low + finite[found.argmin()], low + finite[found.argmax()]})
        if len(finite) < len(inside):
            keep.append(low + int(np.flatnonzero(~np.isfinite(inside))[0]))
    index = np.unique(np.array(keep, dtype=np.int64))
    return steps[index], values[index]


def largest_per_step(steps_N: Array, values_N: Array) -> tuple[Array, Array]:
    """The largest value among the records of each step, which stand together; NaN and Inf win."""
    if not len(steps_N):
        return steps_N, values_N
    starts_S = np.flatnonzero(np.r_[True, steps_N[1:] != steps_N[:-1]])
    return steps_N[starts_S], np.maximum.reduceat(values_N, starts_S)


def heat(heads: "pd.DataFrame", rows_N: NDArray[np.int64], column: str) -> Heat | None:
    """The mean of a column per layer, head and bin of steps; None where nothing was recorded."""
    key_N = heads["layer"].to_numpy()[rows_N].astype(np.int64) << 16
    key_N += heads["head"].to_numpy()[rows_N]
    found = heat_of(heads, rows_N, column, key_N)
    if found is None:
        return None
    keys_G, edges, values = found
    labels = tuple(f"{key >> 16}.{key & 0xFFFF}" for key in keys_G)
    return Heat(labels=labels, edges=edges, values=values)


def heat_of(
    table: "pd.DataFrame",
    rows_N: NDArray[np.int64],
    column: str,
    key_N: NDArray[np.int64],
    *,
    cells: int = CELLS,
) -> tuple[list[int], Array, Array] | None:
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
    step_N = table["step"].to_numpy()[rows_N].astype(np.int64)
    keys_G, line_N = np.unique(key_N, return_inverse=True)
    first, last = int(step_N.min()), int(step_N.max())
    n_bins = min(cells, last - first + 1)
    bin_N = (step_N - first) * n_bins // (last - first + 1)
    cell_N = line_N * n_bins + bin_N
    value_N = table[column].to_numpy()[rows_N].astype(np.float64)
    finite_N = np.isfinite(value_N)
    size = len(keys_G) * n_bins
    counts = np.bincount(cell_N[finite_N], minlength=size)
    sums = np.bincount(cell_N[finite_N], weights=value_N[finite_N], minlength=size)
    with np.errstate(invalid="ignore"):
        values = (sums / counts).reshape(len(keys_G), n_bins)
    recorded = np.bincount(bin_N, minlength=n_bins) > 0
    for gap in np.flatnonzero(
        ~recorded
    ):  # record.every > 1: show the last measurement until the next
        values[:, gap] = values[:, gap - 1]
    return keys_G.tolist(), np.linspace(first, last + 1, n_bins + 1), values
