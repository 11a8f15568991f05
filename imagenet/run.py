"""What the scripts of this rung share: options, networks with their guidance, and long sampling in a folder.

A folder of samples holds, once it is finished,

    samples.npz      arr_0 uint8 (n, H, W, 3) and arr_1 int64 labels (n,), as ADM's evaluation reads them
    latents.npz      without a VAE in its place, and where a script keeps both: arr_0 float32 (n, *D), as the network
                     has them
    grid.png         the first images, where there is a VAE
    settings.json    all settings, the network, its weights, the VAE, and the evaluations that a sample took; of what
                     the core counts, "cost", too

and until then .parts/, batch by batch, from which a run that was killed goes on. Every random number belongs to the
number of one sample, so that the samples depend neither on the processes that shared the work nor on the device, but
for rounding.
"""

import dataclasses
import math
import shutil
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from imagenet.checkpoints import load
from imagenet.commands import PRECISIONS, check_device, device_name, in_precision
from imagenet.npz import first_rows, open_rows, write_npz
from imagenet.shards import Arrays, Shards, differences, parts_of, work
from imagenet.sit import KINDS
from imagenet.vae import VAE, sha256_of_weights, to_uint8
from mfm_ref import ClassifierFree, Cost, FlowMap, Guided, MetaFlowMap
from mfm_ref.checks import check_count, check_finite
from mfm_ref.data import stream_seed
from mfm_ref.distributed import Process
from mfm_ref.files import atomic_path, load_json, remove_folder, save_json
from mfm_ref.options import option

# What streams of random numbers are for, the last number of their seeds: none is one of mfm_ref.data's.
SAMPLES, LABELS, CONTEXTS, DRAWS, ROLLOUTS, AGAIN = range(100, 106)

OFFICIAL_CHANNELS = 3  # of 4, to which SiT's own sampler applies guidance
DECODED = 16  # latents that are decoded together
GRID = 8  # images in a row of grid.png, and most rows
FILES = ("samples.npz", "latents.npz", "grid.png")
PARTS = ".parts"
# Options that say where things are, and how to read them: what is there is compared instead.
ELSEWHERE = ("out", "device", "weights", "kind", "num_heads", "encoder_depth", "vae")


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """Options that every script with a network has."""

    weights: str = option("", "file, folder or Hugging Face id of the network (imagenet.checkpoints)")
    kind: str = option("", "of a file of published weights; empty for a folder of this project", choices=("", *KINDS))
    num_heads: int = option(16, "of published weights, which do not tell")
    encoder_depth: int = option(20, "of published weights, which do not tell: blocks that see the start of a jump")
    guidance: float = option(
        0.0,
        "scale w >= 1: an input of weights that have one, classifier-free guidance of others, to which 1 adds none; 0: "
        "the largest that the weights know, and 1 of weights that know none",
    )
    guided_channels: int = option(
        0, "the first channels, which alone classifier-free guidance moves; 0: 3 for SiT, as its own sampler, else all"
    )
    vae: str = option("", "folder or Hugging Face id of the VAE that decodes; empty to keep latents")
    out: Path = option(Path("runs/samples"), "folder of the results")
    seed: int = option(0, "of every random number")
    batch: int = option(32, "samples that are made together, and kept as one shard")
    device: str = option("cpu", "where torch computes: cpu, cuda, …")
    precision: str = option("float32", "of the network's matrix products", choices=tuple(PRECISIONS))
    compile: bool = option(False, "compile the network")


# ---- networks --------------------------------------------------------------------------------------------


def open_network(config: ModelOptions) -> FlowMap:
    """The network of --weights as a flow map, for evaluation: on the device, in its precision, without gradients.

    Raises:
        ValueError: no weights, a device that is not there; from `imagenet.checkpoints.load`.
    """
    if not config.weights:
        raise ValueError("--weights must name the weights: a file, a folder or an id")
    check_device(config.device)
    network: nn.Module = load(
        config.weights, config.kind or None, num_heads=config.num_heads, encoder_depth=config.encoder_depth
    )
    network = network.to(config.device).requires_grad_(False)
    if config.compile:
        compiled(network)
    rounded(network, config)
    return FlowMap(network).eval()


def compiled(network: nn.Module) -> None:
    """Have `velocity` compiled when it is called, once for each batch size: none depends on the sizes before."""
    network.velocity = torch.compile(network.velocity, dynamic=False)  # type: ignore[arg-type, assignment]


