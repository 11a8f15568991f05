"""Data of the image rungs: idx files as they must be and every way they must not be; downloads from this machine."""

import gzip
import hashlib
import http.server
import struct
import threading
from functools import partial

import numpy as np
import pytest
import torch

from toy.digits import DigitsConfig, load_digits
from toy.images import data
from toy.images.data import FILES, Images, download, load_images, read_idx

pytest.importorskip("sklearn")

COUNTS = {"train": 60, "t10k": 20}


def idx(array, kind: int = 8) -> bytes:
    return bytes([0, 0, kind, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def contents() -> dict[str, bytes]:
    """Random images and labels in the four files, {name: content}."""
    rng = np.random.default_rng(0)
    made = {}
    for part, n in COUNTS.items():
        made[f"{part}-images-idx3-ubyte"] = idx(rng.integers(0, 256, (n, 28, 28), dtype=np.uint8))
        made[f"{part}-labels-idx1-ubyte"] = idx(rng.integers(0, 10, n, dtype=np.uint8))
    return made


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Four files, packed, that are the whole of MNIST as far as the checksums say."""
    made = contents()
    monkeypatch.setitem(data.CHECKSUMS, "mnist", {k: hashlib.sha256(v).hexdigest() for k, v in made.items()})
    for name, content in made.items():
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content))
    return tmp_path


def test_idx_files_give_the_split(folder):
    split = load_images("mnist", folder)
    assert [len(part) for part in (split.train, split.judge, split.held_out)] == [50, 10, 20]
    raw = np.frombuffer(contents()["train-images-idx3-ubyte"][16:], dtype=np.uint8).reshape(60, 1, 28, 28)
    both = torch.cat([split.train.images, split.judge.images])
    np.testing.assert_allclose(both.numpy(), raw / 127.5 - 1, atol=1e-6)
    assert (float(both.min()), float(both.max())) == (-1, 1)
    labels = np.frombuffer(contents()["t10k-labels-idx1-ubyte"][8:], dtype=np.uint8)
    assert split.held_out.classes.tolist() == labels.tolist()
    assert split.train.noise == 0


def test_unpacked_files_are_read_too_and_packed_ones_come_first(folder):
    name = "train-labels-idx1-ubyte"
    (folder / name).write_bytes(b"another file")
    load_images("mnist", folder)
    (folder / f"{name}.gz").unlink()
    (folder / name).write_bytes(contents()[name])
    assert len(load_images("mnist", folder).train) == 50


def test_digits_are_those_of_the_other_script():
    split = load_images("digits")
    train, held_out = load_digits(DigitsConfig())
    assert torch.equal(split.train.images.flatten(1), train.images)
    assert torch.equal(split.held_out.classes, held_out.classes)
    assert split.judge is split.held_out
    assert (len(split.train), len(split.judge), split.train.noise) == (1300, 497, 0.06)
    for one, other in zip(split.train.gaussian(), train.gaussian(), strict=True):
        assert torch.equal(one.flatten(), other.flatten())


def test_draws_are_images_with_their_classes_and_the_noise():
    images = torch.linspace(-1, 1, 5).view(5, 1, 1, 1).expand(5, 1, 2, 3)
    law = Images(images, torch.arange(5), noise=0.1)
    x, classes = law.sample(4000, torch.Generator().manual_seed(0))
    rest = x - images[classes]
    assert x.shape == (4000, 1, 2, 3)
    assert float(rest.std()) == pytest.approx(0.1, abs=5 * 0.1 / (2 * rest.numel()) ** 0.5)
    assert torch.bincount(classes).min() > 650  # of 800 expected, standard deviation 25
    mean, cov = law.gaussian()
    assert mean.shape == (1, 2, 3) and cov.shape == (6, 6)
    torch.testing.assert_close(cov.diagonal(), torch.full((6,), 0.625 + 0.01))  # 10/4 · 1/4, and the noise
    assert Images(images, torch.arange(5)).blur(images, torch.Generator()) is images


def test_checksums_are_64_hexadecimal_digits_and_all_different():
    sums = [value for table in data.CHECKSUMS.values() for value in table.values()]
    assert len(set(sums)) == 8
    assert all(len(bytes.fromhex(value)) == 32 for value in sums)
    assert all(list(table) == FILES for table in data.CHECKSUMS.values())


# ---- files that are not as they must be ----------------------------------------------------------------


def images_of(n: int, rows: int = 28, columns: int = 28) -> bytes:
    return idx(np.zeros((n, rows, columns), dtype=np.uint8))


BROKEN = {
    "another content": (
        "train-images",
        images_of(60),
        r"is not train-images-idx3-ubyte of mnist: the SHA-256 checksum",
    ),
    "another label": ("train-labels", idx(np.zeros(60, dtype=np.uint8)), "the SHA-256 checksum of its content must be"),
    "too short": ("t10k-images", images_of(20)[:-1], "is truncated: 20×28×28 needs 15680 bytes, got 15679"),
    "too long": ("t10k-images", images_of(20) + b"0", "has bytes beyond its end"),
    "half a header": ("t10k-labels", idx(np.zeros(20, dtype=np.uint8))[:6], "its header of 8 bytes ends after 6"),
    "another magic": ("t10k-labels", b"PK\3\4 and so on", "whose first bytes are 00 00 08, got 50 4b 03 04"),
    "floats": (
        "train-images",
        idx(np.zeros((2, 28, 28), dtype=">f4"), kind=13),
        "must be an idx file of unsigned bytes",
    ),
    "nothing": ("train-images", b"", "got no content"),
    "images of 32×32": (
        "t10k-images",
        images_of(20, 32, 32),
        "must hold images of 28×28 pixels, got an array 20×32×32",
    ),
    "rows of pixels": ("t10k-images", idx(np.zeros((20, 784), dtype=np.uint8)), "got an array 20×784"),
    "labels as images": ("train-images", idx(np.zeros(60, dtype=np.uint8)), "must hold images of 28×28 pixels"),
    "fewer labels": (
        "train-labels",
        idx(np.zeros(59, dtype=np.uint8)),
        "a label for each of 60 images, got an array 59",
    ),
    "labels in a square": ("t10k-labels", idx(np.zeros((20, 1), dtype=np.uint8)), "got an array 20×1"),
    "an eleventh class": ("t10k-labels", idx(np.full(20, 10, dtype=np.uint8)), "labels from 0 to 9, got 10"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_are_refused_by_name(folder, case):
    part, content, message = BROKEN[case]
    path = next(folder.glob(f"{part}*"))
    path.write_bytes(gzip.compress(content))
    with pytest.raises(ValueError, match=message) as error:
        load_images("mnist", folder)
    assert str(path) in str(error.value)


def test_the_checksum_error_says_both_sums(folder):
    path = folder / "t10k-images-idx3-ubyte.gz"
    wanted, found = data.CHECKSUMS["mnist"]["t10k-images-idx3-ubyte"], hashlib.sha256(images_of(20)).hexdigest()
    path.write_bytes(gzip.compress(images_of(20)))
    with pytest.raises(ValueError, match=f"must be {wanted}, got {found}"):
        load_images("mnist", folder)


def test_files_of_the_other_data_set_are_refused(folder):
    with pytest.raises(ValueError, match="is not train-images-idx3-ubyte of fashion"):
        load_images("fashion", folder)


@pytest.mark.parametrize("damage", [lambda b: b[:-20], lambda b: b"plain" + b, lambda b: b[:60] + b"\0\0\0" + b[63:]])
def test_damaged_gzip_files_are_refused(folder, damage):
    path = folder / "train-images-idx3-ubyte.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte.gz must be a gzip file that can be read"):
        load_images("mnist", folder)


def test_missing_files_are_all_named_with_what_to_do(folder):
    (folder / "train-images-idx3-ubyte.gz").unlink()
    (folder / "t10k-labels-idx1-ubyte.gz").unlink()
    message = r"must hold train-images-idx3-ubyte, t10k-labels-idx1-ubyte, .*toy.mnist download --dataset mnist"
    with pytest.raises(ValueError, match=message):
        load_images("mnist", folder)
    with pytest.raises(ValueError, match=r"must hold train-images.*, train-labels.*, t10k-images.*, t10k-labels"):
        load_images("fashion", folder / "nowhere")


@pytest.mark.parametrize("nothing", [None, ""])
def test_a_folder_is_needed(nothing):
    with pytest.raises(ValueError, match=r"mnist needs a folder with its files \(--data DIR\)"):
        load_images("mnist", nothing)


def test_other_names_are_refused(tmp_path):
    with pytest.raises(ValueError, match="one of digits, mnist, fashion, got 'cifar'"):
        load_images("cifar", tmp_path)
    with pytest.raises(ValueError, match="data sets to download are mnist, fashion, got 'digits'"):
        download("digits", tmp_path)


def test_a_file_that_cannot_be_opened_is_refused(tmp_path):
    with pytest.raises(ValueError, match="must be a file that can be read"):
        read_idx(tmp_path)


# ---- downloads -----------------------------------------------------------------------------------------


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def mirror(folder, monkeypatch):
    """The address of a server of the four files on this machine."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


def test_download_from_the_first_mirror_that_has_the_file(mirror, tmp_path):
    to = tmp_path / "new" / "data"
    came = download("mnist", to, [mirror + "nowhere/", mirror])
    assert came == {str(to / f"{name}.gz"): f"{mirror}{name}.gz" for name in FILES}
    assert len(load_images("mnist", to).train) == 50


def test_download_keeps_what_is_right_and_replaces_what_is_not(mirror, tmp_path):
    to = tmp_path / "data"
    download("mnist", to, [mirror])
    (to / f"{FILES[0]}.gz").write_bytes(gzip.compress(images_of(60)))
    (to / f"{FILES[1]}.gz").unlink()
    (to / FILES[1]).write_bytes(contents()[FILES[1]])  # unpacked
    came = download("mnist", to, [mirror])
    assert [value == "kept" for value in came.values()] == [False, True, True, True]
    load_images("mnist", to)


def test_a_wrong_file_of_a_mirror_never_gets_the_name(mirror, folder, tmp_path):
    (folder / f"{FILES[0]}.gz").write_bytes(gzip.compress(images_of(60)))
    to = tmp_path / "data"
    with pytest.raises(ConnectionError, match=r"ubyte.gz is not train-images-idx3-ubyte of mnist: the SHA-256"):
        download("mnist", to, [mirror])
    assert not to.exists() or not list(to.iterdir())


def test_when_no_mirror_answers_the_error_says_what_was_tried(mirror, tmp_path):
    closed = "http://127.0.0.1:9/"  # the port of "discard"; nothing listens
    with pytest.raises(ConnectionError) as error:
        download("mnist", tmp_path / "data", [mirror + "nowhere/", closed], timeout=5)
    message = str(error.value)
    assert f"{mirror}nowhere/{FILES[0]}.gz: HTTP Error 404" in message
    assert f"{closed}{FILES[0]}.gz: " in message and "refused" in message
    assert "by hand" in message and FILES[3] in message
