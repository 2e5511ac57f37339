"""What bad input gets: an error that names group, layer and remedy, and the model as it was."""

from __future__ import annotations

import copy
import re
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from channel_networks import Attention, Fn, conv, filled
from torch import nn

from structopt.channels import channel_groups, explain, take


def network():
    torch.manual_seed(0)
    return filled(
        nn.Sequential(conv(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(), conv(8, 4))
    )


def example(device="cpu"):
    return torch.randn(2, 3, 5, 5, device=device)


class Snapshot:
    """All that a model is made of, to be compared to the bit after what must not touch it."""

    def __init__(self, model):
        self.model = model
        self.before = self.now()
        self.objects = [id(p) for p in (*model.parameters(), *model.buffers())]
        self.random = torch.get_rng_state()
        self.fast = torch.backends.mha.get_fastpath_enabled()

    def now(self):
        kept = {}
        for name, module in self.model.named_modules():
            for key, value in vars(module).items():
                kept[name, key] = copy.copy(value) if isinstance(value, dict) else value
        values = {k: v.clone() for k, v in self.model.state_dict().items()}
        flags = [(p.requires_grad, p.grad) for p in self.model.parameters()]
        return kept, values, flags

    def assert_untouched(self):
        kept, values, flags = self.now()
        assert kept == self.before[0]
        assert all(torch.equal(values[k], v) for k, v in self.before[1].items())
        assert flags == self.before[2]
        assert [id(p) for p in (*self.model.parameters(), *self.model.buffers())] == self.objects
        assert torch.equal(torch.get_rng_state(), self.random)
        assert torch.backends.mha.get_fastpath_enabled() == self.fast


def refused(model, act, *words):
    """`act` raises a ValueError that says these words, and the model is as it was."""
    before = Snapshot(model)
    with pytest.raises(ValueError) as caught:
        act()
    for word in words:
        assert re.search(word, str(caught.value)), f"{word!r} is not in: {caught.value}"
    assert len(str(caught.value)) < 600
    before.assert_untouched()


INDICES = {
    "out of range": ([0, 8], "has 8 channels, numbered from 0.*no channel 8"),
    "negative": ([-1], "no channel -1"),
    "too large for an integer": ([0, 10**30], "whole numbers from 0 to 7"),
    "repeated": ([0, 1, 1], "repeated.*preserve=True"),
    "empty": ([], "at least one channel has to stay"),
    "nested": ([[0, 1]], "whole numbers from 0 to 7 in one row"),
    "fractions": ([0.5, 1.0], "whole numbers from 0 to 7"),
    "of a floating dtype": (torch.tensor([0.0, 1.0]), "whole numbers.*float32"),
    "a mask of another length": (torch.ones(7, dtype=torch.bool), "bool.*7"),
    "a mask that keeps nothing": (torch.zeros(8, dtype=torch.bool), "at least one"),
    "on another device": (torch.tensor([0, 1], device="meta"), "meta"),
    "a number": (3, "in one row"),
    "nothing": (None, "whole numbers from 0 to 7"),
    "a word": ("abc", "whole numbers from 0 to 7"),
    "a slice": (slice(0, 3), "whole numbers from 0 to 7"),
    "a dict": ({0: 1}, "whole numbers from 0 to 7"),
}


@pytest.mark.parametrize("kind", INDICES)
def test_an_index_that_cannot_be_taken(kind, device):
    model = network().to(device)
    group = channel_groups(model, example(device))["0"]
    index, words = INDICES[kind]
    refused(model, lambda: take(model, {group: index}), "group '0'", words)


@pytest.mark.parametrize("index", [[1, 0, 5], (1, 0, 5), torch.tensor([1, 0, 5])])
@pytest.mark.parametrize("kind", [lambda i: i, lambda i: torch.as_tensor(i).int(), iter])
def test_indices_of_any_kind_that_says_the_same(index, kind, device):
    model = network().to(device)
    group = channel_groups(model, example(device))["0"]
    if kind is iter:
        index = range(3)
        assert torch.equal(take(model, {group: index})[0].weight, model[0].weight[:3])
        mask = torch.arange(8, device=device) < 3
        assert torch.equal(take(model, {group: mask})[0].weight, model[0].weight[:3])
        return
    narrow = take(model, {group: kind(index)})
    assert torch.equal(narrow[0].weight, model[0].weight[[1, 0, 5]])


SCALES = {
    "negative": ([1, -1], "positive"),
    "zero": ([1, 0], "positive"),
    "not a number": ([1, float("nan")], "positive"),
    "infinite": ([1, float("inf")], "positive"),
    "too few": ([1.0], "2 positive numbers"),
}


@pytest.mark.parametrize("kind", SCALES)
def test_factors_that_cannot_scale(kind):
    model = network()
    group = channel_groups(model, example())["0"]
    values, words = SCALES[kind]
    act = lambda: take(model, {group: [0, 1]}, scale={group: values})  # noqa: E731
    refused(model, act, "group '0'", words)
    refused(model, lambda: take(model, {}, scale={group: [1.0] * 8}), "'0'.*not taken")


def test_groups_that_are_none_of_this_model():
    model, wider = network(), nn.Sequential(conv(3, 9, 3), nn.BatchNorm2d(9), conv(9, 4))
    channels, again = channel_groups(model, example()), channel_groups(model, example())
    group, frozen = channels["0"], channels.frozen[0]
    refused(
        wider, lambda: take(wider, {group: [0]}), "group '0' is of another model: here 0.weight"
    )
    refused(model, lambda: take(model, {group: [0], again["0"]: [1]}), "another analysis")
    refused(model, lambda: take(model, {"0": [0]}), "channel_groups", "'0'")
    refused(model, lambda: take(model, [group]), "channel_groups")
    refused(model, lambda: take(model, {}), "no group given")
    refused(model, lambda: take(model, {frozen: [0]}), "is frozen: meets a dimension of fixed size")
    with pytest.raises(KeyError, match=r"no group 'conv9'; there are 0"):
        channels["conv9"]


def test_a_group_of_another_wiring_of_the_same_shapes_is_refused():
    """Nothing but the verification can see it."""
    plain = Fn(lambda s, x: s.b(s.a(x).relu()), a=conv(3, 8), b=conv(8, 5))
    turned = Fn(lambda s, x: s.b(s.a(x).flip(1).relu()), a=conv(3, 8), b=conv(8, 5))
    group = channel_groups(plain, example())["a"]
    refused(turned, lambda: take(turned, {group: [0, 1]}), "group 'a'", "exactly")


EXAMPLES = {
    "too many channels": (torch.zeros(1, 4, 5, 5), "RuntimeError.*expected input.*3 channels"),
    "two tensors": ((torch.zeros(1, 3, 5, 5),) * 2, "takes 2 positional"),
    "an unknown keyword": ({"image": torch.zeros(1, 3, 5, 5)}, "unexpected keyword.*'image'"),
    "nothing": (None, "does not accept"),
    "a number": (3, "does not accept"),
    "another dtype": (torch.zeros(1, 3, 5, 5).double(), "type"),
    "another device": (torch.zeros(1, 3, 5, 5, device="meta"), "meta.*cpu|cpu.*meta"),
}


@pytest.mark.parametrize("act", [channel_groups, explain])
@pytest.mark.parametrize("kind", EXAMPLES)
def test_an_example_that_the_model_does_not_accept(kind, act):
    model = network()
    given, words = EXAMPLES[kind]
    remedy = "device" if kind == "another device" else "a tuple of positional arguments or a dict"
    refused(model, lambda: act(model, given), words, remedy)


def test_models_that_cannot_be_analysed():
    split = nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 2, device="meta"))
    x = torch.zeros(1, 3)
    with pytest.raises(ValueError, match=r"0\.weight.*cpu.*1\.weight.*meta.*one device"):
        channel_groups(split, x)
    with pytest.raises(ValueError, match="run the model once"):
        channel_groups(nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 2)), x)
    with pytest.raises(ValueError, match=r"nn\.Module, not str"):
        channel_groups("model", x)


