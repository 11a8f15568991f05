"""The training script: its stages, what they begin with, how they go on, what they say, and what they would cost."""

import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch.utils.flop_counter import FlopCounterMode

from imagenet import sample, sit, train
from imagenet.batches import GlobalBatches
from imagenet.checkpoints import flow_map_from, load, to_state
from imagenet.cost import HARDWARE, KEPT, cost_of, flops_of
from imagenet.latents import Latents
from imagenet.presets import PRESETS, TrainOptions
from imagenet.proxy import add_line, features
from imagenet.sit import build
from imagenet.stages import law_of, student_of, teacher_of, weights_of
from imagenet.vae import VAE
from mfm_ref import FlowMap
from mfm_ref.objectives import adaptive_weight
from mfm_ref.options import parse
from mfm_ref.paper_recipe import STAGES, Equivalents, draw_rows, forward_equivalents, paper_loss
from tests.imagenet_tiny import CLASSES, tiny_latents, tiny_sit, tiny_vae

ROOT = Path(__file__).parent.parent
COMMON = "--size tiny --batch 8 --micro 4 --warmup 2 --lr 1e-3 --log-every 1 --samples 16"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with latents, and the weights of a tiny network of each kind."""
    root = tmp_path_factory.mktemp("train")
    tiny_latents(root / "latents")
    FlowMap(tiny_sit("sit")).save_pretrained(root / "sit")
    FlowMap(tiny_sit("dmf", noise_times=True)).save_pretrained(root / "dmf")
    FlowMap(tiny_sit("mfm")).save_pretrained(root / "mfm-x")
    return root


def run(home, out, line):
    """The command, on the latents of `home`; {home} stands for it."""
    arguments = f"{COMMON} --latents {{home}}/latents --out {{home}}/{out} {line}"
    train.main(arguments.format(home=home).split())
    return home / out


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def losses(folder):
    """Every number of every line but the seconds."""
    return [
        {name: value for name, value in line.items() if name != "seconds"} for line in lines(folder / "metrics.jsonl")
    ]


def weights(folder):
    return torch.cat([a.flatten() for a in load(folder / "weights").state_dict().values()])


TEACHER = "--teacher {home}/dmf --teacher-scale 2.5"
MFM = f"--stage mfm --init {{home}}/dmf {TEACHER} --guidance 2.5 --reads-tx --steps 6 --checkpoint-every 2"


@pytest.fixture(scope="module")
def whole(home):
    """A run that nothing happened to."""
    return run(home, "whole", f"{MFM} --sample-every 3")


# ---- the stages ------------------------------------------------------------------------------------------


def test_the_ladder_from_nothing_to_a_meta_flow_map(home):
    """Each stage begins with the last one's weights, learns, and leaves what the next and `imagenet.sample` read."""
    flow = run(home, "flow", "--stage flow --steps 30 --lr 5e-3 --clip 0 --sample-every 15")
    found = [line["diagonal"] for line in losses(flow)]
    assert np.mean(found[-5:]) < 0.75 * np.mean(found[:5])
    proxy = lines(flow / "proxy.jsonl")
    assert [(line["step"], line["samples"], line["reference"], line["evaluations"]) for line in proxy] == [
        (15, 16, 24, 10), (30, 16, 24, 10),
    ]  # fmt: skip
    guided = "--guidance 2.5 --steps 3 --sample-every 3"
    run(home, "map", f"--stage map --init {{home}}/flow/weights {guided} --guided-from 0.3 --times logit-normal")
    last = run(
        home,
        "mfm",
        "--stage mfm --init {home}/map/weights --teacher {home}/map/weights --teacher-scale 2.5 --reads-tx " + guided,
    )
    run(home, "mfm-data", f"--stage mfm --init {{home}}/flow/weights {guided} --precision bfloat16 --checkpointing")
    names = {"diagonal", "consistency", "loss", "gradient_norm", "lr", "step"}
    bins = {name for line in losses(last) for name in line} - names
    assert bins <= {f"{term}_s{k / 5:.1f}" for term in ("diagonal", "consistency") for k in range(5)} and len(bins) > 4
    made = {name: load(home / name / "weights").config for name in ("flow", "map", "mfm", "mfm-data")}
    assert [made[name]["encoder_depth"] for name in made] == [None, 3, 3, 3]
    assert [(made[name]["context"], made[name]["reads_tx"]) for name in made] == [
        (False, False), (False, False), (True, True), (True, False),
    ]  # fmt: skip
    assert made["mfm"]["guidance"] == [1.0, 2.5] and made["mfm"]["n_classes"] == len(CLASSES)
    for name, more in (
        ("flow", "--method euler --steps 3"),
        ("map", "--method map"),
        ("mfm", "--guidance 2.5 --steps 2"),
    ):
        options = f"--weights {home}/{name}/weights --count 3 --out {home}/of-{name} {more}"
        sample.main(options.split())
    with np.load(last / "samples" / "step-00000003.npz") as kept:
        assert kept["arr_0"].shape == (16, 4, 8, 8) and np.isfinite(kept["arr_0"]).all()
    distilled = "--stage map --init {home}/map/weights --teacher {home}/map/weights --teacher-scale 1 --steps 2"
    run(home, "of-samples", f"{distilled} --latents {{home}}/of-mfm/latents.npz --batch 4")


