"""Turns a run directory into a report for people, from that directory alone, without torch.

Reading order: contents (Run -> plain data; verdict, compare and sweeps are part of it), figures, document (the order of
sections), markdown and html (which render it), then `write_report` here, which writes them. The same directory gives the
same bytes.
"""

from pathlib import Path

from attnscope.diagnose import findings_json
from attnscope.errors import RunWriteError
from attnscope.report.blocks import Figure
from attnscope.report.contents import Contents, contents_of
from attnscope.report.curves import curves_of
from attnscope.report.document import document_of
from attnscope.report.figures import draw_figures
from attnscope.report.html import to_html
from attnscope.report.markdown import to_markdown
from attnscope.runs.atomic import reason_of, remedy_of, replace_file
from attnscope.runs.foreign import printable
from attnscope.runs.reader import Run
from attnscope.runs.report_folder import report_dir
from attnscope.runs.tables import RunTables

__all__ = ["write_comparison", "write_report"]

FIGURES_FOLDER = "figures"


def write_report(run: Run, contents: Contents | None = None) -> Path:
    """Write report.html, report.md, findings.json and figures/ below report/ in the run directory.

    What stood there before is replaced.

    Args:
        run: to report.
        contents: of the report, where they are known already.

    Returns:
        The path of report.html.

    Raises:
        RunError: the report folder leads out of the run.
        RunWriteError: it cannot be written.
    """
    contents = contents_of(run) if contents is None else contents
    texts, figures = _rendered(run, contents)
    texts["findings.json"] = findings_json(run, contents.diagnosis) + "\n"
    folder = report_dir(run)
    _write(folder, texts, figures, again=f"attnscope report {printable(run.path, 400)}")
    return folder / "report.html"


def write_comparison(tables: RunTables, contents: Contents, folder: Path) -> Path:
    """Write report.html, report.md and figures/ of what `attnscope.report.side_by_side` has put together.

    Returns:
        The path of report.html.

    Raises:
        RunWriteError: it cannot be written.
    """
    texts, figures = _rendered(tables, contents)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunWriteError(f"{printable(folder, 400)}: {reason_of(error)}. Name another folder with --out.") from None
    _write(folder, texts, figures, again="the same command")
    return folder / "report.html"


def _rendered(tables: RunTables, contents: Contents) -> tuple[dict[str, str], list[Figure]]:
    figures = draw_figures(tables, contents)
    sections = document_of(contents, figures)
    page = to_html(contents.name, contents.verdict, sections, curves_of(tables, contents))
    text = to_markdown(contents.name, contents.verdict, sections, folder=FIGURES_FOLDER)
    return {"report.html": page, "report.md": text}, figures


def _write(folder: Path, texts: dict[str, str], figures: list[Figure], *, again: str) -> None:
    """Figures of an earlier report, which had more to show, go."""
    pictures = folder / FIGURES_FOLDER
    kept = {f"{figure.name}.{suffix}" for figure in figures for suffix in ("png", "svg")}
    try:
        pictures.mkdir(exist_ok=True)
        for figure in figures:
            replace_file(pictures / f"{figure.name}.png", figure.png)
            replace_file(pictures / f"{figure.name}.svg", figure.svg)
        for old in pictures.iterdir():
            if old.suffix in (".png", ".svg") and old.name not in kept:
                old.unlink()
        for name, text in texts.items():
            replace_file(folder / name, text.encode())
    except OSError as error:
        raise RunWriteError(
            f"{printable(error.filename or folder, 400)}: {reason_of(error)}. {remedy_of(error)} and write the "
            f"report again: {again}"
        ) from None
