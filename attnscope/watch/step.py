"""What was seen of one step of foreign training. Gradients of several backward calls add up, and so do their losses.

Shape key: C total, H head, P parameter.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from attnscope.watch.finite import Outputs
from attnscope.watch.output import Output
from attnscope.watch.passed import Passed
from attnscope.watch.passes import Passes

FIRST = 20  # steps that are all measured, whatever the cadence: what explodes, explodes early


class ParameterPlace(NamedTuple):
    """Where a parameter is: layer and group as in the params table, and its path."""

    layer: int
    group: str
    path: str


@dataclass(slots=True, kw_only=True)
class Step:
    """What was seen of one step.

    Attributes:
        number: optimizer updates done before it.
        measured: whether attention and parameters were looked at.
        losses: given to backward.
        first_loss: of those whose gradients an optimizer was given; None = no optimizer has stepped.
        dropped: parameter to how many losses there were when its gradient was thrown away.
        updated: whether an optimizer has stepped, with gradients.
        heads: layer to TOTALS of its calls, those in training if there are any, (C, H) each.
        purposes: layer to what those calls are for (`layers.TRAINS`).
        parameters: (layer, group) along P.
        sizes: PARAMETER_COLUMNS, (P,) each.
        forms: layer to `attn_form_update_ratio` of its heads, (H,), where that is known.
        gradients: what has a gradient along P, and its norm before clipping, (P,); at every step.
        outputs: sums over the outputs of modules.
        output: what cross-entropy was given.
        passes: losses beside the cross-entropies that they are made of; only in the first steps.
        passed: the residual stream, as it passed from block to block.
        lrs: of all parameter groups that were updated.
    """

    number: int
    measured: bool
    losses: list[Tensor] = field(default_factory=list)
    first_loss: int | None = None
    dropped: dict[int, int] = field(default_factory=dict)
    updated: bool = False
    heads: dict[int, list[Tensor]] = field(default_factory=dict)
    purposes: dict[int, int] = field(default_factory=dict)
    parameters: list[tuple[int, str]] = field(default_factory=list)
    sizes: dict[str, list[Tensor]] = field(default_factory=dict)
    forms: dict[int, Tensor] = field(default_factory=dict)
    gradients: list[tuple[list[ParameterPlace], Tensor]] = field(default_factory=list)
    outputs: Outputs | None = None
    output: Output = field(default_factory=Output)
    passes: Passes = field(default_factory=Passes)
    passed: Passed | None = None
    grad_norm: Tensor | None = None
    clip_factor: Tensor | None = None
    lrs: list[float | Tensor] = field(default_factory=list)
    loss_scale: Tensor | None = None
    step_ms: float = 0.0

    @property
    def counts(self) -> bool:
        """Whether it is a row of the steps table."""
        return self.updated or bool(self.losses)

    def drop(self, parameters: Iterable[Tensor]) -> None:
        """The gradients of these parameters are thrown away, and with them the losses that they come from."""
        if self.losses:
            self.dropped |= dict.fromkeys(map(id, parameters), len(self.losses))

    def count_losses_of(self, parameters: list[Tensor]) -> None:
        """An optimizer is given the gradients of these parameters."""
        first = min((self.dropped.get(id(p), 0) for p in parameters), default=0) if self.dropped else 0  # fmt: skip
        self.first_loss = first if self.first_loss is None else min(first, self.first_loss)

    def counted_losses(self) -> list[Tensor]:
        """Those whose sum is the loss of the step."""
        return self.losses[self.first_counted :]

    @property
    def first_counted(self) -> int:
        """Place among the losses of the first one that counts; it and all after it do."""
        last = max(0, len(self.losses) - 1)
        return last if self.first_loss is None and self.dropped else min(self.first_loss or 0, last)
