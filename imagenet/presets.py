"""Options of `imagenet.train`, and the settings of the paper and of its sources as presets.

Each stage begins with the weights of the one before, or with public ones:

    preset        begins with            learns from                            source
    b2-flow       nothing                data                                   MFM: the base of B/2
    b2-data       b2-flow's weights      data, model guidance ω = 0.6           MFM: B/2, 40 epochs
    xl2-flow      nothing                data                                   MFM, DMF: the base of XL/2
    xl2-map       xl2-flow's weights     data, model guidance from s = 0.3 on   DMF: XL/2+, 80 epochs
    xl2-distill   a DMF, also teacher    teacher, by E12                        MFM: XL/2, 28 epochs
    s2-flow, s2-map, s2-mfm              the same ladder for images of one's own on one GPU; chosen here, and unproven

MFM is arXiv 2601.14430, DMF arXiv 2510.24474; ω = 1 − 1/w, so that 0.6 is guidance w = 2.5. What they have and this
lacks: the base of XL/2 was trained with REPA, a second loss that draws features of block 8 to DINOv2's (coefficient
0.5), which its 800 epochs need to be as good as they are; and DMF learns a spread (logvar) for each pair of times,
with which it weighs log(‖Δ‖²/D e^−logvar + 0.01) + logvar, the mean of both terms; here logvar is 0
(`imagenet.stages.weights_of`). Betas, weight decay and clipping that no source gives are
those of the stage's nearest relative.
"""

import dataclasses
from pathlib import Path
from typing import Any

from imagenet.cost import HARDWARE
from imagenet.sit import KINDS, SIZES
from mfm_ref.options import option
from mfm_ref.paper_recipe import STAGES, TIMES
from mfm_ref.run_state import OPTIMIZERS, PRECISIONS


@dataclasses.dataclass(frozen=True)
class TrainOptions:
    """Options of the script. All that its numbers depend on is kept in settings.json."""

    stage: str = option("", "flow: the drift; map: the flow map; mfm: the Meta Flow Map", choices=("", *STAGES))
    preset: str = option("", "defaults for everything below, and the stage; what is typed wins")
    latents: str = option("", "folder of imagenet.encode, or a latents.npz of imagenet.sample")
    out: Path = option(Path("runs/train"), "folder of the run; if it is there, the run goes on")
    # What is trained
    init: str = option("", "weights to begin with (imagenet.checkpoints); empty for a new network")
    init_kind: str = option("", "of a file of published weights", choices=("", *KINDS))
    size: str = option("B/2", "of a new network", choices=tuple(SIZES))
    reads_tx: bool = option(False, "a new Meta Flow Map reads t x, and can be steered by gradients from t = 0")
    num_heads: int = option(16, "of published weights, which do not tell")
    encoder_depth: int = option(20, "of published weights, which do not tell: blocks that see the start of a jump")
    # What it learns from
    teacher: str = option("", "weights of a drift to distil; empty to learn from data")
    teacher_kind: str = option("", "of a file of published weights", choices=("", *KINDS))
    teacher_scale: float = option(0.0, "guidance that is in the teacher's weights; 0: 2.5 for a DMF, else 1")
    guidance: float = option(1.0, "scale w >= 1 that the map learns: as an input of an MFM, else in its weights")
    guidance_rate: float = option(0.0, "probability of w = 1 for rows with a label")
    guided_from: float = option(0.0, "from data: rows with s below this learn w = 1")
    drop: float = option(0.2, "probability that a label is dropped")
    times: str = option("uniform", "law of s and u", choices=TIMES)
    # How
    batch: int = option(256, "images of an update, in all processes together")
    micro: int = option(0, "images that pass at once in a process; 0: as many as the batch leaves it")
    steps: int = option(100_000, "updates")
    optimizer: str = option("radam", "of the weights", choices=tuple(OPTIMIZERS))
    lr: float = option(1e-4, "learning rate, constant after the warm-up")
    beta1: float = option(0.9, "decay rate of the gradient's mean")
    beta2: float = option(0.999, "decay rate of its square's")
    weight_decay: float = option(0.0, "decoupled from the gradient")
    warmup: int = option(2000, "updates over which the rate rises")
    clip: float = option(1.5, "largest norm of the gradient; 0 for any")
    decay: float = option(0.9999, "of the averaged weights (EMA)")
    precision: str = option("float32", "of matrix products, by autocast", choices=tuple(PRECISIONS))
    compile: str = option("", "backend of torch.compile for the whole loss: inductor; empty for none")
    checkpointing: bool = option(False, "recompute blocks in the backward pass: less memory, a third more time")
    engine: str = option("ddp", "of many processes: whole copies, or shards (fsdp)", choices=("ddp", "fsdp"))
    seed: int = option(0, "of every random number")
    device: str = option("cpu", "where torch computes: cpu, cuda, …")
    # What it leaves
    checkpoint_every: int = option(2500, "updates between checkpoints")
    checkpoint_minutes: float = option(10.0, "and minutes between them at most; 0 for any")
    log_every: int = option(50, "updates between lines of metrics.jsonl")
    sample_every: int = option(5000, "updates between samples and lines of proxy.jsonl; 0 for none")
    samples: int = option(2048, "of each such line")
    vae: str = option("", "folder or Hugging Face id of the VAE that decodes samples; empty to keep latents")
    # What it would cost
    dry_run: bool = option(False, "print settings, parameters, memory, operations and days, and stop")
    gpus: int = option(1, "of a dry run")
    hardware: str = option("h100", "of a dry run", choices=tuple(HARDWARE))
    tflops: float = option(0.0, "that each GPU sustains, in a dry run; 0 for two fifths of its peak")


