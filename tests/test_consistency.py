"""E14: consistency between the map's jumps, its derivatives and its diagonal: zero at the oracle, not at wrong maps."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mfm_ref import ExactFlowMap, FlowMap, coupled_interpolants, diagonal_loss, glass_drift, semigroup_loss
from mfm_ref.objectives import teacher_velocity
from tests.helpers import Bent, MapOf, finite_difference, gaussian, line, slope, wrong_maps
from tests.strategies import Case, assert_close, cases, mixtures, randn, random_mixture, rng, row_scale

CHEAP = mixtures(max_components=1) | mixtures(max_dim=1)  # closed form and quantile routes of the oracle
TIMES = st.floats(0, 0.95, allow_subnormal=False)


@given(cases(p1=CHEAP, t=TIMES, s=TIMES))
def test_semigroup_loss_is_zero_at_the_oracle(case: Case):
    """X_{w,u}(X_{s,w}(z)) = X_{s,u}(z), residual in velocities: rounding is divided by u − s, kept above 1e-3."""
    u = torch.maximum(case.u, case.s + 1e-3)
    w = case.s + 0.6 * (u - case.s)
    size = 1 + ExactFlowMap(case.p1).velocity(case.s, u, case.z, case.t, case.x).square().sum(1).max()
    loss = semigroup_loss(ExactFlowMap(case.p1), case.s, w, u, case.z, case.t, case.x)
    assert loss < 1e-16 * size


def test_semigroup_loss_is_zero_where_the_oracle_solves_an_ode():
    """Two components in two dimensions; the solve is exact to 1e-9, and the loss to its square."""
    p1 = random_mixture(2, 2, seed=3)
    t = torch.tensor([0.0, 0.2, 0.5, 0.8], dtype=torch.float64)
    x, z = randn(4, 2, seed=1), randn(4, 2, seed=2)
    assert semigroup_loss(ExactFlowMap(p1), 0.1, 0.4, 0.9, z, t, x) < 1e-16


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


@pytest.mark.parametrize("name", wrong_maps(line()))
def test_wrong_maps_are_caught_by_one_loss_or_the_other(name):
    """Self-consistent is not correct: a semigroup that is not the oracle's passes E14 and fails E13 and E14 from
    a drift; the Euler map passes E13 and fails E14."""
    p1, n = line(), 200
    X, lawful = wrong_maps(p1)[name]
    s, w, u = 0.1, 0.4, 0.8
    t = 0.1 + 0.7 * torch.rand(n, generator=rng(0), dtype=torch.float64)
    x, z, _ = coupled_interpolants(p1.sample(n, generator=rng(1)), s, t, generator=rng(2))
    consistency = semigroup_loss(X, s, w, u, z, t, x)
    diagonal = diagonal_loss(X, s, z, t, x, glass_drift(p1.drift, s, z, t, x))
    assert (consistency < 1e-9) == lawful
    assert (diagonal < 1e-6) == (name == "Euler")
    assert max(consistency, diagonal) > 0.01
    # A teacher's leg anchors E14 to the truth: now it catches every one of them.
    anchored, floor = (semigroup_loss(a, s, 0.15, u, z, t, x, drift=p1.drift) for a in (X, ExactFlowMap(p1)))
    assert anchored > 100 * floor


@pytest.mark.parametrize("with_drift", [False, True])
def test_no_gradient_flows_through_the_composed_side(with_drift):
    """d loss/dθ equals the finite difference with the target frozen, and not that of the loss as a whole."""
    p1, theta = gaussian(), 0.7
    z, x, t = randn(5, 2, seed=1), randn(5, 2, seed=2), 0.4
    s, w, u = 0.1, 0.3, 0.8
    drift = p1.drift if with_drift else None
    frozen, model = FlowMap(Bent(theta)), FlowMap(Bent(theta))
    halfway = z + (w - s) * teacher_velocity(drift, s, w, z, t, x) if with_drift else frozen(s, w, z, t, x)
    target = (frozen(w, u, halfway, t, x) - z).detach() / (u - s)

    def whole(a):
        return semigroup_loss(FlowMap(Bent(a)), s, w, u, z, t, x, drift=drift).detach()

    def one_sided(a):
        return (FlowMap(Bent(a)).velocity(s, u, z, t, x) - target).square().sum(1).mean().detach()

    loss = semigroup_loss(model, s, w, u, z, t, x, drift=drift)
    loss.backward()
    assert_close(loss.detach(), one_sided(theta), 1e-12)
    gradient = model.network.theta.grad
    assert_close(gradient, finite_difference(one_sided, theta), 1e-6, 1 + gradient.abs())
    assert abs(gradient - finite_difference(whole, theta)) > 0.05 * abs(gradient)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"s": 0.5, "w": 0.4}, "s <= u"),
        ({"w": 0.95}, "s <= u"),
        ({"u": 1.1}, r"time u must lie in \[0, 1\]"),
        ({"w": torch.tensor([0.5, 0.5, 0.5])}, r"time w must have shape"),
        ({"x": torch.zeros(2, 1, dtype=torch.float64)}, "same shape"),
    ],
)
@pytest.mark.parametrize("with_drift", [False, True])
def test_semigroup_loss_refuses(change, match, with_drift):
    p1 = gaussian()
    zeros = torch.zeros(2, 2, dtype=torch.float64)
    arguments = {"s": 0.1, "w": 0.5, "u": 0.9, "z": zeros, "t": 0.5, "x": zeros} | change
    with pytest.raises(ValueError, match=match):
        semigroup_loss(ExactFlowMap(p1), **arguments, drift=p1.drift if with_drift else None)
