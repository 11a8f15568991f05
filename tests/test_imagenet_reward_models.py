"""PickScore, HPSv2.1 and ImageReward against outputs of other code, and every mistake that the vectors can show.

The vectors are tiny models of random weights, in float32, so that these scores differ from them by rounding alone.
Those of HPSv2 and ImageReward were run by their authors' packages. The authors of PickScore have no path with
gradients: its vectors are the formula of its model card on torchvision's pipeline for tensors. No published file was at
hand: of the full-size models, names and shapes are tested.
"""

import functools
import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from transformers.activations import ACT2FN

from imagenet.rewards import blip, clip, load, load_reward, preprocessing
from imagenet.rewards.files import filled, on_no_device
from imagenet.rewards.preprocessing import hpsv2_pixels, imagereward_pixels, pickscore_pixels
from imagenet.rewards.tokens import BERT_FILES, CLIP_FILES, Tokenizer
from tests.strategies import rng

VECTORS = Path(__file__).parent / "vectors"
KINDS = ("hpsv2", "pickscore", "imagereward")
CLIPS = ("hpsv2", "pickscore")
# Two float32 computations in other orders: of scores up to 0.2, 10 (100 times a cosine) and 3. On one CPU the errors
# were 1e-7, 1.4e-5 and 5e-6, and the vectors' own error of ImageReward, by float64, 6e-6.
SCORE = {"hpsv2": 1e-6, "pickscore": 1e-4, "imagereward": 1e-5}
GRADIENT = 1e-5  # of its norm; 2e-6 was seen
STAGE = 1e-5  # of states and embeddings of order 1; 3e-6 was seen
PREPROCESS = {"hpsv2": hpsv2_pixels, "pickscore": pickscore_pixels, "imagereward": imagereward_pixels}


@functools.cache
def arrays(kind):
    """The vectors of a kind; they are not to be changed."""
    with np.load(VECTORS / f"{kind}_tiny.npz") as found:
        config = str(found["config"])
        return config, {name: torch.tensor(found[name]) for name in found.files if name != "config"}


def vector(kind):
    """What was computed for a kind, its tensors by their published names, and its config."""
    config, found = arrays(kind)
    tensors = {name[3:]: tensor for name, tensor in found.items() if name.startswith("sd/")}
    rest = {name: tensor.clone() for name, tensor in found.items() if not name.startswith("sd/")}
    return SimpleNamespace(**rest, tensors=tensors, config=json.loads(config))


def tiny(kind, **options):
    """The model of the vectors."""
    found = vector(kind)
    return load(kind, found.tensors, found.config, **options)


def check(kind, reward):
    """Score and gradient are those of the vectors."""
    found = vector(kind)
    pixels = found.pixels.requires_grad_()
    score = reward.score_ids(pixels, found.input_ids, found.attention_mask)
    gradient = torch.autograd.grad(score.sum(), pixels)[0]
    assert score.shape == found.score.shape and score.dtype == torch.float32
    assert (score - found.score).abs().max() <= SCORE[kind]
    assert (gradient - found.grad).norm() <= GRADIENT * found.grad.norm()


