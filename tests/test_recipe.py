"""The whole training loss: one batch, two halves, its units, weights and draws."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from mfm_ref import (
    MLP,
    ExactFlowMap,
    FlowMap,
    RandomBatches,
    TrainConfig,
    coupled_interpolants,
    meta_flow_map_loss,
    train,
)
from mfm_ref.recipe import CONSISTENCY, LATEST_CONTEXT, mean_flow, semigroup
from mfm_ref.times import balanced_times, context_time, ordered_times
from tests.helpers import (
    LIMIT,
    Bent,
    MapOf,
    Perturbed,
    Watched,
    finite_difference,
    gaussian,
    line,
    moment_scores,
    normal,
    z_scores,
)
from tests.strategies import SEEDS, assert_close, randn, random_mixture, rng

NOISE_FREE = [name for name in CONSISTENCY if name != "mean_flow"]


def recorded(name):
    """A consistency of the recipe as a function of one's own, and the list of what it was given and gave."""
    notes = []

    def consistency(X, r, drift, generator):
        notes.append((r, drift, *CONSISTENCY[name](X, r, drift, generator)))
        return notes[-1][2:]

    return consistency, notes


# ---- the loss by hand ----------------------------------------------------------------------------------


@pytest.mark.parametrize("with_drift", [False, True])
@pytest.mark.parametrize("name", [*CONSISTENCY, None])
def test_the_loss_and_its_gradient_by_hand(name, with_drift):
    """Seven rows, three on the diagonal. v and the arguments are read off the model's last call; x₁ − x̄₀ is
    (x₁ − z)/(1−s), the teacher's b̄ is the exact posterior's; units are spreads of N(0, 2.3)'s posteriors; the weight
    is 1/(size · unit) (‖Δ/size‖² + 0.01)^−p, frozen. The gradient is that by finite differences with target and
    weight frozen at θ, h² ~ 1e-8 of it, and not that of the loss as a whole."""
    p1, var, theta = gaussian(), 2.3, 0.7
    x1 = p1.sample(7, generator=rng(1))
    consistency, notes = (None, []) if name is None else recorded(name)
    drift = p1.drift if with_drift else None
    options = {"drift": drift, "data_var": var, "p": 0.3, "p_consistency": 0.8, "consistency_weight": 0.25}
    options["times"] = balanced_times  # whose default depends on the name

    def whole(a, objective=consistency):
        X = Watched(FlowMap(Bent(a)))
        return meta_flow_map_loss(X, x1, consistency=objective, **options, generator=rng(0)), X

    loss, X = whole(theta)
    s, u, z, t, x = X.calls[-1]
    half = 7 if name is None else 3
    assert torch.equal(s[:half], u[:half])
    assert (u > s)[half:].all()
    c2 = normal(var).posterior(t, 0 * t.unsqueeze(-1))
    unit = c2.cov.flatten().sqrt() / c2.marginal(s).cov.flatten().sqrt()
    target = p1.posterior(t, x).drift(s, z) if with_drift else (x1 - z) / (1 - s).unsqueeze(-1)
    size = unit
    if name is not None:
        r, given_drift, jump, size_of_jump = notes[0]
        assert (given_drift is None) == (drift is None)
        if drift is not None:
            assert_close(given_drift(t, x), drift(t, x), 1e-12)
        for actual, expected in zip(r[:5], (s, u, z, t, x), strict=True):
            assert torch.equal(actual, expected[half:])
        assert_close(r.velocity, (x1 - z)[half:] / (1 - s[half:]).unsqueeze(-1), 1e-9, 1 + r.velocity.abs())
        assert_close(r.std, c2.cov.flatten().sqrt()[half:], 1e-12)
        target, size = torch.cat([target[:half], jump]), torch.cat([unit[:half], size_of_jump])
    frozen = (FlowMap(Bent(theta)).velocity(s, u, z, t, x) - target).square().sum(1).detach()
    exponents = torch.tensor([0.3] * half + [0.8] * (7 - half), dtype=torch.float64)
    weight = (frozen / size**2 + 0.01) ** -exponents / (size * unit)
    weight = weight * torch.tensor([1 / half] * half + [0.25 / (7 - half)] * (7 - half) if half < 7 else [1 / 7] * 7)

    def by_hand(a):
        return (weight * (FlowMap(Bent(a)).velocity(s, u, z, t, x) - target).square().sum(1)).sum().detach()

    assert_close(loss.detach(), by_hand(theta), 1e-6, by_hand(theta))  # the weights are typed in float32
    loss.backward()
    gradient = X.X.network.theta.grad
    assert_close(gradient, finite_difference(by_hand, theta), 1e-5, 1 + gradient.abs())
    assert abs(gradient - finite_difference(lambda a: whole(a)[0].detach(), theta)) > 0.02 * abs(gradient)
    if name is not None:
        assert torch.equal(whole(theta, name)[0], loss)


