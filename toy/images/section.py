"""What a stage gives to the report: words, tables and pictures."""

from dataclasses import dataclass, field

import numpy as np
from torch import Tensor, nn

LINE = 1  # pixels between two images of a mosaic
SMALL = 16  # images with fewer pixels a side are enlarged, smoothly: they are hard to read otherwise


@dataclass(frozen=True)
class Table:
    """A table of text; every row is as long as the header."""

    caption: str
    header: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class Section:
    """A part of the report; pictures are pairs of a file's name in the run's folder and a caption."""

    title: str
    text: str
    tables: list[Table] = field(default_factory=list)
    pictures: list[tuple[str, str]] = field(default_factory=list)


def mosaic(images: Tensor) -> np.ndarray:
    """Images `(rows, columns, H, W)` or `(rows, columns, 1, H, W)` in [−1, 1] as one picture, with grey lines between.

    Images of fewer than 16 pixels a side are enlarged fourfold.
    """
    rows, columns = images.shape[:2]
    flat = images.detach().reshape(rows * columns, 1, *images.shape[-2:]).cpu()
    if flat.shape[-1] < SMALL:
        flat = nn.functional.interpolate(flat, scale_factor=4, mode="bicubic")
    framed = nn.functional.pad(flat.clamp(-1, 1), (LINE, LINE, LINE, LINE), value=0.0)
    h, w = framed.shape[-2:]
    return framed.view(rows, columns, h, w).transpose(1, 2).reshape(rows * h, columns * w).numpy()
