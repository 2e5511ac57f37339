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
from safetensors.torch import save
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


@contextlib.contextmanager
def served(stage, **settings):
    """The address of a server in a thread, for one peer; it ends when that peer has left."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        settings |= {"connections": 1}
        thread = threading.Thread(target=serve, args=(stage, listener), kwargs=settings)
        thread.start()
        yield listener.getsockname()
        thread.join(10)
        assert not thread.is_alive()


def test_messages_that_come_together_are_answered_one_by_one():
    values = torch.rand(3), torch.rand(2, 2)
    with served(torch.exp) as address, socket.create_connection(address, 10) as peer:
        peer.sendall(b"".join(message(pack(value)) for value in values))
        for value in values:
            header = peer.recv(18, socket.MSG_WAITALL)
            data = peer.recv(struct.unpack("<4sBBQI", header)[3], socket.MSG_WAITALL)
            assert header == message(data)[:18]
            assert torch.equal(unpack(data), value.exp())


def test_a_slow_message_leaves_its_answer_the_whole_time():
    value, seconds = torch.zeros(2**21), 2.0  # larger than what lies in buffers between the two
    request = message(pack(torch.zeros(2)))
    with (
        served(lambda x: value, timeout=seconds) as address,
        socket.create_connection(address, 10) as peer,
        peer.makefile("rb") as read,
    ):
        for part in request[:20], request[20:]:
            time.sleep(0.6 * seconds)
            peer.sendall(part)
        time.sleep(0.7 * seconds)
        length = struct.unpack("<4sBBQI", read.read(18))[3]
        assert torch.equal(unpack(read.read(length)), value)


def test_a_message_beyond_the_limit_is_not_waited_for():
    with served(torch.exp, limit=10) as address, socket.create_connection(address, 10) as peer:
        peer.sendall(message(b"", length=11))
        assert peer.recv(1) == b""
    value = torch.zeros(2)
    with served(torch.exp, limit=len(pack(value))) as address, Remote(address) as remote:
        assert torch.equal(remote(value), value.exp())  # which is as long as the limit


def test_a_device_hears_that_its_message_was_too_long():
    with served(torch.exp, limit=100) as address, Remote(address, timeout=10) as remote:
        with pytest.raises(ConnectionError, match=r"hung up on .* is its limit lower"):
            remote(torch.zeros(10_000_000))
        with pytest.raises(ConnectionError, match="is closed: make a new Remote"):
            remote(torch.zeros(1))


def test_stages_run_without_gradients():
    weight, graphs = torch.ones(2, requires_grad=True), []

    def stage(x):
        graphs.append((x * weight).requires_grad)
        return x * weight

    with served(stage) as address, Remote(address) as remote:
        remote(torch.ones(2, requires_grad=True))
    assert graphs == [False]


def test_any_error_of_a_stage_is_told():
    def stage(x):
        raise KeyError("no such word")

    with served(stage) as address, Remote(address) as remote:
        for _ in range(2):
            with pytest.raises(RuntimeError, match="could not answer: KeyError: 'no such word'"):
                remote(torch.ones(2))


def test_after_an_error_of_the_connection_it_is_closed():
    damaged = message(b"abc", checksum=1)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        remote = Remote(listener.getsockname(), timeout=10)
        peer, _ = listener.accept()
        with peer:
            peer.sendall(damaged + message(pack(torch.ones(1))))  # which answers nothing
            with pytest.raises(ConnectionError, match="checksum differs"):
                remote(torch.zeros(2))
            with pytest.raises(ConnectionError, match="is closed: make a new Remote"):
                remote(torch.zeros(2))


def test_a_server_that_reads_nothing_is_not_waited_for():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        remote = Remote(listener.getsockname(), timeout=0.5)
        begun = time.monotonic()
        with pytest.raises(TimeoutError):
            remote(torch.zeros(10_000_000))
        assert time.monotonic() - begun < 15


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
        (message(b"abc", kind=7), ConnectionError, "version 1, kind 7: this side reads"),
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
    def decode(data):
        return torch.frombuffer(bytearray(data), dtype=torch.uint8).double()

    with (
        served(torch.sqrt, decode=decode) as address,
        Remote(address, encode=lambda x: bytes(x.tolist())) as remote,
    ):
        assert remote(torch.tensor([4, 9])).tolist() == [2, 3]
        assert remote.sent == 2


@given(
    shape=st.lists(st.integers(0, 4), max_size=4),
    dtype=st.sampled_from([torch.float64, torch.bfloat16, torch.uint8, torch.bool]),
)
def test_tensors_come_back_from_their_bytes(shape, dtype):
    value = torch.randint(2, shape).to(dtype)
    found = unpack(pack(value))
    assert found.dtype == dtype
    assert torch.equal(found, value)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_views_and_weights_are_packed_as_they_look():
    weight = torch.nn.Parameter(torch.rand(3, 4))
    for value in (weight, weight.T, weight[::2, 1:]):
        found = unpack(pack(value))
        assert torch.equal(found, value)
        assert not found.requires_grad
    with pytest.raises(ValueError, match="hold no tensor"):
        unpack(save({"other": torch.ones(1)}))
    for value, told in (
        ([1.0], "a list"),
        (torch.eye(2).to_sparse(), "one of torch.float32, torch.sparse_coo, on cpu"),
        (torch.ones(2, device="meta"), "on meta"),
        (torch.ones(2, dtype=torch.complex128), "one of torch.complex128"),
        (torch.ones(2).to(torch.float8_e8m0fnu), "one of torch.float8_e8m0fnu"),
        (
            torch.nested.nested_tensor([torch.ones(1), torch.ones(2)]),
            "one of torch.float32, nested",
        ),
    ):
        with pytest.raises(ValueError, match=f"a message is one dense tensor, not {told}|on meta"):
            pack(value)


def test_what_torch_conjugates_or_negates_only_when_it_is_read_is_packed_as_it_looks():
    """Such a view shows other numbers than those that lie in memory."""
    whole = torch.randn(3, dtype=torch.complex64)
    for value in (whole.conj(), whole.conj().imag, torch._neg_view(torch.ones(3))):
        assert torch.equal(unpack(pack(value)), value)


class Interrupting(socket.socket):
    """Ctrl-C, once, while the answer is on its way."""

    interrupted = False

    def recv(self, size):
        if not self.interrupted:
            self.interrupted = True
            raise KeyboardInterrupt
        return super().recv(size)


def test_after_an_interrupt_no_answer_is_taken_for_another():
    with served(torch.exp) as address, Remote(address) as remote:
        own = remote._connection
        remote._connection = Interrupting(fileno=own.detach())
        with pytest.raises(KeyboardInterrupt):
            remote(torch.zeros(1))
        with pytest.raises(ConnectionError, match="is closed: make a new Remote"):
            remote(torch.ones(1))


def test_threads_that_share_a_connection_get_their_own_answers():
    wrong = []
    with served(torch.neg) as address, Remote(address) as remote:

        def ask(number):
            for _ in range(20):
                given = torch.full((20_000,), float(number))
                if not torch.equal(remote(given), -given):
                    wrong.append(number)

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert remote.sent == 80 * len(pack(torch.zeros(20_000)))  # none has died in between
    assert not wrong


class Speechless(Exception):
    def __str__(self):
        raise RuntimeError


@pytest.mark.parametrize("problem", [Speechless(), ValueError("\udcff")])
def test_an_error_that_no_words_can_be_made_of_ends_no_server(problem):
    def refuse(value):
        raise problem

    with served(refuse) as address, Remote(address) as remote:
        for _ in range(2):
            with pytest.raises(RuntimeError, match=type(problem).__name__):
                remote(torch.zeros(1))


@pytest.mark.parametrize("timeout", [0, -1, None, "1", float("inf")])
def test_seconds_are_a_number_above_0(timeout):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        for wrong in (
            lambda: Remote(listener.getsockname(), timeout=timeout),
            lambda: serve(torch.exp, listener, timeout=timeout),
        ):
            with pytest.raises(ValueError, match=f"timeout={timeout!r}: give seconds, above 0"):
                wrong()


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
    for width in (0, 2.0):
        with pytest.raises(ValueError, match=f"width={width}"):
            bottleneck(torch.zeros(5, 6), width)
    with pytest.raises(ValueError, match="a bottleneck needs values"):
        bottleneck(torch.zeros(5, 6, device="meta"), 2)
    with pytest.raises(ValueError, match=r"shape \(6,\)"):
        bottleneck(torch.zeros(6), 2)
    with pytest.raises(ValueError, match=r"torch.int64"):
        bottleneck(torch.zeros(6, 6).long(), 2)
    for values in (torch.zeros(0, 6), torch.full((5, 6), torch.nan)):
        with pytest.raises(ValueError, match="empty, or not all finite"):
            bottleneck(values, 2)


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
    nan = float("nan")
    for wrong in (
        {"bandwidth": 0},
        {"bandwidth": nan},
        {"bandwidth": 1, "delay": -1},
        {"bandwidth": 1, "delay": nan},
        {"bandwidth": 1, "slowdown": nan},
        {"bandwidth": "fast"},
        {"bandwidth": 1, "slowdown": None},
    ):
        with pytest.raises(ValueError, match="give a bandwidth above 0"):
            split_latency(layers, 1, **wrong)
    with pytest.raises(ValueError, match="give a bandwidth above 0"):
        split_latency(layers, nan, bandwidth=1)


def test_the_bytes_of_a_cut_are_those_that_are_sent(device):
    model, x = made("ResNet-20", device)
    for point in cut_points(model, x)[3:5]:
        first, _ = split_stages(model, x, [point])
        assert 0 < len(pack(first(x))) - point.bytes < 100  # the header of the format
