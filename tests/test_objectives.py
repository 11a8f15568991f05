"""E13, the form that all objectives share, and the adaptive weights."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mfm_ref import (
    MLP,
    ExactFlowMap,
    FlowMap,
    adaptive_weight,
    coupled_interpolants,
    diagonal_loss,
    eulerian_loss,
    eulerian_target,
    glass_drift,
    lagrangian_loss,
    lagrangian_target,
    mean_flow_loss,
    semigroup_loss,
    velocity_loss,
)
from mfm_ref.objectives import weighted_mean_square
from tests.helpers import LIMIT, Bent, MapOf, finite_difference, gaussian, line, z_scores
from tests.strategies import Case, assert_close, cases, mixtures, randn, rng, row_scale

TIMES = st.floats(0, 0.95, allow_subnormal=False)
TIMES_32 = st.floats(0, 0.875, width=32, allow_subnormal=False)


# ---- E13 -----------------------------------------------------------------------------------------------


@given(cases(t=TIMES, s=TIMES))
def test_diagonal_loss_from_the_exact_drift_is_zero_at_the_oracle(case: Case):
    """Residual of rounding only, against E12; and |δ|² for a map whose velocity is off by δ."""
    row = case.s, case.z, case.t, case.x
    target = glass_drift(case.p1.drift, *row)
    size = 1 + target.square().sum(1).mean()
    assert diagonal_loss(ExactFlowMap(case.p1), *row, target) < 1e-18 * size
    off = diagonal_loss(ExactFlowMap(case.p1), *row, target + 0.1)
    assert_close(off, torch.full_like(off, 0.01 * case.p1.dim), 1e-9, size)


def data_residuals(p1, velocity, n: int = 40_000) -> tuple[torch.Tensor, torch.Tensor]:
    """Per sample: ‖v − (x₁ − x̄₀)‖² − ‖b̄ − (x₁ − x̄₀)‖², and ‖v − b̄‖², whose mean E13 says it must have."""
    g = rng(0)
    s, t = torch.rand((2, n), generator=g, dtype=torch.float64)
    x, z, target = coupled_interpolants(p1.sample(n, generator=g), s, t, generator=g)
    exact, v = ExactFlowMap(p1).velocity(s, s, z, t, x), velocity(s, z, t, x)
    excess = (v - target).square().sum(1) - (exact - target).square().sum(1)
    return excess, (v - exact).square().sum(1)


@pytest.mark.parametrize("p1", [gaussian(), line()], ids=["gaussian", "mixture"])
def test_from_data_every_other_velocity_costs_its_distance_to_the_oracle(p1):
    """E‖v − target‖² = E‖b̄ − target‖² + E‖v − b̄‖²: the regression's minimiser is b̄ and its excess never
    negative. One statistic a velocity, 6e-7 each; a target at the wrong internal time would break every one."""
    X = ExactFlowMap(p1)
    wrong = {
        "shifted": lambda s, z, t, x: X.velocity(s, s, z, t, x) + 0.1,
        "shrunk": lambda s, z, t, x: 0.9 * X.velocity(s, s, z, t, x),
        "without the context": lambda s, z, t, x: p1.drift(s, z),
        "s and t exchanged": lambda s, z, t, x: X.velocity(t, t, x, s, z),
        "the context's drift": lambda s, z, t, x: p1.drift(t, x),
    }
    for velocity in wrong.values():
        excess, distance = data_residuals(p1, velocity)
        assert abs(z_scores(excess - distance, 0.0)) < LIMIT
        assert z_scores(excess, 0.0) > LIMIT  # so the loss ranks it behind the oracle
    excess, distance = data_residuals(p1, wrong["shifted"])
    assert abs(z_scores(excess + distance, 0.0)) > LIMIT


def test_diagonal_loss_is_the_mean_of_those_squares():
    p1, n = gaussian(), 50
    s, t = torch.rand((2, n), generator=rng(0), dtype=torch.float64)
    x, z, target = coupled_interpolants(p1.sample(n, generator=rng(1)), s, t, generator=rng(2))
    v = ExactFlowMap(p1).velocity(s, s, z, t, x)
    expected = sum(float((v[i] - target[i]).norm() ** 2) for i in range(n)) / n
    assert float(diagonal_loss(ExactFlowMap(p1), s, z, t, x, target)) == pytest.approx(expected)


# ---- the form of all objectives ------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [velocity_loss, lambda X, s, u, *rest: diagonal_loss(X, s, *rest)])
def test_no_gradient_flows_into_the_target(loss):
    """A target that depends on θ is frozen: the gradient is the finite difference with its numbers held."""
    s, z, t, x = 0.2, randn(5, 2, seed=1), 0.4, randn(5, 2, seed=2)
    model, frozen = FlowMap(Bent(0.7)), FlowMap(Bent(0.7)).velocity(s, s, x, t, z).detach()
    target = model.velocity(s, s, x, t, z)
    loss(model, s, s, z, t, x, target).backward()

    def held(a):
        return (FlowMap(Bent(a)).velocity(s, s, z, t, x) - frozen).square().sum(1).mean().detach()

    gradient = model.network.theta.grad
    assert_close(gradient, finite_difference(held, 0.7), 1e-6, 1 + gradient.abs())


@given(st.integers(1, 4), st.booleans())
def test_the_loss_is_a_mean_over_rows_of_sums_over_coordinates(batch, images):
    """States of any shape, B = D among them: each row's loss alone, averaged; labels and times go with their rows."""
    shape = (1, 2, 2) if images else (batch,)
    X = MapOf(None, shape)
    X.velocity = lambda s, u, z, t, x, y: z * (y + s + 2 * u + 4 * t).reshape(-1, *[1] * len(shape)) + x
    z, x, target = (randn(batch, *shape, seed=k) for k in range(3))
    s, u, t = torch.rand((3, batch), generator=rng(0), dtype=torch.float64).sort(0).values
    y = torch.arange(batch)

    def rows(k):
        return s[k], u[k], z[k], t[k], x[k], target[k], y[k]

    together = velocity_loss(X, *rows(slice(None)))
    alone = [velocity_loss(X, *rows(slice(k, k + 1))) for k in range(batch)]
    assert_close(together, torch.stack(alone).mean(), 1e-12, together)
    by_hand = sum((z[k] * (y[k] + s[k] + 2 * u[k] + 4 * t[k]) + x[k] - target[k]).norm() ** 2 for k in range(batch))
    assert_close(together, by_hand / batch, 1e-12, together)


