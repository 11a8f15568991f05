"""Real handwritten digits, 8×8 pixels: a Meta Flow Map from 1300 images alone, then steered and fine-tuned.

    python -m toy.digits --out runs/digits

The reward is the paper's for MNIST: r(x) = log Σ_i w_i p(y_i|x), a mixture of classes in the eyes of a small
classifier, under which p* ∝ p₁ e^r has the class frequencies w when p₁ has all classes equally often. Images that
the map and the classifier never saw check both, and train a second classifier, the judge, which the reward does
not know. Writes posteriors.png, steering.png, map/, student/ and report.json.
"""

import copy
import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from mfm_ref import (
    MLP,
    FlowMap,
    RandomBatches,
    TrainConfig,
    denoiser,
    dps_drift,
    finetune_loss,
    integrate,
    interpolate,
    meta_flow_map_loss,
    sample,
    sample_posterior,
    sliced_wasserstein,
    steer,
    train,
)
from mfm_ref.checks import Reward
from mfm_ref.estimators import log_mean_exp
from mfm_ref.figures import COLOURS, new_figure, save_figure
from mfm_ref.files import save_json
from mfm_ref.sampling import noise_like, time_grid
from toy.common import ToyConfig, generator, option, parse, remove_checkpoints, resumable, start, stream_of

CLASS_WEIGHTS = torch.tensor([0, 1, 0, 1, 0, 2, 0, 2, 0, 4], dtype=torch.float64) / 10
TIMES = (0.1, 0.3, 0.5, 0.7)
ZOOM = 32  # pixels of an image in the pictures, a side

Classify = Callable[[Tensor], Tensor]  # images (B, 64) -> classes (B,)


@dataclasses.dataclass(frozen=True)
class DigitsConfig(ToyConfig):
    """Settings of the run; the defaults end within two minutes on one core."""

    out: Path = Path("runs/digits")
    held_out: int = option(497, "images kept from the map and from the classifier")
    noise: float = option(0.06, "standard deviation of noise added to every image; a grey level is 0.125")
    hidden: int = option(384, "width of the map's network")
    train_steps: int = 4000
    batch: int = 256
    lr: float = 2e-3
    classifier_steps: int = 1000
    posterior_samples: int = option(16, "per held-out image and time")
    set_size: int = option(1000, "samples whose classes are counted")
    steering_steps: int = 50
    finetune_steps: int = 1200
    finetune_batch: int = 256
    finetune_draws: int = option(4, "posterior samples per state")


FAST: dict[str, Any] = {
    "hidden": 64, "train_steps": 100, "batch": 64, "classifier_steps": 150, "posterior_samples": 4, "set_size": 100,
    "steering_steps": 5, "finetune_steps": 20, "finetune_batch": 32, "finetune_draws": 2,
}  # fmt: skip


# ---- the data, and two classifiers that share no image ---------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Digits:
    """Images `(n, 64)` with pixels in [−1, 1], and their classes `(n,)`."""

    images: Tensor
    classes: Tensor
    noise: float

    def sample(self, n: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """n draws with replacement of p₁, images with a little Gaussian noise, and their classes."""
        index = torch.randint(len(self.images), (n,), generator=rng, device=self.images.device)
        return self.blur(self.images[index], rng), self.classes[index]

    def blur(self, images: Tensor, rng: torch.Generator) -> Tensor:
        """Images plus noise of less than a grey level: pixels that are always black get a density too."""
        return images + self.noise * torch.randn(images.shape, generator=rng, device=images.device)

    def gaussian(self) -> tuple[Tensor, Tensor]:
        """Mean `(64,)` and covariance `(64, 64)` of p₁."""
        eye = torch.eye(self.images.shape[1], device=self.images.device)
        return self.images.mean(0), torch.cov(self.images.T) + self.noise**2 * eye


def load_digits(config: DigitsConfig) -> tuple[Digits, Digits]:
    """Training and held-out images; the split is the same for every seed."""
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ImportError("toy.digits needs scikit-learn, for its data: pip install scikit-learn") from error
    bunch = datasets.load_digits()
    order = torch.randperm(len(bunch.data), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(bunch.data, dtype=torch.float32)[order].to(config.device) / 8 - 1
    classes = torch.tensor(bunch.target)[order].to(config.device)
    k = config.held_out
    return Digits(images[k:], classes[k:], config.noise), Digits(images[:k], classes[:k], config.noise)


def train_classifier(config: DigitsConfig, data: Digits) -> nn.Module:
    """p(y|x), as log-probabilities: images `(B, 64)` to `(B, 10)`."""
    batches = RandomBatches(lambda rng: data.sample(128, rng), generator(config, 1))
    layers = (nn.Linear(64, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 10), nn.LogSoftmax(-1))

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor], rng: torch.Generator | None) -> Tensor:
        images, classes = batch
        images = images + 0.2 * torch.randn(images.shape, generator=rng, device=images.device)  # to keep it smooth
        return nn.functional.nll_loss(model(images), classes)

    model = nn.Sequential(*layers).to(config.device)
    settings = TrainConfig(steps=config.classifier_steps, seed=stream_of(config, 1))
    return train(model, loss, batches, settings, progress="train the classifier", **resumable(config, "classifier"))[0]


