"""Which estimator of ∇V, and why: bias and noise of each against t and D, and what they do to steered samples.

    python -m toy.estimators --out runs/estimators

On the oracle of the paper's mixture, laid out in D dimensions (the same three components on a line, the same reward in
one direction), with N = 16 draws. Writes report.json and estimators.png. With `--digits DIR` (of toy.digits) the same
noise is measured on a trained map of real digits, where nothing is Gaussian and the reward is a classifier's.
"""

import dataclasses
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from mfm_ref import (
    ExactFlowMap,
    FlowMap,
    GaussianLikelihood,
    GaussianMixture,
    early_draws,
    guidance,
    integrate,
    interpolate,
    sliced_wasserstein,
    steer,
)
from mfm_ref.alignment import posterior_rewards
from mfm_ref.estimators import effective_sample_size, stein_guidance
from mfm_ref.figures import COLOURS, new_figure, save_figure
from mfm_ref.files import save_json
from mfm_ref.noise import posterior_noise
from mfm_ref.sampling import noise_like, time_grid
from toy.common import ToyConfig, generator, markdown, option, parse, read_result, start
from toy.digits import DigitsConfig, class_mixture_reward, load_digits, train_classifier


@dataclasses.dataclass(frozen=True)
class EstimatorsConfig(ToyConfig):
    """Settings of the study; the defaults take about half an hour of one core."""

    out: Path = Path("runs/estimators")
    digits: Path = option(Path(), "folder of toy.digits' results, with its map; no digits without it")
    n: int = option(16, "posterior draws per step and sample")
    states: int = option(64, "at each t, from the tilted law")
    replicates: int = option(128, "of each estimate, to tell bias from noise")
    steps: int = option(250, "of the Doob ODE")
    set_size: int = option(1024, "samples in one set")
    sets: int = option(2, "steered sets of each seed in two dimensions; one in more")
    seeds: int = option(3, "of steering in two dimensions; one in more")
    references: int = option(32, "exact sets that each is compared with")


FAST: dict[str, Any] = {
    "n": 4, "states": 4, "replicates": 4, "steps": 4, "set_size": 32, "sets": 1, "seeds": 1, "references": 2,
}  # fmt: skip

TIMES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
DIMENSIONS = (2, 8, 32)
ESTIMATORS = {  # name: method and noise
    "MFM-G, independent": ("gradient", "independent"),
    "MFM-G, Sobol": ("gradient", "sobol"),
    "MFM-GF, independent": ("stein", "independent"),
    "MFM-GF, Sobol": ("stein", "sobol"),
    "both, independent": ("controlled", "independent"),
    "both, antithetic": ("controlled", "antithetic"),
    "both, Sobol (default)": ("controlled", "sobol"),
}
SHOWN = {"MFM-G, Sobol": "blue", "MFM-GF, Sobol": "green", "both, Sobol (default)": "orange"}
INDEPENDENT = ("MFM-G, independent", "both, independent")  # steered too, in two dimensions


def early(n: int) -> str:
    """The row of `early_draws(n)`."""
    return f"both, Sobol, N = {early_draws(n)(0.0)} to t = 0.6, then {early_draws(n)(1.0)}"


def problem(dim: int, device: str = "cpu") -> tuple[GaussianMixture, GaussianLikelihood]:
    """The paper's mixture and reward with the same geometry in any dimension; for dim = 2 they are the paper's."""
    line, across = torch.zeros(2, dim, device=device)
    line[:], across[0], across[1] = dim**-0.5, 0.5**0.5, -(0.5**0.5)
    means = torch.outer(torch.tensor([-1.0, 0.0, 1.0], device=device) * 18**0.5, line)
    p1 = GaussianMixture(
        torch.full((3,), 1 / 3, device=device), means, 0.5 * torch.eye(dim, device=device).repeat(3, 1, 1)
    )
    a = 0.4 * 0.5**0.5 * line + 2.0 * 0.5**0.5 * across  # of (1.2, −0.8) along and across the line
    return p1, GaussianLikelihood(a, y=-1.0, sigma=0.2)


