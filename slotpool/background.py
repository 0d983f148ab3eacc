"""The pool's executors: work whose result nobody waits for, and whose failure must not go unseen."""

from __future__ import annotations

import functools
import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Callable

log = logging.getLogger(__name__)


class Background:
    """A ``ThreadPoolExecutor`` that logs what fails. Thread-safe."""

    def __init__(self, workers: int, name: str) -> None:
        self._executor = ThreadPoolExecutor(workers, name)
        self._closed = False

    def submit(self, act: Callable[..., None], *args: Any) -> None:
        """Call ``act`` some time soon, in another thread. After :meth:`close`, not at all."""
        run = functools.partial(self._run, threading.Lock(), act, args)
        try:
            self._executor.submit(run)
        except RuntimeError:
            if not self._closed:  # the main thread has ended, which ends executors, but others may use the pool yet
                self._run_apart(run)

    @staticmethod
    def _run_apart(run: Callable[[], None]) -> None:
        try:
            threading.Thread(target=run, name="slotpool-late", daemon=True).start()
        except RuntimeError:  # the interpreter is going down; or there can be no more threads now, see _run()
            log.debug("no thread for %s", run)

    @staticmethod
    def _run(once: threading.Lock, act: Callable[..., None], args: tuple[Any, ...]) -> None:
        """
        :param once: taken by who does it. An executor that finds no thread for it says so, and keeps it for those it has.
        """
        if not once.acquire(blocking=False):
            return
        try:
            act(*args)
        except Exception:
            log.exception("the pool's background work failed; this is a defect of slotpool")

    def close(self) -> None:
        """Wait for what has begun; what has not is dropped."""
        self._closed = True
        self._executor.shutdown(cancel_futures=True)
