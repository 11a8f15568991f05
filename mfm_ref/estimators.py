"""Estimators of the value and of its gradient from posterior draws: E15, E16, E17, and a combination of the two.

Plain functions of tensors. The n draws X_i of p_{1|t}(·|x) are `(n, B, *D)`, their rewards r_i = r(X_i) `(n, B)`; what
comes out is `(B, *D)`. Where the draws come from (a map in one step, a rollout, an exact posterior) does not matter.

All three are weighted means under the self-normalised weights w_i = e^{r_i}/Σ_j e^{r_j}, of effective sample size
1/Σ w_i². E16 and E17 average different things of the same mean:

    g_i = (σ_t²/2) ∇_x r(X_i)        the pull of the reward through the map; small noise late, heavy tails early
    f_i = (X_i − E[x₁])/(1−t)        the shift of the posterior; no reward gradient, but the noise of every direction
"""

import math

import torch
from torch import Tensor

from mfm_ref.checks import Time, check_finite, check_same_shape, expand_time


def log_mean_exp(r: Tensor) -> Tensor:
    """E15: log of the mean of e^r over the first dimension, `(n, B) -> (B,)`."""
    return torch.logsumexp(r, 0) - math.log(len(r))


def effective_sample_size(r: Tensor) -> Tensor:
    """1/Σ w_i² of the weights w_i = e^{r_i}/Σ_j e^{r_j}, between 1 and n: `(n, B) -> (B,)`."""
    return 1 / torch.softmax(r, 0).square().sum(0)


def weighted_mean(r: Tensor, values: Tensor) -> Tensor:
    """Σ_i w_i values_i with the weights w_i = e^{r_i}/Σ_j e^{r_j}: `(n, B), (n, B, *D) -> (B, *D)`.

    Raises:
        ValueError: shapes that do not fit, or rewards that are not finite.
    """
    if r.ndim != 2 or values.shape[:2] != r.shape:
        raise ValueError(
            f"rewards must be (n, B) and values (n, B, *D), got {tuple(r.shape)} and {tuple(values.shape)}"
        )
    check_finite(r, "the rewards")
    return (_broadcast(torch.softmax(r, 0), values) * values).sum(0)


def gradient_guidance(r: Tensor, pulls: Tensor) -> Tensor:
    """E16 (MFM-G): (σ_t²/2) ∇V = Σ_i w_i g_i, the gradient of E15 taken draw by draw.

    Args:
        r: rewards `(n, B)`.
        pulls: g_i = (σ_t²/2) ∇_x r(X_i), through the map, `(n, B, *D)`.

    Returns:
        `(B, *D)`.

    Raises:
        ValueError: shapes that do not fit, or rewards that are not finite.
    """
    return weighted_mean(r, pulls)


def stein_guidance(r: Tensor, draws: Tensor, t: Time) -> Tensor:
    """E17 (MFM-GF): (σ_t²/2) ∇V = (Σ_i w_i X_i − (1/n) Σ_i X_i)/(1−t). No gradient of the reward.

    Args:
        r: rewards `(n, B)`.
        draws: X_i, `(n, B, *D)`.
        t: time `()` or `(B,)`, in [0, 1).

    Returns:
        `(B, *D)`; 0 for one draw, which says nothing.

    Raises:
        ValueError: t = 1, shapes that do not fit, or rewards that are not finite.
    """
    return weighted_mean(r, _shifts(draws, t))


def controlled_guidance(r: Tensor, draws: Tensor, pulls: Tensor, t: Time) -> Tensor:
    """E17 with E16 as its control variate in the one direction in which the reward pulls.

    Let ĝ be the direction of E16. Under the weights, g_i and f_i have the same mean, so that for any β

        (σ_t²/2) ∇V = Σ_i w_i f_i + β ⟨Σ_i w_i (g_i − f_i), ĝ⟩ ĝ,

    and β is the one of least variance: the regression of ⟨f_i, ĝ⟩ on ⟨f_i − g_i, ĝ⟩ over the draws, half with the
    weights and half without (the weights alone may leave one draw). For a Gaussian posterior and a quadratic reward
    in one direction both are linear in the draw, and the combination has no noise in it at all. Across ĝ, E16 sees
    nothing where the posterior has several modes (the pull between them is in rare draws with steep slopes), while E17
    does; its noise there averages out over the steps of a sampler, where a bias would add up.

    Consistent as n grows, as both parts are. For one draw it is E16.

    Args:
        r: rewards `(n, B)`.
        draws: X_i, `(n, B, *D)`.
        pulls: g_i, `(n, B, *D)`.
        t: time `()` or `(B,)`, in [0, 1).

    Returns:
        `(B, *D)`.

    Raises:
        ValueError: t = 1, shapes that do not fit, or rewards that are not finite.
    """
    check_same_shape(draws=draws, pulls=pulls)
    shifts, flat = (a.reshape(*a.shape[:2], -1) for a in (_shifts(draws, t), pulls))  # (n, B, D)
    pull, shift = weighted_mean(r, flat), weighted_mean(r, shifts)  # (B, D)
    direction = pull / pull.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(pull.dtype).tiny)
    along_f, along_g = (torch.einsum("nbd,bd->nb", a, direction) for a in (shifts, flat))
    weights = (torch.softmax(r, 0) + 1 / len(r)) / 2
    apart = _centred(along_f - along_g, weights)
    variance = (weights * apart.square()).sum(0)
    covariance = (weights * apart * _centred(along_f, weights)).sum(0)
    seen = variance > 0
    beta = torch.where(seen, covariance / torch.where(seen, variance, 1.0), 1.0).clamp(0, 1)
    step = beta.unsqueeze(-1) * ((pull - shift) * direction).sum(-1, keepdim=True) * direction
    return (shift + step).reshape(draws.shape[1:])


def _shifts(draws: Tensor, t: Time) -> Tensor:
    """f_i = (X_i − mean of the draws)/(1−t), `(n, B, *D)`."""
    t = expand_time(t, draws[0])
    if bool((t == 1).any()):
        raise ValueError("this estimator needs t < 1, got t = 1, where the posterior is one point")
    return (draws - draws.mean(0)) / (1 - t)


def _centred(values: Tensor, weights: Tensor) -> Tensor:
    return values - (weights * values).sum(0)


def _broadcast(weights: Tensor, values: Tensor) -> Tensor:
    return weights.reshape(*weights.shape, *[1] * (values.ndim - 2))
