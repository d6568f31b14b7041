"""How a member of a run ended: one definition, used while it trains and when it is read back.

diverged: a loss that is not finite, or 3 losses in a row that are at least twice the first loss.
stalled: all losses were recorded, but the final one is above the unigram loss: nothing learned from context.
trained: all losses were recorded, none of the above.
running, interrupted, killed: the run went no further; in this order, it still writes, it said so, it did not.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

TIMES_FIRST = 2.0
IN_A_ROW = 3
FINAL_STEPS = 20  # the final loss is the mean over so many last steps

NOT_FINITE = "not finite"
TOO_HIGH = "above twice the first loss"


class LossWatch:
    """Finds the step at which one member diverges, fed block by block.

    Invariant: the answer does not depend on how the losses are cut into blocks.
    """

    diverged_at: int | None
    why: str | None

    def __init__(self) -> None:
        self.diverged_at = None
        self.why = None
        self._first: float | None = None
        self._steps: NDArray[np.int64] = np.empty(0, dtype=np.int64)  # the last two, with losses
        self._losses: NDArray[np.float64] = np.empty(0)

    def feed(self, steps: ArrayLike, losses: ArrayLike) -> None:
        """Go on with the next losses, (S,) each; after divergence nothing changes any more."""
        if self.diverged_at is not None:
            return
        self._steps = np.concatenate([self._steps, np.asarray(steps, dtype=np.int64)])
        self._losses = np.concatenate([self._losses, np.asarray(losses, dtype=np.float64)])
        if not len(self._losses):
            return
        if self._first is None:
            self._first = float(self._losses[0])
        bad = np.flatnonzero(~np.isfinite(self._losses))
        # What comes after a loss that is not finite plays no part. A first loss of 0 has no double.
        seen = self._losses[: bad[0] + 1] if len(bad) else self._losses
        high = (seen >= TIMES_FIRST * self._first) & (self._first > 0)
        runs = np.flatnonzero(high[:-2] & high[1:-1] & high[2:])
        found = [(int(at[0]), why) for at, why in ((runs, TOO_HIGH), (bad, NOT_FINITE)) if len(at)]
        if found:
            at, self.why = min(found, key=lambda each: each[0])
            self.diverged_at = int(self._steps[at])
        self._steps, self._losses = self._steps[1 - IN_A_ROW :], self._losses[1 - IN_A_ROW :]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a member ended. Losses in nats per token; None where no step was recorded.

    Attributes:
        status: trained, diverged, stalled, running, interrupted or killed.
        diverged_at: the first step that shows it, None if it did not diverge.
        nonfinite_at: the first step whose loss is not finite.
        first_loss: of the first step recorded.
        best_loss: the smallest finite one.
        final_loss: mean over the last 20 steps recorded; NaN or Inf if one of them is.
        last_step: the last step recorded.
    """

    status: str
    diverged_at: int | None
    nonfinite_at: int | None
    first_loss: float | None
    best_loss: float | None
    final_loss: float | None
    last_step: int | None


def outcome(
    steps: ArrayLike,
    losses: ArrayLike,
    *,
    end_status: str | None,
    planned_steps: int,
    unigram: float | None,
    seen: ArrayLike | None = None,
) -> Outcome:
    """Judge one member.

    Args:
        steps: of its records, ascending, (S,).
        losses: (S,).
        end_status: what its part ended with: finished, interrupted or failed; running while it still writes; None if
            nothing was said.
        planned_steps: a member that has them all is complete, however its part ended.
        unigram: loss of predicting from token frequencies alone; None = unknown.
        seen: whether each loss was seen, (S,): what is not known says nothing; None = all were.
    """
    steps_S: NDArray[Any] = np.asarray(steps, dtype=np.int64)
    losses_S: NDArray[Any] = np.asarray(losses, dtype=np.float64)
    halted = {None: "killed", "running": "running"}.get(end_status, "interrupted")
    last_step = int(steps_S[-1]) if len(steps_S) else None
    if seen is not None:
        seen_S = np.asarray(seen, dtype=bool)
        steps_S, losses_S = steps_S[seen_S], losses_S[seen_S]
    if not len(steps_S):
        return Outcome(
            status=halted if last_step is None or end_status != "finished" else "trained",
            diverged_at=None,
            nonfinite_at=None,
            first_loss=None,
            best_loss=None,
            final_loss=None,
            last_step=last_step,
        )
    watch = LossWatch()
    watch.feed(steps_S, losses_S)
    finite_S = np.isfinite(losses_S)
    with np.errstate(all="ignore"):
        final_loss = float(losses_S[-FINAL_STEPS:].mean())
    assert last_step is not None
    if watch.diverged_at is not None:
        status = "diverged"
    elif end_status != "finished" and last_step + 1 < planned_steps:
        status = halted
    else:
        status = "stalled" if unigram is not None and final_loss > unigram else "trained"
    return Outcome(
        status=status,
        diverged_at=watch.diverged_at,
        nonfinite_at=None if finite_S.all() else int(steps_S[finite_S.argmin()]),
        first_loss=float(losses_S[0]),
        best_loss=float(losses_S[finite_S].min()) if finite_S.any() else None,
        final_loss=final_loss,
        last_step=last_step,
    )
