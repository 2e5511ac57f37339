"""`Descent` is an optimiser of torch in every respect that a training loop relies on."""

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn

from structopt import descent

RULES = [
    descent.gradient(0.05),
    descent.chain(descent.clip_norm(1.0), descent.momentum(0.05)),
    descent.rmsprop(0.01),
    descent.adamw(0.01),
    descent.lion(0.001),
]


def network(device: torch.device) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 16, 3)
    ).to(device)


def fit(net: nn.Module, optimizer: torch.optim.Optimizer, seeds: range) -> None:
    device = next(net.parameters()).device
    for seed in seeds:
        images = torch.randn(8, 4, 6, 6, generator=torch.Generator().manual_seed(seed)).to(device)
        optimizer.zero_grad()
        net(images).square().mean().backward()
        optimizer.step()


def same(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_resumed_run_equals_an_uninterrupted_one(
    rule: descent.Rule, layout: torch.memory_format, device: torch.device
) -> None:
    whole = network(device).to(memory_format=layout)
    fit(whole, descent.Descent(whole.parameters(), rule), range(8))

    first = network(device).to(memory_format=layout)
    optimizer = descent.Descent(first.parameters(), rule)
    fit(first, optimizer, range(4))
    saved = optimizer.state_dict()
    for entry in saved["state"].values():  # as a file gives it back: memory in plain order
        entry.update({name: value.clone().contiguous() for name, value in entry.items()})
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)

    second = network(device).to(memory_format=layout)
    second.load_state_dict(first.state_dict())
    again = descent.Descent(second.parameters(), rule)
    again.load_state_dict(torch.load(file, weights_only=True))
    for p in second.parameters():
        for value in again.state[p].values():
            assert value.shape == () or value.stride() == p.stride()
    fit(second, again, range(4, 8))
    assert same(whole, second)


def test_groups_have_their_own_rate_and_rule(device: torch.device) -> None:
    a, b, c = (nn.Parameter(torch.ones(2, device=device)) for _ in range(3))
    groups = [
        {"params": [a]},
        {"params": [b], "lr": 0.5},
        {"params": [c], "rule": descent.lion(0.25)},
    ]
    optimizer = descent.Descent(groups, descent.gradient(0.1))
    (2 * (a + b + c)).sum().backward()
    optimizer.step()
    for p, value in [(a, 0.8), (b, 0.0), (c, 0.75)]:
        torch.testing.assert_close(p.detach(), torch.full_like(p, value))
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.5, 0.25]


def test_muon_and_adamw_share_a_network(device: torch.device) -> None:
    net = network(device)
    groups = descent.by_shape(net, matrices=descent.muon(0.02), others=descent.adamw(0.01))
    optimizer = descent.Descent(groups)
    before = copy.deepcopy(net)
    fit(net, optimizer, range(1))
    for old, new in zip(before.parameters(), net.parameters(), strict=True):
        assert not torch.equal(old, new)
    held = {len(optimizer.state[p]) for p in net.parameters() if p.ndim >= 2}
    assert held == {1}  # one mean each, against Adam's three tensors


def test_torch_schedulers_drive_it() -> None:
    weight = nn.Parameter(torch.tensor([1.0]))
    optimizer = descent.Descent([weight], descent.gradient(1.0))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    for _ in range(3):
        weight.grad = torch.tensor([0.1])
        optimizer.step()
        scheduler.step()
    torch.testing.assert_close(weight.detach(), torch.tensor([1 - 0.1 - 0.05 - 0.025]))


