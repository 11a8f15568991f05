"""Is the gain of Meta Flow Maps a better value gradient, or only the smoothing of a rough reward's gradient?

    python -m toy.smoothing --out runs/smoothing

On the exact oracle, the paper's mixture and three rewards of v = a·x₁: −(v+1)²/(2·0.5²), alone and with a ripple
sin(ω v), ω = 3 or 30. A guidance is a mean of the reward's gradient over N points, and two choices tell the methods
apart: where the points are (at the denoised state D, as in DPS; around it, in a Gaussian of the best of several widths;
drawn from the posterior), and whether the mean is plain, which only smooths, or has the weights e^r of the value's
gradient (E16). Beside them is what needs no gradient of the reward (E17), or less of it (both, the default), on
independent draws. Each is compared with the exact ∇V, and its steered samples with the exact tilted law. Writes
smoothing.png and report.json.
"""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mfm_ref import ExactFlowMap, GaussianMixture, integrate, interpolate, sliced_wasserstein
from mfm_ref import guidance as estimate
from mfm_ref.figures import COLOURS, new_figure, save_figure
from mfm_ref.files import save_json
from mfm_ref.gaussian import posterior_std
from mfm_ref.sampling import time_grid
from toy.common import ToyConfig, generator, markdown, option, parse, start
from toy.mixture import paper_mixture
from toy.reward_variance import AlongReward, exact_guidance

Guidance = Callable[[float, Tensor], Tensor]  # (t, x) -> (σ²/2) ∇V or what stands for it
Points = Callable[[float, Tensor], Tensor]  # (t, t x) -> points (N, B, D)
RIPPLES = {"smooth": 0.0, "wavy, ω = 3": 3.0, "rough, ω = 30": 30.0}
WIDTHS = ("0.1", "0.3", "1", "0.5 c", "1 c", "2 c")  # c: the standard deviation of a component's posterior at t
TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)


@dataclasses.dataclass(frozen=True)
class SmoothingConfig(ToyConfig):
    """Settings; the defaults take about three minutes of one core."""

    out: Path = Path("runs/smoothing")
    steps: int = option(50, "of steering")
    samples: int = option(512, "steered by each method")
    exact_sets: int = option(8, "exact sets, of as many samples each, that they are compared with")
    states: int = option(1000, "of the tilted path per time, for the error of the guidance")
    draws: int = option(16, "N of the methods that are compared at one N")


FAST: dict[str, Any] = {"steps": 5, "samples": 64, "exact_sets": 2, "states": 30, "draws": 4}


def reward_with(omega: float) -> AlongReward:
    """−(v+1)²/(2·0.5²) + sin(ω v), v = a·x₁ with the paper's a; at most 1."""

    def rho(v: Tensor) -> Tensor:
        return -2 * (v + 1) ** 2 + torch.sin(omega * v)

    return AlongReward(paper_mixture()[1].a[0], rho)


def tilted_samples(p1: GaussianMixture, reward: AlongReward, n: int, rng: torch.Generator) -> Tensor:
    """n exact samples of p* ∝ p₁ e^r by rejection, for a reward of at most 1."""
    kept = torch.empty(0, p1.dim)
    while len(kept) < n:
        x1 = p1.sample(16 * n, generator=rng)
        accepted = torch.rand(len(x1), generator=rng) < (reward(x1) - 1).exp()
        kept = torch.cat([kept, x1[accepted]])
    return kept[:n]


def mean_gradient(points: Points, reward: AlongReward, t: float, x: Tensor, weighted: bool) -> Tensor:
    """(σ²/2) Σ_i w_i ∇_x r(x_i) = (1−t) Σ_i w_i ∂r(x_i)/∂(t x), `(B, D)`, at points `(N, B, D)` that move with t x.

    The weights are 1/N, or e^{r_i}/Σ_j e^{r_j}.
    """
    tx = (t * x).requires_grad_()
    at = points(t, tx)
    r = reward(at.flatten(0, 1)).unflatten(0, at.shape[:2])
    weights = torch.softmax(r.detach() if weighted else torch.zeros_like(r), 0)
    return (1 - t) * torch.autograd.grad((weights * r).sum(), tx)[0]


