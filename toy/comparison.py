"""How the toys compare a map with the truth: the posterior ratio, and whether the map agrees with itself."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from mfm_ref import MetaFlowMap, sample_posterior, sliced_wasserstein
from mfm_ref.gaussian import posterior_std, time_of_angle
from mfm_ref.interpolant import Drift
from mfm_ref.objectives import teacher_velocity
from mfm_ref.sampling import noise_like

TIMES = (0.0, 0.05, 0.2, 0.4, 0.6, 0.8, 0.9, 0.95)

Contexts = Callable[[float, int], Tensor]  # (t, n) -> n noisy states from p_t
Posterior = Callable[[float, Tensor, int], Tensor]  # (t, x, n) -> samples (n, B, *D) of p(x₁ | x_t = x)


@torch.no_grad()
def posterior_ratio(
    X: MetaFlowMap,
    contexts: Contexts,
    posterior: Posterior,
    *,
    n_contexts: int,
    n_samples: int,
    generator: torch.Generator,
    times: Sequence[float] = TIMES,
) -> dict[str, float]:
    """{t: sliced W₂ of one-step samples to reference ones / of two reference sets}, each a mean over contexts."""
    ratio = {}
    for t in times:
        x = contexts(t, n_contexts)
        model = sample_posterior(X, t, x, n_samples, generator=generator)
        reference, other = (posterior(t, x, n_samples) for _ in range(2))
        distance, floor = (
            sum(float(sliced_wasserstein(a[:, k], reference[:, k], generator=generator)) for k in range(n_contexts))
            for a in (model, other)
        )
        ratio[str(t)] = distance / floor
    return ratio


@torch.no_grad()
def semigroup_residual(
    X: MetaFlowMap, contexts: Contexts, *, data_var: float, n: int, generator: torch.Generator
) -> dict[str, float]:
    """{t: root mean square of X_{w,1}(X_{0,w}(ε)) − X_{0,1}(ε) per coordinate, over c_t}, the angle of w uniform."""
    residual = {}
    for t in TIMES:
        x, eps = contexts(t, n), noise_like(X, n, generator=generator)
        std = posterior_std(torch.tensor(t), data_var)
        w = time_of_angle(torch.rand(n, generator=generator) * torch.pi / 2, std).to(x)
        apart = X(w, 1.0, X(0.0, w, eps, t, x), t, x) - X(0.0, 1.0, eps, t, x)
        residual[str(t)] = float(apart.square().mean().sqrt() / std)
    return residual


@torch.no_grad()
def rollout(drift: Drift, t: float, x: Tensor, n: int, *, steps: int, data_var: float, eps: Tensor) -> Tensor:
    """E20: n posterior samples `(n, B, *D)` per context by `steps` Runge–Kutta steps of E12, even in the angle.

    Args:
        eps: the noises `(n, B, *D)`.
    """
    contexts, z = x.expand(n, *x.shape).flatten(0, 1), eps.flatten(0, 1)
    std = posterior_std(torch.tensor(t), data_var)
    grid = time_of_angle(torch.linspace(0, torch.pi / 2, steps + 1), std).tolist()
    for s, w in pairwise(grid):
        z = z + (w - s) * teacher_velocity(drift, s, w, z, t, contexts)
    return z.unflatten(0, (n, len(x)))
