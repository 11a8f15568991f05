"""The ImageNet rung from end to end, by the commands that a user types: photographs, a small VAE, a small network.

Images become latents, three trainings a Meta Flow Map, and that samples, posteriors, steered samples and a fine-tuned
drift; all of it on one process and on two. `tests/ladder_run.py` has the commands.
"""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from imagenet import checkpoints
from mfm_ref.files import load_json
from tests.imagenet_tiny import photographs, tiny_sit, tiny_vae
from tests.ladder_run import COMMANDS, MEASURES, run

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "imagenet" / "README.md").read_text()


def mean_colours(images):
    """Features of uint8 images `(n, 3, H, W)`: the mean colours of their four quarters, `(n, 12)`."""
    return torch.nn.functional.adaptive_avg_pool2d(images.float(), 2).flatten(1)


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """What the ladder stands on: photographs, a small VAE, latents, and a published network in a folder."""
    home = tmp_path_factory.mktemp("ladder")
    photographs(home / "images")
    tiny_vae(home / "vae")
    published = tiny_sit("mfm", n_classes=len(os.listdir(home / "images")), noise_times=True)
    torch.save(checkpoints.to_state(published, "mfm"), home / "mfm.pt")
    run(
        (
            "checkpoints convert mfm.pt weights --kind mfm --num-heads 4 --encoder-depth 3",
            "encode --images images --vae vae --out latents --size 64 --workers 0",
        ),
        home,
    )
    return home


@pytest.fixture(scope="module")
def ladder(begun):
    """Every command once, in order; the folder of all results."""
    run(COMMANDS + MEASURES, begun)
    return begun


def test_every_step_leaves_what_the_next_one_reads(ladder):
    with np.load(ladder / "samples" / "samples.npz") as arrays:
        assert arrays["arr_0"].shape == (8, 64, 64, 3) and arrays["arr_0"].dtype == np.uint8
    settings = load_json(ladder / "samples" / "settings.json")
    assert settings["evaluations_per_sample"] == 2 and settings["guidance"]["scale"] == 2.5
    found = load_json(ladder / "posteriors" / "posterior.json")
    assert [(entry["t"], entry["method"], entry["evaluations"]) for entry in found["posteriors"]][:5] == [
        (0.2, "mfm", 1), (0.2, "mfm", 2), (0.2, "glass", 2), (0.2, "sde", 4), (0.2, "again", 4),
    ]  # fmt: skip
    for stage, evaluations in (("flow", 10), ("map", 1), ("mfm", 1), ("tuned-map", 1)):
        (line,) = map(json.loads, (ladder / stage / "proxy.jsonl").read_text().splitlines())
        assert line["step"] == 3 and line["evaluations"] == evaluations and math.isfinite(line["frechet"])
    for name in (
        "posteriors/t0.2.png", "posteriors/recovery.png", "posteriors/recovery.md",
        "posteriors/values-redness.png", "posteriors/values-redness.md", "samples/grid.png",
        "mfm/samples/step-00000003.png",
        "steered/steer.png", "steered/steer.md", "steered/mfm-c.png", "tuned/grid-00000002.png", "compared/values.png",
        "compared/steering.png", "compared/finetuning.png", "compared/compare.md",
    ):  # fmt: skip
        assert (ladder / name).stat().st_size > 0, name


def test_what_steering_cost_is_what_the_formulas_say(ladder):
    rows = load_json(ladder / "steered" / "steer.json")["rows"]
    assert len(rows) == 1 + 6
    assert all(row["evaluations"] == row["formula"] for row in rows)


def logged(run, name):
    """A number of each logged step."""
    return [json.loads(line)[name] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_two_processes_make_the_same(ladder, tmp_path):
    """All of it under torchrun: weights to rounding, and by them the samples, posteriors and rewards."""
    for name in ("vae", "latents"):
        shutil.copytree(ladder / name, tmp_path / name)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    result = subprocess.run(
        [*command, "-m", "tests.ladder_run", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    for name in ("flow", "map", "mfm", "tuned", "tuned-map"):
        there, here = (load_file(home / name / "weights" / "model.safetensors") for home in (tmp_path, ladder))
        assert there.keys() == here.keys()
        for key in here:
            torch.testing.assert_close(there[key], here[key], rtol=0, atol=1e-5)
        there, here = (logged(home / name, "loss") for home in (tmp_path, ladder))
        assert there == pytest.approx(here, rel=1e-5)
    for name in ("samples/samples.npz", "posteriors/t0.2/mfm-1/samples.npz", "steered/mfm-c-2/samples.npz"):
        with np.load(tmp_path / name) as there, np.load(ladder / name) as here:
            assert np.abs(there["arr_0"].astype(int) - here["arr_0"]).max() <= 2
    there, here = (load_json(home / "steered" / "steer.json")["rows"] for home in (tmp_path, ladder))
    assert [row["evaluations"] for row in there] == [row["evaluations"] for row in here]


def test_the_distance_is_that_of_the_images(ladder):
    """By NumPy and SciPy, from the files."""
    from scipy.linalg import sqrtm

    laws = []
    for path in (ladder / "samples" / "samples.npz", ladder / "posteriors" / "clean" / "samples.npz"):
        with np.load(path) as arrays:
            images = arrays["arr_0"].astype(np.float64)
        quarters = images.reshape(len(images), 2, 32, 2, 32, 3).mean((2, 4))  # (n, 2, 2, 3)
        features = quarters.transpose(0, 3, 1, 2).reshape(len(images), 12)
        laws.append((features.mean(0), np.cov(features.T)))
    (mean, cov), (mean2, cov2) = laws
    right = ((mean - mean2) ** 2).sum() + np.trace(cov + cov2 - 2 * sqrtm(cov @ cov2).real)
    found = json.loads((ladder / "samples" / "fid.json").read_text())
    assert found["distance"] == pytest.approx(right, rel=1e-5)


def example_of_the_page(number, monkeypatch, home):
    """A block of the page's code, run with what is here and with two steps; its names."""
    code = PAGE.split("```python")[number].split("```")[0]
    for there, here in (
        ("weights/mfm", "weights"), ("stabilityai/sd-vae-ft-mse", "vae"), ("281", "1"), ("steps=50", "steps=2"),
    ):  # fmt: skip
        code = code.replace(there, here)
    monkeypatch.chdir(home)
    names = {}
    exec(code, names)
    return names


def test_the_example_of_steering_runs_at_this_size(begun, monkeypatch):
    names = example_of_the_page(2, monkeypatch, begun)
    assert names["latents"].shape == (4, 4, 8, 8) and names["cost"].evaluations == 2 + 2 * 8 * 2


def test_the_example_of_rewards_runs(begun, monkeypatch, capsys):
    names = example_of_the_page(3, monkeypatch, begun)
    z = torch.randn(3, 4, 8, 8)
    images = names["vae"].decode(z)
    bright, probed = (names["load_reward"](spec)(images) for spec in ("brightness", "probe=probe.safetensors"))
    assert torch.allclose(names["reward"](z), 10 * (bright + 0.5 * probed), atol=1e-4)
