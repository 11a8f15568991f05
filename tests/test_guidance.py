"""Model guidance, where the classes are the components of a mixture: conditional and null drifts are both exact."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from mfm_ref import (
    MLP,
    ClassifierFree,
    ExactFlowMap,
    FlowMap,
    GaussianMixture,
    Guided,
    coupled_interpolants,
    diagonal_loss,
    glass_drift,
    guided_target,
    integrate,
    lagrangian_target,
    meta_flow_map_loss,
    sample_posterior,
)
from mfm_ref.flow_map import unconditional_drift
from mfm_ref.recipe import CONSISTENCY, mean_flow
from mfm_ref.sampling import time_grid
from tests.helpers import LIMIT, gaussian, z_scores
from tests.strategies import SEEDS, assert_close, randn, random_mixture, rng, row_scale

SCALES = st.just(1.0) | st.floats(1, 6)
K = 3  # classes; label K is the null class


def law(seed=0, dim=2) -> GaussianMixture:
    return random_mixture(dim, K, seed)


def classes_of(p1) -> list[GaussianMixture]:
    """The law of each class, and that of the null class, which is the mixture."""
    one = torch.ones(1, dtype=torch.float64)
    return [*(GaussianMixture(one, p1.means[k : k + 1], p1.covs[k : k + 1]) for k in range(K)), p1]


def drift_of(p1):
    """The conditional drift of a teacher, drift(t, x, y)."""
    laws = classes_of(p1)
    return lambda t, x, y: torch.stack([p.drift(t, x) for p in laws])[y, torch.arange(len(x))]


class Ruled(nn.Module):
    """b̄ of the null class, of a class, and a rule that makes a guided velocity of both; right at s = u alone.

    `calls` keeps the labels and scales of every call.
    """

    reads_tx, reads_guidance, null_class = True, True, K

    def __init__(self, p1, rule):
        super().__init__()
        self.laws, self.rule, self.shape, self.calls = classes_of(p1), rule, (p1.dim,), []

    def velocity(self, s, u, z, t, context, y, guidance=None):
        self.calls.append((y, guidance))
        drifts = torch.stack([p.posterior_from_tx(t, context).drift(s, z) for p in self.laws])
        if y is None:
            return drifts[K]
        w = torch.ones_like(s) if guidance is None else guidance
        return self.rule(drifts[K], drifts[y, torch.arange(len(z))], w.unsqueeze(-1))


def right(null, b, w):
    return null + w * (b - null)


WRONG = {
    "unguided": lambda null, b, w: b,
    "null": lambda null, b, w: null + 0 * w,
    "one too many": lambda null, b, w: b + w * (b - null),
    "one too few": lambda null, b, w: null + (w - 1) * (b - null),
    "reversed": lambda null, b, w: b - (w - 1) * (b - null),
    "its inverse": lambda null, b, w: null + (b - null) / w,
}


def batch(p1, n, seed=0):
    """Labels, with the null class among them, and s, z, t, x of samples of those classes."""
    g = rng(seed)
    y = torch.randint(K + 1, (n,), generator=g)
    x1 = torch.stack([p.sample(n, generator=g) for p in classes_of(p1)])[y, torch.arange(n)]
    s, t = 0.9 * torch.rand((2, n), generator=g, dtype=torch.float64)
    x, z, velocity = coupled_interpolants(x1, s, t, generator=g)
    return y, s, z, t, x, velocity


# ---- the target ----------------------------------------------------------------------------------------


@given(SEEDS, st.integers(1, 4), st.lists(SCALES, min_size=4, max_size=4))
def test_the_guided_diagonal_is_the_fixed_point(seed, dim, scales):
    """v(y, w) = b̄(∅) + w (b̄(y) − b̄(∅)) has no residual against E12 of the conditional drift, guided: rounding alone.
    Rows of the null class are b̄(∅) at every w, and w = 1 leaves the target as it is, to the bit. Four rows, in up to
    four dimensions."""
    p1 = law(seed, dim)
    X, w = FlowMap(Ruled(p1, right)), torch.tensor(scales, dtype=torch.float64)
    y, s, z, t, x, _ = batch(p1, 4, seed)
    target = glass_drift(drift_of(p1), s, z, t, x, y)
    guided = guided_target(X, s, z, t, x, target, y, w)
    null = ExactFlowMap(p1).velocity(s, s, z, t, x)
    size = 10 * row_scale(target, null)
    assert diagonal_loss(Guided(X, w), s, z, t, x, guided, y) < 1e-20 * size.square().sum()
    assert_close(guided, null + w.unsqueeze(-1) * (target - null), 1e-10, size)
    assert_close(guided[y == K], null[y == K], 1e-10, size[y == K])
    assert torch.equal(guided[w == 1], target[w == 1])
    assert torch.equal(guided_target(X, s, z, t, x, target, y, 1.0), target)
    one_scale, four = (guided_target(X, s, z, t, x, target, y, a) for a in (3.0, w.new_tensor([3.0, 1, 1, 1])))
    assert torch.equal(one_scale[0], four[0])


@given(SEEDS, st.lists(SCALES, min_size=6, max_size=6))
def test_guidance_built_into_the_weights_has_the_same_fixed_point(seed, scales):
    """A network with labels and no guidance input, which is b̄(∅) + w (b̄(y) − b̄(∅)) with w a function of s: E12 of
    the conditional drift, guided by the w of each row, leaves no residual; by a w that is not the network's it does.
    The conditional velocity may be at hand, and no gradient comes through it."""
    p1 = law(seed)
    ruled = Ruled(p1, lambda null, b, _: b)
    y, s, z, t, x, _ = batch(p1, 6, seed)
    w = torch.tensor(scales, dtype=torch.float64)
    of_time = dict(zip(s.tolist(), scales, strict=True))
    ruled.reads_guidance = False
    ruled.rule = lambda null, b, _: null + null.new_tensor([of_time[a] for a in at]).unsqueeze(-1) * (b - null)
    X, at = FlowMap(ruled), [*s.tolist(), *s.tolist()]
    target = glass_drift(drift_of(p1), s, z, t, x, y)
    guided = guided_target(X, s, z, t, x, target, y, w)
    at = s.tolist()
    size = 10 * row_scale(target, guided)
    v = X.velocity(s, s, z, t, x, y)
    assert_close(guided, v, 1e-10, size)
    assert_close(guided_target(X, s, z, t, x, target, y, w, conditional=v.requires_grad_()), v.detach(), 1e-10, size)
    assert not guided_target(X, s, z, t, x, target, y, w, conditional=v).requires_grad
    apart = (ExactFlowMap(p1).velocity(s, s, z, t, x) - target).abs().amax(-1) * (1 / w - 1 / (w + 1))
    other = guided_target(X, s, z, t, x, target, y, w + 1, conditional=v)
    assert ((other - v).abs().amax(-1) >= apart - 1e-9 * size.flatten()).all()


@pytest.mark.parametrize("name", WRONG)
def test_other_guided_maps_have_a_residual(name):
    p1 = law()
    y, s, z, t, x, _ = batch(p1, 200)
    target = glass_drift(drift_of(p1), s, z, t, x, y)
    for w in (1.7, 3.0):
        X = FlowMap(Ruled(p1, WRONG[name]))
        assert diagonal_loss(Guided(X, w), s, z, t, x, guided_target(X, s, z, t, x, target, y, w), y) > 0.01


def test_guidance_from_data_has_the_same_mean():
    """Onto x₁ − x̄₀ in place of E12: the residual at the fixed point has mean zero along bumps of both coordinates, w
    another in each row, 6e-7 each; the unguided target, and an excess of w − 1 in place of 1 − 1/w, are refused."""
    p1, n = law(), 20_000
    X, w = FlowMap(Ruled(p1, right)), 1 + 2 * torch.rand(n, generator=rng(9), dtype=torch.float64)
    y, s, z, t, x, velocity = batch(p1, n)
    v = X.velocity(s, s, z, t, x, y, w)
    excess = X.velocity(s, s, z, t, x, y, w) - X.velocity(s, s, z, t, x)

    def score(target):
        bumps = torch.stack([torch.ones_like(z), z.sin(), v, excess])
        return z_scores(((v - target) * bumps).movedim(0, 1).flatten(1), 0.0).abs().max()

    assert score(guided_target(X, s, z, t, x, velocity, y, w)) < LIMIT
    assert score(velocity) > LIMIT
    assert score(velocity + (w - 1).unsqueeze(-1) * excess) > LIMIT


def test_no_gradient_flows_into_the_guided_target():
    network = trained_mlp()
    y, s, z, t, x, velocity = batch(law(), 6)
    assert not guided_target(FlowMap(network), s, z, t, x, velocity, y, 2.0).requires_grad


# ---- guidance as an input ------------------------------------------------------------------------------


def trained_mlp():
    """An MLP with classes and guidance whose outlet, zero at the start, is drawn."""
    torch.manual_seed(0)
    network = MLP(torch.zeros(2).double(), torch.eye(2).double(), hidden=16, depth=2, n_classes=K, reads_guidance=True)
    nn.init.normal_(network.outlet.weight, std=0.3)
    return network


@pytest.mark.parametrize("method", ["__call__", "velocity", "from_tx", "velocity_from_tx"])
def test_guided_is_the_map_with_its_scale_passed(method):
    X, y = FlowMap(trained_mlp()), torch.tensor([0, 3, 2, 1])
    arguments = (0.2, 0.7, randn(4, 2, seed=1), 0.4, randn(4, 2, seed=2), y)
    for w in (1.0, 2.5, torch.tensor(2.5), torch.tensor([1.0, 2.0, 3.0, 4.0])):
        guided = Guided(X, w)
        assert torch.equal(getattr(guided, method)(*arguments), getattr(X, method)(*arguments, w))
        assert (guided.shape, guided.reads_tx, guided.dtype, guided.device) == (X.shape, X.reads_tx, X.dtype, X.device)
    assert not torch.equal(getattr(Guided(X, 2.5), method)(*arguments), getattr(X, method)(*arguments))


def test_a_network_reads_the_scale_row_by_row():
    """None is w = 1; every row of a batch has its own; another w is another velocity, bounded as w grows."""
    X, y = FlowMap(trained_mlp()), torch.tensor([0, 3, 2, 1])
    arguments = (0.2, 0.7, randn(4, 2, seed=1), 0.4, randn(4, 2, seed=2), y)
    assert torch.equal(X.velocity(*arguments), X.velocity(*arguments, 1.0))
    rows = X.velocity(*arguments, torch.tensor([1.0, 2.0, 3.0, 4.0]))
    for k in range(4):
        assert torch.equal(rows[k], X.velocity(*arguments, float(k + 1))[k])
        assert k == 0 or (rows[k] - X.velocity(*arguments)[k]).abs().max() > 1e-3
    assert_close(X.velocity(*arguments, 1e6), X.velocity(*arguments, 1e9), 1e-5)
    drift = X.drift(0.3, arguments[2], y)
    assert torch.equal(drift, X.velocity(0.3, 0.3, arguments[2], 0.0, 0 * arguments[2], y, 1.0))


def test_derivatives_pass_through_a_guided_map():
    """The Lagrangian residual of a guided map is that of the map by finite differences at the same scale, 1e-7."""
    X, y, w = FlowMap(trained_mlp()), torch.tensor([0, 3, 2, 1]), torch.tensor([1.0, 2.0, 3.0, 4.0])
    z, x, h = randn(4, 2, seed=1), randn(4, 2, seed=2), 1e-5
    moved = (X(0.2, 0.7 + h, z, 0.4, x, y, w) - X(0.2, 0.7 - h, z, 0.4, x, y, w)) / (2 * h)
    b = X.velocity(0.7, 0.7, X(0.2, 0.7, z, 0.4, x, y, w), 0.4, x, y, w)
    residual = X.velocity(0.2, 0.7, z, 0.4, x, y, w) - lagrangian_target(Guided(X, w), 0.2, 0.7, z, 0.4, x, y)
    assert_close(residual.detach(), (moved - b).detach(), 1e-7, row_scale(b))


# ---- classifier-free guidance --------------------------------------------------------------------------


class Labelled(nn.Module):
    """A network of each entry alone, any shape, without a guidance input; `calls` keeps labels and times."""

    reads_tx, null_class = True, K

    def __init__(self, *shape):
        super().__init__()
        self.shape, self.calls = shape, []

    def velocity(self, s, u, z, t, context, y):
        self.calls.append((y, s, u, t))
        y = torch.full_like(s, K) if y is None else y
        s, u, t, y = (a.reshape(-1, *[1] * len(self.shape)) for a in (s, u, t, y))
        return torch.sin(z * (1 + y) + s + 2 * u) + torch.cos(y + t) * context


def labelled_batch(shape, n, seed):
    """y with the null class, s <= u, z, t and x; every row its own."""
    g = rng(seed)
    s, u = torch.rand((2, n), generator=g, dtype=torch.float64).sort(0).values
    t = torch.rand(n, generator=g, dtype=torch.float64)
    return (
        torch.randint(K + 1, (n,), generator=g),
        s,
        u,
        randn(n, *shape, seed=seed),
        t,
        randn(n, *shape, seed=seed + 1),
    )


@given(st.sampled_from([(), (3,), (2, 3), (4, 2, 2)]), st.lists(SCALES, min_size=3, max_size=3), SEEDS)
def test_classifier_free_guidance_is_v_null_plus_w_times_the_difference(shape, scales, seed):
    """Against two calls of the map, in all four methods and for each form of the scale; rounding alone. Rows of the
    null class are v(∅) at every w, labels None too, and w = 1 is the conditional map."""
    X, w = FlowMap(Labelled(*shape)), torch.tensor(scales, dtype=torch.float64)
    y, s, u, z, t, x = labelled_batch(shape, 3, seed)
    for scale in (w, w[0], scales[0]):
        guided = ClassifierFree(X, scale)
        each = torch.as_tensor(scale, dtype=torch.float64).expand(3)
        column, jump = (a.reshape(-1, *[1] * len(shape)) for a in (each, u - s))
        for suffix in ("", "_from_tx"):
            velocity, jumped = f"velocity{suffix}", suffix[1:] or "__call__"
            v, null = (getattr(X, velocity)(s, u, z, t, x, labels) for labels in (y, None))
            expected = null + column * (v - null)
            found = getattr(guided, velocity)(s, u, z, t, x, y)
            assert_close(found, expected, 1e-13, 10 * (1 + column))
            assert_close(found[y == K], null[y == K], 1e-13, 10)
            assert_close(getattr(guided, jumped)(s, u, z, t, x, y), z + jump * expected, 1e-13, 10 * (1 + column))
            assert torch.equal(getattr(guided, velocity)(s, u, z, t, x), null)
            assert_close(getattr(ClassifierFree(X, 1.0), velocity)(s, u, z, t, x, y), v, 1e-14, 10)
    assert (guided.shape, guided.reads_tx, guided.dtype, guided.device) == (X.shape, X.reads_tx, X.dtype, X.device)


@pytest.mark.parametrize("name", WRONG)
def test_other_rules_are_not_classifier_free_guidance(name):
    """On the diagonal of the exact drifts, the guided one is E12's combination; the wrong rules are at least 0.01 off
    in the mean square, the right one 1e-20."""
    p1 = law()
    y, s, z, t, x, _ = batch(p1, 200)
    X, w = FlowMap(Ruled(p1, lambda null, b, w: b)), 1.5 + torch.rand(200, generator=rng(3), dtype=torch.float64)
    v = ClassifierFree(X, w).velocity(s, s, z, t, x, y)
    b, null = glass_drift(drift_of(p1), s, z, t, x, y), glass_drift(p1.drift, s, z, t, x)
    for rule, wrong in ((right, False), (WRONG[name], True)):
        error = (v - rule(null, b, w.unsqueeze(-1))).square().mean()
        assert error > 0.01 if wrong else error < 1e-20


def test_both_halves_go_to_the_network_in_one_batch_labels_first():
    network = Labelled(2)
    y, s, u, z, t, x = labelled_batch((2,), 5, seed=0)
    ClassifierFree(FlowMap(network), 3.0).velocity(s, u, z, 0.25, x, y)
    ((labels, *times),) = network.calls
    assert torch.equal(labels, torch.cat([y, torch.full((5,), K)]))
    for seen, given_ in zip(times, (s, u, torch.full((5,), 0.25, dtype=torch.float64)), strict=True):
        assert torch.equal(seen, given_.repeat(2))
    network.calls.clear()
    ClassifierFree(FlowMap(network), 3.0).velocity(s, u, z, t, x)
    assert [call[0] for call in network.calls] == [None]


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_channels_beyond_are_those_of_the_label(channels):
    """The first are guided as without the option, the others keep v(y): not v(∅), and not the guided ones."""
    X = FlowMap(Labelled(4, 2, 2))
    y, s, u, z, t, x = labelled_batch((4, 2, 2), 3, seed=0)
    y = y % K  # no null class among them
    found = ClassifierFree(X, 4.0, channels=channels).velocity(s, u, z, t, x, y)
    assert torch.equal(found[:, :channels], ClassifierFree(X, 4.0).velocity(s, u, z, t, x, y)[:, :channels])
    assert_close(found[:, channels:], X.velocity(s, u, z, t, x, y)[:, channels:], 1e-14, 10)
    assert (found - X.velocity(s, u, z, t, x, y))[:, :channels].abs().max() > 0.1
    null = X.velocity(s, u, z, t, x)
    assert torch.equal(ClassifierFree(X, 4.0, channels=channels).velocity(s, u, z, t, x), null)


def test_classifier_free_guidance_samples_a_sharper_class():
    """Classes N(±2, 1) and the null class their mixture: guided, the ODE ends nearer to its own class's side and
    beyond its mean; w = 1 has the class's law. The mean of 2,000 samples, LIMIT standard errors of 1/√2000."""
    one = torch.ones(1, dtype=torch.float64)
    p1 = GaussianMixture(
        torch.full((K,), 1 / K).double(), torch.tensor([[-2.0], [0.0], [2.0]]).double(), one.expand(K, 1, 1)
    )
    X = FlowMap(Ruled(p1, lambda null, b, w: b))
    x, y = randn(2_000, 1, seed=0), torch.full((2_000,), 2)
    ends = {}
    for w in (1.0, 3.0):
        guided = ClassifierFree(X, w)
        drift = lambda t, x, guided=guided: unconditional_drift(guided, t, x, y)  # noqa: E731
        ends[w] = integrate(drift, x, time_grid(20), dynamics="dopri5").mean().item()
    assert abs(ends[1.0] - 2) < LIMIT / 2_000**0.5
    assert ends[3.0] > 2 + LIMIT / 2_000**0.5
    draws = sample_posterior(ClassifierFree(X, 3.0), 0.3, x[:5], 2, 4, y=y[:5], generator=rng(0))
    assert draws.shape == (2, 5, 1)


