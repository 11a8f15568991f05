"""A plain training loop for one process: Adam, warm-up and cosine decay, clipping, and an average of the weights."""

import copy
import math
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn
from tqdm import trange

from mfm_ref.checks import check_count, check_finite

Model = TypeVar("Model", bound=nn.Module)


def train(
    model: Model,
    loss: Callable[[Model], Tensor],
    *,
    steps: int,
    lr: float = 2e-3,
    warmup: int = 100,
    clip: float = 1.0,
    decay: float = 0.999,
    progress: str | None = None,
) -> tuple[Model, list[float]]:
    """Minimise `loss(model)`, a fresh draw at each call, and average the weights on the way.

    Args:
        model: trained in place.
        loss: `loss(model) -> ()`; draws its own batch, so that its generator alone decides the data.
        steps: number of updates, >= 1.
        lr: peak learning rate; rises linearly over `warmup` updates, then falls to 0 as a cosine.
        warmup: number of updates of the rise.
        clip: largest norm of the gradient.
        decay: of the exponential average; the k-th update uses min(decay, (1+k)/(10+k)).
        progress: label of a progress bar that shows the loss; none where None.

    Returns:
        the averaged model, in eval mode and without gradients, and the loss of each step.

    Raises:
        ValueError: steps < 1, or (with its step) a loss that is not finite.
    """
    check_count(steps, "steps")
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda k: min(1.0, (k + 1) / warmup) * (1 + math.cos(math.pi * k / steps)) / 2
    )
    average = copy.deepcopy(model).eval().requires_grad_(False)
    history = []
    bar = trange(steps, desc=progress, disable=progress is None, leave=False)
    for k in bar:
        current = loss(model)
        check_finite(current, f"the loss at step {k}")
        optimizer.zero_grad()
        current.backward()
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            keep = min(decay, (1 + k) / (10 + k))
            for mean, weight in zip(average.parameters(), model.parameters(), strict=True):
                mean.lerp_(weight, 1 - keep)
        history.append(current.item())
        if k % 50 == 0:
            bar.set_postfix(loss=f"{history[-1]:.4f}")
    return average, history
