"""Turns a run directory into a report for people, from that directory alone, without torch.

Reading order: contents (Run -> plain data; verdict, compare and sweeps are part of it), figures, document (the order of
sections), markdown and html (which render it), then `write_report` here, which writes them. The same directory gives the
same bytes.
"""

from pathlib import Path

from attnscope.diagnose import findings_json
from attnscope.errors import RunWriteError
from attnscope.report.blocks import Figure
from attnscope.report.contents import Contents, contents
from attnscope.report.curves import curves_of
from attnscope.report.document import document_of
from attnscope.report.figures import draw_figures
from attnscope.report.html import to_html
from attnscope.report.markdown import to_markdown
from attnscope.runs.atomic import reason_of, remedy_of, replace_file
from attnscope.runs.foreign import printable
from attnscope.runs.reader import Run, report_dir

__all__ = ["write_report"]

FIGURES_FOLDER = "figures"


def write_report(run: Run, found: Contents | None = None) -> Path:
    """Write report.html, report.md, findings.json and figures/ below report/ in the run directory.

    What stood there before is replaced.

    Args:
        run: to report.
        found: its contents, where they are known already.

    Returns:
        The path of report.html.

    Raises:
        RunError: the report folder leads out of the run.
        RunWriteError: it cannot be written.
    """
    found = contents(run) if found is None else found
    figures = draw_figures(run, found)
    sections = document_of(found, figures)
    page = to_html(found.name, found.verdict, sections, curves_of(run, found))
    texts = {
        "report.html": page,
        "report.md": to_markdown(found.name, found.verdict, sections, folder=FIGURES_FOLDER),
        "findings.json": findings_json(run, found.findings) + "\n",
    }
    folder = report_dir(run)
    try:
        write_files(folder, texts, figures)
    except OSError as error:
        raise RunWriteError(
            f"{printable(error.filename or folder, 400)}: {reason_of(error)}. {remedy_of(error)} and write the "
            f"report again: attnscope report {printable(run.path, 400)}"
        ) from None
    return folder / "report.html"


def write_files(folder: Path, texts: dict[str, str], figures: list[Figure]) -> None:
    """Write a report's files; figures of an earlier one, which had more to show, go.

    Raises:
        OSError: the disk did not take it.
    """
    pictures = folder / FIGURES_FOLDER
    pictures.mkdir(exist_ok=True)
    kept = set()
    for figure in figures:
        for suffix, data in (("png", figure.png), ("svg", figure.svg)):
            replace_file(pictures / f"{figure.name}.{suffix}", data)
            kept.add(f"{figure.name}.{suffix}")
    for old in pictures.iterdir():
        if old.suffix in (".png", ".svg") and old.name not in kept:
            old.unlink()
    for name, text in texts.items():
        replace_file(folder / name, text.encode())