def test_a_model_whose_output_changes_from_run_to_run():
    always = lambda s, x: s.b(F.dropout(s.a(x), 0.5, training=True))  # noqa: E731
    model = Fn(always, a=conv(3, 8), b=conv(8, 5))
    group = channel_groups(model, example())["a"]
    refused(model, lambda: take(model, {group: [0, 1]}), "'a'", "run to run", "dropout")
    usual = network().train()  # dropout that evaluation turns off is none of our business
    take(usual, {channel_groups(usual, example())["0"]: [0, 1]})


def test_success_leaves_the_model_as_it_was_too(device):
    model = network().to(device).train()
    x = example(device)
    before = Snapshot(model)
    channels = channel_groups(model, x)
    explain(model, x)
    narrow = take(model, {channels["0"]: [0, 1]})
    before.assert_untouched()
    with torch.no_grad():
        for tensor in (*narrow.parameters(), *narrow.buffers()):
            tensor.zero_()
    before.assert_untouched()  # nothing is shared


# ------------------------------------------------------------------ what cannot be done exactly


def test_a_widening_through_a_shuffle_is_refused_by_name():
    model = Fn(lambda s, x: s.b(s.a(x).flip(1)), a=conv(3, 6), b=conv(6, 5))
    group = channel_groups(model, example())["a"]
    act = lambda: take(model, {group: [*range(6), 0]}, preserve=True)  # noqa: E731
    refused(model, act, "group 'a'", r"b\.weight", "shuffled", "not doubled", "leave the group out")


