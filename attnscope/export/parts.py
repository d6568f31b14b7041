"""A run part by part, so that an export needs no more memory than the tables of one part."""

from collections.abc import Iterator

from attnscope.runs.parts import strangers
from attnscope.runs.reader import Run, open_run


def by_part(run: Run, lost: list[str]) -> Iterator[Run]:
    """The run as often as it has parts, each time with the members and tables of one.

    Args:
        run: all of it; its tables are not read.
        lost: takes one line per thing that could not be read.
    """
    parts = sorted({entry.part for entry in run.entries})
    unknown = set(strangers(run.path, parts))
    for part in parts:
        one = open_run(run.path, part=part)
        yield one
        others = set(strangers(run.path, [part])) - unknown
        lost += sorted(set(one.lost) - others - set(lost))
        del one
