"""The shortest tour of the paper: each equation, the functions that are it, and a check that goes another way.

Below, in the paper's order, every function is a row of the table that `python -m mfm_ref.verify` prints: its docstring
shows the equation, and its body makes random mixtures, calls the package, and yields distances to the same things
found without it. The other ways are densities of `torch.distributions`, derivatives by autograd, SciPy's integrator and
CDFs, sums over quantiles, and, where a law has to be right, moments of draws.

The distances are of two kinds. *Relative*: |found − expected|/(1 + |expected|), since the data are of size one. In
*standard errors*: a mean that should be zero, over the standard error of that mean; 5 of them are exceeded by chance
once in two million.
"""

import math
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from scipy.integrate import solve_ivp
from scipy.stats import norm
from torch import Generator, Tensor
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from mfm_ref import (
    MLP,
    ExactFlowMap,
    FlowMap,
    GaussianLikelihood,
    GaussianMixture,
    LinearReward,
    best_of_n,
    coupled_interpolants,
    denoiser_to_drift,
    denoiser_to_score,
    diagonal_loss,
    doob_drift,
    dps_drift,
    drift_to_denoiser,
    drift_to_score,
    eulerian_loss,
    eulerian_target,
    finetune_loss,
    glass_drift,
    glass_rollout,
    guidance,
    integrate,
    interpolate,
    lagrangian_loss,
    lagrangian_target,
    mean_flow_loss,
    noise_scale,
    sample,
    sample_posterior,
    score_to_denoiser,
    score_to_drift,
    sde_rollout,
    search,
    semigroup_loss,
    semigroup_target,
    smc,
    steer,
    time_grid,
    value,
    value_gradient,
)
from mfm_ref.checks import Time
from mfm_ref.forward_mode import derivative
from mfm_ref.sampling import sde_transition

RELATIVE, ERRORS = "relative", "standard errors"
Reward = LinearReward | GaussianLikelihood
Residuals = Callable[[Generator], Iterator[float]]


@dataclass(frozen=True)
class Equation:
    """A row of the table: an equation, where it is, and how its residual is measured."""

    number: int  # of E1 … E21
    name: str
    formula: str
    functions: tuple[str, ...]  # as seen from mfm_ref
    test: str  # tests/test_x.py::test_name
    tutorial: str  # its two digits
    unit: str  # of the residual: RELATIVE or ERRORS
    tolerance: float
    residuals: Residuals

    def residual(self, seed: int) -> float:
        """The worst residual; its random numbers follow from the seed, and no other row has them."""
        generator = Generator().manual_seed(zlib.crc32(f"{seed} E{self.number} {self.name}".encode()))
        return float(torch.tensor(list(self.residuals(generator)), dtype=torch.float64).max())  # NaN if any is


EQUATIONS: list[Equation] = []


def row(
    functions: str, file: str, test: str, tutorial: str, unit: str = RELATIVE, tolerance: float | None = None
) -> Callable[[Residuals], Residuals]:
    """Make a row of the function below, whose docstring begins "E1, name: formula.".

    Identities hold to rounding, 1e-9; statistics within 5 standard errors.
    """

    def add(residuals: Residuals) -> Residuals:
        found = re.match(r"E(\d+), (.+?): (.+)\.\n", f"{residuals.__doc__}\n")
        assert found is not None
        number, name, formula = found.groups()
        where, limit = f"tests/test_{file}.py::test_{test}", tolerance or (1e-9 if unit == RELATIVE else 5.0)
        EQUATIONS.append(
            Equation(int(number), name, formula, tuple(functions.split()), where, tutorial, unit, limit, residuals)
        )
        return residuals

    return add


# ---- random problems -----------------------------------------------------------------------------------


class Case(NamedTuple):
    """A mixture, clean samples of it, and two noisy views of each: x = I_t and z = Ī_s (E9), with s <= u."""

    p1: GaussianMixture
    t: Tensor  # (B,)
    x: Tensor  # (B, D)
    s: Tensor
    u: Tensor
    z: Tensor
    x1: Tensor


ANY = ((1, 3), (2, 4), (3, 1), (6, 2))  # D and K
CLOSED = ((1, 3), (4, 1))  # where the oracle needs no ODE


def cases(
    g: Generator,
    shapes: Iterable[tuple[int, int]] = ANY,
    *,
    t: tuple[float, float] = (0.0, 1.0),
    s: tuple[float, float] = (0.0, 1.0),
    least: float = 0.1,
) -> Iterator[Case]:
    """One case of B = 5 a shape. Times are random in [0.1, 0.9], but for an earliest and a latest, `t` and `s`."""
    for dim, components in shapes:
        p1 = mixture(g, dim, components, least)
        x1 = p1.sample(5, generator=g)
        context, before, after = 0.1 + 0.8 * uniform(g, 3, 5)
        context[0], context[4] = t
        before[1], before[2] = s
        after = torch.maximum(before, after)
        after[3] = 1.0
        x, z = ((1 - a) * random(g, 5, dim) + a * x1 for a in (column(context), column(before)))
        yield Case(p1, context, x, before, after, z, x1)


def rewarded(
    g: Generator, shapes: Iterable[tuple[int, int]] = ANY, *, t: tuple[float, float] = (0.0, 1.0), least: float = 0.1
) -> Iterator[tuple[GaussianMixture, Tensor, Tensor, Reward]]:
    """p₁, t and x of `cases`, each with three rewards."""
    return ((p1, t, x, r) for p1, t, x, *_ in cases(g, shapes, t=t, least=least) for r in rewards(g, p1.dim))


