"""What a student of 1/31 of its teacher's parameters gains: every method, one budget, three seeds.

Students and teachers train on five sixths of the embedded training images. The other sixth
(split seed 0) chooses the settings of labels, of label smoothing and of two methods, among three
candidates of TRIAL epochs each; the others have fixed ones, most of them published.
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
from common import arguments, keep, kept, machine
from torch import nn

from structopt import data, descent, distillation, files, losses, networks, training
from structopt.data import Examples, Flip, Shift

SEEDS = (0, 1, 2)
TRIAL, SHORT, LONG = 3, 5, 20  # epochs
PATIENT = ("labels", "standardised_logits", "label smoothing")  # trained for LONG too
TWICE = ("labels", "standardised_logits")  # and for twice as long
LAYERS = {"conv3": "residual3"}

Settings = dict[str, Any]
CANDIDATES: dict[str, list[Settings]] = {
    "labels": [{"lr": 0.02}, {"lr": 0.04}, {"lr": 0.02, "flip": True}],
    "standardised_logits": [
        {"temperature": t, "weight": 9.0, "label_weight": 0.1} for t in (1, 2, 4)
    ],
    "soft_targets": [{"temperature": t, "weight": 0.9, "label_weight": 0.1} for t in (2, 4, 8)],
    "label smoothing": [{"smoothing": s} for s in (0.05, 0.1, 0.2)],
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
        size: int = 64,
        augment: tuple[data.Augmentation, ...] = (),
        **options: Any,
    ) -> nn.Module:
        parts = [model, objective] if isinstance(objective, nn.Module) else [model]
        training.train(
            model,
            data.batches(examples, size, seed=seed, augment=augment, device=self.device),
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
        """The mean of the teachers' logits."""
        return distillation.cache_outputs(self.teachers, self.train.to(self.device), self._path())

    @cached_property
    def features(self) -> distillation.Cached:
        """Features have no mean: those of the first teacher."""
        train, names = self.train.to(self.device), list(LAYERS.values())
        return distillation.cache_outputs(
            self.teachers[0], train, self._path("-features"), names=names
        )

    def _path(self, kind: str = "") -> Path | None:
        return None if self.quick else self.folder / f"outputs{kind}-{len(self.train)}.safetensors"


LOGITS = {
    loss.__name__: loss
    for loss in (
        distillation.soft_targets,
        distillation.standardised_logits,
        distillation.logit_mse,
        distillation.decoupled,
        distillation.correlations,
    )
}
FEATURES = {
    loss.__name__: loss
    for loss in (distillation.attention_transfer, distillation.similarity_preserving)
}


def objective(lab: Laboratory, method: str, student: nn.Module, given: Settings) -> Any:
    """What the student minimises; the second value is what finds the teacher's outputs."""
    example = lab.train.inputs[:2].to(lab.device)
    if method in LOGITS:
        return distillation.from_logits(lab.cached, LOGITS[method], **given), lab.cached
    if method in FEATURES:
        loss = FEATURES[method]
        return distillation.from_features(lab.features, LAYERS, loss, **given), lab.features
    if method == "hints":
        return distillation.hints(lab.features, student, LAYERS, example, **given), lab.features
    if method == "contrast":
        return distillation.contrast(lab.features, student, LAYERS, example, **given), lab.features
    if method == "relations":  # 25 to 50, as in the paper
        both = ((distillation.relational_distance, 25.0), (distillation.relational_angle, 50.0))
        terms = [
            distillation.from_features(lab.features, LAYERS, loss, weight=given["weight"] * part)
            for loss, part in both
        ]
        return distillation.together(*terms), lab.features
    if method == "deep supervision":
        return distillation.deep_supervision(student, ["conv1", "conv2"], example, **given), None
    if method == "moving teacher":
        teacher = distillation.MovingTeacher(student, decay=0.99)
        return distillation.from_logits(teacher, **given), teacher
    smoothing = given.get("smoothing", 0.0)
    return training.supervised(partial(losses.cross_entropy, label_smoothing=smoothing)), None


