"""Meta Flow Maps in one file: a law with exact answers, training, posteriors, steering, fine-tuning.

    python -m tutorials.mini_mfm    # three minutes of one core; with MFM_FAST=1 seconds, hardly trained

Noise is at time 0 and data at 1. A state is (B, D), a time a number, () or (B,). (t, x) is the context, s <= u are
internal times and z is the state at s. The equations E1 to E18 are those of the README; names are those of the package.
"""

import copy
import math
import os
from collections.abc import Callable
from itertools import chain, pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

Time = float | Tensor
Noise = Tensor | None
Map = Callable[..., Tensor]  # a drift, a reward, a flow map


def column(t: Time, x: Tensor) -> Tensor:
    """A time as what multiplies states, (B, 1)."""
    return torch.as_tensor(t, dtype=x.dtype).expand(len(x)).reshape(-1, *[1] * (x.ndim - 1))


class GaussianMixture(NamedTuple):
    """p₁ = Σ_k w_k N(μ_k, Σ_k). A posterior is one more, with a first dimension for the states."""

    weights: Tensor  # (…, K)
    means: Tensor  # (…, K, D)
    covs: Tensor  # (…, K, D, D)

    def given(self, a: Tensor, y: Tensor, noise: Tensor) -> "GaussianMixture":
        """Bayes' rule for y = a x₁ + N(0, noise), which is E3; and E4 for the reward r = log p(y | x₁)."""
        seen = MultivariateNormal(
            (a @ self.means[..., None])[..., 0], a @ self.covs @ a.mT + noise, validate_args=False
        )
        gain = self.covs @ a.mT @ torch.linalg.inv(seen.covariance_matrix)
        means = self.means + (gain @ (y - seen.mean)[..., None])[..., 0]
        weights = (self.weights.log() + seen.log_prob(y)).softmax(-1)
        return GaussianMixture(weights, means, self.covs - gain @ a @ self.covs)

    def posterior(self, t: Time, x: Tensor) -> "GaussianMixture":
        """E3: p(x₁ | x_t = x), where x_t = t x₁ + N(0, (1−t)²)."""
        t, eye = column(t, x)[..., None, None], torch.eye(x.shape[1], dtype=x.dtype)
        return self.given(t * eye, x[:, None], (1 - t) ** 2 * eye)

    def drift(self, t: Time, x: Tensor) -> Tensor:
        """E2: b_t(x) = (D_t(x) − x)/(1−t), with the denoiser D_t(x) = E[x₁ | x_t = x]; t < 1."""
        weights, means, _ = self.posterior(t, x)
        return ((weights[..., None] * means).sum(1) - x) / (1 - column(t, x))

    def sample(self, n: int) -> Tensor:
        """n draws, (n, D); of a posterior, (n, B, D)."""
        return MixtureSameFamily(Categorical(self.weights), MultivariateNormal(self.means, self.covs)).sample((n,))


def interpolate(x0: Tensor, x1: Tensor, t: Time) -> Tensor:
    """E1: I_t = (1−t) x₀ + t x₁."""
    return (1 - column(t, x1)) * x0 + column(t, x1) * x1


def glass_drift(drift: Map, s: Time, z: Tensor, t: Time, x: Tensor) -> Tensor:
    """E12: b̄_s(z; t, x) = (D_{t*}(x*) − z)/(1−s), from the drift b alone: x and z are two noisy views of one x₁."""
    s, t, rest = column(s, z).clamp_min(1e-15), column(t, x), (1 - column(t, x)).clamp_min(1e-15)  # 0/0 has its limit
    of_x, of_z, p = t * (1 - s), s * rest, rest * (1 - s)
    q = torch.hypot(of_x, of_z)
    t_star, x_star = q / (q + p), ((1 - s) * of_x * x + rest * of_z * z) / (q * (q + p))
    pull = of_x / (q * (q + p)) * (x - t * z * (q + rest) / (q + of_z))
    return rest / (q + p) * drift(t_star.flatten(), x_star) + pull


