"""Fine-tuning on the mixture: its measures against closed forms, one training, the committed result."""

import dataclasses
import json
import math

import pytest
import torch

from mfm_ref import MLP, ExactFlowMap, FlowMap, integrate
from mfm_ref.interpolant import interpolate
from mfm_ref.sampling import time_grid
from toy import finetuning
from toy.finetuning import (
    DRAWS,
    FAST,
    LATEST,
    RUNS,
    STRENGTHS,
    TIMES,
    FinetuningConfig,
    Judge,
    Run,
    along_ode,
    draw,
    finetune,
    flow_with_density,
    found,
    main,
    optimum,
    regression_bias,
    relative_error,
    table,
    times_reward,
    with_divergence,
)
from toy.mixture import paper_mixture
from toy.table import RESULTS


def fast(tmp_path, **change) -> FinetuningConfig:
    return dataclasses.replace(FinetuningConfig(out=tmp_path), **FAST | change)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def network(hidden: int = 16) -> FlowMap:
    p1, _ = paper_mixture()
    return FlowMap(MLP(p1.mean, p1.cov, hidden=hidden, normalise=True))


# ---- the measures --------------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", STRENGTHS)
def test_the_optimum_is_that_of_samples_of_the_tilted_law(strength):
    """Reward and KL over 200,000 exact samples, |z| < 5; the tilted law is made with λ r."""
    p1, r = paper_mixture()
    target = p1.tilt(times_reward(r, strength))
    x = target.sample(200_000, generator=rng())
    best = optimum(p1, r, strength)
    for values, exact in ((r(x), best["reward"]), (target.log_prob(x) - p1.log_prob(x), best["kl"])):
        assert abs(float(values.mean()) - exact) < 5 * float(values.std()) / math.sqrt(len(x)) + 1e-4


def test_a_strength_multiplies_the_reward():
    _, r = paper_mixture()
    x = torch.randn(5, 2, generator=rng())
    assert torch.allclose(times_reward(r, 0.3)(x), 0.3 * r(x))


def test_divergence_is_the_trace_of_the_jacobian():
    p1, _ = paper_mixture()
    x = torch.randn(4, 2, generator=rng())
    b, divergence = with_divergence(p1.drift, 0.4, x)
    jacobians = [torch.func.jacrev(lambda row: p1.drift(0.4, row.unsqueeze(0))[0])(row) for row in x]
    assert torch.allclose(divergence, torch.stack([a.trace() for a in jacobians]), rtol=1e-4, atol=1e-5)
    assert torch.equal(b, p1.drift(0.4, x))


def test_the_flow_of_the_doob_drift_carries_the_density_of_the_tilted_law():
    """To second order in the step: halving it divides the error by 4 (here 3 to 5)."""
    p1, r = (a.to(torch.float64) if hasattr(a, "to") else a for a in paper_mixture())
    target, noise = p1.tilt(r), torch.randn(500, 2, generator=rng(), dtype=torch.float64)
    errors = []
    for steps in (64, 128):
        x, log_q = flow_with_density(target.drift, noise, steps)
        errors.append(float((log_q - target.log_prob(x)).abs().mean()))
    assert errors[1] < 0.01
    assert 3 < errors[0] / errors[1] < 5


@pytest.mark.parametrize("strength", [0.25, 2.0])
def test_the_judge_finds_nothing_wrong_with_the_doob_drift(tmp_path, strength):
    p1, r = paper_mixture()
    judge = Judge(fast(tmp_path, samples=1024, exact_sets=4, ode_steps=64), p1, r, strength)
    best, measured = optimum(p1, r, strength), judge(judge.target.drift)
    assert measured["error"] == max(measured["error_at"].values()) == 0
    assert measured["sw2"] < 2 * measured["floor"]
    assert abs(measured["kl_to_target"]) < 0.01
    assert measured["kl"] == pytest.approx(best["kl"], abs=0.15)  # of 1024 samples: the mode of each is chance
    assert measured["reward"] == pytest.approx(best["reward"], rel=0.2)
    base = judge(p1.drift)
    assert abs(base["kl"]) < 0.01
    assert base["kl_to_target"] > 1
    assert base["error"] > 0.2
    assert base["sw2"] > 2 * base["floor"]


def test_a_relative_error_is_that_of_a_scaled_drift(tmp_path):
    p1, r = paper_mixture()
    target = p1.tilt(r)
    error = relative_error(lambda t, x: 1.2 * target.drift(t, x), target, torch.full((50,), 0.3), rng())
    assert error == pytest.approx(0.2, rel=1e-4)


