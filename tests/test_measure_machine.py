"""What is measured on the machine: time, memory, files, energy."""

import time

import pytest
import torch
from torch import nn

from structopt import devices, files, measure
from structopt.measure import counters, timing


def test_latency_counts_the_calls_it_makes(monkeypatch):
    """On a clock that only the model moves, the timing is exact, whatever the machine does."""
    now, calls = [0.0], []

    def model(x):
        calls.append(1)
        now[0] += 0.0005

    monkeypatch.setattr(devices, "clock", lambda device: now[0])
    found = measure.latency(model, torch.zeros(1), rounds=5, warm_up=3)
    assert found.median == pytest.approx(0.0005)
    assert found.lower == pytest.approx(found.upper)
    assert len(calls) == 3 + 2 + 5 * 4  # warm-up, two to choose repeats, rounds of 2 ms


def test_models_take_turns(monkeypatch):
    now, order = [0.0], []

    def model(name):
        def run(x):
            order.append(name)
            now[0] += 1.0

        return run

    monkeypatch.setattr(devices, "clock", lambda device: now[0])
    names = ["a", "b", "c"]
    measure.latency({n: model(n) for n in names}, torch.zeros(1), rounds=4, warm_up=0)
    assert "".join(order[-12:]) == "abcbcacababc"  # each in each place in turn


def test_quartiles_are_those_of_the_rounds(monkeypatch):
    ticks = iter([0.0, 1.0] * 2 + [t for k in (1, 2, 3, 4, 5) for t in (0.0, float(k))])
    monkeypatch.setattr(devices, "clock", lambda device: next(ticks))
    found = measure.latency(lambda x: None, torch.zeros(1), rounds=5, warm_up=0)
    assert (found.lower, found.median, found.upper) == (2.0, 3.0, 4.0)
    assert found.spread == 1.0
    assert str(found) == f"3 s (2 to 4, 5 rounds) on {found.device}"


def test_a_longer_job_takes_longer(device):
    small, large = (torch.zeros(n, n, device=device) for n in (8, 512))
    found = measure.latency(
        {"small": lambda x: small @ small, "large": lambda x: large @ large}, small, rounds=3
    )
    assert found["small"].device == devices.device_name(device)
    assert found["large"].median > 0


@pytest.mark.parametrize(("models", "rounds"), [({}, 3), (nn.Identity(), 0)])
def test_nothing_to_time_is_an_error(models, rounds):
    with pytest.raises(ValueError, match=r"models|rounds"):
        measure.latency(models, torch.zeros(1), rounds=rounds)
    with pytest.raises(ValueError, match="the example is empty"):
        measure.latency(nn.Identity(), torch.zeros(0, 3), rounds=1)
    with pytest.raises(ValueError, match=r"by name, \{name: model\}, not list"):
        measure.compare([nn.Identity()], torch.zeros(1, 3))


def test_the_collector_runs_again_after_timing():
    import gc

    assert gc.isenabled()
    with pytest.raises(ZeroDivisionError):
        measure.latency(lambda x: 1 / 0, torch.zeros(1))
    assert gc.isenabled()
    assert timing._ROUND > 0


def test_peak_memory_follows_what_lives(device):
    x = torch.zeros(250, device=device)  # 1000 bytes each

    def chain():
        y = x
        for _ in range(10):
            y = y + 1  # the old one is released when the new one is there
        return y

    kept = lambda: [x + k for k in range(10)]  # noqa: E731
    views = lambda: x.view(10, 25).t()[2:].unsqueeze(0)  # noqa: E731
    in_place = lambda: x.add_(1).mul_(2)  # noqa: E731
    assert measure.peak_memory(views) == measure.peak_memory(in_place) == 0
    if device.type == "cpu":  # CUDA's allocator hands out blocks of 512 bytes
        assert measure.peak_memory(chain) == 2000
        assert measure.peak_memory(kept) == 10_000
    assert 2000 <= measure.peak_memory(chain) < measure.peak_memory(kept)


