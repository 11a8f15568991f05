"""E18: one loss whose expected gradient vanishes at the Doob drift, whatever the law of (t, x) and the weight.

And the plain regression beside it, whose minimiser is another drift.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mfm_ref import ExactFlowMap, GaussianLikelihood, LinearReward, finetune_loss
from mfm_ref.finetuning import regression_loss
from mfm_ref.noise import posterior_noise
from tests.helpers import LIMIT, MapOf, ReadsX, gaussian, line, normal, slope, z_scores
from tests.strategies import Case, assert_close, cases, mixtures, randn, rewards, rng

METHODS = ["gradient", "stein"]
WEIGHTS = {"constant": None, "early": lambda t: (1 - t) ** 2}
BLOCKS, SIZE = 60, 1_000

PROBLEMS = {
    "gaussian": (gaussian(), GaussianLikelihood(torch.tensor([0.8, -0.6], dtype=torch.float64), 2.0, 0.7)),
    "mixture": (line(), GaussianLikelihood(torch.ones(1, dtype=torch.float64), 1.0, 1.0)),
}


def base_path(p1, g) -> tuple[torch.Tensor, torch.Tensor]:
    """t uniform, x = I_t: on-policy for the base."""
    t = torch.rand(SIZE, generator=g, dtype=torch.float64)
    t[:: SIZE // 10] = 0.0  # σ² is infinite there, the loss is not
    x1 = p1.sample(SIZE, generator=g)
    return t, (1 - t.unsqueeze(-1)) * torch.randn(x1.shape, generator=g, dtype=x1.dtype) + t.unsqueeze(-1) * x1


def box(p1, g) -> tuple[torch.Tensor, torch.Tensor]:
    """t of density 2(1−t) up to 0.9, x uniform in a box: off every path."""
    t = 0.9 * (1 - torch.rand(SIZE, generator=g, dtype=torch.float64).sqrt())
    return t, 4 * torch.rand((SIZE, p1.dim), generator=g, dtype=torch.float64) - 2


def dps(p1, reward):
    """E20: the reward of the denoised state, (1−t) ∂r(D)/∂(t x), from the Jacobian of a mixture's denoiser."""

    def drift(t, x):
        with torch.enable_grad():
            tx = (t.unsqueeze(-1) * x).detach().requires_grad_()
            denoised = p1.posterior_from_tx(t, tx).mean
            push = torch.autograd.grad(reward(denoised).sum(), tx)[0]
        return p1.drift(t, x) + (1 - t.unsqueeze(-1)) * push

    return drift


def gradient_scores(p1, reward, candidate, law, weight, method) -> torch.Tensor:
    """z-scores of the expected gradient of E18 at the student b_θ = candidate + θ₀ + θ₁ x + θ₂ cos(3t), θ = 0.

    60 blocks of 1,000 samples: t-statistics of 59 degrees of freedom, for which |z| > 5 has probability 6e-6.
    """
    g, X, blocks = rng(0), ExactFlowMap(p1), []
    scale = float(p1.log_partition(reward))  # e^{r−c} is then of order one
    for _ in range(BLOCKS):
        t, x = law(p1, g)
        theta = torch.zeros(3, p1.dim, dtype=torch.float64, requires_grad=True)

        def student(t, x, theta=theta):
            return candidate(t, x) + theta[0] + theta[1] * x + theta[2] * (3 * t).cos().unsqueeze(-1)

        arguments = {"method": method, "weight": weight, "log_scale": scale, "generator": g}
        loss = finetune_loss(student, p1.drift, X, reward, t, x, **arguments)
        blocks.append(torch.autograd.grad(loss, theta)[0])
    return z_scores(torch.stack(blocks), 0.0).abs()


