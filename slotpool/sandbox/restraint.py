"""Keep a slot with very many busy threads out of its neighbours' way, where no control groups do. Standard library alone.

Without them the kernel shares the processors among threads, whoever's they are: with 64 busy ones in a slot, each step of a
neighbour's command waits for its turn among them. So what such a slot runs is kept to half of the processors, and runs there
when nobody else wants to, for as long as it lives. Its next lease is not concerned.

The latter is SCHED_IDLE, see sched(7), which nobody without privilege may take back, and before that a long time slice. With
either alone a thread keeps its processor for tens of milliseconds when somebody else wakes up, while a command's way to its
result has a dozen wake-ups: beside 64 threads that are SCHED_IDLE, in their control group, each takes 33 ms at the median on
Linux 6.18; 0.1 ms if they have that slice too. Then they also yield to whom another control group is for: to the client, if
this is in a container. The slice is a little longer than usual and no more, as restrained threads wait for each other.

A thread may take back the half of the processors, and one that was SCHED_IDLE before can't be given that slice. A slot of which
one finds such threads again and again is ended.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Collection, Mapping

from . import census, confine, linux
from .census import Stat

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .order import Order

_PERIOD = 0.1  # seconds between two looks; one costs 30 microseconds unless the machine is crowded
_MOST_OF_TIME = 0.1  # of a processor, that looks may take then
_BUSY = 4  # threads for each processor, from which on it is too many; `make -j$(nproc)` has a quarter of that
_PARDONS = 2  # times that a slot's threads may take their restraint off, as one does that chooses its processors when it begins
_MEMORY = 10.0  # seconds after which such a time is forgotten


def is_possible() -> bool:
    """Whether this machine tells enough of what runs on it."""
    try:
        return linux.threads()[0] > 0
    except OSError:
        return False


def _settable_slice() -> int:
    """What slices threads shall have; 0 if they can't be given any here."""
    try:
        usual = linux.slice_of(0)
        if not usual:
            return 0
        linux.set_slice(0, usual)
    except OSError:
        return 0
    return max(usual, linux.LONG_SLICE)


class Restraint:
    """For the process that makes all sandboxes, and is none of theirs."""

    def __init__(self) -> None:
        self._root = os.geteuid() == 0
        self._slice = _settable_slice()
        self._restrained: dict[int, dict[int, bytes]] = {}  # by sandbox: its threads when it was last, and when they started
        self._escapes: dict[int, list[float]] = {}  # by sandbox: when one of these was found free again

    def look(self, sandboxes: Collection[Order]) -> float:
        """Restrain those for which that has become necessary; the seconds until the next look."""
        began = time.thread_time()  # not what it waits for a processor: there this is needed most
        processors = sorted(os.sched_getaffinity(0))
        most = _BUSY * len(processors)
        if sandboxes and linux.threads()[0] > most:
            self._look_at_all({order["uid"] for order in sandboxes}, most, set(processors[len(processors) // 2 :]))
        return max(_PERIOD, (time.thread_time() - began) / _MOST_OF_TIME)

    def _look_at_all(self, users: Collection[int], most: int, half: set[int]) -> None:
        found = census.take(users)
        for known in (self._restrained, self._escapes):
            for gone in known.keys() - found.keys():
                del known[gone]
        for sandbox, processes in found.items():
            threads = {tid: stat for pid, of_pid in processes.items() for tid, stat in census.threads(pid, of_pid)}
            busy = {tid: stat for tid, stat in threads.items() if stat[census.STATE] == b"R"}
            free = {tid: stat for tid, stat in busy.items() if self._is_free(tid, stat, half)} if len(busy) > most else {}
            if not free:
                continue
            if self._has_escaped(sandbox, free):
                census.end(processes, "a slot can't be kept out of its neighbours' way")
                continue
            # In a container root may not do that to others (it lacks CAP_SYS_NICE).
            with confine.as_user(sandbox, 0) if self._root else contextlib.nullcontext():
                done = {tid: stat[census.STARTED] for tid, stat in threads.items() if self._restrain(tid, half)}
            self._restrained[sandbox] = done

    def _has_escaped(self, sandbox: int, free: Mapping[int, Stat]) -> bool:
        """Whether it has taken its restraint off, and more often than is pardoned."""
        before = self._restrained.get(sandbox, {})
        if not any(before.get(tid) == stat[census.STARTED] for tid, stat in free.items()):
            return False
        now = time.monotonic()
        self._escapes[sandbox] = [at for at in self._escapes.get(sandbox, []) if at > now - _MEMORY] + [now]
        return len(self._escapes[sandbox]) > _PARDONS

    def _is_free(self, thread: int, stat: Stat, half: set[int]) -> bool:
        """Whether it is not restrained."""
        try:
            if int(stat[census.POLICY]) != os.SCHED_IDLE or not os.sched_getaffinity(thread) <= half:
                return True
            return self._slice > 0 and linux.slice_of(thread) < self._slice
        except OSError:  # it has ended
            return False

    def _restrain(self, thread: int, half: set[int]) -> bool:
        """Whether it could be done. What it starts inherits it; what it has started just before is found by the next look."""
        try:
            os.sched_setaffinity(thread, half)
            if self._slice:
                linux.set_slice(thread, self._slice)
            resets = os.sched_getscheduler(thread) & os.SCHED_RESET_ON_FORK  # which only root may take from it
            os.sched_setscheduler(thread, os.SCHED_IDLE | resets, os.sched_param(0))
        except OSError:  # it has ended; or nobody may do that here
            return False
        return True
