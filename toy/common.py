"""What the toy scripts share: their options, seeds and tables."""

import ctypes
import dataclasses
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch

from mfm_ref.files import load_json
from mfm_ref.options import option as option
from mfm_ref.options import parse as parse


@dataclasses.dataclass(frozen=True)
class ToyConfig:
    """Options that every toy script has."""

    out: Path = option(Path("runs"), "folder of the results")
    seed: int = option(0, "of every random number")
    device: str = option("cpu", "where torch computes: cpu, cuda, …")
    fast: bool = option(False, "a run of seconds that only shows that everything works")
    threads: int = option(1, "of torch on a CPU; with small tensors, more of them mostly wait for each other")


def resumable(config: ToyConfig, stage: str) -> dict[str, Any]:
    """Options of `mfm_ref.train` that let a killed stage go on from `out/checkpoints` with the same numbers."""
    return {"folder": config.out / "checkpoints" / stage, "tag": repr(config)}


def remove_checkpoints(config: ToyConfig) -> None:
    """Delete what `resumable` left, once the run's results are written."""
    shutil.rmtree(config.out / "checkpoints", ignore_errors=True)


def set_up_processor(threads: int) -> None:
    """Set torch's threads, and let Linux's allocator keep memory that a step frees, up to 1 GiB, for the next step.

    By default it gives it back to the system, and page faults for it take about a tenth of a step of the toys' network.
    """
    torch.set_num_threads(threads)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        trim_threshold, mmap_threshold = -1, -3  # of glibc's malloc.h
        mallopt(trim_threshold, 2**30)
        mallopt(mmap_threshold, 2**25)


def start(config: ToyConfig) -> float:
    """Set up the processor and the seed of the initial weights; returns the time at the start, in seconds."""
    set_up_processor(config.threads)
    torch.manual_seed(config.seed)
    return time.perf_counter()


def stream_of(config: ToyConfig, stage: int) -> int:
    """The seed of one stage of a run; stages do not depend on each other's numbers."""
    return 1000 * config.seed + stage


def generator(config: ToyConfig, stage: int = 0) -> torch.Generator:
    """The random numbers of one stage of a run."""
    return torch.Generator(config.device).manual_seed(stream_of(config, stage))


def read_result(path: Path, settings: str) -> dict[str, Any] | None:
    """A JSON file of these settings, None where there is none. Raises ValueError for other settings."""
    if not path.exists():
        return None
    found = load_json(path)
    if found.pop("settings", None) != settings:
        raise ValueError(f"{path} belongs to a run with other settings: remove it or write elsewhere (--out)")
    return found


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
