"""Signals that end a run: the current step ends, and all is saved."""

from __future__ import annotations

import signal
import time
from typing import Any

__all__ = ["Signals", "end_at_once"]

# A terminal's Ctrl-C, a scheduler's notice, a terminal that closes.
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Signals:
    """Context manager that records SIGINT, SIGTERM and SIGHUP, so that the current step can end; a second one kills.

    Under torchrun one Ctrl-C arrives twice, from the terminal and from torchrun: signals within two seconds count as
    one. A signal that is ignored stays so: ``nohup`` and shells' background jobs are started that way.
    """

    def __init__(self) -> None:
        self.received = 0
        self._at = 0.0
        self._before: dict[signal.Signals, Any] = {}

    def _note(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        if self.received and now - self._at > 2:
            # Not Python's own handler: KeyboardInterrupt would end in a traceback.
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        elif not self.received:
            self.received, self._at = number, now

    def __enter__(self) -> Signals:
        self._before = {
            number: signal.signal(number, self._note)
            for number in _ENDING
            if signal.getsignal(number) is not signal.SIG_IGN
        }
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def end_at_once() -> None:
    """Lets SIGINT end this process without KeyboardInterrupt, outside of :class:`Signals`: nothing is to be saved."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
