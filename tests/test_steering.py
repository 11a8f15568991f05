"""Steered sampling (E7, E8): the law, the order in the step, the cost, the chunks and what errors say."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mfm_ref import (
    MLP,
    ExactFlowMap,
    FlowMap,
    GaussianLikelihood,
    LinearReward,
    doob_drift,
    early_draws,
    evaluations,
    integrate,
    log_snr_grid,
    rows_within,
    steer,
    steering,
    time_grid,
)
from mfm_ref.alignment import guidance, unconditional_drift
from tests.helpers import LIMIT, MapOf, ReadsX, gaussian, moment_scores, normal, slope
from tests.strategies import SEEDS, assert_close, randn, random_mixture, rng

METHODS = ["gradient", "stein", "controlled"]
DYNAMICS = ["ode", "midpoint", "sde"]
PULL = torch.tensor([0.8, -0.6], dtype=torch.float64)


def pull(sigma: float = 0.8) -> GaussianLikelihood:
    return GaussianLikelihood(PULL, 2.0, sigma)


def network(n_classes: int = 0, dtype: torch.dtype = torch.float64, **sizes: int) -> FlowMap:
    """An untrained MLP for two dimensions that is not the map of a Gaussian."""
    torch.manual_seed(0)
    p1 = gaussian().to(dtype)
    X = FlowMap(MLP(p1.mean, p1.cov, n_classes=n_classes, **({"hidden": 8, "depth": 2} | sizes)))
    with torch.no_grad():
        X.network.outlet.weight.normal_(std=0.3)
    return X


MAPS = {"oracle": lambda: ExactFlowMap(gaussian()), "network": network}

# ---- the law -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dynamics", DYNAMICS)
@pytest.mark.parametrize("method", METHODS)
def test_steering_converges_in_law_to_the_tilted_law(method, dynamics):
    """Whitened moments of 600 samples, 5 statistics of 6e-7 each; N = 32 draws and 64 evaluations keep the bias under
    two standard errors. Unsteered samples fail, half the guidance fails, and so does N = 1: "gradient" (and
    "controlled", which is the same then) drops the weights e^r, "stein" does nothing at all."""
    p1, reward = gaussian(), pull(0.6)
    X, tilted = ExactFlowMap(p1), p1.tilt(reward)

    def score(samples: Tensor) -> Tensor:
        return moment_scores(samples, tilted.mean, tilted.cov)

    steps = 32 if dynamics == "midpoint" else 64

    def steered(n: int) -> Tensor:
        return steer(X, reward, 600, n=n, steps=steps, method=method, dynamics=dynamics, generator=rng(0))[0]

    draws = rng(2)

    def half(t: float, x: Tensor) -> Tensor:
        return unconditional_drift(X, t, x) + guidance(X, reward, t, x, 8, method, generator=draws) / 2

    assert score(steered(32)) < LIMIT
    assert score(steered(1)) > LIMIT
    assert score(p1.sample(600, generator=rng(1))) > LIMIT
    halved = integrate(half, randn(600, 2, seed=3), time_grid(steps), dynamics=dynamics, generator=rng(4))
    assert score(halved) > LIMIT


def test_dps_does_not_reach_the_tilted_law():
    """The reward of the mean in place of the mean of the reward: too strong a pull for a quadratic one."""
    p1, reward = gaussian(), pull(0.6)
    tilted = p1.tilt(reward)
    samples, _ = steer(ExactFlowMap(p1), reward, 1_000, steps=64, method="dps", generator=rng(0))
    assert moment_scores(samples, tilted.mean, tilted.cov) > LIMIT
    # For a linear reward both are the same.
    linear = LinearReward(PULL)
    samples, _ = steer(ExactFlowMap(p1), linear, 1_000, steps=64, method="dps", generator=rng(0))
    assert moment_scores(samples, p1.tilt(linear).mean, p1.tilt(linear).cov) < LIMIT


# ---- order in the step ---------------------------------------------------------------------------------

GRIDS = {
    "uniform": time_grid(8),
    "power": time_grid(8, power=2.5),
    "log-SNR": log_snr_grid(8, limit=6.0),
}


def halved(times: list[float], often: int) -> list[float]:
    """A grid with each of its steps cut in two, `often` times."""
    for _ in range(often):
        middles = [(a + b) / 2 for a, b in pairwise(times)]
        times = sorted(times + middles)
    return times


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize(("dynamics", "order"), [("ode", 1), ("midpoint", 2)])
def test_the_ode_has_its_order_when_the_drift_is_exact(dynamics, order, grid):
    """Strong error at t = 1 against the exact flow map of p*, from the same noise.

    For one Gaussian coordinate, a quadratic reward and antithetic pairs, whose mean is that of the posterior, the
    default estimator is the exact ∇V: what is left is the error of the steps, of which the next order moves the slope.
    (The midpoint rule is seen at order 3 in this linear case; below, at order 2 in one that is not.)
    """
    p1 = normal(1.5)
    reward = GaussianLikelihood(torch.ones(1, dtype=torch.float64), 1.0, 0.6)
    X, tilted = ExactFlowMap(p1), ExactFlowMap(p1.tilt(reward))
    sizes, errors = [], []
    for often in (1, 2, 3, 4):
        times = halved(GRIDS[grid], often)
        end, _ = steer(X, reward, 20, n=4, times=times, noise="antithetic", dynamics=dynamics, generator=rng(0))
        start = torch.randn((20, 1), generator=rng(0), dtype=torch.float64)  # the first that `steer` draws
        errors.append(float((end - tilted(0.0, 1.0, start, 0.0, 0 * start)).norm()))
        sizes.append(len(times) - 1)
    found = -slope(sizes[1:], errors[1:])
    assert found == pytest.approx(order, abs=0.15) if dynamics == "ode" else found > order - 0.15
    assert errors[-1] < 0.05


def impulse_moments(monkeypatch, steered, steps: int) -> tuple[float, float]:
    """Mean and variance that the SDE gives a linear drift in one dimension, with no Monte Carlo error.

    The result is then an affine function of the start and of every step's noise: one row of the batch answers to each
    unit impulse, and the variance is the sum of the squared responses. Noises of posterior draws stay random.
    """
    impulses = torch.cat([torch.zeros(1, steps + 1), torch.eye(steps + 1)]).double()
    per_step, randn = iter(impulses.split(1, dim=1)), torch.randn

    def noise(shape, **options) -> Tensor:
        return randn(shape, **options) if len(shape) == 3 else next(per_step).clone()

    with monkeypatch.context() as patch:
        patch.setattr(torch, "randn", noise)
        end = steered(steps + 2).flatten()
    assert next(per_step, None) is None  # one fresh noise a step, none left over
    return float(end[0]), float((end[1:] - end[0]).square().sum())


ONE_GRID = [pytest.param(grid, marks=() if k == 0 else pytest.mark.slow) for k, grid in enumerate(GRIDS)]


@pytest.mark.parametrize("grid", ONE_GRID)
def test_the_sde_has_weak_order_one_when_the_drift_is_exact(grid, monkeypatch):
    """Mean and second moment of the same coordinate's samples against those of p*, by the recursion's own moments.

    The mean has no error: along x = t m the denoiser is m, constant as a step supposes. Half of the guidance fails.
    """
    p1 = normal(1.5)
    reward = GaussianLikelihood(torch.ones(1, dtype=torch.float64), 1.0, 0.6)
    X, tilted = ExactFlowMap(p1), p1.tilt(reward)
    second = float(tilted.cov + tilted.mean**2)
    sizes, errors = [], []
    for often in (3, 4, 5):
        times = halved(GRIDS[grid], often)

        def steered(size: int, times=times) -> Tensor:
            options = {"times": times, "noise": "antithetic", "dynamics": "sde", "memory": None}
            return steer(X, reward, size, n=4, **options, generator=rng(0))[0]

        mean, var = impulse_moments(monkeypatch, steered, len(times) - 1)
        assert mean == pytest.approx(float(tilted.mean), abs=1e-9)
        errors.append(abs(var + mean**2 - second))
        sizes.append(len(times) - 1)
    assert slope(sizes, errors) == pytest.approx(-1, abs=0.15)
    assert errors[-1] < 0.02 * second

    def half(size: int) -> Tensor:
        def drift(t: float, x: Tensor) -> Tensor:
            return (p1.drift(t, x) + tilted.drift(t, x)) / 2

        return integrate(drift, torch.randn((size, 1)), times, dynamics="sde")

    mean, var = impulse_moments(monkeypatch, half, len(times) - 1)
    assert abs(var + mean**2 - second) > 3 * errors[-1]


@pytest.mark.parametrize("grid", GRIDS)
def test_the_integrators_have_their_order_on_a_mixture(grid):
    """A two-component p* in two dimensions, its exact drift, against an eighth-order solve from the same noise."""
    tilted = random_mixture(2, 2, seed=3).tilt(pull())
    start = randn(20, 2, seed=1)
    exact = ExactFlowMap(tilted)(0.0, 1.0, start, 0.0, 0 * start)
    for dynamics, order in (("ode", 1), ("midpoint", 2)):
        grids = [halved(GRIDS[grid], often) for often in (3, 4, 5)]
        errors = [float((integrate(tilted.drift, start, times, dynamics=dynamics) - exact).norm()) for times in grids]
        assert slope([len(times) for times in grids], errors) == pytest.approx(-order, abs=0.2 * order)


def test_a_second_order_step_is_worth_its_second_evaluation():
    """At the same number of evaluations the midpoint rule is ten times nearer than Euler's."""
    p1 = normal(1.5)
    reward = GaussianLikelihood(torch.ones(1, dtype=torch.float64), 1.0, 0.6)
    X, start = ExactFlowMap(p1), torch.randn((20, 1), generator=rng(0), dtype=torch.float64)
    exact = ExactFlowMap(p1.tilt(reward))(0.0, 1.0, start, 0.0, 0 * start)
    errors = []
    for dynamics, steps in (("ode", 64), ("midpoint", 32)):
        end, cost = steer(X, reward, 20, n=4, steps=steps, noise="antithetic", dynamics=dynamics, generator=rng(0))
        assert cost.evaluations == evaluations("controlled", 64, n=4)
        errors.append(float((end - exact).norm()))
    assert errors[1] < errors[0] / 10


