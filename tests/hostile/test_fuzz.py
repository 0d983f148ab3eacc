"""Random input to a real server, and to the server's end of a sandbox: each gets a defined end, and nothing is left of it.

``SLOTPOOL_FUZZ`` says how many inputs there are in all; each test then prints what it did, to be seen with ``pytest -s``.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import time
import urllib.parse
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from cells import new_cell
from conftest import Server, StartServer, wait_until
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from slotpool.errors import SandboxStartFailed
from slotpool.sandbox import capture, cell, protocol, sandboxes, tools, zygote
from slotpool.sandbox.call import Call
from slotpool.sandbox.capture import Driver, Job
from slotpool.sandbox.cell import Cell

INPUTS = int(os.environ.get("SLOTPOOL_FUZZ", "1000"))  # read here, as every test's environment is cleared of it
TOLD = "SLOTPOOL_FUZZ" in os.environ
PATIENT = pytest.mark.timeout(120 + INPUTS // 50)
MOST_GROWTH = 40 << 20  # bytes of the server's memory: buffers of its threads, and never more with more inputs
SLOTS = 8  # as many as the server has threads that clean, so that giving all back starts every one of them


def fuzz(part: float) -> settings:
    """For that part of all inputs."""
    return settings(
        max_examples=max(1, round(INPUTS * part)),
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )


def tell(what: str, seen: Counter[Any]) -> None:
    if TOLD:
        ends = ", ".join(f"{count} {end}" for end, count in seen.most_common())
        print(f"\n{what}: {sum(seen.values())} inputs: {ends}")


# What comes over HTTP


class Wire:
    """Connections to a server, without any client's own checks."""

    def __init__(self, server: Server) -> None:
        self.path = server.address[len("unix://") :]
        self.authorization = f"Authorization: Bearer {server.token}"
        self._sock: socket.socket | None = None

    def connect(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(60)
        sock.connect(self.path)
        return sock

    def close(self) -> None:
        if self._sock is not None:
            self._sock.close()
            self._sock = None

    def raw(self, sent: bytes) -> bytes:
        """All that comes back to it, on a connection of its own."""
        with self.connect() as sock:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it need not hear all of it out
                sock.sendall(sent)
                sock.shutdown(socket.SHUT_WR)
            try:
                return b"".join(iter(lambda: sock.recv(65536), b""))
            except ConnectionResetError:
                return b""

    def request(self, method: str, target: str, headers: list[str], body: bytes) -> tuple[int, bytes]:
        if self._sock is None:
            self._sock = self.connect()
        head = [f"{method} {target} HTTP/1.1", "Host: x", *headers, f"Content-Length: {len(body)}", "", ""]
        self._sock.sendall("\r\n".join(head).encode("latin-1") + body)
        received = b""
        while b"\r\n\r\n" not in received:
            received += self._receive()
        told, _, content = received.partition(b"\r\n\r\n")
        line, *lines = told.decode("latin-1").split("\r\n")
        fields = {name.lower(): value for name, _, value in (one.partition(": ") for one in lines)}
        length = 0 if method == "HEAD" else int(fields.get("content-length", "0"))
        while len(content) < length:
            content += self._receive()
        assert len(content) == length, "no more than was promised"
        if "connection" in fields:
            self.close()
        return int(line.split(" ")[1]), content

    def _receive(self) -> bytes:
        assert self._sock is not None
        received = self._sock.recv(65536)
        assert received, "the connection ended amid an answer"
        return received


TOKEN = "<the token of a lease that is held>"
_WORDS = st.sampled_from(["", "a", "slot_0", "../x", "\0", "\x7f", "\ud800", "\udc80", "\U0010ffff", "x" * 1001, TOKEN])
_NUMBERS = st.sampled_from([0, 1, -1, 0.05, 0.0, -0.0, 1e300, float("inf"), float("nan"), 10**6, 2**64, 10**400, True])
_ANY = st.recursive(
    st.none() | _WORDS | _NUMBERS | st.text(max_size=5) | st.integers(-(2**70), 0),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_WORDS | st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
_PATHS = st.sampled_from(["file", "dir/file", "..", "/etc/passwd", ".", "a\0b", "x" * 300, "\udc80", "/proc/self/stat", "fifo"])
_COMMANDS = [
    "true",
    "exit 3",
    "head -c 200000 /dev/zero",
    "kill -9 $$",
    "kill -9 -1",
    "sleep 60 & echo $!",
    "mkfifo fifo",
    "cat",
]
_TOOLS = st.one_of(
    st.tuples(
        st.just("bash"),
        st.fixed_dictionaries(
            {"command": st.sampled_from(_COMMANDS)},
            optional={"cwd": _PATHS, "env": st.dictionaries(st.text(max_size=3), _WORDS, max_size=2), "stdin": _WORDS},
        ),
    ),
    st.tuples(st.just("read_file"), st.fixed_dictionaries({"path": _PATHS})),
    st.tuples(st.just("write_file"), st.fixed_dictionaries({"path": _PATHS, "content": _WORDS})),
)
_IDS = st.text("abcdefgh", min_size=1, max_size=8)
_WAITS = st.sampled_from([0, 0.02])
_RELEASES = st.lists(st.sampled_from(["", "gone", TOKEN]), max_size=1)


def _call_of(parts: tuple[tuple[str, dict[str, Any]], str, float]) -> dict[str, Any]:
    (tool, args), execution_id, timeout = parts
    return {"execution_id": execution_id, "tool": tool, "args": args, "timeout": timeout}


_CALLS = st.tuples(_TOOLS, _IDS, st.sampled_from([0.001, 0.01, 1])).map(_call_of)
_SOUND: dict[str, st.SearchStrategy[dict[str, Any]]] = {
    "leases": st.fixed_dictionaries(
        {"owner": st.sampled_from("ab"), "ttl": st.just(60), "take": st.integers(0, 2), "release": _RELEASES, "wait": _WAITS}
    ),
    "leases/renew": st.fixed_dictionaries({"tokens": _RELEASES}),
    "cordon": st.fixed_dictionaries({"owner": st.sampled_from("ab"), "ttl": st.sampled_from([0, 60]), "release": _RELEASES}),
    "batch": st.fixed_dictionaries(
        {
            "calls": st.lists(
                st.tuples(_CALLS, st.sampled_from(["slot_0", "slot_9"]), st.just(TOKEN)).map(
                    lambda parts: {**parts[0], "slot": parts[1], "lease": parts[2]}
                ),
                max_size=3,
            ),
            "wait": _WAITS,
        }
    ),
    "execute": st.tuples(_CALLS, _WAITS).map(lambda parts: {**parts[0], "wait": parts[1]}),
    "cancel": st.fixed_dictionaries({"execution_id": _IDS}),
    "reset": st.fixed_dictionaries({}, optional={"network": st.sampled_from([None, True, False])}),
}
_OF_A_SLOT = ["execute", "cancel", "reset", "file"]


@st.composite
def requests(draw: st.DrawFn) -> tuple[str, str, bool, str | None, Any]:
    """A request that makes sense but, often, for one or two things: method, target, whether it is authorized, lease, body."""
    routes = ["health", "metrics", "v1/slots", *_SOUND, "file", "file", "v1", "", "execute", "execute", "leases"]
    route = draw(st.sampled_from(routes))
    method = "POST" if route in _SOUND else draw(st.sampled_from(["GET", "PUT"])) if route == "file" else "GET"
    body: Any = b""
    if route in _SOUND:
        body = draw(_SOUND[route])
        if draw(st.integers(0, 2)) == 0:  # else nearly nothing would come past the first check
            names = st.sampled_from(sorted(body)) | _WORDS if body else _WORDS
            body = draw(_ANY | st.dictionaries(names, _ANY, max_size=2).map(lambda wrong: {**body, **wrong}))
    elif route == "file" or draw(st.booleans()):
        body = draw(st.binary(max_size=20))
    target = f"/{route}"
    if route in _OF_A_SLOT:
        target = f"/v1/slots/{draw(st.sampled_from(['slot_0'] * 6 + ['slot_9', '', '..', '%00', '%ff']))}/{route}"
    elif route in _SOUND:
        target = f"/v1/{route}"
    if route == "file":
        quoted = urllib.parse.quote(draw(_PATHS), errors="surrogateescape")
        target += draw(st.sampled_from([f"?path={quoted}"] * 5 + ["", "?", "?path", "?path=%", "?path=a&path=b", "?a=b;c"]))
    if draw(st.integers(0, 9)) == 0:
        method = draw(st.sampled_from(["GET", "POST", "PUT", "HEAD", "DELETE", "get", "!"]))
    lease = draw(st.sampled_from([TOKEN] * 8 + [None, "", "\xff", "x" * 200]))
    return method, target, draw(st.integers(0, 19)) > 0, lease, body


class Fuzzed:
    """A server, a lease of its first slot, and what the server has when nothing is leased."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.wire = Wire(server)
        self.seen: Counter[int] = Counter()
        for _ in range(3):  # whatever is made when it is first needed is made now
            self._rest()
        self._before = self._rest()
        self._memory = self._resident()
        self.token = ""
        self.hold()

    def _held(self) -> tuple[int, int]:
        """Descriptors and threads of the server."""
        return tuple(len(os.listdir(f"/proc/{self.server.process.pid}/{what}")) for what in ("fd", "task"))  # type: ignore[return-value]

    def _resident(self) -> int:
        """Bytes of memory."""
        with open(f"/proc/{self.server.process.pid}/statm", encoding="ascii") as f:
            return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def _settled(self) -> tuple[int, int]:
        """The same, when it doesn't change any more."""
        same, held = 0, self._held()
        while same < 20:
            time.sleep(0.01)
            now = self._held()
            same, held = same + 1 if now == held else 0, now
        return held

    def _rest(self) -> tuple[int, int]:
        """Lease everything and give it back, so that the same is left each time; what the server has then."""
        leases = self.server.lease(SLOTS)
        self._settled()  # the sandbox that is made in advance stands now, and one of the slots gets it
        self.server.client.lease("test", 30, 0, release=[lease["token"] for lease in leases])
        assert self.server.free(SLOTS)
        return self._settled()

    def hold(self) -> None:
        """Have a lease of the first slot; whatever holds it by then is ended by whoever asked for it."""
        while not self.token:
            leases = self.server.client.lease("fuzz", 3600, SLOTS, wait=20)["leases"]
            self.token = next((lease["token"] for lease in leases if lease["slot"] == "slot_0"), "")
            self.server.client.lease("fuzz", 3600, 0, release=[one["token"] for one in leases if one["slot"] != "slot_0"])

    def send(self, method: str, target: str, authorized: bool, lease: str | None, body: Any) -> None:
        headers = [self.wire.authorization] if authorized else []
        if lease is not None:
            headers.append(f"Slotpool-Lease: {self.token if lease == TOKEN else lease}")
        content = body if isinstance(body, bytes) else json.dumps(body).replace(TOKEN, self.token).encode()
        status, answer = self.wire.request(method, target, headers, content)
        self.seen[status] += 1
        if status >= 400 and method != "HEAD":
            code = json.loads(answer)["error"]["code"]
            assert protocol.STATUS[code] == status
            assert code not in ("internal", "closing"), answer
        else:
            assert status in (200, 202, 204) or status in protocol.STATUS.values()
            assert status not in (500, 503)
        if status == 200 and target == "/v1/batch":
            codes = [one["error"]["code"] for one in json.loads(answer)["results"] if isinstance(one.get("error"), dict)]
            assert "internal" not in codes, answer
        if status == 200 and target in ("/v1/leases", "/v1/cordon"):
            self._undo(json.loads(answer), body)

    def _undo(self, answer: Any, body: Any) -> None:
        """Give back what was leased, and open what was closed."""
        client = self.server.client
        if answer.get("leases"):
            client.lease("fuzz", 60, 0, release=[lease["token"] for lease in answer["leases"]])
        if answer.get("cordoned"):
            client.cordon(body["owner"], 0, [])
        if TOKEN in body.get("release", []):
            self.token = ""
            self.hold()

    def check_unharmed(self) -> None:
        """It answers, every slot works, and nothing is left of what came."""
        self.wire.close()
        assert self.server.process.poll() is None
        assert self.server.client.health()["status"] == "ok"
        self.server.client.lease("fuzz", 60, 0, release=[self.token])
        assert self.server.free(SLOTS)
        for lease in (leases := self.server.lease(SLOTS)):
            assert self.server.bash(lease, "echo well; ls -A")["stdout"] == "well\n"
        self.server.client.lease("test", 30, 0, release=[lease["token"] for lease in leases])
        self._rest()
        assert wait_until(lambda: all(now <= before for now, before in zip(self._held(), self._before))), (
            self._before,
            self._held(),
        )
        grown = self._resident() - self._memory
        if TOLD:
            print(f"\nthe server's memory has grown by {grown >> 10} KiB")
        assert grown < MOST_GROWTH


@pytest.fixture
def fuzzed(start_server: StartServer) -> Iterator[Fuzzed]:
    made = Fuzzed(start_server("bwrap", slots=SLOTS, max_output=10_000, max_file=100_000))
    yield made
    made.wire.close()


@PATIENT
def test_no_request_makes_the_server_fail_or_keep_anything(fuzzed: Fuzzed) -> None:
    @fuzz(0.4)
    @given(requests())
    def send(request: tuple[str, str, bool, str | None, Any]) -> None:
        fuzzed.send(*request)

    send()
    fuzzed.check_unharmed()
    assert {200, 400, 401, 404, 405} <= fuzzed.seen.keys() or INPUTS < 1000, "of all kinds there are some"
    tell("HTTP, structured", fuzzed.seen)


_LEASED = b"Host: x\r\n<auth>\r\nSlotpool-Lease: <token>\r\n"
_RAW = [
    b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET /v1/slots HTTP/1.0\r\n<auth>\r\n\r\n",
    b'POST /v1/leases/renew HTTP/1.1\r\nHost: x\r\n<auth>\r\nContent-Length: 13\r\n\r\n{"tokens":[]}',
    b"PUT /v1/slots/slot_0/file?path=a HTTP/1.1\r\n" + _LEASED + b"Content-Length: 3\r\n\r\nabc",
    b"GET /v1/slots/slot_0/file?path=a HTTP/1.1\r\n" + _LEASED + b"\r\n",
    b"HEAD http://x/health HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nConnection: close\r\nContent-Length: 5\r\n\r\n12345",
    b"POST /v1/slots/slot_0/cancel HTTP/1.1\r\n" + _LEASED + b'Content-Length: 20\r\n\r\n{"execution_id":"a"}',
]
_PIECES = [
    b"\r\n",
    b"\r\n\r\n",
    b"\n",
    b"\0",
    b": ",
    b"\xff",
    b"%",
    b"?",
    b"Content-Length: 5\r\n",
    b"Transfer-Encoding: chunked\r\n",
]
_PIECES += [
    b"Content-Length: 99999999999\r\n",
    b"Expect: 100-continue\r\n",
    b"A" * 70_000,
    b"HTTP/1.1",
    b" ",
    b"\t",
    b"{",
    b"[",
]


@st.composite
def streams(draw: st.DrawFn) -> bytes:
    """Requests, one behind the other, with something cut out, put in or doubled here and there."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=200))
    stream = b"".join(draw(st.lists(st.sampled_from(_RAW), min_size=1, max_size=3)))
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(stream)))
        to = min(len(stream), at + draw(st.integers(0, 30)))
        put = draw(st.sampled_from([b"", stream[at:to] * 2, *_PIECES]) | st.binary(max_size=4))
        stream = stream[:at] + put + stream[to:]
    return stream if draw(st.booleans()) else stream[: draw(st.integers(0, len(stream)))]


@PATIENT
def test_no_bytes_make_the_server_fail_or_keep_anything(fuzzed: Fuzzed) -> None:
    auth = fuzzed.wire.authorization.encode()

    @fuzz(0.3)
    @given(streams())
    def send(stream: bytes) -> None:
        answer = fuzzed.wire.raw(stream.replace(b"<auth>", auth).replace(b"<token>", fuzzed.token.encode()))
        status = int(answer[9:12]) if answer else 0
        assert not answer or answer.startswith(b"HTTP/1.1 ")
        assert status in {0, 100, 200, 204, 411, 431, *protocol.STATUS.values()}
        assert b"HTTP/1.1 500" not in answer
        assert status not in (500, 502, 503)
        fuzzed.seen[status] += 1

    send()
    fuzzed.check_unharmed()
    assert {200, 400} <= fuzzed.seen.keys()
    tell("HTTP, bytes", fuzzed.seen)


# What a zygote can do, whose place processes of the slot may have taken


def _messages(*usual: bytes) -> st.SearchStrategy[bytes]:
    return st.sampled_from([*usual, b"", b"\0", b"x" * 70_000]) | st.binary(max_size=12)


_STATUSES = [zygote.STATUS.pack(status) for status in (0, 9, 256, -1, -(2**31), 2**31 - 1, 0x7F, 0xFFFF)]
_ON_A_CALL = st.lists(
    st.tuples(
        st.sampled_from(["call", "call", "urgent", "stdout", "stderr", "told", "close", "fds", "drain"]),
        _messages(*_STATUSES),
        st.integers(0, 4),
    ),
    max_size=6,
)
_GREETINGS = st.tuples(
    _messages(zygote.READY, zygote.READY, zygote.READY, zygote.ERROR, zygote.ERROR + b"\xff"), st.integers(0, 12)
)
_MEETINGS = st.integers(0, 3).flatmap(lambda kind: st.just((zygote.READY, 0)) if kind else st.none() | _GREETINGS)
_ENDS = st.none() | st.tuples(_messages(sandboxes.DEAD, sandboxes.DEAD), st.integers(0, 12))
_FIRSTS = st.none() | st.tuples(_messages(*[sandboxes.FIRST] * 6), st.integers(0, 5), st.booleans())
_OPS = st.sampled_from(["shell", "shell with input", "read", "write", "armed"])


def _send(sock: socket.socket, message: bytes, fds: int, fd: int | None = None) -> None:
    """With so many descriptors."""
    given = [sock.fileno() if fd is None else fd] * fds
    with contextlib.suppress(OSError):  # it takes no more, or is closed
        socket.send_fds(sock, [message], given) if given else sock.send(message, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)


class _Zygote:
    """The other end of a call."""

    def __init__(self, control: socket.socket) -> None:
        order, fds, _, _ = socket.recv_fds(control, 65536, 8)
        self.fds = dict(zip(json.loads(order)["fds"], fds))
        for fd in fds:
            os.set_blocking(fd, False)
        self._call: socket.socket | None = socket.socket(fileno=self.fds.pop("call"))

    def act(self, what: str, message: bytes, count: int) -> None:
        names = sorted(self.fds)
        if what == "close" and count == 0:
            self.hang_up()
        elif what == "close" and names:
            os.close(self.fds.pop(names[count % len(names)]))
        elif what == "urgent" and self._call is not None:
            with contextlib.suppress(OSError):  # closed at the other end
                self._call.send(b"u", socket.MSG_OOB | socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        elif what in ("call", "fds") and self._call is not None:
            _send(self._call, message, count if what == "fds" else 0)
        elif what in self.fds:
            with contextlib.suppress(BlockingIOError):
                os.write(self.fds[what], message)
        elif what == "drain":
            for name in {"script", "stdin"} & self.fds.keys():
                with contextlib.suppress(BlockingIOError):
                    os.read(self.fds[name], 1 << 20)

    def hang_up(self) -> None:
        if self._call is not None:
            self._call.close()
            self._call = None

    def close(self) -> None:
        self.hang_up()
        for fd in self.fds.values():
            os.close(fd)


def _start(made: Cell, op: str) -> Call:
    if op == "armed":
        made.arm()
    if op in ("shell", "armed"):
        return made.shell(b"true" * 1000, None)
    if op == "shell with input":
        return made.shell(b"true", b"input" * 20_000)
    if op == "read":
        return made.read("/workspace/a", 100)
    return made.write("/workspace/a", 200_000, b"x" * 100_000, iter([b"y" * 100_000, b""]).__next__)


def _run(call: Call, hostile: _Zygote, before: list[Any], amid: list[Any]) -> str:
    """Drive a call to its end; what that was."""
    ends: list[bool] = []
    patience = 0.003 if len(before) % 2 else 0.0  # so that some are past their deadline from the first
    job = Job(call, time.monotonic() + patience, 50, 60, lambda: ends.append(True))
    for one in before:
        hostile.act(*one)
    driver = Driver([job])
    driver.run(until=time.monotonic() + (0.0005 if amid else 0.0))
    for one in amid:
        hostile.act(*one)
    assert driver.run()
    driver.close()
    call.close()
    outcome = job.outcome
    assert ends == [True], "once"
    assert len(outcome.stdout.kept()) <= 50
    assert len(outcome.stderr.kept()) <= 60
    outcome.stdout.text().encode("utf-8", "surrogateescape")
    assert outcome.status is None or -(2**31) <= outcome.status < 2**31
    try:
        error = tools.file_error(outcome, "/workspace/a")
        assert error or outcome.status == 0
    except protocol.RequestFailed as e:
        json.dumps(e.body)
        return f"a {e.body['code']}"
    return "lost" if outcome.lost else "with a status"


@pytest.fixture
def dead() -> Iterator[int]:
    """A descriptor of a process that has ended."""
    process = subprocess.Popen(["true"])
    fd = os.pidfd_open(process.pid)
    process.wait()
    yield fd
    os.close(fd)


def _meet(
    greeting: tuple[bytes, int] | None,
    first: tuple[bytes, int, bool] | None,
    dead: int,
    calls: list[tuple[str, list[Any], list[Any]]],
    end: tuple[bytes, int] | None,
) -> str:
    """One sandbox from the server's side, from its start to its end.

    :param first: what is told of its first process in mode ``bwrap``, and whether that is a process; None for another mode.
    """
    with contextlib.ExitStack() as stack:
        made, far_control, far_lifeline = new_cell(stack, "user" if first is None else "bwrap")
        unread = []
        if first is not None:
            message, count, is_process = first
            _send(far_lifeline, message, count, dead if is_process else None)
            unread.append(message)
        if greeting is None:
            far_control.close()
        elif greeting[0] != b"x" * 70_000:  # that one says nothing
            _send(far_control, *greeting)
        told = "not made"
        try:
            made.wait_ready()
            assert greeting is not None
            assert greeting[0] == zygote.READY
            assert first is None or (first[0] == sandboxes.FIRST and first[1])
            told = "idle"
            for op, before, amid in calls:
                call = _start(made, op)
                hostile = _Zygote(far_control)
                stack.callback(hostile.close)
                told = _run(call, hostile, before, amid)
        except SandboxStartFailed:
            if greeting is not None and greeting[0] == zygote.READY:
                assert first is not None
                assert first[0] != sandboxes.FIRST or not first[1]
                unread.pop()
        if end is not None:
            _send(far_lifeline, *end)
            unread.append(end[0])
        else:
            far_lifeline.close()
            unread.append(b"")
        if first is not None and told != "not made":
            is_dead = first[2]
        else:
            is_dead = next((message == sandboxes.DEAD for message in unread if message != sandboxes.FIRST), False)
        assert made.destroy() == is_dead
        assert made.destroy() == is_dead, "the same, however often"
        with pytest.raises(OSError, match="gone"):
            made.read("/workspace/a", 1)
        return told


def test_what_a_shell_tells_amid_its_input_is_in_nobodys_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pipe of its input has room again just as that is seen to."""
    with contextlib.ExitStack() as stack:
        made, far_control, far_lifeline = new_cell(stack)
        call = made.shell(b"true", b"x" * 100_000)
        hostile = _Zygote(far_control)
        read_told = call.read_told

        def drained() -> int | None:
            hostile.act("drain", b"", 0)
            return read_told()

        monkeypatch.setattr(call, "read_told", drained)
        ends: list[bool] = []
        driver = Driver([Job(call, time.monotonic() + 10, 50, 60, lambda: ends.append(True))])
        hostile.act("told", b"garbage", 0)
        driver.step()
        driver.step()  # the rest of its input
        hostile.act("call", zygote.STATUS.pack(0), 0)
        assert driver.run()
        driver.close()
        hostile.close()
        far_lifeline.close()
        made.destroy()
    assert ends == [True]


@pytest.fixture
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is silent is given up soon."""
    monkeypatch.setattr(cell, "START_LIMIT", 0.001)
    monkeypatch.setattr(cell, "DEATH_LIMIT", 0.001)
    monkeypatch.setattr(capture, "KILL_LIMIT", 0.001)


@PATIENT
@pytest.mark.usefixtures("_impatient")
def test_nothing_that_a_zygote_does_keeps_a_call_from_its_end_or_leaves_a_descriptor(dead: int) -> None:
    seen: Counter[str] = Counter()
    before = os.listdir("/proc/self/fd")

    ends = {"not made", "idle", "a file_error", "lost", "with a status"}

    @fuzz(0.3)
    @given(_MEETINGS, _FIRSTS, st.lists(st.tuples(_OPS, _ON_A_CALL, _ON_A_CALL), max_size=3), _ENDS)
    def meet(greeting: Any, first: Any, calls: Any, end: Any) -> None:
        seen[_meet(greeting, first, dead, calls, end)] += 1
        assert len(os.listdir("/proc/self/fd")) == len(before)

    meet()
    assert ends == seen.keys() or INPUTS < 1000, "of all kinds there are some"
    tell("a zygote", seen)
