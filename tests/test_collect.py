"""Long sampling: finished batches are read back, others drawn, and the samples are those of an unbroken run."""

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mfm_ref import Cost, ExactFlowMap, steer
from mfm_ref.collect import collect
from mfm_ref.data import stream_seed
from tests.helpers import gaussian

ROOT = Path(__file__).parent.parent
SCRIPT = """
import json, os, random, sys, threading, torch
from pathlib import Path
from tqdm import tqdm
from mfm_ref.collect import _Batches
from tests.killed_run import calls_of, die_after
from tests.test_collect import run

random.seed(0)
torch.set_num_threads(1)
tqdm.set_lock(threading.RLock())  # tqdm's own is shared with forks: one that dies with it would stop the others
root, write, found = Path(sys.argv[1]), _Batches.write, {"killed": 0, "in_write": 0, "left": 0}
calls = calls_of(lambda: run(root / "whole", 100))

def in_write(calls):
    def write_and_die(*arguments):
        die_after(calls)
        write(*arguments)
    _Batches.write = write_and_die

def before_rename(_):
    os.replace = lambda *_: die_after(1)

for trial in range(30):
    moments = {"killed": random.randrange(calls // 4), "in_write": random.randrange(270), "left": 0}
    name = list(moments)[trial % 3]
    child = os.fork()
    if child == 0:
        {"killed": die_after, "in_write": in_write, "left": before_rename}[name](moments[name])
        run(root / "killed", 100)
        os._exit(0)
    killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
    found[name] += killed and (name != "left" or bool(list((root / "killed").glob(".*.batch-*"))))
print(json.dumps(found))
"""


class KilledError(Exception):
    """Stands for the end of the process in one batch."""


def draw(rows, generator):
    """Samples that show their number, and a cost that adds up exactly."""
    number = torch.arange(rows.start, rows.stop).unsqueeze(1)
    samples = torch.cat([number, torch.randn(len(rows), 2, generator=generator)], 1)
    return samples, Cost(len(rows), len(rows), 2, 3 * len(rows), 4, 0.5, 100 + rows.start)


def run(folder, n_samples=17, batch=5, *, draw=draw, **options):
    """17 samples in batches of 5."""
    return collect(draw, n_samples, batch, folder=folder, **{"seed": 3, "tag": "a", **options})


def watched(at=None):
    """`draw`, what rows it was asked for, and the end of the process at the batch that begins with row `at`."""
    seen = []

    def watching(rows, generator):
        seen.append(rows)
        if at is not None and rows.start == at:
            raise KilledError
        return draw(rows, generator)

    return watching, seen


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def same(a, b):
    return torch.equal(a[0], b[0]) and a[1] == b[1]


# ---- what comes out --------------------------------------------------------------------------------------


def test_batches_follow_each_other_and_costs_add_up():
    samples, cost = run(None)
    assert torch.equal(samples[:, 0], torch.arange(17.0))
    assert cost == Cost(17, 17, 8, 51, 16, 2.0, 115)
    generator = torch.Generator().manual_seed(stream_seed(3, 1, 4))
    assert torch.equal(samples[5:10, 1:], torch.randn(5, 2, generator=generator))
    assert len(samples[:, 1:].flatten().unique()) == 34  # no noise is drawn twice


def test_seed_and_batch_decide_and_the_folder_does_not(tmp_path):
    whole = run(None)
    assert same(whole, run(tmp_path / "new" / "folder"))
    assert same(whole, run(str(tmp_path / "text")))
    assert not torch.equal(whole[0], run(None, seed=4)[0])
    assert torch.equal(whole[0][:5], run(None, 5)[0])
    assert files(tmp_path / "text") == [f"batch-0000{k}.safetensors" for k in range(4)]


def test_samples_without_a_cost_count_their_seconds():
    def slow(rows, generator):
        time.sleep(0.01)
        return torch.zeros(len(rows), 2, 2)

    samples, cost = run(None, draw=slow)
    assert samples.shape == (17, 2, 2)
    assert cost.samples == 17 and cost.seconds > 0.04 and cost.evaluations == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.int64])
def test_any_dtype_and_layout_is_kept(tmp_path, dtype):
    def turned(rows, generator):
        return (
            (100 * torch.randn(3, len(rows), generator=generator)).to(dtype).T.requires_grad_(dtype.is_floating_point)
        )

    whole = run(tmp_path, draw=turned)[0]
    assert whole.dtype == dtype and not whole.requires_grad
    assert torch.equal(whole, run(tmp_path, draw=turned)[0])


def test_steers_with_labels_of_each_batch(tmp_path):
    """The use that it is for; labels by the rows, which `y[rows]` would also take."""
    y, X = torch.arange(8) % 3, ExactFlowMap(gaussian())
    labels = []

    def draw(rows, generator):
        labels.append(y[rows.start : rows.stop])
        return steer(X, lambda x: x[:, 0], len(rows), n=2, steps=3, generator=generator)

    samples, cost = collect(draw, 8, 3, folder=tmp_path, tag="steer")
    assert torch.equal(torch.cat(labels), y)
    assert samples.shape == (8, 2) and samples.dtype == X.dtype
    again, read = collect(draw, 8, 3, folder=tmp_path, tag="steer")
    assert torch.equal(samples, again) and cost == read
    assert cost.evaluations == 3 + 4 * 2 * 3 and cost.seconds > 0
    assert len(labels) == 3


