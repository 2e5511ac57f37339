"""Teachers that the student itself becomes: its running mean, and its former generations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

from torch import Tensor, nn

from structopt.distillation.builders import from_logits
from structopt.distillation.teachers import Lesson, Teacher
from structopt.losses.checks import real, whole
from structopt.training import Objective, supervised
from structopt.training.averaging import follow_
from structopt.training.copying import copied


class MovingTeacher:
    """The exponential moving average of a student, as its teacher: θ̄ ← d·θ̄ + (1 - d)·θ.

    It is a teacher and an ``after_step`` at once::

        teacher = MovingTeacher(student, decay=0.99)
        train(student, batches, from_logits(teacher), optimizer, after_step=teacher, ...)

    Tarvainen and Valpola, 2017, "Mean teachers are better role models". d = min(decay,
    (1 + t)/(10 + t)) at step t; buffers of real or complex numbers are averaged alike, and 16 bits
    in a float32 copy. ``model`` is the average itself, often the better network. A checkpoint of
    the run keeps it.

    Raises ``ValueError`` for a decay outside 0 <= d < 1.

    >>> student = nn.Linear(2, 3)
    >>> teacher = MovingTeacher(student, decay=0.9)
    >>> teacher(student, 1)
    >>> teacher.model.weight.equal(student.weight)
    True
    """

    def __init__(self, student: nn.Module, decay: float = 0.99) -> None:
        if not 0 <= real(decay) < 1:
            raise ValueError(f"decay is that of the running mean, 0 <= d < 1, not {decay!r}")
        if not isinstance(student, nn.Module):
            raise ValueError(f"a moving teacher follows a student, not {type(student).__name__}")
        self.model, self.decay, self.steps = copied(student), decay, 0
        self.model.requires_grad_(False)
        self.halves: dict[int, Tensor] = {}  # float32 copies, by their place among the numbers
        self.asked = Teacher(self.model)
        self.models = self.asked.models

    def teach(self, inputs: Any, targets: Any, names: Sequence[str] = ()) -> Lesson:
        """The lesson of the average, on the device of ``inputs``."""
        if isinstance(inputs, Tensor):
            self.model.to(inputs.device)
        return self.asked.teach(inputs, targets, names)

    def __call__(self, student: nn.Module, step: int) -> None:
        """Take in the student's weights; ``train`` calls it after each step."""
        for parameter in islice(student.parameters(), 1):
            self.model.to(parameter.device)
        follow_(self.model, student, self.halves, self.decay, self.steps)
        self.steps += 1

    def state_dict(self) -> dict[str, Any]:
        """The average and its number of steps."""
        return {"model": self.model.state_dict(), "steps": self.steps, "halves": self.halves}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a :meth:`state_dict`."""
        self.model.load_state_dict(state["model"])
        self.steps = state["steps"]
        self.halves = {place: a.clone() for place, a in state["halves"].items()}


def born_again(
    make: Callable[[], nn.Module],
    fit: Callable[[nn.Module, Objective], Any],
    *,
    generations: int = 3,
    objective: Callable[[nn.Module], Objective] = from_logits,
) -> list[nn.Module]:
    """Networks of one kind, the first taught by the labels, each next by the one before it.

    Furlanello et al., 2018, "Born again neural networks". The last ones, averaged, make their
    ensemble: ``Teacher(*networks)``.

    Args:
        make: a new network, each time with other weights.
        fit: ``fit(network, objective)`` trains it in place, each time for as long.
        generations: how many networks, the first included.
        objective: from a teacher to an objective.

    Raises:
        ValueError: fewer than 1 generation, a network that comes again.

    Example:
        >>> taught = []
        >>> networks = born_again(
        ...     lambda: nn.Linear(2, 3), lambda net, objective: taught.append(objective),
        ...     generations=2)
        >>> taught[1].teacher.models[0] is networks[0]
        True
    """
    if not whole(generations) >= 1:
        raise ValueError(f"generations counts the networks, at least 1: {generations!r}")
    found: list[nn.Module] = []
    for _ in range(generations):
        network = make()
        if any(network is other for other in found):
            raise ValueError("make gave the same network again: it has to make a new one each time")
        fit(network, objective(found[-1]) if found else supervised())
        found.append(network)
    return found
