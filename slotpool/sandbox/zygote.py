"""The process inside a slot that starts its commands. Standard library alone.

A zygote is forked from the nursery, already confined, and serves one sandbox until that ends. It is single-threaded
and trusts its control socket; nobody has to trust *it*, as its user's other processes run beside it.

On the control socket (``SOCK_SEQPACKET``) each message starts one *call*: a JSON object and the call's descriptors, in
the order that ``fds`` names them. What it starts is named by ``op``:

``shell``
    a bash that has started up and waits for its script, see :data:`BOOTSTRAP`. Descriptors ``call``, ``stdout``,
    ``stderr``, ``told``, ``script`` and perhaps ``stdin``.
``read``
    copy the regular file ``path``, of at most ``limit`` bytes, to ``stdout``; if ``sized``, after its size, see
    :data:`files.SIZE`.
``write``
    replace the file ``path`` by what comes on ``stdin``, ``size`` bytes, or leave it as it was.

``open``, ``create``
    what :class:`.Lender` does.

``read`` and ``write`` report a failure on ``stderr`` as JSON: ``[errno, message]``.

``call`` is a socket of the call's own. When the call's process has ended, its wait status goes there as a 32-bit
integer in network order, or :data:`NOT_STARTED`, and the socket is closed. A byte or an end of file from the other side
kills the call: the process and everything it started, daemonised or not. The status then comes when all of that is dead.
After :data:`RELEASE` the other side wants to know no more, and the end of file kills nothing.
"""

from __future__ import annotations

import errno
import functools
import gc
import json
import os
import re
import signal
import socket
import struct
from collections.abc import Callable, Collection, Iterable, Sequence

from . import confine, files, killing, linux
from .lender import Lender
from .poller import Poller

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

    from .order import Order

# Runs in a shell that is started before its command is known. From the pipe HEAR it reads a length and a script of
# as many characters, see framed(); that sets the positional parameter 1 to the command (and does all else that must come
# first), which is then evaluated as `bash -c` would. The `shift` puts the positional parameters back; it stands on the
# command's first line, so that line numbers in error messages are the caller's. With a length the shell need not wait for the
# end of what is sent, which would cost it and the server a second wake-up.
#
# When the command has ended the shell tells its exit code on the pipe TELL, see read_told(), unless a trap on EXIT is still to
# run: its death takes as long again as a short command, most of it in taking down its memory, and who called need not wait for
# that. Where it does not come to that line (exit, exec, set -e, a signal), its death tells. What the line itself would show of
# a caller's set -x or traps goes into that pipe, where it is not understood, and its death tells.
#
# Then it waits until HEAR is closed, or GO comes. Else it would likely die on the very processor on which the server, which it
# has just woken, waits to answer: calls 10 ms apart take a tenth less like that. Where calls come close upon another GO comes
# with the script, as then there is no idle moment for its death. A command may have made a function of `read`, and given
# REPLY attributes by which to set it is an error: so it is the builtin, and another variable.
#
# While the command runs both are closed, but for copies that none of its programs inherits. Bash has those where it
# keeps such copies, from 10 on (bash(1), REDIRECTION: "greater than 9"). A command that looks as if it used those itself is
# run by ALONE, the last thing in its script, instead; its death tells.
#
# The first `trap` of a shell asks the kernel for each signal's handler: it does that while it waits.
HEAR, TELL = 59, 58  # below 64, from where on a process needs a larger table, and above what scripts use
BOOTSTRAP = ";".join(
    [
        "trap -p EXIT",
        f'read -rN9 -u{HEAR}&&read -rN$REPLY -u{HEAR}&&eval "$REPLY"',
        f'eval "shift;$1" {HEAR}<&- {TELL}>&-',
        f"""{{ set -- "$?";trap -p EXIT;printf '%d\\n' "$1";trap - DEBUG ERR;builtin read -rN1 -u{HEAR} __go||:;"""
        """REPLY() { return "$1";};REPLY "$1";}"""
        f" >&{TELL} 2>&{TELL}",
    ]
)
ALONE = b'exec %d<&- %d>&-;eval "shift;$1";exit' % (HEAR, TELL)
SHELL = "/bin/bash"
_ARGV = (b"bash", b"-c", BOOTSTRAP.encode())

GO = b"."
STATUS = struct.Struct("!i")
NOT_STARTED = -1  # in place of a wait status: the slot can start no more processes
READY = b"ready"
ERROR = b"error "
RELEASE = b"r"
_NO_PRIORITY = os.sched_param(0)
_NO_TOOL = 127  # as an exit code
_NO_SUCH_SHELL = 127 << 8  # as a wait status
_TOLD = re.compile(rb"(\d{1,3})\n")
# What Python ignores, and programs expect not to be.
_DEFAULTED = (signal.SIGPIPE, signal.SIGXFSZ)


