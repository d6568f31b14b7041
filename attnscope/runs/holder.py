"""Who writes a run or a part: a process, named in a file of its folder, alive or dead.

    writer-0000.json   {"host": ..., "pid": ..., "started": ..., "since": ...}

The file with the highest number counts. It appears whole and only if its name is free, so that of two processes that find
a dead holder only one becomes the next; this needs no locks of the file system, which network file systems may not have.
A process is known by its number and when it started: numbers are used again. Whether a process of another machine is alive
cannot be told from here.
"""

import contextlib
import os
import platform
import re
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import NoReturn

from attnscope.errors import RunError
from attnscope.runs.foreign import printable
from attnscope.runs.layout import EVENTS_FILE, TABLE_FILE, to_json
from attnscope.runs.manifest import is_whole, read_json

WRITER_FILE = re.compile(r"writer-(?P<number>\d{4,9})\.json")
MAX_WRITER_BYTES = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """A process that writes, or did when it died.

    Attributes:
        host: name of its machine, and of the container if it is in one: process numbers are of there.
        pid: its number.
        started: when it started, in units of its system; tells it from a later process of the same number.
        since: when it began to write, UTC, ISO 8601.
    """

    host: str
    pid: int
    started: str
    since: str

    @property
    def is_here(self) -> bool:
        """Whether it is of this machine, so that `is_alive` knows."""
        return self.host == _here()

    @property
    def is_me(self) -> bool:
        """Whether it is this process."""
        return self.is_here and self.pid == os.getpid() and self.started == _started(self.pid)

    @property
    def is_alive(self) -> bool:
        """Whether it still runs; of another machine that is taken for granted."""
        return not self.is_here or self.started == (_started(self.pid) or "")

    @property
    def machine(self) -> str:
        """Its machine in words."""
        return self.host.partition(" ")[0]


def holder_of(folder: Path) -> Holder | None:
    """Who writes into a folder, or did last without saying that it stopped; None if nobody."""
    numbers = _numbers(folder)
    return _read(folder, numbers[-1]) if numbers else None


def writer_of(folder: Path) -> Holder | None:
    """Who writes into a folder now, as far as can be told from here."""
    holder = holder_of(folder)
    return holder if holder is not None and holder.is_alive else None


