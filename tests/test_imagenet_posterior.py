"""Posteriors of noised images: the law of each method's draws, their noise, the files, and what is refused.

The networks of the statistics are exact, as in test_imagenet_sample.py: the posterior of a Gaussian is known.
"""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from imagenet import encode, features
from imagenet import posterior as script
from imagenet import run as shared
from imagenet.npz import first_rows
from imagenet.pictures import page_of
from imagenet.posterior import lines_of
from imagenet.run import CONTEXTS, DRAWS
from imagenet.vae import VAE, to_uint8
from mfm_ref import FlowMap
from mfm_ref.data import stream_seed
from tests.helpers import LIMIT, moment_scores
from tests.imagenet_tiny import photographs, tiny_sit, tiny_vae
from tests.test_imagenet_sample import MEANS, VAR, Exact

SCALE = 0.5


class Encoded:
    """What `imagenet.latents` reads: six images of two classes, with noise in their latents."""

    n, n_classes, shape, scale = 6, 2, Exact.shape, SCALE
    labels, sha256 = torch.tensor([0, 0, 0, 1, 1, 1]), "of the moments"

    def __init__(self, folder, vae=None):
        self.found = torch.randn(6, 8, 1, 2, generator=torch.Generator().manual_seed(9))
        self.found[:, 4:] = 0.1 + self.found[:, 4:].abs()

    def moments(self, rows):
        return self.found[rows]


@pytest.fixture
def exact(monkeypatch, tmp_path):
    """A run with exact networks: `exact("--times", "0.3")` gives posterior.json and draws (contexts, draws, *D)."""
    (tmp_path / "weights").write_text("any")
    monkeypatch.setattr(script, "Latents", Encoded)
    monkeypatch.setattr(shared, "load", lambda path, kind, **_: Exact(kind or "mfm"))

    def run(*options, out="out"):
        weights = ["--weights", str(tmp_path / "weights"), "--latents", str(tmp_path)]
        script.main([*weights, "--out", str(tmp_path / out), *map(str, options)])
        record = json.loads((tmp_path / out / "posterior.json").read_text())
        folders = ["clean", *(one["folder"] for one in record["posteriors"])]
        found = {name: first_rows(tmp_path / out / name / "latents.npz", 10**6) for name in folders}
        shape = (record["contexts"], -1, *Exact.shape)
        return record, {name: torch.from_numpy(x).reshape(shape) for name, x in found.items()}

    return run


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Folders with tiny networks, an autoencoder, and 24 encoded tiles of photographs."""
    root = tmp_path_factory.mktemp("tiny")
    for kind in ("sit", "mfm"):
        FlowMap(tiny_sit(kind)).save_pretrained(root / kind)
    FlowMap(tiny_sit("dmf", noise_times=True)).save_pretrained(root / "dmf")
    FlowMap(tiny_sit("dmf", n_classes=3, noise_times=True)).save_pretrained(root / "three")
    FlowMap(tiny_sit("mfm", shape=(4, 4, 4))).save_pretrained(root / "small")
    FlowMap(tiny_sit("mfm", n_classes=1)).save_pretrained(root / "one")
    vae, images = str(tiny_vae(root / "vae")), str(photographs(root / "images"))
    encode.run(encode.EncodeConfig(images=images, vae=vae, out=root / "latents", size=64, workers=0))
    return root


def source(*numbers):
    return torch.Generator().manual_seed(stream_seed(*numbers))


def context(row, t, seed=0):
    """x_t of an image of `Encoded`, by its own seed; and its clean latent."""
    rng, (mean, std) = source(seed, row, CONTEXTS), Encoded(None).moments([row])[0].chunk(2)
    clean = SCALE * (mean + std * torch.randn(Exact.shape, generator=rng))
    return (1 - t) * torch.randn(Exact.shape, generator=rng) + t * clean, clean


def posterior(row, t, seed=0):
    """Mean and standard deviation of p(x₁ | x_t, y), by Bayes' rule for a Gaussian."""
    precision = 1 / VAR + t**2 / (1 - t) ** 2
    mean = (MEANS[Encoded.labels[row]] / VAR + t / (1 - t) ** 2 * context(row, t, seed)[0]) / precision
    return mean, precision**-0.5


