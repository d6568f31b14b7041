"""The report as one Markdown file. Texts of a run are escaped: they show themselves and mark nothing up."""

import re
from collections.abc import Sequence

from attnscope.report.blocks import Figure, Heading, Lines, Notes, Paragraph, Section, SectionBlock, Table

MOST_ROWS = 50  # of a table; all of them are in the HTML


def to_markdown(title: str, verdict: Sequence[str], sections: Sequence[Section], *, folder: str) -> str:
    """Lay out a report; `folder` is where the figures stand beside it."""
    parts = [f"# {escaped(title)}", *map(escaped, verdict)]
    for section in sections:
        parts.append(f"## {escaped(section.title)}")
        parts += [_block(block, folder) for block in section.blocks]
    return "\n\n".join(part for part in parts if part) + "\n"


def escaped(text: str) -> str:
    """A line of text that Markdown, and HTML made of it, shows as it is."""
    text = re.sub(r"([\\`*_\[\]<>#|~&@])", r"\\\1", text)
    return re.sub(r"(?i)(:)(//)|\b(www)(\.)", lambda m: f"{m[1] or m[3]}\\{m[2] or m[4]}", text)


def _block(block: SectionBlock, folder: str) -> str:
    match block:
        case Paragraph():
            return escaped(block.text)
        case Heading():
            return f"### {escaped(block.text)}"
        case Table():
            return table_to_markdown(block)
        case Lines():
            return "\n".join(f"    {line}" for line in block.lines) or "    "
        case Notes():
            return "\n".join(f"- {escaped(item)}" for item in block.items)
        case Figure():
            return (
                f"### {escaped(block.title)}\n\n![{escaped(block.alt)}]({folder}/{block.name}.png)\n\n"
                f"{escaped(block.caption)}"
            )


def table_to_markdown(table: Table) -> str:
    """A table and its caption; of a long one the first rows."""
    numbers = len(table.titles) - table.words
    rows = [[escaped(cell) for cell in row] for row in table.rows[:MOST_ROWS]]
    lines = [[escaped(title) for title in table.titles], ["---"] * table.words + ["---:"] * numbers, *rows]
    parts = ["\n".join(f"| {' | '.join(line)} |" for line in lines)]
    more = len(table.rows) - MOST_ROWS
    if more > 0:
        parts.append(f"{more} more rows are in report.html.")
    if table.caption:
        parts.append(escaped(table.caption))
    return "\n\n".join(parts)
