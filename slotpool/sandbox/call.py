"""One call in a sandbox: the process that a zygote starts for it, and the pipes and the socket by which the server has it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import socket
import struct
import termios
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Callable

from . import linux, zygote

if TYPE_CHECKING:
    from .cell import Cell

_MOST_TOLD = 64  # bytes of what a shell tells that are looked at
_PIPE_CHUNK = 1 << 20  # as wide as a pipe may be made by any user, see pipe(7)
_F_SETPIPE_SZ = 1031  # fcntl(2); Python has a name for it from 3.10 on


def message(fds: Sequence[str], **what: object) -> bytes:
    """What a zygote is told of a call, see there."""
    return json.dumps({**what, "fds": fds}).encode()


def descriptors(feeds: Sequence[str]) -> Sequence[str]:
    """Those that a :class:`Call` gives the zygote.

    :param feeds: what the server writes to.
    """
    return ("call", *_outputs(feeds), *feeds)


def _outputs(feeds: Sequence[str]) -> Sequence[str]:
    return ("stdout", "stderr", "told") if "script" in feeds else ("stdout", "stderr")


def widen(pipe: int) -> None:
    """Have it take a file of a usual size at once, so that who reads and who writes needn't wake each other for each part."""
    with contextlib.suppress(OSError):  # this user has as many wide pipes as he may have
        fcntl.fcntl(pipe, _F_SETPIPE_SZ, _PIPE_CHUNK)


class Feed:
    """Bytes on their way into a call's pipe."""

    __slots__ = ("fd", "more", "name", "rest")

    def __init__(self, name: str, fd: int) -> None:
        self.name = name
        self.fd = fd
        self.rest = memoryview(b"")
        self.more: Callable[[], bytes] = bytes  # gives what comes after the rest

    def refill(self) -> bool:
        self.rest = memoryview(self.more())
        return len(self.rest) > 0


