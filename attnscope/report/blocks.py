"""What a report is made of, as plain data; Markdown, HTML and the terminal only render it.

All texts are plain: whoever renders them escapes them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True, kw_only=True)
class Paragraph:
    """A few sentences."""

    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Rows under titles.

    Attributes:
        titles: one per column.
        rows: as many texts each; numbers as `attnscope.report.numbers.number` writes them.
        words: how many of the first columns hold words; the others hold numbers, to the right.
        caption: how to read it; may be empty.
    """

    titles: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: int
    caption: str = ""

    def without(self, title: str) -> "Table":
        """The same without a column of numbers; without any of that name, the same."""
        keep = [at for at, name in enumerate(self.titles) if at < self.words or name != title]
        return replace(
            self,
            titles=tuple(self.titles[at] for at in keep),
            rows=tuple(tuple(row[at] for at in keep) for row in self.rows),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Lines:
    """Text as it was written, line by line."""

    lines: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Notes:
    """A list."""

    items: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Heading:
    """Of a part of a section."""

    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A picture with the words that belong to it.

    Attributes:
        name: of its files, without a suffix.
        title: a few words.
        alt: what is to be seen, for who cannot see it.
        caption: how to read it.
        png: for Markdown, and where the SVG is large.
        svg: for HTML and print.
    """

    name: str
    title: str
    alt: str
    caption: str
    png: bytes
    svg: bytes


SectionBlock = Paragraph | Table | Lines | Notes | Heading | Figure


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """What stands under one heading; `key` names it in links and does not change with the run."""

    key: str
    title: str
    blocks: Sequence[SectionBlock]
