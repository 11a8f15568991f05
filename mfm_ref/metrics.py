"""Distances between two sets of samples, and how diverse one set is."""

import torch
from torch import Tensor

from mfm_ref.checks import check_count, check_finite


def sliced_wasserstein(
    x: Tensor, y: Tensor, *, n_projections: int = 128, generator: torch.Generator | None = None
) -> Tensor:
    """Sliced W₂: the root mean square, over random directions, of the one-dimensional W₂ of the projections.

    Args:
        x, y: samples of equal number and shape, `(n, *D)`; states are flattened.
        n_projections: number of directions, >= 1.
        generator: source of the directions.

    Returns:
        the distance, `()`, in the units of the data.

    Raises:
        ValueError: sets that are empty or of different size or shape, or entries that are not finite.
    """
    x, y = _two_sets(x, y)
    check_count(n_projections, "n_projections")
    if len(x) != len(y) or len(x) < 1:
        raise ValueError(f"both sets must have the same number of samples, at least one, got {len(x)} and {len(y)}")
    shape = (x.shape[1], n_projections)
    directions = torch.randn(shape, generator=generator, dtype=x.dtype, device=x.device)
    directions = directions / directions.norm(dim=0)
    # In one dimension the optimal coupling sorts both sets.
    apart = (x @ directions).sort(0).values - (y @ directions).sort(0).values
    return apart.square().mean().sqrt()


def mmd(x: Tensor, y: Tensor, *, bandwidths: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0, 4.0)) -> Tensor:
    """Unbiased squared maximum mean discrepancy, k(x, y) = mean over h of exp(−‖x − y‖²/(2h²)).

    Args:
        x, y: samples `(n, *D)` and `(m, *D)`, n and m >= 2.
        bandwidths: the scales h, positive, in the units of the data.

    Returns:
        the estimate, `()`; unbiased, so that it may be negative for equal laws.

    Raises:
        ValueError: states of different shape, fewer than two samples, a bandwidth <= 0, entries not finite.
    """
    x, y = _two_sets(x, y)
    if min(len(x), len(y)) < 2:
        raise ValueError(f"mmd needs at least two samples of each set, got {len(x)} and {len(y)}")
    if not bandwidths or not all(h > 0 for h in bandwidths):
        raise ValueError(f"bandwidths must be positive, got {bandwidths}")

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        squared = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist").square()
        return torch.stack([(-squared / (2 * h**2)).exp() for h in bandwidths]).mean(0)

    def off_diagonal(k: Tensor) -> Tensor:
        return (k.sum() - k.diagonal().sum()) / (len(k) * (len(k) - 1))

    return off_diagonal(kernel(x, x)) + off_diagonal(kernel(y, y)) - 2 * kernel(x, y).mean()


def frechet_distance(x: Tensor, y: Tensor) -> Tensor:
    """Squared Fréchet (W₂) distance of the Gaussians N(μ, A), N(ν, B) that fit two sets of feature vectors.

    ‖μ − ν‖² + tr(A + B − 2 (A^½ B A^½)^½). With the R of the QR decompositions of the centred sets, A = RᵀR/(n−1), and
    the trace of the root is the sum of the singular values of R_x R_yᵀ: no root of a matrix, at any rank. Small sets
    are further apart than large ones of the same laws: distances compare for one n and one m.

    Args:
        x, y: features `(n, *F)` and `(m, *F)`, n and m >= 2.

    Returns:
        the distance, `()`, >= 0, in the squared units of the features; computed in double precision.

    Raises:
        ValueError: features of different shape, fewer than two samples, or entries that are not finite.
    """
    x, y = _two_sets(x, y)
    if min(len(x), len(y)) < 2:
        raise ValueError(f"frechet_distance needs at least two samples of each set, got {len(x)} and {len(y)}")
    means, roots = [], []
    for a in (x.double(), y.double()):
        means.append(a.mean(0))
        roots.append(torch.linalg.qr(a - means[-1], mode="r").R / (len(a) - 1) ** 0.5)  # (min(n, F), F)
    traces = sum(root.square().sum() for root in roots)
    overlap = torch.linalg.svdvals(roots[0] @ roots[1].mT).sum()
    distance = (means[0] - means[1]).square().sum() + traces - 2 * overlap
    return distance.clamp_min(0).to(x.dtype)


