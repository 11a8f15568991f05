"""The transformer on a GPU: the vectors, precisions, attention, derivatives and compilation. Skipped without one."""

import numpy as np
import pytest
import torch

from imagenet import sample, steer
from imagenet.npz import first_rows
from imagenet.sit import build
from mfm_ref import FlowMap, sample_posterior
from mfm_ref.forward_mode import derivative
from tests.test_imagenet_checkpoints import NAMES, TOLERANCE, outputs, vector

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("default"),  # of the torch that is there
]


@pytest.fixture(autouse=True)
def full_precision(monkeypatch):
    """float32 as such: convolutions have their inputs rounded on a GPU otherwise."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def random_network(**options):
    torch.manual_seed(0)
    options = {"shape": [4, 16, 16], "n_classes": 10, "guidance": [1.0, 2.5], "width": 144, "heads": 2, **options}
    network = build("tiny", "mfm", **options)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return network


def arguments(batch=6):
    generator = torch.Generator().manual_seed(1)
    z, x, along = torch.randn(3, batch, 4, 16, 16, generator=generator)
    s, t, w = torch.rand(3, batch, generator=generator)
    return {
        "s": s, "u": s + (1 - s) * w, "z": z, "t": t, "x": x,
        "y": torch.arange(batch), "guidance": torch.where(w > 0.5, 2.5, 1.0), "along": along,
    }  # fmt: skip


def velocity(network, a, device="cuda", dtype=torch.float32):
    """v and its derivative along (1, along) in (s, z), on a device."""
    network = network.to(device, dtype)
    a = {name: value.to(device, dtype if value.is_floating_point() else None) for name, value in a.items()}

    def of(s, z):
        return network.velocity(s, a["u"], z, a["t"], a["x"], a["y"], a["guidance"])

    with torch.no_grad():
        v = of(a["s"], a["z"])
        slope = derivative(of, (a["s"], a["z"]), (torch.ones_like(a["s"]), a["along"]))[1]
    return v, slope


def relative(found, right):
    return float((found.double().cpu() - right).norm() / right.norm())


@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_those_of_the_projects_code(name):
    network = vector(name).network().cuda()
    for inputs, wanted in vector(name).batches:
        if inputs:
            with torch.no_grad():
                made = outputs(vector(name).kind, FlowMap(network), {k: a.cuda() for k, a in inputs.items()})
            for key, value in made.items():
                assert float((value.cpu() - wanted[key][: len(value)]).abs().max()) < TOLERANCE, key


@pytest.mark.parametrize("compiled", [False, True])
def test_precisions_against_double_on_a_cpu(compiled):
    """float32: rounding; bfloat16: its 8 bits, through the fused kernel and the explicit attention."""
    network, a = random_network(), arguments()
    v, slope = velocity(network, a, "cpu", torch.float64)
    network.float()
    if compiled:
        network.velocity = torch.compile(network.velocity)
    found = velocity(network, a)
    assert relative(found[0], v) < 1e-5 and relative(found[1], slope) < 1e-4
    with torch.autocast("cuda", torch.bfloat16):
        rounded = velocity(network, a)
    assert rounded[0].dtype == torch.bfloat16
    assert relative(rounded[0], v) < 3e-2 and relative(rounded[1], slope) < 6e-2


def test_gradients_pass_through_a_sample_in_bfloat16():
    """As steering takes them: of a posterior sample in its context, checkpointed or not."""
    network, a = random_network(), {name: value.cuda() for name, value in arguments().items()}
    X, found = FlowMap(network.cuda()), []
    for checkpointing in (False, True):
        network.checkpointing = checkpointing
        x = a["x"].clone().requires_grad_()
        with torch.autocast("cuda", torch.bfloat16):
            draws = sample_posterior(X, a["t"], x, 1, y=a["y"], eps=a["z"].unsqueeze(0))
        found.append(torch.autograd.grad(draws.float().square().sum(), x)[0])
    assert bool(torch.isfinite(found[0]).all()) and float(found[0].norm()) > 0
    assert torch.equal(*found)


def test_a_script_gives_the_same_samples_as_on_a_cpu(tmp_path):
    """Up to rounding: their noise is drawn on the CPU. Four steps of E19, and the drift by Heun's rule."""
    FlowMap(random_network(width=48, heads=4).cpu()).save_pretrained(tmp_path / "weights")
    common = ["--weights", str(tmp_path / "weights"), "--guidance", "2.5", "--count", "5", "--batch", "3"]
    for method in ("posterior", "heun"):
        found = {}
        for device, more in (("cpu", []), ("cuda", []), ("cuda", ["--compile", "--precision", "bfloat16"])):
            out = tmp_path / f"{method}-{device}-{len(more)}"
            sample.main([*common, "--method", method, "--steps", "4", "--device", device, "--out", str(out), *more])
            with np.load(out / "latents.npz") as arrays:
                found[device + str(len(more))] = torch.from_numpy(arrays["arr_0"]).double()
        assert relative(found["cuda0"], found["cpu0"]) < 1e-4
        assert 1e-4 < relative(found["cuda3"], found["cpu0"]) < 0.1


def test_steered_samples_are_those_of_the_cpu(tmp_path):
    """The noises of a sample are drawn on the CPU; draws take turns, and the graph is that of the compiled network."""
    FlowMap(random_network(reads_tx=True)).save_pretrained(tmp_path / "mfm")
    common = ["--weights", str(tmp_path / "mfm"), "--guidance", "2.5", "--count", "3", "--batch", "3", "--steps", "3"]
    common += ["--reward", "tests.test_imagenet_steer:pull", "--scale", "5", "--draws", "4", "--memory", "0.001"]
    methods = {"base": "base", "mfm-c": "mfm-c-4", "mfm-gf": "mfm-gf-4", "dps": "dps-4", "search": "search-4"}
    for device, more in (("cpu", []), ("cuda", []), ("cuda", ["--compile"])):
        out = tmp_path / f"{device}{len(more)}"
        steer.main([*common, "--methods", ",".join(methods), "--device", device, "--out", str(out), *more])
    for folder in methods.values():
        of_cpu, plain, compiled = (
            torch.from_numpy(first_rows(tmp_path / run / folder / "latents.npz", 3)).double()
            for run in ("cpu0", "cuda0", "cuda1")
        )
        assert relative(plain, of_cpu) < 1e-3
        assert relative(compiled, of_cpu) < 1e-3
