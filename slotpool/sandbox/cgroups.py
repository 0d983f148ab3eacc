"""Limits of a slot's memory and CPU time, by control groups of version 2 or 1, see cgroups(7). Standard library alone.

Each sandbox has a group of its own, below one of the server's, which is below the group that the server was started in: so
whatever limits that one limits the slots too. Sandboxes share the processors evenly, however many processes each has.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import sys
import time
from collections import defaultdict, deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from . import linux

_PREFIX = "slotpool-"
_PERIOD = 100_000  # microseconds in which a group has its share of CPU time; the kernel's default
_REMOVAL_LIMIT = 2.0  # seconds
_MOST_AGAIN = 4  # groups that are tried when one is to be removed, those that were busy first
_DISPENSABLE = ("memory.swap.max", "memory.memsw.limit_in_bytes")  # not there if swap is not accounted for


class Groups:
    """The groups of one server. Thread-safe, as each sandbox's name is its own.

    :ivar version: of control groups.
    :ivar roots: the server's own directories, one a hierarchy.
    :ivar locks: descriptors of them. As long as a process has one that is locked, no other server takes them for left over.
    """

    def __init__(self, version: int, parents: Sequence[str], memory: int | None, cpus: float | None) -> None:
        """Make them.

        :param memory: bytes that a sandbox may have.
        :param cpus: processors that it may use.
        :raises OSError: this process may not do that here; nothing is left.
        """
        self.version = version
        self._limits = _limits(version, memory, cpus)
        self.roots: list[str] = []
        self.locks: list[int] = []
        self._busy: deque[str] = deque()  # names of groups that could not be removed when they should have been
        name = f"{_PREFIX}{os.urandom(8).hex()}"
        try:
            for parent in parents:
                _sweep(parent)
                os.mkdir(f"{parent}/{name}")
                self.roots.append(f"{parent}/{name}")
                self.locks.append(_locked(f"{parent}/{name}", wait=True))
            if version == 2:
                _let_children_have(self.roots[0])
            self.make("probe")
            self.remove("probe")
        except BaseException:
            self.close()
            raise

    def make(self, name: str) -> list[str]:
        """Make a sandbox's groups; the files to which a process of one thread writes ``0`` to be in them.

        That is ``tasks`` in version 1: while a whole process moves, which took 12 ms, the kernel lets none start or end on the
        whole machine. A thread that moves itself hinders nobody, and took 0.2 ms (Linux 6.18, kernel/cgroup/cgroup.c,
        cgroup_procs_write_start). Version 2 has nothing like it between groups with controllers.

        :raises OSError: nothing is left then.
        """
        made = []
        try:
            for root in self.roots:
                os.mkdir(f"{root}/{name}")
                made.append(f"{root}/{name}")
            for file, value in self._limits.items():
                found = [f"{directory}/{file}" for directory in made if os.path.exists(f"{directory}/{file}")]
                if not found and file not in _DISPENSABLE:
                    raise OSError(errno.ENOTSUP, f"no {file} in {' or '.join(made)}")
                for path in found:
                    linux.write(path, value.encode())
        except BaseException:
            for directory in made:
                os.rmdir(directory)
            raise
        return [f"{directory}/{'tasks' if self.version == 1 else 'cgroup.procs'}" for directory in made]

    def remove(self, name: str) -> None:
        """Remove them; with later ones if something is in them still, a process that nobody has waited for yet, say. A few are
        tried each time, those that were busy first.
        """
        self._busy.append(name)
        for _ in range(min(len(self._busy), _MOST_AGAIN)):
            with contextlib.suppress(IndexError):  # another thread was quicker
                again = self._busy.popleft()
                if not self._try_to_remove(again):
                    self._busy.append(again)

    def _try_to_remove(self, name: str) -> bool:
        gone = True
        for root in self.roots:
            try:
                os.rmdir(f"{root}/{name}")
            except FileNotFoundError:
                pass
            except OSError:
                gone = False
        return gone

    def close(self) -> None:
        """Remove all. Repeatable."""
        for root in self.roots:
            remove_all(root)
        while self.locks:
            os.close(self.locks.pop())


def find(memory: int | None, cpus: float | None, children: Collection[int] = ()) -> Groups:
    """Groups that work here, of version 2 if they can be had.

    :param children: processes that this one has started, which may move with it.

    A server that starts may take those for left over that are made at the same moment; they are made once more then.

    :raises OSError: there are none.
    """
    try:
        return _make(2, [_delegated(children)], memory, cpus)
    except OSError as e:
        failure = e
    try:
        return _make(1, list(dict.fromkeys([_own_directory("memory"), _own_directory("cpu")])), memory, cpus)
    except OSError as e:
        raise OSError(e.errno, f"version 2: {failure}; version 1: {e}") from e


def _make(version: int, parents: Sequence[str], memory: int | None, cpus: float | None) -> Groups:
    try:
        return Groups(version, parents, memory, cpus)
    except FileNotFoundError:
        return Groups(version, parents, memory, cpus)


class Memory:
    """The memory of a control group that has a limit."""

    def __init__(self, way: Sequence[str], limit_file: str, used_file: str, held: bytes) -> None:
        """:param way: from the group that this process is in up to that one."""
        self._way = way
        self._directory = way[-1]
        self._limit_file = limit_file
        self._used_file = used_file
        self._held = b"\n%b " % held

    def limit(self) -> int:
        """Bytes that it may have now; a great many if it is not limited any more."""
        told = linux.read(f"{self._directory}/{self._limit_file}").strip()
        return sys.maxsize if told == b"max" else int(told)

    def used(self) -> int:
        """Bytes that it has, of processes, of files and of the kernel."""
        return self._used_by(self._directory)

    def held(self, joined: Iterable[str], large: float) -> int:
        """Bytes of it that processes have, and no file.

        What the kernel tells of a group with groups in it can be seconds old: an inner one with news that nobody has asked for
        passes no word of more on (Linux 6.18, mm/memcontrol.c, memcg_rstat_updated). So those that are large are asked first,
        and then the outer ones, each of which can't have less.

        :param joined: see :meth:`Groups.make`; those that are not in this group don't matter.
        :param large: bytes.
        """
        asked = set(self._way)
        for directory in map(os.path.dirname, joined):
            if directory.startswith(f"{self._directory}/"):
                asked.add(os.path.dirname(directory))
                with contextlib.suppress(OSError):  # it is gone
                    if self._used_by(directory) >= large:
                        asked.add(directory)
        held: dict[str, int] = defaultdict(int)
        for directory in sorted(asked, key=len, reverse=True):
            with contextlib.suppress(OSError):  # it has just gone
                held[directory] = max(held[directory], self._held_by(directory))
            held[os.path.dirname(directory)] += held[directory]
        return min(held[self._directory], self.used())

    def _used_by(self, directory: str) -> int:
        return int(linux.read(f"{directory}/{self._used_file}"))

    def _held_by(self, directory: str) -> int:
        told = b"\n" + linux.read(f"{directory}/memory.stat")
        return int(told.partition(self._held)[2].split(None, 1)[0])


def limited_memory() -> Memory | None:
    """That of the group, of those that this process is in, which may have least; None if it is as much as the machine has."""
    found = []
    for controller, limit, used, held in (
        (None, "memory.max", "memory.current", b"anon"),
        ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", b"total_rss"),
    ):
        with contextlib.suppress(OSError):
            way = _ways_up(controller)
            found += [
                Memory(way[:n], limit, used, held)
                for n, directory in enumerate(way, 1)
                if os.path.exists(f"{directory}/{limit}")
            ]
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    least = min(found, key=Memory.limit, default=None)
    return least if least is not None and least.limit() < whole else None


def join(files: Sequence[str]) -> None:
    """Put this process, and so what it starts from now on, into a sandbox's groups."""
    for path in files:
        linux.write(path, b"0")


