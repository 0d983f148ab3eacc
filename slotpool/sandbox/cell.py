"""The server's hands on sandboxes: one of them (a *cell*), one call in it.

A slot gets a new cell for each lease: when a lease ends, its sandbox is destroyed as a whole, so nothing of it is left
to be cleaned but the workspace.
"""

from __future__ import annotations

import array
import contextlib
import errno
import fcntl
import functools
import json
import os
import select
import socket
import struct
import termios
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Callable

from ..errors import SandboxStartFailed
from . import linux, nursery, zygote
from .nursery_process import NurseryProcess
from .undertaker import Undertaker

if TYPE_CHECKING:
    from .order import Order

START_LIMIT = 10.0  # seconds for a sandbox to stand
DEATH_LIMIT = 10.0  # seconds for all its processes to die
_MOST_TOLD = 64  # bytes of what a shell tells that are looked at
_PIPE_CHUNK = 1 << 20  # as wide as a pipe may be made by any user, see pipe(7)
_F_SETPIPE_SZ = 1031  # fcntl(2); Python has a name for it from 3.10 on


def start(nursery: NurseryProcess, order: Order) -> Cell:
    """Ask for a sandbox. It stands once :meth:`Cell.wait_ready` has returned.

    :raises SandboxStartFailed, OSError: nothing was started.
    """
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with contextlib.ExitStack() as ours:
        ours.callback(near.close)
        with far:
            lifeline, far_lifeline = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            ours.callback(lifeline.close)
            with far_lifeline:
                nursery.order(order, far, far_lifeline)
        ours.pop_all()
    return Cell(order, near, lifeline, nursery.undertaker)


