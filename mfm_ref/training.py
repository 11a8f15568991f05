"""The trainer: steps over (model, loss, data, config), on one process or many, that cannot lose its work.

`train` reads from top to bottom. Its loss is any function `loss(model, batch, generator)`; networks, data and losses
know nothing of averages, checkpoints or processes.
"""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from mfm_ref.checkpoints import Checkpoints
from mfm_ref.data import is_elastic
from mfm_ref.distributed import gather, grouped, mean_over_processes, on_rank_0, rank_and_world
from mfm_ref.pretrained import describe
from mfm_ref.run_state import PRECISIONS, Batch, Model, Run, TrainConfig
from mfm_ref.runlog import RunLog
from mfm_ref.sharding import copied_to_shard, shard, shard_units


class Watched(NamedTuple):
    """A loss, and numbers that are logged beside it and not minimised."""

    terms: Tensor | dict[str, Tensor]  # as of a loss that watches nothing
    watched: dict[str, Tensor]  # (2,) each: a sum over rows, and the number of these rows, which may be 0


Loss = Callable[[Model, Batch, torch.Generator | None], Tensor | dict[str, Tensor] | Watched]


def train(
    model: Model,
    loss: Loss[Model, Batch],
    data: Iterable[Batch],
    config: TrainConfig,
    *,
    folder: Path | str | None = None,
    tag: str = "",
    callback: Callable[[Model, int], None] | None = None,
    progress: str | None = None,
) -> tuple[Model, list[float]]:
    """Minimise the mean of `loss` over batches, and average the weights on the way.

    Under torchrun (within `mfm_ref.distributed.processes`) each process has its own data and noise, and the update
    is that of one process on the joined batch; rank 0 writes the files, and what fails there fails in all.

    Args:
        model: trained in place, on the device where it is. With the engine "fsdp" it is a copy that is trained, in
            pieces, and the model gets its weights at the end: a loss must use the model that it is given.
        loss: `loss(model, batch, generator) -> ()`, or a dictionary of named terms `()` whose sum is minimised, or
            `Watched`, which adds numbers for the log. All its noise comes from the generator, seeded by config.seed
            and the rank. With config.compile this is None, torch's own source, seeded alike: torch.compile cannot
            trace a generator. With elastic data it is None, too.
        data: endless batches of any type, on the model's device. If it has `state_dict` and `load_state_dict`
            (`mfm_ref.data`), a resumed run goes on from the saved position, else it begins anew and skips what the
            run had seen: the caller passes the same data again, from their start. What these draw from torch's own
            source on the CPU they draw from a stream of their own. With data that say `elastic = True`
            (`mfm_ref.data.is_elastic`) a run may go on with another number of processes and another accumulate.
        config: the settings.
        folder: of metrics.jsonl and checkpoints, seen by all processes; None to write nothing. If it holds a
            checkpoint, the run goes on from the newest, on one CPU to the same numbers, bit for bit, as one that was
            never stopped. SIGTERM then writes a checkpoint and ends the program with code 0.
        tag: says which run a checkpoint belongs to, beyond the config.
        callback: `callback(average, k)` after k updates, every config.sample_every, on rank 0; draws pictures, say.
        progress: label of a progress bar that shows the loss; none where None.

    Returns:
        the averaged model, in eval mode and without gradients, and the loss of each step.

    Raises:
        ValueError: a model without a parameter that requires a gradient; a callback without config.sample_every, or
            TensorBoard without a folder; elastic data without a position; data that end too early; a checkpoint that
            is damaged or of another run, model or kind of data; with a folder, a network whose config JSON would
            change; with its step and the last good checkpoint, a term of the loss or a gradient that is not finite, or
            a ValueError of the loss's own.
        OSError: a checkpoint that could not be written; the one before it is as it was.
    """
    if config.tensorboard and folder is None:
        raise ValueError("tensorboard needs a folder")
    if callback is not None and not config.sample_every:
        raise ValueError("a callback needs sample_every >= 1 in the config, got 0")
    if folder is not None:
        folder = Path(folder)
        describe(model)  # else the first checkpoint would refuse its config
    rank, world = rank_and_world()
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError(
            "a model needs a parameter that requires a gradient, got none; what train returns has none: "
            "go on with model.requires_grad_().train()"
        )
    device = next(model.parameters()).device
    store = None if folder is None else Checkpoints(folder, _identity(tag, world, device, config, is_elastic(data)))
    with ExitStack() as stack:
        stack.enter_context(_random_kept(device))
        stop = stack.enter_context(_terminated()) if store else threading.Event()
        if config.compile:
            stack.enter_context(torch._dynamo.config.patch(optimize_ddp=False))  # it cannot split forward derivatives
        sharded = config.engine == "fsdp" and grouped()
        live = stack.enter_context(copied_to_shard(model)) if sharded else model
        module = _joined(_LossModule(live, loss, PRECISIONS[config.precision], cached=not sharded), config, device)
        run = Run(model, live, config, data, device, rank)
        newest = gather(store.newest())[0] if store else None
        if store and newest:
            run.restore(store.load(newest, model, run.average))
        writes = partial(RunLog, folder, len(run.history), tensorboard=config.tensorboard)
        log = on_rank_0(writes) or RunLog(None, 0)
        stack.callback(log.close)
        first, hidden = len(run.history), progress is None or rank > 0
        bar = tqdm(total=config.steps, initial=first, desc=progress, disable=hidden, leave=False)
        stack.enter_context(bar)
        for k in range(first, config.steps):
            began = time.perf_counter()
            try:
                terms, watched = _backward(module, run)
            except ValueError as error:
                raise ValueError(f"at step {k}: {error}; the last good checkpoint is {newest}") from error
            numbers, seen, (stopped, late) = _read(terms, watched, run.clip(), (stop.is_set(), run.late()))
            _check_finite(numbers, k, newest)
            rate = run.update(math.fsum(numbers[name] for name in terms))
            run.seconds += time.perf_counter() - began
            last = k + 1 == config.steps
            if k % config.log_every == 0 or last:
                line = {"step": k, **numbers, **seen, "loss": run.history[-1], "lr": rate, "seconds": run.seconds}
                on_rank_0(partial(log.write, line))
                bar.set_postfix(loss=f"{run.history[-1]:.4f}")
            bar.update()
            if store and (stopped or late or (k + 1) % config.checkpoint_every == 0 or last):
                newest = run.save(store)
            if callback and (k + 1) % config.sample_every == 0:
                with _random_kept(device):
                    run.show(callback)
            if stopped:
                raise SystemExit(0)
        run.gather()
    return run.whole_average(), run.history


