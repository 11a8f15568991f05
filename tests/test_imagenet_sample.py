"""Sampling: the law of every method, seeds of samples, files, and runs that are shared, killed or refused.

The networks of the statistics are exact: the Meta Flow Map of one Gaussian a class, whose samples are known functions
of their noise. The others are tiny, with random weights.
"""

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

from imagenet import run as shared
from imagenet import sample as script
from imagenet.checkpoints import load, to_state
from imagenet.commands import check_device
from imagenet.npz import first_rows, write_npz
from imagenet.run import SAMPLES, grid, labels_for
from imagenet.vae import VAE, to_uint8
from mfm_ref import FlowMap
from mfm_ref.data import stream_seed
from mfm_ref.gaussian import gaussian_posterior, gaussian_velocity
from tests.helpers import LIMIT, moment_scores
from tests.imagenet_tiny import tiny_sit, tiny_vae

ROOT = Path(__file__).parent.parent
KILLED = """
import os, signal, sys
from imagenet import sample
from imagenet.shards import Shards

write, left = Shards.write, [2]

def write_and_die(*arguments):
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    left[0] -= 1
    write(*arguments)

Shards.write = write_and_die
sample.main(sys.argv[1:])
"""
VAR = torch.tensor([0.2, 0.5, 1.3, 2.0]).reshape(4, 1, 1)
MEANS = torch.tensor([[1.0, -0.5, 0.0, 2.0], [-1.0, 1.5, 0.7, 0.3], [0.2, 0.1, -0.3, -1.0]]).reshape(3, 4, 1, 1)


class Exact(nn.Module):
    """Class y is N(MEANS[y], VAR), independently in each entry; label 2 is the null class."""

    shape, reads_tx, reads_guidance, null_class = (4, 1, 2), False, False, 2

    def __init__(self, kind: str = "mfm"):
        super().__init__()
        self.config = {"context": kind == "mfm", "encoder_depth": None if kind == "sit" else 3}

    def velocity(self, s, u, z, t, context, y=None):
        s, u, t = (a.reshape(-1, 1, 1, 1) for a in (s, u, t))
        mean = MEANS[torch.full((len(z),), 2) if y is None else y]
        if self.config["context"]:
            mean, std, _ = gaussian_posterior(t, t * context, mean, VAR)
        else:
            std = VAR.sqrt()
        return gaussian_velocity(s, u if self.config["encoder_depth"] else s, z, mean, std**2)


