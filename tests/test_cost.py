"""What a run costs, row by row against the paper's accounting, and the rewards that are refused, with the step."""

import time

import pytest
import torch
from torch import nn

from mfm_ref import MLP, Cost, ExactFlowMap, FlowMap, doob_drift, dps_drift, evaluations, guidance, value
from mfm_ref.checks import at_step, check_uncoupled, evaluate_reward
from mfm_ref.cost import counting
from mfm_ref.flow_map import unconditional_drift
from tests.helpers import ReadsX, gaussian

B, N = 5, 3  # chains and posterior draws


def network():
    torch.manual_seed(0)
    return FlowMap(MLP(torch.zeros(2), torch.eye(2), hidden=8, depth=2).double())


MAPS = {"oracle": lambda: ExactFlowMap(gaussian()), "reads x": lambda: ReadsX(gaussian()), "network": network}


def states(rows=B):
    return torch.randn(rows, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def linear(x):
    return x[:, 0] - 2 * x[:, 1]


def rows(cost):
    """Forward and backward of the map, forward and backward of the reward."""
    return cost.map_forward, cost.map_backward, cost.reward_forward, cost.reward_backward


def spent(X, f, reward=linear):
    with counting(X, reward, B) as (counted, counted_reward, cost):
        result = f(counted, counted_reward)
    return result, cost


# ---- counts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("max_rows", [None, 4])
def test_rows_of_each_estimator(name, max_rows):
    """Forward and backward, of map and reward; a drift adds one forward row of the map to the guidance."""
    X, x = MAPS[name](), states()
    for method, expected in (
        ("gradient", (15, 15, 15, 15)),
        ("controlled", (15, 15, 15, 15)),
        ("stein", (15, 0, 15, 0)),
    ):
        _, cost = spent(X, lambda X, r, m=method: guidance(X, r, 0.5, x, N, m, max_rows=max_rows))
        assert rows(cost) == expected
        _, cost = spent(X, lambda X, r, m=method: doob_drift(X, r, 0.5, x, N, m, max_rows=max_rows))
        assert rows(cost) == (expected[0] + 5, *expected[1:])
        assert cost.evaluations == evaluations(method, 1, n=N)
    _, cost = spent(X, lambda X, r: dps_drift(X, r, 0.5, x))
    assert rows(cost) == (5, 5, 5, 5)
    assert cost.evaluations == evaluations("dps", 1)
    _, cost = spent(X, lambda X, r: unconditional_drift(X, 0.5, x))
    assert rows(cost) == (5, 0, 0, 0)
    _, cost = spent(X, lambda X, r: guidance(X, r, 0.5, x, N, "gradient", steps=2))
    assert rows(cost) == (30, 30, 15, 15)


@pytest.mark.parametrize("name", MAPS)
def test_counting_changes_no_number(name):
    X, x, eps = MAPS[name](), states(), states(N * B).unflatten(0, (N, B))
    for f in (
        lambda X, r: guidance(X, r, 0.5, x, N, "gradient", eps=eps),
        lambda X, r: guidance(X, r, 0.5, x, N, "stein", eps=eps),
        lambda X, r: dps_drift(X, r, 0.5, x),
    ):
        assert torch.equal(spent(X, f)[0], f(X, linear))


def test_every_way_to_call_a_map_is_counted():
    X, z = network(), states()
    with counting(X, linear, 1) as (counted, _, cost):
        for k, call in enumerate(
            (
                lambda X: X(0.1, 0.7, z, 0.5, z),
                lambda X: X.velocity(0.1, 0.7, z, 0.5, z),
                lambda X: X.from_tx(0.1, 0.7, z, 0.5, z),
                lambda X: X.velocity_from_tx(0.1, 0.7, z, 0.5, z),
            ),
            1,
        ):
            assert torch.equal(call(counted), call(X))
            assert cost.map_forward == 5 * k
    assert (counted.shape, counted.dtype, counted.device, counted.reads_tx) == (X.shape, X.dtype, X.device, X.reads_tx)


def test_backward_passes_are_counted_when_they_happen():
    """A graph that is never used costs none, one used twice costs two, and without gradients there is none."""
    X, x = ExactFlowMap(gaussian()), states().requires_grad_()
    with counting(X, linear, 1) as (counted, reward, cost):
        v = value(counted, reward, 0.5, x, N)
        assert rows(cost) == (15, 0, 15, 0)
        v.sum().backward(retain_graph=True)
        assert rows(cost) == (15, 15, 15, 15)
        v.sum().backward()
        assert rows(cost) == (15, 30, 15, 30)
        with torch.no_grad():
            value(counted, reward, 0.5, x, N)
        assert rows(cost) == (30, 30, 30, 30)


# ---- the formula -----------------------------------------------------------------------------------------


def test_the_papers_accounting():
    """GF K + 2NK, G K + 4NK, Search 2MNK, DPS 4NK with N chains, BoN K·N + N; one sample is one chain of DPS."""
    assert evaluations("stein", 250, n=16) == 8250
    assert evaluations("gradient", 250, n=16) == evaluations("controlled", 250, n=16) == 16250
    assert evaluations("search", 10, n=16, m=4) == 1280
    assert 8 * evaluations("dps", 250) == 8000
    assert evaluations("best_of_n", 250, n=1000) == 251_000
    assert evaluations("smc", 100) == 398
    assert evaluations("smc", 100, m=64) == 25_472
    assert evaluations("stein", 1) == 3
    assert evaluations("gradient", 250, n=16, guided=240, posterior_steps=2) == 250 + 6 * 16 * 240
    assert evaluations("stein", 250, n=16, guided=240, posterior_steps=2) == 250 + 3 * 16 * 240
    assert evaluations("dps", 250, guided=0) == 250


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("euler", 10), r"method must be one of gradient, controlled, stein, dps, .*, got 'euler'"),
        (("stein", 0), r"steps must be an integer >= 1, got 0"),
        (("stein", 2.0), r"steps must be an integer >= 1, got 2.0"),
    ],
)
def test_what_the_formula_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        evaluations(*arguments)


