"""Masks: exact counts, patterns, nesting, and zeros that stay zero."""

import copy
from functools import partial
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pruning_networks import Tied, batches, network
from torch import nn
from torch.nn.utils import prune
from torch.utils._python_dispatch import TorchDispatchMode

from structopt import checkpoint, pruning, training
from structopt.channels import channel_groups
from structopt.pruning import (
    Block,
    Constant,
    Filters,
    Global,
    Gradual,
    Iterative,
    NOfM,
    OneShot,
    PerRow,
)

SPARSITIES = st.floats(0, 0.85)


def scores_of(*shapes, ties=False, device="cpu", dtype=torch.float32):
    made = [torch.randn(shape, device=device, dtype=dtype) for shape in shapes]
    return {f"{i}.weight": s.round() if ties else s for i, s in enumerate(made)}


@given(sparsity=SPARSITIES, ties=st.booleans(), dtype=st.sampled_from([16, 32, 64]))
def test_counts_are_exact_per_layer_and_over_all(sparsity, ties, dtype):
    dtype = getattr(torch, f"float{dtype}")
    scores = scores_of((7, 9), (4, 3, 2, 2), ties=ties, dtype=dtype)
    for name, mask in pruning.find_masks(scores, sparsity).items():
        assert int((~mask).sum()) == round(sparsity * scores[name].numel())
    masks = pruning.find_masks(scores, sparsity, scope=Global(floor=0.05))
    assert sum(int((~m).sum()) for m in masks.values()) == round(sparsity * 111)
    kept = torch.cat([s.abs()[masks[n]] for n, s in scores.items()])
    gone = torch.cat([s.abs()[~masks[n]] for n, s in scores.items()])
    if sparsity < 0.5 and len(gone):  # no layer is near its floor
        assert gone.max() <= kept.min()


