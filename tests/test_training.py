"""The training loop, by what its trajectory shows, and the files that a run leaves. Resuming: test_resume.py."""

import itertools
import json
import math
import os
import sys
import types

import matplotlib
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from mfm_ref import MLP, FlowMap, RandomBatches, TrainConfig, Watched, meta_flow_map_loss, train
from mfm_ref.figures import COLOURS, new_figure, save_figure
from mfm_ref.files import atomic_path, save_json, save_weights
from mfm_ref.recipe import CONSISTENCY
from tests.helpers import gaussian


class Scalar(nn.Module):
    """One weight."""

    def __init__(self, start: float = 0.0):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(start, dtype=torch.float64))


def trajectory(steps: int, loss=lambda model: model.w, start=0.0, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """The weight before each update and after the last, and its average at the end."""
    seen = []

    def spy(model, batch, rng):
        seen.append(model.w.detach().clone())
        return loss(model)

    model = Scalar(start)
    average, _ = train(model, spy, itertools.count(), TrainConfig(steps=steps, **options))
    return torch.stack([*seen, model.w.detach()]), average.w


def noisy(model, batch, rng):
    return (model.w - torch.randn((), generator=rng, dtype=torch.float64)).square()


# ---- the update ----------------------------------------------------------------------------------------


def test_learning_rate_warms_up_and_falls_as_a_cosine():
    """Under a constant gradient Adam's step is the learning rate itself: 1/5, …, 5/5 of it, then down to 0."""
    weights, _ = trajectory(200, lr=0.1, warmup=5)
    rates = -weights.diff() / 0.1
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0], rel=2e-3)
    assert rates[100] == pytest.approx(0.5, rel=1e-5)
    assert rates[50] + rates[150] == pytest.approx(1.0, rel=1e-5)  # a cosine is odd about its middle
    assert rates[-1] < 1e-3
    assert (rates[5:].diff() < 0).all()


def test_a_constant_learning_rate_stays_after_its_warmup():
    weights, _ = trajectory(50, lr=0.1, warmup=4, schedule="constant")
    assert -weights.diff()[:4] == pytest.approx([0.025, 0.05, 0.075, 0.1], rel=1e-6)
    assert -weights.diff()[4:] == pytest.approx([0.1] * 46, rel=1e-6)


@pytest.mark.parametrize("optimizer", ["adamw", "radam"])
def test_decoupled_weight_decay_shrinks_by_the_learning_rate(optimizer):
    """Without a gradient, n updates leave (1 − lr · decay)^n of a weight."""
    options = {"lr": 0.1, "schedule": "constant", "warmup": 0, "weight_decay": 0.5}
    weights, _ = trajectory(20, lambda model: 0 * model.w, start=3.0, optimizer=optimizer, **options)
    assert float(weights[-1]) == pytest.approx(3.0 * 0.95**20)
    weights, _ = trajectory(20, lambda model: 0 * model.w, start=3.0, optimizer="adam", **options)
    assert weights.diff()[:3] == pytest.approx([-0.1] * 3, rel=1e-2)  # in Adam it is a gradient, of unit size at first


def test_radam_holds_back_while_its_variance_is_unknown():
    """Its first updates are those of momentum SGD, lr times the gradient's mean, whatever the gradient's size."""
    weights, _ = trajectory(3, lambda model: 1e-3 * model.w, lr=0.1, optimizer="radam", warmup=0, schedule="constant")
    assert -weights.diff() == pytest.approx([1e-4] * 3, rel=1e-6)


def test_betas_are_the_memory_of_the_moments():
    """After 50 gradients of 1 come gradients of 0; the first update then still moves by β₁/√β₂, nearly."""
    steps = iter(range(60))
    weights, _ = trajectory(
        51,
        lambda model: model.w * (next(steps) < 50),
        lr=0.1,
        betas=(0.5, 0.9),
        warmup=0,
        schedule="constant",
    )
    assert -float(weights.diff()[-1]) == pytest.approx(0.1 * 0.5 / math.sqrt(0.9), rel=0.01)


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
    unclipped, _ = trajectory(20, wild, clip=0.0)
    assert not torch.allclose(unclipped, calm, rtol=0.1)
    steps = iter(range(20))
    assert torch.equal(trajectory(20, wild, clip=1e9)[0], unclipped)


