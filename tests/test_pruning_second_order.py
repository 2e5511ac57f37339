"""One-shot pruning with an update, channels in an order for N:M, and the tensors of the GPU."""

import copy
from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pruning_networks import Tied
from torch import nn

from structopt import pruning
from structopt.pruning import Block, NOfM, Unstructured
from structopt.pruning.reordering import _swaps
from structopt.pruning.second_order import _hessian

PATTERNS = st.sampled_from([(Unstructured(), 0.3), (Unstructured(), 0.7), (NOfM(2, 4), None)])


def doubles(*shape, device="cpu"):
    return torch.randn(shape, device=device, dtype=torch.float64)


def inputs(columns, device="cpu"):
    """Correlated ones: else there is nothing to make up for."""
    return doubles(3 * columns, columns, device=device) @ doubles(columns, columns, device=device)


def off(weight, dense, x):
    """What the rows put out differently, squared and summed: one number a row."""
    return ((weight - dense).flatten(1) @ x.T).square().sum(1)


def surgeon(row, hessian, mask):
    """The optimal brain surgeon from left to right, by the inverse of all columns still free."""
    row = row.clone()
    for j in (~mask).nonzero()[:, 0].tolist():
        inverse = torch.linalg.inv(hessian[j:, j:])
        row[j:] -= row[j] / inverse[0, 0] * inverse[:, 0]
        row[j] = 0
    return row


def test_one_weight_goes_by_the_closed_form(device):
    x, weight = inputs(6, device), doubles(1, 6, device=device)
    weight[0, 0] = 1e-3  # the one to go
    made, mask = pruning.sparse_gpt(weight, x.T @ x, 1 / 6, damp=0.0)
    assert mask.tolist() == [[False] + [True] * 5]
    inverse = torch.linalg.inv(x.T @ x)
    expected = weight - weight[0, 0] / inverse[0, 0] * inverse[0]
    torch.testing.assert_close(made, expected)
    fitted = torch.linalg.lstsq(x[:, 1:], x @ weight[0]).solution  # nothing else is as near
    torch.testing.assert_close(made[0, 1:], fitted)


@given(choice=PATTERNS, seed=st.integers(0, 1000))
def test_the_update_is_that_of_the_surgeon_and_never_worse_than_the_mask_alone(choice, seed):
    torch.manual_seed(seed)
    pattern, sparsity = choice
    x, weight = inputs(8), doubles(5, 8)
    made, mask = pruning.sparse_gpt(weight, x.T @ x, sparsity, pattern=pattern, damp=0.0)
    assert not made[~mask].any()
    if sparsity:
        assert int((~mask).sum()) == round(sparsity * 40)
    else:
        assert (mask.view(-1, 4).sum(1) == 2).all()
    before, after = off(weight * mask, weight, x), off(made, weight, x)
    assert (after <= before * (1 + 1e-9)).all()
    for row, dense, stays, limit in zip(made, weight, mask, before, strict=True):
        expected = surgeon(dense, x.T @ x, stays)
        if off(expected[None], dense[None], x) > limit:
            expected = dense * stays
        torch.testing.assert_close(row, expected)


def test_the_weights_that_go_are_those_that_hurt_least(device):
    x, weight = inputs(4, device), doubles(3, 4, device=device)
    _, mask = pruning.sparse_gpt(weight, x.T @ x, pattern=NOfM(3, 4), damp=0.0)
    hurts = torch.stack([
        weight[:, j] ** 2 / torch.linalg.inv((x.T @ x)[j:, j:])[0, 0] for j in range(4)
    ])  # fmt: skip
    assert torch.equal((~mask).int().argmax(1), hurts.argmin(0))


@pytest.mark.parametrize(("pattern", "run"), [(NOfM(2, 4), 4), (Unstructured(), 8)])
def test_each_run_of_columns_is_ranked_by_what_the_runs_before_left(device, pattern, run):
    """By w² / [H⁻¹]ⱼⱼ, with the weights as changed so far and H of the columns still free."""
    x, weight = inputs(8, device), doubles(5, 8, device=device)
    sparsity = None if run == 4 else 0.4
    mask = pruning.sparse_gpt(weight, x.T @ x, sparsity, pattern=pattern, damp=0.0)[1]
    scale = [torch.linalg.inv((x.T @ x)[j:, j:])[0, 0].item() for j in range(8)]
    for start in range(0, 8, run):
        before = mask.clone()
        before[:, start:] = True
        left = [surgeon(*row) for row in zip(weight, [x.T @ x] * 5, before, strict=True)]
        hurts = torch.stack(left).square()[:, start : start + run]
        hurts = hurts / torch.tensor(scale[start : start + run]).to(hurts)
        gone = ~mask[:, start : start + run]
        rows = [(hurts, gone)] if run == 8 else zip(hurts, gone, strict=True)
        assert all(h[g].max() <= h[~g].min() for h, g in rows)


