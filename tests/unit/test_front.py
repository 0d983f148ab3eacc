"""The HTTP server, by what comes over its sockets."""

from __future__ import annotations

import errno
import os
import select
import socket
import threading
import wsgiref.validate
from collections.abc import Iterable, Iterator
from typing import Any, Callable

import pytest
import requests
from conftest import wait_until

from slotpool.sandbox import front
from slotpool.sandbox.front import Front

Start = Callable[..., tuple[Front, int]]


def echo(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
    """Says what it was asked; ``/unread`` leaves the body where it is."""
    body = b"" if environ["PATH_INFO"] == "/unread" else environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"]))
    query, lease = environ["QUERY_STRING"], environ.get("HTTP_SLOTPOOL_LEASE", "")
    told = f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']} {query} {lease} {len(body)}".encode()
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", str(len(told)))])
    return [told]


@pytest.fixture
def start() -> Iterator[Start]:
    started: list[Front] = []

    def make(app: Any = echo, most: int = 100) -> tuple[Front, int]:
        listener = socket.create_server(("127.0.0.1", 0))
        server = Front(app, listener, most)
        threading.Thread(target=server.run, daemon=True).start()
        started.append(server)
        return server, listener.getsockname()[1]

    yield make
    for server in started:
        server.close()


def talk(port: int, sent: bytes, hang_up: bool = True) -> bytes:
    """All that comes back."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as sock:
        sock.sendall(sent)
        if hang_up:
            sock.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: sock.recv(65536), b""))


def get(path: str, *headers: str) -> bytes:
    return "\r\n".join([f"GET {path} HTTP/1.1", "Host: x", *headers, "", ""]).encode("latin-1")


def test_it_keeps_to_wsgi(start: Start) -> None:
    app: Any = wsgiref.validate.validator(echo_validly)
    _, port = start(app)
    with requests.Session() as session:
        for size in (0, 10, 1_000_000):
            answer = session.put(f"http://127.0.0.1:{port}/a%20b?c=d%20e", data=b"x" * size, headers={"Slotpool-Lease": "l"})
            assert answer.text == f"PUT /a b c=d%20e l {size}"


def echo_validly(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
    return iter(echo(environ, start_response))


def test_requests_one_behind_the_other_are_answered_in_turn(start: Start) -> None:
    _, port = start()
    told = talk(port, get("/1") + b"POST /2 HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc" + get("/3"))
    assert [line for line in told.split(b"\r\n") if b" /" in line or b"HTTP" in line] == [
        b"HTTP/1.1 200 OK",
        b"GET /1   0HTTP/1.1 200 OK",
        b"POST /2   3HTTP/1.1 200 OK",
        b"GET /3   0",
    ]


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"GET / HTTP/2.0\r\n\r\n", 400),
        (b"GET /\x01 HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (get("/", "no colon"), 400),
        (get("/", "Spaced : x"), 400),
        (get("/", "Folded: x", " more"), 400),
        (get("/", "A: x\nB: y"), 400),
        (get("/", "A: x\0"), 400),
        (get("/", "Content-Length: 3", "Content-Length: 4"), 400),
        (get("/", "Content-Length: 3, 3"), 400),
        (get("/", "Content-Length: +3"), 400),
        (get("/", "Content-Length: 0x3"), 400),
        (get("/", "Content-Length: -1"), 400),
        (get("/", "Content-Length: " + "9" * 30), 400),
        (get("/", "Transfer-Encoding: chunked") + b"0\r\n\r\n", 411),
        (get("/", "Content-Length: 3", "Transfer-Encoding: chunked") + b"0\r\n\r\n", 411),
        (b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 20_000, 431),
        (b"\r\nContent-Length: 0\r\n\r\n", 400),
    ],
)
def test_what_can_be_misunderstood_is_refused(start: Start, sent: bytes, status: int) -> None:
    _, port = start()
    told = talk(port, sent + get("/smuggled"))
    assert told.startswith(b"HTTP/1.1 %d " % status), told[:200]
    assert b"Connection: close" in told
    assert b"smuggled" not in told


def test_heads_that_are_alike_are_each_understood(start: Start) -> None:
    _, port = start()
    alike = [b"PUT /%d HTTP/1.1\r\nHost: x\r\nContent-Length: %s\r\n\r\n" % pair for pair in ((1, b"3"), (1, b"2"), (2, b"2"))]
    told = talk(port, alike[0] + b"abc" + alike[1] + b"ab" + alike[2] + b"ab" + get("/3") + b"\r\nContent-Length: 5\r\n\r\n")
    for answer in (b"PUT /1   3", b"PUT /1   2", b"PUT /2   2", b"GET /3   0", b"400 Bad Request"):
        assert answer in told
    for last in (b"1\r\nContent-Length: 1", b"-1", b"", b"1" * 20):
        assert b"400 Bad Request" in talk(port, alike[0] + b"abc" + alike[0].replace(b"3\r\n\r\n", last + b"\r\n\r\n"))


def test_nothing_of_a_request_is_in_the_next_one(start: Start) -> None:
    _, port = start()
    first = b"PUT /1 HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nSlotpool-Lease: mine\r\n\r\nab"
    second = b"PUT /1 HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\nab"
    told = talk(port, first + second + second)
    assert told.count(b"PUT /1  mine 2") == 1
    assert told.count(b"PUT /1   2") == 2


def test_who_was_not_asked_for_a_body_may_keep_it(start: Start) -> None:
    _, port = start()
    with socket.create_connection(("127.0.0.1", port), timeout=20) as sock:
        sock.sendall(b"PUT /unread HTTP/1.1\r\nHost: x\r\nContent-Length: 60\r\nExpect: 100-continue\r\n\r\n")
        sock.shutdown(socket.SHUT_WR)
        told = b"".join(iter(lambda: sock.recv(65536), b""))
    assert b"Connection: close" in told
    assert told.endswith(b"PUT /unread   0")


def test_a_body_that_does_not_come_keeps_nobody_out(start: Start) -> None:
    _, port = start(most=3)
    silent = [socket.create_connection(("127.0.0.1", port), timeout=20) for _ in range(3)]
    try:
        for sock in silent:
            sock.sendall(b"PUT /unread HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n")
            assert b"PUT /unread" in sock.recv(1000)
        assert talk(port, get("/")).endswith(b"GET /   0")
    finally:
        for sock in silent:
            sock.close()


def test_a_slow_reader_gets_all_of_a_large_answer(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front, "_SILENCE", 1.0)
    size = 20_000_000

    def large(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        start_response("200 OK", [("Content-Length", str(size))])
        return [bytes(size)]

    _, port = start(large)
    with socket.create_connection(("127.0.0.1", port), timeout=20) as sock:
        sock.sendall(get("/", "Connection: close"))
        got = 0
        while chunk := sock.recv(65536):
            got += len(chunk)
            threading.Event().wait(0.007)
    assert got > size


def test_headers_that_only_look_like_another_are_none(start: Start) -> None:
    _, port = start()
    assert talk(port, get("/", "Slotpool_Lease: stolen")).endswith(b"GET /   0")


def test_connections_are_kept_or_closed_as_asked(start: Start) -> None:
    _, port = start()
    assert b"\r\nConnection: close\r\n" in talk(port, get("/", "Connection: close") + get("/more"), hang_up=False)
    assert b"more" not in talk(port, b"GET / HTTP/1.0\r\n\r\n" + get("/more"), hang_up=False)
    assert talk(port, get("http://elsewhere/there?a") + b"").endswith(b"GET /there a  0")


def test_a_head_has_no_body(start: Start) -> None:
    _, port = start()
    told = talk(port, b"HEAD / HTTP/1.1\r\nHost: x\r\n\r\n" + get("/next"))
    assert told.count(b"HTTP/1.1 200 OK") == 2
    assert b"HEAD /" not in told


def test_who_asks_before_sending_a_body_is_told_to(start: Start) -> None:
    _, port = start()
    with socket.create_connection(("127.0.0.1", port), timeout=20) as sock:
        sock.sendall(b"PUT / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nExpect: 100-continue\r\n\r\n")
        assert sock.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        sock.sendall(b"abc")
        assert sock.recv(1000).endswith(b"PUT /   3")
        sock.sendall(b"PUT /unread HTTP/1.1\r\nHost: x\r\nContent-Length: 3000000\r\nExpect: 100-continue\r\n\r\n")
        assert sock.recv(1000).endswith(b"PUT /unread   0")


@pytest.mark.parametrize("size", [1000, 30_000_000])
def test_an_answer_comes_though_the_body_was_not_read(start: Start, size: int) -> None:
    _, port = start()
    told = talk(port, b"PUT /unread HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % size + bytes(size) + get("/next"))
    assert b"PUT /unread   0" in told
    assert (b"/next" in told) == (size == 1000)


def test_a_body_that_breaks_off_harms_nobody(start: Start) -> None:
    _, port = start()
    talk(port, b"PUT / HTTP/1.1\r\nHost: x\r\nContent-Length: 3000000\r\n\r\nabc")
    assert talk(port, get("/")).endswith(b"GET /   0")


def test_a_head_must_come_in_time(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front, "_HEAD_LIMIT", 0.2)
    _, port = start()
    assert talk(port, b"GET / HTTP/1.1\r\n", hang_up=False) == b""


def test_idle_connections_make_room_for_new_ones(start: Start) -> None:
    _, port = start(most=3)
    idle = [socket.create_connection(("127.0.0.1", port), timeout=20) for _ in range(20)]
    try:
        assert talk(port, get("/")).endswith(b"GET /   0")
        assert idle[0].recv(1) == b""
    finally:
        for sock in idle:
            sock.close()


def test_a_connection_that_can_not_be_watched_is_closed_and_others_are_served(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    epoll = select.epoll

    class Full:
        """Has no room for the second."""

        def __init__(self) -> None:
            self._epoll = epoll()
            self._count = 0

        def register(self, fd: int, events: int) -> None:
            self._count += 1
            if self._count == 2:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._epoll.register(fd, events)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._epoll, name)

    monkeypatch.setattr(select, "epoll", Full)
    _, port = start()
    with socket.create_connection(("127.0.0.1", port), timeout=20) as sock:
        assert sock.recv(1) == b""
    assert talk(port, get("/")).endswith(b"GET /   0")


def test_silent_connections_have_no_thread_and_slow_ones_none_before_their_head_is_whole(start: Start) -> None:
    _, port = start()
    before = threading.active_count()
    waiting = [socket.create_connection(("127.0.0.1", port), timeout=20) for _ in range(40)]
    try:
        for sock in waiting[20:]:
            sock.sendall(b"GET / HTTP/1.1\r\nHo")
        assert talk(port, get("/")).endswith(b"GET /   0")  # it was accepted after all of them
        assert threading.active_count() <= before + 1
        waiting[30].sendall(b"st: x\r\n\r\n")
        assert waiting[30].recv(1000).endswith(b"GET /   0")
    finally:
        for sock in waiting:
            sock.close()


def test_who_was_never_answered_goes_before_who_was(start: Start) -> None:
    _, port = start(most=3)
    with socket.create_connection(("127.0.0.1", port), timeout=20) as known:
        known.sendall(get("/1"))
        assert known.recv(1000).endswith(b"GET /1   0")
        silent = [socket.create_connection(("127.0.0.1", port), timeout=20) for _ in range(20)]
        try:
            assert silent[0].recv(1) == b""
            known.sendall(get("/2"))
            assert known.recv(1000).endswith(b"GET /2   0")
        finally:
            for sock in silent:
                sock.close()


def test_the_application_may_have_a_connection_closed(start: Start) -> None:
    def dismiss(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        environ["slotpool.keep"] = environ["PATH_INFO"] != "/last"
        return echo(environ, start_response)

    _, port = start(dismiss)
    told = talk(port, get("/1") + get("/last") + get("/more"), hang_up=False)
    assert told.count(b"Connection: close") == 1
    assert told.endswith(b"GET /last   0")


def test_an_end_waits_for_requests_under_way(start: Start) -> None:
    entered, go_on = threading.Event(), threading.Event()

    def slow(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        entered.set()
        assert go_on.wait(30)
        return echo(environ, start_response)

    server, port = start(slow)
    told: list[bytes] = []
    caller = threading.Thread(target=lambda: told.append(talk(port, get("/", "Connection: close"))))
    caller.start()
    assert entered.wait(30)
    ending = threading.Thread(target=server.close)
    ending.start()
    assert wait_until(lambda: server.ending)
    go_on.set()
    ending.join()
    caller.join()
    assert told[0].endswith(b"GET /   0")
