r"""Update rules written out: each turns gradients into directions.

With g the gradient, d the direction that a rule makes of it, and η the learning rate, every rule of
this room ends in the same line, θ ← θ - η d. A rule is pure: it returns its new state.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from structopt.descent.written import need_fraction, need_positive, need_rate, written

Tensors = list[Tensor] | tuple[Tensor, ...]
State = dict[str, Tensors]
"""What a rule remembers: under each name, one tensor for each parameter."""


@dataclass(frozen=True)
class Rule:
    """An update rule, a frozen value that prints itself as it was written.

    ``init(params) -> state`` makes the memory before the first step.
    ``update(gradients, state, params) -> (directions, state)`` makes one direction for each
    parameter, of its shape, and changes none of its arguments. The learning rate stays outside, so
    that a schedule can change it: θ ← θ - η d. ``lr`` is None for a part such as :func:`clip_norm`,
    which needs a rule beside it in a :func:`chain`.

    >>> rule = momentum(0.1)
    >>> rule
    momentum(lr=0.1, beta=0.9)
    >>> gradients, params = [torch.tensor([1.0])], [torch.tensor([5.0])]
    >>> state = rule.init(params)
    >>> for _ in range(3):
    ...     (direction,), state = rule.update(gradients, state, params)
    >>> round(direction.item(), 2)  # 1 + 0.9 + 0.81
    2.71
    """

    text: str
    lr: float | None
    init: Callable[[Tensors], State] = field(compare=False)
    update: Callable[[Tensors, State, Tensors], tuple[Tensors, State]] = field(compare=False)

    def __post_init__(self) -> None:
        if self.lr is not None:
            need_rate(self.lr)

    def __repr__(self) -> str:
        return self.text


def zeros(params: Tensors, *, names: tuple[str, ...] = (), counts: bool = False) -> State:
    """Zeros like each parameter under each name; `counts` adds a counter of steps."""
    state: State = {n: [torch.zeros_like(p, requires_grad=False) for p in params] for n in names}
    if counts:  # on the CPU, so that reading it never waits for an accelerator
        state["step"] = [torch.zeros((), dtype=torch.float32) for _ in params]
    return state


def gradient(lr: float) -> Rule:
    """Gradient descent, d = g (Cauchy, 1847; Robbins and Monro, 1951, for noisy gradients).

    Raises ValueError for a learning rate below zero.

    >>> gradient(0.1)
    gradient(lr=0.1)
    """
    return Rule(written("gradient", lr=lr), lr, zeros, _gradient)


def _gradient(gradients: Tensors, state: State, params: Tensors) -> tuple[Tensors, State]:
    return gradients, state


def momentum(lr: float, beta: float = 0.9) -> Rule:
    """Heavy-ball momentum, v ← β v + g and d = v (Polyak, 1964).

    On a constant gradient the steps grow to 1 / (1 - β) times that of :func:`gradient`.
    Raises ValueError for a learning rate below zero or β outside [0, 1).

    >>> momentum(0.1)
    momentum(lr=0.1, beta=0.9)
    """
    need_fraction(beta=beta)
    init = partial(zeros, names=("velocity",))
    return Rule(written("momentum", lr=lr, beta=beta), lr, init, partial(_momentum, beta=beta))


def _momentum(
    gradients: Tensors, state: State, params: Tensors, *, beta: float
) -> tuple[Tensors, State]:
    velocity = torch._foreach_add(gradients, state["velocity"], alpha=beta)
    return velocity, {"velocity": velocity}


def nesterov(lr: float, beta: float = 0.9) -> Rule:
    """Nesterov momentum, v ← β v + g and d = g + β v (Nesterov, 1983; Sutskever et al., 2013).

    The step is taken as if the velocity had already moved on once more.
    Raises ValueError for a learning rate below zero or β outside [0, 1).

    >>> nesterov(0.1)
    nesterov(lr=0.1, beta=0.9)
    """
    need_fraction(beta=beta)
    init = partial(zeros, names=("velocity",))
    return Rule(written("nesterov", lr=lr, beta=beta), lr, init, partial(_nesterov, beta=beta))


def _nesterov(
    gradients: Tensors, state: State, params: Tensors, *, beta: float
) -> tuple[Tensors, State]:
    velocity = torch._foreach_add(gradients, state["velocity"], alpha=beta)
    return torch._foreach_add(gradients, velocity, alpha=beta), {"velocity": velocity}


def rmsprop(lr: float, beta: float = 0.99, *, eps: float = 1e-8) -> Rule:
    """RMSProp, s ← β s + (1 - β) g² and d = g / (√s + ε) (Tieleman and Hinton, 2012).

    Raises ValueError for a learning rate below zero, β outside [0, 1) or ε not above zero.

    >>> rmsprop(0.001)
    rmsprop(lr=0.001, beta=0.99, eps=1e-08)
    """
    need_fraction(beta=beta)
    need_positive(eps=eps)
    init = partial(zeros, names=("square",))
    text = written("rmsprop", lr=lr, beta=beta, eps=eps)
    return Rule(text, lr, init, partial(_rmsprop, beta=beta, eps=eps))


def _rmsprop(
    gradients: Tensors, state: State, params: Tensors, *, beta: float, eps: float
) -> tuple[Tensors, State]:
    square = _mean_square(state["square"], gradients, beta)
    root = torch._foreach_sqrt(square)
    torch._foreach_add_(root, eps)
    return torch._foreach_div(gradients, root), {"square": square}


def _mean_square(square: Tensors, gradients: Tensors, beta: float) -> Tensors:
    """β s + (1 - β) g²"""
    square = torch._foreach_mul(square, beta)
    torch._foreach_addcmul_(square, gradients, gradients, 1 - beta)
    return square


def adam(lr: float, betas: tuple[float, float] = (0.9, 0.999), *, eps: float = 1e-8) -> Rule:
    """Adam, d = m̂ / (√ŝ + ε) (Kingma and Ba, 2015).

    m ← β₁ m + (1 - β₁) g and s ← β₂ s + (1 - β₂) g² are running means. They start at zero, so
    step t divides them by 1 - β₁ᵗ and 1 - β₂ᵗ: that makes m̂ and ŝ.
    Raises ValueError for a learning rate below zero, a β outside [0, 1) or ε not above zero.

    >>> adam(0.001)
    adam(lr=0.001, betas=(0.9, 0.999), eps=1e-08)
    """
    need_fraction(**{f"betas[{i}]": beta for i, beta in enumerate(betas)})
    need_positive(eps=eps)
    init = partial(zeros, names=("mean", "square"), counts=True)
    text = written("adam", lr=lr, betas=betas, eps=eps)
    return Rule(text, lr, init, partial(_adam, betas=betas, eps=eps))


def _adam(
    gradients: Tensors, state: State, params: Tensors, *, betas: tuple[float, float], eps: float
) -> tuple[Tensors, State]:
    step = torch._foreach_add(state["step"], 1)
    mean = torch._foreach_lerp(state["mean"], gradients, 1 - betas[0])
    square = _mean_square(state["square"], gradients, betas[1])
    counts = [t.item() for t in step]
    root = torch._foreach_sqrt(square)
    torch._foreach_div_(root, [(1 - betas[1] ** t) ** 0.5 for t in counts])
    torch._foreach_add_(root, eps)
    direction = torch._foreach_div(mean, root)
    torch._foreach_div_(direction, [1 - betas[0] ** t for t in counts])
    return direction, {"step": step, "mean": mean, "square": square}


def lion(lr: float, betas: tuple[float, float] = (0.9, 0.99)) -> Rule:
    """Lion, d = sign(β₁ m + (1 - β₁) g), then m ← β₂ m + (1 - β₂) g (Chen et al., 2023).

    Every weight moves by exactly η, so η is 3 to 10 times smaller than Adam's. The paper adds
    decoupled decay: ``chain(lion(1e-4), decay(0.1))``.
    Raises ValueError for a learning rate below zero or a β outside [0, 1).

    >>> lion(0.0001)
    lion(lr=0.0001, betas=(0.9, 0.99))
    """
    need_fraction(**{f"betas[{i}]": beta for i, beta in enumerate(betas)})
    init = partial(zeros, names=("mean",))
    return Rule(written("lion", lr=lr, betas=betas), lr, init, partial(_lion, betas=betas))


def _lion(
    gradients: Tensors, state: State, params: Tensors, *, betas: tuple[float, float]
) -> tuple[Tensors, State]:
    direction = torch._foreach_lerp(state["mean"], gradients, 1 - betas[0])
    torch._foreach_sign_(direction)
    return direction, {"mean": torch._foreach_lerp(state["mean"], gradients, 1 - betas[1])}
