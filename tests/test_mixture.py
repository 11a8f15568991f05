"""E2 to E5 and E7 on Gaussian mixtures: the exact oracle against autodiff, quadrature and SciPy."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from scipy.integrate import quad
from torch import Tensor

from mfm_ref import GaussianLikelihood, GaussianMixture, LinearReward, noise_scale
from tests.strategies import (
    ENDS,
    INTERIOR,
    SEEDS,
    TIMES,
    Case,
    assert_close,
    cases,
    column,
    mixtures,
    randn,
    random_mixture,
    rewards,
    rng,
    row_scale,
)

# Rounding is about 1e-16 of the largest term of a sum. Log-densities reach a few hundred, and dividing by 1−t >= 0.01
# or by a variance >= 0.05 costs a few digits more.
EXACT = 1e-9
QUADRATURE = 1e-9  # the relative error asked of scipy.integrate.quad is 1e-11, for each of a ratio's two integrals

BEFORE_ONE = st.just(0.0) | INTERIOR
AFTER_ZERO = st.just(1.0) | INTERIOR
LINES = mixtures(max_dim=1)


def gradient(f, x: Tensor) -> Tensor:
    """∇f, row by row, of a function (B, D) -> (B,)."""
    x = x.detach().requires_grad_()
    return torch.autograd.grad(f(x).sum(), x)[0]


def divergence(f, x: Tensor) -> Tensor:
    """div f `(B,)` of a function (B, D) -> (B, D) that does not couple rows."""
    units = torch.eye(x.shape[-1], dtype=x.dtype)
    return sum(torch.func.jvp(f, (x,), (unit.expand_as(x),))[1] @ unit for unit in units)


def log_normal(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """log N(x; mean, std² I), by torch.distributions."""
    return torch.distributions.Normal(mean, std).log_prob(x).sum(-1)


def integral(f, p1: GaussianMixture) -> float:
    """∫ f over the support of a one-dimensional mixture: 14 standard deviations, split at the components."""
    means, reach = p1.means.flatten(), 14 * p1.covs.max().sqrt()
    edges = [means.min() - reach, *means.sort().values, means.max() + reach]
    return sum(quad(f, float(a), float(b), epsabs=0, epsrel=1e-11, limit=200)[0] for a, b in pairwise(edges) if b > a)


def density(p: GaussianMixture):
    """x ↦ p(x) of a one-dimensional mixture as a function of floats, by NumPy."""
    weights, means = p.weights.numpy(), p.means.flatten().numpy()
    stds = p.covs.flatten().sqrt().numpy()
    return lambda x: float((weights * np.exp(-(((x - means) / stds) ** 2) / 2) / stds).sum() / math.sqrt(2 * math.pi))


# ---- the law itself ------------------------------------------------------------------------------------


@given(mixtures(), SEEDS)
def test_log_prob_is_scipys(p1, seed):
    x = 3 * randn(7, p1.dim, seed=seed)
    components = [
        stats.multivariate_normal(mean, cov).logpdf(x.numpy()).reshape(7)
        for mean, cov in zip(p1.means.numpy(), p1.covs.numpy(), strict=True)
    ]
    expected = torch.logsumexp(p1.weights.log() + torch.from_numpy(np.stack(components, -1)), -1)
    assert_close(p1.log_prob(x), expected, EXACT, 1 + expected.abs())


@given(st.integers(1, 6), st.integers(1, 5), SEEDS)
def test_a_mixture_returns_what_it_was_given(dim, n_components, seed):
    g = rng(seed)
    weights = torch.rand(n_components, generator=g, dtype=torch.float64) + 0.1
    means = randn(n_components, dim, seed=seed)
    root = randn(n_components, dim, dim, seed=seed + 1)
    covs = root @ root.mT + 0.1 * torch.eye(dim, dtype=torch.float64)
    p1 = GaussianMixture(weights / weights.sum(), means, covs)
    assert p1.dim == dim
    assert_close(p1.weights, weights / weights.sum(), 1e-14)
    assert_close(p1.means, means, 0.0)
    assert_close(p1.covs, covs, 1e-13, covs.abs().max())


@given(mixtures())
def test_mean_and_covariance_are_the_cumulants(p1):
    # The first two derivatives of log E[e^{a·x}] at a = 0.
    def cumulant(a: Tensor) -> Tensor:
        reward = LinearReward(torch.zeros(p1.dim))
        reward.a = a
        return p1.log_partition(reward)

    origin = torch.zeros(p1.dim, dtype=torch.float64)
    assert_close(torch.autograd.functional.jacobian(cumulant, origin), p1.mean, EXACT, 1 + p1.mean.abs().max())
    assert_close(torch.autograd.functional.hessian(cumulant, origin), p1.cov, EXACT, 1 + p1.cov.abs().max())


# ---- E1: marginals -------------------------------------------------------------------------------------


@given(cases(p1=LINES, t=BEFORE_ONE, max_size=1))
def test_marginal_by_quadrature(case: Case):
    t, x, p1 = float(case.t), float(case.x), density(case.p1)
    noise = 1 - t
    expected = integral(lambda x1: p1(x1) * stats.norm.pdf(x, t * x1, noise), case.p1)
    assert case.p1.marginal(t).log_prob(case.x).exp().item() == pytest.approx(expected, rel=QUADRATURE)


@given(cases(t=ENDS))
def test_marginals_at_the_ends_are_noise_and_data(case: Case):
    p1, t, x = case.p1, case.t, case.x
    noise = log_normal(x, torch.zeros_like(x), torch.ones_like(x))
    expected = torch.where(t == 1, p1.log_prob(x), noise)
    assert_close(p1.marginal(t).log_prob(x), expected, EXACT, 1 + expected.abs())


@given(cases())
def test_marginals_obey_the_continuity_equation(case: Case):
    # ∂_t log p + b·∇log p + div b = 0, which ties the drift to the whole path of marginals.
    p1, t, x = case.p1, case.t, case.x
    _, change = torch.func.jvp(lambda t: p1.marginal(t).log_prob(x), (t,), (torch.ones_like(t),))
    b, score = p1.drift(t, x), gradient(p1.marginal(t).log_prob, x)
    flow = (b * score).sum(-1) + divergence(lambda x: p1.drift(t, x), x)
    assert_close(change, -flow, EXACT, 1 + change.abs() + b.norm(dim=-1) * score.norm(dim=-1))


# ---- E3: posteriors ------------------------------------------------------------------------------------


@given(cases(p1=LINES, t=BEFORE_ONE, max_size=1))
def test_posterior_is_bayes_by_quadrature(case: Case):
    p1, t, x = density(case.p1), float(case.t), float(case.x)
    posterior = case.p1.posterior(t, case.x)
    mean, std = posterior.mean.item(), posterior.cov.sqrt().item()

    def joint(x1: float) -> float:
        return p1(x1) * stats.norm.pdf(x, t * x1, 1 - t)

    evidence = integral(joint, case.p1)
    first = integral(lambda x1: x1 * joint(x1), case.p1) / evidence
    second = integral(lambda x1: (x1 - first) ** 2 * joint(x1), case.p1) / evidence
    assert mean == pytest.approx(first, rel=QUADRATURE, abs=QUADRATURE)
    assert std == pytest.approx(second**0.5, rel=QUADRATURE)
    for x1 in (mean - std, mean + 2 * std):
        log_prob = posterior.log_prob(torch.full((1, 1), x1, dtype=torch.float64))
        assert log_prob.exp().item() == pytest.approx(joint(x1) / evidence, rel=QUADRATURE)


@given(cases(t=BEFORE_ONE))
def test_posterior_is_bayes_in_log_densities(case: Case):
    p1, t, x = case.p1, case.t, case.x
    for x1 in (case.x1, p1.posterior(t, x).sample(1, generator=rng(case.seed))[0]):
        likelihood = log_normal(x, column(t) * x1, column(1 - t))
        expected = p1.log_prob(x1) + likelihood - p1.marginal(t).log_prob(x)
        # The exponents grow as (x − t x₁)²/(1−t)², and so does their rounding.
        scale = row_scale(x, x1).squeeze(-1) / (1 - t) ** 2
        assert_close(p1.posterior(t, x).log_prob(x1), expected, EXACT, scale)


@given(cases(t=ENDS))
def test_posterior_at_the_ends(case: Case):
    p1, t, x, x1 = case.p1, case.t, case.x, case.x1
    posterior = p1.posterior(t, x)
    known = (t == 1).expand(case.size)
    # t = 0: x says nothing. t = 1: x is the clean sample.
    expected = torch.where(known.unsqueeze(-1), x, p1.mean)
    assert_close(posterior.mean, expected, 1e-13, row_scale(x) + p1.means.abs().max())  # cancels the means once
    assert_close(posterior.cov, torch.where(known[:, None, None], 0.0, p1.cov), 1e-13, 1 + p1.cov.abs().max())
    draws = posterior.sample(3, generator=rng(case.seed))
    assert_close(draws[:, known], x[known].expand(3, -1, -1), 1e-13, row_scale(x[known]))
    if not known.any():
        assert_close(posterior.log_prob(x1), p1.log_prob(x1), 1e-13, 1 + p1.log_prob(x1).abs())


@given(cases(s=TIMES, t=st.just(1.0)))
def test_a_known_clean_sample_moves_straight(case: Case):
    # p_{1|t} is a point: x₁ − x̄₀ = (x₁ − z)/(1−s) before s = 1, and x₁ there, where the noise has mean zero.
    posterior, s = case.p1.posterior(1.0, case.x), column(case.s)
    expected = torch.where(s == 1, case.x, (case.x - case.z) / (1 - s).clamp(min=0.01))
    assert_close(posterior.drift(case.s, case.z), expected, EXACT, row_scale(expected))
    with pytest.raises(ValueError, match="no density"):
        posterior.log_prob(case.x)
    with pytest.raises(ValueError, match="score at t = 1"):
        posterior.score(1.0, case.x)


@given(cases())
def test_posterior_read_from_tx(case: Case):
    p1, t, x = case.p1, case.t, case.x
    posterior, from_tx = p1.posterior(t, x), p1.posterior_from_tx(t, column(t) * x)
    for name in ("log_weights", "means", "eigenvalues"):
        assert torch.equal(getattr(posterior, name), getattr(from_tx, name))


@given(cases(t=BEFORE_ONE, s=BEFORE_ONE))
def test_two_observations_commute(case: Case):
    # Conditioning on the context and then on z, or on z and then on the context, is the same posterior.
    p1, s, z, t, x, x1 = case.p1, case.s, case.z, case.t, case.x, case.x1
    one, other = p1.posterior(t, x).posterior(s, z), p1.posterior(s, z).posterior(t, x)
    scale = row_scale(x, z, x1).squeeze(-1) / (torch.minimum(1 - t, 1 - s)) ** 2
    assert_close(one.log_prob(x1), other.log_prob(x1), EXACT, scale)


# ---- E2: score, drift, denoiser ------------------------------------------------------------------------


@given(cases())
def test_score_is_the_gradient_of_the_log_density(case: Case):
    expected = gradient(case.p1.marginal(case.t).log_prob, case.x)
    assert_close(case.p1.score(case.t, case.x), expected, EXACT, row_scale(expected))


@given(cases())
def test_drift_follows_from_the_log_density(case: Case):
    p1, t, x = case.p1, column(case.t), case.x
    score = gradient(p1.marginal(case.t).log_prob, x)
    # E2 read at t > 0; at t = 0 the drift is E[x₁] − x.
    expected = torch.where(t > 0, (x + (1 - t) * score) / t.clamp(min=0.01), p1.mean - x)
    assert_close(p1.drift(case.t, x), expected, EXACT, row_scale(x, score) / t.clamp(min=0.01))


@given(cases(p1=LINES, t=BEFORE_ONE, max_size=1))
def test_drift_is_the_mean_velocity_by_quadrature(case: Case):
    # b = E[x₁ − x₀ | I_t = x], with x₀ = (x − t x₁)/(1−t).
    p1, t, x = density(case.p1), float(case.t), float(case.x)

    def joint(x1: float) -> float:
        return p1(x1) * stats.norm.pdf(x, t * x1, 1 - t)

    moment = integral(lambda x1: (x1 - (x - t * x1) / (1 - t)) * joint(x1), case.p1)
    expected = moment / integral(joint, case.p1)
    assert case.p1.drift(t, case.x).item() == pytest.approx(expected, rel=QUADRATURE, abs=QUADRATURE / (1 - t))


@given(cases(), st.booleans())
def test_nothing_breaks_next_to_the_ends(case: Case, late):
    p1, x = case.p1, case.x
    for k in range(1, 300, 13):
        t = 1 - 10.0**-k if late else 10.0**-k
        for value in (p1.drift(t, x), p1.score(t, x), p1.denoiser(t, x), p1.value(LinearReward(x[0]), t, x)):
            assert torch.isfinite(value).all()


# ---- E4, E5, E7: rewards -------------------------------------------------------------------------------


@st.composite
def rewarded(draw, **options) -> tuple[Case, LinearReward | GaussianLikelihood]:
    """A case and a reward of its dimension."""
    case = draw(cases(**options))
    return case, draw(rewards(case.p1.dim))


@given(rewarded(t=AFTER_ZERO))
def test_doob_drift_is_the_drift_of_the_tilted_mixture(drawn):
    (case, reward) = drawn
    p1, t, x = case.p1, case.t, case.x
    guidance = column(noise_scale(t) / 2) * gradient(lambda x: p1.value(reward, t, x), x)
    expected = p1.tilt(reward).drift(t, x)
    # σ²/2 = (1−t)/t multiplies the gradient's rounding by up to 100; rewards reach some hundreds.
    assert_close(p1.drift(t, x) + guidance, expected, EXACT, row_scale(x, guidance, expected) / column(t))


@given(rewarded())
def test_doob_drift_needs_no_division_by_t(drawn):
    # (σ²/2) ∇_x V = (1−t) ∂V/∂(t x), finite at t = 0.
    (case, reward) = drawn
    p1, t, x = case.p1, case.t, case.x
    slope = gradient(lambda tx: p1.posterior_from_tx(t, tx).log_partition(reward), column(t) * x)
    guidance = column(1 - t) * slope
    expected = p1.tilt(reward).drift(t, x)
    assert_close(p1.drift(t, x) + guidance, expected, EXACT, row_scale(x, guidance, expected))


@given(rewarded())
def test_tilting_multiplies_the_density_by_the_reward(drawn):
    case, reward = drawn
    p1, x1 = case.p1, case.x1
    log_prob = p1.log_prob(x1) + reward(x1) - p1.log_partition(reward)
    scale = 1 + log_prob.abs() + reward(x1).abs()
    assert_close(p1.tilt(reward).log_prob(x1), log_prob, EXACT, scale)


@given(rewarded(t=BEFORE_ONE))
def test_tilting_and_conditioning_commute(drawn):
    case, reward = drawn
    p1, t, x, x1 = case.p1, case.t, case.x, case.x1
    tilted_first = p1.tilt(reward).posterior(t, x)
    tilted_last = p1.posterior(t, x).tilt(reward)
    scale = (1 + reward(x1).abs() + row_scale(x, x1).squeeze(-1)) / (1 - t) ** 2
    assert_close(tilted_first.log_prob(x1), tilted_last.log_prob(x1), EXACT, scale)


@given(rewarded(t=ENDS))
def test_value_at_the_ends(drawn):
    # t = 1: the reward of the clean sample. t = 0: the log-partition of p₁, whatever x.
    case, reward = drawn
    value = case.p1.value(reward, case.t, case.x)
    expected = torch.where(case.t == 1, reward(case.x), case.p1.log_partition(reward))
    assert_close(value, expected, EXACT, 1 + expected.abs())


@given(rewarded(p1=LINES, t=BEFORE_ONE, max_size=1))
def test_value_and_tilt_by_quadrature(drawn):
    case, reward = drawn
    p1, t, x = density(case.p1), float(case.t), float(case.x)

    def exp_reward(x1: float) -> float:
        return math.exp(reward(torch.full((1, 1), x1, dtype=torch.float64)).item())

    def joint(x1: float) -> float:
        return p1(x1) * stats.norm.pdf(x, t * x1, 1 - t)

    value = math.log(integral(lambda x1: exp_reward(x1) * joint(x1), case.p1) / integral(joint, case.p1))
    assert case.p1.value(reward, t, case.x).item() == pytest.approx(value, rel=QUADRATURE, abs=QUADRATURE)
    partition = integral(lambda x1: exp_reward(x1) * p1(x1), case.p1)
    assert case.p1.log_partition(reward).item() == pytest.approx(math.log(partition), rel=QUADRATURE, abs=QUADRATURE)
    mean = integral(lambda x1: x1 * exp_reward(x1) * p1(x1), case.p1) / partition
    assert case.p1.tilt(reward).mean.item() == pytest.approx(mean, rel=QUADRATURE, abs=QUADRATURE)


def test_tilting_to_an_exact_measurement():
    # A noise of 1e-9 leaves no variance along a, and rounding must not leave a negative one.
    for seed in range(20):
        a = randn(4, seed=seed)
        tilted = random_mixture(4, 3, seed).to(torch.float32).tilt(GaussianLikelihood(a.float(), 0.7, 1e-9))
        draws = tilted.sample(50, generator=rng(seed)).double()
        # float32 resolves a·x to 1e-7 of its terms; the variance, to 1e-7 of the largest, its root to 3e-4.
        assert_close(draws @ a, torch.full((50,), 0.7, dtype=torch.float64), 3e-3, 1 + a.abs().sum())


# ---- batches -------------------------------------------------------------------------------------------


@given(cases(), SEEDS)
def test_rows_do_not_meet(case: Case, seed):
    # B equal to D and to K are among the cases: a time or a weight broadcast along the wrong axis fits there.
    p1, x = case.p1, case.x
    t = case.t.expand(case.size)
    reward = LinearReward(randn(p1.dim, seed=seed))
    for f in (p1.drift, p1.score, p1.denoiser, lambda t, x: p1.value(reward, t, x).unsqueeze(-1)):
        rows = torch.cat([f(float(t[i]), x[i : i + 1]) for i in range(case.size)])
        assert_close(f(t, x), rows, 1e-12, row_scale(rows))  # the same sums, in another order


@given(cases())
def test_a_batched_marginal_meets_states_row_by_row(case: Case):
    p1, t, x = case.p1, case.t.expand(case.size), case.x
    rows = torch.stack([p1.marginal(float(t[i])).log_prob(x[i : i + 1])[0] for i in range(case.size)])
    assert_close(p1.marginal(t).log_prob(x), rows, 1e-12, 1 + rows.abs())


@given(cases())
def test_single_precision(case: Case):
    # Ends, and times from 0.01 to 0.99, where 1/(1−t) <= 100 turns a rounding of 1e-7 into 1e-5.
    p1, t, x = case.p1, case.t, case.x
    single, t32, x32 = p1.to(torch.float32), t.float(), x.float()
    reward = LinearReward(x[0])
    for f, f32 in ((p1.drift, single.drift), (p1.score, single.score), (p1.denoiser, single.denoiser)):
        expected, actual = f(t, x), f32(t32, x32)
        assert actual.dtype == torch.float32
        assert_close(actual.double(), expected, 1e-4, row_scale(x, expected))
    for expected, actual in (
        (p1.marginal(t).log_prob(x), single.marginal(t32).log_prob(x32)),
        (p1.value(reward, t, x), single.value(reward, t32, x32)),
    ):
        assert actual.dtype == torch.float32
        assert_close(actual.double(), expected, 1e-4, 1 + expected.abs() + row_scale(x).squeeze(-1) ** 2)


# ---- sampling ------------------------------------------------------------------------------------------

FALSE_ALARM = 1e-6  # for a whole call of `follows`, over all its projections


def follows(samples: Tensor, p: GaussianMixture, seed: int) -> bool:
    """Kolmogorov–Smirnov tests of samples `(n, D)` along 8 directions, each at FALSE_ALARM/8 (two-sided)."""
    directions = torch.nn.functional.normalize(randn(8, p.dim, seed=seed), dim=-1)
    for a in directions:
        means = (p.means @ a).numpy()
        stds = torch.einsum("kde,d,e->k", p.covs, a, a).sqrt().numpy()
        weights = p.weights.numpy()

        def cdf(v, weights=weights, means=means, stds=stds):
            return (weights * stats.norm.cdf(v[:, None], means, stds)).sum(-1)

        if stats.kstest((samples @ a).numpy(), cdf).pvalue < FALSE_ALARM / len(directions):
            return False
    return True


@pytest.mark.parametrize(("dim", "n_components"), [(1, 3), (2, 1), (3, 4), (6, 5)])
def test_samples_follow_the_mixture(dim, n_components):
    p1 = random_mixture(dim, n_components, seed=3)
    assert follows(p1.sample(20_000, generator=rng(0)), p1, seed=1)


def test_wrong_samplers_are_noticed():
    p1 = random_mixture(3, 4, seed=3)
    noise = randn(20_000, 3, seed=0)
    right = p1.sample(20_000, generator=rng(0))
    equal_weights = GaussianMixture(torch.full((4,), 0.25, dtype=torch.float64), p1.means, p1.covs)
    one_gaussian = p1.mean + noise @ torch.linalg.cholesky(p1.cov).T  # the right mean and covariance
    untransposed = GaussianMixture(p1.weights, p1.means, torch.diag_embed(p1.eigenvalues))
    for wrong in (
        right[:, [1, 0, 2]],
        p1.mean + 0.95 * (right - p1.mean),
        one_gaussian,
        equal_weights.sample(20_000, generator=rng(0)),
        untransposed.sample(20_000, generator=rng(0)),
    ):
        assert not follows(wrong, p1, seed=1)


def test_posterior_samples_follow_their_own_row():
    p1, x = random_mixture(2, 3, seed=1), randn(3, 2, seed=2)
    t = torch.tensor([0.0, 0.3, 0.8], dtype=torch.float64)
    draws = p1.posterior(t, x).sample(20_000, generator=rng(0))
    assert draws.shape == (20_000, 3, 2)
    for row in range(3):
        own = p1.posterior(t[row], x[row : row + 1])
        own = GaussianMixture(own.weights[0], own.means[0], own.covs[0])
        assert follows(draws[:, row], own, seed=4)
        assert not follows(draws[:, (row + 1) % 3], own, seed=4)


def test_draws_follow_the_generator():
    p1 = random_mixture(2, 3, seed=1)
    first, again, other = (p1.sample(5, generator=rng(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
