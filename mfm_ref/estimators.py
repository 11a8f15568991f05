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
    """Σ_i w_i values_i with the weights w_i = e^{r_i}/Σ_j e^{r_j}: `(n, B), (n, B, *D) -> (B, *D)`, of values' dtype.

    Raises:
        ValueError: shapes that do not fit, or rewards that are not finite.
    """
    if r.ndim != 2 or values.shape[:2] != r.shape:
        raise ValueError(
            f"rewards must be (n, B) and values (n, B, *D), got {tuple(r.shape)} and {tuple(values.shape)}"
        )
    check_finite(r, "the rewards")
    return (_broadcast(torch.softmax(r, 0), values) * values).sum(0).to(values.dtype)


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
    precise = torch.promote_types(draws.dtype, torch.float32)
    return weighted_mean(r, _shifts(draws.to(precise), t)).to(draws.dtype)


def controlled_guidance(r: Tensor, draws: Tensor, pulls: Tensor, t: Time) -> Tensor:
    """E16 and E17 as control variates of each other; the default.

    Under the weights, g_i and f_i have the same mean, so any mixture of E16 and E17 is consistent. Two are made:

    - everywhere, E16 has the weight e = ESS/n · min(1, Var f/Var g): its noise is small where the weights are even
      and the reward is smooth; elsewhere its tails are heavy, and E17 has none;
    - along the direction ĝ of E16, it has the weight β of least variance, by regression of ⟨f_i, ĝ⟩ on
      ⟨f_i − g_i, ĝ⟩ over the draws. Across ĝ this one is E17.

    The second is used as far as ⟨f_i, ĝ⟩ and ⟨g_i, ĝ⟩ are one linear function of each other: with the weight R²,
    adjusted for the number of draws. For a Gaussian posterior and a quadratic reward in one direction R² = 1, and the
    result has no noise along ĝ but that of the draws' own mean, which antithetic noises remove. In symbols, with
    Δ = E16 − E17,

        (σ_t²/2) ∇V = E17 + R² β ⟨Δ, ĝ⟩ ĝ + (1 − R²) e Δ.

    Consistent as n grows. Its weights follow the draws, which is a bias of order 1/n, as E17 has one: larger than E17's
    where the steep draws of E16 are rare, because those that are there count less. For one draw it is E16; for two
    there is no R², and it counts as 0 unless g is constant.

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
    if len(r) == 1:
        return gradient_guidance(r, pulls)
    # Squares of half-precision numbers are rounding, so all of this is in single precision at least.
    precise = torch.promote_types(torch.promote_types(r.dtype, draws.dtype), torch.float32)
    r, shifts, flat = r.to(precise), _shifts(draws.to(precise), t), pulls.to(precise)
    shifts, flat = (a.reshape(*a.shape[:2], -1) for a in (shifts, flat))  # (n, B, D)
    pull, shift = weighted_mean(r, flat), weighted_mean(r, shifts)  # (B, D)
    direction = pull / pull.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(pull.dtype).tiny)
    along_f, along_g = (torch.einsum("nbd,bd->nb", a, direction) for a in (shifts, flat))
    beta, trust = (a.unsqueeze(-1) for a in _regression(r, along_f, along_g))  # (B, 1)
    even = (effective_sample_size(r) / len(r) * _variance_ratio(r, shifts, flat)).unsqueeze(-1)  # e, (B, 1)
    apart = pull - shift
    along = (apart * direction).sum(-1, keepdim=True) * direction
    return (shift + trust * beta * along + (1 - trust) * even * apart).reshape(draws.shape[1:]).to(draws.dtype)


def _variance_ratio(r: Tensor, f: Tensor, g: Tensor) -> Tensor:
    """min(1, Var f/Var g) over the draws, half with the weights and half without: `(n, B), 2 · (n, B, D) -> (B,)`."""
    weights = _half_weights(r).unsqueeze(-1)
    vf, vg = ((weights * (a - (weights * a).sum(0)).square()).sum((0, 2)) for a in (f, g))
    return torch.where(vg > vf, vf / torch.where(vg > vf, vg, 1.0), 1.0)


def _half_weights(r: Tensor) -> Tensor:
    """(w_i + 1/n)/2: the weights alone may leave one draw."""
    return (torch.softmax(r, 0) + 1 / len(r)) / 2


def _regression(r: Tensor, f: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """The weight β in [0, 1] of least variance of f + β (g − f), and the adjusted R² of f and g; from `(n, B)`.

    Where g is constant but for rounding, as for a linear reward of a Gaussian, R² is 1.
    """
    weights, n = _half_weights(r), len(r)
    rounding = (1e3 * torch.finfo(g.dtype).eps) ** 2 * (weights * g.square()).sum(0)
    f, g = (a - (weights * a).sum(0) for a in (f, g))
    ff, gg, fg = ((weights * a * b).sum(0) for a, b in ((f, f), (g, g), (f, g)))
    spread = ff + gg - 2 * fg  # of f − g
    beta = torch.where(spread > 0, (ff - fg) / torch.where(spread > 0, spread, 1.0), 1.0).clamp(0, 1)
    squared = torch.where(ff * gg > 0, fg.square() / torch.where(ff * gg > 0, ff * gg, 1.0), 0.0)
    squared = torch.where(gg > rounding, squared, 1.0)
    adjusted = 1 - (1 - squared) * (n - 1) / (n - 2) if n > 2 else (gg <= rounding).to(squared)
    return beta, adjusted.clamp(0, 1)


def _shifts(draws: Tensor, t: Time) -> Tensor:
    """f_i = (X_i − mean of the draws)/(1−t), `(n, B, *D)`."""
    t = expand_time(t, draws[0])
    if bool((t == 1).any()):
        raise ValueError("this estimator needs t < 1, got t = 1, where the posterior is one point")
    return (draws - draws.mean(0)) / (1 - t)


def _broadcast(weights: Tensor, values: Tensor) -> Tensor:
    return weights.reshape(*weights.shape, *[1] * (values.ndim - 2))
