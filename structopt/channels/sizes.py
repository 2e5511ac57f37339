"""The sizes that modules remember: torch's own by name, those of other modules by their value."""

from __future__ import annotations

from torch import Tensor, nn

from structopt.channels.attributes import assign, keeper
from structopt.channels.groups import Channels
from structopt.channels.rows import Edit, rows_of


def refresh(channels: Channels, model: nn.Module, edit: Edit) -> None:
    """Set the sizes that the modules of an edited model remember."""
    modules = dict(model.named_modules())
    sizes: dict[tuple[str, int, str, int], set[int]] = {}
    for e in channels.extents:
        if e.labels is None or not (e.name or edit.attributes):
            continue
        taken = rows_of(channels, e.labels, edit.choice, f"a size in {e.module}")
        if taken is not None:
            for name in [e.name] if e.name else keeper(modules[e.module], e, channels.book):
                sizes.setdefault((e.module, e.size, name, e.place), set()).add(len(taken))
    for (path, _, name, place), new in sizes.items():
        if len(new) == 1:
            assign(modules[path], name, place, new.pop())
    for module in modules.values():
        _refresh_torch(module)


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
