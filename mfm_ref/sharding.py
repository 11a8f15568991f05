"""The engine "fsdp": of every weight, gradient, moment and average a process holds its piece alone (torch's FSDP2).

A unit is gathered whole before it computes, and let go after. A network says by an attribute `shard_units` which of its
modules are units, most often its blocks; each must be called as a module. The rest of the network, all of it where
nothing is said, is gathered for the length of a step.

Forward-mode derivatives through pieces need torch >= 2.13: older versions fail (pytorch#182641, #182661).
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)


def shard_units(model: nn.Module) -> list[nn.Module]:
    """The modules that `shard_units` of the model, and of the modules in it, name; inner ones first."""
    named = [unit for module in model.modules() for unit in getattr(module, "shard_units", ())]
    return list(dict.fromkeys(reversed(named)))


@contextmanager
def copied_to_shard(model: Model) -> Iterator[Model]:
    """A copy of a model, for `shard`. Both get the tensors of rank 0, and the model waits on the CPU until the end.

    There it takes no memory of the device, and its class is what it was: it is the one to fill and to save.
    """
    device = next(model.parameters()).device
    for tensor in (*model.parameters(), *model.buffers()):
        flat = tensor.detach().contiguous()
        dist.broadcast(flat, 0)
        tensor.detach().copy_(flat)
    copied = copy.deepcopy(model)
    model.cpu()
    try:
        yield copied
    finally:
        model.to(device)


def shard(module: nn.Module, units: Iterable[nn.Module], device: torch.device) -> None:
    """Leave this process its pieces of a module's parameters, in place; of `units` one by one, then of all the rest."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard  # takes seconds to import

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for part in (*units, module):
        fully_shard(part, mesh=mesh)


def pieces(model: nn.Module) -> list[nn.Parameter]:
    """The weights as an optimiser takes them: of each the piece in this process, in its memory; itself where whole."""
    held = list(model.parameters())
    return [nn.Parameter(_local(p), requires_grad=p.requires_grad) if _is_cut(p) else p for p in held]


def take_gradients(weights: Sequence[Tensor], model: nn.Module) -> None:
    """Give the pieces the gradients that the engine left at the weights of its model."""
    for weight, held in zip(weights, model.parameters(), strict=True):
        if held.grad is not None and weight is not held:
            weight.grad, held.grad = _local(held.grad), None


def norm_of_all(norm: Tensor) -> Tensor:
    """The norm of a vector, from that of its part in each process."""
    square = norm.double().square()
    dist.all_reduce(square)
    return square.sqrt().to(norm.dtype)


def gathered(own: Tensor, like: Tensor) -> Tensor:
    """A tensor whole, from pieces cut as the weight `like` is, by all together; the tensor itself where it is whole."""
    if not _is_cut(like):
        return own
    from torch.distributed.tensor import DTensor

    cut: Any = like
    return DTensor.from_local(
        own.detach(), cut.device_mesh, cut.placements, run_check=False, shape=cut.shape, stride=cut.stride()
    ).full_tensor()


def piece(full: Tensor, like: Tensor) -> Tensor:
    """The piece of a tensor, the same in every process, cut as the weight `like` is; itself where that is whole."""
    if not _is_cut(like):
        return full
    from torch.distributed.tensor import distribute_tensor

    cut: Any = like
    own = distribute_tensor(full.detach().to(like.device), cut.device_mesh, cut.placements, src_data_rank=None)
    return _local(own).clone()  # a view would keep the whole tensor in memory


def gathered_moments(state: dict[str, Any], model: nn.Module, *, keep: bool) -> dict[str, Any]:
    """The state_dict of the optimiser of `pieces(model)` with whole tensors, those gathered on the CPU, if to keep."""

    def whole(own: Tensor, like: Tensor) -> Tensor | None:
        full = gathered(own, like)
        return full if full is own else full.cpu() if keep else None

    return _moments(whole, state, model)


def moments_in_pieces(state: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """The other way, for load_state_dict."""
    return _moments(piece, state, model)


def _moments(change: Callable[[Tensor, Tensor], Any], state: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    weights = list(model.parameters())

    def changed(value: Any, like: Tensor) -> Any:
        return change(value, like) if isinstance(value, Tensor) and value.ndim else value  # not a count of steps

    moments = {k: {name: changed(v, weights[k]) for name, v in of_one.items()} for k, of_one in state["state"].items()}
    return {**state, "state": moments}


def _is_cut(tensor: Tensor) -> bool:
    """Whether it is a DTensor, told without the import that it takes."""
    return hasattr(tensor, "full_tensor")


def _local(tensor: Any) -> Tensor:
    return tensor.detach().to_local()
