"""How the statistical and the convergence tests judge, and the small maps that they judge.

A statistic is measured in standard errors of its own estimate. `LIMIT` = 5 of them, two-sided, is exceeded by a
correct sampler with probability 6e-7 per statistic; the few hundred statistics of the suite together raise one
false alarm in some 5,000 changes of the seeds. The seeds are fixed, so a test that passed passes again.
"""

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn

from mfm_ref import ExactFlowMap, GaussianMixture
from tests.strategies import random_mixture

LIMIT = 5.0


def gaussian(dim: int = 2, seed: int = 0) -> GaussianMixture:
    """One Gaussian with a full covariance: the closed-form route of the oracle, fast enough for statistics."""
    return random_mixture(dim, 1, seed)


def normal(var: float) -> GaussianMixture:
    """N(0, var) in one dimension: its posteriors and their marginals give the natural sizes by E3."""
    one = torch.ones(1, dtype=torch.float64)
    return GaussianMixture(one, 0 * one.unsqueeze(-1), var * one.reshape(1, 1, 1))


def line() -> GaussianMixture:
    """Three unequal components in one dimension: the oracle's quantile route."""
    weights = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
    means = torch.tensor([[-2.0], [0.5], [2.0]], dtype=torch.float64)
    return GaussianMixture(weights, means, torch.tensor([[[0.3]], [[0.05]], [[0.6]]], dtype=torch.float64))


def line_cdf(p: GaussianMixture):
    """The CDF of a one-dimensional mixture, by SciPy."""
    weights, means, stds = p.weights.numpy(), p.means[:, 0].numpy(), p.covs[:, 0, 0].sqrt().numpy()
    return lambda x: (weights * stats.norm.cdf(np.asarray(x)[..., None], means, stds)).sum(-1)


def z_scores(samples: Tensor, expected: Tensor | float) -> Tensor:
    """(mean over the first dimension − expected) in standard errors of that mean."""
    error = samples.std(0) / len(samples) ** 0.5
    return (samples.mean(0) - expected) / error


def moment_scores(samples: Tensor, mean: Tensor, cov: Tensor) -> Tensor:
    """Largest |z| over the first and second moments of samples `(n, D)` against those of a law.

    The samples are whitened by the law's own Cholesky factor, so the moments compared are 0 and the identity.
    """
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(cov), (samples - mean).T, upper=False).T
    rows, columns = torch.tril_indices(len(mean), len(mean))
    second = white[:, rows] * white[:, columns]
    scores = torch.cat([z_scores(white, 0.0), z_scores(second, (rows == columns).to(white))])
    return scores.abs().max()


def slope(steps: list[float] | list[int], errors: list[float]) -> float:
    """Order of convergence: the least-squares slope of log error on log step."""
    return float(np.polyfit(np.log(steps), np.log(errors), 1)[0])


def finite_difference(f, a: float, h: float = 1e-4) -> Tensor:
    """df/da by central differences, error O(h²)."""
    return (f(a + h) - f(a - h)) / (2 * h)


def one_sided_difference(f) -> Tensor:
    """f′(0) in units of the step by three points on one side, 0, 1 and 2: error of second order in the step."""
    return (4 * f(1) - f(2) - 3 * f(0)) / 2


class MapOf:
    """A Meta Flow Map made of one function X(s, u, z, t, x, y) of column-shaped times: for pairing and failures."""

    reads_tx = False

    def __init__(self, function, shape: tuple[int, ...], dtype: torch.dtype = torch.float64):
        self.function, self.shape, self.dtype, self.device = function, shape, dtype, torch.device("cpu")

    def __call__(self, s, u, z, t, x, y=None):
        times = (torch.as_tensor(a, dtype=z.dtype).reshape(-1, *[1] * (z.ndim - 1)) for a in (s, u, t))
        s, u, t = (a.expand(len(z), *a.shape[1:]) for a in times)
        return self.function(s, u, z, t, x, y)

    def velocity(self, s, u, z, t, x, y=None):
        """The quotient of E11, by a short step where s = u."""
        s, u = torch.as_tensor(s, dtype=z.dtype), torch.as_tensor(u, dtype=z.dtype)
        u = torch.where(u > s, u, s + 1e-6)
        jump = (u - s).reshape(-1, *[1] * (z.ndim - 1))
        return (self(s, u, z, t, x, y) - z) / jump


