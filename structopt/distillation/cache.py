"""A teacher's outputs, computed once and looked up by the number of the example."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from structopt import files
from structopt.distillation.teachers import Lesson, Source, as_source
from structopt.distillation.watching import need_names, unwrapped
from structopt.losses.checks import whole

KIND = "structopt.distillation 1"
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")  # of functions, other in each process


class Cached:
    """Outputs of a teacher for N examples; made by :func:`cache_outputs`.

    ``cached.number(examples)`` gives the examples with targets (label, number), by which a batch
    finds its outputs whatever the order of the epoch. They move to the device of the first batch.
    """

    def __init__(
        self, logits: Tensor, features: dict[str, Tensor] | None = None, *, fingerprint: str
    ) -> None:
        self.logits, self.features, self.fingerprint = logits, features or {}, fingerprint

    def number(self, examples: Any) -> Any:
        """These ``data.Examples`` with targets (N, 2): the label and the number, int64.

        Raises ``ValueError`` where they are not the examples of this cache in the same order, or
        their targets are not one label each.
        """
        _need_same(self.fingerprint, fingerprint(examples.inputs), "these examples", "the cache")
        if examples.targets.ndim != 1 or examples.targets.is_floating_point():
            raise ValueError(
                f"numbered targets are (label, number): the targets {examples.targets.dtype} "
                f"{tuple(examples.targets.shape)} are not one whole number for each example"
            )
        numbers = torch.arange(len(examples), device=examples.targets.device)
        # Without class names: they would forbid numbers beyond the last class.
        return replace(examples, targets=torch.stack([examples.targets, numbers], 1), classes=())

    def teach(self, inputs: Any, targets: Any, names: Sequence[str] = ()) -> Lesson:
        """What was kept for the numbers in ``targets[:, 1]``; the labels are ``targets[:, 0]``."""
        pairs = isinstance(targets, Tensor) and targets.ndim == 2 and targets.shape[1] == 2
        if not pairs or targets.dtype not in (torch.int64, torch.int32):  # no soft targets
            raise ValueError(
                "cached outputs are found by number: train on batches of cached.number(examples), "
                "whose targets are pairs (label, number)"
            )
        for name in names:
            if name not in self.features:
                kept = ", ".join(self.features) or "none"
                raise ValueError(
                    f"the cache holds no features of {name!r} (it has: {kept}): "
                    "name the layers in cache_outputs(..., names=...)"
                )
        if self.logits.device != targets.device:
            self.logits = self.logits.to(targets.device)
            self.features = {k: v.to(targets.device) for k, v in self.features.items()}
        numbers = targets[:, 1]
        try:
            logits = self.logits.index_select(0, numbers)
        except IndexError:
            raise ValueError(
                f"number {int(numbers.max())} is beyond the {len(self.logits)} examples of this "
                "cache: train on batches of its own cached.number(examples)"
            ) from None
        features = {name: self.features[name].index_select(0, numbers) for name in names}
        return Lesson(logits, features, targets[:, 0])


def cache_outputs(
    teacher: nn.Module | Sequence[nn.Module] | Source,
    examples: Any,
    path: str | Path | None = None,
    *,
    names: Iterable[str] = (),
    size: int = 512,
) -> Cached:
    """Run the teacher once over ``examples``, without augmentation, and keep what it says.

    Where the file ``path`` exists it is read instead; else it is written, whole or not at all.

    Args:
        teacher: a module, several, or :class:`Teacher`.
        examples: the ``data.Examples`` that it will teach. Each gets one set of outputs: train on
            them unaugmented, or on what leaves the teacher's opinion as it is.
        path: a safetensors file to keep the outputs in; None keeps them in memory alone.
        names: layers whose features are kept too.
        size: examples a forward pass.

    Raises:
        ValueError: a file of other examples, another order, another teacher or without these
            layers; a file that is corrupt; a file for a source of one's own without ``models``;
            what are no examples, a size below 1.

    Example:
        >>> from structopt.data import Examples, batches
        >>> from structopt.distillation import from_logits
        >>> examples = Examples(torch.rand(6, 2), torch.zeros(6).long())
        >>> cached = cache_outputs(nn.Linear(2, 3), examples)
        >>> objective = from_logits(cached)
        >>> for batch in batches(cached.number(examples), 3):
        ...     objective(nn.Linear(2, 3), batch).ndim
        0
        0
    """
    need_names(names)
    source, names = as_source(teacher), tuple(dict.fromkeys(names))
    if not hasattr(examples, "inputs"):
        raise ValueError(f"outputs are kept of data.Examples, not {type(examples).__name__}")
    if not whole(size) >= 1:
        raise ValueError(f"size counts the examples of a forward pass, at least 1: {size!r}")
    if path is not None and not getattr(source, "models", ()):
        raise ValueError(
            f"nothing tells the outputs of this {type(source).__name__} from another's: "
            "leave out the path, or give it its networks as `models`"
        )
    notes = {
        "kind": KIND,
        "examples": fingerprint(examples.inputs),
        "teacher": _identity(source),
        "names": list(names),
    }
    if path is not None and Path(path).expanduser().exists():
        return _read(path, notes, len(examples))
    kept: dict[str, list[Tensor]] = {"logits": [], **{f"features/{n}": [] for n in names}}
    for start in range(0, len(examples), size):
        lesson = source.teach(examples.inputs[start : start + size], None, names)
        kept["logits"].append(lesson.logits)
        for name in names:
            kept[f"features/{name}"].append(lesson.features[name])
    tensors = {name: torch.cat(parts) for name, parts in kept.items()}
    if path is not None:
        files.save_tensors(path, tensors, notes)
    return _cached(tensors, notes["examples"])  # type: ignore[arg-type]


def _cached(tensors: dict[str, Tensor], examples: str) -> Cached:
    cut = len("features/")
    features = {name[cut:]: t for name, t in tensors.items() if name.startswith("features/")}
    return Cached(tensors["logits"], features, fingerprint=examples)


def _read(path: str | Path, notes: dict[str, Any], count: int) -> Cached:
    tensors, found = files.load_tensors(path)
    if found.get("kind") != KIND or "logits" not in tensors:
        raise ValueError(f"{path} holds no outputs of a teacher: name another file")
    _need_same(found.get("examples"), notes["examples"], "these examples", str(path))
    if found.get("teacher") != notes["teacher"]:
        raise ValueError(f"{path} was made by another teacher, or before it was trained: delete it")
    wrong = [name for name, x in tensors.items() if x.ndim < 2 or len(x) != count]
    if wrong or not all(x.is_floating_point() for x in tensors.values()):
        raise ValueError(f"{path} does not hold outputs of {count} examples: delete it")
    missing = [name for name in notes["names"] if f"features/{name}" not in tensors]
    if missing:
        raise ValueError(f"{path} lacks the features of {', '.join(missing)}: delete it")
    return _cached(tensors, notes["examples"])


def _need_same(theirs: Any, ours: str, what: str, where: str) -> None:
    if theirs != ours:
        raise ValueError(
            f"{where} was made from other data, or from another order of it, than {what}: "
            "give the same examples in the same order, or make the cache anew"
        )


def fingerprint(inputs: Tensor) -> str:
    """SHA-256 of the type, shape and bytes of ``inputs``: other data, or another order, differs.

    >>> x = torch.arange(4.0)
    >>> fingerprint(x) == fingerprint(x.clone()), fingerprint(x) == fingerprint(x.flip(0))
    (True, False)
    """
    whole = inputs.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{whole.dtype} {tuple(whole.shape)}".encode())
    digest.update(whole.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _identity(source: Source) -> str:
    digest = hashlib.sha256(str(getattr(source, "autocast", None)).encode())
    for model in getattr(source, "models", ()):
        whole = unwrapped(model)
        for name, module in whole.named_modules():  # a ReLU and a Tanh have the same weights: none
            said = _ADDRESS.sub("", module.extra_repr())  # strides, slopes, the ε of a norm
            digest.update(f"{name} {type(module).__name__} {said}".encode())
        for name, value in whole.state_dict().items():
            kept = fingerprint(value) if isinstance(value, Tensor) else repr(value)
            digest.update(f"{name} {kept}".encode())
    return digest.hexdigest()
