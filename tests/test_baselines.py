"""The baselines (E20): Best-of-N, SMC, GLASS and SDE rollouts against closed forms, in law and in order.

Those of SMC are judged over independent populations. With R of them a score is Student's t of R − 1 degrees of
freedom; its false-alarm rate at LIMIT stands with each test.
"""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Normal

import mfm_ref.baselines
from mfm_ref import ExactFlowMap, GaussianLikelihood, GaussianMixture, LinearReward, glass_drift, integrate
from mfm_ref.baselines import (
    GlassRollout,
    best_of_n,
    effective_share,
    glass_rollout,
    log_transition_ratio,
    sde_rollout,
    smc,
    systematic,
)
from mfm_ref.cost import evaluations
from mfm_ref.sampling import DYNAMICS, EVALUATIONS, time_grid
from mfm_ref.search import search
from tests.helpers import LIMIT, MapOf, ReadsX, gaussian, line, line_cdf, moment_scores, normal, slope, z_scores
from tests.strategies import INTERIOR, SEEDS, Case, assert_close, cases, mixtures, randn, random_mixture, rng
from tests.test_sampling import P_LIMIT, impulse_moments, ks_p_value


def first(x1):
    """The reward x₁ of the first coordinate."""
    return x1.flatten(1)[:, 0]


class Shaped:
    """A map of vectors as one of states of another shape; it refuses labels that are not `want`, row by row."""

    reads_tx = True

    def __init__(self, X, shape, want=None):
        self.X, self.shape, self.want = X, shape, want
        self.dtype, self.device, self.largest = X.dtype, X.device, 0

    def velocity(self, s, u, z, t, x, y=None):
        return self._check(z, y, self.X.velocity(s, u, z.flatten(1), t, x.flatten(1)))

    def velocity_from_tx(self, s, u, z, t, tx, y=None):
        return self._check(z, y, self.X.velocity_from_tx(s, u, z.flatten(1), t, tx.flatten(1)))

    def _check(self, z, y, result):
        assert (y is None) if self.want is None else (y == self.want).all() and y.shape == z.shape[:1]
        self.largest = max(self.largest, len(z))
        return result.reshape(z.shape)


# ---- Best-of-N -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dynamics", ["ode", "sde"])
def test_the_best_of_n_has_the_law_of_a_maximum(dynamics, monkeypatch):
    """r(x) = x: the CDF is Fⁿ, with F the Gaussian that the integrator makes of a Gaussian. False-alarm rate 1e-6."""
    p1, grid = normal(2.0), time_grid(20)
    ends = integrate(p1.drift, torch.tensor([[0.0], [1.0]], dtype=torch.float64), grid)
    mean, std = float(ends[0]), float(ends[1] - ends[0])
    if dynamics == "sde":
        moments = impulse_moments(p1.drift, 1, grid, monkeypatch)
        mean, std = float(moments[0]), float(moments[1].sqrt())
    best, _ = best_of_n(ExactFlowMap(p1), first, 8_000, 5, times=grid, dynamics=dynamics, generator=rng(0))
    law = Normal(mean, std)

    def cdf(power):
        return lambda x: law.cdf(torch.as_tensor(x)).numpy() ** power

    assert ks_p_value(best, cdf(5)) > P_LIMIT
    assert ks_p_value(best, cdf(4)) < P_LIMIT  # one candidate lost
    worst, _ = best_of_n(ExactFlowMap(p1), lambda x: -first(x), 8_000, 5, times=grid, generator=rng(0))
    assert ks_p_value(worst, cdf(5)) < P_LIMIT  # the sign of the reward


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.sampled_from(DYNAMICS), SEEDS)
def test_best_of_n_is_the_best_of_its_own_candidates(n_samples, n, steps, dynamics, seed):
    """Candidate by candidate, in chunks and not, and nK + n evaluations, K those of the drift."""
    p1, reward = random_mixture(2, 2, seed), LinearReward(randn(2, seed=seed))
    arguments = {"steps": steps, "dynamics": dynamics}
    best, cost = best_of_n(ExactFlowMap(p1), reward, n_samples, n, generator=rng(seed), **arguments)
    generator = rng(seed)
    x = torch.randn((n, n_samples, 2), generator=generator, dtype=torch.float64)
    ends = integrate(p1.drift, x.flatten(0, 1), time_grid(steps), dynamics=dynamics, generator=generator)
    groups = ends.unflatten(0, (n, n_samples))
    expected = torch.stack([max(groups[:, b], key=lambda a: float(reward(a[None]))) for b in range(n_samples)])
    assert_close(best, expected, 1e-9, 1 + expected.abs().max())
    chunked, _ = best_of_n(ExactFlowMap(p1), reward, n_samples, n, max_rows=3, generator=rng(seed), **arguments)
    assert_close(chunked, best, 1e-9, 1 + best.abs().max())
    assert cost.evaluations == evaluations("best_of_n", steps * EVALUATIONS[dynamics], n=n)


