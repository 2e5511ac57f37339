"""What a file says of a network: every tensor, and of every module its class and sizes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Container, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from structopt import files
from structopt.checkpoint import plain

KIND = "structopt.network 1"
LONGEST = 120  # letters of a way in a warning
INTERNAL = frozenset(vars(nn.Module()))  # what every module keeps, such as `training`

# Where a module keeps tensors: its parameters, its buffers, and attributes that are neither.
KINDS: dict[str, Callable[[nn.Module], dict[str, Any]]] = {
    "parameters": lambda module: module._parameters,
    "buffers": lambda module: module._buffers,
    "tensors": lambda module: {k: v for k, v in vars(module).items() if isinstance(v, Tensor)},
}

# Layers that the file alone describes fully, by their plain attributes and tensors: what folding,
# removal, factorisation and a change of units put in the place of the layers of the original class.
BUILDABLE: dict[str, type[nn.Module]] = {
    layer.__name__: layer
    for layer in (
        nn.Identity, nn.Sequential, nn.Flatten, nn.Dropout, nn.Linear, nn.Embedding,
        nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d,
        nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.Hardswish,
        nn.LeakyReLU, nn.GELU, nn.SiLU, nn.Sigmoid, nn.Tanh, nn.Threshold, nn.ChannelShuffle,
    )
}  # fmt: skip


def save(model: nn.Module, path: str | Path) -> None:
    """Write ``model`` to one file, atomically and without pickle.

    Tensors that are tied are stored once. Buffers that a ``state_dict`` leaves out (rotary
    frequencies, masks) are stored too, since a change of structure may have changed them. Tensors
    and layers in a plain list or dict are not; a warning names them, and no more than that, since
    many are caches, or constants that the constructor makes again.

    Raises ``ValueError`` for tensors without data (``meta``, lazy layers) and for modules with an
    extra state of their own, ``OSError`` for a disk that is full or read-only.

    >>> import tempfile
    >>> from structopt.checkpoint import load
    >>> path = Path(tempfile.mkdtemp()) / "narrow.safetensors"
    >>> save(nn.Sequential(nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 1)), path)
    >>> load(path, into=nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 1)))[0]
    Linear(in_features=4, out_features=2, bias=True)
    """
    tensors: dict[str, Tensor] = {}
    names: dict[int, str] = {}  # each tensor object's first name
    structure: dict[str, Any] = {}
    places: dict[nn.Module, str] = {}  # each module's first name
    left: list[str] = []
    for name, module in model.named_modules(remove_duplicate=False):
        if (place := places.setdefault(module, name)) != name:
            if "class" in structure.get(name.rpartition(".")[0], {}):  # not below another twin
                structure[name] = {"same": place}
            continue
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise ValueError(f"{name or 'the model'} has an extra state, which needs pickle")
        structure[name] = _record(name, module, tensors, names)
    for module, name in places.items():
        left += (f"{name}.{way}".lstrip(".") for way in _left(module, places))
    if left:
        warnings.warn(
            f"{', '.join(left[:3])}{f' and {len(left) - 3} more' * (len(left) > 3)}: in a plain "
            "list or dict, and not stored; a loaded model has there what its constructor makes. "
            "If it belongs to the network: register_buffer, nn.ParameterList or nn.ModuleList",
            stacklevel=2,
        )
    files.save_tensors(path, tensors, {"kind": KIND, "structure": structure})


def _record(
    name: str, module: nn.Module, tensors: dict[str, Tensor], names: dict[int, str]
) -> dict[str, Any]:
    """What the file says of a module; its tensors are added to those to store."""
    kept = {key: plain.pack(value) for key, value in _kept(module) if plain.is_plain(value)}
    record: dict[str, Any] = {"class": kind_of(module), "attributes": kept}
    for kind, slots in KINDS.items():
        record[kind] = dict.fromkeys(slots(module))
        for key, tensor in slots(module).items():
            if tensor is None:
                continue
            where = f"{name}.{key}".lstrip(".")
            if is_lazy(tensor):
                raise ValueError(f"{where} has no shape yet: run the model once, then save it")
            first = names.setdefault(id(tensor), where)
            if first == where:
                tensors[where] = tensor
            record[kind][key] = [first, tensor.requires_grad and kind == "parameters"]
    return record


def _kept(module: nn.Module) -> list[tuple[str, Any]]:
    """The attributes that the module itself has set."""
    return [(key, value) for key, value in vars(module).items() if key not in INTERNAL]


def _left(module: nn.Module, known: Container[Any]) -> Iterator[str]:
    """The first tensor, or layer that the model does not know, in each list or dict."""
    for key, value in _kept(module):
        if key == "_flat_weights" and isinstance(module, nn.RNNBase):
            continue  # torch keeps them in step with the parameters
        found = plain.inside(value, (Tensor, nn.Module))
        for way in islice((key + way for way, one in found if one not in known), 1):
            yield way if len(way) <= LONGEST else f"{way[:LONGEST]}…"


def kind_of(module: nn.Module) -> str:
    """Its class; one that only bears a torch layer's name must never be built as that layer."""
    name = type(module).__name__
    return name if BUILDABLE.get(name, type(module)) is type(module) else f"another {name}"
