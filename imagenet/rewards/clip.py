"""PickScore and HPSv2.1: how well an image and a prompt go together, by the cosine of their CLIP embeddings."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from imagenet.checkpoints import read_state
from imagenet.prompts import rows_of
from imagenet.rewards.files import (
    CONFIG,
    HPSV2,
    PICKSCORE,
    filled,
    find_weights,
    on_no_device,
    read_config,
)
from imagenet.rewards.preprocessing import hpsv2_pixels, pickscore_pixels
from imagenet.rewards.tokens import CLIP_FILES, Tokenizer

VIT_H_14 = {  # open_clip's config of that name
    "embed_dim": 1024,
    "vision_cfg": {"image_size": 224, "layers": 32, "width": 1280, "head_width": 80, "patch_size": 14},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 1024, "heads": 16, "layers": 24},
}
ENCODED = 64  # prompts that are encoded at once
OLD_BUFFERS = ("text_model.embeddings.position_ids", "vision_model.embeddings.position_ids")


class CLIPScore:
    """scale · cos(image, prompt), of the projected embeddings of CLIP's two towers, `(B,)`.

    Args:
        model: transformers' CLIPModel, frozen.
        preprocess: images `(B, 3, H, W)` and the size of the model's -> `(B, 3, size, size)`.
        tokenizer: of prompts.
        scaled: whether the scale is the model's exp(logit_scale), as in PickScore, or 1, as in HPSv2.

    Attributes:
        differentiable: True; gradients go through to the pixels.
    """

    differentiable = True

    def __init__(self, model: Any, preprocess: Callable[[Tensor, int], Tensor], tokenizer: Tokenizer, *, scaled: bool):
        self.model, self.preprocess, self.tokenizer, self.scaled = model, preprocess, tokenizer, scaled
        self._embedded: dict[str, Tensor] = {}

    @property
    def device(self) -> torch.device:
        """Where it computes, and where images must be."""
        return self.model.logit_scale.device

    def to(self, device: torch.device | str) -> "CLIPScore":
        """The same on a device."""
        self.model.to(device)
        self._embedded.clear()
        return self

    def score(self, images: Tensor, prompts: str | Sequence[str]) -> Tensor:
        """The score of each image under its prompt, `(B,)` in float32; every prompt is encoded once and kept.

        Args:
            images: `(B, 3, H, W)` in [0, 1].
            prompts: one for all, or a list, of which image i has prompt i mod len.

        Raises:
            ValueError: images of another shape, no prompts or a number of them that does not divide B; no vocabulary.
        """
        asked = rows_of(prompts, len(images))
        if asked is None:
            raise ValueError("prompts must be given, got none")
        self._encode([prompt for prompt in dict.fromkeys(asked) if prompt not in self._embedded])
        return self._cosine(self.image_embeds(images), torch.stack([self._embedded[prompt] for prompt in asked]))

    __call__ = score

    def score_ids(self, images: Tensor, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """The score of each image under the token ids of its prompt, `(B,)`.

        Args:
            images: `(B, 3, H, W)` in [0, 1].
            input_ids: `(B, L)`, from the start token to the end token, which is the greatest id, and padding.
            attention_mask: of no effect, since attention is causal and what is after the end token is not read.
        """
        return self._cosine(self.image_embeds(images), self.text_embeds(input_ids))

    def image_embeds(self, images: Tensor) -> Tensor:
        """Embeddings of images, of length 1, `(B, E)`."""
        pixels = self.preprocess(images, self.model.config.vision_config.image_size)
        return self._unit(self.model.visual_projection, self.model.vision_model(pixel_values=pixels))

    def text_embeds(self, input_ids: Tensor) -> Tensor:
        """Embeddings of token ids, of length 1, `(B, E)`."""
        return self._unit(self.model.text_projection, self.model.text_model(input_ids=input_ids))

    def _encode(self, prompts: Sequence[str]) -> None:
        """Keep the embeddings of prompts: in float32, and fit for gradients, whatever mode the caller is in."""
        for start in range(0, len(prompts), ENCODED):
            part = prompts[start : start + ENCODED]
            with torch.inference_mode(False), torch.no_grad(), torch.autocast(self.device.type, enabled=False):
                embedded = self.text_embeds(self.tokenizer(part)[0].to(self.device))
            self._embedded.update(zip(part, embedded, strict=True))

    def _unit(self, projection: nn.Module, features: Any) -> Tensor:
        with torch.autocast(self.device.type, enabled=False):
            return normalize(projection(features.pooler_output.float()), dim=-1)

    def _cosine(self, image: Tensor, text: Tensor) -> Tensor:
        cosine = (image * text).sum(-1)
        return self.model.logit_scale.exp() * cosine if self.scaled else cosine


def load_pickscore(
    weights: Path | Mapping[str, Tensor],
    config: Mapping[str, Any] | Path | str | None,
    folders: Sequence[Path],
) -> CLIPScore:
    """PickScore from the folder of its repository, or its tensors and its config.json."""
    if not isinstance(weights, Mapping):
        path = find_weights(weights, PICKSCORE)
        config, weights = config or path.with_name(CONFIG), read_state(path)
    if config is None:
        raise ValueError("tensors must come with their config, got none")
    found = read_config(config)
    text = {"eos_token_id": 2} | dict(found.get("text_config") or {})  # 2: the end token is the greatest id
    tensors = {name: tensor for name, tensor in weights.items() if name not in OLD_BUFFERS}
    return _score(
        {**found, "text_config": text},
        tensors,
        pickscore_pixels,
        folders,
        source="the weights of PickScore",
        scaled=True,
    )


def load_hpsv2(
    weights: Path | Mapping[str, Tensor],
    config: Mapping[str, Any] | Path | str | None,
    folders: Sequence[Path],
) -> CLIPScore:
    """HPSv2.1 from HPS_v2.1_compressed.pt, a checkpoint of open_clip, or its tensors."""
    if not isinstance(weights, Mapping):
        weights = read_state(find_weights(weights, HPSV2))
    found = VIT_H_14 if config is None else read_config(config)
    return _score(
        clip_config(found), from_open_clip(weights), hpsv2_pixels, folders, source="the weights of HPSv2", scaled=False
    )


def _score(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    preprocess: Callable[[Tensor, int], Tensor],
    folders: Sequence[Path],
    *,
    source: str,
    scaled: bool,
) -> CLIPScore:
    from transformers import CLIPConfig, CLIPModel

    built: Any = CLIPConfig.from_dict(dict(config))
    text = built.text_config
    tokenizer = Tokenizer(CLIP_FILES, folders, length=text.max_position_embeddings, padding=0, size=text.vocab_size)
    return CLIPScore(filled(on_no_device(CLIPModel, built), tensors, source), preprocess, tokenizer, scaled=scaled)


# ---- open_clip ---------------------------------------------------------------------------------------------


def clip_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """transformers' CLIPConfig, as a dict, of an open_clip config: of a model with GELU and norms of ε = 10⁻⁵."""
    vision, text, shared = config["vision_cfg"], config["text_cfg"], {"hidden_act": "gelu", "layer_norm_eps": 1e-5}
    shared["projection_dim"] = config["embed_dim"]
    return {
        "projection_dim": config["embed_dim"],
        "vision_config": shared
        | {
            "hidden_size": vision["width"],
            "intermediate_size": 4 * vision["width"],
            "num_hidden_layers": vision["layers"],
            "num_attention_heads": vision["width"] // vision["head_width"],
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
        },
        "text_config": shared
        | {
            "hidden_size": text["width"],
            "intermediate_size": 4 * text["width"],
            "num_hidden_layers": text["layers"],
            "num_attention_heads": text["heads"],
            "max_position_embeddings": text["context_length"],
            "vocab_size": text["vocab_size"],
            "eos_token_id": 2,  # the end token is the greatest id
        },
    }


