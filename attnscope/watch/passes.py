"""How many losses are differentiated for an update, and what each is by the cross-entropy that it was computed from.

Numbers stay on the device until a block of steps is written.
"""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from attnscope.runs.probe_events import PassesSeen
from attnscope.watch.numbers import copy_of_scalar

FEWEST_STEPS = 3  # that tell how many there are as a rule


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pass:
    """One loss of a step.

    Attributes:
        weight: the loss by the mean cross-entropy, (); None where it was not computed from exactly one.
        shape: of the logits of that, without the axis of examples.
    """

    weight: Tensor | None
    shape: tuple[int, ...] = ()


@dataclass(slots=True, kw_only=True)
class Passes:
    """Of one step.

    Attributes:
        means: cross-entropies that are means, since the last loss, with the shape of their logits; None = one that is no mean.
        losses: in the order in which they were differentiated.
    """

    means: list[tuple[Tensor, tuple[int, ...]] | None] = field(default_factory=list)
    losses: list[_Pass] = field(default_factory=list)

    def cross_entropy(self, loss: Tensor, logits: Tensor, *, is_mean: bool) -> None:
        """A cross-entropy was computed in training."""
        self.means.append((copy_of_scalar(loss), tuple(logits.shape[1:])) if is_mean else None)

    @torch.no_grad()
    def differentiated(self, loss: Tensor) -> None:
        """A loss is about to be differentiated: its number."""
        means, self.means = self.means, []
        first = means[0] if len(means) == 1 else None
        if first is None or first[0].device != loss.device:
            self.losses.append(_Pass(weight=None))
        else:
            self.losses.append(_Pass(weight=loss / first[0], shape=first[1]))


class PassesTold:
    """What the first steps have in common, told once."""

    def __init__(self, first: int) -> None:
        """Look at so many steps."""
        self._first = first
        self._counts: list[int] = []
        self._weights: list[float] = []
        self._is_clear = True
        self._told = False

    def add(self, steps: Sequence[tuple[int, Sequence[_Pass]]], *, is_end: bool) -> Iterator[tuple[int, PassesSeen]]:
        """Steps with an update, in order, and the losses whose gradients it was given; waits for the device.

        Yields:
            Step of an event, and what it is.
        """
        step = 0
        for step, losses in steps:
            if step >= self._first or self._told:
                continue
            self._counts.append(len(losses))
            weights = [each.weight for each in losses if each.weight is not None]
            self._is_clear &= len(weights) == len(losses) and len({each.shape for each in losses}) == 1
            self._weights += [float(weight) for weight in weights]
        is_over = is_end or any(number >= self._first - 1 for number, _ in steps)
        if is_over and not self._told and len(self._counts) >= FEWEST_STEPS:
            self._told = True
            weight = statistics.median(self._weights) if self._is_clear and self._weights else None
            what = PassesSeen(steps=len(self._counts), fewest=min(self._counts), most=max(self._counts), weight=weight)
            yield step, what
