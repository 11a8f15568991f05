"""Fine-tuning on latents: the minimiser of the script's loss, measurements on the way, and runs that are broken off.

The base of the statistics is exact: one Gaussian a class, as in the tests of sampling, and the reward is quadratic, so
that p* is a Gaussian a class, too. The other networks are tiny, with random weights.
"""

import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from imagenet import finetune as script
from imagenet import posterior, sample
from imagenet import run as shared
from imagenet import train as distil
from imagenet.finetune import loss_of, open_work, states_of
from imagenet.finetune_measures import Measures
from imagenet.finetune_presets import FinetuneOptions
from imagenet.measures import diversity
from imagenet.npz import write_npz
from imagenet.rewards import LinearProbe
from imagenet.run import SAMPLES
from imagenet.sit import SiT
from mfm_ref import FlowMap
from mfm_ref.data import stream_seed
from mfm_ref.files import read_weights
from mfm_ref.gaussian import gaussian_posterior, gaussian_velocity
from mfm_ref.paper_recipe import RowLaw, draw_rows
from tests.helpers import LIMIT, z_scores
from tests.imagenet_tiny import tiny_latents, tiny_sit, tiny_vae
from tests.test_imagenet_sample import MEANS, VAR, Exact

ROOT = Path(__file__).parent.parent
TILT = torch.tensor([0.5, -0.4, 0.3, 0.2]).reshape(4, 1, 1)
SCALE = 1.5
HERE = "tests.test_imagenet_finetune"
KILLED = """
import os, signal, sys
from imagenet import finetune
from imagenet.finetune_measures import Measures

take, left = Measures.take, [2]

def take_and_die(*arguments):
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    left[0] -= 1
    return take(*arguments)

Measures.take = take_and_die
finetune.main(sys.argv[1:])
"""


def linear(x1):
    """a·x₁ of latents (B, 4, 1, 2)."""
    return (TILT * x1).sum((1, 2, 3))


def quadratic(x1):
    """a·x₁ − Σ x₁²/2 of latents (B, 4, 1, 2)."""
    return (TILT * x1 - x1.square() / 2).sum((1, 2, 3))


def level(x1):
    """The mean of a latent."""
    return x1.mean((1, 2, 3))


def black_box(x1):
    return torch.from_numpy(np.tanh(x1.numpy()).mean((1, 2, 3)))


black_box.differentiable = False


def deaf(x1):
    return x1.detach().mean((1, 2, 3))


def scalar(x1):
    return x1.mean()


def prompted(x1, prompts):
    return x1.mean((1, 2, 3)) + len(prompts[0])


# ---- the minimiser -------------------------------------------------------------------------------------


class Candidate(nn.Module):
    """b + gain(t) (b* − b) of class y, and what may be added to it: θ₀ + θ₁ x + θ₂ cos 3t."""

    shape, reads_tx, reads_guidance, null_class = Exact.shape, False, False, 2

    def __init__(self, gain):
        super().__init__()
        self.config, self.gain = {"context": True, "encoder_depth": 3}, gain
        self.theta = nn.Parameter(torch.zeros(3, 4, 1, 1))

    def velocity(self, s, u, z, t, context, y):
        assert not t.any() and not context.any() and torch.equal(s, u)  # a drift, in the empty context
        s = s.reshape(-1, 1, 1, 1)
        var = 1 / (1 / VAR + SCALE)  # N(m, v) e^{λ (a x − x²/2)}, by its exponent
        b = gaussian_velocity(s, s, z, MEANS[y], VAR)
        tilted = gaussian_velocity(s, s, z, var * (MEANS[y] / VAR + SCALE * TILT), var)
        return b + self.gain(s) * (tilted - b) + self.theta[0] + self.theta[1] * z + self.theta[2] * (3 * s).cos()


@functools.cache
def batches(blocks=30, rows=200):
    """As `GlobalBatches` gives them, of clean states that are uniform in a box."""
    g, found = torch.Generator().manual_seed(0), []
    for _ in range(blocks):
        x1, y = 4 * torch.rand((rows, *Exact.shape), generator=g) - 2, torch.randint(2, (rows,), generator=g)
        found.append(draw_rows(RowLaw("flow", "uniform", 2, drop=0.0), x1, y, [g] * rows))
    return found