def test_accumulated_batches_are_one_batch():
    """Four batches of 8 to an update, and one of 32, walk the same way."""
    rows = torch.randn(10, 32, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def walk(batches, accumulate):
        model = nn.Linear(3, 1, dtype=torch.float64)
        nn.init.zeros_(model.weight), nn.init.zeros_(model.bias)
        config = TrainConfig(steps=10, lr=0.1, warmup=0, accumulate=accumulate)
        _, history = train(model, lambda m, x, rng: (m(x) - x.sum(1, keepdim=True)).square().mean(), batches, config)
        return model.weight, history

    whole, parts = walk(rows, 1), walk(rows.reshape(40, 8, 3), 4)
    assert torch.allclose(whole[0], parts[0], rtol=1e-10)
    assert whole[1] == pytest.approx(parts[1], rel=1e-10)


def test_a_minimum_is_found_and_the_history_is_the_loss():
    model, target = nn.Linear(2, 1), torch.tensor([[1.0, -2.0]])
    x = torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
    config = TrainConfig(steps=300, lr=0.05, decay=0.9)
    average, history = train(model, lambda m, x, _: (m(x) - x @ target.T).square().mean(), itertools.repeat(x), config)
    assert len(history) == 300
    assert history[0] > 0.1
    assert history[-1] < 1e-6
    assert torch.allclose(average.weight, target, atol=1e-2)


def test_the_average_is_apart_from_the_model():
    """Eval mode, no gradients, its own tensors; the model is trained in place and stays in training mode."""
    model = nn.Linear(2, 1)
    before = model.weight.detach().clone()
    average, _ = train(model, lambda m, batch, rng: m.weight.sum(), itertools.count(), TrainConfig(steps=3))
    assert not average.training
    assert model.training
    assert not any(parameter.requires_grad for parameter in average.parameters())
    assert not torch.equal(model.weight, before)
    assert average.weight.data_ptr() != model.weight.data_ptr()


# ---- noise, precision, compilation -----------------------------------------------------------------------


def test_noise_comes_from_the_seed_alone():
    """And torch's own source is afterwards where it was before, though a loss may draw from it."""

    def wasteful(model, batch, rng):
        return noisy(model, batch, rng) + 0 * torch.randn(()) + noisy(model, batch, None)

    def history(seed):
        before = torch.get_rng_state()
        _, losses = train(Scalar(), wasteful, itertools.count(), TrainConfig(steps=5, seed=seed))
        assert torch.equal(torch.get_rng_state(), before)
        return losses

    first = history(3)
    torch.rand(7)
    assert history(3) == first
    assert all(a != b for a, b in zip(history(4), first, strict=True))


def test_bfloat16_computes_so_and_keeps_float32_weights():
    seen = set()

    def loss(model, x, rng):
        out = model(x)
        seen.add(out.dtype)
        return (out.float() - 1).square().mean()

    def history(precision):
        torch.manual_seed(0)
        model = nn.Linear(8, 8)
        x = torch.linspace(-1, 1, 64).view(8, 8)
        _, losses = train(model, loss, itertools.repeat(x), TrainConfig(steps=20, lr=0.02, precision=precision))
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        return losses

    exact, rounded = history("float32"), history("bfloat16")
    assert seen == {torch.float32, torch.bfloat16}
    assert rounded == pytest.approx(exact, rel=2e-2)
    assert rounded != exact


def test_a_compiled_loss_has_the_same_numbers():
    """Noise included: both draw from torch's own source. The whole loss is one graph, without breaks."""
    p1 = gaussian()
    model = FlowMap(MLP(p1.mean, p1.cov, hidden=16, depth=2))
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def run(backend):
        model.load_state_dict(start)
        x1 = p1.sample(32, generator=torch.Generator().manual_seed(0))
        config = TrainConfig(steps=4, lr=0.01, warmup=0, compile=backend)
        return train(model, lambda X, x, rng: meta_flow_map_loss(X, x), itertools.repeat(x1), config)[1]

    eager = run("")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    assert run("aot_eager") == pytest.approx(eager, rel=1e-9)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]


