"""The one loop does what a loop written by hand does, and says what went wrong."""

import copy
import math
import signal
from collections import UserDict, defaultdict
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    TensorDataset,
)

from structopt import data, descent, networks
from structopt.distillation import Teacher
from structopt.training import Average, History, accuracy, evaluate, supervised, train
from structopt.training.feeding import Feed
from structopt.training.layout import wants_channels_last
from structopt.training.statistics import placed

cross_entropy = supervised(F.cross_entropy)


def examples(count=40, dtype=torch.float32):
    inputs = torch.randn(count, 1, 6, 6, generator=torch.Generator().manual_seed(7)).to(dtype)
    return data.Examples(inputs, (inputs.mean((1, 2, 3)) > 0).long())


def network(seed=1, dropout=0.0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(dropout),
        nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2),
    )  # fmt: skip


class Held(nn.Module):
    """A linear layer whose weight is a buffer, as converted and frozen networks hold theirs."""

    def __init__(self, device, dtype=torch.float32):
        super().__init__()
        self.register_buffer("weight", torch.eye(3, device=device, dtype=dtype))

    def forward(self, x):
        return x @ self.weight


def test_batches_go_to_where_the_buffers_lie(device):
    x, y = torch.eye(3), torch.arange(3)
    assert evaluate(Held(device), [(x, y)]) == 1
    assert placed(x, Held(device)).device.type == device.type
    assert placed({"x": x}, Held("meta"))["x"].is_meta
    assert placed(x.to("meta"), nn.ReLU()).is_meta, "a model without any state is everywhere"
    both = Held("meta")
    both.scale = nn.Parameter(torch.ones(1, device=device))
    assert placed(x, both).device.type == device.type, "parameters say it first"
    for dtype in torch.float32, torch.float64:
        lesson = Teacher(Held(device, dtype)).teach(x, y)
        assert torch.equal(lesson.logits, x.to(dtype))
        assert lesson.logits.device == x.device


