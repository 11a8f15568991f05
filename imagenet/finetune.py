"""Fine-tuning by E18: the drift of an MFM becomes that of p* ∝ p₁ e^{λ r}, its Doob drift b* (E7).

    python -m imagenet.finetune --weights weights/mfm --guidance 2.5 --vae VAE --latents data/latents --scale 20
    torchrun --nproc-per-node 6 -m imagenet.finetune --preset hpsv2-50 --reward hpsv2=HPS_v2.1_compressed.pt …

--weights is the base, an MFM. The student begins as a copy of it and is read in the empty context alone, as a drift.
States (t, I_t) are noised latents, of a folder of imagenet.encode or of a latents.npz of imagenet.sample: any law of
them keeps the minimiser, and so does any w(t) > 0. A state has one posterior sample X of the base, which weighs
e^{λ r(X) − c}; c = log E[e^{λ r}] over samples of the base is measured once, before the first update. --weight says
what is done where σ²/2 = (1−t)/t is large:

    exact     nothing, w = 1. Minimiser b*. Of a map that reads t·x all is finite, as (σ²/2) ∇_x is (1−t) ∇_{t·x}
    bounded   w = min(1, 25 t/(1−t))². Minimiser b*, and finite for maps that read x
    clipped   σ²/2 is at most 25, as in the published steering. Minimiser b* for t >= 1/26, with less guidance before
    constant  σ²/2 is 100 at all times, as in the published fine-tuning. Minimiser b + 100 t/(1−t) (b* − b): much more
              guidance than λ asks for, and not the drift of p*

Maps that read x, as the published MFM, need --earliest above 0 with --method gradient; --method stein needs no gradient
of the reward. --preset has the paper's settings, over which typed options win. OUT gets

    rewards.jsonl      a line every --evaluate-every updates, first of the base. Samples along the ODE of the averaged
                       student, always of the same labels and noises, have a mean reward (without λ), means of the
                       rewards of --held-out, each with its standard error, and a diversity: the mean distance of the
                       latents of two samples of a class, beside the base's
    grid-00000500.png  the first of them, with --vae
    metrics.jsonl      of training: the loss, and means of the reward and of e^{λ r − c} over posterior samples
    settings.json      all settings, and c
    weights/           the averaged student, marked as a drift alone: imagenet.sample --method euler reads it, with the
                       same --guidance

A run that was killed goes on, to the same numbers, on any number of processes. Jumps and contexts of the result mean
nothing, nor does its null class, and other scales of guidance than the one that it was trained with. The flow map of p*
is one more stage of training, its teacher the result and its data samples of it, none without a label:

    python -m imagenet.sample --weights OUT/weights --guidance 2.5 --method euler --steps 50 --count 50000 --out SAMPLES
    python -m imagenet.train --stage map --teacher OUT/weights --guidance 2.5 --drop 0 --latents SAMPLES/latents.npz …
"""

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from imagenet.batches import GlobalBatches, parts_of_a_step
from imagenet.checkpoints import load
from imagenet.commands import check_device, in_precision, refusing
from imagenet.finetune_measures import Measures
from imagenet.finetune_presets import LATEST, PER_CLASS, PRESETS, WEIGHTS, FinetuneOptions, check_options
from imagenet.latents import GivenLatents, Latents, open_latents
from imagenet.prompts import FIELD, names_for
from imagenet.rewards import RewardSum, load_reward
from imagenet.run import (
    check_channels,
    clear,
    describe,
    guided,
    is_drift,
    labels_for,
    open_network,
    open_vae,
    reads_context,
)
from imagenet.shards import differences
from imagenet.vae import VAE
from mfm_ref import FlowMap, MetaFlowMap, TrainConfig, finetune_loss, train
from mfm_ref.checkpoints import Checkpoints
from mfm_ref.distributed import Process, gather, on_rank_0, processes
from mfm_ref.estimators import log_mean_exp
from mfm_ref.files import load_json, save_json
from mfm_ref.flow_map import ClassifierFree, unconditional_drift
from mfm_ref.options import parse
from mfm_ref.paper_recipe import PaperRows, RowLaw
from mfm_ref.pretrained import CONFIG
from mfm_ref.training import Watched

