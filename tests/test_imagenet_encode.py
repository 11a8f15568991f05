"""Images to moments: ADM's crop, the VAE, what cannot be read, and a run that is killed or shared out."""

import errno
import json
import os
import shutil
import struct
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from imagenet import encode, shards
from imagenet.encode import EncodeConfig, centre_crop, list_images, read_image
from imagenet.latents import Latents
from imagenet.shards import Shards
from imagenet.vae import VAE, to_uint8
from mfm_ref.distributed import Process
from mfm_ref.options import parse
from tests.imagenet_patches import Patches
from tests.imagenet_tiny import CLASSES, SIZE, photographs, tiny_vae

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with images/, 24 photographs of two classes, and vae/."""
    folder = tmp_path_factory.mktemp("tiny")
    photographs(folder / "images")
    tiny_vae(folder / "vae")
    return folder


@pytest.fixture(scope="module")
def encoded(tiny):
    """The record and the folder of an unbroken run."""
    return encode.run(config_of(tiny, tiny / "latents")), tiny / "latents"


def config_of(tiny, out, **options):
    """24 images in shards of 5 and batches of 3."""
    options = {"images": str(tiny / "images"), "vae": str(tiny / "vae"), "workers": 0} | options
    return EncodeConfig(**{"out": out, "size": SIZE, "batch": 3, "shard": 5, **options})


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def joined(folder, name):
    return np.concatenate([np.load(path) for path in sorted(folder.glob(f"shard-*/{name}.npy"))])


# ---- the crop --------------------------------------------------------------------------------------------


def weights(kind, size, length):
    """The matrix `(length, size)` of a resampling of `size` pixels to `length`, from the filters' definitions."""
    ratio = size / length
    stretch = max(ratio, 1.0)  # a filter is stretched to cover what it averages
    centre = (np.arange(length)[:, None] + 0.5) * ratio
    x = np.abs((np.arange(size) + 0.5 - centre) / stretch)
    if kind == "box":  # half-open, in Pillow
        matrix = (x <= 0.5).astype(float)
        matrix[(np.arange(size) + 0.5 - centre) / stretch == -0.5] = 0.0
    else:  # Keys' cubic with a = -1/2
        near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
        matrix = np.where(x < 1, near, np.where(x < 2, far, 0.0))
    return matrix / matrix.sum(1, keepdims=True)


def resampled(pixels, kind, width, height):
    """Columns, then rows, each rounded to bytes."""
    across = np.einsum("ox,yxc->yoc", weights(kind, pixels.shape[1], width), pixels.astype(float))
    across = np.clip(np.floor(across + 0.5), 0, 255)
    down = np.einsum("oy,yxc->oxc", weights(kind, pixels.shape[0], height), across)
    return np.clip(np.floor(down + 0.5), 0, 255)


