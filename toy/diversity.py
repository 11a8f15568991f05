"""Diversity: is what steering returns as varied as the tilted law? ODE, SDE, search, Best-of-N, DPS and TDS compared.

    python -m toy.diversity --out runs/diversity

On the oracle of the paper's mixture, whose tilted law p* has three modes of known weights. Writes report.json and
diversity.png.
"""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from mfm_ref import Cost, ExactFlowMap, GaussianLikelihood, GaussianMixture, integrate, steer
from mfm_ref.baselines import best_of_n, smc
from mfm_ref.figures import COLOURS, new_figure, save_figure
from mfm_ref.files import save_json
from mfm_ref.metrics import coverage, sliced_wasserstein, vendi_score
from mfm_ref.sampling import noise_like, time_grid
from mfm_ref.search import search
from toy.common import ToyConfig, generator, markdown, option, parse, start
from toy.mixture import paper_mixture


@dataclasses.dataclass(frozen=True)
class DiversityConfig(ToyConfig):
    """Settings; the defaults take about two minutes of one core."""

    out: Path = Path("runs/diversity")
    n_samples: int = option(1024, "of each method")
    steps: int = option(100, "of each sampler")
    n: int = option(16, "posterior draws per step of steering")
    bandwidth: float = option(0.5, "of the Vendi score's kernel, in units of the data")


FAST: dict[str, Any] = {"n_samples": 64, "steps": 8, "n": 4}


def methods(
    config: DiversityConfig, p1: GaussianMixture, reward: GaussianLikelihood, rng: torch.Generator
) -> dict[str, Callable[[], tuple[Tensor, float]]]:
    """Each method as a function that returns samples and evaluations per sample."""
    X, m, k = ExactFlowMap(p1), config.n_samples, config.steps

    def per_sample(found: tuple[Tensor, Cost]) -> tuple[Tensor, float]:
        return found[0], found[1].evaluations

    def along(drift: Callable[[float, Tensor], Tensor], dynamics: str) -> tuple[Tensor, float]:
        noise = noise_like(X, m, generator=rng)
        return integrate(drift, noise, time_grid(k), dynamics=dynamics, generator=rng), float(k)

    def steered(dynamics: str, method: str = "controlled") -> Callable[[], tuple[Tensor, float]]:
        return lambda: per_sample(
            steer(X, reward, m, n=config.n, steps=k, method=method, dynamics=dynamics, generator=rng)
        )

    def best(n: int) -> Callable[[], tuple[Tensor, float]]:
        return lambda: per_sample(best_of_n(X, reward, m, n, steps=k, max_rows=2**15, generator=rng))

    def found(select: str, particles: int, n: int) -> Callable[[], tuple[Tensor, float]]:
        return lambda: per_sample(
            search(X, reward, m, particles=particles, n=n, steps=k, select=select, max_rows=2**15, generator=rng)
        )

    def tds() -> tuple[Tensor, float]:
        particles, cost = smc(X, reward, m, steps=k, generator=rng)
        return particles.samples, cost.evaluations

    target = p1.tilt(reward)
    return {
        "exact p*": lambda: (target.sample(m, generator=rng), 0.0),
        "exact ∇V, ODE": lambda: along(target.drift, "ode"),
        "exact ∇V, SDE": lambda: along(target.drift, "sde"),
        f"steered, ODE, N = {config.n}": steered("ode"),
        f"steered, SDE, N = {config.n}": steered("sde"),
        "DPS, ODE": steered("ode", "dps"),
        "DPS, SDE": steered("sde", "dps"),
        "TDS": tds,
        "search, M = 1, N = 4": found("all", 1, 4),
        "search, M = 4, N = 4": found("all", 4, 4),
        "best of 4": best(4),
        "best of 16": best(16),
        "best of 64": best(64),
        "unsteered": lambda: along(p1.drift, "ode"),
    }