def frechet_gaussian(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> Tensor:
    """`frechet_distance` of two Gaussians given by their moments: ‖μ_a − μ_b‖² + tr(A + B − 2 (A^½ B A^½)^½).

    With A = R_a R_aᵀ and B = R_b R_bᵀ by their eigenvectors, the trace of the root, Σ √eig(A^½ B A^½), is the sum of
    the singular values of R_aᵀ R_b: no root of a small eigenvalue of a product, which would be one of rounding. With
    the moments of `FeatureStatistics` this is the FID.

    Args:
        mean_a, mean_b: `(F,)`.
        cov_a, cov_b: `(F, F)`, symmetric, of any rank. Eigenvalues within rounding of zero are zero.

    Returns:
        the distance, `()`, >= 0, in double precision.

    Raises:
        ValueError: shapes that do not fit, entries that are not finite, or a covariance that is not symmetric or has a
            negative eigenvalue (beyond 1e-4 of the largest, as those of single precision may have).
    """
    means, roots = [], []
    for name, mean, cov in (("a", mean_a, cov_a), ("b", mean_b, cov_b)):
        n = len(mean_a) if mean_a.ndim else 0
        if mean.shape != (n,) or cov.shape != (n, n) or n < 1:
            raise ValueError(
                f"means must be (F,) and covariances (F, F) with one F, got mean_{name} {tuple(mean.shape)}, "
                f"cov_{name} {tuple(cov.shape)}"
            )
        check_finite(mean, f"mean_{name}")
        check_finite(cov, f"cov_{name}")
        means.append(mean.double())
        roots.append(_root(cov.double(), f"cov_{name}"))
    overlap = torch.linalg.svdvals(roots[0].mT @ roots[1]).sum()
    traces = sum(root.square().sum() for root in roots)
    return ((means[0] - means[1]).square().sum() + traces - 2 * overlap).clamp_min(0)


def _root(cov: Tensor, name: str) -> Tensor:
    """R = Q Λ^½ with R Rᵀ = cov `(F, F)`. Raises ValueError for a matrix that is no covariance."""
    apart = float((cov - cov.mT).abs().max())
    if apart > 1e-5 * float(cov.abs().max()):
        raise ValueError(f"{name} must be symmetric, got entries that differ by {apart:.3g}")
    values, basis = torch.linalg.eigh((cov + cov.mT) / 2)
    largest = float(values.abs().max())
    if float(values[0]) < -1e-4 * largest:
        raise ValueError(f"{name} must have no negative eigenvalue, got {float(values[0]):.3g}")
    return basis * values.where(values > len(cov) * torch.finfo(cov.dtype).eps * largest, 0).sqrt()


class FeatureStatistics:
    """Mean and covariance of feature vectors that come in batches, in double precision and constant memory.

    Two sets a and b are joined by Chan's update, which subtracts no large squares: with δ = μ_b − μ_a,

        μ = μ_a + δ n_b/n,  S = S_a + S_b + δ δᵀ n_a n_b/n,  S = Σ (x − μ)(x − μ)ᵀ,  n = n_a + n_b.

    The order of the vectors, and how they are cut into batches, change the result by rounding alone.
    """

    def __init__(self) -> None:
        self.count = 0
        self._mean = self._scatter = torch.zeros((), dtype=torch.float64)

    @property
    def mean(self) -> Tensor:
        """μ `(F,)`. Raises ValueError where there are no features."""
        if self.count < 1:
            raise ValueError("a mean needs at least one feature vector, got 0")
        return self._mean

    @property
    def cov(self) -> Tensor:
        """The covariance S/(n−1) `(F, F)`, without bias. Raises ValueError for fewer than two vectors."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least two feature vectors, got {self.count}")
        return (self._scatter + self._scatter.mT) / (2 * (self.count - 1))  # a product is symmetric to rounding alone

    def update(self, features: Tensor) -> None:
        """Add a batch of features `(n, F)`, n >= 1.

        Raises:
            ValueError: another shape, an F other than before, or entries that are not finite.
        """
        if features.ndim != 2 or len(features) < 1:
            raise ValueError(f"features must be (n, F) with n >= 1, got {tuple(features.shape)}")
        check_finite(features, "the features")
        x = features.detach().double()
        centred = x - x.mean(0)
        self._join(len(x), x.mean(0), centred.mT @ centred)

    def merge(self, other: "FeatureStatistics") -> None:
        """Add the features that another one has seen, if any. Raises ValueError for those of another F."""
        if other.count:
            self._join(other.count, other._mean, other._scatter)

    def _join(self, n: int, mean: Tensor, scatter: Tensor) -> None:
        if not self.count:
            self._mean, self._scatter = torch.zeros_like(mean), torch.zeros_like(scatter)
        if mean.shape != self._mean.shape:
            raise ValueError(f"features must have the same F, got {len(mean)} after {len(self._mean)}")
        total = self.count + n
        apart = mean.to(self._mean) - self._mean
        between = apart.outer(apart) * (self.count * n / total)
        self._scatter = self._scatter + scatter.to(self._scatter) + between
        self._mean = self._mean + apart * (n / total)
        self.count = total


def vendi_score(x: Tensor, *, bandwidth: float) -> Tensor:
    """Vendi score: e^{H(λ)}, the effective number of different samples, from 1 (all equal) to n (all far apart).

    H is the entropy of the eigenvalues λ of K/n, with the kernel k(x, y) = exp(−‖x − y‖²/(2h²)).

    Args:
        x: samples `(n, *D)`, n >= 1; the cost is of order n³.
        bandwidth: the scale h, positive, in the units of the data. Scores compare for one h and one n.

    Returns:
        the score, `()`.

    Raises:
        ValueError: no samples, entries that are not finite, or a bandwidth <= 0.
    """
    if x.ndim < 2 or len(x) < 1:
        raise ValueError(f"samples must be (n, *D) with n >= 1, got {tuple(x.shape)}")
    if not bandwidth > 0:
        raise ValueError(f"bandwidth must be positive, got {bandwidth}")
    check_finite(x, "the samples")
    flat = x.flatten(1).double()
    squared = torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist").square()
    eigenvalues = torch.linalg.eigvalsh((-squared / (2 * bandwidth**2)).exp() / len(x)).clamp_min(0)
    return torch.special.entr(eigenvalues).sum().exp().to(x.dtype)


def coverage(x: Tensor, reference: Tensor, *, k: int = 5) -> Tensor:
    """The share of reference samples that have one of x nearer than their k-th neighbour in the reference, in [0, 1].

    Two sets of one law and one size have 1 − 2^−k in expectation, nearly.

    Args:
        x, reference: samples `(n, *D)` and `(m, *D)`, m > k.
        k: which neighbour, >= 1.

    Raises:
        ValueError: states of different shape, too few samples, or entries not finite.
    """
    check_count(k, "k")
    x, reference = _two_sets(x, reference)
    if len(x) < 1 or len(reference) <= k:
        raise ValueError(f"coverage needs samples, and more than k = {k} references, got {len(x)} and {len(reference)}")
    radius = torch.cdist(reference, reference, compute_mode="donot_use_mm_for_euclid_dist").kthvalue(k + 1).values
    nearest = torch.cdist(reference, x, compute_mode="donot_use_mm_for_euclid_dist").amin(1)
    return (nearest < radius).to(x.dtype).mean()


def _two_sets(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    if x.ndim < 2 or x.shape[1:] != y.shape[1:]:
        raise ValueError(f"both sets must be (n, *D) with equal D, got {tuple(x.shape)} and {tuple(y.shape)}")
    check_finite(x, "the first set")
    check_finite(y, "the second set")
    return x.flatten(1), y.flatten(1)
