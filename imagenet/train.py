"""Train: the drift, the flow map, the Meta Flow Map; each stage begins with the weights of the one before.

    python -m imagenet.train --preset s2-flow --latents data/latents --out runs/flow --device cuda
    python -m imagenet.train --preset s2-map --latents data/latents --init runs/flow/weights --out runs/map …
    python -m imagenet.train --preset s2-mfm --latents data/latents --init runs/map/weights --teacher runs/map/weights \
        --reads-tx --out runs/mfm …
    torchrun --nproc-per-node 8 -m imagenet.train --preset xl2-distill --init kyungmnlee/DMF --teacher kyungmnlee/DMF …

flow regresses onto x₁ − x̄₀ on the diagonal s = u (E13); map adds jumps (E14, mean flow), in the empty context; mfm
gives both a context (t, x). Targets come from data, from data with model guidance (--guidance), or from the drift of a
frozen --teacher (E12). The whole loss is `mfm_ref.paper_recipe.paper_loss`; presets are in imagenet/presets.py.

OUT gets, on the way,

    settings.json      all that the numbers depend on; a run with others is refused
    metrics.jsonl      the loss, its terms, and the mean square of residuals in bins of s
    proxy.jsonl        how far one-step samples of the averaged weights are from the data (imagenet/proxy.py)
    samples/           pictures of such samples, or latents without --vae
    step-00002500/     checkpoints, of which two are kept
    weights/           at the end: the averaged weights, what --weights of every script and --init take

--batch is that of all processes together, cut into passes of --micro images in each. A run that was killed goes on with
the same numbers as the same command is given again; with another number of processes, --micro or --engine the numbers
are the same but for rounding (--batch must be a multiple of --micro times the processes). SIGTERM writes a checkpoint
first; NaN, a full disk and latents that are damaged end the run and say where it can go on.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch

from imagenet.batches import GlobalBatches, parts_of_a_step
from imagenet.commands import check_device, device_name, refusing
from imagenet.cost import HARDWARE, SUSTAINED, cost_of
from imagenet.latents import GivenLatents, Latents, open_latents
from imagenet.presets import PRESETS, TrainOptions
from imagenet.proxy import Proxy
from imagenet.shards import differences
from imagenet.stages import (
    check_stage,
    equivalents_of,
    guided_from,
    law_of,
    outlines,
    student_of,
    teacher_of,
    weights_of,
)
from imagenet.teacher import Teacher
from imagenet.vae import VAE, sha256_of_weights
from mfm_ref import FlowMap, TrainConfig, Watched, train
from mfm_ref.checks import check_count
from mfm_ref.distributed import Process, on_rank_0, processes
from mfm_ref.files import load_json, save_json
from mfm_ref.options import parse
from mfm_ref.paper_recipe import PaperRows, paper_loss

# Options that change no number of a run but by rounding, or that say where things are: what is there is compared.
ELSEWHERE = (
    "preset", "out", "latents", "init", "init_kind", "teacher", "teacher_kind", "teacher_scale", "num_heads",
    "encoder_depth", "size", "micro", "checkpointing", "engine", "device", "checkpoint_every", "checkpoint_minutes",
    "log_every", "sample_every", "samples", "vae", "dry_run", "gpus", "hardware", "tflops",
)  # fmt: skip


def run(config: TrainOptions, process: Process) -> None:
    """Train, or go on, and write the averaged weights."""
    micro = config.micro or share_of(config.batch, process.world)
    accumulate = parts_of_a_step(config.batch, micro, process.world)
    vae = VAE.load(config.vae, process.device) if config.vae and process.rank == 0 else None
    latents = open_latents(config.latents, vae.identity if vae else None)
    network = student_of(config, latents.shape, latents.n_classes)
    teacher = teacher_of(config, network)
    on_rank_0(lambda: keep_settings(config, latents, network, teacher))
    network.checkpointing = config.checkpointing
    X = FlowMap(network).to(process.device)
    if teacher is not None:
        teacher.X.to(process.device)
    with GlobalBatches(
        latents, config.batch, micro=micro, law=law_of(config, network.null_class), seed=config.seed,
        rank=process.rank, world=process.world, device=process.device,
    ) as batches:  # fmt: skip
        average, _ = train(
            X,
            loss_of(config, teacher),
            batches,
            train_config(config, accumulate),
            folder=config.out,
            tag="imagenet.train",
            callback=Proxy(config, latents, vae) if config.sample_every else None,
            progress=config.stage,
        )
    on_rank_0(lambda: average.save_pretrained(config.out / "weights"))
    if process.rank == 0:
        print(f"{config.out / 'weights'}: {config.stage}, {config.steps} updates of {config.batch} images")


def share_of(batch: int, world: int) -> int:
    """The images of one of `world` processes. Raises ValueError where they do not come out even."""
    if batch % world:
        raise ValueError(f"--batch must be a multiple of the number of processes, {world}, got {batch}")
    return batch // world


def loss_of(
    config: TrainOptions, teacher: Teacher | None
) -> Callable[[FlowMap, tuple[PaperRows, int], torch.Generator | None], Watched]:
    """The loss of the stage, as the trainer calls it."""
    start = guided_from(config)

    def loss(X: FlowMap, batch: tuple[PaperRows, int], generator: torch.Generator | None) -> Watched:
        rows, diagonal = batch
        weights = weights_of(config, math.prod(X.shape))
        return paper_loss(X, rows, diagonal, teacher=teacher, guided_from=start, **weights)

    return loss


def train_config(config: TrainOptions, accumulate: int) -> TrainConfig:
    """The settings of the core's trainer."""
    same = (
        "steps", "lr", "optimizer", "weight_decay", "warmup", "clip", "decay", "precision", "compile", "engine",
        "seed", "checkpoint_every", "checkpoint_minutes", "log_every", "sample_every",
    )  # fmt: skip
    settings: dict[str, Any] = {name: getattr(config, name) for name in same}
    betas = (config.beta1, config.beta2)
    return TrainConfig(**settings, betas=betas, schedule="constant", accumulate=accumulate)


