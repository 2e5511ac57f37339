"""A network in consecutive stages, one tensor from each to the next."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from structopt.measure.running import Example, call, tensors_of
from structopt.slicing.asking import own
from structopt.slicing.cutpoints import CutPoint, as_it_is, crossing, find, points_of
from structopt.slicing.tracing import Stage, fetched, kept_whole, traced
from structopt.training.copying import copied
from structopt.training.hooked import say_traced


class Stages(nn.Sequential):
    """Stages one after the other: the first takes what the model takes; made by `split_stages`."""

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """What the whole network gives."""
        first, *rest = self
        value = first(*inputs, **named)
        for stage in rest:
            value = stage(value)
        return value


@torch.inference_mode(False)  # else what is made could not be trained
def split_stages(
    model: nn.Module,
    example: Example,
    cuts: Sequence[str | CutPoint],
    *,
    whole: Collection[str] = (),
) -> Stages:
    """Cut a network into ``len(cuts) + 1`` stages that give what it gives, bit for bit.

    The stages hold a copy of the network's own modules under their own names, so that the state
    dicts of all stages together are the network's, but for what it never reads. They run the same
    operations in the same order; the example is tried, and any difference is an error. What the
    model decides outside of its modules by its ``training`` flag, and all where ``torch.export``
    had to trace it, is fixed: such stages refuse to change their mode. Those that ``torch.export``
    traced, which fixes sizes too, refuse inputs of others than the example's.

    Args:
        model: as for `cut_points`, with ``example`` and ``whole``.
        cuts: the cut points behind which a new stage begins, or their names.

    Raises:
        ValueError: as `cut_points`; a name that is no cut point; cuts that are not in order; or
            outputs that differ from the model's, as where the forward pass draws random numbers
            that tracing has frozen (on the ``meta`` device shapes alone are compared).

    Example:
        >>> from structopt.networks import ResNet20
        >>> model, image = ResNet20(width=4).eval(), torch.rand(2, 1, 28, 28)
        >>> stages = split_stages(model, image, ["stage1", "stage2"])
        >>> [sum(p.numel() for p in stage.parameters()) for stage in stages]
        [956, 3312, 13194]
        >>> torch.equal(stages(image), model(image))
        True
    """
    if isinstance(cuts, str):
        raise ValueError(f"cuts is a list of names: [{cuts!r}]")
    model = copied(model)
    graph = traced(model, example, whole)
    with as_it_is(model):
        points = points_of(graph, model, example)
        ends = [find(points, cut).position for cut in cuts]
        if ends != sorted(set(ends)):
            names = [point if isinstance(point, str) else point.name for point in cuts]
            raise ValueError(f"cuts={names}: name each once, in the order in which they run")
        stages = Stages(*_stages(graph, ends))
        if "exported" in graph.meta:
            for stage in stages:
                stage.register_forward_pre_hook(_SameShapes(), with_kwargs=True)
        _verify(model, stages, example)
    _set_modes(stages, model)
    say_traced(model, kept_whole(graph, whole), "the stages")
    return stages


def _set_modes(stages: Stages, model: nn.Module) -> None:
    """Modules that the graph only opens are made anew, in training mode."""
    modes = {name: module.training for name, module in model.named_modules()}
    stages.training = model.training
    for stage in stages:
        for name, module in stage.named_modules():
            module.training = modes.get(name, model.training)


class _SameShapes:
    """Holds a stage to the shapes of its first call, which is that of the example."""

    shapes: list[tuple[int, ...]] | None = None

    def __call__(self, _stage: nn.Module, args: Any, named: Any) -> None:
        found = [tuple(tensor.shape) for tensor in tensors_of((*args, *named.values()))]
        self.shapes = found if self.shapes is None else self.shapes
        if found != self.shapes:
            raise ValueError(
                f"these stages were traced by torch.export, which fixes all sizes, for "
                f"{self.shapes}, not {found}: cut again with an example of that size"
            )


def _stages(whole: Stage, ends: Sequence[int]) -> Iterator[Stage]:
    """The graph's nodes dealt out to stages; weights are fetched by the stage that reads them."""
    nodes = list(whole.graph.nodes)
    weights, start = fetched(nodes), 0
    for end in [*ends, len(nodes) - 1]:
        graph = fx.Graph()
        env = dict[fx.Node, fx.Node]()
        last = end == len(nodes) - 1
        part = [node for node in nodes[start : end + 1] if node not in weights]
        if start:
            reads = {n for node in part for n in node.all_input_nodes} - weights
            (coming,) = reads - set(part)
            env[coming] = graph.placeholder("value")
        for node in part:
            for value in node.all_input_nodes:
                _fetch(value, graph, env)
            env[node] = graph.node_copy(node, env.__getitem__)
        if not last:
            (passing,) = crossing(nodes)[end]
            graph.output(env[passing])
        yield whole.part(graph, first=not start, last=last)
        start = end + 1


def _fetch(value: fx.Node, graph: fx.Graph, env: dict[fx.Node, fx.Node]) -> None:
    """Copy a weight, or what is computed of weights, into the stage that reads it."""
    if value not in env:
        for inner in value.all_input_nodes:
            _fetch(inner, graph, env)
        env[value] = graph.node_copy(value, env.__getitem__)


def _same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, where NaN equals NaN; on ``meta`` in shape."""
    if a.shape != b.shape or a.dtype != b.dtype or a.is_meta:
        return a.shape == b.shape and a.dtype == b.dtype
    return bool(((a == b) | ((a != a) & (b != b))).all())


def _verify(model: nn.Module, stages: Stages, example: Example) -> None:
    made = []
    for one in (model, stages):  # which share their buffers: each begins with them as they are
        with as_it_is(model, stages):
            torch.manual_seed(0)
            made.append(tensors_of(call(one, own(example))))
            written = dict(model.named_buffers())
            for stage in stages if one is stages else ():
                written |= {n: b for n, b in stage.named_buffers() if n in written}
            made[-1] += [buffer.clone() for buffer in written.values()]
    expected, found = made
    if len(expected) != len(found) or not all(map(_same, expected, found)):
        raise ValueError(
            f"the stages of {type(model).__name__} do not give what it gives: its forward pass "
            "holds something that tracing has frozen, such as random numbers, a counter or an "
            "average in a buffer; name the module where that is in whole=. A hook on the model "
            "itself is not traced"
        )