def train_judge(data: Digits) -> Classify:
    """A second opinion: a support vector machine, trained on images that the map and the reward never saw."""
    from sklearn.svm import SVC

    machine = SVC().fit(data.images.cpu().numpy(), data.classes.cpu().numpy())
    return lambda x: torch.from_numpy(machine.predict(x.cpu().numpy())).to(x.device)


def accuracy_of(classify: Classify, data: Digits) -> float:
    """Share of images whose class is found."""
    return float((classify(data.images) == data.classes).float().mean())


def class_mixture_reward(classifier: nn.Module) -> Reward:
    """r(x) = log Σ_i w_i p(y_i|x)."""
    log_weights = CLASS_WEIGHTS.log()  # −∞ for classes that are not wanted
    wanted = CLASS_WEIGHTS > 0
    return lambda x: torch.logsumexp(classifier(x)[:, wanted] + log_weights[wanted].to(x), -1)


# ---- the map -------------------------------------------------------------------------------------------


def train_map(config: DigitsConfig, data: Digits) -> FlowMap:
    """E13 + E14 from images alone."""
    batches = RandomBatches(lambda rng: data.sample(config.batch, rng)[0], generator(config, 2))
    mean, cov = data.gaussian()
    variance = float(cov.diagonal().mean())
    X = FlowMap(MLP(mean, cov, hidden=config.hidden, depth=3, normalise=True)).to(config.device)

    def loss(X: FlowMap, x1: Tensor, rng: torch.Generator | None) -> Tensor:
        return meta_flow_map_loss(X, x1, data_var=variance, p=0.2, p_consistency=0.2, generator=rng)

    settings = TrainConfig(steps=config.train_steps, lr=config.lr, seed=stream_of(config, 2))
    return train(X, loss, batches, settings, progress="train the map", **resumable(config, "map"))[0]


@torch.no_grad()
def check_posteriors(config: DigitsConfig, X: FlowMap, held_out: Digits, judge: Classify) -> dict[str, Any]:
    """Held-out images, noised to t, and one-step draws of p_{1|t}: what must hold of exact ones, beside what does.

    - `psnr`: of the mean E[x₁ | x_t] (E2) to the clean image, in dB; `noisy_psnr`: of the best multiple of x_t.
    - `spread_over_error`: the variance of the draws over the squared error of their mean; 1 where calibrated.
    - `same_class`: how often the judge finds the class of the clean image in a draw.
    - `sw2`: one draw for each image is again a set from p₁, so its sliced W₂ to the clean images is that between
      two sets of real images, up to the correlation of a draw with its image.
    """
    rng = generator(config, 3)
    clean = held_out.blur(held_out.images, rng)
    result = {}
    for t in tqdm(TIMES, desc="check posteriors", leave=False):
        x = interpolate(noise_like(X, len(clean), generator=rng), clean, t)
        draws = sample_posterior(X, t, x, config.posterior_samples, generator=rng)
        spread = draws.var(0).mean()
        error = (draws.mean(0) - clean).square().mean() - spread / config.posterior_samples
        agree = judge(draws.flatten(0, 1)).view(len(draws), -1) == held_out.classes
        result[str(t)] = {
            "psnr": psnr(denoiser(X, t, x), clean),
            "noisy_psnr": psnr(x * float((x * clean).sum() / x.square().sum()), clean),
            "spread_over_error": float(spread / error),
            "same_class": float(agree.float().mean()),
            "sw2": distance(draws[0], clean, rng),
        }
    return result


