"""Long jobs in parts that stay on disk: killed at any moment, they go on from the parts that are finished.

A folder is of one run at a time: a second one that is started in it meanwhile clears what the first is writing.

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
        settings: what the arrays and the rows of each part depend on, as JSON values; they are kept in the folder.
            None reads a folder that is there and changes nothing in it.

    Attributes:
        advance: called with a number of rows inside a part's `make`, it moves the bar of `work`.

    Raises:
        ValueError: the folder holds parts of a run with other settings, with what differs, or no run but other things;
            settings.json is damaged or cannot be written; there is none although `settings` is None.
    """

    def __init__(self, folder: Path | str, settings: dict[str, Any] | None = None):
        self.folder = Path(folder)
        self.settings: dict[str, Any] = {}
        self.advance: Callable[[int], Any] = lambda rows: None
        self._old: dict[int, int | None] = {}  # the times of parts to be made anew
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
        """Whether part k is there, and not one to be made anew; if so, it is whole."""
        return self._time(k) not in (None, self._old.get(k))

    def renew(self, numbers: Sequence[int]) -> None:
        """Count these parts as not done until they are written again; they stay until then.

        Under torchrun all processes call it together, each with the parts that it found.
        """
        for times in gather({k: self._time(k) for k in numbers}):
            self._old |= times

    def _time(self, k: int) -> int | None:
        try:
            return self.path(k).stat().st_mtime_ns
        except FileNotFoundError:
            return None

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
            raise ValueError(f"{path} must be an array that can be read: {error}; {self._repair(k)}") from error
        if (list(array.shape), str(array.dtype)) != (facts["shape"], facts["dtype"]):
            raise ValueError(
                f"{path} must hold {tuple(facts['shape'])} of {facts['dtype']}, got {array.shape} of {array.dtype}; "
                + self._repair(k)
            )
        return array

    def info(self, k: int) -> dict[str, Any]:
        """What is known of part k: `arrays`, and what was given to `write`. Raises ValueError if it is damaged."""
        try:
            return load_json(self.path(k) / "info.json")
        except ValueError as error:
            raise ValueError(f"{error}; {self._repair(k)}") from error

    def verify(self, k: int) -> None:
        """Compare the files of part k with their checksums. Raises ValueError naming a file that differs."""
        for name in self.info(k)["arrays"]:
            path = self.path(k) / f"{name}.npy"
            found, wanted = sha256_of(path) if path.exists() else "no file", self._facts(k, name)["sha256"]
            if found != wanted:
                raise ValueError(f"{path} must have the sha256 {wanted}, got {found}; {self._repair(k)}")

    def _facts(self, k: int, name: str) -> dict[str, Any]:
        try:
            return dict(self.info(k)["arrays"][name])
        except (KeyError, TypeError) as error:
            raise ValueError(f"{self.path(k) / 'info.json'} must say what {name} is: {error!r}") from error

    def _repair(self, k: int) -> str:
        return f"remove {self.path(k)} and run again to make it anew"

    def _start(self, path: Path) -> str:
        """Write the settings, or say what stands against it; clear what a dead process left half done."""
        try:
            if not path.exists():
                others = [other.name for other in self.folder.glob("[!.]*")]  # save_json's own leftovers have a dot
                if others:
                    what = f"found {min(others)} and no {path.name}"
                    return f"{self.folder} must be a new folder or one of this run, {what}"
                save_json(self.settings, path)
            found = load_json(path)
        except OSError as error:
            return f"{self.folder} must be a folder that can be written: {error}"
        except ValueError as error:
            return str(error)
        what = differences(found, self.settings)
        if what:
            return f"{path} belongs to a run with other settings ({what}): remove {path.parent} or write elsewhere"
        for left in self.folder.glob(f".*.{NAME}"):
            shutil.rmtree(left, ignore_errors=True)
        return ""


def differences(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    """In what two settings differ, empty where in nothing: "seed was 3 and is 4; …"."""
    return "; ".join(
        f"{key} was {found.get(key)!r} and is {wanted.get(key)!r}"
        for key in sorted(found.keys() | wanted.keys())
        if found.get(key) != wanted.get(key)
    )


def own_parts(shards: Shards, parts: Sequence[range], process: Process) -> list[int]:
    """The numbers of the parts that this process has still to make: k with k % world = rank, in order."""
    return [k for k in range(process.rank, len(parts), process.world) if not shards.done(k)]


def work(shards: Shards, parts: Sequence[range], make: Make, *, process: Process, progress: str | None = None) -> None:
    """Make and write every part that is not done; returns, in each process, when those of all processes are.

    Args:
        shards: where they are written.
        parts: the rows of each part, as `parts_of` gives them.
        make: `make(rows) -> (arrays, info)`. For the same rows it must give the same, whatever it gave before. It is
            called for the parts of `own_parts`, in their order; only one part is in memory at a time.
        process: this one among those of the run.
        progress: label of a bar over the rows of all processes, drawn by rank 0; none where None.

    Raises:
        Exception: whatever `make` raises; the parts before it are on the disk.
    """
    todo, finished = own_parts(shards, parts, process), _rows_done(shards, parts)
    hidden = progress is None or process.rank > 0
    with tqdm(
        total=sum(map(len, parts)), initial=finished, desc=progress, disable=hidden, leave=False, unit="row"
    ) as bar:
        shards.advance = bar.update
        for k in todo:
            shards.write(k, *make(parts[k]))  # without a name, the arrays are gone before the next ones are made
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


def _rows_done(shards: Shards, parts: Sequence[range]) -> int:
    return sum(len(rows) for k, rows in enumerate(parts) if shards.done(k))


def _show(bar: "tqdm[Any]", shards: Shards, parts: Sequence[range]) -> None:
    """Move the bar to the number of rows that are finished, in whichever process."""
    if not bar.disable:
        bar.update(_rows_done(shards, parts) - bar.n)
