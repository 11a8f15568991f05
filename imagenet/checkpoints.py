"""The public weights of SiT, DMF and MFM, read into `SiT` and written back; and a Meta Flow Map begun from the others.

    python -m imagenet.checkpoints convert FILE OUT --kind sit | dmf | mfm
    python -m imagenet.checkpoints back FOLDER OUT.pt | OUT.safetensors
    python -m imagenet.checkpoints init FOLDER OUT

`convert` makes a folder with model.safetensors and config.json of what one of the three projects published or trained;
`back` writes a file that the project itself reads; `init` makes a Meta Flow Map that begins as the given map.

        noise, data at   output            times embedded   the file's names
    SiT      0, 1        data − noise      s                flat
    DMF      1, 0        noise − data      1−s, 1−u         flat
    MFM      0, 1        data − noise      1−s, 1−u, t      under model.model.dit.

In this project noise is at 0 and data at 1. To that end the outlet's weight and bias change sign where a network puts
out noise − data (an MFM does so too before its last step, which negates it), and `noise_times` turns the times round.
Nothing else changes, so that the way back is exact; half precision is raised to float32, and stays that.
"""

import argparse
import math
import pickle
import re
import sys
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from imagenet.commands import refusing
from imagenet.sit import KINDS, SIZES, SiT
from mfm_ref import FlowMap
from mfm_ref.files import atomic_path, load_json, read_weights, save_tensors

# Files by the name of the repository that holds them on huggingface.co, and what they are.
HUB = {"kyungmnlee/DMF": ("dmf_xl_2_256.pt", "dmf"), "adh1s/mfm": ("mfm-xl2.pt", "mfm")}
SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".safetensors")

NESTED = ("ema", "state_dict", "model")  # where a checkpoint keeps its weights; the first is taken
WRAPPERS = ("module.", "_orig_mod.", "model.", "dit.")
# Weights that no sample depends on: the spread that weighs DMF's loss, REPA's projections, what MFM is trained with.
TRAINING_ONLY: dict[str, tuple[str, ...]] = {
    "sit": (),
    "dmf": ("logvar_linear.", "projectors."),
    "mfm": ("teacher_model.", "weighting_model."),
}

# Names here, and in all three projects; those inside a block come second.
SHARED = {
    "patch_z": "x_embedder.proj",
    "position": "pos_embed",
    "labels": "y_embedder.embedding_table",
    "outlet": "final_layer.linear",
    "outlet_modulation": "final_layer.adaLN_modulation.1",
    "attention.qkv": "attn.qkv",
    "attention.mix": "attn.proj",
    "attention.q_norm.weight": "attn.q_norm.scale",
    "attention.k_norm.weight": "attn.k_norm.scale",
    "mlp.0": "mlp.fc1",
    "mlp.2": "mlp.fc2",
    "modulation": "adaLN_modulation.1",
}
ONE_EMBEDDER = {"encoder_s": "t_embedder"}
OWN = {
    "sit": ONE_EMBEDDER,
    "dmf": ONE_EMBEDDER,
    "mfm": {
        "encoder_s": "s_embedder",
        "encoder_u": "t_embedder",
        "decoder_s": "s_embedder_second",
        "decoder_u": "t_embedder_second",
        "context_t": "t_cond_embedder",
        "patch_x": "x_cond_embedder.proj",
        "context_modulation": "x_cond_adaLN.1",
        "scales": "guidance_embedder.embedding_table",
    },
}
PUBLISHED_UNDER = {"sit": "", "dmf": "", "mfm": "model.model.dit."}


# ---- reading -------------------------------------------------------------------------------------------


