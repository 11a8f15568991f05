"""The benchmarks run, and the floors in their table are the passes that the losses make. Nothing here is timed."""

import dataclasses
import json
from collections import Counter

import pytest
import torch
from torch import nn
from torch.autograd.forward_ad import unpack_dual
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import imagenet, imagenet_training, objectives, steering
from benchmarks.imagenet import ImagenetConfig
from benchmarks.objectives import OBJECTIVES, BenchmarkConfig, Passes, loss_of
from benchmarks.steering import SteeringConfig, loop_drift
from benchmarks.transformer import Transformer
from imagenet import sit
from imagenet.cost import flops_of
from mfm_ref import FlowMap, doob_drift
from mfm_ref.noise import posterior_noise
from mfm_ref.paper_recipe import PaperRows
from tests.strategies import randn

pytestmark = pytest.mark.filterwarnings("ignore:Profiler clears events:UserWarning")


class Rows(Counter):
    """Rows of a network's passes; copies of the network count in the same place."""

    def __deepcopy__(self, memo):
        return self


class Counted(nn.Module):
    """A network that counts its own passes."""

    shape, reads_tx = (2,), True

    def __init__(self):
        super().__init__()
        self.layer, self.rows = nn.Linear(7, 2), Rows()

    def velocity(self, s, u, z, t, context, y=None):
        dual = any(unpack_dual(a).tangent is not None for a in (s, u, z))
        self.rows["derivative" if dual else "forward"] += len(z)
        v = self.layer(torch.cat([z, context, torch.stack([s, u, t], -1)], -1))
        if v.requires_grad:
            v.register_hook(lambda gradient: self.rows.update(backward=len(gradient)))
        return v


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda objective: objective.name)
def test_floors_are_the_passes_that_are_made(objective):
    network = Counted()
    X = FlowMap(network)
    loss_of(objective, X)(X, torch.randn(8, 2)).backward()
    assert Passes(**{kind: rows / 8 for kind, rows in network.rows.items()}) == objective.passes


def test_floors_count_a_backward_pass_and_a_derivative_twice():
    assert Passes(1).floor == 3
    assert Passes(1.5, 1, 0.5).floor == 4.5


def test_the_benchmark_runs_and_writes_what_it_prints(tmp_path):
    report = objectives.main(BenchmarkConfig(out=tmp_path, fast=True, date="2000-01-01"))
    assert json.loads((tmp_path / "objectives.json").read_text()) == report
    assert report["date"] == "2000-01-01"
    for result in report["networks"].values():
        assert list(result["objectives"]) == [objective.name for objective in OBJECTIVES]
        plain = result["objectives"]["flow matching"]
        assert plain["to_plain"] == plain["over_floor"] == 1
        assert all(value > 0 for value in result["memory"].values())
    printed = objectives.tables(report)
    assert all(printed.count(f"| {objective.name} |") >= 2 for objective in OBJECTIVES)  # one for each network


def test_a_target_without_a_graph_needs_the_memory_of_plain_flow_matching():
    """Bytes are counted, not timed: one pass with a graph keeps the graph of the tangent as well."""
    X, x1 = objectives.networks(BenchmarkConfig(transformer_batch=4))["transformer"]
    plain, without, one_pass = objectives.memory_of(BenchmarkConfig(), X, x1).values()
    assert without < 1.2 * plain < 2 * plain < one_pass


# ---- the guided step -----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", steering.METHODS)
@pytest.mark.parametrize("network", ["mlp", "transformer"])
def test_the_loop_computes_what_the_step_computes(network, method):
    """In double precision, on the same noises, sample by sample and draw by draw."""
    X, reward, x = steering.networks(SteeringConfig(mlp_batch=3, transformer_batch=2))[network]
    X, x = X.double(), x.double()
    if network == "mlp":
        x = x / 10  # a reward this steep leaves one weight elsewhere
    eps = posterior_noise(4, x, "independent", generator=torch.Generator().manual_seed(0))
    looped = loop_drift(X, reward, 0.5, x, eps, method)
    step = doob_drift(X, reward, 0.5, x, 4, method, eps=eps)
    assert looped.shape == x.shape
    assert float((looped - step).abs().max() / looped.abs().max()) < 1e-9
    other = doob_drift(X, reward, 0.5, x, 4, "stein", eps=eps)
    assert float((looped - other).abs().max() / looped.abs().max()) > 1e-3


@pytest.mark.parametrize("method", steering.METHODS)
def test_the_bound_is_of_the_passes_of_a_step(method):
    """3N+1 a state, a backward pass as two: on both sides the same rows, and in the same batches in the second one."""
    network = Counted()
    X, x, n = FlowMap(network), torch.randn(8, 2), 4

    def rows(run) -> Counter:
        network.rows.clear()
        run()
        return Counter(network.rows)

    step = rows(steering.guided_step(X, lambda x1: x1.sum(-1), x, n, method, torch.Generator().manual_seed(0)))
    assert step == {"forward": 8 * (n + 1), "backward": 8 * n}
    for batches in ([1] * (3 * n + 1), [n, n, n, 1]):
        bare = rows(steering.bare_passes(X, x, batches))
        assert bare == {"forward": step["forward"] + 2 * step["backward"]}


