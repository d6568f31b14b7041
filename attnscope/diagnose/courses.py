"""Courses of what was recorded per layer, head or parameter group: one after the other, each over its own steps.

What is recorded after a member diverged is left out.

Shape key: N rows of all courses, C course, R rows of a table.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from attnscope.runs.by_member import NEVER, diverged_at, members_of_rows
from attnscope.runs.reader import Run

if TYPE_CHECKING:
    import pandas as pd

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

FEWEST_RECORDS = 5  # at the end of a course: what holds in most of so many is no accident of one batch
FEWEST_RECORDS_IN_ALL = 2 * FEWEST_RECORDS  # to see a course at all: the end is another half than the beginning
END_SHARE = 5  # the end of a course is its last fifth, and at least FEWEST_RECORDS
FOR_GOOD = 0.9  # share of the records from a step on that decides since when something holds


@dataclass(frozen=True, slots=True, kw_only=True)
class Courses:
    """Columns of a table along the steps of each course; in the order of member, layer and head or group.

    Attributes:
        member_C: position of the member in run.json.
        layer_C: counted from 0.
        head_C: counted from 0; 0 where a course is a layer's.
        start_C: first row.
        end_C: behind the last row.
        step_N: ascending within a course.
        columns: name to (N,).
    """

    member_C: Ints
    layer_C: Ints
    head_C: Ints
    start_C: Ints
    end_C: Ints
    step_N: Ints
    columns: Mapping[str, Floats]

    def rows(self, course: int) -> slice:
        """Where the rows of a course are."""
        return slice(int(self.start_C[course]), int(self.end_C[course]))

    @property
    def course_N(self) -> Ints:
        """The course of each row."""
        return np.repeat(np.arange(len(self.start_C)), self.end_C - self.start_C)

    @property
    def is_end_N(self) -> NDArray[np.bool_]:
        """Whether each row is of the end of its course."""
        n_C = self.end_C - self.start_C
        kept_C = np.maximum(-(-n_C // END_SHARE), FEWEST_RECORDS)
        is_end_N: NDArray[np.bool_] = np.arange(len(self.step_N)) >= np.repeat(self.end_C - kept_C, n_C)
        return is_end_N

    def plus(self, **columns: Floats) -> "Courses":
        """The same with more columns."""
        return replace(self, columns={**self.columns, **columns})

    def first(self, column: str) -> Floats:
        """The first number of each course, (C,); NaN where there is none."""
        values_N = self.columns[column]
        sound = np.append(np.flatnonzero(~np.isnan(values_N)), len(values_N))
        at_C = sound[np.searchsorted(sound, self.start_C)]
        at_C = np.where(at_C < self.end_C, at_C, len(values_N))
        first_C: Floats = np.append(values_N, np.nan)[at_C]
        return first_C

    def share_at_end(self, is_N: NDArray[np.bool_]) -> Floats:
        """Of the rows at the end of each course, the share of which this is true, (C,)."""
        n_C = self.end_C - self.start_C
        begin_C = self.end_C - np.minimum(np.maximum(-(-n_C // END_SHARE), FEWEST_RECORDS), n_C)
        ends = zip(begin_C.tolist(), self.end_C.tolist(), strict=True)
        counts_C = np.array([np.count_nonzero(is_N[begin:end]) for begin, end in ends], dtype=np.float64)
        share_C: Floats = counts_C / np.maximum(self.end_C - begin_C, 1)
        return share_C

    def end_median(self, course: int, column: str) -> float:
        """Median of a column at the end of a course; NaN where it has no number there."""
        rows = self.rows(course)
        values = self.columns[column][rows][self._end_of(course)]
        values = values[~np.isnan(values)]
        return float(np.median(values)) if len(values) else float("nan")

    def since(self, course: int, is_N: NDArray[np.bool_]) -> int | None:
        """Since when something holds for good in a course: the row from which on FOR_GOOD of them have it; None = never."""
        rows = self.rows(course)
        is_S = is_N[rows].astype(np.float64)
        share_S = np.cumsum(is_S[::-1])[::-1] / np.arange(len(is_S), 0, -1)
        held = np.flatnonzero((is_S > 0) & (share_S >= FOR_GOOD))
        return int(rows.start + held[0]) if len(held) else None

    def step_since(self, course: int, is_N: NDArray[np.bool_]) -> int:
        """The step since when something holds for good in a course; its last one if it never does."""
        row = self.since(course, is_N)
        return int(self.step_N[int(self.end_C[course]) - 1 if row is None else row])

    def _end_of(self, course: int) -> slice:
        n = int(self.end_C[course] - self.start_C[course])
        return slice(max(0, n - max(-(-n // END_SHARE), FEWEST_RECORDS)), n)


def layer_courses(run: Run, *, mean: Sequence[str] = (), largest: Sequence[str] = ()) -> Courses:
    """A course for each layer of each member, over the heads that have a number.

    Args:
        run: whose heads table.
        mean: columns of which the mean over heads is wanted.
        largest: columns of which the largest over heads is wanted, as `largest entropy_ratio`.
    """
    order = _order_of(run, by_head=False)
    reduced = {}
    for name in dict.fromkeys((*mean, *largest)):  # one after the other: a long run has no room for all
        values_R = order.of(run.heads[name])
        if name in mean:
            reduced[name] = _mean(values_R, order.first)
        if name in largest:
            reduced[f"largest {name}"] = largest_of(values_R, order.first)
    return replace(order.courses, columns=reduced)


def head_courses(run: Run, columns: Sequence[str], *, members: Collection[int] | None = None) -> Courses:
    """A course for each head.

    Args:
        run: whose heads table.
        columns: that are wanted.
        members: positions of those that are wanted; None = all.
    """
    order = _order_of(run, by_head=True, members=members)
    return replace(order.courses, columns={name: order.of(run.heads[name]) for name in columns})


def group_courses(run: Run, column: str, groups: Mapping[str, str]) -> Courses:
    """A course for each layer of each member, of one column of the params table.

    Args:
        run: whose params table.
        column: that is wanted.
        groups: of the table, to what they are called as columns of the course; a row has NaN where one is missing.
    """
    params = run.params
    names = list(dict.fromkeys(groups.values()))
    called = [names.index(groups[each]) if each in groups else -1 for each in params["group"].cat.categories]
    called_R = np.array([*called, -1], dtype=np.int64)[params["group"].cat.codes.to_numpy()]
    kept = np.flatnonzero(_before_divergence(run, params) & (called_R >= 0))
    called_R, codes_R, step_R, layer_R = (
        x_R[kept] for x_R in (called_R, members_of_rows(params), params["step"].to_numpy(), params["layer"].to_numpy())
    )
    order = order_of_rows(step_R, codes_R, layer_R)
    called_R, codes_R, step_R, layer_R = (x_R[order] for x_R in (called_R, codes_R, step_R, layer_R))
    values_R = params[column].to_numpy()[kept[order]].astype(np.float64)
    first = changes_in(codes_R, layer_R, step_R)
    row_R = np.repeat(np.arange(len(first)), np.diff(np.append(first, len(order))))
    columns = {}
    for at, name in enumerate(names):
        columns[name] = np.full(len(first), np.nan)
        mine = called_R == at
        columns[name][row_R[mine]] = values_R[mine]
    codes_N, layer_N, step_N = (x_R[first] for x_R in (codes_R, layer_R, step_R))
    return _courses(codes_N, layer_N, np.zeros(len(first), dtype=np.int64), step_N, columns)


def step_courses(run: Run, column: str) -> Courses:
    """A course for each member, of one column of the steps table, where it has a number."""
    steps = run.steps
    codes_R, step_R = members_of_rows(steps), steps["step"].to_numpy().astype(np.int64)
    values_R = steps[column].to_numpy().astype(np.float64)
    kept = np.flatnonzero((step_R < diverged_at(run)[codes_R]) & ~np.isnan(values_R))
    kept = kept[np.lexsort((step_R[kept], codes_R[kept]))]
    nowhere = np.zeros(len(kept), dtype=np.int64)
    return _courses(codes_R[kept], nowhere, nowhere, step_R[kept], {column: values_R[kept]})


def courses_by_member(courses: Courses, concerned: Ints) -> Iterator[tuple[int, list[int]]]:
    """Position of each member that has one of these courses, and those it has."""
    mine: dict[int, list[int]] = {}
    for course in concerned.tolist():
        mine.setdefault(int(courses.member_C[course]), []).append(course)
    yield from mine.items()


def too_short(run: Run, courses: Courses, *, what: str = "attention") -> dict[str, str]:
    """Members with too few records before divergence to see a course."""
    records_M = np.zeros(len(run.entries), dtype=np.int64)
    np.maximum.at(records_M, courses.member_C, courses.end_C - courses.start_C)
    why = f"{what} was measured at fewer than {FEWEST_RECORDS_IN_ALL} steps before divergence"
    return {
        entry.name: why
        for entry, records in zip(run.entries, records_M, strict=True)
        if records < FEWEST_RECORDS_IN_ALL
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class _Order:
    """Where the rows of the heads table go in courses.

    Attributes:
        row_R: of the table, those before divergence, in the order of courses; None where `place_CH` says it.
        place_CH: where the heads of each course stand among those of a step, if each step has the same.
        first: where along R each row of a course begins: all heads of a layer are one; empty where each row is a head's.
        courses: without columns.
    """

    row_R: NDArray[np.int32] | None
    place_CH: Ints | None
    first: Ints
    courses: Courses

    def of(self, column: "pd.Series[Any]") -> Floats:
        """A column of the table in this order."""
        values_R: NDArray[Any] = column.to_numpy()
        if self.place_CH is None:
            in_order_R: Floats = values_R[self.row_R].astype(np.float64)
            return in_order_R
        n_courses, n_heads = self.place_CH.shape
        values_SP = values_R.reshape(-1, self.place_CH.size)
        values_CSH = np.empty((n_courses, len(values_SP), n_heads))
        for c, place_H in enumerate(self.place_CH):
            values_CSH[c] = values_SP[:, place_H]
        return values_CSH.reshape(-1)


_known: "WeakKeyDictionary[Run, dict[bool, _Order]]" = WeakKeyDictionary()  # several rules ask for the same


def _order_of(run: Run, *, by_head: bool, members: Collection[int] | None = None) -> _Order:
    """The order of courses: one for each head, or for each layer; of all members, or of some."""
    if members is not None:
        return _new_order(run, by_head=by_head, members=members)
    known = _known.setdefault(run, {})
    if by_head not in known:
        known[by_head] = _new_order(run, by_head=by_head)
    return known[by_head]


def _new_order(run: Run, *, by_head: bool, members: Collection[int] | None = None) -> _Order:
    heads = run.heads
    codes_R, is_kept_R = heads["member"].cat.codes.to_numpy(), _before_divergence(run, heads)
    if members is not None:
        is_kept_R &= np.isin(codes_R, list(members))
    row_R = np.flatnonzero(is_kept_R).astype(np.int32)
    step_R, layer_R, head_R = (heads[name].to_numpy() for name in ("step", "layer", "head"))
    keys = (codes_R, layer_R, *((head_R,) if by_head else ()))
    row_R = row_R[order_of_rows(step_R[row_R], *(key_R[row_R] for key_R in keys))]
    step_R = step_R[row_R]
    if by_head:
        first, row_N, step_N = np.empty(0, dtype=np.int64), row_R, step_R
    else:
        first = changes_in(codes_R[row_R], layer_R[row_R], step_R)
        row_N, step_N = row_R[first], step_R[first]
    codes_N, layer_N, head_N = (x_R[row_N] for x_R in (codes_R, layer_R, head_R))
    courses = _courses(codes_N, layer_N, head_N if by_head else np.zeros_like(head_N), step_N, {})
    place_CH = _places_in(row_R, len(courses.start_C)) if len(row_R) == len(heads) else None
    return _Order(row_R=row_R if place_CH is None else None, place_CH=place_CH, first=first, courses=courses)


def _places_in(row_R: NDArray[np.int32], n_courses: int) -> Ints | None:
    """Where the heads of each course stand in every step, (C, H); None where that is not the same in all of them."""
    if not n_courses or len(row_R) % n_courses:
        return None
    row_CR = row_R.reshape(n_courses, -1)
    n_heads = max(1, int(np.argmax(np.diff(row_CR[0], append=-1) > n_courses)) + 1) if len(row_CR[0]) > 1 else 1
    for size in dict.fromkeys((1, n_heads)):
        if row_CR.shape[1] % size:
            continue
        row_CSH = row_CR.reshape(n_courses, -1, size)
        place_CH = row_CSH[:, 0]
        steps_S1 = np.arange(row_CSH.shape[1], dtype=np.int32)[:, None] * place_CH.size
        if all((row_SH == place_H + steps_S1).all() for row_SH, place_H in zip(row_CSH, place_CH, strict=True)):
            return place_CH.astype(np.int64)
    return None


def _before_divergence(run: Run, table: "pd.DataFrame") -> NDArray[np.bool_]:
    """Which rows were recorded before their member diverged."""
    end_M = diverged_at(run)
    if (end_M == NEVER).all():
        return np.ones(len(table), dtype=bool)
    is_before_R: NDArray[np.bool_] = table["step"].to_numpy() < end_M[members_of_rows(table)]
    return is_before_R


def order_of_rows(step_R: NDArray[Any], *keys: NDArray[Any]) -> Ints:
    """By these keys, the first first, and the step. Tables are in the order of steps as a rule: then one sort will do."""
    key_R, n = np.zeros(len(step_R), dtype=np.int64), 1
    for each_R in keys:
        least, size = int(each_R.min(initial=0)), int(each_R.max(initial=0)) - int(each_R.min(initial=0)) + 1
        key_R *= size
        key_R += each_R
        key_R -= least
        n *= size
    if n <= 1 << 16:
        key_R = key_R.astype(np.uint16)  # sorted by counting
    order: Ints = np.argsort(key_R, kind="stable")
    if (step_R[1:] < step_R[:-1]).any():
        key_R, in_order_R = key_R[order], step_R[order]
        if ((key_R[1:] == key_R[:-1]) & (in_order_R[1:] < in_order_R[:-1])).any():
            order = order[np.lexsort((in_order_R, key_R))]
    return order


def _courses(
    member_N: NDArray[Any],
    layer_N: NDArray[Any],
    head_N: NDArray[Any],
    step_N: NDArray[Any],
    columns: Mapping[str, Floats],
) -> Courses:
    start_C = changes_in(member_N, layer_N, head_N)
    return Courses(
        member_C=member_N[start_C].astype(np.int64),
        layer_C=layer_N[start_C].astype(np.int64),
        head_C=head_N[start_C].astype(np.int64),
        start_C=start_C,
        end_C=np.append(start_C[1:], len(step_N)).astype(np.int64)[: len(start_C)],
        step_N=step_N.astype(np.int64),
        columns=columns,
    )


def changes_in(*keys: NDArray[Any]) -> Ints:
    """Where any of the keys is another than before, and 0."""
    if not len(keys[0]):
        return np.empty(0, dtype=np.int64)
    is_other = np.zeros(len(keys[0]) - 1, dtype=bool)
    for key_N in keys:
        is_other |= key_N[1:] != key_N[:-1]
    return np.append(0, np.flatnonzero(is_other) + 1).astype(np.int64)


def largest_of(x_R: Floats, first: Ints) -> Floats:
    """The largest number in each piece that begins at `first`; NaN where there is none."""
    if not len(first):
        return np.empty(0)
    largest: Floats = np.fmax.reduceat(x_R, first)
    return largest


def _mean(x_R: Floats, first: Ints) -> Floats:
    """Of what is a number in each piece that begins at `first`; NaN where nothing is."""
    if not len(first):
        return np.empty(0)
    sound_R = ~np.isnan(x_R)
    counts = np.add.reduceat(sound_R.astype(np.float64), first)
    with np.errstate(all="ignore"):
        means: Floats = np.add.reduceat(np.where(sound_R, x_R, 0.0), first) / counts
    return means
