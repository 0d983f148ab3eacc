"""What is left to be done at moments when that is in nobody's way, by a thread for it."""

from __future__ import annotations

import heapq
import itertools
import logging
import os
import threading
import time
from typing import Callable

from . import linux

log = logging.getLogger(__name__)

_MOST = 256  # acts that wait; what they close is held open until then


class Later:
    """One thread. Thread-safe.

    It is woken by a timer, when something is due, and not by who leaves that to it, unless that is in a hurry: to wake a thread
    takes a moment of the one that does, and the interpreter from it.
    """

    def __init__(self, name: str, pause: float) -> None:
        """
        :param pause: seconds until something is done.
        :raises RuntimeError: the thread can't be had now.
        """
        self._pause = pause
        self._timer = linux.timer()
        self._lock = threading.Lock()  # guards the rest
        # A heap. Each has its moment, on the monotonic clock, and a number: of two with one moment the earlier comes first.
        self._acts: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        try:
            self._thread.start()
        except RuntimeError:
            os.close(self._timer)
            raise

    def take(self, act: Callable[[], None]) -> None:
        """Call it soon; at once, if the thread does not keep up, or was stopped. It should not raise."""
        if not self._keep(act, self._pause):
            act()

    def hurry(self, act: Callable[[], None]) -> None:
        """Call it without a pause; not at all, if the thread does not keep up, or was stopped. It should not raise."""
        self._keep(act, 0.0)

    def _keep(self, act: Callable[[], None], pause: float) -> bool:
        with self._lock:
            if len(self._acts) >= _MOST or self._stopped:
                return False
            due = time.monotonic() + pause
            if not self._acts or due < self._acts[0][0]:  # else the timer is set, or the thread is about to look what is due
                linux.set_timer(self._timer, pause)
            heapq.heappush(self._acts, (due, next(self._numbers), act))
            return True

    def _run(self) -> None:
        stopped = False
        while not stopped:
            os.read(self._timer, 8)
            for act in iter(self._next, None):
                try:
                    act()
                except Exception:
                    log.exception("what was left for later failed; this is a defect of slotpool")
            with self._lock:
                stopped = self._stopped and not self._acts
        os.close(self._timer)

    def _next(self) -> Callable[[], None] | None:
        """What is due. If nothing is, the timer is set for what will be."""
        with self._lock:
            if not self._acts:
                return None
            due, _, act = self._acts[0]
            pause = due - time.monotonic()
            if pause > 0 and not self._stopped:
                linux.set_timer(self._timer, pause)
                return None
            heapq.heappop(self._acts)
            return act

    def stop(self) -> None:
        """Returns when all is done, whether its moment has come or not. Repeatable."""
        with self._lock:
            if not self._stopped:
                self._stopped = True
                linux.set_timer(self._timer, 0.0)
        self._thread.join()
