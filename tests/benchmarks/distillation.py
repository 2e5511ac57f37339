"""What a student of 1/31 of its teacher's parameters gains: every method, one budget, three seeds.

Students and teachers train on five sixths of the embedded training images. The other sixth
(split seed 0) chooses the settings of labels, of label smoothing and of two methods, among three
candidates of TRIAL epochs each; the others have fixed ones, most of them published. All of these
train at the learning rate that labels alone chose; the two baselines and the best method then once
more at a rate of their own, of three tried for EPOCHS epochs each ("rates").
Test images are seen by the final runs alone. What was measured is kept after each training, and an
interrupted run goes on from there. ``distillation_cases.py`` adds few labels, an unseen class and
the cost.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from distillation_lab import LAYERS, Laboratory, Record, laboratory, percent
from torch import nn

from structopt import distillation, losses, networks, training
from structopt.data import Flip

TRIAL, EPOCHS = 3, 5
RATES = (0.04, 0.08, 0.16)
RATED = ("labels", "label smoothing", "standardised_logits")
TWICE = ("labels", "standardised_logits")

Settings = dict[str, Any]


def each(name: str, values: tuple[float, ...], **others: float) -> list[Settings]:
    return [{name: value, **others} for value in values]


CANDIDATES: dict[str, list[Settings]] = {
    "labels": [*each("lr", (0.02, 0.04)), {"lr": 0.02, "flip": True}],
    "standardised_logits": each("temperature", (1, 2, 4), weight=9.0, label_weight=0.1),
    "soft_targets": each("temperature", (2, 4, 8), weight=0.9, label_weight=0.1),
    "label smoothing": each("smoothing", (0.05, 0.1, 0.2)),
    # From here on each as its paper has it.
    "decoupled": [{"temperature": 4, "beta": 8.0}],
    "correlations": [{"temperature": 4, "weight": 2.0}],
    "logit_mse": [{"label_weight": 0.0}],
    "attention_transfer": [{"weight": 2000 / 49}],
    "similarity_preserving": [{"weight": 3000.0}],
    "hints": [{"weight": 1.0}],
    "relations": [{"weight": 1.0}],
    "contrast": [{"weight": 0.8}],
    "moving teacher": [{"weight": 1.0, "temperature": 1}],
    "deep supervision": [{"weight": 0.3, "share": 0.3}],
    "mutual": [{"weight": 1.0, "temperature": 1}],
    "born again": [{"temperature": 1}],
}


def objective(
    lab: Laboratory, method: str, student: nn.Module, given: Settings
) -> distillation.Distillation:
    """What a student of the cached teachers minimises."""
    example = lab.train.inputs[:2].to(lab.device)
    room: Any = distillation
    if method in {"hints", "contrast"}:
        goal: distillation.Distillation = getattr(room, method)(
            lab.cached, student, LAYERS, example, **given
        )
        return goal
    if method == "relations":  # 25 to 50, as in the paper
        both = ((room.relational_distance, 25.0), (room.relational_angle, 50.0))
        return distillation.together(*(
            room.from_features(lab.cached, LAYERS, loss, weight=given["weight"] * part)
            for loss, part in both
        ))  # fmt: skip
    loss = getattr(room, method)
    if method in {"attention_transfer", "similarity_preserving"}:
        return distillation.from_features(lab.cached, LAYERS, loss, **given)
    return distillation.from_logits(lab.cached, loss, **given)


def student(lab: Laboratory, method: str, given: Settings, epochs: int, seed: int = 0) -> nn.Module:
    """A StudentNet taught by ``method``."""
    given = dict(given)
    lr, flip = given.pop("lr"), given.pop("flip", False)
    fit = partial(lab.fit, epochs=epochs, lr=lr, seed=seed, augment=(Flip(),) if flip else ())
    torch.manual_seed(seed)
    make: Callable[[], nn.Module] = networks.StudentNet
    if method == "mutual":
        pair = fit(nn.ModuleList([make(), make()]), distillation.mutual(**given), lab.train)
        return pair[0]  # type: ignore[index, return-value]
    if method == "born again":
        taught = partial(distillation.from_logits, **given)
        return distillation.born_again(
            make, lambda net, goal: fit(net, goal, lab.train), generations=2, objective=taught
        )[-1]
    model = make().to(lab.device)
    if method in {"labels", "label smoothing"}:
        loss = partial(losses.cross_entropy, label_smoothing=given.get("smoothing", 0.0))
        return fit(model, training.supervised(loss), lab.train)
    if method == "deep supervision":
        example = lab.train.inputs[:2].to(lab.device)
        goal = distillation.deep_supervision(model, ["conv1", "conv2"], example, **given)
        return fit(model, goal, lab.train)
    if method == "moving teacher":
        teacher = distillation.MovingTeacher(model, decay=0.99)
        goal = distillation.from_logits(teacher, **given)  # type: ignore[assignment]
        return fit(model, goal, lab.train, after_step=teacher)
    return fit(model, objective(lab, method, model, given), lab.cached.number(lab.train))


def choose(
    lab: Laboratory,
    record: Record,
    kind: str,
    method: str,
    tries: list[Settings],
    epochs: int,
    seeds: tuple[int, ...] = (0,),
    taught: Callable[[Laboratory, str, Settings, int, int], nn.Module] = student,
) -> Settings:
    """The best of the tries on the held-out sixth, a mean of seeds; a single one is not tried."""
    chosen = record.result.setdefault(kind, {})
    if method not in chosen:
        found: list[dict[str, Any]] = [{"settings": given} for given in tries]
        for row in found if found[1:] else []:
            models = (taught(lab, method, row["settings"], epochs, seed) for seed in seeds)
            scores = [percent(model, lab.held) for model in models]
            row["validation accuracy in %"] = round(sum(scores) / len(scores), 2)
            print(kind, method, row, flush=True)
        chosen[method] = sorted(found, key=lambda row: -row.get("validation accuracy in %", 0))
        record.save()
    return dict(chosen[method][0]["settings"])


def settings(lab: Laboratory, record: Record, method: str) -> Settings:
    """The method's, at the learning rate with which labels alone do best."""
    tries = CANDIDATES[method]
    if method != "labels":
        lr = settings(lab, record, "labels")["lr"]
        tries = [{"lr": lr, **given} for given in tries]
    return choose(lab, record, "candidates", method, tries, TRIAL)