def test_a_roll_over_channels_is_exact_or_refused():
    model = Fn(lambda s, x: s.a(x).roll(2, 1), a=conv(3, 6))
    model = nn.Sequential(model, nn.ReLU(), conv(6, 5)).double()
    group = channel_groups(model, example().double())["0.a"]
    x = example().double()
    narrow = take(model, {group: [0, 4, 5]})  # the two that wrap round stay
    full = copy.deepcopy(model)
    full[2].weight.data[:, [3, 4, 5]] = 0  # where channels 1, 2, 3 arrive
    torch.testing.assert_close(narrow(x), full(x), rtol=1e-10, atol=1e-12)
    refused(model, lambda: take(model, {group: [0, 1, 2]}), "'0.a'", "exactly")


def test_of_several_groups_the_guilty_one_is_named():
    def forward(s, x):
        y = F.normalize(s.b(s.a(x).relu()).sigmoid(), dim=1)  # channels that are gone still count
        return s.c(y)

    model = Fn(forward, a=conv(3, 6), b=conv(6, 8), c=conv(8, 5))
    channels = channel_groups(model, example())
    if "b" in {g.name for g in channels}:
        both = {channels["a"]: range(3), channels["b"]: range(4)}
        refused(model, lambda: take(model, both), "group 'b'", r"b\.weight", "leave the group out")
    take(model, {channels["a"]: range(3)})


class Closed(nn.Module):
    """A width that stands in Python where nothing can reach it."""

    def __init__(self, width=8):
        super().__init__()
        self.a, self.b = nn.Linear(3, width), nn.Linear(width, 2)
        self.shaped = lambda x: x.view(-1, width)

    def forward(self, x):
        return self.b(self.shaped(self.a(x)))


def test_a_width_that_python_hides_is_frozen_with_the_reason():
    model = Closed()
    channels = channel_groups(model, torch.randn(4, 3))
    assert not len(channels)
    assert "fails without some" in channels["a"].frozen
    refused(model, lambda: take(model, {channels["a"]: [0]}), "group 'a' is frozen", "view|shape")


def test_widths_that_attributes_keep_are_edited_or_frozen(device):
    model = nn.Sequential(nn.Linear(3, 8), Attention(), nn.Linear(8, 2)).to(device)
    channels = channel_groups(model, torch.randn(2, 5, 3, device=device))
    heads = next(g for g in channels if g.size == 2)
    narrow = take(model, {heads: [1]})
    assert (narrow[1].num_heads, model[1].num_heads) == (1, 2)
    assert narrow[1].head_dim == 4
    assert narrow[1].qkv.out_features == 12


class Chance(nn.Module):
    """Two numbers that equal a width: forward needs one, as no tensor can tell; none the other."""

    def __init__(self, width=8):
        super().__init__()
        self.depth, self.width = width, width
        self.a, self.b = nn.Linear(3, width), nn.Linear(width, 2)

    def forward(self, x):
        return self.b(self.a(x).relu().view(-1, int(str(self.width))))


def test_an_attribute_that_equals_a_width_by_chance_stays(device):
    model = Chance().to(device)
    (group,) = channel_groups(model, torch.randn(4, 3, device=device))
    narrow = take(model, {group: [1, 4, 5]})
    assert (narrow.width, narrow.depth) == (3, 8)


def test_of_many_groups_the_one_in_the_way_is_named():
    layers = [nn.Linear(4, 4) for _ in range(9)]
    model = nn.Sequential(*layers[:6], nn.Softplus(), *layers[6:])
    channels = channel_groups(model, torch.randn(2, 4))
    every = {g: range(4) for g in channels}
    act = lambda: take(model, every, scale={g: [2.0, 1, 1, 1] for g in channels})  # noqa: E731
    refused(model, act, "^group '5' .*not positively homogeneous: softplus in 6")


def test_an_example_of_one_token_verifies_queries(device):
    """All values are alike then, so that no attention to them shows."""
    from structopt.channels.judging import lively

    model = nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 2)).to(device)
    ids = torch.zeros(2, 6, dtype=torch.long, device=device)
    other = lively(model, {"ids": ids, "mask": ids + 1})
    assert len(other["ids"].unique()) > 3
    assert int(other["ids"].max()) < 11
    assert other["ids"].device == ids.device
    assert torch.equal(other["mask"], ids + 1)
    assert lively(model, other["ids"]) is None


