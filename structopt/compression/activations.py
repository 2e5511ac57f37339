"""Activations as modules of their own, so that they can be measured, bounded and removed."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.operator_schemas import normalize_function

from structopt.channels.exchanging import exchange_
from structopt.compression.evidence import need_known
from structopt.compression.sameness import computes_the_same
from structopt.training.copying import copied, need_numbers
from structopt.training.hooked import bare, in_place_of, say_traced

KINDS = (
    nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU,
    nn.SiLU, nn.Mish, nn.Hardswish, nn.Tanh, nn.Threshold,
)  # fmt: skip
FUNCTIONS: dict[Any, type[nn.Module]] = {
    F.relu: nn.ReLU, torch.relu: nn.ReLU, torch.relu_: nn.ReLU, "relu": nn.ReLU, "relu_": nn.ReLU,
    F.relu6: nn.ReLU6, F.hardtanh: nn.Hardtanh, F.leaky_relu: nn.LeakyReLU, F.elu: nn.ELU,
    F.gelu: nn.GELU, F.silu: nn.SiLU, F.mish: nn.Mish, F.hardswish: nn.Hardswish,
    torch.tanh: nn.Tanh, F.tanh: nn.Tanh, "tanh": nn.Tanh, "tanh_": nn.Tanh,
    F.selu: nn.SELU, torch.selu: nn.SELU, torch.selu_: nn.SELU, F.celu: nn.CELU,
    torch.celu: nn.CELU, torch.celu_: nn.CELU, F.threshold: nn.Threshold,
    torch.threshold: nn.Threshold, torch.threshold_: nn.Threshold,
    F.leaky_relu_: nn.LeakyReLU, F.elu_: nn.ELU, F.hardtanh_: nn.Hardtanh,
}  # fmt: skip
MODAL = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.batch_norm)


def separate_activations(model: nn.Module, example: Any) -> nn.Module:
    """A copy in which each activation is a module that runs once: those written as functions, too.

    ``F.relu(self.fc1(x))`` gets a module ``fc1_relu`` (``F.prelu``, whose slope the model holds,
    and ``clamp`` stay as they are); one ``nn.ReLU`` that serves several places
    becomes one for each. The copy is a ``torch.fx.GraphModule`` with the weights under their old
    names; a model that needs no change is merely copied.

    Raises ValueError where ``torch.fx`` cannot follow the model (Python that asks for values), for
    functions whose mode it would freeze (``F.dropout(training=self.training)``), and where the copy
    does not compute the same of random inputs like the example.

    >>> from structopt.networks import LeNet300
    >>> made = separate_activations(LeNet300(), torch.zeros(1, 1, 28, 28))
    >>> made.fc1_relu, made.fc1
    (ReLU(), Linear(in_features=784, out_features=300, bias=True))
    """
    need_numbers(model)
    made = copied(model)
    try:
        with torch.random.fork_rng(devices=[]):  # a network that draws numbers draws them now
            traced = fx.symbolic_trace(made)
    except Exception as error:  # the model's own code fails in its own way on stand-ins
        raise ValueError(
            f"torch.fx cannot follow this {type(model).__name__}: {error}; write its activations "
            "as modules, each used once"
        ) from error
    modal = [node for node in traced.graph.nodes if node.target in MODAL]
    if modal:
        raise ValueError(
            f"{modal[0].name} is a function that asks for the mode of the model, which torch.fx "
            "would freeze: write it as a module"
        )
    wanted = [node for node in traced.graph.nodes if _is_activation(node, traced)]
    runs = [node.target for node in wanted if node.op == "call_module"]
    changed = [n for n in wanted if n.op != "call_module" or runs.count(n.target) > 1]
    if not changed:
        return made
    for node in changed:
        _separate(node, traced)
    traced.graph.lint()
    traced.recompile()
    modes = {name: module.training for name, module in model.named_modules()}
    for name, module in traced.named_modules():
        module.training = modes.get(name, model.training)
    wide = [copied(m).double() for m in (model, traced)]
    if not computes_the_same(wide[0], wide[1], example):
        raise ValueError(
            f"torch.fx followed this {type(model).__name__} for one example, and computes "
            "something else for another: write its activations as modules, each used once"
        )
    say_traced(made, lambda m, name: bool(name) and fx.Tracer().is_leaf_module(m, name), "the copy")
    return traced


def _is_activation(node: fx.Node, traced: fx.GraphModule) -> bool:
    if node.op == "call_module":
        return isinstance(traced.get_submodule(str(node.target)), KINDS)
    return node.op in ("call_function", "call_method") and node.target in FUNCTIONS


def _separate(node: fx.Node, traced: fx.GraphModule) -> None:
    """One module for this node alone, named after what it reads."""
    given = node.args[0] if node.args else node.kwargs["input"]
    assert isinstance(given, fx.Node)
    if node.op == "call_module":
        module = copy.deepcopy(traced.get_submodule(str(node.target)))
    else:
        module = FUNCTIONS[node.target](**_settings(node))
    module = unspoiling(module)
    name = f"{given.name}_{type(module).__name__.lower()}"
    while hasattr(traced, name):
        name += "_"
    traced.add_submodule(name, module)
    with traced.graph.inserting_before(node):
        node.replace_all_uses_with(traced.graph.call_module(name, (given,)))
    traced.graph.erase_node(node)


def _settings(node: fx.Node) -> dict[str, Any]:
    """The settings of an activation written as a function, as its module takes them."""
    found = dict(node.kwargs)
    if len(node.args) > 1 and callable(node.target):
        normal = normalize_function(
            node.target, node.args, found, normalize_to_only_use_kwargs=True
        )
        if normal is None:
            raise ValueError(f"{node.name} has settings that cannot be read: {node.args[1:]}")
        found = dict(normal.kwargs)
    return {key: value for key, value in found.items() if key not in ("input", "inplace")}


def unspoiling(activation: nn.Module) -> nn.Module:
    """The activation itself, told to leave its input as it is."""
    if getattr(activation, "inplace", False):
        activation.inplace = False  # type: ignore[assignment]
    return activation


class Blend(nn.Module):
    """(1 - α) · f(x) + α · x: an activation f that a learned slope α turns into nothing.

    At α = 0 it is f, at α = 1 the identity, both to the bit. For ReLU it is the leaky ReLU of slope
    α, whose training to α = 1 is layer folding (Dror et al., 2021).

    >>> blend = Blend(nn.ReLU(), 0.25)
    >>> blend(torch.tensor([-4.0, 2.0]))
    tensor([-1.,  2.], grad_fn=<...>)
    """

    def __init__(self, activation: nn.Module, slope: float = 0.0) -> None:
        super().__init__()
        self.activation = unspoiling(copy.deepcopy(activation))
        with torch.inference_mode(False):  # to be trained, wherever it is made
            self.slope = nn.Parameter(torch.tensor(float(slope)))

    def forward(self, input: Tensor) -> Tensor:
        made: Tensor = self.activation(input)
        return torch.lerp(made, input, self.slope.to(made.dtype))


def blend_activations(model: nn.Module, names: Iterable[str], slope: float = 0.0) -> nn.Module:
    """A copy in which these activations are :class:`Blend`, on the device of the model.

    One that serves several places gets one slope for all of them; :func:`separate_activations`
    first gives each its own.

    Raises ValueError for a name that is no activation module of the model.

    >>> blend_activations(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), ["1"])[1].slope
    Parameter containing:
    tensor(0., requires_grad=True)
    """
    made = copied(model)
    weights = next((p for p in made.parameters() if p.is_floating_point()), torch.zeros(()))
    for name, activation in activations(made, list(names)).items():
        blend = Blend(bare(activation), slope).to(weights)
        exchange_(made, name, in_place_of(activation, blend, name))
    return made


def activations(
    model: nn.Module, names: Sequence[str] | None = None, kinds: tuple[type[nn.Module], ...] = KINDS
) -> dict[str, nn.Module]:
    """The activation modules of these names; None: all of them, at least one."""
    if isinstance(names, str):
        raise ValueError(f"names is a list of activations: [{names!r}]")
    inside = [f"{n}." for n, m in model.named_modules() if isinstance(m, Blend)]
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, kinds) and name and not name.startswith(tuple(inside))
    }
    word = " or ".join(kind.__name__ for kind in kinds) if len(kinds) < 4 else "activation"
    if not found:
        raise ValueError(
            f"this {type(model).__name__} has no {word} as a module: where it calls functions, "
            "separate_activations makes modules of them"
        )
    if names is None:
        return found
    need_known(model, names, found, word)
    return {name: found[name] for name in names}
