"""What training leaves and every other stage takes."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mfm_ref import FlowMap
from mfm_ref.checks import Reward
from mfm_ref.files import fill_weights, load_json, read_weights, save_json, save_weights
from toy.images.classifiers import (
    Classifier,
    Classify,
    accuracy_of,
    class_mixture_reward,
    classifier_file,
    train_classifier,
    train_judge,
)
from toy.images.data import Split, load_images
from toy.images.maps import names_of, new_network, train_all
from toy.images.section import Section, Table
from toy.images.settings import TrainSettings, training_settings


@dataclass
class Rung:
    """Data, classifiers and maps."""

    data: Split
    classifier: Classifier
    judge: Classify  # did not see the training images
    base: FlowMap  # trained by plain flow matching; its drift is the base drift b_t(x)
    X: FlowMap  # the Meta Flow Map that the stages use
    maps: dict[str, FlowMap]  # all that were trained

    @cached_property
    def reward(self) -> Reward:
        """The class-mixture reward."""
        return class_mixture_reward(self.classifier)

    @property
    def classifiers(self) -> dict[str, Classify]:
        """The one in the reward, and the judge."""
        return {"classifier": lambda x: self.classifier(x).argmax(-1), "judge": self.judge}


def run(config: TrainSettings) -> dict[str, Any]:
    """The stage "train": the classifier and all maps, as far as they are not there yet."""
    names_of(config)
    data = load_images(config.dataset, config.data or None, config.device)
    new_network(config, data.train)  # what is wrong with the settings shows here, before anything is written
    check_settings(config)
    save_json({"settings": repr(training_settings(config))}, settings_file(config))
    path = classifier_file(config.out)
    if not path.exists():
        save_weights(train_classifier(config, data.train, config.train_classifier_steps, seed=config.seed), path)
    seconds = train_all(config)
    rung = load_rung(config)
    images = {"classifier": data.held_out, "judge": data.train if data.judge is data.held_out else data.held_out}
    return {
        "images": {"train": len(data.train), "judge": len(data.judge), "held_out": len(data.held_out)},
        "weights": sum(p.numel() for p in rung.X.parameters()),
        "accuracy": {name: accuracy_of(classify, images[name]) for name, classify in rung.classifiers.items()},
        "seconds": seconds,
        "spent": sum(seconds.values()),
    }


def settings_file(config: TrainSettings) -> Path:
    """Where the settings of training are."""
    return config.out / "training.json"


def check_settings(config: TrainSettings) -> None:
    """Raise ValueError where the folder holds maps that were trained with other settings."""
    path = settings_file(config)
    if path.exists() and load_json(path).get("settings") != repr(training_settings(config)):
        raise ValueError(f"{path.parent} holds maps that were trained with other settings: write elsewhere (--out)")


def missing_parts(config: TrainSettings) -> list[str]:
    """The files of training that are not there."""
    maps = [folder_of(config.out, name) for name in ("base", *names_of(config))]
    return [str(path) for path in (settings_file(config), classifier_file(config.out), *maps) if not path.exists()]


def load_rung(config: TrainSettings) -> Rung:
    """What `run` left in `config.out`.

    Raises:
        ValueError: nothing there, a part of it missing or damaged, maps of other settings or for other images.
    """
    if missing := missing_parts(config):
        raise ValueError(f"run `python -m toy.mnist train` with the same options first; missing: {', '.join(missing)}")
    check_settings(config)
    data = load_images(config.dataset, config.data or None, config.device)
    shape = tuple(data.train.images.shape[1:])
    classifier = Classifier(shape)
    path = classifier_file(config.out)
    fill_weights(classifier, read_weights(path), path)
    maps = {name: load_map(config, name, shape) for name in ("base", *names_of(config))}
    base = maps.pop("base")
    classifier = classifier.to(config.device).eval().requires_grad_(False)
    return Rung(data, classifier, train_judge(data.judge), base, maps[config.map], maps)


def folder_of(out: Path, name: str) -> Path:
    """Where a map is."""
    return out / "maps" / name


def load_map(config: TrainSettings, name: str, shape: tuple[int, ...]) -> FlowMap:
    """One trained map, without gradients. Raises ValueError for a network of images of another shape."""
    folder = folder_of(config.out, name)
    X = FlowMap.from_pretrained(folder).to(config.device).eval().requires_grad_(False)
    if X.shape != shape:
        raise ValueError(f"{folder} must hold a map of images {shape}, as {config.dataset} has, got one of {X.shape}")
    return X


def section(result: dict[str, Any]) -> Section:
    """The report's words about training."""
    rows = [[name, f"{seconds / 60:.1f}"] for name, seconds in result["seconds"].items()]
    images, accuracy = result["images"], result["accuracy"]
    text = (
        f"{images['train']} images train the maps ({result['weights'] / 1e6:.2f} M weights) and the classifier of the "
        f"reward, which is right on {100 * accuracy['classifier']:.1f} % of {images['held_out']} held-out images. The "
        f"judge, a support vector machine, saw {images['judge']} others, and is right on "
        f"{100 * accuracy['judge']:.1f} % of images that it did not see."
    )
    return Section("Training", text, [Table("Minutes of training", ["network", "minutes"], rows)])
