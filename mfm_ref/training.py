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
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from mfm_ref.checkpoints import Checkpoints
from mfm_ref.distributed import mean_over_processes, rank_and_world
from mfm_ref.pretrained import describe
from mfm_ref.run_state import PRECISIONS, Batch, Model, Run, TrainConfig
from mfm_ref.runlog import RunLog

Loss = Callable[[Model, Batch, torch.Generator | None], Tensor | dict[str, Tensor]]


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
    is that of one process on the joined batch; rank 0 writes the files.

    Args:
        model: trained in place, on the device where it is.
        loss: `loss(model, batch, generator) -> ()`, or a dictionary of named terms `()` whose sum is minimised. All
            its noise comes from the generator, seeded by config.seed and the rank. With config.compile this is None,
            torch's own source, seeded alike: torch.compile cannot trace a generator.
        data: endless batches of any type, on the model's device. If it has `state_dict` and `load_state_dict`
            (`mfm_ref.data`), a resumed run goes on from the saved position, else it begins anew and skips what the
            run had seen: the caller passes the same data again, from their start. What these draw from torch's own
            source on the CPU they draw from a stream of their own.
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
            TensorBoard without a folder; data that end too early; a checkpoint that is damaged or of another run, model
            or kind of data; with a folder, a network whose config JSON would change; with its step and the last good
            checkpoint, a term of the loss or a gradient that is not finite, or a ValueError of the loss's own.
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
    identity = {"tag": tag, "world": world, "device": device.type, "config": config.identity()}
    store = None if folder is None else Checkpoints(folder, identity)
    with ExitStack() as stack:
        stack.enter_context(_random_kept(device))
        stop = stack.enter_context(_terminated()) if store else threading.Event()
        module: nn.Module = _LossModule(model, loss, PRECISIONS[config.precision])
        if config.compile:
            stack.enter_context(torch._dynamo.config.patch(optimize_ddp=False))  # it cannot split forward derivatives
            module.compile(backend=config.compile, dynamic=False)  # torch.rand with a generator needs fixed sizes
        if world > 1:
            module = DistributedDataParallel(module, forward_sync_buffers=False)  # all begin with the tensors of rank 0
        run = Run(model, config, data, device, rank)
        newest = store.newest() if store else None
        if store and newest:
            run.restore(store.load(newest, model, run.average))
        log = RunLog(folder if rank == 0 else None, len(run.history), tensorboard=config.tensorboard)
        stack.callback(log.close)
        first, hidden = len(run.history), progress is None or rank > 0
        bar = tqdm(total=config.steps, initial=first, desc=progress, disable=hidden, leave=False)
        stack.enter_context(bar)
        for k in range(first, config.steps):
            began = time.perf_counter()
            try:
                terms = _backward(module, run)
            except ValueError as error:
                raise ValueError(f"at step {k}: {error}; the last good checkpoint is {newest}") from error
            norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip or math.inf)
            numbers, stopped = _read(terms, norm, stop.is_set())
            _check_finite(numbers, k, newest)
            rate = run.update(model, math.fsum(numbers[name] for name in terms))
            run.seconds += time.perf_counter() - began
            if k % config.log_every == 0 or k + 1 == config.steps:
                log.write({"step": k, **numbers, "loss": run.history[-1], "lr": rate, "seconds": run.seconds})
                bar.set_postfix(loss=f"{run.history[-1]:.4f}")
            bar.update()
            if store and (stopped or (k + 1) % config.checkpoint_every == 0 or k + 1 == config.steps):
                newest = run.save(store, model)
            if callback and rank == 0 and (k + 1) % config.sample_every == 0:
                with _random_kept(device):
                    callback(run.average, k + 1)
            if stopped:
                raise SystemExit(0)
    return run.average, run.history


class _LossModule(nn.Module):
    """The loss as a module: DistributedDataParallel and torch.compile then see one call a batch."""

    def __init__(self, model: nn.Module, loss: Loss[Any, Any], precision: torch.dtype | None):
        super().__init__()
        self.model, self.loss, self.precision = model, loss, precision
        self.device_type = next(model.parameters()).device.type

    def forward(self, batch: Any, generator: torch.Generator | None) -> dict[str, Tensor]:
        with torch.autocast(self.device_type, self.precision) if self.precision else nullcontext():
            value = self.loss(self.model, batch, generator)
        return value if isinstance(value, dict) else {"loss": value}


def _backward(module: nn.Module, run: Run[Any, Any]) -> dict[str, Tensor]:
    """Gradients of one update, the mean over its batches; returns the terms of the loss, likewise."""
    run.optimizer.zero_grad()
    means: dict[str, Tensor] = {}
    n = run.config.accumulate
    for part in range(1, n + 1):
        waiting = isinstance(module, DistributedDataParallel) and part < n  # gradients are exchanged once, at the end
        with module.no_sync() if waiting else nullcontext():  # type: ignore[operator]
            terms = module(run.next_batch(), run.noise)
            _check_terms(terms)
            (torch.stack(list(terms.values())).sum() / n).backward()
        for name, term in terms.items():
            means[name] = term.detach() / n + means.get(name, 0.0)
    return means


def _check_terms(terms: dict[str, Tensor]) -> None:
    if not terms:
        raise ValueError("a loss must have at least one term")
    reserved = {"step", "gradient_norm", "lr", "seconds"} | ({"loss"} if len(terms) > 1 else set())
    for name, term in terms.items():
        if name in reserved or not isinstance(term, Tensor) or term.shape != ():
            shape = tuple(term.shape) if isinstance(term, Tensor) else type(term).__name__
            raise ValueError(
                f"terms of a loss must be () and have names outside {sorted(reserved)}, got {name}: {shape}"
            )


def _read(terms: dict[str, Tensor], norm: Tensor, stop: bool) -> tuple[dict[str, float], bool]:
    """The terms, the norm, and whether to stop, all at once: the trainer waits for the device once a step.

    With several processes these are means, so that all see the same numbers and stop together.
    """
    values = torch.stack([*terms.values(), norm, torch.tensor(float(stop), device=norm.device)])
    *numbers, stopped = mean_over_processes(values).tolist()
    return dict(zip([*terms, "gradient_norm"], numbers, strict=True)), stopped > 0


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
