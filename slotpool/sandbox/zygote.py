"""The process inside a slot that starts its commands. Standard library alone.

A zygote is forked from the nursery, already confined, and serves one sandbox until it is killed. It is single-threaded
and trusts its control socket; nobody has to trust *it*, as its user's other processes run beside it.

On the control socket (``SOCK_SEQPACKET``) each message starts one *call*: a JSON object and the call's descriptors, in
the order that ``fds`` names them. What it starts is named by ``op``:

``shell``
    a bash that has started up and waits for its script, see :data:`BOOTSTRAP`. Descriptors ``call``, ``stdout``,
    ``stderr``, ``script`` and perhaps ``stdin``.
``read``
    copy the regular file ``path``, of at most ``limit`` bytes, to ``stdout``.
``write``
    replace the file ``path`` by what comes on ``stdin``, ``size`` bytes, or leave it as it was.

``read`` and ``write`` report a failure on ``stderr`` as JSON: ``[errno, message]``.

``call`` is a socket of the call's own. When the call's process has ended, its wait status goes there as a 32-bit
integer in network order, or :data:`NOT_STARTED`, and the socket is closed. A byte or an end of file from the other side
kills the call: the process and everything it started, daemonised or not. The status then comes when all of that is dead.
"""

from __future__ import annotations

import errno
import gc
import json
import os
import select
import signal
import socket
import stat
import struct
import time
from collections.abc import Iterator
from typing import Any, Callable, NoReturn

from . import confine, linux
from .poller import Poller

# Runs in a shell that is started before its command is known. Descriptor 3 is a pipe; its text is sourced, sets the
# positional parameter 1 to the command (and does all else that must come first), and the command is then evaluated as
# `bash -c` would. The `shift` puts the positional parameters back; it stands on the command's first line, so that line
# numbers in error messages are the caller's.
BOOTSTRAP = '. /proc/self/fd/3;eval "shift;$1"'
SHELL = "/bin/bash"

STATUS = struct.Struct("!i")
NOT_STARTED = -1  # in place of a wait status: the slot can start no more processes
READY = b"ready"
ERROR = b"error "
_CHUNK = 1 << 20
KILL_LIMIT = 1.0  # seconds


def main(control: socket.socket, order: confine.Order, enter: Callable[[], None]) -> NoReturn:
    """Confine this process, just forked from the nursery, and serve ``control``."""
    try:
        signal.set_wakeup_fd(-1)  # the nursery's
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        _keep_only(control)
        linux.set_undumpable()
        linux.leave_session_keyring()
        enter()
        linux.set_child_subreaper()
        confine.settle(order)
        Zygote(control, order["env"]).run()
    except BaseException as e:
        send_error(control, f"{type(e).__name__}: {e}")
    finally:
        os._exit(1)


def _keep_only(control: socket.socket) -> None:
    """Close what belongs to the nursery and to other sandboxes."""
    null = os.open(os.devnull, os.O_RDWR)
    for fd in range(3):
        os.dup2(null, fd)
    for fd in map(int, os.listdir("/proc/self/fd")):
        if fd > 3 and fd != control.fileno():
            try:
                os.close(fd)
            except OSError:  # the descriptor of the listing itself
                pass


def send_error(control: socket.socket, why: str) -> None:
    """Tell the server that there will be no zygote."""
    try:
        control.send(ERROR + why.encode(errors="replace")[:4096], socket.MSG_NOSIGNAL)
    except OSError:  # the server has given the sandbox up
        pass


class _Call:
    """A running call: its process and its socket."""

    def __init__(self, pid: int, sock: socket.socket) -> None:
        self.pid = pid
        self.sock = sock


