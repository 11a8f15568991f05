"""Training objectives (E13, E14), each a plain function of tensors, and the laws of their times.

A batch is drawn once (`coupled_interpolants`) and every objective reads it. A new objective is a function that
returns residuals turned into a number by `weighted_mean_square`.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from mfm_ref.checks import Time, check_finite, check_order, check_same_shape, expand_time
from mfm_ref.flow_map import MetaFlowMap
from mfm_ref.gaussian import gaussian_std, posterior_std
from mfm_ref.interpolant import Drift, coupled_interpolants, glass_drift
from mfm_ref.times import balanced_times, context_time, step_towards

LATEST_CONTEXT = 0.998  # float32 velocities lose their digits as t → 1, where the posterior is a point anyway

Weight = Callable[[Tensor], Tensor]  # squared residual norms (B,) -> weights (B,)


def adaptive_weight(squared: Tensor, *, p: float, c: float = 0.01, unit: Tensor | float = 1.0) -> Tensor:
    """E14: w = 1/(‖Δ‖² + c)^p, detached. The paper uses c = 0.01, p = 0.5 for E13 and p = 1 for E14.

    Args:
        squared: ‖Δ‖² `(B,)`.
        p: exponent; 0 gives no adaptation.
        c: floor, in squared units, > 0.
        unit: the natural size of a velocity, `()` or `(B,)`, in which residuals are measured:
            w = unit⁻² (‖Δ/unit‖² + c)^−p.
    """
    scale = unit**-2
    return scale * (scale * squared.detach() + c) ** -p


def weighted_mean_square(residual: Tensor, weight: Weight | None = None) -> Tensor:
    """Mean over the batch of w ‖Δ‖², with ‖Δ‖² the sum of squares of one sample; w = 1 where None."""
    squared = residual.square().reshape(len(residual), -1).sum(1)
    if weight is None:
        return squared.mean()
    w = weight(squared).detach()
    check_same_shape(weight=w, squared=squared)
    return (w * squared).mean()


def meta_flow_map_loss(
    X: MetaFlowMap,
    x1: Tensor,
    y: Tensor | None = None,
    *,
    drift: Drift | None = None,
    data_var: float = 1.0,
    step: float = 0.2,
    p: float = 0.5,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Diagonal plus consistency (E13 + E14) for one batch of data: half of the rows each.

    Draws contexts by `context_time`, internal times by `balanced_times`, and measures every residual in units
    of c/S_s, the natural velocity of the auxiliary flow, with adaptive weights. From data (`drift` None) the
    diagonal regresses onto x₁ − x̄₀ and the semigroup's midpoint is uniform between s and u; from a drift the
    diagonal regresses onto E12 and the semigroup's first leg is a teacher step of at most `step` in angle.

    Args:
        X: the map to train.
        x1: data `(B, *D)`, B >= 2.
        y: class labels `(B,)`, or None.
        drift: teacher `drift(t, x)`, or None to learn from data.
        data_var: variance of the data, mean over the coordinates.
        step: longest teacher step, in radians of the auxiliary flow's rotation, in (0, π/2].
        p: exponent of `adaptive_weight`.
        generator: source of all noise and times.

    Returns:
        the loss, `()`.

    Raises:
        ValueError: fewer than two samples, data that is not finite, or data_var or step out of range.
    """
    check_finite(x1, "x1")
    if len(x1) < 2:
        raise ValueError(f"meta_flow_map_loss needs at least two samples, got {len(x1)}")
    if not (data_var > 0 and 0 < step <= torch.pi / 2):
        raise ValueError(f"data_var must be positive and step in (0, π/2], got {data_var} and {step}")
    t = context_time(len(x1), generator=generator).to(x1).clamp_max(LATEST_CONTEXT)
    std = posterior_std(t, data_var)
    s, u = balanced_times(t, std, generator=generator)
    x, z, velocity = coupled_interpolants(x1, s, t, generator=generator)
    unit = std / gaussian_std(s, std**2)

    def weigh(rows: slice) -> Weight:
        return lambda squared: adaptive_weight(squared, p=p, unit=unit[rows])

    half = len(x1) // 2
    first, second = slice(None, half), slice(half, None)
    labels = (None, None) if y is None else (y[first], y[second])
    row = (s[first], z[first], t[first], x[first])
    target = velocity[first] if drift is None else glass_drift(drift, *row, labels[0])
    diagonal = diagonal_loss(X, *row, target, labels[0], weight=weigh(first))
    s, u, std = s[second], u[second], std[second]
    if drift is None:
        w = s + (u - s) * torch.rand(s.shape, generator=generator, dtype=s.dtype, device=s.device)
    else:
        w = step_towards(s, u, std, step)
    consistency = semigroup_loss(
        X, s, w, u, z[second], t[second], x[second], labels[1], drift=drift, weight=weigh(second)
    )
    return diagonal + consistency


