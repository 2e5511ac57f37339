"""The sizes that modules remember: torch's own by name, those of other modules by their value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from structopt.channels.attributes import assign, keeper
from structopt.channels.copying import flatten
from structopt.channels.groups import Channels
from structopt.channels.mirrors import Extent
from structopt.channels.rows import Edit, rows_of
from structopt.channels.walking import Modules, modules_of

DEFORMED = "torchvision.ops.deform_conv"  # a convolution that is none of torch's classes
_SIZED = (  # layers whose attributes follow from their weights
    *(nn.modules.conv._ConvNd, nn.Linear, nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.RMSNorm),
    *(nn.GroupNorm, nn.Embedding, nn.EmbeddingBag, nn.PReLU, nn.Bilinear, nn.modules.rnn.RNNBase),
    *(nn.modules.rnn.RNNCellBase, nn.Transformer, nn.MultiheadAttention),
)


@dataclass(frozen=True)
class Guess:
    """An attribute that equals the size of every dimension listed, of which one kept no name."""

    module: str
    name: str
    what: str  # class and name: one answer serves all modules of a class
    extents: tuple[Extent, ...]


def guesses(channels: Channels, modules: Modules) -> list[Guess]:
    """Attributes that may be sizes, for no better reason than that their value is the same."""
    found: dict[tuple[str, int], list[Extent]] = {}
    for extent in channels.extents:
        found.setdefault((extent.module, extent.size), []).append(extent)
    return [
        Guess(path, name, f"{type(modules[path]).__name__}.{name}", tuple(same))
        for (path, _), same in found.items()
        if not all(extent.name for extent in same)
        for name in keeper(modules[path], same[0], channels.book)
    ]


def refresh(channels: Channels, model: nn.Module, edit: Edit) -> None:
    """Set the sizes that the modules of an edited model remember."""
    modules = modules_of(model)

    def now(extent: Extent) -> int:
        if extent.labels is None:
            return extent.size
        taken = rows_of(channels, extent.labels, edit.choice, f"a size in {extent.module}")
        return extent.size if taken is None else len(taken)

    sizes: dict[tuple[str, str, int], set[int]] = {}
    for e in channels.extents:
        if e.name and now(e) != e.size:
            sizes.setdefault((e.module, e.name, e.place), set()).add(now(e))
    for guess in guesses(channels, modules):
        if edit.guessed is None or guess.what in edit.guessed:
            sizes[guess.module, guess.name, -1] = {now(e) for e in guess.extents}
    for (path, name, place), new in sizes.items():
        if len(new) == 1:  # else nobody knows which of them the attribute is
            assign(modules[path], name, place, new.pop())
    kinds = {kind: issubclass(kind, _SIZED) for kind in set(map(type, modules.values()))}
    for module in reversed(modules.values()):  # a whole asks its parts
        if kinds[type(module)] or type(module).__module__ == DEFORMED:
            _refresh_torch(module)
    flatten(modules.values())


def _refresh_torch(module: Any) -> None:
    """The attributes of torch's own layers follow from the shapes of their weights."""
    weight = getattr(module, "weight", None)
    values: dict[str, object] = {}
    if isinstance(weight, Tensor):
        shape = tuple(weight.shape)
        if isinstance(module, nn.modules.conv._ConvTransposeNd):
            values = {"in_channels": shape[0], "out_channels": shape[1] * module.groups}
        elif isinstance(module, nn.modules.conv._ConvNd) or type(module).__module__ == DEFORMED:
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
        elif isinstance(module, nn.Bilinear):
            values = dict(zip(("out_features", "in1_features", "in2_features"), shape, strict=True))
    if isinstance(module, nn.modules.rnn.RNNCellBase):
        values = {
            "input_size": module.weight_ih.shape[1],
            "hidden_size": module.weight_hh.shape[1],
        }
    if isinstance(module, nn.Transformer):
        layer = next(
            (m for m in module.decoder.modules() if isinstance(m, nn.MultiheadAttention)), None
        )
        if layer is not None:
            values = {"d_model": layer.out_proj.weight.shape[0], "nhead": layer.num_heads}
    if isinstance(module, nn.modules.rnn.RNNBase):
        first = module._flat_weights_names[0]
        values = {
            "input_size": getattr(module, first).shape[1],
            "hidden_size": getattr(module, first.replace("ih", "hh")).shape[1],
        }
        if module.proj_size:
            rows = getattr(module, first.replace("ih", "hr")).shape
            values |= {"proj_size": rows[0], "hidden_size": rows[1]}
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
