"""The honest table: what it prints, which rows it marks, and the words it adds."""

import html
import html.parser
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import example as also
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

from structopt import measure
from structopt.measure import Measured, Table, Timing, compare, widths


def net(width: int = 8, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, width), nn.ReLU(), nn.Linear(width, 3))


EXAMPLE = torch.zeros(2, 1, 4, 4)


@pytest.fixture
def times(monkeypatch):
    """Seconds that `compare` is made to find, by name of the model."""
    found: dict[str, float] = {}

    def latency(models, example, *, rounds, warm_up=0):
        return {n: Timing(found[n], 0.99 * found[n], 1.01 * found[n], 3, "a clock") for n in models}

    monkeypatch.setattr("structopt.measure.comparison.latency", latency)
    monkeypatch.setattr("structopt.measure.comparison.free_widths", lambda *_, **__: [])
    return found


def test_columns_hold_what_the_other_measures_find(device):
    model = net().to(device)
    (row,) = compare({"dense": model}, EXAMPLE.to(device), batch=4, rounds=1).rows
    its = measure.cost(model, EXAMPLE.to(device))
    assert row["parameters"] == its.parameters
    assert row["MACs"] == its.macs
    assert row["file (KB)"] == measure.file_bytes(model) / 1000
    assert row["memory (KB)"] > its.bytes / 1000
    assert row["ms (batch 1)"].value > 0
    assert row["ms (batch 4)"].value > 0


def test_without_rounds_the_table_is_exact(device):
    models = {"dense": net().to(device), "narrow": net(4).to(device)}
    one, two = (str(compare(models, EXAMPLE.to(device), rounds=0)) for _ in range(2))
    assert one == two
    assert "ms" not in one


def test_seeds_give_mean_and_spread():
    def right(model):
        return values[model]

    group = [net(seed=k) for k in range(3)]
    values = dict(zip(group, (80.0, 82.0, 84.0), strict=True))
    table = compare({"dense": group}, EXAMPLE, metric=right, rounds=0)
    assert table.rows[0]["right"] == Measured(82.0, 2.0)
    assert "right: mean ± standard deviation over 3 models" in table.notes
    table = compare({"dense": group[0]}, EXAMPLE, metric=right, rounds=0)
    assert table.rows[0]["right"] == 80.0
    assert "one model each" in table.notes[0]


@pytest.mark.parametrize("lost", [math.nan, math.inf])
def test_a_seed_that_diverged_is_shown(lost):
    found = iter([0.5, lost, 0.75, 0.5, 0.25])
    models = {"lost": [net(), net(), net()], "good": [net(8), net(8)]}
    table = compare(models, EXAMPLE, metric=lambda model: next(found), rounds=0)
    assert [str(row["metric"]) for row in table.rows] == [str(lost), "0.38 ± 0.18"]


def test_models_of_one_name_may_differ_in_size():
    (row,) = compare({"pruned": [net(4), net(6)]}, EXAMPLE, rounds=0).rows
    assert row["parameters"] == Measured(103.0, 2**0.5 * 20)


columns = st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 3))


@given(st.lists(columns, min_size=1, max_size=7))
def test_marked_rows_are_those_that_no_row_beats(points):
    rows = [{"a": a, "b": b, "good": good} for a, b, good in points]
    marked = measure.pareto(rows, ["a", "b"], "good")
    assert marked  # something is always best

    def beats(p, q):
        return p != q and p[0] <= q[0] and p[1] <= q[1] and p[2] >= q[2]

    for k, point in enumerate(points):
        assert (k in marked) == (not any(beats(other, point) for other in points))


@pytest.mark.parametrize("column", ["a", "good"])
def test_a_row_that_is_not_a_number_is_never_marked(column):
    """A model that diverged is beaten by none, since nothing compares with NaN."""
    rows = [{"a": 1.0, "good": 1.0}, {"a": 0.5, "good": 2.0, column: math.nan}]
    assert measure.pareto(rows, ["a"], "good") == (0,)


