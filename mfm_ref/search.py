"""MFM-Search (E21): alignment by selection among one-step posterior samples, with no gradient at all."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from tqdm import tqdm

from mfm_ref.alignment import posterior_rewards
from mfm_ref.checks import Reward, at_step, check_count, check_labels
from mfm_ref.cost import Cost, counting
from mfm_ref.flow_map import MetaFlowMap
from mfm_ref.interpolant import interpolate
from mfm_ref.noise import Source
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
    generator: Source = None,
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
        generator: source of all noise; of a sequence, generator i gives that of search i.
        progress: label of a progress bar; none where None.

    Returns:
        samples `(n_samples, *D)`, and what they cost: 2MNK evaluations each.

    Raises:
        ValueError: counts below one, an unknown `select` or `transition`, a grid that does not rise from 0 to 1; with
            the step's name, whatever is wrong with the map or the reward (`evaluate_reward`).
    """
    for name, count in {"n_samples": n_samples, "particles": particles, "n": n}.items():
        check_count(count, name)
    check_labels(y, n_samples)
    _check_choice(select, "select", "all", "particle")
    _check_choice(transition, "transition", "stochastic", "deterministic")
    grid = time_grid(steps, power=PAPER_POWER) if times is None else check_grid(times)
    labels = None if y is None else y.repeat(particles)
    with counting(X, reward, n_samples) as (X, reward, cost):

        def noise(*draws: int) -> Tensor:
            """`(*draws, M·B, *D)`, particle by particle."""
            drawn = noise_like(X, *draws, particles, n_samples, generator=generator)
            return drawn.flatten(len(draws), len(draws) + 1)

        x = noise()
        bar = tqdm(list(pairwise(grid)), desc=progress, disable=progress is None, leave=False)
        for k, (t, t_next) in enumerate(bar):
            with at_step(k + 1, len(grid) - 1, t):
                eps = noise(n)
                # draws (n, M·B, *D), r (n, M·B)
                draws, r = posterior_rewards(X, reward, t, x, eps, y=labels, max_rows=max_rows)
                if t_next < 1:
                    x1 = best(draws, r, len(x) if select == "particle" else n_samples)
                    x1 = x1.expand(len(x) // len(x1), *x1.shape).flatten(0, 1)
                    fresh = transition == "stochastic"
                    x0 = noise() if fresh else (x - t * x1) / (1 - t)
                    x = interpolate(x0, x1, t_next)
        found = best(draws, r, n_samples)
    return found, cost


def best(x: Tensor, r: Tensor, groups: int) -> Tensor:
    """The state of the highest reward in each group, `(groups, *D)`, of states `(n, B, *D)` with rewards `(n, B)`.

    The states are counted row by row, i = 0 … nB − 1, and i is in group i mod groups.
    """
    winner = r.reshape(-1, groups).argmax(0)
    return x.reshape(-1, groups, *x.shape[2:])[winner, torch.arange(groups, device=x.device)]


def _check_choice(value: str, name: str, one: str, other: str) -> None:
    if value not in (one, other):
        raise ValueError(f'{name} must be "{one}" or "{other}", got {value!r}')