@pytest.fixture
def exact(monkeypatch, tmp_path):
    """Samples of an exact network: `exact("sit", "--method", "euler")` gives latents, labels and settings.json."""
    (tmp_path / "weights").write_text("any")
    count = iter(range(100))

    def samples(kind, *options):
        monkeypatch.setattr(shared, "load", lambda *_, **__: Exact(kind))
        out = tmp_path / str(next(count))
        script.main(["--weights", str(tmp_path / "weights"), "--out", str(out), *map(str, options)])
        with np.load(out / "latents.npz") as file:
            x, y = (torch.from_numpy(file[name]) for name in ("arr_0", "arr_1"))
        return x, y, json.loads((out / "settings.json").read_text())

    return samples


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Folders with tiny networks of each kind and an autoencoder."""
    root = tmp_path_factory.mktemp("tiny")
    for kind in ("sit", "mfm"):
        FlowMap(tiny_sit(kind, n_classes=3)).save_pretrained(root / kind)
    FlowMap(tiny_sit("dmf", n_classes=3, noise_times=True)).save_pretrained(root / "dmf")
    tiny_vae(root / "vae")
    return root


def noises(i: int, count: int, shape=Exact.shape, seed: int = 0) -> torch.Tensor:
    """The first noises of sample i, by its own seed."""
    source = torch.Generator().manual_seed(stream_seed(seed, i, SAMPLES))
    return torch.stack([torch.randn(shape, generator=source) for _ in range(count)])


# ---- the law of the samples ------------------------------------------------------------------------------


def score(x, y, label, mean=None):
    """Moments of the samples of one class, in standard errors."""
    found = x[y == label].flatten(1).double()
    mean = (MEANS[label] if mean is None else mean).expand(4, 1, 2).flatten().double()
    return moment_scores(found, mean, torch.diag(VAR.expand(4, 1, 2).flatten().double()))


@pytest.mark.parametrize(
    ("kind", "method", "steps", "each"),
    [
        ("mfm", "posterior", 1, 1), ("mfm", "posterior", 3, 3), ("dmf", "posterior", 1, 1), ("mfm", "map", 2, 2),
        ("dmf", "map", 3, 3), ("sit", "euler", 60, 60), ("dmf", "heun", 10, 20), ("mfm", "dopri5", 3, 18),
        ("sit", "sde", 100, 100),
    ],
)  # fmt: skip
def test_every_method_samples_the_classes(exact, kind, method, steps, each):
    """And counts its evaluations."""
    x, y, settings = exact(kind, "--method", method, "--steps", steps, "--seed", 1, "--count", 1600, "--batch", 800)
    assert x.shape == (1600, 4, 1, 2) and x.dtype == torch.float32
    assert max(score(x, y, label) for label in (0, 1)) < LIMIT
    assert score(x, y, 0, MEANS[1]) > LIMIT
    assert settings["evaluations_per_sample"] == each


def test_few_steps_of_euler_do_not(exact):
    """The judgement above sees a wrong law."""
    x, y, _ = exact("sit", "--method", "euler", "--steps", 3, "--count", 1000, "--batch", 400)
    assert score(x, y, 0) > LIMIT


def test_one_noise_for_all_samples_does_not(exact, monkeypatch):
    monkeypatch.setattr(script, "generators", lambda seed, rows: shared.generators(seed, [0] * len(rows)))
    x, y, _ = exact("mfm", "--count", 400, "--batch", 200)
    assert torch.equal(x[y == 0][0], x[y == 0][1])


@pytest.mark.parametrize(
    ("kind", "options", "tolerance"),
    [
        ("mfm", ("--method", "map"), 1e-5),
        ("dmf", ("--method", "map", "--steps", 3), 1e-5),
        ("sit", ("--method", "dopri5", "--steps", 20), 1e-4),
        ("mfm", ("--method", "heun", "--steps", 100), 2e-3),
    ],
)
def test_the_flow_carries_each_noise_to_its_sample(exact, kind, options, tolerance):
    """X_{0,1}(ε) = mean + std ε, with the noise that belongs to the number of the sample."""
    x, y, _ = exact(kind, *options, "--count", 7, "--batch", 3, "--seed", 5, "--labels", "random")
    for i in range(7):
        expected = MEANS[y[i]] + VAR.sqrt() * noises(i, 1, seed=5)[0]
        assert torch.allclose(x[i], expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize(("method", "share"), [("euler", 0.0), ("heun", 0.5)])
def test_one_step_along_the_drift(exact, method, share):
    """b₀ = m − ε leads to m, and b₁(m) = m: Euler's step ends at m, Heun's at m + ε/2, the midpoint's elsewhere."""
    x, y, _ = exact("sit", "--method", method, "--steps", 1, "--count", 3)
    for i in range(3):
        assert torch.allclose(x[i], MEANS[y[i]] + share * noises(i, 1)[0], atol=1e-5, rtol=0)


def test_few_steps_are_e19(exact):
    """Two draws of the posterior, written out for one Gaussian: four noises, used in turn."""
    x, y, _ = exact("mfm", "--steps", 2, "--count", 5, "--batch", 2)
    for i in range(5):
        _, eps, fresh, eps2 = noises(i, 4)
        mean, middle = MEANS[y[i]], (0.5 * fresh + 0.5 * (MEANS[y[i]] + VAR.sqrt() * eps))
        gain = 0.5 * VAR / (0.25 * VAR + 0.25)  # of the posterior at t = 1/2
        posterior = mean + gain * (middle - 0.5 * mean)
        std = (VAR - gain * 0.5 * VAR).sqrt()
        assert torch.allclose(x[i], posterior + std * eps2, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "options", [("--count", 4), ("--count", 11), ("--count", 11, "--batch", 4), ("--count", 11, "--batch", 1)]
)
@pytest.mark.parametrize("labels", ["balanced", "random", "1"])
def test_a_sample_depends_neither_on_n_nor_on_the_batch(exact, options, labels):
    x, y, _ = exact("mfm", "--steps", 2, "--labels", labels, *options)
    whole, labels_of_all, _ = exact("mfm", "--steps", 2, "--count", 11, "--batch", 6, "--labels", labels)
    assert torch.equal(y, labels_of_all[: len(y)])
    assert torch.allclose(x, whole[: len(x)], atol=1e-5, rtol=0)


