"""Whether gradients are clipped while GradScaler's loss scale is still in them.

What is found stays on the device until a block of steps is written.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from attnscope.runs.probe_events import ClippedScaled
from attnscope.watch.guard import OnEvent
from attnscope.watch.parameters import parameters_of
from attnscope.watch.step import Step

MOST_CLIPS = 100  # calls of clipping that are remembered until the gradients are unscaled
MOST_LOOKS = 20  # at some that came before


@dataclass(frozen=True, slots=True, kw_only=True)
class Clip:
    """A call of clipping.

    Attributes:
        parameters: ids of those whose gradients were clipped.
        factor: what they were multiplied by, ().
        threshold: of their norm, or of each number.
    """

    parameters: frozenset[int]
    factor: Tensor
    threshold: float | Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class _Look:
    step: int
    optimizer: str
    clip: Clip
    loss_scale: Tensor


class Clips:
    """Calls of clipping since the gradients were last unscaled.

    Invariant: keeps no parameter or optimizer alive.
    """

    def __init__(self, on_event: OnEvent) -> None:
        self._on_event = on_event
        self._since: list[Clip] = []
        self._looks: list[_Look] = []
        self._n_clips = 0
        self._n_looks = 0

    def clipped(self, parameters: Iterable[Tensor], factor: Tensor, threshold: float | Tensor) -> None:
        """Gradients have been clipped."""
        if self._n_clips < MOST_CLIPS and self._n_looks < MOST_LOOKS:
            self._n_clips += 1
            self._since.append(Clip(parameters=frozenset(map(id, parameters)), factor=factor, threshold=threshold))

    def unscaling(self, step: Step, optimizer: torch.optim.Optimizer, loss_scale: Tensor) -> None:
        """The gradients of an optimizer are about to be divided by the loss scale, for the first time since its last step."""
        if not self._since:
            return
        mine = {id(p) for p in parameters_of(optimizer, with_gradient=False)}
        early = [clip for clip in self._since if clip.parameters & mine]
        self._since = [clip for clip in self._since if not clip.parameters & mine]
        if early and self._n_looks < MOST_LOOKS:
            self._n_looks += 1
            name, scale = type(optimizer).__name__, loss_scale.detach().clone()
            self._looks.append(_Look(step=step.number, optimizer=name, clip=early[0], loss_scale=scale))

    def end_step(self) -> None:
        """What was clipped has been applied."""
        self._since.clear()

    def flush(self) -> None:
        """Say what was found; waits for the device."""
        looks, self._looks = self._looks, []
        for look in looks:
            scale, kept, threshold = (float(x) for x in (look.loss_scale, look.clip.factor, look.clip.threshold))
            # A gradient that has overflowed is clipped to nothing, and its update is skipped.
            if scale > 1 and 0 < kept < 1 and math.isfinite(threshold):
                self._n_looks = MOST_LOOKS
                what = ClippedScaled(optimizer=look.optimizer, loss_scale=scale, threshold=threshold, kept=kept)
                self._on_event(what, step=look.step)
                return
