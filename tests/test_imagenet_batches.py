"""The batches of a training run: one order and one chance, however a global batch is cut, stopped or shared."""

import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from imagenet.batches import GlobalBatches, parts_of_a_step
from imagenet.latents import GivenLatents, Latents, open_latents
from imagenet.npz import write_npz
from mfm_ref.data import check_position, is_elastic
from mfm_ref.paper_recipe import PaperRows, RowLaw
from tests.helpers import LIMIT
from tests.test_imagenet_latents import SCALE, SHAPE, STD, N, made_up, scores, taken_apart

LAW = RowLaw("mfm", "uniform", 3, 0.2, 2.5)
BATCH = 12


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    return Latents(made_up(tmp_path_factory.mktemp("latents")))


@pytest.fixture(scope="module")
def given_latents(tmp_path_factory):
    path = tmp_path_factory.mktemp("given") / "latents.npz"
    x1 = np.arange(5 * 12, dtype=np.float32).reshape(5, *SHAPE)
    write_npz(path, [x1[:2], x1[2:]], np.array([0, 1, 2, 1, 0]))
    return GivenLatents(path), torch.from_numpy(x1)


def steps(latents, count, *, world=1, micro=BATCH, start=0, law=LAW, seed=0, batch=BATCH):
    """The rows of some steps of all processes, put in the order of a whole step: (count, terms, batch, …) each."""
    found = []
    for rank in range(world):
        data = GlobalBatches(latents, batch, micro=micro, law=law, seed=seed, rank=rank, world=world)
        data.load_state_dict(data.state_dict() | {"step": start})
        parts = [next(data) for _ in range(count * data.accumulate)]
        assert all(n == micro for _, n in parts)
        found.append([torch.stack(tensors) for tensors in zip(*(rows for rows, _ in parts), strict=True)])
    joined = []
    for tensors in zip(*found, strict=True):
        a = torch.stack(tensors, 1).unflatten(2, (-1, micro)).unflatten(0, (count, -1))
        joined.append(a.movedim(3, 1).flatten(2, 4))  # of (count, accumulate, world, terms, micro, …)
    return PaperRows(*joined)


# ---- order and chance ------------------------------------------------------------------------------------


@given(
    layout=st.sampled_from([(1, 12), (1, 4), (1, 1), (2, 6), (2, 3), (3, 2), (4, 3), (6, 1)]),
    start=st.integers(0, 4),
    stage=st.sampled_from(["flow", "mfm"]),
)
def test_a_step_is_the_same_however_it_is_cut(latents, layout, start, stage):
    """On any number of processes and in passes of any size, from any step on: every tensor to the bit."""
    world, micro = layout
    law = LAW._replace(stage=stage)
    whole, cut = steps(latents, 6, law=law), steps(latents, 2, world=world, micro=micro, start=start, law=law)
    for a, b in zip(whole, cut, strict=True):
        assert torch.equal(a[start : start + 2], b)


def test_the_helper_above_sees_another_order(latents):
    whole = steps(latents, 2)
    for change in ({"seed": 1}, {"start": 1}):
        assert not torch.equal(whole.z, steps(latents, 2, **change).z)


def images_of(rows):
    """Which images they are of, whether mirrored, and the VAE's noise: x₁ = z + (1−s) velocity."""
    s = rows.s.reshape(*rows.s.shape, 1, 1, 1)
    x1 = rows.z + (1 - s) * rows.velocity
    return x1, *taken_apart(x1.flatten(0, 2))


def test_every_image_comes_once_an_epoch_and_batches_cross_epochs(latents):
    """22 images in steps of 12: 11 steps are 6 epochs, of different orders."""
    _, images, _, _ = images_of(steps(latents, 11, law=LAW._replace(stage="flow")))
    epochs = images.reshape(6, N)
    for epoch in epochs:
        assert sorted(epoch.tolist()) == list(range(N))
    assert not torch.equal(epochs[0], epochs[1])