def rounded(network: nn.Module, config: ModelOptions) -> None:
    """Evaluate `velocity` in the precision of the run; its result has the states' dtype, as sums along a path need."""
    velocity: Callable[..., Tensor] = network.velocity  # type: ignore[assignment]

    def evaluated(s: Tensor, u: Tensor, z: Tensor, *rest: Tensor | None) -> Tensor:
        with in_precision(config.precision, config.device):
            return velocity(s, u, z, *rest).to(z.dtype)

    network.velocity = evaluated  # type: ignore[assignment]


def is_drift(X: FlowMap) -> bool:
    """Whether the weights are a drift that `imagenet.finetune` made: jumps and contexts of theirs mean nothing."""
    return bool(getattr(X.network, "drift_only", False))


def reads_context(X: FlowMap) -> bool:
    """Whether the network has a context branch that means something, as MFM; otherwise its t and x do nothing."""
    return bool(X.network.config["context"]) and not is_drift(X)  # type: ignore[index]


def has_two_times(X: FlowMap) -> bool:
    """Whether the network has two times, as DMF and MFM; otherwise it is SiT's."""
    return X.network.config["encoder_depth"] is not None  # type: ignore[index]


def makes_jumps(X: FlowMap) -> bool:
    """Whether the network has two times that mean something; otherwise it is a drift alone."""
    return has_two_times(X) and not is_drift(X)


def scale_of(X: FlowMap, config: ModelOptions) -> float:
    """The scale w of --guidance, or what 0 stands for.

    Raises:
        ValueError: w below one, or none of the scales that the weights know.
    """
    w = config.guidance
    known: list[float] = X.network.config["guidance"] if X.reads_guidance else []  # type: ignore[index, assignment]
    if w == 0:
        return max(known, default=1.0)
    if not 1 <= w < math.inf:
        raise ValueError(f"--guidance must be a number >= 1, or 0 for the weights' own, got {w}")
    if known and w not in known:
        raise ValueError(f"--guidance must be one of the scales that these weights know, {known}, got {w}")
    return w


def guided(X: FlowMap, config: ModelOptions) -> MetaFlowMap:
    """The map with --guidance: as its input where it has one, else classifier-free, else as it is (w = 1).

    A DMF has its guidance in its weights: w = 1 is what it was trained for.

    Raises:
        ValueError: channels that the states lack; from `scale_of`.
    """
    w, channels = scale_of(X, config), config.guided_channels
    if not 0 <= channels <= X.shape[0]:
        raise ValueError(f"--guided-channels must be at least 0 and at most {X.shape[0]}, got {channels}")
    if X.reads_guidance:
        return Guided(X, w)
    if w == 1:
        return X
    if channels == 0:
        channels = X.shape[0] if has_two_times(X) else min(OFFICIAL_CHANNELS, X.shape[0])
    return ClassifierFree(X, w, channels=channels)


def guidance_of(X: MetaFlowMap) -> dict[str, Any]:
    """How a map of `guided` is guided, as JSON values."""
    if isinstance(X, Guided):
        return {"by": "an input of the network", "scale": X.guidance}
    if isinstance(X, ClassifierFree):
        return {"by": "classifier-free guidance", "scale": X.scale, "channels": X.channels}
    return {"by": "nothing"}


def check_channels(config: ModelOptions, *maps: MetaFlowMap) -> None:
    """Raise ValueError for --guided-channels if none of the maps of `guided` is guided by them."""
    if config.guided_channels and not any(isinstance(X, ClassifierFree) for X in maps):
        raise ValueError(
            "--guided-channels must be left out where there is no classifier-free guidance: --guidance is 1, or an "
            "input of the network"
        )


