"""E14: what ties a map's jumps to its diagonal: zero at the oracle, far from it at wrong maps, and by forward mode."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mfm_ref import (
    MLP,
    ExactFlowMap,
    FlowMap,
    coupled_interpolants,
    diagonal_loss,
    eulerian_loss,
    eulerian_target,
    glass_drift,
    lagrangian_loss,
    lagrangian_target,
    mean_flow_loss,
    mean_flow_target,
    semigroup_loss,
    semigroup_target,
)
from mfm_ref.objectives import teacher_velocity
from tests.helpers import (
    LIMIT,
    Bent,
    MapOf,
    Perturbed,
    finite_difference,
    gaussian,
    line,
    one_sided_difference,
    slope,
    wrong_maps,
    z_scores,
)
from tests.strategies import (
    SEEDS,
    Case,
    assert_close,
    batch_times,
    cases,
    column,
    mixtures,
    randn,
    random_mixture,
    rng,
    row_scale,
)

CHEAP = mixtures(max_components=1) | mixtures(max_dim=1)  # closed form and quantile routes of the oracle
TIMES = st.floats(0, 0.95, allow_subnormal=False)
LATE = st.sampled_from([0.0, 0.95, 0.998]) | TIMES  # contexts as late as training draws them
OURS = ["self", "teacher"]


def midway(s, u):
    """A third time for the semigroup law."""
    return s + 0.6 * (u - s)


TARGETS = {  # target(X, s, u, z, t, x, drift=...)
    "semigroup": lambda X, s, u, *rest, **options: semigroup_target(X, s, midway(s, u), u, *rest, **options),
    "lagrangian": lagrangian_target,
    "eulerian": eulerian_target,
}
LOSSES = {
    "semigroup": lambda X, s, u, *rest, **options: semigroup_loss(X, s, midway(s, u), u, *rest, **options),
    "lagrangian": lagrangian_loss,
    "eulerian": eulerian_loss,
}
EXACT = [(name, ours) for name in TARGETS for ours in OURS if (name, ours) != ("semigroup", "teacher")]


# ---- zero at the oracle --------------------------------------------------------------------------------


@given(cases(p1=CHEAP, t=LATE, s=TIMES), st.sampled_from(EXACT), st.booleans())
def test_targets_at_the_oracle_are_its_own_velocity(case: Case, objective, to_the_end):
    """The residual is rounding, in velocities divided by u − s (kept above 1e-3) once, in their derivatives twice,
    and that times u − s: 1e-16/1e-3, with a hundredfold for the size of ∇b̄ in the narrowest posteriors."""
    name, ours = objective
    X, s = ExactFlowMap(case.p1), case.s
    u = torch.ones_like(s) if to_the_end else torch.maximum(case.u, s + 1e-3)
    drift = case.p1.drift if ours == "teacher" else None
    exact = X.velocity(s, u, case.z, case.t, case.x)
    target = TARGETS[name](X, s, u, case.z, case.t, case.x, drift=drift)
    narrow = column(1 - torch.as_tensor(case.t))  # c ~ 1−t: ∇b̄ ~ 1/c
    assert_close(target, exact, 1e-11, row_scale(exact, case.z, case.x) / narrow)
    loss = LOSSES[name](X, s, u, case.z, case.t, case.x, drift=drift)
    assert loss <= 1e-22 * (row_scale(exact, case.z, case.x) / narrow).square().sum()


@given(cases(t=LATE, s=TIMES), st.sampled_from([*TARGETS, "mean flow"]), st.sampled_from(OURS))
def test_targets_on_the_diagonal_are_the_drift(case: Case, name, ours):
    """At s = u every objective is E13: the target is b̄_s, or v̇ itself, with no NaN from (u−s)/(u−s)."""
    X, arguments = ExactFlowMap(case.p1), (case.s, case.s, case.z, case.t, case.x)
    if name == "mean flow":
        assert torch.equal(mean_flow_target(X, *arguments, case.x1), case.x1)
        return
    posterior = case.p1.posterior(case.t, case.x)
    expected = posterior.drift(case.s, case.z)
    narrow = column(1 - torch.as_tensor(case.t))
    actual = TARGETS[name](X, *arguments, drift=case.p1.drift if ours == "teacher" else None)
    assert_close(actual, expected, 1e-11, row_scale(expected, case.z, case.x) / narrow)


@pytest.mark.parametrize(("name", "ours"), EXACT)
def test_targets_where_the_oracle_solves_an_ode(name, ours):
    """Two components in two dimensions, s = 0 and u = 1 among the times. With steps of 0.25 in its logarithmic time
    the solve and its forward-mode derivatives are exact to 1e-9."""
    p1 = random_mixture(2, 2, seed=3)
    X = ExactFlowMap(p1, max_step=0.25)
    t, s, u = torch.tensor([[0.0, 0.3, 0.8], [0.0, 0.2, 0.5], [1.0, 0.7, 1.0]], dtype=torch.float64)
    x, z, _ = coupled_interpolants(p1.sample(3, generator=rng(0)), s, t, generator=rng(1))
    exact = X.velocity(s, u, z, t, x)
    target = TARGETS[name](X, s, u, z, t, x, drift=p1.drift if ours == "teacher" else None)
    assert_close(target, exact, 1e-8, row_scale(exact))


@given(cases(p1=CHEAP, t=TIMES, s=TIMES))
def test_degenerate_legs_cost_nothing_for_any_map(case: Case):
    """w = s and w = u compose with the identity (E11), and u = s leaves one velocity: true of wrong maps too."""
    X = MapOf(lambda s, u, z, t, x, y: z + (u - s) * (z.sin() + t * x), (case.p1.dim,))
    X.velocity = lambda s, u, z, t, x, y=None: z.sin() + torch.as_tensor(t).reshape(-1, 1) * x
    rest = case.z, case.t, case.x
    for w, u in ((case.s, case.u), (case.u, case.u), (case.s, case.s)):
        assert semigroup_loss(X, case.s, w, u, *rest) < 1e-24 * (1 + case.x.abs().max() ** 2)


@pytest.mark.parametrize(("u", "order"), [(None, 4), (0.9, 5)])
def test_teacher_leg_has_the_order_of_runge_kutta(u, order):
    """From a drift the loss at the oracle is the RK4 step's error alone. In velocities that is h⁴ where the step
    is the whole jump (u = w); for a fixed u > w, the state's error h⁵ over a fixed u − s. 0.25: the h^{k+1} term."""
    p1, s, h = line(), 0.2, [0.04, 0.02, 0.01]
    x, z = p1.marginal(0.3).sample(50, generator=rng(0)), p1.marginal(0.2).sample(50, generator=rng(1))
    losses = [
        semigroup_loss(ExactFlowMap(p1), s, s + k, s + k if u is None else u, z, 0.3, x, drift=p1.drift) for k in h
    ]
    assert slope(h, [float(loss.sqrt()) for loss in losses]) == pytest.approx(order, abs=0.25)


