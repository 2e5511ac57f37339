"""Counting multiply-accumulates: torch's counter, and the operators that it leaves out."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

aten = torch.ops.aten
Shape = tuple[int, ...]


def _attention(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    # Two products: every query with every key, then the weights with every value.
    return 2 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _recurrent(inputs: Shape, weights: list[Shape]) -> int:
    # Each weight matrix is used once for each step of each sequence.
    matrices = [shape for shape in weights if len(shape) == 2]
    return 2 * math.prod(inputs[:-1]) * sum(math.prod(shape) for shape in matrices)


# Formulas get shapes for tensors and return FLOPs, as torch's own do.
_MATRIX_PRODUCTS = {
    "mv": lambda a, *_, **__: 2 * math.prod(a),
    "addmv": lambda _c, a, *_, **__: 2 * math.prod(a),
    "dot": lambda a, *_, **__: 2 * math.prod(a),
    "vdot": lambda a, *_, **__: 2 * math.prod(a),
    "_grouped_mm": lambda a, b, *_, **__: 2 * math.prod(a) * b[-1],  # each row meets one expert
    "_int_mm": lambda a, b, **_: 2 * math.prod(a) * b[1],
    "_weight_int8pack_mm": lambda a, b, *_, **__: 2 * math.prod(a) * b[0],
    "mkldnn_rnn_layer": lambda x, w, u, *_, **__: _recurrent(x, [w, u]),
    "_cudnn_rnn": lambda x, weights, *_, **__: _recurrent(x, weights),
    "miopen_rnn": lambda x, weights, *_, **__: _recurrent(x, weights),
    "_lstm_mps": lambda x, _hx, weights, *_, **__: _recurrent(x, weights),
}
_FORMULAS = {
    **_MATRIX_PRODUCTS,
    "_scaled_dot_product_flash_attention_for_cpu": _attention,
    "_scaled_dot_product_fused_attention_overrideable": _attention,
    "_scaled_dot_product_attention_math_for_mps": _attention,
}


def counter() -> FlopCounterMode:
    """torch's counter with the formulas that it lacks."""
    known = {getattr(aten, name): f for name, f in _FORMULAS.items() if hasattr(aten, name)}
    return FlopCounterMode(display=False, custom_mapping=known)


def family(packet: Any) -> str:
    """What kind of arithmetic an operator does, by the same name on every device."""
    name = str(packet).rpartition(".")[2]
    if "attention" in name:
        return "attention"
    if "conv" in name:
        return "convolution"
    return "matmul" if name in _MATRIX_PRODUCTS or name.endswith("mm") else name


class Unknown(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Remembers operators that may multiply, but for which no formula is known."""

    _PARTS = (
        "mm",
        "conv",
        "attention",
        "multi_head",
        "rnn",
        "lstm",
        "gru",
        "linear",
        "dist",
        "fft",
        "linalg",
        "solve",
        "cholesky",
    )
    _ELEMENTWISE = ("vector_norm", "linalg_cross", "check_errors")

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: set[str] = set()
        self.known: set[Any] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = func._overloadpacket
        space, _, name = str(packet).rpartition(".")
        foreign = space not in ("aten", "prims", "prim")
        works = any(part in name for part in self._PARTS) and not name.endswith(self._ELEMENTWISE)
        if packet not in self.known and (foreign or works):
            self.names.add(str(packet))
        return func(*args, **(kwargs or {}))
