"""How a model is run while it is measured: as in use, and left exactly as it was."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_flatten, tree_map

Model = Callable[..., Any]
"""A module or any function of tensors."""

Example = Any
"""What the model is called with: a tensor, a tuple of arguments or a dict of keywords."""


def call(model: Model, example: Example) -> Any:
    """Call the model with its example: a tuple gives arguments, a dict gives keywords."""
    if isinstance(example, Mapping):
        return model(**example)
    return model(*example) if isinstance(example, tuple) else model(example)


def tensors_of(tree: Any) -> list[Tensor]:
    """All tensors in nested tuples, lists and dicts, in their order."""
    return [leaf for leaf in tree_flatten(_opened(tree))[0] if isinstance(leaf, Tensor)]


def _opened(example: Example) -> Example:
    """What torch knows how to look into, where a tokeniser hands over a mapping of its own."""
    return dict(example) if isinstance(example, Mapping) else example


def device_of(model: Model, example: Example) -> torch.device:
    """The device of the model's first parameter, buffer, or of the example's first tensor."""
    state = [*model.parameters(), *model.buffers()] if isinstance(model, nn.Module) else []
    found = [*state, *tensors_of(example)]
    return found[0].device if found else torch.device("cpu")


def dense_parts(tensor: Tensor) -> list[Tensor]:
    """What holds the numbers: the tensor itself, or what a sparse or packed one is made of.

    >>> [part.numel() for part in dense_parts(torch.eye(3).to_sparse())]
    [6, 3]
    """
    if tensor.layout == torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    packed: Any = tensor  # as torchao's weights are
    if is_traceable_wrapper_subclass(packed):
        names, _ = packed.__tensor_flatten__()
        return [part for name in names for part in dense_parts(getattr(packed, name))]
    return [tensor]


def batch_of(example: Example, given: int | None = None) -> int:
    """The number given; else the first dimension of the first tensor that has one, else 1.

    >>> batch_of((torch.zeros(5, 3), torch.zeros(2)))
    5
    """
    if given is not None:
        if given < 1:
            raise ValueError(f"batch={given}: an example holds at least one")
        return given
    sizes = [len(tensor) for tensor in tensors_of(example) if tensor.ndim]
    if sizes and sizes[0] == 0:
        raise ValueError("the example is empty: its first tensor has no entries")
    return sizes[0] if sizes else 1


def with_batch(example: Example, size: int) -> Example:
    """The example with `size` entries: its own, repeated as often as needed.

    Tensors whose first dimension is not the batch stay as they are.

    >>> with_batch(torch.tensor([[1], [2]]), 3).tolist()
    [[1], [2], [1]]
    """
    batch = batch_of(example)

    def resize(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == batch:
            return leaf[torch.arange(size, device=leaf.device) % batch]
        return leaf

    return tree_map(resize, _opened(example))


@contextlib.contextmanager
def undisturbed(model: Model, example: Example) -> Iterator[None]:
    """Inference inside the block: eval mode, no gradients.

    After it each module's mode, all buffers, the example's tensors (a first layer may write to its
    input) and the generators of random numbers are as before.
    """
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    modes = [(module, module.training) for module in modules]
    buffers = [
        (module, name, buffer, buffer.detach().clone())
        for module in modules
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    counted = [tensor for tensor in tensors_of(example) if not tensor.is_inference()]
    given = [(tensor, tensor._version, tensor.detach().clone()) for tensor in counted]
    with torch.no_grad(), _same_random_numbers(device_of(model, example)):
        try:
            for module in modules:
                module.training = False
            yield
        finally:
            for module, training in modes:
                module.training = training
            for module, name, buffer, before in buffers:
                module._buffers[name] = buffer
                if not buffer.is_meta and not _same(buffer, before):
                    buffer.copy_(before)
            for tensor, version, before in given:
                if tensor._version != version:
                    tensor.copy_(before)


def _same(one: Tensor, other: Tensor) -> bool:
    parts = zip(dense_parts(one), dense_parts(other), strict=True)
    return all(torch.equal(mine, its) for mine, its in parts)


@contextlib.contextmanager
def _same_random_numbers(device: torch.device) -> Iterator[None]:
    if device.type == "mps":
        state = torch.mps.get_rng_state()
        with torch.random.fork_rng(devices=[]):
            yield
        torch.mps.set_rng_state(state)
    else:
        indices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices=indices):
            yield


@contextlib.contextmanager
def unfused() -> Iterator[None]:
    """No compiled code and no fused encoder layer, each of which hides its operators."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
            # torch's counter follows modules by global hooks; nothing is compiled here.
            warnings.filterwarnings("ignore", ".*when there are global hooks on modules")
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def first_of(given: tuple[Any, ...], named: Mapping[str, Any]) -> Any:
    """The first of what a layer is called with, by place or by keyword."""
    return next(iter((*given, *named.values())))
