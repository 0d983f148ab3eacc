"""The few system calls that Python's standard library does not wrap.

Thin wrappers by ``ctypes``; each raises ``OSError`` with the kernel's errno. Standard library alone, as it is
imported inside slots. The constants are those of the kernel's ``include/uapi`` headers.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import errno
import os
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Iterator, Mapping

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_prctl = _libc["prctl"]  # a function of its own, as the option decides on the others' types
_prctl.argtypes = (ctypes.c_int, *[ctypes.c_ulong] * 4)

PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
PR_CAPBSET_DROP = 24
PR_SET_CHILD_SUBREAPER = 36
PR_GET_CHILD_SUBREAPER = 37
PR_SET_NO_NEW_PRIVS = 38

CLONE_NEWNS = 0x00020000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

_LAST_CAP = 63
_CAPABILITY_VERSION_3 = 0x20080522
_IPC_RMID = 0
_KEYCTL = {"x86_64": 250, "aarch64": 219, "riscv64": 219, "ppc64le": 271, "s390x": 280}
_KEYCTL_JOIN_SESSION_KEYRING = 1
_SCHED_SETATTR = {"x86_64": 314, "aarch64": 274, "riscv64": 274, "ppc64le": 355, "s390x": 345}  # sched_getattr is the next
_SCHED_FLAG_RESET_ON_FORK = 0x01
LONG_SLICE = 4_000_000  # nanoseconds; usual ones have at most 3,000,000, if nobody has changed that

RESOLVE_NO_XDEV = 0x01
RESOLVE_NO_MAGICLINKS = 0x02

MOST_DESCRIPTORS = 253  # in one message, see unix(7)
_SO_PASSRIGHTS = 83
_SYS_close_range = 436
_SYS_openat2 = 437
_SYS_process_mrelease = 448
_AT_FDCWD = -100
IN_ATTRIB = 0x00000004
IN_MOVED_TO = 0x00000080
IN_CREATE = 0x00000100
_IN_DONT_FOLLOW = 0x02000000
SYS_landlock_create_ruleset = 444
SYS_landlock_add_rule = 445
SYS_landlock_restrict_self = 446


def _failed(call: str) -> OSError:
    code = ctypes.get_errno()
    return OSError(code, f"{call}: {os.strerror(code)}")


def _call(name: str, *args: object) -> int:
    """A function of the C library that gives a number below 0 if it has failed."""
    result = int(getattr(_libc, name)(*args))
    if result < 0:
        raise _failed(name)
    return result


def syscall(number: int, *args: object) -> int:
    """Make system call ``number``; of most new ones that is the same on every architecture, else see :func:`_number_of`."""
    result = int(_libc.syscall(ctypes.c_long(number), *args))
    if result < 0:
        raise _failed(f"syscall {number}")
    return result


def _number_of(numbers: Mapping[str, int]) -> int:
    """Of a system call that has another number on each architecture."""
    try:
        return numbers[os.uname().machine]
    except KeyError:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS)) from None


def close_range(first: int, last: int = 0xFFFFFFFF) -> None:
    """Close all descriptors from ``first`` to ``last``. Linux 5.9 on.

    To list them in /proc instead costs their process time once more as it dies: for each the kernel has an entry to drop.
    """
    syscall(_SYS_close_range, ctypes.c_uint(first), ctypes.c_uint(last), ctypes.c_uint(0))


def prctl(option: int, value: int) -> None:
    if _prctl(option, value, 0, 0, 0) < 0:
        raise _failed(f"prctl {option}")


def set_no_new_privs() -> None:
    """From here on no setuid bit or file capability gives this process, or a child of it, more rights."""
    prctl(PR_SET_NO_NEW_PRIVS, 1)


def set_dumpable(dumpable: bool) -> None:
    """False: keep processes of the same user away from this one's memory, environment and descriptors."""
    prctl(PR_SET_DUMPABLE, dumpable)


