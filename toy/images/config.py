"""All settings of the image rungs in one: those of the data, of training and of each stage."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toy.common import option
from toy.images import blackbox, finetuning, inverse, posteriors, settings, steering


@dataclass(frozen=True)
class ImagesConfig(
    settings.TrainSettings,
    posteriors.Settings,
    steering.Settings,
    inverse.Settings,
    blackbox.Settings,
    finetuning.Settings,
):
    """Every setting; the defaults are those of the digits on two CPU cores."""

    out: Path = option(Path("runs/digits-images"), "folder of the maps and of the results")


def preset(name: str) -> dict[str, Any]:
    """What differs from the defaults in "fast", "mnist" (two hours of one CPU core) and "full" (a GPU)."""
    stages = (settings, posteriors, steering, inverse, blackbox, finetuning)
    return {field: value for stage in stages for field, value in stage.PRESETS[name].items()}


PRESETS = {name: preset(name) for name in ("fast", "mnist", "full")}
