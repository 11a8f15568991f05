"""Rewards that need no weights, sums by specs, a linear probe, and rewards of latents with checkpointed gradients."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.autograd import gradcheck

from imagenet.rewards import (
    REWARDS,
    CompressedSize,
    LatentReward,
    LinearProbe,
    brightness,
    contrast,
    load_reward,
    redness,
    slug,
)
from imagenet.rewards.pixels import JPEG_QUALITY
from imagenet.vae import VAE, to_uint8
from mfm_ref.checks import check_uncoupled
from tests.imagenet_tiny import tiny_vae
from tests.strategies import SEEDS, randn, rng

DIFFERENTIABLE = [name for name in REWARDS if load_reward(name).differentiable]


def uniform(*shape, seed=0):
    return torch.rand(*shape, generator=rng(seed), dtype=torch.float64)


def letters(images, prompts):
    """A reward that reads prompts: the mean of the image by the length of its prompt."""
    return images.mean((1, 2, 3)) * torch.tensor([float(len(prompt)) for prompt in prompts], dtype=images.dtype)


def worded(x, text, /):
    """As `letters`, with names of its own."""
    return letters(x, text)


def scaled(images, gain=1.0, prompts=None):
    """As `letters`; prompts are the third argument."""
    return gain * letters(images, prompts)


def keyed(images, *, prompts):
    """As `letters`; prompts are a keyword."""
    return letters(images, prompts)


def half(images):
    """A reward of images alone."""
    return images[:, 0].mean((1, 2)) / 2


def gained(images, gain=2.0):
    """A reward of images alone, whose second argument is an option."""
    return gain * half(images)


def mean_of_all(images):
    """One number for all images."""
    return images.mean()


def total(x1, prompts=None):
    """One number for all latents."""
    return x1.sum()


def number(images):
    """No tensor."""
    return 3.0


# ---- of pixels -------------------------------------------------------------------------------------------


def test_rewards_of_plain_images():
    """White, black, red; and half white, half black, whose luma has the standard deviation ½."""
    x = torch.zeros(4, 3, 6, 6)
    x[0], x[2, 0], x[3, :, :3] = 1, 1, 1
    assert brightness(x).tolist() == pytest.approx([1, 0, 0.2126, 0.5])
    assert redness(x).tolist() == pytest.approx([0, 0, 1, 0])
    assert contrast(x).tolist() == pytest.approx([0.001, 0.001, 0.001, 0.5], abs=1e-5)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_rewards_have_gradients_of_each_image_alone(name):
    reward = load_reward(name)
    x = uniform(2, 3, 3, 3).requires_grad_()
    assert gradcheck(reward, (x,))
    assert torch.equal(reward(x[:1]), reward(x)[:1])
    grey = torch.full((1, 3, 4, 4), 0.5, requires_grad=True)
    assert torch.autograd.grad(reward(grey).sum(), grey)[0].isfinite().all()


@pytest.mark.parametrize("name", REWARDS)
def test_what_is_no_image_is_refused(name):
    for wrong in (torch.zeros(3, 4, 4), torch.zeros(1, 4, 4, 3), torch.zeros(1, 3, 4, 4, dtype=torch.uint8)):
        with pytest.raises(ValueError, match=r"images must be \(B, 3, H, W\) of real numbers"):
            load_reward(name)(wrong)
    with pytest.raises(ValueError, match=r"got .* \(2, 4, 8, 8\): these may be latents, which --vae decodes"):
        LatentReward(None, load_reward(name))(torch.zeros(2, 4, 8, 8))


def test_the_compressed_size_is_that_of_a_jpeg_file(tmp_path):
    """Of grey and of noise, each as a file of its own; it is a black box."""
    x = torch.stack([torch.full((3, 16, 24), 0.5), torch.rand(3, 16, 24, generator=rng(0))]).requires_grad_()
    found = CompressedSize()(x)
    for k, pixels in enumerate(to_uint8(x)):
        Image.fromarray(pixels).save(tmp_path / "one.jpg", quality=JPEG_QUALITY)
        assert found[k] == pytest.approx(8 * (tmp_path / "one.jpg").stat().st_size / (16 * 24))
    assert found[1] > found[0] and found.dtype == x.dtype and not found.requires_grad
    assert not load_reward("brightness,compressed-size").differentiable
    with pytest.raises(ValueError, match=r"images must lie in \[0, 1\]"):
        CompressedSize()(x + 1)


# ---- a linear probe --------------------------------------------------------------------------------------


@given(st.integers(1, 4), st.sampled_from([1, 2, 3]), st.floats(1e-3, 10), SEEDS)
def test_the_probe_is_ridge_regression_on_means_of_cells(channels, side, ridge, seed):
    """NumPy's least squares, with √(ridge · B) of each weight as one more residual."""
    n, cells = 12, channels * side**2
    x, y = randn(n, channels, 6, 6, seed=seed), randn(n, seed=seed + 1)
    pooled = x.numpy().reshape(n, channels, side, 6 // side, side, 6 // side).mean((3, 5)).reshape(n, cells)
    rows = np.block([[pooled, np.ones((n, 1))], [math.sqrt(ridge * n) * np.eye(cells), np.zeros((cells, 1))]])
    expected = np.linalg.lstsq(rows, np.append(y.numpy(), np.zeros(cells)), rcond=None)[0]
    probe = LinearProbe.fit(x, y, side=side, ridge=ridge)
    np.testing.assert_allclose(np.append(probe.weight.flatten(), probe.bias), expected, atol=1e-9)
    np.testing.assert_allclose(probe(x), pooled @ expected[:-1] + expected[-1], atol=1e-9)


def test_a_probe_is_kept_and_read_by_a_spec(tmp_path):
    x = uniform(20, 3, 8, 8)
    probe = LinearProbe.fit(x, brightness(x), side=2, ridge=1e-9)
    probe.save(tmp_path / "probe.safetensors")
    reward = load_reward(f"probe={tmp_path}/probe.safetensors")
    torch.testing.assert_close(reward(x), brightness(x), rtol=0, atol=1e-6)
    assert reward.differentiable and gradcheck(reward, (x[:2].requires_grad_(),))
    assert reward(x.float()).dtype == torch.float32
    for wrong in (x[:, :2], x[0], x[..., :1]):
        with pytest.raises(ValueError, match=r"must be given \(B, 3, H, W\) of at least 2 × 2, got"):
            reward(wrong)
    with pytest.raises(ValueError, match="these may be latents, which --vae decodes"):
        reward(uniform(2, 4, 8, 8))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: LinearProbe(torch.zeros(3, 2, 1), torch.zeros(())), r"must be \(C, s, s\) and its bias \(\)"),
        (lambda: LinearProbe(torch.zeros(3, 2, 2), torch.zeros(1)), r"must be \(C, s, s\) and its bias \(\)"),
        (lambda: LinearProbe(torch.full((3, 1, 1), math.nan), torch.zeros(())), "the weight of a probe must be finite"),
        (lambda: LinearProbe.fit(torch.zeros(2, 3, 4, 4), torch.zeros(3)), "must be a target for each image"),
        (lambda: LinearProbe.fit(torch.zeros(2, 3, 4, 4), torch.zeros(2), ridge=0.0), "ridge > 0, got"),
        (lambda: LinearProbe.fit(torch.zeros(2, 3, 4, 4), torch.zeros(2), side=0), "side must be an integer >= 1"),
    ],
)
def test_probes_that_cannot_be_are_refused(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_a_file_that_is_no_probe_is_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(3, 1, 1)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"a\.safetensors must hold weight and bias"):
        load_reward(f"probe={tmp_path}/a.safetensors")
    with pytest.raises(ValueError, match=r"b\.safetensors"):
        load_reward(f"probe={tmp_path}/b.safetensors")


