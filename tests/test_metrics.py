"""Sliced W₂, MMD, Fréchet distance and its statistics: closed forms, brute force, and laws known to be equal or not."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import sqrtm
from scipy.optimize import linear_sum_assignment

from mfm_ref import FeatureStatistics, frechet_distance, frechet_gaussian, mmd, sliced_wasserstein
from mfm_ref.metrics import coverage, vendi_score
from tests.helpers import LIMIT, gaussian, z_scores
from tests.strategies import SEEDS, assert_close, randn, rng

# ---- sliced W₂ -----------------------------------------------------------------------------------------


@given(st.integers(1, 12), SEEDS)
def test_one_dimension_is_the_optimal_assignment(n, seed):
    """W₂ of two point sets by the Hungarian algorithm; every direction is ±1."""
    x, y = randn(n, 1, seed=seed), 2 * randn(n, 1, seed=seed + 1) + 0.5
    cost = ((x - y.T) ** 2).numpy()
    expected = np.sqrt(cost[linear_sum_assignment(cost)].mean())
    assert float(sliced_wasserstein(x, y, n_projections=3)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("dim", [1, 2, 5])
def test_a_shift_costs_its_square_over_the_dimension(dim):
    """E_θ (θ·shift)² = |shift|²/D over uniform directions; 1,000 single directions, z of 6e-7 each."""
    x, shift = randn(50, dim, seed=0), randn(dim, seed=1)
    one = torch.stack([sliced_wasserstein(x, x + shift, n_projections=1, generator=rng(k)) for k in range(1000)])
    expected = shift.square().sum() / dim
    if dim == 1:
        assert_close(one.square(), expected.expand(1000), 1e-12)
    else:
        assert abs(z_scores(one.square(), expected)) < LIMIT
        assert abs(z_scores(one.square(), expected * dim)) > LIMIT  # the mean square itself, not its share
        assert abs(z_scores(one, expected.sqrt())) > LIMIT  # the square root comes after the mean


def test_many_directions_are_averaged_before_the_root():
    """300 directions at once: within five standard errors of the closed form for shift and scale together.

    y = m + 2x sends quantiles to quantiles, so W₂² along θ is (θ·m)² + (θ·x)² on average: (|m|² + E|x|²)/D.
    """
    x = randn(500, 3, seed=0)
    x, m = x - x.mean(0), torch.tensor([1.0, 2.0, -0.5], dtype=torch.float64)
    squared = [sliced_wasserstein(x, m + 2 * x, n_projections=300, generator=rng(k)) ** 2 for k in range(20)]
    expected = (m.square().sum() + x.square().sum(1).mean()) / 3
    assert abs(z_scores(torch.stack(squared), expected)) < LIMIT
    assert squared[0] == pytest.approx(float(expected), rel=0.1)


def test_sets_not_pairs_are_compared():
    """Zero on a permutation of itself, symmetric, and homogeneous in the units of the data."""
    x, y = randn(40, 2, 3, seed=0), randn(40, 2, 3, seed=1)
    shuffled = x[torch.randperm(40, generator=rng(2))]
    assert sliced_wasserstein(x, shuffled, generator=rng(0)) < 1e-12
    forth, back = sliced_wasserstein(x, y, generator=rng(0)), sliced_wasserstein(y, x, generator=rng(0))
    assert_close(forth, back, 1e-12)
    assert forth > 0.1
    assert_close(sliced_wasserstein(3 * x, 3 * y, generator=rng(0)), 3 * forth, 1e-12)
    flat = sliced_wasserstein(x.flatten(1), y.flatten(1), generator=rng(0))
    assert_close(flat, forth, 1e-12)


def test_sliced_wasserstein_tells_a_wrong_law_from_the_floor():
    """Two sets of one Gaussian are closer than a set of it and one of its neighbour, in each of 20 trials."""
    p, q = gaussian(seed=0), gaussian(seed=0).marginal(0.9)
    for k in range(20):
        a, b, c = (law.sample(1_000, generator=rng(3 * k + i)) for i, law in enumerate((p, p, q)))
        assert sliced_wasserstein(a, b, generator=rng(k)) < sliced_wasserstein(a, c, generator=rng(k))


# ---- MMD -----------------------------------------------------------------------------------------------


@given(st.integers(2, 5), st.integers(2, 6), SEEDS)
def test_mmd_is_the_double_loop(n, m, seed):
    """Unbiased U-statistic of mean_h exp(−‖a − b‖²/2h²), pair by pair."""
    x, y, scales = randn(n, 3, seed=seed), randn(m, 3, seed=seed + 1), (0.5, 2.0)

    def k(a, b):
        return sum(math.exp(-float(((a - b) ** 2).sum()) / (2 * h**2)) for h in scales) / len(scales)

    within = [sum(k(a[i], a[j]) for i in range(len(a)) for j in range(len(a)) if i != j) for a in (x, y)]
    across = sum(k(a, b) for a in x for b in y)
    expected = within[0] / (n * (n - 1)) + within[1] / (m * (m - 1)) - 2 * across / (n * m)
    assert float(mmd(x, y, bandwidths=scales)) == pytest.approx(expected, abs=1e-12)
    assert_close(mmd(y, x, bandwidths=scales), mmd(x, y, bandwidths=scales), 1e-12)


def test_mmd_is_unbiased_on_equal_laws_and_detects_unequal_ones():
    """Mean over 400 small sets: zero within five standard errors (6e-7), negative about half the time; a law
    shifted by a third of a deviation is seen. With the diagonal counted, the biased estimate fails."""
    p = gaussian()

    def estimates(shift):
        sets = [p.sample(40, generator=rng(k)) for k in range(800)]
        return torch.stack([mmd(a, b + shift) for a, b in zip(sets[::2], sets[1::2], strict=True)])

    equal = estimates(0.0)
    assert abs(z_scores(equal, 0.0)) < LIMIT
    assert 0.2 < (equal < 0).double().mean() < 0.9
    assert z_scores(estimates(0.2), 0.0) > LIMIT
    assert z_scores(equal + 2 / 40 * (1 - 0.5), 0.0) > LIMIT  # the diagonal's share, (1 − E k)/n for each set


def test_mmd_of_two_gaussians_is_the_closed_form():
    """E k(a, b) of N(0, 1) and N(m, 1) at scale h is √(h²/(h²+2)) exp(−m²/2(h²+2)); 200 sets of 60."""
    m, h = 1.0, 0.7
    scale = math.sqrt(h**2 / (h**2 + 2))
    expected = 2 * scale * (1 - math.exp(-(m**2) / (2 * (h**2 + 2))))
    sets = [(randn(60, 1, seed=2 * k), m + randn(60, 1, seed=2 * k + 1)) for k in range(200)]
    assert abs(z_scores(torch.stack([mmd(a, b, bandwidths=(h,)) for a, b in sets]), expected)) < LIMIT
    assert abs(z_scores(torch.stack([mmd(a, b, bandwidths=(3 * h,)) for a, b in sets]), expected)) > LIMIT


# ---- Fréchet distance ----------------------------------------------------------------------------------


def with_moments(n, mean, root, seed):
    """n vectors whose sample mean is `mean` and whose sample covariance is root rootᵀ, to rounding."""
    x = randn(n, len(mean), seed=seed)
    white = torch.linalg.qr(x - x.mean(0)).Q * (n - 1) ** 0.5
    return mean + white @ root.T


@given(st.integers(1, 5), st.integers(0, 20), SEEDS)
def test_frechet_distance_of_commuting_covariances_is_in_closed_form(dim, more, seed):
    """Common axes: |μ − ν|² + Σ (σ_i − τ_i)², for sets of different size; some deviations are 0."""
    basis = torch.linalg.qr(randn(dim, dim, seed=seed)).Q
    means, stds = randn(2, dim, seed=seed + 1), randn(2, dim, seed=seed + 2).clamp_min(0)
    x, y = (with_moments(dim + 2 + k * more, means[k], basis * stds[k] @ basis.T, seed=seed + 3 + k) for k in range(2))
    expected = (means[0] - means[1]).square().sum() + (stds[0] - stds[1]).square().sum()
    assert_close(frechet_distance(x, y), expected, 1e-9)


@given(st.integers(2, 6), SEEDS)
def test_frechet_distance_is_that_of_scipys_matrix_root(dim, seed):
    """‖μ − ν‖² + tr(A + B − 2 (AB)^½) by NumPy and SciPy, for covariances that do not commute."""
    x = randn(30, dim, seed=seed) @ randn(dim, dim, seed=seed + 1)
    y = randn(20, dim, seed=seed + 2) @ randn(dim, dim, seed=seed + 3) + 1
    a, b = (np.cov(samples.numpy(), rowvar=False) for samples in (x, y))
    apart = ((x.mean(0) - y.mean(0)) ** 2).sum().item()
    expected = apart + np.trace(a) + np.trace(b) - 2 * np.trace(sqrtm(a @ b)).real
    assert float(frechet_distance(x, y)) == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert_close(frechet_distance(y, x), frechet_distance(x, y), 1e-9, scale=1 + abs(expected))


@given(st.integers(2, 8), st.integers(2, 8), SEEDS)
def test_frechet_distance_needs_no_full_rank(n, m, seed):
    """Zero for equal sets, |c|² for a shift, and unchanged by a rotation into 12 dimensions; n < D, too."""
    x, y, shift = randn(n, 5, seed=seed), randn(m, 5, seed=seed + 1), randn(5, seed=seed + 2)
    shuffled = x[torch.randperm(n, generator=rng(seed))]
    assert_close(frechet_distance(x, shuffled), torch.zeros((), dtype=torch.float64), 1e-12)
    assert_close(frechet_distance(x, shuffled + shift), shift.square().sum(), 1e-11)
    distance = frechet_distance(x, y)
    assert_close(frechet_distance(x + shift, y + shift), distance, 1e-11)
    turned = torch.linalg.qr(randn(12, 12, seed=seed + 3)).Q[:5]
    assert_close(frechet_distance(x @ turned, y @ turned), distance, 1e-11)
    assert_close(frechet_distance((x @ turned).view(n, 3, 4), (y @ turned).view(m, 3, 4)), distance, 1e-11)
    assert_close(frechet_distance(3 * x, 3 * y), 9 * distance, 1e-10)


def test_frechet_distance_in_float32_is_made_in_double_precision():
    """Far from the origin, where means and squares in single precision would have no digit left."""
    x, y = 1000 + randn(200, 4, seed=0).float(), 1001 + randn(200, 4, seed=1).float()
    assert frechet_distance(x, y).dtype == torch.float32
    assert_close(frechet_distance(x, y), frechet_distance(x.double(), y.double()).float(), 1e-6)
    assert float(frechet_distance(x, y)) == pytest.approx(4, rel=0.2)


def test_frechet_distance_refuses_single_samples():
    with pytest.raises(ValueError, match="at least two samples of each set, got 4 and 1"):
        frechet_distance(torch.zeros(4, 2), torch.zeros(1, 2))


# ---- Fréchet distance of moments -----------------------------------------------------------------------


def random_cov(dim, rank, seed):
    """A covariance of that rank, with eigenvalues of all sizes from 1e-3 to 10 or so."""
    root = randn(dim, rank, seed=seed) * 10 ** (
        2 * torch.rand(rank, generator=rng(seed + 1), dtype=torch.float64) - 1.5
    )
    return root @ root.T


@given(st.integers(1, 6), SEEDS)
def test_frechet_gaussian_of_common_axes_is_in_closed_form(dim, seed):
    """|μ − ν|² + Σ (σ_i − τ_i)²: diagonal covariances, then turned together; some deviations are 0. In one dimension
    this is (μ − ν)² + (σ − τ)². Squares in the place of the deviations are another number."""
    basis = torch.linalg.qr(randn(dim, dim, seed=seed)).Q
    means, stds = randn(2, dim, seed=seed + 1), randn(2, dim, seed=seed + 2).clamp_min(0)
    expected = (means[0] - means[1]).square().sum() + (stds[0] - stds[1]).square().sum()
    for turn in (torch.eye(dim, dtype=torch.float64), basis):
        a, b = (turn * std**2 @ turn.T for std in stds)
        assert_close(frechet_gaussian(means[0], a, means[1], b), expected, 1e-9)


@given(st.integers(2, 6), SEEDS)
def test_frechet_gaussian_is_that_of_scipys_matrix_root(dim, seed):
    """tr (A^½ B A^½)^½ by SciPy's roots, for covariances that do not commute, and tr A^½ B^½, which is less."""
    a, b = random_cov(dim, dim + 2, seed), random_cov(dim, dim + 2, seed + 9)
    mean = randn(2, dim, seed=seed + 20)
    root = sqrtm(a.numpy())
    trace = np.trace(sqrtm(root @ b.numpy() @ root)).real
    expected = (mean[0] - mean[1]).square().sum().item() + float(a.trace() + b.trace()) - 2 * trace
    found = frechet_gaussian(mean[0], a, mean[1], b)
    size = float(a.trace() + b.trace())
    assert float(found) == pytest.approx(expected, abs=1e-7 * size)  # a root of rounding, in SciPy's
    assert_close(frechet_gaussian(mean[1], b, mean[0], a), found, 1e-12, size)
    commuting = np.trace(root @ sqrtm(b.numpy())).real
    assert commuting < trace + 1e-7 * size


