"""Checksums (CRC-32, as zlib and gzip have it): they tell what was damaged later from what was written.

A JSON object is sealed by a last key, `crc32`, over all the bytes before it. What earlier versions wrote has none and is
taken as it is; so is what somebody edited on purpose and took the key out of.
"""

import re
from zlib import crc32

_SEAL = re.compile(rb',\s*"crc32": "(?P<crc>[0-9a-f]{8})"\s*\}\s*')
KEY = "crc32"


def hexadecimal(crc: int) -> str:
    """A checksum as it is written: eight digits."""
    return f"{crc:08x}"


def sealed(text: str, *, space: str = " ") -> str:
    """A JSON object with its checksum; `space` stands before the key."""
    assert text.endswith("}") and len(text) > 2, "only an object with something in it can be sealed"
    body = text[:-1].rstrip()
    end = "\n" if "\n" in space else ""
    return f'{body},{space}"{KEY}": "{hexadecimal(crc32(body.encode()))}"{end}}}'


def has_seal(data: bytes) -> bool:
    """Whether the bytes of a JSON object end with a checksum."""
    return _seal_of(data) is not None


def is_as_sealed(data: bytes) -> bool:
    """Whether the bytes of a JSON object fit their checksum; True where they have none."""
    seal = _seal_of(data)
    return seal is None or int(seal["crc"], 16) == crc32(data[: seal.start()])


def _seal_of(data: bytes) -> re.Match[bytes] | None:
    at = data.rfind(b'"crc32"')
    comma = data.rfind(b",", 0, at) if at > 0 else -1
    return _SEAL.fullmatch(data, comma) if comma >= 0 else None