def test_the_weights_that_are_left_are_the_average(home, whole):
    """Of the last checkpoint; and settings.json says what they came of."""
    average = torch.cat([a.flatten() for a in load(whole / "step-00000006" / "ema").state_dict().values()])
    assert torch.equal(weights(whole), average)
    record = json.loads((whole / "settings.json").read_text())
    assert record["settings"]["teacher"]["scale"] == 2.5 and record["facts"]["init"] == f"{home}/dmf"
    assert [line["step"] for line in lines(whole / "proxy.jsonl")] == [3, 6]


def test_pictures_are_drawn_where_there_is_a_vae(home):
    vae = VAE.load(str(tiny_vae(home / "vae")))
    tiny_latents(home / "of-vae", vae=vae.identity)
    options = "--stage flow --steps 1 --sample-every 1 --samples 4"
    out = run(home, "pictures", f"{options} --latents {{home}}/of-vae --vae {{home}}/vae")
    assert [path.name for path in (out / "samples").iterdir()] == ["step-00000001.png"]
    with pytest.raises(SystemExit, match="holds latents of the VAE none"):
        run(home, "wrong", f"{options} --vae {{home}}/vae")


# ---- what a stage begins with ----------------------------------------------------------------------------


def config_of(home, line):
    return parse(TrainOptions, "", f"{COMMON} --latents {home}/latents {line}".format(home=home).split())


def rows(n=5):
    g = torch.Generator().manual_seed(0)
    s, u = torch.rand(2, n, generator=g).sort(0).values
    z, x = torch.randn(2, n, 4, 8, 8, generator=g)
    return s, u, z, torch.rand(n, generator=g), x, torch.arange(n) % 3


def test_a_map_begins_as_the_drift_on_its_diagonal(home):
    """Exactly; and jumps see both of their times."""
    base = load(home / "sit")
    made = student_of(config_of(home, "--stage map --init {home}/sit"), (4, 8, 8), 2)
    assert made.two_times and not made.context and made.encoder_depth == 3
    s, u, z, t, x, y = rows()
    with torch.no_grad():
        b = base.velocity(s, s, z, t, x, y)
        assert torch.equal(made.velocity(s, s, z, t, x, y), b)
        v = made.velocity(s, u, z, t, x, y)
        assert (v - b).abs().max() > 1e-3 and (v - base.velocity(u, u, z, t, x, y)).abs().max() > 1e-3
    with pytest.raises(ValueError, match="base must be a SiT, got a network of two times"):
        flow_map_from(made)
    with pytest.raises(ValueError, match="encoder_depth must be given for a base of one time whose size is none"):
        flow_map_from(build("tiny", "sit", shape=[4, 8, 8], depth=3))


