"""The folder of a run's report, in a run directory that may be anybody's."""

import stat
from pathlib import Path

from attnscope.errors import RunError, RunWriteError
from attnscope.runs.atomic import reason_of, remedy_of
from attnscope.runs.foreign import is_folder, printable
from attnscope.runs.layout import REPORT_FOLDER
from attnscope.runs.reader import Run


def report_dir(run: Run) -> Path:
    """The folder of a run's report, made if it is not there. Nothing in it leads out of the run.

    Raises:
        RunError: it, or something in it, is a link or no plain file.
        RunWriteError: it cannot be made.
    """
    folder = run.path / REPORT_FOLDER
    try:
        if not is_folder(folder):
            folder.mkdir()
        for entry in sorted(folder.rglob("*")):
            stats = entry.lstat()
            if not (is_folder(entry) or (stat.S_ISREG(stats.st_mode) and stats.st_nlink == 1)):
                raise RunError(
                    f"{printable(entry, 400)} could lead out of the run. Delete {printable(folder, 400)} and try again."
                )
    except FileExistsError:
        raise RunError(f"{printable(folder, 400)} is a link or a file. Delete it and try again.") from None
    except OSError as error:
        raise RunWriteError(
            f"{printable(folder, 400)}: {reason_of(error)}. {remedy_of(error)} and try again."
        ) from None
    return folder