def test_derivatives_pass_through_classifier_free_guidance():
    """The gradient in z and the forward-mode derivative in u are those of the two calls' combination."""
    X, w = FlowMap(trained_mlp()), 2.5
    y, s, u, z, t, x = labelled_batch((2,), 4, seed=0)

    def apart(z, u):
        return X.velocity(s, u, z, t, x) + w * (X.velocity(s, u, z, t, x, y) - X.velocity(s, u, z, t, x))

    guided, tangents = ClassifierFree(X, w), (randn(4, 2, seed=5), 0.1 * torch.ones(4).double())
    together = torch.func.jvp(lambda z, u: guided.velocity(s, u, z, t, x, y), (z, u), tangents)
    for found, expected in zip(together, torch.func.jvp(apart, (z, u), tangents), strict=True):
        assert_close(found.detach(), expected.detach(), 1e-10, row_scale(expected))
    leaf = z.clone().requires_grad_()
    gradient, expected = (
        torch.autograd.grad(f(leaf).sum(), leaf)[0]
        for f in (lambda z: guided.velocity(s, u, z, t, x, y), lambda z: apart(z, u))
    )
    assert_close(gradient, expected, 1e-10, row_scale(expected))


@pytest.mark.parametrize(
    ("options", "y", "match"),
    [
        ({"scale": 0.5}, Y := torch.tensor([0, 1, 2, 3]), "guidance must be at least 1, got 0.5"),
        ({"scale": torch.ones(3)}, Y, r"guidance must have shape \(\) or \(4,\), got \(3,\)"),
        ({"scale": float("nan")}, None, "guidance must be at least 1, got nan"),
        ({}, Y[:3], r"labels y must have shape \(4,\), got \(3,\)"),
        ({}, Y.unsqueeze(-1), r"labels y must have shape \(4,\), got \(4, 1\)"),
        ({"channels": 0}, Y, "channels must be an integer >= 1, got 0"),
        ({"channels": 3}, Y, r"channels must be at most the first of the shape \(2,\), got 3"),
    ],
)
def test_classifier_free_guidance_refuses(options, y, match):
    X, z = FlowMap(Labelled(2)), randn(4, 2, seed=1)
    with pytest.raises(ValueError, match=match):
        ClassifierFree(X, **{"scale": 2.0} | options).velocity(0.1, 0.5, z, 0.4, z, y)


