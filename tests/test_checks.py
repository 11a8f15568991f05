"""Bad input: a ValueError that says what must hold and what came; and the valid input that looks like it."""

import math

import pytest
import torch

from mfm_ref import (
    MLP,
    ExactFlowMap,
    FlowMap,
    GaussianLikelihood,
    GaussianMixture,
    LinearReward,
    denoiser_to_drift,
    denoiser_to_score,
    drift_to_denoiser,
    drift_to_score,
    glass_drift,
    interpolate,
    noise_scale,
    score_to_denoiser,
    score_to_drift,
)
from mfm_ref.checks import check_count, check_finite, check_order, check_time, evaluate_reward, expand_time
from tests.strategies import randn, random_mixture, rng

P1 = random_mixture(2, 3, seed=0)
X_GENERAL = ExactFlowMap(P1, max_step=1.0)
NETWORK = FlowMap(MLP(torch.zeros(2), torch.eye(2), hidden=8)).double()
STATE = randn(4, 2, seed=1)  # B = 4, D = 2

CONVERSIONS = (
    drift_to_denoiser,
    drift_to_score,
    denoiser_to_drift,
    denoiser_to_score,
    score_to_drift,
    score_to_denoiser,
)

# Every function that takes a time and states, as a function of the time.
OF_A_TIME = {
    "interpolate": lambda t: interpolate(STATE, STATE, t),
    "marginal": P1.marginal,
    "posterior": lambda t: P1.posterior(t, STATE),
    "posterior_from_tx": lambda t: P1.posterior_from_tx(t, STATE),
    "denoiser": lambda t: P1.denoiser(t, STATE),
    "drift": lambda t: P1.drift(t, STATE),
    "score": lambda t: P1.score(t, STATE),
    "value": lambda t: P1.value(LinearReward(torch.ones(2)), t, STATE),
    "glass_drift, s": lambda t: glass_drift(P1.drift, t, STATE, 0.5, STATE),
    "glass_drift, t": lambda t: glass_drift(P1.drift, 0.5, STATE, t, STATE),
    "map, s": lambda t: X_GENERAL(t, 1.0, STATE, 0.5, STATE),
    "map, u": lambda t: X_GENERAL(0.0, t, STATE, 0.5, STATE),
    "map, t": lambda t: X_GENERAL(0.0, 1.0, STATE, t, STATE),
    "map from tx": lambda t: X_GENERAL.from_tx(0.0, 1.0, STATE, t, STATE),
    "velocity, s": lambda t: X_GENERAL.velocity(t, 1.0, STATE, 0.5, STATE),
    "velocity, u": lambda t: X_GENERAL.velocity(0.0, t, STATE, 0.5, STATE),
    "velocity, t": lambda t: X_GENERAL.velocity(0.0, 0.0, STATE, t, STATE),
    "velocity from tx": lambda t: X_GENERAL.velocity_from_tx(0.0, 0.0, STATE, t, STATE),
    **{f.__name__: lambda t, f=f: f(STATE, t, STATE) for f in CONVERSIONS},
}
of_a_time = pytest.mark.parametrize("f", OF_A_TIME.values(), ids=OF_A_TIME.keys())

# Every function that takes states `(B, 2)`, as a function of the state.
OF_A_STATE = {
    "log_prob": P1.log_prob,
    "posterior": lambda x: P1.posterior(0.5, x),
    "posterior_from_tx": lambda x: P1.posterior_from_tx(0.5, x),
    "denoiser": lambda x: P1.denoiser(0.5, x),
    "drift": lambda x: P1.drift(0.5, x),
    "score": lambda x: P1.score(0.5, x),
    "value": lambda x: P1.value(LinearReward(torch.ones(2)), 0.5, x),
    "map": lambda x: X_GENERAL(0.0, 1.0, x, 0.5, x),
    "map from tx": lambda x: X_GENERAL.from_tx(0.0, 1.0, x, 0.5, x),
    "velocity": lambda x: X_GENERAL.velocity(0.0, 1.0, x, 0.5, x),
    "glass": lambda x: glass_drift(P1.drift, 0.5, x, 0.5, x),
    "network's map": lambda x: NETWORK(0.0, 1.0, x, 0.5, x),
    "velocity from tx": lambda x: X_GENERAL.velocity_from_tx(0.5, 0.5, x, 0.5, x),
}
of_a_state = pytest.mark.parametrize("f", OF_A_STATE.values(), ids=OF_A_STATE.keys())


