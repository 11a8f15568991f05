"""The training of the image rungs: equal time, what is saved and loaded again, and what is refused."""

import dataclasses
import shutil

import pytest
import torch

from mfm_ref import FlowMap, UNet
from mfm_ref.files import save_weights
from toy.images import maps, rung
from toy.images.classifiers import (
    CLASS_WEIGHTS,
    CLASSES,
    Classifier,
    class_mixture_reward,
    count_classes,
    tilted_frequencies,
)
from toy.images.data import Images
from toy.images.section import mosaic
from toy.images.settings import PRESETS, TrainSettings

pytest.importorskip("sklearn")

TINY = TrainSettings(
    train_channels="8",
    train_maps="teacher,semigroup",
    map="teacher",
    train_steps=3,
    train_batch=8,
    train_classifier_steps=20,
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    config = dataclasses.replace(TINY, out=tmp_path_factory.mktemp("rung"))
    return config, rung.run(config)


def test_what_is_trained_is_loaded_again(trained):
    config, result = trained
    loaded = rung.load_rung(config)
    assert set(loaded.maps) == {"teacher", "semigroup"} and loaded.X is loaded.maps["teacher"]
    assert set(result["seconds"]) == {"base", "teacher", "semigroup"}
    assert result["images"] == {"train": 1300, "judge": 497, "held_out": 497}
    assert result["accuracy"]["judge"] > 0.9
    assert not any(p.requires_grad for X in (loaded.base, loaded.X) for p in X.parameters())
    section = rung.section(result)
    assert len(section.tables[0].rows) == 3 and "1300 images" in section.text


def test_a_second_run_trains_nothing_and_a_lost_map_is_trained_to_the_same_weights(trained, monkeypatch):
    config, result = trained
    before = rung.load_rung(config).X.state_dict()
    shutil.rmtree(config.out / "maps" / "teacher")
    shutil.rmtree(config.out / "checkpoints" / "teacher")
    rung.run(config)
    after = rung.load_rung(config).X.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    monkeypatch.setattr(maps, "train_map", lambda *_: pytest.fail("trained again"))
    assert rung.run(config)["accuracy"] == result["accuracy"]


def test_every_map_has_the_same_processor_time():
    config = dataclasses.replace(TINY, train_steps=6000)
    steps = {name: maps.steps_of(config, name) for name in maps.COSTS}
    spent = {name: steps[name] * cost for name, cost in maps.COSTS.items()}
    assert steps == {"base": 3200, "teacher": 2400, "semigroup": 6000, "mean_flow": 6000}
    assert spent["base"] + spent["teacher"] == spent["semigroup"] == spent["mean_flow"] == 8000


def test_the_teacher_goes_on_from_the_base_and_the_others_from_one_start(trained):
    config, _ = trained
    data = rung.load_images(config.dataset).train
    none = dataclasses.replace(config, out=config.out / "other", train_lr=1e-12)
    base = FlowMap.from_pretrained(config.out / "maps" / "base")
    for name, start in (("teacher", base), ("semigroup", None)):
        X = maps.train_map(none, data, name, start)
        torch.manual_seed(maps.stream_of(config, 11))
        begun = start or FlowMap(maps.new_network(config, data))
        for found, wanted in zip(X.parameters(), begun.parameters(), strict=True):
            assert torch.allclose(found, wanted, atol=1e-6)


def test_other_settings_a_missing_part_and_a_map_of_other_images_are_refused(trained, tmp_path):
    config, _ = trained
    with pytest.raises(ValueError, match="trained with other settings"):
        rung.run(dataclasses.replace(config, train_steps=4))
    with pytest.raises(ValueError, match=r"run `python -m toy.mnist train`.*missing: .*classifier.safetensors"):
        rung.load_rung(dataclasses.replace(config, out=tmp_path))
    with pytest.raises(ValueError, match=r"missing: .*mean_flow"):
        rung.load_rung(dataclasses.replace(config, train_maps="teacher,mean_flow"))
    other = tmp_path / "other"
    shutil.copytree(config.out, other)
    X = FlowMap(UNet(torch.zeros(1, 4, 4), torch.eye(16), channels=(8,)))
    X.save_pretrained(other / "maps" / "semigroup")
    changed = dataclasses.replace(config, out=other)
    with pytest.raises(ValueError, match=r"map of images \(1, 8, 8\), as digits has, got one of \(1, 4, 4\)"):
        rung.load_rung(changed)
    shutil.copytree(config.out / "maps" / "teacher", other / "maps" / "semigroup", dirs_exist_ok=True)
    save_weights(Classifier((1, 28, 28)), other / "classifier.safetensors")
    with pytest.raises(ValueError, match=r"classifier.safetensors"):
        rung.load_rung(changed)
    (other / "classifier.safetensors").write_bytes(b"garbage")
    with pytest.raises(ValueError, match=r"classifier.safetensors"):
        rung.load_rung(changed)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"train_maps": "teacher,tutor"}, "train_maps must be some of semigroup, mean_flow, teacher, got"),
        ({"train_maps": ""}, "train_maps must be some of"),
        ({"map": "mean_flow"}, "map must be one of train_maps, teacher, semigroup, got 'mean_flow'"),
        ({"train_network": "sit"}, "train_network must be one of unet, got 'sit'"),
        ({"train_channels": "8,x"}, "train_channels must be numbers with commas"),
        ({"train_patch": 3}, "sides must be multiples of 3"),
    ],
)
def test_settings_that_make_no_sense_are_refused(change, match, tmp_path):
    with pytest.raises(ValueError, match=match):
        maps.train_all(dataclasses.replace(TINY, out=tmp_path, **change))


