"""`python -m imagenet.evaluate` on posteriors of Gaussian images, of which the truth is known."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.special import logsumexp

from imagenet import evaluate_report
from imagenet.evaluate import agreement, main
from imagenet.evaluate_report import draw_curves, table
from imagenet.prompts import class_names
from imagenet.rewards import LinearProbe
from tests.strategies import rng

CONTEXTS, DRAWS, SIDE = 24, 6, 4
TIMES = (0.2, 0.5)
METHODS = (("mfm", 1), ("mfm", 2), ("glass", 1), ("glass", 4), ("sde", 200), ("again", 200))


def pixels(x):
    """An extractor of four features."""
    return x[:, :2, 0, :2].flatten(1).float()


def two_pixels(x):
    """An extractor of two features."""
    return x[:, :2, 0, 0].float()


def never(x):
    """An extractor that must not be called."""
    pytest.fail("features were taken")


def coupled(x):
    """A reward that depends on the batch."""
    return x.flatten(1).mean(1) - x.mean()


def flat(x):
    """A reward that is the same for all images."""
    return torch.ones(len(x))


def half(x):
    """A reward of the first row alone: 0 for dark images, else 1."""
    return (x[:, 0, 0, 0] > 0.5).float()


def lettered(x, prompts):
    """A reward that reads prompts: the brightness by the length of the prompt."""
    return x.mean((1, 2, 3)) * torch.tensor([len(prompt) for prompt in prompts])


def as_images(x):
    return np.clip(np.rint(x), 0, 255).astype(np.uint8)


def write_posteriors(folder, contexts=CONTEXTS, draws=DRAWS, methods=METHODS, times=TIMES):
    """What imagenet.posterior leaves of images N(128, 40² I) noised to t, whose posteriors have one spread.

    The map and the SDE rollouts are exact, GLASS rollouts of n evaluations have 1 − 1/n of the spread: one evaluation
    is the posterior's mean.
    """
    noise = np.random.default_rng(0)
    clean = 40 * noise.standard_normal((contexts, SIDE, SIDE, 3))
    (folder / "clean").mkdir(parents=True)
    np.savez(folder / "clean" / "samples.npz", arr_0=as_images(128 + clean), arr_1=np.zeros(contexts))
    entries = []
    for t in times:
        x = t * clean + (1 - t) * 40 * noise.standard_normal(clean.shape)
        mean, spread = t * x / (t**2 + (1 - t) ** 2), 40 * (1 - t) / math.hypot(t, 1 - t)
        for method, n in methods:
            share = 1 - 1 / n if method == "glass" else 1
            drawn = mean[:, None] + share * spread * noise.standard_normal((contexts, draws, *clean.shape[1:]))
            where = f"t{t:g}/{method}-{n}"
            (folder / where).mkdir(parents=True)
            flat = as_images(128 + drawn).reshape(contexts * draws, *clean.shape[1:])
            np.savez(folder / where / "samples.npz", arr_0=flat, arr_1=np.zeros(contexts * draws))
            entries.append({"t": t, "method": method, "steps": n, "evaluations": float(n), "folder": where})
    record = {"contexts": contexts, "draws": draws, "rows": [0], "posteriors": entries, "device": "cpu"}
    record["labels"] = [k % 5 for k in range(contexts)]
    (folder / "posterior.json").write_text(json.dumps(record))
    return folder


@pytest.fixture(scope="module")
def posteriors(tmp_path_factory):
    return write_posteriors(tmp_path_factory.mktemp("runs") / "posteriors")


def read(path):
    """JSON in the strict sense: no NaN, no infinity."""
    return json.loads(path.read_text(), parse_constant=lambda word: pytest.fail(f"{word} in {path}"))


def run(*arguments):
    main([str(argument) for argument in arguments])


def refused(*arguments):
    """The message with which the program ends."""
    with pytest.raises(SystemExit) as end:
        run(*arguments)
    message = str(end.value.code)
    assert message.startswith("imagenet.evaluate: ") and "\n" not in message
    return message


# ---- fid -------------------------------------------------------------------------------------------------


def test_fid_is_that_of_the_features_with_all_settings(tmp_path, capsys):
    """Two features, in closed form by NumPy: commuting or not, (AB)^½ has trace √(tr AB + 2 √det AB)."""
    sets = [as_images(128 + 30 * np.random.default_rng(k).standard_normal((40, 4, 4, 3)) + 9 * k) for k in range(2)]
    for name, x in zip(("samples", "reference"), sets, strict=True):
        np.savez(tmp_path / f"{name}.npz", arr_0=x)
    (tmp_path / "settings.json").write_text('{"n": 40, "settings": {"method": "heun"}}')
    files = ["--samples", tmp_path / "samples.npz", "--reference", tmp_path / "reference.npz"]
    run("fid", *files, "--features", f"{__name__}:two_pixels", "--batch", 7)
    found = read(tmp_path / "fid.json")
    x, y = (a[:, 0, 0, :2].astype(float) for a in sets)
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = math.sqrt(np.trace(a @ b) + 2 * math.sqrt(np.linalg.det(a @ b)))
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a) + np.trace(b) - 2 * root
    assert found["distance"] == pytest.approx(expected, rel=1e-9)
    assert found["samples"] == {
        "file": str(tmp_path / "samples.npz"), "images": 40, "size": 2, "features": f"{__name__}:two_pixels",
    }  # fmt: skip
    assert found["sampling"]["settings"] == {"method": "heun"}
    assert (found["settings"]["batch"], found["torch"], found["remarks"]) == (7, torch.__version__, [])
    shown = capsys.readouterr().out
    assert shown.startswith(f"Fréchet distance ({__name__}:two_pixels): {found['distance']:.6g} of ")
    assert shown.count("\n") == 1
    assert "samples.npz (40 images) to " in shown


def test_fid_of_equal_sets_is_zero_and_few_images_are_noted(tmp_path, capsys):
    np.savez(tmp_path / "a.npz", arr_0=as_images(np.random.default_rng(0).uniform(0, 255, (4, 4, 4, 3))))
    out = tmp_path / "there" / "result.json"
    files = ["--samples", tmp_path / "a.npz", "--reference", tmp_path / "a.npz"]
    run("fid", *files, "--features", f"{__name__}:pixels", "--out", out)
    found = read(out)
    assert 0 <= found["distance"] < 1e-6
    assert found["measure"] == f"Fréchet distance ({__name__}:pixels)"
    assert "a.npz has 4 images for 4 features: the covariance lacks rank" in found["remarks"][0]
    assert "note: " in capsys.readouterr().out


def test_statistics_that_are_kept_stand_for_the_images(tmp_path, capsys):
    for k in range(2):
        np.savez(tmp_path / f"{k}.npz", arr_0=as_images(np.random.default_rng(k).uniform(0, 255, (9, 4, 4, 3))))
    options = ["--features", f"{__name__}:pixels"]
    run("fid", "--samples", tmp_path / "0.npz", "--save-statistics", tmp_path / "kept.npz", *options)
    assert "kept.npz has the statistics of" in capsys.readouterr().out
    assert not (tmp_path / "fid.json").exists()
    run("fid", "--samples", tmp_path / "1.npz", "--reference", tmp_path / "0.npz", *options)
    by_images = read(tmp_path / "fid.json")["distance"]
    run("fid", "--samples", tmp_path / "1.npz", "--reference", tmp_path / "kept.npz", *options)
    assert read(tmp_path / "fid.json")["distance"] == by_images > 0
    other = ["--features", f"{__name__}:two_pixels"]
    assert "1.npz has 2 and" in refused(
        "fid", "--samples", tmp_path / "1.npz", "--reference", tmp_path / "kept.npz", *other
    )


def test_fid_refuses_what_is_missing(tmp_path):
    assert "fid needs --samples, and --reference or --save-statistics" in refused("fid", "--samples", "a.npz")
    assert (
        "a.npz must be a readable npz file with uint8 images arr_0 or statistics mu and sigma, or a folder of images"
        in refused("fid", "--samples", "a.npz", "--reference", "b.npz")
    )
    assert "--device must" in refused("fid", "--device", "abacus")


def test_fid_of_a_folder_is_that_of_its_images(tmp_path):
    """Beside a settings.json of something else, which the folder is not from."""
    sets = [as_images(np.random.default_rng(k).uniform(0, 255, (9, 4, 4, 3))) for k in range(2)]
    for k, x in enumerate(sets):
        (tmp_path / f"{k}").mkdir()
        np.savez(tmp_path / f"{k}.npz", arr_0=x)
        for i, image in enumerate(x):
            Image.fromarray(image).save(tmp_path / f"{k}" / f"{i}.png")
    (tmp_path / "settings.json").write_text("{}")
    found = []
    for end in (".npz", ""):
        files = ["--samples", tmp_path / f"0{end}", "--reference", tmp_path / f"1{end}"]
        run("fid", *files, "--features", f"{__name__}:pixels", "--size", 4)
        found.append(read(tmp_path / "fid.json"))
    assert found[0]["distance"] == pytest.approx(found[1]["distance"], rel=1e-12)
    assert [one["sampling"] for one in found] == [{}, None]


@pytest.fixture
def two_sets(tmp_path, monkeypatch):
    """a.npz and b.npz in the current folder, their settings.json, and a folder."""
    for name in "ab":
        np.savez(tmp_path / f"{name}.npz", arr_0=as_images(np.random.default_rng(0).uniform(0, 255, (9, 4, 4, 3))))
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("b.npz")
    (tmp_path / "network.pt").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("option", ["--out", "--save-statistics"])
@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("a.npz", "must be another file"),
        ("folder/../b.npz", "must be another file"),
        ("link", "must be another file"),
        ("folder", "must be a file that can be written, got folder"),
        ("/", "must be a file that can be written, got /"),
        ("a.npz/there/x", "must be a file that can be written, got a.npz/there/x"),
    ],
)
def test_fid_replaces_no_input_and_takes_no_features_for_a_result_that_cannot_be_kept(two_sets, option, path, words):
    before = {name: (two_sets / name).read_bytes() for name in ("a.npz", "b.npz")}
    files = ["--samples", two_sets / "a.npz", "--reference", "b.npz", "--features", f"{__name__}:never"]
    assert f"{option} {words}" in refused("fid", *files, option, path)
    assert before == {name: (two_sets / name).read_bytes() for name in before}
    assert (two_sets / "link").is_symlink()


def test_fid_finds_other_bad_paths_before_it_takes_features(two_sets, monkeypatch):
    """Of the reference; two results in one file; the file of the extractor; a folder that is not to be written in."""
    files = ["--samples", "a.npz", "--reference", "b.npz"]
    options = [*files, "--features", f"{__name__}:never"]
    assert "c.npz must be a readable npz file" in refused("fid", *options, "--reference", "c.npz")
    assert "--out must be another file" in refused("fid", *options, "--save-statistics", "x", "--out", "x")
    assert "--out must be another file" in refused("fid", *files, "--features", "network.pt", "--out", "network.pt")
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert "--out must be a file that can be written" in refused("fid", *options, "--out", "folder/x.json")


def test_fid_of_the_current_folder_is_beside_it(two_sets, monkeypatch):
    for k, image in enumerate(np.load("a.npz")["arr_0"]):
        Image.fromarray(image).save(f"folder/{k}.png")
    monkeypatch.chdir("folder")
    run("fid", "--samples", ".", "--reference", "../b.npz", "--features", f"{__name__}:pixels", "--size", 4)
    assert read(two_sets / "fid.json")["distance"] < 1e-6


@pytest.mark.parametrize("text", ["[1]", "no JSON", '{"x": NaN}', "\xff"])
def test_a_settings_file_of_something_else_is_none(two_sets, text):
    (two_sets / "settings.json").write_text(text, encoding="latin-1")
    run("fid", "--samples", "a.npz", "--reference", "b.npz", "--features", f"{__name__}:pixels")
    assert read(two_sets / "fid.json")["sampling"] is None


def test_many_processes_are_refused(monkeypatch):
    """Each would do everything, and write the same files."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "must be one process, without torchrun, got 2 processes" in refused("fid", "--samples", "a.npz")


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("fid", ["Fréchet distance of samples", "needed: --samples, and --reference or --save-statistics"]),
        ("recovery", ["Fréchet distances of posteriors", "needed: --posteriors", "replaced if there"]),
        ("values", ["correlation of values", "needed: --posteriors", "values-REWARD.json"]),
    ],
)
def test_help_says_what_is_needed(command, words, capsys):
    with pytest.raises(SystemExit):
        run(command, "--help")
    shown = " ".join(capsys.readouterr().out.split())
    assert all(word in shown for word in [f"usage: python -m imagenet.evaluate {command} ", *words])


