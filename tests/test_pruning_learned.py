"""What training itself decides: channels pressed to zero, movement, and gates that learn."""

import copy
import math

import pytest
import torch
from pruning_networks import Tied, batches, fit, network
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from structopt import pruning, training
from structopt.channels import channel_groups, take
from structopt.pruning import (
    Filters,
    Global,
    MovementWhileTraining,
    NOfM,
    OneShot,
    PerLayer,
    ShrinkChannels,
)


def scale_(model, k, factor):
    """All that `parts` gives, in place."""
    with torch.no_grad():
        for p in (model[0].weight, model[0].bias, model[1].weight, model[1].bias):
            p[k] *= factor
        model[4].weight.unflatten(1, (6, 16))[:, k] *= factor


def parts(model, k):
    """All entries of channel k of the hidden layer, its row, norm and four readers."""
    reader = model[4].weight.unflatten(1, (6, 16))[:, k]
    own = model[0].weight[k], model[0].bias[k], model[1].weight[k], model[1].bias[k]
    return torch.cat([p.detach().flatten() for p in (*own, reader)])


@pytest.mark.parametrize("step", [5, 10])
def test_shrinking_is_the_proximal_step_of_the_penalty(device, step):
    """v = argmin ½ ‖v - w‖² + τ √n ‖v‖: its conditions, channel by channel."""
    model = network(device).double()
    nn.init.normal_(model[1].bias)
    scale_(model, 2, 0.01)
    scale_(model, 5, 0.0)  # is zero already
    groups = channel_groups(model, torch.zeros(1, 1, 6, 6, device=device, dtype=torch.double))
    before, after = copy.deepcopy(model), ShrinkChannels(groups, strength=0.02, end=10)
    after(model, step)
    tau = 0.02 * step / 10
    for k in range(6):
        old, new = parts(before, k), parts(model, k)
        price = tau * len(old) ** 0.5
        if new.any():
            torch.testing.assert_close(old - new, price * new / new.norm())
        else:
            assert old.norm() <= price
    assert not parts(model, 2).any()
    assert not parts(model, 5).any()
    assert parts(model, 0).any()
    scale_(model, 0, 1e-6)  # small is not zero
    assert after.zeros(model) == {"0": 2}
    assert torch.equal(model[4].bias, before[4].bias)
    assert torch.equal(model[1].running_var, before[1].running_var)


