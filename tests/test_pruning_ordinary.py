"""Networks as users have them: shared, frozen, computed, in half precision, broken."""

import copy
import math

import numpy as np
import pytest
import torch
from pruning_networks import batches, network
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import weight_norm

from structopt import descent, pruning, training
from structopt.channels import channel_groups
from structopt.pruning import (
    Budget,
    Bytes,
    Global,
    MACs,
    Milliseconds,
    NOfM,
    Parameters,
    ShrinkChannels,
)
from structopt.training.copying import copied


def small(device="cpu"):
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).to(device)


def made_for_inference():
    with torch.inference_mode():
        return small()


# --- models made, or edited, under torch.inference_mode


def test_a_copy_made_in_inference_mode_can_be_trained():
    masks = {"0.weight": torch.rand(8, 8) > 0.5}
    with torch.inference_mode():
        made = {
            "copied": copied(made_for_inference()),
            "ordered": pruning.permute_channels(small(), torch.ones(1, 8), leave=["*"]),
            "updated": pruning.prune_and_update(small(), [torch.randn(9, 8)], 0.5)[0],
            "gated": pruning.add_gates_(copied(small())),
        }
    for model in made.values():
        model.train()(torch.ones(2, 8)).sum().backward()
        assert all(p.grad is not None for p in model.parameters())
    assert pruning.apply_masks_(made["copied"], masks) is made["copied"]


@pytest.mark.parametrize(
    "edit",
    [
        lambda m, masks: pruning.apply_masks_(m, masks),
        lambda m, masks: pruning.hold(masks)(m),
        lambda m, masks: pruning.rewind_(m, copy.deepcopy(m.state_dict()), masks),
        lambda m, masks: pruning.rewind_(m, copy.deepcopy(m.state_dict()), {}),
        lambda m, masks: pruning.add_gates_(m),
    ],
)
def test_what_inference_mode_made_is_not_changed_outside_it(edit):
    model, masks = made_for_inference(), {"0.weight": torch.zeros(8, 8, dtype=torch.bool)}
    with pytest.raises(ValueError, match=r"was made under torch.inference_mode.*copy.deepcopy"):
        edit(model, masks)
    assert model[0].weight.any()
    assert type(model[0]) is nn.Linear
    with torch.inference_mode():
        assert not pruning.apply_masks_(model, masks)[0].weight.any()


# --- tickets and masks


class Stateful(nn.Linear):
    def get_extra_state(self):
        return {"epoch": self.epoch}

    def set_extra_state(self, state):
        self.epoch = state["epoch"]


def test_a_ticket_s_start_may_hold_what_a_module_adds_to_its_state():
    model = Stateful(2, 2)
    model.epoch = 3
    start = copy.deepcopy(model.state_dict())
    model.epoch = 9
    pruning.rewind_(model, start, {})
    assert model.epoch == 3


def test_a_start_that_is_no_state_is_named():
    model = small()
    before = copy.deepcopy(model.state_dict())
    for start, words in (
        (copy.deepcopy(model), r"`start` is of Sequential: keep copy.deepcopy\(model.state_dict"),
        (None, "`start` is of NoneType"),
        ({**before, "2.bias": [0.0] * 4}, r"2.bias of `start` is of list, no tensor"),
        ({**before, "2.bias": np.zeros(4)}, r"2.bias of `start` is of ndarray"),
    ):
        with pytest.raises(ValueError, match=words):
            pruning.rewind_(model, start, {})
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_masks_of_a_computed_weight_are_told_what_there_is():
    model = prune.l1_unstructured(nn.Linear(4, 2), "weight", 0.5)
    mask = {"weight": torch.ones(2, 4, dtype=torch.bool)}
    with pytest.raises(ValueError, match=r"the weights of this model are weight_orig"):
        pruning.apply_masks_(model, mask)
    with pytest.raises(ValueError, match=r"the weights of this model are none"):
        pruning.apply_masks_(nn.ReLU(), mask)


# --- the update of second order


