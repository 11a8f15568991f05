"""The first rung: a fast run in the default suite, the real one and its targets behind the `slow` marker."""

import json

import pytest

from toy.comparison import TIMES
from toy.mixture import MixtureConfig, main


def test_fast_run_writes_everything_and_repeats_itself(tmp_path):
    first = main(MixtureConfig(out=tmp_path / "first", fast=True))
    second = main(MixtureConfig(out=tmp_path / "second", fast=True))
    files = {path.name for path in (tmp_path / "first").iterdir()}
    assert files == {"map", "student", "posteriors.png", "steering.png", "report.json"}
    report = json.loads((tmp_path / "first" / "report.json").read_text())
    assert report == first
    assert list(report["posterior_ratio"]) == [str(t) for t in TIMES]
    assert {"exact", "dps", "gradient", "stein"} <= set(report["steering"])
    assert set(report["steering"]["gradient"]) == {"1", "4", "16"}
    for run in (first, second):
        for varying in ("seconds", "config"):
            del run[varying]
    assert first == second


def test_another_seed_gives_other_numbers(tmp_path):
    a, b = (main(MixtureConfig(out=tmp_path / str(seed), seed=seed, fast=True)) for seed in (0, 1))
    assert a["posterior_ratio"] != b["posterior_ratio"]


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
