"""HTTP to one sandbox server: keep-alive connections by TCP, TLS or Unix socket, and what is known about a request that failed.

Connecting, TLS and its checks are urllib3's. Requests and answers are written and read here, and only as these servers have
them (RFC 9112 with a Content-Length): a general client's headers and packets would be most of what a short command costs.
"""

from __future__ import annotations

import collections
import io
import json
import re
import select
import socket
import urllib.parse
from collections.abc import Mapping
from typing import Any, Callable

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection

from ..errors import InvalidRequest
from . import protocol

CONNECT_TIMEOUT = 5.0  # seconds
_MAX_HEAD = 65536
_MAX_BODY = 1 << 34
_READ_SIZE = 1 << 18
_JOINED = 1 << 16  # bodies up to this size are sent together with the head
_STATUS = re.compile(rb"HTTP/1\.([01]) (\d{3})(?![^ \r])")
_LENGTH = re.compile(rb"\r\nContent-Length:[ \t]*(.*?)[ \t]*(?=\r\n|\Z)", re.IGNORECASE)
_CLOSE = re.compile(rb"\r\nConnection:[ \t]*close[ \t]*(?=\r\n|\Z)", re.IGNORECASE)


class NotSent(Exception):
    """The server could not be reached: the request has had no effect."""


class Broken(Exception):
    """The connection broke, or no answer came in time, after the request may have been sent."""


class Cut(Broken):
    """The answer had begun, and its end did not come."""


class _Short(ConnectionError):
    """The connection was closed amid the content."""


class _Malformed(Exception):
    """The answer is not what these servers send."""


class Transport:
    """Requests to one server. Thread-safe; each has a connection to itself, and up to ``connections`` are kept open.

    Nothing is ever sent twice: repeating is for the caller, who knows what may be repeated.
    """

    def __init__(self, address: str, token: str | None, connections: int, cacert: str | None = None) -> None:
        """:param cacert: file of the certificates by which an ``https`` server's is checked, instead of the system's."""
        self.address = address
        self._connect = _connector(address, cacert)
        # The last used is the first taken. Appending and popping are atomic, so there is no lock.
        self._idle: collections.deque[_Connection] = collections.deque()
        self._most = connections
        self.closed = False  # by its owner: the other side is given up
        host = urllib.parse.urlsplit(address).netloc.rpartition("@")[2] or "localhost"
        self._fixed = f" HTTP/1.1\r\nHost: {host}\r\n" + (f"Authorization: Bearer {token}\r\n" if token is not None else "")

    def request(
        self, method: str, path: str, body: bytes | None, read_timeout: float, headers: Mapping[str, str] | None = None
    ) -> tuple[int, bytes]:
        """Status and content of the answer.

        :param read_timeout: seconds that the server may be silent; if it is shorter, the limit of connecting too.
        :raises NotSent, Broken: if there was none, or not all of it.
        """
        text = f"{method} {path}{self._fixed}"
        for name, value in (headers or {}).items():
            text += f"{name}: {value}\r\n"
        head = (f"{text}\r\n" if body is None else f"{text}Content-Length: {len(body)}\r\n\r\n").encode("latin-1")
        connection = self._take(min(CONNECT_TIMEOUT, read_timeout))
        try:
            if connection.timeout != read_timeout:
                connection.sock.settimeout(read_timeout)
                connection.timeout = read_timeout
            status, content, keep = _exchange(connection.sock, head, body)
        except BaseException as e:
            connection.close()
            if isinstance(e, _Malformed) or _is_of_the_system(e):
                raise Cut(str(e)) if isinstance(e, _Short) else Broken(f"{type(e).__name__}: {e}") from e
            raise
        if keep and not self.closed and len(self._idle) < self._most:
            self._idle.append(connection)
            if self._is_closed():  # since the last look
                self.close()
        else:
            connection.close()
        return status, content

    def _take(self, timeout: float) -> _Connection:
        while True:
            try:
                connection = self._idle.pop()
            except IndexError:
                break
            if not connection.told():
                return connection
            connection.close()  # the server has closed it, as it was idle for long
        try:
            return _Connection(self._connect(timeout))
        except (OSError, urllib3.exceptions.HTTPError) as e:
            cause = e.__cause__ if isinstance(e, urllib3.exceptions.HTTPError) else e
            if isinstance(cause, OSError) and not _is_of_the_system(cause):
                raise cause from None
            raise NotSent(str(e)) from e

    def json(
        self, method: str, path: str, body: object, read_timeout: float, headers: Mapping[str, str] | None = None
    ) -> tuple[int, Any]:
        """The same with JSON both ways; None for an answer that is none. A ``body`` of None is none.

        :raises InvalidRequest: JSON can't express ``body``.
        """
        try:
            data = None if body is None else json.dumps(body).encode()
        except (TypeError, ValueError) as e:
            raise InvalidRequest("args", "what JSON can express", str(e)) from e
        status, content = self.request(method, path, data, read_timeout, headers)
        try:
            return status, protocol.parse(content)
        except ValueError:
            return status, None

    def _is_closed(self) -> bool:
        return self.closed

    def close(self) -> None:
        """Close the idle connections now, and those in use when their request ends."""
        self.closed = True
        while True:
            try:
                self._idle.pop().close()
            except IndexError:
                return


