"""Two processes under torchrun and gloo walk as one process does on the joined batch. They run once for all tests."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from mfm_ref import TrainConfig, train
from mfm_ref.distributed import Process, processes
from tests.joined_run import STEPS, trained

ROOT = Path(__file__).parent.parent
ALONE = Process(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """The folder, and what each of two processes wrote."""
    folder = tmp_path_factory.mktemp("joined")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*command, "-m", "tests.joined_run", str(folder)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert "FutureWarning" not in result.stderr
    return folder, [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


def close(a, b):
    return torch.allclose(a["model"], b["model"], rtol=0, atol=1e-9) and torch.allclose(
        a["average"], b["average"], rtol=0, atol=1e-9
    )


def test_two_processes_are_one_on_the_joined_batch(found):
    """They begin with different weights and buffers, rank 0's count; sums in another order differ by 1e-16 a step."""
    one = trained(ALONE, batch=8)
    for rank in found[1]:
        assert close(rank["plain"], one)
        assert rank["plain"]["history"] == pytest.approx(one["history"], abs=1e-9)
    assert not torch.allclose(trained(ALONE, batch=4)["model"], one["model"], atol=1e-3)  # half of the batch shows


def test_accumulation_waits_for_its_last_batch(found):
    """Two batches of four rows in each of two processes are one batch of 16."""
    one = trained(ALONE, batch=16)
    assert all(close(rank["accumulated"], one) for rank in found[1])


def test_processes_stay_bitwise_equal(found):
    for case in ("plain", "accumulated", "compiled"):
        first, second = (rank[case] for rank in found[1])
        assert torch.equal(first["model"], second["model"])
        assert torch.equal(first["average"], second["average"])
        assert first["history"] == second["history"]


def test_compilation_changes_nothing_in_many_processes(found):
    assert all(close(rank["compiled"], rank["plain"]) for rank in found[1])


def test_each_process_has_its_own_noise(found):
    """From the generator and from torch's own source, none of it shared, repeated or that of another seed."""
    drawn = [rank["noise"] for rank in found[1]]
    assert len(drawn[0]) == 2 * STEPS
    assert len({*drawn[0], *drawn[1]}) == 4 * STEPS


def test_one_process_writes_for_all(found):
    folder, (rank, _) = found
    lines = [json.loads(line) for line in (folder / "accumulated" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(STEPS))
    assert [line["loss"] for line in lines] == rank["accumulated"]["history"]
    names = {path.name for path in (folder / "accumulated").iterdir()}
    assert names == {"metrics.jsonl", "step-00000006", "step-00000008"}


def test_sigterm_to_one_process_stops_all_and_the_run_goes_on(found):
    """At the fifth step, which both finish, save and leave with code 0; then to the same bits as an unbroken run."""
    for rank in found[1]:
        assert rank["stopped"]["code"] == 0
        assert rank["stopped"]["checkpoints"] == ["step-00000003", "step-00000005"]
        assert torch.equal(rank["stopped"]["resumed"]["model"], rank["plain"]["model"])
        assert torch.equal(rank["stopped"]["resumed"]["average"], rank["plain"]["average"])
        assert rank["stopped"]["resumed"]["history"] == rank["plain"]["history"]


def test_a_loss_that_is_not_finite_in_one_process_stops_all(found):
    for rank in found[1]:
        assert "the term derivative of the loss at step 4 must be finite, got nan" in rank["failed"]


def test_a_checkpoint_of_two_processes_is_refused_by_one(found):
    folder, _ = found
    settings = TrainConfig(steps=STEPS, lr=0.05, warmup=2, decay=0.5, checkpoint_every=3, log_every=1, accumulate=2)
    with pytest.raises(ValueError, match=r"world = 2 there, 1 here$"):
        train(nn.Linear(1, 1), lambda m, b, rng: m.weight.sum(), [], settings, folder=folder / "accumulated")


def test_torchrun_without_a_group_is_refused(monkeypatch):
    """Else each process would be a run of its own."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="torchrun started 2 processes, which must form a group first"):
        train(nn.Linear(1, 1), lambda m, b, rng: m.weight.sum(), [], TrainConfig(steps=1))


def test_one_process_needs_no_group(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with processes() as process:
        assert process == (0, 1, torch.device("cpu"))
        assert not torch.distributed.is_initialized()
