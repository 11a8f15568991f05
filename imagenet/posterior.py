"""What could the clean image be? Draws of p(x₁ | x_t, y) for noised images, by several methods.

    python -m imagenet.posterior --weights mfm-xl2.pt --kind mfm --latents data/latents --vae VAE --out runs/posteriors
    torchrun --nproc-per-node 8 -m imagenet.posterior …

Images of a folder that `imagenet.encode` wrote are noised to each of --times, and the posterior of each is drawn from
by the map (E11), by GLASS rollouts of a teacher (E12) and by SDE rollouts (E6); "again" are SDE rollouts with other
noise, which say how far a rollout agrees with itself. Every random number belongs to one image, time and draw. In OUT:

    clean/samples.npz             the images as the VAE decodes them, arr_0 (contexts, H, W, 3), arr_1 their labels
    t0.1/mfm-2/samples.npz        draws at t = 0.1 by the map in 2 steps, arr_0 (contexts · draws, H, W, 3) and arr_1:
                                  draw d in context c is number c · draws + d
    t0.1.png                      for each context a row: clean, noised, then draws by each method
    posterior.json                contexts, draws, rows and labels of the contexts, and "posteriors", a list of
                                  {"t", "method": "mfm" | "glass" | "sde" | "again", "steps", "evaluations", "folder"};
                                  evaluations are forward passes of a network for one draw

Picture and list have the folders of runs before, too, whose times, methods and steps were others and all else the same.
Without --vae, latents.npz with float32 latents, as the network has them, stand in the place of every samples.npz.
"""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from imagenet.commands import check_device, numbers, refusing
from imagenet.latents import Latents
from imagenet.npz import some_rows
from imagenet.pictures import draw_lines
from imagenet.run import (
    AGAIN,
    CONTEXTS,
    DRAWS,
    ROLLOUTS,
    Job,
    ModelOptions,
    Passes,
    check_channels,
    clear,
    decoded,
    describe,
    generator_of,
    guided,
    has_rows,
    is_drift,
    name_of,
    open_network,
    open_vae,
    reads_context,
    run_job,
)
from imagenet.sit import KINDS
from imagenet.vae import VAE
from mfm_ref import FlowMap, MetaFlowMap, glass_rollout, interpolate, sample_posterior, sde_rollout
from mfm_ref.checks import check_count
from mfm_ref.distributed import Process, processes
from mfm_ref.files import load_json, save_json
from mfm_ref.flow_map import unconditional_drift
from mfm_ref.options import option, parse

STREAMS = {"mfm": DRAWS, "glass": DRAWS, "sde": ROLLOUTS, "again": AGAIN}  # mfm and glass begin with the same noise
METHODS = tuple(STREAMS)
# Options on which no folder depends, or only some: those say so by what they add.
OF_RUN = (
    "latents", "times", "methods", "map_steps", "glass_steps", "sde_steps", "teacher", "teacher_kind",
    "teacher_guidance", "pictured",
)  # fmt: skip
DECIMALS = 6  # of a time, which is in the name of its folder and, as a whole number, in its seeds
NAMES = {"mfm": "MFM", "glass": "GLASS", "sde": "SDE", "again": "SDE again"}
SHOWN = 2  # draws of a method in a picture, at most
WIDEST = 10  # images beside each other in a picture, at most


@dataclasses.dataclass(frozen=True)
class PosteriorOptions(ModelOptions):
    """Options of the script."""

    out: Path = option(Path("runs/posteriors"), "folder of the results")
    latents: Path = option(Path("data/latents"), "folder that imagenet.encode wrote")
    contexts: int = option(8, "images that are noised, spread evenly over the folder")
    draws: int = option(4, "draws in each context by each method")
    times: str = option("0,0.1,0.2,0.5", "to which images are noised, in [0, 1); values in the paper: 0.1,0.2,0.3,0.5")
    methods: str = option("mfm,glass,sde", "of mfm, glass, sde and again")
    map_steps: str = option("1,2,4", "numbers of steps of a draw by the map")
    glass_steps: str = option("1,2,4,8,16", "numbers of steps of a draw by GLASS rollouts")
    sde_steps: int = option(200, "steps of a draw by SDE rollouts")
    teacher: str = option("", "weights whose drift the rollouts have; empty: those of --weights, with its guidance")
    teacher_kind: str = option(
        "",
        "kind of --teacher, as --kind; --num-heads and --encoder-depth are those of both, so that a file of others has "
        "to be converted to a folder first (imagenet.checkpoints)",
        choices=("", *KINDS),
    )
    teacher_guidance: float = option(0.0, "guidance of --teacher, as --guidance")
    pictured: int = option(4, "contexts in each picture, spread evenly over them, with a VAE")


