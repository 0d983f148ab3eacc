"""Which of the machine's processes are whose: found by user, or by descent. Standard library alone."""

from __future__ import annotations

import contextlib
import os
import signal
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

from . import linux

# Fields of /proc/PID/stat from the state on, see proc_pid_stat(5).
STATE, PARENT, NUM_THREADS, STARTED, POLICY = 0, 1, 17, 19, 38

Stat = Sequence[bytes]


def take(users: Collection[int]) -> dict[int, dict[int, Stat]]:
    """The processes of sandboxes, by process id; for a process that is none of theirs and, if not root's, makes all of them.

    :param users: the sandboxes', one each, if this is root; else that of this process.
    :return: by sandbox: by its user; or by the process that was started for it.
    """
    stats: dict[int, Stat] = dict(linux.processes())
    above = None if os.geteuid() == 0 else _children_above(stats)
    found: dict[int, dict[int, Stat]] = defaultdict(dict)
    for pid, stat in stats.items():
        sandbox = _user(pid, users) if above is None else above.get(pid)
        if sandbox is not None:
            found[sandbox][pid] = stat
    return found


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


def _children_above(stats: Mapping[int, Stat]) -> dict[int, int | None]:
    """For each process that descends from this one, the child of this one above it: in a PID namespace, bubblewrap."""
    own = os.getpid()
    found: dict[int, int | None] = {}
    for pid in stats:
        way = []  # each process is on one only, as thousands may stand in line
        while pid not in found and pid in stats:
            way.append(pid)
            found[pid] = None  # what is read one after the other could be a circle
            parent = int(stats[pid][PARENT])
            if parent == own:
                found[pid] = pid
                break
            pid = parent
        for one in way:
            found[one] = found.get(pid)
    return found


def threads(pid: int, stat: Stat) -> Iterator[tuple[int, Stat]]:
    """Of that process."""
    if stat[NUM_THREADS] == b"1":
        yield pid, stat
        return
    with contextlib.suppress(OSError):  # it has ended
        for name in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(OSError):
                yield int(name), linux.stat_fields(f"/proc/{pid}/task/{name}")


def is_dead(stat: Stat) -> bool:
    """Whether no thread of a process is left; where its first one has ended, its state alone does not tell."""
    return stat[STATE] in (b"Z", b"X") and int(stat[NUM_THREADS]) <= 1


def end(processes: Mapping[int, Stat], why: str) -> set[int]:
    """:func:`kill` them, and say in the server's log why; those that are killed."""
    killed = kill(processes)
    linux.complain(f"{why}; {len(killed)} of its processes are killed")
    return killed


def kill(processes: Mapping[int, Stat]) -> set[int]:
    """Kill the processes that had these ``stat``; those that are killed."""
    return {
        pid
        for pid, stat in processes.items()
        if _act_on(pid, stat, lambda process: signal.pidfd_send_signal(process, signal.SIGKILL))
    }


def release_memory(pid: int, stat: Stat) -> bool:
    """Give back the memory of a process that was killed and is still there; whether that could be done."""
    return _act_on(pid, stat, linux.release_memory)


def _act_on(pid: int, stat: Stat, act: Callable[[int], None]) -> bool:
    """Call ``act`` with a pidfd of the process that had that ``stat``, and of no other that may have its id now."""
    with contextlib.suppress(OSError):  # it has ended by itself
        process = os.pidfd_open(pid)
        try:
            if linux.stat_fields(f"/proc/{pid}")[STARTED] == stat[STARTED]:
                act(process)
                return True
        finally:
            os.close(process)
    return False
