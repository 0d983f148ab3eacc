"""Who sees to what sandboxes leave behind."""

from __future__ import annotations

from .later import Later

_PAUSE = 0.005  # seconds; by then the slot is with whoever has waited for it


class Undertaker(Later):
    """With the last descriptor of a mount namespace, say, the kernel takes it down, which needs a millisecond, most of it in
    waiting for grace periods. Else the last process in it would do that before it is dead, while somebody waits for just that.
    """

    def __init__(self) -> None:
        super().__init__("slotpool-undertaker", _PAUSE)