def scores(gain, method, weight, earliest):
    """z-scores of the expected gradient of the script's loss at a candidate.

    t-statistics of 29 degrees of freedom, of which |z| > 5 has probability 3e-5.
    """
    options = {"method": method, "weight": weight, "earliest": earliest, "reward": f"{HERE}:quadratic"}
    config = FinetuneOptions(scale=SCALE, evaluate=4, decode=200, **options)
    work, student = open_work(config, FlowMap(Exact()), ["a", "b"], None), FlowMap(Candidate(gain))
    loss, found = loss_of(work, -2.0), []
    for batch in batches():
        found.append(torch.autograd.grad(loss(student, batch, None).terms["loss"], student.network.theta)[0])
    return z_scores(torch.stack(found).flatten(1), 0.0).abs()


def all_of_it(s):
    return torch.ones_like(s)


def clipped(s):
    """What a σ²/2 of at most 25 leaves of (1−t)/t."""
    return torch.minimum(torch.full_like(s, 25.0), (1 - s) / s) / ((1 - s) / s)


def published(s):
    return 100 / ((1 - s) / s)


@pytest.mark.parametrize(
    ("method", "weight", "earliest", "latest", "minimiser", "others"),
    [
        ("gradient", "exact", 0.1, 0.998, all_of_it, (torch.zeros_like,)),
        ("gradient", "bounded", 0.005, 0.04, all_of_it, (torch.zeros_like,)),
        ("gradient", "clipped", 0.005, 0.04, clipped, (torch.zeros_like, all_of_it)),
        ("gradient", "constant", 0.1, 0.998, published, (all_of_it,)),
        ("stein", "exact", 0.0, 0.998, all_of_it, (torch.zeros_like,)),
    ],
)
def test_the_expected_gradient_vanishes_at_the_doob_drift_and_not_elsewhere(
    method, weight, earliest, latest, minimiser, others, monkeypatch
):
    """Or where the page says: σ² clipped or held constant has another minimiser. Its choices differ at early times."""
    monkeypatch.setattr(script, "LATEST", latest)
    options = method, weight, earliest
    assert scores(minimiser, *options).max() < LIMIT
    for other in others:
        assert scores(other, *options).max() > LIMIT


def test_the_weights_bound_the_guidance():
    """w(t) σ⁴/4 for the choice bounded, and γ(t) σ²/2 for the others, against their formulas; at t = 0 too."""
    t = torch.tensor([0.0, 1e-3, 1 / 26, 0.3, 0.9], dtype=torch.float64)
    half = (1 - t) / t.clamp_min(1e-12)
    for name, at, expected in (
        ("bounded", 0, (25 / half).clamp_max(1) ** 2),
        ("clipped", 1, half.clamp_max(25) / half),
        ("constant", 1, 100 / half),
    ):
        assert torch.allclose(script.WEIGHTS[name][at](t), expected, atol=1e-9)
        assert script.WEIGHTS[name][1 - at] is None


def test_states_lie_on_the_path_of_their_noise():
    """I_t = (1−t) x₀ + t x₁ at times uniform in [earliest, 0.998], with posterior noises of their own."""
    g = torch.Generator().manual_seed(0)
    x1 = torch.randn(2000, 4, 1, 2, generator=g)
    rows, _ = draw_rows(RowLaw("flow", "uniform", 2, drop=0.0), x1, torch.arange(2000) % 2, [g] * 2000)
    t, x, eps = states_of(rows, 0.4)
    assert 0.4 <= t.min() < 0.41 and 0.98 < t.max() <= 0.998
    noise = (x - t.reshape(-1, 1, 1, 1) * x1) / (1 - t.reshape(-1, 1, 1, 1))
    assert torch.allclose(noise, x1 - rows.velocity, atol=1e-3, rtol=0)
    joint = torch.cat([noise, eps, x1], 1).flatten(1).double()
    cov = joint.T @ joint / len(joint)
    assert (cov - torch.eye(24)).abs().max() < 5 * (2 / 2000) ** 0.5
    assert torch.equal(rows.y, torch.arange(2000) % 2)


