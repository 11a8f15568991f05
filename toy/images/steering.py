"""Steer to a mixture of classes: MFM-G and MFM-GF at every N beside DPS, Search, Best-of-N and SMC.

The reward is r(x) = log Σ_i w_i p(y_i|x). What each method returns is counted by the classifier that the reward knows
and by the judge that it does not. Writes steering.png and steering_samples.png.
"""

import dataclasses
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mfm_ref import (
    Cost,
    FlowMap,
    best_of_n,
    search,
    smc,
    steer,
    vendi_score,
)
from mfm_ref.baselines import effective_share, systematic
from mfm_ref.checks import Reward
from mfm_ref.collect import Draw
from mfm_ref.figures import COLOURS, new_figure, save_figure
from mfm_ref.sampling import noise_like
from toy.alignment import plain_ticks
from toy.common import ToyConfig, generator, option
from toy.images.classifiers import CLASS_WEIGHTS, frequencies_of, tilted_frequencies
from toy.images.data import Images
from toy.images.rung import Rung
from toy.images.samples import (
    MEMORY,
    ROWS,
    SHOWN,
    Method,
    bandwidth_of,
    drawn,
    grid_of,
    in_parts,
    judged,
    shares,
    tag_of,
    unsteered,
)
from toy.images.section import Section, Table

CONTROLLED = (4, 16)  # N of the estimator that uses both, an aside here
SURER = 8  # N at which MFM-G is tried with two evaluations of the map for each draw, and by the SDE
BEST_OF = (4, 16)
FAVOURITE = 9  # the class of the largest weight, whose images the diversity is measured on
CURVES = {"gradient": ("MFM-G", "blue"), "stein": ("MFM-GF", "green"), "controlled": ("both", "orange")}
REWEIGHTED = 5000  # real images at most that stand for p₁: the judge is slow
LONGER = 4  # times as many steps of DPS, once: its steps cost less than those with draws, and its ODE is stiff
EXPECTED = {"samples": 4096, "largest": 32, "steps": 500, "l2": 0.05}  # the paper's run; what MFM-G is to reach in it


@dataclasses.dataclass(frozen=True)
class Settings(ToyConfig):
    """Of the stage; the defaults take about 40 minutes of one core on digits."""

    steer_samples: int = option(4096, "samples without steering, by DPS, and by MFM-G at the largest N")
    steer_few: int = option(768, "samples by every other method but SMC")
    steer_batch: int = option(256, "samples drawn at once and then kept on the disk")
    steer_steps: int = option(50, "steps of each ODE, of Best-of-N and of SMC")
    steer_largest: int = option(32, "largest number N of posterior draws per step, a power of 2; the others halve it")
    steer_search_particles: int = option(4, "particles of each search")
    steer_search_draws: int = option(16, "posterior draws of each particle of a search, in each step")
    steer_search_steps: int = option(16, "steps of each search")
    steer_smc_particles: int = option(64, "particles of one population of SMC")
    steer_smc_seeds: int = option(20, "populations of SMC")
    steer_vendi: int = option(100, "images of class 9 whose diversity is measured")


PRESETS: dict[str, dict[str, Any]] = {
    "fast": {
        "steer_samples": 64, "steer_few": 32, "steer_batch": 32, "steer_steps": 4, "steer_largest": 2,
        "steer_search_particles": 2, "steer_search_draws": 2, "steer_search_steps": 3, "steer_smc_particles": 16,
        "steer_smc_seeds": 2, "steer_vendi": 3,
    },
    "mnist": {
        "steer_samples": 512, "steer_few": 256, "steer_batch": 64, "steer_steps": 25, "steer_largest": 16,
        "steer_vendi": 50,
    },
    "full": {"steer_few": 4096, "steer_batch": 1024, "steer_steps": 500},
}  # fmt: skip


# ---- the methods ---------------------------------------------------------------------------------------