def load(
    source: Path | str,
    kind: str | None = None,
    *,
    num_heads: int = 16,
    encoder_depth: int | None = 20,
    guidance: Sequence[float] = (1.0, 2.5),
    is_zero_data: bool = True,
    preserve_t_cond_0: bool = False,
) -> SiT:
    """A network with the weights of a file of SiT, DMF or MFM, or of a folder of this project; on the CPU, in float32.

    A folder is what `FlowMap.save_pretrained` wrote, or the part `ema` or `model` of a checkpoint. It says all of
    itself, and the options below are those of files; their defaults are the published networks'. Of a folder that
    `imagenet.finetune` wrote the network has drift_only = True: only its drift means something.

    Args:
        source: a file (.safetensors, or anything that torch.load reads without running code), a folder, or a file on
            huggingface.co: "kyungmnlee/DMF", "adh1s/mfm" or "owner/repository/file".
        kind: "sit", "dmf" or "mfm"; None where the file or folder tells.
        num_heads: of the attention.
        encoder_depth: blocks that see the start s (dmf, mfm). None with kind "dmf": a network of one time, such as the
            one that DMF was made of.
        guidance: scales that the rows of the guidance table stand for (mfm).
        is_zero_data: whether times and output are turned round inside (mfm).
        preserve_t_cond_0: whether the context counts t, so that none is seen at t = 0 (mfm).

    Raises:
        ValueError: a file that cannot be had or read, keys or shapes that do not fit, weights that are not finite or
            not floating-point, options that cannot be right; from `from_state`.
    """
    path, kind = locate(source, kind)
    if path.is_dir():
        network = _own(path)
        if kind is not None and kind != kind_of(network):
            raise ValueError(f"{path} holds a network of the kind {kind_of(network)!r}, got kind={kind!r}")
        return network
    try:
        return from_state(
            read_state(path),
            kind,
            num_heads=num_heads,
            encoder_depth=encoder_depth,
            guidance=guidance,
            is_zero_data=is_zero_data,
            preserve_t_cond_0=preserve_t_cond_0,
        )
    except ValueError as error:
        raise ValueError(str(error) if str(path) in str(error) else f"{path}: {error}") from error


def _own(folder: Path) -> SiT:
    if not folder.is_dir():
        raise ValueError(f"{folder} must be a folder of this project, such as convert makes of a file")
    network = FlowMap.from_pretrained(folder, network=_unfilled).network
    assert isinstance(network, SiT)
    network.drift_only = load_json(folder / "config.json").get("drift_only") is True
    return network


def _unfilled(**config: Any) -> SiT:
    """A network without the weights that `SiT` begins with, which take longer to draw than others to read."""
    with torch.device("meta"):
        network = SiT(**config)
    return network.to_empty(device="cpu")


def locate(source: Path | str, kind: str | None = None) -> tuple[Path, str | None]:
    """A file or folder on this disk, or a file of huggingface.co, downloaded if need be; its kind, as far as known.

    Raises:
        ValueError: nothing of that name is there, and it is no name of a file there; a file that cannot be had.
    """
    if Path(source).exists():
        return Path(source), kind
    name = str(source)
    owner, _, rest = name.partition("/")
    repository, _, file = rest.partition("/")
    repository = f"{owner}/{repository}"
    if name in HUB:
        file, known = HUB[name]
        if kind not in (None, known):
            raise ValueError(f"{name} holds weights of the kind {known!r}, got kind={kind!r}")
        kind = known
    if not file.endswith(SUFFIXES) or not owner.strip("."):
        raise ValueError(
            f"{name} must be a file or folder that is there, one of {sorted(HUB)}, or owner/repository/file on "
            "huggingface.co. SiT-XL-2-256x256.pt is linked from the README of github.com/willisma/SiT"
        )
    try:
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(repository, file)), kind
    except Exception as error:  # of huggingface_hub, of the network, of the disk
        raise ValueError(
            f"there is no file or folder {name}, and {file} could not be had from huggingface.co "
            f"({type(error).__name__}). Download https://huggingface.co/{repository}/resolve/main/{file} where there "
            f"is a network, and give its path"
        ) from error