def test_roots_one_by_one_are_another_distance():
    """tr A^½ B^½ in the place of tr (A^½ B A^½)^½, which agrees where the axes are common."""
    a, b = random_cov(3, 5, seed=1), random_cov(3, 5, seed=2)
    root = sqrtm(a.numpy())
    trace, wrong = np.trace(sqrtm(root @ b.numpy() @ root)).real, np.trace(root @ sqrtm(b.numpy())).real
    found = frechet_gaussian(torch.zeros(3), a, torch.zeros(3), b)
    assert float(a.trace() + b.trace() - found) / 2 == pytest.approx(trace, rel=1e-7)
    assert wrong < 0.98 * trace


@given(st.integers(2, 9), st.integers(2, 9), SEEDS)
def test_frechet_gaussian_agrees_with_the_distance_of_the_samples(n, m, seed):
    """At any rank, that of QR decompositions of the samples: 5 coordinates, n and m from 2 to 9, to 1e-12."""
    x, y = 3 * randn(n, 5, seed=seed), randn(m, 5, seed=seed + 1) * torch.logspace(0, -4, 5) + 1
    moments = [moment for samples in (x, y) for moment in (samples.mean(0), samples.T.cov())]
    distance = frechet_distance(x, y)
    assert_close(frechet_gaussian(*moments), distance, 1e-12, 1 + distance)
    own = frechet_gaussian(*moments[:2], *moments[:2])
    assert_close(own, torch.zeros((), dtype=torch.float64), 1e-12, 1 + distance)


