"""Posterior samples (E11), the few-step sampler (E19) and the integrators (E2, E6), in law and in order."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from scipy.integrate import RK45

from mfm_ref import ExactFlowMap, GaussianLikelihood, GaussianMixture, integrate, sample, sample_posterior
from mfm_ref.sampling import DYNAMICS, EVALUATIONS, TABLEAUX, check_grid, noise_like, sde_step, time_grid
from tests.helpers import LIMIT, MapOf, gaussian, line, line_cdf, moment_scores, slope, z_scores
from tests.strategies import SEEDS, TIMES, Case, assert_close, cases, mixtures, randn, random_mixture, rng

P_LIMIT = 1e-6  # false-alarm rate of each Kolmogorov–Smirnov test below


def ks_p_value(samples: torch.Tensor, cdf) -> float:
    """p-value of the one-sample Kolmogorov–Smirnov test."""
    return stats.kstest(samples.flatten().numpy(), cdf).pvalue


# ---- sample_posterior (E11) ----------------------------------------------------------------------------


@given(cases(p1=mixtures(max_components=1)), st.integers(1, 4), st.integers(1, 3))
def test_posterior_draws_have_shape_n_b_d(case: Case, n, steps):
    draws = sample_posterior(ExactFlowMap(case.p1), case.t, case.x, n, steps, generator=rng(0))
    assert draws.shape == (n, *case.x.shape)
    assert draws.dtype == case.x.dtype


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("t", [0.0, 0.3, 0.8])
def test_posterior_law_of_a_gaussian(steps, t):
    """Whitened moments: 5 statistics for each of 2 contexts (B = D), 6e-7 each."""
    p1 = gaussian()
    X, x = ExactFlowMap(p1), p1.marginal(t).sample(2, generator=rng(1))
    draws = sample_posterior(X, t, x, 20_000, steps, generator=rng(2))
    truth = p1.posterior(t, x)
    for row in range(2):
        law = truth.mean[row], truth.cov[row]
        assert moment_scores(draws[:, row], *law) < LIMIT
        # Wrong samplers: the base law, the contexts exchanged, the map started from noise of another size.
        if t > 0:
            assert moment_scores(p1.sample(20_000, generator=rng(3)), *law) > LIMIT
            assert moment_scores(draws[:, 1 - row], *law) > LIMIT
        short = sample_posterior(X, t, x, 20_000, steps, eps=0.9 * randn(20_000, 2, 2, seed=4))
        assert moment_scores(short[:, row], *law) > LIMIT


@pytest.mark.parametrize("steps", [1, 3])
def test_posterior_law_of_a_mixture(steps):
    """The whole law, by a Kolmogorov–Smirnov test with false-alarm rate 1e-6 for each of 3 contexts."""
    p1 = line()
    t, x = torch.tensor([0.0, 0.3, 0.6], dtype=torch.float64), torch.tensor([[1.0], [0.1], [-0.2]], dtype=torch.float64)
    draws = sample_posterior(ExactFlowMap(p1), t, x, 20_000, steps, generator=rng(0))
    for row in range(3):
        truth = p1.posterior(t[row], x[row : row + 1])
        single = GaussianMixture(truth.weights[0], truth.means[0], truth.covs[0])
        assert ks_p_value(draws[:, row], line_cdf(single)) > P_LIMIT
        assert ks_p_value(draws[:, (row + 1) % 3], line_cdf(single)) < P_LIMIT  # another context's draws


def test_a_frozen_velocity_is_caught():
    """The wrong sampler closest to E11: one Euler step, X = ε + b̄_0 = D_t(x), has the right mean and no spread."""
    p1, t = line(), 0.3
    X, x = ExactFlowMap(p1), torch.tensor([[0.1]], dtype=torch.float64)
    frozen = MapOf(lambda s, u, z, t, x, y: z + (u - s) * X.velocity(s[:, 0], s[:, 0], z, t[:, 0], x), (1,))
    truth = p1.posterior(t, x)
    cdf = line_cdf(GaussianMixture(truth.weights[0], truth.means[0], truth.covs[0]))
    assert ks_p_value(sample_posterior(frozen, t, x, 20_000, 1, generator=rng(0)), cdf) < P_LIMIT
    assert ks_p_value(sample_posterior(frozen, t, x, 20_000, 3, generator=rng(0)), cdf) < P_LIMIT


def test_draws_pair_each_noise_with_its_own_context_and_label():
    """A map that returns its inputs; n = B = D = 3, where a transposed batch would go unnoticed."""
    eps, x = randn(3, 3, 3, seed=1), randn(3, 3, seed=2)
    t = torch.tensor([0.1, 0.4, 0.9], dtype=torch.float64)
    y = torch.tensor([5, 7, 11])
    seen = MapOf(lambda s, u, z, t, x, y: z + 10 * x + 100 * t + 1000 * y.unsqueeze(-1), (3,))
    draws = sample_posterior(seen, t, x, 3, y=y, eps=eps)
    for i in range(3):
        for b in range(3):
            assert_close(draws[i, b], eps[i, b] + 10 * x[b] + 100 * t[b] + 1000 * y[b], 1e-12, 1e4)


def test_steps_visit_the_uniform_grid_once_in_order():
    visited = []

    def record(s, u, z, t, x, y):
        visited.append((s[0].item(), u[0].item()))
        return z

    sample_posterior(MapOf(record, (1,)), 0.5, torch.zeros(1, 1, dtype=torch.float64), 2, 4)
    assert visited == [(0.0, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 1.0)]


@pytest.mark.parametrize("shape", [(3,), (3, 4), (3, 4, 4), ()])
def test_states_of_any_shape(shape):
    x, eps = torch.ones(5, *shape), torch.randn(2, 5, *shape)
    t = torch.linspace(0, 1, 5)
    draws = sample_posterior(MapOf(lambda s, u, z, t, x, y: z + t * x, shape), t, x, 2, eps=eps)
    for b in range(5):
        torch.testing.assert_close(draws[:, b], eps[:, b] + t[b])


def test_eps_decides_the_draws_and_a_generator_repeats_them():
    p1 = gaussian()
    X, x = ExactFlowMap(p1), randn(4, 2, seed=0)
    first = sample_posterior(X, 0.5, x, 3, generator=rng(7))
    assert torch.equal(first, sample_posterior(X, 0.5, x, 3, generator=rng(7)))
    assert not torch.equal(first, sample_posterior(X, 0.5, x, 3, generator=rng(8)))
    eps = randn(3, 4, 2, seed=9)
    assert torch.equal(sample_posterior(X, 0.5, x, 3, eps=eps), sample_posterior(X, 0.5, x, 3, eps=eps))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"n": 0}, "n must be an integer >= 1"),
        ({"n": 2.0}, "n must be an integer >= 1"),
        ({"steps": 0}, "steps must be an integer >= 1"),
        ({"t": 1.5}, r"time t must lie in \[0, 1\]"),
        ({"t": torch.tensor([0.5, 0.5, 0.5])}, r"time t must have shape \(\) or \(4,\)"),
        ({"eps": torch.zeros(4, 2)}, "eps must have shape"),
        ({"eps": torch.zeros(4, 3, 2)}, "eps must have shape"),
    ],
)
def test_sample_posterior_refuses(change, match):
    arguments = {"t": 0.5, "x": torch.zeros(4, 2), "n": 3} | change
    with pytest.raises(ValueError, match=match):
        sample_posterior(ExactFlowMap(gaussian().to(torch.float32)), **arguments)


# ---- sample (E19) --------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_few_step_law_is_p1_for_every_number_of_steps(steps):
    """E19 is exact when X is; Kolmogorov–Smirnov, false-alarm rate 1e-6."""
    p1 = line()
    assert ks_p_value(sample(ExactFlowMap(p1), 20_000, steps, generator=rng(steps)), line_cdf(p1)) > P_LIMIT


def test_few_step_law_on_an_uneven_grid_in_two_dimensions():
    """Five moments of a full-covariance Gaussian, 6e-7 each."""
    p1 = gaussian()
    drawn = sample(ExactFlowMap(p1), 20_000, 4, times=time_grid(4, power=2.5), generator=rng(0))
    assert moment_scores(drawn, p1.mean, p1.cov) < LIMIT
    assert moment_scores(drawn, p1.mean + 0.05, p1.cov) > LIMIT  # the test resolves a shift of 0.05


@pytest.mark.parametrize("error", ["no fresh noise", "stale time", "reversed interpolant"])
def test_wrong_few_step_samplers_fail(error):
    """Algorithm 1 with one line changed; the right one passes the same test above."""
    p1, n, g = line(), 20_000, rng(0)
    X = ExactFlowMap(p1)
    eps = randn(n, 1, seed=1)
    x = eps
    grid = time_grid(4)
    for t, t_next in pairwise(grid):
        z = eps if error == "no fresh noise" else noise_like(X, n, generator=g)
        x1 = X(0.0, 1.0, z, t, x)
        fresh = noise_like(X, n, generator=g)
        a = {"no fresh noise": t_next, "stale time": t, "reversed interpolant": 1 - t_next}[error]
        noise = eps if error == "no fresh noise" else fresh
        x = x1 if t_next == 1 else (1 - a) * noise + a * x1
    assert ks_p_value(x, line_cdf(p1)) < P_LIMIT


def test_labels_reach_every_step():
    def by_label(s, u, z, t, x, y):
        return z * 0 + y.unsqueeze(-1)

    y = torch.tensor([3, 1, 2])
    assert sample(MapOf(by_label, (2,)), 3, 4, y=y)[:, 0].tolist() == [3.0, 1.0, 2.0]


# ---- grids ---------------------------------------------------------------------------------------------


@given(st.integers(1, 50), st.floats(0.5, 4))
def test_time_grid_is_accepted_by_check_grid(steps, power):
    grid = check_grid(time_grid(steps, power=power), steps)
    assert grid[steps // 2] == pytest.approx((steps // 2 / steps) ** power)


@pytest.mark.parametrize(
    ("times", "match"),
    [
        ([0.0, 0.5], "rise strictly from 0 to 1"),
        ([0.1, 1.0], "rise strictly from 0 to 1"),
        ([1.0, 0.0], "rise strictly from 0 to 1"),
        ([0.0, 0.5, 0.5, 1.0], "rise strictly from 0 to 1"),
        ([0.0, float("nan"), 1.0], "rise strictly from 0 to 1"),
        ([], "rise strictly from 0 to 1"),
        ([0.0, 1.0], r"steps \+ 1 = 3 values"),
    ],
)
def test_grids_that_do_not_rise_are_refused(times, match):
    with pytest.raises(ValueError, match=match):
        sample(ExactFlowMap(gaussian()), 3, 2, times=times)
    if "steps" not in match:
        with pytest.raises(ValueError, match=match):
            integrate(lambda t, x: x, torch.zeros(3, 2), times)


@pytest.mark.parametrize("arguments", [(0, 1), (1, 0), (2, 1.5)])
def test_sample_refuses_counts(arguments):
    with pytest.raises(ValueError, match="must be an integer >= 1"):
        sample(ExactFlowMap(gaussian()), *arguments)


# ---- integrate (E2, E6) --------------------------------------------------------------------------------

STEPS = [32, 64, 128, 256]


ORDERS = {"ode": 1, "midpoint": 2, "heun": 2, "dopri5": 5}


@pytest.mark.parametrize("dynamics", ["ode", "midpoint", "heun"])
def test_orders_on_a_mixture(dynamics):
    """Log error on log step against the exact flow of two components; 0.1 allows for the next term in the step. (The
    oracle's own solver is not exact enough for the fifth order.)"""
    p1 = random_mixture(2, 2, seed=3)
    x = randn(20, 2, seed=1)
    exact = ExactFlowMap(p1)(0.0, 1.0, x, 0.0, torch.zeros_like(x))
    errors = [float((integrate(p1.drift, x, time_grid(k), dynamics=dynamics) - exact).norm()) for k in STEPS]
    assert slope(STEPS, errors) == pytest.approx(-ORDERS[dynamics], abs=0.1)
    wrong = integrate(lambda t, x: p1.drift(0.99 * t, x), x, time_grid(STEPS[-1]), dynamics=dynamics)
    assert float((wrong - exact).norm()) > 1.1 * errors[-1]


def spiral(t, x):
    """dx/dt = (1 − |x|²) x + (3 + 4t) Jx: coupled, nonlinear, and a function of t; with `spiral_end` in closed form."""
    return (1 - x.square().sum(1, keepdim=True)) * x + (3 + 4 * t) * torch.stack([-x[:, 1], x[:, 0]], 1)


def spiral_end(x):
    """|x|² follows the logistic law, and the angle grows by ∫ (3 + 4t) dt = 5."""
    grown = 1 / (x.square().sum(1, keepdim=True) * (1 - math.exp(-2)) + math.exp(-2)).sqrt()
    turn = torch.tensor([[math.cos(5), math.sin(5)], [-math.sin(5), math.cos(5)]], dtype=x.dtype)
    return grown * x @ turn


def spiral_order(dynamics):
    x = 0.5 + 0.2 * randn(20, 2, seed=1)
    errors = [float((integrate(spiral, x, time_grid(k), dynamics=dynamics) - spiral_end(x)).norm()) for k in STEPS]
    return -slope(STEPS, errors)


@pytest.mark.parametrize("dynamics", ORDERS)
def test_orders_on_a_spiral(dynamics, monkeypatch):
    """Against a closed form; 0.15 allows for the next term in the step, 6 % of the error at 32 steps. With one
    coefficient of the last stage changed by 0.02, a method of higher order falls to order 1."""
    assert spiral_order(dynamics) == pytest.approx(ORDERS[dynamics], abs=0.15)
    if dynamics != "ode":
        stages, weights = TABLEAUX[dynamics]
        wrong = (*stages[:-1], (*stages[-1][:-1], stages[-1][-1] + 0.02)), (*weights[:-1], weights[-1] + 0.02)
        monkeypatch.setitem(TABLEAUX, dynamics, wrong)
        assert spiral_order(dynamics) < 1.2


def test_dopri5_is_scipys_tableau():
    stages, weights = TABLEAUX["dopri5"]
    assert [node for node, *_ in stages] == list(RK45.C)
    assert weights == tuple(RK45.B)
    for k, (_, *row) in enumerate(stages):
        assert row == list(RK45.A[k, :k])


@given(st.sampled_from(DYNAMICS), st.integers(1, 60), st.floats(0.5, 3))
def test_the_drift_is_asked_as_often_as_said_and_at_times_up_to_one(dynamics, steps, power):
    """The steps begin at the times of the grid, and the last ends at 1 to the bit, which two methods alone ask for."""
    seen, grid = [], time_grid(steps, power=power)
    integrate(lambda t, x: seen.append(t) or x, torch.ones(1, 1), grid, dynamics=dynamics)
    assert len(seen) == EVALUATIONS[dynamics] * steps
    assert seen[:: EVALUATIONS[dynamics]] == grid[:-1]
    assert max(seen) <= 1
    assert seen.count(1.0) == (dynamics in ("heun", "dopri5"))


@given(st.integers(1, 6), st.floats(0.5, 3), SEEDS)
def test_euler_midpoint_and_sde_steps_to_the_bit(steps, power, seed):
    """Written out, in single precision, with one generator."""
    grid, x = time_grid(steps, power=power), randn(3, 4, seed=seed).float()

    def drift(t, x):
        return torch.sin(3 * x + t)

    euler = midpoint = sde = x
    generator = rng(seed)
    for t, t_next in pairwise(grid):
        h = t_next - t
        euler = euler + h * drift(t, euler)
        midpoint = midpoint + h * drift(t + h / 2, midpoint + h / 2 * drift(t, midpoint))
        sde = sde_step(sde, sde + (1 - t) * drift(t, sde), t, t_next, generator=generator)
    for dynamics, expected in (("ode", euler), ("midpoint", midpoint), ("sde", sde)):
        assert torch.equal(integrate(drift, x, grid, dynamics=dynamics, generator=rng(seed)), expected)


@given(cases(p1=mixtures(), t=st.just(1.0)))
def test_the_drift_of_a_mixture_is_finite_at_one(case: Case):
    """As Heun's and Dormand and Prince's last step need it: b₁(x) = lim b_t(x), and the oracle's diagonal."""
    b = case.p1.drift(1.0, case.x)
    before = case.p1.drift(1 - 1e-7, case.x)
    assert_close(b, before, 1e-3, 1 + b.abs().max())  # |db/dt| is large where a variance is small
    assert_close(ExactFlowMap(case.p1).velocity(1.0, 1.0, case.x, 0.0, torch.zeros_like(case.x)), b, 1e-9, 1 + b.abs())
    for dynamics in ("heun", "dopri5"):
        assert torch.isfinite(integrate(case.p1.drift, case.x, time_grid(2), dynamics=dynamics)).all()


def impulse_moments(drift, dim: int, times: list[float], monkeypatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and covariance that the SDE sampler gives a *linear* drift, with no Monte Carlo error.

    The result is then an affine function of the start and of every step's noise, all standard normal: one row of
    the batch answers to each unit impulse, and the covariance is the sum of the responses' outer products.
    """
    steps = len(times) - 1
    impulses = torch.cat([torch.zeros(1, (steps + 1) * dim), torch.eye((steps + 1) * dim)]).to(torch.float64)
    per_step = iter(impulses.split(dim, dim=1))
    start = next(per_step)
    monkeypatch.setattr(torch, "randn", lambda *args, **kwargs: next(per_step).clone())
    end = integrate(drift, start, times, dynamics="sde")
    monkeypatch.undo()
    assert next(per_step, None) is None  # one fresh noise a step, none left over
    response = end[1:] - end[0]
    return end[0], response.T @ response


def sde_error(p1: GaussianMixture, drift, steps: int, monkeypatch) -> tuple[float, float]:
    mean, cov = impulse_moments(drift, p1.dim, time_grid(steps), monkeypatch)
    return float((mean - p1.mean).norm()), float((cov - p1.cov).norm())


def test_sde_has_weak_order_one_from_t_zero(monkeypatch):
    """The covariance converges to that of p₁ at order 1, started at t = 0 where σ² is infinite.

    The mean is exact for any step: along x = t m a Gaussian's denoiser is m, constant as the scheme supposes.
    """
    p1 = gaussian()
    means, covs = zip(*(sde_error(p1, p1.drift, k, monkeypatch) for k in STEPS), strict=True)
    assert max(means) < 1e-12
    assert slope(STEPS, covs) == pytest.approx(-1, abs=0.1)
    assert covs[-1] < 0.03 * p1.cov.norm()  # at 256 steps


def test_sde_with_the_doob_drift_reaches_the_tilted_law(monkeypatch):
    """E7, E8: the same sampler, given b*, has the tilted moments; given b, or half the guidance, it has not."""
    p1 = gaussian()
    reward = GaussianLikelihood(torch.tensor([0.8, -0.6], dtype=torch.float64), 2.0, 0.8)
    tilted = p1.tilt(reward)
    errors = [max(sde_error(tilted, tilted.drift, k, monkeypatch)) for k in STEPS]
    assert slope(STEPS, errors) == pytest.approx(-1, abs=0.1)
    for share in (0.0, 0.5):

        def guided(t, x, share=share):
            return (1 - share) * p1.drift(t, x) + share * tilted.drift(t, x)

        assert max(sde_error(tilted, guided, 256, monkeypatch)) > 10 * errors[-1]


@pytest.mark.parametrize("dynamics", ["ode", "sde"])
def test_integrated_law_of_a_mixture(dynamics):
    """Mean and variance of a bimodal p₁ after 300 steps, started at t = 0 with the exact drift.

    4,000 samples: the standard error of the mean is 0.03, the discretisation's bias under 0.01. Two statistics
    of 6e-7 each; with the time reversed the test fails.
    """
    p1 = line()
    grid = time_grid(300)
    x = randn(4_000, 1, seed=1)
    right = integrate(p1.drift, x, grid, dynamics=dynamics, generator=rng(2))
    assert moment_scores(right, p1.mean, p1.cov) < LIMIT
    wrong = integrate(lambda t, x: p1.drift(1 - t, x), x, grid, dynamics=dynamics, generator=rng(2))
    assert moment_scores(wrong, p1.mean, p1.cov) > LIMIT


def test_sde_marginals_on_the_way():
    """E6 shares every marginal: stopped on its way, the state has the law of I_t.

    A last step to t = 1 is avoided by reading the state that the drift is called with; 0.25 ≤ t ≤ 0.75.
    """
    p1, seen = gaussian(), {}

    def spy(t, x):
        seen[t] = x
        return p1.drift(t, x)

    integrate(spy, randn(4_000, 2, seed=1), time_grid(200), dynamics="sde", generator=rng(2))
    for t in (0.25, 0.5, 0.75):
        marginal = p1.marginal(t)
        assert moment_scores(seen[t], marginal.mean, marginal.cov) < LIMIT
        assert moment_scores(seen[t - 0.1], marginal.mean, marginal.cov) > LIMIT


def test_the_sde_forgets_its_noise_and_the_ode_does_not():
    """Correlation of start and end over 2,000 paths: 1 for the ODE in one dimension, 0 for the SDE (4.5e-6: z of
    5 with the standard error 1/√n of a correlation)."""
    p1 = gaussian(1)
    x = randn(2_000, 1, seed=1)
    ends = {
        dynamics: integrate(p1.drift, x, time_grid(50), dynamics=dynamics, generator=rng(2))
        for dynamics in ("ode", "sde")
    }
    ode, sde = (torch.corrcoef(torch.cat([x, ends[dynamics]], 1).T)[0, 1] for dynamics in ("ode", "sde"))
    assert ode == pytest.approx(1, abs=1e-9)
    assert abs(sde) < LIMIT / math.sqrt(2_000)


def test_final_sde_step_lands_on_the_denoiser():
    """One step from 0 to 1 with the denoiser held fixed is D_0(x) = x + b_0(x) = E[x₁], without noise."""
    p1 = line()
    x = randn(6, 1, seed=0)
    assert_close(integrate(p1.drift, x, [0.0, 1.0], dynamics="sde"), p1.mean.expand(6, 1), 1e-12)


@pytest.mark.parametrize(
    ("drift", "change", "match"),
    [
        (lambda t, x: x, {"dynamics": "SDE"}, "dynamics must be one of ode, midpoint, heun, dopri5, sde, got 'SDE'"),
        (lambda t, x: x / (t - 0.5), {}, r"^step 3 of 4, at t = 0\.5: the drift must be finite, got 4 NaN or inf"),
        (lambda t, x: x / (t - 0.375), {"dynamics": "midpoint"}, r"^step 2 of 4, at t = 0\.25: the drift must be fin"),
        (
            lambda t, x: x / torch.tensor(1 - t),
            {"dynamics": "heun"},
            r"^step 4 of 4, at t = 0\.75: the drift must be f",
        ),
        (
            lambda t, x: x / torch.tensor(1 - t),
            {"dynamics": "dopri5"},
            "^step 4 of 4, at t = 0.75: the drift must be f",
        ),
        (lambda t, x: x + float("nan"), {"dynamics": "sde"}, "^step 1 of 4, at t = 0: the drift must be finite"),
        (lambda t, x: x[:, 0], {}, "^step 1 of 4, at t = 0: these must have the same shape"),  # B = D
    ],
)
def test_integrate_refuses(drift, change, match):
    with pytest.raises(ValueError, match=match):
        integrate(drift, torch.ones(2, 2), time_grid(4), **change)


# ---- one generator for each row ------------------------------------------------------------------------


def by_entry(s, u, z, t, x, y):
    """A map of each entry alone, so that the size of a batch changes no rounding."""
    return z + (u - s) * (torch.sin(2 * x + t) - z) / 2


def calls_with_sources(rows: torch.Tensor) -> dict:
    """Every sampler as a function of its generators, for a batch of those rows of one larger batch."""
    X, n = MapOf(by_entry, (2,)), len(rows)
    x, t = randn(6, 2, seed=1)[rows], torch.linspace(0, 0.9, 6, dtype=torch.float64)[rows]
    return {
        "noise_like": lambda g: noise_like(X, n, generator=g),
        "noise_like, draws": lambda g: noise_like(X, 3, n, generator=g).movedim(1, 0),
        "sample_posterior": lambda g: sample_posterior(X, t, x, 3, 2, generator=g).movedim(1, 0),
        "sample": lambda g: sample(X, n, 3, generator=g),
        "integrate": lambda g: integrate(lambda t, x: torch.sin(x) - t, x, time_grid(3), dynamics="sde", generator=g),
        "sde_step": lambda g: sde_step(x, torch.sin(x), 0.2, 0.6, generator=g),
    }


@pytest.mark.parametrize("name", calls_with_sources(torch.arange(6)))
def test_a_row_is_the_same_in_any_batch(name):
    """Given a generator for each row; given one for all of them, it is not. Calls go on where the last one stopped."""
    whole, part = torch.arange(6), torch.tensor([4, 1, 5])
    call, call_part = calls_with_sources(whole)[name], calls_with_sources(part)[name]
    sources, some = ([rng(k) for k in rows.tolist()] for rows in (whole, part))
    first, second = call(sources), call(sources)
    assert torch.equal(call_part(some), first[part])
    assert torch.equal(call_part(some), second[part])
    assert not torch.equal(first, second)
    assert not torch.equal(call_part(rng(0)), call(rng(0))[part])
    for k in (0, 3):  # alone, from its generator itself
        alone = calls_with_sources(whole[k : k + 1])[name]
        assert torch.equal(alone([rng(k)]), first[k : k + 1])
        assert torch.equal(alone(rng(k)), first[k : k + 1])
    with pytest.raises(ValueError, match="generators must be one for each of 6 rows, got 5"):
        call(sources[:5])


def test_few_step_law_with_a_generator_for_each_sample():
    """Kolmogorov–Smirnov with false-alarm rate 1e-6; with ten seeds for all samples it fails."""
    p1, n = line(), 4_000
    drawn = sample(ExactFlowMap(p1), n, 3, generator=[rng(k) for k in range(n)])
    assert ks_p_value(drawn, line_cdf(p1)) > P_LIMIT
    few = sample(ExactFlowMap(p1), n, 3, generator=[rng(k % 10) for k in range(n)])
    assert ks_p_value(few, line_cdf(p1)) < P_LIMIT


# ---- precision -----------------------------------------------------------------------------------------


@given(cases(p1=mixtures(max_components=1), t=TIMES))
def test_float32_posterior_draws_are_within_1e_4(case: Case):
    """Same noise, same context; relative to the largest entry. Gaussians only: rounding of a state that decides
    between components is not the sampler's."""
    n = 3
    eps = randn(n, *case.x.shape, seed=case.seed)
    double = sample_posterior(ExactFlowMap(case.p1), case.t, case.x, n, eps=eps)
    single = ExactFlowMap(case.p1.to(torch.float32))
    rounded = sample_posterior(single, case.t.float(), case.x.float(), n, eps=eps.float())
    assert rounded.dtype == torch.float32
    assert_close(rounded.double(), double, 1e-4, 1 + double.abs().max())


@pytest.mark.parametrize("dynamics", ["ode", "sde"])
def test_float32_integration_is_within_1e_4(dynamics, monkeypatch):
    p1 = gaussian()
    x, noises = randn(8, 2, seed=0), randn(20, 8, 2, seed=1)
    ends = []
    for dtype in (torch.float64, torch.float32):
        stream = iter(noises.to(dtype))
        monkeypatch.setattr(torch, "randn", lambda *args, stream=stream, **kwargs: next(stream))
        ends.append(integrate(p1.to(dtype).drift, x.to(dtype), time_grid(20), dynamics=dynamics).double())
        monkeypatch.undo()
    assert_close(ends[1], ends[0], 1e-4, 1 + ends[0].abs().max())


def test_z_scores_are_standard_errors():
    """The judge is judged: on 200 sets of normal numbers its scores are standard normal themselves."""
    scores = z_scores(randn(500, 200, seed=0), 0.0)
    assert stats.kstest(scores.numpy(), "norm").pvalue > P_LIMIT
    assert z_scores(randn(500, 1, seed=0), 0.5).abs() > LIMIT