def psnr(x: Tensor, clean: Tensor) -> float:
    """10 log₁₀(range²/mean squared error), in dB; pixels range over [−1, 1]."""
    return float(10 * torch.log10(4 / (x - clean).square().mean()))


def distance(x: Tensor, y: Tensor, rng: torch.Generator) -> float:
    """Sliced W₂ of two sets of one size."""
    return float(sliced_wasserstein(x, y, n_projections=512, generator=rng))


@torch.no_grad()
def check_samples(config: DigitsConfig, X: FlowMap, data: Digits, held_out: Digits) -> dict[str, Any]:
    """Samples of p₁ beside held-out images: sliced W₂, its floor, and whether the map recites its training set.

    `nearest_is_training`: of samples whose nearest image is sought among as many training as held-out images,
    the share that find it in the training set: 1/2 for a map that does not memorise.
    """
    rng = generator(config, 4)
    n = len(held_out.images)
    clean = held_out.blur(held_out.images, rng)
    others = data.images[torch.randperm(len(data.images), generator=rng, device=clean.device)[:n]]
    sets = {f"{k}_steps": sample(X, n, k, generator=rng) for k in (1, 2, 4)}
    sets["ode"] = integrate(X.drift, noise_like(X, n, generator=rng), time_grid(config.steering_steps))
    result: dict[str, Any] = {}
    for name, x in sets.items():
        to_training, to_held_out = (torch.cdist(x, images).amin(1) for images in (others, held_out.images))
        memorised = float((to_training < to_held_out).float().mean())
        result[name] = {"sw2": distance(x, clean, rng), "nearest_is_training": memorised}
    result["floor"] = {"sw2": distance(data.blur(others, rng), clean, rng)}  # training images in place of samples
    return result


# ---- the reward ----------------------------------------------------------------------------------------


def steered_samples(config: DigitsConfig, X: FlowMap, reward: Reward) -> dict[str, Tensor]:
    """Samples along the Doob ODE (E7) and its rivals, all on one time grid; N counts posterior draws a step."""
    rng = generator(config, 5)
    n, grid = config.set_size, time_grid(config.steering_steps)
    x = noise_like(X, n, generator=rng)
    with torch.no_grad():
        samples = {"base": integrate(X.drift, x, grid)}
    samples["DPS"] = integrate(lambda t, x: dps_drift(X, reward, t, x), x, grid, progress="steer: DPS")
    # With one draw, Stein's identity (E17) says nothing: the weighted mean is the mean.
    for name, method, counts in (
        ("MFM-G", "gradient", (1, 4)),
        ("MFM-GF", "stein", (4, 16)),
        ("both", "controlled", (4, 16)),
    ):
        for draws in counts:
            label = f"{name}, N = {draws}"
            samples[label], _ = steer(
                X, reward, n, n=draws, times=grid, method=method, generator=rng, progress=f"steer: {label}"
            )
    return samples


def finetune(config: DigitsConfig, X: FlowMap, data: Digits, reward: Reward) -> FlowMap:
    """E18: the student starts as the base; states come from noised images, times from U(0, 0.98).

    The targets use Stein's identity (E17): here those through the gradient of the reward vary more.
    """
    batches = RandomBatches(lambda rng: data.sample(config.finetune_batch, rng)[0], generator(config, 6))
    with torch.no_grad():
        log_scale = float(log_mean_exp(reward(data.images)))

    def loss(student: FlowMap, x1: Tensor, rng: torch.Generator | None) -> Tensor:
        t = 0.98 * torch.rand(len(x1), generator=rng, device=x1.device)
        x = interpolate(noise_like(X, len(x1), generator=rng), x1, t)
        n = config.finetune_draws
        return finetune_loss(
            student.drift, X.drift, X, reward, t, x, n=n, method="stein", log_scale=log_scale, generator=rng
        )

    student = copy.deepcopy(X).requires_grad_()
    settings = TrainConfig(steps=config.finetune_steps, lr=1e-3, clip=10.0, seed=stream_of(config, 6))
    return train(student, loss, batches, settings, progress="fine-tune", **resumable(config, "student"))[0]