# ---- times ---------------------------------------------------------------------------------------------


@of_a_time
@pytest.mark.parametrize(
    "t",
    [-0.01, 1.01, math.nan, math.inf, torch.tensor(1.5), torch.tensor([0.5, 0.5, 0.5, -0.1]), torch.tensor(math.nan)],
    ids=str,
)
def test_times_outside_the_unit_interval_are_refused(f, t):
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\], got"):
        f(t)


@of_a_time
def test_a_nan_among_good_times_is_refused(f):
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\], got"):
        f(torch.tensor([0.5, math.nan, 0.5, 0.5]))


@of_a_time
@pytest.mark.parametrize("shape", [(2,), (3,), (1,), (4, 1), (4, 2)])
def test_times_of_another_shape_are_refused(f, shape):
    # (2,) is D: a time for each feature broadcasts without a sound.
    if f is OF_A_TIME["marginal"] and len(shape) == 1:
        assert f(torch.full(shape, 0.5)).means.shape == (*shape, 3, 2)  # no state gives a B yet
        return
    with pytest.raises(ValueError, match=r"must have shape \(\) or \((4|B),\), got"):
        f(torch.full(shape, 0.5))


@of_a_time
def test_times_of_the_contract_are_accepted(f):
    for t in (0.5, torch.tensor(0.5), torch.full((4,), 0.5), torch.full((4,), 0.5, dtype=torch.float64)):
        f(t)


def test_a_batched_mixture_refuses_times_of_another_batch():
    with pytest.raises(ValueError, match=r"time t must have shape \(\) or \(4,\), got \(2,\)"):
        P1.posterior(0.5, STATE).marginal(torch.tensor([0.1, 0.2]))


@pytest.mark.parametrize("t", [-0.1, 1.5, math.nan, torch.tensor([0.5, 2.0])])
def test_noise_scale_refuses_times_outside(t):
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
        noise_scale(t)


@pytest.mark.parametrize("f", [X_GENERAL, X_GENERAL.velocity, X_GENERAL.from_tx, X_GENERAL.velocity_from_tx])
@pytest.mark.parametrize(
    ("s", "u"),
    [(0.6, 0.5), (torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([0.1, 0.2, 0.3, 0.39])), (torch.tensor(1.0), 0.0)],
)
def test_exchanged_internal_times_are_refused(f, s, u):
    with pytest.raises(ValueError, match="must satisfy s <= u"):
        f(s, u, STATE, 0.5, STATE)


def test_the_time_that_is_wrong_is_named():
    for name, f in (("s", OF_A_TIME["glass_drift, s"]), ("t", OF_A_TIME["map, t"]), ("u", OF_A_TIME["map, u"])):
        with pytest.raises(ValueError, match=f"time {name} must"):
            f(torch.full((3,), 0.5))
        with pytest.raises(ValueError, match=f"time {name} must lie"):
            f(torch.full((4,), 1.5))


# ---- states --------------------------------------------------------------------------------------------


@of_a_state
@pytest.mark.parametrize("shape", [(4, 3), (4, 1), (2,), (4,)])
def test_states_of_another_dimension_are_refused(f, shape):
    with pytest.raises(ValueError, match=r"states must have shape \(B, 2\), got"):
        f(torch.zeros(shape))


@of_a_state
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_states_that_are_not_finite_are_refused(f, bad):
    x = STATE.clone()
    x[2, 1] = bad
    with pytest.raises(ValueError, match="must be finite, got 1 NaN or infinite entries of 8"):
        f(x)


def test_either_state_of_the_map_is_checked():
    bad = torch.full_like(STATE, math.nan)
    with pytest.raises(ValueError, match="the state z must be finite"):
        X_GENERAL(0.0, 1.0, bad, 0.5, STATE)
    with pytest.raises(ValueError, match="the context must be finite"):
        X_GENERAL(0.0, 1.0, STATE, 0.5, bad)


@pytest.mark.parametrize(
    "f",
    [
        lambda a, b: interpolate(a, b, 0.5),
        lambda a, b: glass_drift(P1.drift, 0.5, a, 0.5, b),
        lambda a, b: X_GENERAL(0.0, 1.0, a, 0.5, b),
        lambda a, b: X_GENERAL.velocity_from_tx(0.0, 1.0, a, 0.5, b),
        *(lambda a, b, f=f: f(a, 0.5, b) for f in CONVERSIONS),
    ],
)
def test_states_that_would_broadcast_are_refused(f):
    for other in (STATE[:1], STATE[0], STATE[:, :1], STATE.unsqueeze(0)):
        with pytest.raises(ValueError, match="must have the same shape"):
            f(STATE, other)
        with pytest.raises(ValueError, match="must have the same shape"):
            f(other, STATE)


