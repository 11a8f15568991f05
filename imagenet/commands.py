"""What the command lines of this rung share, with a network or without one."""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@contextmanager
def refusing(program: str) -> Iterator[None]:
    """What is wrong with options or files ends the program with the message alone."""
    try:
        yield
    except (ValueError, ImportError, OSError) as error:
        raise SystemExit(f"{program}: {' '.join(str(error).split())}") from error


def numbers(text: str, name: str, kind: Callable[[str], Any]) -> list[Any]:
    """Numbers separated by commas. Raises ValueError for anything else, for none, and for one that is there twice."""
    try:
        found = [kind(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or len(set(found)) < len(found):
        raise ValueError(f"--{name} must be different numbers, separated by commas, got {text!r}")
    return found


def check_device(device: str) -> None:
    """Raise ValueError for a device that torch does not have; a GPU is not touched, which other processes may own.

    Under torchrun, the GPU is the one of this process, as in `mfm_ref.distributed.processes`.
    """
    try:
        place = torch.device(device)
        shared = int(os.environ.get("WORLD_SIZE", "1")) > 1
        index = int(os.environ["LOCAL_RANK"]) if shared else place.index or 0
        if place.type == "cuda" and index >= torch.cuda.device_count():
            raise RuntimeError(f"there are {torch.cuda.device_count()} GPUs, and none of number {index}")
        if place.type != "cuda":
            torch.empty(1, device=place)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device must be one that this torch computes on, got {device!r}: {reason}") from error


def device_name(device: str) -> str:
    """What the run computes on."""
    return torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else device


def in_precision(precision: str, device: torch.device | str) -> AbstractContextManager[Any]:
    """Matrix products in one of `PRECISIONS`, by autocast."""
    dtype = PRECISIONS[precision]
    return torch.autocast(torch.device(device).type, dtype, enabled=dtype != torch.float32)