# ---- adaptive weights ----------------------------------------------------------------------------------


@given(st.floats(0.1, 10), st.floats(0.01, 1), st.floats(0.1, 5))
def test_adaptive_weight_is_the_slope_of_its_potential(squared, c, unit):
    """w ‖Δ‖² has, w being detached, the gradient of φ(‖Δ‖²/unit²) with φ' = (· + c)^−p.

    For p = 1/2, φ = 2√(· + c)."""
    residual = torch.tensor([[squared**0.5]], dtype=torch.float64, requires_grad=True)
    weigh = lambda q: adaptive_weight(q, p=0.5, c=c, unit=unit)  # noqa: E731
    (gradient,) = torch.autograd.grad(weighted_mean_square(residual, weigh), residual)

    def potential(a):
        return torch.tensor([[2 * math.sqrt(a**2 / unit**2 + c)]], dtype=torch.float64)

    expected = finite_difference(potential, squared**0.5)
    assert_close(gradient, expected, 1e-5, 1 + expected.abs())


def test_adaptive_weight_of_the_paper():
    squared = torch.tensor([0.0, 0.24, 3.99], dtype=torch.float64)
    assert_close(adaptive_weight(squared, p=0.5), torch.tensor([10.0, 2.0, 0.5], dtype=torch.float64), 1e-12)
    assert_close(adaptive_weight(squared, p=1.0), torch.tensor([100.0, 4.0, 0.25], dtype=torch.float64), 1e-12)
    assert_close(adaptive_weight(squared, p=0), torch.ones(3, dtype=torch.float64), 0)
    assert not adaptive_weight(squared.requires_grad_(), p=0.5).requires_grad


@given(st.floats(0, 1), st.floats(0.1, 10))
def test_weights_make_the_loss_free_of_the_unit(p, unit):
    """Residuals measured in another unit, and declared so, leave every weighted loss as it was."""
    residual, scale = randn(4, 3, seed=1), torch.tensor([unit, 1.0, 2 * unit, 3.0], dtype=torch.float64)
    plain = weighted_mean_square(residual, lambda q: adaptive_weight(q, p=p))
    scaled = weighted_mean_square(residual * scale.unsqueeze(-1), lambda q: adaptive_weight(q, p=p, unit=scale))
    assert_close(scaled, plain, 1e-12, 1 + plain)


WEIGHTED = {
    "velocity": lambda X, z, x, target, **w: velocity_loss(X, 0.2, 0.9, z, 0.4, x, target, **w),
    "diagonal": lambda X, z, x, target, **w: diagonal_loss(X, 0.2, z, 0.4, x, target, **w),
    "semigroup": lambda X, z, x, target, **w: semigroup_loss(X, 0.2, 0.5, 0.9, z, 0.4, x, **w),
    "lagrangian": lambda X, z, x, target, **w: lagrangian_loss(X, 0.2, 0.9, z, 0.4, x, **w),
    "eulerian": lambda X, z, x, target, **w: eulerian_loss(X, 0.2, 0.9, z, 0.4, x, **w),
    "mean flow": lambda X, z, x, target, **w: mean_flow_loss(X, 0.2, 0.9, z, 0.4, x, target, **w),
}