def test_teacher_velocity_is_the_oracles_in_the_limit():
    p1 = line()
    x, z = p1.marginal(0.3).sample(50, generator=rng(0)), p1.marginal(0.2).sample(50, generator=rng(1))
    exact = ExactFlowMap(p1).velocity(0.2, 0.21, z, 0.3, x)
    assert_close(teacher_velocity(p1.drift, 0.2, 0.21, z, 0.3, x), exact, 1e-7, row_scale(exact))
    diagonal = ExactFlowMap(p1).velocity(0.2, 0.2, z, 0.3, x)
    assert_close(teacher_velocity(p1.drift, 0.2, 0.2, z, 0.3, x), diagonal, 1e-11, row_scale(diagonal))


# ---- wrong maps ----------------------------------------------------------------------------------------

# What "self" cannot see: any other semigroup, another law's map or one without the context, is consistent with its own
# diagonal. Anchored to a drift, none remains: the only solution of either equation, or of a first leg that is right
# at every s, is the flow of that drift.
ELSEWHERE = {"another law's", "without the context", "identity"}
UNSEEN = {
    "diagonal": {"Euler"},  # right at s = u, and wrong jumps
    **{(name, "self"): ELSEWHERE for name in TARGETS},
    **{(name, "teacher"): set() for name in TARGETS},
}


