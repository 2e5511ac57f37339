"""The one loop: ``train(model, batches, objective, optimizer, epochs=...)``.

An objective is any callable ``objective(model, batch) -> loss``; everything else that training
means (a teacher, masks, several widths) is an objective or an ``after_step``.
"""

from structopt.training.averaging import Average
from structopt.training.history import History
from structopt.training.loop import train
from structopt.training.objectives import (
    Metric,
    Objective,
    accuracy,
    evaluate,
    evaluating,
    supervised,
)

__all__ = [
    "Average",
    "History",
    "Metric",
    "Objective",
    "accuracy",
    "evaluate",
    "evaluating",
    "supervised",
    "train",
]
