"""A reward of images as one of latents: decoded a few at a time, with checkpointed gradients."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from imagenet.prompts import rows_of
from imagenet.vae import VAE
from mfm_ref.checks import check_count


class LatentReward:
    """r(x₁) = scale · reward(decode(x₁), prompts): what steering and fine-tuning on latents take.

    Args:
        vae: that decodes; None: the reward acts on latents themselves.
        reward: `(images, prompts) -> (B,)`, such as `load_reward` gives; prompts are a list of B, or None.
        prompts: one for all rows; or a list, of which row i has prompt i mod len, as draws `(n·B, *D)` lie n-major;
            or None.
        scale: λ.
        checkpointed: keep no activations of the decoder and the reward for the gradient, but compute them again, for
            one part of the batch after the other. The gradient is the same.
        decode: rows in a part.

    Attributes:
        differentiable: whether gradients go through.

    Raises:
        ValueError: decode below 1.
    """

    def __init__(
        self,
        vae: VAE | None,
        reward: Any,
        prompts: str | Sequence[str] | None = None,
        scale: float = 1.0,
        *,
        checkpointed: bool = True,
        decode: int = 8,
    ):
        check_count(decode, "decode")
        self.vae, self.reward, self.prompts, self.scale = vae, reward, prompts, scale
        self.checkpointed, self.decode = checkpointed, decode
        self.differentiable: bool = getattr(reward, "differentiable", True)

    def __call__(self, x1: Tensor) -> Tensor:
        """r(x₁): latents `(B, *D) -> (B,)`.

        Raises:
            ValueError: a list of prompts whose length does not divide B; a reward that does not give `(B,)`.
        """
        prompts = rows_of(self.prompts, len(x1))
        found = []
        for start in range(0, len(x1), self.decode):
            rows = slice(start, start + self.decode)
            found.append(self._part(x1[rows], prompts and prompts[rows]))
        return self.scale * torch.cat(found)

    def of_row(self, i: int) -> "LatentReward":
        """The reward of row i alone, with its prompt."""
        prompts = [self.prompts] if isinstance(self.prompts, str) else self.prompts
        one = prompts[i % len(prompts)] if prompts else None
        return LatentReward(self.vae, self.reward, one, self.scale, checkpointed=self.checkpointed, decode=self.decode)

    def _part(self, x1: Tensor, prompts: list[str] | None) -> Tensor:
        if not self.differentiable:
            with torch.no_grad():
                return self._of(x1, prompts)
        if self.checkpointed and torch.is_grad_enabled() and x1.requires_grad:
            return checkpoint(self._of, x1, prompts, use_reentrant=False)
        return self._of(x1, prompts)

    def _of(self, x1: Tensor, prompts: list[str] | None) -> Tensor:
        found = self.reward(x1 if self.vae is None else self.vae.decode(x1), prompts)
        check_rewards(found, x1, getattr(self.reward, "__name__", type(self.reward).__name__))
        return found


def check_rewards(found: Any, x: Tensor, name: str) -> None:
    """Raise ValueError, with the reward's name, unless it has given one number for each row of x, `(B,)`."""
    if not isinstance(found, Tensor) or found.shape != x.shape[:1]:
        got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(f"the reward {name} must give one number for each image, ({len(x)},), got {got}")
