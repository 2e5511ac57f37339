"""Features of a model's layers, seen while it runs."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel


class Found(dict[str, Any]):
    """Outputs by layer, each as the layer gave it: one that was changed since is not given out."""

    def __init__(self) -> None:
        super().__init__()
        self.versions: dict[str, int] = {}

    def keep(self, name: str, output: Any) -> None:
        self[name] = output
        if not torch.compiler.is_compiling():  # compiled code counts no changes
            counted = isinstance(output, torch.Tensor) and not output.is_inference()
            self.versions[name] = output._version if counted else -1

    def clear(self) -> None:
        super().clear()
        self.versions.clear()

    def __getitem__(self, name: str) -> Any:
        output, before = super().__getitem__(name), self.versions.get(name, -1)
        if before >= 0 and output._version != before:
            raise ValueError(
                f"what the layer {name!r} gave was changed in place by what follows it, such as "
                "ReLU(inplace=True) or +=: name the layer that does it, or set inplace=False"
            )
        return output


class Watch:
    """``with Watch(model, names) as found``: see :func:`watch`. May be entered again and again."""

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        if not isinstance(model, nn.Module):
            raise ValueError(
                f"layers are watched in an nn.Module, not in {type(model).__name__}: of a slice of "
                "a slimmable network learn by the logits, or cut it out with extract"
            )
        need_names(names)
        layers = {
            name.replace("_orig_mod.", ""): layer
            for name, layer in unwrapped(model).named_modules()
        }
        self.found = Found()
        self.layers: dict[str, nn.Module] = {}
        for name in names:
            if name not in layers or not name:
                raise ValueError(missing(name, layers))
            self.layers[name] = layers[name]
        # torch.compile notices a changed `forward`, and compiles once for each state; hooks that
        # come after it has compiled it would pass over. So a forward, and the same each time:
        self.own = {name: layer.forward for name, layer in self.layers.items()}
        self.seen = {name: self._seeing(name) for name in self.layers}
        self.before: dict[str, Any] = {}
        # In evaluation mode torch's encoder layers run as one kernel, and call no layer inside.
        fused = (nn.TransformerEncoderLayer, nn.TransformerEncoder)
        self.fuses = any(isinstance(module, fused) for module in layers.values())
        self.fusing = True

    def _seeing(self, name: str) -> Callable[..., Any]:
        own, found = self.own[name], self.found

        def forward(*inputs: Any, **options: Any) -> Any:
            output = own(*inputs, **options)
            found.keep(name, output)
            return output

        return forward

    def __enter__(self) -> dict[str, Any]:
        if self.before:
            raise RuntimeError("this watch is on already: make a second one")
        self.found.clear()
        if self.fuses:
            self.fusing = torch.backends.mha.get_fastpath_enabled()
            torch.backends.mha.set_fastpath_enabled(False)
        for name, layer in self.layers.items():
            if layer.forward != self.own[name]:  # changed since, or another watch has ended
                self.own[name] = layer.forward
                self.seen[name] = self._seeing(name)
            self.before[name] = vars(layer).get("forward")
            layer.forward = self.seen[name]
        return self.found

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for name, layer in self.layers.items():
            before = self.before.pop(name)
            if before is None:
                del layer.forward
            else:
                layer.forward = before
        if self.fuses:
            torch.backends.mha.set_fastpath_enabled(self.fusing)
        self.found.clear()  # the features hold the whole graph of the forward pass


def watch(model: nn.Module, names: Iterable[str]) -> Watch:
    """``with watch(model, names) as found:`` the outputs of these layers at the last forward pass.

    Names are those of ``model.named_modules()``, with or without torch.compile and
    ``DistributedDataParallel`` around the model. On leaving the context, by an error too, the
    layers are as they were and the features are let go: take what you need inside, before anything
    changes it in place (that is refused). One watch may
    be used again and again, which spares torch.compile from compiling anew. A layer called twice
    in one pass shows its last output.

    Raises ``ValueError`` for a layer that does not exist, listing near names.

    >>> import torch
    >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    >>> with watch(model, ["0"]) as found:
    ...     output = model(torch.ones(1, 2))
    ...     torch.equal(found["0"].relu(), output)
    True
    """
    return Watch(model, names)


class Watcher:
    """Watches the same layers of whichever model it is asked for, and keeps the last watch."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = list(dict.fromkeys(names))
        self.model: nn.Module | None = None
        self.watch: Watch | None = None

    def __call__(self, model: nn.Module) -> AbstractContextManager[dict[str, Any]]:
        if not self.names:
            return nullcontext({})
        if self.watch is None or self.model is not model:
            self.model, self.watch = model, Watch(model, self.names)
        return self.watch

    def __getstate__(self) -> dict[str, Any]:
        # A copy watches copies: the forwards of a Watch belong to the layers they were made for.
        return {"names": self.names, "model": None, "watch": None}


def need_names(names: object) -> None:
    if isinstance(names, str):  # would be taken for one name a letter
        raise ValueError(f"names is a list of layers: [{names!r}]")


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside ``torch.compile`` and ``DistributedDataParallel``."""
    while True:
        if isinstance(model, (DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def missing(name: str, layers: Iterable[str]) -> str:
    known = [layer for layer in layers if layer]
    near = difflib.get_close_matches(name, known, n=5, cutoff=0.4) or known[:8]
    return f"there is no layer {name!r}; near names are {', '.join(near) or 'none at all'}"
