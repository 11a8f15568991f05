"""E15, E16, E17 and their combination as functions of draws: by loops in NumPy, by autodiff, and by their limits."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mfm_ref import (
    ExactFlowMap,
    GaussianLikelihood,
    GaussianMixture,
    controlled_guidance,
    gradient_guidance,
    stein_guidance,
)
from mfm_ref.alignment import posterior_slopes
from mfm_ref.estimators import effective_sample_size, log_mean_exp, weighted_mean
from tests.helpers import LIMIT, line, slope, z_scores
from tests.strategies import SEEDS, assert_close, randn, rng

METHODS = ["gradient", "stein", "controlled"]
SHAPES = st.sampled_from([(), (1,), (3,), (2, 3)])
BEFORE_ONE = st.floats(0, 0.95)


def estimate(method: str, r: Tensor, draws: Tensor, pulls: Tensor, t) -> Tensor:
    """One of the three estimators, called alike."""
    if method == "gradient":
        return gradient_guidance(r, pulls)
    return stein_guidance(r, draws, t) if method == "stein" else controlled_guidance(r, draws, pulls, t)


def material(n: int, size: int, shape: tuple[int, ...], seed: int, spread: float = 1.5):
    """Rewards, draws and pulls of no particular law."""
    draws, pulls = randn(2, n, size, *shape, seed=seed)
    return spread * randn(n, size, seed=seed + 1), draws, pulls


def looped(method: str, r, draws, pulls, t, *, wrong: str = "") -> np.ndarray:
    """The three by their formulas, one sample and one draw at a time; and wrong ones.

    "sign": of β. "along": only the part along ĝ is left. "row": the weights of another row. "trust": all for R² = 1.
    "variance": e without the variances.
    """
    n, size = r.shape
    r, draws, pulls = (a.numpy().reshape(n, size, -1) for a in (r, draws, pulls))
    times = np.broadcast_to(np.asarray(t), (size,))
    result = np.zeros(draws.shape[1:])
    for b in range(size):
        values = r[:, (b + (wrong == "row")) % size, 0]
        weights = np.exp(values - values.max()) / sum(np.exp(values - values.max()))
        middle = sum(draws[i, b] for i in range(n)) / n
        shifts = [(draws[i, b] - middle) / (1 - times[b]) for i in range(n)]
        pull = sum(w * g for w, g in zip(weights, pulls[:, b], strict=True))
        shift = sum(w * f for w, f in zip(weights, shifts, strict=True))
        result[b] = {"gradient": pull, "stein": shift, "controlled": pull}[method]
        if method == "controlled" and n > 1:
            direction = pull / np.sqrt(sum(pull**2))
            f, g = (np.array([v @ direction for v in each]) for each in (shifts, pulls[:, b]))
            cov = np.cov(f, g, aweights=weights / 2 + 1 / (2 * n), bias=True)
            beta = np.clip((cov[0, 0] - cov[0, 1]) / (cov[0, 0] + cov[1, 1] - 2 * cov[0, 1]), 0, 1)
            squared = cov[0, 1] ** 2 / (cov[0, 0] * cov[1, 1])
            trust = max(0, 1 - (1 - squared) * (n - 1) / (n - 2)) if n > 2 else 0.0
            trust, beta = 1.0 if wrong == "trust" else trust, -beta if wrong == "sign" else beta
            apart, even = pull - shift, 1 / (n * sum(weights**2))
            spread = [
                np.cov(np.stack(each).T, aweights=weights / 2 + 1 / (2 * n), bias=True)
                for each in (shifts, pulls[:, b])
            ]
            varied_f, varied_g = (np.trace(np.atleast_2d(cov)) for cov in spread)
            even *= min(1, varied_f / varied_g) if wrong != "variance" else 1
            result[b] = shift + trust * beta * (apart @ direction) * direction + (1 - trust) * even * apart
            if wrong == "along":
                result[b] = (result[b] @ direction) * direction
    return result


def as_tensor(result: np.ndarray, like: Tensor) -> Tensor:
    return torch.from_numpy(result).reshape(like.shape[1:])


# ---- the formulas --------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@given(n=st.integers(1, 6), size=st.integers(1, 4), shape=SHAPES, seed=SEEDS, data=st.data())
def test_each_is_its_formula_sample_by_sample(method, n, size, shape, seed, data):
    """Shapes `(n, B)`, `(n, B, D)` with B = D among them, `(n, B, 2, 3)`; one time, or one for each row."""
    r, draws, pulls = material(n, size, shape, seed)
    times = data.draw(BEFORE_ONE | st.lists(BEFORE_ONE, min_size=size, max_size=size).map(torch.tensor))
    t = torch.as_tensor(times, dtype=torch.float64)
    actual = estimate(method, r, draws, pulls, t)
    assert actual.shape == draws.shape[1:]
    expected = as_tensor(looped(method, r, draws, pulls, t.numpy()), draws)
    assert_close(actual, expected, 1e-9, 1 + expected.abs().max())


@pytest.mark.parametrize("method", METHODS)
@given(n=st.integers(1, 5), seed=SEEDS)
def test_rows_do_not_meet(method, n, seed):
    """B = D = 3, a time for each row: each row alone gives what it gives in the batch."""
    r, draws, pulls = material(n, 3, (3,), seed)
    t = torch.tensor([0.0, 0.4, 0.9], dtype=torch.float64)
    together = estimate(method, r, draws, pulls, t)
    for b in range(3):
        row = slice(b, b + 1)
        alone = estimate(method, r[:, row], draws[:, row], pulls[:, row], t[row])
        assert_close(alone, together[row], 1e-12, 1 + together.abs().max())


@pytest.mark.parametrize("wrong", ["sign", "along", "row", "trust", "variance"])
def test_the_loop_notices_wrong_estimators(wrong):
    r, draws, pulls = material(5, 3, (3,), 1)
    pulls = draws + pulls / 2  # related, as pulls and shifts are
    pulls = 3 * pulls if wrong == "variance" else pulls  # and of more variance
    right, other = (looped("controlled", r, draws, pulls, 0.3, wrong=change) for change in ("", wrong))
    actual = controlled_guidance(r, draws, pulls, 0.3)
    assert float((actual - as_tensor(right, draws)).abs().max()) < 1e-12
    assert float((actual - as_tensor(other, draws)).abs().max()) > 0.05


@given(n=st.integers(1, 6), seed=SEEDS, t=st.floats(0.05, 0.95))
def test_e16_is_the_gradient_of_e15(n, seed, t):
    """A toy map, smooth and bent in its context: autodiff through `log_mean_exp` against the pulls of each draw."""
    eps, x = randn(n, 3, 2, seed=seed), randn(3, 2, seed=seed + 1)

    def reward_of(draws: Tensor) -> Tensor:
        return draws.sin().sum(-1) - draws.square().sum(-1) / 3

    def toy_map(context: Tensor) -> Tensor:
        return eps * (1 + context.square()).sqrt() + torch.sin(context + eps)

    leaf = x.clone().requires_grad_()
    expected = torch.autograd.grad(log_mean_exp(reward_of(toy_map(leaf))).sum(), leaf)[0] * (1 - t) / t
    each = x.repeat(n, 1, 1).requires_grad_()
    r = reward_of(toy_map(each))
    pulls = torch.autograd.grad(r.sum(), each)[0] * (1 - t) / t
    assert_close(gradient_guidance(r.detach(), pulls), expected, 1e-12, 1 + expected.abs().max())


# ---- what must not matter ------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@given(n=st.integers(1, 6), shape=SHAPES, seed=SEEDS, t=BEFORE_ONE, c=st.floats(-500, 500))
def test_invariances(method, n, shape, seed, t, c):
    """A constant in the reward, the order of the draws and the place of the origin do not matter; the unit scales."""
    r, draws, pulls = material(n, 2, shape, seed)
    expected = estimate(method, r, draws, pulls, t)
    size = (1 + expected.abs().max()) / (1 - t)
    order = torch.randperm(n, generator=rng(seed))
    assert_close(estimate(method, r + c, draws, pulls, t), expected, 1e-9, size)
    assert_close(estimate(method, r[order], draws[order], pulls[order], t), expected, 1e-9, size)
    assert_close(estimate(method, r, draws + c, pulls, t), expected, 1e-9, size)
    assert_close(estimate(method, r, 7 * draws, 7 * pulls, t), 7 * expected, 1e-9, 7 * size)


@pytest.mark.parametrize("method", METHODS)
def test_a_turn_of_the_axes_turns_the_guidance(method):
    r, draws, pulls = material(5, 4, (3,), 2)
    turn = torch.linalg.qr(randn(3, 3, seed=3)).Q
    expected = estimate(method, r, draws, pulls, 0.4) @ turn
    assert_close(estimate(method, r, draws @ turn, pulls @ turn, 0.4), expected, 1e-12, 1 + expected.abs().max())


@given(shape=SHAPES, seed=SEEDS, t=BEFORE_ONE)
def test_one_draw(shape, seed, t):
    """One draw says nothing of the posterior's shift: E17 is 0, and the combination is E16, which is the pull."""
    r, draws, pulls = material(1, 3, shape, seed)
    assert_close(stein_guidance(r, draws, t), torch.zeros_like(draws[0]), 0.0)
    assert_close(gradient_guidance(r, pulls), pulls[0], 0.0)
    assert_close(controlled_guidance(r, draws, pulls, t), pulls[0], 1e-14, 1 + pulls.abs().max())