def test_the_steering_benchmark_runs_and_writes_what_it_prints(tmp_path):
    report = steering.main(SteeringConfig(out=tmp_path, fast=True, date="2000-01-01"))
    assert json.loads((tmp_path / "steering.json").read_text()) == report
    assert report["date"] == "2000-01-01"
    for result in report["networks"].values():
        assert list(result["draws"]) == [str(n) for n in steering.DRAWS]
        for methods in result["draws"].values():
            assert list(methods) == list(steering.METHODS)
            assert all(value > 0 for times in methods.values() for value in times.values())
    assert steering.tables(report).count("\n") == 1 + 2 * 2 * 2  # header, rule, and networks by draws by methods


# ---- the transformer -----------------------------------------------------------------------------------


def tiny() -> Transformer:
    torch.manual_seed(0)
    return Transformer((2, 4, 6), patch=2, width=8, depth=2, heads=2).double()


def test_forward_mode_derivatives_of_the_transformer_equal_finite_differences():
    """In (s, u, z) together; central differences, h² error at h = 1e-5."""
    network = tiny()
    s, u, t = torch.rand(3, 5, dtype=torch.float64)
    z, x, direction = (randn(5, 2, 4, 6, seed=k) for k in range(3))

    def v(h):
        return network.velocity(s + h, u - 2 * h, z + h * direction, t, x)

    zero = torch.zeros((), dtype=torch.float64)
    slope = torch.func.jvp(v, (zero,), (zero + 1,))[1]
    assert float((slope - (v(1e-5) - v(-1e-5)) / 2e-5).detach().abs().max()) < 1e-7
    assert float(slope.detach().abs().max()) > 0.1


def test_tokens_are_the_patches():
    network = tiny()
    image = randn(3, 2, 4, 6, seed=0)
    tokens = network.to_tokens(image)
    assert tokens.shape == (3, 6, 8)
    assert torch.equal(tokens[:, 4], image[:, :, 2:4, 2:4].flatten(1))  # second row, second column
    assert torch.equal(network.to_image(tokens), image)


def test_sizes_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="must divide"):
        Transformer((1, 5, 4))


def test_operations_of_a_pass_are_those_that_torch_counts(monkeypatch):
    """Of the matrix products one by one, with attention written out: the fused kernel is not counted on a CPU."""
    monkeypatch.setattr(sit, "differentiating", lambda: True)
    network = sit.build("tiny", "mfm", shape=[4, 8, 8], guidance=[1.0, 2.5])
    z, time = torch.randn(3, *network.shape), torch.rand(3)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network.velocity(time, time, z, time, z)
    assert counter.get_total_flops() == 3 * flops_of(network)


def test_operations_of_the_large_network():
    """24 N d² + 4 N² d in each of 28 blocks of width 1152 and 256 tokens, and 0.2 % for all else."""
    with torch.device("meta"):
        network = sit.build("XL/2", "mfm")
    blocks = 28 * (24 * 256 * 1152**2 + 4 * 256**2 * 1152)
    assert blocks < flops_of(network) < 1.003 * blocks


def test_the_benchmark_of_the_transformer_runs_and_writes_what_it_prints(tmp_path):
    config = ImagenetConfig(
        out=tmp_path, size="tiny", side=8, batches="1,2", precision="float32", compile=False, product=64, repeats=1,
        calls=1, warm_up=1, device="cpu", threads=1, date="2026-01-31",
    )  # fmt: skip
    report = imagenet.main(config)
    assert json.loads((tmp_path / "imagenet.json").read_text()) == report
    assert [(row["batch"], row["steps"]) for row in report["rows"]] == [(1, 1), (1, 4), (2, 1), (2, 4)]
    assert imagenet.tables(report).count("\n") == 5
    for row in report["rows"]:
        assert row["samples_per_second"] == pytest.approx(row["batch"] / row["seconds"])
        assert row["utilisation"] == pytest.approx(row["flops_per_second"] / report["matrix_rate"])


TINY_TRAINING = imagenet_training.TrainingConfig(
    size="tiny", side=8, batches="3", precision="float32", compile=False, product=64, repeats=1, warm_up=1, draws=2,
    samples="1", device="cpu", threads=1, date="2026-01-31",
)  # fmt: skip


def test_the_released_composition_is_the_same_loss():
    """And the same gradient, to rounding: what is compared in speed does the same."""
    X, teacher = imagenet_training.networks(TINY_TRAINING)
    X, teacher.X = X.double(), teacher.X.double()
    rows = PaperRows(
        *(a.double() if a.is_floating_point() else a for a in imagenet_training.rows_of(TINY_TRAINING, 5, 1000))
    )
    found = []
    for composition in (imagenet_training.ours, imagenet_training.released):
        X.zero_grad()
        loss = composition(X, teacher, rows)
        loss.backward()
        gradients = [p.grad.flatten() for p in X.parameters() if p.requires_grad]
        found.append(torch.cat([loss.detach().reshape(1), *gradients]))
    assert found[0][1:].norm() > 1
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-9)


def test_the_benchmark_of_training_runs_and_writes_what_it_prints(tmp_path):
    report = imagenet_training.main(dataclasses.replace(TINY_TRAINING, out=tmp_path))
    assert json.loads((tmp_path / "imagenet-training.json").read_text()) == report
    ours, released = report["steps"]
    assert (ours["composition"], released["composition"]) == ("ours, eager", "released, eager")
    assert ours["floor_utilisation"] / ours["utilisation"] == pytest.approx(9 / 10)
    over = released["seconds"] / ours["seconds"]
    table = imagenet_training.tables(report)
    assert f"| {over:.2f} |" in table and "| 1.00 |" in table
    assert f"| {report['guided'][0]['steps_per_second']:.2f} |" in table
