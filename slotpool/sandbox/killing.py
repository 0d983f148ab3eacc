"""Find the processes of a call, or of a sandbox, and kill them all. Standard library alone.

What a call starts carries its *mark*: the hard limit RLIMIT_RSS. Each process inherits it, and it has had no effect since Linux
2.4 (setrlimit(2)). So a process is found that has left its parent and its session. It can lower its own; if it has left its
parents too, it is then known by having no mark that was given out.
"""

from __future__ import annotations

import errno
import os
import resource
import select
import signal
import time
from collections.abc import Callable, Collection, Iterator

from . import census, linux

KILL_LIMIT = 1.0  # seconds
_MOST_LIMIT = 5.0  # seconds
_PAUSE = 0.05  # seconds between two looks at what has to be waited for
_LEAST_LIMIT = 1 << 24  # bytes; as many calls can be told apart
_FIRST_MARK = 1 << 62  # bytes; programs that look at this limit take it for none


class Marks:
    """Marks for the calls of one zygote, each lower than the last."""

    def __init__(self) -> None:
        _, hard = resource.getrlimit(resource.RLIMIT_RSS)
        if hard != resource.RLIM_INFINITY and hard < _LEAST_LIMIT:
            raise OSError(
                errno.EINVAL, f"expected a hard limit RLIMIT_RSS (ulimit -m) of at least {_LEAST_LIMIT} bytes, got {hard}"
            )
        # Below what was inherited, which is another call's mark if this is a server inside a slot.
        self._first = self._next = _FIRST_MARK if hard == resource.RLIM_INFINITY else min(hard - 1, _FIRST_MARK)

    def put_on(self) -> int:
        """Mark this process, and so what it starts from now on.

        :raises ValueError: its limit has been lowered by somebody else.
        """
        mark = self._next
        resource.setrlimit(resource.RLIMIT_RSS, (mark, mark))
        self._next -= 1
        return mark

    def kill(self, mark: int, root: int, others: Collection[int]) -> bool:
        """Kill the call that has ``mark`` and the process ``root``, as far as it descends from this process, a child
        subreaper; False if that took over ``KILL_LIMIT``.

        :param root: it is left to be waited for.
        :param others: the processes of other calls.
        """
        return _kill_all(lambda: self._of_call(mark, root, others))

    def _of_call(self, mark: int, root: int, others: Collection[int]) -> set[int]:
        living = list(_living())
        ours = _descendants([os.getpid()], living)
        marks = {pid: _mark_of(pid) for pid in ours}
        # What has come to this process without a mark that was given out has taken it off; an earlier call's has its own.
        strays = {pid for pid, parent in living if parent == os.getpid() and not self._was_given(marks.get(pid))}
        roots = [pid for pid in ours if pid == root or marks[pid] == mark or (pid in strays and pid not in others)]
        return _descendants(roots, living).union(roots)

    def _was_given(self, mark: int | None) -> bool:
        return mark is not None and self._next < mark <= self._first


def kill_tree(root: int) -> bool:
    """Kill ``root``, a child subreaper, and all its descendants; False if that took over ``KILL_LIMIT``.

    It is killed last, as it collects the orphans, and left to be waited for.
    """
    send(root, signal.SIGSTOP)
    killed = _kill_all(lambda: _descendants([root], list(_living())))
    if killed:
        send(root, signal.SIGKILL)
    return killed


def kill_descendants(spared: Collection[int]) -> bool:
    """Kill all descendants of this process, a child subreaper, but for its children ``spared`` and those of theirs; False
    if that took over ``_MOST_LIMIT``. This process must wait for no other children meanwhile.
    """

    def find() -> set[int]:
        living = list(_living())
        roots = {pid for pid, parent in living if parent == os.getpid()}.difference(spared)
        return _descendants(list(roots), living) | roots

    def collect() -> None:
        for _ in ended_children():
            pass

    # The first process of a PID namespace can't die before those of others' in it have been waited for.
    return _kill_all(find, _MOST_LIMIT, collect)


def ended_children() -> Iterator[tuple[int, int]]:
    """Wait for all children that have ended; each with its wait status."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        yield pid, status


def _kill_all(find: Callable[[], set[int]], limit: float = KILL_LIMIT, collect: Callable[[], None] = lambda: None) -> bool:
    """Kill what is found until nothing is; all are stopped first, so that nothing can fork or lose its parent meanwhile.

    :param collect: called now and then while they die.
    """
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline:
        stopped: set[int] = set()
        while time.monotonic() < deadline:
            running = find() - stopped
            if not running:
                break
            for pid in running:
                send(pid, signal.SIGSTOP)
            stopped |= running
        if not stopped:
            return True
        for pid in stopped:
            send(pid, signal.SIGKILL)
        _wait_for_deaths(stopped, deadline, collect)
    return False


def _wait_for_deaths(pids: set[int], deadline: float, collect: Callable[[], None]) -> None:
    for pid in pids:
        try:
            fd = os.pidfd_open(pid)
        except OSError:  # gone already
            continue
        try:
            poll = select.poll()
            poll.register(fd, select.POLLIN)
            while not poll.poll(max(0.0, min(_PAUSE, deadline - time.monotonic())) * 1000) and time.monotonic() < deadline:
                collect()
        finally:
            os.close(fd)


def send(pid: int, signum: int) -> None:
    """Signal a process, or all that may be with -1; nothing if there is none, or it is another user's."""
    try:
        os.kill(pid, signum)
    except (ProcessLookupError, PermissionError):
        pass


def children(parent: int) -> list[int]:
    """The processes whose parent is ``parent``."""
    return [pid for pid, above in _living() if above == parent]


def _mark_of(pid: int) -> int | None:
    try:
        return resource.prlimit(pid, resource.RLIMIT_RSS)[1]
    except (ProcessLookupError, PermissionError):
        return None


def _descendants(roots: list[int], living: list[tuple[int, int]]) -> set[int]:
    below: dict[int, list[int]] = {}
    for pid, parent in living:
        below.setdefault(parent, []).append(pid)
    found: set[int] = set()
    pending = list(roots)
    while pending:
        direct = below.get(pending.pop(), [])
        found.update(direct)
        pending.extend(direct)
    return found


def _living() -> Iterator[tuple[int, int]]:
    """Each process that isn't a zombie, with its parent, as far as /proc shows them."""
    for pid, fields in linux.processes():
        if not census.is_dead(fields):
            yield pid, int(fields[census.PARENT])
