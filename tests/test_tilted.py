"""The tilted path's objective: E[w · target] = E[w] b̄* of the exact tilted posterior, and wrong variants that fail."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mfm_ref import ExactFlowMap, GaussianLikelihood, LinearReward
from mfm_ref.estimators import weighted_mean
from mfm_ref.interpolant import glass_drift, glass_statistic
from mfm_ref.objectives import semigroup_target
from mfm_ref.recipe import CONSISTENCY, no_context
from mfm_ref.tilted import tilted_map_loss, tilted_target
from tests.helpers import LIMIT, MapOf, Perturbed, Watched, gaussian, line, z_scores
from tests.strategies import Case, assert_close, cases, column, mixtures, randn, rewards, rng, row_scale

FORMS = ["plain", "with the base's drift"]
# Single Gaussians, whose map is a closed form; states before s = 0.95, after which 1/(1−s) is large.
CASES = cases(p1=mixtures(max_components=1), t=st.floats(0, 0.99) | st.just(0.0), s=st.floats(0, 0.95) | st.just(0.0))
PROBLEMS = {
    "gaussian": (gaussian(), GaussianLikelihood(torch.tensor([0.8, -0.6], dtype=torch.float64), 2.0, 0.7)),
    "mixture": (line(), GaussianLikelihood(torch.ones(1, dtype=torch.float64), 1.0, 0.5)),
}


class Draws(ExactFlowMap):
    """Posterior draws of a generator's, whatever ε: fast enough for many."""

    def __init__(self, p1, generator):
        super().__init__(p1)
        self.generator = generator

    def __call__(self, s, u, z, t, x, y=None):
        return self.p1.posterior(t, x).sample(1, generator=self.generator)[0]


def base_of(form, p1):
    return None if form == "plain" else p1.drift


# ---- the minimiser -------------------------------------------------------------------------------------


def rows(p1, g, n):
    """Four contexts and states, none of them typical, n times each: ends of both times among them."""
    s = torch.tensor([0.0, 0.0, 0.4, 0.8], dtype=torch.float64)
    t = torch.tensor([0.0, 0.6, 0.3, 0.9], dtype=torch.float64)
    x, z = (1.5 * torch.randn((4, p1.dim), generator=g, dtype=torch.float64) for _ in range(2))
    return tuple(a.repeat_interleave(n, 0) for a in (s, z, t, x))


def scores(problem, form, draws, candidate=None, change=None, n=40_000):
    """Largest |z| of w (target − candidate), 0 in expectation for b̄*, over four contexts; `change` spoils target or w.

    Eight statistics at most a call, and some 20 calls that must pass: see `tests.helpers` on false alarms.
    """
    p1, reward = PROBLEMS[problem]
    tilted = p1.tilt(reward)
    s, z, t, x = rows(p1, rng(0), n)
    options = {"n": draws, "base": base_of(form, p1), "log_scale": float(p1.log_partition(reward)), "generator": rng(1)}
    target, w = tilted_target(Draws(p1, rng(2)), reward, s, z, t, x, **options)
    if change is not None:
        target, w = change(target, w, (s, z, t, x))
    exact = glass_drift(candidate(p1, tilted) if candidate else tilted.drift, s, z, t, x)
    residual = w.unsqueeze(-1) * (target - exact)
    return torch.stack([z_scores(part, 0.0).abs().max() for part in residual.split(n)]).max()


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize(("form", "draws"), [("plain", 1), ("plain", 3), (FORMS[1], 2), (FORMS[1], 5)])
def test_the_minimiser_is_the_drift_of_the_tilted_posteriors_and_nothing_else_tried(problem, form, draws):
    assert scores(problem, form, draws) < LIMIT
    wrong = {
        "the base's": lambda p1, tilted: p1.drift,
        "halfway": lambda p1, tilted: lambda t, x: (p1.drift(t, x) + tilted.drift(t, x)) / 2,
    }
    for name, candidate in wrong.items():
        assert scores(problem, form, draws, candidate) > LIMIT, name


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize(("form", "draws"), [("plain", 1), ("plain", 3), (FORMS[1], 2)])
def test_without_the_weight_the_target_is_biased(problem, form, draws):
    assert scores(problem, form, draws, change=lambda target, w, _: (target, torch.ones_like(w))) > LIMIT