def test_classifier_free_guidance_needs_a_null_class_and_a_map_as_it_is():
    X, z = FlowMap(MLP(torch.zeros(2).double(), torch.eye(2).double(), hidden=8)), randn(4, 2, seed=1)
    with pytest.raises(ValueError, match="guidance needs a network with a null_class; MLP has none"):
        ClassifierFree(X, 2.0)
    with pytest.raises(ValueError, match=r"channels must be at most the first of the shape \(\), got 1"):
        ClassifierFree(FlowMap(Labelled()), 2.0, channels=1)
    network = Labelled(2)
    network.reads_tx = False
    with pytest.raises(ValueError, match="reads its context as x"):
        ClassifierFree(FlowMap(network), 2.0).from_tx(0.1, 0.5, z, 0.4, z, torch.tensor([0, 1, 2, 3]))
    with pytest.raises(ValueError, match="s <= u"):
        ClassifierFree(FlowMap(Labelled(2)), 2.0)(0.5, 0.1, z, 0.4, z, torch.tensor([0, 1, 2, 3]))


# ---- the whole loss ------------------------------------------------------------------------------------


def test_the_whole_diagonal_is_zero_at_the_fixed_point():
    """From the conditional drift, with labels dropped and another w in each row; a map without guidance, and the same
    map with its scales exchanged between rows, have a residual."""
    p1, n = law(), 64
    y, *_ = batch(p1, n)
    x1 = torch.stack([p.sample(n, generator=rng(1)) for p in classes_of(p1)])[y, torch.arange(n)]
    w = torch.linspace(1, 4, n, dtype=torch.float64)

    def loss(rule):
        options = {"drift": drift_of(p1), "consistency": None, "guidance": w, "generator": rng(0)}
        return meta_flow_map_loss(FlowMap(Ruled(p1, rule)), x1, y, **options)

    assert loss(right) < 1e-16
    assert loss(WRONG["unguided"]) > 0.1
    assert loss(lambda null, b, w: right(null, b, w.flip(0))) > 0.1


