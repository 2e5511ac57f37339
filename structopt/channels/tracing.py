"""Run a model once and carry the labels of its channels beside every tensor."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from structopt.channels import debts, rules
from structopt.channels.attributes import Attributes, is_convolution, mark
from structopt.channels.calls import Call
from structopt.channels.labels import Vector
from structopt.channels.mirrors import MIRROR, Axis, Book, Mirror, mirror_of
from structopt.channels.nests import call, map_tensors, tensors_of
from structopt.channels.reading import ask_for_mode
from structopt.channels.shadow import Shadow, name_of, plain_kernels
from structopt.channels.walking import Modules, parameters_of, tensors_in

_PICKED = "_structopt_picked"  # the labels of dimensions that a tensor was picked from by number
_SCALED = "_structopt_scaled"  # the labels of the weights that scaled a tensor last
_WEIGHT = "_structopt_weight"  # marks a tensor that is made of parameters only
_SQUARE = "_structopt_square"  # marks the square of a tensor: its mean belongs to a norm
_LAYERS = tuple(f"torch.nn.modules.{name}" for name in ("linear", "conv", "activation"))
_DECIDES = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2")
_VALUE = "_structopt_value"  # marks a tensor whose values the example or the weights decide


class Tracer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Runs each op, then asks the op's rule for the mirrors of what came out."""

    def __init__(self, book: Book) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.book = book
        self.shadow = Shadow()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        call = Call(self.book, func, tuple(args), kwargs or {}, {})
        given = tensors_of((args, call.kwargs))
        for tensor in given:
            call.shapes[id(tensor)] = tensor.shape
            self.book.met.add(id(tensor))
            self._note(call, id(tensor), vars(tensor))
        self.book.op = name_of(func)
        self.book.insists |= not self.book.widthless
        passed = debts.carried(call, given)
        self.book.decided |= bool(call.values) and self.book.op in _DECIDES
        call.out = out = self.compute(func, call.args, call.kwargs)
        made = tensors_of(out)
        for tensor in made if call.values else ():
            setattr(tensor, _VALUE, True)
        debts.owe(made, passed)
        rule = rules.find(func)
        if not call.mirrors and rule is not rules.fresh:
            return out
        self.book.picked, self.book.owed = [], []
        try:
            mirrors = rule(call)
        except Exception:  # used as its rule did not foresee, which is as good as no rule
            mirrors = call.freeze_everything()
        self._attach(out, mirrors)
        if rule in rules.CARRYING:
            self._pick(call)
            rules.scale(call)
        for tensor in made if call.scales else ():
            setattr(tensor, _SCALED, tuple(axis for axis in call.scales or () if axis is not None))
        if rules.is_square(call):
            setattr(out, _SQUARE, True)
        if call.weights and len(call.weights) == len(call.shapes) and rule is not rules.fresh:
            for tensor in made:
                setattr(tensor, _WEIGHT, True)
        debts.owe(made, self.book.owed)
        return out

    def _note(self, call: Call, key: int, known: dict[str, Any]) -> None:
        """Tell a call what is known of one of its arguments."""
        if known.get(MIRROR) is not None:
            call.mirrors[key] = known[MIRROR]
        if _PICKED in known:
            call.picked[key] = known[_PICKED]
        if _SCALED in known:
            call.scaled[key] = known[_SCALED]
        if _WEIGHT in known and key not in self.book.given:
            call.weights.add(key)
        for name, found in ((_VALUE, call.values), (_SQUARE, call.squares)):
            if name in known:
                found.add(key)

    def _pick(self, call: Call) -> None:
        """What was picked by number stays known while data moves."""
        before = tuple(label for labels in call.picked.values() for label in labels)
        outputs = [call.out] if isinstance(call.out, Tensor) else list(call.out)
        now = self.book.picked or [[] for _ in outputs]
        for out, picked in zip(outputs, now, strict=False):
            if before or picked:
                setattr(out, _PICKED, (*before, *picked))

    def compute(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the op; who verifies an edit runs some of them otherwise."""
        return self.shadow.run(func, args, kwargs)

    def _attach(self, out: Any, mirrors: Any) -> None:
        outputs = [out] if isinstance(out, Tensor) else list(out or ())
        if mirrors is None:
            mirrors = [None] * len(outputs)
        elif isinstance(out, Tensor):
            mirrors = [mirrors]
        for tensor, mirror in zip(outputs, mirrors, strict=False):
            if isinstance(tensor, Tensor):
                if mirror is None or all(axis is None for axis in mirror):
                    mirror = None
                else:
                    assert len(mirror) == tensor.ndim, (self.book.op, len(mirror), tensor.shape)
                setattr(tensor, MIRROR, mirror)


def label_parameters(book: Book, modules: Modules) -> dict[tuple[str, int], Vector]:
    """Give each index of each dimension of each parameter and buffer a label of its own."""
    axes: dict[tuple[str, int], Vector] = {}
    single: list[Vector] = []
    named = [(name, t) for name, t in tensors_in(modules) if t.is_floating_point()]
    book.labels.reserve(1024 + sum(sum(tensor.shape) for _, tensor in named))
    for name, tensor in named:
        mirror: Mirror = []
        for dim, size in enumerate(tensor.shape):
            axes[name, dim] = labels = book.labels.new(size)
            mirror.append(labels if size > 1 else None)
            if size == 1:
                single.append(labels)
        if tensor.ndim:
            setattr(tensor, MIRROR, mirror)
            setattr(tensor, _WEIGHT, True)
            setattr(tensor, _VALUE, True)
    if single:
        book.labels.freeze(np.concatenate(single), "a single index")
    book.weights = book.labels.size
    return axes


def trace(book: Book, shadow: nn.Module, modules: Modules, example: Any) -> list[torch.Size]:
    """Run the labelled model, freeze what comes out, and say what shapes that had.

    In evaluation mode first. If some weights were not met, or a part with weights may go another
    way in training, in that mode too: branches that serve training only read channels as well.
    """
    follow_modules(book, modules)
    mark(modules, book)
    shapes = _run(book, shadow.eval(), example)
    parameters = parameters_of(modules)
    unmet = [p for p in parameters.values() if id(p) not in book.met]
    if unmet or ask_for_mode(_parts(modules)):
        with contextlib.suppress(Exception):
            _run(book, shadow.train(), example)
        for name, p in parameters.items():
            if id(p) not in book.met:
                for axis in mirror_of(p) or ():
                    freeze(book, axis, "a weight that the example does not use")
                book.unmet += [(name, n) for n in p.shape if n > 1 and book.decided]
    return shapes


def _parts(modules: Modules) -> Iterator[nn.Module]:
    """Modules with weights or parts: others, as those that drop paths, do not choose a branch."""
    return (m for m in modules.values() if m._modules or m._parameters)


def follow_modules(book: Book, modules: Modules) -> None:
    """Keep in `book.module` the name of the module at work.

    What a layer of torch's is given to multiply is data to it, parameters too: learned queries.
    """
    for name, module in modules.items():
        vars(module)["forward"] = _followed(book, module, name)  # in half the time of hooks


def _followed(book: Book, module: nn.Module, name: str) -> Callable[..., Any]:
    forward, kind, convolves = module.forward, type(module).__name__, is_convolution(module)
    layer = type(module).__module__ in _LAYERS

    def run(*args: Any, **kwargs: Any) -> Any:
        before = book.module, book.kind, book.convolves, book.given
        book.module, book.kind, book.convolves, book.given = name, kind, convolves, frozenset()
        if layer:
            book.given = frozenset(id(tensor) for tensor in tensors_of((args, kwargs)))
        out = forward(*args, **kwargs)
        book.module, book.kind, book.convolves, book.given = before  # where it failed, it stays
        return out

    run.__wrapped__ = forward  # type: ignore[attr-defined]  # a model may look at its signature
    return run


def _run(book: Book, shadow: nn.Module, example: Any) -> list[torch.Size]:
    book.module = ""
    example = map_tensors(example, torch.clone)
    for tensor in tensors_of(example):
        setattr(tensor, _VALUE, True)
    with plain_kernels(), Tracer(book), Attributes(book):
        out = tensors_of(call(shadow, example))
    for tensor in out:
        debts.settle(book, tensor)
        for axis in mirror_of(tensor) or ():
            freeze(book, axis, "output of the model")
    return [tensor.shape for tensor in out]


def freeze(book: Book, axis: Axis, why: str) -> None:
    if axis is not None:
        book.labels.freeze(axis, why)