@pytest.mark.parametrize("name", wrong_maps(line()))
def test_which_objective_sees_which_wrong_map(name):
    """An objective that cannot tell a map from the oracle is zero: 1e-9, the square of the quotient that stands for
    the map's diagonal; the others are 0.01 or more. Together, diagonal and any one consistency see every map."""
    p1, n = line(), 200
    X, lawful = wrong_maps(p1)[name]
    assert lawful == (name in ELSEWHERE)
    t = 0.1 + 0.7 * torch.rand(n, generator=rng(0), dtype=torch.float64)
    s, u = torch.tensor(0.1, dtype=torch.float64), torch.tensor(0.8, dtype=torch.float64)
    x, z, _ = coupled_interpolants(p1.sample(n, generator=rng(1)), s, t, generator=rng(2))
    losses = {"diagonal": diagonal_loss(X, s, z, t, x, glass_drift(p1.drift, s, z, t, x))}
    for law, loss in LOSSES.items():
        losses[law, "self"] = loss(X, s, u, z, t, x)
        losses[law, "teacher"] = loss(X, s, u, z, t, x, drift=p1.drift)
    losses["semigroup", "teacher"] = semigroup_loss(X, s, s + 0.3, u, z, t, x, drift=p1.drift)
    for objective, loss in losses.items():
        assert (loss < 1e-9) == (name in UNSEEN[objective]), f"{objective}: {loss}"
        assert loss < 1e-9 or loss > 0.01, f"{objective}: {loss}"
    floor = semigroup_loss(ExactFlowMap(p1), s, s + 0.3, u, z, t, x, drift=p1.drift)
    assert losses["semigroup", "teacher"] > 100 * floor


# ---- mean flow: right in expectation -------------------------------------------------------------------


def mean_flow_batch(p1, n=20_000, seed=0):
    """s, u, z, t, x and v̇ for statistics; u is at s + 0.3 at least, where the correction counts."""
    g = rng(seed)
    s, t = 0.6 * torch.rand((2, n), generator=g, dtype=torch.float64)
    u = s + 0.3 + (0.7 - s) * torch.rand(n, generator=g, dtype=torch.float64)
    x, z, velocity = coupled_interpolants(p1.sample(n, generator=g), s, t, generator=g)
    return s, u, z, t, x, velocity


@pytest.mark.parametrize("p1", [gaussian(), line()], ids=["gaussian", "mixture"])
def test_mean_flow_at_the_oracle_is_noise_about_the_oracle(p1):
    """Any other velocity costs its distance to the oracle on top: E‖v − target‖² − E‖v* − target‖² = E‖v − v*‖².

    One statistic a velocity, 6e-7 each. A target that moves along −v̇, along another sample's velocity, or that
    forgets the correction puts its minimum elsewhere, and is refused."""
    X, (s, u, z, t, x, velocity) = ExactFlowMap(p1), mean_flow_batch(p1)
    exact = X.velocity(s, u, z, t, x)

    def excess(v, target):
        return (v - target).square().sum(1) - (exact - target).square().sum(1) - (v - exact).square().sum(1)

    others = [exact + 0.1, 0.9 * exact, X.velocity(s, s, z, t, x), p1.drift(s, z)]
    target = mean_flow_target(X, s, u, z, t, x, velocity)
    for v in others:
        assert abs(z_scores(excess(v, target), 0.0)) < LIMIT
    for wrong in (2 * velocity - target, velocity, mean_flow_target(X, s, u, z, t, x, velocity.roll(1, 0))):
        assert max(abs(z_scores(excess(v, wrong), 0.0)) for v in others) > LIMIT


