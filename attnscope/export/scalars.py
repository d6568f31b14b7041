"""A run as named numbers by step, which is what trackers take.

    steps/loss  heads/layer 0/head 1/entropy  layers/layer 0/activation_rms  params/layer 0/q/grad_norm
    params/embedding/grad_norm

NaN and Inf are handed on as they are. Left out is what was not measured: `val_loss` where it was not evaluated, and
columns of a watched run in which there is no number at all.

Shape key: N rows of a member, C columns.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from math import isnan
from typing import TYPE_CHECKING

import numpy as np

from attnscope.export.folder import safe_names
from attnscope.runs.layout import COLUMNS, KEYS
from attnscope.runs.members import MemberRecord
from attnscope.runs.reader import Run
from attnscope.runs.streams import Array

if TYPE_CHECKING:
    import pandas as pd

VAL_LOSS = "steps/val_loss"
ALWAYS_MEASURED = "loss"
LONGEST_STEP_MS = 1e8  # more than a day: a number of somebody else's, which no calendar holds
TAG_LETTERS = " -_."  # what MLflow takes, the strictest of the trackers


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """What was recorded of a member at one step.

    Attributes:
        step: optimizer updates already done.
        seconds: since the epoch, when about it was: the run's begin and the time of all steps up to it.
        values: tag -> number.
    """

    step: int
    seconds: float
    values: dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class _MemberRows:
    """The rows of one table that belong to one member, by step; `tags` are those of each place in the model."""

    steps_N: Array
    places_N: Array
    tags: Sequence[tuple[str, ...]]
    values_NC: Array


def scalars_of(run: Run) -> Iterator[tuple[MemberRecord, Iterator[Moment]]]:
    """Every member of a part with its moments, ascending.

    Args:
        run: opened with one part (`attnscope.export.parts.by_part`).
    """
    frames: dict[str, pd.DataFrame] = {table: getattr(run, table) for table in COLUMNS}
    groups = safe_names(map(str, run.params["group"].cat.categories), letters=TAG_LETTERS)
    rows = {table: _rows_by_member(frame, len(run.members)) for table, frame in frames.items()}
    start = start_of(run)
    for number, member in enumerate(run.members):
        mine = {table: frame.iloc[rows[table][number]] for table, frame in frames.items()}
        pieces = [
            _piece(table, frame, list(groups.values()), watched=run.kind == "watch") for table, frame in mine.items()
        ]
        yield member, _moments(pieces, start, mine["steps"])


def start_of(run: Run) -> float:
    """When a run was created, in seconds since the epoch; 0 if it does not say so."""
    try:
        created = datetime.fromisoformat(run.created)
        return max(0.0, (created if created.tzinfo else created.replace(tzinfo=UTC)).timestamp())
    except (ValueError, OverflowError):
        return 0.0


def _rows_by_member(frame: "pd.DataFrame", n_members: int) -> list[Array]:
    """Positions of the rows of each member, by step."""
    codes = frame["member"].cat.codes.to_numpy()
    order = np.lexsort((frame["step"].to_numpy(), codes))
    return np.split(order, np.searchsorted(codes[order], np.arange(1, n_members)))


def _piece(table: str, frame: "pd.DataFrame", groups: Sequence[str], *, watched: bool) -> _MemberRows:
    keys = KEYS[table]
    columns = [name for name in COLUMNS[table] if name not in keys]
    values_NC = np.stack([frame[name].to_numpy(dtype=np.float64) for name in columns], axis=1)
    if watched:
        is_there = ~np.isnan(values_NC).all(axis=0)
        is_there |= np.array([name == ALWAYS_MEASURED for name in columns])
        columns = [name for name, there in zip(columns, is_there, strict=True) if there]
        values_NC = values_NC[:, is_there]
    where_NK = np.stack(
        [np.zeros(len(frame), dtype=np.int64)]
        + [(frame[key].cat.codes if key == "group" else frame[key]).to_numpy(dtype=np.int64) for key in keys[2:]],
        axis=1,
    )
    places, places_N = np.unique(where_NK, axis=0, return_inverse=True)
    prefixes = [
        "/".join([table, *_place(dict(zip(keys[2:], place[1:], strict=True)), groups)]) for place in places.tolist()
    ]
    return _MemberRows(
        steps_N=frame["step"].to_numpy(),
        places_N=places_N.reshape(-1),
        tags=[tuple(f"{prefix}/{name}" for name in columns) for prefix in prefixes],
        values_NC=values_NC,
    )


def _place(where: Mapping[str, int], groups: Sequence[str]) -> Iterator[str]:
    for key, number in where.items():
        if key == "group":
            yield groups[number]
        elif number != -1:  # what belongs to no layer
            yield f"{key} {number}"


def _moments(pieces: Sequence[_MemberRows], start: float, steps: "pd.DataFrame") -> Iterator[Moment]:
    steps_S = np.unique(np.concatenate([piece.steps_N for piece in pieces]))
    bounds = [
        (np.searchsorted(piece.steps_N, steps_S), np.searchsorted(piece.steps_N, steps_S, "right")) for piece in pieces
    ]
    seconds = start + _seconds_at(steps_S, steps)
    for at, step in enumerate(steps_S.tolist()):
        values: dict[str, float] = {}
        for piece, (lows, highs) in zip(pieces, bounds, strict=True):
            rows = slice(lows[at], highs[at])
            for place, row in zip(piece.places_N[rows].tolist(), piece.values_NC[rows].tolist(), strict=True):
                values.update(zip(piece.tags[place], row, strict=True))
        if isnan(values.get(VAL_LOSS, 0.0)):
            del values[VAL_LOSS]
        yield Moment(step=step, seconds=float(seconds[at]), values=values)


def _seconds_at(steps_S: Array, steps: "pd.DataFrame") -> Array:
    """What all steps up to these took."""
    if not len(steps):
        return np.zeros(len(steps_S))
    took = np.nan_to_num(steps["step_ms"].to_numpy(dtype=np.float64), posinf=0.0, neginf=0.0)
    passed = np.cumsum(np.clip(took, 0.0, LONGEST_STEP_MS)) / 1000
    return np.interp(steps_S, steps["step"].to_numpy(), passed)
