"""Images read in batches, extractors, and statistics: NumPy and SciPy by another route, closed forms, damaged files."""

import re
import sys
import tracemalloc
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy.linalg import sqrtm
from torch import nn

from imagenet.features import (
    Features,
    Statistics,
    as_tensor,
    count_images,
    distance,
    fit_features,
    image_batches,
    load_callable,
    load_features,
    measure,
    read_statistics,
    remarks,
    save_statistics,
    statistics_of,
)
from tests.helpers import LIMIT
from tests.strategies import SEEDS, rng

DEPRECATED = ".*torch.jit.* is deprecated"  # what only the tests make: scripts are compiled and saved by torch.jit


def images(n, side=4, seed=0):
    """Images of noise."""
    return np.random.default_rng(seed).integers(0, 256, (n, side, side, 3), dtype=np.uint8)


def npz(path, *, compressed=False, **members):
    (np.savez_compressed if compressed else np.savez)(path, **members)
    return path


def pixels(x):
    """An extractor: the first four numbers of each image."""
    return x.flatten(1)[:, :4].float()


def script(path, module):
    """A TorchScript file."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", DEPRECATED, DeprecationWarning)
        torch.jit.save(torch.jit.script(module.eval()), path)
    return path


class Linear(nn.Module):
    """Features that are linear in the image."""

    def __init__(self, weight):
        super().__init__()
        self.register_buffer("weight", weight)

    def forward(self, x):
        return x.to(self.weight.dtype).flatten(1) @ self.weight


class Inception(nn.Module):
    """Class probabilities, or the features when told so: the interface of NVIDIA's TorchScript file."""

    def forward(self, x, return_features: bool = False):
        flat = x.float().flatten(1)[:, :4]
        return flat if return_features else flat.softmax(1)


# ---- images ----------------------------------------------------------------------------------------------


