"""The latents that `imagenet.encode` wrote, drawn from their moments, or those that `imagenet.sample` made."""

import hashlib
import json
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from imagenet.encode import FORMAT
from imagenet.npz import mapped_rows
from imagenet.shards import Shards, sha256_of
from mfm_ref.files import load_json

Rows = Sequence[int] | Tensor | np.ndarray


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

    def draw(self, rows: Rows, generators: Sequence[torch.Generator]) -> Tensor:
        """Scaled latents x₁ = scale · (mean + std · noise), `(B, C, h, w)`, each by its own generator.

        Where the mirror images are there, each is taken with probability ½.

        Raises:
            ValueError: a row out of range; moments that are not finite, with the file that holds them.
        """
        mirrored = [int(torch.randint(2, (), generator=g)) for g in generators] if self.flips else None
        moments = self.moments(rows, mirrored)
        check_rows(moments, rows, self.file)
        mean, std = moments.chunk(2, 1)
        noise = torch.stack([torch.randn(self.shape, generator=g) for g in generators])
        return self.scale * (mean + std * noise)

    def file(self, row: int) -> Path:
        """Where the moments of an image lie."""
        return self._shards.path(int(np.searchsorted(self._starts, row, side="right")) - 1) / "moments.npy"

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


class GivenLatents:
    """Latents as they are, scaled, with their labels: a latents.npz of `imagenet.sample`, mapped into memory.

    The attributes are those of `Latents`, as far as they mean something here; `n_classes` is one more than the largest
    label.

    Raises:
        ValueError: a file that is missing or damaged, or that holds no latents `(n, C, h, w)` and labels `(n,)`.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        try:
            self._x1, digest = mapped_rows(self.path), sha256_of(self.path)
            with np.load(self.path, allow_pickle=False) as arrays:
                labels = arrays["arr_1"]
        except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} must be a latents.npz that imagenet.sample wrote: {error}") from error
        if self._x1.ndim != 4 or self._x1.dtype.kind != "f" or labels.shape != (len(self._x1),) or not len(labels):
            raise ValueError(
                f"{path} must hold latents (n, C, h, w) of real numbers and n labels, got {self._x1.dtype} "
                f"{self._x1.shape} and {labels.shape}: imagenet.sample writes them where it has no --vae"
            )
        self.n, self.shape = len(self._x1), tuple(self._x1.shape[1:])
        self.labels, self.sha256 = torch.from_numpy(labels).long(), digest
        self.n_classes = int(self.labels.max()) + 1

    def draw(self, rows: Rows, generators: Sequence[torch.Generator]) -> Tensor:
        """Latents `(B, C, h, w)`, float32; nothing is drawn. Raises ValueError for entries that are not finite."""
        x1 = torch.from_numpy(np.array(self._x1[np.asarray(rows, np.int64)], np.float32))
        check_rows(x1, rows, lambda row: self.path)
        return x1


def open_latents(source: Path | str, vae: dict[str, Any] | None = None) -> Latents | GivenLatents:
    """`Latents` of a folder, `GivenLatents` of a file. Raises ValueError as they do; `vae` as in `Latents`."""
    if not str(source):
        raise ValueError("--latents must name a folder of imagenet.encode, or a latents.npz of imagenet.sample")
    return GivenLatents(source) if str(source).endswith(".npz") else Latents(source, vae)


def check_rows(found: Tensor, rows: Rows, file: Callable[[int], Path]) -> None:
    """Refuse entries that are not finite, with the file that holds them."""
    finite = torch.isfinite(found.flatten(1)).all(1)
    if not bool(finite.all()):
        row = int(np.asarray(rows)[int(finite.int().argmin())])
        raise ValueError(f"{file(row)} must hold finite numbers, got NaN or infinity in those of image {row}")
