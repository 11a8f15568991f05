"""The whole training loss: one batch, two halves."""

import math
from functools import partial

import pytest
import torch

from mfm_ref import (
    MLP,
    ExactFlowMap,
    FlowMap,
    RandomBatches,
    TrainConfig,
    coupled_interpolants,
    meta_flow_map_loss,
    train,
)
from mfm_ref.recipe import semigroup
from tests.helpers import LIMIT, MapOf, gaussian, moment_scores
from tests.strategies import rng


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
    assert seen == [list(range(batch // 2, batch))] * (len(seen) - 1) + [list(range(batch))]


@pytest.mark.parametrize("with_drift", [False, True])
def test_batches_hold_two_independent_noises_of_one_clean_sample(with_drift):
    """E9 read off the model's own arguments: with x₁ = c, (x − t c)/(1−t) and (z − s c)/(1−s) are independent normals.

    Both halves; means, squares and products of 5,000 rows, 6e-7 each. The last call is that of the whole batch.
    """
    p1, clean, calls = gaussian(1), 3.0, []

    def spy(s, u, z, t, x, y=None):
        calls.append([torch.as_tensor(a).flatten() for a in (s, u, z, t, x)])
        return z

    X = MapOf(None, (1,))
    X.velocity = spy
    x1 = torch.full((10_000, 1), clean, dtype=torch.float64)
    meta_flow_map_loss(X, x1, drift=p1.drift if with_drift else None, generator=rng(0))
    diagonal, jump = zip(*(a.split(5_000) for a in calls[-1]), strict=True)
    assert torch.equal(diagonal[0], diagonal[1])
    assert (jump[0] <= jump[1]).all()
    for s, _, z, t, x in (diagonal, jump):
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

    assert loss(oracle, p1.drift, consistency=partial(semigroup, step=0.05)) < 1e-7
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
    drift = p1.to(torch.float32).drift if teacher else None
    x1 = p1.sample(20_000, generator=rng(5)).float()

    def error(X):
        t = 0.6 * torch.rand(500, generator=rng(1))
        x, eps, _ = coupled_interpolants(x1[:500], 0.0, t, generator=rng(2))
        exact = ExactFlowMap(p1)(0.0, 1.0, eps.double(), t.double(), x.double())
        return (X(0.0, 1.0, eps, t, x) - exact).detach().square().mean()

    def loss(X, batch, generator):
        return meta_flow_map_loss(X, batch, drift=drift, generator=generator)

    before = error(model)
    data = RandomBatches(lambda g: x1[torch.randint(len(x1), (512,), generator=g)], rng(0))
    average, history = train(model, loss, data, TrainConfig(steps=100, lr=5e-3, warmup=10, decay=0.9))
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
