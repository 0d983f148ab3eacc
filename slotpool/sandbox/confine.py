"""What a process does to itself to be inside a sandbox. Standard library alone."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import os
import resource
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence

from . import cgroups, killing, landlock, linux

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

    from .order import Order

BWRAP_READY = b"ready"
# Of the whole machine. To kill by -1 took 0.24 ms with 80 of them, 0.55 with 600, 2.4 with 3,000; by a group's list 0.3.
_MANY_THREADS = 300
_NS_GET_USERNS = 0xB701  # ioctl_ns(2)
# In the order in which they are joined.
_NAMESPACES = {
    "ipc": linux.CLONE_NEWIPC,
    "uts": linux.CLONE_NEWUTS,
    "net": linux.CLONE_NEWNET,
    "pid": linux.CLONE_NEWPID,
    "mnt": linux.CLONE_NEWNS,
    "user": linux.CLONE_NEWUSER,
}


def become_user(uid: int, gid: int) -> None:
    """Change to user ``uid`` for good, without supplementary groups; nothing if it is that user already."""
    if os.getresuid() == (uid, uid, uid):
        return
    if os.getgroups():
        os.setgroups([])
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)


def join_groups(order: Order) -> None:
    """Enter the sandbox's control groups, and be the first to go when memory runs out, before whoever serves all slots."""
    cgroups.join(order["groups"])
    linux.set_dumpable(True)  # else the file is root's
    linux.write("/proc/self/oom_score_adj", b"1000")


def settle(order: Order) -> None:
    """The last steps, once the process has its user and namespaces: no way back, limits, Landlock, the directory."""
    if order["mode"] != "bwrap":  # there the zygote dies with its PID namespace, and its parent may be gone by design
        linux.set_parent_death_signal(signal.SIGKILL)
    if order["mode"] != "none":
        linux.drop_capabilities()
        linux.set_no_new_privs()
    for name, value in order["limits"].items():
        kind = getattr(resource, name)
        _, hard = resource.getrlimit(kind)
        if hard != resource.RLIM_INFINITY:
            value = min(value, hard)
        resource.setrlimit(kind, (value, value))
    os.umask(order["umask"])
    os.chdir(order["workspace"])
    confined = order["landlock"]
    if confined is not None:
        landlock.restrict(**confined)


def exec_bwrap(order: Order, stdin: int, stdout: int, info: Sequence[int]) -> NoReturn:
    """Become bubblewrap, as the sandbox's user; the payload copies ``stdin`` to ``stdout``.

    The payload's descriptors can be taken by the slot, whose user it has: none of them may be worth it.

    If this process's parent dies while the sandbox is made, that goes on to its end, where the payload finds ``stdin`` closed.
    To be killed before, as by bubblewrap's own --die-with-parent, would leave the namespaces' first process waiting for ever.

    :param info: a pipe's two ends. Both are kept, as writing to one that nobody reads would be such a death too.
    """
    try:
        os.dup2(stdin, 0)
        os.dup2(stdout, 1)
        os.dup2(stdout, 2)  # its messages; the server's own standard error must not be had from inside
        cgroups.join(order["groups"])
        become_user(order["uid"], order["gid"])
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # bubblewrap waits for a child, and would inherit that it is ignored
        for fd in info:
            os.set_inheritable(fd, True)
        argv = [*order["bwrap"], "--info-fd", str(info[1]), "--", "/bin/cat"]
        os.execve(argv[0], argv, {})
    except OSError as e:
        os.write(2, f"slotpool: can't start bubblewrap: {e}\n".encode())
    finally:
        os._exit(126)


@contextlib.contextmanager
def namespaces_of(pid: int) -> Iterator[dict[str, int]]:
    """Descriptors, by name, of the namespaces in which process ``pid`` is and this one is not. One that both are in, as the
    network where it is shared, can't be joined from within another user namespace.

    :raises OSError: it has ended. If it has since, they may be another's.
    """
    fds = {}
    try:
        for name in _NAMESPACES:
            fd = fds[name] = os.open(f"/proc/{pid}/ns/{name}", os.O_RDONLY | os.O_CLOEXEC)
            if _is_in(fd, name):
                os.close(fds.pop(name))
        yield fds
    finally:
        for fd in fds.values():
            os.close(fd)


def _is_in(namespace: int, name: str) -> bool:
    return os.path.samestat(os.fstat(namespace), os.stat(f"/proc/self/ns/{name}"))


