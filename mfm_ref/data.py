"""Endless batches whose position can be saved, so that a resumed run sees the data that an unbroken one sees."""

import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any, Generic, Protocol, TypeVar, cast, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from mfm_ref.checks import check_count

Batch = TypeVar("Batch", covariant=True)


@runtime_checkable
class Resumable(Protocol):
    """Data that know their position; what torch.load(weights_only=True) reads is allowed in it."""

    def state_dict(self) -> dict[str, Any]:
        """The position."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go to a position."""
        ...


def is_elastic(data: object) -> bool:
    """Whether data say `elastic = True`, and so promise what lets a run go on with another number of processes.

    At the end of a step their position is the same in every process, and it does not depend on how many there are, nor
    on how many batches of one make a step. And their batches hold all the random numbers that a step needs.

    Raises:
        ValueError: data that say so and do not know their position.
    """
    elastic = getattr(data, "elastic", False) is True
    if elastic and not isinstance(data, Resumable):
        raise ValueError(
            f"elastic data must have state_dict and load_state_dict, {type(data).__name__} has not both of them"
        )
    return elastic


def check_position(position: dict[str, Any]) -> None:
    """Refuse a position that a checkpoint would hold and not give back.

    Raises:
        ValueError: it holds more than tensors, numbers, strings and containers of them.
    """
    file = io.BytesIO()
    torch.save(position, file)
    file.seek(0)
    try:
        torch.load(file, weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"state_dict() of the data must hold tensors and plain values alone, got {position}"
        ) from error


# What the streams of mfm_ref are for, as the third number of their seeds: none is one that `stream_seed(a, b)` gives.
# Of the loss; torch's own source; of TensorBatches; of data without a position; of batches of samples (`collect`).
NOISE, GLOBAL, ORDER, LOADED, COLLECTED = range(5)


def stream_seed(*numbers: int) -> int:
    """One seed from several integers >= 0, such as (seed, rank): other numbers give an unrelated stream."""
    return int(np.random.SeedSequence((len(numbers), *numbers)).generate_state(1, np.uint64)[0])  # (0,) is not (0, 0)


class WithProgress(Generic[Batch]):
    """`(batch, progress)` for each batch, with progress rising from 0 to 1: for a loss that changes on the way.

    `annealed_times(n, progress)` trains short jumps first, for example.

    Args:
        data: an iterator over endless batches that knows its position, as TensorBatches and RandomBatches are.
        total: how many of them the run takes, steps times accumulate, >= 1. Progress is k/(total − 1) at batch k.

    Raises:
        ValueError: anything else as data, or a total below one.
    """

    def __init__(self, data: Iterator[Batch], total: int):
        check_count(total, "total")
        if not (isinstance(data, Resumable) and isinstance(data, Iterator)):
            raise ValueError(
                "WithProgress needs an iterator with state_dict and load_state_dict, "
                f"as TensorBatches is, got {type(data).__name__}"
            )
        self.data, self.total, self.drawn = data, total, 0

    def __iter__(self) -> Iterator[tuple[Batch, float]]:
        """The batches from here on."""
        return self

    def __next__(self) -> tuple[Batch, float]:
        """One batch, and the progress before it."""
        progress = min(self.drawn / max(self.total - 1, 1), 1.0)
        self.drawn += 1
        return next(self.data), progress

    def state_dict(self) -> dict[str, Any]:
        """The position of the data, and the number of batches drawn."""
        return {"data": cast(Resumable, self.data).state_dict(), "drawn": self.drawn}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from such a position."""
        cast(Resumable, self.data).load_state_dict(state_dict["data"])
        self.drawn = state_dict["drawn"]


class RandomBatches(Generic[Batch]):
    """`draw(generator)` again and again: data drawn from a law, or with replacement.

    Args:
        draw: makes one batch from the generator alone.
        generator: the source of randomness; each process needs one with a seed of its own (`stream_seed`).
    """

    def __init__(self, draw: Callable[[torch.Generator], Batch], generator: torch.Generator):
        self.draw, self.generator = draw, generator

    def __iter__(self) -> Iterator[Batch]:
        """The batches from here on."""
        return self

    def __next__(self) -> Batch:
        """One batch."""
        return self.draw(self.generator)

    def state_dict(self) -> dict[str, Any]:
        """The state of the generator."""
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from such a state. Raises ValueError for the position of other data."""
        if state_dict.keys() != {"generator"}:
            raise ValueError(f"the position of RandomBatches must be a generator's state, got {sorted(state_dict)}")
        self.generator.set_state(state_dict["generator"])


class TensorBatches:
    """Rows of tensors in shuffled epochs; each batch is a tuple, one tensor `(batch, ...)` for each of `tensors`.

    The order of an epoch depends on the seed and the epoch alone. Of each joint batch of world · batch rows,
    process `rank` gets its own part; rows at the end of an epoch that fill no joint batch wait for another epoch.

    Args:
        tensors: `(n, ...)` each, with one n.
        batch: rows in a batch of one process, >= 1.
        seed: of the order, >= 0.
        rank, world: this process and the number of processes.

    Raises:
        ValueError: no tensors, tensors of unequal length, fewer rows than a joint batch, numbers out of range.
    """

    def __init__(self, *tensors: Tensor, batch: int, seed: int = 0, rank: int = 0, world: int = 1):
        check_count(batch, "batch")
        check_count(seed, "seed", 0)
        check_count(world, "world")
        check_count(rank, "rank", 0)
        lengths = {len(tensor) for tensor in tensors}
        if len(lengths) != 1:
            raise ValueError(f"tensors must have one length, got {sorted(lengths)}")
        if rank >= world:
            raise ValueError(f"rank must be below world, got {rank} and {world}")
        self.rows = lengths.pop()
        if self.rows < batch * world:
            raise ValueError(f"{world} batches of {batch} need {batch * world} rows at least, got {self.rows}")
        self.tensors, self.batch, self.seed, self.rank, self.world = tensors, batch, seed, rank, world
        self.epoch, self.position = 0, 0
        self._order = self._shuffled()

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        """The batches from here on."""
        return self

    def __next__(self) -> tuple[Tensor, ...]:
        """One batch."""
        if (self.position + 1) * self.batch * self.world > self.rows:
            self._go_to(self.epoch + 1, 0)
        first = (self.position * self.world + self.rank) * self.batch
        self.position += 1
        rows = self._order[first : first + self.batch]
        return tuple(tensor[rows.to(tensor.device)] for tensor in self.tensors)

    def state_dict(self) -> dict[str, Any]:
        """The epoch, and the number of batches drawn from it."""
        return {"epoch": self.epoch, "position": self.position, **self._layout()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from such a position. Raises ValueError for that of other data: rows, batch, seed or world differ."""
        here = {name: state_dict.get(name) for name in self._layout()}
        if here != self._layout():
            raise ValueError(f"the position must be one of data with {self._layout()}, got {here}")
        self._go_to(state_dict["epoch"], state_dict["position"])

    def _layout(self) -> dict[str, int]:
        return {"rows": self.rows, "batch": self.batch, "seed": self.seed, "world": self.world}

    def _go_to(self, epoch: int, position: int) -> None:
        self.epoch, self.position = epoch, position
        self._order = self._shuffled()

    def _shuffled(self) -> Tensor:
        generator = torch.Generator().manual_seed(stream_seed(self.seed, self.epoch, ORDER))
        return torch.randperm(self.rows, generator=generator)