def bias_and_noise(config: EstimatorsConfig, dim: int) -> dict[str, Any]:
    """{estimator: {bias, noise: by t}}, root mean squares over states, relative to the exact guidance; {ess: by t}."""
    rng = generator(config, dim)
    p1, reward = problem(dim, config.device)
    X, tilted = ExactFlowMap(p1), p1.tilt(reward)
    found: dict[str, Any] = {name: {"bias": [], "noise": []} for name in ESTIMATORS}
    found["ess"] = []
    for t in tqdm(TIMES, desc=f"bias and noise, D = {dim}", leave=False):
        x = tilted.marginal(t).sample(config.states, generator=rng)
        truth = tilted.drift(t, x) - p1.drift(t, x)
        size = truth.square().sum(1).mean().sqrt()
        many = x.repeat(config.replicates, 1)
        for name, (method, noise) in ESTIMATORS.items():
            estimates = guidance(X, reward, t, many, config.n, method, noise=noise, generator=rng)
            estimates = estimates.unflatten(0, (config.replicates, config.states))
            variance = estimates.var(0).sum(1).mean()
            # The mean of the replicates has noise of its own, which is taken off.
            squared = (estimates.mean(0) - truth).square().sum(1).mean() - variance / config.replicates
            found[name]["bias"].append(float(squared.clamp_min(0).sqrt() / size))
            found[name]["noise"].append(float(variance.sqrt() / size))
        eps = posterior_noise(config.n, many, "independent", generator=rng)
        found["ess"].append(float(effective_sample_size(posterior_rewards(X, reward, t, many, eps)[1]).mean()))
    return found


def steered(config: EstimatorsConfig, dim: int, seed: int) -> dict[str, dict[str, float]]:
    """{estimator: sliced W₂ over the floor, spread along a over the exact one}; starts and references are shared."""
    rng = torch.Generator(config.device).manual_seed(1000 * seed + dim)
    p1, reward = problem(dim, config.device)
    X, tilted = ExactFlowMap(p1), p1.tilt(reward)
    size, sets = config.set_size, config.sets if dim == 2 else 1
    exact, others = (tilted.sample(size * config.references, generator=rng).split(size) for _ in range(2))

    def distance(x: Tensor) -> float:
        pairs = [sliced_wasserstein(a, b, generator=rng) for a in x.split(size) for b in exact]
        return float(torch.stack(pairs).mean())

    floor = distance(torch.cat(others))
    truth = float((reward.a @ tilted.cov @ reward.a.T).sqrt())

    def judged(x: Tensor) -> dict[str, float]:
        sw2 = distance(x)
        return {"sw2": sw2, "ratio": sw2 / floor, "spread": float((x @ reward.a.T).std()) / truth}

    noise = noise_like(X, size * sets, generator=torch.Generator(config.device).manual_seed(seed))
    grid = time_grid(config.steps)
    found = {"exact ∇V": judged(integrate(tilted.drift, noise, grid))}
    chosen = {k: v for k, v in ESTIMATORS.items() if "Sobol" in k or (dim == 2 and k in INDEPENDENT)}
    for name, (method, kind) in tqdm(chosen.items(), desc=f"steering, D = {dim}, seed {seed}", leave=False):
        x, _ = steer(X, reward, len(noise), n=config.n, times=grid, method=method, noise=kind, x0=noise, generator=rng)
        found[name] = judged(x)
    if dim == 2:
        x, _ = steer(X, reward, len(noise), n=early_draws(config.n), times=grid, x0=noise, generator=rng)
        found[early(config.n)] = judged(x)
    return found


def digits_noise(config: EstimatorsConfig) -> dict[str, Any]:
    """{estimator: error by t} on digits, relative to E17 with 4096 draws, on noised images drawn by e^r."""
    settings = DigitsConfig(seed=config.seed, device=config.device)
    X = FlowMap.from_pretrained(config.digits / "map").to(config.device).requires_grad_(False)
    data, _ = load_digits(settings)
    reward = class_mixture_reward(train_classifier(settings, data))
    rng = generator(config, 1)
    with torch.no_grad():
        chosen = torch.multinomial(
            torch.softmax(reward(data.images), 0), config.states, replacement=True, generator=rng
        )
    found: dict[str, Any] = {name: [] for name in ESTIMATORS} | {"ess": []}
    for t in tqdm(TIMES, desc="digits", leave=False):
        x = interpolate(noise_like(X, config.states, generator=rng), data.images[chosen], t)
        eps = posterior_noise(config.n * 256, x, generator=rng)
        draws, r = posterior_rewards(X, reward, t, x, eps, max_rows=8192)
        truth = stein_guidance(r, draws, t)
        size = truth.square().sum(1).mean().sqrt()
        many = x.repeat(8, 1)
        for name, (method, noise) in ESTIMATORS.items():
            off = guidance(X, reward, t, many, config.n, method, noise=noise, generator=rng) - truth.repeat(8, 1)
            found[name].append(float(off.square().sum(1).mean().sqrt() / size))
        found["ess"].append(float(effective_sample_size(r).mean() / 256))
    return found


