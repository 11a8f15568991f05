"""Reward alignment at inference: the value function, its gradient and the drifts made of it (E7, E15–E17, E20).

Each function draws its posterior samples from a map; what is then made of the draws is in `estimators`.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from mfm_ref.checks import (
    Reward,
    Time,
    check_count,
    check_finite,
    check_labels,
    check_uncoupled,
    evaluate_reward,
    expand_time,
)
from mfm_ref.estimators import controlled_guidance, gradient_guidance, log_mean_exp, stein_guidance
from mfm_ref.flow_map import MetaFlowMap, unconditional_drift
from mfm_ref.interpolant import denoiser_to_drift, noise_scale
from mfm_ref.noise import Source, posterior_noise
from mfm_ref.sampling import sample_posterior

METHODS = ("controlled", "gradient", "stein")


def value(
    X: MetaFlowMap,
    reward: Reward,
    t: Time,
    x: Tensor,
    n: int,
    *,
    noise: str = "independent",
    steps: int = 1,
    y: Tensor | None = None,
    eps: Tensor | None = None,
    generator: Source = None,
) -> Tensor:
    """E15: V̂_t(x) = log (1/n) Σ_i exp r(X_{0,1}(ε_i; t, x)), `(B,)`.

    `reward` maps clean data `(B, *D)` to `(B,)`; `noise` is a kind of `posterior_noise`; other arguments are those of
    `sample_posterior`. Differentiable in x, so all draws are in one graph. Its bias is −Var(e^r)/(2 n E[e^r]²) to first
    order for the independent noises that are its default: those of the others would have another.

    Raises:
        ValueError: from `sample_posterior` or `posterior_noise`, or a reward that does not fit (`evaluate_reward`).
    """
    eps = _noises(n, x, noise, eps, generator)
    draws = sample_posterior(X, t, x, n, steps, y=y, eps=eps)
    return log_mean_exp(rewards_of(reward, draws))


def rewards_of(reward: Reward, draws: Tensor) -> Tensor:
    """r of posterior draws `(n, B, *D)`, as `(n, B)`. Raises ValueError as `evaluate_reward` does."""
    return evaluate_reward(reward, draws.flatten(0, 1)).unflatten(0, draws.shape[:2])


def value_gradient(
    X: MetaFlowMap,
    reward: Reward,
    t: Time,
    x: Tensor,
    n: int,
    method: str = "controlled",
    *,
    noise: str = "sobol",
    steps: int = 1,
    y: Tensor | None = None,
    eps: Tensor | None = None,
    generator: Source = None,
    max_rows: int | None = None,
) -> Tensor:
    """∇V_t(x), `(B, *D)`, from n posterior draws.

    Args:
        X: a Meta Flow Map.
        reward: callable `(B, *D) -> (B,)`; differentiable unless the method is "stein".
        t, x: time `()` or `(B,)` in [0, 1] (below 1 unless the method is "gradient"), and states `(B, *D)`.
        n: posterior draws per state, >= 1.
        method: "gradient" (E16, MFM-G): E15 differentiated through the reward and the map. "stein" (E17, MFM-GF):
            ∇V = t/(1−t)² (E_w[x₁] − E[x₁]), for black boxes. "controlled": both, `controlled_guidance`.
        noise: kind of the noises, see `posterior_noise`.
        steps: evaluations of the map per draw, as in `sample_posterior`.
        y: class labels `(B,)`, or None.
        eps: the noises `(n, B, *D)`; drawn where None.
        generator: source of the noises; of a sequence, generator b gives those of state b.
        max_rows: most rows (of the n·B) in one call of the map, and, where more than n, in one estimate, which bounds
            the memory; all of them where None. The noises are drawn before, so it does not change the result but
            for rounding. See `rows_within`.

    Raises:
        ValueError: an unknown method or noise; a reward that does not fit (`evaluate_reward`) or, unless the method
            is "stein", cannot be differentiated; t = 1 unless the method is "gradient"; counts below one.
    """
    if method == "gradient":
        eps = _noises(n, x, noise, eps, generator)
        _, r, slopes = posterior_slopes(X, reward, t, x, eps, steps=steps, y=y, max_rows=max_rows)
        return gradient_guidance(r, expand_time(t, x) * slopes if X.reads_tx else slopes)
    g = guidance(
        X, reward, t, x, n, method, noise=noise, steps=steps, y=y, eps=eps, generator=generator, max_rows=max_rows
    )
    t = expand_time(t, x)
    return t / (1 - t) * g


def guidance(
    X: MetaFlowMap,
    reward: Reward,
    t: Time,
    x: Tensor,
    n: int,
    method: str = "controlled",
    *,
    noise: str = "sobol",
    steps: int = 1,
    y: Tensor | None = None,
    eps: Tensor | None = None,
    generator: Source = None,
    max_rows: int | None = None,
) -> Tensor:
    """(σ_t²/2) ∇V_t(x) (E7) by E16, E17 or both, `(B, *D)`, finite at t = 0 although σ² is not.

    The reward is differentiated with respect to t·x (`guidance_factor`). Arguments and errors as in `value_gradient`;
    for a map that reads x itself, "gradient" and "controlled" refuse t = 0.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    check_labels(y, len(x))
    eps = _noises(n, x, noise, eps, generator)
    if max_rows is not None:
        check_count(max_rows, "max_rows")
    if max_rows is not None and len(x) > 1 and n * len(x) > max_rows:
        # States do not depend on each other: the estimate, and not the draws alone, is made block by block.
        return torch.cat(
            [
                guidance(X, reward, times, part, n, method, y=labels, eps=eps[:, i], steps=steps, max_rows=max_rows)
                for i, times, part, labels in _blocks(max(1, max_rows // n), t, x, y)
            ]
        )
    if method == "stein":
        draws, r = posterior_rewards(X, reward, t, x, eps, steps=steps, y=y, max_rows=max_rows)
        return stein_guidance(r, draws, t)
    factor = guidance_factor(X, t, x)
    draws, r, slopes = posterior_slopes(X, reward, t, x, eps, steps=steps, y=y, max_rows=max_rows)
    if method == "gradient":
        return gradient_guidance(r, factor * slopes)
    return controlled_guidance(r, draws, factor * slopes, t)


def doob_drift(
    X: MetaFlowMap,
    reward: Reward,
    t: Time,
    x: Tensor,
    n: int,
    method: str = "controlled",
    *,
    noise: str = "sobol",
    rescale: bool = False,
    steps: int = 1,
    y: Tensor | None = None,
    eps: Tensor | None = None,
    generator: Source = None,
    max_rows: int | None = None,
) -> Tensor:
    """E7: b*_t(x) = b_t(x) + (σ_t²/2) ∇V_t(x), estimated with n posterior draws; `(B, *D)`.

    With the exact ∇V it is the drift (E2) of the tilted law p* ∝ p₁ e^r. Arguments as in `value_gradient`.

    Args:
        rescale: b + ‖b‖ ∇V/‖∇V‖ instead, the paper's choice on ImageNet: as much guidance as drift, whatever the size
            of the reward. It no longer targets p*.
    """
    g = guidance(
        X, reward, t, x, n, method, noise=noise, steps=steps, y=y, eps=eps, generator=generator, max_rows=max_rows
    )
    with torch.no_grad():
        b = unconditional_drift(X, t, x, y)
        return b + (rescaled(g, b) if rescale else g)


def rescaled(g: Tensor, b: Tensor) -> Tensor:
    """g with the norm of b, sample by sample, `(B, *D)`; 0 where g is 0."""
    norms = [a.flatten(1).norm(dim=1).reshape(-1, *[1] * (a.ndim - 1)) for a in (b, g)]
    return g * torch.where(norms[1] > 0, norms[0] / torch.where(norms[1] > 0, norms[1], 1.0), 0.0)


def denoiser(X: MetaFlowMap, t: Time, x: Tensor, y: Tensor | None = None) -> Tensor:
    """D_t(x) = E[x₁ | I_t = x] (E2): b̄_0(0; t, x) = D_t(x) − 0, read off the diagonal; `(B, *D)`."""
    return X.velocity(0.0, 0.0, torch.zeros_like(x), t, x, y)


def dps_drift(
    X: MetaFlowMap, reward: Reward, t: Time, x: Tensor, *, y: Tensor | None = None, max_rows: int | None = None
) -> Tensor:
    """E20, the DPS baseline: b_t(x) + (σ_t²/2) ∇_x r(D_t(x)), the reward of the posterior's mean; `(B, *D)`.

    D is read off the context (`denoiser`), so t = 0 is finite as in `guidance`; b = (D − x)/(1−t) is the same
    evaluation. `max_rows` is the most states at once; all of them where None.

    Raises:
        ValueError: as in `guidance`, and at t = 1.
    """
    check_labels(y, len(x))
    if max_rows is not None:
        check_count(max_rows, "max_rows")
        if len(x) > max_rows:
            blocks = _blocks(max_rows, t, x, y)
            return torch.cat([dps_drift(X, reward, times, part, y=labels) for _, times, part, labels in blocks])
    factor = guidance_factor(X, t, x)
    with torch.enable_grad():
        reader, context = through_context(X, t, x)
        denoised = denoiser(reader, t, context, y)
        slope = _gradient(evaluate_reward(reward, denoised), context)
    return denoiser_to_drift(denoised.detach(), t, x.detach()) + factor * slope


# ---- posterior draws and their rewards -----------------------------------------------------------------


def posterior_rewards(
    X: MetaFlowMap,
    reward: Reward,
    t: Time,
    x: Tensor,
    eps: Tensor,
    *,
    steps: int = 1,
    y: Tensor | None = None,
    max_rows: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Draws X_{0,1}(ε_i; t, x), `(n, B, *D)`, and their rewards `(n, B)`, without a graph.

    Arguments as in `value_gradient`, with the noises eps `(n, B, *D)`. Errors as there.
    """
    pieces = []
    for noise, time, context, labels in _chunks(t, x, eps, y, max_rows):
        with torch.no_grad():
            draws = sample_posterior(X, time, context, 1, steps, y=labels, eps=noise)[0]
            pieces.append((draws, evaluate_reward(reward, draws)))
    draws, r = (torch.cat(parts).unflatten(0, eps.shape[:2]) for parts in zip(*pieces, strict=True))
    return draws, r


def posterior_slopes(
    X: MetaFlowMap,
    reward: Reward,
    t: Time,
    x: Tensor,
    eps: Tensor,
    *,
    steps: int = 1,
    y: Tensor | None = None,
    max_rows: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Draws `(n, B, *D)`, their rewards `(n, B)`, and the slope of each reward in its context, `(n, B, *D)`.

    The slope is ∂r(X_i)/∂(t·x) where the map reads t·x, else ∂r(X_i)/∂x. No graph is left, and none is larger than
    that of `max_rows` rows. Arguments and errors as in `posterior_rewards`; the reward must be differentiable.
    """
    pieces = []
    for noise, time, x_rows, labels in _chunks(t, x, eps, y, max_rows):
        with torch.enable_grad():
            reader, context = through_context(X, time, x_rows)
            draws = sample_posterior(reader, time, context, 1, steps, y=labels, eps=noise)[0]
            r = evaluate_reward(reward, draws)
            slopes = _gradient(r, context)
        pieces.append((draws.detach(), r.detach(), slopes))
    draws, r, slopes = (torch.cat(parts).unflatten(0, eps.shape[:2]) for parts in zip(*pieces, strict=True))
    return draws, r, slopes


def context_gradient(
    X: MetaFlowMap,
    reward: Reward,
    t: Time,
    x: Tensor,
    n: int,
    *,
    y: Tensor | None = None,
    eps: Tensor | None = None,
    generator: Source = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Posterior draws X, their rewards `(n, B)` and (σ_t²/2) ∇_x r(X) of each (E18), `(n, B, *D)` like the draws.

    Finite at t = 0 as `guidance` is.
    """
    eps = _noises(n, x, "independent", eps, generator)
    draws, r, slopes = posterior_slopes(X, reward, t, x, eps, y=y)
    return draws, r, guidance_factor(X, t, x) * slopes


def rows_within(
    memory: float, X: MetaFlowMap, reward: Reward | None, *, steps: int = 1, y: Tensor | None = None
) -> int:
    """`max_rows` for a memory budget: how many rows' graphs, of the map and the reward, fit in `memory` bytes; >= 1.

    Measured: what the graph of two rows saves for its backward pass, less that of one row, at t = 0.5 and normal
    states. With None in place of the reward, for a black box, the map's alone: more than its rows take without a graph.
    `steps` are the evaluations of the map for a draw, as in `sample_posterior`: a row has the graphs of all of them.
    Beside the graphs there are the noises of all n·B rows, and some copies of the draws of as many. What a reward
    computes again for its gradient (`torch.utils.checkpoint`) is not seen.

    Raises:
        ValueError: memory that is not positive, steps below one, or a reward that does not fit, couples two rows or
            has no gradient.
    """
    if not memory > 0:
        raise ValueError(f"memory must be positive, got {memory}")
    states = torch.randn((2, *X.shape), generator=torch.Generator().manual_seed(0)).to(X.device, X.dtype)
    sizes = []
    for rows in (1, 2):
        saved: dict[int, int] = {}

        def keep(tensor: Tensor, saved: dict[int, int] = saved) -> Tensor:
            storage = tensor.untyped_storage()
            saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        x = states[:rows]
        labels = None if y is None else y[:1].repeat(rows)
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            reader, context = through_context(X, 0.5, x)
            draws = sample_posterior(reader, 0.5, context, 1, steps, y=labels, eps=x.unsqueeze(0))[0]
            graph = draws if reward is None else evaluate_reward(reward, draws)
        if reward is not None and rows == 2:
            check_uncoupled(reward, draws, graph)
        sizes.append(sum(saved.values()))
        del draws, graph
    return max(1, int(memory / max(sizes[1] - sizes[0], 1)))


# ---- differentiating with respect to the context -------------------------------------------------------


def through_context(X: MetaFlowMap, t: Time, x: Tensor) -> tuple[MetaFlowMap, Tensor]:
    """A map and a leaf to call it with: t·x, through which alone a posterior depends on x, where the map reads that."""
    if X.reads_tx:
        return _ReadingTx(X), (expand_time(t, x) * x.detach()).requires_grad_()
    return X, x.detach().clone().requires_grad_()


def guidance_factor(X: MetaFlowMap, t: Time, x: Tensor) -> Tensor:
    """The factor in (σ_t²/2) ∇_x f = factor · ∂f/∂leaf, with the leaf of `through_context`; `(B, 1, …, 1)`.

    ∇_x = t ∇_{t·x}, and σ²/2 = (1−t)/t loses its pole: the factor is 1−t. Where the map reads x itself it is (1−t)/t.

    Raises:
        ValueError: at t = 0 for a map that reads x itself.
    """
    time = expand_time(t, x)
    if X.reads_tx:
        return 1 - time
    if bool((time == 0).any()):
        raise ValueError(
            "differentiating a map that reads x (reads_tx is false), as rollouts do, needs t > 0, got t = 0; "
            'use method "stein", steer from a later time on (guide_from), or let its network read t·x'
        )
    return noise_scale(time) / 2


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


# ---- helpers -------------------------------------------------------------------------------------------


def _noises(n: int, x: Tensor, kind: str, eps: Tensor | None, generator: Source) -> Tensor:
    check_count(n, "n")
    if eps is None:
        return posterior_noise(n, x, kind, generator=generator)
    if eps.shape != (n, *x.shape):
        raise ValueError(f"eps must have shape {(n, *x.shape)}, got {tuple(eps.shape)}")
    return eps


def _blocks(size: int, t: Time, x: Tensor, y: Tensor | None) -> Iterator[tuple[slice, Tensor, Tensor, Tensor | None]]:
    """Which states, their times `(size,)`, themselves and their labels, `size` states at a time."""
    times = expand_time(t, x).flatten()
    for first in range(0, len(x), size):
        part = slice(first, first + size)
        yield part, times[part], x[part], None if y is None else y[part]


def _chunks(
    t: Time, x: Tensor, eps: Tensor, y: Tensor | None, max_rows: int | None
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor | None]]:
    """The n·B rows of noise (with a first dimension of 1), time, state and label, at most `max_rows` at once."""
    n, rows = len(eps), eps.flatten(0, 1)
    if max_rows is not None:
        check_count(max_rows, "max_rows")
    times, contexts = expand_time(t, x).flatten().repeat(n), x.expand(n, *x.shape).flatten(0, 1)
    check_labels(y, len(x))
    labels = None if y is None else y.repeat(n)
    size = len(rows) if max_rows is None else max_rows
    for first in range(0, len(rows), size):
        part = slice(first, first + size)
        yield rows[part].unsqueeze(0), times[part], contexts[part], None if labels is None else labels[part]


def _gradient(values: Tensor, x: Tensor) -> Tensor:
    """∇_x of each row's value; a reward that cannot be differentiated is named as such."""
    gradient = torch.autograd.grad(values.sum(), x, allow_unused=True)[0] if values.requires_grad else None
    if gradient is None:
        raise ValueError(
            "this needs a differentiable reward (and no inference mode), got one without a gradient; "
            'method "stein" takes a black box'
        )
    check_finite(gradient, "the gradient of the reward")
    return gradient
