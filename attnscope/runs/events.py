"""What happened once in a run: a line of an events file."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """What happened once.

    Attributes:
        kind: nonfinite, diverged, dropped, evaluation, attention, not_measured, ...
        step: at which it did.
        member: index within the part; None = it concerns all of them.
        fields: what the kind has to tell, as JSON understands it.
    """

    kind: str
    step: int
    member: int | None = None
    fields: dict[str, Any] = field(default_factory=dict)