def smooth(g: Generator, latest: float = 0.9) -> Iterator[tuple[GaussianMixture, Tensor, Tensor, Reward]]:
    """The same on a line, with variances of one and more: no gap between the components that quantiles would miss."""
    return rewarded(g, [(1, 3)], t=(0.0, latest), least=1.0)


def mixture(g: Generator, dim: int, components: int, least: float = 0.1) -> GaussianMixture:
    """Full covariances with eigenvalues from `least` to 2 more, means of size 1.5, uneven weights."""
    basis = torch.linalg.qr(random(g, components, dim, dim)).Q
    eigenvalues = least - 0.1 + 0.1 * 20 ** uniform(g, components, 1, dim)
    covs = basis * eigenvalues @ basis.mT
    weights = 0.2 + uniform(g, components)
    return GaussianMixture(weights / weights.sum(), 1.5 * random(g, components, dim), (covs + covs.mT) / 2)


def rewards(g: Generator, dim: int) -> list[Reward]:
    """One linear, and the likelihoods of one and of two measurements."""
    a = 0.5 * torch.nn.functional.normalize(random(g, 4, dim))
    return [LinearReward(a[0]), GaussianLikelihood(a[1], 0.5, 1.0), GaussianLikelihood(a[2:], a.new_ones(2), 2.0)]


def random(g: Generator, *shape: int) -> Tensor:
    """Standard normal numbers in float64."""
    return torch.randn(shape, generator=g, dtype=torch.float64)


def uniform(g: Generator, *shape: int) -> Tensor:
    """Uniform numbers in float64."""
    return torch.rand(shape, generator=g, dtype=torch.float64)


def column(t: Tensor) -> Tensor:
    """Times `(B,)` as `(B, 1)`."""
    return t.unsqueeze(-1)


# ---- the other ways ------------------------------------------------------------------------------------


def density(weights: Tensor, means: Tensor, covs: Tensor) -> MixtureSameFamily:
    """A mixture of torch.distributions, of `(K,)`, `(…, K, D)` and `(…, K, D, D)`."""
    return MixtureSameFamily(Categorical(weights.expand(means.shape[:-1])), MultivariateNormal(means, covs))


def log_p1(p1: GaussianMixture, x1: Tensor) -> Tensor:
    """log p₁(x₁), `(B,)`."""
    return density(p1.weights, p1.means, p1.covs).log_prob(x1)


def log_pt(p1: GaussianMixture, t: Tensor, x: Tensor) -> Tensor:
    """log p_t(x), `(B,)`: component by component, the law of (1−t) x₀ + t x₁."""
    t = t.reshape(-1, 1, 1, 1)
    return density(p1.weights, t[..., 0] * p1.means, t**2 * p1.covs + (1 - t) ** 2 * torch.eye(p1.dim)).log_prob(x)


def cdf(p: GaussianMixture, x: Tensor) -> Tensor:
    """The CDF of a mixture in one dimension, or of one for each row, at `(…, B, 1)`, by SciPy; `(…, B)`."""
    levels = norm.cdf(x.detach(), p.means[..., 0], p.covs[..., 0, 0].sqrt())
    return (p.weights * torch.as_tensor(levels)).sum(-1)


def gradient(f: Callable[..., Tensor], *arguments: object) -> Tensor:
    """∇f of every row in the last argument, by autograd."""
    *others, x = arguments
    assert isinstance(x, Tensor)
    leaf = x.detach().clone().requires_grad_()
    return torch.autograd.grad(f(*others, leaf).sum(), leaf)[0]


def quantiles(n: int, x: Tensor) -> Tensor:
    """ε_i = Φ⁻¹((i + ½)/n) for every row of x `(B, 1)`, `(n, B, 1)`: means over these draws are integrals, nearly."""
    levels = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    return torch.special.ndtri(levels).reshape(n, 1, 1).expand(n, *x.shape)


def law_of_steps(p: GaussianMixture, steps: int) -> GaussianMixture:
    """What steps of the SDE (E6) with the denoiser of one Gaussian on a line end in: they are affine. It tends to p.

    With D held, x_t = t D + (1−t) ξ and a later x_t′, of less noise, are Gaussian, and x_t is x_t′ noised further:
    Cov(x_t, x_t′) = (t/t′) (1−t′)². A step is the law of x_t′ given x_t.
    """
    mean, variance = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    for t, t_next in pairwise(time_grid(steps)):
        covariance = t / t_next * (1 - t_next) ** 2
        keep = covariance / (1 - t) ** 2
        gain, left = t_next - keep * t, (1 - t_next) ** 2 - keep * covariance
        slope = keep + gain * (p.denoiser(t, mean + 1) - p.denoiser(t, mean))
        mean, variance = keep * mean + gain * p.denoiser(t, mean), slope**2 * variance + left
    return GaussianMixture(p.weights, mean, variance.unsqueeze(0))


def whitened(samples: Tensor, law: GaussianMixture) -> Tensor:
    """Samples `(n, 1)` less the mean of a law, over its standard deviation."""
    return (samples - law.mean) / law.cov[0].sqrt()


class Shifted(ExactFlowMap):
    """The oracle plus a parameter, zero, for every row: the derivative of a loss in it is 2/B of the row's residual."""

    def __init__(self, p1: GaussianMixture, rows: int):
        super().__init__(p1)
        self.by = torch.zeros((rows, p1.dim), dtype=torch.float64, requires_grad=True)

    def velocity(self, s: Time, u: Time, z: Tensor, t: Time, x: Tensor, y: Tensor | None = None) -> Tensor:
        """v_{s,u} of the oracle, shifted."""
        return super().velocity(s, u, z, t, x) + self.by

    def residuals(self, loss: Tensor) -> Tensor:
        """v − target, `(B, D)`, of a loss that is its mean square."""
        return torch.autograd.grad(loss, self.by)[0] * len(self.by) / 2


