"""Can the Meta Flow Map of the *tilted* path be learnt? At t = 0 it is the flow map of the fine-tuned dynamics.

    python -m toy.tilted_map --out runs/tilted_map

The paper's mixture, tilted by its reward, whose posteriors are known exactly. Three routes see the base's posterior
draws and the reward alone. *Two stages*: a drift fine-tuned by E18, then distilled with it as the teacher. *One stage*:
E18 inside E12, in every context of the map (`tilted_map_loss`). *From samples* of the fine-tuned ODE, as data. The
control is taught by the exact drift b* of p*. Writes tilted_map.png, map/ (of the two stages) and report.json.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mfm_ref import (
    MLP,
    ExactFlowMap,
    FlowMap,
    GaussianMixture,
    MetaFlowMap,
    RandomBatches,
    TrainConfig,
    integrate,
    meta_flow_map_loss,
    sample_posterior,
    sliced_wasserstein,
    train,
)
from mfm_ref.checks import Reward
from mfm_ref.estimators import log_mean_exp
from mfm_ref.figures import COLOURS, new_figure, save_figure
from mfm_ref.files import save_json
from mfm_ref.gaussian import posterior_std
from mfm_ref.interpolant import Drift, glass_statistic, interpolate
from mfm_ref.recipe import no_context
from mfm_ref.sampling import noise_like, time_grid
from mfm_ref.tilted import tilted_map_loss
from mfm_ref.times import balanced_times, context_time
from toy.common import ToyConfig, generator, markdown, option, parse, remove_checkpoints, resumable, start, stream_of
from toy.comparison import posterior_ratio
from toy.mixture import MixtureConfig, paper_mixture, relative_error

LIMIT = 1.6  # of the posterior ratio
LABELS = {
    "two": "two stages",
    "one": "one stage",
    "data": "from samples",
    "control": "control: exact b*",
}
SHOWN = (0.0, 0.2, 0.4, 0.8)  # context times in the picture

Loss = Callable[[FlowMap, Tensor, torch.Generator | None], Tensor]


@dataclasses.dataclass(frozen=True)
class TiltedMapConfig(ToyConfig):
    """Settings of the run; the defaults take about twelve minutes of one core."""

    out: Path = Path("runs/tilted_map")
    base: str = option("", "folder of a trained map of the base; the exact posterior's draws where empty")
    train_steps: int = 7000
    student_steps: int = option(4000, "of fine-tuning the drift")
    batch: int = 1024
    lr: float = 4e-3
    draws: int = option(16, "of the base's posterior, per state")
    pool: int = option(200_000, "samples of the base, of which those of high reward become states and moments")
    ode_samples: int = option(32_768, "of the fine-tuned dynamics, as data")
    contexts: int = option(20, "per time, for the posterior ratio")
    posterior_samples: int = option(4096, "per context")


FAST: dict[str, Any] = {
    "train_steps": 30, "student_steps": 30, "batch": 64, "draws": 4, "pool": 2000, "ode_samples": 256, "contexts": 2,
    "posterior_samples": 128,
}  # fmt: skip


class ExactDraws(ExactFlowMap):
    """The exact map of the base, for those who want its draws alone: made anew, ε unread, 50 times as fast."""

    def __init__(self, p1: GaussianMixture, rng: torch.Generator | None):
        super().__init__(p1)
        self.rng = rng

    def __call__(self, s: Any, u: Any, z: Tensor, t: Any, x: Tensor, y: Tensor | None = None) -> Tensor:
        """One draw of p_{1|t}(·|x) a row."""
        return self.p1.posterior(t, x).sample(1, generator=self.rng)[0]


class Base:
    """What the routes may use of the base: a map that draws from its posteriors, and its drift."""

    def __init__(self, config: TiltedMapConfig, p1: GaussianMixture):
        self.p1 = p1
        self.trained = FlowMap.from_pretrained(config.base).to(config.device) if config.base else None
        self.drift: Drift = p1.drift if self.trained is None else self.trained.drift

    def map(self, rng: torch.Generator | None) -> MetaFlowMap:
        """The trained map, or the exact one, drawing from `rng`."""
        return ExactDraws(self.p1, rng) if self.trained is None else self.trained

    def sample(self, n: int, rng: torch.Generator) -> Tensor:
        """n samples of the base, posterior draws at t = 0."""
        X = self.map(rng)
        with torch.no_grad():
            return sample_posterior(X, 0.0, noise_like(X, n, generator=rng), 1, generator=rng)[0]


def resampled(base: Base, reward: Reward, n: int, rng: torch.Generator) -> Tensor:
    """n samples of the base, resampled with weights e^r: roughly of p*, which is all that the states of E18 need."""
    x1 = base.sample(n, rng)
    return x1[torch.multinomial(torch.softmax(reward(x1), 0), n, replacement=True, generator=rng)]


def asked_times(t: Tensor, std: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    """The times t* at which distillation asks its teacher (E12), as times s = u of the empty context, `(2, B)`."""
    t = context_time(len(t), generator=generator).to(t)
    s, _ = balanced_times(t, posterior_std(t, std**2), generator=generator)
    nowhere = torch.zeros_like(t).unsqueeze(-1)
    t_star, *_ = glass_statistic(s, nowhere, t, nowhere)
    return t_star.expand(2, -1)


def fit(
    config: TiltedMapConfig, name: str, stage: int, X: FlowMap, loss: Loss, data: Tensor, steps: int
) -> tuple[FlowMap, float]:
    """Train on batches drawn from `data` `(N, D)`; the map, and the seconds of all its updates, resumed or not."""

    def batch(rng: torch.Generator) -> Tensor:
        return data[torch.randint(len(data), (config.batch,), generator=rng, device=data.device)]

    batches = RandomBatches(batch, generator(config, stage))
    settings = TrainConfig(steps=steps, lr=config.lr, clip=10.0, seed=stream_of(config, stage))
    X, _ = train(X, loss, batches, settings, progress=LABELS.get(name, name), **resumable(config, name))
    *_, last = (config.out / "checkpoints" / name / "metrics.jsonl").read_text().splitlines()
    return X, json.loads(last)["seconds"]


def train_maps(
    config: TiltedMapConfig, base: Base, reward: Reward, target: GaussianMixture
) -> tuple[dict[str, FlowMap], FlowMap, dict[str, float]]:
    """The maps of all routes, the fine-tuned drift's, and the seconds that each training took."""
    states = resampled(base, reward, config.pool, generator(config, 1))
    mean, cov = states.mean(0), states.T.cov()
    variance = float(cov.diagonal().mean())
    log_scale = float(log_mean_exp(reward(base.sample(config.pool, generator(config, 2)))))
    seconds: dict[str, float] = {}

    def trained(name: str, stage: int, loss: Loss, data: Tensor, start_from: FlowMap | None = None) -> FlowMap:
        torch.manual_seed(config.seed)
        X = FlowMap(MLP(mean, cov, normalise=True)).to(config.device)
        if start_from is not None:
            X.load_state_dict(start_from.state_dict())
        steps = config.student_steps if name == "student" else config.train_steps
        X, seconds[name] = fit(config, name, stage, X, loss, data, steps)
        return X

    def one_stage(X: FlowMap, x1: Tensor, rng: torch.Generator | None) -> Tensor:
        return tilted_map_loss(
            X, x1, base.map(rng), reward, n=config.draws, base=base.drift, data_var=variance, log_scale=log_scale,
            generator=rng,
        )  # fmt: skip

    def fine_tuning(X: FlowMap, x1: Tensor, rng: torch.Generator | None) -> Tensor:
        return tilted_map_loss(
            X, x1, base.map(rng), reward, n=config.draws, base=base.drift, data_var=variance, log_scale=log_scale,
            generator=rng, context=no_context, times=asked_times, consistency=None,
        )  # fmt: skip

    def taught_by(drift: Drift | None) -> Loss:
        p = 0.0 if drift is None else 0.5  # noisy targets, or none
        return lambda X, x1, rng: meta_flow_map_loss(X, x1, drift=drift, data_var=variance, p=p, generator=rng)

    student = trained("student", 3, fine_tuning, states)
    noise = noise_like(student, config.ode_samples, generator=generator(config, 4))
    with torch.no_grad():
        samples = integrate(student.drift, noise, time_grid(25), dynamics="midpoint", progress="fine-tuned ODE")
    maps = {
        "two": trained("two", 6, taught_by(student.drift), samples, student),
        "one": trained("one", 5, one_stage, states),
        "data": trained("data", 7, taught_by(None), samples),
        "control": trained(
            "control", 8, taught_by(target.drift), target.sample(config.pool, generator=generator(config, 9))
        ),
    }
    return maps, student, seconds


