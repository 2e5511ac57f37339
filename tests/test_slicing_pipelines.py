"""Processes in a pipeline give the outputs and gradients of the unsplit network."""

import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_distributed import torchrun_script

from structopt import files

SCRIPT = Path(__file__).parent / "scripts" / "pipe_together.py"
sys.path.insert(0, str(SCRIPT.parent))
import pipe_together as script  # noqa: E402


def assert_equals_unsplit(folder: Path, name: str, label: str, device: str, tolerance: float):
    expected = script.alone(name, torch.device(device))
    paths = sorted(folder.glob(f"{name}-{label}-*"))
    parts = [files.load_tensors(path)[0] for path in paths]
    found = {key: value for part in parts for key, value in part.items()}
    assert len(found) == sum(map(len, parts))  # each process has weights of its own
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value.cpu(), rtol=tolerance, atol=tolerance, msg=key)


@pytest.fixture(scope="module", params=[2, 3])
def together(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    torchrun_script(SCRIPT, folder, "equal", processes=request.param, CUDA_VISIBLE_DEVICES="")
    assert len(list(folder.iterdir())) == request.param * len(script.CUTS) * len(script.SCHEDULES)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("label", script.SCHEDULES)
@pytest.mark.parametrize("name", script.CUTS)
def test_processes_give_the_gradients_of_the_unsplit_network(together, name, label):
    assert_equals_unsplit(together, name, label, "cpu", 1e-11)


@pytest.mark.slow
def test_steps_add_up_whatever_the_stages_are_like(tmp_path):
    """Several inputs, a value that lies transposed, frozen and empty stages, norms in training."""
    torchrun_script(SCRIPT, tmp_path, "adds", processes=2, CUDA_VISIBLE_DEVICES="")


@pytest.mark.slow
def test_a_batch_of_another_size_is_refused_without_a_loss_too(tmp_path):
    torchrun_script(SCRIPT, tmp_path, "shrinks", processes=2, CUDA_VISIBLE_DEVICES="")


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_give_the_gradients_of_the_unsplit_network(tmp_path):
    torchrun_script(SCRIPT, tmp_path, "equal")
    for name in script.CUTS:
        for label in script.SCHEDULES:
            assert_equals_unsplit(tmp_path, name, label, "cuda", 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize(
    ("how", "problem"),
    [("dies", "Connection (reset|closed) by peer"), ("stands", "Timed out waiting 10000ms")],
)
def test_a_peer_that_ends_in_mid_step_is_an_error_soon(tmp_path, how, problem, world):
    """In each other process, without torchrun, which would end them itself."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(world)}
    loopback = {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
    shared |= {**os.environ, **loopback, "CUDA_VISIBLE_DEVICES": ""}
    logs = [tmp_path / f"log-{rank}" for rank in range(world)]
    processes = []
    try:
        for rank, path in enumerate(logs):
            with path.open("w") as log:
                processes.append(
                    subprocess.Popen(
                        [sys.executable, str(SCRIPT), str(tmp_path), how],
                        env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                        stdout=subprocess.DEVNULL,
                        stderr=log,
                    )
                )
        while not (tmp_path / "warm").exists():  # the step before went well
            assert processes[0].poll() is None, logs[0].read_text()
            time.sleep(0.05)
        end = time.monotonic() + 30
        while len(list(tmp_path.glob("told-*"))) < world - 1:
            assert time.monotonic() < end
            time.sleep(0.05)
        for process in processes[:-1]:  # which wait for what is under way
            process.wait(timeout=60)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    told = [path.read_text() for path in logs[:-1]]
    assert all(process.returncode for process in processes[:-1])
    assert re.search(problem, told[-1]), told[-1]  # of the neighbour; the others hear of its end
    assert all("RuntimeError" in text for text in told), told
