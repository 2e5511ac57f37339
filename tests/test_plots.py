"""Figures: the palette is sound for every eye, and what is drawn is what was given."""

import itertools
import math
import subprocess
import sys
from types import SimpleNamespace

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from structopt import plots

# Machado, Oliveira and Fernandes (2009), full strength: linear RGB as such an eye sees it.
EYES = {
    "usual": np.eye(3),
    "protanopia": [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
    "deuteranopia": [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
    "tritanopia": [[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]],
}
LMS = np.array(
    [[0.412221, 0.536333, 0.051446], [0.211903, 0.680700, 0.107397], [0.088302, 0.281719, 0.629979]]
)
LAB = np.array(
    [
        [0.210454, 0.793618, -0.004072],
        [1.977998, -2.428592, 0.450594],
        [0.025904, 0.782772, -0.808676],
    ]
)
BASELINES_AND_METHODS = [role for role in plots.COLOURS if role not in ("train", "validation")]


@pytest.fixture(autouse=True)
def close_figures():
    with plots.style():
        yield
    plt.close("all")


def linear(colour: str) -> np.ndarray:
    rgb = np.array(matplotlib.colors.to_rgb(colour))
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def oklab(light: np.ndarray) -> np.ndarray:
    return LAB @ np.cbrt(LMS @ np.clip(light, 0, 1))


def contrast(one: str, other: str) -> float:
    high, low = sorted(linear(c) @ [0.2126, 0.7152, 0.0722] + 0.05 for c in (one, other))[::-1]
    return high / low


@pytest.mark.parametrize("role", plots.COLOURS)
def test_a_colour_stands_out_from_the_card(role):
    assert contrast(plots.COLOURS[role], plots.CARD) >= 3  # WCAG 2.2, 1.4.11


def test_text_has_the_contrast_of_text():
    assert contrast(plots.INK, plots.CARD) >= 7


@pytest.mark.parametrize("eye", EYES)
@pytest.mark.parametrize("family", [BASELINES_AND_METHODS, ["train", "validation"]])
def test_every_eye_tells_roles_apart(eye, family):
    for one, other in itertools.combinations(family, 2):
        seen = [oklab(np.array(EYES[eye]) @ linear(plots.COLOURS[role])) for role in (one, other)]
        distance = 100 * np.linalg.norm(seen[0] - seen[1])
        assert distance > 9, f"{one} and {other} look alike ({distance:.1f})"


def test_roles_differ_in_marker_too():
    assert len({plots.MARKERS[role] for role in BASELINES_AND_METHODS}) == len(
        BASELINES_AND_METHODS
    )
    assert plots.MARKERS.keys() == plots.COLOURS.keys()


def test_the_palette_cannot_be_changed_from_outside():
    with pytest.raises(TypeError):
        plots.COLOURS["dense"] = "red"  # type: ignore[index]


def test_importing_the_package_does_not_import_matplotlib():
    code = "import sys, structopt.plots, structopt.measure; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_style_leaves_the_settings_as_they_were():
    before = dict(matplotlib.rcParams)
    with plots.style():
        plt.rcParams["font.size"] = 30
    assert dict(matplotlib.rcParams) == before


def test_curves_draw_mean_and_deviation_in_the_role_colour(device):
    runs = torch.tensor([[1.0, 4.0], [3.0, 8.0]], device=device)
    axes = plots.curves([0, 1], {"pruned": runs, "scratch": [0.0, 0.0]})
    line, flat = axes.lines
    assert line.get_ydata().tolist() == [2.0, 6.0]
    assert line.get_color() == plots.COLOURS["pruned"]
    assert flat.get_color() == plots.COLOURS["scratch"]
    (band,) = axes.collections  # a single run has none
    heights = band.get_paths()[0].vertices[:, 1]
    assert heights.max() == pytest.approx(6 + 8**0.5)
    assert heights.min() == pytest.approx(2 - 2**0.5)


@pytest.mark.parametrize("values", [[1.0, 2.0, 3.0], [[[1.0, 2.0]]], torch.zeros(0, 2)])
def test_curves_that_do_not_fit_are_named(values):
    with pytest.raises(ValueError, match="pruned"):
        plots.curves([0, 1], {"pruned": values})


def test_every_figure_draws_on_the_axes_given():
    run = SimpleNamespace(losses=[2.0, 1.0], validation=[{"accuracy": 0.5, "loss": 1.0}])
    rows = [{"model": "dense", "KB": 1.0, "right": 0.9}]
    figures = [
        lambda axes: plots.curves([0], {"a": [1.0]}, axes),
        lambda axes: plots.bars({"a": 1.0}, axes),
        lambda axes: plots.history(run, axes),
        lambda axes: plots.histogram(torch.randn(9), axes),
        lambda axes: plots.surface(lambda p: p.sum(), None, axes),
        lambda axes: plots.images(torch.rand(2, 3, 4, 4), None, axes),
        lambda axes: plots.pattern(torch.ones(2, 2), axes),
        lambda axes: plots.tradeoff(rows, "KB", "right", axes),
        lambda axes: plots.roofline(10.0, 1.0, {"a": (1.0, 1.0)}, axes),
        lambda axes: plots.reliability(torch.randn(4, 3), torch.tensor([0, 1, 2, 0]), axes),
    ]
    for figure in figures:
        axes = plt.subplots()[1]
        assert figure(axes) is axes
        axes.figure.canvas.draw()


def test_history_refuses_nothing():
    with pytest.raises(ValueError, match="no step"):
        plots.history(SimpleNamespace(losses=[], validation=[]))


def test_history_smooths_to_the_mean_of_the_last_steps():
    losses = torch.arange(500.0)
    axes = plots.history(SimpleNamespace(losses=losses, validation=[]))
    assert axes.lines[1].get_ydata()[0] == losses[:10].mean()
    assert axes.lines[1].get_xdata()[0] == 10


def test_validation_stands_where_its_epoch_ended_under_each_of_its_names():
    rows, ends = [{"top": 0.5}, {"top": 0.6, "rare": 0.1}], [1, 4]
    axes = plots.history(SimpleNamespace(losses=[1.0] * 4, validation=rows, ends=ends))
    lines = {line.get_label(): line for line in axes.figure.axes[1].lines}
    assert list(lines["top"].get_xdata()) == ends
    np.testing.assert_array_equal(lines["rare"].get_ydata(), [math.nan, 0.1])


points = st.tuples(st.integers(1, 9), st.integers(0, 9))


@given(st.lists(points, min_size=1, max_size=8), st.booleans())
def test_the_front_holds_exactly_what_nothing_beats(drawn, higher):
    sign = 1 if higher else -1
    rows = [{"model": str(k), "cost": float(c), "good": float(g)} for k, (c, g) in enumerate(drawn)]
    axes = plots.tradeoff(rows, "cost", "good", higher_is_better=higher)
    front = set(zip(*(map(float, side) for side in axes.lines[0].get_data()), strict=True))
    best = {
        (float(c), float(g))
        for c, g in drawn
        if not any((o, h) != (c, g) and o <= c and sign * h >= sign * g for o, h in drawn)
    }
    plt.close("all")
    assert front == best


@pytest.mark.parametrize("lost", [{"cost": math.nan}, {"good": math.nan}])
def test_a_run_that_diverged_hides_no_front(lost):
    rows = [{"model": str(c), "cost": c, "good": g} for c, g in ((2.0, 1.0), (3.0, 2.0))]
    rows += [{"model": "lost", "cost": 1.0, "good": 9.0, **lost}]
    front = plots.tradeoff(rows, "cost", "good").lines[0]
    assert [list(side) for side in front.get_data()] == [[2.0, 3.0], [1.0, 2.0]]
    assert not len(plots.tradeoff(rows[2:], "cost", "good").lines[0].get_xdata())


def test_the_front_bounds_what_was_reached():
    """Between two points, what you get is the quality of the cheaper one."""
    rows = [{"model": str(c), "cost": c, "good": g} for c, g in ((1.0, 1.0), (3.0, 2.0))]
    front = plots.tradeoff(rows, "cost", "good").lines[0]
    assert front.get_drawstyle() == "steps-post"


def test_tradeoff_names_the_row_without_a_value():
    with pytest.raises(ValueError, match=r"dense.*right"):
        plots.tradeoff([{"model": "dense", "KB": 1.0}], "KB", "right")
    with pytest.raises(ValueError, match="no rows"):
        plots.tradeoff([], "KB", "right")


def test_surface_heights_are_the_function_and_paths_are_kept(device):
    path = torch.tensor([[1.0, 1.0], [0.5, 0.0]], device=device)
    axes = plots.surface(lambda p: p[0], {"momentum": path}, x=(0, 1), y=(0, 1))
    assert axes.lines[0].get_xydata().tolist() == path.tolist()
    with pytest.raises(ValueError, match=r"\(2, 3\)"):
        plots.surface(lambda p: p[0], {"bad": torch.zeros(2, 3)})


def test_surface_survives_a_flat_and_an_infinite_function():
    plots.surface(lambda p: p.sum() * 0)
    plots.surface(lambda p: 1 / p[0].clamp(min=0)).figure.canvas.draw()


@pytest.mark.parametrize("shape", [(4,), (4, 4), (0, 1, 4, 4), (2, 2, 4, 4)])
def test_images_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match="images have shape"):
        plots.images(torch.zeros(shape))


def test_images_keep_their_order_and_need_as_many_labels(device):
    stack = torch.arange(3.0, device=device)[:, None, None].expand(3, 2, 2)
    axes = plots.images(stack, ["a", "b", "c"], columns=2)
    assert [image.get_array().mean() for image in axes.images] == [0.0, 0.5, 1.0]
    assert axes.images[2].get_extent()[3] < axes.images[0].get_extent()[2]  # the second row
    with pytest.raises(ValueError, match="2 labels for 3 images"):
        plots.images(stack, ["a", "b"])


def test_reliability_bars_are_the_accuracy_of_their_bin(device):
    sure = torch.tensor([[9.0, 0.0], [9.0, 0.0], [0.0, 0.1]], device=device)
    axes = plots.reliability(sure, torch.tensor([0, 1, 1], device=device), bins=10)
    bars = {round(bar.get_x(), 1): bar.get_height() for bar in axes.patches}
    assert bars == {0.5: 1.0, 0.9: 0.5}
    with pytest.raises(ValueError, match=r"\(3, 2\) and \(2,\)"):
        plots.reliability(sure, torch.zeros(2))


def test_roofline_bends_where_memory_and_arithmetic_meet():
    axes = plots.roofline(100.0, 10.0, {"a": (1.0, 5.0)})
    xs, ys = axes.lines[0].get_data()
    assert xs[1] == 10
    assert list(ys[1:]) == [100, 100]
    with pytest.raises(ValueError, match="above zero"):
        plots.roofline(1.0, 0.0, {})


def test_a_pattern_is_dark_where_the_weight_stays(device):
    mask = torch.tensor([[[True, False]], [[False, False]]], device=device)
    axes = plots.pattern(mask)
    (image,) = axes.images
    assert image.get_array().tolist() == [[True, False], [False, False]]
    kept, removed = (matplotlib.colors.to_hex(image.cmap(image.norm(v))) for v in (1, 0))
    assert contrast(kept, plots.CARD) >= 3 > contrast(removed, plots.CARD)
    assert axes.get_title(loc="left") == "75 % removed"


def test_zeros_are_counted_apart(device):
    weights = torch.tensor([0.0, 0.0, 0.0, 2.0], device=device)
    axes = plots.histogram(weights)
    assert sum(bar.get_height() for bar in axes.patches) == 1
    assert axes.texts[0].get_text() == "75.0 % are exactly zero"
    assert plots.pattern(weights.reshape(2, 2) != 0).get_title(loc="left") == "75 % removed"
    with pytest.raises(ValueError, match="no values"):
        plots.histogram(torch.zeros(0))


def test_a_histogram_says_what_it_cannot_show():
    tiny = torch.tensor([1e-60, 1.0, 0.0, math.nan, math.inf], dtype=torch.float64)
    axes = plots.histogram(tiny)
    assert sum(bar.get_height() for bar in axes.patches) == 2, "1e-60 is small, not zero"
    text = axes.texts[0].get_text()
    assert text == "20.0 % are exactly zero\n40.0 % are NaN or infinite"
    with pytest.raises(ValueError, match="complex"):
        plots.histogram(torch.ones(2, dtype=torch.complex64))


def test_what_is_lost_hides_nothing_else():
    images = plots.images(torch.tensor([[[math.nan, 1.0]], [[0.0, 3.0]]])).images
    np.testing.assert_allclose(images[1].get_array(), [[0.0, 1.0]])
    rows = [{"model": k, "KB": kb, "right": 1.0} for k, kb in enumerate([math.nan, 1.0, 100.0])]
    assert plots.tradeoff(rows, "KB", "right").get_xscale() == "log"
    plots.surface(lambda p: p.sum() * math.nan).figure.canvas.draw()


@pytest.mark.parametrize(("logit", "target"), [(math.nan, 0), (1.0, 2), (1.0, -100)])
def test_reliability_refuses_what_has_no_confidence_or_class(logit, target):
    with pytest.raises(ValueError, match="logits are NaN, or targets are no class"):
        plots.reliability(torch.tensor([[logit, 0.0]]), torch.tensor([target]))