@pytest.mark.parametrize("problem", PROBLEMS)
def test_the_pairs_of_a_draw_with_itself_must_go(problem):
    """n/(n−1) left out: for n = 2 the shift from the base is half of what it should be."""
    p1, _ = PROBLEMS[problem]

    def halved(target, w, at):
        base = glass_drift(p1.drift, *at)
        return base + (target - base) / 2, w

    assert scores(problem, FORMS[1], 2, change=halved) > LIMIT


def test_the_drift_takes_the_noise_out_of_late_targets():
    """Late, e^r is nearly one number over a posterior: the second form has less than a quarter of the noise."""
    p1, reward = PROBLEMS["gaussian"]
    s, t = torch.full((20_000,), 0.9, dtype=torch.float64), torch.full((20_000,), 0.95, dtype=torch.float64)
    z, x = (randn(1, 2, seed=k).expand(20_000, -1) for k in (1, 2))
    plain, controlled = (
        tilted_target(Draws(p1, rng(3)), reward, s, z, t, x, n=4, base=base)[0].std(0) for base in (None, p1.drift)
    )
    assert (controlled < plain / 4).all()


# ---- the target as a formula ---------------------------------------------------------------------------


@given(CASES, st.sampled_from(FORMS), st.integers(2, 5), st.data())
def test_weight_times_target_is_a_mean_over_draws_or_pairs(case: Case, form, n, data):
    """What makes it unbiased for every n: w · target of n draws is the mean of those of each draw, or of each pair."""
    reward, base = data.draw(rewards(case.p1.dim)), base_of(form, case.p1)
    X, eps = ExactFlowMap(case.p1), randn(n, *case.x.shape, seed=case.seed)
    parts = [[i] for i in range(n)] if base is None else [[i, j] for i in range(n) for j in range(i)]

    def product(which):
        target, w = tilted_target(
            X, reward, case.s, case.z, case.t, case.x, n=len(which), base=base, eps=eps[which], log_scale=scale
        )
        return w.unsqueeze(-1) * target, w

    scale = 0.0
    with torch.no_grad():
        t_star, x_star, *_ = glass_statistic(case.s, case.z, case.t, case.x)
        scale = max(float(reward(X(0.0, 1.0, e, t_star, x_star)).max()) for e in eps)
    whole, weight = product(list(range(n)))
    products, weights = zip(*map(product, parts), strict=True)
    assert_close(weight, torch.stack(weights).mean(0), 1e-9)
    size = row_scale(*(a.unsqueeze(-1) if a.ndim == 1 else a for a in (weight, whole, *products)))
    assert_close(whole, torch.stack(products).mean(0), 1e-7, size)


@given(CASES, st.integers(2, 4), st.floats(-3, 3))
def test_a_constant_reward_leaves_the_base_without_noise(case: Case, n, constant):
    target, w = tilted_target(
        ExactFlowMap(case.p1), lambda x: torch.full_like(x[:, 0], constant), case.s, case.z, case.t, case.x, n=n,
        base=case.p1.drift, log_scale=constant, generator=rng(case.seed),
    )  # fmt: skip
    exact = glass_drift(case.p1.drift, case.s, case.z, case.t, case.x)
    assert_close(target, exact, 1e-9, row_scale(exact, case.z, case.x) * (1 + 1 / (1 - column(case.s))))
    assert_close(w, torch.ones_like(w), 1e-12)


