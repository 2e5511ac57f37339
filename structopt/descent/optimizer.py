"""A rule as a torch optimiser."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from structopt.descent.rules import Rule, State
from structopt.descent.written import need_rate


class Descent(torch.optim.Optimizer):
    """Applies a rule to parameters in place, θ ← θ - η d: a ``torch.optim.Optimizer``.

    `params` are tensors, (name, tensor) pairs, or groups, ``{"params": …, "lr": …, "rule": …}``;
    a group without its own rule or learning rate has those of `rule`. Schedulers, ``GradScaler``,
    closures, hooks and ``state_dict`` work as with any optimiser of torch; a state that is loaded
    takes the memory format of its parameter. It works on whole lists of tensors at a time.

    A gradient that is not finite raises FloatingPointError before any weight has changed, and names
    the parameter. ``check_finite=False`` lets it through and saves one wait for the device.
    Raises ValueError for no parameters, a missing rule, a learning rate below zero, parameters
    that are complex or have no shape yet, and sparse gradients.

    >>> from structopt.descent import momentum
    >>> weight = nn.Parameter(torch.tensor([4.0]))
    >>> optimizer = Descent([weight], momentum(0.1))
    >>> for _ in range(3):
    ...     optimizer.zero_grad()
    ...     (weight**2 / 2).sum().backward()
    ...     optimizer.step()
    >>> round(weight.item(), 4)
    1.944
    """

    def __init__(
        self,
        params: Iterable[Any],
        rule: Rule | None = None,
        *,
        check_finite: bool = True,
    ) -> None:
        if isinstance(params, (Tensor, nn.Module)):
            raise ValueError(f"Pass model.parameters(), not a {type(params).__name__}.")
        params = list(params)
        if not params:
            raise ValueError("No parameters to optimise: pass model.parameters().")
        self.rule, self.rules, self.check_finite = rule, list[Rule](), check_finite
        super().__init__(params, {})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, ``{"params": …}`` with its own "rule" and "lr" if wanted."""
        group = dict(param_group)
        rule = group.pop("rule", self.rule)
        if not isinstance(rule, Rule):
            raise ValueError(f"Each group needs a rule, such as momentum(0.1); {rule!r} was given.")
        if rule.lr is None:
            raise ValueError(f"{rule!r} has no learning rate: join it to a rule with chain(…).")
        group.setdefault("lr", rule.lr)
        need_rate(float(group["lr"]))
        super().add_param_group({**group, "rule": repr(rule)})
        params = self.param_groups[-1]["params"]
        try:
            _need_usable(params)
            rule.init([torch.empty_like(p, device="meta") for p in params])
        except ValueError:
            self.param_groups.pop()
            raise
        self.rules.append(rule)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step. `closure`, if given, computes gradients and returns the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        active = [[p for p in group["params"] if p.grad is not None] for group in self.param_groups]
        self._need_usable_gradients([p for params in active for p in params])
        for params, group, rule in zip(active, self.param_groups, self.rules, strict=True):
            if params:
                self._step(params, float(group["lr"]), rule)
        return loss

    def _step(self, params: list[Tensor], lr: float, rule: Rule) -> None:
        gradients = _gradients(params)
        fresh = [p for p in params if p not in self.state]
        for name, tensors in rule.init(fresh).items():
            for p, tensor in zip(fresh, tensors, strict=True):
                self.state[p][name] = tensor
        names = self.state[params[0]].keys()
        state: State = {name: [self.state[p][name] for p in params] for name in names}
        directions, news = rule.update(gradients, state, params)
        torch._foreach_add_(params, directions, alpha=-lr)
        for name, tensors in news.items():
            for p, tensor in zip(params, tensors, strict=True):
                self.state[p][name] = tensor

    def _need_usable_gradients(self, params: list[Tensor]) -> None:
        gradients = _gradients(params)
        if any(g.is_sparse for g in gradients):
            raise ValueError("Descent needs dense gradients: use Embedding(sparse=False).")
        if not self.check_finite:
            return
        # Of nothing torch knows no largest: an empty parameter is a layer without channels.
        params = [p for p in params if p.numel()]
        gradients = _gradients(params)
        if not params:
            return
        largest = torch._foreach_norm(gradients, float("inf"))  # a NaN is its own largest
        device = largest[0].device
        if torch.stack([norm.to(device) for norm in largest]).isfinite().all():
            return
        bad = next(p for p, norm in zip(params, largest, strict=True) if not norm.isfinite())
        raise FloatingPointError(
            f"The gradient of {self._name(bad)} is not finite; no weight was changed. Lower the "
            "learning rate, clip with chain(clip_norm(1.0), …), or look for a division by zero or "
            "a log(0) in the loss."
        )

    def _name(self, param: Tensor) -> str:
        for number, group in enumerate(self.param_groups):
            for place, p in enumerate(group["params"]):
                if p is param:
                    name = group.get("param_names", {place: f"parameter {place}"})[place]
                    return f"{name} of group {number}, shape {tuple(p.shape)},"
        raise AssertionError("a parameter of no group")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, giving each tensor the memory format of its parameter.

        Raises ValueError for a state of other rules, or of parameters of other shapes. The rules
        stay this optimiser's own; the learning rates are the loaded ones, as in torch.
        """
        self._need_fitting(state_dict)
        super().load_state_dict(state_dict)
        for group, rule in zip(self.param_groups, self.rules, strict=True):
            group["rule"] = repr(rule)
            for p in group["params"]:
                for name, value in self.state.get(p, {}).items():
                    if isinstance(value, Tensor) and value.ndim:
                        like = torch.empty_like(p, dtype=value.dtype, requires_grad=False)
                        self.state[p][name] = like.copy_(value)

    def _need_fitting(self, state_dict: dict[str, Any]) -> None:
        saved_groups = state_dict["param_groups"]
        for ours, rule, theirs in zip(self.param_groups, self.rules, saved_groups, strict=False):
            names = rule.init([]).keys()
            for number, p in zip(theirs["params"], ours["params"], strict=False):
                saved = state_dict["state"].get(number, {})
                if saved and saved.keys() != names:
                    raise ValueError(
                        f"The state holds {sorted(saved)} of {theirs.get('rule', 'another rule')}; "
                        f"{rule!r} needs {sorted(names)}."
                    )
                for name, value in saved.items():
                    if value.ndim and value.shape != p.shape:
                        raise ValueError(
                            f"The state's {name!r} of parameter {number} has shape "
                            f"{tuple(value.shape)}, the parameter {tuple(p.shape)}: was the "
                            "network changed since? Start a fresh optimiser for it."
                        )

    def __getstate__(self) -> dict[str, Any]:
        own = {"rule": self.rule, "rules": self.rules, "check_finite": self.check_finite}
        return {**super().__getstate__(), **own}


def _gradients(params: list[Tensor]) -> list[Tensor]:
    return [p.grad for p in params if p.grad is not None]


def _need_usable(params: list[Tensor]) -> None:
    for p in params:
        if is_lazy(p):
            raise ValueError("A lazy layer has no shape yet: run the model once, then optimise.")
        if p.is_complex():
            raise ValueError("Descent steps real parameters: use torch.view_as_real.")
