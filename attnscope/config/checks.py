"""What a single setting may be: one small frozen class per kind of value.

Each check turns a TOML value into the value the code uses, or raises `ValueError`; `allowed` completes the sentence
"must be ...", and the caller adds file, key and value. The text of the `ValueError`, mostly empty, is one more sentence
where `allowed` does not say why.
"""

import math
import struct
from dataclasses import dataclass
from typing import TypeAlias

MAX_WHOLE = 2**31 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Whole:
    """A whole number, `low` or more and `high` or less, or one of the words in `words`."""

    low: int
    high: int = MAX_WHOLE
    words: tuple[str, ...] = ()

    @property
    def allowed(self) -> str:
        top = "" if self.high == MAX_WHOLE else f" and at most {self.high}"
        return _alternatives(f"a whole number, at least {self.low}{top}", self.words)

    def __call__(self, value: object) -> int | str:
        if isinstance(value, str) and value in self.words:
            return value
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError
        if value > self.high == MAX_WHOLE:
            raise ValueError(f"The largest is {MAX_WHOLE}.")
        if not self.low <= value <= self.high:
            raise ValueError
        return value


@dataclass(frozen=True, slots=True, kw_only=True)
class Number:
    """A finite real number within the bounds given, also after rounding to float32, or one of the words in `words`.

    Training computes in float32: there 1e39 is infinite, 1e-46 is 0 and 0.999999999 is 1.
    """

    low: float | None = None
    above: float | None = None
    below: float | None = None
    words: tuple[str, ...] = ()

    @property
    def allowed(self) -> str:
        parts = ["a finite number"]
        if self.low is not None:
            parts.append(f"at least {self.low:g}")
        if self.above is not None:
            parts.append(f"above {self.above:g}")
        if self.below is not None:
            parts.append(f"below {self.below:g}")
        text = " ".join([parts[0], " and ".join(parts[1:])]).strip()
        return _alternatives(text, self.words)

    def __call__(self, value: object) -> float | str:
        if isinstance(value, str) and value in self.words:
            return value
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise ValueError
        try:
            number = float(value)
        except OverflowError:  # a whole number of 400 digits
            raise ValueError from None
        if not self._fits(number):
            raise ValueError
        if not self._fits(rounded := _as_float32(number)):
            raise ValueError(f"In float32, which training computes in, {number!r} is {rounded:g}.")
        return number

    def _fits(self, number: float) -> bool:
        return (
            math.isfinite(number)
            and (self.low is None or number >= self.low)
            and (self.above is None or number > self.above)
            and (self.below is None or number < self.below)
        )


@dataclass(frozen=True, slots=True)
class Choice:
    """One of a few words."""

    options: tuple[str, ...]

    @property
    def allowed(self) -> str:
        return "one of " + ", ".join(self.options)

    def __call__(self, value: object) -> str:
        if not isinstance(value, str) or value not in self.options:
            raise ValueError
        return value


@dataclass(frozen=True, slots=True)
class Flag:
    """true or false."""

    @property
    def allowed(self) -> str:
        return "true or false"

    def __call__(self, value: object) -> bool:
        if not isinstance(value, bool):
            raise ValueError
        return value


@dataclass(frozen=True, slots=True)
class OneLine:
    """Any text on one line that shows itself: paths and names end up in terminals and file names."""

    @property
    def allowed(self) -> str:
        return "a text on one line, not empty and without invisible characters"

    def __call__(self, value: object) -> str:
        if not isinstance(value, str) or not value.strip() or not value.isprintable():
            raise ValueError
        return value


@dataclass(frozen=True, slots=True, kw_only=True)
class Several:
    """A list whose entries all pass `entry`; `length` of them if given. With `or_one`, also a single entry."""

    entry: Whole | Number
    length: int | None = None
    or_one: bool = False

    @property
    def allowed(self) -> str:
        count = f"{self.length} values" if self.length else "one or more values"
        one = f"{self.entry.allowed}, or " if self.or_one else ""
        return f"{one}a list of {count}, each {self.entry.allowed}"

    def __call__(self, value: object) -> object:
        if self.or_one and not isinstance(value, list | tuple):
            return self.entry(value)
        if not isinstance(value, list | tuple) or not value:
            raise ValueError
        if self.length is not None and len(value) != self.length:
            raise ValueError
        return tuple(self.entry(item) for item in value)


Check: TypeAlias = Whole | Number | Choice | Flag | OneLine | Several


def _alternatives(number: str, words: tuple[str, ...]) -> str:
    return " or ".join([number, ", ".join(words)]) if words else number


def _as_float32(number: float) -> float:
    try:
        (rounded,) = struct.unpack("f", struct.pack("f", number))
    except OverflowError:
        return math.copysign(math.inf, number)
    return float(rounded)
