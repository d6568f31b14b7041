"""Arms over their learning rates: which one is stable, which one is best, and how much hangs on it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from attnscope.comparison.statistics import lr_sensitivity, mean_interval
from attnscope.comparison.subjects import ENDED, Cell
from attnscope.config import short_names

LR = "optimizer.lr"


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


def lr_arms(cells: Sequence[Cell], axes: Mapping[str, Sequence[str]]) -> tuple[LrArm, ...]:
    """An arm per combination of the other settings; none where learning rates do not differ."""
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
    for values, cell_of_lr in grouped.items():
        if len(cell_of_lr) < 2:
            continue
        by_lr = sorted(cell_of_lr.items())
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
    sensitivities = [lr_sensitivity(of_seed) for of_seed in losses.values() if len(of_seed) == len(by_lr)]
    return [value for value in sensitivities if value is not None]


def _mean_loss(cell: Cell) -> float | None:
    losses = [subject.loss for subject in cell.subjects if subject.loss is not None]
    return sum(losses) / len(losses) if losses else None
