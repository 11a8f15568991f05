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
    return context_of(*_uniform(2, n, generator), zero_rate=zero_rate, power=power)


def context_of(u: Tensor, v: Tensor, *, zero_rate: float = 0.1, power: float = 2.0) -> Tensor:
    """The context time of two uniform numbers, of any one shape: 0 where v < zero_rate, else u^power."""
    return torch.where(v < zero_rate, 0.0, u**power)


def ordered_times(n: int, count: int = 2, *, generator: torch.Generator | None = None) -> Tensor:
    """`count` uniform times in rising order, `(count, n)`: (s, u), or (s, w, u) for the semigroup law."""
    check_count(n, "n")
    check_count(count, "count")
    return _uniform(count, n, generator).sort(0).values


def logit_normal_times(
    n: int, count: int = 2, *, mean: float = 0.0, std: float = 1.0, generator: torch.Generator | None = None
) -> Tensor:
    """`count` times 1/(1 + e^−a), a ~ N(mean, std²), in rising order, `(count, n)`: few at the ends.

    Raises:
        ValueError: counts below one, std <= 0, or a mean that is not finite.
    """
    check_count(n, "n")
    check_count(count, "count")
    if not (std > 0 and math.isfinite(mean)):
        raise ValueError(f"std must be positive and mean finite, got {std} and {mean}")
    device = None if generator is None else generator.device
    normal = torch.randn((count, n), generator=generator, device=device)
    return torch.sigmoid(mean + std * normal).sort(0).values


def annealed_times(n: int, progress: float, *, generator: torch.Generator | None = None) -> Tensor:
    """Times s <= u, `(2, n)`, no further apart than `progress`, in [0, 1]: short jumps first, all of them at the end.

    The gap u−s is that of two uniform times, times `progress`; s is uniform in what remains.
    """
    check_count(n, "n")
    if not 0 <= progress <= 1:
        raise ValueError(f"progress must lie in [0, 1], got {progress}")
    first, second, place = _uniform(3, n, generator)
    gap = progress * (first - second).abs()
    s = place * (1 - gap)
    return torch.stack([s, (s + gap).clamp_max(1.0)])


def balanced_times(
    t: Tensor,
    std: Tensor,
    *,
    start_rate: float = 0.0,
    end_rate: float = 0.25,
    max_angle: float = 0.98,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Internal times s <= u, `(2, B)`, spread evenly over the change that the auxiliary flow makes.

    A posterior of standard deviation c leaves the noise at 1−s ~ c: for late contexts, uniform times would
    almost all come before that. Here the *angle* θ = atan2(s c, 1−s) is uniform instead, in which the flow of a
    Gaussian is uniform rotation: both angles uniform, in order, or one of them at an end and the other uniform.

    Args:
        t: context times `(B,)`; gives the batch, the dtype and the device.
        std: the posterior's standard deviation c `(B,)`, positive.
        start_rate: probability of s = 0, where sampling starts.
        end_rate: probability of u = 1, where sampling ends.
        max_angle: largest angle of s, as a fraction of π/2: beyond it the velocity is a difference of nearly
            equal numbers.
        generator: source of randomness.

    Raises:
        ValueError: shapes that differ, or rates that are no probabilities.
    """
    if t.shape != std.shape:
        raise ValueError(f"t and std must have the same shape, got {tuple(t.shape)} and {tuple(std.shape)}")
    if not (start_rate >= 0 and end_rate >= 0 and start_rate + end_rate <= 1):
        raise ValueError(f"start_rate and end_rate must be probabilities, got {start_rate} and {end_rate}")
    first, second, place = torch.rand((3, *t.shape), generator=generator, dtype=t.dtype, device=t.device)
    at_end, at_start = place < end_rate, place > 1 - start_rate
    low = torch.where(at_end, first, torch.where(at_start, 0.0, torch.minimum(first, second)))
    high = torch.where(at_start, first, torch.maximum(first, second)) * (torch.pi / 2)
    s, u = time_of_angle(low * (max_angle * torch.pi / 2), std), time_of_angle(high, std)
    return torch.stack([s, torch.where(at_end, 1.0, torch.maximum(s, u))])


def step_towards(s: Tensor, u: Tensor, std: Tensor, step: float) -> Tensor:
    """w between s and u, at most `step` further in the angle of `balanced_times`; all `(B,)`."""
    w = time_of_angle(angle_of_time(s, std) + step, std)
    return torch.minimum(torch.maximum(w, s), u)


def _uniform(count: int, n: int, generator: torch.Generator | None) -> Tensor:
    device = None if generator is None else generator.device
    return torch.rand((count, n), generator=generator, device=device)
