"""Keep a slot with very many busy threads out of its neighbours' way, where no control groups do. Standard library alone.

Without them the kernel shares the processors among threads, whoever's they are: with 64 busy ones in a slot, each step of a
neighbour's command waits for its turn among them. So what such a slot runs is kept to half of the processors, and runs there
when nobody else wants to, for as long as it lives. Its next lease is not concerned.

The latter is SCHED_IDLE, see sched(7), which nobody without privilege may take back. With the largest nice value a thread would
still keep its processor until its time slice is over when somebody else wakes up, and a command's way to its result has a dozen
wake-ups. Nor does SCHED_IDLE make it yield to whom another control group is for: to the client, if this is in a container.
"""

from __future__ import annotations

import contextlib
import os
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence

from . import confine

PERIOD = 0.1  # seconds between two looks; one costs 30 microseconds unless the machine is crowded
_STATE, _NUM_THREADS, _POLICY = 0, 17, 38  # fields of /proc/PID/stat, counted from the state, see proc_pid_stat(5)
_BUSY = 4  # threads for each processor, from which on it is too many; `make -j$(nproc)` has a quarter of that


class Restraint:
    """For the process that makes all sandboxes, and is none of theirs."""

    def __init__(self) -> None:
        processors = sorted(os.sched_getaffinity(0))
        self._most = _BUSY * len(processors)
        self._half = set(processors[len(processors) // 2 :])
        self._root = os.geteuid() == 0
        self._outside = os.stat("/proc/self/ns/pid").st_ino

    def look(self, users: Collection[int]) -> None:
        """Restrain the sandboxes for which that has become necessary.

        :param users: theirs, one each, if this is root; else all have this process's own, and each a PID namespace.
        """
        if _runnable() <= self._most:
            return
        busy: dict[int, int] = defaultdict(int)
        found: dict[int, list[int]] = defaultdict(list)
        for pid in filter(str.isdigit, os.listdir("/proc")):
            try:
                sandbox = self._sandbox_of(pid, users)
                if sandbox is not None:
                    for thread, fields in _threads(pid):
                        found[sandbox].append(thread)
                        busy[sandbox] += self._is_busy(thread, fields)
            except OSError:  # it has ended
                continue
        for sandbox, count in busy.items():
            if count > self._most:
                # In a container root may not do that to others (it lacks CAP_SYS_NICE).
                with confine.as_user(sandbox, 0) if self._root else contextlib.nullcontext():
                    self._restrain(found[sandbox])

    def _is_busy(self, thread: int, fields: Sequence[bytes]) -> bool:
        """Whether it runs, or waits for a processor, and is not restrained."""
        if fields[_STATE] != b"R":
            return False
        return int(fields[_POLICY]) != os.SCHED_IDLE or not os.sched_getaffinity(thread) <= self._half

    def _restrain(self, threads: Collection[int]) -> None:
        """What they start inherits it; what they have started just before is found by the next look."""
        for thread in threads:
            try:
                os.sched_setscheduler(thread, os.SCHED_IDLE, os.sched_param(0))
                os.sched_setaffinity(thread, self._half)
            except OSError:  # it has ended
                continue

    def _sandbox_of(self, pid: str, users: Collection[int]) -> int | None:
        """A number that all its processes have in common, and no others; None if it is in none."""
        if self._root:
            owner = os.stat(f"/proc/{pid}").st_uid
            uid = owner or _uid(pid)  # one that has made itself undumpable has root for its owner, see proc(5)
            return uid if uid in users else None
        try:
            namespace = os.stat(f"/proc/{pid}/ns/pid").st_ino
        except PermissionError:
            # Another user's, or one that has made itself undumpable. Those in sandboxes are taken for one sandbox's.
            return 0 if _uid(pid) == os.getuid() and _has_inner_id(pid) else None
        return namespace if namespace != self._outside else None


def _runnable() -> int:
    """How many threads of the whole machine run, or wait for a processor, see proc_loadavg(5)."""
    return int(_read("/proc/loadavg").split()[3].partition(b"/")[0])


def _threads(pid: str) -> Iterator[tuple[int, Sequence[bytes]]]:
    """Each with what /proc tells of it."""
    fields = _stat(f"/proc/{pid}/stat")
    if fields[_NUM_THREADS] == b"1":
        yield int(pid), fields
        return
    for thread in os.listdir(f"/proc/{pid}/task"):
        yield int(thread), _stat(f"/proc/{pid}/task/{thread}/stat")


def _stat(path: str) -> Sequence[bytes]:
    return _read(path).rpartition(b")")[2].split()  # the command's name before it may hold anything


def _uid(pid: str) -> int:
    return int(_status(pid, b"Uid")[0])


def _has_inner_id(pid: str) -> bool:
    """Whether it is in a PID namespace below the one of which /proc tells."""
    return len(_status(pid, b"NSpid")) > 1


def _status(pid: str, field: bytes) -> list[bytes]:
    told = dict(line.split(b":", 1) for line in _read(f"/proc/{pid}/status").splitlines())
    return told[field].split()


def _read(path: str) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, 8192)
    finally:
        os.close(fd)