@given(sparsity=SPARSITIES, dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
def test_the_border_is_that_of_a_full_sort(sparsity, dtype):
    score = torch.randn(40, 30).exp().to(dtype)
    mask = pruning.find_masks({"w": score}, sparsity)["w"]
    order = score.flatten().argsort(stable=True)
    expected = torch.ones(1200, dtype=torch.bool)
    expected[order[: round(sparsity * 1200)]] = False
    assert torch.equal(mask.flatten(), expected)


def test_counts_are_exact_where_single_precision_no_longer_counts(device):
    """2²⁴ + 1 is no number of float32: of so many zeros all go, and of the two ones the first."""
    many = {"zeros": torch.zeros(2**24 + 1), "ones": torch.ones(2)}
    ranks = [pruning.ranking.keys(one.to(device)) for one in many.values()]
    zeros, ones = pruning.ranking.lowest(ranks, 2**24 + 2)
    assert zeros.all()
    assert ones.tolist() == [True, False]


@given(n=st.integers(1, 3), kernel=st.sampled_from([(), (3,), (2, 2)]), ties=st.booleans())
def test_n_of_m_holds_in_each_group_of_input_channels(n, kernel, ties):
    scores = scores_of((6, 8, *kernel), ties=ties)
    mask = pruning.find_masks(scores, pattern=NOfM(n, 4))["0.weight"]
    groups = mask.movedim(1, -1).reshape(-1, 4)
    assert (groups.sum(1) == n).all()
    best = scores["0.weight"].abs().movedim(1, -1).reshape(-1, 4).topk(n, dim=1).values.sum(1)
    kept = (scores["0.weight"].abs() * mask).movedim(1, -1).reshape(-1, 4).sum(1)
    torch.testing.assert_close(kept, best)
    if n == 2:  # its sparsity may be said
        said = pruning.find_masks(scores, 0.5, pattern=NOfM(2, 4))["0.weight"]
        assert torch.equal(said, mask)


@given(r=st.sampled_from([1, 2, 3]), c=st.sampled_from([1, 2, 4]), sparsity=SPARSITIES)
def test_blocks_go_whole_and_those_of_the_smallest_sum(r, c, sparsity):
    score = torch.rand(6, 8, 3)
    mask = pruning.find_masks({"w": score}, sparsity, pattern=Block(r, c))["w"]
    sums, whole = [], []
    for i in range(0, 6, r):
        for j in range(0, 8, c):
            for k in range(3):
                part = mask[i : i + r, j : j + c, k]
                assert part.all() or not part.any()
                sums.append(score[i : i + r, j : j + c, k].sum())
                whole.append(bool(part.all()))
    sums, whole = torch.stack(sums), torch.tensor(whole)
    assert int((~whole).sum()) == round(sparsity * len(whole))
    if not whole.all():
        assert sums[~whole].max() <= sums[whole].min()


def test_filters_add_up_signed_scores_before_their_absolute_value(device):
    score = torch.tensor([[5.0, -5.0], [1.0, 1.0]], device=device)
    mask = pruning.find_masks({"w": score}, 0.5, pattern=Filters())["w"]
    assert mask.tolist() == [[False, False], [True, True]]


def test_blocks_add_up_signed_scores_before_their_absolute_value(device):
    score = torch.tensor([[5.0, -5.0], [1.0, 1.0]], device=device)
    mask = pruning.find_masks({"w": score}, 0.5, pattern=Block(1, 2))["w"]
    assert mask.tolist() == [[False, False], [True, True]]


@pytest.mark.parametrize("pattern", [Filters(), Block(2, 4), NOfM(2, 4), pruning.Unstructured()])
def test_a_mask_has_a_place_in_memory_for_each_weight(device, pattern):
    sparsity = None if isinstance(pattern, NOfM) else 0.5
    mask = pruning.find_masks(scores_of((8, 4, 3), device=device), sparsity, pattern=pattern)
    assert mask["0.weight"].is_contiguous()


def test_filters_of_scales_are_the_scales(device):
    """Of a norm each scale is an output, and has no other weights."""
    score = torch.tensor([3.0, -1.0, 2.0, 0.5], device=device)
    for pattern in (Filters(), pruning.Unstructured()):
        mask = pruning.find_masks({"bn": score}, 0.5, pattern=pattern)["bn"]
        assert mask.tolist() == [True, False, True, False]


@given(sparsity=SPARSITIES)
def test_rows_lose_the_same_number_each(sparsity):
    score = torch.randn(5, 2, 3, 3)
    mask = pruning.find_masks({"w": score}, sparsity, scope=PerRow())["w"]
    assert ((~mask).flatten(1).sum(1) == round(sparsity * 18)).all()


def test_normalising_makes_layers_of_different_size_of_weights_equals(device):
    scores = {
        "small": torch.rand(40, 10, device=device) / 1000,
        "large": torch.rand(40, 10, device=device),
    }
    with pytest.raises(ValueError, match=r"would empty small.*Global\(floor=0.01\)"):
        pruning.find_masks(scores, 0.5, scope=Global())
    floored = pruning.find_masks(scores, 0.5, scope=Global(floor=0.01))
    assert int(floored["small"].sum()) == 4
    assert torch.equal(
        floored["small"].flatten().nonzero()[:, 0],
        scores["small"].flatten().topk(4).indices.sort().values,
    )
    equal = pruning.find_masks(scores, 0.5, scope=Global(normalise=True))
    assert abs(pruning.sparsity_of({"small": equal["small"]}) - 0.5) < 0.05


def test_infinite_scores_stay_but_have_no_mean_to_divide_by(device):
    """A score may say: never this one. Divided by such a mean all others would be 0."""
    scores = {n: torch.rand(4, 6, device=device) for n in ("a", "b")}
    scores["a"][0, 0] = torch.inf
    assert pruning.find_masks(scores, 0.9, scope=Global(floor=0.01))["a"][0, 0]
    with pytest.raises(ValueError, match=r"the mean of the scores of a is inf: .*normalise"):
        pruning.find_masks(scores, 0.5, scope=Global(normalise=True))
    layers = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)).to(device)
    never = {"0.weight": torch.full((8, 4), torch.inf, device=device)}
    with pytest.raises(ValueError, match=r"the mean of the scores of group '0' is inf"):
        pruning.prune_channels(
            layers,
            torch.zeros(1, 4, device=device),
            0.5,
            scores=never,
            scope=Global(normalise=True),
        )


def test_normalising_divides_by_the_mean_of_the_layer(device):
    scores = {
        "even": torch.rand(20, 10, device=device, dtype=torch.float64),
        "peaked": torch.rand(20, 10, device=device, dtype=torch.float64) ** 9 * 100,
    }
    masks = pruning.find_masks(scores, 0.3, scope=Global(normalise=True))
    every = torch.cat([(s / s.mean()).flatten() for s in scores.values()])
    expected = torch.ones(400, dtype=torch.bool, device=device)
    expected[every.argsort()[:120]] = False
    assert torch.equal(torch.cat([m.flatten() for m in masks.values()]), expected)


def test_normalising_takes_the_sizes_of_scores_with_signs_and_of_zeros(device):
    signed = torch.tensor([[4.0, -4.0, 4.0, -5.0]], device=device)  # of size 1 each, mean near 0
    scores = {"signed": signed, "plain": torch.tensor([[0.5, 0.5, 1.5, 1.5]], device=device)}
    masks = pruning.find_masks(scores, 0.5, scope=Global(normalise=True))
    assert masks["signed"].tolist() == [[False, False, True, True]]
    assert masks["plain"].tolist() == [[False, False, True, True]]
    scores["signed"] = torch.zeros_like(signed)  # has a mean that nothing can be divided by
    masks = pruning.find_masks(scores, 0.25, scope=Global(normalise=True))
    assert masks["signed"].tolist() == [[False, False, True, True]]
    assert masks["plain"].all()


