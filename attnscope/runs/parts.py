"""One part of a run on disk: which files there are, how it ended, what happened in it."""

import json
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from zlib import crc32

from attnscope.errors import RunError
from attnscope.runs.atomic import reason_of
from attnscope.runs.checksums import KEY, has_seal, hexadecimal, is_as_sealed
from attnscope.runs.event_lines import event_in_json
from attnscope.runs.events import Event, Started
from attnscope.runs.foreign import is_folder, is_regular_file, printable, read_file
from attnscope.runs.holder import Holder, in_words, writer_of
from attnscope.runs.layout import (
    END_FILE,
    END_STATUSES,
    EVENTS_FILE,
    MAX_EVENTS_BYTES,
    MAX_JSON_BYTES,
    MAX_TABLE_BYTES,
    PART,
    TABLE_FILE,
    Manifest,
    part_folder,
    table_file,
    with_special,
)
from attnscope.runs.manifest import is_whole, read_json
from attnscope.runs.streams import TableData, decode_table

CHANGED = "was changed after it was written: its checksum is another"

MOST_START_BYTES = 1 << 20  # of the first line of an events file
MOST_ERROR = 300  # characters
NEVER = 2**62  # later than any step: of what did not happen, or what no later segment replaces


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """What was written into a file: how many bytes, and their checksum as eight hexadecimal digits."""

    bytes: int
    crc32: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PartFiles:
    """The files of one part.

    Attributes:
        index: its number.
        path: its folder.
        files: names of its tables and events files.
        segments: ascending; every one has at least one file.
        end: what end.json says; None without one, or if a later segment was begun.
        changed: when the newest record was written, in seconds since the epoch; 0 if there is none.
        writer: who writes it now, as far as can be told from here; None if nobody does.
        written: name to what was written, of the files that are known to be complete: all of a part that has ended, those of
            earlier segments of one that was gone on with.
        lost: one line per thing that cannot be used.
    """

    index: int
    path: Path
    files: frozenset[str] = frozenset()
    segments: tuple[int, ...] = ()
    end: dict[str, Any] | None = None
    changed: float = 0
    writer: Holder | None = None
    written: Mapping[str, Written] = field(default_factory=dict)
    lost: tuple[str, ...] = ()


def find_part(run: Path, index: int) -> PartFiles:
    """Look into the folder of a part; one that is not there has not begun."""
    name = part_folder(index)
    path = run / name
    try:
        if not is_folder(path):
            path.lstat()
            return PartFiles(index=index, path=path, lost=(f"{name}: is a link or no folder; not followed",))
        entries = {entry.name: entry.lstat() for entry in path.iterdir()}
        # An empty file is one whose first write failed: nothing was begun.
        entries = {entry: stats for entry, stats in entries.items() if stats.st_size or not stat.S_ISREG(stats.st_mode)}
    except FileNotFoundError:
        return PartFiles(index=index, path=path)
    except OSError as error:
        return PartFiles(index=index, path=path, lost=(f"{name}: cannot be read: {reason_of(error)}",))
    matches = [TABLE_FILE.fullmatch(entry) or EVENTS_FILE.fullmatch(entry) for entry in entries]
    segments = sorted({int(match["segment"]) for match in matches if match})
    times = [entries[match.string].st_mtime for match in matches if match]
    end: dict[str, Any] | None = None
    lost: tuple[str, ...] = ()
    if END_FILE in entries:
        try:
            end = _end_in(path / END_FILE, name=f"{name}/{END_FILE}")
        except RunError as error:
            lost = (str(error),)
    if end and segments and end.get("segment") != segments[-1]:
        end = None
    written = files_in(end.get("files")) if end else {}
    if not end and segments and segments[-1] > 0:
        started = start_of(path / table_file("events", segments[-1]))
        written = {} if started is None else files_in(started.files)
    lost += tuple(
        f"{name}/{entry}: is gone or empty; {said.bytes} bytes were written"
        for entry, said in sorted(written.items())
        if entry not in entries
    )
    return PartFiles(
        index=index,
        path=path,
        files=frozenset(match.string for match in matches if match),
        segments=tuple(segments),
        end=end,
        changed=max(times, default=0),
        writer=None if end else writer_of(path),
        written=written,
        lost=lost,
    )


