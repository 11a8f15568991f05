"""Images to the moments of their latents, once for all: what training and posterior samples start from.

    python -m imagenet.encode --images DIR --vae stabilityai/sd-vae-ft-mse --out data/latents
    torchrun --nproc-per-node 8 -m imagenet.encode --images DIR --vae … --out data/latents --device cuda

DIR holds a folder for each class, whose label is its place in alphabetical order; or --images is a text file with a
line `PATH LABEL` for each image, where labels are numbers, or names that get such places. A network that knows the 1000
classes of ImageNet needs their numbers: a folder with some of them gives others, so list its images in a file.
Images are cropped as in ADM (arXiv 2105.05233). Those that cannot be read are listed with the reason, and left out; a
later run looks at them again. A run that was killed goes on where it was.
Writes, for `imagenet.latents` to read:

    latents.json              the VAE and its scale, counts, classes, images left out, checksums; written last
    shard-00003/moments.npy   float16 (n, 2, 2C, h, w): mean and standard deviation of each image and of its mirror
                              image, whose latents an autoencoder does not merely mirror; (n, 1, …) with --no-flips
    shard-00003/labels.npy    int64 (n,)
    shard-00003/numbers.npy   int64 (n,): which images of the list they are
"""

import dataclasses
import errno
import hashlib
import os
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from imagenet.commands import PRECISIONS, check_device, in_precision, refusing
from imagenet.shards import Arrays, Shards, own_parts, parts_of, work
from imagenet.vae import VAE
from mfm_ref.checks import check_count
from mfm_ref.distributed import Process, processes
from mfm_ref.files import save_json
from mfm_ref.options import option, parse

FORMAT = "mfm_ref latents 1"
SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
MOST_PIXELS = 2**26  # of an image scaled to the size, before its crop
MOST_CLASSES = 10**6
NUMBER = r"[-+]?[0-9]+([.][0-9]*)?"  # what looks like one, and is no name of a class


@dataclasses.dataclass(frozen=True)
class EncodeConfig:
    """Options of `imagenet.encode`."""

    images: str = option(
        "", "folder with a folder for each class, or a text file of lines PATH LABEL, as some classes of ImageNet need"
    )
    vae: str = option("", "folder of an AutoencoderKL, or its name on the Hugging Face hub")
    out: Path = option(Path("data/latents"), "folder of the latents")
    size: int = option(256, "pixels of an encoded image, a side")
    batch: int = option(64, "images that the VAE sees at once")
    shard: int = option(4096, "images in a file; what a killed run has to do again")
    workers: int = option(2, "processes that read images, for each that encodes; 0 reads in the latter")
    flips: bool = option(True, "encode the mirror images too")
    device: str = option("cpu", "where torch computes: cpu, cuda, …")
    precision: str = option("float32", "of the VAE's matrix products", choices=tuple(PRECISIONS))


def run(config: EncodeConfig) -> dict[str, Any]:
    """Encode what is not encoded yet, and write latents.json.

    Returns:
        what latents.json holds; in all processes.

    Raises:
        ValueError: no images, none that can be read, a VAE that cannot be had or whose moments float16 cannot hold,
            options out of range, a folder of a run with other settings or of other things.
        OSError: a file that is listed is missing, or the system does not let it be read.
    """
    for name, least in (("batch", 1), ("shard", 1), ("workers", 0)):
        check_count(getattr(config, name), f"--{name}", least)
    check_device(config.device)
    if config.precision not in PRECISIONS:
        raise ValueError(f"--precision must be one of {list(PRECISIONS)}, got {config.precision!r}")
    for name in ("images", "vae"):
        if not getattr(config, name):
            raise ValueError(f"--{name} is needed")
    listing = list_images(Path(config.images))
    parts = parts_of(len(listing.files), config.shard)
    with processes(config.device) as process:
        vae = VAE.load(config.vae, process.device)
        vae.latent_shape(config.size)
        shards = Shards(config.out, settings_of(config, listing, vae))
        if process.rank == 0 and listing.loose:
            print(f"{config.images}: {listing.loose} images beside the class folders are left out", file=sys.stderr)
        shards.renew(_mended(_Images(listing, config.size), shards, parts, process))
        job = _Encoding(config, listing, vae, shards, parts, process)
        work(shards, parts, job.make, process=process, progress="images encoded")
        record = record_of(config, listing, vae, shards, len(parts))
        if process.rank == 0:
            save_json(record, config.out / "latents.json")
    return record


