"""Files on disk: every one is written under a temporary name and then renamed, so none is ever half there."""

import ctypes
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, renamed to it when the block ends well and removed when it does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path`, put in its place when the block ends well, else removed.

    What the block wrote is on the disk, not only in its cache, before it gets its name. A folder that was there
    changes places with the new one, and is deleted last. Where the system cannot do that in one step, the old one is
    moved aside first: a process that dies between the two renames leaves it as .PID.old.NAME.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    old = _aside(path)
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        yield temporary
        for part in (*temporary.rglob("*"), temporary):
            _flush(part)
        if not (path.exists() and _exchange(temporary, path)):
            if path.exists():
                shutil.rmtree(old, ignore_errors=True)  # of a dead process with the same number
                os.rename(path, old)
            os.rename(temporary, path)
        _flush(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def remove_folder(path: Path) -> None:
    """Delete a folder, if it is there; a process that dies meanwhile leaves nothing half empty under its name."""
    if path.exists():
        old = _aside(path)
        shutil.rmtree(old, ignore_errors=True)
        os.rename(path, old)
        shutil.rmtree(old, ignore_errors=True)


def _aside(path: Path) -> Path:
    return path.with_name(f".{os.getpid()}.old.{path.name}")


def _exchange(a: Path, b: Path) -> bool:
    """Give each of two paths the other's name, in one step; False where the system or the disk cannot."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    if renameat2 is None:
        return False
    here, exchange = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of linux/fcntl.h and linux/fs.h
    return bool(renameat2(here, os.fsencode(a), here, os.fsencode(b), exchange) == 0)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_json(content: dict[str, Any], path: Path) -> None:
    """Write a dictionary as indented JSON; NaN and infinity are refused with ValueError."""
    text = json.dumps(content, indent=2, allow_nan=False)
    with atomic_path(path) as temporary:
        temporary.write_text(text + "\n")


def load_json(path: Path) -> dict[str, Any]:
    """Read a dictionary; a file that is missing, truncated or no dictionary raises ValueError."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} must be a readable JSON file: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content


def save_tensors(tensors: dict[str, Tensor], path: Path, notes: dict[str, str] | None = None) -> None:
    """Write tensors as safetensors, with notes in its metadata; as readable to others as any new file is."""
    with atomic_path(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode
        save_file(tensors, temporary, notes)  # of a file of its own, which only its owner may read
        temporary.chmod(mode)


def save_weights(model: nn.Module, path: Path) -> None:
    """Write a model's state dict as safetensors; tensors that share memory are written one by one."""
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict().items():
        flat = tensor.detach().cpu().contiguous()
        memory = flat.untyped_storage().data_ptr()
        tensors[name] = flat.clone() if memory in seen else flat
        seen.add(memory)
    save_tensors(tensors, path)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read safetensors; a file that is missing, truncated or of another kind raises ValueError."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} must be a readable safetensors file: {error}") from error


def fill_weights(model: nn.Module, tensors: dict[str, Tensor], source: Path) -> None:
    """Copy tensors read from `source` into a model, all or nothing.

    Raises:
        ValueError: names that the model lacks or that are missing, another shape or another dtype.
    """
    wanted = model.state_dict()
    faults = [f"{name} is missing" for name in wanted if name not in tensors]
    faults += [f"{name} is not in the model" for name in tensors if name not in wanted]
    for name in wanted.keys() & tensors.keys():
        there, here = ((tuple(t.shape), t.dtype) for t in (tensors[name], wanted[name]))
        if there != here:
            faults.append(f"{name} is {there[0]} of {there[1]}, but {here[0]} of {here[1]} in the model")
    if faults:
        more = f" and {len(faults) - 4} more" if len(faults) > 4 else ""
        raise ValueError(f"{source} must fit the model: {'; '.join(sorted(faults)[:4])}{more}")
    model.load_state_dict(tensors)
