"""Unix users for slots: a block of user ids of this server's own, each lease another one. Needs root."""

from __future__ import annotations

import fcntl
import itertools
import os
import signal
import time

from ..errors import StartFailed

REGISTRY = "/run/slotpool/users"  # one lock file a block, held by the server that uses it
BLOCK = 1000
_KILL_LIMIT = 5.0  # seconds
# 1879048192 and up are unused by the conventions at https://systemd.io/UIDS-GIDS/
_BASE, _BLOCKS = 1_900_000_000, 200_000
# Where a user namespace maps too few: above the system's own users, below `nobody`.
_SMALL_BASE, _SMALL_BLOCKS = 20_000, 40


class UserBlock:
    """``BLOCK`` user ids that no other server on this machine uses, while this object or a process with :attr:`fd` lives.

    Ids go round, so what a lease might leave behind under its user belongs to nobody for the next ``BLOCK`` leases.
    Not thread-safe.
    """

    def __init__(self) -> None:
        base, blocks = (_BASE, _BLOCKS) if _is_mapped(_BASE) else (_SMALL_BASE, _SMALL_BLOCKS)
        os.makedirs(REGISTRY, mode=0o700, exist_ok=True)
        start = int.from_bytes(os.urandom(4), "big")  # containers with a registry each share the kernel's limits by user
        for i in range(blocks):
            first = base + (start + i) % blocks * BLOCK
            self.fd = os.open(f"{REGISTRY}/{first}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(self.fd)
                continue
            self.first = first
            self.clear()
            self._ids = itertools.cycle(range(first, first + BLOCK))
            return
        raise StartFailed(f"all {blocks} blocks of user ids for slots are in use on this machine; see {REGISTRY}")

    def next(self) -> int:
        return next(self._ids)

    def clear(self) -> None:
        """Kill every process of these users, which a server that was killed may have left."""
        deadline = time.monotonic() + _KILL_LIMIT
        while self._kill_all():
            if time.monotonic() > deadline:
                raise StartFailed(f"processes of the users {self.first} to {self.first + BLOCK - 1} can't be killed")
            time.sleep(0.01)  # they are nobody's children that could be waited for, and may fork meanwhile

    def _kill_all(self) -> bool:
        found = False
        for name in filter(str.isdigit, os.listdir("/proc")):
            try:
                with open(f"/proc/{name}/status", "rb") as f:
                    fields = dict(row.split(b":", 1) for row in f if b":" in row)
                if int(fields[b"Uid"].split()[0]) - self.first in range(BLOCK) and fields[b"State"].split()[0] != b"Z":
                    os.kill(int(name), signal.SIGKILL)
                    found = True
            except (FileNotFoundError, ProcessLookupError):
                continue
        return found

    def close(self) -> None:
        try:
            os.unlink(f"{REGISTRY}/{self.first}")
        except FileNotFoundError:
            pass
        os.close(self.fd)


def _is_mapped(uid: int) -> bool:
    with open("/proc/self/uid_map", "rb") as table:
        ranges: tuple[tuple[int, int], ...] = tuple((int(a), int(n)) for a, _, n in (row.split() for row in table))
    return any(first <= uid and uid + BLOCK * _BLOCKS <= first + count for first, count in ranges)