def parts_of(path: Path, manifest: Manifest) -> tuple[PartFiles, ...]:
    """The parts of a run that have members."""
    return tuple(find_part(path, index) for index in sorted({m.part for m in manifest.members}))


def error_of(part: PartFiles) -> str | None:
    """What a part that failed died of, fit to show."""
    if not part.end or part.end["status"] != "failed":
        return None
    return printable(part.end.get("error") or "an error that it did not name", MOST_ERROR)


def files_in(files: object) -> dict[str, Written]:
    """The files that end.json or the event `start` lists."""
    written: dict[str, Written] = {}
    for name, said in files.items() if isinstance(files, dict) else ():
        if isinstance(said, dict) and (TABLE_FILE.fullmatch(name) or EVENTS_FILE.fullmatch(name)):
            size, crc = said.get("bytes"), said.get(KEY)
            if is_whole(size, 0, 2**62) and isinstance(crc, str):
                written[name] = Written(bytes=size, crc32=crc)
    return written


def files_as_json(files: Mapping[str, Written]) -> dict[str, object]:
    """As end.json and the event `start` list files."""
    return {name: {"bytes": written.bytes, KEY: written.crc32} for name, written in files.items()}


def files_as_found(part: PartFiles) -> dict[str, Written]:
    """The files of a part that is gone on with: as they were written where that is known, else as they are now."""
    files = dict(part.written)
    for name in sorted(part.files - files.keys()):
        try:
            data = read_file(part.path / name, name=name, limit=MAX_TABLE_BYTES)
        except RunError:
            continue
        files[name] = Written(bytes=len(data), crc32=hexadecimal(crc32(data)))
    return files


def start_of(events: Path) -> Started | None:
    """How a segment began, as the first line of its events says; None where it says nothing of it."""
    try:
        if is_regular_file(events):
            with events.open("rb") as file:
                what = _event_in(file.readline(MOST_START_BYTES).rstrip(b"\n")).what
                return what if isinstance(what, Started) else None
    except (OSError, ValueError, RecursionError):
        pass  # no reason to stop here: `read_events` reads the same file and says what is wrong with it
    return None


def _with_what_was_written(part: PartFiles, file: str, data: bytes, lost: list[str]) -> list[str]:
    """What could not be read of a file, and in how far it is not what was written."""
    said = part.written.get(file)
    if said is None:
        return lost
    if len(data) != said.bytes:
        sizes = f"has {len(data)} bytes, but {said.bytes} were written"
        return [*lost[:-1], f"{lost[-1]}; it {sizes}"] if lost else [sizes]
    return lost or [CHANGED] * (hexadecimal(crc32(data)) != said.crc32)


def strangers(run: Path, known: Iterable[int]) -> tuple[str, ...]:
    """One line per part folder that no member is in."""
    expected = {part_folder(index) for index in known}
    try:
        names = sorted(entry.name for entry in run.iterdir() if PART.fullmatch(entry.name))
    except OSError as error:
        return (f"the folder cannot be listed: {reason_of(error)}",)
    return tuple(f"{name}: no member of run.json is in it; left out" for name in names if name not in expected)


def status_of(parts: Sequence[PartFiles], writer: Holder | None) -> str:
    """finished, failed, interrupted, running or killed, of all parts together; `writer` is who writes the run now."""
    ends = {part.end["status"] if part.end else None for part in parts}
    if ends <= {"finished"}:
        return "finished"
    if writer is not None or any(part.writer is not None for part in parts):
        return "running"
    return next((status for status in ("failed", "interrupted") if status in ends), "killed")


