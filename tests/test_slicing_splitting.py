"""A network on two machines: what passes, what it costs, and peers that behave badly."""

import contextlib
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from slicing_networks import made

from structopt.slicing import (
    Layer,
    Remote,
    bottleneck,
    cut_points,
    pack,
    serve,
    split_latency,
    split_stages,
    unpack,
)

SCRIPT = Path(__file__).parent / "scripts" / "serve_stages.py"
sys.path.insert(0, str(SCRIPT.parent))
import serve_stages as script  # noqa: E402


@pytest.fixture(scope="module")
def server():
    """A server in a process of its own."""
    process = subprocess.Popen([sys.executable, str(SCRIPT)], stdout=subprocess.PIPE, text=True)
    try:
        yield "127.0.0.1", int(process.stdout.readline())
        assert process.poll() is None  # it outlived all peers
    finally:
        process.kill()
        process.communicate()


def message(payload, magic=b"SPLT", version=1, kind=0, length=None, checksum=None):
    length = len(payload) if length is None else length
    checksum = zlib.crc32(payload) if checksum is None else checksum
    return struct.pack("<4sBBQI", magic, version, kind, length, checksum) + payload


@pytest.mark.slow
def test_two_processes_give_what_one_gives(server):
    model, device = script.network(), script.stages()[0]
    with Remote(server) as remote:
        for batch in (1, 3):
            x = torch.randn(batch, 1, 8, 8).double()
            assert torch.equal(remote(device(x)), model(x))
        values = (device(torch.zeros(batch, 1, 8, 8).double()) for batch in (1, 3))
        assert remote.sent == sum(len(pack(value)) for value in values)


@pytest.mark.slow
def test_what_the_stage_refuses_is_told_and_the_next_is_answered(server):
    with Remote(server) as remote:
        with pytest.raises(RuntimeError, match=r"could not answer: RuntimeError.*channels"):
            remote(torch.zeros(1, 3, 6, 6).double())
        assert remote(torch.zeros(1, 4, 6, 6).double()).shape == (1, 5)
    with (
        Remote(server, encode=lambda _: b"not a tensor") as remote,
        pytest.raises(RuntimeError, match="12 bytes hold no tensor"),
    ):
        remote(torch.zeros(1))


@pytest.mark.slow
@pytest.mark.parametrize(
    "sent",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        message(b"x", version=2),
        message(b"x", kind=7),
        message(b"x", length=1 << 62),
        message(b"abc", checksum=1),
        message(b"abc", length=10),  # and no more
        message(b"abc")[:5],
    ],
)
def test_the_server_hangs_up_on_what_is_no_message_and_serves_the_next(server, sent):
    begun = time.monotonic()
    with socket.create_connection(server, 20) as peer:
        peer.sendall(sent)
        with contextlib.suppress(ConnectionError):  # closed with bytes unread
            assert peer.recv(1) == b""
    assert time.monotonic() - begun < 15
    with Remote(server) as remote:
        assert remote(torch.zeros(1, 4, 6, 6).double()).shape == (1, 5)


def answering(answer):
    """A server that answers anything with these bytes and closes."""
    listener = socket.create_server(("127.0.0.1", 0))

    def once():
        with listener, listener.accept()[0] as peer:
            peer.recv(1 << 20)
            if answer is None:
                time.sleep(1)
            else:
                peer.sendall(answer)

    thread = threading.Thread(target=once)
    thread.start()
    return listener.getsockname(), thread


@pytest.mark.parametrize(
    ("answer", "kind", "problem"),
    [
        (b"", ConnectionError, "closed the connection in place of an answer"),
        (message(b"abc", length=10), ConnectionError, "7 of 10 bytes missing"),
        (message(b"abc")[:8], ConnectionError, "10 of 18 bytes missing"),
        (message(b"abc", length=1 << 62), ConnectionError, r"at most limit=1,000 are read"),
        (message(b"abc", checksum=1), ConnectionError, "its checksum differs"),
        (
            message(b"abc", version=9),
            ConnectionError,
            "version 9, kind 0: this side reads",
        ),
        (b"HTTP/1.1 400 Bad Request", ConnectionError, "begins with b'HTTP'"),
        (message(b"abc"), ValueError, "3 bytes hold no tensor"),
        (message(b"no", kind=1), RuntimeError, "could not answer: no"),
        (None, TimeoutError, "18 of 18 bytes have not come in time"),
    ],
)
def test_a_bad_answer_is_an_error(answer, kind, problem):
    address, thread = answering(answer)
    try:
        with (
            Remote(address, limit=1000, timeout=0.5 if answer is None else 10) as remote,
            pytest.raises(kind, match=problem),
        ):
            remote(torch.zeros(2))
    finally:
        thread.join()


