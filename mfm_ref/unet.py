"""A small U-Net for images, preconditioned by the Meta Flow Map of a Gaussian."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mfm_ref.checks import check_count
from mfm_ref.networks import GaussianNetwork

GROUPS = 8  # of channels that are normalised together


class UNet(GaussianNetwork):
    """v_{s,u}(z; t, x) for images: the exact map of N(mean, cov), corrected by a U-Net F (`GaussianNetwork`).

    F gets two images, the whitened state ζ and the whitened context, and shifts and scales its channels by the times,
    the label and the guidance. Each level halves the image and goes on with its own number of channels; the way up adds
    what the way down had at the same level. The lowest level attends to all of its pixels.

    Args:
        mean: of the data, `(C, H, W)`.
        cov: of the flattened data, `(CHW, CHW)`, symmetric; eigenvalues below `min_std`² are raised to it.
        channels: of each level, multiples of 8. The defaults have 8.8 M weights at 28×28 pixels.
        blocks: residual blocks of each level, on each way, >= 1.
        patch: side of the squares of pixels that enter as channels of one place; > 1 trades sharpness for speed.
        n_classes: number of class labels, 0 for none; label None and label n_classes are the null class.
        reads_guidance: whether the guidance scale w is an input, as 1 − 1/w; None is w = 1.
        min_std: smallest standard deviation that a principal axis is given, > 0.

    Raises:
        ValueError: shapes that do not fit, sides that the patches and levels do not divide, entries that are not
            finite, counts or min_std out of range, or (when called) labels given to a network without classes.
    """

    def __init__(
        self,
        mean: Tensor,
        cov: Tensor,
        *,
        channels: tuple[int, ...] | list[int] = (64, 128, 320),
        blocks: int = 2,
        patch: int = 1,
        n_classes: int = 0,
        reads_guidance: bool = False,
        min_std: float = 0.05,
    ):
        if mean.ndim != 3:
            raise ValueError(f"mean must be an image (C, H, W), got {tuple(mean.shape)}")
        super().__init__(
            tuple(mean.shape), mean.flatten(), cov, n_classes=n_classes, reads_guidance=reads_guidance, min_std=min_std
        )
        check_count(blocks, "blocks")
        check_count(patch, "patch")
        channels, multiple = list(channels), patch * 2 ** (len(channels) - 1)
        if not channels or any(c < 1 or c % GROUPS for c in channels):
            raise ValueError(f"channels must be multiples of {GROUPS}, one for each level, got {channels}")
        if any(side % multiple for side in mean.shape[1:]):
            raise ValueError(
                f"sides must be multiples of {multiple}, for patches of {patch} and {len(channels)} levels, "
                f"got {tuple(mean.shape[1:])}"
            )
        self.config: dict[str, Any] = {
            "shape": list(mean.shape),
            "channels": channels,
            "blocks": blocks,
            "patch": patch,
            "n_classes": n_classes,
            "reads_guidance": reads_guidance,
            "min_std": min_std,
        }
        self.patch = patch
        features, pixels = 4 * channels[0], mean.shape[0] * patch**2
        self.times = nn.Sequential(nn.Linear(self.time_features, features), nn.SiLU(), nn.Linear(features, features))
        self.labels = nn.Embedding(n_classes + 1, features) if n_classes else None
        self.inlet = nn.Conv2d(2 * pixels, channels[0], 3, padding=1)

        def level(c_in: int, c: int) -> _Level:
            return _Level(_Block(c if k else c_in, c, features) for k in range(blocks))

        above = channels[:1] + channels[:-1]
        self.down = nn.ModuleList(level(*pair) for pair in zip(above, channels, strict=True))
        self.attention = _Attention(channels[-1])
        self.up = nn.ModuleList(level(c, c_out) for c, c_out in zip(channels, above, strict=True))
        last = nn.Conv2d(channels[0], pixels, 3, padding=1)
        for weight in last.parameters():
            nn.init.zeros_(weight)  # at the start, the map of the Gaussian
        self.outlet = nn.Sequential(_GroupNorm(channels[0]), nn.SiLU(), last)
        self.to(mean.dtype)

    def correction(self, standard: Tensor, known: Tensor, times: Tensor, y: Tensor | None) -> Tensor:
        """F, `(B, D)` along the principal axes; images inside."""
        images = torch.stack([standard, known], 1) @ self.basis.T  # (B, 2, CHW)
        h = F.pixel_unshuffle(images.reshape(len(images), -1, *self.shape[1:]), self.patch)
        features = self.times(times)
        if self.labels is not None:
            features = features + self.labels(self.labels_or_null(y, features))
        features = F.silu(features)
        h = self.inlet(h)
        skips = []
        for k, level in enumerate(self.down):
            h = F.avg_pool2d(h, 2) if k else h
            h = level(h, features)
            skips.append(h)
        h = self.attention(h)
        for k, level in reversed(list(enumerate(self.up))):
            h = level(h + skips[k], features)
            h = F.interpolate(h, scale_factor=2) if k else h
        return F.pixel_shuffle(self.outlet(h), self.patch).reshape(len(h), -1) @ self.basis


class _Block(nn.Module):
    """h + two convolutions of it, the second shifted and scaled by the features."""

    def __init__(self, c_in: int, c: int, features: int):
        super().__init__()
        self.first = nn.Sequential(_GroupNorm(c_in), nn.SiLU(), nn.Conv2d(c_in, c, 3, padding=1))
        self.modulation = nn.Linear(features, 2 * c)
        self.second = nn.Conv2d(c, c, 3, padding=1)
        self.skip = nn.Conv2d(c_in, c, 1) if c_in != c else nn.Identity()
        for weight in (self.modulation.weight, self.second.weight):
            nn.init.normal_(weight, std=1e-2 / weight[0].numel() ** 0.5)  # begins near the identity

    def forward(self, h: Tensor, features: Tensor) -> Tensor:
        scale, shift = self.modulation(features)[:, :, None, None].chunk(2, 1)
        inner = F.group_norm(self.first(h), GROUPS) * (1 + scale) + shift
        return self.skip(h) + self.second(F.silu(inner))


class _Level(nn.ModuleList):
    """Blocks, one after the other."""

    def forward(self, h: Tensor, features: Tensor) -> Tensor:
        for block in self:
            h = block(h, features)
        return h


class _Attention(nn.Module):
    """h + self-attention over its pixels, in one head, with what the pixels' places add to it learnt by convolution."""

    def __init__(self, c: int):
        super().__init__()
        self.norm = _GroupNorm(c)
        self.inlet = nn.Conv2d(c, 3 * c, 3, padding=1)
        self.outlet = nn.Conv2d(c, c, 1)
        for weight in self.outlet.parameters():
            nn.init.zeros_(weight)

    def forward(self, h: Tensor) -> Tensor:
        q, k, v = self.inlet(self.norm(h)).flatten(2).chunk(3, 1)  # (B, C, pixels) each
        # Written out, as torch has no forward-mode derivative of its fused attention.
        weights = torch.softmax(q.mT @ k * q.shape[1] ** -0.5, -1)
        return h + self.outlet((v @ weights.mT).view_as(h))


class _GroupNorm(nn.GroupNorm):
    """GroupNorm that forward mode passes through when compiled, too: its affine part is not in the kernel."""

    def __init__(self, c: int):
        super().__init__(GROUPS, c)

    def forward(self, h: Tensor) -> Tensor:
        return F.group_norm(h, self.num_groups, eps=self.eps) * self.weight[:, None, None] + self.bias[:, None, None]