# ---- what it costs -------------------------------------------------------------------------------------


def growing(t: float) -> int:
    """More draws late than early."""
    return 1 + int(4 * t)


@pytest.mark.parametrize("X", MAPS)
@pytest.mark.parametrize("n", [1, 4, growing], ids=["1", "4", "of t"])
@pytest.mark.parametrize("dynamics", DYNAMICS)
@pytest.mark.parametrize("method", [*METHODS, "dps"])
def test_the_cost_counted_is_the_formulas(method, dynamics, n, X):
    """Forward and backward passes of map and reward, row by row, on the oracle and on a network."""
    times = [0.0, 0.2, 0.5, 0.6, 1.0]
    samples, cost = steer(MAPS[X](), pull(), 3, n=n, times=times, method=method, dynamics=dynamics, generator=rng(0))
    assert samples.shape == (3, 2)
    starts = times[:-1]
    if dynamics == "midpoint":
        starts = starts + [(a + b) / 2 for a, b in pairwise(times)]
    per_step = [n(t) if callable(n) else n for t in starts]
    assert cost.evaluations == sum(evaluations(method, 1, n=draws) for draws in per_step)
    if not callable(n):
        assert cost.evaluations == evaluations(method, len(starts), n=n)
    drawn = 0 if method == "dps" else 3 * sum(per_step)
    drifts = 3 * len(starts)
    assert cost.map_forward == drifts + drawn
    assert cost.reward_forward == (drifts if method == "dps" else drawn)
    assert cost.map_backward == cost.reward_backward == {"stein": 0, "dps": drifts}.get(method, drawn)
    assert cost.samples == 3
    assert cost.seconds > 0
    assert cost.peak_memory > 0