def _identity(tag: str, world: int, device: torch.device, config: TrainConfig, elastic: bool) -> dict[str, Any]:
    """What must be the same for a run to go on."""
    settings = config.identity()
    if elastic:
        del settings["accumulate"]
        return {"tag": tag, "data": "elastic", "device": device.type, "config": settings}
    return {"tag": tag, "world": world, "device": device.type, "config": settings}


class _LossModule(nn.Module):
    """The loss as a module: the engines and torch.compile then see one call a batch.

    Args:
        model, loss: as in `train`.
        precision: of autocast; none where None.
        cached: whether autocast may keep the weights that it has rounded. Of those that are let go between two calls of
            a module it may not: the second call's gradient would go to the first call's weights, and be lost.
    """

    def __init__(self, model: nn.Module, loss: Loss[Any, Any], precision: torch.dtype | None, *, cached: bool):
        super().__init__()
        self.model, self.loss, self.precision, self.cached = model, loss, precision, cached
        self.device_type = next(model.parameters()).device.type

    def forward(self, batch: Any, generator: torch.Generator | None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        kind, precision = self.device_type, self.precision
        with torch.autocast(kind, precision, cache_enabled=self.cached) if precision else nullcontext():
            value = self.loss(self.model, batch, generator)
        terms, watched = value if isinstance(value, Watched) else (value, {})
        return terms if isinstance(terms, dict) else {"loss": terms}, watched


def _joined(module: nn.Module, config: TrainConfig, device: torch.device) -> nn.Module:
    """The loss, compiled where asked for, as that of all processes: by the engine, where there are others."""
    if config.compile:
        # Forward alone: the hooks around it, of an engine, are not to be traced. Fixed sizes, as torch.rand with a
        # generator needs them.
        module.forward = torch.compile(module.forward, backend=config.compile, dynamic=False)
    if config.engine == "fsdp" and grouped():  # to gather units within a compiled loss would cut its graph
        shard(module, () if config.compile else shard_units(module), device)
    elif rank_and_world()[1] > 1:
        module = DistributedDataParallel(module, forward_sync_buffers=False)  # all begin with the tensors of rank 0
    return module


def _backward(module: nn.Module, run: Run[Any, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Gradients of one update, the mean over its batches; returns the terms of the loss, likewise, and sums watched."""
    run.optimizer.zero_grad()
    means: dict[str, Tensor] = {}
    sums: dict[str, Tensor] = {}
    n = run.config.accumulate
    for part in range(1, n + 1):
        with _exchanging(module, part == n):  # gradients are exchanged once, at the end
            terms, watched = module(run.next_batch(), run.noise)
            _check_terms(terms, watched)
            (torch.stack(list(terms.values())).sum() / n).backward()
        for name, term in terms.items():
            means[name] = term.detach() / n + means.get(name, 0.0)
        for name, pair in watched.items():
            sums[name] = pair.detach() + sums.get(name, 0.0)
    return means, sums


def _exchanging(module: nn.Module, now: bool) -> AbstractContextManager[None]:
    """Whether a backward pass within adds up the gradients of all processes, or keeps its own for a later one."""
    if isinstance(module, DistributedDataParallel) and not now:
        return module.no_sync()
    if hasattr(module, "set_requires_gradient_sync"):
        module.set_requires_gradient_sync(now)  # type: ignore[operator]
    return nullcontext()


def _check_terms(terms: dict[str, Tensor], watched: dict[str, Tensor]) -> None:
    if not terms:
        raise ValueError("a loss must have at least one term")
    reserved = {"step", "gradient_norm", "lr", "seconds"} | ({"loss"} if len(terms) > 1 else set())
    for name, term in terms.items():
        if name in reserved or _shape(term) != ():
            raise ValueError(
                f"terms of a loss must be () and have names outside {sorted(reserved)}, got {name}: {_shape(term)}"
            )
    reserved |= {"loss", *terms}
    for name, pair in watched.items():
        if name in reserved or _shape(pair) != (2,):
            raise ValueError(
                f"what is watched must be (2,) and have names outside {sorted(reserved)}, got {name}: {_shape(pair)}"
            )


def _shape(term: Any) -> tuple[int, ...] | str:
    return tuple(term.shape) if isinstance(term, Tensor) else type(term).__name__


def _read(
    terms: dict[str, Tensor], watched: dict[str, Tensor], norm: Tensor, flags: tuple[bool, ...]
) -> tuple[dict[str, float], dict[str, float], list[bool]]:
    """The terms with the norm, the means watched, and the flags, all at once: one wait for the device a step.

    With several processes all are means over them, so that all see the same numbers, save and stop together: a flag is
    up where it is in any. A number that no row had is left out.
    """
    pairs = [number for pair in watched.values() for number in pair.unbind()]
    raised = torch.tensor([float(flag) for flag in flags], device=norm.device)
    values = iter(mean_over_processes(torch.stack([*terms.values(), norm, *pairs, *raised.unbind()])).tolist())
    numbers = {name: next(values) for name in (*terms, "gradient_norm")}
    sums = {name: (next(values), next(values)) for name in watched}
    seen = {name: total / rows for name, (total, rows) in sums.items() if rows}
    return numbers, seen, [flag > 0 for flag in values]


def _check_finite(numbers: dict[str, float], k: int, newest: Path | None) -> None:
    for name, value in numbers.items():
        if not math.isfinite(value):
            what = {"loss": "the loss", "gradient_norm": "the gradient's norm"}.get(
                name, f"the term {name} of the loss"
            )
            raise ValueError(f"{what} at step {k} must be finite, got {value}; the last good checkpoint is {newest}")


@contextmanager
def _terminated() -> Iterator[threading.Event]:
    """An event that SIGTERM sets instead of ending the program; only a main thread can watch for it."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = signal.signal(signal.SIGTERM, lambda *_: stop.set())
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
    if stop.is_set():  # it came after the last step
        raise SystemExit(0)


def _random_kept(device: torch.device) -> AbstractContextManager[None]:
    """Puts torch's own random source back as it was."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])
