"""Makes a run directory: one `RunWriter` per run, which starts a `PartWriter` per part."""

import contextlib
import errno
import os
import secrets
import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import NoReturn

from attnscope.config import Config, Member, to_table, to_toml
from attnscope.errors import RunError, RunWriteError
from attnscope.runs.atomic import reason_of, remedy_of, replace_file, sync_folder
from attnscope.runs.foreign import is_folder
from attnscope.runs.layout import CONFIG_FILE, MAX_PART, RUN_FILE, SCHEMA_VERSION, Manifest, MemberEntry, part_folder
from attnscope.runs.manifest import encode_manifest, read_manifest
from attnscope.runs.part_writer import PartWriter


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
                MemberEntry(name=member.name, part=member.part, index=member.index, settings=member.settings)
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
        at_of = {entry.index: at for at, entry in enumerate(mine)}
        members = tuple(
            replace(entry, part=new + (at >= half), index=at - half * (at >= half))
            if entry.part == index and (at := at_of[entry.index]) >= 0
            else entry
            for entry in manifest.members
        )
        data = dict(manifest.data)
        others = data.get("parts")
        if isinstance(others, dict) and str(index) in others:
            data["parts"] = {**others, str(new): others[str(index)], str(new + 1): others[str(index)]}
        try:
            replace_file(self.path / RUN_FILE, encode_manifest(replace(manifest, members=members, data=data)))
        except OSError as error:
            raise RunWriteError(
                f"{self.path / RUN_FILE}: {reason_of(error)}. {remedy_of(error)} and resume the run."
            ) from None
        # From here on nobody looks into the old folder; what cannot be deleted is only in the way.
        shutil.rmtree(self.path / part_folder(index), ignore_errors=True)
        return new, new + 1

    def part(self, index: int, *, first_step: int = 0, threads: int | None = None) -> PartWriter:
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


def next_run_path(folder: Path, stem: str) -> Path:
    """The first of folder/stem-001, stem-002, ... that does not exist."""
    number = 1
    while os.path.lexists(path := folder / f"{stem}-{number:03d}"):
        number += 1
    return path


def _refuse(path: Path, *, resumable: bool) -> NoReturn:
    way_out = "Choose another --name."
    if resumable and (path / RUN_FILE).is_file():
        way_out = f"Choose another --name, or go on with it: attnscope train --resume {shlex.quote(str(path))}"
    raise RunError(f"{path} already exists. {way_out}")
