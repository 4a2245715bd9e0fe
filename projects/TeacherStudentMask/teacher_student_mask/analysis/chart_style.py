"""Colours and signs of the report, and what all of its figures have in common."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import plotly.graph_objects as go

__all__ = [
    "DARK_COLOURS",
    "FALSE_POSITIVE_COLOURS",
    "MUTED",
    "SURFACE",
    "SYMBOLS",
    "TEXT",
    "dodge",
    "error_bars",
    "escape",
    "finish",
    "label",
    "model_colour",
    "shorten",
    "trace_style",
]

TEXT, MUTED, GRID, SURFACE = "#1b1f24", "#5f6b7a", "#e3e7ec", "#ffffff"
# Okabe and Ito's colours; where one lacks contrast (3:1) on white or on the dark surface, the other
# theme's colour is another one of theirs or a darker shade.
_MODEL_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#000000", "#8c6d00")
# What the page puts in the place of each of these colours in its dark theme.
DARK_COLOURS = {
    "#0072b2": "#56b4e9",
    "#d55e00": "#e69f00",
    "#000000": "#fefefe",
    "#8c6d00": "#f0e442",
    TEXT: "#e8eaee",
    MUTED: "#a3adba",
    GRID: "#343a44",
    SURFACE: "#1a1e25",
}
# The same in both themes, because the pictures have them too.
FALSE_POSITIVE_COLOURS = {"background": "#009e73", "seen": "#e69f00", "unseen": "#cc79a7"}

# Colour is never the only sign of a model.
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
_MAX_LABEL = 30


def model_colour(index: int) -> str:
    """Colour of the model at a position of the command line, "#rrggbb" of the light theme."""
    return _MODEL_COLOURS[index % len(_MODEL_COLOURS)]


def trace_style(index: int, name: str, lines: bool = True) -> dict:
    """Name, marker and line of a trace of the model at a position of the command line."""
    colour = model_colour(index)
    return {
        "name": label(name),
        "mode": "lines+markers" if lines else "markers",
        "marker": {"color": colour, "symbol": SYMBOLS[index % len(SYMBOLS)], "size": 9},
        "line": {"color": colour, "width": 2, "dash": DASHES[index % len(DASHES)]},
        "hoverinfo": "text",
    }


def dodge(position: int, count: int) -> float:
    """An offset in (-0.3, 0.3) that sets the markers of several models apart."""
    return 0.6 * ((position + 0.5) / count - 0.5)


def error_bars(values: Sequence, intervals: Sequence, colour: str | None = None) -> dict | None:
    """
    Intervals as plotly wants them: distances from the values.

    Args:
        values: None where undefined.
        intervals: [low, high] each, None where there is none: no bar.
        colour: of the bars; None is that of the trace.

    Returns:
        None if there is no interval at all.
    """
    above, below = [], []
    for value, interval in zip(values, intervals):
        is_known = value is not None and interval is not None and None not in interval
        # A percentile interval can lie beside its value.
        above.append(max(0.0, interval[1] - value) if is_known else 0.0)
        below.append(max(0.0, value - interval[0]) if is_known else 0.0)
    if not any(above + below):
        return None
    style = {"type": "data", "symmetric": False, "array": above, "arrayminus": below}
    return style | {"thickness": 1.2, "width": 3} | ({"color": colour} if colour else {})


def finish(figure: go.Figure, x_title: str, y_title: str, height: int) -> None:
    """Set the layout that all figures share."""
    axis = {"gridcolor": GRID, "linecolor": MUTED, "zeroline": False, "automargin": True}
    title = {"standoff": 10, "font": {"size": 13}}
    figure.update_layout(
        template="none",
        height=height,
        paper_bgcolor=SURFACE,
        plot_bgcolor=SURFACE,
        font={"family": "system-ui, sans-serif", "size": 13, "color": TEXT},
        margin={"l": 12, "r": 16, "t": 12, "b": 12},
        legend={"orientation": "h", "x": 0, "y": 1 + 8 / height, "yanchor": "bottom"},
        hoverlabel={"bgcolor": SURFACE, "bordercolor": MUTED, "font": {"color": TEXT}},
        showlegend=True,
        # A drag must scroll the page on a phone; the buttons of the figure still zoom.
        dragmode=False,
        xaxis=axis | {"title": title | {"text": x_title}},
        yaxis=axis | {"title": title | {"text": y_title}},
    )


def shorten(text: str, limit: int = _MAX_LABEL) -> str:
    """The text, or its beginning and an ellipsis, in at most `limit` characters."""
    return text if len(text) <= limit else text[: limit - 1] + "…"


def label(text: str) -> str:
    """A name from the input as a short text of a figure."""
    return escape(shorten(text))


def escape(text: str) -> str:
    """A text from the input for plotly, which reads a part of HTML in its texts."""
    return html.escape(text, quote=False)
