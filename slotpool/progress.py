"""A progress bar, by tqdm where it is installed."""

from __future__ import annotations

import sys
import threading
from typing import Any

from .errors import InvalidRequest


class Progress:
    """Thread-safe.

    :param total: steps, if that is known.
    :param wanted: None for a bar where somebody looks at it: at a terminal or in a notebook, if tqdm is there.
    :raises InvalidRequest: it is wanted, and tqdm is not there.
    """

    def __init__(self, total: int | None, wanted: bool | None, what: str = "") -> None:
        self._lock = threading.Lock()  # guards the bar
        self._bar: Any = None
        if wanted is False or (wanted is None and not _is_looked_at()):
            return
        try:
            from tqdm.auto import tqdm
        except ImportError as e:
            if wanted:
                raise InvalidRequest("progress", "tqdm, which `pip install 'slotpool[progress]'` installs", str(e)) from e
            return
        self._bar = tqdm(total=total, desc=what or None)

    def step(self) -> None:
        """One more is done."""
        with self._lock:
            if self._bar is not None:
                self._bar.update()

    def close(self) -> None:
        """It changes no more. Repeatable."""
        with self._lock:
            if self._bar is not None:
                self._bar.close()
                self._bar = None


def _is_looked_at() -> bool:
    return sys.stderr is not None and (sys.stderr.isatty() or in_notebook())


def in_notebook() -> bool:
    """Whether this is a Jupyter kernel, whose front end shows more than text."""
    if "IPython" not in sys.modules:
        return False
    from IPython import get_ipython

    return hasattr(get_ipython(), "kernel")
