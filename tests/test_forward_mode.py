"""Derivatives without zero tangents are torch's own, whatever the operation and whichever operand moves."""

import operator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import forward_ad
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from mfm_ref.forward_mode import derivative
from tests.strategies import SEEDS, randn

X, DX = 0.5 + randn(4, 3, seed=1).abs(), randn(4, 3, seed=2)
OPERATIONS = [operator.add, operator.sub, operator.mul, operator.truediv]
CONSTANTS = [2.0, torch.tensor(3.0), 0.5 + randn(4, 3, seed=3).abs(), 0.5 + randn(2, 1, 3, seed=4).abs()]


def agree(f, at=(X,), along=(DX,)) -> None:
    value, slope = derivative(f, at, along)
    expected, expected_slope = torch.func.jvp(f, at, along)
    assert value.dtype == expected.dtype and slope.dtype == expected_slope.dtype
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(slope, expected_slope)


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("constant", CONSTANTS, ids=lambda c: str(getattr(c, "shape", c)))
def test_arithmetic_with_a_constant_on_either_side(operation, constant):
    agree(lambda x: operation(x, constant))
    agree(lambda x: operation(constant, x))
    agree(lambda x: operation(x[:1], constant))  # the result is larger than the operand


@pytest.mark.parametrize("operation", [torch.add, torch.sub, torch.mul, torch.div], ids=lambda f: f.__name__)
def test_arithmetic_by_functions(operation):
    agree(lambda x: operation(x, CONSTANTS[2]))
    agree(lambda x: operation(CONSTANTS[2], x))


class Counted(TorchDispatchMode):
    """Counts operations of some kinds."""

    def __init__(self, *kinds):
        super().__init__()
        self.kinds, self.count = kinds, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket in self.kinds
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("f", "kinds", "wanted"),
    [
        (lambda x: functional.linear(x, randn(5, 3, seed=5), randn(5, seed=6)), ("mm", "addmm"), 2),
        (lambda x: torch.matmul(randn(2, 4, seed=5), x), ("mm", "addmm"), 2),
        (lambda x: x * CONSTANTS[2], ("mul",), 2),
        (lambda x: CONSTANTS[2] * x, ("mul",), 2),
        (lambda x: CONSTANTS[2] - x, ("sub", "add"), 1),
        (lambda x: functional.layer_norm(x, (3,)), ("native_layer_norm", "var_mean"), 1),
    ],
)
def test_no_operation_is_spent_on_zeros(f, kinds, wanted):
    """One operation for the value and one for the tangent; torch itself spends more on all but the difference."""
    packets = [getattr(torch.ops.aten, kind) for kind in kinds]
    with torch.no_grad():
        with Counted(*packets) as counted:
            derivative(f, (X,), (DX,))
        assert counted.count == wanted


def test_an_operation_in_place_leaves_the_operand_its_tangent():
    """x + c and x − c have the derivative of x, but not the same tensor of it."""

    def scaled(h, x):
        return h.mul_(3.0) * x

    for constant in CONSTANTS[:3]:
        agree(lambda x, c=constant: scaled(x + c, x))
        agree(lambda x, c=constant: scaled(x - c, x))
        agree(lambda x, c=constant: scaled(c + x, x))
    agree(lambda x: x + functional.relu(x - X.median(), inplace=True))
    agree(lambda x: x + functional.silu(x + 1.0, inplace=True))


def test_linear_maps():
    weight, bias = randn(5, 3, seed=5), randn(5, seed=6)
    agree(lambda x: functional.linear(x, weight, bias))
    agree(lambda x: functional.linear(x, weight))
    agree(lambda x: functional.linear(weight, x, x[:, 0]))  # weights that move
    agree(lambda x: functional.linear(x, weight, bias=bias))
    agree(lambda x: functional.linear(weight, weight, x.flatten()[:5]))  # only the bias moves
    agree(lambda x: x @ weight.T)
    agree(lambda x: weight @ x.T)
    agree(lambda x: x @ x.T)


