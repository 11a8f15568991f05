"""Fine-tuning on the paper's 2-D mixture, against the closed form: E18, its choices, and the regression it avoids.

    python -m toy.finetuning --out runs/finetuning

The map is the exact oracle, so that what remains is the error of the objective and of its training; --map DIR takes a
trained map in its place. Every student starts as the base. Writes finetuning.png and report.json.
"""

import copy
import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from mfm_ref import (
    MLP,
    ExactFlowMap,
    FlowMap,
    GaussianLikelihood,
    GaussianMixture,
    RandomBatches,
    TrainConfig,
    finetune_loss,
    interpolate,
    meta_flow_map_loss,
    train,
)
from mfm_ref.alignment import context_gradient
from mfm_ref.estimators import weighted_mean
from mfm_ref.figures import COLOURS, new_figure, save_figure
from mfm_ref.files import save_json
from mfm_ref.finetuning import regression_loss
from mfm_ref.interpolant import Drift
from mfm_ref.recipe import no_context
from toy.common import ToyConfig, generator, markdown, option, parse, remove_checkpoints, resumable, start, stream_of
from toy.mixture import MixtureConfig, TiltedLaw, paper_mixture

METHODS = ("gradient", "stein")
STRENGTHS = (0.25, 0.5, 1.0, 2.0)
DRAWS = (1, 4, 16)
TIMES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
WEIGHTS: dict[str, Callable[[Tensor], Tensor] | None] = {"1": None, "1 − t": lambda t: 1 - t, "t": lambda t: t}
LAWS = ("base", "student", "broad")  # of the states: the path of p₁, the student's own ODE, that of N(0, 4² I)
LATEST = 0.98  # time in training and in the error of a drift


@dataclasses.dataclass(frozen=True)
class FinetuningConfig(ToyConfig):
    """Settings of the run; the defaults take about 13 minutes of one core."""

    out: Path = Path("runs/finetuning")
    map: str = option("", "folder of a trained map, to be fine-tuned itself; the exact oracle where empty")
    hidden: int = option(64, "width of the student of the oracle")
    base_steps: int = option(1500, "of the regression that makes the student of the oracle the base")
    steps: int = option(1500, "of each fine-tuning")
    draws: int = option(1024, "posterior draws in a step; with N a state, the states are draws / N")
    lr: float = 1e-3
    samples: int = option(4096, "of each law, along one ODE")
    exact_sets: int = option(8, "of as many samples of p*, for the sliced W₂")
    ode_steps: int = option(64, "midpoint steps of the ODE")
    error_samples: int = option(50_000, "states for the error of a drift; a fifth of it at each single time")
    bias_states: int = option(500, "states for the bias of the N-draw estimate, with 512 draws each")


