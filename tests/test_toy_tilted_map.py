"""The tilted path's map: a fast run in the default suite, the real one and its target behind the `slow` marker."""

import json

import pytest
import torch

from mfm_ref import MLP, FlowMap
from mfm_ref.interpolant import glass_statistic
from mfm_ref.times import balanced_times
from tests.strategies import rng
from toy import tilted_map
from toy.comparison import TIMES
from toy.mixture import paper_mixture
from toy.tilted_map import LABELS, LIMIT, Base, ExactDraws, TiltedMapConfig, asked_times, main, resampled, table


@pytest.mark.slow
def test_fast_run_writes_everything_and_repeats_itself(tmp_path, monkeypatch):
    first = main(TiltedMapConfig(out=tmp_path / "first", fast=True))
    monkeypatch.setattr(tilted_map, "draw", lambda *_: None)
    second = main(TiltedMapConfig(out=tmp_path / "second", fast=True))
    assert {path.name for path in (tmp_path / "first").iterdir()} == {"map", "tilted_map.png", "report.json"}
    report = json.loads((tmp_path / "first" / "report.json").read_text())
    assert report == first
    assert set(report["routes"]) == set(LABELS)
    for found in report["routes"].values():
        assert list(found["ratio"]) == [str(t) for t in TIMES]
    text = table(report)
    assert all(label in text for label in LABELS.values())
    for run in (first, second):
        for varying in ("seconds", "config"):
            del run[varying]
        for found in (*run["routes"].values(), run["student"]):
            del found["seconds"]
    assert first == second


def test_a_map_on_disk_may_take_the_place_of_the_exact_draws(tmp_path, monkeypatch):
    monkeypatch.setattr(tilted_map, "draw", lambda *_: None)
    p1, _ = paper_mixture()
    FlowMap(MLP(p1.mean, p1.cov)).save_pretrained(tmp_path / "base")
    base = Base(TiltedMapConfig(base=str(tmp_path / "base")), p1)
    assert base.map(None) is base.trained
    x = p1.sample(5, generator=rng(0))
    assert not torch.equal(base.drift(0.5, x), p1.drift(0.5, x))
    assert base.sample(5, rng(1)).shape == (5, 2)
    monkeypatch.setattr(tilted_map, "FAST", tilted_map.FAST | {"train_steps": 3, "student_steps": 3, "batch": 16})
    report = main(TiltedMapConfig(out=tmp_path / "run", fast=True, base=str(tmp_path / "base")))
    assert set(report["routes"]) == set(LABELS)


def test_the_exact_draws_are_those_of_the_posterior():
    """The mean over many rows of one context, in standard errors of the posterior's own (false alarm: 6e-7 each)."""
    p1, _ = paper_mixture()
    x = torch.tensor([[0.4, -0.3]]).expand(20_000, -1)
    draws = ExactDraws(p1, rng(0))(0.0, 1.0, 0 * x, 0.3, x)
    posterior = p1.posterior(0.3, x[:1])
    error = posterior.cov[0].diagonal().sqrt() / len(x) ** 0.5
    assert ((draws.mean(0) - posterior.mean[0]).abs() < 5 * error).all()


def test_resampling_moves_the_base_to_the_tilted_law():
    """200,000 samples, 15 % of them effective: the mean along the line of the modes within 5 standard errors."""
    p1, reward = paper_mixture()
    states = resampled(Base(TiltedMapConfig(), p1), reward, 200_000, rng(0))
    target = p1.tilt(reward)
    error = (target.cov.diagonal() / (0.15 * len(states))).sqrt()
    assert ((states.mean(0) - target.mean).abs() < 5 * error).all()
    assert ((p1.mean - target.mean).abs() > 5 * error).all()


def test_asked_times_are_those_of_the_statistic():
    """The law of t*: the same quantiles as from contexts and states drawn apart, to the 1 % of 40,000 draws."""
    n, std = 40_000, torch.tensor(1.9)
    t_star, u = asked_times(torch.zeros(n), std.expand(n), generator=rng(0))
    assert torch.equal(t_star, u)
    assert ((t_star >= 0) & (t_star < 1)).all()
    t = torch.rand(n, generator=rng(1)) ** 2
    t[torch.rand(n, generator=rng(2)) < 0.1] = 0.0
    c = (1 - t) * std / ((t * std) ** 2 + (1 - t) ** 2).sqrt()
    s, _ = balanced_times(t, c, generator=rng(3))
    other = glass_statistic(s, torch.zeros(n, 1), t, torch.zeros(n, 1))[0]
    levels = torch.linspace(0.05, 0.95, 19)
    assert (t_star.quantile(levels) - other.quantile(levels)).abs().max() < 0.015


@pytest.mark.slow
def test_targets_of_the_full_run(tmp_path):
    report = main(TiltedMapConfig(out=tmp_path))
    for name in ("two", "control"):
        assert max(report["routes"][name]["ratio"].values()) <= LIMIT, name
    for name in ("one", "data"):  # over other contexts the one stage was seen at 2.1 for t = 0.4
        assert max(report["routes"][name]["ratio"].values()) <= 2.5, name
