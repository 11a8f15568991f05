"""Options of `imagenet.finetune`, the paper's settings as presets, and what its choices of --weight mean."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from imagenet.prompts import TEMPLATE
from imagenet.run import ModelOptions
from mfm_ref.checks import check_count
from mfm_ref.options import option

LATEST = 0.998  # time in training: where t → 1, the posterior is a point and the guidance 0
PER_CLASS = 4  # samples of a class in a row, in the evaluation
Factor = Callable[[Tensor], Tensor]  # of times (B,)


def _within(largest: float) -> Factor:
    """min(1, largest t/(1−t)): what brings σ²/2 down to `largest` where it is above."""
    return lambda t: (largest * t / (1 - t)).clamp_max(1)


WEIGHTS: dict[str, tuple[Factor | None, Factor | None]] = {  # w(t), and the gain of the guidance
    "exact": (None, None),
    "bounded": (lambda t: _within(25.0)(t).square(), None),
    "clipped": (None, _within(25.0)),
    "constant": (None, lambda t: 100 * t / (1 - t)),
}
PAPER: dict[str, Any] = {
    "steps": 10_000, "batch": 18, "lr": 1e-4, "warmup": 250, "decay": 0.999, "clip": 1.5, "precision": "bfloat16",
    "guidance": 2.5, "weight": "constant", "earliest": 0.01, "evaluate_every": 500, "evaluate": 512,
    "reward": "",
}  # fmt: skip
PRESETS = {f"hpsv2-{scale}": {**PAPER, "scale": float(scale)} for scale in (10, 25, 50)}


@dataclasses.dataclass(frozen=True)
class FinetuneOptions(ModelOptions):
    """Options of the script."""

    out: Path = option(Path("runs/finetuned"), "folder of the results")
    preset: str = option("", "the paper's settings for HPSv2, by λ; --reward is to be given", choices=("", *PRESETS))
    latents: Path = option(Path("data/latents"), "folder of imagenet.encode, or latents.npz of imagenet.sample")
    reward: str = option("brightness", "as for imagenet.evaluate values: terms [WEIGHT*]NAME[=PATH], by commas")
    scale: float = option(1.0, "λ > 0, by which the reward is multiplied")
    held_out: str = option("", "rewards that are measured and not trained for, separated by semicolons")
    prompt: str = option(TEMPLATE, "of rewards that take one, with {class} for the name of the class of a row")
    names: str = option(
        "", "text file of the classes' names, one a line; empty: ImageNet's of 1000 classes, else those of the latents"
    )
    decode: int = option(
        4, "images decoded together with gradients: at 256 pixels a side Stable Diffusion's decoder takes 1.5 GB each"
    )
    method: str = option("gradient", "of the guidance; stein needs no gradient", choices=("gradient", "stein"))
    weight: str = option("exact", "see above; stein has exact alone", choices=tuple(WEIGHTS))
    earliest: float = option(0.0, f"times are uniform from here to {LATEST}")
    steps: int = option(1000, "updates")
    batch: int = option(18, "rows of an update, on all processes together")
    micro: int = option(0, "rows that a process handles at once; 0: its share of the batch")
    lr: float = option(1e-4, "learning rate of RAdam, constant after the warm-up")
    warmup: int = option(100, "updates over which the learning rate rises")
    decay: float = option(0.999, "of the averaged weights")
    clip: float = option(1.5, "largest norm of the gradient")
    engine: str = option("ddp", "of many processes: each a whole copy, or shares (fsdp)", choices=("ddp", "fsdp"))
    log_every: int = option(50, "updates between lines of metrics.jsonl")
    checkpoint_every: int = option(250, "updates between checkpoints")
    checkpoint_minutes: float = option(20.0, "a checkpoint is no older than this; 0: however old")
    evaluate_every: int = option(500, "updates between evaluations")
    evaluate: int = option(64, f"samples of an evaluation, a multiple of {PER_CLASS}: as many of each class")
    evaluate_steps: int = option(50, "Euler steps of each")
    evaluate_batch: int = option(32, "samples of an evaluation that are made together")


def check_options(config: FinetuneOptions) -> None:
    """Raise ValueError for numbers out of range, and for choices that exclude each other."""
    for name in ("batch", "decode", "evaluate_steps", "evaluate_batch", "evaluate_every"):
        check_count(getattr(config, name), f"--{name.replace('_', '-')}")
    check_count(config.seed, "--seed", 0)
    if not config.reward:
        raise ValueError(
            "--reward must be given, as the presets are for hpsv2=FILE: the weights are to be fetched first"
        )
    if config.evaluate < PER_CLASS or config.evaluate % PER_CLASS:
        raise ValueError(f"--evaluate must be a multiple of {PER_CLASS}, as many are of a class, got {config.evaluate}")
    if not 0 < config.scale < math.inf:
        raise ValueError(f"--scale must be positive and finite, got {config.scale}")
    if not 0 <= config.earliest < LATEST:
        raise ValueError(f"--earliest must lie in [0, {LATEST}), got {config.earliest}")
    if config.method == "stein" and config.weight != "exact":
        raise ValueError(f"--weight must be exact with --method stein, which has no σ², got {config.weight}")
