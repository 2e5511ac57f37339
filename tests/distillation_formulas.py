"""The formulas of the papers once more, in plain Python, and a table of what they give."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from structopt import distillation as d

Rows = Sequence[Sequence[float]]
B, C = 4, 5
LABELS = [0, 4, 2, 2]


def waves(*shape: int, phase: float) -> Tensor:
    """Numbers between -3 and 3 that are the same everywhere."""
    return 3 * torch.sin(phase + 1.7 * torch.arange(math.prod(shape), dtype=torch.double)).view(
        shape
    )


def softmax(row: Sequence[float], t: float = 1.0) -> list[float]:
    e = [math.exp(z / t) for z in row]
    return [x / sum(e) for x in e]


def kl(q: Sequence[float], p: Sequence[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(q, p, strict=True))


def mean(values: Sequence[float]) -> float:
    values = list(values)
    return sum(values) / len(values)


def soft_targets(s: Rows, t: Rows, tau: float) -> float:
    return tau**2 * mean(kl(softmax(b, tau), softmax(a, tau)) for a, b in zip(s, t, strict=True))


def scores(rows: Rows) -> Rows:
    def score(row: Sequence[float]) -> list[float]:
        m = mean(row)
        return [(z - m) / math.sqrt(mean([(x - m) ** 2 for x in row])) for z in row]

    return [score(row) for row in rows]


def logit_mse(s: Rows, t: Rows) -> float:
    return mean(
        [(a - b) ** 2 for x, y in zip(s, t, strict=True) for a, b in zip(x, y, strict=True)]
    )


def decoupled(s: Rows, t: Rows, tau: float, alpha: float, beta: float) -> float:
    total = []
    for a, b, y in zip(s, t, LABELS, strict=True):
        p, q = softmax(a, tau), softmax(b, tau)
        tckd = kl([q[y], 1 - q[y]], [p[y], 1 - p[y]])
        others = [c for c in range(C) if c != y]
        nckd = kl([q[c] / (1 - q[y]) for c in others], [p[c] / (1 - p[y]) for c in others])
        total.append(alpha * tckd + beta * nckd)
    return tau**2 * mean(total)


def pearson(a: Sequence[float], b: Sequence[float]) -> float:
    ma, mb = mean(a), mean(b)
    both = sum((x - ma) * (y - mb) for x, y in zip(a, b, strict=True))
    return both / math.sqrt(sum((x - ma) ** 2 for x in a) * sum((y - mb) ** 2 for y in b))


def correlations(s: Rows, t: Rows, tau: float, beta: float, gamma: float) -> float:
    p, q = ([softmax(row, tau) for row in rows] for rows in (s, t))
    inter = mean([1 - pearson(a, b) for a, b in zip(p, q, strict=True)])
    columns = zip(zip(*p, strict=True), zip(*q, strict=True), strict=True)
    return tau**2 * (beta * inter + gamma * mean([1 - pearson(a, b) for a, b in columns]))


def unit(row: Sequence[float]) -> list[float]:
    size = math.sqrt(sum(x * x for x in row))
    return [x / size for x in row]


def attention_transfer(s: Tensor, t: Tensor, power: float) -> float:
    total = []
    for a, b in zip(s.tolist(), t.tolist(), strict=True):
        maps = []
        for channels in (a, b):
            flat = [[x for line in channel for x in line] for channel in channels]
            maps.append(unit([sum(abs(x) ** power for x in p) for p in zip(*flat, strict=True)]))
        total.append(0.5 * sum((x - y) ** 2 for x, y in zip(*maps, strict=True)))
    return mean(total)


def similarity_preserving(s: Rows, t: Rows) -> float:
    grams = [
        [unit([sum(x * y for x, y in zip(a, b, strict=True)) for b in rows]) for a in rows]
        for rows in (s, t)
    ]
    return mean([
        (x - y) ** 2
        for g, h in zip(*grams, strict=True)
        for x, y in zip(g, h, strict=True)
    ])  # fmt: skip


def huber(e: float) -> float:
    return 0.5 * e * e if abs(e) <= 1 else abs(e) - 0.5


def relational_distance(s: Rows, t: Rows) -> float:
    pairs = list(itertools.combinations(range(len(s)), 2))
    psi = []
    for rows in (s, t):
        far = [math.dist(rows[i], rows[j]) for i, j in pairs]
        psi.append([x / mean(far) for x in far])
    return mean([huber(a - b) for a, b in zip(*psi, strict=True)])


def relational_angle(s: Rows, t: Rows) -> float:
    def cosine(rows: Rows, i: int, j: int, k: int) -> float:
        e = [unit([a - b for a, b in zip(rows[x], rows[j], strict=True)]) for x in (i, k)]
        return sum(a * b for a, b in zip(*e, strict=True))

    triples = list(itertools.permutations(range(len(s)), 3))
    return mean([huber(cosine(s, *ijk) - cosine(t, *ijk)) for ijk in triples])


def mutual(all_logits: Sequence[Rows], tau: float) -> float:
    others = len(all_logits) - 1
    return sum(
        soft_targets(a, b, tau) / others
        for i, a in enumerate(all_logits)
        for j, b in enumerate(all_logits)
        if i != j
    )


def dot(a: Sequence[float], b: Sequence[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def contrastive(s: Rows, t: Rows, tau: float, level: float | None = None) -> float:
    """``level`` is mean(e), where it is to stay what it was."""
    s, t = ([[x / math.sqrt(dot(r, r)) for x in r] for r in rows] for rows in (s, t))
    e = [[math.exp(dot(a, b) / tau) for b in t] for a in s]
    level = mean([x for row in e for x in row]) if level is None else level
    total, count = 0.0, len(s)
    for i in range(count):
        others = [j for j in range(count) if LABELS[j] != LABELS[i]]
        c = len(others) * level
        for pairs in (e[i], [e[j][i] for j in range(count)]):
            total -= math.log(pairs[i] / (pairs[i] + c))
            total -= sum(math.log(1 - pairs[j] / (pairs[j] + c)) for j in others)
    return total / count


def slices(tokens: Tensor, heads: int, parts: int) -> list[list[Rows]]:
    """[part·head][example] -> rows of that slice."""
    wide = tokens.shape[2] // (heads * parts)
    pieces = [tokens[:, :, k * wide : (k + 1) * wide] for k in range(heads * parts)]
    return [[example.tolist() for example in piece] for piece in pieces]


def token_relations(s: Tensor, t: Tensor, heads: int, parts: int) -> float:
    terms = []
    for a, b in zip(slices(s, heads, parts), slices(t, heads, parts), strict=True):
        for ours, theirs in zip(a, b, strict=True):
            for i in range(len(ours)):
                p, q = (
                    softmax([dot(x[i], row) / math.sqrt(len(row)) for row in x])
                    for x in (ours, theirs)
                )
                terms.append(sum(v * math.log(v / u) for u, v in zip(p, q, strict=True)))
    return parts * mean(terms)


def attention_scores(s: Tensor, t: Tensor, heads: int) -> float:
    terms = []
    ours, theirs = slices(s, heads, 3), slices(t, heads, 3)
    for h in range(heads):
        for n in range(len(s)):
            for i in range(s.shape[1]):
                for j in range(s.shape[1]):
                    a, b = (
                        dot(x[h][n][i], x[heads + h][n][j]) / math.sqrt(len(x[h][n][i]))
                        for x in (ours, theirs)
                    )
                    terms.append((a - b) ** 2)
    return mean(terms)


def total_variation(images: Tensor) -> float:
    down, along = [], []
    for channel in images.flatten(0, 1).tolist():
        down += [
            abs(a - b) for x, y in itertools.pairwise(channel) for a, b in zip(x, y, strict=True)
        ]
        along += [abs(a - b) for row in channel for a, b in itertools.pairwise(row)]
    return mean(down) + mean(along)


# Ours, theirs, and the value kept


S, T = waves(B, C, phase=0.3), waves(B, C, phase=2.0)
MAPS = waves(B, 3, 4, 4, phase=1.0), waves(B, 6, 4, 4, phase=0.2)
EMBEDDINGS = waves(B, 3, phase=0.1), waves(B, 6, phase=0.9)
Y = torch.tensor(LABELS)
TOKENS = waves(2, 4, 12, phase=0.1), waves(2, 4, 24, phase=1.1)
IMAGES = waves(2, 3, 4, 5, phase=0.7)
Case = tuple[Callable[..., Tensor], tuple[Tensor, ...], Callable[[], float], float]
CASES: dict[str, Case] = {
    "soft targets": (
        partial(d.soft_targets, temperature=3.0), (S, T),
        lambda: soft_targets(S.tolist(), T.tolist(), 3.0), 4.356496,
    ),
    "standardised logits": (
        partial(d.standardised_logits, temperature=2.0), (S, T),
        lambda: soft_targets(scores(S.tolist()), scores(T.tolist()), 2.0), 1.0634,
    ),
    "MSE of logits": (d.logit_mse, (S, T), lambda: logit_mse(S.tolist(), T.tolist()), 9.888822),
    "decoupled": (
        lambda s, t: d.decoupled(s, t, Y.to(s.device), temperature=2.0, alpha=0.7, beta=3.0),
        (S, T),
        lambda: decoupled(S.tolist(), T.tolist(), 2.0, 0.7, 3.0), 11.1531,
    ),
    "correlations": (
        partial(d.correlations, temperature=2.0, beta=0.5, gamma=2.0), (S, T),
        lambda: correlations(S.tolist(), T.tolist(), 2.0, 0.5, 2.0), 11.94609,
    ),
    "hint": (d.hint, (S, T), lambda: logit_mse(S.tolist(), T.tolist()), 9.888822),
    "attention transfer": (
        partial(d.attention_transfer, power=3.0), MAPS,
        lambda: attention_transfer(*MAPS, 3.0), 0.001177775,
    ),
    "similarity preserving": (
        d.similarity_preserving, MAPS,
        lambda: similarity_preserving(*(x.flatten(1).tolist() for x in MAPS)), 0.00019074,
    ),
    "relational distance": (
        d.relational_distance, EMBEDDINGS,
        lambda: relational_distance(*(x.tolist() for x in EMBEDDINGS)), 0.1026819,
    ),
    "relational angle": (
        d.relational_angle, EMBEDDINGS,
        lambda: relational_angle(*(x.tolist() for x in EMBEDDINGS)), 0.271022,
    ),
    "mutual": (
        lambda s, t: d.mutual_loss([s, t, s.detach().flip(1)], temperature=2.0), (S, T),
        lambda: mutual([S.tolist(), T.tolist(), S.flip(1).tolist()], 2.0), 10.07013,
    ),
    "contrastive": (
        lambda s, t: d.contrastive(s, t, Y.to(s.device), temperature=0.5), (S, T),
        lambda: contrastive(S.tolist(), T.tolist(), 0.5), 5.93885857550111,
    ),
    "token relations": (
        partial(d.token_relations, heads=2, parts=3), TOKENS,
        lambda: token_relations(*TOKENS, 2, 3), 16.734209469396692,
    ),
    "attention scores": (
        partial(d.attention_scores, heads=2), TOKENS,
        lambda: attention_scores(*TOKENS, 2), 48.19207506257656,
    ),
    "total variation": (
        d.total_variation, (IMAGES,), lambda: total_variation(IMAGES), 6.29774296415456,
    ),
}  # fmt: skip
