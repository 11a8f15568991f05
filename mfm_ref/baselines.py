"""What Meta Flow Maps are measured against (E20): Best-of-N, SMC with twists, GLASS and SDE rollouts."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from tqdm import tqdm

from mfm_ref.alignment import denoiser, guidance_factor, through_context
from mfm_ref.checks import (
    Reward,
    Time,
    at_step,
    check_count,
    check_finite,
    check_labels,
    check_order,
    evaluate_reward,
    expand_time,
)
from mfm_ref.cost import Cost, counting
from mfm_ref.flow_map import MetaFlowMap, unconditional_drift
from mfm_ref.interpolant import Drift, drift_to_denoiser, glass_drift
from mfm_ref.noise import Source, normal
from mfm_ref.sampling import check_grid, integrate, noise_like, sample_posterior, sde_transition, time_grid
from mfm_ref.search import best

# ---- Best-of-N -----------------------------------------------------------------------------------------


@torch.no_grad()
def best_of_n(
    X: MetaFlowMap,
    reward: Reward,
    n_samples: int,
    n: int,
    *,
    steps: int = 250,
    times: Sequence[float] | None = None,
    dynamics: str = "ode",
    y: Tensor | None = None,
    max_rows: int | None = None,
    generator: Source = None,
    progress: str | None = None,
) -> tuple[Tensor, Cost]:
    """E20: the best of n samples of p₁ each, by reward; the drift is b_t (E2), read off the diagonal of the map.

    Args:
        X: a Meta Flow Map.
        reward: callable `(B, *D) -> (B,)`, a black box.
        n_samples: number of results, >= 1.
        n: candidates for each, >= 1.
        steps: number of steps K of a uniform grid.
        times: another grid, rising from 0 to 1, in place of `steps`.
        dynamics: as in `integrate`.
        y: class labels `(n_samples,)`, or None.
        max_rows: largest number of rows in one call of the map or of the reward; None for no limit. It does not
            change the result. The states of all n·n_samples candidates are held in memory.
        generator: source of all noise; of a sequence, generator i gives that of all candidates of sample i.
        progress: label of a progress bar; none where None.

    Returns:
        samples `(n_samples, *D)`, and what they cost: nK + n evaluations each, with K the evaluations of the
        drift: the steps times the `EVALUATIONS` of the dynamics.

    Raises:
        ValueError: counts below one; from `integrate`; from `evaluate_reward`, named as the last step.
    """
    check_count(n_samples, "n_samples")
    check_labels(y, n_samples)
    check_count(n, "n")
    grid = time_grid(steps) if times is None else check_grid(times)
    labels = None if y is None else y.repeat(n)
    with counting(X, reward, n_samples) as (X, reward, cost):

        def drift(t: float, x: Tensor) -> Tensor:
            return by_rows(lambda x, y: (unconditional_drift(X, t, x, y),), max_rows, x, labels)[0]

        x = noise_like(X, n, n_samples, generator=generator).flatten(0, 1)
        of_rows = generator
        if generator is not None and not isinstance(generator, torch.Generator):
            of_rows = [*generator] * n
        x = integrate(drift, x, grid, dynamics=dynamics, generator=of_rows, progress=progress)
        with at_step(len(grid) - 1, len(grid) - 1, 1.0):
            (r,) = by_rows(lambda x: (evaluate_reward(reward, x),), max_rows, x)
        found = best(x.unflatten(0, (n, -1)), r.unflatten(0, (n, -1)), n_samples)
    return found, cost


def by_rows(
    function: Callable[..., tuple[Tensor, ...]], max_rows: int | None, *rows: Tensor | None
) -> tuple[Tensor, ...]:
    """`function(*rows)`, called with at most `max_rows` rows at a time; an argument that is None stays None.

    Raises:
        ValueError: max_rows below one.
    """
    if max_rows is None:
        return function(*rows)
    check_count(max_rows, "max_rows")
    total = next(len(a) for a in rows if a is not None)
    cuts = [slice(i, i + max_rows) for i in range(0, total, max_rows)]
    parts = [function(*(None if a is None else a[cut] for a in rows)) for cut in cuts]
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))


# ---- sequential Monte Carlo ----------------------------------------------------------------------------


@dataclass
class Particles:
    """The result of `smc`."""

    samples: Tensor  # (P, *D), of equal weight
    ess: list[float]  # effective sample size over P, at each step before resampling
    log_partition: float  # estimate of log E[e^r] under p₁; its exponential has no bias but that of the steps


@torch.no_grad()
def smc(
    X: MetaFlowMap,
    reward: Reward,
    n_particles: int,
    *,
    steps: int = 250,
    times: Sequence[float] | None = None,
    proposal: str = "guided",
    threshold: float = 0.5,
    y: Tensor | None = None,
    max_rows: int | None = None,
    generator: torch.Generator | None = None,
    progress: str | None = None,
) -> tuple[Particles, Cost]:
    """E20, the twisted diffusion sampler (TDS): one population of P particles, weighted towards p* ∝ p₁ e^r.

    The base chain p(x′|x) is the SDE of E6 (`sde_transition`), the twist ψ_t(x) = exp r(D_t(x)) a guess of e^{V_t}. A
    proposal q(x′|x) is weighted by p(x′|x) ψ_{t′}(x′) / (q(x′|x) ψ_t(x)), so that any q gives the tilted law of the
    base chain as P grows. The "guided" one has the DPS drift b* = b + (σ²/2) ∇r(D) in the place of b, "base" is p. The
    last step has no noise and ends on D, whose reward was its twist: its weight is 1, its proposal p.

    Args:
        X: a Meta Flow Map.
        reward: callable `(B, *D) -> (B,)`; a black box for the proposal "base", differentiable for "guided".
        n_particles: P, >= 1.
        steps: number of steps K of a uniform grid.
        times: another grid, rising from 0 to 1, in place of `steps`.
        proposal: "guided" or "base".
        threshold: resample (`systematic`) where the effective sample size is below threshold · P; in [0, 1].
        y: class labels `(P,)`, all the same, or None.
        max_rows: largest number of rows in one call of the map or of the reward; None for no limit. It does not
            change the result.
        generator: source of all randomness.
        progress: label of a progress bar; none where None.

    Returns:
        the particles after a last resampling to equal weights, and what they cost: 4K − 2 evaluations each, or 2K for
        the proposal "base".

    Raises:
        ValueError: counts, proposal, threshold or grid out of range, labels that differ; with the step's name, whatever
            is wrong with the map or the reward, or t = 0 for "guided" and a map that reads x (`through_context`).
    """
    check_count(n_particles, "n_particles")
    check_labels(y, n_particles)
    if proposal not in ("guided", "base"):
        raise ValueError(f'proposal must be "guided" or "base", got {proposal!r}')
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold must lie in [0, 1], got {threshold}")
    if y is not None and bool((y != y[0]).any()):
        raise ValueError(f"labels y must be one class: particles compete with each other, got {y.unique().tolist()}")
    grid = time_grid(steps) if times is None else check_grid(times)
    with counting(X, reward, n_particles) as (X, reward, cost):
        x = noise_like(X, n_particles, generator=generator)
        log_w = torch.zeros(n_particles, dtype=torch.float64, device=x.device)
        log_partition, ess = 0.0, []
        bar = tqdm(list(pairwise(grid)), desc=progress, disable=progress is None, leave=False)
        for k, (t, t_next) in enumerate(bar):
            with at_step(k + 1, len(grid) - 1, t):
                guided, last = proposal == "guided" and t_next < 1, t_next == 1
                denoised, r, push = _twist(X, reward, t, x, y, guided=guided, max_rows=max_rows)
                log_w = log_w + r
                ess.append(effective_share(log_w))
                if last or ess[-1] < threshold:
                    kept = systematic(log_w, generator=generator)
                    x, denoised, r, push = x[kept], denoised[kept], r[kept], push[kept]
                    log_partition += float(torch.logsumexp(log_w, 0)) - math.log(n_particles)
                    log_w = torch.zeros_like(log_w)
                keep, gain, std = sde_transition(t, t_next)
                shift = gain / (std or 1.0) * push  # of the mean, in units of std; the last step has neither
                xi = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
                x = keep * x + gain * denoised + std * (shift + xi)
                log_w = log_w - r + log_transition_ratio(xi, shift)
        x = x[torch.randperm(n_particles, generator=generator, device=x.device)]  # resampling leaves kin side by side
    return Particles(x, ess, log_partition), cost


def _twist(
    X: MetaFlowMap, reward: Reward, t: float, x: Tensor, y: Tensor | None, *, guided: bool, max_rows: int | None
) -> tuple[Tensor, ...]:
    """D_t(x), r(D) and what guidance adds to D: D* − D = (1−t) (b* − b) = (1−t) (σ²/2) ∇r(D), or 0 where not guided."""

    def base(x: Tensor, y: Tensor | None) -> tuple[Tensor, ...]:
        return *_denoised_reward(X, reward, t, x, y), torch.zeros_like(x)

    def pushed(x: Tensor, y: Tensor | None) -> tuple[Tensor, ...]:
        factor = (1 - t) * guidance_factor(X, t, x)
        with torch.enable_grad():
            reader, context = through_context(X, t, x)
            denoised, r = _denoised_reward(reader, reward, t, context, y)
            gradient = torch.autograd.grad(r.sum(), context, allow_unused=True)[0] if r.requires_grad else None
        if gradient is None:
            raise ValueError('proposal "guided" needs a differentiable reward, got one without a gradient; try "base"')
        check_finite(gradient, "the gradient of the reward")
        return denoised.detach(), r.detach(), factor * gradient

    return by_rows(pushed if guided else base, max_rows, x, y)


def _denoised_reward(X: MetaFlowMap, reward: Reward, t: float, x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
    """D_t(x) `(B, *D)` and r(D) `(B,)`."""
    denoised = denoiser(X, t, x, y)
    check_finite(denoised, "the denoiser")
    return denoised, evaluate_reward(reward, denoised)


def log_transition_ratio(xi: Tensor, shift: Tensor) -> Tensor:
    """log p(x′|x)/q(x′|x) `(P,)` at x′ = mean_p + std (shift + ξ), where q has the mean of p plus std · shift."""
    return -(shift * xi + shift**2 / 2).reshape(len(xi), -1).sum(1)


def effective_share(log_w: Tensor) -> float:
    """The effective sample size (Σw)²/Σw² over the number of weights: 1 where they are equal, 1/P where one is all."""
    return float(torch.exp(2 * torch.logsumexp(log_w, 0) - torch.logsumexp(2 * log_w, 0))) / len(log_w)


def systematic(log_w: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    """Systematic resampling: indices `(P,)`, i in expectation P w_i times and never more than 1 away from that.

    One uniform u, and the quantiles (u + j)/P, j = 0 … P−1, of the normalised weights w.
    """
    ends = torch.softmax(log_w.double(), 0).cumsum(0)
    u = torch.rand((), generator=generator, dtype=torch.float64, device=log_w.device)
    quantiles = (u + torch.arange(len(ends), device=ends.device)) / len(ends)
    return torch.searchsorted(ends / ends[-1], quantiles.clamp(max=1 - 2**-53), right=True)


# ---- expensive posteriors ------------------------------------------------------------------------------


class GlassRollout:
    """X_{s,u}(z; t, x) by Euler steps of the exact b̄ (E12) of a drift: the expensive posterior, behind the protocol.

    Args:
        drift: the base drift, `drift(t, x) -> (B, *D)`, called as `drift(t, x, y)` where y is given.
        shape: *D.
        steps: uniform Euler steps of each call, >= 1: one evaluation of the map is `steps` of the drift, one of its
            velocity on the diagonal is one.
        dtype: of the states.
        device: of the states.

    Raises:
        ValueError: steps below one. From every call: as `glass_drift`, and s > u.
    """

    reads_tx = False

    def __init__(
        self,
        drift: Drift,
        shape: tuple[int, ...],
        steps: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        check_count(steps, "steps")
        self.drift, self.shape, self.steps = drift, tuple(shape), steps
        self.dtype, self.device = dtype, torch.device(device)

    def __call__(self, s: Time, u: Time, z: Tensor, t: Time, x: Tensor, y: Tensor | None = None) -> Tensor:
        """X_{s,u}(z; t, x), `(B, *D)`, differentiable as the drift is."""
        check_order(s, u)
        s, u = expand_time(s, z, "s"), expand_time(u, z, "u")
        for k in range(self.steps):
            now = (s + (u - s) * (k / self.steps)).flatten()
            z = z + (u - s) / self.steps * glass_drift(self.drift, now, z, t, x, y)
        return z

    def velocity(self, s: Time, u: Time, z: Tensor, t: Time, x: Tensor, y: Tensor | None = None) -> Tensor:
        """(X_{s,u}(z) − z)/(u−s), and b̄_s where s = u; `(B, *D)`."""
        s, u = expand_time(s, z, "s"), expand_time(u, z, "u")
        apart = u > s
        if not bool(apart.any()):
            return glass_drift(self.drift, s.flatten(), z, t, x, y)
        mean = (self(s.flatten(), u.flatten(), z, t, x, y) - z) / torch.where(apart, u - s, 1.0)
        return torch.where(apart, mean, glass_drift(self.drift, s.flatten(), z, t, x, y))

    def from_tx(self, s: Time, u: Time, z: Tensor, t: Time, tx: Tensor, y: Tensor | None = None) -> Tensor:
        """Refused with a ValueError: a rollout reads x."""
        raise ValueError("a GLASS rollout reads its context as x, not as t·x")

    velocity_from_tx = from_tx


def glass_rollout(
    drift: Drift,
    t: Time,
    x: Tensor,
    n: int,
    steps: int,
    *,
    y: Tensor | None = None,
    eps: Tensor | None = None,
    generator: Source = None,
) -> Tensor:
    """E20: n samples of p_{1|t}(·|x) by `steps` Euler steps of E12 each, from the base drift; `(n, B, *D)`.

    Arguments as in `sample_posterior` and `GlassRollout`. The error falls as 1/steps. Differentiable, so the graph
    holds every step of a drift with weights: use torch.no_grad() where no derivative is wanted.
    """
    X = GlassRollout(drift, tuple(x.shape[1:]), steps, x.dtype, x.device)
    return sample_posterior(X, t, x, n, y=y, eps=eps, generator=generator)


@torch.no_grad()
def sde_rollout(
    drift: Drift,
    t: Time,
    x: Tensor,
    n: int,
    steps: int,
    *,
    y: Tensor | None = None,
    generator: Source = None,
) -> Tensor:
    """E20: n samples of p_{1|t}(·|x) by the SDE of E6 from (t, x) to 1, in `steps` equal steps of `sde_transition`.

    Args:
        drift: the base drift, as in `GlassRollout`.
        t: context time `()` or `(B,)`, in [0, 1).
        x: noisy states `(B, *D)`.
        n: samples per context, >= 1.
        steps: steps of each, >= 1. The error of an expectation falls as 1/steps.
        y: class labels `(B,)`, or None.
        generator: source of the noise; of a sequence, generator b gives that of all draws of context b.

    Returns:
        samples `(n, B, *D)`, without a graph.

    Raises:
        ValueError: counts below one, a time outside [0, 1) or of another shape, a drift of another shape than x or not
            finite, with the step's name.
    """
    check_count(n, "n")
    check_count(steps, "steps")
    start = expand_time(t, x).flatten()
    if bool((start == 1).any()):
        raise ValueError("sde_rollout needs t < 1, got t = 1, where the posterior is the point x")
    start, labels, z = start.repeat(n), None if y is None else y.repeat(n), x.expand(n, *x.shape).flatten(0, 1)
    times = [1 - (1 - start) * (1 - k / steps) for k in range(steps + 1)]
    for k, (now, after) in enumerate(pairwise(times)):
        with at_step(k + 1, steps, float(now[0])):
            b = drift(now, z) if labels is None else drift(now, z, labels)
            denoised = drift_to_denoiser(b, now, z)
            at, to = expand_time(now, z), expand_time(after, z)
            keep, gain, std = sde_transition(at, to)  # type: ignore[arg-type]  # `(n B, 1, …, 1)`
            xi = normal((n, *x.shape), x, generator, rows=1).reshape(z.shape)
            z = keep * z + gain * denoised + std * xi
    return z.unflatten(0, (n, len(x)))
