"""The paper's 2-D experiment: steering to a likelihood, every method, against the exact tilted law.

    python -m toy.alignment --out runs/alignment

MFM-G, MFM-GF and the controlled estimator with N = 1, 2, …, 128 draws, DPS and the exact ∇V, each by the Doob ODE and
by the Doob SDE, and TDS. On the oracle, whose errors are the estimator's own; with `--map DIR` (of toy.mixture) some
of them on a trained map too. Writes report.json and alignment.png. Finished runs are kept in out/jobs, so
that a run that was killed goes on.
"""

import dataclasses
import math
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from torch import Tensor
from tqdm import tqdm

from mfm_ref import ExactFlowMap, FlowMap, GaussianMixture, MetaFlowMap, integrate, mmd, sliced_wasserstein, steer
from mfm_ref.baselines import smc
from mfm_ref.figures import COLOURS, new_figure, save_figure
from mfm_ref.files import save_json
from mfm_ref.rewards import GaussianLikelihood
from mfm_ref.sampling import noise_like, time_grid
from toy.common import ToyConfig, markdown, option, parse, read_result, set_up_processor
from toy.mixture import paper_mixture


@dataclasses.dataclass(frozen=True)
class AlignmentConfig(ToyConfig):
    """Settings of the run; the defaults take about 10 minutes of two cores."""

    out: Path = Path("runs/alignment")
    map: Path = option(Path(), "folder of a trained map, such as runs/mixture/map; only the oracle without it")
    paper: bool = option(False, "the paper's size: 1000 steps, sets of 4096; for a GPU")
    steps: int = option(100, "of the Doob ODE and SDE, uniform in time")
    largest: int = option(128, "largest number N of posterior draws per step; the others halve it down to 1")
    set_size: int = option(1024, "samples in one set")
    sets: int = option(1, "sets of each method; all methods share their starts")
    references: int = option(64, "exact sets that each is compared with")
    tds_particles: int = option(4096, "in one population, of which set_size are compared")
    tds_seeds: int = option(20, "populations")
    order_samples: int = option(200_000, "for the SDE's order")
    jobs: int = option(2, "runs at once, each on its own core")


FAST: dict[str, Any] = {
    "steps": 8, "largest": 4, "set_size": 64, "sets": 1, "references": 4, "tds_particles": 64, "tds_seeds": 2,
    "order_samples": 2000, "jobs": 1,
}  # fmt: skip
PAPER: dict[str, Any] = {"steps": 1000, "set_size": 4096, "sets": 1, "references": 16, "jobs": 1}

METHODS = {"gradient": "MFM-G (E16)", "stein": "MFM-GF (E17)", "controlled": "both (default)"}


@dataclasses.dataclass(frozen=True)
class Job:
    """One set of samples: a method on a map."""

    config: AlignmentConfig
    map: str  # "oracle" or "trained"
    method: str  # of `steer`, or "exact", "unsteered", "tds"
    dynamics: str
    n: int  # posterior draws per step, 0 where none are drawn

    @property
    def path(self) -> Path:
        """Of its result."""
        return self.config.out / "jobs" / f"{self.map}-{self.method}-{self.dynamics}-{self.n}.json"

    @property
    def settings(self) -> str:
        """All that its numbers depend on."""
        return repr(dataclasses.replace(self, config=dataclasses.replace(self.config, out=Path(), jobs=1)))


def jobs_of(config: AlignmentConfig) -> list[Job]:
    """Every run, the longest first."""
    counts = [2**k for k in range(int(math.log2(config.largest)) + 1)]
    jobs = [Job(config, "oracle", m, d, n) for n in counts for m in METHODS for d in ("ode", "sde")]
    jobs += [Job(config, "oracle", m, d, 0) for m in ("exact", "dps", "unsteered") for d in ("ode", "sde")]
    if config.map != Path():
        jobs += [Job(config, "trained", m, "ode", n) for n in counts[::2] for m in METHODS]
        jobs.append(Job(config, "trained", "dps", "ode", 0))
    jobs.append(Job(config, "oracle", "tds", "sde", 0))
    return sorted(jobs, key=lambda job: -job.n)


