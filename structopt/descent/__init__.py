"""Gradient descent: update rules written out, schedules, and a door to torch.optim."""

from structopt.descent.finder import LrCurve, find_lr
from structopt.descent.fused import fused_adamw
from structopt.descent.muon import by_shape, muon, orthogonalise
from structopt.descent.optimizer import Descent
from structopt.descent.parts import adamw, chain, clip_norm, decay
from structopt.descent.rules import Rule, adam, gradient, lion, momentum, nesterov, rmsprop
from structopt.descent.schedules import (
    Schedule,
    constant,
    cosine,
    one_cycle,
    step_decay,
    warm_up,
)
from structopt.descent.trail import path

__all__ = [
    "Descent",
    "LrCurve",
    "Rule",
    "Schedule",
    "adam",
    "adamw",
    "by_shape",
    "chain",
    "clip_norm",
    "constant",
    "cosine",
    "decay",
    "find_lr",
    "fused_adamw",
    "gradient",
    "lion",
    "momentum",
    "muon",
    "nesterov",
    "one_cycle",
    "orthogonalise",
    "path",
    "rmsprop",
    "step_decay",
    "warm_up",
]
