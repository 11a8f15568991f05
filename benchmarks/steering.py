"""What one guided step costs, next to a loop over its samples and draws and next to its bare network passes.

    python -m benchmarks.steering --out runs/benchmarks

A step is one Doob drift (E7) of B states with N posterior draws each: N forward and N backward passes per state, and
one for the drift. A backward pass costs two forward ones, so 3N+1 forward passes are the bound. It is measured twice:
as 3N+1 passes of B rows, and in the batches of the step itself, three passes of N·B rows and one of B. Writes
steering.json and prints its table.
"""

import dataclasses
import datetime
import os
import random
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.objectives import Step, clock
from benchmarks.transformer import Transformer
from mfm_ref import MLP, FlowMap, doob_drift
from mfm_ref.checks import Reward
from mfm_ref.files import save_json
from toy.common import ToyConfig, markdown, option, parse, set_up_processor
from toy.mixture import paper_mixture

METHODS = ("gradient", "controlled")
TIME = 0.5  # of the step


@dataclasses.dataclass(frozen=True)
class SteeringConfig(ToyConfig):
    """Settings of the run; the defaults take some minutes on one core."""

    out: Path = Path("runs/benchmarks")
    repeats: int = option(5, "measurements, of which the medians are reported")
    steps: int = option(10, "of each kind in a repeat, in turn; the loop runs once")
    warm_up: int = option(2, "of each kind but the loop, not timed")
    mlp_batch: int = option(64, "states of the MLP")
    transformer_batch: int = option(8, "states of the transformer")
    date: str = option("", "of the measurement, YYYY-MM-DD; today where empty")


FAST: dict[str, Any] = {"repeats": 2, "steps": 1, "warm_up": 1, "mlp_batch": 2, "transformer_batch": 1}
DRAWS = (4, 16)


# ---- what is compared ----------------------------------------------------------------------------------


def loop_drift(X: FlowMap, reward: Reward, t: float, x: Tensor, eps: Tensor, method: str) -> Tensor:
    """E7 by its formulas, one sample and one draw at a time; `doob_drift` with the noises eps `(n, B, *D)`, 0 < t < 1.

    E16 is Σ w_i g_i and E17 Σ w_i f_i; "controlled" is made of both, see `controlled_guidance`.
    """
    drifts = []
    for k, state in enumerate(x.split(1)):
        values, draws, pulls = [], [], []
        for noise in eps[:, k : k + 1]:
            leaf = state.clone().requires_grad_()
            draw = X(0.0, 1.0, noise, t, leaf)
            r = reward(draw)
            pulls.append((1 - t) / t * torch.autograd.grad(r.sum(), leaf)[0].flatten())
            values.append(r.detach()[0])
            draws.append(draw.detach().flatten())
        weights = torch.softmax(torch.stack(values), 0)
        guidance = sum_of(weights, pulls)
        if method == "controlled":
            mean = sum(draws) / len(draws)
            guidance = controlled(weights, [(draw - mean) / (1 - t) for draw in draws], pulls)
        with torch.no_grad():
            drifts.append(X.velocity(t, t, state, 0.0, torch.zeros_like(state)) + guidance.reshape(state.shape))
    return torch.cat(drifts)


def controlled(weights: Tensor, shifts: list[Tensor], pulls: list[Tensor]) -> Tensor:
    """E17 + R² β ⟨Δ, ĝ⟩ ĝ + (1 − R²) e Δ for one sample: weights `(n,)`, n > 2, f_i and g_i each `(D,)`."""
    n, shift, apart = len(weights), sum_of(weights, shifts), sum_of(weights, pulls) - sum_of(weights, shifts)
    direction = sum_of(weights, pulls) / sum_of(weights, pulls).norm()
    halved = (weights + 1 / n) / 2
    varied = [halved @ (torch.stack(v) - sum_of(halved, v)).square().sum(1) for v in (shifts, pulls)]
    f, g = (torch.stack([value @ direction for value in values]) for values in (shifts, pulls))
    f, g = f - halved @ f, g - halved @ g
    beta = (halved @ (f * (f - g)) / (halved @ (f - g).square())).clamp(0, 1)
    squared = (halved @ (f * g)).square() / (halved @ f.square() * (halved @ g.square()))
    trust = (1 - (1 - squared) * (n - 1) / (n - 2)).clamp(0, 1)
    even = (varied[0] / varied[1]).clamp(max=1) / weights.square().sum() / n
    return shift + trust * beta * (apart @ direction) * direction + (1 - trust) * even * apart


def sum_of(weights: Tensor, values: list[Tensor]) -> Tensor:
    """Σ_i w_i values_i of `(n,)` and n values `(D,)`."""
    return torch.stack([w * value for w, value in zip(weights, values, strict=True)]).sum(0)


def guided_step(X: FlowMap, reward: Reward, x: Tensor, n: int, method: str, rng: torch.Generator) -> Step:
    """`doob_drift` with its defaults."""

    def run() -> None:
        doob_drift(X, reward, TIME, x, n, method, generator=rng)

    return run


