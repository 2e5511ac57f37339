"""Training that pays for bits: each weight is rounded, and its code costs what the file would."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from structopt.compression.codes import chosen, naming, put_
from structopt.compression.grids import Grid, Steps
from structopt.compression.quantize import Quantized, as_finite, straight_through
from structopt.losses.checks import wide
from structopt.training import Objective
from structopt.training.copying import copied

LAST = 127  # codes run from -LAST to LAST: a grid of 8 bits
PARTS = 3  # densities in a mixture
FLOOR = 1e-4  # share of all probability that lies evenly on the codes, so that none costs ∞


class _Bits(torch.autograd.Function):
    """Σ table[round(y)] forwards; backwards y sees the line between its two neighbours."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, counts: Tensor, table: Tensor) -> Tensor:
        ctx.save_for_backward(y, table)
        return counts @ table

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        y, table = ctx.saved_tensors
        below = (y.floor().int() + LAST).clamp(max=2 * LAST - 1)
        slopes = (table.diff() * gradients[0]).to(y.dtype)
        return slopes.index_select(0, below.flatten()).view_as(y), None, None


def _counts(codes: Tensor) -> Tensor:
    """How often each code from -127 to 127 occurs."""
    places = codes.detach().round().int().flatten() + LAST
    return torch.bincount(places, minlength=2 * LAST + 1)


class LearnedCode(nn.Module):
    """Rounds one tensor to whole multiples of a learned step, and knows what the codes cost.

    A code k has the probability P(k) = Σ w (1 - θ)/(1 + θ) θ^|k|, a mixture of three discrete
    Laplace densities, and costs -log2 P(k). The step is a parameter; the mixture follows the codes
    by expectation and maximisation (Dempster et al., 1977), two rounds for each step of training.
    """

    shares: Tensor
    spreads: Tensor

    def __init__(self, step: Tensor) -> None:
        super().__init__()
        self.log_step = nn.Parameter(step.log())
        self.register_buffer("shares", step.new_full((PARTS,), 1 / PARTS))
        self.register_buffer("spreads", step.new_tensor([0.05, 0.5, 5.0]))  # means of |k|

    def codes(self, x: Tensor) -> Tensor:
        """The codes of ``x`` before they are rounded."""
        return (x * (-self.log_step).exp()).clamp(-LAST, LAST)

    def chances(self) -> Tensor:
        """Share times probability of each code, for each part of the mixture: (3, 255)."""
        size = torch.arange(-LAST, LAST + 1, device=self.shares.device).abs()
        theta = ((self.spreads.square() + 1).sqrt() - 1) / self.spreads
        return (self.shares * (1 - theta) / (1 + theta))[:, None] * theta[:, None] ** size

    def table(self) -> Tensor:
        """Bits of each code from -127 to 127."""
        return -((1 - FLOOR) * self.chances().sum(0) + FLOOR / (2 * LAST + 1)).log2()

    def bits(self, x: Tensor) -> Tensor:
        """What the codes of ``x`` cost together, a scalar with a gradient."""
        codes = self.codes(x)
        counts = _counts(codes).to(self.shares.dtype)
        if self.training and torch.is_grad_enabled() and codes.numel():
            self._follow(counts, rounds=2)
        made: Tensor = _Bits.apply(codes, counts, self.table())
        return made

    def forward(self, x: Tensor) -> Tensor:
        codes = self.codes(x)
        return straight_through(codes, codes.round(), torch.ones_like(codes)) * self.log_step.exp()

    def fit(self, codes: Tensor, rounds: int) -> None:
        """Lay the mixture over these codes, from where it is."""
        if codes.numel():
            self._follow(_counts(codes).to(self.shares.dtype), rounds)

    @torch.no_grad()
    def _follow(self, counts: Tensor, rounds: int) -> None:
        size = torch.arange(-LAST, LAST + 1, device=counts.device).abs()
        for _ in range(rounds):
            chances = self.chances()
            whole = chances.sum(0).clamp(min=torch.finfo(chances.dtype).tiny)
            mine = chances / whole * counts  # (3, 255): how many codes are of which part
            number = mine.sum(1).clamp(min=1e-6)
            self.shares.copy_(number / number.sum())
            self.spreads.copy_((mine @ size.to(mine.dtype) / number).clamp(min=1e-4))


