"""Ctrl-C between two steps, never inside one."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any


class Interrupts:
    """``with Interrupts() as stop:`` turns the first Ctrl-C into ``stop.asked``.

    A step then ends whole and the weights can be saved. A second Ctrl-C acts at once, as ever.
    Signals reach only the main thread; elsewhere nothing changes.
    """

    asked = False

    def __init__(self, active: bool = True) -> None:
        self.before = signal.getsignal(signal.SIGINT)
        main = threading.current_thread() is threading.main_thread()
        self.active = active and main and callable(self.before)

    def __enter__(self) -> Interrupts:
        if self.active:
            signal.signal(signal.SIGINT, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.asked and callable(self.before):
            self.before(number, frame)
        self.asked = True

    def __exit__(self, *exception: Any) -> None:
        if self.active:
            signal.signal(signal.SIGINT, self.before)
