"""SIGTERM, Ctrl-C and a closed terminal (SIGHUP): finish the step, save, and exit with the conventional status."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any, ClassVar


class Interruption:
    """Defers the first signal inside ``deferred()``; exits at once elsewhere, or on another signal some seconds later.

    Nested launchers, such as torchrun within srun, send the same signal twice within milliseconds.
    It exits with ``SystemExit(128 + signal number)``: 143 for SIGTERM, 130 for Ctrl-C, 129 for SIGHUP.
    """

    # A signal within this many seconds of the first counts as the same request.
    SECONDS: ClassVar[dict[signal.Signals, float]] = {signal.SIGTERM: 5.0, signal.SIGHUP: 5.0, signal.SIGINT: 1.0}

    def __init__(self) -> None:
        self.signum = 0
        self._caught = 0.0
        self._deferred = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        """Install the handlers; does nothing outside the main thread."""
        if threading.current_thread() is threading.main_thread():
            heeded = [s for s in self.SECONDS if s != signal.SIGHUP or signal.getsignal(s) != signal.SIG_IGN]  # nohup
            self._previous = {s: signal.signal(s, self._handle) for s in heeded}
        return self

    def __exit__(self, *unused: object) -> None:
        """Restore the previous handlers."""
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside this block a first signal only sets ``signum``; the process exits at the end of the block."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False
        if self.signum:
            raise SystemExit(128 + self.signum)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        first, again = self.signum == 0, now - self._caught < self.SECONDS[signal.Signals(signum)]
        if first:
            self.signum, self._caught = signum, now
        if not (self._deferred and (first or again)):
            raise SystemExit(128 + signum)


def leave_lost_workers_to_next() -> None:
    """Let only a loader's ``next`` report a dead worker; torch's handler can raise anywhere, even in an update."""
    handler = signal.getsignal(signal.SIGCHLD)
    in_main = threading.current_thread() is threading.main_thread()
    if in_main and getattr(handler, "__module__", "").startswith("torch.utils.data"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
