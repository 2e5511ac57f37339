"""What each function of the room is given stays as it was; what it makes can be trained."""

import copy

import pytest
import torch
from torch import nn

from structopt.slicing import (
    Averaged,
    Branches,
    EarlyExits,
    Mixed,
    Sandwich,
    Shuffled,
    Slice,
    Slimmable,
    bottleneck,
    choose_threshold,
    cut_points,
    free_attention,
    group_layers,
    measure_layers,
    rotate,
    sort_channels,
    split_stages,
    to_rms_norm,
)


class Writing(nn.Module):
    """Writes to its input, as a normalisation or an nn.ReLU in place does."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True),
            nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Dropout(0.5),
            nn.Conv2d(8, 8, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3),
        )  # fmt: skip

    def forward(self, x):
        x.mul_(2).add_(1)
        return self.body(x)


def exits(model, x):
    return EarlyExits(model, x, ["body.2"])


def chosen(model, x):
    network = exits(model, x)
    choose_threshold(network, [(x.clone(), torch.zeros(len(x)).long())], macs=network.macs(x)[1])
    return network


def sandwiched(model, x):
    slimmable = Slimmable(model, x, [0.25, 0.5])
    Sandwich()(slimmable, (x.clone(), torch.zeros(len(x)).long().to(x.device)))
    return slimmable


MAKES = {
    "a slice": lambda model, x: Slimmable(model, x, [0.5]),
    "a slice that skips": lambda model, x: Slimmable(model, x, [Slice(skip=["body.3"])]),
    "an extract": lambda model, x: Slimmable(model, x, [0.5]).extract(0.5),
    "an extract of another width": lambda model, x: Slimmable(model, x, [0.5]).extract(0.25),
    "calibrated": lambda model, x: Slimmable(model, x, [0.5]).calibrate_([x.clone()]),
    "sorted": sort_channels,
    "branches": lambda model, x: group_layers(model, x, 2, exchange=Branches()),
    "mixed": lambda model, x: group_layers(model, x, 2, exchange=Mixed(1)),
    "averaged": lambda model, x: group_layers(model, x, 2, exchange=Averaged()),
    "shuffled": lambda model, x: group_layers(model, x, 2, exchange=Shuffled()),
    "shuffled by name": lambda model, x: group_layers(model, x, 2, layers=["body.0", "body.3"]),
    "stages": lambda model, x: split_stages(model, x, ["body.2"]),
    "exits": chosen,
}
TELLS = {
    "cut points": cut_points,
    "layers": lambda model, x: measure_layers(model, x, rounds=1),
    "layers in training": lambda model, x: measure_layers(model, x, rounds=1, training=True),
    "macs": lambda model, x: exits(model, x).macs(x),
    "the sandwich": sandwiched,
}


@pytest.mark.parametrize("function", MAKES | TELLS)
@pytest.mark.parametrize("training", [False, True])
def test_what_is_given_stays_as_it_was(function, training, device):
    """But for `Sandwich`, which trains: its own buffers move."""
    model, x = Writing().to(device).train(training), torch.randn(4, 4, 6, 6, device=device)
    twin, given = copy.deepcopy(model), x.clone()
    generator = torch.get_rng_state()
    (MAKES | TELLS)[function](model, x)
    assert torch.equal(x, given)
    assert [m.training for m in model.modules()] == [m.training for m in twin.modules()]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    if function in ("calibrated", "the sandwich"):
        return
    if function not in ("exits", "macs"):  # whose new heads are drawn
        assert torch.equal(torch.get_rng_state(), generator)
    for (name, tensor), before in zip(
        model.state_dict().items(), twin.state_dict().values(), strict=True
    ):
        assert torch.equal(tensor, before), name


@pytest.mark.parametrize("function", MAKES)
def test_what_is_made_in_inference_mode_can_be_trained(function, device):
    model, x = Writing().to(device), torch.randn(4, 4, 6, 6, device=device)
    with torch.inference_mode():
        made = MAKES[function](model, x.clone())
    outputs = made.train()(x.clone())
    total = sum(out.sum() for out in outputs) if isinstance(outputs, tuple) else outputs.sum()
    if isinstance(made, Slimmable):
        total = total + made(x.clone(), width=made.widths[0]).sum()
    total.backward()
    for name, tensor in [*made.named_parameters(), *made.named_buffers()]:
        assert not tensor.is_inference(), name


TURNS = {
    "RMS norms": to_rms_norm,
    "free attention": lambda model, x: free_attention(model),
    "rotated": lambda model, x: rotate(model, x, [x]).model,
    "narrowed": lambda model, x: rotate(model, x, [x]).narrow(0.5),
}


@pytest.mark.parametrize("function", TURNS)
def test_transformers_made_in_inference_mode_can_be_trained(function, device):
    encoder = nn.TransformerEncoderLayer(8, 2, 16, norm_first=True, batch_first=True)
    model = nn.Sequential(nn.Linear(4, 8), encoder, nn.LayerNorm(8), nn.Linear(8, 3)).to(device)
    x = torch.randn(2, 3, 4, device=device)
    with torch.inference_mode():
        made = TURNS[function](model, x.clone())
    made.train()(x).sum().backward()
    assert all(parameter.grad is not None for parameter in made.parameters())


@pytest.mark.parametrize("shape", [(5, 4), (5, 3, 4), (5, 4, 2, 2)])
def test_a_bottleneck_draws_nothing_and_can_be_trained(shape, device):
    values = torch.randn(shape, device=device)
    generator = torch.get_rng_state()
    with torch.inference_mode():
        layers = bottleneck(values.clone(), 2)
    assert torch.equal(torch.get_rng_state(), generator)
    for layer in layers:
        assert not any(parameter.is_inference() for parameter in layer.parameters())
