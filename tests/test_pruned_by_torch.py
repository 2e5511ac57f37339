"""Models under torch.nn.utils.prune, whose weights a hook computes: served, or refused by name."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from structopt import compression, distillation, pruning, slicing
from structopt.compression import Energy, Grid
from structopt.compression.convert_trial import without_simulation
from structopt.training import supervised, train
from structopt.training.copying import copied


def pruned(device):
    """As after a step of training: the weight that lies there has a history, and is out of date."""
    layers = [nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 6)]
    model = nn.Sequential(*layers, nn.ReLU(), nn.Linear(6, 3)).to(device)
    for layer in model[0], model[4]:
        prune.random_unstructured(layer, "weight", 0.5)
    x = torch.randn(5, 2, 6, 6, device=device)
    model(x).square().sum().backward()
    torch.optim.SGD(model.parameters(), 1e-3).step()
    return model.eval(), x


def permanent(model):
    made = copied(model)
    for layer in made[0], made[4]:
        prune.remove(layer, "weight")
    return made


def test_a_copy_is_the_same_network_with_weights_of_its_own(device):
    model, x = pruned(device)
    with pytest.raises(RuntimeError, match="deepcopy protocol"):
        copy.deepcopy(model)
    model.probe = torch.ones(1, requires_grad=True)  # of the user's own, no parameter
    made = copied(model)
    assert made.probe is not model.probe
    assert made.probe.requires_grad
    assert not made[0].weight.requires_grad
    assert made[0].weight.data_ptr() != model[0].weight.data_ptr()
    expected = model(x)
    torch.testing.assert_close(made(x), expected)
    torch.testing.assert_close(permanent(model)(x), expected)
    for parameter in model.parameters():
        parameter.data.zero_()
    torch.testing.assert_close(made(x), expected)
    assert (made[0].weight == 0).float().mean() == pytest.approx(0.5, abs=0.02)


SERVED = {
    "merged": lambda m, x: compression.merge_layers(m, x),
    "blended": lambda m, x: compression.blend_activations(m, ["2"], 0.5),
    "rounded": lambda m, x: compression.round_inputs(m, Grid(4, symmetric=False)),
    "smoothed": lambda m, x: compression.smooth_inputs(m, [x]),
    "clipped": lambda m, x: compression.clip_activations(m, [x], Grid(3, symmetric=False)).model,
    "skipping": lambda m, x: compression.skip_zeros(m, [x], rounds=1, at_least=0).model,
    "folded": lambda m, x: compression.fold_batch_norms(m, x),
    "separated": lambda m, x: compression.separate_activations(m, x),
    "staged": lambda m, x: slicing.split_stages(m, x, ["2"]),
    "taught": lambda m, x: distillation.MovingTeacher(m).model,
}


@pytest.mark.filterwarnings("ignore:batch norms that stay")  # behind a weight that is computed
@pytest.mark.parametrize("name", SERVED)
def test_what_is_made_of_it_is_what_is_made_of_the_permanent_one(name, device):
    model, x = pruned(device)
    expected = SERVED[name](permanent(model), x)
    made = SERVED[name](model, x)
    torch.testing.assert_close(made(x), expected(x), rtol=1e-4, atol=1e-5)


def test_kernels_get_the_weight_that_the_hook_would_compute(device):
    model, _ = pruned(device)
    made = without_simulation(model)
    assert torch.equal(made[4].weight, permanent(model)[4].weight)
    assert not made[4]._forward_pre_hooks


def test_diagnoses_do_not_stop_at_it(device):
    model, x = pruned(device)
    batches = [(x, torch.arange(5, device=device) % 3)]
    twins = model.train(), permanent(model).train()
    found = [str(distillation.diagnose(m, batches, batches)) for m in twins]
    assert "in training mode" in found[0]
    assert found[0] == found[1]
    found = [pruning.diagnose(twins[1], m, x, batches, batches=batches) for m in twins]
    assert found[0] == found[1]


def test_an_average_of_it_stays_pruned(device):
    model, x = pruned(device)
    batches = [(x, torch.arange(5, device=device) % 3)] * 4
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    averaged = train(
        model, batches, supervised(), optimizer, epochs=1, device=device, average=0.9
    ).averaged
    averaged(x)
    assert bool((averaged[0].weight[model[0].weight_mask == 0] == 0).all())
    assert not torch.equal(averaged[0].weight_orig, model[0].weight_orig)


@pytest.mark.parametrize(
    "edit",
    [
        lambda m, x: compression.gptq_weights(m, [x], Grid(4)),
        lambda m, x: compression.factorize(m, Energy(0.5)),
        lambda m, x: compression.factorize(m, {"4": 1}),
        lambda m, x: compression.spectra(m),
        lambda m, x: pruning.prune_and_update(m, [x], 0.75),
    ],
)
def test_what_would_rewrite_its_weights_is_refused(edit, device):
    model, x = pruned(device)
    words = r"[04].* computed from other parameters: torch.nn.utils.prune.remove or"
    with pytest.raises(ValueError, match=words):
        edit(model, x)
    assert isinstance(compression.factorize(model, {"6": 1})[6], nn.Sequential), "its own weight"