class Call:
    """One process in a cell, and the near ends of its pipes. Used by one thread, but :meth:`kill` and :meth:`cancel`."""

    def __init__(self, cell: Cell, message: bytes, feeds: Sequence[str]) -> None:
        """Start it.

        :param message: for the zygote, of these :func:`descriptors`.
        :raises OSError: if the sandbox is gone or does not take orders.
        """
        self._lock = threading.Lock()  # guards the next three against kill() and cancel() from other threads
        self._ended = False
        self._cancelled = False
        self._killed = False
        self._has_told = False  # its process has told how its work has ended, and may not be dead yet
        self._script: Feed | None = None  # of a shell
        self._is_let_go = False  # a shell dies as soon as its command has ended, and not only when this is closed
        self._closed = False
        self._refuses = False  # to be sent descriptors
        self.cell = cell
        self.feeds: list[Feed] = []  # that are not written yet
        self.stdout = self.stderr = -1
        self.told = -1  # of a shell: where it tells how its command has ended
        self.sock, far_sock = socket.socketpair()
        far = [far_sock.detach()]
        try:
            self._refuses = linux.refuse_descriptors(self.sock)
            self._end_poll = select.poll()
            self._end_poll.register(self.sock, select.POLLIN)
            # Pipes, and no sockets: on those come descriptors too, and to close one can take as long as its sender wants.
            for name in _outputs(feeds):
                ours, theirs = os.pipe()
                setattr(self, name, ours)
                self._share(name, ours, theirs, far)
            for name in feeds:
                theirs, ours = os.pipe()
                self.feeds.append(Feed(name, ours))
                if name == "script":
                    self._script = self.feeds[-1]
                self._share(name, ours, theirs, far)
            cell.send(message, far)
        except BaseException:
            self.close()
            raise
        finally:
            for fd in far:
                os.close(fd)

    def _share(self, name: str, ours: int, theirs: int, far: list[int]) -> None:
        far.append(theirs)
        os.set_blocking(ours, False)  # what poll(2) has seen there, the slot may have taken away since
        # Else /dev/stdout could not be opened by the slot's user. Of the others he need not open any.
        if self.cell.changes_user and name not in ("script", "told"):
            os.fchown(theirs, self.cell.order["uid"], self.cell.order["gid"])

    def set_script(self, script: bytes, let_go: bool) -> None:
        """What a shell is still to be sent.

        :param let_go: have it die as soon as its command has ended, and not only when this is closed.
        """
        assert self._script is not None
        self._script.rest = memoryview(script + zygote.GO if let_go else script)
        self._is_let_go = let_go

    def set_feed(self, name: str, content: bytes, more: Callable[[], bytes] = bytes) -> None:
        feed = next(feed for feed in self.feeds if feed.name == name)
        feed.rest, feed.more = memoryview(content), more

    def feed(self, fd: int) -> bool:
        """Write as much as the pipe takes; True once everything is written, or nobody reads it, and the pipe needs no more."""
        return self._feed(next(feed for feed in self.feeds if feed.fd == fd))

    def _feed(self, feed: Feed) -> bool:
        try:
            while feed.rest or feed.refill():
                feed.rest = feed.rest[os.write(feed.fd, feed.rest[:_PIPE_CHUNK]) :]
        except BlockingIOError:
            return False
        except BrokenPipeError:
            pass
        self.feeds = [other for other in self.feeds if other is not feed]
        if feed is not self._script:  # whose reader knows its length, and which tells how much of it was read
            os.close(feed.fd)
        return True

    def feed_all(self) -> list[int]:
        """Write as much as the pipes take; those that take more later."""
        return [feed.fd for feed in self.feeds if not self._feed(feed)]

    def has_ended(self) -> bool:
        """Whether :meth:`read_status` would return at once."""
        return bool(self._end_poll.poll(0))

    def read_status(self) -> int | None:
        """The wait status; None if the zygote has gone without telling it, or has sent something else.

        Of a file it is the process itself that tells, if it can, and it may not be dead yet.
        """
        try:
            # An urgent byte wakes poll(2) and is not there to be read: nobody may wait here.
            told = linux.receive_bytes(self.sock, zygote.STATUS.size, socket.MSG_DONTWAIT)
        except OSError:
            return None
        self._has_told = self.told < 0
        return int(zygote.STATUS.unpack(told)[0]) if len(told) == zygote.STATUS.size else None

    def read_told(self) -> int | None:
        """The wait status that a shell has told of its command; None if it was something else, or the call is being killed:
        then its end is still to come. If it is one, the call can't be cancelled any more.
        """
        try:
            status = zygote.read_told(os.read(self.told, _MOST_TOLD))
        except OSError:
            status = None
        with self._lock:
            if status is not None and not self._killed:
                self._has_told = self._ended = True
                return status
        if self._script is not None and not self._is_let_go:
            self.set_script(bytes(self._script.rest), let_go=True)
            self._feed(self._script)
        return None

    def script_unread(self) -> bool:
        """Whether a shell has not read its script to the end. It runs nothing of it before."""
        if self._script is None:
            return False
        (left,) = struct.unpack("i", fcntl.ioctl(self._script.fd, termios.FIONREAD, b"\0" * 4))
        return bool(left > (len(zygote.GO) if self._is_let_go else 0))

    def kill(self) -> None:
        """Have the zygote kill the process and all that it started. Its status still comes."""
        with self._lock:
            self._kill()

    def cancel(self) -> None:
        """:meth:`kill`, and remember that it was asked for. Nothing if the call has ended. Thread-safe."""
        with self._lock:
            if not self._ended:
                self._cancelled = True
                self._kill()

    def _kill(self) -> None:
        self._killed = True
        try:
            self.sock.send(b"k", socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)
        except OSError:  # it has ended
            pass

    def end(self) -> bool:
        """From now on it can't be cancelled; whether it was."""
        with self._lock:
            self._ended = True
            return self._cancelled

    def close(self) -> None:
        """Close everything; a process that still runs is killed, unless it has told that it is done."""
        self.end()
        if self._closed:
            return
        self._closed = True
        if self._has_told and not self.has_ended():
            with contextlib.suppress(OSError):  # it just has
                self.sock.send(zygote.RELEASE, socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)
        if self._refuses:
            self.sock.close()
        else:  # which takes four times as long
            linux.hang_up(self.sock)
        feeds = {*self.feeds, self._script}
        for fd in (self.stdout, self.stderr, self.told, *(feed.fd for feed in feeds if feed is not None)):
            if fd >= 0:
                os.close(fd)
