"""What analysis and check see: modes, containers, masks, copies, what Python mentions."""

import collections
import copy
import inspect
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

from structopt.channels import channel_groups, explain, take
from structopt.channels.verify import difference

INFINITE = -math.inf


@pytest.mark.parametrize("left", [INFINITE, math.nan, torch.finfo(torch.float64).min, -1e30])
def test_what_a_mask_leaves_hides_no_difference(left):
    same, other = torch.tensor([1.0, 2.0, left]), torch.tensor([1.0, 3.0, left])
    assert difference([same], [same.clone()]) == 0
    assert difference([same], [other]) == pytest.approx(0.5)
    assert difference([torch.ones(2), same], [torch.ones(2), other]) == pytest.approx(0.5)
    assert difference([torch.tensor([1.0, 2.0, 0.0])], [same]) > 1
    assert difference([same], [torch.tensor([1.0, 2.0, 0.0])]) >= 0.5


def test_numbers_that_say_nothing_are_no_agreement():
    nothing = torch.full((3,), math.nan)
    assert difference([nothing], [nothing]) == math.inf
    assert difference([torch.tensor([math.nan])], [torch.tensor([-math.inf])]) == math.inf
    assert difference([torch.empty(0)], [torch.empty(0)]) == 0
    assert difference([torch.zeros(3)], [torch.zeros(3)]) == 0


def test_complex_and_sparse_outputs_are_compared_by_their_numbers():
    z = torch.tensor([1 + 1j, 2 - 1j])
    assert difference([z], [z * (1 + 1e-14)]) < 1e-12
    assert difference([z], [z.conj()]) > 0.5
    s = torch.tensor([0.0, 1.0]).to_sparse()
    assert difference([s], [s * 1.5]) == pytest.approx(0.5)


class Policy(nn.Module):
    """Features of the norm √width, written out: no channel may go. Then what is allowed."""

    def __init__(self, fill):
        super().__init__()
        self.a, self.o, self.fill = nn.Linear(8, 12), nn.Linear(12, 4), fill

    def forward(self, x, allowed):
        h = self.a(x)
        h = h / h.norm(dim=-1, keepdim=True) * math.sqrt(h.shape[-1])
        return self.o(h).masked_fill(~allowed, self.fill)


@pytest.mark.parametrize("fill", [INFINITE, math.nan, torch.finfo(torch.float32).min, -1e9])
def test_an_edit_behind_a_mask_is_judged(fill):
    allowed = torch.tensor([True, True, True, False])
    model = Policy(fill).eval()
    channels = channel_groups(model, (torch.randn(2, 8), allowed))
    with pytest.raises(ValueError, match="the outputs differ by"):
        take(model, {channels["a"]: range(6)})


def test_a_model_without_a_finite_number_is_refused():
    model = Policy(math.nan).eval()
    channels = channel_groups(model, (torch.randn(2, 8), torch.zeros(4, dtype=torch.bool)))
    with pytest.raises(ValueError, match="no finite number on the example"):
        take(model, {channels["a"]: range(6)})


class Normed(nn.Linear):
    """Of rows of length one, which a row of zeros has no part in."""

    def forward(self, x):
        return nn.functional.linear(x, self.weight / self.weight.norm(dim=1, keepdim=True))


def test_a_model_that_divides_by_what_goes_is_told_so():
    torch.manual_seed(0)
    model, x = nn.Sequential(Normed(3, 4), nn.Linear(4, 2)), torch.randn(2, 3)
    (group,) = channel_groups(model, x)
    with pytest.raises(ValueError, match=r"without channels, .* divide by the norm of weights"):
        take(model, {group: [0, 1]})
    torch.testing.assert_close(take(model, {group: [1, 0, 3, 2]})(x), model(x))


@dataclass
class Plain:
    y: torch.Tensor


@dataclass(slots=True, frozen=True)
class Slots:
    y: torch.Tensor


class Wrapped(nn.Module):
    def __init__(self, way):
        super().__init__()
        self.a, self.o, self.way = nn.Linear(8, 12), nn.Linear(12, 4), way

    def forward(self, x):
        return self.way(self.o(self.a(x).relu()))


WAYS = {
    "dataclass": Plain,
    "slots": Slots,
    "deque": lambda y: collections.deque([y]),
    "values": lambda y: {"y": y}.values(),
    "frozenset": lambda y: frozenset([y]),
}


@pytest.mark.parametrize("way", WAYS)
def test_outputs_are_found_in_any_container(way):
    model = Wrapped(WAYS[way]).eval()
    channels = channel_groups(model, torch.randn(2, 8))
    assert [group.name for group in channels] == ["a"]
    assert take(model, {channels["a"]: [1, 3]}).o.out_features == 4


