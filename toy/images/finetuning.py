"""Fine-tune the map's drift to λ times the class-mixture reward, and watch what the reward does not see.

E18 in its Stein form for λ = 1, 2 and 5, each from the map that the stages share. On the way, samples along the
student's ODE are measured: by the reward, by rewards that the student does not know (a second classifier and the judge,
which saw other images), by how far pixels leave [−1, 1], by their distance to real images, and by their diversity. The
same numbers of training images under the weights e^{λ r} say what the tilted law itself has; its diversity is that of
images which are accepted with a probability proportional to the weight. Writes finetuning.png, finetuning_samples.png
and the students, students/λ.
"""

import copy
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mfm_ref import FlowMap, RandomBatches, TrainConfig, finetune_loss, integrate, interpolate, time_grid, train
from mfm_ref import vendi_score as vendi
from mfm_ref.checkpoints import Checkpoints
from mfm_ref.checks import Reward, check_count
from mfm_ref.estimators import log_mean_exp
from mfm_ref.figures import COLOURS, new_figure, save_figure
from mfm_ref.files import remove_folder, save_json
from mfm_ref.sampling import noise_like
from toy.common import ToyConfig, generator, option, read_result, stream_of
from toy.images.classifiers import (
    CLASS_WEIGHTS,
    Classifier,
    accuracy_of,
    class_mixture_reward,
    tilted_frequencies,
    train_classifier,
)
from toy.images.rung import Rung
from toy.images.samples import bandwidth_of, in_parts, shares, tag_of
from toy.images.section import Section, Table, mosaic

STRENGTHS = (1.0, 2.0, 5.0)
SHADES = {"1": "blue", "2": "orange", "5": "red"}
LATEST = 0.98  # training times lie below it: the Stein form divides by 1 − t
REFERENCES = 5000  # training and held-out images that samples are compared with; all where there are fewer
PICTURED = 16  # samples of each strength in the grid

MEASURES = {  # name: what the panels call it
    "reward": "mean reward r",
    "held_out": "r by the second classifier",
    "wanted": "wanted classes, by the judge",
    "excess": "mean of |x| beyond 1",
    "nearest": "distance to the nearest real image",
    "vendi": "Vendi score",
}


@dataclasses.dataclass(frozen=True)
class Settings(ToyConfig):
    """Of the stage; the defaults take about 6 minutes of one core on digits."""

    finetune_steps: int = option(1200, "updates of each student")
    finetune_batch: int = option(128, "states in an update")
    finetune_draws: int = option(4, "posterior draws per state, N")
    finetune_lr: float = option(1e-3, "learning rate of Adam")
    finetune_every: int = option(60, "updates between measurements of a student")
    finetune_samples: int = option(512, "images that a measurement takes")
    finetune_ode_steps: int = option(25, "steps of the ODE that draws these images")
    finetune_vendi: int = option(100, "images whose diversity is measured")
    finetune_second_steps: int = option(1000, "updates of the second classifier")


PRESETS: dict[str, dict[str, Any]] = {
    "fast": {
        "finetune_steps": 6, "finetune_batch": 16, "finetune_draws": 2, "finetune_every": 3, "finetune_samples": 32,
        "finetune_ode_steps": 4, "finetune_vendi": 16, "finetune_second_steps": 20,
    },
    "mnist": {
        "finetune_steps": 800, "finetune_batch": 32, "finetune_every": 100, "finetune_samples": 128,
        "finetune_ode_steps": 20, "finetune_lr": 5e-4,
    },
    "full": {
        "finetune_steps": 4000, "finetune_batch": 256, "finetune_every": 400, "finetune_samples": 2048,
        "finetune_ode_steps": 50, "finetune_lr": 1e-4, "finetune_second_steps": 4000,
    },
}  # fmt: skip


# ---- rewards ---------------------------------------------------------------------------------------------


def times(strength: float, reward: Reward) -> Reward:
    """λ r."""
    return lambda x: strength * reward(x)


