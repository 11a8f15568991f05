"""Inverse problems: images from y = A x₁ + σ ξ, by steering with the likelihood of y as the reward.

Inpainting, deblurring and super-resolution differ in the matrix A alone: every one is `steer` with
`GaussianLikelihood(A, y, σ)`, one call for each image. An image is one draw of p₁, so its exact posterior would have it
among its samples as one more of them. That is what is checked: its rank among them is uniform, their variance is the
squared error of their mean, each leaves the residual σ² that it leaves itself, and it has the class of a sample as
often as two samples have one class. Writes inverse.png and inverse_calibration.png; the report's words and tables are
in inverse_report.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mfm_ref import Cost, GaussianLikelihood, collect, steer
from mfm_ref.checks import check_count
from mfm_ref.collect import Draw
from mfm_ref.figures import COLOURS, new_figure, save_figure
from mfm_ref.flow_map import MetaFlowMap
from toy.common import ToyConfig, generator, option, stream_of
from toy.digits import psnr
from toy.images.classifiers import Classify
from toy.images.inverse_report import CHOSEN, RIVAL, section
from toy.images.rung import Rung
from toy.images.samples import MEMORY, tag_of
from toy.images.section import mosaic

__all__ = ["PRESETS", "Settings", "run", "section"]

FACTOR = 4  # of super-resolution, a side
LEVELS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # of central intervals
JITTER = 0.1  # noise on samples and truth before they are ranked: pixels that are black for certain are no ties
DIVERGED = 10.0  # a sample with a larger pixel is none: those of images are in [−1, 1]
PICTURED, SAMPLES = 2, 4  # images of each problem, and samples of each, in inverse.png

METHODS = {  # name: method and dynamics of `steer`; CHOSEN and RIVAL on all images, the others on a few
    "both, SDE": ("controlled", "sde"),
    "both, ODE": ("controlled", "ode"),
    "MFM-G, ODE": ("gradient", "ode"),
    "MFM-GF, ODE": ("stein", "ode"),
    "DPS": ("dps", "ode"),
}


@dataclasses.dataclass(frozen=True)
class Settings(ToyConfig):
    """Of the stage; the defaults take about 4 minutes of one core on digits."""

    inverse_images: int = option(16, "held-out images, each measured in every way")
    inverse_samples: int = option(16, "samples of the posterior of each image")
    inverse_draws: int = option(32, "posterior draws per step, N; twice as many are worth more than twice the steps")
    inverse_steps: int = option(25, "steps of the steered SDE or ODE")
    inverse_dps_steps: int = option(200, "steps of DPS: each costs less, and its ODE is stiff")
    inverse_compared: int = option(3, "images on which other estimators and dynamics are tried")
    inverse_sigma: float = option(0.1, "standard deviation of the measurement noise; pixels range over [-1, 1]")
    inverse_blur: float = option(1.0, "standard deviation of the blur, in pixels")


PRESETS: dict[str, dict[str, Any]] = {
    "fast": {
        "inverse_images": 2, "inverse_samples": 4, "inverse_draws": 3, "inverse_steps": 4, "inverse_dps_steps": 6,
        "inverse_compared": 2,
    },
    "mnist": {
        "inverse_images": 8, "inverse_samples": 8, "inverse_draws": 16, "inverse_compared": 2,
        "inverse_blur": 2.0,
    },
    "full": {
        "inverse_images": 64, "inverse_draws": 64, "inverse_steps": 50, "inverse_dps_steps": 1000,
        "inverse_compared": 8, "inverse_blur": 2.0,
    },
}  # fmt: skip


# ---- the problems --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Problem:
    """One way to measure: A `(M, D)`, and the simplest way back, `(D, M)`."""

    a: Tensor
    back: Tensor

    def measure(self, x: Tensor, sigma: float, rng: torch.Generator) -> Tensor:
        """y = A x₁ + σ ξ: `(B, *D) -> (B, M)`."""
        clear = x.flatten(1) @ self.a.T
        return clear + sigma * torch.randn(clear.shape, generator=rng, device=clear.device)

    def trivial(self, y: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The measurement as an image: `(B, M) -> (B, *D)`."""
        return (y @ self.back.T).unflatten(1, shape)