# ---- resuming --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [0, 5, 15])
def test_goes_on_from_the_finished_batches(tmp_path, at):
    whole, (dies, _), (goes_on, seen) = run(None), watched(at), watched()
    with pytest.raises(KilledError):
        run(tmp_path, draw=dies)
    assert len(files(tmp_path) if tmp_path.exists() else []) == at // 5
    assert same(whole, run(tmp_path, draw=goes_on))
    assert [rows.start for rows in seen] == list(range(at, 17, 5))


def test_a_finished_run_draws_nothing_and_its_files_stay(tmp_path):
    whole, (draws, seen) = run(tmp_path), watched()
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert same(whole, run(tmp_path, draw=draws))
    assert not seen
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_batch_that_was_removed_is_drawn_again(tmp_path):
    whole, (draws, seen) = run(tmp_path), watched()
    (tmp_path / "batch-00001.safetensors").unlink()
    assert same(whole, run(tmp_path, draw=draws))
    assert seen == [range(5, 10)]


@pytest.mark.parametrize(("before", "drawn"), [(17, [15, 20]), (15, [15, 20]), (2, [0, 5, 10, 15, 20])])
def test_the_number_of_samples_may_grow(tmp_path, before, drawn):
    """A last batch that was smaller is drawn anew, as a run of the larger number would."""
    draws, seen = watched()
    run(tmp_path, before)
    assert same(run(None, 23), run(tmp_path, 23, draw=draws))
    assert [rows.start for rows in seen] == drawn


def test_the_number_of_samples_may_not_fall_within_a_batch(tmp_path):
    whole = run(tmp_path)
    with pytest.raises(
        ValueError, match=r"batch-00003.safetensors must hold at most 1 samples, got 2: n_samples may grow, not fall"
    ):
        run(tmp_path, 16)
    assert torch.equal(run(tmp_path, 15)[0], whole[0][:15])  # whole batches: those that are there


def test_survives_sigkill_at_random_moments(tmp_path):
    """At up to 10 random calls of Python or C, 10 within the write of a batch, and 10 before a file gets its name."""
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=True)
    found = json.loads(result.stdout)
    assert found["killed"] >= 5 and found["in_write"] >= 5 and found["left"] >= 5
    whole, (draws, seen) = run(None, 100), watched()
    assert same(whole, run(tmp_path / "killed", 100, draw=draws))
    assert same(whole, run(tmp_path / "whole", 100))
    assert len(seen) < 20
    assert files(tmp_path / "killed") == [f"batch-{k:05d}.safetensors" for k in range(20)]


def test_what_a_dead_process_left_half_written_is_cleared_and_a_living_one_is_left_alone(tmp_path):
    whole = run(tmp_path)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    dead, living = (f".{process}.batch-00001.safetensors" for process in (ended.pid, os.getppid()))
    for name in (dead, living, f".{ended.pid}.notes.txt", "batch-mine.txt"):
        (tmp_path / name).write_bytes(b"half")
    assert same(whole, run(tmp_path))
    kept = {living, f".{ended.pid}.notes.txt", *(f"batch-0000{k}.safetensors" for k in range(4)), "batch-mine.txt"}
    assert set(files(tmp_path)) == kept


# ---- what is refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tag": "b"}, "belongs to another run; .*: tag = 'a' there, 'b' here"),
        ({"seed": 4}, "belongs to another run; .*: seed = 3 there, 4 here"),
        ({"batch": 4}, "belongs to another run; .*: batch = 5 there, 4 here"),
        ({"batch": 6, "tag": "b"}, "belongs to another run; .*: tag = 'a' there, 'b' here; batch = 5 there, 6 here"),
        ({"device": "meta"}, "belongs to another run; .*: device = 'cpu' there, 'meta' here"),
    ],
)
def test_files_of_another_run_are_refused(tmp_path, options, message):
    run(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=f"batch-00000.safetensors {message}"):
        run(tmp_path, **options)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("harm", ["truncated", "header only", "overwritten", "emptied", "a folder"])
