"""The MLP starts as the exact map of a Gaussian, and FlowMap keeps the contract around any network."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from mfm_ref import MLP, ExactFlowMap, FlowMap
from tests.helpers import gaussian
from tests.strategies import SEEDS, TIMES, Case, assert_close, cases, mixtures, randn, rng, row_scale

GAUSSIANS = mixtures(max_components=1)
ALL_ENDS = [(s, u, t) for s in (0.0, 1.0) for u in (0.0, 1.0) for t in (0.0, 1.0) if s <= u]


def scrambled(dim: int = 2, *, dtype=torch.float64, n_classes: int = 0) -> FlowMap:
    """A small MLP map whose correction is not zero, as after training."""
    p1 = gaussian(dim).to(dtype)
    torch.manual_seed(0)
    network = MLP(p1.mean, p1.cov, hidden=16, depth=2, n_classes=n_classes)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    return FlowMap(network)


# ---- MLP -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalise", [False, True])
@given(case=cases(p1=GAUSSIANS))
def test_mlp_starts_as_the_exact_map_of_its_gaussian(normalise, case: Case):
    """Map and velocity against the oracle, both ends of every time and B = D included; relative to the row."""
    network = MLP(case.p1.mean, case.p1.cov, hidden=8, depth=2, normalise=normalise)
    X, exact = FlowMap(network), ExactFlowMap(case.p1)
    arguments = case.s, case.u, case.z, case.t, case.x
    moved, velocity = exact(*arguments), exact.velocity(*arguments)
    assert_close(X(*arguments).detach(), moved, 1e-9, row_scale(moved, case.z, velocity))
    assert_close(X.velocity(*arguments).detach(), velocity, 1e-9, row_scale(velocity))
    diagonal = exact.velocity(case.s, case.s, case.z, case.t, case.x)
    assert_close(X.velocity(case.s, case.s, case.z, case.t, case.x).detach(), diagonal, 1e-9, row_scale(diagonal))


def test_the_correction_is_switched_on_by_training():
    """With other weights it is another map, so the test above does not hold of every MLP."""
    X, exact = scrambled(), ExactFlowMap(gaussian())
    arguments = 0.2, 0.7, randn(5, 2, seed=1), 0.4, randn(5, 2, seed=2)
    assert (X(*arguments) - exact(*arguments)).detach().abs().min() > 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("s", "u", "t"), ALL_ENDS)
@pytest.mark.parametrize("options", [{}, {"min_std": 0.5}, {"normalise": True}], ids=str)
def test_finite_at_every_end(s, u, t, dtype, options):
    """Values and gradients, weights' and inputs', where some quotient of the preconditioning is 0/0."""
    torch.manual_seed(0)
    network = MLP(torch.zeros(3, dtype=dtype), torch.diag(torch.tensor([0.0, 1e-6, 4.0], dtype=dtype)), **options)
    nn.init.normal_(network.outlet.weight)
    X = FlowMap(network)
    z, x = (randn(4, 3, seed=k).to(dtype).requires_grad_() for k in (1, 2))
    velocity = X.velocity(s, u, z, t, x)
    assert torch.isfinite(velocity).all()
    velocity.square().sum().backward()
    for tensor in (z, x, *network.parameters()):
        if tensor.grad is not None:
            assert torch.isfinite(tensor.grad).all()


@given(mixtures(max_components=1), SEEDS)
def test_the_gradient_with_respect_to_the_context_is_finite_at_time_zero(p1, seed):
    """∂X/∂(t·x) at t = 0, which steering needs there; for a Gaussian it is the oracle's, m's slope Cov[x₁]."""
    X, exact = FlowMap(MLP(p1.mean, p1.cov, hidden=8, depth=1)), ExactFlowMap(p1)
    z, direction = randn(3, p1.dim, seed=seed), randn(3, p1.dim, seed=seed + 1)
    grads = []
    for a in (X, exact):
        tx = torch.zeros(3, p1.dim, dtype=torch.float64, requires_grad=True)
        grads.append(torch.autograd.grad((a.from_tx(0.0, 1.0, z, 0.0, tx) * direction).sum(), tx)[0])
    assert_close(grads[0], grads[1], 1e-9, row_scale(grads[1]))


def test_small_spreads_are_raised_to_min_std():
    """A flat direction is treated as one of standard deviation `min_std`; the others are untouched."""
    cov = torch.diag(torch.tensor([1e-12, 0.5], dtype=torch.float64))
    raised = torch.diag(torch.tensor([0.01, 0.5], dtype=torch.float64))
    mean = torch.tensor([1.0, -1.0], dtype=torch.float64)
    first, second = FlowMap(MLP(mean, cov, min_std=0.1)), FlowMap(MLP(mean, raised))
    arguments = 0.1, 0.9, randn(5, 2, seed=1), 0.6, randn(5, 2, seed=2)
    assert_close(first(*arguments), second(*arguments), 1e-12)


def test_labels_choose_and_none_is_the_null_class():
    X = scrambled(n_classes=3)
    arguments = 0.1, 0.9, randn(1, 2, seed=1).expand(4, 2), 0.5, randn(1, 2, seed=2).expand(4, 2)
    by_label = X(*arguments, torch.arange(4))
    assert (by_label[0] - by_label[1]).abs().max() > 1e-3
    assert (by_label[0] - by_label[2]).abs().max() > 1e-3
    null = X(*arguments)
    assert_close(null, X(*arguments, torch.full((4,), 3)), 1e-12)
    assert_close(null[3], by_label[3], 1e-12)
    swapped = X(*arguments, torch.tensor([1, 0, 2, 3]))
    assert_close(swapped[:2], by_label[:2].flip(0), 1e-12)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"mean": torch.zeros(2, 2)}, r"mean must be \(D,\)"),
        ({"mean": torch.zeros(())}, r"mean must be \(D,\)"),
        ({"cov": torch.eye(3)}, r"cov \(D, D\), got \(2,\) and \(3, 3\)"),
        ({"cov": torch.ones(2)}, r"cov \(D, D\)"),
        ({"mean": torch.tensor([0.0, math.nan])}, "mean must be finite"),
        ({"cov": torch.full((2, 2), math.inf)}, "cov must be finite"),
        ({"depth": 0}, "depth must be an integer >= 1"),
        ({"hidden": 0}, "hidden must be an integer >= 1"),
        ({"n_classes": -1}, "n_classes must be an integer >= 0"),
        ({"min_std": 0.0}, "min_std must be positive"),
    ],
)
def test_mlp_refuses(arguments, match):
    arguments = {"mean": torch.zeros(2), "cov": torch.eye(2)} | arguments
    with pytest.raises(ValueError, match=match):
        MLP(arguments.pop("mean"), arguments.pop("cov"), **arguments)


def test_labels_for_a_network_without_classes_are_refused():
    with pytest.raises(ValueError, match="no classes"):
        scrambled()(0.0, 1.0, randn(2, 2, seed=1), 0.5, randn(2, 2, seed=2), torch.zeros(2, dtype=torch.long))


@pytest.mark.parametrize("y", [torch.tensor(0), torch.tensor([0]), torch.zeros(2, 2, dtype=torch.long)])
def test_labels_that_would_broadcast_are_refused(y):
    with pytest.raises(ValueError, match=r"labels y must have shape \(2,\)"):
        scrambled(n_classes=3)(0.0, 1.0, randn(2, 2, seed=1), 0.5, randn(2, 2, seed=2), y)


# ---- FlowMap (E11) -------------------------------------------------------------------------------------


@given(cases(p1=mixtures(min_dim=2, max_dim=2, max_components=1)))
def test_the_map_is_the_identity_plus_the_velocity(case: Case):
    """E11's parameterisation, X_{s,s} = z, and the two readings of the context, x and t·x."""
    X = scrambled()
    arguments = case.s, case.u, case.z, case.t, case.x
    with torch.no_grad():
        velocity, moved = X.velocity(*arguments), X(*arguments)
        jump = (case.u - case.s).expand(case.size).unsqueeze(-1)
        assert_close(moved - case.z, jump * velocity, 1e-12, row_scale(moved, case.z))
        assert torch.equal(X(case.s, case.s, case.z, case.t, case.x), case.z)
        tx = case.t.expand(case.size).unsqueeze(-1) * case.x
        assert torch.equal(X.from_tx(case.s, case.u, case.z, case.t, tx), moved)
        assert torch.equal(X.velocity_from_tx(case.s, case.u, case.z, case.t, tx), velocity)


