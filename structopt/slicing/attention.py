"""Attention whose inner width does not follow from the width of what it reads."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from structopt.channels.exchanging import exchange_
from structopt.training.copying import copied
from structopt.training.hooked import in_place_of


class FreeAttention(nn.Module):
    """What ``nn.MultiheadAttention`` computes, with heads · head_dim free of the stream's width.

    softmax(Q Kᵀ / √head_dim + mask) V for each head, with Q, K and V linear in the inputs
    (Vaswani et al., 2017). torch's own layer ties heads · head_dim to the width of its inputs, so
    that a narrower stream would take heads away. Arguments and results are those of torch's layer.

    Raises ValueError, in a call, for ``is_causal`` without the mask, as torch's layer does.

    >>> attention = FreeAttention(width=6, heads=2, head_dim=4, batch_first=True)
    >>> x = torch.zeros(1, 5, 6)
    >>> [tuple(out.shape) for out in attention(x, x, x)]
    [(1, 5, 6), (1, 5, 5)]
    """

    in_proj_bias = None  # keeps an encoder layer of torch from its fused path, which knows no RMS

    def __init__(
        self,
        width: int,
        heads: int,
        head_dim: int,
        *,
        bias: bool = True,
        dropout: float = 0.0,
        batch_first: bool = False,
    ) -> None:
        super().__init__()
        self.heads, self.dropout, self.batch_first = heads, dropout, batch_first
        self.into = nn.Linear(width, 3 * heads * head_dim, bias)
        self.out = nn.Linear(heads * head_dim, width, bias)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if is_causal and attn_mask is None:
            raise ValueError("is_causal is a hint about attn_mask: give the mask too")
        q, k, v = (self._heads(part) for part in self._projected(query, key, value))  # (B, H, T, D)
        mask = self._mask(q, key_padding_mask, attn_mask)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])  # (B, H, T, S)
            scores = (scores if mask is None else scores + mask).softmax(-1)
            weights = F.dropout(scores, dropout)
            mixed = weights @ v
            weights = weights.mean(-3) if average_attn_weights else weights
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        made: Tensor = self.out(mixed.transpose(-3, -2).flatten(-2))  # (B, T, width)
        return made.transpose(0, 1) if self._swapped(query) else made, weights

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        if query is key and key is value:
            return tuple(self.into(query).chunk(3, -1))
        biases = (None,) * 3 if self.into.bias is None else self.into.bias.chunk(3)
        parts = zip((query, key, value), self.into.weight.chunk(3), biases, strict=True)
        return tuple(F.linear(x, weight, bias) for x, weight, bias in parts)

    def _swapped(self, x: Tensor) -> bool:
        return x.ndim == 3 and not self.batch_first

    def _heads(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1) if self._swapped(x) else x
        return x.reshape(*x.shape[:-1], self.heads, -1).transpose(-3, -2)

    def _mask(self, q: Tensor, padding: Tensor | None, mask: Tensor | None) -> Tensor | None:
        """Both masks as one that is added to the scores."""
        parts = []
        if mask is not None:  # (T, S), or (B · H, T, S)
            mask = _added(mask, q)
            parts.append(mask.reshape(*q.shape[:-1], -1) if mask.ndim == 3 else mask)
        if padding is not None:  # (B, S)
            parts.append(_added(padding, q)[..., None, None, :])
        return sum(parts[1:], start=parts[0]) if parts else None


def _added(mask: Tensor, like: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(like)
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, -torch.inf)


@torch.inference_mode(False)  # else what is made could not be trained
def free_attention(model: nn.Module) -> nn.Module:
    """A copy in which each ``nn.MultiheadAttention`` is a :class:`FreeAttention`.

    The same function. A saved narrow network is loaded into what this makes of a fresh one.

    Raises ValueError, naming the layer, for keys or values of another width, or added to each
    sequence (``add_bias_kv``, ``add_zero_attn``).

    >>> layer = nn.TransformerEncoderLayer(8, 2, 16, norm_first=True)
    >>> free_attention(layer).self_attn.into
    Linear(in_features=8, out_features=24, bias=True)
    """
    made = copied(model)
    for name, module in list(made.named_modules()):
        if type(module) is nn.MultiheadAttention:
            free = in_place_of(module, _freed(module, name or "the model"), name)
            if not name:
                return free
            exchange_(made, name, free)
    return made


@torch.no_grad()
def _freed(layer: nn.MultiheadAttention, name: str) -> FreeAttention:
    if not layer._qkv_same_embed_dim or layer.bias_k is not None or layer.add_zero_attn:
        raise ValueError(
            f"{name} reads keys or values of another width, or adds some of its own: its heads "
            "cannot be set free of the stream"
        )
    if None in (layer._parameters.get("in_proj_weight"), layer.out_proj._parameters.get("weight")):
        raise ValueError(f"a hook computes the weight of {name}: torch.nn.utils.prune.remove first")
    with torch.device("meta"):  # draws no random numbers for weights that are replaced
        made = FreeAttention(
            layer.embed_dim, layer.num_heads, layer.head_dim, bias=layer.in_proj_bias is not None,
            dropout=layer.dropout, batch_first=layer.batch_first,
        )  # fmt: skip
    for linear, weight, bias in (
        (made.into, layer.in_proj_weight, layer.in_proj_bias),
        (made.out, layer.out_proj.weight, layer.out_proj.bias),
    ):
        linear.weight = nn.Parameter(weight.clone(), requires_grad=weight.requires_grad)
        if bias is not None:
            linear.bias = nn.Parameter(bias.clone(), requires_grad=bias.requires_grad)
    return made
