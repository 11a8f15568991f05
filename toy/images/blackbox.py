"""A black-box reward: images that zlib packs into few bytes, by MFM-GF and by Search, with no gradient anywhere.

r(x) = −c · bytes(x). Reweighting the map's own samples by e^r says what the mean size under p* ∝ p₁ e^r is. Writes
blackbox.png.
"""

import dataclasses
import zlib
from typing import Any

import torch
from torch import Tensor

from mfm_ref import best_of_n, search, steer
from mfm_ref.baselines import effective_share, systematic
from mfm_ref.checks import Reward
from mfm_ref.figures import COLOURS, new_figure, save_figure
from mfm_ref.sampling import noise_like
from toy.common import ToyConfig, generator, option
from toy.images.rung import Rung
from toy.images.samples import MEMORY, ROWS, SHOWN, Method, drawn, grid_of, in_parts, judged, shares, tag_of, unsteered
from toy.images.section import Section, Table

COLOURS_OF = {"unsteered": "grey", "stein": "green", "search": "blue", "best": "orange"}
REAL, PREDICTED = "real", "reweighted"  # rows that are no method's: held-out images, and p* by reweighting


@dataclasses.dataclass(frozen=True)
class Settings(ToyConfig):
    """Of the stage; the defaults take about 3 minutes of one core on digits."""

    blackbox_samples: int = option(4096, "without steering; reweighted by e^r they predict those of p*")
    blackbox_few: int = option(768, "by every other method")
    blackbox_batch: int = option(256, "samples drawn at once and then kept on the disk")
    blackbox_steps: int = option(50, "of each ODE and of Best-of-N")
    blackbox_draws: int = option(16, "posterior draws per step of MFM-GF and of each particle of Search; candidates")
    blackbox_particles: int = option(4, "of each search")
    blackbox_search_steps: int = option(16, "of each search")
    blackbox_strength: float = option(1.0, "standard deviation of the reward over training images, which gives c")
    blackbox_levels: int = option(
        8, "grey levels that pixels are rounded to: noise below one does not count as content"
    )


PRESETS: dict[str, dict[str, Any]] = {
    "fast": {
        "blackbox_samples": 64, "blackbox_few": 32, "blackbox_batch": 32, "blackbox_steps": 4, "blackbox_draws": 2,
        "blackbox_particles": 2, "blackbox_search_steps": 3,
    },
    "mnist": {"blackbox_samples": 1024, "blackbox_few": 256, "blackbox_batch": 64, "blackbox_steps": 25},
    "full": {"blackbox_batch": 1024},
}  # fmt: skip


# ---- the reward ----------------------------------------------------------------------------------------


def packed_size(x: Tensor, levels: int = 256) -> Tensor:
    """Bytes of each image `(B, *D)` in [−1, 1] as 8-bit pixels of so many grey levels, packed by zlib; `(B,)`."""
    steps = levels - 1
    grey = ((x.detach().clamp(-1, 1) + 1) / 2 * steps).round() * (255 / steps)
    pixels = grey.round().to(torch.uint8).cpu().flatten(1).numpy()
    return x.new_tensor([len(zlib.compress(image.tobytes(), level=9)) for image in pixels])


def size_reward(strength: float, images: Tensor, levels: int) -> tuple[Reward, float]:
    """r = −c · bytes, and c, such that r of these images has the standard deviation `strength`.

    Raises:
        ValueError: images that are all of one size.
    """
    spread = float(packed_size(images, levels).std())
    if not spread > 0:
        raise ValueError(f"images must differ in their packed size, got a standard deviation of {spread}")
    c = strength / spread
    return lambda x: -c * packed_size(x, levels), c


# ---- the stage -----------------------------------------------------------------------------------------


def methods_of(config: Settings, rung: Rung, reward: Reward) -> list[Method]:
    """All of them. Those along an ODE start from the same noises."""
    X, n, m, steps = rung.X, config.blackbox_draws, config.blackbox_particles, config.blackbox_steps
    x0 = noise_like(X, config.blackbox_samples, generator=generator(config, 40))
    few = min(config.blackbox_few, config.blackbox_samples)
    batch = config.blackbox_batch

    def steered(rows: range, rng: torch.Generator) -> Any:
        start = x0[rows.start : rows.stop]
        return steer(
            X, reward, len(rows), n=n, steps=steps, method="stein", x0=start, memory=MEMORY, generator=rng
        )  # fmt: skip

    def searched(rows: range, rng: torch.Generator) -> Any:
        return search(
            X, reward, len(rows), particles=m, n=n, steps=config.blackbox_search_steps, max_rows=ROWS, generator=rng
        )

    def best(rows: range, rng: torch.Generator) -> Any:
        return best_of_n(X, reward, len(rows), n, steps=steps, max_rows=ROWS, generator=rng)

    return [
        Method("unsteered", "unsteered", "unsteered", 0, len(x0), batch, unsteered(X, reward, x0, steps)),
        Method("stein", f"MFM-GF, N = {n}", "stein", n, few, batch, steered),
        Method("search", f"Search, {m} × {n}", "search", m, few, batch, searched),
        Method("best", f"best of {n}", "best", n, few, batch, best),
    ]