def weights(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def sgd(model, **settings):
    return torch.optim.SGD(model.parameters(), **{"lr": 0.1, "momentum": 0.9, **settings})


# What one step is


def test_it_is_the_loop_one_would_write(device):
    batches = data.batches(examples(), 16, seed=3, device=device)
    schedule = descent.cosine(final=0.1)
    ours = network().to(device)
    rates, losses = [], []
    optimizer = sgd(ours)
    history = train(
        ours, batches, cross_entropy, optimizer, epochs=2, device=device, autocast=None,
        schedule=schedule, clip=0.5,
    )  # fmt: skip

    theirs = network().to(device)
    if device.type in {"cpu", "cuda"}:
        theirs = theirs.to(memory_format=torch.channels_last)
    by_hand = sgd(theirs)
    step = 0
    for epoch in range(2):
        for inputs, targets in batches.epoch(epoch):
            by_hand.param_groups[0]["lr"] = 0.1 * schedule(step, 6)
            by_hand.zero_grad()
            loss = F.cross_entropy(theirs(inputs), targets)
            loss.backward()
            nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
            by_hand.step()
            losses.append(loss.item())
            rates.append(by_hand.param_groups[0]["lr"])
            step += 1
    assert_same(weights(ours), weights(theirs))
    assert history.losses == losses
    assert history.lrs == rates
    assert history.ends == [3, 6]
    assert optimizer.param_groups[0]["lr"] == 0.1  # as it was given


def test_the_schedule_multiplies_each_groups_own_rate():
    model = network()
    groups = [
        {"params": model[0].parameters(), "lr": 0.1},
        {"params": model[7].parameters(), "lr": 0.02},
    ]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    seen = []

    def after_step(model, step):
        seen.append([group["lr"] for group in optimizer.param_groups])

    train(
        model, data.batches(examples(), 20), cross_entropy, optimizer, epochs=2,
        schedule=lambda step, total: 1 - step / total, after_step=after_step,
    )  # fmt: skip
    torch.testing.assert_close(seen, [[0.1 * f, 0.02 * f] for f in (1, 0.75, 0.5, 0.25)])


def test_a_scheduler_of_torchs_sets_the_rate_that_is_noted_and_kept():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    settings = {"epochs": 1, "after_step": lambda *_: scheduler.step(), "autocast": None}
    history = train(model, data.batches(examples(), 20), cross_entropy, optimizer, **settings)
    assert history.lrs == [0.1, 0.05]
    assert optimizer.param_groups[0]["lr"] == 0.025


@pytest.mark.parametrize("count", [32, 30, 27])
def test_accumulated_batches_are_one_large_batch(count):
    given = examples(count, torch.float64)
    one, two = (nn.Sequential(nn.Flatten(), nn.Linear(36, 2)).double() for _ in range(2))
    two.load_state_dict(one.state_dict())
    settings = {"epochs": 3, "autocast": None, "device": "cpu"}
    large = data.batches(given, 16, shuffle=False)
    small = data.batches(given, 4, shuffle=False)
    first = train(one, large, cross_entropy, sgd(one), **settings)
    second = train(two, small, cross_entropy, sgd(two), accumulate=4, **settings)
    torch.testing.assert_close(weights(one), weights(two), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(first.losses, second.losses, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("accumulate", [1, 2, 3, 5])
def test_a_schedule_knows_how_many_steps_there_will_be(accumulate):
    """Of 5 batches an epoch; the last step may have fewer than the others."""
    totals = []

    def schedule(step, total):
        totals.append(total)
        return 1.0

    model, batches = network(), data.batches(examples(), 8)
    settings = {"epochs": 2, "accumulate": accumulate}
    train(model, batches, cross_entropy, sgd(model), schedule=schedule, **settings)
    assert set(totals) == {len(totals)}


def test_an_epoch_is_entered_anywhere_and_looked_at_again():
    given = examples()
    given.inputs[17] = math.inf
    kinds = data.batches(given, 8), DataLoader(TensorDataset(given.inputs, given.targets), 8)
    for batches in kinds:
        feed = Feed(batches, 1)
        for epoch in (0, 1, 4):
            whole = [inputs for inputs, _ in feed.epoch(epoch, 0)]
            for start in range(6):
                rest = [inputs for inputs, _ in feed.epoch(epoch, start)]
                assert all(map(torch.equal, rest, whole[start:]))
                assert len(rest) == 5 - start
            if batches is kinds[0]:  # a loader would draw another order
                wrong = [not inputs.isfinite().all() for inputs in whole]
                assert [feed.spoiled(epoch, number) for number in range(5)] == wrong


def test_the_generators_of_a_loader_and_of_its_order_are_known():
    """The first seeds the workers, the second draws the order: a checkpoint has to hold both."""
    seeds, order = torch.Generator(), torch.Generator()
    drawn = RandomSampler(range(8), generator=order)
    batched = BatchSampler(drawn, 2, False)
    for loader in (
        DataLoader(range(8), 2, sampler=drawn, generator=seeds),
        DataLoader(range(8), batch_sampler=batched, generator=seeds),
    ):
        assert set(Feed(loader, 1).generators) == {seeds, order}


def test_losses_are_read_seldom():
    class Reads(TorchFunctionMode):
        count = 0

        def __torch_function__(self, function, types, args=(), kwargs=None):
            name = getattr(function, "__name__", "")
            self.count += name in {"item", "tolist", "__float__", "__bool__", "cpu", "numpy"}
            return function(*args, **(kwargs or {}))

    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 2))
    with Reads() as reads:
        train(model, data.batches(examples(100), 1), cross_entropy, sgd(model), epochs=2)
    assert 4 <= reads.count < 20  # each waits for the device; there were 200 steps


@pytest.mark.parametrize("dtype", [torch.bfloat16, None])
def test_autocast_is_what_was_asked_for(dtype, device):
    seen = []

    def objective(model, batch):
        output = model(batch[0])
        seen.append(output.dtype)
        return F.cross_entropy(output.float(), batch[1])

    model = network()
    batches = data.batches(examples(), 20)
    train(model, batches, objective, sgd(model), epochs=1, autocast=dtype, device=device)
    assert set(seen) == {dtype or torch.float32}
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_float16_scales_the_loss_and_skips_steps_that_overflow():
    """The second gradient would vanish in float16 unscaled; the first overflows."""
    model = nn.Linear(4, 1)
    start = weights(model)
    steps = []

    def objective(model, batch):
        return model(batch).float().mean() * (1e-7 if steps else 1e4)

    def after_step(model, step):
        steps.append(weights(model))

    optimizer = torch.optim.SGD(model.parameters(), lr=1e3)
    batches = [torch.full((8, 4), 8.0)] * 3
    train(
        model, batches, objective, optimizer, epochs=1, autocast=torch.float16, device="cpu",
        after_step=after_step,
    )  # fmt: skip
    assert_same(steps[0], start)
    assert not torch.equal(steps[1]["weight"], start["weight"])


def test_float16_gradients_are_clipped_at_their_own_size():
    model = nn.Linear(4, 1)
    start = model.weight.detach().clone()

    def objective(model, batch):
        return model(batch).float().mean()

    optimizer = torch.optim.SGD([model.weight], lr=1.0)
    batches = [torch.full((8, 4), 0.05)]  # a gradient of norm 0.1
    train(model, batches, objective, optimizer, epochs=1, autocast=torch.float16, clip=0.05,
          device="cpu")  # fmt: skip
    torch.testing.assert_close((model.weight - start).norm(), torch.tensor(0.05), rtol=1e-3, atol=0)


def test_after_step_counts_from_one_and_may_change_the_model():
    model, seen = network(), []

    def after_step(trained, step):
        assert trained is model
        seen.append(step)
        with torch.no_grad():
            trained[7].weight[0] = 0

    train(
        model, data.batches(examples(), 16), cross_entropy, sgd(model), epochs=2,
        after_step=after_step,
    )  # fmt: skip
    assert seen == [1, 2, 3, 4, 5, 6]
    assert (model[7].weight[0] == 0).all()
    assert (model[7].weight[1] != 0).any()


def test_any_model_batch_and_objective_will_do(device):
    """A batch may be a dict, a named tuple, a list, or no tensor at all."""

    class Point(nn.Module):
        def __init__(self):
            super().__init__()
            self.at = nn.Parameter(torch.tensor(4.0))

    def objective(model, batch):
        assert batch["x"].device.type == device.type
        return (model.at - batch["x"].mean()) ** 2

    model = Point()
    history = train(model, [{"x": torch.ones(3), "name": "a"}], objective, sgd(model, momentum=0.0),
                    epochs=30, device=device)  # fmt: skip
    assert abs(model.at.item() - 1) < 0.01
    assert len(history.losses) == 30

    model = Point()
    train(model, range(30), lambda model, batch: model.at**2, sgd(model), epochs=1, device=device)
    assert abs(model.at.item()) < 2


@pytest.mark.parametrize("kind", [partial(defaultdict, list), UserDict])
def test_what_keeps_a_batch_like_a_dict_is_one(kind, device):
    """Tokenisers give a UserDict; accumulated, its batches count by their examples too."""
    batches = [kind({"x": torch.full((count,), float(count))}) for count in (1, 3)]

    def objective(model, batch):
        assert type(batch) is type(batches[0])
        assert batch["x"].device.type == device.type
        return model(batch["x"][:, None]).mean()

    model = nn.Linear(1, 1)
    settings = {"autocast": None, "device": device, "accumulate": np.int64(2)}
    before = model.weight.item()
    history = train(model, batches, objective, sgd(model), epochs=1, **settings)
    assert history.ends == [1]
    assert model.weight.item() == pytest.approx(before - 0.1 * (1 + 3 * 3) / 4)


@pytest.mark.parametrize("hidden", [True, False], ids=["object", "numpy"])
def test_batches_that_nobody_can_count_are_not_accumulated(hidden):
    """Each would count as one example, however many it holds."""
    batches = [SimpleNamespace(x=torch.ones(count, 1)) for count in (1, 3)]
    given = batches if hidden else [batch.x.numpy() for batch in batches]

    def objective(model, batch):
        return model(torch.as_tensor(getattr(batch, "x", batch))).mean()

    model = nn.Linear(1, 1)
    train(model, given, objective, sgd(model), epochs=1, device="cpu")
    with pytest.raises(ValueError, match=r"counted by its first tensor, and this \w+ shows none"):
        train(model, given, objective, sgd(model), epochs=1, device="cpu", accumulate=2)
    numbers = [1, "a", None]
    train(model, numbers, lambda m, _: m.weight.sum(), sgd(model), epochs=1, accumulate=2)


def test_batches_may_be_walked_over_by_number_alone():
    class Numbered:
        def __getitem__(self, number):
            return list(data.batches(examples(), 20))[number]

    assert len(one_epoch(Numbered()).losses) == 2


def test_images_alone_are_laid_out_as_their_network(device):
    """In channels-last order, wherever in the batch they lie, if the network is."""
    if device.type == "mps":
        pytest.skip("mps gains nothing by channels-last order")
    images, series = torch.zeros(2, 3, 8, 8), torch.zeros(2, 3, 8)
    for model, order in (
        (nn.Conv2d(3, 2, 3), torch.channels_last), (nn.Linear(8, 2), torch.contiguous_format)
    ):  # fmt: skip

        def objective(model, batch, order=order):
            assert batch["x"][0].is_contiguous(memory_format=order)
            assert batch["x"][1].is_contiguous()
            return model(batch["x"][0]).float().mean()

        train(model, [{"x": [images, series]}], objective, sgd(model), epochs=1, device=device)


class Viewing(nn.Module):
    """As the first networks of many are written, which channels-last order does not allow."""

    def __init__(self):
        super().__init__()
        self.layers, self.head = network(dropout=0.5)[:6], nn.Linear(16, 2)

    def forward(self, x):
        return self.head(self.layers(x).view(-1, 16))


@pytest.mark.parametrize("autocast", ["auto", None])
def test_a_network_that_views_its_images_is_trained_in_plain_order(autocast, device, monkeypatch):
    """As if channels-last order had not been tried, though the attempt had drawn and counted."""
    found = []
    for tried in (True, False):
        if not tried:
            monkeypatch.setattr("structopt.training.run.wants_channels_last", lambda *_: False)
        model = Viewing()
        history = train(
            model, data.batches(examples(), 10), cross_entropy, sgd(model), epochs=2, average=0.9,
            autocast=autocast, device=device, validate=lambda m: evaluate(m, examples()),
        )  # fmt: skip
        found.append([*model.state_dict().values(), *history.averaged.state_dict().values()])
        assert torch.is_tensor(model(torch.zeros(2, 1, 6, 6, device=device)))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


def test_a_loader_may_count_its_epochs_itself():
    class Loader(list):
        epoch = 3

    history = one_epoch(Loader(data.batches(examples(), 20)))
    assert len(history.losses) == 2


def test_fused_kernels_get_moments_in_their_parameters_order(device):
    """State made before the network became channels-last must be laid out anew."""
    given, models = examples(), []
    for fused in (False, True):
        torch.manual_seed(0)
        layers = [nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2)]
        models.append(model := nn.Sequential(*layers).to(device))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=fused)
        for _ in range(3):  # plain order, so the moments are too
            optimizer.zero_grad()
            inputs, targets = given.inputs.to(device), given.targets.to(device)
            F.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
        train(model, data.batches(given, 8), cross_entropy, optimizer, epochs=3, autocast=None,
              device=device)  # fmt: skip
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# The average of the weights


