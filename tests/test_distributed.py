"""Several processes train to the weights of one process with the whole batch."""

import os
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler

from structopt import data, distributed, files
from structopt.training.feeding import Feed

SCRIPT = Path(__file__).parent / "scripts" / "train_together.py"
sys.path.insert(0, str(SCRIPT.parent))
import train_together as script  # noqa: E402

Pair = namedtuple("Pair", ["inputs", "targets"])


def torchrun_script(
    script: Path, *arguments: object, processes: int = 2, **environment: str
) -> None:
    count = f"--nproc_per_node={processes}"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", count]
    loopback = {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
    process = subprocess.Popen(
        [*command, str(script), *map(str, arguments)],
        env={**os.environ, **loopback, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=180)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, 9)
    assert process.returncode == 0, output


def torchrun(folder: Path, **environment: str) -> None:
    torchrun_script(SCRIPT, folder, **environment)


@pytest.fixture(scope="module")
def together(tmp_path_factory) -> Path:
    """The folder into which two processes on CPUs, over gloo, have written their weights."""
    folder = tmp_path_factory.mktemp("together")
    torchrun(folder, CUDA_VISIBLE_DEVICES="")
    return folder


def assert_equals_one_process(folder: Path, name: str, device: str, tolerance: float) -> None:
    state, history = getattr(script, name)(torch.device(device))
    ranks = [files.load_tensors(folder / f"{name}-{rank}")[0] for rank in (0, 1)]
    for found in ranks:
        losses = found.pop("losses").tolist()
        torch.testing.assert_close(losses, history.losses, rtol=tolerance, atol=tolerance)
        assert found.keys() == state.keys()
        for key, value in state.items():
            want, got = value.cpu(), found[key]
            torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance, msg=key)
            assert torch.equal(got, ranks[0][key])


@pytest.mark.slow
@pytest.mark.parametrize("name", [scenario.__name__ for scenario in script.SCENARIOS])
def test_two_processes_give_the_weights_of_one(together, name):
    tolerance = 1e-5 if name == "float32" else 1e-10
    assert_equals_one_process(together, name, "cpu", tolerance)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_give_the_weights_of_one(tmp_path):
    torchrun(tmp_path)
    for scenario in script.SCENARIOS:
        assert_equals_one_process(tmp_path, scenario.__name__, "cuda", 1e-5)


# One process


def test_alone_nothing_changes(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    layer, batches = nn.Linear(1, 1), [torch.arange(3)]
    with distributed.join():
        assert (distributed.world_size(), distributed.rank()) == (1, 0)
        assert distributed.wrap(layer) is layer
        assert distributed.shard(batches) is batches
        assert distributed.gather("x") == ["x"]
        assert torch.equal(distributed.mean(torch.ones(2)), torch.ones(2))


def test_a_batch_sampler_over_a_distributed_one_deals_out_too():
    """Each process would else take a slice of its share, and the rest be seen by none."""
    order = DistributedSampler(range(8), num_replicas=2, rank=0)
    assert distributed.is_dealt_out(DataLoader(range(8), sampler=order))
    assert distributed.is_dealt_out(
        DataLoader(range(8), batch_sampler=BatchSampler(order, 2, False))
    )
    assert not distributed.is_dealt_out(DataLoader(range(8), shuffle=True))
    Feed(DataLoader(range(8), batch_sampler=BatchSampler(order, 2, False)), 1).epoch(5, 0)
    assert order.epoch == 5


@given(total=st.integers(1, 40), world=st.integers(1, 9))
def test_slices_make_up_the_batch(total, world):
    inputs, targets = torch.arange(total * 2.0).reshape(total, 2), torch.arange(total)
    batch = {"pair": Pair(inputs, targets), "list": [targets], "scale": torch.tensor(2.0), "n": "x"}
    pieces, owns = [], []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "world_size", lambda: world)
        for rank in range(world):
            patch.setattr(distributed, "rank", lambda rank=rank: rank)
            piece, own = distributed.cut(batch)
            assert isinstance(piece["pair"], Pair)
            assert piece["scale"] == 2
            assert piece["n"] == "x"
            assert distributed.rows(piece["pair"]) == distributed.rows(piece["list"]) == max(own, 1)
            pieces.append(piece["pair"].inputs[:own])
            owns.append(own)
    assert torch.equal(torch.cat(pieces), inputs)
    assert max(owns) - min(owns) <= 1


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("kind", [list, distributed.Shard])
def test_each_example_of_a_step_counts_in_one_process(monkeypatch, kind, accumulate):
    """The weights are those of a mean over the processes."""
    batches = [torch.arange(5), torch.arange(5, 9)][:accumulate]
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    found, total = [], 0.0
    for rank in range(3):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        feed = Feed(kind(batches), accumulate)
        for piece, weight in feed.group(list(feed.epoch(0, 0))):
            found += piece.tolist()
            total += weight / 3
    assert sorted(found) == torch.cat(batches).tolist()
    assert total == pytest.approx(1)


def test_what_is_dealt_out_or_numbered_needs_no_common_draw(monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    examples = data.Examples(torch.zeros(8, 1), torch.zeros(8).long())
    dealt = DataLoader(range(8), 4, sampler=DistributedSampler(range(8), num_replicas=2, rank=0))
    kinds = dealt, data.batches(examples, 4), DataLoader(range(8), 4, shuffle=True)
    assert [Feed(kind, 1).draws_globally for kind in kinds] == [False, False, True]
    batch = torch.arange(4)
    assert Feed(dealt, 1).group([batch]) == [(batch, 1.0)]


@pytest.mark.parametrize(
    ("batch", "count"),
    [
        (torch.zeros(4, 2), 4),
        (torch.tensor(1.0), 1),
        ([{"x": (torch.zeros(3),)}], 3),
        ({"name": "x"}, 1),
        (7, 1),
    ],
)
def test_rows_are_those_of_the_first_tensor(batch, count):
    assert distributed.rows(batch) == count


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "99")
    monkeypatch.setenv("LOCAL_RANK", "98")
    with pytest.raises(RuntimeError, match="process 98 has no GPU"), distributed.join():
        pass
