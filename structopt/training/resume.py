"""A run on disk: saved whole, and continued as if it had never stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from structopt import distributed, files
from structopt.training import plain, randomness
from structopt.training.run import Run

KIND = "structopt.training 1"
PARTS = {"settings", "place", "generators", "model", "others", "optimizer", "scaler", "average"}
PARTS |= {"helpers", "history"}


class Checkpoint:
    """The file of one run. Made, it continues what the file holds, or starts the file."""

    def __init__(self, path: str | Path, run: Run) -> None:
        self.path, self.run = Path(path).expanduser().resolve(), run
        if self.path.is_dir():
            raise ValueError(f"{path} is a folder: name a file in it, such as run.safetensors")
        self.settings = settings(run)
        found = distributed.gather(self.path.exists())
        if any(found) and not all(found):
            raise ValueError(f"only some processes see {self.path}: put it on a shared disk")
        if not distributed.rank():
            for left in self.path.parent.glob(f".{self.path.name}.*.tmp"):  # by a killed run
                left.unlink()
        if self.path.exists():
            self.load()
        else:
            self.save()  # also shows now, not after an epoch, that the folder can be written

    def save(self) -> None:
        run = self.run
        run.fetch()
        run.need_finite_weights()
        generators = [randomness.state(run.device, run.feed.generators), run.randomness]
        tree = {
            "settings": self.settings,
            "place": [run.epoch, run.batch],
            "generators": distributed.gather(generators),
            "model": run.model.state_dict(),
            "others": others(run),
            "optimizer": {
                "state": run.optimizer.state_dict()["state"],
                "groups": [plain_settings(group) for group in run.optimizer.param_groups],
            },
            "scaler": run.scaler.state_dict(),
            "average": run.average and run.average.state(),
            "helpers": [thing.state_dict() for thing in helpers(run)],
            "history": {
                "losses": torch.tensor(run.history.losses, dtype=torch.float64),
                "lrs": torch.tensor(run.history.lrs, dtype=torch.float64),
                "validation": run.history.validation,
                "ends": run.history.ends,
                "seconds": run.history.seconds,
            },
        }
        tensors: dict[str, Tensor] = {}
        outline = plain.flatten(tree, tensors)
        if not distributed.rank():
            files.save_tensors(self.path, tensors, {"kind": KIND, "outline": outline})

    def load(self) -> None:
        tensors, notes = files.load_tensors(self.path)
        if notes.get("kind") != KIND:
            raise ValueError(f"{self.path} is not a checkpoint that train() wrote ({KIND})")
        tree, run = plain.restore(notes.get("outline"), tensors), self.run
        if not isinstance(tree, dict) or PARTS - tree.keys():
            raise ValueError(f"{self.path} is not a training checkpoint: parts of it are missing")
        self.need_same(tree)
        run.model.load_state_dict(tree["model"])
        load_optimizer(run.optimizer, tree["optimizer"])
        with torch.no_grad():
            for name, parameter in others(run).items():
                parameter.copy_(tree["others"][name])
        run.scaler.load_state_dict(tree["scaler"])
        if run.average:
            run.average.restore(*tree["average"])
        for thing, state in zip(helpers(run), tree["helpers"], strict=True):
            thing.load_state_dict(state)
        (run.epoch, run.batch), history = tree["place"], tree["history"]
        for name in ("losses", "lrs"):
            history[name] = history[name].tolist()
        vars(run.history).update(history)
        now, begun = tree["generators"][distributed.rank()]
        randomness.restore(now, run.device, run.feed.generators)
        if begun is not None:
            run.randomness, run.resumed = begun, now

    def need_same(self, tree: dict[str, Any]) -> None:
        """Raise ``ValueError`` where the file belongs to another run."""
        theirs, ours = tree["settings"], self.settings
        differ = [
            f"{name}: {theirs.get(name)} there, {ours.get(name)} here"
            for name in [*ours, *(name for name in theirs if name not in ours)]
            if theirs.get(name) != ours.get(name)
        ]
        if tree["place"][0] > self.run.epochs:
            differ.append(f"epochs: {tree['place'][0]} done there, {self.run.epochs} asked here")
        there, here = shapes(tree["model"]), shapes(self.run.model.state_dict())
        differ += [
            f"{name}: {there.get(name, 'nothing')} there, {here.get(name, 'nothing')} here"
            for name in [*there, *(name for name in here if name not in there)]
            if there.get(name) != here.get(name)
        ]
        if differ:
            more = f" and {len(differ) - 5} more" if len(differ) > 5 else ""
            raise ValueError(
                f"the checkpoint {self.path} is of another run: {'; '.join(differ[:5])}{more}. Give"
                " the same settings to go on, or another path (or delete the file) to start"
            )


def shapes(state: dict[str, Any]) -> dict[str, str]:
    found = {k: v for k, v in state.items() if isinstance(v, Tensor)}
    return {k: f"{str(v.dtype).removeprefix('torch.')} {tuple(v.shape)}" for k, v in found.items()}


def settings(run: Run) -> dict[str, Any]:
    """What must be the same for a continued run to be the same run."""
    found = {
        "optimizer": type(run.optimizer).__name__,
        "objective parts": len(helpers(run)),
        "batches": run.feed.length,
        "accumulate": run.feed.accumulate,
        "autocast": str(run.dtype),
        "clip": run.clip,
        "average": run.average and run.average.decay,
        "processes": distributed.world_size(),
        "schedule": None if " at 0x" in repr(run.schedule) else repr(run.schedule),
    }
    for number, group in enumerate(run.optimizer.param_groups):
        for name, value in plain_settings(group).items():
            found[f"group {number} {name}"] = float(value) if name == "lr" else value
    return found


def plain_settings(group: dict[str, Any]) -> dict[str, Any]:
    """A parameter group's numbers and words; the number of its parameters for themselves."""
    kinds = (bool, int, float, str, tuple, type(None))
    found = {name: value for name, value in group.items() if isinstance(value, kinds)}
    return {"parameters": len(group["params"]), **found}


def others(run: Run) -> dict[str, Tensor]:
    """Parameters that the optimiser trains outside the model, by their place in it."""
    own = {id(p) for p in run.model.parameters()}
    return {str(i): p for i, p in enumerate(run.parameters) if id(p) not in own}


def helpers(run: Run) -> list[Any]:
    """Whatever else of this run has a state: an objective's own layers, masks held."""
    things = (run.objective, run.after_step, run.schedule)
    return [t for t in things if hasattr(t, "state_dict") and hasattr(t, "load_state_dict")]


def load_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """``optimizer.load_state_dict``, then each tensor with its saved type and fitting strides."""
    now = optimizer.state_dict()
    groups = [
        {**group, **{k: v for k, v in old.items() if k != "parameters"}}
        for group, old in zip(now["param_groups"], saved["groups"], strict=True)
    ]
    optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for number, state in saved["state"].items():
        parameter = parameters[number]
        for name, value in state.items():
            if isinstance(value, Tensor):
                # Where torch put it, which rounds all but the steps to the parameter's type.
                like = torch.empty_like(optimizer.state[parameter][name], dtype=value.dtype)
                if value.ndim and value.shape == parameter.shape:  # fused kernels read raw memory
                    like = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False)
                optimizer.state[parameter][name] = like.copy_(value)