def methods_of(config: Settings, rung: Rung) -> list[Method]:
    """All of them. Those along an ODE start from the same noises."""
    X, reward, steps = rung.X, rung.reward, config.steer_steps
    all_of_them, few = config.steer_samples, min(config.steer_few, config.steer_samples)
    x0 = noise_like(X, all_of_them, generator=generator(config, 30))
    counts = counts_of(config)
    m, p = config.steer_search_particles, config.steer_smc_particles

    def along(kind: str, n: int, **options: Any) -> Draw:
        chosen: dict[str, Any] = {"n": n, "method": kind, "steps": steps, "memory": MEMORY, **options}
        return lambda rows, rng: steer(X, reward, len(rows), x0=x0[rows.start : rows.stop], generator=rng, **chosen)

    def method(label: str, kind: str, n: int, draw: Draw, samples: int = few, batch: int = 0) -> Method:
        return Method(f"{kind}-{n}", label, kind, n, samples, batch or config.steer_batch, draw)

    def best(n: int) -> Draw:
        return lambda rows, rng: best_of_n(X, reward, len(rows), n, steps=steps, max_rows=ROWS, generator=rng)

    def gradient(n: int, kind: str = "gradient", aside: str = "", **options: Any) -> Method:
        samples = few if n < counts[-1] else all_of_them if kind == "gradient" else min(2 * few, all_of_them)
        return method(f"MFM-G, N = {n}{aside}", kind, n, along("gradient", n, **options), samples)

    return [
        method("unsteered", "unsteered", 0, unsteered(X, reward, x0, steps), all_of_them),
        method("DPS", "dps", 0, along("dps", 1), all_of_them),
        method(f"DPS, {LONGER * steps} steps", "dps", 1, along("dps", 1, steps=LONGER * steps)),
        *map(gradient, counts),
        *(gradient(n, "twice", ", 2 evaluations a draw", posterior_steps=2) for n in counts if n == SURER),
        *(gradient(n, "sde", ", SDE", dynamics="sde") for n in sorted({min(SURER, counts[-1]), counts[-1]})),
        *(method(f"MFM-GF, N = {n}", "stein", n, along("stein", n)) for n in counts),
        *(method(f"both, N = {n}", "controlled", n, along("controlled", n)) for n in CONTROLLED if n in counts),
        method(f"Search, {m} × {config.steer_search_draws}", "search", m, searched(config, X, reward)),
        *(method(f"best of {n}", "best", n, best(n)) for n in BEST_OF),
        method(f"SMC, {p} particles", "smc", p, population(X, reward, steps), p * config.steer_smc_seeds, p),
    ]


def counts_of(config: Settings) -> list[int]:
    """1, 2, 4, … N. Raises ValueError unless the largest is a power of 2."""
    largest = config.steer_largest
    if largest < 1 or largest & (largest - 1):
        raise ValueError(f"steer_largest must be a power of 2, got {largest}")
    return [2**k for k in range(largest.bit_length())]


def searched(config: Settings, X: FlowMap, reward: Reward) -> Draw:
    """MFM-Search (E21)."""
    return lambda rows, rng: search(
        X, reward, len(rows), particles=config.steer_search_particles, n=config.steer_search_draws,
        steps=config.steer_search_steps, max_rows=ROWS, generator=rng,
    )  # fmt: skip


def population(X: FlowMap, reward: Reward, steps: int) -> Draw:
    """One population of SMC."""

    def draw(rows: range, rng: torch.Generator) -> tuple[Tensor, Cost]:
        particles, cost = smc(X, reward, len(rows), steps=steps, max_rows=ROWS, generator=rng)
        return particles.samples, cost

    return draw


# ---- what they are worth -------------------------------------------------------------------------------


def row_of(config: Settings, rung: Rung, method: Method, x: Tensor, cost: Cost, bandwidth: float) -> dict[str, Any]:
    """All that the report says of one method."""
    facts, seen = judged(rung, x, rung.reward)
    sure = (seen["classifier"] == FAVOURITE) & (seen["judge"] == FAVOURITE)
    size = config.steer_smc_particles if method.kind == "smc" else min(config.steer_few, config.steer_samples)
    return {
        "label": method.label,
        "kind": method.kind,
        "n": method.n,
        **facts,
        "floor": floor(len(x)),
        "part": size,
        "l2_of_parts": {name: l2_of_parts(classes, size) for name, classes in seen.items()},
        "vendi": diversity(x[sure], config.steer_vendi, bandwidth),
        "evaluations": cost.evaluations,
        "seconds": cost.seconds,
    }


def l2_of_parts(classes: Tensor, size: int) -> float:
    """The mean L₂ to w of the sets of `size` that classes `(B,)` are cut into: methods with more samples compare so."""
    parts = [part for part in classes.split(size) if len(part) == size]
    return float(np.mean([float((frequencies_of(part) - CLASS_WEIGHTS).norm()) for part in parts]))


