"""The kernels of torchao, the library of the authors of torch for quantised networks."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from structopt.compression.convert_parts import (
    Converted,
    as_compiled,
    in_words,
    linear_layers,
    refuse,
    shown,
)
from structopt.compression.grids import Grid
from structopt.compression.inputs import calibrate
from structopt.measure.costs import cost
from structopt.training.copying import copied

CAPABILITY = {"fp8": (8, 9), "int4": (8, 0)}


@dataclass(frozen=True)
class TorchAO:
    """Linear layers on the kernels of torchao, by default int8 weights alone, computed in bf16.

    Args:
        dynamic: inputs on 8 bits too, a scale for each row found in each call.
        static: inputs on 8 bits, a scale for each layer from calibration.
        bits: 8, or 4 for weights in groups of 128 on GPUs.
        floating: fp8 (e4m3) in place of int8, with dynamic inputs; on GPUs.
        compiled: with torch.compile, without which these are seldom fast.
    """

    dynamic: bool = False
    static: bool = False
    bits: int = 8
    floating: bool = False
    compiled: bool = True

    __repr__ = shown

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise ValueError(f"{self}: there are kernels for bits=8 and bits=4")
        if self.dynamic and self.static:
            raise ValueError(f"{self}: inputs are dynamic or static, not both")
        if self.bits == 4 and (self.dynamic or self.static or self.floating):
            raise ValueError(f"{self}: 4 bits are for weights alone")
        if self.floating and not self.dynamic:
            raise ValueError(f"{self}: fp8 reads dynamic inputs, give dynamic=True")

    def missing(self, device: torch.device | str) -> str | None:
        device = torch.device(device)
        if importlib.util.find_spec("torchao") is None:
            return "torchao is not installed: pip install torchao"
        kind = "fp8" if self.floating else f"int{self.bits}"
        if kind in CAPABILITY:
            least = CAPABILITY[kind]
            if device.type != "cuda" or torch.version.hip:
                return f"{kind} needs an NVIDIA GPU"
            if torch.cuda.get_device_capability(device) < least:
                return f"{kind} needs compute capability {least[0]}.{least[1]}"
        return None if device.type in {"cpu", "cuda"} else f"no kernels on {device.type}"

    def build(self, model: nn.Module, example: Any, calibration: Any = None) -> nn.Module:
        refuse(self, example)
        if self.static and calibration is None:
            raise ValueError(f"{self}: static steps need batches, pass calibration=")
        ao: Any = importlib.import_module("torchao.quantization")
        both = self.dynamic or self.static
        dtype = torch.float32 if both and not self.floating else torch.bfloat16
        made = copied(model).eval().to(dtype)
        layers = linear_layers(made)
        steps = calibrate(model, calibration, Grid(8), list(layers)) if self.static else {}
        for name, layer in layers.items():
            if not self.static:
                config = self._config(ao)
            elif name in steps:
                scale = steps[name].scale.reshape(1, 1).to(layer.weight.device)
                config = ao.Int8StaticActivationInt8WeightConfig(
                    act_quant_scale=scale,
                    granularity=[ao.PerTensor(), ao.PerRow()],
                    set_inductor_config=False,
                )
            else:
                raise ValueError(f"layer {name!r} was not called by the calibration batches")
            ao.quantize_(layer, config)
        version = importlib.import_module("torchao").__version__
        words = in_words(model, layers, f"{self._words()} by torchao {version}")
        words += ", compiled" if self.compiled else ", eager"
        given = None if dtype is torch.float32 else dtype
        return Converted(as_compiled(made, self.compiled), words, cost(model, example), given)

    def _config(self, ao: Any) -> Any:
        """The configuration in torchao's words; none changes torch's global settings."""
        if self.floating:
            return ao.Float8DynamicActivationFloat8WeightConfig(
                granularity=ao.PerRow(), set_inductor_config=False
            )
        if self.bits == 4:
            return ao.Int4WeightOnlyConfig(
                group_size=128, int4_packing_format="tile_packed_to_4d", set_inductor_config=False
            )
        if self.dynamic:
            return ao.Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)
        return ao.Int8WeightOnlyConfig(set_inductor_config=False)

    def _words(self) -> str:
        kind = "fp8" if self.floating else f"int{self.bits}"
        if self.dynamic or self.static:
            return f"{kind} with {'static' if self.static else 'dynamic'} {kind} inputs"
        return f"{kind} weights, bf16 products"
