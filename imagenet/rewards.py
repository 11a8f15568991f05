"""Rewards of images that need no weights: what shows that values, steering and fine-tuning work.

A reward takes images in [0, 1], `(B, 3, H, W)`, to `(B,)`. These are differentiable everywhere.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from imagenet.features import load_callable
from mfm_ref.checks import Reward

LUMA = (0.2126, 0.7152, 0.0722)  # of red, green and blue, by Rec. 709


def brightness(images: Tensor) -> Tensor:
    """The mean luma, in [0, 1]."""
    return _luma(images).mean((-1, -2))


def contrast(images: Tensor) -> Tensor:
    """√(Var + 10⁻⁶) of the luma over the pixels, in [0.001, 0.501]; uniform images have a gradient, too: 0."""
    return (_luma(images).var((-1, -2), correction=0) + 1e-6).sqrt()


def redness(images: Tensor) -> Tensor:
    """The mean of red less the mean of green and blue, in [−1, 1]."""
    red, green, blue = _rgb(images).mean((-1, -2)).unbind(1)
    return red - (green + blue) / 2


REWARDS: dict[str, Callable[[Tensor], Tensor]] = {"brightness": brightness, "contrast": contrast, "redness": redness}


def load_reward(spec: str) -> Reward:
    """A reward by its name here, or "module:function". Raises ValueError for any other name."""
    if spec in REWARDS:
        return REWARDS[spec]
    if ":" not in spec:
        raise ValueError(f"the reward must be {', '.join(REWARDS)} or module:function, got {spec!r}")
    return load_callable(spec)


def _luma(images: Tensor) -> Tensor:
    return torch.einsum("bchw,c->bhw", _rgb(images), images.new_tensor(LUMA))


def _rgb(images: Tensor) -> Tensor:
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ValueError(f"images must be (B, 3, H, W) of real numbers, got {images.dtype} {tuple(images.shape)}")
    return images
