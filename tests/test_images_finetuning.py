"""The stage "finetune" on a small rung: images from N(0, I), and a smooth reward of one direction."""

import dataclasses
import json
import math
import shutil

import pytest
import torch
from torch import nn

from mfm_ref import FlowMap, integrate, time_grid
from mfm_ref.networks import GaussianNetwork
from toy.images import finetuning
from toy.images.data import Images, Split
from toy.images.rung import Rung
from toy.images.section import Section

SHAPE = (1, 4, 4)


class Small(GaussianNetwork):
    """The map of a Gaussian, corrected by one hidden layer."""

    def __init__(self, *, hidden):
        super().__init__(SHAPE, torch.zeros(16), torch.eye(16), n_classes=0, reads_guidance=False, min_std=0.05)
        self.config = {"hidden": hidden}
        self.layers = nn.Sequential(nn.Linear(32 + self.time_features, hidden), nn.SiLU(), nn.Linear(hidden, 16))
        nn.init.zeros_(self.layers[-1].weight)
        nn.init.zeros_(self.layers[-1].bias)

    def correction(self, standard, known, times, y):
        return self.layers(torch.cat([standard, known, times], 1))


class Bright(nn.Module):
    """log p(y|x) of the classes 1 and 9: σ(2 s) for 9, where s, the sum of pixels over 4, is N(0, 1)."""

    def forward(self, x):
        logit = x.flatten(1).sum(1) / 2
        found = torch.full((len(x), 10), -30.0)
        found[:, 9], found[:, 1] = nn.functional.logsigmoid(logit), nn.functional.logsigmoid(-logit)
        return found


@pytest.fixture(scope="module")
def rung():
    images = torch.randn((3000, *SHAPE), generator=torch.Generator().manual_seed(0))
    classifier = Bright()
    data = Images(images, classifier(images).argmax(-1), 0.0)
    torch.manual_seed(0)
    X = FlowMap(Small(hidden=48)).requires_grad_(False)
    return Rung(Split(data, data, data), classifier, lambda x: classifier(x).argmax(-1), X, X, {"X": X})


@pytest.fixture(scope="module")
def run(rung, tmp_path_factory):
    config = finetuning.Settings(**finetuning.PRESETS["fast"], out=tmp_path_factory.mktemp("finetune"))
    return config, finetuning.run(config, rung)


def test_run_writes_what_its_section_needs(run):
    config, found = run
    section = finetuning.section(json.loads(json.dumps(found, allow_nan=False)))
    assert isinstance(section, Section)
    assert all((config.out / name).exists() for name, _ in section.pictures)
    for table in section.tables:
        assert all(len(row) == len(table.header) for row in table.rows)
    for facts in found["strengths"].values():
        assert list(facts["curve"]) == ["0", "3", "6"]


def test_students_are_saved(run):
    config, found = run
    for strength in found["strengths"]:
        student = FlowMap.from_pretrained(config.out / "students" / strength, network=Small)
        x = finetuning.sampled(config, student)
        r = torch.tensor(found["strengths"][strength]["curve"]["6"]["reward"][0], dtype=torch.float64)
        torch.testing.assert_close(finetuning.class_mixture_reward(Bright())(x).double().mean(), r)


def test_a_run_that_goes_on_gives_the_same_numbers(run, rung):
    config, found = run
    assert finetuning.run(config, rung) == found
    path = config.out / "checkpoints" / "curve-5.json"  # as if it had died in the fifth update
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "6"}))
    shutil.rmtree(config.out / "checkpoints" / "student-5" / "step-00000006")
    shutil.rmtree(config.out / "students" / "5")
    assert finetuning.run(dataclasses.replace(config, threads=2), rung) == found


def test_what_is_of_another_run_is_not_continued(run, rung):
    config, _ = run
    other = FlowMap(Small(hidden=48)).requires_grad_(False)  # with other initial weights
    for changed, of in [(dataclasses.replace(config, seed=1), rung), (config, dataclasses.replace(rung, X=other))]:
        with pytest.raises(ValueError, match="other settings"):
            finetuning.run(changed, of)
    with pytest.raises(ValueError, match="other settings"):  # the student's checkpoint alone says so too
        finetuning.finetune(config, rung, 1.0, "another tag", lambda *_: None)


@pytest.mark.parametrize("every", [1, 2, 3])
def test_no_measurement_is_lost_with_its_process(run, rung, gauge, every, tmp_path, monkeypatch):
    def config_of(name):
        return dataclasses.replace(run[0], finetune_every=every, finetune_steps=7, out=tmp_path / name)

    x, curve = finetuning.tuned(config_of("whole"), rung, gauge, 2.0, "")
    assert list(curve) == [str(k) for k in sorted({*range(every, 8, every), 7})]
    draw = finetuning.sampled
    for k in range(len(curve)):
        config, calls = config_of(f"killed-{k}"), iter(range(100))
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(finetuning, "sampled", lambda *a: draw(*a) if next(calls) < k else killed())  # noqa: B023
            finetuning.tuned(config, rung, gauge, 2.0, "")
        again, same = finetuning.tuned(config, rung, gauge, 2.0, "")
        assert same == curve
        assert torch.equal(again, x)


def killed():
    raise KeyboardInterrupt