# ---- distances -----------------------------------------------------------------------------------------


def relative(found: Tensor, expected: Tensor) -> float:
    """The largest |found − expected|/(1 + |expected|), where |·| is the largest entry of a row."""
    size = 1 + expected.abs().reshape(len(expected), -1).amax(1)
    return float(((found - expected).abs().reshape(len(expected), -1).amax(1) / size).max())


def scores(samples: Tensor) -> float:
    """The largest |mean| of samples `(n, …)` that should have the mean 0, in standard errors of that mean."""
    return float((samples.mean(0) / samples.std(0)).abs().max()) * len(samples) ** 0.5


def uniform_scores(level: Tensor) -> float:
    """`scores` of the first three moments of levels `(n,)`, which should be uniform on [0, 1]."""
    centred = 2 * level - 1
    return scores(torch.stack([centred, centred**2 - 1 / 3, centred**3], 1))


def normal_scores(white: Tensor) -> float:
    """`scores` of the first two moments of samples `(n, D)`, which should be standard normal."""
    second = white.unsqueeze(-1) * white.unsqueeze(-2) - torch.eye(white.shape[1]).to(white)
    return scores(torch.cat([white, second.flatten(1)], 1))


def scores_given(residuals: Tensor, *features: Tensor) -> float:
    """`scores` of residuals `(n, D)` and of their products with features: given these, their mean should be 0."""
    return scores(torch.stack([residuals, *(residuals * feature for feature in features)], 1))


# ---- the path and its posteriors -----------------------------------------------------------------------


@row("interpolate", "interpolant", "noise_is_at_zero_and_data_at_one", "01")
def interpolant(g: Generator) -> Iterator[float]:
    """E1, interpolant: I_t = (1−t) x₀ + t x₁.

    Noise at 0, data at 1, and between them dI = (x₁ − x₀) dt, row by row: the batch is as large as the dimension.
    """
    x0, x1 = random(g, 2, 5, 5)
    yield relative(interpolate(x0, x1, 0.0), x0)
    yield relative(interpolate(x0, x1, 1.0), x1)
    t, dt = uniform(g, 2, 5)
    yield relative(derivative(lambda t: interpolate(x0, x1, t), (t,), (dt,))[1], column(dt) * (x1 - x0))


@row("GaussianMixture.drift", "mixture", "drift_is_the_mean_velocity_by_quadrature", "01")
def drift(g: Generator) -> Iterator[float]:
    """E2, drift: b_t(x) = E[x₁ − x₀ ∣ I_t = x] = (x + (1−t) ∇log p_t)/t.

    ∇log p_t is the derivative of a density. At t = 0 the drift is E[x₁] − x.
    """
    for p1, t, x, *_ in cases(g):
        t_, score = column(t), gradient(log_pt, p1, t, x)
        yield relative(p1.drift(t, x), torch.where(t_ > 0, (x + (1 - t_) * score) / t_, p1.mean - x))


@row(
    "drift_to_denoiser drift_to_score denoiser_to_drift denoiser_to_score score_to_drift score_to_denoiser",
    *("interpolant", "conversions_are_inverse_to_each_other", "01"),
)
def conversions(g: Generator) -> Iterator[float]:
    """E2, conversions: b = (D − x)/(1−t), ∇log p_t = (t b − x)/(1−t).

    All six, among the drift, the denoiser and the score of a mixture, each found in its own way.
    """
    for p1, t, x, *_ in cases(g, t=(0.05, 0.95)):
        b, D, score = p1.drift(t, x), p1.posterior(t, x).mean, gradient(log_pt, p1, t, x)
        yield relative(drift_to_denoiser(b, t, x), D)
        yield relative(drift_to_score(b, t, x), score)
        yield relative(denoiser_to_drift(D, t, x), b)
        yield relative(denoiser_to_score(D, t, x), score)
        yield relative(score_to_drift(score, t, x), b)
        yield relative(score_to_denoiser(score, t, x), D)


@row("integrate", "sampling", "integrated_law_of_a_mixture", "01", tolerance=1e-5)
def sampling(g: Generator) -> Iterator[float]:
    """E2, sampling: dx/dt = b_t(x) carries N(0, I) to p₁.

    On a line the flow keeps every quantile: F₁(x(1)) = Φ(x(0)).
    """
    p1, start = mixture(g, 1, 3), random(g, 100, 1)
    end = integrate(p1.drift, start, time_grid(100), dynamics="dopri5")
    yield relative(cdf(p1, end), torch.special.ndtr(start[:, 0]))


@row("GaussianMixture.posterior", "mixture", "posterior_is_bayes_by_quadrature", "01")
def posterior(g: Generator) -> Iterator[float]:
    """E3, posterior: p(x₁ ∣ x) ∝ p₁(x₁) N(x; t x₁, (1−t)² I).

    Bayes' rule in log densities. At t = 1 the posterior is the point x.
    """
    for p1, t, x, _, _, _, x1 in cases(g, t=(0.0, 0.95)):
        noise = MultivariateNormal(column(t) * x1, column(column(1 - t)) ** 2 * torch.eye(p1.dim))
        bayes = log_p1(p1, x1) + noise.log_prob(x) - log_pt(p1, t, x)
        yield relative(p1.posterior(t, x).log_prob(x1), bayes)
        yield relative(p1.posterior(1.0, x).mean, x)
        yield float(p1.posterior(1.0, x).cov.abs().max())


