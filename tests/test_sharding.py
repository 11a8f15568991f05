"""The engines: two processes, DDP or FSDP2, walk as one does, and each can go on with what another began.

Two processes run once for all tests of this file, see sharded_run.py. In float64, sums in another order differ by
1e-15 or so; what follows from 6 steps with learning rates of 0.02 is held to 1e-9.
"""

import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from mfm_ref import FlowMap, TrainConfig, train
from mfm_ref.distributed import Process
from mfm_ref.sharding import shard_units
from tests import joined_run
from tests.imagenet_tiny import tiny_sit
from tests.sharded_run import BATCH, GRADIENT, SIZES, STEPS, Elastic, acting, loss, outcome, trained

ROOT = Path(__file__).parent.parent
ALONE = Process(0, 1, torch.device("cpu"))
ENGINES = pytest.mark.parametrize("engine", ["ddp", "fsdp"])


class KilledError(Exception):
    """Stands for the end of the process."""


def killed(folder, at=6, **options):
    """One process, with four micro-batches a step by default, that ends in the third step; its last checkpoint: 2."""

    def end():
        raise KilledError

    found = outcome(lambda: trained(ALONE, folder, objective=acting(at, end), checkpoint_every=2, **options))
    assert found.startswith("KilledError")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """The folder, and what each of two processes wrote."""
    folder = tmp_path_factory.mktemp("sharded")
    killed(folder / "begun alone", at=9)
    for engine in ("ddp", "fsdp"):
        shutil.copytree(folder / "begun alone", folder / f"begun alone, {engine}")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    result = subprocess.run(
        [*command, "-m", "tests.sharded_run", str(folder)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return folder, [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.fixture(scope="module")
def one():
    """One process, on the whole batch at once."""
    return trained(ALONE, micro=BATCH)


@pytest.fixture
def alone_in_a_group():
    """A process group of this process alone: the weights are one piece each."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def check_same(a, b, within=1e-9):
    for part in ("model", "average"):
        torch.testing.assert_close(a[part], b[part], rtol=0, atol=within)
    assert a["history"] == pytest.approx(b["history"], abs=within)


# ---- the same numbers ------------------------------------------------------------------------------------


@ENGINES
def test_loss_and_gradient_are_those_of_one_process(found, engine):
    """A step of RAdam without memory is the learning rate, 1, times the gradient; the jump's target is a derivative."""
    alone = trained(ALONE, micro=BATCH, **GRADIENT)
    gradient = alone["before"] - alone["model"]
    assert gradient.abs().max() > 0.1
    for rank in found[1]:
        there = rank["gradient"][engine]
        assert there["history"] == pytest.approx(alone["history"], abs=1e-9)
        torch.testing.assert_close(alone["before"] - there["model"], gradient, rtol=0, atol=1e-9)


def test_blocks_that_are_computed_anew_in_the_backward_pass_are_gathered_for_it(found):
    for rank in found[1]:
        check_same(rank["checkpointed"], rank["gradient"]["ddp"])


@ENGINES
@pytest.mark.parametrize("how", ["whole", "accumulated"])
def test_a_run_is_that_of_one_process(found, one, engine, how):
    for rank in found[1]:
        check_same(rank[how][engine], one)


def test_one_process_accumulates_to_the_same(one):
    check_same(trained(ALONE, micro=2), one)
    other = trained(ALONE, micro=2, accumulate=2)  # half of the batch
    assert abs(other["history"][0] - one["history"][0]) > 1e-3


@ENGINES
def test_processes_are_equal_to_the_bit(found, engine):
    first, second = (rank["whole"][engine] for rank in found[1])
    assert torch.equal(first["model"], second["model"])
    assert torch.equal(first["average"], second["average"])
    assert first["history"] == second["history"]
    assert not torch.equal(first["before"], second["before"])  # they began with different weights


def test_what_train_leaves_is_whole(found):
    """Of the classes that it was, in every process; the average in eval mode and without gradients."""
    for rank in found[1]:
        for how in ("whole", "accumulated", "resumed"):
            assert rank[how]["fsdp"]["plain"]
            assert rank[how]["fsdp"]["frozen"]


def test_autocast_is_the_same_with_both_engines(found, one):
    """But for the rounding of sums. With autocast's cache the blocks would learn nothing, and the loss not fall."""
    for rank in found[1]:
        ddp, fsdp = rank["bfloat16"]["ddp"], rank["bfloat16"]["fsdp"]
        assert ddp["history"] == pytest.approx(fsdp["history"], rel=3e-3)
        assert max(abs(a - b) for a, b in zip(ddp["history"], one["history"], strict=True)) > 1e-4


def test_data_that_are_not_elastic_in_pieces(found):
    """Of another network, with buffers and without units; as one process on the joined batch."""
    for rank in found[1]:
        check_same(rank["not elastic"], joined_run.trained(ALONE, batch=16))


@pytest.mark.slow
def test_a_compiled_loss_in_pieces(alone_in_a_group):
    check_same(joined_run.trained(ALONE, engine="fsdp", compile="aot_eager"), joined_run.trained(ALONE))


def test_what_is_watched_is_a_mean_over_the_rows_of_all(found, tmp_path):
    """A mean of means would not do: the rows in question are split unevenly. One that no row had is left out."""
    trained(ALONE, tmp_path, micro=BATCH)
    logs = {
        name: [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        for name, path in (("one", tmp_path), ("ddp", found[0] / "ddp"), ("fsdp", found[0] / "fsdp"))
    }
    for lines in zip(*logs.values(), strict=True):
        for line in lines:
            del line["seconds"]
            assert "never" not in line
            assert line == pytest.approx(lines[0], abs=1e-9)
    assert len([line for line in logs["one"] if "early" in line]) > STEPS // 2


# ---- checkpoints -----------------------------------------------------------------------------------------


@ENGINES
def test_two_processes_go_on_with_what_one_began(found, one, engine):
    """Whose step was of four micro-batches; to the same numbers as without a break."""
    for rank in found[1]:
        check_same(rank["resumed"][engine], one)
    lines = (found[0] / f"begun alone, {engine}" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(STEPS))


@pytest.mark.parametrize("micro", [2, BATCH])
def test_one_process_goes_on_with_what_two_began_in_pieces(found, one, micro, tmp_path):
    folder = shutil.copytree(found[0] / "terminated", tmp_path / "copy")
    again = trained(ALONE, folder, micro=micro)
    check_same(again, one)


@ENGINES
def test_a_checkpoint_is_the_same_whatever_the_engine(found, engine):
    """Names, shapes and numbers of all files; the model folder names the network as it is."""
    one_of, other = (found[0] / name / f"step-{STEPS:08d}" for name in ("begun alone, ddp", engine))
    states = [torch.load(path / "state.pt", weights_only=True) for path in (one_of, other)]
    for state in states:
        del state["seconds"]
        assert state["processes"] == [{"data": {"step": STEPS}}]
    torch.testing.assert_close(*(state["optimizer"] for state in states), rtol=0, atol=1e-9)
    assert states[0]["schedule"] == states[1]["schedule"]
    for part in ("model", "ema"):
        texts = [(path / part / "config.json").read_text() for path in (one_of, other)]
        assert texts[0] == texts[1]
        assert json.loads(texts[0])["network"] == "SiT"
    identities = [json.loads((path / "run.json").read_text())["identity"] for path in (one_of, other)]
    assert identities[0] == identities[1]


def test_a_run_that_is_not_elastic_stays_with_its_processes(found):
    """Each has random numbers of its own, in the checkpoint."""
    options = {"accumulate": 2, "folder": found[0] / "not elastic"}
    with pytest.raises(ValueError, match=r"world = 2 there, 1 here$"):
        joined_run.trained(ALONE, **options)
    state = torch.load(found[0] / "not elastic" / "step-00000008" / "state.pt", weights_only=True)
    assert [set(own) for own in state["processes"]] == 2 * [{"data", "generator", "torch"}]


def test_an_engine_may_be_changed_on_the_way(tmp_path, alone_in_a_group):
    """From whole tensors to pieces and back, in a group of one."""
    begun = {"micro": BATCH, "at": 3}
    killed(tmp_path / "ddp", **begun)
    killed(tmp_path / "fsdp", **begun, engine="fsdp")
    whole = trained(ALONE, micro=BATCH)
    check_same(trained(ALONE, tmp_path / "ddp", micro=BATCH, engine="fsdp"), whole)
    check_same(trained(ALONE, tmp_path / "fsdp", micro=BATCH), whole)


# ---- ends ------------------------------------------------------------------------------------------------


def test_sigterm_to_one_stops_all(found):
    for rank in found[1]:
        assert rank["terminated"] == {"end": "SystemExit: 0", "checkpoints": ["step-00000003"]}


def test_nan_in_one_stops_all(found):
    for rank in found[1]:
        assert "ValueError: the term jump of the loss at step 2 must be finite, got nan" in rank["not finite"]


@ENGINES
def test_a_full_disk_stops_all(found, engine):
    for number, rank in enumerate(found[1]):
        end = rank["full disk"][engine]["end"]
        assert end.startswith("OSError: " + number * "in rank 0: " + "the checkpoint ")
        assert "step-00000004 could not be written; the last good one is" in end
        assert rank["full disk"][engine]["checkpoints"] == ["step-00000002"]
        assert rank["full disk for metrics"]["end"].startswith("OSError: " + number * "in rank 0: " + "[Errno 27]")


def test_the_callback_gets_a_whole_average_in_rank_0(found):
    first, second = (rank["shown"] for rank in found[1])
    assert [(k, plain) for k, plain, _ in first["seen"]] == [(3, True), (6, True)]
    assert second["seen"] == []
    assert torch.equal(first["seen"][1][2], first["average"])
    assert not torch.allclose(first["seen"][0][2], first["average"], atol=1e-3)
    assert first["end"] == "KeyError: 'no such picture'"
    assert second["end"] == "RuntimeError: in rank 0: 'no such picture'"


def test_a_checkpoint_is_written_when_the_last_is_too_old_for_one(found):
    for rank in found[1]:
        assert rank["aged"] == ["step-00000003", "step-00000006"]


def test_what_fails_in_rank_0_fails_in_all(found):
    first, second = (rank["on rank 0"] for rank in found[1])
    assert first == ["7", "ValueError: rank 0 alone"]
    assert second == ["None", "ValueError: in rank 0: rank 0 alone"]


# ---- units -----------------------------------------------------------------------------------------------


def test_a_network_says_its_units():
    X = FlowMap(tiny_sit(**SIZES))
    assert shard_units(nn.Sequential(X)) == list(reversed(X.network.blocks))
    assert shard_units(nn.Linear(1, 1)) == []
    assert "shard_units" not in "".join(X.state_dict())


def test_units_are_gathered_one_by_one(alone_in_a_group):
    """Within the loss the outlet is whole, and a block that has computed is in pieces again."""
    seen = []

    def look(X, rows, rng):
        value = loss(X, rows, rng)
        blocks, outlet = X.network.blocks, X.network.outlet
        seen.append([hasattr(p, "full_tensor") for p in (blocks[0].mlp[0].weight, outlet.weight)])
        return value

    X = FlowMap(tiny_sit(**SIZES)).double()
    train(X, look, Elastic(ALONE, BATCH, torch.float64), TrainConfig(steps=1, engine="fsdp"))
    assert seen == [[True, False]]
    assert type(X.network.blocks[0]).__name__ == "Block"


def test_a_run_in_pieces_that_fails_leaves_a_whole_model(alone_in_a_group):
    X = FlowMap(tiny_sit(**SIZES)).double()

    def fail(X, rows, rng):
        raise ValueError("no")

    with pytest.raises(ValueError, match="at step 0: no"):
        train(X, fail, itertools.count(), TrainConfig(steps=1, engine="fsdp"))
    assert all(type(p) is nn.Parameter for p in X.parameters())
