"""Removal: what goes is exactly what was masked, budgets are met, and nothing is emptied."""

import copy
from typing import ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from structopt import checkpoint, measure, networks, pruning
from structopt.channels import channel_groups, take
from structopt.pruning import (
    Bytes,
    Global,
    Limits,
    MACs,
    Milliseconds,
    Parameters,
    PerLayer,
    PerRow,
)

IMAGE = (1, 1, 28, 28)


def trained(model):
    """Norms with statistics and scales that are not those of a fresh network."""
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.5, 2)
            nn.init.normal_(m.bias)
            nn.init.normal_(m.running_mean)
            nn.init.uniform_(m.running_var, 0.5, 2)
    return model.eval()


NETWORKS = {
    "resnet": lambda: networks.ResNet20(width=4),
    "lenet": lambda: networks.LeNet5(widths=(8, 12, 20)),
    "transformer": lambda: networks.TinyTransformer(dim=16, depth=1),
}


@pytest.fixture(scope="module", params=NETWORKS)
def analysed(request):
    torch.manual_seed(1)
    model = trained(NETWORKS[request.param]()).double()
    example = torch.randn(2, *IMAGE[1:], dtype=torch.float64)
    channels = channel_groups(model, example)
    return model, example, channels, pruning.channel_scores(channels, pruning.score(model))


@pytest.mark.parametrize("scope", [PerLayer(), Global(normalise=True)])
@pytest.mark.parametrize("sparsity", [0.3, 0.7])
def test_removal_equals_the_masked_network_in_double_precision(analysed, device, scope, sparsity):
    model, example, _, _ = analysed
    model, example = copy.deepcopy(model).to(device), example.to(device)
    channels = channel_groups(model, example)
    scores = pruning.channel_scores(channels, pruning.score(model))
    choice = pruning.choose_channels(scores, sparsity, scope=scope)
    small = pruning.prune_channels(model, example, sparsity, scope=scope)
    masked = pruning.mask_channels(model, choice)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    torch.testing.assert_close(small(example), masked(example), rtol=1e-9, atol=1e-9)
    for group, index in choice.items():
        assert len(index) < group.size
        assert all(p.device.type == device.type for p in small.parameters())


@given(sparsity=st.floats(0, 0.99))
def test_each_group_loses_exactly_the_rounded_number_of_its_lowest(analysed, sparsity):
    _, _, _, scores = analysed
    choice = pruning.choose_channels(scores, sparsity)
    for group, one in scores.items():
        kept = choice.get(group, torch.arange(group.size))
        assert len(kept) == max(1, group.size - round(sparsity * group.size))
        assert torch.equal(kept, kept.sort().values)
        rest = [i for i in range(group.size) if i not in kept.tolist()]
        if rest:
            assert one[rest].max() <= one[kept].min()


@given(sparsity=st.floats(0, 0.9), normalise=st.booleans(), floor=st.sampled_from([1, 2, 0.25]))
def test_over_the_network_exactly_so_many_go_and_no_group_is_emptied(
    analysed, sparsity, normalise, floor
):
    _, _, _, scores = analysed
    limits, total = Limits(floor=floor), sum(group.size for group in scores)
    choice = pruning.choose_channels(scores, sparsity, scope=Global(normalise), limits=limits)
    kept = {group: len(choice.get(group, range(group.size))) for group in scores}
    least = {group: limits.least(group.size) for group in scores}
    assert all(kept[group] >= least[group] for group in scores)
    removable = total - sum(least.values())
    assert total - sum(kept.values()) == min(round(sparsity * total), removable)
    gone = [scores[g][[i for i in range(g.size) if i not in c.tolist()]] for g, c in choice.items()]
    spare = [g for g in scores if kept[g] > least[g]]
    if gone and spare and not normalise:
        border = min(scores[g][choice.get(g, torch.arange(g.size))].min() for g in spare)
        assert torch.cat(gone).max() <= border


@given(sparsity=st.floats(0, 0.95), multiple=st.sampled_from([2, 4, 8]))
def test_widths_are_multiples_and_never_more_than_asked_goes(analysed, sparsity, multiple):
    _, _, _, scores = analysed
    choice = pruning.choose_channels(scores, sparsity, limits=Limits(multiple_of=multiple))
    for group in scores:
        wanted = group.size - round(sparsity * group.size)
        kept = len(choice.get(group, range(group.size)))
        assert kept == group.size or kept % multiple == 0
        assert wanted <= kept < max(wanted, 1) + multiple


