"""The laws on which objectives are compared: mixtures, whose posteriors are known, and shapes, whose are not."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mfm_ref import GaussianMixture, interpolate
from mfm_ref.interpolant import Drift
from toy.comparison import Posterior, rollout
from toy.mixture import paper_mixture

SHAPES = ("checkerboard", "moons")


class Problem(NamedTuple):
    """One law p₁, and what is known of it."""

    sample: Callable[[int, torch.Generator], Tensor]  # (n, generator) -> data (n, D)
    mean: Tensor  # (D,)
    cov: Tensor  # (D, D)
    mixture: GaussianMixture | None  # the law itself, where it is one

    @property
    def data_var(self) -> float:
        """Variance per coordinate."""
        return float(self.cov.diagonal().mean())

    def contexts(self, t: float, n: int, generator: torch.Generator) -> Tensor:
        """n noisy states I_t (E1)."""
        x1 = self.sample(n, generator)
        return interpolate(torch.randn(x1.shape, generator=generator), x1, t)

    def posterior(self, drift: Drift, generator: torch.Generator, steps: int) -> Posterior:
        """The exact posterior of a mixture; else a rollout of the drift, `steps` Runge–Kutta steps long."""

        def exact(t: float, x: Tensor, n: int) -> Tensor:
            assert self.mixture is not None
            return self.mixture.posterior(t, x).sample(n, generator=generator)

        def rolled(t: float, x: Tensor, n: int) -> Tensor:
            eps = torch.randn((n, *x.shape), generator=generator)
            return rollout(drift, t, x, n, steps=steps, data_var=self.data_var, eps=eps)

        return rolled if self.mixture is None else exact


def problem(name: str) -> Problem:
    """`mixture` (the paper's), `mixture-D` in D dimensions, or one of `SHAPES`."""
    if name == "mixture":
        return _of_mixture(paper_mixture()[0])
    if name.startswith("mixture-"):
        return _of_mixture(mixture_in(int(name.removeprefix("mixture-"))))
    sample = {"checkerboard": checkerboard, "moons": moons}[name]
    many = sample(200_000, torch.Generator().manual_seed(0))
    return Problem(sample, many.mean(0), many.T.cov(), None)


def mixture_in(dim: int) -> GaussianMixture:
    """Five components of covariance I/2 in random places; root mean square of their distances 6 in any dimension."""
    generator = torch.Generator().manual_seed(dim)
    means = torch.randn((5, dim), generator=generator) * math.sqrt(18 / dim)
    return GaussianMixture(torch.full((5,), 0.2), means, 0.5 * torch.eye(dim).repeat(5, 1, 1))


def checkerboard(n: int, generator: torch.Generator) -> Tensor:
    """Uniform on every other square of a 4×4 board of width 8, `(n, 2)`."""
    row, half = torch.randint(4, (n,), generator=generator), torch.randint(2, (n,), generator=generator)
    corner = torch.stack([2 * half + row % 2, row], -1) - 2.0
    return 2 * (corner + torch.rand((n, 2), generator=generator))


def moons(n: int, generator: torch.Generator) -> Tensor:
    """Two half circles of radius 3, interlocked, with noise of standard deviation 0.2; `(n, 2)`."""
    angle = math.pi * torch.rand(n, generator=generator)
    upper = torch.rand(n, generator=generator) < 0.5
    across = torch.where(upper, angle.cos(), 1 - angle.cos()) - 0.5
    up = torch.where(upper, angle.sin(), 0.5 - angle.sin()) - 0.25
    return 3 * torch.stack([across, up], -1) + 0.2 * torch.randn((n, 2), generator=generator)


def _of_mixture(p1: GaussianMixture) -> Problem:
    return Problem(lambda n, generator: p1.sample(n, generator=generator), p1.mean, p1.cov, p1)
