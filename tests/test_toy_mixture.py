"""The first rung: a fast run in the default suite, the real one and its targets behind the `slow` marker."""

import dataclasses
import json

import pytest

from toy import mixture
from toy.common import start
from toy.comparison import TIMES
from toy.mixture import FAST, MixtureConfig, compare_posteriors, main, paper_mixture, train_map


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A fast run's folder and report."""
    folder = tmp_path_factory.mktemp("mixture") / "first"
    return folder, main(MixtureConfig(out=folder, fast=True))


def test_fast_run_writes_everything_and_repeats_itself(first, tmp_path, monkeypatch):
    folder, first = first
    files = {path.name for path in folder.iterdir()}
    assert files == {"map", "student", "posteriors.png", "steering.png", "report.json"}
    report = json.loads((folder / "report.json").read_text())
    assert report == first
    assert list(report["posterior_ratio"]) == [str(t) for t in TIMES]
    assert {"exact", "dps", "gradient", "stein"} <= set(report["steering"])
    assert set(report["steering"]["gradient"]) == {"1", "4", "16"}
    for name in ("draw_posteriors", "draw_steering"):
        monkeypatch.setattr(mixture, name, lambda *_: None)
    second = main(MixtureConfig(out=tmp_path / "second", fast=True))
    varying = ("seconds", "config")
    assert {k: v for k, v in second.items() if k not in varying} == {k: v for k, v in first.items() if k not in varying}


def test_another_seed_gives_other_numbers(first, tmp_path):
    config = dataclasses.replace(MixtureConfig(out=tmp_path, seed=1), **FAST)
    start(config)
    p1, _ = paper_mixture()
    other = compare_posteriors(config, train_map(config, p1), p1)
    assert all(ratio != first[1]["posterior_ratio"][t] for t, ratio in other.items())


@pytest.mark.slow
def test_targets_of_the_full_run(tmp_path):
    report = main(MixtureConfig(out=tmp_path))
    for t, ratio in report["posterior_ratio"].items():
        assert ratio <= (1.5 if float(t) <= 0.8 else 2.0), f"posterior at t = {t}"
    exact = report["steering"]["exact"]["0"]
    assert exact["sw2"] <= 1.1 * exact["floor"]
    assert report["finetune_relative_error"] <= 0.08
    for method in ("gradient", "stein"):
        errors = [report["steering"][method][n]["sw2"] for n in ("1", "4", "16")]
        assert errors == sorted(errors, reverse=True), "more posterior draws must steer better"
