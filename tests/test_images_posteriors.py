"""The stage "Posteriors" on Gaussian images, whose exact map is an untrained U-Net: closed forms, wrong samplers."""

import copy
import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from mfm_ref import FlowMap, GaussianMixture, UNet
from tests.helpers import MapOf
from tests.strategies import rng
from toy.images import posteriors
from toy.images.data import Images, Split
from toy.images.posteriors import TIMES, Settings
from toy.images.rung import Rung

CONFIG = Settings(
    posterior_images=400,
    posterior_repeats=2,
    posterior_evaluations=16,
    posterior_contexts=24,
    posterior_steps=24,
    posterior_particles=48,
    posterior_value_repeats=4,
)


class Linear(nn.Module):
    """A classifier whose features are linear in the image: Gaussian for Gaussian images."""

    def __init__(self, pixels: int):
        super().__init__()
        self.to_features = nn.Linear(pixels, 6)
        self.outlet = nn.Linear(6, 10)

    def features(self, x):
        return self.to_features(x.flatten(1))

    def forward(self, x):
        return torch.log_softmax(8 * self.outlet(self.features(x)), -1)


def gaussian_rung(shape=(1, 8, 8), n=400) -> tuple[Rung, GaussianMixture]:
    """A rung whose images are Gaussian, with smooth, correlated pixels, and whose maps are exact; and their law."""
    torch.manual_seed(0)
    pixels = math.prod(shape)
    root = torch.randn(pixels, pixels, generator=rng(0)) * 0.9 ** torch.arange(pixels) * 0.5
    cov = root @ root.T + 0.1**2 * torch.eye(pixels)
    mean = 0.5 * torch.randn(pixels, generator=rng(1))
    p1 = GaussianMixture(torch.ones(1), mean.unsqueeze(0), cov.unsqueeze(0))
    X = FlowMap(UNet(mean.view(shape), cov, channels=(8,), blocks=1, patch=2)).requires_grad_(False)
    classifier = Linear(pixels).requires_grad_(False)

    def images(seed):
        x = p1.sample(n, generator=rng(seed)).view(n, *shape)
        return Images(x, classifier(x).argmax(-1), 0.0)

    data = Split(images(2), images(3), images(4))
    return Rung(data, classifier, lambda x: classifier(x).argmax(-1), X, X, {"teacher": X, "other": X}), p1


@pytest.fixture(scope="module")
def rung():
    return gaussian_rung()[0]


@pytest.fixture(scope="module")
def p1():
    return gaussian_rung()[1]


def mean_only(rung):
    """The wrong sampler: the mean of the posterior in the place of draws."""
    X = rung.X
    return MapOf(
        lambda s, u, z, t, x, y: z + (u - s) * (X.velocity(0.0, 0.0, 0 * z, t.flatten(), x) - z), X.shape, torch.float32
    )


def of_means(rung, p1, t):
    """Squared Fréchet distance of the features of the means E[x₁ | x_t] to those of the images, in closed form."""
    a = rung.classifier.to_features.weight.double()
    cov, eye = p1.covs[0].double(), torch.eye(p1.dim, dtype=torch.float64)
    noisy = t**2 * cov + (1 - t) ** 2 * eye
    means = t**2 * cov @ torch.linalg.solve(noisy, cov)  # the covariance of the means
    b, c = ((a @ m @ a.T).numpy() for m in (means, cov))
    return float(b.trace() + c.trace() - 2 * np.sqrt(np.linalg.eigvals(b @ c).real.clip(0)).sum())


# ---- recovery ------------------------------------------------------------------------------------------


def test_exact_draws_are_at_the_floor_and_means_are_not(rung, p1):
    """Means of two repeats. At t = 0 recovered images are a set of their own, later they resemble the clean ones."""
    floor = posteriors.floor(CONFIG, rung)
    near = sum(floor["others"]) / 2
    assert sum(floor["halves"]) / 2 > 1.5 * near  # smaller sets
    samplers = {"exact": posteriors.of_map(rung.X), "mean": posteriors.of_map(mean_only(rung))}
    for t in (0.0, 0.1, 0.2):
        found = posteriors.distances(CONFIG, rung, samplers, t)
        exact, mean = (sum(found[name]) / 2 for name in ("exact", "mean"))
        assert exact < 1.5 * near
        assert mean == pytest.approx(of_means(rung, p1, t), rel=0.15)
        assert mean > 5 * exact
    assert sum(posteriors.distances(CONFIG, rung, samplers, 0.8)["exact"]) / 2 < 0.1 * near


