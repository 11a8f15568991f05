"""What the checks of `mfm_ref.conformance` let pass, and for each of them a class that it refuses."""

import re

import numpy as np
import pytest
import torch
from torch import nn

from mfm_ref import MLP, FlowMap, GaussianLikelihood, LinearReward, UNet, meta_flow_map_loss, semigroup_target
from mfm_ref.conformance import Result, check_network, check_objective, check_reward
from mfm_ref.objectives import mean_flow_target
from mfm_ref.recipe import CONSISTENCY, mean_flow, semigroup, shortcut, velocity_size
from tests.imagenet_tiny import tiny_sit
from tests.strategies import randn, rng


def names(results):
    return [result.name for result in results]


def refuses(name, check, *args, **options):
    """The check of that name fails, the others before it do not."""
    with pytest.raises(ValueError, match=f"fails the check {re.escape(repr(name))}: ") as caught:
        check(*args, **options)
    return str(caught.value)


def test_results_say_what_was_measured():
    """Every result keeps its limit, and prints it with the right word."""
    results = [*check_reward(LinearReward(randn(3, seed=0)), (3,)), *check_network(Net()), *check_objective(shortcut)]
    for result in results:
        assert result.measured >= result.limit if result.least else result.measured <= result.limit
    assert str(Result("alone", 0.5, 1.0)).split() == ["alone", "5.0e-01,", "at", "most", "1.0e+00"]
    assert " at least " in str(Result("reads s", 0.5, 1e-6, least=True))


# ---- rewards -------------------------------------------------------------------------------------------

REWARD_CHECKS = ["shape", "finite", "inputs", "repeats", "alone", "NaN", "gradient"]