@given(
    st.integers(1, 3), st.sampled_from(DYNAMICS), st.none() | st.integers(1, 5), st.permutations(range(4)),
    st.integers(1, 4), SEEDS,
)  # fmt: skip
def test_the_best_of_n_depends_on_its_own_generator_alone(n, dynamics, max_rows, part, size, seed):
    """Any part of the samples, in any order and in chunks, is that part of all of them."""
    X, reward, part = ExactFlowMap(random_mixture(2, 1, seed)), LinearReward(randn(2, seed=seed)), part[:size]
    options = {"steps": 3, "dynamics": dynamics}
    whole, _ = best_of_n(X, reward, 4, n, generator=[rng(seed + i) for i in range(4)], **options)
    some, _ = best_of_n(X, reward, size, n, generator=[rng(seed + i) for i in part], max_rows=max_rows, **options)
    assert_close(some, whole[part], 1e-9, 1 + whole.abs().max())
    alone, _ = best_of_n(X, reward, 1, n, generator=rng(seed + part[0]), **options)
    assert_close(alone, some[:1], 1e-9, 1 + whole.abs().max())


def test_best_of_n_passes_labels_and_takes_any_shape():
    """Each row is carried to its own label: three results of three candidates."""
    by_label = MapOf(lambda s, u, z, t, x, y: z + (u - s) * y.reshape(-1, 1, 1), (2, 3))
    y = torch.tensor([30, 10, 20])
    for max_rows in (None, 2):
        best, _ = best_of_n(by_label, first, 3, 3, steps=2, y=y, max_rows=max_rows, generator=rng(0))
        assert best.shape == (3, 2, 3)
        assert (first(best) - y).abs().max() < 5


# ---- systematic resampling -----------------------------------------------------------------------------


@given(st.integers(1, 30), st.floats(0, 20), SEEDS)
def test_systematic_counts_are_within_one_of_their_expectation(p, spread, seed):
    log_w = spread * randn(p, seed=seed) - 300
    counts = torch.bincount(systematic(log_w, generator=rng(seed)), minlength=p)
    expected = p * torch.softmax(log_w, 0)
    assert counts.sum() == p
    assert ((counts - expected).abs() < 1 + 1e-9).all()


def test_systematic_resampling_is_unbiased():
    """Mean counts of 4,000 draws against P w, 6e-7 for each of 5; without its random offset it fails."""
    log_w = torch.tensor([0.0, -1.0, 0.5, -3.0, 1.2], dtype=torch.float64)
    g = rng(0)
    counts = torch.stack([torch.bincount(systematic(log_w, generator=g), minlength=5) for _ in range(4_000)]).double()
    expected = 5 * torch.softmax(log_w, 0)
    assert z_scores(counts, expected).abs().max() < LIMIT
    ends = torch.softmax(log_w, 0).cumsum(0)
    middle = torch.searchsorted(ends, (torch.arange(5) + 0.5) / 5)
    wrong = counts - expected + torch.bincount(middle, minlength=5)  # the same spread about the counts at u = 1/2
    assert z_scores(wrong, expected).abs().max() > LIMIT