def test_training_keeps_activations_alive(device):
    model = nn.Sequential(*[nn.Sequential(nn.Linear(64, 64), nn.ReLU()) for _ in range(6)])
    model, x = model.to(device), torch.zeros(128, 64, device=device)
    with torch.no_grad():
        inference = measure.peak_memory(lambda: model(x))
    training = measure.peak_memory(lambda: model(x))
    assert inference <= 3 * x.nbytes
    assert training >= 6 * x.nbytes


def test_memory_made_before_and_freed_inside_does_not_go_below_zero():
    held = [torch.zeros(1000)]

    def release():
        held.pop().add_(1)
        return torch.ones(10)

    assert measure.peak_memory(release) == 40


def test_sparse_tensors_live_in_their_indices_and_values():
    eye = torch.eye(5)
    parts = 8 * 10 + 4 * 5
    assert parts <= measure.peak_memory(eye.to_sparse) <= 2 * parts
    many = measure.peak_memory(lambda: [eye.to_sparse() for _ in range(10)])
    assert 10 * parts <= many <= 11 * parts
    model = nn.Linear(2, 2)
    model.register_buffer("near", eye.to_sparse())
    with pytest.raises(ValueError, match=r"'near' is of layout torch\.sparse_coo"):
        measure.file_bytes(model)


def test_a_file_is_as_large_as_it_is_on_disk(tmp_path, device):
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)).to(device)
    files.save_tensors(tmp_path / "m.safetensors", dict(model.state_dict()), {})
    assert measure.file_bytes(model) == (tmp_path / "m.safetensors").stat().st_size


def test_tied_weights_are_stored_once():
    tied = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False))
    tied[1].weight = tied[0].weight
    assert 64 * 64 * 4 < measure.file_bytes(tied) < 1.1 * 64 * 64 * 4


def test_a_state_that_is_not_tensors_is_named():
    class Packed(nn.Module):
        def get_extra_state(self):
            return {"scale": 1}

    with pytest.raises(ValueError, match="_extra_state"):
        measure.file_bytes(Packed())
    with pytest.raises(ValueError, match="meta"):
        measure.file_bytes(nn.Linear(2, 2, device="meta"))


@pytest.fixture
def counter(tmp_path, monkeypatch):
    """A machine with one processor package, whose counter the test turns."""
    zone = tmp_path / "intel-rapl:0"
    zone.mkdir()
    (zone / "name").write_text("package-0\n")
    (zone / "max_energy_range_uj").write_text("1000000\n")
    (zone / "energy_uj").write_text("900000\n")
    core = tmp_path / "intel-rapl:0:0"
    core.mkdir()
    (core / "name").write_text("core\n")
    monkeypatch.setattr(counters, "_POWERCAP", tmp_path)
    monkeypatch.setattr(counters, "_nvml", list)
    return zone / "energy_uj"


def test_energy_is_counted_for_one_call_also_when_the_counter_wraps(counter):
    calls = []

    def work():
        calls.append(1)
        now = int(counter.read_text()) + 50_000  # 0.05 J each
        counter.write_text(str(now % 1_000_000))

    calls_before_wrap = 2
    joules = measure.energy(work, seconds=0)
    assert joules == pytest.approx(0.05)
    assert len(calls) == calls_before_wrap
    assert measure.energy(work, seconds=0) == pytest.approx(0.05)  # 0 → 50,000 after the wrap
    assert measure.energy_source() == "1 RAPL package counter(s); no NVML counter"


def test_energy_runs_as_long_as_asked(counter):
    start = time.perf_counter()
    measure.energy(lambda: None, seconds=0.05)
    assert time.perf_counter() - start >= 0.05


def test_without_a_counter_there_is_a_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(counters, "_nvml", list)
    monkeypatch.setattr(counters, "_POWERCAP", tmp_path)
    assert measure.energy(lambda: None) is None
    assert "usually needs root" in measure.energy_source()
    monkeypatch.setattr(counters, "_POWERCAP", tmp_path / "none")
    assert "does not exist" in measure.energy_source()