# ---- guidance --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options", "channels"),
    [("sit", (), 3), ("sit", ("--guided-channels", 4), 4), ("sit", ("--guided-channels", 1), 1), ("dmf", (), 4)],
)
def test_classifier_free_guidance_moves_the_mean(exact, kind, options, channels):
    """Gaussians of one variance: guided by w, class y has the mean m∅ + w (m_y − m∅), in the guided channels alone."""
    x, _, settings = exact(
        kind, "--method", "dopri5", "--steps", 20, "--count", 4, "--guidance", 3, "--labels", 1, *options
    )
    moved = MEANS[2] + 3 * (MEANS[1] - MEANS[2])
    mean = torch.cat([moved[:channels], MEANS[1][channels:]])
    for i in range(4):
        assert torch.allclose(x[i], mean + VAR.sqrt() * noises(i, 1)[0], atol=1e-3, rtol=0)
    assert settings["evaluations_per_sample"] == 2 * 6 * 20
    assert settings["guidance"] == {"by": "classifier-free guidance", "scale": 3.0, "channels": channels}


def test_guidance_is_an_input_where_there_is_one(tiny, tmp_path):
    """In one jump, and half the evaluations of classifier-free guidance."""
    found = {}
    for w in ("1", "2.5"):
        options = ["--weights", str(tiny / "mfm"), "--method", "map", "--count", "3", "--labels", "1"]
        script.main([*options, "--guidance", w, "--out", str(tmp_path / w)])
        found[w] = first_rows(tmp_path / w / "latents.npz", 3)
        assert json.loads((tmp_path / w / "settings.json").read_text())["evaluations_per_sample"] == 1
    X, eps = FlowMap(tiny_sit("mfm", n_classes=3)), torch.stack([noises(i, 1, (4, 8, 8))[0] for i in range(3)])
    for w, other in (("1", "2.5"), ("2.5", "1")):
        with torch.no_grad():
            expected, blank = (X(0, 1, eps, 0, x, torch.ones(3).long(), float(w)) for x in (eps, torch.zeros_like(eps)))
        assert np.allclose(found[w], expected, atol=1e-5)
        assert np.abs(found[other] - expected.numpy()).max() > 1e-2
        assert np.abs(found[w] - blank.numpy()).max() > 1e-3  # the context of the map at t = 0 is its noise


def without_guidance(options):
    at = options.index("--guidance")
    return options[:at] + options[at + 2 :]


def test_without_a_scale_the_largest_that_the_weights_know_is_taken(tiny, whole, tmp_path, capsys):
    """It is in the settings, so that a folder for which it was named goes on; the first row of the table is another."""
    before = {path: path.read_bytes() for path in whole.iterdir()}
    script.main(without_guidance(options_of(tiny, whole)))
    assert {path: path.read_bytes() for path in whole.iterdir()} == before
    with pytest.raises(SystemExit, match=r"\(guidance was 2.5 and is 1.0\)"):
        script.main(options_of(tiny, whole, "--guidance", "1"))
    for kind in ("sit", "dmf"):  # they know none
        line = ["--weights", str(tiny / kind), "--count", "2", "--method", "euler", "--steps", "1"]
        line += ["--out", str(tmp_path / kind)]
        script.main([*line, "--guidance", "1"])
        script.main(line)
        record = json.loads((tmp_path / kind / "settings.json").read_text())
        assert record["settings"]["guidance"] == 1.0 and record["guidance"] == {"by": "nothing"}


