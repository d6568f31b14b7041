"""One part of a run on disk: which files there are, how it ended, what happened in it."""

import json
import stat
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from attnscope.errors import RunError
from attnscope.runs.atomic import reason_of
from attnscope.runs.foreign import is_folder, printable, read_file
from attnscope.runs.layout import (
    END_FILE,
    END_STATUSES,
    EVENTS_FILE,
    MAX_EVENTS_BYTES,
    MAX_INDEX,
    MAX_JSON_BYTES,
    MAX_TABLE_BYTES,
    PART,
    TABLE_FILE,
    part_folder,
    table_file,
    with_special,
)
from attnscope.runs.manifest import is_whole, read_json
from attnscope.runs.streams import Table, decode_table

RUNNING_SECONDS = 5  # without end.json, but written to so recently: still running


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """The files of one part.

    Attributes:
        index: its number.
        path: its folder.
        files: names of its tables and events files.
        segments: ascending; every one has at least one file.
        end: what end.json says; None without one, or if a later segment was begun.
        changed: when the newest file was written to, in seconds since the epoch; 0 if there is none.
        lost: one line per thing that cannot be used.
    """

    index: int
    path: Path
    files: frozenset[str] = frozenset()
    segments: tuple[int, ...] = ()
    end: dict[str, Any] | None = None
    changed: float = 0
    lost: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One line of an events file."""

    kind: str
    step: int
    member: int | None
    fields: dict[str, Any]


def find_part(run: Path, index: int) -> Part:
    """Look into the folder of a part; one that is not there has not begun."""
    name = part_folder(index)
    path = run / name
    try:
        if not is_folder(path):
            path.lstat()
            return Part(
                index=index, path=path, lost=(f"{name}: is a link or no folder; not followed",)
            )
        entries = {entry.name: entry.lstat() for entry in path.iterdir()}
        # An empty file is one whose first write failed: nothing was begun.
        entries = {
            entry: found
            for entry, found in entries.items()
            if found.st_size or not stat.S_ISREG(found.st_mode)
        }
    except FileNotFoundError:
        return Part(index=index, path=path)
    except OSError as error:
        return Part(index=index, path=path, lost=(f"{name}: cannot be read: {reason_of(error)}",))
    found = [TABLE_FILE.fullmatch(entry) or EVENTS_FILE.fullmatch(entry) for entry in entries]
    segments = sorted({int(match["segment"]) for match in found if match})
    times = [entry.st_mtime for entry in entries.values() if stat.S_ISREG(entry.st_mode)]
    end: dict[str, Any] | None = None
    lost: tuple[str, ...] = ()
    if END_FILE in entries:
        try:
            end = _end_in(path / END_FILE, name=f"{name}/{END_FILE}")
        except RunError as error:
            lost = (str(error),)
    if end and segments and end.get("segment") != segments[-1]:
        end = None
    return Part(
        index=index,
        path=path,
        files=frozenset(match.string for match in found if match),
        segments=tuple(segments),
        end=end,
        changed=max(times, default=0),
        lost=lost,
    )


def strangers(run: Path, known: Iterable[int]) -> tuple[str, ...]:
    """One line per part folder that no member is in."""
    expected = {part_folder(index) for index in known}
    try:
        found = sorted(entry.name for entry in run.iterdir() if PART.fullmatch(entry.name))
    except OSError as error:
        return (f"the folder cannot be listed: {reason_of(error)}",)
    return tuple(
        f"{name}: no member of run.json is in it; left out"
        for name in found
        if name not in expected
    )


def status_of(parts: Sequence[Part]) -> str:
    """finished, failed, interrupted, running or killed, of all parts together."""
    ends = {part.end["status"] if part.end else None for part in parts}
    for status in ("failed", "interrupted"):
        if status in ends:
            return status
    if None not in ends:
        return "finished"
    return "running" if any(is_recent(part) for part in parts) else "killed"


def is_recent(part: Part) -> bool:
    """Whether the part was written to just now."""
    return abs(time.time() - part.changed) < RUNNING_SECONDS


def read_events(part: Part, segment: int) -> tuple[list[Event], list[str]]:
    """The events of one segment, and one line for each thing that could not be read."""
    file = table_file("events", segment)
    if file not in part.files:
        return [], []
    name = f"{part.path.name}/{file}"
    try:
        data = read_file(part.path / file, name=name, limit=MAX_EVENTS_BYTES)
    except RunError as error:
        return [], [str(error)]
    *lines, torn = data.split(b"\n")
    events: list[Event] = []
    bad: list[int] = []
    for number, line in enumerate(lines, start=1):
        try:
            events.append(_event_in(line))
        except (ValueError, RecursionError):
            bad.append(number)
    lost = []
    if bad:
        lost.append(
            f"{name}: {len(bad)} of {len(lines)} lines are no events, the first is line {bad[0]}"
        )
    if torn:
        lost.append(f"{name}: the last {len(torn)} bytes are not a complete line")
    return events, lost


def read_table(part: Part, segment: int, table: str) -> Table:
    """One table of one segment, empty where there is no file; its `lost` names the file."""
    file = table_file(table, segment)
    name = f"{part.path.name}/{file}"
    data = b""
    lost: tuple[str, ...] = ()
    if file in part.files:
        try:
            data = read_file(part.path / file, name=name, limit=MAX_TABLE_BYTES)
        except RunError as error:
            lost = (str(error),)
    found = decode_table(data, table)
    return replace(found, lost=lost + tuple(f"{name}: {note}" for note in found.lost))


def _event_in(line: bytes) -> Event:
    value = json.loads(line.decode())
    if not isinstance(value, dict):
        raise ValueError
    kind, step, member, fields = (value.get(key) for key in ("kind", "step", "member", "fields"))
    if (
        not isinstance(kind, str)
        or not is_whole(step, 0, 2**31 - 1)
        or not (member is None or is_whole(member, 0, MAX_INDEX))
        or not isinstance(fields, dict)
    ):
        raise ValueError
    special = {key: with_special(item) for key, item in fields.items()}
    return Event(kind=printable(kind, 40), step=step, member=member, fields=special)


def _end_in(path: Path, *, name: str) -> dict[str, Any]:
    end = read_json(path, name=name, limit=MAX_JSON_BYTES)
    if end.get("status") not in END_STATUSES:
        raise RunError(f"{name}: its status is none of {', '.join(END_STATUSES)}")
    return {key: with_special(value) for key, value in end.items()}
