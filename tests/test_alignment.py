"""The value (E15), its gradients (E16, E17 and both), the Doob drift (E7) and DPS (E20), against closed forms."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mfm_ref import (
    MLP,
    ExactFlowMap,
    FlowMap,
    GaussianLikelihood,
    GaussianMixture,
    LinearReward,
    denoiser,
    doob_drift,
    dps_drift,
    finetune_loss,
    guidance,
    noise_scale,
    value,
    value_gradient,
)
from mfm_ref.alignment import context_gradient, unconditional_drift
from tests.helpers import LIMIT, MapOf, ReadsX, gaussian, line, slope, z_scores
from tests.strategies import INTERIOR, Case, assert_close, cases, mixtures, randn, rewards, rng, row_scale

METHODS = ["gradient", "stein", "controlled"]
GAUSSIANS = mixtures(max_components=1)


def pull(dim: int = 2) -> GaussianLikelihood:
    """A gentle reward: e^r varies by tens of per cent over a posterior, so 1/N expansions hold from N = 8 on."""
    a = torch.tensor([0.8, -0.6], dtype=torch.float64)[:dim]
    return GaussianLikelihood(a, 2.0, 0.8)


def exact_gradient(p1: GaussianMixture, reward, t, x: torch.Tensor) -> torch.Tensor:
    """∇V by automatic differentiation of the closed-form value (E5)."""
    x = x.detach().requires_grad_()
    return torch.autograd.grad(p1.value(reward, t, x).sum(), x)[0]


CONTEXT = torch.tensor([[0.3, -0.4]], dtype=torch.float64)

# ---- E15 -----------------------------------------------------------------------------------------------


def test_value_bias_falls_as_one_over_n_with_the_known_constant():
    """n (E V̂ − V) → −Var(e^r)/(2 E[e^r]²), where E[e^{2r}] is the value of the reward 2r, another closed form.

    6.4e6 draws make the standard error of the slope 0.02; the 1/n² term moves it by 0.05 from n = 8 on.
    """
    p1, reward, t = gaussian(), pull(), 0.3
    twice = GaussianLikelihood(reward.a, reward.y, reward.sigma / math.sqrt(2))
    truth = p1.value(reward, t, CONTEXT)
    constant = -((p1.value(twice, t, CONTEXT) - 2 * truth).exp() - 1) / 2
    sizes, biases = [8, 16, 32], []
    for n in sizes:
        estimates = value(ExactFlowMap(p1), reward, t, CONTEXT.expand(1_600_000 // n, 2), n, generator=rng(n))
        biases.append(float(estimates.mean() - truth))
    assert all(bias < 0 for bias in biases)  # Jensen
    assert slope(sizes, [-bias for bias in biases]) == pytest.approx(-1, abs=0.15)
    assert sizes[-1] * biases[-1] == pytest.approx(float(constant), rel=0.25)


def test_value_converges_to_the_closed_form():
    """ten contexts of a trimodal p₁ from t = 0 to t = 1; e^V̂ is an unbiased mean, judged in standard errors."""
    p1 = line()
    reward = GaussianLikelihood(torch.ones(1, dtype=torch.float64), 1.0, 0.7)
    t = torch.linspace(0, 1, 10, dtype=torch.float64)
    x = torch.linspace(-1, 1, 10, dtype=torch.float64).unsqueeze(-1)
    blocks = [value(ExactFlowMap(p1), reward, t, x, 100, generator=rng(k)).exp() for k in range(40)]
    estimates, truth = torch.stack(blocks), p1.value(reward, t, x)
    assert z_scores(estimates[:, :-1], truth.exp()[:-1]).abs().max() < LIMIT
    assert z_scores(estimates[:, :-1], truth.exp()[:-1] * 1.1).abs().max() > LIMIT
    assert_close(estimates[:, -1], truth.exp()[-1].expand(40), 1e-9)  # at t = 1 every draw is x


@given(cases(p1=GAUSSIANS))
def test_one_draw_gives_the_reward_itself(case: Case):
    X, eps = ExactFlowMap(case.p1), randn(1, *case.x.shape, seed=case.seed)
    reward = LinearReward(torch.ones(case.p1.dim, dtype=torch.float64))
    draw = X(0.0, 1.0, eps[0], case.t, case.x)
    assert_close(value(X, reward, case.t, case.x, 1, eps=eps), draw.sum(-1), 1e-12, 1 + draw.abs().sum(-1))


def test_value_of_a_linear_reward_sees_every_coordinate():
    """n draws at a fixed noise: the value is differentiable in x, and its slope is that of finite differences."""
    p1, eps = gaussian(3), randn(4, 3, 3, seed=1)
    X, reward, t = ExactFlowMap(p1), LinearReward(randn(3, seed=2)), torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    x = randn(3, 3, seed=3).requires_grad_()
    torch.autograd.gradcheck(lambda x: value(X, reward, t, x, 4, eps=eps), (x,))


# ---- E16, E17 ------------------------------------------------------------------------------------------


def test_gradient_estimators_converge_with_slopes_one_half_and_one():
    """Root-mean-square error ~ N^−1/2, bias ~ N^−1, against autodiff of the closed-form value.

    At each N, 8e5 independent draws: the bias at N = 64 is known to 11 %, which makes its slope's standard error 0.04;
    four of them is the tolerance. The error's slope is known to 0.01 and is off by up to 0.03 from the 1/N² variance.
    "controlled" has less than a third of the bias of the others here, known to 10 % at N = 8.
    """
    p1, reward, t = gaussian(), pull(), 0.3
    X, truth = ExactFlowMap(p1), exact_gradient(p1, reward, t, CONTEXT)
    sizes = [8, 16, 32, 64]
    errors, biases = ({method: [] for method in METHODS} for _ in range(2))
    for method in METHODS:
        for n in sizes:
            x = CONTEXT.expand(800_000 // n, 2)
            off = value_gradient(X, reward, t, x, n, method, noise="independent", generator=rng(n)) - truth
            errors[method].append(float(off.square().sum(1).mean().sqrt()))
            biases[method].append(float(off.mean(0).norm()))
    for method in METHODS:
        assert slope(sizes, errors[method]) == pytest.approx(-0.5, abs=0.06)
        assert biases[method][-1] < 0.02 * truth.norm()  # the limit is the truth, and not a neighbour of it
    for method in ("gradient", "stein"):
        assert slope(sizes, biases[method]) == pytest.approx(-1, abs=0.15)
        assert biases["controlled"][0] < biases[method][0] / 3
        assert biases["controlled"][1] < biases[method][1] / 3


@pytest.mark.parametrize("method", METHODS)
def test_quasi_monte_carlo_noise_converges_faster_to_the_same_limit(method):
    """Scrambled Sobol points, the default: error ~ N^−1 or better where independent draws have N^−1/2."""
    p1, reward, t = gaussian(), pull(), 0.3
    X, truth = ExactFlowMap(p1), exact_gradient(p1, reward, t, CONTEXT)
    sizes, errors = [8, 32, 128], []
    for n in sizes:
        x = CONTEXT.expand(2_000, 2)
        errors.append(float((value_gradient(X, reward, t, x, n, method, generator=rng(n)) - truth).square().mean()))
    assert slope(sizes, errors) < 2 * -0.75
    assert errors[-1] < (0.01 * float(truth.norm())) ** 2


@pytest.mark.parametrize("method", METHODS)
def test_gradient_estimators_on_a_trimodal_posterior(method):
    """Where the posterior has several modes the map bends; five contexts, N = 500: the bias is below
    the standard error of 20 blocks (t-statistics of 19 degrees of freedom: 5 is exceeded with 8e-5)."""
    p1 = line()
    X, reward = ExactFlowMap(p1), GaussianLikelihood(torch.ones(1, dtype=torch.float64), 1.0, 1.0)
    t = torch.linspace(0.05, 0.9, 5, dtype=torch.float64)
    x = torch.linspace(-1, 1, 5, dtype=torch.float64).unsqueeze(-1)
    estimates = torch.stack([value_gradient(X, reward, t, x, 500, method, generator=rng(k)) for k in range(20)])
    truth = exact_gradient(p1, reward, t, x)
    assert z_scores(estimates, truth).abs().max() < LIMIT
    assert z_scores(estimates, -truth).abs().max() > LIMIT
    assert z_scores(estimates, truth * (1 - t).unsqueeze(-1)).abs().max() > LIMIT


@pytest.mark.parametrize("method", METHODS)
@given(case=cases(p1=GAUSSIANS, t=INTERIOR), data=st.data())
def test_guidance_is_half_the_noise_scale_times_the_gradient(method, case: Case, data):
    """E7's product, on the same noises, for t > 0: two routes through the map, t·x and x, agree."""
    reward = data.draw(rewards(case.p1.dim))
    X, eps = ExactFlowMap(case.p1), randn(3, *case.x.shape, seed=case.seed)
    half = noise_scale(case.t) / 2
    gradient = value_gradient(X, reward, case.t, case.x, 3, method, eps=eps)
    expected = (half.unsqueeze(-1) if half.ndim else half) * gradient
    actual = guidance(X, reward, case.t, case.x, 3, method, eps=eps)
    assert_close(actual, expected, 1e-9, row_scale(expected))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("t", [0.0, 0.02, 0.5, 0.95])
