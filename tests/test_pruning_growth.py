"""Lottery tickets, and connections that move while training."""

import copy
import math

import pytest
import torch
from pruning_networks import batches, fit, network
from torch.nn import functional as F

from structopt import pruning
from structopt.pruning import RegrowWhileTraining


def random_masks(model, sparsity):
    return pruning.find_masks(pruning.score(model, pruning.random), sparsity)


def test_a_rewound_ticket_trains_as_the_masked_start_would_have(device):
    """Whatever was trained in between leaves no trace but the masks."""
    model, data = network(device), batches(device)
    start = copy.deepcopy(model.state_dict())
    fit(model, data, epochs=2)
    masks = pruning.find_masks(pruning.score(model), 0.7)
    assert pruning.rewind_(model, start, masks) is model
    for name, tensor in model.state_dict().items():
        expected = start[name] * masks[name] if name in masks else start[name]
        assert torch.equal(tensor, expected)

    twin = network(device)  # by hand: momentum on gradients that are masked
    twin.load_state_dict(start)
    weights = dict(twin.named_parameters())
    speed = {name: torch.zeros_like(p) for name, p in weights.items()}
    with torch.no_grad():
        for name, mask in masks.items():
            weights[name] *= mask
    for inputs, targets in data:
        slopes = torch.autograd.grad(F.cross_entropy(twin(inputs), targets), weights.values())
        with torch.no_grad():
            for (name, p), slope in zip(weights.items(), slopes, strict=True):
                speed[name] = 0.9 * speed[name] + slope * masks.get(name, 1)
                p -= 0.1 * speed[name]
    fit(model, data, after_step=pruning.hold(masks))
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, twin.state_dict()[name], rtol=1e-4, atol=1e-5)


def test_rewinding_takes_buffers_without_a_number(device):
    model = network(device)
    model.register_buffer("nothing", torch.zeros(0, device=device))
    start = copy.deepcopy(model.state_dict())
    fit(model, batches(device, 1))
    pruning.rewind_(model, start, {})
    assert all(torch.equal(t, start[n]) for n, t in model.state_dict().items())


def test_rewinding_refuses_what_is_no_earlier_state(device):
    model = network(device)
    masks, start = random_masks(model, 0.5), copy.deepcopy(model.state_dict())
    fit(model, batches(device, 1))
    before = copy.deepcopy(model.state_dict())
    narrow = {**start, "4.weight": start["4.weight"][:2]}
    for bad, kept, words in (
        (model.state_dict(), masks, r"0\.weight of `start` is the model's own tensor"),
        ({}, masks, r"0\.bias is only in the model"),
        ({**start, "extra": start["0.bias"]}, masks, "extra is only in `start`"),
        (narrow, masks, r"4\.weight has shape \(2, 96\) in `start`, and \(4, 96\)"),
        (start, {"9.weight": masks["4.weight"]}, r"name '9\.weight'"),
    ):
        with pytest.raises(ValueError, match=words):
            pruning.rewind_(model, bad, kept)
        assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def regrown(weight, slope, mask, count):
    """The masks of one step of RigL, one weight after the other."""
    active = [i for i, on in enumerate(mask) if on]
    stays = sorted(active, key=lambda i: abs(weight[i]))[count:]
    free = [i for i in range(len(mask)) if i not in stays]
    grown = sorted(free, key=lambda i: -abs(slope[i]))[:count]
    return [i in stays or i in grown for i in range(len(mask))]


@pytest.mark.parametrize("step", [10, 20, 90])
def test_regrowing_is_the_algorithm_of_the_paper(device, step):
    model = network(device)
    masks = random_masks(model, 0.6)
    after = RegrowWhileTraining(masks, end=100, every=10, fraction=0.5)
    after(model)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    before = copy.deepcopy(model)
    after(model, step)
    share = 0.25 * (1 + math.cos(math.pi * step / 100))
    for name, mask in masks.items():
        old = before.get_parameter(name).detach().flatten().tolist()
        slope = model.get_parameter(name).grad.flatten().tolist()
        kept = mask.flatten().tolist()
        expected = regrown(old, slope, kept, int(share * sum(kept)))
        assert after.masks[name].flatten().tolist() == expected
        found = model.get_parameter(name)
        assert not found[~after.masks[name]].any()
        assert not found[after.masks[name] & ~mask].any()  # what grows begins at zero
        stays = after.masks[name] & mask
        assert torch.equal(found[stays], before.get_parameter(name)[stays])