def problems_of(shape: tuple[int, ...], blur: float) -> dict[str, Problem]:
    """Images `(1, H, W)`: without a square of half the side, without the right half, blurred, and averaged 4 by 4.

    Raises:
        ValueError: sides that are not multiples of 4, or a blur that is not positive.
    """
    height, width = shape[-2:]
    if height % FACTOR or width % FACTOR or shape[0] != 1:
        raise ValueError(f"images must be (1, H, W) with sides that are multiples of {FACTOR}, got {shape}")
    if not blur > 0:
        raise ValueError(f"inverse_blur must be positive, got {blur}")
    eye = torch.eye(height * width)
    square, left = torch.ones(height, width), torch.ones(height, width)
    square[height // 4 : height - height // 4, width // 4 : width - width // 4] = 0
    left[:, width // 2 :] = 0
    seen = {"inpainting": eye[square.flatten() > 0], "inpainting, half": eye[left.flatten() > 0]}
    blurred = torch.kron(gaussian_blur(height, blur), gaussian_blur(width, blur))
    pooled = F.avg_pool2d(eye.view(-1, 1, height, width), FACTOR).flatten(1).T.contiguous()
    # A⁺ = Aᵀ(AAᵀ)⁻¹ has mid-grey for what is hidden, and repeats what was averaged. A blurred image is one as it is.
    return {
        **{name: Problem(a, a.T.contiguous()) for name, a in seen.items()},
        "deblurring": Problem(blurred, eye),
        "super-resolution": Problem(pooled, FACTOR**2 * pooled.T.contiguous()),
    }


def gaussian_blur(side: int, std: float) -> Tensor:
    """Weights `(side, side)` of a Gaussian blur along one side; each row sums to one, at the edges too."""
    places = torch.arange(side, dtype=torch.float32)
    weights = (-((places[:, None] - places) / std).square() / 2).exp()
    return weights / weights.sum(1, keepdim=True)


@dataclasses.dataclass(frozen=True)
class Measured:
    """Images, what was measured of them, and their posterior if p₁ were Gaussian."""

    problem: Problem
    sigma: float
    truth: Tensor  # (B, *D)
    classes: Tensor  # (B,)
    y: Tensor  # (B, M)
    means: Tensor  # (B, *D), of the Gaussian posterior
    cov: Tensor  # (D, D), of the Gaussian posterior, the same for all y

    def first(self, k: int) -> "Measured":
        """The first k images."""
        cut = {name: getattr(self, name)[:k] for name in ("truth", "classes", "y", "means")}
        return dataclasses.replace(self, **cut)

    @property
    def open(self) -> Tensor:
        """Pixels that the measurement leaves open, `(D,)`: their Gaussian posterior is wider than the noise."""
        return self.cov.diagonal().sqrt() > self.sigma

    def gaussian_samples(self, n: int, rng: torch.Generator) -> Tensor:
        """n samples of each Gaussian posterior, `(B, n, *D)`."""
        values, basis = torch.linalg.eigh(self.cov.double())
        root = (basis * values.clamp_min(0).sqrt()).to(self.cov)
        noise = torch.randn((len(self.y), n, len(root)), generator=rng, device=root.device)
        return self.means.unsqueeze(1) + (noise @ root.T).unflatten(2, self.means.shape[1:])


def measured(config: Settings, rung: Rung) -> dict[str, Measured]:
    """Held-out images, as p₁ has them, measured in every way."""
    rng = generator(config, 50)
    data, n = rung.data.held_out, config.inverse_images
    truth, classes = data.blur(data.images[:n], rng), data.classes[:n]
    mean, cov = (a.double() for a in rung.data.train.gaussian())
    found = {}
    for name, problem in problems_of(rung.X.shape, config.inverse_blur).items():
        problem = Problem(problem.a.to(truth), problem.back.to(truth))
        y = problem.measure(truth, config.inverse_sigma, rng)
        posteriors = [GaussianLikelihood(problem.a, row, config.inverse_sigma).tilt(mean.flatten(), cov) for row in y]
        means = torch.stack([m for m, _ in posteriors]).to(truth).unflatten(1, rung.X.shape)
        found[name] = Measured(problem, config.inverse_sigma, truth, classes, y, means, posteriors[0][1].to(truth))
    return found


# ---- samples -------------------------------------------------------------------------------------------


def draw_of(config: Settings, X: MetaFlowMap, case: Measured, name: str) -> Draw:
    """Posterior samples of images `rows`, `(len(rows), S, *D)`, by `steer` with the likelihood of each."""
    method, dynamics = METHODS[name]
    options: dict[str, Any] = {"n": config.inverse_draws, "method": method, "dynamics": dynamics, "memory": MEMORY}
    options["steps"] = config.inverse_dps_steps if name == RIVAL else config.inverse_steps

    def draw(rows: range, rng: torch.Generator) -> tuple[Tensor, Cost]:
        x: list[Tensor] = []
        total = Cost(0)
        for k in rows:
            reward = GaussianLikelihood(case.problem.a, case.y[k], case.sigma)
            samples, cost = steer(X, reward, config.inverse_samples, generator=rng, **options)
            x, total = [*x, samples], total + cost
        return torch.stack(x), total

    return draw


def samples_of(
    config: Settings, X: MetaFlowMap, case: Measured, task: str, name: str, tag: str
) -> tuple[Tensor, Cost] | None:
    """Samples `(B, S, *D)` of all images of a case and their cost; None where they diverge.

    Each image is on the disk, in `out/checkpoints`, once it is done.
    """
    folder = "-".join(word.strip(",").lower() for word in f"{task} {name}".split())
    try:
        x, cost = collect(
            draw_of(config, X, case, name),
            len(case.y),
            1,
            folder=config.out / "checkpoints" / "inverse" / folder,
            seed=stream_of(config, 51),
            tag=tag,
            device=config.device,
            progress=f"{task}: {name}",
        )
    except ValueError as error:
        if "finite" not in str(error):
            raise
        return None
    return None if bool((x.abs() > DIVERGED).any()) else (x.to(config.device), cost)


# ---- what they are worth -------------------------------------------------------------------------------


def ratio(above: Tensor, below: Tensor) -> tuple[float, float]:
    """Σ above/Σ below over images `(B,)`, B >= 2, and its standard error by the jackknife."""
    n = len(above)
    without = (above.sum() - above) / (below.sum() - below)
    error = ((n - 1) / n * (without - without.mean()).square().sum()).sqrt()
    return float(above.sum() / below.sum()), float(error)


def ranks_of(x: Tensor, truth: Tensor, rng: torch.Generator) -> Tensor:
    """How many of the samples `(B, S, D)` lie below the truth `(B, D)`, pixel by pixel, after JITTER on both."""

    def jittered(a: Tensor) -> Tensor:
        return a + JITTER * torch.randn(a.shape, generator=rng, device=a.device)

    return (jittered(x) < jittered(truth).unsqueeze(1)).sum(1)


def calibration(case: Measured, x: Tensor, rng: torch.Generator) -> dict[str, Any]:
    """Samples `(B, S, *D)` of the posteriors, on the pixels that are open.

    Exact samples have, in expectation,

    - `spread_over_error`, of the variance over the squared error of the mean, less 1/S of the variance: 1;
    - `coverage` of central intervals: their level; (rank + U)/(S + 1), U uniform, is then uniform on [0, 1];
    - `ranks`: each rank 0 … S of the truth among the samples equally often;
    - `residual`, ‖A x − y‖²/(M σ²) of one sample: 1, as x₁ has itself.

    Each but the ranks with its standard error, over images.
    """
    n = x.shape[1]
    flat, truth = x.flatten(2), case.truth.flatten(1)
    residual = ((flat @ case.problem.a.T - case.y.unsqueeze(1)) / case.sigma).square().mean((1, 2))
    flat, truth = flat[:, :, case.open], truth[:, case.open]
    spread = flat.var(1).mean(1)
    error = (flat.mean(1) - truth).square().mean(1) - spread / n
    ranks = ranks_of(flat, truth, rng)
    uniform = (ranks + torch.rand(ranks.shape, generator=rng, device=ranks.device)) / (n + 1)
    inside = {level: ((uniform - 0.5).abs() < level / 2).to(spread).mean(1) for level in LEVELS}
    ones = torch.ones_like(spread)
    return {
        "spread_over_error": ratio(spread, error),
        "coverage": {str(level): ratio(share, ones) for level, share in inside.items()},
        "ranks": (torch.bincount(ranks.flatten(), minlength=n + 1) / ranks.numel()).tolist(),
        "residual": ratio(residual, ones),
    }


def agreement(case: Measured, x: Tensor, judge: Classify) -> dict[str, float]:
    """Classes of the samples as the judge sees them: how often that of the truth, and how often any sample has it.

    `pairs`, how often two samples of one posterior have one class, is what `same` is for exact posteriors, but for
    images that the judge mistakes.
    """
    n = x.shape[1]
    classes = judge(x.flatten(0, 1)).view(len(x), n)
    counts = F.one_hot(classes, 10).sum(1).double()
    same = (classes == case.classes.unsqueeze(1)).double()
    pairs = (counts * (counts - 1)).sum(1) / (n * (n - 1))
    return {"same": float(same.mean()), "among": float(same.amax(1).mean()), "pairs": float(pairs.mean())}


def worth(case: Measured, x: Tensor, judge: Classify, rng: torch.Generator) -> dict[str, Any]:
    """All numbers of a set of posterior samples `(B, S, *D)`."""
    return {
        "psnr_mean": psnr(x.mean(1), case.truth),
        "psnr_single": psnr(x, case.truth.unsqueeze(1)),
        **calibration(case, x, rng),
        "classes": agreement(case, x, judge),
    }


# ---- the stage -----------------------------------------------------------------------------------------


def run(config: Settings, rung: Rung) -> dict[str, Any]:
    """Every problem by every method; an image that an earlier run finished is read, not steered again.

    Raises:
        ValueError: fewer than two images, samples or images to compare; sides that are not multiples of 4.
    """
    for name in ("inverse_images", "inverse_samples", "inverse_compared"):
        check_count(getattr(config, name), name, 2)
    tag = tag_of(config, Settings, rung.X)
    tasks: dict[str, Any] = {}
    shown: dict[str, list[Tensor]] = {}
    for task, case in measured(config, rung).items():
        tasks[task], columns = solved(config, rung, task, case, tag)
        if columns:
            shown[task] = columns
    result = {
        "images": config.inverse_images,
        "compared": compared_of(config),
        "samples": config.inverse_samples,
        "draws": config.inverse_draws,
        "steps": config.inverse_steps,
        "dps_steps": config.inverse_dps_steps,
        "sigma": config.inverse_sigma,
        "blur": config.inverse_blur,
        "factor": FACTOR,
        "jitter": JITTER,
        "pixels": rung.X.shape[1] * rung.X.shape[2],
        "judge_saw_them": rung.data.judge is rung.data.held_out,
        "tasks": tasks,
    }
    draw_images(config, shown)
    draw_calibration(config, result)
    return result


def compared_of(config: Settings) -> int:
    """Images on which all methods are tried."""
    return min(config.inverse_compared, config.inverse_images)


def solved(
    config: Settings, rung: Rung, task: str, case: Measured, tag: str
) -> tuple[dict[str, Any], list[Tensor] | None]:
    """The numbers of one problem, and its columns of inverse.png; no columns where the chosen method diverges."""
    rng, compared = generator(config, 52), compared_of(config)
    gaussian = case.gaussian_samples(config.inverse_samples, rng)
    trivial = case.problem.trivial(case.y, rung.X.shape)
    everything: dict[str, Any] = {"Gaussian": worth(case, gaussian, rung.judge, rng)}
    some: dict[str, Any] = {}
    columns = None
    for name in METHODS:
        part = case if name in (CHOSEN, RIVAL) else case.first(compared)
        found = samples_of(config, rung.X, part, task, name, tag)
        x, cost = found or (None, None)
        if name in (CHOSEN, RIVAL):
            everything[name] = None if x is None else worth(part, x, rung.judge, rng)
        if x is None or cost is None:
            some[name] = None
            continue
        some[name] = worth(case.first(compared), x[:compared], rung.judge, rng) | cost_of(cost)
        if name == CHOSEN:
            columns = columns_of(case, trivial, x)
    facts = {
        "all": everything,
        "some": some,
        "measurements": case.y.shape[1],
        "open": int(case.open.sum()),
        "psnr_trivial": psnr(trivial, case.truth),
        "psnr_gaussian": psnr(case.means, case.truth),
    }
    return facts, columns


def cost_of(cost: Cost) -> dict[str, float]:
    """What one sample cost."""
    return {"evaluations": cost.evaluations, "seconds": cost.seconds / cost.samples}


# ---- pictures ------------------------------------------------------------------------------------------

COLUMNS = [
    "clean",
    "measured",
    "Gaussian\nmean",
    *(f"sample {k + 1}" for k in range(SAMPLES)),
    "mean",
    "standard\ndev.",
]


def columns_of(case: Measured, trivial: Tensor, x: Tensor) -> list[Tensor]:
    """The columns of inverse.png for a few images; black is a standard deviation of 0, white one of 1 or more."""
    columns = [case.truth, trivial, case.means, *x[:, :SAMPLES].unbind(1)]
    columns += [case.truth.new_zeros(case.truth.shape)] * (SAMPLES - x.shape[1])
    return [a[:PICTURED].cpu() for a in (*columns, x.mean(1), 2 * x.std(1) - 1)]


def draw_images(config: Settings, shown: dict[str, list[Tensor]]) -> None:
    """Two images of each problem: what was measured, and what is made of it."""
    if not shown:
        return
    picture = mosaic(torch.cat([torch.stack(columns, 1) for columns in shown.values()]))
    rows = sum(len(columns[0]) for columns in shown.values())
    high, wide = picture.shape[0] / rows, picture.shape[1] / len(COLUMNS)
    figure, axes = new_figure(1, 1, size=(0.85 * len(COLUMNS) + 1, 0.85 * rows + 0.8))
    ax = axes[0, 0]
    ax.imshow(picture, cmap="gray", vmin=-1, vmax=1)
    ax.set_xticks([wide * (k + 0.5) for k in range(len(COLUMNS))], COLUMNS)
    centres = [high * (k + 0.5) * rows / len(shown) for k in range(len(shown))]
    ax.set_yticks(centres, [name.replace("super-", "super-\n").replace(", ", ",\n") for name in shown])
    ax.xaxis.tick_top()
    ax.tick_params(length=0)
    for side in ax.spines.values():
        side.set_visible(False)
    figure.suptitle("Images from measurements: samples of p(x₁ | y), each steered by the likelihood of y")
    save_figure(figure, config.out / "inverse.png")


def draw_calibration(config: Settings, result: dict[str, Any]) -> None:
    """Ranks of the truth among the samples, and coverage against level."""
    tasks = result["tasks"]
    figure, axes = new_figure(2, len(tasks), size=(2.7, 2.4))
    levels = [0.0, *LEVELS, 1.0]
    for (task, facts), above, below in zip(tasks.items(), *axes, strict=True):
        for name, colour in {"Gaussian": "grey", RIVAL: "red", CHOSEN: "blue"}.items():
            found = facts["all"][name]
            if found is None:
                continue
            heights = [share * len(found["ranks"]) for share in found["ranks"]]
            width = 2 if name == CHOSEN else 1
            above.stairs(heights, color=COLOURS[colour], linewidth=width)
            covered = [0.0, *(found["coverage"][str(level)][0] for level in LEVELS), 1.0]
            below.plot(levels, covered, color=COLOURS[colour], linewidth=width, label=name)
        above.axhline(1, color="black", linewidth=0.8, linestyle=":")
        below.plot([0, 1], [0, 1], color="black", linewidth=0.8, linestyle=":")
        above.set(title=task, xlabel="samples below the truth", ylim=(0, None))
        below.set(xlabel="level of a central interval")
    axes[0, 0].set_ylabel("frequency over uniform")
    axes[1, 0].set_ylabel("share of truths inside")
    handles = {label: line for ax in axes[1] for line, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    axes[1, 0].legend(list(handles.values()), list(handles), fontsize=7)
    figure.suptitle("Is the truth within the posterior's spread as often as it should be?")
    save_figure(figure, config.out / "inverse_calibration.png")