# ---- the vectors -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_scores_and_gradients_are_those_of_the_vectors(kind):
    check(kind, tiny(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_preprocessing_is_that_of_the_vectors_to_the_bit(kind):
    found = vector(kind)
    assert torch.equal(PREPROCESS[kind](found.pixels, 32), found.pixel_values)


@pytest.mark.parametrize("kind", KINDS)
def test_the_official_8_bit_images_are_near(kind):
    """HPSv2's own path rounds only once, at the start; those of the others also after they resized, and clamp."""
    found, reward = vector(kind), tiny(kind)
    near = PREPROCESS[kind](found.pixels_uint8 / 255, 32)
    assert (near - found.pixel_values_8bit).abs().mean() < (1e-6 if kind == "hpsv2" else 0.05)
    score = reward.score_ids(found.pixels_uint8 / 255, found.input_ids, found.attention_mask)
    assert (score - found.score_8bit).abs().max() < {"hpsv2": 1e-6, "pickscore": 0.3, "imagereward": 0.2}[kind]


@pytest.mark.parametrize("kind", CLIPS)
def test_embeddings_are_those_of_the_vectors(kind):
    found, reward = vector(kind), tiny(kind)
    torch.testing.assert_close(reward.image_embeds(found.pixels), found.image_embeds, rtol=0, atol=STAGE)
    torch.testing.assert_close(reward.text_embeds(found.input_ids), found.text_embeds, rtol=0, atol=STAGE)


def test_the_states_of_imagereward_are_the_originals():
    found, reward = vector("imagereward"), tiny("imagereward")
    hidden = reward.vision_hidden(found.pixels)
    torch.testing.assert_close(hidden, found.vision_hidden, rtol=0, atol=STAGE)
    first = reward.text_cls(found.vision_hidden, found.input_ids, found.attention_mask)
    torch.testing.assert_close(first, found.text_cls, rtol=0, atol=STAGE)
    torch.testing.assert_close(reward.head(found.text_cls).squeeze(-1), found.mlp_raw, rtol=0, atol=STAGE)


def test_the_constants_of_imagereward_are_those_of_its_package():
    """The mean that is seen elsewhere, 0.16717862830770747, moves a score by less than rounding may."""
    assert (blip.MEAN, blip.STD) == (0.16717362830052426, 1.0333394966054072)
    found = vector("imagereward")
    assert torch.equal((found.mlp_raw - blip.MEAN) / blip.STD, found.score)
    assert not torch.equal((found.mlp_raw - 0.16717862830770747) / blip.STD, found.score)


@pytest.mark.parametrize("kind", CLIPS)
def test_padding_changes_no_score(kind):
    """What is after the end token: other ids of any number, and the mask."""
    found, reward = vector(kind), tiny(kind)
    expected = reward.score_ids(found.pixels, found.input_ids, found.attention_mask)
    ids = found.input_ids.clone()
    ids[found.attention_mask == 0] = 5
    longer = nn.functional.pad(ids, (0, 16 - ids.shape[1]), value=7)
    for other in (ids, longer):
        torch.testing.assert_close(reward.score_ids(found.pixels, other), expected, rtol=1e-5, atol=SCORE[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_frozen_and_images_need_no_gradient(kind):
    reward, found = tiny(kind), vector(kind)
    modules = [m for m in vars(reward).values() if isinstance(m, nn.Module)]
    assert modules and not any(m.training for module in modules for m in module.modules())
    parameters = [p for module in modules for p in module.parameters()]
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in parameters)
    assert not reward.score_ids(found.pixels, found.input_ids, found.attention_mask).requires_grad
    assert reward.differentiable and reward.device == torch.device("cpu")


@pytest.mark.parametrize("kind", KINDS)
def test_the_last_products_are_in_float32_under_autocast(kind):
    """The rest may be bfloat16, in which 256 steps make up a score; a product in it would be one of them."""
    found, reward = vector(kind), tiny(kind)
    with torch.autocast("cpu", torch.bfloat16):
        score = reward.score_ids(found.pixels, found.input_ids, found.attention_mask)
    assert score.dtype == torch.float32 and not torch.equal(score, score.bfloat16().float())
    assert (score - found.score).abs().max() < {"hpsv2": 0.01, "pickscore": 1.0, "imagereward": 0.5}[kind]


# ---- mistakes --------------------------------------------------------------------------------------------


def modules(reward, *names):
    """Modules of a reward below the parts of these names, such as `model.text_model`; of all parts for none."""
    for name in names:
        part = reward
        for step in name.split("."):
            part = getattr(part, step)
        yield from part.modules()


def quick_gelu(*parts):
    def mistake(kind, reward, monkeypatch):
        changed = 0
        for module in modules(reward, *parts):
            for name in ("activation_fn", "intermediate_act_fn"):
                if hasattr(module, name):
                    setattr(module, name, ACT2FN["quick_gelu"])
                    changed += 1
        assert changed
        return reward

    return mistake


def epsilon(eps, *parts):
    def mistake(kind, reward, monkeypatch):
        norms = [module for module in modules(reward, *parts) if isinstance(module, nn.LayerNorm)]
        assert norms and all(norm.eps != eps for norm in norms)
        for norm in norms:
            norm.eps = eps
        return reward

    return mistake


def resized(**options):
    """Another resize than the antialiased bicubic one."""

    def mistake(kind, reward, monkeypatch):
        interpolate = nn.functional.interpolate
        monkeypatch.setattr(
            preprocessing, "interpolate", lambda x, size, **theirs: interpolate(x, size, **theirs | options)
        )
        return reward

    return mistake


def clamped(kind, reward, monkeypatch):
    right = preprocessing._resized
    monkeypatch.setattr(preprocessing, "_resized", lambda *arguments: right(*arguments).clamp(0, 1))
    return reward


def preprocessed(wrong):
    """Another preprocessing, by kind."""

    def mistake(kind, reward, monkeypatch):
        if kind == "imagereward":
            monkeypatch.setattr(blip, "imagereward_pixels", wrong[kind])
        else:
            reward.preprocess = wrong[kind]
        return reward

    return mistake


def padded_late(images, size):
    """Zeros around the image after it was normalised, in place of black."""
    black = preprocessing._normalised(torch.zeros(1, 3, 1, 1))
    right = hpsv2_pixels(images, size)
    return torch.where((right == black).all(1, keepdim=True), 0.0, right)


def padded_elsewhere(images, size):
    """The odd row at the top."""
    right = hpsv2_pixels(images, size)
    return right.roll(1, 2)


def shrunk(images, size):
    """The shorter side rounded down, as the others round the longer one."""
    height, width = (int(side * size / max(images.shape[2:])) for side in images.shape[2:])
    small = preprocessing._resized(images, height, width)
    down, across = size - height, size - width
    pads = (across // 2, across - across // 2, down // 2, down - down // 2)
    return preprocessing._normalised(nn.functional.pad(small, pads))


def unnormalised(images, size):
    """Mean and deviation ½, as of other encoders."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (preprocessing.MEAN, preprocessing.STD))
    return (pickscore_pixels(images, size) * std + mean - 0.5) / 0.5


def swapped_qk(kind, reward, monkeypatch):
    found = vector(kind)
    for name, tensor in found.tensors.items():
        if "in_proj" in name:
            q, k, v = tensor.chunk(3)
            found.tensors[name] = torch.cat([k, q, v])
    return load(kind, found.tensors, found.config)


def swapped_qv(kind, reward, monkeypatch):
    found = vector(kind)
    for name, tensor in found.tensors.items():
        if "in_proj" in name or "qkv" in name:
            q, k, v = tensor.chunk(3)
            found.tensors[name] = torch.cat([v, k, q])
    return load(kind, found.tensors, found.config)


def scaled_otherwise(kind, reward, monkeypatch):
    """HPSv2 with its unused logit_scale, PickScore without."""
    reward.scaled = not reward.scaled
    return reward


def last_token(kind, reward, monkeypatch):
    """The text's last token, padding or not, in place of the end token."""
    forward = reward.model.text_model.forward

    def wrong(input_ids):
        found = forward(input_ids=input_ids)
        found.pooler_output = found.last_hidden_state[:, -1]
        return found

    monkeypatch.setattr(reward.model.text_model, "forward", wrong)
    return reward


def unprojected_norm(kind, reward, monkeypatch):
    """Embeddings that are not of length 1."""
    monkeypatch.setattr(clip, "normalize", lambda x, dim: x)
    return reward


def eight_heads(kind, reward, monkeypatch):
    found = vector(kind)
    found.config["med_config"]["num_attention_heads"] = 8
    return load(kind, found.tensors, found.config)


def reading(change):
    """Other arguments for the text encoder of ImageReward."""

    def mistake(kind, reward, monkeypatch):
        forward = reward.text.forward
        monkeypatch.setattr(reward.text, "forward", lambda **options: forward(**change(options)))
        return reward

    return mistake


def encoder_first(options):
    """[ENC] in place of [CLS], as of BLIP's matching head."""
    ids = options["input_ids"].clone()
    ids[:, 0] = 159
    return options | {"input_ids": ids}


def relu_head(kind, reward, monkeypatch):
    layers = list(reward.head)
    reward.head = nn.Sequential(*(m for layer in layers[:-1] for m in (layer, nn.ReLU())), layers[-1])
    return reward


def normed_twice(kind, reward, monkeypatch):
    forward = reward.vision.forward

    def wrong(pixel_values):
        found = forward(pixel_values=pixel_values)
        found.last_hidden_state = reward.vision.post_layernorm(found.last_hidden_state)
        return found

    monkeypatch.setattr(reward.vision, "forward", wrong)
    return reward


def without_mean(kind, reward, monkeypatch):
    monkeypatch.setattr(blip, "MEAN", 0.0)
    return reward


def without_deviation(kind, reward, monkeypatch):
    monkeypatch.setattr(blip, "STD", 1.0)
    return reward


SWAPPED = {"hpsv2": pickscore_pixels, "pickscore": hpsv2_pixels, "imagereward": hpsv2_pixels}
MISTAKES = {
    "quick GELU": (quick_gelu("model"), CLIPS),
    "quick GELU, images": (quick_gelu("vision"), ("imagereward",)),
    "quick GELU, text": (quick_gelu("text"), ("imagereward",)),
    "ε of norms": (epsilon(1e-6, "model"), CLIPS),
    "ε of norms, images": (epsilon(1e-5, "vision"), ("imagereward",)),
    "ε of norms, text": (epsilon(1e-5, "text"), ("imagereward",)),
    "no antialias": (resized(antialias=False), KINDS),
    "bilinear": (resized(mode="bilinear"), KINDS),
    "aligned corners": (resized(align_corners=True), KINDS),
    "clamp after the resize": (clamped, KINDS),
    "crop and pad swapped": (preprocessed(SWAPPED), KINDS),
    "padded after normalising": (preprocessed({"hpsv2": padded_late}), ("hpsv2",)),
    "padded at the other side": (preprocessed({"hpsv2": padded_elsewhere}), ("hpsv2",)),
    "shorter side rounded down": (preprocessed({"hpsv2": shrunk}), ("hpsv2",)),
    "another normalisation": (preprocessed(dict.fromkeys(KINDS, unnormalised)), ("pickscore", "imagereward")),
    "query and key swapped": (swapped_qk, ("hpsv2",)),
    "query and value swapped": (swapped_qv, ("hpsv2", "imagereward")),
    "logit scale": (scaled_otherwise, CLIPS),
    "last token pooled": (last_token, CLIPS),
    "embeddings not normalised": (unprojected_norm, CLIPS),
    "8 heads, the default": (eight_heads, ("imagereward",)),
    "no mask": (reading(lambda o: o | {"attention_mask": torch.ones_like(o["attention_mask"])}), ("imagereward",)),
    "[ENC] first": (reading(encoder_first), ("imagereward",)),
    "causal text": (reading(lambda o: o | {"is_decoder": True}), ("imagereward",)),
    "ReLU in the head": (relu_head, ("imagereward",)),
    "images normed twice": (normed_twice, ("imagereward",)),
    "no mean": (without_mean, ("imagereward",)),
    "no deviation": (without_deviation, ("imagereward",)),
}


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name, (_, kinds) in MISTAKES.items() for kind in kinds])
def test_each_mistake_is_seen(name, kind, monkeypatch):
    """By ten times the tolerance, so that no other order of sums hides it."""
    mistake, found = MISTAKES[name][0], vector(kind)
    reward = mistake(kind, tiny(kind), monkeypatch)
    with pytest.raises(AssertionError):
        check(kind, reward)
    score = reward.score_ids(found.pixels, found.input_ids, found.attention_mask)
    assert (score - found.score).abs().max() > 10 * SCORE[kind]


# ---- other sizes -----------------------------------------------------------------------------------------

# (H, W) to a size of 32: rows and columns after the resize; what is cut off at the top and the left (less than zero:
# what is added), in PickScore's and in ImageReward's way. By hand from 32 · longer/shorter and what is over it.
CROPPED = {
    (40, 48): ((32, 38), (0, 3), (0, 3)),
    (61, 53): ((36, 32), (2, 0), (2, 0)),
    (53, 61): ((32, 36), (0, 2), (0, 2)),
    (60, 55): ((34, 32), (1, 0), (1, 0)),
    (35, 32): ((35, 32), (1, 0), (2, 0)),  # 3 over: 1.5 to the even 2
    (32, 39): ((32, 39), (0, 3), (0, 4)),  # 7 over: 3.5 to 4
    (37, 32): ((37, 32), (2, 0), (2, 0)),  # 5 over: 2.5 to 2
    (33, 32): ((33, 32), (0, 0), (0, 0)),  # 1 over: 0.5 to 0
    (32, 32): ((32, 32), (0, 0), (0, 0)),
    (64, 64): ((32, 32), (0, 0), (0, 0)),
    (20, 20): ((32, 32), (0, 0), (0, 0)),
    (10, 15): ((32, 48), (0, 8), (0, 8)),
    (11, 13): ((32, 37), (0, 2), (0, 2)),
    (17, 50): ((32, 94), (0, 31), (0, 31)),
}
PADDED = {  # the longest side to 32, of HPSv2
    (40, 48): ((27, 32), (2, 0)),
    (61, 53): ((32, 28), (0, 2)),
    (48, 64): ((24, 32), (4, 0)),
    (32, 32): ((32, 32), (0, 0)),
    (64, 64): ((32, 32), (0, 0)),
    (20, 20): ((32, 32), (0, 0)),
    (5, 16): ((10, 32), (11, 0)),
    (64, 49): ((32, 24), (0, 4)),  # 24.5 to the even 24
    (64, 51): ((32, 26), (0, 3)),  # 25.5 to 26
    (24, 32): ((24, 32), (4, 0)),  # where the original fails
    (1, 100): ((1, 32), (15, 0)),
}


def by_pillow(image, height, width):
    """A channel at a time by Pillow, in float32: `(3, H, W)` to `(3, height, width)`."""
    planes = [Image.fromarray(plane).resize((width, height), Image.Resampling.BICUBIC) for plane in image.numpy()]
    return torch.tensor(np.stack([np.asarray(plane) for plane in planes]))


def standard(image):
    mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    return torch.stack([(image[c] - mean[c]) / std[c] for c in range(3)])


@pytest.mark.parametrize("size", CROPPED)
def test_the_middle_is_pillows(size):
    image = torch.rand(3, *size, generator=rng(0))
    (height, width), *offsets = CROPPED[size]
    large = by_pillow(image, height, width)
    for preprocess, (top, left) in zip((pickscore_pixels, imagereward_pixels), offsets, strict=True):
        found = preprocess(image.unsqueeze(0), 32)[0]
        expected = standard(large[:, top : top + 32, left : left + 32])
        assert found.shape == (3, 32, 32)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", PADDED)
def test_the_padded_image_is_pillows(size):
    image = torch.rand(3, *size, generator=rng(0))
    (height, width), (top, left) = PADDED[size]
    black = torch.zeros(3, 32, 32)
    black[:, top : top + height, left : left + width] = by_pillow(image, height, width)
    torch.testing.assert_close(hpsv2_pixels(image.unsqueeze(0), 32)[0], standard(black), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(61, 53), (16, 16), (35, 32), (64, 64)])
def test_other_sizes_have_scores_and_gradients(kind, size):
    """The directional derivative by differences; and each image alone."""
    found, reward = vector(kind), tiny(kind)
    x = torch.rand(2, 3, *size, generator=rng(1)).requires_grad_()
    score = reward.score_ids(x, found.input_ids, found.attention_mask)
    slope = torch.autograd.grad(score.sum(), x)[0]
    along = slope / slope.norm()
    ends = [
        reward.score_ids(x.detach() + h * along, found.input_ids, found.attention_mask).double().sum()
        for h in (1e-2, -1e-2)
    ]
    assert float(ends[0] - ends[1]) / 2e-2 == pytest.approx(float(slope.norm()), rel=0.02)
    alone = [
        reward.score_ids(x[k : k + 1], found.input_ids[k : k + 1], found.attention_mask[k : k + 1]) for k in (0, 1)
    ]
    torch.testing.assert_close(torch.cat(alone), score, rtol=1e-4, atol=SCORE[kind])


def test_what_is_no_image_is_refused():
    for wrong in (torch.zeros(3, 8, 8), torch.zeros(1, 8, 8, 3), torch.zeros(1, 3, 8, 8, dtype=torch.uint8)):
        for preprocess in PREPROCESS.values():
            with pytest.raises(ValueError, match=r"images must be \(B, 3, H, W\) of real numbers"):
                preprocess(wrong, 32)


# ---- vocabularies ----------------------------------------------------------------------------------------

START, END = "<|startoftext|>", "<|endoftext|>"
MERGES = ["c a", "ca t</w>", "d o", "do g</w>"]
CHARACTERS = "abcdefghijklmnopqrstuvwxyz."


def clip_vocabulary(folder):
    """Letters, letters that end a word, three merges that give the words cat and dog, and the two special tokens."""
    folder.mkdir(exist_ok=True, parents=True)
    tokens = [*CHARACTERS, *(f"{c}</w>" for c in CHARACTERS), *(merge.replace(" ", "") for merge in MERGES)]
    ids = {token: k for k, token in enumerate(tokens)} | {START: 62, END: 63}
    (folder / "vocab.json").write_text(json.dumps(ids))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES, ""]))
    return ids


