"""The paper's training step: its laws of times and labels row by row, and its loss as a pure function of the rows.

Each image gives one row for each loss term: one on the diagonal (E13) and one jump (E14), with times and noise of their
own. All chance lies in the rows, made on the CPU with one generator an image, so that they depend neither on the number
of processes nor on how a batch is cut; `paper_loss` draws nothing, and torch.compile traces it whole, derivative
included.

What a step costs, in forward passes of a network for each image (`forward_equivalents`; a forward pass counts 1, a
backward pass 2, a forward-mode derivative 2, of which one is its value):

    stage and target                  student                            teacher      together   floor
    flow, from data                   3                                  –             3          3
    map or mfm, from data             3 + 3, derivative 2                –             8          7
    the same, model guidance          3 + 3, derivative 2, guidance 3    –            11         10
    map or mfm, teacher, one scale    3 + 3, derivative 2                1 + 1        10          9
    the same, several scales          3 + 3, derivative 2                2 + 2        12         11

The floor is what the formulas ask for: the value that comes with the derivative is also that of the gradient pass on
the same rows. Sharing it means a derivative with a graph, at more than twice the memory, and without torch's fused
attention; it is computed twice here instead. Shared are: one gradient pass for both terms, one pass of a teacher for
both, and the diagonal's own velocity, which model guidance needs, from the gradient pass. A teacher whose weights hold
the guidance that is asked for needs one pass for each row, not two; of several scales some rows would need one too,
but which ones is chance, and compiled code has fixed sizes.

Not here: the projections onto features of another network with which the base of XL/2 was trained (REPA), and the
spread that DMF learns beside its velocity to weigh the loss (logvar).
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from mfm_ref.checks import check_count, check_finite, check_same_shape
from mfm_ref.flow_map import FlowMap, Guided, MetaFlowMap
from mfm_ref.interpolant import Drift, glass_drift, interpolate
from mfm_ref.objectives import adaptive_weight, guided_target, mean_flow_target, weighted_mean_square
from mfm_ref.recipe import LATEST_CONTEXT
from mfm_ref.times import context_of
from mfm_ref.training import Watched

STAGES = ("flow", "map", "mfm")
TIMES = ("uniform", "logit-normal")
DIAGONAL_MEAN = 0.0  # of the logit-normal times, in this project's direction of time; all with deviation 1
JUMP_MEANS = (-0.4, 1.2)
BINS = 5  # of s, in which residuals are watched


class PaperRows(NamedTuple):
    """Rows of a batch, all from the diagonal first: the arguments of `velocity_loss`, and what targets are made of."""

    s: Tensor  # (B,)
    u: Tensor  # (B,)
    z: Tensor  # (B, *D), Ī_s
    t: Tensor  # (B,)
    x: Tensor  # (B, *D), I_t
    y: Tensor  # (B,); the null class where the label was dropped
    guidance: Tensor  # (B,), scale w >= 1; 1 where the label was dropped
    velocity: Tensor  # (B, *D), x₁ − x̄₀


class Teacher(Protocol):
    """The frozen drift that a map is distilled from, at guidance w."""

    def __call__(self, t: Tensor, x: Tensor, y: Tensor, w: Tensor) -> Tensor:
        """b_t(x) (E2) of the classes y `(B,)` at scales w `(B,)`, `(B, *D)`."""
        ...


# ---- rows ----------------------------------------------------------------------------------------------


class RowLaw(NamedTuple):
    """The law of an image's rows: times, noise, whether its label is dropped, and its guidance.

    Attributes:
        stage: "flow": a diagonal row in the empty context; "map": and a jump; "mfm": both in contexts of their own.
        times: "uniform": s ~ U(0, 1) on the diagonal, the smaller and the larger of two U(0, 1) for the jump, as the
            paper; "logit-normal", as DMF: 1/(1 + e^−a) with a ~ N(0, 1), and of two with a ~ N(−0.4, 1) and N(1.2, 1).
        null_class: the label that means none.
        drop: probability of it, in [0, 1].
        guidance: scale w >= 1 of rows that keep their label.
        plain_rate: probability of w = 1 for these, in [0, 1].
    """

    stage: str
    times: str
    null_class: int
    drop: float = 0.2
    guidance: float = 1.0
    plain_rate: float = 0.0

    def check(self) -> None:
        """Raise ValueError for what is out of range."""
        for name, value, allowed in (("stage", self.stage, STAGES), ("times", self.times, TIMES)):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
        if not (0 <= self.drop <= 1 and 0 <= self.plain_rate <= 1):
            raise ValueError(f"drop and plain_rate must lie in [0, 1], got {self.drop} and {self.plain_rate}")
        if not 1 <= self.guidance < float("inf"):
            raise ValueError(f"guidance must be finite and at least 1, got {self.guidance}")


def times_of(law: RowLaw, uniform: Tensor) -> Tensor:
    """s, u and t of the rows of images, `(3, terms, n)`, from four uniform numbers each, `(4, terms, n)`.

    Terms are the diagonal, where s = u, and the jump. The context time is 0 with probability 0.1, else U(0, 1)², and
    0.998 at most, beyond which float32 has no digits left for the velocities; without a context it is 0.
    """
    first, second, place, chance = uniform
    if law.times == "logit-normal":
        means = uniform.new_tensor([(DIAGONAL_MEAN, DIAGONAL_MEAN), JUMP_MEANS])[
            : uniform.shape[1], :, None
        ]  # (terms, 2, 1)
        first, second = (torch.sigmoid(means[:, k] + torch.special.ndtri(a)) for k, a in enumerate((first, second)))
    second = torch.cat([first[:1], second[1:]])
    t = context_of(place, chance).clamp_max(LATEST_CONTEXT) if law.stage == "mfm" else torch.zeros_like(place)
    return torch.stack([torch.minimum(first, second), torch.maximum(first, second), t])


def draw_rows(law: RowLaw, x1: Tensor, y: Tensor, generators: Sequence[torch.Generator]) -> tuple[PaperRows, int]:
    """Rows of a batch of images, on the CPU: all diagonal ones, then all jumps in the same order.

    Args:
        law: of the rows.
        x1: images or latents `(n, *D)`, n >= 1.
        y: their labels `(n,)`.
        generators: one an image.

    Returns:
        the rows `(n, …)` (flow) or `(2n, …)`, and n.

    Raises:
        ValueError: no images, or not one label and one generator an image.
    """
    n = len(x1)
    check_count(n, "the number of images")
    if not n == len(y) == len(generators):
        raise ValueError(f"each image needs a label and a generator, got {n}, {len(y)} and {len(generators)}")
    terms = 1 if law.stage == "flow" else 2
    uniform, noise = x1.new_empty(n, 2 + 4 * terms), x1.new_empty(n, 2, terms, *x1.shape[1:])
    for i, g in enumerate(generators):
        uniform[i].uniform_(generator=g)
        noise[i].normal_(generator=g)
    dropped, plain = uniform[:, 0] < law.drop, uniform[:, 1] < law.plain_rate
    y, w = torch.where(dropped, law.null_class, y), torch.where(dropped | plain, 1.0, law.guidance).to(x1)
    s, u, t = times_of(law, uniform[:, 2:].unflatten(1, (4, terms)).permute(1, 2, 0)).flatten(1)
    x0, eps = noise.transpose(0, 2).transpose(0, 1).flatten(1, 2)  # each (terms · n, *D)
    x1, y, w = (torch.cat(terms * [a]) for a in (x1, y, w))
    return PaperRows(s, u, interpolate(eps, x1, s), t, interpolate(x0, x1, t), y, w, x1 - eps), n


# ---- the loss ------------------------------------------------------------------------------------------


def paper_loss(
    X: FlowMap,
    r: PaperRows,
    diagonal: int,
    *,
    teacher: Teacher | None = None,
    guided_from: float | None = None,
    p: float = 0.5,
    p_consistency: float = 1.0,
    c: float = 0.01,
) -> Watched:
    """E13 on the first rows and E14 on the rest, as the paper weighs them; no random numbers.

    Every row has one velocity v̇ of the auxiliary flow: from data x₁ − x̄₀; the same with model guidance; or the
    teacher's b̄_s(z; t, x) by E12. The diagonal's target is v̇, that of a jump v̇ + (u−s)(∂_s v + ∇_z v v̇) without a
    graph: mean flow from data, teacher-Eulerian from a teacher. Residuals count as sums of squares in the adaptive
    weights 1/(‖Δ‖² + c)^p.

    Args:
        X: the map to train. If its network reads guidance it gets that of the rows.
        r: the rows, those of the diagonal first.
        diagonal: how many these are, >= 1; there may be no others.
        teacher: or None to learn from data. It is called once, for all rows, without a graph.
        guided_from: from data, model guidance where s is at least this much, by each row's scale; None for none. The
            null class is read at w = 1, where rows with a dropped label train it.
        p, p_consistency, c: of the weights; p = 0 leaves the minimiser of E13 where it is.

    Returns:
        terms `diagonal` and, if there are jumps, `consistency`, each `()`; and, watched, the mean square of the
        residual per coordinate in bins of s: `diagonal_s0.2` has the rows with 0.2 <= s < 0.4.

    Raises:
        ValueError: no diagonal rows; model guidance with a teacher or for a network without a null class.
    """
    check_count(diagonal, "the number of diagonal rows")
    if diagonal > len(r.s):
        raise ValueError(f"diagonal rows must be at most all, {len(r.s)}, got {diagonal}")
    if teacher is not None and guided_from is not None:
        raise ValueError("model guidance is for targets from data: a teacher brings its own guidance")
    check_finite(r.velocity, "the data")
    if not torch.compiler.is_compiling() and not torch.equal(r.s[:diagonal], r.u[:diagonal]):
        raise ValueError(f"the first {diagonal} rows must have s = u")
    scale = (r.guidance,) if X.reads_guidance else ()
    v = X.velocity(r.s, r.u, r.z, r.t, r.x, r.y, *scale)  # the only pass with a graph
    first, rest = slice(None, diagonal), slice(diagonal, None)
    with torch.no_grad():
        velocity = _velocity(X, r, v[first], teacher, guided_from)
        target = velocity
        if diagonal < len(r.s):
            j = PaperRows(*(a[rest] for a in r))
            jumping: MetaFlowMap = Guided(X, j.guidance) if X.reads_guidance else X
            jump = mean_flow_target(jumping, j.s, j.u, j.z, j.t, j.x, velocity[rest], j.y)
            target = torch.cat([velocity[first], jump])
    residual = v - target
    terms: dict[str, Tensor] = {}
    watched: dict[str, Tensor] = {}
    for name, part, exponent in (("diagonal", first, p), ("consistency", rest, p_consistency)):
        if len(r.s[part]):
            terms[name] = weighted_mean_square(residual[part], partial(adaptive_weight, p=exponent, c=c))
            watched |= {f"{name}_{bin}": pair for bin, pair in by_time(r.s[part], residual[part]).items()}
    return Watched(terms, watched)


def _velocity(X: FlowMap, r: PaperRows, own: Tensor, teacher: Teacher | None, guided_from: float | None) -> Tensor:
    """v̇ of every row, `(B, *D)`; `own` is v of the diagonal's rows."""
    if teacher is not None:
        drift: Drift = lambda t, x, y: teacher(t, x, y, r.guidance)  # noqa: E731
        return glass_drift(drift, r.s, r.z, r.t, r.x, r.y).to(r.z.dtype)
    if guided_from is None:
        return r.velocity
    w, n = torch.where(r.s >= guided_from, r.guidance, 1.0), len(own)
    parts = []
    for part, known in ((slice(None, n), own), (slice(n, None), None)):
        if len(r.s[part]):
            s, z, t, x, target, y = (a[part] for a in (r.s, r.z, r.t, r.x, r.velocity, r.y))
            parts.append(guided_target(X, s, z, t, x, target, y, w[part], conditional=known, null_guidance=1.0))
    return torch.cat(parts)


