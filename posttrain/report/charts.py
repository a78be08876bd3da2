"""Builds plotly figures as plain dictionaries in one style: thin axes, no frame, colours by token.

A colour token ("--c1", or "--c1@0.3" with an opacity) names a CSS variable of page.css, which has a light and a dark
value. The page's script looks the colour up when it draws, and again when the reader switches between light and dark.
Units are part of a chart's title, because text along a vertical axis is hard to read.
"""

import math
import unicodedata
from collections.abc import Sequence
from typing import Any

CONTENT_WIDTH = 744  # width of the page's text column, in pixels, in a window of 800 pixels; wider in wider windows
NAMES_WIDTH = 200  # the most pixels that names to the left of a plot may take
WIDE = frozenset("MWmw@%—–")
CATEGORICAL = ("--c1", "--c2", "--c3", "--c4", "--c5", "--c6", "--c7", "--c8")
Values = Sequence[float | None]


def colours_of(names: Sequence[str]) -> dict[str, str]:
    """One colour token for each name, the same in every chart of a report."""
    return {name: CATEGORICAL[i % len(CATEGORICAL)] for i, name in enumerate(names)}


def axis(title: str = "", grid: bool = True, **settings: object) -> dict[str, Any]:
    """One plotly axis. settings: plotly's own (range, tickformat, type, ...)."""
    base: dict[str, Any] = {
        "showgrid": grid,
        "gridcolor": "--grid",
        "gridwidth": 1,
        "zeroline": False,
        "showline": False,
        "ticks": "",
        "ticklabelstandoff": 5,
        "automargin": False,
        "fixedrange": True,
        "tickfont": {"size": 11, "color": "--muted"},
    }
    if title:
        base["title"] = {"text": title, "font": {"size": 11.5, "color": "--muted"}, "standoff": 6}
    return {**base, **settings}


def figure(data: Sequence[dict[str, Any]], x: dict[str, Any], y: dict[str, Any], **layout: Any) -> dict[str, Any]:
    """A figure with one pair of axes. layout: added to plotly's layout."""
    return {
        "data": list(data),
        "layout": {
            "xaxis": x,
            "yaxis": y,
            "margin": {"l": 42, "r": 12, "t": 10, "b": 40 if "title" in x else 24},
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "showlegend": False,
            "font": {"size": 12, "color": "--ink"},
            "hoverlabel": {"bgcolor": "--raised", "bordercolor": "--rule", "font": {"size": 12, "color": "--ink"}},
            "dragmode": False,
            **layout,
        },
    }


def rows_figure(data: Sequence[dict[str, Any]], x: dict[str, Any], names: Sequence[str], **layout: Any) -> dict:
    """A figure with one row for each name, the first on top, and room for the names on the left."""
    order = [escape(name) for name in reversed(names)]
    shown = [shortened(name, NAMES_WIDTH, 12) for name in reversed(names)]
    y = axis(grid=False, type="category", categoryorder="array", categoryarray=order, range=[-0.5, len(names) - 0.5])
    y |= {"tickfont": {"size": 12, "color": "--ink"}, "tickvals": order, "ticktext": [escape(name) for name in shown]}
    left = 14 + math.ceil(max((text_width(name, 12) for name in shown), default=0))
    margin = {"l": left, "r": 12, "t": 4, "b": 40, **layout.pop("margin", {})}
    return figure(data, x, y, margin=margin, **layout)


def line(x: Values, y: Values, colour: str, *, name: str, hover: str = "%{y:.3g}", **style: Any) -> dict[str, Any]:
    """A trace that draws a line. style: plotly's line style (width, dash, shape)."""
    return {
        "type": "scatter",
        "mode": "lines",
        "x": list(x),
        "y": list(y),
        "name": name,
        "line": {"color": colour, "width": 2, **style},
        "hovertemplate": f"{hover}<extra>{escape(name)}</extra>",
        "connectgaps": False,
    }


def dots(
    x: Sequence[object], y: Values, colour: str, *, name: str, hover: str = "%{y:.3g}", size: float = 4
) -> dict[str, Any]:
    """A trace that draws points without a line. size: in pixels."""
    return {
        "type": "scatter",
        "mode": "markers",
        "x": list(x),
        "y": list(y),
        "name": name,
        "marker": {"color": colour, "size": size},
        "cliponaxis": False,
        "hovertemplate": f"{hover}<extra>{escape(name)}</extra>",
    }


def bars(
    x: Sequence[object], y: Values, colour: str, *, name: str, hover: str = "%{y:.3g}", **more: Any
) -> dict[str, Any]:
    """A trace that draws vertical bars. more: added to the trace."""
    return {
        "type": "bar",
        "x": list(x),
        "y": list(y),
        "name": name,
        "marker": {"color": colour, "line": {"width": 0}},
        "hovertemplate": f"%{{x}}: {hover}<extra>{escape(name)}</extra>",
        **more,
    }


def smooth(values: Values, width: int) -> list[float | None]:
    """The mean of each value and its neighbours, `width` values in all (fewer at the ends). None stays None."""
    half = width // 2
    means: list[float | None] = []
    for i, value in enumerate(values):
        near = [v for v in values[max(0, i - half) : i + half + 1] if v is not None]
        means.append(sum(near) / len(near) if value is not None and near else None)
    return rounded(means)


def smoothing(count: int) -> int:
    """The number of points to average over in a series of `count` points. A short series is not smoothed: 1."""
    return 1 if count < 12 else 5 if count < 100 else 1 + 2 * (count // 50)


def text_width(text: str, size: float) -> float:
    """An upper estimate of the width of a text in pixels, for common sans-serif fonts. size: of the font, in pixels."""
    ems = (1.0 if c in WIDE or unicodedata.east_asian_width(c) in "WF" else 0.7 if c.isupper() else 0.62 for c in text)
    return size * sum(ems)


def shortened(text: str, width: float, size: float) -> str:
    """The text, cut and ended with … if it would be wider than `width` pixels. At least two characters are kept."""
    if text_width(text, size) <= width:
        return text
    kept = len(text)
    while kept > 2 and text_width(f"{text[:kept]}…", size) > width:
        kept -= 1
    return f"{text[:kept]}…"


def escape(text: str) -> str:
    """Text with HTML escaped.

    Plotly renders some HTML in names and labels, and text of a model must not be rendered.
    """
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def rounded(values: Values, digits: int = 5) -> list[float | None]:
    """Values rounded to `digits` significant digits, which is precise enough and makes the page a third as large."""
    return [None if value is None else float(f"{value:.{digits}g}") for value in values]
