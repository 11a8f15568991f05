"""How many posterior draws does a reward of high variance need? "There is no magic", as a plot.

    python -m toy.reward_variance --out runs/reward_variance

On the exact oracle, at states of the tilted path of λ r: the relative error of the guidance (σ²/2) ∇V by N draws, for
each estimator and two kinds of noise, and the N that an error of 0.3 takes, against the relative variance of e^{λ r}
under the posterior, χ² = Var(e^{λr})/E[e^{λr}]² = exp(V of 2λr − 2 V of λr) − 1. Writes reward_variance.png and
report.json.
"""

import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mfm_ref import (
    ExactFlowMap,
    GaussianMixture,
    controlled_guidance,
    gradient_guidance,
    interpolate,
    posterior_noise,
    stein_guidance,
)
from mfm_ref.alignment import posterior_slopes
from mfm_ref.figures import COLOURS, new_figure, save_figure
from mfm_ref.files import save_json
from toy.common import ToyConfig, generator, markdown, option, parse, start
from toy.mixture import paper_mixture

METHODS = ("gradient", "stein", "controlled")
NOISES = ("independent", "sobol")
NAMES = {"gradient": "MFM-G", "stein": "MFM-GF", "controlled": "both"}


@dataclasses.dataclass(frozen=True)
class RewardVarianceConfig(ToyConfig):
    """Settings; the defaults take about four minutes of one core."""

    out: Path = Path("runs/reward_variance")
    most: int = option(2048, "draws N, a power of two")
    states: int = option(12, "per time and strength of the reward")
    repeats: int = option(4, "of the most draws; of fewer there are as many more")
    strengths: int = option(7, "of the reward")
    wanted: float = option(0.3, "relative error, for the number of draws that it needs")


FAST: dict[str, Any] = {"most": 64, "states": 6, "repeats": 4, "strengths": 3}
TIMES = (0.2, 0.5, 0.8)


class AlongReward:
    """λ ρ(a·x₁): a reward of one direction, whose value is an integral in one dimension under any mixture."""

    def __init__(self, a: Tensor, rho: Callable[[Tensor], Tensor], strength: float = 1.0):
        self.a, self.rho, self.strength = a, rho, strength

    def __call__(self, x1: Tensor) -> Tensor:
        """r(x₁): `(B, D) -> (B,)`."""
        return self.strength * self.rho(x1 @ self.a.to(x1))

    def log_partition(self, law: GaussianMixture, power: float = 1.0, nodes: int = 801) -> Tensor:
        """log E[e^{power · r}] under a mixture, shape of its batch: trapezia over 8 standard deviations each way."""
        a = self.a.to(law.means)
        std = torch.einsum("...kde,d,e->...k", law.covs, a, a).sqrt()
        xi = torch.linspace(-8, 8, nodes, dtype=std.dtype)
        along = (law.means @ a).unsqueeze(-1) + std.unsqueeze(-1) * xi  # (…, K, nodes)
        log_normal = -xi.square() / 2 + math.log(16 / (nodes - 1)) - math.log(2 * math.pi) / 2
        r = power * self.strength * self.rho(along) + log_normal + law.log_weights.unsqueeze(-1)
        return torch.logsumexp(r.flatten(-2), -1)


def exact_guidance(p1: GaussianMixture, reward: AlongReward, t: float, x: Tensor) -> tuple[Tensor, Tensor]:
    """(σ²/2) ∇V = (1−t) ∂V/∂(t x), `(B, D)`, and χ² of e^r under the posterior, `(B,)`; float64."""
    tx = (t * x.double()).requires_grad_()
    posterior = p1.to(torch.float64).posterior_from_tx(t, tx)
    v = reward.log_partition(posterior)
    chi2 = torch.expm1(reward.log_partition(posterior, 2.0) - 2 * v)
    return (1 - t) * torch.autograd.grad(v.sum(), tx)[0], chi2.detach()


class Case(NamedTuple):
    """A law, a reward of strength 1, and the strengths to try."""

    p1: GaussianMixture
    reward: AlongReward
    weakest: float
    strongest: float

    def reward_of(self, strength: float) -> AlongReward:
        """λ r."""
        return AlongReward(self.reward.a, self.reward.rho, strength)