def test_frechet_gaussian_needs_no_full_rank():
    """300 coordinates and covariances of rank 20 and 300, where roots of rounding would add up to 1e-6; also points."""
    x, y = randn(21, 300, seed=0), randn(400, 300, seed=1)
    distance = frechet_gaussian(x.mean(0), x.T.cov(), y.mean(0), y.T.cov())
    assert_close(distance, frechet_distance(x, y), 1e-12, float(distance))
    point, zero = torch.ones(300), torch.zeros(300, 300)
    assert_close(frechet_gaussian(point, zero, 3 * point, zero), torch.tensor(1200.0).double(), 1e-9)
    cov = y.T.cov()
    assert_close(frechet_gaussian(point, zero, point, cov), cov.trace(), 1e-9)


def test_frechet_gaussian_in_float32_is_near():
    """Moments rounded to single precision, where a covariance of low rank has negative eigenvalues."""
    x, y = randn(10, 40, seed=0), randn(60, 40, seed=1)
    moments = [moment.float() for samples in (x, y) for moment in (samples.mean(0), samples.T.cov())]
    assert float(torch.linalg.eigvalsh(moments[1].double())[0]) < 0
    distance = frechet_gaussian(*moments)
    assert distance.dtype == torch.float64
    assert float(distance) == pytest.approx(float(frechet_distance(x, y)), rel=1e-3)