class FlowMap(nn.Module):
    """E11: X_{s,u}(z; t, x) = z + (u−s) v_{s,u}(z; t, t·x), where v is that of N(0, cov), and an MLP does the rest."""

    def __init__(self, cov: Tensor, hidden: int = 128):
        super().__init__()
        self.shape, (self.var, self.basis) = (len(cov),), torch.linalg.eigh(cov)
        hidden_layers = [(nn.Linear(*pair), nn.SiLU()) for pair in pairwise([20 * len(cov), *[hidden] * 4])]
        self.mlp = nn.Sequential(*chain(*hidden_layers), nn.Linear(hidden, len(cov)))

    def velocity_from_tx(self, s: Time, u: Time, z: Tensor, t: Time, tx: Tensor) -> Tensor:
        """v_{s,u}: m and c are the posterior's mean and std under N(0, cov), S the std of Ī; the MLP adds c/S_s F."""
        (s, u, t), z, tx = (column(a, z) for a in (s, u, t)), z @ self.basis, tx @ self.basis
        den = t**2 * self.var + (1 - t) ** 2
        m, c = self.var * tx / den, (1 - t) * (self.var / den).sqrt()
        std_s, std_u = torch.hypot(1 - s, s * c), torch.hypot(1 - u, u * c)
        unit = (z - s * m) / std_s
        angles = torch.cat([torch.atan2(a * b, 1 - a) for a, b in ((s, c), (u, c), (t, self.var.sqrt()))], 1)
        waves = [wave(k * angles) for k in (1, 2, 4) for wave in (torch.sin, torch.cos)]
        added = c / std_s * self.mlp(torch.cat([unit, tx / den.sqrt(), *waves], 1))
        return (m + ((1 + c**2) * (s + u) - 2) / (std_s + std_u) * unit + added) @ self.basis.T

    def velocity(self, s: Time, u: Time, z: Tensor, t: Time, x: Tensor) -> Tensor:
        """v_{s,u}(z; t, x); on the diagonal s = u it is b̄_s (E10)."""
        return self.velocity_from_tx(s, u, z, t, column(t, x) * x)

    def from_tx(self, s: Time, u: Time, z: Tensor, t: Time, tx: Tensor) -> Tensor:
        """X_{s,u} with the context given as t·x, through which alone a posterior depends on x."""
        return z + (column(u, z) - column(s, z)) * self.velocity_from_tx(s, u, z, t, tx)

    def forward(self, s: Time, u: Time, z: Tensor, t: Time, x: Tensor) -> Tensor:
        """X_{s,u}(z; t, x)."""
        return self.from_tx(s, u, z, t, column(t, x) * x)

    def drift(self, t: Time, x: Tensor) -> Tensor:
        """b_t(x) (E2), the diagonal at t = 0, where the context says nothing."""
        return self.velocity(t, t, x, 0.0, torch.zeros_like(x))


def semigroup_target(X: FlowMap, s: Tensor, w: Tensor, u: Tensor, z: Tensor, t: Time, x: Tensor) -> Tensor:
    """E14: X_{w,u}(X_{s,w}(z)) = X_{s,u}(z) for s <= w <= u, in velocities."""
    first = X.velocity(s, w, z, t, x)
    second = X.velocity(w, u, z + column(w - s, z) * first, t, x)
    return torch.lerp(second, first, column((w - s) / (u - s).clamp_min(1e-9), z))


