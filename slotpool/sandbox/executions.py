"""At most once: what has been asked for in a lease, by execution id, and what came of it."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Callable

import attr

from .protocol import RequestFailed, Result

_KEPT_RESULTS = 256
_KEPT_CHARACTERS = 16 * 1024 * 1024
_KNOWN_IDS = 10_000
_CANCELLED = ("cancelled",)  # the request of an execution that was cancelled before it came


@attr.s(slots=True, auto_attribs=True, eq=False)
class Execution:
    """One execution. ``result`` or ``failure`` is set before ``done``; both stay None if the result is no longer kept."""

    request: tuple[object, ...]
    done: bool = False
    cancel: Callable[[], None] | None = None
    cancel_requested: bool = False
    result: Result | None = None
    failure: RequestFailed | None = None

    def answer(self) -> Result:
        """What came of it, once it is ``done``.

        :raises RequestFailed: what it failed with, or that its result is gone.
        """
        if self.failure is not None:
            raise self.failure
        if self.result is None:
            raise RequestFailed("result_gone", "the execution has run, and its result is no longer kept")
        return self.result


def _strip(failure: RequestFailed) -> None:
    """Of where it was raised: those frames hold the command and its output."""
    failure.__cause__ = failure.__context__ = failure.__traceback__ = None


def _size(execution: Execution) -> int:
    result = execution.result
    return len(result["stdout"]) + len(result["stderr"]) if result is not None else 0


class Executions:
    """The executions of one lease. Thread-safe."""

    def __init__(self) -> None:
        # Guards the fields below, and that cancel requests aren't lost while one starts; signalled when one is done.
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._known: OrderedDict[str, Execution] = OrderedDict()
        self._finished: OrderedDict[str, Execution] = OrderedDict()
        self._kept = 0  # characters of their results
        self._waiting = 0  # threads that wait for the signal

    def begin(self, execution_id: str, request: tuple[object, ...]) -> tuple[Execution, bool]:
        """The execution of that id, and whether it is new, so that the caller must run it.

        :raises RequestFailed: if that id was used for another request.
        """
        with self._lock:
            known = self._known.get(execution_id)
            if known is not None:
                if known.request not in (request, _CANCELLED):
                    raise RequestFailed(
                        "invalid_request",
                        "execution_id: expected a new id for a new request, got one that was used for another",
                        field="execution_id",
                        expected="a new id for a new request",
                        got="one that was used for another",
                    )
                return known, False
            execution = self._known[execution_id] = Execution(request)
            self._forget_oldest()
            return execution, True

    def _forget_oldest(self) -> None:
        """If there are too many. The lock is held."""
        if len(self._known) > _KNOWN_IDS:
            oldest = next((key for key, known in self._known.items() if known.done), None)
            if oldest is not None:
                del self._known[oldest]

    def started(self, execution: Execution, cancel: Callable[[], None]) -> None:
        """``cancel`` can be called from now on."""
        with self._lock:
            execution.cancel = cancel
            requested = execution.cancel_requested
        if requested:
            cancel()

    def finish(self, execution_id: str, execution: Execution) -> None:
        """Its result or failure is set: wake who waits for it, and forget the content of the oldest ones."""
        if execution.failure is not None:
            _strip(execution.failure)
        with self._lock:
            self._finished[execution_id] = execution
            self._kept += _size(execution)
            while len(self._finished) > 1 and (len(self._finished) > _KEPT_RESULTS or self._kept > _KEPT_CHARACTERS):
                _, oldest = self._finished.popitem(last=False)
                self._kept -= _size(oldest)
                oldest.result = oldest.failure = None
            execution.cancel = None
            execution.done = True
            if self._waiting:
                self._changed.notify_all()

    def wait(self, execution: Execution, timeout: float) -> bool:
        """Wait until it is done, for up to ``timeout`` seconds; whether it is."""
        with self._lock:
            self._waiting += 1
            try:
                return self._changed.wait_for(lambda: execution.done, timeout)
            finally:
                self._waiting -= 1

    def cancel(self, execution_id: str) -> bool:
        """Kill it if it runs; an id that never came is kept from running. Whether there was something to cancel."""
        with self._lock:
            execution = self._known.get(execution_id)
            if execution is None:
                why = "it was cancelled before it began"
                execution = Execution(_CANCELLED, True, failure=RequestFailed("result_gone", why, may_have_run=False))
                self._known[execution_id] = execution
                self._forget_oldest()
                return False
            if execution.done:
                return False
            execution.cancel_requested = True
            cancel = execution.cancel
        if cancel is not None:
            cancel()
        return True