def set_child_subreaper() -> None:
    """Make orphaned descendants children of this process; the setting survives ``execve``."""
    prctl(PR_SET_CHILD_SUBREAPER, 1)


def is_child_subreaper() -> bool:
    """Whether orphaned descendants become children of this process."""
    answer = ctypes.c_int()
    if _libc.prctl(PR_GET_CHILD_SUBREAPER, ctypes.byref(answer), *[ctypes.c_ulong(0)] * 3) < 0:
        raise _failed(f"prctl {PR_GET_CHILD_SUBREAPER}")
    return bool(answer.value)


def set_parent_death_signal(signum: int) -> None:
    prctl(PR_SET_PDEATHSIG, signum)


def child_signals() -> int:
    """A descriptor that is readable when a child has ended, see signalfd(2); not blocking. SIGCHLD has to be blocked."""
    mask = (ctypes.c_ulong * (128 // ctypes.sizeof(ctypes.c_ulong)))()  # a sigset_t of glibc's
    mask[0] = 1 << (signal.SIGCHLD - 1)
    return _call("signalfd", -1, mask, os.O_NONBLOCK | os.O_CLOEXEC)


def has_usual_policy() -> bool:
    """Whether this process is scheduled by SCHED_OTHER, see sched(7); False where the C library, musl's say, does not tell."""
    try:
        return os.sched_getscheduler(0) == os.SCHED_OTHER
    except OSError:
        return False


class _SchedAttr(ctypes.Structure):
    _fields_ = [
        ("size", ctypes.c_uint32),
        ("policy", ctypes.c_uint32),
        ("flags", ctypes.c_uint64),
        ("nice", ctypes.c_int32),
        ("priority", ctypes.c_uint32),
        ("runtime", ctypes.c_uint64),
        ("deadline", ctypes.c_uint64),
        ("period", ctypes.c_uint64),
    ]


def set_slice(thread: int, nanoseconds: int) -> None:
    """Have a thread's time slices be that long, see sched_setattr(2). It keeps them if it becomes SCHED_IDLE, and hands them on
    to what it starts, unless it has SCHED_RESET_ON_FORK. Nothing of one that is SCHED_IDLE already, or before Linux 6.12.

    :raises OSError: it has ended, or this may not be done, or is not known here.
    """
    policy = os.sched_getscheduler(thread)
    resets = policy & os.SCHED_RESET_ON_FORK  # which only root may take from it
    nice = os.getpriority(os.PRIO_PROCESS, thread)
    flags = _SCHED_FLAG_RESET_ON_FORK if resets else 0
    attributes = _SchedAttr(ctypes.sizeof(_SchedAttr), policy & ~resets, flags, nice, 0, nanoseconds)
    syscall(_number_of(_SCHED_SETATTR), ctypes.c_int(thread), ctypes.byref(attributes), ctypes.c_uint(0))


def slice_of(thread: int) -> int:
    """How long a thread's time slices are, in nanoseconds, see sched_getattr(2); 0 before Linux 6.12.

    :raises OSError: it has ended, or this may not be asked, or is not known here.
    """
    attributes = _SchedAttr()
    size = ctypes.c_uint(ctypes.sizeof(attributes))
    syscall(_number_of(_SCHED_SETATTR) + 1, ctypes.c_int(thread), ctypes.byref(attributes), size, ctypes.c_uint(0))
    return int(attributes.runtime)


def setns(fd: int, kind: int) -> None:
    _call("setns", fd, kind)


class _CapHeader(ctypes.Structure):
    _fields_ = [("version", ctypes.c_uint32), ("pid", ctypes.c_int)]


class _CapData(ctypes.Structure):
    _fields_ = [("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32)]


_CapWords = _CapData * 2
_CAP_HEADER = ctypes.byref(_CapHeader(_CAPABILITY_VERSION_3, 0))
_NO_CAPABILITIES = ctypes.byref(_CapWords())  # made before zygotes are forked, as each page that one writes to is copied


def leave_session_keyring() -> None:
    """Begin a new, empty session keyring: the inherited one is shared by all that descend from the login or service.

    Nothing where the call is not to be had, as a container's seccomp filter forbids it: then slots can't use it either.
    """
    with contextlib.suppress(OSError):
        syscall(_number_of(_KEYCTL), ctypes.c_int(_KEYCTL_JOIN_SESSION_KEYRING), None)


def drop_capabilities() -> None:
    """Give up every capability, in the bounding set too where that is allowed."""
    # Ends with the last capability that the kernel knows (EINVAL), or at once if there is no CAP_SETPCAP to give up (EPERM).
    for cap in range(_LAST_CAP + 1):
        if _prctl(PR_CAPBSET_DROP, cap, 0, 0, 0) < 0:
            break
    _call("capset", _CAP_HEADER, _NO_CAPABILITIES)


def effective_capabilities() -> int:
    """A bit for each of the first 64 that this process has in effect."""
    data = _CapWords()
    _call("capget", _CAP_HEADER, data)
    return int(data[0].effective) | int(data[1].effective) << 32


def remove_ipc_object(kind: str, ident: int) -> None:
    """Remove System V shared memory (``shm``), semaphores (``sem``) or a message queue (``msg``).

    :raises OSError: it is not there, or another user's.
    """
    if kind == "sem":
        _call("semctl", ident, 0, _IPC_RMID)
    else:
        _call(f"{kind}ctl", ident, _IPC_RMID, None)


class _OpenHow(ctypes.Structure):
    _fields_ = [("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64)]


def openat2(path: str, flags: int, resolve: int) -> int:
    """A descriptor of a path below the working directory, closed on exec."""
    how = _OpenHow(flags | os.O_CLOEXEC, 0, resolve)
    size = ctypes.c_size_t(ctypes.sizeof(how))
    return syscall(_SYS_openat2, ctypes.c_int(_AT_FDCWD), os.fsencode(path), ctypes.byref(how), size)


def release_memory(process: int) -> None:
    """Give back the memory of a process that was killed now, in this process's time: its own death may have to wait for a
    processor. Linux 5.15 on.

    :param process: its pidfd.
    :raises OSError: it could not be done.
    """
    syscall(_SYS_process_mrelease, ctypes.c_int(process), ctypes.c_uint(0))


def timer() -> int:
    """A descriptor that can be read when the time that :func:`set_timer` sets has passed, see timerfd_create(2)."""
    return _call("timerfd_create", time.CLOCK_MONOTONIC, os.O_CLOEXEC)


def set_timer(fd: int, seconds: float) -> None:
    """Have a descriptor of :func:`timer` be readable in so many seconds, and not at the time that was set before."""
    nanoseconds = max(1, int(seconds * 1e9))  # with 0 it would never be
    times = (ctypes.c_long * 4)(0, 0, *divmod(nanoseconds, 1_000_000_000))  # a struct itimerspec
    _call("timerfd_settime", fd, 0, times, None)


def inotify_init() -> int:
    """A descriptor from which changes of files can be read, see inotify(7); not blocking."""
    return _call("inotify_init1", os.O_NONBLOCK | os.O_CLOEXEC)


def inotify_add_watch(fd: int, path: str, events: int) -> int:
    """Have a descriptor of :func:`inotify_init` tell of those ``events``, a sum of ``IN_*``. A link is not followed.

    :return: the watch; they are numbered from 1 on, and what is watched already keeps its own.
    """
    return _call("inotify_add_watch", fd, os.fsencode(path), ctypes.c_uint32(events | _IN_DONT_FOLLOW))


def complain(of: str) -> None:
    """Write a line to the server's log. If that takes none, as its disk is full, nothing more can be done."""
    with contextlib.suppress(OSError, ValueError):
        print(f"slotpool: {of}", file=sys.stderr, flush=True)


def read(path: str) -> bytes:
    """A file's content; in a third of the time that Python's own files take."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return b"".join(iter(lambda: os.read(fd, 65536), b""))
    finally:
        os.close(fd)


def write(path: str, content: bytes) -> None:
    """To a file that is there, by one write(2)."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, content)
    finally:
        os.close(fd)


def refuse_descriptors(sock: socket.socket) -> bool:
    """Let nobody send descriptors to this Unix socket; whether that can be done, as from Linux 6.16 on. To close one that came
    takes as long as its sender wants, if it is of a socket that lingers, and so does to close a socket on which it came.
    """
    try:
        sock.setsockopt(socket.SOL_SOCKET, _SO_PASSRIGHTS, 0)
    except OSError:
        return False
    return True


def hang_up(sock: socket.socket) -> None:
    """Close a Unix stream socket to a slot, and wait for nothing that may be on its way there."""
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RD)  # so that nothing more comes
    sock.setblocking(False)
    with contextlib.suppress(OSError):
        while receive_bytes(sock, 1 << 16):
            pass
    sock.close()


def close_received(fd: int) -> None:
    """Close a descriptor that a slot has sent; at once, even if it is of a socket that is to linger."""
    with contextlib.suppress(OSError):  # it is none, or stands only for the path of one
        sock = socket.socket(fileno=fd)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 0, 0))
        finally:
            sock.detach()
    os.close(fd)


def stat_fields(directory: str) -> list[bytes]:
    """What ``stat`` in a process's, or a thread's, directory of /proc tells: its state, its parent and so on, see
    proc_pid_stat(5). Not its name, which comes first and may hold anything.

    :raises OSError: it has ended.
    """
    fields = read(f"{directory}/stat").rpartition(b")")[2].split()
    if not fields:
        raise ProcessLookupError(errno.ESRCH, f"{directory}: it has just ended")
    return fields


def has_ended(process: int) -> bool:
    """Whether the process of a pidfd has, see pidfd_open(2)."""
    poll = select.poll()
    poll.register(process, select.POLLIN)
    return bool(poll.poll(0))


def descends(pid: int, ancestor: int) -> bool:
    """Whether that process is another's child, or its child's, and so on.

    :raises OSError: it, or one between them, has ended.
    """
    while pid not in (0, 1, ancestor):
        pid = int(stat_fields(f"/proc/{pid}")[1])
    return pid == ancestor


def processes() -> Iterator[tuple[int, list[bytes]]]:
    """Those that /proc shows, each with its :func:`stat_fields`."""
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):  # it has ended
            yield int(name), stat_fields(f"/proc/{name}")


def threads() -> tuple[int, int]:
    """How many threads of the whole machine run, or wait for a processor; and how many there are, see proc_loadavg(5).

    :raises OSError: it is not told here.
    """
    running, _, all_ = read("/proc/loadavg").split()[3].partition(b"/")
    return int(running), int(all_)


def receive_bytes(sock: socket.socket, size: int, flags: int = 0) -> bytes:
    """What a slot has sent, at most ``size`` bytes, without the descriptors that may come with it."""
    message, fds = receive(sock, size, MOST_DESCRIPTORS, flags)
    for fd in fds:
        close_received(fd)
    return message


def receive(sock: socket.socket, size: int, fds: int, flags: int = 0) -> tuple[bytes, list[int]]:
    """A message of at most ``size`` bytes and its descriptors, at most ``fds``, closed on exec.

    ``socket.recv_fds`` leaves them open, as it ignores its flags.
    """
    held: array.array[int] = array.array("i")
    message, control, _, _ = sock.recvmsg(size, socket.CMSG_SPACE(fds * held.itemsize), flags | socket.MSG_CMSG_CLOEXEC)
    for level, kind, data in control:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            held.frombytes(data[: len(data) - len(data) % held.itemsize])
    return message, list(held)