def measure(config: TiltedMapConfig, X: FlowMap, target: GaussianMixture) -> dict[str, Any]:
    """The posterior ratio against the exact tilted posteriors, and the flow map at t = 0 against p* itself."""
    rng = generator(config, 10)
    ratio = posterior_ratio(
        X,
        lambda t, n: target.marginal(t).sample(n, generator=rng),
        lambda t, x, n: target.posterior(t, x).sample(n, generator=rng),
        n_contexts=config.contexts,
        n_samples=config.posterior_samples,
        generator=rng,
    )
    n, sets = config.posterior_samples, config.contexts
    nowhere = torch.zeros((sets, 2), device=config.device)
    with torch.no_grad():
        model = sample_posterior(X, 0.0, nowhere, n, generator=rng)  # (n, sets, D)
    exact, other = (target.sample(n * sets, generator=rng).unflatten(0, (n, sets)) for _ in range(2))
    distance, floor = (
        sum(float(sliced_wasserstein(a[:, k], exact[:, k], generator=rng)) for k in range(sets)) / sets
        for a in (model, other)
    )
    return {
        "ratio": ratio,
        "sw2": distance,
        "floor": floor,
        "relative_error": error_of(config, X.drift, target),
    }


def error_of(config: TiltedMapConfig, drift: Drift, target: GaussianMixture) -> float:
    """‖drift − b*‖/‖b*‖ under the tilted path."""
    return relative_error(MixtureConfig(seed=config.seed, device=config.device, fast=config.fast), drift, target)