def diagonal_loss(
    X: MetaFlowMap,
    s: Time,
    z: Tensor,
    t: Time,
    x: Tensor,
    target: Tensor,
    y: Tensor | None = None,
    *,
    weight: Weight | None = None,
) -> Tensor:
    """E13: E‖v_{s,s}(z; t, x) − target‖².

    From data, z = Ī_s, x = I_t and target = x₁ − x̄₀, as `coupled_interpolants` returns them. From a drift,
    target = `glass_drift(drift, s, z, t, x)` (E12): then the minimum is zero.

    Args:
        X: the map to train.
        s, z: internal time, `()` or `(B,)` in [0, 1], and state `(B, *D)`.
        t, x: the context: time `()` or `(B,)` in [0, 1], and noisy state `(B, *D)`.
        target: the velocity to regress onto, `(B, *D)`; detached.
        y: class labels `(B,)`, or None.
        weight: maps ‖Δ‖² `(B,)` to weights `(B,)`, as `adaptive_weight` does; None for one.

    Returns:
        the loss, `()`.

    Raises:
        ValueError: shapes that differ, or times outside [0, 1].
    """
    check_same_shape(z=z, target=target)
    return weighted_mean_square(X.velocity(s, s, z, t, x, y) - target.detach(), weight)


def semigroup_loss(
    X: MetaFlowMap,
    s: Time,
    w: Time,
    u: Time,
    z: Tensor,
    t: Time,
    x: Tensor,
    y: Tensor | None = None,
    *,
    drift: Drift | None = None,
    weight: Weight | None = None,
) -> Tensor:
    """E14: X_{w,u}(X_{s,w}(z)) = X_{s,u}(z), stop-gradient on the composed side.

    Written in velocities, so that the residual keeps its size as u − s shrinks: with γ = (w−s)/(u−s),

        Δ = v_{s,u}(z) − sg[γ v_{s,w}(z) + (1−γ) v_{w,u}(X_{s,w}(z))].

    From data, both legs are the model's own. From a drift, the first leg is one Runge–Kutta step of the true
    conditional drift (E12) from s to w: the law is then anchored to the truth at every s, and w − s is the
    step whose size bounds the error.

    Args:
        X: the map to train.
        s, w, u: internal times s <= w <= u, `()` or `(B,)` in [0, 1].
        z, t, x, y, weight: as in `diagonal_loss`.
        drift: the teacher `drift(t, x) -> (B, *D)`, `drift(t, x, y)` with labels; None for the model's own leg.

    Returns:
        the loss, `()`.

    Raises:
        ValueError: times outside [0, 1] or out of order, or shapes that differ.
    """
    s_, w_, u_ = (expand_time(a, z, name) for a, name in ((s, "s"), (w, "w"), (u, "u")))
    check_order(s_, w_)
    check_order(w_, u_)
    with torch.no_grad():
        first = X.velocity(s, w, z, t, x, y) if drift is None else teacher_velocity(drift, s, w, z, t, x, y)
        second = X.velocity(w, u, z + (w_ - s_) * first, t, x, y)
        gamma = torch.where(u_ > s_, (w_ - s_) / torch.where(u_ > s_, u_ - s_, 1.0), 0.5)
        target = gamma * first + (1 - gamma) * second
    return weighted_mean_square(X.velocity(s, u, z, t, x, y) - target, weight)


def teacher_velocity(drift: Drift, s: Time, w: Time, z: Tensor, t: Time, x: Tensor, y: Tensor | None = None) -> Tensor:
    """v_{s,w}(z; t, x) of the teacher: the classical fourth-order Runge–Kutta step of b̄ (E12) from s to w."""
    s, w = expand_time(s, z, "s"), expand_time(w, z, "w")
    h, middle = w - s, (s + w) / 2

    def b(a: Tensor, state: Tensor) -> Tensor:
        return glass_drift(drift, a.flatten(), state, t, x, y)

    k1 = b(s, z)
    k2 = b(middle, z + h / 2 * k1)
    k3 = b(middle, z + h / 2 * k2)
    k4 = b(w, z + h * k3)
    return (k1 + 2 * k2 + 2 * k3 + k4) / 6