# ---- labels ----------------------------------------------------------------------------------------------


def test_balanced_labels_have_each_class_in_turn():
    y = labels_for("balanced", 35, 10, seed=3)
    assert y.dtype == torch.int64
    assert all(sorted(turn.tolist()) == list(range(10)) for turn in y[:30].split(10))
    assert torch.equal(y[30:], y[:5])
    assert not torch.equal(y, labels_for("balanced", 35, 10, seed=4))
    assert not torch.equal(y[:10], torch.arange(10))  # the first few are of classes far apart


def test_random_labels_are_uniform_and_independent():
    y = labels_for("random", 2000, 4, seed=1)
    counts = torch.bincount(y, minlength=4).double()
    assert ((counts - 500) / (2000 * 3 / 16) ** 0.5).abs().max() < LIMIT
    pairs = torch.bincount(4 * y[:-1] + y[1:], minlength=16).double()
    assert ((pairs - 125) / 125**0.5).abs().max() < LIMIT
    assert not torch.equal(y, labels_for("random", 2000, 4, seed=2))


@pytest.mark.parametrize("kind", ["balanced", "random", "2"])
def test_labels_do_not_depend_on_their_number(kind):
    assert torch.equal(labels_for(kind, 9, 5), labels_for(kind, 40, 5)[:9])


# ---- files -----------------------------------------------------------------------------------------------


def test_a_grid_has_its_images_row_by_row():
    images = np.arange(5 * 2 * 3 * 3, dtype=np.uint8).reshape(5, 2, 3, 3)
    page = np.asarray(grid(images, 2))
    assert page.shape == (6, 6, 3)
    for i, image in enumerate(images):
        row, column = divmod(i, 2)
        assert np.array_equal(page[2 * row : 2 * row + 2, 3 * column : 3 * column + 3], image)
    assert (page[4:, 3:] == 255).all()
    assert np.asarray(grid(images, 8)).shape == (2, 15, 3)


def options_of(tiny, out, *options, vae=True):
    """A run of 7 samples in batches of 2, on the command line."""
    weights = ["--weights", str(tiny / "mfm"), "--out", str(out), *(["--vae", str(tiny / "vae")] if vae else [])]
    return [*weights, "--count", "7", "--batch", "2", "--steps", "2", "--guidance", "2.5", *options]


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """The folder of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole") / "new" / "folder"
    script.main(options_of(tiny, folder))
    return folder


def same(a: Path, b: Path) -> bool:
    files = sorted(path.name for path in a.iterdir())
    assert files == sorted(path.name for path in b.iterdir()) and "settings.json" in files
    return all((a / name).read_bytes() == (b / name).read_bytes() for name in files)


def test_images_are_decoded_latents(tiny, whole, tmp_path):
    """In ADM's layout: arr_0 uint8 (n, H, W, 3), arr_1 int64."""
    script.main(options_of(tiny, tmp_path, vae=False))
    with np.load(whole / "samples.npz") as images, np.load(tmp_path / "latents.npz") as latents:
        assert images["arr_0"].shape == (7, 64, 64, 3) and images["arr_0"].dtype == np.uint8
        assert images["arr_1"].dtype == np.int64 and sorted(images["arr_1"][:3]) == [0, 1, 2]
        assert np.array_equal(images["arr_1"], latents["arr_1"])
        with torch.no_grad():
            decoded = VAE.load(str(tiny / "vae")).decode(torch.from_numpy(latents["arr_0"]))
        assert np.abs(to_uint8(decoded).astype(int) - images["arr_0"]).max() <= 1  # batches of 7 and of 2
        assert latents["arr_0"].shape == (7, 4, 8, 8) and latents["arr_0"].dtype == np.float32
        with Image.open(whole / "grid.png") as page:
            assert np.array_equal(np.asarray(page)[:64, 64:128], images["arr_0"][1])
    assert {path.name for path in tmp_path.iterdir()} == {"latents.npz", "settings.json"}