@pytest.mark.parametrize("sparsity", [0.31, 0.5])
def test_counts_are_exact_over_several_runs_of_columns(sparsity):
    x, weight = inputs(150), doubles(3, 150)
    made, mask = pruning.sparse_gpt(weight, x.T @ x, sparsity, damp=0.0)
    assert int((~mask).sum()) == round(sparsity * 450)
    assert int((~mask[:, :128]).sum()) == round(sparsity * 3 * 128)
    assert off(made, weight, x).sum() < 0.9 * off(weight * mask, weight, x).sum()
    torch.testing.assert_close(made[0], surgeon(weight[0], x.T @ x, mask[0]))


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(6, 1), (5, 3, 6)),
        (nn.Conv1d(4, 2, 3, groups=2, padding=2), (2, 4, 9)),
        (nn.Conv2d(3, 1, (3, 2), stride=2, padding=1), (2, 3, 6, 7)),
        (nn.Conv2d(4, 2, 3, groups=2, dilation=2, padding=2, padding_mode="reflect"), (2, 4, 6, 6)),
        (nn.Conv2d(2, 1, 3, padding="same", padding_mode="circular"), (2, 2, 5, 5)),
    ],
)
def test_the_hessian_of_a_layer_is_that_of_its_outputs(layer, shape):
    """Σ x xᵀ = Jᵀ J, with J the slope of every output on the weights of its row."""
    layer, x = layer.double(), doubles(*shape)
    slopes = torch.autograd.functional.jacobian(
        lambda w: torch.func.functional_call(layer, {"weight": w, "bias": layer.bias}, x),
        layer.weight.detach(),
    )
    slopes = slopes.flatten(0, -layer.weight.ndim - 1)  # (outputs of all kinds, *weight)
    found = _hessian(layer, layer, [x])
    for part, mine in zip(found, slopes.movedim(1, 0), strict=True):  # one row a group
        mine = mine.flatten(1)
        torch.testing.assert_close(part, mine.T @ mine)


@pytest.mark.parametrize("pattern", [Unstructured(), NOfM(2, 4)])
def test_layers_are_pruned_one_after_the_other(device, pattern):
    layers = nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3, groups=1), nn.Flatten()
    model = nn.Sequential(*layers, nn.Linear(6 * 4, 3)).double().to(device)
    before, x = copy.deepcopy(model.state_dict()), doubles(40, 1, 6, 6, device=device)
    sparsity = 0.5 if isinstance(pattern, Unstructured) else None
    made, masks = pruning.prune_and_update(
        model, [x[:20], x[20:]], sparsity, pattern=pattern, leave=["0.*"]
    )
    assert list(masks) == ["2.weight", "4.weight"]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
        where = masks.get(name)
        assert where is None or not made.state_dict()[name][~where].any()
    groups = masks["2.weight"].movedim(1, -1).reshape(-1, 4).sum(1)
    assert (groups == 2).all() if sparsity is None else int(groups.sum()) == 4 * 6 * 9 // 2
    hidden = made[:4](x)  # what the last layer gets now
    last = pruning.sparse_gpt(model[4].weight, hidden.T @ hidden, sparsity, pattern=pattern)
    torch.testing.assert_close(made[4].weight, last[0])
    with torch.no_grad():
        whole, alone = model[2](model[:2](x)), copy.deepcopy(model[2])
        pruning.apply_masks_(alone, {"weight": masks["2.weight"]})
        near, far = (m(model[:2](x)) - whole for m in (made[2], alone))
    assert near.square().sum() < 0.9 * far.square().sum()