def test_what_each_group_keeps_and_which_of_equal_channels_go(device):
    found = [Limits(floor=floor).least(10) for floor in (1, 0.25, 3)]
    assert [Limits().least(10), *found] == [1, 1, 3, 3]
    model = nn.Sequential(nn.Linear(2, 600), nn.Linear(600, 400), nn.Linear(400, 1)).to(device)
    groups = channel_groups(model, torch.zeros(1, 2, device=device))
    equal = {group: torch.ones(group.size, device=device) for group in groups}
    first, second = (
        {g.name: i.cpu() for g, i in pruning.choose_channels(equal, 0.5, scope=scope).items()}
        for scope in (PerLayer(), Global())
    )
    assert torch.equal(first["0"], torch.arange(300, 600))  # the first go
    assert torch.equal(first["1"], torch.arange(200, 400))
    assert {name: len(kept) for name, kept in second.items()} == {"0": 100}
    floored = pruning.choose_channels(equal, 0.95, scope=Global(floor=0.25))
    assert {g.name: len(i) for g, i in floored.items()} == {"0": 150, "1": 100}
    with pytest.raises(ValueError, match="limits is a value"):
        pruning.choose_channels(equal, 0.5, limits={"floor": 2})
    with pytest.raises(ValueError, match=r"group '0' are NaN"):
        pruning.choose_channels({g: one * torch.nan for g, one in equal.items()}, 0.5)


def test_choices_nest(analysed):
    _, _, _, scores = analysed
    for scope in (PerLayer(), Global(), Global(normalise=True)):
        before = None
        for sparsity in (0.2, 0.5, 0.8):
            choice = pruning.choose_channels(scores, sparsity, scope=scope)
            if before is not None:
                assert all(set(choice[g].tolist()) <= set(before[g].tolist()) for g in before)
            before = choice


def test_ratios_and_groups_left_alone():
    model, example = networks.ResNet20(width=8), torch.randn(IMAGE)
    limits = Limits(leave=("conv1", "stage2.*"), ratios={"stage3.0.*": 0.75, "stage3.*": 0.25})
    small = pruning.prune_channels(model, example, 0.5, limits=limits)
    assert small.conv1.out_channels == 8
    assert small.stage2[1].conv1.out_channels == 16
    assert small.stage1[0].conv1.out_channels == 4
    assert small.stage3[0].conv1.out_channels == 8
    assert small.stage3[1].conv1.out_channels == 24
    assert small.stage3[0].conv2.out_channels == 8  # the residual stream, named after this layer


@pytest.mark.parametrize(
    "budget", [MACs(share=0.4), Parameters(share=0.3), Bytes(at_most=120_000), MACs(at_most=2e6)]
)
@pytest.mark.parametrize("scope", [PerLayer(), Global(normalise=True)])
def test_budgets_on_paper_are_met_as_closely_as_widths_allow(budget, scope):
    model, example = networks.ResNet20(width=8), torch.randn(IMAGE)
    small = pruning.prune_channels(model, example, budget, scope=scope)
    limit, found = budget.limit(model, example), budget.cost(small, example)
    assert 0.9 * limit < found <= limit
    if isinstance(budget, Bytes):
        assert found == sum(t.nbytes for t in small.state_dict().values())
    if isinstance(budget, MACs):
        assert found == measure.cost(small, example).macs


def test_a_budget_in_milliseconds_is_measured(monkeypatch):
    """With a clock that counts multiply-accumulates, since real ones scatter."""

    def clock(model, example, rounds):
        macs = measure.cost(model, example).macs
        return measure.Timing(macs / 1e9, macs / 1e9, macs / 1e9, rounds, "clockwork")

    monkeypatch.setattr(measure, "latency", clock)
    model, example = networks.LeNet5(), torch.randn(IMAGE)
    small = pruning.prune_channels(model, example, Milliseconds(share=0.5))
    half = 0.5 * measure.cost(model, example).macs
    assert Milliseconds(share=0.5).limit(model, example) == pytest.approx(1000 * half / 1e9)
    assert 0.9 * half < measure.cost(small, example).macs <= half