def bert_vocabulary(folder):
    """[PAD] 0, [CLS] 101 and [SEP] 102, as bert-base-uncased, and a few words."""
    folder.mkdir(exist_ok=True, parents=True)
    tokens = [f"[unused{k}]" for k in range(150)]
    words = {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]", 110: "a", 111: "cat", 112: "tab"}
    words |= {113: "##by", 114: ".", 115: "dog", 116: "é"}
    for k, word in words.items():
        tokens[k] = word
    (folder / "vocab.txt").write_text("\n".join(tokens) + "\n", encoding="utf-8")
    return {word: k for k, word in words.items()}


def test_prompts_of_clip_are_its_pairs_of_bytes_between_start_and_end(tmp_path):
    ids = clip_vocabulary(tmp_path)
    tokenizer = Tokenizer(CLIP_FILES, [tmp_path], length=8, padding=0, size=64)
    found, mask = tokenizer(["A Cat", "dog.", "cat cat cat cat cat cat cat cat", ""])
    a, cat, dog, stop = (ids[token] for token in ("a</w>", "cat</w>", "dog</w>", ".</w>"))
    assert found.tolist() == [
        [62, a, cat, 63, 0, 0, 0, 0],
        [62, dog, stop, 63, 0, 0, 0, 0],
        [62, cat, cat, cat, cat, cat, cat, 63],  # cut, with the end token kept
        [62, 63, 0, 0, 0, 0, 0, 0],
    ]
    assert mask.tolist() == [[1] * n + [0] * (8 - n) for n in (4, 4, 8, 2)]


