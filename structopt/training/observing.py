"""What layers read and make while a model runs: hooks that never stay, inputs as columns."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from structopt.measure.running import first_of as first_of  # for rooms that do not see `measure`
from structopt.measure.running import undisturbed


@contextmanager
def observed(model: nn.Module, handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Evaluation mode without gradients inside; afterwards these hooks are gone, come what may.

    Buffers, and the generator of random numbers, are afterwards as before, too.

    >>> import torch
    >>> model, seen = nn.ReLU(), list[tuple[int, ...]]()
    >>> see = model.register_forward_hook(lambda module, given, made: seen.append(made.shape))
    >>> with observed(model, [see]):
    ...     made = model(torch.ones(2, 3))
    >>> made = model(torch.ones(4))
    >>> seen
    [torch.Size([2, 3])]
    """
    encoders = [m for m in model.modules() if isinstance(m, nn.TransformerEncoder)]
    nested = [encoder for encoder in encoders if encoder.use_nested_tensor]
    try:
        for encoder in nested:  # hooks see padded tensors, as other layers do
            encoder.use_nested_tensor = False
        with undisturbed(model, ()):
            yield
    finally:
        for encoder in nested:
            encoder.use_nested_tensor = True
        for handle in handles:
            handle.remove()


def columns(layer: nn.Linear | nn.Conv1d | nn.Conv2d, x: Tensor) -> Tensor:
    """What the rows of a layer's weight multiply, for an input x of the layer: (groups, n, inputs).

    n is the number of weights in a row, in the order of ``weight.flatten(1)``.

    >>> import torch
    >>> layer, x = nn.Conv2d(4, 6, 3, padding=1, groups=2), torch.randn(1, 4, 5, 5)
    >>> found = columns(layer, x)
    >>> made = layer.weight.flatten(1).unflatten(0, (2, 3)) @ found
    >>> torch.allclose(made.reshape(6, 25) + layer.bias[:, None], layer(x)[0].flatten(1), atol=1e-6)
    True
    """
    if isinstance(layer, nn.Linear):
        return x.reshape(-1, layer.in_features).mT[None]
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = F.pad(x, layer._reversed_padding_repeated_twice, mode)
    flat = isinstance(layer, nn.Conv1d)  # a picture of height 1
    x = x if x.ndim == 2 + len(layer.kernel_size) else x[None]  # a batch of one
    x = x.unsqueeze(-2) if flat else x
    size, reach, stride = (
        (1, *pair) if flat else pair for pair in (layer.kernel_size, layer.dilation, layer.stride)
    )
    found = F.unfold(x, size, reach, 0, stride)  # (B, C · places of the kernel, L)
    rows = found.shape[1] // layer.groups  # said: a batch of none leaves nothing to infer it from
    return found.movedim(1, 0).reshape(layer.groups, rows, found.shape[0] * found.shape[2])
