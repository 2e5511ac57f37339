"""What decides whether an edit was exact, by itself: it must not say yes too easily."""

import torch
from torch import nn

from structopt import compression
from structopt.compression.folding import computes_the_same


def changed(model, factor):
    made = nn.Linear(4, 3, dtype=torch.double, device=model.weight.device)
    made.weight.data, made.bias.data = model.weight.data.clone(), model.bias.data.clone()
    made.weight.data[0, 0] *= factor
    return made


def test_it_sees_what_differs_and_no_more(device):
    model = nn.Linear(4, 3, dtype=torch.double, device=device)
    x = torch.zeros(5, 4, device=device)  # only its shape and type count
    assert computes_the_same(model, changed(model, 1 + 1e-15), x)
    assert not computes_the_same(model, changed(model, 1 + 1e-4), x)
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


def test_rated_training_leaves_the_model_alone(device):
    model = nn.Linear(3, 2).to(device)
    before = model.weight.detach().clone()
    rated = compression.prepare_rate(model)
    rated.model.weight.data.add_(1)
    assert torch.equal(model.weight, before)
    made, _ = rated.finish()
    assert made is not rated.model
