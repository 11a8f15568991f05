"""What test_distributed.py has torchrun start: each process trains in several ways and writes what it found.

torchrun --nproc-per-node 2 -m tests.joined_run FOLDER
"""

import math
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import jvp

from mfm_ref import MLP, FlowMap, TensorBatches, TrainConfig, train
from mfm_ref.distributed import Process, gather, processes

STEPS = 8
ROWS = 48  # whole epochs of 8 as of 16


def model(seed: int) -> FlowMap:
    """Random weights in float64, and a mean and a covariance, others in each process."""
    torch.manual_seed(seed)
    mean = torch.full((2,), float(seed)).double()
    X = FlowMap(MLP(mean, (1.0 + seed) * torch.eye(2).double(), hidden=8, depth=2))
    nn.init.normal_(X.network.outlet.weight)
    return X


def batches(process: Process, batch: int) -> TensorBatches:
    """Rows of contexts, states and internal times."""
    rng = torch.Generator().manual_seed(0)
    x, z = torch.randn(2, ROWS, 2, generator=rng, dtype=torch.float64)
    s, t = 0.9 * torch.rand(2, ROWS, generator=rng, dtype=torch.float64)
    return TensorBatches(x, z, s, t, batch=batch, seed=2, rank=process.rank, world=process.world)


def loss(X: FlowMap, batch: tuple[Tensor, ...], rng: torch.Generator | None) -> dict[str, Tensor]:
    """Two terms that call the map's own methods: one with a derivative for its target, made without a graph."""
    x, z, s, t = batch
    with torch.no_grad():
        target = jvp(lambda u: X(s, u, z, t, x), (s + 0.1,), (torch.ones_like(s),))[1]
    return {
        "derivative": (X(s, s, z, t, x) - target).square().mean(),
        "diagonal": X.velocity(s, s, z, t, x).sin().mean(),
    }


def weights(X: nn.Module) -> Tensor:
    """All parameters and buffers in one tensor."""
    return torch.cat([tensor.detach().flatten() for tensor in X.state_dict().values()])


def trained(
    process: Process,
    *,
    batch: int = 4,
    objective: Callable[..., Any] = loss,
    folder: Path | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """The end of one run."""
    X = model(process.rank)
    options = {"steps": STEPS, "lr": 0.05, "warmup": 2, "decay": 0.5, "checkpoint_every": 3, "log_every": 1}
    average, history = train(X, objective, batches(process, batch), TrainConfig(**(options | settings)), folder=folder)
    return {"model": weights(X), "average": weights(average), "history": history}


def noise(process: Process) -> list[float]:
    """What each process draws in its loss."""
    drawn: list[float] = []

    def noisy(X: FlowMap, batch: tuple[Tensor, ...], rng: torch.Generator | None) -> Tensor:
        drawn.extend((float(torch.rand((), generator=rng)), float(torch.rand(()))))
        return weights_with_graph(X).square().mean()

    trained(process, objective=noisy)
    return drawn


def weights_with_graph(X: nn.Module) -> Tensor:
    """All parameters in one tensor, to be differentiated."""
    return torch.cat([parameter.flatten() for parameter in X.parameters()])


def broken(process: Process, rank: int, act: Callable[[], float]) -> Callable[..., Any]:
    """The loss, with something that happens in one process at its fifth call, and a factor that it returns."""
    calls = [0]

    def broken_loss(X: FlowMap, batch: tuple[Tensor, ...], rng: torch.Generator | None) -> dict[str, Tensor]:
        calls[0] += 1
        factor = act() if (calls[0], process.rank) == (5, rank) else 1.0
        return {name: factor * term for name, term in loss(X, batch, rng).items()}

    return broken_loss


def stopped(process: Process, folder: Path) -> dict[str, Any]:
    """SIGTERM to the second process alone, then the same run again."""

    def terminate() -> float:
        os.kill(os.getpid(), signal.SIGTERM)
        return 1.0

    try:
        trained(process, objective=broken(process, 1, terminate), folder=folder)
        code: Any = "none"
    except SystemExit as exit:
        code = exit.code
    gather(None)  # rank 0 has written
    checkpoints = sorted(path.name for path in folder.glob("step-*"))
    return {"code": code, "checkpoints": checkpoints, "resumed": trained(process, folder=folder)}


def failed(process: Process) -> str:
    """NaN in the loss of the first process alone; the message of the error."""
    try:
        trained(process, objective=broken(process, 0, lambda: math.nan))
    except ValueError as error:
        return str(error)
    return "none"


if __name__ == "__main__":
    root = Path(sys.argv[1])
    torch.set_num_threads(1)
    with processes() as here:
        found = {
            "plain": trained(here),
            "accumulated": trained(here, accumulate=2, folder=root / "accumulated"),
            "compiled": trained(here, compile="aot_eager"),
            "noise": noise(here),
            "stopped": stopped(here, root / "stopped"),
            "failed": failed(here),
        }
    torch.save(found, root / f"rank{here.rank}.pt")