def test_settings_say_what_made_the_samples(tiny, whole):
    record = json.loads((whole / "settings.json").read_text())
    assert record["settings"]["steps"] == 2 and record["settings"]["labels"] == "balanced"
    assert record["settings"]["network"] == tiny_sit("mfm", n_classes=3).config
    assert record["weights"]["from"] == str(tiny / "mfm")
    assert len(record["weights"]["sha256"]) == 64 and record["settings"]["weights"] == record["weights"]["sha256"]
    assert record["settings"]["vae"] == {name: record["vae"][name] for name in ("sha256", "scale")}
    assert not {"kind", "num_heads", "encoder_depth"} & record["settings"].keys()
    assert record["vae"] == VAE.load(str(tiny / "vae")).identity | {"id": str(tiny / "vae")}
    assert record["guidance"] == {"by": "an input of the network", "scale": 2.5}
    assert (record["samples"], record["evaluations_per_sample"], record["device"]) == (7, 2, "cpu")


# ---- precision and compilation ---------------------------------------------------------------------------


def test_bfloat16_rounds_the_network_alone(tiny):
    """Not what is made of its result: guidance, and sums along a path."""
    z, y, found = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1]), {}
    for name in ("float32", "bfloat16"):
        X = shared.open_network(shared.ModelOptions(weights=str(tiny / "sit"), precision=name))
        assert not X.training and not any(parameter.requires_grad for parameter in X.parameters())
        found[name] = X.velocity(0.3, 0.3, z, 0.0, z, y)
        assert found[name].dtype == torch.float32
    error = (found["float32"] - found["bfloat16"]).abs().max() / found["float32"].abs().max()
    assert 1e-4 < error < 0.05


def test_the_network_is_compiled_where_that_is_asked_for(tiny, tmp_path, monkeypatch):
    """All of it, once for each size of a batch; what is counted and rounded stays outside."""
    calls = []

    def compile(function, *, dynamic):
        def compiled(*arguments):
            calls.append((function.__func__.__name__, dynamic, len(arguments[2])))
            return function(*arguments)

        return compiled

    monkeypatch.setattr(torch, "compile", compile)
    options = ["--weights", str(tiny / "mfm"), "--count", "3", "--batch", "2"]
    script.main([*options, "--out", str(tmp_path / "eager")])
    assert not calls
    script.main([*options, "--compile", "--out", str(tmp_path / "compiled")])
    assert calls == [("velocity", False, 2), ("velocity", False, 1)]
    a, b = (first_rows(tmp_path / name / "latents.npz", 3) for name in ("eager", "compiled"))
    assert np.array_equal(a, b)


# ---- runs that are shared, killed, finished or refused ---------------------------------------------------