def test_prompts_of_imagereward_are_lower_case_pieces_of_words(tmp_path):
    """35 ids, padded with 0; no [ENC] and no [DEC]."""
    ids = bert_vocabulary(tmp_path)
    tokenizer = Tokenizer(BERT_FILES, [tmp_path], length=35, padding=0, size=160)
    found, mask = tokenizer(["A Tabby CAT.", "cat " * 50, "zebra"])
    start = [101, *(ids[t] for t in ("a", "tab", "##by", "cat", ".")), 102]
    assert found[0].tolist() == start + [0] * (35 - len(start)) and mask[0].tolist() == [1] * 7 + [0] * 28
    assert found[1].tolist() == [101] + [ids["cat"]] * 33 + [102] and mask[1].all()
    assert found[2, :4].tolist() == [101, 100, 102, 0]


@pytest.mark.parametrize("kind", KINDS)
def test_the_length_of_prompts_is_the_originals(kind):
    """CLIP's is the model's (77 in full size), ImageReward's is 35."""
    tokenizer = tiny(kind).tokenizer
    assert (tokenizer.length, tokenizer.padding) == ((35, 0) if kind == "imagereward" else (16, 0))
    assert clip.VIT_H_14["text_cfg"]["context_length"] == 77


def vocabulary(kind, folder):
    return bert_vocabulary(folder) if kind == "imagereward" else clip_vocabulary(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_scores_of_prompts_are_those_of_their_ids(kind, tmp_path):
    """One prompt for all, one for each, and two in turn."""
    vocabulary(kind, tmp_path)
    reward = tiny(kind, tokenizer=tmp_path)
    x = torch.rand(4, 3, 40, 48, generator=rng(0))
    ids, mask = reward.tokenizer(["a cat", "a dog."])
    first, second = (reward.score_ids(x, ids[k].expand(4, -1), mask[k].expand(4, -1)) for k in (0, 1))
    assert (first - second).abs().min() > 100 * SCORE[kind]

    def close(found, expected):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=SCORE[kind])

    close(reward.score(x, "a cat"), first)
    close(reward(x, ["a cat", "a dog."]), torch.stack([first[0], second[1], first[2], second[3]]))
    close(reward.score(x, ["a cat", "a cat", "a dog.", "a cat"]), torch.cat([first[:2], second[2:3], first[3:]]))
    with pytest.raises(ValueError, match="prompts must be given, got none"):
        reward.score(x, None)
    with pytest.raises(ValueError, match="must divide that of images, 4, got 3"):
        reward.score(x, ["a", "b", "c"])


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_are_encoded_once(kind, tmp_path, monkeypatch):
    """CLIP's text encoder sees each prompt once; of ImageReward ids are kept, since its text reads the image."""
    vocabulary(kind, tmp_path)
    reward = tiny(kind, tokenizer=tmp_path)
    asked, tokenize, encoded = [], reward.tokenizer, []
    reward.tokenizer = lambda prompts: asked.extend(prompts) or tokenize(prompts)
    if kind in CLIPS:
        forward = reward.model.text_model.forward
        monkeypatch.setattr(
            reward.model.text_model, "forward", lambda input_ids: encoded.extend(input_ids) or forward(input_ids)
        )
    x = torch.rand(2, 3, 32, 32, generator=rng(0))
    first = reward.score(x, ["a cat", "a dog"])
    again = reward.score(x, ["a cat", "a dog"])
    reward.score(x, "a dog")
    assert torch.equal(first, again) and asked == ["a cat", "a dog"]
    assert len(encoded) == (2 if kind in CLIPS else 0)
    reward.score(x, "cat")
    assert asked == ["a cat", "a dog", "cat"]