def count_classes(x: Tensor, classifiers: dict[str, Classify]) -> dict[str, Any]:
    """Class frequencies as each classifier sees them, their L₂ distance to w, and how often both agree."""
    seen = {name: classify(x).cpu() for name, classify in classifiers.items()}
    result: dict[str, Any] = {}
    for name, classes in seen.items():
        frequencies = torch.bincount(classes, minlength=10).double() / len(classes)
        result[name] = {"l2": float((frequencies - CLASS_WEIGHTS).norm()), "frequencies": frequencies.tolist()}
    result["agreement"] = float((seen["classifier"] == seen["judge"]).float().mean())
    return result


@torch.no_grad()
def tilted_frequencies(data: Digits, reward: Reward) -> list[float]:
    """Class frequencies of p* ∝ p₁ e^r by reweighting the training images, with their true classes."""
    share = torch.softmax(reward(data.images).double(), 0).cpu()
    return torch.zeros(10, dtype=torch.float64).index_add(0, data.classes.cpu(), share).tolist()


# ---- the run -------------------------------------------------------------------------------------------


def main(config: DigitsConfig) -> dict[str, Any]:
    """The whole rung; returns what report.json holds."""
    if config.fast:
        config = dataclasses.replace(config, **FAST)
    began = start(config)
    clock: dict[str, float] = {}

    def lap(stage: str) -> None:
        clock[stage] = time.perf_counter() - began - sum(clock.values())

    data, held_out = load_digits(config)
    model, judge = train_classifier(config, data), train_judge(held_out)
    classifiers: dict[str, Classify] = {"classifier": lambda x: model(x).argmax(-1), "judge": judge}
    reward = class_mixture_reward(model)
    accuracy = {"classifier": accuracy_of(classifiers["classifier"], held_out), "judge": accuracy_of(judge, data)}
    lap("classifiers")
    X = train_map(config, data)
    X.save_pretrained(config.out / "map")
    lap("map")
    posteriors = check_posteriors(config, X, held_out, judge)
    unconditional = check_samples(config, X, data, held_out)
    lap("checks")
    samples = steered_samples(config, X, reward)
    lap("steering")
    noise = noise_like(X, config.set_size, generator=generator(config, 7))
    student = finetune(config, X, data, reward)
    student.save_pretrained(config.out / "student")
    with torch.no_grad():
        samples["fine-tuned"] = integrate(student.drift, noise, time_grid(config.steering_steps))
    lap("finetuning")
    report = {
        "accuracy": accuracy,
        "posteriors": posteriors,
        "samples": unconditional,
        "target": CLASS_WEIGHTS.tolist(),
        "tilted_frequencies": tilted_frequencies(data, reward),
        "l2_floor": math.sqrt((1 - float(CLASS_WEIGHTS.square().sum())) / config.set_size),
        "classes": {name: count_classes(x, classifiers) for name, x in samples.items()},
    }
    draw_posteriors(config, X, held_out)
    draw_steering(config, samples, report)
    lap("pictures")
    report["seconds_by_stage"] = clock
    report["seconds"] = time.perf_counter() - began
    report["config"] = {k: v if isinstance(v, int | float) else str(v) for k, v in dataclasses.asdict(config).items()}
    save_json(report, config.out / "report.json")
    remove_checkpoints(config)
    return report


def mosaic(images: Tensor) -> np.ndarray:
    """Images `(rows, columns, 64)` as one picture with grey lines between them; smoothed, as 8×8 is hard to read."""
    rows, columns, _ = images.shape
    large = nn.functional.interpolate(images.reshape(-1, 1, 8, 8).cpu(), size=(ZOOM, ZOOM), mode="bicubic")
    framed = nn.functional.pad(large.clamp(-1, 1), (1, 1, 1, 1), value=0.0)  # (rows · columns, 1, ZOOM + 2, ZOOM + 2)
    return framed.view(rows, columns, ZOOM + 2, ZOOM + 2).transpose(1, 2).flatten(2).flatten(0, 1).numpy()


