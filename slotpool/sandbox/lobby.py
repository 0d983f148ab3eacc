"""Connections that have not asked anything yet, all watched by one thread: a silent one costs a descriptor, and no thread."""

from __future__ import annotations

import select
import socket
import time
from typing import Callable

import attr

_LOOK = 1.0  # seconds between looks for those whose time is up


@attr.s(slots=True, auto_attribs=True, eq=False)
class _Guest:
    sock: socket.socket
    deadline: float  # for its head to come in whole, once it has begun; before that, for it to begin
    received: bytes = b""


class Lobby:
    """Not thread-safe: all is done by the thread that accepts.

    :param listener: what is watched beside them.
    :param admit: called with a connection and what came over it, once that is a whole head, or too long for one.
    :param most: bytes of a head.
    :param idle: seconds that a connection may be silent.
    :param limit: seconds that its first head may take.
    :param listens: whether what comes is read here; else a connection is admitted with its first byte still to be read.
    """

    def __init__(
        self,
        listener: socket.socket,
        admit: Callable[[socket.socket, bytes], None],
        most: int,
        idle: float,
        limit: float,
        listens: bool,
    ) -> None:
        self._admit = admit
        self._most = most
        self._idle = idle
        self._limit = limit
        self._listens = listens
        self._guests: dict[int, _Guest] = {}  # by descriptor, those that came first first
        self._listener = listener.fileno()
        self._next_look = 0.0
        self._epoll = select.epoll()
        self._epoll.register(self._listener, select.EPOLLIN)

    def __len__(self) -> int:
        return len(self._guests)

    def enter(self, sock: socket.socket) -> None:
        """:raises OSError: it can't be watched, as it would be one more than this user may watch, say, and has not come in."""
        self._epoll.register(sock.fileno(), select.EPOLLIN)
        self._guests[sock.fileno()] = _Guest(sock, time.monotonic() + self._idle)

    def turn_out(self) -> None:
        """Close the one that has waited for longest."""
        self._take(next(iter(self._guests))).close()

    def wait(self) -> bool:
        """See to those that something comes from; whether there may be a new one to be accepted."""
        comes = False
        for fd, _ in self._epoll.poll(_LOOK if self._guests else None):
            if fd == self._listener:
                comes = True
            else:
                self._hear(fd, self._guests[fd])
        now = time.monotonic()
        if now >= self._next_look:
            self._next_look = now + _LOOK
            for fd in [fd for fd, guest in self._guests.items() if guest.deadline <= now]:
                self._take(fd).close()
        return comes

    def _hear(self, fd: int, guest: _Guest) -> None:
        if self._listens:
            try:
                received = guest.sock.recv(65536, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            except OSError:
                received = b""
            if not received:
                self._take(fd).close()
                return
            if not guest.received:
                guest.deadline = time.monotonic() + self._limit
            guest.received += received
            if b"\r\n\r\n" not in guest.received and len(guest.received) <= self._most:
                return
        self._admit(self._take(fd), guest.received)

    def _take(self, fd: int) -> socket.socket:
        self._epoll.unregister(fd)
        return self._guests.pop(fd).sock

    def close(self) -> None:
        """Close all."""
        while self._guests:
            self.turn_out()
        self._epoll.close()