EYE = torch.eye(3)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"mean_a": torch.zeros(2)}, r"with one F, got mean_a \(2,\), cov_a \(3, 3\)"),
        ({"mean_b": torch.zeros(2)}, r"with one F, got mean_b \(2,\), cov_b \(3, 3\)"),
        ({"cov_b": torch.eye(4)}, r"with one F, got mean_b \(3,\), cov_b \(4, 4\)"),
        ({"cov_a": torch.ones(3)}, r"with one F, got mean_a \(3,\), cov_a \(3,\)"),
        ({"mean_a": torch.zeros(())}, r"with one F, got mean_a \(\)"),
        ({"mean_b": torch.full((3,), math.nan)}, "mean_b must be finite, got 3"),
        ({"cov_a": math.inf * torch.ones(3, 3)}, "cov_a must be finite, got 9"),
        ({"cov_b": EYE + torch.tensor([[0, 1e-3, 0], [0, 0, 0], [0, 0, 0]])}, "cov_b must be symmetric, got .* 0.001"),
        ({"cov_a": EYE - 1.5 * torch.ones(3, 3) / 3}, "cov_a must have no negative eigenvalue, got -0.5"),
    ],
)
def test_frechet_gaussian_refuses(change, match):
    moments = {"mean_a": torch.zeros(3), "cov_a": EYE, "mean_b": torch.zeros(3), "cov_b": EYE} | change
    with pytest.raises(ValueError, match=match):
        frechet_gaussian(**moments)


