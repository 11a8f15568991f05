"""Sets of samples: drawn in parts that stay on the disk, seen by both classifiers, shown in a grid."""

import dataclasses
import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mfm_ref import Cost, FlowMap, collect, integrate, time_grid
from mfm_ref.checks import Reward
from mfm_ref.collect import Draw
from mfm_ref.cost import counting
from mfm_ref.flow_map import unconditional_drift
from toy.common import ToyConfig, stream_of
from toy.images.classifiers import Classify, count_classes
from toy.images.rung import Rung
from toy.images.section import mosaic

ROWS = 1024  # images in one call of a network
MEMORY = 1e9  # bytes that the graphs of a step may take
SHOWN = 64  # images of each method in a picture


@dataclasses.dataclass(frozen=True)
class Method:
    """One way to get samples, each with its cost."""

    name: str  # of the folder that keeps them
    label: str
    kind: str
    n: int  # posterior draws per step, or candidates; 0 where there are none
    samples: int
    batch: int
    draw: Draw


def unsteered(X: FlowMap, reward: Reward, x0: Tensor, steps: int) -> Draw:
    """Samples of p₁ along the ODE of b_t (E2), read off the diagonal of the map."""

    def draw(rows: range, rng: torch.Generator) -> tuple[Tensor, Cost]:
        with torch.no_grad(), counting(X, reward, len(rows)) as (counted, _, cost):
            start = x0[rows.start : rows.stop]
            x = integrate(lambda t, x: unconditional_drift(counted, t, x), start, time_grid(steps))
        return x, cost

    return draw


def drawn(config: ToyConfig, stage: int, method: Method, tag: str) -> tuple[Tensor, Cost]:
    """The samples of a method, on the device; batches that an earlier run left in `out/checkpoints` are read."""
    x, cost = collect(
        method.draw,
        method.samples,
        min(method.batch, method.samples),
        folder=config.out / "checkpoints" / "samples" / f"{stage}-{method.name}",
        seed=stream_of(config, stage),
        tag=tag,
        device=config.device,
        progress=f"draw: {method.label}",
    )
    return x.to(config.device), cost


def tag_of(config: ToyConfig, kind: type[ToyConfig], *networks: nn.Module) -> str:
    """What samples depend on: the settings of a stage and the weights of its networks."""
    names = [f.name for f in dataclasses.fields(kind) if f.name not in ("out", "threads")]
    digest = hashlib.sha256()
    for network in networks:
        for name, weights in network.state_dict().items():
            content = weights.detach().cpu().contiguous().flatten().view(torch.uint8)
            digest.update(name.encode() + content.numpy().tobytes())
    return f"{ {name: getattr(config, name) for name in names} } {digest.hexdigest()}"


@torch.no_grad()
def in_parts(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A function of images `(B, …)`, a part of them at a time."""
    return torch.cat([function(part) for part in x.split(ROWS)])


def judged(rung: Rung, x: Tensor, reward: Reward) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Classes, their distance to w, agreement of both classifiers, mean reward; and the classes `(B,)` by both."""
    seen = {name: in_parts(classify, x) for name, classify in rung.classifiers.items()}

    def found(name: str) -> Classify:
        return lambda _: seen[name]

    facts = count_classes(x, {name: found(name) for name in seen})
    return {"samples": len(x), **facts, "reward": float(in_parts(reward, x).mean())}, seen


def bandwidth_of(x: Tensor) -> float:
    """Half the median distance of two images: two that are so typical have a kernel of e⁻² = 0.14."""
    return float(torch.pdist(x.flatten(1)).median()) / 2 if len(x) > 1 else 1.0


def shares(frequencies: Sequence[float]) -> list[str]:
    """Frequencies as text."""
    return [f"{value:.3f}" for value in frequencies]


def grid_of(x: Tensor) -> np.ndarray:
    """The largest square of images that there are enough for, at most 64."""
    side = math.isqrt(min(len(x), SHOWN))
    return mosaic(x[: side**2].unflatten(0, (side, side)))