def test_nobody_listens():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()
    with pytest.raises(ConnectionError):
        Remote(address)


def test_a_pair_of_functions_of_your_own_encodes():
    listener = socket.create_server(("127.0.0.1", 0))
    settings = {
        "decode": lambda data: torch.frombuffer(bytearray(data), dtype=torch.uint8).double(),
        "connections": 1,
    }
    thread = threading.Thread(target=serve, args=(torch.sqrt, listener), kwargs=settings)
    thread.start()
    with Remote(listener.getsockname(), encode=lambda x: bytes(x.tolist())) as remote:
        assert remote(torch.tensor([4, 9])).tolist() == [2, 3]
        assert remote.sent == 2
    thread.join()
    listener.close()


@given(
    shape=st.lists(st.integers(0, 4), max_size=4),
    dtype=st.sampled_from([torch.float64, torch.bfloat16, torch.uint8, torch.bool]),
)
def test_tensors_come_back_from_their_bytes(shape, dtype):
    value = torch.randint(2, shape).to(dtype)
    found = unpack(pack(value))
    assert found.dtype == dtype
    assert torch.equal(found, value)


# The bottleneck


@pytest.mark.parametrize("shape", [(50, 6, 3, 2), (40, 7, 6), (90, 6)])
def test_a_bottleneck_keeps_the_principal_axes(shape, device):
    values = torch.randn(shape, dtype=torch.float64, device=device)
    values = values * torch.arange(1, 7, device=device).reshape(-1, *[1] * (2 * (len(shape) == 4)))
    values += 5
    rows = (values.movedim(1, -1) if len(shape) == 4 else values).flatten(0, -2)
    lost = torch.linalg.svdvals(rows - rows.mean(0)).square()
    for width in range(1, 7):
        narrow, restore = bottleneck(values, width)
        passing = narrow(values)
        assert passing.numel() * 6 == values.numel() * width
        error = (restore(passing) - values).square().sum()
        torch.testing.assert_close(error, lost[width:].sum(), rtol=1e-9, atol=1e-9)


def test_a_network_with_a_full_bottleneck_is_the_same(device):
    for name, cut in (("ResNet-18", "layer2"), ("TinyTransformer", "layers.0")):
        model, x = made(name, device)
        first, last = split_stages(model, x, [cut])
        narrow, restore = bottleneck(first(x), first(x).shape[-1 if first(x).ndim == 3 else 1])
        torch.testing.assert_close(last(restore(narrow(first(x)))), model(x), rtol=1e-9, atol=1e-9)


def test_bottlenecks_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="width=7: the values have 6 channels"):
        bottleneck(torch.zeros(5, 6), 7)
    with pytest.raises(ValueError, match="width=0"):
        bottleneck(torch.zeros(5, 6), 0)
    with pytest.raises(ValueError, match=r"shape \(6,\)"):
        bottleneck(torch.zeros(6), 2)
    with pytest.raises(ValueError, match=r"torch.int64"):
        bottleneck(torch.zeros(6, 6).long(), 2)


# What it costs


@given(
    rows=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=5),
    entering=st.integers(0, 9),
    slowdown=st.integers(0, 4),
    delay=st.integers(0, 3),
)
def test_latency_is_the_sum_of_its_parts(rows, entering, slowdown, delay):
    layers = [Layer(str(i), float(t), 0, 0, sent) for i, (t, sent) in enumerate(rows)]
    settings = {"bandwidth": 2.0, "slowdown": slowdown, "delay": delay}
    found = list(split_latency(layers, entering, **settings).values())
    times, crossing = [t for t, _ in rows], [entering, *(sent for _, sent in rows[:-1])]
    assert len(found) == len(rows) + 1
    for cut, sent in enumerate(crossing):
        expected = slowdown * sum(times[:cut]) + sum(times[cut:]) + sent / 2 + delay
        assert found[cut] == pytest.approx(expected)
    assert found[-1] == pytest.approx(slowdown * sum(times))


def test_no_bandwidth_is_refused():
    layers = [Layer("", 1.0, 0, 0, 0)]
    for wrong in ({"bandwidth": 0}, {"bandwidth": 1, "delay": -1}, {"bandwidth": float("nan")}):
        with pytest.raises(ValueError, match="give a bandwidth above 0"):
            split_latency(layers, 1, **wrong)


def test_the_bytes_of_a_cut_are_those_that_are_sent(device):
    model, x = made("ResNet-20", device)
    for point in cut_points(model, x)[3:5]:
        first, _ = split_stages(model, x, [point])
        assert 0 < len(pack(first(x))) - point.bytes < 100  # the header of the format
