"""Feature vectors of images, and the Gaussian that fits them: what a Fréchet distance is made of.

Images are uint8 `(n, H, W, 3)` in the member arr_0 of an npz file, as ADM's evaluation writes them, or files in a
folder and the folders below it, of which ADM's centre crop is taken. They are read a batch at a time, whatever their
number. A file that has the members mu and sigma is statistics already, and its images, if it has any, are not read.
"""

import functools
import importlib
import os
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from imagenet.encode import SUFFIXES, read_image
from imagenet.npz import open_rows
from imagenet.shards import sha256_of
from mfm_ref.checks import check_count, check_finite
from mfm_ref.files import atomic_path
from mfm_ref.metrics import FeatureStatistics, frechet_gaussian

INCEPTION = "torch-fidelity"  # the name of its Inception, of 2048 features
SCRIPT = "TorchScript, SHA-256 "  # how names of such files begin
BATCH = 128  # images in one call of an extractor
SIZE = 256  # pixels of an image from a folder, a side
ACCEPTED = "a readable npz file with uint8 images arr_0 or statistics mu and sigma, or a folder of images"

# ---- extractors ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Features:
    """An extractor, checked: uint8 images `(n, 3, H, W)` to vectors `(n, F)`.

    Args:
        name: what tells it from other extractors, in statistics that are kept.
        extract: the function.
    """

    name: str
    extract: Callable[[Tensor], Tensor]

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """The features of images. Raises ValueError unless they are finite numbers `(n, F)`."""
        found = self.extract(images)
        if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != len(images):
            got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(f"{self.name} must give features ({len(images)}, F) of {len(images)} images, got {got}")
        check_finite(found, f"the features by {self.name}")
        return found


@functools.cache
def load_features(spec: str, device: str = "cpu") -> Features:
    """An extractor by name.

    Args:
        spec: "torch-fidelity" for the Inception of that package; the path of a TorchScript file, which takes uint8
            `(n, 3, H, W)`; or "module:function".
        device: where the first two are put; images come there too.

    Raises:
        ValueError: what cannot be loaded, with what to do about it.
    """
    if spec == INCEPTION:
        return Features(f"{INCEPTION}, 2048 features", _fidelity(device))
    if Path(spec).is_file():
        return Features(f"{SCRIPT}{sha256_of(Path(spec))}", _torchscript(Path(spec), device))
    if ":" not in spec:
        raise ValueError(f'features must be "{INCEPTION}", a TorchScript file or module:function, got {spec!r}')
    return Features(spec, load_callable(spec))


def load_callable(spec: str) -> Callable[..., Any]:
    """The function "module:function", imported. Raises ValueError where there is none, or it cannot be called."""
    module, _, name = spec.partition(":")
    if not module or not name:
        raise ValueError(f"a function must be given as module:function, got {spec!r}")
    try:
        found = functools.reduce(getattr, name.split("."), importlib.import_module(module))
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{spec} must be a function that can be imported: {error}") from error
    if not callable(found):
        raise ValueError(f"{spec} must be a function, got {type(found).__name__}")
    return found


def _fidelity(device: str) -> Callable[[Tensor], Tensor]:
    """The last pooled features of torch-fidelity's Inception, which resizes images as TensorFlow 1 does."""
    other = "or give --features the path of a TorchScript file"
    try:
        package = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
    except (ImportError, RuntimeError) as error:  # a torchvision that was built for another torch raises RuntimeError
        raise ValueError(
            f"{INCEPTION} cannot be imported ({error}): install torch-fidelity and a torchvision built for torch "
            f"{torch.__version__}, {other}"
        ) from error
    try:
        network = package.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    except OSError as error:
        raise ValueError(
            f"{INCEPTION} cannot get its weights ({error}): let it download them once, or copy them into the cache of "
            f"torch.hub, {other}"
        ) from error
    network = network.to(device)
    return lambda images: network(images)[0]


