"""What a pipeline of stages costs, and the best cuts by exact dynamic programming."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch.distributed.pipelining import Schedule1F1B, ScheduleGPipe
from torch.distributed.pipelining.schedules import PipelineScheduleSingle

from structopt.losses.checks import real, whole
from structopt.slicing.layers import Layer

Schedule = type[PipelineScheduleSingle]


@dataclass(frozen=True)
class Plan:
    """Cuts, and what `pipeline_cost` predicts for them.

    Attributes:
        cuts: names of the cut points.
        stages: seconds of each stage for one micro-batch.
        links: seconds that one micro-batch takes across each cut.
        memory: bytes that each device holds at most; the optimiser's state not counted.
        microbatches: how many run through.
    """

    cuts: tuple[str, ...]
    stages: tuple[float, ...]
    links: tuple[float, ...]
    memory: tuple[int, ...]
    microbatches: int

    @property
    def seconds(self) -> float:
        """All micro-batches, Σ stages + Σ links + (m - 1) · the slowest stage or link."""
        places = [*self.stages, *self.links]
        return sum(places) + (self.microbatches - 1) * max(places)

    @property
    def bubble(self) -> float:
        """The share of the devices' time in which they wait; 0 where nothing takes any."""
        work, seconds = self.microbatches * sum(self.stages), self.seconds
        return 1 - work / (len(self.stages) * seconds) if seconds else 0.0

    @property
    def throughput(self) -> float:
        """Micro-batches a second; infinite where nothing takes any time."""
        return self.microbatches / self.seconds if self.seconds else math.inf


def pipeline_cost(
    layers: Sequence[Layer],
    cuts: Sequence[str],
    *,
    microbatches: int = 1,
    bandwidth: float = math.inf,
    schedule: Schedule = ScheduleGPipe,
) -> Plan:
    """Predict a pipeline: m micro-batches through stages and links that all work at once.

    Stages and links take turns in one line, each with a time that all micro-batches share. Then the
    first needs the sum of all times, and each further one leaves the line one slowest time later:

        T = Σ stages + Σ links + (m - 1) · max(stages and links)

    In training, where all go forward before they come back, this is exact if the backward pass is
    everywhere the same multiple of the forward pass (Huang et al., 2019, "GPipe"). 1F1B waits as
    long, but holds at most as many micro-batches as there are stages ahead, not all (Narayanan et
    al., 2019, "PipeDream").

    Args:
        layers: from `measure_layers`.
        cuts: names of the layers behind which a new stage begins.
        microbatches: how many.
        bandwidth: bytes a second across each cut.
        schedule: torch's ``ScheduleGPipe`` or ``Schedule1F1B``, for the memory.

    Raises:
        ValueError: names that no layer has, or not in order; a number below 1 or a bandwidth of 0.

    Example:
        >>> times = {"a": 2.0, "b": 1.0, "": 1.0}
        >>> layers = [Layer(name, seconds, 10, 0, 6) for name, seconds in times.items()]
        >>> plan = pipeline_cost(layers, ["a"], microbatches=3, bandwidth=6)
        >>> plan.stages, plan.links, plan.seconds
        ((2.0, 2.0), (1.0,), 9.0)
    """
    _check(microbatches, bandwidth, schedule)
    if isinstance(cuts, str):
        raise ValueError(f"cuts is a list of names: [{cuts!r}]")
    names = [layer.name for layer in layers[:-1]]
    missing = [cut for cut in cuts if cut not in names]
    if missing:
        raise ValueError(f"cuts={missing}: no such layers; there are {', '.join(names)}")
    ends = [names.index(cut) + 1 for cut in cuts]
    if ends != sorted(set(ends)):
        raise ValueError(f"cuts={list(cuts)}: name each once, in the order in which they run")
    bounds = [0, *ends, len(layers)]
    parts = [layers[i:j] for i, j in itertools.pairwise(bounds)]
    held = [_held(s, len(parts), microbatches, schedule) for s in range(len(parts))]
    return Plan(
        cuts=tuple(cuts),
        stages=tuple(sum(layer.seconds for layer in part) for part in parts),
        links=tuple(part[-1].sent / bandwidth for part in parts[:-1]),
        memory=tuple(_memory(part, count) for part, count in zip(parts, held, strict=True)),
        microbatches=microbatches,
    )