def test_a_gradient_scaler_skips_an_overflow_and_goes_on(device: torch.device) -> None:
    weight = nn.Parameter(torch.ones(3, device=device))
    optimizer = descent.Descent([weight], descent.momentum(0.1))
    scaler = torch.amp.GradScaler(device.type, init_scale=1024.0)
    for factor, moved in [(float("inf"), False), (1.0, True)]:
        before = weight.detach().clone()
        optimizer.zero_grad()
        scaler.scale((factor * weight).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(before, weight) != moved
    torch.testing.assert_close(weight.detach(), torch.full_like(weight, 0.9))
    assert scaler.get_scale() == 512.0


def test_a_closure_is_run_with_gradients_and_its_loss_handed_back() -> None:
    weight = nn.Parameter(torch.tensor(3.0))
    optimizer = descent.Descent([weight], descent.gradient(0.5))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = weight**2
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 9.0
    assert weight.item() == 0.0


def test_a_parameter_without_gradient_is_left_alone_and_starts_its_own_count() -> None:
    late, early = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    optimizer = descent.Descent([late, early], descent.adam(0.1))
    early.grad = torch.ones(1)
    optimizer.step()
    assert late.item() == 1.0
    late.grad = torch.ones(1)
    optimizer.step()
    assert optimizer.state[late]["step"].item() == 1
    assert optimizer.state[early]["step"].item() == 2
    assert late.item() == pytest.approx(0.9)  # Adam's first step is the learning rate


def test_copies_and_pickles_keep_the_rule() -> None:
    weight = nn.Parameter(torch.ones(2))
    optimizer = descent.Descent([weight], descent.momentum(0.1))
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        (p,) = twin.param_groups[0]["params"]
        p.grad = torch.ones(2)
        twin.step()
        torch.testing.assert_close(p.detach(), torch.full((2,), 0.9))
    assert torch.equal(weight, torch.ones(2))


def test_bfloat16_counts_beyond_256_after_a_resume() -> None:
    weight = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    optimizer = descent.Descent([weight], descent.adam(1e-4))
    for _ in range(300):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    again = descent.Descent([weight], descent.adam(1e-4))
    again.load_state_dict(optimizer.state_dict())
    assert again.state[weight]["step"].item() == 300


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_gradient_that_is_not_finite_changes_nothing_and_is_named(
    bad: float, device: torch.device
) -> None:
    net = nn.Linear(2, 2).to(device)
    before = copy.deepcopy(net)
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    net.bias.grad[1] = bad
    groups = [{"params": [("weight", net.weight)]}, {"params": [("bias", net.bias)]}]
    with pytest.raises(
        FloatingPointError, match=r"bias of group 1, shape \(2,\).*no weight was changed"
    ):
        descent.Descent(groups, descent.momentum(0.1)).step()
    assert same(net, before)
    descent.Descent(groups, descent.momentum(0.1), check_finite=False).step()
    assert not net.bias[1].isfinite()


def test_bad_parameters_are_named() -> None:
    weight, rule = nn.Parameter(torch.ones(2)), descent.gradient(0.1)
    for params, given_rule, words in [
        ([], rule, "model.parameters"),
        (nn.Linear(2, 2), rule, "not a Linear"),
        (weight, rule, "not a Parameter"),
        ([weight], None, "needs a rule"),
        ([weight], descent.clip_norm(1.0), "no learning rate"),
        ([{"params": [weight], "lr": -1.0}], rule, "lr=-1.0"),
        (nn.LazyLinear(3).parameters(), rule, "run the model once"),
        ([nn.Parameter(torch.ones(2, dtype=torch.complex64))], rule, "real"),
    ]:
        with pytest.raises(ValueError, match=words):
            descent.Descent(params, given_rule)


def test_sparse_gradients_are_refused() -> None:
    table = nn.Embedding(5, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="sparse=False"):
        descent.Descent(table.parameters(), descent.gradient(0.1)).step()


def test_a_state_that_does_not_fit_is_refused() -> None:
    def stepped(shape: tuple[int, ...], rule: descent.Rule) -> descent.Descent:
        weight = nn.Parameter(torch.ones(shape))
        weight.grad = torch.ones(shape)
        optimizer = descent.Descent([weight], rule)
        optimizer.step()
        return optimizer

    saved = stepped((2, 3), descent.momentum(0.1)).state_dict()
    with pytest.raises(ValueError, match=r"velocity.*momentum.*adam"):
        stepped((2, 3), descent.adam(0.1)).load_state_dict(saved)
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(2, 2\)"):
        stepped((2, 2), descent.momentum(0.1)).load_state_dict(saved)
    loaded = stepped((2, 3), descent.nesterov(0.7))  # the same memory: a change of mind
    loaded.load_state_dict(saved)
    assert loaded.param_groups[0]["lr"] == 0.1
    assert loaded.param_groups[0]["rule"] == "nesterov(lr=0.7, beta=0.9)"


def test_fused_adamw_equals_adamw_and_spares_biases(device: torch.device) -> None:
    ours, theirs = network(device), network(device)
    decayed = [p for p in theirs.parameters() if p.ndim >= 2]
    spared = [p for p in theirs.parameters() if p.ndim < 2]
    plain = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.3}, {"params": spared, "weight_decay": 0.0}], lr=0.01
    )
    fused = descent.fused_adamw(ours, 0.01, weight_decay=0.3)
    for _ in range(5):
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        fused.step()
        plain.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    with pytest.raises(ValueError, match="ReLU"):
        descent.fused_adamw(nn.ReLU(), 0.01)


def test_an_empty_parameter_is_stepped_over() -> None:
    """As a layer whose channels were all removed has one; torch's optimisers allow it too."""
    found = []
    for ours in (True, False):
        params = [nn.Parameter(torch.ones(0, 2)), nn.Parameter(torch.tensor([1.0, -2.0]))]
        rule = descent.chain(descent.clip_norm(10.0), descent.adam(0.1))
        optimizer = descent.Descent(params, rule) if ours else torch.optim.Adam(params, lr=0.1)
        torch.cat([p.square().flatten() for p in params]).sum().backward()
        optimizer.step()
        found.append(params[1].detach())
    torch.testing.assert_close(*found)
