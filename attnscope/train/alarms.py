"""What happened once: the first non-finite number of each kind, and the step where a member's loss left for good.

Shape key: S steps of a block, M member, L layer, H head, G group.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from attnscope.runs.outcome import LossWatch
from attnscope.train.recording import Array, Block


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One line of the events file."""

    kind: str
    step: int
    member: int | None = None
    fields: dict[str, object] = field(default_factory=dict)


class Alarms:
    """Looks through each block and reports every kind of break once per member.

    Invariant: blocks arrive in the order of their steps.
    """

    def __init__(self, n_members: int) -> None:
        self._watches = [LossWatch() for _ in range(n_members)]
        self._reported: set[tuple[int, str]] = set()

    def look(self, block: Block) -> list[Event]:
        """The events of a block, in the order of their steps."""
        events: list[Event] = []
        for m, member in enumerate(block.members):
            events += self._nonfinite(member, "loss", block.steps, block.columns["loss"][:, m])
            if len(block.head_steps):
                events += self._nonfinite(
                    member,
                    "attention logits",
                    block.head_steps,
                    block.heads["max_logit_bound"][:, m],
                    names=[f"layer {layer}" for layer in range(block.heads["entropy"].shape[2])],
                )
                # A count of NaN and Inf: turn what is not 0 into what is not finite.
                broken_SG = np.where(block.params["nonfinite"][:, m] > 0, np.nan, 0.0)
                groups = [f"layer {at} {name}" if at >= 0 else name for at, name in block.groups]
                events += self._nonfinite(
                    member, "gradient", block.head_steps, broken_SG, names=groups
                )
            events += self.feed(member, block.steps, block.columns["loss"][:, m])
        return sorted(events, key=lambda event: event.step)

    def feed(self, member: int, steps: Array, losses: Array) -> list[Event]:
        """Watch a member's loss alone; a resumed run feeds what was recorded before it went on."""
        watch = self._watches[member]
        watch.feed(steps, losses)
        if watch.diverged_at is None or (member, "diverged") in self._reported:
            return []
        self._reported.add((member, "diverged"))
        return [
            Event(kind="diverged", step=watch.diverged_at, member=member, fields={"why": watch.why})
        ]

    def _nonfinite(
        self,
        member: int,
        tensor: str,
        steps: Array,
        values: Array,
        names: Sequence[str] = (),
    ) -> list[Event]:
        bad_S = ~np.isfinite(values.reshape(len(steps), -1)).all(axis=1)
        if not bad_S.any() or (member, tensor) in self._reported:
            return []
        self._reported.add((member, tensor))
        first = int(bad_S.argmax())
        fields: dict[str, object] = {"tensor": tensor}
        if names:
            broken = ~np.isfinite(values[first]).reshape(len(names), -1).all(axis=1)
            fields["where"] = [name for name, bad in zip(names, broken, strict=True) if bad]
        return [Event(kind="nonfinite", step=int(steps[first]), member=member, fields=fields)]