def _torchscript(path: Path, device: str) -> Callable[[Tensor], Tensor]:
    """A TorchScript module. One with an argument return_features, as NVIDIA's Inception, is told to return them."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r".*torch\.jit\.load.* is deprecated", DeprecationWarning)
            module = torch.jit.load(path, map_location=device).eval()
        arguments = [argument.name for argument in module.forward.schema.arguments]
    except (RuntimeError, ValueError, AttributeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path} must be a TorchScript file of a module with a forward: {reason}") from error
    if "return_features" in arguments:
        return functools.partial(module, return_features=True)  # without it, class probabilities
    return module


# ---- images ----------------------------------------------------------------------------------------------


def count_images(path: Path) -> int:
    """How many images a file or a folder has. Raises ValueError as `image_batches` does."""
    if path.is_dir():
        return len(_files_in(path))
    with _images_of(path) as (_, shape):
        return shape[0]


def image_batches(path: Path, batch: int = BATCH, *, size: int = SIZE) -> Iterator[np.ndarray]:
    """The images of a file or a folder in order, uint8 `(<= batch, H, W, 3)`, one batch in memory.

    Args:
        path: an npz file; or a folder, whose images are cropped.
        batch: images in a batch.
        size: pixels of a cropped image, a side.

    Raises:
        ValueError: a file that is missing, damaged or no npz, or whose arr_0 is not uint8 `(n, H, W, 3)`, n >= 1; a
            folder without images, or with one that cannot be read.
    """
    check_count(batch, "the batch")
    check_count(size, "the size")
    if path.is_dir():
        files = _files_in(path)
        for start in range(0, len(files), batch):
            yield np.stack([_cropped(file, size) for file in files[start : start + batch]])
        return
    with _images_of(path) as (file, (n, *shape)):
        for start in range(0, n, batch):
            images = np.empty((min(batch, n - start), *shape), np.uint8)
            if file.readinto(images.reshape(-1).data) != images.size:  # type: ignore[attr-defined]
                raise EOFError(f"arr_0 ends before its {n} images do")
            yield images


def as_tensor(images: np.ndarray, device: str = "cpu") -> Tensor:
    """Images `(n, H, W, 3)` as a tensor `(n, 3, H, W)` of the same numbers."""
    return torch.from_numpy(images).to(device).permute(0, 3, 1, 2).contiguous()


def _files_in(folder: Path) -> list[Path]:
    """The images in a folder and in those below it, by name.

    Raises:
        ValueError: there are none, or they are the pictures beside a samples.npz or latents.npz.
    """
    found = []
    for below, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(below, name) for name in names if not name.startswith(".")]
    for name, what in (
        ("samples.npz", "give {}, not the folder of the run"),
        ("latents.npz", "{} has only latents: use --vae"),
    ):
        if kept := [path for path in found if path.name == name]:
            raise ValueError(f"{folder} must be {ACCEPTED}: {what.format(min(kept))}")
    found = sorted(path for path in found if path.suffix.lower() in SUFFIXES)
    if not found:
        raise ValueError(f"{folder} must be {ACCEPTED}: this folder has no images")
    return found


def _cropped(path: Path, size: int) -> np.ndarray:
    """An image, cropped as `read_image` does it. Raises ValueError if it cannot be read: none is left out."""
    try:
        return read_image(path, size)
    except Exception as error:  # Pillow's readers raise what they like
        raise ValueError(f"{path} must be an image that can be read: {error}") from error


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Whatever is wrong with a file of images is a ValueError with its path."""
    try:
        yield
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        what = error.args[0] if isinstance(error, KeyError) else error  # str(KeyError) has quotes around it
        raise ValueError(f"{path} must be {ACCEPTED}: {what}") from error


@contextmanager
def _images_of(path: Path) -> Iterator[tuple[IO[bytes], tuple[int, ...]]]:
    """arr_0 of a file, to read from, and its shape `(n, H, W, 3)`."""
    with _reading(path), open_rows(path) as (file, shape, dtype):
        if dtype != np.uint8 or len(shape) != 4 or shape[-1] != 3 or 0 in shape:
            raise ValueError(f"arr_0 must be uint8 (n, H, W, 3) with n >= 1, got {dtype} {shape}")
        yield file, shape


# ---- statistics ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Statistics:
    """The Gaussian that fits feature vectors.

    Args:
        mean, cov: `(F,)` and `(F, F)`, float64.
        count: of images; None where the file does not say, as those of ADM do not.
        features: the name of the extractor, None where the file does not say.
        source: where they are from, in messages.
    """

    mean: Tensor
    cov: Tensor
    count: int | None
    features: str | None
    source: str


def remarks(what: str, found: Statistics) -> list[str]:
    """What a reader of a distance to statistics must know, in sentences about `what`: few images bias it."""
    if found.count is None or found.count > len(found.mean):
        return []
    return [
        f"{what} has {found.count} images for {len(found.mean)} features: the covariance lacks rank, and the distance "
        "is biased upwards, so it compares with that of as many images only"
    ]


