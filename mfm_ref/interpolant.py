"""The interpolant and everything that follows from it by algebra: E1, E2, E6, E9, E12.

Noise is at 0 and data at 1. Every function takes states of any shape `(B, *D)` and times `()` or `(B,)`.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from mfm_ref.checks import Time, check_finite, check_same_shape, check_time, expand_time

Drift = Callable[..., Tensor]  # drift(t, x) -> (B, *D), or drift(t, x, y) where classes are given


def interpolate(x0: Tensor, x1: Tensor, t: Time) -> Tensor:
    """E1: I_t = (1−t) x₀ + t x₁.

    Args:
        x0: noise `(B, *D)`.
        x1: data `(B, *D)`.
        t: time `()` or `(B,)`, in [0, 1].

    Raises:
        ValueError: shapes that differ, or a time outside [0, 1].
    """
    _check_states(x0=x0, x1=x1)
    t = expand_time(t, x1)
    return (1 - t) * x0 + t * x1


def noise_scale(t: Time) -> Tensor:
    """E6: σ_t² = 2 (1−t)/t, the noise scale of the SDE that shares the interpolant's marginals.

    Args:
        t: time of any shape, in (0, 1]. A number is read in double precision.

    Raises:
        ValueError: at t = 0, where σ² is infinite. What steering needs there is the product σ²/2 ∇V, which
            is finite: see `mfm_ref.alignment.guidance`.
    """
    check_time(t)
    t = t if isinstance(t, Tensor) else torch.tensor(t, dtype=torch.float64)
    if bool((t == 0).any()):
        raise ValueError("noise_scale needs t > 0, got t = 0, where σ² is infinite")
    return 2 * (1 - t) / t


# ---- E2: drift b, denoiser D and score are one object in three forms -----------------------------------


def drift_to_denoiser(b: Tensor, t: Time, x: Tensor) -> Tensor:
    """E2: D = x + (1−t) b. Finite for every t in [0, 1]."""
    _check_states(b=b, x=x)
    return x + (1 - expand_time(t, x)) * b


def drift_to_score(b: Tensor, t: Time, x: Tensor) -> Tensor:
    """E2: ∇ log p_t = (t b − x)/(1−t). Needs t < 1."""
    _check_states(b=b, x=x)
    t = expand_time(t, x)
    _refuse(t == 1, "drift_to_score needs t < 1, got t = 1")
    return (t * b - x) / (1 - t)


def denoiser_to_drift(denoised: Tensor, t: Time, x: Tensor) -> Tensor:
    """E2: b = (D − x)/(1−t). Needs t < 1."""
    _check_states(denoised=denoised, x=x)
    t = expand_time(t, x)
    _refuse(t == 1, "denoiser_to_drift needs t < 1, got t = 1")
    return (denoised - x) / (1 - t)


def denoiser_to_score(denoised: Tensor, t: Time, x: Tensor) -> Tensor:
    """E2: ∇ log p_t = (t D − x)/(1−t)². Needs t < 1."""
    _check_states(denoised=denoised, x=x)
    t = expand_time(t, x)
    _refuse(t == 1, "denoiser_to_score needs t < 1, got t = 1")
    return (t * denoised - x) / (1 - t) ** 2


def score_to_drift(score: Tensor, t: Time, x: Tensor) -> Tensor:
    """E2: b = (x + (1−t) ∇ log p_t)/t. Needs t > 0."""
    _check_states(score=score, x=x)
    t = expand_time(t, x)
    _refuse(t == 0, "score_to_drift needs t > 0, got t = 0")
    return (x + (1 - t) * score) / t


def score_to_denoiser(score: Tensor, t: Time, x: Tensor) -> Tensor:
    """E2: D = (x + (1−t)² ∇ log p_t)/t. Needs t > 0."""
    _check_states(score=score, x=x)
    t = expand_time(t, x)
    _refuse(t == 0, "score_to_denoiser needs t > 0, got t = 0")
    return (x + (1 - t) ** 2 * score) / t


def _check_states(**states: Tensor) -> None:
    check_same_shape(**states)
    for name, state in states.items():
        check_finite(state, name)


def _refuse(bad: Tensor, message: str) -> None:
    if not torch.compiler.is_compiling() and bool(bad.any()):
        raise ValueError(message)


# ---- E9, E12: the auxiliary path of a context ----------------------------------------------------------


def coupled_interpolants(
    x1: Tensor, s: Time, t: Time, *, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """E9, E13: one clean sample seen through two independent noises.

    Given I_t = x, the clean sample is a draw of p_{1|t}(·|x) and x̄₀ is independent of the context, so the
    triple is a flow-matching batch for the auxiliary path of that context.

    Args:
        x1: data `(B, *D)`.
        s: internal time `()` or `(B,)`, in [0, 1].
        t: context time `()` or `(B,)`, in [0, 1].
        generator: source of both noises.

    Returns:
        the context `x` = I_t, the state `z` = Ī_s and the velocity x₁ − x̄₀, each `(B, *D)`.
    """
    x0, eps = torch.randn((2, *x1.shape), generator=generator, dtype=x1.dtype, device=x1.device)
    return interpolate(x0, x1, t), interpolate(eps, x1, s), x1 - eps


def glass_drift(drift: Drift, s: Time, z: Tensor, t: Time, x: Tensor, y: Tensor | None = None) -> Tensor:
    """E12 (GLASS): the drift b̄_s(z; t, x) of the auxiliary flow, from the unconditional drift b alone.

    x and z are two independent Gaussian observations of x₁. One sufficient statistic replaces them,

        q = √(t²(1−s)² + s²(1−t)²),  p = (1−t)(1−s),  t* = q/(q+p),
        x* = ((1−s)² t x + (1−t)² s z) / (q (q+p)),

    and b̄ = (D_{t*}(x*) − z)/(1−s). With D = x* + (1−t*) b the division by 1−s cancels:

        b̄ = (1−t)/(q+p) b_{t*}(x*) + t(1−s)/(q(q+p)) (x − t z (q+1−t)/(q + (1−t)s)).

    Args:
        drift: `drift(t, x) -> (B, *D)`; called as `drift(t, x, y)` where y is given.
        s, z: internal time `()` or `(B,)` in [0, 1], and the state there `(B, *D)`.
        t, x: the context: time `()` or `(B,)` in [0, 1], and noisy state `(B, *D)`.
        y: class labels `(B,)`, or None.

    Returns:
        b̄ `(B, *D)`. The ends are exact: t = 0 gives b_s(z); s = 0 gives D_t(x) − z; s = 1 gives b₁(z);
        t = 1 gives (x − z)/(1−s), and at s = t = 1, where E10 conditions on z = x, b₁(z).

    Raises:
        ValueError: shapes that differ, or a time outside [0, 1].
    """
    t_star, x_star, gain, pull = glass_statistic(s, z, t, x)
    b = drift(t_star, x_star) if y is None else drift(t_star, x_star, y)
    check_same_shape(drift=b, z=z)
    return gain * b + pull


def glass_statistic(s: Time, z: Tensor, t: Time, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """E12: where `glass_drift` asks for b, and what it makes of it: b̄_s(z; t, x) = gain b_{t*}(x*) + pull.

    Args:
        s, z, t, x: as in `glass_drift`, with its errors.

    Returns:
        t* `(B,)`, x* `(B, *D)`, gain `(B, 1, …, 1)` and pull `(B, *D)`.
    """
    _check_states(z=z, x=x)
    s, t = expand_time(s, z, "s"), expand_time(t, x, "t")
    of_x, of_z, p = t * (1 - s), s * (1 - t), (1 - t) * (1 - s)
    informed = (of_x > 0) | (of_z > 0)  # false where s = t = 0 (nothing is known) and where s = t = 1 (z is x₁)
    q = torch.hypot(torch.where(informed, of_x, 1.0), of_z)  # squares would underflow near s = t = 0
    t_star = torch.where(informed, q / (q + p), t)
    x_star = torch.where(informed, ((1 - s) * of_x * x + (1 - t) * of_z * z) / (q * (q + p)), z)
    gain = torch.where(informed, (1 - t) / (q + p), 1.0)
    shrunk = t / (q + of_z) * (q + (1 - t)) * z
    pull = torch.where(informed, of_x / (q * (q + p)) * (x - shrunk), 0.0)
    return t_star.flatten(), x_star, gain, pull
