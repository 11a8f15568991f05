"""What `imagenet.finetune` measures on the way: rewards and diversity of samples, whose labels and noises stay."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from imagenet.commands import in_precision
from imagenet.measures import diversity, mean_and_error
from imagenet.prompts import prompts_for
from imagenet.rewards import LatentReward, RewardSum
from imagenet.run import GRID, ModelOptions, decoded, generators, grid, guided, save_image
from imagenet.sample import SampleOptions, draw
from imagenet.vae import VAE
from mfm_ref import FlowMap
from mfm_ref.checks import evaluate_reward
from mfm_ref.files import atomic_path


@dataclasses.dataclass(frozen=True)
class Measures:
    """How networks are measured, and the folder of the results."""

    model: ModelOptions  # how a network is evaluated; its folder `out` gets the results
    labels: Tensor  # (n,), of the samples; each class is there twice or more
    steps: int  # of Euler
    batch: int  # samples that are made together
    reward: RewardSum  # that is trained for
    held_out: dict[str, RewardSum]  # that are not
    vae: VAE | None
    prompt: str  # with {class} for the name of a class
    names: list[str] | None  # of the classes; None where they are not known
    decode: int  # samples that are decoded together

    @property
    def rewards(self) -> tuple[RewardSum, ...]:
        """All of them, first the one that is trained for."""
        return self.reward, *self.held_out.values()

    def on_latents(self, reward: RewardSum, y: Tensor, scale: float = 1.0) -> LatentReward:
        """`scale` times a reward, of latents of which row i has label y_i."""
        prompts = prompts_for(self.prompt, y.tolist(), self.names) if reward.reads_prompts else None
        return LatentReward(self.vae, reward, prompts, scale, decode=self.decode)

    def try_rewards(self, shape: tuple[int, ...], *, by_gradient: bool) -> None:
        """Score one latent `(1, *D)` of noise by every reward, so that none fails after the work of an evaluation.

        Args:
            shape: *D.
            by_gradient: whether the reward that is trained for needs a gradient.

        Raises:
            ValueError: a reward that fails, or has no gradient; prompts with names, where a class has none.
        """
        x = torch.randn(1, *shape, generator=generators(self.model.seed, [0])[0]).to(self.model.device)
        for reward in self.rewards:
            with torch.set_grad_enabled(by_gradient and reward is self.reward):
                r = evaluate_reward(self.on_latents(reward, self.labels).of_row(0), x.requires_grad_())
            if by_gradient and reward is self.reward and not r.requires_grad:
                raise ValueError("--reward must have a gradient, and what it returns has none: use --method stein")

    @torch.no_grad()
    def samples(self, network: FlowMap) -> Tensor:
        """Samples along the ODE of a network, `(n, *D)` on the CPU."""
        how, X, found = SampleOptions(method="euler", steps=self.steps), guided(network, self.model), []
        for rows in torch.arange(len(self.labels)).split(self.batch):
            y, sources = self.labels[rows].to(X.device), generators(self.model.seed, rows.tolist())
            with in_precision(self.model.precision, self.model.device):
                found.append(draw(how, X, y, sources).float().cpu())
        return torch.cat(found)

    @torch.no_grad()
    def scores(self, reward: RewardSum, x: Tensor) -> Tensor:
        """A reward of samples `(n, *D)`, `(n,)`, float64."""
        pairs = zip(x.split(self.batch), self.labels.split(self.batch), strict=True)
        return torch.cat([self.on_latents(reward, y)(part.to(self.model.device)).double().cpu() for part, y in pairs])

    def take(self, network: FlowMap, step: int) -> Tensor:
        """Measure a network after `step` updates: its line of rewards.jsonl, and its grid; the rewards `(n,)`.

        A line of this step that is there is replaced: what is measured again is the same.
        """
        lines, x = self.lines(), self.samples(network)
        r, spread = self.scores(self.reward, x), diversity(x, self.labels)
        lines[step] = {
            "step": step,
            "reward": mean_and_error(r),
            "held_out": {name: mean_and_error(self.scores(reward, x)) for name, reward in self.held_out.items()},
            "diversity": spread,
            "diversity_of_base": lines[0]["diversity"] if step else spread,
        }
        if self.vae is not None:
            images = decoded(self.vae, x[: GRID**2].to(self.vae.device))
            save_image(grid(images, GRID), self.model.out / f"grid-{step:08d}.png")
        with atomic_path(self.path) as temporary:
            temporary.write_text("".join(json.dumps(lines[k]) + "\n" for k in sorted(lines)))
        return r

    @property
    def path(self) -> Path:
        """rewards.jsonl."""
        return self.model.out / "rewards.jsonl"

    def lines(self) -> dict[int, dict[str, Any]]:
        """What has been measured, by steps."""
        found = [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.exists() else []
        return {line["step"]: line for line in found}
