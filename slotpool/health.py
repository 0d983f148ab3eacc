"""The thread that keeps leases alive and containers in order, as long as its pool lives."""

from __future__ import annotations

import logging
import queue
import threading
import time
import weakref
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .pool import SlotPool

log = logging.getLogger(__name__)


class HealthThread:
    """Calls the pool's ``_tend`` in each period, and at once when woken. It does not keep the pool from being collected."""

    def __init__(self, pool: SlotPool) -> None:
        self._pool = weakref.ref(pool, lambda _: self._wakes.put(False))
        # Three renewals in a time to live, so that two may be lost.
        self._period = min(pool.config.health_check_interval, pool.config.lease_ttl / 3)
        # Not an Event: a finalizer wakes this thread, and only this queue may be used amid anything.
        self._wakes: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="slotpool-health", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def wake(self) -> None:
        """Look now. From any thread, a finalizer too."""
        self._wakes.put(True)

    def stop(self) -> None:
        """End; waits for it, unless it is this thread."""
        self._wakes.put(False)
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self) -> None:
        due = time.monotonic() + self._period
        while True:
            try:
                if not self._wakes.get(timeout=max(0.0, due - time.monotonic())):
                    return
                while not self._wakes.empty():  # many wakes, one look
                    if not self._wakes.get():
                        return
            except queue.Empty:
                pass
            due = time.monotonic() + self._period
            pool: SlotPool | None = self._pool()
            if pool is None:
                return
            try:
                pool._tend()
            except Exception:
                log.exception("the health check failed; this is a defect of slotpool")
            del pool