class _Connection:
    """One that may serve many requests, one after the other."""

    def __init__(self, opened: Any) -> None:
        """:param opened: something with ``sock`` and ``close``."""
        self.sock: socket.socket = opened.sock
        self.close: Callable[[], None] = opened.close
        self.timeout = -1.0  # of its socket; not known yet
        self._poll = select.poll()
        self._poll.register(self.sock, select.POLLIN)

    def told(self) -> bool:
        """Whether something has come, or it was closed."""
        return bool(self._poll.poll(0))


class _UnixConnection:
    def __init__(self, path: str, timeout: float) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self.sock.settimeout(timeout)
            self.sock.connect(path)
        except BaseException:
            self.sock.close()
            raise

    def close(self) -> None:
        self.sock.close()


def _connector(address: str, cacert: str | None = None) -> Callable[[float], Any]:
    """What opens a connection in so many seconds: something with ``sock`` and ``close``."""
    parts = urllib.parse.urlsplit(address)
    if parts.scheme == "unix":
        return lambda timeout: _UnixConnection(parts.path, timeout)

    def connect(timeout: float) -> Any:
        where = parts.hostname or "", parts.port
        connection: HTTPConnection
        if parts.scheme == "https":
            connection = HTTPSConnection(*where, timeout=timeout, cert_reqs="CERT_REQUIRED", ca_certs=cacert)
        else:
            connection = HTTPConnection(*where, timeout=timeout)
        try:
            connection.connect()
        except BaseException:
            connection.close()
            raise
        return connection

    return connect


def _is_of_the_system(error: BaseException) -> bool:
    """Whether a socket raised it, and not a signal's handler of the caller's, which may raise a ``TimeoutError`` just here.

    A handler has a frame of its own; a socket's methods have none, or that of a module that is known.
    """
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    module = str(trace.tb_frame.f_globals.get("__name__")) if trace is not None else ""
    return isinstance(error, OSError) and (module in (__name__, "socket", "ssl") or module.startswith("urllib3."))


def _exchange(sock: socket.socket, head: bytes, body: bytes | None) -> tuple[int, bytes, bool]:
    """Send and receive; the status, the content, and whether the connection may be kept.

    :raises _Malformed: if the answer is not what these servers send.
    """
    cut: OSError | None = None
    try:
        if body is None or len(body) <= _JOINED:
            sock.sendall(head + body if body else head)
        else:
            sock.sendall(head)
            sock.sendall(body)
    except (BrokenPipeError, ConnectionResetError) as e:
        if not _is_of_the_system(e):
            raise
        cut = e  # a server that refuses a body may answer and close before all of it is sent
    try:
        status, content, keep = _receive_answer(sock)
    except (OSError, _Malformed) as e:
        if cut is not None and (isinstance(e, _Malformed) or _is_of_the_system(e)):
            raise cut from None
        raise
    return status, content, keep and cut is None


def _receive_answer(sock: socket.socket) -> tuple[int, bytes, bool]:
    received = _receive(sock)
    while True:
        end = received.find(b"\r\n\r\n")
        if end >= 0:
            break
        if len(received) > _MAX_HEAD:
            raise _Malformed("the head of the answer is too long")
        received += _receive(sock)
    status, length, keep = _parse_head(received[:end])
    content = received[end + 4 :]
    if not len(content) <= length <= _MAX_BODY:
        raise _Malformed(f"an answer with a Content-Length that can't be: {length}")
    if len(content) < length:
        content = _receive_rest(sock, content, length)
    return status, content, keep


def _parse_head(head: bytes) -> tuple[int, int, bool]:
    """Status, length of the content, whether the connection may be kept."""
    first, lengths = _STATUS.match(head), _LENGTH.findall(head)
    if first is None:
        raise _Malformed(f"something else than HTTP: {head[:100]!r}")
    status = int(first[2])
    if not lengths and status in (204, 304):
        lengths = [b"0"]
    if len(lengths) != 1 or not lengths[0].isdigit() or len(lengths[0]) > 18:
        raise _Malformed(f"expected one Content-Length, a number, got {b', '.join(lengths)[:100]!r}")
    return status, int(lengths[0]), first[1] == b"1" and _CLOSE.search(head) is None


def _receive(sock: socket.socket) -> bytes:
    received = sock.recv(65536)
    if not received:
        raise ConnectionError("the connection was closed before the answer was complete")
    return received


def _receive_rest(sock: socket.socket, begun: bytes, length: int) -> bytes:
    # It shares its bytes with whom it has them from and gives them to. Memory for a copy would cost more than all else here, as
    # malloc gives it back to the kernel each time.
    whole = io.BytesIO(bytes(length))
    with whole.getbuffer() as view:
        at = len(begun)
        view[:at] = begun
        while at < length:
            count = sock.recv_into(view[at : at + _READ_SIZE])
            if count == 0:
                raise _Short(f"the connection was closed {length - at} bytes before the answer's end")
            at += count
    return whole.getvalue()
