"""A sandbox as the server has it: a *cell*.

A slot gets a new cell for each lease: when a lease ends, its sandbox is destroyed as a whole, so nothing of it is left
to be cleaned but the workspace.
"""

from __future__ import annotations

import array
import contextlib
import errno
import functools
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Callable

from ..errors import SandboxStartFailed
from . import linux, sandboxes, zygote
from .call import Call, descriptors, message, widen
from .nursery_process import NurseryProcess
from .undertaker import Undertaker

if TYPE_CHECKING:
    from .order import Order

START_LIMIT = 10.0  # seconds for a sandbox to stand
DEATH_LIMIT = 10.0  # seconds for all its processes to die
# Seconds from an answer, within which a command comes close upon it. With less between them a tenth is gained, on two
# processors, by starting the next shell while a command runs, and by having its own die as it ends; with more it costs a tenth.
_SOON = 0.002
# Made once, as that of a shell is on the warm path of a command.
_SHELL_MESSAGES = {feeds: message(descriptors(feeds), op="shell") for feeds in (("script",), ("script", "stdin"))}


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

    :ivar changes_user: its processes are another user's than this one is.
    :ivar ran_out: a command has found no shell waiting.
    :ivar hurried: the last command has, or came close upon an answer. Nothing but speed depends on it: commands side by side
        may each set it for others.
    """

    def __init__(self, order: Order, control: socket.socket, lifeline: socket.socket, undertaker: Undertaker) -> None:
        self.order = order
        self.changes_user = order["uid"] != os.geteuid()
        self._undertaker = undertaker
        self._control = control
        self._lifeline = lifeline
        lifeline.setblocking(False)  # it is read where something has come
        self._first: list[int] = []  # what comes with sandboxes.FIRST
        self.hurried = False
        self._answered = 0.0  # when the last answer was, on the monotonic clock
        self._lock = threading.Lock()  # guards what follows up to _destroyed, and that the sockets aren't closed while in use
        self._armed: list[Call] = []
        self._arming = 0
        self.ran_out = False
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
        # So that nothing more comes: what is sent by others, who have got hold of its far end, could take long to be closed, as
        # linux.refuse_descriptors() tells.
        self._control.shutdown(socket.SHUT_RD)
        if told != zygote.READY:
            why = told[len(zygote.ERROR) :].decode("utf-8", "replace") if told else "its process ended at once"
            raise SandboxStartFailed(f"the sandbox could not be made: {why}")
        if self.order["mode"] == "bwrap":  # where that has come before the zygote was made
            self._first = self._receive_first()

    def _receive_first(self) -> list[int]:
        try:
            told, fds = linux.receive(self._lifeline, 64, sandboxes.FIRST_FDS)
        except BlockingIOError:
            told, fds = b"", []
        if told == sandboxes.FIRST and fds:
            return fds
        for fd in fds:
            os.close(fd)
        why = "this server has as many as it may have" if told == sandboxes.FIRST else f"got {told!r}"
        raise SandboxStartFailed(f"expected a descriptor of the sandbox's first process: {why}")

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
        self.hurried = time.monotonic() - self._answered < _SOON
        call = (self._take_armed() if stdin is None else None) or self._new_shell(stdin=stdin is not None)
        call.set_script(zygote.framed(script), let_go=self.ran_out and self.hurried)
        if stdin is not None:
            call.set_feed("stdin", stdin)
        else:
            call.feed_all()  # at once, so that the shell gets on with it while this process prepares for its end
        return call

    def answered(self) -> None:
        """A call in it is being answered."""
        self._answered = time.monotonic()

    def _take_armed(self) -> Call | None:
        killed = False
        while True:
            with self._lock:
                if not self._armed:
                    if not killed:
                        self.ran_out = self.hurried = True
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
        feeds = ("script", "stdin") if stdin else ("script",)
        return Call(self, _SHELL_MESSAGES[feeds], feeds)

    def read(self, path: str, limit: int, sized: bool = False) -> Call:
        call = self._file_call((), op="read", path=path, limit=limit, sized=sized)
        widen(call.stdout)
        return call

    def write(self, path: str, size: int, content: bytes = b"", more: Callable[[], bytes] = bytes) -> Call:
        """:param more: gives what comes after ``content``, some at a time, then nothing."""
        call = self._file_call(("stdin",), op="write", path=path, size=size)
        call.set_feed("stdin", content, more)
        widen(call.feeds[0].fd)
        return call

    def _file_call(self, feeds: Sequence[str], **what: object) -> Call:
        return Call(self, message(descriptors(feeds), **what), feeds)

    def send(self, message: bytes, fds: Sequence[int]) -> None:
        with self._lock:
            if self._destroyed:
                raise OSError(errno.EPIPE, "the sandbox is gone")
            # A zygote that doesn't read would make this block; socket.send_fds ignores its flags.
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
            self._control.sendmsg([message], rights, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)

    def destroy(self, meanwhile: Callable[[], None] = lambda: None) -> bool:
        """Kill every process in it; True if it is certain that none is left. Calls in it end as lost.

        Repeatable: what was not dead in time may be by then. It is waited for but once.

        :param meanwhile: what can be done while they die.
        """
        with self._lock:
            self._destroyed = True
            armed, self._armed = self._armed, []
        with self._ending:
            if self._dead is None:
                self._dead = self._end(meanwhile)
                self._has_waited = True
            # Calls not before: the zygote would look for the processes of each, only to die with them.
            self._undertaker.take(functools.partial(self._close, armed))
            return self._dead is True

    def _end(self, meanwhile: Callable[[], None]) -> bool | None:
        """Whether its processes are dead; None if that is not known yet."""
        try:
            self._begin_to_kill()
            if self.order["mode"] != "none" and self._control.fileno() >= 0:  # as it is the first time
                # Its zygote's death takes as long as all others', and who kills comes to that only later: so it ends by itself.
                self._control.shutdown(socket.SHUT_WR)
            meanwhile()
            return self._wait_for_death(0.0 if self._has_waited else DEATH_LIMIT)
        except OSError:
            return False

    def _begin_to_kill(self) -> None:
        if not self._first:
            self._lifeline.shutdown(socket.SHUT_WR)  # which has the nursery do it
            return
        # The nursery learns of it as the lifeline is closed. To wake it was a tenth of what lies between two leases.
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._first[0], signal.SIGKILL)

    def _wait_for_death(self, limit: float) -> bool | None:
        """Told by the nursery, or of a first process by the kernel. Not if the nursery is gone: nobody may wait for the zygote
        then, without which no PID namespace ends.
        """
        lifeline = self._lifeline.fileno()
        deadline = time.monotonic() + limit
        waited = select.poll()
        for fd in (*self._first[:1], lifeline):
            waited.register(fd, select.POLLIN)
        while ready := [fd for fd, _ in waited.poll(max(0.0, deadline - time.monotonic()) * 1000)]:
            if ready != [lifeline]:
                return True
            told, fds = linux.receive(self._lifeline, 64, sandboxes.FIRST_FDS)
            for fd in fds:  # of what did not come to stand
                os.close(fd)
            if told != sandboxes.FIRST:
                return told == sandboxes.DEAD
        self._control.close()
        return None

    def _close(self, calls: Sequence[Call]) -> None:
        for call in calls:
            call.close()
        if self._dead is not None:
            self._control.close()
            self._lifeline.close()
            first, self._first = self._first, []
            for fd in first:
                os.close(fd)