def test_milliseconds_are_those_of_the_clock(monkeypatch):
    model, example, told = nn.Linear(4, 4), torch.randn(2, 4), []

    def clock(*given, **settings):
        told.append(measured(*given, **settings))
        return told[-1]

    measured = measure.latency
    monkeypatch.setattr(measure, "latency", clock)
    found = Milliseconds(at_most=1).cost(model, example)
    assert [found] == [1000 * timing.median for timing in told]


class Counted(Parameters):
    """Parameters, whose cost is asked for on the network itself."""

    on_paper = False
    asked: ClassVar[list[int]] = []

    def cost(self, model, example):
        self.asked.append(super().cost(model, example))
        return self.asked[-1]


def test_a_budget_may_be_met_exactly_and_each_set_of_widths_is_asked_once():
    model, example = nn.Sequential(nn.Linear(3, 9), nn.ReLU(), nn.Linear(9, 2)), torch.ones(1, 3)
    for width in (9, 5, 1):  # 3 + 1 + 2 parameters a channel, and 2
        Counted.asked.clear()
        small = pruning.prune_channels(model, example, Counted(at_most=6 * width + 2))
        assert small[0].out_features == width
        assert sorted(set(Counted.asked)) == sorted(Counted.asked)
    with pytest.raises(ValueError, match=r"cannot be met.* needs 8 parameters, more than 7"):
        pruning.prune_channels(model, example, Parameters(at_most=7))
    norm = nn.BatchNorm1d(3)  # scale, bias, mean and variance; and a count of 8 bytes
    assert Bytes(at_most=1).cost(norm, example) == 4 * 3 * 4 + 8


def test_a_budget_that_is_met_already_changes_nothing():
    model, example = networks.LeNet5(), torch.randn(IMAGE)
    same = pruning.prune_channels(model, example, MACs(share=1.0))
    assert same is not model
    assert torch.equal(same(example), model(example))


def test_a_budget_out_of_reach_names_the_nearest():
    model, example = networks.LeNet5(), torch.randn(IMAGE)
    before = copy.deepcopy(model.state_dict())
    limits = Limits(floor=0.5)
    half = pruning.prune_channels(model, example, 0.99, limits=limits)
    least = f"{measure.cost(half, example).macs:,.4g}".replace("+", r"\+")
    with pytest.raises(ValueError, match=f"cannot be met.*{least} MACs"):
        pruning.prune_channels(model, example, MACs(share=0.01), limits=limits)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m, x: pruning.prune_channels(m, x, 1.0), r"in \[0, 1\), not 1.0"),
        (lambda m, x: pruning.prune_channels(m, x, -0.5), "fraction removed"),
        (lambda m, x: pruning.prune_channels(m, x, 0.5, scope=PerRow()), "no rows"),
        (lambda m, x: pruning.prune_channels(m, x, 0.5, limits=Limits(leave=("conv9",))), "conv9"),
        (
            lambda m, x: pruning.prune_channels(m, x, 0.5, limits=Limits(ratios={"conv9": 0.5})),
            "no group is called 'conv9'",
        ),
        (lambda m, x: pruning.prune_channels(m, x, 0.5, scores={}), "no weight of group conv1"),
        (
            lambda m, x: pruning.prune_channels(nn.Linear(2, 2), x[0, 0, 0, :2], 0.5),
            "no channel of",
        ),
        (lambda m, x: MACs(), "one of at_most and share"),
        (lambda m, x: MACs(1e6, 0.5), "one of at_most and share"),
        (lambda m, x: MACs(share=1.5), r"\(0, 1\]"),
        (lambda m, x: Bytes(-1), "above 0"),
        (lambda m, x: MACs("5"), "MACs: at_most is a number above 0, not '5'"),
        (lambda m, x: MACs(share="0.5"), r"share is a number in \(0, 1\], not '0.5'"),
        (lambda m, x: Limits(leave="conv1"), r"leave=\('conv1',\)"),
        (lambda m, x: Limits(leave=None), "leave is a tuple of names, not None"),
        (lambda m, x: Limits(ratios={"conv1": 1.0}), "ratio of 'conv1'"),
        (lambda m, x: Limits(multiple_of=0), "multiple_of"),
        (lambda m, x: Limits(multiple_of=1.5), "whole number"),
        (lambda m, x: pruning.prune_channels(m, x, 0.5, scope=Global), "a scope is one of"),
        (lambda m, x: pruning.remove_blocks(m, x, "conv1"), r"list of blocks: \['conv1'\]"),
        (lambda m, x: pruning.block_influence(m, [x], ["conv9"]), "'conv9' is no module"),
        (lambda m, x: Limits(floor=0), "floor"),
        (lambda m, x: Limits(floor="a"), "floor above 0"),
        (lambda m, x: Limits(floor=float("inf")), "floor above 0"),
        (lambda m, x: Limits(ratios=[("conv1", 0.5)]), "ratios is a dict"),
        (lambda m, x: pruning.prune_channels(m, x, 0.5, limits={"floor": 2}), "limits is a value"),
        (
            lambda m, x: pruning.prune_channels(m, x, 0.5, scores=pruning.taylor),
            "scores are a dict",
        ),
    ],
)
def test_bad_input_is_a_clear_error(call, words):
    with pytest.raises(ValueError, match=words):
        call(networks.LeNet5(), torch.randn(IMAGE))