@pytest.mark.parametrize("name", [name for name in CONSISTENCY if name != "mean_flow"])
@pytest.mark.parametrize("n", [6, 7])
def test_scales_and_labels_go_to_the_half_of_their_rows(name, n):
    """Jumps are made for the second half, guided targets for the first, with and without its labels in one batch,
    residuals for all: each call of the network sees the labels and scales of its own rows."""
    network = Ruled(law(), right)
    y, w = torch.arange(n) % (K + 1), 1 + torch.arange(n, dtype=torch.float64)
    options = {"consistency": name, "guidance": w, "generator": rng(0)}
    meta_flow_map_loss(FlowMap(network), randn(n, 2, seed=1), y, **options)
    half = n // 2
    *jumps, first, last = network.calls
    assert torch.equal(first[0], torch.cat([y[:half], torch.full((half,), K)]))
    assert torch.equal(first[1], w[:half].repeat(2))
    assert jumps
    for labels, scales in jumps:
        assert torch.equal(labels, y[half:])
        assert torch.equal(scales.detach(), w[half:])
    assert torch.equal(last[0], y)
    assert torch.equal(last[1], w)


def test_with_a_teacher_the_jumps_of_a_guided_map_stay_its_own():
    """self_taught: the drift makes E13's targets, and a function of one's own gets the guided map and no drift."""
    p1, seen = law(), []

    def own(X, r, drift, generator):
        seen.append((X.guidance, drift))
        return X.velocity(r.s, r.u, r.z, r.t, r.x, r.y), r.std

    y, w = torch.arange(8) % (K + 1), 1 + torch.arange(8, dtype=torch.float64)
    X, x1 = FlowMap(Ruled(p1, right)), p1.sample(8, generator=rng(1))
    options = {"drift": drift_of(p1), "self_taught": True, "consistency": own, "guidance": w, "generator": rng(0)}
    assert meta_flow_map_loss(X, x1, y, **options) < 1e-16
    assert torch.equal(seen[0][0], w[4:])
    assert seen[0][1] is None


