"""The autoencoder of latent diffusion, by diffusers: images to moments of their latents, latents to images."""

import hashlib
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mfm_ref.checks import check_finite


class VAE:
    """A KL autoencoder with frozen weights; latents are scaled, images RGB. `VAE.load` makes one.

    Args:
        model: diffusers' AutoencoderKL.
        name: where it came from, for messages and records.

    Attributes:
        scale: by which latents are multiplied; channels: of a latent; factor: pixels to one of the latents, a side.
        identity: what tells it from others in records: name, checksum of the weights, scale.

    Raises:
        ValueError: the model also shifts its latents, or scales each channel by itself.
    """

    def __init__(self, model: nn.Module, name: str):
        self.model, self.name = model.eval().requires_grad_(False), name
        config: Any = model.config
        self.scale = float(config.scaling_factor)  # where the config does not say, 0.18215, as Stable Diffusion's
        for shift in ("shift_factor", "latents_mean", "latents_std"):
            if getattr(config, shift, None) is not None:
                raise ValueError(f"{name} must scale its latents by one number and no more, got {shift} in its config")
        self.channels = int(config.latent_channels)
        self.factor = 2 ** (len(config.block_out_channels) - 1)
        self.identity = {"id": name, "sha256": sha256_of_weights(model), "scale": self.scale}

    @classmethod
    def load(cls, path_or_id: str, device: torch.device | str = "cpu") -> "VAE":
        """The autoencoder in a folder that diffusers wrote, or of a name on the Hugging Face hub.

        Raises:
            ValueError: there is none, with what to give; weights are missing, left over or of another shape.
            ImportError: diffusers is not installed.
        """
        try:
            from diffusers import AutoencoderKL
        except ImportError as error:
            raise ImportError("a VAE needs diffusers: pip install diffusers") from error
        try:
            # Without low_cpu_mem_usage it asks for one more package.
            model, found = AutoencoderKL.from_pretrained(path_or_id, low_cpu_mem_usage=False, output_loading_info=True)
        except (OSError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"{path_or_id!r} must be a folder with the config.json and the weights of an AutoencoderKL, or the "
                "name of one on the Hugging Face hub such as stabilityai/sd-vae-ft-mse; without a connection, get its "
                f"folder elsewhere and give the path to it ({type(error).__name__}: {error})"
            ) from error
        faults = {kind: names for kind, names in found.items() if names}
        if faults:  # diffusers draws what is missing at random
            raise ValueError(f"{path_or_id!r} must hold the weights of its config, got {faults}")
        return cls(model.to(device), path_or_id)

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return next(self.model.parameters()).device

    def latent_shape(self, size: int) -> tuple[int, int, int]:
        """(C, h, w) of the latents of square images. Raises ValueError for a size that is no multiple of `factor`."""
        if size < self.factor or size % self.factor:
            raise ValueError(f"the size of images must be a multiple of {self.factor} for {self.name}, got {size}")
        return self.channels, size // self.factor, size // self.factor

    def moments(self, images: Tensor) -> Tensor:
        """Mean and standard deviation of the unscaled latents of images.

        Args:
            images: `(B, 3, H, W)` in [−1, 1].

        Returns:
            `(B, 2C, h, w)`, the C channels of the mean first, without a graph.
        """
        with torch.no_grad():
            law = self.model.encode(images.to(self.device)).latent_dist  # type: ignore[operator]
            return torch.cat([law.mean, law.std], 1)

    def decode(self, latents: Tensor) -> Tensor:
        """Images in [0, 1], `(B, 3, H, W)`, of scaled latents `(B, C, h, w)`. Gradients go through, up to the clamp."""
        weight = next(self.model.parameters())
        images = self.model.decode(latents.to(weight) / self.scale).sample  # type: ignore[operator]
        return ((images + 1) / 2).clamp(0, 1)


def to_uint8(images: Tensor) -> np.ndarray:
    """Images `(B, 3, H, W)` in [0, 1] as bytes `(B, H, W, 3)`, each the nearest of 256 levels.

    Raises:
        ValueError: NaN or values outside [0, 1].
    """
    check_finite(images, "images")
    images = images.detach().float()
    if images.numel() and not (float(images.min()) >= 0 and float(images.max()) <= 1):
        raise ValueError(f"images must lie in [0, 1], got {float(images.min()):.4g} to {float(images.max()):.4g}")
    return (255 * images).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()


def sha256_of_weights(model: nn.Module) -> str:
    """The SHA-256 of a model's tensors, names and shapes, whatever the file they came in."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