def methods(p1: GaussianMixture, reward: AlongReward, n: int, rng: torch.Generator) -> dict[str, Guidance]:
    """Every guidance by name; those of the Gaussian once for each width."""
    X = ExactFlowMap(p1)

    def denoised(t: float, tx: Tensor) -> Tensor:
        return X.velocity_from_tx(0.0, 0.0, torch.zeros_like(tx), t, tx)

    def around(t: float, tx: Tensor, width: str) -> Tensor:
        scale, *of_posterior = width.split()
        spread = float(scale) * (float(posterior_std(torch.tensor(t), 0.5)) if of_posterior else 1.0)
        return denoised(t, tx) + spread * torch.randn((n, *tx.shape), generator=rng)

    def posterior(t: float, tx: Tensor, count: int) -> Tensor:
        eps = torch.randn((count, *tx.shape), generator=rng)
        return X.from_tx(0.0, 1.0, eps.flatten(0, 1), t, tx.repeat(count, 1)).unflatten(0, (count, -1))

    def by(points: Points, weighted: bool = True) -> Guidance:
        return lambda t, x: mean_gradient(points, reward, t, x, weighted)

    def around_by(width: str, weighted: bool) -> Guidance:
        return by(lambda t, tx: around(t, tx, width), weighted)

    def posterior_by(count: int, weighted: bool = True) -> Guidance:
        return by(lambda t, tx: posterior(t, tx, count), weighted)

    def estimated(method: str, count: int) -> Guidance:
        return lambda t, x: estimate(X, reward, t, x, count, method, noise="independent", generator=rng)

    found: dict[str, Guidance] = {}
    found |= {"none": lambda t, x: torch.zeros_like(x), "DPS": by(lambda t, tx: denoised(t, tx).unsqueeze(0))}
    for weighted in (False, True):
        kind = "weighted" if weighted else "plain"
        for width in WIDTHS:
            found[f"Gaussian, {kind}|{width}"] = around_by(width, weighted)
    found["posterior, plain"] = posterior_by(n, weighted=False)
    for count in (1, 4, 16, 64):
        found[f"MFM-G, N = {count}"] = posterior_by(count)
    found["MFM-GF, N = 16"] = estimated("stein", 16)
    found["both (default), N = 16"] = estimated("controlled", 16)
    return found | {"exact ∇V": lambda t, x: exact_guidance(p1, reward, t, x)[0].to(x)}


def guidance_error(guidance: Guidance, exact: list[tuple[float, Tensor, Tensor]]) -> float:
    """Relative root-mean-square error over times and states of the tilted path; `exact` has t, x and (σ²/2) ∇V."""
    missed = sum(float((guidance(t, x) - g).square().sum()) for t, x, g in exact)
    return (missed / sum(float(g.square().sum()) for _, _, g in exact)) ** 0.5


def steered(p1: GaussianMixture, guidance: Guidance, noise: Tensor, steps: int) -> Tensor:
    """Samples along the Doob ODE with this guidance (E7)."""
    return integrate(lambda t, x: p1.drift(t, x) + guidance(t, x), noise, time_grid(steps))


def compare(config: SmoothingConfig, omega: float) -> dict[str, Any]:
    """Error of the guidance, sliced W₂ of the samples and their mean reward, for every method."""
    p1, reward, rng = paper_mixture()[0], reward_with(omega), generator(config)
    pool = tilted_samples(p1, reward, (config.exact_sets + 1) * config.samples, rng)
    other, *sets = pool.split(config.samples)
    exact = []
    for t in TIMES:
        x1 = tilted_samples(p1, reward, config.states, rng)
        x = interpolate(torch.randn(x1.shape, generator=rng), x1, t)
        exact.append((t, x, exact_guidance(p1, reward, t, x)[0].to(x)))

    def distance(x: Tensor) -> float:
        directions = torch.Generator().manual_seed(0)
        return sum(float(sliced_wasserstein(x, y, generator=directions)) for y in sets) / len(sets)

    found: dict[str, Any] = {"exact samples": {"sw2": distance(other), "reward": float(reward(pool).mean())}}
    noise = torch.randn((config.samples, p1.dim), generator=rng)
    for name, guidance in methods(p1, reward, config.draws, rng).items():
        x = steered(p1, guidance, noise, config.steps)
        found[name] = {
            "error": guidance_error(guidance, exact),
            "sw2": distance(x),
            "reward": float(reward(x).mean()),
        }
    return found


