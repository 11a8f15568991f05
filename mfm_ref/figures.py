"""Figures in the house style, readable with any colour vision."""

import io
import textwrap
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
    in_house_style(figure)
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


def in_house_style(figure: Figure) -> None:
    """What matplotlib decides when a title or a legend is made, after `new_figure`: small titles, legends unframed."""
    for ax in figure.axes:
        ax.title.set_fontsize(9)
        legend = ax.get_legend()
        if legend is not None:
            legend.set_frame_on(False)


class Captioned:
    """A figure with its caption below, as a notebook shows it: a small JPEG, and the caption for those who cannot see.

    Args:
        figure: a figure of `new_figure`; its caption is drawn into it.
        caption: what is seen and what to see in it.
        dpi: resolution in dots per inch.
    """

    def __init__(self, figure: Figure, caption: str, *, dpi: int = 90):
        self.caption = " ".join(caption.split())
        width = int(15 * figure.get_figwidth())  # letters of 8 points in a line
        figure.supxlabel("\n".join(textwrap.wrap(self.caption, width)), x=0.01, ha="left", fontsize=8)
        in_house_style(figure)
        drawn = io.BytesIO()
        figure.savefig(drawn, format="jpeg", dpi=dpi, pil_kwargs={"quality": 85, "optimize": True})
        self.jpeg = drawn.getvalue()

    def __repr__(self) -> str:
        return self.caption

    def _repr_jpeg_(self) -> bytes:
        return self.jpeg