@row("GaussianMixture.tilt", "mixture", "tilting_multiplies_the_density_by_the_reward", "04")
def tilted_law(g: Generator) -> Iterator[float]:
    """E4, tilted law: p*(x₁) = p₁(x₁) e^{r(x₁)}/E[e^r]."""
    for p1, _, x1, r in rewarded(g):
        yield relative(log_p1(p1.tilt(r), x1), log_p1(p1, x1) + r(x1) - p1.log_partition(r))


@row("GaussianMixture.value", "mixture", "value_and_tilt_by_quadrature", "04")
def value_function(g: Generator) -> Iterator[float]:
    """E5, value: V_t(x) = log E[e^{r(x₁)} ∣ I_t = x].

    The mean is a sum over a fine grid of x₁ with E3 as it is written. At t = 1, V = r.
    """
    grid = torch.linspace(-20, 20, 10_001, dtype=torch.float64).unsqueeze(1)
    for p1, t, x, r in rewarded(g, [(1, 1), (1, 4)], t=(0.0, 0.95)):
        log_weights = log_p1(p1, grid) - ((x - column(t) * grid.T) / column(1 - t)) ** 2 / 2  # (B, grid)
        expected = torch.logsumexp(log_weights + r(grid), 1) - torch.logsumexp(log_weights, 1)
        yield relative(p1.value(r, t, x), expected)
        yield relative(p1.value(r, 1.0, x), r(x))


@row("noise_scale", "interpolant", "both_forms_of_the_sde_drift_agree", "01")
def noise(g: Generator) -> Iterator[float]:
    """E6, noise scale: b + (σ_t²/2) ∇log p_t = 2b − x/t, σ_t²/2 = (1−t)/t."""
    for p1, t, x, *_ in cases(g, t=(0.05, 1.0)):
        b, score = p1.drift(t, x), gradient(log_pt, p1, t, x)
        yield relative(b + column(noise_scale(t)) / 2 * score, 2 * b - x / column(t))


@row("sampling.sde_transition", "sampling", "sde_marginals_on_the_way", "01", tolerance=1e-7)
def sde_step(g: Generator) -> Iterator[float]:
    """E6, SDE step: dx = (2b − x/t) dt + σ_t dW, b = (D − x)/(1−t), D held.

    Mean and variance of a step from x = 1 with D = −1, by SciPy's integrator.
    """

    def rate(t: float, moments: np.ndarray) -> list[float]:
        mean, variance = moments
        slope = -2 / (1 - t) - 1 / t  # of 2 (D − x)/(1−t) − x/t in x
        return [slope * mean - 2 / (1 - t), 2 * slope * variance + 2 * (1 - t) / t]

    for t, t_next in uniform(g, 4, 2).mul(0.9).add(0.05).sort(1).values.tolist():
        expected = solve_ivp(rate, (t, t_next), [1.0, 0.0], rtol=1e-10, atol=1e-12).y[:, -1:]
        keep, gain, std = sde_transition(t, t_next)
        yield relative(torch.tensor([[keep - gain], [std**2]]), torch.as_tensor(expected))


# ---- steering ------------------------------------------------------------------------------------------


@row(
    "GaussianMixture.value GaussianMixture.tilt",
    *("mixture", "doob_drift_is_the_drift_of_the_tilted_mixture", "04"),
)
def doob_ode(g: Generator) -> Iterator[float]:
    """E7, Doob ODE: b_t + (σ_t²/2) ∇V_t is the drift of p*.

    The strongest test there is: ∇V by autograd, and on the other side E2 of another mixture.
    """
    for p1, t, x, r in rewarded(g, t=(0.05, 1.0)):
        push = column(noise_scale(t)) / 2 * gradient(p1.value, r, t, x)
        yield relative(p1.drift(t, x) + push, p1.tilt(r).drift(t, x))


@row("doob_drift", "alignment", "doob_drift_converges_to_the_drift_of_the_tilted_law", "04", tolerance=1e-8)
def doob_ode_from_draws(g: Generator) -> Iterator[float]:
    """E7, Doob ODE from draws: b_t + (σ_t²/2) ∇V_t, with ∇V_t from X_{0,1}(ε_i; t, x).

    Exact for any draws with the mean of the posterior where p₁ is one Gaussian: for linear rewards by E16, for
    quadratic ones on a line by E16 and E17 together.
    """
    for p1, t, x, r in rewarded(g, [(5, 1), (1, 1)], t=(0.0, 0.95)):
        if isinstance(r, LinearReward):
            found = doob_drift(ExactFlowMap(p1), r, t, x, 4, "gradient", noise="antithetic", generator=g)
            yield relative(found, p1.tilt(r).drift(t, x))
        elif p1.dim == 1:
            found = doob_drift(ExactFlowMap(p1), r, t, x, 4, "controlled", noise="antithetic", generator=g)
            yield relative(found, p1.tilt(r).drift(t, x))


@row("steer", "steering", "steering_converges_in_law_to_the_tilted_law", "04", ERRORS)
def doob_sde(g: Generator) -> Iterator[float]:
    """E8, Doob SDE: dx = (2b − x/t + σ_t² ∇V) dt + σ_t dW carries N(0, I) to p*.

    Of one Gaussian, where the ∇V of draws is exact, as above: 4096 samples against the law of the steps.
    """
    p1, r = mixture(g, 1, 1), GaussianLikelihood(torch.ones(1), 1.0, 1.0)
    samples, _ = steer(ExactFlowMap(p1), r, 4096, n=4, steps=50, dynamics="sde", noise="antithetic", generator=g)
    yield normal_scores(whitened(samples, law_of_steps(p1.tilt(r), 50)))


# ---- Meta Flow Maps ------------------------------------------------------------------------------------


