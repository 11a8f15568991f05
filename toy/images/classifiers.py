"""The classifier in the reward, the judge that is not, and what they say of samples."""

from pathlib import Path

import torch
from torch import Tensor, nn

from mfm_ref import RandomBatches, TrainConfig, train
from mfm_ref.checks import Reward
from toy.common import ToyConfig, generator, stream_of
from toy.digits import CLASS_WEIGHTS, Classify, class_mixture_reward, count_classes
from toy.images.data import Images

__all__ = ["CLASS_WEIGHTS", "Classify", "class_mixture_reward", "count_classes"]

CLASSES = len(CLASS_WEIGHTS)
NOISE = 0.5  # greatest noise on the images that train a classifier


class Classifier(nn.Module):
    """log p(y|x), `(B, 10)`, of images `(B, 1, H, W)`, sides multiples of 4: two convolutions, two linear layers."""

    def __init__(self, shape: tuple[int, ...], width: int = 32, features: int = 64):
        super().__init__()
        self.convolutions = nn.Sequential(
            *(nn.Conv2d(1, width, 3, padding=1), nn.SiLU(), nn.AvgPool2d(2)),
            *(nn.Conv2d(width, width, 3, padding=1), nn.SiLU(), nn.AvgPool2d(2), nn.Flatten()),
        )
        places = (shape[1] // 4) * (shape[2] // 4)
        self.hidden = nn.Sequential(nn.Linear(width * places, features), nn.SiLU())
        self.outlet = nn.Sequential(nn.Linear(features, CLASSES), nn.LogSoftmax(-1))

    def features(self, x: Tensor) -> Tensor:
        """The last hidden layer, `(B, features)`: the space of the Fréchet distances."""
        return self.hidden(self.convolutions(x))

    def forward(self, x: Tensor) -> Tensor:
        """Log-probabilities `(B, 10)`."""
        return self.outlet(self.features(x))


def train_classifier(config: ToyConfig, data: Images, steps: int, *, seed: int, stage: int = 10) -> Classifier:
    """A classifier on images with noise: its gradient is to mean something between images, too.

    `seed` is that of the initial weights, `stage` that of data and noise.
    """
    batches = RandomBatches(lambda rng: data.sample(128, rng), generator(config, stage))

    def loss(model: Classifier, batch: tuple[Tensor, Tensor], rng: torch.Generator | None) -> Tensor:
        images, classes = batch
        strength = NOISE * torch.rand((len(images), 1, 1, 1), generator=rng, device=images.device)
        images = images + strength * torch.randn(images.shape, generator=rng, device=images.device)
        return nn.functional.nll_loss(model(images), classes)

    torch.manual_seed(seed)
    model = Classifier(tuple(data.images.shape[1:])).to(config.device)
    settings = TrainConfig(steps=steps, seed=stream_of(config, stage))
    return train(model, loss, batches, settings, progress="train a classifier")[0]


def train_judge(data: Images) -> Classify:
    """A second opinion: a support vector machine on images that neither the map nor the classifier was trained on."""
    try:
        from sklearn.svm import SVC
    except ImportError as error:
        raise ImportError("toy.mnist needs scikit-learn, for its judge: pip install scikit-learn") from error
    machine = SVC(C=10.0).fit(data.images.flatten(1).cpu().numpy(), data.classes.cpu().numpy())

    def judge(x: Tensor) -> Tensor:
        return torch.from_numpy(machine.predict(x.detach().flatten(1).cpu().numpy())).to(x.device)

    return judge


def accuracy_of(classify: Classify, data: Images) -> float:
    """Share of images whose class is found."""
    right = [classify(x) == y for x, y in zip(data.images.split(1000), data.classes.split(1000), strict=True)]
    return float(torch.cat(right).float().mean())


def frequencies_of(classes: Tensor) -> Tensor:
    """Frequencies of the ten classes, `(10,)` float64."""
    return torch.bincount(classes.cpu(), minlength=CLASSES).double() / len(classes)


@torch.no_grad()
def tilted_frequencies(data: Images, reward: Reward, scale: float = 1.0) -> list[float]:
    """Class frequencies of p* ∝ p₁ e^(scale · r), by reweighting images with their true classes."""
    r = torch.cat([reward(x) for x in data.images.split(1000)])
    share = torch.softmax(scale * r.double(), 0).cpu()
    return torch.zeros(CLASSES, dtype=torch.float64).index_add(0, data.classes.cpu(), share).tolist()


def classifier_file(out: Path) -> Path:
    """Where the classifier's weights are."""
    return out / "classifier.safetensors"