def compiled_cases() -> list:
    """One of each kind: a midpoint, and a derivative in u, in s, and along data; the rest of the product is slow."""
    often = {("eulerian", True, "bfloat16"), ("mean_flow", False, "float32")}
    often |= {("semigroup", True, "float32"), ("lagrangian", True, "float32")}
    cases = itertools.product(CONSISTENCY, [False, True], ["float32", "bfloat16"])
    return [pytest.param(*case, marks=() if case in often else pytest.mark.slow) for case in cases]


@pytest.mark.parametrize(("name", "normalise", "precision"), compiled_cases())
def test_every_objective_can_be_compiled(name, normalise, precision):
    """One step has the loss of the same step uncompiled, whose noise comes from torch's source all the same."""
    found = []
    for backend in ("aot_eager", ""):
        torch.manual_seed(0)
        X = FlowMap(MLP(torch.zeros(2), torch.eye(2), hidden=8, depth=2, normalise=normalise))
        nn.init.normal_(X.network.outlet.weight)

        def loss(X, x1, generator):
            return meta_flow_map_loss(X, x1, drift=lambda t, x: -x, consistency=name)

        data = itertools.repeat(torch.randn(16, 2, generator=torch.Generator().manual_seed(2)))
        with torch._dynamo.config.patch(recompile_limit=100):
            found += train(X, loss, data, TrainConfig(steps=1, compile=backend, precision=precision))[1]
    assert found[0] == pytest.approx(found[1], rel=1e-4 if precision == "float32" else 0.1)


def test_what_train_returns_can_be_trained_on():
    """After what the error says."""

    def go_on(model):
        return train(model, lambda m, x, g: m.w, itertools.repeat(None), TrainConfig(steps=1))[0]

    average = go_on(Scalar(1.0))
    with pytest.raises(ValueError, match=r"requires a gradient, got none; .* model.requires_grad_\(\).train\(\)"):
        go_on(average)
    before = average.w.clone()
    assert go_on(average.requires_grad_().train()) is not average
    assert not torch.equal(average.w, before)
    with pytest.raises(ValueError, match="requires a gradient, got none"):
        go_on(nn.Identity())


def test_a_compiled_loss_gets_no_generator():
    """torch.compile cannot trace one."""
    seen = []

    def loss(model, batch, rng):
        seen.append(rng is None)
        return model.w.square()

    train(Scalar(1.0), loss, itertools.repeat(torch.zeros(1)), TrainConfig(steps=1, compile="eager"))
    train(Scalar(1.0), loss, itertools.repeat(torch.zeros(1)), TrainConfig(steps=1))
    assert seen == [True, False]


# ---- refusals --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_with_its_step(bad):
    losses = [1.0, 1.0, bad]
    with pytest.raises(ValueError, match=f"the loss at step 2 must be finite, got {bad}.*good checkpoint is None"):
        train(Scalar(), lambda model, value, rng: model.w + value, losses, TrainConfig(steps=5))


def test_a_term_that_is_not_finite_is_named_with_the_last_good_checkpoint(tmp_path):
    def loss(model, value, rng):
        return {"even": model.w.square(), "odd": model.w * value}

    config = TrainConfig(steps=9, checkpoint_every=2)
    message = f"the term odd of the loss at step 5 must be finite, got nan; .* is {tmp_path}/step-00000004"
    with pytest.raises(ValueError, match=message):
        train(Scalar(1.0), loss, [1.0] * 5 + [math.nan], config, folder=tmp_path)


def test_a_loss_that_refuses_its_input_stops_with_step_and_last_good_checkpoint(tmp_path):
    """The weights overflow, and the map refuses a state that it is given before there is a loss to look at."""
    p1 = gaussian()
    torch.manual_seed(0)
    X = FlowMap(MLP(p1.mean.float(), p1.cov.float(), hidden=8, depth=3))
    nn.init.normal_(X.network.outlet.weight)  # else the first update changes the last layer alone
    data = RandomBatches(lambda rng: p1.sample(32, generator=rng).float(), torch.Generator().manual_seed(0))
    config = TrainConfig(steps=9, lr=1e18, clip=0.0, warmup=0, checkpoint_every=1)
    with pytest.raises(
        ValueError, match=r"at step 1: the state z must be finite, .*; the last good .*/step-00000001$"
    ) as stopped:
        train(
            X,
            lambda X, x, rng: meta_flow_map_loss(X, x, consistency="semigroup", generator=rng),
            data,
            config,
            folder=tmp_path,
        )
    assert isinstance(stopped.value.__cause__, ValueError)