def test_more_images_in_a_step_than_there_are(given_latents):
    source, x1 = given_latents
    rows = steps(source, 1, batch=20, micro=5, law=LAW._replace(stage="flow", drop=0.0))
    found = (rows.z + (1 - rows.s.reshape(1, 1, -1, 1, 1, 1)) * rows.velocity)[0, 0]
    numbers = (found.flatten(1)[:, 0] / 12).round().long()
    assert torch.bincount(numbers).tolist() == [4] * 5
    assert torch.allclose(found, x1[numbers], atol=1e-4)
    assert torch.equal(rows.y[0, 0], source.labels[numbers])


def test_moments_have_their_law_and_both_terms_one_image(latents):
    """Mean and standard deviation as recorded, mirrored by half, noise of its own in each image and step."""
    rows = steps(latents, 300)
    x1, images, _, noise = images_of(rows)
    assert torch.allclose(x1[:, 0], x1[:, 1], atol=1e-4)
    first = x1[:, 0].flatten(0, 1)
    assert max(scores(first)) < LIMIT
    kept = rows.y[:, 0].flatten() != 3
    assert torch.equal(rows.y[:, 0].flatten()[kept], (taken_apart(first)[0] % 3)[kept])
    assert torch.pdist(noise.reshape(300, 2, BATCH, *SHAPE)[:20, 0].flatten(0, 1).flatten(1)).min() > 0.5
    doubled = SCALE * (4 * (first / SCALE / 4).mean((1, 2, 3)).round().reshape(-1, 1, 1, 1))
    assert max(scores(doubled + 2 * (first - doubled))) > LIMIT
    assert STD.shape == (2, 1, 1) and len(images) == 300 * 2 * BATCH


# ---- positions -------------------------------------------------------------------------------------------


def test_a_position_is_that_of_the_steps_that_were_taken(latents):
    """Not of those prepared ahead; the same in every process, and for every cut; and one that a checkpoint holds."""
    positions = []
    for world, micro in ((1, 12), (1, 4), (3, 2)):
        for rank in range(world):
            data = GlobalBatches(latents, BATCH, micro=micro, law=LAW, rank=rank, world=world)
            for _ in range(2 * data.accumulate):
                next(data)
            positions.append(data.state_dict())
            check_position(positions[-1])
            assert is_elastic(data)
    assert all(position == positions[0] for position in positions) and positions[0]["step"] == 2


def test_going_back_drops_what_was_prepared(latents):
    data = GlobalBatches(latents, BATCH, micro=4, law=LAW)
    start, first = data.state_dict(), next(data)[0]
    for _ in range(5):
        next(data)
    data.load_state_dict(start)
    assert all(torch.equal(a, b) for a, b in zip(next(data)[0], first, strict=True))


def test_a_position_within_a_step_and_one_of_other_data_are_refused(latents, given_latents):
    data = GlobalBatches(latents, BATCH, micro=4, law=LAW)
    next(data)
    with pytest.raises(ValueError, match="a position is one between steps, got 1 of 3 micro-batches of one"):
        data.state_dict()
    for other in (
        GlobalBatches(latents, BATCH, micro=4, law=LAW, seed=1),
        GlobalBatches(latents, 24, micro=4, law=LAW),
        GlobalBatches(given_latents[0], BATCH, micro=4, law=LAW),
    ):
        with pytest.raises(ValueError, match="the position must be one of data with"):
            data.load_state_dict(other.state_dict())


def test_batches_are_made_in_a_thread_ahead_of_their_use(latents, monkeypatch):
    data = GlobalBatches(latents, BATCH, micro=4, law=LAW)
    places, made, done = [], data.made, threading.Event()

    def watched(number):
        places.append((number, threading.current_thread() is threading.main_thread()))
        if number == 2:
            done.set()
        return made(number)

    monkeypatch.setattr(data, "made", watched)
    next(data)
    assert done.wait(10)
    assert places[:3] == [(0, False), (1, False), (2, False)]