def test_doob_drift_converges_to_the_drift_of_the_tilted_law(method, t):
    """E7 with t = 0 among the times, where σ² is infinite and the product is not.

    256 replicates of N = 1,000: the bias (≈ 1/N) is a third of a standard error; two contexts (B = D), two
    coordinates, 6e-7 each. Base drift, half guidance and the neighbour's context must be refused.
    """
    p1, reward = gaussian(), pull()
    X, tilted, x = ExactFlowMap(p1), p1.tilt(reward), p1.marginal(t).sample(2, generator=rng(5))
    many = x.expand(256, 2, 2).flatten(0, 1)
    estimates = doob_drift(X, reward, t, many, 1_000, method, generator=rng(6)).unflatten(0, (256, 2))
    truth, base = tilted.drift(t, x), p1.drift(t, x)
    assert z_scores(estimates, truth).abs().max() < LIMIT
    for wrong in (base, (base + truth) / 2, truth.flip(0)):
        assert z_scores(estimates, wrong).abs().max() > LIMIT


def test_guidance_of_a_linear_reward_at_time_zero_is_exact():
    """A Gaussian's draws move rigidly with t·x, so for r = a·x₁ one draw gives (1−t) Σ S_t⁻¹ a: Σ a at t = 0."""
    p1, a = gaussian(3), randn(3, seed=1)
    x = randn(3, 3, seed=2)
    g = guidance(ExactFlowMap(p1), LinearReward(a), torch.zeros(3, dtype=torch.float64), x, 1, generator=rng(3))
    assert_close(g, (p1.cov @ a).expand(3, 3), 1e-9)
    assert_close(g, p1.tilt(LinearReward(a)).drift(0.0, x) - p1.drift(0.0, x), 1e-9)


