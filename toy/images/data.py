"""The data of the image rungs: scikit-learn's digits, and MNIST or Fashion-MNIST from idx files.

Each data set is split in three: what trains the map and the classifier, what trains the judge (a second classifier,
which the reward does not know), and what neither the map nor the classifier ever sees.
"""

import dataclasses
import gzip
import hashlib
import http.client
import math
import urllib.request
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mfm_ref.files import atomic_path
from toy.digits import DigitsConfig, load_digits

CLASSES = 10
SIDE = 28  # pixels of an idx image, a side
JUDGE_SHARE = 6  # one training image in so many, the last ones, is the judge's: 10000 of 60000
TIMEOUT = 30  # seconds that a mirror may stay silent

TRAIN, TEST = "train", "t10k"
KINDS = {"images": "images-idx3-ubyte", "labels": "labels-idx1-ubyte"}
FILES = [f"{part}-{kind}" for part in (TRAIN, TEST) for kind in KINDS.values()]

# SHA-256 of the files' content, unpacked: packers differ, and so do the bytes of .gz files of the same content.
CHECKSUMS = {
    "mnist": {
        "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    },
    "fashion": {
        "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    },
}
MIRRORS = {
    "mnist": [
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "https://storage.googleapis.com/cvdf-datasets/mnist/",
    ],
    "fashion": [
        "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    ],
}


@dataclasses.dataclass(frozen=True)
class Images:
    """Images `(n, 1, H, W)` with pixels in [−1, 1], their classes `(n,)`, and the noise that a draw of p₁ has."""

    images: Tensor
    classes: Tensor
    noise: float = 0.0

    def __len__(self) -> int:
        return len(self.images)

    def sample(self, n: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """n draws with replacement of p₁, images with the noise, and their classes."""
        index = torch.randint(len(self), (n,), generator=rng, device=self.images.device)
        return self.blur(self.images[index], rng), self.classes[index]

    def blur(self, images: Tensor, rng: torch.Generator) -> Tensor:
        """Images plus the noise: where it is not 0, pixels that are always black get a density too."""
        if not self.noise:
            return images
        return images + self.noise * torch.randn(images.shape, generator=rng, device=images.device)

    def gaussian(self) -> tuple[Tensor, Tensor]:
        """Mean `(1, H, W)` and covariance `(H·W, H·W)` of p₁."""
        flat = self.images.flatten(1)
        eye = torch.eye(flat.shape[1], device=flat.device)
        return self.images.mean(0), torch.cov(flat.T) + self.noise**2 * eye


@dataclasses.dataclass(frozen=True)
class Split:
    """The three parts of a data set."""

    train: Images  # for the map and the classifier
    judge: Images  # for the judge
    held_out: Images  # for neither map nor classifier


def load_images(dataset: str, folder: str | Path | None = None, device: str | torch.device = "cpu") -> Split:
    """The three parts of "digits", "mnist" or "fashion"; the same for every seed.

    digits: 1300 images 8×8 to train; the other 497 train the judge and are the held-out ones too.
    mnist, fashion: of the 60000 training images 28×28, 50000 to train and the last 10000 for the judge; the 10000 test
    images are held out.

    Args:
        dataset: its name.
        folder: of the four idx files, packed by gzip or not, the packed one first; not needed for digits.
        device: of the tensors.

    Raises:
        ValueError: another name, no folder, files that are missing or broken, content of another checksum.
    """
    if dataset == "digits":
        return _digits(device)
    if dataset not in CHECKSUMS:
        raise ValueError(f"a data set is one of digits, {', '.join(CHECKSUMS)}, got {dataset!r}")
    if folder is None or not str(folder):
        raise ValueError(f"{dataset} needs a folder with its files (--data DIR); {_how_to_get(dataset)}")
    train, held_out = (_idx_pair(dataset, paths, device) for paths in _found_parts(dataset, Path(folder)))
    k = len(train) - len(train) // JUDGE_SHARE
    return Split(Images(train.images[:k], train.classes[:k]), Images(train.images[k:], train.classes[k:]), held_out)


def read_idx(path: Path) -> tuple[np.ndarray, str]:
    """The array of unsigned bytes in an idx file, packed by gzip if its name ends so, and the content's SHA-256.

    The format: two zero bytes, the code of the type (8 for unsigned bytes), the number of dimensions; each dimension
    as 4 bytes, the highest first; the values.

    Raises:
        ValueError: a file that cannot be read, another type, less or more content than the dimensions say.
    """
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix == ".gz" else content
    except (OSError, EOFError, zlib.error) as error:
        packed = "a gzip file" if path.suffix == ".gz" else "a file"
        raise ValueError(f"{path} must be {packed} that can be read: {error}") from error
    if len(content) < 4 or content[:3] != b"\0\0\x08":
        raise ValueError(
            f"{path} must be an idx file of unsigned bytes, whose first bytes are 00 00 08, "
            f"got {content[:4].hex(' ') or 'no content'}"
        )
    start = 4 + 4 * content[3]
    if len(content) < start:
        raise ValueError(f"{path} is truncated: its header of {start} bytes ends after {len(content)}")
    shape = np.frombuffer(content[4:start], dtype=">u4").tolist()
    if len(content) - start != math.prod(shape):
        fault = "is truncated" if len(content) - start < math.prod(shape) else "has bytes beyond its end"
        wanted = "×".join(map(str, shape))
        raise ValueError(f"{path} {fault}: {wanted} needs {math.prod(shape)} bytes, got {len(content) - start}")
    return np.frombuffer(content, dtype=np.uint8, offset=start).reshape(shape), hashlib.sha256(content).hexdigest()


def download(
    dataset: str, folder: str | Path, mirrors: Sequence[str] | None = None, timeout: float = TIMEOUT
) -> dict[str, str]:
    """Get the four files of "mnist" or "fashion"; those that are there and right are kept.

    Args:
        dataset: its name.
        folder: where the files go, as NAME.gz.
        mirrors: addresses that end in "/", tried one after the other for each file; None for `MIRRORS`.
        timeout: seconds that a mirror may stay silent.

    Returns:
        {path: where the file came from, or "kept"}.

    Raises:
        ValueError: another name.
        ConnectionError: no mirror gave a file of the right checksum.
    """
    if dataset not in CHECKSUMS:
        raise ValueError(f"data sets to download are {', '.join(CHECKSUMS)}, got {dataset!r}")
    came: dict[str, str] = {}
    for name in FILES:
        path = _find(Path(folder), name)
        if path is not None and _is_right(path, dataset, name):
            came[str(path)] = "kept"
        else:
            path = Path(folder) / f"{name}.gz"
            came[str(path)] = _fetch(dataset, name, path, MIRRORS[dataset] if mirrors is None else mirrors, timeout)
    return came


# ---- digits --------------------------------------------------------------------------------------------


def _digits(device: str | torch.device) -> Split:
    """The split of `toy.digits`, as images."""
    parts = load_digits(DigitsConfig(device=str(device)))
    train, held_out = (Images(part.images.view(-1, 1, 8, 8), part.classes, part.noise) for part in parts)
    return Split(train, held_out, held_out)


# ---- idx files -----------------------------------------------------------------------------------------


def _how_to_get(dataset: str) -> str:
    return f"to get them: python -m toy.mnist download --dataset {dataset} --data DIR"


def _find(folder: Path, name: str) -> Path | None:
    """The file of that name, packed or not."""
    return next((path for path in (folder / f"{name}.gz", folder / name) if path.is_file()), None)


def _found_parts(dataset: str, folder: Path) -> list[dict[str, Path]]:
    """The paths of images and labels, {kind: path}, for training and for test."""
    found = {name: _find(folder, name) for name in FILES}
    if missing := [name for name, path in found.items() if path is None]:
        raise ValueError(
            f"{folder} must hold {', '.join(missing)}, each as it is or with .gz at the end; {_how_to_get(dataset)}"
        )
    paths = {name: path for name, path in found.items() if path is not None}
    return [{kind: paths[f"{part}-{name}"] for kind, name in KINDS.items()} for part in (TRAIN, TEST)]


def _idx_pair(dataset: str, paths: dict[str, Path], device: str | torch.device) -> Images:
    """Images and labels of two files; that they can belong to the data set is checked before that they do."""
    (images, images_sum), (labels, labels_sum) = (read_idx(paths[kind]) for kind in KINDS)
    if images.shape[1:] != (SIDE, SIDE):
        shape = "×".join(map(str, images.shape))
        raise ValueError(f"{paths['images']} must hold images of {SIDE}×{SIDE} pixels, got an array {shape}")
    if labels.shape != (len(images),):
        shape = "×".join(map(str, labels.shape))
        raise ValueError(f"{paths['labels']} must hold a label for each of {len(images)} images, got an array {shape}")
    if labels.size and labels.max() >= CLASSES:
        raise ValueError(f"{paths['labels']} must hold labels from 0 to {CLASSES - 1}, got {labels.max()}")
    for path, found in ((paths["images"], images_sum), (paths["labels"], labels_sum)):
        _check_sum(path, dataset, path.name.removesuffix(".gz"), found)
    pixels = torch.from_numpy(images.copy()).to(device).unsqueeze(1).float() / 127.5 - 1
    return Images(pixels, torch.from_numpy(labels.astype(np.int64)).to(device))


def _check_sum(source: Path | str, dataset: str, name: str, found: str) -> None:
    wanted = CHECKSUMS[dataset][name]
    if found != wanted:
        raise ValueError(
            f"{source} is not {name} of {dataset}: the SHA-256 checksum of its content must be {wanted}, got {found}"
        )


def _is_right(path: Path, dataset: str, name: str) -> bool:
    try:
        return read_idx(path)[1] == CHECKSUMS[dataset][name]
    except ValueError:
        return False


def _fetch(dataset: str, name: str, path: Path, mirrors: Sequence[str], timeout: float) -> str:
    """Download one file to `path` from the first mirror that gives the right one; returns its address."""
    faults = []
    for mirror in mirrors:
        url = f"{mirror}{name}.gz"
        try:
            with urllib.request.urlopen(url, timeout=timeout) as response:
                packed = response.read()
            _check_sum(url, dataset, name, hashlib.sha256(gzip.decompress(packed)).hexdigest())
        except (OSError, EOFError, zlib.error, http.client.HTTPException, ValueError) as error:
            faults.append(f"{url}: {error}")
            continue
        with atomic_path(path) as temporary:
            temporary.write_bytes(packed)
        return url
    raise ConnectionError(
        f"no mirror gave {path.name} of {dataset}; is there a network? Tried:\n  "
        + "\n  ".join(faults)
        + f"\nFiles from elsewhere can be put into {path.parent} by hand: {', '.join(FILES)}, packed by gzip or not"
    )
