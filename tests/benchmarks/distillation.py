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

import contextlib
import io
import tempfile
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from common import arguments, keep, kept, machine, mean_and_spread
from torch import nn

from structopt import data, descent, distillation, files, losses, networks, training
from structopt.data import Examples, Flip, Shift

SEEDS = (0, 1, 2)
TRIAL, EPOCHS = 3, 5
RATES = (0.04, 0.08, 0.16)
RATED = ("labels", "label smoothing", "standardised_logits")
TWICE = ("labels", "standardised_logits")
LAYERS = {"conv3": "residual3"}

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


class Laboratory:
    """The images, the teachers (kept in ``folder``), and what they say, each made when needed."""

    def __init__(self, folder: Path, device: torch.device, quick: bool) -> None:
        self.folder, self.device, self.quick = folder, device, quick
        train, self.test = data.fashion_mnist()
        self.train, self.held = train.split(1 / 6)
        if quick:
            self.train, self.held, self.test = self.train[:256], self.held[:256], self.test[:256]

    def fit(
        self,
        model: nn.Module,
        objective: training.Objective,
        examples: Examples,
        *,
        epochs: int,
        lr: float,
        seed: int = 0,
        augment: tuple[data.Augmentation, ...] = (),
        **options: Any,
    ) -> nn.Module:
        parts = [model, objective] if isinstance(objective, nn.Module) else [model]
        training.train(
            model,
            data.batches(examples, 64, seed=seed, augment=augment, device=self.device),
            objective,
            descent.fused_adamw(nn.ModuleList(parts).to(self.device), lr),
            epochs=1 if self.quick else epochs,
            device=self.device,
            schedule=descent.one_cycle(),
            progress=False,
            **options,
        )
        return model

    @cached_property
    def teachers(self) -> list[nn.Module]:
        found: list[nn.Module] = []
        for seed in SEEDS[:2]:
            torch.manual_seed(seed)
            model: nn.Module = networks.TeacherNet()
            path = self.folder / f"teacher-{seed}.safetensors"
            if path.exists() and not self.quick:
                model.load_state_dict(files.load_tensors(path)[0])
            else:
                augment = (Flip(), Shift(1))
                self.fit(model, training.supervised(), self.train, epochs=20, lr=0.01, seed=seed,
                         augment=augment)  # fmt: skip
                if not self.quick:
                    files.save_tensors(path, model.state_dict(), {})
            found.append(model.to(self.device).requires_grad_(False))
        return found

    @cached_property
    def cached(self) -> distillation.Cached:
        """The mean of the teachers' logits; the features, which have no mean, of the first."""
        train = self.train.to(self.device)
        one = distillation.cache_outputs(self.teachers[0], train, names=LAYERS.values())
        both = distillation.cache_outputs(self.teachers, train)
        return distillation.Cached(both.logits, one.features, fingerprint=both.fingerprint)


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


def percent(model: nn.Module, examples: Examples) -> float:
    return round(100 * training.evaluate(model, examples), 2)


class Record:
    """The result, written after each addition."""

    def __init__(self, device: torch.device, quick: bool) -> None:
        self.quick = quick
        self.result: dict[str, Any] = {} if quick else kept("distillation", device)
        self.result |= {"benchmark": "distillation", "machine": machine(device)}

    def save(self) -> None:
        with contextlib.redirect_stdout(io.StringIO()):  # not the whole of it each time
            keep("distillation", self.result, self.quick)

    def scores(self, part: str, row: str, measure: Callable[[int], float], **notes: Any) -> None:
        """One number for each seed that has none yet, with these notes."""
        rows = self.result.setdefault(part, {})
        before = rows.get(row, {})
        same = all(before.get(name) == value for name, value in notes.items())
        found = before["test accuracy in %"] if before and same else []
        for seed in SEEDS[len(found) : 1 if self.quick else None]:
            found.append(measure(seed))
            rows[row] = {**notes, "test accuracy in %": found, **mean_and_spread(found)}
            print(f"{part}: {row}, seed {seed}: {found[-1]}", flush=True)
            self.save()


def choose(
    lab: Laboratory, record: Record, kind: str, method: str, tries: list[Settings], epochs: int
) -> Settings:
    """The best of the tries on the held-out sixth; a single one is not tried."""
    chosen = record.result.setdefault(kind, {})
    if method not in chosen:
        found: list[dict[str, Any]] = [{"settings": given} for given in tries]
        for row in found if found[1:] else []:
            model = student(lab, method, row["settings"], epochs)
            row["validation accuracy in %"] = percent(model, lab.held)
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


def laboratory(text: str | None) -> tuple[Laboratory, Record]:
    """From the command line; figures of a quick run are only printed."""
    parser = arguments(text)
    folder = Path(tempfile.gettempdir()) / "structopt-distillation"
    parser.add_argument("--folder", type=Path, default=folder, help="where teachers are kept")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    device = torch.device(options.device)
    return Laboratory(options.folder, device, options.quick), Record(device, options.quick)


def main() -> None:
    lab, record = laboratory(__doc__)
    record.result |= {
        "parameters": {"teacher": 116602, "student": 3778},
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
