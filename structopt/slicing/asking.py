"""What is asked of an argument before it is used."""

from __future__ import annotations

import math
from typing import Any

from structopt.losses.checks import real


def check_seconds(timeout: Any) -> None:
    if not 0 < real(timeout) < math.inf:
        raise ValueError(f"timeout={timeout!r}: give seconds, above 0")