def student(lab: Laboratory, method: str, given: Settings, epochs: int, seed: int = 0) -> nn.Module:
    """A StudentNet taught by ``method``."""
    given = dict(given)
    lr, flip = given.pop("lr"), given.pop("flip", False)
    fit = partial(lab.fit, epochs=epochs, lr=lr, seed=seed, augment=(Flip(),) if flip else ())
    torch.manual_seed(seed)
    if method == "mutual":
        pair = nn.ModuleList([networks.StudentNet(), networks.StudentNet()])
        return fit(pair, distillation.mutual(**given), lab.train)[0]  # type: ignore[index]
    if method == "born again":
        taught = partial(distillation.from_logits, **given)
        make: Callable[[], nn.Module] = networks.StudentNet
        return distillation.born_again(
            make, lambda net, goal: fit(net, goal, lab.train), generations=2, objective=taught
        )[-1]
    model = networks.StudentNet().to(lab.device)
    goal, source = objective(lab, method, model, given)
    if isinstance(source, distillation.Cached):
        return fit(model, goal, source.number(lab.train))
    after = {"after_step": source} if source is not None else {}
    return fit(model, goal, lab.train, **after)


def percent(model: nn.Module, examples: Examples) -> float:
    return round(100 * training.evaluate(model, examples), 2)


def told(scores: list[float]) -> dict[str, Any]:
    spread = torch.tensor(scores).std().item() if len(scores) > 1 else 0.0
    return {
        "test accuracy in %": scores,
        "mean": round(sum(scores) / len(scores), 2),
        "standard deviation": round(spread, 2),
    }


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
        """One number for each seed that has none yet."""
        rows = self.result.setdefault(part, {})
        found = rows.get(row, {"test accuracy in %": []})["test accuracy in %"]
        for seed in SEEDS[len(found) : 1 if self.quick else None]:
            found.append(measure(seed))
            rows[row] = {**notes, **told(found)}
            print(f"{part}: {row}, seed {seed}: {found[-1]}", flush=True)
            self.save()


def choose(lab: Laboratory, record: Record, method: str) -> None:
    """The method's candidates on the held-out sixth, best first."""
    chosen = record.result.setdefault("candidates", {})
    if method in chosen:
        return
    candidates = CANDIDATES[method]
    if method != "labels":  # the learning rate with which labels alone do best
        candidates = [{"lr": best(record, "labels")["lr"], **given} for given in candidates]
    if len(candidates) == 1:
        chosen[method] = [{"settings": candidates[0]}]
        return
    found = []
    for given in candidates:
        model = student(lab, method, given, TRIAL)
        found.append({"validation accuracy in %": percent(model, lab.held), "settings": given})
        print(method, found[-1], flush=True)
    chosen[method] = sorted(found, key=lambda row: -row["validation accuracy in %"])
    record.save()


def best(record: Record, method: str) -> Settings:
    return dict(record.result["candidates"][method][0]["settings"])


def final(lab: Laboratory, record: Record, part: str, method: str, epochs: int) -> None:
    given = best(record, method)

    def measure(seed: int) -> float:
        return percent(student(lab, method, given, epochs, seed), lab.test)

    row = method if epochs in {SHORT, LONG} else f"{method}, twice as long"
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
    }
    if "teacher" not in record.result:
        record.result["teacher"] = {
            "recipe": "two TeacherNets, 20 epochs, AdamW 0.01, flips, shifts by 1; logits averaged",
            "each, validation accuracy in %": [percent(one, lab.held) for one in lab.teachers],
            "each, test accuracy in %": [percent(one, lab.test) for one in lab.teachers],
        }
        record.save()
    for method in CANDIDATES:
        choose(lab, record, method)
        final(lab, record, "methods", method, SHORT)
        if method in TWICE:
            final(lab, record, "methods", method, 2 * SHORT)
    for method in PATIENT:
        final(lab, record, "patient", method, LONG)


if __name__ == "__main__":
    main()
