"""How the targets of a cross-entropy stand to the tokens that the model was given: the next ones, the same, or others.

Shape key: B batch, T position.
"""

from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

# Position t has to predict the token at t + offset: 1 = the next one, 0 = the one that it is given.
OFFSETS = (-1, 0, 1, 2)
MOST_TOKENS = 1 << 20  # that are compared


@dataclass(frozen=True, slots=True, kw_only=True)
class TokensCompared:
    """Targets beside tokens.

    Attributes:
        n_positions: T, of the tokens.
        counts: equal ones and those that can be compared, for each of OFFSETS, (O, 2).
    """

    n_positions: int
    counts: Tensor


@torch.no_grad()
def compared(ids: Tensor, targets: Tensor, ignore_index: int) -> list[TokensCompared]:
    """Compare along each axis that may be that of positions; none where the sizes do not fit.

    Args:
        ids: (T,), (B, T) or (T, B).
        targets: one for each of them, or, as code has it that cuts the last position off, for all but the last; any axes.
        ignore_index: of targets that do not count.
    """
    if ids.dim() not in (1, 2) or ids.is_floating_point() or not 2 < ids.numel() <= MOST_TOKENS:
        return []
    found = []
    for axis, cut in product(range(ids.dim() - 1, -1, -1), (0, 1)):
        n_positions = ids.shape[axis]
        shape = list(ids.shape)
        shape[axis] -= cut
        if n_positions < 3 or targets.numel() != torch.Size(shape).numel():
            continue
        ids_BT, targets_BT = (x.movedim(axis, -1) for x in (ids, targets.reshape(shape)))
        counts = torch.stack([_equal(ids_BT, targets_BT, offset, ignore_index) for offset in OFFSETS])
        found.append(TokensCompared(n_positions=n_positions, counts=counts))
    return found


def _equal(ids_BT: Tensor, targets_BT: Tensor, offset: int, ignore_index: int) -> Tensor:
    n_ids, n_targets = ids_BT.shape[-1], targets_BT.shape[-1]
    start, end = max(0, -offset), min(n_targets, n_ids - offset)
    targets_BT = targets_BT[..., start:end]
    counts_BT = targets_BT != ignore_index
    equal_BT = counts_BT & (targets_BT == ids_BT[..., start + offset : end + offset])
    return torch.stack([equal_BT.sum(), counts_BT.sum()])