def test_the_limit_of_the_regression_is_the_base_for_one_draw_of_stein_and_falls_with_n(tmp_path):
    """For N = 1 by Stein's form it is b: its error is that of b on the same states, but for the noise of 512 draws."""
    p1, r = paper_mixture()
    config = fast(tmp_path, bias_states=100)
    bias = regression_bias(config, ExactFlowMap(p1), p1, r)
    target, g = p1.tilt(r), rng(4)
    t = 0.02 + (LATEST - 0.02) * torch.rand(100, generator=g)
    x1 = target.sample(100, generator=g)
    x = interpolate(torch.randn(x1.shape, generator=g), x1, t)
    exact = target.drift(t, x)
    assert bias["stein"]["1"] == pytest.approx(float((p1.drift(t, x) - exact).norm() / exact.norm()), rel=0.05)
    for by_n in bias.values():
        assert list(by_n) == [str(n) for n in DRAWS]
        assert list(by_n.values()) == sorted(by_n.values(), reverse=True)


# ---- trainings -----------------------------------------------------------------------------------------


def test_states_of_the_student_lie_on_its_own_ode():
    """At t = 1 they end eight Euler steps; at t = 0 they are the noise."""
    student, noise = network(), torch.randn(6, 2, generator=rng())
    with torch.no_grad():
        whole = integrate(student.drift, noise, time_grid(8))
    assert torch.allclose(along_ode(student, torch.ones(6), noise), whole, atol=1e-5)
    assert torch.equal(along_ode(student, torch.zeros(6), noise), noise)


def test_every_run_is_another_training_and_starts_as_the_base(tmp_path):
    """One step at a learning rate of nothing leaves the base; the runs leave different students, and all differ."""
    p1, r = paper_mixture()
    first, X = network(), ExactFlowMap(p1)
    x, t = torch.randn(3, 2, generator=rng()), torch.full((3,), 0.4)
    before = first.drift(t, x).detach()
    still = finetune(fast(tmp_path / "still", steps=1, lr=1e-12), Run(), first, p1.drift, X, p1, r)
    assert torch.allclose(still.drift(t, x), before, atol=1e-6)
    drifts = [finetune(fast(tmp_path), run, first, p1.drift, X, p1, r).drift(t, x) for run in RUNS]
    assert torch.equal(first.drift(t, x), before)
    assert len({tuple(b.flatten().tolist()) for b in drifts}) == len(RUNS)
    assert len({path.name for path in (tmp_path / "checkpoints").iterdir()}) == len(RUNS)


def test_a_short_training_comes_closer_to_the_doob_drift(tmp_path):
    p1, r = paper_mixture()
    config = fast(tmp_path, steps=150, draws=256, error_samples=2000)
    judge, first = Judge(config, p1, r, 1.0), network(32)
    student = finetune(config, Run(method="stein"), first, p1.drift, ExactFlowMap(p1), p1, r)
    before, after = judge(first.drift), judge(student.drift)
    assert after["error"] < 0.7 * before["error"]
    assert after["reward"] > before["reward"]


def test_fast_run_writes_everything(tmp_path):
    report = main(FinetuningConfig(out=tmp_path, fast=True))
    assert {path.name for path in tmp_path.iterdir()} == {"finetuning.png", "report.json"}
    assert report == json.loads((tmp_path / "report.json").read_text())
    assert len(report["runs"]) == len(RUNS)
    assert list(report["base"]["error_at"]) == [str(t) for t in TIMES]
    assert "| E18, Stein form |" in table(report)


def test_a_trained_map_takes_the_place_of_the_oracle(tmp_path, monkeypatch):
    """In three of the runs: its drift is the base and the first student, and its draws are another's."""
    network().save_pretrained(tmp_path / "map")
    monkeypatch.setattr(finetuning, "RUNS", RUNS[:3])
    monkeypatch.setattr(finetuning, "draw", lambda *_: None)
    reports = [
        main(FinetuningConfig(out=tmp_path / name, fast=True, map=folder))
        for name, folder in (("oracle", ""), ("trained", str(tmp_path / "map")))
    ]
    assert len(reports[1]["runs"]) == 3
    for name in ("runs", "base", "regression_bias"):
        assert reports[0][name] != reports[1][name]
    assert reports[0]["exact"] == reports[1]["exact"]


# ---- the committed result ------------------------------------------------------------------------------


def test_the_committed_result_shows_what_the_readme_says(tmp_path):
    report = json.loads((RESULTS / "finetuning.json").read_text())
    for strength in STRENGTHS:
        best, tuned = report["optimum"][str(strength)], found(report, method="stein", strength=strength)
        assert tuned["error"] < 0.06
        assert tuned["sw2"] < 1.5 * tuned["floor"]
        assert tuned["kl"] == pytest.approx(best["kl"], rel=0.1)
    for n in DRAWS[:2]:
        plain = found(report, method="stein", objective="regression", draws=n)["error"]
        assert plain > 2 * found(report, method="stein", draws=n)["error"]
        assert 1 < plain / report["regression_bias"]["stein"][str(n)] < 1.4  # its limit, and noise of training
    draw(report, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow
def test_targets_of_the_full_run(tmp_path):
    report = main(FinetuningConfig(out=tmp_path))
    assert found(report, method="stein")["error"] < 0.06
    assert found(report)["error"] < 0.15
    assert found(report, method="stein", objective="regression")["error"] > 0.3
