"""What a run directory that somebody else made may not do: send us out of it, fill the memory, or drive a terminal.

Assumes that nobody changes the directory while it is read.
"""

import stat
from pathlib import Path

from attnscope.errors import RunError
from attnscope.runs.atomic import reason_of

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def printable(text: object, limit: int = 120) -> str:
    """One line of at most `limit` characters that does nothing but show itself.

    Control characters (C0, C1), line breaks, bidi overrides and other invisible characters are replaced. Markup is
    not touched: HTML and Markdown need their own escaping.
    """
    shown = str(text)
    cut = shown if len(shown) <= limit else shown[: limit - 1] + "…"
    return "".join(letter if letter.isprintable() else REPLACEMENT for letter in cut)


def number_in(value: object) -> float | None:
    """A number of anybody's JSON; None where it is something else, or none that a float can be."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return None


def read_file(path: Path, *, name: str, limit: int) -> bytes:
    """The bytes of a regular file; `name` is what errors call it.

    Raises:
        RunError: it is missing, a link, no file (a pipe would block), unreadable, or larger than `limit` bytes.
    """
    try:
        stats = path.lstat()
        if stat.S_ISLNK(stats.st_mode):
            raise RunError(f"{name}: is a link, which could lead out of the run; not followed")
        if not stat.S_ISREG(stats.st_mode):
            raise RunError(f"{name}: is not a file")
        if stats.st_size > limit:
            raise RunError(f"{name}: has {stats.st_size} bytes, more than the {limit} that are read")
        with path.open("rb") as file:
            return file.read(stats.st_size)  # a file that grows is read as it was
    except OSError as error:
        raise RunError(f"{name}: cannot be read: {reason_of(error)}") from None


def is_regular_file(path: Path) -> bool:
    """Whether there is a file at `path` itself, not behind a link."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return False


def is_folder(path: Path) -> bool:
    """Whether there is a folder at `path` itself, not behind a link."""
    try:
        return stat.S_ISDIR(path.lstat().st_mode)
    except OSError:
        return False