# Options that change no number but for rounding, or that say where things are.
OF_RUN = (
    "latents", "preset", "micro", "engine", "log_every", "checkpoint_every", "checkpoint_minutes", "evaluate_batch",
    "compile", "decode",
)  # fmt: skip


class Work(NamedTuple):
    """All that a run is made of, but for the student and the states."""

    config: FinetuneOptions
    X: MetaFlowMap  # the base, guided
    measures: Measures


# ---- training ------------------------------------------------------------------------------------------


def states_of(rows: PaperRows, earliest: float) -> tuple[Tensor, Tensor, Tensor]:
    """Times t, uniform from `earliest` to LATEST, states I_t, and a noise for each, of diagonal rows without a context.

    These have s ~ U(0, 1), z = I_s and x₁ − x₀, so that I_t = z + (t−s)(x₁ − x₀); their x is noise of its own.
    """
    t = earliest + (LATEST - earliest) * rows.s
    return t, rows.z + (t - rows.s).reshape(-1, 1, 1, 1) * rows.velocity, rows.x


def loss_of(work: Work, log_scale: float) -> Callable[[FlowMap, tuple[PaperRows, int], object], Watched]:
    """E18 of a batch of `GlobalBatches` for the trainer, with c = `log_scale`."""
    config, (weight, gain) = work.config, WEIGHTS[work.config.weight]

    def base(t: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return unconditional_drift(work.X, t, x, y)

    def loss(student: FlowMap, batch: tuple[PaperRows, int], _: object) -> Watched:
        rows, y = batch[0], batch[0].y
        t, x, eps = states_of(rows, config.earliest)
        reward, seen = work.measures.on_latents(work.measures.reward, y, config.scale), []

        def noted(x1: Tensor) -> Tensor:
            r = reward(x1)
            seen.append(r.detach())
            return r

        def drift(t: Tensor, x: Tensor, y: Tensor) -> Tensor:
            with in_precision(config.precision, config.device):
                return unconditional_drift(guided(student, config), t, x, y)

        value = finetune_loss(
            drift, base, work.X, noted, t, x, y, method=config.method, weight=weight, gain=gain, log_scale=log_scale,
            eps=eps.unsqueeze(0),
        )  # fmt: skip
        r = torch.cat(seen)
        watched = {"reward": r / config.scale, "factor": (r - log_scale).exp()}
        return Watched({"loss": value}, {k: torch.stack([v.sum(), v.new_tensor(len(v))]) for k, v in watched.items()})

    return loss


def open_student(config: FinetuneOptions) -> FlowMap:
    """A copy of the network of --weights, to be trained."""
    network = load(config.weights, config.kind or None, num_heads=config.num_heads, encoder_depth=config.encoder_depth)
    if config.compile:  # not `velocity`, which the copy that is averaged would share
        for block in network.blocks:
            block.compile(dynamic=False)
    return FlowMap(network).to(config.device).train()


def settings_of_training(config: FinetuneOptions, accumulate: int) -> TrainConfig:
    """The trainer's settings."""
    return TrainConfig(
        steps=config.steps,
        lr=config.lr,
        optimizer="radam",
        schedule="constant",
        warmup=config.warmup,
        clip=config.clip,
        decay=config.decay,
        accumulate=accumulate,
        engine=config.engine,
        seed=config.seed,
        checkpoint_every=config.checkpoint_every,
        checkpoint_minutes=config.checkpoint_minutes,
        log_every=config.log_every,
        sample_every=config.evaluate_every,
    )


# ---- the whole run -------------------------------------------------------------------------------------


def begin(work: Work, network: FlowMap, settings: dict[str, Any], facts: dict[str, Any]) -> float:
    """c, from settings.json, or measured with the base, which is step 0, and written there.

    Raises:
        ValueError: the folder is of a run with other settings, or of something else.
    """
    path = work.config.out / "settings.json"
    if path.exists():
        record = load_json(path)
        others = differences(record.get("settings") or {}, settings)
        if others or "log_scale" not in record:
            raise ValueError(f"{path} belongs to another run ({others}): remove its folder or write elsewhere (--out)")
        return float(record["log_scale"])
    left = {found.name for found in path.parent.glob("[!.]*")} - {"rewards.jsonl", "grid-00000000.png"}
    if left:
        raise ValueError(f"{path.parent} must be a new folder or one of this script, found {min(left)} (--out)")
    log_scale = float(log_mean_exp(work.config.scale * work.measures.take(network, 0)))
    save_json({"settings": settings, "log_scale": log_scale, **facts}, path)
    return log_scale


def catch_up(work: Work) -> None:
    """Measure the newest checkpoint, where a process was killed after it was written and before it was measured."""
    newest = Checkpoints(work.config.out, {}).newest()
    step = int(newest.name.removeprefix("step-")) if newest else 0
    if newest and step % work.config.evaluate_every == 0 and step not in work.measures.lines():
        work.measures.take(FlowMap(load(newest / "ema")).to(work.config.device).eval(), step)


def finish(work: Work, average: FlowMap) -> None:
    """Measure the result, and write it."""
    if work.config.steps not in work.measures.lines():
        work.measures.take(average, work.config.steps)
    weights = work.config.out / "weights"
    clear(weights, CONFIG)
    average.save_pretrained(weights)
    save_json(load_json(weights / CONFIG) | {"drift_only": True}, weights / CONFIG)


def open_work(config: FinetuneOptions, network: FlowMap, classes: list[str] | None, vae: VAE | None) -> Work:
    """The base and the rewards.

    Args:
        config: of the run.
        network: of --weights.
        classes: names of the classes of the latents, None where they are not known; --names and ImageNet's win.
        vae: that decodes, or None.

    Raises:
        ValueError: a base or a reward that the method cannot use, or that fails; prompts that need names and have none.
    """
    if not reads_context(network):
        own = ", and these are of a drift that was fine-tuned before" if is_drift(network) else ""
        raise ValueError(f"--weights must be an MFM: the posterior samples of E18 are drawn in a context{own}")
    X = guided(network, config)
    if isinstance(X, ClassifierFree):
        raise ValueError("--guidance must be 1, or an input of the network: classifier-free guidance makes no jumps")
    check_channels(config, X)
    if config.method == "gradient" and config.earliest == 0 and not X.reads_tx:
        raise ValueError("--earliest must be above 0, such as 0.01, for a map that reads x, with --method gradient")
    reward, held_out = open_rewards(config)
    names = names_for(network.null_class, config.names) or classes  # ImageNet's folders have numbers for names
    labels = labels_for("balanced", config.evaluate // PER_CLASS, network.null_class, config.seed)
    measures = Measures(
        config, labels.repeat_interleave(PER_CLASS), config.evaluate_steps, config.evaluate_batch, reward, held_out,
        vae, config.prompt, names, config.decode,
    )  # fmt: skip
    measures.try_rewards(network.shape, by_gradient=config.method == "gradient")
    return Work(config, X, measures)


def open_rewards(config: FinetuneOptions) -> tuple[RewardSum, dict[str, RewardSum]]:
    """The reward that is trained for, and by their specs those of --held-out.

    Raises:
        ValueError: one that is there twice, or that the method cannot use; from `load_reward`.
    """
    specs = [spec for spec in config.held_out.split(";") if spec]
    reward, *others = (load_reward(spec, config.device) for spec in (config.reward, *specs))
    identities = [json.dumps(r.identity) for r in (reward, *others)]
    if len(set(identities)) < len(identities):
        raise ValueError(f"--held-out must be rewards other than --reward, each once, got {config.held_out!r}")
    if config.method == "gradient" and not reward.differentiable:
        raise ValueError(f"--reward must be differentiable, and {config.reward} is not: use --method stein")
    return reward, dict(zip(specs, others, strict=True))


def settings_of(work: Work, described: dict[str, Any], latents: Latents | GivenLatents) -> dict[str, Any]:
    """All that the numbers depend on: of files, such as rewards and names of classes, what is in them.

    Args:
        work: of the run.
        described: the settings of `describe`.
        latents: of the states.
    """
    settings = {name: value for name, value in described.items() if name not in OF_RUN}
    measures = work.measures
    reads_names = FIELD in measures.prompt and any(reward.reads_prompts for reward in measures.rewards)
    return settings | {
        "latents": latents.sha256,
        "reward": measures.reward.identity,
        "held_out": [reward.identity for reward in measures.held_out.values()],
        "names": hashlib.sha256(json.dumps(measures.names).encode()).hexdigest() if reads_names else None,
    }


def open_states(config: FinetuneOptions, network: FlowMap, vae: VAE | None) -> Latents | GivenLatents:
    """The clean latents of the states. Raises ValueError for latents or labels that are not the network's."""
    latents = open_latents(config.latents, None if vae is None else vae.identity)
    if latents.shape != network.shape or int(latents.labels.max()) >= network.null_class:
        raise ValueError(
            f"{config.latents} must have latents {network.shape} and labels below {network.null_class}, as the network "
            f"has, got {latents.shape} and up to {int(latents.labels.max())}"
        )
    return latents


def run(config: FinetuneOptions, process: Process) -> None:
    """The base is measured, the student trained and measured on the way, and its average written."""
    check_options(config)
    began, network = time.perf_counter(), open_network(config)
    vae = open_vae(config, network)
    latents = open_states(config, network, vae)
    work = open_work(config, network, getattr(latents, "classes", None), vae)
    micro = config.micro or max(1, config.batch // process.world)
    how = settings_of_training(config, parts_of_a_step(config.batch, micro, process.world))
    described, facts = describe(config, network, work.X, vae)
    settings = settings_of(work, described, latents)
    facts |= {"reward": config.reward, "held_out": config.held_out}
    log_scale = gather(on_rank_0(lambda: begin(work, network, settings, facts)))[0]
    data = GlobalBatches(
        latents, config.batch, micro=micro, law=RowLaw("flow", "uniform", network.null_class, drop=0.0),
        seed=config.seed, rank=process.rank, world=process.world, device=config.device,
    )  # fmt: skip
    on_rank_0(lambda: catch_up(work))
    tag = hashlib.sha256(json.dumps([settings, log_scale], sort_keys=True).encode()).hexdigest()

    def measure(average: FlowMap, k: int) -> None:
        work.measures.take(average, k)

    with data:
        average, _ = train(
            open_student(config), loss_of(work, log_scale), data, how,
            folder=config.out, tag=tag, callback=measure, progress="fine-tune",
        )  # fmt: skip
    on_rank_0(lambda: finish(work, average))
    if process.rank == 0:
        lines, minutes = work.measures.lines(), (time.perf_counter() - began) / 60
        first, last = (lines[k]["reward"][0] for k in (0, config.steps))
        print(f"{config.out / 'weights'}: reward {first:.4g} before and {last:.4g} after, {minutes:.1f} minutes")


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    config = parse(
        FinetuneOptions, __doc__ or "", arguments, prog="python -m imagenet.finetune", presets=("preset", PRESETS)
    )
    with refusing("imagenet.finetune"):
        check_device(config.device)
        with processes(config.device) as process:
            run(dataclasses.replace(config, device=str(process.device)), process)


if __name__ == "__main__":
    main()