@pytest.mark.parametrize("kind", ["sit", "dmf"])
def test_a_meta_flow_map_begins_as_what_it_is_made_of(home, kind):
    base = load(home / kind)
    line = f"--stage mfm --init {{home}}/{kind} --guidance 2.5 --reads-tx"
    made = student_of(config_of(home, line), (4, 8, 8), 2)
    s, u, z, t, x, y = rows()
    with torch.no_grad():
        expected = base.velocity(s, u, z, t, x, y)
        assert torch.allclose(made.velocity(s, u, z, t, t.reshape(-1, 1, 1, 1) * x, y, 1 + t), expected, atol=1e-6)
    assert made.reads_tx and made.guidance == (1.0, 2.5)
    assert student_of(config_of(home, f"--stage mfm --init {{home}}/{kind}"), (4, 8, 8), 2).guidance == ()


def test_published_files_can_be_begun_with(home):
    torch.save(to_state(tiny_sit("dmf", noise_times=True), "dmf"), home / "dmf.pt")
    line = "--stage map --init {home}/dmf.pt --init-kind dmf --num-heads 4 --encoder-depth 3"
    made = student_of(config_of(home, line), (4, 8, 8), 2).state_dict()
    assert all(torch.equal(tensor, made[name]) for name, tensor in load(home / "dmf").state_dict().items())


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ("--stage mfm --init {home}/mfm-x --guidance 2.5 --reads-tx", "--reads-tx is for new maps"),
        ("--stage mfm --init {home}/mfm-x --guidance 3", r"know, \[1.0, 2.5\], got 3.0"),
        ("--stage mfm --init {home}/nothing", "must be a file or folder that is there"),
        ("--stage mfm --init {home}/dmf --teacher {home}/dmf --guidance 2.5", "--teacher-scale must say what guidance"),
        (
            "--stage mfm --init {home}/dmf --teacher {home}/mfm-x --guidance 3",
            r"--teacher knows, \[1.0, 2.5\], got 3.0",
        ),
    ],
)
def test_weights_that_contradict_the_options_are_refused(home, line, match):
    config = config_of(home, line)
    with pytest.raises(ValueError, match=match):
        teacher_of(config, student_of(config, (4, 8, 8), 2))


def test_weights_of_other_latents_or_classes_are_refused(home):
    config = config_of(home, "--stage map --init {home}/dmf --teacher {home}/dmf")
    with pytest.raises(ValueError, match=r"--init must be weights for latents of the shape \(4, 4, 4\)"):
        student_of(config, (4, 4, 4), 2)
    with pytest.raises(ValueError, match="--init must know 3 classes, as the latents have, got 2"):
        student_of(config, (4, 8, 8), 3)
    with pytest.raises(ValueError, match="--teacher must have the classes of the map, 1, got 2"):
        teacher_of(config, build("tiny", "dmf", shape=[4, 8, 8], n_classes=1))