def test_the_average_is_its_formula(device):
    model = network()
    batches = data.batches(examples(), 10)
    seen = [weights(network())]

    def after_step(model, step):
        seen.append(weights(model))

    history = train(
        model, batches, cross_entropy, sgd(model), epochs=4, average=0.6, after_step=after_step,
        autocast=None, device=device,
    )  # fmt: skip
    want = {k: v.to(device).double() for k, v in seen[0].items()}
    for step, now in enumerate(seen[1:]):
        decay = min(0.6, (1 + step) / (10 + step))
        want = {k: decay * want[k] + (1 - decay) * now[k].double() for k in want}
    for name, value in history.averaged.state_dict().items():
        if value.is_floating_point():  # batch-norm statistics too
            torch.testing.assert_close(value.double(), want[name], rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(value, model.state_dict()[name])
    assert not any(p.requires_grad for p in history.averaged.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_average_in_16_bits_follows_all_the_same(dtype):
    """Its steps are smaller than their rounding: it would stand still for ever."""
    model = nn.Linear(1, 1, bias=False).to(dtype)
    model.weight.data.fill_(1.0)
    average = Average(model, 0.999)
    average.steps = 10**5
    model.weight.data.fill_(1.5)
    for _ in range(3000):
        average.update()
    assert average.model.weight.dtype == dtype
    assert average.model.weight.item() == pytest.approx(1.5 - 0.5 * 0.999**3000, rel=0.005)
    again = Average(model, 0.999)
    again.restore(*average.state())
    assert (again.steps, again.halves) == (average.steps, average.halves)
    assert torch.equal(again.model.weight, average.model.weight)
    kept = average.halves[0].clone()
    again.update()
    assert torch.equal(average.halves[0], kept), "its state is its own"


def test_an_average_follows_what_lies_in_the_model_now(device):
    """Whoever moves or edits a model may give it other tensors; and a decay of 0 is the model."""
    model = network().to(device)
    average = Average(model, 0)
    for dtype in (torch.float64, torch.float32):
        model.to(dtype)
        model[0].weight.data = torch.full_like(model[0].weight, 3.0)
        model[1].running_mean.add_(1.0)
    average.update()
    average.model.double().float()
    average.model[1].num_batches_tracked.add_(5)
    average.update()
    assert_same(weights(average.model), weights(model))


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64])
def test_an_average_has_the_numbers_of_its_model(dtype, device):
    if dtype == torch.float64 and device.type == "mps":
        pytest.skip("mps has no double precision")
    model = nn.ParameterList([torch.ones(2, dtype=dtype, device=device)])
    average = Average(model, 0.9)
    model[0].data += math.pi
    average.update()
    want = 1 + 0.9 * torch.full((2,), math.pi, dtype=dtype, device=device)
    torch.testing.assert_close(average.model[0], want)
    assert not average.model[0].requires_grad