def read_state(path: Path | str) -> dict[str, Tensor]:
    """The weights in a file by their plain names, whatever they are nested in and whatever stands before each name.

    Of a checkpoint the average (`ema`) is taken, else `state_dict`, else `model`. Tensors of .pt files stay on the
    disk until they are used; nothing in the file is run.

    Raises:
        ValueError: a file that is missing or damaged, that torch would have to run code to read, or that holds
            anything but tensors; two keys that are one without what stands before them.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        return plain_names(read_weights(path))
    if not path.is_file():
        raise ValueError(f"{path} must be a file")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # the options of a training script
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        culprit = re.search(r"GLOBAL (\S+)", str(error))
        if culprit is None:
            raise ValueError(
                f"{path} must be a file that torch.load reads: it is damaged, or of another kind"
            ) from error
        raise ValueError(
            f"{path} must hold tensors and plain values alone, but reading it would run {culprit[1]}. "
            "If you trust whoever made it, write its weights to a file of their own: "
            f"torch.save(torch.load({path.name!r}, weights_only=False)['ema'], 'weights.pt'), "
            "or 'state_dict' or 'model' for 'ema'"
        ) from error
    except Exception as error:  # torch.load fails in many ways, none of which names the file
        raise ValueError(f"{path} must be a file that torch.load reads, got {type(error).__name__}: {error}") from error
    while isinstance(found, dict):
        inner = next((found[name] for name in NESTED if isinstance(found.get(name), dict) and found[name]), None)
        if inner is None:
            break
        found = inner
    if not isinstance(found, dict) or not found:
        raise ValueError(f"{path} must hold a dict of tensors, got {type(found).__name__} of no tensors")
    others = [str(name) for name, value in found.items() if not (isinstance(name, str) and isinstance(value, Tensor))]
    if others:
        raise ValueError(f"{path} must hold tensors alone (or under {', '.join(NESTED)}), got also {_some(others)}")
    return plain_names(found)


def plain_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by names without `module.`, `_orig_mod.`, `model.` and `dit.` in front, in any number and order.

    What serves training alone keeps its own first word: `model.teacher_model.dit.…` becomes `teacher_model.dit.…`.

    Raises:
        ValueError: two names that become one.
    """
    origins: dict[str, list[str]] = {}
    for name in tensors:
        origins.setdefault(_plain(name), []).append(name)
    clashes = [" and ".join(names) for names in origins.values() if len(names) > 1]
    if clashes:
        raise ValueError(f"every weight must be there once, got {_some(clashes)}")
    return {plain: tensors[names[0]] for plain, names in origins.items()}


def _plain(name: str) -> str:
    while not any(name.startswith(prefixes) for prefixes in TRAINING_ONLY.values()):
        wrapper = next((prefix for prefix in WRAPPERS if name.startswith(prefix)), None)
        if wrapper is None:
            break
        name = name.removeprefix(wrapper)
    return name


def training_only(names: Iterable[str], kind: str) -> list[str]:
    """Of plain names those that no sample depends on, and that `from_state` leaves out."""
    return [name for name in names if name.startswith(TRAINING_ONLY[kind])]


# ---- from and to the three projects --------------------------------------------------------------------


def from_state(
    tensors: Mapping[str, Tensor],
    kind: str | None = None,
    *,
    num_heads: int = 16,
    encoder_depth: int | None = 20,
    guidance: Sequence[float] = (1.0, 2.5),
    is_zero_data: bool = True,
    preserve_t_cond_0: bool = False,
) -> SiT:
    """A network with a project's weights; sizes are read off them, and every key must be one that it knows.

    Half precision is raised to float32. Weights that serve training alone (`training_only`) are left out.

    Args:
        tensors: by the project's names, plain or with what `plain_names` removes; they are copied.
        kind, num_heads, encoder_depth, guidance, is_zero_data, preserve_t_cond_0: as in `load`.

    Raises:
        ValueError: keys or shapes that do not fit the kind, with the reason; options that cannot be right; weights
            that are not floating-point, not finite, or in part float64.
    """
    tensors = plain_names(tensors)
    kind = _kind_of_state(tensors, kind)
    ignored = training_only(tensors, kind)
    tensors = {name: tensor for name, tensor in tensors.items() if name not in ignored}
    config = _sizes(tensors)
    _check_heads(tensors, num_heads, config["width"], config["depth"])
    config |= {"heads": num_heads, "noise_times": kind == "dmf" or (kind == "mfm" and is_zero_data)}
    if kind != "sit":
        config["encoder_depth"] = encoder_depth
    if kind == "mfm":
        config |= {"context": True, "guidance": [float(w) for w in guidance], "blank_start": preserve_t_cond_0}
    with torch.device("meta"):
        network = SiT(**config)
    wanted = {theirs(name, kind): (name, tuple(tensor.shape)) for name, tensor in network.state_dict().items()}
    _check_keys(tensors, {key: shape for key, (_, shape) in wanted.items()}, kind)
    _check_values(tensors)
    state = {}
    for key, (name, _) in wanted.items():
        tensor = tensors[key].detach()
        dtype = torch.float64 if tensor.dtype == torch.float64 else torch.float32
        state[name] = tensor.to(dtype, copy=True, memory_format=torch.contiguous_format)
    network.load_state_dict(_signed(state, network), assign=True)
    return network


