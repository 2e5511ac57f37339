"""Masks beside the model: zero stays zero, and the model stays an ordinary one."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from structopt.losses.checks import need_values
from structopt.pruning.finding import Masks, find_masks
from structopt.pruning.patterns import Pattern, Unstructured, need_pattern
from structopt.pruning.ranking import PerLayer, Scope, need_scope
from structopt.pruning.schedules import Schedule
from structopt.pruning.scoring import Scores, score
from structopt.training.copying import need_changeable


def need_mapping(masks: object) -> None:
    if not isinstance(masks, Mapping):
        raise ValueError(
            f"masks are a dict of a bool tensor for each weight, as find_masks gives: not {masks!r}"
        )


def need_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Each masked weight and its mask, after every complaint that can be made."""
    need_mapping(masks)
    parameters = dict(model.named_parameters(remove_duplicate=False))  # of tied ones every name
    pairs: list[tuple[Tensor, Tensor]] = []
    for name, mask in masks.items():
        weight = parameters.get(name)
        if weight is None:
            near = ", ".join(n for n in parameters if "weight" in n) or "none"
            raise ValueError(f"the masks name {name!r}, but the weights of this model are {near}")
        if not isinstance(mask, Tensor):
            raise ValueError(
                f"the mask of {name} is of {type(mask).__name__}: it has to be a bool tensor of "
                f"the weight's shape {tuple(weight.shape)}"
            )
        if weight.shape != mask.shape or mask.dtype != torch.bool:
            raise ValueError(
                f"the mask of {name} is {mask.dtype} of shape {tuple(mask.shape)}: it has to be "
                f"bool, of the weight's shape {tuple(weight.shape)}"
            )
        need_changeable(name, weight)
        if not weight.is_meta:
            need_values(f"the mask of {name}", [mask])
        pairs.append((weight, mask))
    return pairs


def inner(model: nn.Module, names: Iterable[str]) -> nn.Module:
    """The model of these names (of none: the innermost), where torch.compile or DDP wrap it."""
    ddp = isinstance(model, nn.parallel.DistributedDataParallel)
    wrapped = model.module if ddp else getattr(model, "_orig_mod", None)
    if not isinstance(wrapped, nn.Module) or next(iter(names), "") in dict(
        model.named_parameters()
    ):
        return model
    return inner(wrapped, names)


@torch.no_grad()
def apply_masks_(model: nn.Module, masks: Mapping[str, Tensor]) -> nn.Module:
    """Set what the masks remove to zero, in place, and return the model.

    Raises ValueError for a mask of no weight of the model, or of another type or shape.

    >>> model = nn.Linear(2, 1)
    >>> mask = torch.tensor([[True, False]])
    >>> bool(apply_masks_(model, {"weight": mask}).weight[0, 1] == 0)
    True
    """
    for weight, mask in need_masks(model, masks):
        weight.masked_fill_(~mask.to(weight.device), 0)
    return model


class Hold:
    """Masks, and the `after_step` that keeps what they remove at zero. Made by :func:`hold`."""

    def __init__(self, masks: Mapping[str, Tensor]) -> None:
        need_mapping(masks)
        self.masks: Masks = dict(masks)
        self._seen: Callable[[], nn.Module | None] = lambda: None
        self._weights: list[Tensor] = []
        self._factors: list[Tensor] = []
        self._links: list[tuple[dict[str, Any], str, object]] = []

    def __call__(self, model: nn.Module, step: int = 0) -> None:
        if self._seen() is not model or self._moved_or_replaced():
            self._look_at(model)
        if self._weights:
            with torch.no_grad():
                torch._foreach_mul_(self._weights, self._factors)

    def _moved_or_replaced(self) -> bool:
        """Whether the weights are elsewhere, or the model has another layer or weight instead."""
        moved = bool(self._weights) and self._weights[0].device != self._factors[0].device
        return moved or any(owner.get(key) is not held for owner, key, held in self._links)

    def _look_at(self, model: nn.Module) -> None:
        """Find the weights once: looking up their names costs more than the product."""
        seen, model = weakref.ref(model), inner(model, self.masks)
        apply_masks_(model, self.masks)
        pairs = need_masks(model, self.masks)
        self._weights = [weight for weight, _ in pairs]
        # Of the weight's type and strides, so that one fused kernel can walk all of them.
        self._factors = [
            torch.empty_like(weight, requires_grad=False).copy_(mask) for weight, mask in pairs
        ]
        self._links = _links(model, self.masks)
        self._seen = seen  # last: a model that masks do not fit is complained of at every call

    def state_dict(self) -> dict[str, Any]:
        return {"masks": dict(self.masks)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.masks, self._seen = dict(state["masks"]), lambda: None

    def __deepcopy__(self, memo: dict[int, Any]) -> Hold:
        return type(self)(self.masks)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self.masks)} masks)"