def test_nan_weights_are_named_and_the_model_is_as_it_was():
    model = networks.LeNet5()
    model.conv2.weight.data[0, 0, 0, 0] = torch.nan
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"conv2\.weight are NaN"):
        pruning.prune_channels(model, torch.randn(IMAGE), 0.5)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], equal_nan=True)


def test_groups_without_a_score_have_to_be_left_alone():
    """Scales of batch norms say nothing of the layers behind which there is none."""
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 6, 1), nn.Conv2d(6, 2, 1)
    )
    nn.init.uniform_(model[1].weight)
    scores, example = pruning.score(model, pruning.batch_norm_scale), torch.randn(1, 1, 6, 6)
    with pytest.raises(ValueError, match=r"group 2 has a score.*leave=\('2',\)"):
        pruning.prune_channels(model, example, 0.5, scores=scores)
    limits = Limits(leave=("2",))
    small = pruning.prune_channels(model, example, 0.5, scores=scores, limits=limits)
    expected = model[1].weight.detach().topk(4).indices.sort().values
    assert torch.equal(small[1].weight, model[1].weight[expected])


def test_budgets_on_paper_are_met_where_the_model_reads_values(device):
    """Such a model does not run without any."""
    model = nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 2)).to(device)
    model.register_forward_pre_hook(lambda _, args: float(args[0].sum()) and None)
    example = torch.ones(1, 3, device=device)
    small = pruning.prune_channels(model, example, MACs(at_most=5 * 7))
    assert small[0].out_features == 7


@pytest.mark.parametrize("budget", [MACs(share=0.5), Parameters(share=0.5)])
def test_candidates_of_a_budget_on_paper_hold_no_values(device, budget):
    model = nn.Sequential(nn.Linear(3, 64), nn.ReLU(), nn.Linear(64, 2)).to(device)
    bare = []
    model.register_forward_pre_hook(lambda _, args: bare.append(args[0].is_meta))
    pruning.prune_channels(model, torch.ones(1, 3, device=device), budget)
    assert bare.count(True) > 2 * bare.count(False)