def test_layer_norms():
    weight, bias = randn(3, seed=7), randn(3, seed=8)
    agree(lambda x: functional.layer_norm(x, (3,), weight, bias))
    agree(lambda x: functional.layer_norm(x, (3,), weight=weight, eps=0.1))
    agree(lambda x: functional.layer_norm(x, (3,)))
    agree(lambda x: functional.layer_norm(x.T, (4,)))  # not contiguous
    agree(lambda x: functional.layer_norm(x.unflatten(0, (2, 2)), (2, 3), randn(2, 3, seed=9)))
    agree(lambda x: functional.layer_norm(x, (3,), x[0], bias))  # the weight moves too
    agree(lambda x: functional.layer_norm(weight, (3,), x[0], bias))  # the weight alone
    narrow, direction = X.bfloat16(), DX.bfloat16()  # as under autocast, which leaves weights as they are
    value, slope = derivative(lambda x: functional.layer_norm(x, (3,), weight.float()), (narrow,), (direction,))
    wide = torch.func.jvp(
        lambda x: functional.layer_norm(x, (3,), weight.float()), (narrow.float(),), (direction.float(),)
    )
    torch.testing.assert_close((value, slope), wide, check_dtype=False)


def test_kinds_of_numbers_mix_as_torch_mixes_them():
    x, dx = X.float(), DX.float()
    for constant in (X, torch.arange(3), torch.tensor(2.0, dtype=torch.float64)):
        agree(lambda x, c=constant: x * c + c - x, (x,), (dx,))
    agree(lambda x: torch.Tensor.add(x, X, alpha=2.0))


@given(seed=SEEDS, moving=st.sets(st.integers(0, 2), min_size=1))
def test_a_function_of_many_operations(seed, moving):
    """Any of its arguments may move; the network's layers and the algebra around them."""
    torch.manual_seed(seed)
    layers = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.SiLU(), torch.nn.LayerNorm(8), torch.nn.Linear(8, 3))
    layers.double()
    at, along = torch.rand(3, 5, 3, dtype=torch.float64) + 0.5, torch.randn(3, 5, 3, dtype=torch.float64)

    def f(*arguments):
        a, b, c = (arguments[sorted(moving).index(k)] if k in moving else at[k] for k in range(3))
        h = layers(2 * a - b / 3) + 1 / c**2
        return torch.where(a > 1, h, 0.0) * (1 - b) - c.sqrt() * (b @ h.mT @ a)

    agree(f, tuple(at[k] for k in sorted(moving)), tuple(along[k] for k in sorted(moving)))


def test_what_does_not_move_has_derivative_zero():
    value, slope = derivative(lambda x: x.detach() * 2, (X,), (DX,))
    assert torch.equal(value, 2 * X) and torch.equal(slope, torch.zeros_like(X))


def test_arguments_that_share_memory():
    """Which torch.func.jvp itself refuses: a time for the whole batch is one number."""
    point = torch.tensor(0.5, dtype=torch.float64).expand(4)
    value, slope = derivative(lambda x: x**2, (point,), (torch.ones(4, dtype=torch.float64),))
    assert torch.equal(value, torch.full_like(value, 0.25)) and torch.equal(slope, torch.ones_like(slope))


def test_compiled_it_is_the_same():
    """Also along a part of a larger tensor, whose rows torch.func.jvp cannot move in a compiled graph."""
    times, weight = torch.rand(8, 1, dtype=torch.float64), randn(3, 3, seed=8)

    def f(x, s):
        return derivative(lambda a: torch.cos(x * a) @ weight, (s[4:],), (torch.ones_like(s[4:]),))

    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    for ours, eager in zip(compiled(X, times), f(X, times), strict=True):
        torch.testing.assert_close(ours, eager)


def test_no_graph_under_no_grad_and_one_outside():
    weight = randn(3, seed=7).requires_grad_()
    with torch.no_grad():
        assert not derivative(lambda x: x * weight, (X,), (DX,))[1].requires_grad
    slope = derivative(lambda x: x * weight, (X,), (DX,))[1]
    torch.testing.assert_close(torch.autograd.grad(slope.sum(), weight)[0], DX.sum(0))


def test_a_function_that_is_compiled_runs_eager_within():
    """Kernels that a compiler made drop the tangents that come in: the derivative would be zero without a word."""

    def kernels(graph, inputs):
        return lambda *a: graph(*(forward_ad.unpack_dual(value).primal for value in a))

    f = torch.compile(lambda a: (a * a).sin(), backend=kernels)
    at, along = randn(4, seed=1), randn(4, seed=2)
    with forward_ad.dual_level():
        assert forward_ad.unpack_dual(f(forward_ad.make_dual(at, along))).tangent is None
    value, slope = derivative(f, (at,), (along,))
    assert torch.allclose(slope, 2 * at * (at * at).cos() * along)
    assert torch.equal(value, (at * at).sin())