@pytest.mark.parametrize(("t", "method"), [(0.2, "controlled"), (0.2, "gradient"), (1.0, "gradient")])
def test_a_map_that_reads_x_is_guided_the_same_and_refused_at_zero(t, method):
    p1, reward, x = gaussian(), pull(), randn(4, 2, seed=1)
    eps = randn(5, 4, 2, seed=2)
    reads_x, reads_tx = ReadsX(p1), ExactFlowMap(p1)
    for function in (value_gradient, guidance, doob_drift):
        expected = function(reads_tx, reward, t, x, 5, method, eps=eps)
        assert_close(function(reads_x, reward, t, x, 5, method, eps=eps), expected, 1e-9, row_scale(expected))
    if t < 1:
        expected = dps_drift(reads_tx, reward, t, x)
        assert_close(dps_drift(reads_x, reward, t, x), expected, 1e-9, row_scale(expected))
    some = torch.tensor([0.5, 0.0, 0.5, 0.5], dtype=torch.float64)  # one row at 0 is enough
    for at_zero in (0.0, some):
        with pytest.raises(ValueError, match="needs t > 0"):
            guidance(reads_x, reward, at_zero, x, 5, method, eps=eps)
        with pytest.raises(ValueError, match="needs t > 0"):
            dps_drift(reads_x, reward, at_zero, x)
        stein = guidance(reads_tx, reward, at_zero, x, 5, "stein", eps=eps)
        assert_close(guidance(reads_x, reward, at_zero, x, 5, "stein", eps=eps), stein, 1e-12, row_scale(stein))