@pytest.mark.parametrize(
    ("log_w", "kept"),
    [
        ([0.0, float("-inf"), float("-inf")], [0, 0, 0]),
        ([float("-inf"), 0.0, float("-inf")], [1, 1, 1]),
        ([1e4, 0.0, 1e4], [0, None, 2]),
        ([5.0, 5.0, 5.0], [0, 1, 2]),
    ],
)
def test_a_particle_without_weight_dies(log_w, kept):
    for seed in range(20):
        indices = systematic(torch.tensor(log_w), generator=rng(seed)).tolist()
        assert all(k is None or i == k for i, k in zip(indices, kept, strict=True))
        assert all(log_w[i] == max(log_w) for i in indices)


def test_effective_share_at_its_ends():
    for log_w, share in (
        ([-700.0] * 4, 1),
        ([0.0, -800.0, -800.0, -800.0], 1 / 4),
        ([9.0, 9.0, -800.0, -800.0], 1 / 2),
    ):
        assert effective_share(torch.tensor(log_w, dtype=torch.float64)) == pytest.approx(share)


# ---- SMC -----------------------------------------------------------------------------------------------


@given(st.integers(1, 5), st.floats(0.05, 3), SEEDS)
def test_the_transition_ratio_is_that_of_two_gaussians(dim, std, seed):
    mean, shift, xi = randn(3, 7, dim, seed=seed)
    x = mean + std * (shift + xi)
    ratio = Normal(mean, std).log_prob(x) - Normal(mean + std * shift, std).log_prob(x)
    assert_close(log_transition_ratio(xi, shift), ratio.sum(1), 1e-10, 1 + (xi**2 + shift**2).sum(1))


def population_scores(p1, reward, proposal, p=16, runs=200, steps=6):
    """Scores of the evidence and of the evidence-weighted moments over independent small populations.

    For a Gaussian p₁ the base chain ends in a Gaussian known exactly, steps included, and so do its tilt and E[e^r].
    The estimates Ẑ of the latter, and Ẑ (mean of f − E*[f]), have no bias for any number of particles.
    """
    mean, cov = impulse_moments(p1.drift, p1.dim, time_grid(steps), pytest.MonkeyPatch())
    chain = GaussianMixture(torch.ones(1, dtype=torch.float64), mean[None], (cov + cov.T)[None] / 2)
    tilted, evidence = chain.tilt(reward), float(chain.log_partition(reward).exp())
    g, z, shifts = rng(0), [], []
    for _ in range(runs):
        particles, _ = smc(ExactFlowMap(p1), reward, p, steps=steps, proposal=proposal, generator=g)
        z.append(math.exp(particles.log_partition) / evidence)
        white = torch.linalg.solve(torch.linalg.cholesky(tilted.cov), (particles.samples - tilted.mean).T).T
        shifts.append(z[-1] * torch.cat([white.mean(0), (white**2).mean(0) - 1]))
    return torch.cat([z_scores(torch.tensor(z).double(), 1.0)[None], z_scores(torch.stack(shifts), 0.0)]).abs()


SMC_P1 = gaussian()
SMC_REWARD = GaussianLikelihood(torch.tensor([0.8, -0.6], dtype=torch.float64), 2.0, 0.7)


@pytest.mark.parametrize("proposal", ["guided", "base"])
def test_smc_estimates_have_no_bias(proposal):
    """Populations of 16 in 6 steps, 200 of them: evidence and four moments, 1.3e-6 each (Student's t)."""
    assert population_scores(SMC_P1, SMC_REWARD, proposal).max() < LIMIT


def test_wrong_smc_fails(monkeypatch):
    """The twist without the ratio of transitions; resampling that does not resample; weights of the wrong sign."""
    with monkeypatch.context() as patch:
        patch.setattr(mfm_ref.baselines, "log_transition_ratio", lambda xi, shift: 0 * xi[:, 0])
        assert population_scores(SMC_P1, SMC_REWARD, "guided", runs=60).max() > LIMIT
    with monkeypatch.context() as patch:
        patch.setattr(mfm_ref.baselines, "log_transition_ratio", lambda xi, shift: -log_transition_ratio(xi, shift))
        assert population_scores(SMC_P1, SMC_REWARD, "guided", runs=60).max() > LIMIT
    for proposal in ("guided", "base"):
        with monkeypatch.context() as patch:
            patch.setattr(mfm_ref.baselines, "systematic", lambda log_w, generator: torch.arange(len(log_w)))
            assert population_scores(SMC_P1, SMC_REWARD, proposal, runs=60).max() > LIMIT


