"""The records that a page consists of: sections, which hold blocks. page.html.jinja can draw each kind of block.

All text in blocks is plain text, which the template escapes. Nothing in this file knows about runs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Stat:
    """One number with a name. note: a smaller second line. alarm: True if the number is shown as a problem.

    Example: `Stat("tokens trained", "41 200", "of 52 000 generated")`.
    """

    name: str
    value: str
    note: str = ""
    alarm: bool = False


@dataclass(frozen=True)
class Stats:
    """Several `Stat`s side by side."""

    items: Sequence[Stat]
    type: str = "stats"


@dataclass(frozen=True)
class Text:
    """Paragraphs of text. tone: body, note or alert."""

    paragraphs: Sequence[str]
    tone: str = "body"
    type: str = "text"


@dataclass(frozen=True)
class Key:
    """One entry of a chart's legend. mark: line, dash, dot, ring or box. colour: a colour token of the page."""

    name: str
    colour: str
    mark: str = "line"


@dataclass(frozen=True)
class Chart:
    """A plotly figure. spec: {"data": [...], "layout": {...}}.

    Colours in `spec` are tokens such as "--c1" or "--c1@0.3", which the page turns into light or dark colours.
    """

    title: str
    spec: Mapping[str, Any]
    height: int = 240
    unit: str = ""
    caption: str = ""
    keys: Sequence[Key] = ()
    type: str = "chart"


@dataclass(frozen=True)
class Grid:
    """Charts side by side, as many as fit.

    min_width: the smallest width of a chart in pixels; a narrow page has fewer charts in a row.
    """

    charts: Sequence[Chart]
    min_width: int = 380
    keys: Sequence[Key] = ()
    caption: str = ""
    type: str = "grid"


@dataclass(frozen=True)
class Table:
    """A table of texts. numeric: indices of columns aligned to the right. strong: indices of rows in bold.

    folded: only the title is shown until the reader opens the table.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    numeric: Sequence[int] = ()
    strong: Sequence[int] = ()
    title: str = ""
    caption: str = ""
    folded: bool = False
    type: str = "table"


@dataclass(frozen=True)
class Code:
    """Preformatted text. With a `summary`, only that line is shown until the reader opens the block."""

    text: str
    summary: str = ""
    type: str = "code"


@dataclass(frozen=True)
class Leaf:
    """Rollouts that the reader can browse one by one, in the form that page.js reads.

    pictures: those that the rollouts show, as data URLs, by their keys.
    """

    rollouts: Sequence[Mapping[str, object]]
    pictures: Mapping[str, str] = field(default_factory=dict)
    type: str = "leaf"


@dataclass(frozen=True)
class Section:
    """One section of the page. lead: the sentences under its title."""

    id: str
    title: str
    blocks: Sequence[object] = field(default_factory=tuple)
    lead: Sequence[str] = ()