class Posterior(NamedTuple):
    """One folder of draws."""

    t: float
    method: str
    steps: int

    @property
    def folder(self) -> str:
        """Its name."""
        return f"t{self.t:g}/{self.method}-{self.steps}"


@dataclasses.dataclass(frozen=True)
class Clean:
    """Clean images, as latents with the noise of their encoder, and the same noised."""

    latents: Latents
    rows: list[int]  # of the folder
    labels: Tensor  # (contexts,), int64
    seed: int

    def pair(self, c: int) -> tuple[Tensor, Tensor]:
        """x₁ and x₀ of context c, each `(*D)`: the same for all times and methods."""
        source = generator_of(self.seed, self.rows[c], CONTEXTS)
        mean, std = self.latents.moments([self.rows[c]])[0].chunk(2)
        x1 = self.latents.scale * (mean + std * torch.randn(mean.shape, generator=source))
        return x1, torch.randn(mean.shape, generator=source)

    def noised(self, t: float, contexts: list[int]) -> Tensor:
        """I_t = (1−t) x₀ + t x₁ of contexts, `(len, *D)`, on the CPU; x₁ itself at t = 1."""
        x1, x0 = (torch.stack(a) for a in zip(*map(self.pair, contexts), strict=True))
        return interpolate(x0, x1, t)


@dataclasses.dataclass(frozen=True)
class Run:
    """What all folders of a run are made with."""

    config: PosteriorOptions
    process: Process
    X: MetaFlowMap
    teacher: MetaFlowMap
    passes: Passes
    vae: VAE | None
    clean: Clean
    settings: dict[str, Any]  # of every folder
    of_teacher: dict[str, Any]  # of those of rollouts
    facts: dict[str, Any]


# ---- one folder ------------------------------------------------------------------------------------------