@pytest.mark.parametrize("kind", CLIPS)
def test_kept_embeddings_do_not_depend_on_who_asked_first(kind, tmp_path):
    """In inference mode and in bfloat16, a gradient could not go through them, or they would be rounded."""
    vocabulary(kind, tmp_path)
    one, other = (tiny(kind, tokenizer=tmp_path) for _ in range(2))
    x = torch.rand(1, 3, 32, 32, generator=rng(0))
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        one.score(x, "a cat")
    x.requires_grad_()
    found, expected = one.score(x, "a cat"), other.score(x, "a cat")
    assert torch.equal(found, expected)
    assert torch.autograd.grad(found.sum(), x)[0].norm() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_vocabulary_that_is_missing_or_not_the_models_is_refused(kind, tmp_path):
    files, origin = ("vocab.txt", "bert-base-uncased") if kind == "imagereward" else ("vocab.json", "CLIP-ViT-H-14")
    x = torch.rand(1, 3, 32, 32, generator=rng(0))
    with pytest.raises(ValueError, match=rf"prompts need {files}.* of huggingface\.co/.*{origin}.*: fetch"):
        tiny(kind, tokenizer=tmp_path / "nowhere").score(x, "a cat")
    with pytest.raises(ValueError, match="a folder that is given as tokenizer"):
        tiny(kind).score(x, "a cat")
    vocabulary(kind, tmp_path)
    reward = tiny(kind, tokenizer=tmp_path)
    reward.tokenizer.size = 20
    with pytest.raises(ValueError, match="must have at most the model's 20 ids, got"):
        reward.score(x, "a cat")
    if kind != "imagereward":
        (tmp_path / "vocab.json").write_text("{")
        with pytest.raises(ValueError, match="must be a vocabulary that can be read"):
            tiny(kind, tokenizer=tmp_path).score(x, "a cat")


