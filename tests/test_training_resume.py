"""An interrupted run continues to the same bits; a checkpoint is never half, wrong or spoiled."""

import errno
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from structopt import data, descent, files
from structopt.training import plain, supervised, train

SCRIPTS = Path(__file__).parent / "scripts"
sys.path.insert(0, str(SCRIPTS))
import train_and_print as script  # noqa: E402


class Killed(Exception):
    """What a kill looks like from inside: nothing of ours may run after it."""


def at(step, action):
    return lambda now: action() if now == step else None


def kill():
    raise Killed


def ctrl_c():
    signal.raise_signal(signal.SIGINT)


COMBINATIONS = [
    {"optimizer": "adam"},
    {"optimizer": "sgd", "parts": "hint"},
    {"optimizer": "fused", "parts": "accumulate"},
    {"optimizer": "descent", "batches": "loader"},
    {"optimizer": "adam", "batches": "generator", "parts": "accumulate hint"},
    {"optimizer": "sgd", "batches": "sampler"},
    {"optimizer": "adam", "parts": "half"},
    {"optimizer": "sgd", "parts": "outside"},
    {"optimizer": "nadam", "parts": "double"},
]


@pytest.mark.parametrize("settings", COMBINATIONS, ids=lambda s: "-".join(s.values()))
def test_an_interrupted_run_ends_in_the_same_bits(tmp_path, settings, device):
    """5 steps an epoch (3 when accumulated); stopped in the first, second and third epoch."""
    settings = {**settings, "device": device}
    history, wanted = script.run(**settings)
    path = tmp_path / "run.safetensors"
    for step, action in [(2, kill), (4, ctrl_c), (6, kill), (7, ctrl_c), (8, kill), (9, ctrl_c)]:
        seed = step if path.exists() else 0  # a resumed run must not depend on the script's seed
        with pytest.raises((Killed, KeyboardInterrupt)):
            script.run(seed, checkpoint=path, stop=at(step, action), **settings)
    again, found = script.run(99, checkpoint=path, **settings)
    assert script.digest(found) == script.digest(wanted)
    assert again.losses == history.losses
    assert again.lrs == history.lrs
    assert again.validation == history.validation
    assert again.ends == history.ends


def test_a_run_that_is_done_is_not_done_again(tmp_path):
    path = tmp_path / "run.safetensors"
    history, wanted = script.run(checkpoint=path)
    again, found = script.run(5, checkpoint=path, stop=lambda step: kill())
    assert script.digest(found) == script.digest(wanted)
    assert again.losses == history.losses
    assert again.seconds == history.seconds


def test_more_epochs_may_be_asked_for(tmp_path):
    path = tmp_path / "run.safetensors"
    _, wanted = script.run(schedule=None, epochs=4)
    script.run(schedule=None, epochs=1, checkpoint=path)
    _, found = script.run(schedule=None, epochs=4, checkpoint=path)
    assert script.digest(found) == script.digest(wanted)
    with pytest.raises(ValueError, match="epochs: 4 done there, 2 asked here"):
        script.run(schedule=None, epochs=2, checkpoint=path)


@pytest.mark.parametrize("value", [0.5, {"top": 0.5}], ids=["number", "names"])
def test_a_run_that_is_validated_later_says_in_which_epochs(tmp_path, value):
    settings = {"checkpoint": tmp_path / "run.safetensors", "schedule": None, "batches": "loader"}
    script.run(**settings, epochs=2, validate=None)
    history, _ = script.run(**settings, epochs=3, validate=lambda model: value)
    column = [line.split()[3] for line in str(history).splitlines()]
    assert column[1:] == ["nan", "nan", "0.5"]


def started(*arguments):
    command = [sys.executable, SCRIPTS / "train_and_print.py", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finished(*arguments):
    process = started(*arguments)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert err == ""  # not a terminal: no progress bar
    return out.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("batches", "number"),
    [("batches", signal.SIGKILL), ("workers", signal.SIGINT)],
)
def test_a_killed_process_continues_in_a_fresh_one(tmp_path, batches, number):
    path = tmp_path / "run.safetensors"
    wanted = finished("--batches", batches)
    process = started("--batches", batches, "--checkpoint", path)
    for line in process.stdout:
        if line.startswith("step 8"):
            process.send_signal(number)
            break
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert finished("--batches", batches, "--checkpoint", path) == wanted


# What belongs to another run


