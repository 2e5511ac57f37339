"""ONNX Runtime: the network exported, quantised there, and wrapped as an ordinary module."""

from __future__ import annotations

import importlib
import importlib.util
import platform
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map, tree_unflatten

from structopt.compression.convert_parts import (
    Converted,
    naming_layers,
    quiet,
    refuse,
    shown,
    written_out_attention,
)
from structopt.compression.convert_trial import relative_error
from structopt.measure.costs import cost
from structopt.measure.running import batch_of, call, tensors_of, undisturbed, with_batch
from structopt.training.statistics import inputs_of

NEEDS = ("onnx", "onnxscript", "onnxruntime")
HEAVY = ("Conv", "MatMul", "Gemm", "LSTM", "GRU", "RNN", "Attention")
Exports = dict[int, tuple[bytes, int | None]]
_EXPORTS: ContextVar[Exports | None] = ContextVar("exports", default=None)


@dataclass(frozen=True)
class ONNXRuntime:
    """An export that ONNX Runtime runs on the processor: int8, or float with ``bits=32``.

    Dynamic: linear layers (and convolutions, mostly slower so) with steps for the inputs found in
    each call. Static: all that has an int8 kernel, with steps from calibration by min-max. Weights
    have a scale for each output. It runs on as many threads as torch does when it is built.
    """

    bits: int = 8
    static: bool = False

    __repr__ = shown

    def __post_init__(self) -> None:
        if self.bits not in (8, 32):
            raise ValueError(f"{self}: there are kernels for bits=8 and, floating, bits=32")
        if self.static and self.bits == 32:
            raise ValueError(f"{self}: static steps are for bits=8")

    def missing(self, device: torch.device | str) -> str | None:
        lacking = [name for name in NEEDS if importlib.util.find_spec(name) is None]
        if lacking:
            return f"{', '.join(lacking)} not installed: pip install {' '.join(NEEDS)}"
        kind = torch.device(device).type
        return None if kind == "cpu" else f"this export runs on the CPU, the model is on {kind}"

    def build(self, model: nn.Module, example: Any, calibration: Any = None) -> nn.Module:
        refuse(self, example)
        if self.static and calibration is None:
            raise ValueError(f"{self}: static steps need batches, pass calibration=")
        with undisturbed(model, example), written_out_attention():
            spec = tree_flatten(call(model, example))[1]
        with tempfile.TemporaryDirectory() as folder, quiet():
            path = Path(folder)
            fixed = _once(model, example, path / "float.onnx")
            if self.bits == 8:
                self._quantize(path, example, calibration, fixed)
            graph = (path / ("int8.onnx" if self.bits == 8 else "float.onnx")).read_bytes()
            left = _left_in_float(graph, path / "runs.onnx") if self.bits == 8 else ""
        version = importlib.import_module("onnxruntime").__version__
        kind = f"int8 weights, {'static' if self.static else 'dynamic'} int8 inputs"
        words = (
            f"ONNX Runtime {version}, {kind if self.bits == 8 else 'fp32'}, from an export{left}"
        )
        return Converted(_Session(graph, spec, fixed), words, cost(model, example))

    def _quantize(
        self, path: Path, example: Any, calibration: Iterable[Any], fixed: int | None
    ) -> None:
        kit: Any = importlib.import_module("onnxruntime.quantization")
        shapes: Any = importlib.import_module("onnxruntime.quantization.shape_inference")
        source, ready, made = (str(path / f"{n}.onnx") for n in ("float", "ready", "int8"))
        shapes.quant_pre_process(source, ready, skip_symbolic_shape=True)  # folds batch norms
        options = {"per_channel": True, "weight_type": kit.QuantType.QInt8}
        if not self.static:
            kit.quantize_dynamic(ready, made, **options)
            return
        names = [node.name for node in _open(Path(ready).read_bytes()).get_inputs()]
        feeds = iter([_feed(names, part) for batch in calibration for part in _parts(batch, fixed)])

        class Reader(kit.CalibrationDataReader):  # type: ignore[misc]
            def get_next(self) -> dict[str, Any] | None:
                return next(feeds, None)

        activations = kit.QuantType.QUInt8  # unsigned times signed: the product of VNNI
        kit.quantize_static(ready, made, Reader(), activation_type=activations, **options)


class _Session(nn.Module):
    """An ONNX file as a module: its bytes are the state, so that it is weighed and copied."""

    graph: Tensor

    def __init__(self, graph: bytes, spec: TreeSpec, fixed: int | None) -> None:
        super().__init__()
        self.register_buffer("graph", torch.frombuffer(bytearray(graph), dtype=torch.uint8))
        self.spec, self.fixed = spec, fixed
        self._start()

    def _start(self) -> None:
        self._session = _open(self.graph.cpu().numpy().tobytes())
        self._names = [node.name for node in self._session.get_inputs()]

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_session"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._start()

    def forward(self, *given: Any, **named: Any) -> Any:
        example = named or given
        if self.fixed is not None and batch_of(example) != self.fixed:
            raise ValueError(
                f"this export is for a batch of {self.fixed}, not of {batch_of(example)}: convert "
                "with such an example"
            )
        arrays = self._session.run(None, _feed(self._names, example))
        return tree_unflatten([torch.from_numpy(array) for array in arrays], self.spec)


