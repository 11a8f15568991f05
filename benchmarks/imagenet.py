"""How fast SiT samples, next to its bare forward passes and to the matrix rate of the chip.

    python -m benchmarks.imagenet --device cuda --precision bfloat16 --out runs/benchmarks

One-step posterior samples by `sample_posterior`, and four-step ones, of a network with random weights. Next to them
run as many calls of the network alone, on the same states. Floating-point operations are those of the matrix products
of one forward pass; the matrix rate is that of one large product. Both are measured compiled and, after it, eager
(`--no-compile`: eager alone). Writes imagenet.json and prints its table.
"""

import dataclasses
import datetime
import os
import random
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.objectives import Step, clock
from imagenet.commands import PRECISIONS, in_precision
from imagenet.cost import flops_of
from imagenet.sit import SIZES, SiT, build
from mfm_ref import FlowMap, Guided, sample_posterior
from mfm_ref.files import save_json
from mfm_ref.options import option, parse
from toy.common import markdown, set_up_processor

STEPS = (1, 4)  # evaluations of a sample
SCALE = 2.5  # of guidance
TIME = 0.3  # of the context


@dataclasses.dataclass(frozen=True)
class ImagenetConfig:
    """Settings of the run."""

    out: Path = option(Path("runs/benchmarks"), "folder of the results")
    size: str = option("XL/2", "of the network", choices=tuple(SIZES))
    side: int = option(32, "height and width of the latents")
    batches: str = option("8,32,128,256", "numbers of samples, with commas")
    precision: str = option("bfloat16", "of matrix products (autocast)", choices=tuple(PRECISIONS))
    compile: bool = option(True, "measure the compiled network, too")
    product: int = option(8192, "side of the matrices of the product that gives the matrix rate")
    repeats: int = option(5, "measurements, of which the medians are reported")
    calls: int = option(3, "of each kind in a repeat, in turn")
    warm_up: int = option(2, "calls of each kind, not timed")
    seed: int = option(0, "of weights and noise")
    device: str = option("cuda", "where torch computes")
    threads: int = option(2, "of torch on a CPU")
    date: str = option("", "of the measurement, YYYY-MM-DD; today where empty")
    commit: str = option("", "of this repository, kept in the report")


def random_network(config: ImagenetConfig) -> SiT:
    """An MFM whose weights are all random: its outputs are not zero, as they are before training."""
    network = build(config.size, "mfm", shape=[4, config.side, config.side], guidance=[1.0, SCALE], noise_times=True)
    generator = torch.Generator().manual_seed(config.seed)
    for parameter in network.parameters():
        parameter.requires_grad_(False)
        parameter.copy_(torch.randn(parameter.shape, generator=generator).mul_(0.02))
    return network.to(config.device).eval()


def matrix_rate(config: ImagenetConfig) -> float:
    """Operations per second of a large product of random matrices, the best of the repeats."""
    n, dtype = config.product, PRECISIONS[config.precision]
    a, b, c = (torch.randn(n, n, device=config.device).to(dtype) for _ in range(3))

    def product() -> None:
        torch.mm(a, b, out=c)

    seconds = [clock(product, a.device)[1] / 1e3 for _ in range(config.warm_up + 5 * config.repeats)]
    return 2 * n**3 / min(seconds)


def bare_passes(network: SiT, steps: int, z: Tensor, t: Tensor, x: Tensor, y: Tensor, w: Tensor) -> Step:
    """As many calls of the network as `sample_posterior` makes, and nothing between them."""
    times = [torch.full_like(t, k / steps) for k in range(steps + 1)]

    def run() -> None:
        for k in range(steps):
            network.velocity(times[k], times[k + 1], z, t, x, y, w)

    return run


def sampler(X: Guided, steps: int, z: Tensor, t: Tensor, x: Tensor, y: Tensor) -> Step:
    """`sample_posterior`, one draw for each context."""

    def run() -> None:
        sample_posterior(X, t, x, 1, steps, y=y, eps=z.unsqueeze(0))

    return run