def test_the_gradient_of_the_value_vanishes_at_time_zero_and_stays_finite_at_one():
    p1, x = gaussian(), randn(4, 2, seed=1)
    X, reward = ExactFlowMap(p1), pull()
    for method in METHODS:
        assert_close(value_gradient(X, reward, 0.0, x, 3, method), torch.zeros_like(x), 1e-12)
    at_one = x.clone().requires_grad_()  # x₁ is known there: V = r
    expected = torch.autograd.grad(reward(at_one).sum(), at_one)[0]
    assert_close(value_gradient(X, reward, 1.0, x, 3, "gradient"), expected, 1e-9, row_scale(expected))
    assert_close(guidance(X, reward, 1.0, x, 3, "gradient"), torch.zeros_like(x), 1e-12)
    for function in (value_gradient, guidance, doob_drift):
        for method in ("stein", "controlled"):
            with pytest.raises(ValueError, match="needs t < 1"):
                function(X, reward, 1.0, x, 3, method)
    with pytest.raises(ValueError, match="t = 1"):
        dps_drift(X, reward, 1.0, x)


def test_stein_takes_a_black_box_and_gradient_names_it():
    p1, x, eps = gaussian(), randn(3, 2, seed=1), randn(8, 3, 2, seed=2)
    X, reward = ExactFlowMap(p1), pull()

    def black_box(x1):
        residual = 2.0 - x1.detach().numpy() @ np.array([0.8, -0.6])
        return torch.from_numpy(-(residual**2) / (2 * 0.8**2))

    expected = value_gradient(X, reward, 0.4, x, 8, "stein", eps=eps)
    assert_close(value_gradient(X, black_box, 0.4, x, 8, "stein", eps=eps), expected, 1e-12, row_scale(expected))
    for function in (value_gradient, guidance, doob_drift):
        for method in ("gradient", "controlled"):
            with pytest.raises(ValueError, match="needs a differentiable reward"):
                function(X, black_box, 0.4, x, 8, method, eps=eps)
    with pytest.raises(ValueError, match="needs a differentiable reward"):
        dps_drift(X, black_box, 0.4, x)


@pytest.mark.parametrize("method", METHODS)
def test_estimators_leave_no_graph_and_do_not_need_grad_mode(method):
    p1, x, eps = gaussian(), randn(3, 2, seed=1), randn(8, 3, 2, seed=2)
    X = ExactFlowMap(p1)
    expected = doob_drift(X, pull(), 0.4, x, 8, method, eps=eps)
    with torch.no_grad():
        assert torch.equal(doob_drift(X, pull(), 0.4, x, 8, method, eps=eps), expected)
    tracked = doob_drift(X, pull(), 0.4, x.clone().requires_grad_(), 8, method, eps=eps)
    assert not tracked.requires_grad
    assert torch.equal(tracked, expected)


# ---- readings of the diagonal --------------------------------------------------------------------------


@given(cases())
def test_denoiser_and_drift_are_those_of_the_mixture(case: Case):
    X = ExactFlowMap(case.p1)
    expected = case.p1.denoiser(case.t, case.x)
    assert_close(denoiser(X, case.t, case.x), expected, 1e-9, row_scale(expected, case.x))
    b = unconditional_drift(X, case.t, case.x)
    assert_close(b, case.p1.drift(case.t, case.x), 1e-9, row_scale(b))


@given(cases(t=INTERIOR), st.data())
def test_dps_is_the_gradient_of_the_reward_of_the_denoiser(case: Case, data):
    """E20 by automatic differentiation of r(D_t(x)) in x."""
    reward = data.draw(rewards(case.p1.dim))
    x = case.x.clone().requires_grad_()
    gradient = torch.autograd.grad(reward(case.p1.denoiser(case.t, x)).sum(), x)[0]
    half = noise_scale(case.t) / 2
    push = (half.unsqueeze(-1) if half.ndim else half) * gradient
    expected = case.p1.drift(case.t, case.x) + push
    assert_close(dps_drift(ExactFlowMap(case.p1), reward, case.t, case.x), expected, 1e-9, row_scale(expected, push))