def test_the_formula_refuses_counts_below_one():
    with pytest.raises(ValueError, match="n must be an integer >= 1, got 0"):
        evaluations("stein", 1, n=0)
    with pytest.raises(ValueError, match="m must be an integer >= 1, got -1"):
        evaluations("search", 1, m=-1)
    with pytest.raises(ValueError, match="posterior_steps must be an integer >= 1, got 0"):
        evaluations("stein", 1, posterior_steps=0)
    with pytest.raises(ValueError, match="guided must be at most steps = 3, got 4"):
        evaluations("stein", 3, guided=4)


def test_costs_add_up():
    total = Cost(4, 1, 2, 3, 4, 0.5, 700) + Cost(2, 10, 20, 30, 40, 0.25, 600)
    assert total == Cost(6, 11, 22, 33, 44, 0.75, 700)
    assert total.evaluations == 110 / 6
    assert Cost(3).evaluations == 0


# ---- time and memory -------------------------------------------------------------------------------------


def test_seconds_and_memory_are_set_at_the_end():
    began = time.perf_counter()
    with counting(network(), linear, 1) as (_, _, cost):
        time.sleep(0.02)
        assert cost.seconds == 0.0 and cost.peak_memory == 0
    assert 0.02 <= cost.seconds <= time.perf_counter() - began
    assert 2**20 < cost.peak_memory < 2**40  # bytes of a process with torch in it
    with counting(network(), linear, 1) as (_, _, later):
        held = torch.ones(2**26)  # 256 MiB
    assert later.peak_memory >= cost.peak_memory
    assert later.peak_memory >= held.nbytes


def test_seconds_and_memory_are_set_when_the_run_fails():
    with pytest.raises(KeyError), counting(network(), linear, 1) as (_, _, cost):
        raise KeyError
    assert cost.seconds > 0 and cost.peak_memory > 0


# ---- rewards that couple the batch -----------------------------------------------------------------------


class Normalised(nn.Module):
    """BatchNorm before a sum, and dropout or nothing after it."""

    def __init__(self, norm=None, dropout=0.0):
        super().__init__()
        self.norm, self.dropout = norm or nn.Identity(), nn.Dropout(dropout)

    def forward(self, x):
        return self.dropout(self.norm(x)).sum(1)


