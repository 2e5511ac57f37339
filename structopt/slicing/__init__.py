"""Slicing: one network, many sub-networks that share weights or pass information.

A small network that runs at three widths, trained at once by the sandwich rule, and cut out:

>>> import torch
>>> from structopt import descent, networks
>>> from structopt.slicing import Sandwich, Slimmable, sort_channels
>>> from structopt.training import train
>>> images, labels = torch.rand(32, 1, 28, 28), torch.randint(10, (32,))
>>> model = sort_channels(networks.ResNet20(width=4), images[:1])
>>> slimmable = Slimmable(model, images[:1], widths=[0.25, 0.5])
>>> optimizer = descent.fused_adamw(slimmable, lr=0.01)
>>> history = train(
...     slimmable, [(images, labels)], Sandwich(), optimizer, epochs=2, device="cpu"
... )
>>> [sum(p.numel() for p in slimmable.extract(w).parameters()) for w in slimmable.widths]
[1211, 4520, 17462]
>>> slimmable.calibrate_([images]).eval()(images, width=0.25).shape
torch.Size([32, 10])

The same network in groups. The order of channels is found, what was lost is given back in part by
a thin layer beside each, and both are fine-tuned as any other network:

>>> from structopt.slicing import Branches, Mixed, group_layers
>>> for exchange in (Branches(), Mixed(rank=1)):
...     grouped = group_layers(model, images[:1], 2, exchange=exchange)
...     print(exchange, sum(p.numel() for p in grouped.parameters()))
Branches() 9030
Mixed(rank=1) 10638

And with exits: each example leaves where the network is sure enough, and what comes behind runs on
the others alone. The threshold is chosen on data that were held back:

>>> from structopt.slicing import EarlyExits, all_exits, choose_threshold
>>> network = EarlyExits(networks.ResNet20(width=4), images[:1], ["stage1", "stage2"])
>>> optimizer = descent.fused_adamw(network, lr=0.01)
>>> history = train(
...     network, [(images, labels)], all_exits(teaching=0.5), optimizer, epochs=2, device="cpu"
... )
>>> threshold = choose_threshold(network, [(images, labels)], macs=network.macs(images[:1])[1])
>>> network.deciding(threshold.value).eval()(images).shape
torch.Size([32, 10])

For several processes nothing changes: slices are cut inside the module's own forward pass, so that
``train`` under :func:`structopt.distributed.join` averages the gradients of all widths.
"""

from structopt.slicing.assigning import Assignment, assign_groups
from structopt.slicing.attention import FreeAttention, free_attention
from structopt.slicing.cutpoints import CutPoint, cut_points
from structopt.slicing.exits import Answers, Deciding, EarlyExits
from structopt.slicing.grouped import (
    Averaged,
    Averaging,
    Branches,
    GroupedLinear,
    Mixed,
    Mixing,
    Reorder,
    Shuffled,
)
from structopt.slicing.grouping import group_layers
from structopt.slicing.heads import confidence
from structopt.slicing.layers import Layer, measure_layers
from structopt.slicing.leaving import Threshold, all_exits, choose_threshold
from structopt.slicing.messages import pack, unpack
from structopt.slicing.pipelines import pipeline
from structopt.slicing.planning import Plan, choose_cuts, pipeline_cost
from structopt.slicing.rotation import Rotated, rotate, to_rms_norm
from structopt.slicing.sandwich import Sandwich, all_widths
from structopt.slicing.slices import Slice
from structopt.slicing.sorting import sort_channels
from structopt.slicing.splitting import Remote, bottleneck, serve, split_latency
from structopt.slicing.stages import Stages, split_stages
from structopt.slicing.widths import Slimmable

__all__ = [
    "Answers",
    "Assignment",
    "Averaged",
    "Averaging",
    "Branches",
    "CutPoint",
    "Deciding",
    "EarlyExits",
    "FreeAttention",
    "GroupedLinear",
    "Layer",
    "Mixed",
    "Mixing",
    "Plan",
    "Remote",
    "Reorder",
    "Rotated",
    "Sandwich",
    "Shuffled",
    "Slice",
    "Slimmable",
    "Stages",
    "Threshold",
    "all_exits",
    "all_widths",
    "assign_groups",
    "bottleneck",
    "choose_cuts",
    "choose_threshold",
    "confidence",
    "cut_points",
    "free_attention",
    "group_layers",
    "measure_layers",
    "pack",
    "pipeline",
    "pipeline_cost",
    "rotate",
    "serve",
    "sort_channels",
    "split_latency",
    "split_stages",
    "to_rms_norm",
    "unpack",
]
