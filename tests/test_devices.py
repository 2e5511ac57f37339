"""Devices: the choice among them, their number formats, repeatable numbers, clocks that wait."""

import random

import numpy as np
import pytest
import torch

from structopt import devices


def test_best_device_prefers_cuda_then_mps_then_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    for cuda, mps, best in (
        (True, True, "cuda:1"),
        (True, False, "cuda:1"),
        (False, True, "mps"),
        (False, False, "cpu"),
    ):
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda mps=mps: mps)
        assert devices.best_device() == torch.device(best)


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [
        ((9, 0), torch.bfloat16),
        ((8, 0), torch.bfloat16),
        ((7, 5), torch.float16),
        ((7, 0), torch.float16),
        ((6, 1), None),
    ],
)
def test_autocast_type_follows_the_gpu(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], dtype: torch.dtype | None
) -> None:
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert devices.autocast_dtype("cuda") is dtype
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert devices.autocast_dtype("cuda") is torch.bfloat16


@pytest.mark.parametrize(
    ("amx", "avx512_bf16", "name", "fast"),
    [
        (True, True, "Intel(R) Xeon(R) Platinum 8480+", True),
        (False, True, "Intel(R) Xeon(R) Processor", False),  # half the speed of fp32
        (False, True, "AMD EPYC 9B14", True),
        (False, True, "AMD64 Family 25 Model 97 Stepping 2, AuthenticAMD", True),
        (False, False, "AMD EPYC 7763 64-Core Processor", False),
    ],
)
def test_autocast_type_follows_the_cpu(
    monkeypatch: pytest.MonkeyPatch, amx: bool, avx512_bf16: bool, name: str, fast: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16, raising=False)
    monkeypatch.setattr(devices, "_processor_name", lambda: name)
    assert devices.autocast_dtype("cpu") is (torch.bfloat16 if fast else None)


def test_autocast_type_where_torch_cannot_be_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported", raising=False)
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported", raising=False)
    assert devices.autocast_dtype("cpu") is None


def test_autocast_type_of_other_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "_cpu_multiplies_bf16", lambda: True)
    assert devices.autocast_dtype("mps") is torch.float16
    assert devices.autocast_dtype("meta") is None


def test_autocast_type_multiplies(device: torch.device) -> None:
    dtype = devices.autocast_dtype(device)
    x = torch.randn(4, 4, device=device)
    with torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        assert (x @ x).dtype is (dtype or torch.float32)


def test_the_same_seed_gives_the_same_numbers(device: torch.device) -> None:
    def draw() -> tuple[float, float, list[float]]:
        return random.random(), np.random.rand(), torch.rand(3, device=device).tolist()  # noqa: NPY002

    devices.seed_everything(7)
    first = draw()
    devices.seed_everything(8)
    other = draw()
    devices.seed_everything(np.int64(7))  # type: ignore[arg-type]
    assert draw() == first
    assert all(a != b for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("seed", [-1, 2**32, 1.5, "0", True])
def test_a_seed_out_of_range_is_named(seed: object) -> None:
    with pytest.raises(ValueError, match=r"seed=.*from 0 to 2\*\*32 - 1"):
        devices.seed_everything(seed)  # type: ignore[arg-type]


def test_the_clock_does_not_go_back(device: torch.device) -> None:
    times = [devices.clock(device) for _ in range(5)]
    assert times == sorted(times)


@pytest.mark.parametrize(("kind", "calls"), [("cuda:1", 1), ("mps", 1), ("cpu", 0)])
def test_the_clock_waits(monkeypatch: pytest.MonkeyPatch, kind: str, calls: int) -> None:
    waited: list[object] = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    monkeypatch.setattr(torch.mps, "synchronize", lambda: waited.append("mps"))
    devices.clock(kind)
    assert len(waited) == calls
    if kind.startswith("cuda"):
        assert waited == [torch.device("cuda:1")]  # not the current device


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_clock_waits_for_a_gpu() -> None:
    x = torch.randn(4096, 4096, device="cuda")
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start = devices.clock("cuda")
    begin.record()
    for _ in range(20):
        x @ x
    end.record()
    assert devices.clock("cuda") - start >= begin.elapsed_time(end) / 1000


def test_every_device_has_a_name(device: torch.device) -> None:
    name = devices.device_name(device)
    assert name
    assert name == name.strip()
    assert devices.device_name(device.type) == name
