"""What a page is made of: sections of blocks, each a plain record that page.html.jinja knows how to draw.

All text here is plain text: the template escapes it. Nothing in this file knows about runs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Stat:
    """One figure with a name, as text. `note` is a smaller second line; `alarm`: it is shown as what is wrong."""

    name: str
    value: str
    note: str = ""
    alarm: bool = False


@dataclass(frozen=True)
class Stats:
    items: Sequence[Stat]
    type: str = "stats"


@dataclass(frozen=True)
class Text:
    """Paragraphs. `tone`: body | note | alert."""

    paragraphs: Sequence[str]
    tone: str = "body"
    type: str = "text"


@dataclass(frozen=True)
class Key:
    """One entry of a chart's legend. `mark`: line | dash | dot | ring | box; `colour`: a colour token of the page."""

    name: str
    colour: str
    mark: str = "line"


@dataclass(frozen=True)
class Chart:
    """A plotly figure. `spec` is {"data": [...], "layout": {...}}; colours in it are tokens such as "--c1" or
    "--c1@0.3", which the page resolves for light and for dark."""

    title: str
    spec: Mapping[str, Any]
    height: int = 240
    unit: str = ""
    caption: str = ""
    keys: Sequence[Key] = ()
    type: str = "chart"


@dataclass(frozen=True)
class Grid:
    """Charts side by side where there is room. `min_width`: pixels below which a chart takes the next row."""

    charts: Sequence[Chart]
    min_width: int = 380
    keys: Sequence[Key] = ()
    caption: str = ""
    type: str = "grid"


@dataclass(frozen=True)
class Table:
    """`rows` hold texts; `numeric` are the columns set to the right. A row in `strong` (by index) stands out.
    `folded`: only the title shows until it is opened."""

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
    """Text shown as it is. With `summary` it is folded under that line."""

    text: str
    summary: str = ""
    type: str = "code"


@dataclass(frozen=True)
class Leaf:
    """The rollouts to leaf through, as the page's script reads them."""

    rollouts: Sequence[Mapping[str, Any]]
    type: str = "leaf"


@dataclass(frozen=True)
class Section:
    """One section. `lead`: sentences under the title."""

    id: str
    title: str
    blocks: Sequence[Any] = field(default_factory=tuple)
    lead: Sequence[str] = ()