def written_elsewhere(parts: Sequence[PartFiles], writer: Holder | None) -> str:
    """Who writes a run on another machine, in words; empty if nobody does."""
    changed = max((part.changed for part in parts), default=0)
    writers = [holder for holder in (writer, *(part.writer for part in parts)) if holder is not None]
    return next((said for holder in writers if (said := in_words(holder, changed))), "")


def read_events(part: PartFiles, segment: int) -> tuple[list[Event], list[str]]:
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
    all_sealed = any(map(has_seal, lines))  # of a file of ours, either every line has one or none
    for number, line in enumerate(lines, start=1):
        try:
            if all_sealed and not has_seal(line):
                raise ValueError
            events.append(_event_in(line))
        except (ValueError, RecursionError):
            bad.append(number)
    lost = []
    if bad:
        lost.append(f"{len(bad)} of {len(lines)} lines are no events, the first is line {bad[0]}")
    if torn:
        lost.append(f"the last {len(torn)} bytes are not a complete line")
    return events, [f"{name}: {note}" for note in _with_what_was_written(part, file, data, lost)]


def read_table(part: PartFiles, segment: int, table: str) -> TableData:
    """One table of one segment, empty where there is no file; its `lost` names the file."""
    file = table_file(table, segment)
    name = f"{part.path.name}/{file}"
    if file not in part.files:
        return decode_table(b"", table)
    try:
        data = read_file(part.path / file, name=name, limit=MAX_TABLE_BYTES)
    except RunError as error:
        return replace(decode_table(b"", table), lost=(str(error),))
    decoded = decode_table(data, table)
    notes = _with_what_was_written(part, file, data, list(decoded.lost))
    return replace(decoded, lost=tuple(f"{name}: {note}" for note in notes))


def started_with(parts: Sequence[PartFiles], index: int) -> Started | None:
    """How a part began, or another one where it did not; None where none says."""
    for part in sorted(parts, key=lambda part: (part.index != index, part.index)):
        for segment in part.segments:
            if said := start_of(part.path / table_file("events", segment)):
                return said
    return None


def gaps_in(
    part: PartFiles,
    steps: Mapping[int, TableData],
    starts: Mapping[int, Sequence[int]],
    ends: Mapping[int, int],
) -> list[str]:
    """One line for each segment of a training that goes on later than the records of those before it reach.

    Args:
        part: the part.
        steps: segment to its steps.
        starts: segment to where it says that it begins.
        ends: segment to the step from which later ones replace it.
    """
    notes: list[str] = []
    last = -1
    for segment, table in steps.items():
        steps_N = table.columns["step"]
        begins = min(starts[segment], default=0)
        if len(steps_N) and segment and begins > last + 1:
            notes.append(
                f"{part.path.name}: the records of steps {last + 1} to {begins - 1} are gone; training went on after them, at "
                f"step {begins}"
            )
        last = max(last, int(steps_N[steps_N < ends[segment]].max(initial=-1)))
    return notes


def without_steps(
    part: PartFiles, table: str, decoded: Mapping[int, TableData], steps: Mapping[int, TableData]
) -> list[str]:
    """One line for each segment in which another table goes further than the steps, which are written first."""
    notes = []
    for segment, records in decoded.items():
        last, later = (int(x.columns["step"].max(initial=-1)) for x in (steps[segment], records))
        file = table_file("steps", segment)
        if later > last and file not in part.written:  # else it was said already
            until = f"at {last}" if last >= 0 else "before the first"
            notes.append(f"{part.path.name}/{file}: {table} go on to step {later}, but steps end {until}")
    return notes


def _event_in(line: bytes) -> Event:
    event = event_in_json(json.loads(line.decode()))
    if event is None or not is_as_sealed(line):
        raise ValueError
    return event


def _end_in(path: Path, *, name: str) -> dict[str, Any]:
    end = read_json(path, name=name, limit=MAX_JSON_BYTES)
    if end.get("status") not in END_STATUSES:
        raise RunError(f"{name}: its status is none of {', '.join(END_STATUSES)}")
    return {key: with_special(value) for key, value in end.items() if key != KEY}
