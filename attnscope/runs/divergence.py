"""Divergence: when a loss left for good. One definition, used while a member trains and when its record is read back.

A loss diverges in one of three ways:

- It rises far above its range and stays there. The range is what it was before, isolated peaks aside: from the lowest to the
  highest median of three losses in a row. Far is the size of the highest, or WIDTHS times the width of the range, or LEAST_RISE,
  whichever is most: a positive loss doubles, one that is negative or changes its sign leaves its own fluctuation. At least
  IN_A_ROW losses in a row have to be far. After few losses little is known of a range, so then it takes many, or very far ones: each
  counts by its rise over the spread of all losses before (at least a share of their size, one by how many they are) or 1, and
  this count x losses before must be EVIDENCE. A loss that was NEARLY_ZERO all along has no range yet: one that starts at zero
  (on-policy RL, distillation from a copy) may go anywhere.
- It stops being finite for good: NOT_FINITE_IN_A_ROW losses in a row, or up to the end of the record. One that is not finite
  and is followed by finite ones is an event and no divergence: a batch without a label, or a step that loss scaling skipped. Nor is
  one of these at the very end.
- It is a cross-entropy, and at the end it is far above guessing and its own beginning: a loss that climbs slowly takes its range
  along, and is never far from it. All of the LAST losses are above GUESSES times guessing and FIRSTS times the first one. What begins
  far above guessing, as with large weights, has to rise to be that.

It is dated to where it left its best level, the lowest of the range, for the last time: the first loss from which on all are
twice that (or LEAST_RISE above it).

Measured, on seeds the constants were not chosen on: none of 350 healthy trainings diverges (8 set-ups of this lab, and
GRPO, REINFORCE, distillation, WGAN, GAN, DQN, densities, regression, batches of one); all 26 explosions of the lab do, none dated
later than "3 losses in a row at least twice the first" dates it. Of losses that are noise and nothing else, hundreds of nats
large, 1 run of 300 steps in 100 does where they are exponential, 1 in 15 where they are squares: if the first few are small.

Shape key: N finite losses, S steps, R what is known of a range.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import ArrayLike, NDArray

FED = ("step", "loss", "grad_norm", "loss_scale")  # columns of the steps table that decide

EVIDENCE = 1000
IN_A_ROW = 3
WIDTHS = 2.0
LEAST_RISE = 3.0  # nats: less is no explosion
NEARLY_ZERO = 0.01  # nats
NOT_FINITE_IN_A_ROW = 10
# Of a cross-entropy, at the end of training. Runs without norm begin at 19 to 40 nats, some ten times guessing, and come down; one
# that climbed from 4 to 4,972 never left its range.
LAST = 20
GUESSES = 10.0
FIRSTS = 2.0
SAME_LOSS = 0.2  # of the first cross-entropy: by more, the loss of a watched script is something else

NOT_FINITE = "not finite"
TOO_HIGH = "far above what it was"

_KEPT = 300  # of the last losses: what a verdict looks back at
_LOWEST, _HIGHEST, _FAR, _SPREAD = range(4)  # rows of a range

_Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Guessing:
    """What a cross-entropy is that knows nothing.

    Attributes:
        level: ln of the number of classes, nats.
        first: mean cross-entropy of the first step, which the first loss has to be; None = the loss is known to be one.
    """

    level: float
    first: float | None = None


class LossWatch:
    """Finds the step at which one member diverges, fed block by block.

    Invariant: the answer does not depend on how the losses are cut into blocks.

    Attributes:
        diverged_at: the step; None = it did not, so far.
        why: NOT_FINITE or TOO_HIGH.
        limit: which no loss from there on was below; None if it did not rise.
    """

    diverged_at: int | None
    why: str | None
    limit: float | None

    def __init__(self) -> None:
        self.diverged_at = None
        self.why = None
        self.limit = None
        self._first: float | None = None  # loss
        self._n_before = 0  # finite losses before those that are kept
        self._steps: NDArray[np.int64] = np.empty(0, dtype=np.int64)
        self._losses: _Floats = np.empty(0)
        self._range_RN: _Floats = np.empty((4, 0))  # before each of them
        self._levels = self._extremes = (math.inf, -math.inf)  # of all so far, smallest and largest
        self._broken: list[int] = []  # steps whose losses are not finite, the last ones in a row
        self._did_harm = False  # to their gradients

    def feed(
        self,
        steps: ArrayLike,
        losses: ArrayLike,
        grad_norms: ArrayLike | None = None,
        loss_scales: ArrayLike | None = None,
    ) -> None:
        """Go on with the next losses, (S,) each; after divergence nothing changes any more.

        Args:
            steps: ascending.
            losses: of these steps.
            grad_norms: of these steps: a loss that is not finite does no harm where its gradient is. None = unknown.
            loss_scales: of these steps: nor does it where there is one, which skips the step. None = there is none.
        """
        steps_S = np.asarray(steps, dtype=np.int64)
        losses_S = np.asarray(losses, dtype=np.float64)
        harm_S = np.ones(len(steps_S), dtype=bool)
        if grad_norms is not None:
            harm_S &= ~np.isfinite(np.asarray(grad_norms, dtype=np.float64))
        if loss_scales is not None:
            harm_S &= np.asarray(loss_scales, dtype=np.float64) == 1
        finite_S = np.isfinite(losses_S)
        # Cut where losses become finite, or not finite.
        cuts = [0, *(1 + np.flatnonzero(finite_S[1:] != finite_S[:-1])).tolist(), len(steps_S)]
        for start, end in pairwise(cuts):
            if start == end or self.diverged_at is not None:
                continue
            if finite_S[start]:
                self._go_on(steps_S[start:end], losses_S[start:end])
            else:
                self._break(steps_S[start:end].tolist(), did_harm=bool(harm_S[start:end].any()))

    def end(self, guessing: Guessing | None = None) -> None:
        """Nothing will follow: what is not finite up to here is so for good, unless it is little and did no harm.

        Where the loss is a cross-entropy, `guessing` tells which ones are far above it.
        """
        none_was_finite = not self._n_before and not len(self._losses)
        is_for_good = self._did_harm or len(self._broken) >= IN_A_ROW or none_was_finite
        if self.diverged_at is None and self._broken and is_for_good:
            self._date(len(self._losses), broken_at=self._broken[0])
        if self.diverged_at is None and guessing is not None and self._has_climbed(guessing):
            self._date(len(self._losses), broken_at=None)

    def _has_climbed(self, guessing: Guessing) -> bool:
        first, last_N = self._first, self._losses[-LAST:]
        if first is None or len(last_N) < LAST or not guessing.level > 0:
            return False
        if guessing.first is not None and not abs(first - guessing.first) <= SAME_LOSS * guessing.first:
            return False
        return bool(last_N.min() > max(GUESSES * guessing.level, FIRSTS * first))

    def _break(self, steps: Sequence[int], *, did_harm: bool) -> None:
        self._broken = [*self._broken, *steps][:NOT_FINITE_IN_A_ROW]
        self._did_harm |= did_harm
        if len(self._broken) == NOT_FINITE_IN_A_ROW:
            self._date(len(self._losses), broken_at=self._broken[0])

    def _go_on(self, steps_S: NDArray[np.int64], losses_S: _Floats) -> None:
        self._broken, self._did_harm = [], False
        seen = len(self._losses)
        self._first = float(losses_S[0]) if self._first is None else self._first
        self._steps = np.concatenate([self._steps, steps_S])
        self._losses = np.concatenate([self._losses, losses_S])
        with np.errstate(all="ignore"):  # before the first loss there is no range
            self._add_ranges(seen)
            end = self._shown_by(seen)
            if end is not None:
                self._date(end, broken_at=None)
        gone = max(0, len(self._losses) - 2 * _KEPT)
        self._n_before += gone
        self._steps, self._losses = self._steps[gone:], self._losses[gone:]
        self._range_RN = self._range_RN[:, gone:]

    def _add_ranges(self, seen: int) -> None:
        """The range of all that was before each of the newest losses."""
        levels = [self._losses[:2][seen:]]  # before there are three, each is its own level
        if len(self._losses) > 2:
            three_N3 = sliding_window_view(self._losses[max(0, seen - 2) :], 3)
            levels.append(np.sort(three_N3, axis=1)[:, 1])
        lowest_N, highest_N, self._levels = _so_far(self._levels, np.concatenate(levels))
        least_N, most_N, self._extremes = _so_far(self._extremes, self._losses[seen:])
        n_before_N = (self._n_before + np.arange(seen, len(self._losses))).clip(min=1)
        size_N = np.maximum(np.abs(highest_N), WIDTHS * (highest_N - lowest_N))
        is_known_N = np.isfinite(size_N) & (size_N > NEARLY_ZERO)
        far_N = np.where(is_known_N, np.maximum(size_N, LEAST_RISE), np.inf)
        share_N = np.maximum(np.abs(highest_N), LEAST_RISE) / n_before_N
        spread_N = np.where(is_known_N, np.maximum(most_N - least_N, share_N), np.inf)
        highest_N = np.where(is_known_N, highest_N, 0.0)
        range_RN = np.stack([lowest_N, highest_N, far_N, spread_N])
        self._range_RN = np.concatenate([self._range_RN, range_RN], axis=1)

    def _shown_by(self, seen: int) -> int | None:
        """How many of the losses it takes to show that they left their range; None if they do not."""
        at_N = np.arange(max(0, seen - _KEPT), len(self._losses) - IN_A_ROW + 1)
        rise_N = np.min([self._losses[at_N + k] for k in range(IN_A_ROW)], axis=0)
        rise_N -= self._range_RN[_HIGHEST, at_N]
        first: int | None = None
        for at in at_N[rise_N >= self._range_RN[_FAR, at_N]].tolist():
            range_R = self._range_RN[:, at]
            rise_N = self._losses[at : at + _KEPT] - range_R[_HIGHEST]
            counts_N = np.maximum(rise_N / range_R[_SPREAD], 1.0)
            shown_N = (self._n_before + at) * np.cumsum(counts_N) >= EVIDENCE
            shown_N[: IN_A_ROW - 1] = False
            stays_N = np.logical_and.accumulate(rise_N >= range_R[_FAR])
            is_found_N = shown_N & stays_N
            if is_found_N.any():
                end = at + int(is_found_N.argmax()) + 1
                first = end if first is None else min(first, end)
            if first is not None and at + IN_A_ROW >= first:
                break  # what begins later is shown later
        return first

    def _date(self, end: int, *, broken_at: int | None) -> None:
        """It diverged, as the losses before position `end` show, or those that are not finite; say since when."""
        start = max(0, end - _KEPT)
        best_N = self._range_RN[_LOWEST, start:end]  # infinite before the first
        least_N = np.minimum.accumulate(self._losses[start:end][::-1])[::-1]  # from each on
        limit_N = best_N + np.maximum(np.abs(best_N), LEAST_RISE)
        left_N = least_N >= limit_N
        if left_N.any():
            at = int(left_N.argmax())
            self.diverged_at, self.why = int(self._steps[start + at]), TOO_HIGH
            self.limit = float(limit_N[at])
            return
        self.diverged_at, self.why = broken_at, NOT_FINITE


def _so_far(before: tuple[float, float], x_N: _Floats) -> tuple[_Floats, _Floats, tuple[float, float]]:
    """Of what was before each number, the smallest and the largest; and of all of them."""
    smallest_N = np.minimum.accumulate(np.r_[before[0], x_N])
    largest_N = np.maximum.accumulate(np.r_[before[1], x_N])
    return smallest_N[:-1], largest_N[:-1], (float(smallest_N[-1]), float(largest_N[-1]))
