"""Tiny things for the tests of imagenet/: an autoencoder, a network, and real photographs cut into classes."""

from pathlib import Path

import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from torch import nn

from imagenet.encode import FORMAT
from imagenet.shards import Shards
from imagenet.sit import SiT, build
from mfm_ref.files import save_json

SIZE = 64  # of an image, a side; its latents are (4, 8, 8)
TILES = (3, 4)  # rows and columns of a photograph
CLASSES = ("china", "flower")


def tiny_vae(folder: Path, seed: int = 0, latent_channels: int = 4) -> Path:
    """A folder with an AutoencoderKL of random weights: 8 pixels a latent, as Stable Diffusion's, 25,000 parameters."""
    from diffusers import AutoencoderKL

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoencoderKL(
            block_out_channels=(8, 8, 8, 8),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=1,
            norm_num_groups=4,
            latent_channels=latent_channels,
            sample_size=SIZE,
        )
    model.save_pretrained(folder)
    return Path(folder)


def photographs(folder: Path) -> Path:
    """An ImageFolder tree of two classes, 12 tiles (142 × 160) of each of scikit-learn's two photographs.

    The first row of each class is JPEG in upper case, the others PNG; the last one lies in a folder of its own.
    """
    for name in CLASSES:
        photograph = Image.fromarray(load_sample_image(f"{name}.jpg"))
        across, down = photograph.width // TILES[1], photograph.height // TILES[0]
        for row in range(TILES[0]):
            for column in range(TILES[1]):
                left, top = column * across, row * down
                tile = photograph.crop((left, top, left + across, top + down))
                last = (row + 1, column + 1) == TILES
                path = folder / name / ("nested" if last else "") / f"{row}{column}{'.png' if row else '.JPEG'}"
                path.parent.mkdir(parents=True, exist_ok=True)
                tile.save(path)
    return folder


def tiny_sit(
    kind: str = "mfm", n_classes: int = 2, shape: tuple[int, ...] = (4, 8, 8), seed: int = 0, **options: object
) -> SiT:
    """A network of size tiny in which every weight counts, in eval mode; an "mfm" has the guidance scales 1 and 2.5."""
    if kind == "mfm":
        options = {"guidance": [1.0, 2.5], **options}
    network = build("tiny", kind, shape=shape, n_classes=n_classes, **options)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(network.named_parameters()):
        if parameter.requires_grad:  # positions are as they should be
            fan_in = parameter[0].numel() if parameter.ndim > 1 and "labels" not in name else 4
            nn.init.normal_(parameter, std=0.7 * fan_in**-0.5, generator=generator)
    return network.eval()


def tiny_latents(folder: Path, n: int = 24, size: int = 8, vae: dict[str, object] | None = None) -> Path:
    """A folder as imagenet.encode leaves it, in shards of `size`: two classes, of opposite means, with no images."""
    shape, seed = (4, 8, 8), 0
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % len(CLASSES)
    sign = (2.0 * labels - 1).reshape(-1, 1, 1, 1, 1)
    mean = sign + 0.3 * torch.randn(n, 2, *shape, generator=generator)
    moments = torch.cat([mean, torch.full_like(mean, 0.2)], 2).half().numpy()
    shards, facts = Shards(folder, {}), []
    for k, first in enumerate(range(0, n, size)):
        part = slice(first, first + size)
        shards.write(k, {"moments": moments[part], "labels": labels[part].numpy()})
        arrays = shards.info(k)["arrays"]
        facts.append({"name": f"shard-{k:05d}", "sha256": {name: arrays[name]["sha256"] for name in arrays}})
    record = {"format": FORMAT, "vae": vae or {"id": "none", "sha256": "0", "scale": 0.5}, "shape": list(shape)}
    record |= {"flips": True, "counts": {"encoded": n}, "classes": list(CLASSES), "shards": facts}
    save_json(record, folder / "latents.json")
    return folder