# ---- what samples are worth ------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Gauge:
    """What every set of images is measured with."""

    reward: Reward
    held_out: Reward
    rung: Rung
    real: Tensor  # held-out images
    bandwidth: float
    vendi_of: int

    @torch.no_grad()
    def __call__(self, x: Tensor, share: Tensor | None = None, few: Tensor | None = None) -> dict[str, Any]:
        """{measure: [mean, standard error]}; the classes' frequencies by the judge; how often it and the reward agree.

        Args:
            x: images `(n, *D)`.
            share: weights `(n,)` that sum to 1 of the images; None for equal ones.
            few: the images `(vendi_of, *D)` whose diversity is measured; None for the first of x.
        """
        weights = torch.full((len(x),), 1 / len(x), dtype=torch.float64) if share is None else share.cpu()
        seen = {name: in_parts(classify, x).cpu() for name, classify in self.rung.classifiers.items()}
        wanted = CLASS_WEIGHTS[seen["judge"]] > 0
        values = {
            "reward": in_parts(self.reward, x),
            "held_out": in_parts(self.held_out, x),
            "wanted": wanted,
            "excess": (x.abs() - 1).clamp_min(0).flatten(1).mean(1),
            "nearest": in_parts(lambda part: torch.cdist(part.flatten(1), self.real.flatten(1)).amin(1), x),
            "agreement": seen["judge"] == seen["classifier"],
        }
        few = x[: self.vendi_of] if few is None else few
        frequencies = torch.zeros(len(CLASS_WEIGHTS), dtype=torch.float64).index_add(0, seen["judge"], weights)
        return {
            **{name: weighted(value, weights) for name, value in values.items()},
            "vendi": [float(vendi(few, bandwidth=self.bandwidth)), 0.0],
            "frequencies": frequencies.tolist(),
        }


def weighted(values: Tensor, weights: Tensor) -> list[float]:
    """The weighted mean of values `(n,)` and its standard error."""
    values = values.double().cpu()
    mean = (weights * values).sum()
    return [float(mean), float((weights * (values - mean)).square().sum().sqrt())]


def gauge_of(config: Settings, rung: Rung, second: Classifier) -> Gauge:
    """The measures of this rung; the scale of the diversity comes from training images."""
    real = rung.data.train.images[: config.finetune_vendi]
    held_out = class_mixture_reward(second)
    nearest = rung.data.held_out.images[:REFERENCES]
    return Gauge(rung.reward, held_out, rung, nearest, bandwidth_of(real), config.finetune_vendi)


@torch.no_grad()
def sampled(config: Settings, student: FlowMap) -> Tensor:
    """Images along the student's ODE; all students and the base start from the same noise."""
    noise = noise_like(student, config.finetune_samples, generator=generator(config, 61))
    grid = time_grid(config.finetune_ode_steps)
    return in_parts(lambda part: integrate(student.drift, part, grid), noise)


@torch.no_grad()
def tilted(config: Settings, rung: Rung, gauge: Gauge, strength: float) -> dict[str, Any]:
    """The tilted law p* ∝ p₁ e^{λ r} itself: training images with the weights e^{λ r}, and its class frequencies.

    `target` has all training images with their true classes; the measures have the first of them, with p₁'s noise.
    The diversity is that of exact samples, which `accepted` leaves of these.

    Raises:
        ValueError: fewer of them than the diversity is measured on.
    """
    data, rng = rung.data.train, generator(config, 62)
    images = data.blur(data.images[:REFERENCES], rng)
    share = torch.softmax(strength * in_parts(rung.reward, images).double(), 0)
    few = accepted(images, share, rng)
    if len(few) < gauge.vendi_of:
        raise ValueError(
            f"the diversity of p* for λ = {strength:g} needs {gauge.vendi_of} of its samples, but of {len(images)} "
            f"training images only {len(few)} are accepted as such: choose a smaller finetune_vendi"
        )
    return gauge(images, share, few[: gauge.vendi_of]) | {"target": tilted_frequencies(data, rung.reward, strength)}


def accepted(x: Tensor, share: Tensor, rng: torch.Generator) -> Tensor:
    """Draws of p₁ `(n, *D)` thinned to draws of the law with weights `share` `(n,)`, none of them twice.

    Each is accepted with probability share/max share, which is e^{λ (r − max r)} for shares ∝ e^{λ r}.
    """
    chance = torch.rand(len(x), generator=rng, device=rng.device, dtype=torch.float64).to(share.device)
    return x[chance < share / share.max()]


# ---- the students ----------------------------------------------------------------------------------------


