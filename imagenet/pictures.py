"""Pictures of many images: panels beside each other with a word above each, in lines below each other."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mfm_ref.figures import new_figure, save_figure

GAP = 2  # white pixels between images
INCHES = 2.0  # of an image, a side


def draw_lines(
    lines: Sequence[dict[str, np.ndarray]], names: Sequence[str], title: str, path: Path, *, inches: float = INCHES
) -> None:
    """Write a picture as PNG.

    Args:
        lines: in each, panels uint8 `(rows, columns, H, W, 3)` by what stands above them; all have the same rows.
        names: beside each row of a line.
        title: above all.
        path: of the file.
        inches: an image's side.
    """
    pages = [page_of(list(line.values())) for line in lines]
    high, wide = len(pages[0]), max(page.shape[1] for page in pages)
    inch = high / len(names) / inches  # in pixels
    figure, axes = new_figure(len(lines), 1, size=(wide / inch + 0.5, high / inch + 0.5))
    for ax, line, page in zip(axes[:, 0], lines, pages, strict=True):
        ax.imshow(np.pad(page, ((0, 0), (0, wide - page.shape[1]), (0, 0)), constant_values=255))
        edges = np.cumsum([0, *(page_of([images]).shape[1] for images in line.values())])
        ax.set_xticks((edges[1:] + edges[:-1]) / 2, line, fontsize=9)
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
