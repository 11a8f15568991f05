"""The settings of a training run, and its state: all that a checkpoint holds."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from mfm_ref.checkpoints import Checkpoints
from mfm_ref.checks import check_count
from mfm_ref.data import GLOBAL, LOADED, NOISE, Resumable, check_position, stream_seed
from mfm_ref.distributed import gather

Model = TypeVar("Model", bound=nn.Module)
Batch = TypeVar("Batch")

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "radam": partial(torch.optim.RAdam, decoupled_weight_decay=True),
}
PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16}
REPORTING = ("checkpoint_every", "log_every", "sample_every", "tensorboard")  # fields that change no number of a run


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Settings of one run. A run goes on only with the settings that it began with, those of REPORTING excepted."""

    steps: int  # updates, >= 1
    lr: float = 2e-3  # learning rate that the warm-up and the schedule multiply, > 0
    optimizer: str = "adam"  # adam, adamw or radam; the last two decouple the weight decay from the gradient
    betas: tuple[float, float] = (0.9, 0.999)  # decay rates of the optimiser's moments, in [0, 1)
    weight_decay: float = 0.0  # >= 0
    schedule: str = "cosine"  # or constant; the cosine falls from 1 at update 0 towards 0 after the last
    warmup: int = 100  # updates over which a factor beside the schedule's rises linearly to 1, >= 0
    clip: float = 1.0  # largest norm of the gradient; 0 for any
    decay: float = 0.999  # of the averaged weights, in [0, 1); update k uses min(decay, (1+k)/(10+k))
    accumulate: int = 1  # batches to an update, >= 1
    precision: str = "float32"  # float32 or bfloat16, the latter by autocast: weights and their update stay as they are
    compile: str = ""  # backend of torch.compile (inductor, aot_eager); none where empty
    seed: int = 0  # of the noise in the loss, >= 0
    checkpoint_every: int = 500  # updates between checkpoints, >= 1; there is one at the end too
    log_every: int = 50  # steps between lines of metrics.jsonl, >= 1
    sample_every: int = 0  # updates between calls of the callback; 0 for none
    tensorboard: bool = False  # events beside metrics.jsonl

    def __post_init__(self) -> None:
        """Refuse what is out of range with ValueError."""
        for name in ("steps", "accumulate", "checkpoint_every", "log_every"):
            check_count(getattr(self, name), name)
        for name in ("warmup", "seed", "sample_every"):
            check_count(getattr(self, name), name, 0)
        if not isinstance(self.compile, str):
            raise ValueError(f"compile must be the name of a backend, or empty, got {self.compile!r}")
        for name, allowed in (
            ("optimizer", OPTIMIZERS),
            ("schedule", ("cosine", "constant")),
            ("precision", PRECISIONS),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        try:
            self._check_rates()
        except TypeError as error:
            names = ("lr", "weight_decay", "clip", "decay", "betas")
            got = ", ".join(f"{name} = {getattr(self, name)!r}" for name in names)
            raise ValueError(f"learning rate and decays must be numbers, and betas two of them, got {got}") from error

    def _check_rates(self) -> None:
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr must be positive and finite, got {self.lr}")
        if not (0 <= self.weight_decay < math.inf and 0 <= self.clip < math.inf):
            raise ValueError(f"weight_decay and clip must be >= 0, got {self.weight_decay} and {self.clip}")
        if len(self.betas) != 2 or not all(0 <= rate < 1 for rate in (*self.betas, self.decay)):
            raise ValueError(f"betas (two) and decay must lie in [0, 1), got {self.betas} and {self.decay}")

    def identity(self) -> dict[str, Any]:
        """The fields that say which run this is."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in REPORTING}

    def rate(self, k: int) -> float:
        """Learning rate of update k = 0, 1, …, as a multiple of `lr`: min(1, (k+1)/warmup) (1 + cos(πk/steps))/2.

        With the constant schedule it is the first factor alone.
        """
        rise = min(1.0, (k + 1) / max(self.warmup, 1))
        return rise * ((1 + math.cos(math.pi * k / self.steps)) / 2 if self.schedule == "cosine" else 1.0)


class Run(Generic[Model, Batch]):
    """All that changes while a run goes on, apart from the model itself."""

    def __init__(self, model: Model, config: TrainConfig, data: Iterable[Batch], device: torch.device, rank: int):
        torch.manual_seed(stream_seed(config.seed, rank, GLOBAL))
        self.config, self.data, self.device, self.rank = config, data, device, rank
        self.generator = torch.Generator(device).manual_seed(stream_seed(config.seed, rank, NOISE))
        self.noise = None if config.compile else self.generator  # torch.compile cannot trace a generator
        self.optimizer = OPTIMIZERS[config.optimizer](
            model.parameters(), lr=config.lr, betas=config.betas, weight_decay=config.weight_decay
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda k: config.rate(k))
        self.averaging = _average_of(model, config.decay)
        self.average = cast(Model, self.averaging.module)
        self.history: list[float] = []
        self.seconds = 0.0
        if isinstance(data, Resumable):
            check_position(data.state_dict())
        self.batches: Iterator[Batch] | None = None
        self.loaded = torch.Generator().manual_seed(stream_seed(config.seed, rank, LOADED)).get_state()

    def next_batch(self) -> Batch:
        """One batch."""
        with nullcontext() if isinstance(self.data, Resumable) else self._random_of_data():
            if self.batches is None:  # not before a position is restored
                self.batches = iter(self.data)
            try:
                return next(self.batches)
            except StopIteration:
                need = self.config.steps * self.config.accumulate
                raise ValueError(f"data must yield {need} batches, they ended before") from None

    @contextmanager
    def _random_of_data(self) -> Iterator[None]:
        """Torch's own source of the CPU is that of the data alone: drawn again from the start, they are the same."""
        others = torch.get_rng_state()
        torch.set_rng_state(self.loaded)
        try:
            yield
        finally:
            self.loaded = torch.get_rng_state()
            torch.set_rng_state(others)

    def update(self, model: Model, loss: float) -> float:
        """One update of weights and averages by the gradients at hand; returns its learning rate."""
        rate = float(self.schedule.get_last_lr()[0])
        self.optimizer.step()
        self.schedule.step()
        self.averaging.update_parameters(model)
        self.history.append(loss)
        return rate

    def save(self, store: Checkpoints, model: Model) -> Path:
        """Write a checkpoint: rank 0 does, with what the others tell it."""
        own: dict[str, Any] = {"generator": self.generator.get_state(), "torch": torch.get_rng_state()}
        if self.device.type == "cuda":
            own["cuda"] = torch.cuda.get_rng_state(self.device)
        if isinstance(self.data, Resumable):
            own["data"] = self.data.state_dict()
        state: dict[str, Any] = {
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "history": torch.tensor(self.history, dtype=torch.float64),
            "seconds": self.seconds,
            "processes": gather(own),
        }
        if self.rank == 0:
            store.save(len(self.history), model, self.average, state)
        return store.path(len(self.history))

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `save` wrote, weights excepted."""
        missing = {"optimizer", "schedule", "history", "seconds", "processes"} - state.keys()
        if missing:
            raise ValueError(f"the state in a checkpoint must have {sorted(missing)} too")
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.history, self.seconds = state["history"].tolist(), state["seconds"]
        self.averaging.n_averaged.fill_(1 + len(self.history))
        own = state["processes"][self.rank]
        if isinstance(self.data, Resumable) != ("data" in own):
            kinds = ("an iterable without a position", "data that know their position")
            there, here = kinds["data" in own], kinds[isinstance(self.data, Resumable)]
            raise ValueError(f"a run goes on with the data that it began with: {there}; got {here}")
        if isinstance(self.data, Resumable):
            self.data.load_state_dict(own["data"])
        else:
            for _ in range(len(self.history) * self.config.accumulate):
                self.next_batch()
        self.generator.set_state(own["generator"])
        torch.set_rng_state(own["torch"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(own["cuda"], self.device)


def _average_of(model: nn.Module, decay: float) -> AveragedModel:
    """The exponential average: update k keeps min(decay, (1+k)/(10+k)) of it. Buffers are copied."""

    def update(means: Any, weights: Any, _: Any) -> None:  # the count in `_` may lie on a GPU, where reading it waits
        k = int(averaging.n_averaged) - 1
        torch._foreach_lerp_(means, weights, 1 - min(decay, (1 + k) / (10 + k)))

    averaging = AveragedModel(model, multi_avg_fn=torch.no_grad()(update))
    averaging.n_averaged.fill_(1)  # at 0, the first update would take the weights whole
    averaging.module.eval().requires_grad_(False)
    return averaging
