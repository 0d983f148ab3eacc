"""What is left to be done at moments when that is in nobody's way, by a thread for it."""

from __future__ import annotations

import queue
import threading
import time
from typing import Callable

_MOST = 256  # acts that wait; what they close is held open until then


class Later:
    """One thread. Thread-safe."""

    def __init__(self, name: str, pause: float) -> None:
        """:param pause: seconds until something is done."""
        self._pause = pause
        self._due: queue.SimpleQueue[tuple[float, Callable[[], None]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def take(self, act: Callable[[], None]) -> None:
        """Call it soon; at once, if the thread does not keep up. It may not raise."""
        if self._due.qsize() < _MOST:
            self._due.put((time.monotonic() + self._pause, act))
        else:
            act()

    def _run(self) -> None:
        while True:
            entry = self._due.get()
            if entry is None:
                return
            due, act = entry
            time.sleep(max(0.0, due - time.monotonic()))
            act()

    def stop(self) -> None:
        """Returns when all is done."""
        self._due.put(None)
        self._thread.join()