# ---- chunks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("max_rows", [1, 3, 7])
def test_chunks_do_not_change_the_result(method, max_rows):
    """Times for each row and labels among the arguments: every chunk keeps its own; to rounding."""
    X, x = network(n_classes=3), randn(5, 2, seed=1)
    t, y = torch.linspace(0, 0.9, 5, dtype=torch.float64), torch.tensor([0, 2, 1, 1, 3])
    at_once, chunked = (
        doob_drift(X, pull(), t, x, 4, method, y=y, generator=rng(0), max_rows=rows) for rows in (None, max_rows)
    )
    assert_close(chunked, at_once, 1e-12, 1 + at_once.abs().max())
    unlabelled = doob_drift(X, pull(), t, x, 4, method, generator=rng(0), max_rows=max_rows)
    assert float((unlabelled - at_once).abs().max()) > 1e-4  # the labels matter to this network


@pytest.mark.parametrize("method", METHODS)
def test_a_memory_budget_does_not_change_the_samples(method):
    """Budgets of one row, of a few, of any number: the same samples at the same cost."""
    X, y = network(n_classes=3), torch.tensor([0, 2, 1, 1, 3])
    row = 1e9 / rows_within(1e9, X, pull(), y=y)
    options = {"n": 4, "steps": 3, "method": method, "dynamics": "sde", "y": y}
    whole, cost = steer(X, pull(), 5, **options, memory=None, generator=rng(0))
    for memory in (1.0, 5.5 * row, 4e9):
        samples, again = steer(X, pull(), 5, **options, memory=memory, generator=rng(0))
        assert_close(samples, whole, 1e-11, 1 + whole.abs().max())
        assert again.evaluations == cost.evaluations


class Saved:
    """Bytes that graphs hold for their backward passes, each storage once: now, and at most."""

    def __init__(self):
        self.held: dict[int, list[int]] = {}  # of each storage: how many tensors, how many bytes
        self.peak = 0

    def pack(self, tensor: Tensor) -> "Kept":
        storage = tensor.untyped_storage()
        entry = self.held.setdefault(storage.data_ptr(), [0, storage.nbytes()])
        entry[0] += 1
        self.peak = max(self.peak, sum(size for _, size in self.held.values()))
        return Kept(self, tensor)


class Kept:
    """One tensor that a graph holds."""

    def __init__(self, saved: Saved, tensor: Tensor):
        self.saved, self.tensor = saved, tensor

    def __del__(self):
        pointer = self.tensor.untyped_storage().data_ptr()
        self.saved.held[pointer][0] -= 1
        if not self.saved.held[pointer][0]:
            del self.saved.held[pointer]


def saved_at_most(run) -> tuple[int, object]:
    """Peak of the bytes saved for backward passes while `run` runs, and its result."""
    saved = Saved()
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda kept: kept.tensor):
        result = run()
    assert not saved.held  # nothing is left
    return saved.peak, result


