"""Models that still round their weights in each forward pass, where only plain ones will do."""

from __future__ import annotations

from torch import nn

from structopt.compression.qat import QAT
from structopt.compression.rate import Rated


def need_finished(model: nn.Module) -> None:
    """Raises ValueError for a model whose steps are still learned: it names the layers it rounds.

    >>> from structopt.compression import prepare_rate
    >>> need_finished(prepare_rate(nn.Linear(2, 1)))
    Traceback (most recent call last):
    ValueError: a Rated model still learns its steps: take the network of its finish()
    """
    for module in model.modules():
        if isinstance(module, QAT | Rated):
            raise ValueError(
                f"a {type(module).__name__} model still learns its steps: take the network of its "
                "finish()"
            )
