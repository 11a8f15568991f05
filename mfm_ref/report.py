"""Results on disk: every file is written under a temporary name and then renamed, so none is ever half there."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from safetensors.torch import save_file
from torch import nn

# Okabe–Ito, readable with any colour vision.
COLOURS = {"blue": "#0072B2", "orange": "#E69F00", "green": "#009E73", "red": "#D55E00", "grey": "#999999"}


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, renamed to it when the block ends well and removed when it does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_json(content: dict[str, Any], path: Path) -> None:
    """Write a dictionary as indented JSON; NaN and infinity are refused with ValueError."""
    text = json.dumps(content, indent=2, allow_nan=False)
    with atomic_path(path) as temporary:
        temporary.write_text(text + "\n")


def save_weights(model: nn.Module, path: Path) -> None:
    """Write a model's state dict as safetensors."""
    with atomic_path(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, temporary)


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
