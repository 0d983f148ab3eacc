"""The process that makes sandboxes and ends them, beside the sandbox server. Standard library alone.

It is small and single-threaded, so that forking it is cheap and safe, and holds no secret that a fork could carry into a
slot. Each sandbox's zygote is forked from here, so a slot costs a fork, not an interpreter's start.

The first message on the control socket (``SOCK_SEQPACKET``, the first argument is its descriptor) tells what to clear up at the
end: a JSON list of the server's directory and its control groups, with descriptors that are locks, to be held till then. Each
further one asks for one sandbox: a JSON object, see :class:`~slotpool.sandbox.order.Order`, with two descriptors, the
zygote's control socket and a *lifeline*. The sandbox lives as long as the other side keeps its end of the lifeline open for
writing. Then every process of it is killed, and :data:`DEAD` on the lifeline says that none is left. Until it comes that is
being tried; an end of file without it says that this process has gone, or never got the lifeline, being short of descriptors or
memory.

In mode ``bwrap`` :data:`FIRST` comes on the lifeline before the zygote is ready, with a pidfd of the PID namespace's first
process, and descriptors of the namespaces that take long to be taken down. By the former the other side can kill all of the
sandbox, and see when nothing is left of that. The latter it closes when nobody waits for the sandbox's end.

When the server is gone, however it went, all sandboxes are ended, and its directory and its control groups are removed.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import gc
import json
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence

from . import cgroups, confine, killing, linux, restraint, trees, zygote
from .ipc import IpcObjects
from .poller import Poller
from .relief import Relief
from .restraint import Restraint
from .scratch import Scratch

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Union

    from .order import Order

    Watch = Union[Relief, Restraint]  # what looks at all sandboxes now and then

DEAD = b"dead"
FIRST = b"first"
FIRST_FDS = 4  # at most
_PAUSE = 0.05  # seconds until what failed for a shortage is tried again
_AGAIN = 1.0  # seconds until what could not be killed, or cleared up, is tried again
_REST = 10.0  # seconds until one looks again that could not
_MOST_ENDED = 100  # children that are waited for before others have their turn
_MOST_LOCKS = 16
_ORDER_FDS = 2
_END_LIMIT = 10.0  # seconds that ending all sandboxes may take once the server is gone


class Nursery:
    """An event loop over sockets, pipes and children; the sandboxes hook into :attr:`readable` and :attr:`exited`."""

    def __init__(self, control: socket.socket, watches: Sequence[Watch]) -> None:
        self._control = control
        self._poller = Poller()
        self.watch, self.unwatch = self._poller.watch, self._poller.unwatch
        self.exited: dict[int, Callable[[bool], None]] = {}  # by process id; told whether its status was 0
        self.bereaved: dict[int, Callable[[], None]] = {}  # by user id; called when processes of that user have been waited for
        self.living: set[Sandbox] = set()
        self.ipc_objects = IpcObjects()
        self.is_crowded = False  # see confine.is_crowded(); when a sandbox was made last
        self._reaps = False  # children's ends are waited for here
        self._serving = True
        self._watches = watches
        self._later: list[tuple[float, Callable[[], None]]] = []
        self._scratch: dict[tuple[str, ...], Scratch] = {}
        self._reserve: list[int] = []  # descriptors that are given up for those which come with an order
        self._fill_reserve()

    def _fill_reserve(self) -> bool:
        with contextlib.suppress(OSError):
            while len(self._reserve) < _ORDER_FDS:
                self._reserve.append(os.open(os.devnull, os.O_RDONLY))
        return len(self._reserve) == _ORDER_FDS

    def run(self) -> bool:
        """Serve until the server is gone, then end all sandboxes; whether all have ended."""
        child_ended = linux.child_signals()
        self.watch(child_ended, lambda: self._reap(child_ended))
        self.watch(self._control.fileno(), self._take_order)
        for watch in self._watches:
            self.later(functools.partial(self._look, watch), 0.0)
        deadline = None
        while self._serving or self.living:
            if not self._serving and deadline is None:
                deadline = time.monotonic() + _END_LIMIT
                for sandbox in list(self.living):
                    sandbox.end()
            if deadline is not None and time.monotonic() > deadline:
                return False
            for call in self._poller.ready(self._pause(deadline)):
                _guarded(call)
            now = time.monotonic()
            due = [call for at, call in self._later if at <= now]
            self._later = [(at, call) for at, call in self._later if at > now]
            for call in due:
                _guarded(call)
        return True

    def scratch(self, directories: Sequence[str]) -> Scratch:
        """What is known of these shared directories."""
        key = tuple(directories)
        if key not in self._scratch:
            self._scratch[key] = Scratch(directories)
        return self._scratch[key]

    def later(self, call: Callable[[], None], pause: float = _PAUSE) -> None:
        """Call it in a moment, by default because there is a shortage now."""
        self._later.append((time.monotonic() + pause, call))

    def _look(self, watch: Watch) -> None:
        pause = _REST
        try:
            pause = watch.look([sandbox.order for sandbox in self.living if sandbox.order["mode"] != "none"])
        except OSError as e:
            pause = _AGAIN
            linux.complain(f"can't look at the sandboxes now, trying again: {e}")
        finally:
            self.later(functools.partial(self._look, watch), pause)

    def _pause(self, deadline: float | None) -> float | None:
        times = [at for at, _ in self._later] + ([deadline] if deadline is not None else [])
        return max(0.0, min(times) - time.monotonic()) * 1000 + 1 if times else None

    def _begin_to_reap(self) -> None:
        if not self._reaps:  # to be done once: what has come of the signal by then is discarded, see sigaction(2)
            self._reaps = True
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)

    def _reap(self, child_ended: int) -> None:
        os.read(child_ended, 4096)
        self._wait_for_ended()

    def _wait_for_ended(self) -> None:
        calls: dict[int, Callable[[], None]] = {}
        for _ in range(_MOST_ENDED):
            try:
                ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG)
            except ChildProcessError:
                break
            if ended is None:
                break
            exited = self.exited.pop(ended.si_pid, None)
            if exited is not None:
                _guarded(functools.partial(exited, ended.si_code == os.CLD_EXITED and ended.si_status == 0))
            if ended.si_uid in self.bereaved:
                calls[ended.si_uid] = self.bereaved[ended.si_uid]
        else:  # a slot that has killed its zygote may make them as fast as they are waited for
            self.later(self._wait_for_ended, 0.0)
        for call in calls.values():
            _guarded(call)

    def _take_order(self) -> None:
        while self._reserve:  # what does not fit is lost, and whoever asks for a sandbox has to know that there is none
            os.close(self._reserve.pop())
        try:
            message, fds = linux.receive(self._control, 1 << 18, _ORDER_FDS)
        finally:
            has_room = self._fill_reserve()
        if not message:
            self.unwatch(self._control.fileno())
            self._serving = False
            return
        if len(fds) != _ORDER_FDS:  # its limit was lowered, or the kernel is short of memory; the server sees its ends closed
            for fd in fds:
                os.close(fd)
            self._fill_reserve()
            return
        order: Order = json.loads(message)
        control, lifeline = (socket.socket(fileno=fd) for fd in fds)
        sandbox = KINDS[order["mode"]](self, order, control, lifeline)
        if sandbox.ends_with_children:
            self._begin_to_reap()
        if not has_room:
            sandbox.fail("the process that makes sandboxes has as many descriptors as it may have")
            sandbox.died()
            self._fill_reserve()
            return
        self.living.add(sandbox)
        self.watch(lifeline.fileno(), sandbox.end)
        sandbox.attempt(sandbox.start)


def _guarded(call: Callable[[], None]) -> None:
    """One sandbox's trouble must not be all others' end."""
    try:
        call()
    except Exception as e:
        linux.complain(f"the nursery's {call} failed; this is a defect of slotpool: {e!r}")


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

    def fork_zygote(self, enter: Callable[[], None]) -> int:
        if self._control is None:
            raise OSError("the sandbox has failed already")
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            zygote.main(self._control, self.order, enter)
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
        by_groups = self.nursery.is_crowded and not self._dying  # what the first time has left may be in none of them
        self._dying = True
        self.nursery.bereaved[self.order["uid"]] = self._look
        try:
            confine.kill_user(self.order["uid"], self.order["killer"], self.order["groups"] if by_groups else ())
        except OSError as e:
            linux.complain(f"can't end a sandbox now, trying again: {e}")
        # It may not be that user yet. Not first, as its death takes as long as all others', and may do so on this processor.
        if self._zygote is not None:
            os.kill(self._zygote, signal.SIGKILL)
        self._begin_to_clear()
        self._look()
        self.nursery.later(self._kill_again)

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
    to wait until this one comes to it, it ignores SIGCHLD: what ends then is waited for by nobody, see wait(2).
    """

    ends_with_children = False
    _bubblewrap = 0  # its process id
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
            pid = self._bubblewrap = os.fork()
        except OSError:
            for fd in pipes:
                os.close(fd)
            self._hold, self._settled, self._heard = None, True, True
            raise
        if pid == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
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
            parent = int(linux.stat_fields(f"/proc/{self._first_pid}")[1])
            if parent not in (self._bubblewrap, os.getpid()):
                raise ProcessLookupError(errno.ESRCH, "its id is another's by now")
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
        namespaces = confine.namespaces_to_keep(self._first_pid)
        try:
            socket.send_fds(self._lifeline, [FIRST], [self._first, *namespaces])
        finally:
            for fd in namespaces:
                os.close(fd)
        with confine.forking_into(self._first_pid):
            self.fork_zygote(lambda: confine.enter_namespaces(self._first_pid, self.order))

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