def test_no_pull_and_no_spread_are_no_special_cases():
    """A reward of steps pulls nowhere, and E17 alone sees it; equal draws are one draw."""
    r, draws, pulls = material(4, 2, (3,), 5)
    assert_close(controlled_guidance(r, draws, 0 * pulls, 0.5), stein_guidance(r, draws, 0.5), 1e-14)
    r, draws, pulls = (a[:1].expand_as(a) for a in (r, draws, pulls))
    assert_close(controlled_guidance(r, draws, pulls, 0.5), pulls[0], 1e-12)
    assert_close(stein_guidance(r, draws, 0.5), 0 * pulls[0], 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pulls_equal_but_for_rounding_are_exact_along_themselves(dtype):
    """A linear reward of a Gaussian: R² would be one rounding error over another, and the result of chance."""
    r, draws, _ = (a.to(dtype) for a in material(5, 3, (4,), 8))
    pull = randn(3, 4, seed=9).to(dtype)
    noise = randn(5, 3, 4, seed=10).to(dtype)
    pulls = pull * (1 + 10 * torch.finfo(dtype).eps * noise)
    unit = torch.nn.functional.normalize(pull, dim=-1)
    guided = controlled_guidance(r, draws, pulls, 0.5)
    tol = 1e4 * torch.finfo(dtype).eps
    assert_close((guided * unit).sum(-1), pull.norm(dim=-1), tol)
    assert_close(guided, controlled_guidance(r, draws, pull.expand_as(pulls), 0.5), tol)


def test_equal_rewards_guide_nowhere():
    """E17 has no noise in this case; E16 is the mean of the pulls, which a constant reward has at 0."""
    _, draws, pulls = material(4, 2, (3,), 6)
    flat = torch.full((4, 2), 3.0, dtype=torch.float64)
    assert_close(stein_guidance(flat, draws, 0.5), torch.zeros_like(draws[0]), 1e-14)
    assert_close(gradient_guidance(flat, pulls), pulls.mean(0), 1e-14)


# ---- no noise where draw and pull are linear -------------------------------------------------------------


def kalman(draws: Tensor, a: Tensor, y: float, sigma: float, c: float, t: float) -> Tensor:
    """(Kalman gain) · innovation/(1−t) along a/‖a‖, `(B,)`, with the mean of the draws as the posterior's."""
    innovation = y - draws.mean(0) @ a
    return c**2 * a.norm() / (c**2 * a.norm() ** 2 + sigma**2) * innovation / (1 - t)


@given(
    n=st.integers(3, 8),
    dim=st.integers(1, 4),
    seed=SEEDS,
    t=BEFORE_ONE,
    c=st.floats(0.1, 2),
    sigma=st.floats(0.2, 2),
    y=st.floats(-2, 2),
)
def test_the_control_variate_removes_all_noise_along_a_quadratic_reward(n, dim, seed, t, c, sigma, y):
    """For N(m, c²I) and r = −(y − a·x₁)²/2σ² the value along ĝ = ±a/‖a‖ is the closed form, whatever the draws.

    Only the mean of the draws stands in the place of m. Neither part alone does it, nor does another β. (Two draws lie
    on a line always, so that from three on this says something of the law.)
    """
    a, mean = randn(dim, seed=seed), randn(3, dim, seed=seed + 1)
    draws = mean + c * randn(n, 3, dim, seed=seed + 2)  # a flow map of this law: X = m + c ε, ∂m/∂(t x) = c²/(1−t)²
    r = -((y - draws @ a) ** 2) / (2 * sigma**2)
    pulls = (c**2 / (1 - t) * (y - draws @ a) / sigma**2).unsqueeze(-1) * a
    along = controlled_guidance(r, draws, pulls, t) @ (a / a.norm())
    expected = kalman(draws, a, y, sigma, c, t)
    # ĝ is the direction of a weighted sum, which may nearly cancel: rounding there is as large as the pulls' is.
    assert_close(along, expected, 1e-8, (1 + pulls.abs().amax((0, 2))) / (1 - t))


def test_other_combinations_are_not_exact():
    """The same, once, with the exact value missed by what only looks like it."""
    a, c, sigma, y, t = torch.tensor([1.0, 0.5], dtype=torch.float64), 0.8, 0.7, 1.5, 0.4
    draws = c * randn(4, 3, 2, seed=1)
    r = -((y - draws @ a) ** 2) / (2 * sigma**2)
    pulls = (c**2 / (1 - t) * (y - draws @ a) / sigma**2).unsqueeze(-1) * a
    truth = kalman(draws, a, y, sigma, c, t)
    unit = a / a.norm()
    right = as_tensor(looped("controlled", r, draws, pulls, t), draws) @ unit
    assert_close(right, truth, 1e-12)
    wrong = {
        "gradient": gradient_guidance(r, pulls) @ unit,
        "stein": stein_guidance(r, draws, t) @ unit,
        "sign of β": as_tensor(looped("controlled", r, draws, pulls, t, wrong="sign"), draws) @ unit,
        "time": controlled_guidance(r, draws, pulls, t / 2) @ unit,
    }
    for name, value in wrong.items():
        assert float((value - truth).abs().min()) > 0.01, name


# ---- consistency -----------------------------------------------------------------------------------------

NODES = 2**14
# Independent noises are picked among these, the normal distribution's quantiles at equal steps of probability.
QUANTILES = torch.special.ndtri((torch.arange(NODES, dtype=torch.float64) + 0.5) / NODES)


def errors_of(method: str, population: tuple[Tensor, Tensor, Tensor], t: float, truth: float, sizes, total: int):
    """Root mean square error and bias at each n, and the standard error of the bias, from `total` draws each."""
    r, draws, pulls = population
    found = []
    for n in sizes:
        pick = torch.randint(NODES, (n, total // n), generator=rng(n))
        off = estimate(method, r[pick], draws[pick].unsqueeze(-1), pulls[pick].unsqueeze(-1), t) - truth
        found.append((float(off.square().mean().sqrt()), float(off.mean()), float(off.std()) / len(off) ** 0.5))
    return [list(column) for column in zip(*found, strict=True)]


@pytest.mark.parametrize("method", METHODS)
def test_bias_and_error_fall_as_they_must_for_a_reward_that_is_not_quadratic(method):
    """N(m, c²) and r = 2 sin 2x₁: the limit by quadrature on the same nodes; error ~ N^−1/2, bias ~ 1/N.

    3.2e6 draws at each N: the last bias is known to 15 % ("controlled", which has the smallest), its slope to 0.1.
    """
    m, c, t = 0.3, 0.5, 0.4
    draws = m + c * QUANTILES
    r, pulls = 2 * (2 * draws).sin(), c**2 / (1 - t) * 4 * (2 * draws).cos()
    truth = float(torch.softmax(r, 0) @ pulls)
    assert truth == pytest.approx(float(torch.softmax(r, 0) @ (draws - m)) / (1 - t), rel=1e-4)  # Stein's identity
    sizes = [8, 16, 32]
    errors, biases, noises = errors_of(method, (r, draws, pulls), t, truth, sizes, 3_200_000)
    assert slope(sizes, errors) == pytest.approx(-0.5, abs=0.1)  # 1/N² in the variance moves it by up to 0.08
    falls = slope(sizes, [abs(bias) for bias in biases])
    if method == "controlled":  # its weights follow the draws, so that its bias is no series in 1/N; here it is faster
        assert falls < -0.75
    else:
        assert falls == pytest.approx(-1, abs=0.25)
        assert abs(biases[-1]) > LIMIT * noises[-1]  # the slope is of something
    assert abs(biases[-1]) < 0.025 * abs(truth)


def trimodal(t: float, x: float) -> tuple[tuple[Tensor, Tensor, Tensor], float]:
    """Rewards, draws and pulls `(NODES,)` of the oracle in one context of `line`, and (σ²/2) ∇V in closed form."""
    p1, reward = line(), GaussianLikelihood(torch.ones(1, dtype=torch.float64), 1.0, 2.0)
    context = torch.tensor([[x]], dtype=torch.float64)
    eps = QUANTILES.reshape(-1, 1, 1)
    draws, r, slopes = posterior_slopes(ExactFlowMap(p1), reward, t, context, eps)
    context.requires_grad_()
    truth = torch.autograd.grad(p1.value(reward, t, context).sum(), context)[0] * (1 - t) / t
    return (r.flatten(), draws.flatten(), (1 - t) * slopes.flatten()), float(truth)


@pytest.mark.parametrize("method", METHODS)
def test_bias_and_error_fall_on_a_trimodal_posterior(method):
    """Error ~ N^−1/2; bias below 1/N of the truth, but for 5 standard errors of 0.1 % of it. 3.2e6 draws at each N.

    Only E17 has a bias large enough here to have a slope, and "controlled": E16's steep draws are rare, and where there
    are none it trusts the others, which is a bias of 2 to 3 times 1/N of the truth.
    """
    t = 0.5
    population, truth = trimodal(t, -0.2)
    sizes = [32, 64, 128]
    errors, biases, noises = errors_of(method, population, t, truth, sizes, 3_200_000)
    # The more draws, the more of E16's steep ones are seen, and the less "controlled" takes of it.
    assert slope(sizes, errors) == pytest.approx(-0.5, abs=0.15 if method == "controlled" else 0.06)
    for n, bias, noise in zip(sizes, biases, noises, strict=True):
        assert abs(bias) < (4 if method == "controlled" else 1) * abs(truth) / n + LIMIT * noise
        assert abs(bias - 0.1 * truth) > LIMIT * noise  # a tenth of the truth would be seen
    if method != "gradient":
        assert slope(sizes, [abs(bias) for bias in biases]) == pytest.approx(-1, abs=0.25)


@pytest.mark.parametrize("method", METHODS)
def test_weights_of_another_row_are_noticed(method):
    """Two contexts, 512 replicates of N = 400: right weights are within 5 standard errors of the truth."""
    contexts = [trimodal(0.5, x) for x in (-0.2, 0.9)]
    pick = torch.randint(NODES, (400, 512), generator=rng(1))
    r, draws, pulls = (torch.stack([population[k][pick] for population, _ in contexts], -1) for k in range(3))
    truth = torch.tensor([value for _, value in contexts], dtype=torch.float64)  # (2,)

    def scores(r: Tensor) -> Tensor:
        flat = (a.reshape(400, 1024, *shape) for a, shape in ((r, ()), (draws, (1,)), (pulls, (1,))))
        found = estimate(method, *flat, 0.5).reshape(512, 2)
        return z_scores(found, truth).abs()

    assert scores(r).max() < LIMIT
    assert scores(r.flip(-1)).max() > 2 * LIMIT
    assert scores(0 * r).max() > 2 * LIMIT


def test_modes_across_the_pull_are_seen_by_the_part_across_it():
    """Two modes far apart in the second coordinate, a reward of the first: its value differs between the modes.

    The pull between them is in rare draws, so that ĝ is the first axis most often, and the part along ĝ misses the
    second coordinate. 1,000 replicates of N = 16.
    """
    means = torch.tensor([[-0.3, -2.0], [0.3, 2.0]], dtype=torch.float64)
    half, eye = torch.full((2,), 0.5, dtype=torch.float64), torch.eye(2, dtype=torch.float64)
    p1, t = GaussianMixture(half, means, 0.25 * eye.repeat(2, 1, 1)), 0.3
    reward = GaussianLikelihood(torch.tensor([1.0, 0.0], dtype=torch.float64), 1.5, 0.7)
    x = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
    truth = torch.autograd.grad(p1.value(reward, t, x).sum(), x)[0][0] * (1 - t) / t
    eps = randn(16, 1_000, 2, seed=1)
    draws, r, slopes = posterior_slopes(ExactFlowMap(p1), reward, t, x.detach().expand(1_000, 2), eps)
    pulls = (1 - t) * slopes
    whole = controlled_guidance(r, draws, pulls, t)
    direction = torch.nn.functional.normalize(gradient_guidance(r, pulls), dim=-1)
    along_alone = (whole * direction).sum(-1, keepdim=True) * direction
    bias, bias_along = (float(g[:, 1].mean() - truth[1]) for g in (whole, along_alone))
    assert abs(bias_along) > 1.5 * abs(bias)
    assert z_scores(whole[:, 1] - along_alone[:, 1], 0.0) > LIMIT
    assert float(truth[1]) > 1


# ---- E15, the weights and what they are worth ------------------------------------------------------------


@given(st.integers(1, 6), st.floats(-5, 5), st.integers(0, 1000))
def test_log_mean_exp_is_numpys_and_shifts_with_its_argument(n, shift, seed):
    r = randn(n, 4, seed=seed)
    assert_close(log_mean_exp(r), torch.from_numpy(np.log(np.mean(np.exp(r.numpy()), axis=0))), 1e-12)
    far = 1000 * shift  # where exp itself over- or underflows
    assert_close(log_mean_exp(r + far), log_mean_exp(r) + far, 1e-12, 1 + abs(far))
    assert_close(log_mean_exp(torch.full_like(r, far)), torch.full_like(r[0], far), 1e-12, 1 + abs(far))


@given(n=st.integers(1, 8), seed=SEEDS, c=st.floats(-500, 500))
def test_effective_sample_size(n, seed, c):
    """(Σ e^r)²/Σ e^{2r}, between 1 and n, whatever constant the reward has."""
    r = randn(n, 3, seed=seed)
    weights = np.exp(r.numpy())
    expected = torch.from_numpy(weights.sum(0) ** 2 / (weights**2).sum(0))
    size = effective_sample_size(r + c)
    assert size.shape == (3,)
    assert_close(size, expected, 1e-9, n)
    assert bool(((size > 1 - 1e-12) & (size < n + 1e-12)).all())


def test_effective_sample_size_at_its_ends():
    r = torch.tensor([[0.0, 0.0], [0.0, 900.0], [0.0, 0.0]], dtype=torch.float64)  # equal, and one that counts alone
    assert_close(effective_sample_size(r), torch.tensor([3.0, 1.0], dtype=torch.float64), 1e-12)


@given(n=st.integers(1, 6), size=st.integers(1, 4), shape=SHAPES, seed=SEEDS)
def test_weighted_mean_is_numpys_average(n, size, shape, seed):
    r, values, _ = material(n, size, shape, seed)
    expected = [np.average(values[:, b].numpy(), axis=0, weights=np.exp(r[:, b].numpy())) for b in range(size)]
    assert_close(weighted_mean(r, values), torch.from_numpy(np.stack(expected)), 1e-12, 1 + values.abs().max())


# ---- refusals --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("r", "match"),
    [
        (torch.zeros(4), r"rewards must be \(n, B\)"),
        (torch.zeros(4, 3, 3), r"rewards must be \(n, B\)"),  # B = D
        (torch.zeros(3, 4), "rewards must be .* got .3, 4. and .4, 3, 3."),
        (torch.zeros(4, 1), r"rewards must be \(n, B\)"),  # it would broadcast
        (torch.full((4, 3), math.nan), "rewards must be finite"),
        (torch.full((4, 3), -math.inf), "rewards must be finite"),
    ],
)
def test_rewards_that_do_not_fit_are_refused(method, r, match):
    with pytest.raises(ValueError, match=match):
        estimate(method, r, torch.ones(4, 3, 3), torch.ones(4, 3, 3), 0.5)
    with pytest.raises(ValueError, match=match):
        weighted_mean(r, torch.ones(4, 3, 3))


@pytest.mark.parametrize("method", ["stein", "controlled"])
@pytest.mark.parametrize(
    ("t", "match"),
    [
        (1.0, "needs t < 1, got t = 1"),
        (torch.tensor([0.5, 1.0, 0.5]), "needs t < 1, got t = 1"),  # one row is enough
        (torch.tensor([0.5, 0.5]), r"shape \(\) or \(3,\)"),
        (1.5, r"must lie in \[0, 1\]"),
        (math.nan, r"must lie in \[0, 1\]"),
    ],
)
def test_times_that_do_not_fit_are_refused(method, t, match):
    with pytest.raises(ValueError, match=match):
        estimate(method, torch.zeros(4, 3), torch.ones(4, 3, 2), torch.ones(4, 3, 2), t)


def test_pulls_of_another_shape_than_the_draws_are_refused():
    with pytest.raises(ValueError, match=r"same shape: draws \(4, 3, 2\), pulls \(4, 3, 1\)"):
        controlled_guidance(torch.zeros(4, 3), torch.ones(4, 3, 2), torch.ones(4, 3, 1), 0.5)
