"""What a step of each objective costs, next to plain flow matching and next to its own floor.

    python -m benchmarks.objectives --out runs/benchmarks

A step is one loss and its backward pass. The floor counts forward passes per row: a forward 1, a backward 2, a
forward-mode derivative 2. A ratio of one means that an objective costs, relative to plain flow matching, what those
passes cost, and nothing else. Writes objectives.json and prints its tables.
"""

import copy
import dataclasses
import datetime
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.transformer import Transformer
from mfm_ref import MLP, FlowMap, coupled_interpolants, mean_flow_loss, velocity_loss
from mfm_ref.files import save_json
from mfm_ref.recipe import meta_flow_map_loss, no_context
from mfm_ref.times import ordered_times
from toy.common import ToyConfig, markdown, option, parse, set_up_processor
from toy.mixture import paper_mixture

Step = Callable[[], None]
Loss = Callable[[FlowMap, Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class BenchmarkConfig(ToyConfig):
    """Settings of the run; the defaults take some minutes on one core."""

    out: Path = Path("runs/benchmarks")
    repeats: int = option(3, "measurements, of which the medians are reported")
    steps: int = option(20, "of each objective in a repeat, in turn")
    warm_up: int = option(3, "steps of each objective that are not timed")
    mlp_batch: int = option(1024, "rows of the MLP's batch")
    transformer_batch: int = option(32, "rows of the transformer's batch")
    bf16: bool = option(False, "bfloat16 by autocast")
    compile: bool = option(False, "torch.compile of each loss")
    date: str = option("", "of the measurement, YYYY-MM-DD; today where empty")


FAST: dict[str, Any] = {"repeats": 2, "steps": 1, "warm_up": 1, "mlp_batch": 8, "transformer_batch": 2}


# ---- the objectives and their floors -------------------------------------------------------------------


class Passes(NamedTuple):
    """Passes through the network per row of the batch."""

    forward: float
    backward: float = 1.0
    derivative: float = 0.0  # in forward mode; yields its primal, the forward pass, as well

    @property
    def floor(self) -> float:
        """In forward passes."""
        return self.forward + 2 * self.backward + 2 * self.derivative


class Objective(NamedTuple):
    """A training step as a choice of arguments of `meta_flow_map_loss`, and the least that it can cost."""

    name: str
    consistency: str | None
    teacher: bool
    passes: Passes


# One gradient pass over all rows; half of them are the diagonal's and half the consistency's, except in the first two.
OBJECTIVES = (
    Objective("flow matching", None, False, Passes(1)),  # and its backward: 3
    Objective("diagonal, teacher", None, True, Passes(1 + 1)),  # E12: one drift on each row
    Objective("semigroup, self", "semigroup", False, Passes(1 + 0.5 * 2)),  # two legs
    Objective("semigroup, teacher", "semigroup", True, Passes(1 + 0.5 + 0.5 * (4 + 1))),  # E12; Runge–Kutta, a leg
    Objective("shortcut, self", "shortcut", False, Passes(1 + 0.5 * 2)),  # two legs
    Objective("lagrangian, self", "lagrangian", False, Passes(1 + 0.5, 1, 0.5)),  # v_{u,u}; ∂_u v
    Objective("lagrangian, teacher", "lagrangian", True, Passes(1 + 0.5 + 0.5, 1, 0.5)),  # E12 twice; ∂_u v
    Objective("eulerian, self", "eulerian", False, Passes(1 + 0.5, 1, 0.5)),  # v_{s,s}; ∂_s v + ∇v b̄
    Objective("eulerian, teacher", "eulerian", True, Passes(1 + 0.5 + 0.5, 1, 0.5)),  # E12 twice; ∂_s v + ∇v b̄
    Objective("mean flow, data", "mean_flow", False, Passes(1, 1, 0.5)),  # ∂_s v + ∇v v̇
)


def loss_of(objective: Objective, X: FlowMap) -> Loss:
    """The loss as a function of the map and a batch `(B, *D)`; the teacher is the drift of a frozen copy of X."""
    teacher = copy.deepcopy(X).requires_grad_(False).drift if objective.teacher else None
    options: dict[str, Any] = {"context": no_context} if objective is OBJECTIVES[0] else {}
    return partial(meta_flow_map_loss, drift=teacher, consistency=objective.consistency, **options)


# ---- measuring -----------------------------------------------------------------------------------------


def step_of(config: BenchmarkConfig, objective: Objective, X: FlowMap, x1: Tensor) -> Step:
    """One training step without its update: loss, backward pass, gradients dropped."""
    loss = loss_of(objective, X)
    if config.compile:
        loss = torch.compile(loss, dynamic=False)

    def step() -> None:
        with torch.autocast(x1.device.type, torch.bfloat16, enabled=config.bf16):
            value = loss(X, x1)
        value.backward()
        X.zero_grad(set_to_none=True)

    return step


def clock(step: Step, device: torch.device) -> tuple[float, float]:
    """Milliseconds of one step: of the process on its processors, and by the clock on the wall."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    wall, cpu = time.perf_counter(), time.process_time()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1e3 * (time.process_time() - cpu), 1e3 * (time.perf_counter() - wall)


def times_of(config: BenchmarkConfig, X: FlowMap, x1: Tensor) -> dict[str, dict[str, Any]]:
    """Times and ratios of every objective; their steps take turns in random order, so that the machine's drift cancels.

    Returns:
        for each name the floor, the medians over repeats of the median times (ms), of the ratio to plain flow
        matching and of that ratio over the ratio of floors (`over_floor`), and `over_floor` of each repeat. On a
        CPU the ratios are of processor time, on a GPU of wall time.
    """
    steps = {objective.name: step_of(config, objective, X, x1) for objective in OBJECTIVES}
    for step in steps.values():
        for _ in range(config.warm_up):
            step()
    plain, order = OBJECTIVES[0], random.Random(config.seed)
    repeats: dict[str, list[dict[str, float]]] = {name: [] for name in steps}
    for _ in range(config.repeats):
        taken: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
        for _ in range(config.steps):
            for name, step in order.sample(sorted(steps.items()), len(steps)):  # what ran before leaves its cache
                taken[name].append(clock(step, x1.device))
        for objective in OBJECTIVES:
            cpu, wall = (statistics.median(column) for column in zip(*taken[objective.name], strict=True))
            time_of_step = wall if x1.device.type == "cuda" else cpu
            repeats[objective.name].append({"cpu_ms": cpu, "wall_ms": wall, "time": time_of_step})
            to_plain = time_of_step / repeats[plain.name][-1]["time"]
            repeats[objective.name][-1]["to_plain"] = to_plain
            repeats[objective.name][-1]["over_floor"] = to_plain / (objective.passes.floor / plain.passes.floor)
    return {
        objective.name: {
            "floor": objective.passes.floor,
            **{
                key: round(statistics.median(repeat[key] for repeat in repeats[objective.name]), 4)
                for key in ("cpu_ms", "wall_ms", "to_plain", "over_floor")
            },
            "over_floor_of_repeats": [round(repeat["over_floor"], 4) for repeat in repeats[objective.name]],
        }
        for objective in OBJECTIVES
    }


def memory_of(config: BenchmarkConfig, X: FlowMap, x1: Tensor) -> dict[str, float]:
    """Peak memory of one step in MiB, beyond weights and data: a target without a graph, against one pass with one.

    All rows have the mean flow's target. In "one pass" the prediction is the primal of the forward-mode derivative,
    whose graph the backward pass then needs.
    """
    s, u = ordered_times(len(x1)).to(x1)
    t = no_context(len(x1)).to(x1)
    x, z, velocity = coupled_interpolants(x1, s, t)

    def one_pass() -> Tensor:
        start, along = (s, z), (torch.ones_like(s), velocity)
        v, slope = torch.func.jvp(lambda a, state: X.velocity(a, u, state, t, x), start, along)[:2]
        jump = (u - s).reshape(-1, *[1] * (z.ndim - 1))
        return (v - velocity - jump * slope.detach()).square().mean()

    losses: dict[str, Callable[[], Tensor]] = {
        "flow matching": lambda: velocity_loss(X, s, s, z, t, x, velocity),
        "mean flow, target without a graph": lambda: mean_flow_loss(X, s, u, z, t, x, velocity),
        "mean flow, one pass with a graph": one_pass,
    }

    def step(loss: Callable[[], Tensor]) -> None:
        with torch.autocast(x1.device.type, torch.bfloat16, enabled=config.bf16):
            value = loss()
        value.backward()
        X.zero_grad(set_to_none=True)

    return {name: round(peak_memory(partial(step, loss), x1.device), 2) for name, loss in losses.items()}


def peak_memory(step: Step, device: torch.device) -> float:
    """Largest sum of the tensors that a step makes, in MiB."""
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    return max(event["args"]["Total Allocated"] for event in events if event.get("name") == "[memory]") / 2**20


# ---- the run -------------------------------------------------------------------------------------------


def networks(config: BenchmarkConfig) -> dict[str, tuple[FlowMap, Tensor]]:
    """Each network as a map, and one batch of data `(B, *D)` for it."""
    p1, _ = paper_mixture()
    made: dict[str, tuple[nn.Module, Tensor]] = {
        "mlp": (MLP(p1.mean, p1.cov, normalise=True), p1.sample(config.mlp_batch)),
        "transformer": (transformer := Transformer(), torch.randn(config.transformer_batch, *transformer.shape)),
    }
    return {name: (FlowMap(network).to(config.device), x1.to(config.device)) for name, (network, x1) in made.items()}


def main(config: BenchmarkConfig) -> dict[str, Any]:
    """Every measurement; returns what objectives.json holds."""
    if config.fast:
        config = dataclasses.replace(config, **FAST)
    set_up_processor(config.threads)
    torch.manual_seed(config.seed)
    results = {}
    # Each objective is a version of one function; past the limit the rest would run uncompiled, without a word.
    with torch._dynamo.config.patch(recompile_limit=2 * len(OBJECTIVES), fail_on_recompile_limit_hit=True):
        for name, (X, x1) in networks(config).items():
            torch._dynamo.reset()
            results[name] = {
                "batch": len(x1),
                "objectives": times_of(config, X, x1),
                "memory": memory_of(config, X, x1),
            }
    report = {
        "date": config.date or datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if config.device.startswith("cuda") else "cpu",
        "cpus": os.cpu_count(),
        "threads": config.threads,
        **{name: getattr(config, name) for name in ("repeats", "steps", "bf16", "compile", "seed")},
        "networks": results,
    }
    save_json(report, config.out / "objectives.json")
    return report


def tables(report: dict[str, Any]) -> str:
    """The report as Markdown: one table of times a network, and one of memory."""
    parts = []
    for name, result in report["networks"].items():
        parts.append(f"{name}, batch {result['batch']}, {report['device']}")
        header = ["objective", "ms of processor", "ms by the wall", "to flow matching", "floor", "over the floor"]
        rows = [
            [
                objective,
                *(f"{row[key]:.1f}" for key in ("cpu_ms", "wall_ms")),
                f"{row['to_plain']:.2f}",
                f"{row['floor'] / OBJECTIVES[0].passes.floor:.2f}",
                f"{row['over_floor']:.2f}",
            ]
            for objective, row in result["objectives"].items()
        ]
        parts.append(markdown(header, rows))
        memory = result["memory"]
        rows = [[key, f"{value:.1f}", f"{value / memory['flow matching']:.2f}"] for key, value in memory.items()]
        parts.append(markdown(["all rows", "peak MiB", "to flow matching"], rows))
    return "\n\n".join(parts)


if __name__ == "__main__":
    print(tables(main(parse(BenchmarkConfig, __doc__ or ""))))