@given(st.integers(1, 9), st.integers(1, 10), st.booleans(), SEEDS)
def test_batches_are_the_array(tmp_path_factory, n, size, compressed, seed):
    there = images(n, side=3, seed=seed % 100)
    path = npz(tmp_path_factory.mktemp("images") / "a.npz", compressed=compressed, arr_0=there, arr_1=np.arange(n))
    batches = list(image_batches(path, size))
    assert count_images(path) == n
    assert [len(batch) for batch in batches] == [size] * (n // size) + [n % size] * (n % size > 0)
    np.testing.assert_array_equal(np.concatenate(batches), there)
    assert torch.equal(as_tensor(batches[0])[0], torch.tensor(there[0]).permute(2, 0, 1))


def peak(read):
    """The most memory that NumPy and Python have at once, in bytes."""
    tracemalloc.start()
    read()
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return most


@pytest.mark.parametrize("compressed", [False, True])
def test_memory_is_that_of_a_batch(tmp_path, compressed):
    """8 MB of images, in batches of 0.2 MB; np.load takes all of it."""
    there = images(170, side=128)
    path = npz(tmp_path / "a.npz", compressed=compressed, arr_0=there)
    assert peak(lambda: [batch.sum() for batch in image_batches(path, 4)]) < 1.5e6
    assert peak(lambda: np.load(path)["arr_0"].sum()) > 8e6


def test_images_that_are_not_those_of_adm_are_refused(tmp_path):
    good = images(2)
    for wrong, got in {
        "float": (good / 255, r"float64 \(2, 4, 4, 3\)"),
        "channels first": (good.transpose(0, 3, 1, 2).copy(), r"uint8 \(2, 3, 4, 4\)"),
        "grey": (good[..., :1], r"uint8 \(2, 4, 4, 1\)"),
        "one image": (good[0], r"uint8 \(4, 4, 3\)"),
        "none": (good[:0], r"uint8 \(0, 4, 4, 3\)"),
    }.values():
        path = npz(tmp_path / "wrong.npz", arr_0=wrong)
        for read in (count_images, lambda path: next(image_batches(path)), statistics_of):
            with pytest.raises(ValueError, match=rf"wrong\.npz.*arr_0 must be uint8 \(n, H, W, 3\).*got {got}"):
                read(path)


def test_damaged_files_are_refused_by_name(tmp_path):
    path = npz(tmp_path / "a.npz", arr_0=images(50))
    whole = path.read_bytes()

    def refused(content, match):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"a\.npz must be a readable npz file .*, or a folder of images: {match}"):
            list(image_batches(path, 8))

    refused(whole[: len(whole) // 2], "File is not a zip file")
    refused(b"", "File is not a zip file")
    middle = len(whole) // 2
    refused(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :], "Bad CRC-32")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("arr_0.npy", whole[whole.index(b"\x93NUMPY") :][:500])
    refused(path.read_bytes(), "arr_0 ends before its 50 images do")
    np.savez(path, other=images(2))
    refused(path.read_bytes(), "There is no item named 'arr_0.npy'")
    np.save(tmp_path / "b.npy", images(2))
    refused((tmp_path / "b.npy").read_bytes(), "File is not a zip file")
    path.unlink()
    for read in (count_images, statistics_of):
        with pytest.raises(ValueError, match=r"a\.npz must be a readable npz file.*No such file"):
            read(path)


def write_folder(folder, there):
    """PNG files in folders of a class each, one deeper, beside what is no image."""
    names = [f"{'ab'[k % 2]}/{'deep/' * (k == 2)}{k}.{'PNG' if k == 1 else 'png'}" for k in range(len(there))]
    for name, image in zip(names, there, strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / name)
    (folder / "list.txt").write_text("no image")
    (folder / ".hidden.png").write_bytes(b"no image")
    return [there[k] for k in sorted(range(len(there)), key=lambda k: Path(names[k]))]


@pytest.mark.parametrize("loose", [True, False])
def test_a_folder_of_images_is_read_as_a_file_is(tmp_path, loose):
    """In the order of paths, in batches; of images that have the size, the crop is the image."""
    there = images(7)
    expected = write_folder(tmp_path, there)
    if loose:
        Image.fromarray(there[0]).save(tmp_path / "0.png")
        expected = [there[0], *expected]
    found = list(image_batches(tmp_path, 3, size=4))
    assert [len(batch) for batch in found] == [3, 3, 2] if loose else [3, 3, 1]
    np.testing.assert_array_equal(np.concatenate(found), expected)
    assert count_images(tmp_path) == len(expected)
    name = f"{__name__}:pixels"
    a = statistics_of(tmp_path, name, size=4)
    b = statistics_of(npz(tmp_path / "a.npz", arr_0=np.stack(expected)), name)
    assert torch.equal(a.cov, b.cov) and torch.equal(a.mean, b.mean) and a.count == b.count
    assert next(image_batches(tmp_path, 1, size=2)).shape == (1, 2, 2, 3)


def test_memory_is_that_of_a_batch_of_files(tmp_path):
    for k, image in enumerate(images(40, side=128)):
        Image.fromarray(image).save(tmp_path / f"{k}.png")
    assert peak(lambda: [batch.sum() for batch in image_batches(tmp_path, 4, size=128)]) < 1.2e6 < 40 * 3 * 128**2


def test_a_folder_that_cannot_be_read_is_refused_by_name(tmp_path):
    (tmp_path / "class").mkdir()
    for read in (count_images, statistics_of):
        with pytest.raises(ValueError, match=r"must be .* or a folder of images: this folder has no images"):
            read(tmp_path)
    (tmp_path / "class" / "a.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"class/a\.png must be an image that can be read: cannot identify"):
        list(image_batches(tmp_path))


@pytest.mark.parametrize("below", ["", "t0.5/mfm-2"])
def test_pictures_of_a_run_are_no_samples(tmp_path, below):
    """Beside a samples.npz, at whatever depth; one that has images is named before one that has latents."""
    Image.fromarray(images(1)[0]).save(tmp_path / "grid.png")
    folder = tmp_path / below
    folder.mkdir(parents=True, exist_ok=True)
    assert count_images(tmp_path) == 1
    for name, words in (
        ("latents.npz", "{} has only latents: use --vae"),
        ("samples.npz", "give {}, not the folder of the run"),
    ):
        (folder / name).touch()
        with pytest.raises(ValueError, match=re.escape(words.format(folder / name))):
            count_images(tmp_path)


# ---- extractors ------------------------------------------------------------------------------------------


def test_a_torchscript_file_is_an_extractor(tmp_path):
    weight = torch.randn(48, 5, generator=rng(0), dtype=torch.float64)
    found = load_features(str(script(tmp_path / "linear.pt", Linear(weight))))
    x = as_tensor(images(3))
    np.testing.assert_allclose(found(x).numpy(), x.numpy().reshape(3, 48).astype(float) @ weight.numpy(), rtol=1e-12)
    other = load_features(str(script(tmp_path / "other.pt", Linear(weight + 1))))
    assert found.name.startswith("TorchScript, SHA-256 ") and found.name != other.name


def test_an_inception_that_can_give_features_is_asked_for_them(tmp_path):
    """Without return_features it gives class probabilities, whose distances are no FID."""
    found = load_features(str(script(tmp_path / "inception.pt", Inception())))
    x = as_tensor(images(3))
    assert torch.equal(found(x), pixels(x))
    assert not torch.equal(Inception()(x), pixels(x))


def test_a_callable_is_an_extractor():
    found = load_features(f"{__name__}:pixels")
    assert (found.name, found.extract) == (f"{__name__}:pixels", pixels)
    assert load_callable("torch:nn.functional.relu") is torch.nn.functional.relu


@pytest.mark.parametrize(
    ("spec", "match"),
    [
        ("inception", "must be \"torch-fidelity\", a TorchScript file or module:function, got 'inception'"),
        ("missing.pt", "must be .* a TorchScript file"),
        ("no_such_module:f", "no_such_module:f must be a function that can be imported: No module named"),
        ("torch:no_such_name", "torch:no_such_name must be .* has no attribute 'no_such_name'"),
        ("torch:__version__", "torch:__version__ must be a function, got TorchVersion"),
        (":f", "module:function, got ':f'"),
        ("torch:", "module:function, got 'torch:'"),
    ],
)
def test_other_extractors_are_refused(spec, match):
    with pytest.raises(ValueError, match=match):
        load_features(spec)


def test_a_file_that_is_no_torchscript_is_refused(tmp_path):
    (tmp_path / "a.pt").write_bytes(b"weights")
    torch.save({"weight": torch.zeros(1)}, tmp_path / "b.pt")
    script(tmp_path / "c.pt", nn.Module())
    for name in ("a.pt", "b.pt", "c.pt"):
        with pytest.raises(ValueError, match=rf"{name} must be a TorchScript file of a module with a forward: [^\n]*$"):
            load_features(str(tmp_path / name))


@pytest.fixture
def fidelity(tmp_path, monkeypatch):
    """torch_fidelity as a package of what is given, in place of one that may be installed."""
    for name in [name for name in sys.modules if name.split(".")[0] == "torch_fidelity"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    load_features.cache_clear()

    def install(text):
        (tmp_path / "torch_fidelity").mkdir()
        (tmp_path / "torch_fidelity" / "__init__.py").touch()
        (tmp_path / "torch_fidelity" / "feature_extractor_inceptionv3.py").write_text(text)

    yield install
    for name in [name for name in sys.modules if name.split(".")[0] == "torch_fidelity"]:
        del sys.modules[name]
    load_features.cache_clear()


def test_torch_fidelity_that_cannot_be_imported_says_what_to_install(fidelity, monkeypatch):
    """A torchvision that was built for another torch raises RuntimeError; a package that is missing, ImportError."""
    words = r"install torch-fidelity and a torchvision built for torch .*or give --features the path"
    fidelity("raise RuntimeError('operator torchvision::nms does not exist')")
    with pytest.raises(ValueError, match=rf"torchvision::nms does not exist.*{words}"):
        load_features("torch-fidelity")
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(ValueError, match=rf"torch-fidelity cannot be imported.*{words}"):
        load_features("torch-fidelity")


def test_torch_fidelity_without_its_weights_says_where_they_go(fidelity):
    fidelity("class FeatureExtractorInceptionV3:\n    def __init__(self, *a): raise OSError('no network')")
    with pytest.raises(ValueError, match=r"cannot get its weights \(no network\).*cache of torch\.hub"):
        load_features("torch-fidelity")


def test_torch_fidelity_gives_a_tuple_of_which_the_features_are_taken(fidelity):
    fidelity(
        "import torch\n"
        "class FeatureExtractorInceptionV3(torch.nn.Module):\n"
        "    def __init__(self, name, features):\n"
        "        super().__init__()\n"
        "        assert features == ['2048']\n"
        "    def forward(self, x):\n"
        "        assert x.dtype == torch.uint8\n"
        "        return (x.flatten(1)[:, :4].float(),)\n"
    )
    found = load_features("torch-fidelity")
    assert torch.equal(found(as_tensor(images(3))), pixels(as_tensor(images(3))))


@pytest.mark.parametrize(
    ("extract", "match"),
    [
        (lambda x: x.float(), r"\(2, F\) of 2 images, got \(2, 3, 4, 4\)"),
        (lambda x: x.float().flatten(1).mean(0, keepdim=True), r"got \(1, 48\)"),
        (lambda x: [x], "got list"),
        (lambda x: x.float().flatten(1) / 0, "the features by it must be finite"),
    ],
)
def test_features_that_are_none_are_refused(extract, match):
    with pytest.raises(ValueError, match=match):
        Features("it", extract)(as_tensor(np.maximum(images(2), 1)))


# ---- statistics ------------------------------------------------------------------------------------------


@given(st.integers(2, 20), st.integers(1, 21), SEEDS)
def test_statistics_are_numpys_whatever_the_batch(tmp_path_factory, n, size, seed):
    there = images(n, seed=seed % 100)
    path = npz(tmp_path_factory.mktemp("images") / "a.npz", arr_0=there)
    found = statistics_of(path, f"{__name__}:pixels", batch=size)
    expected = there.transpose(0, 3, 1, 2).reshape(n, -1)[:, :4].astype(float)
    np.testing.assert_allclose(found.mean.numpy(), expected.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.cov.numpy(), np.cov(expected, rowvar=False), rtol=1e-9, atol=1e-9)
    assert (found.count, found.features, found.mean.dtype) == (n, f"{__name__}:pixels", torch.float64)


def test_statistics_are_kept_as_adm_keeps_them(tmp_path):
    path = npz(tmp_path / "a.npz", arr_0=images(9))
    found = statistics_of(path, f"{__name__}:pixels")
    save_statistics(found, tmp_path / "kept" / "s.npz")
    assert [entry.name for entry in (tmp_path / "kept").iterdir()] == ["s.npz"]
    with np.load(tmp_path / "kept" / "s.npz") as file:
        np.testing.assert_array_equal(file["mu"], found.mean.numpy())
        np.testing.assert_array_equal(file["sigma"], found.cov.numpy())
    again = statistics_of(tmp_path / "kept" / "s.npz", "not loaded")
    assert torch.equal(again.mean, found.mean) and torch.equal(again.cov, found.cov)
    assert (again.count, again.features) == (9, f"{__name__}:pixels")


def test_a_reference_of_adm_is_its_statistics_not_its_images(tmp_path):
    """Theirs have 10,000 images for other measures beside the moments of all, and do not say of how many."""
    mean, cov = np.arange(4.0, dtype=np.float32), np.eye(4)
    path = npz(tmp_path / "reference.npz", arr_0=images(3), mu=mean, sigma=cov, mu_s=mean, sigma_s=cov)
    found = statistics_of(path, "not loaded")
    assert found.mean.tolist() == [0, 1, 2, 3]
    assert (found.count, found.features, found.cov.dtype, remarks("it", found)) == (None, None, torch.float64, [])


@pytest.mark.parametrize(
    ("members", "match"),
    [
        ({"mu": np.zeros(3)}, r"got \(3,\) and \(\)"),
        ({"sigma": np.eye(3)}, r"got \(\) and \(3, 3\)"),
        ({"mu": np.zeros(3), "sigma": np.eye(4)}, r"got \(3,\) and \(4, 4\)"),
        ({"mu": np.zeros((1, 3)), "sigma": np.eye(3)}, r"got \(1, 3\) and \(3, 3\)"),
        ({"mu": np.array(list("abc")), "sigma": np.eye(3)}, "must hold numbers"),
        ({"mu": np.array([0, np.nan]), "sigma": np.eye(2)}, r"mu and sigma of .*a\.npz must be finite"),
        ({"mu": np.zeros(2), "sigma": np.full((2, 2), np.inf)}, "must be finite"),
    ],
)
def test_wrong_statistics_are_refused(tmp_path, members, match):
    with pytest.raises(ValueError, match=match):
        read_statistics(npz(tmp_path / "a.npz", **members))


def test_one_image_has_no_covariance(tmp_path):
    with pytest.raises(ValueError, match=r"a\.npz must have at least two images, got 1"):
        statistics_of(npz(tmp_path / "a.npz", arr_0=images(1)), f"{__name__}:pixels")


# ---- distances -------------------------------------------------------------------------------------------


def normal_images(n, mean, scale, seed):
    """Images of independent normal pixels around a mean, rounded; their variance is scale² + 1/12 by Sheppard."""
    noise = np.random.default_rng(seed).standard_normal((n, 4, 4, 3))
    return np.clip(np.rint(mean + scale * noise), 0, 255).astype(np.uint8)


def test_the_distance_of_normal_images_is_in_closed_form():
    """Linear features of N(m, c² I): |W(m − m′)|² + (c − c′)² tr W Wᵀ. 12 pairs of 4,000, each: z of 6e-7.

    The bias of a pair, some F/n of the traces, is a tenth of the standard error; half the shift is seen, and so are
    equal scales.
    """
    weight = torch.randn(48, 3, generator=rng(0), dtype=torch.float64) / 48
    extract, means, scales = Features("linear", Linear(weight)), (120.0, 130.0), (10.0, 16.0)
    found = []
    for k in range(12):
        sets = [normal_images(4000, means[i], scales[i], 2 * k + i) for i in range(2)]
        fits = [fit_features(np.array_split(x, 5), extract) for x in sets]
        a, b = (Statistics(fit.mean, fit.cov, fit.count, "linear", "it") for fit in fits)
        found.append(distance(a, b))
    apart, trace = float((10 * weight.sum(0)).square().sum()), float(weight.square().sum())
    stds = [(c**2 + 1 / 12) ** 0.5 for c in scales]

    def score(expected):
        return abs(np.mean(found) - expected) / (np.std(found, ddof=1) / len(found) ** 0.5)

    assert score(apart + (stds[0] - stds[1]) ** 2 * trace) < LIMIT
    assert score(apart / 4 + (stds[0] - stds[1]) ** 2 * trace) > LIMIT
    assert score(apart) > LIMIT


@given(st.integers(2, 30), SEEDS)
def test_the_distance_is_scipys(n, seed):
    """‖μ − ν‖² + tr(A + B − 2 (AB)^½), for few images, too; zero for equal sets; symmetric."""
    extract = Features("pixels", pixels)
    sets = [images(n, seed=seed % 1000 + k) for k in range(2)]
    fits = [fit_features([x], extract) for x in sets]
    a, b = (Statistics(fit.mean, fit.cov, fit.count, "pixels", "it") for fit in fits)
    product = sqrtm(a.cov.numpy() @ b.cov.numpy() + 1e-7 * np.eye(4))
    expected = float(((a.mean - b.mean) ** 2).sum() + a.cov.trace() + b.cov.trace()) - 2 * np.trace(product).real
    assert distance(a, b) == pytest.approx(expected, rel=1e-4)
    assert distance(b, a) == pytest.approx(distance(a, b), rel=1e-9)
    assert distance(a, a) < 1e-8 * float(a.cov.trace())


def test_features_that_do_not_go_together_are_refused_by_name():
    def statistics(size, features, source):
        return Statistics(torch.zeros(size).double(), torch.eye(size).double(), None, features, source)

    with pytest.raises(ValueError, match=r"reference\.npz has 2048 and samples\.npz 64 of them"):
        distance(statistics(2048, None, "reference.npz"), statistics(64, "a:b", "samples.npz"))
    with pytest.raises(ValueError, match=r"a\.npz has those by m:f and b\.npz those by m:g"):
        distance(statistics(4, "m:f", "a.npz"), statistics(4, "m:g", "b.npz"))
    assert distance(statistics(4, None, "a.npz"), statistics(4, "m:g", "b.npz")) == 0


def test_a_distance_is_called_fid_only_for_the_inception(tmp_path):
    """Whichever side says its features; not for another function of 2048 features."""

    def called(*names):
        return measure(*(Statistics(torch.zeros(1), torch.eye(1), None, name, "it") for name in names))

    linear = load_features(str(script(tmp_path / "linear.pt", Linear(torch.zeros(48, 1))))).name
    assert called("torch-fidelity, 2048 features", None) == "FID (torch-fidelity, 2048 features)"
    assert called(None, linear) == f"FID ({linear[:29]})" and len(linear) == 85
    assert called("m:f", None) == called(None, "m:f") == "Fréchet distance (m:f)"
    assert called(None, None) == "Fréchet distance (features unknown)"


def test_few_images_are_remarked_upon():
    """n images have a covariance of rank n − 1 at most: the remark ends at F + 1 of them."""
    for n, said in ((4, True), (5, False)):
        fit = fit_features([images(n)], Features("pixels", pixels))
        found = Statistics(fit.mean, fit.cov, fit.count, "pixels", "it")
        assert (np.linalg.matrix_rank(found.cov.numpy()) < 4) == said
        assert bool(remarks("the set", found)) == said
    fit = fit_features([images(4)], Features("pixels", pixels))
    assert "the set has 4 images for 4 features" in remarks("the set", Statistics(fit.mean, fit.cov, 4, None, "it"))[0]
