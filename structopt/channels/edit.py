"""Build the edited copy: rows of every weight axis, and the sizes that modules remember."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from structopt.channels.groups import Channels, keeper
from structopt.channels.labels import Vector
from structopt.channels.tracing import substitute

Reals = npt.NDArray[np.float64]
Choice = Mapping[int, Vector]  # number of a group -> channels to take


def rows(channel: Vector, index: Vector) -> Vector | None:
    """Which entries of an axis to take so that its channels become those of `index`.

    `channel[i]` is the channel of entry i, or -1. `None` where no layout is sure to be right.

    >>> rows(np.array([0, 0, 1, 1, 2, 2]), np.array([2, 0]))  # two entries a channel
    array([4, 5, 0, 1])
    """
    size = int(channel.max()) + 1
    breaks = np.flatnonzero((np.diff(channel) < 0) | ((channel[:-1] < 0) & (channel[1:] >= 0))) + 1
    pieces = []
    for start, tile in zip(np.r_[0, breaks], np.split(channel, breaks), strict=True):
        if tile[0] < 0:
            pieces.append(start + np.arange(len(tile)))
            continue
        tail = start + np.flatnonzero(tile < 0)
        tile = tile[tile >= 0]
        repeats = len(tile) // size
        if not np.array_equal(tile, np.repeat(np.arange(size), repeats)):
            return _scattered(channel, index)
        pieces += [(start + index[:, None] * repeats + np.arange(repeats)).ravel(), tail]
    return np.concatenate(pieces)


def _scattered(channel: Vector, index: Vector) -> Vector | None:
    """As `rows`, for channels that were shuffled: some may go or swap places, none may double."""
    kept = np.flatnonzero((channel < 0) | np.isin(channel, index))
    ordered = np.sort(index)
    if np.array_equal(ordered, index):
        return kept if len(np.unique(index)) == len(index) else None
    if len(np.unique(index)) < len(index):
        return None
    old = channel[kept]
    order = np.argsort(old, kind="stable")
    places: dict[int, list[int]] = {}
    for place in order:
        places.setdefault(int(old[place]), []).append(int(kept[place]))
    target = {int(o): int(i) for o, i in zip(ordered, index, strict=True)}
    used: dict[int, int] = {}
    result = kept.copy()
    for n, c in enumerate(old):
        if c >= 0:
            rank = used.get(int(c), 0)
            used[int(c)] = rank + 1
            result[n] = places[target[int(c)]][rank]
    return result


class Refused(ValueError):
    """What was asked for cannot be done exactly; the model is as it was."""


def rows_of(channels: Channels, labels: Vector, choice: Choice, what: str = "") -> Vector | None:
    """Which entries of a labelled axis to take; `None` where no chosen group lies on it."""
    touched = {n: c for n, c in channels.along(labels).items() if n in choice}
    if not touched:
        return None
    taken = np.arange(len(labels))
    for number, channel in touched.items():
        made = rows(channel[taken], choice[number])
        if made is None:
            raise Refused(
                f"{what} holds the channels of this group shuffled among others: they can be "
                "removed or permuted there, not doubled"
            )
        taken = taken[made]
    return taken


def build(
    channels: Channels,
    model: nn.Module,
    choice: Choice,
    *,
    preserve: bool = False,
    attributes: bool = True,
    fold: bool = False,
) -> nn.Module:
    """A copy of the model that has only the chosen channels, verified by nobody yet."""
    factors = _folded(channels, choice, preserve, fold)
    names = {id(t): name for name, t in [*model.named_parameters(), *model.named_buffers()]}

    def change(tensor: Tensor) -> Tensor:
        name = names.get(id(tensor), "")
        made = tensor
        for dim in range(tensor.ndim):
            labels = channels.axes.get((name, dim))
            taken = None
            if labels is not None:
                taken = rows_of(channels, labels, choice, f"dimension {dim} of {name}")
            if taken is None or labels is None:
                continue
            made = made.index_select(dim, torch.from_numpy(taken).to(made.device))
            made = _times(made, dim, factors[labels][taken])
            if preserve and channels.reads[labels].any():
                made = _times(made, dim, 1 / _shares(channels, labels, taken, choice))
        return made.clone() if made is tensor else made

    made = substitute(model, change)
    _refresh(channels, made, choice, attributes)
    return made


def _times(tensor: Tensor, dim: int, factors: Reals) -> Tensor:
    """Each index along a dimension times its own number."""
    if (factors == 1).all():
        return tensor
    shape = [-1 if d == dim else 1 for d in range(tensor.ndim)]
    return tensor * torch.from_numpy(factors).to(tensor).reshape(shape)


def _folded(channels: Channels, choice: Choice, preserve: bool, fold: bool) -> Reals:
    """What the rows of each query are multiplied by, so that scores of attention stay the same.

    Python that divides by the root of the width would divide by another number: √(new / old). A
    channel that is doubled in query and key is counted twice in their product: one half.
    """
    book = channels.book
    factors = np.ones(book.labels.size)
    done: set[int] = set()
    for axis, picked in book.scored:
        taken = rows_of(channels, axis, choice)
        if taken is None or not (fold or preserve):
            continue
        root = np.sqrt(len(taken) / len(axis)) if fold else 1.0
        copies = np.bincount(taken, minlength=len(axis))
        for label, count in zip(axis, copies, strict=True):
            rows = book.rows(int(label))
            for number in picked:
                rows = np.intersect1d(rows, book.rows(number))
            for row in {*rows.tolist(), *(b for a in rows for b in channels.biases.get(int(a), ()))}:
                if row not in done:
                    done.add(row)
                    factors[row] = root / (max(count, 1) if preserve else 1)
    return factors


def _shares(channels: Channels, labels: Vector, taken: Vector, choice: Choice) -> Reals:
    """How many copies of its channel each entry of an edited reader stands beside."""
    shares = np.ones(len(taken))
    for number, channel in channels.along(labels).items():
        if number in choice:
            index = choice[number]
            copies = np.bincount(index, minlength=int(channel.max()) + 1)
            mine = channel[taken] >= 0
            shares[mine] *= copies[channel[taken][mine]]
    return shares


def _refresh(channels: Channels, model: nn.Module, choice: Choice, attributes: bool) -> None:
    """Set the sizes that modules remember: torch's own by name, others by their value."""
    modules = dict(model.named_modules())
    sizes: dict[tuple[str, int, str], set[int]] = {}
    for extent in channels.extents:
        taken = rows_of(channels, extent.labels, choice, f"a size in {extent.module}")
        if taken is not None:
            key = (extent.module, extent.size, extent.name)
            sizes.setdefault(key, set()).add(len(taken))
    for (path, old, name), new in sizes.items():
        if len(new) != 1:
            continue
        if name and hasattr(modules[path], name):
            setattr(modules[path], name, _like(getattr(modules[path], name), new.copy().pop()))
        elif not name and attributes:
            _set_by_value(modules, path, old, new.copy().pop())
    for module in modules.values():
        _refresh_torch(module)


