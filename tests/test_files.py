"""Files are whole or not there, and tensors come back bit for bit."""

import errno
import json
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing._internal.two_tensor import TwoTensor

from structopt.files import load_tensors, save_tensors, write_atomically

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn,
    torch.float8_e5m2, torch.complex64, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool,
]  # fmt: skip


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    assert (a.dtype, a.shape) == (b.dtype, b.shape)
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


@given(
    dtype=st.sampled_from(DTYPES),
    shape=st.lists(st.integers(0, 4), max_size=4),
    name=st.text(min_size=1, max_size=8).filter(lambda s: s != "__metadata__"),
    notes=st.dictionaries(st.text(max_size=5), st.integers() | st.text() | st.none(), max_size=3),
    seed=st.integers(0, 99),
)
def test_any_tensor_and_notes_come_back(tmp_path_factory, dtype, shape, name, notes, seed):
    path = tmp_path_factory.mktemp("files") / "x.safetensors"
    size = torch.empty((), dtype=dtype).element_size()
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 2 if dtype is torch.bool else 256, (*shape, size), generator=generator)
    tensor = raw.to(torch.uint8).view(dtype)[..., 0]  # any bits, NaN payloads too
    save_tensors(path, {name: tensor}, notes)
    loaded, found = load_tensors(path)
    assert list(loaded) == [name]
    assert found == notes
    assert same_bits(loaded[name].contiguous(), tensor.contiguous())


def test_views_shared_memory_and_devices_are_stored_by_value(tmp_path, device):
    whole = torch.arange(24.0, device=device).reshape(2, 3, 2, 2)
    tensors = {
        "whole": whole,
        "same": whole,
        "transposed": whole.transpose(0, 1),
        "channels last": whole.to(memory_format=torch.channels_last),
        "expanded": torch.ones(1, device=device).expand(3),
        "parameter": torch.nn.Parameter(whole[0]),
    }
    save_tensors(tmp_path / "x", tensors, {})
    loaded, _ = load_tensors(tmp_path / "x", device)
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name], tensor), name
        assert loaded[name].device.type == device.type
    loaded["whole"].zero_()
    assert torch.equal(loaded["same"], whole)


def test_loaded_tensors_do_not_follow_the_file(tmp_path):
    path = tmp_path / "x"
    save_tensors(path, {"w": torch.ones(1000)}, {})
    loaded, _ = load_tensors(path)
    with path.open("r+b") as file:  # in place, as no tool of ours would
        file.write(bytes(path.stat().st_size))
    assert torch.equal(loaded["w"], torch.ones(1000))


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (torch.empty(2, device="meta"), "meta"),
        (torch.eye(2).to_sparse(), "dense"),
        (TwoTensor(torch.ones(2), torch.ones(2)), "'w' is TwoTensor: only dense"),
        (torch.ones(2, dtype=torch.complex128), r"'w' is torch\.complex128, which safetensors"),
        (torch.ones(2).byte().view(torch.float4_e2m1fn_x2), "float4_e2m1fn_x2, which safetensors"),
    ],
)
def test_what_cannot_be_stored_is_refused(tmp_path, tensor, words):
    with pytest.raises(ValueError, match=words):
        save_tensors(tmp_path / "x", {"w": tensor}, {})
    assert not list(tmp_path.iterdir())


def test_a_name_that_the_format_needs_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'__metadata__' is what the format calls its notes"):
        save_tensors(tmp_path / "x", {"__metadata__": torch.ones(2)}, {})
    with pytest.raises(ValueError, match="surrogates"):
        save_tensors(tmp_path / "x", {"\ud800": torch.ones(2)}, {})
    assert not list(tmp_path.iterdir())