@pytest.mark.parametrize("method", ["gradient", "controlled"])
def test_chunks_bound_what_graphs_hold(method):
    """Counted at the tensors themselves: 6 rows at once hold at most 6/96 of 96 rows' bytes, beyond the weights."""
    X, x = network(hidden=64, depth=3), randn(12, 2, seed=1)
    weights = sum(p.nbytes for p in X.parameters()) + sum(b.nbytes for b in X.buffers())

    def peak(max_rows: int | None) -> int:
        return saved_at_most(lambda: doob_drift(X, pull(), 0.4, x, 8, method, max_rows=max_rows))[0]

    whole, some, one = peak(None), peak(6), peak(1)
    assert whole > 20 * weights / 10 > weights  # the test measures rows, not weights
    assert some - weights < 1.1 * 6 / 96 * whole
    assert one - weights < 1.5 * 1 / 96 * whole
    budget = 6.5 * (whole - weights) / 96
    rows = rows_within(budget, X, pull())
    assert 3 <= rows <= 12
    assert peak(rows) - weights < 2 * budget


@pytest.mark.parametrize("width", [16, 128])
@pytest.mark.parametrize("labelled", [False, True])
def test_rows_within_is_right_for_an_mlp_and_linear_in_the_memory(width, labelled):
    """Against the activations that 100 rows' graph holds, within a factor of 2; weights count for none of them."""
    X = network(n_classes=3 if labelled else 0, dtype=torch.float32, hidden=width, depth=4)
    y = torch.tensor([2] * 100) if labelled else None
    x, noise = torch.randn((2, 100, 2), generator=rng(1))

    def graph_of(rows: int):
        leaf = (0.5 * x[:rows]).requires_grad_()
        labels = None if y is None else y[:rows]
        return lambda: pull()(X.from_tx(0.0, 1.0, noise[:rows], 0.5, leaf, labels))

    def held(rows: int) -> int:
        saved = Saved()
        with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda kept: kept.tensor):
            r = graph_of(rows)()
            now = sum(size for _, size in saved.held.values())
        del r
        return now

    per_row = (held(100) - held(1)) / 99
    for memory in (1e6, 1e7, 1e8):
        rows = rows_within(memory, X, pull(), y=y)
        assert memory / per_row / 2 < rows < 2 * memory / per_row
        assert rows_within(10 * memory, X, pull(), y=y) == pytest.approx(10 * rows, abs=10)
    assert rows_within(1.0, X, pull(), y=y) == 1  # there is no less
    assert rows_within(1e8, X, None, y=y) >= rows_within(1e8, X, pull(), y=y)


@pytest.mark.parametrize("method", METHODS)
def test_a_draw_in_more_steps_takes_as_many_times_the_memory(method, monkeypatch):
    """Weights count for none; and `steer` asks for the rows of the steps that it makes."""
    X, asked = network(hidden=64, depth=3), []
    rows = [rows_within(1e8, X, pull(), steps=steps) for steps in (1, 2, 5)]
    assert rows[0] / rows[1] == pytest.approx(2, rel=0.15) and rows[0] / rows[2] == pytest.approx(5, rel=0.15)

    def noted(*arguments, **options):
        asked.append(rows_within(*arguments, **options))
        return asked[-1]

    monkeypatch.setattr(steering, "rows_within", noted)
    for steps in (1, 5):
        steer(X, pull(), 2, n=2, steps=2, method=method, posterior_steps=steps, memory=1e8, generator=rng(0))
    assert asked[0] / asked[1] == pytest.approx(5, rel=0.15)
    with pytest.raises(ValueError, match="steps must be an integer >= 1, got 0"):
        rows_within(1e8, X, pull(), steps=0)


@pytest.mark.parametrize("memory", [0, -1.0, math.nan])
def test_a_budget_that_is_not_positive_is_refused(memory):
    with pytest.raises(ValueError, match="memory must be positive"):
        rows_within(memory, network(), pull())
    with pytest.raises(ValueError, match="memory must be positive"):
        steer(network(), pull(), 2, n=2, steps=2, memory=memory)


# ---- rescaling, labels, generators -----------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("t", [0.0, 0.3, 0.9])
def test_rescaled_guidance_has_the_norm_of_the_drift(method, t):
    """b + ‖b‖ g/‖g‖, row by row, for any size of the reward."""
    X, x = ExactFlowMap(gaussian()), randn(2, 2, seed=1)  # B = D
    b = unconditional_drift(X, t, x)
    eps = randn(8, 2, 2, seed=2)
    added = doob_drift(X, pull(), t, x, 8, method, rescale=True, eps=eps) - b
    g = guidance(X, pull(), t, x, 8, method, eps=eps)
    assert_close(added.norm(dim=1), b.norm(dim=1), 1e-9, 1 + b.norm())
    assert_close(torch.cosine_similarity(added, g), torch.ones(2, dtype=torch.float64), 1e-9)


