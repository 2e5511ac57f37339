"""The zoo: half of every free group of each network, by this package and by Torch-Pruning.

    python -m zoo                            all families; goes on where it was interrupted
    python -m zoo torchvision resnet18 …     these networks, measured anew

Each network has a process of its own, with a limit on time and memory, so that one that crashes
is a row and not the end. Rows are kept as they come in `_build/zoo.jsonl`; at the end all of them
are written to `tests/benchmarks/results/zoo.json`. Weights are random, nothing is downloaded.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import resource
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from zoo.networks import FAMILIES

ROOT = Path(__file__).resolve().parents[2]
LINES = ROOT / "_build" / "zoo.jsonl"
RESULT = ROOT / "tests" / "benchmarks" / "results" / "zoo.json"
LIBRARIES = {"structopt": "zoo.halves", "torch-pruning": "zoo.baseline"}
MEMORY = 16 * 2**30


def child(family: str, name: str, library: str, seconds: int, pipe: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
    try:
        measure: Callable[..., dict[str, Any]] = import_module(LIBRARIES[library]).measure
        row = measure(FAMILIES[family][1](name))
    except Exception as problem:
        text = str(problem).strip().splitlines() or [""]
        row = {"outcome": "fails", "why": f"{type(problem).__name__}: {text[0][:300]}"}
    row["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1000
    pipe.send(row)


def row_of(family: str, name: str, library: str, seconds: int) -> dict[str, Any]:
    """What a process of its own finds out about a network, or how it ended."""
    ours, its = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(
        target=child, args=(family, name, library, seconds, its)
    )
    process.start()
    its.close()
    found: dict[str, Any] = {"outcome": "fails"}
    try:
        if ours.poll(30 * seconds):  # by the clock on the wall, on a busy machine
            found = ours.recv()
        else:
            process.kill()
    except EOFError:
        pass
    process.join()
    if "why" not in found and found["outcome"] == "fails":
        late = process.exitcode in (-24, -9)  # out of processor time, or of memory
        why = f"no end within {seconds} s" if late else f"the process died of {process.exitcode}"
        found["why"] = why
    return {"family": family, "name": name, "library": library, **found}


def read() -> dict[tuple[str, str, str], dict[str, Any]]:
    """The rows so far; of two of one network the later one counts."""
    rows = LINES.read_text(encoding="utf-8").splitlines() if LINES.exists() else []
    made = [json.loads(row) for row in rows]
    return {(row["family"], row["name"], row["library"]): row for row in made}


def write(rows: dict[tuple[str, str, str], dict[str, Any]]) -> None:
    from structopt import devices, files

    both: dict[tuple[str, str], dict[str, Any]] = {}
    for (family, name, library), row in sorted(rows.items()):
        entry = both.setdefault((family, name), {"family": family, "name": name})
        entry[library] = {k: v for k, v in row.items() if k not in ("family", "name", "library")}
    packages = ("torch", "torchvision", "timm", "transformers", "torch-pruning")
    result = {
        "benchmark": "zoo",
        "machine": {"device": devices.device_name(torch.device("cpu")), "kind": "cpu"}
        | {"autocast": "float64", "threads": 1, "date": time.strftime("%Y-%m-%d")}
        | {"torch": torch.__version__},
        "versions": {name: version(name) for name in packages},
        "size of the family": {family: len(names()) for family, (names, _) in FAMILIES.items()},
        "networks": list(both.values()),
    }
    text = json.dumps(result, indent=1) + "\n"
    files.write_atomically(RESULT, lambda file: file.write(text.encode()))


def table(rows: dict[tuple[str, str, str], dict[str, Any]]) -> str:
    """How many networks of each family came out how, in each library's hands."""
    outcomes = ("exact", "norms", "wrong", "nothing", "fails")
    lines = [f"{'':13s}{'':15s}" + "".join(f"{o:>9s}" for o in outcomes)]
    for family in FAMILIES:
        for library in LIBRARIES:
            mine = [r["outcome"] for k, r in rows.items() if (k[0], k[2]) == (family, library)]
            counts = "".join(f"{mine.count(outcome):9d}" for outcome in outcomes)
            lines.append(f"{family:13s}{library:15s}{counts}")
    return "\n".join(lines)


def chosen(family: str | None, names: list[str]) -> Iterator[tuple[str, str]]:
    """The families take turns, so that a run which is cut short has seen something of each."""
    listed = {f: names or FAMILIES[f][0]() for f in ([family] if family else FAMILIES)}
    for turn in itertools.zip_longest(*listed.values()):
        yield from ((f, name) for f, name in zip(listed, turn, strict=True) if name)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("family", nargs="?", choices=FAMILIES)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--library", choices=LIBRARIES)
    parser.add_argument("--seconds", type=int, default=900, help="of processor time for each")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows = read()
    LINES.parent.mkdir(exist_ok=True)
    for module in LIBRARIES.values():
        import_module(module)  # once, for all processes
    for family, name in chosen(options.family, options.names):
        for library in [options.library] if options.library else LIBRARIES:
            key = family, name, library
            if options.names or key not in rows:
                row = rows[key] = row_of(*key, options.seconds)
                with LINES.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
                write(rows)
                sys.stdout.write(f"{json.dumps(row)}\n")
                sys.stdout.flush()
    write(rows)
    sys.stdout.write(f"{table(rows)}\nwritten to {RESULT}\n")


if __name__ == "__main__":
    main()
