"""The training loop, by what its trajectory shows, and the files that a run leaves. Resuming: test_resume.py."""

import json
import math
import os

import matplotlib
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from mfm_ref import train
from mfm_ref.figures import COLOURS, new_figure, save_figure
from mfm_ref.files import atomic_path, save_json, save_weights


class Scalar(nn.Module):
    """One weight, starting at 0."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros((), dtype=torch.float64))


def trajectory(steps: int, loss=lambda model: model.w, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """The weight before each update and after the last, and its average at the end."""
    seen = []

    def spy(model):
        seen.append(model.w.detach().clone())
        return loss(model)

    model = Scalar()
    average, _ = train(model, spy, steps=steps, **options)
    return torch.stack([*seen, model.w.detach()]), average.w


# ---- train ---------------------------------------------------------------------------------------------


def test_learning_rate_warms_up_and_falls_as_a_cosine():
    """Under a constant gradient Adam's step is the learning rate itself: 1/5, …, 5/5 of it, then down to 0."""
    weights, _ = trajectory(200, lr=0.1, warmup=5)
    rates = -weights.diff() / 0.1
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0], rel=2e-3)
    assert rates[100] == pytest.approx(0.5, rel=1e-5)
    assert rates[50] + rates[150] == pytest.approx(1.0, rel=1e-5)  # a cosine is odd about its middle
    assert rates[-1] < 1e-3
    assert (rates[5:].diff() < 0).all()


def test_average_forgets_by_halves():
    """With decay 1/2 the last weights count 1/2, 1/4, …; the slow start, over by the 8th update, is forgotten."""
    weights, average = trajectory(60, lr=0.1, decay=0.5)
    halves = 0.5 ** torch.arange(1, 51, dtype=torch.float64)
    assert float(average) == pytest.approx(float((halves * weights.flip(0)[:50]).sum()), abs=1e-9)


def test_average_starts_fast_and_may_be_switched_off():
    """The first update keeps 1/10 of the initial weights, whatever the decay; decay 0 keeps nothing."""
    weights, average = trajectory(1, lr=0.1, warmup=1, decay=0.999)
    assert float(average) == pytest.approx(0.9 * float(weights[1]))
    weights, average = trajectory(10, decay=0.0)
    assert torch.equal(average, weights[-1])


def test_one_wild_gradient_is_clipped():
    """Gradients of size one with a single one of 10⁶ at step 5: clipped to norm 1, the trajectory is the same."""
    steps = iter(range(20))

    def wild(model):
        return model.w * (1e6 if next(steps) == 5 else 1.0)

    calm, _ = trajectory(20)
    clipped, _ = trajectory(20, wild)
    assert torch.allclose(clipped, calm, rtol=1e-5)
    steps = iter(range(20))
    unclipped, _ = trajectory(20, wild, clip=1e9)
    assert not torch.allclose(unclipped, calm, rtol=0.1)


def test_a_minimum_is_found_and_the_history_is_the_loss():
    model, target = nn.Linear(2, 1), torch.tensor([[1.0, -2.0]])
    x = torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
    average, history = train(model, lambda m: (m(x) - x @ target.T).square().mean(), steps=300, lr=0.05, decay=0.9)
    assert len(history) == 300
    assert history[0] > 0.1
    assert history[-1] < 1e-6
    assert torch.allclose(average.weight, target, atol=1e-2)


def test_the_average_is_apart_from_the_model():
    """Eval mode, no gradients, its own tensors; the model is trained in place and stays in training mode."""
    model = nn.Linear(2, 1)
    before = model.weight.detach().clone()
    average, _ = train(model, lambda m: m.weight.sum(), steps=3)
    assert not average.training
    assert model.training
    assert not any(parameter.requires_grad for parameter in average.parameters())
    assert not torch.equal(model.weight, before)
    assert average.weight.data_ptr() != model.weight.data_ptr()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_with_its_step(bad):
    losses = iter([1.0, 1.0, bad])
    with pytest.raises(ValueError, match="the loss at step 2 must be finite"):
        train(Scalar(), lambda model: model.w + next(losses), steps=5)


@pytest.mark.parametrize("change", [{"steps": 0}, {"steps": -1}, {"steps": 1.5}, {"steps": 5, "every": 0}])
def test_train_refuses_counts(change):
    with pytest.raises(ValueError, match="must be an integer >= 1"):
        train(Scalar(), lambda model: model.w, **change)


def test_a_progress_bar_is_shown_where_it_is_named(capfd):
    trajectory(3)
    assert capfd.readouterr().err == ""
    trajectory(3, progress="teaching")
    shown = capfd.readouterr().err
    assert "teaching" in shown
    assert "loss=" in shown


# ---- report --------------------------------------------------------------------------------------------


def test_a_file_is_whole_or_not_there(tmp_path):
    """A writer that fails half-way leaves the old file, and nothing beside it."""
    path = tmp_path / "deep" / "report.json"
    save_json({"a": 1.5, "b": [1, 2]}, path)
    assert json.loads(path.read_text()) == {"a": 1.5, "b": [1, 2]}
    assert path.read_text().endswith("\n")

    def half():
        with atomic_path(path) as temporary:
            temporary.write_text("half")
            assert temporary.parent == path.parent  # a rename across file systems would not be atomic
            assert json.loads(path.read_text())["a"] == 1.5
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        half()
    assert json.loads(path.read_text())["a"] == 1.5
    assert os.listdir(path.parent) == ["report.json"]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_reports_refuse_numbers_that_json_lacks(tmp_path, bad):
    path = tmp_path / "report.json"
    with pytest.raises(ValueError, match="not JSON compliant"):
        save_json({"ratio": bad}, path)
    assert not path.exists()
    assert os.listdir(tmp_path) == []


def test_weights_come_back_bit_by_bit(tmp_path):
    """Buffers too, and tensors that are not contiguous."""
    model = nn.BatchNorm1d(3)
    model.register_buffer("turned", torch.randn(4, 2).T)
    path = tmp_path / "weights.safetensors"
    save_weights(model, path)
    loaded = load_file(path)
    assert set(loaded) == set(model.state_dict())
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())
    assert os.listdir(tmp_path) == ["weights.safetensors"]


def test_figures_are_pngs_of_the_asked_size_and_leave_the_style_alone(tmp_path):
    before = dict(matplotlib.rcParams)
    figure, axes = new_figure(2, 3, size=(1.0, 0.5), sharex=True)
    assert dict(matplotlib.rcParams) == before
    assert axes.shape == (2, 3)
    axes[0, 0].plot([0, 1], color=COLOURS["blue"])
    path = tmp_path / "picture.png"
    save_figure(figure, path)
    header = path.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    assert [int.from_bytes(header[k : k + 4], "big") for k in (16, 20)] == [360, 120]  # 3 × 1 and 2 × 0.5 inches
    assert os.listdir(tmp_path) == ["picture.png"]
