"""What the toy scripts share: a command line made from a dataclass, and its options."""

import argparse
import dataclasses
import time
from pathlib import Path
from typing import Any, TypeVar

import torch

Config = TypeVar("Config", bound="ToyConfig")


@dataclasses.dataclass(frozen=True)
class ToyConfig:
    """Options that every toy script has."""

    out: Path = Path("runs")  # folder of the results
    seed: int = 0  # of every random number
    device: str = "cpu"  # where torch computes: cpu, cuda, …
    fast: bool = False  # a run of seconds that only shows that everything works
    threads: int = 1  # of torch on a CPU; with small tensors, more of them mostly wait for each other


def parse(config: type[Config], description: str, arguments: list[str] | None = None) -> Config:
    """A config from the command line: one option `--name` a field, a flag for a bool."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for field in dataclasses.fields(config):
        name, kind = "--" + field.name.replace("_", "-"), type(field.default)
        if kind is bool:
            parser.add_argument(name, action="store_true", help=" ")
        else:
            parser.add_argument(name, type=kind, default=field.default, help=" ")
    return config(**vars(parser.parse_args(arguments)))


def resumable(config: ToyConfig, stage: str, rng: torch.Generator) -> dict[str, Any]:
    """Options of `mfm_ref.train` that let a killed stage go on from `out/stage.pt` with the same numbers."""
    return {"generator": rng, "checkpoint": config.out / f"{stage}.pt", "tag": repr(config)}


def remove_checkpoints(config: ToyConfig) -> None:
    """Delete what `resumable` left, once the run's results are written."""
    for path in config.out.glob("*.pt"):
        path.unlink()


def start(config: ToyConfig) -> float:
    """Set the threads and the seed of the initial weights; returns the time at the start, in seconds."""
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    return time.perf_counter()


def generator(config: ToyConfig, stream: int = 0) -> torch.Generator:
    """The random numbers of one stage of a run, `stream`; stages do not depend on each other's."""
    return torch.Generator(config.device).manual_seed(1000 * config.seed + stream)
