"""One network that runs at several widths."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from structopt.channels import channel_groups
from structopt.devices import needs_plain_order
from structopt.slicing.cutting import Named, Narrow, named, narrow
from structopt.slicing.slices import Slice, as_slice
from structopt.training.statistics import placed, recalibrate_

_Norm = nn.modules.batchnorm._NormBase


class Slimmable(nn.Module):
    """A network that runs at several widths, each a slice of the same weights.

    ``slimmable(x, width=0.5)`` computes with the first half of the channels of every group that
    :func:`structopt.channels.channel_groups` finds, and equals ``slimmable.extract(0.5)(x)``;
    without `width` it is the model. Gradients reach the shared weights. The running statistics of
    norms are kept for each width apart, since a narrow layer hands on other means and variances;
    scale and shift are shared. ``torch.compile`` compiles the full width alone: for a slice compile
    what `extract` gives. What is set on the model's layers later (hooks, the share of dropout) is
    not seen by its slices, and ``torch.utils.checkpoint`` inside of a model runs at full width and
    in what `extract` gives alone. After Yu et al., 2019, "Slimmable neural networks", and Yu &
    Huang, 2019, "Universally slimmable networks and improved training techniques".

    Args:
        model: any network; its parameters are used, not copied. Put the channels in order of
            importance first, :func:`sort_channels`.
        example: what the model is called with, as for `channel_groups`.
        widths: shares in (0, 1], or :class:`Slice` values for nested networks. The full width is
            always there.

    Raises:
        ValueError: a width outside (0, 1], one that empties a group, one that is not among those
            declared, no group that may change, weights that are no slices (weight norm).

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> slimmable = Slimmable(model, torch.zeros(1, 4), [0.25, 0.5])
        >>> slimmable.widths
        (Slice(0.25), Slice(0.5), Slice(1))
        >>> slimmable.extract(0.25)[0]
        Linear(in_features=4, out_features=2, bias=True)
        >>> x = torch.randn(3, 4)
        >>> torch.allclose(slimmable(x, width=0.5), slimmable.extract(0.5)(x))
        True
    """

    @torch.inference_mode(False)  # else what is made could not be trained
    def __init__(self, model: nn.Module, example: Any, widths: Sequence[float | Slice]) -> None:
        super().__init__()
        if isinstance(widths, (int, float, str, Slice)):
            raise ValueError(f"widths is a list of widths: [{widths!r}]")
        parts = [as_slice(width) for width in widths]
        channels = channel_groups(model, example)
        if not len(channels) and any(part.width < 1 or part.shares for part in parts):
            reasons = "; ".join(f"{g.name}: {g.frozen}" for g in channels.frozen[:3])
            raise ValueError(f"no channels of this model can be sliced ({reasons})")
        self.model, self._example = model, example
        cut = {part: narrow(channels, model, part) for part in dict.fromkeys(parts)}
        cut.pop(Slice(), None)
        order = sorted(cut, key=lambda part: _size(cut[part]))
        self._narrow: dict[Slice, Narrow] = {part: cut[part] for part in order}
        self.statistics = nn.ModuleList(_Private(model, cut[part]) for part in order)
        # `train` asks for this mark.
        self.plain_order = any(needs_plain_order(cut[part].structure) for part in order)

    @property
    def widths(self) -> tuple[Slice, ...]:
        """From the fewest parameters to all."""
        return (*self._narrow, Slice())

    def forward(self, *args: Any, width: float | Slice = 1.0, **kwargs: Any) -> Any:
        """What the slice of this width computes of these arguments."""
        if width == 1:
            return self.model(*args, **kwargs)
        return self._sliced(width, args, kwargs)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _sliced(self, width: float | Slice, args: Any, kwargs: Any) -> Any:
        part = as_slice(width)
        if part == Slice():
            return self.model(*args, **kwargs)
        if part not in self._narrow:
            given = ", ".join(map(repr, self.widths))
            raise ValueError(f"{part} was not declared; there are {given}; extract takes any other")
        private = self._private(part).tensors()
        return self._narrow[part].run(self.model, private, args, kwargs)

    @torch.inference_mode(False)  # else what is made could not be trained
    def extract(
        self, width: float | Slice = 1.0, batches: Iterable[Any] | None = None
    ) -> nn.Module:
        """An ordinary network with the weights of this slice, which may be any.

        Norms of a width that was not declared have the statistics of the full network, sliced,
        which fit badly: give `batches` to take them anew (:meth:`calibrate_`).
        """
        part = as_slice(width)
        if part in self._narrow:
            made = self._narrow[part].ordinary(self.model, self._private(part).tensors())
        else:
            example = placed(self._example, self.model)
            channels = channel_groups(self.model, example)
            made = narrow(channels, self.model, part).ordinary(self.model, {})
        if batches is not None:
            recalibrate_(made, batches)
        return made

    @torch.no_grad()
    def calibrate_(self, batches: Iterable[Any]) -> Slimmable:
        """Take the running statistics of every declared width anew, as plain averages over batches.

        Batches are inputs, or pairs of inputs and targets. Nothing is trained. Raises ValueError
        for no batches.
        """
        batches = list(batches)
        for part in self.widths:
            made = named(self.extract(part, batches))
            kept = self._private(part).tensors() if part in self._narrow else running(self.model)
            for name, tensor in kept.items():
                tensor.copy_(made[name])
        return self

    def _private(self, part: Slice) -> _Private:
        private = self.statistics[list(self._narrow).index(part)]
        assert isinstance(private, _Private)
        return private

    def extra_repr(self) -> str:
        return f"widths={self.widths}"


class _Private(nn.Module):
    """The running statistics of one width."""

    def __init__(self, model: nn.Module, cut: Narrow) -> None:
        super().__init__()
        tensors = cut.tensors(model)
        for name in running(cut.structure):
            self.register_buffer(name.replace(".", "/"), tensors[name].clone())

    def tensors(self) -> Named:
        return {name.replace("/", "."): tensor for name, tensor in self.named_buffers()}


def running(model: nn.Module) -> Named:
    """The buffers in which norms keep running statistics."""
    names = {
        f"{path}.{name}".lstrip(".")
        for path, module in model.named_modules()
        for name in module._buffers
        if isinstance(module, _Norm)
    }
    return {name: tensor for name, tensor in model.named_buffers() if name in names}


def _size(cut: Narrow) -> int:
    return sum(p.numel() for p in cut.structure.parameters())
