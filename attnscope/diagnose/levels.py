"""Levels that a loss is compared with, member by member: guessing, token frequencies, the best that the data allow.

Shape key: S steps of a member, M member in the order of run.json.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from attnscope.runs.by_member import diverged_at, slices_of, sorted_by_member
from attnscope.runs.reader import Run
from attnscope.runs.watched import CrossEntropy, cross_entropies

NO_CLASSES = "no cross-entropy of class indices was seen"
NOT_THE_LOSS = "the loss is not the cross-entropy that was seen"
# Of the cross-entropy: by more, the loss of a step is something else, a sum or one with more terms. Micro-batches differ by less.
STRANGE = 0.2

FROM_SCRATCH = 0.7  # of ln(classes): the cross-entropy of a model that was trained before begins below

_Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Levels:
    """What a member's loss is compared with, nats; None = unknown.

    Attributes:
        guessing: every class is as likely as any other.
        unigram: predicting from the frequencies of the targets alone.
        optimum: the best loss that any model can have.
    """

    guessing: float | None = None
    unigram: float | None = None
    optimum: float | None = None


def levels_of(run: Run) -> dict[str, Levels]:
    """Of each member of which they are known: its data tell, or the first targets of a watched script."""
    if run.kind == "watch":
        return {
            name: Levels(guessing=math.log(seen.classes), unigram=seen.entropy)
            for name, seen in cross_entropies(run).items()
        }
    found = {}
    for entry in run.entries:
        reference = run.data_of(entry.part).get("reference")
        numbers = {key: value for key, value in _items(reference) if isinstance(value, float) and math.isfinite(value)}
        if numbers:
            found[entry.name] = Levels(
                guessing=numbers.get("uniform"), unigram=numbers.get("unigram"), optimum=numbers.get("optimum")
            )
    return found


def without_levels(run: Run) -> dict[str, str]:
    """Members of which no level is known."""
    known = levels_of(run)
    why = NO_CLASSES if run.kind == "watch" else "the reference losses of the data are unknown"
    return {entry.name: why for entry in run.entries if entry.name not in known}


def losses_before(run: Run) -> Iterator[tuple[int, NDArray[np.int64], _Floats]]:
    """Member, steps and finite losses of each that has any, (S,), before it diverged."""
    codes_N, step_N, loss_N = sorted_by_member(run.steps, ("step", "loss"))
    keep_N = np.isfinite(loss_N) & (step_N < diverged_at(run)[codes_N])
    codes_N, step_N, loss_N = codes_N[keep_N], step_N[keep_N], loss_N[keep_N].astype(np.float64)
    for m, rows in enumerate(slices_of(codes_N, len(run.entries))):
        if rows.start < rows.stop:
            yield m, step_N[rows].astype(np.int64), loss_N[rows]


def untrained_in(run: Run) -> set[str]:
    """Members of a watched script whose model was not trained before, as far as its first cross-entropy tells."""
    return {name for name, seen in cross_entropies(run).items() if seen.loss > FROM_SCRATCH * math.log(seen.classes)}


def is_about(loss: float, seen: CrossEntropy) -> bool:
    """Whether the loss of a step is the cross-entropy that was seen in it."""
    return abs(loss - seen.loss) <= STRANGE * seen.loss


def _items(table: object) -> list[tuple[object, object]]:
    return list(table.items()) if isinstance(table, dict) else []
