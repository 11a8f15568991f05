"""A training loop for one process: Adam, warm-up and cosine decay, clipping, averaged weights, exact resume."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from mfm_ref.checks import check_count, check_finite
from mfm_ref.files import atomic_path

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
    generator: torch.Generator | None = None,
    checkpoint: Path | None = None,
    every: int = 500,
    tag: str = "",
    progress: str | None = None,
) -> tuple[Model, list[float]]:
    """Minimise `loss(model)`, a fresh draw at each call, and average the weights on the way.

    Args:
        model: trained in place.
        loss: `loss(model) -> ()`; draws its own batch, from `generator` alone if the run is to resume exactly.
        steps: number of updates, >= 1.
        lr: peak learning rate; rises linearly over `warmup` updates, then falls to 0 as a cosine.
        warmup: number of updates of the rise.
        clip: largest norm of the gradient.
        decay: of the exponential average; the k-th update uses min(decay, (1+k)/(10+k)).
        generator: the loss's source of randomness; its state is part of a checkpoint.
        checkpoint: file that holds the run every `every` updates and at the end. If it exists, the run goes on
            from there, to the same numbers as one that was never stopped.
        every: updates between checkpoints.
        tag: says which run a checkpoint belongs to (its settings, for instance).
        progress: label of a progress bar that shows the loss; none where None.

    Returns:
        the averaged model, in eval mode and without gradients, and the loss of each step.

    Raises:
        ValueError: steps, warmup or every below one; a checkpoint of another run; or (with its step) a loss or
            gradient that is not finite.
    """
    check_count(steps, "steps")
    check_count(every, "every")
    check_count(warmup, "warmup")
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda k: min(1.0, (k + 1) / warmup) * (1 + math.cos(math.pi * k / steps)) / 2
    )
    average = copy.deepcopy(model).eval().requires_grad_(False)
    parts = {"model": model, "average": average, "optimizer": optimizer, "schedule": schedule}
    history: list[float] = []
    if checkpoint is not None and checkpoint.exists():
        history = _restore(checkpoint, parts, generator, tag)
    bar = tqdm(range(len(history), steps), desc=progress, disable=progress is None, leave=False)
    for k in bar:
        current = loss(model)
        check_finite(current, f"the loss at step {k}")
        optimizer.zero_grad()
        current.backward()
        check_finite(nn.utils.clip_grad_norm_(model.parameters(), clip), f"the gradient's norm at step {k}")
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            keep = min(decay, (1 + k) / (10 + k))
            for mean, weight in zip(average.parameters(), model.parameters(), strict=True):
                mean.lerp_(weight, 1 - keep)
            for kept, buffer in zip(average.buffers(), model.buffers(), strict=True):
                kept.copy_(buffer)  # running statistics are averages already
        history.append(current.item())
        if k % 50 == 0:
            bar.set_postfix(loss=f"{history[-1]:.4f}")
        if checkpoint is not None and ((k + 1) % every == 0 or k + 1 == steps):
            _store(checkpoint, parts, generator, tag, history)
    return average, history


def _store(
    path: Path, parts: dict[str, Any], generator: torch.Generator | None, tag: str, history: list[float]
) -> None:
    state: dict[str, Any] = {name: part.state_dict() for name, part in parts.items()}
    state |= {"tag": tag, "history": torch.tensor(history, dtype=torch.float64)}
    if generator is not None:
        state["generator"] = generator.get_state()
    with atomic_path(path) as temporary:
        torch.save(state, temporary)


def _restore(path: Path, parts: dict[str, Any], generator: torch.Generator | None, tag: str) -> list[float]:
    state = torch.load(path, weights_only=True)
    if state["tag"] != tag:
        raise ValueError(
            f"{path} belongs to a run with other settings; remove it or write elsewhere. "
            f"It says {state['tag']!r}, this run is {tag!r}"
        )
    for name, part in parts.items():
        part.load_state_dict(state[name])
    if generator is not None:
        generator.set_state(state["generator"])
    history: list[float] = state["history"].tolist()
    return history
