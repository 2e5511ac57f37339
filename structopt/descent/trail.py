"""The points that a rule visits on a surface: for pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from structopt.descent.rules import Rule
from structopt.descent.schedules import Schedule


def path(
    function: Callable[[Tensor], Tensor],
    start: Tensor | Sequence[float],
    rule: Rule,
    *,
    steps: int,
    schedule: Schedule | None = None,
) -> Tensor:
    """Walk down `function` from `start` by `rule`: the (steps + 1, …) points visited.

    `function` maps one point to a scalar. Written with ``point[..., 0]`` it also takes a whole grid
    of points, so that one function draws both the surface and the path. A path that diverges ends
    in inf or nan, as its arithmetic says. The points have the shape, type and device of `start`.
    Raises ValueError if the function does not give a scalar that depends on the point, if the rule
    has no learning rate, or for fewer than one step.

    >>> from structopt.descent import gradient
    >>> path(lambda point: (point**2).sum() / 2, [4.0], gradient(0.5), steps=3)
    tensor([[4.0000],
            [2.0000],
            [1.0000],
            [0.5000]])
    """
    if steps < 1 or rule.lr is None:
        raise ValueError(f"A path needs a step and a learning rate; steps={steps}, {rule!r}.")
    point = torch.as_tensor(start).detach().clone()
    if not point.is_floating_point():
        point = point.to(torch.get_default_dtype())
    points, state = [point], rule.init([point])
    for step in range(steps):
        lr = rule.lr * (schedule(step, steps) if schedule else 1.0)
        with torch.no_grad():
            directions, state = rule.update([_slope(function, point)], state, [point])
        point = point - lr * directions[0]
        points.append(point)
    return torch.stack(points)


def _slope(function: Callable[[Tensor], Tensor], point: Tensor) -> Tensor:
    with torch.enable_grad():
        point = point.detach().requires_grad_()
        value = function(point)
        if value.ndim or not value.requires_grad:
            raise ValueError(
                "The function must give one number that depends on the point; "
                f"it gave shape {tuple(value.shape)}, requires_grad={value.requires_grad}."
            )
        return torch.autograd.grad(value, point)[0]