def test_rollouts_begin_at_the_mean_and_come_to_the_map(rung):
    """One evaluation of either is E[x₁ | x_t] itself; with 16 the distance is near the map's."""
    found = posteriors.recovery(CONFIG, rung, 0.2)
    assert list(found["mfm"]) == ["1", "2", "4", "8"]
    assert list(found["glass"]) == list(found["sde"]) == list(found["own"]) == ["1", "2", "4", "8", "16"]
    assert found["own"] == found["glass"]  # the base is the map itself, here
    mean = posteriors.distances(CONFIG, rung, {"mean": posteriors.of_map(mean_only(rung))}, 0.2)["mean"]
    for kind in ("glass", "sde"):
        assert found[kind]["1"] == pytest.approx(mean, rel=1e-4)
        curve = [sum(numbers) for numbers in found[kind].values()]
        assert curve == sorted(curve, reverse=True)
        assert sum(found["mfm"]["1"]) < curve[-1] < 0.2 * curve[0]
    assert found["mfm"]["1"] == pytest.approx(
        found["mfm"]["8"], rel=1e-2
    )  # the map is exact: more steps change nothing
    worth = posteriors.matches(found)["1"]
    assert all(n is None or n > 8 for n in worth["glass"])


def test_rollouts_are_of_the_drift_that_they_are_named_after(rung):
    """Once the base drift is that of other images, they are worse; those of the map's own drift do not change."""
    p = rung.X.shape[1] * rung.X.shape[2]
    other = FlowMap(UNet(torch.ones(rung.X.shape), torch.eye(p), channels=(8,), blocks=1, patch=2))
    config = dataclasses.replace(CONFIG, posterior_evaluations=4, posterior_images=100, posterior_repeats=1)
    before = posteriors.recovery(config, rung, 0.2)
    after = posteriors.recovery(config, dataclasses.replace(rung, base=other.requires_grad_(False)), 0.2)
    for kind in ("mfm", "own"):
        assert after[kind] == before[kind]
    for kind in ("glass", "sde"):
        assert all(after[kind][k][0] > 2 * before[kind][k][0] for k in ("2", "4"))


def test_worth_is_read_off_the_curve_by_logarithms():
    curve = {k: 8 / k for k in (1, 2, 4, 8)}
    assert posteriors.worth(8 / 3, curve) == pytest.approx(3)
    assert posteriors.worth(4.0, curve) == pytest.approx(2)
    assert posteriors.worth(9.0, curve) == 1
    assert posteriors.worth(0.9, curve) is None
    assert posteriors.worth(0.0, {1: 1.0, 2: 0.0}) == 2


# ---- calibration ---------------------------------------------------------------------------------------


def test_exact_draws_are_calibrated_and_means_are_not(rung, p1):
    """400 images, 8 draws: the ratio is known to a few percent, the PSNR to some 0.1 dB."""
    for t in (0.0, 0.4, 0.8):
        found = posteriors.checks(CONFIG, rung, rung.X, t)
        assert found["spread_over_error"] == pytest.approx(1, abs=0.1)
        noisy = t**2 * p1.covs[0] + (1 - t) ** 2 * torch.eye(p1.dim)
        left = p1.covs[0] - t**2 * p1.covs[0] @ torch.linalg.solve(noisy, p1.covs[0])
        assert found["psnr"] == pytest.approx(10 * math.log10(4 / float(left.diagonal().mean())), abs=0.3)
        assert found["psnr"] > found["noisy_psnr"]
        wrong = posteriors.checks(CONFIG, rung, mean_only(rung), t)
        assert wrong["spread_over_error"] < 1e-6
        assert wrong["psnr"] == pytest.approx(found["psnr"], abs=1e-3)
    assert found["same_class"] > posteriors.checks(CONFIG, rung, rung.X, 0.0)["same_class"] + 0.2


# ---- values --------------------------------------------------------------------------------------------


def test_values_of_the_exact_map_agree_with_long_rollouts_and_wrong_ones_do_not(rung):
    """r of 48 draws is that of a second rollout of as many particles, up to chance and the rollout's steps."""
    late = ("0.2", "0.6")
    reference, control = (
        {t: posteriors.long_rollout(CONFIG, rung, stage, float(t))["value"] for t in late}
        for stage in (posteriors.REFERENCE, posteriors.CONTROL)
    )
    ceiling = posteriors.correlations({t: [control[t]] for t in late}, reference)

    def r(X, n):
        by_time = {t: posteriors.estimates(CONFIG, rung, X, n, float(t)) for t in late}
        return posteriors.correlations(by_time, reference)

    many, few = r(rung.X, 48), r(rung.X, 1)
    blind = MapOf(lambda s, u, z, t, x, y: rung.X(s.flatten(), u.flatten(), z, 0.0, x), rung.X.shape, torch.float32)
    wrong = r(blind, 48)
    for name in (*late, "all"):
        assert ceiling[name] > 0.7
        assert many[name] > ceiling[name] - 0.1
        assert few[name] < many[name] - 0.05
        assert wrong[name] < 0.5
    assert many["error"] < 1.3 * ceiling["error"] < few["error"]