def meta_flow_map_loss(X: FlowMap, x1: Tensor, *, drift: Map, data_var: float) -> Tensor:
    """E13 onto E12 for half of the rows, E14 for the others, with Δ in units of c/S_s and weights 1/(‖Δ‖² + 0.01)^½."""
    t, a, b, gamma = torch.rand(4, len(x1), dtype=x1.dtype)
    t = 0.99 * (1.1 * t - 0.1).clamp_min(0) ** 2  # some contexts at t = 0, most of them early
    c = (1 - t) * (data_var / (t**2 * data_var + (1 - t) ** 2)) ** 0.5
    angles = 1.55 * torch.minimum(a, b), 1.57 * torch.maximum(a, b)
    s, u = (angle.sin() / (angle.sin() + c * angle.cos()) for angle in angles)  # even over the change from s = 0 to 1
    u = torch.where(torch.arange(len(x1)) < (half := len(x1) // 2), s, torch.maximum(s, u))
    x, z = interpolate(torch.randn_like(x1), x1, t), interpolate(torch.randn_like(x1), x1, s)  # E9: two views of x₁
    with torch.no_grad():
        instant = glass_drift(drift, *(a[:half] for a in (s, z, t, x)))
        jump = semigroup_target(X, *(a[half:] for a in (s, s + gamma * (u - s), u, z, t, x)))
    delta = (X.velocity(s, u, z, t, x) - torch.cat([instant, jump])) / column(c / torch.hypot(1 - s, s * c), x)
    square = delta.square().sum(1)
    return (square / (square.detach() + 0.01).sqrt()).mean()


def train(model: nn.Module, loss: Callable[[], Tensor], steps: int, lr: float) -> None:
    """Adam, with a learning rate that rises and falls once."""
    optimiser = torch.optim.Adam(model.requires_grad_(True).parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, total_steps=steps)
    for _ in range(steps):
        optimiser.zero_grad()
        loss().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
    model.requires_grad_(False)


def sample_posterior(X: Map, t: Time, x: Tensor, n: int, steps: int = 1, *, eps: Noise = None) -> Tensor:
    """E11: n draws X_{0,1}(ε; t, x) of p(x₁ | x_t = x) for each state, (n, B, D), in one step or several."""
    z = (torch.randn(n, *x.shape, dtype=x.dtype) if eps is None else eps).flatten(0, 1)
    for k in range(steps):
        z = X(k / steps, (k + 1) / steps, z, column(t, x).flatten().repeat(n), x.repeat(n, *[1] * (x.ndim - 1)))
    return z.unflatten(0, (n, len(x)))


def value(X: Map, reward: Map, t: Time, x: Tensor, n: int, *, eps: Noise = None) -> Tensor:
    """E15: V̂_t(x) = log (1/n) Σ_i exp r(X_{0,1}(ε_i; t, x)), (B,)."""
    return torch.stack([reward(draw) for draw in sample_posterior(X, t, x, n, eps=eps)]).logsumexp(0) - math.log(n)


def guidance(X: FlowMap, reward: Map, t: Time, x: Tensor, n: int, method: str, *, eps: Noise = None) -> Tensor:
    """(σ²/2) ∇V_t(x), with σ²/2 = (1−t)/t (E6): finite at t = 0, since ∇_x = t ∇_{t·x}."""
    if method == "gradient":  # E16: of V̂, through the reward and the map
        with torch.enable_grad():
            tx = (column(t, x) * x).detach().requires_grad_()
            return (1 - column(t, x)) * torch.autograd.grad(value(X.from_tx, reward, t, tx, n, eps=eps).sum(), tx)[0]
    draws = sample_posterior(X, t, x, n, eps=eps)  # E17: (E[e^r x₁]/E[e^r] − E[x₁])/(1−t), and r may be a black box
    weights = torch.stack([reward(draw) for draw in draws]).softmax(0)
    return ((weights[..., None] * draws).sum(0) - draws.mean(0)) / (1 - column(t, x))


@torch.no_grad()
def steer(X: FlowMap, reward: Map, n_samples: int, *, n: int, steps: int = 100, method: str = "stein") -> Tensor:
    """E7: Euler steps of dx/dt = b + (σ²/2) ∇V, whose law at t = 1 is p* ∝ p₁ e^r. n = 0 is b alone, and p₁."""
    x = torch.randn(n_samples, *X.shape)
    for t in (k / steps for k in range(steps)):
        x = x + (X.drift(t, x) + (guidance(X, reward, t, x, n, method) if n else 0)) / steps
    return x


def finetune_loss(student: Map, base: Map, X: FlowMap, reward: Map, t: Time, x: Tensor, *, eps: Noise = None) -> Tensor:
    """E18: E e^{r(X)} ‖b_θ − b − (σ²/2) ∇_x r(X)‖², one draw X = X_{0,1}(ε; t, x) a state: its r(X) is V̂ with n = 1."""
    eps = torch.randn(1, *x.shape, dtype=x.dtype) if eps is None else eps
    with torch.no_grad():
        weight = value(X, reward, t, x, 1, eps=eps).exp()
        target = base(t, x) + guidance(X, reward, t, x, 1, "gradient", eps=eps)
    return (weight * (student(t, x) - target).square().sum(1)).mean()


def sliced_wasserstein(x: Tensor, y: Tensor) -> float:
    """Root mean square, over 200 directions, of the W₂ between the projections of two sets, which sorting couples."""
    a = nn.functional.normalize(torch.randn(x.shape[-1], 200), dim=0)
    return float(((x @ a).sort(0).values - (y @ a).sort(0).values).square().mean().sqrt())


def main(fast: bool) -> dict[str, float]:
    """All of it on the paper's mixture, each result beside the exact answer."""
    torch.manual_seed(0)
    (train_steps, steps, size), found = (5, 4, 100) if fast else (3000, 50, 2048), dict[str, float]()
    means, a, y, sigma = 3.0 * torch.arange(-1, 2)[:, None].expand(3, 2), torch.tensor([1.2, -0.8]), -1.0, 0.2
    p1 = GaussianMixture(torch.full((3,), 1 / 3), means, 0.5 * torch.eye(2).expand(3, 2, 2))
    p_star = p1.given(a[None], torch.tensor([y]), sigma**2 * torch.eye(1))  # E4

    def reward(x1: Tensor) -> Tensor:
        return -((y - x1 @ a) ** 2) / (2 * sigma**2)

    def compare(name: str, samples: Tensor, law: GaussianMixture = p_star, sets: int = 16) -> None:
        exact, other = ([law.sample(len(samples)) for _ in range(sets)] for _ in range(2))
        found[name] = sum(map(sliced_wasserstein, [samples] * sets, exact)) / sum(map(sliced_wasserstein, other, exact))
        print(f"{name}: sliced W₂ to exact samples {found[name]:.2f} times that of exact samples")
        if law is p_star:
            print("   components", law.posterior(1.0, samples).weights.mean(0), "exact", law.weights)

    X = FlowMap(p1.sample(100_000).T.cov())
    train(X, lambda: meta_flow_map_loss(X, p1.sample(512), drift=p1.drift, data_var=6.5), train_steps, lr=6e-3)
    for t in (0.0, 0.2, 0.4, 0.6, 0.8, 0.95):
        x = interpolate(torch.randn(16, 2), p1.sample(16), t)
        compare(f"posteriors at t = {t} (E11)", sample_posterior(X, t, x, size), p1.posterior(t, x), sets=1)
    for name, n, method in (("unsteered", 0, ""), ("steered, E17", 32, "stein"), ("steered, E16", 32, "gradient")):
        compare(name, steer(X, reward, size, n=n, steps=steps, method=method))

    def path(law: GaussianMixture, n: int) -> tuple[Tensor, Tensor]:
        t, x1 = 0.98 * torch.rand(n), law.sample(n)
        return t, interpolate(torch.randn_like(x1), x1, t)

    student = copy.deepcopy(X)
    train(student, lambda: finetune_loss(student.drift, X.drift, X, reward, *path(p1, 1024)), train_steps // 2, lr=2e-3)
    compare("fine-tuned, E18", steer(student, reward, size, n=0, steps=steps))
    ts, x = path(p_star, 20_000)
    exact = p_star.drift(ts, x)  # b*, by E7
    for name, model in (("base", X), ("fine-tuned", student)):
        found[f"{name} drift"] = float((model.drift(ts, x) - exact).norm() / exact.norm())
        print(f"{name} drift: {found[f'{name} drift']:.3f} of its size from the exact b*")
    return found


if __name__ == "__main__":
    main(fast="MFM_FAST" in os.environ)
