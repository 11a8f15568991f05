"""Latents drawn from moments: what is read of them, and what is refused. Their law: test_imagenet_batches.py."""

import numpy as np
import pytest
import torch

from imagenet import encode
from imagenet.latents import Latents
from imagenet.shards import Shards
from imagenet.vae import VAE
from mfm_ref.files import load_json, save_json
from tests.helpers import LIMIT, z_scores
from tests.imagenet_tiny import CLASSES, SIZE, photographs, tiny_vae

N, SHAPE, SCALE = 22, (2, 3, 2), 0.25
VAE_HERE = {"id": "made up", "sha256": "1234", "scale": SCALE}
STD = 0.125 * torch.tensor([1.0, 2.0]).reshape(2, 1, 1)  # of each channel


def made_up(folder, n=N, size=8, flips=True):
    """Latents whose means say which image they belong to: 8 k, and 4 more where it is mirrored. Class k mod 3."""
    shards, number, facts = Shards(folder, {}), np.arange(n), []
    entries = np.arange(2 if flips else 1)
    mean = np.broadcast_to((8 * number[:, None] + 4 * entries)[..., None, None, None], (n, len(entries), *SHAPE))
    moments = np.concatenate([mean, np.broadcast_to(STD.numpy(), mean.shape)], 2).astype(np.float16)
    for k, first in enumerate(range(0, n, size)):
        part = slice(first, first + size)
        shards.write(k, {"moments": moments[part], "labels": number[part] % 3})
        arrays = shards.info(k)["arrays"]
        facts.append({"name": f"shard-{k:05d}", "sha256": {name: arrays[name]["sha256"] for name in arrays}})
    record = {
        "format": encode.FORMAT, "vae": VAE_HERE, "shape": list(SHAPE), "flips": flips,
        "counts": {"encoded": n}, "classes": ["a", "b", "c"], "shards": facts,
    }  # fmt: skip
    save_json(record, folder / "latents.json")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return made_up(tmp_path_factory.mktemp("latents"))


@pytest.fixture(scope="module")
def latents(folder):
    return Latents(folder)


def taken_apart(x1):
    """Which images, whether mirrored, and their noise in units of its standard deviation, from samples themselves."""
    unscaled = x1 / SCALE
    code = (unscaled.mean((1, 2, 3)) / 4).round()
    return (code // 2).long(), code % 2, (unscaled - 4 * code.reshape(-1, 1, 1, 1)) / STD


# ---- what is there ---------------------------------------------------------------------------------------


def test_moments_labels_and_means_by_row(latents):
    assert (latents.n, latents.n_classes, latents.shape, latents.scale) == (N, 3, SHAPE, SCALE)
    assert latents.labels.dtype == torch.int64 and torch.equal(latents.labels, torch.arange(N) % 3)
    rows = torch.tensor([21, 0, 8, 7, 8])  # across the borders of shards, with one twice
    moments = latents.moments(rows)
    assert moments.dtype == torch.float32 and moments.shape == (5, 4, 3, 2)
    assert torch.equal(moments[:, :2], (8.0 * rows).reshape(-1, 1, 1, 1).expand(5, *SHAPE))
    assert torch.equal(moments[:, 2:], STD.expand(5, *SHAPE))
    mirrored = latents.moments(rows, torch.tensor([1, 0, 1, 0, 0]))
    assert (mirrored - moments)[:, 0, 0, 0].tolist() == [4, 0, 4, 0, 0]
    assert torch.equal(latents.means([3, 1]), SCALE * latents.moments([3, 1])[:, :2])
    assert latents.moments([]).shape == (0, 4, 3, 2)
    latents.verify()


@pytest.mark.parametrize("rows", [[-1], [0, N]])
def test_rows_out_of_range_are_refused(latents, rows):
    with pytest.raises(ValueError, match=rf"rows must lie in 0 … {N - 1}, got "):
        latents.moments(rows)


def test_mirror_images_that_are_not_there_are_refused(tmp_path):
    latents = Latents(made_up(tmp_path, flips=False))
    assert latents.moments([2], [0])[0, 0, 0, 0] == 16
    with pytest.raises(ValueError, match="holds no mirror images: it was encoded with --no-flips"):
        latents.moments([1, 2], [0, 1])


def test_another_vae_is_refused(folder):
    assert Latents(folder, VAE_HERE | {"id": "another place"}).n == N
    here = r"holds latents of the VAE made up \(sha256 1234, scale 0.25\), .*; "
    with pytest.raises(ValueError, match=here + r"got other \(sha256 5678, scale 0.25\)"):
        Latents(folder, VAE_HERE | {"id": "other", "sha256": "5678"})
    with pytest.raises(ValueError, match=here + r"got made up \(sha256 1234, scale 1.0\)"):
        Latents(folder, VAE_HERE | {"scale": 1.0})


def test_unfinished_damaged_and_foreign_folders_are_refused(tmp_path):
    made_up(tmp_path)
    whole = load_json(tmp_path / "latents.json")
    for change, message in (
        ({"format": "2"}, r"latents.json must have the format 'mfm_ref latents 1', got '2'"),
        ({"counts": {"encoded": 9}}, r"latents.json must describe the arrays beside it"),
        ({"shape": [4, 3, 2]}, r"latents.json must describe the arrays beside it"),
        ({"counts": 3}, r"latents.json must say what the latents are: TypeError"),
        ({"shards": whole["shards"] + whole["shards"][:1]}, r"shard-00003/info.json must be a readable"),
    ):
        save_json({**whole, **change}, tmp_path / "latents.json")
        with pytest.raises(ValueError, match=message):
            Latents(tmp_path)
    (tmp_path / "latents.json").unlink()
    with pytest.raises(ValueError, match=r"latents.json is missing: .* must be one that imagenet.encode has finished"):
        Latents(tmp_path)
    save_json(whole, tmp_path / "latents.json")
    path = tmp_path / "shard-00001" / "moments.npy"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"shard-00001/moments.npy must be an array that can be read"):
        Latents(tmp_path)