# ---- what is refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"micro": 5}, r"the global batch must be a multiple of micro times the number of processes, 5 · 1, got 12"),
        ({"world": 5}, r"4 · 5, got 12"),
        ({"micro": 0}, "micro must be an integer >= 1"),
        ({"rank": 1}, "rank must be from 0 to 0, got 1"),
        ({"seed": -1}, "seed must be an integer >= 0"),
        ({"law": LAW._replace(drop=2.0)}, "drop and plain_rate must lie in"),
    ],
)
def test_cuts_that_do_not_fit_are_refused(latents, change, match):
    with pytest.raises(ValueError, match=match):
        GlobalBatches(latents, BATCH, **({"micro": 4, "law": LAW} | change))


def test_parts_of_a_step():
    assert parts_of_a_step(512, 64, 4) == 2


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_latents_that_are_not_finite_name_their_shard(tmp_path, value):
    """In whichever thread they are found, the error comes with the batch."""
    folder = made_up(tmp_path)
    path = folder / "shard-00001" / "moments.npy"
    moments = np.load(path)
    moments[3, :, 1, 2, 0] = value  # image 11
    np.save(path, moments)
    data = GlobalBatches(Latents(folder), 22, micro=2, law=LAW)
    with pytest.raises(ValueError, match=r"shard-00001/moments.npy must hold finite numbers, .* of image 11"):
        for _ in range(11):
            next(data)


def test_after_a_run_no_thread_reads(latents):
    """A file that is cut short while a thread still reads it, mapped into memory, would end the whole program."""
    started = []

    class Slow:
        """`latents`, a tenth of a second late."""

        def __getattr__(self, name):
            return getattr(latents, name)

        def draw(self, images, generators):
            started.append(threading.current_thread())
            time.sleep(0.1)
            return latents.draw(images, generators)

    with pytest.raises(KeyError), GlobalBatches(Slow(), BATCH, micro=4, law=LAW) as data:
        first = next(data)[0]
        raise KeyError
    count = len(started)
    assert not any(thread.is_alive() for thread in started)
    time.sleep(0.3)
    assert len(started) == count
    whole = GlobalBatches(latents, BATCH, micro=4, law=LAW)
    for rows in (first, next(data)[0]):  # goes on where it was
        assert torch.equal(rows.x, next(whole)[0].x)
    data.close()


def test_a_shard_that_was_cut_short_is_named(tmp_path):
    path = made_up(tmp_path) / "shard-00002" / "moments.npy"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"shard-00002/moments.npy must be an array that can be read"):
        open_latents(tmp_path)


# ---- latents of samples ----------------------------------------------------------------------------------


def test_given_latents_are_as_they_are(given_latents):
    source, x1 = given_latents
    assert (source.n, source.shape, source.n_classes) == (5, SHAPE, 3)
    assert torch.equal(source.draw([3, 0], []), x1[[3, 0]])
    assert source.labels.tolist() == [0, 1, 2, 1, 0] and source.labels.dtype == torch.int64
    assert isinstance(open_latents(source.path), GivenLatents)


def test_files_that_hold_no_latents_are_refused(tmp_path, given_latents):
    with pytest.raises(ValueError, match="--latents must name a folder"):
        open_latents("")
    (tmp_path / "cut.npz").write_bytes(given_latents[0].path.read_bytes()[:-60])
    for name in ("missing.npz", "cut.npz"):
        with pytest.raises(ValueError, match=f"{name} must be a latents.npz that imagenet.sample wrote"):
            open_latents(tmp_path / name)
    write_npz(tmp_path / "images.npz", [np.zeros((2, 8, 8, 3), np.uint8)], np.zeros(2, np.int64))
    write_npz(tmp_path / "labels.npz", [np.zeros((2, *SHAPE), np.float32)], np.zeros(3, np.int64))
    for name in ("images", "labels"):
        with pytest.raises(ValueError, match=r"must hold latents \(n, C, h, w\) of real numbers and n labels, got "):
            open_latents(tmp_path / f"{name}.npz")
    bad = np.zeros((2, *SHAPE), np.float32)
    bad[1, 0, 0, 0] = np.nan
    write_npz(tmp_path / "nan.npz", [bad], np.zeros(2, np.int64))
    with pytest.raises(ValueError, match=r"nan.npz must hold finite numbers, got NaN or infinity in those of image 1"):
        open_latents(tmp_path / "nan.npz").draw([0, 1], [])