# ---- streaming statistics ------------------------------------------------------------------------------


def statistics_of(*batches):
    found = FeatureStatistics()
    for batch in batches:
        found.update(batch)
    return found


@given(st.lists(st.integers(1, 6), min_size=1, max_size=6), st.integers(1, 5), SEEDS, st.data())
def test_statistics_are_numpys_however_the_batches_are_cut(sizes, dim, seed, data):
    """Streamed in order; and each batch apart, merged in another order, with empty ones among them."""
    n = max(2, sum(sizes))
    sizes = [*sizes[:-1], sizes[-1] + n - sum(sizes)]
    x = 3 + randn(n, dim, seed=seed) @ randn(dim, dim, seed=seed + 1)
    batches = x.split(sizes)
    merged = FeatureStatistics()
    for k in data.draw(st.permutations(range(len(batches)))):
        merged.merge(statistics_of(batches[k]))
        merged.merge(FeatureStatistics())
    mean, cov = x.numpy().mean(0), np.cov(x.numpy(), rowvar=False).reshape(dim, dim)
    for found in (statistics_of(*batches), merged):
        assert found.count == n
        assert_close(found.mean, torch.from_numpy(mean), 1e-12, 1 + np.abs(mean).max())
        assert_close(found.cov, torch.from_numpy(cov), 1e-12, 1 + np.abs(cov).max())
        assert torch.equal(found.cov, found.cov.mT)


def test_statistics_far_from_the_origin_keep_their_digits():
    """Unit covariance at 1e7: to 1e-6 in batches of one or of 64, where E xxᵀ − μμᵀ keeps not one digit."""
    x = 1e7 + randn(640, 3, seed=0)
    expected = torch.from_numpy(np.cov(x.numpy(), rowvar=False))
    for size in (1, 64):
        assert_close(statistics_of(*x.split(size)).cov, expected, 1e-6)
    squares = x.T @ x / len(x) - x.mean(0).outer(x.mean(0))
    assert (squares * len(x) / (len(x) - 1) - expected).abs().max() > 1e-3