def test_the_loss_of_the_copy_is_that_of_the_guidance_alone(tiny):
    """Before any update b_θ is b, both with the guidance of the run: the loss is e^{λ r − c} ‖(σ²/2) ∇_x λ r(X)‖²."""
    options = {"weights": str(tiny / "mfm"), "guidance": 2.5, "reward": f"{HERE}:level", "scale": 30.0, "evaluate": 4}
    config, g = FinetuneOptions(**options), torch.Generator().manual_seed(0)
    X = FlowMap.from_pretrained(tiny / "mfm", network=SiT)
    work, y = open_work(config, X.eval().requires_grad_(False), None, None), torch.tensor([1, 0, 1])
    batch = draw_rows(RowLaw("flow", "uniform", 2, drop=0.0), torch.randn(3, 4, 8, 8, generator=g), y, [g] * 3)
    found = loss_of(work, 1.5)(script.open_student(config), batch, None).terms["loss"].detach()
    t, x, eps = states_of(batch[0], 0.0)
    x.requires_grad_()
    r = 30 * level(eps + X.velocity(0.0, 1.0, eps, t, x, y, 2.5))
    push = torch.autograd.grad(r.sum(), x)[0] * ((1 - t) / t).reshape(-1, 1, 1, 1)
    expected = (((r - 1.5).exp()) * push.square().sum((1, 2, 3))).mean()
    assert float(found) == pytest.approx(float(expected.detach()), rel=1e-3)


# ---- prompts and measures --------------------------------------------------------------------------------


def test_a_row_has_the_prompt_of_its_label(monkeypatch):
    seen = []

    def told(x1, prompts):
        seen.append(prompts)
        return x1.sum((1, 2, 3)) * 0

    monkeypatch.setattr(sys.modules[__name__], "told", told, raising=False)
    config = FinetuneOptions(reward=f"{HERE}:told", earliest=0.1, evaluate=4, prompt="one {class}, please")
    work = open_work(config, FlowMap(Exact()), ["apple", "pear"], None)
    assert [len(prompts) for prompts in seen] == [1]  # tried beforehand
    seen.clear()
    g, y = torch.Generator().manual_seed(0), torch.tensor([1, 0, 0])
    batch = draw_rows(RowLaw("flow", "uniform", 2, drop=0.0), torch.zeros(3, 4, 1, 2), y, [g] * 3)
    found = loss_of(work, 0.0)(FlowMap(Candidate(all_of_it)), batch, None)
    assert seen == [["one pear, please", "one apple, please", "one apple, please"]]
    assert {name: pair.tolist() for name, pair in found.watched.items()} == {"reward": [0, 3], "factor": [3, 3]}


def rewarded(names, classes, n_classes=2, prompt="a {class}"):
    """The prompts of the two first classes."""
    config = FinetuneOptions(reward=f"{HERE}:prompted", earliest=0.1, evaluate=4, prompt=prompt, names=str(names))
    network = Exact()
    network.null_class = n_classes
    work = open_work(config, FlowMap(network), classes, None)
    return work.measures.on_latents(work.measures.reward, torch.arange(2)).prompts


def test_names_are_those_of_the_file_of_imagenet_or_of_the_latents(tmp_path):
    path = tmp_path / "names.txt"
    path.write_text("apple\npear\n")
    assert rewarded(path, ["one", "two"]) == rewarded(path, None) == ["a apple", "a pear"]
    assert rewarded("", ["one", "two"]) == ["a one", "a two"]
    assert rewarded("", [f"n{k:08d}" for k in range(1000)], 1000)[1] == "a goldfish"
    assert rewarded("", None, prompt="fruit") == ["fruit", "fruit"]
    with pytest.raises(ValueError, match=r"needs the names of the classes, .*give --names FILE"):
        rewarded("", None)
    with pytest.raises(ValueError, match=r"labels must be from 0 to 0 to have a name, got 1"):
        rewarded("", ["one"])


def test_rewards_decode_no_more_than_asked_for(tiny):
    """In training and in evaluations."""
    seen = []

    class Decoder:
        def decode(self, x1):
            seen.append(len(x1))
            return x1

    config = FinetuneOptions(reward=f"{HERE}:level", earliest=0.1, evaluate=8, evaluate_batch=8, decode=3)
    work = open_work(config, FlowMap(Exact()), None, Decoder())
    assert seen == [1]
    work.measures.scores(work.measures.reward, torch.zeros(8, 4, 1, 2))
    assert seen[1:] == [3, 3, 2]
    seen.clear()
    g = torch.Generator().manual_seed(0)
    batch = draw_rows(RowLaw("flow", "uniform", 2, drop=0.0), torch.zeros(4, 4, 1, 2), torch.arange(4) % 2, [g] * 4)
    loss_of(work, 0.0)(FlowMap(Candidate(all_of_it)), batch, None)
    assert set(seen) == {3, 1}


