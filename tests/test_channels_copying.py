"""Copies of a model that have other tensors are copies in all else."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from structopt.channels.copying import substitute


class Dropping(nn.Module):
    """Leaves what it remembers out of its copies, as large caches are."""

    def __init__(self) -> None:
        super().__init__()
        self.cache, self.seen = {"much": 1}, [1]

    def __getstate__(self) -> dict[str, Any]:
        kept = vars(self).copy()
        kept["cache"], kept["seen"] = {}, []
        return kept


class Telling:
    """Writes to its owner while it is copied."""

    def __init__(self, owner: nn.Module) -> None:
        self.owner = owner

    def __deepcopy__(self, memo: dict[int, Any]) -> Telling:
        made = memo[id(self)] = Telling(memo[id(self.owner)])
        made.owner.told = True
        return made


def test_what_is_made_for_a_copy_belongs_to_one_module_alone():
    made = substitute(nn.Sequential(*(Dropping() for _ in range(30))), torch.clone)
    assert all(module.cache == {} and module.seen == [] for module in made)
    assert len({id(part) for module in made for part in (module.cache, module.seen)}) == 60


def test_an_attribute_may_write_to_the_copy_of_its_owner():
    model = nn.Linear(2, 2)
    model.friend = Telling(model)
    made = substitute(model, torch.clone)
    assert made.told
    assert made.friend.owner is made
    assert not hasattr(model, "told")