def by_time(s: Tensor, residual: Tensor) -> dict[str, Tensor]:
    """For each bin of s the sum over its rows of the residual's mean square over coordinates, and their number, `(2,)`.

    Args:
        s: `(B,)` in [0, 1].
        residual: `(B, *D)`.
    """
    check_same_shape(s=s, residual=residual.flatten(1)[:, 0])
    mean_square = residual.detach().to(s.dtype).square().flatten(1).mean(1)
    place = (s * BINS).long().clamp_max(BINS - 1)
    inside = torch.nn.functional.one_hot(place, BINS).to(mean_square)  # (B, bins)
    sums = (mean_square.unsqueeze(1) * inside).sum(0)  # no matrix product, which autocast would round
    pairs = torch.stack([sums, inside.sum(0)], 1)
    return {f"s{k / BINS:.1f}": pair for k, pair in enumerate(pairs)}


# ---- what a step costs ---------------------------------------------------------------------------------


class Equivalents(NamedTuple):
    """Forward passes for each image of a step: of the student, of the teacher, and the fewest for both together."""

    student: int
    teacher: int
    floor: int


def forward_equivalents(stage: str, *, guided: bool = False, teacher: int = 0) -> Equivalents:
    """What `paper_loss` and its backward pass cost, by the table at the top of this file.

    Args:
        stage: in `STAGES`.
        guided: whether targets from data have model guidance.
        teacher: its passes for each row: 0 without one, 1, or 2 where it is evaluated with and without labels.

    Raises:
        ValueError: an unknown stage, guidance with a teacher, or passes out of range.
    """
    if stage not in STAGES or teacher not in (0, 1, 2) or (guided and teacher):
        raise ValueError(
            f"stage must be one of {', '.join(STAGES)}, a teacher have 0, 1 or 2 passes, and no model guidance beside "
            f"it, got {stage!r}, {teacher} and guided = {guided}"
        )
    jumps = stage != "flow"
    gradient, derivative = 3 * (1 + jumps), 2 * jumps
    guidance = guided * (1 + 2 * jumps)  # on the diagonal the null class alone, for a jump both
    teaching = teacher * (1 + jumps)
    student = gradient + derivative + guidance
    return Equivalents(student, teaching, student + teaching - jumps)