def test_correlations_are_those_of_numpy_within_times_and_over_them():
    """Values that agree within each time and not between the times: r is 1 for each, and less over all."""
    reference = {"0.1": [1.0, 2.0, 4.0], "0.2": [1.0, 3.0, 2.0]}
    estimates = {"0.1": [[1.0, 2.0, 4.0], [4.0, 2.0, 1.0]], "0.2": [[11.0, 13.0, 12.0], [1.0, 3.0, 2.5]]}
    found = posteriors.correlations(estimates, reference)
    for t in reference:
        assert found[t] == pytest.approx(np.mean([np.corrcoef(one, reference[t])[0, 1] for one in estimates[t]]))
    truth = [*reference["0.1"], *reference["0.2"]]
    together = [[*a, *b] for a, b in zip(*estimates.values(), strict=True)]
    assert found["all"] == pytest.approx(np.mean([np.corrcoef(one, truth)[0, 1] for one in together]))
    assert found["error"] == pytest.approx(np.sqrt(np.mean((np.array(together) - truth) ** 2)))
    assert posteriors.pearson([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]) == 0


def test_the_jackknife_is_the_standard_error_of_r():
    """Of 40 pairs with correlation ρ = 0.8, where r has the standard deviation (1 − ρ²)/√n up to 1/n; 300 sets.

    Repeats of the same states do not make it smaller: it is the states that differ.
    """
    n, rho = 40, 0.8
    a = torch.randn(300, n, generator=rng(5), dtype=torch.float64)
    b = rho * a + (1 - rho**2) ** 0.5 * torch.randn(a.shape, generator=rng(6), dtype=torch.float64)
    pairs = list(zip(a.tolist(), b.tolist(), strict=True))
    found = np.array([posteriors.jackknife([one], other) for one, other in pairs])
    assert found.mean() == pytest.approx((1 - rho**2) / n**0.5, rel=0.12)  # known to 0.02
    assert found.mean() == pytest.approx(np.std([posteriors.pearson(*pair) for pair in pairs]), rel=0.2)  # to 0.05
    assert posteriors.jackknife([pairs[0][0]] * 3, pairs[0][1]) == pytest.approx(found[0])
    assert posteriors.jackknife([[1.0, 2.0, 3.0]], [2.0, 4.0, 6.0]) == pytest.approx(0, abs=1e-9)


def test_evaluations_of_values_are_those_that_their_labels_say():
    for n in posteriors.DRAWS:
        assert all(n % min(n, most) == 0 for most in posteriors.GLASS_STEPS)
    assert posteriors.draw_counts(dataclasses.replace(CONFIG, posterior_particles=100)) == [1, 4, 16, 64]


# ---- the whole stage -----------------------------------------------------------------------------------


def fast(tmp_path, **changes) -> Settings:
    return dataclasses.replace(Settings(out=tmp_path, fast=True), **posteriors.PRESETS["fast"] | changes)