def main(config: EstimatorsConfig) -> dict[str, Any]:
    """The study; returns what report.json holds."""
    if config.fast:
        config = dataclasses.replace(config, **FAST)
    began = start(config)
    report: dict[str, Any] = {"times": list(TIMES), "estimates": {}, "steered": {}}
    settings = repr(dataclasses.replace(config, out=Path()))

    def kept(name: str, make: Any, *arguments: Any) -> Any:
        """A part of the report; each is kept in out/parts, so that a run that was killed goes on."""
        path = config.out / "parts" / f"{name}.json"
        if (known := read_result(path, settings)) is None:
            known = make(config, *arguments)
            save_json({"settings": settings, **known}, path)
        return known

    for dim in DIMENSIONS:
        report["estimates"][str(dim)] = kept(f"estimates-{dim}", bias_and_noise, dim)
    for dim in DIMENSIONS:
        seeds = range(config.seed, config.seed + (config.seeds if dim == 2 else 1))
        runs = [kept(f"steered-{dim}-{seed}", steered, dim, seed) for seed in seeds]
        report["steered"][str(dim)] = {name: [found[name] for found in runs] for name in runs[0]}
    if config.digits != Path():
        report["digits"] = kept("digits", digits_noise)
    report["seconds"] = time.perf_counter() - began
    report["config"] = {k: v if isinstance(v, int | float) else str(v) for k, v in dataclasses.asdict(config).items()}
    save_json(report, config.out / "report.json")
    draw_results(config, report)
    return report


def draw_results(config: EstimatorsConfig, report: dict[str, Any]) -> None:
    """Bias (dashed) and noise (solid) of the three estimators against t, one panel a dimension."""
    panels = [*report["estimates"].items()]
    figure, axes = new_figure(1, len(panels), size=(3.6, 3.4), sharey=True)
    for ax, (dim, found) in zip(axes[0], panels, strict=True):
        for name, colour in SHOWN.items():
            ax.semilogy(report["times"], found[name]["noise"], color=COLOURS[colour], label=f"{name}: noise")
            seen = [bias or math.nan for bias in found[name]["bias"]]  # 0 where the replicates do not show any
            ax.semilogy(report["times"], seen, "--", color=COLOURS[colour], label=f"{name}: bias")
        ax.set(xlabel="time t", ylim=(1e-3, 1e2), title=f"D = {dim}, N = {config.n}")
    axes[0, 0].set_ylabel("relative to the exact guidance (σ²/2) ∇V")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=7)
    figure.suptitle("Bias and noise of each estimator of the guidance, along the tilted path of the paper's mixture")
    save_figure(figure, config.out / "estimators.png")


def table(report: dict[str, Any]) -> str:
    """What steering with each estimator gives, the mean of the seeds and the worst; then the error on digits."""
    rows = []
    for name in next(iter(report["steered"].values())):
        cells = []
        for by_name in report["steered"].values():
            runs = by_name.get(name)
            ratios, spreads = ([run[key] for run in runs] for key in ("ratio", "spread")) if runs else ([], [])
            cells.append(f"{sum(ratios) / len(ratios):.2f} ({max(ratios):.2f})" if runs else "")
            cells.append(f"{100 * (sum(spreads) / len(spreads) - 1):+.1f} %" if runs else "")
        rows.append([name + (" (default of `steer`)" if name == early(report["config"]["n"]) else ""), *cells])
    header = [f"N = {report['config']['n']}"]
    for dim in report["steered"]:
        header += [f"D = {dim}: sliced W₂ over the floor, mean (worst)", "spread"]
    tables = [markdown(header, rows)]
    for dim, found in report["estimates"].items():
        header = [f"D = {dim}, bias / noise at t =", *(f"{t:g}" for t in report["times"])]
        by_name = {"effective sample size": [f"{v:.1f}" for v in found["ess"]]}
        for name in SHOWN:
            pairs = zip(found[name]["bias"], found[name]["noise"], strict=True)
            by_name[name] = [f"{bias:.2f} / {noise:.2f}" for bias, noise in pairs]
        tables.append(markdown(header, [[name, *values] for name, values in by_name.items()]))
    if "digits" in report:
        errors = {k: [f"{v:.2f}" for v in values] for k, values in report["digits"].items()}
        header = ["digits: relative error at t =", *(f"{t:g}" for t in report["times"])]
        tables.append(markdown(header, [[name, *errors[name]] for name in ESTIMATORS]))
    return "\n\n".join(tables)


if __name__ == "__main__":
    result = main(parse(EstimatorsConfig, __doc__ or ""))
    print(table(result))
    print(f"{result['seconds']:.0f} s in all")