def main(config: TiltedMapConfig) -> dict[str, Any]:
    """All routes; returns what report.json holds."""
    if config.fast:
        config = dataclasses.replace(config, **FAST)
    start(config)
    p1, reward = paper_mixture(config.device)
    target, base = p1.tilt(reward), Base(config, p1)
    maps, student, seconds = train_maps(config, base, reward, target)
    report = {
        "routes": {name: measure(config, X, target) | {"seconds": seconds[name]} for name, X in maps.items()},
        "student": {"relative_error": error_of(config, student.drift, target), "seconds": seconds["student"]},
        "limit": LIMIT,
        "seconds": sum(seconds.values()),
        "config": {k: v if isinstance(v, int | float) else str(v) for k, v in dataclasses.asdict(config).items()},
    }
    maps["two"].save_pretrained(config.out / "map")
    draw(config, maps, target, report)
    save_json(report, config.out / "report.json")
    remove_checkpoints(config)
    return report


def table(report: dict[str, Any]) -> str:
    """Posterior ratios at each t, and how good the flow map and the drift at t = 0 are."""
    routes = report["routes"]
    times = list(next(iter(routes.values()))["ratio"])
    rows = [
        [
            LABELS[name],
            *(f"{v:.2f}" for v in found["ratio"].values()),
            f"{found['sw2']:.3f}",
            f"{found['relative_error']:.3f}",
        ]
        for name, found in routes.items()
    ]
    floor = routes["control"]["floor"]
    header = ["posterior ratio at t =", *times, f"t = 0: sliced W₂ to p* (floor {floor:.3f})", "error of the drift"]
    return markdown(header, rows)


def draw(config: TiltedMapConfig, maps: dict[str, FlowMap], target: GaussianMixture, report: dict[str, Any]) -> None:
    """Exact tilted posteriors above one-step samples, one context a column; the ratios of all routes against t."""
    rng = generator(config, 11)
    n = len(SHOWN)
    figure, axes = new_figure(3, n + 2, size=(2.0, 2.0))
    x1, noise = target.means[:1].to(config.device), torch.tensor([[0.9, 1.1]], device=config.device)
    for column, t in zip(axes[:, :n].T, SHOWN, strict=True):
        x = interpolate(noise, x1, t)
        exact = target.posterior(t, x).sample(1000, generator=rng)[:, 0]
        clouds = {"exact": exact}
        with torch.no_grad():
            clouds |= {name: sample_posterior(maps[name], t, x, 1000, generator=rng)[:, 0] for name in ("two", "one")}
        centre, reach = (exact.amax(0) + exact.amin(0)) / 2, float((exact.amax(0) - exact.amin(0)).max()) * 0.6
        for ax, (name, cloud) in zip(column, clouds.items(), strict=True):
            colour = {"exact": "grey", "two": "green", "one": "blue"}[name]
            ax.scatter(*cloud.cpu().T, s=2, alpha=0.4, color=COLOURS[colour], linewidths=0)
            ax.plot(*x[0].cpu(), "x", color=COLOURS["red"], markersize=7, markeredgewidth=2)
            ax.set(
                xlim=(float(centre[0]) - reach, float(centre[0]) + reach),
                ylim=(float(centre[1]) - reach, float(centre[1]) + reach),
                aspect="equal",
            )
        column[0].set_title(f"t = {t}")
        column[-1].set_xlabel("first coordinate")
    for ax, label in zip(axes[:, 0], ("exact", "two stages, one step", "one stage, one step"), strict=True):
        ax.set_ylabel(f"{label}\nsecond coordinate")
    for ax in axes[:, n:].flat:
        ax.remove()
    ax = figure.add_subplot(axes[0, 0].get_gridspec()[:, n:])
    styles = {
        "two": ("green", "s-"),
        "one": ("blue", "o-"),
        "data": ("orange", "^-"),
        "control": ("grey", "d--"),
    }
    for name, found in report["routes"].items():
        colour, style = styles[name]
        ax.plot(
            [float(t) for t in found["ratio"]],
            found["ratio"].values(),
            style,
            color=COLOURS[colour],
            label=LABELS[name],
        )
    ax.axhline(LIMIT, color=COLOURS["red"], linewidth=0.8, linestyle=":", label=f"{LIMIT}, the target")
    ax.set(xlabel="context time t", ylim=(0.5, None))
    ax.set_title("posterior ratio: sliced W₂ to exact samples\nover that of two exact sets", fontsize=9)
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize=9)
    ax.legend(frameon=False, fontsize=9)
    figure.suptitle(
        "Posteriors of the tilted law p* ∝ p₁ eʳ given the noisy state x_t (cross): exact, and one step of the maps"
    )
    save_figure(figure, config.out / "tilted_map.png")


if __name__ == "__main__":
    print(table(main(parse(TiltedMapConfig, __doc__ or ""))))
