"""`imagenet.encode` with the means of patches in the place of a VAE: no diffusers, which takes seconds to import.

python -m tests.imagenet_patches OPTIONS OF imagenet.encode
"""

import runpy

import torch

import imagenet.vae
from imagenet.vae import VAE


class Patches(VAE):
    """Means of patches of 8 × 8 pixels, and their absolute values for standard deviations."""

    name, scale, channels, factor = "patches", 1.0, 3, 8
    device, identity = torch.device("cpu"), {"id": "patches", "sha256": "0", "scale": 1.0}
    __init__ = object.__init__
    load = classmethod(lambda cls, *_: cls())

    def moments(self, images):
        means = torch.nn.functional.avg_pool2d(images, 8)
        return torch.cat([means, means.abs()], 1)


if __name__ == "__main__":
    torch.set_num_threads(1)
    imagenet.vae.VAE = Patches
    runpy.run_module("imagenet.encode", run_name="__main__", alter_sys=True)
