"""Arrays in npz files as streams: NumPy's own bytes, in constant memory; what is not read is refused."""

import io
import tracemalloc
import zipfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from imagenet import npz
from imagenet.npz import first_rows, open_rows, some_rows, write_npz


@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=5),
    st.lists(st.integers(1, 3), max_size=3),
    st.sampled_from(["uint8", "float32"]),
    st.integers(1, 30),
)
def test_arrays_are_joined_as_numpy_writes_them(tmp_path_factory, lengths, shape, dtype, first):
    path, rng = tmp_path_factory.mktemp("npz") / "joined.npz", np.random.default_rng(0)
    parts = [(100 * rng.random((n, *shape))).astype(dtype) for n in lengths]
    labels = np.arange(sum(lengths))
    write_npz(path, parts, labels)
    expected = io.BytesIO()
    np.savez(expected, arr_0=np.concatenate(parts), arr_1=labels)
    with zipfile.ZipFile(path) as found, zipfile.ZipFile(expected) as wanted:
        assert found.testzip() is None and found.namelist() == wanted.namelist() == ["arr_0.npy", "arr_1.npy"]
        assert all(found.read(name) == wanted.read(name) for name in found.namelist())
        assert {one.date_time for one in found.infolist()} == {(1980, 1, 1, 0, 0, 0)}  # so that bytes can be compared
    assert np.array_equal(first_rows(path, first), np.concatenate(parts)[:first])
    rows = sorted({0, first % len(labels), len(labels) - 1})
    assert np.array_equal(some_rows(path, rows), np.concatenate(parts)[rows])


def test_arrays_are_joined_in_constant_memory(tmp_path):
    """Of 16 parts of 1 MB, mapped from files, one at a time is in memory."""
    np.save(tmp_path / "part.npy", np.arange(2**20, dtype=np.uint8))
    part, labels = np.load(tmp_path / "part.npy", mmap_mode="r"), np.zeros(2**24, np.int8)
    tracemalloc.start()
    write_npz(tmp_path / "joined.npz", [part] * 16, labels)
    first_rows(tmp_path / "joined.npz", 2**20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**22
    assert (tmp_path / "joined.npz").stat().st_size > 2 * 2**24


def test_a_file_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    """What it was made from may be deleted when write_npz returns."""
    flushed = []
    monkeypatch.setattr(npz.os, "fsync", lambda descriptor: flushed.append(not (tmp_path / "a.npz").exists()))
    write_npz(tmp_path / "a.npz", [np.zeros(3)], np.zeros(3))
    assert flushed == [True]


@pytest.mark.parametrize("version", [(1, 0), (2, 0)])
def test_both_versions_of_the_format_are_read(tmp_path, version):
    rows = np.arange(12, dtype=np.float32).reshape(4, 3)
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive, archive.open("arr_0.npy", "w") as file:
        np.lib.format.write_array(file, rows, version=version)
    assert np.array_equal(first_rows(tmp_path / "a.npz", 2), rows[:2])
    with open_rows(tmp_path / "a.npz") as (file, shape, dtype):
        assert (shape, dtype, file.read()) == ((4, 3), np.float32, rows.tobytes())


def test_some_rows_are_read_without_the_others(tmp_path, monkeypatch):
    """What NumPy wrote, too; not what is compressed, where the others have to be."""
    rows = np.arange(10**6, dtype=np.float32).reshape(1000, 1000)
    np.savez(tmp_path / "a.npz", arr_0=rows)
    read, read_of = [], zipfile.ZipExtFile.read
    monkeypatch.setattr(zipfile.ZipExtFile, "read", lambda file, n=-1: read.append(n) or read_of(file, n))
    found = some_rows(tmp_path / "a.npz", [3, 999])
    assert np.array_equal(found, rows[[3, 999]]) and found.flags.writeable and sum(read) < 1000 and min(read) > 0
    np.savez_compressed(tmp_path / "a.npz", arr_0=rows)
    with pytest.raises(ValueError, match="must hold arr_0 without compression"):
        some_rows(tmp_path / "a.npz", [0])


def test_what_is_no_array_of_numbers_by_rows_is_refused(tmp_path):
    for wrong, got in {
        "columns first": (np.asfortranarray(np.zeros((2, 3))), r"float64 \(2, 3\) in Fortran's order"),
        "objects": (np.array([{}, None]), r"object \(2,\)"),
    }.values():
        np.savez(tmp_path / "a.npz", arr_0=wrong)
        with pytest.raises(ValueError, match=rf"arr_0 must be of numbers in C's order, got {got}"):
            first_rows(tmp_path / "a.npz", 1)
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive, archive.open("arr_0.npy", "w") as file:
        np.lib.format.write_array(file, np.zeros(2), version=(3, 0))
    with pytest.raises(ValueError, match=r"must be of version 1 or 2 of NumPy's format, got \(3, 0\)"):
        first_rows(tmp_path / "a.npz", 1)
