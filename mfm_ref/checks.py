"""The one contract for times, states and rewards, and the errors that name what broke it.

A state is `(B, *D)`. A time is a number, a tensor `()` or a tensor `(B,)`, in [0, 1]; it is always
aligned with the *batch*, never with a feature, so `B == D` is no special case.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

Time = float | Tensor
Reward = Callable[[Tensor], Tensor]


def check_time(t: Time, name: str = "t") -> None:
    """Refuse a time outside [0, 1] or one that is not finite.

    Raises:
        ValueError: naming the time and the range of the values that came.
    """
    if torch.compiler.is_compiling():  # a data-dependent branch would break the compiled graph
        return
    if not isinstance(t, (int, float, Tensor)) or (isinstance(t, Tensor) and t.numel() == 0):
        raise ValueError(f"time {name} must be a number or a tensor that is not empty, got {t!r}")
    low, high = (end.item() for end in t.detach().aminmax()) if isinstance(t, Tensor) else (t, t)
    if not (low >= 0.0 and high <= 1.0):
        raise ValueError(f"time {name} must lie in [0, 1], got values from {low} to {high}")


def check_order(s: Time, u: Time) -> None:
    """Refuse internal times with s > u: most often the two were swapped."""
    if torch.compiler.is_compiling():
        return
    s, u = torch.as_tensor(s).detach(), torch.as_tensor(u).detach()
    if bool((s > u).any()):
        worst = torch.argmax(s - u)
        pair = [float(a.expand((s - u).shape).flatten()[worst]) for a in (s, u)]
        raise ValueError(f"internal times must satisfy s <= u, got s = {pair[0]}, u = {pair[1]}")


def expand_time(t: Time, x: Tensor, name: str = "t") -> Tensor:
    """A time as a tensor that multiplies a state: `(B, 1, …, 1)`.

    Args:
        t: a number, `()` or `(B,)`, in [0, 1].
        x: a state `(B, *D)`; gives the batch size, the dtype and the device.
        name: the symbol used in error messages.

    Raises:
        ValueError: when t is outside [0, 1] or its shape is neither () nor (B,), or x is no batch of real numbers.
    """
    check_time(t, name)
    if x.ndim < 1 or not x.is_floating_point():  # a time in an integer dtype would silently become 0 or 1
        raise ValueError(
            f"a state must have a batch dimension and a floating-point dtype, got shape {tuple(x.shape)}, {x.dtype}"
        )
    t = torch.as_tensor(t, dtype=x.dtype, device=x.device)
    if t.shape not in ((), (x.shape[0],)):
        raise ValueError(f"time {name} must have shape () or ({x.shape[0]},), got {tuple(t.shape)}")
    return t.expand(x.shape[0]).reshape(-1, *[1] * (x.ndim - 1))


def check_same_shape(**tensors: Tensor) -> None:
    """Refuse tensors whose shapes differ: broadcasting between states is never meant."""
    if len({tuple(tensor.shape) for tensor in tensors.values()}) > 1:
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
        raise ValueError(f"these must have the same shape: {shapes}")


def check_finite(x: Tensor, name: str) -> None:
    """Refuse data with NaN or infinite entries."""
    if torch.compiler.is_compiling():
        return
    x = x.detach()
    if math.isfinite(x.sum().item()):  # then so is every entry: one pass in place of five
        return
    if not bool(torch.isfinite(x).all()):
        bad = int((~torch.isfinite(x)).sum())
        raise ValueError(f"{name} must be finite, got {bad} NaN or infinite entries of {x.numel()}")


def check_count(n: int, name: str, minimum: int = 1) -> None:
    """Refuse a count that is not an integer of at least `minimum`."""
    if isinstance(n, bool) or not isinstance(n, int) or n < minimum:
        raise ValueError(f"{name} must be an integer >= {minimum}, got {n!r}")


class RewardError(ValueError):
    """What is wrong with a reward, in words that need no others around them."""


def evaluate_reward(reward: Reward, x1: Tensor) -> Tensor:
    """r(x₁) of clean data `(…, B, *D)`, one number per sample.

    The leading draw dimension of posterior samples `(n, B, *D)` is folded into the batch by the caller.

    Args:
        reward: callable `(B, *D) -> (B,)` that does not couple the samples of a batch.
        x1: clean data `(B, *D)`.

    Returns:
        rewards `(B,)`.

    Raises:
        ValueError: when the reward fails, returns another shape, or a NaN or infinite value; from `check_uncoupled`
            where the reward itself calls it. Running out of memory stays what it is.
    """
    r = _call(reward, x1)
    check_finite(r, "the reward")
    return r if r.is_floating_point() else r.to(x1.dtype)


def _call(reward: Reward, x1: Tensor) -> Tensor:
    try:
        r = reward(x1)
    except (MemoryError, torch.OutOfMemoryError, RewardError):
        raise
    except Exception as error:
        raise RewardError(
            f"a reward must take clean data {tuple(x1.shape)}; this one raised {type(error).__name__}: {error}"
        ) from error
    if not isinstance(r, Tensor) or r.shape != x1.shape[:1]:
        got = tuple(r.shape) if isinstance(r, Tensor) else type(r).__name__
        raise RewardError(f"a reward must return one number per sample, shape ({x1.shape[0]},), got {got}")
    return r


def check_uncoupled(reward: Reward, x1: Tensor, r: Tensor) -> None:
    """Refuse a reward whose value for one sample depends on the rest of its batch, or on chance.

    The samples of the highest and of the lowest reward are evaluated again, each alone. They may differ from r by
    rounding, as sums in another order do: by 2e-2 of the rewards' range (a network in bfloat16 was seen to take
    a quarter of that), by 1e-3 of themselves, or by 16 times the precision of their dtype.

    Args:
        reward: callable `(B, *D) -> (B,)`. One that asks something else of each sample, such as to look like a prompt,
            has a method `of_row(i)`, the reward of sample i alone.
        x1: clean data `(B, *D)`, B > 1.
        r: the reward of all of them, `(B,)`, finite.

    Raises:
        ValueError: with both values; a reward that fails for a batch of one, or returns another shape.
    """
    rounding = max(1e-3, 16 * torch.finfo(r.dtype).eps if r.is_floating_point() else 0.0)
    r = r.detach().double()  # of bools too
    spread = float(r.max()) - float(r.min())
    for row in {int(r.argmax()), int(r.argmin())}:
        own = reward.of_row(row) if hasattr(reward, "of_row") else reward
        with torch.no_grad():
            alone, together = float(_call(own, x1[row : row + 1].detach())), float(r[row])
        if not abs(alone - together) <= max(2e-2 * spread, rounding * max(abs(alone), abs(together))):
            raise RewardError(
                f"a reward must not depend on the other samples of a batch or on chance; this one gives {together:.6g} "
                f"to a sample within a batch of {len(r)} and {alone:.6g} to it alone"
            )


def check_labels(y: Tensor | None, n: int) -> None:
    """Refuse labels that are not one for each of n samples."""
    if y is not None and (not isinstance(y, Tensor) or y.shape != (n,)):
        raise ValueError(f"labels y must have shape ({n},), got {tuple(y.shape) if isinstance(y, Tensor) else y!r}")


@contextmanager
def at_step(k: int, total: int, t: float) -> Iterator[None]:
    """Name the step (counted from 1) and its time in a ValueError raised inside, and in a note to any other error."""
    where = f"step {k} of {total}, at t = {t:.4g}"
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    except Exception as error:
        error.add_note(where)
        raise