# ---- files -----------------------------------------------------------------------------------------------

FILES = {"hpsv2": "HPS_v2.1_compressed.pt", "imagereward": "ImageReward.pt"}


def write(kind, folder, *, tensors=None, suffix="safetensors"):
    """A published file, and what is beside it; the path that a user gives."""
    found = vector(kind)
    tensors = found.tensors if tensors is None else tensors
    folder.mkdir(exist_ok=True, parents=True)
    vocabulary(kind, folder if kind == "pickscore" else folder / "tokenizer")
    if kind == "pickscore":
        if suffix == "safetensors":
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
        else:
            torch.save(tensors, folder / "pytorch_model.bin")
        (folder / "config.json").write_text(json.dumps(found.config))
        return folder
    content = {"epoch": 3, "state_dict": tensors} if kind == "hpsv2" else tensors
    torch.save(content, folder / FILES[kind])
    return folder / FILES[kind]


def test_the_three_files_lie_in_one_folder(tmp_path, monkeypatch):
    """The file or its folder; vocabularies in `tokenizer`; named by a spec, with a weight, beside others."""
    configs = {kind: vector(kind).config for kind in KINDS}
    x = vector("hpsv2").pixels
    for kind in KINDS:
        place = write(kind, tmp_path / "all")
        config = None if kind == "pickscore" else configs[kind]
        for weights in (place, str(place), tmp_path / "all"):
            check(kind, load(kind, weights, config))
        (tmp_path / "config.json").write_text(json.dumps(configs[kind]))
        check(kind, load(kind, place, tmp_path / "config.json"))
    monkeypatch.setattr(clip, "VIT_H_14", configs["hpsv2"])
    monkeypatch.setattr(blip, "PUBLISHED", configs["imagereward"])
    folder = tmp_path / "all"
    spec = f"pickscore={folder},2*hpsv2={folder}/{FILES['hpsv2']},-0.5*imagereward={folder},brightness"
    reward = load_reward(spec)
    scores = [load(kind, folder).score(x, "a cat") for kind in ("pickscore", "hpsv2", "imagereward")]
    expected = scores[0] + 2 * scores[1] - 0.5 * scores[2] + load_reward("brightness")(x)
    assert reward.differentiable and reward.reads_prompts
    digests = [term["sha256"] for term in reward.identity]
    assert len(set(digests)) == 4 and digests[3] is None and all(len(digest) == 64 for digest in digests[:3])
    assert load_reward(spec).identity == reward.identity
    tensors = vector("imagereward").tensors
    tensors["mlp.layers.7.bias"] = tensors["mlp.layers.7.bias"] + 1
    write("imagereward", folder, tensors=tensors)
    changed = [a == b for a, b in zip(load_reward(spec).identity, reward.identity, strict=True)]
    assert changed == [True, True, False, True]
    torch.testing.assert_close(reward(x, "a cat"), expected)
    with pytest.raises(ValueError, match="pickscore, hpsv2, imagereward must be given prompts, got none"):
        reward(x)