def enter_namespaces(fds: Mapping[str, int], order: Order) -> None:
    """Join the namespaces, see :func:`namespaces_of`, close their descriptors, and take the sandbox's user; returns in a child
    of the caller, unless that is in the PID namespace already, see :func:`forking_into`.
    """
    if os.geteuid() == 0:
        os.setgroups([])  # not allowed any more once inside
    # Bubblewrap mounts devpts as one user and then goes on as another, in a user namespace below the one that owns all else.
    owner = fcntl.ioctl(fds["mnt"], _NS_GET_USERNS)
    linux.setns(owner, linux.CLONE_NEWUSER)
    _forbid_user_namespaces()
    is_inside = _is_in(fds["pid"], "pid")
    for name, fd in fds.items():
        if not (name == "pid" and is_inside) and not (name == "user" and os.path.sameopenfile(owner, fd)):
            linux.setns(fd, _NAMESPACES[name])
        os.close(fd)
    os.close(owner)
    if not is_inside and os.fork():  # only children are in the new PID namespace
        os._exit(0)
    become_user(order["inner_uid"], order["inner_gid"])


@contextlib.contextmanager
def forking_into(pid_namespace: int) -> Iterator[None]:
    """Have children of this process be in that PID namespace, which spares each a fork of its own.

    Nothing where this process could not come back, as an ordinary user's or one without CAP_SYS_ADMIN, or can't go there.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            ours = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
            stack.callback(os.close, ours)
            linux.setns(ours, linux.CLONE_NEWPID)  # changes nothing, but fails if it would later
            linux.setns(pid_namespace, linux.CLONE_NEWPID)
            stack.callback(_come_back, linux.setns, ours, linux.CLONE_NEWPID)
        yield


def _forbid_user_namespaces() -> None:
    """Keep the slot from making user namespaces of its own, in which much more of the kernel can be attacked.

    A second line of defence, so a system whose /proc/sys is read-only goes without it.
    """
    try:
        with open("/proc/sys/user/max_user_namespaces", "wb") as limit:
            limit.write(b"0")
    except OSError:
        pass


def kill_user(uid: int, killer: int, groups: Sequence[str]) -> None:
    """Kill all processes of user ``uid``. As root, in a process without threads.

    By one kill(2) of -1, which reaches whatever its caller may signal, and what has the signal pending can't fork. That looks
    at every process of the machine, see :func:`is_crowded`. With ``groups`` it is for those that their control group lists; one
    that is just being started may be left then, and is to be looked for and killed with no ``groups``.

    Meanwhile this process is ``uid`` in effect, without capabilities; and in reality ``killer``, whom nobody else is, so that
    it may signal nobody else, and those that it kills may not signal it.

    :param groups: the files to join their groups; may be none.
    :raises OSError: it has not been done.
    """
    with as_user(uid, killer):
        if os.getresuid() != (killer, uid, 0):
            raise OSError(errno.EPERM, "expected to be another user, got what this process was before")
        _check_is_powerless()
        if not groups or not _kill_members(groups[0]):
            killing.send(-1, signal.SIGKILL)


@functools.cache
def _check_is_powerless() -> None:
    """Once, as what another user has of root's capabilities only this process itself could change, see capabilities(7),
    SECBIT_NO_SETUID_FIXUP.
    """
    if linux.effective_capabilities():
        raise OSError(errno.EPERM, "expected another user to be without capabilities, got some")


def is_crowded() -> bool:
    """Whether there are so many threads on this machine that to kill by -1 takes longer than by a group's list: it was 39 % of
    what it took to end a thousand slots.
    """
    try:
        _, threads = linux.threads()
    except OSError:  # it is not told here
        return False
    return threads > _MANY_THREADS


def _kill_members(group: str) -> bool:
    """Whether all that were in it were killed, and it lists no more now."""
    try:
        members = cgroups.members(group)
        for pid in members:
            killing.send(pid, signal.SIGKILL)
        return cgroups.members(group) <= members
    except OSError:
        return False


@contextlib.contextmanager
def as_user(uid: int, real: int) -> Iterator[None]:
    """Be ``uid`` in effect, and in reality ``real``, for a moment. As root, in a process without threads."""
    os.setresuid(real, uid, 0)
    try:
        yield
    finally:
        _come_back(os.setresuid, 0, 0, 0)


def _come_back(way: Callable[..., None], *args: int) -> None:
    """Be again what this process is meant to be, or end it, as nothing that it did from here on would be right."""
    try:
        way(*args)
    except BaseException:
        os._exit(1)


def has_processes(uid: int) -> bool:
    """Whether user ``uid`` has any, one that is dead and not yet waited for included: see getpriority(2), PRIO_USER."""
    try:
        os.getpriority(os.PRIO_USER, uid)
    except ProcessLookupError:
        return False
    return True
