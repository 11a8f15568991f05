"""The latents that `imagenet.encode` wrote, drawn from their moments in batches whose order can be resumed."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from imagenet.encode import FORMAT
from imagenet.shards import Shards
from mfm_ref.data import TensorBatches, stream_seed
from mfm_ref.files import load_json

Rows = Sequence[int] | Tensor | np.ndarray

MIRRORED, DRAWN = 5, 6  # what a generator of a batch is for


class Latents:
    """Moments and labels in a folder, mapped into memory: read from the disk where they are looked at.

    Args:
        folder: of `imagenet.encode`.
        vae: the `identity` of the VAE that will decode; None to take the one that encoded, unseen.

    Attributes:
        n: number of images; n_classes: of classes; shape: (C, h, w) of a latent; labels: `(n,)`.
        scale: of the latents; flips: whether the mirror images are there; record: what latents.json holds.
        sha256: tells these latents from others, wherever they lie.

    Raises:
        ValueError: the folder is unfinished, damaged, or of another format; the VAE is another than the one that
            encoded, or has another scale.
    """

    def __init__(self, folder: Path | str, vae: dict[str, Any] | None = None):
        self.folder = Path(folder)
        path = self.folder / "latents.json"
        if not path.exists():
            raise ValueError(f"{path} is missing: {self.folder} must be one that imagenet.encode has finished")
        self.record = load_json(path)
        if self.record.get("format") != FORMAT:
            raise ValueError(f"{path} must have the format {FORMAT!r}, got {self.record.get('format')!r}")
        try:
            name, weights, self.scale = (self.record["vae"][key] for key in ("id", "sha256", "scale"))
            self.flips = bool(self.record["flips"])
            self.shape: tuple[int, ...] = tuple(self.record["shape"])
            self.classes: list[str] = self.record["classes"]
            self.n, self.n_classes = int(self.record["counts"]["encoded"]), len(self.classes)
            files = [shard["sha256"] for shard in self.record["shards"]]
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path} must say what the latents are: {type(error).__name__}: {error}") from error
        if vae is not None and (vae["sha256"], vae["scale"]) != (weights, self.scale):
            raise ValueError(
                f"{self.folder} holds latents of the VAE {name} (sha256 {weights}, scale {self.scale}), which must "
                f"decode them; got {vae['id']} (sha256 {vae['sha256']}, scale {vae['scale']})"
            )
        self.sha256 = hashlib.sha256(json.dumps([self.scale, files], sort_keys=True).encode()).hexdigest()
        self._shards, parts = Shards(self.folder), range(len(files))
        self._moments = [self._shards.read(k, "moments") for k in parts]  # each (n_k, 1 or 2, 2C, h, w)
        self._starts = np.cumsum([0, *map(len, self._moments)])
        labels = np.concatenate([self._shards.read(k, "labels") for k in parts])
        self.labels = torch.from_numpy(labels)
        wanted = (1 + self.flips, 2 * self.shape[0], *self.shape[1:])
        if {array.shape[1:] for array in self._moments} != {wanted} or not self.n == len(labels) == self._starts[-1]:
            again = "if a run of imagenet.encode was killed, run it again"
            raise ValueError(f"{path} must describe the arrays beside it: {self.n} of {wanted}; {again}")

    def moments(self, rows: Rows, mirrored: Rows | None = None) -> Tensor:
        """Mean, then standard deviation, of unscaled latents, float32 `(B, 2C, h, w)`.

        Args:
            rows: which images, each in 0 … n − 1.
            mirrored: for each of them whether it is the mirror image that is asked for; none where None.

        Raises:
            ValueError: a row out of range; mirror images that are not there.
        """
        index = np.asarray(rows, np.int64)
        entries = np.zeros_like(index) if mirrored is None else np.asarray(mirrored, np.int64)
        if len(index) and not (index.min() >= 0 and index.max() < self.n):
            raise ValueError(f"rows must lie in 0 … {self.n - 1}, got {index.min()} to {index.max()}")
        if entries.any() and not self.flips:
            raise ValueError(f"{self.folder} holds no mirror images: it was encoded with --no-flips")
        parts = np.searchsorted(self._starts, index, side="right") - 1
        found = np.empty((len(index), 2 * self.shape[0], *self.shape[1:]), np.float16)
        for i, (k, row, entry) in enumerate(zip(parts, index, entries, strict=True)):
            found[i] = self._moments[k][row - self._starts[k], entry]
        return torch.from_numpy(found).float()

    def means(self, rows: Rows) -> Tensor:
        """The scaled means, `(B, C, h, w)`: the latents of images without the VAE's noise."""
        return self.scale * self.moments(rows)[:, : self.shape[0]]

    def verify(self) -> None:
        """Compare every file with its checksum in latents.json. Raises ValueError naming one that differs."""
        for k, shard in enumerate(self.record["shards"]):
            self._shards.verify(k)
            found = {name: facts["sha256"] for name, facts in self._shards.info(k)["arrays"].items()}
            if found != shard["sha256"]:
                raise ValueError(f"{self._shards.path(k)} must have the checksums {shard['sha256']}, got {found}")


class LatentBatches:
    """Endless batches (x1, y): scaled latents `(batch, C, h, w)` drawn from their moments, and labels `(batch,)`.

    x₁ = scale · (mean + std · noise). Where the mirror images are there, each is taken with probability ½. The order is
    that of `TensorBatches`; noise and mirroring depend on the seed, the rank and the number of the batch alone, so a
    resumed run sees what an unbroken one sees.

    Args:
        latents: the data.
        batch: rows in a batch of one process, >= 1.
        seed: of order, mirroring and noise, >= 0.
        rank, world: this process and the number of processes.

    Raises:
        ValueError: fewer images than a joint batch; numbers out of range.
    """

    def __init__(self, latents: Latents, batch: int, seed: int = 0, rank: int = 0, world: int = 1):
        self.latents, self.seed, self.rank = latents, seed, rank
        self._rows = TensorBatches(torch.arange(latents.n), batch=batch, seed=seed, rank=rank, world=world)
        self._per_epoch = latents.n // (batch * world)

    def __iter__(self) -> "LatentBatches":
        """The batches from here on."""
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        """One batch."""
        (rows,) = next(self._rows)
        step = self._rows.epoch * self._per_epoch + self._rows.position - 1
        mirrored = None
        if self.latents.flips:
            mirrored = torch.randint(2, (len(rows),), generator=self._generator(step, MIRRORED))
        mean, std = self.latents.moments(rows, mirrored).chunk(2, 1)
        noise = torch.randn(mean.shape, generator=self._generator(step, DRAWN))
        return self.latents.scale * (mean + std * noise), self.latents.labels[rows]

    def state_dict(self) -> dict[str, Any]:
        """The position, and the checksum of the latents."""
        return {**self._rows.state_dict(), "latents": self.latents.sha256}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go to a position. Raises ValueError for that of other data: latents, batch, seed or world differ."""
        if state_dict.get("latents") != self.latents.sha256:
            raise ValueError(
                f"the position must be one in the latents of {self.latents.folder} (sha256 {self.latents.sha256}), "
                f"got one in others ({state_dict.get('latents')})"
            )
        self._rows.load_state_dict(state_dict)

    def _generator(self, step: int, use: int) -> torch.Generator:
        return torch.Generator().manual_seed(stream_seed(self.seed, self.rank, step, use))