def statistics_of(
    path: Path, features: str = INCEPTION, *, batch: int = BATCH, size: int = SIZE, device: str = "cpu"
) -> Statistics:
    """The statistics in a file, or those of images.

    Args:
        path: an npz file with mu and sigma, or with images; or a folder of images.
        features: an extractor as `load_features` takes it; it is loaded only for images.
        batch: images in one call of the extractor.
        size: pixels, a side, to which images of a folder are cropped.
        device: where the extractor computes.

    Raises:
        ValueError: from `look_at`, `image_batches` or `load_features`.
    """
    n = look_at(path)
    if isinstance(n, Statistics):
        return n
    extract = load_features(features, device)
    batches, name = image_batches(path, batch, size=size), f"{path.parent.name}/{path.name}"
    fit = fit_features(tqdm(batches, desc=name, total=-(-n // batch), unit="batch", leave=False), extract, device)
    return Statistics(fit.mean, fit.cov, n, extract.name, str(path))


def look_at(path: Path) -> Statistics | int:
    """The statistics in a file, or how many images are to be read for them.

    Raises:
        ValueError: from `read_statistics` or `count_images`; fewer than two images.
    """
    found = None if path.is_dir() else read_statistics(path)
    if found is not None:
        return found
    n = count_images(path)
    if n < 2:
        raise ValueError(f"{path} must have at least two images, got {n}")
    return n


def fit_features(batches: Iterable[np.ndarray], extract: Features, device: str = "cpu") -> FeatureStatistics:
    """Mean and covariance of the features of uint8 images `(n, H, W, 3)`, in double precision and constant memory."""
    fit = FeatureStatistics()
    for images in batches:
        fit.update(extract(as_tensor(images, device)).double().cpu())
    return fit


def read_statistics(path: Path) -> Statistics | None:
    """The statistics in a file: mu and sigma, and the images' count and the extractor's name if it says so.

    None for a file without mu and sigma.

    Raises:
        ValueError: a file that is missing, damaged or no npz; one of the two without the other; mu that is not `(F,)`,
            sigma that is not `(F, F)`, numbers that are not finite.
    """
    with _reading(path), zipfile.ZipFile(path), np.load(path) as file:  # ZipFile refuses what np.load would take
        members = {name: file[name] for name in ("mu", "sigma", "count", "features") if name in file.files}
    if "mu" not in members and "sigma" not in members:
        return None
    mean, cov = (members.get(name, np.zeros(())) for name in ("mu", "sigma"))
    if mean.ndim != 1 or cov.shape != 2 * mean.shape or mean.dtype.kind != "f" or cov.dtype.kind != "f":
        raise ValueError(f"{path} must hold numbers mu (F,) and sigma (F, F), got {mean.shape} and {cov.shape}")
    if not (np.isfinite(mean).all() and np.isfinite(cov).all()):
        raise ValueError(f"mu and sigma of {path} must be finite")
    count, features = members.get("count"), members.get("features")
    return Statistics(
        torch.from_numpy(mean.astype(np.float64)),
        torch.from_numpy(cov.astype(np.float64)),
        None if count is None else int(count),
        None if features is None else str(features),
        str(path),
    )


def save_statistics(found: Statistics, path: Path) -> None:
    """Write mu and sigma as ADM's reference files have them, and beside them what else is known."""
    members: dict[str, Any] = {"mu": found.mean.numpy(), "sigma": found.cov.numpy()}
    members |= {"count": found.count} if found.count is not None else {}
    members |= {"features": found.features} if found.features is not None else {}
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **members)


def measure(*sets: Statistics) -> str:
    """What `distance` is called, with its features: FID for those of the Inception or, so its user says, of a file."""
    name = next((one.features for one in sets if one.features is not None), "features unknown")
    if name.startswith(SCRIPT):
        return f"FID ({name[: len(SCRIPT) + 8]})"
    return f"FID ({name})" if name.startswith(INCEPTION) else f"Fréchet distance ({name})"


def distance(a: Statistics, b: Statistics) -> float:
    """The squared Fréchet distance of two Gaussians; `measure` says what it is called.

    Raises:
        ValueError: features of different number or of different extractors; from `frechet_gaussian`.
    """
    if len(a.mean) != len(b.mean):
        counts = f"{a.source} has {len(a.mean)} and {b.source} {len(b.mean)}"
        raise ValueError(f"both must have features of one extractor, but {counts} of them")
    if a.features is not None and b.features is not None and a.features != b.features:
        names = f"{a.source} has those by {a.features} and {b.source} those by {b.features}"
        raise ValueError(f"both must have features of one extractor, but {names}")
    return float(frechet_gaussian(a.mean, a.cov, b.mean, b.cov))
