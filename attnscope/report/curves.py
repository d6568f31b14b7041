"""Curves for the page that lets one pick them: thinned to a budget, as JSON that is safe inside HTML.

Shape key: P points, G heads.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from attnscope.report.contents import Contents
from attnscope.report.series import Floats, distinct, head_keys, head_label, heat_of
from attnscope.runs.by_member import rows_of_member
from attnscope.runs.layout import COLUMNS, to_json
from attnscope.runs.tables import RunTables

PER_STEP = ("loss", "grad_norm")
PER_HEAD = ("entropy_ratio", "max_prob", "max_logit", "softmax_gain", "logit_std")
LOGARITHMIC = {"loss", "grad_norm", "max_logit", "logit_std"}
NUMBERS = 150_000  # in all; about a megabyte
MOST_POINTS, FEWEST_POINTS = 200, 24  # of a curve
MOST_MEMBERS = 64
MOST_HEADS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Curves:
    """What the page can draw.

    Attributes:
        json: for a script element; has no < in it.
        caption: what was left out.
    """

    json: str
    caption: str


def curves_of(tables: RunTables, contents: Contents) -> Curves | None:
    """Thin the curves of as many members as fit; None where nothing was recorded."""
    if not len(tables.steps):
        return None
    keys_N = head_keys(tables.heads)
    known = distinct(keys_N)
    heads = known[:MOST_HEADS]
    numbers_per_point = len(PER_STEP) + len(PER_HEAD) * len(heads)
    most = max(1, min(MOST_MEMBERS, NUMBERS // (numbers_per_point * FEWEST_POINTS)))
    indices = np.unique(np.linspace(0, len(contents.members) - 1, most).round().astype(int)).tolist()
    points = max(FEWEST_POINTS, min(MOST_POINTS, NUMBERS // (numbers_per_point * len(indices))))
    members = [contents.members[index] for index in indices]
    steps, head_steps = [], []
    curves: dict[str, list[object]] = {name: [] for name in (*PER_STEP, *PER_HEAD)}
    for member in members:
        rows_N = rows_of_member(tables.steps, member.name)
        at: list[float] = []
        for name in PER_STEP:
            binned = heat_of(tables.steps, rows_N, name, np.zeros(len(rows_N), np.int64), cells=points)
            at = _middles(binned[1]) if binned else []
            curves[name].append(_rounded(binned[2][0]) if binned else [])
        steps.append(at)
        rows_N = rows_of_member(tables.heads, member.name)
        if len(known) > len(heads):
            rows_N = rows_N[keys_N[rows_N] <= heads[-1]]
        at = []
        for name in PER_HEAD:
            binned = heat_of(tables.heads, rows_N, name, keys_N[rows_N], cells=points)
            at = _middles(binned[1]) if binned else []
            by_key = dict(zip(binned[0], binned[2], strict=True)) if binned else {}
            curves[name].append([_rounded(by_key[key]) if key in by_key else [] for key in heads])
        head_steps.append(at)
    units = {
        name: COLUMNS[table][name].unit for table, names in (("steps", PER_STEP), ("heads", PER_HEAD)) for name in names
    }
    data = {
        "members": [{"name": member.name, "status": member.status} for member in members],
        "heads": [head_label(key) for key in heads],
        "quantities": [
            {"name": name, "unit": units[name], "log": name in LOGARITHMIC, "per_head": name in PER_HEAD}
            for name in curves
        ],
        "steps": steps,
        "head_steps": head_steps,
        "curves": list(curves.values()),
    }
    left_out = len(contents.members) - len(members)
    said = f"Each point is a mean over steps; at most {points} points per curve. The tables of the run have every step."
    if left_out:
        said = f"{len(members)} of {len(contents.members)} members, at equal distances. {said}"
    return Curves(json=to_json(data).replace("<", "\\u003c"), caption=said)


def _middles(edges: Floats) -> list[float]:
    return [float(f"{value:.6g}") for value in (edges[:-1] + edges[1:] - 1) / 2]


def _rounded(values: Floats) -> Sequence[float | None]:
    return [float(f"{value:.4g}") if np.isfinite(value) else None for value in values]
