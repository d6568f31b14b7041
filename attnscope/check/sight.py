"""In which directions positions see one another.

Shape key: ... heads or nothing, T query position, S key position (as many).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

# blocks: causal but for runs of positions that all see one another (a prefix, the patches of an image).
Direction = Literal["causal", "both ways", "blocks", "partly", "backwards", "alone"]

# Of what is seen behind, the share that is seen at the same distance ahead: above, sight is meant to go both ways. A window
# has 1 and a causal mask shifted by one 1 / T or less.
MIRRORED = 0.9


@dataclass(frozen=True, slots=True, kw_only=True)
class Sight:
    """Pairs of positions.

    Attributes:
        behind: pairs in which a query sees a position before its own.
        ahead: pairs in which it sees one after its own.
        could_ahead: pairs of the second kind that were looked at.
        farthest: positions between a query and the last that it sees ahead.
        mirrored: of the pairs seen behind that have a counterpart at the same distance ahead, those that see it too.
        mirrors: pairs seen behind that have a counterpart.
        mutual: who sees another is seen by it.
        blocks: who sees ahead sees all up to a position, which sees no further; or all that see ahead see the same prefix.
    """

    behind: int
    ahead: int
    could_ahead: int
    farthest: int
    mirrored: int
    mirrors: int
    mutual: bool
    blocks: bool


def sight_of(sees_TS: Tensor, known_TS: Tensor) -> Sight:
    """Count pairs.

    Args:
        sees_TS: True where a query sees a key, (..., T, T).
        known_TS: True where that is known; the rest is left out.
    """
    sees = sees_TS & known_TS
    n = sees.shape[-1]
    t_T1 = torch.arange(n, device=sees.device)[:, None]
    s_1S = torch.arange(n, device=sees.device)[None, :]
    ahead = sees & (s_1S > t_T1)
    mirrored = mirrors = 0
    # A whole row is known from a gradient, a whole column from a changed position: both have their own mirror.
    for seen, known, behind in ((sees, known_TS, s_1S < t_T1), (sees.mT, known_TS.mT, s_1S > t_T1)):
        opposite = 2 * t_T1 - s_1S
        there = (opposite >= 0) & (opposite < n) & behind
        opposite = opposite.clamp(0, n - 1).expand(seen.shape)
        pairs = seen & there & known.expand(seen.shape).gather(-1, opposite)
        mirrors += int(pairs.sum())
        mirrored += int((pairs & seen.gather(-1, opposite)).sum())
    return Sight(
        behind=int((sees & (s_1S < t_T1)).sum()),
        ahead=int(ahead.sum()),
        could_ahead=int((known_TS.expand(sees.shape) & (s_1S > t_T1)).sum()),
        farthest=int((s_1S - t_T1).expand(sees.shape)[ahead].max()) if ahead.any() else 0,
        mirrored=mirrored,
        mirrors=mirrors,
        mutual=_is_mutual(sees, known_TS),
        blocks=_has_blocks(sees, known_TS) or _has_prefix(sees, known_TS),
    )


def direction_of(sight: Sight) -> Direction:
    """What the pairs amount to."""
    if not sight.ahead:
        return "causal" if sight.behind else "alone"
    if not sight.behind:
        return "backwards"
    if sight.mutual:
        return "both ways"
    if sight.blocks:
        return "blocks"
    # Of two positions none has room on both sides: what is seen ahead is all that there is.
    share = sight.mirrored / sight.mirrors if sight.mirrors else sight.ahead / sight.could_ahead
    return "both ways" if share >= MIRRORED else "partly"


def _is_mutual(sees: Tensor, known_TS: Tensor) -> bool:
    both = (known_TS & known_TS.mT).triu(1)
    return bool((sees.triu(1) & both).any() and torch.equal(sees & both, sees.mT & both))


def _has_prefix(sees: Tensor, known_TS: Tensor) -> bool:
    """Keys up to a position are seen by all queries before them, and later ones by none: this shows in some columns, too."""
    ahead_TS = known_TS.triu(1)
    seen_S, all_S = (sees & ahead_TS).any(dim=-2), (sees | ~ahead_TS).all(dim=-2)
    tried_S = ahead_TS.any(dim=-2)
    seen = seen_S[tried_S]
    return bool(torch.equal(seen, all_S[tried_S]) and (seen[1:] <= seen[:-1]).all())


def _has_blocks(sees: Tensor, known_TS: Tensor) -> bool:
    """Only where everything is known of the positions of which anything is."""
    is_there = known_TS.any(dim=-1)
    if not torch.equal(known_TS, is_there[:, None] & is_there):
        return False
    n = sees.shape[-1]
    at = torch.arange(n, device=sees.device)
    reach = sees | torch.eye(n, dtype=torch.bool, device=sees.device)
    last_T = torch.where(reach, at, 0).amax(dim=-1)
    between_TS = (at >= at[:, None]) & (at <= last_T[:, None]) & known_TS
    return bool((last_T[last_T] == last_T)[is_there].all() and (reach | ~between_TS).all())