class Passes:
    """Counts what passes through the networks of maps from here on: `rows`, each one evaluation of one state."""

    def __init__(self, *maps: FlowMap):
        self.rows = 0
        for network in {id(X.network): X.network for X in maps}.values():
            network.velocity = self._counted(network.velocity)  # type: ignore[arg-type, assignment]

    def _counted(self, velocity: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def counted(s: Tensor, u: Tensor, z: Tensor, *rest: Tensor | None) -> Tensor:
            self.rows += len(z)
            return velocity(s, u, z, *rest)

        return counted


def open_vae(config: ModelOptions, X: FlowMap) -> VAE | None:
    """The VAE of --vae, None without one. Raises ValueError if its latents are not the network's; from `VAE.load`."""
    if not config.vae:
        return None
    vae = VAE.load(config.vae, config.device)
    if vae.channels != X.shape[0]:
        raise ValueError(f"--vae must have latents of {X.shape[0]} channels, as the network has, got {vae.channels}")
    return vae


# ---- random numbers and labels ---------------------------------------------------------------------------


def generator_of(*numbers: int) -> torch.Generator:
    """A generator of its own for some numbers, on the CPU: it gives the same numbers whatever the device is."""
    return torch.Generator().manual_seed(stream_seed(*numbers))


def generators(seed: int, rows: Iterable[int]) -> list[torch.Generator]:
    """One for each sample, by its number."""
    return [generator_of(seed, i, SAMPLES) for i in rows]


def labels_for(kind: str, n: int, n_classes: int, seed: int = 0) -> Tensor:
    """Labels of samples 0 … n − 1, int64 `(n,)`; none depends on n.

    Args:
        kind: "balanced": each class in turn, in an order of the seed's; "random": each label by itself; or one class.
        n: how many, >= 1.
        n_classes: labels are below it.
        seed: of order and chance.

    Raises:
        ValueError: another kind, or a class out of range.
    """
    check_count(n, "n")
    if kind == "balanced":
        order = torch.randperm(n_classes, generator=generator_of(seed, LABELS))
        return order[torch.arange(n) % n_classes]
    if kind == "random":
        return torch.tensor([stream_seed(seed, i, LABELS) % n_classes for i in range(n)])
    if not kind.isdecimal() or int(kind) >= n_classes:
        raise ValueError(f"--labels must be balanced, random or a class from 0 to {n_classes - 1}, got {kind!r}")
    return torch.full((n,), int(kind))


# ---- a folder of samples ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Job:
    """What makes the samples of a folder."""

    settings: dict[str, Any]  # all that they depend on; a folder of others is refused
    facts: dict[str, Any]  # more, for settings.json
    labels: Tensor  # (n,), int64
    draw: Callable[[range], Tensor | tuple[Tensor, Cost]]  # numbers of samples -> latents (len, *D), and their cost
    passes: Passes  # of the networks in `draw`
    vae: VAE | None  # that decodes them
    batch: int
    keep_latents: bool = False  # beside images, too


def run_job(job: Job, folder: Path, process: Process, progress: str) -> dict[str, Any] | None:
    """Make a folder of samples, or go on with it; what settings.json says, None but in rank 0.

    Raises:
        ValueError: the folder belongs to a run with other settings or to something else, or is damaged; whatever
            `draw` raises.
    """
    record = finished(job, folder)
    shards = Shards(folder / PARTS, job.settings) if record is None else None
    if process.rank == 0:  # no sooner: what is wrong with the folder ends all processes alike
        clear(folder, *FILES, "settings.json", PARTS)
    if shards is not None:
        parts = parts_of(len(job.labels), job.batch)
        work(shards, parts, lambda rows: make(job, rows), process=process, progress=progress)
        if process.rank == 0:
            record = assemble(job, folder, shards, len(parts))
    if process.rank > 0:
        return None
    left = folder / PARTS / "settings.json"
    if left.exists() and load_json(left) == job.settings:
        remove_folder(left.parent)
    return record


def clear(folder: Path, *names: str) -> None:
    """Remove what processes that died in writing or removing files and folders of these names left of them."""
    for left in (left for name in names for left in folder.glob(f".[0-9]*.{name}")):
        if left.is_dir():
            shutil.rmtree(left)
        else:
            left.unlink()


def finished(job: Job, folder: Path) -> dict[str, Any] | None:
    """What settings.json says of a folder that is finished; None where it or the samples are missing.

    Raises:
        ValueError: it was made with other settings or by something else, or is damaged; it is missing, and there are
            files of its folder that no run was writing.
    """
    path = folder / "settings.json"
    if not path.exists():
        left = [name for name in FILES if (folder / name).exists()]
        if left and not (folder / PARTS / path.name).exists():  # with it, of a run that died between its files
            raise ValueError(
                f"{folder} must be a new folder or one of this script, found {left[0]} and no {path.name}: write "
                "elsewhere (--out)"
            )
        return None
    record = load_json(path)
    if not isinstance(record.get("settings"), dict) or "evaluations_per_sample" not in record:
        raise ValueError(
            f"{path} must be one that this script wrote, and is of something else: write elsewhere (--out)"
        )
    others = differences(record["settings"], job.settings)
    if others:
        raise ValueError(
            f"{path} belongs to a run with other settings ({others}): remove it or write elsewhere (--out)"
        )
    names = {name_of(job.vae), *(["latents.npz"] if job.keep_latents else [])}
    return record if all(has_rows(folder / name, len(job.labels)) for name in names) else None


def has_rows(path: Path, n: int) -> bool:
    """Whether a file of n samples is there."""
    try:
        with open_rows(path) as (_, shape, _):
            return shape[0] == n
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile):
        return False


