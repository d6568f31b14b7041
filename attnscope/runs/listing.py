"""The runs of a folder, a line each, without reading their tables."""

from dataclasses import dataclass
from pathlib import Path

from attnscope.config import nearest
from attnscope.errors import RunError
from attnscope.runs.atomic import reason_of, remedy_of
from attnscope.runs.foreign import printable
from attnscope.runs.holder import writer_of
from attnscope.runs.layout import RUN_FILE
from attnscope.runs.manifest import read_manifest
from attnscope.runs.parts import error_of, parts_of, status_of, written_elsewhere


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSummary:
    """A line of `attnscope runs`.

    `problem` says why a run cannot be opened; the rest is then empty. `writer` says who writes it on another machine, and
    `error` why it failed.
    """

    path: Path
    name: str
    status: str
    created: str = ""
    members: tuple[str, ...] = ()
    last_step: int | None = None
    writer: str = ""
    problem: str | None = None
    error: str | None = None


def list_runs(folder: str | Path) -> list[RunSummary]:
    """The runs in a folder by name, without reading their tables; one that cannot be opened says why."""
    summaries = []
    for path in runs_in(Path(folder)):
        name = printable(path.name)
        try:
            manifest = read_manifest(path)
        except RunError as error:
            summaries.append(RunSummary(path=path, name=name, status="unreadable", problem=str(error)))
            continue
        parts, holder = parts_of(path, manifest), writer_of(path)
        last = [part.end.get("last_step") for part in parts if part.end]
        summaries.append(
            RunSummary(
                path=path,
                name=name,
                status=status_of(parts, holder),
                writer=written_elsewhere(parts, holder),
                created=manifest.created,
                members=tuple(entry.name for entry in manifest.members),
                last_step=max((step for step in last if isinstance(step, int)), default=None),
                error=next(filter(None, map(error_of, parts)), None),
            )
        )
    return summaries


def runs_in(folder: Path) -> list[Path]:
    """The run directories in a folder by name; none where it cannot be read."""
    try:
        paths = sorted(path.parent for path in folder.glob(f"*/{RUN_FILE}"))
    except OSError:
        return []
    return [path for path in paths if not path.name.startswith(".")]  # one that is being made


def check_is_run(path: Path) -> None:
    """See that a run directory is there.

    Raises:
        RunError: it is not.
    """
    shown = printable(path, 400)
    try:
        is_run, is_dir, is_file = (path / RUN_FILE).exists(), path.is_dir(), path.is_file()
    except OSError as error:
        raise RunError(f"{shown}: {reason_of(error)}. {remedy_of(error)} and try again.") from None
    if is_file:
        raise RunError(f"{shown} is a file, not a run directory. Give the folder with {RUN_FILE}.")
    if not is_dir:
        beside = [printable(run.name) for run in runs_in(path.parent)]
        hint = nearest(path.name, beside)
        raise RunError(f"{shown}: no such run.{hint} List them: attnscope runs")
    if not is_run:
        inside = runs_in(path)
        hint = f" It holds runs, for example {printable(inside[0], 400)}." if inside else ""
        raise RunError(f"{shown} is not a run directory: it has no {RUN_FILE}.{hint}")
