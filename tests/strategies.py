"""What hypothesis draws for every test file: mixtures, times, contexts and rewards, in float64.

Sizes, times and one seed are drawn by hypothesis, so that a failure shrinks to few dimensions, few components
and plain times; the tensors follow from the seed.
"""

from typing import NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from mfm_ref import GaussianLikelihood, GaussianMixture, LinearReward

ENDS = st.sampled_from([0.0, 1.0])
# Closer to an end than 0.01 an identity that divides by t or 1−t loses digits by division alone; the tests that
# claim accuracy there draw their own times.
INTERIOR = st.floats(0.01, 0.99)
TIMES = ENDS | INTERIOR  # about half the draws are ends
SEEDS = st.integers(0, 2**32 - 1)


def rng(seed: int) -> torch.Generator:
    """A fresh generator."""
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int) -> Tensor:
    """Standard normal numbers in float64."""
    return torch.randn(shape, generator=rng(seed), dtype=torch.float64)


def random_mixture(dim: int, n_components: int, seed: int) -> GaussianMixture:
    """Full covariances with eigenvalues in [0.05, 2], means of size 2, weights of at least 1/(11 K)."""
    g = rng(seed)
    weights = 0.1 + torch.rand(n_components, generator=g, dtype=torch.float64)
    means = 2 * torch.randn(n_components, dim, generator=g, dtype=torch.float64)
    basis = torch.linalg.qr(torch.randn(n_components, dim, dim, generator=g, dtype=torch.float64)).Q
    eigenvalues = 0.05 * 40 ** torch.rand(n_components, dim, generator=g, dtype=torch.float64)
    covs = (basis * eigenvalues.unsqueeze(-2)) @ basis.mT
    return GaussianMixture(weights / weights.sum(), means, (covs + covs.mT) / 2)


class Case(NamedTuple):
    """A mixture, a context (t, x) and an auxiliary state z at internal time s, with s <= u.

    x and z are two noisy views of the same clean samples x1, as E9 has it; B is 1, D, K or 7.
    """

    p1: GaussianMixture
    s: Tensor  # () or (B,), as are u and t
    u: Tensor
    z: Tensor  # (B, D)
    t: Tensor
    x: Tensor  # (B, D)
    x1: Tensor  # (B, D)
    seed: int  # for whatever else a test draws

    @property
    def size(self) -> int:
        """B."""
        return self.x.shape[0]


@st.composite
def mixtures(
    draw: st.DrawFn, min_dim: int = 1, max_dim: int = 6, min_components: int = 1, max_components: int = 5
) -> GaussianMixture:
    """Mixtures of up to 5 components in up to 6 dimensions."""
    dim = draw(st.integers(min_dim, max_dim))
    n_components = draw(st.integers(min_components, max_components))
    return random_mixture(dim, n_components, draw(SEEDS))


@st.composite
def batch_times(draw: st.DrawFn, size: int, times: st.SearchStrategy[float] = TIMES) -> Tensor:
    """A time `()` for the whole batch, or one for each row `(B,)`."""
    if draw(st.booleans()):
        return torch.tensor(draw(times), dtype=torch.float64)
    return torch.tensor(draw(st.lists(times, min_size=size, max_size=size)), dtype=torch.float64)


@st.composite
def cases(
    draw: st.DrawFn,
    p1: st.SearchStrategy[GaussianMixture] | None = None,
    t: st.SearchStrategy[float] = TIMES,
    s: st.SearchStrategy[float] = TIMES,
    max_size: int = 7,
) -> Case:
    """A mixture, a context and an auxiliary state; `t` and `s` are the laws of the times (u has that of s)."""
    mixture = draw(mixtures() if p1 is None else p1)
    sizes = {1, mixture.dim, len(mixture.means), 7}
    size = draw(st.sampled_from(sorted(n for n in sizes if n <= max_size)))
    context = draw(batch_times(size, t))
    first, second = draw(batch_times(size, s)), draw(batch_times(size, s))
    before, after = torch.minimum(first, second), torch.maximum(first, second)
    seed = draw(SEEDS)
    g = rng(seed)
    x1 = mixture.sample(size, generator=g)
    x0, eps = torch.randn((2, *x1.shape), generator=g, dtype=x1.dtype)
    x = (1 - column(context)) * x0 + column(context) * x1
    z = (1 - column(before)) * eps + column(before) * x1
    return Case(mixture, before, after, z, context, x, x1, seed)


@st.composite
def rewards(draw: st.DrawFn, dim: int) -> LinearReward | GaussianLikelihood:
    """A linear reward, or a Gaussian likelihood of one measurement (a vector) or of several (a matrix)."""
    kind = draw(st.sampled_from(["linear", "vector", "matrix"]))
    seed = draw(SEEDS)
    if kind == "linear":
        return LinearReward(randn(dim, seed=seed))
    sigma = draw(st.floats(0.3, 2.0))
    if kind == "vector":
        return GaussianLikelihood(randn(dim, seed=seed), float(randn(1, seed=seed + 1)), sigma)
    rows = draw(st.integers(1, 3))
    return GaussianLikelihood(randn(rows, dim, seed=seed), randn(rows, seed=seed + 1), sigma)


def column(t: Tensor) -> Tensor:
    """A time `()` or `(B,)` as something that multiplies a state `(B, D)`."""
    return t if t.ndim == 0 else t.unsqueeze(-1)


def assert_close(actual: Tensor, expected: Tensor, tol: float, scale: Tensor | float = 1.0) -> None:
    """|actual − expected| <= tol × scale everywhere; other shapes, dtypes and NaN are refused."""
    assert actual.shape == expected.shape, f"shapes {tuple(actual.shape)} and {tuple(expected.shape)} differ"
    assert actual.dtype == expected.dtype, f"dtypes {actual.dtype} and {expected.dtype} differ"
    assert torch.isfinite(actual).all(), f"not finite: {actual}"
    error = (actual - expected).abs() / scale
    assert (error <= tol).all(), f"error {error.max().item():.2e} of the scale, tolerance {tol:.0e}"


def row_scale(*tensors: Tensor) -> Tensor:
    """1 + the largest absolute entry of each row: `(B, 1)`, the size that rounding errors are measured in."""
    return 1 + torch.cat([tensor.detach().abs() for tensor in tensors], -1).amax(-1, keepdim=True)