# ---- recovery --------------------------------------------------------------------------------------------


def test_recovery_tells_exact_draws_from_means(posteriors, tmp_path, capsys):
    """By evaluations, at each time; the shrunken rollouts are far, the map as near as the SDE rollouts."""
    run("recovery", "--posteriors", posteriors, "--features", f"{__name__}:pixels", "--out", tmp_path)
    found = read(tmp_path / "recovery.json")
    fids = {(one["t"], one["method"], one["evaluations"]): one["distance"] for one in found["results"]}
    assert list(fids) == [(t, *method) for t in TIMES for method in METHODS]
    assert fids[0.2, "glass", 1] > 3 * fids[0.2, "glass", 4] > 3 * fids[0.2, "mfm", 1]
    assert fids[0.2, "mfm", 1] == pytest.approx(fids[0.2, "sde", 200], rel=0.8)
    assert found["reference"]["file"] == str(posteriors / "clean" / "samples.npz")
    assert found["posteriors"] == {"contexts": CONTEXTS, "draws": DRAWS, "device": "cpu"}
    text = (tmp_path / "recovery.md").read_text()
    assert text.startswith(f"| Fréchet distance ({__name__}:pixels) | evaluations | t = 0.2 | t = 0.5 |\n| --- |")
    assert f"| GLASS rollout | 4 | {fids[0.2, 'glass', 4]:.4g} | {fids[0.5, 'glass', 4]:.4g} |" in text
    assert f"{DRAWS} posterior draws for each of {CONTEXTS} noised images" in text
    assert capsys.readouterr().out == text
    assert (tmp_path / "recovery.png").read_bytes().startswith(b"\x89PNG")