def members(file: str) -> set[int]:
    """The processes in the group that is joined by ``file``, see :meth:`Groups.make`, without those that are dead.

    :raises OSError: they can't be told.
    """
    listed = set(map(int, linux.read(f"{os.path.dirname(file)}/cgroup.procs").split()))
    if 0 in listed:
        raise OSError(errno.EXDEV, f"{file}: processes of another PID namespace are in it")
    return listed


def remove_all(root: str) -> None:
    """Remove a server's directory of groups. What is in them must be dead, or about to be."""
    deadline = time.monotonic() + _REMOVAL_LIMIT
    while True:
        try:
            for name in os.listdir(root):
                if os.path.isdir(f"{root}/{name}"):
                    os.rmdir(f"{root}/{name}")
            os.rmdir(root)
        except FileNotFoundError:
            return
        except OSError as e:
            if e.errno != errno.EBUSY or time.monotonic() > deadline:
                return
            time.sleep(0.01)  # a process is counted for as long as nobody has waited for it
        else:
            return


def _limits(version: int, memory: int | None, cpus: float | None) -> Mapping[str, str]:
    """What to write to which file, in that order."""
    found: dict[str, str] = {}
    if memory is not None:
        if version == 2:
            found.update({"memory.max": str(memory), "memory.swap.max": "0"})
        else:
            found.update({"memory.limit_in_bytes": str(memory), "memory.memsw.limit_in_bytes": str(memory)})
    if cpus is not None:
        quota = max(1000, int(cpus * _PERIOD))
        if version == 2:
            found["cpu.max"] = f"{quota} {_PERIOD}"
        else:
            found.update({"cpu.cfs_period_us": str(_PERIOD), "cpu.cfs_quota_us": str(quota)})
    return found


