"""What distillation's benchmarks share: the images, the teachers and their word, the record."""

import contextlib
import io
import tempfile
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from common import arguments, keep, kept, machine, mean_and_spread
from torch import nn

from structopt import data, descent, distillation, files, networks, training
from structopt.data import Examples, Flip, Shift

SEEDS = (0, 1, 2)
LAYERS = {"conv3": "residual3"}


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

    def teacher(
        self, name: str, make: Callable[[], nn.Module], *, lr: float, seed: int, epochs: int = 20
    ) -> nn.Module:
        """Trained with flips and shifts, or what ``folder`` keeps of that."""
        torch.manual_seed(seed)
        model = make()
        path = self.folder / f"{name}.safetensors"
        if path.exists() and not self.quick:
            model.load_state_dict(files.load_tensors(path)[0])
        else:
            augment = (Flip(), Shift(1))
            self.fit(model, training.supervised(), self.train, epochs=epochs, lr=lr, seed=seed,
                     augment=augment)  # fmt: skip
            if not self.quick:
                files.save_tensors(path, model.state_dict(), {})
        return model.to(self.device).requires_grad_(False)

    @cached_property
    def teachers(self) -> list[nn.Module]:
        make = networks.TeacherNet
        return [self.teacher(f"teacher-{n}", make, lr=0.01, seed=n) for n in SEEDS[:2]]

    @cached_property
    def cached(self) -> distillation.Cached:
        """The mean of the teachers' logits; the features, which have no mean, of the first."""
        train = self.train.to(self.device)
        one = distillation.cache_outputs(self.teachers[0], train, names=LAYERS.values())
        both = distillation.cache_outputs(self.teachers, train)
        return distillation.Cached(both.logits, one.features, fingerprint=both.fingerprint)


def percent(model: nn.Module, examples: Examples) -> float:
    return round(100 * training.evaluate(model, examples), 2)


class Record:
    """The result, written after each addition."""

    def __init__(self, device: torch.device, quick: bool, name: str = "distillation") -> None:
        self.quick, self.name = quick, name
        self.result: dict[str, Any] = {} if quick else kept(name, device)
        self.result |= {"benchmark": name, "machine": machine(device)}

    def save(self) -> None:
        with contextlib.redirect_stdout(io.StringIO()):  # not the whole of it each time
            keep(self.name, self.result, self.quick)

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


def scored(lab: Laboratory, taught: Callable[[int], nn.Module], seed: int) -> float:
    """The test accuracy of what ``taught`` makes of this seed."""
    return percent(taught(seed), lab.test)


def laboratory(text: str | None) -> tuple[Laboratory, Record]:
    """From the command line; figures of a quick run are only printed."""
    parser = arguments(text)
    folder = Path(tempfile.gettempdir()) / "structopt-distillation"
    parser.add_argument("--folder", type=Path, default=folder, help="where teachers are kept")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    device = torch.device(options.device)
    return Laboratory(options.folder, device, options.quick), Record(device, options.quick)
