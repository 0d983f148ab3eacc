"""A slot's file that the server moves itself, by a descriptor that the slot's zygote has opened, see :mod:`.lender`.

So it is the slot's own rights that count, and no path is followed here. Nor is what comes trusted: it must be a regular file of
the file system that the workspace is on, as the kernel tells that. Then nothing that the slot has made is behind it which could
hold up who reads it, as a FIFO would, or a file system of the slot's own.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat

from . import lender, linux
from .call import message
from .cell import Cell

_PATIENCE = 2.0  # seconds for the zygote to answer; it has little to do
_MOST_ERRNO = 4096
_COMMIT_PATIENCE = 20.0  # seconds for it to put a file in place, as that may wait for a disk


class Loan:
    """A descriptor, and what becomes of it. Used by one thread, which closes it."""

    def __init__(self, sock: socket.socket, fd: int) -> None:
        self._sock = sock
        self.fd = fd

    def commit(self) -> int | None:
        """Have what was created take its place: 0, or the errno; None if the zygote did not tell something sensible."""
        try:
            self._sock.settimeout(_COMMIT_PATIENCE)
            self._sock.send(lender.COMMIT, socket.MSG_NOSIGNAL)
            told = linux.receive_bytes(self._sock, lender.ANSWER.size)
        except OSError:
            return None
        if len(told) != lender.ANSWER.size:
            return None
        (code,) = lender.ANSWER.unpack(told)
        return int(code) if 0 <= code < _MOST_ERRNO else None

    def close(self) -> None:
        os.close(self.fd)
        linux.hang_up(self._sock)


def to_read(cell: Cell, path: str, device: int | None) -> Loan | None:
    """The file at ``path``, which is below the workspace; None if it has to be read in the slot, or to be found there why not.

    :param device: the workspace's; None if that is not known here.
    """
    return _borrow(cell, {"op": "open", "path": path}, device)


def to_replace(cell: Cell, path: str, size: int, device: int | None) -> Loan | None:
    """A new file of ``size`` bytes, to be put in place of ``path``; None if that has to be written in the slot."""
    if size > lender.MOST_ROOM:
        return None
    return _borrow(cell, {"op": "create", "path": path, "size": size}, device)


def _borrow(cell: Cell, order: dict[str, object], device: int | None) -> Loan | None:
    if device is None:
        return None
    try:
        sock, far = socket.socketpair()
    except OSError:  # of what there is too little, who moves the file in the slot will tell
        return None
    sock.settimeout(_PATIENCE)
    try:
        with far:
            cell.send(message(["call"], **order), [far.fileno()])
        told, fds = linux.receive(sock, lender.ANSWER.size, linux.MOST_DESCRIPTORS)
    except OSError:  # and whatever is wrong with the sandbox
        linux.hang_up(sock)
        return None
    linux.refuse_descriptors(sock)
    lent = fds.pop(0) if told == lender.ANSWER.pack(0) and fds and _is_plain(fds[0], device) else None
    for fd in fds:  # of one that sends more than was asked for, say
        linux.close_received(fd)
    if lent is not None:
        return Loan(sock, lent)
    _give_up(sock)
    return None


def _give_up(sock: socket.socket) -> None:
    """What the zygote may have made must be gone before another process makes it: there may be no room for both."""
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_WR)
        linux.receive_bytes(sock, 1)
    linux.hang_up(sock)


def _is_plain(fd: int, device: int) -> bool:
    try:
        info = os.fstat(fd)
    except OSError:
        return False
    return stat.S_ISREG(info.st_mode) and info.st_dev == device
