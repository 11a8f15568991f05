"""A run that is killed goes on from its last checkpoint to the same numbers, bit for bit; damage is refused."""

import itertools
import json
import math
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from mfm_ref import MLP, FlowMap, RandomBatches, TensorBatches, TrainConfig, train
from mfm_ref.checkpoints import Checkpoints

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
SCRIPT = """
import sys
from pathlib import Path
from toy.mixture import MixtureConfig, main
main(MixtureConfig(out=Path(sys.argv[1]), fast=True))
"""


class KilledError(Exception):
    """Stands for the end of the process at one step."""


def drawn():
    return RandomBatches(lambda rng: torch.randn(16, 3, generator=rng), torch.Generator().manual_seed(1))


def shuffled():
    rows = torch.randn(50, 3, generator=torch.Generator().manual_seed(1))
    return TensorBatches(rows, rows, batch=16, seed=3)


def plain():
    """A Python generator: its position cannot be saved."""
    rng = torch.Generator().manual_seed(1)
    while True:
        yield torch.randn(16, 3, generator=rng)


def loader():
    """Its order comes from torch's own source, when it begins."""
    rows = TensorDataset(torch.randn(50, 3, generator=torch.Generator().manual_seed(1)))
    return DataLoader(rows, batch_size=16, sampler=RandomSampler(rows, replacement=True, num_samples=640))


def epochs():
    """Shuffled by torch's own source at the start of each epoch, in the midst of the model's dropout."""
    rows = TensorDataset(torch.randn(50, 3, generator=torch.Generator().manual_seed(1)))
    while True:
        yield from DataLoader(rows, batch_size=16, shuffle=True)


def run(folder, *, at=None, happens=None, data=drawn, tag="", model=None, callback=None, **options):
    """40 steps of a noisy regression; at call number `at` of the loss, `happens` is called, or the run is killed."""
    torch.manual_seed(0)
    model, calls = model or nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 1)), []

    def loss(model, batch, rng):
        calls.append(len(calls))
        if at is not None and len(calls) > at:
            if happens is None:
                raise KilledError
            if len(calls) == at + 1:
                happens()
        x = batch if isinstance(batch, torch.Tensor) else batch[0]
        x = x + 0.1 * torch.randn(x.shape, generator=rng)
        return (model(x) - x.sum(1, keepdim=True)).square().mean()

    config = TrainConfig(**{"steps": 40, "warmup": 5, "checkpoint_every": 7, "log_every": 3, **options})
    average, history = train(model, loss, data(), config, folder=folder, tag=tag, callback=callback)
    return [*model.parameters(), *average.parameters()], history, len(calls)


def same(a, b):
    return a[1] == b[1] and all(torch.equal(x, y) for x, y in zip(a[0], b[0], strict=True))


def killed(folder, at=20, **options):
    with pytest.raises(KilledError):
        run(folder, at=at, **options)


def steps(folder):
    return sorted(int(path.name.split("-")[1]) for path in folder.glob("step-*"))


# ---- resuming --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [drawn, shuffled, plain, loader, epochs])
@pytest.mark.parametrize("at", [3, 7, 20, 39])
def test_resumes_to_the_same_numbers(tmp_path, at, data):
    whole = run(None, data=data)
    killed(tmp_path, at, data=data)
    again = run(tmp_path, data=data)
    assert same(whole, again)
    assert again[2] == 40 - at // 7 * 7  # only what the last checkpoint had not yet seen


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": "radam", "weight_decay": 0.1, "schedule": "constant"},
        {"optimizer": "adamw", "accumulate": 2},
        {"precision": "bfloat16"},
        {"compile": "aot_eager"},
    ],
)
def test_resumes_whatever_the_settings(tmp_path, options):
    whole = run(None, data=shuffled, **options)
    killed(tmp_path, at=30, data=shuffled, **options)
    assert same(whole, run(tmp_path, data=shuffled, **options))


@pytest.mark.parametrize(("before", "after"), [(drawn, plain), (plain, drawn), (shuffled, drawn), (drawn, shuffled)])
def test_a_run_does_not_go_on_with_other_data(tmp_path, before, after):
    killed(tmp_path, data=before)
    with pytest.raises(ValueError, match=r"goes on with the data that it began with|position"):
        run(tmp_path, data=after)
    assert same(run(tmp_path, data=before), run(None, data=before))


def test_a_finished_run_is_read_back(tmp_path):
    whole = run(tmp_path)
    again = run(tmp_path)
    assert same(whole, again)
    assert again[2] == 0