def test_a_weight_in_two_layers_is_updated_for_the_inputs_of_both(device):
    model, x = Tied(8).to(device), torch.randn(64, 8, device=device)
    made, masks = pruning.prune_and_update(model, [x], 0.5)
    both = torch.cat([x, model.first(x).relu() * 3])
    weight, mask = pruning.sparse_gpt(model.first.weight, both.T @ both, 0.5)
    assert list(masks) == ["first.weight"]
    assert torch.equal(masks["first.weight"], mask)
    torch.testing.assert_close(made.second.weight.detach(), weight)


def test_of_inputs_that_are_all_zero_the_smallest_weights_go(device):
    weight = torch.randn(4, 8, device=device)
    made, mask = pruning.sparse_gpt(weight, torch.zeros(8, 8, device=device), 0.5)
    expected = pruning.find_masks({"w": weight}, 0.5)["w"]
    assert torch.equal(mask, expected)
    assert torch.equal(made, weight * mask)


def test_layers_are_damped_as_asked_and_batches_may_be_read_once(device):
    layer, x = nn.Linear(8, 6).to(device), torch.randn(9, 8, device=device)
    made, masks = pruning.prune_and_update(layer, iter([x]), 0.5, damp=3.0)
    weight, mask = pruning.sparse_gpt(layer.weight.detach(), x.T @ x, 0.5, damp=3.0)
    assert torch.equal(masks["weight"], mask)
    torch.testing.assert_close(made.weight.detach(), weight)


def test_half_precision_is_updated_in_single(device):
    """Over so many inputs a sum in bfloat16 would stand still."""
    layer, x = nn.Linear(8, 6).to(device).bfloat16(), torch.randn(999, 8, device=device).bfloat16()
    made, masks = pruning.prune_and_update(layer, list(x.split(1)), 0.5)
    wide = x.float().T @ x.float()
    weight, mask = pruning.sparse_gpt(layer.weight.detach().float(), wide, 0.5)
    assert made.weight.dtype == torch.bfloat16
    assert torch.equal(masks["weight"], mask)
    torch.testing.assert_close(made.weight.detach(), weight.bfloat16())
    found = pruning.sparse_gpt(layer.weight.detach(), wide, 0.5)[0]
    assert torch.equal(found, made.weight)


def test_the_update_refuses_what_it_cannot_do(device):
    weight, eye = torch.ones(2, 8, device=device), torch.eye(8, device=device)
    for words, (hessian, sparsity, options) in {
        r"hessian of shape \(3, 3\) does not fit": (eye[:3, :3], 0.5, {}),
        "holds NaN": (eye * torch.nan, 0.5, {}),
        "holds NaN or infinite": (eye.clone().fill_diagonal_(torch.inf), 0.5, {}),
        "singular with damp=0": (0 * eye, 0.5, {"damp": 0.0}),
        "singular with damp=-1": (eye, 0.5, {"damp": -1.0}),
        "singular with damp='a'": (eye, 0.5, {"damp": "a"}),
        r"fraction removed, a number in \[0, 1\)": (eye, 1.0, {}),
        "say which sparsity": (eye, None, {}),
        r"knows Unstructured\(\) and NOfM": (eye, 0.5, {"pattern": Block(2, 2)}),
        r"NOfM\(n=2, m=3\) does not divide": (eye, None, {"pattern": NOfM(2, 3)}),
        "has sparsity 0.5, not 0.6": (eye, 0.6, {"pattern": NOfM(2, 4)}),
    }.items():
        with pytest.raises(ValueError, match=words):
            pruning.sparse_gpt(weight, hessian, sparsity, **options)
    with pytest.raises(ValueError, match=r"the weight has shape \(8,\): a weight has rows"):
        pruning.sparse_gpt(weight[0], eye, 0.5)
    model, x = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2)).to(device), torch.randn(9, 6)
    before = copy.deepcopy(model.state_dict())
    for words, (batches, options) in {
        "batches are empty": ([], {"sparsity": 0.5}),
        "does not divide 0.weight": ([x], {"pattern": NOfM(2, 4)}),
        "no parameter is called 'head'": ([x], {"sparsity": 0.5, "leave": ["head"]}),
        "there is no layer to prune": ([x], {"sparsity": 0.5, "leave": ["*"]}),
        "0.weight: the hessian holds NaN": ([x * torch.nan], {"sparsity": 0.5}),
        "would empty 1.weight": ([x], {"sparsity": 0.95}),
    }.items():
        with pytest.raises(ValueError, match=words):
            pruning.prune_and_update(model, batches, **options)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    unused = nn.ModuleDict({"a": nn.Linear(6, 2), "b": nn.Linear(6, 2)})
    unused.forward = unused["a"].forward
    with pytest.raises(ValueError, match=r"a.weight is not called as a layer"):
        pruning.prune_and_update(unused, [x], 0.5)
    with pytest.raises(ValueError, match="Conv3d are not unfolded"):
        pruning.prune_and_update(nn.Conv3d(1, 2, 1), [torch.ones(1, 1, 2, 2, 2)], 0.5)