def test_diversity_is_within_classes():
    x = torch.tensor([0.0, 3.0, 100.0, 101.0]).reshape(4, 1, 1, 1).expand(4, 4, 1, 1)
    assert diversity(x, torch.tensor([0, 0, 5, 5])) == pytest.approx((2 * 3 + 2 * 1) / 2)
    assert diversity(x[[0, 2, 1, 3]], torch.tensor([0, 5, 0, 5])) == pytest.approx(4)


# ---- whole runs ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A tiny MFM that reads t·x, an autoencoder, and clean latents of two classes."""
    root, g = tmp_path_factory.mktemp("tiny"), torch.Generator().manual_seed(1)
    FlowMap(tiny_sit("mfm", reads_tx=True)).save_pretrained(root / "mfm")
    FlowMap(tiny_sit("mfm")).save_pretrained(root / "reads-x")
    FlowMap(tiny_sit("mfm", guidance=[])).save_pretrained(root / "unguided")
    FlowMap(tiny_sit("sit")).save_pretrained(root / "sit")
    x1 = 0.8 * torch.randn(12, 4, 8, 8, generator=g)
    write_npz(root / "latents.npz", [x1.numpy()], np.arange(12) % 2)
    return root


def options_of(tiny, out, *options):
    """A run of 6 updates, on the command line."""
    line = f"--weights {tiny}/mfm --guidance 2.5 --latents {tiny}/latents.npz --reward {HERE}:level"
    line += f" --out {out} --scale 4 --steps 6 --batch 4 --lr 3e-3 --warmup 1 --evaluate 8 --evaluate-steps 3"
    return [
        *line.split(),
        "--evaluate-every",
        "2",
        "--checkpoint-every",
        "2",
        "--log-every",
        "1",
        "--evaluate-batch",
        "3",
        *options,
    ]


def lines_of(out):
    return [json.loads(line) for line in (out / "rewards.jsonl").read_text().splitlines()]


def bytes_of(out):
    return {path.name: path.read_bytes() for path in (out / "weights").iterdir()} | {
        name: (out / name).read_bytes() for name in ("rewards.jsonl", "settings.json")
    }


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """Such a run, unbroken."""
    out = tmp_path_factory.mktemp("whole") / "out"
    script.main(options_of(tiny, out))
    return out


def test_measures_are_those_of_the_euler_samples_of_the_average(tiny, whole):
    """The base's before the first update, and of the weights that are left; c is of the base's rewards alone."""
    lines = lines_of(whole)
    assert [line["step"] for line in lines] == [0, 2, 4, 6]
    for line, folder in ((lines[0], tiny / "mfm"), (lines[-1], whole / "weights")):
        X = FlowMap.from_pretrained(folder, network=SiT)
        sources = [torch.Generator().manual_seed(stream_seed(0, i, SAMPLES)) for i in range(8)]
        x = torch.stack([torch.randn(4, 8, 8, generator=source) for source in sources])
        y = script.labels_for("balanced", 2, 2).repeat_interleave(4)
        with torch.no_grad():
            for k in range(3):
                x = x + X.velocity(k / 3, k / 3, x, 0.0, torch.zeros_like(x), y, 2.5) / 3
        r = level(x).double()
        assert line["reward"] == pytest.approx([float(r.mean()), float(r.std() / 8**0.5)], abs=1e-5)
        within = [(x[i] - x[k]).norm() for i in range(8) for k in range(i) if y[i] == y[k]]
        assert line["diversity"] == pytest.approx(float(sum(within)) / len(within), rel=1e-5)
        if line["step"] == 0:
            c = json.loads((whole / "settings.json").read_text())["log_scale"]
            assert c == pytest.approx(float((4 * r).exp().mean().log()), abs=1e-4)
    assert all(line["diversity_of_base"] == lines[0]["diversity"] for line in lines)


class Learner(Exact):
    """Of class y the drift and the map of N(MEANS[y] + θ_y, VAR): with θ = λ VAR a that of p* for r = a·x₁."""

    def __init__(self):
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(3, 4, 1, 1))

    def velocity(self, s, u, z, t, context, y):
        s, u, t = (a.reshape(-1, 1, 1, 1) for a in (s, u, t))
        mean, std, _ = gaussian_posterior(t, t * context, MEANS[y] + self.theta[y], VAR)
        return gaussian_velocity(s, u, z, mean, std**2)