def times_of(config: ImagenetConfig, network: SiT, batch: int) -> dict[str, dict[str, float]]:
    """For each number of steps the medians over repeats, in seconds, of sampler and bare passes, and their ratio.

    They take turns in random order. On a CPU the ratio is of processor time, on a GPU of wall time.
    """
    generator = torch.Generator(config.device).manual_seed(config.seed)
    x, z = torch.randn((2, batch, *network.shape), generator=generator, device=config.device)
    y = torch.randint(network.n_classes, (batch,), generator=generator, device=config.device)
    t, w = torch.full((2, batch), TIME, device=config.device)
    w = torch.full_like(w, SCALE)
    X, cuda = Guided(FlowMap(network), SCALE), x.device.type == "cuda"
    runs: dict[str, Step] = {}
    for steps in STEPS:
        runs[f"sampler {steps}"] = sampler(X, steps, z, t, x, y)
        runs[f"bare {steps}"] = bare_passes(network, steps, z, t, x, y, w)
    for run in config.warm_up * list(runs.values()):
        run()
    order = random.Random(config.seed)
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for _ in range(config.repeats):
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
        for _ in range(config.calls):
            for name, run in order.sample(sorted(runs.items()), len(runs)):
                found[name].append(clock(run, x.device))
        for name, times in found.items():
            taken[name].append(median_of(times))
    result = {}
    for steps in STEPS:
        ours, bare = taken[f"sampler {steps}"], taken[f"bare {steps}"]
        ratios = [a[cuda] / b[cuda] for a, b in zip(ours, bare, strict=True)]
        result[str(steps)] = {
            "seconds": statistics.median(a[1] for a in ours) / 1e3,
            "bare_seconds": statistics.median(b[1] for b in bare) / 1e3,
            "over_bare": statistics.median(ratios),
        }
    return result


def median_of(times: list[tuple[float, float]]) -> tuple[float, float]:
    """Medians of the two clocks."""
    cpu, wall = (statistics.median(clock) for clock in zip(*times, strict=True))
    return cpu, wall


def measure(config: ImagenetConfig) -> list[dict[str, Any]]:
    """A row for each batch, network compiled or eager, and number of steps."""
    network, rows, rate = random_network(config), [], matrix_rate(config)
    flops = flops_of(network)
    eager: Callable[..., Tensor] = network.velocity
    for compiled in (True, False) if config.compile else (False,):
        network.velocity = torch.compile(eager, dynamic=False) if compiled else eager  # type: ignore[method-assign]
        for batch in (int(b) for b in config.batches.split(",")):
            if torch.device(config.device).type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            with torch.no_grad(), in_precision(config.precision, config.device):
                times = times_of(config, network, batch)
            for steps, found in times.items():
                done = batch * int(steps) * flops / found["seconds"]
                row: dict[str, Any] = {"compiled": compiled, "batch": batch, "steps": int(steps), **found}
                row |= {"samples_per_second": batch / found["seconds"], "flops_per_second": done}
                row |= {"utilisation": done / rate, "peak_memory": peak_memory(config)}
                rows.append(row)
                print(row, flush=True)
    return [{"matrix_rate": rate, "flops_per_pass": flops}, *rows]


def peak_memory(config: ImagenetConfig) -> int | None:
    """Bytes that were allocated on the GPU at most; None on a CPU."""
    return torch.cuda.max_memory_allocated() if torch.device(config.device).type == "cuda" else None


def main(config: ImagenetConfig) -> dict[str, Any]:
    """Every measurement; returns what imagenet.json holds."""
    set_up_processor(config.threads)
    torch._dynamo.config.recompile_limit = 64  # one for each batch, and for the checks' constants
    rate, *rows = measure(config)
    report = {
        "date": config.date or datetime.date.today().isoformat(),
        "commit": config.commit,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if config.device.startswith("cuda") else "cpu",
        "cpus": os.cpu_count(),
        **{
            name: getattr(config, name) for name in ("size", "side", "precision", "repeats", "calls", "threads", "seed")
        },
        **rate,
        "rows": rows,
    }
    save_json(report, config.out / "imagenet.json")
    return report


def tables(report: dict[str, Any]) -> str:
    """The report as a Markdown table."""
    header = ["network", "samples", "evaluations", "samples/s", "over bare passes", "TFLOP/s", "of the matrix rate"]
    rows = [
        [
            f"{report['size']}, {'compiled' if row['compiled'] else 'eager'}",
            str(row["batch"]),
            str(row["steps"]),
            f"{row['samples_per_second']:.3g}",
            f"{row['over_bare']:.3f}",
            f"{row['flops_per_second'] / 1e12:.3g}",
            f"{row['utilisation']:.0%}",
        ]
        for row in report["rows"]
    ]
    return markdown(header, rows)


if __name__ == "__main__":
    print(tables(main(parse(ImagenetConfig, __doc__ or ""))))