def facts_of(config: Settings, rung: Rung, x: Tensor, reward: Reward, label: str) -> dict[str, Any]:
    """Size and reward, and whether images are still digits: agreement of both classifiers, and how sure one is."""
    bytes_of = packed_size(x, config.blackbox_levels).double()
    sure = in_parts(lambda part: rung.classifier(part).amax(1).exp(), x)
    return {
        "label": label,
        **judged(rung, x, reward)[0],
        "bytes": float(bytes_of.mean()),
        "bytes_error": float(bytes_of.std() / len(x) ** 0.5),
        "confidence": float(sure.mean()),
    }


def prediction(config: Settings, rung: Rung, x: Tensor, reward: Reward) -> tuple[dict[str, Any], Tensor]:
    """p* by reweighting samples x of p₁ with e^r, and samples of it, by resampling.

    The mean size is the weighted one, its error that of a ratio of two means; the effective sample size is a share.
    `shift` is from the mean without weights.
    """
    bytes_of, r = packed_size(x, config.blackbox_levels).double(), in_parts(reward, x).double()
    share = torch.softmax(r, 0)
    mean, unweighted = (share * bytes_of).sum(), bytes_of.mean()
    deviations = share * (bytes_of - mean)
    kept = x[systematic(r, generator=generator(config, 42))]
    return {
        **facts_of(config, rung, kept, reward, "p*: unsteered, reweighted"),
        "bytes": float(mean),
        "bytes_error": float(deviations.norm()),
        "shift": float(mean - unweighted),
        "shift_error": float((deviations - (bytes_of - unweighted) / len(x)).norm()),
        "ess": effective_share(r),
    }, kept


def shift_of(config: Settings, x: Tensor, base: Tensor) -> dict[str, float]:
    """How much larger samples are than those that start from the same noises without steering, in the mean."""
    sizes = (packed_size(images, config.blackbox_levels).double() for images in (x, base[: len(x)]))
    apart = next(sizes) - next(sizes)
    return {"shift": float(apart.mean()), "shift_error": float(apart.std() / len(x) ** 0.5)}


def run(config: Settings, rung: Rung) -> dict[str, Any]:
    """Every method; what it drew before it was interrupted is read, not drawn again."""
    data, held_out = rung.data.train, rung.data.held_out
    rng = generator(config, 43)
    reward, c = size_reward(config.blackbox_strength, data.blur(data.images, rng), config.blackbox_levels)
    tag = f"{tag_of(config, Settings, rung.X)} {c!r}"
    real = held_out.blur(held_out.images, rng)
    rows = {REAL: facts_of(config, rung, real, reward, "held-out images")}
    samples = {}
    for method in methods_of(config, rung, reward):
        x, cost = drawn(config, 41, method, tag)
        facts = facts_of(config, rung, x, reward, method.label)
        rows[method.name] = {**facts, "evaluations": cost.evaluations, "seconds": cost.seconds}
        samples[method.name] = x
    rows["stein"] |= shift_of(config, samples["stein"], samples["unsteered"])
    rows[PREDICTED], predicted = prediction(config, rung, samples["unsteered"], reward)
    result = {
        "c": c,
        "strength": config.blackbox_strength,
        "levels": config.blackbox_levels,
        "steps": config.blackbox_steps,
        "methods": rows,
        "spent": sum(row.get("seconds", 0.0) for row in rows.values()),
    }
    draw(config, result, samples, predicted)
    return result


