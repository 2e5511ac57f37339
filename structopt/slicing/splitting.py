"""One network on two machines: the first stages on a device, the others on a server."""

from __future__ import annotations

import socket
import threading
import traceback
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from structopt.losses.checks import need_values, real, whole
from structopt.slicing.asking import check_seconds
from structopt.slicing.layers import Layer
from structopt.slicing.messages import ERROR, TENSOR, pack, receive, send, unpack

LIMIT = 64_000_000


def serve(
    stage: Callable[[Tensor], Tensor],
    listener: socket.socket,
    *,
    decode: Callable[[bytes], Tensor] = unpack,
    limit: int = LIMIT,
    timeout: float = 30,
    connections: int | None = None,
) -> None:
    """Answer each message with what the stage makes of it, one peer after the other.

    A message that cannot be decoded, or that the stage refuses, is answered with the error in
    words. A peer that sends half a message, something else, more than ``limit`` bytes, or nothing
    for ``timeout`` seconds, is hung up on; the next is served. There is no encryption and no
    password: listen where only those you trust can reach.

    Args:
        stage: the rest of the network, run without gradients.
        listener: a listening socket, ``socket.create_server(("127.0.0.1", 0))``.
        decode: bytes -> tensor, as the device's ``encode`` made them.
        limit: the longest message in bytes.
        timeout: seconds for a message, or between two.
        connections: how many peers are served; all that come by default.

    Example:
        >>> import threading
        >>> listener = socket.create_server(("127.0.0.1", 0))
        >>> settings = {"connections": 1}
        >>> thread = threading.Thread(target=serve, args=(torch.exp, listener), kwargs=settings)
        >>> thread.start()
        >>> with Remote(listener.getsockname()) as remote:
        ...     remote(torch.zeros(2))
        tensor([1., 1.])
        >>> thread.join(); listener.close()
    """
    check_seconds(timeout)
    served = 0
    while connections is None or served < connections:
        connection, _ = listener.accept()
        served += 1
        with connection:
            try:
                while message := receive(connection, limit, timeout):
                    answer = _answer(stage, decode, message[1])
                    connection.settimeout(timeout)  # what waiting and reading left is no limit
                    send(connection, *answer)
            except OSError:  # of this peer alone
                continue


def _answer(
    stage: Callable[[Tensor], Tensor], decode: Callable[[bytes], Tensor], payload: bytes
) -> tuple[int, bytes]:
    try:
        with torch.no_grad():
            return TENSOR, pack(stage(decode(payload)))
    except Exception as problem:  # whatever it is, the device must hear of it
        told = "".join(traceback.format_exception_only(problem)).strip()  # also where str() fails
        return ERROR, told.encode(errors="replace")


class Remote:
    """The stages on the server, called from the device like a function: Tensor -> Tensor.

    Args:
        address: (host, port) of the server.
        encode: tensor -> bytes; the server's ``decode`` reads them.
        limit: the longest answer in bytes.
        timeout: seconds to connect, and for each answer.

    Raises:
        ConnectionError: nobody listens there; the server hangs up, or sends no whole message.
        TimeoutError: no answer in time.
        RuntimeError: the server's stage refused what was sent; its error in words.
        ValueError: what is no dense tensor, or no number of seconds.

    After an error of the connection, or an interrupt (Ctrl-C), make a new one. Threads may share
    one, and wait for each other. Example: see `serve`.
    """

    def __init__(
        self,
        address: tuple[str, int],
        *,
        encode: Callable[[Tensor], bytes] = pack,
        limit: int = LIMIT,
        timeout: float = 30,
    ) -> None:
        check_seconds(timeout)
        self.encode, self.limit, self.timeout = encode, limit, timeout
        self.sent = 0
        """Bytes of payload sent so far."""
        self._connection = socket.create_connection(address, timeout)
        self._turn = threading.Lock()

    def __call__(self, value: Tensor) -> Tensor:
        """What the server makes of it, on the CPU."""
        payload = self.encode(value)
        with self._turn:
            kind, data = self._asked(payload)
            if kind == TENSOR:
                try:
                    return unpack(data)
                except ValueError:
                    self.close()
                    raise
        raise RuntimeError(f"the server could not answer: {data.decode(errors='replace')}")

    def _asked(self, payload: bytes) -> tuple[int, bytes]:
        if self._connection.fileno() < 0:
            raise ConnectionError("this connection is closed: make a new Remote")
        try:
            self._connection.settimeout(self.timeout)
            send(self._connection, TENSOR, payload)
            self.sent += len(payload)
            answer = receive(self._connection, self.limit, self.timeout)
            if answer is None:
                raise ConnectionError("the server closed the connection in place of an answer")
            return answer
        except (ConnectionResetError, BrokenPipeError) as problem:
            self.close()
            raise ConnectionError(
                f"the server hung up on a message of {len(payload):,} bytes: is its limit lower?"
            ) from problem
        except BaseException:  # an interrupt too: the next call would read this one's answer
            self.close()
            raise

    def close(self) -> None:
        """Hang up."""
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_problem: Any) -> None:
        self.close()


