"""Steered samples, by every method and number of draws in one run, and what each costs.

    python -m imagenet.steer --preset tabby --weights mfm-xl2.pt --kind mfm --vae VAE --reward pickscore=PickScore_v1
    torchrun --nproc-per-node 8 -m imagenet.steer --device cuda --methods base,mfm-g --draws 1,4,16 --scale 5 …

--methods, of which each makes a folder METHOD-N for every N of --draws:

    base        the drift b alone (one folder)
    mfm-g       N posterior draws in each step, and the gradient of the reward through the map (E16)
    mfm-gf      N posterior draws, without a gradient of the reward, which may be a black box (E17)
    mfm-c       both, each where it has less noise: the default of `mfm_ref.steer`
    dps         the reward of the posterior's mean (E20); the best of N chains
    search      the best of N posterior samples at each time, of N / --search-draws particles (E21); a black box
    best-of-n   the best of N samples along b; a black box

All act on latents; the reward is that of the decoded images, times --scale. Sample i of every folder starts from the
same noise, and every random number of it belongs to its number: it is the same on any number of processes, and up to
rounding in any --batch and on any device. Memory: draws take turns where the graphs of the network would take more than
--memory. The decoder and the reward keep no activations but for the --decode images whose gradients are computed, which
come on top. Networks that read x, as the published MFM, cannot be differentiated at t = 0: --guide-from above 0 begins
later. Classifier-free guidance makes no jumps: with it there are base and best-of-n alone. --preset has the paper's
settings, over which typed options win; --reward and --scale are to be typed. OUT gets

    METHOD-N/      samples.npz, latents.npz, grid.png and settings.json, see `imagenet/run.py`, and rewards.json: of
                   each sample, without --scale, and those of --held-out, each with what tells it from others: a file
                   that has changed is another reward
    steer.json     "rows": for each folder mean rewards with standard errors, "diversity" (the mean distance of the
                   latents of two samples of a class), evaluations of a sample as counted ("evaluations": forward or
                   backward passes of map or reward) and by the paper's "formula", "passes" of rows forward through the
                   network (two a row with classifier-free guidance), "seconds" of a sample and "peak_memory" in bytes
    steer.md, steer.png      the same as a table, and rewards against evaluations
    METHOD.png     base, the smallest N and the largest one, side by side, with their mean rewards, with --vae

A run that was killed goes on from its finished batches. Without --vae the reward is one of latents. Before anything is
sampled, each reward is tried on one image.
"""

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from imagenet.commands import check_device, numbers, refusing
from imagenet.measures import diversity, mean_and_error
from imagenet.npz import first_rows, mapped_rows
from imagenet.pictures import draw_lines
from imagenet.prompts import FIELD, TEMPLATE, names_for, prompts_for
from imagenet.rewards import LatentReward, RewardSum, load_reward
from imagenet.run import (
    Job,
    ModelOptions,
    Passes,
    check_channels,
    clear,
    describe,
    generators,
    guided,
    labels_for,
    open_network,
    open_vae,
    reads_context,
    run_job,
)
from imagenet.steer_report import NAMES, draw_curves, short_names, table
from imagenet.vae import VAE
from mfm_ref import (
    ClassifierFree,
    Cost,
    MetaFlowMap,
    best_of_n,
    evaluations,
    rows_within,
    search,
    steer,
    time_grid,
)
from mfm_ref.baselines import by_rows
from mfm_ref.checks import check_count, evaluate_reward
from mfm_ref.distributed import Process, processes
from mfm_ref.files import atomic_path, load_json, save_json
from mfm_ref.options import option, parse
from mfm_ref.sampling import EVALUATIONS, TABLEAUX, noise_like
from mfm_ref.search import best
from mfm_ref.steering import DYNAMICS

