"""Take down the namespaces of sandboxes that have ended, at moments when that is in nobody's way."""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Sequence

_PAUSE = 0.005  # seconds; by then the slot is with whoever has waited for it


class Undertaker:
    """One thread that closes descriptors. Thread-safe.

    With the last descriptor of a mount namespace the kernel takes it down, which needs a millisecond, most of it in waiting for
    grace periods. Else the last process in there would have to do that before it is dead, while somebody waits for just that.
    """

    def __init__(self) -> None:
        self._due: queue.SimpleQueue[tuple[float, Sequence[int]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="slotpool-undertaker", daemon=True)
        self._thread.start()

    def take(self, fds: Sequence[int]) -> None:
        """They are closed soon."""
        self._due.put((time.monotonic() + _PAUSE, fds))

    def _run(self) -> None:
        while True:
            entry = self._due.get()
            if entry is None:
                return
            due, fds = entry
            time.sleep(max(0.0, due - time.monotonic()))
            for fd in fds:
                os.close(fd)

    def stop(self) -> None:
        """Returns when all are closed."""
        self._due.put(None)
        self._thread.join()
