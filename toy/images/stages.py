"""The stages of the image rungs, in their order."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from toy.common import ToyConfig
from toy.images import blackbox, finetuning, inverse, posteriors, rung, steering
from toy.images.section import Section
from toy.images.settings import TrainSettings


@dataclass(frozen=True)
class Stage:
    """One of the things that `python -m toy.mnist` does."""

    text: str  # of --help
    settings: type[ToyConfig]
    run: Callable[[Any, Any], dict[str, Any]]  # of the config and the Rung
    section: Callable[[dict[str, Any]], Section]  # of the result of `run`


STAGES = {
    "train": Stage(
        "train the classifier and the maps", TrainSettings, lambda config, _: rung.run(config), rung.section
    ),
    "posteriors": Stage("what noisy images may be", posteriors.Settings, posteriors.run, posteriors.section),
    "steer": Stage("samples of a class-mixture reward", steering.Settings, steering.run, steering.section),
    "inverse": Stage("images from measurements", inverse.Settings, inverse.run, inverse.section),
    "blackbox": Stage("a reward without gradients", blackbox.Settings, blackbox.run, blackbox.section),
    "finetune": Stage("a map that has learnt the reward", finetuning.Settings, finetuning.run, finetuning.section),
}
