"""A model is traced in training mode as well where its own Python may go another way in it."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from structopt.channels import channel_groups, tracing


class Named:
    """What goes by the name of torch's functions may be another's."""

    @staticmethod
    def dropout(x, p, training):
        return x.flip(1) if training else x


def drop(x, training):
    return F.dropout(x, 0.5, training)


class Network(nn.Module):
    def __init__(self, act=None):
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 2)
        self.norm = act

    def forward(self, x):
        return self.last(self.act(self.first(x)))


class Given(Network):
    def act(self, x):
        return F.dropout(x, 0.5, self.training)


class GivenByName(Network):
    def act(self, x):
        x = F.dropout(nn.functional.dropout(x, training=self.training), training=self.training)
        return torch.nn.functional.rrelu(x, 0.1, 0.2, self.training, inplace=False)


class Asked(Network):
    def act(self, x):
        return x + x.flip(1) if self.training else x


class AskedInside(Network):
    def act(self, x):
        return F.dropout(x, 0.5, self.training and x.ndim > 1)


class AskedBeside(Network):
    def act(self, x):
        return drop(F.dropout(x, 0.5, self.training), self.training)


class GivenToAnother(Network):
    def act(self, x):
        return Named.dropout(x, 0.5, self.training)


class GivenToALocalOne(Network):
    def act(self, x, F=Named):
        return F.dropout(x, 0.5, self.training)


def flipping(function):
    @functools.wraps(function)
    def wrapper(self, x):
        x = function(self, x)
        return x + x.flip(1) if self.training else x

    return wrapper


class Wrapped(Network):
    @flipping
    def act(self, x):
        return F.dropout(x, 0.5, self.training)


class Unread(Network):
    """There is no source to read: it was never in a file."""

    exec("def act(self, x):\n    return F.dropout(x, 0.5, self.training)")


class Misread(Network):
    """What stands there now is not what was read when it was made."""

    exec(compile("def act(self, x):\n    return drop(x, self.training)", __file__, "exec"))


class Normed(Network):
    def act(self, x):
        return self.norm(x)


class Norm(nn.BatchNorm1d):
    def forward(self, x):
        if self.training:
            self.num_batches_tracked.add_(1)
        return F.batch_norm(x, self.running_mean, self.running_var, training=self.training)


@pytest.fixture
def modes(monkeypatch):
    """The modes in which a model is labelled; its groups are those of a run in both, a law."""

    def find(model, example):
        found, plain = [], tracing._run
        with monkeypatch.context() as patch:
            patch.setattr(
                tracing, "_run", lambda b, m, e: (found.append(m.training), plain(b, m, e))[1]
            )
            groups = channel_groups(model, example)
            patch.setattr(tracing, "ask_for_mode", lambda _: True)
            both = channel_groups(model, example)
        assert [(g.name, g.size) for g in groups] == [(g.name, g.size) for g in both]
        return found[:-2]

    return find


@pytest.mark.parametrize("kind", [Given, GivenByName, lambda: Normed(Norm(8, affine=False))])
def test_a_mode_that_torch_alone_is_told_needs_no_second_run(kind, modes):
    assert modes(kind(), torch.randn(2, 4)) == [False]


ASKING = [
    Asked,
    AskedInside,
    AskedBeside,
    GivenToAnother,
    GivenToALocalOne,
    Wrapped,
    Unread,
    Misread,
]


@pytest.mark.parametrize("kind", ASKING)
def test_a_mode_that_may_choose_a_branch_is_tried(kind, modes):
    assert modes(kind(), torch.randn(2, 4)) == [False, True]


@pytest.mark.parametrize("kind", [Asked, GivenToAnother, GivenToALocalOne, Wrapped])
def test_channels_that_meet_in_training_are_tied(kind):
    assert [g.size for g in channel_groups(kind(), torch.randn(2, 4))] == [4]