@given(st.integers(1, 4), SEEDS, TIMES, TIMES, TIMES)
def test_rows_do_not_see_each_other(dim, seed, a, b, t):
    """A batch of B = D rows with times of their own equals its rows one by one: nothing broadcasts."""
    X, (s, u) = scrambled(dim), sorted((a, b))
    z, x = randn(dim, dim, seed=seed), randn(dim, dim, seed=seed + 1)
    share = torch.rand(3, dim, generator=rng(seed), dtype=torch.float64)
    s, u, t = s * share[0], u + (1 - u) * share[1], t * share[2]
    with torch.no_grad():
        together = X(s, u, z, t, x)
        for row in range(dim):
            alone = X(s[row], u[row], z[row : row + 1], t[row], x[row : row + 1])
            assert_close(together[row : row + 1], alone, 1e-12, row_scale(alone))


def test_argument_order_is_s_u_z_t_x_y():
    """Positional arguments arrive under their names, at the map and at the network."""

    class Spy(nn.Module):
        shape, reads_tx = (1,), True

        def velocity(self, s, u, z, t, context, y=None):
            self.seen = [a.flatten().tolist() for a in (s, u, z, t, context, y)]
            return z

    spy = Spy()
    FlowMap(spy)(0.1, 0.2, torch.tensor([[3.0]]), 0.5, torch.tensor([[6.0]]), torch.tensor([7]))
    assert spy.seen == [pytest.approx([a]) for a in (0.1, 0.2, 3.0, 0.5, 3.0, 7)]
    spy.reads_tx = False
    FlowMap(spy)(0.1, 0.2, torch.tensor([[3.0]]), 0.5, torch.tensor([[6.0]]), torch.tensor([7]))
    assert spy.seen[4] == [6.0]