def test_as_many_weights_stay_active_and_training_uses_those_that_grew(device):
    model, seen = network(device), []
    after = RegrowWhileTraining(random_masks(model, 0.8), end=9, every=2, fraction=0.5)
    first = dict(after.masks)

    def note(model, step):
        after(model, step)
        seen.append(dict(after.masks))
        assert all(not model.get_parameter(n)[~m].any() for n, m in after.masks.items())

    fit(model, batches(device), epochs=3, after_step=note)
    for masks in seen:
        assert [int(m.sum()) for m in masks.values()] == [int(m.sum()) for m in first.values()]
    changes = [
        any(not torch.equal(masks[n], earlier[n]) for n in masks)
        for earlier, masks in zip([first, *seen], seen, strict=False)
    ]
    assert [i + 1 for i, changed in enumerate(changes) if changed] == [2, 4, 6, 8]
    grown = {n: after.masks[n] & ~mask for n, mask in first.items()}
    assert all(model.get_parameter(n)[m].all() for n, m in grown.items())


def test_regrowing_goes_on_after_a_break(device, tmp_path):
    def run(epochs, path=None):
        torch.manual_seed(1)
        model = network(device)
        after = RegrowWhileTraining(random_masks(model, 0.8), end=20, every=2, fraction=0.5)
        torch.manual_seed(2)
        return fit(model, batches(device), epochs, after_step=after, checkpoint=path), after

    whole, masks = run(4)
    run(2, tmp_path / "run")
    resumed, again = run(4, tmp_path / "run")
    for name, p in whole.named_parameters():
        assert torch.equal(p, resumed.get_parameter(name)), name
    assert all(torch.equal(m, again.masks[n]) for n, m in masks.masks.items())
    twin = copy.deepcopy(again)
    assert (twin.end, twin.every, twin.fraction) == (20, 2, 0.5)


def test_loaded_masks_say_how_many_weights_move(device):
    model = network(device)
    before = copy.deepcopy(model.state_dict())
    few, many = random_masks(model, 0.9), random_masks(model, 0.5)
    loaded, fresh = (RegrowWhileTraining(m, end=100, every=10) for m in (few, many))
    loaded.load_state_dict(fresh.state_dict())
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    for after in (fresh, loaded):
        model.load_state_dict(before)
        after(model, 10)
    assert all(torch.equal(m, loaded.masks[n]) for n, m in fresh.masks.items())
    assert any((m & ~many[n]).any() for n, m in fresh.masks.items())


def test_regrowing_refuses_what_it_cannot_do(device):
    model = network(device)
    masks = random_masks(model, 0.8)
    counts = [0, 2.5, "a"]
    bad_ones = [{"end": n} for n in counts] + [{"end": 9, "every": n} for n in counts]
    for bad in bad_ones + [{"end": 9, "fraction": share} for share in (0.0, 1.5, "a")]:
        with pytest.raises(ValueError, match="count steps from 1"):
            RegrowWhileTraining(masks, **bad)
    assert RegrowWhileTraining(masks, end=9, every=1, fraction=1.0).moves(1) > 0.9
    usual = RegrowWhileTraining(masks, end=999)
    assert [step for step in range(301) if usual.moves(step)] == [100, 200, 300]
    assert usual.moves(100) == pytest.approx(0.15 * (1 + math.cos(math.pi * 100 / 999)))
    never = RegrowWhileTraining(masks, end=1, every=1)
    assert [never.moves(step) for step in range(3)] == [0.0] * 3
    after = RegrowWhileTraining(masks, end=10, every=1)
    after(model)  # without a step nothing moves, so no gradient is asked for
    with pytest.raises(ValueError, match=r"0\.weight has no gradient after step 1"):
        after(model, 1)
    assert all(torch.equal(m, masks[n]) for n, m in after.masks.items())
    with pytest.raises(ValueError, match=r"name '9\.weight'"):
        RegrowWhileTraining({"9.weight": masks["4.weight"]}, end=10, every=1)(model, 1)
