"""The residual stream of a transformer: who writes it, who reads it, and what stands in the way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
from torch import nn

from structopt.channels.labels import Labels, Vector
from structopt.channels.mirrors import Mirror
from structopt.slicing.recording import Op, Seen, recorded

NORMS = (nn.LayerNorm, nn.RMSNorm)
_PRODUCTS = ("mm", "addmm", "linear", "matmul", "bmm", "baddbmm")
_COPIES = ("clone", "_to_copy", "contiguous", "detach", "alias", "native_dropout", "dropout", "cat")


@dataclass(frozen=True)
class Stream:
    """The axes of weights that lie on the residual stream.

    `readers` names, for each linear layer that reads the stream, the norm that it reads through
    ("" for none). `writers` are tensors and the dimension of each whose entries are added up.
    """

    size: int
    norms: tuple[str, ...]
    readers: Mapping[str, str]
    writers: tuple[tuple[str, int], ...]


def find_stream(model: nn.Module, example: Any) -> Stream:
    """The residual stream: the axis that the most norms of the model average over.

    One run carries the labels of channels beside every tensor, as
    :func:`structopt.channels.channel_groups` does. Each op that touches the stream must allow a
    rotation: the stream is only moved, added up, scaled as a whole, normalised or read by linear
    layers. Raises ValueError that names the layer and the op where it is not so.
    """
    labels, axes, ops, given = recorded(model, example)
    follower = _Follower(model, labels, axes, ops)
    return follower.stream(given)


class _Follower:
    """Goes through the ops in order, and knows of each tensor on the stream its state.

    "" is the stream itself, any other state the norm that it has passed.
    """

    def __init__(
        self,
        model: nn.Module,
        labels: Labels,
        axes: Mapping[tuple[str, int], Vector],
        ops: list[Op],
    ) -> None:
        self.labels, self.axes, self.ops = labels, axes, ops
        self.modules = dict(model.named_modules())
        self.norms = {n for n, m in self.modules.items() if type(m) in NORMS}
        self.roots = self._stream_roots()
        self.state: dict[int, str] = {}
        self.readers: dict[str, str] = {}
        self.passed: list[str] = []
        self.tables: set[str] = set()

    def stream(self, given: Sequence[Mirror]) -> Stream:
        """What the ops leave to say, where nothing on the stream leaves the model."""
        for op in self.ops:
            self._follow(op)
        if any(self._on(axis) for mirror in given for axis in mirror):
            _refuse("the model", "the stream itself is what the model gives, with no layer behind")
        read = {(f"{name}.weight".lstrip("."), 1) for name in self.readers}
        writers = [
            axis
            for axis, labels in self.axes.items()
            if self._on(labels)
            and axis not in read
            and axis[0].rpartition(".")[0] not in self.norms
        ]
        norms = tuple(dict.fromkeys(self.passed))
        kinds = {type(self.modules[name]) for name in norms}
        if len(kinds) > 1:
            _refuse(norms[0], "some norms subtract the mean (LayerNorm), some do not (RMSNorm)")
        if "" in self.readers.values() and nn.LayerNorm in kinds:
            name = next(n for n, norm in self.readers.items() if not norm)
            _refuse(name, "reads the stream past the norms, which alone subtract its mean")
        return Stream(len(self.roots), norms, self.readers, tuple(writers))

    def _stream_roots(self) -> Vector:
        """Of the axes that norms average over, that of the most norms."""
        found: dict[bytes, set[str]] = {}
        for op in self.ops:
            for one in op.inputs if op.module in self.norms else ():
                shape = getattr(self.modules[op.module], "normalized_shape", ())
                axis = one.mirror[-1] if one.mirror and not one.source else None
                if axis is not None and tuple(shape) == (len(axis),):
                    found.setdefault(self.labels.find(axis).tobytes(), set()).add(op.module)
        if not found:
            raise ValueError(
                "no residual stream is found: an nn.LayerNorm or nn.RMSNorm has to normalise it "
                "before it is read"
            )
        most = max(found, key=lambda roots: (len(found[roots]), len(roots)))
        return np.frombuffer(most, dtype=np.int64)

    def _on(self, axis: Vector | None) -> bool:
        return axis is not None and np.array_equal(self.labels.find(axis), self.roots)

    def _dims(self, one: Seen) -> list[int]:
        return [d for d, axis in enumerate(one.mirror) if self._on(axis)]

    def _follow(self, op: Op) -> None:
        before = [one for one in op.inputs if self._dims(one)]
        after = [one for one in op.outputs if self._dims(one)]
        if not before and not after:
            return
        if op.name in _PRODUCTS or op.name in ("convolution", "embedding"):
            state = self._product(op)
        elif op.module in self.norms:
            state = self._norm(op, before)
        else:
            state = self._linear(op, before)
            if len(after) < len(op.outputs):
                _refuse(op, "takes the axes of the stream apart")
        for one in after:
            self.state[one.key] = state

    def _states(self, seen: Sequence[Seen]) -> set[str]:
        return {self.state.get(one.key, "") for one in seen}

    def _product(self, op: Op) -> str:
        """Only a linear layer may read the stream; convolutions and embeddings may write it."""
        for one in op.inputs:
            if op.name == "embedding" and one.source:
                self.tables.add(one.source.rpartition(".")[0])
            if one.source or not self._dims(one):
                continue
            names = [i.source for i in op.inputs if i.source.endswith("weight") and i != one]
            layer = names[0].removesuffix("weight").rstrip(".") if names else ""
            module = self.modules.get(layer)
            if layer in self.tables:
                _refuse(layer, "one weight writes the stream and reads it: untie it first")
            linear = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
            added = op.name == "addmm" and one is op.inputs[0]
            if not names or not linear or self._dims(one) != [len(one.shape) - 1] or added:
                _refuse(op, "reads the stream, and is no nn.Linear over its channels")
            state = self.state.get(one.key, "")
            if self.readers.setdefault(layer, state) != state:
                _refuse(layer, "reads the stream through two norms")
        return ""

    def _norm(self, op: Op, before: Sequence[Seen]) -> str:
        if not self._states([one for one in before if not one.source]) <= {"", op.module}:
            _refuse(op, "normalises what another norm gave")
        self.passed.append(op.module)
        return op.module

    def _linear(self, op: Op, before: Sequence[Seen]) -> str:
        """What may be done to the stream on the way: nothing that prefers some of its axes."""
        states = self._states(before)
        if op.name.endswith(("zeros", "zeros_like")):  # of the size of the stream, or a part of it
            return ""
        if not before:
            _refuse(op, "makes a part of the stream that no weight makes")
        state = next(iter(states))
        if len(states) > 1 or (state and op.name in ("add", "sub", "rsub")):
            _refuse(op, "adds what a norm gave to the stream (post-norm?)")
        if op.moves or op.name in _COPIES or op.name == "mean":
            return state
        if op.name in ("add", "sub") and not op.plain and len(before) == len(op.inputs):
            return ""
        scaled = op.name == "mul" or (op.name == "div" and before[0] is op.inputs[0])
        if (scaled or op.name == "sum") and not state and len(before) == 1:
            others = [one for one in op.inputs if one is not before[0]]
            behind = len(before[0].shape) - self._dims(before[0])[0]
            if all(len(one.shape) < behind or one.shape[-behind] == 1 for one in others):
                return ""
        _refuse(op, "does not treat all axes of the stream alike")


def _refuse(where: Op | str, reason: str) -> NoReturn:
    if isinstance(where, Op):
        reason = f"the op {where.name} {reason}"
        where = where.module or "the model"
    raise ValueError(f"the residual stream cannot be rotated: in {where}, {reason}")
