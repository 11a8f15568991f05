"""SiT, a transformer on patches, with what Meta Flow Maps add to it: a second time and a context.

One class is three networks of the literature, each an `mfm_ref.Network` (noise at 0, data at 1):

    SiT   v_s(z)            one time, the start
    DMF   v_{s,u}(z)        two times: the first blocks (the encoder) see s, the others and the outlet (the decoder) u
    MFM   v_{s,u}(z; t, x)  two times in both halves, and the context (t, x)

Sources: Peebles and Xie, arXiv 2212.09748 (the blocks); Ma et al., arXiv 2401.08740 (SiT); Lee et al., arXiv 2510.24474
(DMF); Potaptchik et al., arXiv 2601.14430 (MFM). The network computes what the published weights were trained with.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, silu
from torch.utils.checkpoint import checkpoint

from mfm_ref.checks import check_count
from mfm_ref.forward_mode import differentiating

KINDS = ("sit", "dmf", "mfm")
# Of the published networks; encoder_depth as in the paper for B and XL, in the same proportion for the others.
SIZES: dict[str, dict[str, int]] = {
    "tiny": {"width": 48, "depth": 4, "heads": 4, "encoder_depth": 3},
    "S/2": {"width": 384, "depth": 12, "heads": 6, "encoder_depth": 8},
    "B/2": {"width": 768, "depth": 12, "heads": 12, "encoder_depth": 8},
    "L/2": {"width": 1024, "depth": 24, "heads": 16, "encoder_depth": 16},
    "XL/2": {"width": 1152, "depth": 28, "heads": 16, "encoder_depth": 20},
}


def build(size: str, kind: str, **options: Any) -> "SiT":
    """A network of a size in `SIZES` and a kind in `KINDS`; `options` are further arguments of `SiT`.

    Raises:
        ValueError: an unknown size or kind; from `SiT`.
    """
    if size not in SIZES or kind not in KINDS:
        raise ValueError(f"size must be one of {list(SIZES)} and kind one of {list(KINDS)}, got {size!r} and {kind!r}")
    arguments: dict[str, Any] = {**SIZES[size], "context": kind == "mfm"}
    if kind == "sit":
        del arguments["encoder_depth"]
    return SiT(**{**arguments, **options})


class SiT(nn.Module):
    """v_{s,u}(z; t, x) on images or latents, by a transformer with adaLN-Zero blocks.

    The sum c of the embeddings of times, label and guidance shifts, scales and gates every block. The context enters in
    two places: t in c, and x as a second patch embedding, gated by t, beside that of z.

    Args:
        shape: *D: channels, height and width.
        patch: side of a patch, which divides height and width.
        width: of a token, a multiple of 4 and of heads; depth: number of blocks; heads: of the attention.
        encoder_depth: number of blocks that see the start s. The rest, and the outlet, see the end u (DMF), or both by
            embedders of their own (MFM). None for a network of one time, s.
        context: whether the network has a context branch.
        n_classes: number of labels, >= 1; label None and label n_classes are the null class.
        guidance: scales w whose embeddings are the rows of a table, as [1.0, 2.5]; a scale is rounded to the nearest,
            None is the first. Empty for a network without guidance input. Only the encoder sees it.
        learn_sigma: whether the outlet has twice the channels; the second half is not used.
        qk_norm: whether queries and keys are divided by their root mean square.
        noise_times: embed 1−s and 1−u in the place of s and u, as networks of the other convention do. Never t.
        blank_start: scale the context branch by t, so that at t = 0 x is not seen.
        reads_tx: take the context as t·x; then t = 0 sees no x either, and can be steered.

    Attributes:
        checkpointing: set it to recompute each block in the backward pass instead of keeping what it computed.
        drift_only: whether jumps and contexts mean nothing, as of weights that `imagenet.finetune` made.

    Raises:
        ValueError: sizes that do not divide or are out of range, guidance without a context branch, or scales that do
            not rise from 1.
    """

    def __init__(
        self,
        *,
        shape: Sequence[int] = (4, 32, 32),
        patch: int = 2,
        width: int = 1152,
        depth: int = 28,
        heads: int = 16,
        encoder_depth: int | None = None,
        context: bool = False,
        n_classes: int = 1000,
        guidance: Sequence[float] = (),
        learn_sigma: bool = False,
        qk_norm: bool = False,
        noise_times: bool = False,
        blank_start: bool = False,
        reads_tx: bool = False,
    ):
        super().__init__()
        self.config: dict[str, Any] = {
            "shape": list(shape), "patch": patch, "width": width, "depth": depth, "heads": heads,
            "encoder_depth": encoder_depth, "context": context, "n_classes": n_classes, "guidance": list(guidance),
            "learn_sigma": learn_sigma, "qk_norm": qk_norm, "noise_times": noise_times, "blank_start": blank_start,
            "reads_tx": reads_tx,
        }  # fmt: skip
        _check(self.config)
        channels, height, across = shape
        self.shape, self.patch, self.n_classes = tuple(shape), patch, n_classes
        self.reads_tx, self.reads_guidance, self.null_class = reads_tx, bool(guidance), n_classes
        self.noise_times, self.blank_start, self.guidance = noise_times, blank_start, tuple(guidance)
        self.encoder_depth, self.checkpointing = depth if encoder_depth is None else encoder_depth, False
        self.two_times, self.context = encoder_depth is not None, context
        self.drift_only = False
        self.grid = (height // patch, across // patch)

        self.patch_z = nn.Conv2d(channels, width, patch, stride=patch)
        self.position = nn.Parameter(sine_cosine(*self.grid, width).unsqueeze(0), requires_grad=False)  # (1, N, d)
        self.encoder_s = TimeEmbedding(width)  # of a DMF, the decoder's too
        if context:
            self.encoder_u, self.decoder_s, self.decoder_u = (TimeEmbedding(width) for _ in range(3))
            self.context_t = TimeEmbedding(width)
            self.patch_x = nn.Conv2d(channels, width, patch, stride=patch)
            self.context_modulation = nn.Linear(width, 2 * width)
        self.labels = nn.Embedding(n_classes + 1, width)
        self.scales = nn.Embedding(len(guidance), width) if guidance else None
        self.blocks = nn.ModuleList(Block(width, heads, qk_norm) for _ in range(depth))
        self.norm = _layer_norm(width)
        self.outlet_modulation = nn.Linear(width, 2 * width)
        self.outlet = nn.Linear(width, patch**2 * channels * (2 if learn_sigma else 1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initial weights: Xavier's, but zero for what modulates, the outlet, and what MFM adds to a flow map."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(module.weight.flatten(1))
                assert module.bias is not None
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.labels.weight, std=0.02)
        nn.init.zeros_(self.outlet.weight)
        nn.init.zeros_(self.outlet_modulation.weight)
        for block in self.blocks:
            nn.init.zeros_(block.modulation.weight)  # type: ignore[union-attr, arg-type]
        if self.scales is not None:
            nn.init.zeros_(self.scales.weight)
        if self.context:
            self.silence_context()

    @property
    def shard_units(self) -> nn.ModuleList:
        """The blocks: what `mfm_ref.sharding` gathers one by one."""
        return self.blocks

    def silence_context(self) -> None:
        """Make the network one that sees nothing of its context, nor u in the encoder, nor s in the decoder."""
        for embedding in (self.encoder_u, self.decoder_s, self.context_t):
            for parameter in embedding.mlp[2].parameters():
                nn.init.zeros_(parameter)
        nn.init.zeros_(self.context_modulation.weight)
        shift, scale = self.context_modulation.bias.data.chunk(2)
        shift.fill_(0.0)
        scale.fill_(0.0 if self.blank_start else -1.0)  # see `tokens`

    def velocity(
        self,
        s: Tensor,
        u: Tensor,
        z: Tensor,
        t: Tensor,
        context: Tensor,
        y: Tensor | None = None,
        guidance: Tensor | None = None,
    ) -> Tensor:
        """v_{s,u}: times `(B,)`, z and context x or t·x `(B, *D)`, labels and guidance `(B,)` or None, to `(B, *D)`.

        Raises:
            ValueError: labels that are not integers from 0 to n_classes.
        """
        _check_labels(y, self.n_classes)
        encoder, decoder, e = self.conditions(s, u, t, y, guidance)  # (B, d)
        h = self.tokens(z, t, context, e)  # (B, N, d)
        for k, block in enumerate(self.blocks):
            c = encoder if k < self.encoder_depth else decoder
            if self.checkpointing and torch.is_grad_enabled() and not differentiating():
                h = checkpoint(block, h, c, use_reentrant=False)
            else:
                h = block(h, c)
        shift, scale = self.outlet_modulation(silu(decoder)).unsqueeze(1).chunk(2, -1)
        return self.unpatch(self.outlet(modulate(self.norm(h), shift, scale)))

    def conditions(
        self, s: Tensor, u: Tensor, t: Tensor, y: Tensor | None, guidance: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """c of the encoder and of the decoder, and the embedding e of t, None without a context; each `(B, d)`."""
        if self.noise_times:
            s, u = 1 - s, 1 - u
        label = self.labels(torch.full_like(s, self.n_classes, dtype=torch.long) if y is None else y)
        if self.context:
            e = self.context_t(t)
            encoder = self.encoder_s(s) + self.encoder_u(u) + e + label
            decoder = self.decoder_s(s) + self.decoder_u(u) + e + label
            if self.scales is not None:
                encoder = encoder + self.scales(self.nearest_scale(guidance, s))
            return encoder, decoder, e
        encoder = self.encoder_s(s) + label
        return encoder, self.encoder_s(u) + label if self.two_times else encoder, None

    def nearest_scale(self, guidance: Tensor | None, like: Tensor) -> Tensor:
        """Rows of the table `(B,)`: the nearest scale, of two as near the smaller; the first where None."""
        if guidance is None:
            return torch.zeros_like(like, dtype=torch.long)
        scales = torch.tensor(self.guidance, dtype=guidance.dtype, device=guidance.device)
        return (guidance.unsqueeze(-1) - scales).abs().argmin(-1)

    def tokens(self, z: Tensor, t: Tensor, context: Tensor, e: Tensor | None) -> Tensor:
        """Patch embedding of z, plus that of the context times (1 + scale) plus shift, plus position; `(B, N, d)`.

        Scale and shift depend on t. With `blank_start` the context counts t (scale · embedding + shift).
        """
        h = self.patch_z(z).flatten(2).mT
        if e is not None:
            shift, scale = self.context_modulation(silu(e)).unsqueeze(1).chunk(2, -1)
            if self.blank_start:
                shift, scale = t.reshape(-1, 1, 1) * shift, t.reshape(-1, 1, 1) * scale - 1
            h = h + modulate(self.patch_x(context).flatten(2).mT, shift, scale)
        return h + self.position

    def unpatch(self, tokens: Tensor) -> Tensor:
        """Tokens `(B, N, P² C)`, the channel fastest, to an image; of twice the channels, the first half."""
        (rows, columns), p = self.grid, self.patch
        patches = tokens.reshape(len(tokens), rows, columns, p, p, -1)
        return patches.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)[:, : self.shape[0]]


class Block(nn.Module):
    """adaLN-Zero: attention among the tokens, then a two-layer network on each; c shifts, scales and gates both."""

    def __init__(self, width: int, heads: int, qk_norm: bool):
        super().__init__()
        self.modulation = nn.Linear(width, 6 * width)
        self.norm = _layer_norm(width)
        self.attention = Attention(width, heads, qk_norm)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))

    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        """Tokens `(B, N, d)` and condition `(B, d)` to tokens `(B, N, d)`."""
        shift, scale, gate, shift2, scale2, gate2 = self.modulation(silu(c)).unsqueeze(1).chunk(6, -1)  # (B, 1, d)
        h = h + gate * self.attention(modulate(self.norm(h), shift, scale))
        return h + gate2 * self.mlp(modulate(self.norm(h), shift2, scale2))


class Attention(nn.Module):
    """softmax(q kᵀ/√(d/heads)) v, by torch's fused kernel where no forward-mode derivative is taken: it has none."""

    def __init__(self, width: int, heads: int, qk_norm: bool):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.mix = nn.Linear(width, width)
        self.q_norm, self.k_norm = (
            nn.RMSNorm(width // heads, eps=1e-6) if qk_norm else nn.Identity() for _ in range(2)
        )

    def forward(self, h: Tensor) -> Tensor:
        """Tokens `(B, N, d)` to `(B, N, d)`."""
        q, k, v = self.qkv(h).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, N, d/heads)
        q, k = self.q_norm(q), self.k_norm(k)
        attend = explicit_attention if differentiating() else scaled_dot_product_attention
        return self.mix(attend(q, k, v).transpose(1, 2).flatten(2))


