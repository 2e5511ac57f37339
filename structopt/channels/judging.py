"""Does an edit hold? By its outputs, or by their shapes where there are no values."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from structopt.channels import lengths, verify
from structopt.channels.copying import flatten, substitute
from structopt.channels.deciding import Decisions
from structopt.channels.edit import build
from structopt.channels.groups import Channels
from structopt.channels.nests import call, first_line, map_tensors
from structopt.channels.rows import Choice, Edit, Refused
from structopt.channels.shadow import Shadow, plain_kernels
from structopt.channels.walking import modules_of, parameters_of, tensors_in
from structopt.channels.widening import wide


class Judge(Protocol):
    """Says what goes wrong with an edit, or nothing; and gives the edited model that it judged."""

    def __call__(self, edit: Edit) -> str: ...
    def made(self, edit: Edit) -> nn.Module: ...


class Expected(NamedTuple):
    """An example, what has to come out, and what is compared as well."""

    example: Any
    outputs: list[Tensor]
    watch: verify.Watch | None


class ByValue:
    """The outputs of an edited copy have to equal those of the model with channels masked."""

    def __init__(self, channels: Channels, model: nn.Module) -> None:
        self.channels, self.model = channels, model
        # What is worked out from weights needs them in double precision from the start.
        self.kept, self.zero = lengths.kept(model), _zero(model)
        self.source = substitute(model, self._judged) if self.kept or self.zero else model
        self.known: dict[tuple[int, ...], list[Expected]] = {}
        self.last: tuple[Edit, nn.Module] | None = None

    def __call__(self, edit: Edit) -> str:
        key = tuple(edit.choice)
        if key not in self.known:
            self.known = {key: self._expected(edit.choice)}
        self.last = None
        try:
            made = build(self.channels, self.source, edit, wide)
        except Exception as failure:
            return _failure(failure)
        self.last = edit, made
        for example, expected, watch in self.known[key]:
            try:
                found = verify.outputs(made, example, watch=watch)
            except Exception as failure:
                return _failure(failure)
            error = verify.difference(expected, found)
            if error > verify.tolerance(expected) and self.decides:
                error = self._decided(edit.choice, made, example, watch)
            if error > verify.tolerance(expected):
                if self.changes:
                    return (
                        "the output of the model changes from run to run, so that nothing can be "
                        "compared (dropout that is on in evaluation mode?)"
                    )
                return f"the outputs differ by {error:.1e} of their size"
        return ""

    def _judged(self, tensor: Tensor) -> Tensor:
        """What takes the place of a tensor of the model, in its memory perhaps: never written to.

        Behind a weight that is zero nothing can be seen.
        """
        if id(tensor) in self.zero:
            numbers = torch.rand(tensor.shape, generator=torch.Generator().manual_seed(0))
            tensor = torch.empty_like(tensor).copy_(numbers / 8)
        return wide(tensor) if self.kept else tensor

    def _expected(self, choice: Choice) -> list[Expected]:
        try:
            known = _expected(self.channels, self.source, choice)
        except Exception as failure:
            where = verify.stumbles(self.source, self.channels.example)
            raise ValueError(
                f"the model itself fails in double precision, in which edits are compared, in "
                f"{where or 'its own forward'}: {type(failure).__name__}: {failure}. Choose a "
                "kernel there that takes float64; the model is as it was"
            ) from failure
        found = [t for row in known for t in row.outputs if t.numel() and t.is_floating_point()]
        if found and not any(bool(t.isfinite().any()) for t in found):
            whole = verify.outputs(self.source, self.channels.example)
            lost = any(t.is_floating_point() and bool(t.isfinite().any()) for t in whole)
            raise ValueError(
                f"the model gives no finite number on the example{' without channels' * lost}, so "
                "that nothing can be compared: "
                f"{'does it divide by the norm of weights?' if lost else 'give another example'}; "
                "the model is as it was"
            )
        return known

    @functools.cached_property
    def changes(self) -> bool:
        return verify.changes(self.source, self.channels.example)

    @functools.cached_property
    def decides(self) -> bool:
        """Whether the model decides anything by its numbers."""
        decisions = Decisions()
        verify.outputs(self.source, self.channels.example, decisions=decisions)
        return bool(decisions.made)

    def _decided(
        self, choice: Choice, made: nn.Module, example: Any, watch: verify.Watch | None
    ) -> float:
        """The error when the edited model decides between equals as the reference does."""

        def alike(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
            return verify.difference(a, b) <= verify.tolerance(a)

        first = Decisions()
        expected = verify.reference(self.channels, self.source, choice, example, watch, first)
        again = Decisions(first.made, alike)
        found = verify.outputs(made, example, watch=watch, decisions=again)
        return verify.difference(expected, found)

    def made(self, edit: Edit) -> nn.Module:
        """What was judged last, with weights that were scaled rounded to what they were."""
        if self.last is None or self.last[0] is not edit or self.kept:
            return build(self.channels, self.model, edit)
        made = self.last[1]
        modules = modules_of(made)
        old, new = tensors_in(modules_of(self.model)), tensors_in(modules)
        for (_, before), (_, after) in zip(old, new, strict=True):
            if id(before) in self.zero:  # and so is any part of it
                after.data.zero_()
            if after.dtype != before.dtype:
                after.data = after.data.to(before.dtype)
        flatten(modules.values())  # what was replaced lies apart
        return made


def _expected(channels: Channels, model: nn.Module, choice: Choice) -> list[Expected]:
    """Examples, and what the model gives for each when the channels not chosen are masked."""
    watch: verify.Watch | None = None
    expected = verify.reference(channels, model, choice, channels.example)
    if not any(t.numel() and (t.is_floating_point() or t.is_complex()) for t in expected):
        nothing = not any(t.numel() for t in expected)  # as where no object is found
        watch = verify.Watch(_untouched(channels, model, choice) if nothing else ())
        expected = verify.reference(channels, model, choice, channels.example, watch)
    found = [Expected(channels.example, expected, watch)]
    other = lively(model, channels.example)
    if other is not None:
        try:
            expected = verify.reference(channels, model, choice, other, watch)
        except Exception:  # not every model takes random numbers; the example itself it took
            return found
        if all(bool(t.isfinite().all()) for t in expected):
            found.append(Expected(other, expected, watch))
    return found


def _untouched(channels: Channels, model: nn.Module, choice: Choice) -> tuple[str, ...]:
    """Layers whose output stays, though what they read may change."""
    layers = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    names = [n for n, m in modules_of(model).items() if isinstance(m, layers)]
    made = {n: channels.axes.get((f"{n}.weight" if n else "weight", 0)) for n in names}
    return tuple(
        name
        for name, labels in made.items()
        if labels is not None and not channels.along(labels).keys() & choice.keys()
    )


def _zero(model: nn.Module) -> set[int]:
    """Weights that are zero throughout, as those of a last layer or a gain may start.

    What is added is not asked: all biases start so, and hide nothing.
    """
    return {
        id(p)
        for name, p in parameters_of(modules_of(model)).items()
        if "bias" not in name.rpartition(".")[2] and p.is_floating_point() and p.numel()
        if not p[(0,) * p.ndim].item() and not p.any()
    }


def lively(model: nn.Module, example: Any) -> Any:
    """An example with seeded random numbers where all are equal, or `None` where they differ.

    Of whole numbers, only zeros are replaced: they may name rows of an embedding.
    """
    layers = [
        m for m in modules_of(model).values() if isinstance(m, nn.Embedding | nn.EmbeddingBag)
    ]
    rows = min((layer.num_embeddings for layer in layers), default=0)
    generator = torch.Generator().manual_seed(0)
    changed = []

    def change(tensor: Tensor) -> Tensor:
        made = tensor
        if tensor.numel() > 1 and bool((tensor == tensor.flatten()[0]).all()):
            if tensor.is_floating_point():
                made = torch.randn(tensor.shape, generator=generator).to(tensor)
            elif rows and tensor.dtype in (torch.int32, torch.int64) and not tensor.any():
                made = torch.randint(rows, tensor.shape, generator=generator).to(tensor)
        if made is not tensor:
            changed.append(made)
        return made

    made = map_tensors(example, change)
    return made if changed else None


class ByShape:
    """The same for a model without values: the shapes have to fit."""

    def __init__(self, channels: Channels, model: nn.Module) -> None:
        self.channels, self.model = channels, model
        self.expected = self._shapes(substitute(model, torch.clone))

    def __call__(self, edit: Edit) -> str:
        try:
            found = self._shapes(self.made(edit))
        except Exception as failure:
            return _failure(failure)
        return "" if found == self.expected else "the shape of the output changes"

    def _shapes(self, made: nn.Module) -> list[torch.Size]:
        with plain_kernels(), Shadow():
            return verify.shapes(call(made.eval(), self.channels.example))

    def made(self, edit: Edit) -> nn.Module:
        return build(self.channels, self.model, edit)


def _failure(failure: Exception) -> str:
    if isinstance(failure, Refused):
        return first_line(failure)
    return f"the forward pass fails with {type(failure).__name__}: {first_line(failure)}"