def test_rescaled_guidance_of_images_and_of_no_reward():
    X = MapOf(lambda s, u, z, t, x, y: z + (u - s) * (1 + t * x), (1, 2, 2))
    x = randn(3, 1, 2, 2, seed=1)
    b = unconditional_drift(X, 0.5, x)
    added = doob_drift(X, lambda x1: x1.flatten(1).sum(1), 0.5, x, 4, "gradient", rescale=True) - b
    assert_close(added.flatten(1).norm(dim=1), b.flatten(1).norm(dim=1), 1e-9, 10.0)
    flat = doob_drift(X, lambda x1: 0 * x1.flatten(1).sum(1), 0.5, x, 4, "gradient", rescale=True)
    assert_close(flat, b, 1e-12, 10.0)  # no direction: no guidance


def test_steering_by_rescaled_guidance_runs_and_differs():
    X = ExactFlowMap(gaussian())
    plain, rescaled = (steer(X, pull(), 3, n=4, steps=4, rescale=r, generator=rng(0))[0] for r in (False, True))
    assert float((plain - rescaled).abs().max()) > 0.01


@pytest.mark.parametrize("method", [*METHODS, "dps"])
def test_labels_reach_every_evaluation_and_states_keep_their_shape(method):
    """A map that keeps the labels it is called with: those of the batch, or draw by draw, or of one row."""
    y, seen = torch.tensor([2, 0, 1]), []

    def by_label(s, u, z, t, x, y):
        seen.append(tuple(y.tolist()))
        return z + (u - s) * (y.reshape(-1, 1, 1) + 0.1 * x)

    X = MapOf(by_label, (2, 2))
    X.reads_tx, X.from_tx, X.velocity_from_tx = True, X.__call__, X.velocity
    drawn, _ = steer(
        X, lambda x1: x1.sum((1, 2)), 3, n=2, times=[0.0, 0.1, 1.0], method=method, y=y, generator=rng(0), memory=None
    )
    assert drawn.shape == (3, 2, 2)
    assert set(seen) == {(2, 0, 1)} if method == "dps" else {(2, 0, 1), (2, 0, 1, 2, 0, 1)}


