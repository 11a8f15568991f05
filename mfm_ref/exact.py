"""The exact Meta Flow Map of a Gaussian mixture: the oracle behind the protocol of networks (E11).

Four routes, the cheapest that applies: one Gaussian in closed form, one dimension by quantile transport, components
that differ along one axis only by both of these, anything else by a high-order solve of dz/ds = b̄_s(z; t, x). None of
them uses E12, which they check.
"""

import math
from collections.abc import Callable

import torch
from scipy.integrate import DOP853
from torch import Tensor

from mfm_ref.checks import Time, check_finite, check_order, check_same_shape, expand_time
from mfm_ref.gaussian import gaussian_velocity
from mfm_ref.mixture import GaussianMixture


class ExactFlowMap:
    """E11: X_{s,u}(z; t, x) of the mixture p₁, exact up to the solver and differentiable (once) in every argument.

    Args:
        p1: the data distribution, not batched.
        max_step: largest step of the ODE solve, in the logarithmic time of `_solve`, > 0; it does not matter for
            one Gaussian or one dimension.

    Raises:
        ValueError: a batched p1, or max_step <= 0. From every call: shapes other than `(B, D)`, states that are
            not finite, times outside [0, 1] or of another shape, s > u, or class labels, which a mixture lacks.
    """

    reads_tx = True

    def __init__(self, p1: GaussianMixture, *, max_step: float = 0.1):
        if p1.log_weights.ndim != 1:
            raise ValueError(f"p1 must be one mixture, got a batch of shape {tuple(p1.log_weights.shape[:-1])}")
        if not max_step > 0:
            raise ValueError(f"max_step must be positive, got {max_step}")
        self.p1, self.max_step = p1, max_step
        self._parts = _split(p1)
        self.shape = (p1.dim,)
        self.dtype, self.device = p1.means.dtype, p1.means.device

    def __call__(self, s: Time, u: Time, z: Tensor, t: Time, x: Tensor, y: Tensor | None = None) -> Tensor:
        """X_{s,u}(z; t, x), `(B, D)`."""
        check_same_shape(z=z, x=x)
        return self.from_tx(s, u, z, t, expand_time(t, x) * x, y)

    def from_tx(self, s: Time, u: Time, z: Tensor, t: Time, tx: Tensor, y: Tensor | None = None) -> Tensor:
        """X_{s,u} with the context given as t·x, `(B, D)`."""
        s, u, t = self._check(s, u, z, t, tx, y)
        # At t = 1 the posterior is a point. Those rows are solved apart, with a harmless time in their place.
        known = t == 1
        moved = self._transport(s, u, z, torch.where(known, 0.5, t).flatten(), tx)
        if not bool(known.any()):
            return moved
        return torch.where(known, z + (u - s) * gaussian_velocity(s, u, z, tx, torch.zeros_like(z)), moved)

    def velocity(self, s: Time, u: Time, z: Tensor, t: Time, x: Tensor, y: Tensor | None = None) -> Tensor:
        """v_{s,u} = (X_{s,u}(z) − z)/(u−s), and the drift b̄_s (E10) of the posterior mixture where s = u; `(B, D)`."""
        check_same_shape(z=z, x=x)
        return self.velocity_from_tx(s, u, z, t, expand_time(t, x) * x, y)

    def velocity_from_tx(self, s: Time, u: Time, z: Tensor, t: Time, tx: Tensor, y: Tensor | None = None) -> Tensor:
        """v_{s,u} with the context given as t·x, `(B, D)`."""
        s, u, t = self._check(s, u, z, t, tx, y)
        apart, known = u > s, t == 1
        posterior = self.p1.posterior_from_tx(torch.where(known, 0.5, t).flatten(), tx)
        point = gaussian_velocity(s, s, z, tx, torch.zeros_like(z))
        v = torch.where(known, point, posterior.drift(s.flatten(), z))
        if bool(apart.any()):
            jump = self.from_tx(s.flatten(), u.flatten(), z, t.flatten(), tx) - z
            v = torch.where(apart, jump / torch.where(apart, u - s, 1.0), v)
        return v

    def drift(self, t: Time, x: Tensor, y: Tensor | None = None) -> Tensor:
        """The unconditional drift b_t(x) (E2), `(B, D)`."""
        return self.p1.drift(t, x)

    def _transport(self, s: Tensor, u: Tensor, z: Tensor, t: Tensor, tx: Tensor) -> Tensor:
        """X_{s,u} for t < 1, by the cheapest route that applies."""
        if self._parts is not None:
            axis, rest, basis = self._parts
            start = along, across = (z @ basis).split([1, self.p1.dim - 1], 1)
            tx_along, tx_across = (tx @ basis).split([1, self.p1.dim - 1], 1)
            along = _quantile_transport(axis.posterior_from_tx(t, tx_along), s, u, along)
            across = _gaussian_flow(rest.posterior_from_tx(t, tx_across), s, u, across)
            return z + (torch.cat([along, across], 1) - torch.cat(start, 1)) @ basis.T  # z itself where s = u
        posterior = self.p1.posterior_from_tx(t, tx)
        if posterior.log_weights.shape[-1] == 1:
            return _gaussian_flow(posterior, s, u, z)
        if self.p1.dim == 1:
            return _quantile_transport(posterior, s, u, z)
        return _solve(posterior, s, u, z, self.max_step)

    def _check(
        self, s: Time, u: Time, z: Tensor, t: Time, x: Tensor, y: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        if y is not None:
            raise ValueError("a mixture has no class labels, got y")
        check_same_shape(z=z, x=x)
        if z.ndim != 2 or z.shape[-1] != self.p1.dim:
            raise ValueError(f"states must have shape (B, {self.p1.dim}), got {tuple(z.shape)}")
        if z.dtype != self.dtype:
            raise ValueError(f"states must have the dtype of the mixture, {self.dtype}, got {z.dtype}")
        check_finite(z, "the state z")
        check_finite(x, "the context")
        s, u, t = expand_time(s, z, "s"), expand_time(u, z, "u"), expand_time(t, z, "t")
        check_order(s, u)
        return s, u, t


def _split(p1: GaussianMixture) -> tuple[GaussianMixture, GaussianMixture, Tensor] | None:
    """p₁ as a mixture along one axis times one Gaussian across it, with the basis whose first column is the axis.

    None unless the means lie on a line, the line is a principal axis of every component, and the components have one
    covariance across it.
    """
    if p1.dim == 1 or len(p1.log_weights) == 1:
        return None
    means = p1.means - p1.means[0]
    basis = torch.linalg.svd(means).Vh.T  # columns: the line, then what is across it
    covs = basis.T @ p1.covs @ basis
    size = float(covs.diagonal(dim1=-2, dim2=-1).amax())
    small = 64 * torch.finfo(covs.dtype).eps
    off_line = (means @ basis)[:, 1:].abs().max() > small * means.abs().max()
    if bool(off_line) or bool(covs[:, 0, 1:].abs().max() > small * size):
        return None
    across = covs[:, 1:, 1:]
    if bool((across - across[0]).abs().max() > small * size):
        return None
    placed = p1.means @ basis
    axis = GaussianMixture(p1.weights, placed[:, :1], covs[:, :1, :1])
    one = torch.ones_like(p1.weights[:1])
    return axis, GaussianMixture(one, placed[:1, 1:], (across[:1] + across[:1].mT) / 2), basis


def _gaussian_flow(posterior: GaussianMixture, s: Tensor, u: Tensor, z: Tensor) -> Tensor:
    """One Gaussian: the elementwise closed form along its principal axes."""
    basis = posterior.basis.squeeze(-3)
    mean = torch.einsum("...d,...de->...e", posterior.means.squeeze(-2), basis)
    axes = torch.einsum("...d,...de->...e", z, basis)
    jump = (u - s) * gaussian_velocity(s, u, axes, mean, posterior.eigenvalues.squeeze(-2))
    return z + torch.einsum("...e,...de->...d", jump, basis)


def _quantile_transport(posterior: GaussianMixture, s: Tensor, u: Tensor, z: Tensor) -> Tensor:
    """One dimension: X = F_u⁻¹(F_s(z)), with F the CDF of Ī_s (E9).

    Works with the log-odds of F, which keeps both tails: bisection, then one Newton step that also carries
    the derivative (implicit function theorem).
    """
    start, end = posterior.marginal(s.flatten()), posterior.marginal(u.flatten())
    level = _log_odds(start, z)
    with torch.no_grad():
        # Each component's own transport brackets the root: the mixture's quantile lies between theirs.
        own = end.means + (end.eigenvalues / start.eigenvalues).sqrt() * (z.unsqueeze(-2) - start.means)
        low, high = own.amin(-2), own.amax(-2)
        for _ in range(64 if z.dtype == torch.float64 else 32):
            middle = (low + high) / 2
            below = _log_odds(end, middle) < level
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        root = (low + high) / 2
        below, above = _log_tails(end, root)
        slope = (end.log_prob(root).unsqueeze(-1) - below - above).exp()  # F′/(F (1−F))
    root, slope = root.detach(), slope.detach()
    return torch.where(u > s, root - (_log_odds(end, root) - level) / slope, z)


def _log_odds(mixture: GaussianMixture, z: Tensor) -> Tensor:
    """log F(z) − log(1 − F(z)) of a batched one-dimensional mixture, `(B, 1)`."""
    below, above = _log_tails(mixture, z)
    return below - above


def _log_tails(mixture: GaussianMixture, z: Tensor) -> tuple[Tensor, Tensor]:
    """log F(z) and log(1 − F(z)), each `(B, 1)`."""
    standard = ((z.unsqueeze(-2) - mixture.means) / mixture.eigenvalues.sqrt()).squeeze(-1)  # (B, K)
    below = torch.logsumexp(mixture.log_weights + torch.special.log_ndtr(standard), -1, keepdim=True)
    above = torch.logsumexp(mixture.log_weights + torch.special.log_ndtr(-standard), -1, keepdim=True)
    return below, above


def _solve(posterior: GaussianMixture, s: Tensor, u: Tensor, z: Tensor, max_step: float) -> Tensor:
    """Any mixture: the eighth-order Dormand–Prince step on the posterior's own drift (E2 of a mixture).

    The flow changes fast where noise and data balance: at s ~ 1/(1+σ_max) and at 1−s ~ σ_min. Equal steps in
    τ = log((s + α)/(1 − s + β)) with α, β of those sizes resolve both, whatever the posterior's scale.
    """
    spread = posterior.cov.diagonal(dim1=-2, dim2=-1).amax(-1, keepdim=True)
    alpha = 1 / (1 + spread.sqrt().detach())
    beta = posterior.eigenvalues.amin((-2, -1)).sqrt().unsqueeze(-1).detach()
    total = 1 + alpha + beta

    def clock(a: Tensor) -> Tensor:
        return torch.log((a + alpha) / (1 - a + beta))

    def rate(tau: Tensor, state: Tensor) -> Tensor:
        odds = tau.exp()
        now = (odds * (1 + beta) - alpha) / (1 + odds)
        now = now + (now.clamp(0, 1) - now).detach()  # inside [0, 1] by rounding only: the derivative stays
        return (now + alpha) * (1 - now + beta) / total * posterior.drift(now.flatten(), state)

    tau, end = clock(s), clock(u)
    n_steps = max(1, math.ceil(float((end - tau).detach().max()) / max_step))
    step = (end - tau) / n_steps
    for _ in range(n_steps):
        z = z + step * _dormand_prince(rate, tau, z, step)
        tau = tau + step
    return z


def _dormand_prince(rate: Callable[[Tensor, Tensor], Tensor], tau: Tensor, z: Tensor, step: Tensor) -> Tensor:
    """The mean rate over one step, by the tableau of SciPy's DOP853."""
    stages: list[Tensor] = []
    for a, c in zip(DOP853.A, DOP853.C, strict=True):
        offset = sum((float(w) * k for w, k in zip(a[: len(stages)], stages, strict=True) if w), torch.zeros_like(z))
        stages.append(rate(tau + float(c) * step, z + step * offset))
    return sum((float(w) * k for w, k in zip(DOP853.B, stages, strict=True) if w), torch.zeros_like(z))
