"""Two families whose images or networks are others: dreams, and transformers. To its own file.

Without data: the student of ``distillation.py`` learns from its first teacher's word alone, on
images that this teacher dreamt, for as many steps as EPOCHS of the training images take. Beside
it stand noise of the images' mean and spread, dreams that look at no statistics of the batch norms,
and as many real images, whose labels nobody reads. Each seed has images of its own.

Transformers: one of 1/24 of its teacher's parameters learns for EPOCHS from labels, from logits, or
from labels and what its layers and those of the teacher hold that ``map_layers`` gives them, at
weight 1 each.

Each row has the best of the same learning rates on the held-out sixth, after TRIAL epochs; dreams
have the best of three weights of their variation as well. Test images are seen by the final runs
alone.
"""

from functools import cache, partial

import torch
from distillation import EPOCHS, TRIAL, Settings, choose, sizes
from distillation_lab import Laboratory, Record, laboratory, percent, scored
from torch import nn

from structopt import distillation, losses, networks, training
from structopt.data import Examples

DREAMT, DREAM_STEPS = 200, 60
HEADS = 4
LAYERS = distillation.map_layers(
    [f"layers.{n}" for n in range(2)], [f"layers.{n}" for n in range(4)]
)
QKV = {f"{ours}.qkv": f"{theirs}.qkv" for ours, theirs in LAYERS.items()}


def each_rate(rates: tuple[float, ...], **given: float) -> list[Settings]:
    return [{"lr": lr, **given} for lr in rates]


RATES, SMALL_RATES = (0.04, 0.08, 0.16), (0.01, 0.02, 0.04)
WITHOUT_DATA = {
    "real images, unlabelled": each_rate(RATES),
    "noise": each_rate(RATES),
    "dreams": [
        given
        for variation in (10.0, 40.0, 160.0)
        for given in each_rate(RATES, statistics=1.0, variation=variation)
    ],
    "dreams without statistics": each_rate(RATES, statistics=0.0, variation=40.0),
}
TRANSFORMERS = {
    "labels": each_rate(SMALL_RATES),
    "label smoothing": each_rate(SMALL_RATES, smoothing=0.1),
    "soft targets": each_rate(SMALL_RATES, temperature=2, weight=0.9, label_weight=0.1),
    "hidden states": each_rate(SMALL_RATES),
    "attention scores": each_rate(SMALL_RATES),
    "token relations": each_rate(SMALL_RATES),
}


@cache
def transfer_set(lab: Laboratory, row: str, seed: int, **given: float) -> Examples:
    """What the student sees in the place of the training images."""
    count = DREAMT if row != "noise" else len(lab.train)  # noise costs nothing
    if row.startswith("real"):
        return lab.train.split(len(lab.train) - count, seed=seed)[0]
    torch.manual_seed(seed)
    noise, labels = torch.randn(count, 1, 28, 28), torch.arange(count) % 10
    if row == "noise":
        return Examples(noise, labels)  # the mean and the deviation of images are 0 and 1
    teacher = lab.teachers[0].to(memory_format=torch.channels_last)  # twice as fast
    start = noise.to(lab.device, memory_format=torch.channels_last)
    dreamt = distillation.dream(
        teacher,
        start,
        labels.to(lab.device),
        steps=2 if lab.quick else DREAM_STEPS,
        weights=(given["statistics"], given["variation"]),
    )
    return Examples(dreamt, labels.to(lab.device))


def without_data(
    lab: Laboratory, row: str, given: Settings, epochs: int, seed: int = 0
) -> nn.Module:
    """A StudentNet that sees this row's images as often as others see the training images."""
    given = dict(given)
    lr = given.pop("lr")
    examples = transfer_set(lab, row, seed, **given).to(lab.device)
    cached = distillation.cache_outputs(lab.teachers[0], examples)
    goal = distillation.from_logits(cached, temperature=4.0, label_weight=0.0)
    passes = round(epochs * len(lab.train) / len(examples))
    torch.manual_seed(seed)
    model = networks.StudentNet()
    return lab.fit(model, goal, cached.number(examples), epochs=passes, lr=lr, seed=seed)


@cache
def transformer_teacher(lab: Laboratory) -> nn.Module:
    make = partial(networks.TinyTransformer, dim=64, depth=4, heads=HEADS)
    return lab.teacher("teacher-transformer", make, lr=0.003, seed=0, epochs=10)


@cache
def said(lab: Laboratory) -> distillation.Cached:
    """What the teacher says about the training images, in its layers too."""
    names = [*LAYERS.values(), *QKV.values()]
    return distillation.cache_outputs(
        transformer_teacher(lab), lab.train.to(lab.device), names=names
    )


def transformer() -> nn.Module:
    return networks.TinyTransformer(dim=16, depth=2, heads=HEADS)


def of_a_transformer(
    lab: Laboratory, row: str, given: Settings, epochs: int, seed: int = 0
) -> nn.Module:
    """A small transformer that learns from what this row compares."""
    given = dict(given)
    fit = partial(lab.fit, epochs=epochs, lr=given.pop("lr"), seed=seed)
    torch.manual_seed(seed)
    model = transformer().to(lab.device)
    if row.startswith("label"):
        loss = partial(losses.cross_entropy, label_smoothing=given.get("smoothing", 0.0))
        return fit(model, training.supervised(loss), lab.train)
    cached = said(lab)
    if row == "soft targets":
        goal = distillation.from_logits(cached, **given)
    elif row == "hidden states":
        goal = distillation.hints(cached, model, LAYERS, lab.train.inputs[:2].to(lab.device))
    elif row == "attention scores":
        goal = distillation.from_features(cached, QKV, distillation.attention_scores, heads=HEADS)
    else:
        goal = distillation.from_features(
            cached, QKV, distillation.token_relations, heads=HEADS, parts=3
        )
    return fit(model, goal, cached.number(lab.train))


def main() -> None:
    lab, _ = laboratory(__doc__)  # the record is the other file's
    record = Record(lab.device, lab.quick, "other-distillation")
    teachers = {"without data": lab.teachers[0], "transformers": transformer_teacher(lab)}
    students = {"without data": networks.StudentNet(), "transformers": transformer()}
    record.result["networks"] = {
        part: {
            "parameters": sizes(teacher, students[part]),
            "teacher, validation accuracy in %": percent(teacher, lab.held),
            "teacher, test accuracy in %": percent(teacher, lab.test),
        }
        for part, teacher in teachers.items()
    }
    record.result["dreams"] = {"images": DREAMT, "steps": DREAM_STEPS}
    for part, taught, rows in (
        ("transformers", of_a_transformer, TRANSFORMERS),
        ("without data", without_data, WITHOUT_DATA),
    ):
        for row, tries in rows.items():
            given = choose(lab, record, f"{part}, tried", row, tries, TRIAL, taught=taught)
            measure = partial(scored, lab, partial(taught, lab, row, given, EPOCHS))
            record.scores(part, row, measure, epochs=EPOCHS, settings=given)


if __name__ == "__main__":
    main()