@pytest.mark.parametrize(
    ("line", "scale", "passes"),
    [
        ("--teacher {home}/dmf --teacher-scale 2.5 --guidance 2.5", 2.5, 1),
        ("--teacher {home}/dmf --teacher-scale 2.5 --guidance 2.5 --guidance-rate 0.1", 2.5, 2),
        ("--teacher {home}/dmf --teacher-scale 2.5 --guidance 1", 2.5, 2),
        ("--teacher {home}/dmf.pt --teacher-kind dmf --num-heads 4 --encoder-depth 3 --guidance 2.5", 2.5, 1),
        ("--teacher {home}/dmf --guidance 1 --teacher-scale 1", 1.0, 1),
        ("--teacher {home}/sit --guidance 1 --guidance-rate 0.5", 1.0, 1),
        ("--teacher {home}/sit --guidance 2.5", 1.0, 2),
        ("--teacher {home}/mfm-x --guidance 2.5 --guidance-rate 0.5", 1.0, 1),
    ],
)
def test_a_teacher_makes_one_pass_where_that_is_enough(home, line, scale, passes):
    config = config_of(home, f"--stage mfm --init {{home}}/dmf {line}")
    teacher = teacher_of(config, student_of(config, (4, 8, 8), 2))
    assert (teacher.scale, teacher.passes) == (scale, passes)
    assert not any(p.requires_grad for p in teacher.X.parameters())


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ("", "--stage must be flow, map or mfm"),
        ("--preset x", "--preset must be one of b2-flow, "),
        ("--stage flow --guidance 2", "it takes neither --teacher nor --guidance"),
        ("--stage flow --teacher {home}/dmf", "it takes neither --teacher nor --guidance"),
        ("--preset xl2-distill", "--teacher must be given where --teacher-scale is"),
        ("--stage map --teacher {home}/dmf --guided-from 0.3", "--guided-from is for targets from data"),
        ("--stage map --guided-from 2", r"--guided-from must lie in \[0, 1\], got 2"),
        ("--stage map --guidance 0.5", "guidance must be finite and at least 1, got 0.5"),
        ("--stage map --drop 2", "drop and plain_rate must lie in"),
        ("--stage map --samples 1", "--samples must be an integer >= 2"),
        ("--stage map --guidance 2 --guided-from 0.3 --drop 0", "--drop must be above 0 with --guidance from data"),
        ("--stage map --guided-from 0.3", "--guided-from is where --guidance begins, which must be above 1"),
        ("--stage map --guidance 2 --guidance-rate 0.5", "--guidance-rate must be 0 for a network that does not read"),
        ("--stage map --reads-tx", "--reads-tx is for --stage mfm"),
        ("--preset s2-map", "--init must name the weights that --preset s2-map begins with"),
        ("--stage map --tflops -5", "--tflops must be positive, or 0"),
        ("--stage map --micro 3", "the global batch must be a multiple of micro"),
        ("--stage map --lr -1", "lr must be positive"),
        ("--stage map --latents {home}/none", "latents.json is missing"),
    ],
)
def test_options_that_make_no_run_are_refused(home, line, match):
    with pytest.raises(SystemExit, match=match):
        run(home, "refused", line)
    assert not (home / "refused").exists()


# ---- going on --------------------------------------------------------------------------------------------


def at_call(n, what):
    """`GlobalBatches.__next__`, and before its n-th call a signal to this process."""
    take, left = GlobalBatches.__next__, [n]

    def taken(self):
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), what)
        return take(self)

    return taken


def same(a, b):
    """Whether two runs left the same numbers, to the bit."""
    assert losses(a) == losses(b)
    assert torch.equal(weights(a), weights(b))
    assert lines(a / "proxy.jsonl") == lines(b / "proxy.jsonl")


def test_killed_it_goes_on_to_the_same_numbers(home, whole):
    """By SIGKILL, in the fourth step: with a checkpoint after each, as minutes ask for, though none is due by steps."""
    line = f"{MFM} --sample-every 3 --checkpoint-every 1000 --checkpoint-minutes 1e-9"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads that a fork leaves behind: none is needed
        child = os.fork()
    if child == 0:
        GlobalBatches.__next__ = at_call(7, signal.SIGKILL)
        run(home, "killed", line)
        os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert sorted(path.name for path in (home / "killed").glob("step-*")) == ["step-00000002", "step-00000003"]
    run(home, "killed", line)
    same(home / "killed", whole)


