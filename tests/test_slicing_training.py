"""Slimmable training: the objectives by hand; two processes train to the weights of one."""

import sys
from pathlib import Path

import pytest
import test_distributed
import torch
import torch.nn.functional as F
from torch import nn

from structopt import data, losses
from structopt.slicing import Sandwich, Slice, Slimmable, all_widths
from structopt.training import train

SCRIPT = Path(__file__).parent / "scripts" / "slim_together.py"
sys.path.insert(0, str(SCRIPT.parent))
import slim_together as script  # noqa: E402


def small(device, widths=(0.25, 0.5, 0.75)):
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 4)).double().to(device)
    x = torch.randn(5, 3, dtype=torch.float64, device=device)
    return Slimmable(model, x, widths), x, torch.randint(4, (5,), device=device)


def test_the_sandwich_is_the_sum_written_out(device):
    slimmable, x, y = small(device)
    objective = Sandwich(between=1)
    drawn = objective.drawn(slimmable.widths)
    assert drawn[0] == Slice(0.25)
    assert drawn[1] in (Slice(0.5), Slice(0.75))
    full = slimmable(x)
    expected = F.cross_entropy(full, y)
    for width in drawn:
        log_p = slimmable.extract(width)(x).log_softmax(1)
        expected = expected + F.kl_div(log_p, full.softmax(1), reduction="batchmean")
    found = objective(slimmable, (x, y))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_the_widest_network_gets_no_gradient_as_a_teacher(device):
    slimmable, x, y = small(device, [0.5])
    tail = slimmable.model[0].weight[4:]  # in the widest alone

    def slope(loss):
        return torch.autograd.grad(loss, slimmable.model[0].weight)[0][len(tail) :]

    taught = slope(Sandwich()(slimmable, (x, y)))
    alone = slope(F.cross_entropy(slimmable(x), y))
    torch.testing.assert_close(taught, alone, rtol=1e-12, atol=1e-15)


def test_all_widths_learn_from_the_labels(device):
    slimmable, x, y = small(device)
    expected = sum(F.cross_entropy(slimmable.extract(w)(x), y) for w in (0.25, 0.5, 0.75, 1))
    found = all_widths()(slimmable, (x, y))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_draws_differ_from_batch_to_batch_and_go_on_after_a_pause(device):
    slimmable, x, y = small(device)
    objective, draws = Sandwich(between=1), []
    for _ in range(12):
        draws.append(objective.drawn(slimmable.widths)[1])
        objective(slimmable, (x, y))
    assert set(draws) == {Slice(0.5), Slice(0.75)}
    resumed = Sandwich(between=1)
    resumed.load_state_dict(objective.state_dict())
    assert resumed.drawn(slimmable.widths) == objective.drawn(slimmable.widths)
    assert set(Sandwich(between=9).drawn(slimmable.widths)) == set(slimmable.widths[:-1])
    assert Sandwich(between=0).drawn((Slice(),)) == []


def test_every_width_learns(device):
    """On a linear rule, from the one loop, with a resumed run that ends at the same weights."""
    inputs = torch.randn(64, 3, dtype=torch.float64)
    batches = data.batches(data.Examples(inputs, (inputs.sum(1) > 0).long()), 16)

    def trained(epochs, checkpoint=None):
        torch.manual_seed(1)
        slimmable, _, _ = small(torch.device("cpu"))
        optimizer = torch.optim.AdamW(slimmable.parameters(), lr=0.02)
        for count in epochs:
            train(
                slimmable, batches, Sandwich(between=1), optimizer, epochs=count, device=device,
                autocast=None, checkpoint=checkpoint,
            )  # fmt: skip
        return slimmable

    slimmable = trained([30])
    x, y = inputs.to(device), (inputs.sum(1) > 0).long().to(device)
    for width in slimmable.widths:
        assert (slimmable(x, width=width).argmax(1) == y).double().mean() > 0.9


def test_a_resumed_run_ends_at_the_same_weights(tmp_path):
    states = []
    for name, epochs in (("a", [4]), ("b", [2, 4])):
        for count in epochs:
            slimmable = script.slimmable()
            batches = data.batches(script.examples(33), 8)
            path = tmp_path / name
            script.fit(slimmable, batches, Sandwich(between=1), epochs=count, checkpoint=path)
        states.append(slimmable.state_dict())
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


@pytest.mark.slow
def test_two_processes_give_the_weights_of_one(tmp_path, monkeypatch):
    monkeypatch.setattr(test_distributed, "SCRIPT", SCRIPT)
    monkeypatch.setattr(test_distributed, "script", script)
    test_distributed.torchrun(tmp_path, CUDA_VISIBLE_DEVICES="")
    test_distributed.assert_equals_one_process(tmp_path, "sandwich", "cpu", 1e-10)


def test_what_is_no_slimmable_is_refused():
    batch = torch.ones(2, 3), torch.zeros(2).long()
    for objective in (Sandwich(), all_widths()):
        with pytest.raises(ValueError, match="trains a Slimmable, not a Linear"):
            objective(nn.Linear(3, 2), batch)
    slimmable, x, _ = small(torch.device("cpu"))
    with pytest.raises(ValueError, match="is a pair"):
        Sandwich()(slimmable, x)
    for between in (-1, 1.5, None):
        with pytest.raises(ValueError, match=f"at least 0: {between}"):
            Sandwich(between=between)
    taught = Sandwich(losses.mse, losses.mse)
    assert taught(slimmable, (x, torch.zeros(5, 4, dtype=torch.float64))).ndim == 0
