"""Long jobs in parts that stay on disk: killed at any moment, they go on from the parts that are finished.

settings.json            what the parts depend on
shard-00003/NAME.npy     an array of part 3
shard-00003/info.json    shapes, dtypes and checksums of its arrays, and what else was said about it
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from tqdm import tqdm

from mfm_ref.checks import check_count
from mfm_ref.distributed import Process, gather, rank_and_world
from mfm_ref.files import atomic_folder, load_json, save_json

Arrays = dict[str, np.ndarray]
Make = Callable[[range], tuple[Arrays, dict[str, Any]]]

NAME = "shard-[0-9][0-9][0-9][0-9][0-9]"
WAIT = 0.5  # seconds between two looks at what the other processes have finished


def parts_of(n: int, size: int) -> list[range]:
    """0 … n − 1 in ranges of `size`, of which only the last may be shorter. Raises ValueError for counts below one."""
    check_count(n, "n")
    check_count(size, "size")
    return [range(first, min(first + size, n)) for first in range(0, n, size)]


class Shards:
    """A folder of parts, each of them whole or not there. Under torchrun all processes open it together.

    Args:
        folder: made where it is missing.
        settings: what the arrays depend on, as JSON values; they are kept in the folder. None reads a folder that is
            there and changes nothing in it.

    Raises:
        ValueError: the folder holds parts of a run with other settings, with what differs; settings.json is damaged;
            there is none although `settings` is None.
    """

    def __init__(self, folder: Path | str, settings: dict[str, Any] | None = None):
        self.folder = Path(folder)
        self.settings: dict[str, Any] = {}
        path = self.folder / "settings.json"
        if settings is None:
            self.settings = load_json(path)
            return
        self.settings = json.loads(json.dumps(settings, allow_nan=False))  # tuples become lists
        fault = gather(self._start(path) if rank_and_world()[0] == 0 else None)[0]
        if fault:  # in every process: none waits for one that has ended
            raise ValueError(fault)

    def path(self, k: int) -> Path:
        """Where part k lies."""
        return self.folder / f"shard-{k:05d}"

    def done(self, k: int) -> bool:
        """Whether part k is there; if so, it is whole."""
        return self.path(k).exists()

    def write(self, k: int, arrays: Arrays, info: dict[str, Any] | None = None) -> None:
        """Write part k, whole or not at all, in place of one that was there.

        Args:
            k: its number, >= 0 and < 100000.
            arrays: by name; no objects.
            info: JSON values that `info` gives back.
        """
        facts = {}
        with atomic_folder(self.path(k)) as temporary:
            for name, array in arrays.items():
                path = temporary / f"{name}.npy"
                np.save(path, array, allow_pickle=False)
                facts[name] = {"shape": list(array.shape), "dtype": str(array.dtype), "sha256": sha256_of(path)}
            save_json({**(info or {}), "arrays": facts}, temporary / "info.json")

    def read(self, k: int, name: str) -> np.ndarray:
        """An array of part k, mapped into memory: read-only, and read from the disk where it is looked at.

        Raises:
            ValueError: the file is missing, damaged, or another than the one that was written.
        """
        path, facts = self.path(k) / f"{name}.npy", self._facts(k, name)
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except (FileNotFoundError, EOFError, ValueError) as error:
            raise ValueError(
                f"{path} must be an array that can be read; remove {path.parent} to make it anew: {error}"
            ) from error
        if (list(array.shape), str(array.dtype)) != (facts["shape"], facts["dtype"]):
            raise ValueError(
                f"{path} must hold {tuple(facts['shape'])} of {facts['dtype']}, got {array.shape} of {array.dtype}"
            )
        return array

    def info(self, k: int) -> dict[str, Any]:
        """What is known of part k: `arrays`, and what was given to `write`. Raises ValueError if it is damaged."""
        return load_json(self.path(k) / "info.json")

    def verify(self, k: int) -> None:
        """Compare the files of part k with their checksums. Raises ValueError naming a file that differs."""
        for name in self.info(k)["arrays"]:
            path = self.path(k) / f"{name}.npy"
            found, wanted = sha256_of(path) if path.exists() else "no file", self._facts(k, name)["sha256"]
            if found != wanted:
                raise ValueError(f"{path} must have the sha256 {wanted}, got {found}")

    def _facts(self, k: int, name: str) -> dict[str, Any]:
        try:
            return dict(self.info(k)["arrays"][name])
        except (KeyError, TypeError) as error:
            raise ValueError(f"{self.path(k) / 'info.json'} must say what {name} is: {error!r}") from error

    def _start(self, path: Path) -> str:
        """Write the settings, or say in what those that are there differ; clear what a dead process left half done."""
        if not path.exists():
            save_json(self.settings, path)
        try:
            found = load_json(path)
        except ValueError as error:
            return str(error)
        others = [
            f"{key} was {found.get(key)!r} and is {self.settings.get(key)!r}"
            for key in sorted(found.keys() | self.settings.keys())
            if found.get(key) != self.settings.get(key)
        ]
        if others:
            return (
                f"{path} belongs to a run with other settings ({'; '.join(others)}): "
                f"remove {path.parent} or write elsewhere"
            )
        for left in self.folder.glob(f".*.{NAME}"):
            shutil.rmtree(left, ignore_errors=True)
        return ""


def own_parts(shards: Shards, parts: Sequence[range], process: Process) -> list[int]:
    """The numbers of the parts that this process has still to make: k with k % world = rank, in order.

    A last part that was shorter, in a run of fewer rows, is made anew.

    Raises:
        ValueError: a part that is there holds other rows.
    """
    return [
        k
        for k, rows in enumerate(parts)
        if k % process.world == process.rank and not (shards.done(k) and _holds(shards, k, rows))
    ]


def work(shards: Shards, parts: Sequence[range], make: Make, *, process: Process, progress: str | None = None) -> None:
    """Make and write every part that is not there yet; returns, in each process, when those of all processes are.

    Args:
        shards: where they are written.
        parts: the rows of each part, as `parts_of` gives them.
        make: `make(rows) -> (arrays, info)`. For the same rows it must give the same, whatever it gave before. It is
            called for the parts of `own_parts`, in their order; only one part is in memory at a time.
        process: this one among those of the run.
        progress: label of a bar over the rows of all processes, drawn by rank 0; none where None.

    Raises:
        ValueError: a part that is there holds other rows. Whatever `make` raises; the parts before it are on the disk.
    """
    todo, finished = own_parts(shards, parts, process), _rows_done(shards, parts)
    hidden = progress is None or process.rank > 0
    with tqdm(
        total=sum(map(len, parts)), initial=finished, desc=progress, disable=hidden, leave=False, unit="row"
    ) as bar:
        for k in todo:
            _make_part(shards, k, parts[k], make)
            _show(bar, shards, parts)
        if dist.is_available() and dist.is_initialized():
            # Not a barrier of torch: that gives up when one process has much more to do than another.
            while not all(map(shards.done, range(len(parts)))):
                time.sleep(WAIT)
                _show(bar, shards, parts)
            gather(None)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _holds(shards: Shards, k: int, rows: range) -> bool:
    """Whether part k holds these rows; False if it holds the first of them. Raises ValueError for others."""
    found = shards.info(k).get("rows")
    if found == [rows.start, rows.stop]:
        return True
    if isinstance(found, list) and found[0] == rows.start and found[1] < rows.stop:
        return False
    raise ValueError(f"{shards.path(k)} must hold the rows {[rows.start, rows.stop]}, got {found}")


def _make_part(shards: Shards, k: int, rows: range, make: Make) -> None:
    """A function of its own, so that its arrays are gone before the next ones are made."""
    arrays, info = make(rows)
    shards.write(k, arrays, {**info, "rows": [rows.start, rows.stop]})


def _rows_done(shards: Shards, parts: Sequence[range]) -> int:
    return sum(len(rows) for k, rows in enumerate(parts) if shards.done(k))


def _show(bar: "tqdm[Any]", shards: Shards, parts: Sequence[range]) -> None:
    """Move the bar to the number of rows that are finished, in whichever process."""
    if not bar.disable:
        bar.update(_rows_done(shards, parts) - bar.n)
