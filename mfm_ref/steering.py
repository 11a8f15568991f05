"""Steered sampling: the Doob ODE and the Doob SDE (E7, E8), with any estimator of the value's gradient."""

from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

from mfm_ref.alignment import METHODS, doob_drift, dps_drift, rows_within
from mfm_ref.checks import Reward, check_count, check_labels
from mfm_ref.cost import Cost, counting
from mfm_ref.flow_map import MetaFlowMap, unconditional_drift
from mfm_ref.noise import Source
from mfm_ref.sampling import integrate, noise_like, time_grid


def early_draws(n: int) -> Callable[[float], int]:
    """N as a function of t: 3n/2 up to t = 0.6, n/4 after (rounded down, at least 1); n on average on a uniform grid.

    Early posteriors are wide, and there the weights of few draws are uneven; late ones are narrow.

    Raises:
        ValueError: n below one.
    """
    check_count(n, "n")
    more, less = max(1, 3 * n // 2), max(1, n // 4)
    return lambda t: more if t < 0.6 else less


DEFAULT_DRAWS = early_draws(16)
DYNAMICS = ("ode", "midpoint", "sde")  # that never ask for b* at t = 1, where a posterior is one point


def steer(
    X: MetaFlowMap,
    reward: Reward,
    n_samples: int,
    *,
    n: int | Callable[[float], int] = DEFAULT_DRAWS,
    steps: int = 250,
    times: Sequence[float] | None = None,
    method: str = "controlled",
    noise: str = "sobol",
    dynamics: str = "ode",
    rescale: bool = False,
    posterior_steps: int = 1,
    guide_from: float = 0.0,
    x0: Tensor | None = None,
    y: Tensor | None = None,
    memory: float | None = 4e9,
    max_rows: int | None = None,
    generator: Source = None,
    progress: str | None = None,
) -> tuple[Tensor, Cost]:
    """E7, E8: samples of the tilted law p* ∝ p₁ e^r, by the Doob ODE or the Doob SDE from t = 0 to 1.

    Args:
        X: a Meta Flow Map.
        reward: callable `(B, *D) -> (B,)`; differentiable unless the method is "stein".
        n_samples: number of samples, >= 1.
        n: posterior draws per step and sample, >= 1, or a function of t that gives them; `early_draws(16)` by default,
            24 up to t = 0.6 and then 4.
        steps: number of steps of a uniform grid.
        times: another grid, rising from 0 to 1, in place of `steps`: `time_grid`, `log_snr_grid`.
        method: "controlled", "gradient" (E16), "stein" (E17), see `value_gradient`; or "dps" (E20), which draws none.
        noise: kind of the noises of the draws, see `posterior_noise`.
        dynamics: "ode" or "midpoint" (E7), or "sde" (E8); see `integrate`. Its others ask for b* at t = 1, which
            the estimators do not give.
        rescale: guidance with the norm of the drift, see `doob_drift`; not for "dps".
        posterior_steps: evaluations of the map per posterior draw, as `steps` of `sample_posterior`.
        guide_from: guidance begins at this time, in [0, 1]; before it the drift is b_t alone. A map that reads x cannot
            be differentiated at t = 0, and any time above 0 will do; 1 is no guidance at all.
        x0: the noises to start from, `(n_samples, *D)`; drawn where None.
        y: class labels `(n_samples,)`, or None.
        memory: bytes that the graphs of one evaluation may take; draws beyond them wait their turn (`rows_within`),
            which changes the result by rounding alone. None for no bound.
        max_rows: most rows in one call of the map, in the place of those that fit the memory; states, too, of "dps".
        generator: source of all noise; of a sequence, generator i gives that of sample i, which then does not depend on
            the batch but for rounding.
        progress: label of a progress bar; none where None.

    Returns:
        samples `(n_samples, *D)`, and what they cost.

    Raises:
        ValueError: from `integrate` and `value_gradient`, with the step; a reward that couples the samples of a batch.
    """
    check_count(n_samples, "n_samples")
    check_labels(y, n_samples)
    if method not in (*METHODS, "dps"):
        raise ValueError(f'method must be one of {", ".join(METHODS)} or "dps", got {method!r}')
    if method == "dps" and rescale:
        raise ValueError('rescale must be False for method "dps", got True')
    if dynamics not in DYNAMICS:
        raise ValueError(f"dynamics must be one of {', '.join(DYNAMICS)}, got {dynamics!r}")
    if not 0 <= guide_from <= 1:
        raise ValueError(f"guide_from must lie in [0, 1], got {guide_from}")
    if memory is not None and not memory > 0:
        raise ValueError(f"memory must be positive or None, got {memory}")
    x = noise_like(X, n_samples, generator=generator) if x0 is None else x0
    if x.shape != (n_samples, *X.shape):
        raise ValueError(f"x0 must have shape {(n_samples, *X.shape)}, got {tuple(x.shape)}")
    if max_rows is not None:
        check_count(max_rows, "max_rows")
    draws = n if callable(n) else lambda t: n
    grid = time_grid(steps) if times is None else times

    @cache  # called in the first step, so that an error of the reward names it
    def most_rows() -> int | None:
        if max_rows is not None or memory is None:
            return max_rows
        return rows_within(memory, X, None if method == "stein" else reward, steps=posterior_steps, y=y)

    with counting(X, reward, n_samples) as (counted, counted_reward, cost):

        def drift(t: float, x: Tensor) -> Tensor:
            if t < guide_from:
                with torch.no_grad():
                    return unconditional_drift(counted, t, x, y)
            if method == "dps":
                return dps_drift(counted, counted_reward, t, x, y=y, max_rows=max_rows)
            return doob_drift(
                counted,
                counted_reward,
                t,
                x,
                draws(t),
                method,
                noise=noise,
                rescale=rescale,
                steps=posterior_steps,
                y=y,
                generator=generator,
                max_rows=most_rows(),
            )

        x = integrate(drift, x, grid, dynamics=dynamics, generator=generator, progress=progress)
    return x, cost
