"""The published files of reward models: where they are, and their tensors in a module, each accounted for."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from mfm_ref.files import load_json

Module = TypeVar("Module", bound=nn.Module)

PICKSCORE = ("model.safetensors", "pytorch_model.bin")
HPSV2 = ("HPS_v2.1_compressed.pt",)
IMAGEREWARD = ("ImageReward.pt",)
ORIGINS = {
    PICKSCORE: "config.json and model.safetensors of huggingface.co/yuvalkirstain/PickScore_v1 (3.9 GB)",
    HPSV2: "HPS_v2.1_compressed.pt of huggingface.co/xswu/HPSv2 (3.9 GB)",
    IMAGEREWARD: "ImageReward.pt of huggingface.co/THUDM/ImageReward (1.8 GB)",
}
CONFIG = "config.json"


def find_weights(place: Path, names: Sequence[str]) -> Path:
    """The file at a place, or the first in the folder there that has one of the names.

    Raises:
        ValueError: there is none, with what to fetch and from where.
    """
    found = next((path for path in (place, *(place / name for name in names)) if path.is_file()), None)
    if found is None:
        raise ValueError(
            f"{place} must be the file or the folder of published weights, and there is no {' or '.join(names)}: fetch "
            f"{ORIGINS[tuple(names)]}, and give its path"
        )
    return found


def read_config(config: Mapping[str, Any] | Path | str) -> Mapping[str, Any]:
    """A config that is given, or in a JSON file. Raises ValueError for a file that cannot be read."""
    return config if isinstance(config, Mapping) else load_json(Path(config))


def on_no_device(build: Any, *arguments: Any, **options: Any) -> Any:
    """What `build` makes, with tensors that have a shape and no numbers yet."""
    with torch.device("meta"):
        return build(*arguments, **options)


def filled(module: Module, tensors: Mapping[str, Tensor], source: Path | str) -> Module:
    """A module from `on_no_device` with the tensors of a file: frozen, in eval mode, in float32, on the CPU.

    Args:
        module: of transformers, or of linear layers; its only buffers are `position_ids`, which count from 0.
        tensors: by the module's names.
        source: for messages.

    Raises:
        ValueError: tensors that are missing, unknown, of another shape or no real numbers.
    """
    wanted = module.state_dict()
    faults = {
        "missing": [name for name in wanted if name not in tensors],
        "unknown": [name for name in tensors if name not in wanted],
        "of another shape or kind": [
            f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)} for {tuple(wanted[name].shape)}"
            for name in wanted
            if name in tensors and (tensors[name].shape != wanted[name].shape or not tensors[name].is_floating_point())
        ],
    }
    if any(faults.values()):
        words = "; ".join(f"{kind}: {some(names)}" for kind, names in faults.items() if names)
        raise ValueError(f"{source} must hold each weight of the model that its config says, got {words}")
    copies = {name: tensor.to(torch.float32, copy=True) for name, tensor in tensors.items()}
    module.load_state_dict(copies, assign=True)
    for owner in module.modules():
        for name, buffer in owner.named_buffers(recurse=False):
            if buffer.is_meta:
                assert name == "position_ids", name
                owner.position_ids = torch.arange(buffer.shape[-1]).expand(buffer.shape)
    return module.eval().requires_grad_(False)


def some(names: Sequence[str]) -> str:
    """The first names of many."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
