"""The process that makes sandboxes and ends them, beside the sandbox server. Standard library alone.

It is small and single-threaded, so that forking it is cheap and safe, and holds no secret that a fork could carry into a
slot. Each sandbox's zygote is forked from here, so a slot costs a fork, not an interpreter's start.

The first message on the control socket (``SOCK_SEQPACKET``, the first argument is its descriptor) tells what to clear up at the
end: a JSON list of the server's directory and its control groups, with descriptors that are locks, to be held till then. Each
further one asks for one sandbox: a JSON object, see :class:`~slotpool.sandbox.order.Order`, with two descriptors, the
zygote's control socket and a *lifeline*. The sandbox lives as long as the other side keeps its end of the lifeline open for
writing. Then every process of it is killed, and :data:`~.sandboxes.DEAD` on the lifeline says that none is left. Until it comes
that is being tried; an end of file without it says that this process has gone, or never got the lifeline, being short of
descriptors or memory.

In mode ``bwrap`` :data:`~.sandboxes.FIRST` comes on the lifeline before the zygote is ready, with a pidfd of the first process
of the PID namespace, and descriptors of the namespaces that take long to be taken down. By the former the other side can kill
all of the sandbox, and see when nothing is left of that. The latter it closes when nobody waits for the sandbox's end.

When the server is gone, however it went, all sandboxes are ended, and its directory and its control groups are removed.
"""

from __future__ import annotations

import contextlib
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

from . import cgroups, linux, restraint, trees
from .ipc import IpcObjects
from .poller import Poller
from .relief import Relief
from .restraint import Restraint
from .sandboxes import KINDS, Sandbox
from .scratch import Scratch

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Union

    from .order import Order

    Watch = Union[Relief, Restraint]  # what looks at all sandboxes now and then

_PAUSE = 0.05  # seconds until what failed for a shortage is tried again
_AGAIN = 1.0  # seconds until what could not be looked at is tried again
_REST = 10.0  # seconds until one looks again that could not
_MOST_ENDED = 100  # children that are waited for before others have their turn
_MOST_LOCKS = 16
_ORDER_FDS = 2
_END_LIMIT = 10.0  # seconds that ending all sandboxes may take once the server is gone


class Nursery:
    """An event loop over sockets, pipes and children; sandboxes hook into :meth:`watch`, :attr:`exited`, :attr:`bereaved`."""

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


def main(argv: list[str]) -> None:
    control = socket.socket(fileno=_keep_to_ourselves(int(argv[0])))
    # A descriptor tells of children's ends: to undo a signal's handler was a fifth of what a zygote does until it is ready. Nor
    # is it left as who started the server had it, see sandboxes.BwrapSandbox.
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