def test_the_file_is_what_safetensors_itself_writes(tmp_path):
    """To the byte, but for the order of tensors whose numbers are of one size."""
    tensors = {f"{dtype}": torch.ones(3, 0, 2, dtype=dtype) for dtype in DTYPES}
    tensors |= {f"ä {dtype}": torch.arange(3).to(dtype) for dtype in DTYPES}
    save_tensors(tmp_path / "x", tensors, {"ü": "\u2028"})
    found = (tmp_path / "x").read_bytes()
    with safetensors.safe_open(tmp_path / "x", "pt") as file:
        expected = safetensors.torch.save(tensors, file.metadata())
    said = []
    for data in found, expected:
        end, place = 8 + struct.unpack("<Q", data[:8])[0], 0
        header = json.loads(data[8:end])
        for name, entry in sorted(header.items(), key=lambda e: e[1].get("data_offsets", [-1])):
            if name in tensors:
                first, last = entry.pop("data_offsets")
                entry["bytes"] = data[end + first : end + last]
                assert first == place, "no holes"
                assert (end + first) % tensors[name].itemsize == 0, "where its type may lie"
                place = last
        assert end + place == len(data)
        said.append(header)
    assert said[0] == said[1]
    assert abs(len(found) - len(expected)) <= 8, "offsets of as many digits, or one more"


