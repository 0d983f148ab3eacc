"""Make room before the memory of the container that the server is in runs out. Standard library alone.

When it is full, the kernel takes from all who are in it what it can read again: the pages of their programs. Each step of a
neighbour's command then waits for the disk, until the kernel comes to the end of that and kills. So the processes that have the
most of it are killed a little earlier, here.

Only memory of processes counts, which is seen to be theirs. What is in files, as in /dev/shm, is nobody's, and when that fills
the container its end is up to the kernel.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Collection

from . import census, linux
from .census import Stat
from .cgroups import Memory

_RESERVE = 48 << 20  # bytes for each processor, which fills that before the next look, if this one comes a little late
_MOST_RESERVED = 0.25  # of what there may be
_FASTEST = 2 << 30  # bytes a second that one processor fills
_PERIOD = 0.1  # seconds between two looks; one costs 50 microseconds
_SHORTEST, _SOON = 0.005, 0.02
_PATIENCE = (
    10  # looks for which nobody is blamed who has not enough: who had it may just be dying, and nobody tells what he had
)
_PAGE = os.sysconf("SC_PAGE_SIZE")


class Relief:
    """For the process that makes all sandboxes, and is none of theirs."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        processors = len(os.sched_getaffinity(0))
        reserve = min(_RESERVE * processors, int(_MOST_RESERVED * memory.limit))
        self._full = memory.limit - reserve
        self._enough = self._full - reserve
        self._rate = _FASTEST * processors
        self._patience = _PATIENCE
        self._killed: dict[tuple[int, bytes], int] = {}  # by id and start: bytes that they are still to give back

    def look(self, users: Collection[int]) -> float:
        """Kill what has become too much; the seconds until the next look.

        :param users: the sandboxes', one each, if this is root; else that of this process.
        """
        held = self._memory.held()
        if held <= self._full:
            self._patience = _PATIENCE
        else:
            return _SOON if users and self._make_room(users) else _PERIOD
        return max(_SHORTEST, min(_PERIOD, (self._full - held) / self._rate))

    def _make_room(self, users: Collection[int]) -> bool:
        """Kill the largest processes of the sandbox that has the most, and so on; whether to look again soon."""
        dying: dict[tuple[int, bytes], int] = {}
        by_sandbox = []
        for processes in census.take(users).values():
            sizes = []
            for pid, stat in processes.items():
                key = pid, stat[census.STARTED]
                if stat[census.STATE] == b"Z" and stat[census.NUM_THREADS] == b"1":  # it has given all back
                    continue
                if key in self._killed:
                    dying[key] = 0 if census.release_memory(pid, stat) else self._killed[key]
                else:
                    sizes.append((_anonymous(pid, stat), pid, stat))
            by_sandbox.append((sum(size for size, _, _ in sizes), sorted(sizes, reverse=True)))
        by_sandbox.sort(reverse=True)
        needed = self._memory.held() - self._enough - sum(dying.values())  # now, as some may just have died by themselves
        if self._patience:
            by_sandbox = [(total, sizes) for total, sizes in by_sandbox[:1] if total >= needed]
        chosen: dict[int, Stat] = {}
        for size, pid, stat in itertools.chain.from_iterable(sizes for _, sizes in by_sandbox):
            if needed <= 0:
                break
            needed -= size
            chosen[pid] = stat
            dying[pid, stat[census.STARTED]] = size
        if not dying:
            self._patience = max(0, self._patience - 1)
        if chosen:
            census.end(chosen, "a slot fills the memory that all have")
        self._killed = dying
        return bool(dying or self._patience)


def _anonymous(pid: int, stat: Stat) -> int:
    """Bytes that are given back when the process ends, unless others share them."""
    # Of a process whose first thread has ended only its others tell.
    for tid, _ in census.threads(pid, stat):
        with contextlib.suppress(OSError, ValueError):  # it has ended
            _, resident, shared, *_ = linux.read(f"/proc/{pid}/task/{tid}/statm").split()
            if int(resident):
                return (int(resident) - int(shared)) * _PAGE
    return 0
