"""The Meta Flow Map of the tilted path, learnt from the base's posterior draws: E18 inside E12, no ratio estimated."""

from collections.abc import Callable

import torch
from torch import Tensor

from mfm_ref.checks import Reward, Time, check_count, check_finite, check_same_shape, evaluate_reward, expand_time
from mfm_ref.estimators import weighted_mean
from mfm_ref.flow_map import MetaFlowMap
from mfm_ref.interpolant import Drift, glass_statistic
from mfm_ref.sampling import sample_posterior


@torch.no_grad()
def tilted_target(
    X: MetaFlowMap,
    reward: Reward,
    s: Time,
    z: Tensor,
    t: Time,
    x: Tensor,
    *,
    n: int = 1,
    base: Drift | None = None,
    log_scale: float = 0.0,
    eps: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    t_star, x_star, gain, pull = glass_statistic(s, z, t, x)
    draws = sample_posterior(X, t_star, x_star, n, eps=eps, generator=generator)
    r = evaluate_reward(reward, draws.flatten(0, 1)).unflatten(0, draws.shape[:2])
    left = 1 - expand_time(s, z, "s")
    tilted = weighted_mean(r, draws)
    if base is None:
        target = (tilted - z) / left
    else:
        target = gain * base(t_star, x_star) + pull + n / (n - 1) * (tilted - draws.mean(0)) / left
    return target, (r - log_scale).exp().mean(0)