@pytest.mark.parametrize("noise", ["independent", "antithetic", "sobol"])
@pytest.mark.parametrize("dynamics", DYNAMICS)
def test_a_generator_decides_steering(dynamics, noise):
    X = ExactFlowMap(gaussian())
    options = {"n": 3, "steps": 4, "dynamics": dynamics, "noise": noise}
    one, same, other = (steer(X, pull(), 3, **options, generator=rng(k))[0] for k in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.allclose(one, other)


def test_steering_takes_a_black_box_by_stein_alone():
    def black_box(x1: Tensor) -> Tensor:
        return torch.from_numpy(-((2.0 - x1.detach().numpy() @ PULL.numpy()) ** 2))

    def counted_black_box(x1: Tensor) -> Tensor:
        assert not x1.requires_grad  # `.numpy()` of it works without `.detach()`
        return black_box(x1)

    X = ExactFlowMap(gaussian())
    samples, cost = steer(X, counted_black_box, 3, n=4, steps=3, method="stein", generator=rng(0))
    assert samples.shape == (3, 2)
    assert cost.reward_backward == 0
    for method in ("gradient", "controlled", "dps"):
        with pytest.raises(ValueError, match=r"^step 1 of 3, at t = 0: this needs a differentiable reward"):
            steer(X, black_box, 3, n=4, steps=3, method=method)


# ---- one generator for each sample -----------------------------------------------------------------------


@given(
    method=st.sampled_from([*METHODS, "dps"]),
    noise=st.sampled_from(["independent", "antithetic", "sobol"]),
    dynamics=st.sampled_from(DYNAMICS),
    max_rows=st.none() | st.integers(1, 7),
    part=st.permutations(range(5)),
    size=st.integers(1, 5),
    seed=SEEDS,
)
def test_a_sample_depends_on_its_own_generator_alone(method, noise, dynamics, max_rows, part, size, seed):
    """Any part of the samples, in any order and in chunks of any size, is that part of all of them: to rounding."""
    X, part = ExactFlowMap(random_mixture(2, 1, seed)), part[:size]
    options = {"n": 3, "steps": 3, "method": method, "noise": noise, "dynamics": dynamics}
    whole, _ = steer(X, pull(), 5, generator=[rng(seed + i) for i in range(5)], **options)
    some, _ = steer(X, pull(), size, generator=[rng(seed + i) for i in part], max_rows=max_rows, **options)
    assert_close(some, whole[part], 1e-9, 1 + whole.abs().max())


def test_one_generator_for_all_samples_does_depend_on_the_batch():
    """What the test above would see."""
    X, options = ExactFlowMap(gaussian()), {"n": 3, "steps": 3}
    whole, some = (steer(X, pull(), n, generator=rng(0), **options)[0] for n in (5, 3))
    assert float((some - whole[:3]).abs().max()) > 0.01


@pytest.mark.parametrize("dynamics", ["ode", "sde"])
def test_generators_of_samples_steer_to_the_tilted_law(dynamics):
    """Neighbouring seeds, as scripts give to neighbouring samples."""
    p1, reward = gaussian(), pull(0.6)
    tilted, options = p1.tilt(reward), {"n": 32, "steps": 64, "dynamics": dynamics}
    found, _ = steer(ExactFlowMap(p1), reward, 300, generator=[rng(i) for i in range(300)], **options)
    assert moment_scores(found, tilted.mean, tilted.cov) < LIMIT
    assert moment_scores(found, p1.mean, p1.cov) > LIMIT


# ---- guidance from a later time on -----------------------------------------------------------------------


@given(
    dim=st.integers(1, 4),
    guide_from=st.sampled_from([0.0, 0.05, 0.25, 0.5, 1.0]),
    method=st.sampled_from(["gradient", "dps"]),
    dynamics=st.sampled_from(["ode", "midpoint"]),
    reads_x=st.booleans(),
    max_rows=st.none() | st.integers(1, 5),
    seed=SEEDS,
)
def test_guidance_from_a_later_time_is_the_base_flow_and_then_the_tilted_one(
    dim, guide_from, method, dynamics, reads_x, max_rows, seed
):
    """A linear reward of a Gaussian has no noise in its gradient: the path is along b, then along b* of p*, exactly."""
    p1 = random_mixture(dim, 1, seed)
    reward, start, times = LinearReward(randn(dim, seed=seed)), randn(3, dim, seed=seed + 1), time_grid(8)
    if reads_x and guide_from == 0:
        guide_from = 0.01  # all of the steps but the first
    X = (ReadsX if reads_x else ExactFlowMap)(p1)
    tilted, guided = p1.tilt(reward), []

    def drift(t: float, x: Tensor) -> Tensor:
        guided.append(t >= guide_from)
        return (tilted if guided[-1] else p1).drift(t, x)

    expected = integrate(drift, start, times, dynamics=dynamics)
    options = {"n": 2, "times": times, "method": method, "dynamics": dynamics, "guide_from": guide_from}
    found, cost = steer(X, reward, 3, x0=start, max_rows=max_rows, generator=rng(seed), **options)
    assert_close(found, expected, 1e-8, 1 + expected.abs().max())
    assert cost.evaluations == evaluations(method, len(guided), n=2, guided=sum(guided))


def test_a_map_that_reads_x_is_steered_to_the_tilted_law_from_any_time_above_zero():
    """The drift of the first step alone is missing; from the middle on it is too late."""
    p1, reward = gaussian(), pull(0.6)
    X, tilted = ReadsX(p1), p1.tilt(reward)

    def score(guide_from: float) -> Tensor:
        options = {"n": 32, "steps": 64, "method": "gradient", "guide_from": guide_from, "generator": rng(0)}
        found, _ = steer(X, reward, 1_000, **options)
        return moment_scores(found, tilted.mean, tilted.cov)

    assert score(1e-3) < LIMIT < score(0.5)


@pytest.mark.parametrize("method", METHODS)
def test_two_evaluations_a_draw_are_in_the_formula(method):
    X = ExactFlowMap(gaussian())
    options = {"n": 4, "steps": 5, "method": method, "posterior_steps": 3, "guide_from": 0.5}
    _, cost = steer(X, pull(), 2, generator=rng(0), **options)
    assert cost.evaluations == evaluations(method, 5, n=4, guided=2, posterior_steps=3)


# ---- errors that name the step -------------------------------------------------------------------------

BAD_REWARDS = {
    "wrong shape": (lambda x1: x1, "one number per sample"),
    "scalar": (lambda x1: x1.sum(), "one number per sample"),
    "not a tensor": (lambda x1: 0.0, "got float"),
    "numpy": (lambda x1: np.zeros(len(x1)), "got ndarray"),
    "NaN": (lambda x1: x1.sum(-1) * math.nan, "the reward must be finite"),
    "one infinity": (lambda x1: x1.sum(-1) + torch.tensor([math.inf] + [0.0] * (len(x1) - 1)), "must be finite, got 1"),
    "coupled": (lambda x1: x1.sum(-1) - x1.sum(-1).mean(), "must not depend on the other samples of a batch"),
    "of another batch": (lambda x1: torch.zeros(5), "one number per sample"),
}


@pytest.mark.parametrize("kind", BAD_REWARDS)
@pytest.mark.parametrize("method", [*METHODS, "dps"])
def test_rewards_that_do_not_fit_are_refused_at_their_step(kind, method):
    reward, match = BAD_REWARDS[kind]
    X = ExactFlowMap(gaussian())
    # All means of the posteriors are equal at t = 0, where a coupling leaves no trace.
    step = "2 of 2, at t = 0.5" if (kind, method) == ("coupled", "dps") else "1 of 2, at t = 0"
    for memory in (None, 4e9):
        with pytest.raises(ValueError, match=f"^step {step}: .*{match}"):
            steer(X, reward, 2, n=2, steps=2, method=method, memory=memory)  # B = D: (B, D) is not mistaken for (B,)


class FailingAt:
    """A reward that is right until the call with the number `call`, and does `failure` from then on.

    Calls of one row, which look for coupling, do not count.
    """

    def __init__(self, call: int, failure):
        self.call, self.failure, self.calls = call, failure, 0

    def __call__(self, x1: Tensor) -> Tensor:
        self.calls += len(x1) > 1
        r = x1.sum(-1)
        return r if self.calls < self.call else self.failure(r)


def wrong_type(r: Tensor) -> Tensor:
    raise TypeError("an image was expected")


@pytest.mark.parametrize("method", [*METHODS, "dps"])
@pytest.mark.parametrize(
    ("failure", "match"),
    [
        (wrong_type, r"this one raised TypeError: an image was expected"),
        (lambda r: r * math.nan, "the reward must be finite, got . NaN"),
        (lambda r: r.unsqueeze(-1), "one number per sample"),
    ],
    ids=["TypeError", "NaN", "shape"],
)
def test_a_reward_that_fails_on_the_way_names_the_step(method, failure, match):
    """One call a step, of all rows; the rest of the steps is not taken."""
    reward = FailingAt(3, failure)
    with pytest.raises(ValueError, match=rf"^step 3 of 5, at t = 0\.4: .*{match}"):
        steer(ExactFlowMap(gaussian()), reward, 2, n=2, steps=5, method=method, memory=None)
    assert reward.calls == 3


def test_a_reward_without_memory_is_no_reward_that_fails():
    """Running out of memory stays what it is, with the step in a note."""

    def greedy(r: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("no more")

    with pytest.raises(torch.OutOfMemoryError) as caught:
        steer(ExactFlowMap(gaussian()), FailingAt(3, greedy), 2, n=2, steps=5, memory=None)
    assert caught.value.__notes__ == ["step 3 of 5, at t = 0.4"]


def test_a_reward_need_not_be_defined_everywhere():
    """−∞ at the origin, where no sample is: the measurement of memory must not ask for it."""
    samples, _ = steer(
        ExactFlowMap(normal(1.0)), lambda x1: x1.abs().log().sum(-1) / 4, 4, n=4, steps=4, generator=rng(0)
    )
    assert torch.isfinite(samples).all()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"n_samples": 0}, "n_samples must be an integer >= 1"),
        ({"n": 0}, "n must be an integer >= 1"),
        ({"n": lambda t: 0}, "^step 1 of 2, at t = 0: n must be an integer >= 1"),
        ({"n": lambda t: 2 if t < 0.5 else 2.0}, r"^step 2 of 2, at t = 0\.5: n must be an integer >= 1"),
        ({"steps": 0}, "steps must be an integer >= 1"),
        ({"times": [0.0, 0.5]}, "rise strictly from 0 to 1"),
        ({"times": [0.0, 0.7, 0.5, 1.0]}, "rise strictly from 0 to 1"),
        ({"times": [0.1, 1.0]}, "rise strictly from 0 to 1"),
        ({"times": []}, "rise strictly from 0 to 1"),
        ({"method": "Stein"}, "method must be one of controlled, gradient, stein or .dps.*got 'Stein'"),
        ({"method": "dps", "rescale": True}, "rescale must be False"),
        ({"dynamics": "heun"}, "dynamics must be one of ode, midpoint, sde, got 'heun'"),
        ({"noise": "halton"}, "noise must be"),
        ({"guide_from": 1.5}, r"guide_from must lie in \[0, 1\], got 1.5"),
        ({"max_rows": 0}, "max_rows must be an integer >= 1, got 0"),
    ],
)
def test_steer_refuses(change, match):
    arguments = {"n_samples": 2, "n": 2, "steps": 2} | change
    with pytest.raises(ValueError, match=match):
        steer(ExactFlowMap(gaussian()), pull(), arguments.pop("n_samples"), **arguments)


