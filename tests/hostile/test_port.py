"""The server's port, from a slot that reaches it: what it answers there, and that others are served meanwhile."""

from __future__ import annotations

import threading
import time
import urllib.parse
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from arena import LOOK, Arena, standing_with
from attacks import Figure, attack
from conftest import wait_until

from slotpool.errors import ContainerRefused
from slotpool.sandbox.client import SandboxClient

pytestmark = pytest.mark.arenas("bwrap", "user", "docker")
MOST_GROWTH = 200 << 20  # bytes of the server's memory while it is attacked
standing = standing_with(tcp=True, slots=3)

# What the attacks share: requests as bytes, and what comes back.
TALK = (
    LOOK
    + r"""
port = given["port"]

def connect():
    return socket.create_connection(("127.0.0.1", port), 20)

def talk(sent, limit=1 << 20):
    received = b""
    with connect() as sock:
        try:
            sock.sendall(sent)
            sock.shutdown(socket.SHUT_WR)
        except OSError:
            pass
        try:
            while len(received) < limit:
                part = sock.recv(65536)
                if not part:
                    break
                received += part
        except OSError:
            pass
    return received

def request(method, target, *headers, body=b""):
    lines = [f"{method} {target} HTTP/1.1", "Host: x", *headers]
    if body:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body

def status(answer):
    return int(answer[9:12]) if answer[:9] == b"HTTP/1.1 " else 0

def routes(slot):
    call = {"execution_id": "x" + os.urandom(4).hex(), "tool": "bash", "args": {"command": "touch planted"}, "timeout": 5}
    calls = [dict(call, slot=slot, lease=given["lease"], execution_id="y" + os.urandom(4).hex())]
    def post(path, value):
        return "POST", path, json.dumps(value).encode()
    return [
        ("GET", "/metrics", b""),
        ("GET", "/v1/slots", b""),
        post("/v1/leases/renew", {"tokens": [given["lease"]]}),
        post("/v1/batch", {"calls": calls, "wait": 5}),
        post(f"/v1/slots/{slot}/execute", dict(call, wait=5)),
        post(f"/v1/slots/{slot}/cancel", {"execution_id": "x"}),
        ("PUT", f"/v1/slots/{slot}/file?path=planted", b"planted"),
        ("GET", f"/v1/slots/{slot}/file?path={given['name']}", b""),
        post(f"/v1/slots/{slot}/reset", {}),
        post("/v1/leases", {"owner": "thief", "ttl": 60, "take": 0, "release": [given["lease"]], "wait": 0}),
        post("/v1/cordon", {"owner": "thief", "ttl": 0, "release": [given["lease"]]}),
    ]
"""
)


@pytest.fixture
def reached(arena: Arena) -> Iterator[Arena]:
    """The arena, its attacker with network."""
    if not arena.own_users:
        assert arena.server.client.reset(arena.a["slot"], arena.a["token"], True)
    yield arena
    # An attack's connections end with its processes, a moment later.
    assert wait_until(lambda: arena.threads() < 60), arena.threads()


def port_of(arena: Arena) -> int:
    if arena.mode == "docker":
        return 8080
    return int(urllib.parse.urlsplit(arena.server.address).port or 0)


def try_it(arena: Arena, attack: str, **given: Any) -> str:
    return arena.run(arena.a, TALK + attack, given={"port": port_of(arena), **given})


WITHOUT_TOKEN = r"""
for headers in given["authorizations"]:
    for method, target, body in routes(given["slot"]):
        answer = talk(request(method, target, f"Slotpool-Lease: {given['lease']}", *headers, body=body))
        print("REFUSED" if status(answer) in (400, 401) else "DONE", status(answer), headers, method, target)
        look(target, answer)
answer = talk(request("GET", "/health"))
print("HEALTH", answer.partition(b"\r\n\r\n")[2].decode())
"""


@attack("the server's port: every route with a victim's lease token, and no, a cut, doubled, misplaced bearer token", "refused")
def test_no_route_is_open_to_who_lacks_the_servers_token(reached: Arena) -> None:
    arena, b, token = reached, reached.b, reached.server.token
    wrong = ["", "Bearer", "Bearer ", "Bearer null", f"Bearer {token[:-1]}", f"Bearer {token}x", f"Bearer {token[::-1]}"]
    wrong += [f"Bearer {token.lower()}", f"Bearer {token},Bearer {token}", f"Basic {token}", f"Bearer {b['token']}", token]
    authorizations = [[], *([f"Authorization: {value}"] for value in wrong), [f"Authorization_: Bearer {token}"]]
    authorizations += [
        [f"Proxy-Authorization: Bearer {token}"],
        [f"Cookie: Bearer {token}"],
        [f"Authorization : Bearer {token}"],
    ]
    told = try_it(arena, WITHOUT_TOKEN, authorizations=authorizations, slot=b["slot"], lease=b["token"], name=arena.name)
    assert "DONE" not in told
    assert told.count("REFUSED") == 11 * len(authorizations)
    assert "FOUND" not in told
    assert 'HEALTH {"status": "ok"}' in told
    arena.assert_unharmed()
    sound = [[f"Authorization: Bearer {token}"]]
    told = try_it(arena, WITHOUT_TOKEN, authorizations=sound, slot=b["slot"], lease=b["token"], name=arena.name)
    assert told.count("DONE 200") >= 3, "the attack does not work"