def test_a_model_without_weights_has_an_average_too():
    head = nn.Linear(36, 2)
    objective = nn.Sequential(head)
    objective.forward = lambda model, batch: F.cross_entropy(head(model(batch[0])), batch[1])
    model, optimizer = nn.Flatten(), sgd(head)
    batches = data.batches(examples(), 20)
    history = train(model, batches, objective, optimizer, epochs=1, average=0.9)
    assert isinstance(history.averaged, nn.Flatten)


def test_validation_sees_the_average_and_restores_training_mode():
    model, seen, modes = network(), [], []

    def validate(given):
        seen.append(given)
        given.eval()
        return {"a": 1, "b": torch.tensor(0.5)}

    def objective(given, batch):
        modes.append(given.training)
        return cross_entropy(given, batch)

    batches = data.batches(examples(), 20)
    history = train(model, batches, objective, sgd(model), epochs=2, validate=validate, average=0.9)
    assert seen == [history.averaged] * 2
    assert history.validation == [{"a": 1.0, "b": 0.5}] * 2
    assert all(modes)
    train(model, batches, objective, sgd(model), epochs=1, validate=validate)
    assert seen[2] is model
    assert all(modes)


@pytest.mark.parametrize("decay", [-0.1, 1.0, math.nan, "0.9"])
def test_a_decay_outside_its_range_is_refused(decay):
    with pytest.raises(ValueError, match="average is the decay"):
        Average(network(), decay)


