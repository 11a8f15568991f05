"""What test_sharding.py has torchrun start: two processes train a tiny transformer with either engine, and write it.

torchrun --nproc-per-node 2 -m tests.sharded_run FOLDER
"""

import math
import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import mfm_ref.run_state
from mfm_ref import FlowMap, TrainConfig, Watched, train
from mfm_ref.data import stream_seed
from mfm_ref.distributed import Process, gather, on_rank_0, processes
from mfm_ref.objectives import mean_flow_target
from tests import joined_run
from tests.imagenet_tiny import tiny_sit
from tests.joined_run import weights

BATCH, STEPS = 8, 6  # rows and steps of a run, whatever the number of processes
SIZES = {"depth": 2, "encoder_depth": 1, "width": 12, "heads": 3, "shape": (1, 4, 4)}  # 12 is not a multiple of 5
GRADIENT = {"steps": 1, "lr": 1.0, "optimizer": "radam", "betas": (0.0, 0.999), "warmup": 0, "clip": 0.0, "decay": 0.0}


class Draw(NamedTuple):
    """Rows of a batch, the noise included."""

    s: Tensor
    u: Tensor
    z: Tensor
    t: Tensor
    x: Tensor
    velocity: Tensor
    y: Tensor


class Elastic:
    """Batch k of 8 rows is a function of k; micro-batch j of process r has rows (j·world + r)·micro and following."""

    elastic = True

    def __init__(self, process: Process, micro: int, dtype: torch.dtype):
        self.process, self.micro, self.dtype, self.drawn = process, micro, dtype, 0
        self.parts = BATCH // (process.world * micro)

    def __iter__(self):
        return self

    def __next__(self) -> Draw:
        k, j = divmod(self.drawn, self.parts)
        self.drawn += 1
        rng = torch.Generator().manual_seed(stream_seed(11, k))
        z, x, velocity = torch.randn(3, BATCH, *SIZES["shape"], generator=rng, dtype=torch.float64).to(self.dtype)
        s, u = torch.rand(2, BATCH, generator=rng, dtype=torch.float64).sort(0)[0].to(self.dtype)
        t = torch.rand(BATCH, generator=rng, dtype=torch.float64).to(self.dtype)
        y = torch.randint(3, (BATCH,), generator=rng)
        first = (j * self.process.world + self.process.rank) * self.micro
        return Draw(*(part[first : first + self.micro] for part in (s, u, z, t, x, velocity, y)))

    def state_dict(self) -> dict[str, int]:
        return {"step": self.drawn // self.parts}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.drawn = state_dict["step"] * self.parts


def loss(X: FlowMap, rows: Draw, rng: torch.Generator | None) -> Watched:
    """A jump onto its mean-flow target, made by a derivative without a graph, and the diagonal onto the velocity."""
    assert rng is None
    s, u, z, t, x, velocity, y = rows
    target = mean_flow_target(X, s, u, z, t, x, velocity, y)
    residual = (X.velocity(s, u, z, t, x, y) - target).flatten(1).square().mean(1)
    early = s < 0.3
    terms = {
        "jump": residual.mean(),
        "diagonal": (X.velocity(s, s, z, t, x, y) - velocity).square().mean(),
    }
    return Watched(terms, {"early": _pair(residual, early), "never": _pair(residual, early & ~early)})


def _pair(values: Tensor, chosen: Tensor) -> Tensor:
    return torch.stack([(values * chosen).sum(), chosen.sum()])


def trained(
    process: Process,
    folder: Path | None = None,
    *,
    micro: int = 4,
    dtype: torch.dtype = torch.float64,
    checkpointing: bool = False,
    objective: Callable[..., Any] = loss,
    callback: Callable[..., None] | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """The end of one run. The processes begin with different weights, of which rank 0's count."""
    X = FlowMap(tiny_sit(seed=process.rank, **SIZES)).to(dtype).train()
    X.network.checkpointing = checkpointing
    before = weights(X)
    options = {"steps": STEPS, "lr": 0.02, "warmup": 2, "decay": 0.5, "checkpoint_every": 4, "log_every": 1}
    options["accumulate"] = BATCH // (process.world * micro)
    data = Elastic(process, micro, dtype)
    config = TrainConfig(**(options | settings))
    average, history = train(X, objective, data, config, folder=folder, callback=callback)
    names = {type(module).__name__ for module in (*X.modules(), *average.modules())}
    return {
        "before": before,
        "model": weights(X),
        "average": weights(average),
        "history": history,
        "plain": not any(name.startswith("FSDP") for name in names),
        "frozen": not average.training and not any(p.requires_grad for p in average.parameters()),
    }


def acting(at: int, act: Callable[[], float]) -> Callable[..., Any]:
    """The loss, with something that happens at its call number `at`, and a factor that it returns."""
    calls = [0]

    def acting_loss(X: FlowMap, rows: Draw, rng: torch.Generator | None) -> Watched:
        calls[0] += 1
        factor = act() if calls[0] == at else 1.0
        terms, watched = loss(X, rows, rng)
        return Watched({name: factor * term for name, term in terms.items()}, watched)

    return acting_loss


def outcome(act: Callable[[], Any]) -> str:
    """What a run ends with."""
    try:
        act()
    except (Exception, SystemExit) as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def steps(folder: Path) -> list[str]:
    """The checkpoints, when all have written."""
    gather(None)
    return sorted(path.name for path in folder.glob("step-*"))


def terminated(process: Process, folder: Path) -> dict[str, Any]:
    """SIGTERM to the second process alone, in its third step."""

    def terminate() -> float:
        if process.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return 1.0

    end = outcome(lambda: trained(process, folder, engine="fsdp", objective=acting(3, terminate)))
    return {"end": end, "checkpoints": steps(folder)}


def not_finite(process: Process) -> str:
    """NaN in the loss of the first process alone."""
    return outcome(
        lambda: trained(process, engine="fsdp", objective=acting(3, lambda: 1.0 if process.rank else math.nan))
    )


def full_disk(process: Process, folder: Path, engine: str, *, log_every: int) -> dict[str, Any]:
    """From the third step on, the process that writes can write no file of more than 700 bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill() -> float:
        if process.rank == 0:
            resource.setrlimit(resource.RLIMIT_FSIZE, (700, limits[1]))
        return 1.0

    options = {"engine": engine, "checkpoint_every": 2, "log_every": log_every, "objective": acting(3, fill)}
    try:
        end = outcome(lambda: trained(process, folder, **options))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    return {"end": end, "checkpoints": steps(folder)}


def shown(process: Process) -> dict[str, Any]:
    """What the callback sees, and what becomes of its errors."""
    seen: list[Any] = []

    def look(average: FlowMap, k: int) -> None:
        plain = type(average) is FlowMap and all(type(p) is torch.nn.Parameter for p in average.parameters())
        seen.append((k, plain, weights(average)))

    def fail(average: FlowMap, k: int) -> None:
        raise KeyError("no such picture")

    found = trained(process, engine="fsdp", sample_every=3, callback=look)
    end = outcome(lambda: trained(process, engine="fsdp", sample_every=3, callback=fail))
    return {"seen": seen, "average": found["average"], "end": end}


def aged(process: Process, folder: Path) -> list[str]:
    """Six minutes go by in the third step, by the clock of the second process alone."""
    clock, minutes = mfm_ref.run_state.monotonic, [0.0]

    def wait() -> float:
        minutes[0] += 6.0 * process.rank
        return 1.0

    mfm_ref.run_state.monotonic = lambda: 60 * minutes[0]
    try:
        trained(process, folder, engine="fsdp", checkpoint_every=100, checkpoint_minutes=5.0, objective=acting(3, wait))
    finally:
        mfm_ref.run_state.monotonic = clock
    return steps(folder)


def resumed(process: Process, root: Path, engine: str) -> dict[str, Any]:
    """Go on with what one process began; test_sharding.py has put a copy there for each engine."""
    return trained(process, root / f"begun alone, {engine}", engine=engine)


def asked_of_rank_0(process: Process) -> list[str]:
    """What `on_rank_0` gives, and how it fails, in each process."""

    def fail() -> None:
        raise ValueError("rank 0 alone")

    return [str(on_rank_0(lambda: 7)), outcome(lambda: on_rank_0(fail))]


if __name__ == "__main__":
    root = Path(sys.argv[1])
    torch.set_num_threads(1)
    with processes() as here:
        both = ("ddp", "fsdp")
        found = {
            "whole": {engine: trained(here, root / engine, engine=engine) for engine in both},
            "accumulated": {engine: trained(here, engine=engine, micro=2) for engine in both},
            "gradient": {engine: trained(here, engine=engine, **GRADIENT) for engine in both},
            "checkpointed": trained(here, engine="fsdp", checkpointing=True, **GRADIENT),
            "bfloat16": {e: trained(here, engine=e, precision="bfloat16", dtype=torch.float32) for e in both},
            "not elastic": joined_run.trained(here, engine="fsdp", accumulate=2, folder=root / "not elastic"),
            "resumed": {engine: resumed(here, root, engine) for engine in both},
            "terminated": terminated(here, root / "terminated"),
            "not finite": not_finite(here),
            "full disk": {e: full_disk(here, root / f"full, {e}", e, log_every=100) for e in both},
            "full disk for metrics": full_disk(here, root / "full", "ddp", log_every=1),
            "shown": shown(here),
            "aged": aged(here, root / "aged"),
            "on rank 0": asked_of_rank_0(here),
        }
    torch.save(found, root / f"rank{here.rank}.pt")
