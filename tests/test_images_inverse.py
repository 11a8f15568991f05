"""The stage "inverse" on a rung whose posteriors have a closed form: the exact map of a Gaussian.

Calibration of exact posterior samples and of steered ones holds; that of DPS and of samples that know nothing of the
measurement must not.
"""

import dataclasses
import json
import math

import pytest
import torch

from mfm_ref import FlowMap, GaussianLikelihood, GaussianMixture
from mfm_ref.networks import GaussianNetwork
from toy.images import inverse, inverse_report
from toy.images.data import Images, Split
from toy.images.rung import Rung
from toy.images.section import Section

SIZES = {"inverse_images": 16, "inverse_samples": 8, "inverse_draws": 8, "inverse_steps": 30, "inverse_dps_steps": 30}


class Exact(GaussianNetwork):
    """What an untrained U-Net is, without its convolutions."""

    def correction(self, standard, known, times, y):
        return torch.zeros_like(standard)


def judge(x):
    return x.flatten(1)[:, 20:30].argmax(-1)


@pytest.fixture(scope="module")
def rung():
    """Smooth 8×8 images around a slope: N(mean, cov) itself, and as many draws of it as a data set."""
    places = torch.cartesian_prod(torch.arange(8.0), torch.arange(8.0))
    cov = 0.5 * (-torch.cdist(places, places).square() / 8).exp() + 0.1 * torch.eye(64)
    mean = torch.linspace(-0.5, 0.5, 64).view(1, 8, 8)
    options = {"n_classes": 0, "reads_guidance": False, "min_std": 0.05}
    X = FlowMap(Exact((1, 8, 8), mean.flatten(), cov, **options))
    noise = torch.randn((20000, 64), generator=torch.Generator().manual_seed(1))
    images = (noise @ torch.linalg.cholesky(cov).T).view(-1, 1, 8, 8) + mean
    data = Images(images, judge(images), 0.0)
    return Rung(Split(data, data, data), torch.nn.Identity(), judge, X, X, {"X": X})


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return inverse.Settings(**inverse.PRESETS["fast"] | SIZES, out=tmp_path_factory.mktemp("inverse"))


@pytest.fixture(scope="module")
def cases(config, rung):
    return inverse.measured(config, rung)


@pytest.fixture(scope="module")
def steered(config, rung, cases):
    """{method: samples} of super-resolution."""
    case = cases["super-resolution"]
    return {name: inverse.samples_of(config, rung.X, case, "test", name, "")[0] for name in ("both, SDE", "DPS")}


def numbers(case, x, seed=0):
    return inverse.calibration(case, x, torch.Generator().manual_seed(seed))


def off(found) -> list[float]:
    """Distances from what exact samples have, in standard errors: spread, coverage of 50 % and of 90 %, residual."""
    pairs = [(found["spread_over_error"], 1), (found["residual"], 1)]
    pairs += [(found["coverage"][level], float(level)) for level in ("0.5", "0.9")]
    return [(value - nominal) / error for (value, error), nominal in pairs]


def test_problems_measure_what_their_names_say():
    x = torch.randn((3, 1, 8, 12), generator=torch.Generator().manual_seed(0))
    found = {name: x.flatten(1) @ problem.a.T for name, problem in inverse.problems_of((1, 8, 12), 1.0).items()}
    hidden = torch.ones(8, 12, dtype=torch.bool)
    hidden[2:6, 3:9] = False
    assert torch.equal(found["inpainting"], x[:, 0][:, hidden])
    assert torch.equal(found["inpainting, half"].view(3, 8, 6), x[:, 0, :, :6])
    means = torch.stack([x[:, 0, i : i + 4, j : j + 4].mean((1, 2)) for i in (0, 4) for j in (0, 4, 8)], 1)
    torch.testing.assert_close(found["super-resolution"], means)
    # A blur keeps a constant, and spreads a point as a Gaussian, as far from an edge as it reaches.
    blur = inverse.problems_of((1, 24, 24), 1.0)["deblurring"].a
    torch.testing.assert_close(blur @ torch.ones(24 * 24), torch.ones(24 * 24))
    point = torch.zeros(24, 24)
    point[12, 12] = 1
    seen = (blur @ point.flatten()).view(24, 24)
    expected = torch.tensor([[math.exp(-((i - 12) ** 2 + (j - 12) ** 2) / 2) for j in range(24)] for i in range(24)])
    torch.testing.assert_close(seen, expected / expected.sum(), atol=1e-6, rtol=1e-4)