class ReadsX(ExactFlowMap):
    """The oracle as a map that reads x itself: `from_tx` refuses, as it does for such a network."""

    reads_tx = False

    def __call__(self, s, u, z, t, x, y=None):
        t = torch.as_tensor(t, dtype=x.dtype).expand(len(x))
        return ExactFlowMap.from_tx(self, s, u, z, t, t.unsqueeze(-1) * x, y)

    def velocity(self, s, u, z, t, x, y=None):
        t = torch.as_tensor(t, dtype=x.dtype).expand(len(x))
        return ExactFlowMap.velocity_from_tx(self, s, u, z, t, t.unsqueeze(-1) * x, y)


class Bent(nn.Module):
    """A map with one parameter, nonlinear in it and in the state, for derivatives by finite differences."""

    shape, reads_tx = (2,), True

    def __init__(self, theta: float):
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(theta, dtype=torch.float64))

    def velocity(self, s, u, z, t, context, y=None):
        angle = self.theta * (1 + s + 2 * u).unsqueeze(-1)
        return torch.sin(angle * z) + self.theta**2 * context


def oracle_of(p1):
    X = ExactFlowMap(p1)
    return lambda s, u, z, t, x: X(s[:, 0], u[:, 0], z, t[:, 0], x)


def wrong_maps(p1) -> dict[str, tuple[MapOf, bool]]:
    """Maps that are not the oracle, each with whether it obeys the semigroup law nevertheless."""
    X, other = oracle_of(p1), oracle_of(p1._from_eigen(p1.log_weights, 1.2 * p1.means, p1.basis, p1.eigenvalues))
    exact = ExactFlowMap(p1)

    def euler(s, u, z, t, x, y):  # one step with the velocity at s: right on the diagonal
        return z + (u - s) * exact.velocity(s[:, 0], s[:, 0], z, t[:, 0], x)

    maps = {
        "Euler": (euler, False),
        "mean only": (lambda s, u, z, t, x, y: z + (u - s) * (p1.denoiser(t[:, 0], x) - z), False),
        "time reversed": (lambda s, u, z, t, x, y: X(1 - u, 1 - s, z, t, x), False),
        "another law's": (lambda s, u, z, t, x, y: other(s, u, z, t, x), True),
        "without the context": (lambda s, u, z, t, x, y: X(s, u, z, 0 * t, x), True),
        "identity": (lambda s, u, z, t, x, y: z, True),
    }
    return {name: (MapOf(function, (p1.dim,)), lawful) for name, (function, lawful) in maps.items()}


class Watched:
    """A map that keeps what its `velocity` is called with: `calls`, each [s, u, z, t, x], without graphs."""

    def __init__(self, X):
        self.X, self.calls = X, []
        self.shape, self.reads_tx, self.dtype, self.device = X.shape, X.reads_tx, X.dtype, X.device

    def velocity(self, s, u, z, t, x, y=None):
        self.calls.append([torch.as_tensor(a).detach() for a in (s, u, z, t, x)])
        return self.X.velocity(s, u, z, t, x, y)


class Perturbed:
    """v + θ φ: a family that contains the map at θ = 0; one parameter θ `(B,)` a row, φ smooth in every argument."""

    def __init__(self, X, theta: Tensor):
        self.X, self.theta = X, theta
        self.shape, self.reads_tx, self.dtype, self.device = X.shape, X.reads_tx, X.dtype, X.device

    def velocity(self, s, u, z, t, x, y=None):
        s_, u_, t_ = (torch.as_tensor(a, dtype=z.dtype).reshape(-1, 1) for a in (s, u, t))
        bump = torch.sin(z + t_ * x + s_ + 2 * u_)
        return self.X.velocity(s, u, z, t, x, y) + self.theta[-len(z) :].unsqueeze(-1) * bump