def test_a_folder_of_pickscore_may_have_a_bin_file(tmp_path):
    check("pickscore", load("pickscore", write("pickscore", tmp_path, suffix="bin")))
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"config\.json"):
        load("pickscore", tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_files_are_read_in_float32(kind, tmp_path):
    tensors = {name: t.half() if t.is_floating_point() else t for name, t in vector(kind).tensors.items()}
    found = vector(kind)
    reward = load(kind, write(kind, tmp_path, tensors=tensors), None if kind == "pickscore" else found.config)
    score = reward.score_ids(found.pixels, found.input_ids, found.attention_mask)
    assert score.dtype == torch.float32
    assert SCORE[kind] < (score - found.score).abs().max() < {"hpsv2": 1e-2, "pickscore": 0.5, "imagereward": 0.1}[kind]


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("pickscore", r"model\.safetensors or pytorch_model\.bin.*fetch.*huggingface\.co/yuvalkirstain/PickScore_v1"),
        ("hpsv2", r"fetch HPS_v2\.1_compressed\.pt of huggingface\.co/xswu/HPSv2"),
        ("imagereward", r"fetch ImageReward\.pt of huggingface\.co/THUDM/ImageReward"),
    ],
)
def test_a_file_that_is_missing_says_what_to_fetch(kind, words, tmp_path):
    for place in (tmp_path, tmp_path / "weights.pt"):
        with pytest.raises(ValueError, match=rf"{re.escape(str(place))} must be .*{words}"):
            load(kind, place)
    with pytest.raises(ValueError, match=words):
        load_reward(f"{kind}={tmp_path}")


