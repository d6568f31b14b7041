"""What an export wrote, and why it could not be written."""

from collections.abc import Mapping
from dataclasses import dataclass

from attnscope.errors import AttnscopeError


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """What an export wrote, and where.

    Attributes:
        place: folder, or address of a server.
        counts: file or member -> how much of it there is.
        unit: of the counts, rows or values.
        lost: one line per thing in the run that could not be read.
        next_command: shows what was written.
    """

    place: str
    counts: Mapping[str, int]
    unit: str
    lost: tuple[str, ...]
    next_command: str


def not_installed(error: ImportError, package: str) -> AttnscopeError:
    """One line for a package that a target needs, or one that it needs itself."""
    name = (error.name or package).partition(".")[0]
    return AttnscopeError(f'{name} is not installed. Install it: pip install "attnscope[trackers]"')
