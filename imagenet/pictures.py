"""Pictures of many images: panels beside each other with a word above each, in lines below each other."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mfm_ref.figures import new_figure, save_figure

GAP = 2  # white pixels between images
BETWEEN = 1 / 6  # of an image's side, between panels, beside that
INCHES = 2.0  # of an image, a side


def draw_lines(
    lines: Sequence[dict[str, np.ndarray]], names: Sequence[str], title: str, path: Path, *, inches: float = INCHES
) -> None:
    """Write a picture as PNG.

    Args:
        lines: in each, panels uint8 `(rows, columns, H, W, 3)` by what stands above them, which may have more than one
            line of text; all have the same rows.
        names: beside each row of a line.
        title: above all.
        path: of the file.
        inches: an image's side.
    """
    pages = [[page_of([panel]) for panel in line.values()] for line in lines]
    high = len(pages[0][0])
    inch = high / len(names) / inches  # in pixels
    gap = round(BETWEEN * high / len(names))
    ends = [np.cumsum([page.shape[1] + gap for page in line]) for line in pages]
    wide = max(end[-1] for end in ends) - gap
    text = 0.15 * max(name.count("\n") for line in lines for name in line)
    figure, axes = new_figure(len(lines), 1, size=(wide / inch + 0.5, high / inch + 0.5 + text))
    for ax, line, panels, end in zip(axes[:, 0], lines, pages, ends, strict=True):
        whole = np.full((high, wide, 3), 255, np.uint8)
        for page, last in zip(panels, end - gap, strict=True):
            whole[:, last - page.shape[1] : last] = page
        ax.imshow(whole)
        middles = [last - page.shape[1] / 2 for page, last in zip(panels, end - gap, strict=True)]
        ax.set_xticks(middles, line, fontsize=9)
        ax.set_yticks((np.arange(len(names)) + 0.5) * high / len(names), names, fontsize=9, rotation=90, va="center")
        ax.tick_params(length=0, labeltop=True, labelbottom=False)
        ax.spines[:].set_visible(False)
    figure.suptitle(title, fontsize=10)
    save_figure(figure, path)


def page_of(panels: list[np.ndarray]) -> np.ndarray:
    """Panels `(rows, columns, H, W, 3)` beside each other, as one image, with white gaps."""
    images = np.concatenate(panels, 1)
    images = np.pad(images, ((0, 0), (0, 0), (0, GAP), (0, GAP), (0, 0)), constant_values=255)
    rows, columns, height, width, channels = images.shape
    return images.swapaxes(1, 2).reshape(rows * height, columns * width, channels)
