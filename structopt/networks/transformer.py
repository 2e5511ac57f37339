"""A small transformer for images (B, 1, 28, 28)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from structopt.networks import images
from structopt.networks.images import SIDE


class EncoderLayer(nn.Module):
    """Self-attention and a perceptron, each normalised first and added to its input.

    x ← x + Attention(LN(x)), x ← x + MLP(LN(x)): Vaswani et al., 2017, "Attention is all you
    need", in the pre-norm order of Xiong et al., 2020.
    """

    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, inputs: Tensor) -> Tensor:
        qkv = self.qkv(self.norm1(inputs)).unflatten(2, (3, self.heads, -1))  # (B, T, 3, H, D)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, H, T, D)
        mixed = F.scaled_dot_product_attention(query, key, value)  # (B, H, T, D)
        x: Tensor = inputs + self.proj(mixed.transpose(1, 2).flatten(2))  # (B, T, H·D)
        x = x + self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return x


class TinyTransformer(nn.Module):
    """A small vision transformer: 105,546 parameters at dim 64, depth 3.

    Patches as tokens, a class token, learned positions: Dosovitskiy et al., 2021, "An image is
    worth 16×16 words". ``patch`` divides 28 and ``heads`` divides ``dim``; else a ValueError.

    >>> import torch
    >>> from structopt.networks import TinyTransformer
    >>> TinyTransformer(depth=1)(torch.zeros(2, 1, 28, 28)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self, dim: int = 64, depth: int = 3, heads: int = 4, patch: int = 7, classes: int = 10
    ) -> None:
        super().__init__()
        if SIDE % patch:
            raise ValueError(
                f"patch={patch} does not divide the image's {SIDE} pixels: take 4 or 7"
            )
        if dim % heads:
            raise ValueError(
                f"heads={heads} does not divide dim={dim}: each head needs dim / heads"
            )
        self.embed = nn.Conv2d(1, dim, patch, stride=patch)
        self.token = nn.Parameter(torch.randn(1, 1, dim) * 0.02)
        self.positions = nn.Parameter(torch.randn(1, (SIDE // patch) ** 2 + 1, dim) * 0.02)
        self.layers = nn.Sequential(*(EncoderLayer(dim, heads, 2 * dim) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.fc = nn.Linear(dim, classes)

    def forward(self, inputs: Tensor) -> Tensor:
        patches = self.embed(images.checked(inputs)).flatten(2).transpose(1, 2)  # (B, 16, dim)
        token = self.token.expand(inputs.shape[0], -1, -1)
        x = torch.cat([token, patches], dim=1) + self.positions  # (B, 17, dim)
        logits: Tensor = self.fc(self.norm(self.layers(x))[:, 0])
        return logits
