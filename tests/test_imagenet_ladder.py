"""The ImageNet rung from end to end, by the commands that a user types: photographs, a small VAE, a small network.

Published weights become a folder, images become latents, then samples, posteriors, distances and correlations.
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from imagenet import checkpoints, encode, evaluate, posterior, sample
from imagenet.latents import LatentBatches, Latents
from imagenet.sit import build
from imagenet.vae import VAE
from mfm_ref import FlowMap, TrainConfig, meta_flow_map_loss, train
from tests.imagenet_tiny import photographs, tiny_sit, tiny_vae

PAGE = (Path(__file__).parent.parent / "imagenet" / "README.md").read_text()


def mean_colours(images):
    """Features of uint8 images `(n, 3, H, W)`: the mean colours of their four quarters, `(n, 12)`."""
    return torch.nn.functional.adaptive_avg_pool2d(images.float(), 2).flatten(1)


@pytest.fixture(scope="module")
def ladder(tmp_path_factory):
    """Every command once, in order; the folder of all results."""
    home = tmp_path_factory.mktemp("ladder")
    photographs(home / "images")
    tiny_vae(home / "vae")
    classes = len(os.listdir(home / "images"))
    published = tiny_sit("mfm", n_classes=classes, noise_times=True)
    torch.save(checkpoints.to_state(published, "mfm"), home / "mfm.pt")
    images, latents, weights, out = (str(home / name) for name in ("images", "latents", "weights", "posteriors"))

    def run(command, line):
        command.main(line.split())

    sizes = "--num-heads 4 --encoder-depth 3"
    vae = f"--vae {home}/vae"
    run(checkpoints, f"convert {home}/mfm.pt {weights} --kind mfm {sizes}")
    run(encode, f"--images {images} {vae} --out {latents} --size 64 --workers 0")
    common = f"--weights {weights} {vae} --guidance 2.5 --batch 8"
    run(sample, f"{common} --count 20 --steps 2 --out {home}/samples")
    methods = "--methods mfm,glass,sde,again --map-steps 1,2 --glass-steps 2 --sde-steps 6"
    run(posterior, f"{common} --latents {latents} --contexts 6 --draws 3 --times 0.2,0.6 {methods} --out {out}")
    features = "--features tests.test_imagenet_ladder:mean_colours"
    run(evaluate, f"fid --samples {home}/samples/samples.npz --reference {out}/clean/samples.npz {features}")
    run(evaluate, f"recovery --posteriors {out} {features}")
    run(evaluate, f"values --posteriors {out} --reward redness --scale 5")
    return home


def test_every_step_leaves_what_the_next_one_reads(ladder):
    with np.load(ladder / "samples" / "samples.npz") as arrays:
        assert arrays["arr_0"].shape == (20, 64, 64, 3) and arrays["arr_0"].dtype == np.uint8
    settings = json.loads((ladder / "samples" / "settings.json").read_text())
    assert settings["evaluations_per_sample"] == 2 and settings["guidance"]["scale"] == 2.5
    found = json.loads((ladder / "posteriors" / "posterior.json").read_text())
    assert [(entry["t"], entry["method"], entry["evaluations"]) for entry in found["posteriors"]][:5] == [
        (0.2, "mfm", 1), (0.2, "mfm", 2), (0.2, "glass", 2), (0.2, "sde", 6), (0.2, "again", 6),
    ]  # fmt: skip
    for name in ("t0.2.png", "t0.6.png", "recovery.png", "recovery.md", "values-redness.png", "values-redness.md"):
        assert (ladder / "posteriors" / name).stat().st_size > 0
    assert (ladder / "samples" / "grid.png").exists()


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


def test_the_trainer_of_the_core_takes_the_latents(ladder):
    """A map learns from the encoded images by the core's loss: below its start, and finite."""
    latents = Latents(ladder / "latents", VAE.load(str(ladder / "vae")).identity)
    torch.manual_seed(0)
    X = FlowMap(build("tiny", "mfm", shape=latents.shape, n_classes=latents.n_classes, reads_tx=True))
    losses = []

    def loss(X, batch, generator):
        x1, y = batch
        losses.append(meta_flow_map_loss(X, x1, y, generator=generator))
        return losses[-1]

    train(X, loss, LatentBatches(latents, 16, seed=1), TrainConfig(steps=40, lr=3e-3, warmup=5))
    values = [float(value.detach()) for value in losses]
    assert np.isfinite(values).all()
    assert np.mean(values[-10:]) < 0.9 * np.mean(values[:10])


@pytest.mark.parametrize("number", [2, 3])
def test_examples_of_the_page_run_at_this_size(ladder, number, monkeypatch):
    """Steering without the reward's gradient, and training from a teacher: with these weights, and two steps."""
    code = PAGE.split("```python")[number].split("```")[0]
    FlowMap(tiny_sit("dmf", n_classes=len(os.listdir(ladder / "images")), noise_times=True)).save_pretrained(
        ladder / "dmf"
    )
    for there, here in (
        ("weights/mfm", "weights"), ("weights/dmf", "dmf"), ("stabilityai/sd-vae-ft-mse", "vae"), ("281", "1"),
        ("data/latents", "latents"), ("steps=50", "steps=2"), ("100_000", "2"), ("batch=32", "batch=4"),
    ):  # fmt: skip
        code = code.replace(there, here)
    monkeypatch.chdir(ladder)
    names = {}
    exec(code, names)
    if number == 2:
        assert names["latents"].shape == (4, 4, 8, 8) and names["cost"].evaluations == 2 + 2 * 8 * 2
    else:
        assert len(names["losses"]) == 2
        sample.main(["--weights", "weights/mine", "--count", "2", "--out", "of-mine"])