def cases() -> dict[str, Case]:
    """Gaussian posteriors in one dimension, where a control variate may leave no error, and one that is neither."""
    mixture, likelihood = paper_mixture()
    a = likelihood.a[0]
    gaussian, one = GaussianMixture(torch.ones(1), torch.zeros(1, 1), torch.ones(1, 1, 1)), torch.ones(1)

    def one_target(v: Tensor) -> Tensor:
        return -((v + 1.0) ** 2) / 0.08  # σ = 0.2, the paper's

    def two_targets(v: Tensor) -> Tensor:
        return torch.logaddexp(-((v - 1.0) ** 2), -((v + 1.0) ** 2)) / 0.08  # of either ±1

    return {
        "1-D Gaussian, linear reward": Case(gaussian, AlongReward(one, lambda v: v), 0.25, 4.0),
        "1-D Gaussian, quadratic reward": Case(gaussian, AlongReward(one, one_target), 0.01, 100.0),
        "1-D Gaussian, two targets": Case(gaussian, AlongReward(one, two_targets), 0.01, 100.0),
        "2-D mixture, quadratic reward": Case(mixture, AlongReward(a, one_target), 0.01, 100.0),
    }


def tilted_states(case: Case, reward: AlongReward, t: float, n: int, rng: torch.Generator) -> Tensor:
    """n states of the tilted path at t: clean ones resampled from p₁ with weights e^r, then noised."""
    many = case.p1.sample(20_000, generator=rng)
    x1 = many[torch.multinomial(reward(many).softmax(0), n, replacement=True, generator=rng)]
    return interpolate(torch.randn(x1.shape, generator=rng), x1, t)


def errors(case: Case, strength: float, t: float, config: RewardVarianceConfig, rng: torch.Generator) -> dict[str, Any]:
    """Relative root-mean-square error of the guidance by noise, method and N, over states and repeats; median χ²."""
    reward = case.reward_of(strength)
    x = tilted_states(case, reward, t, config.states, rng)
    exact, chi2 = exact_guidance(case.p1, reward, t, x)
    repeated = x.repeat(config.repeats, 1)
    X = ExactFlowMap(case.p1)
    found: dict[str, Any] = {"t": t, "strength": strength, "chi2": float(chi2.median())}
    for noise in NOISES:
        eps = posterior_noise(config.most, repeated, noise, generator=rng)
        draws, r, slopes = (a.double() for a in posterior_slopes(X, reward, t, repeated, eps))
        by_method: dict[str, dict[str, float]] = {method: {} for method in METHODS}
        n = 1
        while n <= config.most:
            # Blocks of n successive draws: of a Sobol sequence too, each is as even as its first n are.
            X_n, r_n, g_n = (_blocks(a, n) for a in (draws, r, (1 - t) * slopes))
            estimates = {
                "gradient": gradient_guidance(r_n, g_n),
                "stein": stein_guidance(r_n, X_n, t),
                "controlled": controlled_guidance(r_n, X_n, g_n, t),
            }
            for method, estimate in estimates.items():
                missed = (estimate.reshape(-1, config.states, x.shape[1]) - exact).square().sum(-1).mean()
                by_method[method][str(n)] = float((missed / exact.square().sum(-1).mean()).sqrt())
            n *= 2
        found[noise] = by_method
    return found


def _blocks(a: Tensor, n: int) -> Tensor:
    """Draws `(most, B, …)` as most/n sets of n, each with its own rows: `(n, most/n · B, …)`."""
    return a.unflatten(0, (-1, n)).transpose(0, 1).flatten(1, 2)


def needed(by_count: dict[str, float], wanted: float) -> float | None:
    """The N at which the error is `wanted`, between the N tried on logarithmic scales; 1 where it is at once.

    None where the most draws do not suffice.
    """
    counts, values = [int(n) for n in by_count], list(by_count.values())
    below = next((k for k in range(len(values)) if max(values[k:]) <= wanted), None)
    if below is None or below == 0:
        return None if below is None else 1.0
    (n0, n1), (e0, e1) = counts[below - 1 : below + 1], values[below - 1 : below + 1]
    return float(n0 * (n1 / n0) ** (math.log(e0 / wanted) / math.log(e0 / max(e1, 1e-12))))


def exponent(points: list[dict[str, Any]], noise: str, method: str) -> float | None:
    """p of N ∝ (1 + χ²)^p, least squares where the N needed is known and more than one; None for fewer than three."""
    known = [(1 + p["chi2"], n) for p in points if (n := p["needed"][noise][method]) is not None and n > 1]
    if len(known) < 3:
        return None
    x, y = np.log(np.array(known)).T
    return float(np.polyfit(x, y, 1)[0])