@torch.inference_mode(False)  # else what is made could not be trained
def bottleneck(values: Tensor, width: int) -> tuple[nn.Module, nn.Module]:
    """Two layers for a cut: one that narrows what passes to `width` channels, one that restores it.

    They begin as the best linear pair for the values given, the projection on their principal
    axes; with all channels they change nothing. Put one at the end of the device's stages, the
    other before the server's, and train the whole on (Matsubara et al., 2019, "Distilled split deep
    neural networks for edge-assisted real-time systems", train such bottlenecks).

    Args:
        values: what passes the cut for some examples: (N, C, H, W), tokens (N, T, C), or (N, C).
        width: how many channels pass, 1 to C.

    Raises:
        ValueError: another shape, whole numbers, none, some that are not finite, or a width outside
            of 1 to C.

    Example:
        >>> narrow, restore = bottleneck(torch.randn(10, 6, 4, 4), 2)
        >>> narrow(torch.zeros(1, 6, 4, 4)).shape, restore(torch.zeros(1, 2, 4, 4)).shape
        (torch.Size([1, 2, 4, 4]), torch.Size([1, 6, 4, 4]))
    """
    if values.ndim not in (2, 3, 4) or not values.is_floating_point():
        raise ValueError(
            f"values of shape {tuple(values.shape)}, {values.dtype}: give real numbers of shape "
            "(N, C, H, W), (N, T, C) or (N, C)"
        )
    need_values("a bottleneck", [values])
    images = values.ndim == 4
    rows = (values.movedim(1, -1) if images else values).detach().flatten(0, -2).double()
    channels = rows.shape[1]
    if not len(rows) or not rows.isfinite().all():
        raise ValueError("values are empty, or not all finite: they have no principal axes")
    if not whole(width) >= 1 or width > channels:
        raise ValueError(
            f"width={width!r}: the values have {channels} channels, give 1 to {channels}"
        )
    mean = rows.mean(0)
    _, axes = torch.linalg.eigh((rows - mean).T @ (rows - mean))
    axes = axes.flip(1)[:, :width]  # (C, width), the widest spread first
    kind: Any = (lambda n, m: nn.Conv2d(n, m, 1)) if images else nn.Linear
    with torch.device("meta"):  # draws no random numbers for weights that are replaced
        narrow, restore = kind(channels, width), kind(width, channels)
    for layer, weight, bias in ((narrow, axes.T, -axes.T @ mean), (restore, axes, mean)):
        layer.weight = nn.Parameter(weight.reshape(layer.weight.shape).to(values).contiguous())
        layer.bias = nn.Parameter(bias.to(values))
    return narrow, restore


def split_latency(
    layers: Sequence[Layer],
    entering: int,
    *,
    bandwidth: float,
    slowdown: float = 1,
    delay: float = 0,
) -> dict[str, float]:
    """Seconds for one batch, for each cut between a device and a server.

    The device runs the layers before the cut, the bytes there cross, the server runs the rest:

        T(c) = slowdown · Σ before + sent(c) / bandwidth + delay + Σ behind

    "(input)" is the cut before all layers, with everything on the server; "(output)" that behind
    all, where nothing crosses. After Kang et al., 2017, "Neurosurgeon".

    Args:
        layers: from `measure_layers`, timed on a machine like the server.
        entering: bytes of the network's input.
        bandwidth: bytes a second, from the device to the server.
        slowdown: how many times slower the device is.
        delay: seconds for the way there and back, the answer with it.

    Raises:
        ValueError: no bandwidth, or a negative number.

    Example:
        >>> layers = [Layer("a", 1.0, 0, 0, 2), Layer("", 2.0, 0, 0, 0)]
        >>> split_latency(layers, 12, bandwidth=4, slowdown=2)
        {'(input)': 6.0, 'a': 4.5, '(output)': 6.0}
    """
    given = [real(number) for number in (slowdown, delay, entering)]
    if not real(bandwidth) > 0 or not all(number >= 0 for number in given):
        raise ValueError(
            f"bandwidth={bandwidth!r}, slowdown={slowdown!r}, delay={delay!r}, "
            f"entering={entering!r}: give a bandwidth above 0, and nothing negative"
        )
    behind, before = sum(layer.seconds for layer in layers), 0.0
    found = {"(input)": entering / bandwidth + delay + behind}
    for layer in layers[:-1]:
        before += layer.seconds
        crossing = layer.sent / bandwidth + delay
        found[layer.name] = slowdown * before + crossing + behind - before
    found["(output)"] = slowdown * behind
    return found