@pytest.mark.slow
@pytest.mark.parametrize("proposal", ["guided", "base"])
def test_smc_reaches_the_tilted_mixture(proposal):
    """Mean, mean square and the share of the right-hand mode of a tilted p₁ of three components, 16 populations of
    250 in 200 steps; 1.6e-4 each (Student's t), and a bias of the steps of up to two standard errors. The base law
    fails, and so does the tilt of half the reward."""
    p1, reward = line(), LinearReward(torch.tensor([0.6], dtype=torch.float64))
    g = rng(1)
    runs = [smc(ExactFlowMap(p1), reward, 250, steps=200, proposal=proposal, generator=g)[0] for _ in range(16)]
    samples = torch.stack([run.samples[:, 0] for run in runs])
    estimates = torch.stack([samples.mean(1), (samples**2).mean(1), (samples > 1).double().mean(1)], 1)

    def worst(law):
        mean, square = float(law.mean), float(law.cov + law.mean**2)
        truth = torch.tensor([mean, square, 1 - float(line_cdf(law)(1.0))], dtype=torch.float64)
        return z_scores(estimates, truth).abs().max()

    assert worst(p1.tilt(reward)) < LIMIT
    assert worst(p1) > LIMIT
    assert worst(p1.tilt(LinearReward(torch.tensor([0.3], dtype=torch.float64)))) > LIMIT
    assert all(0 < share <= 1 + 1e-12 for run in runs for share in run.ess)


@given(st.integers(1, 4), st.integers(1, 6), st.none() | st.integers(1, 4), SEEDS)
def test_smc_costs_four_evaluations_a_step_and_chunks_do_not_matter(steps, p, max_rows, seed):
    """4K − 2 a particle: map and reward, forward and backward, with no backward pass in the last step; base 2K.

    With a shaped state of six numbers, and a label that every row must arrive with.
    """
    p1, reward = random_mixture(6, 1, seed), LinearReward(randn(6, seed=seed))
    for proposal, formula in (("guided", evaluations("smc", steps)), ("base", 2 * steps)):
        arguments = {"steps": steps, "proposal": proposal}
        flat, cost = smc(ExactFlowMap(p1), reward, p, generator=rng(seed), **arguments)
        assert cost.evaluations == formula
        X, y = Shaped(ExactFlowMap(p1), (2, 3), want=4), torch.full((p,), 4)
        shaped, cost = smc(
            X, lambda x: reward(x.flatten(1)), p, y=y, max_rows=max_rows, generator=rng(seed), **arguments
        )
        assert cost.evaluations == formula
        assert X.largest <= (max_rows or p)
        assert_close(shaped.samples.flatten(1), flat.samples, 1e-9, 1 + flat.samples.abs().max())
        assert shaped.ess == pytest.approx(flat.ess)
        assert shaped.log_partition == pytest.approx(flat.log_partition, abs=1e-9)


def test_smc_resamples_below_its_threshold_only(monkeypatch):
    calls = []
    monkeypatch.setattr(
        mfm_ref.baselines, "systematic", lambda log_w, generator: calls.append(0) or torch.arange(len(log_w))
    )
    X, reward, count = ExactFlowMap(SMC_P1), SMC_REWARD, {}
    for threshold in (0.0, 0.7, 1.0):
        calls.clear()
        particles, _ = smc(X, reward, 50, steps=10, proposal="base", threshold=threshold, generator=rng(0))
        count[threshold] = len(calls)
        assert len(calls) == 1 + sum(share < threshold for share in particles.ess[:-1])
    assert 1 == count[0.0] < count[0.7] < count[1.0] <= 10


# ---- expensive posteriors ------------------------------------------------------------------------------

STEPS = [16, 32, 64, 128]


