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
import time
from collections.abc import Collection

from . import census, linux
from .census import Stat
from .cgroups import Memory

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .order import Order

_RESERVE = 48 << 20  # bytes for each processor, which fills that before the next look, if this one comes a little late
_MOST_RESERVED = 0.25  # of what there may be
_MUCH = 0.25  # of what there may be
_FASTEST = 2 << 30  # bytes a second that one processor fills
_PERIOD = 0.1  # seconds between two looks
_SHORTEST, _SOON = 0.005, 0.02
_MOST_OF_TIME = 0.1  # of a processor, that looks may take; each asks all control groups, which takes 20 microseconds for one
_LARGE = 1 / 16  # of what there may be: a group that has it is asked for more, which takes 200
_PATIENCE = 10  # looks in a row for which only a slot that has much is blamed, and only for as much as is needed
_DEATH_LIMIT = 1.0  # seconds for which what was killed is expected to give its memory back
_PAGE = os.sysconf("SC_PAGE_SIZE")


class Relief:
    """For the process that makes all sandboxes, and is none of theirs."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._patience = _PATIENCE
        self._killed: dict[tuple[int, bytes], tuple[float, int]] = {}  # by id and start: when, and the bytes that they had

    def look(self, sandboxes: Collection[Order]) -> float:
        """Kill what has become too much; the seconds until the next look."""
        began, cpu_began = time.monotonic(), time.thread_time()
        limit, held, processors = self._memory.limit(), self._memory.used(), len(os.sched_getaffinity(0))
        reserve = min(_RESERVE * processors, int(_MOST_RESERVED * limit))
        fastest = _FASTEST * processors
        if limit - reserve - held < _PERIOD * fastest:  # with what is in files, which may be most of it at all times
            held = self._held(sandboxes, limit)
        if held > limit - reserve:
            soon = bool(sandboxes) and self._make_room(sandboxes, limit, limit - 2 * reserve)
            return max(_SOON, time.monotonic() - began) if soon else _PERIOD
        self._patience = _PATIENCE
        cost = time.thread_time() - cpu_began  # not what it waits for a processor: there this is needed most
        return min(_PERIOD, max(_SHORTEST, (limit - reserve - held) / fastest, cost / _MOST_OF_TIME))

    def _held(self, sandboxes: Collection[Order], limit: int) -> int:
        return self._memory.held(itertools.chain.from_iterable(order["groups"] for order in sandboxes), _LARGE * limit)

    def _make_room(self, sandboxes: Collection[Order], limit: int, enough: int) -> bool:
        """Kill processes of the sandbox that has most, until no more than ``enough`` is held; whether to look again soon."""
        now = time.monotonic()
        dying: dict[tuple[int, bytes], tuple[float, int]] = {}
        found = []
        for processes in census.take({order["uid"] for order in sandboxes}).values():
            sizes = []
            for pid, stat in processes.items():
                if census.is_dead(stat):  # it has given all back
                    continue
                key = pid, stat[census.STARTED]
                killed, size = self._killed.get(key, (-_DEATH_LIMIT, 0))
                if now < killed + _DEATH_LIMIT:
                    dying[key] = killed, 0 if census.release_memory(pid, stat) else size
                else:
                    sizes.append((_anonymous(pid, stat), pid, stat))
            found.append((sum(size for size, _, _ in sizes), sorted(sizes, reverse=True)))
        held = self._held(sandboxes, limit)  # now, as some may just have died
        needed = held - enough - sum(size for _, size in dying.values())
        self._killed = dying
        if needed <= 0:
            return True
        if sum(total for total, _ in found) < needed:  # it is not theirs, or one is dying, and nobody tells what it had
            return bool(dying)
        most, sizes = max(found)
        if self._patience and most < max(needed, _MUCH * limit):
            self._patience -= 1
            return True
        chosen: dict[int, Stat] = {}
        had: dict[int, int] = {}
        for size, pid, stat in sizes:
            if needed > 0 or not self._patience:
                needed -= size
                chosen[pid], had[pid] = stat, size
        self._patience = max(0, self._patience - 1)
        for pid in census.end(chosen, "a slot fills the memory that all have"):
            dying[pid, chosen[pid][census.STARTED]] = now, had[pid]
        return True


def _anonymous(pid: int, stat: Stat) -> int:
    """Bytes that are given back when the process ends, unless others share them."""
    # Of a process whose first thread has ended only its others tell.
    for tid, _ in census.threads(pid, stat):
        with contextlib.suppress(OSError, ValueError):  # it has ended
            _, resident, shared, *_ = linux.read(f"/proc/{pid}/task/{tid}/statm").split()
            if int(resident):
                return (int(resident) - int(shared)) * _PAGE
    return 0
