"""The tensors that modules hold, by name: the walk that found the modules serves these too."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor, nn

Modules = Mapping[str, nn.Module]


def modules_of(model: nn.Module) -> dict[str, nn.Module]:
    """As ``dict(model.named_modules())``, in a fraction of its time: that hands each name up."""
    found: dict[str, nn.Module] = {}
    _walk(model, "", found, set())
    return found


def _walk(module: nn.Module, name: str, found: dict[str, nn.Module], seen: set[nn.Module]) -> None:
    seen.add(module)
    found[name] = module
    for key, part in module._modules.items():
        if part is not None and part not in seen:
            _walk(part, f"{name}.{key}" if name else key, found, seen)


def parameters_of(modules: Modules) -> dict[str, nn.Parameter]:
    return dict(_once(modules, "_parameters"))  # type: ignore[arg-type]


def tensors_in(modules: Modules) -> list[tuple[str, Tensor]]:
    """All parameters, then all buffers, each once."""
    return [*_once(modules, "_parameters"), *_once(modules, "_buffers")]


def _once(modules: Modules, store: str) -> Iterator[tuple[str, Tensor]]:
    seen: set[int] = set()
    for name, module in modules.items():
        for key, tensor in getattr(module, store).items():
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                yield f"{name}.{key}" if name else key, tensor