def _open(graph: bytes, optimised: Path | None = None) -> Any:
    """A session; what it will run, operators fused and placed, is written where one asks for it."""
    runtime: Any = importlib.import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.optimized_model_filepath = "" if optimised is None else str(optimised)
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    if _saturates():  # take the exact product, which is slower
        options.add_session_config_entry("session.x64quantprecision", "1")
    return runtime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def _saturates() -> bool:
    """Whether products of unsigned and signed bytes are added up in 16 bits: x86 without VNNI."""
    # An older torch does not say: be exact.
    has: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    exact = has.get("avx512_vnni") or has.get("avx_vnni")
    return platform.machine() in ("x86_64", "AMD64") and not exact


def _left_in_float(graph: bytes, path: Path) -> str:
    """Operators with weights that have no int8 kernel, in words."""
    _open(graph, path)
    onnx: Any = importlib.import_module("onnx")
    kinds = {node.op_type for node in onnx.load(path).graph.node}
    heavy = {kind for kind in kinds if any(part in kind for part in HEAVY)}
    left = sorted(kind for kind in heavy if not ("Q" in kind or "Integer" in kind))
    if len(left) == len(heavy):
        known = ", ".join(left) or "none has weights"
        raise ValueError(f"no operator of the export has an int8 kernel: {known}")
    return f"; {', '.join(left)} in float" if left else ""


def _feed(names: list[str], example: Any) -> dict[str, Any]:
    tensors = tensors_of(example)
    if isinstance(example, Mapping) and set(names) <= set(example):
        tensors = [example[name] for name in names]
    if len(tensors) != len(names):
        raise ValueError(
            f"the export reads {len(names)} tensors, {names}; got {len(tensors)}. To calibrate, a "
            "pair is (inputs, targets): with several inputs ((x, y), None)"
        )
    return {n: t.detach().cpu().numpy() for n, t in zip(names, tensors, strict=True)}


def _parts(batch: Any, fixed: int | None) -> Iterator[Any]:
    """A calibration batch in pieces of the only size that the export takes."""
    inputs = inputs_of(batch)
    size = batch_of(inputs)
    for start in range(0, size, fixed or size):
        index = torch.arange(start, min(size, start + (fixed or size)))
        part = tree_map(
            lambda t, index=index: t[index] if isinstance(t, Tensor) and len(t) == size else t,
            inputs,
        )
        yield part if fixed is None else with_batch(part, fixed)


@contextmanager
def exported_once() -> Iterator[None]:
    """In the block a model, which must not change there, is exported for all its routes at once."""
    token = _EXPORTS.set({})
    try:
        yield
    finally:
        _EXPORTS.reset(token)


def _once(model: nn.Module, example: Any, path: Path) -> int | None:
    known = _EXPORTS.get()
    if known is None or id(model) not in known:
        fixed = _export(model, example, path)
        if known is not None:
            known[id(model)] = path.read_bytes(), fixed
        return fixed
    path.write_bytes(known[id(model)][0])
    return known[id(model)][1]


def _export(model: nn.Module, example: Any, path: Path) -> int | None:
    """Write the graph; the batch it is for, or None where it takes any."""
    size = batch_of(example)
    many = with_batch(example, max(2, size))  # one of size 1 would be taken for a constant
    try:
        _write(model, many, path, max(2, size))
        other = with_batch(example, size + 2)
        session = _open(path.read_bytes())
        found = session.run(None, _feed([n.name for n in session.get_inputs()], other))
        with undisturbed(model, other), written_out_attention():
            off = relative_error([*map(torch.from_numpy, found)], tensors_of(call(model, other)))
        if off < 1e-3:
            return None
    except Exception:
        pass
    _write(model, example, path, None)
    return size


def _write(model: nn.Module, example: Any, path: Path, size: int | None) -> None:
    named = isinstance(example, Mapping)
    given = () if named else example if isinstance(example, tuple) else (example,)

    def dims(leaf: Any) -> Any:
        is_batch = isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == size
        return {0: torch.export.Dim.AUTO} if is_batch else None

    shapes = None if size is None else tree_map(dims, dict(example) if named else given)
    with torch.no_grad(), written_out_attention(), naming_layers(model):
        program = torch.export.export(
            model, given, dict(example) if named else None, dynamic_shapes=shapes, strict=False
        )
    torch.onnx.export(program, (), path, dynamo=True, verbose=False, external_data=False)