def test_the_share_that_a_layer_keeps_is_rounded_up_and_its_number_to_even(device):
    scores = {
        "few": torch.arange(1.0, 11, device=device),
        "many": torch.arange(99.0, 199).to(device),
    }
    masks = pruning.find_masks(scores, 0.5, scope=Global(floor=0.01))
    assert masks["few"].tolist() == [False] * 9 + [True]
    for size, gone in ((3, 2), (5, 2), (7, 4)):
        mask = pruning.find_masks({"w": torch.rand(size, device=device)}, 0.5)["w"]
        assert int((~mask).sum()) == gone
    assert pruning.sparsity_of({}) == 0


def test_scores_that_lie_in_another_order_and_masks_of_numbers_are_taken(device):
    score = torch.rand(6, 4, device=device)
    turned = {"w": score.T.contiguous().T}
    first = pruning.find_masks({"w": score}, 0.5)
    assert torch.equal(pruning.find_masks(turned, 0.5)["w"], first["w"])
    numbers = {"w": first["w"].float()}
    then = pruning.find_masks(turned, 0.75, within=numbers)["w"]
    assert then.dtype == torch.bool
    assert torch.equal(then, pruning.find_masks(turned, 0.75, within=first)["w"])


@given(sparsities=st.lists(SPARSITIES, min_size=2, max_size=4).map(sorted), ties=st.booleans())
@pytest.mark.parametrize("scope", [pruning.PerLayer(), Global(), PerRow()])
def test_masks_nest_even_if_the_scores_change(scope, sparsities, ties):
    masks = None
    for sparsity in sparsities:
        scores = scores_of((6, 10), (10, 7), ties=ties)
        found = pruning.find_masks(scores, sparsity, scope=scope, within=masks)
        if masks is not None:
            assert all(not (found[name] & ~masks[name]).any() for name in found)
        masks = found


@pytest.mark.parametrize("scope", [pruning.PerLayer(), Global(), PerRow()])
def test_what_is_gone_goes_before_zeros_that_are_left(device, scope):
    score = torch.tensor([[0.0, 0.0, 5.0, 0.0]], device=device)
    before = {"w": torch.tensor([[True, True, True, False]], device=device)}
    again = pruning.find_masks({"w": score}, 0.25, scope=scope, within=before)
    assert torch.equal(again["w"], before["w"])


def test_a_floor_holds_no_place_for_what_is_gone(device):
    """Of eight weights that went before a floor was asked for, none goes once more."""
    scores = {"a": torch.rand(10, device=device), "b": torch.rand(10, device=device) + 1}
    before = {"a": torch.arange(10, device=device) > 7, "b": torch.ones(10).to(device) > 0}
    for sparsity in (0.4, 0.5, 0.65):  # to five of "b", half of it
        masks = pruning.find_masks(scores, sparsity, scope=Global(floor=0.5), within=before)
        assert pruning.sparsity_of(masks) == pytest.approx(sparsity)
        assert torch.equal(masks["a"], before["a"])


@pytest.mark.parametrize("pattern", [Filters(), Block(2, 2)])
def test_masks_of_patterns_nest(device, pattern):
    first = pruning.find_masks(scores_of((8, 8), device=device), 0.25, pattern=pattern)
    then = pruning.find_masks(scores_of((8, 8), device=device), 0.5, pattern=pattern, within=first)
    assert not (then["0.weight"] & ~first["0.weight"]).any()


@pytest.mark.parametrize("pattern", [pruning.Unstructured(), Filters(), Block(2, 2), NOfM(3, 4)])
def test_nothing_comes_back_whatever_is_asked_for_next(device, pattern):
    """Another pattern than that of the masks before, and less than is gone already."""
    scores = scores_of((8, 8), device=device)
    first = pruning.find_masks(scores, 0.5)
    sparsity = None if isinstance(pattern, NOfM) else 0.25
    then = pruning.find_masks(scores, sparsity, pattern=pattern, within=first)
    whole = pruning.find_masks(scores, sparsity, pattern=pattern)["0.weight"]
    assert not (then["0.weight"] & ~first["0.weight"]).any()
    assert int(then["0.weight"].sum()) <= int(whole.sum())


