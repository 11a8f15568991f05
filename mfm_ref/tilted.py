"""The Meta Flow Map of the tilted path (E4), learnt from posterior draws of the base's: E18 inside E12.

The tilted law p* has a drift b* (E7), so E12 of b* is the drift b̄* of its posteriors, and X* is their flow map. Where
b* is at hand, as a fine-tuned drift, `meta_flow_map_loss(…, drift=b*)` trains X*. What is here needs no b*: each
target is made from a few one-step draws of the base's map.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from mfm_ref.alignment import rewards_of
from mfm_ref.checks import Reward, Time, check_count, check_finite, check_same_shape, expand_time
from mfm_ref.estimators import weighted_mean
from mfm_ref.flow_map import MetaFlowMap
from mfm_ref.gaussian import posterior_std
from mfm_ref.interpolant import Drift, coupled_interpolants, glass_statistic
from mfm_ref.objectives import adaptive_weight, weighted_mean_square
from mfm_ref.recipe import LATEST_CONTEXT, Consistency, Rows, semigroup, velocity_size
from mfm_ref.sampling import sample_posterior
from mfm_ref.times import balanced_times, context_time


@torch.no_grad()
def tilted_target(
    X: MetaFlowMap,
    reward: Reward,
    s: Time,
    z: Tensor,
    t: Time,
    x: Tensor,
    *,
    n: int = 8,
    base: Drift | None = None,
    log_scale: float = 0.0,
    eps: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """A target and a weight w for v_{s,s}(z; t, x), such that E w ‖v − target‖² is least at v = b̄*, exactly.

    By E12, z and x say of x₁ what x* at t* says. There X_i = X_{0,1}(ε_i; t*, x*) are draws of the base's posterior,
    and e^r makes the tilted one of it: (1−s) b̄* + z = E[e^r X_i]/E[e^r]. As in E18, no such ratio need be estimated:

        w = (1/n) Σ_i e^{r(X_i)},   target = (Σ_i w_i X_i − z)/(1−s),   w_i = e^{r(X_i)} / Σ_j e^{r(X_j)}.

    The target alone is biased, but w is its own denominator: w · target is a plain mean over draws, so that
    E[w · target] = E[w] b̄*, and this alone decides where the least square is. With the base's drift b,

        target = b̄ + n/(n−1) (Σ_i w_i X_i − (1/n) Σ_i X_i)/(1−s),   b̄ = E12 of b,

    has the same property (n/(n−1) takes from the mean of w X̄ the pairs of a draw with itself), and no noise where the
    reward is constant over the posterior, as it is at late times. At t = 0 this is E18 for the drift b* itself.

    Args:
        X: Meta Flow Map of the base, asked for X_{0,1} alone; not trained.
        reward: callable `(B, *D) -> (B,)`.
        s, z: internal time `()` or `(B,)` in [0, 1), and state `(B, *D)`: of any law with full support.
        t, x: the context: time `()` or `(B,)` in [0, 1], and noisy state `(B, *D)`; likewise.
        n: posterior draws per row, >= 1; >= 2 with `base`.
        base: b, `base(t, x) -> (B, *D)`, or None for the first form.
        log_scale: a constant c; e^{r−c} takes the place of e^r in w. Not to be computed from the batch.
        eps: the noises `(n, B, *D)`, independent of each other: for antithetic or Sobol ones n/(n−1) is wrong, and the
            minimiser is another. Drawn where None.
        generator: source of the noises.

    Returns:
        the target `(B, *D)` and w `(B,)`, without a graph.

    Raises:
        ValueError: s = 1, times outside [0, 1], too few draws, shapes that differ, a reward of the wrong shape or not
            finite, or one so large that e^{r−c} overflows.
    """
    check_count(n, "n", 1 if base is None else 2)
    left = 1 - expand_time(s, z, "s")
    if not bool((left > 0).all()):
        raise ValueError("tilted_target needs s < 1, got s = 1, where z is the clean state itself")
    t_star, x_star, gain, pull = glass_statistic(s, z, t, x)
    draws = sample_posterior(X, t_star, x_star, n, eps=eps, generator=generator)  # (n, B, *D)
    r = rewards_of(reward, draws)  # (n, B)
    w = (r - log_scale).exp().mean(0)
    check_finite(w, "e^(r − log_scale): choose a larger log_scale; it")
    tilted = weighted_mean(r, draws)
    if base is None:
        return (tilted - z) / left, w
    b = base(t_star, x_star)
    check_same_shape(base=b, z=z)
    return gain * b + pull + n / (n - 1) * (tilted - draws.mean(0)) / left, w


def tilted_map_loss(
    X_star: MetaFlowMap,
    x1: Tensor,
    X: MetaFlowMap,
    reward: Reward,
    *,
    n: int = 8,
    base: Drift | None = None,
    consistency: Consistency | None = semigroup,
    data_var: float = 1.0,
    context: Callable[..., Tensor] = context_time,
    times: Callable[..., Tensor] = balanced_times,
    p_consistency: float = 0.5,
    log_scale: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """`meta_flow_map_loss` for the tilted path: half of the rows onto `tilted_target`, half for the consistency.

    The targets have noise, so the diagonal has no adaptive weight, and the consistency is self. Residuals are measured
    in their natural sizes, as there. There are no class labels in it.

    Args:
        X_star: the map to train.
        x1: clean states `(B, *D)`, B >= 2, from which the contexts and the states between are made. Any law with full
            support keeps the minimiser; one near p* spends the rows where X* will be used.
        X, reward, n, base, log_scale: as in `tilted_target`.
        consistency: a function in `mfm_ref.recipe.CONSISTENCY` but `mean_flow`, or one like them; None for the
            diagonal alone.
        data_var: variance of p*, mean over the coordinates.
        context, times: laws of t and of (s, u), as in `meta_flow_map_loss`; `no_context` for the flow map of p* alone.
        p_consistency: exponent of `adaptive_weight` for the consistency.
        generator: source of all noise and times.

    Returns:
        the loss, `()`.

    Raises:
        ValueError: fewer than two samples, a data_var out of range, and what `tilted_target` raises.
    """
    if len(x1) < 2:
        raise ValueError(f"tilted_map_loss needs at least two samples, got {len(x1)}")
    if not 0 < data_var < math.inf:
        raise ValueError(f"data_var must be positive and finite, got {data_var}")
    t = context(len(x1), generator=generator).to(x1).clamp_max(LATEST_CONTEXT)
    std = posterior_std(t, data_var)
    s, u = times(t, std, generator=generator).to(x1)
    x, z, velocity = coupled_interpolants(x1, s, t, generator=generator)
    half = len(x1) if consistency is None else len(x1) // 2
    u = torch.where(torch.arange(len(u), device=u.device) < half, s, u)  # the first rows are the diagonal's

    first, second = slice(None, half), slice(half, None)
    at = s[first], z[first], t[first], x[first]
    target, w = tilted_target(X, reward, *at, n=n, base=base, log_scale=log_scale, generator=generator)
    if consistency is not None:
        rows = Rows(s[second], u[second], z[second], t[second], x[second], None, velocity[second], std[second])
        jump, size = consistency(X_star, rows, None, generator)
        target = torch.cat([target, jump])
    residual = X_star.velocity(s, u, z, t, x) - target
    unit = velocity_size(s, std)
    loss = weighted_mean_square(residual[first], lambda _: w / unit[first].square())
    if consistency is None:
        return loss
    # As in `meta_flow_map_loss`: Δ in units of its own size, and the velocity that it corrects in those of c/S_s.
    gain = size / unit[second]
    return loss + weighted_mean_square(
        residual[second], lambda squared: gain * adaptive_weight(squared, p=p_consistency, unit=size)
    )
