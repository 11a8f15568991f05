"""The paper's 2-D mixture, where every answer is known: train a Meta Flow Map, sample, steer, fine-tune, compare.

    python -m toy.mixture --out runs/mixture

Writes posteriors.png, steering.png, map/, student/ and report.json.
"""

import copy
import dataclasses
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mfm_ref import (
    MLP,
    FlowMap,
    GaussianLikelihood,
    GaussianMixture,
    RandomBatches,
    TrainConfig,
    dps_drift,
    finetune_loss,
    integrate,
    interpolate,
    meta_flow_map_loss,
    sample_posterior,
    sliced_wasserstein,
    steer,
    train,
)
from mfm_ref.alignment import METHODS
from mfm_ref.figures import COLOURS, new_figure, save_figure
from mfm_ref.files import save_json
from mfm_ref.interpolant import Drift
from mfm_ref.sampling import noise_like, time_grid
from toy.common import ToyConfig, generator, option, parse, remove_checkpoints, resumable, start, stream_of
from toy.comparison import posterior_ratio


@dataclasses.dataclass(frozen=True)
class MixtureConfig(ToyConfig):
    """Settings of the run; the defaults end within four minutes on one core."""

    out: Path = Path("runs/mixture")
    train_steps: int = 7000
    batch: int = 1024
    lr: float = 4e-3
    contexts: int = option(20, "per time, for the posterior ratio")
    posterior_samples: int = option(4096, "per context")
    steering_steps: int = 100
    set_size: int = option(1024, "samples in one steered set")
    steered_sets: int = option(2, "per method that uses the network")
    exact_sets: int = option(192, "of the exact law and of the exact Doob ODE")
    finetune_steps: int = 2000
    finetune_batch: int = 256
    finetune_draws: int = option(8, "posterior samples per state")


FAST: dict[str, Any] = {
    "train_steps": 100, "batch": 128, "contexts": 2, "posterior_samples": 256, "steering_steps": 10,
    "set_size": 128, "steered_sets": 1, "exact_sets": 4, "finetune_steps": 50, "finetune_batch": 64,
}  # fmt: skip


def paper_mixture(device: str = "cpu") -> tuple[GaussianMixture, GaussianLikelihood]:
    """The data p₁ and the reward r of the paper's 2-D experiment."""
    means = torch.tensor([[-3.0, -3.0], [0.0, 0.0], [3.0, 3.0]], device=device)
    covs = 0.5 * torch.eye(2, device=device).repeat(3, 1, 1)
    p1 = GaussianMixture(torch.full((3,), 1 / 3, device=device), means, covs)
    return p1, GaussianLikelihood(torch.tensor([1.2, -0.8], device=device), y=-1.0, sigma=0.2)


def train_map(config: MixtureConfig, p1: GaussianMixture) -> FlowMap:
    """E13 + E14 with the exact drift as the teacher."""
    variance = float(p1.cov.diagonal().mean())
    data = RandomBatches(lambda rng: p1.sample(config.batch, generator=rng), generator(config, 1))

    def loss(X: FlowMap, x1: Tensor, rng: torch.Generator | None) -> Tensor:
        return meta_flow_map_loss(X, x1, drift=p1.drift, data_var=variance, generator=rng)

    X = FlowMap(MLP(p1.mean, p1.cov, normalise=True)).to(config.device)
    settings = TrainConfig(steps=config.train_steps, lr=config.lr, seed=stream_of(config, 1))
    return train(X, loss, data, settings, progress="train the map", **resumable(config, "map"))[0]


def compare_posteriors(config: MixtureConfig, X: FlowMap, p1: GaussianMixture) -> dict[str, float]:
    """{t: sliced W₂ of one-step samples to exact ones / of two exact sets}, each a mean over contexts from p_t."""
    rng = generator(config, 2)
    return posterior_ratio(
        X,
        lambda t, n: p1.marginal(t).sample(n, generator=rng),
        lambda t, x, n: p1.posterior(t, x).sample(n, generator=rng),
        n_contexts=config.contexts,
        n_samples=config.posterior_samples,
        generator=rng,
    )


def steered_samples(
    config: MixtureConfig, X: FlowMap, p1: GaussianMixture, reward: GaussianLikelihood
) -> dict[str, dict[str, Tensor]]:
    """{method: {N: samples}} along the Doob ODE (E7), all on one time grid; N = 0 where no posterior is drawn."""
    rng = generator(config, 3)
    n, grid = config.set_size * config.steered_sets, time_grid(config.steering_steps)
    many = noise_like(X, config.set_size * config.exact_sets, generator=rng)
    samples: dict[str, dict[str, Tensor]] = {
        "exact": {"0": integrate(p1.tilt(reward).drift, many, grid, progress="steer: exact ∇V")},
        "unsteered": {"0": integrate(p1.drift, many[:n], grid, progress="unsteered")},
        "dps": {"0": integrate(lambda t, x: dps_drift(X, reward, t, x), many[:n], grid, progress="steer: DPS")},
    }
    for method in METHODS:
        samples[method] = {}
        for draws in (1, 4, 16):
            label = f"steer: {method}, N = {draws}"
            x, _ = steer(X, reward, n, n=draws, times=grid, method=method, generator=rng, progress=label)
            samples[method][str(draws)] = x
    return samples