def test_trivial_inverses_are_pseudo_inverses():
    for name, problem in inverse.problems_of((1, 8, 8), 1.0).items():
        if name != "deblurring":
            torch.testing.assert_close(problem.back, torch.linalg.pinv(problem.a), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("shape", "blur", "message"),
    [
        ((1, 8, 10), 1.0, r"multiples of 4, got \(1, 8, 10\)"),
        ((3, 8, 8), 1.0, r"must be \(1, H, W\)"),
        ((1, 8, 8), 0.0, "inverse_blur must be positive, got 0"),
    ],
)
def test_what_cannot_be_measured_is_refused(shape, blur, message):
    with pytest.raises(ValueError, match=message):
        inverse.problems_of(shape, blur)


@pytest.mark.parametrize("field", ["inverse_images", "inverse_samples", "inverse_compared"])
def test_counts_below_two_are_refused(rung, config, field):
    with pytest.raises(ValueError, match=f"{field} must be an integer >= 2"):
        inverse.run(dataclasses.replace(config, **{field: 1}), rung)


def test_measurements_have_their_noise(config, cases):
    for case in cases.values():
        residual = (case.y - case.truth.flatten(1) @ case.problem.a.T) / config.inverse_sigma
        # χ² of 64 to 1024 numbers: its standard error is √(2/numbers); 4 of them, for 4 problems 3e-4 in all
        assert abs(float(residual.square().mean()) - 1) < 4 * math.sqrt(2 / residual.numel())


def test_gaussian_posterior_is_the_closed_form_tilt(config, rung, cases):
    mean, cov = rung.data.train.gaussian()
    p1 = GaussianMixture(torch.ones(1), mean.view(1, 64), cov.unsqueeze(0))
    for case in cases.values():
        tilted = p1.tilt(GaussianLikelihood(case.problem.a, case.y[1], config.inverse_sigma))
        torch.testing.assert_close(case.means[1].flatten(), tilted.mean, atol=2e-4, rtol=0)
        torch.testing.assert_close(case.cov, tilted.cov, atol=2e-4, rtol=0)
        x = case.gaussian_samples(400, torch.Generator().manual_seed(0))[1].flatten(1)
        std = tilted.cov.diagonal().sqrt()
        assert float(((x.mean(0) - tilted.mean) / std).abs().max()) < 5 / math.sqrt(400)
        torch.testing.assert_close(torch.cov(x.T), tilted.cov, atol=5 * float(std.max()) ** 2 / math.sqrt(400), rtol=0)


@pytest.mark.parametrize("task", ["inpainting", "inpainting, half", "deblurring", "super-resolution"])
def test_exact_samples_are_calibrated(cases, task):
    case = cases[task]
    x = case.gaussian_samples(32, torch.Generator().manual_seed(3))
    # 16 numbers in all; jackknife errors of 16 images have tails of their own, so 4.5 of them
    assert max(map(abs, off(numbers(case, x)))) < 4.5


def test_steered_samples_are_those_of_the_closed_form(cases, steered):
    case, x = cases["super-resolution"], steered["both, SDE"]
    found = numbers(case, x)
    # Standard errors here are 0.08, 0.02 and 0.03; few draws fit the measurement somewhat too well.
    assert abs(found["spread_over_error"][0] - 1) < 0.3
    assert abs(found["coverage"]["0.5"][0] - 0.5) < 0.08
    assert abs(found["residual"][0] - 1) < 0.45
    variance = float(case.cov.diagonal().mean())
    apart = float((x.mean(1) - case.means).square().mean())
    assert apart < (1 / x.shape[1] + 0.1) * variance  # of which the noise of S samples is 1/S
    assert float(x.var(1).mean()) == pytest.approx(variance, rel=0.2)