class Bare(nn.Module):
    """Matrices that no layer owns: one between two layers, two by themselves."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 6), nn.Linear(6, 4)
        self.between, self.up, self.down = (
            nn.Parameter(torch.randn(shape)) for shape in ((6, 6), (4, 8), (8, 2))
        )
        self.bias = nn.Parameter(torch.zeros(8))

    def forward(self, x):
        x = self.last((self.first(x).relu() @ self.between).relu())
        return (x @ self.up + self.bias).relu() @ self.down


def test_matrices_that_no_layer_owns_count_where_nothing_else_does(device):
    model, example = Bare().to(device), torch.randn(4, 3, device=device)
    own = (model.up.abs().sum(0) + model.down.abs().sum(1)).detach()
    made, read = model.first.weight.abs().sum(1), model.last.weight.abs().sum(0)
    with torch.no_grad():  # what would turn the order round, if it counted
        model.bias[own.argmin()] = 99.0
        model.between[made.argmin()] = 99.0
        model.between[:, read.argmin()] = 99.0
    small = pruning.prune_channels(model, example, 0.5, limits=Limits(leave=("last",)))
    assert torch.equal(small.bias, model.bias[own.topk(4).indices.sort().values])
    assert torch.equal(small.first.bias, model.first.bias[made.topk(3).indices.sort().values])
    assert torch.equal(small.last.weight, model.last.weight[:, read.topk(3).indices.sort().values])


def test_a_pruned_network_is_saved_loaded_pruned_again_and_trained(tmp_path, device):
    model, example = (
        trained(networks.ResNet20(width=8)).to(device),
        torch.randn(IMAGE, device=device),
    )
    small = pruning.prune_channels(model, example, 0.5)
    checkpoint.save(small, tmp_path / "small.safetensors")
    loaded = checkpoint.load(tmp_path / "small.safetensors", networks.ResNet20(width=8).to(device))
    assert torch.equal(loaded.eval()(example), small(example))
    smaller = pruning.prune_channels(loaded, example, 0.5)
    assert smaller.conv1.out_channels == 2
    smaller.train()(example.repeat(4, 1, 1, 1)).sum().backward()
    assert all(p.grad is not None for p in smaller.parameters())


def test_residual_blocks_are_those_that_pass_their_input_on():
    example = torch.randn(IMAGE)
    resnet = pruning.residual_blocks(networks.ResNet20(width=4), example)
    # where the shape changes, a block does not
    assert resnet == [f"stage{s}.{b}" for s in (1, 2, 3) for b in range(3) if s == 1 or b]
    transformer = pruning.residual_blocks(networks.TinyTransformer(dim=16, depth=2), example)
    assert transformer == ["layers.0", "layers.1"]
    assert pruning.residual_blocks(networks.LeNet5(), example) == []
    assert pruning.residual_blocks(networks.TeacherNet(), example) == []  # x + block(x) is outside
    words = nn.Sequential(nn.Embedding(9, 2), nn.Flatten(), nn.Linear(8, 4))
    assert pruning.residual_blocks(words, torch.ones(3, 4).long()) == []  # of the same shape only


class Residual(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind, self.body = kind, nn.Linear(4, 4)

    def forward(self, x, more=1.0, *, scale=1.0):
        x = x[0] if self.kind == "listed" else x
        y = x + more * scale * self.body(x)
        return (y,) if self.kind == "tupled" else y


class Stack(nn.ModuleDict):
    def forward(self, x):
        x = self["twice"](self["twice"](self["plain"](x)))
        x = self["scaled"](self["more"](x, x), scale=2.0)
        x = self["both"](self["both"](x, x))
        x = self["relu"](self["listed"]([x]))
        return self["tupled"](x)[0]


def test_a_block_is_called_with_one_tensor_and_nothing_else_as_an_identity_would_be():
    names = ("plain", "twice", "scaled", "more", "both", "listed", "tupled")
    model = Stack({n: Residual(n) for n in names} | {"relu": nn.Sequential(nn.ReLU())})
    assert pruning.residual_blocks(model, torch.randn(3, 4)) == ["plain", "twice"]
    with pytest.raises(ValueError, match="tupled does not make one tensor"):
        pruning.block_influence(model, [torch.randn(3, 4)], ["tupled"])
    model["idle"] = nn.ReLU()
    with pytest.raises(ValueError, match="'idle' never ran"):
        pruning.block_influence(model, [torch.randn(3, 4)], ["idle"])


def test_blocks_are_named_in_the_order_of_the_model():
    model = nn.Sequential(*[Residual("plain") for _ in range(11)])
    assert pruning.residual_blocks(model, torch.ones(1, 4)) == [str(i) for i in range(11)]


def test_a_block_of_several_places_is_removed_from_all(device):
    once = {n: Residual("plain") for n in ("plain", "other")}
    model = nn.Sequential(once["plain"], once["other"], once["plain"]).to(device)
    x = torch.randn(3, 4, device=device)
    assert pruning.residual_blocks(model, x) == ["0", "1"]
    torch.testing.assert_close(pruning.remove_blocks(model, x, ["0"])(x), once["other"](x))


@pytest.mark.parametrize("network", ["resnet", "transformer"])
def test_removing_blocks_equals_zeroing_them(network, device):
    model = trained(NETWORKS[network]()).double().to(device)
    example = torch.randn(2, *IMAGE[1:], dtype=torch.float64, device=device)
    names = pruning.residual_blocks(model, example)[-1:]
    small = pruning.remove_blocks(model, example, names)
    zeroed = copy.deepcopy(model)
    for p in zeroed.get_submodule(names[0]).parameters():
        nn.init.zeros_(p)
    torch.testing.assert_close(small(example), zeroed(example), rtol=1e-12, atol=1e-12)
    assert measure.cost(small, example).macs < measure.cost(model, example).macs
    assert isinstance(model.get_submodule(names[0]), nn.Module)
    with pytest.raises(ValueError, match=r"'fc' is no residual block.*there are"):
        pruning.remove_blocks(model, example, ["fc"])


def test_block_influence_equals_its_definition(device):
    model = trained(networks.ResNet20(width=4)).to(device)
    batches = [(torch.randn(3, *IMAGE[1:], device=device), None) for _ in range(2)]
    found = pruning.block_influence(model, batches)
    block, cosines = model.stage1[1], []
    for inputs, _ in batches:
        with torch.no_grad():
            x = model.stage1[0](torch.relu(model.bn1(model.conv1(inputs))))
            y = block(x)
        cosines.append(((x * y).sum(1) / (x.norm(dim=1) * y.norm(dim=1)).clamp(min=1e-8)).mean())
    assert found["stage1.1"] == pytest.approx(1 - float(torch.stack(cosines).mean()), abs=1e-5)
    sequence = nn.Sequential(nn.Linear(4, 4)).to(device)
    x = torch.randn(2, 3, 4, device=device)
    y = sequence(x).detach()
    features = (x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1))
    found = pruning.block_influence(sequence, [x], ["0"])
    assert found["0"] == pytest.approx(1 - float(features.mean()), abs=1e-5)
    parts = [x[:1], torch.cat([x[1:], x])]  # the mean is over positions, however they are batched
    assert pruning.block_influence(sequence, parts, ["0"])["0"] == pytest.approx(
        pruning.block_influence(sequence, [torch.cat([x, x])], ["0"])["0"], abs=1e-6
    )
    nn.init.zeros_(model.stage2[1].bn2.weight)
    nn.init.zeros_(model.stage2[1].bn2.bias)
    after = pruning.block_influence(model, batches)
    assert after["stage2.1"] < 1e-6  # it does nothing any more
    with pytest.raises(ValueError, match="empty"):
        pruning.block_influence(model, [])


def test_sensitivity_prunes_one_group_at_a_time(device):
    model = trained(networks.LeNet5(widths=(8, 12, 20))).double().to(device)
    example = torch.randn(2, *IMAGE[1:], dtype=torch.float64, device=device)
    evaluate = lambda m: float(m.eval()(example).square().mean().detach())  # noqa: E731
    curves = pruning.sensitivity(model, example, evaluate, sparsities=(0.0, 0.5))
    channels = channel_groups(model, example)
    scores = pruning.channel_scores(channels, pruning.score(model))
    assert set(curves) == {"conv1", "conv2", "fc1"}
    asked = pruning.sensitivity(model, example, evaluate)["fc1"]
    assert list(asked) == [0.0, 0.25, 0.5, 0.75]  # quarters, where nothing else is said
    for group in channels:
        alone = take(model, pruning.choose_channels({group: scores[group]}, 0.5))
        assert curves[group.name][0.5] == pytest.approx(evaluate(alone), rel=1e-9)
        assert curves[group.name][0.0] == evaluate(model)


def test_where_no_channel_goes_the_curve_holds_the_value_of_the_whole_model(device):
    """Also where 0 is not asked for: 1 % of 8 channels is none."""
    model, example = networks.LeNet5(widths=(8, 12, 20)).to(device), torch.zeros(IMAGE).to(device)
    asked = []
    curves = pruning.sensitivity(
        model, example, lambda m: float(asked.append(m) or len(asked)), sparsities=iter([0.01])
    )
    assert curves == {name: {0.01: 1.0} for name in ("conv1", "conv2", "fc1")}
    assert asked == [model]
    for odd in (0.5, "0.5", [0.5, 1.0]):
        with pytest.raises(ValueError, match=r"sparsities are a list|in \[0, 1\), not 1.0"):
            pruning.sensitivity(model, example, asked.append, sparsities=odd)
    assert len(asked) == 1  # what cannot be done is said before anything is evaluated
