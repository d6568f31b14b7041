"""A run as event files for TensorBoard, through TensorBoard's own writer: no torch, no TensorFlow."""

import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from attnscope.export.exported import Exported, not_installed
from attnscope.export.folder import new_folder, safe_names
from attnscope.export.parts import by_part
from attnscope.export.scalars import Moment, scalars_of
from attnscope.runs.reader import Run


def to_tensorboard(run: Run, out: Path | None) -> Exported:
    """Write one folder per member, which TensorBoard calls a run.

    Raises:
        AttnscopeError: tensorboard is not installed, or as `new_folder`.
    """
    try:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter
    except ImportError as error:
        raise not_installed(error, "tensorboard") from None
    folders = safe_names(entry.name for entry in run.entries)
    counts: dict[str, int] = {}
    lost: list[str] = []
    with new_folder(run, "tensorboard", out) as folder:
        for part in by_part(run, lost):
            for member, moments in scalars_of(part):
                writer = EventFileWriter(str(folder.scratch / folders[member.name]))
                try:
                    counts[member.name] = _write(writer, moments)
                finally:
                    writer.close()
    return Exported(
        place=str(folder.final),
        counts=counts,
        unit="values",
        lost=tuple(lost),
        next_command=f"tensorboard --logdir {shlex.quote(str(folder.final))}",
    )


def _write(writer: Any, moments: Iterable[Moment]) -> int:
    """One event per step with all its values; how many values there were."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary

    count = 0
    for moment in moments:
        values = [Summary.Value(tag=tag, simple_value=x) for tag, x in moment.values.items()]
        event = Event(wall_time=moment.seconds, step=moment.step, summary=Summary(value=values))
        writer.add_event(event)
        count += len(values)
    return count
