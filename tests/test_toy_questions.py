"""The toys that answer an audience's questions: smoothing, variance of the reward, and steepness of the flow map."""

import functools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import integrate as quadrature
from scipy import stats

from mfm_ref import ExactFlowMap, GaussianLikelihood, dps_drift, guidance
from tests.helpers import LIMIT, gaussian, z_scores
from toy import lipschitz, reward_variance, smoothing
from toy.mixture import paper_mixture

TOYS = {
    "lipschitz": (lipschitz, lipschitz.LipschitzConfig),
    "reward_variance": (reward_variance, reward_variance.RewardVarianceConfig),
    "smoothing": (smoothing, smoothing.SmoothingConfig),
}
RESULTS = Path(__file__).parents[1] / "toy" / "results"


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """What the fast run of each returns, and its folder: made when it is asked for, as tests may be shared out."""
    folder = tmp_path_factory.mktemp("questions")

    @functools.cache
    def report_of(name):
        toy, config = TOYS[name]
        return toy.main(config(out=folder / name, fast=True)), folder / name

    return report_of


@pytest.mark.parametrize("name", TOYS)
def test_fast_run_writes_its_report_and_its_picture(reports, name):
    report, folder = reports(name)
    assert report == json.loads((folder / "report.json").read_text())
    assert (folder / f"{name}.png").stat().st_size > 10_000
    assert TOYS[name][0].table(report).count("\n") >= 4


@pytest.mark.parametrize("name", TOYS)
def test_committed_result_is_of_the_default_settings(name):
    toy, config = TOYS[name]
    report = json.loads((RESULTS / f"{name}.json").read_text())
    assert report["config"] == {k: v if isinstance(v, int | float) else str(v) for k, v in vars(config()).items()}
    assert toy.table(report).startswith("|")