# Bad input


def one_epoch(batches, objective=cross_entropy, model=None, **settings):
    model = model or network()
    return train(model, batches, objective, sgd(model), epochs=1, **settings)


@pytest.mark.parametrize(
    ("batches", "words"),
    [
        ([], "the batches are empty"),
        (iter([1]), "walked only once"),
        (5, "batches is a list, Batches or DataLoader to walk over, not int"),
        ([(torch.zeros(2, 1, 6, 6, dtype=torch.uint8), torch.zeros(2).long())], "standardise"),
        ([(torch.zeros(2, 1, 6, 6).long(), torch.zeros(2).long())], "standardise"),
        ([torch.zeros(2, 1, 6, 6)], r"pair \(inputs, targets\), not float32 \(2, 1, 6, 6\)"),
        ([{"x": torch.zeros(2, 1, 6, 6)}], r"not \{x: float32 \(2, 1, 6, 6\)\}"),
        ([(torch.zeros(0, 1, 6, 6), torch.zeros(0).long())], "holds no example"),
    ],
)
def test_batches_that_cannot_be_trained_on_are_refused(batches, words):
    with pytest.raises(ValueError, match=words):
        one_epoch(batches)


def test_an_empty_batch_is_refused_among_others_too():
    batches = [(torch.zeros(n, 1, 6, 6), torch.zeros(n).long()) for n in (2, 0)]
    with pytest.raises(ValueError, match="holds no example"):
        one_epoch(batches, accumulate=2)


def test_an_error_in_the_objective_says_where_and_on_what():
    good = (torch.zeros(2, 1, 6, 6), torch.zeros(2).long())
    bad = (torch.full((2, 3, 6, 6), math.nan), torch.zeros(2).long())
    with pytest.raises(RuntimeError, match="channels") as caught:
        one_epoch([good, bad])
    assert caught.value.__notes__ == [
        "in epoch 1, step 2 (both count from 1); the batch is (float32 (2, 3, 6, 6), int64 (2,)), "
        "and holds NaN or infinite values"
    ]


@pytest.mark.parametrize(
    "odd", [torch.eye(2).to_sparse(), torch.eye(2).to(torch.float8_e4m3fn), torch.eye(2).long()]
)
def test_an_error_on_tensors_of_other_kinds_is_the_objectives_own(odd):
    """Whether torch can look for NaN in them or not; one that is spoiled does not hide another."""
    images = torch.full((2, 1, 6, 6), math.nan)
    with pytest.raises(KeyError, match="absent") as caught:
        one_epoch([[odd, images]], lambda model, batch: {}["absent"])
    assert caught.value.__notes__[0].endswith("and holds NaN or infinite values")
    with pytest.raises(KeyError, match="absent") as caught:
        one_epoch([[odd, images[0] > 0]], lambda model, batch: {}["absent"])
    assert "NaN" not in caught.value.__notes__[0]


@pytest.mark.parametrize(
    ("objective", "words"),
    [
        (lambda model, batch: 3.0, r"a scalar tensor with a gradient, not float\n"),
        (lambda model, batch: torch.zeros(()), r"with a gradient, not float32 \(\) without one"),
        (lambda model, batch: model(batch[0]), r"with a gradient, not float32 \(20, 2\)"),
    ],
)
def test_what_an_objective_returns_is_checked(objective, words):
    with pytest.raises(ValueError, match=words):
        one_epoch(data.batches(examples(), 20), objective, autocast=None)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"accumulate": 0}, "accumulate counts"),
        ({"accumulate": 1.5}, "accumulate counts"),
        ({"accumulate": "2"}, "accumulate counts"),
        ({"epochs": -1}, "epochs counts"),
        ({"epochs": 1.5}, "epochs counts"),
        ({"autocast": "bf16"}, "autocast is a torch.dtype, .* not 'bf16'"),
        ({"clip": 0.0}, "clip is the largest norm"),
        ({"clip": -1.0}, "clip is the largest norm"),
        ({"clip": math.nan}, "clip is the largest norm"),
    ],
)
def test_settings_out_of_range_are_refused(settings, words):
    model = network()
    settings = {"epochs": 1, **settings}
    with pytest.raises(ValueError, match=words):
        train(model, data.batches(examples(), 20), cross_entropy, sgd(model), **settings)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"model": None}, "model is the nn.Module to train, not NoneType"),
        ({"model": "resnet"}, "model is the nn.Module to train, not str"),
        ({"objective": None}, r"objective is a function of \(model, batch\), .* not NoneType"),
        ({"optimizer": None}, "optimizer is made from the model's parameters, .* not NoneType"),
        ({"optimizer": "adam"}, "optimizer is made .* not str"),
        ({"optimizer": torch.optim.SGD}, "optimizer is made .* not type"),
        ({"optimizer": torch.optim.LBFGS(network().parameters())}, "LBFGS evaluates .* AdamW"),
    ],
)
def test_what_stands_in_the_place_of_another_is_refused(wrong, words):
    model = network()
    given = {"model": model, "objective": cross_entropy, "optimizer": sgd(model), **wrong}
    with pytest.raises(ValueError, match=words):
        train(batches=data.batches(examples(), 20), epochs=1, **given)