def settings_of(config: EncodeConfig, listing: "Listing", vae: VAE) -> dict[str, Any]:
    """What the moments depend on, but for rounding."""
    return {
        "format": FORMAT,
        "images": listing.sha256(),
        "shard": config.shard,
        "size": config.size,
        "flips": config.flips,
        "precision": config.precision,
        "vae": vae.identity["sha256"],
        "scale": vae.scale,
    }


def record_of(config: EncodeConfig, listing: "Listing", vae: VAE, shards: Shards, n_parts: int) -> dict[str, Any]:
    """The content of latents.json, from what the shards say. Raises ValueError if no image could be read."""
    infos = [shards.info(k) for k in range(n_parts)]
    skipped = [image for info in infos for image in info["skipped"]]
    encoded = sum(info["arrays"]["labels"]["shape"][0] for info in infos)
    if not encoded:
        first = "; ".join(f"{image['file']}: {image['reason']}" for image in skipped[:3])
        raise ValueError(f"{config.images} must hold an image that can be read, got none of {len(skipped)} ({first})")
    labels = np.concatenate([shards.read(k, "labels") for k in range(n_parts)])
    return {
        "format": FORMAT,
        "vae": vae.identity,
        "size": config.size,
        "shape": list(vae.latent_shape(config.size)),
        "flips": config.flips,
        "precision": config.precision,
        "counts": {
            "images": len(listing.files),
            "encoded": encoded,
            "skipped": len(skipped),
            "of_each_class": np.bincount(labels, minlength=len(listing.classes)).tolist(),
        },
        "classes": listing.classes,
        "skipped": skipped,
        "shards": [
            {
                "name": shards.path(k).name,
                "rows": info["arrays"]["labels"]["shape"][0],
                "sha256": {name: facts["sha256"] for name, facts in info["arrays"].items()},
            }
            for k, info in enumerate(infos)
        ],
    }


# ---- which images --------------------------------------------------------------------------------------


class Listing(NamedTuple):
    """Images and their labels, in the order in which they are encoded."""

    root: Path
    files: list[str]  # relative to root, or absolute
    labels: list[int]
    classes: list[str]  # by label
    loose: int = 0  # images beside the folders of the classes, which have no label

    def sha256(self) -> str:
        """Tells one list from another, wherever the images lie."""
        lines = "\n".join(f"{file}\t{label}" for file, label in zip(self.files, self.labels, strict=True))
        return hashlib.sha256("\n".join([lines, *self.classes]).encode(errors="surrogateescape")).hexdigest()


def list_images(images: Path) -> Listing:
    """What a folder or a list file holds. Raises ValueError if that is nothing."""
    listing = _tree(images) if images.is_dir() else _list_file(images)
    if not listing.files and listing.loose:
        raise ValueError(
            f"{images} must hold a folder of images for each class, got {listing.loose} images outside of one: move "
            f"them into a folder below it, such as {images / 'any-name'}"
        )
    if not listing.files:
        wanted = "a folder of images for each class" if images.is_dir() else "lines PATH LABEL"
        raise ValueError(f"{images} must hold {wanted}, got no image")
    return listing


def _tree(root: Path) -> Listing:
    """Classes are the folders in root; their images may lie deeper. Names that begin with a dot do not count."""
    entries = [entry for entry in root.iterdir() if not entry.name.startswith(".")]
    classes = sorted(entry.name for entry in entries if entry.is_dir())
    loose = sum(entry.is_file() and entry.suffix.lower() in SUFFIXES for entry in entries)
    files, labels = [], []
    for label, name in enumerate(classes):
        found = []
        for folder, below, names in os.walk(root / name, onerror=_give_up, followlinks=True):
            below[:] = [inner for inner in below if not inner.startswith(".")]
            paths = (Path(folder, file) for file in names if not file.startswith("."))
            found += [path.relative_to(root).as_posix() for path in paths if path.suffix.lower() in SUFFIXES]
        files += sorted(found)
        labels += [label] * len(found)
    return Listing(root, files, labels, classes, loose)


