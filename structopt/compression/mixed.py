"""Bits for each weight by how much it matters, within a number of bytes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from structopt.compression.bounding import changed_by, outputs_of
from structopt.compression.codes import chosen, naming, put_
from structopt.compression.grids import Grid
from structopt.compression.quantize import Quantized, quantize
from structopt.training.copying import copied

UNITS = 4096  # parts of the budget that sizes are counted in, where it is larger


@dataclass(frozen=True)
class MixedBits:
    """Bits for each weight, and the codes that :func:`structopt.compression.put_` takes.

    ``changes``: for each weight and each number of bits, how far outputs move, ‖y' - y‖ / ‖y‖,
    when this weight alone is rounded. ``expected``: the root of the sum of squares of those chosen;
    ``change``: what was measured with all of them rounded. ``bytes``: of codes and steps, before
    any entropy coding.
    """

    bits: dict[str, int]
    codes: dict[str, Quantized]
    changes: dict[str, dict[int, float]]
    bytes: int
    expected: float
    change: float

    def __str__(self) -> str:
        tried = list(next(iter(self.changes.values())))
        lines = [f"{'weight':<28}{'bits':>5}  " + "".join(f"{f'at {b}':>9}" for b in tried)]
        for name, changes in self.changes.items():
            shown = "".join(f"{value:>9.2%}" for value in changes.values())
            lines.append(f"{name:<28}{self.bits[name]:>5}  {shown}")
        lines.append(f"{self.bytes:,} bytes; outputs change by {self.change:.2%}")
        return "\n".join(lines)


def mix_bits(
    model: nn.Module,
    batches: Iterable[Any],
    budget: int,
    grid: Grid,
    *,
    bits: Sequence[int] = (2, 3, 4, 5, 6, 8),
    names: Sequence[str] | None = None,
) -> MixedBits:
    """The bits for each weight that move outputs least, with at most ``budget`` bytes in all.

    Each weight is rounded alone, to ``grid`` with each of these bits, and the outputs on the
    batches are compared; no labels are needed. Squared changes are taken to add up, as those of
    independent errors do (``change`` against ``expected`` shows whether they did), and the least
    sum within the budget is found by dynamic programming, exactly where the budget has at most
    4,096 bytes, else with sizes rounded up to 1/4096 of it.

    ``names`` and weights as :func:`structopt.compression.quantize_weights`. Cai et al., 2020,
    "ZeroQ: a novel zero shot quantization framework" (sensitivities that add up, within a size).

    Raises ValueError for a budget below the fewest bits, no bits, no batches, and as ``quantize``.

    >>> import torch
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> found = mix_bits(model, [torch.randn(16, 4)], 40, Grid())
    >>> sorted(found.bits), found.bytes <= 40
    (['0.weight', '2.weight'], True)
    """
    if not bits:
        raise ValueError("bits names no number of bits")
    batches, weights = list(batches), chosen(model, names)
    if not batches or not weights:
        raise ValueError("there are no batches" if weights else "the model has no weight to round")
    changes: dict[str, dict[int, float]] = {}
    known = outputs_of(model, batches)
    coded: dict[str, dict[int, Quantized]] = {}
    for name, weight in weights.items():
        with naming(name):
            coded[name] = {b: quantize(weight, replace(grid, bits=b)) for b in sorted(set(bits))}
        changes[name] = {}
        for b, codes in coded[name].items():
            rounded = put_(copied(model), {name: codes})
            changes[name][b] = changed_by(model, rounded, batches, known)
    sizes = {name: {b: size_of(codes) for b, codes in own.items()} for name, own in coded.items()}
    least = sum(min(own.values()) for own in sizes.values())
    if not budget >= least:
        raise ValueError(f"budget={budget:,} bytes, but the fewest bits take {least:,}")
    squares = [{b: changes[n][b] ** 2 for b in changes[n]} for n in weights]
    most = sum(max(own.values()) for own in sizes.values())
    picks = _cheapest([*sizes.values()], squares, min(budget, most))
    best = dict(zip(weights, picks, strict=True))
    made = {name: coded[name][b] for name, b in best.items()}
    return MixedBits(
        bits=best,
        codes=made,
        changes=changes,
        bytes=sum(sizes[name][b] for name, b in best.items()),
        expected=sum(changes[name][b] ** 2 for name, b in best.items()) ** 0.5,
        change=changed_by(model, put_(copied(model), made), batches, known),
    )


def size_of(codes: Quantized) -> int:
    """Bytes of the codes, packed, and of their steps."""

    def held(steps: Tensor) -> int:
        return steps.numel() * steps.dtype.itemsize

    zeros = 0 if codes.grid.symmetric else codes.steps.zero.numel()  # one byte each
    packed: int = -(-codes.codes.numel() * codes.grid.bits // 8)
    return packed + held(codes.steps.scale) + zeros


def _cheapest(
    sizes: Sequence[dict[int, int]], costs: Sequence[dict[int, float]], budget: int
) -> tuple[int, ...]:
    """One choice from each, with the least sum of costs, whose sizes fit into the budget."""
    unit = -(-budget // UNITS)
    room = budget // unit
    front: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
    for own, cost in zip(sizes, costs, strict=True):
        found: dict[int, tuple[float, tuple[int, ...]]] = {}
        for used, (paid, picks) in front.items():
            for choice, size in own.items():
                total = used + -(-size // unit)
                made = paid + cost[choice]
                if total <= room and (total not in found or made < found[total][0]):
                    found[total] = made, (*picks, choice)
        front, best = {}, float("inf")
        for total in sorted(found):  # more bytes only for less cost
            if found[total][0] < best:
                front[total] = found[total]
                best = found[total][0]
    if not front:  # rounding the sizes left no room: the fewest bytes fit
        return tuple(min(own, key=lambda b: (own[b], -b)) for own in sizes)
    return min(front.values())[1]
