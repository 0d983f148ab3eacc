"""HTTP to a server, against a tiny real one that says byte for byte what it answers."""

from __future__ import annotations

import contextlib
import errno
import json
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any, Callable

import pytest

from slotpool.errors import ContainerLost, FileError, LeaseLost, SlotBroken, SlotError
from slotpool.sandbox.client import SandboxClient
from slotpool.sandbox.transport import Broken, NotSent, Transport

LIMIT = 20.0  # seconds; only so that a defect does not hang the tests
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi"
Connection = Callable[["Wire"], None]


class Wire:
    """The server's end of one connection."""

    def __init__(self, sock: socket.socket, heads: list[bytes]) -> None:
        self.sock = sock
        self._heads = heads
        self._rest = b""

    def request(self) -> bytes:
        """The next request's body; its head is noted. ConnectionError if there is none."""
        while b"\r\n\r\n" not in self._rest:
            self._more()
        head, _, self._rest = self._rest.partition(b"\r\n\r\n")
        self._heads.append(head)
        found = re.search(rb"\r\nContent-Length: (\d+)", head)
        length = int(found.group(1)) if found else 0
        while len(self._rest) < length:
            self._more()
        body, self._rest = self._rest[:length], self._rest[length:]
        return body

    def _more(self) -> None:
        chunk = self.sock.recv(1 << 16)
        if not chunk:
            raise ConnectionError("the client has closed")
        self._rest += chunk

    def say(self, *pieces: bytes) -> None:
        for piece in pieces:
            self.sock.sendall(piece)

    def closed(self) -> bool:
        """Wait until the client closes; False if it sends something instead."""
        with contextlib.suppress(ConnectionResetError):
            return self.sock.recv(1) == b""
        return True

    def interrupt(self) -> None:
        """Send the main thread signals until it closes: one that comes just before it waits does not end its waiting."""
        main = threading.main_thread().ident
        assert main is not None
        self.sock.settimeout(0.1)
        deadline = time.monotonic() + LIMIT
        while time.monotonic() < deadline:
            signal.pthread_kill(main, signal.SIGUSR1)
            with contextlib.suppress(socket.timeout):
                self.closed()
                return


def raising(error: BaseException) -> Callable[[int, FrameType | None], None]:
    """A signal's handler that raises it the first time."""
    errors = [error]

    def handle(signum: int, frame: FrameType | None) -> None:
        if errors:
            raise errors.pop()

    return handle


class Server:
    """Connection by connection, each is dealt with as the script says; then no more are taken."""

    def __init__(self, listening: socket.socket, script: list[Connection]) -> None:
        self.heads: list[bytes] = []
        self.accepted = 0
        self._listening = listening
        self._script = script
        self._failures: list[BaseException] = []
        self.threads: list[threading.Thread] = []
        self._accepting = threading.Thread(target=self._accept)
        self._accepting.start()

    def _accept(self) -> None:
        for connection in self._script:
            try:
                sock, _ = self._listening.accept()
            except OSError:  # shut down
                return
            self.accepted += 1
            if sock.family == socket.AF_INET:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            thread = threading.Thread(target=self._serve, args=(sock, connection))
            self.threads.append(thread)
            thread.start()

    def _serve(self, sock: socket.socket, connection: Connection) -> None:
        sock.settimeout(LIMIT)
        with sock:
            try:
                connection(Wire(sock, self.heads))
            except ConnectionError:  # the client had enough
                pass
            except BaseException as e:
                self._failures.append(e)

    def stop(self) -> None:
        self._listening.shutdown(socket.SHUT_RDWR)
        self._accepting.join()
        self._listening.close()
        for thread in self.threads:
            thread.join()
        assert self._failures == []


