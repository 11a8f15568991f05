"""Steering: laws and costs of every method, seeds of samples, prompts, files, and runs that are killed or refused.

The networks of the laws are exact, the Meta Flow Map of one Gaussian a class, with rewards that are linear in the
latents: what steering leads to is known sample by sample. The others are tiny, with random weights.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from imagenet import run as shared
from imagenet import steer as script
from imagenet.npz import first_rows, write_npz
from imagenet.prompts import class_names
from imagenet.rewards import LinearProbe
from imagenet.run import SAMPLES
from imagenet.steer import PRESETS, SteerOptions
from imagenet.vae import VAE, to_uint8
from mfm_ref import FlowMap
from mfm_ref.data import stream_seed
from mfm_ref.gaussian import gaussian_posterior, gaussian_velocity
from mfm_ref.options import parse
from tests.helpers import LIMIT, moment_scores
from tests.imagenet_tiny import tiny_sit, tiny_vae
from tests.test_imagenet_sample import MEANS, VAR, Exact

ROOT = Path(__file__).parent.parent
PULL = torch.tensor([0.9, -0.7, 0.4, 0.6]).reshape(4, 1, 1)
EVERY = "base,mfm-g,mfm-c,mfm-gf,dps,search,best-of-n"
KILLED = """
import os, signal, sys
from imagenet import steer
from imagenet.shards import Shards

write, left = Shards.write, [4]

def write_and_die(*arguments):
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    left[0] -= 1
    write(*arguments)

Shards.write = write_and_die
steer.main(sys.argv[1:])
"""


class ReadsTx(Exact):
    """The same, reading its context as t·x."""

    reads_tx = True

    def velocity(self, s, u, z, t, context, y=None):
        s, u, t = (a.reshape(-1, 1, 1, 1) for a in (s, u, t))
        mean, std, _ = gaussian_posterior(t, context, MEANS[torch.full((len(z),), 2) if y is None else y], VAR)
        return gaussian_velocity(s, u, z, mean, std**2)


def pull(x):
    """A linear reward of latents (4, 1, 2) or (4, 8, 8)."""
    return (x * PULL.to(x)).mean((-1, -2)).sum(1)


def black_box(x):
    return pull(x)


black_box.differentiable = False


def of_prompts(x, prompts):
    """Up for one class, down for the others; it is called with one prompt at a time, and notes which."""
    seen.append(list(prompts))
    signs = torch.tensor([1.0 if prompt == "a first" else -1.0 for prompt in prompts])
    return signs.to(x) * pull(x)


seen = []
MODULE = "tests.test_imagenet_steer"


@pytest.fixture
def exact(monkeypatch, tmp_path):
    """Rows of steer.json, by folders, of an exact network; and the folder."""
    (tmp_path / "weights").write_text("any")
    count = iter(range(100))

    def steered(network, *options):
        monkeypatch.setattr(shared, "load", lambda *_, **__: network)
        out = tmp_path / str(next(count))
        fixed = ["--weights", str(tmp_path / "weights"), "--out", str(out), "--reward", f"{MODULE}:pull"]
        script.main([*fixed, *map(str, options)])
        return {row["folder"]: row for row in json.loads((out / "steer.json").read_text())["rows"]}, out

    return steered


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Folders with tiny networks and an autoencoder."""
    root = tmp_path_factory.mktemp("tiny")
    FlowMap(tiny_sit("mfm", n_classes=3, reads_tx=True)).save_pretrained(root / "mfm")
    FlowMap(tiny_sit("mfm", n_classes=3)).save_pretrained(root / "reads-x")
    FlowMap(tiny_sit("mfm", n_classes=3, reads_tx=True, guidance=())).save_pretrained(root / "unguided")
    FlowMap(tiny_sit("sit", n_classes=3)).save_pretrained(root / "sit")
    tiny_vae(root / "vae")
    return root


def options_of(tiny, out, *options, weights="mfm"):
    """A run of 5 samples in batches of 2, without a VAE."""
    fixed = ["--weights", str(tiny / weights), "--out", str(out), "--reward", f"{MODULE}:pull", "--scale", "20"]
    return [*fixed, "--count", "5", "--batch", "2", "--steps", "2", "--draws", "2", *options]


def noise(i, seed=0):
    source = torch.Generator().manual_seed(stream_seed(seed, i, SAMPLES))
    return torch.randn(Exact.shape, generator=source)