def main(config: RewardVarianceConfig) -> dict[str, Any]:
    """All cases; returns what report.json holds."""
    if config.fast:
        config = dataclasses.replace(config, **FAST)
    began, rng = start(config), generator(config)
    report: dict[str, Any] = {"cases": {}}
    for name, case in cases().items():
        points = []
        for strength in np.geomspace(case.weakest, case.strongest, config.strengths):
            for t in TIMES:
                point = errors(case, float(strength), t, config, rng)
                point["needed"] = {
                    noise: {method: needed(point[noise][method], config.wanted) for method in METHODS}
                    for noise in NOISES
                }
                points.append(point)
        exponents = {noise: {method: exponent(points, noise, method) for method in METHODS} for noise in NOISES}
        report["cases"][name] = {"points": points, "exponents": exponents}
    report |= {
        "seconds": time.perf_counter() - began,
        "config": {k: v if isinstance(v, int | float) else str(v) for k, v in dataclasses.asdict(config).items()},
    }
    save_json(report, config.out / "report.json")
    draw(report, config.out / "reward_variance.png")
    return report


def table(report: dict[str, Any]) -> str:
    """The N needed at t = 0.5 by χ², for each case, estimator and kind of noise."""
    header = ["N for a relative error of " + str(report["config"]["wanted"]) + ", t = 0.5", "χ²"]
    header += [f"{NAMES[method]}, {noise}" for noise in NOISES for method in METHODS]
    most, rows = report["config"]["most"], []
    for name, found in report["cases"].items():
        points = [point for point in found["points"] if point["t"] == 0.5]
        for point in (points[0], points[len(points) // 2], points[-1]):
            counts = [point["needed"][noise][method] for noise in NOISES for method in METHODS]
            cells = [f"> {most}" if n is None else f"{n:.0f}" for n in counts]
            rows.append([f"{name}, λ = {point['strength']:.3g}", f"{point['chi2']:.2g}", *cells])
    return markdown(header, rows)


def draw(report: dict[str, Any], path: Path) -> None:
    """Above, error against N at one state of affairs; below, the N needed against χ²."""
    names = list(report["cases"])
    figure, axes = new_figure(2, len(names), size=(3.1, 3.0), sharey="row")
    colours = dict(zip(METHODS, ("blue", "orange", "green"), strict=True))
    wanted, most = report["config"]["wanted"], report["config"]["most"]
    for (above, below), name in zip(axes.T, names, strict=True):
        points = report["cases"][name]["points"]
        middle = min((p for p in points if p["t"] == 0.5), key=lambda p: abs(math.log(max(p["chi2"], 1e-9) / 10)))
        for noise, line, marker in (("independent", "-", "o"), ("sobol", "--", "^")):
            for method, colour in colours.items():
                label = f"{NAMES[method]}, {noise} draws"
                values = middle[noise][method]
                counts = [int(n) for n in values]
                above.plot(counts, [max(v, 0.011) for v in values.values()], line, color=COLOURS[colour], label=label)
                found = [(1 + p["chi2"], p["needed"][noise][method]) for p in points]
                where, n = zip(*[(c, 2 * most if v is None else v) for c, v in found], strict=True)
                face = COLOURS[colour] if noise == "independent" else "none"
                below.scatter(where, n, s=18, marker=marker, facecolors=face, edgecolors=COLOURS[colour])
        above.axhline(wanted, color="black", linewidth=0.8, linestyle=":")
        above.set(xscale="log", yscale="log", xlabel="posterior draws N")
        above.set_title(f"{name}\nλ = {middle['strength']:.3g}, t = 0.5, χ² = {middle['chi2']:.2g}")
        line_at = [1 + min(p["chi2"] for p in points), 1 + max(p["chi2"] for p in points)]
        below.plot(line_at, line_at, ":", color="black", linewidth=0.8, label="N = 1 + χ²")
        below.scatter([], [], s=18, color="black", label="independent draws")
        below.scatter([], [], s=18, marker="^", facecolors="none", edgecolors="black", label="sobol draws")
        below.set(xscale="log", yscale="log", ylim=(0.7, 3 * most), xlabel="1 + χ² of exp(λr) under the posterior")
        below.axhline(2 * most, color=COLOURS["grey"], linewidth=0.6)
    axes[0, 0].set(ylabel="relative error of the guidance", ylim=(0.01, 30))
    axes[1, 0].set_ylabel(f"N for an error of {wanted} (top: > {most})")
    axes[0, 0].legend(fontsize=7, loc="upper right")
    axes[1, 0].legend(fontsize=7, loc="upper left", bbox_to_anchor=(0, 0.95))
    figure.suptitle(
        "Guidance (σ²/2) ∇V by N exact posterior draws, as the reward λ r grows stronger (t = 0.2, 0.5, 0.8)"
    )
    save_figure(figure, path)


if __name__ == "__main__":
    print(table(main(parse(RewardVarianceConfig, __doc__ or ""))))
