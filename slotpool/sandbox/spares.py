"""Sandboxes made in advance, so that a slot which is given back need not wait for one."""

from __future__ import annotations

import logging
import threading
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Callable

from ..errors import SandboxStartFailed
from .tenancies import Tenancy

log = logging.getLogger(__name__)

MOST = 2


class Spares:
    """One, and up to ``MOST`` once slots were given back faster than one is made. Thread-safe."""

    def __init__(self, make: Callable[[], Tenancy], makers: ThreadPoolExecutor) -> None:
        """
        :param make: may raise.
        :param makers: who call it. They end after :meth:`close`.
        """
        self._make = make
        self._makers = makers
        self._lock = threading.Lock()  # guards the rest
        self._spares: deque[Future[Tenancy | None]] = deque()  # None comes of one that can't be made
        self._stock = 1
        self._closed = False

    def restock(self) -> None:
        """Have as many made as are lacking."""
        with self._lock:
            self._spares = deque(spare for spare in self._spares if not spare.done() or spare.result() is not None)
            while not self._closed and len(self._spares) < self._stock:
                self._spares.append(Future())
                self._makers.submit(self._make_one, self._spares[-1])

    def take(self) -> Tenancy | None:
        """One, if there is one; waits for one that is being made."""
        with self._lock:
            spare = self._spares.popleft() if self._spares else None
            if spare is None or not spare.done():  # slots are given back faster than one is made
                self._stock = MOST
        if spare is None or spare.cancel():  # it was still in line, behind slots that are to be made ready
            return None
        return spare.result()  # if it is being made, it comes sooner than one that is begun now

    def _make_one(self, spare: Future[Tenancy | None]) -> None:
        if not spare.set_running_or_notify_cancel():
            return
        made = None
        try:
            made = None if self._closed else self._make()
        except Exception as e:
            log.info("no sandbox could be made in advance: %s", e, exc_info=not isinstance(e, (SandboxStartFailed, OSError)))
        spare.set_result(made)

    def close(self) -> list[Tenancy]:
        """Make no more; those that are made."""
        with self._lock:
            self._closed = True
            made = [spare.result() for spare in self._spares if spare.done()]
        return [spare for spare in made if spare is not None]
