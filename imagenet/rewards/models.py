"""Published reward models from their own files, by transformers and torch alone."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from imagenet.rewards.blip import ImageReward, load_imagereward
from imagenet.rewards.clip import CLIPScore, load_hpsv2, load_pickscore

KINDS: dict[str, Callable[..., Any]] = {
    "pickscore": load_pickscore,
    "hpsv2": load_hpsv2,
    "imagereward": load_imagereward,
}


def load(
    kind: str,
    weights: Path | str | Mapping[str, Tensor],
    config: Mapping[str, Any] | Path | str | None = None,
    *,
    tokenizer: Path | str | None = None,
    device: torch.device | str = "cpu",
) -> CLIPScore | ImageReward:
    """A reward model with `score(images, prompts)` and `score_ids(images, input_ids, attention_mask)`, `(B,)` each.

    Images are `(B, 3, H, W)` in [0, 1], of any size. The model is frozen, and differentiable in the pixels.

    Args:
        kind: "pickscore": exp(logit_scale) · cos, around 20. "hpsv2", version 2.1: cos, around 0.3; published tables
            are of 100 times it. "imagereward": mostly within ±2.
        weights: the file, or the folder that has it under its published name: of pickscore the folder of the
            repository, with config.json; HPS_v2.1_compressed.pt; ImageReward.pt. Or the tensors of such a file.
        config: sizes, or a JSON file of them; None: of pickscore config.json beside the weights, else the published
            ones. Of pickscore as in config.json; of hpsv2 open_clip's, `embed_dim`, `vision_cfg` and `text_cfg`; of
            imagereward `vision_cfg` and `med_config`.
        tokenizer: folder of CLIP's vocab.json and merges.txt, or of BERT's vocab.txt; None: beside the weights, or in
            a folder `tokenizer` beside them. Only `score` needs it.
        device: where the model computes, and where images must be.

    Raises:
        ValueError: another kind; a file that is missing, with what to fetch and from where, or is damaged; weights that
            are missing, unknown or of another shape.
        ImportError: transformers is not installed.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise ImportError(f"{kind} needs transformers: pip install transformers") from error
    place = weights if isinstance(weights, Mapping) else Path(weights)
    folders = _folders(place, tokenizer)
    return KINDS[kind](place, config, folders).to(device)


def _folders(place: Path | Mapping[str, Tensor], tokenizer: Path | str | None) -> list[Path]:
    """Where a vocabulary may be."""
    if tokenizer is not None:
        return [Path(tokenizer)]
    if isinstance(place, Mapping):
        return []
    beside = place if place.is_dir() else place.parent
    return [beside, beside / "tokenizer"]
