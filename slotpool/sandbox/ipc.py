"""System V shared memory, semaphores and message queues, see sysvipc(7). Standard library alone."""

from __future__ import annotations

import operator
import os
from collections.abc import Iterator

from . import confine, linux

_KINDS = {"shm": b"shmid", "sem": b"semid", "msg": b"msqid"}  # each with what its list calls an id


class IpcObjects:
    """Those of this process's IPC namespace. As root, in a process without threads.

    The kernel's lists of them are held open, as to open one takes longer than to read it.
    """

    def __init__(self) -> None:
        self._lists: dict[str, int] = {}

    def remove(self, uid: int) -> None:
        """Remove those that user ``uid`` owns or has made.

        As that user, since in a container root may remove no one else's (it lacks CAP_SYS_ADMIN).

        :raises OSError: it could not be done.
        """
        found = [(kind, ident) for kind in _KINDS for ident in self._of(kind, uid)]
        if found:
            with confine.as_user(uid, 0):
                for kind, ident in found:
                    linux.remove_ipc_object(kind, ident)

    def _of(self, kind: str, uid: int) -> Iterator[int]:
        told, user = self._read(kind), b"%d" % uid
        if user in told:
            header, *lines = told.splitlines()
            columns = [header.split().index(name) for name in (b"uid", b"cuid", _KINDS[kind])]
            for line in lines:
                owner, maker, ident = operator.itemgetter(*columns)(line.split())
                if user in (owner, maker):
                    yield int(ident)

    def _read(self, kind: str) -> bytes:
        if kind not in self._lists:
            try:
                self._lists[kind] = os.open(f"/proc/sysvipc/{kind}", os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:  # a kernel without System V IPC
                return b""
        pieces = [os.pread(self._lists[kind], 65536, 0)]
        size = len(pieces[0])
        if pieces[0].count(b"\n") > 1:  # where only the columns' names come, more don't follow
            while piece := os.pread(self._lists[kind], 65536, size):
                pieces.append(piece)
                size += len(piece)
        return b"".join(pieces)
