"""The closed forms of one Gaussian, elementwise: against autodiff, SciPy and the laws they are the maps of."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from mfm_ref.gaussian import (
    angle_of_time,
    gaussian_posterior,
    gaussian_std,
    gaussian_velocity,
    posterior_std,
    time_of_angle,
)
from tests.strategies import ENDS, INTERIOR, SEEDS, TIMES, assert_close, randn

EXACT = 1e-9  # one division by t or 1−t >= 0.01 makes 1e-14 of a rounding of 1e-16; second derivatives, 1e-12
VARIANCES = st.floats(0.01, 10.0)


def number(value: float) -> Tensor:
    """A float64 scalar."""
    return torch.tensor(value, dtype=torch.float64)


@given(INTERIOR, VARIANCES, SEEDS)
def test_posterior_is_tweedies(t, var, seed):
    # Tweedie: E[x₁|x] = (x + (1−t)² ∇log p_t)/t, and Cov[x₁|x] = (1−t)²/t times the Jacobian of that.
    t, var, (mean, x) = number(t), number(var), randn(2, seed=seed)

    def denoiser(x: Tensor) -> Tensor:
        law = torch.distributions.Normal(t * mean, (t**2 * var + (1 - t) ** 2).sqrt())
        return (x + (1 - t) ** 2 * torch.func.grad(law.log_prob)(x)) / t

    expected_mean, slope = torch.func.jvp(denoiser, (x,), (torch.ones_like(x),))
    m, std, evidence = gaussian_posterior(t, t * x, mean, var)
    assert_close(m, expected_mean, EXACT, 1 / t)
    assert_close(std**2, (1 - t) ** 2 / t * slope, EXACT, 1 / t)
    assert_close(posterior_std(t, var), std, EXACT)
    law = torch.distributions.Normal(t * mean, torch.hypot((1 - t), t * var.sqrt()))
    assert_close(torch.special.ndtr(evidence / t), law.cdf(x), EXACT)


@given(ENDS, VARIANCES, SEEDS)
def test_posterior_at_the_ends(t, var, seed):
    mean, x = randn(2, seed=seed)
    m, std, evidence = gaussian_posterior(number(t), t * x, mean, number(var))
    assert_close(m, x if t else mean, 1e-14, 1 + x.abs() + mean.abs())
    assert_close(std, number(0.0 if t else math.sqrt(var)), 1e-15, 1 + var)
    assert_close(evidence * math.sqrt(var), x - mean if t else number(0.0), 1e-14, 1 + x.abs() + mean.abs())
    assert_close(posterior_std(number(t), number(var)) ** 2, number(0.0 if t else var), 1e-14, 1 + var)


@given(TIMES, TIMES, VARIANCES, SEEDS)
def test_velocity_transports_quantiles(first, second, var, seed):
    # The flow of a one-dimensional law keeps the CDF: F_u(X) = F_s(z).
    s, u = sorted((first, second))
    mean, noise = randn(2, seed=seed)
    z = s * mean + noise * math.sqrt((1 - s) ** 2 + s**2 * var)
    moved = z + (u - s) * gaussian_velocity(number(s), number(u), z, mean, number(var))

    def cdf(time: float, state: Tensor) -> float:
        return stats.norm.cdf(float(state), time * float(mean), float(gaussian_std(number(time), number(var).sqrt())))

    assert abs(cdf(u, moved) - cdf(s, z)) < 1e-12  # rounding of a number below 1


@given(TIMES, VARIANCES)
def test_gaussian_std_adds_the_variances(s, var):
    # x̄₀ and x₁ are independent, so the variance is a quadratic form in (1−s, s).
    weights = torch.tensor([1 - s, s], dtype=torch.float64)
    expected = weights @ torch.tensor([1.0, var], dtype=torch.float64).diag() @ weights
    assert_close(gaussian_std(number(s), number(var).sqrt()) ** 2, expected, 1e-14, 1 + expected)


@given(TIMES, VARIANCES, SEEDS)
def test_velocity_on_the_diagonal_is_the_limit(s, var, seed):
    # The quantiles above fix v for s < u; here a step of 1e-6 may differ from none by its acceleration, which is
    # at most var/S⁴ |z − s m| with S² >= var/(1+var).
    mean, z = randn(2, seed=seed)
    u = s + 1e-6 if s < 0.5 else s - 1e-6
    diagonal = gaussian_velocity(number(s), number(s), z, mean, number(var))
    nearby = gaussian_velocity(number(s), number(u), z, mean, number(var))
    assert_close(nearby, diagonal, 1e-6, (1 + var) ** 2 / var * (z.abs() + mean.abs()))


@given(TIMES, TIMES, SEEDS)
def test_a_point_is_reached_in_a_straight_line(first, second, seed):
    # Variance 0: X_{s,u}(z) = z + (u−s)/(1−s) (mean − z); at s = 1 the state is the point itself.
    s, u = sorted((first, second))
    mean, z = randn(2, seed=seed)
    v = gaussian_velocity(number(s), number(u), z, mean, number(0.0))
    expected = mean if s == 1 else (mean - z) / (1 - s)
    assert_close(v, expected, EXACT, 1 + expected.abs())


@given(TIMES, VARIANCES, SEEDS)
def test_angles_describe_the_auxiliary_path(s, var, seed):
    # (Ī_s − s m)/S_s = cos θ x̄₀ + sin θ (x₁ − m)/c for any noise and data.
    s, std = number(s), number(var).sqrt()
    mean, noise, data = randn(3, seed=seed)
    angle = angle_of_time(s, std)
    assert 0 <= angle <= math.pi / 2
    standard = ((1 - s) * noise + s * data - s * mean) / gaussian_std(s, std)
    assert_close(
        standard, angle.cos() * noise + angle.sin() * (data - mean) / std, EXACT, 1 + (data - mean).abs() / std
    )
    assert_close(time_of_angle(angle, std), s, 1e-13)  # slopes of the angle lie between 0.1 and 10


@given(VARIANCES)
def test_angles_reach_the_ends_exactly(var):
    std = number(var).sqrt()
    ends = time_of_angle(torch.tensor([0.0, math.pi / 2, 2.0, -0.1], dtype=torch.float64), std)
    assert ends.tolist() == [0.0, 1.0, 1.0, 0.0]