def subprocess_of(*command):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.mark.slow  # the ladder's test has two processes sample, too
def test_two_processes_make_the_same_files(tiny, tmp_path):
    """Of one run, torchrun's: bit for bit what one process makes."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    result = subprocess_of(*torchrun, "-m", "imagenet.sample", *options_of(tiny, tmp_path / "two", vae=False))
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("7 samples of 2 evaluations") == 1
    script.main(options_of(tiny, tmp_path / "one", vae=False))
    assert same(tmp_path / "one", tmp_path / "two")


def test_a_run_that_was_killed_goes_on(tiny, tmp_path):
    """SIGKILL at the third of four batches; to the same bytes."""
    result = subprocess_of("-c", KILLED, *options_of(tiny, tmp_path / "killed", vae=False))
    assert result.returncode == -9, result.stderr
    assert [path.name for path in (tmp_path / "killed").iterdir()] == [".parts"]
    for name in ("killed", "whole"):
        script.main(options_of(tiny, tmp_path / name, vae=False))
    assert same(tmp_path / "killed", tmp_path / "whole")


def test_finished_batches_are_not_made_again(tiny, whole, tmp_path, monkeypatch):
    """Images: an error in the third of four batches, and then the same bytes."""
    made, draw = [], script.draw

    def failing(*arguments):
        made.append(len(arguments[2]))
        if len(made) == 3:
            raise MemoryError
        return draw(*arguments)

    monkeypatch.setattr(script, "draw", failing)
    with pytest.raises(MemoryError):
        script.main(options_of(tiny, tmp_path))
    for name in (".123.samples.npz", ".123.grid.png", ".45.settings.json"):  # as of a process that died in writing it
        (tmp_path / name).touch()
    shards = (tmp_path / ".parts").glob("shard-*")
    assert sorted(path.name for path in shards) == ["shard-00000", "shard-00001"]
    script.main(options_of(tiny, tmp_path))
    assert made == [2, 2, 2, 2, 1]
    assert same(tmp_path, whole)


def test_a_run_that_is_finished_is_kept(tiny, whole, tmp_path, monkeypatch, capsys):
    """Parts that a process left as it died at the very end go, before it removed them and meanwhile."""
    before = {path: path.read_bytes() for path in whole.iterdir()}
    settings = json.loads((whole / "settings.json").read_text())["settings"]
    for name in (".parts", ".123.old..parts"):
        (whole / name).mkdir()
        (whole / name / "settings.json").write_text(json.dumps(settings))
    monkeypatch.setattr(script, "draw", None)
    script.main(options_of(tiny, whole))
    assert {path: path.read_bytes() for path in whole.iterdir()} == before
    assert "samples.npz: 7 samples of 2 evaluations each" in capsys.readouterr().out


@pytest.mark.parametrize("left", [0, 1000, 10**6])
def test_a_finished_run_without_its_samples_is_made_again(tiny, whole, tmp_path, left):
    """The file is missing, or cut short; then it has too few samples."""
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "samples.npz"
    if left == 10**6:
        write_npz(path, [np.zeros((6, 64, 64, 3), np.uint8)], np.zeros(6, np.int64))
    else:
        path.write_bytes(path.read_bytes()[:left])
    if not left:
        path.unlink()
    script.main(options_of(tiny, tmp_path))
    assert same(tmp_path, whole)


def test_folders_and_files_of_others_stay(tiny, tmp_path):
    """Parts are kept out of the way of a user's data, and what is in theirs is refused."""
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "mine").touch()
    script.main(options_of(tiny, tmp_path, vae=False))
    assert (tmp_path / "shards" / "mine").exists()
    (tmp_path / "other" / ".parts").mkdir(parents=True)
    (tmp_path / "other" / ".parts" / "mine").touch()
    with pytest.raises(SystemExit, match="must be a new folder or one of this run, found mine"):
        script.main(options_of(tiny, tmp_path / "other", vae=False))
    assert (tmp_path / "other" / ".parts" / "mine").exists()
    for content in ({"editor.fontSize": 12}, {"settings": 3}):
        (tmp_path / "other" / "settings.json").write_text(json.dumps(content))
        with pytest.raises(SystemExit, match=r"settings.json must be one that this script wrote, and is of something"):
            script.main(options_of(tiny, tmp_path / "other", vae=False))