@given(st.floats(0, 1), SEEDS)
def test_drift_is_the_diagonal_in_the_empty_context(t, seed):
    """At init, E2 of the Gaussian; for any weights, free of the context it does not take."""
    p1, x = gaussian(), randn(2, 2, seed=seed)
    expected = p1.drift(t, x)
    start = FlowMap(MLP(p1.mean, p1.cov, hidden=8, depth=1))
    assert_close(start.drift(t, x).detach(), expected, 1e-9, row_scale(expected))
    X = scrambled()
    for context in (torch.zeros_like(x), x):  # at context time 0 the context says nothing
        assert_close(X.drift(t, x).detach(), X.velocity(t, t, x, 0.0, context).detach(), 1e-12, row_scale(expected))


def test_forward_mode_derivatives_equal_finite_differences():
    """torch.func.jvp through velocity, in (s, u, z) together as E14's identities need it; h² error at h = 1e-5."""
    X, t, x = scrambled(), 0.4, randn(3, 2, seed=2)
    primals = torch.tensor([0.2, 0.3, 0.4]).double(), torch.tensor([0.5, 0.9, 0.8]).double(), randn(3, 2, seed=1)
    tangents = torch.ones(3).double(), torch.tensor([0.5, -1.0, 0.0]).double(), randn(3, 2, seed=3)

    def velocity(s, u, z):
        return X.velocity(s, u, z, t, x)

    value, derivative = torch.func.jvp(velocity, primals, tangents)
    assert_close(value, velocity(*primals), 1e-12)
    h = 1e-5
    ahead, behind = (velocity(*(a + k * h * d for a, d in zip(primals, tangents, strict=True))) for k in (1, -1))
    assert_close(derivative, (ahead - behind) / (2 * h), 1e-8)