def to_state(network: SiT, kind: str) -> dict[str, Tensor]:
    """The weights of a network by a project's names, as it publishes them; all but the outlet's share their memory.

    Raises:
        ValueError: a network that the project's code cannot hold.
    """
    if kind_of(network) != kind:
        raise ValueError(f"the network is of the kind {kind_of(network)!r}, got {kind!r}")
    if network.context and (network.reads_tx or not network.guidance):
        raise ValueError(
            "MFM's code reads its context as x and has a guidance table: a network for it must have reads_tx = False "
            f"and guidance, got {network.reads_tx} and {list(network.guidance)}"
        )
    state = _signed({name: tensor.detach() for name, tensor in network.state_dict().items()}, network)
    return {PUBLISHED_UNDER[kind] + theirs(name, kind): tensor for name, tensor in state.items()}


def kind_of(network: SiT) -> str:
    """Which project's network it is: "sit", "dmf" or "mfm".

    Raises:
        ValueError: none's: two times without a context, of noise at 0.
    """
    if network.context:
        return "mfm"
    if network.noise_times:
        return "dmf"
    if network.two_times:
        raise ValueError("DMF has its noise at 1: a network of its kind has noise_times = True")
    return "sit"


def theirs(name: str, kind: str) -> str:
    """The plain name that a weight of `SiT` has in a project."""
    block, inner = re.fullmatch(r"(blocks\.\d+\.)?(.*)", name).groups(default="")  # type: ignore[union-attr]
    for own, other in (SHARED | OWN[kind]).items():
        if inner == own or inner.startswith(own + "."):
            return block + other + inner.removeprefix(own)
    raise KeyError(f"{name} has no name in {kind}")


def _signed(state: dict[str, Tensor], network: SiT) -> dict[str, Tensor]:
    """Weights with the outlet negated where the project's network puts out noise − data."""
    if not network.noise_times:
        return state
    return state | {name: -state[name] for name in ("outlet.weight", "outlet.bias")}


# ---- what cannot be right ------------------------------------------------------------------------------


def _kind_of_state(tensors: Mapping[str, Tensor], kind: str | None) -> str:
    """The kind of the weights; refuses one that they contradict, and None where they do not tell."""
    if kind not in (None, *KINDS):
        raise ValueError(f"kind must be one of {list(KINDS)}, got {kind!r}")
    if any("joint_attn" in name for name in tensors):
        raise ValueError("checkpoints made with use_joint_attention (joint_attn in every block) are not supported")
    foreign = [name for name in tensors if name.startswith(("logvar_linear.", "projectors."))]
    outlet, inlet = (tensors.get(f"{name}.weight") for name in ("final_layer.linear", "x_embedder.proj"))
    told, reason = None, ""
    if any(name.startswith("t_cond_embedder.") for name in tensors):
        told, reason = "mfm", "these are keys of an MFM (t_cond_embedder)"
    elif foreign:
        told, reason = "dmf", f"these are keys of a network with its noise at 1, DMF or the base of it ({foreign[0]})"
    elif outlet is not None and inlet is not None and outlet.shape[0] == 2 * inlet[0].numel():
        told, reason = "sit", f"{outlet.shape[0]} rows in final_layer.linear: learn_sigma, willisma's SiT"
    if kind is None:
        if told is None:
            raise ValueError(
                "kind must be given, 'sit' or 'dmf': their files have the same keys, and run through time in opposite "
                "directions"
            )
        return told
    if told is not None and kind != told:
        raise ValueError(f"{reason}: kind={told!r}, got kind={kind!r}")
    if kind == "mfm" and told is None:
        raise ValueError("an MFM has keys t_cond_embedder, and here there are none: kind='sit' or kind='dmf'")
    return kind


