"""Where a network can be cut in two, so that one tensor is all that passes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from structopt.channels.nests import first_line
from structopt.measure.running import Example, undisturbed
from structopt.slicing.asking import own
from structopt.slicing.tracing import Stage, aliases, fetched, told, traced


@dataclass(frozen=True)
class CutPoint:
    """A place where one tensor is all that passes.

    Attributes:
        name: the outermost module that ends here, or the operation where none does.
        shape: of the tensor, for the example given.
        bytes: of the tensor.
        names: all modules that end here, each good as a name.
    """

    name: str
    shape: tuple[int, ...]
    bytes: int
    names: tuple[str, ...] = field(repr=False)
    position: int = field(repr=False)


@torch.inference_mode(False)  # whose tensors do not count what is written to them
def cut_points(
    model: nn.Module, example: Example, *, whole: Collection[str] = ()
) -> tuple[CutPoint, ...]:
    """Where a network can be cut in two, in the order in which it runs.

    A cut may lie wherever one tensor of real numbers is all that passes: behind the blocks of a
    residual network, not inside them. What is written to in place behind it is no cut either,
    since a received tensor must stay as it was sent for the gradient. ``torch.fx`` does not look
    into the layers of ``torch.nn``, ``nn.TransformerEncoder`` among them: hold its layers in an
    ``nn.Sequential`` to cut between them.

    Args:
        model: any that ``torch.fx`` or, where that fails, ``torch.export`` can trace.
        example: inputs for it; a tuple gives arguments, a dict keywords.
        whole: names of modules not to look into, such as those with control flow on data.

    Raises:
        ValueError: the network cannot be traced, or values are carried past every point; the
            message names them.

    Example:
        >>> import torch
        >>> from structopt.networks import ResNet20
        >>> points = cut_points(ResNet20(width=4), torch.zeros(1, 1, 28, 28))
        >>> [point.name for point in points if point.name.startswith("stage")]
        ['stage1.0', 'stage1.1', 'stage1', 'stage2.0', 'stage2.1', 'stage2', ... 'stage3']
    """
    graph = traced(model, example, whole)
    with as_it_is(model):
        return points_of(graph, model, example)


def find(points: Sequence[CutPoint], cut: str | CutPoint) -> CutPoint:
    """The cut point with that name."""
    name = cut.name if isinstance(cut, CutPoint) else cut
    for point in points:
        if name in (point.name, *point.names):
            return point
    raise ValueError(
        f"{name!r} is no cut point: other values are carried past it, or it does not exist; "
        f"there are {', '.join(point.name for point in points)}"
    )


@contextmanager
def as_it_is(*models: nn.Module) -> Iterator[None]:
    """Run without gradients in the mode the models are in; buffers are given back afterwards."""
    together = nn.ModuleList(models)
    modes = [(module, module.training) for module in together.modules()]
    with undisturbed(together, ()):
        for module, mode in modes:
            module.training = mode
        yield


class _Watch(fx.Interpreter):
    """Notes the one tensor that passes each point, and how often it was written to by then."""

    def __init__(self, graph: fx.GraphModule, passing: dict[fx.Node, fx.Node]) -> None:
        super().__init__(graph)
        self.passing, self.seen = passing, dict[fx.Node, tuple[Tensor, int]]()

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n in self.passing:
            held = value if self.passing[n] is n else self.env[self.passing[n]]
            if isinstance(held, Tensor) and held.is_floating_point():
                self.seen[n] = (held, held._version)
        return value


def points_of(graph: Stage, model: nn.Module, example: Example) -> tuple[CutPoint, ...]:
    nodes = list(graph.graph.nodes)
    works = [i for i, n in enumerate(nodes) if n.op.startswith("call")]
    past, weights = crossing(nodes), fetched(nodes)
    inside = range(works[0], works[-1]) if works else range(0)
    single = {i: next(iter(past[i])) for i in inside if len(past[i]) == 1}
    # where an input itself passes nothing has been done, and other inputs may be still to come
    single = {i: value for i, value in single.items() if value.op != "placeholder"}
    watch = _Watch(graph, {nodes[i]: value for i, value in single.items()})
    try:
        watch.run(*graph.arguments(own(example)))
    except (RuntimeError, TypeError) as problem:
        raise ValueError(f"the model does not accept the example: {first_line(problem)}") from None
    points, taken = dict[fx.Node, CutPoint](), dict[str, int]()
    for i, passing in single.items():
        if nodes[i] not in watch.seen or nodes[i] in weights:
            continue
        value, version = watch.seen[nodes[i]]
        if value._version != version:
            continue
        names = list(points[passing].names) if passing in points else []
        for name in aliases(nodes[i], nodes[i + 1]):
            taken[name] = taken.get(name, 0) + 1  # a module that runs twice ends twice
            names.append(name if taken[name] == 1 else f"{name}#{taken[name]}")
        found = CutPoint(names[0], tuple(value.shape), value.nbytes, tuple(names), i)
        points[passing] = found  # the last of the places that the value passes
    if not points:
        raise ValueError(_why_none(nodes, [past[i] for i in inside], model))
    return tuple(points.values())


def crossing(nodes: list[fx.Node]) -> list[set[fx.Node]]:
    """For each node, the values that are read behind it and made no later than it."""
    weights = fetched(nodes)  # by each stage
    last = {v: i for i, n in enumerate(nodes) if n not in weights for v in n.all_input_nodes}
    found, live = [], set[fx.Node]()
    for i, node in enumerate(nodes):
        made = {node} - weights
        live = {value for value in live | made if last.get(value, -1) > i}
        found.append(live)
    return found


def _why_none(nodes: list[fx.Node], crossing: list[set[fx.Node]], model: nn.Module) -> str:
    kind = type(model).__name__
    if not crossing:
        return f"{kind} has no cut point: it does one thing alone"
    if any(len(values) == 1 for values in crossing):
        return (
            f"{kind} has no cut point: where one value passes, it is no tensor of real numbers, or "
            "is written to in place behind the cut (inplace=True)"
        )
    past = Counter(value for values in crossing for value in values)
    value, times = past.most_common(1)[0]
    return (
        f"{kind} has no cut point: {told(value)} is carried past {times} of its {len(crossing)} "
        "places beside what is computed there, as a residual is; cut one of its modules instead, "
        "or put what reads that value into the module that makes it"
    )
