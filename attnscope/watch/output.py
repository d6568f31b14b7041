"""What cross-entropy is given in foreign code: the output logits, and how many tokens are scored.

Shape key: N scored positions, V vocab.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from attnscope.watch.numbers import is_readable

MOST_NUMBERS = 1 << 22  # logits whose log-partition is computed; of more, every n-th position is


@dataclass(slots=True, kw_only=True)
class Output:
    """Of one step, a scalar per call of cross-entropy.

    Attributes:
        tokens: targets that count.
        log_z: sum over those of them that were looked at; only at measured steps.
        looked_at: how many those are.
        logit_max: largest logit, whether its target counts or not; only at measured steps.
    """

    tokens: list[Tensor] = field(default_factory=list)
    log_z: list[Tensor] = field(default_factory=list)
    looked_at: list[Tensor] = field(default_factory=list)
    logit_max: list[Tensor] = field(default_factory=list)

    def largest(self) -> list[Tensor]:
        """Of all calls, in a list of one; none where none was measured."""
        if len(self.logit_max) < 2:
            return self.logit_max
        device = self.logit_max[0].device
        return [torch.stack([x.to(device) for x in self.logit_max]).amax()]


@torch.no_grad()
def see_cross_entropy(output: Output, logits: Tensor, targets: Tensor, ignore_index: int, *, measured: bool) -> None:
    """Add a call; targets that are probabilities are no tokens.

    Args:
        output: of the step.
        logits: (V,), (N, V) or (N, V, ...), as F.cross_entropy takes them.
        targets: class indices, without the axis V.
        ignore_index: of targets that do not count.
        measured: whether the logits are looked at.
    """
    if targets.is_floating_point() or not (is_readable(logits) and is_readable(targets)):
        return
    logits, counts = logits.detach(), targets != ignore_index
    output.tokens.append(counts.sum())
    if not measured or not logits.numel():
        return
    output.logit_max.append(logits.amax().float())
    if logits.dim() == 1:
        logits, counts = logits[None], counts.reshape(1)
    stride = -(-logits.numel() // MOST_NUMBERS)
    counts = counts[::stride]
    log_z = logits[::stride].float().logsumexp(dim=1)
    output.log_z.append(log_z.where(counts, 0).sum())
    output.looked_at.append(counts.sum())
