"""Half of every layer of a network by Torch-Pruning, held against the same reference.

Twice: as its README does, with nothing but the output layers named; and as its examples do, with
the heads of attention, the layers that they leave out and the attributes that they set afterwards.
The better of the two counts.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from zoo.networks import Entry, randomise
from zoo.reference import Lost, call, tensors, verdict

QKV = ("qkv", "qkv_proj", "c_attn")
APART = (
    ("query", "key", "value"),
    ("query_proj", "key_proj", "value_proj"),
    ("q_proj", "k_proj", "v_proj"),
    ("q_lin", "k_lin", "v_lin"),
    ("q", "k", "v"),
)
HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head")
# What its own example for torchvision leaves out, beside the last layers.
LEFT_OUT = {
    "SSD": "head",
    "RAFT": "corr_block update_block mask_predictor",
    "FasterRCNN": "rpn.head.cls_logits rpn.head.bbox_pred backbone.fpn roi_heads",
    "FCOS": "head.classification_head.cls_logits head.regression_head.bbox_reg "
    "head.regression_head.bbox_ctrness",
    "KeypointRCNN": "rpn.head.cls_logits rpn.head.bbox_pred backbone.fpn.layer_blocks "
    "roi_heads.box_head roi_heads.box_predictor roi_heads.keypoint_predictor",
    "MaskRCNN": "rpn.head.cls_logits rpn.head.bbox_pred roi_heads.box_predictor "
    "roi_heads.mask_predictor",
    "RetinaNet": "head.classification_head.cls_logits head.regression_head.bbox_reg",
}


def output_layers(model: nn.Module, example: Any) -> list[nn.Module]:
    """The layers whose weights are the first that are met on the way back from the outputs."""
    owners: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(module)
    todo = [t.grad_fn for t in tensors(call(model, example)) if t.grad_fn is not None]
    seen, found = set(todo), list[nn.Module]()
    while todo:
        below = [node for node, _ in todo.pop().next_functions if node is not None]
        met = [p for node in below for p in _parameter(node) if p.ndim > 1]
        found += [module for p in met for module in owners.get(id(p), [])]
        if not met:
            new = [node for node in below if node not in seen]
            seen.update(new)
            todo += new
    return found


def _parameter(node: Any) -> Iterator[Tensor]:
    """The parameter that is handed to an op, be it transposed."""
    for _ in range(4):
        if hasattr(node, "variable"):
            yield node.variable
            return
        inputs = [n for n, _ in node.next_functions if n is not None]
        if len(inputs) != 1:
            return
        node = inputs[0]


def heads_of(model: nn.Module) -> dict[nn.Module, int]:
    """`num_heads` as its examples fill it: for each layer that makes queries, keys or values."""
    found: dict[nn.Module, int] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        count = next((v for k in HEADS if isinstance(v := getattr(module, k, None), int)), None)
        count = count or getattr(config, "num_attention_heads", None)
        if not isinstance(count, int):
            continue
        if isinstance(module, nn.MultiheadAttention):
            found[module] = count
        for name in QKV:
            if isinstance(getattr(module, name, None), nn.Linear):
                found[getattr(module, name)] = count
        for names in APART:
            layers = [getattr(module, name, None) for name in names]
            if all(isinstance(layer, nn.Linear) for layer in layers):
                shared = getattr(config, "num_key_value_heads", None) or count
                found |= dict(zip(layers, (count, shared, shared), strict=True))
    return found


def set_attributes(model: nn.Module, heads: dict[nn.Module, int]) -> None:
    """What its examples set by hand after pruning."""
    for module in model.modules():
        layer, parts = None, 1
        for name in QKV:
            if getattr(module, name, None) in heads:
                layer, parts = getattr(module, name), 3
        for names in APART:
            if getattr(module, names[0], None) in heads:
                layer, parts = getattr(module, names[0]), 1
        if layer is not None:
            width = layer.out_features // parts
            new = dict.fromkeys(HEADS, heads[layer])
            new |= dict.fromkeys(("head_dim", "attention_head_size"), width // heads[layer])
            new |= dict.fromkeys(("all_head_size", "inner_dim", "attn_dim"), width)
            for name, value in new.items():
                if isinstance(getattr(module, name, None), int):
                    with contextlib.suppress(AttributeError):  # a property
                        setattr(module, name, value)
            key = getattr(module, "k_proj", None)
            if hasattr(module, "num_key_value_groups") and key in heads:
                module.num_key_value_groups = heads[layer] // heads[key]
        if type(module).__name__ == "VisionTransformer" and hasattr(module, "conv_proj"):
            module.hidden_dim = module.conv_proj.out_channels


def pruner_of(model: nn.Module, example: Any, configured: bool) -> Any:
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    ignored, options = output_layers(model, example), dict[str, Any]()
    heads: dict[nn.Module, int] = {}
    if configured:
        ignored += [model.get_submodule(n) for n in LEFT_OUT.get(type(model).__name__, "").split()]
        heads = heads_of(model)
        if any(getattr(m, names[0], None) in heads for m in model.modules() for names in APART):
            options = {"prune_num_heads": True, "prune_head_dims": False, "head_pruning_ratio": 0.5}
        groups = {m.gate_up_proj: 2 for m in model.modules() if hasattr(m, "gate_up_proj")}
        options["out_channel_groups"] = groups
        if type(model).__name__ == "VisionTransformer" and hasattr(model, "conv_proj"):
            options["round_to"] = model.encoder.layers[0].num_heads
    return tp.pruner.BasePruner(
        model,
        example,
        importance=tp.importance.RandomImportance(),
        pruning_ratio=0.5,
        ignored_layers=ignored,
        forward_fn=call,
        output_transform=lambda out: [t for t in tensors(out) if t.grad_fn is not None],
        num_heads=heads,
        in_channel_groups={},
        **{"out_channel_groups": {}} | options,  # its defaults are shared between pruners
    )


def halved(model: nn.Module, example: Any, configured: bool) -> Lost:
    """Prune in place, in double precision from then on; say which entries are gone.

    Before the cut each weight is replaced by the numbers of its entries, so that what is left
    tells what was kept, whatever the library did.
    """
    pruner = pruner_of(model, example, configured)
    values = {name: tensor.data for name, tensor in floating(model)}
    for _, tensor in floating(model):
        exact = torch.float32 if tensor.numel() < 2**24 else torch.float64
        tensor.data = torch.arange(tensor.numel(), dtype=exact).reshape(tensor.shape)
    pruner.step()
    if configured:
        set_attributes(model, pruner.num_heads)
    lost: dict[str, Tensor] = {}
    for name, tensor, kept in [(*both, both[1].data.long()) for both in floating(model)]:
        old = values.pop(name)
        tensor.data = old.flatten()[kept].double()
        gone = torch.ones(old.numel(), dtype=torch.bool)
        gone[kept.flatten()] = False
        if gone.any():
            lost[name] = gone.reshape(old.shape)
    return lost


def floating(model: nn.Module) -> list[tuple[str, Tensor]]:
    """By every name that it has: pruning may leave two weights of one that layers shared."""
    both = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
    return [(name, tensor) for name, tensor in both if tensor.is_floating_point()]


def untied(model: nn.Module) -> nn.Module:
    """With a weight of its own in each layer, so that each can lose what pruning took from it."""
    for name, weight in list(model.named_parameters(remove_duplicate=False)):
        owner, _, last = name.rpartition(".")
        setattr(model.get_submodule(owner), last, nn.Parameter(weight.data.clone()))
    return model


def attempt(entry: Entry, configured: bool) -> dict[str, Any]:
    build, example = entry
    torch.manual_seed(0)
    model = randomise(build()).eval()
    total = sum(p.numel() for p in model.parameters())
    start = time.process_time()
    try:
        gone = halved(model, example, configured)
        row = {"seconds": round(time.process_time() - start, 2), "parameters": total}
        row["left"] = round(sum(p.numel() for p in model.parameters()) / total, 3)
        if not gone:
            return {"outcome": "nothing", **row}
        torch.manual_seed(0)
        full = untied(randomise(build()).eval().double())
        outcome, error = verdict(full, model.double(), gone, example)
    except Exception as problem:
        text = str(problem).strip().splitlines() or [""]
        return {"outcome": "fails", "why": f"{type(problem).__name__}: {text[0][:200]}"}
    return {"outcome": outcome, "error": float(f"{error:.1e}"), **row}


def measure(entry: Entry) -> dict[str, Any]:
    plain = attempt(entry, configured=False)
    if plain["outcome"] in ("exact", "norms"):
        return {"configured": False, **plain}
    helped = attempt(entry, configured=True)
    if helped["outcome"] in ("exact", "norms"):
        return {"configured": True, **helped}
    then = {key: helped[key] for key in ("outcome", "why", "error") if key in helped}
    return {"configured": False, **plain, "when configured": then}