@pytest.mark.parametrize("name", wrong_maps(line()))
def test_mean_flow_sees_what_the_teachers_eulerian_sees(name):
    """Its residual has the mean of that of the Eulerian equation from the exact drift, Δ: E[Δ · residual] = E‖Δ‖²,
    one statistic a map, 6e-7; and Δ is not small, so that no wrong map is stationary. Where Δ stands out of the noise
    of 10,000 rows, a residual without it is refused."""
    p1 = line()
    X = wrong_maps(p1)[name][0]
    s, u, z, t, x, velocity = mean_flow_batch(p1, 10_000)
    v = X.velocity(s, u, z, t, x)
    delta = v - eulerian_target(X, s, u, z, t, x, drift=p1.drift)
    projected = (delta * (v - mean_flow_target(X, s, u, z, t, x, velocity))).sum(1)
    assert abs(z_scores(projected - delta.square().sum(1), 0.0)) < LIMIT
    assert delta.square().sum(1).mean() > 0.01
    assert name in {"another law's", "without the context"} or z_scores(projected, 0.0) > LIMIT


# ---- the oracle is stationary --------------------------------------------------------------------------


def row_gradients(loss, p1, *, theta=0.0, seed=0):
    """∂loss/∂θ of each row, times the rows: `loss(X)` at the oracle moved by θ_i times a bump in row i."""
    n = 4_000
    s, u, z, t, x, velocity = mean_flow_batch(p1, n, seed)
    parameters = torch.full((n,), theta, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(
        loss(Perturbed(ExactFlowMap(p1), parameters), s, u, z, t, x, velocity), parameters
    )
    return n * gradient


@pytest.mark.parametrize("p1", [gaussian(), line()], ids=["gaussian", "mixture"])
@pytest.mark.parametrize(("name", "ours"), [*EXACT, ("semigroup", "teacher")])
def test_the_oracle_is_stationary_row_by_row(name, ours, p1):
    """Where the target has no noise every row's gradient vanishes, to 1e-9 of rounding; for the teacher's leg of
    0.02, RK4's error stays below 1e-5. Away from the oracle, θ = ±0.3, it does not, and points back on average."""
    drift = p1.drift if ours == "teacher" else None

    def loss(X, s, u, z, t, x, velocity):
        if (name, ours) == ("semigroup", "teacher"):
            return semigroup_loss(X, s, s + 0.02, u, z, t, x, drift=drift)
        return LOSSES[name](X, s, u, z, t, x, drift=drift)

    assert row_gradients(loss, p1).abs().max() < (1e-5 if (name, ours) == ("semigroup", "teacher") else 1e-9)
    for theta in (-0.3, 0.3):
        assert z_scores(theta * row_gradients(loss, p1, theta=theta), 0.0) > LIMIT


@pytest.mark.parametrize("p1", [gaussian(), line()], ids=["gaussian", "mixture"])
def test_the_oracle_is_stationary_in_the_mean_from_data(p1):
    """E13 and mean flow from data: the gradient's mean vanishes, one statistic each, 6e-7; with
    velocities from data to noise, or at θ = 0.5, it does not."""

    def mean_flow(X, s, u, z, t, x, velocity):
        return mean_flow_loss(X, s, u, z, t, x, velocity)

    def diagonal(X, s, u, z, t, x, velocity):
        return diagonal_loss(X, s, z, t, x, velocity)

    def backwards(X, s, u, z, t, x, velocity):
        return mean_flow_loss(X, s, u, z, t, x, -velocity)

    for loss in (mean_flow, diagonal):
        assert abs(z_scores(row_gradients(loss, p1), 0.0)) < LIMIT
        assert z_scores(row_gradients(loss, p1, theta=0.5), 0.0) > LIMIT
    assert abs(z_scores(row_gradients(backwards, p1), 0.0)) > LIMIT


# ---- the derivatives -----------------------------------------------------------------------------------


def random_network(dim, seed):
    """An MLP in float64 whose every weight counts: the outlet, zero at the start, is drawn too."""
    torch.manual_seed(seed)
    network = MLP(randn(dim, seed=seed), torch.eye(dim, dtype=torch.float64), hidden=16, depth=2)
    torch.nn.init.normal_(network.outlet.weight, std=0.3)
    return FlowMap(network)


@given(st.integers(1, 4), SEEDS, st.data())
def test_targets_follow_from_the_maps_jumps(dim, seed, data):
    """Each law in terms of the map X alone, its derivatives by finite differences of second order, from inside at
    s = 0 and u = 1: (u−s) times the residual of the semigroup law is X_{s,u} − X_{w,u}∘X_{s,w}; the Lagrangian
    residual is ∂_u X_{s,u} − b̄_u(X_{s,u}); the Eulerian one is −d/dh X_{s+h,u}(z + h b̄), and along v̇ for mean flow.
    b̄ is the model's own diagonal or, from a drift, that of the exact posterior, which does not pass through E12.
    h = 1e-5: h² times a third derivative of this network, up to 1e4, and 1e-16/h of rounding."""
    size = data.draw(st.sampled_from([1, dim, 5]))
    inner = st.sampled_from([0.0, 1.0]) | st.floats(0.02, 0.98)
    first, second = data.draw(batch_times(size, inner)), data.draw(batch_times(size, inner))
    s, u = (a.expand(size) for a in (torch.minimum(first, second), torch.maximum(first, second)))
    s, u = torch.where(s == 1, 0.5, s), torch.where(u == 0, 0.5, u)  # s = u at an end cannot be moved inwards
    t = data.draw(batch_times(size, st.floats(0, 0.9)))
    X, p1 = random_network(dim, seed % 1000), random_mixture(dim, 2, seed)
    z, x, velocity = (randn(size, dim, seed=seed + k) for k in range(3))
    v = X.velocity(s, u, z, t, x).detach()
    inwards = torch.where(s < 0.01, 1e-5, -1e-5).unsqueeze(-1)

    def along(direction):  # d/dh X_{s+h,u}(z + h direction)
        def moved(h):
            return X(s + h * inwards[:, 0], u, z + h * inwards * direction, t, x).detach()

        return one_sided_difference(moved) / inwards

    w = midway(s, u)
    composed = X(w, u, X(s, w, z, t, x), t, x) - X(s, u, z, t, x)
    scale = row_scale(v, z, x, velocity)
    jump = (u - s).unsqueeze(-1)
    assert_close(jump * (semigroup_target(X, s, w, u, z, t, x) - v), composed.detach(), 1e-12, scale)
    assert_close(mean_flow_target(X, s, u, z, t, x, velocity) - v, along(velocity), 1e-5, scale)
    arrived = X(s, u, z, t, x).detach()
    step = torch.where((u - s > 1e-3) | (u == 1), -1e-5, 1e-5)  # u moves inwards, or where s is near, away from it
    slope_u = one_sided_difference(lambda h: X(s, u + h * step, z, t, x).detach()) / step.unsqueeze(-1)
    for drift in (None, p1.drift):
        posterior = p1.posterior(t, x)
        b_s = X.velocity(s, s, z, t, x).detach() if drift is None else posterior.drift(s, z)
        b_u = X.velocity(u, u, arrived, t, x).detach() if drift is None else posterior.drift(u, arrived)
        here = row_scale(scale, b_s, b_u)
        assert_close(eulerian_target(X, s, u, z, t, x, drift=drift) - v, along(b_s), 1e-5, here)
        assert_close(v - lagrangian_target(X, s, u, z, t, x, drift=drift), slope_u - b_u, 1e-5, here)


# ---- what is differentiated ----------------------------------------------------------------------------


@pytest.mark.parametrize("ours", OURS)
@pytest.mark.parametrize("name", [*LOSSES, "mean flow"])
def test_no_gradient_flows_through_the_target(name, ours):
    """d loss/dθ equals the finite difference with the target frozen at θ, and not that of the loss as a whole."""
    p1, theta = gaussian(), 0.7
    z, x, velocity, t = randn(5, 2, seed=1), randn(5, 2, seed=2), randn(5, 2, seed=3), 0.4
    s, u = 0.1, 0.8
    options = {} if name == "mean flow" else {"drift": p1.drift if ours == "teacher" else None}
    arguments = (s, u, z, t, x, *((velocity,) if name == "mean flow" else ()))
    target = TARGETS.get(name, mean_flow_target)(FlowMap(Bent(theta)), *arguments, **options)
    assert not target.requires_grad

    def loss(a):
        model = FlowMap(Bent(a))
        return LOSSES.get(name, mean_flow_loss)(model, *arguments, **options), model.network.theta

    def one_sided(a):
        return (FlowMap(Bent(a)).velocity(s, u, z, t, x) - target).square().sum(1).mean().detach()

    value, parameter = loss(theta)
    value.backward()
    assert_close(value.detach(), one_sided(theta), 1e-12)
    gradient = parameter.grad
    assert_close(gradient, finite_difference(one_sided, theta), 1e-6, 1 + gradient.abs())
    assert abs(gradient - finite_difference(lambda a: loss(a)[0].detach(), theta)) > 0.05 * abs(gradient)


@pytest.mark.parametrize("name", [*LOSSES, "mean flow"])
def test_labels_reach_every_evaluation_of_map_and_teacher(name):
    """A map and a drift that return their labels: every target is a combination of them with weights one in all,
    and no loss has a residual."""
    y = torch.tensor([2, 0, 7])
    z = torch.zeros(3, 2, dtype=torch.float64)
    X = MapOf(None, (2,))
    X.velocity = lambda s, u, z, t, x, y: 0 * z + y.unsqueeze(-1)

    def drift(t, x, y):
        return 0 * x + y.unsqueeze(-1)

    expected = (0 * z + y.unsqueeze(-1)).double()
    for teacher in (None, drift):
        if name == "mean flow":
            target = mean_flow_target(X, 0.2, 0.6, z, 0.0, z, expected, y)
            loss = mean_flow_loss(X, 0.2, 0.6, z, 0.0, z, expected, y)
        else:
            target = TARGETS[name](X, 0.2, 0.6, z, 0.0, z, y, drift=teacher)
            loss = LOSSES[name](X, 0.2, 0.6, z, 0.0, z, y, drift=teacher)
        assert_close(target, expected, 1e-12)
        assert loss < 1e-24


# ---- errors --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"s": 0.95}, "s <= u"),
        ({"u": 1.1}, r"time u must lie in \[0, 1\]"),
        ({"s": -0.1}, r"time s must lie in \[0, 1\]"),
        ({"u": torch.tensor([0.9, 0.9, 0.9])}, "time [uw] must have shape"),
        ({"x": torch.zeros(2, 1, dtype=torch.float64)}, "same shape"),
    ],
)
@pytest.mark.parametrize("ours", OURS)
@pytest.mark.parametrize("loss", [*LOSSES.values(), lambda *a, drift: mean_flow_loss(*a, a[3])])
def test_consistency_losses_refuse(change, match, loss, ours):
    p1 = gaussian()
    zeros = torch.zeros(2, 2, dtype=torch.float64)
    arguments = {"s": 0.1, "u": 0.9, "z": zeros, "t": 0.5, "x": zeros} | change
    with pytest.raises(ValueError, match=match):
        loss(ExactFlowMap(p1), *arguments.values(), drift=p1.drift if ours == "teacher" else None)


@pytest.mark.parametrize(
    ("w", "match"), [(0.05, "s <= u"), (0.95, "s <= u"), (torch.tensor([0.5, 0.5, 0.5]), "time w must have shape")]
)
@pytest.mark.parametrize("ours", OURS)
def test_semigroup_loss_refuses_a_time_that_is_not_between(w, match, ours):
    p1, zeros = gaussian(), torch.zeros(2, 2, dtype=torch.float64)
    with pytest.raises(ValueError, match=match):
        semigroup_loss(ExactFlowMap(p1), 0.1, w, 0.9, zeros, 0.5, zeros, drift=p1.drift if ours == "teacher" else None)


@pytest.mark.parametrize("velocity", [torch.zeros(2), torch.zeros(2, 1), torch.zeros(1, 2)])
def test_mean_flow_refuses_a_velocity_that_would_broadcast(velocity):
    zeros = torch.zeros(2, 2, dtype=torch.float64)
    with pytest.raises(ValueError, match="same shape: z"):
        mean_flow_target(ExactFlowMap(gaussian()), 0.1, 0.9, zeros, 0.5, zeros, velocity.double())
