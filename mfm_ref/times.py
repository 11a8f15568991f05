"""Laws of the times in training: small functions that return what the objectives take."""

import math

import torch
from torch import Tensor

from mfm_ref.checks import check_count
from mfm_ref.gaussian import angle_of_time, time_of_angle


def context_time(
    n: int, *, zero_rate: float = 0.1, power: float = 2.0, generator: torch.Generator | None = None
) -> Tensor:
    """The paper's law of the context time t: 0 with probability 0.1, else U(0, 1)².

    Args:
        n: number of times, >= 1.
        zero_rate: probability of t = 0, in [0, 1].
        power: exponent of the uniform variable, > 0.
        generator: source of randomness; its device is where the times are made.

    Returns:
        times `(n,)` in [0, 1].

    Raises:
        ValueError: n < 1, zero_rate outside [0, 1], or power <= 0.
    """
    check_count(n, "n")
    if not (0 <= zero_rate <= 1 and power > 0):
        raise ValueError(f"zero_rate must lie in [0, 1] and power be positive, got {zero_rate} and {power}")
    u, v = _uniform(2, n, generator)
    return torch.where(v < zero_rate, 0.0, u**power)


def ordered_times(n: int, count: int = 2, *, generator: torch.Generator | None = None) -> Tensor:
    """`count` uniform times in rising order, `(count, n)`: (s, u), or (s, w, u) for the semigroup law."""
    check_count(n, "n")
    check_count(count, "count")
    return _uniform(count, n, generator).sort(0).values


def balanced_times(
    t: Tensor, std: Tensor, *, end_rate: float = 0.25, max_angle: float = 0.98, generator: torch.Generator | None = None
) -> Tensor:
    """Internal times s <= u, `(2, B)`, spread evenly over the change that the auxiliary flow makes.

    A posterior of standard deviation c leaves the noise at 1−s ~ c: for late contexts, uniform times would
    almost all come before that. Here the *angle* θ = atan2(s c, 1−s) is uniform instead, in which the flow of a
    Gaussian is uniform rotation.

    Args:
        t: context times `(B,)`; gives the batch, the dtype and the device.
        std: the posterior's standard deviation c `(B,)`, positive.
        end_rate: probability that u is replaced by 1, the end that sampling uses.
        max_angle: largest angle of s, as a fraction of π/2: beyond it the velocity is a difference of nearly
            equal numbers.
        generator: source of randomness.

    Raises:
        ValueError: shapes that differ.
    """
    if t.shape != std.shape:
        raise ValueError(f"t and std must have the same shape, got {tuple(t.shape)} and {tuple(std.shape)}")
    draws = torch.rand((3, *t.shape), generator=generator, dtype=t.dtype, device=t.device)
    angles = draws[:2].sort(0).values * (math.pi / 2)
    s, u = time_of_angle(angles[0] * max_angle, std), time_of_angle(angles[1], std)
    return torch.stack([s, torch.where(draws[2] < end_rate, 1.0, u)])


def step_towards(s: Tensor, u: Tensor, std: Tensor, step: float) -> Tensor:
    """w between s and u, at most `step` further in the angle of `balanced_times`; all `(B,)`."""
    w = time_of_angle(angle_of_time(s, std) + step, std)
    return torch.minimum(torch.maximum(w, s), u)


def _uniform(count: int, n: int, generator: torch.Generator | None) -> Tensor:
    device = None if generator is None else generator.device
    return torch.rand((count, n), generator=generator, device=device)