@row("coupled_interpolants", "interpolant", "the_two_views_of_one_clean_sample", "03")
def auxiliary_path(g: Generator) -> Iterator[float]:
    """E9, auxiliary path: Ī_s = (1−s) x̄₀ + s x₁, x₁ ∼ p(x₁ ∣ x).

    From Ī_s the velocity x₁ − x̄₀ leads to x₁ in the time 1 − s that is left.
    """
    for c in cases(g):
        _, z, velocity = coupled_interpolants(c.x1, c.s, c.t, generator=g)
        yield relative(z + column(1 - c.s) * velocity, c.x1)


@row("coupled_interpolants", "interpolant", "the_two_views_of_one_clean_sample", "03", ERRORS)
def two_noises(g: Generator) -> Iterator[float]:
    """E9, two noises: x₀, x̄₀ ∼ N(0, I), independent of x₁ and of each other.

    Solved for in what is returned: together with x₁ they are three independent normal numbers.
    """
    x1, s, t = random(g, 4096, 1), *(0.1 + 0.8 * uniform(g, 2, 4096))
    x, z, velocity = coupled_interpolants(x1, s, t, generator=g)
    x0, x0_bar = (x - column(t) * x1) / column(1 - t), z - column(s) * velocity
    yield normal_scores(torch.cat([x1, x0, x0_bar], 1))


@row("ExactFlowMap.velocity", "exact", "velocity", "03")
def conditional_drift(g: Generator) -> Iterator[float]:
    """E10, conditional drift: b̄_s(z; t, x) = E[x₁ − x̄₀ ∣ Ī_s = z, I_t = x].

    E2 in z, with the score of the joint density of (x, z), a mixture in 2D dimensions.
    """

    def log_joint(p1: GaussianMixture, t: Tensor, x: Tensor, s: Tensor, z: Tensor) -> Tensor:
        times = torch.stack([t, s], 1)  # (B, 2)
        noise = torch.diag_embed(torch.kron((1 - times) ** 2, torch.ones(1, p1.dim)))  # (B, 2D, 2D)
        means = torch.stack([torch.kron(times, mean) for mean in p1.means], 1)  # (B, K, 2D)
        covs = torch.stack([torch.kron(times.unsqueeze(2) * times.unsqueeze(1), cov) + noise for cov in p1.covs], 1)
        return density(p1.weights, means, covs).log_prob(torch.cat([x, z], 1))

    for p1, t, x, s, _, z, _ in cases(g, s=(0.05, 1.0)):
        expected = (z + column(1 - s) * gradient(log_joint, p1, t, x, s, z)) / column(s)
        yield relative(ExactFlowMap(p1).velocity(s, s, z, t, x), expected)


@row("ExactFlowMap", "exact", "solve_is_scipys", "02", tolerance=1e-6)
def meta_flow_map(g: Generator) -> Iterator[float]:
    """E11, Meta Flow Map: X_{s,u}(z; t, x) solves dz/ds = b̄_s(z; t, x).

    SciPy's integrator along E12, which the oracle does not use. Each row goes from its s to its u in one unit of time.
    """

    def end(c: Case) -> Tensor:
        def rate(share: float, state: np.ndarray) -> np.ndarray:
            s, z = c.s + share * (c.u - c.s), torch.as_tensor(state).view_as(c.z)
            return (column(c.u - c.s) * glass_drift(c.p1.drift, s, z, c.t, c.x)).numpy().ravel()

        solved = solve_ivp(rate, (0, 1), c.z.flatten(), method="DOP853", rtol=1e-9, atol=1e-9)
        return torch.as_tensor(solved.y[:, -1]).view_as(c.z)

    for c in cases(g, [(1, 3), (2, 3), (4, 1)]):
        yield relative(ExactFlowMap(c.p1)(c.s, c.u, c.z, c.t, c.x), end(c))


@row("sample_posterior", "sampling", "posterior_law_of_a_mixture", "02")
def one_step_draws(g: Generator) -> Iterator[float]:
    """E11, one-step draws: X_{0,1}(ε; t, x) ∼ p(x₁ ∣ x).

    On a line the map keeps every quantile: F(X_{0,1}(ε)) = Φ(ε), with F the CDF of E3.
    """
    for p1, t, x, *_ in cases(g, [(1, 2), (1, 4)], t=(0.0, 0.95)):
        eps = random(g, 50, *x.shape)
        draws = sample_posterior(ExactFlowMap(p1), t, x, 50, eps=eps)
        yield relative(cdf(p1.posterior(t, x), draws), torch.special.ndtr(eps[..., 0]))


@row("FlowMap", "networks", "the_map_is_the_identity_plus_the_velocity", "02")
def parameterisation(g: Generator) -> Iterator[float]:
    """E11, parameterisation: X_{s,u}(z) = z + (u−s) v_{s,u}(z).

    Of a network with random weights: X_{s,s}(z) = z, and v_{s,s} is the rate at which X leaves z.
    """
    for c in cases(g, [(2, 2)]):
        X = FlowMap(MLP(c.p1.mean, c.p1.cov, hidden=16, depth=2)).requires_grad_(False)
        for weight in X.parameters():
            weight.copy_(random(g, *weight.shape) / 4)
        start, rate = derivative(lambda u, X=X, c=c: X(c.s, u, c.z, c.t, c.x), (c.s,), (torch.ones_like(c.s),))
        jump = X.velocity(c.s, c.u, c.z, c.t, c.x)
        yield relative(X(c.s, c.u, c.z, c.t, c.x), torch.lerp(c.z, c.z + jump, column(c.u - c.s)))
        yield relative(start, c.z)
        yield relative(rate, X.velocity(c.s, c.s, c.z, c.t, c.x))


