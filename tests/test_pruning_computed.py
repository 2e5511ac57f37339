"""Weights that other parameters compute: scored as what they are, or refused by name."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from structopt import pruning
from structopt.channels import channel_groups
from structopt.pruning import score

COMPUTED = {
    "weight norm": (nn.utils.parametrizations.weight_norm, "parametrizations.weight.original1"),
    "spectral norm": (nn.utils.parametrizations.spectral_norm, "parametrizations.weight.original"),
    "orthogonal": (nn.utils.parametrizations.orthogonal, "parametrizations.weight.original"),
    "weight norm by hooks": (nn.utils.weight_norm, "weight_v"),
    "spectral norm by hooks": (nn.utils.spectral_norm, "weight_orig"),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
@pytest.mark.parametrize("how", COMPUTED)
def test_a_weight_that_is_computed_is_scored_by_nobody_in_silence(how):
    wrap, original = COMPUTED[how]
    model = nn.Sequential(wrap(nn.Linear(6, 6)), nn.ReLU(), nn.BatchNorm1d(6), nn.Linear(6, 3))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=rf"0.weight is computed from 0.*{original}, and is no"):
        score(model)
    own = [name for name, _ in model[0].named_parameters() if name != "bias"]
    for leave in (["0.weight"], ["0.*"], [f"0.{name}" for name in own]):
        assert list(score(model, leave=leave)) == ["3.weight"]
    assert list(score(model, pruning.batch_norm_scale)) == ["2.weight"]  # which asks for no weight
    with pytest.raises(ValueError, match="no weight to score besides those left alone"):
        score(model[:1], leave=["0.weight"])
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_scales_that_are_computed_are_named_where_scales_are_asked_for():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    parametrize.register_parametrization(model[1], "weight", nn.Softplus())
    assert list(score(model)) == ["0.weight"]
    with pytest.raises(ValueError, match=r"1.weight is computed from 1.parametrizations"):
        score(model, pruning.batch_norm_scale)
    embedded = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Embedding(5, 4)), model[0])
    assert list(score(embedded)) == ["1.weight"], "no embedding is scored, however it is made"


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
@pytest.mark.parametrize("how", ["weight norm", "weight norm by hooks"])
def test_channels_of_a_computed_weight_go_by_the_weight_itself(how, device):
    """Not by the direction that it is made of, whose length means nothing."""
    wrap, original = COMPUTED[how]
    layers = [nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)]
    plain = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2]).to(device)
    model = copy.deepcopy(plain)
    for place in (0, 2):
        wrap(model[place])
        direction = model[place].get_parameter(original)
        with torch.no_grad():
            direction.mul_(torch.logspace(-3, 3, 8, device=device)[:, None])
    x = torch.randn(5, 6, device=device)
    torch.testing.assert_close(model(x), plain(x))
    found = pruning.removal._magnitudes(model, channel_groups(model, x))
    for name, magnitudes in score(plain, leave=["4.weight"]).items():
        torch.testing.assert_close(found[name.replace("weight", original)], magnitudes)
