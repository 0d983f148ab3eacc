"""The thread that keeps leases alive and containers in order, as long as its pool lives."""

from __future__ import annotations

import logging
import queue
import threading
import time
import weakref
from typing import Callable

log = logging.getLogger(__name__)


class HealthThread:
    """Calls a method of its pool in each period, and at once when woken. It does not keep the pool from being collected.

    :param tend: the bound method.
    :param period: seconds.
    """

    def __init__(self, tend: Callable[[], None], period: float) -> None:
        self._tend = weakref.WeakMethod(tend, lambda _: self._wakes.put(None))
        self._period = period
        # Seconds until the next look, or None to end. Not an Event: a finalizer wakes this thread, and only this queue may
        # be used amid anything.
        self._wakes: queue.SimpleQueue[float | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="slotpool-health", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def wake(self, after: float = 0.0) -> None:
        """Look in ``after`` seconds at the latest. From any thread, a finalizer too."""
        self._wakes.put(after)

    def stop(self) -> None:
        """End; waits for it, unless it is this thread."""
        self._wakes.put(None)
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self) -> None:
        due = time.monotonic() + self._period
        while True:
            try:
                after = self._wakes.get(timeout=max(0.0, due - time.monotonic()))
                if after is None:
                    return
                due = min(due, time.monotonic() + after)
                continue
            except queue.Empty:
                due = time.monotonic() + self._period
            tend = self._tend()
            if tend is None:
                return
            try:
                tend()
            except Exception:
                log.exception("the health check failed; this is a defect of slotpool")
            del tend
