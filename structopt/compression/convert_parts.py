"""What the ways of running a network share: the module they make, and words for it."""

from __future__ import annotations

import dataclasses
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from structopt.channels.nests import first_line
from structopt.compression.evidence import READERS
from structopt.measure.costs import Cost
from structopt.measure.running import call, device_of


@runtime_checkable
class Route(Protocol):
    """What every way of running a network can do."""

    def missing(self, device: torch.device | str) -> str | None:
        """Why the way cannot be taken on this device; None where it can."""

    def build(self, model: nn.Module, example: Any, calibration: Any = None) -> nn.Module:
        """The network on this way's kernels, for inference; the model stays as it is."""


class Converted(nn.Module):
    """A network on other kernels, for inference: it never has gradients.

    ``runs_on`` says in plain words what runs, and ``on_paper`` what the network costs, for
    :func:`structopt.measure.compare`. Its state is made of plain tensors, so that one can weigh it.
    """

    def __init__(
        self, inner: nn.Module, runs_on: str, on_paper: Cost, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.inner, self.runs_on, self.dtype = inner, runs_on, dtype
        self.register_state_dict_post_hook(_plain_tensors)  # type: ignore[no-untyped-call]
        held = sum(tensor.nbytes for tensor in self.state_dict().values())
        self.on_paper = dataclasses.replace(on_paper, bytes=held)
        self.eval()

    def forward(self, *given: Any, **named: Any) -> Any:
        with torch.no_grad(), written_out_attention():
            if self.dtype is None:
                return self.inner(*given, **named)
            given, named = _cast((given, named), torch.float32, self.dtype)
            return _cast(self.inner(*given, **named), self.dtype, torch.float32)

    def extra_repr(self) -> str:
        return f"runs on {self.runs_on}"


def shown(route: Any) -> str:
    """A route as it is typed, without what is off by default."""
    told = []
    for field in dataclasses.fields(route):
        value = getattr(route, field.name)
        if value is not False or field.default is not False:
            told.append(f"{field.name}={value}")
    return f"{type(route).__name__}({', '.join(told)})"


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The plain linear layers by name. Raises ValueError where there is none to convert.

    Those inside torch's attention are not called as layers, and stay as they are.
    """
    found = {name: m for name, m in model.named_modules() if type(m) is nn.Linear}
    if not found:
        others = [f"{n!r} ({type(m).__name__})" for n, m in model.named_modules() if _holds(m)]
        raise ValueError(
            f"this route converts nn.Linear alone, and the model has none; layer {others[0]} "
            "stays as it is" if others else "the model has no layer with weights"
        )  # fmt: skip
    return found


def in_words(model: nn.Module, converted: Sequence[str] | dict[str, Any], what: str) -> str:
    """What runs on which kernels, with the layers that stay in floating point named."""
    left = [
        name or type(module).__name__
        for name, module in model.named_modules()
        if name not in converted and _holds(module)
    ]
    count = len(converted)
    text = f"{count} linear layer{'s' * (count != 1)} in {what}"
    if left:
        text += f"; {', '.join(left[:3])}{f' and {len(left) - 3} more' * (len(left) > 3)} in float"
    return text


def _holds(module: nn.Module) -> bool:
    recurrent = isinstance(module, nn.RNNBase | nn.MultiheadAttention)
    return recurrent or isinstance(module, (*READERS, nn.modules.conv._ConvTransposeNd))


def as_compiled(model: nn.Module, compiled: bool, **options: Any) -> nn.Module:
    """torch.compile with frozen weights, which folds norms and packs weights beforehand."""
    if not compiled:
        return model
    made: nn.Module = torch.compile(model, options={"freezing": True, **options})  # type: ignore[assignment]
    return made


def refuse(route: Route, example: Any) -> None:
    """Raise ValueError where the route is missing on the device of the example."""
    if reason := route.missing(device_of(call, example)):
        raise ValueError(f"{route}: {reason}")


@contextmanager
def written_out_attention() -> Iterator[None]:
    """Without torch's fused encoder layer, which reads weights past the layers that hold them."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextmanager
def naming_layers(model: nn.Module) -> Iterator[None]:
    """An error inside a layer is raised anew as a ValueError with the layer's name."""
    names = {module: name for name, module in model.named_modules()}
    inside: list[nn.Module] = []
    hooks = []
    for module in names:
        hooks.append(module.register_forward_pre_hook(lambda m, _: inside.append(m)))
        hooks.append(module.register_forward_hook(lambda m, _, out: inside.remove(m)))
    try:
        yield
    except Exception as error:
        if not inside:
            raise
        layer = inside[-1]
        where = f"layer {names[layer]!r} ({type(layer).__name__})" if names[layer] else "the model"
        raise ValueError(f"{where} cannot be exported: {first_line(error)}") from error
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def quiet() -> Iterator[None]:
    """Exporter and quantiser speak of their own insides, by warnings and by the root logger."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _cast(tree: Any, source: torch.dtype, to: torch.dtype) -> Any:
    return tree_map_only(Tensor, lambda t: t.to(to) if t.dtype is source else t, tree)


def _plain_tensors(module: nn.Module, state: dict[str, Any], prefix: str, local: Any) -> None:
    """Tensors of other types (quantised, sparse) as the plain ones that they are made of."""
    for name, tensor in list(state.items()):
        if isinstance(tensor, Tensor) and hasattr(tensor, "__tensor_flatten__"):
            del state[name]
            for part in tensor.__tensor_flatten__()[0]:
                inside = getattr(tensor, part)
                state[f"{name}.{part}"] = inside.contiguous()