@pytest.mark.parametrize(
    ("problem", "law", "weight", "method"),
    [
        pytest.param("gaussian", law, weight, method, marks=[] if weight == "constant" else pytest.mark.slow)
        for law in (base_path, box)
        for weight in WEIGHTS
        for method in METHODS
    ]
    + [
        pytest.param("mixture", base_path, "early", "gradient", marks=pytest.mark.slow),
        ("mixture", box, "constant", "stein"),
    ],
)
def test_the_expected_gradient_vanishes_at_the_doob_drift_and_nowhere_else_tried(problem, law, weight, method):
    p1, reward = PROBLEMS[problem]
    tilted = p1.tilt(reward)

    def half(t, x):
        return (p1.drift(t, x) + tilted.drift(t, x)) / 2

    def doubled(t, x):
        return 2 * tilted.drift(t, x) - p1.drift(t, x)

    arguments = law, WEIGHTS[weight], method
    assert gradient_scores(p1, reward, tilted.drift, *arguments).max() < LIMIT
    wrongs = (p1.drift, half, doubled, dps(p1, reward)) if problem == "gaussian" else (half, dps(p1, reward))
    for wrong in wrongs:
        assert gradient_scores(p1, reward, wrong, *arguments).max() > LIMIT


@pytest.mark.parametrize("method", METHODS)
def test_the_minimiser_is_the_doob_drift_itself(method):
    """Least squares over affine students at one t = 0.3: on a Gaussian b* is affine, so nothing is left over.

    Blocks of 20,000 states off the path; the fitted coefficients in standard errors of 30 fits (t-statistics of
    29 degrees of freedom, |z| > 5 has probability 3e-5, for 6 coefficients).
    """
    p1, reward = PROBLEMS["gaussian"]
    tilted, X, t = p1.tilt(reward), ExactFlowMap(p1), 0.3
    ones = torch.ones(1, 2, dtype=torch.float64)
    origin = tilted.drift(t, 0 * ones)
    exact = torch.cat([origin, tilted.drift(t, torch.eye(2, dtype=torch.float64)) - origin])  # (3, 2)

    def fit(seed):
        x = 4 * torch.rand((20_000, 2), generator=rng(seed), dtype=torch.float64) - 2
        eps = randn(1, 20_000, 2, seed=100 + seed)

        def gradient(theta):
            theta = theta.requires_grad_()

            def student(t, x):
                return theta[0] + x @ theta[1:]

            loss = finetune_loss(student, p1.drift, X, reward, t, x, method=method, log_scale=-2.0, eps=eps)
            return torch.autograd.grad(loss, theta)[0]

        # The loss is quadratic in θ: its Hessian's columns are differences of gradients, and one solve ends it.
        zero = gradient(torch.zeros(3, 2, dtype=torch.float64))
        units = torch.eye(6, dtype=torch.float64).reshape(6, 3, 2)
        hessian = torch.stack([(gradient(unit.clone()) - zero).flatten() for unit in units])
        return torch.linalg.solve(hessian, -zero.flatten()).reshape(3, 2)

    fits = torch.stack([fit(seed) for seed in range(30)])
    assert z_scores(fits, exact).abs().max() < LIMIT
    base_origin = p1.drift(t, 0 * ones)
    base = torch.cat([base_origin, p1.drift(t, torch.eye(2, dtype=torch.float64)) - base_origin])
    assert z_scores(fits, base).abs().max() > LIMIT


# ---- the loss as a formula -----------------------------------------------------------------------------


@given(cases(p1=mixtures(max_components=1), t=st.floats(0, 0.95)), st.integers(1, 3), st.data())
def test_draws_and_targets_are_paired(case: Case, n, data):
    """The loss of a batch is the mean of the losses of its (draw, row) pairs, for both methods, with a weight."""
    reward, method = data.draw(rewards(case.p1.dim)), data.draw(st.sampled_from(METHODS))
    X, eps = ExactFlowMap(case.p1), randn(n, *case.x.shape, seed=case.seed)
    marks = randn(*case.x.shape, seed=case.seed + 1)
    times = case.t.expand(case.size)

    def loss(rows, draws):
        def student(t, x):
            return marks[rows] - t.reshape(-1, 1) * x

        noise = eps[draws, rows]
        options = {"n": len(noise), "method": method, "weight": lambda t: 1 + t, "eps": noise}
        return finetune_loss(student, case.p1.drift, X, reward, times[rows], case.x[rows], **options)

    pairs = [loss(slice(b, b + 1), slice(i, i + 1)) for i in range(n) for b in range(case.size)]
    mean, largest = torch.stack(pairs).mean(), max(pairs)
    assert_close(loss(slice(None), slice(None)), mean, 1e-9, 1 + largest)