def finetune(
    config: Settings, rung: Rung, strength: float, tag: str, measure: Callable[[FlowMap, int], None] | None = None
) -> FlowMap:
    """E18, Stein form, for λ r: states are noised training images, times from U(0, LATEST)."""
    stage = 63 + STRENGTHS.index(strength)
    data, reward = rung.data.train, times(strength, rung.reward)
    batches = RandomBatches(lambda rng: data.sample(config.finetune_batch, rng)[0], generator(config, stage))
    with torch.no_grad():
        log_scale = float(log_mean_exp(in_parts(reward, data.images)))

    def loss(student: FlowMap, x1: Tensor, rng: torch.Generator | None) -> Tensor:
        t = LATEST * torch.rand(len(x1), generator=rng, device=x1.device)
        x = interpolate(noise_like(rung.X, len(x1), generator=rng), x1, t)
        return finetune_loss(
            student.drift, rung.X.drift, rung.X, reward, t, x, n=config.finetune_draws, method="stein",
            log_scale=log_scale, generator=rng,
        )  # fmt: skip

    student = copy.deepcopy(rung.X).requires_grad_().train()
    settings = TrainConfig(
        steps=config.finetune_steps,
        lr=config.finetune_lr,
        clip=10.0,
        seed=stream_of(config, stage),
        sample_every=config.finetune_every if measure else 0,
        checkpoint_every=max(1, config.finetune_every - 1),  # mostly not just before a measurement: see `rewind`
    )
    return train(
        student, loss, batches, settings, callback=measure, progress=f"fine-tune, λ = {strength:g}",
        folder=folder_of(config, strength), tag=tag,
    )[0]  # fmt: skip


def folder_of(config: Settings, strength: float) -> Path:
    """Where the checkpoints of a student are."""
    return config.out / "checkpoints" / f"student-{strength:g}"


def rewind(folder: Path, curve: dict[str, Any], every: int, steps: int) -> None:
    """Remove checkpoints that lie after a measurement which is not in the curve.

    The trainer writes a checkpoint before it measures, so a process that is killed between the two loses the
    measurement. From the checkpoint before, it is made again. That of the last update is made from the student itself.
    """
    checkpoints = Checkpoints(folder, {})
    while (newest := checkpoints.newest()) is not None:
        done = int(newest.name.removeprefix("step-"))
        if all(str(k) in curve for k in range(every, min(done, steps - 1) + 1, every)):
            return
        remove_folder(newest)


def tuned(config: Settings, rung: Rung, gauge: Gauge, strength: float, tag: str) -> tuple[Tensor, dict[str, Any]]:
    """A student, saved; its samples, and its curve {updates: measures}, which is on the disk as far as it goes."""
    path = config.out / "checkpoints" / f"curve-{strength:g}.json"
    curve = read_result(path, tag) or {}
    rewind(folder_of(config, strength), curve, config.finetune_every, config.finetune_steps)

    def measure(student: FlowMap, k: int) -> None:
        curve[str(k)] = gauge(sampled(config, student))
        save_json(curve | {"settings": tag}, path)

    student = finetune(config, rung, strength, tag, measure)
    student.save_pretrained(config.out / "students" / f"{strength:g}")
    x = sampled(config, student)
    curve[str(config.finetune_steps)] = gauge(x)
    return x, {k: curve[k] for k in sorted(curve, key=int)}


def run(config: Settings, rung: Rung) -> dict[str, Any]:
    """All students; one that was interrupted goes on from its checkpoint.

    Raises:
        ValueError: fewer images, or samples of a tilted law, than the diversity is measured on; no measurement;
            what is on the disk is of other settings, another map or another reward.
    """
    check_count(config.finetune_every, "finetune_every")
    least = min(config.finetune_samples, len(rung.data.train))
    if not 2 <= config.finetune_vendi <= least:
        raise ValueError(f"finetune_vendi must be between 2 and {least} images, got {config.finetune_vendi}")
    second = train_classifier(
        config, rung.data.judge, config.finetune_second_steps, stage=60, seed=stream_of(config, 60)
    ).requires_grad_(False)
    gauge = gauge_of(config, rung, second)
    aims = {strength: tilted(config, rung, gauge, strength) for strength in STRENGTHS}  # refused before any training
    tag = tag_of(config, Settings, rung.X, rung.classifier, second)
    base = sampled(config, rung.X)
    images, start = [base], gauge(base)
    strengths: dict[str, Any] = {}
    for strength in STRENGTHS:
        x, curve = tuned(config, rung, gauge, strength, tag)
        images.append(x)
        strengths[f"{strength:g}"] = {"curve": {"0": start} | curve, "tilted": aims[strength]}
    result = {
        "steps": config.finetune_steps,
        "samples": config.finetune_samples,
        "draws": config.finetune_draws,
        "vendi_of": config.finetune_vendi,
        "second": {"accuracy": accuracy_of(lambda x: second(x).argmax(-1), rung.data.train)},
        "strengths": strengths,
    }
    draw_curves(config, result)
    draw_samples(config, images)
    return result