GPU: dict[str, Any] = {"precision": "bfloat16", "compile": "inductor"}
BASE: dict[str, Any] = {  # MFM's base: AdamW 1e-4 (0.9, 0.95), batch 256, EMA 0.9999, class dropout 0.2
    "stage": "flow", "batch": 256, "optimizer": "adamw", "lr": 1e-4, "beta1": 0.9, "beta2": 0.95, "decay": 0.9999,
    "drop": 0.2, "warmup": 0, "clip": 0.0, **GPU,
}  # fmt: skip
META: dict[str, Any] = {  # MFM: RAdam 1e-4 (0.9, 0.999), 2000 warm-up, EMA 0.9999, dropout 0.2, clip 1.5, bf16
    "stage": "mfm", "optimizer": "radam", "lr": 1e-4, "beta1": 0.9, "beta2": 0.999, "warmup": 2000, "decay": 0.9999,
    "drop": 0.2, "guidance": 2.5, "guidance_rate": 0.0, "clip": 1.5, "steps": 100_000, **GPU,
}  # fmt: skip
DMF: dict[str, Any] = {  # DMF: AdamW 1e-4 (0.9, 0.95), batch 256, EMA 0.9999, label dropout 0.1, clip 1, bf16
    "stage": "map", "batch": 256, "optimizer": "adamw", "lr": 1e-4, "beta1": 0.9, "beta2": 0.95, "decay": 0.9999,
    "warmup": 0, "clip": 1.0, "drop": 0.1, "guidance": 2.5, "guided_from": 0.3, "times": "logit-normal", **GPU,
}  # fmt: skip
PRESETS: dict[str, dict[str, Any]] = {
    "b2-flow": BASE | {"size": "B/2", "steps": 800_000},  # 160 epochs
    "b2-data": META | {"size": "B/2", "batch": 512},  # 40 epochs
    "xl2-flow": BASE | {"size": "XL/2", "steps": 4_000_000, "times": "logit-normal"},  # 800 epochs, t as in DMF's base
    "xl2-map": DMF | {"size": "XL/2", "steps": 400_000},  # 80 epochs
    "xl2-distill": META | {"size": "XL/2", "batch": 360, "teacher_scale": 2.5},  # 28 epochs
    "s2-flow": BASE | {"size": "S/2", "steps": 200_000, "warmup": 1000},
    "s2-map": DMF | {"size": "S/2", "steps": 100_000, "warmup": 1000},
    "s2-mfm": META | {"size": "S/2", "steps": 50_000, "batch": 256, "teacher_scale": 2.5},
}