@pytest.mark.parametrize(
    "reward",
    [
        lambda x: linear(x) - linear(x).mean(),
        lambda x: linear(x) - linear(x).max(),
        lambda x: linear(x) - linear(x).min(),
        lambda x: linear(x) / linear(x).abs().max(),
        lambda x: linear(x) / linear(x).norm(),
        lambda x: linear(x).softmax(0),
        lambda x: (linear(x) - linear(x).mean()) / (linear(x) - linear(x).mean()).norm(),  # NaN for one sample alone
        lambda x: linear(x).cumsum(0),
        lambda x: linear(x).flip(0),
        lambda x: linear(x).argsort().argsort(),  # integers
        lambda x: linear(x) + 0.2 * torch.randn(len(x)),
        Normalised(nn.BatchNorm1d(2, track_running_stats=False).double(), 0.0),
        Normalised(dropout=0.5),
    ],
    ids=[
        "mean",
        "max",
        "min",
        "scale",
        "norm",
        "softmax",
        "standardised",
        "sum",
        "order",
        "rank",
        "noise",
        "BatchNorm",
        "dropout",
    ],
)
@pytest.mark.parametrize("method", ["stein", "controlled"])
def test_a_reward_that_couples_the_batch_is_refused_at_its_first_call(reward, method):
    """In words of its own, or, as BatchNorm has it, because it fails for one sample alone."""
    torch.manual_seed(0)
    X = ExactFlowMap(gaussian())
    with pytest.raises(ValueError) as refused:
        spent(X, lambda X, r: doob_drift(X, r, 0.5, states(), N, method), reward)
    message = str(refused.value)
    assert message.startswith(
        (
            "a reward must not depend on the other samples of a batch or on chance; this one gives ",
            "a reward must take clean data (1, 2); this one raised ValueError: Expected more than 1 value per channel",
        )
    )


def test_both_values_are_named():
    x = torch.tensor([[1.0, 0.0], [3.0, 0.0]])
    with pytest.raises(ValueError, match=r"gives 1 to a sample within a batch of 2 and 0 to it alone"):
        check_uncoupled(lambda x: x[:, 0] - x[:, 0].mean(), x[[1, 0]], torch.tensor([1.0, -1.0]))


def test_the_same_difference_is_rounding_in_half_precision_only():
    """Of 0.4 %, of rewards that are else all the same."""
    x, reward = states(), lambda x: torch.full((len(x),), 0.3 * (1 + 4e-3 / len(x)))
    check_uncoupled(lambda x: reward(x).half(), x, reward(x).half())
    with pytest.raises(ValueError, match=r"gives 0.30024 to a sample within a batch of 5 and 0.3012 to it alone"):
        check_uncoupled(reward, x, reward(x))


def test_a_reward_that_drops_the_batch_of_one_is_refused():
    """`squeeze`: it would fail later, when a last piece has one row."""
    with pytest.raises(ValueError, match=r"^a reward must return one number per sample, shape \(1,\), got \(\)"):
        spent(network(), lambda X, r: guidance(X, r, 0.5, states(), N, "stein"), lambda x: linear(x).squeeze())


@pytest.mark.parametrize(
    "reward",
    [
        linear,
        lambda x: linear(x.half()),
        lambda x: linear(x.bfloat16()),
        lambda x: linear(x).bfloat16().float(),
        lambda x: 1000 + linear(x).float(),
        lambda x: torch.zeros(len(x)),
        lambda x: torch.full((len(x),), 0.3, dtype=torch.float16),
        lambda x: torch.full((len(x),), 0.3 * (1 + 4e-3 / len(x)), dtype=torch.float16),
        lambda x: (x[:, 0] > 0).long(),
        lambda x: x[:, 0] > 0,
        lambda x: linear(x) * (1 + 1e-4 / len(x)),  # rounding, as of another order of summation
        Normalised(nn.BatchNorm1d(2).double().eval()),
        Normalised(dropout=0.5).eval(),
    ],
)
def test_a_reward_that_does_not_is_not_refused(reward):
    spent(network(), lambda X, r: guidance(X, r, 0.5, states(), N, "stein"), reward)


