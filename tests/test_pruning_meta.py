"""Networks on the meta device: pruned by shape where shapes are enough, else one clear refusal."""

import copy

import pytest
import torch
from torch import nn

from structopt import networks, pruning
from structopt.channels import channel_groups
from structopt.pruning import MACs, Milliseconds


def network():
    layers = [nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 8, 3)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * 16, 4))


X, Y = torch.randn(2, 1, 6, 6), torch.tensor([0, 1])
BATCHES = [(X, Y)]
REAL = network()
SCORES = pruning.score(REAL)
MASKS = pruning.find_masks(SCORES, 0.5)
GROUPS = channel_groups(REAL, X)
BARE = {name: one.to("meta") for name, one in SCORES.items()}
EMPTY = {name: one.to("meta") for name, one in MASKS.items()}


def blocks():
    return networks.ResNet20(width=4).to("meta")


REFUSED = {
    "score": lambda m: pruning.score(m),
    "score on batches": lambda m: pruning.score(m, pruning.saliency, BATCHES),
    "scores at random": lambda m: pruning.score(m, pruning.random),
    "find_masks": lambda m: pruning.find_masks(BARE, 0.5),
    "choose_channels": lambda m: pruning.choose_channels(
        {group: torch.zeros(group.size, device="meta") for group in GROUPS}, 0.5),
    "channel_scores": lambda m: pruning.channel_scores(GROUPS, BARE),
    "masks without values": lambda m: pruning.apply_masks_(copy.deepcopy(REAL), EMPTY),
    "sparsity_of": lambda m: pruning.sparsity_of(EMPTY),
    "while training": lambda m: pruning.PruneWhileTraining(pruning.Constant(0.5))(m, 1),
    "by movement": lambda m: pruning.MovementWhileTraining(pruning.OneShot(0.5, at=1))(m, 1),
    "rewind_": lambda m: pruning.rewind_(copy.deepcopy(REAL), m.state_dict(), MASKS),
    "add_gates_": lambda m: pruning.add_gates_(m),
    "prune_channels": lambda m: pruning.prune_channels(m, X.to("meta"), 0.5),
    "to a time": lambda m: pruning.prune_channels(
        m, X.to("meta"), Milliseconds(share=0.5), scores=SCORES),
    "permute_channels": lambda m: pruning.permute_channels(m, X.to("meta")),
    "shrink": lambda m: pruning.ShrinkChannels(GROUPS, strength=0.1, end=3)(m, 1),
    "count what is shrunk": lambda m: pruning.ShrinkChannels(GROUPS, strength=1, end=3).zeros(m),
    "sensitivity": lambda m: pruning.sensitivity(m, X.to("meta"), lambda _: 0.0),
    "recalibrate_": lambda m: pruning.recalibrate_(m, BATCHES),
    "recover": lambda m: pruning.recover(m, BATCHES, epochs=1),
    "recover without norms": lambda m: pruning.recover(m[4:], BATCHES, epochs=1),
    "diagnose": lambda m: pruning.diagnose(REAL, m, X),
    "prune_and_update": lambda m: pruning.prune_and_update(m, BATCHES, 0.5),
    "sparse_gpt": lambda m: pruning.sparse_gpt(m[5].weight, torch.eye(128), 0.5),
    "the inputs of sparse_gpt": lambda m: pruning.sparse_gpt(
        REAL[5].weight, torch.eye(128, device="meta"), 0.5),
    "residual_blocks": lambda m: pruning.residual_blocks(blocks(), torch.zeros(1, 1, 28, 28)),
    "block_influence": lambda m: pruning.block_influence(blocks(), BATCHES),
    "remove_blocks": lambda m: pruning.remove_blocks(blocks(), X, ["stage1.1"]),
    "with_teacher": lambda m: pruning.with_teacher(m),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_needs_values_says_so(what):
    model = network().to("meta")
    before = copy.deepcopy(REAL.state_dict())
    words = "needs values, and there are none on the meta device: give the model its weights first"
    with pytest.raises(ValueError, match=words):
        REFUSED[what](model)
    assert [*model.state_dict()] == [*before], "the model is as it was"
    assert all(torch.equal(t, before[name]) for name, t in REAL.state_dict().items())


def test_shapes_are_enough_where_scores_and_masks_have_values():
    """A network is pruned on paper: the same widths as with weights, which stay where they are."""
    model, x = network().to("meta"), X.to("meta")
    for target in (0.5, MACs(share=0.5)):
        found = pruning.prune_channels(model, x, target, scores=SCORES)
        real = pruning.prune_channels(REAL, X, target, scores=SCORES)
        assert all(p.is_meta for p in found.parameters())
        assert {n: p.shape for n, p in found.named_parameters()} == {
            n: p.shape for n, p in real.named_parameters()
        }
    pruning.hold(MASKS)(pruning.apply_masks_(model, MASKS), 1)
    moved = pruning.permute_channels(model, x, scores=SCORES, leave=["0"])
    assert {n: p.shape for n, p in moved.named_parameters()} == {
        n: p.shape for n, p in model.named_parameters()
    }
