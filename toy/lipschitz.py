"""Why is a flow map learnable, when an ODE's solution can be far more complex than the ODE?

    python -m toy.lipschitz --out runs/lipschitz

Two components, 0 to 10 of their standard deviations apart, in one dimension and, as crossed ellipses, in two. How steep
are the drift b, the flow map X_{0,1} (alone, in several jumps, and as a function of its context), in the worst place
and in the usual one, and how steep need a map be that is nearly X? Writes lipschitz.png and report.json.
"""

import dataclasses
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mfm_ref import ExactFlowMap, GaussianMixture
from mfm_ref.figures import COLOURS, new_figure, save_figure
from mfm_ref.files import save_json
from toy.common import ToyConfig, markdown, option, parse, start

JUMPS = (1, 2, 4, 8)
TIMES = (0.0, 0.2, 0.4, 0.6, 0.8)
WIDTH = ((1 + 0.3**-2) / 2) ** -0.5  # of an ellipse cut along the line of the means


@dataclasses.dataclass(frozen=True)
class LipschitzConfig(ToyConfig):
    """Settings; the defaults take about two minutes of one core. Nothing is random."""

    out: Path = Path("runs/lipschitz")
    farthest: int = option(10, "largest distance of the means, in standard deviations")
    steps: int = option(240, "of the Runge–Kutta solve, a multiple of 8")
    points: int = option(401, "of a one-dimensional grid of clean states, odd, so that the middle is one of them")
    across: int = option(61, "of each side of the two-dimensional grid, odd")
    contexts: int = option(61, "noisy states per context time, odd")


FAST: dict[str, Any] = {"farthest": 4, "steps": 40, "points": 121, "across": 11, "contexts": 5}


def pair(distance: float, dim: int) -> GaussianMixture:
    """Two equal components. In one dimension their standard deviation is 1; in two, they are ellipses that cross.

    Those have standard deviations 1 and 0.3, at 45° to the line of the means and to each other at 90°, so that they are
    `WIDTH` wide along that line, which is then the unit of the distance.
    """
    means = torch.zeros((2, dim), dtype=torch.float64)
    means[:, 0] = (WIDTH if dim == 2 else 1.0) * distance / 2 * torch.tensor([-1.0, 1.0])
    if dim == 1:
        return GaussianMixture(torch.full_like(means[:, 0], 0.5), means, torch.ones_like(means).unsqueeze(-1))
    covs = torch.tensor([[[1.09, 0.91], [0.91, 1.09]], [[1.09, -0.91], [-0.91, 1.09]]], dtype=torch.float64) / 2
    return GaussianMixture(torch.full_like(means[:, 0], 0.5), means, covs)


def drift_jacobian(p1: GaussianMixture, t: float, x: Tensor) -> Tensor:
    """∂b_t/∂x, `(B, D, D)`, of b = Σ_k w̃_k v_k, v_k = μ_k + A_k (x − t μ_k) (E2).

    It is Σ_k w̃_k A_k + Σ_k w̃_k v_k (g_k − ḡ)ᵀ, with g_k = −S_k⁻¹ (x − t μ_k) and their mean ḡ.
    """
    eye = torch.eye(p1.dim, dtype=x.dtype)
    noised = torch.linalg.inv(t**2 * p1.covs + (1 - t) ** 2 * eye)  # S_k⁻¹
    slopes = (t * p1.covs - (1 - t) * eye) @ noised  # A_k, (K, D, D)
    centred = x.unsqueeze(-2) - t * p1.means  # (B, K, D)
    v = p1.means + torch.einsum("kde,bke->bkd", slopes, centred)
    g = -torch.einsum("kde,bke->bkd", noised, centred)
    weights = p1.posterior(t, x).weights  # w̃, (B, K)
    g = g - (weights.unsqueeze(-1) * g).sum(-2, keepdim=True)
    return torch.einsum("bk,kde->bde", weights, slopes) + torch.einsum("bk,bkd,bke->bde", weights, v, g)