class Experts(nn.Module):
    """Sends each row to the expert of its first number's sign."""

    def __init__(self):
        super().__init__()
        self.read = nn.Linear(3, 8)
        self.experts = nn.ModuleList([nn.Linear(8, 6), nn.Linear(8, 6)])
        self.write, self.free = nn.Linear(6, 7), nn.Linear(7, 2)

    def forward(self, x):
        y, out = self.read(x), x.new_zeros(len(x), self.write.in_features)
        for number, expert in enumerate(self.experts):
            rows = torch.where((x[:, 0] > 0) == bool(number))[0]
            if len(rows):
                out[rows] = expert(y[rows])
        return self.free(self.write(out).relu())


def test_what_an_idle_expert_may_read_is_frozen_with_the_remedy(device):
    """Another input would reach it, and find other channels than it knows."""
    model = Experts().to(device)
    x = torch.randn(4, 3, device=device)
    x[:, 0] = 1
    idle = channel_groups(model, x)
    assert [group.name for group in idle] == ["write"]
    words = r"experts\.0\.weight, which the example does not reach", "give an example that reaches"
    refused(model, lambda: take(model, {idle["read"]: range(4)}), "group 'read' is frozen", *words)
    assert any(words[1] in group.frozen for group in explain(model, x).frozen)
    x[:2, 0] = -1
    every = channel_groups(model, x)
    assert {group.name: group.size for group in every} == {"read": 8, "experts.0": 6, "write": 7}
    turned = take(model, {group: torch.arange(group.size).flip(0) for group in every})
    torch.testing.assert_close(turned(x), model(x))


def test_a_layer_that_no_input_reaches_freezes_nothing_else():
    model = Fn(lambda s, x: s.b(s.a(x)), a=nn.Linear(3, 8), b=nn.Linear(8, 2), c=nn.Linear(8, 8))
    channels = channel_groups(model, torch.randn(2, 3))
    assert [group.name for group in channels] == ["a"]


@pytest.mark.parametrize("used", [False, True])
def test_a_channel_picked_for_its_shape_alone_freezes_nothing(used):
    """As in BART, where one channel tells the positions how long the text is."""

    def run(s, x):
        hidden = s.a(x)
        one = hidden[:, :, -1]
        places = s.places(torch.arange(one.shape[1]))
        return s.b(hidden + places + one[:, :, None] if used else hidden + places)

    parts = {"a": nn.Linear(3, 8), "places": nn.Embedding(5, 8), "b": nn.Linear(8, 2)}
    model, x = filled(Fn(run, **parts)), torch.randn(2, 5, 3)
    channels = channel_groups(model, x)
    if used:
        assert "picks single indices by number: select" in channels["a"].frozen
    else:
        assert take(model, {channels["a"]: range(4)}).places.weight.shape == (5, 4)


def test_a_use_that_a_rule_does_not_foresee_freezes_instead_of_failing():
    def forward(s, x):
        y = s.a(x).contiguous()
        return s.b(y.as_strided(y.shape, y.stride()))

    model = Fn(forward, a=conv(3, 8), b=conv(8, 5))
    channels = channel_groups(model, example())
    assert "as_strided in the model" in channels["a"].frozen


@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_a_model_that_cannot_be_copied_or_edited_is_told_from_a_bad_example():
    import threading

    model = network()
    model.lock = threading.Lock()
    with pytest.raises(ValueError, match=r"cannot be copied: .*lock.*copy\.deepcopy\(model\) work"):
        channel_groups(model, example())
    scripted = torch.jit.trace(network().eval(), example())
    with pytest.raises(ValueError, match=r"compiled by torch\.jit.*made from"):
        channel_groups(scripted, example())


def test_in_inference_mode_too_and_what_comes_out_trains():
    with torch.inference_mode():
        model = network()
        channels = channel_groups(model, example())
        narrow = take(model, {channels["0"]: [0, 1, 5]})
    narrow(example()).sum().backward()
    assert all(p.grad is not None for p in narrow.parameters())


class Pair(NamedTuple):
    image: torch.Tensor
    scale: float


def test_an_example_with_named_tuples():
    model = Fn(lambda s, p: Pair(s.b(s.a(p.image) * p.scale), 1.0), a=conv(3, 8), b=conv(8, 2))
    (group,) = channel_groups(model, (Pair(example(), 2.0),))
    assert take(model, {group: range(3)}).a.out_channels == 3