@pytest.mark.parametrize("name", ["samples.npz", "latents.npz", "grid.png"])
def test_samples_of_others_are_not_replaced(tiny, tmp_path, name):
    (tmp_path / name).write_text("mine")
    message = f"must be a new folder or one of this script, found {name} and no settings.json"
    with pytest.raises(SystemExit, match=message):
        script.main(options_of(tiny, tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == [name] and (tmp_path / name).read_text() == "mine"


def test_a_run_that_died_between_its_files_goes_on(tiny, whole, tmp_path, monkeypatch):
    """After samples.npz and grid.png, before settings.json; no other run takes its place."""
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(shared, "save_json", lambda *_: 1 / 0)
        script.main(options_of(tiny, tmp_path))
    files = {".parts", "samples.npz", "grid.png"}
    assert {path.name for path in tmp_path.iterdir()} == files
    with pytest.raises(SystemExit, match="seed was 0 and is 1"):
        script.main(options_of(tiny, tmp_path, "--seed", "1"))
    assert {path.name for path in tmp_path.iterdir()} == files
    script.main(options_of(tiny, tmp_path))
    assert same(tmp_path, whole)


def test_parts_of_another_run_stay_beside_one_that_is_finished(tiny, whole, tmp_path):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    settings = json.loads((whole / "settings.json").read_text())["settings"] | {"seed": 1}
    (tmp_path / ".parts").mkdir()
    (tmp_path / ".parts" / "settings.json").write_text(json.dumps(settings))
    script.main(options_of(tiny, tmp_path))
    assert json.loads((tmp_path / ".parts" / "settings.json").read_text()) == settings


def test_what_is_wrong_with_the_folder_is_found_before_anything_is_removed(tiny, tmp_path, monkeypatch):
    """In all processes alike: what rank 0 alone would trip over, as it clears, comes later."""
    (tmp_path / ".parts").mkdir()
    (tmp_path / ".parts" / "mine").touch()
    monkeypatch.setattr(shared, "clear", lambda *_: 1 / 0)
    with pytest.raises(SystemExit, match="must be a new folder or one of this run, found mine"):
        script.main(options_of(tiny, tmp_path))


def test_each_process_needs_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    check_device("cuda:1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank in ("0", "1", "2"):
        monkeypatch.setenv("LOCAL_RANK", rank)
        if rank < "2":
            check_device("cuda")
    with pytest.raises(ValueError, match="got 'cuda': there are 2 GPUs, and none of number 2"):
        check_device("cuda")


def test_a_file_and_a_folder_of_the_same_weights_are_the_same(tiny, tmp_path):
    """And of other sizes, which a file does not tell, another network: half of its samples would not be the others'."""
    torch.save(to_state(tiny_sit("mfm", n_classes=3, noise_times=True), "mfm"), tmp_path / "mfm.pt")
    file = load(tmp_path / "mfm.pt", "mfm", num_heads=4, encoder_depth=3)
    FlowMap(file).save_pretrained(tmp_path / "folder")
    read = ["--weights", str(tmp_path / "mfm.pt"), "--kind", "mfm", "--num-heads", "4", "--encoder-depth"]
    script.main(options_of(tiny, tmp_path / "out", "--weights", str(tmp_path / "folder"), vae=False))
    script.main(options_of(tiny, tmp_path / "out", *read, "3", vae=False))
    with pytest.raises(SystemExit, match=r"network was .*'encoder_depth': 3.* and is .*'encoder_depth': 1"):
        script.main(options_of(tiny, tmp_path / "out", *read, "1", vae=False))


def test_another_scale_of_the_vae_is_another_run(tiny, whole, tmp_path):
    shutil.copytree(tiny / "vae", tmp_path / "vae")
    config = json.loads((tmp_path / "vae" / "config.json").read_text())
    (tmp_path / "vae" / "config.json").write_text(json.dumps(config | {"scaling_factor": 1.0}))
    with pytest.raises(SystemExit, match=r"vae was .*'scale': 0.18215.* and is .*'scale': 1.0"):
        script.main(options_of(tiny, whole, "--vae", str(tmp_path / "vae")))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--count", "8"), "count was 7 and is 8"),
        (("--seed", "1", "--steps", "1"), "seed was 0 and is 1; steps was 2 and is 1"),
        (("--labels", "1"), "labels was 'balanced' and is '1'"),
    ],
)
def test_a_folder_of_other_settings_is_refused(tiny, whole, options, message):
    with pytest.raises(SystemExit, match=rf"settings.json belongs to a run with other settings \({message}\)"):
        script.main(options_of(tiny, whole, *options))


def test_shards_of_other_settings_are_refused(tiny, tmp_path, monkeypatch):
    """And of other weights and another VAE, wherever they are."""
    monkeypatch.setattr(shared, "assemble", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        script.main(options_of(tiny, tmp_path))
    FlowMap(tiny_sit("mfm", n_classes=3, seed=1)).save_pretrained(tmp_path / "other")
    for options, message in (
        (("--seed", "1"), "seed was 0 and is 1"),
        (("--weights", str(tmp_path / "other")), "weights was '[0-9a-f]{64}' and is"),
        (("--vae", str(tiny_vae(tmp_path / "vae", seed=1))), "vae was {'sha256': '[0-9a-f]{64}', .* and is"),
    ):
        with pytest.raises(SystemExit, match=f"other settings.*{message}"):
            script.main(options_of(tiny, tmp_path, *options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--weights", ""), "--weights must name the weights"),
        (("--weights", "there/is/none"), "there/is/none must be a file or folder that is there"),
        (("--vae", "there/is/none"), "'there/is/none' must be a folder with the config.json and the weights"),
        (("--vae", "{two}"), "--vae must have latents of 4 channels, as the network has, got 2"),
        (("--kind", "sit"), "holds a network of the kind 'mfm', got kind='sit'"),
        (("--count", "0"), "--count must be an integer >= 1, got 0"),
        (("--batch", "0"), "--batch must be an integer >= 1, got 0"),
        (("--steps", "-1"), "--steps must be an integer >= 0, got -1"),
        (("--method", "euler", "--steps", "0"), "--steps must be given with --method euler, such as 50"),
        (("--method", "sde", "--steps", "0"), "--steps must be given with --method sde, such as 50"),
        (("--seed", "-1"), "--seed must be an integer >= 0, got -1"),
        (("--device", "cuda:99"), "--device must be one that this torch computes on, got 'cuda:99': there are "),
        (("--device", "abacus"), "--device must be one that this torch computes on, got 'abacus': "),
        (("--guidance", "0.5"), "--guidance must be a number >= 1, or 0 for the weights' own, got 0.5"),
        (("--guidance", "nan"), "--guidance must be a number >= 1, or 0 for the weights' own, got nan"),
        (("--guidance", "-1"), "--guidance must be a number >= 1, or 0 for the weights' own, got -1"),
        (("--guidance", "4"), r"--guidance must be one of the scales that these weights know, \[1.0, 2.5\], got 4.0"),
        (("--guided-channels", "5"), "--guided-channels must be at least 0 and at most 4, got 5"),
        (("--guided-channels", "3", "--guidance", "2.5"), "--guided-channels must be left out where there is no class"),
        (("--weights", "{sit}", "--method", "heun", "--guided-channels", "3"), "--guided-channels must be left out"),
        (("--labels", "3"), "--labels must be balanced, random or a class from 0 to 2, got '3'"),
        (("--labels", "-1"), "--labels must be balanced, random or a class from 0 to 2, got '-1'"),
        (("--labels", "cats"), "--labels must be balanced, random or a class from 0 to 2, got 'cats'"),
        (("--weights", "{sit}"), "--method posterior needs a network of two times"),
        (("--weights", "{sit}", "--method", "map"), "--method map needs a network of two times.*: use euler or heun"),
        (("--weights", "{dmf}"), "in more than one step needs a network with a context, and DMF's have none: use map"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(tiny, tmp_path, options, message):
    two = tiny_vae(tmp_path / "two", latent_channels=2) if "{two}" in options else ""
    given = [option.format(two=two, sit=tiny / "sit", dmf=tiny / "dmf") for option in options]
    with pytest.raises(SystemExit, match=f"^imagenet.sample: .*{message}") as raised:
        script.main([*options_of(tiny, tmp_path / "out", "--guidance", "1"), *given])
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", [("--kind", "dit"), ("--method", "ddim"), ("--count", "many"), ("--what", "1")])
def test_unknown_options_end_with_a_message(tiny, tmp_path, options, capsys):
    with pytest.raises(SystemExit) as raised:
        script.main(options_of(tiny, tmp_path, *options))
    assert raised.value.code == 2
    assert options[0] in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(("method", "what"), [("posterior", "x1"), ("map", "the samples 0 to 1")])
def test_weights_that_give_nan_are_refused(tiny, tmp_path, method, what):
    network = tiny_sit("mfm", n_classes=3)
    nn.init.constant_(network.outlet.bias, torch.inf)
    FlowMap(network).save_pretrained(tmp_path / "broken")
    options = ("--weights", str(tmp_path / "broken"), "--method", method, "--steps", "1")
    with pytest.raises(SystemExit, match=f"{what} must be finite"):
        script.main(options_of(tiny, tmp_path / "out", *options, vae=False))