UNKNOWN = {
    "hpsv2": ["visual.transformer.resblocks.0.attn.extra", "visual.head.weight", "transformer.resblocks.9.ln_1.weight"],
    "pickscore": ["text_model.extra.weight", "vision_model.embeddings.extra"],
    "imagereward": [
        "blip.visual_encoder.blocks.0.attn.extra",
        "blip.text_encoder.extra",
        "mlp.layers.1.weight",
        "extra",
    ],
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_is_accounted_for(kind, monkeypatch):
    """One of each sort that is taken away, and some that are added: refused, but for those that nothing reads."""
    found, built = vector(kind), {}

    def once(build, *arguments, **options):
        if build not in built:
            built[build] = on_no_device(build, *arguments, **options)
        return built[build]

    for module in (clip, blip):  # faster: what was refused is still empty
        monkeypatch.setattr(module, "on_no_device", once)
    for name in {re.sub(r"[0-9]+", "#", name): name for name in found.tensors}.values():
        less = {other: tensor for other, tensor in found.tensors.items() if other != name}
        if re.search(r"position_ids|blip\.(vision|text)_proj", name):
            check(kind, load(kind, less, found.config))
            continue
        with pytest.raises(ValueError, match="must hold each weight of the model that its config says, got missing: "):
            load(kind, less, found.config)
    for name in UNKNOWN[kind]:
        with pytest.raises(ValueError, match=f"got unknown: .*{name.rsplit('.', 1)[-1]}"):
            load(kind, found.tensors | {name: torch.zeros(3)}, found.config)


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_of_another_shape_or_kind_are_refused(kind):
    found = vector(kind)
    name = next(name for name in found.tensors if name.endswith("weight"))
    for wrong in (found.tensors[name][:1], found.tensors[name].long()):
        with pytest.raises(ValueError, match="got of another shape or kind: "):
            load(kind, found.tensors | {name: wrong}, found.config)


class Payload:
    def __reduce__(self):
        return (print, ("code was run",))


def test_code_in_a_file_is_not_run(tmp_path, capsys):
    torch.save({"state_dict": {"a": Payload()}}, tmp_path / FILES["hpsv2"])
    with pytest.raises(ValueError, match="must hold tensors and plain values alone"):
        load("hpsv2", tmp_path)
    (tmp_path / FILES["imagereward"]).write_bytes(b"no weights")
    with pytest.raises(ValueError, match=r"ImageReward\.pt must be a file that torch\.load reads"):
        load("imagereward", tmp_path)
    assert "code was run" not in capsys.readouterr().out


def test_other_kinds_and_tensors_without_a_config_are_refused():
    with pytest.raises(ValueError, match="kind must be one of pickscore, hpsv2, imagereward, got 'beauty'"):
        load("beauty", "somewhere")
    with pytest.raises(ValueError, match="tensors must come with their config, got none"):
        load("pickscore", vector("pickscore").tensors)


def test_transformers_that_is_missing_says_what_to_install(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match="hpsv2 needs transformers: pip install transformers"):
        load("hpsv2", "somewhere")


# ---- full size -------------------------------------------------------------------------------------------


def block(prefix, width, names):
    """Weights and biases of a block: two norms, the attention's input and output, two layers four times as wide."""
    norm1, norm2, inputs, output, up, down = names
    return {
        f"{prefix}{norm1}.weight": (width,),
        f"{prefix}{norm1}.bias": (width,),
        f"{prefix}{norm2}.weight": (width,),
        f"{prefix}{norm2}.bias": (width,),
        f"{prefix}{inputs}weight": (3 * width, width),
        f"{prefix}{inputs}bias": (3 * width,),
        f"{prefix}{output}.weight": (width, width),
        f"{prefix}{output}.bias": (width,),
        f"{prefix}{up}.weight": (4 * width, width),
        f"{prefix}{up}.bias": (4 * width,),
        f"{prefix}{down}.weight": (width, 4 * width),
        f"{prefix}{down}.bias": (width,),
    }


def open_clip_vit_h():
    """Names and shapes of open_clip's ViT-H-14."""
    names = ("ln_1", "ln_2", "attn.in_proj_", "attn.out_proj", "mlp.c_fc", "mlp.c_proj")
    shapes = {"positional_embedding": (77, 1024), "text_projection": (1024, 1024), "logit_scale": ()}
    shapes |= {"token_embedding.weight": (49408, 1024), "ln_final.weight": (1024,), "ln_final.bias": (1024,)}
    shapes |= {"visual.class_embedding": (1280,), "visual.positional_embedding": (257, 1280)}
    shapes |= {"visual.proj": (1280, 1024), "visual.conv1.weight": (1280, 3, 14, 14)}
    shapes |= {f"visual.{norm}.{kind}": (1280,) for norm in ("ln_pre", "ln_post") for kind in ("weight", "bias")}
    for k in range(32):
        shapes |= block(f"visual.transformer.resblocks.{k}.", 1280, names)
    for k in range(24):
        shapes |= block(f"transformer.resblocks.{k}.", 1024, names)
    return shapes


def imagereward_full():
    """Names and shapes of ImageReward: BLIP's ViT-L, BERT base with cross-attention, and the head."""
    shapes = {"cls_token": (1, 1, 1024), "pos_embed": (1, 197, 1024), "norm.weight": (1024,), "norm.bias": (1024,)}
    shapes |= {"patch_embed.proj.weight": (1024, 3, 16, 16), "patch_embed.proj.bias": (1024,)}
    for k in range(24):
        shapes |= block(f"blocks.{k}.", 1024, ("norm1", "norm2", "attn.qkv.", "attn.proj", "mlp.fc1", "mlp.fc2"))
    shapes = {f"blip.visual_encoder.{name}": shape for name, shape in shapes.items()}
    text = {"embeddings.position_ids": (1, 512), "embeddings.word_embeddings.weight": (30524, 768)}
    text |= {"embeddings.position_embeddings.weight": (512, 768)}
    layers = {"embeddings.LayerNorm": (768,)}
    for k in range(12):
        layer = f"encoder.layer.{k}."
        for attention, width in (("attention", 768), ("crossattention", 1024)):
            layers |= {f"{layer}{attention}.self.query": (768, 768), f"{layer}{attention}.output.dense": (768, 768)}
            layers |= {f"{layer}{attention}.self.{name}": (768, width) for name in ("key", "value")}
            layers |= {f"{layer}{attention}.output.LayerNorm": (768,)}
        layers |= {f"{layer}intermediate.dense": (3072, 768), f"{layer}output.dense": (768, 3072)}
        layers |= {f"{layer}output.LayerNorm": (768,)}
    for name, shape in layers.items():
        text |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    shapes |= {f"blip.text_encoder.{name}": shape for name, shape in text.items()}
    for name, width in (("vision_proj", 1024), ("text_proj", 768)):
        shapes |= {f"blip.{name}.weight": (256, width), f"blip.{name}.bias": (256,)}
    widths = (768, 1024, 128, 64, 16, 1)
    for k, layer in enumerate((0, 2, 4, 6, 7)):
        shapes |= {
            f"mlp.layers.{layer}.weight": widths[k : k + 2][::-1],
            f"mlp.layers.{layer}.bias": widths[k + 1 : k + 2],
        }
    return shapes


def empty(shapes):
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def shapes_of(tensors):
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def test_the_published_hpsv2_fills_its_model():
    """The counts are those of the published file: 686 tensors, 986,109,441 numbers."""
    from transformers import CLIPConfig, CLIPModel

    shapes = open_clip_vit_h()
    assert len(shapes) == 686 and sum(np.prod(shape, dtype=int) for shape in shapes.values()) == 986_109_441
    config = CLIPConfig.from_dict(clip.clip_config(clip.VIT_H_14))
    model = on_no_device(CLIPModel, config)
    assert shapes_of(clip.from_open_clip(empty(shapes))) == shapes_of(model.state_dict())
    assert (config.vision_config.num_attention_heads, config.text_config.num_attention_heads) == (16, 16)


def test_projections_are_transposed_even_where_they_are_square():
    """The text's is, in full size: a shape would not tell."""
    square = torch.rand(4, 4, generator=rng(0))
    found = clip.from_open_clip({"text_projection": square, "visual.proj": square})
    assert torch.equal(found["text_projection.weight"], square.T)
    assert torch.equal(found["visual_projection.weight"], square.T)


def test_the_published_imagereward_fills_its_model():
    """The counts are those of the published file: 625 tensors, 446,666,465 numbers."""
    from transformers import BlipTextModel, BlipVisionModel

    shapes = imagereward_full()
    assert len(shapes) == 625 and sum(np.prod(shape, dtype=int) for shape in shapes.values()) == 446_666_465
    parts = blip.from_blip(empty(shapes))
    vision, text = blip.blip_configs(blip.PUBLISHED)
    models = {
        "vision": on_no_device(BlipVisionModel, vision),
        "text": on_no_device(BlipTextModel, text, add_pooling_layer=False),
        "head": on_no_device(blip._head, 768),
    }
    for name, model in models.items():
        assert shapes_of(parts[name]) == shapes_of(model.state_dict())


def test_positions_count_from_zero():
    """They are no weights, and are nowhere until the weights come."""
    found = tiny("imagereward")
    assert found.text.embeddings.position_ids.tolist() == [list(range(48))]
    assert tiny("hpsv2").model.vision_model.embeddings.position_ids.tolist() == [list(range(17))]
    assert isinstance(filled(on_no_device(nn.Linear, 1, 1), dict(nn.Linear(1, 1).state_dict()), "x"), nn.Linear)