def floor(n: int) -> float:
    """The root mean square of the L₂ distance to w of n true draws: √((1 − Σw²)/n)."""
    return math.sqrt((1 - float(CLASS_WEIGHTS.square().sum())) / n)


def diversity(x: Tensor, n: int, bandwidth: float) -> float | None:
    """Vendi score of the first n images, None where there are fewer: scores compare for one n."""
    return float(vendi_score(x[:n], bandwidth=bandwidth)) if len(x) >= n else None


def real_nines(config: Settings, rung: Rung) -> Tensor:
    """Training images of class 9 as p₁ has them, with the noise; as many as the diversity is measured on."""
    data = rung.data.train
    return data.blur(data.images[data.classes == FAVOURITE][: config.steer_vendi], generator(config, 32))


def reweighted(config: Settings, rung: Rung, nines: Tensor, bandwidth: float) -> dict[str, Any]:
    """p* ∝ p₁ e^r from real images: resampled by e^r, and seen by both classifiers.

    These are held-out images, which neither classifier was trained on; the training images where the judge was.
    """
    seen = rung.data.judge is rung.data.held_out
    real = rung.data.train if seen else rung.data.held_out
    images = real.blur(real.images[:REWEIGHTED], generator(config, 34))
    data = Images(images, real.classes[:REWEIGHTED])
    r = in_parts(rung.reward, data.images)
    facts, _ = judged(rung, data.images[systematic(r, generator=generator(config, 33))], rung.reward)
    true = tilted_frequencies(data, rung.reward)
    return {
        **facts,
        "true": {"frequencies": true, "l2": float((torch.tensor(true, dtype=torch.float64) - CLASS_WEIGHTS).norm())},
        "ess": effective_share(r.double()),
        "images": "training" if seen else "held-out",
        "agreement_unweighted": judged(rung, data.images, rung.reward)[0]["agreement"],
        "vendi": diversity(nines, config.steer_vendi, bandwidth),
    }


def own_target(config: Settings, rung: Rung, x: Tensor) -> dict[str, Any]:
    """p* ∝ p₁ e^r of the map itself: its unsteered samples x, resampled by e^r. What exact steering would return."""
    r = in_parts(rung.reward, x)
    kept = x[systematic(r, generator=generator(config, 35))]
    return {**judged(rung, kept, rung.reward)[0], "ess": effective_share(r.double())}


# ---- the stage -----------------------------------------------------------------------------------------


def run(config: Settings, rung: Rung) -> dict[str, Any]:
    """Every method; what it drew before it was interrupted is read, not drawn again."""
    nines = real_nines(config, rung)
    bandwidth = bandwidth_of(nines)
    tag = tag_of(config, Settings, rung.X, rung.classifier)
    rows: dict[str, Any] = {}
    shown: dict[str, Tensor] = {}
    for method in methods_of(config, rung):
        x, cost = drawn(config, 31, method, tag)
        rows[method.name] = row_of(config, rung, method, x, cost, bandwidth)
        if method.kind == "unsteered":
            own = own_target(config, rung, x)
        shown[method.name] = x[:SHOWN].cpu()
    result = {
        "target": CLASS_WEIGHTS.tolist(),
        "samples": config.steer_samples,
        "few": min(config.steer_few, config.steer_samples),
        "steps": config.steer_steps,
        "vendi_of": config.steer_vendi,
        "bandwidth": bandwidth,
        "reweighted": reweighted(config, rung, nines, bandwidth),
        "own": own,
        "spent": sum(row["seconds"] for row in rows.values()),
        "methods": rows,
    }
    draw_steering(config, result)
    draw_samples(config, result, shown)
    return result


def largest_of(result: dict[str, Any], kind: str) -> dict[str, Any]:
    """The row of a kind of the largest N."""
    return max((row for row in result["methods"].values() if row["kind"] == kind), key=lambda row: row["n"])


