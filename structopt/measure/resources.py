"""What it takes from the machine: memory and bytes on disk."""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from structopt import devices, files
from structopt.measure.running import dense_parts, tensors_of


def peak_memory(function: Callable[[], Any]) -> int:
    """Bytes that live at once, at the worst moment of `function()`, beyond those that did before.

    Every operator's outputs are followed until their memory is released, on any device; what an
    operator uses inside itself and gives back does not show. Where CUDA works, its allocator's
    own peak (which sees that too) counts if it is larger. Parameters that exist already do not
    count: add `Cost.bytes` for the whole. Python runs slowly under this watch: it is no timing.

    Example:
        >>> x = torch.zeros(250)  # 1000 bytes, there before
        >>> peak_memory(lambda: (x + 1) * 2)
        2000
    """
    live, gpus = _Live(), []
    if torch.cuda.is_available():
        gpus = [torch.device("cuda", k) for k in range(torch.cuda.device_count())]
    before = []
    for gpu in gpus:
        devices.synchronize(gpu)
        torch.cuda.reset_peak_memory_stats(gpu)
        before.append(torch.cuda.memory_allocated(gpu))
    with live:
        result = function()
    grown = [torch.cuda.max_memory_allocated(g) - b for g, b in zip(gpus, before, strict=True)]
    del result  # it was alive to the end, and so it counted
    return max(live.peak, sum(grown))


class _Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the storages that operators make, until each is released."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._meet((args, kwargs or {}), new=False)
        out = func(*args, **(kwargs or {}))
        self._meet(out, new=True)
        return out

    def _meet(self, tree: Any, *, new: bool) -> None:
        for tensor in (part for found in tensors_of(tree) for part in dense_parts(found)):
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in self._known:
                self._known.add(key)
                size = storage.nbytes() if new else 0
                self.now += size
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._release, key, size).atexit = False

    def _release(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def file_bytes(model: nn.Module) -> int:
    """Bytes of the file that holds the model's state: written by `files.save_tensors`, weighed.

    Weights that are tied go into the file once.

    Raises:
        ValueError: a state that is not made of dense tensors only, such as the packed weights of
            quantised modules: write that file by its own means and weigh it.

    Example:
        >>> file_bytes(nn.Linear(100, 10)) - 4 * 1010 < 500  # the header names what is inside
        True
    """
    state: dict[str, Tensor] = {}
    seen: set[Any] = set()
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name!r} is of type {type(tensor).__name__}, not a tensor")
        dense = tensor.layout == torch.strided  # save_tensors refuses what is not
        place = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride()) if dense else name
        if not tensor.numel() or place not in seen:
            seen.add(place)
            state[name] = tensor
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.safetensors"
        files.save_tensors(path, state, {})
        return path.stat().st_size
