"""Other ways between processes: sockets, shared memory, keyrings, the network."""

from __future__ import annotations

import ctypes
import json
import os
import socket
import subprocess
import threading

import pytest
from arena import LOOK, PYTHON, SCOPED_SOCKETS, SHARED, TOKEN, Arena
from attacks import attack
from conftest import ISOLATED, Server, StartServer

READ_SOCKETS = r"""
def ask(address):
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(2)
        sock.connect(address)
        look(repr(address), sock.recv(100))
        print("CONNECTED", repr(address))

for address in given["addresses"]:
    attempt(ask, address)
with open("/proc/net/unix") as f:
    for line in f:
        if given["name"] in line:
            attempt(ask, line.split()[7].replace("@", "\0", 1))
"""


@attack("connect to another's Unix sockets, by path and abstract", "no connection", docker=True)
def test_another_slots_sockets_cannot_be_reached(arena: Arena) -> None:
    if arena.own_users and arena.landlock < SCOPED_SOCKETS:
        pytest.skip("abstract sockets have no owner; this kernel's Landlock does not know them")
    abstract = "\0" + arena.name
    path = arena.outside(arena.name) + ".socket"
    given = {"name": arena.name, "addresses": [abstract, path, *(f"{d}/{arena.name}.socket" for d in SHARED)]}
    assert "CONNECTED" not in arena.steal(READ_SOCKETS, given)


CONNECT = r"""
sock = socket.socket(socket.AF_UNIX)
sock.settimeout(5)
try:
    sock.connect(given)
except OSError as e:
    print("refused", e)
else:
    sock.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
    print("CONNECTED", sock.recv(1000))
"""


@attack("connect to the server's Unix socket, also by a link", "refused")
def test_the_servers_socket_cannot_be_reached(arena: Arena) -> None:
    path = arena.server.address[len("unix://") :]
    environment = {"NEEDLE": TOKEN, "GIVEN": json.dumps(path)}
    control = subprocess.run([PYTHON, "-c", LOOK + CONNECT], env=environment, capture_output=True, text=True, check=True)
    assert "CONNECTED" in control.stdout, "the attack does not work"
    told = arena.run(arena.a, LOOK + CONNECT, given=path)
    assert "refused" in told
    assert "CONNECTED" not in told
    assert "CONNECTED" not in arena.run(arena.a, "import os; os.symlink('" + path + "', 's')\n" + LOOK + CONNECT, given="s")


READ_SHM = r"""
idents = {libc.shmget(given, 0, 0)}
with open("/proc/sysvipc/shm") as f:
    idents |= {int(line.split()[1]) for line in f.readlines()[1:]}
idents |= set(range(200))
for ident in idents:
    address = libc.shmat(ident, None, 0o10000)  # read-only
    if address not in (None, ctypes.c_void_p(-1).value):
        look(f"shm {ident}", ctypes.string_at(address, 100))
        libc.shmdt(ctypes.c_void_p(address))
"""


@attack("attach and remove another's System V shared memory", "neither read nor removed", docker=True)
def test_another_slots_shared_memory_can_be_neither_read_nor_removed(arena: Arena) -> None:
    arena.steal(READ_SHM, arena.key)
    remove = f"""
libc.shmctl(libc.shmget({arena.key}, 0, 0), 0, None)
with open("/proc/sysvipc/shm") as f:
    for line in f.readlines()[1:]:
        libc.shmctl(int(line.split()[1]), 0, None)
for ident in range(200):
    libc.shmctl(ident, 0, None)
"""
    arena.run(arena.a, LOOK + remove)
    arena.assert_unharmed()


KEYS = {"x86_64": (248, 250), "aarch64": (217, 219)}  # add_key, keyctl


@attack("read another's key from the login's session keyring", "no keyring in common")
def test_a_session_keyring_is_not_shared(start_server: StartServer) -> None:
    """Servers that are started from a login have its keyring, and all their children would have it too."""
    if os.uname().machine not in KEYS:
        pytest.skip("the numbers of the system calls are not known here")
    add_key, keyctl = KEYS[os.uname().machine]
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    servers: list[tuple[str, Server]] = []
    failed: list[BaseException] = []

    def start() -> None:
        if libc.syscall(keyctl, 1, None) < 0:  # KEYCTL_JOIN_SESSION_KEYRING, for this thread and its children
            return
        try:
            servers.extend((mode, start_server(mode)) for mode in ISOLATED)
        except BaseException as e:  # a skip too, which must be raised in the test's own thread
            failed.append(e)

    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    if not servers:
        pytest.skip("no session keyring can be made here")
    put = f"secret = b'B-SEC' + b'RET-' + b'0' * 32; print(libc.syscall({add_key}, b'user', b'of-b', secret, len(secret), -3))"
    get = f"""
buffer = ctypes.create_string_buffer(100)
key = libc.syscall({keyctl}, 10, -3, b"user", b"of-b", 0)  # KEYCTL_SEARCH
if key > 0 and libc.syscall({keyctl}, 11, key, buffer, 100) > 0:  # KEYCTL_READ
    look("keyring", buffer.raw)
"""
    leaks = {}
    for mode, server in servers:
        a, b = server.lease(2)
        arena = Arena(server, mode, a, b, "", "", 0, 0)
        if "FOUND" in arena.run(b, LOOK + put + "\n" + get):
            leaks[mode] = "FOUND" in arena.run(a, LOOK + get)
    if not leaks:
        pytest.skip("slots can't use keys at all here")
    assert not any(leaks.values()), leaks


@attack("reach the machine's and another slot's ports without network", "refused; a loopback of its own")
@pytest.mark.parametrize("mode", ["bwrap", "bwrap-as-user"])
def test_without_network_there_is_only_a_loopback_of_the_slots_own(start_server: StartServer, mode: str) -> None:
    server = start_server(mode)
    a, b = server.lease(2)
    assert not a["network"]
    connect = f"""{PYTHON} -c 'import socket, sys
try:
    socket.create_connection(("127.0.0.1", int(sys.argv[1])), 3); print("CONNECTED")
except OSError as e:
    print("refused", e)' """
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        socket.create_connection(("127.0.0.1", port), 3).close()
        assert "refused" in server.bash(a, f"{connect} {port}")["stdout"]
    listen = f"""{PYTHON} -c 'import socket, time
s = socket.create_server(("127.0.0.1", 0)); print(s.getsockname()[1], flush=True); time.sleep(1000)' > port 2>&1 &
until [ -s port ]; do sleep 0.05; done; cat port"""
    port = int(server.bash(b, listen)["stdout"])
    assert server.bash(b, f"{connect} {port}")["stdout"] == "CONNECTED\n"
    assert "refused" in server.bash(a, f"{connect} {port}")["stdout"]
    devices = server.bash(a, "tail -n +3 /proc/net/dev")["stdout"].splitlines()
    assert [line.partition(":")[0].strip() for line in devices] == ["lo"]
    assert server.bash(a, "tail -n +2 /proc/net/route")["stdout"] == ""
