"""What `take` promises, in double precision, against networks that are masked by hand."""

from __future__ import annotations

import contextlib
import copy
import functools
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from channel_networks import CASES as FIRST
from channel_networks import Composed, Fn, Llama, conv, filled
from channel_networks_further import FURTHER
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize

from structopt.channels import channel_groups, take
from structopt.channels.copying import substitute
from structopt.channels.labels import Labels
from structopt.channels.rows import Refused

CASES = FIRST | FURTHER


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def assert_same(a, b):
    left, right = a.state_dict(), b.state_dict()
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=1e-12, atol=1e-14)


def assert_equal(found, expected, tolerance=1e-10):
    """Relative to the largest value."""
    assert found.shape == expected.shape
    error = (found - expected).abs().max() / expected.abs().max()
    assert error <= tolerance, f"relative error {error:.1e}"


def found(channels, hand):
    """The group that was worked out by hand, and the hand's number of each of its channels."""
    name, dim, place = hand.cuts[0]
    numbers = {tuple(sorted(place(c))): c for c in range(hand.size)}
    for group in channels:
        for member in group.members:
            if (member.parameter, member.dim, group.size) == (name, dim, hand.size):
                rows = [tuple((member.channel == c).nonzero()[0]) for c in range(group.size)]
                if numbers.keys() == set(rows):
                    return group, [numbers[row] for row in rows]
    raise AssertionError(f"no group of {hand.size} channels lies on {name}, dimension {dim}")


class Kept(nn.Module):
    """A norm over some of the channels; the others give zero."""

    def __init__(self, norm, keep):
        super().__init__()
        self.norm, self.keep, self.eps = norm, keep, norm.eps
        self.weight, self.bias = norm.weight, getattr(norm, "bias", None)

    def forward(self, x):
        keep, eps = self.keep, self.eps
        weight, bias = (None if t is None else t[keep] for t in (self.weight, self.bias))
        y = torch.zeros_like(x)
        if isinstance(self.norm, nn.GroupNorm):
            y[:, keep] = F.group_norm(x[:, keep], self.norm.num_groups, weight, bias, eps)
        elif isinstance(self.norm, nn.RMSNorm):
            y[..., keep] = F.rms_norm(x[..., keep], (len(keep),), weight, eps)
        else:
            y[..., keep] = F.layer_norm(x[..., keep], (len(keep),), weight, bias, eps)
        return y


def masked_by_hand(name, device, *chosen):
    """The full network in which nothing reads the channels that are gone: (group, gone), …"""
    full = CASES[name].model(device)
    for module in full.modules():
        if parametrize.is_parametrized(module):
            parametrize.remove_parametrizations(module, "weight")
    tensors = dict([*full.named_parameters(remove_duplicate=False), *full.named_buffers()])
    lost = {}
    for hand, gone in chosen:
        for key, dim, place in hand.cuts:
            key = re.sub(r"parametrizations\.weight\.original1?$", "weight", key)
            index = torch.tensor([i for c in gone for i in place(c)], device=device)
            tensors[key].data.index_fill_(dim, index, 0)
        for path, place in hand.norms:
            lost.setdefault(path, set()).update(i for c in gone for i in place(c))
    for path, places in lost.items():
        norm = full.get_submodule(path)
        keep = [i for i in range(len(norm.weight)) if i not in places]
        full.set_submodule(path, Kept(norm, keep))
    return full


@functools.cache
def analysed(name, device):
    """A model, its channels, and each group with the one worked out by hand."""
    case = CASES[name]
    model = case.model(device)
    channels = channel_groups(model, case.example(device))
    return model, channels, [(*found(channels, hand), hand) for hand in case.groups]


