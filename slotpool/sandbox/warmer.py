"""What a call leaves to be done, at moments when that is in nobody's way: its end, and the start of the next shell."""

from __future__ import annotations

import functools
import queue
import threading
import time
from typing import Callable

from .cell import Cell

_STOCK = 3  # shells that wait in each cell in use; with 2, calls back to back take a tenth longer
# Starting a shell takes a core for about a millisecond. Right after a call that core is needed by the caller, who gets his
# answer; and as long as one shell waits, the next call needs none.
_PAUSE = 0.0005  # seconds; with 2 ms, one call in a hundred takes four times as long as most, back to back


class Warmer:
    """One thread that starts shells and closes what they needed. Thread-safe."""

    def __init__(self) -> None:
        self._due: queue.SimpleQueue[tuple[float, Callable[[], None]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="slotpool-warmer", daemon=True)
        self._thread.start()

    def later(self, act: Callable[[], None]) -> None:
        """Call it soon, once the answer to a call is on its way. It may not raise."""
        self._due.put((time.monotonic() + _PAUSE, act))

    def shell_used(self, cell: Cell) -> None:
        """A shell of ``cell`` has been used, and the answer is on its way."""
        if not cell.armed:  # calls come so fast that the stock is gone
            arm(cell, 1)
        # One for one: several in a row would keep the zygote from telling the end of a call.
        self.later(functools.partial(arm, cell, _STOCK))

    def _run(self) -> None:
        while True:
            entry = self._due.get()
            if entry is None:
                return
            due, act = entry
            time.sleep(max(0.0, due - time.monotonic()))
            act()

    def stop(self) -> None:
        self._due.put(None)
        self._thread.join()


def arm(cell: Cell, stock: int) -> None:
    try:
        cell.arm(stock)
    except OSError:  # the sandbox is gone or broken; the next call finds out, and mends it
        pass