@pytest.mark.parametrize(
    ("method", "steps", "lr", "tolerance"), [("gradient", 100, 0.05, 0.02), ("stein", 200, 0.02, 0.3)]
)
def test_the_training_reward_rises_to_that_of_p_star(method, steps, lr, tolerance, tmp_path, monkeypatch):
    """By E_{p*}[a·x₁] − E_{p₁}[a·x₁] = λ aᵀ VAR a, with 10 % for Euler's steps; c is log E[e^{λ a·x₁}] of both classes.

    For a linear reward the gradient form has no noise at b*; Stein's form has that of the posterior samples.
    """
    y, g = torch.arange(256) % 2, torch.Generator().manual_seed(0)
    x1 = MEANS[y] + VAR.sqrt() * torch.randn(256, *Exact.shape, generator=g)
    write_npz(tmp_path / "x.npz", [x1.numpy()], y.numpy())
    (tmp_path / "w").touch()
    for module in (script, shared):
        monkeypatch.setattr(module, "load", lambda *_, **__: Learner())
    line = f"--weights {tmp_path}/w --latents {tmp_path}/x.npz --out {tmp_path}/out --reward {HERE}:linear --scale 0.7"
    line += f" --held-out {HERE}:black_box --method {method} --earliest 0.05 --lr {lr} --warmup 1"
    line += f" --decay 0.95 --clip 0 --batch 64 --steps {steps} --evaluate 512 --evaluate-batch 512"
    script.main(line.split())
    first, last = lines_of(tmp_path / "out")
    rise = 0.7 * 2 * float((TILT.square() * VAR).sum())
    assert last["reward"][0] - first["reward"][0] == pytest.approx(rise, rel=0.1 + tolerance)
    assert last["diversity"] == pytest.approx(first["diversity"], rel=1e-3)
    learnt = read_weights(tmp_path / "out" / "weights" / "model.safetensors")["network.theta"]
    aim = 0.7 * VAR * TILT
    assert (learnt[:2] - aim).abs().max() < tolerance * aim.abs().max()
    assert not learnt[2].any()  # the null class, which has no rows
    c = json.loads((tmp_path / "out" / "settings.json").read_text())["log_scale"]
    mean = 2 * (MEANS[:2] * TILT).sum((1, 2, 3))
    exact = float((0.7 * mean + 0.7 * rise / 2).exp().mean().log())
    assert c == pytest.approx(exact, abs=0.2)
    metrics = [json.loads(row) for row in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < row["factor"] < 50 and row["loss"] >= 0 for row in metrics)


# ---- runs that are broken off, shared, continued or refused ----------------------------------------------


