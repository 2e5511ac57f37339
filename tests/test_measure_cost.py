"""Counts on paper: against the formulas, against torch's counter, and nothing is disturbed."""

import copy
from collections import UserDict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize, prune
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.flop_counter import FlopCounterMode

from structopt import measure
from structopt.measure import flops
from structopt.measure.running import with_batch


def macs(model, *example, **options):
    return measure.cost(model, example, **options).macs


@given(
    dims=st.integers(1, 3),
    groups=st.sampled_from([1, 2, 4]),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 2),
    transposed=st.booleans(),
    batch=st.integers(1, 3),
)
def test_every_convolution_equals_its_formula(dims, groups, kernel, stride, transposed, batch):
    kind = getattr(nn, f"Conv{'Transpose' if transposed else ''}{dims}d")
    layer = kind(4, 8, kernel, stride=stride, groups=groups)
    example = torch.zeros(batch, 4, *[5] * dims)
    side = 5 if transposed else (5 - kernel) // stride + 1  # where the kernel is laid on
    by_hand = side**dims * kernel**dims * 4 * 8 // groups
    assert macs(layer, example) == by_hand
    with FlopCounterMode(display=False) as counter:
        layer(example)
    assert counter.get_total_flops() == 2 * batch * by_hand


def test_products_of_matrices(device):
    a, b = torch.zeros(2, 3, 4, device=device), torch.zeros(2, 4, 5, device=device)
    assert macs(nn.Linear(4, 7).to(device), a) == 3 * 4 * 7
    assert macs(lambda x: x @ b, a) == 3 * 4 * 5
    assert macs(lambda x: torch.einsum("bij,bjk->bik", x, b), a) == 3 * 4 * 5
    assert macs(lambda x: x[0] @ x[0, 0], a, batch=1) == 3 * 4
    assert macs(lambda x: x[0, 0] @ x[0, 0], a, batch=1) == 4
    assert macs(lambda x: torch.baddbmm(torch.zeros(2, 3, 5, device=device), x, b), a) == 60


@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="this torch has no grouped_mm")
def test_of_a_mixture_each_token_counts_for_the_expert_it_meets():
    class Experts(nn.Module):
        def forward(self, tokens, weights, ends):
            return F.grouped_mm(tokens, weights, offs=ends)

    ends = torch.tensor([3, 3, 10], dtype=torch.int32)
    example = torch.randn(10, 8), torch.randn(3, 8, 12), ends
    cost = measure.cost(Experts(), example)
    assert (cost.macs, cost.uncounted) == (8 * 12, ())


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"attn_mask": torch.zeros(6, 5)}])
def test_attention_is_two_products(device, options):
    options = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    query = torch.zeros(2, 4, 6, 8, device=device)
    key = torch.zeros(2, 4, 6 if options.get("is_causal") else 5, 8, device=device)
    found = measure.cost(
        lambda q, k: F.scaled_dot_product_attention(q, k, k, **options), (query, key)
    )
    assert found.macs == 4 * 6 * key.shape[2] * (8 + 8)
    assert not found.uncounted


def test_grouped_queries_count_for_each_query_head():
    query, key = torch.zeros(1, 4, 6, 8), torch.zeros(1, 2, 6, 8)
    attention = lambda q, k: F.scaled_dot_product_attention(q, k, k, enable_gqa=True)  # noqa: E731
    assert macs(attention, query, key) == 4 * 6 * 6 * 16


@pytest.mark.parametrize("training", [True, False])
def test_an_encoder_layer_counts_the_same_on_its_fused_path(device, training):
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).to(device).train(training)
    tokens = torch.zeros(2, 16, 32, device=device)
    by_hand = 4 * 16 * 32 * 32 + 2 * 4 * 16 * 16 * 8 + 2 * 16 * 32 * 64
    assert macs(layer, tokens) == by_hand
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize(("kind", "gates"), [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
@pytest.mark.parametrize("directions", [1, 2])
def test_recurrent_layers_use_each_matrix_once_a_step(device, kind, gates, directions):
    layer = kind(8, 6, num_layers=2, bidirectional=directions == 2, batch_first=True).to(device)
    by_hand = 5 * directions * gates * (8 * 6 + 6 * 6 + directions * 6 * 6 + 6 * 6)
    assert macs(layer, torch.zeros(3, 5, 8, device=device)) == by_hand


def test_fused_recurrent_layers_count_their_matrices_not_their_biases():
    weights = [(24, 8), (24, 6), (24,), (24,)]  # as CUDA's kernel gets them
    assert flops._recurrent((5, 3, 8), weights) == 2 * 5 * 3 * 24 * (8 + 6)


def test_macs_are_for_one_example(device):
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 10)).to(device)
    one, many = (measure.cost(model, torch.zeros(n, 1, 8, 8, device=device)) for n in (1, 7))
    assert one == many
    assert one.macs == sum(one.by_operator.values()) == 36 * 4 * 9 + 4 * 36 * 10
    assert one.by_operator == {"convolution": 1296, "matmul": 1440}