def test_what_lies_in_two_groups_takes_both_factors(device):
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5), nn.Linear(5, 2)).to(device)
    groups = channel_groups(model, torch.randn(1, 3, device=device))
    first, second, both = (copy.deepcopy(model) for _ in range(3))
    ShrinkChannels([groups["0"]], strength=0.05, end=1)(first, 1)
    ShrinkChannels([groups["1"]], strength=0.05, end=1)(second, 1)
    ShrinkChannels(groups, strength=0.05, end=1)(both, 1)
    w = model[1].weight
    expected = w * (first[1].weight / w) * (second[1].weight / w)
    torch.testing.assert_close(both[1].weight, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_small_factors_add_up_in_16_bits(device, dtype):
    """What rounds to 1 there is not lost: a thousand of them are a tenth, after a break too."""
    layers = [nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)]
    model = nn.Sequential(*layers).to(device, dtype)
    wide = copy.deepcopy(model).to("cpu", torch.float64)
    groups = channel_groups(wide, torch.randn(1, 6, dtype=torch.float64))
    after, exactly = (ShrinkChannels(groups, strength=1e-4, end=1000) for _ in range(2))
    before = model[0].weight.detach().clone()
    for step in range(1, 1001):
        if step == 500:
            state, after = after.state_dict(), ShrinkChannels(groups, strength=1e-4, end=1000)
            after.load_state_dict(copy.deepcopy(state))
        after(model, step)
        exactly(wide, step)
    for name, p in model.named_parameters():
        want = wide.get_parameter(name).to(dtype)
        torch.testing.assert_close(p.cpu(), want, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    assert not torch.equal(model[0].weight, before)
    assert exactly.state_dict() == {"rests": {}}
    with torch.no_grad():
        model[0].weight[2] = 0  # a mask, say
    after(model, 1000)
    assert not model[0].weight[2].any()


class Beside(nn.Module):
    """Two layers read the input, one reads both: of its columns each has some."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(3, 5), nn.Linear(9, 2)

    def forward(self, x):
        return self.c(torch.cat([self.a(x), self.b(x)], 1))


def test_a_reader_s_columns_of_other_groups_are_left_alone(device):
    model = Beside().to(device)
    groups, before = channel_groups(model, torch.randn(1, 3, device=device)), copy.deepcopy(model)
    ShrinkChannels([groups["a"]], strength=0.05, end=1)(model, 1)
    assert torch.equal(model.c.weight[:, 4:], before.c.weight[:, 4:])
    assert (model.c.weight[:, :4].abs() < before.c.weight[:, :4].abs()).all()


def test_channels_trained_to_zero_leave_without_a_trace(device):
    model, data = network(device), batches(device)
    groups = channel_groups(model, data[0][0][:1])
    after = ShrinkChannels(groups, strength=0.03, end=20)
    fit(model, data, epochs=5, after_step=after)
    gone = after.zeros(model)["0"]
    fit(model, data, epochs=1, after_step=lambda model, step: after(model, 20 + step))
    assert after.zeros(model)["0"] == gone  # no pressure any more, and none of them comes back
    version = model[0].weight._version
    after(model, 21)
    assert model[0].weight._version == version  # nothing runs
    assert 0 < gone < 6
    twin, compiled = copy.deepcopy(model), torch.compile(model, backend="eager")
    after(compiled, 1)
    after(twin, 1)
    assert torch.equal(model[0].weight, twin[0].weight)
    assert after.zeros(compiled) == after.zeros(model)
    small = pruning.prune_channels(model, data[0][0][:1], gone / 6)
    assert small[0].out_channels == 6 - gone
    torch.testing.assert_close(small.eval()(data[0][0]), model.eval()(data[0][0]))


def test_shrinking_refuses_what_it_cannot_do(device):
    model = network(device)
    groups, x = channel_groups(model, torch.zeros(1, 1, 6, 6, device=device)), {"strength": 1e-3}
    for bad in (
        {"strength": 0.0, "end": 9}, {"strength": 1e-3, "end": 0}, {"strength": math.inf, "end": 9},
        {"strength": "a", "end": 9}, {"strength": 1e-3, "end": "a"}, {"strength": 1e-3, "end": 2.5},
    ):  # fmt: skip
        with pytest.raises(ValueError, match="counts steps from 1"):
            ShrinkChannels(groups, **bad)
    for none in ([], groups.frozen[:1]):
        with pytest.raises(ValueError, match="give groups whose channels may go"):
            ShrinkChannels(none, end=9, **x)
    after, before = ShrinkChannels(groups, end=9, **x), copy.deepcopy(model)
    narrow = take(model, {groups["0"]: [0, 1]})
    with pytest.raises(ValueError, match=r"of another model: dimension 0 of 0.weight"):
        after(narrow, 1)
    with pytest.raises(ValueError, match=r"of another model: no 0.weight"):
        after(nn.Linear(3, 2).to(device), 1)
    flat = nn.Sequential(*copy.deepcopy(model)[:4], nn.BatchNorm1d(96)).to(device)
    with pytest.raises(ValueError, match=r"of another model: dimension 1 of 4.weight, \(96,\)"):
        after(flat, 1)
    for step in (1, 100, 150):
        with pytest.raises(ValueError, match="every channel of group '0' is pressed to zero"):
            ShrinkChannels(groups, strength=1e5, end=150)(model, step)
    assert all(
        torch.equal(p, q) for p, q in zip(model.parameters(), before.parameters(), strict=True)
    )


def test_movement_is_that_of_the_paper(device):
    model, data = network(device), batches(device)
    twin, names = copy.deepcopy(model), ("0.weight", "4.weight")
    after = MovementWhileTraining(OneShot(0.5, at=4))
    after(model)
    fit(model, data, after_step=after)
    moved = {name: torch.zeros_like(twin.get_parameter(name)) for name in names}
    weights = dict(twin.named_parameters())
    speed = {name: torch.zeros_like(p) for name, p in weights.items()}
    for inputs, targets in data:
        slopes = torch.autograd.grad(F.cross_entropy(twin(inputs), targets), weights.values())
        with torch.no_grad():
            for (name, p), slope in zip(weights.items(), slopes, strict=True):
                if name in moved:
                    moved[name] -= p * slope
                speed[name] = 0.9 * speed[name] + slope
                p -= 0.1 * speed[name]
    for name in names:
        torch.testing.assert_close(after.movement[name], moved[name], rtol=1e-3, atol=1e-5)
        mask, mine = after.masks[name], after.movement[name]
        assert int((~mask).sum()) == mask.numel() // 2
        assert mine[~mask].max() <= mine[mask].min()
        assert not model.get_parameter(name)[~mask].any()
    assert any((after.movement[n][after.masks[n]] < 0).any() for n in names) or all(
        (after.movement[n][~after.masks[n]] < 0).any() for n in names
    )  # the sign counts


@pytest.mark.parametrize("scope", [PerLayer(), Global()])
@pytest.mark.parametrize("pattern", [pruning.Unstructured(), Filters()])
def test_movement_is_ranked_as_the_scope_and_the_pattern_say(device, scope, pattern):
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 4)).to(device)
    after = MovementWhileTraining(OneShot(0.25, at=1), scope=scope, pattern=pattern)
    after(model)
    for layer, much in zip(model, (1.0, 5.0), strict=True):  # the second moves further, both ways
        layer.weight.grad = much * torch.randn_like(layer.weight)
    moved = [-(layer.weight * layer.weight.grad).detach() for layer in model]
    after(model, 1)
    rows = pattern == Filters()  # with all scores above zero, as the least is taken off
    least = min(m.min() for m in moved)
    units = [(m - least).sum(1) if rows else m.flatten() for m in moved]
    masks = [m.all(1) if rows else m.flatten() for m in after.masks.values()]
    if scope == Global():
        units, masks = [torch.cat(units)], [torch.cat(masks)]
    for unit, mask in zip(units, masks, strict=True):
        assert int((~mask).sum()) == len(mask) // 4
        assert unit[~mask].max() < unit[mask].min()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_movement_in_16_bits_adds_up(device, dtype):
    """256 + 1 is 256 there: of many steps the later ones would not count."""
    model = nn.Sequential(nn.Linear(4, 4, bias=False)).to(device, dtype)
    after = MovementWhileTraining(OneShot(0.5, at=10**6))
    after(model, 0)
    weight = model[0].weight
    for step in range(1, 1001):
        weight.grad = torch.ones_like(weight)
        after(model, step)
    torch.testing.assert_close(after.movement["0.weight"], -1000 * weight.detach().float())


def test_movement_begins_with_its_first_call_and_a_copy_goes_on_by_itself(device):
    model = network(device)
    how = {"pattern": Filters(), "scope": Global(), "leave": ("0.*",)}
    after = MovementWhileTraining(OneShot(0.5, at=9), **how)
    after(model, 1)  # with no weights of before, there is no movement
    assert not after.movement["4.weight"].any()
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    twin = copy.deepcopy(after)
    twin(model, 2)
    assert not after.movement["4.weight"].any()
    after(model, 2)
    assert after.movement["4.weight"].any()
    assert torch.equal(after.movement["4.weight"], twin.movement["4.weight"])
    assert {name: getattr(twin, name) for name in how} == how


@pytest.mark.parametrize("at", [6, 14])  # before and after the break
def test_movement_goes_on_after_a_break(device, tmp_path, at):
    def run(epochs, path=None):
        torch.manual_seed(1)
        model = network(device)
        after = MovementWhileTraining(OneShot(0.6, at=at), leave=("0.*",))
        after(model)
        torch.manual_seed(2)
        return fit(model, batches(device), epochs, after_step=after, checkpoint=path), after

    whole, moved = run(4)
    run(2, tmp_path / "run")
    resumed, again = run(4, tmp_path / "run")
    assert list(moved.masks) == ["4.weight"]
    for name, p in whole.named_parameters():
        assert torch.equal(p, resumed.get_parameter(name)), name
    for twin in (again, copy.deepcopy(again)):
        assert torch.equal(moved.movement["4.weight"], twin.movement["4.weight"])
        assert torch.equal(moved.masks["4.weight"], twin.masks["4.weight"])


def test_movement_refuses_what_it_cannot_do(device):
    model = network(device)
    with pytest.raises(ValueError, match="a schedule is a value"):
        MovementWhileTraining(0.5)
    after = MovementWhileTraining(OneShot(0.5, at=1))
    after(model)
    with pytest.raises(ValueError, match=r"0.weight has no gradient after step 1"):
        after(model, 1)
    with pytest.raises(ValueError, match="no parameter is called 'head'"):
        MovementWhileTraining(OneShot(0.5, at=1), leave=("head",))(model)


def test_gates_are_open_as_often_as_they_are_said_to_be(device):
    where = torch.tensor([-2.0, 0.0, 1.5], device=device)
    noise = torch.rand(100_000, 3, device=device).clamp(1e-6, 1 - 1e-6)
    z = pruning.hard_concrete(where, noise)
    torch.testing.assert_close(
        (z > 0).float().mean(0), pruning.open_chance(where), rtol=0, atol=0.01
    )
    assert ((z == 1).float().mean(0) > 0.01).all()
    settled = (1.2 * where.sigmoid() - 0.1).clamp(0, 1)
    torch.testing.assert_close(pruning.hard_concrete(where), settled)
    assert z.min() >= 0
    assert z.max() <= 1


def test_the_price_of_gates_and_its_slope():
    torch.manual_seed(3)
    model = pruning.add_gates_(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double())
    alphas = [p for n, p in model.named_parameters() if n.endswith("log_alpha")]
    assert [tuple(a.shape) for a in alphas] == [(4, 3), (2, 4)]
    for alpha in alphas:
        nn.init.normal_(alpha)
    nothing = pruning.with_price(2.0, lambda model, batch: torch.zeros(()).double())
    expected = 2 * torch.cat([pruning.open_chance(a).flatten() for a in alphas]).mean()
    torch.testing.assert_close(nothing(model, None), expected)
    assert torch.autograd.gradcheck(pruning.hard_concrete, (alphas[0], torch.rand(4, 3).double()))
    assert torch.autograd.gradcheck(pruning.open_chance, (alphas[0],))


@pytest.mark.parametrize(
    ("pattern", "share", "price"), [(pruning.Unstructured(), 0.5, 3.0), (Filters(), 0.9, 0.3)]
)
def test_gates_learn_masks_and_leave_exactly(device, pattern, share, price):
    model, data = network(device), batches(device)
    network_weight = model[0].weight.detach().clone()
    pruning.add_gates_(model, pattern=pattern, share=share, leave=["4.*"][: pattern == Filters()])
    settled = copy.deepcopy(model).eval()
    weight = settled[0].weight / network_weight
    expected = torch.full_like(weight, min(1.0, 1.2 * share - 0.1))
    torch.testing.assert_close(weight, expected)  # where gates begin
    noisy = [model.train()(data[0][0]) for _ in range(2)]
    assert not torch.equal(*noisy)
    with pytest.raises(ValueError, match="the model has gates"):
        pruning.add_gates_(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    training.train(
        model, data, pruning.with_price(price), optimizer, epochs=10, device=device, autocast=None
    )
    expected = model.eval()(data[0][0])
    masks = pruning.remove_gates_(model.train())  # no noise is written into the weights
    assert model.training
    assert torch.equal(model.eval()(data[0][0]), expected)
    assert sorted(dict(model.named_parameters())) == sorted(
        dict(network(device).named_parameters())
    )
    assert type(model[0]) is nn.Conv2d
    assert 0.1 < pruning.sparsity_of(masks) < 0.99
    for name, mask in masks.items():
        assert torch.equal(mask, model.get_parameter(name) != 0)
        assert mask.is_contiguous()
        rows = mask.flatten(1)
        assert pattern != Filters() or torch.equal(rows.any(1), rows.all(1))


def test_gates_refuse_what_they_cannot_do(device):
    model = network(device)
    for words, call in {
        r"gates are for Unstructured\(\) or Filters\(\)": lambda: pruning.add_gates_(
            model, pattern=NOfM(2, 4)
        ),
        "share=0.0 is where the gates begin": lambda: pruning.add_gates_(model, share=0.0),
        "share=1.0 is where the gates begin": lambda: pruning.add_gates_(model, share=1.0),
        "share='a' is where the gates begin": lambda: pruning.add_gates_(model, share="a"),
        "no parameter is called 'a'": lambda: pruning.add_gates_(model, leave=["a"]),
        "strength is the price": lambda: pruning.with_price(0.0),
        "with every gate open: inf": lambda: pruning.with_price(math.inf),
        "with every gate open: '1'": lambda: pruning.with_price("1"),
        "this Sequential has no gates": lambda: pruning.remove_gates_(model),
        "this Sequential has no gates: add": lambda: pruning.with_price(1.0)(model, None),
    }.items():
        with pytest.raises(ValueError, match=words):
            call()
        assert not pruning.gates._gates(model)
    with pytest.raises(ValueError, match="Linear has no gates"):
        pruning.remove_gates_(weight_norm(nn.Linear(3, 2)))
    tied = Tied(3).to(device)
    with pytest.raises(ValueError, match=r"first.weight is second.weight as well.*leave=\['first"):
        pruning.add_gates_(tied)
    assert pruning.gates._gates(
        pruning.add_gates_(nn.Sequential(tied, nn.Linear(3, 2)), leave=["0*"])
    )
    quiet = pruning.add_gates_(nn.Linear(3, 2).eval())
    begun = quiet.parametrizations.weight[0].log_alpha.sigmoid()
    torch.testing.assert_close(begun, torch.full_like(begun, 0.9))
    assert torch.equal(quiet.weight, quiet.weight)  # gates take the mode of the model
    pruning.add_gates_(model)
    nn.init.constant_(model[4].parametrizations.weight[0].log_alpha, -9)
    with pytest.raises(ValueError, match=r"every gate of 4.weight is shut"):
        pruning.remove_gates_(model)
    assert len(pruning.gates._gates(model)) == 2