@given(st.floats(0.01, 9e14))
@also(999_500.0)
@also(999_600.0)
def test_thousands_have_letters_not_exponents(number):
    text = measure.table.si(number)
    digits, _, letter = text.partition(" ")
    size = {"": 1, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}[letter]
    assert "e" not in text
    assert float(digits) * size == pytest.approx(number, rel=0.006)


def test_numbers_of_numpy_and_torch_are_shown_as_pythons():
    rows = [{"name": "a", "MACs": 1200, "share": 0.25}, {"name": "b", "MACs": 90, "share": 12.5}]
    for whole, real in (
        (np.int64, np.float32),
        (np.uint8, np.float64),
        (torch.tensor, torch.tensor),
    ):
        own = [r | {"MACs": whole(r["MACs"] % 256), "share": real(r["share"])} for r in rows]
        plain = [r | {"MACs": r["MACs"] % 256} for r in rows]
        for shown in (str, Table.markdown, Table._repr_html_):
            assert shown(Table(own)) == shown(Table(plain))
    assert str(Table([{"n": np.int64(1200)}, {"n": np.int64(7)}])).splitlines()[-1] == "    7"


def test_a_time_has_no_exponent():
    shown = str(Timing(0.9998, 0.4, 1234.0, 3, "a clock"))
    assert shown == "1000 ms (400 to 1234000, 3 rounds) on a clock"


def test_the_star_stands_at_the_rows_that_are_worth_it():
    small, large = net(4), net(16)
    table = compare(
        {"large": large, "small": small, "bad": net(16)},
        EXAMPLE,
        metric=lambda m: {small: 80.0, large: 90.0}.get(m, 70.0),
        rounds=0,
    )
    assert table.marked == (0, 1)
    starred = [line.split()[0] for line in str(table).splitlines() if "★" in line]
    assert starred == ["large", "small"]
    assert compare({"large": large}, EXAMPLE, rounds=0).marked == ()


def test_zeros_are_not_speed():
    model = net()
    model[1].weight.data[:, ::2] = 0
    table = compare({"masked": model, "dense": net()}, EXAMPLE, rounds=0)
    (note,) = table.notes
    assert "masked: mask only: no speed-up expected (39 %" in note
    assert table.rows[0]["non-zeros"] == table.rows[0]["parameters"] - 64
    assert "non-zeros" not in compare({"dense": net()}, EXAMPLE, rounds=0).columns


@pytest.mark.parametrize(("zeros", "masked"), [(10, False), (11, True)])
def test_a_few_zeros_are_no_mask(zeros, masked):
    """Of 200 weights: up to 5 % are an accident, and no column says so."""
    model = nn.Linear(20, 10, bias=False)
    model.weight.data.fill_(1).view(-1)[:zeros] = 0
    table = compare({"dense": model}, torch.zeros(1, 20), rounds=0)
    assert ("non-zeros" in table.columns) == masked
    assert len(table.notes) == masked


def test_fewer_macs_but_not_faster_is_said(times):
    times.update(dense=1.0, slow=1.0, quick=0.5)
    table = compare({"dense": net(16), "slow": net(4), "quick": net(4)}, EXAMPLE, batch=1)
    said = [note for note in table.notes if "not faster" in note]
    assert said == ["slow: 75 % fewer MACs than dense, but not faster at batch 1"]
    assert "timed on a clock, 20 interleaved rounds" in table.notes


def test_a_model_without_macs_has_not_fewer_than_itself(times):
    times.update(relu=1.0, tanh=1.0)
    table = compare({"relu": nn.ReLU(), "tanh": nn.Tanh()}, EXAMPLE, batch=1)
    assert not [note for note in table.notes if "fewer" in note]


def test_a_count_that_is_incomplete_is_said():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.both = nn.Bilinear(4, 4, 2)

        def forward(self, x):
            return self.both(x, x)

    (note,) = compare({"two": Two()}, torch.zeros(1, 4), rounds=0).notes
    assert note == "two: MACs are incomplete, no formula for aten._trilinear"