def test_files_are_compared_with_their_checksums(tmp_path):
    latents = Latents(made_up(tmp_path))
    shards, arrays = Shards(tmp_path, {}), {"moments": latents.moments([0]).numpy()}
    shards.write(1, arrays)  # another shard, whole in itself
    with pytest.raises(ValueError, match=r"shard-00001 must have the checksums"):
        latents.verify()
    path = tmp_path / "shard-00000" / "labels.npy"
    path.write_bytes(path.read_bytes()[:-8] + bytes(8))
    with pytest.raises(ValueError, match=r"shard-00000/labels.npy must have the sha256"):
        latents.verify()


def scores(x1):
    """|z| of the noise's mean and second moment, of its fourth one, of neighbours' products, and of mirroring."""
    _, mirrored, noise = taken_apart(x1)
    flat = noise.flatten(1).double()
    found = [flat, flat**2 - 1, flat**4 - 3, flat[:, 1:] * flat[:, :-1]]
    return [*(float(z_scores(a.flatten(), 0.0).abs()) for a in found), float(z_scores(mirrored.double(), 0.5).abs())]


# ---- all of it, on photographs ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """Photographs encoded by a tiny VAE, and the latter."""
    root = tmp_path_factory.mktemp("real")
    images, vae = photographs(root / "images"), tiny_vae(root / "vae")
    encode.run(encode.EncodeConfig(str(images), str(vae), root / "latents", SIZE, batch=8, shard=10, workers=0))
    return root / "latents", VAE.load(str(vae))


def test_latents_of_photographs(real):
    folder, vae = real
    latents = Latents(folder, vae.identity)
    latents.verify()
    assert (latents.n, latents.classes, latents.shape, latents.scale) == (24, list(CLASSES), (4, 8, 8), vae.scale)
    rows = [3, 20, 11]
    draws = torch.stack(
        [
            latents.draw(range(24), [torch.Generator().manual_seed(24 * k + i) for i in range(24)]).sum()
            for k in range(40)
        ]
    )
    expected = sum(vae.scale * latents.moments(range(24), [entry] * 24)[:, :4].sum() for entry in (0, 1)) / 2
    assert float(z_scores(draws.double(), float(expected)).abs()) < LIMIT
    images = vae.decode(latents.means(rows))
    wanted = (vae.model.decode(latents.moments(rows)[:, :4]).sample / 2 + 0.5).clamp(0, 1)
    assert torch.allclose(images, wanted, atol=1e-5)


def test_another_vae_cannot_decode_them(real, tmp_path):
    with pytest.raises(ValueError, match="holds latents of the VAE"):
        Latents(real[0], VAE.load(str(tiny_vae(tmp_path / "other", seed=1))).identity)