WITH_TOKENS = r"""
for slot, lease in ((slot, lease) for slot in given["slots"] for lease in given["leases"]):
    given["lease"] = lease
    for method, target, body in routes(slot):
        if target.startswith("/v1/slots/"):
            answer = talk(request(method, target, f"Slotpool-Lease: {lease}", given["bearer"], body=body))
            print("REFUSED" if status(answer) == 409 else "DONE", status(answer), lease, method, target)
            look(target, answer)
        elif target in ("/v1/batch", "/v1/leases/renew", "/v1/cordon", "/v1/leases"):
            answer = talk(request(method, target, given["bearer"], body=body))
            print("TOLD", target, answer.partition(b"\r\n\r\n")[2].decode())
"""


@attack(
    "the server's port, its token stolen: a victim's slot by a stale, another slot's, a cut lease token",
    "refused; nothing changes",
)
def test_a_lease_token_is_of_no_use_for_another_slot_or_after_its_lease(reached: Arena) -> None:
    arena, a, b = reached, reached.a, reached.b
    (stale,) = arena.server.lease()
    arena.server.client.lease("test", 30.0, 0, [stale["token"]])
    leases = [stale["token"], a["token"][:-1], b["token"][:-1], b["token"] + "x", b["token"].swapcase(), ""]
    bearer = f"Authorization: Bearer {arena.server.token}"
    told = try_it(arena, WITH_TOKENS, leases=leases, bearer=bearer, slots=[b["slot"], stale["slot"]], name=arena.name)
    assert "DONE" not in told
    assert told.count("REFUSED") == 5 * 2 * len(leases)
    assert "FOUND" not in told
    assert told.count('"error": {"code": "lease_lost"') == 2 * (len(leases) - 1)  # of batches
    arena.assert_unharmed()
    (own,) = arena.server.lease()
    told = try_it(arena, WITH_TOKENS, leases=[own["token"]], bearer=bearer, slots=[own["slot"]], name=arena.name)
    assert told.count("DONE 20") == 4, "the attack does not work"


GUESS = r"""
import secrets
counts = {}
with connect() as sock:
    for guess in [*(secrets.token_urlsafe(16) for _ in range(given["count"])), *given["own"]]:
        sock.sendall(request("GET", f"/v1/slots/{given['slot']}/file?path=none", f"Slotpool-Lease: {guess}", given["bearer"]))
        received = b""
        while b"\r\n\r\n" not in received or not received.endswith(b"}"):
            received += sock.recv(65536)
        counts[status(received)] = counts.get(status(received), 0) + 1
print(json.dumps(counts))
"""


@attack("the server's port, its token stolen: guess a victim's lease token, 1,000 times", "none is right")
def test_a_lease_token_cannot_be_guessed(reached: Arena) -> None:
    arena, a, b = reached, reached.a, reached.b
    bearer = f"Authorization: Bearer {arena.server.token}"
    told = try_it(arena, GUESS, count=1000, own=[a["token"]], slot=b["slot"], bearer=bearer)
    assert told.strip() == '{"409": 1001}'
    told = try_it(arena, GUESS, count=0, own=[a["token"]], slot=a["slot"], bearer=bearer)
    assert told.strip() == '{"422": 1}', "the attack does not work"
    arena.assert_unharmed()