# ---- the law of the draws --------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [0.0, 0.3, 0.8])
def test_every_method_draws_from_the_posterior(exact, t):
    """In each context, by moments; the posterior of another context does not pass."""
    options = ("--methods", "mfm,glass,sde,again", "--map-steps", "1,3", "--glass-steps", 50, "--sde-steps", 50)
    record, found = exact("--times", t, "--contexts", 2, "--draws", 300, "--batch", 300, *options)
    assert record["rows"] == [0, 3] and record["labels"] == [0, 1]

    def score(draws, row):
        mean, std = (a.expand(Exact.shape).flatten().double() for a in posterior(row, t))
        return moment_scores(draws.flatten(1).double(), mean, torch.diag(std**2))

    assert len(record["posteriors"]) == 5
    for one in record["posteriors"]:
        for draws, row, other in zip(found[one["folder"]], (0, 3), (3, 0), strict=True):
            assert score(draws, row) < LIMIT, (one, row)
            assert score(draws, other) > LIMIT


def test_few_steps_of_a_rollout_do_not(exact):
    """The judgement above sees a wrong law: one Euler step is the posterior's mean."""
    _, found = exact("--times", 0.3, "--methods", "glass", "--glass-steps", 1, "--contexts", 1, "--draws", 5)
    mean, _ = posterior(0, 0.3)
    assert torch.allclose(found["t0.3/glass-1"][0], mean.expand(5, *Exact.shape), atol=1e-5)


@pytest.mark.parametrize(("steps", "tolerance"), [(50, 0.08), (400, 0.01)])
def test_map_and_glass_carry_the_same_noise(exact, steps, tolerance):
    """X_{0,1}(ε) = mean + std ε, with the noise of image, draw and time; GLASS to first order in its step."""
    options = ("--contexts", 2, "--draws", 3, "--batch", 4, "--seed", 2, "--map-steps", "1,2")
    _, found = exact("--times", 0.4, "--methods", "mfm,glass", "--glass-steps", steps, *options)
    for c, row in enumerate((0, 3)):
        mean, std = posterior(row, 0.4, seed=2)
        for d in range(3):
            expected = mean + std * torch.randn(Exact.shape, generator=source(2, row, d, 400_000, DRAWS))
            assert torch.allclose(found["t0.4/mfm-1"][c, d], expected, atol=1e-5)
            assert torch.allclose(found["t0.4/mfm-2"][c, d], expected, atol=1e-5)
            assert torch.allclose(found[f"t0.4/glass-{steps}"][c, d], expected, atol=tolerance)


def test_clean_images_have_the_noise_of_their_encoder(exact):
    _, found = exact("--times", 0.4, "--methods", "mfm", "--contexts", 6, "--batch", 4)
    assert torch.allclose(found["clean"][:, 0], torch.stack([context(row, 0.4)[1] for row in range(6)]), atol=1e-6)


def test_draws_depend_neither_on_their_number_nor_on_the_batch(exact):
    options = ("--times", "0,0.5", "--methods", "mfm,sde", "--map-steps", 2, "--sde-steps", 4, "--contexts", 3)
    _, many = exact(*options, "--draws", 5, "--batch", 8, out="many")
    _, few = exact(*options, "--draws", 2, "--batch", 1, out="few")
    assert all(torch.allclose(few[name], many[name][:, : few[name].shape[1]], atol=1e-5) for name in few)


def test_no_noise_is_used_twice(exact):
    """Between draws, contexts, times and rollouts; only map and GLASS share theirs."""
    options = ("--map-steps", 1, "--glass-steps", 1, "--sde-steps", 1, "--draws", 2, "--contexts", 2)
    seen, generator_of = [], shared.generator_of
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "generator_of", lambda *numbers: seen.append(numbers) or generator_of(*numbers))
        exact("--times", "0,0.5", "--methods", "mfm,glass,sde,again", *options)
    draws = [numbers for numbers in seen if len(numbers) == 5]
    assert len(draws) == 4 * 2 * 4 and len(set(draws)) == 3 * 2 * 4
    assert {numbers[:2] for numbers in seen if len(numbers) == 3} == {(0, 0), (0, 3)}


