"""The stages "steer" and "blackbox" on rungs with exact parts: an untrained U-Net is the map of a Gaussian.

To steer, N(0, I/4) and a classifier that sees the largest of ten pixels: all classes are equally frequent, so w is
nearly the law of the classes under p* ∝ p₁ e^r. For the black box, images of two ramps whose heights vary.
"""

import dataclasses
import json
import math
import shutil
import zlib

import numpy as np
import pytest
import torch
from torch import nn

from mfm_ref import FlowMap
from mfm_ref.unet import UNet
from toy.images import blackbox, steering
from toy.images.classifiers import frequencies_of
from toy.images.data import Images, Split
from toy.images.rung import Rung

SHARP = 12.0  # of the logits: a class is nearly sure, and still has a gradient


class LargestPixel(nn.Module):
    """log p(y|x) with the pixels 20 … 29 as logits."""

    def forward(self, x):
        return torch.log_softmax(SHARP * x.flatten(1)[:, 20:30], -1)


def judge(x):
    """A second opinion that differs a little."""
    flat = x.flatten(1)
    return (flat[:, 20:30] + 0.05 * flat[:, 40:50]).argmax(-1)


def rung_of(mean, cov):
    """The map of a Gaussian, and images from it."""
    torch.manual_seed(0)
    X = FlowMap(UNet(mean, cov, channels=(8,), blocks=1, patch=2)).requires_grad_(False)
    scale = torch.linalg.cholesky(cov)
    noise = torch.randn((600, 64), generator=torch.Generator().manual_seed(1))
    images = (noise @ scale.T).view(-1, 1, 8, 8) + mean
    classifier = LargestPixel()
    data = Images(images, classifier(images).argmax(-1), 0.0)
    return Rung(Split(data, data, data), classifier, judge, X, X, {"X": X})


@pytest.fixture(scope="module")
def rung():
    return rung_of(torch.zeros(1, 8, 8), torch.eye(64) / 4)


@pytest.fixture(scope="module")
def ramps():
    ramp = torch.linspace(0, 1, 32)
    halves = torch.block_diag(ramp.outer(ramp), ramp.outer(ramp))
    return rung_of(torch.full((1, 8, 8), -0.9), halves + 0.05**2 * torch.eye(64))


@pytest.fixture(scope="module")
def steered(rung, tmp_path_factory):
    sizes = {"steer_samples": 192, "steer_few": 96, "steer_batch": 96, "steer_steps": 8, "steer_largest": 8}
    out = tmp_path_factory.mktemp("steered")
    config = steering.Settings(**steering.PRESETS["fast"] | sizes, out=out)
    return config, steering.run(config, rung)


@pytest.fixture(scope="module")
def packed(ramps, tmp_path_factory):
    sizes = {"blackbox_samples": 1024, "blackbox_few": 192, "blackbox_batch": 512, "blackbox_draws": 16}
    out = tmp_path_factory.mktemp("packed")
    config = blackbox.Settings(**blackbox.PRESETS["fast"] | sizes | {"blackbox_steps": 16}, out=out)
    return config, blackbox.run(config, ramps)


def steers(row, base) -> bool:
    """Whether a method's classes are where the reward wants them: most of the way from where they were to w."""
    return all(row[name]["l2"] < base[name]["l2"] / 2 for name in ("classifier", "judge"))


# ---- the class mixture ---------------------------------------------------------------------------------


def test_right_steering_passes_and_wrong_steering_does_not(steered):
    rows = steered[1]["methods"]
    base = rows["unsteered-0"]
    assert base["classifier"]["l2"] == pytest.approx(0.4, abs=0.06)  # ‖w − 1/10‖ = 0.4
    for name in ("gradient-8", "controlled-4", "stein-8"):
        assert steers(rows[name], base), (name, rows[name])
    for name in ("stein-1", "best-16"):  # one that cannot steer, one that climbs
        assert not steers(rows[name], base), (name, rows[name])


def test_the_classes_of_the_tilted_law_by_reweighting(steered):
    found = steered[1]["reweighted"]
    assert found["true"]["l2"] < 0.1
    assert found["classifier"]["l2"] < 0.1
    assert 0 < found["ess"] < 1


