"""Turns a run directory into a report for people: Markdown and figures, from that directory alone, without torch.

Reading order: contents (Run -> plain data), verdict (two sentences), figures, markdown, then `write_report` here, which
writes them. The same directory gives the same bytes.
"""

from pathlib import Path

from attnscope.errors import RunWriteError
from attnscope.report.contents import contents
from attnscope.report.figures import draw_figures
from attnscope.report.markdown import to_markdown
from attnscope.runs.atomic import reason_of, remedy_of, replace_file
from attnscope.runs.foreign import printable
from attnscope.runs.reader import Run, report_dir

__all__ = ["write_report"]

FIGURES_FOLDER = "figures"


def write_report(run: Run) -> Path:
    """Write report/report.md and report/figures/*.png into the run directory; what stood there before is replaced.

    Returns:
        The path of report.md.

    Raises:
        RunError: the report folder leads out of the run.
        RunWriteError: it cannot be written.
    """
    found = contents(run)
    figures = draw_figures(run, found)
    folder = report_dir(run)
    place = folder / "report.md"
    try:
        (folder / FIGURES_FOLDER).mkdir(exist_ok=True)
        for figure in figures:
            replace_file(folder / FIGURES_FOLDER / f"{figure.name}.png", figure.png)
        kept = {f"{figure.name}.png" for figure in figures}
        for old in (folder / FIGURES_FOLDER).glob("*.png"):
            if old.name not in kept:  # of an earlier report, which had more to show
                old.unlink()
        replace_file(place, to_markdown(found, figures, folder=FIGURES_FOLDER).encode())
    except OSError as error:
        raise RunWriteError(
            f"{printable(error.filename or place, 400)}: {reason_of(error)}. {remedy_of(error)} and write the "
            f"report again: attnscope report {printable(run.path, 400)}"
        ) from None
    return place