@pytest.mark.parametrize("name", ["fast", "mnist", "full"])
def test_presets_have_networks_for_images_of_their_size(name):
    """The U-Net of the full preset has about nine million weights."""
    images = Images(torch.randn(3, 1, 28, 28), torch.arange(3))
    fields = {key: value for key, value in PRESETS[name].items() if key.startswith("train_")}
    network = maps.new_network(TrainSettings(**fields), images)
    assert network.shape == (1, 28, 28)
    assert (sum(p.numel() for p in network.parameters()) > 8.5e6) == (name == "full")


class _Sure(torch.nn.Module):
    """log-probabilities from the first ten pixels."""

    def forward(self, x):
        return torch.log_softmax(x.flatten(1)[:, :10], -1)


def sure_images(classes):
    images = torch.zeros(len(classes), 1, 4, 4)
    images.flatten(1)[torch.arange(len(classes)), classes] = 50.0
    return images


def test_class_mixture_reward_counts_and_tilts():
    """Sure classifications have the reward log w; p* over equally many images of each class has frequencies w."""
    classes = torch.arange(CLASSES).repeat(3)
    images, reward = sure_images(classes), class_mixture_reward(_Sure())
    r = reward(images)
    assert torch.allclose(r[1], torch.tensor(0.1).log(), atol=1e-5) and r[0] < -40
    tilted = torch.tensor(tilted_frequencies(Images(images, classes), reward), dtype=torch.float64)
    assert torch.allclose(tilted, CLASS_WEIGHTS, atol=1e-6)
    squared = CLASS_WEIGHTS**2 / CLASS_WEIGHTS.square().sum()
    twice = torch.tensor(tilted_frequencies(Images(images, classes), reward, scale=2.0), dtype=torch.float64)
    assert torch.allclose(twice, squared, atol=1e-6)
    found = count_classes(images, {"classifier": lambda x: _Sure()(x).argmax(-1), "judge": lambda x: 0 * classes})
    assert found["classifier"]["l2"] == pytest.approx(float((torch.full((10,), 0.1) - CLASS_WEIGHTS).norm()))
    assert found["judge"]["frequencies"][0] == 1 and found["agreement"] == pytest.approx(0.1)


def test_mosaic_puts_images_where_they_belong():
    images = torch.full((2, 3, 28, 28), -1.0)
    images[1, 2] = 1.0
    picture = mosaic(images)
    assert picture.shape == (60, 90)
    assert picture[31:59, 61:89].min() == 1 and picture[:30].max() == 0 and picture[0, 0] == 0
    assert mosaic(torch.zeros(1, 2, 1, 8, 8)).shape == (34, 68)