class Joined(nn.Module):
    """Two layers read the same channels, one beside a shortcut; then 4 entries a channel."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.inner, self.back = nn.Conv2d(8, 12, 3, padding=1), nn.Conv2d(12, 8, 1)
        self.head = nn.Linear(8 * 4, 3)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        x = x + self.back(self.inner(x).relu())
        return self.head(nn.functional.adaptive_avg_pool2d(x, 2).flatten(1))


def kept(model, pattern, leave):
    scores = pruning.score(model, leave=leave)
    masks = pruning.find_masks(scores, pattern=pattern)
    return sum(float((s * masks[n]).sum()) for n, s in scores.items())


@pytest.mark.parametrize("pattern", [NOfM(2, 4), NOfM(1, 4), NOfM(1, 2)])
def test_a_reordered_network_is_the_same_and_keeps_more(device, pattern):
    model, x = Joined().to(device).eval(), torch.randn(4, 1, 6, 6, device=device)
    scores = pruning.score(model, leave=["stem.*"])
    moved = pruning.permute_channels(model, x[:1], pattern, scores=scores)
    torch.testing.assert_close(moved(x), model(x))
    assert kept(moved, pattern, ["stem.*"]) > kept(model, pattern, ["stem.*"])
    same = pruning.permute_channels(model, x[:1], pattern, scores=scores, leave=["*"])
    assert torch.equal(same.inner.weight, model.inner.weight)


def test_no_exchange_of_two_channels_keeps_more(device):
    model = nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 3)).to(device)
    with torch.no_grad():  # four in a row are large
        model[2].weight *= torch.tensor([9, 9, 9, 9, *[1] * 8], device=device)
    moved = pruning.permute_channels(model, torch.randn(1, 5, device=device))
    found = kept(moved, NOfM(2, 4), ["0.*"])
    assert found > 1.3 * kept(model, NOfM(2, 4), ["0.*"])
    for i, j in combinations(range(12), 2):
        order = list(range(12))
        order[i], order[j] = j, i
        size = moved[2].weight.detach()[:, order].abs()
        other = pruning.find_masks({"w": size}, pattern=NOfM(2, 4))["w"]
        assert float((size * other).sum()) <= found * (1 + 1e-5)


def test_each_set_of_channels_takes_part_in_one_exchange(device):
    columns = torch.randn(7, 32, device=device).abs()
    swaps = _swaps(columns, NOfM(2, 4))
    sets = [place // 4 for pair in swaps for place in pair]
    assert len(swaps) > 1
    assert len(sets) == len(set(sets))


@pytest.mark.parametrize("pattern", [NOfM(2, 4), NOfM(1, 4), NOfM(1, 2)])
def test_exchanges_are_between_sets_and_the_same_in_pieces(device, pattern, monkeypatch):
    for _ in range(9):
        columns = torch.randn(3, 16, device=device).abs()
        monkeypatch.undo()
        swaps = _swaps(columns, pattern)
        assert all(i // pattern.m != j // pattern.m for i, j in swaps)
        for piece in (1, 200):  # numbers compared at once: less than a column, and a few columns
            monkeypatch.setattr(pruning.reordering, "_PIECE", piece)
            assert _swaps(columns, pattern) == swaps


class Uneven(nn.Module):
    """Four channels, read one by one and, as three entries each, by a linear layer."""

    def __init__(self):
        super().__init__()
        self.stem, self.one = nn.Conv2d(1, 4, 1), nn.Conv2d(4, 2, 1)
        self.all = nn.Linear(4 * 3, 1)

    def forward(self, x):
        x = self.stem(x)
        return self.one(x).sum() + self.all(x.flatten(1)).sum()


def test_an_order_by_which_another_reader_loses_more_is_not_taken(device):
    model, x = Uneven().to(device), torch.randn(1, 1, 1, 3, device=device)
    one = torch.tensor([[5.0, 5, 0, 0], [3, 0, 0, 3]], device=device)[:, :, None, None]
    every = torch.tensor([[1.0, 0] * 6], device=device)  # is kept whole as it is
    for scale, same in ((100, True), (0.01, False)):
        scores = {"one.weight": one, "all.weight": scale * every}
        moved = pruning.permute_channels(model, x, NOfM(1, 2), scores=scores)
        assert torch.equal(moved.stem.weight, model.stem.weight) == same


def test_a_reader_without_scores_has_no_say_in_the_order(device):
    model, x = Twice().to(device).eval(), torch.randn(1, 1, 4, 4, device=device)
    whole = pruning.score(model)
    some = {"a.weight": whole["a.weight"], "head.weight": 0 * whole["head.weight"]}
    moved = pruning.permute_channels(model, x, scores={"a.weight": some["a.weight"]})
    expected = pruning.permute_channels(
        model, x, scores={**some, "b.weight": 0 * whole["b.weight"]}
    )
    assert not torch.equal(moved.stem.weight, model.stem.weight)
    assert torch.equal(moved.stem.weight, expected.stem.weight)


class Beside(nn.Module):
    """Two groups that one weight reads side by side, its pairs across their border."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(2, 4), nn.Linear(2, 4)
        self.one, self.two, self.both = nn.Linear(4, 2), nn.Linear(4, 2), nn.Linear(10, 1)

    def forward(self, x):
        a, b = self.a(x).relu(), self.b(x).relu()
        return self.one(a) + self.two(b), self.both(torch.cat([x[:, :1], a, b, x[:, 1:]], 1))