def test_the_newest_two_checkpoints_are_kept(tmp_path):
    kept = []
    run(tmp_path, sample_every=1, callback=lambda average, k: kept.append(steps(tmp_path)))
    assert kept[30] == [21, 28]  # during step 31
    assert max(map(len, kept)) == 2
    assert steps(tmp_path) == [35, 40]
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", "step-00000035", "step-00000040"}


def test_what_a_process_left_that_died_after_its_last_checkpoint_is_cleared(tmp_path):
    """Within the deletion of older ones, say: the run is finished, and no write comes that would clear it."""
    run(tmp_path)
    (tmp_path / ".77.old.step-00000028" / "model").mkdir(parents=True)
    run(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", "step-00000035", "step-00000040"}


def test_metrics_of_a_resumed_run_have_each_step_once(tmp_path):
    """What the killed run logged beyond its checkpoint is logged anew, the line that it was writing too."""
    run(tmp_path / "whole")
    killed(tmp_path / "killed", at=27)
    path = tmp_path / "killed" / "metrics.jsonl"
    assert json.loads(path.read_text().splitlines()[-1])["step"] == 24  # beyond the checkpoint of 21 updates
    with path.open("a") as file:
        file.write('{"step": 2')
    run(tmp_path / "killed")
    logged = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "killed")
    ]
    seconds = [line.pop("seconds") for line in logged[1]]
    assert seconds == sorted(seconds)
    for line in logged[0]:
        del line["seconds"]
    assert logged[0] == logged[1]


def test_a_folder_may_be_a_string(tmp_path):
    whole = run(str(tmp_path / "a"))
    killed(str(tmp_path / "b"))
    assert same(whole, run(str(tmp_path / "b")))
    assert steps(tmp_path / "b") == [35, 40]


def test_other_files_beside_the_checkpoints_are_left_alone(tmp_path):
    names = ("step-notes", "step-1", "step-000000099", ".my.step-notes")
    for name in names:
        (tmp_path / name).mkdir()
    whole = run(None)
    killed(tmp_path)
    assert same(whole, run(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {
        "metrics.jsonl",
        "step-00000035",
        "step-00000040",
        *names,
    }


def test_what_a_run_reports_may_change_on_the_way(tmp_path):
    whole = run(None)
    killed(tmp_path)
    assert same(whole, run(tmp_path, checkpoint_every=11, log_every=1))


def test_weights_of_a_checkpoint_load_as_a_map(tmp_path):
    """The last one, raw and averaged; the state is x₁ = 0 there, whatever it is."""
    X = FlowMap(MLP(torch.zeros(3), torch.eye(3), hidden=8, depth=2))

    def loss(X, batch, rng):
        z = torch.randn(8, 3, generator=rng)
        return X.velocity(0.2, 0.7, z, 0.5, z).sub(1).square().mean()

    average, _ = train(X, loss, itertools.count(), TrainConfig(steps=5), folder=tmp_path)
    for part, model in (("model", X), ("ema", average)):
        loaded = FlowMap.from_pretrained(tmp_path / "step-00000005" / part)
        assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))
    assert not torch.equal(X.network.outlet.bias, average.network.outlet.bias)


def elastic():
    data = drawn()
    data.elastic = True
    return data


def test_elastic_data_bring_all_noise_and_leave_no_random_state(tmp_path):
    """The loss gets no generator: see test_sharding.py for what they are for."""
    seen = []

    def loss(model, batch, rng):
        seen.append(rng)
        return model(batch).square().mean()

    train(nn.Linear(3, 1), loss, elastic(), TrainConfig(steps=2), folder=tmp_path)
    assert seen == [None, None]
    state = torch.load(tmp_path / "step-00000002" / "state.pt", weights_only=True)
    assert [set(own) for own in state["processes"]] == [{"data"}]


@pytest.mark.parametrize(("before", "after"), [(drawn, elastic), (elastic, drawn)])
def test_a_run_stays_elastic_or_not(tmp_path, before, after):
    killed(tmp_path, data=before)
    with pytest.raises(ValueError, match=r"other settings.*(data|world) = "):
        run(tmp_path, data=after)


def test_elastic_data_must_know_their_position():
    class Endless:
        elastic = True

        def __iter__(self):
            return itertools.repeat(torch.zeros(1, 3))

    with pytest.raises(ValueError, match="elastic data must have state_dict and load_state_dict, Endless has not"):
        run(None, data=Endless)