def _like(old: object, new: int) -> object:
    return (new,) if isinstance(old, tuple) else new


def _set_by_value(modules: dict[str, nn.Module], path: str, old: int, new: int) -> None:
    """The innermost module around the op that keeps a number equal to the old size."""
    module, keys = keeper(modules, path, old)
    for key in keys:
        setattr(module, key, new)


def _refresh_torch(module: nn.Module) -> None:
    """The attributes of torch's own layers follow from the shapes of their weights."""
    weight = getattr(module, "weight", None)
    values: dict[str, object] = {}
    if isinstance(weight, Tensor):
        shape = tuple(weight.shape)
        if isinstance(module, nn.modules.conv._ConvTransposeNd):
            values = {"in_channels": shape[0], "out_channels": shape[1] * module.groups}
        elif isinstance(module, nn.modules.conv._ConvNd):
            values = {"in_channels": shape[1] * module.groups, "out_channels": shape[0]}
        elif isinstance(module, nn.Linear):
            values = {"in_features": shape[1], "out_features": shape[0]}
        elif isinstance(module, nn.modules.batchnorm._NormBase):
            values = {"num_features": shape[0]}
        elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
            values = {"normalized_shape": shape}
        elif isinstance(module, nn.GroupNorm):
            values = {"num_channels": shape[0]}
        elif isinstance(module, nn.Embedding | nn.EmbeddingBag):
            values = {"num_embeddings": shape[0], "embedding_dim": shape[1]}
        elif isinstance(module, nn.PReLU):
            values = {"num_parameters": shape[0]}
    if isinstance(module, nn.modules.rnn.RNNBase):
        first = module._flat_weights_names[0]
        values = {
            "input_size": getattr(module, first).shape[1],
            "hidden_size": getattr(module, first.replace("ih", "hh")).shape[1],
        }
        module._flat_weights = [getattr(module, n) for n in module._flat_weights_names]
    if isinstance(module, nn.MultiheadAttention):
        width = module.out_proj.weight.shape[0]
        keys = width if module.k_proj_weight is None else module.k_proj_weight.shape[1]
        vals = width if module.v_proj_weight is None else module.v_proj_weight.shape[1]
        heads = max(width // module.head_dim, 1)
        values = {"embed_dim": width, "kdim": keys, "vdim": vals, "num_heads": heads}
    for key, value in values.items():
        if getattr(module, key) != value:
            setattr(module, key, value)
