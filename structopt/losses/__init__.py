"""What is minimised: losses, penalties on weights, and how far a confidence can be trusted.

Each loss is a function ``f(prediction, target, *, reduction="mean", ...)``. Half-precision inputs
are computed *and returned* in float32, as torch does under autocast: a squared error of 1e4 does
not fit into float16. Gradients reach the inputs in the inputs' own type.

Types and shapes are always checked. Values are looked at only where looking is free: on a CPU a
label out of range raises ``ValueError``, a NaN ``FloatingPointError``. On an accelerator looking
would make the device wait at every step, so there the loss is NaN, with a zero gradient for labels
out of range (no device-side assert kills the process); a loop that watches its losses stops.
"""

from structopt.losses.calibration import expected_calibration_error
from structopt.losses.classification import cross_entropy, focal, kl_divergence, log_sum_exp
from structopt.losses.penalties import group_lasso, l1
from structopt.losses.regression import huber, mae, mse

__all__ = [
    "cross_entropy",
    "expected_calibration_error",
    "focal",
    "group_lasso",
    "huber",
    "kl_divergence",
    "l1",
    "log_sum_exp",
    "mae",
    "mse",
]
