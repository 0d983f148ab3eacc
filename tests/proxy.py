"""A TCP proxy between a client and a server that cuts connections where a test wants them cut."""

from __future__ import annotations

import socket
import threading
import urllib.parse
from typing import Callable

# What a test decides on: the direction ("request" or "answer") and the bytes so far in it, on this connection.
Cut = Callable[[str, bytes], bool]


class CuttingProxy:
    """Forwards to a server's address; cuts a connection as soon as ``cut`` says so for what has been forwarded."""

    def __init__(self, address: str, cut: Cut) -> None:
        self._path = urllib.parse.urlsplit(address).path
        self._cut = cut
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.connections = 0
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()
        self._open: list[socket.socket] = []

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            far = socket.socket(socket.AF_UNIX)
            far.connect(self._path)
            self._open += near, far
            for source, sink, direction in ((near, far, "request"), (far, near, "answer")):
                thread = threading.Thread(target=self._forward, args=(source, sink, direction))
                self._threads.append(thread)
                thread.start()

    def _forward(self, source: socket.socket, sink: socket.socket, direction: str) -> None:
        seen = b""
        while True:
            data = _received(source)
            if not data:
                break
            seen += data
            if direction == "answer" and self._cut(direction, seen):
                break  # before the client gets it
            try:
                sink.sendall(data)
            except OSError:
                break
            if direction == "request" and self._cut(direction, seen):
                break  # after the server has it
        for end in (source, sink):
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for end in self._open:
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
        for thread in self._threads:
            thread.join()
        for end in self._open:
            end.close()


def _received(source: socket.socket) -> bytes | None:
    try:
        return source.recv(65536)
    except OSError:
        return None
