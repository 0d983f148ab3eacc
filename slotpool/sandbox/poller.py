"""Which descriptor wakes what, for the single-threaded processes in and around sandboxes. Standard library alone."""

from __future__ import annotations

import select
from collections.abc import Callable, Iterator


class Poller:
    """A table over poll(2), as select(2) can't watch descriptors above 1023."""

    def __init__(self) -> None:
        self._poll = select.poll()
        self._wakes: dict[int, Callable[[], None]] = {}

    def watch(self, fd: int, wake: Callable[[], None]) -> None:
        self._wakes[fd] = wake
        self._poll.register(fd, select.POLLIN)

    def unwatch(self, fd: int) -> None:
        del self._wakes[fd]
        self._poll.unregister(fd)

    def ready(self, timeout: float | None = None) -> Iterator[Callable[[], None]]:
        """Wait, at most ``timeout`` milliseconds, and give what is to be called, in turn."""
        for fd, wake in [(fd, self._wakes[fd]) for fd, _ in self._poll.poll(timeout)]:
            if self._wakes.get(fd) is wake:  # else an earlier one of this round has closed it, and it may be another's by now
                yield wake
