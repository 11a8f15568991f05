"""What the loss does not show: samples on the way, and how far their latents are from the data's, without Inception.

The proxy is the Fréchet distance of two Gaussians fitted to features of latents: the mean and the standard deviation
within each of 4 × 4 cells, in every channel. It falls with the FID of one training, sees blur and wrong colours, and
compares runs of one kind of latents and one number of samples alone.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from imagenet.commands import in_precision
from imagenet.latents import GivenLatents, Latents
from imagenet.npz import write_npz
from imagenet.presets import TrainOptions
from imagenet.run import GRID, decoded, generator_of, generators, grid, save_image
from imagenet.vae import VAE
from mfm_ref import FeatureStatistics, FlowMap, Guided, MetaFlowMap, frechet_gaussian, integrate, sample, time_grid
from mfm_ref.files import atomic_path
from mfm_ref.flow_map import unconditional_drift
from mfm_ref.sampling import noise_like

CELLS = 4  # a side
EULER = 10  # steps of the flow stage, whose network makes no jumps
TOGETHER = 256  # samples that are made at once
MOST = 20_000  # images whose latents stand for the data
REFERENCE, LABELLED = 111, 112  # what streams of random numbers are for; see imagenet.run


class Proxy:
    """A callback of the trainer: OUT/samples/step-00005000.png (or .npz) and a line of OUT/proxy.jsonl.

    A line has the step, the distance `frechet`, the number of samples, of images that stand for the data, and the
    evaluations of a sample: one jump from noise, or Euler's steps in the flow stage. Labels are those of images drawn
    from the data, guidance is the scale that is trained; samples are of the same noise at every step.

    Args:
        config: of the run.
        latents: the data.
        vae: that decodes the samples; None to keep latents.
    """

    def __init__(self, config: TrainOptions, latents: Latents | GivenLatents, vae: VAE | None):
        self.config, self.latents, self.vae = config, latents, vae
        places = torch.randint(latents.n, (config.samples,), generator=generator_of(config.seed, LABELLED))
        self.labels = latents.labels[places]
        self._reference: FeatureStatistics | None = None

    @torch.no_grad()
    def __call__(self, average: FlowMap, step: int) -> None:
        """Sample the average after `step` updates, and write what was found."""
        name = self.config.out / "samples" / f"step-{step:08d}"
        found, first = FeatureStatistics(), None
        for part in torch.arange(self.config.samples).split(TOGETHER):
            latents = self._drawn(average, part)
            found.update(features(latents))
            if first is None:
                first = latents[: GRID**2]
        assert first is not None
        if self.vae is None:
            write_npz(name.with_suffix(".npz"), [first.cpu().numpy()], self.labels[: len(first)].numpy())
        else:
            save_image(grid(decoded(self.vae, first), GRID), name.with_suffix(".png"))
        reference = self.reference()
        distance = frechet_gaussian(found.mean, found.cov, reference.mean, reference.cov)
        line = {"step": step, "frechet": float(distance), "samples": found.count, "reference": reference.count}
        add_line(self.config.out / "proxy.jsonl", line | {"evaluations": EULER if self.config.stage == "flow" else 1})

    def _drawn(self, average: FlowMap, numbers: Tensor) -> Tensor:
        """The samples of some numbers, `(n, *D)`."""
        y, sources = self.labels[numbers].to(average.device), generators(self.config.seed, numbers.tolist())
        X: MetaFlowMap = Guided(average, self.config.guidance) if average.reads_guidance else average
        with in_precision(self.config.precision, average.device):
            if self.config.stage != "flow":
                return sample(X, len(y), 1, y=y, generator=sources).float()
            noise = noise_like(X, len(y), generator=sources)
            return integrate(lambda t, x: unconditional_drift(X, t, x, y).to(x), noise, time_grid(EULER))

    def reference(self) -> FeatureStatistics:
        """Features of the data, from at most 20,000 images, each drawn once from its moments."""
        if self._reference is None:
            self._reference = FeatureStatistics()
            order = torch.randperm(self.latents.n, generator=generator_of(self.config.seed, REFERENCE))[:MOST]
            for rows in order.split(TOGETHER):
                sources = [generator_of(self.config.seed, int(i), REFERENCE) for i in rows]
                self._reference.update(features(self.latents.draw(rows, sources)))
        return self._reference


def features(latents: Tensor) -> Tensor:
    """Mean and standard deviation within cells of latents `(n, C, h, w)`: `(n, 2 · C · 16)`, double precision, CPU."""
    z = latents.cpu().double()
    mean = adaptive_avg_pool2d(z, CELLS)
    spread = (adaptive_avg_pool2d(z.square(), CELLS) - mean.square()).clamp_min(0).sqrt()
    return torch.cat([mean, spread], 1).flatten(1)


def add_line(path: Path, line: dict[str, Any]) -> None:
    """Add a line to a file of rising steps; lines from its step on, of a run that was killed, are removed."""
    kept = []
    for text in path.read_text().splitlines() if path.exists() else ():
        if json.loads(text)["step"] < line["step"]:
            kept.append(text)
    with atomic_path(path) as temporary:
        temporary.write_text("\n".join([*kept, json.dumps(line)]) + "\n")
