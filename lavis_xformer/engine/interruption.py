"""SIGTERM and Ctrl-C: finish the step, save, and leave with the conventional status."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any


class Interruption:
    """Catches the first signal inside ``deferred()``; anywhere else, or again, it exits at once.

    Exiting is ``SystemExit(128 + signal number)``: 143 for SIGTERM, 130 for Ctrl-C.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        """Nothing is caught before the ``with`` block."""
        self.signum = 0
        self._deferred = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        """Install the handlers; does nothing outside of the main thread."""
        if threading.current_thread() is threading.main_thread():
            self._previous = {s: signal.signal(s, self._handle) for s in self.SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Put the handlers back that were there before."""
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """In this block a first signal only sets ``signum``; at its end the process leaves."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False
        if self.signum:
            raise SystemExit(128 + self.signum)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        first = self.signum == 0
        self.signum = signum
        if not (self._deferred and first):
            raise SystemExit(128 + signum)