NAMES = {
    "logit_scale": "logit_scale",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final": "text_model.final_layer_norm",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre": "vision_model.pre_layrnorm",
    "visual.ln_post": "vision_model.post_layernorm",
}
PROJECTIONS = {"text_projection": "text_projection.weight", "visual.proj": "visual_projection.weight"}
BLOCK = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)\.([a-z_]+)")
IN_BLOCK = {
    "attn.out_proj": "self_attn.out_proj",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def from_open_clip(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of an open_clip model by the names of transformers; names that are unknown stay as they are."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        found |= _renamed(name, tensor)
    return found


def _renamed(name: str, tensor: Tensor) -> dict[str, Tensor]:
    stem, _, last = name.rpartition(".")
    if name in NAMES:
        return {NAMES[name]: tensor}
    if stem in NAMES:
        return {f"{NAMES[stem]}.{last}": tensor}
    if name in PROJECTIONS:  # open_clip multiplies from the left
        return {PROJECTIONS[name]: tensor.T}
    matched = BLOCK.fullmatch(name)
    if matched is None:
        return {name: tensor}
    visual, layer, part, last = matched.groups()
    block = f"{'vision' if visual else 'text'}_model.encoder.layers.{layer}"
    if part in IN_BLOCK:
        return {f"{block}.{IN_BLOCK[part]}.{last}": tensor}
    if part == "attn" and last in ("in_proj_weight", "in_proj_bias"):
        kind = last.removeprefix("in_proj_")
        return {f"{block}.self_attn.{p}_proj.{kind}": rows for p, rows in zip("qkv", tensor.chunk(3), strict=True)}
    return {name: tensor}
