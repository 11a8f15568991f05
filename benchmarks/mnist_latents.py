"""What the ImageNet rung needs of its users, made of MNIST: a folder of images by class, and an autoencoder.

    python -m toy.mnist download --data data/mnist
    python -m benchmarks.mnist_latents --data data/mnist --out data/mnist-latents

writes

    images/0 … images/9    the training images as PNG, 28×28
    vae/                   an AutoencoderKL of diffusers: 32×32 pixels to latents (4, 8, 8), of standard deviation 1
    three.safetensors      a linear probe, fitted to 1 for threes and −1 for other digits

With them every command of `imagenet` runs as with Stable Diffusion's autoencoder; `benchmarks/ladder.sh` has them all.
The autoencoder is trained here.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, interpolate, mse_loss
from tqdm import tqdm

from imagenet.rewards import LinearProbe
from imagenet.vae import to_uint8
from mfm_ref.files import atomic_folder
from mfm_ref.options import option, parse
from toy.images.data import Images, load_images

SIZE = 32  # pixels of a side, as the autoencoder gets them
NOISE_WEIGHT = 1e-4  # of the divergence from N(0, I), a latent number, beside the mean square of a pixel


@dataclasses.dataclass(frozen=True)
class LatentsConfig:
    """Settings of the run."""

    data: Path = option(Path("data/mnist"), "folder of the four idx files")
    out: Path = option(Path("data/mnist-latents"), "folder of images and autoencoder")
    count: int = option(0, "images in the folder, the first ones; 0 for all 50,000")
    steps: int = option(3000, "updates of the autoencoder")
    batch: int = option(128, "images of an update")
    seed: int = option(0, "of weights, order and noise")
    device: str = option("cpu", "where torch computes")
    threads: int = option(2, "of torch on a CPU")


def write_images(images: Images, folder: Path) -> None:
    """Images as PNG in a folder for each class, by their number; a folder that is there is left alone."""
    if folder.exists():
        return
    with atomic_folder(folder) as temporary:
        pixels = to_uint8(((images.images + 1) / 2).expand(-1, 3, -1, -1))
        for k, (picture, digit) in enumerate(zip(pixels, images.classes.tolist(), strict=True)):
            (temporary / str(digit)).mkdir(exist_ok=True)
            Image.fromarray(picture[..., 0]).save(temporary / str(digit) / f"{k:05d}.png")


def new_autoencoder() -> Any:
    """Four pixels a side to one latent of four channels; 100,000 weights."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 16, 32),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=4,
        sample_size=SIZE,
        scaling_factor=1.0,
    )


def batches(images: Images, n: int, seed: int) -> Iterator[Tensor]:
    """Random images, `(n, 3, 32, 32)` in [−1, 1], without end."""
    rng = torch.Generator(images.images.device).manual_seed(seed)
    while True:
        found, _ = images.sample(n, rng)
        scaled = interpolate(found, SIZE, mode="bicubic", antialias=True, align_corners=False).clamp(-1, 1)
        yield scaled.expand(-1, 3, -1, -1)


def train_autoencoder(config: LatentsConfig, images: Images) -> nn.Module:
    """Reconstruction and a little of the divergence; at the end its latents are scaled to standard deviation 1."""
    torch.manual_seed(config.seed)
    model = new_autoencoder().to(config.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=config.steps)
    source = batches(images, config.batch, config.seed)
    bar = tqdm(range(config.steps), desc="autoencoder")
    for _ in bar:
        x = next(source)
        law = model.encode(x).latent_dist
        error = mse_loss(model.decode(law.sample()).sample, x)
        loss = error + NOISE_WEIGHT * law.kl().mean() / law.mean[0].numel()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(mean_square=f"{float(error):.4f}")
    with torch.no_grad():
        scale = 1 / float(model.encode(next(source)).latent_dist.sample().std())
    model.register_to_config(scaling_factor=scale)
    print(f"mean square of a pixel in [-1, 1]: {float(error):.4f}; scale of the latents: {scale:.4f}")
    return model


def pooled(images: Tensor) -> Tensor:
    """Features of uint8 images `(n, 3, H, W)` for `imagenet.evaluate`: the grey values of 8 × 8 cells, `(n, 64)`."""
    return adaptive_avg_pool2d(images.double().mean(1, keepdim=True), 8).flatten(1)


def fit_probe(images: Images, digit: int) -> LinearProbe:
    """A reward that tells one digit from the others, on pictures as the autoencoder makes them."""
    pictures = interpolate(images.images, SIZE, mode="bicubic", antialias=True, align_corners=False).clamp(-1, 1)
    targets = torch.where(images.classes == digit, 1.0, -1.0)
    return LinearProbe.fit(((pictures + 1) / 2).expand(-1, 3, -1, -1), targets, side=16)


def main(config: LatentsConfig) -> None:
    """Images and autoencoder; what is there is left alone."""
    torch.set_num_threads(config.threads)
    images = load_images("mnist", config.data).train
    kept = slice(config.count or None)
    write_images(Images(images.images[kept], images.classes[kept]), config.out / "images")
    fit_probe(Images(images.images[:10_000], images.classes[:10_000]), 3).save(config.out / "three.safetensors")
    if not (config.out / "vae").exists():
        there = Images(images.images.to(config.device), images.classes.to(config.device))
        model: Any = train_autoencoder(config, there)
        with atomic_folder(config.out / "vae") as temporary:
            model.save_pretrained(temporary)


if __name__ == "__main__":
    main(parse(LatentsConfig, __doc__ or ""))
