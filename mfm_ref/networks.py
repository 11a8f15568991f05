"""Small networks, preconditioned by the Meta Flow Map of a Gaussian; the one for images is in `unet.py`."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from mfm_ref.checks import check_count, check_finite
from mfm_ref.gaussian import angle_of_time, gaussian_posterior, gaussian_std, posterior_std


class GaussianNetwork(nn.Module):
    """A network F inside the exact map of N(mean, cov): what every network of the toys has in common.

    Along each principal axis of the data, with m, c² the posterior's mean and variance under the Gaussian, S_a
    the spread of Ī_a (`gaussian.py`) and ζ = (z − s m)/S_s,

        v_{s,u} = v^Gauss_{s,u} + (c/S_s) F(ζ, t (x − t mean)/√den, times),   den = t² var + (1−t)².

    F sees inputs and makes outputs of unit size at every time, and is zero where the data are Gaussian. Times
    enter as sines and cosines of their angles (`angle_of_time`), which resolve 1−s ~ c when c is small. A subclass is
    one method, `correction`.

    Args:
        shape: *D, of one state.
        mean: of the data, *D flattened to `(D,)`.
        cov: of the data, `(D, D)`, symmetric; eigenvalues below `min_std`² are raised to it.
        n_classes: number of class labels, 0 for none; label None and label n_classes are the null class.
        reads_guidance: whether the guidance scale w is an input, as 1 − 1/w; None is w = 1.
        min_std: smallest standard deviation that a principal axis is given, > 0.
    """

    reads_tx = True
    frequencies = (1.0, 2.0, 4.0)

    harmonics: Tensor
    basis: Tensor
    mean: Tensor
    var: Tensor

    def __init__(
        self, shape: tuple[int, ...], mean: Tensor, cov: Tensor, *, n_classes: int, reads_guidance: bool, min_std: float
    ):
        super().__init__()
        if mean.ndim != 1 or cov.shape != (len(mean), len(mean)):
            raise ValueError(f"mean must be (D,) and cov (D, D), got {tuple(mean.shape)} and {tuple(cov.shape)}")
        if math.prod(shape) != len(mean):
            raise ValueError(f"mean must have one entry for each of the {shape} numbers of a state, got {len(mean)}")
        check_finite(mean, "mean")
        check_finite(cov, "cov")
        check_count(n_classes, "n_classes", 0)
        if not min_std > 0:
            raise ValueError(f"min_std must be positive, got {min_std}")
        var, basis = torch.linalg.eigh(cov)
        self.shape = tuple(shape)
        self.n_classes = n_classes
        self.reads_guidance = reads_guidance
        self.register_buffer("harmonics", torch.tensor(self.frequencies), persistent=False)
        self.register_buffer("basis", basis)
        self.register_buffer("mean", mean @ basis)
        self.register_buffer("var", var.clamp_min(min_std**2))

    @property
    def time_features(self) -> int:
        """Length of the times' features, guidance included."""
        return 6 * len(self.frequencies) + self.reads_guidance

    @property
    def null_class(self) -> int | None:
        """The label that means the same as None; None without classes."""
        return self.n_classes or None

    def correction(self, standard: Tensor, known: Tensor, times: Tensor, y: Tensor | None) -> Tensor:
        """F: ζ and the evidence `(B, D)` along the axes, features `(B, time_features)`, labels `(B,)`, to `(B, D)`."""
        raise NotImplementedError

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
        """v_{s,u}: times `(B,)`, z and context t·x `(B, *D)`, labels and guidance `(B,)` or None, to `(B, *D)`."""
        if y is not None and not self.n_classes:
            raise ValueError("this network has no classes, got labels y")
        var = self.var.mean()
        std = posterior_std(t, var).clamp_min(1e-6)  # an angle at s = t = 1 needs one
        stds = torch.stack([std, std, var.sqrt().expand_as(std)], -1)
        angles = angle_of_time(torch.stack([s, u, t], -1), stds).unsqueeze(-1) * self.harmonics  # (B, 3, F)
        times = torch.cat([angles.cos().mT, angles.sin().mT], -1).flatten(1)  # (B, 6F)
        s, u, t = s.unsqueeze(-1), u.unsqueeze(-1), t.unsqueeze(-1)
        if self.reads_guidance:
            strength = torch.zeros_like(s) if guidance is None else (1 - 1 / guidance).unsqueeze(-1)
            times = torch.cat([times, strength], -1)
        flat, tx = z.flatten(1) @ self.basis, context.flatten(1) @ self.basis
        m, c, known = gaussian_posterior(t, tx, self.mean, self.var)
        start, end = gaussian_std(s, c).clamp_min(1e-12), gaussian_std(u, c)  # S_s = 0 only at s = t = 1, where z = m
        standard = (flat - s * m) / start
        slope = ((1 + c * c) * (s + u) - 2) / (start + end)  # of `gaussian_velocity`, from what is at hand
        v = m + slope * standard + c / start * self.correction(standard, known, times, y)
        return (v @ self.basis.T).view_as(z)

    def labels_or_null(self, y: Tensor | None, like: Tensor) -> Tensor:
        """Labels `(B,)`, the null class for every row where None."""
        return torch.full(like.shape[:1], self.n_classes, device=like.device) if y is None else y


class MLP(GaussianNetwork):
    """v_{s,u}(z; t, x) for vectors: the exact map of N(mean, cov), corrected by a residual MLP F (`GaussianNetwork`).

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
        super().__init__(
            tuple(mean.shape), mean, cov, n_classes=n_classes, reads_guidance=reads_guidance, min_std=min_std
        )
        check_count(hidden, "hidden")
        check_count(depth, "depth")
        d = len(mean)
        self.config: dict[str, Any] = {
            "dim": d,
            "hidden": hidden,
            "depth": depth,
            "normalise": normalise,
            "n_classes": n_classes,
            "reads_guidance": reads_guidance,
            "min_std": min_std,
        }
        self.inlet = nn.Linear(2 * d + self.time_features, hidden)
        norm = _LayerNorm if normalise else nn.Identity
        self.blocks = nn.ModuleList(nn.Sequential(norm(hidden), nn.Linear(hidden, hidden)) for _ in range(depth - 1))
        self.outlet = nn.Linear(hidden, d)
        nn.init.zeros_(self.outlet.weight)  # at the start, the map of the Gaussian
        nn.init.zeros_(self.outlet.bias)
        self.labels = nn.Embedding(n_classes + 1, hidden) if n_classes else None
        self.to(mean.dtype)

    def correction(self, standard: Tensor, known: Tensor, times: Tensor, y: Tensor | None) -> Tensor:
        """F, `(B, D)` along the principal axes."""
        h = self.inlet(torch.cat([standard, known, times], -1))
        if self.labels is not None:
            h = h + self.labels(self.labels_or_null(y, h))
        h = nn.functional.silu(h)
        for block in self.blocks:
            h = h + nn.functional.silu(block(h))
        return self.outlet(h)


class _LayerNorm(nn.LayerNorm):
    """LayerNorm that forward mode passes through when compiled, too: torch 2.13 cannot trace the affine kernel's."""

    def forward(self, h: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            return super().forward(h)
        return nn.functional.layer_norm(h, self.normalized_shape, eps=self.eps) * self.weight + self.bias