def run(job: Job) -> dict[str, Any]:
    """Draw the samples and compare them; or read the result, if the job had ended already."""
    config = job.config
    set_up_processor(config.threads)
    if (known := read_result(job.path, job.settings)) is not None:
        return known
    p1, reward = paper_mixture(config.device)
    X = ExactFlowMap(p1) if job.map == "oracle" else FlowMap.from_pretrained(config.map).requires_grad_(False)
    began = time.perf_counter()
    samples, evaluations = draw(job, X, p1, reward)
    result = {"evaluations": evaluations, "seconds": time.perf_counter() - began}
    result |= compare(config, samples, p1.tilt(reward), reward)
    save_json({"settings": job.settings, **result}, job.path)
    return result


def draw(job: Job, X: MetaFlowMap, p1: GaussianMixture, reward: GaussianLikelihood) -> tuple[Tensor, float]:
    """Sets of samples `(sets, set_size, 2)` and the evaluations of map and reward that one sample cost."""
    config, grid = job.config, time_grid(job.config.steps)
    rng = torch.Generator(config.device).manual_seed(1000 * config.seed + 1)
    n_samples = config.sets * config.set_size
    if job.method == "tds":
        found = [smc(X, reward, config.tds_particles, times=grid, generator=rng) for _ in range(config.tds_seeds)]
        chosen = torch.randperm(config.tds_particles, generator=rng, device=config.device)[: config.set_size]
        return torch.stack([particles.samples[chosen] for particles, _ in found]), found[0][1].evaluations
    if job.method in ("exact", "unsteered"):
        drift = p1.tilt(reward).drift if job.method == "exact" else p1.drift
        noise = noise_like(X, n_samples, generator=rng)
        x, cost = integrate(drift, noise, grid, dynamics=job.dynamics, generator=rng), float(config.steps)
    else:
        n = max(job.n, 1)
        x, spent = steer(X, reward, n_samples, n=n, times=grid, method=job.method, dynamics=job.dynamics, generator=rng)
        cost = spent.evaluations
    return x.unflatten(0, (config.sets, config.set_size)), cost


def compare(
    config: AlignmentConfig, sets: Tensor, target: GaussianMixture, reward: GaussianLikelihood
) -> dict[str, Any]:
    """Mean distances of the sets to exact ones, and between exact ones; spread along a and weights of the modes."""
    rng = torch.Generator(config.device).manual_seed(1000 * config.seed + 2)
    exact, others = (
        target.sample(config.references * config.set_size, generator=rng).unflatten(0, (config.references, -1))
        for _ in range(2)
    )
    measured = reward.y - sets @ reward.a.squeeze(0)
    nearest = torch.cdist(sets.flatten(0, 1), target.means).argmin(1)
    return {
        **mean_distance(sets, exact, rng),
        "floor": floor(config, lambda: mean_distance(others[:16], exact, rng)),
        "spread": float(measured.flatten().std()),
        "exact_spread": float((reward.a @ target.cov @ reward.a.T).sqrt()),
        "weights": torch.bincount(nearest, minlength=3).div(len(nearest)).tolist(),
    }


def mean_distance(some: Tensor, exact: Tensor, rng: torch.Generator) -> dict[str, float]:
    """Of sets `(n, size, 2)` to exact ones: sliced W₂ of every pair; MMD of the first with the first, and so on."""
    sw2 = [sliced_wasserstein(a, b, generator=rng) for a in some for b in exact]
    squared = [mmd(a, b) for a, b in zip(some, exact[: len(some)], strict=True)]  # its kernel matrices take long
    return {"sw2": float(torch.stack(sw2).mean()), "mmd": float(torch.stack(squared).mean())}