def test_the_check_is_made_once_and_not_counted():
    calls = []

    def reward(x):
        calls.append(len(x))
        return linear(x)

    with counting(network(), reward, 1) as (_, counted, cost):
        evaluate_reward(counted, states(1))  # nothing to compare with
        evaluate_reward(counted, states(4))
        evaluate_reward(counted, states(4))
    assert calls == [1, 4, 1, 1, 4]
    assert cost.reward_forward == 9


def test_of_equal_rows_the_check_learns_nothing_and_is_made_again():
    """At t = 0 every posterior has the same mean, which is all that DPS shows to the reward."""
    for equal in (states(1).expand(4, 2), torch.zeros(4, 2).double()):
        with counting(network(), lambda x: linear(x) - linear(x).mean(), 1) as (_, counted, cost):
            evaluate_reward(counted, equal)
            with pytest.raises(ValueError, match="must not depend on the other samples"):
                evaluate_reward(counted, states(4))
        assert cost.reward_forward == 4


def test_batches_of_one_are_not_compared():
    with counting(network(), lambda x: linear(x) + torch.rand(len(x)), 1) as (_, counted, _):
        evaluate_reward(counted, states(1))


# ---- rewards that fail -----------------------------------------------------------------------------------


class CustomError(Exception):
    pass


def failing(error):
    def reward(x):
        raise error

    return reward


@pytest.mark.parametrize("error", [RuntimeError("no luck"), KeyError("name"), CustomError("mine"), ValueError("v")])
def test_a_reward_that_fails_is_named_with_the_type_and_message(error):
    for f in (
        lambda X, r: evaluate_reward(r, states()),
        lambda X, r: guidance(X, r, 0.5, states(), N, "stein"),
        lambda X, r: dps_drift(X, r, 0.5, states()),
    ):
        with pytest.raises(ValueError, match=r"a reward must take clean data \(\d+, 2\); this one raised ") as caught:
            spent(network(), f, failing(error))
        assert f"{type(error).__name__}: {error}" in str(caught.value)
        assert caught.value.__cause__ is error


@pytest.mark.parametrize("error", [MemoryError("full"), torch.OutOfMemoryError("full"), KeyboardInterrupt()])
def test_running_out_of_memory_stays_what_it_is(error):
    with pytest.raises(type(error)) as caught:
        spent(network(), lambda X, r: guidance(X, r, 0.5, states(), N, "stein"), failing(error))
    assert caught.value is error


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (lambda x: torch.where(x[:, 0] > 0, torch.nan, x[:, 0]), r"^the reward must be finite, got \d+ NaN .* of 15"),
        (lambda x: x[:, 0] / 0, "^the reward must be finite, got 15 NaN or infinite entries of 15"),
        (lambda x: x, r"shape \(15,\), got \(15, 2\)"),
        (lambda x: x.sum(), r"shape \(15,\), got \(\)"),
        (lambda x: x[:4, 0], r"shape \(15,\), got \(4,\)"),
        (lambda x: 1.0, r"shape \(15,\), got float"),
        (lambda x: None, r"shape \(15,\), got NoneType"),
    ],
)
def test_what_a_counted_reward_returns_is_checked(reward, message):
    with pytest.raises(ValueError, match=message):
        spent(network(), lambda X, r: guidance(X, r, 0.5, states(), N, "stein"), reward)


# ---- the step's name -------------------------------------------------------------------------------------


def test_at_step_names_the_step_in_a_value_error():
    message = r"^step 3 of 250, at t = 0.1235: the reward must be finite$"
    with pytest.raises(ValueError, match=message) as caught, at_step(3, 250, 0.123456):
        raise ValueError("the reward must be finite")
    assert str(caught.value.__cause__) == "the reward must be finite"


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("full"), TypeError("t"), CustomError("x")])
def test_at_step_notes_it_beside_any_other_error(error):
    with pytest.raises(type(error)) as caught, at_step(1, 2, 0.5):
        raise error
    assert caught.value is error
    assert caught.value.__notes__ == ["step 1 of 2, at t = 0.5"]


def test_at_step_lets_the_rest_pass():
    with at_step(1, 2, 0.5):
        found = 1
    assert found == 1
    with pytest.raises(KeyboardInterrupt) as caught, at_step(1, 2, 0.5):
        raise KeyboardInterrupt
    assert not hasattr(caught.value, "__notes__")