def _links(model: nn.Module, names: Iterable[str]) -> list[tuple[dict[str, Any], str, object]]:
    """Every step from the model down to these parameters: a dict, a key and what lies there."""
    found: dict[tuple[int, str], tuple[dict[str, Any], str, object]] = {}
    for name in names:
        owner, (*path, key) = model, name.split(".")
        for part in path:
            child = owner.get_submodule(part)
            found[id(owner), part] = owner._modules, part, child
            owner = child
        found[id(owner), key] = owner._parameters, key, owner._parameters[key]
    return list(found.values())


def hold(masks: Mapping[str, Tensor]) -> Hold:
    """An `after_step` for :func:`structopt.training.train` that keeps removed weights at zero.

    The model stays an ordinary one, which copies, saves, traces and runs under
    DistributedDataParallel. Whatever momentum or weight decay did to a removed weight is undone
    after each step, so that every forward pass sees exact zeros; of a layer that was replaced by
    another of its shape, too. Call it once yourself, ``hold(masks)(model)``, to apply the masks
    before the first step. A running mean of weights remembers what they were before they were
    masked: apply the masks to it in the end.

    >>> model, masks = nn.Linear(2, 1), {"weight": torch.tensor([[True, False]])}
    >>> after_step = hold(masks)
    >>> after_step(model)
    >>> int(model.weight.count_nonzero())
    1
    """
    return Hold(masks)


class PruneWhileTraining(Hold):
    """An `after_step` that finds masks on a schedule, and holds them in between.

    Masks nest: what is gone stays gone. `score` is called with the model, and by default gives
    magnitudes. `masks` are those in force; a checkpoint of the training holds them. They name the
    weights of the model inside, where it is wrapped by torch.compile or for DDP.

    >>> from structopt.pruning import Gradual
    >>> model, after_step = nn.Linear(8, 4), PruneWhileTraining(Gradual(0.5, 1, 3, every=1))
    >>> for step in 1, 2, 3:
    ...     after_step(model, step)
    ...     print(int((model.weight == 0).sum()))
    0
    14
    16
    """

    def __init__(
        self,
        schedule: Schedule,
        *,
        score: Callable[[nn.Module], Scores] = score,
        pattern: Pattern = Unstructured(),  # noqa: B008 (a frozen value)
        scope: Scope = PerLayer(),  # noqa: B008
    ) -> None:
        super().__init__({})
        if not hasattr(schedule, "sparsity"):
            raise ValueError(f"a schedule is a value such as Constant(0.5), not {schedule!r}")
        need_pattern(pattern)
        need_scope(scope)
        self.schedule, self.score, self.pattern, self.scope = schedule, score, pattern, scope

    def __call__(self, model: nn.Module, step: int = 0) -> None:
        if self.schedule.changes(step):
            self.masks = find_masks(
                self.score(inner(model, self.masks)),
                self.schedule.sparsity(step),
                pattern=self.pattern,
                scope=self.scope,
                within=self.masks or None,
            )
            self._seen = lambda: None
        super().__call__(model, step)

    def __deepcopy__(self, memo: dict[int, Any]) -> PruneWhileTraining:
        made = type(self)(self.schedule, score=self.score, pattern=self.pattern, scope=self.scope)
        made.masks = dict(self.masks)
        return made


def from_torch_(model: nn.Module) -> Masks:
    """The masks of ``torch.nn.utils.prune``; the model, in place, becomes an ordinary one.

    Masked weights are written back as parameters of their own name, with zeros where they were
    masked, so that copies, optimisers and files work again. Biases are taken over too. Make the
    optimiser after this: it would step the old parameters.

    Raises ValueError for a model without such masks.

    >>> model = nn.Sequential(nn.Linear(4, 2))
    >>> _ = prune.l1_unstructured(model[0], "weight", amount=0.5)
    >>> int(from_torch_(model)["0.weight"].sum()), list(model.state_dict())
    (4, ['0.bias', '0.weight'])
    """
    masks: Masks = {}
    for path, module in model.named_modules():
        for key in [k for k in module._buffers if k.endswith("_mask")]:
            name, mask = key.removesuffix("_mask"), module._buffers[key]
            if f"{name}_orig" in module._parameters and mask is not None:
                masks[f"{path}.{name}".lstrip(".")] = mask.bool()
                prune.remove(module, name)  # type: ignore[no-untyped-call]
    if not masks:
        raise ValueError("the model holds no mask of torch.nn.utils.prune")
    return masks


def to_torch_(model: nn.Module, masks: Mapping[str, Tensor]) -> nn.Module:
    """Hand the masks to ``torch.nn.utils.prune``, in place: `weight_orig` and `weight_mask`.

    Raises ValueError as :func:`apply_masks_`.

    >>> model = to_torch_(nn.Linear(2, 1), {"weight": torch.tensor([[True, False]])})
    >>> prune.is_pruned(model)
    True
    """
    for weight, mask in dict(need_masks(model, masks)).items():  # once, whatever it is called
        for layer in model.modules():  # every one that has the weight
            for key in [k for k, p in layer._parameters.items() if p is weight]:
                prune.custom_from_mask(layer, key, mask.to(weight.device))  # type: ignore[no-untyped-call]
    return model