@pytest.mark.parametrize("t", [0.0, 0.3, 0.8])
def test_glass_rollouts_converge_to_the_exact_map_at_order_one(t):
    """The same noises, against X_{0,1} of the oracle, which does not use E12."""
    p1 = random_mixture(2, 2, seed=3)
    x, eps = p1.marginal(t).sample(4, generator=rng(0)), randn(3, 4, 2, seed=1)
    X = ExactFlowMap(p1)
    exact = torch.stack([X(0.0, 1.0, noise, t, x) for noise in eps])
    errors = [float((glass_rollout(p1.drift, t, x, 3, k, eps=eps) - exact).norm()) for k in STEPS]
    assert slope(STEPS, errors) == pytest.approx(-1, abs=0.15)
    assert errors[-1] < 0.03 * exact.norm()
    wrong = glass_rollout(p1.drift, t / 2, x, 3, STEPS[-1], eps=eps) if t > 0 else eps
    assert float((wrong - exact).norm()) > 3 * errors[-1]


@given(cases(p1=mixtures(max_components=2, max_dim=3), t=INTERIOR, s=INTERIOR))
def test_a_glass_rollout_answers_to_the_protocol(case: Case):
    """One step is E12; `velocity` is the quotient off the diagonal and E12 on it, row by row."""
    X = GlassRollout(case.p1.drift, (case.p1.dim,), 1, torch.float64)
    b = glass_drift(case.p1.drift, case.s, case.z, case.t, case.x)
    jump = (case.u - case.s).expand(case.size).unsqueeze(-1)
    scale = 1 + b.abs().max() + case.z.abs().max()
    assert_close(X(case.s, case.u, case.z, case.t, case.x), case.z + jump * b, 1e-12, scale)
    X = GlassRollout(case.p1.drift, (case.p1.dim,), 4, torch.float64)
    assert_close(X.velocity(case.s, case.s, case.z, case.t, case.x), b, 1e-12, scale)
    mean = X.velocity(case.s, case.u, case.z, case.t, case.x)
    end = X(case.s, case.u, case.z, case.t, case.x)
    assert_close(case.z + jump * mean, end, 1e-10, scale + end.abs().max())
    assert_close(mean[jump[:, 0] == 0], b[jump[:, 0] == 0], 1e-10, scale)


def test_algorithms_run_on_a_glass_rollout():
    """MFM-Search on the expensive posterior comes to what it does on the exact one, as the steps grow."""
    p1, reward = gaussian(), SMC_REWARD
    exact, _ = search(ExactFlowMap(p1), reward, 8, particles=1, n=1, steps=3, generator=rng(0))
    errors = []
    for steps in STEPS:
        X = GlassRollout(p1.drift, (2,), steps, torch.float64)
        found, _ = search(X, reward, 8, particles=1, n=1, steps=3, generator=rng(0))
        errors.append(float((found - exact).norm()))
    assert slope(STEPS, errors) == pytest.approx(-1, abs=0.15)
    smc(X, reward, 4, steps=2, proposal="base", generator=rng(0))
    best_of_n(X, reward, 2, 2, steps=2, generator=rng(0))


@pytest.mark.parametrize("t", [0.0, 0.4])
def test_sde_rollouts_converge_to_the_posterior_at_weak_order_one(t, monkeypatch):
    """Mean and covariance of a Gaussian posterior without Monte Carlo error: one row for each unit impulse of noise."""
    p1 = gaussian()
    x = p1.marginal(t).sample(1, generator=rng(0))
    truth, errors = p1.posterior(t, x), []
    for steps in STEPS:
        impulses = torch.cat([torch.zeros(1, steps * 2), torch.eye(steps * 2)]).to(torch.float64)
        per_step = iter(impulses.split(2, dim=1))
        with monkeypatch.context() as patch:
            patch.setattr(torch, "randn", lambda *args, per_step=per_step, **kwargs: next(per_step).clone())
            end = sde_rollout(p1.drift, t, x.expand(len(impulses), 2), 1, steps)[0]
        assert next(per_step, None) is None  # one fresh noise a step
        response = end[1:] - end[0]
        errors.append(float((end[0] - truth.mean).norm() + (response.T @ response - truth.cov).norm()))
    assert slope(STEPS, errors) == pytest.approx(-1, abs=0.15)
    assert errors[-1] < 0.05 * truth.cov.norm()