def judge(
    config: DiversityConfig, x: Tensor, exact: Tensor, p1: GaussianMixture, reward: GaussianLikelihood
) -> dict[str, Any]:
    """Weights of the modes and their distance from the exact ones, coverage, Vendi score, spread, reward, sliced W₂."""
    target = p1.tilt(reward)
    nearest = torch.cdist(x, target.means).argmin(1)
    weights = torch.bincount(nearest, minlength=len(target.means)).to(x) / len(x)
    within = torch.cat(
        [x[nearest == k] - x[nearest == k].mean(0) for k in range(len(target.means)) if (nearest == k).any()]
    )
    return {
        "weights": weights.tolist(),
        "total_variation": float((weights - target.weights).abs().sum() / 2),
        "coverage": float(coverage(x, exact)),
        "vendi": float(vendi_score(x[:512], bandwidth=config.bandwidth)),
        "within_modes": float(within.square().sum(1).mean().sqrt()),
        "reward": float(reward(x).mean()),
        "sw2": float(sliced_wasserstein(x, exact, generator=torch.Generator(x.device).manual_seed(0))),
    }


def main(config: DiversityConfig) -> dict[str, Any]:
    """Every method; returns what report.json holds."""
    if config.fast:
        config = dataclasses.replace(config, **FAST)
    began = start(config)
    p1, reward = paper_mixture(config.device)
    exact = p1.tilt(reward).sample(config.n_samples, generator=generator(config, 1))
    samples, found = {}, {}
    for name, make in tqdm(methods(config, p1, reward, generator(config, 2)).items(), desc="diversity", leave=False):
        x, evaluations = make()
        samples[name], found[name] = x, {**judge(config, x, exact, p1, reward), "evaluations": evaluations}
    report = {
        "target_weights": p1.tilt(reward).weights.tolist(),
        "methods": found,
        "seconds": time.perf_counter() - began,
        "config": {k: v if isinstance(v, int | float) else str(v) for k, v in dataclasses.asdict(config).items()},
    }
    save_json(report, config.out / "report.json")
    draw(config, samples, found)
    return report


def draw(config: DiversityConfig, samples: dict[str, Tensor], found: dict[str, Any]) -> None:
    """The samples of each method beside the exact ones, with the weights of the modes."""
    figure, axes = new_figure(2, 4, size=(2.5, 2.6), sharex=True, sharey=True)
    exact = samples["exact p*"].cpu()
    shown = [
        k for k in samples if k not in ("exact p*", "exact ∇V, SDE", "best of 4", "best of 16", "unsteered", "DPS, SDE")
    ]
    for ax, name in zip(axes.flat, shown, strict=True):
        ax.scatter(*exact.T, s=2, color=COLOURS["grey"], label="exact p*")
        ax.scatter(*samples[name].cpu().T, s=2, color=COLOURS["blue"], label=name)
        weights = ", ".join(f"{w:.2f}" for w in found[name]["weights"])
        ax.set(title=f"{name}\nweights {weights}\nVendi {found[name]['vendi']:.1f}", xlim=(-7, 7), ylim=(-7, 7))
    for ax in axes[1]:
        ax.set_xlabel("x₁, first coordinate")
    for ax in axes[:, 0]:
        ax.set_ylabel("second coordinate")
    exact_weights = ", ".join(f"{w:.2f}" for w in found["exact p*"]["weights"])
    figure.suptitle(
        f"Diversity of steered samples (blue) beside the exact tilted law (grey: weights {exact_weights}, "
        f"Vendi {found['exact p*']['vendi']:.1f})"
    )
    save_figure(figure, config.out / "diversity.png")


def table(report: dict[str, Any]) -> str:
    """One row a method."""
    header = [
        "method", "weights of the modes", "total variation", "coverage", "Vendi score", "spread within modes",
        "mean reward", "sliced W₂", "evaluations",
    ]  # fmt: skip
    rows = [
        [
            name,
            " ".join(f"{w:.2f}" for w in v["weights"]),
            f"{v['total_variation']:.2f}",
            f"{v['coverage']:.2f}",
            f"{v['vendi']:.1f}",
            f"{v['within_modes']:.2f}",
            f"{v['reward']:.2f}",
            f"{v['sw2']:.2f}",
            f"{v['evaluations']:.0f}",
        ]
        for name, v in report["methods"].items()
    ]
    return markdown(header, rows)


if __name__ == "__main__":
    result = main(parse(DiversityConfig, __doc__ or ""))
    print(table(result))
    print(f"{result['seconds']:.0f} s in all")
