"""What `explain` says in words, as a table and as a picture agrees with what `take` can do."""

from __future__ import annotations

import dataclasses
import html.parser
import re

import matplotlib.pyplot as plt
import pytest
import torch
from channel_networks import CASES, Attention
from torch import nn

from structopt import plots
from structopt.channels import channel_groups, explain, take

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _figures():
    yield
    plt.close("all")


def explained(name, device=CPU):
    return explain(CASES[name].model(device), CASES[name].example(device))


def test_the_text_of_a_residual_network(device):
    text = str(explained("residual", device))
    assert text.splitlines()[0] == (
        "Fn: 4 groups of channels can change; 99.7% of 1,921 parameters lie in them."
    )
    for line in (
        "stem      8  stem[0] bn[0] two[0] → one[1] down[1] three[1]",
        "down     10  down[0] four[0] → head[1]",
        "meets a dimension of fixed size: convolution in stem  stem[1] (3)",
        "output of the model                                   head[0] (5)",
    ):
        assert line in text.splitlines()
    assert max(map(len, text.splitlines())) <= 100
    assert "and 6 more" in text  # the sizes of kernels take one row


@pytest.mark.parametrize("name", CASES)
def test_it_says_the_groups_that_are_found(name):
    found, said = channel_groups(CASES[name].model(CPU), CASES[name].example(CPU)), explained(name)
    assert [(g.name, g.size) for g in said.free] == [(g.name, g.size) for g in found.groups]
    assert [(g.name, g.frozen) for g in said.frozen] == [(g.name, g.frozen) for g in found.frozen]
    assert all(group.frozen for group in said.frozen)
    for group, tied in zip(found.groups, said.free, strict=True):
        layers = {place.layer for place in tied.places}
        assert len(layers) == len({layer_of(m.parameter, layers) for m in group.members})
        read = {place.layer for place in tied.places if place.role == "reads"}
        assert {layer_of(m.parameter, layers) for m in group.members if m.reads} == read
        assert tied.name in str(said)


def layer_of(parameter, layers):
    return max((n for n in layers if parameter == n or parameter.startswith(n + ".")), key=len)


def test_freedom_is_counted_by_hand():
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))
    said = explain(model, torch.randn(1, 3))
    shares = {group.name: group.share for group in said.free}
    total = 3 * 8 + 8 + 8 * 6 + 6 + 6 * 2 + 2
    assert said.parameters == total
    assert said.freedom == pytest.approx((total - 2) / total)  # all but the output's biases
    assert shares["0"] == pytest.approx((3 * 8 + 8 + 8 * 6) / total)
    assert shares["2"] == pytest.approx((8 * 6 + 6 + 6 * 2) / total)
    nothing = explain(nn.Linear(3, 2), torch.randn(1, 3))
    assert "0 groups of channels can change; 0.0% of 8 parameters" in str(nothing)
    assert nothing.freedom == 0


def test_sizes_that_attributes_keep_are_named():
    model = nn.Sequential(nn.Linear(3, 8), Attention(), nn.Linear(8, 2))
    said = explain(model, torch.randn(2, 5, 3))
    heads, width = (next(g for g in said.free if g.size == size) for size in (2, 4))
    assert heads.attributes == ("1.num_heads = 2",)
    assert "kept as 1.num_heads = 2" in str(said)
    assert "1.head_dim = 4" in width.attributes
    narrow = take(model, {channel_groups(model, torch.randn(2, 5, 3))[heads.name]: [1]})
    assert narrow[1].num_heads == 1


def test_a_norm_over_channels_is_marked():
    said = explained("layer norm")
    assert said.free[0].averaged
    assert "\n0 *" in str(said)
    assert "* A norm averages over these channels" in str(said)
    assert "A norm averages over these channels" in said._repr_html_()
    assert "A norm averages" not in str(explained("batch norm"))


def test_what_blocks_is_named_with_operator_and_layer():
    model = nn.Sequential(nn.Linear(3, 8), nn.Softmax(-1), nn.Linear(8, 2))
    text = str(explain(model, torch.randn(4, 3)))
    assert re.search(
        r"channels that compete along one dimension: _softmax in 1 +0\[0\] \(8\)", text
    )


def test_it_is_a_frozen_value_that_touches_nothing():
    model = CASES["residual"].model(CPU)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    said = explain(model, CASES["residual"].example(CPU))
    said.draw()
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())
    with pytest.raises(dataclasses.FrozenInstanceError):
        said.freedom = 1.0
    del model  # it needs the model no longer
    assert str(said) == repr(said) == str(explained("residual"))
    assert said == explained("residual")