def test_an_optimiser_of_another_model_is_refused_before_anything_is_moved():
    model = network()
    with pytest.raises(ValueError, match="no parameter of this model"):
        train(model, data.batches(examples(), 20), cross_entropy, sgd(network()), epochs=1)
    assert model[4].weight.is_contiguous(), "its layout has changed"


def test_an_optimiser_may_step_without_a_closure_and_hold_weights_of_others():
    class Plain(torch.optim.SGD):
        def step(self):
            super().step()

    model, other = network(), nn.Linear(1, 1)
    before = model[7].weight.detach().clone()
    optimizer = Plain([*other.parameters(), *model.parameters()], lr=0.1)
    train(model, data.batches(examples(), 20), cross_entropy, optimizer, epochs=1)
    assert not torch.equal(model[7].weight, before)


def test_an_optimiser_of_the_objective_alone_is_welcome():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, model, batch):
            return (self.scale * model(batch[0])).square().mean()

    objective = Scaled()
    train(network(), data.batches(examples(), 20), objective, sgd(objective), epochs=1)
    assert objective.scale != 1
    model, objective = network(), Scaled()
    train(model, data.batches(examples(), 20), objective, sgd(model), epochs=1)
    assert objective.scale == 1


def test_only_convolutions_on_devices_that_gain_by_it_want_channels_last():
    cpu = torch.device("cpu")
    assert wants_channels_last(nn.Conv2d(1, 1, 1), cpu)
    assert not wants_channels_last(nn.Linear(1, 1), cpu)
    assert not wants_channels_last(nn.Conv2d(1, 1, 1), torch.device("mps"))


def test_what_onednn_would_write_past_its_memory_is_trained_in_plain_order():
    cpu = torch.device("cpu")
    narrow = nn.Conv2d(4, 8, 1, stride=2)
    for fine in (
        nn.Conv2d(16, 8, 1, stride=2), nn.Conv2d(4, 8, 1), nn.Conv2d(4, 8, 3, stride=2)
    ):  # fmt: skip
        assert wants_channels_last(fine, cpu)
    for spoiled in (narrow, nn.Sequential(nn.Conv2d(1, 4, 3), narrow)):
        assert not wants_channels_last(spoiled, cpu)
        assert wants_channels_last(spoiled, torch.device("cuda"))
    assert not wants_channels_last(nn.Conv2d(32, 8, 1, stride=2, groups=8), cpu)
    assert not wants_channels_last(nn.Conv2d(15, 8, 1, stride=(1, 2)), cpu)