def test_statistics_of_single_precision_are_made_in_double():
    x = randn(50, 4, seed=0).float()
    found = statistics_of(*x.split(7))
    assert found.mean.dtype == found.cov.dtype == torch.float64
    assert_close(found.cov, x.double().T.cov(), 1e-12)
    assert_close(found.mean, x.double().mean(0), 1e-12)


def test_the_distance_of_statistics_is_that_of_the_samples():
    x, y = randn(40, 6, seed=0), 2 * randn(50, 6, seed=1)
    a, b = (statistics_of(*samples.split(8)) for samples in (x, y))
    assert_close(frechet_gaussian(a.mean, a.cov, b.mean, b.cov), frechet_distance(x, y), 1e-11)


def test_a_merge_leaves_the_other_as_it_is():
    first, second = statistics_of(randn(5, 2, seed=0)), statistics_of(randn(5, 2, seed=1))
    mean, cov, joined = second.mean.clone(), second.cov.clone(), FeatureStatistics()
    joined.merge(second)
    joined.merge(first)
    joined.update(randn(3, 2, seed=2))
    assert torch.equal(second.mean, mean)
    assert torch.equal(second.cov, cov)
    assert (joined.count, second.count) == (13, 5)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda found: found.update(torch.ones(3)), r"features must be \(n, F\) with n >= 1, got \(3,\)"),
        (lambda found: found.update(torch.ones(0, 2)), r"features must be \(n, F\) with n >= 1, got \(0, 2\)"),
        (lambda found: found.update(torch.full((1, 2), math.nan)), "the features must be finite"),
        (lambda found: found.update(torch.ones(3, 1)), "features must have the same F, got 1 after 2"),
        (lambda found: found.merge(statistics_of(torch.ones(3, 4))), "features must have the same F, got 4 after 2"),
        (lambda found: found.cov, "at least two feature vectors, got 1"),
        (lambda found: FeatureStatistics().cov, "at least two feature vectors, got 0"),
        (lambda found: FeatureStatistics().mean, "at least one feature vector, got 0"),
    ],
)
def test_statistics_refuse(call, match):
    """And what was refused has changed nothing."""
    found = statistics_of(torch.tensor([[1.0, 2.0]]))
    with pytest.raises(ValueError, match=match):
        call(found)
    assert found.count == 1
    assert found.mean.tolist() == [1, 2]


# ---- refusals and precision ----------------------------------------------------------------------------


@pytest.mark.parametrize("metric", [sliced_wasserstein, mmd, frechet_distance])
@pytest.mark.parametrize(
    ("x", "y", "match"),
    [
        (torch.zeros(4, 2), torch.zeros(4, 3), "equal D"),
        (torch.zeros(4), torch.zeros(4), r"must be \(n, \*D\)"),
        (torch.zeros(4, 2), torch.zeros(4, 1), "equal D"),
        (torch.full((4, 2), math.nan), torch.zeros(4, 2), "the first set must be finite"),
        (torch.zeros(4, 2), torch.full((4, 2), math.inf), "the second set must be finite"),
    ],
)
def test_metrics_refuse(metric, x, y, match):
    with pytest.raises(ValueError, match=match):
        metric(x, y)


def test_sliced_wasserstein_refuses_unequal_sizes_and_counts():
    with pytest.raises(ValueError, match="same number of samples, at least one, got 4 and 5"):
        sliced_wasserstein(torch.zeros(4, 2), torch.zeros(5, 2))
    with pytest.raises(ValueError, match="n_projections must be an integer >= 1"):
        sliced_wasserstein(torch.zeros(4, 2), torch.zeros(4, 2), n_projections=0)
    with pytest.raises(ValueError, match="at least one, got 0 and 0"):
        sliced_wasserstein(torch.zeros(0, 2), torch.zeros(0, 2))


