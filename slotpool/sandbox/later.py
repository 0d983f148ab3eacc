"""What is left to be done at moments when that is in nobody's way, by a thread for it."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from typing import Callable

from . import linux

log = logging.getLogger(__name__)

_MOST = 256  # acts that wait; what they close is held open until then


class Later:
    """One thread. Thread-safe.

    It is woken by a timer, when something is due, and not by who leaves that to it: to wake a thread takes a moment of the one
    that does, and the interpreter from it.
    """

    def __init__(self, name: str, pause: float) -> None:
        """:param pause: seconds until something is done."""
        self._pause = pause
        self._timer = linux.timer()
        self._lock = threading.Lock()  # guards the rest
        self._acts: deque[tuple[float, Callable[[], None]]] = deque()  # each with its moment, on the monotonic clock
        self._is_set = False  # the timer, or the thread is about to look what is due
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def take(self, act: Callable[[], None], at_once: bool = False) -> None:
        """Call it soon; in this thread, if the other does not keep up, or was stopped. It should not raise.

        :param at_once: before all that waits, and without a pause.
        """
        with self._lock:
            kept = len(self._acts) < _MOST and not self._stopped
            if kept and at_once:
                self._acts.appendleft((0.0, act))
                self._is_set = True
                linux.set_timer(self._timer, 0.0)
            elif kept:
                self._acts.append((time.monotonic() + self._pause, act))
                if not self._is_set:
                    self._is_set = True
                    linux.set_timer(self._timer, self._pause)
        if not kept:
            act()

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
                self._is_set = False
                return None
            due, act = self._acts[0]
            pause = due - time.monotonic()
            if pause > 0 and not self._stopped:
                linux.set_timer(self._timer, pause)
                return None
            self._acts.popleft()
            return act

    def stop(self) -> None:
        """Returns when all is done, whether its moment has come or not. Repeatable."""
        with self._lock:
            if not self._stopped:
                self._stopped = True
                linux.set_timer(self._timer, 0.0)
        self._thread.join()