@pytest.mark.parametrize(
    ("options", "mean", "each"),
    [
        (("--guidance", 2), MEANS[2] + 2 * (MEANS[0] - MEANS[2]), 2),
        (("--teacher", "weights", "--teacher-kind", "sit"), MEANS[0], 1),
        (("--guidance", 2, "--teacher", "weights", "--teacher-guidance", 3), MEANS[2] + 3 * (MEANS[0] - MEANS[2]), 2),
    ],
)
def test_rollouts_have_the_drift_and_the_guidance_of_the_teacher(exact, tmp_path, options, mean, each):
    """At t = 0 in one step a draw is the guided mean; a SiT guides 3 channels of 4. Evaluations are the teacher's."""
    options = [str(tmp_path / o) if o == "weights" else o for o in options]
    record, found = exact(
        "--times", 0, "--methods", "glass,sde", "--glass-steps", 1, "--sde-steps", 1, "--contexts", 1, *options
    )
    for one in record["posteriors"]:
        assert torch.allclose(found[one["folder"]][0], mean.expand(4, *Exact.shape), atol=1e-5)
        assert one["evaluations"] == each


# ---- the files -------------------------------------------------------------------------------------------


def arguments(tiny, out, *options, vae=True):
    """A run of three contexts and two draws, on the command line."""
    given = ["--weights", str(tiny / "mfm"), "--latents", str(tiny / "latents"), "--out", str(out)]
    given += ["--vae", str(tiny / "vae")] if vae else []
    given += ["--contexts", "3", "--draws", "2", "--batch", "4", "--sde-steps", "2", "--guidance", "2.5"]
    return [*given, "--map-steps", "1,2", "--glass-steps", "1", "--times", "0,0.5", *options]


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory, placed_text):
    """The folder of a run with a guided teacher."""
    folder = tmp_path_factory.mktemp("whole")
    script.main(arguments(tiny, folder, "--teacher", str(tiny / "dmf"), "--teacher-guidance", "1.5"))
    return folder


def test_a_folder_for_each_time_method_and_number_of_steps(tiny, whole):
    record = json.loads((whole / "posterior.json").read_text())
    kinds = [
        ("mfm", 1, 1),
        ("mfm", 2, 2),
        ("glass", 1, 2),
        ("sde", 2, 4),
    ]  # evaluations: guidance doubles the teacher's
    assert record["posteriors"] == [
        {"t": t, "method": method, "steps": steps, "evaluations": each, "folder": f"t{t:g}/{method}-{steps}"}
        for t in (0.0, 0.5)
        for method, steps, each in kinds
    ]
    assert (record["contexts"], record["draws"], record["rows"]) == (3, 2, [0, 8, 16])
    assert record["labels"] == [0, 0, 1] and record["order"] == "draw d in context c is row c * draws + d"
    assert record["teacher"]["guidance"] == {"by": "classifier-free guidance", "scale": 1.5, "channels": 4}
    assert record["guidance"] == {"by": "an input of the network", "scale": 2.5}
    for one in record["posteriors"]:
        path = whole / one["folder"] / "samples.npz"
        assert features.count_images(path) == 6
        with np.load(path) as file:
            assert file["arr_0"].shape == (6, 64, 64, 3) and file["arr_1"].tolist() == [0, 0, 0, 0, 1, 1]
    assert not list(whole.rglob(".*"))


def test_clean_images_are_those_that_were_encoded(tiny, whole):
    """Rows 0, 8 and 16 of the folder, decoded with the noise of their encoder."""
    latents, vae = script.Latents(tiny / "latents"), VAE.load(str(tiny / "vae"))
    drawn = []
    for row in (0, 8, 16):
        mean, std = latents.moments([row])[0].chunk(2)
        drawn.append(0.18215 * (mean + std * torch.randn(4, 8, 8, generator=source(0, row, CONTEXTS))))
    with torch.no_grad():
        expected = to_uint8(vae.decode(torch.stack(drawn)))
    assert np.abs(first_rows(whole / "clean" / "samples.npz", 3).astype(int) - expected).max() <= 1


def test_a_picture_for_each_time(whole):
    """As wide as clean, noised and two draws by each of four, and as high as the contexts; images are large enough."""
    for name in ("t0.png", "t0.5.png"):
        with Image.open(whole / name) as page:
            pixels = np.asarray(page.convert("RGB"))
        filled = (pixels < 250).any(2)
        rows, columns = (np.flatnonzero(filled.mean(axis) > 0.4) for axis in (1, 0))
        assert rows[-1] - rows[0] > 3 * 200 and columns[-1] - columns[0] > 10 * 200


