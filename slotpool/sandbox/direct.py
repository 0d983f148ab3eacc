"""Files that the server moves itself, by a :class:`.Loan`: most of them, in a fraction of what a process would cost."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from typing import Callable

from .loan import Loan
from .protocol import RequestFailed

LIMIT = 300.0  # seconds for a file to be read or written, not counting those in which the other side of the connection is slow
# Bytes that are read at once. More would cost more: malloc gives back to the kernel what is free in one large piece.
_PART = 1 << 18


class DirectReading:
    """A file that is being read: iterate over its content, and close it in the end. Used by one thread."""

    def __init__(self, loan: Loan, path: str, limit: int, going_on: Callable[[], bool]) -> None:
        """
        :param limit: bytes that it may have.
        :param going_on: whether the lease is.
        :raises RequestFailed: it can't be read.
        """
        self._loan = loan
        self._going_on = going_on
        self._clock = _Clock()
        try:
            self.size = os.fstat(loan.fd).st_size
            if self.size > limit:
                raise OSError(errno.EFBIG, f"{self.size} bytes, and the limit is {limit}")
            self._left = self.size
            self._begun = self._read()  # before anything is promised
        except OSError as e:
            raise failed(e, path) from e

    def _read(self) -> bytes:
        with self._clock:
            part = os.read(self._loan.fd, min(self._left, _PART))
        if not part and self._left:
            raise OSError(errno.EIO, f"it became {self._left} bytes shorter while it was read")
        self._left -= len(part)
        return part

    def __iter__(self) -> Iterator[bytes]:
        """:raises ConnectionAbortedError: not all can be sent that was promised, which only the connection's end can tell."""
        yield self._begun
        try:
            while self._left:
                if not self._going_on():
                    raise OSError(errno.ECANCELED, "the lease has ended")
                yield self._read()
        except OSError as e:
            raise ConnectionAbortedError(str(e)) from e

    def close(self) -> None:
        self._loan.close()


def write(loan: Loan, path: str, parts: Iterator[bytes], going_on: Callable[[], bool]) -> bool:
    """Write ``parts`` and put the file in place; False if the lease has ended, or the zygote did not tell how that went.

    :raises RequestFailed: it can't be written.
    """
    clock = _Clock()
    try:
        for part in parts:
            view = memoryview(part)
            while view:
                if not going_on():
                    return False
                with clock:
                    view = view[os.write(loan.fd, view) :]
    except OSError as e:
        raise failed(e, path) from e
    code = loan.commit()
    if code:
        raise failed(OSError(code, os.strerror(code)), path)
    return code is not None


class _Clock:
    """Sums up the time within it. A slot can hold up who reads or writes a file of its own, by doing so itself all the time."""

    _spent = 0.0

    def __enter__(self) -> None:
        self._began = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self._spent += time.monotonic() - self._began
        if self._spent > LIMIT:
            raise OSError(errno.ETIMEDOUT, "it took too long")


def failed(e: OSError, path: str) -> RequestFailed:
    return RequestFailed("file_error", e.strerror or str(e), errno=e.errno or errno.EIO, path=path)