@pytest.mark.parametrize("method", METHODS)
def test_one_pair_by_hand(method):
    """N(0, 1), r = x₁, t = 1/2: D_t(x) = x, den = 1/2, so X = x + ε/√2, ∂X/∂x = 1 and σ²/2 = 1.

    With x = 1, ε = 0.4 and b = 0, "gradient" regresses onto b + 1 and "stein" onto (X − x)/(1/2). w(1/2) = 6.
    """
    p1 = gaussian(1)
    p1 = p1._from_eigen(p1.log_weights, 0 * p1.means, p1.basis, torch.ones_like(p1.eigenvalues))
    x, eps = torch.ones(1, 1, dtype=torch.float64), torch.full((1, 1, 1), 0.4, dtype=torch.float64)
    draw = 1 + 0.4 / math.sqrt(2)
    target = 1.0 if method == "gradient" else 2 * (draw - 1)
    reward = LinearReward(torch.ones(1, dtype=torch.float64))
    options = {"method": method, "eps": eps, "weight": lambda t: 12 * t}
    loss = finetune_loss(lambda t, x: 3 + 0 * x, p1.drift, ExactFlowMap(p1), reward, 0.5, x, **options)
    assert loss.item() == pytest.approx(6 * math.exp(draw) * (3 - target) ** 2, rel=1e-12)


@given(st.floats(-5, 5), st.sampled_from(METHODS))
def test_log_scale_is_a_constant_factor(c, method):
    p1, reward = PROBLEMS["gaussian"]
    t, x, eps = torch.tensor([0.0, 0.3, 0.9], dtype=torch.float64), randn(3, 2, seed=1), randn(2, 3, 2, seed=2)

    def loss(scale):
        theta = torch.zeros(2, dtype=torch.float64, requires_grad=True)
        options = {"n": 2, "method": method, "log_scale": scale, "eps": eps}
        total = finetune_loss(lambda t, x: x + theta, p1.drift, ExactFlowMap(p1), reward, t, x, **options)
        return torch.cat([total.reshape(1), torch.autograd.grad(total, theta)[0]]).detach()

    plain = loss(0.0)
    assert_close(loss(c), math.exp(-c) * plain, 1e-12, math.exp(-c) * plain.abs())


@pytest.mark.parametrize("method", METHODS)
def test_only_the_student_is_trained(method):
    """Neither the base, nor the map, nor x receives a gradient."""
    p1, reward = PROBLEMS["gaussian"]
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    X = ExactFlowMap(p1)
    map_of = MapOf(lambda s, u, z, t, x, y: scale * X(s[:, 0], u[:, 0], z, t[:, 0], x), (2,))
    x = randn(3, 2, seed=1).requires_grad_()
    loss = finetune_loss(lambda t, x: x.detach(), lambda t, x: scale * x, map_of, reward, 0.4, x, method=method)
    assert not loss.requires_grad
    theta = torch.ones((), dtype=torch.float64, requires_grad=True)
    finetune_loss(lambda t, x: theta * x, lambda t, x: scale * x, map_of, reward, 0.4, x, method=method).backward()
    assert theta.grad is not None
    assert scale.grad is None


@pytest.mark.parametrize("method", METHODS)
def test_finite_at_time_zero(method):
    """Loss and gradient at t = 0, for one time and for a batch of them, where σ² is infinite."""
    p1, reward = PROBLEMS["mixture"]
    X, x, eps = ExactFlowMap(p1), randn(4, 1, seed=1), randn(2, 4, 1, seed=2)
    one, many = (
        finetune_loss(p1.drift, p1.drift, X, reward, t, x, n=2, method=method, eps=eps)
        for t in (0.0, torch.zeros(4, dtype=torch.float64))
    )
    assert torch.isfinite(one)
    assert one > 0
    assert_close(one, many, 1e-12)


