"""A TCP proxy between a client and a server that cuts connections, or holds them up, where a test wants that."""

from __future__ import annotations

import socket
import threading
import urllib.parse
from collections.abc import Iterable, Iterator
from typing import Callable


class Severed(Exception):
    """Raised by a passage: the connection is to be cut here."""


# What becomes of bytes on one connection: called with the direction ("request" or "answer") and some bytes, it gives what goes
# on, piece by piece.
Passage = Callable[[str, bytes], Iterable[bytes]]

# What a test decides on: the direction and the bytes so far in it, on this connection.
Cut = Callable[[str, bytes], bool]

_Pair = tuple[socket.socket, socket.socket]


class Proxy:
    """Forwards to a server's address, which may change, what ``passage``, made for each connection, lets through."""

    def __init__(self, address: str, passage: Callable[[], Passage]) -> None:
        self.target = address
        self._passage = passage
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.connections = 0
        self._lock = threading.Lock()  # guards the next one
        self._open: dict[_Pair, list[threading.Thread]] = {}
        self._acceptor = threading.Thread(target=self._accept)
        self._acceptor.start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            try:
                far = _connected(self.target)
            except OSError:
                near.close()
                continue
            pair, passage = (near, far), self._passage()
            threads = [
                threading.Thread(target=self._forward, args=(pair, direction, passage)) for direction in ("request", "answer")
            ]
            with self._lock:
                self._open[pair] = list(threads)
            for thread in threads:
                thread.start()

    def _forward(self, pair: _Pair, direction: str, passage: Passage) -> None:
        source, sink = pair if direction == "request" else pair[::-1]
        try:
            while data := source.recv(65536):
                for piece in passage(direction, data):
                    sink.sendall(piece)
        except (OSError, Severed):
            pass
        _cut(pair)
        with self._lock:
            others = self._open[pair]
            others.remove(threading.current_thread())
            if not others:
                del self._open[pair]
        if not others:
            for end in pair:
                end.close()

    def cut_all(self) -> None:
        """Cut the connections that there are."""
        with self._lock:
            for pair in self._open:
                _cut(pair)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._acceptor.join()
        self._listener.close()
        self.cut_all()
        with self._lock:
            threads = [thread for pair in self._open.values() for thread in pair]
        for thread in threads:
            thread.join()


class CuttingProxy(Proxy):
    """Cuts a connection as soon as ``cut`` says so for what has been forwarded."""

    def __init__(self, address: str, cut: Cut) -> None:
        def passage() -> Passage:
            seen = {"request": b"", "answer": b""}

            def pass_on(direction: str, data: bytes) -> Iterator[bytes]:
                seen[direction] += data
                if direction == "answer" and cut(direction, seen[direction]):
                    raise Severed  # before the client gets it
                yield data
                if direction == "request" and cut(direction, seen[direction]):
                    raise Severed  # after the server has it

            return pass_on

        super().__init__(address, passage)


def _connected(address: str) -> socket.socket:
    parts = urllib.parse.urlsplit(address)
    if parts.scheme != "unix":
        return socket.create_connection((parts.hostname, parts.port))
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.connect(parts.path)
    except OSError:
        sock.close()
        raise
    return sock


def _cut(pair: _Pair) -> None:
    for end in pair:
        try:
            end.shutdown(socket.SHUT_RDWR)
        except OSError:  # it is cut already
            pass
