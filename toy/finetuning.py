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
from mfm_ref.alignment import context_gradient, rewards_of
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
    """Settings of the run; the defaults take about ten minutes of one core."""

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
    "base_steps": 100, "steps": 40, "draws": 64, "samples": 256, "exact_sets": 2, "ode_steps": 8, "error_samples": 500,
    "bias_states": 8,
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


RUNS = list(
    dict.fromkeys(
        Run(method=method, **change)
        for method in METHODS
        for change in (
            *({"strength": strength} for strength in STRENGTHS),
            *({"weight": weight} for weight in WEIGHTS),
            *({"law": law} for law in LAWS),
            *({"objective": objective, "draws": n} for objective in ("E18", "regression") for n in DRAWS),
        )
    )
)


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
    stage = "-".join(map(str, dataclasses.astuple(run))).replace(" ", "")
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
        sets = {"set_size": config.samples, "exact_sets": config.exact_sets}
        self.law = TiltedLaw(MixtureConfig(seed=config.seed, device=config.device, **sets), self.target)

    def __call__(self, drift: Drift) -> dict[str, Any]:
        """Error to b*, over t and at single times; of the samples of its ODE the distance to p*, the mean reward and
        KL(q‖p₁) and KL(q‖p*), by the density q that the flow gives them.
        """
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
    exact, found = target.drift(t, x), {}
    X1, gradient = context_gradient(X, r, t, x, draws, generator=rng)
    for method, values in (
        ("gradient", p1.drift(t, x) + gradient),
        ("stein", (X1 - x) / (1 - t.unsqueeze(-1))),
    ):
        found[method] = {}
        for n in DRAWS:
            groups = [a.unflatten(0, (n, draws // n)).flatten(1, 2) for a in (rewards_of(r, X1), values)]  # (N, G·B, …)
            off = weighted_mean(*groups).unflatten(0, (draws // n, len(x))) - exact  # (G, B, D)
            one, other = off.chunk(2)
            squared = (one.mean(0) * other.mean(0)).sum() / exact.square().sum()
            found[method][str(n)] = float(squared.clamp_min(0).sqrt())
    return found


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
