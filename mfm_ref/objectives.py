"""Training objectives (E13, E14), each a plain function of tensors.

Every objective has one form: E w ‖v_{s,u}(z; t, x) − target‖², where the target is made without a graph. Where
s = u the target is a drift (E13). Where s < u it says how v_{s,u} follows from the map's shorter jumps or from its
derivatives (E14): these are the functions named `…_target`. A new objective is one more of them.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from mfm_ref.checks import Time, check_order, check_same_shape, expand_time
from mfm_ref.flow_map import FlowMap, MetaFlowMap, scales_of
from mfm_ref.forward_mode import derivative
from mfm_ref.interpolant import Drift, glass_drift

Weight = Callable[[Tensor], Tensor]  # squared residual norms (B,) -> weights (B,)


def adaptive_weight(squared: Tensor, *, p: float, c: float = 0.01, unit: Tensor | float = 1.0) -> Tensor:
    """E14: w = 1/(‖Δ‖² + c)^p, detached. The paper uses c = 0.01, p = 0.5 for E13 and p = 1 for E14.

    Args:
        squared: ‖Δ‖² `(B,)`.
        p: exponent; 0 gives no adaptation.
        c: floor, in squared units, > 0.
        unit: the natural size of a velocity, `()` or `(B,)`, in which residuals are measured:
            w = unit⁻² (‖Δ/unit‖² + c)^−p.

    Raises:
        ValueError: p < 0 or c <= 0.
    """
    if not (p >= 0 and c > 0):
        raise ValueError(f"p must be >= 0 and c positive, got {p} and {c}")
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


def velocity_loss(
    X: MetaFlowMap,
    s: Time,
    u: Time,
    z: Tensor,
    t: Time,
    x: Tensor,
    target: Tensor,
    y: Tensor | None = None,
    *,
    weight: Weight | None = None,
) -> Tensor:
    """E w ‖v_{s,u}(z; t, x) − sg[target]‖², the form of every objective here.

    Args:
        X: the map to train.
        s, u: internal times s <= u, `()` or `(B,)` in [0, 1].
        z: state at s, `(B, *D)`.
        t, x: the context: time `()` or `(B,)` in [0, 1], and noisy state `(B, *D)`.
        target: `(B, *D)`; detached.
        y: class labels `(B,)`, or None.
        weight: maps ‖Δ‖² `(B,)` to weights `(B,)`, as `adaptive_weight` does; None for one.

    Returns:
        the loss, `()`.

    Raises:
        ValueError: times outside [0, 1] or out of order, or shapes that differ.
    """
    check_same_shape(z=z, target=target)
    return weighted_mean_square(X.velocity(s, u, z, t, x, y) - target.detach(), weight)


# ---- E13: the diagonal s = u ---------------------------------------------------------------------------


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
    """E13: E w ‖v_{s,s}(z; t, x) − target‖².

    From data, z = Ī_s, x = I_t and target = x₁ − x̄₀, as `coupled_interpolants` returns them. From a drift,
    target = `glass_drift(drift, s, z, t, x)` (E12): then the minimum is zero. Either may pass through
    `guided_target`. Arguments and errors as in `velocity_loss`.
    """
    return velocity_loss(X, s, s, z, t, x, target, y, weight=weight)


def guided_target(
    X: FlowMap,
    s: Time,
    z: Tensor,
    t: Time,
    x: Tensor,
    target: Tensor,
    y: Tensor,
    guidance: Time,
    *,
    conditional: Tensor | None = None,
    null_guidance: Time | None = None,
) -> Tensor:
    """Model guidance: target + (1 − 1/w) sg[v_{s,s}(z; t, x, y, w) − v_{s,s}(z; t, x, ∅, w)].

    Its fixed point is v(y, w) = b̄(∅) + w (b̄(y) − b̄(∅)), so that one evaluation samples with guidance. Where the
    network reads w, guidance becomes an input of it; where it has labels alone, w is built into its weights, and may
    vary with s, as in an interval of times. Rows whose label was dropped (y the null class) have the plain target at
    every w, and they alone say what b̄(∅) is: drop some labels of every batch, 10 to 20 %.

    Args:
        X: a map whose network reads labels with a `null_class`. It is asked for both in one batch.
        target: x₁ − x̄₀ or E12 of the conditional drift, `(B, *D)`.
        y: class labels `(B,)`.
        guidance: scale w >= 1, `()` or `(B,)`. w = 1 leaves the target as it is.
        conditional: v_{s,s}(z; t, x, y, w) `(B, *D)`, where it is at hand: then X is asked for the null class alone.
        null_guidance: the scale at which the null class is read, where X reads scales: that of the rows whose label was
            dropped, if these all have one, as 1 in the published training. None for w.

    Raises:
        ValueError: guidance below one, a network without a null class; shapes that differ.
    """
    check_same_shape(z=z, target=target, conditional=z if conditional is None else conditional)
    w = scales_of(guidance, z)
    s, t = expand_time(s, z, "s").flatten(), expand_time(t, x).flatten()
    scale: tuple[Tensor, ...] = (w,) if X.reads_guidance else ()
    of_null = scale if null_guidance is None or not scale else (scales_of(null_guidance, z),)
    rows = (s, s, z, t, x, torch.full_like(y, X.null_class), *of_null)
    with torch.no_grad():
        if conditional is None:
            both = (torch.cat(pair) for pair in zip((s, s, z, t, x, y, *scale), rows, strict=True))
            conditional, unconditional = X.velocity(*both).chunk(2)
        else:
            unconditional = X.velocity(*rows)
        excess = conditional.detach() - unconditional
    return target + (1 - 1 / w).reshape(-1, *[1] * (target.ndim - 1)) * excess


# ---- E14: consistency, s <= u --------------------------------------------------------------------------
# Where `drift` is None an objective is "self": it reads v_{s,s} off the model. With a drift it is "teacher": E12.


@torch.no_grad()
def semigroup_target(
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
) -> Tensor:
    """E14: X_{w,u}(X_{s,w}(z)) = X_{s,u}(z), in velocities γ v_{s,w}(z) + (1−γ) v_{w,u}(X_{s,w}(z)), γ = (w−s)/(u−s).

    Progressive self-distillation with any w, the shortcut model's objective with w = (s+u)/2. From a drift the
    first leg is one Runge–Kutta step of E12 from s to w: the law is then anchored to the truth at every s, and
    w − s is the step whose size bounds the error.

    Args:
        s, w, u: internal times s <= w <= u, `()` or `(B,)` in [0, 1].
        z, t, x, y: as in `velocity_loss`.
        drift: the teacher `drift(t, x) -> (B, *D)`, `drift(t, x, y)` with labels; None for the model's own leg.

    Returns:
        the target `(B, *D)`, without a graph.

    Raises:
        ValueError: times outside [0, 1] or out of order, or shapes that differ.
    """
    s_, w_, u_ = (expand_time(a, z, name) for a, name in ((s, "s"), (w, "w"), (u, "u")))
    check_order(s_, w_)
    check_order(w_, u_)
    first = X.velocity(s, w, z, t, x, y) if drift is None else teacher_velocity(drift, s, w, z, t, x, y)
    second = X.velocity(w, u, z + (w_ - s_) * first, t, x, y)
    gamma = torch.where(u_ > s_, (w_ - s_) / torch.where(u_ > s_, u_ - s_, 1.0), 0.5)
    return gamma * first + (1 - gamma) * second


@torch.no_grad()
def lagrangian_target(
    X: MetaFlowMap,
    s: Time,
    u: Time,
    z: Tensor,
    t: Time,
    x: Tensor,
    y: Tensor | None = None,
    *,
    drift: Drift | None = None,
) -> Tensor:
    """E14: ∂_u X_{s,u}(z) = b̄_u(X_{s,u}(z)), in velocities: b̄_u(X_{s,u}(z)) − (u−s) ∂_u v_{s,u}(z).

    b̄ is v_{u,u} of the model, or E12 of the drift. ∂_u is a forward-mode derivative. Arguments, result and
    errors as in `semigroup_target`.
    """
    s_, u_ = expand_time(s, z, "s"), expand_time(u, z, "u")
    end = u_.flatten()
    v, slope = derivative(lambda a: X.velocity(s, a, z, t, x, y), (end,), (torch.ones_like(end),))
    arrived = z + (u_ - s_) * v
    b = X.velocity(u, u, arrived, t, x, y) if drift is None else glass_drift(drift, u, arrived, t, x, y)
    return b - (u_ - s_) * slope


@torch.no_grad()
def eulerian_target(
    X: MetaFlowMap,
    s: Time,
    u: Time,
    z: Tensor,
    t: Time,
    x: Tensor,
    y: Tensor | None = None,
    *,
    drift: Drift | None = None,
) -> Tensor:
    """E14: ∂_s X_{s,u}(z) + ∇_z X_{s,u}(z) b̄_s(z) = 0, in velocities: b̄ + (u−s) (∂_s v_{s,u} + ∇_z v_{s,u} b̄).

    b̄ is v_{s,s} of the model, or E12 of the drift. Arguments, result and errors as in `semigroup_target`.
    """
    b = X.velocity(s, s, z, t, x, y) if drift is None else glass_drift(drift, s, z, t, x, y)
    return mean_flow_target(X, s, u, z, t, x, b, y)


@torch.no_grad()
def mean_flow_target(
    X: MetaFlowMap, s: Time, u: Time, z: Tensor, t: Time, x: Tensor, velocity: Tensor, y: Tensor | None = None
) -> Tensor:
    """E14: v̇ + (u−s) (∂_s v_{s,u} + ∇_z v_{s,u} v̇), with v̇ = x₁ − x̄₀ from data.

    It is linear in v̇, whose mean given z and the context is b̄_s(z; t, x): so the minimiser is that of
    `eulerian_target`, which calls this with v̇ = b̄. One forward-mode derivative along (1, v̇).

    Args:
        velocity: v̇ `(B, *D)`, as `coupled_interpolants` returns it.
        s, u, z, t, x, y: as in `velocity_loss`.

    Returns:
        the target `(B, *D)`, without a graph.

    Raises:
        ValueError: times outside [0, 1] or out of order, or shapes that differ.
    """
    check_same_shape(z=z, velocity=velocity)
    s_, u_ = expand_time(s, z, "s"), expand_time(u, z, "u")
    start = s_.flatten()
    _, slope = derivative(
        lambda a, state: X.velocity(a, u, state, t, x, y), (start, z), (torch.ones_like(start), velocity)
    )
    return velocity + (u_ - s_) * slope


@torch.no_grad()
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


# ---- E14 as losses: the same arguments, and `weight` as in `velocity_loss` ------------------------------


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
    """E14: E w ‖v_{s,u} − `semigroup_target`‖²."""
    target = semigroup_target(X, s, w, u, z, t, x, y, drift=drift)
    return velocity_loss(X, s, u, z, t, x, target, y, weight=weight)


def lagrangian_loss(
    X: MetaFlowMap,
    s: Time,
    u: Time,
    z: Tensor,
    t: Time,
    x: Tensor,
    y: Tensor | None = None,
    *,
    drift: Drift | None = None,
    weight: Weight | None = None,
) -> Tensor:
    """E14: E w ‖v_{s,u} − `lagrangian_target`‖²."""
    target = lagrangian_target(X, s, u, z, t, x, y, drift=drift)
    return velocity_loss(X, s, u, z, t, x, target, y, weight=weight)


def eulerian_loss(
    X: MetaFlowMap,
    s: Time,
    u: Time,
    z: Tensor,
    t: Time,
    x: Tensor,
    y: Tensor | None = None,
    *,
    drift: Drift | None = None,
    weight: Weight | None = None,
) -> Tensor:
    """E14: E w ‖v_{s,u} − `eulerian_target`‖²."""
    target = eulerian_target(X, s, u, z, t, x, y, drift=drift)
    return velocity_loss(X, s, u, z, t, x, target, y, weight=weight)


def mean_flow_loss(
    X: MetaFlowMap,
    s: Time,
    u: Time,
    z: Tensor,
    t: Time,
    x: Tensor,
    velocity: Tensor,
    y: Tensor | None = None,
    *,
    weight: Weight | None = None,
) -> Tensor:
    """E14: E w ‖v_{s,u} − `mean_flow_target`‖²; at s = u it is E13 from data."""
    target = mean_flow_target(X, s, u, z, t, x, velocity, y)
    return velocity_loss(X, s, u, z, t, x, target, y, weight=weight)
