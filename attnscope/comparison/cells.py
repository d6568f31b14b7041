"""Members side by side: cells of a sweep, or members of any runs; only what differs, then what became of it.

Members that differ in nothing but their seed are a cell. Two cells are compared in pairs of members that share seed and
data, so that luck which both have cancels.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from attnscope.comparison.member import MemberRow
from attnscope.comparison.statistics import capped_loss, lr_sensitivity, mean_interval
from attnscope.config import SEED, SETTINGS, get_setting, short_names, value_text
from attnscope.errors import RunError
from attnscope.runs.foreign import printable
from attnscope.runs.layout import to_json
from attnscope.runs.reader import Run

LR = "optimizer.lr"
CLIP, CLIP_MODE = "clip.threshold", "clip.mode"
BATCHES = (
    "data.seed",
    "data.batch_size",
    "data.objective",
    "model.seq_len",
)  # what batches hang on
ENDED = ("trained", "stalled", "diverged")


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A member to compare.

    Attributes:
        run: name of its run.
        row: what the report says of it.
        settings: setting to value, as texts fit to show, for every setting.
        numbers: setting to value where that is a number, to sort and to draw by.
        seed: train.seed as text.
        data: fingerprint of what it was trained on and in which order; equal for equal batches.
    """

    run: str
    row: MemberRow
    settings: Mapping[str, str]
    numbers: Mapping[str, float]
    seed: str
    data: str

    @property
    def loss(self) -> float | None:
        """Final loss, or the first where that is lower or there is no other; nats per token."""
        return capped_loss(self.row.first_loss, self.row.final_loss)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """Members that differ in nothing but their seed.

    Attributes:
        name: the values that tell it from others.
        settings: the differing settings and their values.
        subjects: at least one.
    """

    name: str
    settings: Mapping[str, str]
    subjects: tuple[Subject, ...]

    @property
    def outcomes(self) -> Counter[str]:
        """Status to number of members."""
        return Counter(subject.row.status for subject in self.subjects)

    @property
    def outcome(self) -> str:
        """trained, stalled, diverged or another status where all agree, else mixed."""
        return next(iter(self.outcomes)) if len(self.outcomes) == 1 else "mixed"

    @property
    def final_losses(self) -> tuple[float, ...]:
        """Of the members that did not diverge."""
        losses = [s.row.final_loss for s in self.subjects if s.row.status != "diverged"]
        return tuple(loss for loss in losses if loss is not None and math.isfinite(loss))

    @property
    def diverged_at(self) -> tuple[int, ...]:
        """Steps at which members diverged, ascending."""
        steps = [s.row.step for s in self.subjects if s.row.status == "diverged"]
        return tuple(sorted(step for step in steps if step is not None))


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
class LrArm:
    """One arm over its learning rates.

    Attributes:
        name: the values that tell it from other arms.
        cells: learning rate to cell, ascending.
        stable: the largest learning rate with which all members ended and up to which none diverged; None if there is none.
        bracket: the next larger one, where members do diverge; None if none did.
        best: the learning rate with the lowest mean loss.
        sensitivity: `lr_sensitivity`, mean over seeds.
        interval: of that mean.
    """

    name: str
    cells: tuple[tuple[float, Cell], ...]
    stable: float | None
    bracket: float | None
    best: float | None
    sensitivity: float | None
    interval: tuple[float, float] | None


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


def subjects_of(run: Run, rows: Sequence[MemberRow]) -> tuple[Subject, ...]:
    """The members of a run, with all their settings."""
    try:
        base = {key: get_setting(run.config, key) for key in SETTINGS}
    except RunError:
        base = {}  # of a later version: only what run.json says of each member
    found = []
    for member, row in zip(run.members, rows, strict=True):
        settings = {**base, **{key: member.settings[key] for key in member.settings}}
        found.append(
            Subject(
                run=run.name,
                row=row,
                settings={printable(key, 60): _shown(value) for key, value in settings.items()},
                numbers={
                    key: float(value)
                    for key, value in settings.items()
                    if isinstance(value, int | float) and not isinstance(value, bool)
                },
                seed=_shown(settings.get(SEED)),
                data=to_json(
                    [
                        _fingerprint(run, member.part),
                        *(_shown(settings.get(key)) for key in BATCHES),
                    ]
                ),
            )
        )
    return tuple(found)


def compare(
    subjects: Sequence[Subject], *, baseline: Mapping[str, str] | None = None
) -> Comparison:
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
            if chosen is not None
            and cell is not chosen
            and (difference := _difference(cell, chosen)) is not None
        ),
        changes=_single_changes(cells, chosen),
        lr_arms=_lr_arms(cells, axes),
    )


def baseline_of(run: Run) -> dict[str, str] | None:
    """The baseline that a run's own sweep names; None where it has no sweep, or none that can be understood."""
    try:
        sweep = run.config.sweep
    except RunError:
        return None
    return {key: _shown(value) for key, value in sweep.baseline.items()} if sweep else None


