"""The folder of an export, which appears whole or not at all; and names for what is in it."""

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from attnscope.errors import AttnscopeError, RunError, RunWriteError
from attnscope.runs.atomic import reason_of, sync_folder
from attnscope.runs.foreign import is_folder, printable
from attnscope.runs.reader import Run

EXPORT_FOLDER = "export"  # in the run directory, with a folder for each target
LONGEST_NAME = 60  # characters, of four bytes at most: file systems take 255 bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class NewFolder:
    """Write into `scratch`; it will be `final`."""

    scratch: Path
    final: Path


@contextmanager
def new_folder(run: Run, target: str, out: Path | None) -> Iterator[NewFolder]:
    """A folder that is put in its place when everything is in it.

    Args:
        run: of the export.
        target: of the export.
        out: the folder, which must be empty or not exist. None = export/<target> in the run directory, where an
            earlier export is replaced.

    Raises:
        AttnscopeError: `out` exists.
        RunError: the default folder leads out of the run.
        RunWriteError: it cannot be written.
    """
    default = run.path / EXPORT_FOLDER / target
    final = default if out is None else out
    is_default = os.path.realpath(final) == os.path.realpath(default)
    scratch = final.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        if is_default:
            _check_default(default)
        elif os.path.lexists(final) and not _is_empty_folder(final):
            raise AttnscopeError(f"{printable(final, 400)} already exists. Choose another --out, or delete it.")
        scratch.mkdir(parents=True)
        yield NewFolder(scratch=scratch, final=final)
        _put_in_place(scratch, final)
    except OSError as error:
        raise RunWriteError(
            f"{printable(final, 400)}: {reason_of(error)}. Put that right, or name another folder with --out."
        ) from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def safe_names(names: Iterable[str], *, letters: str = " -_.=") -> dict[str, str]:
    """For each name one that a file system takes as one entry of a folder; no two are the same, whatever their case.

    Args:
        names: anybody's.
        letters: kept beside the letters and digits of all languages.
    """
    safe: dict[str, str] = {}
    taken: set[str] = set()
    for name in names:
        kept = "".join(x if x.isalnum() or x in letters else "_" for x in name)
        stem = kept[:LONGEST_NAME].strip(". ") or "unnamed"
        free, number = stem, 1
        while free.casefold() in taken:
            number += 1
            free = f"{stem}_{number}"
        taken.add(free.casefold())
        safe[name] = free
    return safe


def _check_default(default: Path) -> None:
    """Nothing in the run directory leads out of it."""
    for folder in (default.parent, default):
        if os.path.lexists(folder) and not is_folder(folder):
            raise RunError(f"{printable(folder, 400)} is a link or a file. Delete it and try again.")


def _is_empty_folder(path: Path) -> bool:
    return is_folder(path) and not any(path.iterdir())


def _put_in_place(scratch: Path, final: Path) -> None:
    for entry in scratch.rglob("*"):
        if entry.is_file() and not entry.is_symlink():
            sync_folder(entry)
    if not is_folder(final):
        scratch.rename(final)
    else:
        old = scratch.with_suffix(".old")
        final.rename(old)
        try:
            scratch.rename(final)
        except OSError:
            with contextlib.suppress(OSError):
                old.rename(final)
            raise
        shutil.rmtree(old, ignore_errors=True)
    sync_folder(final.parent)