def test_a_rounder_width_is_named_only_if_it_was_as_fast(monkeypatch):
    seen = {}

    def latency(models, example, *, rounds):
        shapes = [tuple(run(example).shape) for run in models.values()]
        seen[shapes[0]] = shapes[1]
        wider = 1.0 if shapes[0][-1] == 13 else 2.0
        return {
            name: Timing(seconds, seconds, seconds, rounds, "a clock")
            for name, seconds in (("now", 1.0), ("wider", wider))
        }

    monkeypatch.setattr(widths, "latency", latency)
    model = nn.Sequential(nn.Linear(4, 13), nn.Linear(13, 8), nn.Linear(8, 37), nn.Linear(37, 3))
    said = measure.free_widths(model, torch.zeros(2, 4))
    assert said == ["layer 0 is 13 wide: 16 would be as fast"]
    assert seen == {(2, 13): (2, 16), (2, 37): (2, 40)}  # 8 is round, the last 3 are classes


def test_a_width_tied_to_groups_is_left_alone(device):
    model = nn.Sequential(nn.Conv2d(6, 6, 1, groups=3), nn.Conv2d(6, 3, 1)).to(device)
    assert measure.free_widths(model, torch.ones(1, 6, 2, 2, device=device), rounds=1) == []


def test_a_layer_whose_weight_a_mask_owns_is_left_alone(device):
    model = nn.Sequential(nn.Linear(4, 13), nn.Linear(13, 3)).to(device)
    prune.l1_unstructured(model[0], "weight", 0.5)
    assert measure.free_widths(model, torch.zeros(2, 4, device=device), rounds=1) == []


def test_a_layer_of_another_class_is_left_alone(device):
    class Adapted(nn.Linear):
        def __init__(self):
            super().__init__(4, 13)
            self.down, self.up = nn.Parameter(torch.ones(4, 2)), nn.Parameter(torch.ones(2, 13))

        def forward(self, x):
            return super().forward(x) + x @ self.down @ self.up

    model = nn.Sequential(Adapted(), nn.Linear(13, 8), nn.Linear(8, 3)).to(device)
    assert measure.free_widths(model, torch.zeros(2, 4, device=device), rounds=1) == []


def test_the_layer_timed_now_is_the_layer(device):
    for layer, example in (
        (nn.Linear(4, 5), torch.ones(2, 4)),
        (nn.Conv2d(3, 5, 3, stride=2, padding=1, bias=False), torch.ones(1, 3, 6, 6)),
    ):
        example, layer = example.to(device), layer.to(device)
        torch.testing.assert_close(widths._at_width(layer, 5)(example), layer(example))
        assert widths._at_width(layer, 16)(example).shape[1] == 16


@pytest.mark.parametrize(("models", "batch"), [({}, 4), ({"a": []}, 4), ({"a": nn.ReLU()}, 0)])
def test_nothing_to_compare_is_an_error(models, batch):
    with pytest.raises(ValueError, match="at least one model"):
        compare(models, EXAMPLE, batch=batch)


def test_a_batch_is_made_from_any_example():
    pair = {"x": torch.arange(3.0)[:, None], "table": torch.zeros(7, 2)}
    for size, entries in ((1, [0.0]), (5, [0.0, 1.0, 2.0, 0.0, 1.0])):
        made = measure.running.with_batch(pair, size)
        assert made["x"].flatten().tolist() == entries
        assert made["table"].shape == (7, 2)


CELLS = st.one_of(
    st.none(),
    st.integers(-(10**9), 10**9),
    st.floats(allow_nan=True, allow_infinity=True),
    st.text("ab|<&", max_size=5),
    st.builds(Measured, st.floats(-1e6, 1e6), st.floats(0, 1e6)),
)


@given(st.lists(st.dictionaries(st.sampled_from("abc"), CELLS, min_size=1), min_size=1, max_size=4))
def test_any_table_prints_as_a_rectangle(rows):
    table = Table(rows, notes=["a note <here>"], marked=[0])
    lines = str(table).splitlines()
    assert len(lines) == len(rows) + 3
    pipes = table.markdown().splitlines()
    assert len({line.count("|") for line in pipes[: len(rows) + 2]}) == 1
    cells: list[int] = []

    class Count(html.parser.HTMLParser):
        def handle_starttag(self, tag, attrs):
            if tag == "tr":
                cells.append(0)
            if tag in ("td", "th"):
                cells[-1] += 1

    Count().feed(table._repr_html_())
    assert cells == [len(table.columns)] * (len(rows) + 1)
    assert "<here>" not in table._repr_html_()