def fresh(path, *, width=4, lr=0.1, kind=torch.optim.SGD, count=40, size=8, **settings):
    torch.manual_seed(0)
    layers = [nn.Flatten(), nn.Linear(36, width), nn.ReLU(), nn.Linear(width, 2)]
    model = nn.Sequential(*layers)
    batches = data.batches(script.examples(count), size)
    settings = {"epochs": 2, "autocast": None, **settings}
    optimizer = kind(model.parameters(), lr=lr)
    return train(model, batches, supervised(), optimizer, checkpoint=path, **settings)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"width": 5}, r"1\.weight: float32 \(4, 36\) there, float32 \(5, 36\) here"),
        ({"kind": torch.optim.Adam}, "optimizer: SGD there, Adam here"),
        ({"lr": 0.2}, r"group 0 lr: 0\.1 there, 0\.2 here"),
        ({"count": 80}, "batches: 5 there, 10 here"),
        ({"accumulate": 5}, "accumulate: 1 there, 5 here"),
        ({"clip": 1.0}, r"clip: None there, 1\.0 here"),
        ({"average": 0.5}, r"average: None there, 0\.5 here"),
        ({"schedule": descent.cosine()}, r"schedule: None there, cosine\(final=0\.0\) here"),
        ({"autocast": torch.bfloat16}, r"autocast: None there, torch\.bfloat16 here"),
        ({"epochs": 1}, "epochs: 2 done there, 1 asked here"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_checkpoint_of_another_run_is_refused(tmp_path, changed, words):
    path = tmp_path / "run.safetensors"
    fresh(path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=rf"is of another run: .*{words}.*another path"):
        fresh(path, **changed)
    assert path.read_bytes() == before


def test_a_refused_checkpoint_leaves_the_model_as_it_was(tmp_path):
    path = tmp_path / "run.safetensors"
    fresh(path)
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 4), nn.ReLU(), nn.Linear(4, 3))
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match="another run"):
        train(model, data.batches(script.examples(), 8), supervised(),
              torch.optim.SGD(model.parameters(), lr=0.1), epochs=2, checkpoint=path)  # fmt: skip
    for a, b in zip(before, model.parameters(), strict=True):
        assert torch.equal(a, b.cpu())  # the training that was refused had moved it


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "truncated, corrupt"),
        (b"\x80\x04nonsense" * 9, "truncated, corrupt"),
        ({"kind": "other"}, "not a checkpoint that train"),
        ({"kind": "structopt.training 1"}, "not a training checkpoint"),
        ({"kind": "structopt.training 1", "outline": {"dict": [1]}}, "not a training checkpoint"),
        ({"kind": "structopt.training 1", "outline": {"dict": []}}, "not a training checkpoint"),
        ({"kind": "structopt.training 1", "outline": {"tensor": 3}}, "not a training checkpoint"),
    ],
)
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path, content, words):
    path = tmp_path / "run.safetensors"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        files.save_tensors(path, {}, content)
    with pytest.raises(ValueError, match=words):
        fresh(path)


def test_a_folder_is_no_checkpoint(tmp_path):
    with pytest.raises(ValueError, match="is a folder"):
        fresh(tmp_path)


# What must not spoil the last good checkpoint


def test_nan_never_overwrites_a_checkpoint(tmp_path):
    path, before = tmp_path / "run.safetensors", []

    def spoil(model, step):
        if step == 9:
            before.append(path.read_bytes())
            with torch.no_grad():
                model[1].weight.fill_(math.nan)

    with pytest.raises((FloatingPointError, ValueError)):
        fresh(path, after_step=spoil)
    assert path.read_bytes() == before[0]

    def spoil_and_stop(model, step):
        spoil(model, step)
        if step == 9:
            ctrl_c()

    with pytest.raises(FloatingPointError):
        fresh(path, after_step=spoil_and_stop)
    assert path.read_bytes() == before[0]
    assert len(fresh(path).losses) == 10


def test_a_full_disk_keeps_the_last_good_checkpoint(tmp_path, monkeypatch):
    path, real = tmp_path / "run.safetensors", os.fsync
    wanted = fresh(tmp_path / "other.safetensors")
    calls = []

    def full(handle):
        calls.append(1)
        if len(calls) > 3:  # the first save asks twice, for file and folder; the second once
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device.*run\.safetensors"):
        fresh(path, epochs=4)
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir() if "run" in p.name] == ["run.safetensors"]
    assert fresh(path).losses == wanted.losses


def test_a_folder_that_cannot_be_written_is_noticed_before_the_first_step(tmp_path, monkeypatch):
    def read_only(*arguments, **keywords):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "open", read_only)  # the tests may run as root, who may write
    steps = []
    with pytest.raises(OSError, match="Read-only file system"):
        fresh(tmp_path / "run.safetensors", after_step=lambda model, step: steps.append(step))
    assert not steps


def test_what_a_killed_run_left_is_cleared(tmp_path):
    path = tmp_path / "run.safetensors"
    left = tmp_path / ".run.safetensors.0123abcd.tmp"
    left.write_bytes(b"half")
    fresh(path)
    assert list(tmp_path.iterdir()) == [path]


def test_state_that_is_not_plain_is_refused(tmp_path):
    class Holder:
        def __call__(self, model, step):
            pass

        def state_dict(self):
            return {"masks": {"a": object()}}

        def load_state_dict(self, state):
            pass

    with pytest.raises(ValueError, match=r"cannot hold /helpers/0/masks/a, a object"):
        fresh(tmp_path / "run.safetensors", after_step=Holder())


leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4)
leaves |= st.integers(0, 3).map(lambda n: torch.arange(n))
trees = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=3) | st.integers(), inner, max_size=3)
    ),
    max_leaves=12,
)


def equal(a, b):
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b or (a != a and b != b)


@given(trees)
def test_any_plain_state_comes_back(tmp_path_factory, tree):
    path = tmp_path_factory.mktemp("plain") / "x"
    tensors = {}
    outline = plain.flatten(tree, tensors)
    files.save_tensors(path, tensors, {"outline": outline})
    tensors, notes = files.load_tensors(path)
    assert equal(plain.restore(notes["outline"], tensors), tree)