def draw(run: Run, what: Posterior, rows: range) -> Tensor:
    """Draws number `rows`, `(len, *D)`: number c · draws + d is draw d in context c."""
    config, clean, X = run.config, run.clean, run.X
    pairs = [divmod(i, config.draws) for i in rows]
    contexts = sorted({c for c, _ in pairs})
    of_pair = [contexts.index(c) for c, _ in pairs]
    x = clean.noised(what.t, contexts)[of_pair].to(X.device, X.dtype)
    y = clean.labels[[c for c, _ in pairs]].to(X.device)
    tick, stream = round(what.t * 10**DECIMALS), STREAMS[what.method]
    sources = [generator_of(config.seed, clean.rows[c], d, tick, stream) for c, d in pairs]
    if what.method == "mfm":
        return sample_posterior(X, what.t, x, 1, what.steps, y=y, generator=sources)[0]
    rollout: Callable[..., Tensor] = glass_rollout if what.method == "glass" else sde_rollout

    def drift(t: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return unconditional_drift(run.teacher, t, x, y)

    return rollout(drift, what.t, x, 1, what.steps, y=y, generator=sources)[0]


def settings_of(run: Run, what: Posterior) -> dict[str, Any]:
    """All that the draws in a folder depend on."""
    return run.settings | what._asdict() | ({} if what.method == "mfm" else run.of_teacher)


def run_posterior(run: Run, what: Posterior) -> None:
    """One folder."""
    labels = run.clean.labels.repeat_interleave(run.config.draws)
    job = Job(
        settings_of(run, what), run.facts, labels, lambda rows: draw(run, what, rows),
        run.passes, run.vae, run.config.batch,
    )  # fmt: skip
    run_job(job, run.config.out / what.folder, run.process, what.folder)


def run_clean(run: Run) -> None:
    """The folder of the clean images."""
    clean = run.clean
    job = Job(
        run.settings, run.facts, clean.labels, lambda rows: clean.noised(1.0, list(rows)).to(run.X.device),
        run.passes, run.vae, run.config.batch,
    )  # fmt: skip
    run_job(job, run.config.out / "clean", run.process, "clean")


def entries_of(run: Run) -> list[dict[str, Any]]:
    """The finished folders, of this run and of those before it that agree with it, as posterior.json lists them."""
    found = filter(None, (entry_of(run, path) for path in run.config.out.glob("t*/*/settings.json")))
    return sorted(found, key=lambda entry: (entry["t"], METHODS.index(entry["method"]), entry["steps"]))


def entry_of(run: Run, path: Path) -> dict[str, Any] | None:
    """What posterior.json says of the folder of a settings.json; None if that is not whole, a copy or another's."""
    config, record = run.config, load_json(path)
    settings = record.get("settings")
    if not isinstance(settings, dict) or not isinstance(settings.get("t"), float):
        return None
    what = Posterior(settings["t"], settings.get("method", ""), settings.get("steps", 0))
    if what.method not in METHODS or settings != settings_of(run, what) or path.parent != config.out / what.folder:
        return None
    if not has_rows(path.with_name(name_of(run.vae)), config.contexts * config.draws):
        return None
    return {**what._asdict(), "evaluations": record["evaluations_per_sample"], "folder": what.folder}


# ---- pictures --------------------------------------------------------------------------------------------


def draw_picture(run: Run, vae: VAE, t: float) -> None:
    """For each of some contexts a row: clean, noised, then draws by each method; in lines below each other."""
    contexts = pictured(run.config)
    names = [run.clean.latents.classes[run.clean.labels[c]] for c in contexts]
    lines = lines_of(panels_of(run, vae, t))
    title = f"t = {t:g}: clean images x₁, noised ones x_t, and draws of p(x₁ | x_t, y)"
    draw_lines(lines, names, title, run.config.out / f"t{t:g}.png")


def pictured(config: PosteriorOptions) -> list[int]:
    """The contexts in pictures, spread evenly over all."""
    n = min(config.pictured, config.contexts)
    return [k * config.contexts // n for k in range(n)]


def panels_of(run: Run, vae: VAE, t: float) -> dict[str, np.ndarray]:
    """What a picture shows, uint8 `(contexts, columns, H, W, 3)` by what stands above it."""
    config, contexts = run.config, pictured(run.config)
    panels = {"clean": some_rows(config.out / "clean" / name_of(vae), contexts)[:, None]}
    panels["noised"] = decoded(vae, run.clean.noised(t, contexts).to(vae.device))[:, None]
    shown = range(min(config.draws, SHOWN))
    for entry in (entry for entry in entries_of(run) if entry["t"] == t):
        draws = some_rows(
            config.out / entry["folder"] / name_of(vae), [c * config.draws + d for c in contexts for d in shown]
        )
        title = f"{NAMES[entry['method']]}, {entry['steps']} step{'s' * (entry['steps'] > 1)}"
        panels[title] = draws.reshape(len(contexts), len(shown), *draws.shape[1:])
    return panels


def lines_of(panels: dict[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    """Panels in lines of at most WIDEST images."""
    lines: list[dict[str, np.ndarray]] = [{}]
    for title, images in panels.items():
        if sum(panel.shape[1] for panel in lines[-1].values()) + images.shape[1] > WIDEST:
            lines.append({})
        lines[-1][title] = images
    return lines


# ---- the whole run ---------------------------------------------------------------------------------------


def posteriors_of(config: PosteriorOptions) -> list[Posterior]:
    """Every folder of draws, in order. Raises ValueError for times, methods or steps that there are not."""
    times = [t + 0.0 for t in numbers(config.times, "times", float)]  # -0 would have a folder of its own
    methods = config.methods.split(",")
    if not all(0 <= t < 1 for t in times):
        raise ValueError(f"--times must lie in [0, 1), got {config.times}")
    if not all(t == round(t, DECIMALS) for t in times):
        raise ValueError(f"--times must have at most {DECIMALS} decimals, got {config.times}")
    if not set(methods) <= set(METHODS) or len(set(methods)) < len(methods):
        raise ValueError(f"--methods must be some of {', '.join(METHODS)}, separated by commas, got {config.methods!r}")
    steps = {
        "mfm": numbers(config.map_steps, "map-steps", int),
        "glass": numbers(config.glass_steps, "glass-steps", int),
        "sde": [config.sde_steps],
    }
    for name, option_of in (("mfm", "--map-steps"), ("glass", "--glass-steps"), ("sde", "--sde-steps")):
        check_count(min(steps[name]), option_of)
    steps["again"] = steps["sde"]
    return [Posterior(t, method, k) for t in times for method in methods for k in steps[method]]


def check_options(config: PosteriorOptions) -> None:
    """Raise ValueError for numbers out of range, and for options of a teacher without one."""
    for name in ("contexts", "draws", "batch", "pictured"):
        check_count(getattr(config, name), f"--{name}")
    check_count(config.seed, "--seed", 0)
    for name in ("teacher_kind", "teacher_guidance"):
        if not config.teacher and getattr(config, name) != getattr(PosteriorOptions, name):
            raise ValueError(
                f"--{name.replace('_', '-')} needs a --teacher: without one, it is the network of --weights"
            )


def open_run(config: PosteriorOptions, process: Process) -> Run:
    """Networks, VAE and clean images. Raises ValueError for those that are missing or do not go together."""
    network = open_network(config)
    if not reads_context(network) and "mfm" in config.methods.split(","):
        lack = ", and fine-tuned weights have none (imagenet.sample --method euler)" if is_drift(network) else ""
        raise ValueError(f"the method mfm needs a network with a context{lack}: give --methods without it")
    X, vae = guided(network, config), open_vae(config, network)
    settings, facts = describe(config, network, X, vae)
    teacher, rollouts, of_teacher = network, X, None
    if config.teacher:
        its = teacher_options(config)
        teacher = open_network(its)
        rollouts = guided(teacher, its)
        compared, told = describe(its, teacher, rollouts, None)
        of_teacher = {"weights": compared["weights"], "network": compared["network"], "guidance": told["guidance"]}
        if (teacher.shape, teacher.null_class) != (network.shape, network.null_class):
            raise ValueError(
                f"--teacher must have the states and classes of --weights, {network.shape} and {network.null_class}, "
                f"got {teacher.shape} and {teacher.null_class}"
            )
    check_channels(config, X, rollouts)
    clean = open_clean(config, network, vae)
    settings = {name: value for name, value in settings.items() if name not in OF_RUN}
    settings["latents"] = clean.latents.sha256
    return Run(
        config, process, X, rollouts, Passes(network, teacher), vae, clean,
        settings=settings,
        of_teacher={"teacher": of_teacher},
        facts=facts | {"teacher": of_teacher and of_teacher | {"from": config.teacher}},
    )  # fmt: skip


def teacher_options(config: PosteriorOptions) -> PosteriorOptions:
    """The options of the teacher's network in the place of those of --weights."""
    return dataclasses.replace(
        config, weights=config.teacher, kind=config.teacher_kind, guidance=config.teacher_guidance
    )


def open_clean(config: PosteriorOptions, X: FlowMap, vae: VAE | None) -> Clean:
    """The clean images. Raises ValueError for fewer than asked for, and for latents or labels that are not X's."""
    latents = Latents(config.latents, None if vae is None else vae.identity)
    if config.contexts > latents.n:
        raise ValueError(
            f"--contexts must be at most {latents.n}, as many as {config.latents} has, got {config.contexts}"
        )
    rows = [c * latents.n // config.contexts for c in range(config.contexts)]
    labels = latents.labels[rows]
    if latents.shape != X.shape or int(labels.max()) >= X.null_class:
        raise ValueError(
            f"{config.latents} must have latents {X.shape} and labels below {X.null_class}, as the network has, "
            f"got {latents.shape} and up to {int(labels.max())}"
        )
    return Clean(latents, rows, labels, config.seed)


def run(config: PosteriorOptions, process: Process) -> None:
    """Every folder that is not finished, the pictures, and posterior.json."""
    check_options(config)
    began, folders = time.perf_counter(), posteriors_of(config)
    all_of = open_run(config, process)
    run_clean(all_of)
    for what in folders:
        run_posterior(all_of, what)
    if process.rank == 0:  # the others have no more to do
        if all_of.vae is not None:
            for t in dict.fromkeys(what.t for what in folders):
                draw_picture(all_of, all_of.vae, t)
        clear(config.out, "posterior.json", "t*.png")
        save_json(summary(all_of), config.out / "posterior.json")
        minutes = (time.perf_counter() - began) / 60
        print(
            f"{config.out / 'posterior.json'}: {len(folders)} folders with {name_of(all_of.vae)}, {minutes:.1f} minutes"
        )


def summary(run: Run) -> dict[str, Any]:
    """What posterior.json says."""
    config, clean = run.config, run.clean
    return {
        "settings": run.settings,
        "contexts": config.contexts,
        "draws": config.draws,
        "order": "draw d in context c is row c * draws + d",
        "rows": clean.rows,
        "labels": clean.labels.tolist(),
        "clean": "clean",
        "posteriors": entries_of(run),
        **run.facts,
    }


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    config = parse(PosteriorOptions, __doc__ or "", arguments, prog="python -m imagenet.posterior")
    with refusing("imagenet.posterior"):
        check_device(config.device)
        with processes(config.device) as process:
            run(dataclasses.replace(config, device=str(process.device)), process)


if __name__ == "__main__":
    main()
