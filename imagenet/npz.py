"""Arrays in npz files, read and written as streams: neither the file nor the array is in memory as a whole."""

import math
import os
import struct
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from mfm_ref.files import atomic_path


def write_npz(path: Path, parts: Sequence[np.ndarray], labels: np.ndarray) -> None:
    """What np.savez(path, arr_0=joined parts, arr_1=labels) writes, with one part in memory at a time; always the same.

    The file is on the disk when this returns: the parts may go.

    Args:
        path: of the file.
        parts: arrays `(n_k, *D)` of one dtype, which may be mapped from files.
        labels: `(Σ n_k,)`.
    """
    shape = (sum(map(len, parts)), *parts[0].shape[1:])
    with atomic_path(path) as temporary:
        with zipfile.ZipFile(temporary, "w", allowZip64=True) as archive:
            _write_member(archive, "arr_0.npy", shape, parts)
            _write_member(archive, "arr_1.npy", labels.shape, [labels])
        with temporary.open("rb") as file:
            os.fsync(file.fileno())


def _write_member(archive: zipfile.ZipFile, name: str, shape: tuple[int, ...], parts: Sequence[np.ndarray]) -> None:
    member = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
    with archive.open(member, "w", force_zip64=True) as file:
        header = {"descr": np.lib.format.dtype_to_descr(parts[0].dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for part in parts:
            file.write(np.ascontiguousarray(part).data)


@contextmanager
def open_rows(path: Path) -> Iterator[tuple[IO[bytes], tuple[int, ...], "np.dtype[Any]"]]:
    """arr_0 of an npz file: a stream that is at its first number, its shape and its dtype.

    Raises:
        ValueError: arr_0 is of another version than 1 or 2 of NumPy's format, in Fortran's order, or of objects.
        Exception: OSError, EOFError, KeyError, zipfile.BadZipFile or zlib.error for a file that is missing, damaged or
            no npz with an arr_0; also while it is read.
    """
    with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
        version = np.lib.format.read_magic(file)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"arr_0 must be of version 1 or 2 of NumPy's format, got {version}")
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(file)
        if fortran or dtype.hasobject:
            order = " in Fortran's order" if fortran else ""
            raise ValueError(f"arr_0 must be of numbers in C's order, got {dtype} {shape}{order}")
        yield file, shape, dtype


def first_rows(path: Path, n: int) -> np.ndarray:
    """The first n rows of arr_0, or all of fewer, without reading the others. Raises as `open_rows` does."""
    with open_rows(path) as (file, shape, dtype):
        shape = (min(n, shape[0]), *shape[1:])
        return np.frombuffer(bytearray(file.read(math.prod(shape) * dtype.itemsize)), dtype).reshape(shape)


def some_rows(path: Path, rows: Sequence[int]) -> np.ndarray:
    """Some rows of arr_0, `(len, *D)`, without reading the others. Raises as `mapped_rows` does."""
    return np.array(mapped_rows(path)[list(rows)])


def mapped_rows(path: Path) -> "np.memmap[Any, np.dtype[Any]]":
    """arr_0, mapped into memory: read where it is looked at. A stream of a zip file reads all that comes before.

    Raises:
        ValueError: arr_0 is compressed, which `write_npz` does not do.
        Exception: as from `open_rows`.
    """
    with open_rows(path) as (file, shape, dtype):
        header = file.tell()
    with zipfile.ZipFile(path) as archive:
        member = archive.getinfo("arr_0.npy")
    if member.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{path} must hold arr_0 without compression")
    with path.open("rb") as plain:
        plain.seek(member.header_offset)
        *_, name, extra = struct.unpack("<26x2H", plain.read(30))  # lengths of what follows before the member itself
    return np.memmap(path, dtype, "r", member.header_offset + 30 + name + extra + header, shape)