def test_a_map_that_reads_x_is_named_at_the_first_step():
    X = MapOf(lambda s, u, z, t, x, y: z + (u - s) * (x - z), (2,))
    with pytest.raises(ValueError, match=r"^step 1 of 2, at t = 0: differentiating a map that reads x"):
        steer(X, pull(), 2, n=2, steps=2)


# ---- grids -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 7, 50])
def test_the_log_snr_grid_is_uniform_in_it(steps):
    grid = log_snr_grid(steps, limit=8.0)
    assert (grid[0], grid[-1], len(grid)) == (0.0, 1.0, steps + 1)
    levels = [2 * math.log(t / (1 - t)) for t in grid[1:-1]]
    assert levels == pytest.approx([16 * k / steps - 8 for k in range(1, steps)])


@pytest.mark.parametrize(
    ("grid", "match"),
    [
        (lambda: log_snr_grid(0), "steps must be an integer >= 1"),
        (lambda: log_snr_grid(2.0), "steps must be an integer >= 1"),
        (lambda: log_snr_grid(4, limit=0.0), "limit must be positive and finite, got 0.0"),
        (lambda: log_snr_grid(4, limit=math.inf), "limit must be positive and finite"),
        (lambda: log_snr_grid(4, limit=math.nan), "limit must be positive and finite"),
        (lambda: time_grid(0), "steps must be an integer >= 1"),
        (lambda: time_grid(4, power=0.0), "power must be positive and finite, got 0.0"),
        (lambda: time_grid(4, power=-1.0), "power must be positive and finite"),
        (lambda: time_grid(4, power=math.nan), "power must be positive and finite"),
    ],
)
def test_grids_refuse(grid, match):
    with pytest.raises(ValueError, match=match):
        grid()