def test_wrong_samplers_fail(cases, steered):
    case, rng = cases["super-resolution"], torch.Generator().manual_seed(4)
    dps = numbers(case, steered["DPS"])
    assert dps["residual"][0] < 0.5  # each sample fits the measurement better than the truth does
    blind = numbers(case, case.truth[:8].expand(16, 8, 1, 8, 8))  # samples of p₁, whatever was measured
    assert blind["residual"][0] > 3
    exact = case.gaussian_samples(16, rng)
    narrow = numbers(case, (exact + case.means.unsqueeze(1)) / 2)  # half as wide as they should be
    assert narrow["spread_over_error"][0] < 0.4
    assert narrow["coverage"]["0.9"][0] < 0.8
    shifted = numbers(case, exact + 0.7)
    assert shifted["coverage"]["0.5"][0] < 0.4
    for found in (dps, blind, narrow, shifted):
        assert max(map(abs, off(found))) > 5


def test_ranks_count_the_samples_below(monkeypatch):
    monkeypatch.setattr(inverse, "JITTER", 0.0)
    x = torch.tensor([[[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]])
    truth = torch.tensor([[1.5, 2.0]])
    assert inverse.ranks_of(x, truth, torch.Generator()).tolist() == [[2, 0]]


def test_ratio_and_its_error():
    rng = torch.Generator().manual_seed(0)
    below = torch.ones(400)
    above = 2 + torch.randn(400, generator=rng)
    value, error = inverse.ratio(above, below)
    assert value == pytest.approx(float(above.mean()))
    assert error == pytest.approx(float(above.std()) / 20, rel=1e-4)  # of a mean the jackknife error is the usual one


def test_agreement_of_classes(cases):
    case = dataclasses.replace(cases["inpainting, half"].first(2), classes=torch.tensor([4, 7]))
    classes = torch.tensor([[4, 4, 1, 1], [0, 1, 2, 3]])
    found = inverse.agreement(case, torch.zeros(2, 4, 1, 8, 8), lambda _: classes.flatten())
    assert found == {"same": 0.25, "among": 0.5, "pairs": pytest.approx((4 / 12 + 0) / 2)}


@pytest.fixture(scope="module")
def result(rung, tmp_path_factory):
    config = inverse.Settings(**inverse.PRESETS["fast"], out=tmp_path_factory.mktemp("run"))
    return config, inverse.run(config, rung)


def test_run_writes_what_its_section_needs(result):
    config, found = result
    section = inverse.section(json.loads(json.dumps(found, allow_nan=False)))
    assert isinstance(section, Section)
    assert all((config.out / name).exists() for name, _ in section.pictures)
    for table in section.tables:
        assert all(len(row) == len(table.header) for row in table.rows)


def test_a_run_that_goes_on_gives_the_same_numbers(result, rung):
    config, found = result
    kept = config.out / "checkpoints" / "inverse"
    for k, folder in enumerate(sorted(kept.iterdir())):
        if k % 2:  # as if it had died before
            (folder / "batch-00001.safetensors").unlink()
    again = inverse.run(config, rung)
    for task, facts in again["tasks"].items():
        for name, row in facts["some"].items():
            assert (row or {}) | {"seconds": 0} == (found["tasks"][task]["some"][name] or {}) | {"seconds": 0}


def test_a_method_that_diverges_is_named_so(result, rung, cases, monkeypatch):
    config, found = result
    case = cases["inpainting, half"].first(2)
    monkeypatch.setattr(inverse, "steer", lambda *a, **k: (_ for _ in ()).throw(ValueError("x must be finite")))
    assert inverse.samples_of(dataclasses.replace(config, seed=9), rung.X, case, "other", "DPS", "") is None
    lost = json.loads(json.dumps(found))
    for facts in lost["tasks"].values():
        facts["all"]["DPS"] = facts["some"]["DPS"] = facts["all"]["both, SDE"] = None
    section = inverse.section(lost)
    assert "the samples diverge" in section.text
    for table in section.tables:
        assert all(len(row) == len(table.header) for row in table.rows)


def test_samples_that_leave_the_images_have_diverged(result, rung, cases, monkeypatch):
    config, _ = result
    case = cases["inpainting, half"].first(2)
    for size, kept in ((9.0, True), (11.0, False)):
        x = torch.full((config.inverse_samples, 1, 8, 8), size)
        monkeypatch.setattr(inverse, "steer", lambda *a, x=x, **k: (x, inverse.Cost(len(x))))
        found = inverse.samples_of(dataclasses.replace(config, seed=8), rung.X, case, f"all {size}", "DPS", "")
        assert (found is not None) == kept


def test_words_follow_the_numbers(result):
    _, found = result
    changed = json.loads(json.dumps(found)) | {"images": 16, "jitter": 0.1, "pixels": 64, "judge_saw_them": False}
    facts = changed["tasks"]["inpainting, half"]
    facts["all"]["both, SDE"]["coverage"] |= {"0.5": [0.7, 0.05], "0.9": [0.91, 0.05]}
    facts["all"]["DPS"] = facts["all"]["Gaussian"] | {"coverage": {"0.5": [0.1, 0.05], "0.9": [0.2, 0.05]}}
    facts["open"] = 32
    text = inverse.section(changed).text
    assert "central half of the samples more often than it should be (0.70)" in text
    assert "central 90 % as often as it should be, within two standard errors (0.91)" in text
    assert "with DPS the central half has it less often than it should be (0.10)" in text
    assert "inpainting, half: 50 %" in text
    assert "noise of standard deviation 0.1" in text
    assert "was trained on these very images" not in text
    assert "was trained on these very images" in inverse.section(changed | {"judge_saw_them": True}).text


def test_comparisons_are_counted(result):
    _, found = result
    changed = json.loads(json.dumps(found)) | {"images": 16}
    for facts in changed["tasks"].values():
        facts["all"]["DPS"] = facts["all"]["Gaussian"]
    facts["all"]["DPS"] = None  # of the last task
    section = inverse.section(changed)
    text = section.text.split("\n\n", 2)[2]
    made = text.count("than it should be (") + text.count("within two standard errors (")
    assert made == 4 * 3 - 1
    assert f"its level {made} times below" in section.text
    assert "±" in section.tables[1].rows[0][2]


def test_few_images_have_no_standard_errors(result):
    _, found = result
    assert found["images"] < inverse_report.ENOUGH
    section = inverse.section(json.loads(json.dumps(found)))
    assert "numbers stand alone, without a verdict" in section.text
    assert "should be" not in section.text
    assert "within the central half of the samples with frequency" in section.text
    assert not any("±" in cell for table in section.tables for row in table.rows for cell in row)
    assert "±" not in section.text
    assert all("too few" in table.caption for table in section.tables[1:])


def test_the_legend_names_methods_that_diverge_somewhere(result, monkeypatch):
    config, found = result
    changed = json.loads(json.dumps(found))
    for facts in list(changed["tasks"].values())[:-1]:
        facts["all"]["DPS"] = None
    for facts in changed["tasks"].values():
        facts["all"]["both, SDE"] = facts["all"]["Gaussian"]
    changed["tasks"]["super-resolution"]["all"]["DPS"] = facts["all"]["Gaussian"]
    figures = []
    monkeypatch.setattr(inverse, "save_figure", lambda figure, path: figures.append(figure))
    inverse.draw_calibration(config, changed)
    legends = [ax.get_legend() for ax in figures[0].axes]
    assert [[text.get_text() for text in legend.get_texts()] for legend in legends if legend] == [
        ["Gaussian", "both, SDE", "DPS"]
    ]
