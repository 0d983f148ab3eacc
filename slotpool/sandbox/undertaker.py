"""See to what sandboxes leave behind, at moments when that is in nobody's way."""

from __future__ import annotations

import queue
import threading
import time
from typing import Callable

_PAUSE = 0.005  # seconds; by then the slot is with whoever has waited for it


class Undertaker:
    """One thread. Thread-safe.

    With the last descriptor of a mount namespace, say, the kernel takes it down, which needs a millisecond, most of it in
    waiting for grace periods. Else the last process in it would do that before it is dead, while somebody waits for just that.
    """

    def __init__(self) -> None:
        self._due: queue.SimpleQueue[tuple[float, Callable[[], None]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="slotpool-undertaker", daemon=True)
        self._thread.start()

    def take(self, act: Callable[[], None]) -> None:
        """Call it soon. It may not raise."""
        self._due.put((time.monotonic() + _PAUSE, act))

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