def hold(folder: Path, *, run: Path) -> int:
    """Become the one who writes into `folder`; give it back with `release`.

    A holder that died on this machine, or that is this process, is followed without a word.

    Args:
        folder: of the run, or of one of its parts.
        run: what errors call it.

    Returns:
        What `release` needs.

    Raises:
        RunError: somebody else writes there.
        OSError: the folder cannot be written.
    """
    numbers = _numbers(folder)
    holder = _read(folder, numbers[-1]) if numbers else None
    if holder is not None and holder.is_alive and not holder.is_me:
        _refuse(holder, folder, run)
    number = numbers[-1] + 1 if numbers else 0
    mine = Holder(
        host=_here(),
        pid=os.getpid(),
        started=_started(os.getpid()) or "",
        since=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    path = folder / _file(number)
    scratch = folder / f".{secrets.token_hex(8)}.tmp"
    try:
        scratch.write_text(to_json(asdict(mine)))
        try:
            os.link(scratch, path)  # whole, or not at all, and never over another
        except FileExistsError:
            raise
        except OSError:  # a file system without links
            with path.open("x") as file:
                file.write(scratch.read_text())
    except FileExistsError:
        raise RunError(
            f"{printable(run, 400)}: another process began to write it just now. Wait for it, or try again."
        ) from None
    finally:
        with contextlib.suppress(OSError):
            scratch.unlink()
    return number


def release(folder: Path, number: int) -> None:
    """Stop being the one who writes there; those before are dead and go, too."""
    for old in [old for old in _numbers(folder) if old <= number]:
        with contextlib.suppress(OSError):
            (folder / _file(old)).unlink()


def declare_dead(folder: Path) -> None:
    """Forget who wrote there. For one who knows, as nobody can from here of a process of another machine."""
    release(folder, max(_numbers(folder), default=-1))


@contextmanager
def holding(run: Path) -> Iterator[None]:
    """Be the one who writes the run, part after part.

    Raises:
        RunError: somebody else does, or still writes one of its parts.
    """
    for folder in [run, *sorted(run.glob("part-*"))]:
        holder = writer_of(folder)
        if holder is not None and not holder.is_me:
            _refuse(holder, folder, run)
    try:
        number = hold(run, run=run)
    except OSError as error:
        raise RunError(f"{printable(run, 400)}: cannot be written: {error.strerror}.") from None
    try:
        yield
    finally:
        release(run, number)


def in_words(holder: Holder, changed: float) -> str:
    """Who writes on another machine, as far as it can be told; empty for one of this machine.

    Args:
        holder: who it may be.
        changed: when the last record was written, in seconds since the epoch; 0 = none was.
    """
    if holder.is_here:
        return ""
    return f"written by process {holder.pid} on {holder.machine}, {_age(changed)}"


def _refuse(holder: Holder, folder: Path, run: Path) -> NoReturn:
    shown = printable(run, 400)
    if holder.is_here:
        raise RunError(
            f"{shown}: process {holder.pid} of this machine is still writing it, since {holder.since}. Wait until it ends, or "
            f"stop it (kill {holder.pid}), and try again."
        )
    file = printable(folder / _file(_numbers(folder)[-1]), 400)
    raise RunError(
        f"{shown}: process {holder.pid} on {holder.machine} has been writing it since {holder.since}, "
        f"{_age(_changed(run))}. If it no longer runs there, delete {file} and try again."
    )


def _changed(run: Path) -> float:
    """When the last record of a run was written."""
    times = [0.0]
    for entry in run.glob("part-*/*"):
        if TABLE_FILE.fullmatch(entry.name) or EVENTS_FILE.fullmatch(entry.name):
            with contextlib.suppress(OSError):
                times.append(entry.lstat().st_mtime)
    return max(times)


def _age(changed: float) -> str:
    if not changed:
        return "no record yet"
    seconds = max(0.0, time.time() - changed)
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"its last record is {seconds / size:.0f} {unit} old"
    return f"its last record is {seconds:.0f} s old"


def _file(number: int) -> str:
    return f"writer-{number:04d}.json"


def _numbers(folder: Path) -> list[int]:
    """Of the files that name a holder, ascending."""
    try:
        matches = [WRITER_FILE.fullmatch(entry.name) for entry in folder.iterdir()]
    except OSError:
        return []
    return sorted(int(match["number"]) for match in matches if match)


def _read(folder: Path, number: int) -> Holder | None:
    name = _file(number)
    try:
        said = read_json(folder / name, name=name, limit=MAX_WRITER_BYTES)
    except RunError:
        return None
    host, pid, started, since = (said.get(key) for key in ("host", "pid", "started", "since"))
    if not is_whole(pid, 1, 2**31) or not all(isinstance(x, str) for x in (host, started, since)):
        return None
    return Holder(host=printable(host, 200), pid=pid, started=str(started), since=printable(since, 40))


def _here() -> str:
    """Where process numbers mean the same as here: the machine, and of containers, which one."""
    name = printable(platform.node(), 100).replace(" ", "-") or "unnamed"
    try:
        return f"{name} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return name


def _started(pid: int) -> str | None:
    """When a process of this machine started; None if there is none, or it is only waiting to be buried.

    On Linux in ticks since the machine started, which no setting of the clock changes.
    """
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        if Path("/proc/self/stat").exists():
            return None
    else:
        return None if after_name[0] in "ZX" else after_name[19]
    import psutil

    try:
        return f"{psutil.Process(pid).create_time():.0f}"
    except psutil.Error:
        return None