@pytest.mark.parametrize("scope", [pruning.PerLayer(), Global(), Global(True, 0.1), PerRow()])
@pytest.mark.parametrize("pattern", [pruning.Unstructured(), Block(2, 4), NOfM(2, 4), Filters()])
def test_masks_are_the_same_on_every_device(device, scope, pattern):
    if pattern == Filters() and scope == PerRow():
        pytest.skip("a row of filters is the whole layer")
    scores = scores_of((8, 8), (4, 8, 2, 2))
    there = {name: s.to(device) for name, s in scores.items()}
    sparsity = None if isinstance(pattern, NOfM) else 0.6
    expected = pruning.find_masks(scores, sparsity, pattern=pattern, scope=scope)
    for name, mask in pruning.find_masks(there, sparsity, pattern=pattern, scope=scope).items():
        assert mask.device.type == device.type
        assert torch.equal(mask.cpu(), expected[name])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda s: pruning.find_masks(s, 1.0), r"fraction removed, a number in \[0, 1\), not 1"),
        (lambda s: pruning.find_masks(s, -0.1), "fraction removed"),
        (lambda s: pruning.find_masks(s, float("nan")), "fraction removed"),
        (lambda s: pruning.find_masks(s, "0.5"), "a number in .* not '0.5'"),
        (lambda s: pruning.find_masks(s, 0.5, pattern="2:4"), "a pattern is .* not '2:4'"),
        (lambda s: pruning.find_masks(s, 0.5, pattern=Filters), "a pattern is"),
        (lambda s: pruning.find_masks(s, 0.5, scope=Global), "a scope is one of"),
        (lambda s: pruning.PruneWhileTraining(0.5), "a schedule is .* not 0.5"),
        (lambda s: pruning.PruneWhileTraining(Constant(0.5), scope="global"), "a scope is one of"),
        (lambda s: pruning.PruneWhileTraining(Constant(0.5), pattern="2:4"), "a pattern is"),
        (lambda s: pruning.find_masks(s), "say which sparsity"),
        (lambda s: pruning.find_masks(s, 0.9, pattern=NOfM(2, 4)), "has sparsity 0.5, not 0.9"),
        (lambda s: pruning.find_masks(s, "0.5", pattern=NOfM(2, 4)), "0.5, not '0.5'"),
        (lambda s: pruning.find_masks(s, pattern=NOfM(2, 4)), r"divide 0\.weight: .*there are 6"),
        (lambda s: pruning.find_masks(s, 0.5, pattern=Block(3, 2)), r"divide 0\.weight: 4 outputs"),
        (lambda s: pruning.find_masks(s, 0.99), r"would empty 0\.weight"),
        (lambda s: pruning.find_masks({}, 0.5), "no scores"),
        (lambda s: pruning.find_masks({"w": s["0.weight"] * torch.nan}, 0.5), "24 of 24 scores"),
        (lambda s: pruning.find_masks({"w": s["0.weight"] > 0}, 0.5), "are torch.bool"),
        (lambda s: pruning.find_masks({"w": s["0.weight"].numpy()}, 0.5), "w are of ndarray"),
        (lambda s: pruning.find_masks(s, 0.5, within={}), r"0\.weight is missing in them"),
        (lambda s: pruning.find_masks(s, 0.5, within={"0.weight": s["0.weight"].T > 0}), r"\(6, 4"),
        (lambda s: pruning.find_masks(s, 0.95, scope=Global(floor=0.5)), "floor=0.5 leaves"),
        (lambda s: Global(floor=1.0), "floor"),
        (lambda s: Global(floor="a"), "floor='a'"),
        (lambda s: Global(0.01), r"normalise=0.01: true or false; .* Global\(floor=0.01\)"),
        (lambda s: NOfM(4, 4), "1 <= n < m"),
        (lambda s: Block(0, 2), "at least one row"),
        (lambda s: NOfM(2.5, 4), "whole numbers"),
        (lambda s: NOfM(2, 4.5), "whole numbers"),
        (lambda s: NOfM(0, 4), "1 <= n < m"),
        (lambda s: Block(2, 0), "at least one row"),
        (lambda s: pruning.find_masks(s, 0.5, pattern=Block(2, 4)), r"divide 0\.weight: 4 outputs"),
        (lambda s: pruning.find_masks({"b": torch.rand(8)}, pattern=NOfM(2, 4)), "there are 1"),
        (lambda s: OneShot(0.5, at=2.5), "whole numbers"),
        (lambda s: Gradual(0.5, 0.5, 9), "whole numbers"),
        (lambda s: Iterative(0.5, rounds=2, every=2.5), "whole numbers"),
        (lambda s: pruning.find_masks(s["0.weight"], 0.5), "scores are a dict of a tensor"),
        (lambda s: pruning.find_masks({"b": torch.rand(8)}, 0.5, pattern=Block(2, 2)), "matrices"),
        (lambda s: Block(2.0, 4), "whole numbers"),
    ],
)  # fmt: skip
def test_bad_input_is_a_clear_error(call, words):
    with pytest.raises(ValueError, match=words):
        call(scores_of((4, 6)))