@pytest.mark.parametrize("function", WEIGHTED)
def test_weights_are_detached_and_multiply_each_row(function):
    z, x, target = (randn(4, 2, seed=k) for k in range(3))
    rows = torch.tensor([0.0, 1.0, 0.0, 3.0], dtype=torch.float64)

    def loss(weight, batch=slice(None)):
        model = FlowMap(Bent(0.7))
        total = WEIGHTED[function](model, z[batch], x[batch], target[batch], weight=weight)
        total.backward()
        return torch.stack([total.detach(), model.network.theta.grad])

    second, fourth = loss(None, slice(1, 2)), loss(None, slice(3, 4))
    assert_close(loss(lambda squared: rows), (second + 3 * fourth) / 4, 1e-12, 10.0)
    # A weight with a graph is cut from it: the gradient is that of the same numbers, held constant.
    numbers = []
    tracked = loss(lambda squared: numbers.append(squared.detach() + 1) or squared + 1)
    assert_close(tracked, loss(lambda squared: numbers[0]), 1e-12, 10.0)


# ---- errors and precision ------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [torch.zeros(2), torch.zeros(2, 1), torch.zeros(1, 2)])
def test_a_target_that_would_broadcast_is_refused(target):
    X, zeros = ExactFlowMap(gaussian()), torch.zeros(2, 2, dtype=torch.float64)
    with pytest.raises(ValueError, match="same shape: z"):
        diagonal_loss(X, 0.1, zeros, 0.5, zeros, target)
    with pytest.raises(ValueError, match="same shape: z"):
        velocity_loss(X, 0.1, 0.9, zeros, 0.5, zeros, target)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"s": 0.95}, "s <= u"),
        ({"u": 1.1}, r"time u must lie in \[0, 1\]"),
        ({"t": -0.1}, r"time t must lie in \[0, 1\]"),
        ({"s": torch.tensor([0.1, 0.1, 0.1])}, "time s must have shape"),
        ({"x": torch.zeros(2, 1, dtype=torch.float64)}, "same shape"),
    ],
)
def test_velocity_loss_refuses(change, match):
    zeros = torch.zeros(2, 2, dtype=torch.float64)
    arguments = {"s": 0.1, "u": 0.9, "z": zeros, "t": 0.5, "x": zeros, "target": zeros} | change
    with pytest.raises(ValueError, match=match):
        velocity_loss(ExactFlowMap(gaussian()), **arguments)


@given(cases(p1=mixtures(max_components=1), t=TIMES_32, s=TIMES_32))
def test_float32_is_within_1e_4(case: Case):
    """Both losses of a wrong map, relative to their size; u − s >= 0.1, since the oracle's velocity is a quotient."""
    shifted = case.p1._from_eigen(case.p1.log_weights, case.p1.means + 1, case.p1.basis, case.p1.eigenvalues)
    single = shifted.to(torch.float32)
    s, u, z, t, x = (a.float() for a in (case.s, case.u, case.z, case.t, case.x))
    u = torch.maximum(u, s + 0.1)
    w = s + 0.4 * (u - s)
    p32 = case.p1.to(torch.float32)

    def losses(p1, X, *inputs):
        s, w, u, z, t, x = inputs
        diagonal = diagonal_loss(X, s, z, t, x, glass_drift(p1.drift, s, z, t, x))
        return torch.stack([diagonal, semigroup_loss(X, s, w, u, z, t, x, drift=p1.drift)])

    inputs = s, w, u, z, t, x
    exact = losses(case.p1, ExactFlowMap(shifted), *(a.double() for a in inputs))
    rounded = losses(p32, ExactFlowMap(single), *inputs)
    size = 1 + glass_drift(case.p1.drift, case.s, case.z, case.t, case.x).square().sum(1).max()
    assert_close(rounded.double(), exact, 1e-4, size)


@pytest.mark.parametrize("target", [lagrangian_target, eulerian_target])
@pytest.mark.parametrize("with_drift", [False, True])
def test_derivative_targets_in_float32_are_within_1e_4(target, with_drift):
    """Of the size of the velocities times that of the network's derivatives, about ten."""
    p1 = gaussian()
    s, u, t = torch.rand((3, 50), generator=rng(0)).mul(0.9).sort(0).values
    z, x = (randn(50, 2, seed=k).float() for k in range(2))

    def in_precision(dtype):
        torch.manual_seed(0)
        network = MLP(torch.zeros(2), torch.eye(2), hidden=16, depth=2)
        torch.nn.init.normal_(network.outlet.weight, std=0.3)
        drift = p1.to(dtype).drift if with_drift else None
        return target(FlowMap(network.to(dtype)), *(a.to(dtype) for a in (s, u, z, t, x)), drift=drift)

    single, exact = in_precision(torch.float32), in_precision(torch.float64)
    assert single.dtype == torch.float32
    assert_close(single.double(), exact, 1e-4, 10 * row_scale(exact))