def floor(config: AlignmentConfig, measure: Callable[[], dict[str, float]]) -> dict[str, float]:
    """The distance of exact sets to exact sets, the same for every job: measured once, kept in out/jobs."""
    path, settings = config.out / "jobs" / "floor.json", f"{config.seed} {config.set_size} {config.references}"
    if (known := read_result(path, settings)) is None:
        known = measure()
        save_json({"settings": settings, **known}, path)
    return known


def orders(config: AlignmentConfig) -> dict[str, Any]:
    """{dynamics: {steps, error}} with the exact drift: error of the ends, or of their covariance for "sde"."""
    p1, reward = paper_mixture()
    target = p1.to(dtype=torch.float64).tilt(reward)
    fine, coarse = ([64, 128, 256, 512], [16, 32, 64, 128]) if not config.fast else ([16, 32], [8, 16])
    rng = torch.Generator().manual_seed(1000 * config.seed + 3)
    x = torch.randn((512, 2), generator=rng, dtype=torch.float64)
    truth = integrate(target.drift, x, time_grid(8 * fine[-1]), dynamics="midpoint")
    found: dict[str, Any] = {}
    for dynamics in ("ode", "midpoint"):
        ends = (integrate(target.drift, x, time_grid(k), dynamics=dynamics) for k in fine)
        found[dynamics] = {"steps": fine, "error": [float((a - truth).square().sum(1).mean().sqrt()) for a in ends]}
    many = torch.randn((config.order_samples, 2), generator=rng, dtype=torch.float64)
    ends = (integrate(target.drift, many, time_grid(k), dynamics="sde", generator=rng) for k in coarse)
    errors = [float((torch.cov(a.T) - target.cov).norm() / target.cov.norm()) for a in ends]
    return found | {"sde": {"steps": coarse, "error": errors}}


def main(config: AlignmentConfig) -> dict[str, Any]:
    """Every method; returns what report.json holds."""
    if config.fast or config.paper:
        config = dataclasses.replace(config, **(FAST if config.fast else PAPER))
    began = time.perf_counter()
    set_up_processor(config.threads)
    jobs = jobs_of(config)
    results: dict[str, Any] = {}
    for job, found in run_all(config, jobs).items():
        results.setdefault(job.map, {}).setdefault(job.dynamics, {}).setdefault(job.method, {})[str(job.n)] = found
    report = {
        "results": {
            m: {
                d: {k: dict(sorted(by_n.items(), key=lambda item: int(item[0]))) for k, by_n in methods.items()}
                for d, methods in by.items()
            }
            for m, by in results.items()
        },
        "orders": orders(config),
        "seconds": time.perf_counter() - began,
        "config": {k: v if isinstance(v, int | float) else str(v) for k, v in dataclasses.asdict(config).items()},
    }
    save_json(report, config.out / "report.json")
    draw_results(config, report)
    return report


def run_all(config: AlignmentConfig, jobs: list[Job]) -> dict[Job, dict[str, Any]]:
    """Every job, `config.jobs` at a time."""
    if config.jobs == 1:
        return {job: run(job) for job in tqdm(jobs, desc="runs", disable=None)}
    with ProcessPoolExecutor(config.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(run, job): job for job in jobs}
        done = tqdm(as_completed(futures), total=len(jobs), desc="runs", disable=None)
        return {futures[future]: future.result() for future in done}


