"""What a training step of SiT as MFM costs, beside the released composition, and what a guided step costs.

    python -m benchmarks.imagenet_training --device cuda --out runs/benchmarks

A step is loss, backward pass, clipping, RAdam and the average of weights, in bfloat16 by autocast, on a network begun
from its teacher, a DMF with random weights. Two compositions of the same loss (`paper_loss`: E13 and teacher-Eulerian
E14 on an image each) take turns on the same rows:

    ours        one teacher pass for all rows, a derivative without a graph, one gradient pass; compiled
    released    for each of the two terms two teacher calls of 2B rows (labels and null class, B images), a derivative
                with a graph, a pass of its own for each term; eager

The utilisation is that of the matrix products of the fewest passes that the loss needs, nine forward passes for each
image (ours makes ten), over the rate of one large product. A guided step is one of `steer` with N draws and their
gradients through the map, for a reward on latents, without a decoder. Writes imagenet-training.json and prints its
tables.
"""

import copy
import dataclasses
import datetime
import os
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import jvp

from benchmarks.imagenet import ImagenetConfig, matrix_rate, peak_memory
from benchmarks.objectives import Step, clock
from imagenet.checkpoints import mfm_from
from imagenet.commands import PRECISIONS, in_precision
from imagenet.cost import flops_of
from imagenet.run import generators
from imagenet.sit import SIZES, SiT, build
from imagenet.teacher import Teacher
from mfm_ref import FlowMap, Guided
from mfm_ref.alignment import doob_drift
from mfm_ref.files import save_json
from mfm_ref.interpolant import glass_statistic
from mfm_ref.objectives import adaptive_weight, weighted_mean_square
from mfm_ref.options import option, parse
from mfm_ref.paper_recipe import PaperRows, RowLaw, draw_rows, forward_equivalents, paper_loss
from toy.common import markdown, set_up_processor

SCALE = 2.5  # of guidance, in the teacher's weights too
COMPOSITIONS = ("ours, compiled", "ours, eager", "released, eager")
Loss = Callable[[], Tensor]


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """Settings of the run."""

    out: Path = option(Path("runs/benchmarks"), "folder of the results")
    size: str = option("XL/2", "of the network", choices=tuple(SIZES))
    side: int = option(32, "height and width of the latents")
    batches: str = option("48", "images in a step of each composition, with commas")
    draws: int = option(32, "N of the guided steps; 0 measures none")
    samples: str = option("1,4", "samples that are steered together, with commas")
    precision: str = option("bfloat16", "of matrix products (autocast)", choices=tuple(PRECISIONS))
    compile: bool = option(True, "measure what is compiled, too")
    product: int = option(8192, "side of the matrices of the product that gives the matrix rate")
    repeats: int = option(5, "steps of each composition, in turn, of which the medians are reported")
    warm_up: int = option(2, "steps of each composition, not timed")
    seed: int = option(0, "of weights and noise")
    device: str = option("cuda", "where torch computes")
    threads: int = option(2, "of torch on a CPU")
    date: str = option("", "of the measurement, YYYY-MM-DD; today where empty")
    commit: str = option("", "of this repository, kept in the report")


# ---- the two compositions ------------------------------------------------------------------------------


def networks(config: TrainingConfig) -> tuple[FlowMap, Teacher]:
    """The student, an MFM that begins as its teacher but for small random weights where it begins with zeros."""
    generator = torch.Generator().manual_seed(config.seed)
    torch.manual_seed(config.seed)

    def scattered(network: SiT) -> SiT:
        with torch.no_grad():
            for parameter in (p for p in network.parameters() if p.requires_grad):
                parameter.add_(torch.randn(parameter.shape, generator=generator).mul_(0.02))
        return network

    shape = [4, config.side, config.side]
    dmf = scattered(build(config.size, "dmf", shape=shape, noise_times=True))
    student = scattered(mfm_from(dmf, guidance=[1.0, SCALE]))
    teacher = FlowMap(dmf.to(config.device)).requires_grad_(False).eval()
    return FlowMap(student.to(config.device)), Teacher(teacher, SCALE, one_scale=True)