def test_a_wrong_null_class_costs_at_every_scale():
    """Rows of the null class regress onto b̄(∅) whatever their w. Against a target that reads the null class at w = 1,
    this map would have no residual at any w > 1: its null drift is off by 3 at w = 1, and all else follows from that.
    """
    p1, off = law(), 3.0

    class Unanchored(Ruled):
        def velocity(self, s, u, z, t, context, y, guidance=None):
            w = torch.ones_like(s) if guidance is None else guidance
            null, w = super().velocity(s, u, z, t, context, None), w.unsqueeze(-1)
            at_w = torch.where(w > 1, null - (w - 1) * off, null + off)
            if y is None:
                return at_w
            b = super().velocity(s, u, z, t, context, y)
            return torch.where((y == K).unsqueeze(-1), at_w, null + off + w * (b - null - off))

    y, s, z, t, x, _ = batch(p1, 40)
    w = 1.5 + torch.rand(40, generator=rng(7), dtype=torch.float64)
    b = Ruled(p1, right)
    exact = FlowMap(b).velocity(s, s, z, t, x, y)  # at w = 1: b̄(y), and b̄(∅) where y is the null class
    X = FlowMap(Unanchored(p1, right))
    residual = X.velocity(s, s, z, t, x, y, w) - guided_target(X, s, z, t, x, exact, y, w)
    assert_close(residual[y == K], ((1 - w) * off).unsqueeze(-1)[y == K].expand(-1, 2), 1e-9, 10.0)
    stale = exact + (1 - 1 / w).unsqueeze(-1) * (X.velocity(s, s, z, t, x, y, w) - X.velocity(s, s, z, t, x))
    assert_close(X.velocity(s, s, z, t, x, y, w), stale, 1e-9, 10.0)


