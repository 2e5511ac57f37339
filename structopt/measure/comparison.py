"""The honest table: what changed, what it costs, and where a number misleads."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from structopt.measure.costs import Cost, cost
from structopt.measure.resources import file_bytes, peak_memory
from structopt.measure.running import Example, call, undisturbed, with_batch
from structopt.measure.table import Measured, Table
from structopt.measure.timing import Timing, latency
from structopt.measure.widths import free_widths

Metric = Callable[[nn.Module], float]


def compare(
    models: Mapping[str, nn.Module | Sequence[nn.Module]],
    example: Example,
    *,
    metric: Metric | None = None,
    batch: int = 32,
    rounds: int = 20,
) -> Table:
    """One row a model: parameters, MACs, file, memory, latency and metric, with plain words.

    Latencies (milliseconds for one call, at batch 1 and at `batch`) are measured interleaved over
    all models: median ± half the distance of the quartiles. Memory is weights plus the most that
    lives at once while one batch runs. KB = 1000 bytes.

    A ★ marks rows that are Pareto-optimal in metric, MACs and file size: no other row is at least
    as good in all three and better in one. The notes say where a number would mislead; the first
    row is the reference for "not faster". A model with an attribute `runs_on` (as
    `compression.convert` makes it) has its kernels named there, and its memory is not known; with
    `on_paper`, a `Cost`, that is shown instead of what a counter cannot see.

    Args:
        models: {name: model}, or {name: [model of each seed]}. Several models give the metric as
            mean ± sample standard deviation; the first of them is timed.
        example: inputs of any batch size; they are repeated or cut as needed.
        metric: takes a model, gives a number, more is better. Its column has the function's name.
        batch: size of the large batch.
        rounds: rounds of timing; 0 leaves the latency columns out (a table of exact numbers,
            the same on every machine).

    Raises:
        ValueError: models without names, none, an empty list of them, or a batch below 1.

    Example:
        >>> import torch
        >>> nets = {"wide": nn.Linear(64, 64), "narrow": nn.Linear(64, 16)}
        >>> print(compare(nets, torch.zeros(1, 64), rounds=0))
        model   parameters   MACs  file (KB)  memory (KB)
        ------  ----------  -----  ---------  -----------
        wide         4,160  4,096      16.89        24.83
        narrow       1,040  1,024       4.40         6.21
    """
    if not isinstance(models, Mapping):
        raise ValueError(f"give models by name, {{name: model}}, not {type(models).__name__}")
    seeds = {n: list(m) if isinstance(m, Sequence) else [m] for n, m in models.items()}
    if not seeds or not all(seeds.values()) or batch < 1:
        raise ValueError("give at least one model for each name, and batch >= 1")
    first = {name: group[0] for name, group in seeds.items()}
    one, many = with_batch(example, 1), with_batch(example, batch)
    rows: dict[str, dict[str, Any]] = {}
    costs: dict[str, Cost] = {}
    for name, group in seeds.items():
        found = [_on_paper(model, one) for model in group]
        costs[name] = found[0]
        rows[name] = {"model": name, **_columns(group, found, many)}
    timings: dict[int, dict[str, Timing]] = {}
    for size in dict.fromkeys((1, batch)) if rounds else ():
        timings[size] = latency(first, with_batch(example, size), rounds=rounds)
        for name, timing in timings[size].items():
            milliseconds = Measured(1e3 * timing.median, 1e3 * timing.spread)
            rows[name][f"ms (batch {size})"] = milliseconds
    notes = [f"{n}: runs on {where}" for n, m in first.items() if (where := _runs_on(m))]
    notes += _words(costs, timings)
    if metric is not None:
        column = getattr(metric, "__name__", "metric").replace("<lambda>", "metric")
        for name, group in seeds.items():
            rows[name][column] = _mean([float(metric(model)) for model in group])
        notes += _about_seeds({len(group) for group in seeds.values()}, column)
    table = list(rows.values())
    marked = () if metric is None else pareto(table, ("MACs", "file (KB)"), column)
    if rounds:
        timed = timings[1][next(iter(first))]
        notes.append(f"timed on {timed.device}, {rounds} interleaved rounds")
        notes += [
            f"{n}: {w}"
            for n, m in first.items()
            if not _runs_on(m)
            for w in free_widths(m, many, rounds=rounds)
        ]
    return Table(_without_dull_columns(table), notes=tuple(notes), marked=marked)


def pareto(
    rows: Sequence[Mapping[str, Any]], costs: Sequence[str], quality: str
) -> tuple[int, ...]:
    """Numbers of the rows that no other row beats: as good in all columns and better in one.

    A row with NaN in one of them is never among these.

    Args:
        rows: `Table.rows`, or any dicts.
        costs: columns of which less is better.
        quality: the column of which more is better.

    Example:
        >>> rows = [{"KB": 9, "right": 90}, {"KB": 5, "right": 90}, {"KB": 3, "right": 80}]
        >>> pareto(rows, ["KB"], "right")
        (1, 2)
    """
    points = [(*(float(row[c]) for c in costs), -float(row[quality])) for row in rows]

    def beaten(mine: tuple[float, ...]) -> bool:
        return any(map(math.isnan, mine)) or any(
            other != mine and all(o <= m for o, m in zip(other, mine, strict=True))
            for other in points
        )

    return tuple(k for k, point in enumerate(points) if not beaten(point))


def _columns(group: Sequence[nn.Module], found: Sequence[Cost], many: Example) -> dict[str, Any]:
    sizes, memory = [], []
    for model, its in zip(group, found, strict=True):
        sizes.append(file_bytes(model) / 1000 if isinstance(model, nn.Module) else 0.0)
        if _runs_on(model):
            continue  # what other kernels keep for themselves is not seen
        with undisturbed(model, many):
            peak = peak_memory(functools.partial(call, model, many))
        memory.append((its.bytes + peak) / 1000)
    return {
        "parameters": _mean([its.parameters for its in found]),
        "non-zeros": _mean([its.nonzeros for its in found if its.nonzeros is not None]),
        "MACs": _mean([its.macs for its in found]),
        "file (KB)": _mean(sizes),
        "memory (KB)": _mean(memory),
    }


def _runs_on(model: nn.Module) -> str:
    """The kernels that a model says it runs on; nothing for a plain network."""
    return str(getattr(model, "runs_on", ""))


def _on_paper(model: nn.Module, example: Example) -> Cost:
    """No counter sees into other kernels: a model that runs on them brings its costs along."""
    brought = getattr(model, "on_paper", None)
    return brought if isinstance(brought, Cost) else cost(model, example)


def _mean(values: Sequence[float]) -> float | Measured | None:
    if not values:
        return None
    if len(set(values)) == 1 and (len(values) == 1 or isinstance(values[0], int)):
        return values[0]
    if not all(map(math.isfinite, values)):  # a run that diverged
        return Measured(sum(values) / len(values), math.nan)
    return Measured(statistics.mean(values), statistics.stdev(values))


def _words(costs: Mapping[str, Cost], timings: Mapping[int, Mapping[str, Timing]]) -> list[str]:
    words = []
    for name, its in costs.items():
        if its.nonzeros is not None and _is_masked(its.nonzeros, its.parameters):
            zeros = 100 * (1 - its.nonzeros / its.parameters)
            words.append(
                f"{name}: mask only: no speed-up expected "
                f"({zeros:.0f} % of its weights are zero, but none is gone)"
            )
        if its.uncounted:
            words.append(f"{name}: MACs are incomplete, no formula for {', '.join(its.uncounted)}")
    reference = next(iter(costs))
    for size, group in timings.items():
        for name, timing in group.items():
            whole = costs[reference].macs
            fewer = 1 - costs[name].macs / whole if whole else 0.0
            if fewer > 0.1 and timing.lower >= 0.97 * group[reference].median:
                words.append(
                    f"{name}: {100 * fewer:.0f} % fewer MACs than {reference}, "
                    f"but not faster at batch {size}"
                )
    return words


def _about_seeds(counts: set[int], column: str) -> list[str]:
    if max(counts) == 1:
        return [f"{column}: one model each, so its spread is unknown"]
    runs = " or ".join(str(count) for count in sorted(counts))
    return [f"{column}: mean ± standard deviation over {runs} models"]


def _is_masked(nonzeros: float, parameters: float) -> bool:
    """A few zeros are no mask: fresh biases, say, or a dead unit."""
    return nonzeros < 0.95 * parameters


def _without_dull_columns(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Non-zeros are shown only where they say something: where a model is masked."""
    values = [(row["non-zeros"], row["parameters"]) for row in rows]
    if any(n is not None and _is_masked(float(n), float(p)) for n, p in values):
        return rows
    return [{k: v for k, v in row.items() if k != "non-zeros"} for row in rows]
