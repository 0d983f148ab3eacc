"""Sandboxes as the nursery has them, by mode: how one starts, and how everything in it is killed. Standard library alone."""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import signal
import socket
from collections.abc import Callable, Iterable

from . import confine, killing, linux, trees, zygote

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .nursery import Nursery
    from .order import Order

# On a sandbox's lifeline, see the nursery's protocol:
DEAD = b"dead"
FIRST = b"first"
_SLOW_NAMESPACES = ("mnt", "net", "ipc")  # to be taken down
FIRST_FDS = 1 + len(_SLOW_NAMESPACES)  # at most
_AGAIN = 1.0  # seconds until what could not be killed, or cleared up, is tried again


class Sandbox:
    """One sandbox from start to death. Subclasses say how it starts and how everything in it is killed.

    :cvar ends_with_children: that it is dead is known by the ends of this process's children.
    """

    ends_with_children = True

    def __init__(self, nursery: Nursery, order: Order, control: socket.socket, lifeline: socket.socket) -> None:
        self.nursery = nursery
        self.order = order
        self._control: socket.socket | None = control
        self._lifeline = lifeline
        self._ending = False

    def start(self) -> None:
        raise NotImplementedError

    def kill(self) -> None:
        """Begin to kill everything; call :meth:`died` once that is verified."""
        raise NotImplementedError

    def attempt(self, step: Callable[[], None]) -> None:
        """Do a step of the start; tell the server if it fails."""
        try:
            step()
        except OSError as e:
            self.fail(str(e))

    def fail(self, why: str) -> None:
        if self._control is not None:
            zygote.send_error(self._control, why)
            self._control.close()
            self._control = None

    def end(self) -> None:
        if self._ending:
            return
        self._ending = True
        self.nursery.unwatch(self._lifeline.fileno())
        self.kill()

    def died(self) -> None:
        try:
            self._lifeline.send(DEAD, socket.MSG_NOSIGNAL)
        except ConnectionError:  # nobody waits for it
            pass
        except OSError:
            self.nursery.later(self.died)
            return
        self._lifeline.close()
        self.nursery.living.discard(self)

    def fork_zygote(self, enter: Callable[[], None], fds: Iterable[int] = ()) -> int:
        """
        :param enter: called in it before it is confined, with those descriptors.
        """
        if self._control is None:
            raise OSError("the sandbox has failed already")
        pid = os.fork()
        if pid == 0:
            zygote.main(self._control, self.order, enter, fds)
        self._control.close()
        self._control = None
        return pid

    def in_helper(self, act: Callable[[], bool], again: Callable[[], None]) -> None:
        """Let a child process call ``act``, which takes a while, and says whether nothing is left of the sandbox.

        :param again: called in a while, if something is.
        """
        try:
            pid = os.fork()
        except OSError as e:
            linux.complain(f"can't end a sandbox now, trying again: {e}")
            self.nursery.later(functools.partial(self.in_helper, act, again))
            return
        if pid == 0:
            try:
                os._exit(0 if act() else 1)
            except BaseException as e:
                linux.complain(f"can't end a sandbox: {e!r}")
                os._exit(1)
        self.nursery.exited[pid] = lambda well: self.died() if well else self.nursery.later(again, _AGAIN)


class PlainSandbox(Sandbox):
    """Mode ``none``: the processes are found by their descent from the zygote."""

    _zygote: int | None = None

    def start(self) -> None:
        self._zygote = self.fork_zygote(lambda: None)
        self.nursery.exited[self._zygote] = self._zygote_exited

    def _zygote_exited(self, well: bool) -> None:
        self._zygote = None

    def kill(self) -> None:
        # What a dead zygote left behind has become the nursery's; living ones keep theirs to themselves. It is looked for here,
        # and not in the helper, which would take another sandbox's helper for one.
        strays = [pid for pid in killing.children(os.getpid()) if pid not in self.nursery.exited]
        roots = strays + ([self._zygote] if self._zygote is not None else [])
        self.in_helper(lambda: all(killing.kill_tree(root) for root in roots), self.kill)


class UserSandbox(Sandbox):
    """Mode ``user``: the processes are found by their user. All descend from the nursery, to which orphans come, see
    linux.set_child_subreaper(); so the last one's end is one that it waits for.
    """

    _zygote: int | None = None
    _dying = False  # killed, and not seen to be dead yet

    def start(self) -> None:
        self.nursery.is_crowded = confine.is_crowded()  # not as one ends, when somebody may wait for that
        self._zygote = self.fork_zygote(lambda: confine.become_user(self.order["uid"], self.order["gid"]))
        self.nursery.exited[self._zygote] = self._zygote_exited

    def _zygote_exited(self, well: bool) -> None:
        self._zygote = None

    def kill(self) -> None:
        is_first = not self._dying
        by_groups = self.nursery.is_crowded and is_first  # what the first time has left may be in none of them
        self._dying = True
        self.nursery.bereaved[self.order["uid"]] = self._look
        try:
            confine.kill_user(self.order["uid"], self.order["killer"], self.order["groups"] if by_groups else ())
        except OSError as e:
            linux.complain(f"can't end a sandbox now, trying again: {e}")
        # It may not be that user yet. Not first, as its death takes as long as all others', and may do so on this processor.
        if self._zygote is not None:
            os.kill(self._zygote, signal.SIGKILL)
        self._look()
        self.nursery.later(self._kill_again)
        if is_first and self._dying:
            self._begin_to_clear()

    def _kill_again(self) -> None:
        if self._dying:  # `bereaved` may know the user for another sandbox by now, which has taken this one's place
            self.kill()

    def _begin_to_clear(self) -> None:
        """While its processes die, so that less is left to do when somebody waits for just that."""
        with contextlib.suppress(OSError):  # it comes again
            self.nursery.ipc_objects.remove(self.order["uid"])
        self.nursery.scratch(self.order["scratch"]).may_have(self.order["uid"])

    def _look(self) -> None:
        uid = self.order["uid"]
        if self._dying and self._zygote is None and not confine.has_processes(uid):
            self._dying = False
            del self.nursery.bereaved[uid]
            self._clear()

    def _clear(self) -> None:
        """Remove what it has left in shared places; apart, if that may take a while."""
        uid, scratch = self.order["uid"], self.order["scratch"]
        try:
            self.nursery.ipc_objects.remove(uid)
        except OSError as e:
            linux.complain(f"can't clear up after a sandbox now, trying again: {e}")
            self.nursery.later(self._clear, _AGAIN)
            return
        left = self.nursery.scratch(scratch).may_have(uid)

        def remove() -> bool:
            for directory in left:
                trees.remove_owned(directory, uid)
            return True

        if left:
            self.in_helper(remove, self._clear)
        else:
            self.died()


