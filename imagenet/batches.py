"""The batches of a training run: one global order of images, and one generator for each image of each step.

Neither depends on how a global batch is cut, so that a run may go on with another number of processes or another
micro-batch, and sees what it would have seen.
"""

import functools
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Self

import torch

from imagenet.latents import GivenLatents, Latents
from mfm_ref.checks import check_count
from mfm_ref.data import ORDER, stream_seed
from mfm_ref.paper_recipe import PaperRows, RowLaw, draw_rows

ROWS = 110  # what a generator of an image in a step is for; see imagenet.run
AHEAD = 2  # micro-batches that a thread of its own prepares


class GlobalBatches:
    """Endless rows of `mfm_ref.paper_recipe.draw_rows` for the images of this process, micro-batch by micro-batch.

    Images come in shuffled epochs, one after the other: place `batch · k + i` of the endless order is image i of step
    k, and its mirroring, noise, times and label drop are by the generator of (seed, k, i). Process r has in
    micro-batch j of a step the images from (j · world + r) · micro on. Batches are prepared in a thread, which ends
    with `close` or a `with` block and reads no file after it; the position is that of the batches that were taken.

    Args:
        latents: the data.
        batch: images of a step, in all processes together, >= 1.
        micro: images that pass through the network at once, in this process.
        law: of the rows.
        seed: of order and chance, >= 0.
        rank, world: this process and the number of processes.
        device: where the rows go.

    Attributes:
        elastic: their position is the same in all processes, and no number of a step is drawn elsewhere.
        accumulate: micro-batches of a step in one process.

    Raises:
        ValueError: counts out of range, or a batch that is no multiple of world · micro; from `next`, latents that are
            not finite, with the file that holds them.
    """

    elastic = True

    def __init__(
        self,
        latents: Latents | GivenLatents,
        batch: int,
        *,
        micro: int,
        law: RowLaw,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        device: torch.device | str = "cpu",
    ):
        law.check()
        self.latents, self.batch, self.micro, self.law, self.seed = latents, batch, micro, law, seed
        self.accumulate = parts_of_a_step(batch, micro, world)
        if not 0 <= rank < world:
            raise ValueError(f"rank must be from 0 to {world - 1}, got {rank}")
        check_count(seed, "seed", 0)
        self.rank, self.world, self.device, self.taken = rank, world, torch.device(device), 0
        self._order = functools.lru_cache(maxsize=2)(self._shuffled)
        self._ahead: deque[Future[tuple[PaperRows, int]]] = deque()
        self._thread: ThreadPoolExecutor | None = None

    def __iter__(self) -> Iterator[tuple[PaperRows, int]]:
        """The batches from here on."""
        return self

    def __next__(self) -> tuple[PaperRows, int]:
        """Rows, on the device, and how many of them are the diagonal's."""
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "latents")
        while len(self._ahead) <= AHEAD:
            self._ahead.append(self._thread.submit(self.made, self.taken + len(self._ahead)))
        rows, diagonal = self._ahead.popleft().result()
        self.taken += 1
        return PaperRows(*(a.to(self.device) for a in rows)), diagonal

    def close(self) -> None:
        """End the thread, and wait until it has: batches ahead are dropped. `next` would start another."""
        self._ahead.clear()
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)
            self._thread = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def made(self, number: int) -> tuple[PaperRows, int]:
        """The rows of micro-batch `number` of this process, counted from the run's start, on the CPU."""
        step, part = divmod(number, self.accumulate)
        first = (part * self.world + self.rank) * self.micro
        places = range(first, first + self.micro)
        generators = [torch.Generator().manual_seed(stream_seed(self.seed, step, i, ROWS)) for i in places]
        images = torch.tensor([self.image(step, i) for i in places])
        x1 = self.latents.draw(images, generators)
        return draw_rows(self.law, x1, self.latents.labels[images], generators)

    def image(self, step: int, i: int) -> int:
        """Which image has place i of a step."""
        epoch, place = divmod(step * self.batch + i, self.latents.n)
        return int(self._order(epoch)[place])

    def state_dict(self) -> dict[str, Any]:
        """The position: the steps that were taken; the same in all processes.

        Raises:
            ValueError: in the middle of a step.
        """
        step, part = divmod(self.taken, self.accumulate)
        if part:
            raise ValueError(f"a position is one between steps, got {part} of {self.accumulate} micro-batches of one")
        return {"step": step, **self._layout()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go to a position. Raises ValueError for that of other data: latents, global batch or seed differ."""
        here = {name: state_dict.get(name) for name in self._layout()}
        if here != self._layout():
            raise ValueError(f"the position must be one of data with {self._layout()}, got {here}")
        self._ahead.clear()
        self.taken = int(state_dict["step"]) * self.accumulate

    def _layout(self) -> dict[str, Any]:
        return {"batch": self.batch, "seed": self.seed, "latents": self.latents.sha256}

    def _shuffled(self, epoch: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(stream_seed(self.seed, epoch, ORDER))
        return torch.randperm(self.latents.n, generator=generator)


def parts_of_a_step(batch: int, micro: int, world: int) -> int:
    """Micro-batches of a step in one process. Raises ValueError where a global batch is no whole number of them."""
    for name, count in (("batch", batch), ("micro", micro), ("world", world)):
        check_count(count, name)
    if batch % (micro * world):
        raise ValueError(
            f"the global batch must be a multiple of micro times the number of processes, {micro} · {world}, "
            f"got {batch}"
        )
    return batch // (micro * world)