def draw(config: Settings, result: dict[str, Any], samples: dict[str, Tensor], predicted: Tensor) -> None:
    """The packed sizes of each method's samples over those that reweighting predicts; and the samples."""
    rows = result["methods"]
    figure, axes = new_figure(2, len(samples), size=(2.8, 2.7))
    expected = packed_size(predicted, config.blackbox_levels).cpu()
    sizes = {name: packed_size(x, config.blackbox_levels).cpu() for name, x in samples.items()}
    together = torch.cat([expected, *sizes.values()])
    low, high = int(together.min()), int(together.max())
    bins = torch.arange(low, high + 2, max(1, (high - low) // 30)).sub(0.5).tolist()
    for (top, bottom), (name, x) in zip(axes.T, samples.items(), strict=True):
        row = rows[name]
        top.hist(sizes[name].numpy(), bins, density=True, color=COLOURS[COLOURS_OF[name]], label=row["label"])
        top.hist(expected.numpy(), bins, density=True, histtype="step", color="black", label="p*, reweighted")
        top.set(xlabel="bytes", yticks=[], title=f"{row['label']}: {row['bytes']:.1f} bytes")
        bottom.imshow(grid_of(x[:SHOWN]), cmap="gray", vmin=-1, vmax=1)
        bottom.set_title(f"both classifiers agree: {100 * row['agreement']:.0f} %")
        bottom.set_axis_off()
    axes[0, 0].legend(fontsize=7)
    figure.suptitle(f"A black-box reward, r = −{result['c']:.3g} · bytes when packed by zlib: sizes and samples")
    save_figure(figure, config.out / "blackbox.png")


# ---- the report ----------------------------------------------------------------------------------------

HEADER = [
    "method", "samples", "mean bytes", "mean reward", "agreement", "confidence", "evaluations", "seconds",
]  # fmt: skip


def section(result: dict[str, Any]) -> Section:
    """The report's words about the black-box reward."""
    rows = result["methods"]
    tables = [
        Table("Packed size", HEADER, [cells(row) for row in rows.values()]),
        Table(
            "Class frequencies, as the judge sees them",
            ["method", *map(str, range(10))],
            [[row["label"], *shares(row["judge"]["frequencies"])] for row in rows.values()],
        ),
    ]
    picture = ("blackbox.png", "Packed sizes of each method's samples (black line: p* by reweighting) and the samples")
    return Section("A black-box reward: compressed size", words(result), tables, [picture])


def cells(row: dict[str, Any]) -> list[str]:
    """One row of the first table."""
    known = "evaluations" in row
    return [
        row["label"],
        str(row["samples"]),
        f"{row['bytes']:.2f} ± {row['bytes_error']:.2f}",
        f"{row['reward']:.2f}",
        f"{100 * row['agreement']:.1f} %",
        f"{row['confidence']:.3f}",
        f"{row['evaluations']:.0f}" if known else "",
        f"{row['seconds']:.0f}" if known else "",
    ]


def words(result: dict[str, Any]) -> str:
    """What was done and found."""
    rows = result["methods"]
    base, stein, expected, real = (rows[name] for name in ("unsteered", "stein", PREDICTED, REAL))
    least = min((rows[name] for name in COLOURS_OF), key=lambda row: row["agreement"])
    text = f"""The reward is r(x) = −c · bytes: the size of an image of {result["levels"]} grey levels, packed by zlib
        at level 9; c = {result["c"]:.3g}, so that r has a standard deviation of {result["strength"]:g} over training
        images. It has no gradient: MFM-GF and Search, like Best-of-N, only ask for its value. Samples without steering
        have {base["bytes"]:.1f} bytes in the mean. From the same noises, {stein["label"]} with {result["steps"]} steps
        adds {stein["shift"]:.2f} ± {stein["shift_error"]:.2f} (one standard error); p* ∝ p₁ e^r adds
        {expected["shift"]:.2f} ± {expected["shift_error"]:.2f}, by reweighting those without steering (effective sample
        size: {100 * expected["ess"]:.0f} % of {expected["samples"]}): steering goes {way(stein, expected):.0f} %
        of the way. Search and Best-of-N have no such target and end at {rows["search"]["bytes"]:.1f} and
        {rows["best"]["bytes"]:.1f}. Both classifiers agree on {100 * real["agreement"]:.1f} % of held-out images, on
        {100 * stein["agreement"]:.1f} % of those of {stein["label"]}, and least often on those of {least["label"]},
        {100 * least["agreement"]:.1f} %."""
    return " ".join(text.split())


def way(row: dict[str, Any], expected: dict[str, Any]) -> float:
    """The shift of a row's mean size in percent of that which p* has."""
    return 100 * row["shift"] / expected["shift"] if expected["shift"] else 0.0
