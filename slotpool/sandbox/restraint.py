"""Keep a slot with very many busy threads out of its neighbours' way, where no control groups do. Standard library alone.

Without them the kernel shares the processors among threads, whoever's they are: with 64 busy ones in a slot, each step of a
neighbour's command waits for its turn among them. So what such a slot runs is kept to half of the processors, and runs there
when nobody else wants to, for as long as it lives. Its next lease is not concerned.

The latter is SCHED_IDLE, see sched(7), which nobody without privilege may take back. With the largest nice value a thread would
still keep its processor until its time slice is over when somebody else wakes up, and a command's way to its result has a dozen
wake-ups. Nor does SCHED_IDLE make it yield to whom another control group is for: to the client, if this is in a container.

A thread may take back the other part. A slot whose threads do so again and again is ended.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Collection

from . import census, confine, linux
from .census import Stat

_PERIOD = 0.1  # seconds between two looks; one costs 30 microseconds unless the machine is crowded
_MOST_OF_TIME = 0.1  # that looks may take then
_BUSY = 4  # threads for each processor, from which on it is too many; `make -j$(nproc)` has a quarter of that
_PARDONS = 2  # times that a thread may take its restraint off, as one does that places itself on a processor when it begins


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
        self._restrained: dict[int, dict[int, bytes]] = {}  # by sandbox: its threads when it was last, and when they started
        self._escapes: dict[int, int] = {}  # by sandbox: looks at which one of these was free again

    def look(self, users: Collection[int]) -> float:
        """Restrain the sandboxes for which that has become necessary; the seconds until the next look.

        :param users: theirs, one each, if this is root; else that of this process.
        """
        began = time.monotonic()
        if users and _runnable() > self._most:
            self._look_at_all(users)
        return max(_PERIOD, (time.monotonic() - began) / _MOST_OF_TIME)

    def _look_at_all(self, users: Collection[int]) -> None:
        found = census.take(users)
        for known in (self._restrained, self._escapes):
            for gone in known.keys() - found.keys():
                del known[gone]
        for sandbox, processes in found.items():
            threads = {tid: stat for pid, of_pid in processes.items() for tid, stat in census.threads(pid, of_pid)}
            busy = {tid: stat for tid, stat in threads.items() if stat[census.STATE] == b"R"}
            free = [tid for tid, stat in busy.items() if self._is_free(tid, stat)] if len(busy) > self._most else []
            if not free:
                continue
            before = self._restrained.get(sandbox, {})
            escaped = any(before.get(tid) == threads[tid][census.STARTED] for tid in free)
            self._escapes[sandbox] = self._escapes.get(sandbox, 0) + escaped
            if self._escapes[sandbox] > _PARDONS:
                census.end(processes, "a slot takes off what keeps it out of its neighbours' way")
                continue
            self._restrained[sandbox] = {tid: stat[census.STARTED] for tid, stat in threads.items()}
            # In a container root may not do that to others (it lacks CAP_SYS_NICE).
            with confine.as_user(sandbox, 0) if self._root else contextlib.nullcontext():
                self._restrain(threads)

    def _is_free(self, thread: int, stat: Stat) -> bool:
        """Whether it is not restrained."""
        try:
            return int(stat[census.POLICY]) != os.SCHED_IDLE or not os.sched_getaffinity(thread) <= self._half
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
