"""What a training run leaves behind."""

from __future__ import annotations

import html
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Validation = float | dict[str, float]


@dataclass
class History:
    """Losses, learning rates and validations of one run; prints and draws itself.

    ``losses`` and ``lrs`` hold one number a step (the learning rate is that of the first group),
    ``validation`` one value an epoch, as ``validate`` returned it (NaN or {} for those before it
    was given), ``ends`` the number of steps taken when each epoch ended. ``seconds`` counts the
    whole run, before and after a resumption. ``averaged`` is the model with averaged weights, where
    ``average`` was asked for.

    >>> print(History(losses=[2.0, 1.0, 0.5], lrs=[0.1] * 3, validation=[0.25], ends=[3]))
    epoch  steps    loss  validation  rate
        1      3  1.1667        0.25   0.1
    """

    losses: list[float] = field(default_factory=list)
    lrs: list[float] = field(default_factory=list)
    validation: list[Validation] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    seconds: float = 0.0
    averaged: nn.Module | None = field(default=None, repr=False)

    def _table(self) -> list[list[str]]:
        names = list(dict.fromkeys(n for k in range(len(self.validation)) for n in self._row(k)))
        table = [["epoch", "steps", "loss", *names, "rate"]]
        for epoch, (start, stop) in enumerate(zip([0, *self.ends], self.ends, strict=False)):
            loss = sum(self.losses[start:stop]) / max(stop - start, 1)
            values = [f"{self._row(epoch).get(name, float('nan')):.4g}" for name in names]
            rate = f"{self.lrs[stop - 1]:.3g}"
            table.append([str(epoch + 1), str(stop), f"{loss:.4f}", *values, rate])
        return table

    def _row(self, epoch: int) -> dict[str, float]:
        if epoch >= len(self.validation):
            return {}
        value = self.validation[epoch]
        return value if isinstance(value, dict) else {"validation": value}

    def __str__(self) -> str:
        table = self._table()
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        return "\n".join(
            "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
            for row in table
        )

    def _repr_html_(self) -> str:
        head, *body = self._table()
        lines = ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in body]
        top = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
        rows = "".join(f"<tr>{line}</tr>" for line in lines)
        return f"<table><thead><tr>{top}</tr></thead><tbody>{rows}</tbody></table>"

    def draw(self, axes: Axes | None = None) -> Axes:
        """Draw the loss by step and the validation by epoch; returns the axes."""
        from structopt import plots

        return plots.history(self, axes)