def reward_values(folder, name):
    """Of rewards.json, the newest."""
    entries = json.loads((folder / "rewards.json").read_text())["rewards"]
    return [entry["values"] for entry in entries if entry["name"] == name][-1]


def latents(folder, n=10_000):
    return torch.from_numpy(first_rows(folder / "latents.npz", n))


# ---- the law ---------------------------------------------------------------------------------------------

GRADIENT = PULL / 2  # of `pull` on two columns, by their mean


@pytest.mark.parametrize(
    ("network", "method", "options", "late"),
    [
        (ReadsTx, "mfm-g-3", ("--scale", 2), 0.0),
        (ReadsTx, "dps-1", ("--scale", 2), 0.0),
        (Exact, "mfm-g-3", ("--scale", 2, "--guide-from", 0.01), 0.01),
        (Exact, "dps-1", ("--scale", 2, "--guide-from", 0.5), 0.5),
        (ReadsTx, "mfm-g-3", ("--scale", 2, "--posterior-steps", 2), 0.0),
        (ReadsTx, "base", ("--scale", 2), 1.0),
    ],
)
def test_each_noise_is_carried_along_the_drift_of_the_tilted_class(exact, network, method, options, late):
    """A linear reward of a Gaussian shifts it by λ Σ a, whose drift is the Doob drift, and the gradient has no noise:
    the samples are those of Euler's steps along it, one by one, and before --guide-from along the class's own."""
    name, _, n = method.rpartition("-") if method != "base" else ("base", "", "1")
    _, out = exact(network(), "--methods", name, "--draws", n, "--steps", 8, "--count", 5, "--batch", 2, *options)
    for i, (y, found) in enumerate(zip(*labelled(out / method), strict=True)):
        x = noise(i)
        for k in range(8):
            t, mean = torch.tensor(k / 8), MEANS[y] + (2 * VAR * GRADIENT if k / 8 >= late else 0)
            x = x + gaussian_velocity(t, t, x, mean, VAR) / 8
        assert torch.allclose(found, x, atol=2e-4, rtol=0)


def labelled(folder):
    with np.load(folder / "latents.npz") as file:
        return torch.from_numpy(file["arr_1"]), torch.from_numpy(file["arr_0"])


def test_steering_reaches_the_tilted_law_and_search_and_best_of_n_do_not(exact):
    """Moments of the samples of one class, in standard errors; those of the base fail."""
    options = ("--labels", 1, "--steps", 40, "--draws", 16, "--count", 200, "--batch", 200, "--scale", 2)
    _, out = exact(ReadsTx(), "--methods", EVERY, *options, "--noise", "independent", "--search-steps", 4)
    mean = (MEANS[1] + 2 * VAR * GRADIENT).expand(Exact.shape).flatten().double()
    cov = torch.diag(VAR.expand(Exact.shape).flatten().double())

    def score(name):
        return float(moment_scores(latents(out / name).flatten(1).double(), mean, cov))

    assert max(score(name) for name in ("mfm-g-16", "mfm-c-16", "mfm-gf-16")) < LIMIT
    assert min(score(name) for name in ("base", "dps-16", "search-16", "best-of-n-16")) > LIMIT


def test_the_reward_rises_with_the_draws(exact):
    """Of what selects, always; of MFM-GF, as one draw says nothing; the samples start from the same noises."""
    options = ("--draws", "1,4,16", "--steps", 6, "--count", 60, "--batch", 60, "--scale", 2, "--guide-from", 0)
    rows, out = exact(ReadsTx(), "--methods", "base,mfm-gf,search,best-of-n,dps", *options)
    mean = {name: row["rewards"][f"{MODULE}:pull"][0] for name, row in rows.items()}
    for method in ("mfm-gf", "search", "best-of-n", "dps"):
        assert mean[f"{method}-1"] < mean[f"{method}-4"] < mean[f"{method}-16"]
    for same in ("mfm-gf-1", "best-of-n-1"):
        assert torch.allclose(latents(out / same), latents(out / "base"), atol=1e-5)
    for name, row in rows.items():
        values = pull(latents(out / name)).double()
        assert row["rewards"][f"{MODULE}:pull"] == pytest.approx([float(values.mean()), float(values.std() / 60**0.5)])
        assert reward_values(out / name, f"{MODULE}:pull") == pytest.approx(values.tolist())