def rows_of(config: TrainingConfig, n: int, null_class: int) -> PaperRows:
    """The rows of n images, which are noise here, on the device."""
    generator = torch.Generator().manual_seed(config.seed)
    x1 = torch.randn((n, 4, config.side, config.side), generator=generator)
    y = torch.randint(null_class, (n,), generator=generator)
    law = RowLaw("mfm", "uniform", null_class, drop=0.2, guidance=SCALE)
    rows, _ = draw_rows(law, x1, y, generators(config.seed, range(n)))
    return PaperRows(*(a.to(config.device) for a in rows))


def ours(X: FlowMap, teacher: Teacher, r: PaperRows) -> Tensor:
    """`paper_loss`."""
    found = paper_loss(X, r, len(r.s) // 2, teacher=teacher)
    terms: dict[str, Tensor] = found.terms  # type: ignore[assignment]
    return terms["diagonal"] + terms["consistency"]


def released(X: FlowMap, teacher: Teacher, r: PaperRows) -> Tensor:
    """The same loss as the released trainer composes it; written from a description of it.

    Each term reads the teacher's guided velocity in two calls with labels and null class: one undoes the guidance in
    its weights, one puts it back. The value and the derivative of a jump come from one pass, with a graph.
    """
    n = len(r.s) // 2
    total = torch.zeros((), device=r.z.device)
    for part, jump, p in ((slice(None, n), False, 0.5), (slice(n, None), True, 1.0)):
        s, u, z, t, x, y, w, _ = (a[part] for a in r)
        with torch.no_grad():
            b = guided_by_two_calls(teacher, s, z, t, x, y)
        if jump:

            def velocity(s: Tensor, z: Tensor, rest: tuple[Tensor, ...] = (u, t, x, y, w)) -> Tensor:
                u, t, x, y, w = rest
                return X.velocity(s, u, z, t, x, y, w)

            v, slope = jvp(velocity, (s, z), (torch.ones_like(s), b))[:2]
            target = b + (u - s).reshape(-1, 1, 1, 1) * slope.detach()
        else:
            v, target = X.velocity(s, s, z, t, x, y, w), b
        total = total + weighted_mean_square(v - target, partial(adaptive_weight, p=p))
    return total


def guided_by_two_calls(teacher: Teacher, s: Tensor, z: Tensor, t: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """E12 at the scale in the teacher's weights: v_∅ + w (v_c − v_∅), v_c = (1/w) v_w + (1 − 1/w) v_∅."""
    time, state, gain, pull = glass_statistic(s, z, t, x)
    labels = torch.cat([y, torch.full_like(y, teacher.X.null_class)])
    time, state = torch.cat([time, time]), torch.cat([state, state])
    unguided, _ = teacher.X.drift(time, state, labels).chunk(2)
    guided, null = teacher.X.drift(time, state, labels).chunk(2)
    conditional = unguided / SCALE + (1 - 1 / SCALE) * null
    del guided
    return (gain * (null + SCALE * (conditional - null)) + pull).to(z.dtype)


# ---- steps, measured -----------------------------------------------------------------------------------


class Trainee:
    """A student with its optimiser and average, which all compositions share."""

    def __init__(self, X: FlowMap):
        self.X = X
        self.weights: list[Tensor] = [p for p in X.parameters() if p.requires_grad]
        self.optimizer = torch.optim.RAdam(self.weights, lr=1e-6, decoupled_weight_decay=True)
        self.average = [copy.deepcopy(p.detach()) for p in self.weights]

    def step(self, loss: Loss) -> Step:
        """An update by a loss."""

        def run() -> None:
            self.optimizer.zero_grad()
            loss().backward()
            nn.utils.clip_grad_norm_(self.weights, 1.5)
            self.optimizer.step()
            torch._foreach_lerp_(self.average, self.weights, 1e-4)

        return run


def loss_of(config: TrainingConfig, name: str, X: FlowMap, teacher: Teacher, r: PaperRows) -> Loss:
    """A composition of the loss on given rows, in the precision of the run."""
    composition: Callable[[FlowMap, Teacher, PaperRows], Tensor] = released if name.startswith("released") else ours
    if name.endswith("compiled"):
        composition = torch.compile(composition, dynamic=False)

    def loss() -> Tensor:
        with in_precision(config.precision, config.device):
            return composition(X, teacher, r)

    return loss


def measured_steps(config: TrainingConfig, trainee: Trainee, teacher: Teacher) -> tuple[list[dict[str, Any]], float]:
    """A row for each number of images and composition: losses, gradients' norms, seconds, memory, utilisation.

    All are compiled first; then a line says that measuring begins, so that whatever else the machine does can stop.
    With them, the matrix rate.
    """
    X = trainee.X
    network: SiT = X.network  # type: ignore[assignment]
    flops, need = flops_of(network), forward_equivalents("mfm", teacher=1)
    steps: dict[tuple[int, str], Step] = {}
    facts: dict[tuple[int, str], dict[str, Any]] = {}
    for n in (int(n) for n in config.batches.split(",")):
        r = rows_of(config, n, network.n_classes)
        for name in COMPOSITIONS:
            if config.compile or not name.endswith("compiled"):
                loss = loss_of(config, name, X, teacher, r)
                facts[n, name] = warmed_up(config, trainee, loss)
                steps[n, name] = trainee.step(loss)
    print("measuring", flush=True)
    rate = matrix_rate(ImagenetConfig(device=config.device, precision=config.precision, product=config.product))
    seconds: dict[tuple[int, str], list[float]] = {key: [] for key in steps}
    for _ in range(config.repeats):
        for key, step in steps.items():
            seconds[key].append(clock(step, trainee.average[0].device)[1] / 1e3)
    rows = []
    for (n, name), times in seconds.items():
        taken = statistics.median(times)
        row: dict[str, Any] = {"images": n, "composition": name, "seconds": taken, **facts[n, name]}
        row |= {"floor_utilisation": need.floor * n * flops / taken / rate}
        row |= {"utilisation": (need.student + need.teacher) * n * flops / taken / rate}
        rows.append(row)
        print(row, flush=True)
    return rows, rate


def warmed_up(config: TrainingConfig, trainee: Trainee, loss: Loss) -> dict[str, Any]:
    """The loss, the norm of its gradient, the time of the first step, and the peak of memory in later ones."""
    cuda = torch.device(config.device).type == "cuda"
    value = 0.0

    def first() -> None:
        nonlocal value
        trainee.optimizer.zero_grad()
        found = loss()
        found.backward()
        value = float(found.detach())

    taken = clock(first, trainee.average[0].device)[1] / 1e3
    squares = torch.stack([p.grad.double().square().sum() for p in trainee.weights if p.grad is not None])
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(config.warm_up):
        trainee.step(loss)()
    memory = peak_memory(ImagenetConfig(device=config.device))
    return {"loss": value, "gradient": float(squares.sum().sqrt()), "first_seconds": taken, "peak_memory": memory}


def measured_guidance(config: TrainingConfig, X: FlowMap) -> list[dict[str, Any]]:
    """Guided steps of the Doob ODE (E7) with N draws and their gradients, by `doob_drift`, with a reward on latents."""
    network: SiT = X.network.requires_grad_(False)  # type: ignore[assignment]
    if config.compile:  # block by block: one compilation serves all
        for block in network.blocks:
            block.compile(dynamic=False)
    guided, rows = Guided(X, SCALE), []
    for n in (int(n) for n in config.samples.split(",") if n):
        generator = torch.Generator(config.device).manual_seed(config.seed)
        x = torch.randn((n, *X.shape), generator=generator, device=config.device)
        y = torch.randint(network.n_classes, (n,), generator=generator, device=config.device)

        def step(x: Tensor = x, y: Tensor = y, generator: torch.Generator = generator) -> None:
            with in_precision(config.precision, config.device):
                x.add_(doob_drift(guided, spread, 0.3, x, config.draws, "gradient", y=y, generator=generator) / 250)

        for _ in range(config.warm_up):
            step()
        if x.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        taken = statistics.median(clock(step, x.device)[1] / 1e3 for _ in range(config.repeats))
        row: dict[str, Any] = {"samples": n, "draws": config.draws, "seconds": taken, "steps_per_second": 1 / taken}
        row |= {"compiled": config.compile, "peak_memory": peak_memory(ImagenetConfig(device=config.device))}
        rows.append(row)
        print(row, flush=True)
    return rows


def spread(x1: Tensor) -> Tensor:
    """A reward of latents: their mean square, `(B, *D) -> (B,)`."""
    return x1.square().flatten(1).mean(1)


# ---- the report ----------------------------------------------------------------------------------------


def main(config: TrainingConfig) -> dict[str, Any]:
    """Every measurement; returns what imagenet-training.json holds."""
    set_up_processor(config.threads)
    torch._dynamo.config.recompile_limit = 64  # one for each number of images
    X, teacher = networks(config)
    flops = flops_of(X.network)  # type: ignore[arg-type]
    trainee = Trainee(X)
    steps, rate = measured_steps(config, trainee, teacher)
    del trainee, teacher
    X.zero_grad()
    guided = measured_guidance(config, X) if config.draws else []
    need = forward_equivalents("mfm", teacher=1)
    report = {
        "date": config.date or datetime.date.today().isoformat(),
        "commit": config.commit,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if config.device.startswith("cuda") else "cpu",
        "cpus": os.cpu_count(),
        **{name: getattr(config, name) for name in ("size", "side", "precision", "repeats", "threads", "seed")},
        "matrix_rate": rate,
        "flops_per_pass": flops,
        "forward_equivalents": {"ours": need.student + need.teacher, "floor": need.floor},
        "steps": steps,
        "guided": guided,
    }
    save_json(report, config.out / "imagenet-training.json")
    return report


def tables(report: dict[str, Any]) -> str:
    """The report as two Markdown tables."""
    released_seconds = {
        row["images"]: row["seconds"] for row in report["steps"] if row["composition"].startswith("released")
    }
    rows = []
    for row in report["steps"]:
        other = released_seconds.get(row["images"])
        rows.append(
            [
                str(row["images"]),
                row["composition"],
                f"{row['seconds']:.3f}",
                f"{row['images'] / row['seconds']:.1f}",
                f"{other / row['seconds']:.2f}" if other else "",
                f"{row['floor_utilisation']:.0%}",
                f"{row['loss']:.4f}",
                "" if row["peak_memory"] is None else f"{row['peak_memory'] / 2**30:.1f}",
            ]
        )
    header = [
        "images",
        "composition",
        "s a step",
        "images/s",
        "faster than released",
        "of the matrix rate",
        "loss",
        "GiB",
    ]
    parts = [markdown(header, rows)]
    if report["guided"]:
        guided = [
            [
                str(row["samples"]),
                str(row["draws"]),
                f"{row['steps_per_second']:.2f}",
                "" if row["peak_memory"] is None else f"{row['peak_memory'] / 2**30:.1f}",
            ]
            for row in report["guided"]
        ]
        parts.append(markdown(["samples", "draws", "guided steps/s", "GiB"], guided))
    return "\n\n".join(parts)


if __name__ == "__main__":
    print(tables(main(parse(TrainingConfig, __doc__ or ""))))
