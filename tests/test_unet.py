"""The U-Net starts as the exact map of a Gaussian, and keeps what the algorithms ask of a network."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from mfm_ref import ExactFlowMap, FlowMap, Guided, UNet, meta_flow_map_loss
from mfm_ref.forward_mode import derivative
from tests.strategies import SEEDS, TIMES, assert_close, randn, random_mixture, row_scale

SHAPE = (1, 4, 4)
ALL_ENDS = [(s, u, t) for s in (0.0, 1.0) for u in (0.0, 1.0) for t in (0.0, 1.0) if s <= u]


def untrained(p1, shape=SHAPE, **options) -> FlowMap:
    return FlowMap(UNet(p1.mean.view(shape), p1.cov, **({"channels": (8, 16), "blocks": 1, "min_std": 1e-3} | options)))


def scrambled(seed=0, dtype=torch.float64, **options) -> FlowMap:
    """A small U-Net whose every weight counts."""
    torch.manual_seed(seed)
    X = untrained(random_mixture(16, 1, seed), **options)
    with torch.no_grad():
        for parameter in X.parameters():
            parameter.copy_(0.2 * torch.randn_like(parameter))
    return X.to(dtype)


@given(SEEDS, TIMES, TIMES, TIMES, st.sampled_from([1, 2]))
def test_it_starts_as_the_exact_map_of_its_gaussian(seed, a, b, t, patch):
    p1, (s, u) = random_mixture(16, 1, seed), sorted((a, b))
    z, x = randn(3, 16, seed=seed), randn(3, 16, seed=seed + 1)
    exact = ExactFlowMap(p1)
    moved, velocity = exact(s, u, z, t, x), exact.velocity(s, u, z, t, x)
    X = untrained(p1, patch=patch)
    images = z.view(3, *SHAPE), x.view(3, *SHAPE)
    assert_close(X(s, u, images[0], t, images[1]).detach().flatten(1), moved, 1e-8, row_scale(moved, z, velocity))
    found = X.velocity(s, u, images[0], t, images[1]).detach().flatten(1)
    assert_close(found, velocity, 1e-8, row_scale(velocity))


def test_the_correction_is_switched_on_by_training():
    z, x = randn(3, *SHAPE, seed=1), randn(3, *SHAPE, seed=2)
    X, exact = scrambled(), ExactFlowMap(random_mixture(16, 1, 0))
    moved = exact(0.2, 0.7, z.flatten(1), 0.4, x.flatten(1)).view_as(z)
    assert (X(0.2, 0.7, z, 0.4, x) - moved).detach().abs().max() > 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("s", "u", "t"), ALL_ENDS)
def test_finite_at_every_end(s, u, t, dtype):
    X = scrambled(dtype=dtype)
    z, x = (randn(4, *SHAPE, seed=k).to(dtype).requires_grad_() for k in (1, 2))
    velocity = X.velocity(s, u, z, t, x)
    assert torch.isfinite(velocity).all()
    velocity.square().sum().backward()
    for tensor in (z, x, *X.parameters()):
        assert tensor.grad is None or torch.isfinite(tensor.grad).all()


def test_every_weight_is_trained():
    """One step of the loss on an untrained network reaches the last layer; on another, all of them."""
    X = scrambled(n_classes=3, reads_guidance=True)
    x1, y = randn(8, *SHAPE, seed=1), torch.tensor([0, 1, 2, 3] * 2)
    guidance = torch.full((8,), 2.0, dtype=torch.float64)
    rng = torch.Generator().manual_seed(0)
    meta_flow_map_loss(X, x1, y, guidance=guidance, generator=rng).backward()
    for name, parameter in X.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


@given(SEEDS)
def test_forward_mode_is_the_slope(seed):
    """The derivative along (1, v) that mean flow needs, against differences."""
    X = scrambled()
    z, x, v = (randn(2, *SHAPE, seed=seed + k) for k in range(3))
    s = torch.tensor([0.2, 0.5], dtype=torch.float64)
    _, slope = derivative(lambda s, z: X.velocity(s, 0.9, z, 0.3, x), (s, z), (torch.ones_like(s), v))
    h = 1e-5
    ahead, behind = (X.velocity(s + k * h, 0.9, z + k * h * v, 0.3, x).detach() for k in (1, -1))
    assert_close(slope.detach(), (ahead - behind) / (2 * h), 1e-5, row_scale(slope.detach()))


def test_rows_do_not_depend_on_each_other():
    X = scrambled()
    z, x = randn(5, *SHAPE, seed=1), randn(5, *SHAPE, seed=2)
    t = torch.linspace(0, 1, 5, dtype=torch.float64)
    together = X(0.1, 0.8, z, t, x)
    alone = torch.cat([X(0.1, 0.8, z[k : k + 1], t[k], x[k : k + 1]) for k in range(5)])
    assert_close(together, alone, 1e-10)


def test_labels_and_guidance_are_read_and_none_is_the_null_class():
    X = scrambled(n_classes=3, reads_guidance=True)
    arguments = 0.1, 0.9, randn(1, *SHAPE, seed=1).expand(4, *SHAPE), 0.5, randn(1, *SHAPE, seed=2).expand(4, *SHAPE)
    by_label = X(*arguments, torch.arange(4))
    assert (by_label[0] - by_label[1]).abs().max() > 1e-3
    assert_close(X(*arguments)[0], by_label[3], 1e-10)
    guided = Guided(X, 2.0)(*arguments, torch.arange(4))
    assert (guided - by_label).abs().max() > 1e-3
    assert_close(Guided(X, 1.0)(*arguments, torch.arange(4)), by_label, 1e-10)


def test_saved_and_loaded_it_is_the_same(tmp_path):
    X = scrambled(n_classes=3, reads_guidance=True, patch=2, dtype=torch.float32)
    X.save_pretrained(tmp_path / "map")
    again = FlowMap.from_pretrained(tmp_path / "map")
    assert again.network.config == X.network.config
    z, x = (randn(2, *SHAPE, seed=k).float() for k in (1, 2))
    assert torch.equal(again(0.1, 0.9, z, 0.5, x), X(0.1, 0.9, z, 0.5, x))


def test_the_default_has_nine_million_weights_at_mnist_size():
    count = sum(p.numel() for p in UNet(torch.zeros(1, 28, 28), torch.eye(784)).parameters())
    assert 8.5e6 < count < 9.5e6


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"mean": torch.zeros(16)}, r"mean must be an image \(C, H, W\), got \(16,\)"),
        ({"cov": torch.eye(15)}, r"cov \(D, D\), got \(16,\) and \(15, 15\)"),
        ({"mean": torch.full(SHAPE, math.nan)}, "mean must be finite"),
        ({"channels": (12,)}, r"channels must be multiples of 8, one for each level, got \[12\]"),
        ({"channels": ()}, "channels must be multiples of 8"),
        ({"channels": (8, 8, 8, 8)}, r"sides must be multiples of 8, for patches of 1 and 4 levels, got \(4, 4\)"),
        ({"patch": 3}, "sides must be multiples of"),
        ({"patch": 0}, "patch must be an integer >= 1"),
        ({"blocks": 0}, "blocks must be an integer >= 1"),
        ({"n_classes": -1}, "n_classes must be an integer >= 0"),
        ({"min_std": 0.0}, "min_std must be positive"),
    ],
)
def test_unet_refuses(arguments, match):
    arguments = {"mean": torch.zeros(SHAPE), "cov": torch.eye(16), "channels": (8,)} | arguments
    with pytest.raises(ValueError, match=match):
        UNet(arguments.pop("mean"), arguments.pop("cov"), **arguments)


def test_images_of_another_size_and_labels_without_classes_are_refused():
    X = scrambled()
    wrong, right = randn(2, 1, 8, 8, seed=1), randn(2, *SHAPE, seed=1)
    with pytest.raises(ValueError, match=r"states must have shape \(B, 1, 4, 4\), got \(2, 1, 8, 8\)"):
        X(0.0, 1.0, wrong, 0.5, wrong)
    with pytest.raises(ValueError, match="no classes"):
        X(0.0, 1.0, right, 0.5, right, torch.zeros(2, dtype=torch.long))


def test_gradients_with_respect_to_the_context_are_the_oracles():
    """∂X/∂(t·x) at t = 0, which steering needs there."""
    p1 = random_mixture(16, 1, 3)
    X, exact = untrained(p1), ExactFlowMap(p1)
    z, direction = randn(3, 16, seed=1), randn(3, 16, seed=2)
    grads = []
    for a, shape in ((X, SHAPE), (exact, (16,))):
        tx = torch.zeros(3, *shape, dtype=torch.float64, requires_grad=True)
        moved = a.from_tx(0.0, 1.0, z.view(3, *shape), 0.0, tx)
        grads.append(torch.autograd.grad((moved * direction.view(3, *shape)).sum(), tx)[0].flatten(1))
    assert_close(grads[0], grads[1], 1e-9, row_scale(grads[1]))


def test_normalisation_is_pytorchs():
    """GroupNorm written in two parts against the one of torch."""
    from mfm_ref.unet import _GroupNorm

    ours = _GroupNorm(16).double()
    nn.init.normal_(ours.weight)
    nn.init.normal_(ours.bias)
    h = randn(3, 16, 4, 4, seed=1)
    assert_close(ours(h), nn.functional.group_norm(h, 8, ours.weight, ours.bias), 1e-12)
