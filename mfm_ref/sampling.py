"""Samplers: from one posterior (E11), from the data law in a few steps (E19), and along any drift (E2, E6)."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor
from tqdm import tqdm

from mfm_ref.checks import Time, at_step, check_count, check_finite, check_same_shape, expand_time
from mfm_ref.flow_map import MetaFlowMap
from mfm_ref.interpolant import interpolate
from mfm_ref.noise import Source, normal

# Explicit Runge–Kutta methods: the stages (c_i, a_i1, …, a_i,i−1), and the weights b_i of the step.
TABLEAUX: dict[str, tuple[tuple[tuple[float, ...], ...], tuple[float, ...]]] = {
    "ode": (((0,),), (1,)),
    "midpoint": (((0,), (1 / 2, 1 / 2)), (0, 1)),
    "heun": (((0,), (1, 1)), (1 / 2, 1 / 2)),
    "dopri5": (
        (
            (0,),
            (1 / 5, 1 / 5),
            (3 / 10, 3 / 40, 9 / 40),
            (4 / 5, 44 / 45, -56 / 15, 32 / 9),
            (8 / 9, 19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
            (1, 9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
        ),
        (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
    ),
}
EVALUATIONS = {"ode": 1, "midpoint": 2, "heun": 2, "dopri5": 6, "sde": 1}  # of the drift, in one step
DYNAMICS = tuple(EVALUATIONS)


def noise_like(X: MetaFlowMap, *batch: int, generator: Source = None) -> Tensor:
    """Standard normal states `(*batch, *D)` in the map's dtype and on its device.

    A sequence of generators has one for each row of the last number of `batch` (see `normal`).
    """
    like = torch.empty(0, dtype=X.dtype, device=X.device)
    return normal((*batch, *X.shape), like, generator, rows=len(batch) - 1)


def sample_posterior(
    X: MetaFlowMap,
    t: Time,
    x: Tensor,
    n: int,
    steps: int = 1,
    *,
    y: Tensor | None = None,
    eps: Tensor | None = None,
    generator: Source = None,
) -> Tensor:
    """E11: n samples of p_{1|t}(·|x) for each context, X_{0,1}(ε; t, x) in one jump or along a grid.

    Args:
        X: a Meta Flow Map.
        t: context time `()` or `(B,)`, in [0, 1].
        x: noisy states `(B, *D)`.
        n: samples per context, >= 1.
        steps: network evaluations per sample, >= 1: X along 0 = s₀ < … < s_steps = 1, uniform.
        y: class labels `(B,)`, or None.
        eps: the noises `(n, B, *D)`; drawn where None.
        generator: source of the noises; of a sequence, generator b gives those of context b.

    Returns:
        samples `(n, B, *D)`, differentiable in x and eps.

    Raises:
        ValueError: a time outside [0, 1], counts below one, eps of another shape, or a sequence of generators that
            has not one for each context.
    """
    check_count(n, "n")
    check_count(steps, "steps")
    times = expand_time(t, x).flatten()
    if eps is None:
        eps = normal((n, *x.shape), x, generator, rows=1)
    if eps.shape != (n, *x.shape):
        raise ValueError(f"eps must have shape {(n, *x.shape)}, got {tuple(eps.shape)}")
    contexts = x.expand(n, *x.shape).flatten(0, 1)
    times = times.repeat(n)
    labels = None if y is None else y.repeat(n)
    z = eps.flatten(0, 1)
    for k in range(steps):
        z = X(k / steps, (k + 1) / steps, z, times, contexts, labels)
    return z.unflatten(0, (n, x.shape[0]))


def sample(
    X: MetaFlowMap,
    n: int,
    steps: int,
    *,
    times: Sequence[float] | None = None,
    y: Tensor | None = None,
    generator: Source = None,
) -> Tensor:
    """E19 (Algorithm 1): n samples of p₁, each from `steps` posterior draws with fresh noise between them.

    x₁ = X_{0,1}(ε; t_k, x), then x ← (1−t_{k+1}) ε′ + t_{k+1} x₁. Exact for every number of steps when X is.

    Args:
        X: a Meta Flow Map.
        n: number of samples, >= 1.
        steps: number of posterior draws K, >= 1.
        times: grid 0 = t₀ < … < t_K = 1; uniform where None.
        y: class labels `(n,)`, or None.
        generator: source of all noise; of a sequence, generator i gives that of sample i.

    Returns:
        samples `(n, *D)`.

    Raises:
        ValueError: counts below one, a grid that does not rise from 0 to 1 in `steps` steps, or a sequence of
            generators that has not one for each sample.
    """
    check_count(n, "n")
    check_count(steps, "steps")
    grid = time_grid(steps) if times is None else check_grid(times, steps)
    x = noise_like(X, n, generator=generator)
    for t, t_next in pairwise(grid):
        x1 = sample_posterior(X, t, x, 1, y=y, generator=generator)[0]
        x = interpolate(noise_like(X, n, generator=generator), x1, t_next)
    return x


def time_grid(steps: int, *, power: float = 1.0) -> list[float]:
    """The grid (k/K)^power, k = 0 … K (E21), power > 0; uniform for power 1, denser early for a larger one."""
    check_count(steps, "steps")
    if not 0 < power < math.inf:
        raise ValueError(f"power must be positive and finite, got {power}")
    return [(k / steps) ** power for k in range(steps + 1)]


def log_snr_grid(steps: int, *, limit: float = 10.0) -> list[float]:
    """A grid of K steps, uniform in the log signal-to-noise ratio λ = 2 log(t/(1−t)) from −limit to limit.

    t = 0 and t = 1, where λ is infinite, take the place of the ends: denser at both of them. The first and the last
    step stay near 1/(1 + e^{limit/2}) as K grows, so a finer grid also needs a larger limit.
    """
    check_count(steps, "steps")
    if not 0 < limit < math.inf:
        raise ValueError(f"limit must be positive and finite, got {limit}")
    inner = (1 / (1 + math.exp(-limit * (k / steps - 0.5))) for k in range(1, steps))
    return [0.0, *inner, 1.0]


def check_grid(times: Sequence[float], steps: int | None = None) -> list[float]:
    """A grid as a list of floats. Raises ValueError unless it rises from 0 to 1 (in `steps` steps)."""
    grid = [float(t) for t in times]
    if len(grid) < 2 or grid[0] != 0.0 or grid[-1] != 1.0 or not all(a < b for a, b in pairwise(grid)):
        raise ValueError(f"times must rise strictly from 0 to 1, got {grid[:3]} … {grid[-3:]}")
    if steps is not None and len(grid) != steps + 1:
        raise ValueError(f"times must hold steps + 1 = {steps + 1} values, got {len(grid)}")
    return grid


def integrate(
    drift: Callable[[float, Tensor], Tensor],
    x: Tensor,
    times: Sequence[float],
    *,
    dynamics: str = "ode",
    generator: Source = None,
    progress: str | None = None,
) -> Tensor:
    """Carry noise to data along a drift b (E2), by the ODE or by the SDE with the same marginals (E6).

    All start at t = 0. The ODE dx/dt = b is taken in Runge–Kutta steps: "ode" is Euler's, of first order in the step,
    "midpoint" and "heun" are of second order, "dopri5" (Dormand and Prince) of fifth. "sde" takes steps of
    `sde_transition`, of first order in law. `EVALUATIONS` says how often a step asks for b. Heun's and Dormand and
    Prince's ask for it at both ends of a step, so that b must be finite at t = 1: b_t of a mixture and of a network
    are, and what divides by 1−t is not.

    Args:
        drift: `drift(t, x) -> (B, *D)`, t a number in [0, 1), or in [0, 1] for "heun" and "dopri5".
        x: noise `(B, *D)`, the state at t = 0.
        times: grid rising from 0 to 1.
        dynamics: "ode", "midpoint", "heun", "dopri5" or "sde".
        generator: source of the SDE's noise; of a sequence, generator b gives that of row b.
        progress: label of a progress bar; none where None.

    Returns:
        the state at t = 1, `(B, *D)`.

    Raises:
        ValueError: an unknown dynamics, a grid that does not rise from 0 to 1, or a drift of another shape
            than x or not finite (with the time of the step).
    """
    if dynamics not in DYNAMICS:
        raise ValueError(f"dynamics must be one of {', '.join(DYNAMICS)}, got {dynamics!r}")
    steps = list(pairwise(check_grid(times)))

    def velocity(t: float, state: Tensor) -> Tensor:
        b = drift(t, state)
        check_same_shape(drift=b, x=state)
        check_finite(b, "the drift")
        return b

    for k, (t, t_next) in enumerate(tqdm(steps, desc=progress, disable=progress is None, leave=False), 1):
        with at_step(k, len(steps), t):
            if dynamics == "sde":
                x = sde_step(x, x + (1 - t) * velocity(t, x), t, t_next, generator=generator)
            else:
                x = runge_kutta_step(velocity, x, t, t_next, dynamics)
    return x


def runge_kutta_step(
    velocity: Callable[[float, Tensor], Tensor], x: Tensor, t: float, t_next: float, method: str
) -> Tensor:
    """One step of length h from states x at t: k_i = b(t + c_i h, x + h Σ_j a_ij k_j), then x + h Σ_i b_i k_i."""
    stages, weights = TABLEAUX[method]
    h, slopes = t_next - t, list[Tensor]()

    def moved(by: Sequence[float]) -> Tensor:
        return sum((h * a * k for a, k in zip(by, slopes, strict=True) if a), start=x)

    for node, *row in stages:
        slopes.append(velocity(t + node * h, moved(row)))  # t + (1 − t) rounds to 1 itself, never to more
    return moved(weights)


def sde_transition(t: float, t_next: float) -> tuple[float, float, float]:
    """E6 over one step with the denoiser D held fixed: x′ = keep · x + gain · D + std · ξ.

    Exact in the noise although σ² is infinite at t = 0: in x/t the SDE is Brownian motion of variance
    κ² = ((1−t)/t)², run backwards, so with ρ = (κ′/κ)²

        keep = ρ t′/t,   gain = t′ (1−ρ),   std = (1−t′) √(1−ρ).

    Args:
        t, t_next: times of the step, 0 <= t < t_next <= 1.
    """
    keep = (1 - t_next) ** 2 * t / ((1 - t) ** 2 * t_next)
    rho = keep * t / t_next
    return keep, t_next * (1 - rho), (1 - t_next) * (1 - rho) ** 0.5


def sde_step(x: Tensor, denoised: Tensor, t: float, t_next: float, *, generator: Source = None) -> Tensor:
    """One draw of `sde_transition` from states x at t, given D `(B, *D)`."""
    keep, gain, std = sde_transition(t, t_next)
    return keep * x + gain * denoised + std * normal(x.shape, x, generator)