@pytest.mark.parametrize("moment", ["a measurement", "a step"])
def test_a_run_that_was_broken_off_goes_on_to_the_same_numbers(moment, tiny, whole, tmp_path, monkeypatch):
    """After a checkpoint and before its measurement, or between checkpoints; also with other micro-batches."""
    broken, left = (
        (Measures, "take") if moment == "a measurement" else (script, "finetune_loss"),
        [2 + (moment == "a step")],
    )
    whole_function = getattr(*broken)

    def failing(*arguments, **options):
        left[0] -= 1
        if left[0] < 0:
            raise MemoryError
        return whole_function(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(*broken, failing)
        with pytest.raises(MemoryError):
            script.main(options_of(tiny, tmp_path / "out"))
    assert len(lines_of(tmp_path / "out")) == 2
    script.main(options_of(tiny, tmp_path / "out"))
    assert bytes_of(tmp_path / "out") == bytes_of(whole)


def test_images_are_rewarded_and_pictured(tiny, tmp_path):
    """With a VAE: the reward is of decoded samples, the first of which are in the grid, row by row; c has λ in it."""
    options = ("--vae", str(tiny_vae(tmp_path / "vae")), "--reward", "brightness", "--held-out", "redness;contrast")
    script.main(options_of(tiny, tmp_path / "out", *options, "--steps", "1", "--evaluate-every", "1"))
    for line in lines_of(tmp_path / "out"):
        with Image.open(tmp_path / "out" / f"grid-{line['step']:08d}.png") as page:
            colours = np.asarray(page).reshape(64, 8, 64, 3).mean((0, 2)) / 255  # (8, 3)
        luma = colours @ np.array([0.2126, 0.7152, 0.0722])
        assert line["reward"] == pytest.approx([luma.mean(), luma.std(ddof=1) / 8**0.5], abs=2e-3)
        red = colours[:, 0] - colours[:, 1:].mean(1)
        assert line["held_out"]["redness"][0] == pytest.approx(red.mean(), abs=2e-3)
        assert set(line["held_out"]) == {"redness", "contrast"}


def test_a_run_that_is_finished_is_kept(tiny, whole, tmp_path, monkeypatch):
    shutil.copytree(whole, tmp_path / "out")
    monkeypatch.setattr(Measures, "take", None)
    script.main(options_of(tiny, tmp_path / "out", "--evaluate-batch", "8", "--micro", "2"))
    assert bytes_of(tmp_path / "out") == bytes_of(whole)


def test_micro_batches_change_rounding_alone(tiny, whole, tmp_path):
    script.main(options_of(tiny, tmp_path / "out", "--micro", "1"))
    assert_same_run(tmp_path / "out", whole)


def assert_same_run(out, other):
    """Losses of the first steps to 1e-6; all else, as the rounding of updates grows, to 1e-4 of its size."""
    for name in ("rewards.jsonl", "metrics.jsonl"):
        for here, there in zip(*((folder / name).read_text().splitlines() for folder in (out, other)), strict=True):
            a, b = json.loads(here), json.loads(there)
            for key in a.keys() - {"seconds", "held_out"}:
                close = {"rel": 1e-6, "abs": 1e-6} if key == "loss" and a["step"] < 2 else {"rel": 1e-4}
                assert a[key] == pytest.approx(b[key], **close), (name, b)
    a, b = (read_weights(folder / "weights" / "model.safetensors") for folder in (out, other))
    assert all(torch.allclose(a[name], b[name], atol=1e-4) for name in b)


def subprocess_of(*command):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_two_processes_make_the_same_run(engine, tiny, whole, tmp_path):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "imagenet.finetune"]
    result = subprocess_of(*torchrun, *options_of(tiny, tmp_path / "out", "--engine", engine))
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("reward") == 1
    assert_same_run(tmp_path / "out", whole)


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_to_the_same_numbers(tiny, whole, tmp_path):
    """SIGKILL after the checkpoint of update 4, before its measurement."""
    result = subprocess_of("-c", KILLED, *options_of(tiny, tmp_path / "out"))
    assert result.returncode == -9, result.stderr
    assert len(lines_of(tmp_path / "out")) == 2
    script.main(options_of(tiny, tmp_path / "out"))
    assert bytes_of(tmp_path / "out") == bytes_of(whole)


def test_a_probe_is_known_by_what_is_in_it(tiny, tmp_path):
    """Moved it is the same, fitted again it is another one."""
    path, other = tmp_path / "probe.safetensors", tmp_path / "elsewhere" / "moved.safetensors"
    other.parent.mkdir()
    options = ("--steps", "1", "--evaluate-every", "1", "--prompt", "none")
    LinearProbe(torch.ones(4, 2, 2), torch.tensor(0.0)).save(path)
    script.main(options_of(tiny, tmp_path / "out", *options, "--reward", f"probe={path}"))
    shutil.move(path, other)
    moved = options_of(tiny, tmp_path / "out", *options, "--reward", f"probe={other}")
    script.main(moved)
    assert json.loads((tmp_path / "out" / "settings.json").read_text())["reward"] == f"probe={path}"
    LinearProbe(torch.zeros(4, 2, 2), torch.tensor(1.0)).save(other)
    with pytest.raises(SystemExit, match=r"belongs to another run \(reward was .*'sha256'"):
        script.main(moved)


def test_the_names_of_classes_belong_to_the_run(tiny, tmp_path):
    """Not the file that has them; and only where a prompt has one."""
    for name, names in (("a", "apple\npear"), ("b", "apple\npear\n"), ("c", "apple\nplum")):
        (tmp_path / name).write_text(names)
    options = ("--steps", "1", "--evaluate-every", "1", "--reward", f"{HERE}:prompted", "--names")
    for name in ("a", "b"):
        script.main(options_of(tiny, tmp_path / "out", *options, str(tmp_path / name)))
    with pytest.raises(SystemExit, match=r"belongs to another run \(names was '\w+' and is '\w+'\)"):
        script.main(options_of(tiny, tmp_path / "out", *options, str(tmp_path / "c")))
    for name in ("a", "c"):
        script.main(options_of(tiny, tmp_path / "blind", *options, str(tmp_path / name), "--prompt", "fruit"))


