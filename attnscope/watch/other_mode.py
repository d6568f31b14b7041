"""How attention of a layer computes in evaluation, beside how it does in training at the same step.

An evaluation between two updates is at the step of the later one, which trains with the same weights: a scale that is learned,
or a mask that changes in the course of training, is the same in both. What is found stays on the device until a block of
steps is written.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attnscope.capture.seen import Computed, Seen, measure, scale_of
from attnscope.capture.sight import FACTS, sight_of
from attnscope.runs.probe_events import AttentionInOtherMode
from attnscope.watch.guard import OnEvent
from attnscope.watch.step import Step

MOST_LOOKS = 3  # evaluations of a layer that are looked at
MOST_CALLS = 4  # of a layer in training, beside one evaluation


@dataclass(frozen=True, slots=True, kw_only=True)
class _Call:
    """What is kept of one call.

    Attributes:
        shape: T and S.
        scale: what q kᵀ was multiplied by in the call; None where `fit` tells, or nothing.
        factor: what q and k were multiplied by before; None where that cannot be seen.
        fit: see `attnscope.capture.seen.Measured`.
        facts: FACTS.
    """

    shape: tuple[int, int]
    scale: float | None
    factor: float | None
    fit: Tensor | None
    facts: Tensor

    def applied(self) -> float | None:
        """What q kᵀ is multiplied by; waits for the device."""
        scale = self.scale if self.fit is None else scale_of(tuple(self.fit.tolist()))
        known = None not in (scale, self.factor)
        applied = abs((scale or 0.0) * (self.factor or 0.0)) if known else math.nan
        return applied if math.isfinite(applied) and applied > 0 else None

    def later_rows(self) -> float | None:
        """Share of rows that see a later key; waits for the device."""
        facts = dict(zip(FACTS, self.facts.tolist(), strict=True))
        return facts["later_seen"] / facts["later_rows"] if facts["later_rows"] else None


class OtherMode:
    """Compares, for each layer, one evaluation with the training at its step.

    Invariant: no tensor of the script is kept.
    """

    def __init__(self, *, rows: int | str, on_event: OnEvent) -> None:
        self._rows = rows
        self._on_event = on_event
        self._evaluated: dict[int, _Call] = {}  # layers, at the step that goes on
        self._trained: dict[int, list[_Call]] = {}
        self._looks: dict[int, int] = {}
        self._pairs: list[tuple[int, int, _Call, list[_Call]]] = []  # step and layer
        self._told: set[int] = set()

    def evaluated(self, layer: int, module: nn.Module | None, seen: Seen) -> None:
        """A call without gradients."""
        if module is None or module.training or layer in self._told or layer in self._evaluated:
            return
        n_queries, n_keys = seen.shape[2:]
        if n_queries != n_keys or n_queries < 2 or self._looks.get(layer, 0) >= MOST_LOOKS:
            return
        self._looks[layer] = self._looks.get(layer, 0) + 1
        self._evaluated[layer] = self._call(seen)

    def trained(self, layer: int, module: nn.Module | None, seen: Seen) -> None:
        """A call with gradients."""
        beside = self._evaluated.get(layer)
        calls = self._trained.setdefault(layer, []) if beside is not None else []
        if beside is None or module is None or not module.training or len(calls) >= MOST_CALLS:
            return
        calls.append(self._call(seen))

    def end_step(self, step: Step) -> None:
        """The step is over."""
        for layer, calls in self._trained.items():
            evaluated = self._evaluated[layer]
            if calls and all(each.shape == evaluated.shape for each in calls):
                self._told.add(layer)
                self._pairs.append((step.number, layer, evaluated, calls))
        self._evaluated.clear()
        self._trained.clear()

    def flush(self) -> None:
        """Say what was found; waits for the device."""
        pairs, self._pairs = self._pairs, []
        for step, layer, evaluated, calls in pairs:
            scale, scales = evaluated.applied(), [call.applied() for call in calls]
            known = [each for each in scales if each is not None]
            ratio, is_larger = None, False
            if scale is not None and len(known) == len(scales):
                nearest = min(known, key=lambda each: abs(math.log(each / scale)))
                ratio, is_larger = min(scale, nearest) / max(scale, nearest), scale > nearest
            shares = [call.later_rows() for call in calls]
            seen = [share for share in shares if share is not None]
            what = AttentionInOtherMode(
                layer=layer,
                queries=evaluated.shape[0],
                scale_ratio=ratio,
                is_larger=is_larger,
                later_rows=evaluated.later_rows(),
                later_rows_trained=max(seen) if len(seen) == len(shares) else None,
            )
            self._on_event(what, step=step)

    @torch.no_grad()
    def _call(self, seen: Seen) -> _Call:
        is_computed = isinstance(seen.logits, Computed)
        return _Call(
            shape=(seen.shape[2], seen.shape[3]),
            scale=seen.scale,
            factor=seen.factor,
            fit=measure(seen, rows=self._rows, seed=0).fit if is_computed else None,
            facts=sight_of(seen, (), rows=self._rows, seed=0),
        )