def choose_cuts(
    layers: Sequence[Layer],
    k: int,
    *,
    microbatches: int = 1,
    bandwidth: float = math.inf,
    memory: float | Sequence[float] = math.inf,
    schedule: Schedule = ScheduleGPipe,
) -> Plan:
    """The k stages with the shortest `pipeline_cost`, by exact dynamic programming.

    For each number of stages and each layer they may end with, it keeps the beginnings of which
    none is both shorter in sum and quicker at its slowest place: all that an optimum can contain.

    Args:
        layers: from `measure_layers`.
        k: how many stages, at least 1.
        microbatches, bandwidth, schedule: as for `pipeline_cost`.
        memory: bytes of each device, or one number for all.

    Raises:
        ValueError: more stages than pieces; a budget of memory that no cut keeps to.

    Example:
        >>> times = {"a": 1.0, "b": 2.0, "c": 2.0, "": 1.0}
        >>> layers = [Layer(name, seconds, 0, 0, 8) for name, seconds in times.items()]
        >>> choose_cuts(layers, 2, microbatches=4).cuts
        ('b',)
    """
    _check(microbatches, bandwidth, schedule)
    if not 1 <= whole(k) <= len(layers):
        names = ", ".join(layer.name for layer in layers[:-1])
        raise ValueError(
            f"k={k!r}: give a whole number of stages; they need k - 1 cuts, and there are "
            f"{len(layers) - 1} cut points: {names}"
        )
    room = list(memory) if isinstance(memory, Sequence) else [memory] * k
    if len(room) != k or any(math.isnan(real(r)) for r in room):
        raise ValueError(f"memory={room}: give one number of bytes for each of {k} stages")
    # (slowest place, sum of links, where each stage ended), for the first `end` layers
    ways: dict[int, list[tuple[float, float, tuple[int, ...]]]] = {0: [(0.0, 0.0, ())]}
    for s in range(k):
        held = _held(s, k, microbatches, schedule)
        longer: dict[int, list[tuple[float, float, tuple[int, ...]]]] = {}
        for end in range(s + 1, len(layers) - (k - 1 - s) + 1):
            if s == k - 1 and end < len(layers):
                continue
            found = []
            for start, beginnings in ways.items():
                part = layers[start:end]
                if start >= end or _memory(part, held) > room[s]:
                    continue
                time = sum(layer.seconds for layer in part)
                link = part[-1].sent / bandwidth if s < k - 1 else 0.0
                found += [
                    (max(slowest, time, link), links + link, (*ends, end))
                    for slowest, links, ends in beginnings
                ]
            if found:
                longer[end] = _best(found)
        ways = longer
    if len(layers) not in ways:
        raise ValueError(_too_small(layers, k, room))
    _, _, ends = min(ways[len(layers)], key=lambda way: way[1] + (microbatches - 1) * way[0])
    return pipeline_cost(
        layers,
        [layers[end - 1].name for end in ends[:-1]],
        microbatches=microbatches,
        bandwidth=bandwidth,
        schedule=schedule,
    )


def _best(ways: list[tuple[float, float, tuple[int, ...]]]) -> list[Any]:
    """Those that no other beats in both numbers."""
    kept: list[Any] = []
    for way in sorted(ways):
        if not kept or way[1] < kept[-1][1]:
            kept.append(way)
    return kept


def _held(stage: int, stages: int, microbatches: int, schedule: Schedule) -> int:
    """How many micro-batches' activations a stage keeps at once."""
    return min(microbatches, stages - stage) if issubclass(schedule, Schedule1F1B) else microbatches


def _memory(part: Sequence[Layer], held: int) -> int:
    return sum(layer.state + held * layer.saved for layer in part)


def _too_small(layers: Sequence[Layer], k: int, room: Sequence[float]) -> str:
    largest = max(layers, key=lambda layer: layer.state)
    return (
        f"no {k} stages fit into memory of {', '.join(f'{r:,.0f}' for r in room)} bytes: all "
        f"layers have {sum(layer.state for layer in layers):,} bytes of state, the largest alone "
        f"{largest.state:,}; take more stages, fewer micro-batches or Schedule1F1B"
    )


def _check(microbatches: int, bandwidth: float, schedule: Schedule) -> None:
    if not real(bandwidth) > 0:
        raise ValueError(f"bandwidth={bandwidth!r}: give bytes a second, above 0")
    check_run(microbatches, schedule)


def check_run(microbatches: int, schedule: Schedule) -> None:
    if not whole(microbatches) >= 1:
        raise ValueError(f"microbatches={microbatches!r}: give a whole number, at least 1")
    known = isinstance(schedule, type) and issubclass(schedule, (ScheduleGPipe, Schedule1F1B))
    if not known:
        raise ValueError(f"schedule={schedule!r}: give torch's ScheduleGPipe or Schedule1F1B")