def test_columns_may_be_chosen_but_not_invented():
    rows = [{"a": 1, "b": 2}]
    assert Table(rows, columns=["b"]).markdown() == "| b |\n|--:|\n| 2 |"
    with pytest.raises(ValueError, match=r"\['c'\]; there are \['a', 'b'\]"):
        Table(rows, columns=["c"])


@pytest.mark.parametrize(
    ("value", "spread", "text"),
    [
        (89.234, 0.31, "89.23 ± 0.31"),
        (1.0, 97.0, "1.0 ± 97.0"),
        (1234.5, 20.1, "1,234 ± 20"),
        (0.0, 0.5, "0.00 ± 0.50"),
        (3.0, 0.0, "3.000"),
        (1.0, float("nan"), "1.000"),
    ],
)
def test_the_spread_sets_the_digits(value, spread, text):
    assert str(Measured(value, spread)) == text


def test_a_column_has_one_number_of_decimals():
    column = Table([{"x": 123.4}, {"x": 0.5}, {"x": 0.0}, {"x": None}])
    assert [line.strip() for line in str(column).splitlines()[2:]] == ["123.4", "0.5", "0.0", "–"]
    tiny = Table([{"x": 123.4}, {"x": 0.0012345}])
    assert "0.001234" in str(tiny) or "0.001235" in str(tiny)
    for cells, shown in (
        ([12, 0.5], ["12", "0.5000"]),  # whole numbers have no fraction to show
        ([1000.0, 1.0], ["1,000", "1"]),
        ([12.5, math.nan, math.inf], ["12.50", "nan", "inf"]),
        ([-math.inf], ["-inf"]),
    ):
        lines = str(Table([{"x": cell} for cell in cells])).splitlines()
        assert [line.strip() for line in lines[2:]] == shown


def test_numbers_stand_right_and_words_left():
    """In a column of numbers a cell may be empty; one word makes it a column of words."""
    rows = [
        {"a<": "b<", "n": 5, "x": Measured(1.5, 0.5), "mixed": 1, "yes": True, "list": np.ones(2)},
        {"a<": "bb", "n": None, "x": 10, "mixed": "-", "yes": "no", "list": torch.ones(1)},
    ]
    table = Table(rows, notes=["first", "second"], marked=[1])
    text = (
        "a<    n            x  mixed  yes   list",
        "----  -  -----------  -----  ----  ------------",
        "b<    5  1.50 ± 0.50  1      True  [1. 1.]",
        "bb ★  –           10  -      no    tensor([1.])",
        "first",
        "second",
    )
    assert str(table).splitlines() == [*text]
    assert table.markdown() == (
        "| a< | n | x | mixed | yes | list |\n"
        "|:--|--:|--:|:--|:--|:--|\n"
        "| b< | 5 | 1.50 ± 0.50 | 1 | True | [1. 1.] |\n"
        "| bb ★ | – | 10 | - | no | tensor([1.]) |\n"
        "\n"
        "- first\n"
        "- second"
    )
    _, head, first, *_ = table._repr_html_().splitlines()
    sides = ["left", "right", "right", "left", "left", "left"]
    for line, tag, names in ((head, "th", table.columns), (first, "td", table._cells()[0])):
        cells = [
            f'<{tag} style="text-align: {side}">{html.escape(name)}</{tag}>'
            for side, name in zip(sides, names, strict=True)
        ]
        assert "".join(cells) in line


def test_many_rows_are_told_apart():
    names = [f"{a}{b}" for a, b in itertools.product("abc", "xyz")]
    text = str(Table([{"model": name, "MACs": k} for k, name in enumerate(names)]))
    assert [line.split()[0] for line in text.splitlines()[2:]] == names
