"""From images in [0, 1] to what the published reward models look at, in torch alone and differentiable.

All three resize by the antialiased bicubic filter, which can overshoot [0, 1], do not clamp, and normalise by CLIP's
mean and deviation. They differ in what becomes of images that are not square. Images may have any size; they become
float32. The originals of PickScore and ImageReward round to 8 bits in between, which has no gradient. The authors of
ImageReward have a path of tensors as well, as here; those of PickScore have none.
"""

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

from imagenet.rewards.pixels import rgb

MEAN = (0.48145466, 0.4578275, 0.40821073)  # of red, green and blue
STD = (0.26862954, 0.26130258, 0.27577711)


def pickscore_pixels(images: Tensor, size: int = 224) -> Tensor:
    """Shortest side to `size`, the longer one rounded down; the middle `size`², its offset rounded down.

    Args:
        images: `(B, 3, H, W)` in [0, 1].
        size: pixels, a side, of the result.

    Returns:
        `(B, 3, size, size)`, normalised.
    """
    images = _shortest(images, size)
    top, left = ((side - size) // 2 for side in images.shape[2:])
    return _normalised(images[:, :, top : top + size, left : left + size])


def imagereward_pixels(images: Tensor, size: int = 224) -> Tensor:
    """As `pickscore_pixels`, but with the offset rounded to the nearest, halves to even."""
    images = _shortest(images, size)
    top, left = (round((side - size) / 2) for side in images.shape[2:])
    return _normalised(images[:, :, top : top + size, left : left + size])


def hpsv2_pixels(images: Tensor, size: int = 224) -> Tensor:
    """Longest side to `size`, the shorter one rounded; black around it, one more at the right and at the bottom if odd.

    The original fails for an image whose longest side is `size` and that is not square; here it is padded like others.

    Args:
        images: `(B, 3, H, W)` in [0, 1].
        size: pixels, a side, of the result.

    Returns:
        `(B, 3, size, size)`, normalised.
    """
    scale = size / max(images.shape[2:])
    height, width = (max(1, round(side * scale)) for side in rgb(images).shape[2:])
    images = _resized(images, height, width)
    down, across = size - height, size - width
    return _normalised(pad(images, (across // 2, across - across // 2, down // 2, down - down // 2)))


def _shortest(images: Tensor, size: int) -> Tensor:
    height, width = rgb(images).shape[2:]
    longer = int(size * max(height, width) / min(height, width))
    return _resized(images, *((size, longer) if height <= width else (longer, size)))


def _resized(images: Tensor, height: int, width: int) -> Tensor:
    images = images.float()
    if images.shape[2:] == (height, width):
        return images
    return interpolate(images, (height, width), mode="bicubic", align_corners=False, antialias=True)


def _normalised(images: Tensor) -> Tensor:
    mean, std = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in (MEAN, STD))
    return (images - mean) / std
