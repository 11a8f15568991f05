"""`python -m toy.mnist`: options and presets, the whole of it at the fast size on digits, and what it refuses."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from mfm_ref import FlowMap, UNet
from tests.test_images_data import idx
from toy import mnist
from toy.images import data
from toy.images.config import PRESETS
from toy.images.stages import STAGES
from toy.mnist import main, parse_arguments

load_digits = pytest.importorskip("sklearn.datasets").load_digits


# ---- options -------------------------------------------------------------------------------------------


def test_defaults_are_all_stages_on_digits():
    stage, config = parse_arguments([])
    assert (stage, config.dataset, config.data, config.fast) == ("all", "digits", "", False)
    assert config.out == Path("runs/digits-images")


def test_data_make_it_mnist_with_a_preset_of_its_own():
    _, config = parse_arguments(["train", "--data", "somewhere"])
    assert (config.dataset, config.data, config.out) == ("mnist", "somewhere", Path("runs/mnist-images"))
    assert all(getattr(config, name) == value for name, value in PRESETS["mnist"].items())
    _, config = parse_arguments(["train", "--data", "somewhere", "--dataset", "fashion", "--size", "full"])
    assert (config.dataset, config.out) == ("fashion", Path("runs/fashion-images-full"))
    assert all(getattr(config, name) == value for name, value in PRESETS["full"].items())


def test_fast_comes_after_the_size_and_explicit_options_last():
    _, config = parse_arguments(["--fast", "--size", "full", "--train-steps", "7", "--out", "here"])
    expected = PRESETS["full"] | PRESETS["fast"] | {"train_steps": 7}
    assert all(getattr(config, name) == value for name, value in expected.items())
    assert (config.fast, config.out) == (True, Path("here"))


def test_an_explicit_option_wins_where_it_is_the_default_too():
    default = parse_arguments([])[1].train_steps
    assert PRESETS["fast"]["train_steps"] != default
    assert parse_arguments(["--fast", "--train-steps", str(default)])[1].train_steps == default


def test_presets_name_options_and_keep_their_types():
    _, config = parse_arguments([])
    for preset in PRESETS.values():
        for name, value in preset.items():
            assert type(value) is type(getattr(config, name)), name


def test_every_setting_is_a_number_a_word_or_a_flag():
    _, config = parse_arguments([])
    assert all(isinstance(value, int | float | str | Path) for value in vars(config).values())


def test_help_lists_the_stages_and_their_options(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert all(f"options of {name}:" in shown for name in STAGES)


@pytest.mark.parametrize("wrong", [["stir"], ["--dataset", "cifar"], ["--size", "huge"], ["--train-steps", "many"]])
def test_wrong_options_are_refused(wrong, capsys):
    with pytest.raises(SystemExit) as end:
        main(wrong)
    assert end.value.code == 2
    assert "invalid" in capsys.readouterr().err


# ---- a run ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    main(["--fast", "--out", str(folder)])
    return folder


def test_the_run_writes_a_result_for_each_stage_and_the_report(run):
    report = json.loads((run / "report.json").read_text())
    assert list(report["stages"]) == list(STAGES)
    for name, record in report["stages"].items():
        assert record == json.loads((run / f"{name}.json").read_text())
        assert record["settings"]["dataset"] == "digits" and "out" not in record["settings"]
    assert not (run / "checkpoints").exists()


def test_the_page_has_every_stage_with_its_pictures(run):
    page = (run / "report.html").read_text(encoding="utf-8")
    assert all(f'<section id="{name}">' in page for name in STAGES)
    assert page.count("data:image/png;base64,") >= len(STAGES) - 1  # training has none
    assert "is missing" not in page


def test_a_finished_run_is_not_run_again(run, capsys, monkeypatch):
    monkeypatch.setattr(mnist, "run_stage", None)
    main(["all", "--fast", "--out", str(run)])
    shown = capsys.readouterr().out
    assert shown.count("finished before") == len(STAGES)
    assert "report.html, or report.md beside it" in shown
    main(["steer", "--fast", "--out", str(run)])
    assert "steer: finished before" in capsys.readouterr().out


def test_the_report_gathers_what_there_is(run, tmp_path, capsys):
    for name in ("train", "steer"):
        shutil.copy(run / f"{name}.json", tmp_path)
    main(["report", "--out", str(tmp_path)])
    assert list(json.loads((tmp_path / "report.json").read_text())["stages"]) == ["train", "steer"]
    assert "report.html" in capsys.readouterr().out


def test_a_stage_that_was_removed_is_run_again_with_the_same_numbers(run, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    (copy / "inverse.json").unlink()
    main(["inverse", "--fast", "--out", str(copy)])
    again, before = (json.loads((folder / "inverse.json").read_text())["result"] for folder in (copy, run))
    assert without_seconds(again) == without_seconds(before)


def test_a_lost_part_of_training_is_made_again(run, tmp_path, capsys):
    copy = copy_without_steer(run, tmp_path / "copy")
    weights = (copy / "maps" / "semigroup" / "model.safetensors").read_bytes()
    shutil.rmtree(copy / "maps" / "semigroup")
    with pytest.raises(SystemExit, match=r"run `python -m toy.mnist train` .*missing: .*semigroup"):
        main(["steer", "--fast", "--out", str(copy)])
    main(["train", "--fast", "--out", str(copy)])
    assert (copy / "maps" / "semigroup" / "model.safetensors").read_bytes() == weights
    assert "finished before" not in capsys.readouterr().out
    record = json.loads((copy / "train.json").read_text())
    assert record["seconds"] >= sum(record["result"]["seconds"].values())  # those of the maps that were kept count


def without_seconds(value):
    """The same without the times that parts of it took."""
    if isinstance(value, dict):
        return {key: without_seconds(part) for key, part in value.items() if "seconds" not in key}
    return [without_seconds(part) for part in value] if isinstance(value, list) else value


# ---- what is refused -----------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["all", "steer"])
def test_other_settings_are_refused(run, stage):
    message = r"steer.json .*other settings \(steer_samples was .* and is 3\): remove it or write elsewhere \(--out\)"
    with pytest.raises(SystemExit, match=message):
        main([stage, "--fast", "--out", str(run), "--steer-samples", "3"])


def test_another_data_set_in_the_same_folder_is_refused(run, tmp_path):
    with pytest.raises(SystemExit, match=r"train.json .*other settings .*dataset was 'digits' and is 'mnist'"):
        main(["--fast", "--out", str(run), "--data", str(tmp_path)])


@pytest.mark.parametrize("stage", ["posteriors", "steer", "inverse", "blackbox", "finetune"])
def test_stages_before_training_say_so(stage, tmp_path):
    with pytest.raises(SystemExit, match=r"run `python -m toy.mnist train`"):
        main([stage, "--fast", "--out", str(tmp_path)])


def test_a_report_of_nothing_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="must hold the result of a stage"):
        main(["report", "--out", str(tmp_path)])


def test_missing_data_are_refused_before_anything_is_written(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(SystemExit, match=r"must hold train-images-idx3-ubyte, .*toy.mnist download"):
        main(["train", "--fast", "--data", str(tmp_path), "--out", str(out)])
    with pytest.raises(SystemExit, match="fashion needs a folder"):
        main(["--fast", "--dataset", "fashion", "--out", str(out)])
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--train-maps", "tutor"], "train_maps must be some of semigroup, mean_flow, teacher"),
        (["train", "--train-channels", "10,20"], "channels must be multiples of 8"),
        (["train", "--map", "teacher", "--train-maps", "semigroup"], "map must be one of train_maps"),
        (["train", "--device", "nowhere"], "device must be one that this torch computes on, got 'nowhere'"),
    ],
)
def test_settings_of_training_that_make_no_sense_leave_nothing_behind(arguments, message, tmp_path):
    with pytest.raises(SystemExit, match=f"toy.mnist: {message}"):
        main([*arguments, "--fast", "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["steer", "--steer-largest", "48"], "steer_largest must be a power of 2, got 48"),
        (["steer", "--steer-largest", "0"], "steer_largest must be a power of 2, got 0"),
        (["inverse", "--inverse-images", "1"], "inverse_images must be an integer >= 2"),
        (["posteriors", "--posterior-evaluations", "3"], "posterior_evaluations must be a power of"),
        (["finetune", "--finetune-vendi", "100000"], "finetune_vendi must be between"),
    ],
)
def test_settings_of_a_stage_that_make_no_sense_are_refused(run, tmp_path, arguments, message):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    (copy / f"{arguments[0]}.json").unlink()
    with pytest.raises(SystemExit, match=f"toy.mnist: {message}"):
        main([*arguments, "--fast", "--out", str(copy)])


def test_results_of_different_maps_make_no_report(run, tmp_path):
    copy = copy_without_steer(run, tmp_path / "copy")
    main(["steer", "--fast", "--map", "teacher", "--out", str(copy)])
    with pytest.raises(SystemExit, match=r"of one run: map is 'semigroup' in posteriors.json and 'teacher' in steer"):
        main(["report", "--out", str(copy)])


def copy_without_steer(run: Path, folder: Path) -> Path:
    """A run in which steering is still to do."""
    shutil.copytree(run, folder)
    (folder / "steer.json").unlink()
    return folder


def test_maps_of_another_network_are_refused(run, tmp_path):
    copy = copy_without_steer(run, tmp_path / "copy")
    big = UNet(torch.zeros(1, 28, 28), torch.eye(784), channels=(8,), blocks=1)
    FlowMap(big).save_pretrained(copy / "maps" / "teacher")
    with pytest.raises(SystemExit, match=r"must hold a map of images \(1, 8, 8\)"):
        main(["steer", "--fast", "--out", str(copy)])


@pytest.mark.parametrize("file", ["maps/teacher/model.safetensors", "maps/base/config.json", "classifier.safetensors"])
def test_damaged_files_of_training_are_refused(run, tmp_path, file):
    copy = copy_without_steer(run, tmp_path / "copy")
    (copy / file).write_bytes((copy / file).read_bytes()[:50])
    with pytest.raises(SystemExit, match=file):
        main(["steer", "--fast", "--out", str(copy)])


def test_damaged_results_are_refused(run, tmp_path):
    copy = copy_without_steer(run, tmp_path / "copy")
    (copy / "steer.json").write_text("{")
    for stage in ("steer", "report"):
        with pytest.raises(SystemExit, match=r"steer.json must be a readable JSON file"):
            main([stage, "--fast", "--out", str(copy)])


# ---- download ------------------------------------------------------------------------------------------


def test_download_passes_on_what_it_did(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(mnist, "download", lambda *names: asked.append(names) or {"DIR/file.gz": "kept"})
    main(["download", "--data", "DIR"])
    main(["download", "--data", "DIR", "--dataset", "fashion"])
    assert asked == [("mnist", "DIR"), ("fashion", "DIR")]
    assert capsys.readouterr().out.startswith("DIR/file.gz: kept")


def test_download_without_a_folder_or_a_network_is_refused(monkeypatch, tmp_path):
    with pytest.raises(SystemExit, match="download needs --data DIR"):
        main(["download"])
    with pytest.raises(SystemExit, match="data sets to download are mnist, fashion"):
        main(["download", "--data", str(tmp_path), "--dataset", "digits"])

    def no_network(*_):
        raise ConnectionError("no mirror gave it")

    monkeypatch.setattr(mnist, "download", no_network)
    with pytest.raises(SystemExit, match=r"toy.mnist: no mirror gave it"):
        main(["download", "--data", str(tmp_path)])


# ---- idx files -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_idx_files_go_through_training_and_steering(tmp_path, monkeypatch):
    """28×28 pixels, and a judge whose images are not the held-out ones: scikit-learn's digits, enlarged."""
    bunch = load_digits()
    large = np.pad(bunch.images.repeat(3, 1).repeat(3, 2), ((0, 0), (2, 2), (2, 2))) * 15
    checksums = {}
    for part, rows in (("train", slice(0, 600)), ("t10k", slice(600, 800))):
        for kind, array in (("images-idx3", large[rows]), ("labels-idx1", bunch.target[rows])):
            content = idx(array.astype(np.uint8))
            checksums[f"{part}-{kind}-ubyte"] = hashlib.sha256(content).hexdigest()
            (tmp_path / f"{part}-{kind}-ubyte").write_bytes(content)
    monkeypatch.setitem(data.CHECKSUMS, "mnist", checksums)
    options = ["--fast", "--data", str(tmp_path), "--out", str(tmp_path / "out"), "--train-steps", "2"]
    options += ["--train-classifier-steps", "20"]
    options += ["--steer-samples", "8", "--steer-few", "8", "--steer-batch", "8", "--steer-smc-seeds", "1"]
    main(["train", *options])
    main(["steer", *options])
    main(["report", *options])
    found = json.loads((tmp_path / "out" / "report.json").read_text())["stages"]
    assert found["train"]["result"]["images"] == {"train": 500, "judge": 100, "held_out": 200}
    assert found["steer"]["result"]["reweighted"]["images"] == "held-out"
