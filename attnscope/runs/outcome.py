"""How a member of a run ended: one definition, used while it trains and when it is read back.

diverged: its loss left for good (`attnscope.runs.divergence`).
stalled: all losses were recorded, but the final one is above the unigram loss: nothing learned from context, so far.
trained: all losses were recorded, none of the above. Where the unigram loss is unknown, that is all it says.
running, interrupted, failed, killed: the run went no further; in this order, it still writes, it was stopped, it died of an
error and said of which, it said nothing.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from attnscope.runs.divergence import Guessing, LossWatch

FINAL_STEPS = 20  # the final loss is the mean over so many last steps
FEWEST = 8  # losses that can be seen to fall
SURE = 3.0  # standard errors, from which on a difference of means is no noise


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a member ended. Losses in nats per token; None where no step was recorded.

    Attributes:
        status: trained, diverged, stalled, running, interrupted, failed or killed.
        error: what ended its part, where that was an error.
        diverged_at: the first step that shows it, None if it did not diverge.
        limit: which no loss from there on was below; None if it did not diverge, or without rising.
        nonfinite_at: the first step whose loss is not finite; of a member that diverged, from there on.
        first_loss: of the first step recorded.
        best_loss: the smallest finite one.
        final_loss: mean over the last 20 steps recorded; NaN or Inf if it diverged and one of them is, while one that is not
            finite and after which training went on is left out.
        last_step: the last step recorded.
        is_falling: whether the last 20 losses are lower than the 20 before, by more than their noise; of a shorter run, its two
            halves; None with fewer than FEWEST.
    """

    status: str
    error: str | None
    diverged_at: int | None
    limit: float | None
    nonfinite_at: int | None
    first_loss: float | None
    best_loss: float | None
    final_loss: float | None
    last_step: int | None
    is_falling: bool | None


def outcome(
    steps: ArrayLike,
    losses: ArrayLike,
    *,
    grad_norms: ArrayLike | None = None,
    loss_scales: ArrayLike | None = None,
    end_status: str | None,
    error: str | None = None,
    planned_steps: int,
    unigram: float | None,
    seen: ArrayLike | None = None,
    guessing: Guessing | None = None,
) -> Outcome:
    """Judge one member.

    Args:
        steps: of its records, ascending, (S,).
        losses: (S,).
        grad_norms: (S,); None = unknown.
        loss_scales: (S,); None = there is none.
        end_status: what its part ended with: finished, interrupted or failed; running while it still writes; None if
            nothing was said.
        error: what its part ended with, where it failed.
        planned_steps: a member that has them all is complete, however its part ended.
        unigram: loss of predicting from token frequencies alone; None = unknown.
        seen: whether each loss was seen, (S,): what is not known says nothing; None = all were.
        guessing: what the loss is compared with where it is a cross-entropy; None = it may be anything.
    """
    steps_S: NDArray[Any] = np.asarray(steps, dtype=np.int64)
    losses_S: NDArray[Any] = np.asarray(losses, dtype=np.float64)
    halted = "killed" if end_status is None else end_status
    error = error if end_status == "failed" else None
    last_step = int(steps_S[-1]) if len(steps_S) else None
    if seen is not None:
        seen_S = np.asarray(seen, dtype=bool)
        steps_S, losses_S = steps_S[seen_S], losses_S[seen_S]
        grad_norms, loss_scales = (
            None if values is None else np.asarray(values)[seen_S] for values in (grad_norms, loss_scales)
        )
    if not len(steps_S):
        recorded = "trained" if last_step is not None else "interrupted"
        return Outcome(
            status=recorded if halted == "finished" else halted,
            error=error,
            diverged_at=None,
            limit=None,
            nonfinite_at=None,
            first_loss=None,
            best_loss=None,
            final_loss=None,
            last_step=last_step,
            is_falling=None,
        )
    assert last_step is not None
    watch = LossWatch()
    watch.feed(steps_S, losses_S, grad_norms, loss_scales)
    if end_status != "running":
        watch.end(guessing)
    finite_S = np.isfinite(losses_S)
    final_S = losses_S[-FINAL_STEPS:]
    if watch.diverged_at is None and finite_S[-FINAL_STEPS:].any():
        final_S = final_S[finite_S[-FINAL_STEPS:]]
    with np.errstate(all="ignore"):
        final_loss = float(final_S.mean())
    if watch.diverged_at is not None:
        status = "diverged"
    elif end_status != "finished" and last_step + 1 < planned_steps:
        status = halted
    else:
        status = "stalled" if unigram is not None and final_loss > unigram else "trained"
    broken_S = steps_S[~finite_S & (steps_S >= (watch.diverged_at or 0))]
    return Outcome(
        status=status,
        error=error,
        diverged_at=watch.diverged_at,
        limit=watch.limit,
        nonfinite_at=int(broken_S[0]) if len(broken_S) else None,
        first_loss=float(losses_S[0]),
        best_loss=float(losses_S[finite_S].min()) if finite_S.any() else None,
        final_loss=final_loss,
        last_step=last_step,
        is_falling=_is_falling(losses_S[finite_S]),
    )


def _is_falling(losses_S: NDArray[Any]) -> bool | None:
    n = min(FINAL_STEPS, len(losses_S) // 2)
    if len(losses_S) < FEWEST:
        return None
    before_S, last_S = losses_S[-2 * n : -n], losses_S[-n:]
    with np.errstate(all="ignore"):
        error = np.sqrt((before_S.var(ddof=1) + last_S.var(ddof=1)) / n)
        return bool(before_S.mean() - last_S.mean() > SURE * error)