def test_a_folder_of_another_run_is_refused(tiny, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "out")
    with pytest.raises(SystemExit, match=r"belongs to another run \(scale was 4.0 and is 5.0\)"):
        script.main(options_of(tiny, tmp_path / "out", "--scale", "5"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    with pytest.raises(SystemExit, match=r"must be a new folder or one of this script, found thesis.tex"):
        script.main(options_of(tiny, tmp_path / "other"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--evaluate", "6"), "--evaluate must be a multiple of 4, as many are of a class, got 6"),
        (("--scale", "0"), "--scale must be positive and finite, got 0.0"),
        (("--earliest", "1"), r"--earliest must lie in \[0, 0.998\), got 1.0"),
        (("--method", "stein", "--weight", "clipped"), "--weight must be exact with --method stein"),
        (("--reward", ""), "--reward must be given, as the presets are for hpsv2=FILE"),
        (("--batch", "0"), "--batch must be an integer >= 1, got 0"),
        (("--evaluate-every", "0"), "--evaluate-every must be an integer >= 1, got 0"),
        (("--micro", "3"), "the global batch must be a multiple of micro times the number of processes, 3 · 1, got 4"),
        (("--reward", "beauty"), "reward must be .*, got 'beauty'"),
        (("--reward", f"{HERE}:black_box"), "--reward must be differentiable, .* use --method stein"),
        (("--weights", "sit", "--guidance", "1"), "--weights must be an MFM"),
        (("--weights", "unguided"), "--guidance must be 1, or an input of the network"),
        (("--weights", "reads-x"), "--earliest must be above 0, such as 0.01, for a map that reads x"),
        (("--reward", f"{HERE}:prompted", "--prompt", "a {class}"), "a prompt with {class} needs the names of the"),
        (("--names", "nowhere"), "--names must be a text file that can be read, got .*nowhere"),
        (("--decode", "0"), "--decode must be an integer >= 1, got 0"),
        (("--reward", "redness", "--held-out", "contrast;1*redness"), "--held-out must be rewards other than --reward"),
        (("--held-out", "contrast;contrast"), "--held-out must be rewards other than --reward, each once, got"),
        (("--reward", "brightness"), "--vae"),
        (("--held-out", "redness"), "--vae"),
        (("--reward", f"{HERE}:scalar"), r"scalar must give one number for each image, \(1,\), got \(\)"),
        (("--reward", f"{HERE}:deaf"), "--reward must have a gradient, and what it returns has none: use --method"),
        (("--guidance", "1.5"), r"--guidance must be one of the scales that these weights know, \[1.0, 2.5\], got 1.5"),
        (("--latents", "nowhere"), "latents.json is missing"),
        (("--latents", "wide.npz"), r"must have latents \(4, 8, 8\) and labels below 2"),
        (("--latents", "many.npz"), "labels below 2, .* up to 7"),
    ],
)
def test_bad_input_is_refused(options, message, tiny, tmp_path):
    x1 = np.zeros((8, 4, 8, 8), np.float32)
    write_npz(tiny / "wide.npz", [x1[:, :3]], np.zeros(8, np.int64))
    write_npz(tiny / "many.npz", [x1], np.arange(8))
    line = [
        str(tiny / a) if b in ("--weights", "--latents", "--names") else a
        for b, a in zip(("", *options), options, strict=False)
    ]
    with pytest.raises(SystemExit, match=f"^imagenet.finetune: .*{message}") as raised:
        script.main([*options_of(tiny, tmp_path / "out"), *line])
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()


# ---- presets ---------------------------------------------------------------------------------------------


def test_presets_are_the_papers_and_typed_options_win(monkeypatch):
    seen = []
    monkeypatch.setattr(script, "run", lambda config, process: seen.append(config))
    for line in ("--preset hpsv2-50", "--preset hpsv2-10 --scale 3 --weight exact", "--preset hpsv2-25 --steps 7"):
        script.main(line.split())
    paper, typed, short = seen
    assert (paper.scale, typed.scale, short.scale) == (50, 3, 25)
    assert (paper.steps, paper.batch, paper.lr, paper.warmup) == (10000, 18, 1e-4, 250)
    assert (paper.decay, paper.clip, paper.guidance, paper.reward) == (0.999, 1.5, 2.5, "")
    assert (paper.precision, paper.evaluate_every, paper.evaluate, paper.weight) == ("bfloat16", 500, 512, "constant")
    assert (typed.weight, short.steps) == ("exact", 7)


def test_the_result_is_sampled_and_distilled_into_a_flow_map(tiny, whole, tmp_path):
    """As the page says: samples of the fine-tuned drift, and a flow map whose diagonal comes to be that drift."""
    weights = f"{whole}/weights"
    sample.main(f"--weights {weights} --guidance 2.5 --method euler --steps 3 --count 24 --out {tmp_path}/x".split())
    line = f"--stage map --teacher {weights} --guidance 2.5 --drop 0 --latents {tmp_path}/x/latents.npz --size tiny"
    line += f" --out {tmp_path}/map --batch 8 --steps 40 --lr 3e-3 --warmup 5 --decay 0.9 --sample-every 0"
    distil.main([*line.split(), "--log-every", "1"])
    metrics = [json.loads(row) for row in (tmp_path / "map" / "metrics.jsonl").read_text().splitlines()]
    middle = [row["diagonal_s0.4"] for row in metrics if "diagonal_s0.4" in row]
    assert np.mean(middle[-10:]) < 0.8 * np.mean(middle[:10])
    samples = f"--weights {tmp_path}/map/weights --method map --steps 1 --count 4 --out {tmp_path}/jumps"
    sample.main(samples.split())


def test_the_result_is_a_drift_alone(tiny, whole, tmp_path):
    """What needs its jumps or contexts is refused, where its drift does is not."""
    weights = f"{whole}/weights"
    assert json.loads((whole / "weights" / "config.json").read_text())["drift_only"] is True
    for method, steps in (("posterior", "1"), ("posterior", "3"), ("map", "2")):
        with pytest.raises(SystemExit, match=f"--method {method} needs jumps, .*: use --method euler"):
            sample.main(["--weights", weights, "--out", f"{tmp_path}/x", "--method", method, "--steps", steps])
    line = f"--weights {weights} --latents {tmp_path}/latents --out {tmp_path}/p --contexts 2 --draws 1 --times 0.5"
    tiny_latents(tmp_path / "latents")
    with pytest.raises(SystemExit, match=r"mfm needs a network with a context, and fine-tuned weights have none"):
        posterior.main([*line.split(), "--methods", "mfm"])
    rollouts = "--methods glass,sde --glass-steps 1 --sde-steps 1"
    posterior.main([*line.split(), *rollouts.split()])
    line = line.replace(f"--weights {weights}", f"--weights {tiny}/mfm --teacher {weights}").replace("/p ", "/q ")
    posterior.main([*line.split(), *rollouts.split()])
    with pytest.raises(SystemExit, match=r"--weights must be an MFM: .* and these are of a drift that was fine-tuned"):
        script.main(options_of(tiny, tmp_path / "out", "--weights", weights))


def test_weights_that_a_killed_process_left_are_written_again(tiny, whole, tmp_path):
    """Between the weights and their mark, with a file half written."""
    shutil.copytree(whole, tmp_path / "out")
    path = tmp_path / "out" / "weights" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in config.items() if name != "drift_only"}))
    path.with_name(".123.config.json").touch()
    script.main(options_of(tiny, tmp_path / "out"))
    assert bytes_of(tmp_path / "out") == bytes_of(whole)


def test_without_a_scale_the_largest_that_the_weights_know_is_taken(tiny, whole, tmp_path):
    """A run that named it goes on, and is the same."""
    shutil.copytree(whole, tmp_path / "out")
    line = options_of(tiny, tmp_path / "out")
    at = line.index("--guidance")
    script.main(line[:at] + line[at + 2 :])
    assert bytes_of(tmp_path / "out") == bytes_of(whole)


def test_blocks_are_compiled_where_that_is_asked_for(tiny, tmp_path, monkeypatch):
    """Those of the student; the copy that is averaged is not compiled, nor does it share the student's weights."""
    calls = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: calls.append((type(self).__name__, options)))
    student = script.open_student(FinetuneOptions(weights=str(tiny / "mfm"), compile=True))
    assert calls == 4 * [("Block", {"dynamic": False})]
    assert student.training and all(p.requires_grad for p in student.network.blocks.parameters())
