"""A network as a graph of operations, by torch's own tracers."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.utils._pytree import tree_flatten

from structopt.channels.nests import first_line
from structopt.measure.running import Example, undisturbed
from structopt.slicing.asking import own

_IN_PLACE = {
    "setitem",
    "iadd",
    "isub",
    "imul",
    "itruediv",
    "ior",
    "iand",
    "ixor",
    "imatmul",
    "ipow",
}
_ANY_NUMBER = {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}


class Stage(fx.GraphModule):
    """A piece of a traced network. It holds the network's modules under their own names."""

    def arguments(self, example: Example) -> list[Any]:
        """The example, in the order of the graph's inputs."""
        if "exported" in self.meta:
            return tree_flatten(_call(example))[0]
        args, named = _call(example)
        bound = inspect.signature(self.forward).bind(*args, **named)
        bound.apply_defaults()
        return list(bound.arguments.values())

    def part(self, graph: fx.Graph, *, first: bool, last: bool) -> Stage:
        """A stage with the nodes of `graph`, which takes or gives what the whole does."""
        if "exported" in self.meta:
            codegen: Any = copy.deepcopy(self.graph._codegen)
            tree = codegen.pytree_info
            if not first:
                (names, spec) = (["value"], tree_flatten(((0,), {}))[1])
                tree = tree._replace(orig_args=names, in_spec=spec)
            graph.set_codegen(type(codegen)(tree if last else tree._replace(out_spec=None)))
        stage = Stage(self, graph)
        stage.meta.update(self.meta)
        return stage

    def train(self, mode: bool = True) -> Stage:
        """As of any module; refused where the mode was fixed when the network was traced."""
        fixed = self.meta.get("mode", mode)
        if mode != fixed:
            raise RuntimeError(
                f"these stages were traced in {'training' if fixed else 'evaluation'} mode, and "
                "the network decides by it outside of its modules: set the mode, then cut again"
            )
        super().train(mode)
        return self


def traced(model: nn.Module, example: Example, whole: Collection[str]) -> Stage:
    """The network as one graph; by ``torch.fx``, which keeps its modules, or ``torch.export``."""
    if isinstance(whole, str):
        raise ValueError(f"whole is a list of names: [{whole!r}]")
    missing = set(whole) - {name for name, _ in model.named_modules()}
    if missing:
        raise ValueError(f"whole={sorted(missing)}: the model has no such modules")
    try:
        here, there = _both_modes(model, example, whole)
    except Exception as problem:  # whatever a tracer meets inside a network of others
        return _exported(model, example, problem)
    stage = Stage(model, here)
    if not _alike(model, here, there):
        stage.meta["mode"] = model.training
    return stage


class _Tracer(fx.Tracer):
    def __init__(self, whole: Collection[str], buffers: bool = False) -> None:
        super().__init__()
        self.whole, self.proxy_buffer_attributes = whole, buffers

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name in self.whole or super().is_leaf_module(
            m, module_qualified_name
        )


def kept_whole(graph: Stage, whole: Collection[str]) -> Callable[[nn.Module, str], bool]:
    """Whether a module, given with its name, is called by the graph and not opened."""
    if "exported" in graph.meta:
        return lambda module, name: False
    return lambda module, name: bool(name) and _Tracer(whole).is_leaf_module(module, name)


def _both_modes(model: nn.Module, example: Example, whole: Collection[str]) -> Iterator[fx.Graph]:
    """Traced in the mode of the model and in the other.

    What is computed of buffers alone is traced too, so that the stages read the buffers; where the
    model decides by them it is fixed.
    """
    try:
        return iter([_symbolic(model, example, _Tracer(whole, True), f) for f in (False, True)])
    except Exception:
        return iter([_symbolic(model, example, _Tracer(whole), f) for f in (False, True)])