def test_terminated_it_goes_on_with_another_cut(home, whole, monkeypatch):
    """SIGTERM within the second step: a checkpoint, code 0; then in other passes, whose sums round otherwise: 1e-5."""
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(GlobalBatches, "__next__", at_call(3, signal.SIGTERM))
        run(home, "terminated", f"{MFM} --sample-every 3")
    assert ended.value.code == 0 and (home / "terminated" / "step-00000002").exists()
    run(home, "terminated", f"{MFM} --sample-every 3 --micro 8")
    for a, b in zip(losses(home / "terminated"), losses(whole), strict=True):
        assert a == pytest.approx(b, rel=1e-5, abs=1e-6)
    assert len(lines(home / "terminated" / "proxy.jsonl")) == 2


def test_finished_it_is_not_run_again(home, whole, capsys):
    shutil.copytree(whole, home / "finished")
    before = losses(whole)
    run(home, "finished", f"{MFM} --sample-every 3")
    same(home / "finished", whole)
    assert losses(home / "finished") == before


@pytest.mark.slow
def test_two_processes_have_the_same_losses_on_either_engine(home, whole):
    """DDP, FSDP2, and FSDP2 from the checkpoint of one process: 1e-6 of the loss, whose sums round otherwise."""
    shutil.copytree(whole, home / "shared")
    for name in ("step-00000006", "weights"):
        shutil.rmtree(home / "shared" / name)
    options = f"{COMMON} --latents {home}/latents {MFM}".format(home=home)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "tests.trained_run"]
    runs = ["on-ddp=ddp", "on-fsdp=fsdp", "shared=fsdp"]
    found = subprocess.run([*command, str(home), options, *runs], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stderr[-3000:]
    for name in ("on-ddp", "on-fsdp", "shared"):
        for a, b in zip(losses(home / name), losses(whole), strict=True):
            assert a == pytest.approx(b, rel=1e-5, abs=1e-6) and a["loss"] == pytest.approx(b["loss"], rel=1e-6)
        assert torch.allclose(weights(home / name), weights(whole), atol=1e-6)


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ("--guidance 1", r"guidance was 2.5 and is 1.0"),
        ("--drop 0.1", "drop was 0.2 and is 0.1"),
        ("--teacher {home}/sit", "teacher was .*'encoder_depth': 3.* and is .*'encoder_depth': None"),
        ("--teacher-scale 2", "teacher was .*'scale': 2.5.* and is .*'scale': 2.0"),
        ("--init {home}/sit", "begins_with was"),
        ("--latents {home}/others", "latents was"),
        ("--steps 7", "steps was 6 and is 7"),
    ],
)
def test_a_folder_of_another_run_is_refused(home, whole, line, match):
    if "others" in line and not (home / "others").exists():
        tiny_latents(home / "others", n=16)
    with pytest.raises(SystemExit, match=f"belongs to a run with other settings .*{match}"):
        run(home, "whole", f"{MFM} --sample-every 3 {line}")


def test_a_folder_of_other_things_is_refused(home):
    (home / "full").mkdir()
    (home / "full" / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit, match=r"full must be a new folder or one of this script, found notes.txt"):
        run(home, "full", MFM)


# ---- what goes wrong -------------------------------------------------------------------------------------


def test_numbers_that_are_not_finite_end_it(home):
    """With the step, the number, and the checkpoint from which it can go on."""
    with pytest.raises(SystemExit, match=r"at step \d.*step-0000000\d"):
        run(home, "diverged", "--stage flow --steps 9 --lr 1e30 --warmup 0 --clip 0 --checkpoint-every 1")
    assert list((home / "diverged").glob("step-*"))