def draw_steering(config: Settings, result: dict[str, Any]) -> None:
    """Class frequencies, by the judge, of a few methods against w; and L₂ to w against N."""
    figure, axes = new_figure(1, 2, size=(6.0, 3.9))
    bars, curves = axes[0]
    kinds = {"unsteered": "grey", "dps": "red", "gradient": "blue", "stein": "green", "best": "orange"}
    classes = np.arange(len(result["target"]))
    bars.bar(classes, result["target"], width=0.95, color="black", alpha=0.15, label="target w")
    for k, (kind, colour) in enumerate(kinds.items()):
        row = largest_of(result, kind)
        heights, place = row["judge"]["frequencies"], classes + 0.17 * (k - 2)
        bars.bar(place, heights, width=0.16, color=COLOURS[colour], label=row["label"])
    bars.set(xticks=classes, xlabel="class, as the judge sees it", ylabel="frequency", title="Class frequencies")
    bars.set_ylim(0, 1.3 * bars.get_ylim()[1])  # room for the legend
    bars.legend(loc="upper left", fontsize=7, ncols=3)
    draw_curves(curves, result)
    figure.suptitle(f"Steered to the classes 1, 3, 5, 7, 9 with weights 1 : 1 : 2 : 2 : 4, {result['steps']} steps")
    save_figure(figure, config.out / "steering.png")


def draw_curves(ax: Any, result: dict[str, Any]) -> None:
    """L₂ to w of sets of one size against N: solid by the classifier, dashed by the judge."""
    rows, lowest = list(result["methods"].values()), floor(result["few"])
    highest = max(row["l2_of_parts"][name] for row in rows for name in row["l2_of_parts"])
    counts: set[float] = set()
    for name, style in {"classifier": "-", "judge": "--"}.items():
        for kind, (label, colour) in CURVES.items():
            points = {row["n"]: max(row["l2_of_parts"][name], 1e-3) for row in rows if row["kind"] == kind}
            if points:
                mark = {"label": label} if name == "classifier" else {}
                ax.loglog(*zip(*points.items(), strict=True), f"o{style}", color=COLOURS[colour], markersize=4, **mark)
                counts, lowest = counts | set(points), min(lowest, *points.values())
        for kind, colour in (("dps", COLOURS["red"]), ("best", COLOURS["grey"]), ("search", "black")):
            row = largest_of(result, kind)
            mark = {"label": row["label"]} if name == "classifier" else {}
            ax.axhline(max(row["l2_of_parts"][name], 1e-3), color=colour, linestyle=style, linewidth=0.9, **mark)
    ax.axhspan(1e-9, floor(result["few"]), color=COLOURS["grey"], alpha=0.2, label=f"{result['few']} true draws of w")
    ax.set_ylim(lowest / 2, 4 * highest)  # room for the legend
    ax.set(xlabel="posterior draws per step, N", ylabel="L₂ to w", title="By the classifier (solid) and by the judge")
    plain_ticks(ax.xaxis, sorted(counts))
    plain_ticks(ax.yaxis, [0.01, 0.02, 0.05, 0.1, 0.2, 0.5])
    ax.legend(fontsize=7, ncols=2, loc="upper center")


def draw_samples(config: Settings, result: dict[str, Any], shown: dict[str, Tensor]) -> None:
    """Samples of seven methods; the population of SMC is one, whose particles may be kin."""
    sizes = [row["n"] for row in result["methods"].values() if row["kind"] == "stein"]
    names = ["unsteered-0", "dps-0", f"stein-{min(16, max(sizes))}", f"gradient-{max(sizes)}"]
    names += [next(name for name in shown if name.startswith("search")), f"best-{BEST_OF[-1]}"]
    names += [next(name for name in shown if name.startswith("smc"))]
    rows = result["methods"]
    panels = {name: f"{rows[name]['label']}\nL₂ to w by the judge: {rows[name]['judge']['l2']:.2f}" for name in names}
    last = rows[names[-1]]
    panels[names[-1]] = f"{last['label']}, one population\nmean L₂ by the judge: {last['l2_of_parts']['judge']:.2f}"
    images = {panels[name]: shown[name][: rows[name]["part"]] for name in names}
    draw_grids(config, "steering_samples.png", images, "Samples of the methods")