class TiltedLaw:
    """Exact sets from p*, and the mean sliced W₂ to them and between them."""

    def __init__(self, config: MixtureConfig, target: GaussianMixture):
        self.config, self.size, rng = config, config.set_size, generator(config, 4)
        self.sets, others = (
            target.sample(self.size * config.exact_sets, generator=rng).split(self.size) for _ in range(2)
        )
        self.floor = self._mean_distance(others)

    def compare(self, samples: Tensor) -> dict[str, float]:
        """Sliced W₂ of samples to p*, in sets of equal size, beside the same between two exact sets."""
        return {"sw2": self._mean_distance(samples.split(self.size)), "floor": self.floor}

    def _mean_distance(self, sets: tuple[Tensor, ...]) -> float:
        rng = generator(self.config, 10)  # the same directions in every comparison: equal sets, equal numbers
        pairs = [(sets[k % len(sets)], exact) for k, exact in enumerate(self.sets)]
        return sum(float(sliced_wasserstein(a, b, generator=rng)) for a, b in pairs) / len(pairs)


def finetune(
    config: MixtureConfig, X: FlowMap, p1: GaussianMixture, reward: GaussianLikelihood, method: str
) -> FlowMap:
    """E18: the student starts as the base; states come from the base's own path, times from U(0, 0.98)."""
    log_scale = float(p1.log_partition(reward))
    data = RandomBatches(lambda rng: p1.sample(config.finetune_batch, generator=rng), generator(config, 5))

    def loss(student: FlowMap, x1: Tensor, rng: torch.Generator | None) -> Tensor:
        t = 0.98 * torch.rand(len(x1), generator=rng, device=x1.device)
        x = interpolate(noise_like(X, len(x1), generator=rng), x1, t)
        n = config.finetune_draws
        return finetune_loss(
            student.drift, X.drift, X, reward, t, x, n=n, method=method, log_scale=log_scale, generator=rng
        )

    student = copy.deepcopy(X).requires_grad_()
    settings = TrainConfig(steps=config.finetune_steps, clip=10.0, seed=stream_of(config, 5))
    resume = resumable(config, f"student-{method}")
    return train(student, loss, data, settings, progress=f"fine-tune: {method}", **resume)[0]


@torch.no_grad()
def relative_error(config: MixtureConfig, drift: Drift, target: GaussianMixture) -> float:
    """‖drift − b*‖/‖b*‖ in L₂ under the tilted path, t uniform in [0.02, 0.98]."""
    rng, n = generator(config, 6), 2_000 if config.fast else 100_000
    x1 = target.sample(n, generator=rng)
    t = 0.02 + 0.96 * torch.rand(n, generator=rng, device=x1.device)
    x = interpolate(torch.randn(x1.shape, generator=rng, device=x1.device), x1, t)
    exact = target.drift(t, x)
    return float((drift(t, x) - exact).norm() / exact.norm())


def main(config: MixtureConfig) -> dict[str, Any]:
    """The whole rung; returns what report.json holds."""
    if config.fast:
        config = dataclasses.replace(config, **FAST)
    began = start(config)
    p1, reward = paper_mixture(config.device)
    X = train_map(config, p1)
    X.save_pretrained(config.out / "map")
    ratio = compare_posteriors(config, X, p1)

    target = p1.tilt(reward)
    law = TiltedLaw(config, target)
    samples = steered_samples(config, X, p1, reward)
    students = {method: finetune(config, X, p1, reward, method) for method in ("gradient", "stein")}
    students["gradient"].save_pretrained(config.out / "student")
    errors = {method: relative_error(config, student.drift, target) for method, student in students.items()}
    with torch.no_grad():
        noise = noise_like(X, config.set_size * config.steered_sets, generator=generator(config, 7))
        tuned = {
            method: integrate(student.drift, noise, time_grid(config.steering_steps))
            for method, student in students.items()
        }

    draw_posteriors(config, X, p1)
    draw_steering(config, samples, tuned["gradient"], target, reward, law)
    report = {
        "posterior_ratio": ratio,
        "steering": {m: {n: law.compare(x) for n, x in by_n.items()} for m, by_n in samples.items()},
        "finetune_relative_error": errors["gradient"],
        "finetune": {m: {"relative_error": errors[m], **law.compare(x)} for m, x in tuned.items()},
        "base_relative_error": relative_error(config, X.drift, target),
        "seconds": time.perf_counter() - began,
        "config": {k: v if isinstance(v, int | float) else str(v) for k, v in dataclasses.asdict(config).items()},
    }
    save_json(report, config.out / "report.json")
    remove_checkpoints(config)
    return report