SMUGGLE = r"""
headers = f"Slotpool-Lease: {given['lease']}", given["bearer"]
inner = request("PUT", f"/v1/slots/{given['slot']}/file?path=smuggled", *headers, body=b"x")
forms = [
    (["Transfer-Encoding: chunked", f"Content-Length: {len(inner) + 5}"], b"0\r\n\r\n" + inner),
    (["Transfer-Encoding: chunked"], b"0\r\n\r\n" + inner),
    (["Transfer-Encoding : chunked"], b"0\r\n\r\n" + inner),
    (["Transfer-Encoding: xchunked"], b"0\r\n\r\n" + inner),
    (["Transfer-Encoding:\x0bchunked"], b"0\r\n\r\n" + inner),
    (["X: y\nTransfer-Encoding: chunked"], b"0\r\n\r\n" + inner),
    (["Content-Length: 0", f"Content-Length: {len(inner)}"], inner),
    ([f"Content-Length: {len(inner)}, 0"], inner),
    (["Content-Length: +0"], inner),
    (["Content-Length: 0x0"], inner),
    (["Content-Length: 0 0"], inner),
    (["Content-Length : 0"], inner),
    (["Content-Length:\r\n 0"], inner),
    ([f"Content-Length: {len(inner)}"], inner),  # not ambiguous: it is a body
    (["Content-Length: " + "0" * 19], inner),
]
for headers, body in forms:
    for outer in (["GET /health HTTP/1.1", "Host: x"], ["POST /v1/leases/renew HTTP/1.1", "Host: x", given["bearer"]]):
        answer = talk("\r\n".join([*outer, *headers, "", ""]).encode() + body)
        print("SMUGGLED" if b" 204 " in answer or answer.count(b"HTTP/1.1 ") != 1 else "REFUSED", headers, outer[0])
if given["plain"]:
    print("PLAIN", status(talk(inner)))
"""


@attack(
    "request smuggling: two lengths, chunks, folded and malformed headers before a hidden request", "it is never seen as one"
)
def test_no_request_can_be_hidden_in_another(reached: Arena) -> None:
    arena, b = reached, reached.b
    given = {"slot": b["slot"], "lease": b["token"], "bearer": f"Authorization: Bearer {arena.server.token}"}
    told = try_it(arena, SMUGGLE, plain=False, **given)
    assert "SMUGGLED" not in told
    assert told.count("REFUSED") == 30
    arena.assert_unharmed()
    assert "PLAIN 204" in try_it(arena, SMUGGLE, plain=True, **given), "the attack does not work"
    assert arena.server.bash(b, "cat smuggled")["stdout"] == "x"


TAKE_OVER = r"""
for address in ("127.0.0.1", "0.0.0.0", "::", "::1"):
    for options in ((), (socket.SO_REUSEADDR,), (socket.SO_REUSEPORT,), (socket.SO_REUSEADDR, socket.SO_REUSEPORT)):
        sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
        try:
            for option in options:
                sock.setsockopt(socket.SOL_SOCKET, option, 1)
            if ":" in address:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0 if address == "::" else 1)
            sock.bind((address, port))
            sock.listen()
            print("BOUND", address, options)
            sock.settimeout(0.1)
            sock.accept()
            print("TAKEN")
        except OSError as e:
            print("refused", address, e)
        finally:
            sock.close()
"""


@attack(
    "the server's port: bind it too, by SO_REUSEADDR, SO_REUSEPORT, on all addresses", "no client ever comes to the attacker"
)
def test_the_port_cannot_be_taken_over(reached: Arena) -> None:
    arena, ended = reached, threading.Event()

    def call() -> None:
        while not ended.is_set():
            client = SandboxClient(arena.server.address, arena.server.token)
            assert client.health()["status"] == "ok"
            client.close()

    with ThreadPoolExecutor(1) as thread:
        calling = thread.submit(call)
        try:
            told = try_it(arena, TAKE_OVER)
        finally:
            ended.set()
        calling.result()
    assert "TAKEN" not in told
    assert "BOUND 127.0.0.1" not in told
    assert "BOUND 0.0.0.0" not in told
    assert "BOUND 127.0.0.1" in arena.run(arena.a, TALK + TAKE_OVER, given={"port": 54_321}), "the attack does not work"


# Floods: each says what it has done, and goes on until it is killed.

FLOOD = r"""
import resource
_, most = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
made = 0

def tell():
    with open("made.new", "w") as f:
        f.write(str(made))
    os.rename("made.new", "made")

def open_one():
    global made
    sock = socket.socket()
    sock.settimeout(5)
    try:
        sock.connect(("127.0.0.1", port))
    except OSError:
        sock.close()
        return None
    made += 1
    if made % 100 == 0:
        tell()
    return sock
"""

SILENT = r"""
held = []
while True:
    held.append(open_one())
    if len(held) > min(12_000, most * 3 // 4):
        del held[:1000]
"""

LORIS = r"""
held = []
while True:
    sock = open_one()
    if sock is not None:
        attempt(sock.sendall, b"GET /health HTTP/1.1\r\nHost: x\r\nA: ")
        held.append(sock)
    for old in held[-3:] + held[:3]:
        attempt(old.send, b"a")
    if len(held) > 3000:
        held.pop(0).close()
"""