@given(
    final=st.floats(0.1, 0.95),
    begin=st.integers(0, 20),
    length=st.integers(1, 90),
    every=st.integers(1, 30),
    initial=st.floats(0, 0.1),
)
def test_gradual_is_the_formula_of_the_paper(final, begin, length, every, initial):
    schedule = Gradual(final, begin, begin + length, every, initial)
    values = [schedule.sparsity(step) for step in range(begin + length + 5)]
    assert values == sorted(values)
    assert values[-1] == final
    assert not any(values[:begin])
    for step in range(begin, begin + length, every):
        left = (1 - (step - begin) / length) ** 3
        assert values[step] == pytest.approx(final + (initial - final) * left)
    changes = [step for step in range(len(values)) if schedule.changes(step)]
    assert changes == [*range(begin, begin + length, every), begin + length]


@given(final=st.floats(0.1, 0.95), rounds=st.integers(1, 6), every=st.integers(1, 9))
def test_iterative_keeps_the_same_share_each_round(final, rounds, every):
    schedule = Iterative(final, rounds, every)
    ends = [schedule.sparsity(step) for step in range(200) if schedule.changes(step)]
    kept = [1.0, *(1 - s for s in ends)]
    shares = [b / a for a, b in pairwise(kept)]
    assert len(ends) == rounds
    assert shares == pytest.approx([shares[0]] * rounds)
    assert ends[-1] == pytest.approx(final)
    assert schedule.sparsity(10_000) == ends[-1]


def test_one_shot_and_constant():
    assert [OneShot(0.5, at=3).sparsity(s) for s in (0, 2, 3, 9)] == [0, 0, 0.5, 0.5]
    assert [s for s in range(9) if OneShot(0.5, at=3).changes(s)] == [3]
    assert [s for s in range(9) if Constant(0.5).changes(s)] == [1]
    for make in (
        lambda: Constant(1.0),
        lambda: OneShot(0.5, at=0),
        lambda: Gradual(0.5, 9, 9),
        lambda: Gradual(0.5, 0, 9.5),
        lambda: Gradual(0.5, 0, 9, every=0),
        lambda: Iterative(1.0, rounds=2, every=9),
    ):
        with pytest.raises(ValueError, match=r"Constant|OneShot|Gradual|Iterative"):
            make()
    assert Gradual(0.5, 0, 9, initial=0.5).sparsity(0) == 0.5  # may be as sparse from the first
    with pytest.raises(ValueError, match="initial <= final"):
        Gradual(0.5, 0, 9, initial=0.6)


def test_applying_a_mask_multiplies_by_it(device):
    model = network(device)
    plain, masks = copy.deepcopy(model), pruning.find_masks(pruning.score(model), 0.7)
    assert pruning.apply_masks_(model, {n: m.cpu() for n, m in masks.items()}) is model
    for name, p in plain.named_parameters():
        assert torch.equal(model.get_parameter(name), p * masks[name] if name in masks else p)


@pytest.mark.parametrize("apply", [pruning.apply_masks_, lambda m, k: pruning.hold(k)(m)])
def test_what_is_removed_is_zero_even_where_it_was_no_number(device, apply):
    model = network(device)
    masks = pruning.find_masks(pruning.score(model), 0.7)
    with torch.no_grad():
        for name, mask in masks.items():
            model.get_parameter(name)[~mask] = torch.nan
    apply(model, masks)
    assert all(not model.get_parameter(name)[~mask].any() for name, mask in masks.items())


OPTIMIZERS = {
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1, amsgrad=True),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("warm", [False, True])
def test_zero_stays_zero_whatever_the_optimiser_does(device, optimizer, warm):
    model = network(device)
    optimizer = OPTIMIZERS[optimizer](model.parameters())
    fit = partial(training.train, model, batches(device), training.supervised(), optimizer)
    if warm:  # momentum of the dense network is left over
        fit(epochs=1, device=device)
    masks = pruning.find_masks(pruning.score(model), 0.7)
    after = pruning.hold(masks)
    seen = []

    def check(model, step):
        after(model, step)
        seen.append(all(not model.get_parameter(n)[~m].any() for n, m in masks.items()))

    fit(epochs=2, device=device, after_step=check)
    assert len(seen) == 8
    assert all(seen)
    assert all(model.get_parameter(n)[m].all() for n, m in masks.items())  # the rest is trained