# ---- what it costs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            ("--draws", "1,4"),
            {
                "base": 6, "mfm-g-1": 6 + 24, "mfm-g-4": 6 + 96, "mfm-c-4": 6 + 96, "mfm-gf-4": 6 + 48, "dps-1": 24,
                "dps-4": 96 + 4, "search-1": 12, "search-4": 48, "best-of-n-4": 28,
            },
        ),
        (
            ("--draws", "8", "--guide-from", 0.5, "--posterior-steps", 3, "--search-steps", 2, "--best-of", "2,3"),
            {
                "base": 6, "mfm-g-8": 6 + 8 * 8 * 3, "mfm-gf-8": 6 + 4 * 8 * 3, "dps-8": 8 * (6 + 9) + 8,
                "search-8": 32, "best-of-n-2": 14, "best-of-n-3": 21,
            },
        ),
        (
            ("--draws", "2", "--dynamics", "midpoint", "--guide-from", 0.8),
            {"base": 12, "mfm-g-2": 12 + 8 * 2, "dps-2": 2 * (12 + 6) + 2, "search-2": 24, "best-of-n-2": 26},
        ),
        (("--draws", "2", "--dynamics", "sde", "--rescale"), {"mfm-gf-2": 6 + 24, "dps-2": 50, "best-of-n-2": 14}),
    ],
)  # fmt: skip
def test_what_is_counted_is_the_papers_formula(exact, options, expected):
    """Forward and backward passes of map and reward; and rows forward through the network, as they are."""
    rows, out = exact(ReadsTx(), "--methods", EVERY, "--steps", 6, "--count", 3, "--batch", 2, *options)
    assert all(row["evaluations"] == row["formula"] for row in rows.values())
    assert {name: rows[name]["evaluations"] for name in expected} == expected
    for name, row in rows.items():
        record = json.loads((out / name / "settings.json").read_text())
        assert row["passes"] == record["cost"]["map_forward"] / 3
        assert row["peak_memory"] > 0 and row["seconds"] > 0


# ---- seeds -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """The folder of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole") / "steered"
    script.main(options_of(tiny, folder, "--methods", EVERY))
    return folder


def names_in(folder):
    return sorted(path.parent.name for path in folder.glob("*/settings.json"))


@pytest.mark.parametrize("options", [("--batch", "5"), ("--count", "3", "--batch", "1", "--memory", "1e-9")])
def test_a_sample_depends_neither_on_the_batch_nor_on_the_memory(tiny, whole, tmp_path, options):
    script.main(options_of(tiny, tmp_path, "--methods", EVERY, *options))
    assert len(names_in(whole)) == 7 and names_in(whole) == names_in(tmp_path)
    for name in names_in(whole):
        some = latents(tmp_path / name)
        assert torch.allclose(some, latents(whole / name)[: len(some)], atol=1e-4, rtol=0)
    assert not torch.equal(latents(whole / "mfm-g-2"), latents(whole / "base"))


def subprocess_of(*command):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )


def same(a: Path, b: Path) -> bool:
    """The same samples and rewards, bit for bit, and the same counts: not the seconds and the memory."""
    clock = ("seconds", "peak_memory")
    records = []
    for folder in (a, b):
        rows = json.loads((folder / "steer.json").read_text())["rows"]
        records.append([{key: value for key, value in row.items() if key not in clock} for row in rows])
    files = [f"{name}/{file}" for name in names_in(a) for file in ("latents.npz", "rewards.json")]
    return records[0] == records[1] and all((a / file).read_bytes() == (b / file).read_bytes() for file in files)


