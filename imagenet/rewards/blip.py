"""ImageReward: a BLIP encoder that reads prompt and image together, and a linear head."""

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from imagenet.checkpoints import read_state
from imagenet.prompts import rows_of
from imagenet.rewards.files import IMAGEREWARD, filled, find_weights, on_no_device, read_config
from imagenet.rewards.preprocessing import imagereward_pixels
from imagenet.rewards.tokens import BERT_FILES, Tokenizer

MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the head's output, over its authors' data
LENGTH = 35  # token ids of a prompt
WIDTHS = (1024, 128, 64, 16, 1)  # of the head
PUBLISHED: dict[str, dict[str, Any]] = {
    "vision_cfg": {"image_size": 224, "patch_size": 16, "width": 1024, "layers": 24, "heads": 16},
    "med_config": {
        "vocab_size": 30524,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "max_position_embeddings": 512,
        "layer_norm_eps": 1e-12,
        "hidden_act": "gelu",
    },
}


class ImageReward:
    """(head(h) − mean)/std, where h is the state of the prompt's first token, which has read the image, `(B,)`.

    Args:
        vision: transformers' BlipVisionModel, frozen.
        text: transformers' BlipTextModel, frozen.
        head: `(B, D) -> (B, 1)`, frozen.
        tokenizer: of prompts.

    Attributes:
        differentiable: True; gradients go through to the pixels.
    """

    differentiable = True

    def __init__(self, vision: Any, text: Any, head: nn.Module, tokenizer: Tokenizer):
        self.vision, self.text, self.head, self.tokenizer = vision, text, head, tokenizer
        self._ids: dict[str, tuple[Tensor, Tensor]] = {}

    @property
    def device(self) -> torch.device:
        """Where it computes, and where images must be."""
        return self.vision.device

    def to(self, device: torch.device | str) -> "ImageReward":
        """The same on a device."""
        for part in (self.vision, self.text, self.head):
            part.to(device)
        return self

    def score(self, images: Tensor, prompts: str | Sequence[str]) -> Tensor:
        """The score of each image under its prompt, `(B,)` in float32; token ids are found once and kept.

        Args:
            images: `(B, 3, H, W)` in [0, 1].
            prompts: one for all, or a list, of which image i has prompt i mod len.

        Raises:
            ValueError: images of another shape, no prompts or a number of them that does not divide B; no vocabulary.
        """
        asked = rows_of(prompts, len(images))
        if asked is None:
            raise ValueError("prompts must be given, got none")
        for prompt in dict.fromkeys(asked):
            if prompt not in self._ids:
                ids, mask = self.tokenizer([prompt])
                self._ids[prompt] = ids[0], mask[0]
        ids, mask = (torch.stack(rows).to(images.device) for rows in zip(*(self._ids[p] for p in asked), strict=True))
        return self.score_ids(images, ids, mask)

    __call__ = score

    def score_ids(self, images: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The score of each image under the token ids of its prompt, `(B,)`.

        Args:
            images: `(B, 3, H, W)` in [0, 1].
            input_ids: `(B, L)`, from [CLS] to [SEP], and padding.
            attention_mask: `(B, L)`, 1 where ids are no padding.
        """
        first = self.text_cls(self.vision_hidden(images), input_ids, attention_mask)
        with torch.autocast(self.device.type, enabled=False):
            return (self.head(first.float()).squeeze(-1) - MEAN) / STD

    def vision_hidden(self, images: Tensor) -> Tensor:
        """States of the image's patches after the last norm, the one of the whole image first, `(B, 1 + P, W)`."""
        pixels = imagereward_pixels(images, self.vision.config.image_size)
        return self.vision(pixel_values=pixels).last_hidden_state  # of pooler_output the norm is taken twice

    def text_cls(self, hidden: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The state of the first token, `(B, D)`; each token attends to all, not only to those before it."""
        found = self.text(input_ids=input_ids, attention_mask=attention_mask, encoder_hidden_states=hidden)
        return found.last_hidden_state[:, 0]


def load_imagereward(
    weights: Path | Mapping[str, Tensor],
    config: Mapping[str, Any] | Path | str | None,
    folders: Sequence[Path],
) -> ImageReward:
    """ImageReward from ImageReward.pt, or its tensors."""
    from transformers import BlipTextModel, BlipVisionModel

    if not isinstance(weights, Mapping):
        weights = read_state(find_weights(weights, IMAGEREWARD))
    vision, text = blip_configs(PUBLISHED if config is None else read_config(config))
    parts = from_blip(weights)
    reader = on_no_device(BlipTextModel, text, add_pooling_layer=False)
    return ImageReward(
        filled(on_no_device(BlipVisionModel, vision), parts["vision"], "the image encoder of ImageReward"),
        filled(reader, parts["text"], "the text encoder of ImageReward"),
        filled(on_no_device(_head, text.hidden_size), parts["head"], "the head of ImageReward"),
        Tokenizer(BERT_FILES, folders, length=LENGTH, padding=0, size=text.vocab_size),
    )


def _head(width: int) -> nn.Module:
    """Five linear layers and nothing between them but dropout, which evaluation leaves out."""
    widths = (width, *WIDTHS)
    return nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(widths)))


# ---- published names ---------------------------------------------------------------------------------------

BLIP_TEXT, BLIP_VISION, HEAD = "blip.text_encoder.", "blip.visual_encoder.", "mlp.layers."
UNUSED = ("blip.vision_proj.", "blip.text_proj.", "blip.text_encoder.embeddings.position_ids")
LAYERS = ("0", "2", "4", "6", "7")  # of the head, whose dropouts have numbers, too
VISION_NAMES = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj": "embeddings.patch_embedding",
    "norm": "post_layernorm",
}
BLOCK = re.compile(r"blocks\.(\d+)\.(.+)\.(weight|bias)")
IN_BLOCK = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.qkv": "self_attn.qkv",
    "attn.proj": "self_attn.projection",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


def blip_configs(config: Mapping[str, Any]) -> tuple[Any, Any]:
    """transformers' configs of the image encoder and of the text encoder, which attends to the image in every layer."""
    from transformers import BlipTextConfig, BlipVisionConfig

    image, text = config["vision_cfg"], config["med_config"]
    vision = BlipVisionConfig(
        hidden_size=image["width"],
        intermediate_size=4 * image["width"],
        num_hidden_layers=image["layers"],
        num_attention_heads=image["heads"],
        image_size=image["image_size"],
        patch_size=image["patch_size"],
        hidden_act="gelu",
        layer_norm_eps=1e-6,
    )
    read = {name: text[name] for name in PUBLISHED["med_config"]}
    return vision, BlipTextConfig(encoder_hidden_size=image["width"], is_decoder=True, **read)


def from_blip(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The tensors of ImageReward by the names of transformers, for `vision`, `text` and `head`.

    Names that are unknown stay as they are, with `vision`.
    """
    found: dict[str, dict[str, Tensor]] = {"vision": {}, "text": {}, "head": {}}
    for name, tensor in tensors.items():
        if name.startswith(BLIP_TEXT) and name not in UNUSED:
            found["text"][name.removeprefix(BLIP_TEXT)] = tensor
        elif name.startswith(HEAD):
            layer, _, last = name.removeprefix(HEAD).partition(".")
            found["head"][f"{LAYERS.index(layer)}.{last}" if layer in LAYERS else name] = tensor
        elif not name.startswith(UNUSED):
            found["vision"][_vision_name(name)] = tensor
    return found


def _vision_name(name: str) -> str:
    own = name.removeprefix(BLIP_VISION)
    stem, _, last = own.rpartition(".")
    matched = BLOCK.fullmatch(own)
    if matched is not None and matched[2] in IN_BLOCK:
        return f"encoder.layers.{matched[1]}.{IN_BLOCK[matched[2]]}.{matched[3]}"
    if own in VISION_NAMES:
        return VISION_NAMES[own]
    return f"{VISION_NAMES[stem]}.{last}" if stem in VISION_NAMES else name