@given(CASES, st.integers(1, 4), st.data())
def test_the_plain_target_is_the_weighted_mean_of_posterior_draws(case: Case, n, data):
    """E10 of one point x̂: its velocity from z, (x̂ − z)/(1−s), with the draws made at the statistic (E12)."""
    reward, eps = data.draw(rewards(case.p1.dim)), randn(n, *case.x.shape, seed=case.seed)
    X = ExactFlowMap(case.p1)
    target, w = tilted_target(X, reward, case.s, case.z, case.t, case.x, n=n, eps=eps, log_scale=1.0)
    t_star, x_star, *_ = glass_statistic(case.s, case.z, case.t, case.x)
    draws = torch.stack([X(0.0, 1.0, e, t_star, x_star) for e in eps])
    r = torch.stack([reward(d) for d in draws])
    arrived = case.z + (1 - column(case.s)) * target
    assert_close(arrived, weighted_mean(r, draws), 1e-9, row_scale(arrived, case.z, *draws))
    assert_close(w, (r - 1).exp().mean(0), 1e-9, 1 + w)


def test_at_the_ends_of_the_times():
    """t = 1: the posterior is a point, and the velocity leads to it. s = t = 0: p₁ itself, and the mean of its tilt."""
    p1, reward = PROBLEMS["gaussian"]
    z, x = randn(3, 2, seed=0), randn(3, 2, seed=1)
    for form in FORMS:
        target, w = tilted_target(ExactFlowMap(p1), reward, 0.5, z, 1.0, x, n=2, base=base_of(form, p1))
        assert_close(target, 2 * (x - z), 1e-12, row_scale(x, z))
        assert_close(w, reward(x).exp(), 1e-12)
        generator = rng(2)
        many = tilted_target(Draws(p1, generator), reward, 0.0, z, 0.0, x, n=100_000, base=base_of(form, p1))[0]
        assert_close(many + z, p1.tilt(reward).mean.expand(3, 2), 0.02)


@pytest.mark.parametrize("form", FORMS)
def test_states_of_any_shape_and_rows_apart(form):
    """B = D = 3 and images: row k of a batch is what it is alone, whatever the form of its times."""
    for shape in ((3,), (1, 2, 2)):
        X = MapOf(lambda s, u, z, t, x, y: t * x + (1 - t) * z.sin(), shape)
        z, x, eps = randn(3, *shape, seed=0), randn(3, *shape, seed=1), randn(2, 3, *shape, seed=2)
        s, t = torch.tensor([0.0, 0.3, 0.9], dtype=torch.float64), torch.tensor([0.7, 0.0, 0.2], dtype=torch.float64)

        def drift(t, x):
            return x + t.reshape(-1, *[1] * (x.ndim - 1))

        options = {"n": 2, "base": None if form == "plain" else drift}
        target, w = tilted_target(X, lambda x1: x1.flatten(1).sum(1), s, z, t, x, eps=eps, **options)
        assert target.shape == z.shape
        assert w.shape == (3,)
        for k in range(3):
            row = slice(k, k + 1)
            at = float(s[k]), z[row], t[row], x[row]
            alone, weight = tilted_target(X, lambda x1: x1.flatten(1).sum(1), *at, eps=eps[:, row], **options)
            assert_close(target[row], alone, 1e-12, 1 + alone.abs())
            assert_close(w[row], weight, 1e-12, 1 + weight)


# ---- the whole loss ------------------------------------------------------------------------------------


def early(n, generator):  # late contexts, with their large velocities, would drown the rest
    return 0.6 * torch.rand(n, generator=generator)


@pytest.mark.parametrize("form", FORMS)
def test_the_gradient_of_the_loss_vanishes_at_the_exact_tilted_map(form):
    """One parameter a row at θ = 0, on the diagonal; states off the path of p*. The base's map in its place fails."""
    p1, reward = PROBLEMS["gaussian"]
    n, scale = 20_000, float(p1.log_partition(reward))
    x1 = 1.5 * p1.sample(n, generator=rng(0))

    def score(law, theta=0.0, context=early):
        parameters = torch.full((n,), theta, dtype=torch.float64, requires_grad=True)
        X = Perturbed(ExactFlowMap(law), parameters)
        options = {"n": 2, "base": base_of(form, p1), "context": context, "generator": rng(1)}
        loss = tilted_map_loss(X, x1, Draws(p1, rng(2)), reward, consistency=None, log_scale=scale, **options)
        return abs(float(z_scores(torch.autograd.grad(loss, parameters)[0], 0.0)))

    assert score(p1.tilt(reward)) < LIMIT
    assert score(p1.tilt(reward), context=no_context) < LIMIT
    assert score(p1) > LIMIT
    assert score(p1.tilt(reward), theta=0.2) > LIMIT


