"""The whole training loss: one batch, a diagonal half (E13), a consistency half (E14), one gradient pass.

The stages of training are choices of its arguments. Plain flow matching is the diagonal in the empty context,
`consistency=None, context=no_context`; an ordinary flow map is `context=no_context`; a Meta Flow Map is the whole.
Each stage starts from the weights of the one before.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from mfm_ref.checks import Time, check_finite, check_same_shape, check_time, expand_time
from mfm_ref.flow_map import FlowMap, Guided, MetaFlowMap
from mfm_ref.gaussian import angle_of_time, gaussian_std, posterior_std
from mfm_ref.interpolant import Drift, coupled_interpolants, glass_statistic
from mfm_ref.objectives import (
    adaptive_weight,
    eulerian_target,
    guided_target,
    lagrangian_target,
    mean_flow_target,
    semigroup_target,
    weighted_mean_square,
)
from mfm_ref.times import balanced_times, context_time, step_towards

LATEST_CONTEXT = 0.998  # float32 velocities lose their digits as t → 1, where the posterior is a point anyway


class Rows(NamedTuple):
    """Rows of a training batch: the arguments of `velocity_loss`, and what a target may be made from."""

    s: Tensor  # (B,)
    u: Tensor  # (B,)
    z: Tensor  # (B, *D), Ī_s
    t: Tensor  # (B,)
    x: Tensor  # (B, *D), I_t
    y: Tensor | None  # (B,)
    velocity: Tensor  # (B, *D), x₁ − x̄₀
    std: Tensor  # (B,), the size of the posterior in the context's time


# A consistency objective, as the recipe calls it: the target (B, *D), and the natural size of its residual (B,).
Consistency = Callable[[MetaFlowMap, Rows, Drift | None, torch.Generator | None], tuple[Tensor, Tensor]]


def semigroup(
    X: MetaFlowMap, r: Rows, drift: Drift | None, generator: torch.Generator | None, *, step: float = 0.15
) -> tuple[Tensor, Tensor]:
    """Midpoint w uniform between s and u; from a drift, a teacher step of at most `step` radians from s."""
    if drift is None:
        w = r.s + (r.u - r.s) * torch.rand(r.s.shape, generator=generator, dtype=r.s.dtype, device=r.s.device)
    else:
        w = step_towards(r.s, r.u, r.std, step)
    return semigroup_target(X, r.s, w, r.u, r.z, r.t, r.x, r.y, drift=drift), velocity_size(r.s, r.std)


def shortcut(X: MetaFlowMap, r: Rows, drift: Drift | None, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """The semigroup law with the midpoint fixed, w = (s+u)/2. Always self: one teacher step would be too long."""
    return semigroup_target(X, r.s, (r.s + r.u) / 2, r.u, r.z, r.t, r.x, r.y), velocity_size(r.s, r.std)


def lagrangian(
    X: MetaFlowMap, r: Rows, drift: Drift | None, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Self, or teacher from a drift. The residual is a velocity at u."""
    target = lagrangian_target(X, r.s, r.u, r.z, r.t, r.x, r.y, drift=drift)
    return target, velocity_size(r.u, r.std) / damping(r)


