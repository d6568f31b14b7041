"""A run's settings and tables member by member, as arrays: what rules look at, for all members at once.

Shape key: N rows, M member in the order of run.json.
"""

from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from attnscope.config import Config, apply_changes
from attnscope.errors import RunError
from attnscope.runs.parts import NEVER as NEVER  # rules take it from here
from attnscope.runs.reader import Run

if TYPE_CHECKING:
    import pandas as pd

# The settings that rules read. Members that are alike in them share one resolved config.
READ = (
    "attention.scale",
    "attention.qk_norm",
    "attention.mask",
    "attention.backend",
    "attention.logit_softcap",
    "model.d_model",
    "model.n_heads",
    "model.d_head",
    "model.n_layers",
    "optimizer.name",
    "optimizer.warmup_steps",
    "data.source",
    "data.objective",
    "precision.dtype",
)


def configs_of(run: Run) -> tuple[Config | None, ...]:
    """Each member's config, resolved as far as READ goes, (M,); None where it cannot be understood."""
    try:
        base = replace(run.config, arms=(), sweep=None)
    except RunError:
        return (None,) * len(run.entries)
    known: dict[str, Config | None] = {}
    configs = []
    for entry in run.entries:
        changes = {key: entry.settings[key] for key in READ if key in entry.settings}
        same = repr(changes)
        if same not in known:
            known[same] = _changed(base, changes)
        configs.append(known[same])
    return tuple(configs)


def members_of_rows(table: "pd.DataFrame") -> NDArray[np.int64]:
    """Position in run.json of the member of each row, (N,)."""
    codes_N: NDArray[np.int64] = table["member"].cat.codes.to_numpy().astype(np.int64)
    return codes_N


def sorted_by_member(table: "pd.DataFrame", columns: tuple[str, ...]) -> list[NDArray[np.float64]]:
    """The member of each row and these columns, (N,) each, one member after the other, else as recorded."""
    codes_N = members_of_rows(table)
    order_N = np.argsort(codes_N, kind="stable")
    return [codes_N[order_N], *(table[name].to_numpy()[order_N] for name in columns)]


def slices_of(codes_N: NDArray[Any], n_members: int) -> list[slice]:
    """Where the rows of each member stand, (M,), in what is sorted by member."""
    bounds = np.searchsorted(codes_N, np.arange(n_members + 1)).tolist()
    return [slice(low, high) for low, high in pairwise(bounds)]


def first_measured(heads: "pd.DataFrame", n_members: int) -> "pd.DataFrame":
    """The rows of each member's first step in the heads table."""
    codes_N, step_N = heads["member"].cat.codes.to_numpy(), heads["step"].to_numpy()
    if n_members == 1:  # of a long run
        return heads[step_N == step_N.min()] if len(heads) else heads
    first_M = np.full(n_members, NEVER)
    np.minimum.at(first_M, codes_N, step_N)
    return heads[step_N == first_M[codes_N]]


def mean_by_member(codes_N: NDArray[np.int64], values_N: NDArray[np.float64], n_members: int) -> NDArray[np.float64]:
    """Mean over the values of each member that are numbers, (M,); NaN where there is none."""
    sound_N = ~np.isnan(values_N)
    counts_M = np.bincount(codes_N[sound_N], minlength=n_members)
    totals_M = np.bincount(codes_N[sound_N], weights=values_N[sound_N], minlength=n_members)
    with np.errstate(all="ignore"):
        means_M: NDArray[np.float64] = totals_M / counts_M
    return means_M


def diverged_at(run: Run) -> NDArray[np.int64]:
    """The step at which each member diverged, (M,); NEVER for the others."""
    return np.array([NEVER if member.diverged_at is None else member.diverged_at for member in run.members])


def _changed(base: Config, changes: dict[str, object]) -> Config | None:
    try:
        return apply_changes(base, changes, where="run.json")
    except Exception:
        # The settings are anybody's, and checks meant for people's TOML need not expect what is in them.
        return None


def rows_of_member(table: "pd.DataFrame", name: str) -> NDArray[np.int64]:
    """Where the rows of a member stand in a table, (N,)."""
    code = table["member"].cat.categories.get_loc(name)
    return np.flatnonzero(table["member"].cat.codes.to_numpy() == code)
