"""A thread that keeps asking one blocking query."""

from __future__ import annotations

import logging
import threading
import time
from typing import Callable

from ...errors import NomadError

log = logging.getLogger(__name__)

_WAIT = 60.0  # seconds that one query is held
_LEAST = 0.5  # seconds between two queries when there is nothing new
_PAUSES = (0.2, 1.0, 3.0, 5.0)  # seconds after so many failures in a row


class Watch:
    """Calls ``ask(index, wait)``, which returns the index of what it has seen, until it is stopped.

    :ivar trouble: why the last query failed; None if it did not.
    """

    def __init__(self, name: str, ask: Callable[[int, float], int]) -> None:
        self.trouble: Exception | None = None
        self._name = name
        self._ask = ask
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"slotpool-nomad-{name}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Let no further query begin."""
        self._stopped.set()

    def join(self, interrupt: Callable[[], None]) -> None:
        """Wait until it has ended.

        :param interrupt: breaks off a query that is under way; again and again, as one may just begin.
        """
        while self._thread.is_alive() and self._thread is not threading.current_thread():
            interrupt()
            self._thread.join(0.1)

    def _run(self) -> None:
        index, failures = 0, 0
        while not self._stopped.is_set():
            try:
                asked = time.monotonic()
                seen = self._ask(index, _WAIT if index else 0.0)
                if seen <= index and time.monotonic() - asked < _LEAST:  # it did not block
                    self._stopped.wait(_LEAST)
                # As Nomad's documentation asks: one that goes back, as a restored server's does, begins anew.
                index = max(seen, 1) if seen >= index else 0
                self.trouble, failures = None, 0
            except Exception as e:
                if self._stopped.is_set():
                    return
                if not isinstance(e, NomadError):
                    log.exception("following the job's %s failed; this is a defect of slotpool", self._name)
                elif failures == 0:
                    log.warning("can't follow the job's %s: %s", self._name, e)
                self.trouble = e
                self._stopped.wait(_PAUSES[min(failures, len(_PAUSES) - 1)])
                failures += 1
                index = 0