class BwrapSandbox(Sandbox):
    """Mode ``bwrap``: bubblewrap makes the namespaces and holds them with a process that only waits, the PID namespace's
    first; the zygote joins them. When the first process dies, the kernel kills all others, and only then reports it dead.

    That is once each has been waited for too, see pid_namespaces(7), and the zygote is this process's child. So that nobody has
    to wait until this one comes to it, it ignores SIGCHLD, see wait(2), unless it has to make sandboxes of other modes too.
    """

    ends_with_children = False
    _first_pid = 0
    _first: int | None = None  # its pidfd
    _told = b""  # what bubblewrap has written of it
    _hold: int | None = None
    _settled = False  # bubblewrap has told it, or has failed
    _said = b""  # what it has written else
    _heard = False  # that is all, or the payload's, which comes last

    def start(self) -> None:
        pipes: list[int] = []
        try:
            for _ in range(3):
                pipes += os.pipe()
            # The payload, `cat`, waits until all write ends are closed, so it dies with this process; and when bubblewrap is
            # done it says so by copying what is written here.
            waits, self._hold, self._ready, payload_out, self._info, bwrap_info = pipes
            os.write(self._hold, confine.BWRAP_READY)
            pid = os.fork()
        except OSError:
            for fd in pipes:
                os.close(fd)
            self._hold, self._settled, self._heard = None, True, True
            raise
        if pid == 0:
            confine.exec_bwrap(self.order, waits, payload_out, (self._info, bwrap_info))
        for fd in (waits, payload_out, bwrap_info):
            os.close(fd)
        self.nursery.watch(self._ready, self._join)

    def _learn_first(self) -> None:
        told = os.read(self._info, 4096)
        self._told += told
        if told and not self._told.rstrip().endswith(b"}"):
            return
        if self._ending:
            self.nursery.unwatch(self._info)
        os.close(self._info)
        self._settled = True
        if self._told:
            self._first_pid = json.loads(self._told)["child-pid"]
            try:
                self._first = self._open_first()
            except (ProcessLookupError, FileNotFoundError):  # it has ended
                pass
            except OSError as e:
                self.fail(str(e))  # nothing joins it, and the payload ends by itself
        if self._ending:
            self.kill()

    def _open_first(self) -> int:
        first = os.pidfd_open(self._first_pid)
        try:
            if not linux.descends(self._first_pid, os.getpid()):  # it has ended, and its id is a stranger's by now
                raise OSError(errno.ECHILD, f"expected process {self._first_pid}, of which bubblewrap told, to be its own")
        except BaseException:
            os.close(first)
            raise
        return first

    def _join(self) -> None:
        # It was written before the payload could start; in a dozen pieces, of which each would have woken this process.
        while not self._settled:
            self._learn_first()
        said = os.read(self._ready, 4096)
        self._said += said
        if said and self._first is None:
            return  # bubblewrap has failed, or was killed; as long as a child of its is left, that has this pipe too
        self._close(self._ready)
        self._heard = True
        if self._ending:
            if self._first is None:
                self.kill()
        elif self._first is not None and self._said == confine.BWRAP_READY:
            self.attempt(self._fork_into)
        else:
            self.fail(self._said.decode("utf-8", "replace").strip() or "bubblewrap ended without a word")

    def _fork_into(self) -> None:
        assert self._first is not None
        with confine.namespaces_of(self._first_pid) as fds:
            if linux.has_ended(self._first):  # and its id may be a stranger's by now
                raise ProcessLookupError(errno.ESRCH, "the sandbox's first process has just ended")
            slow = [fd for name, fd in fds.items() if name in _SLOW_NAMESPACES]
            socket.send_fds(self._lifeline, [FIRST], [self._first, *slow])
            with confine.forking_into(fds["pid"]):
                self.fork_zygote(lambda: confine.enter_namespaces(fds, self.order), fds.values())

    def _close(self, fd: int) -> None:
        self.nursery.unwatch(fd)
        os.close(fd)

    def kill(self) -> None:
        if not self._settled:
            self.nursery.watch(self._info, self._learn_first)  # which comes back here
            return
        if self._hold is not None:
            os.close(self._hold)
            self._hold = None
        if self._first is None:
            if self._heard:
                self.died()
            return  # else _join comes back here
        try:
            signal.pidfd_send_signal(self._first, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.nursery.watch(self._first, self._first_died)

    def _first_died(self) -> None:
        assert self._first is not None
        self._close(self._first)
        self.died()


KINDS: dict[str, type[Sandbox]] = {"none": PlainSandbox, "user": UserSandbox, "bwrap": BwrapSandbox}
