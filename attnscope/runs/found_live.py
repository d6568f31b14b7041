"""What a rule found while training went on: the event, and the line that is said of it."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from attnscope.runs.foreign import printable

MOST_NAMED = 3  # members
MOST_SAID = 400  # characters

_SENTENCE = re.compile(r".+?\.(?= [A-Z]|$)", re.DOTALL)  # "0.97 of" and "q.k is" end none


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundLive:
    """`finding`: a rule found this in what was recorded up to the step of the event, and no earlier.

    Attributes:
        rule: its name.
        severity: at that step; it may become worse.
        title: of the finding.
        members: in which it had not been found before.
        summary: of the finding.
    """

    rule: str
    severity: str
    title: str
    members: tuple[str, ...]
    summary: str

    @property
    def of_members(self) -> str:
        """Its title, and the members."""
        return printable(f"{self.title} ({_named(self.members)})", MOST_SAID)

    @property
    def in_short(self) -> str:
        """Its title, the members, and the first sentence of the summary."""
        sentence = _SENTENCE.match(self.summary)
        return printable(f"{self.of_members}: {sentence[0] if sentence else self.summary}", MOST_SAID)


def line_of(step: int, found: FoundLive, width: int | None = None) -> str:
    """What is said of it while training goes on.

    Args:
        step: of the event.
        found: at that step.
        width: characters that there is room for; None = as many as it takes.
    """
    line = f"step {step}: {found.severity}: {found.in_short}"
    return line if width is None or len(line) <= width else f"{line[: max(width - 3, 0)]}..."


def _named(members: Sequence[str]) -> str:
    more = f" and {len(members) - MOST_NAMED} more" if len(members) > MOST_NAMED else ""
    return f"{', '.join(members[:MOST_NAMED])}{more}"