@contextlib.contextmanager
def serving(*script: Connection, connections: int = 4, path: Path | None = None) -> Iterator[tuple[Server, Transport]]:
    listening = socket.socket(socket.AF_UNIX if path else socket.AF_INET)
    listening.bind(str(path) if path else ("127.0.0.1", 0))
    listening.listen()
    address = f"unix://{path}" if path else f"http://127.0.0.1:{listening.getsockname()[1]}"
    server = Server(listening, list(script))
    transport = Transport(address, "secret", connections)
    try:
        yield server, transport
    finally:
        transport.close()
        server.stop()


def answering(*answers: bytes) -> Connection:
    """One answer for each request, then the end."""

    def connection(wire: Wire) -> None:
        for answer in answers:
            wire.request()
            wire.say(answer)

    return connection


def staying(*answers: bytes) -> Connection:
    """The same, but it is the client that closes."""

    def connection(wire: Wire) -> None:
        answering(*answers)(wire)
        assert wire.closed()

    return connection


def get(transport: Transport, timeout: float = LIMIT) -> tuple[int, bytes]:
    return transport.request("GET", "/x", None, timeout)


# What is sent, and how answers are read


def test_a_request_is_http_with_token_host_length_and_headers() -> None:
    bodies: list[bytes] = []

    def connection(wire: Wire) -> None:
        for _ in range(3):
            bodies.append(wire.request())
            wire.say(OK)

    with serving(connection) as (server, transport):
        assert transport.request("PUT", "/a?b=c", b"body", LIMIT, {"Slotpool-Lease": "t"}) == (200, b"hi")
        transport.request("POST", "/empty", b"", LIMIT)
        get(transport)
    host = transport.address.partition("//")[2].encode()
    first, empty, bare = (head.split(b"\r\n") for head in server.heads)
    assert first[0] == b"PUT /a?b=c HTTP/1.1"
    assert set(first[1:]) == {b"Host: " + host, b"Authorization: Bearer secret", b"Slotpool-Lease: t", b"Content-Length: 4"}
    assert b"Content-Length: 0" in empty
    assert bare[0] == b"GET /x HTTP/1.1"
    assert not any(line.startswith(b"Content-Length") for line in bare)
    assert bodies == [b"body", b"", b""]


def test_without_a_token_none_is_sent() -> None:
    with serving(answering(OK)) as (server, transport):
        bare = Transport(transport.address, None, 1)
        get(bare)
        bare.close()
    assert b"Authorization" not in server.heads[0]


def test_an_answer_in_many_pieces_is_put_together() -> None:
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: 12\r\nX: y\r\n\r\nhello, world"

    def connection(wire: Wire) -> None:
        wire.request()
        wire.say(*(answer[i : i + 1] for i in range(len(answer))))
        wire.request()
        wire.say(answer[:50], answer[50:])

    with serving(connection) as (_, transport):
        assert get(transport) == (200, b"hello, world")
        assert get(transport) == (200, b"hello, world")


@pytest.mark.parametrize("size", [0, 1, 65_536, 65_537, 3_000_000])
def test_bodies_of_any_size_arrive_whole_both_ways(size: int) -> None:
    data = (bytes(range(256)) * (size // 256 + 1))[:size]

    def echo(wire: Wire) -> None:
        body = wire.request()
        wire.say(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)

    with serving(echo) as (_, transport):
        assert transport.request("PUT", "/x", data, LIMIT) == (200, data)


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\ncontent-length:2\r\n\r\nhi",
        b"HTTP/1.1 200 OK\r\nCONTENT-LENGTH:   2  \r\nDate: now\r\n\r\nhi",
        b"HTTP/1.1 200\r\nContent-Length: 2\r\n\r\nhi",
        b"HTTP/1.1 200 All is well here\r\nContent-Length: 2\r\n\r\nhi",
    ],
)
def test_headers_are_read_as_http_writes_them(answer: bytes) -> None:
    with serving(answering(answer)) as (_, transport):
        assert get(transport) == (200, b"hi")