def framed(script: bytes) -> bytes:
    """What the shell of :data:`BOOTSTRAP` is to be sent. ASCII only, as it counts characters."""
    return b"%09d%b" % (len(script), script)


def read_told(told: bytes) -> int | None:
    """The wait status that such a shell has told; None if it was something else."""
    found = _TOLD.fullmatch(told)
    return int(found[1]) << 8 if found else None


def main(control: socket.socket, order: Order, enter: Callable[[], None], fds: Iterable[int]) -> NoReturn:
    """Confine this process, just forked from the nursery, and serve ``control``.

    :param enter: takes it into the sandbox, and closes ``fds``, which it needs for that.
    """
    try:
        _keep_only([control.fileno(), *fds])
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # which the nursery may ignore, but here children's ends are waited for
        confine.join_groups(order)
        linux.set_dumpable(False)
        linux.leave_session_keyring()
        enter()
        linux.set_child_subreaper()
        confine.settle(order)
        Zygote(control, order["env"]).run()
    except BaseException as e:
        send_error(control, f"{type(e).__name__}: {e}")
    finally:
        os._exit(1)


def _keep_only(kept: Collection[int]) -> None:
    """Close what belongs to the nursery and to other sandboxes."""
    null = os.open(os.devnull, os.O_RDWR)
    for fd in range(3):
        os.dup2(null, fd)
    first = 4
    try:
        for fd in sorted(kept):
            if fd > first:
                linux.close_range(first, fd - 1)
            first = fd + 1
        linux.close_range(first)
    except OSError:  # an older kernel
        _close_each(kept)


def _close_each(kept: Collection[int]) -> None:
    for fd in map(int, os.listdir("/proc/self/fd")):
        if fd > 3 and fd not in kept:
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


@functools.lru_cache(maxsize=4)  # those for shells are all the same
def _parsed(message: bytes) -> dict[str, Any]:
    order: dict[str, Any] = json.loads(message)
    return order


def _lengthen_slices() -> None:
    """Have this process, and what it starts, leave a processor at once to whom else wakes up there: since Linux 6.12 one that
    has a longer time slice does, see EEVDF in the kernel's documentation. The slowest of calls back to back take a twentieth
    less like that.
    """
    try:
        if 0 < linux.slice_of(0) < linux.LONG_SLICE:
            linux.set_slice(0, linux.LONG_SLICE)
    except OSError:  # it may not be done here
        pass


class _Call:
    """A running call: its process, the mark of all that it starts, and the descriptor of its socket.

    :ivar outputs: what it prints to. They are closed here after its end was told, so that the server is woken once for that.
    :ivar released: nobody wants to know how it ends.
    """

    def __init__(self, pid: int, mark: int, fd: int, outputs: Sequence[int]) -> None:
        self.pid = pid
        self.mark = mark
        self.fd = fd
        self.outputs = outputs
        self.released = False