def test_an_example_is_a_tensor_a_tuple_or_a_dict():
    def model(input1, input2):
        return input1 @ input2.new_ones(3, 4) + input2

    tensors = torch.zeros(2, 3), torch.zeros(2, 4)
    named = dict(zip(("input1", "input2"), tensors, strict=True))
    for mapping in (named, UserDict(named)):  # the second is what tokenisers hand over
        assert macs(model, *tensors) == measure.cost(model, mapping).macs == 12
        assert {len(t) for t in with_batch(mapping, 5).values()} == {5}


def test_without_a_batch_dimension_one_says_so():
    layer, signal = nn.Conv1d(2, 3, 3), torch.zeros(2, 10)
    assert macs(layer, signal, batch=1) == 8 * 2 * 3 * 3
    with pytest.raises(ValueError, match="batch=0"):
        measure.cost(layer, signal, batch=0)
    with pytest.raises(ValueError, match="batch=0"):
        measure.per_layer(layer, signal, batch=0)
    with pytest.raises(ValueError, match="empty"):
        measure.cost(layer, torch.zeros(0, 2, 10))


def test_an_operator_without_a_formula_is_named():
    found = measure.cost(nn.Bilinear(3, 4, 5), (torch.zeros(2, 3), torch.zeros(2, 4)))
    assert found.uncounted == ("aten._trilinear",)
    assert "no formula for aten._trilinear" in str(found)


def test_a_decomposition_is_work_without_a_formula_and_a_norm_is_none():
    square = torch.eye(3)[None]
    for work in (torch.linalg.inv, torch.linalg.svd, torch.linalg.cholesky, torch.matrix_exp):
        assert measure.cost(work, square).uncounted, work
    assert measure.cost(lambda x: torch.cholesky_solve(x, x), square).uncounted
    assert measure.cost(torch.linalg.vector_norm, square).uncounted == ()
    assert measure.cost(nn.utils.parametrizations.orthogonal(nn.Linear(3, 3)), square).uncounted


def test_parameters_are_counted_once_and_bytes_follow_the_type(device):
    tied = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)).to(device)
    tied[1].weight = tied[0].weight
    found = measure.cost(tied, torch.zeros(1, 4, device=device))
    assert (found.parameters, found.nonzeros, found.bytes, found.macs) == (16, 16, 64, 32)
    half = measure.cost(nn.Linear(4, 4).bfloat16(), torch.zeros(1, 4, dtype=torch.bfloat16))
    assert half.bytes == 2 * 20


def test_nonzeros_are_those_of_the_weight_in_use():
    class Halve(nn.Module):
        def forward(self, weight):
            return weight * (torch.arange(weight.shape[1]) % 2)

    example = torch.zeros(1, 4)
    assert measure.cost(nn.Linear(4, 5, bias=False), example).nonzeros == 20
    written = nn.Linear(4, 5, bias=False)
    written.weight.data[0] = 0
    assert measure.cost(written, example).nonzeros == 16
    masked = prune.l1_unstructured(nn.Linear(4, 5, bias=False), "weight", 0.25)
    assert measure.cost(masked, example).nonzeros == 15
    reshaped = nn.Linear(4, 5, bias=False)
    parametrize.register_parametrization(reshaped, "weight", Halve())
    found = measure.cost(reshaped, example)
    assert (found.parameters, found.nonzeros) == (20, 10)
    assert "(50.0 % zero)" in str(found)


@pytest.mark.parametrize("shape", [(3, 5), (5,), (5, 5, 1)])
def test_a_mask_of_another_shape_is_no_mask_of_the_weight(shape):
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.position = nn.Parameter(torch.ones(5, 5))
            self.register_buffer("position_mask", torch.zeros(shape))

        def forward(self, x):
            return x @ self.position

    assert measure.cost(Positions(), torch.zeros(1, 5)).nonzeros == 25


@pytest.mark.filterwarnings("ignore:Sparse CS. tensor support is in beta")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr, torch.sparse_csc])
def test_a_sparse_buffer_has_the_bytes_of_its_parts(layout):
    class Graph(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)
            self.register_buffer("near", torch.eye(5).to_sparse(layout=layout))

        def forward(self, x):
            near = self.near
            (near._values() if layout == torch.sparse_coo else near.values()).add_(1)
            return self.layer(near @ x)

    model, x = Graph(), torch.randn(5, 4)
    near = model.near  # another number is added to it at each call, and taken back
    indices = 10 if layout == torch.sparse_coo else 6 + 5
    assert measure.cost(model, x).bytes == 4 * 15 + 8 * indices + 4 * 5
    assert measure.per_layer(model, x).rows[-1]["MACs"] == 12
    assert float(measure.latency(model, x, rounds=1)) > 0
    assert model.near is near
    assert torch.equal(near.to_dense(), torch.eye(5))