@row("glass_drift", "interpolant", "glass_drift_is_the_drift_of_the_posterior", "03")
def glass(g: Generator) -> Iterator[float]:
    """E12, GLASS: b̄_s(z; t, x) = (D_{t*}(x*) − z)/(1−s), from b alone.

    The posterior is a mixture again, and b̄ is E2 of it.
    """
    for c in cases(g):
        yield relative(glass_drift(c.p1.drift, c.s, c.z, c.t, c.x), c.p1.posterior(c.t, c.x).drift(c.s, c.z))


# ---- training objectives -------------------------------------------------------------------------------


@row(
    "diagonal_loss",
    *("objectives", "diagonal_loss_from_the_exact_drift_is_zero_at_the_oracle", "03"),
)
def diagonal_from_a_teacher(g: Generator) -> Iterator[float]:
    """E13, diagonal, teacher: v_{s,s}(z; t, x) = b̄_s(z; t, x), E12 of a drift.

    At the oracle no row has a residual: the target has no variance.
    """
    for p1, t, x, s, _, z, _ in cases(g):
        X, target = Shifted(p1, len(x)), glass_drift(p1.drift, s, z, t, x)
        yield relative(target + X.residuals(diagonal_loss(X, s, z, t, x, target)), target)


@row(
    "diagonal_loss coupled_interpolants",
    *("objectives", "from_data_every_other_velocity_costs_its_distance_to_the_oracle", "03", ERRORS),
)
def diagonal_from_data(g: Generator) -> Iterator[float]:
    """E13, diagonal, data: v_{s,s} minimises E‖v_{s,s}(Ī_s; t, I_t) − (x₁ − x̄₀)‖².

    At the oracle the residuals have mean zero given z and x, and so against functions of them.
    """
    p1, s, t = mixture(g, 1, 3), *uniform(g, 2, 4096)
    x, z, velocity = coupled_interpolants(p1.sample(4096, generator=g), s, t, generator=g)
    X = Shifted(p1, 4096)
    residuals = X.residuals(diagonal_loss(X, s, z, t, x, velocity))
    yield scores_given(residuals, column(s), column(t), z.tanh(), x.tanh())


def at_the_oracle(
    c: Case, target: Callable[..., Tensor], loss: Callable[..., Tensor], *times: Tensor
) -> Iterator[float]:
    """A consistency target, self and teacher, against v_{s,u}, and the loss that is made of it against zero."""
    X, at = ExactFlowMap(c.p1), (*times, c.z, c.t, c.x)
    v = X.velocity(c.s, c.u, c.z, c.t, c.x)
    yield relative(target(X, *at), v)
    yield relative(target(X, *at, drift=c.p1.drift), v)
    yield float((loss(X, *at) / v.square().mean()).sqrt())


CONSISTENCY = ("consistency", "targets_at_the_oracle_are_its_own_velocity", "02", RELATIVE, 1e-6)


@row("semigroup_target semigroup_loss", *CONSISTENCY)
def semigroup(g: Generator) -> Iterator[float]:
    """E14, semigroup: X_{w,u}(X_{s,w}(z)) = X_{s,u}(z), s ≤ w ≤ u.

    The teacher's first leg is a step of Runge and Kutta, so w is near s.
    """
    for c in cases(g, CLOSED, t=(0.0, 0.9), s=(0.0, 0.9)):
        yield from at_the_oracle(c, semigroup_target, semigroup_loss, c.s, c.s + 0.01 * (c.u - c.s), c.u)


@row("lagrangian_target lagrangian_loss", *CONSISTENCY)
def lagrangian(g: Generator) -> Iterator[float]:
    """E14, Lagrangian: ∂_u X_{s,u}(z) = v_{u,u}(X_{s,u}(z))."""
    for c in cases(g, CLOSED, t=(0.0, 0.9), s=(0.0, 0.9)):
        yield from at_the_oracle(c, lagrangian_target, lagrangian_loss, c.s, c.u)


@row("eulerian_target eulerian_loss", *CONSISTENCY)
def eulerian(g: Generator) -> Iterator[float]:
    """E14, Eulerian: ∂_s X_{s,u}(z) + ∇_z X_{s,u}(z) v_{s,s}(z) = 0."""
    for c in cases(g, CLOSED, t=(0.0, 0.9), s=(0.0, 0.9)):
        yield from at_the_oracle(c, eulerian_target, eulerian_loss, c.s, c.u)


@row(
    "mean_flow_target mean_flow_loss",
    *("consistency", "mean_flow_at_the_oracle_is_noise_about_the_oracle", "03", ERRORS),
)
def mean_flow(g: Generator) -> Iterator[float]:
    """E14, mean flow: v_{s,u} = E[v̇ + (u−s) (∂_s v_{s,u} + ∇_z v_{s,u} v̇)], v̇ = x₁ − x̄₀.

    At the oracle the residuals have mean zero given z and x.
    """
    p1, t, (s, u) = mixture(g, 1, 3), 0.9 * uniform(g, 4096), 0.9 * uniform(g, 2, 4096).sort(0).values
    x, z, velocity = coupled_interpolants(p1.sample(4096, generator=g), s, t, generator=g)
    X = Shifted(p1, 4096)
    residuals = X.residuals(mean_flow_loss(X, s, u, z, t, x, velocity))
    yield scores_given(residuals, column(s), column(u), z.tanh(), x.tanh())


# ---- estimators and fine-tuning ------------------------------------------------------------------------