def test_dps_at_time_zero_is_the_limit():
    """Finite at t = 0: D moves with Cov[x₁] t·x, so the push is Cov[x₁] ∇r(E[x₁]), for a mixture too."""
    p1, x = line(), randn(3, 1, seed=1)
    reward = GaussianLikelihood(torch.ones(1, dtype=torch.float64), 1.0, 0.7)
    slope_at_mean = (1.0 - p1.mean) / 0.7**2
    expected = p1.drift(0.0, x) + p1.cov @ slope_at_mean
    assert_close(dps_drift(ExactFlowMap(p1), reward, 0.0, x), expected, 1e-9, row_scale(expected))


@given(cases(p1=GAUSSIANS), st.integers(1, 3))
def test_context_gradient_pairs_draws_with_contexts(case: Case, n):
    """Draws and their shares of E18, one (i, b) at a time: the batch couples nothing."""
    X, eps = ExactFlowMap(case.p1), randn(n, *case.x.shape, seed=case.seed)
    reward = GaussianLikelihood(torch.ones(case.p1.dim, dtype=torch.float64), 1.0, 1.0)
    draws, r, pulls = context_gradient(X, reward, case.t, case.x, n, eps=eps)
    assert_close(r, reward(draws.flatten(0, 1)).unflatten(0, r.shape), 1e-12, 1 + r.abs())
    times = case.t.expand(case.size)
    for i in range(n):
        for b in range(case.size):
            row = slice(b, b + 1)
            noise = eps[i : i + 1, row]
            assert_close(draws[i, row], X(0.0, 1.0, noise[0], times[row], case.x[row]), 1e-11, row_scale(draws[i, row]))
            alone = guidance(X, reward, times[row], case.x[row], 1, "gradient", eps=noise)
            assert_close(pulls[i, row], alone, 1e-11, row_scale(alone))


# ---- refusals ------------------------------------------------------------------------------------------

BAD_REWARDS = {
    "wrong shape": (lambda x1: x1, "one number per sample"),
    "scalar": (lambda x1: x1.sum(), "one number per sample"),
    "not a tensor": (lambda x1: 0.0, "got float"),
    "numpy": (lambda x1: np.zeros(len(x1)), "got ndarray"),
    "NaN": (lambda x1: x1.sum(-1) * float("nan"), "the reward must be finite"),
    "one infinity": (lambda x1: x1.sum(-1) + torch.tensor([math.inf] + [0.0] * (len(x1) - 1)), "must be finite, got 1"),
}


