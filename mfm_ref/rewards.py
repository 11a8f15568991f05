"""Rewards with a closed form on Gaussian mixtures: the test bed of every alignment algorithm.

A reward is any callable `(B, *D) -> (B,)`. The two here also know E[e^r] and the tilted law of a Gaussian,
which is all that `GaussianMixture.value` and `GaussianMixture.tilt` ask of a reward.
"""

import math
from typing import Protocol

import torch
from torch import Tensor

from mfm_ref.checks import check_finite


def _matching(a: Tensor, x: Tensor) -> Tensor:
    """A coefficient `(…, D)` in the dtype and on the device of x. Raises ValueError unless x is `(…, D)`."""
    if x.shape[-1:] != a.shape[-1:]:
        raise ValueError(f"this reward needs states of dimension {a.shape[-1]}, got shape {tuple(x.shape)}")
    return a.to(x)


def _flattened(a: Tensor, x: Tensor) -> Tensor:
    """States `(B, *D)` as `(B, D)`. Raises ValueError unless a, `(M, D)`, has a column for each number of a state."""
    if x.ndim < 2 or math.prod(x.shape[1:]) != a.shape[-1]:
        raise ValueError(
            f"this reward needs states of dimension {a.shape[-1]}, or images of as many numbers, "
            f"got shape {tuple(x.shape)}"
        )
    return x.flatten(1)


class GaussianReward(Protocol):
    """A reward r for which e^r times a Gaussian is again a Gaussian."""

    def __call__(self, x1: Tensor) -> Tensor:
        """r(x₁): `(B, D) -> (B,)`."""
        ...

    def log_partition(self, means: Tensor, covs: Tensor) -> Tensor:
        """log E[e^r] under N(means, covs): `(…, D), (…, D, D) -> (…)`."""
        ...

    def tilt(self, means: Tensor, covs: Tensor) -> tuple[Tensor, Tensor]:
        """Mean `(…, D)` and covariance `(…, D, D)` of N(means, covs) e^r, normalised."""
        ...


class LinearReward:
    """r(x₁) = a·x₁.

    Args:
        a: direction `(D,)`, finite.

    Raises:
        ValueError: when a is not a finite vector.
    """

    def __init__(self, a: Tensor):
        if a.ndim != 1:
            raise ValueError(f"a must be a vector (D,), got shape {tuple(a.shape)}")
        check_finite(a, "a")
        self.a = a

    def __call__(self, x1: Tensor) -> Tensor:
        """r(x₁): `(B, D) -> (B,)`."""
        return x1 @ _matching(self.a, x1)

    def log_partition(self, means: Tensor, covs: Tensor) -> Tensor:
        """log E[e^{a·x}] = a·μ + aᵀΣa/2."""
        a = _matching(self.a, means)
        return means @ a + (covs @ a) @ a / 2

    def tilt(self, means: Tensor, covs: Tensor) -> tuple[Tensor, Tensor]:
        """N(μ, Σ) becomes N(μ + Σa, Σ)."""
        return means + covs @ _matching(self.a, means), covs


class GaussianLikelihood:
    """r(x₁) = −‖y − a x₁‖²/(2σ²), the log-likelihood (up to a constant) of the inverse problem y = a x₁ + σ ξ.

    A state may also be an image, or of any shape `*D` with D numbers in all: a then has a column for each of them, in
    the order of `flatten`.

    Args:
        a: vector `(D,)` for one measurement, or matrix `(M, D)`.
        y: measurement: a number or `()` for a vector a, `(M,)` for a matrix.
        sigma: standard deviation of the measurement noise, > 0.

    Raises:
        ValueError: shapes that do not fit, entries that are not finite, or sigma <= 0.
    """

    def __init__(self, a: Tensor, y: Tensor | float, sigma: float):
        if a.ndim not in (1, 2):
            raise ValueError(f"a must be a vector (D,) or a matrix (M, D), got shape {tuple(a.shape)}")
        y = torch.as_tensor(y, dtype=a.dtype, device=a.device)
        if y.shape != a.shape[:-1]:
            raise ValueError(f"y must have shape {tuple(a.shape[:-1])} to match a, got {tuple(y.shape)}")
        if not (sigma > 0 and math.isfinite(sigma)):
            raise ValueError(f"sigma must be positive and finite, got {sigma}")
        check_finite(a, "a")
        check_finite(y, "y")
        self.a, self.y, self.sigma = torch.atleast_2d(a), torch.atleast_1d(y), float(sigma)

    def __call__(self, x1: Tensor) -> Tensor:
        """r(x₁): `(B, *D) -> (B,)`. Raises ValueError unless a has a column for each number of a state."""
        residual = self.y.to(x1) - _flattened(self.a, x1) @ self.a.to(x1).T
        return -residual.square().sum(-1) / (2 * self.sigma**2)

    def _innovation(self, means: Tensor, covs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """y − aμ `(…, M)`, the Cholesky factor of aΣaᵀ + σ²I `(…, M, M)`, and aΣ `(…, M, D)`."""
        a, y = _matching(self.a, means), self.y.to(means)
        a_cov = a @ covs
        noise = self.sigma**2 * torch.eye(len(y), dtype=means.dtype, device=means.device)
        return y - means @ a.T, torch.linalg.cholesky(a_cov @ a.T + noise), a_cov

    def log_partition(self, means: Tensor, covs: Tensor) -> Tensor:
        """log E[e^r] = log N(y; aμ, aΣaᵀ + σ²I) + (M/2) log 2πσ²."""
        residual, factor, _ = self._innovation(means, covs)
        whitened = torch.linalg.solve_triangular(factor, residual.unsqueeze(-1), upper=False).squeeze(-1)
        log_det = 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return (2 * len(self.y) * math.log(self.sigma) - log_det - whitened.square().sum(-1)) / 2

    def tilt(self, means: Tensor, covs: Tensor) -> tuple[Tensor, Tensor]:
        """The Kalman update: gain G = Σaᵀ(aΣaᵀ + σ²I)⁻¹; mean μ + G(y − aμ), covariance Σ − G aΣ."""
        residual, factor, a_cov = self._innovation(means, covs)
        gain = torch.cholesky_solve(a_cov, factor).mT
        tilted = covs - gain @ a_cov
        return means + (gain @ residual.unsqueeze(-1)).squeeze(-1), (tilted + tilted.mT) / 2
