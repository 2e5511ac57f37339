"""Sources of lessons as people write them, and what they and their networks look like after."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from structopt import distillation as d
from structopt import losses


class Mixture(nn.Module):
    """A source that is a module: its networks are weighed, and called by nobody but itself."""

    def __init__(self) -> None:
        super().__init__()
        self.networks = nn.ModuleList([nn.Linear(4, 3), nn.Linear(4, 3)])
        self.shares = nn.Parameter(torch.tensor([0.25, 0.75]))

    def teach(self, inputs: Tensor, targets: Any, names: Sequence[str] = ()) -> d.Lesson:
        said = sum(w * net(inputs) for w, net in zip(self.shares, self.networks, strict=True))
        return d.Lesson(said, dict.fromkeys(names, said), targets)


class Named(nn.Linear):
    """A network that has a method of this name for a purpose of its own."""

    def teach(self, pupil: str) -> str:
        return f"{pupil} was taught"


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(6, 4), torch.arange(6) % 3


def test_a_source_that_is_a_module_is_asked_and_not_called() -> None:
    source, student, (x, y) = Mixture(), nn.Sequential(nn.Linear(4, 3)), batch()
    said = source.teach(x, y).logits
    goals = {
        d.soft_targets: d.from_logits(source, weight=0.5),
        d.hint: d.from_features(source, {"0": "any"}, d.hint, weight=0.5),
    }
    for loss, goal in goals.items():
        want = losses.cross_entropy(student(x), y) + 0.5 * loss(student(x), said.detach())
        got = goal(student, (x, y))
        torch.testing.assert_close(got, want)
        got.backward()
        assert all(p.grad is None for p in source.parameters()), "a lesson has no gradient"
        assert not list(goal.parameters()), "no part of the objective: neither trained nor saved"
        assert not goal.state_dict()
        assert goal.teacher is source
        other = copy.deepcopy(goal)
        assert other.teacher is not source
        torch.testing.assert_close(other(student, (x, y)), want)
    pair = d.together(*goals.values())
    torch.testing.assert_close(
        pair(student, (x, y)),
        losses.cross_entropy(student(x), y)
        + 0.5 * (d.soft_targets(student(x), said) + d.hint(student(x), said)),
    )


def test_a_network_with_a_method_of_that_name_is_a_network() -> None:
    teacher, student, (x, y) = Named(4, 3), nn.Linear(4, 3), batch()
    want = losses.cross_entropy(student(x), y) + d.soft_targets(student(x), teacher(x))
    torch.testing.assert_close(d.from_logits(teacher)(student, (x, y)), want)


def test_what_is_no_network_is_not_taken_for_one() -> None:
    with pytest.raises(ValueError, match="several teachers are networks, and Mixture is a source"):
        d.from_logits([nn.Linear(4, 3), Mixture()])
    with pytest.raises(ValueError, match=r"one nn.Module, not Mixture: name the network itself"):
        d.diagnose(Mixture(), [batch()], [batch()])
    with pytest.raises(ValueError, match="a teacher is a module, several, or cached outputs"):
        d.from_logits(d.Cached)  # the class