class Cell:
    """One sandbox. Thread-safe; calls in it may run side by side.

    :ivar hurried: a call has found no shell waiting.
    """

    def __init__(self, order: Order, control: socket.socket, lifeline: socket.socket, undertaker: Undertaker) -> None:
        self.order = order
        self._undertaker = undertaker
        self._control = control
        self._lifeline = lifeline
        self._lock = threading.Lock()  # guards what follows up to _destroyed, and that the sockets aren't closed while in use
        self._armed: list[Call] = []
        self._arming = 0
        self.hurried = False
        self._destroyed = False
        self._ending = threading.Lock()  # guards the next two, so that of several who destroy it each learns how that went
        self._dead: bool | None = None  # None for as long as it is not known
        self._has_waited = False

    def wait_ready(self) -> None:
        """Wait until a zygote stands in it.

        :raises SandboxStartFailed: it does not; what there is of it is still to be destroyed.
        """
        self._control.settimeout(START_LIMIT)
        try:
            told = self._control.recv(8192)
        except socket.timeout:
            raise SandboxStartFailed(f"the sandbox did not stand within {START_LIMIT:.0f} s") from None
        self._control.settimeout(None)
        linux.refuse_descriptors(self._control)
        if told != zygote.READY:
            why = told[len(zygote.ERROR) :].decode("utf-8", "replace") if told else "its process ended at once"
            raise SandboxStartFailed(f"the sandbox could not be made: {why}")

    @property
    def armed(self) -> int:
        """How many shells wait for a script."""
        return len(self._armed)

    def arm(self, stock: int = 1) -> None:
        """Start a shell that waits for a script, if fewer than ``stock`` wait, so that :meth:`shell` needn't start one.

        If none can be started, the sandbox is gone or broken, or this process short of something: the next call finds out.
        """
        with self._lock:
            if self._destroyed or len(self._armed) + self._arming >= stock:
                return
            self._arming += 1
        call = None
        try:
            with contextlib.suppress(OSError):
                call = self._new_shell(stdin=False)
        finally:
            with self._lock:
                self._arming -= 1
                kept = call is not None and not self._destroyed
                if call is not None and kept:
                    self._armed.append(call)
        if call is not None and not kept:
            call.close()

    def shell(self, script: bytes, stdin: bytes | None) -> Call:
        """A bash that runs ``script``, already waiting if :meth:`arm` was called."""
        call = (self._take_armed() if stdin is None else None) or self._new_shell(stdin=stdin is not None)
        call.set_feed("script", zygote.framed(script))
        if self.hurried:
            call.let_go()
        if stdin is not None:
            call.set_feed("stdin", stdin)
        else:
            call.feed_all()  # at once, so that the shell gets on with it while this process prepares for its end
        return call

    def _take_armed(self) -> Call | None:
        killed = False
        while True:
            with self._lock:
                if not self._armed:
                    if not killed:
                        self.hurried = True
                    return None
                call = self._armed.pop(0)
            if not call.has_ended():
                return call
            call.close()
            killed = True  # by what the slot ran before

    def drop_armed(self) -> None:
        """Close the waiting shells, as one of them was killed and the others may have been too, unnoticed yet."""
        with self._lock:
            armed, self._armed = self._armed, []
        for call in armed:
            call.close()

    def _new_shell(self, stdin: bool) -> Call:
        return Call(self, {"op": "shell"}, feeds=("script", "stdin") if stdin else ("script",))

    def read(self, path: str, limit: int, sized: bool = False) -> Call:
        call = Call(self, {"op": "read", "path": path, "limit": limit, "sized": sized}, feeds=())
        _widen(call.stdout)
        return call

    def write(self, path: str, size: int, content: bytes = b"", more: Callable[[], bytes] = bytes) -> Call:
        """:param more: gives what comes after ``content``, some at a time, then nothing."""
        call = Call(self, {"op": "write", "path": path, "size": size}, feeds=("stdin",))
        call.set_feed("stdin", content, more)
        _widen(call.feeds[0].fd)
        return call

    def send(self, order: dict[str, object], fds: Sequence[int]) -> None:
        with self._lock:
            if self._destroyed:
                raise OSError(errno.EPIPE, "the sandbox is gone")
            # A zygote that doesn't read would make this block; socket.send_fds ignores its flags.
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
            self._control.sendmsg([json.dumps(order).encode()], rights, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)

    def destroy(self, meanwhile: Callable[[], None] = lambda: None) -> bool:
        """Kill every process in it; True if it is certain that none is left. Calls in it end as lost.

        Repeatable: what was not dead in time may be by then. It is waited for but once.

        :param meanwhile: what can be done while they die.
        """
        with self._lock:
            self._destroyed = True
            armed, self._armed = self._armed, []
        with self._ending:
            namespaces: list[int] = []
            if self._dead is None:
                self._dead, namespaces = self._end(meanwhile)
            # Calls not before: the zygote would look for the processes of each, only to die with them.
            self._undertaker.take(functools.partial(self._close, armed, namespaces))
            return self._dead is True

    def _end(self, meanwhile: Callable[[], None]) -> tuple[bool | None, list[int]]:
        """Whether its processes are dead, and what is to be closed then."""
        try:
            self._lifeline.shutdown(socket.SHUT_WR)
            if self.order["mode"] != "none" and self._control.fileno() >= 0:  # as it is the first time
                # Its zygote's death takes as long as all others', and the nursery comes to it only later: so it ends by itself.
                self._control.shutdown(socket.SHUT_WR)
            meanwhile()
            self._lifeline.settimeout(0.0 if self._has_waited else DEATH_LIMIT)
            self._has_waited = True
            told, namespaces = linux.receive(self._lifeline, 64, 8)
        except (socket.timeout, BlockingIOError):
            self._control.close()
            return None, []
        except OSError:
            return False, []
        return told == nursery.DEAD, namespaces

    def _close(self, calls: Sequence[Call], namespaces: Sequence[int]) -> None:
        for call in calls:
            call.close()
        if self._dead is not None:
            self._control.close()
            self._lifeline.close()
        for fd in namespaces:
            os.close(fd)


