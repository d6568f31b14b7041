"""What cross-entropy is given in foreign code: the output logits, how many tokens are scored, and what the targets are like.

Shape key: N scored positions, V vocab.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attnscope.runs.events import What
from attnscope.runs.probe_events import CrossEntropySeen, FirstTargets
from attnscope.watch.numbers import is_readable

Array = NDArray[Any]

MOST_NUMBERS = 1 << 22  # logits whose log-partition is computed; of more, every n-th position is
MOST_TARGETS = 1 << 12  # of a step, which are kept for a look at them
FEWEST_TARGETS = 16  # that are no accident where they are the same twice
# Different differences from target to target: fewer have arange, blocks of a class, and whatever is laid out by hand.
FEWEST_JUMPS = 8
MOST_MISSED = 0.05  # nats, from which on so few targets do not tell the entropy of their frequencies


@dataclass(slots=True, kw_only=True)
class Output:
    """Of one step, a scalar per call of cross-entropy.

    Attributes:
        tokens: targets that count.
        log_z: sum over those of them that were looked at; only at measured steps.
        looked_at: how many those are.
        logit_max: largest logit, whether its target counts or not; only at measured steps.
        first: what the first call of one of the first steps was given.
    """

    tokens: list[Tensor] = field(default_factory=list)
    log_z: list[Tensor] = field(default_factory=list)
    looked_at: list[Tensor] = field(default_factory=list)
    logit_max: list[Tensor] = field(default_factory=list)
    first: "FirstCall | None" = None

    def largest(self) -> list[Tensor]:
        """Of all calls, in a list of one; none where none was measured."""
        if len(self.logit_max) < 2:
            return self.logit_max
        device = self.logit_max[0].device
        return [torch.stack([x.to(device) for x in self.logit_max]).amax()]


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstCall:
    """A call of cross-entropy among the first steps.

    Attributes:
        classes: V.
        loss: mean cross-entropy over the targets that count and were looked at, whatever the script makes of it, ().
        counted: targets that count, ().
        targets_N: at most MOST_TARGETS.
        ignore_index: of targets that do not count.
    """

    classes: int
    loss: Tensor
    counted: Tensor
    targets_N: Tensor
    ignore_index: int


class Targets:
    """What the targets of the first steps are like, told once.

    Invariant: nothing is told twice.
    """

    def __init__(self, first: int) -> None:
        """Look at so many steps."""
        self._first = first
        self._classes: int | None = None
        self._firsts_N: Array | None = None
        self._counts_V: dict[int, int] = {}
        self._looked_at = 0
        self._steps = 0
        self._last = 0  # step whose targets were looked at
        self._same = 0
        self._told = False

    def add(self, calls: Sequence[tuple[int, FirstCall | None]], *, is_end: bool) -> Iterator[tuple[int, What]]:
        """Steps, in order, with the first call of each; waits for the device.

        Yields:
            Step of an event, and what it is.
        """
        for step, call in calls:
            if call is None or step >= self._first or call.classes != (self._classes or call.classes):
                continue
            targets_N = call.targets_N.cpu().numpy()
            if self._classes is None or self._firsts_N is None:
                self._classes, self._firsts_N = call.classes, targets_N
                counted = int(call.counted)
                yield step, CrossEntropySeen(classes=call.classes, loss=float(call.loss), targets=counted)
            self._steps += 1
            self._last = step
            self._looked_at += len(targets_N)
            self._same += bool(np.array_equal(targets_N, self._firsts_N))
            values_K, counts_K = np.unique(targets_N[targets_N != call.ignore_index], return_counts=True)
            for value, count in zip(values_K.tolist(), counts_K.tolist(), strict=True):
                self._counts_V[value] = self._counts_V.get(value, 0) + count
        if self._steps and not self._told and (is_end or any(number >= self._first - 1 for number, _ in calls)):
            self._told = True
            yield (self._last if is_end else self._first - 1), self._described()

    def _described(self) -> FirstTargets:
        counts_K = np.array(list(self._counts_V.values()), dtype=np.float64)
        total = counts_K.sum()
        missed = (
            (len(counts_K) - 1) / (2 * total) if total else math.inf
        )  # Miller 1955: the entropy of so few is too low
        entropy = None
        if missed < MOST_MISSED:
            entropy = float(missed - (counts_K / total * np.log(counts_K / total)).sum())
        assert self._firsts_N is not None
        return FirstTargets(
            steps=self._steps,
            same=self._same,
            irregular=is_irregular(self._firsts_N),
            counted=float(total / self._looked_at) if self._looked_at else 0.0,
            entropy=entropy,
        )


def is_irregular(targets_N: Array) -> bool:
    """Whether no two batches would have these targets by their layout: not counted through, in blocks, or all alike."""
    return len(targets_N) >= FEWEST_TARGETS and len(np.unique(np.diff(targets_N))) >= FEWEST_JUMPS


@torch.no_grad()
def see_cross_entropy(
    output: Output,
    logits: Tensor,
    targets: Tensor,
    ignore_index: int,
    *,
    measured: bool,
    is_first: bool = False,
) -> None:
    """Add a call; targets that are probabilities are no tokens.

    Args:
        output: of the step.
        logits: (V,), (N, V) or (N, V, ...), as F.cross_entropy takes them.
        targets: class indices, without the axis V.
        ignore_index: of targets that do not count.
        measured: whether the logits are looked at.
        is_first: whether it is one of the first steps, whose targets are looked at, too.
    """
    if targets.is_floating_point() or not (is_readable(logits) and is_readable(targets)):
        return
    logits, counts = logits.detach(), targets != ignore_index
    output.tokens.append(counts.sum())
    if not measured or not logits.numel():
        return
    output.logit_max.append(logits.amax().float())
    if logits.dim() == 1:
        logits, targets, counts = logits[None], targets.reshape(1), counts.reshape(1)
    stride = -(-logits.numel() // MOST_NUMBERS)
    seen, logits, counts = targets[::stride], logits[::stride].float(), counts[::stride]
    log_z = logits.logsumexp(dim=1)
    output.log_z.append(log_z.where(counts, 0).sum())
    output.looked_at.append(counts.sum())
    if is_first and output.first is None:
        right = logits.gather(1, seen.where(counts, 0).unsqueeze(1)).squeeze(1)
        output.first = FirstCall(
            classes=logits.shape[1],
            loss=(log_z - right).where(counts, 0).sum() / counts.sum(),
            counted=output.tokens[-1],
            targets_N=targets.flatten()[:MOST_TARGETS].clone(),
            ignore_index=ignore_index,
        )
