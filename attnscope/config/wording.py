"""How errors show what people wrote: on one line, escaped, cut, with the nearest name beside it."""

import difflib
import json
import math
from collections.abc import Iterable, Mapping

LONGEST_PLACE = 160  # characters of a path or a command line
LONGEST_VALUE = 60


def one_line(text: object, limit: int = LONGEST_PLACE) -> str:
    """A text that does nothing in a terminal but show itself: controls escaped, the middle left out where it is long.

    Leaves what it returns unchanged, so a place may go through it twice.
    """
    shown = _escaped(str(text))
    if len(shown) <= limit:
        return shown
    half = (limit - 3) // 2
    return f"{shown[:half]}...{shown[-half:]}"


def shown(value: object) -> str:
    """A value as it would stand in TOML; whatever is long or unprintable is cut and escaped."""
    if isinstance(value, int) and abs(value) >= 10**LONGEST_VALUE:
        return f"a whole number of more than {LONGEST_VALUE} digits"  # Python may refuse to write it
    if isinstance(value, str):
        text = toml_of(value[: LONGEST_VALUE + 1])
    elif isinstance(value, Mapping):
        return "a table"
    elif isinstance(value, list | tuple):
        entries = ["[...]" if isinstance(item, list | tuple) else shown(item) for item in value[:20]]
        text = f"[{', '.join(entries)}{', ...' if len(value) > 20 else ''}]"
    else:
        text = _escaped(toml_of(value))
    return text if len(text) <= LONGEST_VALUE else f"{text[: LONGEST_VALUE - 3]}..."


def toml_of(value: object) -> str:
    """A text, flag, number or list as TOML writes it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return _escaped(json.dumps(value, ensure_ascii=False))
    if isinstance(value, list | tuple):
        return "[" + ", ".join(toml_of(item) for item in value) + "]"
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else ("inf" if value > 0 else "-inf")
    return repr(value) if isinstance(value, int | float) else str(value)


def nearest(name: object, known: Iterable[str]) -> str:
    """A sentence "Did you mean x?" with a space before it where a known name is close, else nothing."""
    if not isinstance(name, str):
        return ""
    originals = {word.lower(): word for word in known}
    close = difflib.get_close_matches(name.lower(), originals, n=1, cutoff=0.6)
    return f" Did you mean {one_line(originals[close[0]], LONGEST_VALUE)}?" if close else ""


def _escaped(text: str) -> str:
    return "".join(letter if letter.isprintable() else _escape(ord(letter)) for letter in text)


def _escape(code: int) -> str:
    return f"\\u{code:04x}" if code < 1 << 16 else f"\\U{code:08x}"