def _give_up(error: OSError) -> None:
    raise error


def _list_file(path: Path) -> Listing:
    """Lines of a path, relative to the file's folder, and a label after a tab or spaces: a number, or a name."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} must be a folder, or a text file of lines PATH LABEL: {error}") from error
    pairs = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            pair = line.strip().rsplit("\t" if "\t" in line.strip() else None, 1)
            if len(pair) != 2:
                raise ValueError(f"line {number} of {path} must be PATH LABEL, got {line!r}")
            pairs.append((pair[0].strip(), pair[1].strip()))
    files, names = [file for file, _ in pairs], [name for _, name in pairs]
    numbers = [name for name in names if re.fullmatch(NUMBER, name)]
    if not numbers:
        classes = sorted(set(names))
        number_of = {name: label for label, name in enumerate(classes)}
        return Listing(path.parent, files, [number_of[name] for name in names], classes)
    odd = [name for name in names if not (name.isascii() and name.isdigit())]
    if odd:
        raise ValueError(
            f"labels in {path} must be numbers from 0 on, or names alone, got {odd[0]!r} and {numbers[0]!r}"
        )
    labels = [int(name) for name in names]
    if max(labels) >= MOST_CLASSES:
        raise ValueError(f"labels in {path} must be below {MOST_CLASSES}, got {max(labels)}")
    classes = [str(label) for label in range(max(labels) + 1)]
    return Listing(path.parent, files, labels, classes)


# ---- reading them --------------------------------------------------------------------------------------


Item = tuple[int, np.ndarray | str | OSError]
# The numbers of the images that could be read, their pixels as bytes (n, size, size, 3), and why others could not.
Loaded = tuple[list[int], Tensor, dict[int, str | OSError]]


class _Images(Dataset[Item]):
    """The pixels of an image, or why it cannot be read: an OSError says nothing of the image."""

    def __init__(self, listing: Listing, size: int):
        self.listing, self.size = listing, size

    def __len__(self) -> int:
        return len(self.listing.files)

    def __getitem__(self, k: int) -> Item:
        try:
            return k, read_image(self.listing.root / self.listing.files[k], self.size)
        except MemoryError:
            raise
        except Exception as error:  # Pillow's readers raise what they like: SyntaxError, struct.error, …
            # Pillow's own OSErrors have no number; a damaged file may send it to no place in it (EINVAL).
            if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
                return k, error  # not raised: a worker's exceptions arrive with its whole traceback
            return k, f"{type(error).__name__}: {error}"


def _mended(images: _Images, shards: Shards, parts: list[range], process: Process) -> list[int]:
    """The shards of this process that lack an image which can be read now. It reads those alone, one by one."""
    found = []
    for k in filter(shards.done, range(process.rank, len(parts), process.world)):
        left_out = sorted(set(parts[k]) - set(shards.read(k, "numbers").tolist()))
        if any(isinstance(images[i][1], np.ndarray) for i in left_out):
            found.append(k)
    return found


def read_image(path: Path, size: int) -> np.ndarray:
    """The centre of an image as bytes `(size, size, 3)`, red, green and blue, not turned as EXIF may ask for.

    Raises:
        ValueError: pixels of more than 8 bits, which Pillow would clip, or an absurdly long and thin image.
        Exception: whatever else Pillow raises for a file that is no image, or is damaged.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about metadata, mostly
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):
                raise ValueError(f"pixels must have 8 bits, got mode {image.mode}")
            return centre_crop(image.convert("RGB"), size)


