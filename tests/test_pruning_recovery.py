"""Recovery: statistics, teachers, the recipe; and the words about what went wrong."""

import copy
from functools import partial

import pytest
import torch
from pruning_networks import batches
from pruning_networks import network as plain_network
from torch import nn
from torch.nn import functional as F

from structopt import descent, networks, pruning, training
from structopt.data import Examples
from structopt.pruning import Limits


def network(device):
    return plain_network(device).insert(3, nn.Dropout(0.5))


def test_recalibration_takes_the_mean_over_batches(device):
    model, data = network(device).double(), batches(device)
    data = [(x.double(), y) for x, y in data]
    nn.init.normal_(model[1].running_mean)
    model[5].eval()
    modes = [m.training for m in model.modules()]
    weights = copy.deepcopy(dict(model.named_parameters()))
    assert pruning.recalibrate_(model, data) is model
    hidden = [model[0](x).detach() for x, _ in data]
    means = torch.stack([h.mean((0, 2, 3)) for h in hidden]).mean(0)
    variances = torch.stack([h.var((0, 2, 3)) for h in hidden]).mean(0)
    torch.testing.assert_close(model[1].running_mean, means)
    torch.testing.assert_close(model[1].running_var, variances)
    assert model[1].momentum == 0.1
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())


def test_recalibration_without_batches_leaves_the_statistics(device):
    model = network(device)
    nn.init.normal_(model[1].running_mean)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="empty"):
        pruning.recalibrate_(model, [])
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert model[1].momentum == 0.1
    plain = nn.Linear(2, 2)
    assert pruning.recalibrate_(plain, []) is plain


def test_the_teacher_s_objective_is_hinton_s(device):
    student, teacher = network(device).eval(), network(device).train()
    inputs, targets = batches(device, 1)[0]
    objective = pruning.with_teacher(teacher, temperature=3.0, weight=0.7)
    found = objective(student, (inputs, targets))
    with torch.no_grad():
        told = F.softmax(teacher.eval()(inputs) / 3, 1)
        log_p = F.log_softmax(student(inputs) / 3, 1)
        soft = 9 * F.kl_div(log_p, told, reduction="batchmean")
        expected = 0.3 * F.cross_entropy(student(inputs), targets) + 0.7 * soft
    torch.testing.assert_close(found.detach(), expected)
    found.backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is not None for p in student.parameters())
    assert not student._forward_hooks
    with pytest.raises(ValueError, match="weight"):
        pruning.with_teacher(teacher, weight=1.5)


def test_recover_is_train_with_calibrated_norms_and_held_masks(device):
    model, data = network(device), batches(device)
    twin = copy.deepcopy(model)
    masks = pruning.find_masks(pruning.score(model), 0.6)
    torch.manual_seed(5)
    pruning.recover(model, data, epochs=2, lr=0.02, masks=masks, device=device)

    pruning.apply_masks_(twin, masks)
    pruning.recalibrate_(twin, data)
    torch.manual_seed(5)
    training.train(
        twin, data, training.supervised(), descent.fused_adamw(twin, 0.02), epochs=2,
        device=device, schedule=descent.one_cycle(), after_step=pruning.hold(masks),
    )  # fmt: skip
    for name, p in model.named_parameters():
        torch.testing.assert_close(p, twin.get_parameter(name))
    assert all(not model.get_parameter(n)[~m].any() for n, m in masks.items())


def test_recover_refuses_what_it_cannot_do(device):
    model = network(device)
    with pytest.raises(ValueError, match="at least 1"):
        pruning.recover(model, batches(device), epochs=0)
    both = {"masks": {}, "after_step": print}
    with pytest.raises(ValueError, match="not both"):
        pruning.recover(model, batches(device), epochs=1, **both)


@pytest.mark.slow
def test_recovery_brings_accuracy_back(device):
    """Prune half the channels of a network that has learned something, and train on."""
    torch.manual_seed(0)
    inputs = torch.randn(512, 1, 6, 6, device=device)
    data = Examples(inputs, (inputs[:, 0, :3].mean((1, 2)) * 6).floor().clamp(-2, 1).long() + 2)
    steps = [(data.inputs[i : i + 64], data.targets[i : i + 64]) for i in range(0, 512, 64)]
    model = network(device)
    model[3].p = 0.0
    pruning.recover(model, steps, epochs=8, device=device)
    dense = training.evaluate(model, data)
    small = pruning.prune_channels(model, inputs[:1], 0.5)
    objective = pruning.with_teacher(copy.deepcopy(model))
    broken = training.evaluate(small, data)
    pruning.recover(small, steps, epochs=8, objective=objective, device=device)
    assert training.evaluate(small, data) > max(broken, dense - 0.05)


def test_diagnosis_names_what_went_wrong(device):
    example = torch.randn(1, 1, 28, 28, device=device)
    dense = networks.StudentNet().to(device).eval()
    words = partial(pruning.diagnose, dense, example=example)
    assert words(copy.deepcopy(dense)) == []

    masks = pruning.find_masks(pruning.score(dense), 0.6)
    masked = pruning.apply_masks_(copy.deepcopy(dense), masks)
    assert any("no speed-up expected" in line for line in words(masked, masks=masks))
    assert any("conv2.0.weight are no longer zero" in line for line in words(dense, masks=masks))

    emptied = copy.deepcopy(dense)
    nn.init.zeros_(emptied.conv2[0].weight)
    assert any("conv2.0 holds zeros only" in line for line in words(emptied))

    limits = Limits(ratios={"conv1.0": 0.9})
    narrow = pruning.prune_channels(dense, example, 0.1, limits=limits)
    assert any("conv1.0 keeps 1 of 8" in line for line in words(narrow))
    odd = pruning.prune_channels(dense, example, 0.3)
    assert any("multiple of 8" in line for line in words(odd))

    resnet = networks.ResNet20(width=4).to(device).eval()
    shallow = pruning.remove_blocks(resnet, example, ["stage1.1"])
    assert "stage1.1 became an identity." in pruning.diagnose(resnet, shallow, example)


def test_diagnosis_finds_statistics_that_no_longer_fit(device):
    model, data = network(device), batches(device, 8)
    pruning.recover(model, data, epochs=6, device=device)
    stale = copy.deepcopy(model)
    stale[1].running_mean += 20
    before = copy.deepcopy(stale.state_dict())
    inputs, targets = (torch.cat(part) for part in zip(*data, strict=True))
    found = pruning.diagnose(model, stale, inputs[:1], Examples(inputs, targets), batches=data)
    assert any("Accuracy was" in line for line in found)
    assert any("recalibrate_(model, batches)" in line for line in found)
    assert all(torch.equal(t, before[n]) for n, t in stale.state_dict().items())
    without = pruning.diagnose(model, stale, inputs[:1], Examples(inputs, targets))
    assert any("Give batches" in line for line in without)
