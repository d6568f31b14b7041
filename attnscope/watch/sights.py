"""Which keys attention sees in the first steps, and how the targets stand to the tokens that the model is given.

What is found stays on the device until a block of steps is written.

Shape key: B batch, T query position, S key position.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnscope.capture.dispatch import outside, why_unseen
from attnscope.capture.eager import in_backward
from attnscope.capture.seen import Seen
from attnscope.capture.sight import FACTS, Tokens, empty_rows, sight_of
from attnscope.capture.targets import OFFSETS, TokensCompared, compared
from attnscope.metrics.rows import SAMPLES
from attnscope.runs.probe_events import KeysSeen, RowsWithoutKeys, TargetsSeen
from attnscope.watch.guard import OnEvent
from attnscope.watch.numbers import is_readable
from attnscope.watch.step import Step

FIRST_LOOKS = 2  # steps in which attention and targets are looked at
FIRST_EMPTY = 20  # steps in which rows are looked for that see no key
MOST_TOKENS = 16  # lookups of a step that are compared with its targets
MOST_TARGETS = 4  # comparisons that are described


@dataclass(frozen=True, slots=True, kw_only=True)
class _Look:
    """Of one call.

    Attributes:
        step: of it.
        layer: its number.
        shape: B, T and S.
        facts: FACTS.
    """

    step: int
    layer: int
    shape: tuple[int, int, int]
    facts: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class _Targets:
    """Of one cross-entropy.

    Attributes:
        step: of it.
        comparisons: of its targets with the sequences of tokens that they fit.
        sequences: of tokens that the model was given.
    """

    step: int
    comparisons: tuple[TokensCompared, ...]
    sequences: int


class Sights:
    """What was looked at in the first steps.

    Invariant: no tensor of the script is kept longer than its step.
    """

    def __init__(self, *, rows: int | str, on_event: OnEvent) -> None:
        self._rows = rows
        self._on_event = on_event
        self._tokens: list[Tokens] = []
        self._looks: list[_Look] = []
        self._empty: list[tuple[int, int, Tensor]] = []
        self._targets: list[_Targets] = []
        self._described: set[int] = set()
        self._described_empty: set[int] = set()
        self._n_targets = 0

    def looks_at(self, step: Step) -> bool:
        """Whether tokens are looked at."""
        return step.number < FIRST_LOOKS

    def embedded(self, args: tuple[Any, ...]) -> None:
        """An embedding was looked up in training: the operator's arguments."""
        if len(self._tokens) >= MOST_TOKENS or not torch.is_grad_enabled() or in_backward():
            return
        if any(why_unseen(x) is not None for x in args[:2]):
            return
        padding = args[2] if len(args) > 2 else -1
        self._tokens.append(Tokens(ids=outside(args[1]).detach(), padding=padding if padding >= 0 else None))

    def attention(self, step: Step, layer: int, seen: Seen) -> None:
        """An attention call in training."""
        if step.number < FIRST_EMPTY and (empty := empty_rows(seen)) is not None:
            self._empty.append((step.number, layer, empty))
        if self.looks_at(step) and layer not in self._described:
            seed = (step.number * SAMPLES // FIRST_LOOKS + layer) % SAMPLES  # of other sequences in other layers
            facts = sight_of(seen, self._tokens, rows=self._rows, seed=seed)
            shape = (seen.shape[0], seen.shape[2], seen.shape[3])
            self._looks.append(_Look(step=step.number, layer=layer, shape=shape, facts=facts))

    def cross_entropy(self, step: Step, targets: Tensor, ignore_index: int) -> None:
        """A cross-entropy of these targets, after the tokens that the model was given."""
        tokens, self._tokens = self._tokens, []
        if not self.looks_at(step) or targets.is_floating_point() or not is_readable(targets):
            return
        sequences = {each.ids.data_ptr(): each.ids for each in tokens if _is_text(each.ids, tokens)}
        found = [
            each
            for ids in sequences.values()
            if ids.device == targets.device
            for each in compared(ids, targets, ignore_index)
        ]
        self._targets.append(_Targets(step=step.number, comparisons=tuple(found), sequences=len(sequences)))

    def end_step(self) -> None:
        """Let go of the script's tensors."""
        self._tokens.clear()

    def flush(self, step: Step) -> None:
        """Say what was found in the first steps, once they are over; waits for the device."""
        if not self.looks_at(step):
            self.finish()

    def finish(self) -> None:
        """Say what was found; waits for the device."""
        looks, self._looks = self._looks, []
        for layer in dict.fromkeys(each.layer for each in looks):
            self._described.add(layer)
            self._say_look([each for each in looks if each.layer == layer])
        empty, self._empty = self._empty, []
        for step, layer, counts in empty:
            if layer not in self._described_empty and (found := [int(n) for n in counts.tolist()])[0]:
                self._described_empty.add(layer)
                self._on_event(RowsWithoutKeys(layer=layer, rows=found[0], of=found[1]), step=step)
        targets, self._targets = self._targets, []
        self._say_targets(targets)

    def _say_look(self, looks: list[_Look]) -> None:
        sums = dict(zip(FACTS, torch.stack([each.facts for each in looks]).sum(dim=0).tolist(), strict=True))
        what = KeysSeen(
            layer=looks[0].layer,
            queries=looks[0].shape[1],
            keys=looks[0].shape[2],
            later=_share(sums["later"], sums["later_rows"]),
            later_rows=_share(sums["later_seen"], sums["later_rows"]),
            padded=_share(sums["padded"], sums["padded_rows"]),
            inverted_rows=_share(sums["inverted_rows"], sums["masked_rows"]),
            batch=looks[0].shape[0],
        )
        self._on_event(what, step=looks[0].step)

    def _say_targets(self, targets: list[_Targets]) -> None:
        """Of each cross-entropy, the sequence of tokens and the axis that its targets fit best."""
        for each in targets[: MOST_TARGETS - self._n_targets]:
            self._n_targets += 1
            said = [(one.n_positions, one.counts.tolist()) for one in each.comparisons] or [
                (0, [(0, 0)] * len(OFFSETS))
            ]
            positions, counts = max(said, key=lambda one: max(_share(*pair) or 0.0 for pair in one[1]))
            equal = {offset: _share(*pair) for offset, pair in zip(OFFSETS, counts, strict=True)}
            what = TargetsSeen(
                positions=positions,
                compared=max(int(n) for _, n in counts),
                equal_before=equal[-1],
                equal_same=equal[0],
                equal_next=equal[1],
                equal_after_next=equal[2],
                sequences=each.sequences,
            )
            self._on_event(what, step=each.step)


def _is_text(ids: Tensor, tokens: list[Tokens]) -> bool:
    """Whether ids may be those of a text: positions are the same for all sequences."""
    most = max((each.ids.shape[0] for each in tokens if each.ids.dim() == 2), default=1)
    return (ids.dim() == 2 and (ids.shape[0] > 1 or most == 1)) or (ids.dim() == 1 and most == 1)


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole else None