class Choosing(nn.Module):
    """Which layer runs is up to the batch; the second reads what is left of it."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x, scale=1.0):
        return self.b(x[:0]).sum() + self.a(x) if len(x) > 9 else self.b(x) * scale


def test_layers_may_run_in_later_batches_and_read_nothing_in_others():
    x = torch.randn(30, 8)
    model, less = Choosing(), x[:9]
    made, masks = pruning.prune_and_update(model, [{"x": x}, ((less, 2.0), 1), x[:0]], 0.5)
    assert sorted(masks) == ["a.weight", "b.weight"]
    for layer, seen in (("a", x), ("b", less)):
        weight = model.get_parameter(f"{layer}.weight")
        expected = pruning.sparse_gpt(weight, seen.T @ seen, 0.5)[0]
        torch.testing.assert_close(made.get_parameter(f"{layer}.weight").detach(), expected)
    with pytest.raises(ValueError, match=r"b.weight: all that the layer reads .* is empty"):
        pruning.prune_and_update(model, [x], 0.5)
    with pytest.raises(ValueError, match=r"0.weight: all that the layer reads .* is empty"):
        pruning.prune_and_update(small(), [x[:0]], 0.5)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_the_layer_whose_weight_is_broken_is_the_one_named(value):
    model = small()
    with torch.no_grad():
        model[0].weight[1, 2] = value
    with pytest.raises(ValueError, match=r"0.weight: the weight holds NaN or infinite values"):
        pruning.prune_and_update(model, [torch.randn(9, 8)], 0.5)


@pytest.mark.parametrize(
    ("weight", "hessian", "words"),
    [
        (torch.ones(2, 2).long(), torch.eye(2), "the weight is of torch.int64: give a tensor"),
        (torch.ones(2, 2) * 1j, torch.eye(2), "the weight is of torch.complex64: give a tensor"),
        ([[1.0]], torch.eye(1), "the weight is of list: give a tensor"),
        (torch.ones(1, 1), [[1.0]], "the hessian is of list: give a tensor"),
        (torch.ones(1, 1), torch.eye(1).long(), "the hessian is of torch.int64: give a tensor"),
    ],
)
def test_what_is_no_tensor_of_numbers_is_refused(weight, hessian, words):
    with pytest.raises(ValueError, match=words):
        pruning.sparse_gpt(weight, hessian, 0.5)


@pytest.mark.parametrize("kind", [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.Conv3d])
def test_convolutions_that_are_not_unfolded_are_named_with_what_to_leave(kind):
    layer, dims = kind(2, 3, 1), int(kind.__name__[-2])
    x = torch.randn(2, 2, *[3] * dims)
    model = nn.Sequential(layer, nn.Flatten(), nn.Linear(3 * 3**dims, 2))
    words = rf"{kind.__name__} are not unfolded here: leave 0.weight alone, leave=\['0.weight'\]"
    with pytest.raises(ValueError, match=words):
        pruning.prune_and_update(model, [x], 0.5)
    assert list(pruning.prune_and_update(model, [x], 0.5, leave=["0.weight"])[1]) == ["2.weight"]


@pytest.mark.parametrize("compute", [weight_norm, lambda m: prune.identity(m, "weight")])
def test_a_computed_weight_is_left_alone_by_its_name(compute):
    model, x = small(), torch.randn(9, 8)
    compute(model[0])
    with pytest.raises(ValueError, match=r"the weight of 0 is computed.* or leave it alone"):
        pruning.prune_and_update(model, [x], 0.5)
    assert list(pruning.prune_and_update(model, [x], 0.5, leave=["0.weight"])[1]) == ["2.weight"]
    with pytest.raises(ValueError, match=r"no parameter is called '1.weight'"):
        pruning.prune_and_update(model, [x], 0.5, leave=["0.weight", "1.weight"])
    with pytest.raises(ValueError, match=r"the weight of the model is computed"):
        pruning.prune_and_update(compute(nn.Linear(8, 2)), [x], 0.5)


class Tabled(nn.Module):
    def __init__(self, table_first):
        super().__init__()
        table = nn.Embedding(8, 8)
        if table_first:
            self.table = table
        self.head, self.body = nn.Linear(8, 8), small()
        self.head.weight = table.weight
        if not table_first:
            self.table = table

    def forward(self, x):
        return self.body(self.head(x))


@pytest.mark.parametrize("table_first", [True, False])
def test_a_weight_that_is_an_embedding_s_too_is_left_alone(table_first):
    model = Tabled(table_first)
    made, masks = pruning.prune_and_update(model, [torch.randn(9, 8)], 0.5)
    assert list(masks) == ["body.0.weight", "body.2.weight"]
    assert torch.equal(made.table.weight, model.table.weight)


def test_signs_of_the_curvature_come_from_a_generator_of_their_own(device):
    model, data = network(device), batches(device)
    first = pruning.score(model, pruning.hessian, data)
    before = torch.get_rng_state()
    again = pruning.score(model, pruning.hessian, data)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("scale", [1e-3, 1.0])
def test_damping_adds_a_share_of_the_mean_diagonal(scale):
    x = scale * torch.randn(60, 8, dtype=torch.float64) * torch.arange(1, 9)
    weight, gram = torch.randn(5, 8, dtype=torch.float64), x.T @ x
    damped = gram + 0.5 * gram.diagonal().mean() * torch.eye(8)
    made, mask = pruning.sparse_gpt(weight, gram, 0.5, damp=0.5)
    expected, stays = pruning.sparse_gpt(weight, damped, 0.5, damp=0.0)
    assert torch.equal(mask, stays)
    near = (made != weight * mask).any(1)  # a row that would end up further off is not updated
    assert near.any()
    torch.testing.assert_close(made[near], expected[near])
    with pytest.raises(ValueError, match=r"singular with damp=-0.001"):
        pruning.sparse_gpt(weight, gram, 0.5, damp=-0.001)


def test_the_update_takes_a_hessian_of_more_digits_and_makes_no_graph():
    x, weight = torch.randn(60, 8), nn.Parameter(torch.randn(5, 8))
    made, mask = pruning.sparse_gpt(weight, (x.T @ x).double(), 0.5)
    assert made.dtype == torch.float32
    assert not made.requires_grad
    assert torch.equal(made, pruning.sparse_gpt(weight, x.T @ x, 0.5)[0])
    assert int(mask.sum()) == 20


# --- gates


def test_gates_of_a_layer_held_in_two_places_leave_exactly(device):
    layer, x = nn.Linear(8, 8), torch.randn(5, 8, device=device)
    model = pruning.add_gates_(nn.Sequential(layer, nn.ReLU(), layer).to(device), share=0.4).eval()
    expected = model(x)
    masks = pruning.remove_gates_(model)
    assert list(masks) == ["0.weight"]
    assert torch.equal(model(x), expected)
    model[0].register_parameter("again", model[0].weight)
    with pytest.raises(ValueError, match=r"weight is 0.again as well"):
        pruning.add_gates_(model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_price_of_many_gates_is_finite_in_half_precision(device, dtype):
    model = pruning.add_gates_(nn.Linear(1000, 100).to(device, dtype))
    price = pruning.with_price(1.0, lambda model, batch: torch.zeros((), device=device))
    alpha = model.parametrizations.weight[0].log_alpha.detach()
    expected = pruning.open_chance(alpha.double()).mean()
    torch.testing.assert_close(price(model, None).double(), expected, rtol=1e-5, atol=0)


def test_gates_that_training_broke_are_not_written():
    model = pruning.add_gates_(small())
    with torch.no_grad():
        model[2].parametrizations.weight[0].log_alpha[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"gates of 2.weight are NaN"):
        pruning.remove_gates_(model)
    assert len(pruning.gates._gates(model)) == 2


# --- channels pressed to zero


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_channels_too_small_to_be_squared_are_not_zero(device, dtype):
    model = small(device).to(dtype)
    groups = channel_groups(model, torch.ones(1, 8, device=device, dtype=dtype))
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(torch.finfo(dtype).tiny)
        model[0].weight[3], model[0].bias[3], model[2].weight[:, 3] = 0, 0, 0
    after = ShrinkChannels(groups, strength=1.0, end=9)
    assert after.zeros(model) == {"0": 1}
    assert all(not p.requires_grad or p.grad is None for p in model.parameters())


def test_norms_of_half_precision_do_not_overflow(device):
    model = small(device).half()
    groups = channel_groups(model, torch.ones(1, 8, device=device).half())
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(300.0)
    ShrinkChannels(groups, strength=100.0, end=1)(model, 1)
    left = 300 - 100  # each entry is the norm by √n, and loses τ
    torch.testing.assert_close(
        model[0].weight.float(), torch.full((8, 8), left, device=device) * 1.0
    )


def test_between_two_looks_no_group_is_looked_at():
    """It would wait for the device at every step."""
    model = small()
    after = ShrinkChannels(channel_groups(model, torch.ones(1, 8)), strength=1e5, end=150)
    after(model, 50)
    assert after.zeros(model) == {"0": 8}


def test_shrinking_names_what_it_cannot_press():
    model, x, how = small(), torch.ones(1, 8), {"strength": 0.01, "end": 3}
    groups = channel_groups(model, x)
    for given in (groups["0"], ["0"], {"0": 1}, "0", None, 5):
        with pytest.raises(ValueError, match=r"give groups whose channels may go"):
            ShrinkChannels(given, **how)
    with pytest.raises(ValueError, match=r"end=True counts steps"):
        ShrinkChannels(groups, strength=0.01, end=True)
    assert ShrinkChannels(groups, strength=0.01, end=np.int64(3)).pressure(3) == 0.01
    assert ShrinkChannels(iter(groups), **how).groups == (groups["0"],)
    gated = nn.Sequential(weight_norm(nn.Linear(8, 8)), nn.Linear(8, 4))
    with pytest.raises(ValueError, match=r"holds 0.parametrizations.*remove_parametrizations"):
        ShrinkChannels(channel_groups(gated, x), **how)
    model[2].weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"group '0' holds frozen parameters"):
        ShrinkChannels(groups, **how)(model, 1)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


# --- channels in another order


def test_scores_for_an_order_have_to_be_those_of_the_weights():
    model, x = small(), torch.ones(1, 8)
    for scores, words in (
        ({"2.weight": torch.rand(4, 12)}, r"scores of 2.weight have shape \(4, 12\).* \(4, 8\)"),
        ({"2.weight": torch.rand(3, 8)}, r"scores of 2.weight have shape \(3, 8\)"),
        ({"3.weight": torch.rand(4, 8)}, "scores of 3.weight .* in the model it is missing"),
        ({"2.weight": torch.ones(4, 8) > 0}, "are torch.bool: give floating-point"),
        ({"2.weight": None}, "are of NoneType: give a tensor"),
        ([1], "scores are a dict"),
    ):
        with pytest.raises(ValueError, match=words):
            pruning.permute_channels(model, x, scores=scores)
    for sweeps in (-1, 1.5, "a", None, True):
        with pytest.raises(ValueError, match=r"sweeps=.*: how often pairs swap"):
            pruning.permute_channels(model, x, sweeps=sweeps)
    same = pruning.permute_channels(model, x, NOfM(1, 2), sweeps=0)
    assert torch.equal(same[0].weight, model[0].weight)


# --- ranking


@pytest.mark.parametrize(("dtype", "unit"), [(torch.float16, 2**-24), (torch.float32, 2**-149)])
def test_normalised_scores_do_not_depend_on_a_layer_s_unit(device, dtype, unit):
    many = torch.randperm(1000, device=device)[None].double() + 1
    scores = {"small": many * unit, "large": many, "none": many * 0}
    scores = {name: one.to(dtype) for name, one in scores.items()}
    masks = pruning.find_masks(scores, 0.5, scope=Global(normalise=True, floor=0.01))
    assert torch.equal(masks["small"], masks["large"])
    assert int(masks["none"].sum()) == 10


def test_scores_of_eight_bits_are_refused_and_a_single_number_is_a_layer():
    with pytest.raises(ValueError, match=r"are torch.float8_e4m3fn: give .* 16 bits or more"):
        pruning.find_masks({"a": torch.ones(2, 4).to(torch.float8_e4m3fn)}, 0.5)
    assert pruning.find_masks({"a": torch.tensor(1.0)}, 0.0)["a"].shape == ()


# --- budgets


def test_budgets_print_what_makes_them_again():
    for budget in (MACs(1234567), MACs(share=1 / 3), Bytes(1e6), Milliseconds(0.5), Parameters(7)):
        assert eval(repr(budget)) == budget
    for dear in (math.inf, 1e300):  # no bound at all
        assert MACs(dear).limit(small(), torch.ones(1, 8)) == dear
    with pytest.raises(ValueError, match=r"Budget\(share=0.5\) has no unit: take MACs"):
        pruning.prune_channels(small(), torch.ones(1, 8), Budget(share=0.5))


def test_shared_weights_are_counted_once():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    assert Parameters(1).cost(model, None) == 64 + 16
    assert Bytes(1).cost(model.half(), None) == 2 * (64 + 16)


# --- recovery


def test_the_teacher_alone_may_teach_and_keeps_its_modes(device):
    student, teacher = network(device), network(device).train()
    teacher[1].eval()
    modes = [m.training for m in teacher.modules()]
    inputs, targets = batches(device, 1)[0]
    found = pruning.with_teacher(teacher, temperature=3.0, weight=1)(student, (inputs, targets))
    assert [m.training for m in teacher.modules()] == modes
    told = F.log_softmax(teacher.eval()(inputs) / 3, 1)
    log_p = F.log_softmax(student(inputs) / 3, 1)
    expected = 9 * F.kl_div(log_p, told, reduction="batchmean", log_target=True)
    torch.testing.assert_close(found, expected)
    usual, explicit = {}, {"temperature": 2, "weight": 0.5}
    both = [
        pruning.with_teacher(teacher, **o)(student, (inputs, targets)) for o in (usual, explicit)
    ]
    assert both[0] == both[1] != found
    found = pruning.with_teacher(teacher, weight=0)(student, (inputs, targets))
    torch.testing.assert_close(found, F.cross_entropy(student(inputs), targets))


class OfDict(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(8, 4)

    def forward(self, given):
        return self.head(given["x"])


def test_a_teacher_takes_whatever_inputs_the_student_takes(device):
    student, teacher = OfDict().to(device), OfDict()
    batch = {"x": torch.randn(5, 8, device=device)}, torch.zeros(5, device=device).long()
    plain = {"x": batch[0]["x"]}
    found = pruning.with_teacher(teacher, weight=1.0)(student, batch)
    teacher_on_tensors, on_tensors = teacher.to(device).head, student.head
    expected = pruning.with_teacher(teacher_on_tensors, weight=1.0)(
        on_tensors, (plain["x"], batch[1])
    )
    torch.testing.assert_close(found, expected)


def test_recovery_follows_the_schedule_that_is_given(device):
    model, data = network(device), batches(device)
    twin, half = copy.deepcopy(model), lambda step, total: 0.5
    pruning.recover(model, data, epochs=1, schedule=half, device=device)
    pruning.recalibrate_(twin, data)
    training.train(
        twin, data, training.supervised(), descent.fused_adamw(twin, 0.01), epochs=1,
        device=device, schedule=half,
    )  # fmt: skip
    for name, p in model.named_parameters():
        torch.testing.assert_close(p, twin.get_parameter(name))


def test_a_recovery_that_cannot_begin_leaves_the_model(device):
    model, data = network(device), batches(device)
    masks, before = pruning.find_masks(pruning.score(model), 0.5), copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="learning rate"):
        pruning.recover(model, data, epochs=1, lr=-1, masks=masks)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="wants a gradient"):
        pruning.recover(model, data, epochs=1, masks=masks)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


# --- diagnosis


def words(before, after, **options):
    return pruning.diagnose(before, after, torch.ones(2, 8), **options)


def test_zeros_that_were_there_before_are_not_spoken_of():
    """As those of zero-initialised layers, and of every bias of attention."""
    model = small()
    nn.init.zeros_(model[2].weight)
    assert words(model, copy.deepcopy(model)) == []
    attention = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    assert pruning.diagnose(attention, copy.deepcopy(attention), torch.ones(1, 3, 8)) == []


def test_broken_weights_are_spoken_of():
    model = small()
    broken = copy.deepcopy(model)
    broken[2].weight.data[1, 1] = math.nan
    said = ["2 holds NaN or infinite weights: nothing after it is right."]
    assert words(model, broken) == said
    found = words(model, broken, data=[(torch.ones(2, 8), torch.ones(2).long())])
    assert found[:1] == said
    assert found[1].startswith("Accuracy was")


def test_a_width_that_was_not_narrowed_is_not_spoken_of():
    wider = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4))
    assert words(small(), wider) == []
    wide = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4))
    assert words(wide, copy.deepcopy(wide)) == []
    empty = nn.Sequential(nn.Linear(8, 1))
    empty[0].out_features, empty[0].weight, empty[0].bias = 0, nn.Parameter(torch.ones(0, 8)), None
    assert words(empty, copy.deepcopy(empty)) == []


@pytest.mark.parametrize(
    ("width", "said"), [(3, "1 keeps 3 of 64"), (60, "no multiple of 8 (1: 60)")]
)
def test_a_transposed_convolution_is_as_wide_as_what_it_makes(width, said):
    def chain(middle):
        return nn.Sequential(
            nn.Conv2d(2, 30, 1), nn.ConvTranspose2d(30, middle, 2), nn.Conv2d(middle, 4, 1)
        )

    (line,) = pruning.diagnose(chain(64), chain(width), torch.ones(1, 2, 4, 4))
    assert said in line


def test_masks_are_looked_at_whatever_holds_their_weight():
    tied = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    tied[1].weight = tied[0].weight
    masks = {"1.weight": torch.eye(8, dtype=torch.bool)}
    for after in (tied, torch.compile(tied, backend="eager")):
        (line,) = words(tied, after, masks=masks)
        assert "56 removed weights of 1.weight are no longer zero" in line
    for wrong, said in (
        ({"1.weight": torch.eye(8)}, "the mask of 1.weight has to be a bool tensor"),
        ({"1.weight": None}, "the mask of 1.weight has to be a bool tensor"),
        ({"1.weight": np.eye(8, dtype=bool)}, "the mask of 1.weight has to be a bool tensor"),
        ({"2.weight": masks["1.weight"]}, "'2.weight', which is a weight of neither model"),
        ([1], "masks are a dict"),
    ):
        with pytest.raises(ValueError, match=said):
            words(tied, tied, masks=wrong)


def test_a_compiled_network_is_diagnosed_as_the_plain_one():
    before = nn.Sequential(nn.Linear(8, 100), nn.Linear(100, 100), nn.Linear(100, 4))
    after = nn.Sequential(nn.Linear(8, 2), nn.Linear(2, 100), nn.Linear(100, 4))
    compiled = torch.compile(after, backend="eager")
    assert words(before, compiled) == words(before, after) != []
    block = nn.Sequential(nn.Linear(8, 8))
    gone = torch.compile(nn.Sequential(nn.Identity()), backend="eager")
    assert words(block, gone) == ["0 became an identity."]


def test_data_may_be_read_once_and_norms_without_statistics_have_none_to_renew():
    before = nn.Sequential(nn.BatchNorm1d(8, track_running_stats=False), nn.Linear(8, 2))
    before.eval()
    after = copy.deepcopy(before)
    after[1].weight.data *= -1
    after[1].bias.data *= -1
    x = torch.randn(64, 8)
    data = [(x, before(x).argmax(1))]
    found = words(before, after, data=iter(data))
    assert found == words(before, after, data=data)
    assert found[0] == "Accuracy was 100.0 %, and is 0.0 %."
    assert "Give batches" not in str(found)
    norm = nn.Module()  # nested, in what cannot be walked like a list
    norm.inside, norm.forward = nn.BatchNorm1d(8).eval(), lambda x: x
    assert "Give batches" in str(words(before, nn.Sequential(norm, after).eval(), data=data))


@pytest.mark.parametrize(("stale", "broken", "said"), [(22, 78, False), (30, 70, True)])
def test_statistics_are_blamed_where_a_quarter_of_the_loss_comes_back(stale, broken, said):
    """Old statistics get `stale` examples wrong, and a weight gets `broken` others wrong."""
    some, others = (torch.tensor([1.0, -1.0]).repeat(n) for n in (stale, broken // 2))
    x = torch.block_diag(some[:, None], others[:, None])
    data = [(x, (x.sum(1) > 0).long())]
    before = nn.Sequential(nn.BatchNorm1d(2, affine=False), nn.Linear(2, 2, bias=False))
    before[1].weight.data = torch.tensor([[-1.0, -100.0], [1.0, 100.0]])
    pruning.recalibrate_(before, data)
    after = copy.deepcopy(before)
    after[0].running_mean[0] += 1.5
    after[1].weight.data[:, 1] *= -1
    found = pruning.diagnose(before, after, x[:2], data, batches=data)
    lost = 100 * (stale + broken) / len(x)
    assert found[0] == f"Accuracy was 100.0 %, and is {100 - lost:.1f} %."
    assert ("come back with new statistics" in str(found)) == said
