"""MFM-Search (E21): against a plain transcription, in law where nothing or everything is chosen, and in cost."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mfm_ref import ExactFlowMap, LinearReward
from mfm_ref.cost import evaluations
from mfm_ref.sampling import time_grid
from mfm_ref.search import search
from tests.helpers import MapOf, line, line_cdf
from tests.strategies import SEEDS, assert_close, randn, random_mixture, rng
from tests.test_sampling import P_LIMIT, ks_p_value

SELECT, TRANSITION = st.sampled_from(["all", "particle"]), st.sampled_from(["stochastic", "deterministic"])


def constant(x1):
    return x1.new_zeros(len(x1))


def plain_search(X, reward, n_samples, m, n, grid, select, transition, g):
    """E21, one search, one particle and one sample at a time; the noises are drawn as `search` draws them."""
    x = randn_from(g, m, n_samples, *X.shape)
    for t, t_next in pairwise(grid):
        eps = randn_from(g, n, m, n_samples, *X.shape)
        fresh = randn_from(g, m, n_samples, *X.shape) if transition == "stochastic" and t_next < 1 else None
        results = []
        for b in range(n_samples):
            found = []
            for i in range(m):
                for j in range(n):
                    draw = X(0.0, 1.0, eps[j, i, b : b + 1], t, x[i, b : b + 1])
                    found.append((float(reward(draw)), i, draw[0]))
            results.append(max(found, key=lambda f: f[0])[2])
            for i in range(m):
                own = found if select == "all" else [f for f in found if f[1] == i]
                x1 = max(own, key=lambda f: f[0])[2]
                if t_next < 1:
                    x0 = (x[i, b] - t * x1) / (1 - t) if fresh is None else fresh[i, b]
                    x[i, b] = (1 - t_next) * x0 + t_next * x1
    return torch.stack(results)


def randn_from(g, *shape):
    return torch.randn(shape, generator=g, dtype=torch.float64)


# ---- the algorithm -------------------------------------------------------------------------------------


@given(
    n_samples=st.integers(1, 3),
    m=st.integers(1, 3),
    n=st.integers(1, 3),
    steps=st.integers(1, 4),
    select=SELECT,
    transition=TRANSITION,
    max_rows=st.none() | st.integers(1, 5),
    seed=SEEDS,
)
def test_search_is_the_plain_loop_at_its_formulas_cost(n_samples, m, n, steps, select, transition, max_rows, seed):
    """Every choice of selection and transition, in chunks of any size; 2MNK evaluations."""
    X, reward = ExactFlowMap(random_mixture(2, 1, seed)), LinearReward(randn(2, seed=seed))
    found, cost = search(
        X,
        reward,
        n_samples,
        particles=m,
        n=n,
        steps=steps,
        select=select,
        transition=transition,
        max_rows=max_rows,
        generator=rng(seed),
    )
    expected = plain_search(X, reward, n_samples, m, n, time_grid(steps, power=2.5), select, transition, rng(seed))
    assert_close(found, expected, 1e-10, 1 + expected.abs().max())
    assert cost.evaluations == evaluations("search", steps, n=n, m=m) == 2 * m * n * steps
    assert cost.map_backward == cost.reward_backward == 0


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        ({"select": "particle"}, {"select": "all"}),
        ({"select": "all"}, {"select": "particle"}),
        ({"transition": "deterministic"}, {"transition": "stochastic"}),
        ({"times": time_grid(3)}, {"times": time_grid(3, power=2.5)}),
    ],
)
def test_the_choices_differ(change, wrong):
    """What the transcription above is to tell apart is apart."""
    X, reward = ExactFlowMap(random_mixture(2, 1, 0)), LinearReward(randn(2, seed=0))
    a, b = (search(X, reward, 4, particles=3, n=2, steps=3, generator=rng(0), **c)[0] for c in (change, wrong))
    assert (a - b).abs().max() > 0.01


@given(
    m=st.integers(1, 3),
    n=st.integers(1, 3),
    select=SELECT,
    transition=TRANSITION,
    max_rows=st.none() | st.integers(1, 5),
    part=st.permutations(range(4)),
    size=st.integers(1, 4),
    seed=SEEDS,
)
def test_a_search_depends_on_its_own_generator_alone(m, n, select, transition, max_rows, part, size, seed):
    """Any part of the searches, in any order and in chunks, is that part of all; with one generator it is not."""
    X, reward, part = ExactFlowMap(random_mixture(2, 1, seed)), LinearReward(randn(2, seed=seed)), part[:size]
    options = {"particles": m, "n": n, "steps": 3, "select": select, "transition": transition}
    whole, _ = search(X, reward, 4, generator=[rng(seed + i) for i in range(4)], **options)
    some, _ = search(X, reward, size, generator=[rng(seed + i) for i in part], max_rows=max_rows, **options)
    assert_close(some, whole[part], 1e-9, 1 + whole.abs().max())
    alone, _ = search(X, reward, 1, generator=rng(seed + part[0]), **options)
    assert_close(alone, some[:1], 1e-9, 1 + whole.abs().max())
    shared, _ = search(X, reward, 4, generator=rng(seed), **options)
    assert size == 4 or float((shared[:size] - whole[:size]).abs().max()) > 0


# ---- laws ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transition", ["stochastic", "deterministic"])
def test_without_a_choice_the_law_is_p1(transition):
    """M = N = 1 (E19): fresh noise and the implied one, a draw of the noise given x, both leave the law alone.

    Kolmogorov–Smirnov, false-alarm rate 1e-6; a choice of one in two by a real reward fails the same test.
    """
    p1 = line()
    settings = {"particles": 1, "steps": 3, "transition": transition, "generator": rng(1)}
    kept, _ = search(ExactFlowMap(p1), constant, 8_000, n=1, **settings)
    assert ks_p_value(kept, line_cdf(p1)) > P_LIMIT
    chosen, _ = search(ExactFlowMap(p1), lambda x: x[:, 0], 8_000, n=2, **settings)
    assert ks_p_value(chosen, line_cdf(p1)) < P_LIMIT


@pytest.mark.parametrize("select", ["all", "particle"])
def test_one_step_is_best_of_all_samples(select):
    """K = 1: the best of M·N = 6 independent samples of p₁, with the CDF F⁶ for a rising reward; not F⁵ nor F⁷."""
    p1 = line()
    found, _ = search(
        ExactFlowMap(p1), lambda x: x[:, 0], 8_000, particles=2, n=3, steps=1, select=select, generator=rng(2)
    )
    cdf = line_cdf(p1)
    assert ks_p_value(found, lambda x: cdf(x) ** 6) > P_LIMIT
    assert ks_p_value(found, lambda x: cdf(x) ** 5) < P_LIMIT
    assert ks_p_value(found, lambda x: cdf(x) ** 7) < P_LIMIT


# ---- shapes, labels, chunks, errors --------------------------------------------------------------------


def test_states_of_any_shape_and_black_box_rewards():
    seen = []

    def record(s, u, z, t, x, y):
        seen.append(len(z))
        return z + t * x

    def reward(x1):
        return torch.from_numpy(x1.numpy().sum((1, 2)))

    arguments = {"particles": 2, "n": 3, "steps": 2, "max_rows": 7}
    found, _ = search(MapOf(record, (2, 3)), reward, 4, generator=rng(0), **arguments)
    assert found.shape == (4, 2, 3)
    assert seen == [7, 7, 7, 3] * 2
    flat, _ = search(MapOf(record, (6,)), lambda x1: x1.sum(1), 4, generator=rng(0), **arguments)
    assert_close(found.flatten(1), flat, 1e-12, 10.0)


@pytest.mark.parametrize("select", ["all", "particle"])
def test_labels_stay_with_their_search(select):
    """A map that returns the label: as many searches as particles and draws, where a transposition would hide."""
    y = torch.tensor([3, 1, 2])
    by_label = MapOf(lambda s, u, z, t, x, y: z * 0 + y.unsqueeze(-1), (2,))
    arguments = {"particles": 3, "n": 3, "steps": 3, "select": select}
    for max_rows in (None, 4):
        found, _ = search(by_label, lambda x: x[:, 0], 3, y=y, max_rows=max_rows, generator=rng(0), **arguments)
        assert found[:, 0].tolist() == [3.0, 1.0, 2.0]


def test_a_generator_repeats_the_search():
    X, reward = ExactFlowMap(random_mixture(2, 1, 0)), LinearReward(randn(2, seed=0))
    a, b, c = (search(X, reward, 3, steps=2, generator=rng(seed))[0] for seed in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def failing_at(step, failure):
    """A reward that does what `failure` does from its `step`-th batch on; a row alone only checks the coupling."""
    batches = []

    def reward(x1):
        batches.extend([0] if len(x1) > 1 else [])
        return failure(x1) if len(batches) >= step else x1[:, 0]

    return reward


def fails(x1):
    raise RuntimeError("the scorer is gone")


@pytest.mark.parametrize(
    ("reward", "match"),
    [
        (failing_at(3, fails), r"step 3 of 3, at t = 0\.\d+: a reward .* raised RuntimeError: the scorer is gone"),
        (failing_at(2, lambda x: x[:, 0] + float("nan")), r"step 2 of 3, at t = .*the reward must be finite"),
        (failing_at(2, lambda x: x), r"step 2 of 3, at t = .*one number per sample, shape \(32,\), got \(32, 2\)"),
        (lambda x: x[:, 0] - x[:, 0].mean(), r"step 1 of 3, at t = 0: a reward must not depend on the other samples"),
    ],
)
def test_a_bad_reward_is_named_with_its_step(reward, match):
    X = ExactFlowMap(random_mixture(2, 1, 0))
    with pytest.raises(ValueError, match=match):
        search(X, reward, 2, particles=4, n=4, steps=3, generator=rng(0))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"n_samples": 0}, "n_samples must be an integer >= 1"),
        ({"particles": 0}, "particles must be an integer >= 1"),
        ({"n": 1.5}, "n must be an integer >= 1"),
        ({"steps": 0}, "steps must be an integer >= 1"),
        ({"max_rows": 0}, "max_rows must be an integer >= 1"),
        ({"times": [0.0, 0.5]}, "rise strictly from 0 to 1"),
        ({"select": "best"}, 'select must be "all" or "particle", got \'best\''),
        ({"transition": "ode"}, 'transition must be "stochastic" or "deterministic"'),
    ],
)
def test_search_refuses(change, match):
    arguments = {"n_samples": 2, "steps": 2} | change
    with pytest.raises(ValueError, match=match):
        search(ExactFlowMap(random_mixture(2, 1, 0)), LinearReward(randn(2, seed=0)), **arguments)