def test_a_narrow_residual_network_in_channels_last_order_gets_the_gradients_of_plain_order():
    torch.manual_seed(0)
    model = networks.ResNet20(width=4).to(memory_format=torch.channels_last)
    reference = copy.deepcopy(model).double().to(memory_format=torch.contiguous_format)
    images, labels = torch.rand(8, 1, 28, 28), torch.arange(8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    once = [(images, labels)]
    train(model, once, cross_entropy, optimizer, epochs=1, device="cpu", autocast=None)
    F.cross_entropy(reference.train()(images.double()), labels).backward()
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p.double(), q - 0.1 * q.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("value", [None, "half", torch.zeros(2), {"a": None}])
def test_what_validation_returns_is_checked(value):
    with pytest.raises(ValueError, match="validate returned"):
        one_epoch(data.batches(examples(), 20), validate=lambda model: value)


def test_a_schedule_needs_a_length():
    class Endless:
        def __iter__(self):
            return iter(data.batches(examples(), 20).epoch(0))

    assert len(one_epoch(Endless()).losses) == 2
    with pytest.raises(ValueError, match="number of steps"):
        one_epoch(Endless(), schedule=descent.cosine())


def test_a_loader_of_a_stream_does_not_know_its_length(tmp_path):
    class Stream(IterableDataset):
        def __iter__(self):
            return zip(examples().inputs, examples().targets, strict=True)

    path = tmp_path / "run.safetensors"
    assert len(one_epoch(DataLoader(Stream(), 20), checkpoint=path).losses) == 2
    with pytest.raises(ValueError, match="number of steps"):
        one_epoch(DataLoader(Stream(), 20), schedule=descent.cosine())


def test_a_loss_that_is_not_finite_names_its_step(device):
    calls = []

    def objective(model, batch):
        calls.append(1)
        return cross_entropy(model, batch) * (math.inf if len(calls) == 7 else 1)

    model = network()
    with pytest.raises(FloatingPointError, match=r"loss is (inf|nan) in epoch 2, step 7: lower"):
        train(model, data.batches(examples(), 10), objective, sgd(model), epochs=9, device=device)


def test_nan_in_a_batch_is_told_from_divergence():
    given = examples()
    given.inputs[33] = math.nan
    batches = data.batches(given, 8, shuffle=False)
    with pytest.raises(FloatingPointError, match=r"epoch 1, step 5: its batch holds NaN"):
        one_epoch(batches)
    with pytest.raises(FloatingPointError, match=r"epoch 1, step 3: its batch holds NaN"):
        one_epoch(batches, accumulate=2)


def test_weights_that_are_not_finite_are_noticed_when_losses_are_not():
    model = network()

    def after_step(model, step):
        if step == 4:  # the last step: no loss comes after it
            with torch.no_grad():
                model[7].weight[0, 0] = math.inf

    with pytest.raises(FloatingPointError, match=r"weights are NaN .* epoch 1, step 4"):
        one_epoch(data.batches(examples(), 10), model=model, after_step=after_step)


def test_whole_numbers_among_the_parameters_are_finite():
    """An index, say, that a network holds as a parameter without gradient."""
    model = network()
    model.order = nn.Parameter(torch.arange(3), requires_grad=False)
    assert len(one_epoch(data.batches(examples(), 10), model=model).losses) == 4
    one_epoch(data.batches(examples(), 10), model=model, average=0.5)


# Ctrl-C


def test_ctrl_c_waits_for_the_end_of_a_step():
    before = signal.getsignal(signal.SIGINT)
    model, steps = network(), []

    def objective(model, batch):
        if len(steps) == 2:
            signal.raise_signal(signal.SIGINT)
        return cross_entropy(model, batch)

    with pytest.raises(KeyboardInterrupt):
        one_epoch(data.batches(examples(), 10), objective, after_step=lambda m, s: steps.append(s))
    assert steps == [1, 2, 3]
    assert signal.getsignal(signal.SIGINT) is before
    assert model is not None


def test_a_second_ctrl_c_acts_at_once():
    reached = []

    def objective(model, batch):
        signal.raise_signal(signal.SIGINT)
        reached.append("after the first")
        signal.raise_signal(signal.SIGINT)
        reached.append("after the second")
        return cross_entropy(model, batch)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        one_epoch(data.batches(examples(), 10), objective)
    assert reached == ["after the first"]
    assert signal.getsignal(signal.SIGINT) is before


# What is shown


def test_a_log_shows_no_bar_and_a_person_one(capsys):
    one_epoch(data.batches(examples(), 10))
    assert capsys.readouterr() == ("", "")
    one_epoch(data.batches(examples(), 10), progress=True)
    assert "4/4" in capsys.readouterr().err


def test_tensorboard_gets_each_step(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path)) as writer:
        history = one_epoch(data.batches(examples(), 10), writer=writer, validate=lambda m: 0.5)
    events = EventAccumulator(str(tmp_path)).Reload()
    losses = events.Scalars("loss")
    assert [event.step for event in losses] == [1, 2, 3, 4]
    torch.testing.assert_close([e.value for e in losses], history.losses, rtol=1e-6, atol=0)
    assert [event.value for event in events.Scalars("validation/validation")] == [0.5]
    assert len(events.Scalars("lr")) == 4


def test_a_history_shows_each_name_that_a_validation_had():
    history = History([2.0, 1.0], [0.1] * 2, [{"top": 0.5}, {"top": 0.75, "rare": 0.25}], [1, 2])
    assert str(history).splitlines()[0].split() == ["epoch", "steps", "loss", "top", "rare", "rate"]
    assert str(history).splitlines()[2].split()[4] == "0.25"


def test_a_history_prints_and_draws_itself():
    history = History([2.0, 1.0, 0.5, 0.5], [0.1] * 4, [{"top": 0.5}, {"top": 0.75}], [2, 4], 1.0)
    assert str(history) == (
        "epoch  steps    loss   top  rate\n"
        "    1      2  1.5000   0.5   0.1\n"
        "    2      4  0.5000  0.75   0.1"
    )
    assert "1.0" not in str(history).replace("1.00", "")  # a timing would differ from run to run
    assert history._repr_html_().count("<tr>") == 3
    assert history.draw().get_ylabel() == "training loss"


