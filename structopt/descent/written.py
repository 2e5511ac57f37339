"""How a choice prints itself, and how its numbers are checked."""

from __future__ import annotations

import math


def written(name: str, **settings: object) -> str:
    """The call that makes a value, as one would type it: ``momentum(lr=0.1, beta=0.9)``."""
    return f"{name}({', '.join(f'{key}={value!r}' for key, value in settings.items())})"


def need_rate(lr: float) -> None:
    """Raise ValueError unless `lr` is a finite number, zero or more."""
    if not (isinstance(lr, (int, float)) and math.isfinite(lr) and lr >= 0):
        raise ValueError(f"A learning rate is a finite number, zero or more; lr={lr!r} was given.")


def need_fraction(**values: float) -> None:
    """Raise ValueError unless each value lies in [0, 1)."""
    for name, value in values.items():
        if not 0 <= value < 1:
            raise ValueError(f"{name} must lie in [0, 1); {name}={value!r} was given.")


def need_positive(**values: float) -> None:
    """Raise ValueError unless each value is finite and above zero."""
    for name, value in values.items():
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} must be finite and above zero; {name}={value!r} was given.")
