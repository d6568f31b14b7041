"""How far the steps of a member move its weights, from the params table: what rules of the optimizer look at.

Shape key: N rows of the table, K measured steps, one member after the other, M member in the order of run.json.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from attnscope.diagnose.blindness import without_steps
from attnscope.diagnose.pieces import order_by_step, pieces_of
from attnscope.findings import Evidence
from attnscope.runs.by_member import diverged_at, members_of_rows
from attnscope.runs.reader import Run

if TYPE_CHECKING:
    import pandas as pd

_STEPS = 2**32  # more than a run has
NO_PARAMS = "no update of parameters was measured"

_Floats = NDArray[np.float64]
_Wholes = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Movement:
    """What the measured steps before divergence did to the weights; a step that moved nothing is none.

    Attributes:
        step_K: ascending within a member.
        ratio_K: the typical update_ratio: half of the parameter groups that begin with weights move more, or as much.
        row_K: of the params table where it stands.
        reach_K: sum over groups of grad_norm x update_norm: to first order the loss changes by no more (Cauchy-Schwarz).
        span_K: steps up to the next one measured; 1 for the last.
        start_M: where a member begins along K, (M + 1,).
    """

    step_K: _Wholes
    ratio_K: _Floats
    row_K: _Wholes
    reach_K: _Floats
    span_K: _Wholes
    start_M: _Wholes

    def of(self, m: int) -> slice:
        """The steps of a member along K."""
        return slice(int(self.start_M[m]), int(self.start_M[m + 1]))

    def evidence(self, run: Run, k: int, threshold: float | None) -> Evidence:
        """The update_ratio of a step, where it is typical."""
        row = run.params.iloc[int(self.row_K[k])]
        layer = int(row["layer"])
        return Evidence(
            member=str(row["member"]),
            step=int(self.step_K[k]),
            layer=None if layer < 0 else layer,
            group=str(row["group"]),
            quantity="update_ratio",
            value=float(self.ratio_K[k]),
            threshold=threshold,
        )


_known: "WeakKeyDictionary[Run, Movement]" = WeakKeyDictionary()  # several rules ask for the same


def movement_of(run: Run) -> Movement:
    """What every member's updates did to its weights."""
    if run not in _known:
        _known[run] = _movement_of(run)
    return _known[run]


def without_movement(run: Run) -> dict[str, str]:
    """Members of which no update was measured before they diverged."""
    start_M = movement_of(run).start_M
    found = {e.name: NO_PARAMS for e, n in zip(run.entries, np.diff(start_M), strict=True) if not n}
    return found | without_steps(run)


def _movement_of(run: Run) -> Movement:
    zeros = _begin_at_zero(run)
    found = [_moves_in(run, rows, zeros) for rows in pieces_of(run, run.params["step"].to_numpy())]
    member_K, step_K, ratio_K, row_K, reach_K = (np.concatenate(each) for each in zip(*found, strict=True))
    span_K = np.ones(len(step_K), dtype=np.int64)
    span_K[:-1] = np.where(member_K[1:] == member_K[:-1], step_K[1:] - step_K[:-1], 1)
    return Movement(
        step_K=step_K,
        ratio_K=ratio_K,
        row_K=row_K,
        reach_K=reach_K,
        span_K=span_K,
        start_M=np.searchsorted(member_K, np.arange(len(run.entries) + 1)),
    )


def _moves_in(run: Run, rows: slice, zeros: _Wholes | None) -> tuple[_Wholes, _Wholes, _Floats, _Wholes, _Floats]:
    """Member, step, typical update_ratio, its row, and reach of each step measured in these rows, (K,)."""
    params = run.params.iloc[rows]
    codes_N, step_N = members_of_rows(params), params["step"].to_numpy().astype(np.int64)
    weight_N, update_N, gradient_N = (
        params[name].to_numpy().astype(np.float64) for name in ("weight_norm", "update_norm", "grad_norm")
    )
    with np.errstate(all="ignore"):
        ratio_N = update_N / weight_N
    usable_N = np.isfinite(ratio_N) & (update_N > 0) & (step_N < diverged_at(run)[codes_N])
    if zeros is not None:
        usable_N &= ~np.isin(_places(params), zeros)
    rows_N = np.flatnonzero(usable_N)
    # A whole model stands side by side: by member, step and ratio.
    rows_N = rows_N[order_by_step(codes_N[rows_N], step_N[rows_N], ratio_N[rows_N])]
    codes_N, step_N, ratio_N = codes_N[rows_N], step_N[rows_N], ratio_N[rows_N]
    is_first_N = np.ones(len(rows_N), dtype=bool)
    is_first_N[1:] = (codes_N[1:] != codes_N[:-1]) | (step_N[1:] != step_N[:-1])
    first_K = np.flatnonzero(is_first_N)
    count_K = np.diff(np.r_[first_K, len(rows_N)])
    middle_K = first_K + (count_K - 1) // 2
    with np.errstate(all="ignore"):
        reach_N = np.nan_to_num(gradient_N[rows_N] * update_N[rows_N], nan=0.0, posinf=np.inf)
    reach_K = np.add.reduceat(reach_N, first_K) if len(first_K) else np.empty(0)
    return codes_N[first_K], step_N[first_K], ratio_N[middle_K], rows_N[middle_K] + rows.start, reach_K


def _begin_at_zero(run: Run) -> _Wholes | None:
    """Groups whose weights are 0 at first (biases alone, LoRA's B): any update is large beside them; None where there are none."""
    zero_N = run.params["weight_norm"].to_numpy() == 0
    return np.unique(_places(run.params.loc[zero_N])) if zero_N.any() else None


def _places(params: "pd.DataFrame") -> _Wholes:
    """Member, layer and group of each row as one number, (N,)."""
    layer_N, group_N = params["layer"].to_numpy().astype(np.int64), params["group"].cat.codes.to_numpy()
    places_N: _Wholes = (members_of_rows(params) * (2**16) + layer_N + 1) * (
        len(params["group"].cat.categories) + 1
    ) + group_N
    return places_N


def at_measured(run: Run, moves: Movement, column: str) -> _Floats:
    """A column of the steps table at each measured step, (K,); NaN where there is none."""
    steps = run.steps
    key_N = members_of_rows(steps) * _STEPS + steps["step"].to_numpy().astype(np.int64)
    order_N = np.argsort(key_N, kind="stable")
    key_K = np.repeat(np.arange(len(run.entries)), np.diff(moves.start_M)) * _STEPS + moves.step_K
    if not len(key_N):
        return np.full(len(key_K), np.nan)
    at_K = np.minimum(np.searchsorted(key_N[order_N], key_K), len(key_N) - 1)
    row_K = order_N[at_K]
    values_N = steps[column].to_numpy().astype(np.float64)
    return np.where(key_N[row_K] == key_K, values_N[row_K], np.nan)