# ---- specs -----------------------------------------------------------------------------------------------


def test_a_spec_is_a_weighted_sum():
    x = uniform(3, 3, 4, 4)
    found = load_reward(f"brightness, -0.5*contrast,1e1*{__name__}:letters")(x, ["a", "bc", "def"])
    expected = brightness(x) - 0.5 * contrast(x) + 10 * letters(x, ["a", "bc", "def"])
    torch.testing.assert_close(found, expected)


def test_any_function_is_a_reward():
    x = uniform(4, 3, 4, 4)
    assert torch.equal(load_reward(f"{__name__}:half")(x), half(x))
    reward = load_reward(f"{__name__}:letters")
    assert reward.reads_prompts and not load_reward("brightness").reads_prompts
    assert torch.equal(reward(x, "abc"), letters(x, ["abc"] * 4))
    assert torch.equal(reward(x, ["a", "bcd"]), letters(x, ["a", "bcd"] * 2))
    assert torch.equal(load_reward("brightness")(x, "abc"), brightness(x))
    for name in ("worded", "scaled", "keyed"):
        assert torch.equal(load_reward(f"{__name__}:{name}")(x, ["a", "bcd"]), letters(x, ["a", "bcd"] * 2))
    assert not load_reward(f"{__name__}:gained").reads_prompts
    assert torch.equal(load_reward(f"{__name__}:gained")(x), 2 * half(x))
    with pytest.raises(ValueError, match="letters must be given prompts, got none"):
        reward(x)