def test_a_full_disk_ends_it(home, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("mfm_ref.checkpoints.save_model", full)
    with pytest.raises(SystemExit, match=r"step-00000001 could not be written; the last good one is None: .*No space"):
        run(home, "no-space", "--stage flow --steps 3 --checkpoint-every 1")


def test_a_bad_shard_ends_it_and_is_named(home):
    """Mended, the run goes on."""
    folder = tiny_latents(home / "bad")
    path = folder / "shard-00002" / "moments.npy"
    good = path.read_bytes()
    moments = np.load(path)
    moments[5, 1, 3, 2, 1], moments[5, 0, 0, 0, 0] = np.nan, np.inf  # image 21
    np.save(path, moments)
    line = "--stage flow --steps 4 --checkpoint-every 1 --latents {home}/bad"
    with pytest.raises(
        SystemExit, match=r"at step \d: .*bad/shard-00002/moments.npy must hold finite .* image 21.*last good"
    ):
        run(home, "of-bad", line)
    path.write_bytes(good[:-1000])
    with pytest.raises(SystemExit, match=r"bad/shard-00002/moments.npy must be an array that can be read"):
        run(home, "of-bad", line)
    path.write_bytes(good)
    run(home, "of-bad", line)
    assert [line["step"] for line in losses(home / "of-bad")] == [0, 1, 2, 3]


# ---- the proxy -------------------------------------------------------------------------------------------


def test_the_distance_is_that_of_the_latents_that_were_kept(home, whole):
    """By NumPy and SciPy, from the samples in the folder and the data drawn from their moments as recorded."""

    def cells(z):
        parts = (
            z.astype(np.float64).reshape(len(z), 4, 4, 2, 4, 2).transpose(0, 1, 2, 4, 3, 5).reshape(len(z), 4, 4, 4, 4)
        )
        return np.concatenate([parts.mean(-1).reshape(len(z), -1), parts.std(-1).reshape(len(z), -1)], 1)

    from imagenet.proxy import REFERENCE
    from imagenet.run import generator_of

    latents = Latents(home / "latents")
    order = torch.randperm(24, generator=generator_of(0, REFERENCE))
    data = latents.draw(order, [generator_of(0, int(i), REFERENCE) for i in order]).numpy()
    with np.load(whole / "samples" / "step-00000006.npz") as kept:
        samples = kept["arr_0"]
    assert np.allclose(features(torch.from_numpy(samples)), cells(samples))
    a, b = cells(samples), cells(data)
    root = sqrtm(np.cov(a.T) @ np.cov(b.T)).real
    right = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root)
    assert lines(whole / "proxy.jsonl")[-1]["frechet"] == pytest.approx(right, rel=1e-4)


def test_the_features_see_blur():
    """Cells of unchanged means, with what is within them taken away."""
    z = torch.randn(200, 4, 8, 8)
    blurred = torch.nn.functional.avg_pool2d(z, 2).repeat_interleave(2, 2).repeat_interleave(2, 3)
    mean, spread = (features(z) - features(blurred)).chunk(2, 1)
    assert mean.abs().max() < 1e-6 and spread.min() > 0


def test_lines_of_a_run_that_was_killed_are_removed(tmp_path):
    path = tmp_path / "proxy.jsonl"
    for step in (2, 4, 6, 4):
        add_line(path, {"step": step, "frechet": float(step)})
    assert [line["step"] for line in lines(path)] == [2, 4]


# ---- presets and costs -----------------------------------------------------------------------------------


def test_the_terms_of_a_map_from_data_count_alike():
    """As in DMF, whose loss log(m + 0.01) of mean squares m has the gradient 1/(m + 0.01) in both terms."""
    config, numbers = TrainOptions(stage="map"), 256
    weights = weights_of(config, numbers)
    m = torch.tensor([0.5, 2.0], dtype=torch.float64, requires_grad=True)
    (m + 0.01).log().sum().backward()
    for p in (weights["p"], weights["p_consistency"]):
        assert torch.allclose(numbers * adaptive_weight(numbers * m.detach(), p=p, c=weights["c"]), m.grad)
    assert weights_of(dataclasses.replace(config, teacher="x"), numbers)["p"] == 0.5
    assert weights_of(dataclasses.replace(config, stage="flow"), numbers) == {"p": 0.0}