@pytest.mark.slow  # test_imagenet_sample.py has the same machinery killed
def test_a_run_that_was_killed_goes_on(tiny, tmp_path):
    """SIGKILL at the second batch of the second folder; to the same bytes and counts."""
    methods = ("--methods", "base,mfm-c,search")
    result = subprocess_of("-c", KILLED, *options_of(tiny, tmp_path / "killed", *methods))
    assert result.returncode == -9, result.stderr
    assert names_in(tmp_path / "killed") == ["base"]
    for name in ("killed", "whole"):
        script.main(options_of(tiny, tmp_path / name, *methods))
    assert same(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.slow
def test_two_processes_make_the_same_files(tiny, tmp_path):
    methods = ("--methods", "mfm-c,best-of-n")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    result = subprocess_of(*torchrun, "-m", "imagenet.steer", *options_of(tiny, tmp_path / "two", *methods))
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("steer.json: 2 folders") == 1
    script.main(options_of(tiny, tmp_path / "one", *methods))
    assert same(tmp_path / "one", tmp_path / "two")


def test_what_is_finished_is_kept_and_rewards_are_added(tiny, whole, monkeypatch):
    """Another reward of finished samples: none is made again, nor is a known reward evaluated but for being tried."""
    known, one = json.loads((whole / "base" / "rewards.json").read_text())["rewards"], pull
    monkeypatch.setattr(script, "draw", None)
    monkeypatch.setattr(sys.modules[__name__], "pull", lambda x: one(x) if len(x) == 1 else fails(x))
    script.main(options_of(tiny, whole, "--methods", EVERY, "--held-out", f"{MODULE}:spread"))
    rows = json.loads((whole / "steer.json").read_text())["rows"]
    for row in rows:
        values = spread(latents(whole / row["folder"]))
        assert row["rewards"][f"{MODULE}:spread"][0] == pytest.approx(float(values.mean()), rel=1e-5)
    kept = json.loads((whole / "base" / "rewards.json").read_text())["rewards"]
    assert kept[:1] == known and [entry["name"] for entry in kept] == [f"{MODULE}:pull", f"{MODULE}:spread"]


def spread(x):
    return x.flatten(1).std(1)


def probe_of(path, level):
    path.parent.mkdir(exist_ok=True)
    LinearProbe(torch.full((4, 2, 2), level), torch.tensor(0.0)).save(path)


def test_a_probe_that_was_fitted_again_is_another_reward(tiny, tmp_path):
    """By its file's content, not its name: steered samples are refused, rewards of the base are evaluated again; a file
    that has only moved is the same, and two of one name are two."""
    probe, moved, out = tmp_path / "a" / "p.safetensors", tmp_path / "b" / "p.safetensors", tmp_path / "out"
    (tmp_path / "b").mkdir()

    def steered(path, *options):
        script.main(options_of(tiny, out, "--reward", f"probe={path}", *options))
        rows = json.loads((out / "steer.json").read_text())["rows"]
        return {row["folder"]: row["rewards"] for row in rows}

    probe_of(probe, 1.0)
    first = steered(probe, "--methods", "base,mfm-gf")
    assert list(first["base"]) == ["probe=p.safetensors"]
    probe.rename(moved)
    assert steered(moved, "--methods", "base,mfm-gf") == first
    probe_of(probe, -2.0)
    with pytest.raises(SystemExit, match=r"belongs to a run with other settings .reward was .*sha256"):
        steered(probe, "--methods", "mfm-gf")
    mean = first["base"]["probe=p.safetensors"][0]
    assert steered(probe, "--methods", "base")["base"]["probe=p.safetensors"][0] == pytest.approx(-2 * mean)
    again = steered(probe, "--methods", "base", "--held-out", f"probe={moved}")["base"]
    assert list(again) == [f"probe={probe}", f"probe={moved}"]
    assert again[f"probe={moved}"] == first["base"]["probe=p.safetensors"]
    assert again[f"probe={probe}"] == pytest.approx([-2 * again[f"probe={moved}"][0], 2 * again[f"probe={moved}"][1]])


# ---- prompts ---------------------------------------------------------------------------------------------


def test_each_sample_is_steered_by_its_own_prompt(exact, monkeypatch, tmp_path):
    """Classes in turn: the reward is of the class of a sample, and a batch has as many calls as prompts."""
    monkeypatch.setattr(sys.modules[__name__], "seen", [])
    (tmp_path / "names").write_text("first\nsecond\n")
    options = ("--reward", f"{MODULE}:of_prompts", "--prompt", "a {class}", "--count", 6, "--batch", 4, "--steps", 4)
    options = (*options, "--names", tmp_path / "names")
    rows, out = exact(ReadsTx(), "--methods", "mfm-g,best-of-n", "--draws", 4, *options, "--scale", 2)
    calls = {tuple(dict.fromkeys(call)) for call in seen}
    assert {name for call in calls for name in call} == {"a first", "a second"}
    steering = [call for call in seen if len(call) % 4 == 0]
    assert all(len(set(call)) == 1 for call in steering[:20])
    y, x = labelled(out / "mfm-g-4")
    for i in range(6):
        sign = 1 if y[i] == 0 else -1
        path = noise(i)
        for k in range(4):
            t = torch.tensor(k / 4)
            path = path + gaussian_velocity(t, t, path, MEANS[y[i]] + sign * 2 * VAR * GRADIENT, VAR) / 4
        assert torch.allclose(x[i], path, atol=2e-4, rtol=0)
    signs = torch.where(y == 0, 1.0, -1.0)
    values = reward_values(out / "mfm-g-4", f"{MODULE}:of_prompts")
    assert values == pytest.approx((signs * pull(x)).tolist(), rel=1e-5)
    assert rows["mfm-g-4"]["evaluations"] == rows["mfm-g-4"]["formula"]


def test_classes_that_are_not_imagenets_need_their_names(tiny, tmp_path, monkeypatch):
    """Without names nothing is sampled; a prompt without {class} needs none; another prompt leaves the base alone."""
    monkeypatch.setattr(sys.modules[__name__], "seen", [])
    reward = ("--reward", f"{MODULE}:of_prompts", "--methods", "base,mfm-gf")
    with pytest.raises(SystemExit, match=r"needs the names of the classes.*--names"):
        script.main(options_of(tiny, tmp_path / "out", *reward))
    assert not seen and not list(tmp_path.glob("out/*"))
    script.main(options_of(tiny, tmp_path / "out", *reward, "--prompt", "a first"))
    assert {prompt for call in seen for prompt in call} == {"a first"}
    (up,) = {tuple(reward_values(tmp_path / "out" / "base", f"{MODULE}:of_prompts"))}
    with pytest.raises(SystemExit, match="prompt was 'a first' and is 'a second'"):
        script.main(options_of(tiny, tmp_path / "out", *reward, "--prompt", "a second"))
    script.main(options_of(tiny, tmp_path / "out", *reward[:2], "--methods", "base", "--prompt", "a second"))
    assert reward_values(tmp_path / "out" / "base", f"{MODULE}:of_prompts") == [-value for value in up]
    settings = json.loads((tmp_path / "out" / "base" / "settings.json").read_text())["settings"]
    assert not {"reward", "scale", "prompt", "names"} & set(settings)


# ---- files -----------------------------------------------------------------------------------------------


def test_images_latents_rewards_tables_and_pictures(tiny, tmp_path, capsys):
    """A VAE: rewards are those of decoded latents, without λ; a black box is searched and measured."""
    options = ("--vae", str(tiny / "vae"), "--reward", "brightness", "--held-out", "compressed-size;0.5*redness")
    script.main(
        options_of(tiny, tmp_path, *options, "--methods", "base,mfm-g,search", "--draws", "1,2", "--labels", "1")
    )
    record = json.loads((tmp_path / "steer.json").read_text())
    assert [row["folder"] for row in record["rows"]] == ["base", "mfm-g-1", "mfm-g-2", "search-1", "search-2"]
    assert record["reward"] == "brightness" and record["scale"] == 20 and record["settings"]["labels"] == "1"
    vae = VAE.load(str(tiny / "vae"))
    for row in record["rows"]:
        x = latents(tmp_path / row["folder"])
        with torch.no_grad():
            images = vae.decode(x)
        kept = first_rows(tmp_path / row["folder"] / "samples.npz", 5)
        assert np.abs(to_uint8(images).astype(int) - kept).max() <= 1
        luma = torch.einsum("bchw,c->b", images, torch.tensor([0.2126, 0.7152, 0.0722])) / images[0, 0].numel()
        assert row["rewards"]["brightness"][0] == pytest.approx(float(luma.mean()), rel=1e-4)
        assert list(row["rewards"]) == ["brightness", "compressed-size", "0.5*redness"]
        pairs = [(x[i] - x[j]).norm() for i in range(5) for j in range(i)]
        assert row["diversity"] == pytest.approx(float(torch.stack(pairs).mean()), rel=1e-4)
    printed, text = capsys.readouterr().out, (tmp_path / "steer.md").read_text()
    assert text.strip() in printed and "| MFM-Search | 2 |" in text and "steer.json: 5 folders" in printed
    for name in ("steer.png", "mfm-g.png", "search.png"):
        with Image.open(tmp_path / name) as page:
            assert min(page.size) > 100
    assert not (tmp_path / "base.png").exists()


@pytest.mark.parametrize("method", ["mfm-g", "mfm-gf"])
def test_no_more_images_are_decoded_together_than_asked(tiny, tmp_path, monkeypatch, method):
    """And no more draws share a graph than fit --memory, which those in more steps fill sooner."""
    together, budgets, decode, measure = [], [], VAE.decode, script.rows_within
    monkeypatch.setattr(VAE, "decode", lambda vae, z: together.append((len(z), z.requires_grad)) or decode(vae, z))
    monkeypatch.setattr(script, "rows_within", lambda *a, **b: budgets.append(measure(*a, **b)) or budgets[-1])
    options = (
        "--vae",
        str(tiny / "vae"),
        "--reward",
        "brightness",
        "--methods",
        method,
        "--draws",
        "4",
        "--count",
        "2",
    )
    for folder, *more in (("a", "--decode", "3"), ("b", "--decode", "2", "--posterior-steps", "4")):
        script.main(options_of(tiny, tmp_path / folder, *options, *more))
        assert max(n for n, _ in together) == int(more[1]) and any(grad for _, grad in together) == (method == "mfm-g")
        together.clear()
    assert budgets[1] < 0.35 * budgets[0]


def test_pictures_have_the_base_the_fewest_and_the_most(tmp_path, monkeypatch):
    drawn = []

    def noted(lines, names, title, path, *, inches):
        drawn.append((lines, path.name))

    monkeypatch.setattr(script, "draw_lines", noted)
    monkeypatch.setattr(script, "first_rows", lambda path, n: np.full((n, 2, 2, 3), len(path.parent.name)))
    config = SteerOptions(out=tmp_path, count=10, methods="base,search,mfm-g", draws="4,32,1")
    rows = [
        {"method": what.method, "n": what.n, "folder": what.folder, "rewards": {"r": [what.n / 8, None]}}
        for what in script.folders_of(config)
    ]
    script.draw_pictures(config, rows, "r")
    (search,), name = drawn[0]
    means = {"base": 0.125, "N = 1": 0.125, "N = 32": 4}
    assert name == "search.png" and list(search) == [f"{head}\nmean reward {mean}" for head, mean in means.items()]
    assert [int(panel.flat[0]) for panel in search.values()] == [len("base"), len("search-1"), len("search-32")]
    assert all(panel.shape == (3, 3, 2, 2, 3) for panel in search.values())
    assert drawn[1][1] == "mfm-g.png"


def test_diversity_is_within_classes_that_are_there_twice(tmp_path):
    x = np.array([[0.0], [3.0], [10.0], [14.0], [99.0]], np.float32)
    path, y = tmp_path / "latents.npz", torch.tensor([0, 0, 1, 1, 2])
    write_npz(path, [x], y.numpy())
    assert script.diversity_of(path, y) == pytest.approx((3 + 4) / 2)
    assert script.diversity_of(path, torch.arange(5)) is None


# ---- options ---------------------------------------------------------------------------------------------


def test_a_preset_has_the_papers_settings_and_typed_options_win():
    def parsed(*options):
        return parse(SteerOptions, "", list(options), presets=("preset", PRESETS))

    config = parsed("--preset", "tabby")
    assert config.labels == "281" and config.prompt.endswith("photograph of a tabby cat.")
    assert config.prompt == f"A high-quality, high-resolution photograph of a {class_names()[281]}."
    assert (config.steps, config.count, config.guidance, config.rescale) == (250, 128, 2.5, True)
    assert (config.draws, config.reward, config.scale) == ("1,2,4,8,16,32", "", 0)
    config = parsed("--steps", "10", "--preset", "tabby", "--no-rescale", "--draws", "3", "--labels", "7")
    assert (config.steps, config.rescale, config.draws, config.labels, config.count) == (10, False, "3", "7", 128)
    assert parsed() == SteerOptions()


def test_a_search_of_the_largest_n_has_the_released_particles():
    """8 particles of 4 samples; all samples of one particle where there are fewer."""
    config = SteerOptions(search_steps=7)
    for n, expected in {32: (8, 4), 4: (1, 4), 2: (1, 2)}.items():
        options = script.options_of(config, script.Steered("search", n))
        assert (options["particles"], options["n"], options["steps"]) == (*expected, 7)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (("--methods", "mfm-g,tds"), "--methods must be some of base, mfm-g, .*, got 'mfm-g,tds'"),
        (("--methods", "base,base"), "--methods must be some of"),
        (("--draws", "0"), "--draws must be an integer >= 1, got 0"),
        (("--draws", "1,x"), "--draws must be different numbers, separated by commas, got '1,x'"),
        (("--best-of", "0"), "--best-of must be an integer >= 1, got 0"),
        (("--draws", "6", "--methods", "search"), "--draws above --search-draws 4 must be multiples .*, got 6"),
        (("--search-draws", "0"), "--search-draws must be an integer >= 1, got 0"),
        (("--search-steps", "-1"), "--search-steps must be an integer >= 0, got -1"),
        (("--count", "0"), "--count must be an integer >= 1, got 0"),
        (("--scale", "inf"), "--scale must be finite and not 0, which steers by nothing, got inf"),
        (("--scale", "0"), "--scale must be finite and not 0, which steers by nothing, got 0.0"),
        (("--reward", ""), "--reward must be given, such as pickscore=FOLDER"),
        (("--decode", "0"), "--decode must be an integer >= 1, got 0"),
        (("--guide-from", "1"), r"--guide-from must lie in \[0, 1\), got 1.0"),
        (("--memory", "0"), "--memory must be positive, got 0.0"),
        (("--reward", "beauty"), "the reward must be brightness, .*, got 'beauty'"),
        (("--held-out", f"{MODULE}:pull"), "--held-out must be rewards other than --reward, each once"),
        (("--reward", f"{MODULE}:black_box", "--methods", "base,dps"), "--methods dps needs a differentiable reward"),
        (("--labels", "3"), "--labels must be balanced, random or a class from 0 to 2, got '3'"),
        (("--reward", f"{MODULE}:fails"), "a reward must take clean data .*RuntimeError: the scorer is gone"),
        (("--methods", "base,mfm-gf", "--held-out", f"{MODULE}:fails"), f"the reward {MODULE}:fails: .*scorer is gone"),
        (
            ("--methods", "base,mfm-g", "--reward", f"{MODULE}:graphless"),
            "needs a differentiable reward, and .*graphless",
        ),
        (("--methods", "base,mfm-gf", "--reward", "brightness"), "the reward brightness: .*--vae"),
        (("--guidance", "3"), "--guidance must be one of the scales"),
    ],
)
def test_bad_options_are_refused(tiny, tmp_path, options, match):
    with pytest.raises(SystemExit, match=f"imagenet.steer: .*{match}"):
        script.main(options_of(tiny, tmp_path / "out", "--methods", "mfm-g,mfm-gf,search,best-of-n", *options))
    assert not list(tmp_path.glob("out/*/settings.json"))