def test_a_group_is_weighed_with_those_before_it_as_they_lie_now():
    torch.manual_seed(143)  # of few networks the second group is taken only by the old order
    model, pattern = Beside(), NOfM(1, 2)
    moved = pruning.permute_channels(model, torch.randn(3, 2), pattern)
    assert not torch.equal(moved.one.weight, model.one.weight)
    assert kept(moved, pattern, ["a.*", "b.*"]) >= kept(model, pattern, ["a.*", "b.*"])


def test_the_order_is_that_of_input_channels_only(device):
    """A transposed convolution makes channels along that dimension, and reads none there."""
    x, pattern = torch.randn(1, 2, 3, 3, device=device), NOfM(2, 4)
    model = nn.Sequential(nn.ConvTranspose2d(2, 8, 1), nn.Conv2d(8, 4, 1)).to(device)
    scores = {n: s.clone() for n, s in pruning.score(model).items()}
    scores["0.weight"] *= 100
    scores["1.weight"][:, :4] *= 9  # four in a row, of which two would go
    moved = pruning.permute_channels(model, x, pattern, scores=scores)
    alone = {"1.weight": scores["1.weight"]}
    expected = pruning.permute_channels(model, x, pattern, scores=alone)
    assert torch.equal(moved[1].weight, expected[1].weight)
    assert not torch.equal(moved[1].weight, model[1].weight)
    turned = nn.Sequential(nn.Conv2d(2, 8, 1), nn.ConvTranspose2d(8, 8, 1)).to(device)
    same = pruning.permute_channels(turned, x, pattern)
    assert torch.equal(same[0].weight, turned[0].weight)


class Twice(nn.Module):
    """Eight channels, read by two convolutions of different kernels and by a linear layer."""

    def __init__(self):
        super().__init__()
        self.stem, self.a = nn.Conv2d(1, 8, 1), nn.Conv2d(8, 5, (3, 2))
        self.b, self.head = nn.Conv2d(8, 4, 1), nn.Linear(8 * 16, 3)

    def forward(self, x):
        x = self.stem(x).relu()
        return self.a(x).sum((2, 3)).sum() + self.b(x).sum() + self.head(x.flatten(1))