class Rated(nn.Module):
    """A model whose weights are rounded in each forward pass, and whose bits are counted.

    Made by :func:`prepare_rate`. Its parameters are those of the model, and of each code.
    """

    def __init__(self, model: nn.Module, coding: dict[str, LearnedCode]) -> None:
        super().__init__()
        self.model, self.names = model, list(coding)
        self.coding = nn.ModuleList(coding.values())
        self.numbers = sum(model.get_parameter(name).numel() for name in self.names)

    def _each(self, value: Callable[[LearnedCode, Tensor], Any]) -> dict[str, Any]:
        made = {}
        for name, coding in zip(self.names, self.coding, strict=True):
            assert isinstance(coding, LearnedCode)
            with naming(name):
                made[name] = value(coding, self.model.get_parameter(name))
        return made

    def bits(self) -> Tensor:
        """What the codes of all these weights cost, a scalar with a gradient."""
        return torch.stack([*self._each(LearnedCode.bits).values()]).sum()

    def forward(self, *given: Any, **named: Any) -> Any:
        return functional_call(self.model, self._each(LearnedCode.__call__), given, named)

    @torch.no_grad()
    def finish(self) -> tuple[nn.Module, dict[str, Quantized]]:
        """The plain model with rounded weights, and their codes, for ``compression.save``.

        It computes what this one does. Each grid has the fewest bits that hold its codes.
        """
        codes = self._each(_quantized)
        return put_(copied(self.model), codes), codes


def _quantized(coding: LearnedCode, weight: Tensor) -> Quantized:
    codes = coding.codes(weight).round()
    as_finite(codes)  # complains
    largest = int(codes.abs().max()) if codes.numel() else 0
    bits = max(2, math.ceil(math.log2(largest + 1)) + 1)
    scale = wide(coding.log_step.exp()).reshape(1)  # the type that files have
    steps = Steps(scale, torch.zeros_like(scale))
    return Quantized(codes.to(torch.int8), steps, Grid(bits), weight.dtype)


def prepare_rate(
    model: nn.Module, names: Sequence[str] | None = None, *, step: float = 0.25
) -> Rated:
    """A copy of the model to train for few bits, in the one loop, by :class:`RatePenalty`.

    Each of the parameters ``names`` (by default all with two dimensions or more) becomes a learned
    step times whole numbers from -127 to 127, whose cost a fitted density tells. The first step
    is ``step`` times the root mean square of the tensor's numbers that are not zero. Give the
    optimiser ``rated.parameters()``, and take the result by ``rated.finish()``.

    The task's gradient passes the rounding straight through (Bengio et al., 2013). The bits' goes
    along the line between the costs of the two nearest codes, the mean cost of rounding at random
    without bias; so a weight on its way between two codes is drawn to the cheaper one.

    Oktay et al., 2020, "Scalable model compression by entropy penalized reparameterization".
    Raises ValueError for a name that the model has not, weights that are no finite floats of 32
    bits or more, and a step that is not positive.

    >>> rated = prepare_rate(nn.Linear(30, 20))
    >>> model, codes = rated.finish()
    >>> x = torch.randn(5, 30)
    >>> torch.equal(model(x), rated(x))
    True
    """
    if not 0 < step < math.inf:
        raise ValueError(f"step={step}: the first step is a positive share of the weights' size")
    made, coding = copied(model), {}
    if not chosen(made, names):
        raise ValueError("the model has no weight to round")
    for name, weight in chosen(made, names).items():
        with naming(name):
            if weight.dtype.itemsize < 4:
                raise ValueError(f"{weight.dtype} is too coarse to train: model.float() first")
            numbers = as_finite(weight)
            squares = numbers[numbers != 0].square()
            size = squares.mean().sqrt() if len(squares) else torch.ones_like(numbers.sum())
            coding[name] = LearnedCode(step * size)
            coding[name].fit(coding[name].codes(numbers), rounds=100)
    return Rated(made, coding)


class RatePenalty(nn.Module):
    """``objective(model, batch) + price · bits / numbers``, for a model of :func:`prepare_rate`.

    ``price`` is what one bit a weight may cost in loss: the higher, the smaller the file.
    Raises ValueError for a negative price, and for a model that counts no bits.

    >>> from structopt.training import supervised
    >>> batch = torch.ones(4, 3), torch.zeros(4).long()
    >>> RatePenalty(supervised(), price=0.1)(prepare_rate(nn.Linear(3, 2)), batch).ndim
    0
    """

    def __init__(self, objective: Objective, price: float) -> None:
        super().__init__()
        if not 0 <= price < math.inf:
            raise ValueError(f"price={price}: a bit costs nothing or more")
        self.objective, self.price = objective, price

    def forward(self, model: nn.Module, batch: Any) -> Tensor:
        if not isinstance(model, Rated):
            raise ValueError(
                f"{type(model).__name__} does not say what its bits cost: train prepare_rate(model)"
            )
        loss = self.objective(model, batch)
        return loss + self.price * model.bits() / max(1, model.numbers)

    def extra_repr(self) -> str:
        return f"price={self.price}"
