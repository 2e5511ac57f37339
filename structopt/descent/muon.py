"""Muon: momentum whose steps are made orthogonal."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from structopt.descent.rules import Rule, State, Tensors, zeros
from structopt.descent.written import need_fraction, written

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Jordan's: steep at zero, so five rounds are enough


def orthogonalise(
    matrix: Tensor, rounds: int = 5, *, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """The nearest matrix with equal singular values, roughly: U S V' becomes U V'.

    `rounds` of Newton-Schulz, X ← a X + (b A + c A²) X with A = X X', drive each singular value
    into about [0.7, 1.2] (Jordan et al., 2024): products only, so it is quick on an accelerator.
    `matrix` has two dimensions, and so has the result, in `dtype`.
    Raises ValueError for a tensor that has not two dimensions.

    >>> x = orthogonalise(torch.tensor([[3.0, 0.0], [0.0, 1.0]]), dtype=torch.float32)
    >>> bool(((torch.linalg.svdvals(x) - 1).abs() < 0.35).all())
    True
    """
    if matrix.ndim != 2:
        raise ValueError(f"Only a matrix can be made orthogonal; shape {tuple(matrix.shape)} came.")
    a, b, c = COEFFICIENTS
    x = matrix.to(dtype)
    wide = x.shape[0] <= x.shape[1]
    x = x if wide else x.T  # the smaller side first: A is then the smaller Gram matrix
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(rounds):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide else x.T


def muon(lr: float, beta: float = 0.95, *, rounds: int = 5) -> Rule:
    """Muon: Nesterov momentum, made orthogonal (Jordan et al., 2024).

    m ← β m + (1 - β) g, then d = √max(1, rows / columns) · orthogonalise((1 - β) g + β m).
    A convolution's weight is taken as the matrix (outputs, everything else). Muon is meant for
    hidden weight matrices only: a bias or a norm makes it raise ValueError. Give those, and better
    also embeddings and the last layer, a rule of their own: :func:`by_shape` makes such groups.
    Decoupled decay is added by ``chain(muon(0.02), decay(0.1))``.
    Raises ValueError also for a learning rate below zero, β outside [0, 1) or no rounds.

    >>> muon(0.02)
    muon(lr=0.02, beta=0.95, rounds=5)
    """
    need_fraction(beta=beta)
    if rounds < 1:
        raise ValueError(f"Muon needs at least one round of Newton-Schulz; rounds={rounds}.")
    text = written("muon", lr=lr, beta=beta, rounds=rounds)
    return Rule(text, lr, _matrices_only, partial(_muon, beta=beta, rounds=rounds))


def _matrices_only(params: Tensors) -> State:
    for p in params:
        if p.ndim < 2:
            raise ValueError(
                f"Muon steps weight matrices; it was given a parameter of shape {tuple(p.shape)}. "
                "Give biases and norms another rule: "
                "Descent(descent.by_shape(model, matrices=muon(0.02), others=adamw(0.001)))."
            )
    return zeros(params, names=("mean",))


def _muon(
    gradients: Tensors, state: State, params: Tensors, *, beta: float, rounds: int
) -> tuple[Tensors, State]:
    mean = torch._foreach_lerp(state["mean"], gradients, 1 - beta)
    ahead = torch._foreach_lerp(gradients, mean, beta)
    directions = [_orthogonal(a, rounds) for a in ahead]
    return directions, {"mean": mean}


def _orthogonal(gradient: Tensor, rounds: int) -> Tensor:
    flat = gradient.flatten(1)  # (outputs, everything else)
    scale = max(1.0, flat.shape[0] / flat.shape[1]) ** 0.5
    return orthogonalise(flat, rounds).to(gradient).reshape(gradient.shape).mul(scale)


def by_shape(model: nn.Module, *, matrices: Rule, others: Rule) -> list[dict[str, object]]:
    """Two parameter groups for ``Descent``: weights of two or more dimensions, and the rest.

    Raises ValueError if the model has no parameter that wants a gradient.

    >>> from structopt.descent import gradient
    >>> groups = by_shape(nn.Linear(3, 2), matrices=muon(0.02), others=gradient(0.1))
    >>> [(group["rule"], len(group["params"])) for group in groups]
    [(muon(lr=0.02, beta=0.95, rounds=5), 1), (gradient(lr=0.1), 1)]
    """
    wanted = [p for p in model.parameters() if p.requires_grad]
    if not wanted:
        raise ValueError(f"No parameter of this {type(model).__name__} wants a gradient.")
    return [
        {"params": params, "rule": rule}
        for rule, params in (
            (matrices, [p for p in wanted if p.ndim >= 2]),
            (others, [p for p in wanted if p.ndim < 2]),
        )
        if params
    ]