def test_student_reaches_the_tilted_law(rung, tmp_path):
    # r depends on one direction v of N(0, I) alone, so the mean of v·x under p* is an integral over one number.
    strength = 2.0
    config = finetuning.Settings(
        finetune_steps=400, finetune_batch=128, finetune_samples=4000, finetune_ode_steps=20, finetune_lr=1e-2,
        out=tmp_path,
    )  # fmt: skip
    a = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    grid = finetuning.times(strength, rung.reward)((a / 4).view(-1, 1, 1, 1).expand(-1, *SHAPE).float()).double()
    weights = torch.softmax(grid - a.square() / 2, 0)
    truth = float((weights * a).sum())
    student = finetuning.finetune(config, rung, strength, "")
    found = finetuning.sampled(config, student).flatten(1).sum(1) / 4
    assert truth > 0.5
    # One standard error of 4000 samples is 0.016; the student of 400 updates comes nearer than a tenth of the way.
    assert float(found.mean()) == pytest.approx(truth, abs=0.1 * truth + 0.05)
    base = finetuning.sampled(config, rung.X).flatten(1).sum(1) / 4
    assert abs(float(base.mean())) < 0.1


def test_all_start_from_the_same_noise(run, rung):
    config, _ = run
    x0 = torch.randn((config.finetune_samples, *SHAPE), generator=finetuning.generator(config, 61))
    with torch.no_grad():
        expected = integrate(rung.X.drift, x0, time_grid(config.finetune_ode_steps))
    torch.testing.assert_close(finetuning.sampled(config, rung.X), expected)


@pytest.fixture
def gauge(run, rung):
    config, _ = run
    second = finetuning.Classifier(SHAPE)
    return finetuning.gauge_of(config, rung, second)


def test_equal_weights_are_no_weights(gauge, rung):
    x = rung.data.train.images[:50]
    plain = gauge(x)
    weighted = gauge(x, torch.full((50,), 1 / 50, dtype=torch.float64))
    for name in ("reward", "held_out", "wanted", "excess", "nearest", "agreement", "vendi"):
        assert weighted[name] == pytest.approx(plain[name])
    assert weighted["frequencies"] == pytest.approx(plain["frequencies"])


def test_measures_are_what_they_say(gauge, rung):
    x = rung.data.train.images[:400]
    found = gauge(x)
    assert found["nearest"] == [0.0, 0.0] or found["nearest"][0] < 1e-3  # they are among the real ones themselves
    assert found["wanted"] == [1.0, 0.0]  # classes 1 and 9 both have a weight
    assert found["agreement"] == [1.0, 0.0]
    values = rung.reward(x).double()
    assert found["reward"] == pytest.approx([float(values.mean()), float(values.std(unbiased=False)) / 20], rel=1e-5)
    assert gauge(x * 0.01)["excess"] == [0.0, 0.0]
    assert gauge(torch.full_like(x, -1.25))["excess"][0] == pytest.approx(0.25)
    assert gauge(torch.zeros_like(x))["vendi"][0] == pytest.approx(1.0)


def test_tilted_measures_are_importance_weighted(run, rung, gauge):
    config, _ = run
    x = rung.data.train.images[: finetuning.REFERENCES]
    r = rung.reward(x).double()
    found = finetuning.tilted(config, rung, gauge, 2.0)
    assert found["reward"][0] == pytest.approx(float((r * (2 * r).exp()).sum() / (2 * r).exp().sum()))
    assert math.fsum(found["target"]) == pytest.approx(1)


def test_accepted_images_are_samples_of_the_weighted_law():
    x = torch.randn(200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    share = torch.softmax(x.clamp(max=3), 0)  # e^x N(0, 1) is N(1, 1), but for the clamp
    found = finetuning.accepted(x, share, torch.Generator().manual_seed(1))
    assert len(found.unique()) == len(found)
    # Each is accepted with probability Σ share/max share over n: 5 standard errors.
    chance = float((share / share.max()).mean())
    assert abs(len(found) / len(x) - chance) < 5 * math.sqrt(chance * (1 - chance) / len(x))
    assert abs(float(found.mean()) - float((share * x).sum())) < 5 / math.sqrt(len(found))
    assert abs(float(found.var()) - float((share * (x - 1).square()).sum())) < 5 * math.sqrt(2 / len(found))


def test_a_tilted_law_with_too_few_samples_is_refused_before_training(rung, tmp_path):
    config = finetuning.Settings(**finetuning.PRESETS["fast"], out=tmp_path)
    config = dataclasses.replace(config, finetune_vendi=2000, finetune_samples=2000)
    with pytest.raises(ValueError, match=r"p\* for λ = 1 needs 2000 .* of 3000 .* choose a smaller finetune_vendi"):
        finetuning.run(config, rung)
    assert not (tmp_path / "checkpoints").exists()


def test_too_few_images_for_the_diversity_are_refused(run, rung):
    config, _ = run
    for size in (1, 33):
        with pytest.raises(ValueError, match=f"finetune_vendi must be between 2 and 32 images, got {size}"):
            finetuning.run(dataclasses.replace(config, finetune_vendi=size), rung)
    with pytest.raises(ValueError, match="finetune_every must be an integer >= 1"):
        finetuning.run(dataclasses.replace(config, finetune_every=0), rung)


def test_words_follow_the_numbers(run):
    _, found = run
    changed = json.loads(json.dumps(found))
    for strength, facts in changed["strengths"].items():
        facts["curve"]["0"] |= {"reward": [-1.0, 0.01], "held_out": [-1.0, 0.01], "excess": [0.02, 0.001]}
        up = [0.03, 0.001] if strength == "5" else [0.021, 0.001]
        facts["curve"]["6"] |= {"reward": [-0.5, 0.01], "held_out": [-1.2, 0.01], "excess": up}
    text = finetuning.section(changed).text
    assert "the training reward rises from -1.00 to -0.50" in text
    assert "that of the second classifier falls" in text
    assert "the training reward rises for λ = 1, 2, 5, the held-out one for no λ" in text
    assert "the largest λ over-saturates" in text
    changed["strengths"]["5"]["curve"]["6"]["excess"] = [0.021, 0.001]
    assert "the largest λ does not over-saturate" in finetuning.section(changed).text
