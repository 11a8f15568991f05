"""Long sampling in batches that stay on disk: interrupted at any moment, it goes on from those that it finished.

batch-00003.safetensors  the samples of one batch; what they cost, and which run they belong to, in its metadata
"""

import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from mfm_ref.checks import check_count, check_finite
from mfm_ref.cost import Cost
from mfm_ref.data import COLLECTED, stream_seed
from mfm_ref.files import save_tensors

FORMAT = "mfm_ref samples 1"

Draw = Callable[[range, torch.Generator], Tensor | tuple[Tensor, Cost]]
Part = tuple[Tensor, Cost]  # of one batch


def collect(
    draw: Draw,
    n_samples: int,
    batch: int,
    *,
    folder: Path | str | None = None,
    seed: int = 0,
    tag: str = "",
    device: torch.device | str = "cpu",
    progress: str | None = None,
) -> tuple[Tensor, Cost]:
    """`n_samples` samples, batch by batch, as `collect(lambda rows, rng: sample(X, len(rows), 4, generator=rng), …)`.

    Each batch has a generator of its own, so the samples are the same wherever the run was interrupted.

    Args:
        draw: `draw(rows, generator)` gives the samples number `rows`, a range: `(len(rows), *D)`, alone or with their
            `Cost`. It takes its labels, for example, as y[rows.start : rows.stop]. All of its randomness comes from the
            generator.
        n_samples: how many, >= 1. It may grow from one call to the next; a last batch that was smaller is drawn anew.
        batch: size of a batch, >= 1; only the last may be smaller.
        folder: of the files; None to write nothing. Batches that it holds are read, not drawn.
        seed: of the generators, >= 0.
        tag: says which run the files belong to, beyond batch, seed and device: the map, the reward, the settings.
        device: of the generators.
        progress: label of a progress bar over the batches; none where None.

    Returns:
        samples `(n_samples, *D)`, on the CPU, and what they cost together, those that were read included.

    Raises:
        ValueError: numbers out of range; a draw of another size, or with NaN; a file that is damaged, holds other
            samples or belongs to a run with other settings, with its name. Whatever `draw` raises.
        OSError: a batch could not be written; those before it are on the disk.
    """
    for name, number, least in (("n_samples", n_samples, 1), ("batch", batch, 1), ("seed", seed, 0)):
        check_count(number, name, least)
    device = torch.device(device)
    run = {"tag": tag, "batch": batch, "seed": seed, "device": device.type}
    jobs = [range(first, min(first + batch, n_samples)) for first in range(0, n_samples, batch)]
    store = None if folder is None else _Batches(Path(folder), run)
    parts = {} if store is None else store.read(jobs)  # all of them before any is drawn
    for k, rows in enumerate(tqdm(jobs, desc=progress, disable=progress is None, leave=False)):
        if k not in parts:
            generator = torch.Generator(device).manual_seed(stream_seed(seed, k, COLLECTED))
            part = _drawn(draw, rows, generator)
            _check_alike(f"batch {k}, drawn now,", part, parts)
            if store is not None:
                store.write(k, *part)
            parts[k] = part
    samples, costs = zip(*(parts[k] for k in range(len(jobs))), strict=True)
    return torch.cat(samples), reduce(add, costs)


def _drawn(draw: Draw, rows: range, generator: torch.Generator) -> Part:
    began = time.perf_counter()
    result = draw(rows, generator)
    samples, cost = result if isinstance(result, tuple) else (result, Cost(len(rows)))
    if not isinstance(samples, Tensor) or samples.shape[:1] != (len(rows),):
        got = f"shape {tuple(samples.shape)}" if isinstance(samples, Tensor) else type(samples).__name__
        raise ValueError(f"draw must return {len(rows)} samples for {rows}, got {got}")
    check_finite(samples, f"the samples of {rows}")
    samples = samples.detach().cpu().contiguous()
    if not isinstance(result, tuple):
        cost.seconds = time.perf_counter() - began
    return samples, cost


def _check_alike(name: str, part: Part, parts: dict[int, Part]) -> None:
    """Refuse a batch whose samples have another shape or dtype than the others'."""
    here, there = ((tuple(a.shape[1:]), a.dtype) for a, _ in (part, next(iter(parts.values()), part)))
    if here != there:
        raise ValueError(
            f"samples of one run must be alike: {name} has {here[0]} of {here[1]}, the others {there[0]} of {there[1]}"
        )


@dataclasses.dataclass(frozen=True)
class _Batches:
    """The files of one run: JSON values that say which run it is."""

    folder: Path
    run: dict[str, Any]

    def path(self, k: int) -> Path:
        """Where batch k lies."""
        return self.folder / f"batch-{k:05d}.safetensors"

    def write(self, k: int, samples: Tensor, cost: Cost) -> None:
        """Write batch k, whole or not at all."""
        content = {"format": FORMAT, "run": self.run, "batch": k, "rows": len(samples), "cost": cost.__dict__}
        try:
            save_tensors({"samples": samples}, self.path(k), {"mfm_ref": json.dumps(content)})
        except (OSError, SafetensorError) as error:  # safetensors hides the OSError
            raise OSError(f"{self.path(k)} could not be written; the batches before it are: {error}") from error

    def read(self, jobs: list[range]) -> dict[int, Part]:
        """The batches on the disk, but not one smaller than wanted; clears what dead processes left half written."""
        parts: dict[int, Part] = {}
        for k, rows in enumerate(jobs):
            if self.path(k).exists():
                part = self._read(k)
                _check_alike(str(self.path(k)), part, parts)
                if len(part[0]) > len(rows):
                    raise ValueError(
                        f"{self.path(k)} must hold at most {len(rows)} samples, got {len(part[0])}: "
                        "n_samples may grow, not fall"
                    )
                if len(part[0]) == len(rows):
                    parts[k] = part
        for left in self.folder.glob(".*.batch-*.safetensors"):
            if not _alive(left.name.split(".")[1]):
                left.unlink(missing_ok=True)
        return parts

    def _read(self, k: int) -> Part:
        path = self.path(k)
        try:
            with safe_open(path, "pt") as file:
                content = json.loads(file.metadata()["mfm_ref"])
                samples, cost = file.get_tensor("samples"), Cost(**content["cost"])
                found = {name: content[name] for name in ("format", "batch", "rows")}
                run = dict(content["run"])
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path} must be a batch of samples that can be read; remove it to draw it anew "
                f"({type(error).__name__}: {error})"
            ) from error
        wanted = {"format": FORMAT, "batch": k, "rows": len(samples)}
        for what, there, here in (("holds another batch", found, wanted), ("belongs to another run", run, self.run)):
            differing = [f"{n} = {there.get(n)!r} there, {here[n]!r} here" for n in here if there.get(n) != here[n]]
            if differing:
                raise ValueError(f"{path} {what}; remove it or write elsewhere: {'; '.join(differing)}")
        return samples, cost


def _alive(process: str) -> bool:
    """Whether a process of this number is running, here; on Windows, where a signal of 0 ends it, taken for granted."""
    if sys.platform == "win32":
        return True
    try:
        os.kill(int(process), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:  # it is someone else's
        return True
    return True
