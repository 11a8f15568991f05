"""What a new reward, network or objective must satisfy: checks to call on one's own.

    from mfm_ref.conformance import check_network

    for result in check_network(MyNetwork()):
        print(result)

Each function runs all of its checks and returns their results. The first that fails raises ValueError with its name,
what must hold, and what came. A row is one sample of a batch.
"""

import itertools
import reprlib
import tempfile
from collections.abc import Callable, Sequence
from copy import deepcopy
from numbers import Integral
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mfm_ref.checks import Reward
from mfm_ref.exact import ExactFlowMap
from mfm_ref.flow_map import FlowMap, MetaFlowMap
from mfm_ref.forward_mode import derivative
from mfm_ref.gaussian import posterior_std
from mfm_ref.interpolant import Drift, coupled_interpolants
from mfm_ref.mixture import GaussianMixture
from mfm_ref.networks import MLP
from mfm_ref.pretrained import NETWORKS, Maker
from mfm_ref.recipe import LATEST_CONTEXT, Consistency, Rows

ROUNDING = 1e-9  # of float64, with room for long sums
STANDARD_ERRORS = 5.0  # exceeded by a statistic of mean zero with probability 6e-7
ENDS = (0.0, 0.5, 1.0)


class Result(NamedTuple):
    """A check that was passed: what was measured, and the most (or the `least`) that it may be."""

    name: str
    measured: float
    limit: float
    least: bool = False

    def __str__(self) -> str:
        return f"{self.name:<14} {self.measured:8.1e}, at {'least' if self.least else 'most'} {self.limit:.1e}"


class _Checks:
    """`that` names a check, `most` or `least` decides it. An error in between is a failure of the check named last."""

    def __init__(self, subject: object):
        self.subject, self.results = getattr(subject, "__name__", type(subject).__name__), list[Result]()
        self.name = self.must = ""

    def __enter__(self) -> "_Checks":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if isinstance(error, Exception):
            came = str(error) if isinstance(error, _Error) else f"{type(error).__name__}: {error}"
            raise ValueError(f"{self.subject} fails the check {self.name!r}: {self.must}; got {came}") from error

    def that(self, name: str, must: str) -> None:
        """Name the next check and say what must hold."""
        self.name, self.must = name, must

    def most(self, measured: Tensor | float, limit: float = 0) -> None:
        """Pass if the number is at most the limit; NaN is not."""
        self._decide(Result(self.name, float(measured), limit), float(measured) <= limit)

    def least(self, measured: Tensor | float, limit: float = 1e-6) -> None:
        """Pass if the number is at least the limit."""
        self._decide(Result(self.name, float(measured), limit, least=True), float(measured) >= limit)

    def _decide(self, result: Result, passed: bool) -> None:
        if not passed:
            raise _Error(f"{result.measured:.3g} where the {'least' if result.least else 'most'} is {result.limit:g}")
        self.results.append(result)


class _Error(Exception):
    """What came, in words."""


