"""A small run that is killed by SIGKILL again and again, at random moments and within its writes; see test_resume.py.

A process that has loaded torch once forks those that are killed. A moment is the n-th call of a function, of Python
or of C, that the process makes: unlike a time, it is the same on every machine. Prints a line of JSON.
"""

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from mfm_ref import TensorBatches, TrainConfig, train
from mfm_ref.checkpoints import Checkpoints
from mfm_ref.files import save_weights

CALLS_OF_A_WRITE = 9000  # nearly; a checkpoint makes 9300

CONFIG = TrainConfig(steps=40, lr=0.01, warmup=5, checkpoint_every=4, log_every=3, accumulate=2, seed=7)


def run(folder: Path) -> None:
    """Train with noise from the generator, dropout from torch's own source, and shuffled data."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 16), nn.Dropout(0.2), nn.SiLU(), nn.Linear(16, 1))
    rows = torch.randn(50, 3, generator=torch.Generator().manual_seed(1))

    def loss(model: nn.Module, batch: tuple[torch.Tensor, ...], rng: torch.Generator | None) -> torch.Tensor:
        x = batch[0] + 0.1 * torch.randn(batch[0].shape, generator=rng)
        return (model(x) - x.sum(1, keepdim=True)).square().mean()

    average, history = train(model, loss, TensorBatches(rows, batch=8), CONFIG, folder=folder)
    save_weights(average, folder / "average.safetensors")
    save_weights(model, folder / "model.safetensors")
    (folder / "history.json").write_text(json.dumps(history))


def die_after(calls: int) -> None:
    """Kill this process at one of its next calls."""
    left = [calls]

    def count(*_: object) -> None:
        left[0] -= 1
        if left[0] <= 0:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(count)


def calls_of(work: Callable[[], object]) -> int:
    """How many calls `work` makes."""
    counted = [0]

    def count(*_: object) -> None:
        counted[0] += 1

    sys.setprofile(count)
    work()
    sys.setprofile(None)
    return counted[0]


def die_in_write(save: int, calls: int) -> None:
    """Kill this process at one of the calls of its `save`-th checkpoint."""
    saves, write = [0], Checkpoints.save

    def watched(*arguments: object) -> object:
        saves[0] += 1
        if saves[0] == save:
            die_after(calls)
        return write(*arguments)  # type: ignore[arg-type]

    Checkpoints.save = watched  # type: ignore[method-assign, assignment]


def fork(folder: Path, prepare: Callable[[], object], wait: float | None = None) -> bool:
    """Run in a process of its own; whether it was killed, by itself or from here after `wait` seconds."""
    child = os.fork()
    if child == 0:
        prepare()
        run(folder)
        os._exit(0)
    if wait is not None:
        time.sleep(wait)
        os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def half_written(folder: Path) -> list[Path]:
    """What a dead process left half written."""
    return list(folder.glob(".*.step-*"))


def main(root: Path) -> dict[str, int]:
    """Kill runs in each way, let each end, and count those that ended otherwise than one that was never killed."""
    random.seed(0)
    torch.set_num_threads(1)
    began = time.monotonic()
    run(root / "whole")
    seconds = time.monotonic() - began
    calls = calls_of(lambda: run(root / "counted"))
    found = dict.fromkeys(("killed", "killed_in_write", "left_half_written", "left_at_the_end", "different"), 0)
    for trial in range(4):
        folder = root / str(trial)
        folder.mkdir()
        for _ in range(2):
            moment, moment_of_write = random.randrange(calls // 4), random.randrange(CALLS_OF_A_WRITE)
            found["killed"] += fork(folder, lambda n=moment: die_after(n))
            found["killed_in_write"] += fork(folder, lambda n=moment_of_write: die_in_write(2, n))
            found["left_half_written"] += bool(half_written(folder))
            fork(folder, lambda: None, wait=random.uniform(0, seconds))
        fork(folder, lambda: None)
        for name in ("average.safetensors", "model.safetensors"):
            a, b = (load_file(root / which / name) for which in ("whole", str(trial)))
            found["different"] += any(not torch.equal(a[key], b[key]) for key in a)
        found["different"] += (folder / "history.json").read_text() != (root / "whole" / "history.json").read_text()
        found["left_at_the_end"] += len(half_written(folder))
    return found


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
