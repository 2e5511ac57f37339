"""Products of smaller layers: exact at full rank, the nearest below it, within a budget."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from structopt import checkpoint, compression
from structopt.compression import SVD, Depthwise, Energy, Error, Spatial, Tucker, Weights
from structopt.networks import LeNet5, LeNet300

FORMS = [SVD(), Spatial(), Depthwise(), Tucker()]


def convolution(kernel=(3, 3), stride=(1, 1), padding=(1, 0), dilation=(1, 1), bias=True):
    return nn.Conv2d(4, 6, kernel, stride, padding, dilation, bias=bias).double()


@pytest.mark.parametrize("form", FORMS, ids=str)
@given(
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.tuples(st.integers(1, 2), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 1)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    bias=st.booleans(),
)
@settings(max_examples=15)
def test_exact_at_full_rank(form, kernel, stride, padding, dilation, bias):
    layer = convolution(kernel, stride, padding, dilation, bias)
    full = form.full(layer.weight.shape)
    made = compression.factorize(nn.Sequential(layer), {"0": full}, form=form)
    x = torch.randn(2, 4, 9, 10).double()
    torch.testing.assert_close(made(x), layer(x))
    weights = sum(p.numel() for n, p in made.named_parameters() if "weight" in n)
    assert weights == form.numbers(layer.weight.shape, full)


@pytest.mark.parametrize("form", [SVD(), Tucker(), Spatial()], ids=str)
def test_a_linear_layer_at_full_rank_on_its_device_in_its_type(form, device):
    layer = nn.Linear(5, 7).to(device)
    made = compression.factorize(layer.eval(), {"": form.full(layer.weight.shape)}, form=form)
    x = torch.randn(3, 5, device=device)
    torch.testing.assert_close(made(x), layer(x), rtol=1e-4, atol=1e-5)
    assert not made.training
    assert {p.dtype for p in made.parameters()} == {torch.float32}


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_padding_in_words(padding):
    layer = nn.Conv2d(4, 6, (3, 5), padding=padding, dilation=(2, 1)).double()
    x = torch.randn(2, 4, 12, 12).double()
    for form in FORMS:
        full = form.full(layer.weight.shape)
        made = compression.factorize(nn.Sequential(layer), {"0": full}, form=form)
        torch.testing.assert_close(made(x), layer(x))
    with pytest.raises(ValueError, match="even size"):
        compression.factorize(nn.Sequential(nn.Conv2d(1, 4, 2, padding="same")), {"0": 1})


def whole(product, shape):
    """The weight that a product has, from what it makes of one pixel at a time."""
    inside = torch.eye(shape[1] * shape[2] * shape[3], dtype=torch.double)
    made = product(inside.view(-1, *shape[1:]))  # (I kh kw, O, 1, 1)
    return made[..., 0, 0].T.reshape(shape)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_what_is_lost_is_what_the_spectrum_says(form):
    layer = convolution(padding=(0, 0), bias=False)
    model = nn.Sequential(layer)
    spectrum = compression.spectra(model, form)["0"]
    assert [len(s) for s in spectrum] == list(form.full(layer.weight.shape))
    for values in spectrum:
        torch.testing.assert_close(values.square().sum(), layer.weight.detach().square().sum())
    for rank in range(1, min(form.full(layer.weight.shape))):
        ranks = (rank,) * len(spectrum)
        made = compression.factorize(model, {"0": ranks}, form=form)
        lost = (whole(made, layer.weight.shape) - layer.weight).square().sum().detach()
        tails = [s[rank:].square().sum() for s in spectrum]
        if len(spectrum) == 1:
            torch.testing.assert_close(lost, tails[0])
        else:  # Tucker: between the larger tail and their sum
            assert max(tails) * (1 - 1e-9) <= lost <= sum(tails) * (1 + 1e-9)


def test_rounds_bring_tucker_nearer():
    layer = convolution(padding=(0, 0), bias=False)
    lost = []
    for rounds in 0, 1, 5:
        made = compression.factorize(nn.Sequential(layer), {"0": (2, 2)}, form=Tucker(rounds))
        lost.append(float((whole(made, layer.weight.shape) - layer.weight).detach().square().sum()))
    assert lost[0] > lost[1] > lost[2]


@pytest.mark.parametrize("conv", [False, True])
def test_with_inputs_known_no_product_of_that_rank_is_nearer(conv, device):
    draw = torch.Generator().manual_seed(3)
    mix = torch.randn(12, 12, generator=draw, dtype=torch.double).to(device)
    if conv:
        model = nn.Sequential(nn.Conv2d(12, 9, 1)).double().to(device)
        x = torch.randn(6, 12, 5, 5, generator=draw, dtype=torch.double).to(device)
        x = torch.einsum("bihw,ij->bjhw", x, mix)
    else:
        model = nn.Sequential(nn.Linear(12, 9)).double().to(device)
        x = torch.randn(150, 12, generator=draw, dtype=torch.double).to(device) @ mix
    columns = x.movedim(1, 0).flatten(1)
    outputs = model[0].weight.detach().flatten(1) @ columns
    for rank in 1, 3, 6:
        lost = [
            (compression.factorize(model, {"0": rank}, batches=b)(x) - model(x)).square().sum()
            for b in ([x], None)
        ]
        best = torch.linalg.svdvals(outputs)[rank:].square().sum()  # Eckart-Young for the outputs
        torch.testing.assert_close(lost[0].detach(), best, rtol=1e-3, atol=0)
        assert lost[0] < lost[1]
    spectrum = compression.spectra(model, batches=[x])["0"][0]
    torch.testing.assert_close(spectrum[:9], torch.linalg.svdvals(outputs), rtol=1e-3, atol=1e-3)


def test_one_direction_may_outweigh_all_others_by_far():
    """As the mean does in what a ReLU makes; all numbers are in single precision."""
    x = torch.rand(4, 512) + 3
    model = nn.Sequential(nn.Linear(512, 64))
    made = compression.factorize(model, {"0": 5}, batches=[x])
    torch.testing.assert_close(made(x), model(x), rtol=1e-3, atol=1e-3)
    total = compression.spectra(model, batches=[x])["0"][0].square().sum()
    outputs = (x.double() @ model[0].weight.detach().double().T).square().sum()
    torch.testing.assert_close(total, outputs, rtol=1e-3, atol=0)


def test_ranks_by_energy_and_by_error():
    u, _ = torch.linalg.qr(torch.randn(40, 20).double())
    v, _ = torch.linalg.qr(torch.randn(30, 20).double())
    values = torch.tensor([8.0, 4.0, 2.0, 1.0] + [0.0] * 16).double()
    model = nn.Sequential(nn.Linear(30, 40).double())
    with torch.no_grad():
        model[0].weight.copy_(u * values @ v.T)
    energies = values.square().cumsum(0) / 85
    for rank in 1, 2, 3, 4:
        for target in (
            Energy(float(energies[rank - 1]) - 1e-6),
            Error(float((1 - energies[rank - 1]).clamp(min=0).sqrt()) + 1e-6),
        ):
            made = compression.factorize(model, target)
            assert made[0][0].out_features == rank, target
    assert compression.factorize(model, Energy(1.0))[0][0].out_features == 4
    assert isinstance(
        compression.factorize(nn.Sequential(nn.Linear(9, 9)), Error(0.0))[0], nn.Linear
    )


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("share", [0.1, 0.3, 0.7])
def test_a_budget_is_kept_and_used(form, share):
    model = LeNet5()
    dense = sum(p.numel() for p in model.parameters() if p.ndim > 1)
    if isinstance(form, Depthwise) and share < 0.98:  # a linear layer has no depthwise form
        with pytest.raises(ValueError, match="out of reach: with every rank 1"):
            compression.factorize(model, Weights(share), form=form)
        return
    made = compression.factorize(model, Weights(share), form=form)
    used = sum(p.numel() for p in made.parameters() if p.ndim > 1)
    assert used <= share * dense
    assert used > 0.97 * share * dense
    assert made(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


def test_the_budget_goes_where_least_is_lost():
    model = LeNet300()
    with torch.no_grad():  # the first layer has rank 5, the second is white
        model.fc1.weight.copy_(torch.randn(300, 5) @ torch.randn(5, 784))
    made = compression.factorize(model, Weights(0.14))
    assert made.fc1[0].out_features == 5
    assert isinstance(made.fc2, nn.Linear), "where a product would be no smaller, the layer stays"


def test_of_values_worth_the_same_the_cheaper_ones_are_kept():
    """Both layers have ten equal singular values; one of the small layer costs a tenth."""
    model = nn.ModuleDict({"wide": nn.Linear(200, 200), "little": nn.Linear(20, 20)}).double()
    with torch.no_grad():
        for layer in model.values():
            size = len(layer.weight)
            q = torch.linalg.qr(torch.randn(size, 10).double()).Q
            layer.weight.copy_(q @ torch.linalg.qr(torch.randn(size, 10).double()).Q.T)
    made = compression.factorize(model, Weights(0.045))  # 1,818 weights; rank 1 of the wide: 400
    assert made["wide"][0].out_features == 3
    assert isinstance(made["little"], nn.Linear), "at rank 10 a product is no smaller: whole, exact"


def test_the_model_given_is_untouched_and_the_file_knows_the_product(tmp_path):
    model = LeNet300()
    before = copy.deepcopy(model.state_dict())
    made = compression.factorize(model, Weights(0.5))
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())
    checkpoint.save(made, tmp_path / "x")
    x = torch.randn(3, 1, 28, 28)
    assert torch.equal(checkpoint.load(tmp_path / "x", LeNet300())(x), made(x))
    compression.save(made, tmp_path / "y")
    assert torch.equal(compression.load(tmp_path / "y", LeNet300())(x), made(x))


def test_bad_input_is_named():
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.Linear(4, 4))
    with pytest.raises(ValueError, match=r"'0' is no linear .* without groups .*; those are 1"):
        compression.factorize(model, {"0": 1})
    for rank in 0, 5, (1, 1), 2.0, "2":
        with pytest.raises(ValueError, match=r"SVD\(\) of 1 has ranks from 1 to \(4,\), not"):
            compression.factorize(model, {"1": rank})
    assert compression.factorize(model, {"1": np.int64(2)})[1][0].out_features == 2
    with pytest.raises(ValueError, match="Depthwise is for Conv2d"):
        compression.factorize(model, {"1": 1}, form=Depthwise())
    with torch.no_grad():
        model[1].weight[0, 0] = torch.inf
    with pytest.raises(ValueError, match="1: 1 of 16 numbers are NaN or infinite"):
        compression.factorize(model, Energy(0.5))
    for wrong in (lambda: Energy(0), lambda: Error(1), lambda: Weights(1.5)):
        with pytest.raises(ValueError):
            wrong()


def test_attention_and_fused_layers_go_on_running():
    block = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval()
    x = torch.randn(2, 5, 32)
    made = compression.factorize(block, {"linear1": 32, "linear2": 32}).eval()
    with torch.no_grad():
        torch.testing.assert_close(made(x), block(x), rtol=1e-4, atol=1e-5)
        half = compression.factorize(block, Weights(0.5))(x)  # without the attention's own layers
    assert half.shape == x.shape


def test_padding_that_is_not_zeros_is_left_alone():
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect"), nn.Linear(4, 4))
    assert list(compression.spectra(model)) == ["1"]


def test_a_budget_is_shared_alike_however_large_the_weights_of_a_layer():
    model = nn.Sequential(nn.Linear(12, 10), nn.Linear(10, 8))
    larger = copy.deepcopy(model)
    larger[1].weight.data *= 1000
    shapes = [
        [part.weight.shape for part in compression.factorize(each, Weights(0.6)).modules()
         if isinstance(part, nn.Linear)]
        for each in (model, larger)
    ]  # fmt: skip
    assert shapes[0] == shapes[1]
    assert len(shapes[0]) > 2


def test_rounds_of_tucker_lose_less_than_the_unfoldings_alone():
    torch.manual_seed(0)
    model, lost = nn.Sequential(nn.Conv2d(8, 9, 3, bias=False)), []
    x = torch.eye(8 * 9).view(8 * 9, 8, 3, 3)  # what it makes of these is its weight
    for form in Tucker(rounds=0), Tucker():
        made = compression.factorize(model, {"0": (3, 3)}, form=form)
        lost.append((made(x) - model(x)).norm().item())
    assert lost[1] < 0.999 * lost[0]


def test_a_weight_that_others_share_is_never_parted_from_them():
    """The other would keep it whole: the network would grow."""

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.read = nn.Embedding(30, 12), nn.Linear(12, 12)
            self.head = nn.Linear(12, 30, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, words):
            return self.head(self.read(self.embed(words)))

    model = Tied()
    made = compression.factorize(model, Weights(0.2))
    assert made.head.weight is made.embed.weight
    assert isinstance(made.read, nn.Sequential)
    with pytest.raises(ValueError, match=r"'head'.*shares its weight with no other.*read"):
        compression.factorize(model, {"head": 2})