def test_presets_are_the_papers_settings():
    """What the paper's table of settings says, row by row."""
    names = ("batch", "steps", "optimizer", "lr", "beta1", "beta2", "decay", "drop", "warmup", "clip", "guidance")
    found = {}
    for name, preset in PRESETS.items():
        config = parse(TrainOptions, "", ["--preset", name], presets=("preset", PRESETS))
        assert all(getattr(config, field) == value for field, value in preset.items())
        found[name] = tuple(getattr(config, field) for field in names)
        assert config.precision == "bfloat16" and config.compile == "inductor"
    assert found["b2-flow"] == (256, 800_000, "adamw", 1e-4, 0.9, 0.95, 0.9999, 0.2, 0, 0.0, 1.0)
    assert found["b2-data"] == (512, 100_000, "radam", 1e-4, 0.9, 0.999, 0.9999, 0.2, 2000, 1.5, 2.5)
    assert found["xl2-distill"] == (360, *found["b2-data"][1:])
    assert found["xl2-flow"] == (256, 4_000_000, *found["b2-flow"][2:])
    assert found["xl2-map"] == (256, 400_000, "adamw", 1e-4, 0.9, 0.95, 0.9999, 0.1, 0, 1.0, 2.5)
    assert PRESETS["xl2-map"]["guided_from"] == 0.3
    epochs = {name: round(found[name][0] * found[name][1] / 1_281_167) for name in found}
    assert [epochs[name] for name in ("b2-flow", "b2-data", "xl2-flow", "xl2-map", "xl2-distill")] == [
        160,
        40,
        799,
        80,
        28,
    ]


def dry(capsys, line):
    train.main([*line.split(), "--dry-run"])
    text = capsys.readouterr().out
    return dict(row.split(maxsplit=1) for row in text.splitlines() if len(row.split(maxsplit=1)) == 2), text


def test_a_dry_run_says_what_a_run_would_cost(home, tmp_path, monkeypatch, capsys):
    """XL/2 by the paper's recipe, on 8 H100s; the counts of the published networks; nothing is written."""
    monkeypatch.chdir(tmp_path)
    found, text = dry(capsys, "--preset xl2-distill --teacher kyungmnlee/DMF --gpus 8 --micro 45")
    assert found["parameters"] == "684.3 M" and found["batch"] == "360" and found["drop"] == "0.2"
    flops = 360 * (8 + 2) * 237.3e12 / 1e3
    assert float(text.split("operations of an update")[1].split()[0]) == pytest.approx(flops / 1e12, rel=2e-3)
    assert float(found["days"]) == pytest.approx(1e5 * flops / (8 * 0.4 * 989e12) / 86400, rel=1e-2)
    assert "8 of the student, 2 of the teacher" in text and "8 × h100 at 395.6 TFLOP/s" in text
    assert dry(capsys, "--preset b2-flow --tflops 100")[0]["parameters"] == "130.5 M"
    assert dry(capsys, "--preset xl2-map")[0]["parameters"] == "675.1 M"
    taught = TEACHER.format(home=home)
    line = f"--stage mfm --init {home}/dmf {taught} --guidance 2.5 --latents {home}/latents --batch 8"
    mine = sum(p.numel() for p in student_of(config_of(home, line), (4, 8, 8), 2).parameters())
    assert dry(capsys, line)[0]["parameters"] == f"{mine / 1e6:.1f} M"
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(SystemExit, match=r"2 · 3, got 8"):
        train.main([*line.split(), "--dry-run", "--gpus", "3", "--micro", "2"])


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("source", ["data", "guided", "teacher"])
def test_a_step_takes_the_operations_that_are_counted(home, stage, source, monkeypatch):
    """By torch's own count of matrix products, with attention written out, which it can count: in units of a forward
    pass that of the table, 4 % off at most: embeddings need no gradient of their inputs, products of two tangents take
    a third product."""
    if stage == "flow" and source != "data":
        return
    monkeypatch.setattr(sit, "differentiating", lambda: True)
    guided, teacher = source == "guided", source == "teacher"
    line = f"--stage {stage}" + (" --guidance 2.5" if stage != "flow" else "")
    config = config_of(home, line + (" --teacher {home}/dmf --teacher-scale 2.5" if teacher else ""))
    depths = {"depth": 8} if stage == "flow" else {"depth": 8, "encoder_depth": 6}
    network = build("tiny", "sit" if stage == "flow" else "dmf", width=96, shape=[4, 8, 8], n_classes=2, **depths)
    found = teacher_of(config, network)
    law = law_of(config, network.null_class)
    x1, y = torch.randn(4, 4, 8, 8), torch.zeros(4).long()
    r, n = draw_rows(law, x1, y, [torch.Generator().manual_seed(i) for i in range(4)])
    with FlopCounterMode(display=False) as counter:
        loss = paper_loss(FlowMap(network), r, n, teacher=found, guided_from=0.0 if guided else None)
        sum(loss.terms.values()).backward()
    passes = forward_equivalents(stage, guided=guided, teacher=found.passes if teacher else 0)
    taught = passes.teacher * flops_of(found.X.network) if teacher else 0
    counted = (counter.get_total_flops() / 4 - taught) / flops_of(network)
    assert counted == pytest.approx(passes.student, rel=0.04)