def test_a_packed_weight_has_the_bytes_of_its_parts():
    double = nn.Linear(4, 3)
    weight = torch.randn(3, 4)
    double.weight = nn.Parameter(TwoTensor(weight, weight.clone()), requires_grad=False)
    found = measure.cost(double, torch.randn(2, 4))
    assert (found.bytes, found.nonzeros) == (4 * (2 * 12 + 3), None)


def test_a_model_without_values_has_a_cost_too():
    model = nn.Conv2d(3, 8, 3, device="meta")
    found = measure.cost(model, torch.zeros(1, 3, 8, 8, device="meta"))
    assert (found.macs, found.nonzeros) == (36 * 8 * 27, None)


class Restless(nn.Module):
    """Draws random numbers, also for a weight; counts its calls; a frozen part in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout())
        self.frozen = nn.BatchNorm1d(4).eval()
        self.normed = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))
        self.noisy = nn.Linear(4, 4)
        parametrize.register_parametrization(self.noisy, "weight", nn.Dropout())
        parametrize.register_parametrization(self.noisy, "weight", nn.RReLU())
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        self.frozen.running_mean = self.frozen.running_mean + 1  # another tensor in its place
        return self.frozen(self.layers(self.noisy(self.normed(x + torch.randn_like(x)))))


MEASURES = {
    "cost": lambda m, x: measure.cost(m, x),
    "per_layer": lambda m, x: measure.per_layer(m, x),
    "latency": lambda m, x: measure.latency(m, x, rounds=2),
    "compare": lambda m, x: measure.compare({"m": m}, x, batch=2, rounds=1),
    "free_widths": lambda m, x: measure.free_widths(m, x, rounds=1),
    "file_bytes": lambda m, x: measure.file_bytes(m),
}


@pytest.mark.parametrize("name", MEASURES)
def test_measuring_changes_nothing(name, device):
    model = Restless().to(device)
    example = torch.ones(3, 4, device=device)
    state, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    buffers = {key: id(value) for key, value in model.named_buffers()}
    random = torch.get_rng_state()
    MEASURES[name](model, example)
    torch.testing.assert_close(dict(model.state_dict()), dict(state), rtol=0, atol=0)
    assert [m.training for m in model.modules()] == modes
    assert {key: id(value) for key, value in model.named_buffers()} == buffers
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("name", list(MEASURES)[:-1])
def test_what_a_model_writes_to_its_input_is_undone(name, device):
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 4)).to(device)
    example = torch.arange(-4.0, 4.0, device=device).view(2, 4)
    MEASURES[name](model, example)
    assert example.flatten().tolist() == [*range(-4, 4)]


def test_a_model_that_fails_is_left_as_it_was():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(5, 5))
    for function in (measure.cost, measure.per_layer, measure.latency, measure.free_widths):
        with pytest.raises(RuntimeError, match="shapes"):
            function(model, torch.zeros(1, 4))
    assert model.training
    assert not model[0]._forward_pre_hooks
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_a_compiled_or_traced_model_is_counted():
    assert macs(torch.compile(nn.Linear(3, 4)), torch.zeros(2, 3)) == 12
    traced = torch.jit.trace(nn.Linear(3, 4), torch.zeros(2, 3))
    assert measure.cost(traced, torch.zeros(2, 3)) == measure.cost(
        nn.Linear(3, 4), torch.zeros(2, 3)
    )


class Functional(nn.Module):
    """Work in a block of its own, a layer used twice, and a layer whose weight is only borrowed."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"twice": nn.Linear(4, 4)})
        self.borrowed = nn.Linear(4, 4)

    def forward(self, x):
        x = self.inner["twice"](self.inner["twice"](x))
        return F.linear(x, self.borrowed.weight, self.borrowed.bias)


def test_layers_sum_to_the_whole(device):
    models = [
        Functional(),
        nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), 2),
        nn.Sequential(nn.Linear(4, 4), nn.LSTM(4, 3, batch_first=True)),
    ]
    for model in models:
        example = torch.zeros(2, 5, 4, device=device)
        table = measure.per_layer(model.to(device), example)
        whole = measure.cost(model, example)
        assert sum(row["MACs"] for row in table.rows) == whole.macs > 0
        assert sum(row["parameters"] for row in table.rows) == whole.parameters


def test_a_layer_row_says_where_the_work_is():
    rows = {row["layer"]: row for row in measure.per_layer(Functional(), torch.zeros(2, 4)).rows}
    assert rows["inner.twice"]["MACs"] == 2 * 16
    assert rows["inner.twice"]["parameters"] == 20
    assert rows["(whole)"]["MACs"] == 16  # the borrowed weight, used outside its layer
    assert rows["(whole)"]["parameters"] == 20
    assert rows["inner.twice"]["output"] == "2×4"


def test_a_cost_reads_well():
    text = str(measure.cost(nn.Linear(1000, 1000), torch.zeros(1, 1000)))
    assert text == "1,001,000 parameters, 4,004.0 KB, 1 M MACs: matmul 1 M"