def some(size, share=2):
    """A random choice of about a half, at least one."""
    return sorted(torch.randperm(size)[: max(size // share, 1)].tolist())


by_case = pytest.mark.parametrize("name", CASES)


@by_case
def test_the_groups_are_those_worked_out_by_hand(name, device):
    _, channels, pairs = analysed(name, device)
    assert {group.name for group, _, _ in pairs} == {group.name for group in channels}
    assert len(pairs) == len(channels)


def assert_every_index_is_somewhere(model, channels):
    """In one group or, where the axis is a grid, in one of each factor; then the grid is full."""
    lies = {}
    for group in (*channels, *channels.frozen):
        assert bool(group.frozen) == (group not in channels.groups)
        assert group.frozen or group.size > 1
        for member in group.members:
            assert set(member.channel) - {-1} == set(range(group.size))
            lies.setdefault((member.parameter, member.dim), []).append(member.channel)
    for key, tensor in [*model.named_parameters(), *model.named_buffers()]:
        for dim in range(tensor.ndim if tensor.is_floating_point() else 0):
            table = np.stack(lies[key, dim])
            assert table.shape[1] == tensor.shape[dim]
            assert (table >= 0).any(0).all()
            for pattern in np.unique(table >= 0, axis=1).T:
                here = table[:, ((table >= 0) == pattern[:, None]).all(0)][pattern]
                combinations, counts = np.unique(here, axis=1, return_counts=True)
                assert combinations.shape[1] == np.prod([len(np.unique(row)) for row in here])
                assert len(set(counts)) == 1


@by_case
def test_every_index_lies_in_one_group_or_is_frozen(name, device):
    model, channels, _ = analysed(name, device)
    assert_every_index_is_somewhere(model, channels)


@by_case
def test_a_subset_equals_the_network_masked_by_hand(name, device):
    model, _, pairs = analysed(name, device)
    x = CASES[name].example(device, seed=7)
    keeps = {group: some(group.size) for group, _, _ in pairs}
    gone = {
        hand: [numbers[c] for c in range(group.size) if c not in keeps[group]]
        for group, numbers, hand in pairs
    }
    for group, _, hand in pairs:
        narrow = take(model, {group: keeps[group]})
        assert_equal(narrow(x), masked_by_hand(name, device, (hand, gone[hand]))(x))
        assert parameters(narrow) < parameters(model)
    assert_equal(take(model, keeps)(x), masked_by_hand(name, device, *gone.items())(x))


@by_case
def test_a_permutation_keeps_the_function(name, device):
    model, _, pairs = analysed(name, device)
    x = CASES[name].example(device, seed=7)
    orders = {group: torch.randperm(group.size) for group, _, _ in pairs}
    for group, order in orders.items():
        assert_equal(take(model, {group: order})(x), model(x))
    turned = take(model, orders)
    assert_equal(turned(x), model(x))
    assert turned.state_dict().keys() == model.state_dict().keys()


@by_case
def test_widening_with_preserve_keeps_the_function_or_is_refused(name, device):
    model, _, pairs = analysed(name, device)
    x = CASES[name].example(device, seed=7)
    wider = {}
    for group, _, hand in pairs:
        index = [*range(group.size), *torch.randint(group.size, (3,)).tolist()]
        if hand.widens:
            wide = take(model, {group: index}, preserve=True)
            assert_equal(wide(x), model(x))
            assert parameters(wide) > parameters(model)
            wider[group] = index
        else:
            with pytest.raises(ValueError, match=rf"group '{re.escape(group.name)}' .* exactly"):
                take(model, {group: index}, preserve=True)
    if wider:
        assert_equal(take(model, wider, preserve=True)(x), model(x))


@by_case
def test_positive_scaling_keeps_the_function(name, device):
    model, _, pairs = analysed(name, device)
    x = CASES[name].example(device, seed=7)
    factors = {group: torch.rand(group.size) + 0.5 for group, _, hand in pairs if hand.scales}
    for group, values in factors.items():
        scaled = take(model, {group: range(group.size)}, scale={group: values})
        assert_equal(scaled(x), model(x))
        assert any(
            not torch.equal(a, b)
            for a, b in zip(scaled.parameters(), model.parameters(), strict=True)
        )


@by_case
def test_take_of_take_is_one_take(name, device):
    """A subset of a permutation, and a prefix of a prefix."""
    case, (model, _, pairs) = CASES[name], analysed(name, device)
    for group in (group for group, _, _ in pairs if group.size > 2):
        first, second = torch.randperm(group.size)[: group.size - 1], some(group.size - 1)
        cuts = [(first, second, first[second])]
        cuts += [(range(group.size - 1), range(len(second)), range(len(second)))]
        for one, two, both in cuts:
            once = take(model, {group: one})
            again = channel_groups(once, case.example(device))
            twice = take(once, {again[group.name]: two})
            assert_same(twice, take(model, {group: both}))


# ------------------------------------------------------------------ networks composed at random


def zeroed(model, group, gone):
    """Every weight that lies on a channel that is gone is zero."""
    full = copy.deepcopy(model)
    tensors = dict([*full.named_parameters(), *full.named_buffers()])
    for member in group.members:
        index = torch.from_numpy(np.flatnonzero(np.isin(member.channel, gone)))
        tensor = tensors[member.parameter]
        tensor.data.index_fill_(member.dim, index.to(tensor.device), 0)
    return full


steps = st.lists(st.tuples(st.sampled_from(Composed.KINDS), st.integers(1, 3)), max_size=6)


@given(steps=steps, seed=st.integers(0, 99))
def test_laws_of_networks_composed_at_random(steps, seed):
    torch.manual_seed(seed)
    model = filled(Composed(steps).double()).eval()
    x, other = torch.randn(2, 2, 5, 5).double(), torch.randn(3, 2, 5, 5).double()
    channels = channel_groups(model, x)
    assert_every_index_is_somewhere(model, channels)
    orders = {group: torch.randperm(group.size) for group in channels}
    if orders:
        assert_equal(take(model, orders)(other), model(other))
    for group in channels:
        keep = some(group.size)
        narrow = take(model, {group: keep})
        if not group.averaged:
            gone = [c for c in range(group.size) if c not in keep]
            assert_equal(narrow(other), zeroed(model, group, gone)(other))
        with contextlib.suppress(Refused):
            wide = take(model, {group: [*range(group.size), 0]}, preserve=True)
            assert_equal(wide(other), model(other))


# ------------------------------------------------------------------ any way to call, any mode


class Called(nn.Module):
    """Two inputs, a flag, a list; gives a nest of outputs."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 8), nn.Linear(4, 8)
        self.c = nn.ModuleList([nn.Linear(8, 2), nn.Linear(8, 5)])

    def forward(self, x, *, other, deep=False, more=()):
        y = (self.a(x) + self.b(other)).relu()
        for z in more:
            y = y + self.a(z)
        return {"first": self.c[0](y), "rest": [(self.c[1](y), y.shape), Box(self.c[1](y * 2))]}


class Box:
    def __init__(self, value):
        self.value = value


def test_examples_and_outputs_of_any_nest(device):
    torch.manual_seed(0)
    model = Called().double().to(device)
    x, other, z = (torch.randn(2, n, dtype=torch.float64, device=device) for n in (3, 4, 3))
    given = {"x": x, "other": other, "deep": True, "more": [z, (z)]}
    (group,) = channel_groups(model, given)
    narrow = take(model, {group: [1, 3, 4]})
    full = copy.deepcopy(model)
    for layer in full.c:
        layer.weight.data[:, [0, 2, 5, 6, 7]] = 0
    got, want = narrow(x, other=other), full(x, other=other)
    assert_equal(got["first"], want["first"])
    assert_equal(got["rest"][0][0], want["rest"][0][0])
    assert_equal(got["rest"][1].value, want["rest"][1].value)


class Branching(nn.Module):
    """Auxiliary head in training only; a branch that the data chooses."""

    def __init__(self):
        super().__init__()
        self.stem, self.deep = conv(3, 8), conv(8, 6)
        self.aux, self.head, self.rare = conv(8, 5), conv(6, 5), conv(6, 5)

    def forward(self, x):
        y = self.stem(x).relu()
        z = self.deep(y)
        out = self.head(z) if bool(z.mean() > -100) else self.rare(z)
        return {"out": out, "aux": self.aux(y)} if self.training else {"out": out}


@pytest.mark.parametrize("training", [True, False])
def test_both_modes_are_analysed_and_each_is_exact(training, device):
    torch.manual_seed(0)
    model = Branching().double().to(device).train(training)
    x = CASES["residual"].example(device)
    channels = channel_groups(model, x)
    stem = channels["stem"]
    narrow = take(model, {stem: range(5)})
    assert narrow.training is training
    assert narrow.aux.in_channels == 5
    full = copy.deepcopy(model)
    for layer in (full.deep, full.aux):
        layer.weight.data[:, 5:] = 0
    for mode in (True, False):
        got, want = narrow.train(mode)(x), full.train(mode)(x)
        assert got.keys() == want.keys()
        for key in want:
            assert_equal(got[key], want[key])
    rare = channels["rare"]  # nothing is known of what did not run
    assert "does not use" in rare.frozen


@pytest.mark.parametrize("fast", [True, False])
def test_both_paths_of_torchs_attention(fast, device):
    """The fused one needs evaluation mode and no gradients."""
    model, _, pairs = analysed("encoder", device)
    x = CASES["encoder"].example(device, seed=3)
    keeps = {group: some(group.size) for group, _, _ in pairs}
    gone = [
        (hand, [numbers[c] for c in range(group.size) if c not in keeps[group]])
        for group, numbers, hand in pairs
    ]
    expected = masked_by_hand("encoder", device, *gone)(x)
    narrow = take(model, keeps)
    with torch.set_grad_enabled(not fast):
        assert_equal(narrow(x), expected)
    layer = narrow[1].self_attn
    assert layer.num_heads * layer.head_dim == layer.embed_dim == layer.out_proj.out_features


def test_the_sizes_of_a_whole_transformer_follow_its_parts(device):
    torch.manual_seed(0)
    whole = nn.Transformer(8, 2, 1, 1, 12, 0.0, batch_first=True)
    forward = lambda self, x: self.head(self.whole(self.a(x), self.b(x)))  # noqa: E731
    model = Fn(forward, a=nn.Linear(3, 8), b=nn.Linear(3, 8), whole=whole, head=nn.Linear(8, 5))
    model, x = model.double().to(device).eval(), torch.randn(2, 4, 3).double().to(device)
    (heads,) = (g for g in channel_groups(model, x) if g.size == 2)
    narrow = take(model, {heads: [1]})
    assert (narrow.whole.d_model, narrow.whole.nhead) == (4, 1)
    assert narrow.whole.encoder.layers[0].self_attn.num_heads == 1


def test_a_model_that_finds_nothing_is_verified_inside(device):
    """A detector without detections gives empty outputs, whatever was edited."""

    def forward(self, x):
        y = self.head(self.mid(self.a(x) + 1))
        return y[y > 1e9]

    model = Fn(forward, a=nn.Linear(3, 8), mid=nn.Linear(8, 6), head=nn.Linear(6, 2)).to(device)
    channels = channel_groups(model, torch.randn(4, 3, device=device))
    group, factors = channels["a"], torch.rand(8) + 0.5
    with pytest.raises(ValueError, match="outputs differ"):
        take(model, {group: range(8)}, scale={group: factors})
    every = {g: range(g.size) for g in channels}
    with pytest.raises(ValueError, match="outputs differ"):
        take(model, every, scale={group: factors})
    narrow = take(model, {g: range(g.size // 2) for g in channels})
    assert (narrow.a.out_features, narrow.mid.out_features) == (4, 3)


def test_the_root_of_a_whole_number_is_taken_in_double_precision_too(device):
    """Torch makes it float32, so that two such roots would differ by 1e-8."""

    def forward(self, x):
        a, b = self.encode(x), self.encode(x.flip(1))
        return self.head(a @ b.transpose(1, 2) / torch.sqrt(torch.tensor(a.shape[-1])))

    model = Fn(forward, encode=nn.Linear(3, 8), head=nn.Linear(5, 2)).double().to(device)
    x = torch.randn(2, 5, 3, dtype=torch.float64, device=device)
    (group,) = channel_groups(model, x)
    before = torch.get_default_dtype()
    assert take(model, {group: [0, 3, 4]}).encode.out_features == 3
    assert torch.get_default_dtype() is before


def test_labels_are_as_many_as_channels():
    """Ten for each row or column of a weight at most, so that 7 billion weights need 3 million."""
    for wide in (1, 4, 16):
        with torch.device("meta"):
            model = Llama(4 * wide, 2 * wide, 8, 8 * wide)
        channels = channel_groups(model, torch.zeros(1, 4, dtype=torch.long))
        axes = sum(sum(p.shape) for p in model.parameters())
        assert channels.book.labels.size < 10 * axes
        assert len(channels) == 4
        half = take(model, {group: range(group.size // 2) for group in channels})
        assert half.q.weight.shape == (8 * wide, 4 * wide)
        assert half.q.weight.is_meta


def test_what_cannot_change_is_frozen_not_refused(device):
    """An outer product with itself; an index whose numbers stay; a step that does not fit."""

    def outer(self, x):
        x = self.a(x).mean((2, 3))
        return self.b((x[:, :, None] * x[:, None]).flatten(1))

    def index(self, x):
        return self.b(self.a(x)[:, torch.tensor([2, 0, 1], device=x.device)])

    def step(self, x):
        return self.b(self.a(x)[:, ::3])

    def table(self, x):  # as the relative positions of windowed attention
        return self.b(x) + self.a.weight[torch.tensor([1, 0, 2, 1], device=x.device)].sum()

    cases = {
        outer: (conv(3, 4), nn.Linear(16, 5), "each channel meets all others"),
        index: (conv(3, 3), conv(3, 5), "numbers that stay: index"),
        step: (conv(3, 8), conv(3, 5), "numbers that stay: slice"),
        table: (nn.Linear(1, 5), conv(3, 5), "numbers that stay: index"),
    }
    for forward, (a, b, why) in cases.items():
        model = Fn(forward, a=a, b=b).to(device)
        channels = channel_groups(model, torch.randn(2, 3, 5, 5, device=device))
        assert not len(channels)
        assert any(
            re.search(why, group.frozen)
            for group in channels.frozen
            if any(member.parameter == "a.weight" for member in group.members)
        )


RECURRENT = {
    "rnn": lambda: nn.RNN(8, 6),
    "gru": lambda: nn.GRU(8, 6, bidirectional=True),
    "lstm": lambda: nn.LSTM(8, 6, proj_size=4),
    "lstm, two layers": lambda: nn.LSTM(8, 6, 2),
}


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("name", RECURRENT)
def test_an_example_of_one_step_finds_what_longer_ones_find(name, device):
    parts = {"a": nn.Linear(3, 8), "r": RECURRENT[name](), "b": nn.LazyLinear(2)}
    model = Fn(lambda self, x: self.b(self.r(self.a(x))[0]), **parts).to(device)
    found = []
    for steps in (4, 1):
        x = torch.randn(steps, 2, 3, device=device)
        model(x)
        groups = channel_groups(model, x)
        found.append([(g.name, g.size, list(map(str, g.members))) for g in groups])
    assert found[0] == found[1]
    narrow = take(model, {g: range(0, g.size, 2) for g in groups})
    assert narrow(torch.randn(5, 2, 3, device=device)).shape == (5, 2, 2)


def test_an_attention_may_share_or_compute_the_weight_that_it_is_known_by(device):
    parts = {k: nn.MultiheadAttention(8, 2, batch_first=True) for k in "abc"}
    parts["b"].out_proj.weight = parts["a"].out_proj.weight
    parametrize.register_parametrization(parts["c"].out_proj, "weight", nn.Identity())

    def forward(self, x):
        x = self.make(x)
        for layer in (self.a, self.b, self.c):
            x = x + layer(x, x, x)[0]
        return self.read(x)

    model = Fn(forward, make=nn.Linear(3, 8), read=nn.Linear(8, 2), **parts).to(device)
    groups = channel_groups(model, torch.randn(2, 3, 3, device=device))
    narrow = take(model, {group: range(0, group.size, 2) for group in groups})
    assert narrow.a.out_proj.weight is narrow.b.out_proj.weight
    assert narrow.make.out_features < 8


def test_what_is_frozen_stays_so_when_it_is_tied_to_older_channels():
    labels = Labels()
    old, new = labels.new(3), labels.new(3)
    labels.freeze(new, "it has to stay")
    labels.tie(new, old)
    assert (labels.reason[labels.find(old)] > 0).all()


BENDING = {
    "relu6": F.relu6,
    "hardtanh": lambda x: F.hardtanh(x, -50, 50),
    "clamp": lambda x: x.clamp(-90, 90),
    "least": lambda x: torch.minimum(x, torch.full_like(x, 99)),
    "most": lambda x: torch.maximum(x, torch.tensor(-99.0, device=x.device)),
    "elu": lambda x: F.elu(x.abs() + x),
    "hardshrink": lambda x: F.hardshrink(x, 1e-9),
    "threshold": lambda x: F.threshold(x, -99, 0),
}
HOMOGENEOUS = {
    "relu": F.relu,
    "in place": lambda x: F.relu_(x.clone()),
    "clamp": lambda x: x.clamp(min=0),
    "most": lambda x: torch.maximum(x, torch.zeros_like(x)),
    "where": lambda x: torch.where(x > 0, x, 0.1 * x),
    "leaky": F.leaky_relu,
    "abs": lambda x: -x.abs(),
    "threshold": lambda x: F.threshold(x, 0, 0),
}


def between(bend, device):
    """A model with this between two layers, and the group of channels that go through it."""
    parts = {"a": nn.Linear(6, 5), "b": nn.Linear(5, 3)}
    model = Fn(lambda self, x: self.b(bend(self.a(x))), **parts).to(device)
    return model, channel_groups(model, torch.rand(4, 6, device=device))["a"]


@pytest.mark.parametrize("name", BENDING)
def test_no_scale_goes_through_a_bend_that_the_example_does_not_reach(name, device):
    model, group = between(BENDING[name], device)
    with pytest.raises(ValueError, match="not positively homogeneous"):
        take(model, {group: range(5)}, scale={group: [1, 1, 0.5, 1, 1]})
    take(model, {group: range(5)}, scale={group: [1.0] * 5})
    narrow = take(model, {group: [1, 2]})
    assert narrow.a.out_features == 2


@pytest.mark.parametrize("name", HOMOGENEOUS)
def test_a_scale_goes_through_what_is_homogeneous(name, device):
    model, group = between(HOMOGENEOUS[name], device)
    scaled = take(model, {group: range(5)}, scale={group: [1, 2, 0.5, 1, 4]})
    x = 1e3 * torch.randn(50, 6, device=device)
    torch.testing.assert_close(scaled(x), model(x), rtol=1e-4, atol=1e-2)


def test_a_gate_that_bends_is_scaled_by_nobody(device):
    """The gate takes no scale over; what it multiplies does."""

    def forward(self, x):
        x = self.a(x)
        return self.b(x * self.gate(x.relu()).clamp(0, 1))

    parts = {"a": nn.Linear(6, 5), "gate": nn.Linear(5, 5), "b": nn.Linear(5, 3)}
    model = Fn(forward, **parts).to(device)
    group = channel_groups(model, torch.rand(4, 6, device=device))["a"]
    scaled = take(model, {group: range(5)}, scale={group: [1, 2, 0.5, 1, 4]})
    x = 1e3 * torch.randn(50, 6, device=device)
    torch.testing.assert_close(scaled(x), model(x), rtol=1e-4, atol=1e-2)


def test_an_example_of_zeros_does_not_make_the_check_empty(device):
    """Without biases all outputs are zero then, whatever was edited."""
    model = nn.Sequential(nn.Linear(3, 8, bias=False), nn.Tanh(), nn.Linear(8, 2, bias=False))
    model = model.to(device)
    group = channel_groups(model, torch.zeros(4, 3, device=device))["0"]
    with pytest.raises(ValueError, match="exactly"):
        take(model, {group: range(8)}, scale={group: torch.rand(8) + 0.5})
    narrow = take(model, {group: [0, 5]})
    assert narrow[0].out_features == 2


def test_weights_of_an_rnn_are_joined_once_their_sizes_are_right(monkeypatch, device):
    """cuDNN wants them in one piece, and is told the sizes that the module remembers."""
    joined = []

    def note(self):
        sizes = self.weight_ih_l0.shape[1], self.weight_hh_l0.shape[1]
        assert (self.input_size, self.hidden_size) == sizes
        joined.append(self)

    model, _, pairs = analysed("LSTM", device)
    monkeypatch.setattr(nn.LSTM, "flatten_parameters", note)
    narrow = take(model, {group: some(group.size) for group, _, _ in pairs})
    assert joined[-1] is narrow.rnn
    assert len(joined) > 3  # and the wide copies that verify


def test_channels_that_take_part_in_a_statistic_are_never_silently_removed(device):
    """An average over channels as a gate, a norm of neighbours: another network without some."""

    def average(self, x):
        y = self.a(x)
        return self.b(y * y.mean(1, keepdim=True).sigmoid())

    def local(self, x):
        return self.b(F.local_response_norm(self.a(x), 3))

    def soft(self, x):
        return self.b(self.a(x).softmax(1))

    for forward in (average, local, soft):
        model = Fn(forward, a=conv(3, 8), b=conv(8, 5)).double().to(device)
        x = CASES["residual"].example(device)
        channels = channel_groups(model, x)
        full = copy.deepcopy(model)
        full.b.weight.data[:, [1, 6]] = 0
        for group in channels:
            with contextlib.suppress(Refused):
                narrow = take(model, {group: [0, 2, 3, 4, 5, 7]})
                assert_equal(narrow(x), full(x))


def test_a_buffer_that_the_model_fills_anew_offers_no_channels():
    class Places(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("where", torch.zeros(1, 3))
            self.layer, self.last = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x):
            if len(self.where) != len(x):
                self.where = torch.arange(3.0).expand(len(x), 3)
            return self.last(self.layer(x) + self.where.sum())

    channels = channel_groups(Places(), torch.randn(5, 4))
    assert [group.name for group in channels] == ["layer"]
    (group,) = [
        g for g in channels.frozen for m in g.members if (m.parameter, m.dim) == ("where", 1)
    ]
    assert "buffers" in group.frozen


@pytest.mark.parametrize(
    "cut",
    [
        lambda x: torch.tensor_split(x, indices=(2,), dim=1),
        lambda x: torch.tensor_split(x, (2,), 1),
        lambda x: torch.split(x, split_size_or_sections=[2, 4], dim=1),
        lambda x: x.split(split_size=2, dim=1),
    ],
)
def test_the_numbers_of_a_cut_may_be_given_by_name(cut):
    model = Fn(lambda m, x: m.b(torch.cat(cut(m.a(x)), 1)), a=nn.Linear(4, 6), b=nn.Linear(6, 2))
    model = filled(model).double()
    x = torch.randn(3, 4, dtype=torch.float64)
    channels = channel_groups(model, x)
    assert channels.groups or channels.frozen
    for group in channels:
        order = torch.arange(group.size).flip(0)
        assert_equal(take(model, {group: order})(x), model(x))


class Odd(nn.Module):
    """What a copy has to take along, and what it may not share with the original."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(2, 3, 1)
        self.again, self.rnn = self.layer, nn.LSTM(3, 2)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))
        self.notes = self.same_notes = {}
        self.sizes, self.back = [3, [4]], [self]
        self.register_buffer("loose", torch.ones(1), persistent=False)
        self.register_forward_hook(lambda *_: None)

    def __getstate__(self):
        return super().__getstate__() | {"cache": None}


def test_a_copy_with_other_tensors_is_otherwise_what_deepcopy_makes():
    model = Odd()
    model.layer.weight.requires_grad_(False)
    model.compile()
    made = substitute(model, lambda tensor: tensor + 1)
    expected = copy.deepcopy(model)
    assert list(vars(made)) == list(vars(expected))
    assert [*map(type, made.modules())] == [*map(type, expected.modules())]
    for name, tensor in [*made.named_parameters(), *made.named_buffers()]:
        twin = dict([*expected.named_parameters(), *expected.named_buffers()])[name]
        assert torch.equal(tensor, twin + 1)
        assert (type(tensor), tensor.requires_grad) == (type(twin), twin.requires_grad)
    assert made.again is made.layer
    assert made.rnn._flat_weight_refs[0]() is made.rnn.weight_ih_l0
    assert made.back[0] is made
    assert made.notes is made.same_notes
    assert made.notes is not model.notes
    assert made.sizes[1] is not model.sizes[1]
    assert made.sizes == model.sizes
    assert made.cache is None
    assert len(made._forward_hooks) == 1
    assert made._forward_hooks is not model._forward_hooks
    assert list(made.state_dict()) == list(model.state_dict())
