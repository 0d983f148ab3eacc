"""What shows that something goes on, where somebody looks: a bar, by tqdm where it is installed, or a line."""

from __future__ import annotations

import contextlib
import contextvars
import shutil
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from typing import Any, Callable

from .errors import InvalidRequest

_PERIOD = 1.0  # seconds between two looks at what is waited for, and before the first


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
            from tqdm import TqdmWarning

            with warnings.catch_warnings():
                warnings.simplefilter("ignore", TqdmWarning)  # a notebook without ipywidgets gets a bar of text
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


@contextlib.contextmanager
def waiting(look: Callable[[], str]) -> Iterator[None]:
    """Show a line of text while the block runs, if that takes long and somebody looks; it is gone at the end.

    :param look: what the line says; called in another thread.
    """
    if not _is_looked_at():
        yield
        return
    ended = threading.Event()

    def show() -> None:
        began = time.monotonic()
        if ended.wait(_PERIOD):
            return
        line = _cell_line() if in_notebook() else _terminal_line
        while not ended.is_set():
            line(f"{look()}; {time.monotonic() - began:.0f} s")
            ended.wait(_PERIOD)
        line("")

    # In the same context, by which a kernel knows the cell whose output it is.
    thread = threading.Thread(target=contextvars.copy_context().run, args=(show,), name="slotpool-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _terminal_line(text: str) -> None:
    room = shutil.get_terminal_size().columns - 1
    sys.stderr.write(f"\r{text[:room]}\x1b[K")  # and nothing after it
    sys.stderr.flush()


def _cell_line() -> Callable[[str], None]:
    from IPython.display import display

    handle = display({"text/plain": ""}, raw=True, display_id=True)  # type: ignore[no-untyped-call]
    assert handle is not None
    return lambda text: handle.update({"text/plain": text}, raw=True)


def _is_looked_at() -> bool:
    return sys.stderr is not None and (sys.stderr.isatty() or in_notebook())


def in_notebook() -> bool:
    """Whether this is a Jupyter kernel, whose front end shows more than text."""
    if "IPython" not in sys.modules:
        return False
    from IPython import get_ipython

    return hasattr(get_ipython(), "kernel")
