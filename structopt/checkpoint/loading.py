"""A fresh model made the network that a file describes, or nothing changed."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from structopt import files
from structopt.checkpoint import plain
from structopt.checkpoint.saving import BUILDABLE, INTERNAL, KIND, KINDS, kind_of
from structopt.training.hooked import hooked, in_place_of


def load(path: str | Path, into: nn.Module) -> nn.Module:
    """Make ``into``, a fresh model of the original class, the network that was saved; return it.

    Changed in place, to the bit: tensors, sizes, ties, ``requires_grad``. Each tensor goes to the
    device of the one it replaces (from ``meta`` to the CPU); the training mode stays. Hooks on a
    layer that another replaces go to that one; a warning names those for which there is none.

    Raises ``ValueError`` naming every mismatch (a module that one of the two lacks, a class that
    cannot be built from plain numbers, a tensor of other dimensions), and for files that are
    truncated, corrupt or hostile. The model is then as it was.
    """
    if not isinstance(into, nn.Module):  # its class, say: the file is not to blame
        raise ValueError(f"into={into!r} is no model: give a fresh one, such as Net()")
    tensors, notes = files.load_tensors(path)
    if notes.get("kind") != KIND:
        raise ValueError(f"{path} is not a network that checkpoint.save wrote ({KIND})")
    try:
        plan = _Plan(notes["structure"], tensors, into)
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{path} describes no network: {error!r}") from error
    if plan.problems:
        shown = "; ".join(plan.problems[:5])
        more = f"; and {len(plan.problems) - 5} more" if len(plan.problems) > 5 else ""
        raise ValueError(
            f"{path} does not fit this {type(into).__name__}: {shown}{more}. Load it into a fresh "
            "model of the class that it was made from"
        )
    if lost := plan.lost():
        warnings.warn(
            f"hooks on {', '.join(lost)} are left out, as the file has no layer of its own there: "
            "register them anew",
            stacklevel=2,
        )
    plan.apply()
    return into


class _Plan:
    """What loading would change, and every reason why it cannot; nothing is touched before."""

    def __init__(self, structure: dict[str, Any], tensors: dict[str, Tensor], into: nn.Module):
        self.into, self.tensors, self.problems = into, tensors, list[str]()
        self.modules: dict[str, nn.Module] = dict(into.named_modules())
        self.replaced: dict[str, nn.Module] = {}  # name -> the layer that is built for it
        self.twins: set[str] = set()  # layers that stand again in one that is built
        self.twin_names: set[str] = set()  # where they do
        self.attributes: list[tuple[nn.Module, str, Any]] = []
        self.slots: list[tuple[nn.Module, str, str, Any]] = []
        devices = {t.device for t in (*into.parameters(), *into.buffers())} - {torch.device("meta")}
        self.device = devices.pop() if len(devices) == 1 else torch.device("cpu")
        for name, record in structure.items():
            self._module(name, record)
        for name, module in self.modules.items():
            if "class" not in structure.get(name, {}) and not self._is_replaced(name):
                self.problems.append(f"the file has no {name} ({type(module).__name__})")

    def _is_replaced(self, name: str) -> bool:
        """Whether a layer above ``name`` is built anew."""
        return any(above in self.replaced for above in _above(name))

    def _module(self, name: str, record: dict[str, Any]) -> None:
        below, (above, _, key) = self._is_replaced(name), name.rpartition(".")
        module = None if below else self.modules.get(name)
        kind = str(record.get("class", "a twin"))
        # Not a method's name, say; and a layer is complete before it stands elsewhere again.
        free = (key.isidentifier() or key.isdigit()) and not hasattr(self.replaced.get(above), key)
        free = free and not self.twins.intersection(_above(name))
        if "same" in record and not below:
            return  # here the model itself says which of its modules are one
        if module is None and not below:
            self.problems.append(f"this model has no {name} ({kind})")
        elif module is not None and kind_of(module) == kind:
            self._attributes(name, module, record)
            self._tensors(name, module, record)
        elif free and "same" in record and record["same"] not in ("", *_above(name)):
            first = record["same"]
            self.replaced[name] = (self.replaced if first in self.replaced else self.modules)[first]
            self.twins.add(first)
            self.twin_names.add(name)
        elif free and kind in BUILDABLE:
            mode = (self.replaced[above] if below else self.modules[name]).training
            self.replaced[name] = self._built(name, record).train(mode)
            self._tensors(name, self.replaced[name], record)
        else:
            here = kind_of(module) if module is not None else "nothing"
            self.problems.append(f"{name or 'the model'} is {kind} there, {here} here")

    def _built(self, name: str, record: dict[str, Any]) -> nn.Module:
        """A torch layer from its plain attributes: no constructor has to guess its arguments."""
        layer = BUILDABLE[record["class"]]
        module = layer.__new__(layer)
        nn.Module.__init__(module)
        for key, value in record["attributes"].items():
            if key in INTERNAL or hasattr(layer, key):
                self.problems.append(f"{name}.{key} is no attribute of {layer.__name__}")
            vars(module)[key] = plain.unpack(value)
        for key in record["parameters"]:
            module.register_parameter(key, None)
        for key in record["buffers"]:
            module.register_buffer(key, None)
        return module

    def _attributes(self, name: str, module: nn.Module, record: dict[str, Any]) -> None:
        for key, packed in record["attributes"].items():
            # An attribute that the class does not set (a size noted in forward) is not its state.
            if key in vars(module) and key not in INTERNAL and plain.is_plain(vars(module)[key]):
                self.attributes.append((module, key, plain.unpack(packed)))

    def _tensors(self, name: str, module: nn.Module, record: dict[str, Any]) -> None:
        for kind, slots in KINDS.items():
            own = slots(module)
            for key in own.keys() ^ record[kind].keys():
                where, side = f"{name}.{key}".lstrip("."), "file" if key in own else "model"
                self.problems.append(f"the {side} has no {where} among its {kind}")
            for key, value in record[kind].items():
                self.slots.append((module, kind, key, value))
                if value is None:
                    continue
                tensor, old = self.tensors[value[0]], own.get(key)
                where = f"{name}.{key}".lstrip(".")
                if old is not None and old.ndim != tensor.ndim:
                    shapes = f"{tuple(tensor.shape)} there, {tuple(old.shape)} here"
                    self.problems.append(f"{where} has shape {shapes}")
                if value[1] and not (tensor.is_floating_point() or tensor.is_complex()):
                    self.problems.append(f"{where} is {tensor.dtype}, which has no gradient")

    def lost(self) -> list[str]:
        """Layers with hooks that none takes the place of: below one built anew, or made a twin."""
        found = []
        for name, module in self.modules.items():
            built = name in self.replaced and name not in self.twin_names
            if not built and (name in self.replaced or self._is_replaced(name)) and hooked(module):
                found.append(name)
        return found

    def apply(self) -> None:
        for name, layer in self.replaced.items():
            if name in self.modules and name not in self.twin_names:
                mode = layer.training  # which was that of the layer above, if that is built too
                in_place_of(self.modules[name], layer, name, level=4).train(mode)
            self._put(name, layer)
        for module, key, value in self.attributes:
            setattr(module, key, value)
        placed: dict[tuple[str, str, torch.device], Tensor] = {}
        for module, kind, key, value in self.slots:
            if value is None:
                setattr(module, key, None)
                continue
            old = KINDS[kind](module).get(key)
            device = self.device if old is None or old.is_meta else old.device
            place = (value[0], kind, device)
            if place not in placed:  # names that are tied get one object
                tensor = self.tensors[value[0]].to(device)
                parameter = kind == "parameters"
                placed[place] = nn.Parameter(tensor, bool(value[1])) if parameter else tensor
            setattr(module, key, placed[place])
        for module in self.into.modules():
            if isinstance(module, nn.RNNBase):
                module.flatten_parameters()

    def _put(self, name: str, layer: nn.Module) -> None:
        parent, _, key = name.rpartition(".")
        if self._is_replaced(name):
            self.into.get_submodule(parent).add_module(key, layer)
            return
        old = self.modules[name]
        for module in list(self.into.modules()):  # wherever the old one stands
            for child in [k for k, v in module._modules.items() if v is old]:
                module._modules[child] = layer


def _above(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]
