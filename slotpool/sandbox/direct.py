"""Files that the server moves itself, by a :class:`.Loan`: most of them, in a fraction of what a process would cost."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from typing import Callable

from .loan import Loan
from .protocol import RequestFailed

PART = 1 << 20  # bytes that are moved at once


class DirectReading:
    """A file that is being read: iterate over its content, and close it in the end. Used by one thread."""

    def __init__(self, loan: Loan, path: str, limit: int, holds: Callable[[], bool]) -> None:
        """
        :param limit: bytes that it may have.
        :param holds: whether the lease goes on.
        :raises RequestFailed: it can't be read.
        """
        self._loan = loan
        self._holds = holds
        try:
            self.size = os.fstat(loan.fd).st_size
            if self.size > limit:
                raise OSError(errno.EFBIG, f"{self.size} bytes, and the limit is {limit}")
            self._begun = os.read(loan.fd, min(self.size, PART))
        except OSError as e:
            raise failed(e, path) from e
        if len(self._begun) < PART:  # then it is what the file was in this moment
            self.size = len(self._begun)

    def __iter__(self) -> Iterator[bytes]:
        """:raises ConnectionAbortedError: not all can be sent that was promised, which only the connection's end can tell."""
        yield self._begun
        left = self.size - len(self._begun)
        while left:
            if not self._holds():
                raise ConnectionAbortedError("the lease has ended")
            part = os.read(self._loan.fd, min(left, PART))
            if not part:
                raise ConnectionAbortedError(f"it became {left} bytes shorter while it was read")
            left -= len(part)
            yield part

    def close(self) -> None:
        self._loan.close()


def write(loan: Loan, path: str, parts: Iterator[bytes]) -> bool:
    """Write ``parts`` and put the file in place; False if the zygote did not tell how that went.

    :raises RequestFailed: it can't be written.
    """
    try:
        for part in parts:
            view = memoryview(part)
            while view:
                view = view[os.write(loan.fd, view) :]
    except OSError as e:
        raise failed(e, path) from e
    code = loan.commit()
    if code:
        raise failed(OSError(code, os.strerror(code)), path)
    return code is not None


def failed(e: OSError, path: str) -> RequestFailed:
    return RequestFailed("file_error", e.strerror or str(e), errno=e.errno or errno.EIO, path=path)