def test_the_halves_of_the_batch():
    """The first half asks for v_{s,s}, the second for jumps with the target of the consistency, of the map itself."""
    p1, reward = PROBLEMS["gaussian"]
    notes = []

    def consistency(X, r, drift, generator):
        assert drift is None
        target = semigroup_target(X, r.s, (r.s + r.u) / 2, r.u, r.z, r.t, r.x)
        notes.append((r, target))
        return target, torch.ones_like(r.s)

    exact = ExactFlowMap(p1.tilt(reward))
    X, x1 = Watched(exact), p1.sample(7, generator=rng(0))
    loss = tilted_map_loss(X, x1, ExactFlowMap(p1), reward, consistency=consistency, generator=rng(1))
    s, u, z, t, x = X.calls[-1]
    assert torch.equal(s[:3], u[:3])
    assert (u[3:] >= s[3:]).all() and (u[3:] > s[3:]).any()
    ((r, _),) = notes
    for a, b in zip((s, u, z, t, x), (r.s, r.u, r.z, r.t, r.x), strict=True):
        assert torch.equal(a[3:], b)
    assert torch.isfinite(loss)
    # On the exact map the jumps cost nothing: the whole is the diagonal's part.
    diagonal = tilted_map_loss(
        exact, x1, ExactFlowMap(p1), reward, consistency=lambda X, r, d, g: (X.velocity(*r[:5]), torch.ones_like(r.s)),
        generator=rng(1),
    )  # fmt: skip
    assert_close(loss, diagonal, 1e-9)


@pytest.mark.parametrize("name", [name for name in CONSISTENCY if name != "mean_flow"])
def test_every_self_consistency_gives_a_loss(name):
    p1, reward = PROBLEMS["gaussian"]
    theta = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    X = Perturbed(ExactFlowMap(p1), theta)
    loss = tilted_map_loss(
        X, p1.sample(6, generator=rng(0)), ExactFlowMap(p1), reward, consistency=CONSISTENCY[name], generator=rng(1)
    )
    (gradient,) = torch.autograd.grad(loss, theta)
    assert torch.isfinite(gradient).all() and (gradient != 0).any()


# ---- bad input -----------------------------------------------------------------------------------------


def test_what_is_refused():
    p1 = gaussian()
    X, z = ExactFlowMap(p1), randn(2, 2, seed=0)
    reward = LinearReward(torch.ones(2, dtype=torch.float64))
    with pytest.raises(ValueError, match="needs s < 1, got s = 1"):
        tilted_target(X, reward, 1.0, z, 0.5, z)
    with pytest.raises(ValueError, match="n must be an integer >= 2, got 1"):
        tilted_target(X, reward, 0.5, z, 0.5, z, n=1, base=p1.drift)
    with pytest.raises(ValueError, match="n must be an integer >= 1, got 0"):
        tilted_target(X, reward, 0.5, z, 0.5, z, n=0)
    with pytest.raises(ValueError, match="choose a larger log_scale"):
        tilted_target(X, reward, 0.5, z, 0.5, z, log_scale=-1e4)
    with pytest.raises(ValueError, match="same shape"):
        tilted_target(X, reward, 0.5, z, 0.5, z, base=lambda t, x: x[:, :1])
    with pytest.raises(ValueError, match="at least two samples, got 1"):
        tilted_map_loss(X, z[:1], X, reward)
    with pytest.raises(ValueError, match="data_var must be positive"):
        tilted_map_loss(X, z, X, reward, data_var=0.0)
    with pytest.raises(ValueError, match="eps must have shape"):
        tilted_target(X, reward, 0.5, z, 0.5, z, n=3, eps=randn(2, 2, 2, seed=0))