@pytest.mark.parametrize("pattern", [NOfM(2, 4), NOfM(1, 4), NOfM(3, 4)])
def test_the_order_is_that_of_the_scores_sizes_over_all_that_read_it(device, pattern):
    """No exchange keeps more, with scores of any sign that are not the magnitudes."""
    model, x = Twice().to(device).eval(), torch.randn(2, 1, 4, 4, device=device)
    scores = {n: torch.randn_like(s).pow(3) for n, s in pruning.score(model).items()}
    del scores["stem.weight"]
    for name in ("a.weight", "b.weight"):  # halves of two kinds, so that the order matters
        scores[name][:, :4] *= 5 if name == "a.weight" else 1
    names = {n: s.detach().clone() for n, s in scores.items()}
    model.stem.weight.data = torch.arange(8.0, device=device).view(8, 1, 1, 1)  # says who is where
    moved = pruning.permute_channels(model, x[:1], pattern, scores=scores)
    torch.testing.assert_close(moved(x), model(x), rtol=1e-4, atol=1e-4)
    order = moved.stem.weight.detach().flatten().long()

    def keeps(order):
        sizes = {n: names[n].abs()[:, order] for n in ("a.weight", "b.weight")}
        masks = pruning.find_masks(sizes, pattern=pattern)
        return sum(float((s * masks[n]).sum()) for n, s in sizes.items())

    found = keeps(order)
    assert found > keeps(torch.arange(8))
    for i, j in combinations(range(8), 2):
        other = order.clone()
        other[[i, j]] = order[[j, i]]
        assert keeps(other) <= found * (1 + 1e-5)


def test_channels_whose_order_matters_to_nobody_stay_in_a_copy(device):
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4 * 16, 2)).to(device)
    same = pruning.permute_channels(model, torch.randn(1, 1, 6, 6, device=device))
    assert same is not model
    assert torch.equal(same[2].weight, model[2].weight)


def test_reordering_refuses_what_it_cannot_do(device):
    model = nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 2)).to(device)
    x = torch.randn(1, 5, device=device)
    with pytest.raises(ValueError, match=r"does not divide 1.weight"):
        pruning.permute_channels(model, x)
    with pytest.raises(ValueError, match=r"only N:M depends on the order"):
        pruning.permute_channels(model, x, Unstructured())
    with pytest.raises(ValueError, match=r"no group is called 'a' \(leave\); there are 0"):
        pruning.permute_channels(model, x, leave=["a"])
    with pytest.raises(ValueError, match=r"leave is a list of names: leave=\['01'\]"):
        pruning.permute_channels(model, x, leave="01")


def semi(device):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 128)).to(device)
    masks = pruning.find_masks(pruning.score(model), pattern=NOfM(2, 4))
    return model, masks


def test_without_the_kernels_the_error_names_the_device():
    model, masks = semi("cpu")
    with pytest.raises(ValueError, match=r"0.weight is on cpu, which has no 2:4 kernels"):
        pruning.to_semi_structured(model, masks)
    assert model[0].weight.count_nonzero() > 64 * 64  # untouched
    dense = {"0.weight": torch.ones(64, 128, dtype=torch.bool)}
    with pytest.raises(ValueError, match=r"the mask of 0.weight is not 2:4"):
        pruning.to_semi_structured(model, dense)
    three = torch.tensor([True, True, True, False]).repeat(64, 32)
    once = masks["0.weight"].clone()
    once[5, :4] = torch.tensor([True, True, True, False])
    for mask in (three, once):
        with pytest.raises(ValueError, match=r"the mask of 0.weight is not 2:4"):
            pruning.to_semi_structured(model, {"0.weight": mask})
    with pytest.raises(ValueError, match=r"the mask of weight is not 2:4"):
        pruning.to_semi_structured(nn.Linear(6, 4), {"weight": torch.zeros(4, 6).bool()})
    with pytest.raises(ValueError, match=r"0.bias is of Linear"):
        pruning.to_semi_structured(model, {"0.bias": torch.zeros(64).bool()})
    conv = nn.Sequential(nn.Conv2d(4, 4, 1))
    with pytest.raises(ValueError, match=r"0.weight is of Conv2d: torch has 2:4 for nn.Linear"):
        pruning.to_semi_structured(conv, pruning.find_masks(pruning.score(conv), 0.5))


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0),
    reason="needs an NVIDIA GPU with 2:4 kernels",
)
def test_the_kernels_compute_what_the_masks_do():
    model, masks = semi("cuda")
    model, x = model.half(), torch.randn(64, 128, device="cuda").half()
    fast = pruning.to_semi_structured(model, masks)
    with torch.inference_mode():
        torch.testing.assert_close(
            fast(x), pruning.apply_masks_(model, masks)(x), rtol=1e-2, atol=1e-2
        )
