"""Networks whose structure was changed, saved without pickle and loaded into their own class.

The file (safetensors) holds every tensor, and for every module its class and the plain numbers and
words that it keeps: ``out_channels``, ``num_heads``, ``normalized_shape``, a model's own sizes.
Loaded into a fresh model of the original class, widths, missing biases and ties become those of
the saved one; layers that became another torch layer (a norm folded into ``Identity``, a ``Linear``
factorised into a ``Sequential``) are built anew. Code never travels: hooks and functions are those
of the fresh model.
"""

from structopt.checkpoint.loading import load
from structopt.checkpoint.saving import BUILDABLE as BUILDABLE
from structopt.checkpoint.saving import KINDS as KINDS  # for tools that read such files
from structopt.checkpoint.saving import save

__all__ = ["load", "save"]