@pytest.mark.parametrize("precision", list(KEPT))
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_memory_of_activations_is_what_is_kept(precision, checkpointing):
    """Against the bytes that torch keeps for the backward pass, within a quarter. Weights apart, and what autocast
    makes of them: of the blocks, where these are not recomputed."""
    network = build("tiny", "sit", shape=[4, 16, 16], width=192, depth=6, n_classes=2)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter.data, std=0.02)
    network.checkpointing = checkpointing
    held, weights = {}, {p.untyped_storage().data_ptr() for p in network.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            held[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    z, time = torch.randn(4, 4, 16, 16), torch.rand(4)
    dtype = torch.bfloat16 if precision == "bfloat16" else None
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", dtype, enabled=dtype is not None),
    ):
        network.velocity(time, time, z, time, z).sum()
    cost = cost_of(
        network, None, Equivalents(3, 0, 3), batch=4, micro=4, rows=1, steps=1, gpus=1, rate=1e12,
        checkpointing=checkpointing, precision=precision,
    )  # fmt: skip
    one_block = KEPT[precision] * 4 * 64 * 192 if checkpointing else 0  # recomputed in the backward pass
    rounded = cost.states - 20 * cost.parameters
    assert rounded == (2 * cost.parameters if precision == "bfloat16" else 0)
    kept = sum(size for size, _ in held.values())
    if rounded and not checkpointing:
        kept -= 2 * sum(p.numel() for p in network.blocks.parameters())
    assert kept == pytest.approx(cost.activations - one_block, rel=0.25)


def test_shards_divide_what_is_trained_and_not_the_teacher():
    network = build("tiny", "dmf", shape=[4, 8, 8])
    n = sum(p.numel() for p in network.parameters())
    options = {"batch": 8, "micro": 1, "rows": 2, "steps": 10, "rate": 1e12}
    alone = cost_of(network, network, Equivalents(8, 2, 9), gpus=1, **options)
    four = cost_of(network, network, Equivalents(8, 2, 9), gpus=4, sharded=True, **options)
    assert alone.states == (20 + 2 + 4) * n and four.states == (5 + 2 + 4) * n
    assert alone.days == 4 * four.days == 10 * 8 * 10 * flops_of(network) / 1e12 / 86400
    assert (
        cost_of(network, network, Equivalents(8, 2, 9), gpus=1, checkpointing=True, **options).flops
        == 1.2 * alone.flops
    )
    assert set(HARDWARE) == {"h100", "h200", "a100"} and dataclasses.is_dataclass(TrainOptions)
