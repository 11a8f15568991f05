"""Models on disk: a folder with model.safetensors and config.json, enough to make the model again.

A network can be saved if it has a property `config`, a dict of JSON values; whatever made it must make an equal one
when called with these as keyword arguments. For a network of one's own that is most often its class.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mfm_ref.files import atomic_folder, fill_weights, load_json, read_weights, save_json, save_weights
from mfm_ref.networks import MLP
from mfm_ref.unet import UNet

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
FORMAT = "mfm_ref model 1"

Maker = Callable[..., nn.Module]  # keyword arguments, as in `config`, to a network


def _mlp(*, dim: int, **options: Any) -> MLP:
    return MLP(torch.zeros(dim), torch.eye(dim), **options)  # its mean and covariance come with the weights


def _unet(*, shape: list[int], **options: Any) -> UNet:
    return UNet(torch.zeros(shape), torch.eye(math.prod(shape)), **options)


NETWORKS: dict[str, Maker] = {"MLP": _mlp, "UNet": _unet}  # those that `from_pretrained` knows by name


def save_model(model: nn.Module, folder: Path) -> None:
    """Write a model's weights, and its config.json if its `network` has a `config`; a saved model is replaced whole.

    Raises:
        ValueError: a config that is no dict of JSON values, or a folder that holds something else, which would be lost.
    """
    if folder.exists():
        others = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else ["a file"]
        others = [name for name in others if name not in (WEIGHTS, CONFIG)]
        if others:
            more = f" and {len(others) - 4} more" if len(others) > 4 else ""
            raise ValueError(
                f"{folder} must be a new folder or hold a saved model alone, found {', '.join(others[:4])}{more}"
            )
    description = describe(model)
    with atomic_folder(folder) as temporary:
        if description is not None:
            save_json(description, temporary / CONFIG)
        save_weights(model, temporary / WEIGHTS)


def describe(model: nn.Module) -> dict[str, Any] | None:
    """What config.json says of a model, None if its `network` has no `config`.

    Raises:
        ValueError: a config that is no dict of JSON values.
    """
    network = getattr(model, "network", None)
    config = getattr(network, "config", None)
    if not isinstance(config, dict):
        return None
    try:
        same = json.loads(json.dumps(config, allow_nan=False)) == config
    except (TypeError, ValueError) as error:
        raise ValueError(f"the config of a network must be a dict of JSON values, got {config}: {error}") from error
    if not same:
        raise ValueError(
            f"the config of a network must be the same when read back from JSON (lists, str keys): {config}"
        )
    return {"format": FORMAT, "network": type(network).__name__, "config": config}


def load_network(folder: Path, network: Maker | None) -> nn.Module:
    """The network that config.json describes, with weights of its own making.

    Args:
        folder: what `save_model` wrote.
        network: makes the network from the arguments in config.json; None for the one that `NETWORKS` knows.

    Raises:
        ValueError: no or a damaged config.json, a network that is not known, or arguments that it does not take.
    """
    for part in ("ema", "model"):
        if not (folder / CONFIG).exists() and (folder / part / CONFIG).exists():
            raise ValueError(f"{folder} is a checkpoint: its folder {part} holds a model")
    found = load_json(folder / CONFIG)
    if found.get("format") != FORMAT or not isinstance(found.get("config"), dict):
        raise ValueError(f"{folder / CONFIG} must have the format {FORMAT!r} and a config, got {found}")
    maker = network or NETWORKS.get(str(found.get("network")))
    if maker is None:
        raise ValueError(
            f"{folder} holds the network {found.get('network')!r}; known by name are {sorted(NETWORKS)}. "
            "Give the class of any other: from_pretrained(path, network=MyNetwork)"
        )
    try:
        made = maker(**found["config"])
    except TypeError as error:
        raise ValueError(f"the config in {folder} must be the arguments of {found['network']}: {error}") from error
    if getattr(made, "config", None) != found["config"]:
        raise ValueError(
            f"a network made from the config in {folder}, {found['config']}, must have the same config, "
            f"got {getattr(made, 'config', None)}"
        )
    return made


def load_model(model: nn.Module, folder: Path) -> None:
    """Fill a model with saved weights, in the dtypes that they were saved in.

    Raises:
        ValueError: a damaged file, or names or shapes that differ.
    """
    tensors = read_weights(folder / WEIGHTS)
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name in tensors:
            tensor.data = tensor.data.to(tensors[name].dtype)
    fill_weights(model, tensors, folder / WEIGHTS)
