"""What to run on, and the settings of training; every stage has settings of its own beside its code."""

from dataclasses import dataclass
from typing import Any

from toy.common import ToyConfig, option


@dataclass(frozen=True)
class DataSettings(ToyConfig):
    """The data set, and the map that the stages use."""

    dataset: str = option("digits", "digits, mnist or fashion")
    data: str = option("", "folder of the idx files; mnist and fashion need it")
    map: str = option("semigroup", "the map that is sampled, steered and fine-tuned: one of those that train_maps has")


@dataclass(frozen=True)
class TrainSettings(DataSettings):
    """Training: the network, and equal processor time for each map."""

    train_maps: str = option("semigroup,mean_flow,teacher", "maps to train: semigroup, mean_flow, teacher")
    train_network: str = option("unet", "network of the maps: unet")
    train_channels: str = option("16,32", "channels of the U-Net's levels")
    train_blocks: int = option(1, "residual blocks of each level")
    train_patch: int = option(1, "side of the U-Net's patches, in pixels")
    train_steps: int = option(6000, "steps of the semigroup law from data; other maps get about as much time")
    train_batch: int = option(256, "images in a step")
    train_lr: float = option(2e-3, "learning rate, at its highest")
    train_decay: float = option(0.999, "decay of the averaged weights")
    train_classifier_steps: int = option(1500, "steps of the reward's classifier")


def training_settings(config: TrainSettings) -> dict[str, Any]:
    """The settings that the weights of a trained map depend on."""
    names = [name for name in TrainSettings.__dataclass_fields__ if name.startswith("train_") and name != "train_maps"]
    return {name: getattr(config, name) for name in ("dataset", "seed", "fast", *names)}


PRESETS: dict[str, dict[str, Any]] = {
    "fast": {
        "train_channels": "8,16", "train_steps": 20, "train_batch": 32, "train_classifier_steps": 250,
    },
    "mnist": {
        "train_maps": "semigroup,teacher", "train_channels": "32,64", "train_patch": 2, "train_steps": 8000,
        "train_batch": 64, "train_lr": 1e-3,
    },
    "full": {
        "train_channels": "64,128,320", "train_blocks": 2, "train_steps": 200_000, "train_batch": 256,
        "train_lr": 3e-4, "train_decay": 0.9999, "train_classifier_steps": 10_000,
    },
}  # fmt: skip
