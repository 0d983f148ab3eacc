"""The pool's executor: work whose result nobody waits for, and whose failure must not go unseen."""

from __future__ import annotations

import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Callable

log = logging.getLogger(__name__)

_WORKERS = 32


class Background:
    """A ``ThreadPoolExecutor`` that logs what fails. Thread-safe."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(_WORKERS, "slotpool")
        self._closed = False

    def submit(self, act: Callable[..., None], *args: Any) -> None:
        """Call ``act`` some time soon, in another thread. After :meth:`close`, not at all."""
        try:
            self._executor.submit(self._run, act, args)
        except RuntimeError:
            if not self._closed:  # the main thread has ended, which ends executors, but others may use the pool yet
                self._run_apart(act, args)

    def _run_apart(self, act: Callable[..., None], args: tuple[Any, ...]) -> None:
        try:
            threading.Thread(target=self._run, args=(act, args), name="slotpool-late", daemon=True).start()
        except RuntimeError:  # the interpreter is going down
            log.debug("not done any more: %s", act)

    @staticmethod
    def _run(act: Callable[..., None], args: tuple[Any, ...]) -> None:
        try:
            act(*args)
        except Exception:
            log.exception("the pool's background work failed; this is a defect of slotpool")

    def close(self) -> None:
        """Wait for what has begun; what has not is dropped."""
        self._closed = True
        self._executor.shutdown(cancel_futures=True)