def eulerian(X: MetaFlowMap, r: Rows, drift: Drift | None, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """Self, or teacher from a drift. The residual is a velocity at s, carried to u by ∇X ~ S_u/S_s."""
    target = eulerian_target(X, r.s, r.u, r.z, r.t, r.x, r.y, drift=drift)
    return target, _carried_size(r) / damping(r)


def mean_flow(X: MetaFlowMap, r: Rows, drift: Drift | None, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """From data, whatever the drift; the residual is that of `eulerian`."""
    return mean_flow_target(X, r.s, r.u, r.z, r.t, r.x, r.velocity, r.y), _carried_size(r) / damping(r)


def velocity_size(s: Tensor, std: Tensor) -> Tensor:
    """c/S_s: the natural size, `(B,)`, of what data add to the auxiliary flow's velocity at s."""
    return std / gaussian_std(s, std)


def _carried_size(r: Rows) -> Tensor:
    return velocity_size(r.s, r.std) * gaussian_std(r.u, r.std) / gaussian_std(r.s, r.std)


def damping(r: Rows) -> Tensor:
    """0.1 + 0.9 cos(θ_u − θ_s), `(B,)`: how far a derivative objective may move the map, by the length of the jump.

    In the angles of `balanced_times` such an objective carries what the map adds to a Gaussian's along the flow, at
    speed sin Δθ, with damping cos Δθ, none for the longest jumps: there, errors of a network's derivatives feed on
    themselves. This factor makes the decay of an error's mean square even over all jumps.
    """
    return 0.1 + 0.9 * torch.cos(angle_of_time(r.u, r.std) - angle_of_time(r.s, r.std))


CONSISTENCY: dict[str, Consistency] = {
    "semigroup": semigroup,
    "shortcut": shortcut,
    "lagrangian": lagrangian,
    "eulerian": eulerian,
    "mean_flow": mean_flow,
}


# `balanced_times` with extra jumps from s = 0 in place of those to u = 1, for an objective that moves u.
from_the_start = partial(balanced_times, start_rate=0.25, end_rate=0.0)


def no_context(n: int, *, generator: torch.Generator | None = None) -> Tensor:
    """t = 0 for every row: the context says nothing, and the map is the ordinary flow map of p₁."""
    return context_time(n, zero_rate=1.0, generator=generator)


def meta_flow_map_loss(
    X: MetaFlowMap,
    x1: Tensor,
    y: Tensor | None = None,
    *,
    drift: Drift | None = None,
    consistency: str | Consistency | None = "semigroup",
    self_taught: bool = False,
    guidance: Tensor | None = None,
    data_var: float = 1.0,
    context: Callable[..., Tensor] = context_time,
    times: Callable[..., Tensor] | None = None,
    p: float = 0.5,
    p_consistency: float = 0.5,
    consistency_weight: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Diagonal plus consistency (E13 + E14) for one batch of data: half of the rows each, in one gradient pass.

    Every residual is measured in units of its own natural size (c/S_s on the diagonal), with adaptive weights. From
    data (`drift` None) the diagonal regresses onto x₁ − x̄₀ and the consistency is "self"; from a drift both read
    E12, except that `shortcut` stays self and `mean_flow` reads data.

    Args:
        X: the map to train.
        x1: data `(B, *D)`, B >= 2.
        y: class labels `(B,)`, or None.
        drift: teacher `drift(t, x)`, `drift(t, x, y)` with labels, or None to learn from data.
        consistency: a name in `CONSISTENCY`, a function like those there, or None for the diagonal alone.
        self_taught: with a drift, keep it to the diagonal: the consistency stays "self".
        guidance: scales w >= 1 `(B,)` for model guidance (`guided_target`), or None. X must be a `FlowMap` whose
            network reads them; needs labels, some of them dropped (the null class), and a consistency that is self,
            as a teacher knows no guidance.
        data_var: variance of the data, mean over the coordinates.
        context: law of t, `context(n, generator=…) -> (n,)`; `no_context` for an ordinary flow map.
        times: law of the internal times, `times(t, std, generator=…) -> (2, B)`, s <= u. None for `balanced_times`,
            whose extra rows are jumps to u = 1, or for "lagrangian", which moves u, jumps from s = 0.
        p, p_consistency: exponents of `adaptive_weight`. With targets from data, which are noisy, only 0 leaves the
            minimiser of E13 where it is; in many dimensions the difference is small.
        consistency_weight: factor of the consistency, > 0; below 1 an objective that feeds on its own derivatives
            trains more steadily.
        generator: source of all noise and times.

    Returns:
        the loss, `()`.

    Raises:
        ValueError: fewer than two samples, data that are not finite or no floats, numbers out of range, a
            consistency that is not known or returns something else, or guidance without what it needs.
    """
    if not x1.is_floating_point() or len(x1) < 2:
        raise ValueError(f"meta_flow_map_loss needs at least two samples of floats, got {len(x1)} of {x1.dtype}")
    check_finite(x1, "x1")
    for name, value in (("data_var", data_var), ("consistency_weight", consistency_weight)):
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be positive and finite, got {value}")
    objective = _lookup(consistency)
    if times is None:
        times = from_the_start if objective is lagrangian else balanced_times
    teacher = None if self_taught else drift
    if guidance is not None:
        _check_guidance(X, guidance, y, teacher, objective)

    t = context(len(x1), generator=generator).to(x1)
    check_time(t)
    t = t.clamp_max(LATEST_CONTEXT)
    std = posterior_std(t, data_var)
    s, u = times(t, std, generator=generator).to(x1)
    x, z, velocity = coupled_interpolants(x1, s, t, generator=generator)
    half = len(x1) if objective is None else len(x1) // 2
    u = torch.where(torch.arange(len(u), device=u.device) < half, s, u)  # the first rows are the diagonal's

    def rows(part: slice) -> Rows:
        labels = None if y is None else y[part]
        return Rows(s[part], u[part], z[part], t[part], x[part], labels, velocity[part], std[part])

    first, second = slice(None, half), slice(half, None)
    r = rows(first)
    b_bar = None if drift is None else _DiagonalDrift(drift, r)
    unit = velocity_size(s, std)
    size = unit
    with torch.no_grad():
        if objective is not None:
            shared = None if teacher is None else b_bar
            returned = objective(_guided(X, guidance, second), rows(second), shared, generator)
            jump, size_of_jump = _pair(returned, z[second], s[second])
        target = r.velocity if b_bar is None else b_bar.target()
        if guidance is not None:
            target = guided_target(X, r.s, r.z, r.t, r.x, target, r.y, guidance[first])  # type: ignore[arg-type]
        if objective is not None:
            target, size = torch.cat([target, jump]), torch.cat([size[first], size_of_jump])
    residual = _guided(X, guidance, slice(None)).velocity(s, u, z, t, x, y) - target

    def mean_square(part: slice, exponent: float) -> Tensor:
        # Δ counts in units of its own size, the velocity that it corrects in c/S_s: the gradient has one of each.
        gain = size[part] / unit[part]
        return weighted_mean_square(
            residual[part], lambda squared: gain * adaptive_weight(squared, p=exponent, unit=size[part])
        )

    loss = mean_square(first, p)
    return loss if objective is None else loss + consistency_weight * mean_square(second, p_consistency)


class _DiagonalDrift:
    """A drift whose first call takes the diagonal's rows along: E12 on them then needs no batch of its own."""

    def __init__(self, drift: Drift, r: Rows):
        self.drift, self.labels = drift, () if r.y is None else (r.y,)
        self.t, self.x, self.gain, self.pull = glass_statistic(r.s, r.z, r.t, r.x)
        self.b: Tensor | None = None

    def __call__(self, t: Time, x: Tensor, *y: Tensor) -> Tensor:
        if self.b is not None or len(y) != len(self.labels):
            return self.drift(t, x, *y)
        times = torch.cat([self.t, expand_time(t, x).flatten()])
        x = torch.cat([self.x, x])
        labels = (torch.cat(pair) for pair in zip(self.labels, y, strict=True))
        b = self.drift(times, x, *labels)
        check_same_shape(drift=b, x=x)
        self.b = b[: len(self.x)]
        return b[len(self.x) :]

    def target(self) -> Tensor:
        """b̄_s(z; t, x) of the diagonal's rows, `(B, *D)`."""
        b = self.drift(self.t, self.x, *self.labels) if self.b is None else self.b
        check_same_shape(drift=b, x=self.x)
        return self.gain * b + self.pull


def _lookup(consistency: str | Consistency | None) -> Consistency | None:
    if isinstance(consistency, str):
        consistency = CONSISTENCY.get(consistency, consistency)
    if consistency is not None and not callable(consistency):
        raise ValueError(f"consistency must be a function or one of {', '.join(CONSISTENCY)}, got {consistency!r}")
    return consistency


def _pair(returned: tuple[Tensor, Tensor], z: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    if not (isinstance(returned, tuple) and len(returned) == 2 and all(isinstance(part, Tensor) for part in returned)):
        raise ValueError(
            "a consistency must return a pair of tensors, the target and the size of its residual, got "
            f"{[type(part).__name__ for part in returned] if isinstance(returned, tuple) else type(returned).__name__}"
        )
    target, size = returned
    check_same_shape(target=target, z=z)
    check_same_shape(size=size, s=s)
    if not torch.compiler.is_compiling() and not bool((size > 0).all()):
        raise ValueError(f"the size of a residual must be positive, got {float(size.min())}")
    return target, size


def _guided(X: MetaFlowMap, guidance: Tensor | None, part: slice) -> MetaFlowMap:
    return X if guidance is None else Guided(X, guidance[part])  # type: ignore[arg-type]


def _check_guidance(
    X: MetaFlowMap, guidance: Tensor, y: Tensor | None, teacher: Drift | None, objective: Consistency | None
) -> None:
    if not isinstance(X, FlowMap) or y is None:
        raise ValueError("guidance needs a FlowMap and class labels y")
    if not isinstance(guidance, Tensor) or guidance.shape != y.shape:
        got = tuple(guidance.shape) if isinstance(guidance, Tensor) else guidance
        raise ValueError(f"guidance must have the shape of y, {tuple(y.shape)}, got {got}")
    if objective is not None and (teacher is not None or objective is mean_flow):
        raise ValueError("with guidance the consistency must be self: pass self_taught=True, and not mean_flow")