def test_an_answer_without_content_needs_no_length() -> None:
    nothing = b"HTTP/1.1 204 No Content\r\n\r\n"
    with serving(answering(nothing, OK)) as (server, transport):
        assert get(transport) == (204, b"")
        assert get(transport) == (200, b"hi")
    assert server.accepted == 1


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(b"HTTP/1.1 200 OK\r\n\r\nhi", id="no length"),
        pytest.param(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n", id="chunked"),
        pytest.param(b"HTTP/1.1 200 OK\r\nContent-Length: two\r\n\r\nhi", id="length in words"),
        pytest.param(b"HTTP/1.1 200 OK\r\nContent-Length: -2\r\n\r\nhi", id="negative length"),
        pytest.param(b"HTTP/1.1 200 OK\r\nContent-Length: 1" + b"0" * 30 + b"\r\n\r\nhi", id="enormous length"),
        pytest.param(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi, and more", id="more than its length"),
        pytest.param(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 2\r\n\r\nhi", id="two lengths"),
        pytest.param(b"HTTP/1.1 200 OK\r\nContent-Length: 2\rX: y\r\n\r\nhi", id="half the end of a line"),
        pytest.param(b"HTTP/1.1 204 No Content\r\nContent-Length: none\r\n\r\n", id="no content of no length"),
        pytest.param(b"HTTP/2.0 200 OK\r\nContent-Length: 2\r\n\r\nhi", id="another version"),
        pytest.param(b"HTTP/1.1 OK\r\nContent-Length: 2\r\n\r\nhi", id="no status"),
        pytest.param(b"OK\r\nContent-Length: 2\r\n\r\nhi", id="one word"),
        pytest.param(b"220 mail.example ESMTP\r\n\r\n", id="not HTTP"),
        pytest.param(b"\r\n\r\n", id="nothing"),
        pytest.param(b"HTTP/1.1 200 OK\r\nX: " + b"x" * 200_000, id="endless head"),
    ],
)
def test_an_answer_that_is_not_as_these_servers_write_it_is_broken(answer: bytes) -> None:
    with serving(answering(answer), staying(OK)) as (server, transport):
        with pytest.raises(Broken):
            get(transport)
        assert get(transport) == (200, b"hi")
    assert server.accepted == 2


def test_json_goes_both_ways_and_what_is_none_is_none() -> None:
    bodies: list[bytes] = []

    def connection(wire: Wire) -> None:
        for answer in (b'{"a": [1]}', b"<html>", b"", b"\xff"):
            bodies.append(wire.request())
            wire.say(b"HTTP/1.1 502 X\r\nContent-Length: %d\r\n\r\n" % len(answer) + answer)

    with serving(connection) as (_, transport):
        assert transport.json("POST", "/x", {"\u00e9": "\udcff"}, LIMIT) == (502, {"a": [1]})
        for _ in range(3):
            assert transport.json("GET", "/x", None, LIMIT) == (502, None)
    assert json.loads(bodies[0]) == {"\u00e9": "\udcff"}
    assert bodies[1:] == [b"", b"", b""]


# What is known when it fails


@pytest.mark.parametrize("part", [b"", b"HTTP/1.1 2", b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n", OK[:-1]], ids=len)
def test_a_connection_closed_before_the_answer_is_complete_is_broken_and_nothing_is_sent_twice(part: bytes) -> None:
    with serving(answering(part), staying(OK)) as (server, transport):
        with pytest.raises(Broken):
            get(transport)
        assert len(server.heads) == 1
        assert get(transport) == (200, b"hi")


def test_a_connection_closed_while_a_large_body_is_sent_is_broken() -> None:
    def connection(wire: Wire) -> None:
        wire.sock.recv(10)

    with serving(connection) as (_, transport), pytest.raises(Broken):
        transport.request("PUT", "/x", b"x" * 30_000_000, LIMIT)


@pytest.mark.parametrize("begun", [b"", OK[:10], OK[:-1]], ids=len)
def test_a_server_that_is_silent_for_too_long_is_broken(begun: bytes) -> None:
    with serving(staying(begun), staying(OK)) as (server, transport):
        with pytest.raises(Broken):
            get(transport, timeout=0.1)
        assert get(transport) == (200, b"hi")
    assert server.accepted == 2


def test_a_port_where_nobody_listens_is_not_sent() -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        with pytest.raises(NotSent):
            get(Transport(f"http://127.0.0.1:{bound.getsockname()[1]}", None, 1))


def test_a_socket_that_is_not_there_is_not_sent(tmp_path: Path) -> None:
    with pytest.raises(NotSent):
        get(Transport(f"unix://{tmp_path}/none.sock", None, 1))


def test_a_host_that_cannot_exist_is_not_sent() -> None:
    with pytest.raises(NotSent):
        get(Transport(f"http://{'x' * 70}.invalid:1", None, 1))  # too long a label: nobody is asked for it


def test_tls_is_not_given_up_for_a_server_without_it() -> None:
    def connection(wire: Wire) -> None:
        wire.sock.recv(10)
        wire.say(OK)

    with serving(connection) as (server, transport):
        with pytest.raises(NotSent):
            get(Transport(transport.address.replace("http", "https"), "secret", 1))
        assert server.heads == []


def test_a_unix_socket_serves_like_a_port(tmp_path: Path) -> None:
    with serving(answering(OK, OK), path=tmp_path / "s") as (server, transport):
        assert get(transport) == (200, b"hi")
        assert get(transport) == (200, b"hi")
    assert server.accepted == 1
    assert b"Host: localhost" in server.heads[0]


# Which connection is used


def test_a_connection_is_kept_and_used_again() -> None:
    with serving(staying(*[OK] * 5)) as (server, transport):
        for _ in range(5):
            get(transport)
    assert server.accepted == 1
    assert len(server.heads) == 5


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nhi",
        b"HTTP/1.1 200 OK\r\nconnection: Close\r\nContent-Length: 2\r\n\r\nhi",
        b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nhi",
    ],
)
def test_a_connection_that_is_to_be_closed_is_closed(answer: bytes) -> None:
    with serving(staying(answer), staying(OK)) as (server, transport):
        assert get(transport) == (200, b"hi")
        assert get(transport) == (200, b"hi")
    assert server.accepted == 2


def test_a_connection_that_the_server_has_closed_while_idle_is_not_used() -> None:
    with serving(answering(OK), staying(OK, OK)) as (server, transport):
        get(transport)
        for thread in server.threads:
            thread.join()  # it has closed now
        assert get(transport) == (200, b"hi")
        assert get(transport) == (200, b"hi")
    assert server.accepted == 2


def test_a_connection_on_which_something_came_unasked_is_not_used() -> None:
    asked_for, said = threading.Event(), threading.Event()

    def connection(wire: Wire) -> None:
        answering(OK)(wire)
        assert asked_for.wait(LIMIT)
        wire.say(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nstale")
        said.set()
        assert wire.closed()

    with serving(connection, staying(OK)) as (server, transport):
        get(transport)
        asked_for.set()
        assert said.wait(LIMIT)
        assert get(transport) == (200, b"hi")
    assert server.accepted == 2


def test_all_stale_connections_are_passed_over() -> None:
    both = threading.Barrier(2)

    def brief(wire: Wire) -> None:
        wire.request()
        both.wait(LIMIT)
        wire.say(OK)

    with serving(brief, brief, staying(OK)) as (server, transport):
        threads = [threading.Thread(target=get, args=(transport,)) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for thread in list(server.threads):  # by now all are there; when they end they have closed their connections
            thread.join()
        assert get(transport) == (200, b"hi")
    assert server.accepted == 3


def test_no_more_connections_are_kept_than_asked_for() -> None:
    all_ = threading.Barrier(5)
    ends = threading.Semaphore(0)

    def connection(wire: Wire) -> None:
        wire.request()
        all_.wait(LIMIT)
        wire.say(OK)
        assert wire.closed()
        ends.release()

    with serving(*[connection] * 5, connections=2) as (server, transport):
        threads = [threading.Thread(target=get, args=(transport,)) for _ in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for _ in range(3):
            assert ends.acquire(timeout=LIMIT)
        assert not ends.acquire(blocking=False)
        transport.close()
        for _ in range(2):
            assert ends.acquire(timeout=LIMIT)
    assert server.accepted == 5


def test_threads_never_get_each_others_answers() -> None:
    def echo(wire: Wire) -> None:
        while True:
            body = wire.request()
            wire.say(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body), body)

    wrong: list[bytes] = []

    def ask(name: int) -> None:
        for i in range(50):
            body = b"%d-%d" % (name, i)
            if transport.request("POST", "/x", body, LIMIT) != (200, body):
                wrong.append(body)

    with serving(*[echo] * 400, connections=3) as (server, transport):
        threads = [threading.Thread(target=ask, args=(name,)) for name in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []
    assert len(server.heads) == 400


class Interrupted(BaseException):
    """Like a KeyboardInterrupt, but unmistakably this test's."""


def test_after_an_interrupt_the_late_answer_is_nobodys() -> None:
    def connection(wire: Wire) -> None:
        wire.request()
        wire.interrupt()
        with contextlib.suppress(ConnectionError):
            wire.say(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nstale")

    before = signal.signal(signal.SIGUSR1, raising(Interrupted()))
    try:
        with serving(connection, staying(OK)) as (server, transport):
            with pytest.raises(Interrupted):
                get(transport)
            assert get(transport) == (200, b"hi")
            assert server.accepted == 2
    finally:
        signal.signal(signal.SIGUSR1, before)


@pytest.mark.parametrize("error", [TimeoutError("timed out"), OSError(110, "his"), ConnectionResetError(), ValueError()])
def test_what_a_signal_handler_raises_is_not_taken_for_the_connections_failure(error: Exception) -> None:
    def connection(wire: Wire) -> None:
        wire.request()
        wire.interrupt()

    before = signal.signal(signal.SIGUSR1, raising(error))
    try:
        with serving(connection) as (_, transport), pytest.raises(type(error)) as raised:
            get(transport)
        assert raised.value is error
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_an_answer_that_comes_before_the_body_is_sent_counts() -> None:
    def connection(wire: Wire) -> None:
        wire.sock.recv(1 << 16)
        wire.say(b"HTTP/1.1 413 Content Too Large\r\nContent-Length: 4\r\nConnection: close\r\n\r\nlong")

    with serving(connection) as (server, transport):
        assert transport.request("PUT", "/f", bytes(64 << 20), LIMIT) == (413, b"long")
    assert server.accepted == 1


def test_after_close_it_can_be_used_again() -> None:
    with serving(staying(OK), staying(OK)) as (server, transport):
        get(transport)
        transport.close()
        transport.close()
        assert get(transport) == (200, b"hi")
    assert server.accepted == 2


def test_a_file_whose_end_never_comes_is_a_file_error_and_one_whose_end_comes_later_is_read() -> None:
    short = answering(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhi")
    with serving(short, short, answering(OK)) as (_, transport), client_of(transport) as client:
        assert client.read_file("slot_0", "lease", "f") == b"hi"
    always = serving(short, short, short, short)
    with always as (_, transport), client_of(transport) as client, pytest.raises(FileError, match="ended early") as failed:
        client.read_file("slot_0", "lease", "f")
    assert (failed.value.errno, failed.value.filename) == (errno.EIO, "f")


def saying(status: int, body: object) -> bytes:
    content = json.dumps(body).encode()
    return b"HTTP/1.1 %d -\r\nContent-Length: %d\r\n\r\n%s" % (status, len(content), content)


def call(execution_id: str) -> Any:
    return {
        "slot": "slot_0",
        "lease": "lease",
        "execution_id": execution_id,
        "tool": "bash",
        "args": {"command": "true"},
        "timeout": 5.0,
    }


RUNNING = {"running": True}
CANCELLED = {"error": {"code": "result_gone", "message": "it was cancelled before it began", "may_have_run": False}}
LEASE_LOST = {"error": {"code": "lease_lost", "message": "it is another's", "may_have_run": False}}
CLOSING = {"error": {"code": "closing", "message": "the server is shutting down"}}
ENDS_OF_WHAT_RUNS = pytest.mark.parametrize(
    ("end", "kind"), [((409, LEASE_LOST), LeaseLost), ((503, CLOSING), ContainerLost), (None, ContainerLost)]
)


@ENDS_OF_WHAT_RUNS
def test_what_the_server_has_said_to_run_may_have_run_however_it_ends(
    tmp_path: Path, end: tuple[int, object] | None, kind: type[SlotError]
) -> None:
    path = tmp_path / "socket"

    def connection(wire: Wire) -> None:
        wire.request()
        if end is None:
            path.unlink()  # nobody can connect any more
        wire.say(saying(202, RUNNING))
        if end is not None:
            wire.request()
            wire.say(saying(*end))

    with serving(connection, path=path) as (_, transport), client_of(transport) as client, pytest.raises(kind) as failed:
        client.execute("slot_0", "lease", "bash", {"command": "true"}, 5.0)
    assert failed.value.may_have_run


@ENDS_OF_WHAT_RUNS
def test_so_may_a_call_of_a_batch(tmp_path: Path, end: tuple[int, object] | None, kind: type[SlotError]) -> None:
    path = tmp_path / "socket"

    def connection(wire: Wire) -> None:
        wire.request()
        if end is None:
            path.unlink()
        wire.say(saying(200, {"results": [RUNNING, LEASE_LOST]}))
        if end is not None:
            wire.request()
            wire.say(saying(200, {"results": [end[1]]}))

    with serving(connection, path=path) as (_, transport), client_of(transport) as client:
        runs, never = client.batch([call("a"), call("b")])
    assert isinstance(runs, kind)
    assert runs.may_have_run
    assert isinstance(never, LeaseLost)
    assert not never.may_have_run


def test_what_the_server_has_said_to_run_has_not_if_it_tells_so_and_is_tried_again() -> None:
    broken = {"error": {"code": "slot_broken", "message": "the waiting shell was killed", "may_have_run": False}}
    well: Any = {"stdout": "well"}
    single = [saying(202, RUNNING), saying(502, broken), saying(200, well)]
    batch = [saying(200, {"results": [one]}) for one in (RUNNING, broken, well)]
    with serving(answering(*single, *batch)) as (_, transport), client_of(transport) as client:
        assert client.execute("slot_0", "lease", "bash", {"command": "true"}, 5.0) == well
        assert client.batch([call("a")]) == [well]


@pytest.mark.parametrize("code", ["slot_broken", "overloaded"])
def test_a_call_of_a_batch_that_has_not_run_is_tried_twice_more_under_other_ids(code: str) -> None:
    asked: list[list[str]] = []

    def connection(wire: Wire) -> None:
        refused = {"error": {"code": code, "message": "not now", "may_have_run": False}}
        for answers in ([refused, refused, CANCELLED], [refused, refused], [refused, {"stdout": "well"}]):
            asked.append([one["execution_id"] for one in json.loads(wire.request())["calls"]])
            wire.say(saying(200, {"results": answers}))

    with serving(connection) as (_, transport), client_of(transport) as client:
        refused, well, cancelled = client.batch([call("a"), call("b"), call("c")])
    assert [len(ids) for ids in asked] == [3, 2, 2]
    assert len({one for ids in asked for one in ids}) == 7
    assert isinstance(refused, SlotBroken)
    assert well == {"stdout": "well"}
    assert isinstance(cancelled, SlotBroken)
    assert not cancelled.may_have_run


def client_of(transport: Transport) -> contextlib.closing[SandboxClient]:
    return contextlib.closing(SandboxClient(transport.address))
