"""An edit draws no random numbers: what a reader trains next is the same with it or without."""

import pytest
import torch
from torch import nn

from structopt import channels, compression, measure, networks, pruning, slicing
from structopt.compression import SVD, Depthwise, Grid, PerAxis, Spatial, Tucker

IMAGE = torch.randn(2, 1, 28, 28)


def convolutional():
    convs = nn.Conv2d(4, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1)
    head = nn.Flatten(), nn.Linear(8 * 22 * 22, 6), nn.ReLU(), nn.Linear(6, 4)
    first = nn.Conv2d(1, 4, 5), nn.Identity()
    return nn.Sequential(*first, *convs, *head).eval()


def factorized(form):
    return lambda m: compression.factorize(m, {"2": 2}, form=form)


EDITS = {
    **{form.__name__: factorized(form()) for form in (SVD, Spatial, Depthwise, Tucker)},
    "linear": lambda m: compression.factorize(m, {"7": 2}),
    "fold": lambda m: compression.fold_batch_norms(m, IMAGE),
    "merge": lambda m: compression.merge_layers(m, IMAGE),
    "removable": lambda m: compression.removable(m, IMAGE),
    "branches": lambda m: compression.merge_branches([m[5], nn.Identity(), nn.BatchNorm2d(8)]),
    "equalize": lambda m: compression.equalize(m, IMAGE),
    "smooth": lambda m: compression.smooth_inputs(m, [IMAGE]),
    "clip": lambda m: compression.clip_activations(m, [IMAGE], Grid(4, symmetric=False)),
    "gptq": lambda m: compression.gptq_weights(m, [IMAGE], Grid(4, per=PerAxis(0))),
    "vectors": lambda m: compression.share_weight_vectors(m, 4, 2, names=["5.weight"]),
    "prepared": lambda m: compression.prepare_qat(m, Grid(4), inputs=Grid(4), batches=[IMAGE]),
    "take": lambda m: channels.take(m, {channels.channel_groups(m, IMAGE)["2"]: [0, 2]}),
    "prune": lambda m: pruning.prune_channels(m, IMAGE, 0.25),
    "blocks": lambda m: pruning.residual_blocks(networks_resnet, IMAGE),
    "groups": lambda m: slicing.group_layers(m, IMAGE, 2, layers=["5"]),
    "mixed": lambda m: slicing.group_layers(m, IMAGE, 2, layers=["5"], exchange=slicing.Mixed(2)),
    "stages": lambda m: slicing.split_stages(m, IMAGE, ["4"]),
    "slices": lambda m: slicing.Slimmable(m, IMAGE, [0.5]),
    "attention": lambda m: slicing.free_attention(nn_encoder),
    "norms": lambda m: slicing.to_rms_norm(nn_transformer, IMAGE),
    "cost": lambda m: measure.cost(m, IMAGE),
    "latency": lambda m: measure.latency(m, IMAGE, rounds=1),
    "convert": lambda m: compression.Float(torch.bfloat16).build(m, IMAGE),
}
networks_resnet = networks.ResNet20(width=4)
nn_encoder = nn.TransformerEncoderLayer(8, 2, 12)
nn_transformer = networks.TinyTransformer(dim=8)


@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_leaves_the_generator_as_it_was(edit):
    model = convolutional()
    before = torch.get_rng_state()
    EDITS[edit](model)
    assert torch.equal(torch.get_rng_state(), before)


def test_branches_keep_the_mode_that_they_are_in():
    branch = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2))
    compression.merge_branches([branch, nn.Conv2d(2, 2, 1)])
    assert all(module.training for module in branch.modules())
