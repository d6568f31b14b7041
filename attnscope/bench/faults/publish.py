"""What `attnscope bench faults` leaves behind: the data, the score for machines, a page and its figures."""

from collections.abc import Sequence
from pathlib import Path

from attnscope.bench.faults.answered import FILE, Answered, write_answers
from attnscope.bench.faults.score import Score
from attnscope.bench.faults.sections import HOW, figures_of, sections_of
from attnscope.report.markdown import to_markdown
from attnscope.runs.layout import to_json

TITLE = "How often attnscope diagnose is right"
FIGURES_FOLDER = "figures"


def write_outcome(answered: Sequence[Answered], score: Score, folder: Path) -> None:
    """faults.parquet (copied over `published.parquet` it is what --published scores), faults.json, faults.md and figures/."""
    from dataclasses import asdict

    pictures = folder / FIGURES_FOLDER
    pictures.mkdir(parents=True, exist_ok=True)
    write_answers(answered, folder / FILE)
    (folder / "faults.json").write_text(to_json(asdict(score), indent=1) + "\n")
    figures = figures_of(score)
    for figure in figures:
        (pictures / f"{figure.name}.png").write_bytes(figure.png)
        (pictures / f"{figure.name}.svg").write_bytes(figure.svg)
    (folder / "faults.md").write_text(
        to_markdown(TITLE, (HOW,), sections_of(score, figures=figures), folder=FIGURES_FOLDER)
    )
