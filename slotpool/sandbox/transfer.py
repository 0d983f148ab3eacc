"""Files on their way between a request and a slot, in parts, so that the server's memory does not grow with them.

The server moves them itself where it can, see :mod:`.direct`. Else a process in the slot does, as a call of its own.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import time
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Callable, Union

from . import direct, loan, protocol, tools
from .call import Call
from .capture import Driver, Outcome, Output
from .cell import Cell
from .files import SIZE
from .protocol import RequestFailed

if TYPE_CHECKING:
    from .host import Host

log = logging.getLogger(__name__)

_PART = 1 << 20  # bytes of a content that are taken at once


class Content(Output):
    """What the slot's own process sends of a file, to be taken in parts: its size, then as many bytes."""

    def __init__(self) -> None:
        super().__init__(0)
        self._begun = b""
        self._parts: deque[bytes] = deque()
        self.size = -1  # not known yet
        self.missing = 0  # bytes
        self.overflows = False  # more came than was said; that may never end, and nobody wants it

    def add(self, chunk: bytes) -> None:
        if self.size < 0:
            self._begun += chunk
            if len(self._begun) < SIZE.size:
                return
            (self.size,) = SIZE.unpack_from(self._begun)
            self.missing = self.size
            chunk = self._begun[SIZE.size :]
        self.overflows = len(chunk) > self.missing
        chunk = chunk[: self.missing]
        self.missing -= len(chunk)
        if chunk:
            self._parts.append(chunk)

    @property
    def truncated(self) -> bool:
        return self.size < 0 or self.missing != 0

    def take(self) -> bytes:
        """What has come and was not taken."""
        taken = self._parts.popleft() if len(self._parts) == 1 else b"".join(self._parts)
        self._parts.clear()
        return taken


class _Source:
    """The content of a request, for a call's feed. If it ends early, so does the feed, and with that the call."""

    def __init__(self, size: int, read: Callable[[int], bytes]) -> None:
        self.size = size
        self._left = size
        self._read = read
        self.failure: OSError | None = None

    def __call__(self) -> bytes:
        part = b""
        if self._left:
            try:
                part = self._read(min(self._left, _PART))
            except OSError as e:
                self.failure = e
        self._left -= len(part)
        return part

    def check(self) -> None:
        """
        :raises RequestFailed: it ended early.
        """
        if self.failure is not None:
            raise protocol.invalid("content", f"{self.size} bytes", f"fewer: {self.failure}") from self.failure

    def whole(self) -> Iterator[bytes]:
        """
        :raises RequestFailed: it ends early.
        """
        yield from iter(self, b"")
        self.check()


class _Read:
    """``read_file``, in parts."""

    stdout_limit = stderr_limit = tools.MAX_FAILURE

    def __init__(self, path: str, setting: tools.Setting) -> None:
        self.path = tools.inside({"path": path}, setting.workspace)
        self._limit = setting.max_file

    def start(self, cell: Cell) -> Call:
        return cell.read(self.path, self._limit, sized=True)

    def error(self, outcome: Outcome) -> str:
        return tools.file_error(outcome, self.path)


class _Write(_Read):
    """``write_file``, in parts."""

    def __init__(self, path: str, setting: tools.Setting, source: _Source) -> None:
        super().__init__(path, setting)
        self._source = source

    def start(self, cell: Cell) -> Call:
        return cell.write(self.path, self._source.size, more=self._source)


class _Transfer:
    """One use of either, outside of executions, as repeating it does no harm."""

    def __init__(self, host: Host, slot: str, token: str, make_tool: Callable[[tools.Setting], _Read]) -> None:
        self._host, self.slot, self._token = host, slot, token
        self._tenancy = host.tenancy(slot, token)
        self._tool = make_tool(self._tenancy.setting)
        self.job = host.start(self._tenancy, self._tool, direct.LIMIT, lambda: None, host.config.file_patience)

    def check(self) -> None:
        """
        :raises RequestFailed: it did not end well.
        """
        self._host.check(self.job, self._tenancy, self.slot, self._token)
        error = self._tool.error(self.job.outcome)
        if error:
            raise RequestFailed("file_error", error, errno=errno.ETIMEDOUT, path=self._tool.path)


def read(host: Host, slot: str, token: str, path: str) -> Reading:
    """Begin to read a file. If it is not large, all of it has been read then.

    :raises RequestFailed: it can't be read.
    """
    tenancy = host.tenancy(slot, token)
    whole = tools.inside({"path": path}, tenancy.setting.workspace)
    lent = loan.to_read(tenancy.cell, tenancy.within(whole), tenancy.device)
    if lent is None:
        return _CopiedReading(host, slot, token, path)
    try:
        return direct.DirectReading(lent, whole, host.config.max_file, functools.partial(host.holds, slot, token))
    except BaseException:
        lent.close()
        raise


class _CopiedReading:
    """A file that is being read: iterate over its content, and close it in the end. Used by one thread."""

    def __init__(self, host: Host, slot: str, token: str, path: str) -> None:
        self._transfer = _Transfer(host, slot, token, lambda setting: _Read(path, setting))
        self._content = Content()
        self._transfer.job.outcome.stdout = self._content
        self._driver = Driver([self._transfer.job])
        try:
            while self._content.size <= _PART and not self._content.overflows and self._driver.step():
                pass
            if self._driver.ended:
                self._transfer.check()
            elif self._content.size > host.config.max_file:
                raise tools.file_failure(b"", path)  # the slot's own process, if it is what it was, has refused that
        except BaseException:
            self.close()
            raise
        self.size = self._content.size

    def __iter__(self) -> Iterator[bytes]:
        """:raises ConnectionAbortedError: not all can be sent that was promised, which only the connection's end can tell."""
        job = self._transfer.job
        while not (self._driver.ended or self._content.overflows):
            part = self._content.take()
            if part:
                began = time.monotonic()
                yield part
                job.forgive(time.monotonic() - began)
            else:
                self._driver.step()
        yield self._content.take()
        if self._content.truncated:
            try:
                self._transfer.check()
            except RequestFailed as e:
                log.warning("a file of %s could not be sent to its end: %r", self._transfer.slot, str(e))
                raise ConnectionAbortedError(str(e)) from e

    def close(self) -> None:
        self._driver.close()
        self._transfer.job.call.close()


Reading = Union[direct.DirectReading, _CopiedReading]


def write(host: Host, slot: str, token: str, path: str, size: int, read: Callable[[int], bytes]) -> None:
    """Replace a file.

    :param read: gives some bytes of its content, at most as many as it is told; raises OSError if there are no more.
    :raises RequestFailed: it can't be written; then nothing is changed.
    """
    source = _Source(size, read)
    tenancy = host.tenancy(slot, token)
    whole = tools.inside({"path": path}, tenancy.setting.workspace)
    cell = tenancy.cell
    lent = loan.to_replace(cell, tenancy.within(whole), size, tenancy.device)
    if lent is None:
        _write_copied(host, slot, token, path, source)
        return
    with contextlib.closing(lent):
        told = direct.write(lent, whole, source.whole(), functools.partial(host.holds, slot, token))
    if not told:
        host.replace(tenancy, cell, slot, token)
        raise protocol.processes_lost()


def _write_copied(host: Host, slot: str, token: str, path: str, source: _Source) -> None:
    transfer = _Transfer(host, slot, token, lambda setting: _Write(path, setting, source))
    driver = Driver([transfer.job])
    try:
        driver.run()
    finally:
        driver.close()
        transfer.job.call.close()
    source.check()
    transfer.check()