def test_pictures_show_what_was_drawn(tiny, whole, monkeypatch):
    """In contexts spread over all: the first and the last two thirds of three."""
    seen = []
    monkeypatch.setattr(script, "lines_of", lambda panels: seen.append(panels) or lines_of(panels))
    teacher = ("--teacher", str(tiny / "dmf"), "--teacher-guidance", "1.5")
    script.main(arguments(tiny, whole, *teacher, "--pictured", "2"))
    names = ["clean", "noised", "MFM, 1 step", "MFM, 2 steps", "GLASS, 1 step", "SDE, 2 steps"]
    assert [list(panels) for panels in seen] == [names, names]
    shown = seen[0]
    assert np.array_equal(shown["clean"][:, 0], first_rows(whole / "clean" / "samples.npz", 3)[[0, 1]])
    draws = first_rows(whole / "t0" / "mfm-1" / "samples.npz", 6).reshape(3, 2, 64, 64, 3)
    assert np.array_equal(shown["MFM, 1 step"], draws[[0, 1]])
    page = page_of([shown["clean"], shown["MFM, 1 step"]])
    assert page.shape == (2 * 66, 3 * 66, 3)
    assert np.array_equal(page[66:130, 66:130], draws[1, 0])
    assert (page[64:66] == 255).all() and (page[:, 64:66] == 255).all()


@pytest.mark.parametrize(("n", "contexts", "expected"), [(4, 8, [0, 2, 4, 6]), (4, 3, [0, 1, 2]), (1, 5, [0])])
def test_pictured_contexts_are_spread_over_all(n, contexts, expected):
    assert script.pictured(script.PosteriorOptions(pictured=n, contexts=contexts)) == expected


def test_panels_are_in_lines_that_a_page_holds():
    panels = {str(k): np.zeros((1, k, 1, 1, 3)) for k in (4, 5, 2, 8, 12)}
    assert [list(line) for line in lines_of(panels)] == [["4", "5"], ["2", "8"], ["12"]]


def test_pictures_are_drawn_when_all_draws_are_there(tiny, tmp_path, monkeypatch):
    """No process waits for the one that draws them."""
    order = []
    monkeypatch.setattr(script, "run_posterior", lambda run, what: order.append(what.folder))
    monkeypatch.setattr(script, "draw_picture", lambda run, vae, t: order.append(t))
    script.main(arguments(tiny, tmp_path, "--methods", "mfm"))
    assert order == ["t0/mfm-1", "t0/mfm-2", "t0.5/mfm-1", "t0.5/mfm-2", 0.0, 0.5]


def test_latents_alone_have_no_pictures(tiny, tmp_path):
    script.main(arguments(tiny, tmp_path, "--methods", "mfm", "--times", "0.5", vae=False))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clean", "posterior.json", "t0.5"]
    assert first_rows(tmp_path / "t0.5" / "mfm-1" / "latents.npz", 9).shape == (6, 4, 8, 8)


# ---- resuming, and what is refused -----------------------------------------------------------------------