@pytest.mark.parametrize("sources", [1, 3])
def test_sde_rollouts_have_the_posterior_moments_of_each_context(sources):
    """4,000 draws of a bimodal p₁ in each of three contexts, two statistics of 6e-7 each; another context's fail. From
    one generator, and from one for each context."""
    p1 = line()
    t = torch.tensor([0.0, 0.3, 0.6], dtype=torch.float64)
    x = torch.tensor([[1.0], [0.1], [-0.2]], dtype=torch.float64)
    source = rng(0) if sources == 1 else [rng(k) for k in range(sources)]
    draws = sde_rollout(p1.drift, t, x, 4_000, 150, generator=source)
    truth = p1.posterior(t, x)
    for row in range(3):
        assert moment_scores(draws[:, row], truth.mean[row], truth.cov[row]) < LIMIT
        assert moment_scores(draws[:, (row + 1) % 3], truth.mean[row], truth.cov[row]) > LIMIT


@pytest.mark.parametrize("rollout", [glass_rollout, sde_rollout])
def test_rollouts_pass_labels_and_take_any_shape(rollout):
    """The drift towards the point y: every posterior is that point. Three draws in three contexts."""
    y = torch.tensor([5.0, 7.0, 11.0])

    def towards(t, x, y):
        t = torch.as_tensor(t, dtype=x.dtype).expand(len(x)).reshape(-1, 1, 1)
        return (y.reshape(-1, 1, 1) - x) / (1 - t).clamp(min=1e-9)

    x = torch.randn(3, 2, 3, generator=rng(0))
    draws = rollout(towards, torch.tensor([0.0, 0.5, 0.25]), x, 3, 4, y=y, generator=rng(0))
    assert draws.shape == (3, 3, 2, 3)
    assert_close(draws, y.reshape(1, 3, 1, 1).expand(3, 3, 2, 3), 1e-4)


@pytest.mark.parametrize("rollout", [glass_rollout, sde_rollout])
def test_the_draws_of_a_context_come_from_its_own_generator(rollout):
    """The same in any batch of contexts, to the bit for a drift of each entry alone; not so from one generator. The
    draws of a context differ from each other, and two calls go on where the first stopped."""
    x, t = randn(4, 2, 3, seed=1), torch.tensor([0.0, 0.3, 0.6, 0.9], dtype=torch.float64)

    def call(rows, source):
        return rollout(lambda t, x: torch.sin(2 * x), t[rows], x[rows], 3, 2, generator=source)

    sources = [rng(k) for k in range(4)]
    first, second = (call(range(4), sources) for _ in range(2))
    part = [2, 0]
    some = [rng(k) for k in part]
    assert torch.equal(call(part, some), first[:, part])
    assert torch.equal(call(part, some), second[:, part])
    assert not torch.equal(call(part, rng(0)), call(range(4), rng(0))[:, part])
    assert len(first[:, 0, 0, 0].unique()) == 3
    assert not torch.equal(first, second)
    with pytest.raises(ValueError, match="generators must be one for each of 4 rows, got 3"):
        call(range(4), sources[:3])


def test_states_keep_their_dtype():
    X, reward = ExactFlowMap(gaussian().to(torch.float32)), SMC_REWARD
    x = torch.zeros(2, 2)
    for proposal in ("guided", "base"):
        assert smc(X, reward, 4, steps=2, proposal=proposal)[0].samples.dtype == torch.float32
    assert best_of_n(X, reward, 2, 2, steps=2)[0].dtype == torch.float32
    assert search(X, reward, 2, steps=2, transition="deterministic")[0].dtype == torch.float32
    for rollout in (glass_rollout, sde_rollout):
        assert rollout(X.drift, 0.5, x, 2, 2).dtype == torch.float32


# ---- errors --------------------------------------------------------------------------------------------


def test_a_map_that_breaks_is_named_with_its_step():
    def late(s, u, z, t, x, y):
        return z + (u - s) * torch.where(torch.maximum(s, t) > 0.4, float("nan"), 1.0)

    X = MapOf(late, (2,))
    with pytest.raises(ValueError, match=r"step 3 of 4, at t = 0\.5.*must be finite"):
        best_of_n(X, first, 2, 2, steps=4)
    with pytest.raises(ValueError, match=r"step 3 of 4, at t = 0\.5: the denoiser must be finite"):
        smc(X, first, 2, steps=4, proposal="base")


def fails(x1):
    raise RuntimeError("the scorer is gone")