MEASURE = """
import resource, sys, torch
from structopt import files
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
tensors = {str(n): torch.rand(2000, 2000) for n in range(10)}  # 16 MB each
tensors["0"] = tensors["0"].T
files.save_tensors(sys.argv[1], {"x": torch.ones(9)}, {})
before = peak()
files.save_tensors(sys.argv[1], tensors, {})
print((peak() - before) / 160e6)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory as Linux counts it")
def test_saving_needs_memory_for_one_tensor(tmp_path):
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "x")]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert float(out) < 0.15, "of ten tensors, one is copied at a time"


def test_notes_that_json_cannot_hold_are_refused(tmp_path):
    with pytest.raises(TypeError):
        save_tensors(tmp_path / "x", {}, {"set": {1, 2}})


def good_file(path: Path) -> bytes:
    save_tensors(path, {"w": torch.arange(6.0), "b": torch.ones(2, 2)}, {"epoch": 3})
    return path.read_bytes()


@given(cut=st.floats(0, 1, exclude_max=True))
def test_a_truncated_file_is_refused(tmp_path_factory, cut):
    path = tmp_path_factory.mktemp("files") / "x"
    data = good_file(path)
    path.write_bytes(data[: int(cut * len(data))])
    with pytest.raises(ValueError, match=r"x is truncated, corrupt or not a safetensors file"):
        load_tensors(path)


@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_is_noticed(tmp_path_factory, where, bit):
    path = tmp_path_factory.mktemp("files") / "x"
    data = bytearray(good_file(path))
    wanted = load_tensors(path)
    data[int(where * len(data))] ^= 1 << bit
    path.write_bytes(data)
    try:
        tensors, notes = load_tensors(path)
    except ValueError:
        return
    # What is left: a flip in the header's padding or in the word "sha256" changes no content.
    assert notes == wanted[1]
    assert all(same_bits(tensors[name], wanted[0][name]) for name in wanted[0])


HEADERS = {
    "no file at all": b"",
    "a pickle": b"\x80\x04\x95" + bytes(40),
    "a header beyond the file": struct.pack("<Q", 2**62) + b"{}",
    "a header that is no JSON": struct.pack("<Q", 4) + b"{{{{",
    "a header that is a list": struct.pack("<Q", 2) + b"[]",
}
ENTRIES = {
    "data beyond the file": {"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 1 << 60]}},
    "a shape that does not fit": {"w": {"dtype": "F32", "shape": [9], "data_offsets": [0, 8]}},
    "a shape that overflows": {
        "w": {"dtype": "F32", "shape": [1 << 62, 8], "data_offsets": [0, 8]}
    },
    "a negative size": {"w": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}},
    "an unknown type": {"w": {"dtype": "F33", "shape": [2], "data_offsets": [0, 8]}},
    "overlapping tensors": {
        "w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
        "v": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
    },
    "notes that are a list": {"__metadata__": {"notes": "[1]"}},
    "notes that are no JSON": {"__metadata__": {"notes": "{"}},
    "notes that nest without end": {"__metadata__": {"notes": "[" * 100_000}},
}


@pytest.mark.parametrize("what", [*HEADERS, *ENTRIES])
def test_a_hostile_file_is_refused(tmp_path, what):
    path = tmp_path / "x"
    if what in HEADERS:
        path.write_bytes(HEADERS[what])
    else:
        header = json.dumps(ENTRIES[what]).encode()
        body = b"" if "__metadata__" in ENTRIES[what] else bytes(8)
        path.write_bytes(struct.pack("<Q", len(header)) + header + body)
    with pytest.raises(ValueError, match=r"/x(:| is) "):
        load_tensors(path)


def test_a_file_from_elsewhere_has_empty_notes(tmp_path):
    from safetensors.torch import save_file

    save_file({"w": torch.ones(2)}, tmp_path / "x", {"format": "pt"})
    tensors, notes = load_tensors(tmp_path / "x")
    assert torch.equal(tensors["w"], torch.ones(2))
    assert notes == {}


def test_a_missing_file_and_a_folder_say_so(tmp_path):
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(FileNotFoundError, match="there is no file"):
            load_tensors(path)


def test_a_failing_writer_leaves_the_old_file(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"old")

    def writer(file):
        file.write(b"half of the n")
        raise KeyError("oops")

    with pytest.raises(KeyError):
        write_atomically(path, writer)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch, call):
    path = tmp_path / "x"
    path.write_bytes(b"old")

    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(*((os, "fsync") if call == "fsync" else (Path, "replace")), full)
    with pytest.raises(OSError, match=r"No space left on device.*as it was.*x") as caught:
        write_atomically(path, lambda file: file.write(b"new"))
    assert caught.value.errno == errno.ENOSPC
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_may_be_written_but_not_listed_gets_its_file(tmp_path, monkeypatch):
    def closed(*arguments):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "open", closed)
    write_atomically(tmp_path / "x", lambda file: file.write(b"new"))
    assert (tmp_path / "x").read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [tmp_path / "x"]


def test_a_pipe_or_a_device_is_not_replaced_by_a_file(tmp_path):
    os.mkfifo(tmp_path / "x")
    with pytest.raises(OSError, match=r"a device or pipe.*as it was.*x"):
        write_atomically(tmp_path / "x", lambda file: file.write(b"new"))
    assert (tmp_path / "x").is_fifo()
    assert list(tmp_path.iterdir()) == [tmp_path / "x"]


def test_a_file_that_may_not_be_read_is_not_called_missing(tmp_path, monkeypatch):
    save_tensors(tmp_path / "x", {}, {})

    def closed(*arguments, **keywords):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "open", closed)  # the tests may run as root, who may read
    with pytest.raises(PermissionError):
        load_tensors(tmp_path / "x")


def test_a_read_only_folder_says_so(tmp_path, monkeypatch):
    def read_only(*arguments, **keywords):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "open", read_only)  # the tests may run as root, who may write
    with pytest.raises(OSError, match="Read-only file system"):
        write_atomically(tmp_path / "x", lambda file: file.write(b"new"))


def test_a_file_in_the_way_of_a_folder_says_so(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OSError, match="file"):
        write_atomically(tmp_path / "file" / "x", lambda file: file.write(b"new"))


def test_folders_are_made_links_followed_and_the_umask_respected(tmp_path):
    path = tmp_path / "a" / "b" / "x"
    before = os.umask(0o027)
    try:
        write_atomically(path, lambda file: file.write(b"1"))
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o640
    link = tmp_path / "link"
    link.symlink_to(path)
    write_atomically(link, lambda file: file.write(b"2"))
    assert link.is_symlink()
    assert path.read_bytes() == b"2"


WRITER = """
import sys
from structopt.files import write_atomically
number = 0
while True:
    number = (number + 1) % 256
    block = bytes([number]) * 4096
    write_atomically(sys.argv[1], lambda file: [file.write(block) for _ in range(99)])
"""


@pytest.mark.slow
def test_a_killed_writer_leaves_a_whole_file(tmp_path):
    path = tmp_path / "x"
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(path)])
    deadline = time.monotonic() + 60
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.wait(30)
    data = path.read_bytes()
    assert len(data) == 4096 * 99
    assert len(set(data)) == 1
