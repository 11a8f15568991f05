"""What a user's own network, teacher or reward must return, and what happens when it does not."""

import pytest
import torch
from torch import nn

from mfm_ref import (
    MLP,
    FlowMap,
    TrainConfig,
    denoiser_to_drift,
    denoiser_to_score,
    drift_to_denoiser,
    drift_to_score,
    finetune_loss,
    glass_drift,
    interpolate,
    meta_flow_map_loss,
    score_to_drift,
    train,
    value_gradient,
)
from mfm_ref.objectives import weighted_mean_square

EYE = torch.eye(2)
X = FlowMap(MLP(torch.zeros(2), EYE, hidden=8))
STATE = torch.ones(2, 2)  # B equal to D: the case in which broadcasting is silent

WRONG_SHAPES = [lambda z: z[:, 0], lambda z: z[:1], lambda z: z.mean(0), lambda z: z.unsqueeze(0)]


class Returning(nn.Module):
    """A network whose output is some function of z."""

    shape, reads_tx = (2,), True

    def __init__(self, output):
        super().__init__()
        self.output = output

    def velocity(self, s, u, z, t, context, y):
        return self.output(z)


@pytest.mark.parametrize("output", WRONG_SHAPES)
def test_a_network_that_returns_another_shape_is_refused(output):
    with pytest.raises(ValueError, match="same shape"):
        FlowMap(Returning(output)).velocity(0.0, 1.0, STATE, 0.5, STATE)


@pytest.mark.parametrize("output", WRONG_SHAPES)
def test_a_teacher_that_returns_another_shape_is_refused(output):
    with pytest.raises(ValueError, match="same shape"):
        glass_drift(lambda t, x: output(x), 0.5, STATE, 0.5, STATE)
    with pytest.raises(ValueError, match="same shape"):
        meta_flow_map_loss(X, STATE.repeat(2, 1), drift=lambda t, x: output(x))


def test_a_weight_that_couples_the_batch_is_refused():
    with pytest.raises(ValueError, match="same shape"):
        weighted_mean_square(STATE, lambda squared: squared.mean())


@pytest.mark.parametrize(("name", "bad"), [("data_var", 0.0), ("data_var", -1.0), ("consistency_weight", 0.0)])
def test_settings_of_the_loss_out_of_range_are_refused(name, bad):
    with pytest.raises(ValueError, match=name):
        meta_flow_map_loss(X, STATE, **{name: bad})


def test_a_reward_too_large_for_its_exponential_is_named():
    with pytest.raises(ValueError, match="log_scale"):
        finetune_loss(X.drift, X.drift, X, lambda x1: 200 + x1.sum(1), 0.5, STATE)


def test_noises_with_draws_and_batch_swapped_are_refused():
    x, swapped = torch.ones(3, 2), torch.ones(3, 5, 2)
    for method in ("gradient", "stein"):
        with pytest.raises(ValueError, match="eps must have shape"):
            finetune_loss(X.drift, X.drift, X, lambda x1: x1.sum(1), 0.5, x, n=5, method=method, eps=swapped)


def test_a_reward_cut_off_from_its_input_is_named():
    scale = torch.ones((), requires_grad=True)
    with pytest.raises(ValueError, match="differentiable reward"):
        value_gradient(X, lambda x1: scale * x1.detach().sum(1), 0.5, STATE, 3)


def test_an_integer_reward_is_allowed_without_gradients():
    gradient = value_gradient(X, lambda x1: (x1.sum(1) > 0).long(), 0.5, STATE, 3, "stein")
    assert gradient.shape == STATE.shape


@pytest.mark.parametrize("t", [[0.1, 0.2], "0.5", None, torch.ones(0)])
def test_times_that_are_no_times_are_refused(t):
    with pytest.raises(ValueError, match="number or a tensor"):
        X(0.0, 1.0, STATE, t, STATE)


def test_a_state_of_another_dtype_is_refused():
    with pytest.raises(ValueError, match="dtype"):
        X(0.0, 1.0, STATE.double(), 0.5, STATE.double())


def test_the_average_has_the_running_statistics_of_the_model():
    model = nn.BatchNorm1d(1)
    data = (5 + torch.randn(64, 1) for _ in range(200))
    average, _ = train(model, lambda m, x, rng: m(x).square().mean(), data, TrainConfig(steps=200))
    assert average.running_mean.item() == pytest.approx(5, abs=0.3)
    assert not average.training


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_the_algebra_refuses_data_that_is_not_finite(bad):
    broken = torch.tensor([[0.0, bad], [0.0, 0.0]])
    for f in (drift_to_denoiser, drift_to_score, denoiser_to_drift, denoiser_to_score, score_to_drift):
        for pair in ((broken, STATE), (STATE, broken)):
            with pytest.raises(ValueError, match="must be finite"):
                f(pair[0], 0.5, pair[1])
    with pytest.raises(ValueError, match="must be finite"):
        interpolate(broken, STATE, 0.5)