def centre_crop(image: Image.Image, size: int) -> np.ndarray:
    """ADM's crop: halve by averaging while the short side is twice `size` or more, scale it to `size`, cut the centre.

    Args:
        image: of mode RGB.
        size: a side of the result, >= 1.

    Returns:
        bytes `(size, size, 3)`.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(scale * image.width), round(scale * image.height)
    if width * height > MOST_PIXELS:
        raise ValueError(f"an image must not be long and thin, got {image.width} by {image.height} pixels")
    pixels = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
    top, left = (height - size) // 2, (width - size) // 2
    return pixels[top : top + size, left : left + size]


def _collated(items: list[Item]) -> Loaded:
    read = [(k, found) for k, found in items if isinstance(found, np.ndarray)]
    images = torch.from_numpy(np.stack([pixels for _, pixels in read])) if read else torch.empty(0)
    return [k for k, _ in read], images, {k: found for k, found in items if not isinstance(found, np.ndarray)}


# ---- encoding them -------------------------------------------------------------------------------------


class _Encoding:
    """Makes the shards of this process one after another; images are read ahead, across their borders."""

    def __init__(
        self, config: EncodeConfig, listing: Listing, vae: VAE, shards: Shards, parts: list[range], process: Process
    ):
        self.config, self.listing, self.vae, self.shards = config, listing, vae, shards
        todo = [parts[k] for k in own_parts(shards, parts, process)]
        batches = [rows[i : i + config.batch] for rows in todo for i in range(0, len(rows), config.batch)]
        loader = DataLoader(
            _Images(listing, config.size),
            batch_sampler=[list(rows) for rows in batches],
            num_workers=config.workers,
            collate_fn=_collated,
        )
        self.loaded: Iterator[Loaded] = iter(loader)

    def make(self, rows: range) -> tuple[Arrays, dict[str, Any]]:
        """Moments, labels and numbers of the images `rows` that can be read, and a list of the others.

        Raises:
            OSError: the system did not let an image be read.
            ValueError: from `moments`.
        """
        shape = self.vae.latent_shape(self.config.size)
        entries = 2 if self.config.flips else 1
        moments = np.empty((len(rows), entries, 2 * shape[0], *shape[1:]), np.float16)
        numbers: list[int] = []
        faults: dict[int, str | OSError] = {}
        for _ in range(0, len(rows), self.config.batch):
            read, images, reasons = next(self.loaded)
            if read:
                moments[len(numbers) : len(numbers) + len(read)] = self.moments(read, images)
            for reason in reasons.values():
                if isinstance(reason, OSError):
                    raise reason
            numbers += read
            faults |= reasons
            self.shards.advance(len(read) + len(reasons))
        arrays: Arrays = {
            "moments": moments[: len(numbers)],
            "labels": np.array([self.listing.labels[k] for k in numbers], np.int64),
            "numbers": np.array(numbers, np.int64),
        }
        return arrays, {"skipped": [{"file": self.listing.files[k], "reason": faults[k]} for k in sorted(faults)]}

    def moments(self, numbers: list[int], images: Tensor) -> np.ndarray:
        """float16 `(n, 1 or 2, 2C, h, w)`. Raises ValueError for an image whose moments it cannot hold."""
        images = images.to(self.vae.device).permute(0, 3, 1, 2).float() / 127.5 - 1
        with in_precision(self.config.precision, images.device):
            both = [self.vae.moments(x) for x in ([images, images.flip(-1)] if self.config.flips else [images])]
        moments = torch.stack(both, 1)
        stored = moments.half()
        bad = ~stored.isfinite().flatten(1).all(1)
        if bool(bad.any()):
            first = int(bad.nonzero()[0])
            raise ValueError(
                f"the moments of {self.listing.files[numbers[first]]} must be numbers that float16 can hold, "
                f"got up to {float(moments[first].abs().max()):.4g}"
            )
        return stored.cpu().numpy()


def main(arguments: list[str] | None = None) -> None:
    """The command line; what is wrong with options or files ends it with the message alone."""
    config = parse(EncodeConfig, __doc__ or "", arguments, prog="python -m imagenet.encode")
    with refusing("imagenet.encode"):
        found = run(config)
    if int(os.environ.get("RANK", "0")) == 0:
        counts = found["counts"]
        print(f"{counts['encoded']} images of {len(found['classes'])} classes in {config.out}", end="")
        again = f"listed in {config.out / 'latents.json'}: mend them and run again"
        print(f", {counts['skipped']} that could not be read, {again}" if counts["skipped"] else "")


if __name__ == "__main__":
    main()