class Zygote:
    """Serve ``control`` from within the sandbox; never returns from :meth:`run`."""

    def __init__(self, control: socket.socket, env: dict[str, str]) -> None:
        self._control = control
        self._env = env
        self._calls: dict[int, _Call] = {}  # by process id
        self._poller = Poller()
        # A descriptor, as a signal's handler costs more than all else that is done here.
        self._child_ended = linux.child_signals()
        self._null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)

    def run(self) -> NoReturn:
        self._poller.watch(self._control.fileno(), self._start)
        self._poller.watch(self._child_ended, self._reap)
        gc.disable()  # nothing here makes cycles, and a collection would copy memory that is shared with the nursery
        self._control.send(READY, socket.MSG_NOSIGNAL)
        while True:
            for wake in self._poller.ready():
                wake()

    def _start(self) -> None:
        message, fds = linux.receive(self._control, 65536, 8)
        if not message:
            os._exit(0)  # the server is gone; the nursery sees to the rest
        order: dict[str, Any] = json.loads(message)
        named = dict(zip(order["fds"], fds))
        sock = socket.socket(fileno=named.pop("call"))
        pid = self._fork()
        if pid == 0:
            self._become(order, named)
        for fd in named.values():
            os.close(fd)
        if pid is None:
            sock.send(STATUS.pack(NOT_STARTED), socket.MSG_NOSIGNAL)
            sock.close()
            return
        call = self._calls[pid] = _Call(pid, sock)
        self._poller.watch(call.sock.fileno(), lambda: self._kill(call))

    def _fork(self) -> int | None:
        """As ``os.fork``; None if the slot has as many processes as it may have."""
        try:
            return os.fork()
        except OSError:
            self._collect()  # the dead ones count until then
        try:
            return os.fork()
        except OSError:
            return None

    def _reap(self) -> None:
        try:
            os.read(self._child_ended, 4096)
        except BlockingIOError:
            pass
        self._collect()

    def _collect(self) -> None:
        """Collect every child that has ended, those that were orphaned and came to this process too."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            call = self._calls.get(pid)
            if call is not None:
                self._ended(call, status)

    def _ended(self, call: _Call, status: int) -> None:
        try:
            call.sock.send(STATUS.pack(status), socket.MSG_NOSIGNAL)
        except OSError:  # the server has given this call up
            pass
        del self._calls[call.pid]
        self._poller.unwatch(call.sock.fileno())
        call.sock.close()

    def _kill(self, call: _Call) -> None:
        if not kill_tree(call.pid):
            os._exit(1)  # the server replaces the whole sandbox
        _, status = os.waitpid(call.pid, 0)
        self._ended(call, status)
        self._collect()  # what was orphaned by the killing

    def _become(self, order: dict[str, Any], fds: dict[str, int]) -> NoReturn:
        try:
            linux.set_child_subreaper()  # what daemonises stays below this process, where a time-out finds it
            os.setsid()
            signal.pthread_sigmask(signal.SIG_SETMASK, [])
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            os.dup2(fds.get("stdin", self._null), 0)
            os.dup2(fds["stdout"], 1)
            os.dup2(fds["stderr"], 2)
            if order["op"] == "shell":
                os.dup2(fds["script"], 3)
                os.execve(SHELL, ["bash", "-c", BOOTSTRAP], self._env)
            elif order["op"] == "read":
                _report(_read_file, order["path"], order["limit"])
            else:
                _report(_write_file, order["path"], order["size"])
        finally:
            os._exit(127)


def kill_tree(root: int) -> bool:
    """Kill ``root``, a child subreaper, and all its descendants; False if that took over ``KILL_LIMIT``.

    The tree is stopped first, so that nothing in it can fork or lose its parent meanwhile; ``root`` is killed last, as it
    collects the orphans. ``root`` is left to be waited for.
    """
    deadline = time.monotonic() + KILL_LIMIT
    _signal(root, signal.SIGSTOP)
    while time.monotonic() < deadline:
        stopped: set[int] = set()
        while time.monotonic() < deadline:
            running = [pid for pid in _descendants(root) if pid not in stopped]
            if not running:
                break
            for pid in running:
                _signal(pid, signal.SIGSTOP)
            stopped.update(running)
        if not stopped:
            _signal(root, signal.SIGKILL)
            return True
        for pid in stopped:
            _signal(pid, signal.SIGKILL)
        _wait_for_deaths(stopped, deadline)
    return False


def _wait_for_deaths(pids: set[int], deadline: float) -> None:
    for pid in pids:
        try:
            fd = os.pidfd_open(pid)
        except OSError:  # gone already
            continue
        try:
            poll = select.poll()
            poll.register(fd, select.POLLIN)
            poll.poll(max(0.0, deadline - time.monotonic()) * 1000)
        finally:
            os.close(fd)


def _signal(pid: int, signum: int) -> None:
    try:
        os.kill(pid, signum)
    except (ProcessLookupError, PermissionError):
        pass


def children(parent: int) -> list[int]:
    """The processes whose parent is ``parent``."""
    return [pid for pid, above in _living() if above == parent]


def _descendants(root: int) -> list[int]:
    below: dict[int, list[int]] = {}
    for pid, parent in _living():
        below.setdefault(parent, []).append(pid)
    found = []
    pending = [root]
    while pending:
        direct = below.get(pending.pop(), [])
        found.extend(direct)
        pending.extend(direct)
    return found


def _living() -> Iterator[tuple[int, int]]:
    """Each process that isn't a zombie, with its parent, as far as /proc shows them."""
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            with open(f"/proc/{name}/stat", "rb") as f:
                fields = f.read().rpartition(b")")[2].split()  # the command's name before it may hold anything
        except OSError:
            continue
        if fields[0] not in (b"Z", b"X"):
            yield int(name), int(fields[1])


def _report(act: Any, *args: Any) -> NoReturn:
    try:
        act(*args)
    except OSError as e:
        os.write(2, json.dumps([e.errno or errno.EIO, e.strerror or str(e)]).encode())
        os._exit(1)
    os._exit(0)


def _require_regular(fd: int) -> os.stat_result:
    info = os.fstat(fd)
    if stat.S_ISDIR(info.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(info.st_mode):
        raise OSError(errno.EINVAL, "not a regular file")
    return info


def _read_file(path: str, limit: int) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    size = _require_regular(fd).st_size
    if size > limit:
        raise OSError(errno.EFBIG, f"{size} bytes, and the limit is {limit}")
    while True:
        chunk = os.read(fd, _CHUNK)
        if not chunk:
            return
        view = memoryview(chunk)
        while view:
            view = view[os.write(1, view) :]


def _write_file(path: str, size: int) -> None:
    target = os.path.realpath(path)
    os.makedirs(os.path.dirname(target), exist_ok=True)
    mode = 0o666 & ~_umask()
    try:
        info = os.stat(target)
    except FileNotFoundError:
        pass
    else:
        if stat.S_ISDIR(info.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not stat.S_ISREG(info.st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        mode = stat.S_IMODE(info.st_mode)
    # Beside the target and renamed when whole: a full disk or a broken connection loses nothing.
    partial = os.path.join(os.path.dirname(target), f".slotpool-{os.urandom(8).hex()}")
    fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        _copy_exactly(0, fd, size)
        os.fchmod(fd, mode)
        os.rename(partial, target)
    except BaseException:
        os.unlink(partial)
        raise


def _copy_exactly(source: int, target: int, size: int) -> None:
    left = size
    while left:
        chunk = os.read(source, min(left, _CHUNK))
        if not chunk:
            raise OSError(errno.EPIPE, f"the content ended {left} bytes early")
        left -= len(chunk)
        view = memoryview(chunk)
        while view:
            view = view[os.write(target, view) :]


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