@row("value", "alignment", "value_converges_to_the_closed_form", "04", tolerance=1e-2)
def value_from_draws(g: Generator) -> Iterator[float]:
    """E15, value from draws: V̂ = log (1/n) Σ_i exp r(X_{0,1}(ε_i; t, x)).

    2048 quantiles ε_i, against E5.
    """
    for p1, t, x, r in smooth(g, latest=1.0):
        yield relative(value(ExactFlowMap(p1), r, t, x, 2048, eps=quantiles(2048, x)), p1.value(r, t, x))


@row("value_gradient gradient_guidance", "estimators", "e16_is_the_gradient_of_e15", "04")
def gradient_estimator(g: Generator) -> Iterator[float]:
    """E16, gradient estimator: ∇V ≈ ∇_x V̂, through r and X (MFM-G).

    The derivative of E15 by autograd, with the same ε.
    """
    for p1, t, x, *_ in cases(g, [(1, 3), (2, 2), (6, 1)]):
        X, r, eps = ExactFlowMap(p1), rewards(g, p1.dim)[2], random(g, 2, *x.shape)
        expected = gradient(lambda x, X=X, r=r, t=t, eps=eps: value(X, r, t, x, 2, eps=eps), x)
        yield relative(value_gradient(X, r, t, x, 2, "gradient", eps=eps), expected)


def guidance_from_quantiles(g: Generator, method: str) -> Iterator[float]:
    """(1−t) (σ_t²/2) ∇V, in units of the data, from 2048 quantiles ε_i: against D* − D of the mixtures."""
    for p1, t, x, r in smooth(g):
        found = guidance(ExactFlowMap(p1), r, t, x, 2048, method, eps=quantiles(2048, x))
        yield relative(column(1 - t) * found, p1.tilt(r).denoiser(t, x) - p1.denoiser(t, x))


@row(
    "guidance gradient_guidance",
    *("alignment", "gradient_estimators_converge_with_slopes_one_half_and_one", "04", RELATIVE, 1e-2),
)
def limit_of_the_gradient_estimator(g: Generator) -> Iterator[float]:
    """E16, its limit: (σ_t²/2) Σ_i w_i ∇_x r(X_i) → (σ_t²/2) ∇V, w_i ∝ e^{r(X_i)}."""
    return guidance_from_quantiles(g, "gradient")


@row(
    "guidance stein_guidance",
    *("alignment", "gradient_estimators_on_a_trimodal_posterior", "04", RELATIVE, 1e-2),
)
def gradient_free_estimator(g: Generator) -> Iterator[float]:
    """E17, gradient-free estimator: (σ_t²/2) ∇V = (E[e^r x₁]/E[e^r] − E[x₁])/(1−t) (MFM-GF).

    Stein's identity: no gradient of the reward.
    """
    return guidance_from_quantiles(g, "stein")


@row(
    "guidance controlled_guidance",
    *("estimators", "the_control_variate_removes_all_noise_along_a_quadratic_reward", "04", RELATIVE, 1e-2),
)
def controlled_estimator(g: Generator) -> Iterator[float]:
    """E17, with E16, the default: E17 + R² β ⟨Δ, ĝ⟩ ĝ + (1 − R²) e Δ, Δ = E16 − E17.

    Each is a control variate of the other, so the limit is the same.
    """
    return guidance_from_quantiles(g, "controlled")


def minimiser_of_e18(g: Generator, method: str) -> Iterator[float]:
    """The loss is quadratic in b_θ with the curvature 2 E[e^r]: one Newton step from 0 ends at its minimiser, b*.

    In units of the data that is D* = x + (1−t) b*.
    """

    def loss(p1: GaussianMixture, r: Reward, t: Tensor, x: Tensor, b: Tensor) -> Tensor:
        X, eps = ExactFlowMap(p1), quantiles(2048, x)
        return len(x) * finetune_loss(lambda t, x: b, p1.drift, X, r, t, x, n=2048, method=method, eps=eps)

    for p1, t, x, r in smooth(g):
        minimiser = -gradient(loss, p1, r, t, x, torch.zeros_like(x)) / column(2 * p1.value(r, t, x).exp())
        yield relative(x + column(1 - t) * minimiser, p1.tilt(r).denoiser(t, x))


@row(
    "finetune_loss",
    *("finetuning", "the_expected_gradient_vanishes_at_the_doob_drift_and_nowhere_else_tried", "05", RELATIVE, 1e-2),
)
def finetuning(g: Generator) -> Iterator[float]:
    """E18, fine-tuning: b* minimises E[e^{r(X)} ‖b_θ − b − (σ_t²/2) ∇_x r(X)‖²]."""
    return minimiser_of_e18(g, "gradient")


@row("finetune_loss", "finetuning", "the_minimiser_is_the_doob_drift_itself", "05", tolerance=2e-2)
def finetuning_by_stein(g: Generator) -> Iterator[float]:
    """E18, fine-tuning, Stein: b* minimises E[e^{r(X)} ‖b_θ − (X − x)/(1−t)‖²]."""
    return minimiser_of_e18(g, "stein")


# ---- samplers and baselines ----------------------------------------------------------------------------


@row("sample", "sampling", "few_step_law_is_p1_for_every_number_of_steps", "06", ERRORS)
def few_step_sampler(g: Generator) -> Iterator[float]:
    """E19, few-step sampler: x₁ = X_{0,1}(ε; t_k, x), x ← (1−t_{k+1}) ε′ + t_{k+1} x₁.

    The law is p₁ for every number of steps: F₁ of 4096 samples is uniform.
    """
    p1 = mixture(g, 1, 3)
    for steps in (1, 3):
        yield uniform_scores(cdf(p1, sample(ExactFlowMap(p1), 4096, steps, generator=g)))