def test_sizes_of_the_residuals():
    """c/S_s for a velocity at s; carried to u by the derivative of a Gaussian's map; the lengths of the jumps as
    correlations of Ī_s and Ī_u under that Gaussian, which are the cosines of their angles."""
    X = Watched(FlowMap(Bent(0.7)))
    sizes = {}
    for name in CONSISTENCY:
        consistency, notes = recorded(name)
        meta_flow_map_loss(X, randn(40, 2, seed=1), consistency=consistency, data_var=2.3, generator=rng(0))
        r, _, _, sizes[name] = notes[0]
        posterior = normal(2.3).posterior(r.t, 0 * r.t.unsqueeze(-1))
        c, spread_s, spread_u = (
            law.cov.flatten().sqrt() for law in (posterior, posterior.marginal(r.s), posterior.marginal(r.u))
        )
        damping = 0.1 + 0.9 * ((1 - r.s) * (1 - r.u) + r.s * r.u * c**2) / (spread_s * spread_u)
        z = torch.zeros(20, 1, dtype=torch.float64, requires_grad=True)
        moved = ExactFlowMap(normal(2.3))(r.s, r.u, z, r.t, 0 * z.detach())
        carried = torch.autograd.grad(moved.sum(), z)[0].flatten()
        expected = {
            "semigroup": c / spread_s,
            "shortcut": c / spread_s,
            "lagrangian": c / spread_u / damping,
            "eulerian": c / spread_s * carried / damping,
            "mean_flow": c / spread_s * carried / damping,
        }[name]
        assert_close(sizes[name], expected, 1e-9, expected)


def test_the_semigroups_midpoints():
    """Self: uniform between s and u, Kolmogorov–Smirnov at 1e-6, which w² is not. From a drift the second leg starts
    a step of 0.15 radians from s, or at u. The shortcut's is halfway, with a drift too."""
    p1, x1 = gaussian(1), randn(4_000, 1, seed=1)

    def midpoints(**options):
        X = Watched(ExactFlowMap(p1))
        meta_flow_map_loss(X, x1, **options, generator=rng(0))
        s, u = (a[2_000:] for a in X.calls[-1][:2])
        return s, X.calls[-2][0], u, X.calls[-1][3][2_000:]

    s, w, u, _ = midpoints()
    share = ((w - s) / (u - s)).numpy()
    assert stats.kstest(share, "uniform").pvalue > 1e-6
    assert stats.kstest(share**2, "uniform").pvalue < 1e-6
    for options in ({}, {"drift": p1.drift}):
        s, w, u, _ = midpoints(consistency="shortcut", **options)
        assert_close(w, (s + u) / 2, 1e-12)
    s, w, u, t = midpoints(drift=p1.drift)
    c = (1 - t) / (t**2 + (1 - t) ** 2).sqrt()
    grown = torch.atan2(w * c, 1 - w) - torch.atan2(s * c, 1 - s)
    assert (w <= u).all()
    assert_close(grown[w < u], torch.full_like(grown[w < u], 0.15), 1e-9)
    assert 0.5 < (w < u).double().mean() < 1