class Zygote:
    """Serve ``control`` from within the sandbox; never returns from :meth:`run`."""

    def __init__(self, control: socket.socket, env: dict[str, str]) -> None:
        self._control = control
        self._env = {os.fsencode(name): os.fsencode(value) for name, value in env.items()}
        self._calls: dict[int, _Call] = {}  # by process id
        self._poller = Poller()
        self._lender = Lender(self._poller)
        self._marks = killing.Marks()
        # A descriptor, as a signal's handler costs more than all else that is done here.
        self._child_ended = linux.child_signals()
        self._null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        self._yields = linux.has_usual_policy()  # what it starts, to who serves it
        if self._yields:
            _lengthen_slices()

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
            os._exit(0)  # the lease, or the server, has ended; the nursery sees to the rest
        order = _parsed(message)
        named = dict(zip(order["fds"], fds))
        fd = named.pop("call")
        if order["op"] in ("open", "create"):
            self._lender.lend(order, socket.socket(fileno=fd))
            return
        mark = self._marks.put_on()
        try:
            start = self._start_shell if order["op"] == "shell" else functools.partial(self._fork_tool, fd)
            self._schedule(os.SCHED_BATCH)
            pid = self._with_patience(start, order, named)
        except OSError as e:
            _tell(fd, self._refused(e, named["stderr"]))
        else:
            call = self._calls[pid] = _Call(pid, mark, fd, (named.pop("stdout"), named.pop("stderr")))
            self._poller.watch(fd, lambda: self._hear(call))
        self._schedule(os.SCHED_OTHER)
        for other in named.values():
            os.close(other)

    def _schedule(self, policy: int) -> None:
        """By it from now on, and what is started.

        Calls are SCHED_BATCH, see sched(7): with as large a share of the processors as anybody's, but when one wakes up it does
        not take the server's from it. Else a shell that gets its command would, and keep it beyond the command's end.
        """
        if self._yields:
            try:
                os.sched_setscheduler(0, policy, _NO_PRIORITY)
            except OSError:  # this slot is restrained, and so is what it starts; or the kernel is none that has this policy
                self._yields = False

    def _with_patience(self, start: Callable[..., int], *args: Any) -> int:
        try:
            return start(*args)
        except OSError:
            self._collect()  # the dead ones count until then
        return start(*args)

    def _start_shell(self, order: dict[str, Any], fds: dict[str, int]) -> int:
        """Not by a fork, which costs half a millisecond: this process is copied, and what both use after that is."""
        given = {0: fds.get("stdin", self._null), 1: fds["stdout"], 2: fds["stderr"], HEAR: fds["script"], TELL: fds["told"]}
        return os.posix_spawn(
            SHELL,
            _ARGV,
            self._env,
            file_actions=[(os.POSIX_SPAWN_DUP2, fd, number) for number, fd in given.items()],
            setsid=True,
            setsigmask=(),
            setsigdef=_DEFAULTED,
        )

    def _refused(self, e: OSError, stderr: int) -> int:
        """What to report of a process that could not be started."""
        if e.errno in (errno.EAGAIN, errno.ENOMEM):
            return NOT_STARTED
        os.write(stderr, f"slotpool: {SHELL}: {e.strerror}\n".encode())
        return _NO_SUCH_SHELL

    def _reap(self) -> None:
        try:
            os.read(self._child_ended, 4096)
        except BlockingIOError:
            pass
        self._collect()

    def _collect(self, killed: _Call | None = None) -> None:
        """Collect every child that has ended, those that were orphaned and came to this process too.

        :param killed: its end is told when what it had started is collected too, as the next command could still see that.
        """
        killed_status = None
        for pid, status in killing.ended_children():
            call = self._calls.get(pid)
            if killed is not None and call is killed:
                killed_status = status
            elif call is not None:
                self._ended(call, status)
        if killed is not None and killed_status is not None:
            self._ended(killed, killed_status)

    def _ended(self, call: _Call, status: int) -> None:
        del self._calls[call.pid]
        if not call.released:
            self._poller.unwatch(call.fd)
            _tell(call.fd, status)
        for fd in call.outputs:
            os.close(fd)

    def _hear(self, call: _Call) -> None:
        """Something has come from the other side of a call, or that was closed."""
        try:
            heard = os.read(call.fd, 1)
        except OSError:  # it was closed with something unread in it
            heard = b""
        if heard != RELEASE:
            self._kill(call)
            return
        call.released = True
        self._poller.unwatch(call.fd)
        os.close(call.fd)

    def _kill(self, call: _Call) -> None:
        if not self._marks.kill(call.mark, call.pid, self._calls.keys() - {call.pid}):
            os._exit(1)  # the server replaces the whole sandbox
        self._collect(call)

    def _fork_tool(self, fd: int, order: dict[str, Any], fds: dict[str, int]) -> int:
        pid = os.fork()
        if pid == 0:
            self._become(fd, order, fds)
        return pid

    def _become(self, fd: int, order: dict[str, Any], fds: dict[str, int]) -> NoReturn:
        code = _NO_TOOL
        try:
            os.setsid()
            signal.pthread_sigmask(signal.SIG_SETMASK, [])
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)
            os.dup2(fds.get("stdin", self._null), 0)
            os.dup2(fds["stdout"], 1)
            os.dup2(fds["stderr"], 2)
            if order["op"] == "read":
                code = _carry_out(files.read_file, order["path"], order["limit"], order["sized"])
            else:
                code = _carry_out(files.write_file, order["path"], order["size"])
            _tell(fd, code << 8)  # its death takes as long as all else, and who called need not wait for that
        finally:
            os._exit(code)


def _tell(fd: int, status: int) -> None:
    """End a call. In a process that does not ignore SIGPIPE that may be its end too."""
    try:
        os.write(fd, STATUS.pack(status))
    except OSError:  # the server has given it up
        pass
    os.close(fd)


def _carry_out(act: Callable[..., None], *args: object) -> int:
    """The exit code; standard error has the reason."""
    try:
        act(*args)
    except OSError as e:
        os.write(2, json.dumps([e.errno or errno.EIO, e.strerror or str(e)]).encode())
        return 1
    return 0