@pytest.mark.parametrize("beside", [np.zeros(()), np.zeros(3), range(10**12), "word", b"word"])
def test_what_lies_beside_the_outputs_is_passed_over(beside):
    model = Wrapped(lambda y: (y, beside)).eval()
    channels = channel_groups(model, torch.randn(2, 8))
    assert [group.name for group in channels] == ["a"]
    assert take(model, {channels["a"]: [1, 3]}).o.in_features == 2


@pytest.mark.parametrize("way", [torch.Tensor.tolist, iter, lambda y: y.detach().numpy()])
def test_a_model_whose_outputs_cannot_be_seen_is_refused(way):
    with pytest.raises(ValueError, match="the model returns no tensor"):
        channel_groups(Wrapped(way).eval(), torch.randn(2, 8))


@pytest.mark.parametrize("kind", [Plain, Slots])
def test_an_example_may_be_a_dataclass(kind):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.o = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)

        def forward(self, batch):
            return self.o(self.a(batch.y).relu())

    model, given = Net().eval(), kind(torch.randn(2, 3, 8, 8))
    channels = channel_groups(model, (given,))
    assert take(model, {channels["a"]: [0, 5]}).a.out_channels == 2
    assert given.y.dtype == torch.float32


class Residual(nn.Module):
    """Two layers meet while it trains."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.o = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 2)

    def forward(self, x):
        h = self.a(x).relu()
        r = self.b(h).relu()
        return self.o(r + h if self.training else r)


class Helped(Residual):
    """The same, in a method that forward calls."""

    def forward(self, x):
        return self.o(self.joined(self.a(x).relu()))

    def joined(self, h):
        r = self.b(h).relu()
        return r + h if self.training else r


class Centres(nn.Module):
    """Distances that only training needs, to a buffer."""

    def __init__(self):
        super().__init__()
        self.a, self.o = nn.Linear(8, 16), nn.Linear(16, 2)
        self.register_buffer("centres", torch.rand(2, 16))

    def forward(self, x):
        h = self.a(x).relu()
        y = self.o(h)
        return (y, ((h[:, None] - self.centres) ** 2).sum(-1)) if self.training else y


@pytest.mark.parametrize("kind", [Residual, Helped, Centres])
def test_what_meets_in_training_mode_stays_together(kind):
    model, x = kind().double(), torch.randn(3, 8).double()
    channels = channel_groups(model, x)
    assert len(channels) == 1
    order = torch.randperm(16)
    moved = take(model, dict.fromkeys(channels, order))
    for mode in (True, False):
        torch.testing.assert_close(moved.train(mode)(x), model.train(mode)(x))
    take(model, {group: range(8) for group in channels}).train()(x)


class Noise(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.o = nn.Linear(8, 16), nn.Linear(16, 2)

    def forward(self, x):
        h = self.a(x).relu()
        return self.o(h + torch.randn(len(x), 16) if self.training else h)


def test_a_width_that_training_insists_on_is_frozen():
    assert not channel_groups(Noise(), torch.randn(3, 8)).groups


class Itself(nn.Module):
    def __init__(self):
        super().__init__()
        self.c, self.width = nn.Conv2d(3, 5, 1), 5

    def forward(self, x):
        return self.c(x)

    def __deepcopy__(self, memo):
        return self


class Taught(nn.Module):
    def __init__(self):
        super().__init__()
        self.t, self.o = Itself(), nn.Conv2d(3, 5, 1)

    def forward(self, x):
        return self.o(x) - self.t(x)


def test_a_part_that_gives_itself_when_copied_is_named_and_not_touched():
    model = Taught().train()
    before = [dict(vars(m)) for m in model.modules()]
    with pytest.raises(ValueError, match="t gives itself when it is copied"):
        channel_groups(model, torch.randn(2, 3, 4, 4))
    assert [m.training for m in model.modules()] == [True] * 4
    assert [set(vars(m)) for m in model.modules()] == [set(b) for b in before]
    assert type(model.t.width) is int
    assert not any(vars(p) for p in model.parameters())


class Reads(nn.Module):
    def __init__(self):
        super().__init__()
        self.b, self.o = nn.Linear(8, 12), nn.Linear(12, 8)

    def __setstate__(self, state):
        super().__setstate__(state)
        self.width = self.b.out_features

    def forward(self, x):
        return self.o(self.b(x).relu())


def sequence():
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8))


INNER = {
    "compiled": lambda: torch.compile(sequence(), backend="eager"),
    "traced": lambda: torch.fx.symbolic_trace(sequence()),
    "reads": Reads,
}


@pytest.mark.parametrize("inner", INNER)
def test_parts_that_look_into_their_parts_when_copied(inner):
    model = nn.Sequential(nn.Linear(8, 8), INNER[inner](), nn.Linear(8, 2)).eval().double()
    x = torch.randn(2, 8).double()
    channels = channel_groups(model, x)
    widest = max(channels, key=lambda group: group.size)
    moved = take(model, {widest: torch.randperm(widest.size)})
    with torch.no_grad():
        torch.testing.assert_close(moved(x), model(x))


def test_a_kind_of_parameter_stays():
    class NoDecay(nn.Parameter):
        pass

    model = nn.Linear(8, 4)
    model.scale = NoDecay(torch.rand(4))
    model = nn.Sequential(model, nn.ReLU(), nn.Linear(4, 2))
    channels = channel_groups(model, torch.randn(2, 8))
    made = take(model, {channels["0"]: [0, 1]})
    assert type(made[0].scale) is type(copy.deepcopy(model)[0].scale) is NoDecay


def test_random_numbers_stay_where_they_were():
    class Draws(nn.Linear):
        def forward(self, x):
            torch.rand(3)
            return super().forward(x)

    model, x = nn.Sequential(Draws(8, 4), nn.Linear(4, 2)), torch.randn(2, 8)
    before = torch.get_rng_state()
    channels = channel_groups(model, x)
    take(model, {channels["0"]: [0, 1]})
    explain(model, x)
    assert torch.equal(before, torch.get_rng_state())


def test_complex_weights_are_locked():
    class Fourier(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(8, 8, 3, dtype=torch.cfloat))
            self.i, self.o = nn.Conv1d(2, 6, 1), nn.Conv1d(6, 8, 1)

        def forward(self, x):
            y = torch.fft.rfft(self.o(self.i(x).relu()))[..., :3]
            return torch.fft.irfft(torch.einsum("bix,iox->box", y, self.w), n=x.shape[-1])

    model, x = Fourier(), torch.randn(2, 2, 16)
    channels = channel_groups(model, x)
    assert [group.name for group in channels] == ["i"]
    assert 0 < channels.freedom() < 1
    assert "i" in str(explain(model, x))


class Conj(nn.Module):
    def __init__(self):
        super().__init__()
        self.r, self.i, self.o = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 2)

    def forward(self, x):
        z = torch.complex(self.r(x), self.i(x))
        return self.o((z * z.conj()).real)


class Rounded(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.o = nn.Linear(6, 8), nn.Linear(8, 2)

    def forward(self, x):
        return self.o(torch.fake_quantize_per_tensor_affine(self.a(x), 0.05, 0, -128, 127))


@pytest.mark.parametrize("kind", [Conj, Rounded])
def test_one_number_from_one_number(kind):
    model = kind().eval()
    channels = channel_groups(model, torch.randn(2, 6))
    (group,) = (group for group in channels if group.size == 8)
    assert take(model, {group: [0, 2, 5]}).o.in_features == 3


def test_a_replaced_convolution_may_insist_on_its_groups():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 4, 1))
    insists = model[1].groups
    model[1]._conv_forward = lambda x, w, b: nn.functional.conv2d(x, w, b, groups=insists)
    assert not channel_groups(model, torch.randn(2, 3, 8, 8)).groups


def test_a_width_that_a_list_is_cut_at_is_tried():
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.heads = nn.Linear(8, 6), nn.ModuleList(nn.Linear(6, 4) for _ in range(6))

        def forward(self, x):
            h = self.a(x).relu()
            return torch.cat([self.heads[i](h) for i in range(self.a.out_features)], 1)

    assert not channel_groups(Heads(), torch.randn(2, 8)).groups


def test_numbers_that_are_written_past_the_dispatcher_are_not_the_callers():
    class Decays(nn.Linear):
        def forward(self, x):
            weight = self.weight.data.numpy()
            weight *= 0.9
            return super().forward(x)

    model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), Decays(12, 3)).eval()
    before = copy.deepcopy(model.state_dict())
    channels = channel_groups(model, torch.randn(2, 8))
    take(model, {channels["0"]: range(6)})
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


class Asking(nn.Module):
    """Hands over what its part takes, as models that wrap others do."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x):
        named = inspect.signature(self.first.forward).parameters
        return self.last(self.first(**dict.fromkeys(named, x)))


def test_a_model_may_look_at_what_its_parts_take():
    assert [(g.name, g.size) for g in channel_groups(Asking(), torch.randn(2, 4))] == [("first", 8)]
