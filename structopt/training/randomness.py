"""The states of all random generators that a training run draws from."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch


def state(device: torch.device, own: Sequence[torch.Generator] = ()) -> dict[str, Any]:
    """The states of Python, NumPy, torch, the device and the generators ``own``, as plain data.

    >>> sorted(state(torch.device("cpu")))
    ['cpu', 'numpy', 'own', 'python']
    """
    name, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002 (augmentations draw from it)
    numpy = (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest)
    found = {"python": random.getstate(), "numpy": numpy, "cpu": torch.get_rng_state()}
    found["own"] = [generator.get_state() for generator in own]
    if device.type != "cpu":
        found[device.type] = _module(device).get_rng_state(*_index(device))
    return found


def restore(
    states: dict[str, Any], device: torch.device, own: Sequence[torch.Generator] = ()
) -> None:
    """Put the generators back; a device of another kind than the saved one keeps its state."""
    name, keys, *rest = states["numpy"]
    random.setstate(states["python"])
    np.random.set_state((name, keys.numpy(), *rest))  # noqa: NPY002
    torch.set_rng_state(states["cpu"])
    for generator, saved in zip(own, states["own"], strict=True):
        generator.set_state(saved)
    if device.type in states and device.type != "cpu":
        _module(device).set_rng_state(states[device.type], *_index(device))


def _module(device: torch.device) -> Any:
    return torch.get_device_module(device)


def _index(device: torch.device) -> tuple[torch.device, ...]:
    return () if device.type == "mps" else (device,)  # MPS has one device, and says so
