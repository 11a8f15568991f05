"""Reward alignment at inference: the value function, its gradient, and steered sampling (E5–E8, E15–E17, E20)."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mfm_ref.checks import Reward, Time, check_count, check_finite, evaluate_reward, expand_time
from mfm_ref.flow_map import MetaFlowMap, unconditional_drift
from mfm_ref.interpolant import noise_scale
from mfm_ref.sampling import integrate, noise_like, sample_posterior, time_grid


def value(
    X: MetaFlowMap,
    reward: Reward,
    t: Time,
    x: Tensor,
    n: int,
    *,
    steps: int = 1,
    y: Tensor | None = None,
    eps: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """E15: V̂_t(x) = log (1/n) Σ_i exp r(X_{0,1}(ε_i; t, x)), `(B,)`.

    Arguments are those of `sample_posterior`; `reward` maps clean data `(B, *D)` to `(B,)`. Differentiable in
    x. Its bias is −Var(e^r)/(2 n E[e^r]²) to first order.

    Raises:
        ValueError: from `sample_posterior`, or a reward of the wrong shape or not finite.
    """
    draws = sample_posterior(X, t, x, n, steps, y=y, eps=eps, generator=generator)
    return log_mean_exp(rewards_of(reward, draws))


def rewards_of(reward: Reward, draws: Tensor) -> Tensor:
    """r of posterior draws `(n, B, *D)`, as `(n, B)`. Raises ValueError as `evaluate_reward` does."""
    return evaluate_reward(reward, draws.flatten(0, 1)).unflatten(0, draws.shape[:2])


def log_mean_exp(r: Tensor) -> Tensor:
    """log of the mean of e^r over the first dimension: `(n, B) -> (B,)`."""
    return torch.logsumexp(r, 0) - math.log(len(r))


def value_gradient(
    X: MetaFlowMap,
    reward: Reward,
    t: Time,
    x: Tensor,
    n: int,
    method: str = "gradient",
    *,
    steps: int = 1,
    y: Tensor | None = None,
    eps: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """∇V_t(x), `(B, *D)`, from n posterior draws: with the reward's gradient (E16) or without it (E17).

    "gradient" (MFM-G) differentiates E15 through the reward and the map. "stein" (MFM-GF) needs only the values
    of the reward: ∇V = t/(1−t)² (E_w[x₁] − E[x₁]), with w the self-normalised weights e^{r_i}/Σ_j e^{r_j}.
    Other arguments as in `sample_posterior`.

    Raises:
        ValueError: an unknown method; a reward that does not fit (`evaluate_reward`) or, for "gradient", cannot
            be differentiated; "stein" at t = 1.
    """
    if method == "stein":
        shift = _stein_shift(X, reward, t, x, n, steps=steps, y=y, eps=eps, generator=generator)
        t = expand_time(t, x)
        return t / (1 - t) ** 2 * shift
    _check_method(method)
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        return _gradient(value(X, reward, t, x, n, steps=steps, y=y, eps=eps, generator=generator), x)


def guidance(
    X: MetaFlowMap,
    reward: Reward,
    t: Time,
    x: Tensor,
    n: int,
    method: str = "gradient",
    *,
    steps: int = 1,
    y: Tensor | None = None,
    eps: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """(σ_t²/2) ∇V_t(x) (E7), `(B, *D)`, finite at t = 0 although σ² is not.

    "gradient" differentiates with respect to t·x (`through_context`); "stein" is (E_w[x₁] − E[x₁])/(1−t) (E17).
    Arguments and errors as in `value_gradient`; for a map that reads x itself, "gradient" refuses t = 0.
    """
    if method == "stein":
        shift = _stein_shift(X, reward, t, x, n, steps=steps, y=y, eps=eps, generator=generator)
        return shift / (1 - expand_time(t, x))
    _check_method(method)
    with torch.enable_grad():
        reader, context, factor = through_context(X, t, x)
        v = value(reader, reward, t, context, n, steps=steps, y=y, eps=eps, generator=generator)
        return factor * _gradient(v, context)


def doob_drift(
    X: MetaFlowMap,
    reward: Reward,
    t: Time,
    x: Tensor,
    n: int,
    method: str = "gradient",
    *,
    steps: int = 1,
    y: Tensor | None = None,
    eps: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """E7: b*_t(x) = b_t(x) + (σ_t²/2) ∇V_t(x), estimated with n posterior draws; `(B, *D)`.

    With the exact ∇V it is the drift (E2) of the tilted law p* ∝ p₁ e^r. Arguments as in `value_gradient`.
    """
    g = guidance(X, reward, t, x, n, method, steps=steps, y=y, eps=eps, generator=generator)
    with torch.no_grad():
        return unconditional_drift(X, t, x, y) + g


def denoiser(X: MetaFlowMap, t: Time, x: Tensor, y: Tensor | None = None) -> Tensor:
    """D_t(x) = E[x₁ | I_t = x] (E2): b̄_0(0; t, x) = D_t(x) − 0, read off the diagonal; `(B, *D)`."""
    return X.velocity(0.0, 0.0, torch.zeros_like(x), t, x, y)


def dps_drift(X: MetaFlowMap, reward: Reward, t: Time, x: Tensor, *, y: Tensor | None = None) -> Tensor:
    """E20, the DPS baseline: b_t(x) + (σ_t²/2) ∇_x r(D_t(x)), the reward of the posterior's mean; `(B, *D)`.

    D is read off the context (`denoiser`), so t = 0 is finite as in `guidance`. Errors as there.
    """
    with torch.enable_grad():
        reader, context, factor = through_context(X, t, x)
        g = factor * _gradient(evaluate_reward(reward, denoiser(reader, t, context, y)), context)
    with torch.no_grad():
        return unconditional_drift(X, t, x, y) + g


def steer(
    X: MetaFlowMap,
    reward: Reward,
    n_samples: int,
    *,
    n: int = 16,
    steps: int = 250,
    times: Sequence[float] | None = None,
    method: str = "gradient",
    dynamics: str = "ode",
    y: Tensor | None = None,
    generator: torch.Generator | None = None,
    progress: str | None = None,
) -> Tensor:
    """E7, E8: samples of the tilted law p* ∝ p₁ e^r, by the Doob ODE or the Doob SDE from t = 0 to 1.

    Args:
        X: a Meta Flow Map.
        reward: callable `(B, *D) -> (B,)`; differentiable for method "gradient".
        n_samples: number of samples, >= 1.
        n: posterior draws per step and sample, >= 1.
        steps: number of steps of a uniform grid.
        times: another grid, rising from 0 to 1, in place of `steps`.
        method: "gradient" (E16) or "stein" (E17).
        dynamics: "ode" (E7) or "sde" (E8); see `integrate`.
        y: class labels `(n_samples,)`, or None.
        generator: source of all noise.
        progress: label of a progress bar; none where None.

    Returns:
        samples `(n_samples, *D)`.

    Raises:
        ValueError: from `integrate` and `value_gradient`.
    """
    check_count(n_samples, "n_samples")

    def drift(t: float, x: Tensor) -> Tensor:
        return doob_drift(X, reward, t, x, n, method, y=y, generator=generator)

    x = noise_like(X, n_samples, generator=generator)
    grid = time_grid(steps) if times is None else times
    return integrate(drift, x, grid, dynamics=dynamics, generator=generator, progress=progress)


# ---- differentiating with respect to the context -------------------------------------------------------


def through_context(X: MetaFlowMap, t: Time, x: Tensor) -> tuple[MetaFlowMap, Tensor, Tensor]:
    """A map, a leaf tensor to call it with, and a factor: (σ_t²/2) ∇_x f = factor · ∂f/∂leaf for any f of the map.

    A posterior depends on x only through t·x, so ∇_x = t ∇_{t·x}, and σ²/2 = (1−t)/t loses its pole:
    (σ²/2) ∇_x = (1−t) ∇_{t·x}. Where the map reads x itself, the leaf is x and the factor (1−t)/t.

    Raises:
        ValueError: at t = 0 for a map that reads x itself.
    """
    time = expand_time(t, x)
    if X.reads_tx:
        return _ReadingTx(X), (time * x.detach()).requires_grad_(), 1 - time
    if bool((time == 0).any()):
        raise ValueError(
            "differentiating a map that reads x (reads_tx is false) needs t > 0, got t = 0; "
            'let its network read t·x, or use method "stein"'
        )
    return X, x.detach().clone().requires_grad_(), noise_scale(time) / 2


class _ReadingTx:
    """X with every context argument understood as the product t·x."""

    def __init__(self, X: MetaFlowMap):
        self.X, self.shape, self.dtype, self.device, self.reads_tx = X, X.shape, X.dtype, X.device, True

    def __call__(self, s: Time, u: Time, z: Tensor, t: Time, x: Tensor, y: Tensor | None = None) -> Tensor:
        return self.X.from_tx(s, u, z, t, x, y)

    def velocity(self, s: Time, u: Time, z: Tensor, t: Time, x: Tensor, y: Tensor | None = None) -> Tensor:
        return self.X.velocity_from_tx(s, u, z, t, x, y)

    from_tx = __call__
    velocity_from_tx = velocity


def context_gradient(
    X: MetaFlowMap,
    reward: Reward,
    t: Time,
    x: Tensor,
    n: int,
    *,
    y: Tensor | None = None,
    eps: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Posterior draws X and (σ_t²/2) ∇_x r(X) of each (E18), both `(n, B, *D)`; finite at t = 0 as `guidance` is."""
    check_count(n, "n")
    if eps is not None and eps.shape != (n, *x.shape):
        raise ValueError(f"eps must have shape {(n, *x.shape)}, got {tuple(eps.shape)}")
    with torch.enable_grad():
        x = x.detach().expand(n, *x.shape).flatten(0, 1)
        t = expand_time(t, x[: len(x) // n]).flatten().repeat(n)
        reader, context, factor = through_context(X, t, x)
        eps = None if eps is None else eps.flatten(0, 1).unsqueeze(0)
        labels = None if y is None else y.repeat(n)
        draws = sample_posterior(reader, t, context, 1, y=labels, eps=eps, generator=generator)
        gradient = factor * _gradient(rewards_of(reward, draws)[0], context)
    return draws[0].detach().unflatten(0, (n, -1)), gradient.unflatten(0, (n, -1))


# ---- helpers -------------------------------------------------------------------------------------------


def _stein_shift(
    X: MetaFlowMap,
    reward: Reward,
    t: Time,
    x: Tensor,
    n: int,
    *,
    steps: int,
    y: Tensor | None,
    eps: Tensor | None,
    generator: torch.Generator | None,
) -> Tensor:
    """E_w[x₁] − E[x₁] under the posterior (E17), `(B, *D)`."""
    if bool((expand_time(t, x) == 1).any()):
        raise ValueError('method "stein" needs t < 1, got t = 1, where the posterior is one point')
    with torch.no_grad():
        draws = sample_posterior(X, t, x, n, steps, y=y, eps=eps, generator=generator)
        weights = torch.softmax(rewards_of(reward, draws), 0)
        weights = weights.reshape(*weights.shape, *[1] * (x.ndim - 1))
        return (weights * (draws - draws.mean(0))).sum(0)


def _gradient(values: Tensor, x: Tensor) -> Tensor:
    """∇_x of each row's value; a reward that cannot be differentiated is named as such."""
    gradient = torch.autograd.grad(values.sum(), x, allow_unused=True)[0] if values.requires_grad else None
    if gradient is None:
        raise ValueError(
            "this needs a differentiable reward (and no inference mode), got one without a gradient; "
            'method "stein" takes a black box'
        )
    check_finite(gradient, "the gradient of the value")
    return gradient


def _check_method(method: str) -> None:
    if method != "gradient":
        raise ValueError(f'method must be "gradient" or "stein", got {method!r}')
