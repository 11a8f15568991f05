"""A map of the digits, trained for a few minutes: what the committed results show at length must show here already."""

import json

import pytest

from toy.mnist import main

pytest.importorskip("sklearn")

TRAINING = ["--train-maps", "semigroup", "--train-steps", "1500"]
POSTERIORS = [
    *("--posterior-repeats", "2", "--posterior-evaluations", "8", "--posterior-contexts", "3"),
    *("--posterior-steps", "10", "--posterior-particles", "4", "--posterior-value-repeats", "1"),
]
STEERING = ["--steer-samples", "256", "--steer-few", "256", "--steer-steps", "25", "--steer-largest", "8"]


@pytest.mark.slow
def test_one_evaluation_is_worth_many_draws_are_calibrated_and_steering_steers(tmp_path):
    for stage, options in (("train", []), ("posteriors", POSTERIORS), ("steer", STEERING)):
        main([stage, *TRAINING, *options, "--out", str(tmp_path)])
    found = json.loads((tmp_path / "posteriors.json").read_text())["result"]
    for t in ("0.0", "0.1", "0.2"):
        by_evaluations = found["distance"][t]
        assert max(by_evaluations["mfm"]["1"]) < min(by_evaluations["glass"]["4"]), t
    for t, facts in found["checks"].items():
        assert 0.85 < facts["spread_over_error"] < 1.15, t
    rows = json.loads((tmp_path / "steer.json").read_text())["result"]["methods"]
    base, steered = rows["unsteered-0"], rows["gradient-8"]
    for judge in ("classifier", "judge"):
        assert steered[judge]["l2"] < base[judge]["l2"] / 2, judge