def test_the_model_stays_an_ordinary_one(device, tmp_path):
    model = network(device)
    names = list(model.state_dict())
    masks = pruning.find_masks(pruning.score(model), 0.7)
    after = pruning.hold(masks)
    after(model)
    assert list(model.state_dict()) == names
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    example = torch.randn(2, 1, 6, 6, device=device)
    twin, plain = copy.deepcopy(model), network(device)
    after(plain)  # another model, the same masks
    assert all(not plain.get_parameter(n)[~m].any() for n, m in masks.items())
    after(twin)
    assert torch.equal(twin.eval()(example), model.eval()(example))
    checkpoint.save(model, tmp_path / "sparse.safetensors")
    loaded = checkpoint.load(tmp_path / "sparse.safetensors", network(device)).eval()
    assert torch.equal(loaded(example), model(example))
    exported = torch.export.export(model, (example,)).module()
    torch.testing.assert_close(exported(example), model(example))


def test_holding_follows_a_model_that_moves_or_changes_its_layout(device):
    model = network("cpu")
    masks = pruning.find_masks(pruning.score(model), 0.5)
    after = copy.deepcopy(pruning.hold(masks))
    after(model)
    model.to(device, torch.float64, memory_format=torch.channels_last)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    after(model)
    for name, mask in masks.items():
        weight = model.get_parameter(name).cpu()
        assert not weight[~mask].any()
        assert weight[mask].all()


def test_a_layer_or_weight_that_is_replaced_is_held_as_well(device):
    model = nn.Sequential(nn.Sequential(network(device)), nn.Linear(4, 2).to(device))
    masks = pruning.find_masks(pruning.score(model), 0.5)
    after = pruning.hold(masks)
    after(model)

    def is_held():
        after(model)
        weights = {n: model.get_parameter(n) for n in masks}
        return all(not w[~masks[n]].any() and w[masks[n]].all() for n, w in weights.items())

    model[0][0] = network(device)  # what holds a layer
    assert is_held()
    model[0][0][4] = nn.Linear(6 * 16, 4).to(device)
    assert is_held()
    model[1].weight = nn.Parameter(torch.randn(2, 4, device=device))
    assert is_held()
    model[1] = nn.Linear(1, 2).to(device)
    with pytest.raises(ValueError, match=r"of shape \(2, 4\): it has to be .* shape \(2, 1\)"):
        after(model)
    del model[1]
    for _ in range(2):  # not the first time only
        with pytest.raises(ValueError, match=r"the masks name '1\.weight'"):
            after(model)
        with pytest.raises(ValueError, match=r"the masks name '0\.0\.0\.weight'"):
            after(network(device))


def test_masks_that_are_loaded_are_held_from_then_on(device):
    model = nn.Linear(2, 1, device=device)
    first, then = (torch.tensor([[on, not on]], device=device) for on in (True, False))
    given = {"weight": first}
    after = pruning.hold(given)
    given["weight"] = ~first  # is the caller's dict
    after(model)
    assert model.weight.detach().bool().tolist() == first.tolist()
    after.load_state_dict({"masks": {"weight": then}})
    nn.init.ones_(model.weight)
    after(model)
    assert model.weight.detach().bool().tolist() == then.tolist()


def test_a_copy_prunes_as_the_first_one_does(device):
    options = {"score": lambda m: pruning.score(m), "pattern": Block(1, 2), "scope": Global()}
    first = pruning.PruneWhileTraining(Constant(0.5), **options)
    first(nn.Linear(4, 2, device=device), 1)
    twin = copy.deepcopy(first)
    for name in (*options, "schedule"):
        assert getattr(twin, name) is getattr(first, name)
    assert torch.equal(twin.masks["weight"], first.masks["weight"])


