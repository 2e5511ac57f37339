"""Recovery: statistics, teachers, the recipe; and the words about what went wrong."""

import copy
from functools import partial
from itertools import pairwise

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


def test_recalibration_of_a_model_in_use_leaves_it_in_use(device):
    """A norm that stayed in training mode would normalise by the batch, and forget the mean."""
    model, data = network(device).eval(), batches(device)
    assert not any(m.training for m in pruning.recalibrate_(model, data).modules())
    x = data[0][0]
    with torch.no_grad():
        torch.testing.assert_close(model(x)[:1], model(x[:1]))


def test_recalibration_that_is_interrupted_leaves_the_statistics(device):
    def interrupted():
        yield from batches(device, 1)
        raise KeyboardInterrupt

    model = network(device)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(KeyboardInterrupt):
        pruning.recalibrate_(model, interrupted())
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_recalibration_without_batches_leaves_the_statistics(device):
    model = network(device)
    nn.init.normal_(model[1].running_mean)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="empty"):
        pruning.recalibrate_(model, [])
    with pytest.raises(ValueError, match="batches are empty"):  # no statistics in place of known
        pruning.recalibrate_(model, [batches(device, 1)[0][0][:0]])
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
    with pytest.raises(ValueError, match=r"in \[0, 1\], not 'a'"):
        pruning.with_teacher(teacher, weight="a")


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


def test_statistics_are_taken_anew_before_the_first_step(device):
    norm = nn.BatchNorm1d(3, affine=False)
    model = nn.Sequential(norm, nn.Linear(3, 2)).to(device)
    x, seen = torch.randn(8, 3, device=device) + 5, []

    def objective(model, batch):
        seen.append(norm.running_mean.clone())
        return model(batch[0]).square().mean()

    pruning.recover(model, [(x, x)], epochs=1, objective=objective)
    torch.testing.assert_close(seen[0], x.mean(0))


def test_recover_refuses_what_it_cannot_do(device):
    model = network(device)
    before = copy.deepcopy(model.state_dict())
    for epochs in (0, 1.5, "3"):
        with pytest.raises(ValueError, match="a whole number, at least 1"):
            pruning.recover(model, batches(device), epochs=epochs)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
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
    (line,) = words(masked, masks=masks)
    assert "60 % of the weights are zero" in line
    assert "no speed-up expected" in line
    gone = int((~masks["conv2.0.weight"]).sum())
    back = f"{gone} removed weights of conv2.0.weight are no longer zero"
    assert any(back in line for line in words(dense, masks=masks))

    emptied = copy.deepcopy(dense)
    nn.init.zeros_(emptied.conv2[0].weight)
    assert any("conv2.0 holds zeros only" in line for line in words(emptied))

    limits = Limits(ratios={"conv1.0": 0.9})
    narrow = pruning.prune_channels(dense, example, 0.1, limits=limits)
    (line,) = (line for line in words(narrow, masks=masks) if "conv1.0" in line)
    assert "conv1.0 keeps 1 of 8" in line  # and masks of other widths say nothing
    assert "Limits(ratios={'conv1.0': 0." in line
    for ratio, sparsity in ((0.7, 0.0), (0.9, 0.8)):  # a quarter is no seventh; others go with it
        limits = Limits(ratios={"conv1.0": ratio})
        less = pruning.prune_channels(dense, example, sparsity, limits=limits)
        assert not any("far fewer" in line for line in words(less))
    odd = pruning.prune_channels(dense, example, 0.3)
    assert any("multiple of 8" in line for line in words(odd))

    resnet = networks.ResNet20(width=4).to(device).eval()
    shallow = pruning.remove_blocks(resnet, example, ["stage1.1"])
    masks = pruning.find_masks(pruning.score(resnet), 0.5)
    found = pruning.diagnose(resnet, shallow, example, masks=masks)
    assert "stage1.1 became an identity." in found
    assert not any("stage1.1.conv1.weight" in line for line in found)
    assert "identity" not in str(pruning.diagnose(shallow, copy.deepcopy(shallow), example))
    longer = nn.Sequential(copy.deepcopy(dense), nn.Identity())
    assert "identity" not in str(words(longer))


def test_diagnosis_finds_statistics_that_no_longer_fit(device):
    model, data = network(device), batches(device, 8)
    pruning.recover(model, data, epochs=6, device=device)
    stale = copy.deepcopy(model)
    stale[1].running_mean += 20
    before = copy.deepcopy(stale.state_dict())
    inputs, targets = (torch.cat(part) for part in zip(*data, strict=True))
    found = pruning.diagnose(model, stale, inputs[:1], Examples(inputs, targets), batches=data)
    assert any("Accuracy was" in line for line in found)
    fresh = pruning.recalibrate_(copy.deepcopy(stale), data)
    gain = training.evaluate(fresh, Examples(inputs, targets)) - training.evaluate(
        stale, Examples(inputs, targets)
    )
    back = f"{100 * gain:.1f} points of that come back"
    assert any(back in line and "recalibrate_(model, batches)" in line for line in found)
    dense = training.evaluate(model, Examples(inputs, targets))
    same = pruning.diagnose(model, model, inputs[:1], Examples(inputs, targets), batches=data)
    assert same == [f"Accuracy was {100 * dense:.1f} %, and is {100 * dense:.1f} %."]
    assert all(torch.equal(t, before[n]) for n, t in stale.state_dict().items())
    without = pruning.diagnose(model, stale, inputs[:1], Examples(inputs, targets))
    assert any("Give batches" in line for line in without)


