"""Cells without sandboxes, where what is at the other side is the test's; and what is in real ones."""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path
from typing import Any, Callable

from slotpool.sandbox import killing
from slotpool.sandbox.cell import Cell


class _AtOnce:
    """An undertaker that doesn't wait."""

    def take(self, act: Callable[[], None]) -> None:
        act()


def new_cell(stack: contextlib.ExitStack, mode: str = "user") -> tuple[Cell, socket.socket, socket.socket]:
    """A sandbox from the server's side, and the far ends of its control socket and its lifeline."""
    order: Any = {"mode": mode, "uid": os.geteuid(), "gid": os.getegid()}
    control, far_control = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    lifeline, far_lifeline = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    stack.callback(far_control.close)
    stack.callback(far_lifeline.close)
    return Cell(order, control, lifeline, _AtOnce()), far_control, far_lifeline  # type: ignore[arg-type]


def zygotes(nursery: int) -> set[int]:
    """Of all sandboxes that this process has made; its other children are bubblewraps."""
    found = set()
    for pid in killing.children(nursery):
        with contextlib.suppress(FileNotFoundError):  # a bubblewrap that has just ended
            if Path(f"/proc/{pid}/comm").read_text() != "bwrap\n":
                found.add(pid)
    return found
