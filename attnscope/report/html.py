"""The report as one HTML file that needs nothing else: no network, no other file, no right to run but its own script.

Texts of a run are escaped by the template; the script sets them as text. The page's policy forbids everything that the page
does not bring along.
"""

import base64
import hashlib
from collections.abc import Sequence
from importlib.resources import files

from attnscope.report.blocks import Figure, Section
from attnscope.report.curves import Curves

LARGEST_SVG = 120_000  # bytes; a larger one goes in as PNG if that is smaller


def to_html(title: str, verdict: Sequence[str], sections: Sequence[Section], curves: Curves | None) -> str:
    """Lay out a report."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("attnscope.report", "page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = files("attnscope.report") / "page"
    script = (page / "page.js").read_text()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template("page.html.jinja").render(
        title=title,
        verdict=verdict,
        sections=sections,
        style=(page / "page.css").read_text(),
        script=script,
        script_hash=f"sha256-{digest}",
        curves=curves.json if curves else "",
        curves_caption=curves.caption if curves else "",
        kind_of=lambda block: type(block).__name__,
        picture_of=picture_of,
    )


def picture_of(figure: Figure) -> str:
    """A figure as a data URI; as an image of its own, nothing in it can act on the page."""
    if len(figure.svg) > max(LARGEST_SVG, len(figure.png)):
        return f"data:image/png;base64,{base64.b64encode(figure.png).decode()}"
    return f"data:image/svg+xml;base64,{base64.b64encode(figure.svg).decode()}"