@pytest.mark.parametrize("shape", [(3,), (1,), (5,), (2, 3), (1, 4, 4)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rewards_of_the_package_pass(shape, dtype):
    size = torch.Size(shape).numel()
    rewards = [GaussianLikelihood(randn(2, size, seed=0), randn(2, seed=1), 0.3)]
    if len(shape) == 1:
        rewards += [LinearReward(randn(size, seed=2)), GaussianLikelihood(randn(size, seed=0), 0.4, 0.3)]
    for reward in rewards:
        assert names(check_reward(reward, shape, dtype=dtype)) == REWARD_CHECKS


def test_a_black_box_passes_without_a_gradient():
    """A count of positive entries, which says NaN where it sees one; on samples of one's own, too."""

    def count(x1):
        return torch.where(x1.isnan(), x1, (x1 > 0).to(x1)).sum(1)

    assert names(check_reward(count, (3,), differentiable=False)) == REWARD_CHECKS[:-1]
    assert names(check_reward(count, (3,), differentiable=False, samples=randn(4, 3, seed=0))) == REWARD_CHECKS[:-1]
    refuses("gradient", check_reward, count, (3,))


def doubled(x1):
    """In place: right the first time."""
    return x1.mul_(2).sum(1)


WRONG_REWARDS = {
    "shape": [lambda x1: x1.sum(), lambda x1: x1.sum(0), lambda x1: x1, lambda x1: x1.sum(1, keepdim=True), sum],
    "finite": [lambda x1: x1.sum(1).log(), lambda x1: x1.sum(1) / 0],
    "inputs": [doubled],
    "repeats": [lambda x1: x1.sum(1) + torch.rand(len(x1))],
    "alone": [
        lambda x1: x1.sum(1) - x1.mean(),
        lambda x1: x1.sum(1) * len(x1),
        lambda x1: x1.sum(1) + torch.arange(len(x1)),
        lambda x1: x1.sum(1).sort().values,
    ],
    "NaN": [lambda x1: x1.nan_to_num().sum(1), lambda x1: (x1 > 0).double().sum(1)],
    "gradient": [
        lambda x1: (x1 * x1.detach()).sum(1),
        lambda x1: x1.sum(1).detach(),
        lambda x1: torch.from_numpy(x1.detach().numpy().sum(1)),
        lambda x1: x1.round().sum(1),
    ],
}


@pytest.mark.parametrize(("name", "wrong"), [(name, wrong) for name, all in WRONG_REWARDS.items() for wrong in all])
def test_wrong_rewards_are_refused(name, wrong):
    refuses(name, check_reward, wrong, (3,))


def test_every_check_of_a_reward_has_a_wrong_one():
    assert list(WRONG_REWARDS) == REWARD_CHECKS


def test_what_a_refusal_says():
    """The name of the function or class, the check, what must hold, and what came."""

    class Mean:
        def __call__(self, x1):
            return x1.mean()

    assert refuses("shape", check_reward, Mean(), (3,)) == (
        "Mean fails the check 'shape': one number for each of B samples, shape (B,); got () in the place of (1,)"
    )
    assert "doubled fails the check 'inputs'" in refuses("inputs", check_reward, doubled, (3,))
    assert "TypeError: " in refuses("shape", check_reward, lambda x1, prompt: x1.sum(1), (3,))
    assert re.search(
        r"got 0\.\d+ where the most is 1\.49", refuses("alone", check_reward, WRONG_REWARDS["alone"][0], (3,))
    )


@pytest.mark.parametrize(
    ("samples", "came"),
    [
        (randn(2, 3, seed=0), r"\(2, 3\) of torch\.float64"),
        (randn(4, 2, seed=0), r"\(4, 2\) of torch\.float64"),
        (torch.tensor(1.0), r"\(\) of torch\.float32"),
        (torch.ones(4, 3, dtype=torch.long), r"\(4, 3\) of torch\.int64"),
        ([1, 2], r"\[1, 2\] of type list"),
        ("samples.pt", "'samples.pt' of type str"),
    ],
)
def test_samples_that_do_not_fit_are_refused(samples, came):
    must = r"samples must be \(n, 3\), n >= 3, a tensor of floating-point numbers"
    with pytest.raises(ValueError, match=f"^{must}, got {came}$"):
        check_reward(torch.sum, (3,), samples=samples)


@pytest.mark.parametrize(
    ("shape", "came"),
    [
        (2, "2 of type int"),
        ((), r"\(\) of type tuple"),
        ("2", "'2' of type str"),
        ((2, 0), r"\(2, 0\) of type tuple"),
        ((2, -1), r"\(2, -1\) of type tuple"),
        ((2.0,), r"\(2\.0,\) of type tuple"),
        (None, "None of type NoneType"),
    ],
)
def test_what_is_no_shape_of_a_sample_is_refused(shape, came):
    with pytest.raises(ValueError, match=f"^shape must be the sizes of one sample, such as \\(2,\\), got {came}$"):
        check_reward(torch.sum, shape)


@pytest.mark.parametrize("shape", [[3], torch.Size([3]), (np.int64(3),)])
def test_any_sequence_of_sizes_is_a_shape(shape):
    assert names(check_reward(LinearReward(randn(3, seed=0)), shape)) == REWARD_CHECKS


# ---- networks ------------------------------------------------------------------------------------------

NETWORK_CHECKS = ["protocol", "shape", "finite", "inputs", "not zero", "repeats", "alone", "rows"]
NETWORK_CHECKS += ["reads s", "reads u", "reads z", "reads t", "reads context", "weights", "derivative"]
ALL = ["reads y", "reads guidance", "null class", "save"]


class Net(nn.Module):
    """A small right network, whose parts the wrong ones change."""

    shape, reads_tx = (3,), True

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(9, 16), nn.SiLU(), nn.Linear(16, 3))

    def inputs(self, s, u, z, t, context):
        return torch.cat([z, context, torch.stack([s, u, t], 1)], 1)

    def outputs(self, v, z):
        return v

    def velocity(self, s, u, z, t, context, y=None):
        return self.outputs(self.layers(self.inputs(s, u, z, t, context)), z)


def without(name):
    """A network that does not see one of its arguments."""

    class Blind(Net):
        def inputs(self, *arguments):
            named = dict(zip(["s", "u", "z", "t", "context"], arguments, strict=True))
            return super().inputs(*(0 * a if key == name else a for key, a in named.items()))

    return Blind()


class Labelled(Net):
    """With labels and guidance."""

    null_class, reads_guidance = 2, True

    def __init__(self):
        super().__init__()
        self.labels = nn.Embedding(3, 3)

    def velocity(self, s, u, z, t, context, y=None, guidance=None):
        y = torch.full((len(z),), 2) if y is None else y
        w = torch.ones_like(s) if guidance is None else guidance
        return super().velocity(s, u, z, t, context) + self.labels(y) * w.unsqueeze(1)


class Saved(Net):
    """With a config."""

    def __init__(self, scale=2.0):
        super().__init__()
        self.config, self.scale = {"scale": scale}, scale

    def outputs(self, v, z):
        return self.scale * v


def variant(base=Net, **attributes):
    """An instance of a subclass with other methods or attributes."""
    return type("Variant", (base,), attributes)()


class Forgetful(Saved):
    """Its config lacks one of its arguments."""

    def __init__(self, scale=2.0, shift=0.0):
        super().__init__(scale)
        self.shift = shift

    def outputs(self, v, z):
        return self.scale * v + self.shift


class Normed(Net):
    """Batch norm: rows meet in training."""

    def __init__(self):
        super().__init__()
        self.layers.insert(1, nn.BatchNorm1d(16))


class Spare(Net):
    """A layer that is not used."""

    def __init__(self):
        super().__init__()
        self.spare = nn.Linear(2, 2)


class Dropping(Net):
    """Dropout that eval mode ends: allowed."""

    def __init__(self):
        super().__init__()
        self.layers.append(nn.Dropout(0.5))


def in_place(v, z):
    z += 1
    return v


def forgets_labels(self, s, u, z, t, context, y=None, guidance=None):
    return Labelled.velocity(self, s, u, z, t, context, None, guidance)


def forgets_guidance(self, s, u, z, t, context, y=None, guidance=None):
    return Labelled.velocity(self, s, u, z, t, context, y)


def spread():
    """Times `(B,)` against states `(B, D)`: right only for B = 1 and, without a word, for B = D."""

    def velocity(self, s, u, z, t, context, y=None):
        return self.layers(self.inputs(s, u, z, t, context)) + t

    return variant(velocity=velocity)


def hidden(v, z):
    """An operation that derivatives do not see into."""
    return v + torch.from_numpy(z.numpy(force=True).copy()).sin()


class Backward(torch.autograd.Function):
    """2v, with a backward derivative alone, as fused kernels have."""

    @staticmethod
    def forward(context, v):
        return 2 * v

    @staticmethod
    def backward(context, g):
        return 2 * g


class Misnamed(Saved):
    """Its config has an argument that it does not take."""

    def __init__(self, scale=2.0):
        super().__init__()
        self.config = {"width": 3}


def seen(**changes):
    """A network with its inputs changed, each by a function of all of them."""

    def inputs(self, *arguments):
        named = dict(zip(["s", "u", "z", "t", "context"], arguments, strict=True))
        return Net.inputs(self, **(named | {name: change(**named) for name, change in changes.items()}))

    return variant(inputs=inputs)


def made(outputs):
    """A network with its output changed, by a function of it and z."""
    return variant(outputs=lambda self, v, z: outputs(v, z))


WRONG_NETWORKS = {
    "protocol": [3, nn.Linear(3, 3), Net, variant(shape=[3]), variant(reads_tx=1), variant(velocity=None)],
    "shape": [made(lambda v, z: v[:, 0]), made(lambda v, z: v.mean(0)), made(lambda v, z: v.float()), spread()],
    "finite": [
        seen(z=lambda z, s, **_: z / (1 - s).unsqueeze(1)),
        seen(context=lambda context, t, **_: context / t.unsqueeze(1)),
        seen(u=lambda u, s, **_: (u - s).log()),
        seen(s=lambda s, **_: torch.where(s % 0.5 == 0, s, torch.nan)),
    ],
    "inputs": [made(in_place)],
    "not zero": [made(lambda v, z: 0 * v), made(lambda v, z: torch.zeros_like(z))],
    "repeats": [made(lambda v, z: nn.functional.dropout(v))],
    "alone": [
        made(lambda v, z: v + z.mean(0)),
        made(lambda v, z: v + torch.arange(len(v)).unsqueeze(1)),
        made(lambda v, z: v.flip(0)),
        made(lambda v, z: v / len(v)),
    ],
    "rows": [Normed()],
    **{f"reads {name}": [without(name)] for name in ("s", "u", "z", "t", "context")},
    "reads y": [variant(Labelled, velocity=forgets_labels)],
    "reads guidance": [variant(Labelled, velocity=forgets_guidance)],
    "null class": [variant(Labelled, null_class=1)],
    "weights": [Spare(), variant(outputs=lambda self, v, z: v.detach() + self.layers[2].bias)],
    "derivative": [made(hidden), made(lambda v, z: Backward.apply(v))],
    "save": [Misnamed(), Forgetful(shift=1.0)],
}


@pytest.mark.parametrize(("name", "wrong"), [(name, wrong) for name, all in WRONG_NETWORKS.items() for wrong in all])
def test_wrong_networks_are_refused(name, wrong):
    refuses(name, check_network, wrong)


def test_every_check_of_a_network_has_a_wrong_one():
    full = type(
        "Full", (Labelled,), {"__init__": lambda self: (Labelled.__init__(self), setattr(self, "config", {}))[0]}
    )
    assert set(WRONG_NETWORKS) == set(names(check_network(full())))


@pytest.mark.parametrize(
    ("network", "more"),
    [
        (Net(), []),
        (variant(reads_tx=False), []),
        (Dropping(), []),
        (Saved(), ["save"]),
        (Labelled(), ["reads y", "reads guidance", "null class"]),
        (MLP(torch.randn(3, generator=rng(0)), torch.eye(3)), ["save"]),
        (MLP(torch.zeros(1), torch.eye(1), normalise=True, n_classes=3, reads_guidance=True), ALL),
        (MLP(torch.zeros(5).double(), torch.eye(5).double(), hidden=8), ["save"]),
        (UNet(torch.zeros(1, 8, 8), torch.eye(64), channels=[8, 16], blocks=1, n_classes=2, reads_guidance=True), ALL),
        (tiny_sit(), ALL),
        (tiny_sit(reads_tx=True, qk_norm=True), ALL),
    ],
    ids=lambda a: type(a).__name__ if isinstance(a, nn.Module) else "",
)
def test_networks_of_the_package_pass(network, more):
    """They are left as they are, too: weights, dtype, and mode; and torch's own generator with them."""
    before, mode, state = (
        {k: w.clone() for k, w in network.state_dict().items()},
        network.training,
        torch.get_rng_state(),
    )
    assert set(names(check_network(network))) == {*NETWORK_CHECKS, *more}
    assert network.training is mode
    assert torch.equal(torch.get_rng_state(), state)
    after = network.state_dict()
    assert all(torch.equal(w, after[k]) and w.dtype == after[k].dtype for k, w in before.items())


def test_what_a_network_need_not_have():
    """Forward mode may be waived, and a function may make the network from its config."""
    wrong = WRONG_NETWORKS["derivative"][1]
    assert names(check_network(wrong, forward_mode=False)) == [name for name in NETWORK_CHECKS if name != "derivative"]
    assert "save" in names(check_network(Misnamed(), make=lambda width: Misnamed()))


def test_a_failure_names_the_weights():
    assert "got none at spare.weight, spare.bias" in refuses("weights", check_network, Spare())


@pytest.mark.parametrize(
    ("wrong", "came"),
    [
        (3, "3 of type int"),
        (None, "None of type NoneType"),
        (Net, "<class .*> of type type"),
        (variant(velocity=None), "velocity=None"),
        (variant(shape=[3]), r"shape=\[3\], reads_tx=True"),
        (variant(reads_tx=1), r"shape=\(3,\), reads_tx=1"),
    ],
)
def test_what_is_no_network_is_named(wrong, came):
    must = "an nn.Module with a tuple shape, a bool reads_tx, and velocity"
    assert re.search(f": {must}; got {came}$", refuses("protocol", check_network, wrong))


def test_a_velocity_of_zeros_is_called_so():
    """Not the checks that divide by its size."""
    assert "a velocity that is not zero everywhere; got 0 where the least is" in refuses(
        "not zero", check_network, WRONG_NETWORKS["not zero"][0]
    )


# ---- objectives ----------------------------------------------------------------------------------------


def legs(X, r, w):
    """The semigroup law by its two legs, with a graph."""
    first = X.velocity(r.s, w, r.z, r.t, r.x, r.y)
    second = X.velocity(w, r.u, r.z + (w - r.s).unsqueeze(1) * first, r.t, r.x, r.y)
    return first, second


def law(X, r, w, **options):
    return semigroup_target(X, r.s, w, r.u, r.z, r.t, r.x, r.y, **options), velocity_size(r.s, r.std)


def own(X, r):
    with torch.no_grad():
        return X.velocity(r.s, r.u, r.z, r.t, r.x, r.y)


def middle(r):
    return (r.s + r.u) / 2


def either_order(X, r, drift, generator):
    """The product of two residuals: of the semigroup law, and of the law with its legs in the other order."""
    a, b = (middle(r) - r.s).unsqueeze(1), (r.u - middle(r)).unsqueeze(1)
    jump, (right, size) = (a + b) * own(X, r), law(X, r, middle(r))
    with torch.no_grad():
        first = X.velocity(middle(r), r.u, r.z, r.t, r.x, r.y)
        wrong = b * first + a * X.velocity(r.s, middle(r), r.z + b * first, r.t, r.x, r.y)
    return own(X, r) + (right - own(X, r)) * (wrong - jump), size


def teacher_without_context(X, r, drift, generator):
    b = X.velocity(r.s, r.s, r.z, r.t, r.x, r.y) if drift is None else drift(r.s, r.z)
    return mean_flow_target(X, r.s, r.u, r.z, r.t, r.x, b.detach(), r.y), velocity_size(r.s, r.std)


def quotient(X, r, drift, generator):
    """The semigroup law as a quotient of the jump, which is 0/0 where u = s."""
    w, (first, second) = middle(r), legs(X, r, middle(r))
    jump = (w - r.s).unsqueeze(1) * first + (r.u - w).unsqueeze(1) * second
    return (jump / (r.u - r.s).unsqueeze(1)).detach(), velocity_size(r.s, r.std)


def of_batch(X, r, drift, generator):
    return law(X, r, r.s + (r.u - r.s) * r.z.mean().sigmoid())


def without_generator(X, r, drift, generator):
    return law(X, r, r.s + (r.u - r.s) * torch.rand(len(r.s), dtype=r.s.dtype))


WRONG_OBJECTIVES = {
    "pair": [
        lambda X, r, drift, generator: shortcut(X, r, drift, generator)[0],
        lambda X, r, drift, generator: (shortcut(X, r, drift, generator)[0], torch.tensor(1.0)),
        lambda X, r, drift, generator: (own(X, r).mean(0), r.std),
        lambda X, r, drift, generator: (own(X, r).float(), r.std),
        lambda X, r: shortcut(X, r, None, None),
    ],
    "graph": [lambda X, r, drift, generator: (sum(legs(X, r, middle(r))) / 2, velocity_size(r.s, r.std))],
    "size": [
        lambda X, r, drift, generator: (own(X, r), r.s - 0.5),
        lambda X, r, drift, generator: (own(X, r), 0 * r.s),
    ],
    "finite": [quotient],
    "oracle": [
        lambda X, r, drift, generator: ((sum(legs(X, r, (2 * r.s + r.u) / 3)) / 2).detach(), velocity_size(r.s, r.std)),
        lambda X, r, drift, generator: (own(X, r._replace(x=0 * r.x)), r.std),
        mean_flow,
    ],
    "teacher": [teacher_without_context, semigroup],
    "Euler": [lambda X, r, drift, generator: (own(X, r), r.std)],
    "time reversed": [either_order],
    "generator": [without_generator],
    "rows": [of_batch],
    "labels": [lambda X, r, drift, generator: shortcut(X, r._replace(y=None), drift, generator)],
}


@pytest.mark.parametrize(("name", "wrong"), [(name, wrong) for name, all in WRONG_OBJECTIVES.items() for wrong in all])
def test_wrong_objectives_are_refused(name, wrong):
    refuses(name, check_objective, wrong)


def test_a_graph_is_named():
    message = refuses("graph", check_objective, WRONG_OBJECTIVES["graph"][0])
    assert message.endswith("without a graph; got target.requires_grad=True, size.requires_grad=False")


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", CONSISTENCY)
def test_objectives_of_the_package_pass(name, seed):
    """The semigroup law's teacher takes Runge–Kutta steps of 0.15 radians: 3e-4 in units of the size."""
    options = {"semigroup": {"teacher_error": 1e-3}, "mean_flow": {"from_data": True}}.get(name, {})
    results = check_objective(CONSISTENCY[name], seed=seed, **options)
    assert names(results) == list(WRONG_OBJECTIVES)


def turned(X, r, drift, generator):
    return mean_flow(X, r._replace(velocity=-r.velocity), drift, generator)


def diagonal_alone(X, r, drift, generator):
    """Noise of mean zero wherever the diagonal is right."""
    with torch.no_grad():
        b = X.velocity(r.s, r.s, r.z, r.t, r.x, r.y)
    return own(X, r) + r.velocity - b, r.std


@pytest.mark.parametrize(("name", "wrong"), [("oracle", turned), ("Euler", diagonal_alone)])
def test_wrong_objectives_from_data_are_refused(name, wrong):
    refuses(name, check_objective, wrong, from_data=True)


def test_what_passes_can_be_trained_with():
    """A new objective in the recipe: one step moves a network."""

    def thirds(X, r, drift, generator):
        return law(X, r, r.s + (r.u - r.s) / 3)

    check_objective(thirds)
    X = FlowMap(MLP(torch.zeros(2), torch.eye(2), hidden=8))
    meta_flow_map_loss(X, randn(8, 2, seed=0).float(), consistency=thirds, generator=rng(0)).backward()
    assert X.network.outlet.weight.grad.abs().max() > 0
