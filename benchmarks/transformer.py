"""A small transformer on patches, of the kind that image models use, through which forward-mode derivatives pass."""

import torch
from torch import Tensor, nn


class Transformer(nn.Module):
    """v_{s,u}(z; t, x) for images: z and t·x side by side in every token, times by adaptive LayerNorm.

    Attention is written out, because torch's fused kernels have no forward-mode derivative.

    Args:
        shape: of a state, channels, height and width.
        patch: side of a patch in pixels; divides height and width. The default has 64 tokens.
        width: of a token, d; a multiple of heads.
        depth: number of blocks.
        heads: of the attention.

    Raises:
        ValueError: sizes that do not divide.
    """

    reads_tx = True
    frequencies = (1.0, 2.0, 4.0, 8.0)

    def __init__(
        self,
        shape: tuple[int, int, int] = (4, 16, 16),
        *,
        patch: int = 2,
        width: int = 128,
        depth: int = 4,
        heads: int = 4,
    ):
        super().__init__()
        channels, height, across = shape
        if height % patch or across % patch or width % heads:
            raise ValueError(f"patch {patch} must divide the sides of {shape}, and heads {heads} the width {width}")
        self.shape, self.patch = shape, patch
        self.grid = (height // patch, across // patch)
        token = channels * patch**2
        self.inlet = nn.Linear(2 * token, width)
        self.position = nn.Parameter(0.02 * torch.randn(self.grid[0] * self.grid[1], width))
        self.times = nn.Sequential(nn.Linear(6 * len(self.frequencies), width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.outlet = nn.Linear(width, token)

    def velocity(self, s: Tensor, u: Tensor, z: Tensor, t: Tensor, context: Tensor, y: Tensor | None = None) -> Tensor:
        """v_{s,u}: times `(B,)`, z and context t·x `(B, *shape)`, no labels, to `(B, *shape)`."""
        angles = torch.stack([s, u, t], -1) * torch.pi
        waves = torch.cat([f * angles for f in self.frequencies], -1)  # (B, 3F)
        condition = nn.functional.silu(self.times(torch.cat([waves.cos(), waves.sin()], -1)))  # (B, d)
        h = self.inlet(torch.cat([self.to_tokens(z), self.to_tokens(context)], -1)) + self.position  # (B, N, d)
        for block in self.blocks:
            h = block(h, condition)
        return self.to_image(self.outlet(self.norm(h)))

    def to_tokens(self, image: Tensor) -> Tensor:
        """Patches as rows: `(B, C, rows·P, columns·P)` to `(B, N, C P²)`."""
        (rows, columns), p = self.grid, self.patch
        return image.reshape(len(image), -1, rows, p, columns, p).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)

    def to_image(self, tokens: Tensor) -> Tensor:
        """The inverse of `to_tokens`."""
        (rows, columns), p = self.grid, self.patch
        return tokens.reshape(len(tokens), rows, columns, -1, p, p).permute(0, 3, 1, 4, 2, 5).reshape(-1, *self.shape)


class Block(nn.Module):
    """Attention, then a two-layer network on each token; the times shift, scale and gate both."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.modulation = nn.Linear(width, 6 * width)
        self.norms = nn.ModuleList(nn.LayerNorm(width, elementwise_affine=False) for _ in range(2))
        self.qkv = nn.Linear(width, 3 * width)
        self.mixed = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))

    def forward(self, h: Tensor, condition: Tensor) -> Tensor:
        """Tokens `(B, N, d)` and condition `(B, d)` to tokens `(B, N, d)`."""
        shift, scale, gate, shift2, scale2, gate2 = self.modulation(condition).unsqueeze(1).chunk(6, -1)  # (B, 1, d)
        h = h + gate * self.attend(self.norms[0](h) * (1 + scale) + shift)
        return h + gate2 * self.mlp(self.norms[1](h) * (1 + scale2) + shift2)

    def attend(self, h: Tensor) -> Tensor:
        """softmax(q kᵀ/√(d/heads)) v, `(B, N, d)` to `(B, N, d)`."""
        q, k, v = self.qkv(h).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, N, d/heads)
        weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
        return self.mixed((weights @ v).transpose(1, 2).flatten(2))
