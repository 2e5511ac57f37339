"""Why a student gains nothing: the usual reasons, looked for one by one."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from structopt.distillation.cache import Cached
from structopt.distillation.teachers import Teacher, teaches
from structopt.losses.checks import need_temperature
from structopt.training import evaluate
from structopt.training.copying import copied
from structopt.training.statistics import device_of

BATCHES = 8  # that stand for the whole


@dataclass(frozen=True)
class Finding:
    """One reason, what shows it in this case, and what to do about it."""

    reason: str
    evidence: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.reason}: {self.evidence}. {self.remedy}."


@dataclass(frozen=True)
class Diagnosis:
    """What :func:`diagnose` found; prints itself, and is false where it found nothing."""

    findings: tuple[Finding, ...]

    def __bool__(self) -> bool:
        return bool(self.findings)

    def __str__(self) -> str:
        lines = [f"{number}. {finding}" for number, finding in enumerate(self.findings, 1)]
        return "\n".join(lines) or "None of the usual reasons was found."


def diagnose(
    teacher: nn.Module,
    batches: Any,
    validation: Any,
    *,
    student: nn.Module | None = None,
    cached: Cached | None = None,
    temperature: float = 4.0,
) -> Diagnosis:
    """The usual reasons why a student gains nothing, each with the numbers that show it.

    - The teacher is in training mode: dropout and batch statistics blur what it says. The
      objectives of this package ask it in evaluation mode, a loop of your own may not.
    - It was trained with label smoothing: over the wrong classes its logits are nearly equal, and
      the gap to the right class is nearly the same for each example (Müller et al., 2019, "When
      does label smoothing help?"). Seen where the gap's std / mean and the mean over the examples
      of std(wrong logits) / gap are both below 0.24.
    - The cached teacher did not see the augmentation, and says something else of these inputs.
    - The student has data enough: trained on labels alone it is as good on the validation examples
      as on its training examples, or as its teacher, to twice the standard error.
    - The temperature flattens everything (the entropy of the soft targets is above 98% of that of
      equal classes), or nothing (below 2%).

    Args:
        teacher: the network itself.
        batches: what the student trains on, ``data.batches(...)`` or a list of batches; the first
            eight are looked at. With ``cached``, those of ``cached.number(examples)``.
        validation: examples that neither of them was trained on.
        student: a student trained on the labels alone, for as long; None leaves that question out.
        cached: the outputs that the student learns from, if it does not ask the teacher.
        temperature: the one that the student is trained with.

    Raises:
        ValueError: batches that are not pairs, or hold no example; targets that are no class
            indices; an iterator as validation; a temperature not above 0.
        FloatingPointError: the teacher says NaN or infinity.

    Example:
        >>> batch = torch.rand(8, 2), torch.zeros(8).long()
        >>> teacher = nn.Sequential(nn.Linear(2, 3), nn.Dropout()).train()
        >>> print(diagnose(teacher, [batch], [batch], temperature=1e6))  # doctest: +ELLIPSIS
        1. The teacher is in training mode: ...
        2. The temperature flattens everything: ...
    """
    need_temperature(temperature)
    if not isinstance(teacher, nn.Module) or teaches(teacher):
        kind = type(teacher).__name__
        raise ValueError(f"diagnose looks at one nn.Module, not {kind}: name the network itself")
    if isinstance(validation, Iterator):
        raise ValueError("validation can be walked only once: give examples or a list of batches")
    device = device_of(teacher, ())
    seen = [(x.to(device), _labels(y, cached).to(device), y.to(device)) for x, y in _first(batches)]
    if not seen:
        raise ValueError("there is nothing to look at: the batches hold no example")
    asked = Teacher(teacher)
    logits = torch.cat([asked.teach(x, y).logits.float() for x, y, _ in seen])
    labels = torch.cat([y for _, y, _ in seen])
    taught = logits
    if cached is not None:
        taught = torch.cat([cached.teach(x, y).logits.float() for x, _, y in seen])
    if not (logits.isfinite().all() and taught.isfinite().all()):
        raise FloatingPointError(
            "the teacher's logits hold NaN or infinity: look at it, or the data"
        )
    found = [
        _training_mode(teacher, [(x, y) for x, y, _ in seen]),
        _label_smoothing(taught, labels),
        _unseen_augmentation(taught, logits) if cached is not None else None,
        _data_enough(student, teacher, seen, validation) if student is not None else None,
        _temperature(taught, temperature),
    ]
    return Diagnosis(tuple(finding for finding in found if finding is not None))


def _labels(targets: Tensor, cached: Cached | None) -> Tensor:
    if not isinstance(targets, Tensor) or targets.is_floating_point():
        raise ValueError("diagnose needs class indices: soft targets become such by argmax(1)")
    numbered = targets.ndim == 2 and targets.shape[1] == 2
    if cached is not None and not numbered:
        raise ValueError("with a cache, diagnose needs the batches of cached.number(examples)")
    if cached is None and numbered:
        raise ValueError("these batches are numbered, name the cache as well: cached=...")
    return targets[:, 0] if numbered else targets


def _first(batches: Any) -> Iterator[Any]:
    walk = batches.epoch(0) if callable(getattr(batches, "epoch", None)) else iter(batches)
    for number, batch in enumerate(walk):
        if number == BATCHES:
            return
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise ValueError("diagnose looks at batches that are pairs (inputs, targets)")
        yield batch


def _training_mode(teacher: nn.Module, seen: list[Any]) -> Finding | None:
    if not any(module.training for module in teacher.modules()):
        return None
    moving = copied(teacher)  # a pass in training mode moves the statistics of batch norms
    gpus = {x.device for x, _ in seen if x.is_cuda}
    with torch.no_grad(), torch.random.fork_rng(devices=gpus):
        # Asked as a Teacher asks, which brings inputs to its number type.
        noisy = torch.cat([Teacher(moving)._ask(moving, x).float() for x, _ in seen])
    calm = torch.cat([Teacher(teacher).teach(x, y).logits.float() for x, y in seen])
    if torch.allclose(noisy, calm, rtol=1e-3, atol=1e-3):
        return None  # nothing in it depends on the mode
    labels = torch.cat([y for _, y in seen])
    modes = " and ".join(f"{_accuracy(z, labels):.1%}" for z in (noisy, calm))
    return Finding(
        "The teacher is in training mode",
        f"as it stands and in evaluation mode it gets {modes} of these batches right",
        "Call teacher.eval() before you ask it or keep its outputs",
    )


def _label_smoothing(logits: Tensor, labels: Tensor) -> Finding | None:
    if logits.ndim != 2 or logits.shape[1] < 3:
        return None  # two classes leave no order of the wrong ones
    right = logits.argmax(1) == labels
    if right.sum() < 16:
        return None
    z, y = logits[right], labels[right].unsqueeze(1)
    wrong = z.scatter(1, y, torch.nan)
    wrong = wrong[~wrong.isnan()].view(len(z), -1)
    gap = z.gather(1, y).squeeze(1) - wrong.mean(1)
    steadiness, order = float(gap.std() / gap.mean()), float((wrong.std(1) / gap).mean())
    if not (steadiness < 0.24 and order < 0.24):
        return None
    # A network fitted perfectly to smoothing s has the gap log((1 - s)·C/s + 1).
    classes = logits.shape[1]
    smoothing = classes / (math.exp(min(float(gap.mean()), 50.0)) + classes - 1)
    return Finding(
        "The teacher was trained with label smoothing",
        f"the gap between the right logit and the others is {gap.mean():.1f} ± {gap.std():.1f}, as "
        f"smoothing of about {smoothing:.2f} makes it, and the others differ by {order:.2f} of it",
        "Train the teacher without it, or use standardised_logits, which needs the order alone",
    )


def _unseen_augmentation(taught: Tensor, logits: Tensor) -> Finding | None:
    log_p, log_q = taught.log_softmax(1), logits.log_softmax(1)
    apart = float((log_q.exp() * (log_q - log_p)).sum(1).mean())
    if apart < 0.01:  # nats; a cache in another precision stays far below
        return None
    other = 1 - _accuracy(taught, logits.argmax(1))
    return Finding(
        "The cached teacher did not see this augmentation",
        f"of the inputs that the student gets, the teacher itself says something else: "
        f"{apart:.2f} nats apart, another class for {other:.1%}",
        "Train unaugmented, or ask the teacher live",
    )


def _data_enough(
    student: nn.Module, teacher: nn.Module, seen: list[Any], validation: Any
) -> Finding | None:
    scores = [evaluate(model, validation) for model in (student, teacher)]
    fitted = evaluate(student, [(x, y) for x, y, _ in seen])
    ours, theirs = scores
    held, own = _count(validation), sum(len(x) for x, _, _ in seen)
    noise = 2 * math.sqrt(max(ours * (1 - ours), 1e-4) * (1 / held + 1 / own))
    numbers = (
        f"{ours:.1%} on validation examples, {fitted:.1%} on its own, the teacher {theirs:.1%}"
    )
    if theirs - ours < noise:
        reason = "The student has data enough to be as good as its teacher"
        return Finding(reason, f"on labels alone it gets {numbers}", "Take a better teacher")
    if fitted - ours < noise:
        return Finding(
            "The student has data enough",
            f"on labels alone it gets {numbers}: it does not overfit, its size is the limit",
            "Expect little from a teacher; a wider student or longer training gives more",
        )
    return None


def _temperature(logits: Tensor, temperature: float) -> Finding | None:
    if logits.shape[1] < 2:
        return None  # one class is certain at any temperature
    q = (logits / temperature).softmax(1)
    most = math.log(logits.shape[1])
    share = float(-(q * q.clamp(min=1e-30).log()).sum(1).mean()) / most
    if 0.02 <= share <= 0.98:
        return None
    what = "everything" if share > 0.5 else "nothing"
    return Finding(
        f"The temperature flattens {what}",
        f"at T = {temperature:g} the soft targets have {share:.1%} of the entropy of equal classes",
        "Lower it" if share > 0.5 else "Raise it",
    )


def _accuracy(logits: Tensor, labels: Tensor) -> float:
    return float((logits.argmax(1) == labels).float().mean())


def _count(data: Any) -> int:
    return len(data.inputs) if hasattr(data, "inputs") else sum(len(x) for x, _ in data)
