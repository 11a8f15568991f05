"""Training in stages, flow matching, flow map, Meta Flow Map: choices of arguments of one loss."""

import pytest
import torch

from mfm_ref import (
    MLP,
    ExactFlowMap,
    FlowMap,
    RandomBatches,
    TrainConfig,
    meta_flow_map_loss,
    train,
)
from mfm_ref.recipe import CONSISTENCY, no_context
from mfm_ref.times import context_time
from tests.helpers import LIMIT, Bent, MapOf, Watched, gaussian, moment_scores, normal, z_scores
from tests.strategies import assert_close, rng


@pytest.mark.parametrize("with_drift", [False, True])
def test_the_first_stage_is_plain_flow_matching(with_drift):
    """consistency=None, context=no_context, p = 0: a regression of v_{s,s}(Ī_s) onto x₁ − x̄₀, or onto b_s(Ī_s), each
    row in units of b's spread c/S_s with c² the data's variance. The context is noise that x₁ does not enter."""
    p1, X = gaussian(), Watched(FlowMap(Bent(0.7)))
    x1 = 5 + p1.sample(6_000, generator=rng(1))
    options = {"drift": p1.drift if with_drift else None, "data_var": 2.3, "p": 0}
    loss = meta_flow_map_loss(X, x1, consistency=None, context=no_context, **options, generator=rng(0))
    assert len(X.calls) == 1
    s, u, z, t, x = X.calls[0]
    assert torch.equal(s, u)
    assert not t.any()
    assert moment_scores(x, torch.zeros(2).double(), torch.eye(2).double()) < LIMIT
    assert abs(z_scores((x - 0) * (x1 - x1.mean(0)), 0.0)).max() < LIMIT
    target = p1.drift(s, z) if with_drift else (x1 - z) / (1 - s).unsqueeze(-1)
    v = torch.sin(0.7 * (1 + 3 * s).unsqueeze(-1) * z)
    unit = 2.3 / normal(2.3).marginal(s).cov.flatten()
    assert_close(loss.detach(), ((v - target).square().sum(1) / unit).mean(), 1e-9, loss.detach())


@pytest.mark.parametrize("name", CONSISTENCY)
def test_the_second_stage_is_an_ordinary_flow_map(name):
    """Every context is empty, and the loss does not depend on what the map does with contexts; with context_time,
    nine rows of ten have one, and it does."""
    p1 = gaussian()
    x1 = p1.sample(20, generator=rng(1))
    empty = MapOf(None, (2,))
    empty.velocity = lambda s, u, z, t, x, y=None: ExactFlowMap(p1).velocity(s, u, z, 0.0, x, y)

    def losses(context):
        return [
            meta_flow_map_loss(X, x1, consistency=name, context=context, generator=rng(0))
            for X in (ExactFlowMap(p1), empty)
        ]

    assert torch.equal(*losses(no_context))
    assert not torch.equal(*losses(context_time))
    assert not no_context(50, generator=rng(0)).any()


def test_each_stage_starts_from_the_weights_of_the_one_before():
    """Three stages of 40 steps: the first loss of a stage is the loss, on its batch and noise, of the weights that it
    was handed; below that of a fresh network, on average, wherever a stage before has trained."""
    p1 = gaussian()
    x1 = p1.sample(4_096, generator=rng(0)).float()
    stages = [
        {"consistency": None, "context": no_context},
        {"consistency": "eulerian", "context": no_context},
        {"consistency": "eulerian"},
    ]
    torch.manual_seed(0)
    model, fresh = (FlowMap(MLP(torch.zeros(2), torch.eye(2), hidden=32, depth=2)) for _ in range(2))
    for k, options in enumerate(stages):
        seen = []

        def loss(X, batch, generator, options=options, seen=seen):
            seen.append(generator.get_state())
            return meta_flow_map_loss(X, batch, drift=p1.to(torch.float32).drift, **options, generator=generator)

        handed = [a.clone() for a in model.state_dict().values()]
        data = RandomBatches(lambda g: x1[torch.randint(len(x1), (256,), generator=g)], rng(k))
        average, history = train(model, loss, data, TrainConfig(steps=40, lr=5e-3, warmup=5, decay=0.9))
        batch = x1[torch.randint(len(x1), (256,), generator=rng(k))]
        model.load_state_dict(dict(zip(model.state_dict(), handed, strict=True)))
        start = meta_flow_map_loss(
            model, batch, drift=p1.to(torch.float32).drift, **options, generator=torch.Generator().set_state(seen[0])
        )
        assert history[0] == pytest.approx(float(start.detach()), rel=1e-6)
        untrained = meta_flow_map_loss(
            fresh, batch, drift=p1.to(torch.float32).drift, **options, generator=torch.Generator().set_state(seen[0])
        )
        assert k == 0 or history[0] < 0.8 * untrained.detach()
        model.load_state_dict(average.state_dict())
