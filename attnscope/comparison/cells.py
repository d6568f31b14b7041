"""Members side by side: cells of a sweep, or members of any runs; only what differs, then what became of it.

Members that differ in nothing but their seed are a cell. Two cells are compared in pairs of members that share seed and
data, so that luck which both have cancels.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from attnscope.comparison.learning_rates import LrArm, lr_arms
from attnscope.comparison.statistics import mean_interval
from attnscope.comparison.subjects import ENDED, Cell, Subject, shown
from attnscope.config import SEED, short_names
from attnscope.errors import RunError
from attnscope.runs.reader import Run

CLIP, CLIP_MODE = "clip.threshold", "clip.mode"


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """A cell against the baseline, over the pairs that share seed and data.

    Attributes:
        cell: its name.
        pairs: how many.
        mean: of loss minus the baseline's loss, nats per token; below 0 is better.
        interval: of the mean; None with too few pairs.
        low: smallest difference.
        high: largest.
    """

    cell: str
    pairs: int
    mean: float
    interval: tuple[float, float] | None
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SingleChange:
    """What one setting alone does to the baseline: `effect` is one of EFFECTS."""

    setting: str
    value: str
    cell: Cell
    effect: str


# Of a single change, on a baseline that does not train: which of these the outcome is.
EFFECTS = {
    "rescues": "every member trains",
    "hides": "nothing diverges any more, but not every member learns: final losses above the unigram loss",
    "helps": "fewer members diverge or more train, not all do",
    "does not help": "no fewer members diverge, and no more train",
    "stalls": "the baseline trains; with the change members end above the unigram loss",
    "breaks": "with the change members diverge that did not",
    "keeps": "the baseline trains, and so does every member with the change",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Everything that a comparison says.

    Attributes:
        axes: the settings that differ, besides the seed, to their values in order.
        cells: in the order in which their first members come.
        baseline: the cell that others are compared with; None where there is only one.
        differences: of the other cells that share seeds and data with it.
        changes: of the cells that differ from the baseline in one setting.
        lr_arms: where learning rates differ.
    """

    axes: Mapping[str, tuple[str, ...]]
    cells: tuple[Cell, ...]
    baseline: Cell | None
    differences: tuple[Difference, ...]
    changes: tuple[SingleChange, ...]
    lr_arms: tuple[LrArm, ...]


def compare(subjects: Sequence[Subject], *, baseline: Mapping[str, str] | None = None) -> Comparison:
    """Put members side by side.

    Args:
        subjects: one or more.
        baseline: settings of the cell that others are compared with; what it leaves open is as in the first cell that
            fits. None = the first cell.
    """
    axes = _axes(subjects)
    cells = _cells(subjects, axes)
    chosen = _baseline(cells, baseline or {})
    return Comparison(
        axes=axes,
        cells=cells,
        baseline=chosen,
        differences=tuple(
            difference
            for cell in cells
            if chosen is not None and cell is not chosen and (difference := _difference(cell, chosen)) is not None
        ),
        changes=_single_changes(cells, chosen),
        lr_arms=lr_arms(cells, axes),
    )


def baseline_of(run: Run) -> dict[str, str] | None:
    """The baseline that a run's own sweep names; None where it has no sweep, or none that can be understood."""
    try:
        sweep = run.config.sweep
    except RunError:
        return None
    return {key: shown(value) for key, value in sweep.baseline.items()} if sweep else None


def _axes(subjects: Sequence[Subject]) -> dict[str, tuple[str, ...]]:
    keys = dict.fromkeys(key for subject in subjects for key in subject.settings)
    axes = {}
    for key in keys:
        if key == SEED:
            continue
        values = dict.fromkeys(subject.settings.get(key, "-") for subject in subjects)
        if len(values) > 1:
            numbers = {s.settings.get(key, "-"): s.numbers.get(key, -math.inf) for s in subjects}
            axes[key] = tuple(sorted(values, key=lambda value: numbers[value]))
    return axes


def _cells(subjects: Sequence[Subject], axes: Mapping[str, Sequence[str]]) -> tuple[Cell, ...]:
    grouped: dict[tuple[str, ...], list[Subject]] = {}
    for subject in subjects:
        values = tuple(subject.settings.get(key, "-") for key in axes)
        grouped.setdefault(values, []).append(subject)
    words = short_names(axes)
    cells = []
    for values, group in grouped.items():
        named = [f"{words[key]}={value}" for key, value in zip(axes, values, strict=True)]
        cells.append(
            Cell(
                name=" ".join(named) or group[0].row.name,
                settings=dict(zip(axes, values, strict=True)),
                subjects=tuple(group),
            )
        )
    return tuple(cells)


def _baseline(cells: Sequence[Cell], wanted: Mapping[str, str]) -> Cell | None:
    if len(cells) < 2:
        return None
    for cell in cells:
        if all(cell.settings.get(key, value) == value for key, value in wanted.items()):
            return cell
    return cells[0]


def _difference(cell: Cell, baseline: Cell) -> Difference | None:
    others = {(s.seed, s.data): s.loss for s in baseline.subjects}
    differences = []
    for subject in cell.subjects:
        other = others.get((subject.seed, subject.data))
        if subject.loss is not None and other is not None:
            differences.append(subject.loss - other)
    if not differences:
        return None
    return Difference(
        cell=cell.name,
        pairs=len(differences),
        mean=sum(differences) / len(differences),
        interval=mean_interval(differences),
        low=min(differences),
        high=max(differences),
    )


def _single_changes(cells: Sequence[Cell], baseline: Cell | None) -> tuple[SingleChange, ...]:
    if baseline is None:
        return ()
    changes = []
    for cell in cells:
        changed = [key for key, value in cell.settings.items() if baseline.settings[key] != value]
        value = cell.settings[changed[0]] if changed else ""
        if set(changed) == {CLIP_MODE, CLIP} and "none" in (cell.settings[CLIP], baseline.settings[CLIP]):
            # One of the two does not clip: its mode means nothing, and clipping at all is the one change.
            changed, value = [CLIP], f"{cell.settings[CLIP_MODE]} {cell.settings[CLIP]}"
        if len(changed) == 1:
            effect = effect_of(cell, baseline)
            changes.append(SingleChange(setting=changed[0], value=value, cell=cell, effect=effect))
    order = list(baseline.settings)
    return tuple(sorted(changes, key=lambda change: order.index(change.setting)))


def effect_of(cell: Cell, baseline: Cell) -> str:
    """Which of EFFECTS it is; "unknown" where members are still being trained or were stopped."""
    before, after = baseline.outcomes, cell.outcomes
    if set(before) - set(ENDED) or set(after) - set(ENDED):
        return "unknown"
    share_before = before["diverged"] / before.total()
    share_after = after["diverged"] / after.total()
    if set(before) == {"trained"}:
        return "breaks" if share_after else "stalls" if after["stalled"] else "keeps"
    if set(after) == {"trained"}:
        return "rescues"
    if share_before and not share_after:
        return "hides"
    if share_after > share_before:
        return "breaks"
    more_train = after["trained"] / after.total() > before["trained"] / before.total()
    return "helps" if more_train or share_after < share_before else "does not help"