def draw_posteriors(config: MixtureConfig, X: FlowMap, p1: GaussianMixture) -> None:
    """Exact posterior samples above one-step samples of the map, one context a column, each on its own scale."""
    rng = generator(config, 8)
    times = (0.0, 0.2, 0.4, 0.6, 0.8, 0.95)
    figure, axes = new_figure(2, len(times), size=(2.0, 2.2), sharex="col", sharey="col")
    x1, noise = torch.tensor([[0.7, 0.5]]), torch.tensor([[0.9, 1.1]])
    for column, t in zip(axes.T, times, strict=True):
        x = interpolate(noise, x1, t).to(config.device)
        with torch.no_grad():
            model = sample_posterior(X, t, x, 1000, generator=rng)
        posterior = p1.posterior(t, x)
        across, up = posterior.mean[0].tolist()
        reach = float(5 * posterior.eigenvalues.max().sqrt() + (posterior.cov[0].diagonal().max() ** 0.5).cpu())
        for ax, cloud, colour in (
            (column[0], posterior.sample(1000, generator=rng), "grey"),
            (column[1], model, "blue"),
        ):
            ax.scatter(*cloud[:, 0].cpu().T, s=2, alpha=0.4, color=COLOURS[colour], linewidths=0)
            ax.plot(*x[0].cpu(), "x", color=COLOURS["red"], markersize=7, markeredgewidth=2)
            ax.set(xlim=(across - reach, across + reach), ylim=(up - reach, up + reach))
        column[0].set_title(f"t = {t}")
        column[1].set_xlabel("first coordinate")
    axes[0, 0].set_ylabel("exact p(x₁ | x_t)")
    axes[1, 0].set_ylabel("Meta Flow Map, one step")
    figure.suptitle("Posterior samples of the clean state x₁, given the noisy state x_t (cross)")
    save_figure(figure, config.out / "posteriors.png")


def draw_steering(
    config: MixtureConfig,
    samples: dict[str, dict[str, Tensor]],
    tuned: Tensor,
    target: GaussianMixture,
    reward: GaussianLikelihood,
    law: TiltedLaw,
) -> None:
    """Each method's samples beside the tilted law; the line is where the measurement fits exactly."""
    panels = [
        ("exact samples of p*", target.sample(1000, generator=generator(config, 9)), "grey"),
        ("Doob ODE, exact ∇V", samples["exact"]["0"], "green"),
        ("MFM-G, N = 1", samples["gradient"]["1"], "blue"),
        ("both (default), N = 16", samples["controlled"]["16"], "blue"),
        ("unsteered p₁", samples["unsteered"]["0"], "grey"),
        ("DPS", samples["dps"]["0"], "orange"),
        ("MFM-GF, N = 16", samples["stein"]["16"], "blue"),
        ("fine-tuned drift (E18)", tuned, "green"),
    ]
    figure, axes = new_figure(2, 4, size=(2.4, 2.6), sharex=True, sharey=True)
    (a1, a2), y = reward.a[0].tolist(), float(reward.y[0])
    for k, (ax, (title, x, colour)) in enumerate(zip(axes.flat, panels, strict=True)):
        ax.axline((0, y / a2), slope=-a1 / a2, color=COLOURS["red"], linewidth=0.8, zorder=0)
        ax.scatter(*x[:1000].cpu().T, s=2, alpha=0.4, color=COLOURS[colour], linewidths=0)
        distance = law.floor if k == 0 else law.compare(x)["sw2"]
        ax.set(title=f"{title}\nsliced W₂ to p* = {distance:.2f}", xlim=(-6.5, 6.5), ylim=(-6.5, 6.5), aspect="equal")
    figure.suptitle("Samples steered to the reward −(y − a·x₁)²/2σ²; on the line a·x₁ = y it is largest")
    save_figure(figure, config.out / "steering.png")


if __name__ == "__main__":
    result = main(parse(MixtureConfig, __doc__ or ""))
    print("posterior ratio:", {t: round(v, 2) for t, v in result["posterior_ratio"].items()})
    for method, by_n in result["steering"].items():
        print(f"steering, {method}:", {n: round(v["sw2"], 3) for n, v in by_n.items()}, end="")
        print(f" (floor {next(iter(by_n.values()))['floor']:.3f})")
    print(f"fine-tuning: relative error {result['finetune_relative_error']:.3f}; {result['seconds']:.0f} s in all")