def test_recovery_is_fid_of_each_folder(posteriors, tmp_path):
    options = ["--features", f"{__name__}:pixels"]
    np.savez(tmp_path / "other.npz", mu=np.full(4, 100.0), sigma=900 * np.eye(4))
    run("recovery", "--posteriors", posteriors, "--reference", tmp_path / "other.npz", "--out", tmp_path, *options)
    samples = posteriors / "t0.5" / "mfm-2" / "samples.npz"
    run("fid", "--samples", samples, "--reference", tmp_path / "other.npz", "--out", tmp_path / "fid.json", *options)
    entry = {"t": 0.5, "method": "mfm", "evaluations": 2.0, "distance": read(tmp_path / "fid.json")["distance"]}
    assert entry in read(tmp_path / "recovery.json")["results"]


def test_recovery_and_values_of_latents_alone_ask_for_a_vae(tmp_path):
    folder = write_posteriors(tmp_path / "p", contexts=3, draws=2, methods=(("mfm", 1), ("sde", 9)), times=(0.5,))
    for path in folder.rglob("samples.npz"):
        path.rename(path.with_name("latents.npz"))
    for command in ("recovery", "values"):
        assert "there are only latents: give imagenet.posterior a --vae" in refused(command, "--posteriors", folder)


def test_the_title_says_what_the_distance_is_to(posteriors, tmp_path):
    options = ["--posteriors", posteriors, "--out", tmp_path, "--features", f"{__name__}:pixels"]
    for reference, words in (("", "the clean ones"), (posteriors / "clean" / "samples.npz", "the reference")):
        run("recovery", *options, "--reference", reference)
        assert read(tmp_path / "recovery.json")["title"] == f"Distance of recovered images to {words}"