@pytest.mark.parametrize("bandwidths", [(), (1.0, 0.0), (-1.0,), (math.nan,), (1.0, math.nan)])
def test_mmd_refuses_bandwidths_and_single_samples(bandwidths):
    with pytest.raises(ValueError, match="bandwidths must be positive"):
        mmd(torch.zeros(4, 2), torch.zeros(4, 2), bandwidths=bandwidths)
    with pytest.raises(ValueError, match="at least two samples of each set, got 4 and 1"):
        mmd(torch.zeros(4, 2), torch.zeros(1, 2))


@given(SEEDS)
def test_float32_is_within_1e_4(seed):
    x, y = randn(30, 2, seed=seed), randn(30, 2, seed=seed + 1) + 0.5
    assert_close(mmd(x.float(), y.float()).double(), mmd(x, y), 1e-4)
    # One dimension: the direction is ±1 in either precision, so the draw does not matter.
    ones = x[:, :1], y[:, :1]
    assert_close(sliced_wasserstein(*(a.float() for a in ones)).double(), sliced_wasserstein(*ones), 1e-4)


# ---- Vendi score and coverage --------------------------------------------------------------------------


def test_vendi_score_counts_groups_that_are_far_apart():
    """k equal groups far apart have the score k; unequal ones e^H of their shares; one point n times has 1."""
    far = 100.0 * torch.arange(4, dtype=torch.float64).unsqueeze(1)
    assert float(vendi_score(far.repeat(5, 1), bandwidth=1.0)) == pytest.approx(4, rel=1e-9)
    shares = np.array([8, 4, 2, 2]) / 16
    unequal = torch.repeat_interleave(far, torch.tensor([8, 4, 2, 2]), 0)
    assert float(vendi_score(unequal, bandwidth=1.0)) == pytest.approx(
        np.exp(-(shares * np.log(shares)).sum()), rel=1e-9
    )
    assert float(vendi_score(torch.ones(7, 2, 3), bandwidth=1.0)) == pytest.approx(1, rel=1e-5)


def test_vendi_score_of_two_points_is_in_closed_form():
    """K/2 has the eigenvalues (1 ± k)/2, with k = exp(−d²/(2h²))."""
    k = math.exp(-(1.5**2) / (2 * 0.7**2))
    eigenvalues = np.array([(1 + k) / 2, (1 - k) / 2])
    x = torch.tensor([[0.0], [1.5]], dtype=torch.float64)
    expected = np.exp(-(eigenvalues * np.log(eigenvalues)).sum())
    assert float(vendi_score(x, bandwidth=0.7)) == pytest.approx(expected, rel=1e-9)


def test_coverage_of_one_law_is_near_its_expectation_and_falls_with_a_lost_half():
    x, reference = (gaussian().sample(2000, generator=rng(k)) for k in (1, 2))
    assert float(coverage(x, reference)) == pytest.approx(1 - 2**-5, abs=0.02)
    assert float(coverage(x, reference, k=1)) == pytest.approx(0.5, abs=0.05)
    half = x[x[:, 0] > x[:, 0].median()]
    assert float(coverage(half, reference)) < 0.75
    assert float(coverage(x + 100, reference)) == 0
    assert float(coverage(reference, reference)) == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: vendi_score(torch.ones(3, 1), bandwidth=0.0), "bandwidth"),
        (lambda: vendi_score(torch.ones(0, 1), bandwidth=1.0), "n >= 1"),
        (lambda: vendi_score(torch.full((2, 1), math.nan), bandwidth=1.0), "finite"),
        (lambda: coverage(torch.ones(3, 1), torch.ones(5, 1)), "more than k = 5"),
        (lambda: coverage(torch.ones(3, 1), torch.ones(9, 2)), "equal D"),
        (lambda: coverage(torch.ones(3, 1), torch.ones(9, 1), k=0), "k must"),
    ],
)
def test_diversity_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()