def test_a_black_box_reward_trains_by_stein_and_labels_reach_every_call():
    """y goes to the student, the base and, repeated to the n draws, to the map."""
    y = torch.tensor([1, 0, 4])
    seen = {}

    def note(name):
        def drift(t, x, y):
            seen[name] = y.tolist()
            return torch.zeros_like(x)

        return drift

    def by_label(s, u, z, t, x, y):
        seen["map"] = y.tolist()
        return z + t * x

    for method, labels in (("gradient", True), ("stein", False)):
        seen.clear()
        X, x = MapOf(by_label, (2, 2)), randn(3, 2, 2, seed=1)
        reward = (lambda x1: x1.sum((1, 2))) if labels else (lambda x1: torch.from_numpy(x1.numpy().sum((1, 2))))
        finetune_loss(note("student"), note("base"), X, reward, 0.5, x, y, n=2, method=method)
        assert seen.pop("map") == 2 * y.tolist()
        assert set(seen) == ({"student", "base"} if labels else {"student"})  # "stein" needs no base
        assert all(value == y.tolist() for value in seen.values())


def test_a_generator_decides_the_loss():
    p1, reward = PROBLEMS["gaussian"]
    x = randn(3, 2, seed=1)
    losses = [
        finetune_loss(p1.drift, p1.drift, ExactFlowMap(p1), reward, 0.3, x, generator=rng(k)).item() for k in (0, 0, 1)
    ]
    assert losses[0] == losses[1] != losses[2]


# ---- the self-normalised regression --------------------------------------------------------------------
# At one (t, x) of N(0, 2) with r = −(1 − x₁)²/2σ², σ = 0.6. By hand: den = 2 t² + (1−t)², the posterior is
# N(2 t x/den, 2 (1−t)²/den), and X = 2 (t x)/den + (1−t) √(2/den) ε.

SIGMA, T, STATE = 0.6, 0.4, 0.7


def posterior_by_hand() -> tuple[float, float, float]:
    """Mean and standard deviation of the posterior, and ∂X/∂(t·x)."""
    den = 2 * T**2 + (1 - T) ** 2
    return 2 * T * STATE / den, (1 - T) * math.sqrt(2 / den), 2 / den


def estimate_by_hand(n: int, method: str) -> float:
    """E[b + Σ_i w_i g(X_i)] over n independent draws, by Gauss–Hermite quadrature in n dimensions."""
    mean, std, slope = posterior_by_hand()
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    x1 = mean + std * np.stack(np.meshgrid(*[nodes] * n, indexing="ij"))  # (n, 60, …, 60)
    probability = np.prod(np.meshgrid(*[weights / weights.sum()] * n, indexing="ij"), axis=0)
    factor = np.exp(-((1 - x1) ** 2) / (2 * SIGMA**2))
    base = (mean - STATE) / (1 - T)
    targets = base + (1 - T) * slope * (1 - x1) / SIGMA**2 if method == "gradient" else (x1 - STATE) / (1 - T)
    return float((probability * (factor * targets).sum(0) / factor.sum(0)).sum())


def minimiser(loss, eps, method: str) -> Tensor:
    """The constant student that minimises a loss on noises `(n, B, 1)`, all at one state: one Newton step from 0."""
    p1, reward = normal(2.0), GaussianLikelihood(torch.ones(1, dtype=torch.float64), 1.0, SIGMA)
    x, X = torch.full(eps.shape[1:], STATE, dtype=torch.float64), ExactFlowMap(p1)

    def gradient(value):
        theta = torch.tensor(value, dtype=torch.float64, requires_grad=True)
        total = loss(lambda t, x: theta + 0 * x, p1.drift, X, reward, T, x, n=len(eps), method=method, eps=eps)
        return torch.autograd.grad(total, theta)[0]

    return -gradient(0.0) / (gradient(1.0) - gradient(0.0))


def quantiles(n: int) -> Tensor:
    """n equally likely points of N(0, 1)."""
    return torch.special.ndtri((torch.arange(n, dtype=torch.float64) + 0.5) / n)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("n", "points"), [(1, 100_000), (2, 500)])