def crop_by_matrices(pixels, size, *, halve=True, centred=True):
    height, width = pixels.shape[:2]
    while halve and min(height, width) >= 2 * size:
        width, height = width // 2, height // 2
        pixels = resampled(pixels, "box", width, height)
    short = min(height, width)
    width, height = round(width * size / short), round(height * size / short)
    pixels = resampled(pixels, "cubic", width, height)
    top, left = ((height - size) // 2, (width - size) // 2) if centred else (0, 0)
    return pixels[top : top + size, left : left + size]


def noise_image(width, height):
    rng = np.random.default_rng(width + 1000 * height)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize(("width", "height"), [
    (64, 64), (100, 80), (127, 200), (128, 128), (131, 300), (259, 257), (400, 300), (20, 30), (63, 65), (1, 1),
    (3, 40),
])  # fmt: skip
def test_the_crop_is_that_of_the_filters_definitions(width, height):
    """To two levels of 256: Pillow computes with integers."""
    image = noise_image(width, height)
    found = centre_crop(image, 64)
    assert found.shape == (64, 64, 3) and found.dtype == np.uint8
    assert np.abs(found - crop_by_matrices(np.asarray(image), 64)).max() <= 2


@pytest.mark.parametrize("wrong", [{"halve": False}, {"centred": False}])
def test_another_crop_shows(wrong):
    image = noise_image(400, 300)
    assert np.abs(centre_crop(image, 64) - crop_by_matrices(np.asarray(image), 64, **wrong)).max() > 20


def test_an_image_of_the_size_is_itself_and_a_mirror_image_gives_the_mirror_image():
    image = noise_image(64, 64)
    assert np.array_equal(centre_crop(image, 64), np.asarray(image))
    image = noise_image(300, 200)  # 96 pixels wide before the crop: 16 fall away on each side
    mirrored = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    assert np.abs(centre_crop(mirrored, 64) - centre_crop(image, 64)[:, ::-1].astype(int)).max() <= 1


def test_a_circle_stays_a_circle():
    y, x = np.mgrid[:150, :240]
    disc = 255 * ((x - 119.5) ** 2 + (y - 74.5) ** 2 < 50**2)
    found = centre_crop(Image.fromarray(np.repeat(disc[..., None], 3, 2).astype(np.uint8)), 64)[..., 0] / 255.0
    radius, place = 50 * 64 / 150, np.arange(64) - 31.5
    assert found.sum() == pytest.approx(np.pi * radius**2, rel=0.01)
    for marginal in (found.sum(0), found.sum(1)):  # of a disc, with mean 0 and variance r²/4 along each axis
        assert marginal @ place / found.sum() == pytest.approx(0, abs=0.3)
        assert marginal @ place**2 / found.sum() == pytest.approx(radius**2 / 4, rel=0.02)


@pytest.mark.parametrize(("mode", "colour", "expected"), [
    ("L", 100, (100, 100, 100)), ("1", 1, (255, 255, 255)), ("LA", (90, 0), (90, 90, 90)), ("P", 7, (10, 200, 30)),
    ("RGBA", (10, 20, 30, 0), (10, 20, 30)), ("CMYK", (0, 255, 255, 0), (255, 0, 0)),
    ("YCbCr", (128, 128, 128), (128, 128, 128)),
])  # fmt: skip
@pytest.mark.filterwarnings("error")
def test_every_mode_becomes_red_green_and_blue(tmp_path, mode, colour, expected):
    image = Image.new(mode, (90, 70), colour)
    options = {}
    if mode == "P":
        image.putpalette([10, 200, 30] * 256)
        options = {"transparency": b"\x80" * 256}  # of which Pillow warns
    path = tmp_path / ("image.tif" if mode in ("CMYK", "YCbCr") else "image.png")
    image.save(path, **options)
    found = read_image(path, 64)
    assert found.shape == (64, 64, 3)
    assert np.abs(found.astype(int) - expected).max() <= 1


def test_cmyk_jpeg_is_read(tmp_path):
    Image.new("CMYK", (80, 80), (0, 255, 255, 0)).save(tmp_path / "image.jpg")
    assert np.abs(read_image(tmp_path / "image.jpg", 64).astype(int) - (255, 0, 0)).max() <= 3


def test_exif_turns_nothing(tmp_path):
    """ImageNet's crops are of the pixels as they are stored."""
    image, exif = noise_image(80, 70), Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    image.save(tmp_path / "plain.jpg")
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert np.array_equal(read_image(tmp_path / "plain.jpg", 64), read_image(tmp_path / "turned.jpg", 64))


# ---- which images ----------------------------------------------------------------------------------------


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def test_a_tree_is_listed_class_by_class(tmp_path):
    touch(tmp_path / "a", "zebra/2.png", "zebra/1.JPEG", "zebra/deep/er/0.webp", "ant/b.jpg", "ant/notes.txt",
          "ant/._b.jpg", "Bee/c.gif", ".git/x.jpg", "root.jpg")  # fmt: skip
    (tmp_path / "a" / "empty").mkdir()
    touch(tmp_path, "elsewhere/d.png")
    for link in ("link", "ant/inner"):
        (tmp_path / "a" / link).symlink_to(tmp_path / "elsewhere")
    found = list_images(tmp_path / "a")
    assert found.classes == ["Bee", "ant", "empty", "link", "zebra"]
    assert found.files == [
        "Bee/c.gif", "ant/b.jpg", "ant/inner/d.png", "link/d.png",
        "zebra/1.JPEG", "zebra/2.png", "zebra/deep/er/0.webp",
    ]  # fmt: skip
    assert found.labels == [0, 1, 1, 3, 4, 4, 4]
    (tmp_path / "a").rename(tmp_path / "moved")
    assert list_images(tmp_path / "moved").sha256() == found.sha256()
    touch(tmp_path / "moved", "ant/e.jpg")
    assert list_images(tmp_path / "moved").sha256() != found.sha256()


def test_a_list_has_numbers_or_names(tmp_path):
    path = tmp_path / "list.txt"
    path.write_text("b/1.png\t2\n\nwith space.png 0\n  /absolute.jpg   2  \ntab and space.png\t1\n")
    found = list_images(path)
    assert found.files == ["b/1.png", "with space.png", "/absolute.jpg", "tab and space.png"]
    assert found.labels == [2, 0, 2, 1] and found.classes == ["0", "1", "2"]
    assert found.root / found.files[2] == Path("/absolute.jpg")
    path.write_text("1.png cat\n2.png\tant bear\n3.png cat\n4.png n01440764\n")
    found = list_images(path)
    assert found.labels == [1, 0, 1, 2] and found.classes == ["ant bear", "cat", "n01440764"]


@pytest.mark.parametrize(("text", "message"), [
    ("a.png 0\nb.png\n", r"line 2 of .*list.txt must be PATH LABEL, got 'b.png'"),
    ("\n \n", "list.txt must hold lines PATH LABEL, got no image"),
    ("a.png 7\nb.png x\nc.png 9\n", "must be numbers from 0 on, or names alone, got 'x' and '7'"),
    ("a.png 0\nb.png -1\n", "must be numbers from 0 on, or names alone, got '-1' and '0'"),
    ("a.png -1\nb.png -2\n", "must be numbers from 0 on, or names alone, got '-1' and '-1'"),
    ("a.png 1.0\nb.png 10.0\n", "must be numbers from 0 on, or names alone, got '1.0' and '1.0'"),
    ("a.png 1000000\n", "labels in .*list.txt must be below 1000000, got 1000000"),
    (b"\xff\xfe\x00", "list.txt must be a folder, or a text file of lines PATH LABEL: "),
    (None, "list.txt must be a folder, or a text file of lines PATH LABEL: "),
])  # fmt: skip
def test_lists_without_images_are_refused(tmp_path, text, message):
    if text is not None:
        (tmp_path / "list.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message):
        list_images(tmp_path / "list.txt")


def test_a_folder_that_cannot_be_looked_into_ends_the_run(tmp_path, monkeypatch):
    """It is not one without images."""
    touch(tmp_path, "a/1.jpg", "b/2.jpg")
    scandir = os.scandir

    def fails(path):
        if Path(path).name == "b":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", fails)
    with pytest.raises(PermissionError, match="b'"):
        list_images(tmp_path)


def test_a_folder_without_classes_is_refused(tmp_path):
    touch(tmp_path, "b/notes.txt")
    with pytest.raises(ValueError, match="must hold a folder of images for each class, got no image"):
        list_images(tmp_path)
    touch(tmp_path, "a.jpg", "b.png")
    with pytest.raises(
        ValueError, match=f"got 2 images outside of one: move them into a folder .* {tmp_path}/any-name"
    ):
        list_images(tmp_path)


# ---- the VAE ---------------------------------------------------------------------------------------------


def test_a_vae_is_known_by_its_weights(tiny, tmp_path):
    found = VAE.load(str(tiny / "vae"))
    assert (found.scale, found.channels, found.factor) == (0.18215, 4, 8)
    assert (found.identity["id"], found.identity["scale"]) == (str(tiny / "vae"), 0.18215)
    moved = VAE.load(changed(tiny, tmp_path / "old", rename=OLD_NAMES))
    assert moved.identity["sha256"] == found.identity["sha256"]
    found.model.save_pretrained(tmp_path / "pickled", safe_serialization=False)
    assert VAE.load(str(tmp_path / "pickled")).identity["sha256"] == found.identity["sha256"]
    tiny_vae(tmp_path / "other", seed=1)
    assert VAE.load(str(tmp_path / "other")).identity["sha256"] != found.identity["sha256"]


def test_moments_and_decoding_are_those_of_diffusers(tiny):
    ours = VAE.load(str(tiny / "vae"))
    model, x, z = ours.model, torch.rand(2, 3, SIZE, SIZE) * 2 - 1, torch.randn(2, 4, 8, 8, requires_grad=True)
    law = model.encode(x).latent_dist
    mean, log_var = model.quant_conv(model.encoder(x)).chunk(2, 1)
    assert torch.equal(ours.moments(x), torch.cat([law.mean, law.std], 1))
    assert torch.allclose(ours.moments(x), torch.cat([mean, (log_var / 2).exp()], 1), atol=1e-6)
    images = ours.decode(z)
    assert torch.allclose(images, (model.decode(z / 0.18215).sample * 0.5 + 0.5).clamp(0, 1), atol=1e-6)
    images.sum().backward()
    assert z.grad.abs().max() > 0 and not any(p.requires_grad for p in model.parameters())


# Of an attention's weights, in the public files of Stable Diffusion's autoencoders.
OLD_NAMES = {"to_q.": "query.", "to_k.": "key.", "to_v.": "value.", "to_out.0.": "proj_attn."}


def changed(tiny, folder, *, config=None, drop=None, add=None, rename=None):
    """The VAE with another config, other weights or other names."""
    shutil.copytree(tiny / "vae", folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | (config or {})))
    path = folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    for name in drop or []:
        del tensors[name]
    for new, old in (rename or {}).items():
        assert any(new in name for name in tensors)
        tensors = {name.replace(new, old): tensor for name, tensor in tensors.items()}
    save_file(tensors | (add or {}), path)
    return str(folder)


@pytest.mark.parametrize(("change", "message"), [
    ({"drop": ["quant_conv.bias"]}, r"must hold the weights of its config, got .*missing_keys.*quant_conv.bias"),
    ({"add": {"odd": torch.zeros(1)}}, r"must hold the weights of its config, got .*unexpected_keys.*odd"),
    ({"add": {"quant_conv.bias": torch.zeros(3)}}, "must be a folder with the config.json and the weights of an Auto"),
    ({"config": {"shift_factor": 0.1}}, "must scale its latents by one number and no more, got shift_factor"),
    ({"config": {"latents_mean": [0.0] * 4}}, "must scale its latents by one number and no more, got latents_mean"),
])  # fmt: skip
def test_a_vae_of_another_kind_is_refused(tiny, tmp_path, change, message):
    """diffusers draws weights that are missing at random, and goes on."""
    with pytest.raises(ValueError, match=message):
        VAE.load(changed(tiny, tmp_path / "vae", **change))


def test_the_scale_is_that_of_the_config(tiny, tmp_path):
    """And tells a VAE from another one of the same weights."""
    found = VAE.load(changed(tiny, tmp_path / "vae", config={"scaling_factor": 0.5}))
    assert found.scale == found.identity["scale"] == 0.5


def test_a_vae_that_is_not_there_is_refused(monkeypatch, tmp_path):
    message = "must be a folder with .* such as stabilityai/sd-vae-ft-mse; without a connection, .* give the path"
    with pytest.raises(ValueError, match=message):
        VAE.load(str(tmp_path / "nothing"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # diffusers still gives the hub an option that it no longer has
        with pytest.raises(ValueError, match=message):
            VAE.load("nobody/nothing")
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ImportError, match="a VAE needs diffusers: pip install diffusers"):
        VAE.load("nobody/nothing")


def test_bytes_are_the_nearest_levels():
    levels = torch.arange(256.0).reshape(1, 1, 16, 16).expand(2, 3, 16, 16)
    assert np.array_equal(to_uint8(levels / 255)[0, ..., 1].flatten(), np.arange(256))
    for shift in (-0.49, 0.49):
        assert np.array_equal(to_uint8((levels + shift).clamp(0, 255) / 255), to_uint8(levels / 255))
    x = torch.rand(2, 3, 4, 5)
    found = to_uint8(x.bfloat16())
    assert found.shape == (2, 4, 5, 3) and found.flags.c_contiguous
    assert np.abs(found[1, 2, 3, 0] / 255 - float(x[1, 0, 2, 3])) < 0.01


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan"), float("inf")])
def test_bytes_of_other_ranges_are_refused(value):
    images = torch.zeros(1, 3, 2, 2)
    images[0, 1, 1, 1] = value
    with pytest.raises(ValueError, match=r"images must (lie in|be finite)"):
        to_uint8(images)


# ---- encoding --------------------------------------------------------------------------------------------


def test_moments_are_those_of_each_image_and_of_its_mirror_image(tiny, encoded):
    folder = encoded[1]
    moments, labels = joined(folder, "moments"), joined(folder, "labels")
    assert moments.dtype == np.float16 and moments.shape == (24, 2, 8, 8, 8)
    assert labels.tolist() == [0] * 12 + [1] * 12
    assert joined(folder, "numbers").tolist() == list(range(24))
    paths = [path for name in CLASSES for path in sorted((tiny / "images" / name).rglob("*.*"))]
    model = VAE.load(str(tiny / "vae")).model
    for k in (0, 4, 5, 11, 23):
        with Image.open(paths[k]) as image:
            pixels = torch.from_numpy(centre_crop(image, SIZE).astype(np.float32)).permute(2, 0, 1)[None] / 127.5 - 1
        with torch.no_grad():
            wanted = [model.encode(x).latent_dist for x in (pixels, pixels.flip(3))]
        for found, law in zip(torch.from_numpy(moments[k]).float(), wanted, strict=True):
            # float16 rounds by 2⁻¹¹ of a number
            assert torch.allclose(found, torch.cat([law.mean, law.std], 1)[0], rtol=6e-4, atol=1e-5)
        assert np.abs(moments[k, 1] - moments[k, 0, ..., ::-1]).max() > 0.02  # the mirrored latents are no substitute


def test_the_record_says_what_is_there(tiny, encoded):
    record, folder = encoded
    assert json.loads((folder / "latents.json").read_text()) == record
    assert record["vae"] == VAE.load(str(tiny / "vae")).identity
    assert (record["size"], record["shape"], record["flips"]) == (64, [4, 8, 8], True)
    assert record["counts"] == {"images": 24, "encoded": 24, "skipped": 0, "of_each_class": [12, 12]}
    assert record["classes"] == list(CLASSES) and record["skipped"] == []
    assert [shard["rows"] for shard in record["shards"]] == [5, 5, 5, 5, 4]
    shutil.copytree(folder, tiny / "copy")  # sha256sum would say the same
    for shard in record["shards"]:
        for name, digest in shard["sha256"].items():
            assert (
                encode.hashlib.sha256((tiny / "copy" / shard["name"] / f"{name}.npy").read_bytes()).hexdigest()
                == digest
            )


def test_without_flips_and_in_bfloat16(tiny, encoded, tmp_path):
    encode.run(config_of(tiny, tmp_path / "plain", flips=False))
    whole = joined(encoded[1], "moments")
    assert np.array_equal(joined(tmp_path / "plain", "moments"), whole[:, :1])
    encode.run(config_of(tiny, tmp_path / "coarse", flips=False, precision="bfloat16"))
    error = np.abs(joined(tmp_path / "coarse", "moments").astype(float) - whole[:, :1])
    assert 1e-3 < error.max() < 0.1


def test_a_finished_run_does_nothing_and_another_is_refused(tiny, encoded, monkeypatch):
    record, folder = encoded
    before = contents(folder)
    monkeypatch.setattr(VAE, "moments", lambda *_: pytest.fail("all is encoded"))
    assert encode.run(config_of(tiny, folder, batch=7)) == record
    assert contents(folder) == before
    for options, named in (({"size": 72}, "size was 64 and is 72"), ({"flips": False}, "flips was True and is False")):
        with pytest.raises(ValueError, match=f"other settings .*{named}"):
            encode.run(config_of(tiny, folder, **options))
    scaled = changed(tiny, tiny / "scaled", config={"scaling_factor": 0.5})  # of the same weights
    with pytest.raises(ValueError, match=r"other settings \(scale was 0.18215 and is 0.5\)"):
        encode.run(config_of(tiny, folder, vae=scaled))
    with pytest.raises(ValueError, match=r"other settings .*images was '.*'; vae was '.*' and is"):
        shutil.copytree(tiny / "images", tiny / "more", dirs_exist_ok=True)
        (tiny / "more" / CLASSES[0] / "99.png").touch()
        encode.run(config_of(tiny, folder, images=str(tiny / "more"), vae=str(tiny_vae(tiny / "other", seed=1))))
    assert contents(folder) == before


@pytest.mark.parametrize(("options", "message"), [
    ({"images": ""}, "--images is needed"), ({"vae": ""}, "--vae is needed"),
    ({"batch": 0}, "--batch must be an integer >= 1"), ({"shard": 0}, "--shard must be an integer >= 1"),
    ({"device": "abacus"}, "--device must be one that this torch computes on, got 'abacus'"),
    ({"workers": -1}, "--workers must be an integer >= 0"), ({"size": 60}, "must be a multiple of 8 for .*vae, got 60"),
    ({"size": 0}, "must be a multiple of 8"), ({"precision": "float8"}, "--precision must be one of"),
])  # fmt: skip
def test_options_out_of_range_are_refused_before_anything_is_written(tiny, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        encode.run(config_of(tiny, tmp_path / "out", **options))
    assert not (tmp_path / "out").exists()


def test_the_bar_moves_with_each_batch(tiny, tmp_path, monkeypatch):
    """Not when a shard is written, which may be after an hour."""
    monkeypatch.setattr(encode, "VAE", Patches)
    counts = []
    monkeypatch.setattr(shards.tqdm, "update", lambda _, n=1: counts.append(n))
    monkeypatch.setattr(Shards, "write", lambda *_: pytest.fail("now"))
    with pytest.raises(pytest.fail.Exception, match="now"):
        encode.run(config_of(tiny, tmp_path / "out", batch=5, shard=100))
    assert counts == [5, 5, 5, 5, 4]


def test_images_beside_the_class_folders_are_told_of(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(encode, "VAE", Patches)
    images = shutil.copytree(tiny / "images", tmp_path / "images")
    encode.run(config_of(tiny, tmp_path / "out", images=str(images)))
    assert "beside" not in capsys.readouterr().err
    touch(images, "loose.JPEG", "other.png", ".hidden.png", "notes.txt")
    encode.run(config_of(tiny, tmp_path / "out", images=str(images)))
    assert f"{images}: 2 images beside the class folders are left out\n" in capsys.readouterr().err


@pytest.mark.parametrize("value", [1e6, float("nan")])
def test_moments_that_float16_cannot_hold_are_refused(tiny, tmp_path, value):
    tensors = load_file(tiny / "vae" / "diffusion_pytorch_model.safetensors")
    bias = tensors["quant_conv.bias"].clone()
    bias[1] = value
    harmed = changed(tiny, tmp_path / "vae", add={"quant_conv.bias": bias})
    with pytest.raises(ValueError, match=r"moments of china/00.JPEG must be numbers that float16 can hold, got up to "):
        encode.run(config_of(tiny, tmp_path / "out", vae=harmed))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["settings.json"]


# ---- what cannot be read ---------------------------------------------------------------------------------


def corrupt(folder):
    """Files that are no images, each in the way that its name says."""
    folder.mkdir()
    image = noise_image(90, 90)
    image.save(folder / "whole.jpg")
    content = (folder / "whole.jpg").read_bytes()
    (folder / "truncated.jpg").write_bytes(content[: len(content) // 2])
    (folder / "text.jpg").write_text("no image")
    (folder / "empty.jpg").touch()
    image.save(folder / "whole.png")
    content = bytearray((folder / "whole.png").read_bytes())
    content[len(content) // 2] ^= 255
    (folder / "flipped.png").write_bytes(content)
    (folder / "zeros.png").write_bytes(bytes(content[:60]) + bytes(200))
    Image.fromarray(np.full((90, 90), 40000, np.uint16)).save(folder / "deep.png")
    Image.new("RGB", (2, 40000)).save(folder / "thin.png")
    (folder / "far.tif").write_bytes(struct.pack("<4sHHQ", b"II+", 8, 0, 2**63 - 1))  # where no file can be read
    for name in ("whole.jpg", "whole.png"):
        (folder / name).unlink()
    return sorted(path.name for path in folder.iterdir())


def test_what_cannot_be_read_is_listed_and_left_out(tiny, encoded, tmp_path):
    images = tmp_path / "images"
    shutil.copytree(tiny / "images", images)
    names = corrupt(images / "dog")
    for name in names[::2]:
        (images / "dog" / name).rename(images / CLASSES[0] / name)
    record = encode.run(config_of(tiny, tmp_path / "out", images=str(images), shard=7))
    assert len(names) == 8
    assert record["counts"] == {"images": 32, "encoded": 24, "skipped": 8, "of_each_class": [12, 0, 12]}
    reasons = {Path(image["file"]).name: image["reason"] for image in record["skipped"]}
    assert sorted(reasons) == names
    expected = {
        "deep.png": "ValueError: pixels must have 8 bits, got mode I;16",
        "empty.jpg": "cannot identify", "far.tif": "OSError: [Errno 22]",
        "text.jpg": "cannot identify image file", "thin.png": "long and thin",
        "truncated.jpg": "image file is truncated",
    }  # fmt: skip
    for name, reason in expected.items():
        assert reason in reasons[name]
    # The others are encoded as if these were not there, up to their places in batches.
    assert np.allclose(joined(tmp_path / "out", "moments"), joined(encoded[1], "moments"), rtol=1e-2, atol=2e-3)
    assert joined(tmp_path / "out", "labels").tolist() == [0] * 12 + [2] * 12
    kept = [list_images(images).files[k] for k in joined(tmp_path / "out", "numbers")]
    assert kept == list_images(tiny / "images").files


def test_without_an_image_that_can_be_read_there_are_no_latents(tiny, tmp_path):
    corrupt(tmp_path / "dog")
    (tmp_path / "images").mkdir()
    (tmp_path / "dog").rename(tmp_path / "images" / "dog")
    message = r"must hold an image that can be read, got none of 8 \(dog/deep.png: ValueError"
    for _ in range(2):  # and a second run says so too
        with pytest.raises(ValueError, match=message):
            encode.run(config_of(tiny, tmp_path / "out", images=str(tmp_path / "images")))
    assert not (tmp_path / "out" / "latents.json").exists()


@pytest.mark.parametrize("error", [
    OSError(errno.EIO, "Input/output error"), OSError(errno.EACCES, "Permission denied"),
    OSError(errno.ENOENT, "No such file"), MemoryError("no more"),
])  # fmt: skip
def test_trouble_with_the_machine_is_no_fault_of_the_image(tiny, encoded, tmp_path, monkeypatch, error):
    """The run stops, and goes on later as if nothing had been."""
    whole, reads = Image.open, []

    def fails_once(path, *arguments):
        reads.append(path)
        if len(reads) == 8:
            raise error
        return whole(path, *arguments)

    monkeypatch.setattr(Image, "open", fails_once)
    with pytest.raises(type(error), match=str(error.args[-1])):
        encode.run(config_of(tiny, tmp_path / "out"))
    assert (tmp_path / "out" / "shard-00000").exists() and not (tmp_path / "out" / "shard-00001").exists()
    encode.run(config_of(tiny, tmp_path / "out"))
    assert contents(tmp_path / "out") == contents(encoded[1])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_missing_file_ends_the_command_with_one_line(tiny, tmp_path, monkeypatch, workers):
    """In a process of its own too, whose traceback would come along."""
    monkeypatch.setattr(encode, "VAE", Patches)
    images = shutil.copytree(tiny / "images", tmp_path / "images")
    path = images / "flower" / "99.png"
    path.symlink_to(tmp_path / "away.png")
    options = ["--images", images, "--vae", "patches", "--out", tmp_path / "out", "--size", SIZE, "--workers", workers]
    with pytest.raises(SystemExit) as caught:
        encode.main([str(option) for option in options])
    assert str(caught.value) == f"imagenet.encode: [Errno 2] No such file or directory: '{path}'"
    shutil.copy(images / "flower" / "20.png", tmp_path / "away.png")
    encode.main([str(option) for option in options])
    assert len(joined(tmp_path / "out", "numbers")) == 25


def test_mended_images_are_encoded_by_a_later_run(tiny, tmp_path, monkeypatch, capsys):
    """Only their shards are made anew; the line printed says that it can be done."""
    monkeypatch.setattr(encode, "VAE", Patches)
    images = shutil.copytree(tiny / "images", tmp_path / "images")
    path = images / CLASSES[0] / "01.JPEG"
    content = path.read_bytes()
    path.write_bytes(content[:900])
    (images / CLASSES[1] / "22.png").write_text("no image")
    out, made = tmp_path / "out", []
    options = ["--images", images, "--vae", "patches", "--out", out, "--size", SIZE, "--workers", 0, "--shard", 5]
    whole = encode._Encoding.make
    monkeypatch.setattr(encode._Encoding, "make", lambda self, rows: (made.append(rows.start), whole(self, rows))[1])
    for before, lines in ((content[:900], [0, 5, 10, 15, 20]), (content[:900], []), (content, [0])):
        path.write_bytes(before)
        encode.main([str(option) for option in options])
        assert made == lines
        made.clear()
    said = capsys.readouterr().out.splitlines()
    assert (
        said[0]
        == said[1]
        == (
            f"22 images of 2 classes in {out}, 2 that could not be read, listed in {out / 'latents.json'}: "
            "mend them and run again"
        )
    )
    assert said[2].startswith(f"23 images of 2 classes in {out}, 1 that could not be read")
    record = json.loads((out / "latents.json").read_text())
    assert [image["file"] for image in record["skipped"]] == [f"{CLASSES[1]}/22.png"]
    assert joined(out, "numbers").tolist() == [k for k in range(24) if list_images(images).files[k] != "flower/22.png"]


def test_latents_stay_whole_until_mended_images_are_encoded(tiny, tmp_path, monkeypatch):
    """Whatever becomes of the run that mends them; each process looks at its own shards alone."""
    monkeypatch.setattr(encode, "VAE", Patches)
    images, out = shutil.copytree(tiny / "images", tmp_path / "images"), tmp_path / "out"
    path = images / list_images(images).files[7]
    path.rename(tmp_path / "whole")
    path.write_text("no image")
    config = config_of(tiny, out, images=str(images))
    encode.run(config)
    before = contents(out)
    shutil.copy(tmp_path / "whole", path)
    opened, parts = encode._Images(list_images(images), SIZE), shards.parts_of(24, 5)
    found = [encode._mended(opened, Shards(out), parts, Process(rank, 2, torch.device("cpu"))) for rank in (0, 1)]
    assert found == [[], [1]]
    with monkeypatch.context() as harmed:
        harmed.setattr(Patches, "moments", lambda *_: torch.full((1, 6, 8, 8), torch.nan))
        with pytest.raises(ValueError, match="numbers that float16 can hold"):
            encode.run(config)
    assert contents(out) == before and Latents(out).n == 23
    encode.run(config)
    assert Latents(out).n == 24 and joined(out, "numbers").tolist() == list(range(24))


# ---- killed, or shared out -------------------------------------------------------------------------------


KILLS = '''
"""Kill encoding in forks at chosen and at random moments; after each, let it end. Prints how many were killed."""

import json, os, random, signal, sys, threading
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from imagenet import encode, shards
from tests.imagenet_patches import Patches
from tests.killed_run import die_after

random.seed(0)
torch.set_num_threads(1)
tqdm.set_lock(threading.RLock())  # tqdm's own is shared with forks: one that dies with it would stop the others
images, root = sys.argv[1], Path(sys.argv[2])

encode.VAE = Patches

def run(name):
    encode.run(encode.EncodeConfig(images, "patches", root / name, size=64, batch=3, shard=5, workers=0))

def dying(owner, name, call, before=True):
    # Let this process die before or after the `call`-th call of a function.
    function, calls = getattr(owner, name), [0]
    def last(*arguments, **options):
        calls[0] += 1
        if calls[0] == call and before:
            os.kill(os.getpid(), signal.SIGKILL)
        result = function(*arguments, **options)
        if calls[0] == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    setattr(owner, name, last)

MOMENTS = {
    "while a batch is encoded": lambda: dying(Patches, "moments", 6),  # of a shard's two batches with mirror images
    "between two arrays of a shard": lambda: dying(np, "save", 5),
    "after the arrays of a shard": lambda: dying(shards, "save_json", 3),
    "before a shard gets its name": lambda: dying(os, "rename", 2),
    "after it got its name": lambda: dying(os, "rename", 2, before=False),
    "before latents.json": lambda: dying(encode, "save_json", 1),
    **{f"at random, {k}": lambda: die_after(random.randrange(10000)) for k in range(6)},
}
run("whole")
found = {}
for name, prepare in MOMENTS.items():
    child = os.fork()
    if child == 0:
        random.seed(name)
        prepare()
        run(name)
        os._exit(0)
    killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
    left = bool(list((root / name).glob(".*.shard-*")))
    found[name] = {"killed": killed, "left": left, "shards": len(list((root / name).glob("shard-*")))}
    run(name)
print(json.dumps(found))
'''


def test_a_killed_run_ends_as_an_unbroken_one(tiny, tmp_path):
    """Byte for byte, whenever SIGKILL came; what it left half written is not read, and gone at the end."""
    result = subprocess.run(
        [sys.executable, "-c", KILLS, str(tiny / "images"), str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert len(found) == 12 and sum(moment["killed"] for moment in found.values()) >= 9
    assert all(moment["killed"] for name, moment in found.items() if "random" not in name)
    for name in ("between two arrays of a shard", "after the arrays of a shard", "before a shard gets its name"):
        assert found[name]["left"] and found[name]["shards"] == 1
    assert found["after it got its name"]["shards"] == 2 and found["before latents.json"]["shards"] == 5
    whole = contents(tmp_path / "whole")
    assert len(whole) == 5 * 4 + 2
    for name in found:
        assert contents(tmp_path / name) == whole


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_two_processes_write_what_one_writes(tiny, tmp_path, monkeypatch, workers):
    """By the command line; shards that were lost or lack a mended image are made again, and nothing else."""
    monkeypatch.setattr(encode, "VAE", Patches)
    encode.run(config_of(tiny, tmp_path / "one"))
    images = shutil.copytree(tiny / "images", tmp_path / "images")
    path = images / list_images(images).files[7]
    path.write_text("no image")
    encode.run(config_of(tiny, tmp_path / "two", images=str(images)))
    shutil.copy(tiny / "images" / list_images(images).files[7], path)
    for name in ("shard-00002", "shard-00003"):
        shutil.rmtree(tmp_path / "two" / name)
    (tmp_path / "two" / "latents.json").unlink()
    kept = (tmp_path / "two" / "shard-00000" / "moments.npy").stat().st_mtime_ns
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    options = ["--images", images, "--vae", "patches", "--out", tmp_path / "two", "--size", SIZE]
    options += ["--batch", 3, "--shard", 5, "--workers", workers]
    result = subprocess.run(
        [*command, "-m", "tests.imagenet_patches", *map(str, options)],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"24 images of 2 classes in {tmp_path / 'two'}\n"
    assert "images encoded" in result.stderr
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    assert (tmp_path / "two" / "shard-00000" / "moments.npy").stat().st_mtime_ns == kept


def test_the_command_ends_with_one_line(tiny, tmp_path, capsys):
    options = ["--images", str(tiny / "images"), "--vae", "v", "--out", str(tmp_path / "out"), "--device", "cuda:99"]
    with pytest.raises(SystemExit, match=r"^imagenet.encode: --device must be one that .*, got 'cuda:99': .*GPUs"):
        encode.main(options)
    with pytest.raises(SystemExit):
        encode.main(["--help"])
    assert capsys.readouterr().out.startswith("usage: python -m imagenet.encode [")


def test_the_command_line_has_an_option_for_each_setting(tmp_path, capsys):
    config = parse(
        EncodeConfig, "", ["--images", "a", "--vae", "b", "--out", str(tmp_path), "--no-flips", "--size", "128"]
    )
    assert config == EncodeConfig(images="a", vae="b", out=tmp_path, flips=False, size=128)
    with pytest.raises(SystemExit):
        parse(EncodeConfig, "", ["--precision", "float8"])
    assert "invalid choice: 'float8'" in capsys.readouterr().err