def draw_results(config: AlignmentConfig, report: dict[str, Any]) -> None:
    """Sliced W₂ against N, by the ODE and by the SDE; then the error against the step."""
    figure, axes = new_figure(1, 3, size=(3.6, 3.2))
    colours = {"gradient": "blue", "stein": "green", "controlled": "orange"}
    for ax, (dynamics, name) in zip(axes[0, :2], {"ode": "Doob ODE", "sde": "Doob SDE"}.items(), strict=True):
        found = report["results"]["oracle"][dynamics]
        for method, label in METHODS.items():
            ax.loglog(
                [int(n) for n in found[method]],
                [v["sw2"] for v in found[method].values()],
                "o-",
                color=COLOURS[colours[method]],
                label=label,
            )
        for method, label, style in (("dps", "DPS", ":"), ("unsteered", "unsteered", "--"), ("tds", "TDS", "-.")):
            if method in found:
                ax.axhline(found[method]["0"]["sw2"], color=COLOURS["grey"], linestyle=style, label=label)
        exact = found["exact"]["0"]
        ax.axhline(exact["sw2"], color="black", linewidth=0.8, label="exact ∇V")
        ax.axhspan(0, exact["floor"]["sw2"], color=COLOURS["grey"], alpha=0.2, label="two exact sets")
        ax.set(xlabel="posterior draws per step, N", ylabel="sliced W₂ to p*", title=f"{name}, {config.steps} steps")
        plain_ticks(ax.xaxis, [1, 4, 16, 64])
        plain_ticks(ax.yaxis, [0.2, 0.5, 1, 2, 5])
        ax.legend(fontsize=7)
    ax, by = axes[0, 2], report["orders"]
    schemes = (("ode", "Euler", "blue"), ("midpoint", "midpoint", "orange"), ("sde", "SDE (covariance)", "green"))
    for dynamics, label, colour in schemes:
        ax.loglog(
            *by[dynamics].values(), "o-", color=COLOURS[colour], label=f"{label}: slope {order(by, dynamics):.2f}"
        )
    ax.set(xlabel="steps", ylabel="error with the exact drift", title="Order of convergence")
    plain_ticks(ax.xaxis, [16, 64, 256])
    ax.legend(fontsize=7)
    figure.suptitle("Steering the paper's mixture on the oracle: distance to the tilted law p* ∝ p₁ e^r")
    save_figure(figure, config.out / "alignment.png")


def plain_ticks(axis: Any, values: list[float]) -> None:
    """Ticks of a logarithmic axis at these values, written out."""
    axis.set_minor_locator(NullLocator())
    axis.set_major_locator(FixedLocator(values))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def order(by: dict[str, Any], dynamics: str) -> float:
    """Least-squares slope of −log error on log steps."""
    steps, errors = (torch.tensor(values, dtype=torch.float64).log() for values in by[dynamics].values())
    return -float(((steps - steps.mean()) * errors).sum() / ((steps - steps.mean()) ** 2).sum())


def table(report: dict[str, Any]) -> str:
    """Sliced W₂ of each method over the floor, by N."""
    tables = []
    for name, by_dynamics in report["results"].items():
        for dynamics, methods in by_dynamics.items():
            counts = list(methods[next(iter(METHODS))])
            rows = []
            for method, by_n in methods.items():
                cells = [f"{by_n[n]['sw2']:.2f}" if n in by_n else "" for n in counts]
                alone = by_n.get("0")
                label = METHODS.get(method, {"exact": "exact ∇V", "dps": "DPS", "tds": "TDS"}.get(method, method))
                extra = f"{alone['sw2']:.2f}" if alone else ""
                last = alone or by_n[counts[-1]]
                rows.append([label, extra, *cells, f"{last['mmd']:.4f}", f"{last['evaluations']:.0f}"])
            floor = next(iter(next(iter(methods.values())).values()))["floor"]
            empty = [""] * len(counts)
            rows.append(["two exact sets (floor)", f"{floor['sw2']:.2f}", *empty, f"{floor['mmd']:.4f}", ""])
            title = f"sliced W₂ to p*: {name}, {'ODE' if dynamics == 'ode' else 'SDE'}"
            header = [title, "no draws", *(f"N = {n}" for n in counts), "MMD² (largest N)", "evaluations"]
            tables.append(markdown(header, rows))
    return "\n\n".join(tables)


if __name__ == "__main__":
    result = main(parse(AlignmentConfig, __doc__ or ""))
    print(table(result))
    by = result["orders"]
    print("orders:", {d: round(order(by, d), 2) for d in ("ode", "midpoint", "sde")})
    print(f"{result['seconds']:.0f} s in all")