# ---- zero at the oracle --------------------------------------------------------------------------------


@given(SEEDS, st.integers(1, 3), st.sampled_from(NOISE_FREE), st.booleans(), st.floats(0.2, 5))
def test_the_whole_loss_is_zero_at_the_oracle(seed, dim, name, self_taught, data_var):
    """From a drift, for every consistency without noise, whatever unit is declared: rounding, in units of c ~ 0.002
    for the latest contexts, squared: below 1e-12. A teacher's step of 0.15 radians leaves 1e-4 (h⁴ in velocities,
    squared, times ten for the weights and narrow components), one of 0.05 a hundredth of that."""
    p1 = random_mixture(dim, 1 if dim > 1 else 3, seed)
    x1 = p1.sample(64, generator=rng(seed % 7))
    options = {"drift": p1.drift, "data_var": data_var, "self_taught": self_taught}

    def loss(X, consistency=name):
        return meta_flow_map_loss(X, x1, consistency=consistency, **options, generator=rng(seed % 11))

    oracle = ExactFlowMap(p1)
    if name == "semigroup" and not self_taught:
        assert loss(oracle) < 1e-3
        assert loss(oracle, partial(semigroup, step=0.05)) < 1e-5
    else:
        assert loss(oracle) < 1e-12
    other = ExactFlowMap(p1._from_eigen(p1.log_weights, p1.means + 1, p1.basis, p1.eigenvalues))
    assert loss(other) > 0.02


