"""Every test that takes `device` runs once on each device of this machine."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny networks are many times faster so
os.environ.setdefault("MPLBACKEND", "agg")

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile(
    "default",
    deadline=None,
    derandomize=True,
    max_examples=40,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],  # no timing fails a test
)
hypothesis.settings.load_profile("default")


def devices() -> list[str]:
    found = ["cpu"]
    if torch.cuda.is_available():
        found.append("cuda")
    if torch.backends.mps.is_available():
        found.append("mps")
    return found


@pytest.fixture(params=devices())
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