def test_what_identifies_a_run_has_not_changed(tmp_path):
    """Checkpoints of version 0.6 are those of runs that can go on."""
    run(tmp_path, tag="a")
    identity = json.loads((tmp_path / "step-00000040" / "run.json").read_text())["identity"]
    assert identity.pop("config").keys() == {
        "steps", "lr", "optimizer", "betas", "weight_decay", "schedule", "warmup", "clip", "decay", "accumulate",
        "precision", "compile", "seed",
    }  # fmt: skip
    assert identity == {"tag": "a", "world": 1, "device": "cpu"}


def test_no_checkpoint_is_older_than_the_config_allows(tmp_path, monkeypatch):
    """A step takes four minutes here: the third after a checkpoint is the first to find it over ten minutes old."""
    minutes, written = itertools.count(step=4), []
    monkeypatch.setattr("mfm_ref.run_state.monotonic", lambda: 60.0 * next(minutes))
    save = Checkpoints.save

    def noted(store, step, *others):
        next(minutes)
        written.append(step)
        return save(store, step, *others)

    monkeypatch.setattr(Checkpoints, "save", noted)
    whole = run(None)
    aged = run(tmp_path, checkpoint_every=7, checkpoint_minutes=10.0)
    assert written[:6] == [3, 6, 7, 10, 13, 14]
    assert same(whole, aged)


# ---- the end of a process ---------------------------------------------------------------------------------


def test_survives_sigkill_at_random_moments_and_within_writes(tmp_path):
    """At eight random calls, eight within a checkpoint and eight times, in four runs: all end as a whole one does."""
    command = [sys.executable, "-m", "tests.killed_run", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=200, check=True)
    found = json.loads(result.stdout)
    assert found["different"] == 0
    assert found["killed"] >= 4 and found["killed_in_write"] >= 4  # runs that ended before their moment are not killed
    assert found["left_half_written"] >= 3
    assert found["left_at_the_end"] == 0  # the next write clears them away


def test_sigterm_saves_and_exits_with_code_0(tmp_path):
    whole, before = run(None), signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path, at=24, happens=lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert stopped.value.code == 0
    assert signal.getsignal(signal.SIGTERM) is before
    assert steps(tmp_path) == [21, 25]
    again = run(tmp_path)
    assert same(whole, again)
    assert again[2] == 15


def test_sigterm_after_the_last_step_is_not_lost(tmp_path):
    """Here it comes with the last picture, after the loop has looked for it."""
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path, sample_every=40, callback=lambda average, k: os.kill(os.getpid(), signal.SIGTERM))
    assert stopped.value.code == 0
    assert steps(tmp_path) == [35, 40]


def test_a_thread_trains_without_watching_for_sigterm(tmp_path):
    found = []
    thread = threading.Thread(target=lambda: found.append(run(tmp_path)))
    thread.start()
    thread.join()
    assert same(found[0], run(None))


@pytest.mark.slow
def test_toy_run_survives_sigkill(tmp_path):
    def start(out):
        return subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(out)], cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.DEVNULL
        )

    assert start(tmp_path / "whole").wait(timeout=120) == 0
    process, deadline = start(tmp_path / "killed"), time.monotonic() + 120
    while not list((tmp_path / "killed" / "checkpoints").glob("map/step-*")):  # the first stage has left a checkpoint
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


# ---- the disk ---------------------------------------------------------------------------------------------