def _delegated(children: Collection[int]) -> str:
    """This process's own group of version 2, where groups below it can have controllers.

    A group with processes of its own can't give controllers on, except for the root. So if only this process and ``children``
    are in it, they move to a group below.
    """
    own = _own_directory(None)
    has = _read(f"{own}/cgroup.controllers").split()
    if not {"memory", "cpu"} <= set(has):
        raise OSError(errno.ENOTSUP, f"{own} has not the controllers memory and cpu, but {' '.join(has) or 'none'}")
    try:
        _let_children_have(own)
    except OSError as e:
        present = set(map(int, _read(f"{own}/cgroup.procs").split()))
        if e.errno != errno.EBUSY or not present <= {os.getpid(), *children}:
            raise
        os.makedirs(f"{own}/slotpool", exist_ok=True)
        for pid in present:
            linux.write(f"{own}/slotpool/cgroup.procs", str(pid).encode())
        _let_children_have(own)
    return own


def _let_children_have(directory: str) -> None:
    linux.write(f"{directory}/cgroup.subtree_control", b"+memory +cpu")


def _own_directory(controller: str | None) -> str:
    """Where this process's group is to be found: in the hierarchy of ``controller``, or in that of version 2."""
    return _ways_up(controller)[0]


def _ways_up(controller: str | None) -> list[str]:
    """The same, and the groups that this one is in, as far as they can be seen."""
    path = next((path for names, path in _memberships() if (controller in names if controller else names == [""])), None)
    for kind, root, directory, options in _mounts():
        fits = controller in options if controller else kind == "cgroup2"
        if path is not None and fits:
            root = root.rstrip("/")
            inner = path[len(root) :].rstrip("/") if f"{path}/".startswith(f"{root}/") else ""
            return [directory + inner[:end] for end in range(len(inner), -1, -1) if inner[end : end + 1] in ("", "/")]
    raise OSError(errno.ENOENT, f"no control groups of {controller or 'version 2'} are mounted")


def _memberships() -> Iterator[tuple[list[str], str]]:
    for line in _read("/proc/self/cgroup").splitlines():
        _, names, path = line.split(":", 2)
        yield names.split(","), path


def _mounts() -> Iterator[tuple[str, str, str, list[str]]]:
    for line in _read("/proc/self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        kind, _, options = after.split(" ", 2)
        if kind in ("cgroup", "cgroup2"):
            fields = before.split(" ")
            yield kind, fields[3], fields[4], options.split(",")


def _sweep(parent: str) -> None:
    """Remove the groups of servers that were killed together with their nursery."""
    for name in os.listdir(parent):
        if name.startswith(_PREFIX):
            try:
                lock = _locked(f"{parent}/{name}", wait=False)
            except OSError:  # it is in use, or gone already
                continue
            remove_all(f"{parent}/{name}")
            os.close(lock)


def _locked(directory: str, wait: bool) -> int:
    """A descriptor of it with the lock. Not the server's process id in its name: another may see that in no /proc of its own.

    :raises OSError: somebody else has it, and this was not to be waited for; or the directory is gone.
    """
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        os.stat(directory)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _read(path: str) -> str:
    with open(path, encoding="utf-8", errors="surrogateescape") as f:
        return f.read()
