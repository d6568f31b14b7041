"""Lines of events files: what each kind of event becomes there, and what is understood of a line.

A line may be of an older or a newer version, or anybody's: a field that is missing or of a wrong type is its default, or None
where it may be. Where it has neither, and where the kind is not known, the event is `Untyped`.
"""

from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from typing import Any

import numpy as np

from attnscope.runs.events import EVENTS, Event, NotRecorded, Place, Untyped, What, place_in_words
from attnscope.runs.foreign import number_in, printable
from attnscope.runs.layout import MAX_INDEX, with_special
from attnscope.runs.manifest import is_whole

PLACES = "places"  # the field that says of what stands in `where` in words which layers, groups and paths they are

MOST_DEEP = 4  # levels of lists and dictionaries in a field
MOST_TEXT = 500  # characters of what is no plain value in a field
MOST_WHOLE = 2**53  # beyond, a float is no exact whole number


def event_as_json(event: Event) -> dict[str, object]:
    """The line of an event, for `layout.to_json`."""
    return {"kind": event.kind, "step": event.step, "member": event.member, "fields": fields_of(event)}


def fields_of(event: Event) -> Mapping[str, object]:
    """What the line of an event tells besides its kind, step and member: as it was read, or as it will be written."""
    return _fields_of(event.what) if event.as_read is None else event.as_read


def event_in_json(line: object) -> Event | None:
    """The event of a line that JSON was read from; None where it is none, whatever else it is."""
    if not isinstance(line, dict):
        return None
    kind, step, member, written = (line.get(key) for key in ("kind", "step", "member", "fields"))
    if (
        not isinstance(kind, str)
        or not is_whole(step, 0, 2**31 - 1)
        or not (member is None or is_whole(member, 0, MAX_INDEX))
        or not isinstance(written, dict)
    ):
        return None
    as_read = {key: with_special(value) for key, value in written.items()}
    return Event(step=step, member=member, what=_what_in(printable(kind, 40), as_read), as_read=as_read)


def _fields_of(what: What) -> dict[str, object]:
    """The fields of a line, as JSON understands them; an optional one that is None is left out."""
    if isinstance(what, Untyped | NotRecorded):
        table = what.fields if isinstance(what, Untyped) else what.why_empty
        return {name: as_plain(value) for name, value in table.items()}
    plain: dict[str, object] = {}
    for field in fields(what):
        value = getattr(what, field.name)
        if value is None and field.default is None:
            continue
        if field.type in (tuple[Place, ...], tuple[Place, ...] | None):
            plain[field.name] = [place.words for place in value]
            plain[PLACES] = [_place_as_json(place) for place in value]
        else:
            plain[field.name] = as_plain(value)
    return plain


def as_plain(value: object, deep: int = MOST_DEEP) -> object:
    """What JSON understands; anything else, a symbolic size among them, as text."""
    if value is None or isinstance(value, bool | int | float | str | np.ndarray | np.generic):
        return value
    if deep and isinstance(value, Mapping):
        return {str(key): as_plain(item, deep - 1) for key, item in value.items()}
    if deep and isinstance(value, list | tuple | set | frozenset):
        return [as_plain(item, deep - 1) for item in value]
    try:
        return str(value)[:MOST_TEXT]
    except Exception:
        return type(value).__name__


def _what_in(kind: str, as_read: Mapping[str, object]) -> What:
    what = EVENTS.get(kind)
    if what is NotRecorded:
        return NotRecorded(why_empty={key: why for key, why in as_read.items() if isinstance(why, str)})
    values: dict[str, Any] = {}
    for field in () if what is None else fields(what):
        value = _READERS[field.type](as_read, field.name)
        if value is not None or field.type in _OPTIONAL:
            values[field.name] = value
        elif field.default is MISSING and field.default_factory is MISSING:
            what = None
            break
    return Untyped(kind=kind, fields=as_read) if what is None else what(**values)


def _text(as_read: Mapping[str, object], name: str) -> str | None:
    value = as_read.get(name)
    return value if isinstance(value, str) else None


def _texts(as_read: Mapping[str, object], name: str) -> tuple[str, ...] | None:
    value = as_read.get(name)
    return tuple(value) if isinstance(value, list) and all(isinstance(text, str) for text in value) else None


def _whole(as_read: Mapping[str, object], name: str) -> int | None:
    value = as_read.get(name)
    return value if is_whole(value, -MOST_WHOLE, MOST_WHOLE) else None


def _flag(as_read: Mapping[str, object], name: str) -> bool | None:
    value = as_read.get(name)
    return value if isinstance(value, bool) else None


def _number(as_read: Mapping[str, object], name: str) -> float | None:
    return number_in(as_read.get(name))


def _table(as_read: Mapping[str, object], name: str) -> Mapping[str, object] | None:
    value = as_read.get(name)
    return value if isinstance(value, dict) else None


def _shapes(as_read: Mapping[str, object], name: str) -> tuple[tuple[object, ...], ...] | None:
    value = as_read.get(name)
    return tuple(tuple(sizes) for sizes in value if isinstance(sizes, list)) if isinstance(value, list) else None


def _places(as_read: Mapping[str, object], name: str) -> tuple[Place, ...] | None:
    """Older runs have places in words alone."""
    texts, tables = _texts(as_read, name), as_read.get(PLACES)
    if texts is None:
        return None
    known = [_place_in_json(table) for table in tables] if isinstance(tables, list) else []
    if len(known) != len(texts):
        known = [None] * len(texts)
    return tuple(place or place_in_words(text) for place, text in zip(known, texts, strict=True))


def _place_as_json(place: Place) -> dict[str, object]:
    table = {"layer": place.layer, "group": place.group, "path": place.path}
    return {name: value for name, value in table.items() if value is not None}


def _place_in_json(table: object) -> Place | None:
    if not isinstance(table, dict):
        return None
    layer, group, path = table.get("layer"), _text(table, "group"), _text(table, "path")
    place = Place(layer=layer if is_whole(layer, 0, MAX_INDEX) else None, group=group, path=path)
    return None if place == Place() else place


# How a field of each type is read: from the fields of a line and its name to a value, None where there is none of the type.
_READERS: Mapping[object, Callable[[Mapping[str, object], str], object]] = {
    str: _text,
    bool: _flag,
    bool | None: _flag,
    int: _whole,
    int | None: _whole,
    float: _number,
    float | None: _number,
    tuple[str, ...]: _texts,
    tuple[tuple[object, ...], ...]: _shapes,
    tuple[Place, ...]: _places,
    tuple[Place, ...] | None: _places,
    Mapping[str, object]: _table,
}
_OPTIONAL = (bool | None, int | None, float | None, tuple[Place, ...] | None)
