"""What a zygote does itself with a slot's files: open one, and lend the descriptor to the server, which moves the content.

That is for plain files of the workspace. Whatever is anything else is refused here, and left to :mod:`.files` in a process of
its own: a zygote serves all calls of its slot, so none of this may block, and no path may lead it to a place where it could.

The descriptor comes on the call's socket with an errno of 0, see :data:`ANSWER`; a refusal is another one. What was lent with
``open`` is to be read. With ``create`` it is a new file beside the one that is to be replaced, with room for its content: then
:data:`COMMIT` from the other side puts it in place, which is answered with an errno, and an end of file removes it.
"""

from __future__ import annotations

import errno
import os
import socket
import struct

from . import files, linux
from .poller import Poller

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

ANSWER = struct.Struct("!i")
COMMIT = b"c"
MOST_ROOM = 1 << 24  # bytes that are made room for; on a tmpfs that takes a while
_WITHIN = linux.RESOLVE_NO_XDEV | linux.RESOLVE_NO_MAGICLINKS


class Lender:
    """Part of a zygote, in its event loop."""

    def __init__(self, poller: Poller) -> None:
        self._poller = poller

    def lend(self, order: dict[str, Any], sock: socket.socket) -> None:
        """Carry out ``order``; ``sock`` is its call's."""
        try:
            if order["op"] == "open":
                self._open(order["path"], sock)
            else:
                self._create(order["path"], order["size"], sock)
        except OSError as e:
            _answer(sock, e.errno or errno.EIO)
            sock.close()

    def _open(self, path: str, sock: socket.socket) -> None:
        fd = linux.openat2(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY, _WITHIN)
        try:
            files.require_regular(os.fstat(fd))
            _answer(sock, 0, fd)
        finally:
            os.close(fd)
        sock.close()

    def _create(self, path: str, size: int, sock: socket.socket) -> None:
        directory, name = os.path.split(path)
        within = linux.openat2(directory or ".", os.O_PATH | os.O_DIRECTORY, _WITHIN)
        replacement = files.Replacement(within, name)
        try:
            replacement.take_room(size)
            if not _answer(sock, 0, replacement.fd):
                raise OSError(errno.EPIPE, "it can't be lent")
        except BaseException:
            replacement.close()
            raise
        self._poller.watch(sock.fileno(), lambda: self._hear(sock, replacement))

    def _hear(self, sock: socket.socket, replacement: files.Replacement) -> None:
        self._poller.unwatch(sock.fileno())
        try:
            if sock.recv(1) == COMMIT:
                replacement.put_in_place()
                _answer(sock, 0)
        except OSError as e:
            _answer(sock, e.errno or errno.EIO)
        finally:
            replacement.close()
            sock.close()


def _answer(sock: socket.socket, code: int, *fds: int) -> bool:
    """Whether it is on its way: the server may have given it up, or too many descriptors of this user are on theirs."""
    try:
        socket.send_fds(sock, [ANSWER.pack(code)], fds, socket.MSG_NOSIGNAL)
    except OSError:
        return False
    return True