def draw_posteriors(config: DigitsConfig, X: FlowMap, held_out: Digits) -> None:
    """One held-out digit of each class a row: clean, then at each time the noisy state and one-step draws."""
    rng = generator(config, 8)
    chosen = [int((held_out.classes == k).nonzero()[0]) for k in range(10)]
    clean, draws = held_out.images[chosen], 4
    widths = [1.8] + [draws + 1.0] * len(TIMES)
    figure, axes = new_figure(1, 1 + len(TIMES), size=(2.3, 5.0), width_ratios=widths)
    axes[0, 0].imshow(mosaic(clean.unsqueeze(1)), cmap="gray", vmin=-1, vmax=1)
    axes[0, 0].set_title("held-out\nimage x₁")
    for ax, t in zip(axes[0, 1:], TIMES, strict=True):
        x = interpolate(noise_like(X, len(clean), generator=rng), clean, t)
        with torch.no_grad():
            x1 = sample_posterior(X, t, x, draws, generator=rng)
        ax.imshow(mosaic(torch.stack([x, *x1], 1)), cmap="gray", vmin=-1, vmax=1)
        ax.axvline(ZOOM + 1.5, color=COLOURS["orange"], linewidth=3)
        ax.set_title(f"t = {t}\nnoisy x_t | {draws} samples of x₁")
    for ax in axes.flat:
        ax.set_axis_off()
    figure.suptitle(
        "What could the clean digit be? Its noisy state x_t (left of the line) and one-step samples of p(x₁ | x_t); "
        "8×8 pixels, smoothed for display"
    )
    save_figure(figure, config.out / "posteriors.png")


def draw_steering(config: DigitsConfig, samples: dict[str, Tensor], report: dict[str, Any]) -> None:
    """Class frequencies, by the judge, of base, steered and fine-tuned samples against w; and the samples."""
    shown = {"base": "grey", "MFM-G, N = 4": "blue", "fine-tuned": "green"}
    figure, axes = new_figure(1, 4, size=(3.2, 3.6), width_ratios=[1.7, 1, 1, 1])
    bars, classes = axes[0, 0], np.arange(10)
    bars.bar(classes, CLASS_WEIGHTS.tolist(), width=0.9, color=COLOURS["orange"], alpha=0.45, label="target w")
    for k, (name, colour) in enumerate(shown.items()):
        found = report["classes"][name]["judge"]
        offset = 0.28 * (k - 1)
        bars.bar(classes + offset, found["frequencies"], width=0.24, color=COLOURS[colour], label=name)
        ax = axes[0, k + 1]
        ax.imshow(mosaic(samples[name][:64].view(8, 8, -1)), cmap="gray", vmin=-1, vmax=1)
        ax.set_title(f"{name}\nL₂ to w = {found['l2']:.3f}", color=COLOURS[colour] if k else "black")
        ax.set_axis_off()
    bars.set(xticks=classes, xlabel="class, as the held-out judge sees it", ylabel="frequency")
    bars.set_title(f"L₂ floor of {config.set_size} samples: {report['l2_floor']:.3f}")
    bars.legend(loc="upper left")
    figure.suptitle(
        "Digits steered to the classes 1, 3, 5, 7, 9 with weights 1 : 1 : 2 : 2 : 4; 8×8 pixels, smoothed for display"
    )
    save_figure(figure, config.out / "steering.png")


if __name__ == "__main__":
    result = main(parse(DigitsConfig, __doc__ or ""))
    print("accuracy on unseen images:", {name: round(v, 3) for name, v in result["accuracy"].items()})
    for t, found in result["posteriors"].items():
        print(f"posterior at t = {t}:", {name: round(v, 2) for name, v in found.items()})
    print(f"samples, sliced W₂ to held-out images (real ones: {result['samples']['floor']['sw2']:.3f}):", end=" ")
    print({name: round(found["sw2"], 3) for name, found in result["samples"].items() if name != "floor"})
    for name, found in result["classes"].items():
        print(f"{name}: L₂ of the class frequencies to w, by the classifier {found['classifier']['l2']:.3f}", end="")
        print(f", by the judge {found['judge']['l2']:.3f} (floor {result['l2_floor']:.3f})")
    print(f"{result['seconds']:.0f} s in all")
