"""Training objectives (E13, E14) and the laws of their times: zero at the oracle, positive at wrong maps."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import nn

from mfm_ref import (
    MLP,
    ExactFlowMap,
    FlowMap,
    adaptive_weight,
    coupled_interpolants,
    diagonal_loss,
    glass_drift,
    meta_flow_map_loss,
    semigroup_loss,
    train,
)
from mfm_ref.gaussian import angle_of_time, posterior_std, time_of_angle
from mfm_ref.objectives import teacher_velocity, weighted_mean_square
from mfm_ref.times import balanced_times, context_time, ordered_times, step_towards
from tests.helpers import LIMIT, MapOf, finite_difference, gaussian, line, moment_scores, slope, z_scores
from tests.strategies import Case, assert_close, cases, mixtures, randn, random_mixture, rng, row_scale

CHEAP = mixtures(max_components=1) | mixtures(max_dim=1)  # closed form and quantile routes of the oracle
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


# ---- E14, semigroup ------------------------------------------------------------------------------------


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


def oracle_of(p1):
    X = ExactFlowMap(p1)
    return lambda s, u, z, t, x: X(s[:, 0], u[:, 0], z, t[:, 0], x)


def wrong_maps(p1) -> dict[str, tuple[MapOf, bool]]:
    """Maps that are not the oracle, each with whether it obeys the semigroup law nevertheless."""
    X, other = oracle_of(p1), oracle_of(p1._from_eigen(p1.log_weights, 1.2 * p1.means, p1.basis, p1.eigenvalues))
    exact = ExactFlowMap(p1)

    def euler(s, u, z, t, x, y):  # one step with the velocity at s: right on the diagonal
        return z + (u - s) * exact.velocity(s[:, 0], s[:, 0], z, t[:, 0], x)

    maps = {
        "Euler": (euler, False),
        "mean only": (lambda s, u, z, t, x, y: z + (u - s) * (p1.denoiser(t[:, 0], x) - z), False),
        "time reversed": (lambda s, u, z, t, x, y: X(1 - u, 1 - s, z, t, x), False),
        "another law's": (lambda s, u, z, t, x, y: other(s, u, z, t, x), True),
        "without the context": (lambda s, u, z, t, x, y: X(s, u, z, 0 * t, x), True),
        "identity": (lambda s, u, z, t, x, y: z, True),
    }
    return {name: (MapOf(function, (p1.dim,)), lawful) for name, (function, lawful) in maps.items()}


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


# ---- what is differentiated ----------------------------------------------------------------------------


class Bent(nn.Module):
    """A map with one parameter, nonlinear in it and in the state, for derivatives by finite differences."""

    shape, reads_tx = (2,), True

    def __init__(self, theta: float):
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(theta, dtype=torch.float64))

    def velocity(self, s, u, z, t, context, y=None):
        angle = self.theta * (1 + s + 2 * u).unsqueeze(-1)
        return torch.sin(angle * z) + self.theta**2 * context


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


def test_no_gradient_flows_into_the_diagonals_target():
    target = randn(5, 2, seed=3).requires_grad_()
    model = FlowMap(Bent(0.7))
    diagonal_loss(model, 0.2, randn(5, 2, seed=1), 0.4, randn(5, 2, seed=2), target).backward()
    assert target.grad is None
    assert model.network.theta.grad.abs() > 0


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


@pytest.mark.parametrize("function", ["diagonal", "semigroup"])
def test_weights_are_detached_and_multiply_each_row(function):
    z, x, target = (randn(4, 2, seed=k) for k in range(3))
    rows = torch.tensor([0.0, 1.0, 0.0, 3.0], dtype=torch.float64)

    def loss(weight, batch=slice(None)):
        model = FlowMap(Bent(0.7))
        if function == "diagonal":
            total = diagonal_loss(model, 0.2, z[batch], 0.4, x[batch], target[batch], weight=weight)
        else:
            total = semigroup_loss(model, 0.2, 0.5, 0.9, z[batch], 0.4, x[batch], weight=weight)
        total.backward()
        return torch.stack([total.detach(), model.network.theta.grad])

    second, fourth = loss(None, slice(1, 2)), loss(None, slice(3, 4))
    assert_close(loss(lambda squared: rows), (second + 3 * fourth) / 4, 1e-12, 10.0)
    # A weight with a graph is cut from it: the gradient is that of the same numbers, held constant.
    numbers = []
    tracked = loss(lambda squared: numbers.append(squared.detach() + 1) or squared + 1)
    assert_close(tracked, loss(lambda squared: numbers[0]), 1e-12, 10.0)


# ---- the whole loss ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3,), (1, 2, 2)])
@pytest.mark.parametrize("with_drift", [False, True])
@pytest.mark.parametrize("batch", [2, 3, 5])
def test_any_shape_any_batch_and_labels(shape, with_drift, batch):
    """States of any shape, B = D among them; labels go to the half of the batch that their rows are in."""
    x1 = torch.arange(batch).reshape(-1, *[1] * len(shape)) * torch.ones(batch, *shape)
    y = torch.arange(batch)
    seen = []

    def velocity(s, u, z, t, x, y=None):
        assert s.shape == u.shape == t.shape == y.shape == z.shape[:1]
        seen.append(y.tolist())
        return y.reshape(-1, *[1] * len(shape)) * torch.ones_like(z)

    def drift(t, x, y):
        return y.reshape(-1, *[1] * len(shape)) * torch.ones_like(x)

    X = MapOf(lambda *arguments: None, shape, torch.float32)
    X.velocity = lambda s, u, z, t, x, y=None: velocity(*(torch.as_tensor(a).flatten() for a in (s, u)), z, t, x, y)
    loss = meta_flow_map_loss(X, x1, y, drift=drift if with_drift else None, generator=rng(0))
    assert loss.shape == ()
    assert torch.isfinite(loss)
    first, second = list(range(batch // 2)), list(range(batch // 2, batch))
    assert seen[0] == first
    assert all(labels == second for labels in seen[1:])


@pytest.mark.parametrize("with_drift", [False, True])
def test_batches_hold_two_independent_noises_of_one_clean_sample(with_drift):
    """E9 read off the model's own arguments: with x₁ = c, (x − t c)/(1−t) and (z − s c)/(1−s) are independent normals.

    Both halves; means, squares and products of 5,000 rows, 6e-7 each. The semigroup's second call has moved on.
    """
    p1, clean, calls = gaussian(1), 3.0, []

    def spy(s, u, z, t, x, y=None):
        calls.append([torch.as_tensor(a).flatten() for a in (s, u, z, t, x)])
        return z

    X = MapOf(None, (1,))
    X.velocity = spy
    x1 = torch.full((10_000, 1), clean, dtype=torch.float64)
    meta_flow_map_loss(X, x1, drift=p1.drift if with_drift else None, generator=rng(0))
    diagonal, semigroup = calls[0], calls[-1]
    assert torch.equal(diagonal[0], diagonal[1])
    assert (semigroup[0] <= semigroup[1]).all()
    for s, _, z, t, x in (diagonal, semigroup):
        assert len(s) == 5_000
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

    assert loss(oracle, p1.drift, step=0.05) < 1e-7
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
    g, drift = rng(0), p1.to(torch.float32).drift if teacher else None
    x1 = p1.sample(20_000, generator=rng(5)).float()

    def error(X):
        t = 0.6 * torch.rand(500, generator=rng(1))
        x, eps, _ = coupled_interpolants(x1[:500], 0.0, t, generator=rng(2))
        exact = ExactFlowMap(p1)(0.0, 1.0, eps.double(), t.double(), x.double())
        return (X(0.0, 1.0, eps, t, x) - exact).detach().square().mean()

    def loss(X):
        batch = x1[torch.randint(len(x1), (512,), generator=g)]
        return meta_flow_map_loss(X, batch, drift=drift, generator=g)

    before = error(model)
    average, history = train(model, loss, steps=100, lr=5e-3, warmup=10, decay=0.9)
    assert error(average) < before / 5
    assert sum(history[-20:]) < 0.8 * sum(history[:20])


@pytest.mark.parametrize(
    ("x1", "match"),
    [
        (torch.tensor([[0.0], [math.nan]]), "x1 must be finite, got 1 NaN or infinite"),
        (torch.tensor([[0.0], [math.inf]]), "x1 must be finite"),
        (torch.zeros(1, 1), "at least two samples, got 1"),
    ],
)
def test_meta_flow_map_loss_refuses(x1, match):
    with pytest.raises(ValueError, match=match):
        meta_flow_map_loss(ExactFlowMap(gaussian(1).to(torch.float32)), x1)


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


@pytest.mark.parametrize("target", [torch.zeros(2), torch.zeros(2, 1), torch.zeros(1, 2)])
def test_diagonal_loss_refuses_a_target_that_would_broadcast(target):
    zeros = torch.zeros(2, 2, dtype=torch.float64)
    with pytest.raises(ValueError, match="same shape"):
        diagonal_loss(ExactFlowMap(gaussian()), 0.1, zeros, 0.5, zeros, target)


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


# ---- times ---------------------------------------------------------------------------------------------


def test_context_time_is_the_papers_law():
    """P(t = 0) = 0.1 in standard errors of a binomial (6e-7); the rest has √t uniform, Kolmogorov–Smirnov 1e-6."""
    n = 50_000
    t = context_time(n, generator=rng(0))
    assert t.shape == (n,)
    assert (t >= 0).all()
    assert (t < 1).all()
    zeros = (t == 0).double()
    assert abs(z_scores(zeros, 0.1)) < LIMIT
    assert abs(z_scores(zeros, 0.11)) > LIMIT
    rest = t[t > 0].numpy()
    assert stats.kstest(rest**0.5, "uniform").pvalue > 1e-6
    assert stats.kstest(rest, "uniform").pvalue < 1e-6


@given(st.floats(0, 1), st.floats(0.3, 3))
def test_context_time_options(zero_rate, power):
    t = context_time(4_000, zero_rate=zero_rate, power=power, generator=rng(1))
    spread = math.sqrt(zero_rate * (1 - zero_rate) / 4_000)
    assert abs(float((t == 0).double().mean()) - zero_rate) <= LIMIT * spread + 1e-3
    if (t > 0).sum() > 100:
        assert stats.kstest(t[t > 0].numpy() ** (1 / power), "uniform").pvalue > 1e-6


@given(st.integers(1, 20), st.integers(1, 4))
def test_ordered_times_rise(n, count):
    times = ordered_times(n, count, generator=rng(0))
    assert times.shape == (count, n)
    assert (times.diff(dim=0) >= 0).all()
    assert ((times >= 0) & (times <= 1)).all()


def test_ordered_times_are_those_of_two_uniforms():
    """The smaller of two uniforms has 1 − (1−s)² for its CDF, the larger u²."""
    s, u = ordered_times(20_000, generator=rng(0)).numpy()
    assert stats.kstest(1 - (1 - s) ** 2, "uniform").pvalue > 1e-6
    assert stats.kstest(u**2, "uniform").pvalue > 1e-6
    assert stats.kstest(u, "uniform").pvalue < 1e-6


def test_balanced_times_are_uniform_in_angle():
    """θ = atan2(s c, 1−s): the ordered pair of two uniforms on [0, π/2] where u is not replaced by 1 (in a quarter
    of the rows), the smaller one shrunk by 0.98. Kolmogorov–Smirnov at 1e-6."""
    n = 20_000
    t = context_time(n, generator=rng(0)).double().clamp_max(0.99)
    std = posterior_std(t, 2.0)
    s, u = balanced_times(t, std, generator=rng(1))
    assert (s <= u).all()
    assert (s < 1).all()
    assert abs(z_scores((u == 1).double(), 0.25)) < LIMIT
    low, high = (torch.atan2(a * std, 1 - a).numpy() / (math.pi / 2) for a in (s, u))
    assert 0.96 < low.max() <= 0.98 + 1e-12
    assert stats.kstest(1 - (1 - low / 0.98) ** 2, "uniform").pvalue > 1e-6
    assert stats.kstest(high[(u < 1).numpy()] ** 2, "uniform").pvalue > 1e-6
    assert stats.kstest(s.numpy(), "uniform").pvalue < 1e-6


@given(st.floats(0, 1), st.floats(1e-3, 10))
def test_angles_are_those_of_a_gaussians_rotation(s, std):
    """(Ī_s − s m)/S_s = cos θ x̄₀ + sin θ (x₁ − m)/c, and `time_of_angle` inverts `angle_of_time`."""
    s, std = torch.tensor(s, dtype=torch.float64), torch.tensor(std, dtype=torch.float64)
    angle = angle_of_time(s, std)
    total = ((1 - s) ** 2 + (s * std) ** 2).sqrt()
    assert_close(total * torch.stack([angle.cos(), angle.sin()]), torch.stack([1 - s, s * std]), 1e-12, 1 + total)
    assert_close(time_of_angle(angle, std), s, 1e-9)


@given(st.floats(0, 0.98), st.floats(0, 1), st.floats(1e-2, 5), st.floats(0.01, 1.5))
def test_step_towards_moves_by_the_step_or_stops_at_u(s, share, std, step):
    """s <= w <= u; short of u the angle has grown by the step exactly."""
    s, std = torch.tensor([s], dtype=torch.float64), torch.tensor([std], dtype=torch.float64)
    u = s + share * (1 - s)
    w = step_towards(s, u, std, step)
    assert (s <= w).all()
    assert (w <= u).all()
    grown = float(angle_of_time(w, std) - angle_of_time(s, std))
    assert grown <= step + 1e-9
    if w < u:
        assert grown == pytest.approx(step, abs=1e-9)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: context_time(0), "n must be an integer >= 1"),
        (lambda: context_time(3, zero_rate=1.5), r"zero_rate must lie in \[0, 1\]"),
        (lambda: context_time(3, zero_rate=math.nan), r"zero_rate must lie in \[0, 1\]"),
        (lambda: context_time(3, power=0), "power be positive"),
        (lambda: context_time(3, power=math.nan), "power be positive"),
        (lambda: ordered_times(0), "n must be an integer >= 1"),
        (lambda: ordered_times(3, 0), "count must be an integer >= 1"),
        (lambda: balanced_times(torch.zeros(3), torch.ones(2)), "same shape"),
    ],
)
def test_laws_of_times_refuse(call, match):
    with pytest.raises(ValueError, match=match):
        call()


def test_a_generator_decides_the_times():
    def balanced(n, generator):
        return balanced_times(torch.zeros(n), torch.ones(n), generator=generator)

    for law in (context_time, ordered_times, balanced):
        one, same, other = (law(20, generator=rng(k)) for k in (0, 0, 1))
        assert torch.equal(one, same)
        assert not torch.equal(one, other)
