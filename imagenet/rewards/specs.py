"""Rewards by their names, and weighted sums of them: `load_reward("pickscore=PickScore_v1,0.5*contrast")`."""

import dataclasses
import inspect
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from imagenet.features import load_callable
from imagenet.prompts import rows_of
from imagenet.rewards.models import KINDS, load
from imagenet.rewards.pixels import CompressedSize, LinearProbe, brightness, contrast, redness

REWARDS: dict[str, Callable[[Tensor], Tensor]] = {
    "brightness": brightness,
    "contrast": contrast,
    "redness": redness,
    "compressed-size": CompressedSize(),
}


@dataclasses.dataclass(frozen=True)
class Term:
    """One reward in a sum."""

    weight: float
    name: str  # as the spec has it
    function: Callable[..., Tensor]  # of images, or of images and prompts, a list of one each

    @property
    def reads_prompts(self) -> bool:
        """Whether the function takes prompts: it has a parameter of that name."""
        try:
            return "prompts" in inspect.signature(self.function).parameters
        except ValueError:  # of functions that are not written in Python
            return False

    @property
    def differentiable(self) -> bool:
        """Whether gradients go through: the function's own attribute of this name, else yes."""
        return getattr(self.function, "differentiable", True)


class RewardSum:
    """r(x, prompts) = Σ weightₖ · rₖ(x, prompts): what `load_reward` gives.

    Args:
        terms: one or more.

    Attributes:
        differentiable: whether gradients go through all terms; reads_prompts: whether any term takes prompts.
    """

    def __init__(self, terms: Sequence[Term]):
        self.terms = tuple(terms)
        self.differentiable = all(term.differentiable for term in terms)
        self.reads_prompts = any(term.reads_prompts for term in terms)

    def __call__(self, images: Tensor, prompts: str | Sequence[str] | None = None) -> Tensor:
        """r: `(B, 3, H, W)` in [0, 1] -> `(B,)`.

        Args:
            images: `(B, 3, H, W)`.
            prompts: one for all rows, or a list, of which row i has prompt i mod len; None where no term takes them.

        Raises:
            ValueError: there are no prompts, or their number does not divide B; from the terms.
        """
        prompts = rows_of(prompts, len(images))
        if prompts is None and self.reads_prompts:
            raise ValueError(
                f"{', '.join(t.name for t in self.terms if t.reads_prompts)} must be given prompts, got none"
            )
        parts = [
            term.weight * (term.function(images, prompts=prompts) if term.reads_prompts else term.function(images))
            for term in self.terms
        ]
        return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)


def load_reward(spec: str, device: torch.device | str = "cpu") -> RewardSum:
    """The reward of a spec: terms `[WEIGHT*]NAME[=PATH]`, separated by commas.

    NAME is brightness, contrast, redness, compressed-size; probe=FILE.safetensors, a linear probe; pickscore=FOLDER,
    hpsv2=FILE, imagereward=FILE, as `load` takes them; or module:function, a function of images, or of images and
    `prompts`, a list of one for each image. Where the function has an attribute `differentiable`, that says whether
    gradients go through; else they do.

    Args:
        spec: such as "brightness" or "pickscore=PickScore_v1,-0.1*compressed-size".
        device: of published models; it is that of the images.

    Raises:
        ValueError: another name, a weight that is no finite number, a path that is missing or not taken; from `load`
            and `LinearProbe.load`.
    """
    return RewardSum([_term(text.strip(), device) for text in spec.split(",")])


def slug(spec: str) -> str:
    """A spec as part of a file's name: without the folders of its paths, and with . for whatever else is no letter."""
    names = re.sub(r"=[^,]*/([^/,]+)", r"=\1", spec)
    return re.sub(r"[^\w.+-]+", ".", names).strip(".")


def _term(text: str, device: torch.device | str) -> Term:
    weight, star, name = text.rpartition("*")
    name, equals, path = name.partition("=")
    return Term(_weight(weight) if star else 1.0, name, _function(name, path if equals else None, device))


def _weight(text: str) -> float:
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not math.isfinite(found):
        raise ValueError(f"the weight of a reward must be a finite number, got {text!r}")
    return found


def _function(name: str, path: str | None, device: torch.device | str) -> Callable[..., Any]:
    files = ("probe", *KINDS)
    if name in files:
        if not path:
            raise ValueError(f"the reward {name} must be given a path, {name}=PATH")
        return LinearProbe.load(Path(path)) if name == "probe" else load(name, path, device=device)
    if path is not None:
        raise ValueError(f"only {', '.join(files)} take a path, got {name}={path}")
    if name in REWARDS:
        return REWARDS[name]
    if ":" not in name:
        known = f"{', '.join(REWARDS)}, {', '.join(f'{file}=PATH' for file in files)} or module:function"
        raise ValueError(f"the reward must be {known}, got {name!r}")
    return load_callable(name)