def _sizes(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments of `SiT` that shapes of its weights tell."""
    needed = {"x_embedder.proj.weight": 4, "pos_embed": 3, "y_embedder.embedding_table.weight": 2}
    needed |= {"final_layer.linear.weight": 2, "blocks.0.attn.qkv.weight": 2}
    missing = [name for name in needed if name not in tensors]
    if missing:
        raise ValueError(f"these keys are missing: {_some(missing)}; there are {_some(list(tensors))}")
    wrong = [f"{name} {tuple(tensors[name].shape)}" for name, n in needed.items() if tensors[name].ndim != n]
    if wrong:
        raise ValueError(f"weights must have as many dimensions as those of SiT, got {_some(wrong)}")
    width, channels, patch, _ = tensors["x_embedder.proj.weight"].shape
    side = math.isqrt(tensors["pos_embed"].shape[1])
    if side**2 != tensors["pos_embed"].shape[1]:
        raise ValueError(f"images must be square, got {tensors['pos_embed'].shape[1]} patches in pos_embed")
    blocks = {int(found[1]) for name in tensors if (found := re.match(r"blocks\.(\d+)\.", name))}
    if blocks != set(range(len(blocks))):
        gap = min(set(range(len(blocks))) - blocks)
        raise ValueError(f"blocks must be numbered from 0 without a gap: the keys blocks.{gap}.* are missing")
    return {
        "shape": [channels, side * patch, side * patch],
        "patch": patch,
        "width": width,
        "depth": len(blocks),
        "n_classes": tensors["y_embedder.embedding_table.weight"].shape[0] - 1,
        "learn_sigma": tensors["final_layer.linear.weight"].shape[0] == 2 * channels * patch**2,
        "qk_norm": "blocks.0.attn.q_norm.scale" in tensors,
    }


def _check_heads(tensors: Mapping[str, Tensor], heads: int, width: int, depth: int) -> None:
    """Refuse a number of heads other than the weights', where these tell, or that of the published size."""
    norm = tensors.get("blocks.0.attn.q_norm.scale")
    if norm is not None and norm.shape[0] * heads != width:
        raise ValueError(
            f"num_heads must be {width / norm.shape[0]:g}: q_norm is of heads of {norm.shape[0]}, got {heads}"
        )
    size = _size_of(width, depth)
    if size is not None and heads != SIZES[size]["heads"]:
        raise ValueError(
            f"num_heads must be {SIZES[size]['heads']}, as the weights are of the size {size}, of width {width} and "
            f"depth {depth}; got {heads}"
        )


def _size_of(width: int, depth: int) -> str | None:
    """The name of a published size, None for any other."""
    found = [size for size, numbers in SIZES.items() if (numbers["width"], numbers["depth"]) == (width, depth)]
    return found[0] if found else None


def _check_keys(tensors: Mapping[str, Tensor], wanted: Mapping[str, tuple[int, ...]], kind: str) -> None:
    """Refuse keys that are missing or unknown, and shapes that differ."""
    missing = [name for name in wanted if name not in tensors]
    unknown = [name for name in tensors if name not in wanted]
    faults = [f"missing {_some(missing)}"] if missing else []
    faults += [f"unknown {_some(unknown)}"] if unknown else []
    shapes = [
        f"{name} {tuple(tensors[name].shape)} and not {shape}"
        for name, shape in wanted.items()
        if name in tensors and tensors[name].shape != shape
    ]
    faults += [f"of another shape {_some(shapes)}"] if shapes else []
    if "guidance_embedder.embedding_table.weight" in " ".join(shapes):
        faults += ["guidance must name one scale for each row of guidance_embedder"]
    if faults:
        raise ValueError(f"the weights must be those of kind={kind!r}: {'; '.join(faults)}")


def _check_values(tensors: Mapping[str, Tensor]) -> None:
    """Refuse weights that are not numbers, or that are of a precision which reading would lower."""
    allowed = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    kinds = [f"{name} of {tensor.dtype}" for name, tensor in tensors.items() if tensor.dtype not in allowed]
    if kinds:
        raise ValueError(f"weights must be floating-point, of 16 bits or more, got {_some(kinds)}")
    if len({tensor.dtype == torch.float64 for tensor in tensors.values()}) > 1:
        raise ValueError("weights must be all or none float64, got some")
    bad = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if bad:
        raise ValueError(f"weights must be finite, got NaN or infinity in {_some(bad)}")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


# ---- a Meta Flow Map to begin with ---------------------------------------------------------------------


def mfm_from(
    base: SiT, *, encoder_depth: int | None = None, guidance: Sequence[float] = (1.0, 2.5), reads_tx: bool = False
) -> SiT:
    """A Meta Flow Map that begins as `base`: v_{s,u}(z; t, x) is base's, exactly, whatever t, x and guidance.

    Of a base of one time (SiT), v_{s,u} = b_s: encoder and decoder get copies of its embedder for s, and those for u
    begin switched off. Of one of two times (DMF), the encoder gets a copy for s and the decoder one for u. What is
    switched off has a last layer of zeros, and so has what scales and shifts the context; gradients reach these zeros,
    and by way of them the rest. Embedders that are copied in part keep base's first layer, the others have Xavier's.

    Args:
        base: a network without context.
        encoder_depth: number of blocks that see s. None for that of `base`, or of its size in `SIZES`.
        guidance: scales of the rows of the guidance table; empty for none.
        reads_tx: take the context as t·x.

    Returns:
        a network with base's dtype and device; of its weights, those by Xavier come from torch's own random source.

    Raises:
        ValueError: a base with a context, another encoder_depth than base's own, or none where there is no default;
            from `SiT`.
    """
    if base.context:
        raise ValueError("base must be a SiT or a DMF, got a network that has a context already")
    own, size = base.config["encoder_depth"], _size_of(base.config["width"], base.config["depth"])
    if own is not None and encoder_depth not in (None, own):
        raise ValueError(
            f"encoder_depth must be that of base, {own}, for the map to begin as base, got {encoder_depth}"
        )
    if encoder_depth is None:
        encoder_depth = own if own is not None or size is None else SIZES[size]["encoder_depth"]
    if encoder_depth is None:
        raise ValueError("encoder_depth must be given for a base of one time whose size is none in SIZES")
    config = {"encoder_depth": encoder_depth, "context": True, "guidance": list(guidance), "reads_tx": reads_tx}
    network = SiT(**(base.config | config))
    network.to(base.position)
    weights = {name: tensor.detach() for name, tensor in base.state_dict().items()}
    copied, kept = (("decoder_u",), ("encoder_u",)) if base.two_times else (("decoder_s",), ("encoder_u", "decoder_u"))
    state = dict(weights)
    for layer in ("mlp.0.weight", "mlp.0.bias", "mlp.2.weight", "mlp.2.bias"):
        tensor = weights[f"encoder_s.{layer}"]
        state |= {f"{embedder}.{layer}": tensor for embedder in copied}
        state |= {f"{embedder}.{layer}": tensor if "mlp.0" in layer else torch.zeros_like(tensor) for embedder in kept}
    state |= {f"patch_x.{part}": weights[f"patch_z.{part}"] for part in ("weight", "bias")}
    network.load_state_dict(network.state_dict() | state)  # strict: every weight of base has its place
    return network


def flow_map_from(base: SiT, *, encoder_depth: int | None = None) -> SiT:
    """A flow map of two times, as DMF, that begins as `base` on the diagonal: v_{s,s} = b_s, exactly.

    It has the weights of a network of one time: the first blocks embed s, the others and the outlet u, by one embedder.

    Args:
        base: a network of one time (SiT).
        encoder_depth: number of blocks that see s; None for that of base's size in `SIZES`.

    Raises:
        ValueError: a base of two times, no encoder_depth where there is no default; from `SiT`.
    """
    if base.two_times:
        raise ValueError("base must be a SiT, got a network of two times")
    size = _size_of(base.config["width"], base.config["depth"])
    if encoder_depth is None and size is None:
        raise ValueError("encoder_depth must be given for a base of one time whose size is none in SIZES")
    network = SiT(**(base.config | {"encoder_depth": encoder_depth or SIZES[size or ""]["encoder_depth"]}))
    network.to(base.position)
    network.load_state_dict(base.state_dict())
    return network


# ---- the command line ----------------------------------------------------------------------------------


def convert(options: argparse.Namespace) -> str:
    """Write a file of another project as a folder of this one."""
    _check_new(options.out)
    path, kind = locate(options.source, options.kind)
    if path.is_dir():
        raise ValueError(f"{path} is a folder, which needs no converting: give FILE or an id")
    tensors = read_state(path)
    network = load(
        path,
        kind,
        num_heads=options.num_heads,
        encoder_depth=options.encoder_depth or None,
        guidance=options.guidance,
        is_zero_data=options.is_zero_data,
        preserve_t_cond_0=options.preserve_t_cond_0,
    )
    FlowMap(network).save_pretrained(options.out)
    kind = kind_of(network)
    lost = training_only(tensors, kind)
    note = f"\nleft out, as training alone needs it: {_some(lost)}" if lost else ""
    halves = sorted({str(tensor.dtype) for tensor in tensors.values()} & {"torch.bfloat16", "torch.float16"})
    note += f"\nraised to float32: weights of {' and '.join(halves)}" if halves else ""
    return f"{options.out}: {kind}, {_size(network)}{note}"


def back(options: argparse.Namespace) -> str:
    """Write a folder of this project as a file of another one."""
    out: Path = options.out
    if out.exists() or out.suffix not in (".pt", ".safetensors"):
        raise ValueError(f"OUT must be a new file, named .pt or .safetensors, got {out}")
    network = _own(options.source)
    kind = options.kind or kind_of(network)
    state = to_state(network, kind)
    if out.suffix == ".safetensors":
        save_tensors(state, out)
    else:
        with atomic_path(out) as temporary:
            torch.save(state, temporary)
    settings = {"num_heads": network.config["heads"]}
    if network.two_times:
        settings["encoder_depth" if kind == "mfm" else "dmf_depth"] = network.encoder_depth
    if kind == "mfm":
        settings |= {"model_guidance_class_ws": list(network.guidance[1:]), "is_zero_data": network.noise_times}
        settings |= {"preserve_t_cond_0": network.blank_start}
    told = ", ".join(f"{name}={value}" for name, value in settings.items())
    return f"{out}: {kind}, {_size(network)}; read it with {told}"


def init(options: argparse.Namespace) -> str:
    """Write the Meta Flow Map that begins as the map in a folder."""
    _check_new(options.out)
    torch.manual_seed(options.seed)
    network = mfm_from(
        _own(options.source),
        encoder_depth=options.encoder_depth,
        guidance=options.guidance,
        reads_tx=options.reads_tx,
    )
    FlowMap(network).save_pretrained(options.out)
    return f"{options.out}: mfm, {_size(network)}, encoder_depth={network.encoder_depth}"


def _scales(text: str) -> list[float]:
    return [float(w) for w in text.split(",") if w]


def _check_new(out: Path) -> None:
    """Refuse a folder that is there: a model in it would be lost."""
    if out.exists():
        raise ValueError(f"OUT must be a new folder, and {out} is there")


def _size(network: SiT) -> str:
    return f"{sum(p.numel() for p in network.parameters()) / 1e6:.1f} M parameters"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command and its options."""
    parser = argparse.ArgumentParser(
        prog="python -m imagenet.checkpoints", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    texts = {convert: "FILE or hub id to a folder", back: "folder to FILE", init: "folder to a folder"}
    parsers = {}
    for command, text in texts.items():
        parsers[command] = commands.add_parser(command.__name__, help=text, description=command.__doc__)
        parsers[command].set_defaults(run=command)
        parsers[command].add_argument(
            "source", type=str if command is convert else Path, metavar=text.split()[0].upper()
        )
        parsers[command].add_argument("out", type=Path, metavar="OUT")
    for command in (convert, back):
        parsers[command].add_argument(
            "--kind", choices=KINDS, help="whose file it is; may be left out where that is clear"
        )
    for command in (convert, init):
        parsers[command].add_argument(
            "--guidance", type=_scales, default=[1.0, 2.5], metavar="W,W", help="scales of the guidance table"
        )
    whole = parsers[convert].add_argument
    whole("--num-heads", type=int, default=16, help="of the attention (default: %(default)s)")
    whole(
        "--encoder-depth", type=int, default=20,
        help="blocks that see the start s; 0 for a DMF of one time (default: %(default)s)",
    )  # fmt: skip
    flag = argparse.BooleanOptionalAction
    whole("--is-zero-data", action=flag, default=True, help="an MFM with its times and output turned round inside")
    whole("--preserve-t-cond-0", action=flag, default=False, help="an MFM whose context counts t")
    parsers[init].add_argument("--encoder-depth", type=int, help="blocks that see s (default: base's, or of its size)")
    parsers[init].add_argument("--reads-tx", action=flag, default=False, help="take the context as t x")
    parsers[init].add_argument("--seed", type=int, default=0, help="of the weights that are drawn")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; what is wrong with options or files ends it with the message alone."""
    options = parse(arguments)
    with refusing("imagenet.checkpoints"):
        print(options.run(options))


if __name__ == "__main__":
    main(sys.argv[1:])