@pytest.mark.slow
def test_fast_run_writes_everything_resumes_and_makes_its_section_from_json(tmp_path, monkeypatch):
    """Images that are no squares, in chunks of rows that divide nothing; then what the words say of other numbers."""
    rung, _ = gaussian_rung((1, 8, 4), n=30)
    config = fast(tmp_path / "first", posterior_rows=10)
    first = posteriors.run(config, rung)
    assert {path.name for path in config.out.iterdir()} == {"checkpoints", "posteriors.png", "recovery.png"}
    kept = sorted((config.out / "checkpoints" / "posteriors").iterdir())
    assert len(kept) == 1 + 2 * len(TIMES) + 3 * (len(TIMES) - 1) + len(posteriors.COMPARED) * (1 + len(rung.maps))
    monkeypatch.setattr(posteriors, "draw_posteriors", lambda *_: None)  # pictures take as long as all the rest
    monkeypatch.setattr(posteriors, "draw_recovery", lambda *_: None)
    for path in kept[::3]:
        path.unlink()  # as if it had been killed before
    assert posteriors.run(config, rung) == first
    other = posteriors.checks(dataclasses.replace(config, seed=1), rung, rung.X, 0.4)
    assert other != first["checks"]["0.4"] == posteriors.checks(config, rung, rung.X, 0.4)

    assert first["maps"]["teacher"] == first["maps"]["other"]  # the same map, on the same random numbers
    for t, found in first["maps"]["teacher"].items():
        assert found["distance"]["4"] == first["distance"][t]["mfm"]["4"]
        assert found["psnr"] == first["checks"][t]["psnr"]
    section = posteriors.section(json.loads(json.dumps(first)))
    assert section == posteriors.section(first)
    for table in section.tables:
        assert all(len(row) == len(table.header) for row in table.rows)
    assert [name for name, _ in section.pictures] == ["posteriors.png", "recovery.png"]
    assert "24 held-out images" in section.text
    assert "with 0.4 of the processor time of a map" in section.text
    assert "4 noisy states at each time" in section.text and "over 4 states" in section.tables[3].caption
    assert all("±" in cell for row in section.tables[3].rows for cell in row[1:-2])
    assert "The judge was trained on these very held-out images" not in section.text
    assert "The judge was trained on these very" in posteriors.section({**first, "judge_knows": True}).text
    assert "At t = 0 all states have the same posterior" in section.text

    # At t = 0.8 one evaluation of a rollout is as near as two; elsewhere two are not enough.
    for t, found in first["distance"].items():
        found["glass"] = found["own"] = {"1": [1.0], "2": [1.0 if t == "0.8" else 0.5]}
    for by in first["worth"].values():
        by["1"] = {"glass": [None, None], "own": [2.0, 2.0], "sde": [1.25, 1.5]}
    text = posteriors.section(first).text
    assert "Left out are t = 0.8," in text
    assert "one evaluation, GLASS rollout: more than 2; one evaluation, GLASS rollout of the map's drift: 2;" in text
    assert "one evaluation, SDE rollout: 1.2;" in text


def changed(X):
    """A copy whose weights are a little different."""
    X = copy.deepcopy(X)
    next(X.parameters()).data.mul_(1.5).add_(0.1)
    return X


def test_pieces_of_other_networks_are_not_reused(tmp_path, monkeypatch):
    """After more training, of settings that are the same; maps that are added leave those of the others alone."""
    rung, _ = gaussian_rung((1, 8, 4), n=30)
    config, made = fast(tmp_path), []
    for name in ("floor", "recovery", "checks", "long_rollout", "values", "measure_map", "measure_rollout"):
        monkeypatch.setattr(posteriors, name, lambda *_, name=name: made.append(name) or {"name": name})

    def remade(rung, config=config):
        made.clear()
        for name, (tag, make) in posteriors.pieces(config, rung).items():
            posteriors.kept(config, name, tag, make)
        return set(made)

    every = remade(rung)
    assert every == {"floor", "recovery", "checks", "long_rollout", "values", "measure_map", "measure_rollout"}
    assert remade(rung) == set()
    added = dataclasses.replace(rung, maps={**rung.maps, "new": changed(rung.X)})
    assert remade(added) == {"measure_map"} and len(made) == len(posteriors.COMPARED)
    assert remade(dataclasses.replace(added, X=changed(rung.X))) == every - {"measure_map", "measure_rollout"}
    assert remade(dataclasses.replace(added, base=changed(rung.X))) == every
    assert remade(dataclasses.replace(added, classifier=changed(rung.classifier))) == every
    assert remade(added, dataclasses.replace(config, seed=1)) == every
    assert remade(added) == set()


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"posterior_contexts": 2}, "posterior_contexts must be at least 3, for a correlation, got 2"),
        ({"posterior_evaluations": 6}, "posterior_evaluations must be a power of 2, got 6"),
        ({"posterior_evaluations": 0}, "posterior_evaluations must be a power of 2, got 0"),
        ({"posterior_images": 3}, "at least 4 images to recover, got 3"),
    ],
)
def test_settings_are_refused(rung, tmp_path, changes, match):
    with pytest.raises(ValueError, match=match):
        posteriors.run(fast(tmp_path, **changes), rung)
    assert not list(tmp_path.iterdir())


def test_states_are_of_each_class_in_turn_and_presets_name_settings():
    images = Images(torch.zeros(6, 1, 4, 4), torch.tensor([1, 1, 1, 0, 7, 0]), 0.0)
    assert posteriors.balanced(images, 5).tolist() == [3, 0, 4, 5, 1]
    assert posteriors.balanced(images, 99).tolist() == [3, 0, 4, 5, 1, 2]
    names = {field.name for field in dataclasses.fields(Settings)}
    assert all(set(preset) <= names for preset in posteriors.PRESETS.values())