def _alike(model: nn.Module, here: fx.Graph, there: fx.Graph) -> bool:
    """The same operations on the same constants, which have other names in each trace."""
    constant = re.compile(r"_tensor_constant\d+")
    texts = [constant.sub("", str(graph)) for graph in (here, there)]
    names = [[n.target for n in graph.nodes if n.op == "get_attr"] for graph in (here, there)]
    pairs = [(a, b) for a, b in zip(*names, strict=False) if a != b]
    return texts[0] == texts[1] and all(
        torch.equal(getattr(model, str(a)), getattr(model, str(b))) for a, b in pairs
    )


def _symbolic(model: nn.Module, example: Example, tracer: fx.Tracer, flip: bool) -> fx.Graph:
    """What the example leaves out keeps its default."""
    args, named = _call(example)
    signature = inspect.signature(model.forward)
    given = signature.bind(*args, **named).arguments
    kinds = {name: parameter.kind for name, parameter in signature.parameters.items()}
    if {kinds[name] for name in given} & _ANY_NUMBER:
        raise TypeError("the example gives arguments of any number, *args or **kwargs")
    left = {
        name: parameter.default
        for name, parameter in signature.parameters.items()
        if name not in given and parameter.default is not parameter.empty
    }
    modes = [(module, module.training) for module in model.modules()]
    grad = torch.is_grad_enabled()
    with undisturbed(model, ()), torch.set_grad_enabled(grad):  # a buffer may be written to
        for module, was in modes:
            module.training = was != flip
        return tracer.trace(model, concrete_args=left or None)


def _exported(model: nn.Module, example: Example, problem: Exception) -> Stage:
    args, named = _call(example)
    try:
        graph = torch.export.export(model, *own((args, named))).module(check_guards=False)
    except Exception as refusal:
        raise ValueError(
            f"{type(model).__name__} cannot be traced: {first_line(problem)} (torch.fx); "
            f"{first_line(refusal)} (torch.export). Control flow that depends on data cannot be "
            "cut: write it with torch.where, or name the module that holds it in whole="
        ) from refusal
    assert isinstance(graph, fx.GraphModule)
    stage = Stage(graph, graph.graph)
    stage.meta.update(exported=True, mode=model.training)
    return stage


def _call(example: Example) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example, Mapping):
        return (), dict(example)
    return (example if isinstance(example, tuple) else (example,)), {}


def _path(node: fx.Node) -> list[str]:
    """The modules in which an operation lies, outermost first."""
    stack = node.meta.get("nn_module_stack") or {}
    return [path for path, *_ in stack.values() if path]


def aliases(node: fx.Node, following: fx.Node) -> list[str]:
    """The modules that end with `node`, outermost first; its own name where none does."""
    inside = _path(following)
    ended = [path for path in _path(node) if path not in inside]
    return ended or [node.name]


def fetched(nodes: list[fx.Node]) -> set[fx.Node]:
    """Weights, and what is computed of weights alone: each stage that reads one makes its own.

    Not of those that the network writes to.
    """
    found, written = set[fx.Node](), set[object]()
    of = dict[fx.Node, set[object]]()  # the weights that a node shows
    for node in nodes:
        of[node] = {node.target} if node.op == "get_attr" else set()
        of[node] = of[node].union(*(of[value] for value in node.all_input_nodes))
        if node.op in ("call_function", "call_method") and _writes(node):
            written |= of[node]
    for node in nodes:
        pure = node.op in ("call_function", "call_method") and node.all_input_nodes
        if node.op == "get_attr" or (
            pure and found.issuperset(node.all_input_nodes) and not of[node] & written
        ):
            found.add(node)
    return found


def _writes(node: fx.Node) -> bool:
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    in_place = name in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))
    return in_place or bool(node.kwargs.get("inplace")) or "out" in node.kwargs


def told(node: fx.Node) -> str:
    """A value by the name that the network's author knows."""
    if node.op == "placeholder":
        return f"the input {node.target!r}"
    path = _path(node)
    return (
        f"the output of {path[-1]}"
        if path and node.op == "call_module"
        else (f"{node.name} in {path[-1]}" if path else node.name)
    )