def test_a_gradient_that_is_not_finite_stops_before_it_is_used():
    model = Scalar(0.0)
    with pytest.raises(ValueError, match="the gradient's norm at step 0 must be finite, got inf"):
        train(model, lambda m, batch, rng: m.w.sqrt(), itertools.count(), TrainConfig(steps=5))
    assert model.w.item() == 0.0


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 0},
        {"steps": -1},
        {"steps": 1.5},
        {"accumulate": 0},
        {"checkpoint_every": 0},
        {"log_every": True},
        {"warmup": -1},
        {"seed": -1},
        {"sample_every": -1},
    ],
)
def test_counts_are_checked(change):
    with pytest.raises(ValueError, match=f"{next(iter(change))} must be an integer >= [01]"):
        TrainConfig(**{"steps": 1, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": 0.0}, "lr must be positive and finite, got 0.0"),
        ({"lr": math.nan}, "lr must be positive"),
        ({"weight_decay": -1.0}, "weight_decay and clip must be >= 0"),
        ({"clip": math.nan}, "weight_decay and clip must be >= 0"),
        ({"decay": 1.0}, r"must lie in \[0, 1\)"),
        ({"betas": (0.9, 1.0)}, r"must lie in \[0, 1\)"),
        ({"betas": (0.9,)}, "betas .two."),
        ({"betas": 0.9}, "must be numbers, and betas two of them, got lr = .*, betas = 0.9$"),
        ({"betas": "ab"}, "must be numbers, and betas two of them"),
        ({"lr": "a"}, "must be numbers, .* lr = 'a'"),
        ({"clip": None}, "must be numbers, .* clip = None"),
        ({"optimizer": "sgd"}, "optimizer must be one of adam, adamw, radam, got 'sgd'"),
        ({"schedule": "linear"}, "schedule must be one of cosine, constant, got 'linear'"),
        ({"engine": "fsdp2"}, "engine must be one of ddp, fsdp, got 'fsdp2'"),
        ({"checkpoint_minutes": -1.0}, "checkpoint_minutes must be >= 0 and finite, got -1.0"),
        ({"checkpoint_minutes": math.inf}, "checkpoint_minutes must be >= 0 and finite, got inf"),
        ({"checkpoint_minutes": "a"}, "must be numbers, .* checkpoint_minutes = 'a'"),
        ({"precision": "float16"}, "precision must be one of float32, bfloat16, got 'float16'"),
    ],
)
def test_settings_are_checked(change, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(steps=1, **change)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (lambda w: w.expand(3), r"terms of a loss must be \(\).*got loss: \(3,\)"),
        (lambda w: {"a": w, "b": 1.0}, r"got b: float"),
        (lambda w: {"lr": w}, r"have names outside .*'lr'"),
        (lambda w: {"loss": w, "other": w}, r"have names outside .*'loss'"),
        (lambda w: {}, "at least one term"),
    ],
)
def test_terms_of_a_loss_are_checked(value, message):
    with pytest.raises(ValueError, match=message):
        train(Scalar(), lambda model, batch, rng: value(model.w), itertools.count(), TrainConfig(steps=1))


@pytest.mark.parametrize(
    ("watched", "message"),
    [
        ({"bin": torch.zeros(())}, r"what is watched must be \(2,\) .*got bin: \(\)"),
        ({"bin": 1.0}, r"got bin: float"),
        ({"loss": torch.zeros(2)}, r"have names outside .*'loss'"),
        ({"w": torch.zeros(2)}, r"have names outside .*'w'"),
    ],
)
def test_what_a_loss_watches_is_checked(watched, message):
    with pytest.raises(ValueError, match=message):
        train(
            Scalar(),
            lambda model, batch, rng: Watched({"w": model.w, "v": model.w}, watched),
            itertools.count(),
            TrainConfig(steps=1),
        )


def test_data_that_end_are_refused():
    with pytest.raises(ValueError, match=r"at step 3: data must yield 10 batches, they ended before; .* is None"):
        train(Scalar(), lambda m, b, rng: m.w, range(7), TrainConfig(steps=5, accumulate=2))


# ---- what a run says -------------------------------------------------------------------------------------


