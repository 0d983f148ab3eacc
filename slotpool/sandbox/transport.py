"""HTTP to one sandbox server: keep-alive connections by TCP, TLS or Unix socket, and what is known about a request that failed.

The pool of connections, timeouts and TLS are urllib3's. Its connection class is replaced by one that sends a request in one
piece and parses no more of the answer than these servers give, as both are most of what a request costs.
"""

from __future__ import annotations

import json
import socket
import urllib.parse
from typing import Any, Dict, Mapping, Optional, Tuple

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection

CONNECT_TIMEOUT = 5.0  # seconds
_MAX_HEAD = 65536
_READ_SIZE = 1 << 18
_JOINED = 1 << 16  # bodies up to this size are sent together with the head


class NotSent(Exception):
    """The server could not be reached: the request has had no effect."""


class Broken(Exception):
    """The connection broke, or no answer came in time, after the request may have been sent."""


class _Lean:
    """Mixed into urllib3's connections: requests with a body in memory, answers with a Content-Length (RFC 9112)."""

    sock: Any
    timeout: Any

    def request(self, method: str, url: str, body: Any = None, headers: Any = None, **_: Any) -> None:
        lines = [f"{method} {url} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
        if body is not None:
            lines.append(f"Content-Length: {len(body)}")
        head = "\r\n".join([*lines, "", ""]).encode("latin-1")
        if self.sock is None:
            self.connect()
        self.sock.settimeout(self.timeout)
        if body is None or len(body) <= _JOINED:
            self.sock.sendall(head + body if body else head)
        else:
            self.sock.sendall(head)
            self.sock.sendall(body)

    def getresponse(self) -> urllib3.HTTPResponse:
        self.sock.settimeout(self.timeout)
        received = self._receive()
        while b"\r\n\r\n" not in received:
            if len(received) > _MAX_HEAD:
                raise urllib3.exceptions.ProtocolError("the head of the answer is too long")
            received += self._receive()
        head, _, body = received.partition(b"\r\n\r\n")
        lines = head.decode("latin-1").split("\r\n")
        headers = {}
        for line in lines[1:]:
            name, _, value = line.partition(":")
            headers[name.strip().lower()] = value.strip()
        try:
            version, status = lines[0].split(" ", 2)[:2]
            code = int(status)
            length = 0 if code in (204, 304) else int(headers["content-length"])
        except (ValueError, KeyError) as e:
            raise urllib3.exceptions.ProtocolError(f"not an answer of a sandbox server: {lines[0][:100]!r}") from e
        content = self._receive_rest(body, length)
        if headers.get("connection", "").lower() == "close" or version != "HTTP/1.1":
            self.close()
        return urllib3.HTTPResponse(content, headers, code, preload_content=False)

    def _receive(self, size: int = 65536) -> bytes:
        received: bytes = self.sock.recv(size)
        if not received:
            raise urllib3.exceptions.ProtocolError("the connection was closed before the answer was complete")
        return received

    def _receive_rest(self, body: bytes, length: int) -> bytes:
        if len(body) == length:
            return body
        whole = bytearray(length)
        view = memoryview(whole)
        view[: len(body)] = body[:length]
        at = len(body)
        while at < length:
            count = self.sock.recv_into(view[at : at + _READ_SIZE])
            if count == 0:
                raise urllib3.exceptions.ProtocolError(f"the connection was closed {length - at} bytes before the answer's end")
            at += count
        return bytes(whole)

    def connect(self) -> None:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError


class _TcpConnection(_Lean, HTTPConnection):
    connect = HTTPConnection.connect
    close = HTTPConnection.close


class _TlsConnection(_Lean, HTTPSConnection):
    connect = HTTPSConnection.connect
    close = HTTPSConnection.close


class _UnixConnection(_Lean, HTTPConnection):
    """An HTTP connection whose host is a socket's path, percent-encoded."""

    close = HTTPConnection.close

    def connect(self) -> None:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.settimeout(self.timeout)
        try:
            sock.connect(urllib.parse.unquote(self.host))
        except OSError as e:
            sock.close()
            raise urllib3.exceptions.NewConnectionError(self, f"can't connect: {e}") from e
        self.sock = sock


class _TcpPool(urllib3.HTTPConnectionPool):
    ConnectionCls = _TcpConnection


class _TlsPool(urllib3.HTTPSConnectionPool):
    ConnectionCls = _TlsConnection


class _UnixPool(urllib3.HTTPConnectionPool):
    ConnectionCls = _UnixConnection


class Transport:
    """Requests to one server. Thread-safe; keeps up to ``connections`` open.

    Nothing is ever sent twice: repeating is for the caller, who knows what may be repeated.
    """

    def __init__(self, address: str, token: Optional[str], connections: int) -> None:
        self.address = address
        parts = urllib.parse.urlsplit(address)
        host = "localhost"
        settings: Dict[str, Any] = {"maxsize": connections, "retries": False}
        if parts.scheme == "unix":
            self._pool: urllib3.HTTPConnectionPool = _UnixPool(urllib.parse.quote(parts.path, safe=""), **settings)
        else:
            host = parts.netloc.rpartition("@")[2]
            kind = _TlsPool if parts.scheme == "https" else _TcpPool
            self._pool = kind(parts.hostname or "", parts.port, **settings)
        self._headers = {"Host": host}
        if token is not None:
            self._headers["Authorization"] = f"Bearer {token}"

    def request(
        self, method: str, path: str, body: Optional[bytes], read_timeout: float, headers: Optional[Mapping[str, str]] = None
    ) -> Tuple[int, bytes]:
        """Status and content of the answer.

        :param read_timeout: seconds that the server may be silent.
        :raises NotSent, Broken: if there was none.
        """
        try:
            answer = self._pool.urlopen(
                method,
                path,
                body=body,
                headers={**self._headers, **headers} if headers else self._headers,
                timeout=urllib3.Timeout(connect=CONNECT_TIMEOUT, read=read_timeout),
                redirect=False,
                assert_same_host=False,
            )
        except (urllib3.exceptions.NewConnectionError, urllib3.exceptions.ConnectTimeoutError) as e:
            raise NotSent(str(e)) from e
        except (urllib3.exceptions.HTTPError, OSError) as e:
            raise Broken(f"{type(e).__name__}: {e}") from e
        return answer.status, answer.data

    def json(
        self, method: str, path: str, body: object, read_timeout: float, headers: Optional[Mapping[str, str]] = None
    ) -> Tuple[int, Any]:
        """The same with JSON both ways; None for an answer that is none. A ``body`` of None is none."""
        data = None if body is None else json.dumps(body).encode()
        status, content = self.request(method, path, data, read_timeout, headers)
        try:
            return status, json.loads(content)
        except ValueError:
            return status, None

    def close(self) -> None:
        """Close idle connections; those in use are closed when their request ends."""
        self._pool.close()