METHODS = tuple(NAMES)
ESTIMATORS = {"mfm-g": "gradient", "mfm-c": "controlled", "mfm-gf": "stein"}
THROUGH_REWARD = ("mfm-g", "mfm-c", "dps")  # by its gradient, and the map's
# Options on which no folder depends, or only some: those say so by what they add.
OF_RUN = (
    "preset", "methods", "draws", "best_of", "search_draws", "search_steps", "steps", "noise", "dynamics", "rescale",
    "posterior_steps", "guide_from", "held_out", "memory", "decode", "reward", "scale", "prompt", "names",
)  # fmt: skip
ALL = 2**31
COMPARED = 512  # samples at most whose distances are taken
SIDE = 4  # images in a row of a panel of METHOD.png, at most, and rows
INCHES = 1.0  # of an image there, a side
PRESETS: dict[str, dict[str, Any]] = {
    "tabby": {
        "reward": "", "scale": 0.0, "count": 128, "labels": "281",
        "prompt": "A high-quality, high-resolution photograph of a tabby cat.",
        "guidance": 2.5, "steps": 250, "draws": "1,2,4,8,16,32", "best_of": "1,10,100,1000", "rescale": True,
        "noise": "independent", "guide_from": 0.01, "precision": "bfloat16",
        "methods": "base,mfm-g,mfm-gf,dps,search,best-of-n",
    }
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class SteerOptions(ModelOptions):
    """Options of the script."""

    out: Path = option(Path("runs/steered"), "folder of the results")
    preset: str = option("", "the paper's settings; --reward and --scale are to be given", choices=("", *PRESETS))
    methods: str = option("base,mfm-c,mfm-gf,search,best-of-n", "see above, separated by commas")
    draws: str = option("1,4,16", "numbers N, separated by commas")
    count: int = option(64, "samples of each folder")
    labels: str = option("balanced", "balanced (each class in turn), random, or the number of one class")
    reward: str = option("brightness", "as for imagenet.evaluate values: terms [WEIGHT*]NAME[=PATH], by commas")
    scale: float = option(1.0, "λ, by which the reward is multiplied; the paper's are 1, 2.5 and 5")
    prompt: str = option(TEMPLATE, "of rewards that take one, with {class} for the name of the label")
    names: str = option(
        "", "text file of the names of the classes, one a line; empty for ImageNet's, where there are 1,000"
    )
    held_out: str = option("", "rewards that are measured and not steered by, separated by semicolons")
    steps: int = option(50, "of the ODE or SDE, of Best-of-N too")
    dynamics: str = option("ode", "Euler's or midpoint steps of the ODE (E7), or the SDE (E8)", choices=DYNAMICS)
    posterior_steps: int = option(1, "evaluations of the map for a posterior draw of mfm-g, mfm-gf and mfm-c")
    noise: str = option("sobol", "of their draws", choices=("independent", "antithetic", "sobol"))
    rescale: bool = option(False, "guidance with the norm of the drift; it has another target than p*, not for dps")
    guide_from: float = option(0.0, "time from which on there is guidance")
    search_draws: int = option(4, "posterior samples of each particle of search, or all N where N is below")
    search_steps: int = option(0, "times of search, (k/K)^2.5; 0: as many as --steps")
    best_of: str = option("", "numbers N of best-of-n, in place of --draws")
    memory: float = option(4.0, "10^9 bytes that the graphs of the network may take")
    decode: int = option(
        4, "images decoded together with gradients: at 256 pixels a side Stable Diffusion's decoder takes 1.5 GB each"
    )


class Steered(NamedTuple):
    """One folder."""

    method: str
    n: int

    @property
    def folder(self) -> str:
        """Its name."""
        return self.method if self.method == "base" else f"{self.method}-{self.n}"


@dataclasses.dataclass(frozen=True)
class Run:
    """What all folders of a run are made with."""

    config: SteerOptions
    X: MetaFlowMap
    passes: Passes
    vae: VAE | None
    labels: Tensor  # (count,), int64
    names: list[str] | None  # of the classes
    rewards: dict[str, RewardSum]  # by names, first the one that steers
    most_rows: Callable[[bool, int], int]  # at once, with the reward's gradient or not, in steps of a posterior draw
    settings: dict[str, Any]  # of every folder
    facts: dict[str, Any]

    @property
    def reward(self) -> RewardSum:
        """The one that steers."""
        return next(iter(self.rewards.values()))

    def prompts(self, reward: RewardSum, rows: range) -> list[str | None]:
        """Of some samples."""
        if not reward.reads_prompts:
            return [None] * len(rows)
        return list(prompts_for(self.config.prompt, self.labels[rows.start : rows.stop], self.names))

    def on_latents(self, reward: RewardSum, prompts: str | list[str] | None, scale: float = 1.0) -> LatentReward:
        """A reward of latents, decoded a few at a time where there is a VAE."""
        decode, checkpointed = (ALL, False) if self.vae is None else (self.config.decode, True)
        return LatentReward(self.vae, reward, prompts, scale, decode=decode, checkpointed=checkpointed)

    def identity(self, reward: RewardSum) -> dict[str, Any]:
        """What the values of a reward depend on, beside the samples, as JSON values."""
        found: dict[str, Any] = {"reward": reward.identity}
        if reward.reads_prompts:
            found["prompt"] = self.config.prompt
        if reward.reads_prompts and FIELD in self.config.prompt:
            found["names"] = hashlib.sha256(json.dumps(self.names).encode()).hexdigest()
        return found


# ---- one folder ------------------------------------------------------------------------------------------


def options_of(config: SteerOptions, what: Steered) -> dict[str, Any]:
    """What a method of the core is called with."""
    along: dict[str, Any] = {"steps": config.steps, "dynamics": config.dynamics}
    if what.method == "base":  # no guidance at any time
        return along | {"n": 1, "method": "stein", "guide_from": 1.0}
    if what.method == "search":
        draws = min(config.search_draws, what.n)
        return {"particles": what.n // draws, "n": draws, "steps": config.search_steps or config.steps}
    if what.method == "best-of-n":
        return along | {"n": what.n}
    if what.method == "dps":
        return along | {"n": what.n, "method": "dps", "guide_from": config.guide_from}
    names = ("noise", "rescale", "posterior_steps", "guide_from")
    chosen = {name: getattr(config, name) for name in names}
    return along | {"n": what.n, "method": ESTIMATORS[what.method]} | chosen


def draw(run: Run, what: Steered, rows: range) -> tuple[Tensor, Cost]:
    """Samples number `rows`, `(len, *D)`, and what they cost; those of one prompt together."""
    sources = generators(run.config.seed, rows)
    prompts = [None] * len(rows) if what.method == "base" else run.prompts(run.reward, rows)
    found, costs = torch.empty((len(rows), *run.X.shape), dtype=run.X.dtype, device=run.X.device), []
    for prompt in dict.fromkeys(prompts):
        part = [i for i, other in enumerate(prompts) if other == prompt]
        y = run.labels[[rows[i] for i in part]].to(run.X.device)
        reward = run.on_latents(run.reward, prompt, run.config.scale)
        found[part], cost = steered(run, what, reward, y, [sources[i] for i in part])
        costs.append(cost)
    return found, sum(costs[1:], costs[0])


def steered(
    run: Run, what: Steered, reward: LatentReward, y: Tensor, sources: list[torch.Generator]
) -> tuple[Tensor, Cost]:
    """A sample for each label, `(B, *D)`, with the noise of the generator of its own, and what they cost."""
    arguments = options_of(run.config, what)
    arguments["max_rows"] = run.most_rows(what.method in THROUGH_REWARD, arguments.get("posterior_steps", 1))
    if what.method == "search":
        return search(run.X, reward, len(y), y=y, generator=sources, **arguments)
    if what.method == "best-of-n":
        return best_of_n(run.X, reward, len(y), y=y, generator=sources, **arguments)
    if what.method == "dps":
        return best_chain(run.X, reward, y, sources, arguments)
    return steer(run.X, reward, len(y), y=y, generator=sources, **arguments)


def best_chain(
    X: MetaFlowMap, reward: LatentReward, y: Tensor, sources: list[torch.Generator], arguments: dict[str, Any]
) -> tuple[Tensor, Cost]:
    """The best of n chains of DPS for each label, `(B, *D)`; with one there is nothing to choose, nor a reward."""
    n, size = arguments["n"], len(y)
    x0 = noise_like(X, n, size, generator=sources).flatten(0, 1)
    x, cost = steer(X, reward, n * size, x0=x0, y=y.repeat(n), generator=sources * n, **arguments)
    if n == 1:
        return x, cost
    (r,) = by_rows(lambda x: (evaluate_reward(reward, x),), arguments["max_rows"], x)
    found = best(x.unflatten(0, (n, size)), r.unflatten(0, (n, size)), size)
    return found, dataclasses.replace(cost, samples=size, reward_forward=cost.reward_forward + n * size)


def by_formula(config: SteerOptions, what: Steered) -> int:
    """Evaluations of a sample by the paper's accounting."""
    options, n = options_of(config, what), what.n
    if what.method == "search":
        return evaluations("search", options["steps"], n=options["n"], m=options["particles"])
    steps = config.steps * EVALUATIONS[config.dynamics]
    if what.method == "best-of-n":
        return evaluations("best_of_n", steps, n=n)
    late = sum(t >= options["guide_from"] for t in times_of(config))
    if what.method == "dps":
        return n * evaluations("dps", steps, guided=late) + (n if n > 1 else 0)
    draws = options.get("posterior_steps", 1)
    return evaluations(options["method"], steps, n=n, guided=late, posterior_steps=draws)


def times_of(config: SteerOptions) -> list[float]:
    """When the drift is evaluated."""
    nodes = [node for node, *_ in TABLEAUX[config.dynamics][0]] if config.dynamics in TABLEAUX else [0.0]
    return [t + node * (after - t) for t, after in pairwise(time_grid(config.steps)) for node in nodes]


def run_folder(run: Run, what: Steered, process: Process) -> dict[str, Any] | None:
    """One folder of samples; what its settings.json says, None but in rank 0."""
    settings = run.settings | {"method": what.method, "options": options_of(run.config, what)}
    if what.method != "base":  # which depends on no reward
        settings |= {"scale": run.config.scale, **run.identity(run.reward)}
    job = Job(
        settings, run.facts, run.labels, lambda rows: draw(run, what, rows), run.passes, run.vae, run.config.batch,
        keep_latents=True,
    )  # fmt: skip
    return run_job(job, run.config.out / what.folder, process, what.folder)


# ---- what the samples are worth --------------------------------------------------------------------------


@torch.no_grad()
def rewards_of(run: Run, folder: Path) -> dict[str, list[float]]:
    """The rewards of the samples of a folder, by names, from rewards.json, or evaluated and written there."""
    path = folder / "rewards.json"
    clear(folder, path.name)
    known: list[dict[str, Any]] = load_json(path).get("rewards", []) if path.exists() else []
    found: dict[str, list[float]] = {}
    for name, reward in run.rewards.items():
        of = run.identity(reward)
        values = next((entry["values"] for entry in known if entry["of"] == of), None)
        if values is None:
            values = values_of(run, reward, folder / "latents.npz")
            known.append({"name": name, "of": of, "values": values})
            save_json({"rewards": known}, path)
        found[name] = values
    return found


def values_of(run: Run, reward: RewardSum, path: Path) -> list[float]:
    """A reward of each sample of a file of latents."""
    x, values = mapped_rows(path), []
    for first in range(0, len(x), run.config.batch):
        rows = range(first, min(first + run.config.batch, len(x)))
        prompts = [prompt for prompt in run.prompts(reward, rows) if prompt is not None]  # none, or all
        part = torch.from_numpy(np.array(x[rows.start : rows.stop])).to(run.X.device)
        values += evaluate_reward(run.on_latents(reward, prompts or None), part).double().tolist()
    return values


def row_of(run: Run, what: Steered, record: dict[str, Any]) -> dict[str, Any]:
    """What steer.json says of a folder."""
    folder, cost = run.config.out / what.folder, Cost(**record["cost"])
    return {
        "method": what.method,
        "n": what.n,
        "folder": what.folder,
        "samples": len(run.labels),
        "rewards": {name: spread_of(values) for name, values in rewards_of(run, folder).items()},
        "diversity": diversity_of(folder / "latents.npz", run.labels),
        "evaluations": cost.evaluations,
        "formula": by_formula(run.config, what),
        "passes": record["evaluations_per_sample"],
        "seconds": cost.seconds / cost.samples,
        "peak_memory": cost.peak_memory,
    }


def spread_of(values: list[float]) -> list[float | None]:
    """The mean, and its standard error: None of one value."""
    return [values[0], None] if len(values) == 1 else list(mean_and_error(torch.tensor(values, dtype=torch.float64)))


def diversity_of(path: Path, labels: Tensor) -> float | None:
    """`diversity` of the first samples of a file; None where no class is there twice."""
    x, y = torch.from_numpy(first_rows(path, COMPARED)), labels[:COMPARED]
    kept = torch.bincount(y)[y] > 1
    return diversity(x[kept], y[kept]) if bool(kept.any()) else None


def draw_pictures(config: SteerOptions, rows: list[dict[str, Any]], reward: str) -> None:
    """METHOD.png: images of the base, of the smallest N and of the largest one, and the means of the reward."""
    side = min(SIDE, math.isqrt(config.count))
    base = [row for row in rows if row["method"] == "base"]
    for method in dict.fromkeys(row["method"] for row in rows if row["method"] != "base"):
        found = sorted((row for row in rows if row["method"] == method), key=lambda row: row["n"])
        panels = {}
        for row in [*base, found[0], *found[1:][-1:]]:
            images = first_rows(config.out / row["folder"] / "samples.npz", side**2)
            heading = "base" if row["method"] == "base" else f"N = {row['n']}"
            title = f"{heading}\nmean reward {row['rewards'][reward][0]:.4g}"
            panels[title] = images.reshape(side, side, *images.shape[1:])
        draw_lines([panels], [""] * side, NAMES[method], config.out / f"{method}.png", inches=INCHES)


# ---- the whole run ---------------------------------------------------------------------------------------


def folders_of(config: SteerOptions) -> list[Steered]:
    """Every folder, in order. Raises ValueError for methods and numbers that there are not."""
    methods, draws = config.methods.split(","), numbers(config.draws, "draws", int)
    candidates = numbers(config.best_of, "best-of", int) if config.best_of else draws
    if not set(methods) <= set(METHODS) or len(set(methods)) < len(methods):
        raise ValueError(f"--methods must be some of {', '.join(METHODS)}, separated by commas, got {config.methods!r}")
    check_count(min(draws), "--draws")
    check_count(min(candidates), "--best-of")
    check_count(config.search_draws, "--search-draws")
    uneven = [n for n in draws if n % min(n, config.search_draws)]
    if "search" in methods and uneven:
        raise ValueError(
            f"--draws above --search-draws {config.search_draws} must be multiples of it for search, got {uneven[0]}"
        )
    counts = {"base": [1], "best-of-n": candidates}
    return [Steered(method, n) for method in methods for n in counts.get(method, draws)]


def check_options(config: SteerOptions) -> None:
    """Raise ValueError for numbers out of range."""
    for name in ("count", "batch", "steps", "posterior_steps", "decode"):
        check_count(getattr(config, name), f"--{name.replace('_', '-')}")
    for name in ("seed", "search_steps"):
        check_count(getattr(config, name), f"--{name.replace('_', '-')}", 0)
    if not config.reward:
        raise ValueError("--reward must be given, such as pickscore=FOLDER: the preset has none")
    if not math.isfinite(config.scale) or config.scale == 0:
        raise ValueError(f"--scale must be finite and not 0, which steers by nothing, got {config.scale}")
    if not 0 <= config.guide_from < 1:
        raise ValueError(f"--guide-from must lie in [0, 1), got {config.guide_from}")
    if not config.memory > 0:
        raise ValueError(f"--memory must be positive, got {config.memory}")


def check_methods(config: SteerOptions, X: MetaFlowMap, in_context: bool, reward: RewardSum) -> None:
    """Raise ValueError for methods that the guided network, with a context or not, or the reward cannot serve."""
    methods = config.methods.split(",")
    conditional = [method for method in methods if method not in ("base", "best-of-n")]
    if conditional and not in_context:
        raise ValueError(f"--methods {conditional[0]} needs a network with a context, got one without: use best-of-n")
    if conditional and isinstance(X, ClassifierFree):
        raise ValueError(
            f"--guidance must be 1, or an input of the network, for --methods {conditional[0]}: classifier-free "
            "guidance makes no jumps; base and best-of-n take it"
        )
    through = [method for method in methods if method in THROUGH_REWARD]
    if through and not reward.differentiable:
        raise ValueError(
            f"--methods {through[0]} needs a differentiable reward, got {config.reward}: use mfm-gf, search, best-of-n"
        )
    if through and not X.reads_tx and config.guide_from == 0:
        raise ValueError(
            f"--guide-from must be above 0 for --methods {through[0]} and a network that reads x, such as 0.01, got 0"
        )


def open_rewards(config: SteerOptions) -> dict[str, RewardSum]:
    """The rewards by their names, first the one that steers. Raises ValueError for one that is there twice."""
    specs = [config.reward, *(config.held_out.split(";") if config.held_out else [])]
    rewards = [load_reward(spec, config.device) for spec in specs]
    if len({json.dumps(reward.identity) for reward in rewards}) < len(rewards):
        raise ValueError(f"--held-out must be rewards other than --reward, each once, got {config.held_out!r}")
    return dict(zip(short_names(specs), rewards, strict=True))


def try_rewards(run: Run) -> None:
    """Score one image, or latent, by every reward. Raises ValueError, with its name, for one that cannot."""
    x = noise_like(run.X, 1, generator=generators(run.config.seed, range(1)))
    through = [method for method in run.config.methods.split(",") if method in THROUGH_REWARD]
    for name, reward in run.rewards.items():
        by_gradient = bool(through) and reward is run.reward
        with torch.set_grad_enabled(by_gradient):
            try:
                prompt = run.prompts(reward, range(1))[0]
                r = evaluate_reward(run.on_latents(reward, prompt), x.requires_grad_(by_gradient))
            except ValueError as error:
                raise ValueError(f"the reward {name}: {error}") from error
        if by_gradient and not r.requires_grad:
            raise ValueError(f"--methods {through[0]} needs a differentiable reward, and {name} has no gradient")


def open_run(config: SteerOptions) -> Run:
    """Network, VAE and rewards. Raises ValueError for those that are missing or do not go together."""
    network, rewards = open_network(config), open_rewards(config)
    X, vae = guided(network, config), open_vae(config, network)
    check_methods(config, X, reads_context(network), next(iter(rewards.values())))
    check_channels(config, X)
    labels = labels_for(config.labels, config.count, network.null_class, config.seed)
    names = names_for(network.null_class, config.names)
    settings, facts = describe(config, network, X, vae)
    settings = {name: value for name, value in settings.items() if name not in OF_RUN}

    passes = Passes(network)

    @cache
    def most_rows(through: bool, steps: int) -> int:
        before = passes.rows
        of_latents = (
            opened.on_latents(opened.reward, opened.prompts(opened.reward, range(1))[0], config.scale)
            if through
            else None
        )
        found = rows_within(config.memory * 1e9, X, of_latents, steps=steps, y=labels[:1].to(X.device))
        passes.rows = before  # what is measured here is no sample
        return found

    opened = Run(config, X, passes, vae, labels, names, rewards, most_rows, settings, facts)
    return opened


def run(config: SteerOptions, process: Process) -> None:
    """Every folder that is not finished, then the rewards, the table and the pictures."""
    check_options(config)
    began, folders = time.perf_counter(), folders_of(config)
    all_of = open_run(config)
    try_rewards(all_of)
    records = [run_folder(all_of, what, process) for what in folders]
    if process.rank > 0:  # it has no more to do
        return
    rows = [row_of(all_of, what, record) for what, record in zip(folders, records, strict=True) if record is not None]
    names = ("steer.json", "steer.md", "steer.png", *(f"{method}.png" for method in METHODS))
    clear(config.out, *names)
    text = table(rows)
    with atomic_path(config.out / "steer.md") as temporary:
        temporary.write_text(text + "\n")
    steers = next(iter(all_of.rewards))
    draw_curves(rows, f"{config.count} samples, steered by {config.scale:g} · {steers}", config.out / "steer.png")
    if all_of.vae is not None:
        draw_pictures(config, rows, steers)
    identities = {name: all_of.identity(reward) for name, reward in all_of.rewards.items()}
    record = {"settings": all_of.settings, "reward": steers, "scale": config.scale, "rewards": identities, "rows": rows}
    record |= all_of.facts
    save_json(record, config.out / "steer.json")
    print(
        f"{text}\n\n{config.out / 'steer.json'}: {len(folders)} folders, {(time.perf_counter() - began) / 60:.1f} min"
    )


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    config = parse(SteerOptions, __doc__ or "", arguments, prog="python -m imagenet.steer", presets=("preset", PRESETS))
    with refusing("imagenet.steer"):
        check_device(config.device)
        with processes(config.device) as process:
            run(dataclasses.replace(config, device=str(process.device)), process)


if __name__ == "__main__":
    main()
