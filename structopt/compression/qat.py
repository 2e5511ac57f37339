"""Training with rounding in sight: steps and clips that are learned with the weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from structopt.channels.exchanging import unfuse_
from structopt.compression.codes import chosen, naming, put_
from structopt.compression.evidence import readers
from structopt.compression.grids import Grid, Steps
from structopt.compression.inputs import RoundInput, calibrate, with_first
from structopt.compression.quantize import Quantized, fake_quantize, fit, quantize, straight_through
from structopt.losses.checks import wide
from structopt.training.copying import copied


@dataclass(frozen=True)
class PACT:
    """Inputs clipped to 0 … α, a learned number, and rounded to ``bits`` (Choi et al., 2018).

    For layers that read what a ReLU made. Weight decay on α keeps the clip, and so the step, small.
    """

    bits: int = 8

    def __post_init__(self) -> None:
        _ = self.grid  # complains

    @property
    def grid(self) -> Grid:
        return Grid(self.bits, symmetric=False)


class LearnedStep(nn.Module):
    """Rounds to a grid whose scale is trained: LSQ.

    The gradient of a value to its scale is round(x/s) - x/s inside the grid, and the code at its
    end; divided by sqrt(members of a unit · largest code), so that scales learn as fast as weights
    do.

    Esser et al., 2020, "Learned step size quantization".
    """

    def __init__(self, grid: Grid, steps: Steps) -> None:
        super().__init__()
        if grid.is_sign:
            raise ValueError(
                f"{grid} has one step between its two values, which LSQ does not train"
            )
        self.grid = grid
        with torch.inference_mode(False):  # to be trained, wherever it is made
            self.scale = nn.Parameter(steps.scale.clone())
            self.register_buffer("zero", steps.zero.clone())

    @property
    def steps(self) -> Steps:
        """The steps as they are; a scale that training made negative counts by its size."""
        assert isinstance(self.zero, Tensor)
        scale = wide(self.scale.detach()).abs()  # a model cast to 16 bits rounds as its file will
        return Steps(scale.clamp(min=torch.finfo(scale.dtype).tiny), self.zero.to(scale.dtype))

    def forward(self, x: Tensor) -> Tensor:
        first, last = self.grid.codes
        steps = self.steps
        units = self.grid.per.split(x.to(steps.scale.dtype)).nan_to_num(0)  # where none is
        # The sign of a scale is no freedom: as steps has it, and with its gradient.
        share = self.scale.detach().sign() / (max(1, units.shape[1]) * last) ** 0.5
        scale = straight_through(self.scale, steps.scale, share)[:, None]
        codes = self.grid.nearest(units.detach(), steps)
        near = units * (1 / scale)
        inside = (codes >= first) & (codes <= last)
        whole = Steps(torch.ones_like(steps.scale), steps.zero)
        rounded = straight_through(near, self.grid.values(codes.clamp(first, last), whole), inside)
        made: Tensor = self.grid.per.join(rounded * scale, x.shape).to(x.dtype)
        return made


class LearnedClip(nn.Module):
    """Clips to 0 … α, and rounds to a grid of as many steps as its codes allow: PACT."""

    def __init__(self, grid: Grid, clip: Tensor) -> None:
        super().__init__()
        self.grid = grid
        with torch.inference_mode(False):  # as above
            self.clip = nn.Parameter(clip.clone())

    @property
    def steps(self) -> Steps:
        clip = wide(self.clip.detach()).abs().reshape(1)
        clip = clip.clamp(min=torch.finfo(clip.dtype).tiny)
        return self.grid.between(torch.zeros_like(clip), clip)

    def forward(self, x: Tensor) -> Tensor:
        clipped = torch.minimum(x.relu(), self.clip.abs().to(x.dtype))
        value = fake_quantize(x.detach(), self.grid, self.steps)
        return straight_through(clipped, value, torch.ones_like(x))


class QAT(nn.Module):
    """A model that rounds its weights, and maybe its inputs, in each forward pass.

    Made by :func:`prepare_qat`. Its parameters are those of the model and the learned steps.
    """

    def __init__(self, model: nn.Module, rounding: dict[str, LearnedStep]) -> None:
        super().__init__()
        self.model = model
        self.names = list(rounding)
        self.rounding = nn.ModuleList(rounding.values())
        self.inputs = nn.ModuleDict()  # the learned steps of inputs; hooks of the layers hold them
        self.layers: list[str] = []
        for place, name in enumerate(self.names):
            with torch.inference_mode(False):
                self.register_buffer(f"kept{place}", model.get_parameter(name).detach() != 0)

    def weights(self) -> dict[str, Tensor]:
        """The rounded weights, with their gradient."""
        made = {}
        for place, name in enumerate(self.names):
            weight = self.model.get_parameter(name) * self.get_buffer(f"kept{place}")
            made[name] = self.rounding[place](weight)
        return made

    def forward(self, *given: Any, **named: Any) -> Any:
        return functional_call(self.model, self.weights(), given, named)

    @torch.no_grad()
    def finish(self) -> tuple[nn.Module, dict[str, Quantized]]:
        """The plain model with rounded weights, and their codes. It computes what this one does.

        Where inputs are rounded, then by the hooks of ``round_inputs``.
        """
        codes = {}
        for place, (name, step) in enumerate(zip(self.names, self.rounding, strict=True)):
            assert isinstance(step, LearnedStep)
            weight = self.model.get_parameter(name) * self.get_buffer(f"kept{place}")
            with naming(name):
                codes[name] = quantize(weight, step.grid, step.steps)
        made = copied(self.model)
        for layer in readers(made).values():
            for key, hook in list(layer._forward_pre_hooks.items()):
                if isinstance(hook, _Learned):
                    layer._forward_pre_hooks[key] = RoundInput(hook.step.grid, hook.step.steps)
        return put_(made, codes), codes


class _Learned:
    """The pre-hook of a layer whose input is rounded by a learned step."""

    def __init__(self, step: LearnedStep | LearnedClip) -> None:
        self.step = step

    def __call__(self, layer: nn.Module, given: Any, named: Any) -> tuple[Any, Any]:
        return with_first(self.step, given, named)


def prepare_qat(
    model: nn.Module,
    weights: Grid,
    *,
    inputs: Grid | PACT | None = None,
    batches: Iterable[Any] | None = None,
    names: Sequence[str] | None = None,
) -> QAT:
    """A copy of the model to train with rounded weights, in the one loop and with any objective.

    ``weights`` is the grid of the parameters ``names``, by default of all with two dimensions or
    more; it is fitted once, and its scales are learned from there. Weights that are exactly zero
    stay so. ``inputs`` rounds what linear layers and convolutions read, too: a grid with a learned
    step, or :class:`PACT`; calibrated on ``batches``. Give the optimiser ``qat.parameters()``, and
    take the result by ``qat.finish()``.

    Raises ValueError for inputs without batches, for one symmetric bit, for PACT where a layer
    reads negative numbers, and as ``quantize``.

    >>> qat = prepare_qat(nn.Linear(3, 2), Grid(2))
    >>> sorted(name for name, _ in qat.named_parameters())
    ['model.bias', 'model.weight', 'rounding.0.scale']
    >>> model, codes = qat.finish()
    >>> x = torch.randn(5, 3)
    >>> torch.equal(model(x), qat(x))
    True
    """
    made, rounding = copied(model), {}
    for name, weight in chosen(made, names).items():
        with naming(name):
            rounding[name] = LearnedStep(weights, fit(weight, weights))
    qat = QAT(made, rounding)
    if inputs is None:
        return qat
    if batches is None:
        raise ValueError("inputs are calibrated on batches: pass batches=")
    grid = inputs.grid if isinstance(inputs, PACT) else inputs
    ends = calibrate(model, batches, grid)
    for place, (name, steps) in enumerate(ends.items()):
        step: LearnedStep | LearnedClip
        if isinstance(inputs, PACT):
            if bool(steps.zero.any()):
                raise ValueError(f"{name} reads negative numbers, which PACT cuts off: take a Grid")
            step = LearnedClip(grid, steps.scale[0] * grid.codes[1])
        else:
            step = LearnedStep(grid, steps)
        qat.inputs[str(place)] = step
        made.get_submodule(name).register_forward_pre_hook(_Learned(step), with_kwargs=True)
    unfuse_(made)
    return qat
