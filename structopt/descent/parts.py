"""Parts that stand before or after a rule, the chain that joins them, and AdamW, which is one."""

from __future__ import annotations

from functools import partial

import torch

from structopt.descent.rules import Rule, State, Tensors, adam, zeros
from structopt.descent.written import need_positive, written


def chain(*parts: Rule) -> Rule:
    """The parts one after the other: what one hands over is the next one's gradient.

    Exactly one part has a learning rate. The place says what a part means: :func:`clip_norm`
    before the rule clips the gradient, after it the direction; :func:`decay` before the rule is an
    L2 penalty, after it decoupled weight decay.
    Raises ValueError if not exactly one part has a learning rate, or two remember the same name.

    >>> from structopt.descent import momentum
    >>> chain(clip_norm(1.0), momentum(0.1), decay(0.0001))
    chain(clip_norm(limit=1.0), momentum(lr=0.1, beta=0.9), decay(weight_decay=0.0001))
    """
    rates = [part for part in parts if part.lr is not None]
    if len(rates) != 1:
        raise ValueError(
            f"A chain needs exactly one rule with a learning rate, such as momentum(0.1); "
            f"{len(rates)} of the {len(parts)} parts given have one: {rates}."
        )
    text = f"chain({', '.join(map(repr, parts))})"
    return Rule(text, rates[0].lr, partial(_join, parts=parts), partial(_follow, parts=parts))


def _join(params: Tensors, *, parts: tuple[Rule, ...]) -> State:
    state: State = {}
    for part in parts:
        more = part.init(params)
        if twice := state.keys() & more.keys():
            raise ValueError(f"Two parts of a chain both remember {sorted(twice)}: rename one.")
        state |= more
    return state


def _follow(
    gradients: Tensors, state: State, params: Tensors, *, parts: tuple[Rule, ...]
) -> tuple[Tensors, State]:
    state = dict(state)
    for part in parts:
        gradients, news = part.update(gradients, state, params)
        state |= news
    return gradients, state


def clip_norm(limit: float) -> Rule:
    """Scale all gradients together so that their joint L2 norm is at most `limit`.

    d = g · min(1, limit / (‖g‖ + 1e-6)) (Pascanu et al., 2013). The norm runs over the parameters
    of one group: with one group this equals ``torch.nn.utils.clip_grad_norm_``.
    Raises ValueError for a limit not above zero.

    >>> rule = clip_norm(1.0)
    >>> (clipped,), _ = rule.update([torch.tensor([3.0, 4.0])], {}, [])
    >>> clipped
    tensor([0.6000, 0.8000])
    """
    need_positive(limit=limit)
    return Rule(written("clip_norm", limit=limit), None, zeros, partial(_clip_norm, limit=limit))


def _clip_norm(
    gradients: Tensors, state: State, params: Tensors, *, limit: float
) -> tuple[Tensors, State]:
    norms = torch._foreach_norm(gradients)
    total = torch.linalg.vector_norm(torch.stack([norm.to(norms[0]) for norm in norms]))
    factor = (limit / (total + 1e-6)).clamp(max=1.0)  # stays on the device: no wait
    return [g * factor.to(g) for g in gradients], state


def decay(weight_decay: float) -> Rule:
    """Weight decay, d = g + λ θ. After a rule it is decoupled, θ ← (1 - η λ) θ - η d.

    Before a rule it is the gradient of the penalty λ ‖θ‖² / 2; after :func:`adam` it makes
    :func:`adamw` (Loshchilov and Hutter, 2019). Each parameter of the group decays, biases too.
    Raises ValueError for a weight decay below zero.

    >>> decay(0.01)
    decay(weight_decay=0.01)
    """
    if not weight_decay >= 0:
        raise ValueError(f"weight_decay must be zero or more; {weight_decay!r} was given.")
    text = written("decay", weight_decay=weight_decay)
    return Rule(text, None, zeros, partial(_decay, weight_decay=weight_decay))


def _decay(
    gradients: Tensors, state: State, params: Tensors, *, weight_decay: float
) -> tuple[Tensors, State]:
    return torch._foreach_add(gradients, params, alpha=weight_decay), state


def adamw(
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    *,
    eps: float = 1e-8,
    weight_decay: float = 0.01,
) -> Rule:
    """AdamW: :func:`adam`, then :func:`decay` (Loshchilov and Hutter, 2019).

    d = m̂ / (√ŝ + ε) + λ θ, so that a weight's decay does not depend on the size of its gradient.
    Raises ValueError as :func:`adam` does, and for a weight decay below zero.

    >>> adamw(0.001)
    adamw(lr=0.001, betas=(0.9, 0.999), eps=1e-08, weight_decay=0.01)
    """
    both = chain(adam(lr, betas, eps=eps), decay(weight_decay))
    text = written("adamw", lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
    return Rule(text, lr, both.init, both.update)
