"""Pruning: weights at zero, held by masks; and networks that are really smaller.

>>> import torch
>>> from structopt import pruning
>>> from structopt.networks import LeNet300
>>> model = LeNet300()
>>> masks = pruning.find_masks(pruning.score(model), 0.9)
>>> round(pruning.sparsity_of(masks), 3)
0.9
>>> small = pruning.prune_channels(model, torch.zeros(1, 1, 28, 28), 0.5)
>>> small.fc1
Linear(in_features=784, out_features=150, bias=True)
"""

from structopt.pruning.budgets import Budget, Bytes, MACs, Milliseconds, Parameters
from structopt.pruning.choosing import Choice, Limits, choose_channels
from structopt.pruning.criteria import (
    activation_mean,
    apoz,
    batch_norm_scale,
    fisher,
    geometric_median,
    hessian,
    lamp,
    magnitude,
    random,
    saliency,
    taylor,
    wanda,
)
from structopt.pruning.depth import block_influence, remove_blocks, residual_blocks
from structopt.pruning.diagnosis import diagnose
from structopt.pruning.finding import Masks, find_masks, sparsity_of
from structopt.pruning.gates import (
    add_gates_,
    hard_concrete,
    open_chance,
    remove_gates_,
    with_price,
)
from structopt.pruning.masks import (
    Hold,
    PruneWhileTraining,
    apply_masks_,
    from_torch_,
    hold,
    to_torch_,
)
from structopt.pruning.movement import MovementWhileTraining
from structopt.pruning.patterns import Block, Filters, NOfM, Pattern, Unstructured
from structopt.pruning.ranking import Global, PerLayer, PerRow, Scope
from structopt.pruning.recovery import recover, with_teacher
from structopt.pruning.regrowth import RegrowWhileTraining
from structopt.pruning.removal import prune_channels
from structopt.pruning.reordering import permute_channels, to_semi_structured
from structopt.pruning.schedules import Constant, Gradual, Iterative, OneShot, Schedule
from structopt.pruning.scoring import Criterion, Scores, channel_scores, score, total
from structopt.pruning.second_order import prune_and_update, sparse_gpt
from structopt.pruning.sensitivity import Curves, mask_channels, sensitivity
from structopt.pruning.shrinking import ShrinkChannels
from structopt.pruning.tickets import rewind_
from structopt.training.statistics import recalibrate_

__all__ = [
    "Block",
    "Budget",
    "Bytes",
    "Choice",
    "Constant",
    "Criterion",
    "Curves",
    "Filters",
    "Global",
    "Gradual",
    "Hold",
    "Iterative",
    "Limits",
    "MACs",
    "Masks",
    "Milliseconds",
    "MovementWhileTraining",
    "NOfM",
    "OneShot",
    "Parameters",
    "Pattern",
    "PerLayer",
    "PerRow",
    "PruneWhileTraining",
    "RegrowWhileTraining",
    "Schedule",
    "Scope",
    "Scores",
    "ShrinkChannels",
    "Unstructured",
    "activation_mean",
    "add_gates_",
    "apoz",
    "apply_masks_",
    "batch_norm_scale",
    "block_influence",
    "channel_scores",
    "choose_channels",
    "diagnose",
    "find_masks",
    "fisher",
    "from_torch_",
    "geometric_median",
    "hard_concrete",
    "hessian",
    "hold",
    "lamp",
    "magnitude",
    "mask_channels",
    "open_chance",
    "permute_channels",
    "prune_and_update",
    "prune_channels",
    "random",
    "recalibrate_",
    "recover",
    "remove_blocks",
    "remove_gates_",
    "residual_blocks",
    "rewind_",
    "saliency",
    "score",
    "sensitivity",
    "sparse_gpt",
    "sparsity_of",
    "taylor",
    "to_semi_structured",
    "to_torch_",
    "total",
    "wanda",
    "with_price",
    "with_teacher",
]
