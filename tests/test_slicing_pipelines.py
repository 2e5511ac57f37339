"""Two processes in a pipeline give the outputs and gradients of the unsplit network."""

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
    parts = [files.load_tensors(folder / f"{name}-{label}-{rank}")[0] for rank in (0, 1)]
    assert not parts[0].keys() & parts[1].keys()
    found = parts[0] | parts[1]
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value.cpu(), rtol=tolerance, atol=tolerance, msg=key)


@pytest.fixture(scope="module")
def together(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    torchrun_script(SCRIPT, folder, "equal", CUDA_VISIBLE_DEVICES="")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("label", script.SCHEDULES)
@pytest.mark.parametrize("name", script.CUTS)
def test_two_processes_give_the_gradients_of_the_unsplit_network(together, name, label):
    assert_equals_unsplit(together, name, label, "cpu", 1e-11)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_give_the_gradients_of_the_unsplit_network(tmp_path):
    torchrun_script(SCRIPT, tmp_path, "equal")
    for name in script.CUTS:
        for label in script.SCHEDULES:
            assert_equals_unsplit(tmp_path, name, label, "cuda", 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "problem"),
    [("dies", "Connection (reset|closed) by peer"), ("stands", "Timed out waiting 10000ms")],
)
def test_a_peer_that_ends_in_mid_step_is_an_error_soon(tmp_path, how, problem):
    """Without torchrun, which would end the other process itself."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    loopback = {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
    shared |= {**os.environ, **loopback, "CUDA_VISIBLE_DEVICES": ""}
    with (tmp_path / "log").open("w+") as log:
        first, last = (
            subprocess.Popen(
                [sys.executable, str(SCRIPT), str(tmp_path), how],
                env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.DEVNULL,
                stderr=log if rank == 0 else subprocess.DEVNULL,
            )
            for rank in (0, 1)
        )
        try:
            while not (tmp_path / "warm").exists():  # the step before went well
                assert first.poll() is None, (tmp_path / "log").read_text()
                time.sleep(0.05)
            first.wait(timeout=30)
        finally:
            for process in (first, last):
                process.kill()
                process.wait()
    output = (tmp_path / "log").read_text()
    assert first.returncode != 0
    assert re.search(problem, output), output
