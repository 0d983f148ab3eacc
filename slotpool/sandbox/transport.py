"""HTTP to one sandbox server: keep-alive connections by TCP, TLS or Unix socket, and what is known about a request that failed.

Connecting, TLS and its checks are urllib3's. Requests and answers are written and read here, and only as these servers have
them (RFC 9112 with a Content-Length): a general client's headers and packets would be most of what a short command costs.
"""

from __future__ import annotations

import collections
import json
import select
import socket
import urllib.parse
from collections.abc import Mapping
from typing import Any, Callable

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection

CONNECT_TIMEOUT = 5.0  # seconds
_MAX_HEAD = 65536
_MAX_BODY = 1 << 34
_READ_SIZE = 1 << 18
_JOINED = 1 << 16  # bodies up to this size are sent together with the head


class NotSent(Exception):
    """The server could not be reached: the request has had no effect."""


class Broken(Exception):
    """The connection broke, or no answer came in time, after the request may have been sent."""


class Transport:
    """Requests to one server. Thread-safe; each has a connection to itself, and up to ``connections`` are kept open.

    Nothing is ever sent twice: repeating is for the caller, who knows what may be repeated.
    """

    def __init__(self, address: str, token: str | None, connections: int) -> None:
        self.address = address
        self._connect = _connector(address)
        # The last used is the first taken. Appending and popping are atomic, so there is no lock.
        self._idle: collections.deque[Any] = collections.deque()
        self._most = connections
        self._closed = False
        host = urllib.parse.urlsplit(address).netloc.rpartition("@")[2] or "localhost"
        self._fixed = f" HTTP/1.1\r\nHost: {host}\r\n" + (f"Authorization: Bearer {token}\r\n" if token is not None else "")

    def request(
        self, method: str, path: str, body: bytes | None, read_timeout: float, headers: Mapping[str, str] | None = None
    ) -> tuple[int, bytes]:
        """Status and content of the answer.

        :param read_timeout: seconds that the server may be silent.
        :raises NotSent, Broken: if there was none.
        """
        lines = [method, " ", path, self._fixed]
        for name, value in (headers or {}).items():
            lines += name, ": ", value, "\r\n"
        if body is not None:
            lines.append(f"Content-Length: {len(body)}\r\n")
        lines.append("\r\n")
        head = "".join(lines).encode("latin-1")
        connection = self._take()
        try:
            status, content, keep = _exchange(connection.sock, head, body, read_timeout)
        except (OSError, ValueError) as e:
            connection.close()
            raise Broken(f"{type(e).__name__}: {e}") from e
        except BaseException:
            connection.close()
            raise
        if keep and not self._closed and len(self._idle) < self._most:
            self._idle.append(connection)
            if self._is_closed():  # since the last look
                self.close()
        else:
            connection.close()
        return status, content

    def _take(self) -> Any:
        while True:
            try:
                connection = self._idle.pop()
            except IndexError:
                break
            poll = select.poll()
            poll.register(connection.sock, select.POLLIN)
            if not poll.poll(0):
                return connection
            connection.close()  # the server has closed it, as it was idle for long
        try:
            return self._connect()
        except (OSError, urllib3.exceptions.HTTPError) as e:
            raise NotSent(str(e)) from e

    def json(
        self, method: str, path: str, body: object, read_timeout: float, headers: Mapping[str, str] | None = None
    ) -> tuple[int, Any]:
        """The same with JSON both ways; None for an answer that is none. A ``body`` of None is none."""
        data = None if body is None else json.dumps(body).encode()
        status, content = self.request(method, path, data, read_timeout, headers)
        try:
            return status, json.loads(content)
        except ValueError:
            return status, None

    def _is_closed(self) -> bool:
        return self._closed

    def close(self) -> None:
        """Close the idle connections now, and those in use when their request ends."""
        self._closed = True
        while True:
            try:
                self._idle.pop().close()
            except IndexError:
                return


class _UnixConnection:
    def __init__(self, path: str) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self.sock.settimeout(CONNECT_TIMEOUT)
            self.sock.connect(path)
        except BaseException:
            self.sock.close()
            raise

    def close(self) -> None:
        self.sock.close()


def _connector(address: str) -> Callable[[], Any]:
    """What opens a connection: something with ``sock`` and ``close``."""
    parts = urllib.parse.urlsplit(address)
    if parts.scheme == "unix":
        return lambda: _UnixConnection(parts.path)
    kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection

    def connect() -> Any:
        connection = kind(parts.hostname or "", parts.port, timeout=CONNECT_TIMEOUT)
        connection.connect()
        return connection

    return connect


def _exchange(sock: socket.socket, head: bytes, body: bytes | None, read_timeout: float) -> tuple[int, bytes, bool]:
    """Send and receive; the status, the content, and whether the connection may be kept.

    :raises ValueError: if the answer is not what these servers send.
    """
    sock.settimeout(read_timeout)
    if body is None or len(body) <= _JOINED:
        sock.sendall(head + body if body else head)
    else:
        sock.sendall(head)
        sock.sendall(body)
    received = _receive(sock)
    while True:
        end = received.find(b"\r\n\r\n")
        if end >= 0:
            break
        if len(received) > _MAX_HEAD:
            raise ValueError("the head of the answer is too long")
        received += _receive(sock)
    lines = received[:end].split(b"\r\n")
    version, status = lines[0].split(b" ", 2)[:2]
    length: int | None = 0 if status in (b"204", b"304") else None
    keep = version == b"HTTP/1.1"
    for line in lines[1:]:
        name, _, value = line.partition(b":")
        name = name.lower()
        if name == b"content-length":
            length = int(value)
        elif name == b"connection" and value.strip().lower() == b"close":
            keep = False
    content = received[end + 4 :]
    if length is None or not len(content) <= length <= _MAX_BODY:
        raise ValueError(f"an answer without a Content-Length that can be: {lines[0][:100]!r}")
    if len(content) < length:
        content = _receive_rest(sock, content, length)
    return int(status), content, keep


def _receive(sock: socket.socket) -> bytes:
    received = sock.recv(65536)
    if not received:
        raise ConnectionError("the connection was closed before the answer was complete")
    return received


def _receive_rest(sock: socket.socket, begun: bytes, length: int) -> bytes:
    whole = bytearray(length)
    view = memoryview(whole)
    at = len(begun)
    view[:at] = begun
    while at < length:
        count = sock.recv_into(view[at : at + _READ_SIZE])
        if count == 0:
            raise ConnectionError(f"the connection was closed {length - at} bytes before the answer's end")
        at += count
    return bytes(whole)
