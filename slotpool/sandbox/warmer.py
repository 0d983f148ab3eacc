"""What a call leaves to others: its end, and the start of the next shell."""

from __future__ import annotations

import functools

from .call import Call
from .cell import Cell
from .later import Later

# Shells that wait in a cell once a command has found none there, as commands come close upon another. With 3, half of those
# that come back to back take a twentieth longer; with 5, the slowest in a hundred do. In other cells it is one: most of what a
# short lease costs is the start, and the end, of shells.
_STOCK = 4
# Starting a shell takes a core for about a millisecond. Right after a call that core is needed by the caller, who gets his
# answer; and as long as one shell waits, or calls are far enough apart, the next call needs none. Where they are not, the best
# moment is the call itself: the interpreter is idle then, and with a millisecond between calls the next shell stands in time.
_PAUSE = 0.0005  # seconds; with 2 ms, one call in a hundred takes four times as long as most, back to back


class Warmer(Later):
    """It starts shells and closes what they needed."""

    def __init__(self) -> None:
        super().__init__("slotpool-warmer", _PAUSE)

    def begun(self, cell: Cell) -> None:
        """A call in ``cell`` has begun, and its end is waited for next."""
        if cell.ran_out and cell.hurried and cell.armed < _STOCK:
            self.hurry(functools.partial(cell.arm, _STOCK))

    def answered(self, cell: Cell, ended: Call | None) -> None:
        """An answer is on its way, with its result or with none yet.

        :param ended: its call, if that has ended.
        """
        cell.answered()
        self.take(functools.partial(self._tidy, cell, ended))

    def _tidy(self, cell: Cell, ended: Call | None) -> None:
        # One at a time: several in a row would keep the zygote long from telling the end of a call.
        try:
            cell.arm(_STOCK if cell.ran_out else 1)
        finally:
            if ended is not None:
                ended.close()