@pytest.mark.parametrize("p1", [gaussian(), line()], ids=["gaussian", "mixture"])
def test_from_data_the_oracle_is_stationary_without_adaptation(p1):
    """p = 0: the gradients of rows, for the oracle moved by θ_i φ in row i, have mean zero at θ = 0 in both halves,
    6e-7 each; not at θ = 0.5, nor for jumps with their velocity turned round."""
    n = 10_000
    x1 = p1.sample(n, generator=rng(0))

    def scores(consistency, theta=0.0):
        parameters = torch.full((n,), theta, dtype=torch.float64, requires_grad=True)
        X = Perturbed(ExactFlowMap(p1), parameters)
        options = {"p": 0, "p_consistency": 0, "context": early}
        loss = meta_flow_map_loss(X, x1, consistency=consistency, **options, generator=rng(1))
        (gradient,) = torch.autograd.grad(loss, parameters)
        return [float(z_scores(half, 0.0)) for half in gradient.split(n // 2)]

    def early(n, generator):  # late contexts, with their large velocities, would drown the rest
        return 0.5 * context_time(n, generator=generator)

    def backwards(X, r, drift, generator):
        return mean_flow(X, r._replace(velocity=-r.velocity), drift, generator)

    assert max(map(abs, scores("mean_flow"))) < LIMIT
    assert min(scores("mean_flow", theta=0.5)) > LIMIT
    assert abs(scores(backwards)[1]) > LIMIT


# ---- rows ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3,), (1, 2, 2)])
@pytest.mark.parametrize("with_drift", [False, True])
@pytest.mark.parametrize(("batch", "name"), [(2, "semigroup"), (5, "semigroup"), *((3, name) for name in CONSISTENCY)])
def test_any_shape_any_batch_and_labels(shape, with_drift, batch, name):
    """States of any shape, B = D among them; labels go to the half of the batch that their rows are in."""
    x1 = torch.arange(batch).reshape(-1, *[1] * len(shape)) * torch.ones(batch, *shape)
    y = torch.arange(batch)
    seen = []

    def velocity(s, u, z, t, x, y=None):
        assert s.shape == u.shape == t.shape == y.shape == z.shape[:1]
        seen.append(y.tolist())
        return y.reshape(-1, *[1] * len(shape)) * torch.ones_like(z)

    def drift(t, x, y):
        assert y.shape == x.shape[:1]
        return y.reshape(-1, *[1] * len(shape)) * torch.ones_like(x)

    X = MapOf(None, shape, torch.float32)
    X.velocity = lambda s, u, z, t, x, y=None: velocity(*(torch.as_tensor(a).flatten() for a in (s, u)), z, t, x, y)
    drift = drift if with_drift else None
    loss = meta_flow_map_loss(X, x1, y, drift=drift, consistency=name, generator=rng(0))
    assert loss.shape == ()
    assert len(seen) > 1
    assert torch.isfinite(loss)
    assert seen == [list(range(batch // 2, batch))] * (len(seen) - 1) + [list(range(batch))]


@pytest.mark.parametrize("with_drift", [False, True])
def test_batches_hold_two_independent_noises_of_one_clean_sample(with_drift):
    """E9 read off the model's own arguments: with x₁ = c, (x − t c)/(1−t) and (z − s c)/(1−s) are independent normals.

    Both halves; means, squares and products of 5,000 rows, 6e-7 each. The last call is that of the whole batch.
    """
    p1, clean, calls = gaussian(1), 3.0, []

    def spy(s, u, z, t, x, y=None):
        calls.append([torch.as_tensor(a).flatten() for a in (s, u, z, t, x)])
        return z

    X = MapOf(None, (1,))
    X.velocity = spy
    x1 = torch.full((10_000, 1), clean, dtype=torch.float64)
    meta_flow_map_loss(X, x1, drift=p1.drift if with_drift else None, generator=rng(0))
    diagonal, jump = zip(*(a.split(5_000) for a in calls[-1]), strict=True)
    assert torch.equal(diagonal[0], diagonal[1])
    assert (jump[0] <= jump[1]).all()
    for s, _, z, t, x in (diagonal, jump):
        noises = torch.stack([(x - t * clean) / (1 - t), (z - s * clean) / (1 - s)], -1)
        assert moment_scores(noises, torch.zeros(2).double(), torch.eye(2).double()) < LIMIT


def test_meta_flow_map_loss_is_smallest_at_the_oracle():
    """From a drift it is zero up to the teacher's step; from data it is the noise of E13, least at the oracle."""
    p1 = gaussian()
    x1 = p1.sample(20_000, generator=rng(0))
    var = float(p1.cov.diagonal().mean())
    oracle, other = ExactFlowMap(p1), ExactFlowMap(gaussian(seed=1))

    def loss(X, drift, **options):
        return meta_flow_map_loss(X, x1, drift=drift, data_var=var, generator=rng(1), **options)

    assert loss(oracle, p1.drift, consistency=partial(semigroup, step=0.05)) < 1e-7
    assert loss(oracle, p1.drift) < 1e-4
    assert loss(other, p1.drift) > 0.1
    for p in (0.0, 0.5):
        assert loss(oracle, None, p=p) > 0.1
        assert loss(other, None, p=p) > 1.2 * loss(oracle, None, p=p)


@pytest.mark.parametrize("teacher", [True, False], ids=["drift", "data"])
def test_a_short_training_lowers_the_loss(teacher):
    """100 steps of a small MLP told the wrong mean and covariance: its error against the oracle falls to a fifth.

    It falls to a fortieth from the drift and to a tenth from data, whose targets are noisy.
    """
    p1 = gaussian()
    torch.manual_seed(0)
    model = FlowMap(MLP(torch.zeros(2), torch.eye(2), hidden=48, depth=2))
    drift = p1.to(torch.float32).drift if teacher else None
    x1 = p1.sample(20_000, generator=rng(5)).float()

    def error(X):
        t = 0.6 * torch.rand(500, generator=rng(1))
        x, eps, _ = coupled_interpolants(x1[:500], 0.0, t, generator=rng(2))
        exact = ExactFlowMap(p1)(0.0, 1.0, eps.double(), t.double(), x.double())
        return (X(0.0, 1.0, eps, t, x) - exact).detach().square().mean()

    def loss(X, batch, generator):
        return meta_flow_map_loss(X, batch, drift=drift, generator=generator)

    before = error(model)
    data = RandomBatches(lambda g: x1[torch.randint(len(x1), (512,), generator=g)], rng(0))
    average, history = train(model, loss, data, TrainConfig(steps=100, lr=5e-3, warmup=10, decay=0.9))
    assert error(average) < before / 5
    assert sum(history[-20:]) < 0.8 * sum(history[:20])


# ---- what is drawn, and what is passed on --------------------------------------------------------------


def arguments_of(x1, X=None, **options):
    """[s, u, z, t, x] of the whole batch, as a loss of these options calls the model with them."""
    X = Watched(X or ExactFlowMap(gaussian(x1.shape[1])))
    meta_flow_map_loss(X, x1, **options, generator=rng(0))
    return X.calls[-1]


def test_laws_of_the_times_are_passed_on():
    """The context's law: zeros in a tenth of the rows, √t uniform elsewhere up to the latest context, in both halves;
    internal times are what `times(t, std)` returns, u put on s in the first half. Kolmogorov–Smirnov at 1e-6."""
    x1 = randn(10_000, 1, seed=1)
    t = arguments_of(x1)[3]
    assert t.max() == LATEST_CONTEXT
    for half in t.split(5_000):
        assert abs(z_scores((half == 0).double(), 0.1)) < LIMIT
        assert stats.kstest(half[(half > 0) & (half < LATEST_CONTEXT)].numpy() ** 0.5, "uniform").pvalue > 1e-6
        assert stats.kstest(half[half > 0].numpy(), "uniform").pvalue < 1e-6
    given = []

    def times(t, std, generator):
        given.append((t, std, ordered_times(len(t), generator=generator)))
        return given[-1][2]

    s, u, _, t, _ = arguments_of(x1, times=times, data_var=2.3, context=lambda n, generator: torch.linspace(0, 1, n))
    assert_close(t, torch.linspace(0, 1, 10_000).double().clamp(max=LATEST_CONTEXT), 0)
    assert torch.equal(given[0][0], t)
    assert_close(given[0][1], normal(2.3).posterior(t, 0 * t.unsqueeze(-1)).cov.flatten().sqrt(), 1e-12)
    assert torch.equal(s, given[0][2][0].double())
    assert torch.equal(u, torch.cat([s[:5_000], given[0][2][1, 5_000:].double()]))


@pytest.mark.parametrize("name", CONSISTENCY)
def test_default_internal_times_jump_from_the_start_where_the_objective_moves_the_end(name):
    s, u = arguments_of(randn(2_000, 1, seed=1), consistency=name)[:2]
    assert ((u[1_000:] == 1).any(), (s == 0).any()) == ((False, True) if name == "lagrangian" else (True, False))


def test_a_consistency_of_ones_own_gets_rows_drift_and_generator():
    """Its target and size make the second half of the loss; self_taught keeps the drift from it, not from E13."""
    p1, x1, notes = gaussian(), randn(8, 2, seed=1), []
    g = rng(3)

    def own(X, r, drift, generator):
        notes.append((X, r, drift, generator))
        return X.velocity(r.s, r.u, r.z, r.t, r.x), torch.ones(4, dtype=torch.float64)

    oracle = ExactFlowMap(p1)
    for self_taught, expected in ((False, p1.drift), (True, None)):
        loss = meta_flow_map_loss(oracle, x1, drift=p1.drift, consistency=own, self_taught=self_taught, generator=g)
        assert loss < 1e-12  # no residual in either half
        X, r, drift, generator = notes.pop()
        assert X is oracle
        assert (drift is None) == (expected is None)
        if expected is not None:
            assert_close(drift(r.t, r.x), expected(r.t, r.x), 1e-12)
        assert generator is g
        assert r.y is None
        assert all(len(a) == 4 for a in r if a is not None)
    with pytest.raises(ValueError, match="same shape"):
        meta_flow_map_loss(oracle, x1, consistency=lambda X, r, drift, g: (r.z[:3], r.std), generator=g)


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize(
    ("name", "self_taught", "rows"),
    [
        ("eulerian", False, [7]),
        ("lagrangian", False, [7]),
        ("semigroup", False, [7, 4, 4, 4]),  # the stages of one Runge–Kutta step
        ("shortcut", False, [3]),
        ("mean_flow", False, [3]),
        ("eulerian", True, [3]),
        (None, False, [7]),
    ],
)
def test_the_teacher_is_asked_once_for_both_halves(name, self_taught, rows, labelled):
    """Three rows are on the diagonal, and go along with the first batch that the other four need, each with its own
    label: the loss is that of two batches."""
    means, seen = randn(7, 2, seed=3), []
    y = torch.arange(7) if labelled else None  # no two rows have one law, N(means[y], I)

    def drift(t, x, y=None):
        seen.append(len(x))
        t, mean = t.unsqueeze(-1), means[0] if y is None else means[y]
        return mean + (2 * t - 1) / (t**2 + (1 - t) ** 2) * (x - t * mean)

    def apart(X, r, given, generator):
        return CONSISTENCY[name](X, r, given and drift, generator)

    def loss(consistency):
        options = {"drift": drift, "self_taught": self_taught, "times": balanced_times, "generator": rng(0)}
        return meta_flow_map_loss(FlowMap(Bent(0.7)), randn(7, 2, seed=1), y, consistency=consistency, **options)

    joined = loss(name)
    assert seen == rows
    if name is not None:
        assert_close(joined.detach(), loss(apart).detach(), 1e-12)


@pytest.mark.parametrize("labelled", [False, True])
def test_a_consistency_of_ones_own_may_ask_the_teacher_as_it_likes(labelled):
    """At one time for all rows, at more rows than its half has, without labels: the answers are the teacher's."""
    y, found = torch.arange(6) if labelled else None, []

    def drift(t, x, y=None):
        shift = 0 if y is None else y.unsqueeze(-1)
        return torch.as_tensor(t, dtype=x.dtype).reshape(-1, 1) * x + shift

    def own(X, r, b, generator):
        more = torch.cat([r.x, r.x])
        arguments = [] if r.y is None else [r.y]
        twice = [torch.cat([a, a]) for a in arguments]
        for ask in ((0.3, r.x), (0.4, r.x, *arguments), (0.5, more, *twice)):
            found.append((b(*ask), drift(*ask)))
        return r.z, r.std

    meta_flow_map_loss(FlowMap(Bent(0.7)), randn(6, 2, seed=1), y, drift=drift, consistency=own)
    assert len(found) == 3
    for answer, expected in found:
        assert_close(answer, expected, 1e-12)


def test_a_drift_of_another_shape_is_refused():
    for name in (None, "eulerian", "shortcut"):
        with pytest.raises(ValueError, match="same shape"):
            meta_flow_map_loss(
                FlowMap(Bent(0.7)),
                randn(6, 2, seed=1),
                consistency=name,
                drift=lambda t, x: x[..., :1],
                generator=rng(0),
            )


@pytest.mark.parametrize(
    ("name", "self_taught"), [("eulerian", False), ("eulerian", True), ("shortcut", False), (None, False)]
)
def test_targets_are_made_without_a_graph(name, self_taught):
    """Whatever a drift or a consistency of one's own does, and in whichever half."""
    seen, X = [], FlowMap(Bent(0.7))

    def drift(t, x):
        seen.append(X.velocity(t, t, x, 0.0, x))
        return seen[-1]

    def own(X, r, b, generator):
        seen.append(X.velocity(r.s, r.s, r.z, r.t, r.x))
        return CONSISTENCY[name](X, r, b, generator)

    consistency = None if name is None else own
    meta_flow_map_loss(X, randn(8, 2, seed=1), drift=drift, consistency=consistency, self_taught=self_taught)
    assert seen and not any(v.requires_grad for v in seen)


@pytest.mark.parametrize(
    ("size", "match"),
    [
        (1.0, r"got \['Tensor', 'float'\]"),
        (torch.tensor(1.0), "same shape: size"),
        (torch.ones(1), "same shape: size"),
        (torch.ones(4, 1), "same shape: size"),
        (torch.tensor([1.0, 1.0, 0.0, 1.0]), "size of a residual must be positive, got 0.0"),
        (-torch.ones(4), "size of a residual must be positive, got -1.0"),
    ],
)
def test_sizes_that_are_none_are_refused(size, match):
    size = size.double() if isinstance(size, torch.Tensor) else size
    with pytest.raises(ValueError, match=match):
        meta_flow_map_loss(FlowMap(Bent(0.7)), randn(8, 2, seed=1), consistency=lambda X, r, b, g: (r.z, size))


def test_a_target_with_a_graph_is_cut_from_it():
    """From a consistency of one's own or a drift that is being trained: the gradient is that of the same numbers."""

    def gradient(cut):
        X = FlowMap(Bent(0.7))

        def drift(t, x):
            return cut(X.velocity(t, t, x, 0.0, x))

        def own(X, r, drift, generator):
            return cut(X.velocity(r.s, r.s, r.z, r.t, r.x)), r.std

        meta_flow_map_loss(X, randn(8, 2, seed=1), drift=drift, consistency=own, generator=rng(0)).backward()
        return X.network.theta.grad

    assert_close(gradient(lambda target: target), gradient(lambda target: target.detach()), 1e-12)


def test_the_generator_decides_every_draw():
    """The same seed the same loss, another seed another, and torch's own generator stays where it was."""
    x1 = randn(8, 2, seed=1)
    before = torch.get_rng_state()
    for name in (*CONSISTENCY, None):
        one, same, other = (
            meta_flow_map_loss(FlowMap(Bent(0.7)), x1, consistency=name, generator=rng(k)).detach() for k in (0, 0, 1)
        )
        assert torch.equal(one, same)
        assert not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), before)


# ---- errors --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"data_var": 0.0}, "data_var must be positive and finite, got 0.0"),
        ({"data_var": math.nan}, "data_var must be positive and finite, got nan"),
        ({"consistency_weight": 0.0}, "consistency_weight must be positive and finite, got 0.0"),
        ({"consistency_weight": -1.0}, "consistency_weight must be positive and finite, got -1.0"),
        ({"data_var": math.inf}, "data_var must be positive and finite, got inf"),
        ({"p": -1.0}, "p must be >= 0 and c positive, got -1.0"),
        ({"p_consistency": math.nan}, "p must be >= 0 and c positive, got nan"),
        ({"context": lambda n, generator: torch.full((n,), 1.5)}, r"time t must lie in \[0, 1\]"),
        ({"consistency": 3}, "a function or one of semigroup, shortcut, lagrangian, eulerian, mean_flow, got 3"),
        (
            {"consistency": lambda X, r, drift, generator: r.z},
            "must return a pair of tensors, the target and the size of its residual, got Tensor",
        ),
        ({"consistency": "eulerain"}, "one of semigroup, shortcut, lagrangian, eulerian, mean_flow, got 'eulerain'"),
    ],
)
def test_settings_out_of_range_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        meta_flow_map_loss(ExactFlowMap(gaussian()), randn(4, 2, seed=1), **options)


@pytest.mark.parametrize(
    ("x1", "match"),
    [
        (torch.tensor([[0.0], [math.nan]]), "x1 must be finite, got 1 NaN or infinite"),
        (torch.tensor([[0.0], [math.inf]]), "x1 must be finite"),
        (torch.zeros(1, 1), "at least two samples of floats, got 1"),
        (torch.zeros(4, 1, dtype=torch.int64), "samples of floats, got 4 of torch.int64"),
    ],
)
def test_meta_flow_map_loss_refuses(x1, match):
    with pytest.raises(ValueError, match=match):
        meta_flow_map_loss(ExactFlowMap(gaussian(1).to(torch.float32)), x1)