def main(argv: list[str]) -> None:
    control = socket.socket(fileno=_keep_to_ourselves(int(argv[0])))
    # A descriptor tells of children's ends: to undo a signal's handler was a fifth of what a zygote does until it is ready. Nor
    # is it left as who started the server had it, see BwrapSandbox.
    signal.pthread_sigmask(signal.SIG_SETMASK, [signal.SIGCHLD])
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    os.umask(0o022)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    linux.set_child_subreaper()
    linux.set_dumpable(False)
    memory = cgroups.limited_memory()
    told, _locks = linux.receive(control, 1 << 16, _MOST_LOCKS)  # which last as long as this process
    if not told:
        return  # the server has not come so far
    directory, *groups = json.loads(told)
    watches: list[Watch] = [Relief(memory)] if memory is not None else []
    if not groups and restraint.is_possible():
        watches.append(Restraint())
    gc.freeze()
    ended = Nursery(control, watches).run()
    trees.remove_tree(directory)
    for root in groups:
        cgroups.remove_all(root)
    if not ended:
        sys.exit(1)


def _keep_to_ourselves(control: int) -> int:
    """Let nothing that this program was given go on to bubblewrap; the descriptor that ``control`` has now.

    The numbers up to 3 are what a slot's shells have; nothing else may ever get them.
    """
    null = os.open(os.devnull, os.O_RDWR)
    for fd in [int(name) for name in os.listdir("/proc/self/fd")]:
        try:
            if fd > 3:
                os.set_inheritable(fd, False)
            elif fd == 3 and fd != null:
                moved = os.dup(fd)
                control = moved if fd == control else control
        except OSError:  # the descriptor of the listing itself
            pass
    if null != 3:
        os.dup2(null, 3, inheritable=False)
        os.close(null)
    return control
