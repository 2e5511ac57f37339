"""What `take` verifies: no wrong edit passes, in any type and mode; nothing else moves."""

from __future__ import annotations

import copy
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from channel_networks import CASES, Fn, conv, filled, table
from test_channels_input import Snapshot
from torch import nn

from structopt.channels import channel_groups, edit, keeping, rules, take, verify, widening
from structopt.channels.moving import pointwise
from structopt.channels.rows import rows_of

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def network(dtype=torch.float32, training=False):
    """Three layers that read, a norm with buffers, and channels that travel through a roll."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *[conv(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 8), nn.ReLU(), nn.Flatten()],
        nn.Linear(8 * 25, 4),
    )
    return filled(model).to(dtype).train(training)


def image(dtype=torch.float32):
    return torch.randn(2, 3, 5, 5).to(dtype)


def untouched(model, act):
    before = Snapshot(model)
    try:
        return act()
    finally:
        before.assert_untouched()


# ------------------------------------------------------------------ a wrong edit


def wrong_rows(name):
    """Takes other entries of one axis than those of the channels."""

    def take_others(channels, labels, choice, what=""):
        taken = rows_of(channels, labels, choice, what)
        return taken[::-1].copy() if taken is not None and what.endswith(f" {name}") else taken

    return edit, "rows_of", take_others


def wrong_factors(by):
    """Multiplies the weights of one layer by nearly nothing."""
    right = keeping.factors

    def off(channels, model, edit):
        found = right(channels, model, edit)
        found[channels.axes["3.weight", 1]] *= by
        return found

    return keeping, "factors", off


SABOTAGES = {
    "a maker": wrong_rows("0.weight"),
    "a bias": wrong_rows("0.bias"),
    "a buffer": wrong_rows("1.running_var"),
    "a reader": wrong_rows("3.weight"),
    "a part in a hundred million": wrong_factors(1 + 1e-8),
    "a part in a billion": wrong_factors(1 + 1e-9),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", SABOTAGES)
def test_a_wrong_edit_is_refused(name, dtype, training, monkeypatch):
    model = network(dtype, training)
    channels = channel_groups(model, image(dtype))
    choice = {channels["0"]: [1, 2, 5], channels["3"]: [0, 6]}
    assert take(model, choice)[0].out_channels == 3
    monkeypatch.setattr(*SABOTAGES[name])
    with pytest.raises(ValueError, match="cannot be edited exactly"):
        untouched(model, lambda: take(model, choice))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_wrong_rule_is_refused(dtype, training, monkeypatch):
    """A roll that forgets to move its labels couples channels that are none of one another."""
    find = rules.find
    roll = lambda func: pointwise if "roll" in func._schema.name else find(func)  # noqa: E731
    model = Fn(lambda s, x: s.b(s.a(x).relu().roll(3, 1)), a=conv(3, 8), b=conv(8, 4))
    model = filled(model).to(dtype).train(training)
    narrow = {"a": [0, 3, 4]}
    right = channel_groups(model, image(dtype))
    monkeypatch.setattr(rules, "find", roll)
    wrong = channel_groups(model, image(dtype))
    assert len(right) == 0 or right["a"].members != wrong["a"].members
    with pytest.raises(ValueError, match="cannot be edited exactly"):
        untouched(model, lambda: take(model, {wrong[k]: i for k, i in narrow.items()}))


# ------------------------------------------------------------------ lent weights


def test_weights_that_are_lent_give_what_a_wide_copy_gives(monkeypatch):
    """For every network of the laws; fifteen digits, as the kernels are the same."""
    lent = []
    run = verify._run

    def noted(*args, lend, **options):
        found = run(*args, lend=lend, **options)
        lent.append(lend)
        return found

    monkeypatch.setattr(verify, "_run", noted)
    for name, case in CASES.items():
        model = case.model(torch.device("cpu")).float()
        x = case.example(torch.device("cpu"), dtype=torch.float32)
        channels = channel_groups(model, x)
        for kept in (2, 1):  # the second masks about half
            choice = {channels.number[id(g)]: np.arange(0, g.size, 3 - kept) for g in channels}
            found = verify.reference(channels, model, choice, x)
            with monkeypatch.context() as patch:
                patch.setattr(verify, "lendable", lambda tensor: False)
                expected = verify.reference(channels, model, choice, x)
            assert verify.difference(expected, found) < 1e-14, name
    assert sum(lent) > 0.9 * len(lent)  # torch checks the types of an RNN's itself


@pytest.mark.parametrize("dtype", FLOATS)
def test_what_is_multiplied_is_rounded_once(dtype):
    """In double precision, so that thirds are verified too; what is not multiplied stays."""
    model = network(dtype)
    (group, *_) = channel_groups(model, image(dtype))
    index = [*range(8), 2, 2]
    wide = untouched(model, lambda: take(model, {group: index}, preserve=True))
    assert {t.dtype for t in (*wide.parameters(), wide[1].running_var)} == {dtype}
    assert torch.equal(wide[0].weight, model[0].weight[index])
    share = torch.tensor([1 / (3 if c == 2 else 1) for c in index], dtype=torch.float64)
    thirds = model[3].weight[:, index].double() * share[:, None, None]
    assert torch.equal(wide[3].weight, thirds.to(dtype))
    both = take(model, {group: index}, preserve=True, scale={group: [3.0] * 10})
    at_once = model[3].weight[:, index].double() * (1 / 3.0 * share)[:, None, None]
    torch.testing.assert_close(
        both[3].weight, at_once.to(dtype), rtol=torch.finfo(dtype).eps, atol=0
    )


@pytest.mark.parametrize("training", [False, True])
def test_what_comes_out_is_in_the_mode_and_shares_nothing(training):
    model = network(training=training)
    narrow = take(model, {channel_groups(model, image())["3"]: [0, 6]})
    assert all(m.training == training for m in narrow.modules())
    assert narrow[1].num_batches_tracked == 0  # it was not run itself
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    assert own.isdisjoint(t.untyped_storage().data_ptr() for t in narrow.parameters())
    assert own.isdisjoint(t.untyped_storage().data_ptr() for t in narrow.buffers())


def halves(self, x):
    self.a.weight.data.mul_(0.5)
    return self.b(self.a(x).relu())


def a_view(self, x):
    self.a.weight.detach().squeeze(3).mul_(0.5)
    return self.b(self.a(x).relu())


def in_one_go(self, x):
    torch._foreach_mul_([self.c.weight.detach()], 0.5)
    return self.c(self.b(self.a(x).relu()))


def by_name(self, x):
    torch.mul(self.a.weight.detach(), 0.5, out=self.a.weight.detach())
    return self.b(self.a(x).relu())


def from_a_list(self, x):
    shift = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float32).mul_(2)
    return self.b(self.a(x + shift.reshape(1, 3, 1, 1)).relu())


def in_low_precision(self, x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return self.b(self.a(x).relu())


def asks_for_the_type(self, x):
    assert x.dtype == self.a.weight.dtype
    return self.b(self.a(x.to(self.a.weight.dtype)).relu())


HABITS = [halves, a_view, in_one_go, by_name, from_a_list, in_low_precision, asks_for_the_type]


@pytest.mark.parametrize("forward", HABITS, ids=lambda f: f.__name__)
def test_a_model_with_habits_is_edited_and_left_alone(forward):
    """Some write to their own weights: only copies may change by that."""
    torch.manual_seed(0)
    model = (
        filled(Fn(forward, a=conv(3, 8), b=conv(8, 4), c=conv(4, 2))).requires_grad_(False).eval()
    )
    x = image()
    double = copy.deepcopy(model).double()
    (found,) = untouched(model, lambda: verify.outputs(model, x))
    torch.testing.assert_close(found, double(x.double()), rtol=1e-12, atol=1e-12)
    narrow = untouched(model, lambda: take(model, {channel_groups(model, x)["a"]: [0, 3, 4]}))
    masked = copy.deepcopy(model)
    masked.b.weight[:, [1, 2, 5, 6, 7]] = 0
    torch.testing.assert_close(narrow(x), masked(x))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_what_is_masked_is_zero_whatever_it_was_and_the_rest_is_the_same(dtype, layout, device):
    weight = torch.randn(6, 5, 4, 3).to(dtype).to(device).to(memory_format=layout)
    weight[1], weight[:, 2], weight[..., 0] = torch.nan, torch.inf, -0.0
    before, gone = weight.clone(), torch.zeros(weight.shape, dtype=torch.bool)
    gone[1] = gone[:, 2] = gone[..., 0] = True
    found = widening.masked(weight, [(0, np.array([1])), (1, np.array([2])), (3, np.array([0]))])
    expected = before.to(found.dtype).masked_fill(gone.to(device), 0)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert not found[gone].signbit().any()
    torch.testing.assert_close(weight, before, rtol=0, atol=0, equal_nan=True)


def test_weights_in_the_same_memory_are_masked_each_by_itself():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    model.append(nn.Linear(6, 2))
    model[4].weight.data = model[2].weight.data
    channels = channel_groups(model, torch.randn(3, 4))
    choice = {channels["0"]: [0, 2], channels["2"]: [1, 2, 3], channels["4"]: [5]}
    narrow = untouched(model, lambda: take(model, choice))
    assert torch.equal(narrow[4].weight, model[2].weight[[5]][:, [1, 2, 3]])


def test_a_table_of_the_models_own_is_lent_too():
    """Used directly, in a product and by an operator with several tensors in a list."""
    forward = lambda s, x: F.linear(torch.cat([s.t, s.t * 2]), s.w) + s.l(x)  # noqa: E731
    model = Fn(forward, t=table(1, 8), w=table(4, 8), l=nn.Linear(3, 4))
    model = filled(model)
    channels = channel_groups(model, torch.randn(2, 3))
    narrow = untouched(model, lambda: take(model, {channels["t"]: [0, 5]}))
    assert narrow.t.shape == (1, 2)


# ------------------------------------------------------------------ memory

GROWTH = """
import resource, torch
from torch import nn
from structopt.channels import channel_groups, take
torch.manual_seed(0)
layers = [nn.Linear(1024, 1024, bias=False) for _ in range(16)]
model = nn.Sequential(*layers).eval()
x = torch.randn(2, 1024)
channels = channel_groups(model, x)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before, size = peak(), sum(p.nbytes for p in model.parameters())
narrow = take(model, {group: range(0, 1024, 2) for group in channels})
print((peak() - before) / size)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the unit of ru_maxrss")
def test_no_copy_of_the_model_is_made_in_double_precision():
    """One layer at a time is; beside the result, a quarter of the weights here."""
    said = subprocess.run(
        [sys.executable, "-c", GROWTH], capture_output=True, text=True, check=True
    )
    assert float(said.stdout) < 1, said.stdout


def test_what_is_wide_already_needs_no_lending():
    assert widening.lendable(nn.Parameter(torch.zeros(2, 2)))
    assert not widening.lendable(nn.Parameter(torch.zeros(2, 2, dtype=torch.float64)))
    assert not widening.lendable(torch.zeros(2, 2))  # a buffer: the model may write to it
