"""Training all widths at once, as objectives of the one loop."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from structopt import losses
from structopt.losses.checks import whole
from structopt.losses.positions import taught
from structopt.slicing.slices import Slice
from structopt.slicing.widths import Slimmable
from structopt.training import Objective, supervised

Loss = Callable[[Tensor, Tensor], Tensor]


def all_widths(loss: Loss = losses.cross_entropy) -> Objective:
    """Σ over the declared widths of ``loss(slimmable(inputs, width=width), targets)``.

    The training of Yu et al., 2019, "Slimmable neural networks".

    >>> import torch
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> batch = torch.ones(3, 4), torch.zeros(3).long()
    >>> all_widths()(Slimmable(model, batch[0], [0.5]), batch).ndim
    0
    """
    task = supervised(loss)

    def objective(model: nn.Module, batch: Any) -> Tensor:
        slimmable = _slimmable(model)
        first, *others = (task(_at(slimmable, width), batch) for width in slimmable.widths)
        return sum(others, start=first)

    return objective


class Sandwich:
    """``objective(slimmable, batch)``: the widest, the narrowest, and some at random in between.

    loss(widest, targets) + Σ teach(narrow, widest) over the narrowest and `between` declared
    widths drawn anew for each batch: the sandwich rule with in-place distillation of Yu & Huang,
    2019, "Universally slimmable networks". The widest network teaches all others, and its
    output is held fixed while it does. Positions (B, ...) whose label `loss` ignores (padding)
    count for neither, where `teach` has a parameter ``counts``.

    Args:
        loss: of the widest network's output and the targets.
        teach: of a narrow network's output and the widest's; for regression ``losses.mse``.
        between: how many widths are drawn; all of them where there are no more.
        seed: of the draw. Every process draws the same, and a resumed run goes on drawing.

    Raises:
        ValueError: `between` below 0, a model that is not slimmable, a batch that is no pair.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> slimmable = Slimmable(model, torch.zeros(1, 4), [0.25, 0.5, 0.75])
        >>> batch = torch.ones(3, 4), torch.zeros(3).long()
        >>> Sandwich(between=1)(slimmable, batch).ndim
        0
    """

    def __init__(
        self,
        loss: Loss = losses.cross_entropy,
        teach: Loss = losses.kl_divergence,
        *,
        between: int = 2,
        seed: int = 0,
    ) -> None:
        if not whole(between) >= 0:
            raise ValueError(
                f"between counts the widths drawn for a batch, at least 0: {between!r}"
            )
        self.loss, self.teach, self.between, self.seed = loss, teach, between, seed
        self.batches = 0

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        slimmable, widest = _slimmable(model), list[Tensor]()

        def remembered(output: Tensor, targets: Tensor) -> Tensor:
            widest.append(output.detach())
            return self.loss(output, targets)

        labelled = supervised(remembered)(slimmable, batch)
        narrow = [slimmable(batch[0], width=width) for width in self.drawn(slimmable.widths)]
        self.batches += 1
        pairs = ((output, widest[0]) for output in narrow)
        told = (taught(self.teach, pair, batch[1], self.loss) for pair in pairs)
        return sum(told, start=labelled)

    def drawn(self, widths: tuple[Slice, ...]) -> list[Slice]:
        """The narrow widths of this batch."""
        narrowest, middle = widths[:1] if len(widths) > 1 else (), widths[1:-1]
        generator = random.Random(f"{self.seed} {self.batches}")
        return [*narrowest, *generator.sample(middle, min(self.between, len(middle)))]

    def state_dict(self) -> dict[str, int]:
        """How many batches were drawn for."""
        return {"batches": self.batches}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on drawing where a saved run stopped."""
        self.batches = state["batches"]


def _at(slimmable: Slimmable, width: Slice) -> Any:
    return lambda inputs: slimmable(inputs, width=width)


def _slimmable(model: nn.Module) -> Slimmable:
    if not isinstance(model, Slimmable):
        raise ValueError(
            f"this objective trains a Slimmable, not a {type(model).__name__}: wrap the model, "
            "Slimmable(model, example, widths), and make the optimiser from its parameters"
        )
    return model