@torch.no_grad()
def make(job: Job, rows: range) -> tuple[Arrays, dict[str, Any]]:
    """The samples of some numbers, as images or latents, and the evaluations that they took."""
    before, drawn = job.passes.rows, job.draw(rows)
    latents, cost = drawn if isinstance(drawn, tuple) else (drawn, None)
    check_finite(latents, f"the samples {rows.start} to {rows.stop - 1}")
    info = {"evaluations": job.passes.rows - before} | ({} if cost is None else {"cost": dataclasses.asdict(cost)})
    plain = latents.float().cpu().numpy()
    if job.vae is None:
        return {"samples": plain}, info
    return {"samples": decoded(job.vae, latents)} | ({"latents": plain} if job.keep_latents else {}), info


@torch.no_grad()
def decoded(vae: VAE, latents: Tensor) -> np.ndarray:
    """Images of latents `(B, *D)`, uint8 `(B, H, W, 3)`, decoded a few at a time: at 256² each takes much memory."""
    return np.concatenate([to_uint8(vae.decode(part)) for part in latents.split(DECODED)])


def assemble(job: Job, folder: Path, shards: Shards, count: int) -> dict[str, Any]:
    """Write samples.npz (or latents.npz), grid.png and, last, settings.json from all shards; what the last says."""
    n, path = len(job.labels), folder / name_of(job.vae)
    write_npz(path, [shards.read(k, "samples") for k in range(count)], job.labels.numpy())
    if job.vae is not None:
        save_image(grid(first_rows(path, GRID**2), GRID), folder / "grid.png")
    if job.vae is not None and job.keep_latents:
        write_npz(folder / "latents.npz", [shards.read(k, "latents") for k in range(count)], job.labels.numpy())
    infos = [shards.info(k) for k in range(count)]
    rows = sum(info["evaluations"] for info in infos)
    evaluations = rows / n if rows % n else rows // n
    record = {"settings": job.settings, "samples": n, "evaluations_per_sample": evaluations, **job.facts}
    costs = [Cost(**info["cost"]) for info in infos if "cost" in info]
    if costs:
        record["cost"] = dataclasses.asdict(sum(costs[1:], costs[0]))
    save_json(record, folder / "settings.json")
    return record


def name_of(vae: VAE | None) -> str:
    """The file of the samples."""
    return "latents.npz" if vae is None else "samples.npz"


def grid(images: np.ndarray, columns: int) -> Image.Image:
    """Images uint8 `(n, H, W, 3)` in rows of `columns`; places that are left over are white."""
    check_count(columns, "columns")
    n, height, width = images.shape[:3]
    columns = min(columns, n)
    rows = -(-n // columns)
    page = np.full((rows * columns, height, width, 3), 255, np.uint8)
    page[:n] = images
    page = page.reshape(rows, columns, height, width, 3).swapaxes(1, 2)
    return Image.fromarray(page.reshape(rows * height, columns * width, 3))


def save_image(image: Image.Image, path: Path) -> None:
    """Write a picture as PNG."""
    with atomic_path(path) as temporary:
        image.save(temporary, format="PNG")


def describe(
    config: ModelOptions, network: FlowMap, X: MetaFlowMap, vae: VAE | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings that samples depend on, and what else settings.json says of a run.

    Args:
        config: of the run.
        network: of --weights.
        X: the same, guided.
        vae: that decodes the samples, or None.
    """
    weights, decoder = sha256_of_weights(network.network), vae and vae.identity
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name not in ELSEWHERE}
    settings |= {"weights": weights, "network": network.network.config, "guidance": scale_of(network, config)}
    settings |= {"vae": decoder and {name: decoder[name] for name in ("sha256", "scale")}}
    facts = {"weights": {"from": config.weights, "sha256": weights}, "guidance": guidance_of(X), "vae": decoder}
    return settings, facts | {"torch": torch.__version__, "device": device_name(config.device)}
