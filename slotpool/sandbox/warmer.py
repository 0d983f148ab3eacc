"""What a call leaves to be done: its end, and the start of the next shell."""

from __future__ import annotations

import functools

from .cell import Cell
from .later import Later

# Shells that wait in a cell whose calls come one close upon another; with 2, calls back to back take a tenth longer. In others
# it is one: most of what a short lease costs is the start, and the end, of shells.
_STOCK = 3
# Starting a shell takes a core for about a millisecond. Right after a call that core is needed by the caller, who gets his
# answer; and as long as one shell waits, or calls are far enough apart, the next call needs none.
_PAUSE = 0.0005  # seconds; with 2 ms, one call in a hundred takes four times as long as most, back to back


class Warmer(Later):
    """It starts shells and closes what they needed."""

    def __init__(self) -> None:
        super().__init__("slotpool-warmer", _PAUSE)

    def shell_used(self, cell: Cell) -> None:
        """A shell of ``cell`` has been used, and the answer is on its way."""
        if cell.hurried and not cell.armed:  # calls come so fast that the stock is gone
            cell.arm()
        # One for one: several in a row would keep the zygote from telling the end of a call.
        self.take(functools.partial(cell.arm, _STOCK if cell.hurried else 1))