def draw_grids(config: ToyConfig, file: str, images: dict[str, Tensor], title: str) -> None:
    """Grids of at most 64 images `(B, 1, H, W)` each, four in a row, under their titles."""
    columns = min(4, len(images))
    figure, axes = new_figure(-(-len(images) // columns), columns, size=(2.5, 2.9))
    for ax in axes.flat:
        ax.set_axis_off()
    for ax, (name, x) in zip(axes.flat, images.items(), strict=False):
        ax.imshow(grid_of(x), cmap="gray", vmin=-1, vmax=1)
        ax.set_title(name)
    figure.suptitle(title)
    save_figure(figure, config.out / file)


# ---- the report ----------------------------------------------------------------------------------------


def section(result: dict[str, Any]) -> Section:
    """The report's words about steering."""
    rows = result["methods"]
    tables = [
        Table(
            "Class mixture: what each method returns",
            HEADER,
            [*map(cells, rows.values()), own_cells(result), target(result)],
        ),
        Table(
            "Class frequencies, as the judge sees them",
            ["method", *map(str, range(len(result["target"])))],
            [
                ["target w", *shares(result["target"])],
                [
                    f"p*, {result['reweighted']['images']} images, true classes",
                    *shares(result["reweighted"]["true"]["frequencies"]),
                ],
                *([row["label"], *shares(row["judge"]["frequencies"])] for row in rows.values()),
            ],
        ),
    ]
    pictures = [
        ("steering.png", f"Class frequencies, and L₂ to w of sets of {result['few']} samples against N"),
        ("steering_samples.png", "Samples of each method, as they come"),
    ]
    return Section("Steering to a mixture of classes", words(result), tables, pictures)


HEADER = [
    "method", "samples", "L₂, classifier", "L₂, judge", "L₂ of true draws", "agreement", "mean reward", "Vendi score",
    "evaluations", "seconds",
]  # fmt: skip


def cells(row: dict[str, Any]) -> list[str]:
    """One row of the first table."""
    label = row["label"]
    if row["kind"] == "smc":
        label += f" (one population: L₂ {row['l2_of_parts']['classifier']:.3f}, {row['l2_of_parts']['judge']:.3f})"
    return [
        label,
        str(row["samples"]),
        *(f"{row[name]['l2']:.3f}" for name in ("classifier", "judge")),
        f"{row['floor']:.3f}",
        f"{100 * row['agreement']:.1f} %",
        f"{row['reward']:.2f}",
        number(row["vendi"]),
        f"{row['evaluations']:.0f}",
        f"{row['seconds']:.0f}",
    ]


def target(result: dict[str, Any]) -> list[str]:
    """The row of p*, from the training images."""
    found = result["reweighted"]
    judged = (f"{found[name]['l2']:.3f}" for name in ("classifier", "judge"))
    agreement = f"{100 * found['agreement']:.1f} %"
    return [
        f"p*, {found['images']} images",
        "",
        *judged,
        "",
        agreement,
        f"{found['reward']:.2f}",
        number(found["vendi"]),
        "",
        "",
    ]


def own_cells(result: dict[str, Any]) -> list[str]:
    """The row of the map's own p*."""
    own = result["own"]
    l2 = (f"{own[name]['l2']:.3f}" for name in ("classifier", "judge"))
    size, agreement = own["ess"] * own["samples"], f"{100 * own['agreement']:.1f} %"
    return [
        "p* of the map: unsteered, weighted; its effective size", f"{size:.0f}", *l2, f"{floor(round(size)):.3f}",
        agreement, f"{own['reward']:.2f}", "–", "", "",
    ]  # fmt: skip


def number(value: float | None) -> str:
    """A score, or a dash where there were too few images."""
    return "–" if value is None else f"{value:.1f}"


def words(result: dict[str, Any]) -> str:
    """What was done and found."""
    best, base, stein = largest_of(result, "gradient"), result["methods"]["unsteered-0"], largest_of(result, "stein")
    l2 = best["classifier"]["l2"]
    paragraphs = (
        f"""The reward log Σ w_i p(y_i|x) asks for the classes 1, 3, 5, 7, 9 in the proportions 1 : 1 : 2 : 2 : 4.
        Every ODE has {result["steps"]} uniform steps; N counts posterior draws in each.""",
        smaller(result),
        f"""{best["label"]} has an L₂ distance to w of {l2:.3f} by the classifier of the reward and of
        {best["judge"]["l2"]:.3f} by the judge, with {best["samples"]} samples; as many true draws of w have
        {best["floor"]:.3f}, samples without steering {base["classifier"]["l2"]:.3f} and {base["judge"]["l2"]:.3f}.
        {expectation(best)}
        {stein["label"]}, without a gradient, has {stein["classifier"]["l2"]:.3f} and {stein["judge"]["l2"]:.3f} with
        {stein["samples"]} samples (true draws: {stein["floor"]:.3f}); at N = 1 it does not steer, as one weight says
        nothing.""",
        whose_error(result),
        others(result),
        hacking(result),
        f"""The Vendi score, an effective number of different images, is that of {result["vendi_of"]} images that both
        classifiers take for a {FAVOURITE}: within one class, a wrong mixture of classes counts neither as diversity
        nor as lack of it, and of this class w wants most. Its kernel is half as wide as the median distance of two
        real ones. A dash means that a method has fewer of them. An evaluation is one pass of the map or the reward,
        forward or backward, for one image.""",
    )
    return "\n\n".join(" ".join(part.split()) for part in paragraphs if part)


def expectation(best: dict[str, Any]) -> str:
    """Whether MFM-G reaches what is expected of it, where so many samples can tell."""
    aim, l2 = EXPECTED["l2"], best["classifier"]["l2"]
    if best["floor"] > aim / 2:
        return f"Expected of a full run is at most {aim}, which so few samples cannot tell from more."
    return f"The aim, at most {aim} by the classifier, is {'reached' if l2 <= aim else 'missed'}."


def whose_error(result: dict[str, Any]) -> str:
    """How much of the distance is the map's, its one-step draws' and the ODE's."""
    own, methods = result["own"], result["methods"]
    asides = [row for row in methods.values() if row["kind"] in ("twice", "sde")]
    listed = "; ".join(f"{row['label']}: {row['classifier']['l2']:.3f}, {row['judge']['l2']:.3f}" for row in asides)
    return f"""Not all of it is steering's. p* of the map itself, its unsteered samples weighted by e^r, has
        {own["classifier"]["l2"]:.3f} by the classifier and {own["judge"]["l2"]:.3f} by the judge (effective size
        {own["ess"] * own["samples"]:.0f}): exact steering would have these. The rest is of one-step draws and of
        Euler's steps. Beside it, by the classifier and by the judge: {listed}."""


def others(result: dict[str, Any]) -> str:
    """What p* and the methods without a target law do."""
    found, smc_row = result["reweighted"], largest_of(result, "smc")
    climbers = (row for row in result["methods"].values() if row["kind"] in ("search", "best"))
    listed = ", ".join(f"{row['judge']['l2']:.2f} ({row['label']})" for row in climbers)
    alone, part = smc_row["l2_of_parts"]["judge"], smc_row["part"]
    return f"""w is not quite the law p* ∝ p₁ e^r: the true classes of {found["images"]} images, weighted by e^r, have
        an L₂ of {found["true"]["l2"]:.3f} (effective sample size: {100 * found["ess"]:.0f} %). Search, with M × N
        draws a step, and Best-of-N climb the reward and have no target law; by the judge their L₂ is {listed}. One
        population of {part} particles of SMC has {alone:.2f} on average, {part} true draws have {floor(part):.2f};
        all {smc_row["samples"] // part} together have {smc_row["judge"]["l2"]:.3f}."""


def hacking(result: dict[str, Any]) -> str:
    """Whether the classifiers part ways where the reward is climbed."""
    rows, real = result["methods"], result["reweighted"]
    seen = ", on which the reward's was trained" if real["images"] == "training" else ", which neither was trained on"
    best, least = largest_of(result, "gradient"), min(rows.values(), key=lambda row: row["agreement"])
    return f"""Reward hacking would show as images that the classifier of the reward alone takes for what they should
        be. Both agree on {100 * real["agreement_unweighted"]:.1f} % of {real["images"]} images{seen}, on
        {100 * rows["unsteered-0"]["agreement"]:.1f} % of samples without steering,
        on {100 * best["agreement"]:.1f} % of those of {best["label"]}, and least often on
        those of {least["label"]}: {100 * least["agreement"]:.1f} %."""


def smaller(result: dict[str, Any]) -> str:
    """How the run differs from the paper's, in words; nothing where it does not."""
    best = largest_of(result, "gradient")
    sizes = {"samples": result["samples"], "largest": best["n"], "steps": result["steps"]}
    named = {"samples": "samples", "largest": "as the largest N", "steps": "steps"}
    less = [f"{sizes[k]} {named[k]} in place of {EXPECTED[k]}" for k in sizes if sizes[k] < EXPECTED[k]]
    few = f"Most methods have {result['few']} samples; the table says how many."
    few = few if result["few"] < result["samples"] else ""
    return (f"The run is smaller than the paper's: {', '.join(less)}. " if less else "") + few