@pytest.mark.parametrize(
    ("name", "got"),
    [
        (f"{__name__}:mean_of_all", r"\(\)"),
        (f"{__name__}:number", "float"),
        ("torch:square", r"\({}, 3, 4, 4\)"),
    ],
)
@pytest.mark.parametrize("spec", ["{}", "brightness,2*{}"])
def test_a_reward_that_gives_no_number_for_each_image_is_named(spec, name, got):
    """By its own name in a sum; where it gives one for all images, it does so for one image, too."""
    for n in (1, 4):
        match = f"the reward {name} must give one number for each image, \\({n},\\), got {got.format(n)}"
        with pytest.raises(ValueError, match=match):
            LatentReward(None, load_reward(spec.format(name)), decode=n)(uniform(4, 3, 4, 4))


def test_a_function_that_gives_one_number_for_all_latents_is_named():
    with pytest.raises(ValueError, match=r"the reward total must give one number for each image, \(4,\), got \(\)"):
        LatentReward(None, total)(uniform(4, 2, 3, 3))


def test_the_identity_of_a_reward_is_of_its_weights_and_not_of_their_file(tmp_path):
    """Of a probe that was fitted again it is another; of one that was moved or read on, the same."""

    def identity(path, spec="-2*redness,0.5*probe={}"):
        return json.loads(json.dumps(load_reward(spec.format(path)).identity))

    (tmp_path / "b").mkdir()
    x, path = uniform(20, 3, 8, 8), tmp_path / "probe.safetensors"
    LinearProbe.fit(x, brightness(x)).save(path)
    first = identity(path)
    assert first[0] == {"weight": -2.0, "name": "redness", "sha256": None}
    assert (first[1]["weight"], first[1]["name"], len(first[1]["sha256"])) == (0.5, "probe", 64)
    assert identity(path.rename(tmp_path / "b" / "other.safetensors")) == first
    assert identity(tmp_path / "b" / "other.safetensors", "-2*redness,probe={}") != first
    LinearProbe.fit(x, contrast(x)).save(path)
    again = identity(path)
    assert again[0] == first[0] and again[1]["sha256"] != first[1]["sha256"]
    assert load_reward(f"{__name__}:half").identity == [{"weight": 1.0, "name": f"{__name__}:half", "sha256": None}]


@pytest.mark.parametrize(
    ("spec", "match"),
    [
        ("beauty", "the reward must be brightness, .* or module:function, got 'beauty'"),
        ("", "the reward must be .* got ''"),
        ("brightness,", "the reward must be .* got ''"),
        ("x*brightness", "the weight of a reward must be a finite number, got 'x'"),
        ("nan*brightness", "the weight of a reward must be a finite number, got 'nan'"),
        ("*brightness", "the weight of a reward must be a finite number, got ''"),
        ("brightness=3", "only probe, pickscore, hpsv2, imagereward take a path, got brightness=3"),
        ("probe", "the reward probe must be given a path, probe=PATH"),
        ("hpsv2=", "the reward hpsv2 must be given a path, hpsv2=PATH"),
        ("no_such_module:f", "no_such_module:f must be a function that can be imported"),
    ],
)
def test_other_specs_are_refused(spec, match):
    with pytest.raises(ValueError, match=match):
        load_reward(spec)


def test_a_slug_is_a_name_of_a_file():
    assert slug("brightness") == "brightness"
    assert slug("a.b:f") == "a.b.f"
    assert slug("-0.5*hpsv2=/some/where/HPS_v2.1.pt,contrast") == "-0.5.hpsv2.HPS_v2.1.pt.contrast"


# ---- of latents ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    return VAE.load(str(tiny_vae(tmp_path_factory.mktemp("vae"))))


def gradient(reward, x1):
    x1 = x1.clone().requires_grad_()
    r = reward(x1)
    return r.detach(), torch.autograd.grad(r.sum(), x1)[0]


