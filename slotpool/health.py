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
    :param orphaned: called, as the last, if the pool has been collected.
    """

    def __init__(self, tend: Callable[[], None], period: float, orphaned: Callable[[], None]) -> None:
        self._tend = weakref.WeakMethod(tend, lambda _: self._wakes.put(0.0))
        self._period = period
        self._orphaned = orphaned
        # Seconds until the next look, what to call and when, or None to end. Not an Event: a finalizer wakes this thread, and
        # only this queue may be used amid anything.
        self._wakes: queue.SimpleQueue[float | tuple[float, Callable[[], None]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="slotpool-health", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def call(self, after: float, act: Callable[[], None]) -> None:
        """Call ``act``, which may not take long, in ``after`` seconds, if the thread still runs then. From any thread."""
        self._wakes.put((time.monotonic() + after, act))

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
        calls: list[tuple[float, Callable[[], None]]] = []
        while True:
            first = min([due, *(at for at, _ in calls)])
            try:
                told = self._wakes.get(timeout=max(0.0, first - time.monotonic()))
            except queue.Empty:
                pass
            else:
                if told is None:
                    return
                if isinstance(told, tuple):
                    calls.append(told)
                else:
                    due = min(due, time.monotonic() + told)
                continue
            now = time.monotonic()
            ripe = [act for at, act in calls if at <= now]
            calls = [call for call in calls if call[0] > now]
            if due <= now:
                due = now + self._period
                tend = self._tend()
                if tend is None:
                    _guarded(self._orphaned)
                    return
                ripe.append(tend)
                del tend
            while ripe:
                _guarded(ripe.pop(0))


def _guarded(act: Callable[[], None]) -> None:
    try:
        act()
    except Exception:
        log.exception("the health check failed; this is a defect of slotpool")