def test_a_progress_bar_is_shown_where_it_is_named(capfd):
    train(Scalar(), noisy, itertools.count(), TrainConfig(steps=3))
    assert capfd.readouterr().err == ""
    train(Scalar(), noisy, itertools.count(), TrainConfig(steps=3), progress="teaching")
    shown = capfd.readouterr().err
    assert "teaching" in shown
    assert "loss=" in shown


def test_metrics_are_lines_of_json(tmp_path):
    """Steps 0, 4, 8 and the last; a gradient of (2, 3) has the norm √13, before it is clipped."""

    def loss(model, batch, rng):
        return {"near": 2 * model.weight.sum(), "far": 3 * model.bias.sum() + 1}

    config = TrainConfig(steps=10, lr=0.1, warmup=2, schedule="constant", log_every=4)
    _, history = train(nn.Linear(1, 1), loss, itertools.count(), config, folder=tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 4, 8, 9]
    for line in lines:
        assert set(line) == {"step", "loss", "near", "far", "gradient_norm", "lr", "seconds"}
        assert line["loss"] == pytest.approx(line["near"] + line["far"], abs=1e-12) == history[line["step"]]
        assert line["gradient_norm"] == pytest.approx(math.sqrt(13))
        assert line["lr"] == pytest.approx(0.05 if line["step"] == 0 else 0.1)
    seconds = [line["seconds"] for line in lines]
    assert seconds == sorted(seconds) and seconds[0] > 0


@pytest.mark.parametrize("backend", ["", "aot_eager"])
def test_what_is_watched_is_logged_and_not_minimised(tmp_path, backend):
    """Sums over sums of counts, over both batches of a step: (1 + 2)/(1 + 3) is not the mean of 1 and 2/3."""

    def loss(model, batch, rng):
        total, rows = batch
        return Watched((model.w - 1).square(), {"seen": torch.stack([total * model.w.exp() ** 0, rows])})

    pairs = torch.tensor([[1.0, 1.0], [2.0, 3.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0], [5.0, 2.0]])
    config = TrainConfig(steps=3, accumulate=2, log_every=1, compile=backend)
    _, history = train(Scalar(), loss, pairs, config, folder=tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line.get("seen") for line in lines] == [0.75, None, 2.5]
    assert [line["loss"] for line in lines] == history
    plain = train(Scalar(), lambda m, batch, rng: (m.w - 1).square(), pairs, config)[1]
    assert history == plain


def test_pictures_are_drawn_from_the_average_and_disturb_nothing():
    calls = []

    def draw(average, k):
        torch.manual_seed(99)
        calls.append((k, average.training, float(average.w)))

    def dropped(model, batch, rng):
        return noisy(model, batch, rng) * torch.rand(())

    plain = train(Scalar(), dropped, itertools.count(), TrainConfig(steps=7))
    drawn = train(Scalar(), dropped, itertools.count(), TrainConfig(steps=7, sample_every=3), callback=draw)
    assert plain[1] == drawn[1]
    assert [call[:2] for call in calls] == [(3, False), (6, False)]
    assert calls[0][2] != calls[1][2]


def test_what_would_silently_not_happen_is_refused():
    with pytest.raises(ValueError, match="a callback needs sample_every >= 1 in the config, got 0"):
        train(Scalar(), noisy, itertools.count(), TrainConfig(steps=1), callback=print)
    with pytest.raises(ValueError, match="tensorboard needs a folder"):
        train(Scalar(), noisy, itertools.count(), TrainConfig(steps=1, tensorboard=True))


def test_tensorboard_gets_the_numbers_of_the_metrics_file(tmp_path, monkeypatch):
    events = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            events.append((folder, purge_step))

        def add_scalar(self, name, value, step):
            events.append((name, value, step))

        def close(self):
            events.append("closed")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=SummaryWriter))
    config = TrainConfig(steps=3, log_every=1, tensorboard=True)
    _, history = train(Scalar(), noisy, itertools.count(), config, folder=tmp_path)
    assert events[0] == (str(tmp_path / "tensorboard"), 0)
    assert [event[1:] for event in events if event[0] == "loss"] == [(v, k) for k, v in enumerate(history)]
    assert events[-1] == "closed"


def test_tensorboard_that_is_missing_is_said_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match="pip install tensorboard"):
        train(Scalar(), noisy, itertools.count(), TrainConfig(steps=3, tensorboard=True), folder=tmp_path)


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
