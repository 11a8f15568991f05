"""The rewards with a closed form: each against its own definition, by quadrature, SciPy and densities."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from scipy.integrate import quad

from mfm_ref import GaussianLikelihood, LinearReward
from tests.strategies import SEEDS, assert_close, randn, random_mixture, rewards

EXACT = 1e-9  # rewards and log-densities reach some hundreds, with condition numbers up to 1e3: 1e-11 of rounding


@st.composite
def gaussians(draw, max_dim: int = 6):
    """A reward and one Gaussian `(D,)`, `(D, D)` of its dimension."""
    dim = draw(st.integers(1, max_dim))
    p1 = random_mixture(dim, 1, draw(SEEDS))
    return draw(rewards(dim)), p1.means[0], p1.covs[0]


@given(st.integers(1, 6), SEEDS)
def test_linear_reward_is_the_projection(dim, seed):
    a, x = randn(dim, seed=seed), randn(5, dim, seed=seed + 1)
    expected = torch.from_numpy(np.array([np.vdot(a.numpy(), row.numpy()) for row in x]))
    assert_close(LinearReward(a)(x), expected, 1e-14, 1 + (a.abs() * x.abs()).sum(-1))


@given(st.integers(1, 6), st.integers(1, 3), st.floats(0.1, 2.0), SEEDS)
def test_likelihood_is_the_log_density_of_the_measurement(dim, rows, sigma, seed):
    # Up to the constant −(M/2) log 2πσ²; a vector a is a matrix of one row.
    a, y, x = randn(rows, dim, seed=seed), randn(rows, seed=seed + 1), randn(5, dim, seed=seed + 2)
    noise = stats.norm(scale=sigma)
    expected = torch.from_numpy(noise.logpdf((y - x @ a.T).numpy()).sum(-1)) - rows * noise.logpdf(0.0)
    assert_close(GaussianLikelihood(a, y, sigma)(x), expected, EXACT, 1 + expected.abs())
    if rows == 1:
        assert torch.equal(GaussianLikelihood(a[0], y[0], sigma)(x), GaussianLikelihood(a, y, sigma)(x))
        assert torch.equal(GaussianLikelihood(a[0], float(y[0]), sigma)(x), GaussianLikelihood(a, y, sigma)(x))


@given(gaussians(max_dim=1))
def test_partition_and_tilt_by_quadrature(drawn):
    reward, mean, cov = drawn
    law = stats.norm(float(mean), math.sqrt(float(cov)))
    centre, tilted = reward.tilt(mean, cov)  # only tells quad where to look

    def moment(power: int) -> float:
        def integrand(x: float) -> float:
            r = reward(torch.full((1, 1), x, dtype=torch.float64)).item()
            return (x - float(centre)) ** power * math.exp(r) * law.pdf(x)

        reach = 12 * math.sqrt(float(tilted))
        halves = [
            quad(integrand, float(centre) + sign * reach, float(centre), epsabs=0, epsrel=1e-11)[0] for sign in (-1, 1)
        ]
        return halves[0] - halves[1]

    partition = moment(0)
    assert reward.log_partition(mean, cov).item() == pytest.approx(math.log(partition), abs=EXACT, rel=EXACT)
    assert moment(1) / partition == pytest.approx(0, abs=EXACT)  # the first moment about the claimed mean
    assert moment(2) / partition == pytest.approx(float(tilted), rel=EXACT)


@given(gaussians(), SEEDS)
def test_tilt_multiplies_the_density(drawn, seed):
    # log N(x; μ′, Σ′) = log N(x; μ, Σ) + r(x) − log Z at any x, which fixes μ′, Σ′ and Z together.
    reward, mean, cov = drawn
    x = mean + randn(5, len(mean), seed=seed)
    tilted_mean, tilted_cov = reward.tilt(mean, cov)
    before = torch.from_numpy(stats.multivariate_normal(mean.numpy(), cov.numpy()).logpdf(x.numpy()))
    after = torch.from_numpy(stats.multivariate_normal(tilted_mean.numpy(), tilted_cov.numpy()).logpdf(x.numpy()))
    expected = before + reward(x) - reward.log_partition(mean, cov)
    assert_close(after, expected, EXACT, 1 + before.abs() + reward(x).abs())


@given(gaussians(), SEEDS)
def test_batches_of_gaussians(drawn, seed):
    # (…, D) and (…, D, D) in, (…) out, each entry as if alone.
    reward, mean, cov = drawn
    means = mean + randn(2, 3, len(mean), seed=seed)
    covs = cov * (1 + randn(2, 3, 1, 1, seed=seed) ** 2)
    partitions, (tilted_means, tilted_covs) = reward.log_partition(means, covs), reward.tilt(means, covs)
    for i, j in np.ndindex(2, 3):
        alone = reward.log_partition(means[i, j], covs[i, j])
        assert_close(partitions[i, j], alone, 1e-12, 1 + alone.abs())
        for batched, single in zip((tilted_means, tilted_covs), reward.tilt(means[i, j], covs[i, j]), strict=True):
            assert_close(batched[i, j], single, 1e-12, 1 + single.abs().max())


@given(gaussians())
def test_a_certain_state_keeps_its_reward(drawn):
    # Covariance 0, the posterior at t = 1: log E[e^r] is r itself and nothing is left to tilt.
    reward, mean, cov = drawn
    r = reward(mean.unsqueeze(0))[0]
    assert_close(reward.log_partition(mean, torch.zeros_like(cov)), r, EXACT, 1 + r.abs())
    assert_close(reward.tilt(mean, torch.zeros_like(cov))[0], mean, 0.0)


def test_rewards_follow_the_dtype_of_the_state():
    a = randn(3, seed=0)
    for reward in (LinearReward(a), GaussianLikelihood(a, 0.5, 1.0)):
        assert reward(torch.ones(2, 3)).dtype == torch.float32
        assert reward(torch.ones(2, 3, dtype=torch.float64)).dtype == torch.float64


SHAPES = [(6,), (1, 2, 3), (3, 2), (6, 1, 1)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("batch", [1, 2, 6])  # 6: as many images as numbers in one
def test_likelihood_of_images_is_that_of_flat_states(shape, batch):
    a, y, x = randn(4, 6, seed=0), randn(4, seed=1), randn(batch, 6, seed=2)
    for reward in (GaussianLikelihood(a, y, 0.3), GaussianLikelihood(a[0], y[0], 0.3)):
        assert torch.equal(reward(x.reshape(batch, *shape)), reward(x))
        images = x.reshape(batch, *shape).requires_grad_()
        slope = torch.autograd.grad(reward(images).sum(), images)[0]
        expected = (reward.y - x @ reward.a.T) @ reward.a / 0.3**2
        assert_close(slope.flatten(1), expected, EXACT, 1 + expected.abs())


def test_tilt_of_a_gaussian_of_images():
    # At any image, log p* − log p₁ − r is one number, −log Z, for the closed-form tilt p* of flattened images.
    p1 = random_mixture(6, 1, seed=0)
    reward = GaussianLikelihood(randn(4, 6, seed=1), randn(4, seed=2), 0.5)
    images = p1.sample(20, generator=torch.Generator().manual_seed(3)).reshape(20, 1, 2, 3)
    flat = images.flatten(1)
    constant = p1.tilt(reward).log_prob(flat) - p1.log_prob(flat) - reward(images)
    assert_close(constant, -reward.log_partition(p1.means[0], p1.covs[0]).expand(20), EXACT, 1 + reward(images).abs())


@pytest.mark.parametrize("shape", [(2, 1, 2, 2), (2, 5), (6,), (2, 3, 6), (0, 5)])
def test_likelihood_refuses_states_of_another_size(shape):
    reward = GaussianLikelihood(randn(4, 6, seed=0), randn(4, seed=1), 0.5)
    message = rf"dimension 6, or images of as many numbers, got shape \({', '.join(map(str, shape))},?\)"
    with pytest.raises(ValueError, match=message):
        reward(torch.ones(shape))