def test_a_batched_mixture_refuses_states_of_another_batch():
    posterior = P1.posterior(0.5, STATE)
    assert posterior.log_prob(torch.zeros(3, 4, 2)).shape == (3, 4)  # draws of every row
    for f in (posterior.log_prob, lambda x: posterior.drift(0.5, x), lambda x: posterior.posterior(0.5, x)):
        for size in (1, 2, 3):
            with pytest.raises(ValueError, match=r"states must have shape \(4, 2\), got"):
                f(torch.zeros(size, 2))


def test_integer_states_are_refused():
    # A time in their dtype would be 0.
    x = torch.ones(4, 2, dtype=torch.long)
    for f in (lambda: interpolate(x, x, 0.5), lambda: P1.drift(0.5, x), lambda: P1.posterior(0.5, x)):
        with pytest.raises(ValueError, match=r"floating-point dtype, got shape \(4, 2\), torch\.int64"):
            f()


# ---- mixtures and the oracle ---------------------------------------------------------------------------

WEIGHTS, MEANS, COVS = torch.tensor([0.25, 0.75]), torch.zeros(2, 3), torch.eye(3).expand(2, 3, 3)


def with_entry(tensor, index, value):
    """A copy of a tensor with one entry changed."""
    changed = tensor.clone()
    changed[index] = value
    return changed


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ((torch.tensor([0.5, 0.6]), MEANS, COVS), "sum to one"),
        ((torch.tensor([0.5, 0.499]), MEANS, COVS), "sum to one"),
        ((torch.tensor([1.0, 0.0]), MEANS, COVS), "weights must be positive"),
        ((torch.tensor([1.5, -0.5]), MEANS, COVS), "weights must be positive"),
        ((torch.tensor([0.5, math.nan]), MEANS, COVS), "weights must be finite"),
        ((WEIGHTS, with_entry(MEANS, (1, 2), math.inf), COVS), "means must be finite"),
        ((WEIGHTS, MEANS, with_entry(COVS, (0, 1, 1), math.nan)), "covs must be finite"),
        ((WEIGHTS, MEANS, with_entry(COVS, (0, 0, 1), 0.3)), "covs must be symmetric"),
        ((WEIGHTS, MEANS, with_entry(COVS, (1, 2, 2), -1.0)), "covs must be positive definite"),
        ((WEIGHTS, MEANS, with_entry(COVS, (1, 2, 2), 0.0)), "covs must be positive definite"),
        ((torch.tensor([0.5, 0.25, 0.25]), MEANS, COVS), "need weights"),
        ((WEIGHTS.unsqueeze(0), MEANS, COVS), "need weights"),
        ((WEIGHTS, MEANS, torch.eye(2).expand(2, 2, 2)), "and covs"),
        ((WEIGHTS, MEANS, torch.eye(3)), "and covs"),
        ((WEIGHTS, MEANS, torch.ones(2, 3)), "and covs"),
        ((WEIGHTS, torch.zeros(3), COVS), r"means \(K, D\)"),
        ((torch.tensor(1.0), MEANS, COVS), r"weights must be \(K,\)"),
    ],
)
def test_a_mixture_refuses_parts_that_do_not_make_a_law(parts, message):
    with pytest.raises(ValueError, match=message):
        GaussianMixture(*parts)


def test_a_mixture_of_valid_parts():
    assert GaussianMixture(WEIGHTS, MEANS, COVS).sample(5, generator=rng(0)).shape == (5, 3)


@pytest.mark.parametrize("n", [0, -1, 2.0, "3", None])
def test_a_count_of_samples_is_a_positive_integer(n):
    with pytest.raises(ValueError, match="n must be an integer >= 1, got"):
        P1.sample(n)


@pytest.mark.parametrize("f", [X_GENERAL, X_GENERAL.velocity, X_GENERAL.from_tx, X_GENERAL.velocity_from_tx])
def test_the_oracle_has_no_labels(f):
    with pytest.raises(ValueError, match="no class labels"):
        f(0.0, 1.0, STATE, 0.5, STATE, torch.zeros(4, dtype=torch.long))