# ---- values ----------------------------------------------------------------------------------------------


def test_values_are_log_mean_exp_over_the_draws_of_a_context(posteriors, tmp_path, capsys):
    """Pearson r, root mean square error and jackknife by NumPy and SciPy, with 2 draws and with all."""
    run("values", "--posteriors", posteriors, "--reward", "redness", "--scale", 30, "--draws", "2,6", "--out", tmp_path)
    found = read(tmp_path / "values-redness.json")

    def value(where, draws):
        x = (
            np.load(posteriors / where / "samples.npz")["arr_0"].reshape(CONTEXTS, DRAWS, SIDE, SIDE, 3)[:, :draws]
            / 255
        )
        red, green, blue = (x[..., k].mean((-1, -2)) for k in range(3))
        return logsumexp(30 * (red - (green + blue) / 2), axis=1) - np.log(draws)

    assert len(found["results"]) == 2 * 2 * (len(METHODS) - 1)
    for one in found["results"]:
        a = value(f"t{one['t']:g}/{one['method']}-{one['evaluations']:g}", one["draws"])
        b = value(f"t{one['t']:g}/sde-200", DRAWS)
        assert one["r"] == pytest.approx(np.corrcoef(a, b)[0, 1], abs=1e-5)
        assert one["error"] == pytest.approx(np.sqrt(((a - b) ** 2).mean()), rel=1e-4)
        assert one["value_evaluations"] == one["draws"] * one["evaluations"]
        left = [np.corrcoef(np.delete(a, i), np.delete(b, i))[0, 1] for i in range(CONTEXTS)]
        assert one["r_error"] == pytest.approx(np.sqrt((CONTEXTS - 1) * np.var(left)), rel=1e-3)
        assert one["why"] is None
    text = (tmp_path / "values-redness.md").read_text()
    assert text.startswith("| Pearson r of V̂ | evaluations | draws | t = 0.2 | t = 0.5 |\n")
    assert "| second SDE rollout | 200 | 6 | 0." in text and "30 · redness" in text and "6 SDE rollouts of 200" in text
    assert capsys.readouterr().out == text
    assert (tmp_path / "values-redness.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("given", [False, True])
def test_rewards_that_read_prompts_have_those_of_the_labels(posteriors, tmp_path, given):
    """Of each draw, that of its context; with batches that end within a context. Names are ImageNet's, or a file's."""
    folder, n_classes = shutil.copytree(posteriors, tmp_path / "posteriors"), 5 if given else 1000
    record = read(folder / "posterior.json") | {"settings": {"network": {"n_classes": n_classes}}}
    (folder / "posterior.json").write_text(json.dumps(record))
    (tmp_path / "names.txt").write_text("a\nto\nant\nlong\nlonger\n")
    reward, names = f"{__name__}:lettered", ["a", "to", "ant", "long", "longer"] if given else class_names()
    options = ["values", "--posteriors", folder, "--reward", reward, "--batch", 4, "--out", tmp_path]
    options += ["--prompt", "{class}"]
    if given:
        assert "needs the names of the classes, which are not ImageNet's: give --names FILE" in refused(*options)
    run(*options, *(["--names", tmp_path / "names.txt"] if given else []))
    lengths = np.array([len(names[label]) for label in record["labels"]])
    assert len(set(lengths)) > 1

    def value(where):
        means = np.load(folder / where / "samples.npz")["arr_0"].mean((1, 2, 3)) / 255
        return torch.tensor(logsumexp(means.reshape(CONTEXTS, DRAWS) * lengths[:, None], axis=1) - math.log(DRAWS))

    found = read(tmp_path / f"values-{__name__}.lettered.json")["results"]
    first = next(one for one in found if (one["t"], one["method"], one["draws"]) == (0.5, "mfm", DRAWS))
    expected = agreement(value(f"t0.5/mfm-{first['evaluations']:g}"), value("t0.5/sde-200"))
    assert [first["r"], first["error"]] == pytest.approx([expected["r"], expected["error"]], rel=1e-4)
    (folder / "posterior.json").write_text(json.dumps(record | {"settings": {}}))
    assert "posterior.json must have the network's n_classes for {class}" in refused(*options)


def test_a_probe_that_was_fitted_again_is_told_from_the_one_before(posteriors, tmp_path):
    found = []
    for level in (0.0, 1.0, 1.0):
        LinearProbe(torch.ones(3, 1, 1), torch.tensor(level)).save(tmp_path / "p.safetensors")
        run("values", "--posteriors", posteriors, "--reward", f"probe={tmp_path}/p.safetensors", "--out", tmp_path)
        found.append(read(tmp_path / "values-probe.p.safetensors.json"))
    assert found[0]["settings"] == found[1]["settings"] and found[1]["identity"] == found[2]["identity"]
    assert found[0]["identity"] != found[1]["identity"]


def test_results_under_one_reward_do_not_replace_those_under_another(posteriors, tmp_path):
    for reward in ("redness", "contrast", f"{__name__}:half"):
        run("values", "--posteriors", posteriors, "--reward", reward, "--out", tmp_path)
    kept = {path.name for path in tmp_path.iterdir()}
    names = ("redness", "contrast", f"{__name__}.half")
    assert kept == {f"values-{name}.{end}" for name in names for end in ("json", "md", "png")}


def test_pictures_show_standard_errors(tmp_path, monkeypatch):
    """Bars on curves and bands around lines for r, where there is an error; none for distances."""
    figures = []
    monkeypatch.setattr(evaluate_report, "save_figure", lambda figure, path: figures.append(figure))
    entries = [
        {"t": 0.5, "method": method, "evaluations": n, "draws": 4, "r": 0.5, "r_error": error, "error": 1.0}
        for method, n, error in (("mfm", 1, 0.1), ("mfm", 2, None), ("again", 20, 0.2))
    ]
    draw_curves(entries, "Pearson r", "Title", tmp_path / "values.png")
    distances = [{"t": 0.5, "method": "mfm", "evaluations": n, "distance": 3.0} for n in (1, 2)]
    draw_curves(distances, "FID (x)", "Title", tmp_path / "recovery.png")
    values, recovery = (figure.axes[0] for figure in figures)
    bars = values.containers[0].lines[2][0].get_segments()
    assert [bar[:, 1].tolist() for bar in bars] == [pytest.approx([0.4, 0.6]), [0.5, 0.5]]
    assert values.patches[0].get_y() == pytest.approx(0.3) and values.patches[0].get_height() == pytest.approx(0.4)
    assert recovery.containers[0].has_yerr is False and recovery.get_ylabel() == "FID (x)"
    assert "second SDE rollout, 20 evaluations" in [text.get_text() for text in values.get_legend().get_texts()]
    assert values.title.get_fontsize() == 9 and figures[0].get_suptitle() == "Title"


def test_many_draws_agree_with_the_rollout_and_those_of_other_contexts_do_not(tmp_path):
    """40 draws of a map that is exact have nearly the r of a second rollout; with the images in another order, none."""
    folder = write_posteriors(tmp_path / "p", draws=40, methods=(("mfm", 1), ("sde", 9), ("again", 9)), times=(0.5,))
    options = ["--posteriors", folder, "--scale", 10, "--draws", "1,40"]
    run("values", *options)
    r = {(one["method"], one["draws"]): one["r"] for one in read(folder / "values-brightness.json")["results"]}
    assert min(r["mfm", 40], r["again", 40]) > 0.9 > r["mfm", 1] + 0.1
    path = folder / "t0.5" / "mfm-1" / "samples.npz"
    x = np.load(path)["arr_0"]
    np.savez(path, arr_0=x.reshape(CONTEXTS, 40, *x.shape[1:]).swapaxes(0, 1).reshape(x.shape))  # draws outermost
    run("values", *options)
    r = {(one["method"], one["draws"]): one["r"] for one in read(folder / "values-brightness.json")["results"]}
    assert abs(r["mfm", 40]) < 0.7


def test_a_correlation_that_is_undefined_is_null_and_a_word(posteriors, tmp_path):
    run("values", "--posteriors", posteriors, "--reward", f"{__name__}:flat", "--scale", 0.3, "--out", tmp_path)
    found = read(tmp_path / f"values-{__name__}.flat.json")
    assert all(one["r"] is None and one["r_error"] is None for one in found["results"])
    assert found["results"][0]["why"] == "the values are all the same: r is undefined"
    text = (tmp_path / f"values-{__name__}.flat.md").read_text()
    assert "| Meta Flow Map | 1 | 6 | undefined (0) | undefined (0) |" in text
    assert "Note: the values are all the same: r is undefined (t = 0.2, Meta Flow Map)." in text
    assert (tmp_path / f"values-{__name__}.flat.png").exists()


def test_agreement_at_its_ends():
    """Constants up to rounding have no r; but for one entry, no standard error; a bias is in `error` alone."""
    x = torch.randn(9, generator=rng(0), dtype=torch.float64)
    found = agreement(3 * x + 5, x)
    assert found["r"] == pytest.approx(1, abs=1e-12) and found["r_error"] < 1e-7
    assert agreement(x + 5, x)["error"] == pytest.approx(5)
    assert agreement(-x, x)["r"] == pytest.approx(-1)
    same = torch.full((9,), 0.3, dtype=torch.float64)
    same[4] += 1e-16
    assert agreement(x, same) == {
        "r": None, "r_error": None, "error": pytest.approx(float((x - 0.3).square().mean().sqrt())),
        "why": "the reference's values are all the same: r is undefined",
    }  # fmt: skip
    assert agreement(same * 0, x)["r"] is None
    same[4] = 1
    found = agreement(same, x)
    assert found["r"] is not None and found["r_error"] is None
    assert "± " not in table([{"t": 0.1, "method": "mfm", "evaluations": 1, "draws": 1, **found}], "r")


def test_the_reference_is_the_longest_sde_rollout(tmp_path):
    methods = (("sde", 8), ("sde", 64), ("mfm", 1))
    folder = write_posteriors(tmp_path / "p", contexts=5, draws=2, methods=methods, times=(0.5,))
    run("values", "--posteriors", folder)
    found = read(folder / "values-brightness.json")
    assert [(one["method"], one["evaluations"]) for one in found["results"]] == [("sde", 8), ("mfm", 1)]
    assert "rollouts of 64 evaluations" in found["caption"]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (["--draws", "7"], "--draws must be from 1 to 6, as many as there are, got 7"),
        (["--draws", "0,2"], "--draws must be from 1 to 6"),
        (["--draws", "all"], "--draws must be"),
        (["--scale", "inf"], "--scale must be finite, got inf"),
        (["--reward", "beauty"], "imagereward=PATH or module:function, got 'beauty'"),
        (["--reward", "torch:square"], "the reward torch:square must give one number for each image"),
        (["--reward", f"{__name__}:lettered"], f"--prompt must be given, since the reward {__name__}:lettered reads"),
        (["--reward", f"{__name__}:coupled"], "must not depend on the other samples of a batch"),
        (["--batch", "0"], "the batch must be an integer >= 1, got 0"),
        (["--posteriors", "nowhere"], "nowhere/posterior.json must be a readable JSON file"),
        (["--posteriors", ""], "--posteriors must be a folder"),
    ],
)
def test_values_refuse(posteriors, tmp_path, options, match):
    assert match in refused("values", "--posteriors", posteriors, "--out", tmp_path, *options)
    assert not list(tmp_path.iterdir())