def test_numbers_of_steering_lie_in_their_ranges(steered):
    config, result = steered
    rows = result["methods"]
    assert {row["n"] for row in rows.values() if row["kind"] == "gradient"} == {1, 2, 4, 8}
    for name, row in rows.items():
        assert sum(row["judge"]["frequencies"]) == pytest.approx(1)
        assert 0 <= row["agreement"] <= 1
        assert row["reward"] <= math.log(0.4) + 1e-6, name  # Σ w_i p_i is at most the largest w
        assert row["vendi"] is None or 1 <= row["vendi"] <= config.steer_vendi
        assert row["seconds"] > 0
    assert rows["gradient-8"]["floor"] == pytest.approx(math.sqrt(0.74 / 192))
    k = config.steer_steps
    counted = {"gradient-4": k + 16 * k, "stein-4": k + 8 * k, "dps-0": 4 * k, "unsteered-0": k, "best-4": 4 * k + 4}
    assert {name: rows[name]["evaluations"] for name in counted} == counted


def test_large_sets_compare_with_small_ones_by_their_parts(steered):
    row = steered[1]["methods"]["gradient-8"]
    assert row["samples"] == 2 * row["part"]
    assert row["l2_of_parts"]["judge"] >= row["judge"]["l2"] - 1e-9  # the norm is convex


def test_files_and_words_of_steering(steered):
    config, result = steered
    assert json.loads(json.dumps(result)) == result
    found = steering.section(result)
    assert all((config.out / file).exists() for file, _ in found.pictures)
    first, second = found.tables
    labels = [row["label"] for row in result["methods"].values()]
    for table in found.tables:
        assert all(len(row) == len(table.header) for row in table.rows)
    assert len(first.rows) == len(labels) + 2
    assert all(row[0].startswith(label) for row, label in zip(first.rows, labels, strict=False))
    assert [row[0] for row in second.rows[2:]] == labels
    assert "192 samples in place of 4096, 8 as the largest N in place of 32, 8 steps in place of 50" in found.text


def test_a_full_run_is_not_called_smaller(steered):
    result = steered[1] | {"samples": 4096, "few": 4096, "steps": 500}
    row = result["methods"]["gradient-8"] | {"n": 32}
    assert steering.smaller(result | {"methods": {"gradient-32": row}}) == ""


# ---- the black box -------------------------------------------------------------------------------------


def test_the_packed_size_is_that_of_zlib():
    grey = np.arange(128, dtype=np.uint8).reshape(2, 64)
    x = torch.from_numpy(grey.astype(np.float32)).reshape(2, 1, 8, 8) / 127.5 - 1
    assert blackbox.packed_size(x).tolist() == [len(zlib.compress(image.tobytes(), 9)) for image in grey]
    flat = torch.full((1, 1, 28, 28), -0.9)
    noisy = flat + 0.01 * torch.randn(flat.shape, generator=torch.Generator().manual_seed(0))
    assert blackbox.packed_size(noisy, 8) == blackbox.packed_size(flat, 8) < blackbox.packed_size(noisy)


def test_the_reward_has_the_asked_spread_and_refuses_equal_images(rung):
    images = rung.data.train.images
    reward, c = blackbox.size_reward(1.5, images, 8)
    assert float(reward(images).std()) == pytest.approx(1.5, rel=1e-4)
    assert torch.equal(reward(images), -c * blackbox.packed_size(images, 8))
    with pytest.raises(ValueError, match="must differ in their packed size, got a standard deviation of 0"):
        blackbox.size_reward(1.0, torch.zeros(3, 1, 8, 8), 8)


def misses(row, expected, what="bytes") -> float:
    """How far a mean is from the prediction, in standard errors of both."""
    return abs(row[what] - expected[what]) / math.hypot(row[f"{what}_error"], expected[f"{what}_error"])


def test_steering_has_the_size_that_reweighting_predicts_and_other_methods_do_not(packed):
    rows = packed[1]["methods"]
    expected = rows[blackbox.PREDICTED]
    assert misses(rows["stein"], expected) < 5
    assert all(misses(rows[name], expected) > 5 for name in ("unsteered", "search", "best"))
    assert 0.6 < rows["stein"]["shift"] / expected["shift"] < 1.6  # 16 steps and N = 16 have errors of their own
    assert expected["shift"] == pytest.approx(expected["bytes"] - rows["unsteered"]["bytes"])