def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path):
    """The limit on the size of a file stands for it: a write beyond fails in the middle, as on a full disk."""
    whole = run(None)
    killed(tmp_path, log_every=1000)
    before = {path: path.read_bytes() for path in tmp_path.glob("step-*/**/*") if path.is_file()}
    sizes = sorted(len(content) for content in before.values())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in (300, sizes[len(sizes) // 2], sizes[-1] - 100):  # no weights fit; they do, but not the state
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
            with pytest.raises(OSError, match=r"step-00000021 could not be written; the last good .*step-00000014"):
                run(tmp_path, log_every=1000)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        after = {path: path.read_bytes() for path in tmp_path.glob("**/*") if path.is_file()}
        assert {path: after[path] for path in before} == before
        assert set(after) - set(before) == {tmp_path / "metrics.jsonl"}
    assert same(whole, run(tmp_path))


@pytest.mark.parametrize("part", ["run.json", "state.pt", "model/model.safetensors", "ema/model.safetensors"])
@pytest.mark.parametrize("harm", ["truncated", "overwritten", "removed"])
def test_a_damaged_checkpoint_is_refused(tmp_path, part, harm):
    """Each file cut to half, replaced by noise of the same size, or missing; the checkpoint before it still serves."""
    whole = run(None)
    killed(tmp_path)
    path = tmp_path / "step-00000014" / part
    content = path.read_bytes()
    if harm == "removed":
        path.unlink()
    else:
        path.write_bytes(content[: len(content) // 2] if harm == "truncated" else os.urandom(len(content)))
    with pytest.raises(ValueError, match=f"step-00000014.*{Path(part).name}"):
        run(tmp_path)
    (tmp_path / "step-00000014").rename(tmp_path / "damaged")
    assert same(whole, run(tmp_path))


def test_a_foreign_folder_is_refused(tmp_path):
    killed(tmp_path)
    path = tmp_path / "step-00000014" / "run.json"
    path.write_text('{"format": "something else"}')
    with pytest.raises(ValueError, match="must be a checkpoint of the format 'mfm_ref checkpoint 2', got 'something"):
        run(tmp_path)
    path.write_text("[1, 2]")
    with pytest.raises(ValueError, match=r"run.json must hold a JSON object, got list"):
        run(tmp_path)
    path.write_text('{"format": "mfm_ref checkpoint 2"}')
    with pytest.raises(ValueError, match=r"other settings"):
        run(tmp_path)


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    killed(tmp_path, tag="a")
    with pytest.raises(ValueError, match=r"other settings.*: tag = 'a' there, 'b' here$"):
        run(tmp_path, tag="b")
    with pytest.raises(
        ValueError, match=r"other settings.*: config.steps = 40 there, 50 here; config.clip = 1.0 there"
    ):
        run(tmp_path, tag="a", steps=50, clip=2.0)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Linear(3, 1), "must fit the model: 0.bias is not in the model; 0.weight is not in.*and 2 more"),
        (nn.Sequential(nn.Linear(3, 5), nn.Dropout(0.5), nn.Linear(5, 1)), r"0.bias is \(4,\).*but \(5,\) of .* model"),
        (
            nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 1)).double(),
            r"float32, but .* of torch.float64",
        ),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_and_fills_nothing(tmp_path, model, message):
    killed(tmp_path)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with pytest.raises(ValueError, match=message):
        run(tmp_path, model=model)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_state_that_is_not_ours_is_refused(tmp_path):
    """Readable, and of the right size for what run.json says, but without what a run needs."""
    identity = {"tag": "", "world": 1, "device": "cpu", "config": TrainConfig(steps=40).identity() | {"warmup": 5}}
    store = Checkpoints(tmp_path, identity)
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 1))
    store.save(7, model, model, {"optimizer": {}, "history": torch.zeros(7)})
    with pytest.raises(ValueError, match=r"must have \['processes', 'schedule', 'seconds'\] too"):
        run(tmp_path)


def test_data_whose_position_could_not_be_read_back_are_refused_at_the_start(tmp_path):
    class Fancy(TensorBatches):
        def state_dict(self):
            return {"path": Path("x")}

    with pytest.raises(ValueError, match=r"must hold tensors and plain values alone, got .*Path"):
        run(tmp_path, data=lambda: Fancy(torch.zeros(50, 3), batch=16))


def test_a_network_whose_config_json_changes_is_refused_at_the_start(tmp_path):
    """Not by the first checkpoint, after hours."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = nn.Linear(1, 1)
            self.network.config = {"sizes": (1, 2)}

    calls = []

    def loss(model, batch, rng):
        calls.append(batch)
        return model.network.weight.sum()

    with pytest.raises(ValueError, match=r"the config of a network must be the same when read back"):
        train(Model(), loss, itertools.count(), TrainConfig(steps=3), folder=tmp_path)
    assert not calls
    train(Model(), loss, itertools.count(), TrainConfig(steps=3))  # nothing is saved
    assert len(calls) == 3


def test_a_state_with_code_in_it_is_not_run(tmp_path):
    """A checkpoint may come from elsewhere: unpickling it must not call anything."""

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    store = Checkpoints(tmp_path, {})
    model = nn.Linear(1, 1)
    path = store.save(1, model, model, {"optimizer": Evil()})
    with pytest.raises(ValueError, match=r"state.pt cannot be read"):
        store.load(path, model, model)
    assert not (tmp_path / "ran").exists()


def test_a_run_that_is_not_finite_leaves_its_checkpoints(tmp_path):
    calls = itertools.count()

    def loss(model, batch, rng):
        return model.weight.sum() * (math.nan if next(calls) == 9 else 1.0)

    config = TrainConfig(steps=20, checkpoint_every=4)
    with pytest.raises(ValueError, match=r"step 9 .*step-00000008"):
        train(nn.Linear(1, 1), loss, itertools.count(), config, folder=tmp_path)
    assert steps(tmp_path) == [4, 8]