# ---- errors --------------------------------------------------------------------------------------------

Y, W = torch.tensor([0, 1, 2, 3]), torch.tensor([1.0, 2.0, 2.0, 3.0])


@pytest.mark.parametrize(
    ("guidance", "match"),
    [
        (0.5, "guidance must be at least 1, got 0.5"),
        (torch.tensor([1.0, 2.0, 0.9, 1.0]), "guidance must be at least 1, got 0.89"),
        (float("nan"), "guidance must be at least 1, got nan"),
        (torch.ones(2), r"guidance must have shape \(\) or \(4,\), got \(2,\)"),
        (torch.ones(4, 1), r"guidance must have shape \(\) or \(4,\), got \(4, 1\)"),
    ],
)
def test_scales_that_do_not_fit_are_refused(guidance, match):
    X, z = FlowMap(trained_mlp()), randn(4, 2, seed=1)
    for call in (
        lambda: X(0.1, 0.5, z, 0.4, z, Y, guidance),
        lambda: Guided(X, guidance).velocity_from_tx(0.1, 0.5, z, 0.4, z, Y),
        lambda: guided_target(X, 0.1, z, 0.4, z, z, Y, guidance),
    ):
        with pytest.raises(ValueError, match=match):
            call()


def test_a_network_without_guidance_refuses_it():
    X, z = FlowMap(MLP(torch.zeros(2).double(), torch.eye(2).double(), hidden=8, n_classes=K)), randn(4, 2, seed=1)
    for call in (
        lambda: X.velocity(0.1, 0.5, z, 0.4, z, Y, 2.0),
        lambda: meta_flow_map_loss(X, z, Y, guidance=W.double()),
    ):
        with pytest.raises(ValueError, match="has no guidance input"):
            call()


