"""Small networks for the toys, preconditioned by the Meta Flow Map of a Gaussian."""

from typing import Any

import torch
from torch import Tensor, nn

from mfm_ref.checks import check_count, check_finite
from mfm_ref.gaussian import angle_of_time, gaussian_posterior, gaussian_std, posterior_std


class MLP(nn.Module):
    """v_{s,u}(z; t, x) for vectors: the exact map of N(mean, cov), corrected by a residual MLP F.

    Along each principal axis of the data, with m, c² the posterior's mean and variance under the Gaussian, S_a
    the spread of Ī_a (`gaussian.py`) and ζ = (z − s m)/S_s,

        v_{s,u} = v^Gauss_{s,u} + (c/S_s) F(ζ, t (x − t mean)/√den, times),   den = t² var + (1−t)².

    F sees inputs and makes outputs of unit size at every time, and is zero where the data are Gaussian. Times
    enter as sines and cosines of their angles (`angle_of_time`), which resolve 1−s ~ c when c is small.

    Args:
        mean: of the data, `(D,)`.
        cov: of the data, `(D, D)`, symmetric; eigenvalues below `min_std`² are raised to it.
        hidden: width; depth: number of hidden layers, >= 1.
        normalise: a LayerNorm before each hidden layer but the first. Without it, training from data, where the map is
            its own target, was seen to diverge or to stay at the Gaussian's map.
        n_classes: number of class labels, 0 for none; label None and label n_classes are the null class.
        reads_guidance: whether the guidance scale w is an input, as 1 − 1/w; None is w = 1.
        min_std: smallest standard deviation that a principal axis is given, > 0.

    Raises:
        ValueError: shapes that do not fit, entries that are not finite, counts or min_std out of range, or (when
            called) labels given to a network without classes.
    """

    reads_tx = True
    frequencies = (1.0, 2.0, 4.0)

    harmonics: Tensor
    basis: Tensor
    mean: Tensor
    var: Tensor

    def __init__(
        self,
        mean: Tensor,
        cov: Tensor,
        *,
        hidden: int = 128,
        depth: int = 4,
        normalise: bool = False,
        n_classes: int = 0,
        reads_guidance: bool = False,
        min_std: float = 1e-2,
    ):
        super().__init__()
        if mean.ndim != 1 or cov.shape != (len(mean), len(mean)):
            raise ValueError(f"mean must be (D,) and cov (D, D), got {tuple(mean.shape)} and {tuple(cov.shape)}")
        check_finite(mean, "mean")
        check_finite(cov, "cov")
        check_count(hidden, "hidden")
        check_count(depth, "depth")
        check_count(n_classes, "n_classes", 0)
        if not min_std > 0:
            raise ValueError(f"min_std must be positive, got {min_std}")
        d = len(mean)
        var, basis = torch.linalg.eigh(cov)
        self.shape = (d,)
        self.config: dict[str, Any] = {
            "dim": d,
            "hidden": hidden,
            "depth": depth,
            "normalise": normalise,
            "n_classes": n_classes,
            "reads_guidance": reads_guidance,
            "min_std": min_std,
        }
        self.n_classes = n_classes
        self.reads_guidance = reads_guidance
        self.register_buffer("harmonics", torch.tensor(self.frequencies), persistent=False)
        self.register_buffer("basis", basis)
        self.register_buffer("mean", mean @ basis)
        self.register_buffer("var", var.clamp_min(min_std**2))
        self.inlet = nn.Linear(2 * d + 6 * len(self.frequencies) + reads_guidance, hidden)
        norm = _LayerNorm if normalise else nn.Identity
        self.blocks = nn.ModuleList(nn.Sequential(norm(hidden), nn.Linear(hidden, hidden)) for _ in range(depth - 1))
        self.outlet = nn.Linear(hidden, d)
        nn.init.zeros_(self.outlet.weight)  # at the start, the map of the Gaussian
        nn.init.zeros_(self.outlet.bias)
        self.labels = nn.Embedding(n_classes + 1, hidden) if n_classes else None
        self.to(mean.dtype)

    @property
    def null_class(self) -> int | None:
        """The label that means the same as None; None without classes."""
        return self.n_classes or None

    def velocity(
        self,
        s: Tensor,
        u: Tensor,
        z: Tensor,
        t: Tensor,
        context: Tensor,
        y: Tensor | None = None,
        guidance: Tensor | None = None,
    ) -> Tensor:
        """v_{s,u}: times `(B,)`, z and context t·x `(B, D)`, labels and guidance `(B,)` or None, to `(B, D)`."""
        var = self.var.mean()
        std = posterior_std(t, var).clamp_min(1e-6)  # an angle at s = t = 1 needs one
        stds = torch.stack([std, std, var.sqrt().expand_as(std)], -1)
        angles = angle_of_time(torch.stack([s, u, t], -1), stds).unsqueeze(-1) * self.harmonics  # (B, 3, F)
        waves = torch.cat([angles.cos().mT, angles.sin().mT], -1).flatten(1)  # (B, 6F)
        s, u, t = s.unsqueeze(-1), u.unsqueeze(-1), t.unsqueeze(-1)
        z, tx = z @ self.basis, context @ self.basis
        m, c, known = gaussian_posterior(t, tx, self.mean, self.var)
        start, end = gaussian_std(s, c).clamp_min(1e-12), gaussian_std(u, c)  # S_s = 0 only at s = t = 1, where z = m
        standard = (z - s * m) / start
        inputs = [standard, known, waves]
        if self.reads_guidance:
            inputs.append(torch.zeros_like(s) if guidance is None else (1 - 1 / guidance).unsqueeze(-1))
        h = nn.functional.silu(self._labelled(self.inlet(torch.cat(inputs, -1)), y))
        for block in self.blocks:
            h = h + nn.functional.silu(block(h))
        slope = ((1 + c * c) * (s + u) - 2) / (start + end)  # of `gaussian_velocity`, from what is at hand
        return (m + slope * standard + c / start * self.outlet(h)) @ self.basis.T

    def _labelled(self, h: Tensor, y: Tensor | None) -> Tensor:
        if self.labels is None:
            if y is not None:
                raise ValueError("this network has no classes, got labels y")
            return h
        null = torch.full(h.shape[:1], self.n_classes, device=h.device)
        embedded: Tensor = self.labels(null if y is None else y)
        return h + embedded


class _LayerNorm(nn.LayerNorm):
    """LayerNorm that forward mode passes through when compiled, too: torch 2.13 cannot trace the affine kernel's."""

    def forward(self, h: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            return super().forward(h)
        return nn.functional.layer_norm(h, self.normalized_shape, eps=self.eps) * self.weight + self.bias
