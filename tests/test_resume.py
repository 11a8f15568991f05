"""A run that is killed goes on from its last checkpoint to the same numbers, bit for bit."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from mfm_ref import train

SCRIPT = """
import sys
from pathlib import Path
from toy.mixture import MixtureConfig, main
main(MixtureConfig(out=Path(sys.argv[1]), fast=True))
"""


class KilledError(Exception):
    """Stands for the end of the process at one step."""


def run(checkpoint, *, kill_at=None, tag="", steps=40):
    torch.manual_seed(0)
    rng, calls = torch.Generator().manual_seed(1), []

    def loss(model):
        calls.append(len(calls))
        if kill_at is not None and len(calls) > kill_at:
            raise KilledError
        x = torch.randn(16, 3, generator=rng)
        return (model(x) - x.sum(1, keepdim=True)).square().mean()

    average, history = train(
        nn.Linear(3, 1), loss, steps=steps, warmup=5, generator=rng, checkpoint=checkpoint, every=7, tag=tag
    )
    return average.weight, history, len(calls)


@pytest.mark.parametrize("kill_at", [3, 7, 20, 39])
def test_resumes_to_the_same_weights(tmp_path, kill_at):
    weight, history, _ = run(None)
    with pytest.raises(KilledError):
        run(tmp_path / "checkpoint.pt", kill_at=kill_at)
    again, resumed, calls = run(tmp_path / "checkpoint.pt")
    assert torch.equal(weight, again)
    assert history == resumed
    assert calls == 40 - kill_at // 7 * 7  # only what the last checkpoint had not yet seen


def test_a_checkpoint_of_other_settings_is_refused(tmp_path):
    run(tmp_path / "checkpoint.pt", tag="lr=1")
    with pytest.raises(ValueError, match="other settings"):
        run(tmp_path / "checkpoint.pt", tag="lr=2")


def test_toy_run_survives_sigkill(tmp_path):
    root = Path(__file__).parent.parent
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}

    def start(out):
        return subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(out)], cwd=root, env=environment, stderr=subprocess.DEVNULL
        )

    assert start(tmp_path / "whole").wait(timeout=120) == 0
    process, deadline = start(tmp_path / "killed"), time.monotonic() + 120
    while not list((tmp_path / "killed" / "checkpoints").glob("map.pt")):  # the first stage has left a checkpoint
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (tmp_path / "killed" / "mine.pt").touch()
    assert not (tmp_path / "killed" / "report.json").exists()
    assert start(tmp_path / "killed").wait(timeout=120) == 0
    reports = [json.loads((tmp_path / name / "report.json").read_text()) for name in ("whole", "killed")]
    for report in reports:
        del report["seconds"], report["config"]
    assert reports[0] == reports[1]
    assert not (tmp_path / "killed" / "checkpoints").exists()  # a finished run leaves no checkpoint behind
    assert (tmp_path / "killed" / "mine.pt").exists()  # and touches no other file