def fails(x):
    raise RuntimeError("the scorer is gone")


def graphless(x):
    return pull(x.detach())


@pytest.mark.parametrize(
    ("weights", "methods", "match"),
    [
        ("reads-x", "mfm-gf,mfm-c", "--guide-from must be above 0 for --methods mfm-c and a network that reads x"),
        ("sit", "base,search", "--methods search needs a network with a context, got one without"),
        ("unguided", "base,mfm-gf", "--guidance must be 1, or an input .* --methods mfm-gf: classifier-free"),
    ],
)
def test_networks_that_cannot_serve_are_refused(tiny, tmp_path, weights, methods, match):
    with pytest.raises(SystemExit, match=match):
        guidance = ("--guidance", "2") if weights == "unguided" else ()
        script.main(options_of(tiny, tmp_path, "--methods", methods, *guidance, weights=weights))
    assert not list(tmp_path.glob("*"))


def test_networks_serve_the_methods_that_they_can(tiny, tmp_path):
    """A drift alone, for Best-of-N; a map that reads x, from a later time on; a black box, without its gradient."""
    script.main(options_of(tiny, tmp_path / "sit", "--methods", "base,best-of-n", weights="sit"))
    free = ("--methods", "base,best-of-n", "--guidance", "2")
    script.main(options_of(tiny, tmp_path / "free", *free, weights="unguided"))
    script.main(options_of(tiny, tmp_path / "x", "--methods", "mfm-g", "--guide-from", "0.01", weights="reads-x"))
    box = ("--reward", f"{MODULE}:black_box")
    script.main(options_of(tiny, tmp_path / "box", "--methods", "mfm-gf,search,best-of-n", *box))
    assert names_in(tmp_path / "sit") == ["base", "best-of-n-2"] and names_in(tmp_path / "x") == ["mfm-g-2"]
    assert len(names_in(tmp_path / "box")) == 3


def test_another_reward_or_scale_is_another_run(tiny, whole):
    with pytest.raises(SystemExit, match=r"belongs to a run with other settings \(scale was 20.0 and is 3.0.*--out"):
        script.main(options_of(tiny, whole, "--scale", "3"))