@pytest.mark.slow
@pytest.mark.parametrize("name", TOYS)
def test_pictures_of_the_committed_results_have_room_for_their_text(name, tmp_path):
    """Warnings, such as that of a layout that does not fit, are errors."""
    TOYS[name][0].draw(json.loads((RESULTS / f"{name}.json").read_text()), tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 10_000


# ---- lipschitz -----------------------------------------------------------------------------------------


def test_steepness_of_two_equal_components_has_its_closed_form(reports):
    """Between the modes of ½N(−d/2, 1) + ½N(d/2, 1): X′(0) = φ(0)/p₁(0) = exp(d²/8), and ∂b at t = ½ is d²/4."""
    report, _ = reports("lipschitz")
    for d, found in report["line"].items():
        distance = int(d)
        assert found["flow_worst"] == pytest.approx(math.exp(distance**2 / 8), rel=2e-3)
        assert found["drift_worst"] == pytest.approx(max(1.0, distance**2 / 4), rel=0.35)
        assert found["flow_median"] <= found["flow_mean"] * 1.02 <= found["flow_rms"] * 1.04
        assert found["flow_rms"] <= found["flow_worst"] * 1.001 <= found["gronwall"]
        assert found["enough"] <= found["flow_worst"]
    assert report["line"]["4"]["jumps_worst"]["8"] < report["line"]["4"]["jumps_worst"]["1"] / 2


def test_context_steepness_has_its_closed_form_mean(reports):
    """At fixed context E|∂X/∂(t x)| = ∂E[x₁]/∂(t x) = Var(x₁|x)/(1−t)²: at t = 0 the variance of the data, 1 + d²/4."""
    for d, found in reports("lipschitz")[0]["contexts"].items():
        assert found["0.0"]["context_mean"] == pytest.approx(1 + int(d) ** 2 / 4, rel=1e-3)


def test_map_of_one_gaussian_is_as_steep_as_its_largest_standard_deviation():
    p1 = gaussian(3, seed=2)
    _, eighths, _ = lipschitz.backwards(p1, p1.sample(5, generator=torch.Generator().manual_seed(0)), 80)
    whole = eighths[0]
    for jump in eighths[1:]:
        whole = jump @ whole
    norms = torch.linalg.matrix_norm(whole, 2)
    assert torch.allclose(norms, p1.eigenvalues.max().sqrt().expand(5), rtol=1e-5)


@pytest.mark.parametrize("dim", [1, 2])
def test_backward_solve_agrees_with_the_oracle(dim):
    """The noise it ends in, carried forward by the exact map, is the clean state, with the same derivative."""
    p1 = lipschitz.pair(2.0, dim)
    x1 = p1.sample(4, generator=torch.Generator().manual_seed(1))
    z, eighths, _ = lipschitz.backwards(p1, x1, 160)
    X, nought = ExactFlowMap(p1), torch.zeros_like(x1)
    assert torch.allclose(X(0.0, 1.0, z, 0.0, nought), x1, atol=1e-4)
    exact = torch.autograd.functional.jacobian(lambda a: X(0.0, 1 / 8, a, 0.0, nought).sum(0), z)  # (D, B, D)
    assert torch.allclose(eighths[0], exact.transpose(0, 1), atol=1e-4)


def test_jacobian_of_the_drift_agrees_with_automatic_differentiation():
    p1 = lipschitz.pair(3.0, 2)
    for t in (0.0, 0.4, 1.0):
        x = p1.marginal(t).sample(5, generator=torch.Generator().manual_seed(2))
        exact = torch.autograd.functional.jacobian(lambda a, t=t: p1.drift(t, a).sum(0), x).transpose(0, 1)
        assert torch.allclose(lipschitz.drift_jacobian(p1, t, x), exact, atol=1e-10)


def test_a_map_of_the_steepness_that_is_enough_is_within_ten_per_cent():
    """By Monte Carlo on the oracle, 2 % of 0.1 for 40,000 draws."""
    p1, steep = lipschitz.pair(4.0, 1), lipschitz.enough(4.0, lipschitz.LipschitzConfig())
    z = torch.randn((40_000, 1), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    x = ExactFlowMap(p1)(0.0, 1.0, z, 0.0, 0 * z)
    missing = (x.abs() - steep * z.abs()).clamp_min(0)
    assert float((missing.square().mean() / x.square().mean()).sqrt()) == pytest.approx(0.1, rel=0.02)


# ---- reward variance -----------------------------------------------------------------------------------


def test_quadrature_agrees_with_the_closed_form_of_a_likelihood():
    """V and its gradient by E7, b* − b; χ² by the value of 2r, a likelihood of σ/√2."""
    p1, reward = (part.to(torch.float64) if hasattr(part, "to") else part for part in paper_mixture())
    case = reward_variance.cases()["2-D mixture, quadratic reward"]
    x = p1.marginal(0.4).sample(20, generator=torch.Generator().manual_seed(0))
    g, chi2 = reward_variance.exact_guidance(case.p1, case.reward, 0.4, x)
    assert torch.allclose(g, p1.tilt(reward).drift(0.4, x) - p1.drift(0.4, x), atol=1e-4)
    double = GaussianLikelihood(reward.a[0], float(reward.y), 0.2 / 2**0.5)
    expected = torch.expm1(p1.value(double, 0.4, x) - 2 * p1.value(reward, 0.4, x))
    assert torch.allclose(chi2, expected, rtol=1e-4)


def test_relative_variance_agrees_with_posterior_draws():
    """E[e^{2r}] = (1 + χ²) E[e^r]², in standard errors of its mean over 100,000 draws."""
    case = reward_variance.cases()["1-D Gaussian, two targets"]
    x = torch.tensor([[0.2], [1.0]])
    _, chi2 = reward_variance.exact_guidance(case.p1, case.reward, 0.5, x)
    posterior = case.p1.to(torch.float64).posterior(0.5, x.double())
    draws = posterior.sample(100_000, generator=torch.Generator().manual_seed(1))
    squares = (2 * case.reward(draws.flatten(0, 1)).unflatten(0, draws.shape[:2])).exp()
    expected = (1 + chi2) * (2 * case.reward.log_partition(posterior)).exp()
    assert float(z_scores(squares, expected).abs().max()) < LIMIT


def test_number_needed_is_read_off_a_power_law():
    errors = {str(2**k): 3 * 2 ** (-k / 2) for k in range(11)}
    assert reward_variance.needed(errors, 0.3) == pytest.approx(100)
    assert reward_variance.needed(errors, 0.01) is None
    assert reward_variance.needed(errors, 5.0) == 1


def test_what_each_estimator_escapes_and_what_it_does_not(reports):
    cases = reports("reward_variance")[0]["cases"]
    for point in cases["1-D Gaussian, linear reward"]["points"]:  # the pull is the same at every draw
        assert max(point["independent"]["gradient"].values()) < 1e-4
        assert point["independent"]["stein"]["16"] > 0.05
    for name, found in cases.items():
        weakest, strongest = (pick(p["strength"] for p in found["points"]) for pick in (min, max))
        if name != "1-D Gaussian, linear reward":  # E16 differentiates an ever steeper reward
            weak, strong = (_mean_error(found["points"], strength, "gradient") for strength in (weakest, strongest))
            assert strong > 5 * weak
    for point in cases["1-D Gaussian, quadratic reward"]["points"]:  # one draw near the target is all that E17 needs
        assert max(point["independent"]["stein"].values()) < 1.5
        assert point["independent"]["controlled"]["64"] < min(0.3, point["independent"]["gradient"]["64"])


def _mean_error(points, strength, method, n="64"):
    return np.mean([p["independent"][method][n] for p in points if p["strength"] == strength])


# ---- smoothing -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("omega", [0.0, 3.0, 30.0])
def test_moments_of_the_tilted_sampler_agree_with_quadrature(omega):
    """v, v² and sin ω v under p*, v = a·x₁, by SciPy's quadrature of the one-dimensional law of v."""
    p1, reward = paper_mixture()[0], smoothing.reward_with(omega)
    samples = smoothing.tilted_samples(p1, reward, 20_000, torch.Generator().manual_seed(0)).double()
    a = reward.a.double()
    means, std = (p1.means.double() @ a).numpy(), float(0.5 * a.square().sum()) ** 0.5

    def density(v):
        return stats.norm.pdf(v, means, std).mean() * math.exp(-2 * (v + 1) ** 2 + math.sin(omega * v))

    def expected(f):
        return quadrature.quad(lambda v: f(v) * density(v), -5, 3, limit=500)[0]

    v, total = samples @ a, expected(lambda v: 1.0)
    for f in (lambda v: v, lambda v: v**2, lambda v: np.sin(omega * v) + v):
        exact = expected(f) / total
        assert abs(float(z_scores(torch.as_tensor(f(v.numpy())), exact))) < LIMIT


def test_mean_gradient_is_the_library_s_at_the_same_points():
    """One point at D is DPS (E20); weighted posterior draws are E16."""
    p1, reward = paper_mixture()[0], smoothing.reward_with(3.0)
    X, t, rng = ExactFlowMap(p1), 0.4, torch.Generator().manual_seed(0)
    x, eps = p1.marginal(t).sample(6, generator=rng), torch.randn((8, 6, 2), generator=rng)
    of_mean = smoothing.mean_gradient(lambda t, tx: p1.posterior_from_tx(t, tx).mean.unsqueeze(0), reward, t, x, True)
    assert torch.allclose(of_mean, dps_drift(X, reward, t, x) - p1.drift(t, x), atol=1e-4)
    drawn = smoothing.mean_gradient(
        lambda t, tx: X.from_tx(0.0, 1.0, eps.flatten(0, 1), t, tx.repeat(8, 1)).unflatten(0, (8, 6)),
        reward,
        t,
        x,
        True,
    )
    assert torch.allclose(drawn, guidance(X, reward, t, x, 8, "gradient", eps=eps), atol=1e-4)


def test_widths_are_chosen_in_favour_of_the_gaussian():
    found = {
        "G|1": {"sw2": 0.5, "error": 1.0}, "G|2": {"sw2": 0.3, "error": 2.0}, "MFM": {"sw2": 0.4, "error": 0.5}
    }  # fmt: skip
    assert smoothing.best(found) == {
        "G": {"sw2": 0.3, "error": 2.0, "width": "2"},
        "MFM": {"sw2": 0.4, "error": 0.5},
    }


def test_more_weighted_draws_come_nearer_and_the_exact_gradient_is_exact(reports):
    for found in reports("smoothing")[0]["rewards"].values():
        assert found["exact ∇V"]["error"] == 0
        assert found["none"]["error"] == 1
        assert found["MFM-G, N = 64"]["error"] < found["MFM-G, N = 1"]["error"]
        assert found["MFM-G, N = 64"]["sw2"] < found["MFM-G, N = 1"]["sw2"]