# ---- pictures --------------------------------------------------------------------------------------------


def draw_curves(config: Settings, result: dict[str, Any]) -> None:
    """Every measure against the number of updates; dotted, the tilted law itself."""
    figure, axes = new_figure(2, 3, size=(3.4, 2.7))
    for ax, (measure, label) in zip(axes.flat, MEASURES.items(), strict=True):
        for strength, facts in result["strengths"].items():
            steps = [int(k) for k in facts["curve"]]
            values, errors = zip(*(found[measure] for found in facts["curve"].values()), strict=True)
            colour = COLOURS[SHADES[strength]]
            ax.errorbar(steps, values, errors, color=colour, linewidth=1.5, elinewidth=0.7, label=f"λ = {strength}")
            ax.axhline(facts["tilted"][measure][0], color=colour, linewidth=1, linestyle=":")
        ax.set(xlabel="updates", title=label)
    axes[0, 0].legend()
    figure.suptitle("Fine-tuned to λ r; dotted: training images with the weights exp(λ r), the law that is aimed at")
    save_figure(figure, config.out / "finetuning.png")


def draw_samples(config: Settings, images: list[Tensor]) -> None:
    """The base and each student in a row, from the same noise."""
    rows = torch.stack([x[: min(PICTURED, len(x))] for x in images])
    picture = mosaic(rows)
    figure, axes = new_figure(1, 1, size=(0.6 * rows.shape[1] + 1, 0.6 * len(rows) + 0.7))
    ax, high = axes[0, 0], picture.shape[0] / len(rows)
    ax.imshow(picture, cmap="gray", vmin=-1, vmax=1)
    names = ["base", *(f"λ = {strength:g}" for strength in STRENGTHS)]
    ax.set_yticks([high * (k + 0.5) for k in range(len(rows))], names)
    ax.set_xticks([])
    ax.tick_params(length=0)
    for side in ax.spines.values():
        side.set_visible(False)
    figure.suptitle("Samples of the base and of its students, column by column from the same noise")
    save_figure(figure, config.out / "finetuning_samples.png")


# ---- the report ------------------------------------------------------------------------------------------

HEADER = [
    "samples of", "reward", "second classifier", "wanted, judge", "agreement", "L₂ to p*, judge", "beyond ±1",
    "to the nearest", "Vendi score",
]  # fmt: skip


def section(result: dict[str, Any]) -> Section:
    """The report's words about fine-tuning."""
    strengths = result["strengths"]
    rows = []
    for strength, facts in strengths.items():
        target = facts["tilted"]["target"]
        rows += [
            [f"base, λ = {strength}", *cells(facts["curve"]["0"], target)],
            [f"student, λ = {strength}", *cells(final(facts), target)],
            [f"p*, training images, λ = {strength}", *cells(facts["tilted"], target)],
        ]
    frequencies = [[f"student, λ = {k}", *shares(final(facts)["frequencies"])] for k, facts in strengths.items()]
    targets = [[f"p*, λ = {k}", *shares(facts["tilted"]["target"])] for k, facts in strengths.items()]
    tables = [
        Table("Students by what they were trained for, and by what they were not", HEADER, rows),
        Table(
            "Class frequencies of students, as the judge sees them, and of p*",
            ["law", *map(str, range(len(CLASS_WEIGHTS)))],
            [row for pair in zip(frequencies, targets, strict=True) for row in pair],
        ),
    ]
    pictures = [
        ("finetuning.png", "Rewards, over-saturation, distance to real images and diversity against updates"),
        ("finetuning_samples.png", "Samples of the base and of each student, from the same noise"),
    ]
    return Section("Fine-tuning", words(result), tables, pictures)