def outcome_text(cell: Cell) -> str:
    """3 trained, or 2 trained, 1 diverged."""
    known = [status for status in ENDED if status in cell.outcomes]
    others = sorted(set(cell.outcomes) - set(ENDED))
    return ", ".join(f"{cell.outcomes[status]} {status}" for status in [*known, *others])


def _axes(subjects: Sequence[Subject]) -> dict[str, tuple[str, ...]]:
    keys = dict.fromkeys(key for subject in subjects for key in subject.settings)
    found = {}
    for key in keys:
        if key == SEED:
            continue
        values = dict.fromkeys(subject.settings.get(key, "-") for subject in subjects)
        if len(values) > 1:
            numbers = {s.settings.get(key, "-"): s.numbers.get(key, -math.inf) for s in subjects}
            found[key] = tuple(sorted(values, key=lambda value: numbers[value]))
    return found


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
    found = []
    for subject in cell.subjects:
        other = others.get((subject.seed, subject.data))
        if subject.loss is not None and other is not None:
            found.append(subject.loss - other)
    if not found:
        return None
    return Difference(
        cell=cell.name,
        pairs=len(found),
        mean=sum(found) / len(found),
        interval=mean_interval(found),
        low=min(found),
        high=max(found),
    )


def _single_changes(cells: Sequence[Cell], baseline: Cell | None) -> tuple[SingleChange, ...]:
    if baseline is None:
        return ()
    found = []
    for cell in cells:
        changed = [key for key, value in cell.settings.items() if baseline.settings[key] != value]
        value = cell.settings[changed[0]] if changed else ""
        if set(changed) == {CLIP_MODE, CLIP} and "none" in (
            cell.settings[CLIP],
            baseline.settings[CLIP],
        ):
            # One of the two does not clip: its mode means nothing, and clipping at all is the one change.
            changed, value = [CLIP], f"{cell.settings[CLIP_MODE]} {cell.settings[CLIP]}"
        if len(changed) == 1:
            effect = effect_of(cell, baseline)
            found.append(SingleChange(setting=changed[0], value=value, cell=cell, effect=effect))
    order = list(baseline.settings)
    return tuple(sorted(found, key=lambda change: order.index(change.setting)))


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


def _lr_arms(cells: Sequence[Cell], axes: Mapping[str, Sequence[str]]) -> tuple[LrArm, ...]:
    if LR not in axes:
        return ()
    others = [key for key in axes if key != LR]
    words = short_names(axes)
    grouped: dict[tuple[str, ...], dict[float, Cell]] = {}
    for cell in cells:
        lr = cell.subjects[0].numbers.get(LR)
        if lr is not None:
            grouped.setdefault(tuple(cell.settings[key] for key in others), {})[lr] = cell
    arms = []
    for values, found in grouped.items():
        if len(found) < 2:
            continue
        by_lr = sorted(found.items())
        broken = [lr for lr, cell in by_lr if cell.outcomes["diverged"]]
        bracket = broken[0] if broken else None
        # Nothing is known of a cell whose members were stopped before they were done.
        known = [lr for lr, cell in by_lr if not set(cell.outcomes) - set(ENDED)]
        below = [lr for lr in known if bracket is None or lr < bracket]
        per_seed = _sensitivities(by_lr)
        means = {lr: mean for lr, cell in by_lr if (mean := _mean_loss(cell)) is not None}
        named = [f"{words[key]}={value}" for key, value in zip(others, values, strict=True)]
        arms.append(
            LrArm(
                name=" ".join(named) or "all",
                cells=tuple(by_lr),
                stable=below[-1] if below else None,
                bracket=bracket,
                best=min(means, key=lambda lr: means[lr]) if means else None,
                sensitivity=sum(per_seed) / len(per_seed) if per_seed else None,
                interval=mean_interval(per_seed),
            )
        )
    return tuple(arms)


def _sensitivities(by_lr: Sequence[tuple[float, Cell]]) -> list[float]:
    """LR sensitivity of each seed that was trained at every learning rate."""
    losses: dict[tuple[str, str], list[float]] = {}
    for _, cell in by_lr:
        for subject in cell.subjects:
            if subject.loss is not None:
                losses.setdefault((subject.seed, subject.data), []).append(subject.loss)
    found = [lr_sensitivity(each) for each in losses.values() if len(each) == len(by_lr)]
    return [value for value in found if value is not None]


def _mean_loss(cell: Cell) -> float | None:
    losses = [subject.loss for subject in cell.subjects if subject.loss is not None]
    return sum(losses) / len(losses) if losses else None


def _fingerprint(run: Run, part: int) -> object:
    parts = run.data.get("parts")
    other = parts.get(str(part)) if isinstance(parts, dict) else None
    return other.get("fingerprint") if isinstance(other, dict) else run.data.get("fingerprint")


def _shown(value: object) -> str:
    return "-" if value is None else printable(value_text(value), 60)
