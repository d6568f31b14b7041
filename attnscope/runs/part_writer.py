"""Fills the folder of one part, which no other process writes to meanwhile.

What `append` and `event` were given is with the operating system when they return: `kill -9` loses nothing of it.
"""

import contextlib
import errno
import os
import shlex
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from io import FileIO
from pathlib import Path
from typing import NamedTuple, NoReturn
from zlib import crc32

import numpy as np
from numpy.typing import ArrayLike

from attnscope.errors import RunWriteError
from attnscope.runs.atomic import reason_of, remedy_of, replace_file
from attnscope.runs.checksums import hexadecimal, sealed
from attnscope.runs.event_lines import event_as_json
from attnscope.runs.events import Event, Started
from attnscope.runs.foreign import is_folder
from attnscope.runs.holder import hold, release
from attnscope.runs.layout import END_FILE, END_STATUSES, TABLE_FILE, part_folder, segment_of, table_file, to_json
from attnscope.runs.parts import Written, files_as_found, files_as_json, find_part
from attnscope.runs.streams import END_OF_STREAM, encode_batch, encode_schema


class _Done(NamedTuple):
    """What is whole in a file: bytes, their checksum, and how many writes it took."""

    bytes: int = 0
    crc32: int = 0
    writes: int = 0


class PartWriter:
    """Appends to the tables and events of one part.

    Invariants: a file holds whole batches or lines as far as `_done` says, whatever interrupted the last write. After a
    failed write nothing is written any more and the same error is raised again.
    """

    path: Path
    segment: int

    def __init__(self, run: Path, index: int, *, first_step: int, threads: int | None) -> None:
        """Use `RunWriter.part`."""
        self.path = path = run / part_folder(index)
        self.segment = 0
        self._files: dict[str, FileIO] = {}
        self._held: int | None = None
        self._done: dict[str, _Done] = {}
        self._before: dict[str, Written] = {}
        self._closed = False
        self._failure: RunWriteError | None = None
        self._last_step: int | None = None
        self._started = time.perf_counter()
        try:
            if not is_folder(path):
                path.mkdir()
            self._held = hold(path, run=run)
            self.segment = 1 + max((segment_of(entry.name) for entry in path.iterdir()), default=-1)
            # Where end.json goes, nobody else knows it any more.
            self._before = files_as_found(find_part(run, index))
            started = Started(segment=self.segment, threads=threads, files=files_as_json(self._before))
            self.event(Event(step=first_step, what=started))
            (path / END_FILE).unlink(missing_ok=True)
        except OSError as error:
            self._fail(path, error)

    def append(self, table: str, columns: Mapping[str, ArrayLike]) -> None:
        """Write rows as one batch.

        Args:
            table: steps, heads or params.
            columns: every column of the table in `layout.COLUMNS`, all of one length; cast to its type.

        Raises:
            RunWriteError: the disk did not take them.
        """
        name = table_file(table, self.segment)
        number = self._done.get(name, _Done()).writes
        batch = encode_batch(table, columns, number=number)
        steps = np.asarray(columns["step"])
        if not len(steps):
            return
        self._write(name, batch if number else encode_schema(table) + batch)
        if table == "steps":
            self._last_step = int(steps.max())

    def event(self, event: Event) -> None:
        """Write one line of what happened once.

        Raises:
            RunWriteError: the disk did not take it.
        """
        line = to_json(event_as_json(event))
        self._write(table_file("events", self.segment), sealed(line).encode() + b"\n")

    def finish(self, status: str, **fields: object) -> None:
        """Close the files and say in end.json how the part ended; after a failed write that is always "failed".

        Said twice, the last one counts.

        Args:
            status: finished, interrupted or failed.
            **fields: more to say; `wall_s`, `last_step` and `ended` are there anyway.

        Raises:
            RunWriteError: the disk did not take it.
        """
        assert status in END_STATUSES, status
        said = {
            "status": status,
            "segment": self.segment,
            "last_step": self._last_step,
            "wall_s": time.perf_counter() - self._started,
            "ended": datetime.now(UTC).isoformat(timespec="seconds"),
            **fields,
        }
        path = self.path / END_FILE
        if self._failure:
            said |= {"status": "failed", "error": str(self._failure)}
            with contextlib.suppress(OSError):
                replace_file(path, self._end(said))
            return
        try:
            for name, file in self._files.items():
                if TABLE_FILE.fullmatch(name):
                    self._write(name, END_OF_STREAM)
                os.fsync(file.fileno())
            replace_file(path, self._end(said))
        except OSError as error:
            self._fail(path, error)
        finally:
            self.close()

    def _end(self, said: Mapping[str, object]) -> bytes:
        """The bytes of end.json: what is said, and which files there must be."""
        own = {name: Written(bytes=done.bytes, crc32=hexadecimal(done.crc32)) for name, done in self._done.items()}
        return sealed(to_json({**said, "files": files_as_json({**self._before, **own})})).encode()

    def close(self) -> None:
        """Close the files and say nothing; a reader takes the part for killed."""
        self._closed = True
        held, self._held = self._held, None
        for file in self._files.values():
            with contextlib.suppress(OSError):
                file.close()
        self._files.clear()
        if held is not None:
            release(self.path, held)

    def _write(self, name: str, data: bytes) -> None:
        if self._failure:
            raise self._failure
        assert not self._closed, "written to after finish or close"
        path = self.path / name
        try:
            if name not in self._files:
                self._files[name] = FileIO(path, "ab")
            file, done = self._files[name], self._done.get(name, _Done())
            if not os.fstat(file.fileno()).st_nlink:
                raise FileNotFoundError(errno.ENOENT, "The file was deleted while it was written")
            if file.tell() != done.bytes:  # the last write was interrupted, by Ctrl-C perhaps
                file.truncate(done.bytes)
                file.seek(done.bytes)
            rest = memoryview(data)
            while rest:
                rest = rest[file.write(rest) :]
            # One assignment: an interrupt must not find half of it.
            self._done[name] = _Done(done.bytes + len(data), crc32(data, done.crc32), done.writes + 1)
        except OSError as error:
            with contextlib.suppress(OSError, KeyError):  # half a batch helps nobody
                self._files[name].truncate(self._done.get(name, _Done()).bytes)
            self._fail(path, error)

    def _fail(self, path: Path, error: OSError) -> NoReturn:
        self.close()
        run = self.path.parent
        if error.errno == errno.ENOENT:
            rest = "The run directory was taken away. Start a new run."
        else:
            kept = "What was recorded before is kept."
            if self._last_step is not None:
                kept = f"The records up to step {self._last_step} are kept."
            rest = f"{kept} {remedy_of(error)}, then: attnscope train --resume {shlex.quote(str(run))}"
        self._failure = RunWriteError(f"{path}: {reason_of(error)}. {rest}")
        raise self._failure from None