def test_dtype_device_and_shape_are_those_of_the_weights():
    X = scrambled(3, dtype=torch.float32)
    assert (X.dtype, X.device, X.shape) == (torch.float32, torch.device("cpu"), (3,))
    assert X.double().dtype == torch.float64


@pytest.mark.parametrize("missing", ["shape", "reads_tx", "velocity"])
def test_networks_that_lack_something_are_refused(missing):
    members = {"shape": (2,), "reads_tx": True, "velocity": lambda *arguments: None}
    del members[missing]
    with pytest.raises(ValueError, match=rf"lacks \['{missing}'\]"):
        FlowMap(type("Bare", (nn.Module,), members)())


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"s": 0.8, "u": 0.2}, "s <= u"),
        ({"s": torch.tensor([0.1, 0.9]), "u": 0.5}, "s <= u"),
        ({"s": -0.1}, r"time s must lie in \[0, 1\]"),
        ({"u": 1.1}, r"time u must lie in \[0, 1\]"),
        ({"t": math.nan}, r"time t must lie in \[0, 1\]"),
        ({"t": torch.tensor([0.5, 1.5])}, r"time t must lie in \[0, 1\]"),
        ({"t": torch.zeros(2, 1)}, r"time t must have shape \(\) or \(2,\)"),
        ({"u": torch.ones(3)}, r"time u must have shape \(\) or \(2,\)"),
        ({"x": torch.zeros(1, 2, dtype=torch.float64)}, "same shape"),
        ({"x": torch.zeros(2, 1, dtype=torch.float64)}, "same shape"),
        ({"z": torch.zeros(2, dtype=torch.float64)}, "same shape"),
        (dict.fromkeys("zx", torch.zeros(2, 3, dtype=torch.float64)), r"states must have shape \(B, 2\)"),
    ],
)
@pytest.mark.parametrize("method", ["__call__", "velocity", "from_tx", "velocity_from_tx"])
def test_flow_map_refuses(change, match, method):
    zeros = torch.zeros(2, 2, dtype=torch.float64)
    arguments = {"s": 0.1, "u": 0.9, "z": zeros, "t": 0.5, "x": zeros} | change
    with pytest.raises(ValueError, match=match):
        getattr(scrambled(), method)(*arguments.values())


def test_a_network_that_reads_x_refuses_the_product():
    class ReadsX(nn.Module):
        shape, reads_tx = (2,), False

        def velocity(self, s, u, z, t, context, y=None):
            return z + context

    X, z, x = FlowMap(ReadsX()), randn(2, 2, seed=1), randn(2, 2, seed=2)
    assert_close(X.velocity(0.0, 1.0, z, 0.5, x), z + x, 1e-12)
    for method in (X.from_tx, X.velocity_from_tx):
        with pytest.raises(ValueError, match="reads its context as x"):
            method(0.0, 1.0, z, 0.5, x)


@given(cases(p1=mixtures(min_dim=2, max_dim=2, max_components=1)))
def test_float32_is_within_1e_4(case: Case):
    """The same weights, scrambled, in both precisions; relative to the row."""
    double, single = scrambled(), scrambled().float()
    s, u, z, t, x = (a.float() for a in (case.s, case.u, case.z, case.t, case.x))
    with torch.no_grad():
        exact = double(*(a.double() for a in (s, u, z, t, x)))
        assert_close(single(s, u, z, t, x).double(), exact, 1e-4, row_scale(exact, case.z))