def test_checkpointed_gradients_are_those_without(vae):
    """In parts or at once: the same numbers, the last part smaller than the others."""
    x1 = torch.randn(5, 4, 8, 8, generator=rng(0))
    kept, plain = gradient(LatentReward(vae, load_reward("contrast"), checkpointed=False, decode=2), x1)
    again, checked = gradient(LatentReward(vae, load_reward("contrast"), decode=2), x1)
    assert torch.equal(kept, again) and torch.equal(plain, checked) and plain.norm() > 0
    for decode in (1, 5, 8):
        r, g = gradient(LatentReward(vae, load_reward("contrast"), decode=decode), x1)
        torch.testing.assert_close((r, g), (kept, plain), rtol=1e-4, atol=1e-7)
    expected = contrast(vae.decode(x1))
    torch.testing.assert_close(kept, expected, rtol=1e-5, atol=0)


def test_checkpointing_keeps_latents_alone_for_the_gradient(vae):
    """What the graph saves: a hundred times less than without."""
    x1 = torch.randn(4, 4, 8, 8, generator=rng(0), requires_grad=True)

    def saved(checkpointed):
        kept = {}
        reward = LatentReward(vae, load_reward("contrast"), checkpointed=checkpointed, decode=2)
        pack = lambda t: kept.setdefault(t.untyped_storage().data_ptr(), t)  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            r = reward(x1)
        assert r.requires_grad
        return sum(t.untyped_storage().nbytes() for t in kept.values())

    assert 100 * saved(True) < saved(False)


def test_parts_are_decoded_a_few_at_a_time(vae, monkeypatch):
    sizes, decode = [], vae.decode
    monkeypatch.setattr(vae, "decode", lambda x: sizes.append(len(x)) or decode(x))
    x1 = torch.randn(5, 4, 8, 8, generator=rng(0))
    LatentReward(vae, brightness_of, decode=2)(x1)
    assert sizes == [2, 2, 1]
    sizes.clear()
    gradient(LatentReward(vae, brightness_of, decode=2), x1)
    assert sorted(sizes[:3]) == sorted(sizes[3:]) == [1, 2, 2]  # once more for the gradient, and no more
    sizes.clear()
    gradient(LatentReward(vae, brightness_of, decode=2, checkpointed=False), x1)
    assert sizes == [2, 2, 1]


def brightness_of(images, prompts=None):
    return brightness(images)


def test_rows_have_their_prompts_however_they_are_decoded():
    """Without a VAE the reward is of latents; draws `(n, B)` lie n-major, so that row i has prompt i mod B."""
    x1 = uniform(6, 2, 3, 3)
    prompts = ["a", "bc", "def"]
    expected = 3.0 * letters(x1, prompts * 2)
    for decode in (1, 2, 4, 6):
        reward = LatentReward(None, letters, prompts, 3.0, decode=decode)
        assert torch.equal(reward(x1), expected)
        rows = [reward.of_row(i)(x1[i : i + 1]) for i in range(6)]
        assert torch.equal(torch.cat(rows), expected)
    assert torch.equal(LatentReward(None, letters, "bc")(x1), letters(x1, ["bc"] * 6))
    assert torch.equal(LatentReward(None, letters, "bc").of_row(4)(x1[4:5]), letters(x1[4:5], ["bc"]))
    assert torch.equal(LatentReward(None, brightness_of)(uniform(2, 3, 4, 4)), brightness(uniform(2, 3, 4, 4)))
    with pytest.raises(ValueError, match="must divide that of images, 4, got 3"):
        LatentReward(None, letters, prompts)(x1[:4])


def test_prompts_couple_no_rows_and_a_mean_over_the_batch_does():
    x1 = uniform(4, 2, 3, 3)
    reward = LatentReward(None, letters, ["a", "bcd"])
    check_uncoupled(reward, x1, reward(x1))
    coupled = LatentReward(None, lambda x, prompts: letters(x, prompts) - letters(x, prompts).mean(), ["a", "bcd"])
    with pytest.raises(ValueError, match="must not depend on the other samples of a batch"):
        check_uncoupled(coupled, x1, coupled(x1))


def test_a_black_box_has_no_graph(vae):
    reward = LatentReward(vae, load_reward("-1*compressed-size"), scale=2.0)
    x1 = torch.randn(2, 4, 8, 8, generator=rng(0), requires_grad=True)
    r = reward(x1)
    assert not reward.differentiable and not r.requires_grad
    torch.testing.assert_close(r, -2 * CompressedSize()(vae.decode(x1)))
    assert LatentReward(vae, load_reward("brightness")).differentiable


def test_decode_must_be_a_count():
    with pytest.raises(ValueError, match="decode must be an integer >= 1, got 0"):
        LatentReward(None, half, decode=0)
