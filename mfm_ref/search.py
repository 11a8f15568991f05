"""MFM-Search (E21): alignment by selection among one-step posterior samples, with no gradient at all."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor
from tqdm import tqdm

from mfm_ref.checks import Reward, at_step, check_count, check_finite, evaluate_reward
from mfm_ref.cost import Cost, counting
from mfm_ref.flow_map import MetaFlowMap
from mfm_ref.interpolant import interpolate
from mfm_ref.sampling import check_grid, noise_like, time_grid

PAPER_POWER = 2.5  # of the time grid: many steps early, where there is most to choose


@torch.no_grad()
def search(
    X: MetaFlowMap,
    reward: Reward,
    n_samples: int,
    *,
    particles: int = 4,
    n: int = 16,
    steps: int = 16,
    times: Sequence[float] | None = None,
    select: str = "all",
    transition: str = "stochastic",
    y: Tensor | None = None,
    max_rows: int | None = None,
    generator: torch.Generator | None = None,
    progress: str | None = None,
) -> tuple[Tensor, Cost]:
    """E21 (Algorithm 4): `n_samples` independent searches, each with M particles and N posterior samples of each.

    At every step the sample x₁ = X_{0,1}(ε; t, x) of the highest reward is kept and noised to the next time,
    x ← (1−t′) x₀ + t′ x₁; the best of the last step is the result. It climbs the reward and has no target law: with
    M = N = 1 nothing is chosen, and its law is p₁, as that of `sample` (E19).

    Args:
        X: a Meta Flow Map.
        reward: callable `(B, *D) -> (B,)`, a black box.
        n_samples: number of searches, >= 1.
        particles: M, >= 1.
        n: N, posterior samples per particle and step, >= 1.
        steps: K, number of steps of the paper's grid (k/K)^2.5.
        times: another grid, rising from 0 to 1, in place of `steps`.
        select: "all": all particles of a search go on from the best of its M·N samples. "particle": each goes on from
            the best of its own N.
        transition: the noise x₀. "stochastic": fresh, for each particle. "deterministic": (x − t x₁)/(1−t), the one
            that leads from x₁ to the particle's own state x.
        y: class labels `(n_samples,)`, or None.
        max_rows: largest number of rows in one call of the map or of the reward; None for no limit. It does not
            change the result.
        generator: source of all noise.
        progress: label of a progress bar; none where None.

    Returns:
        samples `(n_samples, *D)`, and what they cost: 2MNK evaluations each.

    Raises:
        ValueError: counts below one, an unknown `select` or `transition`, a grid that does not rise from 0 to 1; with
            the step's name, whatever is wrong with the map or the reward (`evaluate_reward`).
    """
    for name, count in {"n_samples": n_samples, "particles": particles, "n": n}.items():
        check_count(count, name)
    _check_choice(select, "select", "all", "particle")
    _check_choice(transition, "transition", "stochastic", "deterministic")
    grid = time_grid(steps, power=PAPER_POWER) if times is None else check_grid(times)
    labels = None if y is None else y.repeat(particles)
    with counting(X, reward, n_samples) as (X, reward, cost):
        x = noise_like(X, particles * n_samples, generator=generator)  # (M·B, *D), particle by particle
        bar = tqdm(list(pairwise(grid)), desc=progress, disable=progress is None, leave=False)
        for k, (t, t_next) in enumerate(bar):
            with at_step(k + 1, len(grid) - 1, t):
                draws, r = _scored_draws(X, reward, t, x, n, y=labels, max_rows=max_rows, generator=generator)
                if t_next < 1:
                    x1 = best(draws, r, len(x) if select == "particle" else n_samples)
                    x1 = x1.expand(len(x) // len(x1), *x1.shape).flatten(0, 1)
                    fresh = transition == "stochastic"
                    x0 = noise_like(X, len(x), generator=generator) if fresh else (x - t * x1) / (1 - t)
                    x = interpolate(x0, x1, t_next)
        found = best(draws, r, n_samples)
    return found, cost


def _scored_draws(
    X: MetaFlowMap,
    reward: Reward,
    t: float,
    x: Tensor,
    n: int,
    *,
    y: Tensor | None,
    max_rows: int | None,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor]:
    """n posterior samples of each context and their rewards, draw by draw: `(n·B, *D)` and `(n·B,)`."""

    def scored(z: Tensor, x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        draws = X(0.0, 1.0, z, t, x, y)
        check_finite(draws, "the posterior samples")
        return draws, evaluate_reward(reward, draws)

    eps = noise_like(X, n * len(x), generator=generator)
    contexts = x.expand(n, *x.shape).flatten(0, 1)
    draws, r = by_rows(scored, max_rows, eps, contexts, None if y is None else y.repeat(n))
    return draws, r


def best(x: Tensor, r: Tensor, groups: int) -> Tensor:
    """The state of the highest reward in each group, `(groups, *D)`; row i of x `(B, *D)` is in group i mod groups."""
    winner = r.unflatten(0, (-1, groups)).argmax(0)
    return x.unflatten(0, (-1, groups))[winner, torch.arange(groups, device=x.device)]


def by_rows(
    function: Callable[..., tuple[Tensor, ...]], max_rows: int | None, *rows: Tensor | None
) -> tuple[Tensor, ...]:
    """`function(*rows)`, called with at most `max_rows` rows at a time; an argument that is None stays None.

    Raises:
        ValueError: max_rows below one.
    """
    if max_rows is None:
        return function(*rows)
    check_count(max_rows, "max_rows")
    total = next(len(a) for a in rows if a is not None)
    cuts = [slice(i, i + max_rows) for i in range(0, total, max_rows)]
    parts = [function(*(None if a is None else a[cut] for a in rows)) for cut in cuts]
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))


def _check_choice(value: str, name: str, one: str, other: str) -> None:
    if value not in (one, other):
        raise ValueError(f'{name} must be "{one}" or "{other}", got {value!r}')
