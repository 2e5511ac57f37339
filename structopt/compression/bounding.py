"""ReLUs with an end, for few bits; ReLUs with a threshold, for more zeros."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from structopt.channels.exchanging import exchange_
from structopt.channels.nests import tensors_of
from structopt.compression.activations import activations
from structopt.compression.evidence import watch
from structopt.compression.granularity import PerTensor
from structopt.compression.grids import Grid
from structopt.compression.inputs import SAMPLE
from structopt.compression.quantize import fit
from structopt.compression.sameness import made_by
from structopt.losses.checks import real
from structopt.training.copying import copied
from structopt.training.hooked import in_place_of
from structopt.training.statistics import inputs_of, placed


@dataclass(frozen=True)
class Bounded:
    """A model with other activations, and what that did.

    ``bounds``: the number in each activation; ``touched``: the share of its values that it changes;
    ``change``: how far outputs moved, ‖y' - y‖ / ‖y‖ over all batches. All in evaluation mode.
    """

    model: nn.Module
    bounds: dict[str, float]
    touched: dict[str, float]
    change: float

    def __str__(self) -> str:
        lines = [f"{'activation':<28}{'bound':>10}{'touched':>10}"]
        for name, bound in self.bounds.items():
            lines.append(f"{name:<28}{bound:>10.4g}{self.touched[name]:>10.2%}")
        return "\n".join([*lines, f"outputs changed by {self.change:.2%}"])


def clip_activations(
    model: nn.Module, batches: Iterable[Any], grid: Grid, names: Sequence[str] | None = None
) -> Bounded:
    """A copy whose ReLUs end where the grid fitted to their values ends: min(max(x, 0), bound).

    As ReLU6, with an end from the data. Few large values make a grid coarse for all others; behind
    a bound, a plain grid is as fine as its bits allow. ``grid.fit`` says where: ``MSE()`` loses
    least at these bits, ``Percentile`` a share of the values, ``MinMax`` nothing: then outputs on
    the batches stay as they are. Approximate otherwise, by ``change``. The new modules are
    ``nn.Hardtanh``, which exporters and kernels know. Train on to repair, or learn the ends,
    :class:`structopt.compression.PACT`.

    Raises ValueError for a grid that is symmetric or not per tensor, for no batches, ReLUs
    that never ran, made numbers not finite or nothing but zeros, a model without ReLU modules, and
    unknown names.

    Krizhevsky, 2010, "Convolutional deep belief networks on CIFAR-10" (ReLU6); Migacz, 2017 (ends
    from calibration).

    >>> from structopt.compression import Grid, MinMax, Percentile
    >>> model = nn.Sequential(nn.ReLU())
    >>> x = torch.arange(-100.0, 101.0)
    >>> made = clip_activations(model, [x], Grid(4, symmetric=False, fit=Percentile(80)))
    >>> made.model
    Sequential(
      (0): Hardtanh(min_val=0.0, max_val=80.0)
    )
    >>> clip_activations(model, [x], Grid(4, symmetric=False, fit=MinMax())).change
    0.0
    """
    if grid.symmetric or grid.per != PerTensor():
        raise ValueError(
            f"a ReLU makes no negative number: symmetric=False, per tensor, not {grid}"
        )

    def end(values: Tensor) -> float:
        steps = fit(values, grid)
        found, largest = ((grid.codes[1] - steps.zero) * steps.scale)[0], values.amax()
        near = torch.isclose(found, largest.to(found))
        return float(largest if near else found)  # no rounding of its own

    return _bounded(model, batches, names, end, lambda bound: nn.Hardtanh(0.0, bound))


def threshold_activations(
    model: nn.Module,
    batches: Iterable[Any],
    sparsity: float,
    names: Sequence[str] | None = None,
) -> Bounded:
    """A copy whose ReLUs let nothing below a threshold through: x where x > t, else 0.

    t is the smallest threshold that makes this share of an activation's values zero on the batches;
    one that has as many zeros already keeps t = 0. Approximate, by ``change``: what a layer behind
    does not read it need not multiply, :func:`structopt.compression.skip_zeros`. The new modules
    are ``nn.Threshold``.

    Kurtz et al., 2020, "Inducing and exploiting activation sparsity for fast neural network
    inference" (FATReLU). Raises ValueError for a sparsity outside [0, 1), and as
    :func:`clip_activations`.

    >>> model = nn.Sequential(nn.ReLU())
    >>> made = threshold_activations(model, [torch.arange(1.0, 11.0)], 0.7)
    >>> made.model(torch.arange(1.0, 11.0))
    tensor([ 0.,  0.,  0.,  0.,  0.,  0.,  0.,  8.,  9., 10.])
    """
    if not 0 <= real(sparsity) < 1:
        raise ValueError(f"sparsity={sparsity!r}: a share of zeros from 0 to below 1")

    def threshold(values: Tensor) -> float:
        ordered = values.sort().values
        place = math.ceil(sparsity * len(ordered)) - 1
        return float(ordered[place]) if place >= 0 else 0.0

    return _bounded(model, batches, names, threshold, lambda bound: nn.Threshold(bound, 0.0))


def _bounded(
    model: nn.Module,
    batches: Iterable[Any],
    names: Sequence[str] | None,
    find: Callable[[Tensor], float],
    make: Callable[[float], nn.Module],
) -> Bounded:
    """Each ReLU replaced by what is made of the number found in its values."""
    batches, relus = list(batches), activations(model, names, (nn.ReLU,))
    seen: dict[str, list[Tensor]] = {}

    def see(name: str, given: Tensor, out: Tensor) -> None:
        flat = out.flatten()
        every = max(1, len(flat) // SAMPLE)
        sample = flat if every == 1 else torch.cat([flat[::every], flat.amax()[None]])
        seen.setdefault(name, []).append(sample)

    watch(model, batches, relus, see)
    made, bounds, touched = copied(model), {}, {}
    for name in relus:
        if name not in seen:
            raise ValueError(f"{name} never ran on these batches: leave it out of names")
        values = torch.cat(seen[name])
        if not values.isfinite().all():
            raise ValueError(f"{name} makes numbers that are not finite")
        if not values.any():
            raise ValueError(f"{name} makes nothing but zeros: prune its channels instead")
        bounds[name] = find(values)
        new = make(bounds[name])
        touched[name] = float((new(values) != values).double().mean())
        exchange_(made, name, in_place_of(made.get_submodule(name), new, name))
    return Bounded(made, bounds, touched, changed_by(model, made, batches))


@torch.no_grad()
def outputs_of(model: nn.Module, batches: Iterable[Any]) -> list[list[Tensor]]:
    """What the model makes of each batch, in evaluation mode."""
    return [made_by(model, placed(inputs_of(batch), model)) for batch in batches]


@torch.no_grad()
def changed_by(
    model: nn.Module,
    other: nn.Module,
    batches: Iterable[Any],
    known: Sequence[list[Tensor]] | None = None,
) -> float:
    """‖other(x) - model(x)‖ / ‖model(x)‖ over all outputs of all batches, in evaluation mode.

    ``known`` are the :func:`outputs_of` the model, which then does not run. Random numbers that
    the two draw are the same. Raises ValueError where outputs are NaN or infinite, where there are
    none, or empty batches alone, and where shapes differ.
    """
    moved, whole, some = 0.0, 0.0, False
    for place, batch in enumerate(batches):
        given = placed(inputs_of(batch), model)
        before = made_by(model, given) if known is None else known[place]
        for y, z in zip(before, made_by(other, placed(given, other)), strict=True):
            if y.shape != z.shape:
                raise ValueError(f"outputs of {tuple(y.shape)} became {tuple(z.shape)}")
            moved += float((z.double() - y.double()).square().sum())
            whole += float(y.double().square().sum())
        sizes = [len(x) for x in tensors_of(given) if x.ndim]
        some = some or (bool(before) and (not sizes or any(sizes)))
    if not some:
        raise ValueError("the model makes no tensor of these batches, or they are empty")
    if not math.isfinite(moved + whole):
        raise ValueError(
            "the outputs on these batches are NaN or infinite: they cannot be compared"
        )
    return (moved / whole) ** 0.5 if whole else 0.0 if not moved else float("inf")