def test_files_and_words_of_the_black_box(packed):
    config, result = packed
    assert json.loads(json.dumps(result)) == result
    found = blackbox.section(result)
    assert (config.out / "blackbox.png").exists()
    assert [pair[0] for pair in found.pictures] == ["blackbox.png"]
    for table in found.tables:
        assert [row[0] for row in table.rows] == [row["label"] for row in result["methods"].values()]
        assert all(len(row) == len(table.header) for row in table.rows)
    for row in result["methods"].values():
        assert 0 <= row["agreement"] <= 1
        assert 0.1 <= row["confidence"] <= 1
        assert row["bytes"] > 8
    assert 0 < result["methods"][blackbox.PREDICTED]["ess"] < 1
    assert result["methods"]["search"]["evaluations"] == 2 * 2 * 16 * 3


# ---- interruption --------------------------------------------------------------------------------------


def numbers(result):
    """A result without its seconds."""
    return {
        name: {k: v for k, v in row.items() if k != "seconds"} if isinstance(row, dict) else row
        for name, row in result["methods"].items()
    }  # fmt: skip


@pytest.mark.parametrize("stage", [steering, blackbox])
def test_a_run_that_was_killed_goes_on_with_the_same_numbers(stage, rung, tmp_path):
    config = stage.Settings(**stage.PRESETS["fast"], out=tmp_path)
    first = stage.run(config, rung)
    folders = sorted((tmp_path / "checkpoints" / "samples").iterdir())
    kept = folders[0] / "batch-00000.safetensors"
    before = kept.stat().st_mtime_ns
    for path in folders[0].glob("batch-*[1-9].safetensors"):
        path.unlink()  # killed within the first method
    for folder in folders[1:]:
        shutil.rmtree(folder)
    again = stage.run(config, rung)
    assert numbers(again) == numbers(first)
    assert kept.stat().st_mtime_ns == before
    read = stage.run(config, rung)
    assert read == again  # seconds too: nothing was drawn


@pytest.mark.parametrize("stage", [steering, blackbox])
def test_samples_of_another_map_are_refused(stage, rung, tmp_path):
    config = stage.Settings(**stage.PRESETS["fast"], out=tmp_path)
    stage.run(config, rung)
    X = FlowMap(UNet(torch.zeros(1, 8, 8), torch.eye(64) / 5, channels=(8,), blocks=1, patch=2)).requires_grad_(False)
    with pytest.raises(ValueError, match="belongs to another run"):
        stage.run(config, dataclasses.replace(rung, X=X))


def test_another_seed_gives_other_numbers(rung, tmp_path):
    results = []
    for seed in (1, 2):
        config = blackbox.Settings(**blackbox.PRESETS["fast"], out=tmp_path / str(seed), seed=seed)
        results.append(numbers(blackbox.run(config, rung)))
    assert all(results[0][name] != results[1][name] for name in ("unsteered", "stein", "search", "best"))


def test_the_maps_own_target_is_its_law_under_the_reward(steered, rung):
    """Resampled samples against the weighted frequencies of the same samples."""
    config, _ = steered
    x = torch.randn(3000, 1, 8, 8, generator=torch.Generator().manual_seed(0)) / 2
    found = steering.own_target(config, rung, x)
    share = torch.softmax(rung.reward(x).double(), 0)
    expected = torch.zeros(10, dtype=torch.float64).index_add(0, rung.classifiers["classifier"](x), share)
    error = (expected - torch.tensor(found["classifier"]["frequencies"], dtype=torch.float64)).abs().max()
    assert float(error) < 0.01
    assert found["ess"] == pytest.approx(float(1 / share.square().sum()) / 3000, rel=1e-6)
    plain = frequencies_of(rung.classifiers["classifier"](x))
    assert float((expected - plain).abs().max()) > 0.02  # without weights it would not pass


def test_two_evaluations_a_draw_cost_one_more_forward_and_backward_pass(steered):
    result = steered[1]
    once, twice = (result["methods"][name]["evaluations"] for name in ("gradient-8", "twice-8"))
    steps = result["steps"]
    assert twice - once == pytest.approx(steps * 8 * 2)