ASK = r"""
import itertools
def ask():
    for target in itertools.cycle(("/health", "/metrics", "/v1/slots", "/" + "x" * 1000)):
        sock = open_one()
        if sock is not None:
            attempt(sock.sendall, request("POST" if target[1] == "v" else "GET", target, body=b"x" * 1000))
            attempt(sock.recv, 1000)
            sock.close()
for _ in range(16):
    threading.Thread(target=ask).start()
"""

HUGE = r"""
line = b"A: " + b"x" * 1000 + b"\r\n"
def ask(n):
    while True:
        sock = open_one()
        if sock is None:
            continue
        try:
            if n % 4 == 0:
                sock.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n" + line * 5000)
            elif n % 4 == 1:
                sock.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n" + b"A:b\r\n" * 6000 + b"\r\n")
            elif n % 4 == 2:
                sock.sendall(b"GET /" + b"x" * (1 << 22))
            else:
                sock.sendall(b"PUT /v1/slots/slot_0/file?path=a HTTP/1.1\r\nHost: x\r\nContent-Length: 999999999999\r\n\r\n")
                for _ in range(100):
                    sock.sendall(bytes(1 << 20))
        except OSError:
            pass
        attempt(sock.recv, 1000)
        sock.close()
for n in range(8):
    threading.Thread(target=ask, args=(n,)).start()
"""


def flood(name: str, code: str, least: int) -> Any:
    holds = "others are served; no thread is held, memory is bounded"
    return pytest.param(code, least, id=name, marks=attack(f"the server's port: {name}", holds))


@pytest.mark.arenas("bwrap", "docker")
@pytest.mark.parametrize(
    ("code", "least"),
    [
        flood("10,000 connections, silent", SILENT, 10_000),
        flood("slow-loris: a byte now and then", LORIS, 2_000),
        flood("requests without a token, as fast as it can", ASK, 300),
        flood("huge heads and bodies, endless lines", HUGE, 50),
    ],
)
def test_others_are_served_during_a_flood(reached: Arena, code: str, least: int, figure: Figure) -> None:
    arena = reached
    memory = arena.memory()
    quiet = p95(quietly(arena))
    beside, made, threads = during(arena, code, least)
    grown = arena.memory() - memory
    figure(f"{made} connections, p95 {quiet * 1000:.1f} ms quiet, {p95(beside) * 1000:.1f} ms beside, {threads} threads")
    arena.assert_unharmed()
    assert threads < 100
    assert grown < MOST_GROWTH


def during(arena: Arena, code: str, least: int) -> tuple[list[float], int, int]:
    """How long others' commands take, how many connections were made, and the most threads that were seen."""
    client, a = arena.server.client, arena.a
    client.write_file(a["slot"], a["token"], "flood.py", (TALK + FLOOD + code).encode())
    env = {"NEEDLE": "x", "GIVEN": f'{{"port": {port_of(arena)}}}'}
    flooding = arena.server.bash(a, f"echo 0 >made; {arena.python} flood.py >log 2>&1 & echo $!", env=env)["stdout"]
    taken: list[float] = []
    threads = made = 0
    deadline = time.monotonic() + 60
    while len(taken) < 60 or made < least:
        assert time.monotonic() < deadline, (made, arena.server.bash(a, "cat log"))
        taken += ask(arena)
        threads = max(threads, arena.threads())
        made = int(client.read_file(a["slot"], a["token"], "made"))
    arena.server.bash(a, f"kill -9 {flooding}")
    return taken, made, threads


def quietly(arena: Arena) -> list[float]:
    return [one for _ in range(15) for one in ask(arena)]


def p95(taken: list[float]) -> float:
    return sorted(taken)[int(len(taken) * 0.95)]


def ask(arena: Arena) -> list[float]:
    """How long a command takes, on a connection that is kept, and on a new one."""
    taken = []
    fresh = SandboxClient(arena.server.address, arena.server.token)
    for client in (arena.server.client, fresh):
        began = time.perf_counter()
        result = client.execute(arena.b["slot"], arena.b["token"], "bash", {"command": "echo well"}, 20.0)
        taken.append(time.perf_counter() - began)
        assert result["stdout"] == "well\n"
    fresh.close()
    return taken


def test_a_stranger_is_a_stranger_here_too(reached: Arena) -> None:
    """The client that the floods are measured with is let in by its token, and not for where it comes from."""
    client = SandboxClient(reached.server.address, "wrong")
    with pytest.raises(ContainerRefused):
        client.execute(reached.b["slot"], reached.b["token"], "bash", {"command": "true"}, 5.0)
    client.close()
