"""Rewards of images that need no published weights: what shows that values, steering and fine-tuning work.

Each takes images in [0, 1], `(B, 3, H, W)`, to `(B,)`. All but the compressed size are differentiable everywhere.
"""

import io
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from imagenet.vae import to_uint8
from mfm_ref.checks import check_count, check_finite
from mfm_ref.files import read_weights, save_tensors

LUMA = (0.2126, 0.7152, 0.0722)  # of red, green and blue, by Rec. 709
JPEG_QUALITY = 95


def brightness(images: Tensor) -> Tensor:
    """The mean luma, in [0, 1]."""
    return _luma(images).mean((-1, -2))


def contrast(images: Tensor) -> Tensor:
    """√(Var + 10⁻⁶) of the luma over the pixels, in [0.001, 0.501]; uniform images have a gradient, too: 0."""
    return (_luma(images).var((-1, -2), correction=0) + 1e-6).sqrt()


def redness(images: Tensor) -> Tensor:
    """The mean of red less the mean of green and blue, in [−1, 1]."""
    red, green, blue = rgb(images).mean((-1, -2)).unbind(1)
    return red - (green + blue) / 2


class CompressedSize:
    """Bits per pixel of the image as a JPEG file of one quality: a black box, of which there is no gradient."""

    differentiable = False

    def __call__(self, images: Tensor) -> Tensor:
        """r(x): `(B, 3, H, W)` in [0, 1] -> `(B,)`. Raises ValueError for values outside [0, 1]."""
        from PIL import Image

        found = []
        for pixels in to_uint8(rgb(images)):
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, format="JPEG", quality=JPEG_QUALITY)
            found.append(8 * file.tell() / (pixels.shape[0] * pixels.shape[1]))
        return torch.tensor(found, dtype=images.dtype, device=images.device)


class LinearProbe:
    """r(x) = Σ w · pooled(x) + b, where pooled(x) are the means of x over the cells of an s × s grid.

    Of images, or of whatever else has C channels, such as latents.

    Args:
        weight: `(C, s, s)`.
        bias: one number, `()`.

    Raises:
        ValueError: another shape, or numbers that are not finite.
    """

    def __init__(self, weight: Tensor, bias: Tensor):
        if weight.ndim != 3 or weight.shape[1] != weight.shape[2] or bias.ndim != 0:
            shapes = f"{tuple(weight.shape)} and {tuple(bias.shape)}"
            raise ValueError(f"the weight of a probe must be (C, s, s) and its bias (), got {shapes}")
        check_finite(weight, "the weight of a probe")
        check_finite(bias, "the bias of a probe")
        self.weight, self.bias = weight, bias

    def __call__(self, x: Tensor) -> Tensor:
        """r(x): `(B, C, H, W) -> (B,)`. Raises ValueError for other channels, or fewer pixels than cells."""
        channels, side = self.weight.shape[:2]
        if x.ndim != 4 or x.shape[1] != channels or min(x.shape[2:]) < side:
            wanted = f"(B, {channels}, H, W) of at least {side} × {side}"
            hint = _undecoded(x) if channels == 3 else ""
            raise ValueError(f"this probe must be given {wanted}, got {tuple(x.shape)}{hint}")
        return (adaptive_avg_pool2d(x, side) * self.weight.to(x)).sum((1, 2, 3)) + self.bias.to(x)

    @classmethod
    def fit(cls, x: Tensor, targets: Tensor, *, side: int = 8, ridge: float = 1e-2) -> "LinearProbe":
        """The probe of least Σ (r(xᵢ) − targetᵢ)²/B + ridge · ‖w‖², in double precision.

        Args:
            x: `(B, C, H, W)`, such as images in [0, 1].
            targets: `(B,)`, such as 1 for one class and −1 for all others.
            side: s, cells of the grid, a side.
            ridge: > 0; it bears the pooled pixels that tell nothing.

        Raises:
            ValueError: targets of another number, or options out of range.
        """
        check_count(side, "side")
        if targets.shape != x.shape[:1] or not ridge > 0:
            raise ValueError(
                f"there must be a target for each image and ridge > 0, got {tuple(targets.shape)} for "
                f"{tuple(x.shape)}, and ridge {ridge}"
            )
        rows, y = adaptive_avg_pool2d(x.double(), side).flatten(1), targets.double()
        centre, level = rows.mean(0), y.mean()
        rows = rows - centre
        gram = rows.T @ rows / len(rows) + ridge * torch.eye(rows.shape[1], dtype=rows.dtype, device=rows.device)
        weight = torch.linalg.solve(gram, rows.T @ (y - level) / len(rows))
        return cls(weight.view(x.shape[1], side, side), level - weight @ centre)

    def save(self, path: Path | str) -> None:
        """Write it as safetensors."""
        save_tensors({"weight": self.weight.contiguous(), "bias": self.bias}, Path(path))

    @classmethod
    def load(cls, path: Path | str) -> "LinearProbe":
        """Read what `save` wrote. Raises ValueError for a file that is missing or holds anything else."""
        found = read_weights(Path(path))
        if set(found) != {"weight", "bias"}:
            raise ValueError(f"{path} must hold weight and bias, as LinearProbe.save writes them, got {sorted(found)}")
        return cls(found["weight"], found["bias"])


def _luma(images: Tensor) -> Tensor:
    return torch.einsum("bchw,c->bhw", rgb(images), images.new_tensor(LUMA))


def rgb(images: Tensor) -> Tensor:
    """The images. Raises ValueError unless they are `(B, 3, H, W)` of real numbers."""
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        got = f"{images.dtype} {tuple(images.shape)}{_undecoded(images)}"
        raise ValueError(f"images must be (B, 3, H, W) of real numbers, got {got}")
    return images


def _undecoded(x: Tensor) -> str:
    """A word on what may be latents."""
    return ": these may be latents, which --vae decodes" if x.ndim == 4 and x.shape[1] != 3 else ""