@pytest.mark.parametrize(
    ("wrong", "advice"), [(1, "Train on, recover"), (2, "remove less at once")]
)
def test_the_advice_depends_on_how_much_was_lost(device, wrong, advice):
    """One or two classes of four are taken for the next."""
    data = Examples(torch.eye(4, device=device).repeat(8, 1), torch.arange(4).repeat(8).to(device))
    before = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4, bias=False)).to(device)
    steps = [(data.inputs, data.targets)]
    nn.init.constant_(before[0].bias, 0.1)
    pruning.recalibrate_(before, steps)
    before[1].weight.data = torch.eye(4, device=device) + 0.01  # none is zero
    after = copy.deepcopy(before)
    after[1].weight.data[:, :wrong] = before[1].weight.data[:, 1 : wrong + 1]
    found = pruning.diagnose(before, after, data.inputs, data, batches=steps)
    assert found[0] == f"Accuracy was 100.0 %, and is {100 - 25 * wrong:.1f} %."
    assert [advice in line for line in found[1:]] == [True]  # no norm is to blame
    without = pruning.diagnose(before[1:], after[1:], data.inputs, data)
    assert "Give batches" not in str(without)  # there is none


@pytest.mark.parametrize(
    ("wrong", "advice"), [(4, ""), (6, "Train on"), (290, "Train on"), (310, "remove less")]
)
def test_half_a_point_is_no_loss_and_three_tenths_are_too_much(wrong, advice):
    """Of a thousand examples so many are taken for the next class."""
    targets = torch.cat([torch.zeros(wrong), torch.ones(1000 - wrong)]).long()
    data = Examples(torch.eye(2)[targets], targets)
    before, after = (nn.Sequential(nn.Linear(2, 2, bias=False)) for _ in range(2))
    before[0].weight.data = torch.eye(2)
    after[0].weight.data = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    found = pruning.diagnose(before, after, data.inputs[:1], data)
    said = [word for word in ("Train on", "remove less") if word in str(found)]
    assert said == ([advice] if advice else [])


def chain(*widths):
    sizes = (4, *widths)
    return nn.Sequential(*[nn.Linear(a, b) for a, b in pairwise(sizes)])


@pytest.mark.parametrize(("width", "said"), [(19, True), (21, False)])
def test_a_layer_is_narrow_where_it_keeps_a_third_of_what_is_usual(width, said):
    before, after = chain(100, 100, 100, 100, 100), chain(width, 32, 60, 88, 88)
    words = str(pruning.diagnose(before, after, torch.ones(1, 4)))
    assert ("0 keeps 19 of 100 channels" in words) == said
    assert ("Limits(ratios={'0': 0.7})" in words) == said  # half of what the median layer keeps


@pytest.mark.parametrize(("zeros", "words"), [(4, ""), (6, "6 %"), (80, "80 %")])
def test_zeros_are_spoken_of_from_a_twentieth_on(zeros, words):
    before = nn.Sequential(nn.Linear(10, 10, bias=False))
    nn.init.ones_(before[0].weight)
    after = copy.deepcopy(before)
    after[0].weight.data.view(-1)[:zeros] = 0
    found = pruning.diagnose(before, after, torch.ones(1, 10))
    assert [line.split(" of the weights")[0] for line in found] == ([words] if words else [])


def test_nine_is_the_least_odd_width():
    for width, said in ((7, False), (8, False), (9, True), (14, True), (18, True), (24, False)):
        words = str(pruning.diagnose(chain(32, 32), chain(width, 32), torch.ones(1, 4)))
        assert ("multiple of 8" in words) == said


def test_sizes_that_are_fine_are_not_spoken_of(device):
    example, dense = torch.randn(1, 1, 28, 28, device=device), networks.LeNet300().to(device)
    round_or_small = networks.LeNet300(widths=(24, 5)).to(device)
    assert "multiple of 8" not in str(pruning.diagnose(dense, round_or_small, example))
    small = pruning.prune_channels(dense, example, 0.5)
    pruning.apply_masks_(small, pruning.find_masks(pruning.score(small), 0.6))
    assert "no speed-up" not in str(pruning.diagnose(dense, small, example))  # there is one
    assert pruning.diagnose(nn.Linear(2, 3), nn.Sequential(nn.Linear(2, 3)), torch.ones(1, 2)) == []
