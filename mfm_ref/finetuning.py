"""Fine-tuning a drift to a reward: without estimating a ratio (E18), and the regression that estimates one."""

from collections.abc import Callable

import torch
from torch import Tensor

from mfm_ref.alignment import context_gradient, rewards_of
from mfm_ref.checks import Reward, Time, check_finite, check_same_shape, expand_time
from mfm_ref.estimators import weighted_mean
from mfm_ref.flow_map import MetaFlowMap
from mfm_ref.interpolant import Drift
from mfm_ref.sampling import sample_posterior


def finetune_loss(
    student: Drift,
    base: Drift,
    X: MetaFlowMap,
    reward: Reward,
    t: Time,
    x: Tensor,
    y: Tensor | None = None,
    *,
    n: int = 1,
    method: str = "gradient",
    weight: Callable[[Tensor], Tensor] | None = None,
    gain: Callable[[Tensor], Tensor] | None = None,
    log_scale: float = 0.0,
    eps: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """E18: E[ w(t) e^{r(X)} ‖b_θ(x) − b(x) − g(X)‖² ], whose unique minimiser is the Doob drift b* (E7).

    X = X_{0,1}(ε; t, x) is one posterior sample, and g is its share of the guidance:

    - "gradient": g = (σ²/2) ∇_x r(X) = (1−t) ∂r(X)/∂(t·x), through the reward and the map; finite at t = 0.
    - "stein": b + g = (X − x)/(1−t), from E17 with E[x₁] = x + (1−t) b. Needs no gradient of the reward. Its
      variance is the posterior's, over (1−t)²: the smaller one where the posterior is wide.

    Both weigh linearly with e^r, so one sample at a time is unbiased: no ratio is estimated. Any law of (t, x)
    with full support and any w(t) > 0 keep the minimiser.

    Args:
        student: b_θ, `student(t, x) -> (B, *D)` (with a third argument y where labels are given).
        base: b, the drift being fine-tuned; evaluated without a graph. "stein" has b from X's own draws instead.
        X: Meta Flow Map of the base; not trained.
        reward: callable `(B, *D) -> (B,)`.
        t, x: times `()` or `(B,)` in [0, 1] (below 1 for "stein"), and states `(B, *D)`.
        y: class labels `(B,)`, or None.
        n: posterior samples per state; the loss averages over them.
        method: "gradient" or "stein".
        weight: w(t), `(B,) -> (B,)`; None for 1.
        gain: γ(t), `(B,) -> (B,)`, a factor of g, for "gradient" alone; None for 1. With any other the minimiser is not
            b* but b + γ (b* − b): γ = c t/(1−t) is what a constant c in the place of σ²/2 amounts to.
        log_scale: a constant c; e^{r−c} takes the place of e^r. Not to be computed from the batch.
        eps: the noises `(n, B, *D)`; drawn where None.
        generator: source of the noises.

    Returns:
        the loss, `()`.

    Raises:
        ValueError: an unknown method, "stein" at t = 1, "gradient" at t = 0 with a map that reads x instead of
            t·x, a gain with "stein", n below one, a drift, a weight or a gain of another shape, a reward of the wrong
            shape or not finite, or one so large that e^{r−c} overflows.
    """
    r, targets = _rewards_and_targets(base, X, reward, t, x, y, n, method, eps, generator, gain)
    with torch.no_grad():
        factor = (r - log_scale).exp()
        check_finite(factor, "e^(r − log_scale): choose a larger log_scale; it")
    squared = (_call(student, t, x, y, "student") - targets).square().reshape(n, len(x), -1).sum(2)  # (n, B)
    return (factor * _weights(weight, t, x) * squared).mean()


def regression_loss(
    student: Drift,
    base: Drift,
    X: MetaFlowMap,
    reward: Reward,
    t: Time,
    x: Tensor,
    y: Tensor | None = None,
    *,
    n: int,
    method: str = "gradient",
    weight: Callable[[Tensor], Tensor] | None = None,
    eps: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The plain alternative to E18: E[ w(t) ‖b_θ(x) − b(x) − Σ_i w_i g(X_i)‖² ], w_i = e^{r(X_i)} / Σ_j e^{r(X_j)}.

    Its minimiser is not b* but the mean E[b + Σ_i w_i g(X_i)] of the n-draw estimate, whose ratio is biased: by O(1/n),
    small only once n is well above E[e^{2r}]/E[e^r]². For n = 1 the weight is 1, and the minimiser is
    b + (σ²/2) ∇_x E[r(X)] for "gradient", and b itself, with no reward in it, for "stein". In exchange no state has a
    weight e^r, of which a few large ones could make the noise of the gradient.

    The terms g(X) and the arguments are those of `finetune_loss`, and so are the errors; there is no log_scale, since a
    constant in r cancels.

    Returns:
        the loss, `()`.
    """
    r, targets = _rewards_and_targets(base, X, reward, t, x, y, n, method, eps, generator)
    with torch.no_grad():
        target = weighted_mean(r, targets)
    squared = (_call(student, t, x, y, "student") - target).square().reshape(len(x), -1).sum(1)  # (B,)
    return (_weights(weight, t, x) * squared).mean()


def _rewards_and_targets(
    base: Drift,
    X: MetaFlowMap,
    reward: Reward,
    t: Time,
    x: Tensor,
    y: Tensor | None,
    n: int,
    method: str,
    eps: Tensor | None,
    generator: torch.Generator | None,
    gain: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """r(X_i), `(n, B)`, and b + g(X_i), `(n, B, *D)`, of posterior draws X_i, without a graph; see `finetune_loss`."""
    if method == "gradient":
        _, r, gradient = context_gradient(X, reward, t, x, n, y=y, eps=eps, generator=generator)
        with torch.no_grad():
            if gain is not None:
                gradient = _of_time(gain, t, x, "gain").reshape(-1, *[1] * (x.ndim - 1)) * gradient
            return r, _call(base, t, x, y, "base") + gradient
    if method == "stein":
        if gain is not None:
            raise ValueError('a gain needs method "gradient", got "stein"')
        if bool((expand_time(t, x) == 1).any()):
            raise ValueError('method "stein" needs t < 1, got t = 1, where the posterior is one point')
        with torch.no_grad():
            draws = sample_posterior(X, t, x, n, y=y, eps=eps, generator=generator)
            return rewards_of(reward, draws), (draws - x) / (1 - expand_time(t, x))
    raise ValueError(f'method must be "gradient" or "stein", got {method!r}')


def _weights(weight: Callable[[Tensor], Tensor] | None, t: Time, x: Tensor) -> Tensor:
    """w(t), `(B,)`."""
    return _of_time(torch.ones_like if weight is None else weight, t, x, "weight")


def _of_time(function: Callable[[Tensor], Tensor], t: Time, x: Tensor, name: str) -> Tensor:
    """A function of the time of each state, `(B,)`."""
    times = expand_time(t, x).flatten()
    values = function(times)
    check_same_shape(**{name: values}, t=times)
    return values


def _call(drift: Drift, t: Time, x: Tensor, y: Tensor | None, name: str) -> Tensor:
    b = drift(t, x) if y is None else drift(t, x, y)
    check_same_shape(**{name: b}, x=x)
    return b