def test_the_oracle_refuses_a_batch_of_mixtures_and_steps_that_go_nowhere():
    with pytest.raises(ValueError, match="p1 must be one mixture, got a batch"):
        ExactFlowMap(P1.posterior(0.5, STATE))
    for max_step in (0.0, -0.1, math.nan):
        with pytest.raises(ValueError, match="max_step must be positive"):
            ExactFlowMap(P1, max_step=max_step)


# ---- rewards -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LinearReward(torch.ones(2, 2)), r"a must be a vector \(D,\), got"),
        (lambda: LinearReward(torch.tensor(1.0)), r"a must be a vector \(D,\), got"),
        (lambda: LinearReward(torch.tensor([1.0, math.nan])), "a must be finite"),
        (lambda: GaussianLikelihood(torch.ones(1, 2, 2), 0.0, 1.0), "a must be a vector"),
        (lambda: GaussianLikelihood(torch.tensor(1.0), 0.0, 1.0), "a must be a vector"),
        (lambda: GaussianLikelihood(torch.ones(2), torch.ones(1), 1.0), r"y must have shape \(\)"),
        (lambda: GaussianLikelihood(torch.ones(3, 2), torch.ones(2), 1.0), r"y must have shape \(3,\)"),
        (lambda: GaussianLikelihood(torch.ones(3, 2), 1.0, 1.0), r"y must have shape \(3,\)"),
        (lambda: GaussianLikelihood(torch.tensor([1.0, math.inf]), 0.0, 1.0), "a must be finite"),
        (lambda: GaussianLikelihood(torch.ones(2), math.nan, 1.0), "y must be finite"),
        (lambda: GaussianLikelihood(torch.ones(2), 0.0, 0.0), "sigma must be positive"),
        (lambda: GaussianLikelihood(torch.ones(2), 0.0, -1.0), "sigma must be positive"),
        (lambda: GaussianLikelihood(torch.ones(2), 0.0, math.nan), "sigma must be positive"),
        (lambda: GaussianLikelihood(torch.ones(2), 0.0, math.inf), "sigma must be positive and finite"),
    ],
)
def test_a_reward_refuses_arguments_that_do_not_fit(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "reward", [LinearReward(torch.ones(3)), GaussianLikelihood(torch.ones(2, 3), torch.ones(2), 1.0)]
)
def test_a_reward_of_another_dimension_is_refused(reward):
    for f in (
        reward,
        lambda x: P1.value(reward, 0.5, x),
        lambda x: P1.tilt(reward),
        lambda x: P1.log_partition(reward),
    ):
        with pytest.raises(ValueError, match="this reward needs states of dimension 3"):
            f(STATE)


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (lambda x: x, r"shape \(4,\), got \(4, 2\)"),
        (lambda x: x.sum(), r"shape \(4,\), got \(\)"),
        (lambda x: x.sum(-1, keepdim=True), r"shape \(4,\), got \(4, 1\)"),
        (lambda x: x.sum(0), r"shape \(4,\), got \(2,\)"),
        (lambda x: 1.0, r"shape \(4,\), got float"),
        (lambda x: x.sum(-1) * math.nan, "the reward must be finite, got 4"),
        (lambda x: (x[:, 0] * 0).log(), "the reward must be finite, got 4"),
    ],
)
def test_what_a_reward_returns_is_checked(reward, message):
    with pytest.raises(ValueError, match=message):
        evaluate_reward(reward, STATE)


def test_a_good_reward_is_evaluated():
    assert torch.equal(evaluate_reward(lambda x: x[:, 0], STATE), STATE[:, 0])


# ---- the checks themselves -----------------------------------------------------------------------------


def test_expanded_times_multiply_a_state():
    for shape in ((3,), (3, 3), (3, 3, 3, 3)):
        x, t = torch.ones(shape, dtype=torch.float64), torch.tensor([0.0, 0.5, 1.0])
        expanded = expand_time(t, x)
        assert expanded.shape == (3, *[1] * (len(shape) - 1))
        assert expanded.dtype == torch.float64
        for row in range(3):
            assert torch.equal((expanded * x)[row], x[row] * t[row])
        assert torch.equal(expand_time(0.5, x), torch.full_like(expanded, 0.5))
    with pytest.raises(ValueError, match="must have a batch dimension"):
        expand_time(0.5, torch.tensor(1.0))


def test_checks_pass_good_values():
    check_time(0.0)
    check_time(torch.tensor([0.0, 1.0]))
    check_order(0.5, torch.tensor([0.5, 1.0]))
    check_finite(STATE, "x")
    check_count(1, "n")
    check_count(0, "n", minimum=0)