def _widen(pipe: int) -> None:
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

    def __init__(self, cell: Cell, order: dict[str, object], feeds: Sequence[str]) -> None:
        """Start it.

        :raises OSError: if the sandbox is gone or does not take orders.
        """
        self._lock = threading.Lock()  # guards the next three against kill() and cancel() from other threads
        self._ended = False
        self._cancelled = False
        self._killed = False
        self._has_told = False  # its process has told how its work has ended, and may not be dead yet
        self._is_let_go = False  # see let_go()
        self._closed = False
        self.cell = cell
        self.feeds: list[Feed] = []
        self.stdout = self.stderr = -1
        self.told = -1  # of a shell: where it tells how its command has ended
        with contextlib.ExitStack() as far, contextlib.ExitStack() as near:
            self.sock, far_sock = socket.socketpair()
            linux.refuse_descriptors(self.sock)
            self._end_poll = select.poll()
            self._end_poll.register(self.sock, select.POLLIN)
            near.callback(self.sock.close)
            far.callback(far_sock.close)
            given = {"call": far_sock.fileno()}
            # Pipes, and no sockets: on those come descriptors too, and to close one can take as long as its sender wants.
            outputs = ("stdout", "stderr", "told") if "script" in feeds else ("stdout", "stderr")
            for name in (*outputs, *feeds):
                ours, theirs = os.pipe()
                if name in feeds:
                    ours, theirs = theirs, ours
                    self.feeds.append(Feed(name, ours))
                else:
                    setattr(self, name, ours)
                os.set_blocking(ours, False)  # what poll(2) has seen there, the slot may have taken away since
                near.callback(os.close, ours)
                far.callback(os.close, theirs)
                given[name] = theirs
                # Else /dev/stdout could not be opened by the slot's user. Of the others he need not open any.
                if cell.order["uid"] != os.geteuid() and name not in ("script", "told"):
                    os.fchown(theirs, cell.order["uid"], cell.order["gid"])
            cell.send({**order, "fds": list(given)}, list(given.values()))
            near.pop_all()  # close() sees to these from now on

    def set_feed(self, name: str, content: bytes, more: Callable[[], bytes] = bytes) -> None:
        feed = next(feed for feed in self.feeds if feed.name == name)
        feed.rest, feed.more = memoryview(content), more

    def feed(self, fd: int) -> bool:
        """Write as much as the pipe takes; True once everything is written, or nobody reads it, and the pipe needs no more."""
        return self._feed(next(feed for feed in self.feeds if feed.fd == fd))

    def _feed(self, feed: Feed) -> bool:
        fd = feed.fd
        try:
            while feed.rest or feed.refill():
                feed.rest = feed.rest[os.write(fd, feed.rest[:_PIPE_CHUNK]) :]
        except BlockingIOError:
            return False
        except BrokenPipeError:
            pass
        if feed.name != "script":  # whose reader knows its length, and which tells how much of it was read
            self.feeds.remove(feed)
            os.close(fd)
        return True

    def feed_all(self) -> list[int]:
        """Write as much as the pipes take; those that take more later."""
        return [feed.fd for feed in list(self.feeds) if not self._feed(feed)]

    def has_ended(self) -> bool:
        """Whether :meth:`read_status` would return at once."""
        return bool(self._end_poll.poll(0))

    def read_status(self) -> int | None:
        """The wait status; None if the zygote has gone without telling it, or has sent something else.

        Of a file it is the process itself that tells, if it can, and it may not be dead yet.
        """
        try:
            # An urgent byte wakes poll(2) and is not there to be read: nobody may wait here.
            told = self.sock.recv(zygote.STATUS.size, socket.MSG_DONTWAIT)
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
        if not self._is_let_go:
            self._feed(self.let_go())
        return None

    def let_go(self) -> Feed:
        """Have a shell die as soon as its command has ended, and not only when this is closed. At most once.

        :return: what is to be written for that.
        """
        self._is_let_go = True
        script = next(feed for feed in self.feeds if feed.name == "script")
        script.rest = memoryview(bytes(script.rest) + zygote.GO)
        return script

    def script_unread(self) -> bool:
        """Whether a shell has not read its script to the end. It runs nothing of it before."""
        script = next((feed.fd for feed in self.feeds if feed.name == "script"), None)
        if script is None:
            return False
        (left,) = struct.unpack("i", fcntl.ioctl(script, termios.FIONREAD, b"\0" * 4))
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
        self.sock.close()
        for fd in (self.stdout, self.stderr, self.told, *(feed.fd for feed in self.feeds)):
            if fd >= 0:
                os.close(fd)
