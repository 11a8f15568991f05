"""Rewards by their names, and weighted sums of them: `load_reward("pickscore=PickScore_v1,0.5*contrast")`."""

import dataclasses
import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from imagenet.features import load_callable
from imagenet.prompts import rows_of
from imagenet.rewards.blip import ImageReward
from imagenet.rewards.clip import CLIPScore
from imagenet.rewards.latents import check_rewards
from imagenet.rewards.models import KINDS, load
from imagenet.rewards.pixels import CompressedSize, LinearProbe, brightness, contrast, redness
from imagenet.shards import sha256_of
from imagenet.vae import sha256_of_weights

REWARDS: dict[str, Callable[[Tensor], Tensor]] = {
    "brightness": brightness,
    "contrast": contrast,
    "redness": redness,
    "compressed-size": CompressedSize(),
}
PROMPTS = "prompts"


@dataclasses.dataclass(frozen=True)
class Term:
    """One reward in a sum."""

    weight: float
    name: str  # as the spec has it
    function: Callable[..., Tensor]  # of images, or of images and prompts, a list of one each
    sha256: str | None = None  # of its weights, where it has any

    def __call__(self, images: Tensor, prompts: list[str] | None) -> Tensor:
        """weight · r: `(B, 3, H, W) -> (B,)`. Raises ValueError for a result of another shape."""
        if not self.reads_prompts:
            found = self.function(images)
        elif _second(self.function):
            found = self.function(images, prompts)
        else:
            found = self.function(images, prompts=prompts)
        check_rewards(found, images, self.name)
        return self.weight * found

    @property
    def reads_prompts(self) -> bool:
        """Whether the function takes prompts: after the images, or by their name."""
        named = _parameters(self.function).get(PROMPTS)
        by_name = named is not None and named.kind in (named.POSITIONAL_OR_KEYWORD, named.KEYWORD_ONLY)
        return by_name or _second(self.function)

    @property
    def differentiable(self) -> bool:
        """Whether gradients go through: the function's own attribute of this name, else yes."""
        return getattr(self.function, "differentiable", True)


def _second(function: Callable[..., Tensor]) -> bool:
    """Whether prompts are the second argument: it is there, and must be given or has their name."""
    places = [p for p in _parameters(function).values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return len(places) > 1 and (places[1].default is inspect.Parameter.empty or places[1].name == PROMPTS)


def _parameters(function: Callable[..., Tensor]) -> Mapping[str, inspect.Parameter]:
    """What a function takes; nothing of those that are not written in Python and do not say."""
    try:
        return inspect.signature(function).parameters
    except ValueError:
        return {}


class RewardSum:
    """r(x, prompts) = Σ weightₖ · rₖ(x, prompts): what `load_reward` gives.

    Args:
        terms: one or more.

    Attributes:
        differentiable: whether gradients go through all terms; reads_prompts: whether any term takes prompts;
            identity: what tells it from other rewards, whatever its files are called, for settings and keys: the
            weight, name and sha256 of each term, as JSON can hold them.
    """

    def __init__(self, terms: Sequence[Term]):
        self.terms = tuple(terms)
        self.differentiable = all(term.differentiable for term in terms)
        self.reads_prompts = any(term.reads_prompts for term in terms)
        self.identity: list[dict[str, Any]] = [
            {"weight": term.weight, "name": term.name, "sha256": term.sha256} for term in terms
        ]

    def __call__(self, images: Tensor, prompts: str | Sequence[str] | None = None) -> Tensor:
        """r: `(B, 3, H, W)` in [0, 1] -> `(B,)`.

        Args:
            images: `(B, 3, H, W)`.
            prompts: one for all rows, or a list, of which row i has prompt i mod len; None where no term takes them.

        Raises:
            ValueError: there are no prompts, or their number does not divide B; a term that does not give `(B,)`; from
                the terms.
        """
        prompts = rows_of(prompts, len(images))
        if prompts is None and self.reads_prompts:
            raise ValueError(
                f"{', '.join(t.name for t in self.terms if t.reads_prompts)} must be given prompts, got none"
            )
        parts = [term(images, prompts) for term in self.terms]
        return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)


def load_reward(spec: str, device: torch.device | str = "cpu") -> RewardSum:
    """The reward of a spec: terms `[WEIGHT*]NAME[=PATH]`, separated by commas.

    NAME is brightness, contrast, redness, compressed-size; probe=FILE.safetensors, a linear probe; pickscore=FOLDER,
    hpsv2=FILE, imagereward=FILE, as `load` takes them; or module:function, a function of images, or of images and
    prompts, a list of one for each image: its second argument if that must be given, whatever its name, or else the one
    that is called `prompts`. Where the function has an attribute `differentiable`, that says whether gradients go
    through; else they do.

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
    function = _function(name, path if equals else None, device)
    return Term(_weight(weight) if star else 1.0, name, function, _sha256(function, path))


def _sha256(function: Callable[..., Tensor], path: str) -> str | None:
    """Of a probe's file, or of the tensors of a published model; None of what has neither."""
    if isinstance(function, LinearProbe):
        return sha256_of(Path(path))
    if isinstance(function, CLIPScore):
        return sha256_of_weights(function.model)
    if isinstance(function, ImageReward):
        return sha256_of_weights(nn.ModuleList([function.vision, function.text, function.head]))
    return None


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
