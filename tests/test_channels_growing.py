"""Channels that are repeated, permuted or scaled, in models that people write."""

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrize import register_parametrization

from structopt.channels import channel_groups, take


def assert_keeps(made, model, x):
    torch.testing.assert_close(made(x), model(x), rtol=1e-10, atol=1e-10)


class Started(nn.Module):
    """A recurrent layer whose state the model makes itself, of a width that it keeps."""

    def __init__(self, start, cell):
        super().__init__()
        self.hidden, self.start = 6, start
        self.layer = nn.GRUCell(3, 6) if cell else nn.RNN(3, 6, 2, batch_first=True)
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        if isinstance(self.layer, nn.RNN):
            state = self.start(self, 2, len(x), self.hidden)
            return self.head(self.layer(x, state)[0].reshape(-1, self.hidden))
        state = self.start(self, len(x), self.hidden)
        for step in x.unbind(1):
            state = self.layer(step, state)
        return self.head(state)


STARTS = {
    "zeros": lambda model, *shape: torch.zeros(*shape, dtype=torch.float64),
    "one tuple": lambda model, *shape: torch.ones(shape, dtype=torch.float64),
    "full": lambda model, *shape: torch.full(shape, 0.5, dtype=torch.float64),
    "of a weight": lambda model, *shape: next(model.parameters()).new_zeros(*shape),
    "by name": lambda model, *shape: torch.zeros(size=shape, dtype=torch.float64),
}


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("cell", [True, False])
def test_a_state_that_the_model_starts_from_grows_with_its_layer(start, cell):
    torch.manual_seed(0)
    model, x = Started(STARTS[start], cell).double(), torch.randn(2, 4, 3, dtype=torch.float64)
    (group,) = channel_groups(model, x)
    for index in ([*range(6), 0, 2], torch.randperm(6)):
        made = take(model, {group: index}, preserve=True)
        assert made.hidden == len(index)
        assert_keeps(made, model, x)


class Counts(nn.Module):
    """A width that also counts whole numbers, which are no channels."""

    def __init__(self):
        super().__init__()
        self.width, self.first, self.last = 6, nn.Linear(3, 6), nn.Linear(6, 2)

    def forward(self, x):
        places = torch.zeros(len(x), self.width, dtype=torch.long).sum(1, keepdim=True)
        return self.last(self.first(x).view(-1, self.width).relu()) + places


def test_whole_numbers_that_are_made_freeze_nothing():
    torch.manual_seed(0)
    model, x = Counts().double(), torch.randn(2, 3, dtype=torch.float64)
    (group,) = channel_groups(model, x)
    made = take(model, {group: [*range(6), 1]}, preserve=True)
    assert made.width == 7
    assert_keeps(made, model, x)


class Attention(nn.Module):
    """Of a scale that does not hang on the width, in a branch that may start from zero."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)
        self.query, self.key, self.value = (nn.Linear(4, 8) for _ in range(3))
        self.out = nn.Linear(8, 4)

    def forward(self, x):
        x = self.first(x)
        scores = self.query(x) @ self.key(x).transpose(1, 2) * 0.3
        return self.last(x + self.out(scores.softmax(-1) @ self.value(x)))


@pytest.mark.parametrize("index", [range(5), [*range(8), *range(8)]])
def test_a_branch_that_starts_from_zero_is_edited_as_it_would_be_later(index):
    torch.manual_seed(0)
    model, x = Attention().double(), torch.randn(2, 5, 3, dtype=torch.float64)
    channels = channel_groups(model, x)
    later = take(model, {channels["query"]: index}, preserve=True)
    nn.init.zeros_(model.out.weight)
    now = take(model, {channels["query"]: index}, preserve=True)
    assert not now.out.weight.any()
    assert not model.out.weight.any()
    now.out.weight.data.copy_(later.out.weight)
    assert_keeps(now, later, x)


class Shared(nn.Module):
    """Divides by its width, and a head that starts from zero hides it."""

    def __init__(self, gain):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 3, padding=1)
        self.gain = nn.Parameter(torch.zeros(4, 1, 1)) if gain else None
        if not gain:
            nn.init.zeros_(self.last.weight)

    def forward(self, x):
        x = self.first(x).relu()
        x = self.last(x / x.shape[1])
        return x if self.gain is None else x * self.gain


@pytest.mark.parametrize("gain", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_what_hangs_on_a_width_is_refused_behind_zeros_too(gain, layout):
    torch.manual_seed(0)
    model = Shared(gain).to(memory_format=layout)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    group = channel_groups(model, torch.randn(1, 3, 4, 4))["first"]
    with pytest.raises(ValueError, match="cannot be edited exactly"):
        take(model, {group: range(4)})
    made = take(model, {group: torch.randperm(8)})  # the width stays
    assert made.last.weight.is_contiguous(memory_format=layout)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


class Adapter(nn.Module):
    """LoRA: a weight and the product of two small ones."""

    def __init__(self, rows, columns):
        super().__init__()
        self.up, self.down = (nn.Parameter(torch.randn(n)) for n in ((rows, 3), (3, columns)))

    def forward(self, weight):
        return weight - 0.5 * (self.up @ self.down)


class Merged(nn.Module):
    """RepVGG: the kernels of two branches are one."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(6, 2, 1)
        self.wide, self.small = nn.Parameter(torch.randn(6, 8, 3, 3)), nn.Conv2d(8, 6, 1)

    def forward(self, x):
        kernel = self.wide + nn.functional.pad(self.small.weight, (1, 1, 1, 1))
        x = nn.functional.conv2d(self.first(x).relu(), kernel, self.small.bias, padding=1)
        return self.last(x.relu())


def adapted():
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))
    register_parametrization(model[2], "weight", Adapter(6, 8))
    return model, torch.randn(4, 3)


@pytest.mark.parametrize("make", [adapted, lambda: (Merged(), torch.randn(2, 3, 5, 5))])
def test_what_reads_a_sum_of_weights_reads_each(make):
    torch.manual_seed(0)
    model, x = make()
    model, x = model.double(), x.double()
    for group in channel_groups(model, x):
        every = range(group.size)
        assert_keeps(take(model, {group: [*every, 0, 2]}, preserve=True), model, x)
        if any(member.reads for member in group.members):
            factors = torch.rand(group.size) + 0.5
            assert_keeps(take(model, {group: every}, scale={group: factors}), model, x)


def test_copies_of_a_channel_take_the_same_factor():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    x = torch.randn(5, 3, dtype=torch.float64)
    group, index = channel_groups(model, x)["0"], [0, 2, 1, 3, 2]
    with pytest.raises(ValueError, match=r"group '0': .* copies of channel 2 different numbers"):
        take(model, {group: index}, preserve=True, scale={group: [1, 3, 1, 1, 2]})
    factors = torch.tensor([1, 3, 0.5, 1, 3], dtype=torch.float64)
    made = take(model, {group: index}, preserve=True, scale={group: factors})
    torch.testing.assert_close(made[0].bias, model[0].bias[index] * factors)
    assert_keeps(made, model, x)


def test_where_a_norm_averages_the_remedy_is_to_repeat_all_alike():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)).double()
    x = torch.randn(5, 3, dtype=torch.float64)
    (group,) = channel_groups(model, x)
    with pytest.raises(ValueError, match=r"group '0' .* repeat each of them equally often"):
        take(model, {group: [0, 1, 2, 3, 3]}, preserve=True)
    made = take(model, {group: [0, 1, 2, 3, 3, 2, 1, 0]}, preserve=True)
    assert_keeps(made, model, x)