def backwards(p1: GaussianMixture, x1: Tensor, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """From clean states x₁ `(B, D)` back along the flow to noise.

    A Runge–Kutta solve of dx_t/dt = b and dJ_t/dt = −J_t ∂b/∂x, for J_t = ∂X_{t,u}/∂x. In this direction the states of
    a grid stay apart, and it sees what happens between the modes, where noise hardly ever leads.

    Returns:
        z `(B, D)`; ∂X_{k/8,(k+1)/8}/∂x for k = 0, …, 7, `(8, B, D, D)`; and ∂b_t/∂x at the times of the steps, from 0
        to 1, `(steps + 1, B, D, D)`.
    """
    eye = torch.eye(p1.dim, dtype=x1.dtype).expand(len(x1), -1, -1)
    x, jacobian, h = x1, eye, 1 / steps
    jumps, slopes = [], [drift_jacobian(p1, 1.0, x)]

    def rate(t: float, x: Tensor, jacobian: Tensor) -> tuple[Tensor, Tensor]:
        return p1.drift(t, x), -jacobian @ drift_jacobian(p1, t, x)

    for k in range(steps, 0, -1):
        t = k / steps
        a = rate(t, x, jacobian)
        b = rate(t - h / 2, x - h / 2 * a[0], jacobian - h / 2 * a[1])
        c = rate(t - h / 2, x - h / 2 * b[0], jacobian - h / 2 * b[1])
        d = rate((k - 1) / steps, x - h * c[0], jacobian - h * c[1])
        x, jacobian = (
            y - h / 6 * (e + 2 * f + 2 * g + i) for y, e, f, g, i in zip((x, jacobian), a, b, c, d, strict=True)
        )
        slopes.append(drift_jacobian(p1, (k - 1) / steps, x))
        if (k - 1) % (steps // max(JUMPS)) == 0:
            jumps.append(jacobian)
            jacobian = eye
    return x, torch.stack(jumps[::-1]), torch.stack(slopes[::-1])


def clean_grid(distance: float, dim: int, config: LipschitzConfig) -> Tensor:
    """A grid of clean states that reaches 5 standard deviations beyond the means, `(B, D)`."""
    reach = distance / 2 + 5
    if dim == 1:
        return torch.linspace(-reach, reach, config.points, dtype=torch.float64).unsqueeze(-1)
    reach = WIDTH * distance / 2 + 5
    along = torch.linspace(-reach, reach, config.across, dtype=torch.float64)
    return torch.cartesian_prod(along, torch.linspace(-5, 5, config.across, dtype=torch.float64))


def steepness(distance: float, dim: int, config: LipschitzConfig) -> dict[str, Any]:
    """Norms of ∂b/∂x and of ∂X_{s,u}/∂z: greatest where the noise is at most 4 long, and over the law of the states."""
    p1 = pair(distance, dim)
    x1 = clean_grid(distance, dim, config)
    z, eighths, slopes = backwards(p1, x1, config.steps)
    likely = z.norm(dim=-1) <= 4
    weights = p1.log_prob(x1[likely]).softmax(0)  # the flow carries the weights along: they are those of x_t at each t
    drift = torch.linalg.matrix_norm(slopes[:, likely], 2)  # (steps + 1, B)
    jumps, composed = {}, eighths[:, likely]
    for count in reversed(JUMPS):
        jumps[count] = torch.linalg.matrix_norm(composed, 2)  # (count, B)
        composed = composed[1::2] @ composed[0::2] if count > 1 else composed
    flow = jumps[1][0]
    order = flow.argsort()
    median = flow[order][int((weights[order].cumsum(0) < 0.5).sum())]
    return {
        "drift_worst": float(drift.max()),
        "drift_rms": float((weights * drift.square()).sum(1).mean().sqrt()),
        "gronwall": math.exp(float(torch.trapezoid(drift.amax(1), dx=1 / config.steps))),
        "flow_worst": float(flow.max()),
        "flow_rms": float((weights * flow.square()).sum().sqrt()),
        "flow_mean": float((weights * flow).sum()),
        "flow_median": float(median),
        "jumps_worst": {str(count): float(jumps[count].max()) for count in JUMPS},
    }


def enough(distance: float, config: LipschitzConfig, error: float = 0.1) -> float:
    """Least L for which min(|X|, L|z|), a map of Lipschitz constant L, has the relative L₂ error `error`; D = 1.

    X = X_{0,1} is odd here, and concave for z > 0.
    """
    p1, x = pair(distance, 1), clean_grid(distance, 1, config)
    weights, z, x = p1.log_prob(x).softmax(0), noise_of(p1, x).squeeze(-1), x.squeeze(-1)
    low, high = 0.0, 1e6
    for _ in range(60):
        middle = (low + high) / 2
        missing = (x.abs() - middle * z.abs()).clamp_min(0)
        low, high = (
            (low, middle) if (weights * missing**2).sum() < error**2 * (weights * x**2).sum() else (middle, high)
        )
    return high


def noise_of(law: GaussianMixture, x: Tensor) -> Tensor:
    """The z that the quantile transport takes to x, both `(B, 1)`, one dimension: Φ⁻¹(F(x)), exact in both tails."""
    standard = ((x.unsqueeze(-2) - law.means) / law.eigenvalues.sqrt()).squeeze(-1)
    below, above = ((law.weights * torch.special.ndtr(a)).sum(-1, keepdim=True) for a in (standard, -standard))
    return torch.where(below < above, torch.special.ndtri(below), -torch.special.ndtri(above))


def context_steepness(distance: float, t: float, config: LipschitzConfig) -> dict[str, float]:
    """|∂X_{0,1}/∂ε| and |∂X_{0,1}/∂(t x)| at context time t in one dimension, by the oracle's quantile route."""
    p1 = pair(distance, 1)
    seen = p1.marginal(t)
    reach = 5 * float(seen.cov.max().sqrt()) if t else 0.0
    x = torch.linspace(-reach, reach, config.contexts if t else 1, dtype=torch.float64).unsqueeze(-1)
    posterior = p1.posterior(t, x)
    spread = 5 * posterior.eigenvalues.sqrt().amax(-2)
    low, high = posterior.means.amin(-2) - spread, posterior.means.amax(-2) + spread  # (C, 1)
    place = torch.linspace(0, 1, config.points, dtype=torch.float64).reshape(-1, 1, 1)
    draws = low + (high - low) * place  # (P, C, 1)
    log_weights = posterior.log_prob(draws) + (high - low).log().squeeze(-1) + seen.log_prob(x)
    weights = log_weights.flatten().softmax(0)
    eps = torch.stack([noise_of(posterior, column) for column in draws]).flatten(0, 1).requires_grad_()
    tx = (t * x).repeat(config.points, 1).requires_grad_()
    out = ExactFlowMap(p1).from_tx(0.0, 1.0, eps, t, tx)
    by_eps, by_tx = (g.abs().flatten() for g in torch.autograd.grad(out.sum(), (eps, tx)))
    found = {}
    for name, slope in {"noise": by_eps, "context": by_tx}.items():
        found[f"{name}_worst"] = float(slope.max())
        found[f"{name}_rms"] = float((weights * slope.square()).sum().sqrt())
        found[f"{name}_mean"] = float((weights * slope).sum())
    return found


def main(config: LipschitzConfig) -> dict[str, Any]:
    """All distances; returns what report.json holds."""
    if config.fast:
        config = dataclasses.replace(config, **FAST)
    began = start(config)
    distances = range(config.farthest + 1)
    report = {
        "line": {str(d): steepness(d, 1, config) | {"enough": enough(d, config)} for d in distances},
        "crossed": {str(d): steepness(d, 2, config) for d in distances},
        "contexts": {str(d): {str(t): context_steepness(d, t, config) for t in TIMES} for d in distances},
        "seconds": time.perf_counter() - began,
        "config": {k: v if isinstance(v, int | float) else str(v) for k, v in dataclasses.asdict(config).items()},
    }
    save_json(report, config.out / "report.json")
    draw(report, config.out / "lipschitz.png")
    return report


def table(report: dict[str, Any]) -> str:
    """Steepness in one dimension against the distance of the means."""
    header = ["means apart, std", "b: usual", "b: worst", "Grönwall's bound", "X: worst", "root mean square", "mean"]
    header += ["median", "worst of 4 jumps", "of 8", "enough for 10 % error"]
    keys = ["drift_rms", "drift_worst", "gronwall", "flow_worst", "flow_rms", "flow_mean", "flow_median"]
    rows = [
        [d, *(f"{v[key]:.3g}" for key in keys), *(f"{v['jumps_worst'][k]:.3g}" for k in "48"), f"{v['enough']:.3g}"]
        for d, v in report["line"].items()
        if int(d) % 2 == 0
    ]
    return markdown(header, rows)


def draw(report: dict[str, Any], path: Path) -> None:
    """Steepness against the distance: drift and map on a line, as crossed ellipses, in jumps, and in the context."""
    figure, axes = new_figure(2, 2, size=(4.6, 3.4), sharex=True, sharey=True)
    lines = {
        "gronwall": ("Grönwall: exp ∫ sup ‖∂b/∂x‖ dt", "grey", ":"),
        "flow_worst": ("X, worst place", "red", "-"),
        "flow_rms": ("X, root mean square", "orange", "-"),
        "flow_mean": ("X, mean", "green", "-"),
        "flow_median": ("X, median", "green", "--"),
        "drift_worst": ("b, worst place", "blue", "-"),
        "drift_rms": ("b, root mean square", "blue", "--"),
    }
    distances = [int(d) for d in report["line"]]
    for ax, name, title in (
        (axes[0, 0], "line", "one dimension"),
        (axes[0, 1], "crossed", "two dimensions, crossed ellipses: the same"),
    ):
        for key, (label, colour, style) in lines.items():
            values = [v[key] for v in report[name].values()]
            ax.plot(distances, values, style, color=COLOURS[colour], label=label)
        ax.set(title=title, ylim=(0.5, 1e7))
    ax = axes[1, 0]
    for count, colour in zip(JUMPS, ("red", "orange", "green", "blue"), strict=True):
        values = [v["jumps_worst"][str(count)] for v in report["line"].values()]
        ax.plot(distances, values, color=COLOURS[colour], label=f"worst place of the worst of {count} jumps")
    values = [v["enough"] for v in report["line"].values()]
    ax.plot(distances, values, "--", color="black", label="enough for a map within 10 % (L₂) of X")
    ax.set(title="one dimension: in several jumps, and nearly right", ylim=(0.5, 1e7))
    ax = axes[1, 1]
    for t, colour in zip(TIMES[1:], ("red", "orange", "green", "blue"), strict=True):
        for key, style in (("context_worst", "-"), ("context_mean", "--")):
            values = [v[str(t)][key] for v in report["contexts"].values()]
            label = f"context time t = {t}, {'worst place' if key == 'context_worst' else 'mean'}"
            ax.plot(distances, values, style, color=COLOURS[colour], label=label)
    ax.set(title="X as a function of its context: |∂X/∂(t x)|", ylim=(0.5, 1e7))
    for ax in axes.flat:
        ax.set_yscale("log")
        if ax is not axes[0, 1]:
            ax.legend(fontsize=7, loc="upper left")
    for ax in axes[1]:
        ax.set_xlabel("distance of the two means, in widths of a mode")
    for ax in axes[:, 0]:
        ax.set_ylabel("norm of the derivative")
    figure.suptitle("How steep are the drift b and the flow map X of a two-component mixture as its modes separate?")
    save_figure(figure, path)


if __name__ == "__main__":
    print(table(main(parse(LipschitzConfig, __doc__ or ""))))
