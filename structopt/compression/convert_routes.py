"""Ways to run a network on kernels that exist, each a small value: torch's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from structopt.channels.exchanging import exchange_
from structopt.compression.convert_parts import (
    Converted,
    as_compiled,
    in_words,
    linear_layers,
    refuse,
    shown,
)
from structopt.measure.costs import cost
from structopt.training.copying import copied
from structopt.training.hooked import in_place_of

WIDTHS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True)
class Float:
    """Floating point of 32 or 16 bits, eager or compiled with frozen weights."""

    dtype: torch.dtype = torch.float32
    compiled: bool = False

    __repr__ = shown

    def __post_init__(self) -> None:
        if self.dtype not in WIDTHS:
            raise ValueError(f"{self}: dtype is one of {', '.join(map(str, WIDTHS))}")

    def missing(self, device: torch.device | str) -> str | None:
        return None

    def build(self, model: nn.Module, example: Any, calibration: Any = None) -> nn.Module:
        made = copied(model).eval().to(self.dtype)
        words = f"torch {WIDTHS[self.dtype]}, {'compiled' if self.compiled else 'eager'}"
        dtype = None if self.dtype is torch.float32 else self.dtype
        return Converted(as_compiled(made, self.compiled), words, cost(model, example), dtype)


@dataclass(frozen=True)
class IntMM:
    """Linear layers as products of int8 numbers on ``torch._int_mm``, dynamic.

    A scale for each row of the weight, and one for each row of the input, found in each call. Not
    to be compiled without a measurement: such a layer can be thousands of times slower so.
    """

    compiled: bool = False

    __repr__ = shown

    def missing(self, device: torch.device | str) -> str | None:
        kind = torch.device(device).type
        return None if kind in {"cpu", "cuda"} else f"torch._int_mm has no kernel on {kind}"

    def build(self, model: nn.Module, example: Any, calibration: Any = None) -> nn.Module:
        made = copied(model).eval()
        layers = linear_layers(made)
        for name, layer in layers.items():
            new = in_place_of(layer, _IntLinear(layer), name)
            if not name:
                made = new
            else:
                exchange_(made, name, new)
        words = in_words(model, layers, "int8 with dynamic int8 inputs on torch._int_mm")
        words += ", compiled" if self.compiled else ""
        return Converted(as_compiled(made, self.compiled), words, cost(model, example))


class _IntLinear(nn.Module):
    scale: Tensor
    bias: Tensor | None

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        weight = layer.weight.detach()
        scale = (weight.abs().amax(1) / 127).clamp(min=torch.finfo(weight.dtype).tiny)
        codes = (weight / scale[:, None]).round().to(torch.int8)
        self.codes = nn.Parameter(codes.t(), requires_grad=False)  # (in, out), the layout it reads
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach())

    def forward(self, input: Tensor) -> Tensor:
        rows = input.reshape(-1, input.shape[-1])  # (rows, in)
        steps = (rows.abs().amax(1, keepdim=True) / 127).clamp(min=torch.finfo(rows.dtype).tiny)
        whole = torch._int_mm((rows / steps).round().to(torch.int8), self.codes)  # (rows, out)
        made = whole.to(rows.dtype) * steps * self.scale
        made = made if self.bias is None else made + self.bias
        return made.reshape(*input.shape[:-1], made.shape[-1])


@dataclass(frozen=True)
class Sparse24:
    """2:4 sparse products of NVIDIA's tensor cores, by ``to_sparse_semi_structured``.

    For weights that have two zeros among each four already: nothing is pruned here. Mishra et al.,
    2021, "Accelerating sparse deep neural networks".
    """

    dtype: torch.dtype = torch.bfloat16

    __repr__ = shown

    def __post_init__(self) -> None:
        if self.dtype not in (torch.bfloat16, torch.float16):
            raise ValueError(f"{self}: dtype is torch.bfloat16 or torch.float16")

    def missing(self, device: torch.device | str) -> str | None:
        device = torch.device(device)
        if device.type != "cuda" or torch.version.hip:
            return "2:4 sparse products need an NVIDIA GPU"
        newer = torch.cuda.get_device_capability(device) >= (8, 0)
        return None if newer else "2:4 sparse products need compute capability 8.0"

    def build(self, model: nn.Module, example: Any, calibration: Any = None) -> nn.Module:
        refuse(self, example)
        made = copied(model).eval().to(self.dtype)
        layers = linear_layers(made)
        for name, layer in layers.items():
            weight = layer.weight.detach()
            if weight.shape[1] % 4 or int((weight.reshape(-1, 4) != 0).sum(1).max()) > 2:
                raise ValueError(
                    f"layer {name!r}: its weight is not 2:4 sparse; prune it first, "
                    "with pruning.NOfM(2, 4)"
                )
            sparse = torch.sparse.to_sparse_semi_structured(weight)
            layer.weight = nn.Parameter(sparse, requires_grad=False)
        words = in_words(model, layers, f"2:4 sparse {WIDTHS[self.dtype]}")
        return Converted(made, words, cost(model, example), self.dtype)