def test_the_minimiser_of_the_regression_is_the_mean_of_the_estimate(n, points, method):
    """On a grid of points^n equally likely draws, whose own error at these sizes is below 1e-3."""
    eps = torch.cartesian_prod(*[quantiles(points)] * n).reshape(-1, n).T.unsqueeze(-1)
    assert minimiser(regression_loss, eps, method).item() == pytest.approx(estimate_by_hand(n, method), abs=2e-3)


@pytest.mark.parametrize("method", METHODS)
def test_the_minimiser_of_the_regression_is_another_drift_and_tends_to_the_doob_drift(method):
    """Its distance to b* falls as 1/n, on Sobol points of the joint law of the n draws (two scramblings differ by less
    than 0.02 in the slope); that of E18 is none at n = 1, on 100,000 quantiles.
    """
    p1, reward = normal(2.0), GaussianLikelihood(torch.ones(1, dtype=torch.float64), 1.0, SIGMA)
    x = torch.full((1, 1), STATE, dtype=torch.float64)
    base, exact = p1.drift(T, x).item(), p1.tilt(reward).drift(T, x).item()
    assert minimiser(finetune_loss, quantiles(100_000).reshape(1, -1, 1), method).item() == pytest.approx(
        exact, abs=1e-3
    )
    one = estimate_by_hand(1, method)
    assert abs(one - exact) > 0.3 * abs(exact - base)
    if method == "stein":
        assert one == pytest.approx(base, rel=1e-12)  # no reward is left in it
    counts, biases = [8, 16, 32], []
    for n in counts:
        points = posterior_noise(8192, torch.zeros(1, n, dtype=torch.float64), generator=rng(0))  # (8192, 1, n)
        biases.append(abs(minimiser(regression_loss, points.permute(2, 0, 1), method).item() - exact))
    assert slope(counts, biases) == pytest.approx(-1, abs=0.2)


@given(cases(p1=mixtures(max_components=1), t=st.floats(0, 0.95)), st.sampled_from(METHODS), st.data())
def test_of_one_draw_e18_is_the_regression_times_e_to_the_r(case: Case, method, data):
    """Row by row: the two share their targets; the weight w(t) is a factor of both."""
    reward = data.draw(rewards(case.p1.dim))
    X, eps, times = ExactFlowMap(case.p1), randn(1, *case.x.shape, seed=case.seed), case.t.expand(case.size)
    draws = X(0.0, 1.0, eps[0], case.t, case.x)
    for k in range(case.size):
        row = slice(k, k + 1)
        options = {"n": 1, "method": method, "weight": lambda t: 1 + t, "eps": eps[:, row]}
        arguments = lambda t, x: 0 * x, case.p1.drift, X, reward, times[row], case.x[row]
        one, other = (loss(*arguments, **options) for loss in (finetune_loss, regression_loss))
        assert_close(one, reward(draws[row])[0].exp() * other, 1e-9, 1 + one)


def test_the_regression_passes_labels_and_weights_rows_by_the_time():
    y, seen = torch.tensor([1, 0]), []

    def by_label(s, u, z, t, x, y):
        seen.append(y.tolist())
        return z + 0 * x

    def student(t, x, y):
        seen.append(y.tolist())
        return torch.full_like(x, 2.0)

    X, x = MapOf(by_label, (1,)), torch.zeros(2, 1, dtype=torch.float64)
    t, eps = torch.tensor([0.2, 0.6], dtype=torch.float64), torch.zeros(3, 2, 1, dtype=torch.float64)
    options = {"n": 3, "method": "stein", "weight": lambda t: 5 * t, "eps": eps}
    loss = regression_loss(student, student, X, lambda x1: 0 * x1[:, 0], t, x, y, **options)
    assert seen == [3 * y.tolist(), y.tolist()]
    assert loss.item() == pytest.approx((1 + 3) * 2**2 / 2)  # the targets are 0


