"""The exact oracle's distribution: Gaussian mixtures, on which every object of the method has a closed form.

Each component keeps the eigenvectors Q_k and eigenvalues λ_k of its covariance. Adding isotropic noise or
conditioning on a noisy observation changes only λ_k, so marginals and posteriors cost no decomposition and
are differentiable everywhere, t = 0 and t = 1 included.
"""

import math

import torch
from torch import Tensor

from mfm_ref.checks import Time, check_count, check_finite, check_time, expand_time
from mfm_ref.rewards import GaussianReward


class GaussianMixture:
    """p₁ = Σ_k w_k N(μ_k, Σ_k), possibly a batch of such mixtures.

    Shapes: K components in D dimensions; a batched mixture (from `posterior`, or `marginal` at B times) has
    weights `(B, K)` and meets states `(B, D)` row by row.

    Args:
        weights: `(K,)`, positive, summing to one.
        means: `(K, D)`.
        covs: `(K, D, D)`, symmetric positive definite.

    Raises:
        ValueError: shapes that do not fit, entries that are not finite, weights that are not positive or do
            not sum to one, covariances that are not symmetric positive definite.
    """

    log_weights: Tensor  # (…, K)
    means: Tensor  # (…, K, D)
    basis: Tensor  # (…, K, D, D), eigenvectors in columns
    eigenvalues: Tensor  # (…, K, D)

    def __init__(self, weights: Tensor, means: Tensor, covs: Tensor):
        if weights.ndim < 1 or means.ndim < 2:
            raise ValueError(
                f"weights must be (K,) and means (K, D), got {tuple(weights.shape)} and {tuple(means.shape)}"
            )
        shape, d = tuple(means.shape[:-1]), means.shape[-1]
        if weights.shape != shape or covs.shape != (*shape, d, d):
            raise ValueError(
                f"means {tuple(means.shape)} need weights {shape} and covs {(*shape, d, d)}, "
                f"got {tuple(weights.shape)} and {tuple(covs.shape)}"
            )
        for name, tensor in {"weights": weights, "means": means, "covs": covs}.items():
            check_finite(tensor, name)
        total = weights.sum(-1)
        if bool((weights <= 0).any()) or not torch.allclose(total, torch.ones_like(total), atol=1e-5):
            raise ValueError(
                f"weights must be positive and sum to one, got minimum {weights.min().item()} "
                f"and sums from {total.min().item()} to {total.max().item()}"
            )
        if not torch.allclose(covs, covs.mT, rtol=1e-4, atol=1e-6 * float(covs.abs().max())):
            raise ValueError("covs must be symmetric, got a matrix that differs from its transpose")
        eigenvalues, basis = torch.linalg.eigh(covs)
        if bool((eigenvalues <= 0).any()):
            raise ValueError(f"covs must be positive definite, got an eigenvalue of {eigenvalues.min().item()}")
        self.log_weights = (weights / total.unsqueeze(-1)).log()
        self.means, self.basis, self.eigenvalues = means, basis, eigenvalues

    @classmethod
    def _from_eigen(cls, log_weights: Tensor, means: Tensor, basis: Tensor, eigenvalues: Tensor) -> "GaussianMixture":
        """A mixture from its parts, unchecked: eigenvalues may be zero (a posterior at t = 1)."""
        mixture = cls.__new__(cls)
        mixture.log_weights, mixture.means = log_weights, means
        mixture.basis, mixture.eigenvalues = basis, eigenvalues
        return mixture

    # ---- plain properties ------------------------------------------------------------------------------

    @property
    def dim(self) -> int:
        """D."""
        return self.means.shape[-1]

    @property
    def weights(self) -> Tensor:
        """w_k, `(…, K)`."""
        return self.log_weights.exp()

    @property
    def covs(self) -> Tensor:
        """Σ_k, `(…, K, D, D)`."""
        return (self.basis * self.eigenvalues.unsqueeze(-2)) @ self.basis.mT

    @property
    def mean(self) -> Tensor:
        """E[x₁] = Σ w_k μ_k, `(…, D)`."""
        return (self.weights.unsqueeze(-1) * self.means).sum(-2)

    @property
    def cov(self) -> Tensor:
        """Cov[x₁] = Σ w_k (Σ_k + μ_k μ_kᵀ) − mean meanᵀ, `(…, D, D)`."""
        centred = self.means - self.mean.unsqueeze(-2)
        second = self.covs + centred.unsqueeze(-1) * centred.unsqueeze(-2)
        return (self.weights[..., None, None] * second).sum(-3)

    def to(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> "GaussianMixture":
        """The same mixture in another dtype or on another device."""
        parts = (self.log_weights, self.means, self.basis, self.eigenvalues)
        return self._from_eigen(*(part.to(dtype=dtype, device=device) for part in parts))

    # ---- sampling and density --------------------------------------------------------------------------

    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        """n independent draws: `(n, D)`, or `(n, B, D)` from a batched mixture."""
        check_count(n, "n")
        batch, k = self.log_weights.shape[:-1], self.log_weights.shape[-1]
        component = torch.multinomial(self.weights.reshape(-1, k), n, replacement=True, generator=generator)
        component = component.T.reshape(n, *batch, 1, 1).expand(n, *batch, 1, self.dim)
        noise = torch.randn(component.shape, generator=generator, dtype=self.means.dtype, device=self.means.device)
        spread = self._from_basis(self.eigenvalues.sqrt() * noise)  # (n, …, K, D)
        return (self.means + spread).gather(-2, component).squeeze(-2)

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x) of states `(…, D)`, natural logarithm.

        Raises:
            ValueError: states of another dimension or not finite, or a mixture without a density (t = 1).
        """
        self._check_state(x)
        if bool((self.eigenvalues <= 0).any()):
            raise ValueError("this mixture has no density: a covariance is singular, as in a posterior at t = 1")
        centred = self._to_basis(x.unsqueeze(-2) - self.means)  # (…, K, D)
        log_normal = -(centred**2 / self.eigenvalues + (2 * math.pi * self.eigenvalues).log()).sum(-1) / 2
        return torch.logsumexp(self.log_weights + log_normal, -1)

    # ---- along the interpolant -------------------------------------------------------------------------

    def marginal(self, t: Time) -> "GaussianMixture":
        """The law of I_t (E1): Σ w_k N(t μ_k, t² Σ_k + (1−t)² I). Times `(B,)` give a batched mixture."""
        check_time(t)
        t = torch.as_tensor(t, dtype=self.means.dtype, device=self.means.device)
        batch = self.log_weights.shape[:-1]
        if t.ndim > 1 or (t.ndim == 1 and batch and t.shape != batch):
            raise ValueError(f"time t must have shape () or ({batch[0] if batch else 'B'},), got {tuple(t.shape)}")
        t = t[..., None, None]
        log_weights = self.log_weights.expand(*t.shape[:-2], -1) if t.ndim > 2 else self.log_weights
        return self._from_eigen(log_weights, t * self.means, self.basis, t**2 * self.eigenvalues + (1 - t) ** 2)

    def posterior(self, t: Time, x: Tensor) -> "GaussianMixture":
        """E3: p_{1|t}(·|x), a mixture batched over B.

        Args:
            t: time `()` or `(B,)`, in [0, 1].
            x: noisy states `(B, D)`.

        Raises:
            ValueError: a time outside [0, 1], or states of another shape or not finite.
        """
        return self.posterior_from_tx(t, expand_time(t, x) * x)

    def posterior_from_tx(self, t: Time, tx: Tensor) -> "GaussianMixture":
        """E3 read from the product t·x, through which alone the posterior depends on x.

        Component k has mean μ_k + Σ_k S_k⁻¹ (t x − t² μ_k), covariance (1−t)² Σ_k S_k⁻¹ and weight
        ∝ w_k N(x; t μ_k, S_k), with S_k = t² Σ_k + (1−t)² I. The exponents are taken relative to a common
        isotropic Gaussian N(t mean, S₀), which cancels the 1/t² of x = (t x)/t:
        h²/t² (1/S₀ − 1/S) = h² (λ − λ₀)/(S₀ S), with h = t x − t² mean.
        """
        self._check_state(tx)
        t = expand_time(t, tx).unsqueeze(-1)  # (B, 1, 1)
        noise = (1 - t) ** 2
        reference = self.eigenvalues.mean((-2, -1), keepdim=True)  # λ₀, (…, 1, 1)
        mean = self.mean.unsqueeze(-2)  # (…, 1, D)
        mu = self._to_basis(self.means - mean)  # (…, K, D)
        h = self._to_basis((tx.unsqueeze(-2) - t**2 * mean).expand(*tx.shape[:-1], *self.means.shape[-2:]))
        lam = self.eigenvalues  # (…, K, D)
        var = _noised(lam, t)  # S_k
        exponent = h**2 * (lam - reference) / _noised(reference, t) / 2 + h * mu - t**2 * mu**2 / 2
        log_weights = torch.log_softmax(self.log_weights + (exponent / var - var.log() / 2).sum(-1), -1)
        means = self.means + self._from_basis(lam / var * (h - t**2 * mu))
        return self._from_eigen(log_weights, means, self.basis, noise * lam / var)

    def denoiser(self, t: Time, x: Tensor) -> Tensor:
        """D_t(x) = E[x₁ | I_t = x] (E2), `(B, D)`."""
        return self.posterior(t, x).mean

    def drift(self, t: Time, x: Tensor) -> Tensor:
        """b_t(x) = E[x₁ − x₀ | I_t = x] (E2), `(B, D)`, exact at both ends.

        b = Σ_k w̃_k [μ_k + (t Σ_k − (1−t) I) S_k⁻¹ (x − t μ_k)], with S_k and the posterior weights w̃ of E3.
        """
        weights, time, centred = self._responsibilities(t, x)
        slope = (time * self.eigenvalues - (1 - time)) / _noised(self.eigenvalues, time)
        return (weights * (self.means + self._from_basis(slope * centred))).sum(-2)

    def score(self, t: Time, x: Tensor) -> Tensor:
        """∇ log p_t(x) = −Σ_k w̃_k S_k⁻¹ (x − t μ_k) (E2), `(B, D)`, exact at both ends.

        Raises:
            ValueError: as `posterior`, or at t = 1 for a mixture without a density.
        """
        weights, time, centred = self._responsibilities(t, x)
        if bool(((time == 1) & (self.eigenvalues <= 0)).any()):
            raise ValueError("the score at t = 1 needs a density, but a covariance is singular")
        return -(weights * self._from_basis(centred / _noised(self.eigenvalues, time))).sum(-2)

    def _responsibilities(self, t: Time, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """w̃ `(B, K, 1)`, t `(B, 1, 1)` and Q_kᵀ(x − t μ_k) `(B, K, D)`."""
        weights = self.posterior(t, x).weights.unsqueeze(-1)
        t = expand_time(t, x).unsqueeze(-1)
        return weights, t, self._to_basis(x.unsqueeze(-2) - t * self.means)

    # ---- rewards ---------------------------------------------------------------------------------------

    def log_partition(self, reward: GaussianReward) -> Tensor:
        """log E[e^{r(x₁)}] under this mixture, shape of the batch."""
        return torch.logsumexp(self.log_weights + reward.log_partition(self.means, self.covs), -1)

    def value(self, reward: GaussianReward, t: Time, x: Tensor) -> Tensor:
        """E5: V_t(x) = log E[e^{r(x₁)} | I_t = x], `(B,)`, differentiable in x: its gradient is the pull of E7."""
        return self.posterior(t, x).log_partition(reward)

    def tilt(self, reward: GaussianReward) -> "GaussianMixture":
        """E4: p* ∝ p₁ e^r, again a mixture; its drift (E2) is the Doob drift (E7)."""
        log_weights = torch.log_softmax(self.log_weights + reward.log_partition(self.means, self.covs), -1)
        means, covs = reward.tilt(self.means, self.covs)
        eigenvalues, basis = torch.linalg.eigh(covs)  # of a nearly noise-free likelihood: zero up to rounding
        return self._from_eigen(log_weights, means, basis, eigenvalues.clamp(min=0))

    # ---- helpers ---------------------------------------------------------------------------------------

    def _check_state(self, x: Tensor) -> None:
        *batch, _, d = self.means.shape
        if x.ndim < 2 or x.shape[-1] != d or (batch and x.shape[-2] != batch[-1]):
            raise ValueError(f"states must have shape ({batch[-1] if batch else 'B'}, {d}), got {tuple(x.shape)}")
        check_finite(x, "the state")

    def _to_basis(self, v: Tensor) -> Tensor:
        """Q_kᵀ v_k: coordinates of `(…, K, D)` in each component's eigenvectors."""
        return torch.einsum("...kd,...kde->...ke", v, self.basis)

    def _from_basis(self, v: Tensor) -> Tensor:
        """Q_k v_k, the inverse of `_to_basis`."""
        return torch.einsum("...ke,...kde->...kd", v, self.basis)


def _noised(var: Tensor, t: Tensor) -> Tensor:
    """t² var + (1−t)²: the variance at time t. A point mass has none at t = 1; 1 stands in, to divide zeros."""
    noised = t**2 * var + (1 - t) ** 2
    return torch.where(noised > 0, noised, 1.0)
