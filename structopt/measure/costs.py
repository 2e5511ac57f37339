"""What a network costs on paper: parameters, non-zeros, bytes and multiply-accumulates."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from structopt.measure.flops import Unknown, family
from structopt.measure.flops import counter as new_counter
from structopt.measure.running import (
    Example,
    Model,
    batch_of,
    call,
    dense_parts,
    undisturbed,
    unfused,
)
from structopt.measure.table import si


@dataclass(frozen=True)
class Cost:
    """What `cost` found. MACs are for one example; bytes are those of parameters and buffers.

    `by_operator` splits the MACs into "convolution", "matmul" (linear layers and recurrent
    networks too) and "attention" (the two products of scaled dot-product attention; its
    projections are matmuls). `uncounted` names operators that may hold arithmetic but for which
    no formula is known: their MACs are missing. `nonzeros` is None on the meta device, and where
    weights are packed (by torchao, say).
    """

    parameters: int
    nonzeros: int | None
    macs: int
    bytes: int
    by_operator: dict[str, int] = field(default_factory=dict)
    uncounted: tuple[str, ...] = ()

    def __str__(self) -> str:
        zeros = ""
        if self.nonzeros is not None and self.nonzeros < self.parameters:
            zeros = f" ({100 * (1 - self.nonzeros / self.parameters):.1f} % zero)"
        parts = ", ".join(f"{name} {si(macs)}" for name, macs in self.by_operator.items())
        text = (
            f"{self.parameters:,} parameters{zeros}, {self.bytes / 1000:,.1f} KB, "
            f"{si(self.macs)} MACs" + (f": {parts}" if parts else "")
        )
        if self.uncounted:
            text += f"; no formula for {', '.join(self.uncounted)}"
        return text


def cost(model: Model, example: Example, *, batch: int | None = None) -> Cost:
    """Parameters, non-zeros, MACs and bytes of a model, from one run in eval mode.

    MACs come from the shapes that really pass: the sum over operators of multiply-accumulates,
    for a convolution C_out · H_out · W_out · C_in / groups · k_h · k_w. Element-wise operators,
    norms and biases count nothing, masked and zero entries count in full. torch's
    `FlopCounterMode` (1 MAC = 2 FLOPs) does the counting; what it leaves out on some devices
    (fused attention, the fused recurrent layers, matrix times vector) is added.

    Shared parameters count once. Non-zeros are those of the weight in use, so a mask held by
    `torch.nn.utils.prune` or by a parametrisation counts. The model is left as it was.

    Args:
        model: a module, or any function (which has no parameters).
        example: a tensor, a tuple of arguments or a dict of keywords.
        batch: how many examples `example` holds, by which MACs are divided. By default the first
            dimension of its first tensor; give 1 for an example without a batch dimension.

    Raises:
        ValueError: an empty example, or a batch below 1.

    Example:
        >>> print(cost(nn.Conv2d(3, 8, 3, bias=False), torch.zeros(2, 3, 6, 6)))
        216 parameters, 0.9 KB, 3.46 K MACs: convolution 3.46 K
    """
    size = batch_of(example, batch)
    counter, unknown = new_counter(), Unknown()
    with undisturbed(model, example):
        with unfused(), unknown, counter:
            unknown.known = set(counter.flop_registry)
            call(model, example)
        nonzeros = count_nonzeros(model)  # computing a weight may draw numbers or move a buffer
    flops: dict[str, int] = defaultdict(int)
    for packet, count in counter.get_flop_counts().get("Global", {}).items():
        flops[family(packet)] += count
    by_operator = {name: round(count / 2 / size) for name, count in flops.items()}
    found = list(model.parameters()) if isinstance(model, nn.Module) else []
    return Cost(
        parameters=sum(parameter.numel() for parameter in found),
        nonzeros=nonzeros,
        macs=sum(by_operator.values()),
        bytes=sum(part.nbytes for tensor in _state(model) for part in dense_parts(tensor)),
        by_operator=by_operator,
        uncounted=tuple(sorted(unknown.names)),
    )


def count_nonzeros(model: Model) -> int | None:
    """Non-zero entries of all weights in use; None where there are no plain values."""
    weights = list(_weights_in_use(model))
    if any(weight.is_meta or dense_parts(weight)[0] is not weight for weight in weights):
        return None
    return sum(int(torch.count_nonzero(weight)) for weight in weights)


def _weights_in_use(model: Model) -> Iterator[Tensor]:
    seen: set[Tensor] = set()
    for module in model.modules() if isinstance(model, nn.Module) else ():
        if parametrize.is_parametrized(module):
            assert isinstance(module.parametrizations, nn.ModuleDict)
            for name, parts in module.parametrizations.items():
                original, used = getattr(parts, "original", None), getattr(module, name).detach()
                if isinstance(original, Tensor) and original.shape == used.shape:
                    seen.add(original)
                    yield used
        buffers = dict(module._buffers.items())  # a script has no `get`
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter not in seen:
                seen.add(parameter)
                mask = buffers.get(name.removesuffix("_orig") + "_mask")
                if mask is None or mask.shape != parameter.shape:  # attention's mask, say
                    yield parameter.detach()
                else:
                    yield parameter.detach() * mask


def _state(model: Model) -> list[Tensor]:
    if not isinstance(model, nn.Module):
        return []
    return [*model.parameters(), *model.buffers()]