@pytest.mark.parametrize(
    ("reward", "match"),
    [
        (fails, "raised RuntimeError: the scorer is gone"),
        (lambda x: first(x) + float("nan"), "the reward must be finite"),
        (lambda x: x, r"one number per sample, shape \(4,\), got \(4, 2\)"),
        (lambda x: first(x) - first(x).sum(), "must not depend on the other samples"),
    ],
)
def test_a_bad_reward_is_named_with_its_step(reward, match):
    X = ExactFlowMap(random_mixture(2, 2, 0))
    with pytest.raises(ValueError, match=r"step 2 of 2, at t = 1: .*" + match):
        best_of_n(X, reward, 2, 2, steps=2, generator=rng(0))
    for proposal in ("guided", "base"):
        with pytest.raises(ValueError, match=r"step [12] of 2, at t = .*" + match):
            smc(X, reward, 4, steps=2, proposal=proposal, generator=rng(0))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"n_particles": 0}, "n_particles must be an integer >= 1"),
        ({"steps": 0}, "steps must be an integer >= 1"),
        ({"max_rows": 0}, "max_rows must be an integer >= 1"),
        ({"times": [0.0, 0.5]}, "rise strictly from 0 to 1"),
        ({"proposal": "dps"}, 'proposal must be "guided" or "base", got \'dps\''),
        ({"threshold": 1.5}, r"threshold must lie in \[0, 1\], got 1.5"),
        ({"y": torch.tensor([1, 1, 2])}, r"labels y must be one class: .* got \[1, 2\]"),
        ({"reward": lambda x: first(x).detach()}, r"step 1 of 2, at t = 0: proposal \"guided\" needs a differentiable"),
        ({"X": ReadsX(gaussian())}, r"step 1 of 2, at t = 0: .*needs t > 0, got t = 0"),
    ],
)
def test_smc_refuses(change, match):
    arguments = {"X": ExactFlowMap(gaussian()), "reward": SMC_REWARD, "n_particles": 3, "steps": 2} | change
    with pytest.raises(ValueError, match=match):
        smc(**arguments)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"n_samples": 0}, "n_samples must be an integer >= 1"),
        ({"n": 0}, "n must be an integer >= 1"),
        ({"steps": 0}, "steps must be an integer >= 1"),
        ({"max_rows": 1.5}, "max_rows must be an integer >= 1"),
        ({"times": [0.0, 0.5]}, "rise strictly from 0 to 1"),
        ({"dynamics": "SDE"}, "dynamics must be one of"),
    ],
)
def test_best_of_n_refuses(change, match):
    arguments = {"n_samples": 2, "n": 2, "steps": 2} | change
    with pytest.raises(ValueError, match=match):
        best_of_n(ExactFlowMap(gaussian()), SMC_REWARD, **arguments)


def test_rollouts_refuse():
    p1, x = gaussian(), randn(2, 2, seed=0)
    with pytest.raises(ValueError, match="steps must be an integer >= 1"):
        GlassRollout(p1.drift, (2,), 0)
    X = GlassRollout(p1.drift, (2,), 2, torch.float64)
    with pytest.raises(ValueError, match="reads its context as x"):
        X.from_tx(0.0, 1.0, x, 0.5, x)
    with pytest.raises(ValueError, match="reads its context as x"):
        X.velocity_from_tx(0.0, 0.0, x, 0.5, x)
    with pytest.raises(ValueError, match="s <= u"):
        X(1.0, 0.5, x, 0.5, x)
    with pytest.raises(ValueError, match="n must be an integer >= 1"):
        sde_rollout(p1.drift, 0.5, x, 0, 2)
    with pytest.raises(ValueError, match="needs t < 1, got t = 1"):
        sde_rollout(p1.drift, torch.tensor([0.5, 1.0]), x, 1, 2)
    with pytest.raises(ValueError, match=r"step 1 of 2, at t = 0\.5: .*same shape"):
        sde_rollout(lambda t, x: x[:, 0], 0.5, x, 1, 2)
    with pytest.raises(ValueError, match=r"step 2 of 2, at t = 0\.75: .*must be finite"):
        sde_rollout(lambda t, x: x / (t[0] - 0.75), 0.5, x, 1, 2)