def check_reward(
    reward: Reward,
    shape: Sequence[int],
    *,
    differentiable: bool = True,
    samples: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> list[Result]:
    """Check a reward: any callable `(B, *D) -> (B,)` that treats its samples one by one.

    Args:
        reward: the callable.
        shape: *D, of one sample.
        differentiable: whether autograd must give its gradient; False for a black box.
        samples: clean data `(n, *D)`, n >= 3, to ask it about; normal numbers where None.
        dtype: of the normal numbers; float32 for a reward with weights of it, with wider limits.
        seed: of the normal numbers.

    Returns:
        the results: shape, finite, inputs, repeats, alone, NaN, and gradient.

    Raises:
        ValueError: a shape or samples that do not fit; the check that failed, what must hold, and what came.
    """
    _valid_question(shape, samples)
    generator = torch.Generator().manual_seed(seed)
    n = _batch(shape)
    x1 = torch.randn((n, *shape), generator=generator, dtype=dtype) if samples is None else samples.detach()
    eps, kept = torch.finfo(x1.dtype).eps, x1.clone()
    with _Checks(reward) as check, torch.no_grad():
        check.that("shape", "one number for each of B samples, shape (B,)")
        for size in {1, len(x1), *(size for size in shape if size < n)}:  # B == D among them
            _same_shape(reward(x1[:size]), x1[:size, ...].flatten(1)[:, 0])
        r = reward(x1).double()
        check.most(0)
        check.that("finite", "finite rewards")
        check.most((~torch.isfinite(r)).sum())
        check.that("inputs", "samples are left as they were")
        check.most((x1 != kept).sum())
        unit = 1 + r.abs().max()
        check.that("repeats", "a sample has the same reward every time")
        check.most((reward(x1).double() - r).abs().max() / unit, eps)
        check.that("alone", "a sample alone has the reward that it has in a batch, in whatever order")
        check.most((torch.cat([reward(row) for row in x1.split(1)]).double() - r).abs().max() / unit, eps**0.5)
        check.that("NaN", "a sample of NaN has no reward: NaN, or an error")
        check.most(_silent(reward, x1.new_full(x1.shape, torch.nan)))
        if differentiable:
            check.that("gradient", "the gradient by autograd is that by finite differences, and not zero")
            along = torch.randn(x1.shape, generator=generator, dtype=x1.dtype)
            with torch.enable_grad():
                leaf = x1.clone().requires_grad_()
                (gradient,) = torch.autograd.grad(reward(leaf).sum(), leaf)
            if not bool(gradient.any()):
                raise _Error("zero for every sample")
            h = eps ** (1 / 3)
            slope = (reward(x1 + h * along) - reward(x1 - h * along)) / (2 * h)
            error = slope - (gradient * along).flatten(1).sum(1)
            check.most(error.abs().max() / (slope.abs().max() + h * unit), 10 * h)
    return check.results


def check_network(
    network: nn.Module, *, make: Maker | None = None, forward_mode: bool = True, seed: int = 0
) -> list[Result]:
    """Check a network for `FlowMap`: an `nn.Module` with `shape`, `reads_tx` and `velocity(s, u, z, t, context, y)`.

    It is asked in float64, as a copy whose weights are moved at random, so that layers that start at zero count. With
    `null_class` its labels are checked too, with `reads_guidance` the scale, with `config` that it can be saved.

    Args:
        network: the network; it is left as it is.
        make: makes it from its config; None for its class, and for what `from_pretrained` knows by name.
        forward_mode: whether derivatives in s, u and z must exist in forward mode, as all objectives but the semigroup
            law and the shortcut take them; False for one with fused attention, say.
        seed: of the weights and the states.

    Returns:
        the results: protocol, shape, finite, inputs, not zero, repeats, alone, rows, reads s, …, weights, derivative,
            and save.

    Raises:
        ValueError: the check that failed, what must hold, and what came.
    """
    generator = torch.Generator().manual_seed(seed)
    with _Checks(network) as check, torch.no_grad():
        check.that("protocol", "an nn.Module with a tuple shape, a bool reads_tx, and velocity")
        if not isinstance(network, nn.Module):
            raise _Error(_came(network))
        module: Any = network
        velocity, shape, reads_tx = getattr(module, "velocity", None), module.shape, module.reads_tx
        if not callable(velocity):
            raise _Error(f"velocity={velocity!r}")
        if not isinstance(shape, tuple) or not isinstance(reads_tx, bool):
            raise _Error(f"shape={shape!r}, reads_tx={reads_tx!r}")
        check.most(0)
        X, null = FlowMap(_moved(network, generator)), getattr(network, "null_class", None)
        n = _batch(shape)
        z, x, other = torch.randn((3, n, *shape), generator=generator, dtype=torch.float64)
        s, t = 0.1 + 0.4 * torch.rand((2, n), generator=generator, dtype=torch.float64)
        given: dict[str, Any] = {"s": s, "u": s + 0.3, "z": z, "t": t, "x": x, "y": None}
        if null is not None:
            given["y"] = torch.arange(n) % null
        if X.reads_guidance:
            given["guidance"] = torch.full_like(s, 1.5)

        def v(part: Any = slice(None), **changed: Any) -> Tensor:
            rows = {name: a[part] if isinstance(a, Tensor) else a for name, a in (given | changed).items()}
            return X.velocity(**rows)

        check.that("shape", "a velocity of the shape and the dtype of z")
        sizes = {1, n, *(size for size in shape if size < n)}  # B == D among them
        check.most(sum(v(slice(size)).dtype != z.dtype for size in sizes))
        check.that("finite", "finite at every end of the times, and between them")
        ends = [{"s": a, "u": b, "t": c} for a, b, c in itertools.product(ENDS, repeat=3) if a <= b]
        check.most(sum((~torch.isfinite(v(**times))).sum() for times in ({}, *ends)))
        check.that("inputs", "arguments are left as they were")
        kept, here = deepcopy(given), v()
        check.most(sum((a != kept[name]).sum() for name, a in given.items() if a is not None))
        unit = here.abs().max()
        check.that("not zero", "a velocity that is not zero everywhere")
        check.least(unit, torch.finfo(torch.float64).tiny)
        check.that("repeats", "the same velocity twice, in eval mode")
        check.most((v() - here).abs().max() / unit, ROUNDING)
        check.that("alone", "a row alone has the velocity that it has in a batch, in whatever order")
        check.most((torch.cat([v(slice(i, i + 1)) for i in range(n)]) - here).abs().max() / unit, ROUNDING)
        check.that("rows", "a row's velocity does not depend on the other rows in training mode either")
        mixed = {"z": torch.cat([z[:1], 3 * other[1:]]), "x": torch.cat([x[:1], 3 * z[1:]])}
        X.train()
        check.most((_seeded(seed, v)[0] - _seeded(seed, lambda: v(**mixed))[0]).abs().max() / unit, ROUNDING)
        X.eval()
        changes: dict[str, dict[str, Any]] = {"s": {"s": s - 0.1}, "u": {"u": s + 0.4}, "z": {"z": other}}
        # Where t comes in twice, as itself and in t·x, the former alone.
        tx = (t / (t + 0.1)).reshape(-1, *[1] * len(shape)) * x if reads_tx else x
        changes |= {"t": {"t": t + 0.1, "x": tx}, "context": {"x": other}}
        if null is not None:
            changes["y"] = {"y": (given["y"] + 1) % (null + 1)}
        if X.reads_guidance:
            changes["guidance"] = {"guidance": torch.full_like(s, 2.5)}
        for name, change in changes.items():
            check.that(f"reads {name}", f"the velocity depends on {name}")
            check.least((v(**change) - here).abs().max() / unit)
        if null is not None:
            check.that("null class", "no label means the same as null_class")
            check.most((v(y=None) - v(y=torch.full_like(given["y"], null))).abs().max() / unit, ROUNDING)
        check.that("weights", "a gradient reaches every weight")
        weights = {name: weight for name, weight in X.network.named_parameters() if weight.requires_grad}
        with torch.enable_grad():
            gradients = torch.autograd.grad(v().square().sum(), list(weights.values()), allow_unused=True)
        unreached = [name for name, g in zip(weights, gradients, strict=True) if g is None or not bool(g.any())]
        if unreached:
            raise _Error(f"none at {', '.join(unreached)}")
        check.most(len(unreached))
        if forward_mode:
            check.that("derivative", "the forward-mode derivative along (s, u, z) is that by finite differences")
            along, h = (torch.full_like(s, 0.7), torch.full_like(s, -0.4), other), 1e-5

            def moved(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
                return v(s=a, u=b, z=c)

            at = (s, s + 0.3, z)
            ahead, behind = (moved(*(a + k * d for a, d in zip(at, along, strict=True))) for k in (h, -h))
            slope = (ahead - behind) / (2 * h)
            check.most((derivative(moved, at, along)[1] - slope).abs().max() / (unit + slope.abs().max()), 1e-6)
        if isinstance(getattr(network, "config", None), dict):
            check.that("save", "save_pretrained and from_pretrained give the same network")
            if make is None and type(network).__name__ not in NETWORKS:
                make = type(network)
            with tempfile.TemporaryDirectory() as folder:
                X.save_pretrained(f"{folder}/map")
                again = _seeded(seed, lambda: FlowMap.from_pretrained(f"{folder}/map", network=make)).double().eval()
            check.most((again.velocity(**given) - here).abs().max() / unit, ROUNDING)
    return check.results


def check_objective(
    consistency: Consistency, *, from_data: bool = False, teacher_error: float = 1e-6, seed: int = 0
) -> list[Result]:
    """Check an objective of E14 as `meta_flow_map_loss` calls it: `(X, rows, drift, generator) -> (target, size)`.

    It is asked at the exact map of a random mixture, at wrong maps, and at a network.

    Args:
        consistency: the objective; `mfm_ref.recipe.CONSISTENCY` has the package's own.
        from_data: whether its target reads `rows.velocity`, which is noisy. Then the residual at the exact map is zero
            in the mean alone: tested against functions of z and x, in standard errors.
        teacher_error: largest residual at the exact map with the exact drift for a teacher, in units of its size; more
            than rounding for an objective that takes steps with it.
        seed: of the mixture, the rows and the network.

    Returns:
        the results: pair, graph, size, finite, oracle, teacher, Euler, time reversed, generator, rows, and labels.

    Raises:
        ValueError: the check that failed, what must hold, and what came.
    """
    generator = torch.Generator().manual_seed(seed)
    p1 = _random_mixture(generator)
    oracle, X = ExactFlowMap(p1), FlowMap(_moved(MLP(p1.mean, p1.cov, hidden=16, n_classes=2), generator))
    r = _rows(p1, 4000 if from_data else 64, generator)
    few = Rows(*(a if a is None else a[: p1.dim] for a in r))  # type: ignore[arg-type]  # B == D

    def ask(X: MetaFlowMap, r: Rows = few, drift: Drift | None = None) -> tuple[Tensor, Tensor]:
        return consistency(X, r, drift, torch.Generator().manual_seed(seed))

    def residual(X: MetaFlowMap, drift: Drift | None = None) -> Tensor:
        target, size = ask(X, r, drift)
        left = (X.velocity(r.s, r.u, r.z, r.t, r.x) - target) / size.unsqueeze(-1)
        if not from_data:
            return left.abs().max()
        tests = torch.cat([torch.ones_like(r.z), r.z.sin(), r.x.sin()], 1)
        products = (left.unsqueeze(-1) * tests.unsqueeze(-2)).flatten(1)
        return (products.mean(0) / products.std(0)).abs().max() * len(r.z) ** 0.5

    with _Checks(consistency) as check:
        check.that("pair", "a target like z and a size of its residual like s, in shape and dtype")
        target, size = ask(X)
        _same_shape(target, few.z)
        _same_shape(size, few.s)
        check.most((target.dtype != few.z.dtype) + (size.dtype != few.s.dtype))
        check.that("graph", "a target and a size without a graph")
        if target.requires_grad or size.requires_grad:
            raise _Error(f"target.requires_grad={target.requires_grad}, size.requires_grad={size.requires_grad}")
        check.most(0)
    with check, torch.no_grad():
        check.that("size", "a positive size of the residual")
        check.least(ask(X, r)[1].min(), torch.finfo(torch.float64).tiny)
        check.that("finite", "finite at every end of the times")
        check.most(sum((~torch.isfinite(part)).sum() for part in ask(X, _rows(p1, 9, generator, ends=True))))
        mean = ", in the mean, in standard errors" if from_data else ""
        check.that("oracle", f"no residual at the exact map{mean}")
        check.most(residual(oracle), STANDARD_ERRORS if from_data else 1e-6)
        check.that("teacher", f"no residual at the exact map with the exact drift for a teacher{mean}")
        check.most(residual(oracle, p1.drift), STANDARD_ERRORS if from_data else teacher_error)
        check.that("Euler", "a residual at one Euler step in the place of the map")
        wrong: Any = deepcopy(oracle)
        wrong.velocity = lambda s, u, z, t, x, y=None: oracle.velocity(s, s, z, t, x)
        check.least(residual(wrong), 3 * STANDARD_ERRORS if from_data else 0.01)
        check.that("time reversed", "a residual at the map with its times reversed")
        wrong.velocity = lambda s, u, z, t, x, y=None: oracle.velocity(1 - u, 1 - s, z, t, x)
        check.least(residual(wrong), 3 * STANDARD_ERRORS if from_data else 0.01)
        check.that("generator", "all chance comes from the generator")
        check.most((_seeded(1, lambda: ask(X)[0]) - _seeded(2, lambda: ask(X)[0])).abs().max())
        check.that("rows", "a row's target does not depend on the other rows")
        parts: Any = zip(r, _rows(p1, len(r.s), generator), strict=True)
        mixed: list[Any] = [None if a is None else torch.cat([a[:1], b[1:]]) for a, b in parts]
        check.most((ask(X, r)[0] - ask(X, Rows(*mixed))[0])[0].abs().max(), ROUNDING)
        check.that("labels", "the target depends on the labels")
        one, two = (ask(X, few._replace(y=torch.full((len(few.s),), k)))[0] for k in (0, 1))
        check.least((one - two).abs().max())
    return check.results


def _valid_question(shape: Any, samples: Any) -> None:
    """Refuse a shape and samples that no reward can be asked about."""
    sizes = list(shape) if isinstance(shape, Sequence) and not isinstance(shape, str) else []
    if not sizes or not all(isinstance(size, Integral) and int(size) > 0 for size in sizes):
        raise ValueError(f"shape must be the sizes of one sample, such as (2,), got {_came(shape)}")
    must = f"samples must be ({', '.join(['n', *map(str, sizes)])}), n >= 3, a tensor of floating-point numbers"
    if samples is None:
        return
    if not isinstance(samples, Tensor):
        raise ValueError(f"{must}, got {_came(samples)}")
    if samples.shape[1:] != tuple(sizes) or len(samples) < 3 or not samples.is_floating_point():
        raise ValueError(f"{must}, got {tuple(samples.shape)} of {samples.dtype}")


def _came(value: object) -> str:
    return f"{reprlib.repr(value)} of type {type(value).__name__}"


def _same_shape(actual: Tensor, like: Tensor) -> None:
    if not isinstance(actual, Tensor) or actual.shape != like.shape:
        got = tuple(actual.shape) if isinstance(actual, Tensor) else type(actual).__name__
        raise _Error(f"{got} in the place of {tuple(like.shape)}")


def _batch(shape: Sequence[int]) -> int:
    """A number of rows above that of any short dimension: what is right for B = D alone is seen."""
    return 1 + max([3, *(size for size in shape if size <= 16)])


def _silent(reward: Reward, x1: Tensor) -> int:
    """How many samples of NaN got a number: none where the reward refuses them, by whatever error."""
    try:
        return int(torch.isfinite(reward(x1)).sum())
    except Exception:
        return 0


def _moved(network: nn.Module, generator: torch.Generator) -> nn.Module:
    """A copy in float64 and eval mode, every weight that is trained moved by about its size at the start."""
    network = deepcopy(network).double().eval()
    for weight in network.parameters():
        if weight.requires_grad:
            noise = torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
            weight.data += 0.5 * noise / max(1, weight[0].numel() if weight.ndim > 1 else 4) ** 0.5
    return network


def _seeded(seed: int, f: Callable[[], Any]) -> Any:
    """f() with a seed of torch's own generator, which is then as before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return f()


def _random_mixture(generator: torch.Generator) -> GaussianMixture:
    """Two components that differ along one axis of three, whose exact map is cheap."""
    basis = torch.linalg.qr(torch.randn((3, 3), generator=generator, dtype=torch.float64)).Q
    variances = torch.tensor([[0.3, 0.6, 1.5], [0.8, 0.6, 1.5]], dtype=torch.float64)
    means = torch.tensor([[-1.5], [1.5]], dtype=torch.float64) * basis[:, 0]
    weights = torch.tensor([0.3, 0.7], dtype=torch.float64)
    covs = (basis * variances.unsqueeze(-2)) @ basis.T
    return GaussianMixture(weights, means, (covs + covs.mT) / 2)


def _rows(p1: GaussianMixture, n: int, generator: torch.Generator, *, ends: bool = False) -> Rows:
    """Rows of a batch (E9), between the ends of the times or at them."""
    s, u, t = torch.rand((3, n), generator=generator, dtype=torch.float64)
    s, u, t = 0.05 + 0.4 * s, 0.55 + 0.4 * u, 0.8 * t
    if ends:
        s, u = torch.tensor([(0, 0), (0, 1), (1, 1)] * 3, dtype=torch.float64).T
        t = torch.tensor([0, 0, 0, 0.5, 0.5, 0.5, *[LATEST_CONTEXT] * 3], dtype=torch.float64)
    x, z, velocity = coupled_interpolants(p1.sample(n, generator=generator), s, t, generator=generator)
    return Rows(s, u, z, t, x, None, velocity, posterior_std(t, float(p1.cov.diagonal().mean())))
