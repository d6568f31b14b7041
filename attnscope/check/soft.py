"""Masks that hide nothing: filled with, or adding, a number after which the softmax still gives the keys weight.

Shape key: B batch, H head, T query position, S key position.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from attnscope.capture.calls import modified_logits
from attnscope.capture.seen import Computed, Modified, Scaled, Seen
from attnscope.check.case import NOISE

EXACT = 1e-4  # of the largest logit: logits that a number explains


@dataclass(frozen=True, slots=True, kw_only=True)
class Soft:
    """Keys that a mask was meant to hide.

    Attributes:
        keys: which, in words.
        how: filled with, or shifted by.
        value: that number.
        weight: that the softmax gives these keys, mean of the queries that have any.
    """

    keys: str
    how: str
    value: float
    weight: float

    def __str__(self) -> str:
        return (
            f"logits of {self.keys} are {self.how} {self.value:.3g}, which leaves them {self.weight:.0%} of the weight"
        )


@torch.no_grad()
def soft_mask(seen: Seen, visible_BHTS: Tensor, real_BT: Tensor) -> Soft | None:
    """Of self-attention: all later keys, or all padded ones, are visible and yet treated as one that should be hidden.

    A bias of positions (ALiBi, T5) has other numbers at other distances, and is none.
    """
    if seen.q is None or seen.k is None:
        return None
    n = visible_BHTS.shape[-1]
    raw = seen.q.float() @ seen.k.float().mT
    z, exact = _logits(seen, raw)
    real = (real_BT[:, None, :, None] & real_BT[:, None, None, :]).expand_as(visible_BHTS)
    later = torch.ones(n, n, dtype=torch.bool, device=z.device).triu(1)
    diagonal = torch.eye(n, dtype=torch.bool, device=z.device)
    padded = (real_BT[:, None, :, None] & ~real_BT[:, None, None, :]).expand_as(visible_BHTS)
    base = diagonal & visible_BHTS & real
    for words, meant in (("later keys", later & real), ("padded keys", padded)):
        where = meant & visible_BHTS
        # All of them, at different distances.
        if not torch.equal(where, meant) or not where.any() or not base.any() or (words == "later keys" and n < 3):
            continue
        how_and_value = _filled(z, raw, where, base) or _shifted(z, raw, exact, where, base)
        if how_and_value is None:
            continue
        p = z.masked_fill(~visible_BHTS, -torch.inf).softmax(dim=-1)
        weight = p.where(where, 0.0).sum(dim=-1)[where.any(dim=-1)]
        if float(weight.max()) > NOISE:
            how, value = how_and_value
            return Soft(keys=words, how=how, value=value, weight=float(weight.mean()))
    return None


def _logits(seen: Seen, raw: Tensor) -> tuple[Tensor, Tensor | None]:
    """Logits, and what was added to them where that is known."""
    match seen.logits:
        case Modified() as logits:
            return modified_logits(logits)[1], None
        case Computed() as logits:
            return logits.z.float(), None
        case Scaled() as logits:
            z = raw * logits.scale
            added = torch.zeros_like(z) if logits.bias is None else logits.bias.float().expand_as(z)
            return z + added, added


def _filled(z: Tensor, raw: Tensor, where: Tensor, base: Tensor) -> tuple[str, float] | None:
    filled = z[where]
    varies = [bool(x.max() > x.min()) for x in (filled, raw[where], z[base])]
    return ("filled with", float(filled[0])) if varies == [False, True, True] else None


def _shifted(z: Tensor, raw: Tensor, exact: Tensor | None, where: Tensor, base: Tensor) -> tuple[str, float] | None:
    if exact is not None:
        rest, within = exact, 0.0
    else:
        x, y = raw[base], z[base]
        x, y = x - x.mean(), y - y.mean()
        scale = (x * y).sum() / x.square().sum()
        rest, within = z - scale * raw, EXACT * float(z[base | where].abs().max())
    inside, outside = rest[where], rest[base]
    if any(float(logits.max() - logits.min()) > 2 * within for logits in (inside, outside)):
        return None
    step = float(inside.mean() - outside.mean())
    return ("shifted by", step) if abs(step) > 10 * within else None
