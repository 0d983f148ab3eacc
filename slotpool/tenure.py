"""One lease in the pool's hands, idle or handed out: what it gives access to, and whether it still holds."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING

from .errors import LeaseLost
from .sandbox import logs
from .slot import SlotState

if TYPE_CHECKING:
    from types import TracebackType

    from .container import Container
    from .preparing import Step
    from .sandbox.client import SandboxClient
    from .sandbox.protocol import Lease


class Tenure:
    """A lease as its pool sees it. Thread-safe."""

    def __init__(self, container: Container, lease: Lease) -> None:
        self._lease = lease
        self.container = container
        self.slot = lease["slot"]
        self.token = lease["token"]
        self.workspace = lease["workspace"]
        self.network = lease["network"]
        self.used = False  # whether anything may have been done in the slot, so that it needs cleaning
        self.prepared: tuple[Step, ...] = ()  # steps of a setup that have been carried out since the workspace was clean
        self.claimed = False  # whether a slot has been made of it, whose finalizer sees to its return
        self.acquired_at = 0.0  # on the monotonic clock
        self._lock = threading.Lock()  # guards the fields below
        self._running = 0
        self._end = ""  # why it can't be used any more
        self._lost = False
        self._released = False
        self._pid = os.getpid()

    def handed_on(self) -> Tenure:
        """The same lease for another holder; whoever has this object can't use it any more."""
        fresh = Tenure(self.container, {**self._lease, "network": self.network})
        fresh.used, fresh.prepared = self.used, self.prepared
        return fresh

    def use(self) -> _Use:
        """To be used as ``with tenure.use() as client:``, the client of its container, for one call into the slot.

        :raises LeaseLost: if it does not hold any more; also if a call finds that out.
        """
        return _Use(self)

    def _begin(self) -> SandboxClient:
        if os.getpid() != self._pid:
            raise LeaseLost(f"{self.slot} belongs to process {self._pid}, from which this one was forked")
        with self._lock:
            if self._end:
                raise LeaseLost(self._end)
            self._running += 1
            self.used = True
        return self.container.client

    def _finish(self) -> None:
        with self._lock:
            self._running -= 1

    def lose(self, why: str) -> None:
        """The server does not know the lease any more, or the server itself is lost."""
        with self._lock:
            self._lost = True
            self._end = self._end or why

    def end(self) -> bool:
        """The holder gives it back; False if that was done before."""
        with self._lock:
            if self._released:
                return False
            self._end, self._released = "the slot has been released", True
            return True

    @property
    def lease_id(self) -> str:
        """What logs call the lease."""
        return logs.lease_id(self.token)

    @property
    def lost(self) -> bool:
        with self._lock:
            return self._lost

    @property
    def state(self) -> SlotState:
        with self._lock:
            if self._released:
                return SlotState.RELEASING
            if self._lost:
                return SlotState.ERROR
            return SlotState.EXECUTING if self._running else SlotState.ACQUIRED


class _Use:
    """One call into the slot. A class, as a generator's context manager would be a twentieth of what a short command costs."""

    __slots__ = ("_tenure",)

    def __init__(self, tenure: Tenure) -> None:
        self._tenure = tenure

    def __enter__(self) -> SandboxClient:
        return self._tenure._begin()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if isinstance(error, LeaseLost):
            self._tenure.lose(error.message)
        self._tenure._finish()
