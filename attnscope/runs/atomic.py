"""A file appears whole or not at all; and what an `OSError` means in one line."""

import contextlib
import errno
import os
import secrets
from pathlib import Path

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_LOCKED = (errno.EACCES, errno.EPERM, errno.EROFS)


def replace_file(path: Path, data: bytes) -> None:
    """Write a file so that its name never stands for half of it, not even after a power cut.

    A link at `path` is replaced, not followed.

    Raises:
        OSError: the disk did not take it; what stood at `path` before still does.
    """
    scratch = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        with scratch.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            scratch.unlink()
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder last; a file system that cannot do so is no error."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def reason_of(error: OSError) -> str:
    """The operating system's words, as the end of a sentence."""
    words = error.strerror or str(error) or type(error).__name__
    return words[0].lower() + words[1:]


def remedy_of(error: OSError) -> str:
    """What to do about it, as the start of a sentence."""
    if error.errno in _FULL:
        return "Free space"
    return "Make it writable" if error.errno in _LOCKED else "Put that right"