def own_rate(lab: Laboratory, record: Record, method: str) -> Settings:
    given = settings(lab, record, method)
    tries = [{**given, "lr": lr} for lr in RATES]
    return choose(lab, record, "rates tried", method, tries, EPOCHS)


def final(
    lab: Laboratory, record: Record, part: str, method: str, given: Settings, epochs: int = EPOCHS
) -> None:
    def measure(seed: int) -> float:
        return percent(student(lab, method, given, epochs, seed), lab.test)

    row = method if epochs == EPOCHS else f"{method}, twice as long"
    record.scores(part, row, measure, epochs=epochs, settings=given)


def sizes(teacher: nn.Module, pupil: nn.Module) -> dict[str, int]:
    """Parameters of one teacher and of a student."""
    nets = {"teacher": teacher, "student": pupil}
    return {name: sum(p.numel() for p in net.parameters()) for name, net in nets.items()}


def main() -> None:
    lab, record = laboratory(__doc__)
    record.result |= {
        "parameters": sizes(lab.teachers[0], networks.StudentNet()),
        "training images": len(lab.train),
        "teacher": {
            "recipe": "two TeacherNets, 20 epochs, AdamW 0.01, flips, shifts by 1; logits averaged",
            "each, validation accuracy in %": [percent(one, lab.held) for one in lab.teachers],
            "each, test accuracy in %": [percent(one, lab.test) for one in lab.teachers],
        },
    }
    for method in CANDIDATES:
        given = settings(lab, record, method)
        final(lab, record, "methods", method, given)
        if method in TWICE:
            final(lab, record, "methods", method, given, 2 * EPOCHS)
    for method in RATED:
        final(lab, record, "rates", method, own_rate(lab, record, method))


if __name__ == "__main__":
    main()
