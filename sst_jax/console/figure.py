"""Figures without a display."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
else:  # importing matplotlib takes a second or two: only a command that draws pays it
    Axes = Figure = object

__all__ = ["Axes", "Figure", "new_figure"]


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure, inches wide and high, drawn by Agg: no display, and none of pyplot's global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
