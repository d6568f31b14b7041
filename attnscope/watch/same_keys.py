"""Whether the keys of an attention layer are the same at all positions, or each stands there several times in a row.

Looked at in a few steps: a projection that begins at zero gives the same keys everywhere, until it has learned.

Shape key: B batch, H head, S key position, K d_head.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from attnscope.capture.names import module_calls
from attnscope.capture.seen import Seen
from attnscope.runs.probe_events import KeysRepeated
from attnscope.watch.guard import OnEvent
from attnscope.watch.step import Step

LOOKS = (0, 5, 19)  # steps
FEWEST_LOOKS = 2
SAME = 1e-6  # of the norm of the largest key: keys that are computed of different tokens are further apart in any precision
MOST_TIMES = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class _Look:
    """Of one call.

    Attributes:
        layer: its number.
        step: of it.
        times: that each key would stand there; 0 = all the same.
        spread_H: largest distance between keys that would be the same, relative to the largest norm of one, (H,).
        varies: the same of what the module was given, ().
    """

    layer: int
    step: int
    times: int
    spread_H: Tensor
    varies: Tensor


class SameKeys:
    """What was looked at.

    Invariant: keeps no tensor of the script.
    """

    def __init__(self, on_event: OnEvent) -> None:
        self._on_event = on_event
        self._looks: list[_Look] = []
        self._looked: dict[tuple[int, int], None] = {}  # layer and step
        self._found: dict[int, list[tuple[int, int, list[bool]]]] = {}  # layer to step, times and heads
        self._is_told = False

    @torch.no_grad()
    def attention(self, step: Step, layer: int, seen: Seen) -> None:
        """An attention call in training; what was called is on the stack."""
        if step.number not in LOOKS or seen.k is None or (layer, step.number) in self._looked:
            return
        _, _, n_queries, n_keys = seen.shape
        calls = module_calls()
        if not calls or n_keys < 2:
            return
        given = [x for x in calls[0].tensors if x.dim() >= 3 and x.is_floating_point()]
        sources = [x for x in given if n_keys in x.shape[:-1]]
        times = 0
        if not sources:  # keys of another length than anything that came in
            times, rest = divmod(n_keys, n_queries)
            sources = [x for x in given if n_queries in x.shape[:-1]]
            if rest or not 2 <= times <= MOST_TIMES or n_queries < 2:
                return
        if not sources:
            return
        self._looked[layer, step.number] = None
        n = n_keys // times if times else n_keys
        varies = torch.stack(
            [_spread(x.detach(), axis) for x in sources for axis, size in enumerate(x.shape[:-1]) if size == n]
        ).amin()
        spread_H = _spread_of_keys(seen.k.detach(), times)
        self._looks.append(_Look(layer=layer, step=step.number, times=times, spread_H=spread_H, varies=varies))

    def flush(self, step: Step, *, is_end: bool) -> None:
        """Say what was found once all steps were looked at; waits for the device."""
        looks, self._looks = self._looks, []
        for look in looks:
            varies = float(look.varies) > SAME
            same = [varies and spread < SAME for spread in look.spread_H.tolist()]
            self._found.setdefault(look.layer, []).append((look.step, look.times, same))
        if self._is_told or not (is_end or step.number > LOOKS[-1]):
            return
        self._is_told = True
        for layer, found in self._found.items():
            same_LH = [same for _, _, same in found]
            if len({(times, len(same)) for _, times, same in found}) != 1 or len(found) < FEWEST_LOOKS:
                continue
            heads = sum(all(column) for column in zip(*same_LH, strict=True))
            if heads:
                first, times, same = found[0]
                what = KeysRepeated(layer=layer, heads=heads, of=len(same), times=times, looks=len(found))
                self._on_event(what, step=first)


def _spread(x: Tensor, axis: int) -> Tensor:
    """Largest distance from what stands first on an axis, relative to the largest norm, (); NaN where everything is 0."""
    x = x.movedim(axis, -2).float()
    return torch.linalg.vector_norm(x - x[..., :1, :], dim=-1).amax() / torch.linalg.vector_norm(x, dim=-1).amax()


def _spread_of_keys(k_BHSK: Tensor, times: int) -> Tensor:
    """The same of keys that would be the same, for each head, (H,): all of them, each again and again, or all again and again."""
    k_BHSK = k_BHSK.float()
    n_keys = k_BHSK.shape[2]
    largest_H = torch.linalg.vector_norm(k_BHSK, dim=-1).amax(dim=(0, 2))
    groups = [k_BHSK[:, :, None]]  # (B, H, ., ., K), the same along the last but one
    if times:
        groups = [
            k_BHSK.unflatten(2, (n_keys // times, times)),
            k_BHSK.unflatten(2, (times, n_keys // times)).transpose(2, 3),
        ]
    apart = [torch.linalg.vector_norm(k - k[..., :1, :], dim=-1).amax(dim=(0, 2, 3)) for k in groups]
    return torch.stack(apart).amin(dim=0) / largest_H
