"""What decides whether an edit was exact, by itself: it must not say yes too easily."""

import pytest
import torch
from torch import nn

from structopt import compression
from structopt.compression.sameness import computes_the_same


def changed(model, factor):
    made = nn.Linear(4, 3, dtype=torch.double, device=model.weight.device)
    made.weight.data, made.bias.data = model.weight.data.clone(), model.bias.data.clone()
    made.weight.data[0, 0] *= factor
    return made


def test_it_sees_what_differs_and_no_more(device):
    model = nn.Linear(4, 3, dtype=torch.double, device=device)
    x = torch.zeros(5, 4, device=device)  # only its shape and type count
    assert computes_the_same(model, changed(model, 1 + 1e-15), x)
    assert not computes_the_same(model, changed(model, 1 + 1e-7), x)
    wider = nn.Linear(4, 1, dtype=torch.double, device=device)
    wider.weight.data.zero_()
    wider.bias.data.zero_()
    model.weight.data.zero_()
    model.bias.data.zero_()
    assert not computes_the_same(model, wider, x), "equal numbers in another shape"
    assert not computes_the_same(model, nn.Linear(7, 3, dtype=torch.double, device=device), x)


def test_every_output_counts_dropout_rests_and_tokens_stay_tokens(device):
    class Two(nn.Module):
        def __init__(self, factor):
            super().__init__()
            self.table = nn.Embedding(6, 4, dtype=torch.double, device=device)
            self.table.weight.data = torch.arange(24.0, dtype=torch.double, device=device).view(
                6, 4
            )
            self.factor, self.drop = factor, nn.Dropout(0.5)

        def forward(self, tokens):
            x = self.drop(self.table(tokens))
            return x, x * self.factor

    tokens = torch.tensor([[0, 5, 3]], device=device)
    assert computes_the_same(Two(1.0), Two(1.0), tokens)
    assert not computes_the_same(Two(1.0), Two(1.1), tokens)


MASK = torch.tensor([0.0, -torch.inf])
PAIRS = {
    "infinities": (lambda y: y + MASK, lambda y: -MASK - y, False),
    "numbers beside infinities": (lambda y: y + MASK, lambda y: 1.1 * y + MASK, False),
    "no numbers at all": (lambda y: 0 * y + MASK.log(), lambda y: 0 * y + MASK.log(), False),
    "whole numbers": (lambda y: y.argmax(1), lambda y: y.argmin(1), False),
    "the same whole numbers": (lambda y: y.argmax(1), lambda y: (2 * y).argmax(1), True),
    "of another type": (lambda y: y.argmax(1), lambda y: y.argmax(1).int(), False),
    "more": (lambda y: y, lambda y: (y, y), False),
    "complex": (torch.fft.rfft, lambda y: torch.fft.rfft(y * (1 + 1e-15)), True),
    "complex apart": (torch.fft.rfft, lambda y: torch.fft.rfft(y).conj() * 1j, False),
    "nothing": (lambda y: y[:0], lambda y: y[:0] + 1, True),
}


@pytest.mark.parametrize("pair", PAIRS)
def test_what_kind_of_numbers_they_make_makes_no_difference(pair):
    class Made(nn.Module):
        def __init__(self, way):
            super().__init__()
            self.way = way

        def forward(self, x):
            return self.way(x)

    first, second, same = PAIRS[pair]
    assert computes_the_same(Made(first), Made(second), torch.zeros(5, 2)) is same


def test_rated_training_leaves_the_model_alone(device):
    model = nn.Linear(3, 2).to(device)
    before = model.weight.detach().clone()
    rated = compression.prepare_rate(model)
    rated.model.weight.data.add_(1)
    assert torch.equal(model.weight, before)
    made, _ = rated.finish()
    assert made is not rated.model
