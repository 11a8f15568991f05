"""Figures in the house style, readable with any colour vision."""

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from mfm_ref.files import atomic_path

# Okabe and Ito's palette.
COLOURS = {
    "blue": "#0072B2", "orange": "#E69F00", "green": "#009E73", "red": "#D55E00", "purple": "#CC79A7",
    "sky": "#56B4E9", "grey": "#999999",
}  # fmt: skip


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def new_figure(rows: int, columns: int, *, size: tuple[float, float], **kwargs: Any) -> tuple[Figure, Any]:
    """A figure and its array of axes `(rows, columns)` in the house style; `size` is one panel's, in inches."""
    style: dict[Any, Any] = {
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 9,
        "legend.frameon": False,
        "figure.constrained_layout.use": True,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(columns * size[0], rows * size[1]))
        return figure, figure.subplots(rows, columns, squeeze=False, **kwargs)
