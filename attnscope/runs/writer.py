"""Fills a run directory: one `RunWriter` per run, one `PartWriter` per part, which no other process writes to meanwhile.

What `append` and `event` were given is with the operating system when they return: `kill -9` loses nothing of it.
"""

import contextlib
import errno
import os
import secrets
import shlex
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from io import FileIO
from pathlib import Path
from typing import NamedTuple, NoReturn
from zlib import crc32

import numpy as np
from numpy.typing import ArrayLike

from attnscope.config import Config, Member, to_table, to_toml
from attnscope.errors import RunError, RunWriteError
from attnscope.runs.atomic import reason_of, remedy_of, replace_file, sync_folder
from attnscope.runs.checksums import hexadecimal, sealed
from attnscope.runs.foreign import is_folder
from attnscope.runs.holder import hold, release
from attnscope.runs.layout import (
    CONFIG_FILE,
    END_FILE,
    END_STATUSES,
    MAX_PART,
    RUN_FILE,
    SCHEMA_VERSION,
    TABLE_FILE,
    Manifest,
    MemberEntry,
    part_folder,
    segment_of,
    table_file,
    to_json,
)
from attnscope.runs.manifest import encode_manifest, read_manifest
from attnscope.runs.parts import Written, files_as_found, files_as_json, find_part
from attnscope.runs.streams import END_OF_STREAM, encode_batch, encode_schema