@pytest.mark.parametrize("kind", BAD_REWARDS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("function", ["value", "value_gradient", "finetune_loss", "dps_drift"])
def test_rewards_that_do_not_fit_are_refused(kind, method, function):
    reward, match = BAD_REWARDS[kind]
    p1, x = gaussian(), randn(2, 2, seed=1)  # B = D: a (B, D) reward is not mistaken for (B,) either
    X = ExactFlowMap(p1)
    tuning = "stein" if method == "stein" else "gradient"  # it averages over draws: nothing to control
    calls = {
        "value": lambda: value(X, reward, 0.4, x, 2),
        "value_gradient": lambda: value_gradient(X, reward, 0.4, x, 2, method),
        "finetune_loss": lambda: finetune_loss(p1.drift, p1.drift, X, reward, 0.4, x, method=tuning),
        "dps_drift": lambda: dps_drift(X, reward, 0.4, x),
    }
    with pytest.raises(ValueError, match=match):
        calls[function]()


def test_a_reward_with_an_infinite_gradient_is_refused():
    """√|x₁| at the kink: the value is finite and its gradient is not."""
    X, x = ExactFlowMap(gaussian()), torch.zeros(2, 2, dtype=torch.float64)
    at_kink = MapOf(lambda s, u, z, t, x, y: t * x, (2,))
    with pytest.raises(ValueError, match="the gradient of the reward must be finite"):
        value_gradient(at_kink, lambda x1: x1.abs().sqrt().sum(-1), 0.5, x, 1)
    with pytest.raises(ValueError, match="the gradient of the reward must be finite"):
        dps_drift(MapOf(lambda s, u, z, t, x, y: z + (u - s) * t * x, (2,)), lambda x1: x1.abs().sqrt().sum(-1), 0.5, x)
    assert torch.isfinite(value_gradient(X, lambda x1: x1.abs().sqrt().sum(-1), 0.5, x, 1)).all()


@pytest.mark.parametrize("function", [value_gradient, guidance, doob_drift])
def test_unknown_methods_are_refused(function):
    with pytest.raises(ValueError, match="method must be one of controlled, gradient, stein, got 'mfm'"):
        function(ExactFlowMap(gaussian()), pull(), 0.4, CONTEXT, 2, "mfm")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"n": 0}, "n must be an integer >= 1"),
        ({"steps": 0}, "steps must be an integer >= 1"),
        ({"noise": "halton"}, 'noise must be "independent", "antithetic" or "sobol", got .halton.'),
        ({"eps": torch.zeros(3, 2, 2)}, r"eps must have shape \(2, 3, 2\), got \(3, 2, 2\)"),
        ({"max_rows": 0}, "max_rows must be an integer >= 1"),
        ({"y": torch.zeros(6, dtype=torch.long)}, r"labels y must have shape \(3,\), got \(6,\)"),
    ],
)
def test_counts_noises_and_labels_are_refused(method, change, match):
    arguments = {"n": 2} | change
    with pytest.raises(ValueError, match=match):
        doob_drift(ExactFlowMap(gaussian()), pull(), 0.4, randn(3, 2, seed=1), method=method, **arguments)


@pytest.mark.parametrize("t", [-0.1, 1.1, math.nan])
@pytest.mark.parametrize("function", [value, value_gradient, guidance, doob_drift])
def test_times_outside_the_unit_interval_are_refused(function, t):
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
        function(ExactFlowMap(gaussian()), pull(), t, CONTEXT, 2)


# ---- precision -----------------------------------------------------------------------------------------


@given(cases(p1=GAUSSIANS, t=st.floats(0, 0.9)), st.data())
def test_float32_is_within_1e_4(case: Case, data):
    """On the same noises, relative to the largest entry of the row; up to t = 0.9, where (1−t)⁻² is 100."""
    reward = data.draw(rewards(case.p1.dim))
    n, eps = 3, randn(3, *case.x.shape, seed=case.seed)
    double, single = ExactFlowMap(case.p1), ExactFlowMap(case.p1.to(torch.float32))
    t, x = case.t.float(), case.x.float()
    draws = double(0.0, 1.0, eps[0], case.t, case.x).detach()
    size = 1 + reward(draws).abs().max() + draws.abs().max()
    assert_close(
        value(single, reward, t, x, n, eps=eps.float()).double(), value(double, reward, t, x, n, eps=eps), 1e-4, size
    )
    for method in METHODS:
        exact = doob_drift(double, reward, t.double(), x.double(), n, method, eps=eps.float().double())
        rounded = doob_drift(single, reward, t, x, n, method, eps=eps.float())
        assert rounded.dtype == torch.float32
        assert_close(rounded.double(), exact, 1e-4, row_scale(exact) * size)


def test_an_mlp_is_aligned_like_the_oracle_it_starts_as():
    """`MLP` before training is the exact map of a Gaussian; everything above then holds for a network, t = 0 too."""
    p1, x, eps = gaussian(), randn(4, 2, seed=1), randn(5, 4, 2, seed=2)
    network = FlowMap(MLP(p1.mean, p1.cov, hidden=8, depth=1))
    for t in (0.0, 0.5):
        for method in METHODS:
            expected = doob_drift(ExactFlowMap(p1), pull(), t, x, 5, method, eps=eps)
            assert_close(doob_drift(network, pull(), t, x, 5, method, eps=eps), expected, 1e-9, row_scale(expected))