@row("dps_drift", "alignment", "dps_is_the_gradient_of_the_reward_of_the_denoiser", "06")
def dps(g: Generator) -> Iterator[float]:
    """E20, DPS: b_t + (σ_t²/2) ∇_x r(D_t(x)).

    Autograd through the mixture's own denoiser.
    """

    def reward_of_denoiser(p1: GaussianMixture, r: Reward, t: Tensor, x: Tensor) -> Tensor:
        return r(p1.denoiser(t, x))

    for p1, t, x, r in rewarded(g, t=(0.05, 0.95)):
        push = column(noise_scale(t)) / 2 * gradient(reward_of_denoiser, p1, r, t, x)
        yield relative(dps_drift(ExactFlowMap(p1), r, t, x), p1.drift(t, x) + push)


@row("best_of_n", "baselines", "the_best_of_n_has_the_law_of_a_maximum", "06", ERRORS)
def best_of_four(g: Generator) -> Iterator[float]:
    """E20, Best-of-N: the best by r of N samples of p₁.

    The CDF of a maximum of N is F^N, with F the CDF of r = a·x₁ under p₁, a mixture on a line.
    """
    p1, r = mixture(g, 2, 3), LinearReward(random(g, 2))
    best, _ = best_of_n(ExactFlowMap(p1), r, 4096, 4, steps=6, dynamics="dopri5", generator=g)
    law = GaussianMixture(p1.weights, column(p1.means @ r.a), (r.a @ p1.covs @ r.a).reshape(-1, 1, 1))
    yield uniform_scores(cdf(law, column(r(best))) ** 4)


@row("smc", "baselines", "smc_estimates_have_no_bias", "06", ERRORS)
def twisted_smc(g: Generator) -> Iterator[float]:
    """E20, SMC (TDS): E[Ẑ] = E[e^r], E[Ẑ f̂] = E[e^r f(x₁)].

    Unbiased for any number of particles under the law of the steps: 60 populations of 64 particles.
    """
    p1, r, runs = mixture(g, 1, 1), rewards(g, 1)[1], []
    chain = law_of_steps(p1, 4)
    for _ in range(60):
        found, _ = smc(ExactFlowMap(p1), r, 64, steps=4, generator=g)
        white, z = whitened(found.samples, chain.tilt(r)), math.exp(found.log_partition - float(chain.log_partition(r)))
        runs.append([z - 1, z * float(white.mean()), z * float((white**2).mean() - 1)])
    yield scores(torch.tensor(runs))


@row("glass_rollout", "baselines", "glass_rollouts_converge_to_the_exact_map_at_order_one", "08", tolerance=1e-2)
def glass_rollouts(g: Generator) -> Iterator[float]:
    """E20, GLASS rollout: Euler steps of E12 from 0 to 1 ∼ p(x₁ ∣ x).

    32, 64 and 128 steps, extrapolated to infinitely many, against E11 with the same ε.
    """
    for p1, t, x, *_ in cases(g, CLOSED, t=(0.0, 0.7)):
        eps = random(g, 4, *x.shape)
        coarse, middle, fine = (glass_rollout(p1.drift, t, x, 4, steps, eps=eps) for steps in (32, 64, 128))
        limit = (coarse - 6 * middle + 8 * fine) / 3  # without the errors of order h and h²
        yield relative(limit, sample_posterior(ExactFlowMap(p1), t, x, 4, eps=eps))


@row("sde_rollout", "baselines", "sde_rollouts_converge_to_the_posterior_at_weak_order_one", "06", ERRORS)
def sde_rollouts(g: Generator) -> Iterator[float]:
    """E20, SDE rollout: the SDE of E6 from (t, x) to 1 ∼ p(x₁ ∣ x).

    4096 draws in each of three contexts: F of them is uniform, with F the CDF of E3.
    """
    p1, t = mixture(g, 1, 2), torch.tensor([0.0, 0.3, 0.6], dtype=torch.float64)
    x = interpolate(random(g, 3, 1), p1.sample(3, generator=g), t)
    for level in cdf(p1.posterior(t, x), sde_rollout(p1.drift, t, x, 4096, 300, generator=g)).T:
        yield uniform_scores(level)


@row("search time_grid", "search", "search_is_the_plain_loop_at_its_formulas_cost", "06", ERRORS)
def mfm_search(g: Generator) -> Iterator[float]:
    """E21, MFM-Search: x₁ = the best of M·N draws, x ← (1−t_{k+1}) x₀ + t_{k+1} x₁.

    Two steps of one Gaussian and r(x₁) = x₁. The CDF of the result is E_{x₁}[E_{x₀}[P(X ≤ y ∣ x)^N]^M].
    """
    M, N, (_, t, _) = 2, 3, time_grid(2, power=2.5)
    p1 = GaussianMixture(torch.ones(1).double(), random(g, 1, 1), torch.full((1, 1, 1), 9.0).double())
    found, _ = search(ExactFlowMap(p1), lambda x1: x1[:, 0], 4096, particles=M, n=N, steps=2, generator=g)
    x0 = quantiles(100, p1.mean.unsqueeze(0)).flatten()
    best = p1.mean + 3 * torch.special.ndtri(torch.special.ndtr(x0) ** (1 / (M * N)))  # of the first step
    last = p1.posterior(t, column((t * column(best) + (1 - t) * x0).flatten()))  # for all pairs
    points = p1.mean + torch.linspace(-20, 20, 500, dtype=torch.float64)
    level = torch.as_tensor(norm.cdf(points, last.mean, last.cov[..., 0].sqrt())).reshape(100, 100, -1)
    law = ((level**N).mean(1) ** M).mean(0)
    yield uniform_scores(torch.as_tensor(np.interp(found[:, 0], points, law)))