def final(facts: dict[str, Any]) -> dict[str, Any]:
    """The last point of a curve."""
    return facts["curve"][max(facts["curve"], key=int)]


def distance(frequencies: list[float], target: list[float]) -> float:
    """L₂ distance of class frequencies."""
    return math.dist(frequencies, target)


def cells(found: dict[str, Any], target: list[float]) -> list[str]:
    """One row of the first table, without its name."""
    first = [f"{found[name][0]:.2f}" for name in ("reward", "held_out", "wanted", "agreement")]
    return [
        *first,
        f"{distance(found['frequencies'], target):.3f}",
        f"{found['excess'][0]:.4f}",
        f"{found['nearest'][0]:.2f}",
        f"{found['vendi'][0]:.1f}",
    ]


def change(facts: dict[str, Any], measure: str) -> int:
    """Whether a measure rises (1), falls (−1) or neither (0) from the base to the student, by two standard errors."""
    (before, e0), (after, e1) = facts["curve"]["0"][measure], final(facts)[measure]
    apart = after - before
    return 0 if abs(apart) <= 2 * math.hypot(e0, e1) else (1 if apart > 0 else -1)


VERBS = {1: "rises", 0: "stays within two standard errors,", -1: "falls"}


def words(result: dict[str, Any]) -> str:
    """What was done, and what the numbers say."""
    strengths = result["strengths"]
    text = (
        f"The drift of the map is fine-tuned to r* = λ r by E18 in its Stein form, {result['draws']} posterior draws a "
        f"state, {result['steps']} updates for each λ. {result['samples']} samples along the student's ODE are "
        "measured on the way. The second classifier, like the judge, was trained on images that the reward's did not "
        f"see; it is right on {100 * result['second']['accuracy']:.1f} % of the training images. The law aimed at is "
        "known from the training images, weighted by e^{λ r}: a student is at its goal when it has that law's numbers, "
        "not when a reward is as large as possible. Its Vendi score is that of exact samples: training images that are "
        "accepted with a probability proportional to e^{λ r}."
    )
    return "\n\n".join(
        [text, *(verdict(strength, facts) for strength, facts in strengths.items()), observed(strengths)]
    )


def verdict(strength: str, facts: dict[str, Any]) -> str:
    """What the numbers say of one student."""

    def moved(measure: str, digits: int = 2) -> str:
        before, after, aim = (found[measure][0] for found in (facts["curve"]["0"], final(facts), facts["tilted"]))
        return f"from {before:.{digits}f} to {after:.{digits}f} (p*: {aim:.{digits}f})"

    target = facts["tilted"]["target"]
    l2 = [distance(found["frequencies"], target) for found in (facts["curve"]["0"], final(facts))]
    return (
        f"λ = {strength}: the training reward {VERBS[change(facts, 'reward')]} {moved('reward')}, that of the second "
        f"classifier {VERBS[change(facts, 'held_out')]} {moved('held_out')}; the judge's share of wanted classes goes "
        f"{moved('wanted')}, its L₂ to the class frequencies of p* from {l2[0]:.3f} to {l2[1]:.3f}. Over-saturation, "
        f"the mean of |x| beyond 1, {VERBS[change(facts, 'excess')]} {moved('excess', 4)}; the Vendi score goes "
        f"{moved('vendi', 1)}."
    )


def named(strengths: list[str]) -> str:
    """λ of these strengths, in words."""
    return f"λ = {', '.join(strengths)}" if strengths else "no λ"


def observed(strengths: dict[str, Any]) -> str:
    """Whether rewards that were not trained rise with the one that was, and whether a large λ over-saturates."""
    rising = {
        m: [k for k, facts in strengths.items() if change(facts, m) > 0] for m in ("reward", "held_out", "excess")
    }
    largest = max(strengths, key=float)
    if largest in rising["excess"]:
        saturation = (
            f"the largest λ over-saturates: pixels leave [−1, 1] further than the base's for {named(rising['excess'])}"
        )
    else:
        saturation = (
            "the largest λ does not over-saturate: its pixels leave [−1, 1] no further than the base's. "
            "For every λ E18 aims at the law of the images with other weights, not at images beyond real ones"
        )
    return (
        f"In sum: the training reward rises for {named(rising['reward'])}, the held-out one for "
        f"{named(rising['held_out'])}; {saturation}."
    )