class Outline(html.parser.HTMLParser):
    """The tags of a page, each closed in turn; its words; its headers."""

    def __init__(self, text):
        super().__init__()
        self.stack, self.tags, self.words = [], [], []
        self.feed(text)
        assert not self.stack, f"left open: {self.stack}"

    def handle_starttag(self, tag, attrs):
        self.stack.append(tag)
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_the_table_is_accessible_and_takes_its_colours_from_the_page():
    text = explained("ViT")._repr_html_()
    page = Outline(text)
    names = [tag for tag, _ in page.tags]
    assert names.count("caption") == names.count("table") == 2
    headers = [attrs.get("scope") for tag, attrs in page.tags if tag == "th"]
    assert set(headers) == {"col", "row"}
    assert headers.count("row") == names.count("tr") - 2  # every row but the heads
    assert "summary" in names
    assert not re.search(r"color|background|#[0-9a-f]{3}", text)
    assert "attn.proj[1]×4" in text


def test_names_are_escaped():
    model = nn.Sequential()
    model.add_module("<b>", nn.Linear(3, 8))
    model.add_module("end", nn.Linear(8, 2))
    text = explain(model, torch.randn(1, 3))._repr_html_()
    assert "<b>" not in text
    assert "&lt;b&gt;[0]" in text


# ------------------------------------------------------------------ the picture


def lines(figure):
    """Column, first and last row, and colour of each group's line."""
    found = []
    for line in figure.axes[0].lines:
        x, y = line.get_xdata(), line.get_ydata()
        if len(x) == 2 and x[0] == x[1] and line.get_linestyle() != "None":
            found.append((x[0], y[0], y[1], line.get_color(), line.get_linestyle()))
    return found


def test_the_picture_has_a_row_for_each_layer_and_a_line_for_each_group():
    figure = explained("residual").draw()
    axes = figure.axes[0]
    names = [text.get_text() for text in axes.get_yticklabels()]
    assert names == ["stem", "bn", "one", "two", "down", "three", "four", "head"]
    spans = {(names[int(first)], names[int(last)]) for _, first, last, *_ in lines(figure)}
    free = {("stem", "three"), ("one", "two"), ("down", "head"), ("three", "four")}
    assert spans == free | {("stem", "stem"), ("head", "head")}  # input and output, frozen
    sizes = [text.get_text() for text in axes.texts]
    assert sorted(sizes) == ["10", "3", "4", "5", "6", "8"]
    words = [text.get_text() for text in axes.get_legend().get_texts()]
    assert words[-1] == "frozen"
    assert axes.yaxis_inverted()


@pytest.mark.parametrize("name", ["residual", "ViT", "Llama", "dense"])
def test_lines_never_cover_each_other_and_differ_from_their_neighbours(name):
    figure = explained(name).draw()
    drawn = lines(figure)
    for n, (column, first, last, colour, style) in enumerate(drawn):
        for column2, first2, last2, colour2, style2 in drawn[:n]:
            beside = first <= last2 and first2 <= last
            assert not (beside and column == column2)
            assert not (beside and colour == colour2 and style == style2 == "-")
        assert colour in plots.PALETTE or style == ":"
    figure.canvas.draw()  # in the style of the book, and every label within the figure
    assert figure.get_facecolor() == plt.matplotlib.colors.to_rgba(plots.CARD)
    box = figure.bbox
    renderer = figure.canvas.get_renderer()
    for text in (*figure.axes[0].get_yticklabels(), *figure.axes[0].texts):
        place = text.get_window_extent(renderer)
        assert box.x0 <= place.x0
        assert place.x1 <= box.x1


def test_part_of_a_network_is_drawn_alone():
    model = nn.Sequential(
        CASES["residual"].model(CPU), nn.ReLU(), nn.Linear(5, 4, dtype=torch.float64)
    )
    said = explain(model, CASES["residual"].example(CPU))
    names = [t.get_text() for t in said.draw("0.t").axes[0].get_yticklabels()]
    assert names == ["0.two", "0.three"]
    with pytest.raises(ValueError, match=r"0 layers .* 'layer9'.* such as '2'"):
        said.draw("layer9")
    with pytest.raises(ValueError, match="no layers with weights"):
        explain(nn.ReLU(), torch.randn(1, 3)).draw()


def test_a_thousand_layers_are_not_drawn_at_once():
    model = nn.Sequential(*[nn.Linear(2, 2) for _ in range(401)])
    said = dataclasses.replace(explained("residual"), layers=tuple(map(str, range(len(model)))))
    with pytest.raises(ValueError, match=r"401 layers .* choose 1 to 400"):
        said.draw()