class RunWriter:
    """A run directory that exists and may be written to."""

    path: Path

    def __init__(self, path: Path) -> None:
        """Use `create` or `resume`."""
        self.path = path

    @classmethod
    def create(
        cls,
        path: Path,
        *,
        command: Sequence[str],
        config: Config | None,
        members: Sequence[Member | MemberEntry],
        environment: Mapping[str, object],
        data: Mapping[str, object],
    ) -> "RunWriter":
        """Make a new run directory; it appears whole, with run.json in it, or not at all.

        Args:
            path: of the directory; folders above it are made.
            command: the command line, word by word.
            config: resolved; None where training is watched that attnscope did not configure.
            members: from `attnscope.config.members_of`, or as run.json will name them.
            environment: versions and device, as JSON understands them.
            data: source, fingerprint, and the losses to compare with under `reference`.

        Raises:
            RunError: there is something at `path` already.
            RunWriteError: the place cannot be written.
        """
        manifest = Manifest(
            schema_version=SCHEMA_VERSION,
            kind="watch" if config is None else "train",
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            command=tuple(command),
            config={} if config is None else to_table(config),
            members=tuple(
                MemberEntry(
                    name=member.name, part=member.part, index=member.index, settings=member.settings
                )
                for member in members
            ),
            environment=dict(environment),
            data=dict(data),
        )
        if os.path.lexists(path):
            _refuse(path, resumable=config is not None)
        scratch = path.parent / f".{secrets.token_hex(8)}.new"
        above: list[Path] = []
        try:
            above = [folder for folder in path.parents if not folder.exists()]
            path.parent.mkdir(parents=True, exist_ok=True)
            scratch.mkdir()
            if config is not None:
                replace_file(scratch / CONFIG_FILE, to_toml(config).encode())
            replace_file(scratch / RUN_FILE, encode_manifest(manifest))
            scratch.rename(path)
        except BaseException as error:
            shutil.rmtree(scratch, ignore_errors=True)
            for folder in above:
                with contextlib.suppress(OSError):
                    folder.rmdir()
            if not isinstance(error, OSError):
                raise
            if error.errno in (errno.EEXIST, errno.ENOTEMPTY) and is_folder(path):
                _refuse(path, resumable=config is not None)  # somebody was faster
            reason = reason_of(error)
            if isinstance(error, FileExistsError | NotADirectoryError):
                reason = f"{next(above for above in path.parents if above.exists())} is a file"
            raise RunWriteError(
                f"{path}: the run directory cannot be made: {reason}. "
                f"{remedy_of(error)}, or choose another place with --out."
            ) from None
        sync_folder(path.parent)
        return cls(path)

    @classmethod
    def resume(cls, path: Path) -> "RunWriter":
        """Open a run directory to go on with it.

        Raises:
            RunError: it is no run directory, its run.json was changed, or its format is not the one written here.
        """
        version = read_manifest(path, as_written=True).schema_version
        if version != SCHEMA_VERSION:
            raise RunError(
                f"{path} has format {version}, but format {SCHEMA_VERSION} would be added to it. "
                "Go on with the attnscope that made it, or start a new run."
            )
        return cls(path)

    def divide_part(self, index: int) -> tuple[int, int]:
        """Move the members of a part into two new ones, half each, and delete what it recorded.

        For a part that was too large for the machine. run.json is replaced, so nobody else may do the same meanwhile.

        Raises:
            RunError: run.json cannot be used, or the part has one member only.
            RunWriteError: the folder cannot be written.
        """
        manifest = read_manifest(self.path)
        mine = [entry for entry in manifest.members if entry.part == index]
        new = 1 + max(entry.part for entry in manifest.members)
        if len(mine) < 2 or new + 1 > MAX_PART:
            raise RunError(f"{self.path}: {part_folder(index)} cannot be divided further.")
        half = -(-len(mine) // 2)
        place = {entry.index: at for at, entry in enumerate(mine)}
        members = tuple(
            replace(entry, part=new + (at >= half), index=at - half * (at >= half))
            if entry.part == index and (at := place[entry.index]) >= 0
            else entry
            for entry in manifest.members
        )
        data = dict(manifest.data)
        others = data.get("parts")
        if isinstance(others, dict) and str(index) in others:
            data["parts"] = {
                **others,
                str(new): others[str(index)],
                str(new + 1): others[str(index)],
            }
        try:
            replace_file(
                self.path / RUN_FILE, encode_manifest(replace(manifest, members=members, data=data))
            )
        except OSError as error:
            raise RunWriteError(
                f"{self.path / RUN_FILE}: {reason_of(error)}. {remedy_of(error)} and resume the run."
            ) from None
        # From here on nobody looks into the old folder; what cannot be deleted is only in the way.
        shutil.rmtree(self.path / part_folder(index), ignore_errors=True)
        return new, new + 1

    def part(self, index: int, *, first_step: int = 0, threads: int | None = None) -> "PartWriter":
        """Start a new segment of a part; from `first_step` on it replaces what earlier segments recorded.

        Args:
            index: of the part.
            first_step: where it begins.
            threads: that it is trained with, on which the last digits of sums depend; None = unknown.

        Raises:
            RunError: another process writes it.
            RunWriteError: the folder cannot be written.
        """
        return PartWriter(self.path, index, first_step=first_step, threads=threads)


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
            self.event(
                "start",
                step=first_step,
                segment=self.segment,
                threads=threads,
                files=files_as_json(self._before),
            )
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

    def event(self, kind: str, *, step: int, member: int | None = None, **fields: object) -> None:
        """Write one line of what happened once.

        Args:
            kind: one word.
            step: updates done when it happened.
            member: index within the part; None if it concerns all.
            **fields: anything JSON understands; numbers that are not finite are fine.

        Raises:
            RunWriteError: the disk did not take it.
        """
        line = to_json({"kind": kind, "step": step, "member": member, "fields": fields})
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
        own = {
            name: Written(bytes=done.bytes, crc32=hexadecimal(done.crc32))
            for name, done in self._done.items()
        }
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
            self._done[name] = _Done(
                done.bytes + len(data), crc32(data, done.crc32), done.writes + 1
            )
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
            rest = (
                f"{kept} {remedy_of(error)}, then: attnscope train --resume {shlex.quote(str(run))}"
            )
        self._failure = RunWriteError(f"{path}: {reason_of(error)}. {rest}")
        raise self._failure from None


def next_run_path(folder: Path, stem: str) -> Path:
    """The first of folder/stem-001, stem-002, ... that does not exist."""
    number = 1
    while os.path.lexists(path := folder / f"{stem}-{number:03d}"):
        number += 1
    return path


def _refuse(path: Path, *, resumable: bool) -> NoReturn:
    way_out = "Choose another --name."
    if resumable and (path / RUN_FILE).is_file():
        way_out = (
            "Choose another --name, or go on with it: "
            f"attnscope train --resume {shlex.quote(str(path))}"
        )
    raise RunError(f"{path} already exists. {way_out}")