def test_a_damaged_file_is_refused_before_anything_is_drawn(tmp_path, harm):
    whole, (draws, seen) = run(tmp_path), watched()
    (tmp_path / "batch-00000.safetensors").unlink()
    path = tmp_path / "batch-00002.safetensors"
    content = path.read_bytes()
    path.unlink()
    if harm == "a folder":
        path.mkdir()
    else:
        left = {"truncated": content[: len(content) // 2], "header only": content[:-8], "emptied": b""}
        path.write_bytes(left.get(harm, os.urandom(len(content))))
    with pytest.raises(ValueError, match=r"batch-00002.safetensors must be a batch of samples that can be read"):
        run(tmp_path, draw=draws)
    assert not seen
    path.rename(tmp_path / "damaged")
    assert same(whole, run(tmp_path, draw=draws))


def rewritten(path, *, samples=None, **changes):
    """The file again, with other samples or other facts about them."""
    with safe_open(path, "pt") as file:
        content = json.loads(file.metadata()["mfm_ref"])
    samples = load_file(path)["samples"] if samples is None else samples
    save_file({"samples": samples}, path, {"mfm_ref": json.dumps(content | changes)})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "mfm_ref samples 0"}, "holds another batch; .*: format = 'mfm_ref samples 0' there"),
        ({"batch": 3}, "holds another batch; .*: batch = 3 there, 2 here"),
        ({"rows": 4}, "holds another batch; .*: rows = 4 there, 5 here"),
        ({"samples": torch.zeros(4, 3)}, "holds another batch; .*: rows = 5 there, 4 here"),
        ({"samples": torch.zeros(5, 4)}, r"batch-00002.* has \(4,\) of torch.float32, the others \(3,\) of"),
        ({"samples": torch.zeros(5, 3).half()}, r"batch-00002.* has \(3,\) of torch.float16, the others \(3,\) of"),
        ({"cost": {"euros": 5}}, "must be a batch of samples that can be read"),
        ({"cost": 7}, "must be a batch of samples that can be read"),
        ({"run": 7}, "must be a batch of samples that can be read"),
        ({"run": {}}, "belongs to another run; .*: tag = None there, 'a' here; batch = None there"),
    ],
)
def test_a_foreign_file_is_refused(tmp_path, changes, message):
    run(tmp_path)
    rewritten(tmp_path / "batch-00002.safetensors", **changes)
    with pytest.raises(ValueError, match=message) as refused:
        run(tmp_path)
    assert str(tmp_path / "batch-00002.safetensors") in str(refused.value)


@pytest.mark.parametrize("metadata", [None, {"mfm_ref": "[1]"}, {"mfm_ref": "{"}, {"format": "pt"}])
def test_safetensors_of_another_kind_are_refused(tmp_path, metadata):
    save_file({"samples": torch.zeros(5, 3)}, tmp_path / "batch-00000.safetensors", metadata)
    with pytest.raises(ValueError, match=r"batch-00000.safetensors must be a batch of samples that can be read"):
        run(tmp_path)


def test_a_batch_that_was_moved_is_refused(tmp_path):
    run(tmp_path)
    (tmp_path / "batch-00001.safetensors").rename(tmp_path / "batch-00002.safetensors")
    with pytest.raises(ValueError, match=r"batch-00002.safetensors holds another batch; .*: batch = 1 there, 2 here"):
        run(tmp_path)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (torch.zeros(4, 2), r"draw must return 5 samples for range\(0, 5\), got shape \(4, 2\)"),
        (torch.tensor(1.0), r"draw must return 5 samples for range\(0, 5\), got shape \(\)"),
        ([1.0], r"draw must return 5 samples for range\(0, 5\), got list"),
        ((None, Cost(5)), r"draw must return 5 samples for range\(0, 5\), got NoneType"),
        (torch.full((5, 2), torch.nan), r"the samples of range\(0, 5\) must be finite, got 10 NaN"),
    ],
)
def test_what_a_draw_returns_is_checked(tmp_path, result, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path, draw=lambda rows, generator: result)
    assert not files(tmp_path) if tmp_path.exists() else True


def test_draws_that_change_shape_are_refused(tmp_path):
    """On the way, and where a folder holds others: neither gets a file."""
    with pytest.raises(ValueError, match=r"batch 1, drawn now, has \(6,\) of torch.float32, the others \(1,\) of"):
        run(tmp_path, draw=lambda rows, generator: torch.zeros(len(rows), rows.start + 1))
    with pytest.raises(ValueError, match=r"batch 1, drawn now, has \(3,\) of torch.float32, the others \(1,\) of"):
        run(tmp_path)
    assert files(tmp_path) == ["batch-00000.safetensors"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_samples": 0}, "n_samples must be an integer >= 1, got 0"),
        ({"batch": 0}, "batch must be an integer >= 1, got 0"),
        ({"seed": -1}, "seed must be an integer >= 0, got -1"),
    ],
)
def test_numbers_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        run(None, **options)


def test_a_full_disk_leaves_the_batches_before(tmp_path):
    """The limit on the size of a file stands for it."""

    def large(rows, generator):
        return torch.randn(len(rows), 3000, generator=generator)

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    whole, (first, last) = run(None, draw=large), (tmp_path / f"batch-0000{k}.safetensors" for k in (0, 1))
    run(tmp_path, 5, draw=large)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
        with pytest.raises(OSError, match=f"{last} could not be written; the batches before it are: "):
            run(tmp_path, draw=large)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == [first]
    assert torch.equal(whole[0], run(tmp_path, draw=large)[0])