@pytest.mark.parametrize("method", ["controlled", "gradient", "stein", "dps"])
def test_a_reward_may_have_another_precision_than_the_map(method):
    X = FlowMap(MLP(torch.zeros(2), torch.eye(2), hidden=8))
    for dtype in (torch.float64, torch.bfloat16):
        x, _ = steer(X, lambda x1, dtype=dtype: x1.sum(1).to(dtype), 4, n=3, steps=3, method=method)
        assert x.dtype == torch.float32


# ---- starts, memory, checks on entry -------------------------------------------------------------------


def test_starts_and_posterior_steps_are_the_callers():
    """Given starts are what the generator would have drawn first; two steps of the exact map are one."""
    p1 = gaussian()
    X, reward = ExactFlowMap(p1), LinearReward(torch.ones(2, dtype=torch.float64))
    options = {"n": 4, "steps": 3}
    drawn, _ = steer(X, reward, 5, generator=rng(0), **options)
    source = rng(0)
    given, _ = steer(X, reward, 5, x0=randn_from(source, 5), generator=source, **options)
    assert torch.equal(given, drawn)
    twice, cost = steer(X, reward, 5, generator=rng(0), posterior_steps=2, **options)
    assert_close(twice, drawn, 1e-9, 1 + drawn.abs())
    assert cost.map_forward == 5 * (3 + 2 * 4 * 3)
    with pytest.raises(ValueError, match="x0 must have shape"):
        steer(X, reward, 5, x0=torch.zeros(4, 2, dtype=torch.float64), **options)


def randn_from(source: torch.Generator, n: int) -> Tensor:
    return torch.randn((n, 2), generator=source, dtype=torch.float64)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("max_rows", [1, 3, 8, 9, 17, 1000])
def test_estimates_by_blocks_of_states_are_the_estimates(method, max_rows):
    """n = 4 draws of 5 states: a part of one state's draws, one state, two, four, all; B = D is not special."""
    p1, eps = random_mixture(5, 1, 0), randn(4, 5, 5, seed=1)
    X, reward, x = (
        ExactFlowMap(p1),
        GaussianLikelihood(torch.ones(5, dtype=torch.float64), 1.0, 2.0),
        randn(5, 5, seed=2),
    )
    t = torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    whole = guidance(X, reward, t, x, 4, method, eps=eps)
    seen = []

    class Seen:
        def __call__(self, x1):
            seen.append(len(x1))
            return reward(x1)

    assert_close(guidance(X, Seen(), t, x, 4, method, eps=eps, max_rows=max_rows), whole, 1e-12, 1 + whole.abs())
    assert max(seen) <= max_rows
    assert sum(seen) == 20


def test_what_cannot_be_right_is_refused_before_the_first_step():
    X, reward = ExactFlowMap(gaussian()), LinearReward(torch.ones(2, dtype=torch.float64))
    for change, message in (
        ({"memory": 0.0}, "^memory must be positive"),
        ({"y": torch.zeros(3, dtype=torch.long)}, r"^labels y must have shape \(5,\), got \(3,\)"),
        ({"y": [0] * 5}, r"^labels y must have shape \(5,\)"),
        ({"method": "dps", "rescale": True}, "^rescale must be False"),
        ({"method": "mfm"}, '^method must be one of controlled, gradient, stein or "dps"'),
    ):
        with pytest.raises(ValueError, match=message):
            steer(X, reward, 5, n=2, steps=2, **change)


def test_coupling_is_seen_where_rows_come_one_at_a_time():
    """A budget of one byte makes batches of one, in which a mean over the batch says nothing."""
    X = ExactFlowMap(gaussian())
    with pytest.raises(ValueError, match="must not depend on the other samples"):
        steer(X, lambda x1: x1[:, 0] - x1[:, 0].mean(), 4, n=2, steps=2, memory=1.0)


def test_early_draws_have_their_mean_and_are_the_default():
    grid = time_grid(250)[:-1]
    for n in (4, 16, 64):
        assert sum(early_draws(n)(t) for t in grid) == n * 250
    assert [early_draws(1)(t) for t in (0.0, 0.59, 0.6, 0.99)] == [1, 1, 1, 1]
    with pytest.raises(ValueError, match="n must be an integer >= 1, got 0"):
        early_draws(0)
    X, reward = ExactFlowMap(gaussian()), LinearReward(torch.ones(2, dtype=torch.float64))
    default, cost = steer(X, reward, 3, steps=10, generator=rng(0))
    chosen, _ = steer(X, reward, 3, n=lambda t: 24 if t < 0.6 else 4, steps=10, generator=rng(0))
    assert torch.equal(default, chosen)
    assert cost.evaluations == evaluations("controlled", 10, n=16)
