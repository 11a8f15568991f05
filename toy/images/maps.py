"""Training of the image rungs: from data alone, or a base drift first and then a map that has it as teacher.

- `semigroup`, `mean_flow`: E13 + E14 from images alone, the semigroup law as in the paper.
- `base`: plain flow matching, E13 in the empty context. Its drift is what GLASS and SDE rollouts use.
- `teacher`: goes on from the weights of the base, E13 + E14 with E12 of the base drift wherever v_{s,s} is needed.

Each map gets about the same processor time, by the costs of a step that `benchmarks/objectives.py` counts: 1 for flow
matching, 1.33 for the two from data, 2 for the teacher's. The base takes 0.4 of the teacher's time.
"""

import copy
import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mfm_ref import FlowMap, RandomBatches, TrainConfig, UNet, meta_flow_map_loss, no_context, train
from mfm_ref.files import load_json, save_json
from toy.common import generator, stream_of
from toy.images.data import Images, load_images
from toy.images.settings import TrainSettings, training_settings

COSTS = {"base": 1.0, "teacher": 2.0, "semigroup": 4 / 3, "mean_flow": 4 / 3}  # of a step, in steps of flow matching
BASE_SHARE = 0.4
# Exponents of the adaptive weight, diagonal and consistency. Noisy targets want small ones: `toy.digits` found 0.2, and
# those of mean flow are noisy in both halves.
EXPONENTS = {"base": (0.2, 0.0), "teacher": (0.5, 0.5), "semigroup": (0.2, 0.2), "mean_flow": (0.2, 0.0)}


def steps_of(config: TrainSettings, name: str) -> int:
    """Steps of a map within the processor time of `train_steps` steps of the semigroup law."""
    share = {"base": BASE_SHARE, "teacher": 1 - BASE_SHARE}.get(name, 1.0)
    return max(1, round(config.train_steps * share * COSTS["semigroup"] / COSTS[name]))


def kept_in(config: TrainSettings, name: str) -> dict[str, Any]:
    """Options of `mfm_ref.train`, by which a killed training goes on from `out/checkpoints`."""
    return {"folder": config.out / "checkpoints" / name, "tag": repr(training_settings(config))}


def names_of(config: TrainSettings) -> list[str]:
    """The maps to train. Raises ValueError for one that is not known, or where `map` is not among them."""
    names = [name.strip() for name in config.train_maps.split(",") if name.strip()]
    known = ("semigroup", "mean_flow", "teacher")
    if not names or any(name not in known for name in names):
        raise ValueError(f"train_maps must be some of {', '.join(known)}, got {config.train_maps!r}")
    if config.map not in names:
        raise ValueError(f"map must be one of train_maps, {', '.join(names)}, got {config.map!r}")
    return names


def unet(config: TrainSettings, mean: Tensor, cov: Tensor) -> UNet:
    """The U-Net of the settings."""
    try:
        channels = [int(c) for c in config.train_channels.split(",")]
    except ValueError:
        raise ValueError(f"train_channels must be numbers with commas, got {config.train_channels!r}") from None
    return UNet(mean, cov, channels=channels, blocks=config.train_blocks, patch=config.train_patch)


# A new backbone is one more function here: of the settings, the mean (1, H, W) and the covariance (D, D) of the images.
NETWORKS: dict[str, Callable[[TrainSettings, Tensor, Tensor], nn.Module]] = {"unet": unet}


def new_network(config: TrainSettings, data: Images) -> nn.Module:
    """An untrained network: the exact map of the Gaussian that the images have as mean and covariance."""
    if config.train_network not in NETWORKS:
        raise ValueError(f"train_network must be one of {', '.join(NETWORKS)}, got {config.train_network!r}")
    return NETWORKS[config.train_network](config, *data.gaussian())


def train_map(config: TrainSettings, data: Images, name: str, base: FlowMap | None = None) -> FlowMap:
    """One of base, semigroup, mean_flow; or, with the base, teacher."""
    stage = 11 + list(COSTS).index(name)
    batches = RandomBatches(lambda rng: data.sample(config.train_batch, rng)[0], generator(config, stage))
    variance = float(data.gaussian()[1].diagonal().mean())
    p, p_consistency = EXPONENTS[name]
    options: dict[str, Any] = {"consistency": "mean_flow" if name == "mean_flow" else "semigroup"}
    if name == "base":
        options = {"consistency": None, "context": no_context}
    elif base is not None:
        options["drift"] = base.drift

    def loss(X: FlowMap, x1: Tensor, rng: torch.Generator | None) -> Tensor:
        return meta_flow_map_loss(X, x1, data_var=variance, p=p, p_consistency=p_consistency, generator=rng, **options)

    if base is None:
        torch.manual_seed(stream_of(config, 11))  # every map begins alike
        X = FlowMap(new_network(config, data)).to(config.device)
    else:
        X = copy.deepcopy(base).requires_grad_().train()
    settings = TrainConfig(
        steps=steps_of(config, name), lr=config.train_lr, decay=config.train_decay, seed=stream_of(config, stage)
    )
    return train(X, loss, batches, settings, progress=f"train {name}", **kept_in(config, name))[0]


def train_all(config: TrainSettings) -> dict[str, float]:
    """Train the base and the maps, save each to `out/maps`; what is there is kept. Returns seconds of each."""
    names = ("base", *names_of(config))
    data = load_images(config.dataset, config.data or None, config.device).train
    record = config.out / "maps" / "seconds.json"
    seconds: dict[str, float] = load_json(record) if record.exists() else {}
    base: FlowMap | None = None
    for name in names:
        folder = config.out / "maps" / name
        if not folder.exists():
            X = train_map(config, data, name, base if name == "teacher" else None)
            log = (config.out / "checkpoints" / name / "metrics.jsonl").read_text().splitlines()
            save_json(seconds := {**seconds, name: json.loads(log[-1])["seconds"]}, record)
            X.save_pretrained(folder)
        if name == "base":
            base = FlowMap.from_pretrained(folder).to(config.device).requires_grad_(False)
    return {name: seconds[name] for name in names}