FAST: dict[str, Any] = {
    "base_steps": 20, "steps": 6, "draws": 32, "samples": 128, "exact_sets": 2, "ode_steps": 4, "error_samples": 200,
    "bias_states": 4,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Run:
    """One fine-tuning."""

    objective: str = "E18"  # or "regression"
    method: str = "gradient"
    strength: float = 1.0  # λ: the reward is λ r
    weight: str = "1"
    law: str = "base"
    draws: int = 1  # N, posterior draws per state


CHANGES: list[dict[str, Any]] = [
    *({"strength": strength} for strength in STRENGTHS),
    *({"weight": weight} for weight in WEIGHTS),
    *({"law": law} for law in LAWS),
    *({"objective": objective, "draws": n} for objective in ("E18", "regression") for n in DRAWS),
]
RUNS = list(dict.fromkeys(Run(method=method, **change) for method in METHODS for change in CHANGES))


# ---- training ------------------------------------------------------------------------------------------


def times_reward(reward: GaussianLikelihood, strength: float) -> GaussianLikelihood:
    """λ r: again a Gaussian likelihood, with sigma / √λ."""
    a, y = reward.a.squeeze(0), reward.y.squeeze(0)
    return GaussianLikelihood(a, y, reward.sigma / math.sqrt(strength))


def fit_base(config: FinetuningConfig, p1: GaussianMixture) -> FlowMap:
    """A network whose drift is b: E13 in the empty context, from the exact drift."""
    X = FlowMap(MLP(p1.mean, p1.cov, hidden=config.hidden, normalise=True)).to(config.device)
    variance = float(p1.cov.diagonal().mean())

    def loss(X: FlowMap, x1: Tensor, rng: torch.Generator | None) -> Tensor:
        options: dict[str, Any] = {"drift": p1.drift, "consistency": None, "context": no_context}
        return meta_flow_map_loss(X, x1, data_var=variance, generator=rng, **options)

    data = RandomBatches(lambda rng: p1.sample(1024, generator=rng), generator(config, 1))
    settings = TrainConfig(steps=config.base_steps, lr=4e-3, seed=stream_of(config, 1))
    return train(X, loss, data, settings, progress="fit the base", **resumable(config, "base"))[0]


def finetune(
    config: FinetuningConfig, run: Run, first: FlowMap, base: Drift, X: Any, p1: GaussianMixture, r: GaussianLikelihood
) -> FlowMap:
    """The student of one run, from the weights of `first`; all runs share their seed."""
    reward = times_reward(r, run.strength)
    rows = max(1, config.draws // run.draws)
    options: dict[str, Any] = {"n": run.draws, "method": run.method, "weight": WEIGHTS[run.weight]}
    objective = regression_loss
    if run.objective == "E18":
        objective, options["log_scale"] = finetune_loss, float(p1.log_partition(reward))

    def clean(rng: torch.Generator) -> Tensor:
        if run.law == "broad":
            return 4 * torch.randn((rows, p1.dim), generator=rng, device=config.device)
        return p1.sample(rows, generator=rng)

    def loss(student: FlowMap, x1: Tensor, rng: torch.Generator | None) -> Tensor:
        t = LATEST * torch.rand(rows, generator=rng, device=x1.device)
        x0 = torch.randn(x1.shape, generator=rng, device=x1.device)
        x = along_ode(student, t, x0) if run.law == "student" else interpolate(x0, x1, t)
        return objective(student.drift, base, X, reward, t, x, generator=rng, **options)

    student = copy.deepcopy(first).requires_grad_().train()
    settings = TrainConfig(steps=config.steps, lr=config.lr, clip=10.0, seed=stream_of(config, 2))
    stage = "-".join(map(str, dataclasses.astuple(run))).replace(" − ", "-minus-")
    return train(student, loss, RandomBatches(clean, generator(config, 2)), settings, **resumable(config, stage))[0]


@torch.no_grad()
def along_ode(student: FlowMap, t: Tensor, x: Tensor, steps: int = 8) -> Tensor:
    """States of the student's own ODE at times t `(B,)`, by Euler steps from noise x."""
    for k in range(steps):
        x = x + (t / steps).unsqueeze(-1) * student.drift(k / steps * t, x)
    return x


# ---- measuring -----------------------------------------------------------------------------------------


@torch.no_grad()
def relative_error(drift: Drift, target: GaussianMixture, t: Tensor, rng: torch.Generator) -> float:
    """‖drift − b*‖/‖b*‖ in L₂ under the tilted path p*_t, at times t `(n,)`."""
    x = path_of(target, t, rng)
    exact = target.drift(t, x)
    return float((drift(t, x) - exact).norm() / exact.norm())


def path_of(law: GaussianMixture, t: Tensor, rng: torch.Generator) -> Tensor:
    """I_t (E1) at times t `(n,)`."""
    x1 = law.sample(len(t), generator=rng)
    return interpolate(torch.randn(x1.shape, generator=rng, device=x1.device), x1, t)


def flow_with_density(drift: Drift, x: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """dx/dt = b, d log q/dt = −div b, from noise x: the states at t = 1 and log q there; midpoint steps."""
    log_q, h = -(x.square() + math.log(2 * math.pi)).sum(1) / 2, 1 / steps
    for k in range(steps):
        with torch.no_grad():
            middle = x + h / 2 * drift(k * h, x)
        b, divergence = with_divergence(drift, (k + 0.5) * h, middle)
        x, log_q = x + h * b, log_q - h * divergence
    return x, log_q


def with_divergence(drift: Drift, t: float, x: Tensor) -> tuple[Tensor, Tensor]:
    """b_t(x) and its divergence in x, exactly: one backward pass for each of the D dimensions."""
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        b = drift(t, x)
        rows = [torch.autograd.grad(b[:, d].sum(), x, retain_graph=True)[0][:, d] for d in range(x.shape[1])]
    return b.detach(), torch.stack(rows).sum(0)


def optimum(p1: GaussianMixture, r: GaussianLikelihood, strength: float) -> dict[str, float]:
    """Mean reward of p* ∝ p₁ e^{λr}, and KL(p*‖p₁) = λ E_{p*}[r] − log E_{p₁}[e^{λr}]; both in closed form."""
    reward, a = times_reward(r, strength), r.a.squeeze(0)
    target = p1.tilt(reward)
    second = (r.y - target.mean @ a).square() + a @ target.cov @ a  # E_{p*}[(y − a·x)²]
    mean = -float(second) / (2 * r.sigma**2)
    return {"reward": mean, "kl": strength * mean - float(p1.log_partition(reward))}


class Judge:
    """All that is measured of a drift, for one strength λ."""

    def __init__(self, config: FinetuningConfig, p1: GaussianMixture, r: GaussianLikelihood, strength: float):
        self.config, self.p1, self.r = config, p1, r
        self.target = p1.tilt(times_reward(r, strength))
        sets = MixtureConfig(
            seed=config.seed, device=config.device, set_size=config.samples, exact_sets=config.exact_sets
        )
        self.law = TiltedLaw(sets, self.target)

    def __call__(self, drift: Drift) -> dict[str, Any]:
        """Error to b*; of its ODE's samples, sliced W₂ to p*, mean reward, and KL(q‖p₁), KL(q‖p*) of their law q."""
        config, rng = self.config, generator(self.config, 3)
        n, device = config.error_samples, config.device
        uniform = 0.02 + (LATEST - 0.02) * torch.rand(n, generator=rng, device=device)
        single = {str(t): torch.full((max(1, n // 5),), t, device=device) for t in TIMES}
        noise = torch.randn((config.samples, self.p1.dim), generator=rng, device=device)
        x, log_q = flow_with_density(drift, noise, config.ode_steps)
        return {
            "error": relative_error(drift, self.target, uniform, rng),
            "error_at": {t: relative_error(drift, self.target, times, rng) for t, times in single.items()},
            **self.law.compare(x),
            "reward": float(self.r(x).mean()),
            "kl": float((log_q - self.p1.log_prob(x)).mean()),
            "kl_to_target": float((log_q - self.target.log_prob(x)).mean()),
        }


def regression_bias(
    config: FinetuningConfig, X: Any, p1: GaussianMixture, r: GaussianLikelihood, draws: int = 512
) -> dict[str, dict[str, float]]:
    """{method: {N: error of what the regression converges to}}, the mean of the N-draw estimate, without training.

    ‖mean − b*‖² is estimated without bias, by the product of two halves of the draws.
    """
    rng, target = generator(config, 4), p1.tilt(r)
    t = 0.02 + (LATEST - 0.02) * torch.rand(config.bias_states, generator=rng, device=config.device)
    x = path_of(target, t, rng)
    exact = target.drift(t, x)
    bias: dict[str, dict[str, float]] = {method: {} for method in METHODS}
    X1, rewards, gradient = context_gradient(X, r, t, x, draws, generator=rng)
    for method, values in (
        ("gradient", p1.drift(t, x) + gradient),
        ("stein", (X1 - x) / (1 - t.unsqueeze(-1))),
    ):
        for n in DRAWS:
            groups = [a.unflatten(0, (n, draws // n)).flatten(1, 2) for a in (rewards, values)]  # (N, G·B, …)
            off = weighted_mean(*groups).unflatten(0, (draws // n, len(x))) - exact  # (G, B, D)
            one, other = off.chunk(2)
            squared = (one.mean(0) * other.mean(0)).sum() / exact.square().sum()
            bias[method][str(n)] = float(squared.clamp_min(0).sqrt())
    return bias


# ---- the whole -----------------------------------------------------------------------------------------


def main(config: FinetuningConfig) -> dict[str, Any]:
    """All runs; returns what report.json holds."""
    if config.fast:
        config = dataclasses.replace(config, **FAST)
    began = start(config)
    p1, r = paper_mixture(config.device)
    if config.map:
        X: Any = FlowMap.from_pretrained(config.map).to(config.device).requires_grad_(False)
        first, base = X, X.drift
    else:
        X, first, base = ExactFlowMap(p1), fit_base(config, p1), p1.drift
    judges = {strength: Judge(config, p1, r, strength) for strength in STRENGTHS}
    runs = []
    for run in tqdm(RUNS, desc="fine-tune", disable=None):
        student = finetune(config, run, first, base, X, p1, r)
        runs.append(dataclasses.asdict(run) | judges[run.strength](student.drift))
    report = {
        "runs": runs,
        "base": judges[1.0](first.drift),
        "exact": {str(strength): judge(judge.target.drift) for strength, judge in judges.items()},
        "optimum": {str(strength): optimum(p1, r, strength) for strength in STRENGTHS},
        "regression_bias": regression_bias(config, X, p1, r),
        "seconds": time.perf_counter() - began,
        "config": {k: v if isinstance(v, int | float) else str(v) for k, v in dataclasses.asdict(config).items()},
    }
    save_json(report, config.out / "report.json")
    draw(report, config.out / "finetuning.png")
    remove_checkpoints(config)
    return report


def found(report: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """The run whose fields, those of `Run`, are these and otherwise the defaults."""
    wanted = dataclasses.asdict(Run(**fields))
    return next(run for run in report["runs"] if wanted.items() <= run.items())


# ---- picture and tables --------------------------------------------------------------------------------

NAMES = {"gradient": "gradient form", "stein": "Stein form"}
SHADES = {"gradient": "blue", "stein": "green"}
CHOICES: dict[str, dict[str, Any]] = {
    "w = 1, base's states": {},
    "w = 1 − t": {"weight": "1 − t"},
    "w = t": {"weight": "t"},
    "student's states": {"law": "student"},
    "broad Gaussian's states": {"law": "broad"},
}


def draw(report: dict[str, Any], path: Path) -> None:
    """Errors by objective and choice, reward and KL against λ, and the ablation against N."""
    figure, axes = new_figure(2, 3, size=(3.7, 3.2))
    _draw_errors(axes[0, 0], report)
    _draw_choices(axes[1, 0], report)
    _draw_strengths(axes[0, 1], report, "reward", "mean reward −(y − a·x)²/2σ²")
    _draw_strengths(axes[1, 1], report, "kl", "KL from the base, nats")
    _draw_ablation(axes[0, 2], report, "error", "relative error to b*")
    _draw_ablation(axes[1, 2], report, "sw2", "sliced W₂ of ODE samples to p*")
    figure.suptitle("Fine-tuning a drift to p* ∝ p₁ exp(λ r) on the paper's mixture, where its optimum b* is known")
    save_figure(figure, path)


def _finish(ax: Any, title: str, **settings: Any) -> None:
    ax.set(**settings)
    ax.set_title(title, fontsize=9)
    ax.legend(fontsize=7, frameon=False, handlelength=3.5)


def _draw_errors(ax: Any, report: dict[str, Any]) -> None:
    lines = [("base, before", report["base"], "grey", ":")]
    for method in METHODS:
        tuned, plain = found(report, method=method), found(report, method=method, objective="regression", draws=16)
        lines.append((f"E18, {NAMES[method]}", tuned, SHADES[method], "-"))
        lines.append((f"regression, N = 16, {NAMES[method]}", plain, SHADES[method], "--"))
    for label, run, colour, style in lines:
        times = [float(t) for t in run["error_at"]]
        ax.plot(times, run["error_at"].values(), style, color=COLOURS[colour], label=label)
    top = 20 * max(max(run["error_at"].values()) for _, run, _, _ in lines)
    labels = {"xlabel": "time t", "ylabel": "relative error to b* along p*_t", "yscale": "log"}
    _finish(ax, "the drift, λ = 1", **labels, ylim=(None, top))


def _draw_choices(ax: Any, report: dict[str, Any]) -> None:
    for method, marker in zip(METHODS, "os", strict=True):
        errors = [found(report, method=method, **change)["error"] for change in CHOICES.values()]
        ax.plot(errors, range(len(CHOICES)), marker, color=COLOURS[SHADES[method]], label=f"E18, {NAMES[method]}")
    ax.set_yticks(range(len(CHOICES)), [name.replace(", ", ",\n").replace(" states", "\nstates") for name in CHOICES])
    ax.set_xlim(0, 1.15 * ax.get_xlim()[1])
    _finish(
        ax, "weight w(t) and law of the states, λ = 1", xlabel="relative error to b*", ylim=(len(CHOICES) - 0.5, -1.7)
    )


def _draw_strengths(ax: Any, report: dict[str, Any], key: str, label: str) -> None:
    best = {float(strength): best[key] for strength, best in report["optimum"].items()}
    ax.plot(best.keys(), best.values(), color=COLOURS["grey"], linewidth=4, alpha=0.6, label="optimum p*, closed form")
    for method, marker in zip(METHODS, "os", strict=True):
        values = [found(report, method=method, strength=strength)[key] for strength in STRENGTHS]
        ax.plot(STRENGTHS, values, marker + "--", color=COLOURS[SHADES[method]], label=f"E18, {NAMES[method]}")
    ax.set_xscale("log", base=2)
    ax.set_xticks(STRENGTHS, [f"{strength:g}" for strength in STRENGTHS])
    _finish(ax, "samples of the students, by strength", xlabel="strength λ of the reward", ylabel=label)


def _draw_ablation(ax: Any, report: dict[str, Any], key: str, label: str) -> None:
    drawn: list[float] = []
    for method in METHODS:
        colour = COLOURS[SHADES[method]]
        for objective, style in (("E18", "o-"), ("regression", "s--")):
            values = [found(report, method=method, objective=objective, draws=n)[key] for n in DRAWS]
            ax.plot(DRAWS, values, style, color=colour, label=f"{objective}, {NAMES[method]}")
            drawn += values
        if key == "error":
            bias = list(report["regression_bias"][method].values())
            ax.plot(DRAWS, bias, ":", color=colour, label=f"limit of the regression, {NAMES[method]}")
            drawn += bias
    if key == "sw2":
        ax.axhline(report["base"]["floor"], color=COLOURS["grey"], linewidth=1, label="two exact sets (floor)")
    ax.set_xscale("log", base=2)
    ax.set_xticks(DRAWS, [str(n) for n in DRAWS])
    labels = {"xlabel": "posterior draws per state, N", "ylabel": label, "yscale": "log"}
    _finish(ax, "equal numbers of draws, λ = 1", **labels, ylim=(None, 60 * max(drawn)))


def table(report: dict[str, Any]) -> str:
    """E18 and its choices; the strengths; the ablation."""
    header = ["relative error to b*", "sliced W₂ to p*", "mean reward", "KL from the base", "KL to p*"]
    columns = (("error", 3), ("sw2", 2), ("reward", 2), ("kl", 2), ("kl_to_target", 3))

    def cells(run: dict[str, Any]) -> list[str]:
        return [f"{run[key]:.{digits}f}" for key, digits in columns]

    rows = [["base, before", *cells(report["base"])]]
    for name, change in CHOICES.items():
        rows += [[f"{NAMES[method]}, {name}", *cells(found(report, method=method, **change))] for method in METHODS]
    exact = report["exact"]["1.0"]
    rows += [["b* itself, same noise", *cells(exact)]]
    best = report["optimum"]["1.0"]
    rows += [
        ["optimum, closed form", "0", f"floor {exact['floor']:.2f}", f"{best['reward']:.2f}", f"{best['kl']:.2f}", "0"]
    ]
    choices = markdown(["E18, λ = 1", *header], rows)

    rows = []
    for strength in STRENGTHS:
        tuned, best = (found(report, method=m, strength=strength) for m in METHODS), report["optimum"][str(strength)]
        for name, run in zip(NAMES.values(), tuned, strict=True):
            pairs = [f"{run[key]:.2f} / {best[key]:.2f}" for key in ("reward", "kl")]
            rows.append([f"{strength:g}", name, f"{run['error']:.3f}", f"{run['sw2']:.2f}", *pairs])
    header = [
        "λ",
        "E18",
        "relative error to b*",
        "sliced W₂ to p*",
        "mean reward / optimum",
        "KL from the base / optimum",
    ]
    strengths = markdown(header, rows)

    rows = []
    for method in METHODS:
        for objective in ("E18", "regression"):
            runs = [found(report, method=method, objective=objective, draws=n) for n in DRAWS]
            values = [f"{run['error']:.3f} / {run['sw2']:.2f}" for run in runs]
            rows.append([f"{objective}, {NAMES[method]}", *values])
        bias = report["regression_bias"][method].values()
        rows.append([f"limit of the regression, {NAMES[method]}", *(f"{value:.3f} /" for value in bias)])
    ablation = markdown(["relative error to b* / sliced W₂", *(f"N = {n}" for n in DRAWS)], rows)
    return "\n\n".join((choices, strengths, ablation))


if __name__ == "__main__":
    print(table(main(parse(FinetuningConfig, __doc__ or ""))))