def best(found: dict[str, Any]) -> dict[str, Any]:
    """The same with the Gaussian's widths replaced by the one whose samples are nearest to the tilted law."""
    kept: dict[str, Any] = {}
    for name, numbers in found.items():
        title, _, width = name.partition("|")
        if title not in kept or numbers["sw2"] < kept[title]["sw2"]:
            kept[title] = numbers | ({"width": width} if width else {})
    return kept


def main(config: SmoothingConfig) -> dict[str, Any]:
    """All rewards; returns what report.json holds."""
    if config.fast:
        config = dataclasses.replace(config, **FAST)
    began = start(config)
    report = {
        "rewards": {name: compare(config, omega) for name, omega in RIPPLES.items()},
        "seconds": time.perf_counter() - began,
        "config": {k: v if isinstance(v, int | float) else str(v) for k, v in dataclasses.asdict(config).items()},
    }
    save_json(report, config.out / "report.json")
    draw(report, config.out / "smoothing.png")
    return report


def table(report: dict[str, Any]) -> str:
    """Relative error of the guidance, sliced W₂ and mean reward, a column for each reward."""
    rewards = {name: best(found) for name, found in report["rewards"].items()}
    header = ["", *(f"{name}: {what}" for name in rewards for what in ("error", "sliced W₂", "reward"))]
    rows = []
    for method in next(iter(rewards.values())):
        cells = []
        for found in rewards.values():
            numbers = found[method]
            width = f" (width {numbers['width']})" if "width" in numbers else ""
            error = f"{numbers['error']:.2f}{width}" if "error" in numbers else ""
            cells += [error, f"{numbers['sw2']:.2f}", f"{numbers['reward']:.2f}"]
        rows.append([method, *cells])
    return markdown(header, rows)


def draw(report: dict[str, Any], path: Path) -> None:
    """Bars: error of the guidance, sliced W₂ and mean reward, a row for each reward."""
    rewards = {name: best(found) for name, found in report["rewards"].items()}
    figure, axes = new_figure(len(rewards), 3, size=(3.9, 2.6), sharey=True)
    for row, (name, found) in zip(axes, rewards.items(), strict=True):
        titles = [title for title in found if title != "exact samples"]
        colours = [_colour(title) for title in titles]
        for ax, key in zip(row, ("error", "sw2", "reward"), strict=True):
            ax.barh(range(len(titles)), [found[title][key] for title in titles], color=colours)
            if key != "error":
                ax.axvline(found["exact samples"][key], color="black", linewidth=0.8, linestyle=":")
        row[0].set(yticks=range(len(titles)), yticklabels=titles, xscale="log", title=f"{name}: guidance")
        row[1].set_title("its samples (dotted: exact ones)")
        row[2].set_title("its samples (dotted: exact ones)")
        for k, title in enumerate(titles):
            if "width" in found[title]:
                label = f"width {found[title]['width']}"
                row[0].text(0.02, k, label, va="center", fontsize=7, transform=row[0].get_yaxis_transform())
    axes[0, 0].invert_yaxis()
    for ax, text in zip(axes[-1], ("relative error to exact (σ²/2) ∇V", "sliced W₂ to p*", "mean reward"), strict=True):
        ax.set_xlabel(text)
    figure.suptitle("Smoothing, or a better value gradient? Means of ∇r: over which points, and with which weights")
    save_figure(figure, path)


def _colour(title: str) -> str:
    if title.startswith("Gaussian"):
        return COLOURS["orange"]
    if title.startswith(("MFM", "posterior", "both")):
        return COLOURS["blue"]
    return COLOURS["green"] if title.startswith("exact") else COLOURS["grey"]


if __name__ == "__main__":
    print(table(main(parse(SmoothingConfig, __doc__ or ""))))