class TimeEmbedding(nn.Module):
    """Cosines and sines of f_k τ, f_k = 10000^(−k/128), k = 0 … 127, through a two-layer network; in full precision."""

    features = 256

    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(self.features, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, time: Tensor) -> Tensor:
        """Times `(B,)` to `(B, d)`."""
        with torch.autocast(time.device.type, enabled=False):  # bfloat16 cannot tell 0.999 from 1
            return self.mlp(waves(time, self.features))


def waves(time: Tensor, features: int) -> Tensor:
    """Cosines, then sines, of f_k τ, f_k = 10000^(−2k/features); `(B, features)`."""
    k = torch.arange(features // 2, dtype=time.dtype, device=time.device)
    angles = time.unsqueeze(-1) * torch.exp(-math.log(10000.0) * 2 / features * k)
    return torch.cat([angles.cos(), angles.sin()], -1)


def sine_cosine(rows: int, columns: int, width: int) -> Tensor:
    """Positions `(rows · columns, width)`, row by row: sin and cos of the column, then sin and cos of the row.

    Each of width/4 waves, of frequencies 10000^(−4k/width); computed in double precision, returned in the default one.
    """
    row, column = torch.meshgrid(
        torch.arange(rows, dtype=torch.float64), torch.arange(columns, dtype=torch.float64), indexing="ij"
    )
    halves = [waves(a.flatten(), width // 2) for a in (column, row)]  # cosines first
    halves = [half.roll(width // 4, -1) for half in halves]
    return torch.cat(halves, -1).to(torch.get_default_dtype())


def explicit_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ/√d) v for `(…, N, d)`, of operations that have forward-mode derivatives."""
    return (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v


def modulate(h: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """h (1 + scale) + shift."""
    return h * (1 + scale) + shift


def _layer_norm(width: int) -> nn.LayerNorm:
    return nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)


def _check_labels(y: Tensor | None, n_classes: int) -> None:
    """Refuse labels that have no embedding; a GPU would only say that something was out of bounds."""
    if y is None or torch.compiler.is_compiling():
        return
    if y.is_floating_point() or not bool(((y >= 0) & (y <= n_classes)).all()):
        low, high = (end.item() for end in y.aminmax())
        raise ValueError(f"labels y must be integers from 0 to {n_classes}, got {y.dtype} from {low} to {high}")


def _check(config: dict[str, Any]) -> None:
    """Refuse sizes of `SiT` that make no network."""
    shape, patch, width, heads = (config[name] for name in ("shape", "patch", "width", "heads"))
    for name in ("patch", "width", "depth", "heads", "n_classes"):
        check_count(config[name], name)
    if len(shape) != 3 or min(shape) < 1 or shape[1] % patch or shape[2] % patch:
        raise ValueError(
            f"shape must be channels, height and width, the last two multiples of patch {patch}, got {shape}"
        )
    if width % heads or width % 4:
        raise ValueError(f"width must be a multiple of heads = {heads} and of 4, got {width}")
    if config["encoder_depth"] is not None:
        check_count(config["encoder_depth"], "encoder_depth")
        if config["encoder_depth"] >= config["depth"]:
            raise ValueError(f"encoder_depth must be below depth = {config['depth']}, got {config['encoder_depth']}")
    if config["context"] and config["encoder_depth"] is None:
        raise ValueError("a context branch needs an encoder_depth")
    scales = config["guidance"]
    if scales and not (config["context"] and scales[0] == 1 and all(a < b for a, b in pairwise(scales))):
        raise ValueError(f"guidance needs a context branch, and scales that rise from 1, got {scales}")
    if not config["context"] and (config["reads_tx"] or config["blank_start"]):
        raise ValueError("reads_tx and blank_start need a context branch")
