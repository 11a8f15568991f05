"""Samples of a network: by E19, by its flow map at t = 0, or along its drift.

    python -m imagenet.sample --weights mfm-xl2.pt --kind mfm --guidance 2.5 --vae stabilityai/sd-vae-ft-mse
    torchrun --nproc-per-node 8 -m imagenet.sample --device cuda --precision bfloat16 --count 50000 --batch 125 …

--method says how a sample is made, and --steps how many there are of what follows:

    posterior   draws of a posterior, with fresh noise between them (E19); weights without a context allow one step
    map         jumps of the flow map at t = 0, without noise between them; the context is the noise at their start,
                as in training (weights that are silent at t = 0 see nothing of it)
    euler, heun, dopri5    steps along the drift b_t (E2), of 1, 2 and 6 evaluations and of order 1, 2 and 5
    sde         steps of the SDE with the same marginals (E6)

OUT gets samples.npz and grid.png (without --vae, latents.npz alone) and settings.json; see `imagenet/run.py`. Sample i
is the same for any --count (each in a folder of its own: none grows) and on any number of processes, and up to rounding
in any --batch and on any device. A run that was killed goes on from its finished batches, and one that is finished is
not run again.
"""

import dataclasses
import time

import torch
from torch import Tensor

from imagenet.commands import check_device, refusing
from imagenet.run import (
    Job,
    ModelOptions,
    Passes,
    check_channels,
    describe,
    generators,
    guided,
    is_drift,
    labels_for,
    makes_jumps,
    name_of,
    open_network,
    open_vae,
    reads_context,
    run_job,
)
from mfm_ref import FlowMap, MetaFlowMap, integrate, sample, sample_posterior, time_grid
from mfm_ref.checks import check_count
from mfm_ref.distributed import Process, processes
from mfm_ref.flow_map import unconditional_drift
from mfm_ref.options import option, parse
from mfm_ref.sampling import noise_like

DYNAMICS = {"euler": "ode", "heun": "heun", "dopri5": "dopri5", "sde": "sde"}
METHODS = ("posterior", "map", *DYNAMICS)


@dataclasses.dataclass(frozen=True)
class SampleOptions(ModelOptions):
    """Options of the script."""

    count: int = option(64, "samples; 50000 for an FID")  # torchrun takes --n for itself
    method: str = option("posterior", "see above", choices=METHODS)
    steps: int = option(0, "draws, jumps or steps of each sample; 0: one draw or jump, and steps have to be given")
    labels: str = option("balanced", "balanced (each class in turn), random, or the number of one class")


def draw(config: SampleOptions, X: MetaFlowMap, y: Tensor, sources: list[torch.Generator]) -> Tensor:
    """A sample for each label by --method, `(B, *D)`, with the noise of the generator of its own."""
    if config.method == "posterior":
        return sample(X, len(y), config.steps, y=y, generator=sources)
    if config.method == "map":
        noise = noise_like(X, len(y), generator=sources)
        return sample_posterior(X, 0.0, noise, 1, config.steps, y=y, eps=noise.unsqueeze(0))[0]
    return integrate(
        lambda t, x: unconditional_drift(X, t, x, y),
        noise_like(X, len(y), generator=sources),
        time_grid(config.steps),
        dynamics=DYNAMICS[config.method],
        generator=sources,
    )


def check_method(config: SampleOptions, X: FlowMap) -> None:
    """Refuse a method that the network cannot serve: it would run, and give samples of another law."""
    if config.method in ("posterior", "map") and is_drift(X):
        raise ValueError(f"--method {config.method} needs jumps, and fine-tuned weights have none: use --method euler")
    if config.method in ("posterior", "map") and not makes_jumps(X):
        raise ValueError(
            f"--method {config.method} needs a network of two times, and SiT's have one: use {' or '.join(DYNAMICS)}"
        )
    if config.method == "posterior" and config.steps > 1 and not reads_context(X):
        raise ValueError(
            "--method posterior in more than one step needs a network with a context, and DMF's have none: use map"
        )


def steps_of(config: SampleOptions) -> int:
    """--steps, or what 0 stands for. Raises ValueError where one step would be too few to mean anything."""
    check_count(config.steps, "--steps", 0)
    if config.steps == 0 and config.method in DYNAMICS:
        raise ValueError(f"--steps must be given with --method {config.method}, such as 50: one is far from enough")
    return config.steps or 1


def run(config: SampleOptions, process: Process) -> None:
    """Every sample that is not there yet, then the files of the folder."""
    check_count(config.count, "--count")
    check_count(config.batch, "--batch")
    check_count(config.seed, "--seed", 0)
    config = dataclasses.replace(config, steps=steps_of(config))
    began, network = time.perf_counter(), open_network(config)
    check_method(config, network)
    X, vae, passes = guided(network, config), open_vae(config, network), Passes(network)
    check_channels(config, X)
    labels = labels_for(config.labels, config.count, network.null_class, config.seed)
    settings, facts = describe(config, network, X, vae)

    def make(rows: range) -> Tensor:
        y = labels[rows.start : rows.stop].to(X.device)
        return draw(config, X, y, generators(config.seed, rows))

    job = Job(settings, facts, labels, make, passes, vae, config.batch)
    record = run_job(job, config.out, process, "samples")
    if record is not None:
        minutes, each = (time.perf_counter() - began) / 60, record["evaluations_per_sample"]
        print(f"{config.out / name_of(vae)}: {config.count} samples of {each} evaluations each, {minutes:.1f} minutes")


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    config = parse(SampleOptions, __doc__ or "", arguments, prog="python -m imagenet.sample")
    with refusing("imagenet.sample"):
        check_device(config.device)
        with processes(config.device) as process:
            run(dataclasses.replace(config, device=str(process.device)), process)


if __name__ == "__main__":
    main()