def loop(X: FlowMap, reward: Reward, x: Tensor, n: int, method: str, rng: torch.Generator) -> Step:
    """`loop_drift`."""

    def run() -> None:
        eps = torch.randn((n, *x.shape), generator=rng, device=x.device)
        loop_drift(X, reward, TIME, x, eps, method)

    return run


def bare_passes(X: FlowMap, x: Tensor, batches: list[int]) -> Step:
    """Forward passes of the network alone, without a graph: one for each count of copies of the states x."""
    network: Any = X.network
    copies = [x.repeat(count, *[1] * (x.ndim - 1)) for count in batches]
    times = [torch.full((3, len(rows)), TIME).to(x) for rows in copies]

    def run() -> None:
        with torch.no_grad():
            for rows, (s, u, t) in zip(copies, times, strict=True):
                network.velocity(s, u, rows, t, rows, None)

    return run


# ---- measuring -----------------------------------------------------------------------------------------


def times_of(config: SteeringConfig, X: FlowMap, reward: Reward, x: Tensor, n: int) -> dict[str, dict[str, float]]:
    """For each method the medians over repeats, in ms, of a step, its loop and its bounds, and of their ratios.

    All runs of a repeat take turns in random order. On a CPU times are of the processor, on a GPU of the wall.
    """
    rng = torch.Generator(x.device).manual_seed(config.seed)
    runs: dict[str, Step] = {
        **{method: guided_step(X, reward, x, n, method, rng) for method in METHODS},
        "passes": bare_passes(X, x, [1] * (3 * n + 1)),
        "own_batches": bare_passes(X, x, [n, n, n, 1]),
    }
    for run in config.warm_up * list(runs.values()):
        run()
    order, cuda = random.Random(config.seed), x.device.type == "cuda"
    repeats: dict[str, list[dict[str, float]]] = {method: [] for method in METHODS}
    for _ in range(config.repeats):
        taken: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(config.steps):
            for name, run in order.sample(sorted(runs.items()), len(runs)):  # what ran before leaves its cache
                taken[name].append(clock(run, x.device)[cuda])
        ms = {name: statistics.median(times) for name, times in taken.items()}
        for method in METHODS:
            looped = clock(loop(X, reward, x, n, method, rng), x.device)[cuda]
            step = {"step_ms": ms[method], "loop_ms": looped, "loop_to_step": looped / ms[method]}
            for bound in ("passes", "own_batches"):
                step |= {f"{bound}_ms": ms[bound], f"step_to_{bound}": ms[method] / ms[bound]}
            repeats[method].append(step)
    return {
        method: {key: round(statistics.median(step[key] for step in steps), 4) for key in steps[0]}
        for method, steps in repeats.items()
    }


def networks(config: SteeringConfig) -> dict[str, tuple[FlowMap, Reward, Tensor]]:
    """Each network as a map, with a reward and the states of one step `(B, *D)`."""
    p1, likelihood = paper_mixture(config.device)
    transformer = Transformer()

    def brightness(x1: Tensor) -> Tensor:
        return -(x1 - 1).square().flatten(1).mean(1)

    made: dict[str, tuple[nn.Module, Reward, Tensor]] = {
        "mlp": (MLP(p1.mean.cpu(), p1.cov.cpu(), normalise=True), likelihood, torch.randn(config.mlp_batch, 2)),
        "transformer": (transformer, brightness, torch.randn(config.transformer_batch, *transformer.shape)),
    }
    nn.init.normal_(made["mlp"][0].outlet.weight, std=0.1)  # type: ignore[union-attr, arg-type]  # zero at the start
    return {name: (FlowMap(v).to(config.device), r, x.to(config.device)) for name, (v, r, x) in made.items()}


def main(config: SteeringConfig) -> dict[str, Any]:
    """Every measurement; returns what steering.json holds."""
    if config.fast:
        config = dataclasses.replace(config, **FAST)
    set_up_processor(config.threads)
    torch.manual_seed(config.seed)
    report = {
        "date": config.date or datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if config.device.startswith("cuda") else "cpu",
        "cpus": os.cpu_count(),
        **{name: getattr(config, name) for name in ("threads", "repeats", "steps", "seed")},
        "networks": {
            name: {"batch": len(x), "draws": {str(n): times_of(config, X, reward, x, n) for n in DRAWS}}
            for name, (X, reward, x) in networks(config).items()
        },
    }
    save_json(report, config.out / "steering.json")
    return report


def tables(report: dict[str, Any]) -> str:
    """The report as a Markdown table."""
    header = ["network", "method", "N", "step, ms", "loop over step", "step over 3N+1 passes", "in its own batches"]
    rows = [
        [f"{name}, {result['batch']} states", method, n, f"{times['step_ms']:.1f}", f"{times['loop_to_step']:.1f}"]
        + [f"{times[key]:.2f}" for key in ("step_to_passes", "step_to_own_batches")]
        for name, result in report["networks"].items()
        for n, methods in result["draws"].items()
        for method, times in methods.items()
    ]
    return markdown(header, rows)


if __name__ == "__main__":
    print(tables(main(parse(SteeringConfig, __doc__ or ""))))
