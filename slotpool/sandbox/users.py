"""Unix users for slots: a block of user ids of this server's own, each lease another one. Needs root."""

from __future__ import annotations

import fcntl
import itertools
import logging
import os
import time

from ..errors import SandboxStartFailed, StartFailed
from . import census

log = logging.getLogger(__name__)

REGISTRY = "/run/slotpool/users"  # one lock file a block, held by the server that uses it
BLOCK = 4096
_KILL_LIMIT = 5.0  # seconds
# 1879048192 and up are unused by the conventions at https://systemd.io/UIDS-GIDS/
_BASE, _BLOCKS = 1_900_000_000, 50_000
# Where a user namespace maps too few: above the system's own users, below `nobody`.
_SMALL_BASE, _SMALL_BLOCKS = 20_000, 9


class UserBlock:
    """``BLOCK`` user ids that no other server on this machine uses, while this object or a process with :attr:`fd` lives.

    Ids go round, so what a lease might leave behind under its user belongs to nobody for the next few thousand leases.
    Not thread-safe.

    :ivar killer: one of them, which no lease ever gets.
    """

    def __init__(self) -> None:
        base, blocks = (_BASE, _BLOCKS) if _is_mapped(_BASE) else (_SMALL_BASE, _SMALL_BLOCKS)
        _sweep()
        start = int.from_bytes(os.urandom(4), "big")  # containers with a registry each share the kernel's limits by user
        for i in range(blocks):
            first = base + (start + i) % blocks * BLOCK
            fd = _lock(f"{REGISTRY}/{first}", create=True)
            if fd is not None:
                self.fd = fd
                self.first = first
                self.killer = first
                self._ids = itertools.cycle(range(first + 1, first + BLOCK))
                self._in_use: set[int] = set()
                self.clear()
                return
        raise StartFailed(f"all {blocks} blocks of user ids for slots are in use on this machine; see {REGISTRY}")

    def take(self) -> int:
        """An id that nobody uses.

        :raises SandboxStartFailed: there is none.
        """
        for _ in range(BLOCK - 1):
            uid = next(self._ids)
            if uid not in self._in_use:
                self._in_use.add(uid)
                return uid
        raise SandboxStartFailed(f"all {BLOCK} user ids of this server are in use")

    def give_back(self, uid: int) -> None:
        """No process has that id any more."""
        self._in_use.discard(uid)

    def clear(self) -> None:
        """Kill every process of these users, which a nursery that was killed may have left."""
        _clear(self.first)

    def close(self) -> None:
        os.unlink(f"{REGISTRY}/{self.first}")
        os.close(self.fd)
        for directory in (REGISTRY, os.path.dirname(REGISTRY)):
            try:
                os.rmdir(directory)
            except OSError:  # others are in it
                return


def _lock(path: str, create: bool) -> int | None:
    """A descriptor that holds the lock of that file; None if another has it, or has just removed the file."""
    try:
        if create:
            os.makedirs(REGISTRY, mode=0o700, exist_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if create else 0), 0o600)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(fd), os.stat(path)):
            return fd
    except (BlockingIOError, FileNotFoundError):
        pass
    os.close(fd)
    return None


def _clear(first: int) -> None:
    deadline = time.monotonic() + _KILL_LIMIT
    while _kill_all(first):
        if time.monotonic() > deadline:
            raise StartFailed(f"processes of the users {first} to {first + BLOCK - 1} can't be killed")
        time.sleep(0.01)  # they are nobody's children that could be waited for, and may fork meanwhile


def _kill_all(first: int) -> bool:
    """Whether there were any."""
    found = census.take(range(first, first + BLOCK)).values()
    living = {pid: stat for processes in found for pid, stat in processes.items() if not census.is_dead(stat)}
    census.kill(living)
    return bool(living)


def _sweep() -> None:
    """Remove the locks of servers that were killed together with their nurseries, and kill what they have left."""
    try:
        names = os.listdir(REGISTRY)
    except FileNotFoundError:
        return
    for name in filter(str.isdigit, names):
        fd = _lock(f"{REGISTRY}/{name}", create=False)
        if fd is None:
            continue
        try:
            _clear(int(name))
            os.unlink(f"{REGISTRY}/{name}")
        except StartFailed as e:
            log.warning("what a server has left runs on: %s", e)
        finally:
            os.close(fd)


def _is_mapped(uid: int) -> bool:
    with open("/proc/self/uid_map", "rb") as table:
        ranges: tuple[tuple[int, int], ...] = tuple((int(a), int(n)) for a, _, n in (row.split() for row in table))
    return any(first <= uid and uid + BLOCK * _BLOCKS <= first + count for first, count in ranges)