# Scores


def test_accuracy_counts_right_answers():
    logits = torch.tensor([[0.1, 0.9], [0.8, 0.2], [0.3, 0.4]])
    assert accuracy(logits, torch.tensor([1, 1, 1])).tolist() == [1, 0, 1]
    lost = torch.tensor([[math.nan, 1.0], [0.0, math.nan], [1.0, 0.0]])
    assert accuracy(lost, torch.tensor([0, 0, 0])).tolist() == [0, 0, 1], "NaN is no largest"
    pixels = torch.stack([logits, logits.flip(1)], dim=2)  # (3, 2 classes, 2 places)
    assert accuracy(pixels, torch.tensor([[1, 1], [0, 0], [1, 0]])).tolist() == [0.5, 0.5, 1]
    with pytest.raises(ValueError, match=r"accuracy compares .* not float32 \(3, 2\) with int64"):
        accuracy(logits, torch.tensor([1, 1]))


@pytest.mark.parametrize("label", [-1, 2])
def test_a_label_that_is_no_class_is_an_error_not_a_mistake_of_the_network(device, label):
    given = [(torch.eye(2, device=device), torch.tensor([0, label], device=device))]
    model = nn.Linear(2, 2).to(device)
    with pytest.raises(ValueError, match=rf"label {label}: with 2 logits labels run from 0 to 1"):
        evaluate(model, given)
    assert model.training


@pytest.mark.parametrize("size", [7, 512])
def test_evaluation_is_exact_whatever_the_batches(size, device):
    given = examples(600).to(device)
    model = network(dropout=0.5).to(device)
    model[1].eval()
    modes = [module.training for module in model.modules()]
    got = evaluate(model, given if size == 512 else data.batches(given, size))
    assert [module.training for module in model.modules()] == modes
    model.eval()
    with torch.no_grad():
        right = (model(given.inputs).argmax(1) == given.targets).sum().item()
    assert got == pytest.approx(right / 600, abs=1e-9)
    mean = evaluate(model, data.batches(given, size, shuffle=False), F.cross_entropy)
    with torch.no_grad():
        torch.testing.assert_close(
            mean, F.cross_entropy(model(given.inputs), given.targets).item(), rtol=1e-5, atol=1e-6
        )


def test_a_metric_in_16_bits_is_added_up_in_32(device):
    x = torch.linspace(0, 1, 500, device=device)[:, None].half()
    mean = pytest.approx(x.double().mean().item(), rel=1e-5)
    assert evaluate(nn.Identity(), [(x, x)], lambda output, _: output[:, 0]) == mean
    assert evaluate(nn.Identity(), [(x, x)], lambda output, _: 300 + 0 * output.mean()) == 300


def test_evaluation_of_batches_leaves_them_and_the_empty_ones_out(device):
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(1)).to(device)
    given = data.Examples(x.clone(), torch.zeros(4, dtype=torch.long, device=device))
    evaluate(nn.Sequential(nn.ReLU(inplace=True)), given)
    torch.testing.assert_close(given.inputs, x)
    assert evaluate(nn.Identity(), [(x, x), (x[:0], x[:0])], F.mse_loss) == 0
    assert evaluate(nn.Identity(), [(x, x)], lambda output, _: float(len(output))) == 4


@pytest.mark.parametrize("shape", [(4, 5), (1,)])
def test_a_metric_of_another_shape_is_no_score(shape):
    x = torch.zeros(4, 2, 5)
    with pytest.raises(ValueError, match=r"returned float32 \(.* for 4 examples"):
        evaluate(nn.Identity(), [(x, x)], lambda *_: torch.ones(shape))


def test_evaluation_brings_inputs_to_the_models_own_type(device):
    model, given = network().to(device), examples(60).to(device)
    want = evaluate(copy.deepcopy(model).double(), given)
    assert evaluate(copy.deepcopy(model).double(), given) == want
    assert abs(evaluate(model.bfloat16(), given) - want) < 0.1
    model[0].float()  # of a mixture nothing is known: it gets what was given
    with pytest.raises(RuntimeError):
        evaluate(model, given)


def test_evaluation_restores_the_modes_after_an_error_too():
    model = network()
    with pytest.raises(RuntimeError):
        evaluate(model, [(torch.zeros(1, 3, 6, 6), torch.zeros(1).long())])
    assert model.training


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([], "no example"),
        ([torch.zeros(2, 1, 6, 6)], "pair"),
        ([({"x": torch.zeros(2)}, torch.zeros(2))], r"not \(\{x: float32 \(2,\)\}, float32"),
        ([(torch.zeros(2, 1, 6, 6, dtype=torch.uint8), torch.zeros(2))], "standardise"),
    ],
)
def test_evaluation_refuses_what_it_cannot_score(given, words):
    with pytest.raises(ValueError, match=words):
        evaluate(network(), given)