def test_a_run_that_stopped_goes_on_and_may_grow(tiny, tmp_path, monkeypatch):
    """An error within a folder; then the rest of it, with more times, methods and steps, and the same bytes."""
    more = ("--methods", "sde,mfm,again", "--map-steps", "4,1")
    script.main(arguments(tiny, tmp_path / "whole", *more, vae=False))
    made, draw = [], script.draw

    def failing(run, what, rows):
        made.append((what.folder, len(rows)))
        if len(made) == 4:
            raise MemoryError
        return draw(run, what, rows)

    monkeypatch.setattr(script, "draw", failing)
    with pytest.raises(MemoryError):
        script.main(arguments(tiny, tmp_path / "part", "--times", "0.5", "--methods", "mfm,sde", vae=False))
    assert made[2:] == [("t0.5/mfm-2", 4), ("t0.5/mfm-2", 2)]
    script.main(arguments(tiny, tmp_path / "part", *more, vae=False))
    assert not [folder for folder, _ in made[4:] if folder == "t0.5/mfm-1"]
    found, wanted = (contents(tmp_path / name) for name in ("part", "whole"))
    assert {name: found[name] for name in wanted} == wanted


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--weights", ""), "--weights must name the weights"),
        (("--latents", "there/is/none"), "latents.json is missing: there/is/none must be one that imagenet.encode"),
        (("--vae", "{other}"), "latents holds latents of the VAE .*, which must decode them"),
        (("--weights", "{small}"), r"have latents \(4, 4, 4\) and labels below 2, as the network has, got \(4, 8, 8\)"),
        (("--weights", "{one}"), r"labels below 1, as the network has, got \(4, 8, 8\) and up to 1"),
        (("--teacher", "{three}"), r"--teacher must have the states and classes of --weights, \(4, 8, 8\) and 2"),
        (("--teacher", "there/is/none"), "there/is/none must be a file or folder that is there"),
        (("--teacher", "{dmf}", "--teacher-guidance", "0.5"), "--guidance must be a number >= 1, .*, got 0.5"),
        (("--weights", "{dmf}"), "the method mfm needs a network with a context: give --methods without it"),
        (("--contexts", "25"), "--contexts must be at most 24, as many as .*latents has, got 25"),
        (("--contexts", "0"), "--contexts must be an integer >= 1, got 0"),
        (("--draws", "0"), "--draws must be an integer >= 1, got 0"),
        (("--batch", "0"), "--batch must be an integer >= 1, got 0"),
        (("--pictured", "0"), "--pictured must be an integer >= 1, got 0"),
        (("--seed", "-1"), "--seed must be an integer >= 0, got -1"),
        (("--sde-steps", "0"), "--sde-steps must be an integer >= 1, got 0"),
        (("--map-steps", "1,0"), "--map-steps must be an integer >= 1, got 0"),
        (("--glass-steps", "0,2"), "--glass-steps must be an integer >= 1, got 0"),
        (("--map-steps", "1,1"), "--map-steps must be different numbers, separated by commas, got '1,1'"),
        (("--glass-steps", "1.5"), "--glass-steps must be different numbers, .*, got '1.5'"),
        (("--teacher-guidance", "1.5"), "--teacher-guidance needs a --teacher"),
        (("--teacher-kind", "dmf"), "--teacher-kind needs a --teacher"),
        (("--guided-channels", "3"), "--guided-channels must be left out where there is no classifier-free guidance"),
        (("--times", "0.5,0.5000001"), "--times must have at most 6 decimals, got 0.5,0.5000001"),
        (("--times", "early"), "--times must be different numbers, separated by commas, got 'early'"),
        (("--times", ""), "--times must be different numbers, separated by commas, got ''"),
        (("--times", "0.5,1"), r"--times must lie in \[0, 1\), got 0.5,1"),
        (("--methods", "mfm,ddim"), "--methods must be some of mfm, glass, sde, again, separated by commas"),
        (("--methods", "mfm,mfm"), "--methods must be some of mfm, glass, sde, again, separated by commas"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_one_line(tiny, tmp_path, options, message):
    other = tiny_vae(tmp_path / "other", seed=1) if "{other}" in options else ""
    names = {name: tiny / name for name in ("small", "one", "three", "dmf")}
    given = [option.format(other=other, **names) for option in options]
    given += ["--guidance", "1"] if "{one}" in options or "{dmf}" in options else []
    with pytest.raises(SystemExit, match=f"^imagenet.posterior: .*{message}") as raised:
        script.main(arguments(tiny, tmp_path / "out", *given))
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_without_a_scale_the_largest_that_the_weights_know_is_taken(tiny, tmp_path):
    """Of the map and of the teacher."""
    teacher = ("--teacher", str(tiny / "mfm"), "--methods", "mfm,glass", "--times", "0.5")
    line = arguments(tiny, tmp_path, *teacher, "--teacher-guidance", "2.5", vae=False)
    script.main(line)
    before = contents(tmp_path)
    at, of_teacher = line.index("--guidance"), line.index("--teacher-guidance")
    script.main(line[:at] + line[at + 2 : of_teacher] + line[of_teacher + 2 :])
    assert contents(tmp_path) == before
    with pytest.raises(SystemExit, match=r"clean/settings.json belongs .*\(guidance was 2.5 and is 1.0\)"):
        script.main([*line, "--guidance", "1"])


def test_a_folder_of_other_settings_is_refused(tiny, whole):
    teacher = ("--teacher", str(tiny / "dmf"))
    for options, message in (
        (("--draws", "3"), "draws was 2 and is 3"),
        (("--seed", "1"), "seed was 0 and is 1"),
        (teacher, r"t0/glass-1/settings.json belongs .*teacher was \{'weights': '[0-9a-f]+', .*1.5"),
    ):
        with pytest.raises(SystemExit, match=f"imagenet.posterior: .*{message}"):
            script.main(arguments(tiny, whole, *options))


def test_a_run_of_less_leaves_the_list_whole(tiny, whole, tmp_path):
    """All folders that agree are listed, whichever run made them; not one without its draws, nor of another teacher."""
    teacher = ("--teacher", str(tiny / "dmf"), "--teacher-guidance", "1.5")
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    wanted = json.loads((whole / "posterior.json").read_text())
    for name in (".12.posterior.json", ".12.t0.png"):
        (tmp_path / name).touch()
    script.main(arguments(tiny, tmp_path, *teacher, "--times", "0.5", "--methods", "mfm", "--map-steps", "1"))
    assert json.loads((tmp_path / "posterior.json").read_text()) == wanted
    assert not list(tmp_path.glob(".*"))
    (tmp_path / "t0" / "mfm-2" / "samples.npz").unlink()
    script.main(arguments(tiny, tmp_path, "--times", "0.5", "--methods", "mfm", "--map-steps", "1"))
    found = json.loads((tmp_path / "posterior.json").read_text())["posteriors"]
    assert [one["folder"] for one in found] == ["t0/mfm-1", "t0.5/mfm-1", "t0.5/mfm-2"]


@pytest.mark.parametrize("settings", [{"method": "mfm"}, {"t": 0.6}, {"t": "0.6", "method": "mfm", "steps": 4}, [3]])
def test_folders_of_others_are_not_listed(tiny, whole, tmp_path, settings):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    (tmp_path / "t0.6" / "mfm-4").mkdir(parents=True)
    (tmp_path / "t0.6" / "mfm-4" / "settings.json").write_text(json.dumps({"settings": settings}))
    script.main(arguments(tiny, tmp_path, "--teacher", str(tiny / "dmf"), "--teacher-guidance", "1.5"))
    found = json.loads((tmp_path / "posterior.json").read_text())
    assert found["posteriors"] == json.loads((whole / "posterior.json").read_text())["posteriors"]


def test_a_folder_under_another_name_is_not_listed(tiny, whole, tmp_path):
    """It would be listed as one that is not there, and the next picture be of its draws."""
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    (tmp_path / "t0" / "mfm-1").rename(tmp_path / "t0" / "mfm-1-old")
    script.main(
        arguments(tiny, tmp_path, "--teacher", str(tiny / "dmf"), "--teacher-guidance", "1.5", "--map-steps", "2")
    )
    found = json.loads((tmp_path / "posterior.json").read_text())["posteriors"]
    assert [one["folder"] for one in found if one["t"] == 0] == ["t0/mfm-2", "t0/glass-1", "t0/sde-2"]


@pytest.mark.parametrize("times", ["-0", "-0.0", "0"])
def test_zero_has_one_folder(times):
    folders = script.posteriors_of(script.PosteriorOptions(times=times, methods="mfm", map_steps="1"))
    assert [what.folder for what in folders] == ["t0/mfm-1"]


def test_the_same_latents_elsewhere_are_the_same(tiny, whole, tmp_path):
    """By what is in them; latents.json also says where the VAE was."""
    shutil.copytree(tiny / "latents", tmp_path / "latents")
    record = json.loads((tmp_path / "latents" / "latents.json").read_text())
    record["vae"]["id"] = "elsewhere"
    (tmp_path / "latents" / "latents.json").write_text(json.dumps(record))
    before = contents(whole / "clean")
    teacher = ("--teacher", str(tiny / "dmf"), "--teacher-guidance", "1.5")
    script.main(arguments(tiny, whole, *teacher, "--latents", str(tmp_path / "latents")))
    assert contents(whole / "clean") == before
