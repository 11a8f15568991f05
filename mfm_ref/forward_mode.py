"""Forward-mode derivatives at the price of two to three forward passes, for networks of linear layers.

Where an operation has a tensor with a tangent and one without, torch's own rules give the other a tangent of zeros,
multiply by it and add the product: a linear layer then takes three products of matrices instead of two, and a pass
through a network four to six times a forward pass. The rules here leave those terms out, and change nothing else.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.forward_ad import dual_level
from torch.nn.functional import layer_norm, linear
from torch.overrides import TorchFunctionMode


def derivative(f: Callable[..., Tensor], at: tuple[Tensor, ...], along: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """f at a point, and its directional derivative there, by one forward-mode pass.

    Args:
        f: function of tensors that returns one tensor.
        at: its arguments.
        along: the direction, of the same shapes.
    """
    # Copies: neither an expanded tensor, such as a time () given to every row, nor in a compiled graph a view can
    # carry a tangent.
    at, along = (tuple(a.clone(memory_format=torch.contiguous_format) for a in group) for group in (at, along))
    if torch.compiler.is_compiling():  # compilers drop what is zero
        value, slope = torch.func.jvp(f, at, along)[:2]
        return value, slope
    # A function that is compiled inside a derivative would lose its tangents without a word: it runs eager here.
    with torch.compiler.set_stance("force_eager"), dual_level():
        arguments = [_join(a, tangent) for a, tangent in zip(at, along, strict=True)]
        with SkipZeroTangents():
            result = f(*arguments)
        value, slope = _split(result)
        return value, torch.zeros_like(value) if slope is None else slope


def differentiating() -> bool:
    """Whether a forward-mode derivative is being taken: within `derivative`, `torch.func.jvp` or a `dual_level`.

    For networks with operations that have none, as torch's fused attention, and another way to compute the same.
    """
    return forward_ad._current_level >= 0


class SkipZeroTangents(TorchFunctionMode):
    """Within it, an operation on one operand with a tangent and one without goes by the rules below."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call `func(a, b, …)` by its rule, or as torch does where it has none or there is no tangent to skip."""
        first = FIRST.get(func)
        if first is None or (kwargs and func is not layer_norm):
            return func(*args, **(kwargs or {}))
        kwargs = kwargs or {}
        a, b, *others = args
        (a, da), (b, db) = _split(a), _split(b)
        if (da is None) is (db is None) or any(_split(c)[1] is not None for c in (*others, *kwargs.values())):
            return func(*args, **kwargs)
        if db is None:
            return _join(*first(a, da, *args[1:], **kwargs))
        second = SECOND.get(func)
        return func(*args, **kwargs) if second is None else _join(*second(a, b, db))


# torch.autograd.forward_ad's make_dual and unpack_dual, less their search for a graph that is being exported, which
# takes longer than a small operation. Level 0 is the one that exists: torch refuses to nest them.
def _split(a: Any) -> tuple[Any, Tensor | None]:
    return torch._VF._unpack_dual(a, level=0) if isinstance(a, Tensor) else (a, None)


def _join(value: Tensor, tangent: Tensor) -> Tensor:
    if tangent.shape != value.shape or tangent.dtype != value.dtype:
        tangent = tangent.to(value.dtype).expand(value.shape)
    return torch._VF._make_dual(value, tangent, level=0)


def _layer_norm(
    a: Tensor,
    da: Tensor,
    shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """The derivative of (a − mean)/√(variance + eps) is a symmetric matrix: torch's backward kernel applies it."""
    if weight is not None:  # under autocast they differ
        a, da = a.to(weight.dtype), da.to(weight.dtype)
    h, mean, rate = torch.native_layer_norm(a, shape, weight, bias, eps)
    backward = torch.ops.aten.native_layer_norm_backward
    dh = backward(da.contiguous(), a, shape, mean, rate, None, None, (True, False, False))[0]
    return h, dh if weight is None else dh * weight


# Value and tangent of an operation, where only its first operand has a tangent, and where only its second has. Each
# tangent is a tensor of its own: an operation in place on the result must not reach the operand's.
FIRST: dict[Any, Callable[..., tuple[Tensor, Tensor]]] = {
    linear: lambda a, da, weight, bias=None: (linear(a, weight, bias), linear(da, weight)),
    layer_norm: _layer_norm,
    Tensor.matmul: lambda a, da, b: (a @ b, da @ b),
    Tensor.mul: lambda a, da, b: (a * b, da * b),
    Tensor.div: lambda a, da, b: (a / b, da / b),
    Tensor.add: lambda a, da, b: (a + b, da.clone()),
    Tensor.sub: lambda a, da, b: (a - b, da.clone()),
    Tensor.__rsub__: lambda a, da, b: (b - a, -da),
}
SECOND: dict[Any, Callable[..., tuple[Tensor, Tensor]]] = {
    Tensor.matmul: lambda a, b, db: (a @ b, a @ db),
    Tensor.mul: lambda a, b, db: (a * b, a * db),
    Tensor.div: lambda a, b, db: (a / b, -a / b**2 * db),
    Tensor.add: lambda a, b, db: (a + b, db.clone()),
    Tensor.sub: lambda a, b, db: (a - b, -db),
}
for name in ("matmul", "mul", "div", "add", "sub"):  # as functions, too
    method, function = getattr(Tensor, name), getattr(torch, name)
    FIRST[function], SECOND[function] = FIRST[method], SECOND[method]