# ---- refusals and precision ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"method": "mfm"}, 'method must be "gradient" or "stein", got \'mfm\''),
        ({"t": 1.0, "method": "stein"}, "needs t < 1"),
        ({"t": torch.tensor([0.5, 1.0]), "method": "stein"}, "needs t < 1"),
        ({"t": 0.0, "X": ReadsX(gaussian())}, "needs t > 0"),
        ({"t": -0.5}, r"must lie in \[0, 1\]"),
        ({"t": torch.zeros(3)}, r"must have shape \(\) or \(2,\)"),
        ({"student": lambda t, x: x.sum(-1)}, "these must have the same shape"),  # B = D
        ({"base": lambda t, x: x.sum(-1)}, "these must have the same shape"),
        ({"n": 0}, "n must be an integer >= 1"),
        ({"n": 0, "method": "stein"}, "n must be an integer >= 1"),
        ({"eps": torch.zeros(2, 2, dtype=torch.float64)}, "eps must have shape"),
        ({"eps": torch.zeros(2, 2, 2, dtype=torch.float64)}, "eps must have shape"),
        ({"eps": torch.zeros(1, 2, 1, dtype=torch.float64)}, "eps must have shape"),
        ({"weight": lambda t: (1 - t).unsqueeze(-1)}, "these must have the same shape"),  # (B, 1)
    ],
)
@pytest.mark.parametrize("loss", [finetune_loss, regression_loss])
def test_both_losses_refuse(loss, change, match):
    p1, reward = PROBLEMS["gaussian"]
    arguments = {"student": p1.drift, "base": p1.drift, "X": ExactFlowMap(p1), "t": 0.5, "n": 1} | change
    names = ("student", "base", "X")
    positional = [arguments.pop(name) for name in names]
    with pytest.raises(ValueError, match=match):
        loss(*positional, reward, arguments.pop("t"), randn(2, 2, seed=1), **arguments)


@given(cases(p1=mixtures(max_components=1), t=st.floats(0, 0.9)), st.sampled_from(METHODS))
def test_float32_is_within_1e_4(case: Case, method):
    """Relative to the loss itself, on the same noises, with a reward of order one."""
    reward = GaussianLikelihood(torch.ones(case.p1.dim, dtype=torch.float64), 1.0, 2.0)
    p32 = case.p1.to(torch.float32)
    eps, t, x = randn(2, *case.x.shape, seed=case.seed).float(), case.t.float(), case.x.float()
    options = {"n": 2, "method": method}

    def loss(p1, *inputs, eps):
        return finetune_loss(lambda t, x: 0 * x, p1.drift, ExactFlowMap(p1), reward, *inputs, eps=eps, **options)

    exact, rounded = loss(case.p1, t.double(), x.double(), eps=eps.double()), loss(p32, t, x, eps=eps)
    assert rounded.dtype == torch.float32
    assert_close(rounded.double(), exact, 1e-4, 1 + exact)


# ---- a gain of the guidance ----------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [1.0, 0.25, 3.0])
def test_with_a_gain_the_minimiser_is_the_base_and_so_many_times_the_guidance(gamma):
    """b + γ (b* − b), γ a function of the time: on 100,000 quantiles, at one state."""
    p1, reward = normal(2.0), GaussianLikelihood(torch.ones(1, dtype=torch.float64), 1.0, SIGMA)
    x = torch.full((1, 1), STATE, dtype=torch.float64)
    base, exact = p1.drift(T, x).item(), p1.tilt(reward).drift(T, x).item()

    def loss(*arguments, **options):
        return finetune_loss(*arguments, gain=lambda t: gamma / T * t, **options)

    found = minimiser(loss, quantiles(100_000).reshape(1, -1, 1), "gradient").item()
    assert found == pytest.approx(base + gamma * (exact - base), abs=3e-3)


def test_a_gain_is_of_the_gradient_form_and_of_the_times():
    p1, reward = PROBLEMS["gaussian"]
    x = randn(3, 2, seed=1)
    arguments = p1.drift, p1.drift, ExactFlowMap(p1), reward, 0.4, x
    with pytest.raises(ValueError, match='a gain needs method "gradient", got "stein"'):
        finetune_loss(*arguments, method="stein", gain=torch.ones_like)
    with pytest.raises(ValueError, match=r"must have the same shape: gain \(1,\), t \(3,\)"):
        finetune_loss(*arguments, gain=lambda t: t[:1])
