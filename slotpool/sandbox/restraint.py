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
import time
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence

from . import confine, linux

_PERIOD = 0.1  # seconds between two looks; one costs 30 microseconds unless the machine is crowded
_MOST_OF_TIME = 0.1  # that looks may take then
_BUSY = 4  # threads for each processor, from which on it is too many; `make -j$(nproc)` has a quarter of that
_STATE, _PARENT, _NUM_THREADS, _POLICY = 0, 1, 17, 38  # fields of /proc/PID/stat from the state on, see proc_pid_stat(5)


def is_possible() -> bool:
    """Whether this machine tells enough of what runs on it."""
    try:
        return _runnable() > 0
    except OSError:
        return False


class Restraint:
    """For the process that makes all sandboxes, and is none of theirs."""

    def __init__(self) -> None:
        processors = sorted(os.sched_getaffinity(0))
        self._most = _BUSY * len(processors)
        self._half = set(processors[len(processors) // 2 :])
        self._root = os.geteuid() == 0

    def look(self, users: Collection[int]) -> float:
        """Restrain the sandboxes for which that has become necessary; the seconds until the next look.

        :param users: theirs, one each, if this is root; else that of this process.
        """
        began = time.monotonic()
        if users and _runnable() > self._most:
            self._look_at_all(users)
        return max(_PERIOD, (time.monotonic() - began) / _MOST_OF_TIME)

    def _look_at_all(self, users: Collection[int]) -> None:
        busy: dict[int, list[tuple[int, Sequence[bytes]]]] = defaultdict(list)
        found: dict[int, list[int]] = defaultdict(list)
        stats = dict(_stats())
        for pid, stat in stats.items():
            sandbox = _user(pid, users) if self._root else _child_above(pid, stats)
            if sandbox is not None:
                for thread, fields in _threads(pid, stat):
                    found[sandbox].append(thread)
                    if fields[_STATE] == b"R":
                        busy[sandbox].append((thread, fields))
        for sandbox, threads in busy.items():
            if len(threads) > self._most and any(self._is_free(*thread) for thread in threads):
                # In a container root may not do that to others (it lacks CAP_SYS_NICE).
                with confine.as_user(sandbox, 0) if self._root else contextlib.nullcontext():
                    self._restrain(found[sandbox])

    def _is_free(self, thread: int, fields: Sequence[bytes]) -> bool:
        """Whether it is not restrained."""
        try:
            return int(fields[_POLICY]) != os.SCHED_IDLE or not os.sched_getaffinity(thread) <= self._half
        except OSError:  # it has ended
            return False

    def _restrain(self, threads: Collection[int]) -> None:
        """What they start inherits it; what they have started just before is found by the next look."""
        for thread in threads:
            try:
                os.sched_setaffinity(thread, self._half)
                os.sched_setscheduler(thread, os.SCHED_IDLE, os.sched_param(0))
            except OSError:  # it has ended
                continue


def _runnable() -> int:
    """How many threads of the whole machine run, or wait for a processor, see proc_loadavg(5)."""
    return int(linux.read("/proc/loadavg").split()[3].partition(b"/")[0])


def _user(pid: int, users: Collection[int]) -> int | None:
    """Whose it is, if that is one of ``users``."""
    try:
        owner = os.stat(f"/proc/{pid}").st_uid
        if owner == 0:  # also of one that has made itself undumpable, see proc(5)
            told = linux.read(f"/proc/{pid}/status").partition(b"\nUid:")[2]  # no name in there has a line's end in it
            owner = int(told.split(None, 1)[0])
    except (OSError, IndexError):  # it has ended
        return None
    return owner if owner in users else None


def _child_above(pid: int, stats: Mapping[int, Sequence[bytes]]) -> int | None:
    """The child of this process from which it descends; for a sandbox in a PID namespace, bubblewrap."""
    for _ in range(len(stats)):  # what is read one after the other could be a circle
        fields = stats.get(pid)
        if fields is None:
            return None
        parent = int(fields[_PARENT])
        if parent == os.getpid():
            return pid
        pid = parent
    return None


def _stats() -> Iterator[tuple[int, Sequence[bytes]]]:
    """Of all processes that can be seen."""
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):  # it has ended
            yield int(name), linux.stat_fields(f"/proc/{name}")


def _threads(pid: int, stat: Sequence[bytes]) -> Iterator[tuple[int, Sequence[bytes]]]:
    if stat[_NUM_THREADS] == b"1":
        yield pid, stat
        return
    with contextlib.suppress(OSError):  # it has ended
        for name in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(OSError):
                yield int(name), linux.stat_fields(f"/proc/{pid}/task/{name}")
