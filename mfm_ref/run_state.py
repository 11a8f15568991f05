"""The settings of a training run, and its state: all that a checkpoint holds."""

import copy
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from mfm_ref.checkpoints import Checkpoints
from mfm_ref.checks import check_count
from mfm_ref.data import GLOBAL, LOADED, NOISE, Resumable, check_position, is_elastic, stream_seed
from mfm_ref.distributed import gather, on_rank_0
from mfm_ref.sharding import (
    gathered,
    gathered_moments,
    moments_in_pieces,
    norm_of_all,
    piece,
    pieces,
    take_gradients,
)

Model = TypeVar("Model", bound=nn.Module)
Batch = TypeVar("Batch")

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "radam": partial(torch.optim.RAdam, decoupled_weight_decay=True),
}
PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16}
ENGINES = ("ddp", "fsdp")
# Fields that change no number of a run; the engine does by rounding alone.
REPORTING = ("checkpoint_every", "checkpoint_minutes", "log_every", "sample_every", "tensorboard", "engine")


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
    engine: str = "ddp"  # of many processes: ddp, or fsdp, where each holds its piece of every weight (`sharding`)
    seed: int = 0  # of the noise in the loss, >= 0
    checkpoint_every: int = 500  # updates between checkpoints, >= 1; there is one at the end too
    checkpoint_minutes: float = 0.0  # a checkpoint too when the last is older than that; 0 for any age
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
            ("engine", ENGINES),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        try:
            self._check_rates()
        except TypeError as error:
            names = ("lr", "weight_decay", "clip", "decay", "checkpoint_minutes", "betas")
            got = ", ".join(f"{name} = {getattr(self, name)!r}" for name in names)
            raise ValueError(
                f"learning rate, decays and minutes must be numbers, and betas two of them, got {got}"
            ) from error

    def _check_rates(self) -> None:
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr must be positive and finite, got {self.lr}")
        if not (0 <= self.weight_decay < math.inf and 0 <= self.clip < math.inf):
            raise ValueError(f"weight_decay and clip must be >= 0, got {self.weight_decay} and {self.clip}")
        if not 0 <= self.checkpoint_minutes < math.inf:
            raise ValueError(f"checkpoint_minutes must be >= 0 and finite, got {self.checkpoint_minutes}")
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
    """All that changes while a run goes on.

    Args:
        model: gets the weights whole whenever `gather` is called.
        live: what is trained: the model itself, or a copy of it in pieces (`mfm_ref.sharding`).
        config, data: as in `train`.
        device: where `live` is.
        rank: of this process.
    """

    def __init__(
        self, model: Model, live: Model, config: TrainConfig, data: Iterable[Batch], device: torch.device, rank: int
    ):
        torch.manual_seed(stream_seed(config.seed, rank, GLOBAL))
        self.model, self.live, self.config, self.data, self.device, self.rank = model, live, config, data, device, rank
        self.elastic = is_elastic(data)
        self.generator = torch.Generator(device).manual_seed(stream_seed(config.seed, rank, NOISE))
        # torch.compile cannot trace a generator, and elastic data bring all noise with them.
        self.noise = None if config.compile or self.elastic else self.generator
        self.average = copy.deepcopy(model).eval().requires_grad_(False)
        self.weights: list[Tensor] = [*pieces(live)]
        self.means = [piece(m, like) for m, like in zip(self.average.parameters(), live.parameters(), strict=True)]
        self.optimizer = OPTIMIZERS[config.optimizer](
            self.weights, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda k: config.rate(k))
        self.history: list[float] = []
        self.seconds = 0.0
        self.saved = monotonic()
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

    def clip(self) -> Tensor:
        """Shorten the gradient to the config's largest norm; returns the norm that it had."""
        take_gradients(self.weights, self.live)
        norm = nn.utils.get_total_norm([weight.grad for weight in self.weights if weight.grad is not None])
        if self.live is not self.model:
            norm = norm_of_all(norm)
        nn.utils.clip_grads_with_norm_(self.weights, self.config.clip or math.inf, norm)
        return norm

    def update(self, loss: float) -> float:
        """One update of weights and averages by the gradients at hand; returns its learning rate.

        The exponential average keeps min(decay, (1+k)/(10+k)) of itself in update k.
        """
        rate, k = float(self.schedule.get_last_lr()[0]), len(self.history)
        self.optimizer.step()
        self.schedule.step()
        with torch.no_grad():
            torch._foreach_lerp_(self.means, self.weights, 1 - min(self.config.decay, (1 + k) / (10 + k)))
        self.history.append(loss)
        return rate

    @torch.no_grad()
    def gather(self) -> None:
        """Make `model` and `average` whole, in every process. Of buffers the average has the newest."""
        for full, own, like in self._weights_and_means():
            if full is not own:
                full.copy_(gathered(own, like))
        for module in {self.model, self.average} - {self.live}:
            for full, buffer in zip(module.buffers(), self.live.buffers(), strict=True):
                full.copy_(buffer)

    @torch.no_grad()
    def _scatter(self) -> None:
        """The other way: what is trained gets the numbers of `model` and `average`."""
        for full, own, like in self._weights_and_means():
            if full is not own:
                own.copy_(piece(full, like))
        if self.live is not self.model:
            for full, buffer in zip(self.model.buffers(), self.live.buffers(), strict=True):
                buffer.copy_(full)

    def _weights_and_means(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Each parameter of `model` and of `average`, what is trained in its place, and how that is cut."""
        likes = list(self.live.parameters())
        full = [*self.model.parameters(), *self.average.parameters()]
        return zip(full, [*self.weights, *self.means], 2 * likes, strict=True)

    def show(self, callback: Callable[[Model, int], None]) -> None:
        """Let rank 0 call `callback` with the whole average."""
        self.gather()
        on_rank_0(lambda: callback(self.whole_average(), len(self.history)))
        if self.live is not self.model:
            self.average.cpu()

    def whole_average(self) -> Model:
        """The average as `gather` left it, on the device."""
        return self.average if self.live is self.model else self.average.to(self.device)

    def late(self) -> bool:
        """Whether the newest checkpoint, or the start, is older than the config allows."""
        return 0 < self.config.checkpoint_minutes < (monotonic() - self.saved) / 60

    def save(self, store: Checkpoints) -> Path:
        """Write a checkpoint: rank 0 does, with what the others tell it; all fail where it fails."""
        self.gather()
        state: dict[str, Any] = {
            "optimizer": gathered_moments(self.optimizer.state_dict(), self.live, keep=self.rank == 0),
            "schedule": self.schedule.state_dict(),
            "history": torch.tensor(self.history, dtype=torch.float64),
            "seconds": self.seconds,
            "processes": [self._position()] if self.elastic else gather(self._position()),
        }
        on_rank_0(lambda: store.save(len(self.history), self.model, self.average, state))
        self.saved = monotonic()
        return store.path(len(self.history))

    def _position(self) -> dict[str, Any]:
        """Where this process is in its data and its random numbers; elastic data hold the latter."""
        own: dict[str, Any] = {"data": self.data.state_dict()} if isinstance(self.data, Resumable) else {}
        if not self.elastic:
            own |= {"generator": self.generator.get_state(), "torch": torch.get_rng_state()}
            if self.device.type == "cuda":
                own["cuda"] = torch.cuda.get_rng_state(self.device)
        return own

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `save` wrote; `model` and `average` have the weights already."""
        missing = {"optimizer", "schedule", "history", "seconds", "processes"} - state.keys()
        if missing:
            raise ValueError(f"the state in a checkpoint must have {sorted(missing)} too")
        self._scatter()
        self.optimizer.load_state_dict(moments_in_pieces(state["optimizer"], self.live))
        self.schedule.load_state_dict(state["schedule"])
        self.history, self.seconds = state["history"].tolist(), state["seconds"]
        own = state["processes"][0 if self.elastic else self.rank]
        if isinstance(self.data, Resumable) != ("data" in own):
            kinds = ("an iterable without a position", "data that know their position")
            there, here = kinds["data" in own], kinds[isinstance(self.data, Resumable)]
            raise ValueError(f"a run goes on with the data that it began with: {there}; got {here}")
        if isinstance(self.data, Resumable):
            self.data.load_state_dict(own["data"])
        else:
            for _ in range(len(self.history) * self.config.accumulate):
                self.next_batch()
        if self.elastic:
            return
        self.generator.set_state(own["generator"])
        torch.set_rng_state(own["torch"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(own["cuda"], self.device)
