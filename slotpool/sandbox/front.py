"""HTTP/1.1 for one WSGI application (PEP 3333, RFC 9112), each connection with a thread of its own from its first request on.

A request wakes the thread that answers it, and no other: with a general server, whose main thread reads and hands on, those two
wake-ups and its parser were a quarter of what a short command cost.

What is not understood in one way only is refused: bodies without a length, two lengths, folded or malformed headers.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
import socket
import sys
import threading
import time
import urllib.parse
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Callable, NoReturn

from .lobby import Lobby

if TYPE_CHECKING:
    import ssl

    from _typeshed.wsgi import WSGIApplication

log = logging.getLogger(__name__)

_MAX_HEAD = 32_768  # a path of 4,096 bytes, each quoted, has room in it
_READ_SIZE = 1 << 18
_JOINED = 1 << 16  # bodies up to this size are sent together with the head
_MOST_LEFT = 1 << 20  # bytes of a body that was not read which are taken off the connection, so that it may go on
_IDLE = 120.0  # seconds until a connection without a request is closed
_HEAD_LIMIT = 10.0  # seconds for a head to come in whole
_SILENCE = 30.0  # seconds without a byte, either way, amid a request or an answer
_LINGER = 2.0  # seconds for which what is left of a body that was not read may come
_END_LIMIT = 5.0  # seconds that requests under way have when the server ends
KEPT = "slotpool.kept"  # in the environment: a dict that a connection's requests share while their heads but for the length do
_LENGTH_LAST = b"\r\nContent-Length: "
_LINE = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+) ([\x21-\x7e]+) HTTP/1\.([01])")
_NAME = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_CONTROL = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")


class _Refused(Exception):
    """What came is no request that is understood."""

    def __init__(self, status: str, why: str) -> None:
        super().__init__(why)
        self.status = status


class _Gone(ConnectionError):
    """The other side has closed the connection."""


class Front:
    """Serves ``app`` on a listening socket.

    :param app: may set ``slotpool.keep`` of its environment to False, to have the connection closed after the answer.
    :param most: connections at once. One more closes one that waits: of those that have not been answered yet, if there are
        any, the one that came first; else the one that has been idle for longest.
    :param tls: if given, connections are encrypted.
    """

    def __init__(self, app: WSGIApplication, listener: socket.socket, most: int, tls: ssl.SSLContext | None = None) -> None:
        self._app = app
        self._listener = listener
        self._most = most
        self.tls = tls
        self._lock = threading.Lock()  # guards _open and _ending
        self._open: set[_Connection] = set()
        self._ending = False
        name = listener.getsockname()
        host, port = (str(name[0]), str(name[1])) if isinstance(name, tuple) else ("localhost", "0")
        self.environ = {
            "SCRIPT_NAME": "",
            "SERVER_NAME": host,
            "SERVER_PORT": port,
            "wsgi.version": (1, 0),
            "wsgi.url_scheme": "http" if tls is None else "https",
            "wsgi.errors": sys.stderr,
            "wsgi.multithread": True,
            "wsgi.multiprocess": False,
            "wsgi.run_once": False,
        }

    def run(self) -> None:
        """Accept connections until :meth:`close`."""
        self._listener.setblocking(False)
        lobby = Lobby(self._listener, self._admit, _MAX_HEAD, _IDLE, _HEAD_LIMIT, self.tls is None)
        try:
            while not self._ending:
                if lobby.wait():
                    self._accept(lobby)
        finally:
            lobby.close()

    def _accept(self, lobby: Lobby) -> None:
        try:
            sock, _ = self._listener.accept()
        except BlockingIOError:  # it has gone again
            return
        except OSError as e:
            self._not_accepted(e)
            return
        if not self._make_room(lobby):
            sock.close()
            return
        try:
            if sock.family != socket.AF_UNIX:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            lobby.enter(sock)
        except OSError as e:
            sock.close()
            self._not_accepted(e)

    def _not_accepted(self, why: OSError) -> None:
        if not self._ending:
            log.warning("a connection could not be accepted: %s", why)
            time.sleep(0.1)  # out of descriptors, most likely

    def _admit(self, sock: socket.socket, received: bytes) -> None:
        connection = _Connection(self, self._app, sock, received)
        with self._lock:
            self._open.add(connection)
        try:
            threading.Thread(target=connection.serve, name="slotpool-http", daemon=True).start()
        except RuntimeError as e:  # no more threads to be had
            log.warning("a connection could not be served: %s", e)
            self.forget(connection)

    def _make_room(self, lobby: Lobby) -> bool:
        """For one more connection, at the cost of one that waits."""
        with self._lock:
            if len(self._open) + len(lobby) < self._most:
                return True
            if not lobby:
                idle = [(one.known, since, id(one), one) for one in self._open if (since := one.idle_since)]
                if not idle:
                    return False
                *_, longest = min(idle)
                self._open.discard(longest)
        if lobby:
            lobby.turn_out()
        else:
            longest.hang_up()
        return True

    def forget(self, connection: _Connection) -> None:
        with self._lock:
            self._open.discard(connection)
        connection.close()

    @property
    def ending(self) -> bool:
        return self._ending

    def close(self) -> None:
        """Accept nothing more, and give requests that are under way a few seconds. Repeatable, from any thread."""
        deadline = time.monotonic() + _END_LIMIT
        with self._lock:
            self._ending = True
            connections = list(self._open)
        with contextlib.suppress(OSError):  # closed before
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes who waits there
        self._listener.close()
        for connection in connections:
            if connection.idle_since:
                connection.hang_up()
        for connection in connections:
            connection.ended.wait(max(0.0, deadline - time.monotonic()))


class _Connection:
    """One connection and its thread.

    :ivar idle_since: when it began to wait for a request; 0 while it has one.
    :ivar known: a request of it was answered, and it was kept.
    """

    def __init__(self, front: Front, app: WSGIApplication, sock: socket.socket, received: bytes) -> None:
        self._front = front
        self._app = app
        self._sock = sock
        self._received = received
        self._last: tuple[bytes | None, dict[str, Any], bool] = None, {}, False  # see _parse()
        self.idle_since = time.monotonic()
        self.known = False
        self.ended = threading.Event()

    def hang_up(self) -> None:
        """Have its thread end. From any thread."""
        with contextlib.suppress(OSError):  # it has ended by itself
            socket.socket.shutdown(
                self._sock, socket.SHUT_RDWR
            )  # TLS's own would have what is sent from now on go out in the clear

    def close(self) -> None:
        self._sock.close()
        self.ended.set()

    def serve(self) -> None:
        """Answer requests until the connection ends."""
        try:
            if self._front.tls is not None and not self._encrypt(self._front.tls):
                return
            while self._serve_one() and not self._front.ending:
                pass
        except OSError:  # it is gone, or silent
            pass
        except Exception:
            log.exception("a connection failed; this is a defect of slotpool")
        finally:
            self._front.forget(self)

    def _encrypt(self, tls: ssl.SSLContext) -> bool:
        """Whether the other side and this one agree on how."""
        self._sock.settimeout(_HEAD_LIMIT)
        try:
            self._sock = tls.wrap_socket(self._sock, server_side=True)
        except OSError as e:
            log.info("a connection could not be encrypted: %s", e)
            return False
        return True

    def _serve_one(self) -> bool:
        """Whether the connection may be used for another."""
        try:
            head = self._receive_head()
            environ, length, keep = self._parse(head)
        except _Refused as e:
            text = f"{e}\n".encode()
            self._send(_head(e.status, [("Content-Type", "text/plain"), ("Content-Length", str(len(text)))], False), text)
            self._linger()
            return False
        body = self._body(length, environ.get("HTTP_EXPECT", "").lower() == "100-continue")
        environ["wsgi.input"] = body.stream
        keep = self._answer(environ, body, keep)
        self.known = keep
        self.idle_since = time.monotonic()  # whatever comes of the body: it can make room for others
        if not keep:
            if body.left:
                self._linger()
            return False
        deadline = time.monotonic() + _LINGER
        while body.left:
            self._sock.settimeout(max(0.001, deadline - time.monotonic()))
            body.stream.read1(min(_READ_SIZE, body.left))
        return True

    def _receive_head(self) -> bytes:
        """All up to the empty line, without it; what came after it is kept."""
        self._sock.settimeout(_IDLE)
        deadline = 0.0
        while True:
            end = self._received.find(b"\r\n\r\n")
            if (end if end >= 0 else len(self._received)) > _MAX_HEAD:
                raise _Refused("431 Request Header Fields Too Large", f"expected a head of at most {_MAX_HEAD} bytes")
            if end >= 0:
                break
            if self._received and not deadline:
                deadline = time.monotonic() + _HEAD_LIMIT
            if deadline:
                self._sock.settimeout(max(0.001, deadline - time.monotonic()))
            elif not self.idle_since:
                self.idle_since = time.monotonic()
            self._received += self.receive(65536)
        self.idle_since = 0.0
        head, self._received = self._received[:end], self._received[end + 4 :]
        return head

    def receive(self, size: int) -> bytes:
        """Some bytes.

        :raises _Gone: there are none to come.
        """
        received = self._sock.recv(size)
        if not received:
            raise _Gone
        return received

    def _parse(self, head: bytes) -> tuple[dict[str, Any], int, bool]:
        """As :func:`_parse`. A client's heads often differ in nothing but a Content-Length at their end."""
        begin, _, digits = head.rpartition(_LENGTH_LAST)
        last = 0 < len(digits) < 19 and digits.isdigit()  # nothing else comes after it
        if last and begin == self._last[0]:
            return {**self._last[1], "CONTENT_LENGTH": digits.decode()}, int(digits), self._last[2]
        environ, length, keep = _parse(head)
        environ.update(self._front.environ)
        environ[KEPT] = {}
        if last:
            self._last = begin, environ.copy(), keep
        return environ, length, keep

    def _body(self, length: int, expects: bool) -> _Body:
        begun, self._received = self._received[:length], self._received[length:]
        if len(begun) == length:
            return _Body(io.BytesIO(begun), None)
        self._sock.settimeout(_SILENCE)
        rest = _Rest(self._sock, begun, length, b"HTTP/1.1 100 Continue\r\n\r\n" if expects and not begun else b"")
        return _Body(io.BufferedReader(rest, _READ_SIZE), rest)

    def _answer(self, environ: dict[str, Any], body: _Body, keep: bool) -> bool:
        """Call the application and send what it says; whether the connection may be kept."""
        told: list[tuple[str, list[tuple[str, str]]]] = []

        def start_response(status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Callable[[bytes], object]:
            told[:] = [(status, headers)]
            return _no_write

        environ["slotpool.keep"] = True
        answer: Iterable[bytes] = self._app(environ, start_response)
        try:
            chunks = iter(answer)
            first = next(chunks, b"")
            ((status, headers),) = told
            keep = keep and (status[:3] in ("204", "304") or "Content-Length" in dict(headers))
            keep = keep and not body.is_unwanted and environ["slotpool.keep"]
            self._sock.settimeout(_SILENCE)
            if environ["REQUEST_METHOD"] == "HEAD":
                self._send(_head(status, headers, keep), b"")
                return keep
            self._send(_head(status, headers, keep), first)
            for chunk in chunks:
                self._send_all(chunk)
        finally:
            close = getattr(answer, "close", None)
            if close is not None:
                close()
        return keep

    def _send(self, head: bytes, body: bytes) -> None:
        if len(body) <= _JOINED:
            self._sock.sendall(head + body)
            return
        self._sock.sendall(head)
        self._send_all(body)

    def _send_all(self, body: bytes) -> None:
        view = memoryview(body)
        for at in range(0, len(view), _READ_SIZE):  # a socket's time-out is for the whole of what is sent at once
            self._sock.sendall(view[at : at + _READ_SIZE])

    def _linger(self) -> None:
        """Take what is still being sent for a moment, as closing at once would reset the connection and lose the answer."""
        socket.socket.shutdown(self._sock, socket.SHUT_WR)
        deadline = time.monotonic() + _LINGER
        left = 64 * _MOST_LEFT
        while left > 0 and time.monotonic() < deadline:
            self._sock.settimeout(max(0.001, deadline - time.monotonic()))
            left -= len(self.receive(_READ_SIZE))


def _no_write(data: bytes) -> NoReturn:
    raise NotImplementedError("expected an application that returns what it sends, got one that calls write()")


class _Rest(io.RawIOBase):
    """A body of which a part is still to come."""

    def __init__(self, sock: socket.socket, begun: bytes, length: int, greeting: bytes) -> None:
        self._sock = sock
        self._begun = begun
        self.greeting = greeting  # what the other side waits for before it sends the body
        self.left = length

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if self.greeting:
            self._sock.sendall(self.greeting)
            self.greeting = b""
        most = min(len(buffer), self.left)
        if self._begun:
            count = min(most, len(self._begun))
            buffer[:count], self._begun = self._begun[:count], self._begun[count:]
        else:
            count = self._sock.recv_into(buffer, most) if most else 0
            if most and not count:
                raise _Gone
        self.left -= count
        return count


class _Body:
    def __init__(self, stream: io.BytesIO | io.BufferedReader, rest: _Rest | None) -> None:
        self.stream = stream
        self._rest = rest

    @property
    def is_unwanted(self) -> bool:
        """Whether it is not worth being received any more; or may never be sent, as nobody has asked for it."""
        return self._rest is not None and (self._rest.left > _MOST_LEFT or bool(self._rest.greeting))

    @property
    def left(self) -> int:
        """Bytes that have not been taken off the connection."""
        return self._rest.left if self._rest is not None else 0


def _parse(head: bytes) -> tuple[dict[str, Any], int, bool]:
    """The environment, the length of the body, and whether the connection may be kept.

    :raises _Refused:
    """
    lines = head.split(b"\r\n")
    line = _LINE.fullmatch(lines[0])
    if line is None:
        raise _Refused("400 Bad Request", "expected a request line of HTTP/1.1")
    method, target, minor = line.groups()
    path, _, query = _origin_form(target).partition(b"?")
    environ: dict[str, Any] = {
        "REQUEST_METHOD": method.decode(),
        "PATH_INFO": (urllib.parse.unquote_to_bytes(path) if b"%" in path else path).decode("latin-1"),
        "QUERY_STRING": query.decode(),
        "SERVER_PROTOCOL": f"HTTP/1.{minor.decode()}",
    }
    for raw in lines[1:]:
        name, colon, value = raw.partition(b":")
        if not colon or _NAME.fullmatch(name) is None or _CONTROL.search(value) is not None:
            raise _Refused("400 Bad Request", "expected header lines of a name, a colon and a value without control characters")
        if b"_" in name:
            continue  # it would pass for the one with dashes
        key = _KEYS.get(name) or _key(name)
        text = value.strip(b" \t").decode("latin-1")
        environ[key] = f"{environ[key]},{text}" if key in environ else text
    if minor == b"1" and "HTTP_HOST" not in environ:
        raise _Refused("400 Bad Request", "expected a header Host")
    if "HTTP_TRANSFER_ENCODING" in environ:
        raise _Refused("411 Length Required", "expected a Content-Length, got Transfer-Encoding")
    length = environ.pop("HTTP_CONTENT_LENGTH", "0")
    if not (length.isascii() and length.isdigit() and len(length) < 19):
        raise _Refused("400 Bad Request", "expected one Content-Length, a number")
    environ["CONTENT_LENGTH"] = length
    environ["CONTENT_TYPE"] = environ.pop("HTTP_CONTENT_TYPE", "")
    tokens = environ.get("HTTP_CONNECTION", "").lower()
    return environ, int(length), minor == b"1" and "close" not in tokens


def _origin_form(target: bytes) -> bytes:
    """The path and query of an address in full, which proxies may send."""
    if target.startswith((b"http://", b"https://")):
        parts = target.split(b"/", 3)
        return b"/" + (parts[3] if len(parts) > 3 else b"")
    return target


def _key(name: bytes) -> str:
    """What a header is called in the environment."""
    return "HTTP_" + name.decode().upper().replace("-", "_")


_KEYS = {name: _key(name) for name in (b"Host", b"Authorization", b"Content-Length", b"Slotpool-Lease")}


def _head(status: str, headers: list[tuple[str, str]], keep: bool) -> bytes:
    text = f"HTTP/1.1 {status}\r\n"
    for name, value in headers:
        text += f"{name}: {value}\r\n"
    return (f"{text}\r\n" if keep else f"{text}Connection: close\r\n\r\n").encode("latin-1")
