"""Why accuracy was lost, and what to try: in words."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from structopt import measure
from structopt.losses.checks import need_values
from structopt.pruning.masks import inner, need_mapping
from structopt.training import evaluate
from structopt.training.copying import copied
from structopt.training.statistics import recalibrate_

_CALIBRATION = 20  # batches


def diagnose(
    before: nn.Module,
    after: nn.Module,
    example: Any,
    data: Any = None,
    *,
    batches: Iterable[Any] | None = None,
    masks: Mapping[str, Tensor] | None = None,
) -> list[str]:
    """What pruning did to a network, and what to try next, as sentences.

    Looks for layers that were emptied, hold NaN or are the narrowest for what they were, statistics
    of batch norms that no longer fit (tried on a copy), a mask that came undone, zeros that save
    nothing, odd widths, and blocks that are gone. `data` are labelled examples for the accuracies;
    `batches` are some of the training batches, for the statistics. Neither model is changed. Empty
    where nothing stands out.

    Raises ValueError for masks that are no bool tensors, or of weights that neither model has, and
    for data that :func:`structopt.training.evaluate` refuses.

    >>> import torch
    >>> from structopt.networks import LeNet300
    >>> narrow = LeNet300(widths=(300, 2))
    >>> print(*diagnose(LeNet300(), narrow, torch.zeros(1, 1, 28, 28)), sep="\\n")
    fc2 keeps 2 of 100 channels, far fewer than the other layers: give it more, Limits(ratios={'fc2': 0.5}), or a floor, Limits(floor=0.2).
    """  # noqa: E501
    for model in (before, after):
        need_values("a diagnosis", (*model.parameters(), *model.buffers()))
    words = [
        *_emptied(before, after),
        *_undone(before, after, masks or {}),
        *_narrow(before, after),
        *_gone(before, after),
    ]
    if data is not None:
        data = list(data) if isinstance(data, Iterator) else data  # read twice
        words += _accuracies(before, after, data, batches)
    return [*words, *_savings(before, after, example)]


def _layers(model: nn.Module) -> dict[str, Any]:
    """The layers that make channels."""
    kinds, model = (nn.Linear, nn.modules.conv._ConvNd), inner(model, ())
    return {n: m for n, m in model.named_modules() if isinstance(m, kinds)}


def _widths(model: nn.Module) -> dict[str, int]:
    """How many channels they make; the weight of a transposed convolution has them second."""
    layers = _layers(model).items()
    return {n: m.out_features if isinstance(m, nn.Linear) else m.out_channels for n, m in layers}


def _emptied(before: nn.Module, after: nn.Module) -> list[str]:
    weights = {name: layer.weight for name, layer in _layers(after).items()}
    was = {name for name, layer in _layers(before).items() if not layer.weight.any()}
    words = [
        f"{name} holds zeros only, so that nothing passes it: rank per layer, or with "
        "Global(floor=0.01)."
        for name, weight in weights.items()
        if not weight.any() and name not in was
    ]
    odd = [name for name, weight in weights.items() if not weight.isfinite().all()]
    return words + [f"{n} holds NaN or infinite weights: nothing after it is right." for n in odd]


def _undone(before: nn.Module, after: nn.Module, masks: Mapping[str, Tensor]) -> list[str]:
    need_mapping(masks)
    old, new = (
        dict(inner(m, masks).named_parameters(remove_duplicate=False)) for m in (before, after)
    )
    words = []
    for name, mask in masks.items():
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            raise ValueError(f"the mask of {name} has to be a bool tensor, as find_masks gives")
        if name not in {**old, **new}:
            raise ValueError(f"the masks name {name!r}, which is a weight of neither model")
        weight = new.get(name)
        if weight is not None and weight.shape == mask.shape:
            back = int(weight[~mask.to(weight.device)].count_nonzero())
            if back:
                words.append(
                    f"{back} removed weights of {name} are no longer zero: train with "
                    "after_step=hold(masks)."
                )
    return words


def _narrow(before: nn.Module, after: nn.Module) -> list[str]:
    old, new = _widths(before), _widths(after)
    kept = {n: new[n] / old[n] for n in old if n in new and 0 < new[n] <= old[n]}
    if not kept:
        return []
    usual = sorted(kept.values())[len(kept) // 2]
    words = []
    for name, share in kept.items():
        if share < 0.25 and share < usual / 3:
            half = max(0.0, 1 - usual / 2)
            words.append(
                f"{name} keeps {new[name]} of {old[name]} channels, far fewer than the "
                f"other layers: give it more, Limits(ratios={{{name!r}: {half:.2g}}}), or a floor, "
                "Limits(floor=0.2)."
            )
    return words


def _gone(before: nn.Module, after: nn.Module) -> list[str]:
    before, after = inner(before, ()), inner(after, ())
    was = {name for name, _ in before.named_modules()}
    blocks = [n for n, m in after.named_modules() if isinstance(m, nn.Identity) and n in was]
    real = [n for n in blocks if not isinstance(before.get_submodule(n), nn.Identity)]
    return [f"{', '.join(real)} became an identity."] if real else []


def _accuracies(
    before: nn.Module, after: nn.Module, data: Any, batches: Iterable[Any] | None
) -> list[str]:
    dense, pruned = evaluate(before, data), evaluate(after, data)
    words = [f"Accuracy was {100 * dense:.1f} %, and is {100 * pruned:.1f} %."]
    lost = dense - pruned
    if lost < 0.005:
        return words
    kind = nn.modules.batchnorm._BatchNorm
    norms = [m for m in after.modules() if isinstance(m, kind) and m.running_mean is not None]
    if norms and batches is None:
        words.append("Give batches=..., to see whether the statistics of batch norms still fit.")
    elif norms:
        assert batches is not None
        some = islice(batches, _CALIBRATION)
        fresh = evaluate(recalibrate_(copied(after), some), data)
        gain = fresh - pruned
        if gain > lost / 4:
            words.append(
                f"{100 * gain:.1f} points of that come back with new statistics of batch norms "
                "alone: recalibrate_(model, batches)."
            )
    if lost > 0.3:
        words.append(
            "That is more than one step should take: remove less at once, and train in between."
        )
    else:
        words.append(
            "Train on, recover(model, batches, epochs=...), with a learning rate as high as at "
            "first; with the dense network as teacher where labels are few, "
            "objective=with_teacher(before)."
        )
    return words


def _savings(before: nn.Module, after: nn.Module, example: Any) -> list[str]:
    old, new = measure.cost(before, example), measure.cost(after, example)
    words = []
    was, zero = _zeros(old), _zeros(new)  # biases begin at zero, as do some weights
    if zero - was > 0.05 and new.macs > 0.95 * old.macs:
        words.append(
            f"{100 * zero:.0f} % of the weights are zero but none is gone: no speed-up expected. "
            "Remove channels, prune_channels, or code the zeros in the file."
        )
    wide, widths = _widths(before), _widths(after)
    odd = [n for n, width in widths.items() if 8 < width < wide.get(n, 0) and width % 8]
    if odd:
        words.append(
            f"{len(odd)} layers have a width that is no multiple of 8 ({odd[0]}: "
            f"{widths[odd[0]]}): Limits(multiple_of=8) may be faster."
        )
    return words


def _zeros(cost: measure.Cost) -> float:
    """The share of parameters that are zero."""
    return 0.0 if cost.nonzeros is None else 1 - cost.nonzeros / max(1, cost.parameters)
