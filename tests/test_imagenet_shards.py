"""Parts of a long job on disk: whole or not there, of one run alone, and shared out among processes."""

import json
import os
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from imagenet import shards as shards_module
from imagenet.shards import Shards, differences, own_parts, parts_of, sha256_of, work
from mfm_ref.distributed import Process

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
ALONE = Process(0, 1, CPU)
SETTINGS = {"seed": 3, "times": (0.1, 0.5), "kind": "mfm"}


class KilledError(Exception):
    """Stands for the end of the process."""


def make(rows):
    """Arrays that show their rows."""
    number = np.arange(rows.start, rows.stop)
    return {"squares": number**2, "halves": (number / 2).astype(np.float16)}, {"first": rows.start}


def contents(folder):
    """Every file and its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def started(folder, n=23, size=5):
    shards, parts = Shards(folder, SETTINGS), parts_of(n, size)
    work(shards, parts, make, process=ALONE)
    return shards, parts


# ---- parts -----------------------------------------------------------------------------------------------


@given(n=st.integers(1, 200), size=st.integers(1, 60))
def test_parts_are_all_rows_in_order(n, size):
    parts = parts_of(n, size)
    assert [row for rows in parts for row in rows] == list(range(n))
    assert all(len(rows) == size for rows in parts[:-1]) and 1 <= len(parts[-1]) <= size


@pytest.mark.parametrize(("n", "size", "name"), [(0, 3, "n"), (5, 0, "size"), (5, -1, "size")])
def test_counts_below_one_are_refused(n, size, name):
    with pytest.raises(ValueError, match=f"{name} must be an integer >= 1"):
        parts_of(n, size)


# ---- a part ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("array", [
    np.arange(12, dtype=np.int64).reshape(3, 4), np.array([[0.5, -2]], np.float16), np.zeros((0, 2, 3), np.float32),
    np.arange(24, dtype=np.uint8).reshape(2, 3, 4).transpose(2, 0, 1), np.array(2.5),
])  # fmt: skip
def test_what_is_read_is_what_was_written(tmp_path, array):
    shards = Shards(tmp_path, {})
    assert not shards.done(7)
    shards.write(7, {"a": array, "b": 2 * array}, {"skipped": [{"file": "x"}]})
    again = Shards(tmp_path)
    assert again.done(7) and not again.done(6)
    found = again.read(7, "b")
    assert found.dtype == array.dtype and np.array_equal(found, 2 * array)
    assert again.info(7)["skipped"] == [{"file": "x"}]
    again.verify(7)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["settings.json", "shard-00007"]


def test_arrays_are_mapped_and_cannot_be_changed(tmp_path):
    found = started(tmp_path)[0].read(0, "squares")
    assert isinstance(found, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        found[0] = 1


def test_a_part_takes_the_place_of_another(tmp_path):
    shards, _ = started(tmp_path)
    shards.write(0, {"other": np.ones(2)})
    assert shards.info(0)["arrays"].keys() == {"other"}
    assert [path.name for path in (tmp_path / "shard-00000").glob("*.npy")] == ["other.npy"]


@pytest.mark.parametrize("harm", ["truncated", "header only", "emptied", "overwritten", "missing", "objects"])
def test_a_damaged_array_is_refused_with_its_name(tmp_path, harm):
    shards, _ = started(tmp_path)
    path = tmp_path / "shard-00001" / "squares.npy"
    content = path.read_bytes()
    path.unlink()
    left = {"truncated": content[:-3], "header only": content[:40], "emptied": b"", "overwritten": b"\0" * len(content)}
    if harm == "objects":
        np.save(path, np.array([{}] * 5), allow_pickle=True)
    elif harm != "missing":
        path.write_bytes(left[harm])
    with pytest.raises(
        ValueError, match=r"shard-00001/squares.npy must be an array that can be read: .*; remove .*00001 and run"
    ):
        shards.read(1, "squares")
    with pytest.raises(ValueError, match=r"shard-00001/squares.npy must have the sha256"):
        shards.verify(1)


def test_another_array_is_refused(tmp_path):
    shards, _ = started(tmp_path)
    np.save(tmp_path / "shard-00001" / "squares.npy", np.zeros(4))
    with pytest.raises(ValueError, match=r"squares.npy must hold \(5,\) of int64, got \(4,\) of float64"):
        shards.read(1, "squares")
    with pytest.raises(ValueError, match=r"info.json must say what cubes is: KeyError"):
        shards.read(1, "cubes")
    path = tmp_path / "shard-00001" / "info.json"
    path.write_text("{")
    for _ in range(2):  # damaged, then missing
        with pytest.raises(
            ValueError, match=r"info.json must be a readable JSON file: .*; remove .*shard-00001 and run"
        ):
            shards.read(1, "squares")
        path.unlink(missing_ok=True)


def test_a_changed_value_shows_in_the_checksum(tmp_path):
    """Which `read` does not compute: it would have to read all of the file."""
    shards, _ = started(tmp_path)
    path = tmp_path / "shard-00002" / "halves.npy"
    assert sha256_of(path) == shards.info(2)["arrays"]["halves"]["sha256"]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    shards.read(2, "halves")
    shards.verify(1)
    with pytest.raises(ValueError, match=r"shard-00002/halves.npy must have the sha256 \w{64}, got \w{64}"):
        shards.verify(2)


def test_objects_and_nan_are_not_written(tmp_path):
    shards = Shards(tmp_path, {})
    with pytest.raises(ValueError, match="Object arrays cannot be saved"):
        shards.write(0, {"a": np.array([{}])})
    with pytest.raises(ValueError, match="not JSON compliant"):
        shards.write(0, {"a": np.zeros(1)}, {"loss": float("nan")})
    assert not shards.done(0)
    assert [path.name for path in tmp_path.iterdir()] == ["settings.json"]


# ---- the folder ------------------------------------------------------------------------------------------


def test_settings_are_kept_and_others_refused(tmp_path):
    started(tmp_path)
    before = contents(tmp_path)
    assert Shards(tmp_path, SETTINGS).settings == {"seed": 3, "times": [0.1, 0.5], "kind": "mfm"}
    assert Shards(str(tmp_path)).settings == json.loads(json.dumps(SETTINGS))
    others = SETTINGS | {"seed": 4, "n": 2}
    del others["kind"]
    with pytest.raises(
        ValueError, match=r"other settings \(kind was 'mfm' and is None; n was None and is 2; seed was 3 and is 4\)"
    ):
        Shards(tmp_path, others)
    assert contents(tmp_path) == before
    assert differences(SETTINGS, SETTINGS | {"seed": 4}) == "seed was 3 and is 4"
    assert differences(SETTINGS, dict(SETTINGS)) == ""


@pytest.mark.parametrize("name", ["holiday.jpg", "shard-00000"])
def test_a_folder_of_other_things_is_refused(tmp_path, name):
    """Parts without settings.json may be of any run."""
    (tmp_path / ".99.settings.json").touch()
    (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match=rf"must be a new folder or one of this run, found {name} and no settings.js"):
        Shards(tmp_path, SETTINGS)
    assert {path.name for path in tmp_path.iterdir()} == {".99.settings.json", name}
    (tmp_path / name).rmdir()
    assert Shards(tmp_path, SETTINGS).settings["seed"] == 3


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"file must be a folder that can be written: \[Errno 17\]"):
        Shards(tmp_path / "file", SETTINGS)


@pytest.mark.parametrize("content", [None, "{", "[1]"])
def test_a_folder_without_settings_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "settings.json").write_text(content)
        with pytest.raises(ValueError, match=r"settings.json must"):
            Shards(tmp_path, {})
    with pytest.raises(ValueError, match=r"settings.json must"):
        Shards(tmp_path)


def test_what_a_dead_process_left_is_cleared_and_never_read(tmp_path):
    shards, parts = started(tmp_path)
    whole = contents(tmp_path)
    (tmp_path / "shard-00002").rename(tmp_path / ".99.shard-00002")  # half written, or half deleted
    (tmp_path / ".99.old.shard-00003").mkdir()
    (tmp_path / ".99.notes").mkdir()
    assert not Shards(tmp_path).done(2)
    assert (tmp_path / ".99.shard-00002").exists()  # a reader changes nothing
    shards = Shards(tmp_path, SETTINGS)
    assert sorted(path.name for path in tmp_path.glob(".*")) == [".99.notes"]
    work(shards, parts, make, process=ALONE)
    assert contents(tmp_path) == whole


# ---- the work --------------------------------------------------------------------------------------------


def test_every_row_is_made_once(tmp_path):
    shards, parts = started(tmp_path)
    squares = np.concatenate([shards.read(k, "squares") for k in range(len(parts))])
    assert np.array_equal(squares, np.arange(23) ** 2)
    assert [shards.info(k)["first"] for k in range(5)] == [0, 5, 10, 15, 20]
    work(shards, parts, lambda rows: pytest.fail("a finished job makes nothing"), process=ALONE)


@pytest.mark.parametrize("at", [0, 10, 20])
def test_goes_on_from_the_parts_that_are_there(tmp_path, at):
    started(tmp_path / "whole")
    seen = []

    def dies(rows):
        if rows.start == at:
            raise KilledError
        return make(rows)

    def goes_on(rows):
        seen.append(rows.start)
        return make(rows)

    shards, parts = Shards(tmp_path / "killed", SETTINGS), parts_of(23, 5)
    with pytest.raises(KilledError):
        work(shards, parts, dies, process=ALONE)
    assert [shards.done(k) for k in range(5)] == [5 * k < at for k in range(5)]
    work(Shards(tmp_path / "killed", SETTINGS), parts, goes_on, process=ALONE)
    assert seen == list(range(at, 23, 5))
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_processes_share_the_parts(tmp_path):
    """Without a group none waits for the others."""
    started(tmp_path / "whole")
    shards, parts = Shards(tmp_path / "three", SETTINGS), parts_of(23, 5)
    assert [own_parts(shards, parts, Process(rank, 3, CPU)) for rank in range(3)] == [[0, 3], [1, 4], [2]]
    for rank in (2, 0, 1):
        work(shards, parts, make, process=Process(rank, 3, CPU))
        assert not own_parts(shards, parts, Process(rank, 3, CPU))
    assert contents(tmp_path / "three") == contents(tmp_path / "whole")


def test_parts_are_made_anew_and_waited_for(tmp_path, monkeypatch):
    """Those that another process names too; what is there stays until then."""
    shards, parts = started(tmp_path)
    for k in (0, 1):
        os.utime(shards.path(k), (1, 1))
    happened, theirs, mine = [], [{1: shards._time(1)}], contents(tmp_path)
    monkeypatch.setattr(shards_module, "gather", lambda item: happened.append("gathered") or [item, *theirs])
    monkeypatch.setattr(shards_module.dist, "is_initialized", lambda: True)

    def other_process(seconds):
        assert not shards.done(1) and contents(tmp_path) == mine
        happened.append("waited")
        shards.write(1, *make(parts[1]))

    def anew(rows):
        happened.append(rows.start)
        return make(rows)

    monkeypatch.setattr(shards_module.time, "sleep", other_process)
    shards.renew([0])
    here = Process(0, 2, CPU)
    assert own_parts(shards, parts, here) == [0] and contents(tmp_path) == mine
    work(shards, parts, anew, process=here)
    assert happened == ["gathered", 0, "waited", "gathered"]


def test_only_one_part_is_in_memory(tmp_path):
    before = []

    def watched(rows):
        assert all(reference() is None for reference in before)
        arrays, info = make(rows)
        before.extend(weakref.ref(array) for array in arrays.values())
        return arrays, info

    work(Shards(tmp_path, {}), parts_of(23, 5), watched, process=ALONE)
    assert len(before) == 10


def test_the_bar_counts_rows_and_those_of_before(tmp_path, capsys):
    shards, parts = Shards(tmp_path, {}), parts_of(23, 5)
    work(shards, parts, make, process=Process(0, 2, CPU))
    assert not capsys.readouterr().err
    work(shards, parts, make, process=Process(1, 2, CPU), progress="rows")
    assert not capsys.readouterr().err  # rank 0 draws it
    (tmp_path / "shard-00003").rename(tmp_path / "away")
    work(shards, parts, make, process=ALONE, progress="a job")
    shown = capsys.readouterr().err
    assert "a job" in shown and "18/23" in shown


def test_the_bar_moves_inside_a_part(tmp_path, monkeypatch):
    """And ends at the number of rows, however many of them `make` told of."""
    shards, bars = Shards(tmp_path, {}), []

    class Bar(shards_module.tqdm):
        def update(self, n=1):
            bars.append(self.n + n)
            return super().update(n)

    def tells(rows):
        for _ in rows[1:]:
            shards.advance(1)
        return make(rows)

    monkeypatch.setattr(shards_module, "tqdm", Bar)
    work(shards, parts_of(7, 4), tells, process=ALONE, progress="a job")
    assert bars == [1, 2, 3, 4, 5, 6, 7]


# ---- two processes ---------------------------------------------------------------------------------------


SCRIPT = '''
"""What torchrun starts: each process writes what it found."""

import json, sys, time
from pathlib import Path

from imagenet.shards import Shards, parts_of, work
from mfm_ref.distributed import processes
from tests.test_imagenet_shards import SETTINGS, make

folder = Path(sys.argv[1])

def slow(rows):  # in one of the two, so that the other has to wait
    time.sleep(0.3 * (here.rank == 1))
    return make(rows)

with processes() as here:
    shards, parts = Shards(folder / "two", SETTINGS), parts_of(23, 5)
    work(shards, parts, slow, process=here)
    found = {"done": [shards.done(k) for k in range(5)]}
    other = SETTINGS | {"seed": here.rank}
    for name, place, settings in (("other", "two", other), ("file", "script.py", SETTINGS), ("same", "two", SETTINGS)):
        try:
            Shards(folder / place, settings)
            found[name] = "accepted"
        except ValueError as error:
            found[name] = str(error)
(folder / f"{here.rank}.json").write_text(json.dumps(found))
'''


def test_two_processes_make_what_one_makes_and_end_together(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [*command, str(script), str(tmp_path)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    started(tmp_path / "one")
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    for rank in (0, 1):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found["done"] == [True] * 5
        assert "seed was 3 and is 0" in found["other"]  # of rank 0's settings, in both
        assert "script.py must be a folder that can be written" in found["file"]  # and none waits for rank 0
        assert found["same"] == "accepted"
