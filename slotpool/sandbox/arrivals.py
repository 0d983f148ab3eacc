"""What comes into directories. Standard library alone."""

from __future__ import annotations

import contextlib
import os
import select

from . import linux

_EVENTS = 1 << 18  # bytes of them that are read at once


class Arrivals:
    """Whether something may have come into a directory that is watched, see inotify(7), or been mounted anywhere, which no
    directory tells, see proc_pid_mounts(5). None is missed that comes by way of this kernel; what is none may be taken for one.
    """

    def __init__(self) -> None:
        """
        :raises OSError: this user has as many of them as it may have, or they are not to be had here.
        """
        self._events = linux.inotify_init()
        try:
            self._mounts = os.open("/proc/self/mounts", os.O_RDONLY | os.O_CLOEXEC)
        except BaseException:
            os.close(self._events)
            raise
        self.begun = 0  # watches in all; each lasts as long as its directory, wherever that is moved
        self._poll = select.poll()
        self._poll.register(self._events, select.POLLIN)
        self._poll.register(self._mounts, select.POLLPRI)

    def watch(self, directory: str) -> None:
        """From now on, that directory too: what comes into it, and new owners and modes of what is in it.

        :raises OSError: it can't be read, or there are as many as may be.
        """
        watch = linux.inotify_add_watch(self._events, directory, linux.IN_CREATE | linux.IN_MOVED_TO | linux.IN_ATTRIB)
        self.begun = max(self.begun, watch)

    def any(self) -> bool:
        """Whether there may have been one since the last call; or before, if there were very many."""
        ready = [fd for fd, _ in self._poll.poll(0)]
        if self._events in ready:
            with contextlib.suppress(OSError):  # then they are told of once more
                os.read(self._events, _EVENTS)
        return bool(ready)

    def close(self) -> None:
        os.close(self._events)
        os.close(self._mounts)