def test_folders_that_are_not_as_they_must_be_are_refused(tmp_path):
    folder = write_posteriors(tmp_path / "p", contexts=3, draws=2, methods=(("mfm", 1), ("sde", 9)), times=(0.5,))
    record = json.loads((folder / "posterior.json").read_text())
    entry = record["posteriors"][0]

    def with_record(**changed):
        (folder / "posterior.json").write_text(json.dumps(record | changed))
        return refused("values", "--posteriors", folder)

    assert "contexts in" in with_record(contexts=0) and "draws in" in with_record(draws="2")
    for wrong in ([], None, [1], [entry | {"method": "magic"}], [entry | {"t": "0.5"}], [{}]):
        assert "must have a list of posteriors, at least one" in with_record(posteriors=wrong)
    assert "must have 3 · 4 images, got 6" in with_record(draws=4)
    assert "needs at least 3 noised images" in with_record(contexts=2, draws=3)
    assert "t = 0.5 lacks one" in with_record(posteriors=[entry])
    assert "t = 0.5 lacks one" in with_record(posteriors=record["posteriors"][1:])
    with_record(draws=4)
    np.savez(folder / "t0.5" / "mfm-1" / "latents.npz", arr_0=np.zeros(1))
    (folder / "t0.5" / "mfm-1" / "samples.npz").unlink()
    assert "there are only latents: give imagenet.posterior a --vae" in with_record()