def identity_of(teacher: Teacher) -> dict[str, Any]:
    """What tells a teacher from others: weights alone do not tell a SiT from a DMF."""
    network: Any = teacher.X.network
    return {"sha256": sha256_of_weights(network), "network": network.config, "scale": teacher.scale}


def keep_settings(config: TrainOptions, latents: Latents | GivenLatents, network: Any, teacher: Teacher | None) -> None:
    """Write settings.json, or compare with the one that is there.

    Raises:
        ValueError: it is of a run with other settings, with what differs; or OUT holds something else.
    """
    path, options = config.out / "settings.json", dataclasses.asdict(config)
    settings = {name: value for name, value in options.items() if name not in ELSEWHERE} | {
        "begins_with": sha256_of_weights(network),
        "teacher": teacher and identity_of(teacher),
        "latents": latents.sha256,
        "network": network.config,
    }
    if path.exists():
        found = load_json(path).get("settings")
        others = differences(found, settings) if isinstance(found, dict) else "it is of another script"
        if others:
            raise ValueError(f"{path} belongs to a run with other settings ({others}): write elsewhere (--out)")
        return
    left = [other.name for other in config.out.glob("[!.]*")]
    if left:
        raise ValueError(f"{config.out} must be a new folder or one of this script, found {min(left)}")
    facts = {name: str(options[name]) for name in ("preset", "latents", "init", "teacher", "micro", "engine", "vae")}
    save_json({"settings": settings, "facts": facts | {"device": device_name(config.device)}}, path)


# ---- the dry run -----------------------------------------------------------------------------------------


def plan(config: TrainOptions) -> str:
    """The settings, and what the run would cost; nothing is read but configs, and nothing is written."""
    shape: tuple[int, ...] = (4, 32, 32)
    n_classes = 1000
    if config.latents:
        latents = open_latents(config.latents)
        shape, n_classes = latents.shape, latents.n_classes
    student, teacher = outlines(config, shape, n_classes)
    micro = config.micro or share_of(config.batch, config.gpus)
    parts_of_a_step(config.batch, micro, config.gpus)
    rate = config.tflops * 1e12 or SUSTAINED * HARDWARE[config.hardware]
    passes = equivalents_of(config, teacher)
    cost = cost_of(
        student, None if teacher is None else teacher.X.network, passes,  # type: ignore[arg-type]
        batch=config.batch, micro=micro, rows=1 if config.stage == "flow" else 2, steps=config.steps,
        gpus=config.gpus, rate=rate, sharded=config.engine == "fsdp", checkpointing=config.checkpointing,
        precision=config.precision,
    )  # fmt: skip
    lines = [f"{name:24} {value}" for name, value in (dataclasses.asdict(config) | {"micro": micro}).items()]
    lines += ["", cost.table()]
    lines += [f"{'passes for each image':24} {passes.student} of the student, {passes.teacher} of the teacher"]
    lines += [f"{'hardware':24} {config.gpus} × {config.hardware} at {rate / 1e12:.4g} TFLOP/s"]
    return "\n".join(lines)


def check(config: TrainOptions) -> None:
    """Raise ValueError for options out of range or that contradict each other."""
    if config.preset not in ("", *PRESETS):
        raise ValueError(f"--preset must be one of {', '.join(PRESETS)}, got {config.preset!r}")
    for name, least in (("batch", 1), ("micro", 0), ("gpus", 1), ("samples", 2)):
        check_count(getattr(config, name), f"--{name}", least)
    if not 0 <= config.tflops < math.inf:
        raise ValueError(f"--tflops must be positive, or 0 for a share of --hardware's peak, got {config.tflops}")
    check_stage(config)
    train_config(config, 1)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    config = parse(TrainOptions, __doc__ or "", arguments, prog="python -m imagenet.train", presets=("preset", PRESETS))
    with refusing("imagenet.train"):
        check(config)
        if config.dry_run:
            print(plan(config))
            return
        check_device(config.device)
        with processes(config.device) as process:
            run(dataclasses.replace(config, device=str(process.device)), process)


if __name__ == "__main__":
    main()