class Log(TorchDispatchMode):
    """Every operation that runs inside."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        if self.names[-1] == "aten.index.Tensor":
            self.names += ["bool index" for i in args[1] if i is not None and i.dtype == torch.bool]
        return function(*args, **(kwargs or {}))


def test_holding_is_one_product_that_reads_no_number_back(device):
    """So that a GPU never waits: no copy to the CPU, no `item`."""
    model = network(device)
    after = pruning.hold(pruning.find_masks(pruning.score(model), 0.5))
    after(model)
    with Log() as log:
        after(model, 2)
    assert log.names == ["aten._foreach_mul_.List"]


WAITS = {"_local_scalar_dense.default", "nonzero.default", "bincount.default", "bool index"}
CALLS = {
    "prune": lambda model, masks, groups: pruning.PruneWhileTraining(Constant(0.5)),
    "move": lambda model, masks, groups: pruning.MovementWhileTraining(OneShot(0.5, at=1)),
    "regrow": lambda model, masks, groups: pruning.RegrowWhileTraining(masks, end=99, every=50),
    "shrink": lambda model, masks, groups: pruning.ShrinkChannels(groups, strength=1e-3, end=99),
}


@pytest.mark.parametrize("call", CALLS)
def test_between_its_changes_no_call_waits_for_a_number(device, call):
    """Of a size, too: a GPU has to be done before the CPU knows how many entries are true."""
    model, example = network(device), torch.zeros(1, 1, 6, 6, device=device)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    masks = pruning.find_masks(pruning.score(model), 0.5)
    after = CALLS[call](model, masks, channel_groups(model, example))
    after(model, 1)
    with Log() as log:
        after(model, 2)
    assert log.names
    assert not WAITS & {name.removeprefix("aten.") for name in log.names}


def test_gradual_pruning_while_training_nests_and_ends_exactly(device):
    model, seen = network(device), []
    after = pruning.PruneWhileTraining(Gradual(0.8, 2, 10, every=2), scope=Global(floor=0.02))

    def note(model, step):
        after(model, step)
        seen.append({name: mask.clone() for name, mask in after.masks.items()})

    data, optimizer = batches(device), OPTIMIZERS["momentum"](model.parameters())
    training.train(
        model, data, training.supervised(), optimizer, epochs=3, device=device, after_step=note
    )
    seen = [masks for masks in seen if masks]
    for earlier, later in pairwise(seen):
        assert all(not (later[name] & ~earlier[name]).any() for name in later)
    size = sum(m.numel() for m in after.masks.values())
    zeros = sum(int((model.get_parameter(n) == 0).sum()) for n in after.masks)
    assert zeros == round(0.8 * size)
    assert pruning.sparsity_of(after.masks) == pytest.approx(0.8, abs=1 / size)


def test_what_is_gone_stays_gone_whatever_later_scores_say(device):
    model = network(device)
    after = pruning.PruneWhileTraining(
        Iterative(0.8, rounds=4, every=1), score=lambda m: pruning.score(m, pruning.random)
    )
    found = []
    for step in (1, 2, 3, 4):
        after(model, step)
        found.append(after.masks)
    for earlier, later in pairwise(found):
        assert all(not (later[name] & ~earlier[name]).any() for name in later)
    twin = copy.deepcopy(after)
    assert all(torch.equal(m, twin.masks[n]) for n, m in after.masks.items())
    assert (twin.schedule, twin.score, twin.scope) == (after.schedule, after.score, after.scope)


def test_a_resumed_run_holds_the_same_masks(device, tmp_path):
    def run(epochs, path=None):
        torch.manual_seed(1)
        model = network(device)
        optimizer = OPTIMIZERS["adamw"](model.parameters())
        after = pruning.PruneWhileTraining(Gradual(0.8, 1, 4, every=1))  # done before the break
        torch.manual_seed(2)
        data = batches(device)
        training.train(
            model, data, training.supervised(), optimizer, epochs=epochs, device=device,
            after_step=after, checkpoint=path,
        )  # fmt: skip
        return model

    whole = run(3)
    run(1, tmp_path / "run")
    resumed = run(3, tmp_path / "run")
    for name, p in whole.named_parameters():
        assert torch.equal(p, resumed.get_parameter(name)), name


def test_masks_of_torch_are_taken_and_handed_back(device):
    model = network(device)
    plain = copy.deepcopy(model)
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    prune.random_unstructured(model[4], "bias", amount=0.5)
    expected = model[0].weight_mask.clone()
    masks = pruning.from_torch_(model)
    assert set(masks) == {"0.weight", "4.bias"}
    assert torch.equal(masks["0.weight"], expected.bool())
    assert set(model.state_dict()) == set(plain.state_dict())
    copy.deepcopy(model)
    assert torch.equal(model[0].weight, plain[0].weight * expected)
    pruning.to_torch_(plain, masks)
    assert torch.equal(plain[0].weight_mask.bool(), masks["0.weight"])
    example = torch.randn(2, 1, 6, 6, device=device)
    torch.testing.assert_close(plain.eval()(example), model.eval()(example))
    with pytest.raises(ValueError, match=r"no mask of torch\.nn\.utils\.prune"):
        pruning.from_torch_(model)
    layer = prune.l1_unstructured(nn.Linear(4, 2), "weight", amount=0.5)
    assert set(pruning.from_torch_(layer)) == {"weight"}  # of the model itself


@pytest.mark.parametrize(
    "use", [pruning.apply_masks_, pruning.to_torch_, lambda m, k: pruning.hold(k)(m)]
)
def test_masks_that_do_not_fit_are_named_and_change_nothing(use):
    model = network("cpu")
    before = copy.deepcopy(model.state_dict())
    good = {"0.weight": torch.zeros(6, 1, 3, 3, dtype=torch.bool)}
    for bad, words in (
        ({"9.weight": torch.ones(1, dtype=torch.bool)}, r"name '9\.weight'"),
        (
            {"4.weight": torch.ones(2, 2, dtype=torch.bool)},
            r"mask of 4\.weight is torch\.bool of shape \(2, 2\)",
        ),
        ({"4.weight": torch.ones(4, 96)}, r"4\.weight is torch\.float32"),
        ({"4.weight": [True]}, r"mask of 4\.weight is of list: it has to be a bool tensor"),
    ):
        with pytest.raises(ValueError, match=words):
            use(model, good | bad)
        assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_pruning_takes_its_scores_from_where_you_say(device):
    """Gradients of held-out batches, say; the masks are those of the scores."""
    model, data = network(device), batches(device, 1)
    after = pruning.PruneWhileTraining(
        Constant(0.5), score=lambda m: pruning.score(m, pruning.saliency, data)
    )
    expected = pruning.find_masks(pruning.score(model, pruning.saliency, data), 0.5)
    after(model, 1)
    assert all(torch.equal(mask, expected[name]) for name, mask in after.masks.items())
    rows = pruning.PruneWhileTraining(Constant(0.5), pattern=Filters())
    rows(model, 1)
    assert all(mask.flatten(1).all(1).sum() == len(mask) // 2 for mask in rows.masks.values())


def test_masks_of_a_weight_in_two_layers_are_those_of_both(device):
    model = Tied(4).to(device)
    masks, x = pruning.find_masks(pruning.score(model), 0.5), torch.randn(3, 4, device=device)
    masked = pruning.apply_masks_(copy.deepcopy(model), masks)(x)
    assert torch.equal(
        pruning.apply_masks_(model, {"second.weight": masks["first.weight"]})(x), masked
    )
    nn.init.normal_(model.first.weight)
    pruning.to_torch_(model, {n: m.cpu() for n, m in masks.items()})
    found = model(x)
    back = pruning.from_torch_(model)
    assert back.keys() == {"first.weight", "second.weight"}
    assert model.first.weight is model.second.weight
    torch.testing.assert_close(pruning.apply_masks_(model, back)(x), found)
    torch.testing.assert_close(pruning.to_torch_(model, back)(x), found)
    assert set(dict(model.named_buffers())) == {"first.weight_mask", "second.weight_mask"}


def test_masks_hold_under_distributed_data_parallel(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = network("cpu")
        masks = pruning.find_masks(pruning.score(model), 0.7)
        optimizer = OPTIMIZERS["momentum"](model.parameters())
        whole = nn.parallel.DistributedDataParallel(model)
        fit = partial(training.train, epochs=2, device="cpu", after_step=pruning.hold(masks))
        fit(whole, batches("cpu"), training.supervised(), optimizer)
    finally:
        torch.distributed.destroy_process_group()
    assert all(not model.get_parameter(name)[~mask].any() for name, mask in masks.items())


def test_what_is_no_dict_of_masks_or_no_choice_of_groups_is_named():
    model = nn.Linear(4, 2)
    for call in (pruning.hold, lambda masks: pruning.apply_masks_(model, masks)):
        for odd in (None, [torch.ones(2, 4, dtype=torch.bool)]):
            with pytest.raises(
                ValueError, match=r"masks are a dict of a bool tensor.*not (None|\[)"
            ):
                call(odd)
    with pytest.raises(ValueError, match=r"a choice holds groups, not 'fc1'.*channel_groups"):
        pruning.mask_channels(model, {"fc1": torch.tensor([0])})


@pytest.mark.parametrize("found", [pruning.PruneWhileTraining, pruning.MovementWhileTraining])
def test_masks_found_while_a_compiled_model_trains_are_those_of_the_model(device, found):
    """So that they fit it, and a run resumed without compilation."""
    model = network(device)
    after, compiled = found(OneShot(0.5, at=3)), torch.compile(model, backend="eager")
    optimizer = OPTIMIZERS["momentum"](model.parameters())
    training.train(
        compiled, batches(device), training.supervised(), optimizer, epochs=1, device=device,
        after_step=after,
    )  # fmt: skip
    assert set(after.masks) == {"0.weight", "4.weight"}
    assert all(not model.get_parameter(n)[~m].any() for n, m in after.masks.items())
    pruning.apply_masks_(model, after.masks)


@pytest.mark.parametrize(
    "make", [pruning.hold, partial(pruning.RegrowWhileTraining, end=9, every=2)]
)
def test_masks_of_a_model_hold_where_it_is_compiled(device, make):
    model = network(device)
    masks = pruning.find_masks(pruning.score(model), 0.7)
    after, compiled = make(masks), torch.compile(model, backend="eager")
    optimizer = OPTIMIZERS["momentum"](model.parameters())
    training.train(
        compiled, batches(device), training.supervised(), optimizer, epochs=1, device=device,
        after_step=after,
    )  # fmt: skip
    assert all(not model.get_parameter(n)[~m].any() for n, m in after.masks.items())
    assert all(model.get_parameter(n).any() for n in masks)
    with pytest.raises(ValueError, match=r"the masks name '9.weight'"):
        pruning.hold({"9.weight": masks["4.weight"]})(compiled)