def test_a_network_that_does_not_say_its_null_class_cannot_be_trained_with_guidance():
    network, z = Ruled(law(), right), randn(4, 2, seed=1)
    network.null_class = None
    FlowMap(network).velocity(0.1, 0.5, z, 0.4, z, Y, 2.0)
    with pytest.raises(ValueError, match="guidance needs a network with a null_class; Ruled has none"):
        guided_target(FlowMap(network), 0.1, z, 0.4, z, z, Y, 2.0)


@pytest.mark.parametrize("target", [torch.zeros(2), torch.zeros(4, 1), torch.zeros(1, 2)])
def test_a_target_that_would_broadcast_is_refused(target):
    z = randn(4, 2, seed=1)
    with pytest.raises(ValueError, match="same shape"):
        guided_target(FlowMap(trained_mlp()), 0.1, z, 0.4, z, target.double(), Y, 2.0)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"y": None}, "needs a FlowMap and class labels"),
        ({"X": ExactFlowMap(gaussian())}, "needs a FlowMap and class labels"),
        ({"guidance": torch.ones(2)}, r"guidance must have the shape of y, \(4,\), got \(2,\)"),
        ({"guidance": torch.tensor(2.0)}, r"guidance must have the shape of y, \(4,\), got \(\)"),
        ({"drift": drift_of(law())}, "consistency must be self: pass self_taught=True"),
        ({"consistency": "mean_flow"}, "consistency must be self"),
        ({"consistency": mean_flow}, "consistency must be self"),
    ],
)
def test_guidance_without_what_it_needs_is_refused(change, match):
    arguments = {"X": FlowMap(trained_mlp()), "x1": randn(4, 2, seed=1), "y": Y, "guidance": W.double()} | change
    with pytest.raises(ValueError, match=match):
        meta_flow_map_loss(**arguments)
