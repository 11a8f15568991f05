"""One process or many: `torchrun --nproc-per-node N script.py` starts them, `processes` makes them a group."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Result = TypeVar("Result")
PATIENCE = timedelta(hours=1)  # others wait while rank 0 writes, or draws samples


class Process(NamedTuple):
    """This process among those of the run."""

    rank: int  # 0 … world − 1; 0 writes the files
    world: int  # number of processes
    device: torch.device  # where this one computes


@contextmanager
def processes(device: str = "cpu") -> Iterator[Process]:
    """The group of the processes that torchrun started (nccl on cuda, gloo elsewhere); without torchrun, this one.

    Within a group it is that one, and lives on.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield Process(0, 1, torch.device(device))
        return
    place = torch.device(device)
    if place.type == "cuda":
        place = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(place)
    own = not grouped()
    if own:
        dist.init_process_group("nccl" if place.type == "cuda" else "gloo", timeout=PATIENCE)
    try:
        yield Process(dist.get_rank(), world, place)
    finally:
        if own:
            dist.destroy_process_group()


def rank_and_world() -> tuple[int, int]:
    """(rank, number of processes) of the group, (0, 1) without one.

    Raises:
        ValueError: under torchrun without a group: each process would be a run of its own, in the same folder.
    """
    if grouped():
        return dist.get_rank(), dist.get_world_size()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            f"torchrun started {os.environ['WORLD_SIZE']} processes, which must form a group first: "
            "with mfm_ref.distributed.processes(device): ..."
        )
    return 0, 1


def grouped() -> bool:
    """Whether this process is in a group, be it alone there."""
    return dist.is_available() and dist.is_initialized()


def mean_over_processes(x: Tensor) -> Tensor:
    """The mean of a tensor over all processes, the same in each."""
    if rank_and_world()[1] > 1:
        dist.all_reduce(x)
        x = x / dist.get_world_size()
    return x


def gather(item: Any) -> list[Any]:
    """The item of every process, in the order of their ranks, in every process."""
    items: list[Any] = [item]
    if rank_and_world()[1] > 1:
        items = [None] * dist.get_world_size()
        dist.all_gather_object(items, item)
    return items


KINDS = {kind.__name__: kind for kind in (OSError, ValueError, RuntimeError)}


def kind_of(error: Exception) -> type[Exception]:
    """What the others raise, of `KINDS`: the last where none fits."""
    return next(kind for kind in KINDS.values() if isinstance(error, kind) or kind is RuntimeError)


def on_rank_0(act: Callable[[], Result]) -> Result | None:
    """What `act` returns in rank 0, None elsewhere. If it fails, it fails in all: none waits for one that is gone.

    Raises:
        OSError, ValueError: in the others, where rank 0 raised one; RuntimeError where it raised any other Exception.
    """
    rank, world = rank_and_world()
    if world == 1:
        return act()
    result, error = None, None
    if rank == 0:
        try:
            result = act()
        except Exception as raised:
            error = raised
    told: list[Any] = [None if error is None else (kind_of(error).__name__, f"in rank 0: {error}")]
    dist.broadcast_object_list(told, 0)
    if error is not None:
        raise error
    if told[0] is not None:
        name, text = told[0]
        raise KINDS[name](text)
    return result
